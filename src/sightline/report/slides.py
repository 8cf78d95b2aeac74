"""A slide as files and a page: where bag classifiers look on it, beside controls."""

import io
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor, nn

from sightline import maps, runs
from sightline.data import Preprocess, normalize
from sightline.data.slides import UnreadableSlide, open_slide, stem
from sightline.explainers import explain, find_explainer
from sightline.facts import Progress, Spread
from sightline.notebook import uri
from sightline.report.formats import template
from sightline.report.pictures import color_stops, picture
from sightline.slides import networks
from sightline.slides.bags import Bag, Grid, NoSlide, read_bag, write_bags
from sightline.slides.files import colored, write_geojson, write_ome_tiff, write_table
from sightline.slides.maps import (
    NoArea,
    TileClassifier,
    TileValues,
    annotated,
    area,
    controls,
    curve,
    energy,
    highest,
    parts_of,
    raster,
    tile_values,
)
from sightline.slides.study import SlideRun

__all__ = ["SlidePages", "explain_slide", "explain_slides"]

Array = np.ndarray
_THUMBNAIL = 1400  # pixels of its longest side on the page
_SHOWN = 10  # highest and random tiles on the page
_PER_TILE = 8  # pixels of the map of a slide per side of a tile
_INSIDE = 32  # the same where explainers look into tiles
_LONGEST = 8192  # pixels of the longest side of these maps
_AT_ONCE = 8  # tiles explained together


@dataclass(frozen=True, kw_only=True)
class SlidePages:
    """What `explain_slide` wrote, and what it found."""

    files: dict[str, Path]
    """Kind of file -> its path."""
    prediction: str
    probability: float
    is_new: bool
    """Whether the slide is not part of the run, and all networks explain it. A slide of the run is explained by those
    that have seen no slide of its patient."""
    deletion: dict[str, float]
    """Map or control -> mean probability of the class while its highest tiles are taken out; lower is better."""
    insertion: dict[str, float]
    """The same while they are added; higher is better."""
    inside: dict[str, float] = field(default_factory=dict[str, float])
    """Map or control -> share of it in the annotations."""
    chance: float = float("nan")
    """Share of the tiles in the annotations."""
    without: str = ""
    """Why annotations that were there are not used."""

    def columns(self) -> tuple[list[str], list[list[str]]]:
        """A table with a row for each map and control."""
        names = ["tiles by", "deletion", "insertion", *(["in the annotation"] if self.inside else [])]
        parts = [self.deletion, self.insertion, *([self.inside] if self.inside else [])]
        return names, [[name, *(f"{part[name]:.3f}" for part in parts)] for name in self.deletion]


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One tile on the page."""

    place: str
    """Left and top, in pixels of the full resolution."""
    attention: str
    image: str
    over: str
    """The same under the map of the explainer."""


def explain_slides(
    run: SlideRun,
    slides: Sequence[str | Path],
    out: str | Path,
    *,
    weights: str | None = None,
    target: str | None = None,
    method: str = "grad_cam",
    tiles: int = 50,
    annotations: str | Path | None = None,
    names: Sequence[str] = (),
    mpp: float | None = None,
    batch_size: int = 64,
    workers: int = 0,
    spread: Spread | None = None,
    progress: Progress | None = None,
) -> Iterator[tuple[str, SlidePages | str]]:
    """Write the maps of slides, one after the other: yields the name of each, and its pages or why there are none.

    Features that the run has are used; others are written into OUT/bags once.

    Args:
        run: trained bag classifiers.
        slides: files.
        out: folder to write to; made if missing.
        weights: file of the network's weights. None: that of the training.
        target: see `explain_slide`; so are `method`, `tiles` and `names`.
        method: explainer for the inside of tiles.
        tiles: how many.
        annotations: a file for all slides, or a folder with NAME.geojson for some.
        names: classifications of annotations that count.
        mpp: micrometers per pixel of slides whose files do not tell them.
        batch_size: tiles per forward.
        workers: processes that read ahead.
        spread: see `write_bags`.
        progress: called with (slide, tiles done, tiles in all).

    Raises:
        OSError: a file cannot be read or written.
        ValueError: two slides of one name, other weights than those of the run, no such class or explainer, or
            annotations for all slides without an area.
    """
    out, files = Path(out), [Path(slide) for slide in slides]
    stems = [stem(file.name) for file in files]
    if twice := next((name for name in stems if stems.count(name) > 1), None):
        raise ValueError(f"expected slides of different names, got {twice} twice; give another --out to one")
    runs.check_writable(out)
    name, its_weights = run.network
    network, preprocess, identity = networks.open_network(name, weights or its_weights)
    if changed := next((key for key, value in identity.items() if run.settings.get(key) != value), None):
        raise ValueError(
            f"expected the network of the run, {changed} {run.settings.get(changed)}, got {identity[changed]}; "
            "name its weights by --weights"
        )
    network = network.to(runs.best_device())
    grid = Grid(**{field: run.settings[field] for field in ("size", "mpp", "overlap", "least")})
    draw = partial(
        explain_slide, run, network=network, preprocess=preprocess, out=out, target=target, method=method, tiles=tiles,
        names=names,
    )  # fmt: skip
    bags = partial(
        write_bags, model=network, preprocess=preprocess, grid=grid, mpp=mpp, made_by=identity, batch_size=batch_size,
        workers=workers, progress=progress,
    )  # fmt: skip
    kept = run.folder / "bags"
    if spread is not None and (fresh := [file for file in files if not (kept / f"{file.name}.safetensors").is_file()]):
        with suppress(NoSlide):  # each is told below
            bags(fresh, out / "bags", spread=spread)
    for file in files:
        folder = kept if (kept / f"{file.name}.safetensors").is_file() else out / "bags"
        marked = None if annotations is None else _annotations_of(file, Path(annotations))
        try:
            if not file.is_file():
                raise UnreadableSlide(f"no file {file}")
            bag = read_bag(bags([file], folder).files[file.name])
            try:
                yield file.name, draw(file, bag, annotations=marked)
            except NoArea as error:
                if annotations is not None and not Path(annotations).is_dir():
                    raise
                yield file.name, replace(draw(file, bag), without=str(error))
        except (NoSlide, UnreadableSlide) as error:
            yield file.name, str(error)


def _annotations_of(slide: Path, given: Path) -> Path | None:
    if not given.is_dir():
        return given
    named = [given / f"{one}.geojson" for one in dict.fromkeys((stem(slide.name), slide.name.split(".")[0]))]
    return next((one for one in named if one.is_file()), None)


def explain_slide(
    run: SlideRun,
    slide: Path,
    bag: Bag,
    network: nn.Module,
    preprocess: Preprocess,
    out: Path,
    *,
    target: str | None = None,
    method: str = "grad_cam",
    tiles: int = 50,
    annotations: Path | None = None,
    names: Sequence[str] = (),
    seed: int = 0,
) -> SlidePages:
    """Write the map of a slide as NAME.geojson, NAME.csv, NAME.attention.ome.tif, NAME.METHOD.ome.tif and NAME.html.

    Args:
        run: trained bag classifiers. Those that saw slides of this patient in their training are left out.
        slide: the file.
        bag: its features, as the run's settings make them.
        network: the network of the features.
        preprocess: its normalization.
        out: folder to write to; made if missing.
        target: class to explain. None: the most probable.
        method: explainer for the inside of the tiles with the highest attention.
        tiles: how many of these.
        annotations: a pathologist's annotations as GeoJSON, to compare with.
        names: classifications of annotations that count; empty: all.
        seed: of the random tiles.

    Raises:
        OSError: a file cannot be read or written.
        UnreadableSlide: no part of the file can be read.
        ValueError: no such class or explainer, the features are those of another slide, or annotations without an area.
    """
    runs.check_writable(out)
    find_explainer(method)
    if target is not None and target not in run.classes:
        raise ValueError(f"expected a class out of {', '.join(run.classes)}; got {target!r}")
    shares = None if annotations is None else annotated(annotations, bag.tiles, bag.size, names)
    with open_slide(slide, bag.mpp) as opened:
        if opened.size != bag.size:
            raise ValueError(
                f"{slide}: expected the slide of the features, {_pixels(bag.size)}, got one of {_pixels(opened.size)}; "
                f"two slides have the name {bag.name}, rename one"
            )
    models = run.models(bag.name)
    parts = parts_of(bag, models)
    found = tile_values(bag, models, None if target is None else run.classes.index(target), parts)
    scored, others = found.scored(), controls(bag, seed)
    deletion, insertion = (
        {
            name: area(*curve(bag, models, values, found.target, inserts=inserts, parts=parts))
            for name, values in (scored | others).items()
        }
        for inserts in (False, True)
    )
    inside = {} if shares is None else {name: energy(values, shares) for name, values in (scored | others).items()}
    best = highest(found.attention, max(tiles, _SHOWN))
    random = np.random.default_rng(seed).permutation(len(bag))[:_SHOWN].tolist()
    with open_slide(slide, bag.mpp) as opened:
        sides = (bag.tiles.size, bag.tiles.size)
        pixels = {i: opened.region(bag.tiles.box(i), sides) for i in dict.fromkeys([*best, *random])}
        thumbnail = opened.overview(bag.mpp * max(1.0, max(bag.size) / _THUMBNAIL))
    inner = _inner_maps(TileClassifier(network, models), preprocess, pixels, found.target, method)
    name = stem(bag.name)
    files = {kind: out / f"{name}{ending}" for kind, ending in _ENDINGS.items()}
    files["inside"] = out / f"{name}.{method}.ome.tif"
    write_geojson(files["tiles"], bag, scored)
    write_table(files["table"], bag, scored | others | ({} if shares is None else {"annotated": shares}))
    finest = max(bag.size) / _LONGEST
    pixel = max(bag.tiles.extent / _PER_TILE, finest)
    attention = raster(bag.tiles, found.attention[:, None, None], bag.size, pixel)
    write_ome_tiff(files["attention"], colored(attention), bag.mpp * pixel)
    fine = max(bag.tiles.extent / _INSIDE, finest)
    some = bag.tiles.picked(best)
    write_ome_tiff(
        files["inside"], colored(raster(some, np.stack([inner[i] for i in best]), bag.size, fine)), bag.mpp * fine
    )
    pages = SlidePages(
        files=files,
        prediction=run.classes[int(found.probabilities.argmax())],
        probability=float(found.probabilities.max()),
        is_new=bag.name not in run.slides,
        deletion=deletion,
        insertion=insertion,
        inside=inside,
        chance=float("nan") if shares is None else float(shares.mean()),
    )
    shown = {
        title: [_tile(bag, found, i, pixels[i], inner[i]) for i in places]
        for title, places in (("highest", best[:_SHOWN]), ("random", random))
    }
    page = template("slide.html").render(
        name=bag.name,
        run=run,
        target=run.classes[found.target],
        pages=pages,
        bag=bag,
        method=method,
        controls=[*others],
        probabilities=dict(zip(run.classes, found.probabilities.tolist(), strict=True)),
        thumbnail=_jpeg(thumbnail),
        size=thumbnail.shape[:2],
        attention=_over(attention),
        evidence=_over(raster(bag.tiles, found.evidence[:, None, None], bag.size, pixel)),
        shown=shown,
        colors=(color_stops(), color_stops(signed=True)),
        facts={"slide": str(slide), "run": str(run.folder), "tiles": len(bag), **run.settings, **runs.surroundings()},
    )
    runs.write(files["page"], page.encode())
    return pages


def _pixels(size: tuple[int, int]) -> str:
    return f"{size[1]:,} x {size[0]:,} pixels"


_ENDINGS = {"page": ".html", "tiles": ".geojson", "table": ".csv", "attention": ".attention.ome.tif"}


def _inner_maps(
    model: TileClassifier, preprocess: Preprocess, pixels: dict[int, UInt8[Array, "h w 3"]], target: int, method: str
) -> dict[int, Float[Array, "map_h map_w"]]:
    """Map of each tile on its own."""
    device = next(model.network.parameters()).device
    model = model.to(device)
    tile = normalize(torch.from_numpy(next(iter(pixels.values()))).movedim(-1, 0)[None].to(device), preprocess)
    # several bag classifiers are too many layers for finding the last feature map from the logits
    layer = explain(model.network, tile, methods=["activation_map"]).layer.name
    places = [*pixels]
    found: dict[int, Float[Array, "map_h map_w"]] = {}
    for first in range(0, len(places), _AT_ONCE):
        some = places[first : first + _AT_ONCE]
        images = torch.from_numpy(np.stack([pixels[i] for i in some])).movedim(-1, 1).to(device)
        drawn = explain(model, normalize(images, preprocess), target, [method], f"network.{layer}")[method]
        found |= {i: one[0].cpu().numpy() for i, one in zip(some, drawn, strict=True)}
    return found


def _tile(
    bag: Bag, found: TileValues, place: int, pixels: UInt8[Array, "h w 3"], over: Float[Array, "map_h map_w"]
) -> Tile:
    image: Tensor = torch.from_numpy(pixels.copy()).movedim(-1, 0)[None]
    raw = torch.from_numpy(over.astype(np.float32))[None, None]
    drawn = maps.overlay(image, raw, signed=bool((raw < 0).any()))[0, 0].movedim(0, -1).numpy()
    left, top = bag.tiles.corners[place]
    times = found.attention[place] * len(bag)
    return Tile(
        place=f"{left:,.0f}, {top:,.0f}",
        attention=f"{times:.3g} times the mean",
        image=picture(pixels),
        over=picture(np.ascontiguousarray(drawn)),
    )


def _jpeg(pixels: UInt8[Array, "h w 3"]) -> str:
    return picture(pixels, max(pixels.shape[:2]))


def _over(values: Float[Array, "h w"]) -> str:
    """A raster as a picture that is transparent where there is no tile."""
    drawn = np.dstack([colored(values), np.where(np.isnan(values), 0, 255).astype(np.uint8)])
    file = io.BytesIO()
    Image.fromarray(drawn).save(file, "PNG", optimize=True)
    return uri("png", file.getvalue())
