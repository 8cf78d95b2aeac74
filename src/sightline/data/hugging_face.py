"""Finds parquet files and sets on the Hugging Face hub, and opens them with `datasets`."""

import glob
import re
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from sightline.checks import missing
from sightline.data.decoded import cache_folder
from sightline.data.folders import PARTS, is_hidden
from sightline.data.images import quiet
from sightline.recipe import Data

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True, kw_only=True)
class Alias:
    """A data set of the papers on the Hugging Face hub, with facts that its schema lacks."""

    hub: str
    line: str
    """One line for `sightline list datasets`."""
    config: str | None = None
    label: str | None = None
    classes: tuple[str, ...] | None = None
    """Names of the classes if the schema has none."""
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
        hub="1aurent/PatchCamelyon",
        classes=("normal", "tumour"),
        size=96,
        line="lymph node tissue, tumour or not, 96 px, 327,680 tiles",
    ),
}


def parquet_files(source: str) -> list[Path]:
    """The parquet files that a path, a folder or a pattern with * names, sorted."""
    path = Path(source).expanduser()
    if path.is_dir():
        inner = path.rglob("*.parquet")
        return sorted(f for f in inner if not any(is_hidden(Path(part)) for part in f.relative_to(path).parts))
    if path.suffix != ".parquet":
        return []
    return [path] if path.is_file() else sorted(Path(f) for f in glob.glob(str(path), recursive=True))


def part_of(file: Path) -> str:
    """The split in a file's name or folder; empty if there is none.

    >>> [part_of(Path(f)) for f in ("data/train-00000-of-00002.parquet", "valid/0000.parquet", "a.parquet")]
    ['train', 'val', '']
    """
    words = [*re.split(r"[^a-z]+", file.stem.lower()), file.parent.name.lower()]
    return next((PARTS[word] for word in words if word in PARTS), "")


def by_part(files: Sequence[Path]) -> dict[str, list[str]]:
    """Files by split; files without one are left out if others have one."""
    by_split: dict[str, list[str]] = {}
    for file in files:
        by_split.setdefault(part_of(file), []).append(str(file))
    return {part: names for part, names in by_split.items() if part} or by_split


def import_datasets() -> ModuleType:
    """The library `datasets`.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    try:
        import datasets
    except ModuleNotFoundError:
        raise missing("parquet files and hub names need the library datasets", "train") from None
    return datasets


@contextmanager
def silent() -> Generator[None]:
    """Hide the progress bars, warnings and errors of `datasets`; the user's settings are restored."""
    datasets = import_datasets()
    shown, level = datasets.is_progress_bar_enabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        with quiet():
            yield
    finally:
        datasets.logging.set_verbosity(level)
        if shown:
            datasets.enable_progress_bars()


@dataclass(frozen=True, kw_only=True)
class HubSet:
    """A set as `datasets` gives it."""

    parts: dict[str, Any]
    """Datasets, or streams, by our names of the splits."""
    alias: Alias
    files: list[Path]
    """The files that it was read from, if known."""


def find(data: Data) -> HubSet | None:
    """The parquet files, alias or hub set that `data.source` names; None if it names none of these.

    The name or folder of a parquet file tells its split. A hub set is named `hub:OWNER/NAME` or
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


def _from_parquet(files: list[Path], streaming: bool) -> HubSet:
    chosen = by_part(files)
    with silent():
        try:
            parts = {part: _open_parquet(names, streaming) for part, names in chosen.items()}
        except Exception as error:
            raise ValueError(f"cannot read {files[0]} as parquet: {_one_line(error)}") from error
    used = [Path(name) for names in chosen.values() for name in names]
    return HubSet(parts=parts, alias=Alias(hub=str(files[0]), line=""), files=used)


def _open_parquet(files: list[str], streaming: bool) -> "datasets.Dataset | datasets.IterableDataset":
    datasets = import_datasets()
    opened = partial(datasets.load_dataset, "parquet", data_files=files, split="train")
    if streaming:
        return opened(streaming=True)
    try:
        return opened(cache_dir=str(cache_folder() / "arrow"))
    # no permission or space for the memory-mapped copy: keep the rows in memory
    except (OSError, datasets.exceptions.DatasetGenerationError):
        rows = opened(streaming=True)
        return datasets.Dataset.from_list(list(rows), features=rows.features)


def _from_hub(alias: Alias, streaming: bool) -> HubSet:
    datasets = import_datasets()
    try:
        with quiet():
            parts = datasets.load_dataset(alias.hub, alias.config, streaming=streaming)
    # failures between here and the hub have dozens of types
    except Exception as error:
        raise FileNotFoundError(
            f"cannot fetch {alias.hub} from the Hugging Face hub: {_one_line(error)}; check the name and the network"
        ) from error
    by_split = {PARTS[name]: rows for name, rows in parts.items() if name in PARTS}
    if not by_split and len(parts) == 1:
        by_split = {"": next(iter(parts.values()))}
    if not by_split:
        raise ValueError(f"expected splits named train, val or test in {alias.hub}, got {', '.join(parts)}")
    files = [] if streaming else [Path(f["filename"]) for rows in by_split.values() for f in rows.cache_files]
    return HubSet(parts=by_split, alias=alias, files=files)


def _one_line(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:300] or type(error).__name__
