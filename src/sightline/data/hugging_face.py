"""Tables of parquet files and of sets on the Hugging Face hub."""

import glob
import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int64

from sightline.data.decoded import Record, cache_folder
from sightline.data.images import quiet
from sightline.data.sources import PARTS, Table, fingerprint, usual_size
from sightline.recipe import Data

if TYPE_CHECKING:
    import datasets

Array = np.ndarray
SHUFFLED = 10_000  # images of a stream among which the next one is drawn
HELD = 5_000  # most images of a stream that are kept for validation


@dataclass(frozen=True, kw_only=True)
class Alias:
    """A set of the papers on the Hugging Face hub, with what its schema does not tell."""

    hub: str
    line: str
    """One line for `sightline list datasets`."""
    config: str | None = None
    image: str | None = None
    label: str | None = None
    size: int | None = None
    flip_ok: bool = True


ALIASES = {
    "cifar10": Alias(hub="uoft-cs/cifar10", size=32, line="10 kinds of things, 32 px, 50,000 + 10,000"),
    "cifar100": Alias(
        hub="uoft-cs/cifar100", label="fine_label", size=32, line="100 kinds of things, 32 px, 50,000 + 10,000"
    ),
    "svhn": Alias(
        hub="ufldl-stanford/svhn",
        config="cropped_digits",
        size=32,
        flip_ok=False,
        line="house numbers, 10 digits, 32 px, 73,257 + 26,032",
    ),
    "cub200": Alias(
        hub="bentrevett/caltech-ucsd-birds-200-2011", size=224, line="200 birds with boxes, 5,994 + 5,794 photographs"
    ),
    "fgvc_aircraft": Alias(
        hub="Donghyun99/FGVC-Aircraft", size=224, line="100 aircraft variants, 3,334 + 3,333 + 3,333 photographs"
    ),
    "stanford_cars": Alias(hub="tanganke/stanford_cars", size=224, line="196 cars, 8,144 + 8,041 photographs"),
    "pcam": Alias(
        hub="1aurent/PatchCamelyon", size=96, line="lymph node tissue with or without tumour, 96 px, 327,680 tiles"
    ),
}


def parquet_files(source: str) -> list[Path]:
    """The parquet files that a path, a folder or a pattern with * names, sorted."""
    path = Path(source).expanduser()
    if path.is_dir():
        return sorted(path.rglob("*.parquet"))
    if path.suffix != ".parquet":
        return []
    return [path] if path.is_file() else sorted(Path(f) for f in glob.glob(str(path), recursive=True))


def part_of(file: Path) -> str:
    """The split that a file's name or folder tells; empty if neither does.

    >>> [part_of(Path(f)) for f in ("data/train-00000-of-00002.parquet", "valid/0000.parquet", "a.parquet")]
    ['train', 'val', '']
    """
    words = [*re.split(r"[^a-z]+", file.stem.lower()), file.parent.name.lower()]
    return next((PARTS[word] for word in words if word in PARTS), "")


def by_part(files: Sequence[Path]) -> dict[str, list[str]]:
    """Files by split; files that tell none are left out where others do."""
    found: dict[str, list[str]] = {}
    for file in files:
        found.setdefault(part_of(file), []).append(str(file))
    return {part: names for part, names in found.items() if part} or found


def import_datasets() -> ModuleType:
    """The library `datasets`.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    try:
        import datasets
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "parquet files and hub names need the library datasets; install it: pip install 'sightline[train]'"
        ) from None
    return datasets


@contextmanager
def _silent() -> Generator[None]:
    """Local files need neither the progress bars nor the warnings of `datasets`; what the user set is put back."""
    datasets = import_datasets()
    shown, level = datasets.is_progress_bar_enabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    try:
        with quiet():
            yield
    finally:
        datasets.logging.set_verbosity(level)
        if shown:
            datasets.enable_progress_bars()


@dataclass(frozen=True, kw_only=True)
class Found:
    """A set as `datasets` gives it."""

    parts: dict[str, Any]
    """Datasets, or streams, by our names of the splits."""
    alias: Alias
    files: list[Path]
    """The files that it was read from, where they are known."""


def find(data: Data) -> Found | None:
    """The parquet files, alias or hub set that `data.source` names; None if it names none of these.

    Which split a parquet file belongs to is told by its name or folder. A hub set is named `hub:OWNER/NAME` or
    `hub:OWNER/NAME:CONFIG`; splits other than train, val and test are left out.

    Raises:
        ModuleNotFoundError: `datasets` is not installed.
        FileNotFoundError: there is no such set on the hub, or no network.
        ValueError: a file is not parquet.
    """
    if data.source in ALIASES:
        return _from_hub(ALIASES[data.source], data.streaming)
    if data.source.startswith("hub:"):
        hub, _, config = data.source.removeprefix("hub:").partition(":")
        return _from_hub(Alias(hub=hub, config=config or None, line=""), data.streaming)
    files = parquet_files(data.source)
    return _from_parquet(files, data.streaming) if files else None


def _from_parquet(files: list[Path], streaming: bool) -> Found:
    datasets = import_datasets()
    where = {part or "all": names for part, names in by_part(files).items()}
    with _silent():
        try:
            if streaming:
                parts = datasets.load_dataset("parquet", data_files=where, streaming=True)
            else:
                parts = _on_disk_or_in_memory(where)
        except Exception as error:
            raise ValueError(f"cannot read {files[0]} as parquet: {_one_line(error)}") from error
    return Found(
        parts={PARTS.get(name, ""): rows for name, rows in parts.items()},
        alias=Alias(hub=str(files[0]), line=""),
        files=[Path(name) for names in where.values() for name in names],
    )


def _on_disk_or_in_memory(where: dict[str, list[str]]) -> "dict[str, datasets.Dataset]":
    datasets = import_datasets()
    try:
        return datasets.load_dataset("parquet", data_files=where, cache_dir=str(cache_folder() / "arrow"))
    # no right or no room to write the copy that is mapped into memory
    except (OSError, datasets.exceptions.DatasetGenerationError):
        streams = datasets.load_dataset("parquet", data_files=where, streaming=True)
        return {k: datasets.Dataset.from_list(list(s), features=s.features) for k, s in streams.items()}


def _from_hub(alias: Alias, streaming: bool) -> Found:
    datasets = import_datasets()
    try:
        with quiet():
            parts = datasets.load_dataset(alias.hub, alias.config, streaming=streaming)
    # what can go wrong between here and the hub has dozens of types
    except Exception as error:
        raise FileNotFoundError(
            f"cannot fetch {alias.hub} from the Hugging Face hub: {_one_line(error)}; check the name and the network"
        ) from error
    known = {PARTS[name]: rows for name, rows in parts.items() if name in PARTS}
    if not known and len(parts) == 1:
        known = {"": next(iter(parts.values()))}
    if not known:
        raise ValueError(f"expected splits named train, val or test in {alias.hub}, got {', '.join(parts)}")
    files = [] if streaming else [Path(f["filename"]) for rows in known.values() for f in rows.cache_files]
    return Found(parts=known, alias=alias, files=files)


def _one_line(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:300] or type(error).__name__


@dataclass(frozen=True, kw_only=True)
class Columns:
    """What is where in a row."""

    image: str
    label: str
    mask: str | None
    box: str | None
    group: str | None


def choose_columns(data: Data, features: Mapping[str, Any], alias: Alias) -> Columns:
    """The columns that the recipe names, or else those with the usual names and types.

    Raises:
        ValueError: a column is not there, or the choice is not clear.
    """
    for option in ("image", "label", "mask", "box", "group"):
        name = getattr(data, option)
        if name is not None and name not in features:
            near = get_close_matches(name, features, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"columns: {', '.join(features)}"
            raise ValueError(f"no column {name!r} (data.{option}) in {alias.hub}; {hint}")
    mask = data.mask or ("mask" if "mask" in features else None)
    box = data.box or ("bbox" if "bbox" in features else None)
    images = [c for c, f in features.items() if c != mask and _is_image(f)]
    usual = [c for c in images if c in ("image", "img")] or images
    image = data.image or (usual[0] if len(usual) == 1 else None)
    if image is None:
        raise ValueError(
            f"cannot tell which column of {alias.hub} holds the image; "
            f"name one by data.image: {', '.join(images or features)}"
        )
    kinds = [c for c, f in features.items() if type(f).__name__ == "ClassLabel"]
    label = data.label or alias.label or ("label" if "label" in features else kinds[0] if len(kinds) == 1 else None)
    if label is None:
        raise ValueError(
            f"cannot tell which column of {alias.hub} holds the class; "
            f"name one by data.label: {', '.join(kinds or features)}"
        )
    return Columns(image=image, label=label, mask=mask, box=box, group=data.group)


def _is_image(feature: Any) -> bool:
    return type(feature).__name__ == "Image" or (isinstance(feature, dict) and {"bytes", "path"} <= feature.keys())


@dataclass(frozen=True)
class RowReader:
    """Records of the rows of a dataset."""

    dataset: "datasets.Dataset"
    columns: Columns

    def __call__(self, rows: Sequence[int]) -> list[Record]:
        """The records of these rows."""
        found = self.dataset[list(rows)]
        nothing = [None] * len(rows)
        masks = found[self.columns.mask] if self.columns.mask else nothing
        boxes = found[self.columns.box] if self.columns.box else nothing
        return [record(*cells) for cells in zip(found[self.columns.image], masks, boxes, strict=True)]


def record(image: Any, mask: Any, boxes: Any) -> Record:
    """A record from the cells of a row."""
    return Record(_content(image) or b"", _content(mask), boxes)


def _content(cell: Any) -> Any:
    """The file or its bytes in a cell of an image column; rows of numbers stay what they are."""
    if isinstance(cell, dict):
        cell = cell["bytes"] if cell["bytes"] is not None else cell["path"]
    return Path(cell) if isinstance(cell, str) else cell


def undecoded(rows: Any, columns: Columns) -> Any:
    """A dataset or stream with our columns alone, whose images are left as files."""
    datasets = import_datasets()
    used = [c for c in (columns.image, columns.label, columns.mask, columns.box, columns.group) if c is not None]
    rows = rows.select_columns(list(dict.fromkeys(used)))
    for column in (columns.image, columns.mask):
        if column is not None and type(rows.features[column]).__name__ == "Image":
            rows = rows.cast_column(column, datasets.Image(decode=False))
    return rows


def table(data: Data, found: Found) -> Table:
    """What the columns tell of the images.

    Raises:
        ValueError: a column is missing or does not hold what it should.
    """
    datasets = import_datasets()
    parts, alias = found.parts, found.alias
    features = (parts["train"] if "train" in parts else next(iter(parts.values()))).features
    columns = choose_columns(data, features, alias)
    for part, rows in parts.items():
        for column in (columns.image, columns.label, columns.mask, columns.box, columns.group):
            if column is not None and column not in rows.features:
                raise ValueError(
                    f"the {part} images of {alias.hub} have no column {column!r}, but those for training do; add it"
                )
    with _silent():
        whole = datasets.concatenate_datasets([undecoded(rows, columns) for rows in parts.values()])
    part = np.repeat(list(parts), [len(rows) for rows in parts.values()])
    classes, labels = encode_labels(whole[columns.label][:], whole.features[columns.label], columns.label)
    groups = None
    if columns.group is not None:
        values = whole[columns.group][:]
        if None in values:
            raise ValueError(
                f"{values.count(None)} of {len(values)} images have no {columns.group!r}; every image needs its group"
            )
        groups = np.array([str(v) for v in values])
    reader = RowReader(whole, columns)
    return Table(
        name=data.source,
        classes=classes,
        labels=labels,
        names=_names(whole, columns.image, part),
        parts=part,
        reader=reader,
        key=f"{fingerprint(found.files)} {columns}" if found.files else None,
        size=alias.size or usual_size(reader, len(whole)),
        groups=groups,
        group_name=columns.group,
        has_masks=columns.mask is not None,
        has_boxes=columns.box is not None,
        flip_ok=alias.flip_ok,
    )


def encode_labels(values: Sequence[Any], feature: Any, column: str) -> tuple[tuple[str, ...], Int64[Array, " n"]]:
    """Class names and the class number of each row, -1 where there is none.

    Raises:
        ValueError: the column holds something else than classes.
    """
    if type(feature).__name__ == "ClassLabel":
        return tuple(feature.names), np.array([-1 if v is None else v for v in values], dtype=np.int64)
    known = {v for v in values if v is not None}
    if not all(isinstance(v, str | int) for v in known):
        raise ValueError(
            f"expected class names or whole numbers in column {column!r}, got {feature}; name another by data.label"
        )
    ordered = sorted(known - {-1})
    number = {v: i for i, v in enumerate(ordered)}
    return tuple(str(v) for v in ordered), np.array([number.get(v, -1) for v in values], dtype=np.int64)


def _names(whole: "datasets.Dataset", image: str, part: Any) -> list[str]:
    """File names where the rows have them, otherwise row numbers, after the split."""
    paths: list[str | None] = [None] * len(whole)
    if _is_image(whole.features[image]):
        chunks = whole.data.column(image).chunks
        paths = [path for chunk in chunks for path in chunk.field("path").to_pylist()]
    names = [path or f"{i:06d}" for i, path in enumerate(paths)]
    return [name if name.startswith(f"{p}/") else f"{p}/{name}" for p, name in zip(part, names, strict=True)]


@dataclass(frozen=True)
class StreamReader:
    """Records and labels of a stream."""

    rows: "datasets.IterableDataset"
    columns: Columns

    def __call__(self, shuffle: tuple[int, int] | None, start: int) -> Iterator[tuple[Record, int]]:
        """From a place on, in an order by (seed, epoch)."""
        rows = self.rows
        if shuffle is not None:
            rows = rows.shuffle(generator=np.random.default_rng(list(shuffle)), buffer_size=SHUFFLED)
        c = self.columns
        for row in rows.skip(start):
            if row[c.label] is None or row[c.label] < 0:
                raise ValueError(f"an image of the stream has no label in column {c.label!r}; label it or leave it out")
            yield record(row[c.image], row.get(c.mask), row.get(c.box)), row[c.label]


@dataclass(frozen=True, kw_only=True)
class Streamed:
    """A stream of training images beside held images to validate and test with."""

    reader: StreamReader
    length: int
    held: Table


def stream(data: Data, found: Found) -> Streamed:
    """Training images to read one after the other; without a split for validation the first of them serve for it.

    Raises:
        ValueError: a split is missing, or the schema does not name the classes.
    """
    datasets = import_datasets()
    if data.resplit or data.group is not None:
        raise ValueError(
            "streaming takes the splits as they are; data.resplit and data.group need data.streaming false"
        )
    missing = [part for part in ("train", "test") if part not in found.parts]
    if missing:
        raise ValueError(f"streaming needs splits named train and test, got no {missing[0]} in {found.alias.hub}")
    parts = dict(found.parts)
    columns = choose_columns(data, parts["train"].features, found.alias)
    if type(parts["train"].features[columns.label]).__name__ != "ClassLabel":
        raise ValueError(
            f"streaming needs class names in the schema (ClassLabel), got {parts['train'].features[columns.label]} "
            f"in column {columns.label!r}; set data.streaming false"
        )
    with _silent():
        train, length = undecoded(parts.pop("train"), columns), _train_length(found)
        if "val" not in parts:
            kept = min(round(data.val * length), HELD)
            parts["val"], train, length = train.take(kept), train.skip(kept), length - kept
        if data.train_size is not None:
            train, length = train.take(data.train_size), min(data.train_size, length)
        rows = {part: undecoded(found, columns) for part, found in parts.items()}
        held = {part: datasets.Dataset.from_list(list(r), features=r.features) for part, r in rows.items()}
    reader = StreamReader(train, columns)
    return Streamed(reader=reader, length=length, held=table(data, Found(parts=held, alias=found.alias, files=[])))


def _train_length(found: Found) -> int:
    """Images to train with, from the headers of the files or from what the hub says."""
    import pyarrow.parquet as pq

    files = [file for file in found.files if part_of(file) == "train"]
    if files:
        return sum(pq.ParquetFile(file).metadata.num_rows for file in files)
    splits = found.parts["train"].info.splits
    stated = splits["train"].num_examples if splits and "train" in splits else 0
    if not stated:
        raise ValueError(f"{found.alias.hub} does not say how many images it has; set data.streaming false")
    return stated
