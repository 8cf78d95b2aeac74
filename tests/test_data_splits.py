import numpy as np
import pytest

from sightline.data.splits import assign, draw, held_out
from sightline.recipe import Data

LABELS = np.repeat([0, 1, 2], [60, 30, 10])
CLASSES = ("a", "b", "c")
UNSPLIT = np.full(100, "")


def test_a_draw_is_in_proportion_seeded_and_nested():
    rows = draw(LABELS, 50, seed=1)
    assert np.bincount(LABELS[rows]).tolist() == [30, 15, 5]
    np.testing.assert_array_equal(rows, draw(LABELS, 50, seed=1))
    assert not np.array_equal(rows, draw(LABELS, 50, seed=2))
    assert set(draw(LABELS, 20, seed=1)) <= set(rows)


def test_a_small_draw_takes_one_of_every_class_first():
    assert sorted(LABELS[draw(LABELS, 3, seed=0)]) == [0, 1, 2]
    labels = np.repeat([0, 1], [1000, 2])
    assert np.bincount(labels[draw(labels, 10, seed=0)]).tolist() == [9, 1]


def test_held_out_is_stratified_and_seeded():
    chosen = held_out(LABELS, 0.2, seed=0)
    assert np.bincount(LABELS[chosen]).tolist() == [12, 6, 2]
    assert (chosen == held_out(LABELS, 0.2, seed=0)).all() and (chosen != held_out(LABELS, 0.2, seed=1)).any()


def test_a_class_of_two_has_one_on_each_side_and_a_single_image_stays():
    labels = np.repeat([0, 1, 2], [97, 2, 1])
    chosen = held_out(labels, 0.2, seed=0)
    assert chosen[labels == 1].sum() == 1 and chosen[labels == 2].sum() == 0


def random_groups(seed: int):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, 400)
    return labels, rng.integers(0, 20, 400).astype(str)


@pytest.mark.parametrize("seed", range(5))
def test_groups_are_never_split_and_classes_stay_near_their_share(seed):
    labels, groups = random_groups(seed)
    chosen = held_out(labels, 0.2, seed, groups)
    assert not set(groups[chosen]) & set(groups[~chosen])
    shares = np.bincount(labels[chosen]) / np.bincount(labels)
    assert (np.abs(shares - 0.2) < 0.08).all()


def test_groups_of_one_class_each_are_still_stratified():
    groups = np.repeat(np.arange(20), 10).astype(str)
    labels = np.repeat([0, 1], [150, 50])
    chosen = held_out(labels, 0.2, 0, groups)
    assert np.bincount(labels[chosen]).tolist() == [30, 10]


def test_group_splits_differ_between_seeds():
    labels, groups = random_groups(0)
    found = {tuple(np.unique(groups[held_out(labels, 0.2, seed, groups)])) for seed in range(10)}
    assert len(found) > 5


def test_two_groups_larger_than_the_share_are_separated():
    groups = np.repeat(["x", "y"], [70, 30])
    chosen = held_out(np.arange(100) % 2, 0.1, 0, groups)
    assert set(groups[chosen]) == {"y"}


def test_one_group_cannot_be_split():
    with pytest.raises(ValueError, match="expected at least two groups to split by, got one"):
        held_out(LABELS, 0.2, 0, np.full(100, "p1"))


def test_everything_is_drawn_from_an_undivided_source():
    rows = assign(LABELS, CLASSES, UNSPLIT, None, Data())
    assert {k: len(v) for k, v in rows.items()} == {"train": 72, "val": 8, "test": 20}
    assert sorted(np.concatenate(list(rows.values()))) == list(range(100))


def test_the_splits_of_the_source_are_kept():
    parts = np.repeat(["train", "test", "val"], [50, 30, 20])
    labels = np.arange(100) % 2
    rows = assign(labels, CLASSES, parts, None, Data())
    assert {k: len(v) for k, v in rows.items()} == {"train": 50, "val": 20, "test": 30}
    assert rows["test"].tolist() == list(range(50, 80))
    rows = assign(labels, CLASSES, np.where(parts == "val", "train", parts), None, Data(val=0.2))
    assert {k: len(v) for k, v in rows.items()} == {"train": 56, "val": 14, "test": 30}


def test_resplit_merges_the_splits_of_the_source():
    parts = np.repeat(["train", "test"], 50)
    rows = assign(np.arange(100) % 2, CLASSES, parts, None, Data(resplit=True))
    assert {k: len(v) for k, v in rows.items()} == {"train": 72, "val": 8, "test": 20}
    assert rows["test"].min() < 50 <= rows["test"].max()


def test_no_validation_if_none_is_wanted():
    assert set(assign(LABELS, CLASSES, UNSPLIT, None, Data(val=0.0))) == {"train", "test"}


def test_sizes_are_exact_and_stratified():
    rows = assign(LABELS, CLASSES, UNSPLIT, None, Data(train_size=36, test_size=10))
    assert len(rows["train"]) == 36 and len(rows["test"]) == 10
    assert np.abs(np.bincount(LABELS[rows["train"]]) - [21.6, 10.8, 3.6]).max() <= 1
    with pytest.raises(ValueError, match=r"expected data\.test_size of at most 20, got 21; there are no more"):
        assign(LABELS, CLASSES, UNSPLIT, None, Data(test_size=21))


def test_groups_shared_by_the_splits_of_the_source_are_refused():
    parts = np.repeat(["train", "test"], 50)
    labels = np.arange(100) % 2
    groups = np.array([f"p{i // 10}" for i in range(100)])
    groups[50:70] = "p0"
    groups[70:80] = "p1"
    with pytest.raises(ValueError, match=r"2 of 4 patient groups in test also occur in train.*--data.resplit true"):
        assign(labels, CLASSES, parts, groups, Data(group="patient"))
    rows = assign(labels, CLASSES, parts, groups, Data(group="patient", resplit=True))
    held = [set(groups[r]) for r in rows.values()]
    assert not held[0] & held[1] and not held[0] & held[2] and not held[1] & held[2]


@pytest.mark.parametrize(
    ("labels", "parts", "options", "message"),
    [
        ([0, 1, -1, 0], ["train"] * 2 + ["test"] * 2, {}, "1 of 2 test images have no label; label them"),
        ([0, -1, -1, 1], ["train"] * 4, {}, "2 of 4 train images have no label"),
        ([0] * 20, [""] * 20, {}, "expected at least two classes to tell apart, got only 'a'"),
        ([0, 1] * 5, ["test"] * 10, {}, "expected training images, got only test; add some, or split again with"),
        ([0, 1, 0, 1, 2], ["train"] * 4 + ["test"], {"val": 0.0}, "the class 'c' occurs in test but not in training"),
        ([0, 1], ["", ""], {}, "expected images to test with, got none of 2"),
        ([0, 1], ["", ""], {"test": 0.0}, "got none of 2 with data.test 0.0; add images"),
    ],
)
def test_bad_input_gives_one_line(labels, parts, options, message):
    with pytest.raises(ValueError, match=message) as error:
        assign(np.array(labels), CLASSES, np.array(parts), None, Data(**options))
    assert "\n" not in str(error.value)
