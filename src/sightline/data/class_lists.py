"""Class lists of few-shot learning: the classes to train on, to choose on and to test with, which share none."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import NamedTuple
from unicodedata import normalize

import numpy as np
from jaxtyping import Int64

from sightline.data.decoded import Reader, Record
from sightline.data.sources import Table
from sightline.data.tables import read_text
from sightline.facts import did_you_mean
from sightline.recipe import Data

_FOLDER = Path(__file__).parent / "class_lists"
CLASS_LISTS = tuple(sorted(file.stem for file in _FOLDER.glob("*.json")))
"""Names of the lists that come with the package."""
SOURCES = {
    "cifar_fs": "CIFAR-FS, few-shot: 64 + 16 + 20 classes of CIFAR-100, 32 px, 600 images each",
    "fc100": "FC100, few-shot: 60 + 20 + 20 classes of CIFAR-100 by superclass, 32 px, 600 images each",
}
"""Lists that are also names of data sets, with a line for each: their images are those of CIFAR-100."""


class ClassLists(NamedTuple):
    """Names of the classes to train on, to choose on and to test with."""

    train: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]


def read_class_lists(name: str) -> ClassLists:
    """The lists with this name, or those of a JSON file: `{"train": [names], "val": [names], "test": [names]}`.

    Raises:
        FileNotFoundError: neither a name nor a file.
        ValueError: the file holds something else, a part is empty, or a class occurs twice.

    >>> [len(names) for names in read_class_lists("cifar_fs")]
    [64, 16, 20]
    """
    file = _FOLDER / f"{name}.json" if name in CLASS_LISTS else Path(name).expanduser()
    if not file.is_file():
        hint = did_you_mean(name, CLASS_LISTS, f"names: {', '.join(CLASS_LISTS)}")
        raise FileNotFoundError(f"data.classes: no class lists and no JSON file {name!r}{hint}")
    expected = 'expected {"train": [names], "val": [names], "test": [names]}'
    try:
        parts = json.loads(read_text(file))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: {expected}, {' '.join(str(error).split())}; write it as JSON") from error
    lists: list[tuple[str, ...]] = []
    for part in ClassLists._fields:
        names = parts.get(part) if isinstance(parts, dict) else None
        if not isinstance(names, list) or not names or not all(isinstance(one, str) for one in names):
            raise ValueError(f"{file}: {expected}, got {str(names)[:60]} as {part}; list the names of its classes")
        lists.append(tuple(normalize("NFC", one) for one in names))
        if len(set(names)) < len(names):
            twice = next(one for one in names if names.count(one) > 1)
            raise ValueError(f"{file}: expected each class once, got {twice!r} twice in {part}; leave one out")
    for (one, its), (other, others) in combinations(zip(ClassLists._fields, lists, strict=True), 2):
        if shared := [name for name in its if name in others]:
            raise ValueError(
                f"{file}: expected parts that share no class, got {shared[0]!r} in {one} and {other} "
                f"({len(shared)} shared); take each out of one"
            )
    return ClassLists(*lists)


def with_lists(data: Data) -> Data:
    """The same fields, in which a source that is a named class list has become images and lists.

    >>> with_lists(Data(source="fc100")).classes
    'fc100'
    """
    return replace(data, source="cifar100", classes=data.classes or data.source) if data.source in SOURCES else data


@dataclass(frozen=True)
class _Rows:
    """A reader of some rows of another one."""

    reader: Reader
    rows: Int64[np.ndarray, " n"]

    def __call__(self, rows: Sequence[int]) -> list[Record]:
        return self.reader(self.rows[np.asarray(rows, dtype=np.int64)].tolist())


def of_classes(table: Table, names: tuple[str, ...]) -> Table:
    """Only the images of these classes, whose labels are counted in the order of the table's classes.

    Raises:
        ValueError: a class is not in the table.
    """
    theirs = [normalize("NFC", name) for name in table.classes]
    if missing := [name for name in names if name not in theirs]:
        hint = did_you_mean(missing[0], theirs, f"it has {', '.join(theirs[:5])}, ...")
        raise ValueError(f"data.classes: {len(missing)} classes are not in {table.name}, such as {missing[0]!r}{hint}")
    wanted = np.isin(theirs, names)
    places = np.append(np.where(wanted, np.cumsum(wanted) - 1, -1), -1)  # the last one is for images without a label
    labels = places[table.labels]
    rows = np.flatnonzero(labels >= 0)
    return replace(
        table,
        classes=tuple(name for name, chosen in zip(table.classes, wanted, strict=True) if chosen),
        labels=labels[rows],
        names=[table.names[row] for row in rows.tolist()],
        groups=None if table.groups is None else table.groups[rows],
        cameras=None if table.cameras is None else table.cameras[rows],
        parts=table.parts[rows],
        reader=_Rows(table.reader, rows),
        key=None if table.key is None else f"{table.key} {names}",
    )
