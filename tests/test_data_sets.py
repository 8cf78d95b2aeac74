from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms.v2 import functional as F

from sightline.data import Batch, ImageSet, Preprocess, batches, normalize
from sightline.data.decoded import Stored
from sightline.data.sets import statistics
from sightline.recipe import Augment

GRAY = Preprocess(size=(8, 8), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


def some_images(n: int = 20, size: int = 8, **options) -> ImageSet:
    """Images whose masks and boxes show where the first channel is 255: a block of 3 x 2 pixels."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 200, (n, 3, size, size), dtype=np.uint8)
    masks = np.zeros((n, size, size), bool)
    boxes = []
    for i in range(n):
        top, left = rng.integers(0, size - 3, 2)
        masks[i, top : top + 3, left : left + 2] = True
        boxes.append(np.array([[left, top, left + 2, top + 3]], np.float32))
    images[:, 0][masks] = 255
    return ImageSet(
        name="some",
        split="train",
        classes=("a", "b"),
        preprocess=replace(GRAY, size=(size, size)),
        labels=np.arange(n) % 2,
        names=[f"image {i}" for i in range(n)],
        store=Stored(images, masks, boxes),
        has_masks=True,
        has_boxes=True,
        **options,
    )


def all_rows(images: ImageSet, batch_size: int, **options) -> list[int]:
    return [int(i) for batch in batches(images, batch_size, **options) for i in batch.indices]


def equal(one: Batch, other: Batch) -> bool:
    same = [torch.equal(a, b) for a, b in zip(one.boxes, other.boxes, strict=True)]
    return torch.equal(one.images, other.images) and torch.equal(one.masks, other.masks) and all(same)


def test_a_batch_holds_what_was_asked_for():
    images = some_images()
    batch = images.batch([3, 1])
    assert batch.images.shape == (2, 3, 8, 8) and batch.images.dtype == torch.uint8
    assert batch.labels.tolist() == [1, 1] and batch.indices.tolist() == [3, 1]
    assert batch.names == ["image 3", "image 1"]
    assert torch.equal(batch.masks[:, 0], batch.images[:, 0] == 255)
    assert equal(images[5], images.batch([5]))
    with pytest.raises(IndexError, match="expected an index below 20, got 20"):
        images[20]


def test_regions_are_the_masks_or_else_the_pixels_in_a_box():
    batch = some_images().batch(range(20))
    assert torch.equal(batch.regions, batch.masks)
    assert torch.equal(replace(batch, masks=None).regions, batch.masks)
    assert replace(batch, masks=None, boxes=None).regions is None


def test_boxes_take_the_pixels_whose_center_they_hold():
    boxes = [torch.tensor([[0.4, 0.6, 2.4, 1.6], [3.0, 3.0, 4.0, 4.0]]), torch.zeros(0, 4)]
    batch = Batch(
        torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2).long(), None, boxes, torch.arange(2), ["", ""]
    )
    assert batch.regions.nonzero().tolist() == [[0, 0, 1, 0], [0, 0, 1, 1], [0, 0, 3, 3]]


def test_a_batch_can_be_sent_elsewhere():
    batch = some_images().batch([0, 1])
    sent = batch.to("meta")
    assert sent.images.is_meta and sent.masks.is_meta and sent.boxes[0].is_meta and sent.labels.is_meta
    assert replace(batch, masks=None, boxes=None).to("cpu").masks is None


def test_one_pass_in_order():
    images = some_images()
    assert all_rows(images, 6) == list(range(20))
    assert [len(b.labels) for b in batches(images, 6)] == [6, 6, 6, 2]
    assert [len(b.labels) for b in batches(images, 6, drop_last=True)] == [6, 6, 6]


def test_the_order_of_a_shuffled_pass_depends_on_seed_and_epoch_alone():
    images = some_images()
    rows = all_rows(images, 6, shuffle=(1, 2))
    assert sorted(rows) == list(range(20)) and rows != sorted(rows)
    assert rows == all_rows(images, 4, shuffle=(1, 2))
    assert rows != all_rows(images, 6, shuffle=(2, 1)) and rows != all_rows(images, 6, shuffle=(1, 3))


def test_a_pass_can_begin_in_the_middle():
    images = some_images()
    change = (Augment(crop=2, flip=True), 0, 1)
    whole = list(batches(images, 6, shuffle=(0, 1), augment=change, drop_last=True))
    rest = list(batches(images, 6, shuffle=(0, 1), augment=change, drop_last=True, start=1))
    assert len(rest) == 2
    assert all(equal(a, b) for a, b in zip(whole[1:], rest, strict=True))


def test_batches_prepared_ahead_are_the_same_and_leave_the_random_state_alone():
    images = some_images()
    change = (Augment(crop=2, flip=True, color=0.3), 0, 1)
    alone = list(batches(images, 6, shuffle=(0, 1), augment=change))
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    helped = list(batches(images, 6, shuffle=(0, 1), augment=change, ahead=torch.device("cpu")))
    assert len(helped) == 4 and all(equal(a, b) for a, b in zip(alone, helped, strict=True))
    assert torch.equal(torch_state, torch.get_rng_state())
    np.testing.assert_array_equal(numpy_state, np.random.get_state()[1])


def test_unmarked_images_are_the_same_without_masks_and_boxes():
    for images in (some_images(), some_images().to("cpu")):
        bare = images.unmarked()
        assert images.has_masks and images.has_boxes and not bare.has_masks and not bare.has_boxes
        change = (Augment(crop=2, flip=True, cutout=3), 0, 1)
        for a, b in zip(batches(images, 6, augment=change), batches(bare, 6, augment=change), strict=True):
            assert torch.equal(a.images, b.images) and a.masks is not None and b.masks is None is b.boxes
        assert bare.resident_bytes < images.resident_bytes


RESIDENT = {"masks and boxes": some_images(), "images": replace(some_images(), has_masks=False, has_boxes=False)}
RESIDENT["images"] = replace(RESIDENT["images"], store=Stored(some_images().store.images, None, None))
EXACT = Augment(crop=2, flip=True, rotate=True, cutout=3)
EVERYTHING = Augment(crop=2, flip=True, scale=0.5, rotate=True, color=0.5, cutout=3)


@pytest.mark.parametrize("images", RESIDENT.values(), ids=RESIDENT)
@pytest.mark.parametrize("options", [{}, {"drop_last": True, "start": 1}, {"part": (1, 3)}, {"start": 9}], ids=str)
@pytest.mark.parametrize("change", [None, (EXACT, 1, 2), (EVERYTHING, 1, 2)], ids=["plain", "moved", "all"])
def test_a_resident_set_gives_the_same_batches(images, options, change):
    held = images.to("cpu")
    options = {"shuffle": (0, 1), "augment": change, **options}
    plain, found = list(batches(images, 6, **options)), list(batches(held, 6, ahead=torch.device("cpu"), **options))
    assert len(plain) == {9: 0, 1: 2}.get(options.get("start"), 4)
    for a, b in zip(plain, found, strict=True):
        assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) and torch.equal(a.indices, b.indices)
        assert a.names == b.names == [f"image {i}" for i in a.indices]
        assert (
            (a.masks is None) == (b.masks is None) == (a.boxes is None) == (b.boxes is None) == (not images.has_masks)
        )
        assert not images.has_masks or equal(a, b)
        b.images.zero_()
    assert torch.equal(held.batch(range(20)).images, images.batch(range(20)).images)


def test_a_resident_set_is_the_same_set_otherwise():
    images = some_images()
    held = images.to("cpu")
    assert replace(held, store=images.store).__dict__ == images.__dict__
    batch = held[3]
    assert batch.names == ["image 3"] and equal(batch, images[3])
    batch.boxes[0].zero_()
    assert equal(held[3], images[3]) and equal(held.to("cpu")[3], images[3])


def test_a_resident_set_counts_the_classes_anew():
    held = some_images().to("cpu").with_classes(("b", "c", "a"))
    assert held.batch(range(4)).labels.tolist() == held.labels[:4].tolist() == [2, 0, 2, 0]


def test_the_bytes_of_a_resident_set():
    assert some_images().resident_bytes == 20 * (4 * 64 + 8)
    assert RESIDENT["images"].resident_bytes == 20 * (3 * 64 + 8)
    held = RESIDENT["images"].to("cpu")
    assert held.store.images.nbytes + held.batch(range(20)).labels.nbytes == 20 * (3 * 64 + 8)


def test_a_resident_set_makes_its_batches_on_the_device():
    """`meta` has no values, so whatever asks for one fails, and so does what mixes devices."""
    held = RESIDENT["images"].to("meta")
    for batch in batches(held, 6, shuffle=(0, 1), augment=(EVERYTHING, 0, 0)):
        assert batch.images.is_meta and batch.images.shape[1:] == (3, 8, 8) and batch.labels.is_meta
        assert len(batch.names) == len(batch.labels)


def test_a_resident_set_never_makes_the_host_wait(monkeypatch):
    held = RESIDENT["images"].to("cpu")
    expected = list(batches(held, 6, augment=(EVERYTHING, 0, 0)))

    def waits(*_, **__):
        raise AssertionError("the host waits")

    class Watched(TorchDispatchMode):
        """Sees what asks for values from within, and tensors made from lists."""

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket.__name__ in WAITING:
                waits()
            return func(*args, **(kwargs or {}))

    passed = batches(held, 6, augment=(EVERYTHING, 0, 0))
    found = [next(passed)]  # brings the order there
    with monkeypatch.context() as patched, Watched():
        for name in ("item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__int__", "__float__", "__index__"):
            patched.setattr(torch.Tensor, name, waits)
        found += passed
    assert len(found) == 4 and all(torch.equal(a.images, b.images) for a, b in zip(found, expected, strict=True))


WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "index", "bincount", "repeat_interleave", "lift_fresh"}


def test_the_shares_of_all_processes_are_the_batch():
    images = some_images()
    options = {"shuffle": (0, 1), "augment": (EVERYTHING, 0, 0), "start": 1}
    whole = list(batches(images, 8, **options))
    shares = [list(batches(images, 8, part=(r, 3), **options)) for r in range(3)]
    assert [len(b.labels) for b in whole] == [8, 4]
    assert [[len(b.labels) for b in share] for share in shares] == [[3, 2], [3, 1], [2, 1]]
    for batch, parts in zip(whole, zip(*shares, strict=True), strict=True):
        assert torch.equal(batch.images, torch.cat([p.images for p in parts]))
        assert torch.equal(batch.masks, torch.cat([p.masks for p in parts]))
        assert batch.indices.tolist() == [i for p in parts for i in p.indices.tolist()]
        assert batch.names == [name for p in parts for name in p.names]


def test_a_share_may_be_empty():
    for images in (some_images(3), some_images(3).to("cpu")):
        (share,) = batches(images, 3, augment=(EVERYTHING, 0, 0), part=(3, 4))
        assert share.images.shape == (0, 3, 8, 8) and share.masks.shape == (0, 1, 8, 8)
        assert share.boxes == [] and share.names == [] and len(share.labels) == 0


@pytest.mark.parametrize("part", [(1, 1), (-1, 2), (0, 0)])
def test_a_part_that_there_is_not_is_refused(part):
    with pytest.raises(ValueError, match=r"expected a part \(r, n\) with r from 0 to n - 1, got \("):
        batches(some_images(), 4, part=part)


def test_what_is_cut_out_has_the_mean_color():
    images = replace(some_images(), preprocess=replace(GRAY, mean=(0.0, 0.5, 0.996)))
    plain, changed = images.batch(range(20)), images.batch(range(20), (Augment(cutout=4, flip=False), 0, 0))
    hole = (changed.images == torch.tensor([0, 128, 254])[:, None, None]).all(1, keepdim=True)
    assert torch.equal(torch.where(hole, changed.images, plain.images), changed.images)
    assert 4 <= hole.flatten(1).sum(1).min() and hole.flatten(1).sum(1).max() == 16
    assert torch.equal(changed.masks, plain.masks)


def test_a_batch_size_below_one_is_refused():
    with pytest.raises(ValueError, match="expected a batch size of at least 1, got 0"):
        batches(some_images(), 0)


ALL = Augment(crop=2, flip=True, scale=0.5, rotate=True, color=0.5)


def test_a_change_depends_on_seed_epoch_and_index_alone():
    images = some_images()
    together = images.batch([4, 5, 6], (ALL, 1, 2))
    alone = images.batch([5], (ALL, 1, 2))
    assert torch.equal(together.images[1], alone.images[0]) and torch.equal(together.masks[1], alone.masks[0])
    for other in ((ALL, 2, 2), (ALL, 1, 3)):
        assert not torch.equal(images.batch([5], other).images, alone.images)


def test_changes_leave_the_stored_images_and_the_random_state_alone():
    images = some_images()
    before, state = images.batch(range(20)), torch.get_rng_state()
    changed = images.batch(range(20), (ALL, 0, 0))
    assert not torch.equal(changed.images, before.images)
    assert equal(images.batch(range(20)), before)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    "what",
    [Augment(crop=3, flip=False), Augment(flip=True), Augment(rotate=True, flip=False), Augment(crop=2, rotate=True)],
)
def test_masks_and_boxes_follow_the_image(what):
    batch = some_images(200).batch(range(200), (what, 0, 0))
    assert torch.equal(batch.masks[:, 0], batch.images[:, 0] == 255)
    for mask, boxes in zip(batch.masks[:, 0], batch.boxes, strict=True):
        if not mask.any():
            assert boxes.shape == (0, 4)
            continue
        y, x = mask.nonzero().T
        torch.testing.assert_close(
            boxes, torch.stack([x.min(), y.min(), x.max() + 1, y.max() + 1]).float()[None], atol=1e-4, rtol=0
        )


def test_masks_and_boxes_follow_a_resized_crop():
    batch = some_images(100, size=64).batch(range(100), (Augment(scale=0.3, flip=False), 0, 0))
    area = batch.masks.flatten(1).sum(1)
    assert area.max() > 1.5 * 6  # enlarged
    inside = replace(batch, masks=None).regions
    assert ((inside & batch.masks).flatten(1).sum(1)[area > 0] > 0).all()


def test_a_crop_pads_with_black_and_moves_by_whole_pixels():
    images = some_images(100)
    plain = images.batch(range(100)).images
    moved = images.batch(range(100), (Augment(crop=2, flip=False), 0, 0)).images
    padded = F.pad(plain, [2, 2, 2, 2])
    found = set()
    for image, source in zip(moved, padded, strict=True):
        places = [(y, x) for y in range(5) for x in range(5) if torch.equal(image, source[:, y : y + 8, x : x + 8])]
        assert len(places) == 1
        found.add(places[0])
    assert len(found) == 25


def test_flips_are_half_of_the_images_and_off_for_digits():
    images = some_images(200)
    plain = images.batch(range(200)).images

    def share(images: ImageSet, flip: bool | None) -> float:
        changed = images.batch(range(200), (Augment(flip=flip), 0, 0)).images
        mirrored = (changed == plain.flip(3)).flatten(1).all(1)
        assert (mirrored | (changed == plain).flatten(1).all(1)).all()
        return float(mirrored.float().mean())

    assert 0.4 < share(images, None) < 0.6
    assert share(images, False) == 0
    assert share(replace(images, flip_ok=False), None) == 0
    assert 0.4 < share(replace(images, flip_ok=False), True) < 0.6


def test_turns_of_images_that_are_not_square_keep_their_size():
    square = some_images()
    wide = replace(
        square,
        store=Stored(square.store.images[:, :, :4], square.store.masks[:, :4], [np.zeros((0, 4), np.float32)] * 20),
    )
    changed = wide.batch(range(20), (Augment(rotate=True, flip=False), 0, 0)).images
    plain = wide.batch(range(20)).images
    assert changed.shape == plain.shape
    for a, b in zip(changed, plain, strict=True):
        assert any(torch.equal(a, t) for t in (b, b.flip(1), b.flip(2), b.flip(1, 2)))


def test_color_changes_leave_masks_alone():
    images = some_images()
    plain, changed = images.batch(range(20)), images.batch(range(20), (Augment(color=0.5, flip=False), 0, 0))
    assert torch.equal(plain.masks, changed.masks) and not torch.equal(plain.images, changed.images)


def test_normalize_uses_mean_and_std_of_each_channel():
    preprocess = Preprocess(size=(1, 2), mean=(0.0, 0.5, 1.0), std=(1.0, 0.5, 0.25))
    pixels = torch.tensor([[[[0, 255]], [[0, 255]], [[0, 255]]]], dtype=torch.uint8)
    found = normalize(pixels, preprocess)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor([[[[0.0, 1.0]], [[-1.0, 1.0]], [[-4.0, 0.0]]]]))


def test_normalize_remembers_no_other_default_type(unchecked):
    preprocess = Preprocess(size=(1, 1), mean=(0.1, 0.2, 0.3), std=(0.7, 0.8, 0.9))
    pixels = torch.full((1, 3, 1, 1), 77, dtype=torch.uint8)
    torch.set_default_dtype(torch.float64)
    try:
        normalize(pixels, preprocess)
    finally:
        torch.set_default_dtype(torch.float32)
    assert normalize(pixels, preprocess).dtype == torch.float32


def test_normalized_training_images_have_mean_zero_and_std_one():
    images = some_images(50)
    pixels = images.batch(range(50)).images
    found = normalize(pixels, statistics([pixels[:30].numpy(), pixels[30:].numpy()]))
    torch.testing.assert_close(found.mean((0, 2, 3)), torch.zeros(3), atol=1e-3, rtol=0)
    torch.testing.assert_close(found.std((0, 2, 3)), torch.ones(3), atol=1e-3, rtol=0)


def test_the_statistics_of_equal_pixels_can_be_divided_by():
    found = statistics([np.full((2, 3, 4, 5), 51, np.uint8)])
    assert found == Preprocess(size=(4, 5), mean=(0.2, 0.2, 0.2), std=(0.0039, 0.0039, 0.0039))
