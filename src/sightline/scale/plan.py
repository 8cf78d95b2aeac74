"""The plan of a large job: a parquet file that names every image once; each of its row groups is a shard.

It is written image by image and read shard by shard, so that ten million names are never in memory together.
"""

import hashlib
import heapq
import json
import os
import tarfile
import tempfile
import uuid
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from sightline.data.columns import record
from sightline.data.folders import PARTS, scan
from sightline.data.hugging_face import ALIASES, find, part_of
from sightline.data.images import formats
from sightline.facts import folded
from sightline.recipe import Data

PLAN = "plan.parquet"
SORTING = ".sorting-"
"""Start of the name of a folder in which many names are sorted."""
_DIGEST = b"sightline.digest"
_SCHEMA = pa.schema(
    {
        "key": pa.string(),
        "file": pa.string(),
        "offset": pa.int64(),
        "size": pa.int64(),
        "label": pa.int64(),
        "split": pa.string(),
        "reason": pa.string(),
    }
)
_SORTED_AT_ONCE = 500_000  # names
_TRIES = 3
Content = Callable[[], Path | bytes | str]
"""Gives the file or the bytes of an image, or as text the reason why there are none.

It raises OSError where a source cannot be reached: nothing is known about the image then.
"""
_ROWS = 64  # of a parquet file that are held with their images at once


class Entry(NamedTuple):
    """Where one image is."""

    key: str
    """Path relative to its source, or tar/member, or file/row; behind the source's path, where there are several."""
    file: str
    """Path or address; OWNER/NAME#SPLIT of a set on the hub."""
    offset: int | None = None
    """First byte in a tar file; row of a parquet file or a set on the hub."""
    size: int | None = None
    """Number of bytes in a tar file."""
    label: int | None = None
    """Number of its class."""
    split: str | None = None
    reason: str | None = None
    """Why it cannot be read, where that is known without opening it."""


class Plan(NamedTuple):
    """A plan that was written."""

    file: Path
    images: int
    digest: str
    """Of all names, in their order."""

    def entries(self, shard: int) -> list[Entry]:
        """The images of a shard."""
        with pq.ParquetFile(self.file) as opened:
            return [Entry(**row) for row in opened.read_row_group(shard).to_pylist()]


def is_address(source: str) -> bool:
    """Whether a source is not a path of this machine."""
    return "://" in source or _is_hub(source)


def _is_hub(source: str) -> bool:
    return source in ALIASES or source.startswith("hub:")


def plan_of(folder: Path, sources: Sequence[str], classes: Sequence[str], per_shard: int, anew: bool = False) -> Plan:
    """The plan in a folder of results; it is made if it is not there.

    Args:
        folder: of the results.
        sources: see `entries_of`.
        classes: names of the network's classes, which folders of images may have, too.
        per_shard: images of a shard.
        anew: whether it is made even if it is there.

    Raises:
        OSError: a source is missing, or the disk is full.
        ValueError: a source holds no image, or lies in another one; the plan that is there is damaged.
    """
    file = folder / PLAN
    if anew or not file.is_file():
        _check_apart(sources)
        _write(file, _all_entries(sources, classes, folder), per_shard)
    try:
        with pq.ParquetFile(file) as opened:
            return Plan(file, opened.metadata.num_rows, (opened.metadata.metadata or {})[_DIGEST].decode())
    except (pa.ArrowInvalid, KeyError) as error:
        raise ValueError(f"{file} is damaged: expected the list of images; choose a new folder") from error


def _check_apart(sources: Sequence[str]) -> None:
    """Refuse sources that would list an image twice."""
    ordered = sorted(f"{source.rstrip('/')}/" for source in sources)
    if not ordered:
        raise ValueError("expected images, got none; name a folder, parquet or .tar files")
    for outer, inner in pairwise(ordered):
        if inner.startswith(outer):
            raise ValueError(f"expected sources apart from each other, got {inner[:-1]} in {outer[:-1]}; leave it out")


def _all_entries(sources: Sequence[str], classes: Sequence[str], folder: Path) -> Iterator[Entry]:
    for source in sources:
        is_empty = True
        for entry in entries_of(source, classes, folder):
            is_empty = False
            if len(sources) > 1:
                is_file = os.path.basename(source) == entry.key
                entry = entry._replace(key=source if is_file else f"{source.rstrip('/')}/{entry.key}")
            yield entry
        if is_empty:
            raise ValueError(f"expected images in {source}, got none; name a folder, parquet or .tar files")


def _write(file: Path, entries: Iterator[Entry], per_shard: int) -> None:
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}.tmp")
    content = hashlib.sha256()
    try:
        with temporary.open("wb") as opened:
            with pq.ParquetWriter(opened, _SCHEMA, compression="zstd", write_statistics=False) as writer:
                while part := list(islice(entries, per_shard)):
                    columns = [
                        pa.array(values, field.type)
                        for values, field in zip(zip(*part, strict=True), _SCHEMA, strict=True)
                    ]
                    writer.write_table(pa.table(columns, schema=_SCHEMA), row_group_size=per_shard)
                    content.update(repr(part).encode("utf-8", "surrogateescape"))
                writer.add_key_value_metadata({_DIGEST: content.hexdigest()})
            opened.flush()
            os.fsync(opened.fileno())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def entries_of(source: str, classes: Sequence[str], spill: Path) -> Iterator[Entry]:
    """The images of a source, in an order that does not depend on the file system.

    Args:
        source: a folder of images; a file, a folder or a pattern with * of parquet files or of tar files (WebDataset);
            `hub:OWNER/NAME` or a name of `sightline list datasets` that is on the hub. Paths may be addresses that
            fsspec reads, such as s3://bucket/folder.
        classes: see `plan_of`.
        spill: where names are sorted, if they are many.

    Raises:
        OSError: there is no such source.
        ValueError: a file of it cannot be read.
    """
    if _is_hub(source):
        yield from _rows_of_hub(source)
        return
    fs, root = fsspec.url_to_fs(os.path.expanduser(source))
    root = root.rstrip("/") or "/"
    if "*" in root:
        matches = fs.glob(root, detail=True)
        if not matches or any(facts["type"] == "directory" for facts in matches.values()):
            raise FileNotFoundError(
                f"expected files named like {source}, got no file or a folder; name folders without *"
            )
        files = sorted(matches)
        root = root[: root.index("*")].rpartition("/")[0]
    elif fs.isdir(root):
        files = sorted(_files_in(fs, root))
    else:
        files, root = [root], root.rpartition("/")[0]
        if not fs.exists(files[0]):
            raise FileNotFoundError(f"no file or folder {source}")
    numbers = {folded(name): number for number, name in enumerate(classes)}
    tars = [file for file in files if file.endswith(".tar")]
    tables = [file for file in files if file.endswith(".parquet")]
    if 0 < max(len(tars), len(tables)) < len(files):
        raise ValueError(f"expected files of one kind in {source}, got .tar or .parquet and others; name *.tar, say")
    if tars:
        for file in tars:
            yield from _members(fs, file, _relative(file, root))
    elif tables:
        for file in tables:
            yield from _rows(fs, file, _relative(file, root), numbers)
    elif files:
        for file in files:
            yield _image(fs, file, _relative(file, root), None, numbers)
    else:
        yield from _images(fs, root, numbers, spill)


def _relative(file: str, root: str) -> str:
    return file[len(root) :].lstrip("/")


def _address(fs: Any, file: str) -> str:
    return file if _is_local(fs) else fs.unstrip_protocol(file)


def _is_local(fs: Any) -> bool:
    return "file" in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)


def _files_in(fs: Any, folder: str) -> list[str]:
    """The tar and parquet files directly in a folder."""
    if _is_local(fs):
        with os.scandir(folder) as entries:
            return [entry.path for entry in entries if entry.name.endswith((".tar", ".parquet"))]
    return [file for file in fs.ls(folder, detail=False) if file.endswith((".tar", ".parquet"))]


def _images(fs: Any, root: str, numbers: Mapping[str, int], spill: Path) -> Iterator[Entry]:
    """The images of a folder and its sub-folders, sorted by path."""
    if _is_local(fs):
        found = ((str(path)[len(root) :].lstrip("/"), reason) for path, reason in scan(Path(root)) if reason != "")
    else:
        found = (
            (_relative(f"{folder}/{name}", root), None)
            for folder, _, names in fs.walk(root)
            for name in names
            if os.path.splitext(name)[1].lower() in formats() and not name.startswith(".")
        )
    for key, reason in in_order(found, spill):
        yield _image(fs, f"{root}/{key}", key, reason, numbers)


def _image(fs: Any, file: str, key: str, reason: str | None, numbers: Mapping[str, int]) -> Entry:
    if (shown := _shown(key)) != key:
        return Entry(shown, "", reason="its name is not UTF-8; rename it")
    folders = file.split("/")[:-1]
    label = numbers.get(folded(folders[-1])) if folders else None
    split = next((PARTS[name.lower()] for name in key.split("/")[:-1] if name.lower() in PARTS), None)
    return Entry(key, _address(fs, file), label=label, split=split, reason=reason)


def _shown(name: str) -> str:
    """A name whose bytes may not be UTF-8, as text."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def in_order(pairs: Iterable[tuple[str, str | None]], spill: Path) -> Iterator[tuple[str, str | None]]:
    """Pairs sorted by their first, in bounded memory: many are sorted in parts, in files in the folder `spill`.

    >>> list(in_order([("b", None), ("a", "broken")], Path()))
    [('a', 'broken'), ('b', None)]
    """
    remaining = iter(pairs)
    part = sorted(islice(remaining, _SORTED_AT_ONCE))
    if len(part) < _SORTED_AT_ONCE:
        yield from part
        return
    with tempfile.TemporaryDirectory(dir=spill, prefix=SORTING) as folder:
        runs: list[Path] = []
        while part:
            runs.append(Path(folder, str(len(runs))))
            runs[-1].write_text("".join(f"{json.dumps(pair)}\n" for pair in part), encoding="ascii")
            part = sorted(islice(remaining, _SORTED_AT_ONCE))
        opened = [run.open(encoding="ascii") for run in runs]
        try:
            yield from heapq.merge(*(map(tuple, map(json.loads, lines)) for lines in opened))
        finally:
            for lines in opened:
                lines.close()


def _members(fs: Any, file: str, name: str) -> Iterator[Entry]:
    """The images in a tar file, each with the class in the member of the same name that ends in .cls."""
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    try:
        with fs.open(file, "rb") as opened, tarfile.open(fileobj=opened, mode="r:") as tar:
            for member in tar:
                base, suffix = os.path.splitext(member.name)
                if not member.isfile():
                    continue
                if suffix.lower() in formats():
                    images[member.name] = (member.offset_data, member.size)  # a later one replaces an earlier one
                elif suffix == ".cls" and (content := tar.extractfile(member)) is not None:
                    text = content.read(32).strip()
                    if text.isdigit():
                        labels[base] = int(text)
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"expected an uncompressed tar file, got {file}: {error}; leave it out") from error
    for member, (offset, size) in images.items():
        label = labels.get(os.path.splitext(member)[0])
        yield Entry(f"{name}/{_shown(member)}", _address(fs, file), offset, size, label, part_of(Path(name)) or None)


def _rows(fs: Any, file: str, name: str, numbers: Mapping[str, int]) -> Iterator[Entry]:
    with _parquet(fs, file) as opened:
        label = _label_column(opened.schema_arrow)
        image_column(opened.schema_arrow, file)
        split, address, row = part_of(Path(name)) or None, _address(fs, file), 0
        for batch in opened.iter_batches(columns=[label] if label else [], batch_size=65536):
            labels = batch.column(0).to_pylist() if label else [None] * len(batch)
            for value in labels:
                number = numbers.get(folded(value)) if isinstance(value, str) else value
                yield Entry(f"{name}/{row}", address, row, None, number, split)
                row += 1


def _rows_of_hub(source: str) -> Iterator[Entry]:
    for part, rows in _hub(source).items():
        schema = rows.features.arrow_schema
        image_column(schema, source)
        label = _label_column(schema)
        labels = rows.data.column(label) if label and pa.types.is_integer(schema.field(label).type) else None
        for row in range(len(rows)):
            value = None if labels is None else labels[row].as_py()
            yield Entry(f"{part}/{row}" if part else str(row), f"{source}#{part}", row, None, value, part or None)


@lru_cache(maxsize=4)
def _hub(source: str) -> dict[str, Any]:
    hub_set = find(Data(source=source))
    assert hub_set is not None
    return hub_set.parts


@contextmanager
def _parquet(fs: Any, file: str) -> Generator[pq.ParquetFile]:
    with fs.open(file, "rb") as content:
        try:
            opened = pq.ParquetFile(content, pre_buffer=False)
        except pa.ArrowInvalid as error:
            raise ValueError(f"cannot read {file} as parquet: {error}; leave it out") from error
        yield opened


def image_column(schema: pa.Schema, where: str) -> str:
    """The column of the images: `image` or `img`, or the only one that may hold some.

    Raises:
        ValueError: it cannot be told.
    """
    kinds = {field.name: field.type for field in schema}
    structs = {name: {inner.name for inner in kind} for name, kind in kinds.items() if pa.types.is_struct(kind)}
    readable = [name for name in kinds if {"bytes", "path"} <= structs.get(name, {"bytes", "path"})]
    usual = [name for name in ("image", "img") if name in readable]
    able = [
        name
        for name in readable
        if name in structs or pa.types.is_binary(kinds[name]) or pa.types.is_large_binary(kinds[name])
    ]
    if not usual and len(able) != 1:
        raise ValueError(
            f"cannot tell which column of {where} holds the images: {', '.join(schema.names)}; call it image, with "
            "the files as bytes, or as structs of bytes and path"
        )
    return (usual or able)[0]


def _label_column(schema: pa.Schema) -> str | None:
    index = schema.get_field_index("label")
    if index < 0:
        return None
    kind = schema.field(index).type
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    return "label" if is_text or pa.types.is_integer(kind) else None


def contents_of(entries: Sequence[Entry]) -> Iterator[Content]:
    """For each image, in their order, what reads it."""
    place = 0
    while place < len(entries):
        entry = entries[place]
        if entry.reason is not None or entry.offset is None or entry.size is not None:
            yield partial(_content, entry)
        else:
            stop = place + 1
            while stop < len(entries) and _follows(entries[stop - 1], entries[stop]):
                stop += 1
            for cell in _cells(entry.file, entry.offset, stop - place):
                yield partial(_opened, cell)
            place = stop - 1
        place += 1


def _follows(entry: Entry, following: Entry) -> bool:
    return following.file == entry.file and following.offset == (entry.offset or 0) + 1 and following.size is None


def _opened(cell: Any) -> Path | bytes | str:
    image = record(cell, None, None).image
    return image if image else "its cell is empty"


def _content(entry: Entry) -> Path | bytes | str:
    if entry.reason is not None:
        return entry.reason
    fs, path = fsspec.url_to_fs(entry.file)
    if entry.size is None and _is_local(fs):
        return Path(path)
    ends = (
        {} if entry.size is None or entry.offset is None else {"start": entry.offset, "end": entry.offset + entry.size}
    )
    try:
        return _tried(lambda: fs.cat_file(path, **ends))
    except (FileNotFoundError, PermissionError) as error:
        if entry.size is not None:
            raise  # the tar file is a source
        return f"{type(error).__name__}: {entry.file}"


def _tried(read: Callable[[], Any]) -> Any:
    """A network fails now and then, which says nothing about an image."""
    for _ in range(_TRIES - 1):
        try:
            return read()
        except (FileNotFoundError, PermissionError):
            raise
        except OSError:
            continue
    return read()


def _cells(file: str, start: int, count: int) -> Iterator[Any]:
    """Consecutive cells of the column of images."""
    source, hash_mark, part = file.rpartition("#")
    if hash_mark and _is_hub(source):
        rows = _hub(source)[part].with_format("arrow")
        for at in range(start, start + count, _ROWS):
            table = rows[at : min(at + _ROWS, start + count)]
            yield from table.column(image_column(table.schema, source)).to_pylist()
        return
    fs, path = fsspec.url_to_fs(file)
    with _parquet(fs, path) as opened:
        column, first = image_column(opened.schema_arrow, file), 0
        for group in range(opened.num_row_groups):
            size = opened.metadata.row_group(group).num_rows
            if first + size > start and first < start + count:
                at = first
                for batch in opened.iter_batches(_ROWS, [group], columns=[column]):
                    low, high = max(start - at, 0), min(start + count - at, len(batch))
                    if low < high:
                        yield from batch.column(0).slice(low, high - low).to_pylist()
                    at += len(batch)
            first += size


def find_entries(folder: Path, keys: Iterable[str]) -> dict[str, Entry]:
    """The images of these keys in the plan of a folder of results."""
    wanted = {*keys}
    found: dict[str, Entry] = {}
    with pq.ParquetFile(folder / PLAN) as opened:
        for group in range(opened.num_row_groups):
            there = opened.read_row_group(group, columns=["key"]).column("key").to_pylist()
            if places := [place for place, key in enumerate(there) if key in wanted]:
                rows = opened.read_row_group(group).take(places).to_pylist()
                found |= {row["key"]: Entry(**row) for row in rows}
            if len(found) == len(wanted):
                break
    return found
