"""Which map to believe, and where the model looks, from made scores."""

from dataclasses import replace

import numpy as np
import pytest

from sightline.evaluation import Evaluation
from sightline.evaluation.conclusions import where_it_looks, which_map
from sightline.evaluation.ranking import rank

METHODS, CONTROLS = ("cam", "grad_cam", "lrp"), ("center_map", "edge_map")
HIGHER = {"insertion_auc": True, "deletion_auc": False, "energy_in_mask": True}


def made(
    leads: dict[str, dict[str, float]],
    n: int = 40,
    controls: tuple[str, ...] = CONTROLS,
    chance: float | None = None,
    **more,
) -> Evaluation:
    """Scores of n images: each method's lead over the controls, 0 where none is named, in some noise."""
    rng = np.random.default_rng(0)
    table = {}
    for metric, lead in leads.items():
        sign = 1 if HIGHER[metric] else -1
        names = (*METHODS, *controls)
        table[metric] = {name: 0.5 + sign * lead.get(name, 0.0) + rng.normal(0, 0.01, n) for name in names}
    chances = {} if chance is None else dict.fromkeys(table, chance)
    metrics = (*table, "parameter_randomization")
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
        higher_is_better={metric: HIGHER.get(metric) for metric in metrics},
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
    assert "but not a blob in the middle (center map) in deletion (how fast" in text


def test_one_that_fails_a_sanity_test_is_not_believed():
    failed = {"parameter_randomization": ("cam",)}
    text, names = believed(made(BOTH, failed=failed))
    assert names == ("lrp",) and text.startswith("LRP is the map to believe here")
    alone = {metric: {"cam": 0.2} for metric in BOTH}
    assert believed(made(alone, failed=failed)) == (
        "Do not rely on these maps: CAM beats every control but stays much the same when the model's weights are "
        "shuffled; no other map beats every control.",
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
    assert believed(made({"energy_in_mask": {"cam": 0.2}}, controls=(), chance=0.3))[1] == ("cam",)


def test_where_it_looks():
    looks = made({"energy_in_mask": {"cam": 0.2}}, chance=0.3)
    assert str(where_it_looks(looks, ("cam",))).startswith("It looks at what the masks mark: 69.9 % (95")
    assert "cover 30.0 % of the images, more than with any control" in where_it_looks(looks, ("cam",))
    assert "a blob in the middle (center map)" in where_it_looks(looks, ("lrp",))
    assert where_it_looks(looks, ("lrp",)).startswith("It looks at what the masks mark more than by chance: ")
    nowhere = made({"energy_in_mask": {}}, chance=0.5)
    assert where_it_looks(nowhere, ("cam",)).startswith("It is not shown to look at what the masks mark: ")
    unknown = "It is not known where it looks, since no map here can be relied on. The best of them: "
    assert where_it_looks(nowhere, ()).startswith(unknown)
    assert where_it_looks(made(BOTH), ("cam",)) == (
        "It is not known where it looks: there are no masks to compare the maps with."
    )
