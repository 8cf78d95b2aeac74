"""Decodes the images of a source: small ones once, into a memory-mapped file, large ones in each pass."""

import hashlib
import io
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from errno import ENOSPC
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import PIL
from filelock import FileLock
from jaxtyping import Bool, Float32, Int64, UInt8
from rich.console import Console
from rich.progress import track
from torch import Tensor

from sightline.data.duplicates import IMPRINT, imprint
from sightline.data.images import MAX_PIXELS, Interpolation, UnreadableImage, open_image, open_mask, quiet, window
from sightline.data.marks import USUAL, Marks, Record, pixel_boxes

Array = np.ndarray
LARGEST = 256  # side of the largest image that is cached, in pixels
MEMORY = 4 * 2**30  # bytes that may be held where the disk cannot be used
CHUNK = 64


Reader = Callable[[Sequence[int]], list[Record]]


class Sample(NamedTuple):
    """One decoded image at the model's size."""

    image: UInt8[Array, "3 h w"]
    mask: Bool[Array, "h w"] | None
    boxes: Float32[Array, "_ 4"] | None
    imprint: Array | None = None
    """See `sightline.data.duplicates.imprint`; only if asked for."""


class Pixels(NamedTuple):
    """Some images of a store, at the model's size."""

    images: UInt8[Array | Tensor, "b 3 h w"]
    masks: Bool[Array | Tensor, "b h w"] | None
    boxes: Sequence[Float32[Array | Tensor, "_ 4"]] | None


@runtime_checkable
class Store(Protocol):
    """Where pixels come from: composed, read from the cache, or decoded one by one."""

    def read(self, rows: Int64[Array, " b"]) -> Pixels:
        """The images of these rows, as arrays that the caller may change."""
        ...


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """Turns records into samples."""

    size: tuple[int, int]
    """Height and width, in pixels."""
    has_masks: bool
    has_boxes: bool
    marks: Marks = USUAL
    max_pixels: int = MAX_PIXELS
    """Most pixels that one image may take to decode."""
    crop: float | None = field(default=None, repr=False)
    """See `images.window`."""
    interpolation: Interpolation = field(default="bilinear", repr=False)

    def decode(self, record: Record) -> Sample:
        """The window of one image with its mask and boxes; an image without mask or box has nothing marked.

        Raises:
            UnreadableImage: one of them cannot be used.
        """
        pixels, whole = open_image(record.image, self.size, self.max_pixels, self.crop, self.interpolation)
        mask, boxes = None, None
        if self.has_masks:
            mask = np.zeros(self.size, dtype=bool)
            for part in record.masks:
                mask |= open_mask(part, self.size, whole, self.marks.mask_values, self.max_pixels, self.crop)
        if self.has_boxes:
            boxes = pixel_boxes(record.boxes, self.marks.boxes, whole)
            left, top, right, bottom = window(self.size, self.crop, whole)
            scale = np.array([self.size[1] / (right - left), self.size[0] / (bottom - top)], dtype=np.float32)
            boxes = (boxes - np.array([left, top] * 2, dtype=np.float32)) * np.tile(scale, 2)
            boxes = boxes if self.crop is None else _inside(boxes, self.size)
        return Sample(np.ascontiguousarray(pixels.transpose(2, 0, 1)), mask, boxes)

    def attempt_all(self, records: Sequence[Record], with_imprint: bool = False) -> list[Sample | str]:
        """Each image, or the reason why it cannot be used; on all cores."""

        def attempt(record: Record) -> Sample | str:
            try:
                sample = self.decode(record)
            except UnreadableImage as error:
                return str(error)
            return sample._replace(imprint=imprint(record.image, sample.image)) if with_imprint else sample

        with quiet(), ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(attempt, records))

    def stack(self, samples: Sequence[Sample]) -> Pixels:
        """Samples, if any, as arrays."""
        images = np.array([s.image for s in samples], dtype=np.uint8).reshape(-1, 3, *self.size)
        masks = np.array([s.mask for s in samples], dtype=bool).reshape(-1, *self.size) if self.has_masks else None
        return Pixels(images, masks, [s.boxes for s in samples if s.boxes is not None] if self.has_boxes else None)


def _inside(boxes: Float32[Array, "n 4"], size: tuple[int, int]) -> Float32[Array, "_ 4"]:
    """What lies in an image of this size of each box, if anything does."""
    cut = np.clip(boxes, 0, np.array([size[1], size[0]] * 2, dtype=np.float32))
    return cut[(cut[:, 2] > cut[:, 0]) & (cut[:, 3] > cut[:, 1])]


@dataclass(frozen=True, kw_only=True, eq=False)
class OnTheFly:
    """Rows of a source, decoded at each access."""

    reader: Reader
    rows: Int64[Array, " n"]
    decoder: Decoder

    def read(self, rows: Int64[Array, " b"]) -> Pixels:
        """The images at these places, decoded on all cores.

        Raises:
            OSError: an image that could be read at first no longer can.
        """
        records = self.reader(self.rows[rows].tolist())
        samples = self.decoder.attempt_all(records)
        for record, sample in zip(records, samples, strict=True):
            if isinstance(sample, str):
                what = record.image if isinstance(record.image, Path) else "an image"
                raise OSError(f"{what} could be read at first and no longer can: {sample}")
        return self.decoder.stack([sample for sample in samples if isinstance(sample, Sample)])

    def attempt_all(self) -> Iterator[Sample | str]:
        """Every image with its imprint, or the reason why it cannot be used; on all cores."""
        for start in range(0, len(self.rows), CHUNK):
            records = self.reader(self.rows[start : start + CHUNK].tolist())
            yield from self.decoder.attempt_all(records, with_imprint=True)

    def picked(self, places: Int64[Array, " k"]) -> "OnTheFly":
        """Only the images at these places."""
        return replace(self, rows=self.rows[places])


class Composed:
    """Composes each image when it is first asked for, and keeps it."""

    def __init__(self, compose: Callable[[Int64[Array, " b"]], tuple[Array, Array]], n: int, size: tuple[int, ...]):
        self.compose = compose
        self.images = np.zeros((n, 3, *size), dtype=np.uint8)
        self.masks = np.zeros((n, *size), dtype=bool)
        self.done = np.zeros(n, dtype=bool)

    def read(self, rows: Int64[Array, " b"]) -> Pixels:
        """The images of these rows, with one mask each."""
        missing = np.unique(rows[~self.done[rows]])
        for part in np.array_split(missing, -(-len(missing) // CHUNK)) if len(missing) else []:
            self.images[part], self.masks[part] = self.compose(part)
            self.done[part] = True
        return Pixels(self.images[rows], self.masks[rows], None)

    def picked(self, places: Int64[Array, " k"]) -> "Composed":
        """Only the images at these places."""
        return Composed(partial(_composed_at, self.compose, places), len(places), self.images.shape[2:])


def _composed_at(compose: Callable[..., tuple[Array, Array]], places: Array, rows: Array) -> tuple[Array, Array]:
    return compose(places[rows])


class Stored(NamedTuple):
    """Decoded images in memory, or mapped into it from a file."""

    images: UInt8[Array, "n 3 h w"]
    masks: Bool[Array, "n h w"] | None
    boxes: list[Float32[Array, "_ 4"]] | None
    rows: Int64[Array, " k"] | None = None
    """The images in use. None: all."""

    def read(self, rows: Int64[Array, " b"]) -> Pixels:
        """The images at these places."""
        if self.rows is not None:
            rows = self.rows[rows]
        return Pixels(
            np.asarray(self.images[rows]),
            None if self.masks is None else np.asarray(self.masks[rows]),
            None if self.boxes is None else [self.boxes[i].copy() for i in rows],
        )

    def picked(self, places: Int64[Array, " k"]) -> "Stored":
        """Only the images at these places."""
        return self._replace(rows=places if self.rows is None else self.rows[places])


class Facts(NamedTuple):
    """Results of decoding other than pixels."""

    kept: list[int]
    """Places of the usable images among the rows decoded."""
    skipped: list[tuple[int, str]]
    """Place and reason of the others."""
    boxes: list[list[list[float]]] | None
    imprints: Array = np.empty(0, IMPRINT)
    """Imprints of the usable images."""


def cache_folder() -> Path:
    """The folder for derived files: $SIGHTLINE_CACHE, or ~/.cache/sightline."""
    return Path(os.environ.get("SIGHTLINE_CACHE") or Path.home() / ".cache" / "sightline")


def decode_all(source: OnTheFly, what: str, key: str | None) -> tuple[Stored | OnTheFly, Facts]:
    """Decode every row once and keep the pixels in the cache, or in memory if the cache cannot be written.

    Pixels of images larger than 256 are not kept: this only finds the images that cannot be decoded.

    Args:
        source: What to decode.
        what: Its name, for the progress bar.
        key: Anything that changes when the source does. None: nothing is written.
    """
    height, width = source.decoder.size
    small = max(height, width) <= LARGEST
    needed = len(source.rows) * height * width * (4 if source.decoder.has_masks else 3) if small else 0
    if key is not None:
        seen = (source.decoder.crop, source.decoder.interpolation)
        parts = (key, source.decoder, source.rows.tolist(), PIL.__version__)
        parts += () if seen == (None, "bilinear") else seen  # caches of older versions are kept
        folder = cache_folder() / "decoded" / hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
        try:
            if not folder.exists():
                folder.parent.mkdir(parents=True, exist_ok=True)
                with FileLock(folder.parent / "lock"):  # of several processes, one decodes
                    if not folder.exists():
                        _write(source, folder, needed, what)
            return _open(source, folder)
        except OSError as error:
            # the same text for every split, so that Python shows it once
            warnings.warn(
                f"{cache_folder()} cannot keep decoded images ({error.strerror or error}), so each run decodes them "
                "again; make room there, or set SIGHTLINE_CACHE to another folder",
                stacklevel=2,
            )
    images, masks, imprints = io.BytesIO(), io.BytesIO(), io.BytesIO()
    keep = small and needed <= MEMORY
    facts = _decode_into(images if keep else None, masks, imprints, source, what)
    facts = facts._replace(imprints=np.frombuffer(imprints.getbuffer(), IMPRINT))
    return _stored(np.frombuffer(images.getbuffer(), np.uint8), np.frombuffer(masks.getbuffer(), bool), source, facts)


def _decode_into(
    images: io.BufferedIOBase | None,
    masks: io.BufferedIOBase,
    imprints: io.BufferedIOBase,
    source: OnTheFly,
    what: str,
) -> Facts:
    facts = Facts([], [], [] if source.decoder.has_boxes else None)
    console = Console(stderr=True)
    samples = track(
        source.attempt_all(),
        f"decoding {what}",
        len(source.rows),
        console=console,
        transient=True,
        disable=not console.is_terminal or len(source.rows) < 1000,
    )
    for i, sample in enumerate(samples):
        if isinstance(sample, str):
            facts.skipped.append((i, sample))
            continue
        facts.kept.append(i)
        if sample.imprint is not None:
            imprints.write(sample.imprint.tobytes())
        if facts.boxes is not None and sample.boxes is not None:
            facts.boxes.append(sample.boxes.tolist())
        if images is not None:
            images.write(sample.image.tobytes())
            if sample.mask is not None:
                masks.write(sample.mask.tobytes())
    return facts


def _write(source: OnTheFly, folder: Path, needed: int, what: str) -> None:
    """Fill a new folder, then move it into place, so that nobody reads an incomplete one."""
    if shutil.disk_usage(folder.parent).free < needed:
        raise OSError(ENOSPC, os.strerror(ENOSPC))
    with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as temporary:
        new = Path(temporary) / "new"
        new.mkdir()
        files = [open(new / name, "wb") for name in ("images", "masks", "imprints")]
        with files[0] as images, files[1] as masks, files[2] as imprints:
            keep = max(source.decoder.size) <= LARGEST
            facts = _decode_into(images if keep else None, masks, imprints, source, what)
        (new / "facts.json").write_text(json.dumps({k: v for k, v in facts._asdict().items() if k != "imprints"}))
        new.rename(folder)


def _open(source: OnTheFly, folder: Path) -> tuple[Stored | OnTheFly, Facts]:
    imprints = _mapped(folder / "imprints", IMPRINT)
    facts = Facts(**json.loads((folder / "facts.json").read_text()), imprints=imprints)
    return _stored(_mapped(folder / "images", np.uint8), _mapped(folder / "masks", np.bool_), source, facts)


def _mapped(file: Path, dtype: Any) -> Array:
    # an empty file cannot be mapped
    return np.memmap(file, dtype, "r") if file.stat().st_size else np.empty(0, dtype)


def _stored(
    images: UInt8[Array, " _"], masks: Bool[Array, " _"], source: OnTheFly, facts: Facts
) -> tuple[Stored | OnTheFly, Facts]:
    if not len(images):
        return replace(source, rows=source.rows[facts.kept]), facts
    boxes = None if facts.boxes is None else [np.array(b, dtype=np.float32).reshape(-1, 4) for b in facts.boxes]
    size = source.decoder.size
    marked = masks.reshape(-1, *size) if source.decoder.has_masks else None
    return Stored(images.reshape(-1, 3, *size), marked, boxes), facts
