import numpy as np
import pytest
import torch
from scipy import ndimage

from sightline.data import clutter, load
from sightline.data.clutter import PARTS, PATCH_COLORS, SPLITS, compose, digits
from sightline.recipe import Data


def test_no_scan_is_in_two_splits():
    scans = [{scan.tobytes() for scan in digits(split)[0]} for split in SPLITS]
    assert not scans[0] & scans[1] and not scans[0] & scans[2] and not scans[1] & scans[2]
    assert sum(len(digits(split)[0]) for split in SPLITS) == 1797


def test_every_class_has_scans_in_every_split():
    for split in SPLITS:
        assert np.bincount(digits(split)[1], minlength=10).min() >= 10


def test_an_image_depends_on_seed_split_and_index_alone():
    together = compose(3, "train", [4, 5, 6])
    alone = compose(3, "train", [5])
    for many, one in zip(together, alone, strict=True):
        np.testing.assert_array_equal(many[1], one[0])
    for other in (compose(4, "train", [5]), compose(3, "val", [5]), compose(3, "train", [15])):
        assert (other[0] != alone[0]).any()


def test_the_mask_is_where_the_digit_is_lighter_than_any_background():
    images, digit, _ = compose(0, "test", range(200))
    lighter = images.max(1) > 0.5 * 255  # no background is
    inner = digit[:, 1:-1, 1:-1] & digit[:, 2:, 1:-1] & digit[:, :-2, 1:-1] & digit[:, 1:-1, 2:] & digit[:, 1:-1, :-2]
    assert lighter[:, 1:-1, 1:-1][inner].mean() > 0.99
    assert 0.8 < lighter[digit].mean() < 1  # the soft edge belongs to the mask
    assert 0.04 < digit.mean() < 0.16


def test_digits_lie_everywhere_with_the_promised_size():
    digit = compose(0, "train", range(500))[1]
    heights = digit.any(2).sum(1)
    assert 12 <= heights.min() and heights.max() <= 24
    center = digit.mean(0)
    assert (center[8:32, 8:32] > 0.02).all()  # no empty place in the middle
    somewhere = digit.any(0)
    assert somewhere[:6].any() and somewhere[-6:].any() and somewhere[:, :6].any() and somewhere[:, -6:].any()


def test_fragments_make_light_ink_outside_the_digit():
    images, digit, _ = compose(0, "train", range(100))
    light = (images.max(1) > 0.6 * 255) & ~digit
    assert light.mean((1, 2)).min() > 0.01


def test_the_background_does_not_tell_the_class():
    images, digit, _ = compose(0, "train", range(3000))
    outside = np.where(digit[:, None], 0, images).sum((2, 3)) / (~digit).sum((1, 2))[:, None]
    means = np.stack([outside[k::10].mean(0) for k in range(10)])
    spread = outside.std(0) / np.sqrt(300)
    # the ink around the digit's soft edge differs a little between classes; ten classes and three colors are looked at
    assert (np.abs(means - means.mean(0)) < 5 * spread).all()


def test_a_larger_canvas_keeps_the_proportions():
    small, large = compose(0, "train", range(100), size=40)[1], compose(0, "train", range(100), size=80)[1]
    assert large.shape == (100, 80, 80)
    assert abs(large.mean() - small.mean()) < 0.02


def test_splits_sizes_classes_and_flips():
    sets = load(Data(train_size=100, test_size=35))
    assert {name: len(images) for name, images in sets.items()} == {"train": 100, "val": 1000, "test": 35}
    assert sets["train"].classes == tuple("0123456789") and not sets["train"].flip_ok
    assert sets["train"].labels[:12].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    batch = sets["test"].batch([34, 3])
    np.testing.assert_array_equal(batch.images[1].numpy(), compose(0, "test", [3])[0][0])
    assert batch.labels.tolist() == [4, 3] and batch.masks is not None and batch.boxes is None
    assert sets["train"].preprocess.size == (40, 40)


def patch_colors(split: str, share: float, n: int = 500):
    images, _, patch = compose(0, split, range(n), shortcut=share)
    found = np.array([image[:, mask].T[0] for image, mask in zip(images, patch, strict=True)])
    return np.array([int((PATCH_COLORS == color).all(1).nonzero()[0][0]) for color in found])


def test_the_patch_tells_the_class_in_the_share_asked_for():
    label = np.arange(500) % 10
    assert (patch_colors("train", 1.0) == label).all()
    assert 0.85 < (patch_colors("train", 0.9) == label).mean() < 0.97  # 0.9 + 0.1 x 1/10
    assert 0.05 < (patch_colors("train", 0.0) == label).mean() < 0.16


def test_the_patch_of_test_images_tells_nothing_whatever_the_share():
    for share in (0.0, 1.0):
        images = load(Data(source="clutter-shortcut", shortcut=share, test_size=500))["test"].batch(range(500))
        np.testing.assert_array_equal(images.images.numpy(), compose(0, "test", range(500), shortcut=0.0)[0])


def test_the_patch_lies_in_one_of_four_corners():
    patch = compose(0, "train", range(200), shortcut=0.9)[2]
    assert (patch.sum((1, 2)) == 25).all()
    corners = {tuple(np.argwhere(mask)[0]) for mask in patch}
    assert corners == {(1, 1), (1, 34), (34, 1), (34, 34)}


def test_patched_images_are_those_of_clutter_elsewhere():
    plain, digit, _ = compose(0, "test", range(50))
    patched, visible, patch = compose(0, "test", range(50), shortcut=0.0)
    np.testing.assert_array_equal(np.where(patch[:, None], 0, plain), np.where(patch[:, None], 0, patched))
    np.testing.assert_array_equal(visible, digit & ~patch)


def test_the_images_that_results_were_published_with_stay():
    for shortcut, sums in ((None, [400979, 449867, 479088]), (0.9, [404570, 452822, 492924])):
        images = compose(0, "train", [0, 17, 5998], shortcut=shortcut)[0]
        # another order of additions may round a few pixels the other way
        np.testing.assert_allclose(images.sum((1, 2, 3), dtype=np.int64), sums, rtol=0, atol=20)


TWO = ("clutter-pair", "clutter-twice")


@pytest.mark.parametrize("name", TWO)
def test_two_digits_lie_everywhere_with_an_exact_mask(name):
    images, mask, patch = compose(0, "train", range(720), parts=PARTS[name])
    assert images.shape == (720, 3, 40, 40) and not patch.any()
    assert 0.06 < mask.mean() < 0.12
    pieces = np.array([ndimage.label(m, np.ones((3, 3)))[1] for m in mask])
    assert (pieces == 2).mean() > 0.9
    assert (mask.mean(0)[6:34, 6:34] > 0.005).all()  # in the middle least: it lies between the two
    lighter = images.max(1) > 0.5 * 255
    assert 0.8 < lighter[mask].mean() < 1


@pytest.mark.parametrize("name", TWO)
def test_an_image_with_two_digits_depends_on_seed_split_and_index_alone(name):
    together = compose(3, "train", [4, 5, 6], parts=PARTS[name])
    alone = compose(3, "train", [5], parts=PARTS[name])
    for many, one in zip(together, alone, strict=True):
        np.testing.assert_array_equal(many[1], one[0])
    for other in (compose(4, "train", [5], parts=PARTS[name]), compose(3, "val", [5], parts=PARTS[name])):
        assert (other[0] != alone[0]).any()


def scans_shown(monkeypatch, name, n=500):
    """Numbers of the scans of the digits, the fragments aside: first and second of each image."""
    drawn = []
    glyphs = clutter._glyphs

    def spy(ink, side, top, left, n):
        drawn.append(ink)
        return glyphs(ink, side, top, left, n)

    monkeypatch.setattr(clutter, "_glyphs", spy)
    compose(0, "train", range(n), parts=PARTS[name])
    ink, classes = digits("train")
    place = {scan.tobytes(): i for i, scan in enumerate(ink)}
    return np.array([[place[scan.tobytes()] for scan in scans] for scans in drawn[-2:]]), classes


def test_neither_digit_of_a_pair_alone_tells_the_class(monkeypatch):
    scans, classes = scans_shown(monkeypatch, "clutter-pair", 540)
    labels, shown = np.arange(540) % 9, classes[scans]
    np.testing.assert_array_equal(shown, [labels // 3, 3 + labels % 3])
    joint = np.zeros((3, 3))
    np.add.at(joint, (shown[0], shown[1] - 3), 1)
    assert (joint == 60).all()  # whichever the one digit, the three classes that hold it are equally many
    assert len(np.unique(scans)) > 0.6 * np.bincount(classes)[:6].sum()


def test_twice_shows_two_different_scans_of_the_class(monkeypatch):
    scans, classes = scans_shown(monkeypatch, "clutter-twice")
    np.testing.assert_array_equal(classes[scans], np.tile(np.arange(500) % 10, (2, 1)))
    assert (scans[0] != scans[1]).all()


@pytest.mark.parametrize("name", TWO)
def test_two_digits_never_overlap_and_the_mask_is_both(monkeypatch, name):
    glyphs, square = clutter._glyphs, clutter._square
    drawn, corners = [], []

    def spy_glyphs(*args):
        drawn.append(glyphs(*args))
        return drawn[-1]

    def spy_square(top, left, n):
        corners.append(np.stack([top, left]))
        return square(top, left, n)

    monkeypatch.setattr(clutter, "_glyphs", spy_glyphs)
    monkeypatch.setattr(clutter, "_square", spy_square)
    for size in (24, 29, 40, 65):
        mask = compose(0, "train", range(400), size, parts=PARTS[name])[1]
        digit = np.zeros((2, 400, 2 * size, 2 * size), dtype=bool)
        for part, alphas, places in zip(digit, drawn[-2:], corners[-2:], strict=True):
            for one, alpha, (top, left) in zip(part, alphas, places.T, strict=True):
                one[top : top + len(alpha), left : left + len(alpha)] = alpha >= 0.25
        assert not (digit[0] & digit[1]).any() and digit.any((2, 3)).all()
        assert not digit[:, :, size:].any() and not digit[:, :, :, size:].any()
        np.testing.assert_array_equal(mask, digit.any(0)[:, :size, :size])
        first, second = corners[-2:]
        gap = np.abs(first - second)
        assert (gap.max(0) >= 15 * size / 40).all()  # apart by a digit at least, down or across
        across = gap.argmax(0)
        ahead = np.take_along_axis(first < second, across[None], 0)
        assert 0.35 < across.mean() < 0.65 and 0.4 < ahead.mean() < 0.6  # neither direction nor order tells anything
        for number in (0, 1):
            alone = compose(0, "train", range(20), size, parts=PARTS[name], marked=number)[1]
            np.testing.assert_array_equal(alone, digit[number, :20, :size, :size])


def test_two_digits_are_loaded_with_their_classes_and_masks():
    pair = load(Data(source="clutter-pair", train_size=20, test_size=12))
    assert pair["train"].classes == ("0+3", "0+4", "0+5", "1+3", "1+4", "1+5", "2+3", "2+4", "2+5")
    assert pair["test"].labels.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 1, 2]
    twice = load(Data(source="clutter-twice", train_size=20, test_size=12))
    assert twice["train"].classes == tuple("0123456789") and not twice["train"].flip_ok
    for name, sets in (("clutter-pair", pair), ("clutter-twice", twice)):
        batch = sets["test"].batch([11])
        images, mask, _ = compose(0, "test", [11], parts=PARTS[name])
        np.testing.assert_array_equal(batch.images.numpy(), images)
        np.testing.assert_array_equal(batch.masks[:, 0].numpy(), mask)
        first, second = (
            load(Data(source=name, train_size=20, test_size=12, mask=kind))["test"].batch([11])
            for kind in ("first", "second")
        )
        assert torch.equal(first.masks ^ second.masks, batch.masks) and first.masks.any() and second.masks.any()
        assert torch.equal(first.images, batch.images)
        with pytest.raises(ValueError, match=rf"expected data\.mask of {name} to be digit or first or second, got"):
            load(Data(source=name, mask="patch"))


def test_the_mask_can_be_chosen():
    patch = load(Data(source="clutter-shortcut", test_size=5))["test"].batch(range(5)).masks
    digit = load(Data(source="clutter-shortcut", test_size=5, mask="digit"))["test"].batch(range(5)).masks
    _, visible, corner = compose(0, "test", range(5), shortcut=0.0)
    np.testing.assert_array_equal(patch[:, 0].numpy(), corner)
    np.testing.assert_array_equal(digit[:, 0].numpy(), visible)
    with pytest.raises(ValueError, match=r"expected data\.mask of clutter to be digit, got 'patch'"):
        load(Data(mask="patch"))


def test_too_small_a_canvas_is_refused():
    with pytest.raises(ValueError, match=r"expected data\.size of at least 24 for clutter, got 10"):
        load(Data(size=10))


def test_without_scikit_learn_the_install_line_is_printed(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    digits.cache_clear()
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'sightline\[train\]'"):
        load(Data())
