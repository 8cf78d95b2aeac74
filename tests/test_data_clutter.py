import numpy as np
import pytest

from sightline.data import load
from sightline.data.clutter import PATCH_COLOURS, SPLITS, compose, digits
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
    centre = digit.mean(0)
    assert (centre[8:32, 8:32] > 0.02).all()  # no empty place in the middle
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
    # the ink around the digit's soft edge differs a little between classes; ten classes and three colours are looked at
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


def patch_colours(split: str, share: float, n: int = 500):
    images, _, patch = compose(0, split, range(n), shortcut=share)
    found = np.array([image[:, mask].T[0] for image, mask in zip(images, patch, strict=True)])
    return np.array([int((PATCH_COLOURS == colour).all(1).nonzero()[0][0]) for colour in found])


def test_the_patch_tells_the_class_in_the_share_asked_for():
    label = np.arange(500) % 10
    assert (patch_colours("train", 1.0) == label).all()
    assert 0.85 < (patch_colours("train", 0.9) == label).mean() < 0.97  # 0.9 + 0.1 x 1/10
    assert 0.05 < (patch_colours("train", 0.0) == label).mean() < 0.16


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
