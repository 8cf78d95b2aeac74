"""Which map to believe, and where the model looks, from made scores."""

import sys
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

import numpy as np
import pytest

from sightline.evaluation import Evaluation
from sightline.evaluation.conclusions import unbeaten, where_it_looks, which_map
from sightline.evaluation.ranking import rank

METHODS, CONTROLS = ("cam", "grad_cam", "lrp"), ("center_map", "edge_map")
TEST = "parameter_randomization"
HIGHER = {"insertion_auc": True, "deletion_auc": False, "energy_in_mask": True, TEST: None}


def made(
    leads: dict[str, dict[str, float]],
    n: int = 40,
    controls: tuple[str, ...] = CONTROLS,
    chance: float | None = None,
    undefined: Mapping[str, tuple[str, ...]] = MappingProxyType({}),
    **more,
) -> Evaluation:
    """Scores of n images: each method's lead over the controls, 0 where none is named, in some noise.

    `undefined`: metric -> who is undefined on a quarter of the images.
    """
    rng = np.random.default_rng(0)
    table = {}
    for metric, lead in leads.items():
        sign = 1 if HIGHER[metric] else -1
        names = (*METHODS, *controls)
        table[metric] = {name: 0.5 + sign * lead.get(name, 0.0) + rng.normal(0, 0.01, n) for name in names}
    chances = {} if chance is None else dict.fromkeys(table, chance)
    table[TEST] = dict.fromkeys((*METHODS, *controls), np.zeros(n))
    for metric, names in undefined.items():
        table[metric] |= {name: np.where(np.arange(n) < n / 4, np.nan, table[metric][name]) for name in names}
    metrics = tuple(table)
    evaluation = Evaluation(
        data="made",
        split="test",
        model="net",
        n_images=n,
        unit="images",
        classes=("a", "b"),
        methods=(*METHODS, *controls),
        controls=controls,
        layers={},
        metrics=metrics,
        higher_is_better={metric: HIGHER[metric] for metric in metrics},
        chance=chances,
        accuracy=None,
        majority=None,
        confusion=None,
        per_image={"name": [str(i) for i in range(n)]},
        examples=(),
        errors=(),
        mean_maps={},
        verdicts={},
        summary=(),
        skipped=(),
        provenance={"images with maps": str(n)},
        **rank(table, HIGHER, controls, chances),
    )
    return replace(evaluation, **more)


def believed(evaluation: Evaluation, is_too_few: bool = False) -> tuple[str, tuple[str, ...]]:
    finding = which_map(evaluation, evaluation.n_images, is_too_few)
    assert finding.kind == "which map" and "_" not in finding
    return str(finding), finding.values["believed"]


BOTH = {"insertion_auc": {"cam": 0.2, "lrp": 0.1}, "deletion_auc": {"cam": 0.2, "lrp": 0.1}}


def test_one_that_beats_every_control_everywhere_is_believed():
    text, names = believed(made(BOTH))
    assert text == "CAM is the map to believe here: it beats every control in 2 of 2 measures." and names == ("cam",)
    untested = replace(made(BOTH), metrics=("insertion_auc", "deletion_auc"))
    assert believed(untested)[0].endswith("in 2 of 2 measures; the randomization test was not run.")
    text, _ = believed(made({"deletion_auc": {"cam": 0.2}}))
    asked = "deletion (how fast the class is lost as the most important pixels are removed)"
    assert text == f"CAM is the map to believe here: it beats every control in the only measure, {asked}."


def test_where_none_beats_a_control_none_is_believed():
    text, names = believed(made({"insertion_auc": {}, "deletion_auc": {}}))
    assert names == () and text == (
        "Do not rely on these maps: with 40 images, none is shown to beat a blob in the middle (center map) in any of "
        "2 measures."
    )
    here_and_there = {"insertion_auc": {"center_map": -0.2}, "deletion_auc": {"edge_map": -0.2}}
    assert believed(made(here_and_there)) == (
        "Do not rely on these maps: with 40 images, none is shown to beat every control in any of 2 measures.",
        (),
    )


def test_those_that_cannot_be_told_apart_are_believed_together():
    text, names = believed(made({metric: {"cam": 0.2, "grad_cam": 0.2} for metric in BOTH}))
    assert set(names) == {"cam", "grad_cam"} and text.endswith(
        "are the maps to believe here: each beats every control in 2 of 2 measures; 40 images cannot tell them apart."
    )
    at_odds = {
        "insertion_auc": {"cam": 0.2, "grad_cam": 0.1},
        "deletion_auc": {"cam": 0.1, "grad_cam": 0.2},
    }
    text, names = believed(made(at_odds))
    assert set(names) == {"cam", "grad_cam"} and text.endswith("which of them is better depends on the measure.")


def test_one_that_beats_the_controls_somewhere_is_believed_with_reservations():
    text, names = believed(made({"insertion_auc": {"cam": 0.2}, "deletion_auc": {"cam": 0.2, "center_map": 0.3}}))
    assert names == ("cam",) and text.startswith(
        "Believe CAM with reservations: it beats every control in 1 of 2 measures, insertion (how fast"
    )
    assert "but a blob in the middle (center map) beats it in deletion (how fast" in text
    text, _ = believed(made({"insertion_auc": {"cam": 0.2}, "deletion_auc": {}}))
    assert "but not a blob in the middle (center map) and the edges in the image (edge map) in deletion" in text


def test_a_measure_is_named_only_if_it_holds_for_all_that_are_believed():
    text, names = believed(made({"insertion_auc": {"cam": 0.2}, "deletion_auc": {"lrp": 0.2}}))
    assert set(names) == {"cam", "lrp"} and text == (
        "Believe CAM and LRP with reservations: each beats every control in 1 of 2 measures; which of them is better "
        "depends on the measure."
    )


def told_apart(pairs: dict[tuple[str, str], int]) -> Evaluation:
    """Grad-CAM above CAM above LRP, each above the controls; in how many of two metrics pairs can be told apart."""
    result = made({metric: {"cam": 0.25, "grad_cam": 0.3, "lrp": 0.2} for metric in BOTH})
    places = {"insertion_auc": 0, "deletion_auc": 1}
    return replace(
        result,
        comparisons=tuple(
            pair
            if pair.other in CONTROLS
            else replace(pair, adjusted=0.01 if pairs.get((pair.method, pair.other), 0) > places[pair.metric] else 1.0)
            for pair in result.comparisons
        ),
    )


def test_the_first_is_one_to_which_no_other_is_preferred():
    """CAM beats LRP in both, Grad-CAM beats CAM in one: CAM wins more often, but no other is ahead of Grad-CAM."""
    text, names = believed(told_apart({("cam", "grad_cam"): 1, ("cam", "lrp"): 2}))
    assert names == ("grad_cam", "lrp")
    assert text.startswith("Grad-CAM and LRP are the maps") and text.endswith("; 40 images cannot tell them apart.")


def test_those_that_can_be_told_apart_are_not_said_to_be_alike():
    text, names = believed(told_apart({("grad_cam", "lrp"): 1}))
    assert names == ("grad_cam", "cam") and text.endswith("; 40 images cannot tell them apart.")
    text, names = believed(told_apart({("cam", "lrp"): 1}))
    assert names == ("cam", "grad_cam") and text.endswith("; 40 images cannot tell them apart.")


def test_the_first_is_named_where_only_others_can_be_told_apart(monkeypatch):
    """a beats e, d beats b, b beats c, each in one measure; none of a, b, c and d can be told from a."""
    names = tuple("abcde")
    monkeypatch.setattr(sys.modules[__name__], "METHODS", names)
    result = made({metric: dict(zip(names, (0.5, 0.3, 0.2, 0.4, 0.1), strict=True)) for metric in BOTH})
    apart = {("a", "e"), ("b", "d"), ("b", "c")}
    comparisons = tuple(
        pair
        if pair.other in CONTROLS
        else replace(
            pair, adjusted=0.01 if pair.metric == "deletion_auc" and (pair.method, pair.other) in apart else 1.0
        )
        for pair in result.comparisons
    )
    text, believed_ones = believed(replace(result, comparisons=comparisons))
    assert believed_ones == ("a", "d", "b", "c") and text.endswith("; 40 images cannot tell a from the others.")


def test_one_of_several_that_beats_most_of_the_others_is_first():
    """LRP is the last by name, and beats Grad-CAM."""
    result = made({metric: {"cam": 0.2, "grad_cam": 0.15, "lrp": 0.25} for metric in BOTH})
    only = [replace(pair, adjusted=1.0) if "cam" in (pair.method, pair.other) else pair for pair in result.comparisons]
    alike = [new if pair.other not in CONTROLS else pair for pair, new in zip(result.comparisons, only, strict=True)]
    _, names = believed(replace(result, comparisons=tuple(alike)))
    assert names == ("lrp", "cam")


def test_one_that_controls_beat_in_more_measures_than_it_beats_them_is_not_believed():
    leads = {"insertion_auc": {"cam": 0.2}, "deletion_auc": {"edge_map": 0.2}, "energy_in_mask": {"center_map": 0.2}}
    text, names = believed(made(leads))
    assert names == () and text == (
        "Do not rely on these maps: CAM beats every control in 1 of 3 measures but is beaten by a control in 2; no "
        "other map beats every control in any."
    )


def test_one_that_fails_a_sanity_test_is_not_believed():
    failed = {TEST: ("cam",)}
    text, names = believed(made(BOTH, failed=failed))
    assert names == ("lrp",) and text.startswith("LRP is the map to believe here")
    alone = {metric: {"cam": 0.2} for metric in BOTH}
    assert believed(made(alone, failed=failed)) == (
        "Do not rely on these maps: CAM beats every control in 2 of 2 measures but stays much the same when the "
        "model's weights are shuffled; no other map beats every control in any.",
        (),
    )


@pytest.mark.parametrize(("count", "names"), [(4, ("cam",)), (5, ())])
def test_one_that_is_often_not_to_be_read_is_not_believed(count: int, names: tuple[str, ...]):
    levels = {"cam": {"flat": {"do not read": count}, "class-independent": {"note": 40}}}
    assert believed(made({metric: {"cam": 0.2} for metric in BOTH}, verdict_levels=levels))[1] == names


def test_without_enough_images_controls_or_metrics_it_is_not_known():
    assert believed(made(BOTH, n=3), is_too_few=True) == (
        "It is not known which map to believe: 3 images are too few for a significant difference.",
        (),
    )
    assert "no control" in believed(made(BOTH, controls=()))[0]
    assert believed(made({}))[0] == (
        "No metric that ranks maps was computed, so it is not known which of them to believe."
    )


def test_chance_is_a_bar_like_a_control():
    above = made({"energy_in_mask": {"cam": 0.2}}, chance=0.3)
    below = made({"energy_in_mask": {"cam": 0.2}}, chance=0.75)
    assert believed(above)[1] == ("cam",) and believed(below)[1] == ()
    assert "center map" not in believed(below)[0] and "chance" in believed(below)[0]
    alone = made({"energy_in_mask": {"cam": 0.2}}, controls=(), chance=0.3)
    assert believed(alone) == (
        "It is not known which map to believe: no control was included, or none is defined often enough.",
        (),
    )
    assert where_it_looks(alone, ("cam",)).startswith("It looks at what the masks mark more than by chance: ")
    assert "control" not in where_it_looks(alone, ("cam",))


def test_each_method_is_tested_against_chance():
    """Three units are too few for the sign-flip test, whatever the interval says."""
    few = made({"energy_in_mask": {"cam": 0.2, "lrp": 0.15}}, n=3, chance=0.3)
    assert few.standings["energy_in_mask"].best == "cam"
    assert "chance" in unbeaten(few, "cam", "energy_in_mask") and "chance" in unbeaten(few, "lrp", "energy_in_mask")
    many = made({"energy_in_mask": {"cam": 0.2, "lrp": 0.15}}, chance=0.3)
    assert many.standings["energy_in_mask"].above_chance == METHODS and unbeaten(many, "lrp", "energy_in_mask") == ()


def test_controls_that_are_undefined_are_not_said_to_be_beaten():
    made_up = made({"energy_in_mask": {"cam": 0.2}}, chance=0.3, undefined={"energy_in_mask": ("edge_map",)})
    assert "it beats every control that is defined for enough images in the only measure" in believed(made_up)[0]
    assert where_it_looks(made_up, ("cam",)).endswith("more than with any control that is defined for enough images.")
    neither = made({"energy_in_mask": {"cam": 0.2}}, chance=0.3, undefined={"energy_in_mask": CONTROLS})
    assert believed(neither)[1] == () and "no control was included, or none is defined" in believed(neither)[0]


def test_a_test_without_result_is_no_test_passed():
    text, names = believed(made(BOTH, undefined={TEST: ("cam", "lrp")}))
    assert names == ("cam",) and text.endswith("the randomization test is not defined often enough for CAM.")


def test_where_it_looks():
    looks = made({"energy_in_mask": {"cam": 0.2}}, chance=0.3)
    assert str(where_it_looks(looks, ("cam",))).startswith("It looks at what the masks mark: 69.9 % (95")
    assert "cover 30.0 % of the images, more than with any control" in where_it_looks(looks, ("cam",))
    assert where_it_looks(looks, ("lrp",)).endswith(
        "but LRP is not shown to beat a blob in the middle (center map) and the edges in the image (edge map)."
    )
    assert where_it_looks(looks, ("lrp",)).startswith("It looks at what the masks mark more than by chance: ")
    nowhere = made({"energy_in_mask": {}}, chance=0.5)
    assert where_it_looks(nowhere, ("cam",)).startswith("It is not shown to look at what the masks mark: ")
    unknown = "It is not known where it looks, since no map here can be relied on. The best of them: "
    assert where_it_looks(nowhere, ()).startswith(unknown)
    assert where_it_looks(made(BOTH), ("cam",)) == (
        "It is not known where it looks: there are no masks to compare the maps with."
    )
