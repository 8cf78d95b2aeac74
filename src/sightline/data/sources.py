"""Finds images and what is known of them before one is decoded: the table of a source, and that of a folder."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int64, Shaped

from sightline.data.decoded import Reader, Record
from sightline.data.images import SUFFIXES, UnreadableImage, quiet, stored_size
from sightline.data.marks import USUAL, BoxForm, Marks
from sightline.recipe import Data

Array = np.ndarray
PARTS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Table:
    """What a source tells of its images before one is decoded."""

    name: str
    classes: tuple[str, ...]
    labels: Int64[Array, " n"]
    names: list[str]
    parts: Shaped[Array, " n"]
    """train, val or test as the source has it; empty where it does not say."""
    reader: Reader
    key: str | None
    """Changes when the source does. None: nothing of it is cached."""
    size: int
    """Usual side of the images, in pixels, if nobody asks for another."""
    groups: Shaped[Array, " n"] | None = None
    group_name: str | None = None
    has_masks: bool = False
    has_boxes: bool = False
    box_form: BoxForm | None = None
    """How boxes are written, where the source tells it."""
    marks: Marks = USUAL
    flip_ok: bool = True
    skipped: tuple[tuple[str, str], ...] = ()
    """Name and reason of files that belong to no class or are not there."""
    notices: tuple[str, ...] = ()
    """What was decided about this source that its owner may want otherwise; one sentence each."""


def from_folder(data: Data, folder: Path) -> Table:
    """Class sub-folders, directly in `folder` or in its train, val and test."""
    for option in ("image", "label", "mask", "box", "group"):
        if getattr(data, option) is not None:
            raise ValueError(
                f"data.{option} names a column, but {folder} is a folder of images, which has none; "
                "list them in a metadata.csv in it"
            )
    split = [(PARTS[d.name.lower()], d) for d in _subfolders(folder) if d.name.lower() in PARTS]
    if not any(_subfolders(d) for _, d in split):
        split = []  # classes that bear such a name
    roots = split or [("", folder)]
    files: list[Path] = []
    parts: list[str] = []
    labels: list[str] = []
    skipped: list[tuple[str, str]] = []
    for part, root in roots:
        found = _subfolders(root)
        loose = sorted(f for f in root.iterdir() if _is_image(f))
        if not found:
            table = next((f"; their table is a source, too: {f}" for f in sorted(root.glob("*.csv"))), "")
            got = f"got {len(loose)} images without a class; sort them into such folders" if loose else "it is empty"
            got += table
            raise ValueError(f"expected a sub-folder of images per class in {root}, {got}")
        skipped += [(f.relative_to(folder).as_posix(), "lies in no class folder") for f in loose]
        for kind in found:
            images = image_files(kind)
            gone = [f for f in kind.rglob("*") if f.is_symlink() and not f.exists()]
            skipped += [(f.relative_to(folder).as_posix(), "a link to a file that is not there") for f in sorted(gone)]
            if not images:
                raise ValueError(f"the class folder {kind} holds no image; add some or remove the folder")
            files += images
            parts += [part] * len(images)
            labels += [kind.name] * len(images)
    classes = tuple(sorted(set(labels)))
    reader = FileReader(files)
    return Table(
        name=folder.resolve().name,
        classes=classes,
        labels=np.searchsorted(classes, labels).astype(np.int64),
        names=[f.relative_to(folder).as_posix() for f in files],
        parts=np.array(parts),
        reader=reader,
        key=fingerprint(files),
        size=usual_size(reader, len(files)),
        skipped=tuple(skipped),
    )


def _subfolders(folder: Path) -> list[Path]:
    return sorted(d for d in folder.iterdir() if d.is_dir() and not d.name.startswith((".", "__")))


def image_files(folder: Path) -> list[Path]:
    """All image files below a folder, sorted; hidden ones are left out."""
    return sorted(f for f in folder.rglob("*") if _is_image(f))


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file()


def fingerprint(files: Sequence[Path]) -> str:
    """Changes when a file is added, removed, replaced or written."""
    facts = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def usual_size(reader: Reader, n: int) -> int:
    """Longer side of a typical image in pixels, 128 at most."""
    sides: list[int] = []
    with quiet():
        for record in reader(np.unique(np.linspace(0, n - 1, min(n, 32)).astype(int)).tolist()):
            try:
                sides.append(max(stored_size(record.image)))
            except UnreadableImage:
                continue
    return min(128, int(np.median(sides))) if sides else 128


@dataclass(frozen=True)
class FileReader:
    """Records of image files."""

    files: list[Path]

    def __call__(self, rows: Sequence[int]) -> list[Record]:
        """The records of these files."""
        return [Record(self.files[i]) for i in rows]
