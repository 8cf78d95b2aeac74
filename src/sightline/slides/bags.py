"""Bags: the features of all tiles of a slide, computed once and kept as one file."""

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from sightline import runs
from sightline.data import Preprocess, normalize
from sightline.data.slides import Slide, Tiles, UnreadableSlide, open_slide, sharpness, stain, tiles_of, tissue_of
from sightline.facts import Progress, Spread, duration
from sightline.inference import allowance, copy_on_cpu, features_of, fitting_size, held_by, untouched

Array = np.ndarray
_KIND = "sightline bag 1"


class NoSlide(ValueError):
    """None of the slides can be used."""


class TileReport(NamedTuple):
    """How the tiles of a slide were read."""

    read: int
    damaged: int
    """Tiles left out, because the file is damaged there."""


@dataclass(frozen=True, kw_only=True)
class Bag:
    """The tiles of one slide as vectors."""

    name: str
    """File name of the slide."""
    features: Float[Tensor, "n c"]
    tiles: Tiles
    sharpness: Float[Array, " n"]
    """See `sightline.data.slides.sharpness`."""
    stain: Float[Array, " n"]
    """See `sightline.data.slides.stain`."""
    size: tuple[int, int]
    """Height and width of the slide, in pixels of its full resolution."""
    mpp: float
    """Micrometers per pixel of its full resolution."""
    settings: dict[str, Any]
    """What made the features: network, weights, tiles."""
    report: TileReport

    def __len__(self) -> int:
        return len(self.features)

    def save(self, file: Path) -> None:
        """Write as safetensors, in one step: there is no half of a bag.

        Raises:
            OSError: the disk is full or read-only.
        """
        arrays = {
            "corners": self.tiles.corners,
            "places": self.tiles.places,
            "tissue": self.tiles.tissue,
            "sharpness": self.sharpness,
            "stain": self.stain,
        }
        tensors = {name: torch.tensor(array) for name, array in arrays.items()}
        tensors["features"] = self.features.contiguous()
        facts = {
            "kind": _KIND,
            "name": self.name,
            "slide": {"size": self.size, "mpp": self.mpp},
            "tile": {name: getattr(self.tiles, name) for name in ("extent", "size", "mpp")},
            "settings": self.settings,
            "report": self.report._asdict(),
        }
        runs.write(file, save(tensors, {"sightline": json.dumps(facts, sort_keys=True)}))


def read_bag(file: Path) -> Bag:
    """Open a bag that `Bag.save` wrote; its features stay on the disk until they are used.

    Raises:
        OSError: no such file.
        ValueError: it is no bag.
    """
    try:
        with safe_open(file, "pt") as opened:
            facts = json.loads(opened.metadata()["sightline"])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
        if facts["kind"] != _KIND:
            raise ValueError(facts["kind"])
        arrays = {name: tensors[name].numpy() for name in ("corners", "places", "tissue")}
        return Bag(
            name=facts["name"],
            features=tensors["features"],
            tiles=Tiles(**arrays, **facts["tile"]),
            sharpness=tensors["sharpness"].numpy(),
            stain=tensors["stain"].numpy(),
            size=(int(facts["slide"]["size"][0]), int(facts["slide"]["size"][1])),
            mpp=facts["slide"]["mpp"],
            settings=facts["settings"],
            report=TileReport(**facts["report"]),
        )
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{file}: expected the features of a slide, got another file ({reason}); delete it") from error


@dataclass(frozen=True, kw_only=True)
class Grid:
    """How slides are cut into tiles; see `sightline.data.slides.tiles_of`."""

    size: int = 224
    """Side of a tile in pixels."""
    mpp: float = 0.5
    """Micrometers per pixel."""
    overlap: int = 0
    """Pixels that neighbors share."""
    least: float = 0.5
    """Share of a tile that must be tissue."""


@dataclass(frozen=True, kw_only=True)
class Written:
    """What `write_bags` did."""

    files: dict[str, Path]
    """Slide -> its bag."""
    skipped: dict[str, str] = field(default_factory=dict[str, str])
    """Slide -> why there is no bag of it."""
    reports: dict[str, TileReport] = field(default_factory=dict[str, TileReport])
    """Slide -> how its tiles were read."""
    tiles: int = 0
    """Tiles computed now."""
    seconds: dict[str, float] = field(default_factory=dict[str, float])
    """Time of now by part: finding tissue, waiting for tiles, network, writing."""

    @property
    def damaged(self) -> dict[str, int]:
        """Slide -> tiles that could not be read, where there are some."""
        return {name: report.damaged for name, report in self.reports.items() if report.damaged}

    def line(self) -> str:
        """A summary for the terminal."""
        total = sum(self.seconds.values())
        if not self.tiles:
            return f"features of {len(self.files)} slides, all from before"
        parts = ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in self.seconds.items())
        return (
            f"features of {len(self.files)} slides; {self.tiles:,} tiles in {duration(total)}, "
            f"{duration(1000 * total / self.tiles)} per 1,000 ({parts})"
        )


class TilePixels(Dataset[tuple[UInt8[Tensor, "3 size size"], float, float, bool]]):
    """The pixels of tiles, sharpness, stain, and whether they could be read; each process opens the slide itself."""

    def __init__(self, path: Path, mpp: float, tiles: Tiles) -> None:
        self._path, self._mpp, self._tiles = path, mpp, tiles
        self._slide: tuple[int, Slide] | None = None

    def __len__(self) -> int:
        return len(self._tiles)

    def __getitem__(self, index: int) -> tuple[UInt8[Tensor, "3 size size"], float, float, bool]:
        if self._slide is None or self._slide[0] != os.getpid():  # a handle does not survive a fork
            self._slide = os.getpid(), open_slide(self._path, self._mpp)
        size = self._tiles.size
        try:
            pixels = self._slide[1].region(self._tiles.box(index), (size, size))
        except UnreadableSlide:
            return torch.zeros(3, size, size, dtype=torch.uint8), 0.0, 0.0, False
        return torch.tensor(pixels).movedim(-1, 0), sharpness(pixels), stain(pixels), True

    def close(self) -> None:
        """Close the slide, if this process has opened it."""
        if self._slide is not None:
            self._slide[1].close()


def write_bags(
    slides: Sequence[Path],
    out: Path,
    model: nn.Module,
    preprocess: Preprocess,
    grid: Grid | None = None,
    *,
    mpp: float | None = None,
    made_by: Mapping[str, Any] | None = None,
    batch_size: int = 64,
    workers: int = 0,
    spread: Spread | None = None,
    progress: Progress | None = None,
) -> Written:
    """Write the features of all tiles of slides, a file OUT/SLIDE.safetensors for each.

    A slide whose file is there is not read again, so a second call continues after an interrupt or a crash. Tiles are
    read ahead by other processes while the network runs. Memory grows with a slide by its features alone: 5 kB per tile
    at a length of 1,280.

    Args:
        slides: their files.
        out: folder of the bags; made if missing.
        model: a network; the features are the input of its last linear layer. It is left unchanged.
        preprocess: its normalization; tiles are read at the grid's size, not resized again.
        grid: how slides are cut.
        mpp: micrometers per pixel of slides whose files do not tell them.
        made_by: what the features come from, such as the names of network and weights; kept in each file.
        batch_size: most tiles per forward; as many as fit into 300 MB on a CPU, and into half of a GPU's free memory.
        workers: processes that read ahead. 0: none, reading and network take turns.
        spread: makes the features of several slides elsewhere, where their files have the same paths;
            `sightline.scale.spread_by` does so by Ray.
        progress: called with (slide and the time that the other slides will take, tiles done, tiles in all).

    Raises:
        OSError: `out` cannot be written.
        NoSlide: no slide could be read.
        ValueError: two slides of one name, or a bag there was made in another way.
    """
    grid = grid or Grid()
    names = [path.name for path in slides]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"expected slides of different names, got {twice} twice; rename one")
    runs.check_writable(out)
    settings = {**asdict(grid), **(made_by or {})}
    skipped: dict[str, str] = {}
    reports: dict[str, TileReport] = {}
    seconds: dict[str, float] = dict.fromkeys(("tissue", "reading", "network", "writing"), 0.0)
    total = 0
    place = {path: out / f"{path.name}.safetensors" for path in slides}
    for path, file in place.items():
        if file.is_file():
            bag = read_bag(file)
            if bag.settings != settings:
                changed = [name for name in settings | bag.settings if settings.get(name) != bag.settings.get(name)]
                raise ValueError(
                    f"{file}: expected features with {changed[0]} {settings.get(changed[0])}, got some with "
                    f"{bag.settings.get(changed[0])}; choose another folder"
                )
            reports[path.name] = bag.report
    waiting = [path for path in slides if path.name not in reports]
    started = time.perf_counter()

    def tell(done: int, path: Path, tiles: int, of: int) -> None:
        left = (time.perf_counter() - started) / done * (len(waiting) - done) if done else None
        number = f" ({done + 1} of {len(waiting)}{'' if left is None else f', {duration(left)} left'})"
        if progress is not None:
            progress(path.name + number * (len(waiting) > 1), tiles, of)

    common = model, preprocess, grid, mpp, settings, batch_size
    if spread is None:
        coming = (
            (path, _bag(path, *common, workers, partial(tell, number, path))) for number, path in enumerate(waiting)
        )
    else:
        coming = spread(_bag_elsewhere, ((path, path) for path in waiting), copy_on_cpu(model), *common[1:])
    for number, (path, found) in enumerate(coming):
        if isinstance(found, str):
            skipped[path.name] = found
            continue
        bag, took = found
        start = time.perf_counter()
        bag.save(place[path])
        for part, time_of_it in (*took.items(), ("writing", time.perf_counter() - start)):
            seconds[part] += time_of_it
        total += len(bag)
        reports[path.name] = bag.report
        if spread is not None:
            tell(number, path, len(bag), len(bag))
    files = {path.name: file for path, file in place.items() if path.name in reports}
    reports = {name: reports[name] for name in files}
    if not files:
        reason = next(iter(skipped.values()), "no slide was given")
        raise NoSlide(f"expected at least one readable slide, got none; the first: {reason}")
    return Written(files=files, skipped=skipped, reports=reports, tiles=total, seconds=seconds)


def _bag_elsewhere(path: Path, model: nn.Module, *how: Any) -> tuple[Bag, dict[str, float]] | str:
    """`_bag` in another process, on its own device."""
    return _bag(path, model.to(runs.best_device()), *how)


def _bag(path: Path, *how: Any) -> tuple[Bag, dict[str, float]] | str:
    """The features of a slide and the seconds of each part, or why there are none."""
    try:
        return _features(path, *how)
    except (UnreadableSlide, FileNotFoundError) as error:
        return str(error)


def _features(
    path: Path,
    model: nn.Module,
    preprocess: Preprocess,
    grid: Grid,
    mpp: float | None,
    settings: dict[str, Any],
    batch_size: int,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Bag, dict[str, float]]:
    seconds: dict[str, float] = dict.fromkeys(("tissue", "reading", "network"), 0.0)
    start = time.perf_counter()
    with open_slide(path, mpp) as slide:
        try:
            mask, _ = tissue_of(slide)
            tiles = tiles_of(slide, mask, **asdict(grid))
        except ValueError as error:
            raise UnreadableSlide(str(error)) from error
        size, its_mpp = slide.size, slide.mpp
    seconds["tissue"] += time.perf_counter() - start
    if not len(tiles):
        raise UnreadableSlide(
            f"{path.name}: no tile has {grid.least:.0%} tissue or more; lower the share, or leave it out"
        )
    pixels_of = TilePixels(path, its_mpp, tiles)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    features: list[Tensor] = []
    sharp: list[Tensor] = []
    stained: list[Tensor] = []
    readable: list[Tensor] = []
    with closing(pixels_of), untouched(model) as net, torch.inference_mode():
        first = normalize(pixels_of[0][0][None].to(device), preprocess)
        held = held_by(lambda: features_of(net, first))[1]
        fitting = fitting_size(allowance(None, device), first.nbytes, batch_size, held)
        # a power of two: features, equal but for rounding, are bit-equal for about the same free memory
        loader = DataLoader(
            pixels_of,
            batch_size=2 ** (fitting.bit_length() - 1),
            num_workers=min(workers, -(-len(tiles) // fitting)),
            prefetch_factor=2 if workers else None,
        )
        start = time.perf_counter()
        for pixels, edges, dye, there in loader:
            arrived = time.perf_counter()
            seconds["reading"] += arrived - start
            features.append(features_of(net, normalize(pixels.to(device), preprocess)).float().cpu())
            sharp.append(edges)
            stained.append(dye)
            readable.append(there)
            start = time.perf_counter()
            seconds["network"] += start - arrived
            if progress is not None:
                progress(sum(map(len, features)), len(tiles))
    kept = torch.cat(readable)
    if not kept.any():
        raise UnreadableSlide(f"{path.name}: none of its {len(tiles)} tiles can be read")
    bag = Bag(
        name=path.name,
        features=torch.cat(features)[kept],
        tiles=tiles.picked(kept.numpy()),
        sharpness=torch.cat(sharp)[kept].numpy(),
        stain=torch.cat(stained)[kept].numpy(),
        size=size,
        mpp=its_mpp,
        settings=settings,
        report=TileReport(int(kept.sum()), int((~kept).sum())),
    )
    return bag, seconds
