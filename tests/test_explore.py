"""Exploration of many maps: planted clusters, shares by hand, and interventions on a network that sees one corner."""

import csv
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from sightline import cli, data, runs
from sightline.explainers import explain
from sightline.exploration import (
    Effect,
    Look,
    RunLooks,
    Source,
    Suspicion,
    cover_effect,
    explore,
    paste_effect,
    regions,
    spectral,
    strangeness,
    study,
)
from sightline.exploration import clusters as clustering
from sightline.exploration.interventions import CONTROLS, covered, windows_of
from sightline.facts import Finding, Interval
from sightline.metrics.uncertainty import holm
from sightline.recipe import Data, Model, Optim, Recipe
from sightline.report.explore import write_exploration
from sightline.scale import ResultLooks, Results, explain_many
from sightline.training import fit

SIDE = 24
RED = np.array([220, 20, 20], dtype=np.uint8)[:, None, None]
CLASSES = ("dark", "bright", "red corner")


class CornerNetwork:
    """“red corner” where the upper left 6 x 6 pixels are mostly red, else “bright” or “dark” by the lower right."""

    def predict(self, images):
        corner = images[:, :, :6, :6].astype(float).mean((2, 3))
        is_red = corner[:, 0] - corner[:, 1] > 100
        is_bright = images[:, :, 18:, 18:].mean((1, 2, 3)) > 100
        return np.where(is_red, 2, is_bright.astype(int))


class Planted:
    """40 images of each class with noise; the map lies on the corner that decides, or in the middle."""

    name, classes, methods, notices = "planted", CLASSES, ("toy",), ()

    def __init__(self, network=None, marks=None, splits=("test",), copies=0):
        rng = np.random.default_rng(0)
        self.network = network or CornerNetwork()
        self.labels = np.arange(120) % 3
        self.pixels = rng.integers(0, 40, (120, 3, SIDE, SIDE)).astype(np.uint8)
        self.pixels[self.labels == 1, :, 18:, 18:] += 150
        self.pixels[self.labels == 2, :, :6, :6] = RED
        if copies:
            self.pixels[-copies:] = self.pixels[:copies]
        self.maps = rng.random((120, 6, 6)) * 0.1
        self.maps[self.labels != 2, 2:4, 2:4] += 1
        self.maps[self.labels == 2, :1, :1] += 5
        self.marks = marks
        self.splits = [splits[i * len(splits) // 120] for i in range(120)]

    def looks(self, progress=None) -> Iterator[Look]:
        predicted = self.network.predict(self.pixels)
        for i, (values, answer) in enumerate(zip(self.maps, predicted.tolist(), strict=True)):
            yield Look(i, str(i), "toy", values, answer, answer, 0.9, int(self.labels[i]), self.splits[i])

    def images(self, places: Sequence[int]):
        return self.pixels[[*places]]

    def marked(self, places):
        return None if self.marks is None else np.broadcast_to(self.marks, (len(places), SIDE, SIDE)).copy()

    def predict(self, images):
        return self.network.predict(images)


class Blind(CornerNetwork):
    """Never looks at the corner, though the maps say so: by the label hidden in the lower right."""

    def predict(self, images):
        return (images[:, 0, 12, 12] > 128).astype(int) * 2


def blobs(sizes: Sequence[int], spread: float = 0.03):
    """Maps with their weight at one of several places."""
    rng = np.random.default_rng(1)
    centers = [(1, 1), (6, 6), (1, 6), (6, 1)]
    rows, columns = np.mgrid[:8, :8]
    found = []
    for size, (row, column) in zip(sizes, centers, strict=False):
        hill = np.exp(-((rows - row) ** 2 + (columns - column) ** 2) / 2)
        found.append(hill + spread * rng.random((size, 8, 8)))
    return clustering.weights(np.concatenate(found)).reshape(sum(sizes), -1)


@pytest.fixture(scope="module")
def explored():
    return explore(Planted(), tests=3)


@pytest.mark.parametrize("sizes", [(60, 40), (60, 40, 20), (80, 12)])
def test_planted_clusters_are_recovered(sizes):
    order = np.random.default_rng(2).permutation(sum(sizes))
    truth = np.repeat(np.arange(len(sizes)), sizes)[order]
    np.testing.assert_array_equal(spectral(blobs(sizes)[order]), truth)


def test_a_class_that_looks_one_way_is_one_cluster():
    assert spectral(blobs([clustering.FEWEST - 1])).max() == 0
    looks = np.random.default_rng(0).normal(size=(200, 1)) * np.ones(3)
    assert spectral(looks).max() <= clustering.MOST - 1


def test_more_groups_than_clusters_are_not_one():
    """Ten places that no neighbor joins: ten eigenvalues of 0, whose rounding errors must not decide."""
    rng = np.random.default_rng(0)
    looks = np.repeat(np.eye(10), 20, 0) + 0.001 * rng.random((200, 10))
    assert spectral(looks).max() == clustering.MOST - 1


def test_the_strangest_cluster_is_small_far_and_sure():
    """Three of four maps look left; the fourth looks half right. By hand: 3/4 x 1/2 x 0.8."""
    looks, clusters = np.array([[1.0, 0.0]] * 3 + [[0.5, 0.5]]), np.array([0, 0, 0, 1])
    first, second = strangeness(looks, np.array([0.9, 0.6, 0.9, 0.8]), clusters)
    assert first == pytest.approx((0.25 * 0.5 * 0.8, 0.25, 0.5, 0.8))
    assert second == pytest.approx((0.75 * 0.5 * 0.8, 0.75, 0.5, 0.8))
    assert strangeness(looks, np.ones(4), np.zeros(4, int))[0].score == 0
    farther = np.array([[1.0, 0.0]] * 3 + [[0.0, 1.0]])
    assert strangeness(farther, np.ones(4), clusters)[1].score > strangeness(looks, np.ones(4), clusters)[1].score


def test_shares_by_hand():
    """2 x 2 cells over 4 x 4 pixels: half of the first cell and all of the last belong to the place."""
    place = np.zeros((1, 4, 4), dtype=bool)
    place[0, 0, :2] = place[0, 2:, 2:] = True
    weight, area = regions.shares(np.array([[[0.4, 0.3], [0.2, 0.1]]]), place)
    assert weight.item() == pytest.approx(0.4 / 2 + 0.1) and area.item() == 6 / 16


def test_border_and_corners():
    images = np.zeros((2, 3, 32, 20), dtype=np.uint8)
    assert regions.border(images).sum((1, 2)).tolist() == [32 * 20 - 28 * 18] * 2
    assert regions.corners(images).sum((1, 2)).tolist() == [4 * 6 * 4] * 2
    assert not (regions.corners(images) & ~regions.corners(images)[:, ::-1, ::-1]).any()


def test_letters_are_text_and_edges_are_not():
    image = np.full((1, 3, 64, 64), 230, dtype=np.uint8)
    image[..., 20:28, 10:50:4] = image[..., 20:28, 11:50:4] = 20
    found = regions.text(image)[0]
    assert found[22:26, 16:44].all() and not found[:14].any() and not found[34:].any()
    wall = np.full((1, 3, 64, 64), 20, dtype=np.uint8)
    wall[..., 32:] = 230
    assert not regions.text(wall).any()


def test_small_even_areas_of_a_strong_color_are_patches():
    rng = np.random.default_rng(0)
    image = rng.integers(60, 90, (1, 3, 40, 40)).astype(np.uint8)
    image[0, :, 5:12, 30:37] = RED
    found = regions.colored_patch(image)[0]
    np.testing.assert_array_equal(np.argwhere(found).min(0), [5, 30])
    assert found.sum() == 49
    image[0, :, 5:12, 30:37] = 250
    assert not regions.colored_patch(image).any()
    image[0, :, :, 20:] = RED
    assert not regions.colored_patch(image).any()


def test_the_hottest_window():
    maps = np.zeros((2, 4, 4))
    maps[0, 3, 3], maps[1, 0, 1] = 2.0, -5.0
    maps[1, 0, 3] = 1.0
    maps[0, 0, 0] = 1.5
    assert regions.hottest(maps, (4, 4), (1, 1)).tolist() == [[3, 3], [0, 3]]
    upper = np.zeros((2, 4, 4), dtype=bool)
    upper[:, :2] = True
    assert regions.hottest(maps, (4, 4), (1, 1), upper).tolist() == [[0, 0], [0, 3]]
    values = np.random.default_rng(0).random((3, 9, 11))
    for one, (top, left) in zip(values, regions.hottest(values, (9, 11), (3, 2)), strict=True):
        sums = [one[y : y + 3, x : x + 2].sum() for y in range(7) for x in range(10)]
        assert divmod(int(np.argmax(sums)), 10) == (top, left)


def test_random_windows_lie_elsewhere_and_anywhere_else():
    windows = np.tile([[2, 1]], (4000, 1))
    drawn = regions.elsewhere(windows, (6, 6), (2, 2), np.random.default_rng(0))
    assert (np.abs(drawn - windows) >= 2).any(1).all()
    counts = np.unique(drawn, axis=0, return_counts=True)[1]
    assert len(counts) == 25 - 9 and counts.min() > 4000 / 16 * 0.75
    with pytest.raises(ValueError, match="at most a third"):
        regions.elsewhere(windows, (3, 3), (2, 2), np.random.default_rng(0))


def test_covering_and_pasting_the_corner_that_decides():
    """The network sees the corner alone: all lose the class, all others get it, and random regions change nothing."""
    source = Planted()
    red, dark = source.pixels[source.labels == 2], source.pixels[source.labels == 0]
    at_corner = np.zeros((40, 2), dtype=np.int64)
    cover = cover_effect(red, at_corner, (6, 6), 2, source.predict, np.full(40, 2))
    assert (cover.before, cover.region.value, cover.control.value, cover.difference.value) == (1, 0, 1, 1)
    assert cover.accuracy == (1, 0, 1) and cover.p < 1e-6 and cover.difference.low > 0.9
    paste = paste_effect(dark, red, at_corner, (6, 6), 2, source.predict, np.zeros(40, int))
    assert (paste.before, paste.region.value, paste.control.value, paste.difference.value) == (0, 1, 0, 1)
    assert paste.accuracy == (1, 0, 1)
    center = np.full((40, 2), 9)
    nothing = cover_effect(red, center, (6, 6), 2, source.predict)
    assert nothing.region.value == 1 and nothing.difference.value <= 0 and np.isnan(nothing.accuracy[0])


def test_controls_are_averaged_and_paired():
    """A network that answers 1 if the pixel in the middle is untouched: by hand from the random windows themselves."""
    images = np.full((30, 3, 12, 12), 9, dtype=np.uint8)
    images[:, :, 5, 5] = 200
    windows = np.zeros((30, 2), dtype=np.int64)

    def predict(images):
        return (images[:, 0, 5, 5] == 200).astype(int)

    rng = np.random.default_rng(3)
    drawn = [regions.elsewhere(windows, (12, 12), (4, 4), rng) for _ in range(CONTROLS)]
    left = np.mean([~windows_of(each, (12, 12), (4, 4))[:, 5, 5] for each in drawn], axis=0)
    effect = cover_effect(images, windows, (4, 4), 1, predict, seed=3)
    assert effect.control.value == pytest.approx(left.mean()) and effect.region.value == 1
    assert effect.difference.value == pytest.approx(left.mean() - 1)


def test_the_interval_of_pasting_resamples_sources():
    """One of two sources works: 20 images from two sources are two units, not 20."""
    red = Planted().pixels[:3][[2, 2]].copy()
    red[1, :, :6, :6] = 0
    dark = np.zeros((20, 3, SIDE, SIDE), dtype=np.uint8)
    effect = paste_effect(dark, red, np.zeros((2, 2), int), (6, 6), 2, CornerNetwork().predict)
    assert effect.difference.n == 2 and effect.region.value == 0.5 and effect.p == 1


def test_each_source_gives_its_own_window():
    """Red anywhere is enough here: every window carries it, and no window elsewhere in the same source does."""
    sources = np.zeros((2, 3, SIDE, SIDE), dtype=np.uint8)
    sources[0, :, :6, :6] = sources[1, :, 9:15, 12:18] = RED
    dark = np.zeros((7, 3, SIDE, SIDE), dtype=np.uint8)

    def predict(images):
        return ((images[:, 0] == RED[0]).sum((1, 2)) == 36).astype(int)

    effect = paste_effect(dark, sources, np.array([[0, 0], [9, 12]]), (6, 6), 1, predict)
    assert (effect.region.value, effect.control.value) == (1, 0)


def test_covered_pixels_come_from_the_surroundings():
    image = np.tile(np.arange(10, dtype=np.uint8) * 20, (1, 3, 10, 1))
    region = np.zeros((1, 10, 10), dtype=bool)
    region[0, 3:6, 3:6] = True
    changed = image.copy()
    changed[0, :, 3:6, 3:6] = 255
    assert np.abs(covered(changed, region).astype(int) - image).max() <= 1


def test_the_corner_is_found_without_being_told():
    source = Planted()
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    exploration = explore(source)
    assert (np.random.get_state()[1] == before[0]).all() and (torch.get_rng_state() == before[1]).all()
    (found,) = exploration.findings
    first = found[0]
    assert (first.target, first.verdict, first.class_share) == ("red corner", "confirmed", 1.0)
    assert {one.place for one in found} >= {"corners", "colored patch"}
    assert all(picture.region == (0, 0, 6, 6) for picture in first.pictures)
    assert exploration.summary[0] == (
        "1 of 3 classes depend on a small region: “red corner”. See whether it belongs to the object."
    )
    assert "100.0 % of 40 images lose that name (a random region: 0.0 %)" in exploration.summary[1]
    group = next(group for group in exploration.groups if group.target == "red corner")
    weight = clustering.weights(source.maps[source.labels == 2])
    assert group.count == group.sampled == 40
    assert group.places["corners"].chance == pytest.approx(4 * 25 / SIDE**2)
    expected = regions.shares(weight, regions.corners(source.pixels[source.labels == 2]))[0].mean()
    assert group.places["corners"].weight == pytest.approx(expected)


def test_names_of_classes_stay_as_they_are():
    source = Planted()
    source.classes = ("dark", "bright", "red_corner")
    assert "“red_corner”" in str(explore(source, tests=3).summary[0])


def test_what_the_network_ignores_is_no_finding():
    source = Planted(Blind())
    source.pixels[source.labels == 2, 0, 12, 12] = 255
    exploration = explore(source)
    tested = [one for one in exploration.suspicions if one.cover]
    assert any(one.place == "corners" and one.target == "red corner" for one in tested)
    assert not exploration.findings and exploration.summary[0].kind == "none confirmed"


def test_all_tested_suspicions_count_for_the_correction():
    exploration = explore(Planted())
    tested = [one for one in exploration.suspicions if one.cover]
    assert len(tested) > 2
    p = np.array([max(one.cover.p, one.paste.p) for one in tested])
    np.testing.assert_allclose([one.adjusted for one in tested], holm(p))
    few = explore(Planted(), tests=1)
    assert [one.verdict for one in few.suspicions].count("not tested") == len(tested) - 1
    assert few.suspicions[0].weight == max(one.weight for one in few.suspicions)
    assert few.summary[-1].kind == "not tested"


def test_both_tests_have_to_hold_after_the_correction():
    def effect(low, p):
        sure = Interval(value=low, low=low, high=low, n=9)
        return Effect(before=1.0, region=sure, control=sure, difference=sure, p=p, accuracy=(1.0, 1.0, 1.0))

    def suspicion(cover, paste):
        return Suspicion(
            method="toy", target="a", kind="place", place="text", weight=1.0, images=9, class_share=1.0, places={},
            examples=(), cover=effect(*cover), paste=paste and effect(*paste),
        )  # fmt: skip

    tested = [
        suspicion((0.5, 1e-6), (0.5, 1e-5)),
        suspicion((0.5, 1e-6), (0.5, 0.03)),  # enough among three, too much among four
        suspicion((0.5, 1e-6), (0.05, 1e-4)),  # too small
        suspicion((0.5, 1e-6), None),
    ]
    confirmed = study._confirmed(tested)
    np.testing.assert_allclose([one.adjusted for one in confirmed], [3e-5, 0.03, 2e-4, np.nan])
    assert [one.is_finding for one in confirmed] == [True, True, False, False]
    tested.append(suspicion((0.5, 0.04), (0.5, 1e-6)))
    confirmed = study._confirmed(tested)
    np.testing.assert_allclose([one.adjusted for one in confirmed], [4e-5, 0.06, 3e-4, np.nan, 0.06])
    assert [one.is_finding for one in confirmed] == [True, False, False, False, False]


def test_regions_go_into_images_that_are_neither_labeled_nor_named_so():
    def look(place, predicted, label):
        return Look(place, str(place), "toy", np.ones((2, 2)), predicted, predicted, 1.0, label, "")

    looks = [look(0, 0, 0), look(1, 1, 0), look(2, 1, 1), look(3, 0, 1), look(4, 1, -1)]
    samples = {("toy", target): study._Sample(9, [one for one in looks if one.target == target]) for target in (0, 1)}
    samples["other", 1] = study._Sample(1, [look(5, 1, 1)])
    others = study._others(samples, "toy", 0, np.random.default_rng(0))
    assert sorted(one.place for one in others) == [2, 4]


def test_only_maps_with_twice_the_weight_of_chance_are_suspected():
    suspected = {(one.target, one.place) for one in explore(Planted(), tests=1).suspicions if one.place}
    assert suspected == {("red corner", "border"), ("red corner", "corners"), ("red corner", "colored patch")}


def test_a_region_in_the_marked_object_is_no_shortcut():
    marks = np.zeros((SIDE, SIDE), dtype=bool)
    marks[:8, :8] = True
    exploration = explore(Planted(marks=marks))
    (found,) = exploration.findings
    assert found[0].verdict == "object" and found[0].in_object == pytest.approx((1.0, 64 / SIDE**2))
    assert exploration.summary[0].endswith("none was confirmed, except for marked objects.")
    assert explore(Planted(marks=~marks)).findings[0][0].verdict == "confirmed"


def test_samples_are_bounded_and_random(monkeypatch):
    source = Planted()
    exploration = explore(source, sample=10)
    assert [group.sampled for group in exploration.groups] == [10] * 3
    assert [group.count for group in exploration.groups] == [40] * 3
    monkeypatch.setattr(study, "_KEPT", 45)
    monkeypatch.setattr(study, "_SMALLEST", 9)
    assert [group.sampled for group in explore(source).groups] == [15] * 3
    sample, rng = study._Sample(), np.random.default_rng(0)
    for i in range(400):
        sample.add(Look(i, str(i), "toy", np.ones((64, 64)), 0, 0, 1.0, -1, ""), 100, rng)
    assert sample.count == 400 and len(set(sample.places)) == 100
    assert 15 <= sum(place < 100 for place in sample.places) <= 35
    assert sample.looks[0].map.shape == (32, 32)


def test_maps_that_say_nothing_are_counted():
    source = Planted()
    source.maps[:3] = [np.zeros((6, 6)), -np.ones((6, 6)), np.full((6, 6), np.nan)]
    assert explore(source).left_out == {"without a positive value": 3}
    source.maps[:] = -1
    with pytest.raises(ValueError, match="maps with a positive value, got none among 120"):
        explore(source)


@pytest.mark.parametrize("options", [{"sample": 7}, {"tests": 0}, {"window": 0.5}, {"window": 0.0}])
def test_options_out_of_range(options):
    with pytest.raises(ValueError, match="expected a sample of at least 8 maps"):
        explore(Planted(), **options)


def test_copies_between_splits_are_told():
    exploration = explore(Planted(splits=("train", "test"), copies=2))
    assert exploration.compared == 120
    assert exploration.duplicates[0].startswith(
        "2 of 60 test images are copies of images in an earlier split, such as 118 and 0"
    )
    assert explore(Planted()).duplicates == ()


def test_a_large_split_leaves_room_for_the_others(monkeypatch):
    monkeypatch.setattr(study, "COMPARED", 30)
    exploration = explore(Planted(splits=("train", "test")), tests=1)
    assert exploration.compared == 60


def test_files(explored, tmp_path: Path):
    exploration = explored
    facts = json.loads(exploration.to_json(tmp_path / "a.json").read_text())
    assert facts["settings"]["tests"] == 3 and facts["suspicions"][0]["verdict"] == "confirmed"
    assert "pictures" not in facts["suspicions"][0]
    with exploration.to_csv(tmp_path / "a.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(exploration.suspicions)
    assert float(rows[0]["cover_difference"]) == exploration.suspicions[0].cover.difference.value
    assert rows[-1]["verdict"] == "not tested" and rows[-1]["cover_low"] == ""


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """48 images of two classes with the marks of each in a corner."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for number in range(48):
        pixels = rng.integers(0, 120, (32, 32, 3)).astype(np.uint8)
        pixels[:8, :8] = np.eye(3)[number % 2] * 250
        place = folder / ("test" if number >= 32 else "train") / "ab"[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place / f"{number:02d}.png")
    return folder


@pytest.fixture(scope="module")
def run(photos: Path, tmp_path_factory) -> runs.Run:
    wanted = Recipe(
        data=Data(source=str(photos), size=32, val=0.0),
        model=Model(name="cifar_resnet", options={"depth": 8, "width": 0.25, "stem_stride": 2}),
        optim=Optim(epochs=15, lr=0.01, batch_size=8),
    )
    trained = fit(wanted, tmp_path_factory.mktemp("runs") / "run", progress=False)
    assert isinstance(trained, runs.Run)
    return trained


def test_maps_of_a_run_are_those_of_explain(run):
    images = replace(data.load(run.recipe.data)["train"], preprocess=run.preprocess)
    model = runs.load_model(run.folder)
    source = RunLooks(model, images, ["grad_cam", "activation_map"])
    looks = list(source.looks())
    assert len(looks) == 64 and isinstance(source, Source)
    batch = images.batch([9])
    explanation = explain(model, data.normalize(batch.images, run.preprocess), None, ["activation_map"])
    look = looks[2 * 9 + 1]
    assert (look.place, look.key, look.label) == (9, batch.names[0], int(batch.labels[0]))
    assert look.target == look.predicted == int(explanation.targets[0, 0])
    np.testing.assert_allclose(look.map, explanation["activation_map"][0, 0].numpy(), rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(source.images([9, 3])[0], batch.images[0].numpy())
    assert source.predict(source.images([9])).tolist() == [look.predicted]


def test_the_verb_explores_a_run(run, tmp_path, capsys):
    cli.main(["explore", str(run.folder), "--split", "train", "--out", str(tmp_path), "--tests", "3"])
    printed = capsys.readouterr().out
    facts = json.loads((tmp_path / "explore.json").read_text())
    assert facts["maps"] == 32 and facts["provenance"]["network"] == str(run.folder)
    assert facts["summary"][0].split(":")[0] in printed.replace("\n  ", " ")
    assert str(tmp_path / "explore.html") in printed


def test_the_verb_explores_results(run, photos, tmp_path, capsys):
    """The maps in shards give the same groups as those made on the way."""
    maps, out = tmp_path / "maps", tmp_path / "out"
    explain_many(run.folder, photos / "train", maps, per_shard=10)
    cli.main(["explore", str(run.folder), str(maps), "--out", str(out), "--tests", "2"])
    direct = tmp_path / "direct"
    cli.main(["explore", str(run.folder), "--split", "train", "--out", str(direct), "--tests", "2"])
    ours, theirs = (json.loads((folder / "explore.json").read_text()) for folder in (out, direct))
    assert ours["maps"] == 32
    for one, other in zip(ours["groups"], theirs["groups"], strict=True):
        assert (one["target"], one["count"]) == (other["target"], other["count"])
        np.testing.assert_allclose(one["mean_map"], other["mean_map"], atol=1e-3)
        assert one["confidence"] == pytest.approx(other["confidence"], abs=1e-4)
    source = ResultLooks(Results.open(maps), runs.load_model(run.folder))
    looks = {look.place: look for look in source.looks()}
    images = source.images([31, 0, 12])
    for place, image in zip((31, 0, 12), images, strict=True):
        np.testing.assert_array_equal(
            image.transpose(1, 2, 0), np.asarray(Image.open(photos / "train" / looks[place].key))
        )
        assert source.predict(image[None]).item() == looks[place].predicted
    assert looks[0].label == "ab".index(looks[0].key[0]) and source.notices == ()


def test_missing_shards_and_other_networks_are_told(run, photos, tmp_path):
    explain_many(run.folder, photos / "train", tmp_path, per_shard=10, shard=(0, 2))
    source = ResultLooks(Results.open(tmp_path), runs.load_model(run.folder))
    assert source.notices == ("2 of 4 shards are missing, and their images left out",)
    other = runs.load_model(run.folder)
    next(other.parameters()).data.add_(1)
    with pytest.raises(ValueError, match="got one of other weights; name its run"):
        ResultLooks(Results.open(tmp_path), other)


def test_results_of_a_network_without_names_that_ends_in_a_sigmoid(photos, tmp_path):
    """Classes are numbers, and confidence is the network's own probability."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5), nn.Sigmoid())
    model.preprocess = data.Preprocess(size=(32, 32), mean=(0.5,) * 3, std=(0.2,) * 3)
    explain_many(model.eval(), photos / "test", tmp_path)
    source = ResultLooks(Results.open(tmp_path), model)
    assert source.classes == ("0", "1", "2", "3", "4")
    look = next(source.looks())
    explanation = explain(model, [photos / "test" / look.key])
    assert look.confidence == pytest.approx(explanation.probabilities.max().item(), abs=1e-6)
    assert look.predicted == explanation.targets.item() and explore(source).groups


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: no such run"),
        (["RUN", "nowhere"], "nowhere holds no results"),
        (["RUN", "--methods", "grad_camm"], "did you mean 'grad_cam'"),
        (["RUN", "--weights", "a.pt"], "only with RESULTS"),
        (["RUN", "nowhere", "--split", "val"], "--split: expected it without results"),
        (["RUN", "--window", "0.9"], "a window above 0 and up to 1/3"),
        (["RUN", "--sample", "2"], "a sample of at least 8"),
        (["RUN", "--split", "val"], "expected a split with images out of train, test, got 'val'"),
    ],
)
def test_bad_input_is_one_line(run, tmp_path, capsys, arguments, message):
    words = [str(run.folder) if word == "RUN" else word for word in arguments]
    with pytest.raises(SystemExit, match="2"):
        cli.main(["explore", *words, "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_the_page_stands_alone(explored, tmp_path):
    text = write_exploration(explored, tmp_path).read_text()
    assert "1 of 3 classes depend on a small region" in text
    assert "1 of 3 classes have a region that decides" in text
    assert text.count("<article") == 1 and text.count('<rect class="outline inner"') == 6
    assert not re.search(r"""(?:src|href)=["'](?!data:|#)""", text)
    untested = replace(explored.suspicions[-1], cover=None, paste=None, is_finding=False)
    bare = replace(explored, suspicions=(untested,), summary=(Finding("none confirmed", "None."),))
    page = write_exploration(bare, tmp_path).read_text()
    assert "No suspicion was tested." in page and "<article" not in page


def test_the_page_in_a_browser(explored, tmp_path, chromium):
    """No scrolling sideways on a phone, no errors, no requests, and no violation that axe finds, in light and dark."""
    from axe_playwright_python.sync_playwright import Axe
    from playwright.sync_api import sync_playwright

    page = write_exploration(explored, tmp_path)
    with sync_playwright() as played:
        browser = played.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for width, scheme in ((1280, "light"), (390, "dark")):
            tab = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
            told: list[str] = []
            tab.on("console", lambda message, told=told: told.append(message.text))
            tab.on("request", lambda request, told=told: told.append(request.url))
            tab.goto(page.as_uri())
            assert [one for one in told if not one.startswith(("file:", "data:"))] == []
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
            violations = Axe().run(tab).response["violations"]
            assert [(one["id"], one["nodes"][0]["html"]) for one in violations] == []
        browser.close()
