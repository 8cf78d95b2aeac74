"""Reads the columns of a dataset: their roles, class names, and rows as undecoded records."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Int64, Shaped

from sightline.data import sources
from sightline.data.decoded import Record
from sightline.data.hugging_face import HubSet, import_datasets, silent
from sightline.recipe import Data

if TYPE_CHECKING:
    import datasets

Array = np.ndarray


class Columns(NamedTuple):
    """The columns of a row by role."""

    image: str
    label: str
    mask: str | None
    box: str | None
    group: str | None
    camera: str | None = None


def choose_columns(data: Data, source: HubSet) -> Columns:
    """The columns that the recipe names, or those with the usual names and types.

    Raises:
        ValueError: a column is missing, missing in a split, or the choice is ambiguous.
    """
    parts, alias = source.parts, source.alias
    features: dict[str, Any] = (parts["train"] if "train" in parts else next(iter(parts.values()))).features
    sources.check_columns(data, features, alias.hub)
    mask = data.mask or ("mask" if "mask" in features else None)
    box = data.box or ("bbox" if "bbox" in features else None)
    images = [c for c, f in features.items() if c != mask and _is_image(f)]
    usual = [c for c in ("image", "img") if c in features]
    image = data.image or (usual[0] if usual else images[0] if len(images) == 1 else None)
    if image is None:
        raise sources.unclear_column("image", "image", alias.hub, images or features)
    kinds = [c for c, f in features.items() if type(f).__name__ == "ClassLabel"]
    label = data.label or alias.label or ("label" if "label" in features else kinds[0] if len(kinds) == 1 else None)
    if label is None:
        raise sources.unclear_column("class", "label", alias.hub, kinds or features)
    columns = Columns(image=image, label=label, mask=mask, box=box, group=data.group, camera=data.camera)
    _check_kinds(features, columns)
    for part, rows in parts.items():
        for column in filter(None, columns):
            if column not in rows.features:
                raise ValueError(f"the {part} images of {alias.hub} have no column {column!r}, the others do; add it")
    return columns


def _check_kinds(features: Mapping[str, Any], columns: Columns) -> None:
    """Refuse a column of classes or groups that holds images or lists, and a column of images that holds numbers."""
    for option, name in columns._asdict().items():
        if name is None or option == "box":
            continue
        feature = features[name]
        kind = getattr(feature, "dtype", "") if type(feature).__name__ == "Value" else ""
        text_or_number = type(feature).__name__ == "ClassLabel" or kind
        if option in ("label", "group", "camera"):
            if not text_or_number:
                raise sources.wrong_column("text or whole numbers", option, name, _words(feature))
        elif text_or_number and not any(word in kind for word in ("string", "binary")):
            raise sources.wrong_column("images, or their paths,", option, name, _words(feature))


def _words(feature: Any) -> str:
    return "images" if _is_image(feature) else "classes" if hasattr(feature, "names") else str(feature)


def _is_image(feature: Any) -> bool:
    return type(feature).__name__ == "Image" or (isinstance(feature, dict) and {"bytes", "path"} <= feature.keys())


@dataclass(frozen=True)
class RowReader:
    """Records of the rows of a dataset."""

    dataset: "datasets.Dataset"
    columns: Columns

    def __call__(self, rows: Sequence[int]) -> list[Record]:
        """The records of these rows."""
        cells = self.dataset[list(rows)]
        nothing = [None] * len(rows)
        masks = cells[self.columns.mask] if self.columns.mask else nothing
        boxes = cells[self.columns.box] if self.columns.box else nothing
        return [record(*row) for row in zip(cells[self.columns.image], masks, boxes, strict=True)]


def record(image: Any, mask: Any, boxes: Any) -> Record:
    """A record of a row's cells."""
    return Record(_content(image) or b"", _content(mask), boxes)


def _content(cell: Any) -> Any:
    """The file or its bytes in a cell of an image column; rows of numbers are unchanged."""
    if isinstance(cell, dict):
        cell = cell["bytes"] if cell["bytes"] is not None else cell["path"]
    return Path(cell) if isinstance(cell, str) else cell


def undecoded(rows: Any, columns: Columns) -> Any:
    """A dataset or stream with only our columns and undecoded images."""
    datasets = import_datasets()
    rows = rows.select_columns(list(dict.fromkeys(filter(None, columns))))
    for column in (columns.image, columns.mask):
        if column is not None and type(rows.features[column]).__name__ == "Image":
            rows = rows.cast_column(column, datasets.Image(decode=False))
    return rows


def table(data: Data, source: HubSet) -> sources.Table:
    """The images that the columns describe.

    Raises:
        ValueError: a column is missing or does not hold what it should.
    """
    datasets = import_datasets()
    parts, alias = source.parts, source.alias
    columns = choose_columns(data, source)
    with silent():
        try:
            whole = datasets.concatenate_datasets([undecoded(rows, columns) for rows in parts.values()])
        except ValueError as error:
            raise ValueError(f"the columns of {' and '.join(parts)} in {alias.hub} differ in type: {error}") from error
    part = np.repeat(list(parts), [len(rows) for rows in parts.values()])
    classes, labels = encode_labels(whole[columns.label][:], whole.features[columns.label], columns.label)

    def texts(column: str | None, what: str) -> Shaped[Array, " n"] | None:
        if column is None:
            return None
        return sources.group_names(["" if v is None else str(v) for v in whole[column][:]], column, what)

    reader = RowReader(whole, columns)
    side = alias.size or sources.usual_side(reader, len(whole))
    return sources.Table(
        name=Path(data.source).resolve().name if source.files and Path(data.source).exists() else data.source,
        classes=alias.classes or classes,
        labels=labels,
        names=_names(parts, whole, columns.image),
        parts=part,
        reader=reader,
        key=f"{sources.fingerprint(source.files)} {columns}" if source.files else None,
        size=alias.size or min(side or sources.LARGEST_SIDE, sources.LARGEST_SIDE),
        source_side=side,
        groups=texts(columns.group, "group"),
        cameras=texts(columns.camera, "camera"),
        group_name=columns.group,
        has_masks=columns.mask is not None,
        has_boxes=columns.box is not None,
        flip_ok=alias.flip_ok,
    )


def encode_labels(values: Sequence[Any], feature: Any, column: str) -> tuple[tuple[str, ...], Int64[Array, " n"]]:
    """Class names and the class number of each row; -1: none.

    Raises:
        ValueError: the column does not hold classes.
    """
    if type(feature).__name__ == "ClassLabel":
        return tuple(feature.names), np.array([-1 if v is None else v for v in values], dtype=np.int64)
    names = {v for v in values if v is not None}
    if not all(isinstance(v, str | int) for v in names):
        raise sources.wrong_column("class names or whole numbers", "label", column, feature)
    ordered = sorted(names - {-1})
    number = {v: i for i, v in enumerate(ordered)}
    return tuple(str(v) for v in ordered), np.array([number.get(v, -1) for v in values], dtype=np.int64)


def _names(parts: "Mapping[str, datasets.Dataset]", whole: "datasets.Dataset", image: str) -> list[str]:
    """File names if the rows have them, otherwise row numbers, after the split."""
    names = [(part, f"{i:06d}") for part, rows in parts.items() for i in range(len(rows))]
    if _is_image(whole.features[image]):
        paths = [path for chunk in whole.data.column(image).chunks for path in chunk.field("path").to_pylist()]
        names = [(part, path or number) for (part, number), path in zip(names, paths, strict=True)]
    return [name if not part or name.startswith(f"{part}/") else f"{part}/{name}" for part, name in names]
