"""Maps of many images as a folder of parquet files: each is written in one step, all are read in bounded memory."""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, UInt8

from sightline import files
from sightline.data.images import UnreadableImage, open_picture, quiet
from sightline.scale.plan import SORTING, contents_of, find_entries

FORMAT = 2
ASKED = "asked.json"
SCHEMA = pa.schema(
    {
        "key": pa.string(),
        "source_index": pa.int64(),
        "label": pa.int64(),
        "split": pa.string(),
        "method": pa.string(),
        "layer": pa.string(),
        "target": pa.int64(),
        "predicted": pa.int64(),
        "probability": pa.float32(),
        "logits": pa.list_(pa.float32()),
        "map": pa.binary(),
        "height": pa.int32(),
        "width": pa.int32(),
        "dtype": pa.string(),
        "verdicts": pa.list_(pa.string()),
        "error": pa.string(),
        "digest": pa.string(),
    }
)
"""Columns of a shard: one row per image and method, or one with `error` and without a method per unreadable image.

`key` names the image, `source_index` is its place among all images. `predicted` is the most probable class, of that
`probability`. `logits` are in the first row of an image only.
`map` has `height` x `width` numbers of `dtype` (float16 or float32), little-endian, row after row.
"""
_FACTS = (
    *("format", "sightline", "network", "weights", "methods", "layer", "target", "output", "dtype", "preprocess"),
    *("max_pixels", "classes", "sources", "plan", "images", "images_per_shard", "digest"),
)
"""What `ASKED` tells."""
Row = Mapping[str, Any]
"""Values by column; those that are left out are null."""


def shard_file(folder: Path, number: int) -> Path:
    """The file of a shard.

    >>> shard_file(Path("maps"), 12).as_posix()
    'maps/shard-000012.parquet'
    """
    return folder / f"shard-{number:06d}.parquet"


def digest_of(facts: Mapping[str, Any]) -> str:
    """The sha256 of JSON facts, whatever their order.

    >>> digest_of({"a": 1, "b": [2]}) == digest_of({"b": [2], "a": 1})
    True
    """
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def packed_map(values: Float[np.ndarray, "h w"], dtype: str) -> dict[str, Any]:
    """The columns of a map.

    A map whose largest magnitude lies outside the normal range of float16, 6.1e-5 to 65,504, stays in float32, so that
    rounding changes no value by more than 1/2048 of the largest.

    >>> packed_map(np.array([[257.0, 771.0]]), "float16")["map"].hex()
    '045c0662'
    >>> packed_map(np.array([[0.0, 1e-7]]), "float16")["dtype"]
    'float32'
    """
    half, largest = np.finfo(np.float16), np.abs(values).max(where=np.isfinite(values), initial=0)
    if dtype == "float16" and largest and not half.tiny <= largest <= half.max:
        dtype = "float32"
    packed = np.ascontiguousarray(values, dtype=np.dtype(dtype).newbyteorder("<"))
    return {"map": packed.tobytes(), "height": values.shape[0], "width": values.shape[1], "dtype": dtype}


def read_map(row: Row) -> Float[np.ndarray, "h w"]:
    """The map of a row, in float32.

    >>> read_map(packed_map(np.array([[1.0, 2.0]]), "float16"))
    array([[1., 2.]], dtype=float32)
    """
    values = np.frombuffer(row["map"], np.dtype(row["dtype"]).newbyteorder("<"))
    return values.reshape(row["height"], row["width"]).astype(np.float32)


def write_shard(folder: Path, number: int, parts: Iterable[Sequence[Row]]) -> int:
    """Write a shard, the whole file or none of it; several processes may write the same one.

    Args:
        folder: that of the results.
        number: of the shard.
        parts: rows, some at a time, so that they are never all in memory.

    Returns:
        How many rows were written.

    Raises:
        OSError: the disk is full or read-only.
    """
    file, count = shard_file(folder, number), 0
    temporary = folder / f".{file.name}.{uuid.uuid4().hex}.tmp"
    try:
        with temporary.open("wb") as opened:
            with pq.ParquetWriter(opened, SCHEMA, compression="zstd") as writer:
                for rows in parts:
                    writer.write_batch(pa.RecordBatch.from_pylist([*rows], schema=SCHEMA))
                    count += len(rows)
            opened.flush()
            os.fsync(opened.fileno())
        try:
            os.replace(temporary, file)
        except FileNotFoundError:  # another process was first, and swept it away
            if not file.is_file():
                raise
    finally:
        temporary.unlink(missing_ok=True)
    _sync(folder)
    return count


def sweep(folder: Path) -> None:
    """Remove what processes that were killed had written of the plan, and of shards that are there now."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.name.startswith((".shard-", ".plan.", SORTING))]
    for name in names:
        if name.startswith(SORTING):
            shutil.rmtree(folder / name, ignore_errors=True)
        elif (folder / name[1 : name.index(".parquet") + len(".parquet")]).is_file():
            (folder / name).unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    """Make a rename survive a power failure, too."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def write_asked(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write what the results are of, with the digest of these facts.

    Raises:
        ValueError: the folder holds results of another job.
        OSError: it cannot be written.
    """
    kept = json.loads(json.dumps({"format": FORMAT, **facts}))  # as it is read again
    kept["digest"] = digest_of(kept)
    if (folder / ASKED).is_file():
        there = Results.open(folder).asked
        if there["digest"] != kept["digest"]:
            other = ", ".join(name for name in kept if name != "digest" and there.get(name) != kept[name])
            raise ValueError(f"{folder} holds results of another job ({other} differ); choose a new folder")
        return
    files.write(folder / ASKED, json.dumps(kept, indent=1, ensure_ascii=False).encode())


@dataclass(frozen=True, kw_only=True)
class Results:
    """A folder of results, finished or not."""

    folder: Path
    asked: dict[str, Any]
    """What was asked: network, digest of its weights, methods, class names, sources, number of images, and more."""

    @classmethod
    def open(cls, folder: Path | str) -> "Results":
        """The results in a folder; no shard is read yet.

        Raises:
            FileNotFoundError: there are none.
            ValueError: they are damaged or of another version.
        """
        folder = Path(folder)
        file = folder / ASKED
        if not file.is_file():
            raise FileNotFoundError(f"{folder} holds no results, there is no {ASKED}; write some: explain --engine")
        try:
            asked = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file} is damaged: {error}; choose a new folder") from error
        if not isinstance(asked, dict) or asked.get("format") != FORMAT or any(name not in asked for name in _FACTS):
            raise ValueError(f"expected format {FORMAT} of results in {file}, got another; update sightline")
        return cls(folder=folder, asked=asked)

    @property
    def shards(self) -> int:
        """How many shards the finished results have."""
        return -(-self.asked["images"] // self.asked["images_per_shard"])

    def missing(self) -> list[int]:
        """Numbers of the shards that are not there yet."""
        with os.scandir(self.folder) as entries:
            there = {entry.name for entry in entries}
        return [number for number in range(self.shards) if shard_file(self.folder, number).name not in there]

    def batches(self, columns: Sequence[str] | None = None, rows: int = 1024) -> Iterator[pa.RecordBatch]:
        """The rows of the shards that are there, in the order of the images, at most so many at a time.

        Args:
            columns: names of `SCHEMA`. None: all.
            rows: most rows of a batch.

        Raises:
            ValueError: a shard is damaged, or of another job.
        """
        absent = {*self.missing()}
        for number in range(self.shards):
            if number in absent:
                continue
            file = shard_file(self.folder, number)
            try:
                with pq.ParquetFile(file) as opened:
                    self._check(file, opened)
                    yield from opened.iter_batches(rows, columns=None if columns is None else [*columns])
            except (pa.ArrowInvalid, OSError) as error:
                raise ValueError(f"{file} is damaged: {error}; delete it and run the same command again") from error

    def images(self, keys: Sequence[str], longest: int = 448) -> dict[str, UInt8[np.ndarray, "h w 3"] | str]:
        """The images of these keys as their source has them now, or why they cannot be read.

        Each is the part that the network saw, which its map covers, in its own shape.

        Args:
            keys: as in the rows.
            longest: most pixels of a side.

        Raises:
            OSError: a source cannot be reached.
            ValueError: a key is none of these results.
        """
        found = find_entries(self.folder, keys)
        if unknown := [key for key in keys if key not in found]:
            raise ValueError(f"expected keys of images in {self.folder}, got {unknown[0]!r}")
        preprocess = self.asked["preprocess"]
        seen = {name: preprocess[name] for name in ("crop", "interpolation") if name in preprocess}
        size, max_pixels = tuple(preprocess["size"]), self.asked["max_pixels"]
        pictures: dict[str, UInt8[np.ndarray, "h w 3"] | str] = {}
        with quiet():
            for key, read in zip(keys, contents_of([found[key] for key in keys]), strict=True):
                content = read()
                try:
                    seen_part = (
                        content
                        if isinstance(content, str)
                        else open_picture(content, size, longest, max_pixels, **seen)[1]
                    )
                except UnreadableImage as error:
                    seen_part = str(error)
                pictures[key] = seen_part
        return pictures

    def _check(self, file: Path, opened: pq.ParquetFile) -> None:
        first = next(opened.iter_batches(1, columns=["digest"]), None) if opened.schema_arrow == SCHEMA else None
        if first is None or first.column(0)[0].as_py() != self.asked["digest"]:
            raise ValueError(f"{file} is part of other results; delete it and run the same command again")
