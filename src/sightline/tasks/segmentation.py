"""Weakly supervised segmentation: maps of a network that learned from class labels, against masks of the objects."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from sightline import runs
from sightline.data import ImageSet, normalize
from sightline.data.splits import draw
from sightline.explainers import explain, fitting, named
from sightline.metrics.localization import jaccard
from sightline.tasks.images import each, images_for
from sightline.tasks.outcome import Figure, Outcome, register

Array = np.ndarray
CONTROLS = ("random_map", "center_map", "edge_map", "contrast_map")
MEAN_MASK = "mean mask"
THRESHOLDS = tuple(step / 20 for step in range(20))
"""Of a map that is scaled from its minimum 0 to its maximum 1."""


@register("segmentation")
def segmentation(
    run: runs.Run,
    model: nn.Module,
    *,
    data: str | None = None,
    fields: dict[str, Any] | None = None,
    methods: tuple[str, ...] = ("grad_cam",),
    limit: int = 500,
) -> Outcome:
    """Jaccard index of binarized maps and masks, beside that of maps that ignore the network.

    The first is the network's own map: the attention of its last level, or its activation map if it has no attention.
    Each map is resized to the masks and scaled from 0 to 1; the pixels at or above a threshold are its object. Each
    method has one threshold for all images, the best on training images. So have the controls, among them the mean of
    the training masks, which is the same for every image. Chance: all pixels are the object.

    Args:
        run: a trained run.
        model: its network.
        data: images with masks or boxes, as `data.source` of a recipe, resized to the run's size. None: the run's.
        fields: further fields of their `data`, for example `{mask_values: 2}`.
        methods: further explainers, as for `sightline.explain`; "attention@attention.conv10" is that of another level.
            Those that do not fit the network are left out, with a notice.
        limit: number of training images and of test images to make maps of.

    Raises:
        OSError: the images are missing.
        ValueError: images without masks and boxes, an unknown method, no image to choose a threshold on.

    Source: Jetley et al. 2018 (1804.02391), "Learn To Pay Attention", experiment on weakly supervised segmentation.
    Differs: how the paper binarizes maps is not known; its images (Object Discovery) have classes of CIFAR.
    """
    if limit < 1:
        raise ValueError(f"expected a limit of 1 image or more, got {limit}")
    for name in methods:
        named(name)  # a wrong name is refused before the images are read
    sets = images_for(run, data, fields)
    for split in ("train", "test"):
        if not (sets[split].has_masks or sets[split].has_boxes):
            raise ValueError(
                f"expected images with masks or boxes, got {sets[split].name} without; name others by --task.data"
            )
    rows = {split: draw(sets[split].labels, limit, seed=0) for split in ("train", "test")}
    regions = [batch.regions for batch in each(sets["train"], rows["train"], model)]
    prior = torch.cat([region for region in regions if region is not None]).double().mean(0, keepdim=True)
    (first,) = each(sets["train"], rows["train"][:1], model)
    own, left_out = _own(model, normalize(first.images, sets["train"].preprocess), methods)
    chosen = {"own map": own, **{name: name for name in methods if name not in left_out}}
    scores = {split: _scores(model, sets[split], rows[split], chosen, prior) for split in ("train", "test")}
    best = {name: _best(values, sets["train"].name) for name, values in scores["train"][0].items()}
    values = {name: scores["test"][0][name][:, places] for name, (places, _) in best.items()}
    control = max((*CONTROLS, MEAN_MASK), key=lambda name: best[name][1])
    groups = None if sets["test"].groups is None else sets["test"].groups[rows["test"]]
    area = float(np.nanmean(scores["test"][1]))
    figures = {name: Figure(values=one, unit="images", groups=groups, chance=area) for name, one in values.items()}
    gap = Figure(values=values["own map"] - values[control], unit="images", groups=groups)
    return Outcome(
        task="segmentation",
        figures={"own map": figures["own map"], "own map - best control": gap, **figures},
        names={"images": [sets["test"].names[i] for i in rows["test"].tolist()]},
        notices=(
            f"The own map is {own}.",
            f"Thresholds, chosen on {len(rows['train'])} training images: "
            f"{', '.join(f'{name} {THRESHOLDS[place]:g}' for name, (place, _) in best.items())}.",
            f"{control} is the best control on the training images.",
            *(f"{name} is left out: {reason}" for name, reason in left_out.items()),
        ),
    )


def _own(model: nn.Module, images: Tensor, methods: tuple[str, ...]) -> tuple[str, dict[str, str]]:
    """The method of the own map, and those of the others that do not fit, with the reason."""
    fits, reasons = fitting(model, images, ["attention", "activation_map", *methods])
    own = next((name for name in ("attention", "activation_map") if name in fits), None)
    if own is None:
        raise ValueError(f"expected a network with attention or feature maps, got none: {reasons['activation_map']}")
    return own, {name: reasons[name] for name in methods if name in reasons}


def _scores(
    model: nn.Module,
    images: ImageSet,
    rows: Int64[Array, " n"],
    methods: dict[str, str],
    prior: Float[Tensor, "1 1 h w"],
) -> tuple[dict[str, Float[Array, "n thresholds"]], Float[Array, " n"]]:
    """Jaccard index of each method at each threshold, and the areas of the masks; NaN for empty masks."""
    scores: dict[str, list[Tensor]] = {name: [] for name in (*methods, *CONTROLS, MEAN_MASK)}
    areas: list[Tensor] = []
    for batch in each(images, rows, model):
        inputs, masks = normalize(batch.images, images.preprocess), _masks(batch.regions)
        explanation = explain(model, inputs, methods=[*dict.fromkeys(methods.values()), *CONTROLS])
        maps = {name: explanation[method] for name, method in methods.items()}
        maps |= {name: explanation[name] for name in CONTROLS}
        maps[MEAN_MASK] = prior.to(inputs).expand(len(inputs), -1, -1, -1)
        for name, values in maps.items():
            scores[name].append(jaccard(values, masks, THRESHOLDS).cpu().double())
        area = masks.double().mean((1, 2, 3))
        areas.append(area.where(area > 0, torch.nan).cpu())
    return {name: torch.cat(parts).numpy() for name, parts in scores.items()}, torch.cat(areas).numpy()


def _masks(regions: Tensor | None) -> Bool[Tensor, "b 1 h w"]:
    assert regions is not None
    return regions


def _best(scores: Float[Array, "n thresholds"], name: str) -> tuple[int, float]:
    """The place of the threshold with the highest mean, and that mean; of several, the lowest threshold."""
    defined = scores[~np.isnan(scores).any(1)]
    if not len(defined):
        raise ValueError(f"expected a training image of {name} with an object and a map, got none")
    means = defined.mean(0)
    return int(means.argmax()), float(means.max())
