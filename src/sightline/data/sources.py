"""The table of a source: its images and their labels, before one is decoded; and the table of a folder."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from unicodedata import normalize

import numpy as np
from jaxtyping import Int64, Shaped

from sightline.data.decoded import Reader, Record
from sightline.data.folders import contents, image_files, layout, marked, of_others, subfolders
from sightline.data.images import UnreadableImage, quiet, stored_size
from sightline.data.marks import USUAL, BoxForm, Marks, evenly_spaced
from sightline.facts import did_you_mean
from sightline.recipe import Data

Array = np.ndarray


LARGEST_SIDE = 128
"""Default side of larger images, in pixels."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Listing:
    """What is known of images besides their pixels."""

    name: str
    classes: tuple[str, ...]
    labels: Int64[Array, " n"]
    """-1 where there is no label."""
    names: list[str]
    groups: Shaped[Array, " n"] | None = None
    """Patient, slide or bird of each image, as strings."""
    cameras: Shaped[Array, " n"] | None = None
    """Camera of each image, as strings. With cameras, the classes are identities: each split has its own, and those of
    `query` are looked for in `gallery`."""
    group_name: str | None = None
    skipped: tuple[tuple[str, str], ...] = ()
    """Name and reason of each image that cannot be read; they are not counted among the others."""
    notices: tuple[str, ...] = ()
    """Decisions about the source that you may want to change; one sentence each."""
    has_masks: bool = False
    has_boxes: bool = False
    flip_ok: bool = True
    """False for digits: a mirrored digit is another sign."""
    source_side: int | None = None
    """Longer side of a typical image as it is stored, in pixels. None: composed, or not looked up."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Table(Listing):
    """Images of a source before one is decoded."""

    parts: Shaped[Array, " n"]
    """train, val or test as the source has it; empty if it does not say."""
    reader: Reader
    key: str | None
    """Changes when the source does. None: nothing is cached."""
    size: int
    """Default side of the images, in pixels."""
    box_form: BoxForm | None = None
    """How boxes are written, if the source says so."""
    mask_values: tuple[int, ...] | None = None
    """Mask values that count as the object, if the source says so."""
    marks: Marks = USUAL


def from_folder(data: Data, folder: Path) -> Table:
    """Class sub-folders, directly in `folder` or in its train, val and test."""
    for option in COLUMNS:
        if getattr(data, option) is not None:
            raise ValueError(
                f"data.{option} names a column, but {folder} is a folder of images, which has none; "
                "list them in a metadata.csv in it"
            )
    roots, mask_roots, notices = layout(folder)
    place: dict[Path, tuple[str, str]] = {}  # part and class
    skipped: list[tuple[Path, str]] = []
    others = Counter[str]()
    for part, root in roots:
        kinds = subfolders(root)
        loose = contents(root, deep=False)
        if not kinds:
            n = len(loose.images)
            got = f"got {n} images without a class; sort them into such folders" if n else "it is empty"
            got += next((f"; their table is a source, too: {f}" for f in sorted(root.glob("*.csv"))), "")
            raise ValueError(f"expected a sub-folder of images per class in {root}, {got}")
        skipped += [*((f, "lies in no class folder") for f in loose.images), *loose.skipped]
        for kind in kinds:
            inner = contents(kind)
            if not inner.images:
                first = "".join(f"; its {file.name}: {reason}" for file, reason in inner.skipped[:1])
                raise ValueError(f"the class folder {kind} holds no image; add some or remove the folder{first}")
            # a file system may hand out one name in two forms of Unicode
            place |= dict.fromkeys(inner.images, (part, normalize("NFC", kind.name)))
            skipped += inner.skipped
            others += inner.others
    beside = [file for root in mask_roots for file in image_files(root)]
    files, masks, of_masks = marked([*place, *beside])
    files = [file for file in files if file in place]
    labels = [place[file][1] for file in files]
    classes = tuple(sorted(set(labels)))
    reader = Records([Record(file, masks.get(file)) for file in files])
    side = usual_side(reader, len(files))
    return Table(
        name=folder.resolve().name,
        classes=classes,
        labels=np.searchsorted(classes, labels).astype(np.int64),
        names=[f.relative_to(folder).as_posix() for f in files],
        parts=np.array([place[file][0] for file in files]),
        reader=reader,
        key=fingerprint([*files, *(mask for several in masks.values() for mask in several)]),
        size=min(side or LARGEST_SIDE, LARGEST_SIDE),
        source_side=side,
        has_masks=bool(masks),
        skipped=tuple((f.relative_to(folder).as_posix(), reason) for f, reason in skipped),
        notices=(*notices, *of_masks, *of_others(others)),
    )


COLUMNS = ("image", "label", "mask", "box", "group", "camera")
"""The fields of a recipe that name columns."""


def check_columns(data: Data, names: Iterable[str], where: object, *, same_case: bool = True) -> None:
    """Refuse a recipe that names a column which does not exist.

    Raises:
        ValueError: it does.
    """
    existing = {name if same_case else name.casefold(): name for name in names}
    for option in COLUMNS:
        name = getattr(data, option)
        if name is not None and (name if same_case else name.casefold()) not in existing:
            hint = did_you_mean(name, existing.values(), f"columns: {', '.join(existing.values())}")
            raise ValueError(f"no column {name!r} (data.{option}) in {where}{hint}")


def unclear_column(what: str, option: str, where: object, names: Iterable[str]) -> ValueError:
    """The error for a table in which no column is known to hold `what`."""
    return ValueError(
        f"cannot tell which column of {where} holds the {what}; name one by data.{option}: {', '.join(names)}"
    )


def wrong_column(expected: str, option: str, name: str, got: object) -> ValueError:
    """The refusal of a column that holds something else than expected."""
    return ValueError(f"expected {expected} in column {name!r}, got {got}; name another by data.{option}")


def group_names(values: Sequence[str], column: str, what: str = "group") -> Shaped[Array, " n"]:
    """The group, or the camera, of each image.

    Raises:
        ValueError: an image has none.
    """
    if missing := values.count(""):
        raise ValueError(f"{missing} of {len(values)} images have no {column!r}; every image needs its {what}")
    return np.array(values)


def fingerprint(files: Sequence[Path]) -> str:
    """Changes when a file is added, removed, replaced or written."""
    facts = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def usual_side(reader: Reader, n: int) -> int | None:
    """Longer side of a typical image in pixels; None if none can be read."""
    sides: list[int] = []
    with quiet():
        for record in reader(evenly_spaced(n, 32)):
            try:
                sides.append(max(stored_size(record.image)))
            except UnreadableImage:
                continue
    return int(np.median(sides)) if sides else None


@dataclass(frozen=True)
class Records:
    """A reader of records that are known already."""

    records: list[Record]

    def __call__(self, rows: Sequence[int]) -> list[Record]:
        """The records of these rows."""
        return [self.records[i] for i in rows]
