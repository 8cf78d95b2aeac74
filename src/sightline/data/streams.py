"""Opens a set as a stream: training images are read one after the other, the others are kept in memory."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int64

from sightline.data.columns import Columns, choose_columns, record, table, undecoded
from sightline.data.decoded import Record
from sightline.data.hugging_face import HubSet, import_datasets, part_of, silent
from sightline.data.sources import Table
from sightline.recipe import Data

if TYPE_CHECKING:
    import datasets

Array = np.ndarray
SHUFFLED = 10_000  # images of a stream among which the next one is drawn
NUMBER = "number in the stream"
HELD = 5_000  # most images of a stream that are kept for validation


@dataclass(frozen=True)
class StreamReader:
    """Records and labels of a stream."""

    rows: "datasets.IterableDataset"
    columns: Columns

    def __call__(self, shuffle: tuple[int, int] | None, start: int) -> Iterator[tuple[int, Record, int]]:
        """Number, record and label of each image from a place on, in the order of (seed, epoch)."""
        rows = self.rows.map(_numbered, with_indices=True)
        if shuffle is not None:
            rows = rows.shuffle(generator=np.random.default_rng(list(shuffle)), buffer_size=SHUFFLED)
        c = self.columns
        for row in rows.skip(start):
            if row[c.label] is None or row[c.label] < 0:
                raise ValueError(f"an image of the stream has no label in column {c.label!r}; label it or leave it out")
            yield row[NUMBER], record(row[c.image], row.get(c.mask), row.get(c.box)), row[c.label]


def _numbered(row: dict[str, Any], number: int) -> dict[str, Any]:
    return {**row, NUMBER: number}


def stream(data: Data, source: HubSet) -> tuple[StreamReader, int, Table]:
    """Training images to read one after the other, their number, and the images to validate and test with.

    Without a split for validation, the first training images serve for it.

    Raises:
        ValueError: a split is missing, or the schema does not name the classes.
    """
    datasets = import_datasets()
    if data.resplit or data.group is not None or data.camera is not None:
        raise ValueError(
            "data.streaming takes the splits as they are; set it to false for data.resplit, data.group and data.camera"
        )
    missing = [part for part in ("train", "test") if part not in source.parts]
    if missing:
        raise ValueError(f"streaming needs splits named train and test, got no {missing[0]} in {source.alias.hub}")
    parts = dict(source.parts)
    columns = choose_columns(data, source)
    if type(parts["train"].features[columns.label]).__name__ != "ClassLabel":
        raise ValueError(
            f"streaming needs class names in the schema (ClassLabel), got {parts['train'].features[columns.label]} "
            f"in column {columns.label!r}; set data.streaming false"
        )
    with silent():
        train, length = undecoded(parts.pop("train"), columns), _train_length(source)
        if "val" not in parts and data.val > 0:
            kept = min(round(data.val * length), HELD)
            parts["val"], train, length = train.take(kept), train.skip(kept), length - kept
        if data.train_size is not None:
            train, length = train.take(data.train_size), min(data.train_size, length)
        streams = {part: undecoded(rows, columns) for part, rows in parts.items()}
        parts = {part: datasets.Dataset.from_list(list(s), features=s.features) for part, s in streams.items()}
    held = table(data, HubSet(parts=parts, alias=source.alias, files=[]))
    if "val" not in source.parts and data.val > 0:
        _check_mixed(held.labels[held.parts == "val"], len(held.classes))
    return StreamReader(train, columns), length, held


def _check_mixed(labels: Int64[Array, " n"], classes: int) -> None:
    kinds = len(np.unique(labels))
    if 2 * kinds < min(classes, len(labels)):
        raise ValueError(
            f"the first {len(labels)} training images hold only {kinds} of {classes} classes, so they are sorted; "
            "shuffle them, or add images for validation"
        )


def _train_length(source: HubSet) -> int:
    """Number of training images, from the headers of the files or from the hub."""
    import pyarrow.parquet as pq

    files = [file for file in source.files if part_of(file) == "train"]
    if files:
        return sum(pq.ParquetFile(file).metadata.num_rows for file in files)
    splits = source.parts["train"].info.splits
    stated = splits["train"].num_examples if splits and "train" in splits else 0
    if not stated:
        raise ValueError(f"{source.alias.hub} does not say how many images it has; set data.streaming false")
    return stated
