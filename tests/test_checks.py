"""Options that count something, in every explainer and metric, are whole numbers."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from sightline.explainers import EXPLAINERS, explain
from sightline.metrics import (
    METRICS,
    PerturbationMetric,
    inputs_of,
    max_box_accuracy,
    pointing_game,
    randomization_curve,
)

COUNTED = {
    "integrated_gradients": ["steps"],
    "smooth_grad": ["samples", "seed"],
    "var_grad": ["samples", "seed"],
    "occlusion": ["patch", "stride"],
    "rise": ["masks", "cells", "seed"],
    "score_cam": ["channels"],
    "random_map": ["seed", "cells"],
}
SHARED = ["steps", "batch_size"]
IN_METRICS = {
    "pointing_game": ["tolerance"],
    "max_box_accuracy": ["thresholds"],
    "parameter_randomization": ["stages", "seed"],
    "random_logit": ["seed"],
    "max_sensitivity": ["samples", "seed"],
} | {name: SHARED for name, metric in METRICS.items() if isinstance(metric.function, PerturbationMetric)}
BAD = [1.5, True, "3", np.float32(2)]


def model():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2))


def refuses(option, bad):
    return pytest.raises(TypeError, match=f"expected a whole number as {option}, got .*; give an int")


def test_every_option_that_counts_is_listed():
    for name, explainer in EXPLAINERS.items():
        for option, parameter in explainer.__signature__.parameters.items():
            if option in explainer.options and {int, int | None} & {parameter.annotation}:
                assert option in COUNTED[name]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(("name", "option"), [(name, option) for name in COUNTED for option in COUNTED[name]])
def test_explainers(name, option, bad, unchecked):
    with refuses(option, bad):
        explain(model(), torch.rand(1, 1, 6, 6), 0, [partial(EXPLAINERS[name], **{option: bad})])


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("option", ["batch_size", "call"])
def test_explain(option, bad, unchecked):
    with refuses(option, bad):
        explain(model(), torch.rand(1, 1, 6, 6), 0, ["occlusion"], **{option: bad})


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(("name", "option"), [(name, option) for name in IN_METRICS for option in IN_METRICS[name]])
def test_metrics(name, option, bad, unchecked):
    images, masks = torch.rand(2, 1, 6, 6), torch.ones(2, 1, 6, 6, dtype=torch.bool)
    given = {"model": model(), "images": images, "maps": images, "masks": masks, "targets": torch.tensor([0, 1])}
    given["explain"] = lambda model, images, targets: images
    wanted = {key: value for key, value in given.items() if key in inputs_of(METRICS[name])}
    with refuses(option, bad):
        METRICS[name].function(**wanted, **{option: bad})


def test_whole_numbers_of_other_libraries_are_taken(unchecked):
    images, masks = torch.rand(1, 1, 6, 6), torch.ones(1, 1, 6, 6, dtype=torch.bool)
    assert pointing_game(images, masks, tolerance=np.int64(1)).item() == 1
    assert max_box_accuracy(images, masks, thresholds=np.int16(3)).shape == (1, 3)
    maps = explain(model(), images, 0, [partial(EXPLAINERS["rise"], masks=np.int32(3))]).maps
    assert next(iter(maps.values())).shape == images.shape
    _, curve = randomization_curve(
        model(), images, torch.tensor([0]), lambda model, images, targets: images, stages=np.uint8(2)
    )
    assert curve.shape == (1, 2)
