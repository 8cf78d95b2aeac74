"""Images listed in a table: labels.csv, or metadata.csv and metadata.jsonl in the folders of the images."""

import codecs
import csv
import io
import json
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from sightline.data import sources
from sightline.data.folders import PARTS, image_files
from sightline.data.images import formats
from sightline.data.marks import BoxForm, Record
from sightline.facts import did_you_mean
from sightline.recipe import Data

Array = np.ndarray
_Names = dict[str, list[str]]
TABLES = (".csv", ".tsv", ".jsonl")
_PARTS = ("train", "val", "test")
_IMAGES = "images"
_IMAGE = ("image", "file_name", "filename", "path", "file")
_USUAL = {
    "label": ("label",),
    "group": ("group",),
    "camera": (),
    "mask": ("mask", "mask_file_name"),
    "split": ("split",),
}
_BOXES: dict[tuple[str, ...], BoxForm | None] = {
    ("bbox",): None,
    ("x0", "y0", "x1", "y1"): "xyxy",
    ("x1", "y1", "x2", "y2"): "xyxy",
    ("xmin", "ymin", "xmax", "ymax"): "xyxy",
    ("x", "y", "w", "h"): "xywh",
    ("x", "y", "width", "height"): "xywh",
}
"""A column of boxes, or four columns that hold a box together, and its form."""
_WHOLE = re.compile(r"-?(0|[1-9][0-9]*)(\.0*)?")  # 001 is a name
_DECIMAL = re.compile(r"-?(0|[1-9][0-9]*|(?=\.[0-9]))(\.[0-9]*)?")


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The columns of a table, by their content."""

    image: str
    label: str | None
    group: str | None
    camera: str | None
    mask: str | None
    boxes: tuple[str, ...]
    """One column of boxes, or four that hold one box together."""
    box_form: BoxForm | None
    split: str | None


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a table: its cells by column, and its place."""

    file: Path
    number: int
    cells: dict[str, Any]

    def text(self, column: str | None) -> str:
        """Text of a cell, composed as most keyboards write it; empty for NaN and missing cells."""
        cell = None if column is None else self.cells.get(column)
        text = "" if cell is None else unicodedata.normalize("NFC", str(cell)).strip()
        return "" if text.lower() == "nan" else text


@dataclass(frozen=True, kw_only=True)
class Listed:
    """One image of a table."""

    line: Line
    image: Path
    facts: tuple[str, str, str, str, Path | None]
    """Label, group, camera, split and mask, in which all lines of one image must agree."""
    boxes: list[Any]
    """Four numbers per box, one after the other."""


def read_text(file: Path) -> str:
    """A text file in UTF-8, or in UTF-16 with a byte order mark, without that mark.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not text, or is in another encoding.
    """
    content = file.read_bytes()
    is_wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if is_wide else "utf-8").replace("\ufeff", "")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{file}: expected text in UTF-8, got other bytes in line {line}; save it as UTF-8 (Excel: CSV UTF-8)"
        ) from error
    if "\0" in text:
        raise ValueError(f"{file}: expected text in UTF-8, got zero bytes; save it as UTF-8")
    return text


def read_class_names(file: Path) -> list[str]:
    """The class names in a text file, one per line; the first line is class 0.

    Raises:
        OSError: it cannot be read.
        ValueError: it holds something else, an empty line among the names, or a name twice.
    """
    expected = "expected a text file with one class name per line"
    try:
        lines = [line.strip() for line in read_text(file).rstrip().splitlines()]
    except ValueError as error:
        raise ValueError(f"{file}: {expected}; {str(error).removeprefix(f'{file}: ')}") from error
    if not lines:
        raise ValueError(f"{file}: {expected}, it is empty")
    if lines[0].startswith(("[", "{")) or (len(lines) == 1 and re.search("[,;\t]", lines[0])):
        raise ValueError(f"{file}: {expected}, got {lines[0][:60]!r}; write one per line")
    if "" in lines:
        raise ValueError(f"{file}: {expected}, got none in line {lines.index('') + 1}; remove or fill empty lines")
    if (first := next((i for i, name in enumerate(lines) if name in lines[:i]), None)) is not None:
        name = lines[first]
        raise ValueError(f"{file}: {expected}, got {name!r} in lines {lines.index(name) + 1} and {first + 1}")
    return lines


def table_files(source: Path) -> list[Path]:
    """The table at a path, or each metadata.csv and metadata.jsonl in a folder and below it.

    A folder with a train.csv beside a folder `images` has a table for each part, as miniImageNet.
    """
    if not source.is_dir():
        return [source] if source.suffix.lower() in TABLES and source.is_file() else []
    if (source / "train.csv").is_file() and (source / _IMAGES).is_dir():
        return [file for part in _PARTS if (file := source / f"{part}.csv").is_file()]
    files: list[Path] = []
    for folder, below, names in os.walk(source):
        below[:] = sorted(name for name in below if not name.startswith((".", "__")))
        files += [Path(folder, name) for name in ("metadata.csv", "metadata.jsonl") if name in names]
    return files


def lists_images(file: Path, data: Data) -> bool:
    """Whether a table has a column of image files.

    Raises:
        ValueError: it cannot be read.
    """
    line = next(_lines(file), None)
    return line is not None and _usual(line.cells, (data.image,) if data.image else _IMAGE) is not None


def from_tables(data: Data, source: Path, files: Sequence[Path]) -> sources.Table:
    """The images that tables list, with their labels, groups, masks, boxes and splits.

    Paths are relative to the folder of their table. Without a label column, the class is the image's folder.

    Raises:
        FileNotFoundError: images or masks are missing.
        ValueError: a table cannot be read, lacks a column, or lists an image twice.
    """
    root = source if source.is_dir() else source.parent
    lines = [line for file in files for line in _lines(file)]
    if not lines:
        raise ValueError(f"expected a line for each image in {files[0]}, it is empty")
    names = dict.fromkeys(name for line in lines for name in line.cells)
    columns = _choose(data, names, files[0])
    line_images, loose = _files(lines, columns.image, "images", root)
    line_masks, loose_masks = _files(lines, columns.mask, "masks", root)
    parts_of = {file: file.stem for file in files if source.is_dir() and file.stem in _PARTS}
    listed = (_listed(*facts, columns, root, parts_of) for facts in zip(lines, line_images, line_masks, strict=True))
    images = _merged(listed, columns)
    paths = [image.image for image in images]
    labels, groups, cameras, parts, masks = zip(*(image.facts for image in images), strict=True)
    classes, numbers = _labels(labels, columns.label)
    records = [Record(image.image, mask, image.boxes) for image, mask in zip(images, masks, strict=True)]
    reader = sources.Records(records)
    used = [*paths, *(mask for mask in masks if mask is not None), *files]
    side = sources.usual_side(reader, len(images))
    return sources.Table(
        name=source.resolve().name,
        classes=classes,
        labels=numbers,
        names=[_name(path, root) for path in paths],
        parts=np.array(parts),
        reader=reader,
        key=f"{sources.fingerprint(used)} {columns}",
        size=min(side or sources.LARGEST_SIDE, sources.LARGEST_SIDE),
        source_side=side,
        groups=None if columns.group is None else sources.group_names(groups, columns.group),
        group_name=columns.group,
        cameras=None if columns.camera is None else sources.group_names(cameras, columns.camera, "camera"),
        has_masks=columns.mask is not None,
        has_boxes=bool(columns.boxes),
        box_form=columns.box_form,
        notices=(*_notices(data, names, columns), *loose, *loose_masks, *_unlisted(source, line_images, line_masks)),
    )


def _lines(file: Path) -> Iterator[Line]:
    text = read_text(file)
    if file.suffix.lower() == ".jsonl":
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                yield Line(file=file, number=number, cells=_json_cells(line, f"{file}, line {number}"))
        return
    separator = _separator(text)
    rows = csv.reader(io.StringIO(text, newline=None), delimiter=separator, strict=True)
    filled = (row for row in rows if any(cell.strip() for cell in row))
    try:
        first = next((row for row in filled if not row[0].lower().startswith("sep=")), ())
        header = [name.strip() for name in first]
        if doubled := [name for i, name in enumerate(header) if name and name in header[:i]]:
            raise ValueError(f"{file}: expected different column names, got {doubled[0]!r} twice; rename one")
        for row in filled:
            if len(row) != len(header):
                raise ValueError(
                    f"{file}, line {rows.line_num}: expected {len(header)} cells as in the header, got {len(row)}; "
                    f'put names that contain "{separator}" into quotes'
                )
            cells = {name: cell.strip() for name, cell in zip(header, row, strict=True) if name}
            yield Line(file=file, number=rows.line_num, cells=cells)
    except csv.Error as error:
        raise ValueError(f"{file}, line {rows.line_num}: not a table of comma-separated values: {error}") from error


def _json_cells(line: str, where: str) -> dict[str, Any]:
    try:
        cells = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: expected JSON, {error}") from error
    if not isinstance(cells, dict):
        raise ValueError(f'{where}: expected an object such as {{"file_name": "a.png"}}, got {line[:80]}')
    return cells


def _separator(text: str) -> str:
    """The separator of the cells: the most frequent of comma, semicolon and tab in the header.

    >>> _separator("image;label;note, if any")
    ';'
    """
    header = next((line for line in text.splitlines() if line.strip()), "")
    if match := re.fullmatch(r"sep=(.)", header.strip(), re.IGNORECASE):
        return match[1]
    return max(",;\t", key=header.count)


def _usual(names: Sequence[str] | dict[str, Any], wanted: Sequence[str]) -> str | None:
    """The first of the wanted columns that exists, in upper or lower case."""
    by_case = {name.casefold(): name for name in names}
    return next((by_case[name.casefold()] for name in wanted if name.casefold() in by_case), None)


def _choose(data: Data, names: dict[str, None], file: Path) -> Columns:
    """The columns that the recipe names, or those with the usual names."""
    sources.check_columns(data, names, file, same_case=False)
    image = _usual(names, (data.image,) if data.image else _IMAGE)
    if image is None:
        raise sources.unclear_column("image files", "image", file, names)
    chosen = {
        option: _usual(names, (wanted,) if (wanted := getattr(data, option, None)) else usual)
        for option, usual in _USUAL.items()
    }
    boxes: tuple[str, ...] = ()
    form: BoxForm | None = None
    for wanted, its_form in ({(data.box,): None} if data.box else _BOXES).items():
        found = [_usual(names, (name,)) for name in wanted]
        if None not in found:
            boxes, form = tuple(filter(None, found)), its_form
            break
    return Columns(image=image, boxes=boxes, box_form=form, **chosen)


def _files(
    lines: Sequence[Line], column: str | None, what: str, root: Path
) -> tuple[list[Path | None], tuple[str, ...]]:
    """The files that a column names, and notices about them."""
    if column is None:
        return [None] * len(lines), ()
    listed = cache(_names)
    files: list[Path | None] = []
    missing: list[Line] = []
    loose: list[str] = []
    for line in lines:
        text = "" if line.cells.get(column) is None else str(line.cells[column]).strip()
        folders = (line.file.parent, line.file.parent / _IMAGES) if text else ()
        file = next((file for folder in folders if (file := _found(folder, text, listed))), None)
        files.append(file)
        if file is None and (text or what == "images"):
            missing.append(line)
        elif file is not None and _composed(re.split(r"[/\\]", text)[-1]) != _composed(file.name):
            loose.append(f"{text!r} for {file.name!r}")
    if missing:
        first = str(missing[0].cells.get(column) or "")
        raise FileNotFoundError(
            f"{len(missing)} of {len(lines)} {what} listed in {missing[0].file.name} do not exist; the first, "
            f"{first!r} in line {missing[0].number}, was expected in {missing[0].file.parent}; "
            f"{_elsewhere(first, root)}"
        )
    if not loose:
        return files, ()
    return files, (f"{len(loose)} of the {what} listed have another case or suffix, the first: {loose[0]}",)


def _elsewhere(name: str, root: Path) -> str:
    """Advice about a file that is not where its table says."""
    last = re.split(r"[/\\]", name)[-1]
    same = [file for file in image_files(root) if last and _folded(file.name) == _folded(last)]
    if len(same) == 1:
        return f"there is {_name(same[0], root)}: write paths relative to the folder of the table"
    return "correct the names or leave out their lines"


def _found(folder: Path, text: str, listed: Callable[[Path], tuple[_Names, _Names]]) -> Path | None:
    """The file of a name that may differ in case, Unicode form or the kind of slash, or lack the suffix."""
    if os.path.isfile(here := folder / text):
        return here
    here = folder
    for part in re.split(r"[/\\]", text):
        if part in ("", ".", "..") or os.path.exists(here / part):
            here = here / (part or "/" if here is folder else part)
        else:
            names, stems = listed(here)
            same = names.get(_folded(part)) or stems.get(_folded(part), [])
            if len(same) != 1:
                return None
            here = here / same[0]
    return here if os.path.isfile(here) else None


def _names(folder: Path) -> tuple[_Names, _Names]:
    """The names in a folder, and the stems of its images, as they are compared."""
    names, stems = defaultdict[str, list[str]](list), defaultdict[str, list[str]](list)
    for name in sorted(os.listdir(folder)) if folder.is_dir() else ():
        names[_folded(name)].append(name)
        if Path(name).suffix.lower() in formats():
            stems[_folded(Path(name).stem)].append(name)
    return names, stems


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _folded(text: str) -> str:
    return _composed(text).casefold()


def _name(path: Path, root: Path) -> str:
    return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()


def _listed(
    line: Line, image: Path | None, mask: Path | None, columns: Columns, root: Path, parts_of: dict[Path, str]
) -> Listed:
    assert image is not None  # `_files` refuses lines without an image
    folders = [*image.relative_to(root).parts[:-1]] if image.is_relative_to(root) else [image.parent.name]
    has_split = bool(folders) and folders[0].lower() in PARTS and (columns.label is not None or len(folders) > 1)
    part = PARTS[folders[0].lower()] if has_split else parts_of.get(line.file, "")
    if split := line.text(columns.split):
        if split.lower() not in PARTS:
            raise ValueError(
                f"{line.file}, line {line.number}: expected train, val or test in column {columns.split!r}, got "
                f"{split!r}; correct it, or rename the column"
            )
        part = PARTS[split.lower()]
    label = line.text(columns.label)
    if columns.label is None:
        kind = folders[has_split:]
        if not kind:
            raise sources.unclear_column("class", "label", line.file, line.cells)
        label = _composed(kind[0])
    return Listed(
        line=line,
        image=image,
        facts=(label, line.text(columns.group), line.text(columns.camera), part, mask),
        boxes=_boxes(line, columns.boxes),
    )


def _boxes(line: Line, columns: tuple[str, ...]) -> list[Any]:
    if len(columns) == 1:
        return _numbers(line.cells.get(columns[0]))
    sides = [line.text(side) for side in columns]
    return [_number(side) for side in sides] if any(sides) else []


def _numbers(cell: Any) -> list[Any]:
    """The numbers of a cell with boxes: a list, objects with a list `bbox`, or text like "[1, 2, 3, 4]" or "1 2 3 4".

    >>> _numbers("[[1, 2, 3, 4], [5, 6, 7, 8]]"), _numbers("1 2 3 4.5")
    ([1, 2, 3, 4, 5, 6, 7, 8], [1.0, 2.0, 3.0, 4.5])
    """
    if isinstance(cell, str):
        try:
            cell = json.loads(cell)
        except (ValueError, RecursionError):
            cell = [_number(word) for word in re.split(r"[\s,;\[\]()]+", cell) if word]
    if isinstance(cell, dict):
        cell = cell.get("bbox")
    if not isinstance(cell, list):
        return [] if cell is None else [cell]
    return [number for item in cell for number in (_numbers(item) if isinstance(item, list) else [item])]


def _number(text: str) -> float | str:
    try:
        return float(text.replace(",", ".") or "nan")
    except ValueError:
        return text  # decoding refuses the image and shows it


def _merged(listed: Iterable[Listed], columns: Columns) -> list[Listed]:
    """One entry per image; if an image has several lines, as in tables of boxes, their boxes are combined."""
    images: dict[str, Listed] = {}
    doubled: list[tuple[Listed, Listed]] = []
    for image in listed:
        path = os.path.abspath(image.image)
        first = images.setdefault(path, image)
        if first is not image:
            if first.facts != image.facts or not columns.boxes:
                doubled.append((first, image))
            images[path] = replace(first, boxes=first.boxes + image.boxes)
    if doubled:
        first, second = doubled[0]
        one, other = first.facts[0], second.facts[0]
        labels = "" if one == other else f" as {one!r} and {other!r}"
        raise ValueError(
            f"expected one line per image, got {len(doubled)} more; "
            f"the first, {first.line.text(columns.image)!r}, is in "
            f"lines {first.line.number} and {second.line.number} of {second.line.file}{labels}; leave one line for each"
        )
    return list(images.values())


def _labels(labels: Sequence[str], column: str | None) -> tuple[tuple[str, ...], Int64[Array, " n"]]:
    """Class names, ordered by number if all are numbers, and the class of each image; -1: none.

    >>> _labels(["10", "9", "", "-1"], "label")
    (('9', '10'), array([ 1,  0, -1, -1]))
    >>> _labels(["1.0", "0.0"], "label")[0]
    ('0', '1')
    """
    names = {label for label in labels if label}
    if column is not None and all(_WHOLE.fullmatch(name) for name in names):
        labels = [label.partition(".")[0] for label in labels]
        ordered = sorted({label for label in labels if label} - {"-1"}, key=int)
    elif column is not None and all(_DECIMAL.fullmatch(name) for name in names):
        wrong = min(name for name in names if not _WHOLE.fullmatch(name))
        raise sources.wrong_column("class names or whole numbers", "label", column, wrong)
    else:
        ordered = sorted(names)
    place = {name: i for i, name in enumerate(ordered)}
    return tuple(ordered), np.array([place.get(label, -1) for label in labels], dtype=np.int64)


def _notices(data: Data, names: dict[str, None], columns: Columns) -> Iterator[str]:
    if data.group is None and columns.group is not None:
        yield f"the splits keep the groups of column {columns.group!r} together, since the table has such a column"
    used = {columns.image, columns.label, columns.group, columns.camera, columns.mask, columns.split, *columns.boxes}
    absent = [name for name in ("label", "group", "mask", "bbox", "split") if _usual(names, (name,)) is None]
    for name in names:
        if name not in used and (hint := did_you_mean(name.casefold(), absent, cutoff=0.75)):
            yield f"column {name!r} is not read{hint}"


def _unlisted(source: Path, images: Sequence[Path | None], masks: Sequence[Path | None]) -> Iterator[str]:
    if not source.is_dir():
        return
    used = {os.path.abspath(file) for file in (*images, *masks) if file is not None}
    if left := [file for file in image_files(source) if os.path.abspath(file) not in used]:
        first = _name(left[0], source)
        yield f"images of {source} that no metadata file lists are left out: {len(left)}, the first {first}"
