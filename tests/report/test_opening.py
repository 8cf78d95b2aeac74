"""Which images, methods and control a report begins with."""

from dataclasses import replace

import numpy as np
import pytest

from sightline.evaluation import Evaluation, Example
from sightline.facts import Finding
from sightline.report.opening import opening


def examples(*answers: bool | None) -> tuple[Example, ...]:
    """Right, wrong and unlabeled images, named by their places."""
    return tuple(
        Example(
            name=str(i),
            image=np.full((2, 2, 3), i, np.uint8),
            label=None if is_right is None else "cat",
            prediction="dog" if is_right is False else "cat",
            probability=0.9,
            maps={name: np.eye(2) for name in ("lrp", "attention@conv", "cam", "grad_cam", "saliency", "edge_map")},
            verdicts={},
        )
        for i, is_right in enumerate(answers)
    )


@pytest.mark.parametrize(
    ("answers", "names", "rule"),
    [
        ([True] * 4 + [False] * 5, "041526", "The first 3 right and the first 3 wrong answers among 9 images drawn"),
        ([True] * 8 + [False], "081234", "The first 5 right and the first wrong answer among 9 images drawn"),
        ([False] * 8 + [True], "801234", "The first right and the first 5 wrong answers among 9 images drawn"),
        ([True] * 9, "012345", "The first 6 of 9 images drawn at random, all named correctly."),
        ([False] * 2, "01", "The first 2 of 2 images drawn at random, all named wrongly."),
        ([None] * 7, "012345", "The first 6 of 7 images drawn at random."),
        (
            [True] * 5 + [None] * 5,
            "012345",
            "The first 5 right and the first unlabeled among 10 images drawn at random.",
        ),
        (
            [None] * 2 + [True, False],
            "2301",
            "The first right, the first wrong and the first 2 unlabeled among 4 images drawn at random.",
        ),
        ([], "", "The first 0 of 0 images drawn at random"),
    ],
)
def test_images_are_the_first_right_and_wrong_ones(evaluation: Evaluation, answers, names, rule):
    chosen = opening(replace(evaluation, examples=examples(*answers)))
    assert "".join(example.name for example in chosen.examples) == names and chosen.rule.startswith(rule)


def test_the_best_method_comes_first_then_the_best_known(evaluation: Evaluation):
    methods = ("saliency", "lrp", "cam", "attention@conv", "grad_cam", "edge_map")
    made = replace(evaluation, methods=methods, controls=("edge_map",), examples=examples(True), standings={})
    assert opening(replace(made, summary=())).methods == ("grad_cam", "attention@conv", "cam", "lrp")
    best = Finding("which map", "Saliency.", believed=("saliency", "lrp"))
    chosen = opening(replace(made, summary=(best,)))
    assert chosen.methods == ("saliency", "grad_cam", "attention@conv", "cam") and chosen.answers == (best,)


def test_the_control_is_the_best_one_in_the_first_metric(evaluation: Evaluation):
    assert opening(evaluation).control == "edge_map"  # in deletion, where lower is better
    metrics = evaluation.metrics[1:]
    assert opening(replace(evaluation, metrics=metrics)).control == "contrast_map"
    assert opening(replace(evaluation, metrics=(), controls=("center_map", "edge_map"))).control == "center_map"
    assert opening(replace(evaluation, controls=())).control is None
