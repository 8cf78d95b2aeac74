"""The form of every source: an `ImageSet`, which returns `Batch`es."""

import math
import unicodedata
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from itertools import islice
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from sightline.data.decoded import LARGEST, Composed, Decoder, OnTheFly, Pixels, Record, Sample, Store, Stored
from sightline.data.images import Interpolation
from sightline.data.marks import evenly_spaced
from sightline.data.sources import Listing
from sightline.data.transforms import DRAWS, draws
from sightline.data.transforms import augment as augmented
from sightline.notebook import brief
from sightline.recipe import Augment

Array = np.ndarray
CHUNK = 1024  # images that are brought to a device at once


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """How an image becomes the model's input; travels with a run.

    By default the whole image is resized, nothing is cut away, so that a map covers all of it.

    Raises:
        ValueError: `crop` or `interpolation` is not one of those below.

    >>> print(Preprocess(size=(224, 224), mean=(0.5,) * 3, std=(0.5,) * 3, crop=0.875, interpolation="bicubic"))
    scaled until the shorter side is 256 px, and the middle 224 x 224 px are cut out (crop 0.875, bicubic)
    """

    size: tuple[int, int]
    """Height and width that the model sees, in pixels."""
    mean: tuple[float, float, float]
    """Mean of red, green and blue in [0, 1] over the training images."""
    std: tuple[float, float, float]
    """Standard deviation of red, green and blue over the pixels of the training images."""
    crop: float | None = None
    """None: the whole image is resized to `size`, whatever its shape. A fraction, 0 to 1: the image is scaled, in its
    own shape, to cover `size` / `crop`, and the middle is cut out, as timm and torchvision do for ImageNet."""
    interpolation: Interpolation = "bilinear"
    """How images are resized; always antialiased."""

    def __post_init__(self) -> None:
        if self.crop is not None and not 0 < self.crop <= 1:
            raise ValueError(f"expected crop as a fraction above 0 and up to 1, or None, got {self.crop!r}")
        if self.interpolation not in get_args(Interpolation):
            raise ValueError(
                f"expected interpolation as one of {', '.join(get_args(Interpolation))}, got {self.interpolation!r}"
            )

    def __str__(self) -> str:
        height, width = self.size
        if self.crop is None:
            return f"resized to {width} x {height} px, all of the image ({self.interpolation})"
        covered = dict.fromkeys(str(math.floor(side / self.crop + 1e-6)) for side in (width, height))
        until = "until the shorter side is" if len(covered) == 1 else "to cover"
        return (
            f"scaled {until} {' x '.join(covered)} px, and the middle {width} x {height} px are cut out "
            f"(crop {self.crop:.4g}, {self.interpolation})"
        )

    def facts(self) -> dict[str, Any]:
        """The fields; `crop` and `interpolation` only where they are not the default, as in files of older versions."""
        usual = {"crop": None, "interpolation": "bilinear"}
        return {name: value for name, value in asdict(self).items() if name not in usual or value != usual[name]}


@dataclass(frozen=True)
class Batch:
    """Images with their labels, masks, boxes and names."""

    __repr__ = brief

    images: UInt8[Tensor, "b 3 h w"]
    labels: Int64[Tensor, " b"]
    """-1 where there is no label."""
    masks: Bool[Tensor, "b 1 h w"] | None
    boxes: list[Float32[Tensor, "_ 4"]] | None
    """Per image [x0, y0, x1, y1] in pixels of `images`, right and bottom exclusive."""
    indices: Int64[Tensor, " b"]
    """Index of each image in its set."""
    names: list[str]

    @property
    def regions(self) -> Bool[Tensor, "b 1 h w"] | None:
        """Where the evidence is: the masks, or else the pixels whose center lies in a box."""
        if self.masks is not None or self.boxes is None:
            return self.masks
        height, width = self.images.shape[-2:]
        regions = torch.zeros(len(self.boxes), 1, height, width, dtype=torch.bool, device=self.images.device)
        x = torch.arange(width, device=regions.device) + 0.5
        y = torch.arange(height, device=regions.device)[:, None] + 0.5
        for region, boxes in zip(regions, self.boxes, strict=True):
            for x0, y0, x1, y1 in boxes:
                region |= (x0 <= x) & (x < x1) & (y0 <= y) & (y < y1)
        return regions

    def to(self, device: torch.device | str) -> "Batch":
        """Copy everything to a device."""
        return replace(
            self,
            images=self.images.to(device),
            labels=self.labels.to(device),
            masks=None if self.masks is None else self.masks.to(device),
            boxes=None if self.boxes is None else [boxes.to(device) for boxes in self.boxes],
            indices=self.indices.to(device),
        )


class Resident(NamedTuple):
    """Decoded images as tensors on one device."""

    images: UInt8[Tensor, "n 3 h w"]
    masks: Bool[Tensor, "n h w"] | None
    boxes: list[Float32[Tensor, "_ 4"]] | None

    def read(self, rows: Int64[Array, " b"], places: Int64[Tensor, " b"] | None = None) -> Pixels:
        """The images at these rows; `places` are the same rows on the device."""
        if places is None:
            places = torch.from_numpy(rows).to(self.images.device)
        return Pixels(
            self.images.index_select(0, places),
            None if self.masks is None else self.masks.index_select(0, places),
            None if self.boxes is None else [self.boxes[i].clone() for i in rows.tolist()],
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageSet(Listing, Dataset[Batch]):
    """The images of one split."""

    def __repr__(self) -> str:
        counts = f"{len(self):,} images, {len(self.classes)} classes"
        return f"ImageSet({self.name!r}, {self.split}: {counts}, {self.preprocess})"

    split: str
    preprocess: Preprocess
    store: Store

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"expected an index below {len(self)}, got {index}")
        return self.batch([index])

    def batch(
        self, indices: Sequence[int] | Int64[Array, " b"], augment: tuple[Augment, int, int] | None = None
    ) -> Batch:
        """The images at these places, changed by `augment` (what, seed, epoch) and by their places."""
        return next(self.each([np.asarray(indices, dtype=np.int64)], augment))

    def each(
        self,
        rows: Sequence[Int64[Array, " _"]],
        augment: tuple[Augment, int, int] | None,
        device: torch.device | None = None,
    ) -> Iterator[Batch]:
        """One batch after the other, of the images at these places; the places are copied to the device once.

        Augmentation runs on `device`; None: where the images are.
        """
        whole = np.concatenate([np.empty(0, np.int64), *rows])
        places, labels = torch.from_numpy(whole), torch.from_numpy(self.labels[whole])
        held = self.store if isinstance(self.store, Resident) else None
        if held is not None:
            places, labels = (x.to(held.images.device, non_blocking=True) for x in (places, labels))
        counts = [len(r) for r in rows]
        for here, there, those in zip(rows, places.split(counts), labels.split(counts), strict=True):
            pixels = self.store.read(here) if held is None else held.read(here, there)
            batch = _tensors(pixels, those, there, [self.names[i] for i in here.tolist()], device)
            yield _changed(batch, augment, self)

    def picked(self, places: Int64[Array, " k"]) -> "ImageSet":
        """Only the images at these places, of a set that is not held on a device."""
        if not isinstance(self.store, Stored | OnTheFly | Composed):
            raise ValueError(f"expected images that are stored or decoded, got {type(self.store).__name__}")
        return replace(
            self,
            labels=self.labels[places],
            names=[self.names[i] for i in places.tolist()],
            groups=None if self.groups is None else self.groups[places],
            cameras=None if self.cameras is None else self.cameras[places],
            store=self.store.picked(places),
        )

    def with_classes(self, classes: Sequence[str]) -> "ImageSet":
        """The same images with labels counted as in `classes`, which may be more than occur here.

        Raises:
            ValueError: a class of these images is none of `classes`.
        """
        if tuple(self.classes) == tuple(classes):
            return self
        wanted = [unicodedata.normalize("NFC", name) for name in classes]  # Unicode writes one name in several forms
        names = [unicodedata.normalize("NFC", name) for name in self.classes]
        if unknown := [name for name in names if name not in wanted]:
            raise ValueError(
                f"expected data with the classes of the run, got {unknown[0]!r}, which is none of "
                f"{', '.join(classes)}; leave its images out, or name it as in training"
            )
        places = np.array([*(wanted.index(name) for name in names), -1])
        return replace(self, labels=places[self.labels], classes=tuple(classes))

    def unmarked(self) -> "ImageSet":
        """The same images without masks and boxes, which are then not read."""
        store = self.store
        if isinstance(store, OnTheFly):
            store = replace(store, decoder=replace(store.decoder, has_masks=False, has_boxes=False))
        elif isinstance(store, Stored | Resident):
            store = store._replace(masks=None, boxes=None)
        return replace(self, store=store, has_masks=False, has_boxes=False)

    @property
    def resident_bytes(self) -> int | None:
        """Memory that the set takes on a device, without boxes. None: its images are decoded on the fly."""
        height, width = self.preprocess.size
        pixels = (4 if self.has_masks else 3) * height * width
        return None if isinstance(self.store, OnTheFly) else len(self) * (pixels + 8)

    def to(self, device: torch.device | str) -> "ImageSet":
        """The same set with images, labels, masks and boxes held on a device, which then makes the batches.

        Raises:
            ValueError: its images are decoded on the fly.
        """
        n, (height, width) = len(self), self.preprocess.size
        if isinstance(self.store, OnTheFly):
            raise ValueError(
                f"expected decoded images to hold on {device}, got images of {width} x {height} px that are decoded "
                f"on the fly; set data.size to at most {LARGEST}"
            )
        images = torch.empty(n, 3, height, width, dtype=torch.uint8, device=device)
        masks = torch.empty(n, height, width, dtype=torch.bool, device=device) if self.has_masks else None
        boxes: list[Tensor] = []
        for start in range(0, n, CHUNK):
            part = self.batch(range(start, min(start + CHUNK, n)))
            images[start : start + CHUNK] = part.images
            if masks is not None and part.masks is not None:
                masks[start : start + CHUNK] = part.masks[:, 0]
            boxes += [b.to(device) for b in part.boxes or []]
        return replace(self, store=Resident(images, masks, boxes if self.has_boxes else None))


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageStream:
    """Training images that are read one after the other and not kept; they support `batches` only."""

    __repr__ = brief

    name: str
    classes: tuple[str, ...]
    preprocess: Preprocess
    length: int
    """Number of images, unreadable ones included."""
    records: Callable[[tuple[int, int] | None, int], Iterator[tuple[int, Record, int]]]
    """Yields number, undecoded image and label of each, in the order of (seed, epoch), from a place on."""
    decoder: Decoder
    split: str = "train"
    flip_ok: bool = True
    skipped: list[tuple[str, str]] = field(default_factory=lambda: [])
    """Name and reason of each unreadable image so far."""
    notices: tuple[str, ...] = ()
    """Decisions about the source that you may want to change; one sentence each."""
    strict: bool = False

    def __len__(self) -> int:
        return self.length

    @property
    def resident_bytes(self) -> None:
        """None: a stream cannot be held on a device."""

    def read(
        self,
        batch_size: int,
        shuffle: tuple[int, int] | None,
        augment: tuple[Augment, int, int] | None,
        drop_last: bool,
        start: int,
        part: tuple[int, int],
        device: torch.device | None,
    ) -> Iterator[Batch]:
        """One pass from batch `start` on; unreadable images are missing from their batch.

        A batch without any readable image is returned empty, so that the next one keeps its number.

        Raises:
            ValueError: with `strict`, an image cannot be read.
        """
        records = self.records(shuffle, start * batch_size)
        end = self.length - self.length % batch_size if drop_last else self.length
        for _ in range(start * batch_size, end, batch_size):
            batch = list(islice(records, batch_size))
            batch = [batch[i] for i in _share(np.arange(len(batch)), part)]
            samples = self.decoder.attempt_all([record for _, record, _ in batch])
            readable: list[tuple[int, int, str, Sample]] = []
            for (number, _, label), sample in zip(batch, samples, strict=True):
                name = f"train/{number:06d}"
                if isinstance(sample, Sample):
                    readable.append((number, label, name, sample))
                elif self.strict:
                    raise ValueError(f"{name}: {sample}")
                elif (name, sample) not in self.skipped:
                    self.skipped.append((name, sample))
            places, labels = torch.tensor([row[:2] for row in readable], dtype=torch.int64).reshape(-1, 2).unbind(1)
            pixels = self.decoder.stack([sample for *_, sample in readable])
            yield _changed(_tensors(pixels, labels, places, [row[2] for row in readable], device), augment, self)


def _tensors(
    pixels: Pixels,
    labels: Int64[Tensor, " b"],
    places: Int64[Tensor, " b"],
    names: list[str],
    device: torch.device | None,
) -> Batch:
    batch = Batch(
        images=torch.as_tensor(pixels.images),
        labels=labels,
        masks=None if pixels.masks is None else torch.as_tensor(pixels.masks)[:, None],
        boxes=None if pixels.boxes is None else [torch.as_tensor(b) for b in pixels.boxes],
        indices=places,
        names=names,
    )
    return batch if device is None else batch.to(device)


def _changed(batch: Batch, augment: tuple[Augment, int, int] | None, source: ImageSet | ImageStream) -> Batch:
    if augment is None:
        return batch
    what, seed, epoch = augment
    if what.flip is None:
        what = replace(what, flip=source.flip_ok)
    red, green, blue = (round(255 * mean) for mean in source.preprocess.mean)
    uniform = draws(seed, epoch, batch.indices, DRAWS)
    images, masks, boxes = augmented(batch.images, batch.masks, batch.boxes, what, uniform, (red, green, blue))
    return replace(batch, images=images, masks=masks, boxes=boxes)


def _share(rows: Int64[Array, " b"], part: tuple[int, int]) -> Int64[Array, " _"]:
    """The rows of a batch for process r of n."""
    return np.array_split(rows, part[1])[part[0]]


def _ahead(passed: Iterator[Batch]) -> Iterator[Batch]:
    """The same batches, prepared by a thread while the previous one is used."""
    with ThreadPoolExecutor(1, "ahead") as pool:
        try:
            coming = deque(pool.submit(next, passed, None) for _ in range(2))
            while (batch := coming.popleft().result()) is not None:
                coming.append(pool.submit(next, passed, None))
                yield batch
        finally:
            pool.shutdown(cancel_futures=True)


def batches(
    images: ImageSet | ImageStream,
    batch_size: int,
    *,
    shuffle: tuple[int, int] | None = None,
    augment: tuple[Augment, int, int] | None = None,
    drop_last: bool = False,
    start: int = 0,
    ahead: torch.device | None = None,
    part: tuple[int, int] = (0, 1),
    per_class: int | None = None,
) -> Iterator[Batch]:
    """One pass over the images.

    Args:
        images: The set to read.
        batch_size: Images in a batch; the last one may be smaller.
        shuffle: (seed, epoch), which decide the order. None: in order.
        augment: (what, seed, epoch) of random changes. None: images as they are.
        drop_last: Leave out a last batch that is not full.
        start: Number of the first batch, to continue in the middle of a pass.
        ahead: A device to which a thread copies the next batches while one is used. A set that is held on a device
            needs no thread.
        part: (r, n): only the part of each batch for process r of n. All parts in order are the batch; one may be
            empty.
        per_class: Images of a class that follow one another when the order is shuffled; a class with fewer, or whose
            number is no multiple, fills its last place with others of its images. None: any order.

    Raises:
        ValueError: a batch size below 1, or a part that does not exist.
    """
    if batch_size < 1:
        raise ValueError(f"expected a batch size of at least 1, got {batch_size}")
    if not 0 <= part[0] < part[1]:
        raise ValueError(f"expected a part (r, n) with r from 0 to n - 1, got {part}")
    if isinstance(images, ImageStream):
        passed = images.read(batch_size, shuffle, augment, drop_last, start, part, ahead)
        return passed if ahead is None else _ahead(passed)
    n = len(images)
    order = np.arange(n)
    if shuffle is not None:
        rng = np.random.default_rng(list(shuffle))
        order = rng.permutation(n) if per_class is None else _by_class(images.labels, per_class, rng)[:n]
    ends = range(0, n - n % batch_size if drop_last else n, batch_size)
    rows = [_share(order[i : i + batch_size], part) for i in ends][start:]
    passed = images.each(rows, augment, ahead)
    return passed if ahead is None or isinstance(images.store, Resident) else _ahead(passed)


def _by_class(labels: Int64[Array, " n"], k: int, rng: np.random.Generator) -> Int64[Array, " m"]:
    """Every row at least once, k of a class after one another, in random order.

    >>> labels = np.array([0, 0, 0, 1, 1])
    >>> labels[_by_class(labels, 2, np.random.default_rng(0))].reshape(-1, 2).tolist()
    [[0, 0], [1, 1], [0, 0]]
    """
    places: list[Int64[Array, "_ k"]] = []
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        places.append(np.resize(rows, (-(-len(rows) // k), k)))
    whole = np.concatenate(places)
    return whole[rng.permutation(len(whole))].ravel()


def normalize(images: UInt8[Tensor, "b 3 h w"], preprocess: Preprocess) -> Float32[Tensor, "b 3 h w"]:
    """The model's input: (images / 255 - mean) / std, on the device of the images.

    >>> gray = Preprocess(size=(1, 1), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    >>> normalize(torch.full((1, 3, 1, 1), 255, dtype=torch.uint8), gray).flatten().tolist()
    [1.0, 1.0, 1.0]
    """
    mean, std = _statistics_on(preprocess, images.device, torch.get_default_dtype())
    return (images / 255 - mean) / std


@lru_cache(maxsize=16)
def _statistics_on(preprocess: Preprocess, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean and deviation on a device; copied once, so that no step waits for it."""
    with torch.inference_mode(False):
        mean, std = torch.tensor([preprocess.mean, preprocess.std], dtype=dtype, device=device)[:, :, None, None]
    return mean, std


def sampled(store: Store, n: int, size: int) -> Iterator[UInt8[Array, "_ 3 h w"]]:
    """Up to `size` of the `n` images of a store, evenly spaced, a hundred at a time."""
    rows = np.array(evenly_spaced(n, size), dtype=np.int64)
    for start in range(0, len(rows), 100):
        yield np.asarray(store.read(rows[start : start + 100]).images)


def statistics(images: Iterable[UInt8[Array, "_ 3 h w"]]) -> Preprocess:
    """Size, mean and standard deviation of images; mean and deviation to 4 digits.

    >>> half = np.array([0, 255], dtype=np.uint8).reshape(1, 1, 1, 2).repeat(3, axis=1)
    >>> statistics([half])
    Preprocess(size=(1, 2), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), crop=None, interpolation='bilinear')
    """
    sums, pixels, size = np.zeros((2, 3)), 0, (0, 0)
    for part in images:
        values = part / np.float32(255)
        sums += [values.sum((0, 2, 3), dtype=np.float64), np.square(values).sum((0, 2, 3), dtype=np.float64)]
        size = (part.shape[2], part.shape[3])
        pixels += part.shape[0] * size[0] * size[1]
    mean, square = sums / pixels
    # a channel that is the same everywhere must not divide by zero
    std = np.sqrt(np.maximum(square - mean**2, 1 / 255**2))
    return Preprocess(size=size, mean=_triple(mean), std=_triple(std))


def _triple(values: Float[Array, " 3"]) -> tuple[float, float, float]:
    red, green, blue = (round(float(v), 4) for v in values)
    return red, green, blue
