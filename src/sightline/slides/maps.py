"""Where bag classifiers look on a slide: a value per tile, controls beside it, and what the values are worth."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from sightline.checks import missing
from sightline.data.slides import Tiles, shares_of
from sightline.inference import features_of
from sightline.slides.bags import Bag
from sightline.slides.pooling import BagClassifier

Array = np.ndarray
CONTROLS = ("random tiles", "tissue share", "middle of the tissue", "stain")
_PER_TILE = 16  # pixels of an annotation's mask per side of a tile


class NoArea(ValueError):
    """A file of annotations has none that count."""


@dataclass(frozen=True, kw_only=True)
class TileValues:
    """What bag classifiers say of one slide."""

    probabilities: Float[Array, " classes"]
    """Of the slide, mean over the networks."""
    target: int
    """The class that is explained."""
    attention: Float[Array, " n"]
    """Weight of each tile for that class, mean over the networks; sums to 1."""
    evidence: Float[Array, " n"]
    """Weight x score of each tile: its exact share in how far the logit of the class lies above the mean of the others,
    mean over the networks."""

    def scored(self) -> dict[str, Float[Array, " n"]]:
        """Name -> values, as they are written into files."""
        return {"attention": self.attention, "evidence": self.evidence}


Parts = tuple[Float[Tensor, "models n classes"], Float[Tensor, "models n classes"]]
"""Weight and score of each tile, by each bag classifier."""


def parts_of(bag: Bag, models: Sequence[BagClassifier]) -> Parts:
    """The parts of a slide's logits; see `BagClassifier.parts`.

    Raises:
        ValueError: features of another network.
    """
    channels = models[0].mean.numel()
    if bag.features.shape[1] != channels:
        raise ValueError(f"expected features of length {channels}, got {bag.features.shape[1]}; use the run's network")
    with torch.inference_mode():
        parts = [model.parts(bag.features[None]) for model in models]
        weights, scores = (torch.stack([part[i][0] for part in parts]).double() for i in (0, 1))
    return weights, scores


def tile_values(
    bag: Bag, models: Sequence[BagClassifier], target: int | None = None, parts: Parts | None = None
) -> TileValues:
    """Values of the tiles of a slide for a class; None: the most probable.

    Raises:
        ValueError: features of another network, or no such class.
    """
    weights, scores = parts or parts_of(bag, models)
    probabilities = (weights * scores).sum(1).softmax(1).mean(0).numpy()
    classes = probabilities.size
    if target is not None and not 0 <= target < classes:
        raise ValueError(f"expected a class from 0 to {classes - 1}, got {target}; name one of the run")
    chosen = int(probabilities.argmax()) if target is None else target
    shares = weights * scores
    others = [i for i in range(classes) if i != chosen]
    return TileValues(
        probabilities=probabilities,
        target=chosen,
        attention=weights[..., chosen].mean(0).numpy(),
        evidence=(shares[..., chosen] - shares[..., others].mean(-1)).mean(0).numpy(),
    )


def controls(bag: Bag, seed: int = 0) -> dict[str, Float[Array, " n"]]:
    """Values that no network has made: random, tissue share, nearness to the middle of the tissue, and stain."""
    centers = bag.tiles.corners + bag.tiles.extent / 2
    away = np.linalg.norm(centers - np.average(centers, axis=0, weights=bag.tiles.tissue), axis=1)
    values = (np.random.default_rng(seed).random(len(bag)), bag.tiles.tissue, away.max() - away, bag.stain)
    return dict(zip(CONTROLS, values, strict=True))


def curve(
    bag: Bag,
    models: Sequence[BagClassifier],
    values: Float[Array, " n"],
    target: int,
    *,
    inserts: bool = False,
    steps: int = 20,
    parts: Parts | None = None,
) -> tuple[Float[Array, " steps"], Float[Array, " steps"]]:
    """Probability of a class while tiles are taken out of a slide, the highest values first; no image is run again.

    Args:
        bag: the slide.
        models: bag classifiers, whose mean probability it is.
        values: of the tiles; of equal ones the first tile comes first.
        target: the class.
        inserts: begin with the highest tile alone and add the others, in place of taking out.
        steps: bags in all.
        parts: what `parts_of` returns for this slide; several curves share it.

    Returns:
        Share of the tiles that are out (or in), and the probability.

    Raises:
        ValueError: features of another network.
    """
    weights, scores = parts or parts_of(bag, models)
    order = np.argsort(-values, kind="stable")
    kept_or_out = np.unique(np.linspace(1 if inserts else 0, len(bag) - (not inserts), min(steps, len(bag))).round())
    probabilities: list[float] = []
    for count in kept_or_out.astype(int):
        inside = torch.from_numpy(order[:count] if inserts else order[count:])
        each = [model.pooled(w[inside], s[inside]) for model, w, s in zip(models, weights, scores, strict=True)]
        probabilities.append(float(torch.stack(each).softmax(1)[:, target].mean()))
    return kept_or_out / len(bag), np.array(probabilities)


def area(shares: Float[Array, " n"], probabilities: Float[Array, " n"]) -> float:
    """Mean height of a curve: its area divided by its width.

    >>> area(np.array([0.0, 0.5, 1.0]), np.array([1.0, 0.5, 0.0]))
    0.5
    """
    return float(np.trapezoid(probabilities, shares) / (shares[-1] - shares[0])) if len(shares) > 1 else float("nan")


def annotated(file: Path, tiles: Tiles, size: tuple[int, int], names: Sequence[str] = ()) -> Float[Array, " n"]:
    """Share of each tile inside a pathologist's annotations, as QuPath exports them in GeoJSON.

    Polygons and multipolygons count, with their holes; points and lines have no area.

    Args:
        file: a feature collection, a list of features, or one feature; in pixels of the full resolution.
        tiles: the tiles.
        size: height and width of the slide.
        names: classifications that count, such as "Tumor"; empty: all.

    Raises:
        OSError: no such file.
        NoArea: it has no area of these names.
        ValueError: it is no GeoJSON.
    """
    try:
        from skimage.draw import polygon
    except ImportError as error:
        raise missing("reading annotations needs scikit-image", "slides") from error
    scale = _PER_TILE / tiles.extent
    shape = tuple(max(1, round(side * scale)) for side in size)
    down, across = shape[0] / size[0], shape[1] / size[1]
    mask = np.zeros(shape, dtype=bool)
    found = False
    for rings in _polygons(file, names):
        found = True
        drawn = [ring * (across, down) for ring in rings]  # the first is the outline, the others are holes
        left, top = np.floor(drawn[0].min(0)).clip(0).astype(int)
        right, bottom = np.ceil(drawn[0].max(0)).clip(0).astype(int)
        part = mask[top:bottom, left:right]
        one = np.zeros_like(part)
        for x, y in (ring.T for ring in drawn):
            one[polygon(y - top - 0.5, x - left - 0.5, one.shape)] ^= True
        part |= one
    if not found:
        among = f" named {' or '.join(names)}" if names else ""
        raise NoArea(f"{file}: expected annotations with an area{among}, got none; export them from QuPath")
    return shares_of(mask, tiles.corners, tiles.extent, size)


def _polygons(file: Path, names: Sequence[str]) -> Iterator[list[Float[Array, "points 2"]]]:
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8"))
        features = content.get("features", [content]) if isinstance(content, dict) else content
        for feature in features:
            kind = ((feature.get("properties") or {}).get("classification") or {}).get("name", "")
            geometry = feature["geometry"]
            if names and kind not in names:
                continue
            shapes = {"Polygon": [geometry["coordinates"]], "MultiPolygon": geometry["coordinates"]}
            for rings in shapes.get(geometry["type"], []):
                yield [np.array([point[:2] for point in ring], dtype=float).reshape(-1, 2) for ring in rings]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{file}: expected GeoJSON as QuPath exports it, got another file ({reason})") from error


def energy(values: Float[Array, " n"], shares: Float[Array, " n"]) -> float:
    """Share of the positive values that lies in an annotation, from 0 to 1; chance is the mean of the shares.

    >>> energy(np.array([3.0, 1.0, -5.0]), np.array([1.0, 0.5, 0.0]))
    0.875
    """
    positive = values.clip(min=0)
    return float((positive * shares).sum() / positive.sum()) if positive.sum() else float("nan")


def raster(
    tiles: Tiles, values: Float[Array, "n h w"], size: tuple[int, int], pixel: float
) -> Float[Array, "rows columns"]:
    """Maps of tiles put together; where tiles overlap, their mean; NaN where there is none.

    Args:
        tiles: the tiles.
        values: one map, of any size, for each; (n, 1, 1) for one value.
        size: height and width of the slide, in pixels of its full resolution.
        pixel: side of a pixel of the result, in these pixels.
    """
    height, width = (int(np.ceil(side / pixel)) for side in size)
    sums, counts = np.zeros((height, width), np.float32), np.zeros((height, width), np.uint16)
    for (left, top), value in zip(tiles.corners / pixel, values, strict=True):
        rows = slice(round(top), max(round(top + tiles.extent / pixel), round(top) + 1))
        columns = slice(round(left), max(round(left + tiles.extent / pixel), round(left) + 1))
        drawn = sums[rows, columns]
        image = Image.fromarray(value.astype(np.float32))
        sums[rows, columns] += np.asarray(image.resize(drawn.shape[::-1], Image.Resampling.BILINEAR))
        counts[rows, columns] += 1
    sums /= np.maximum(counts, 1)
    sums[counts == 0] = np.nan
    return sums


class TileClassifier(nn.Module):
    """A network and bag classifiers as one image classifier: the score of a tile on its own, for any explainer.

    Its logits are the mean over the bag classifiers of the tile's scores, without the weight of the tile in its bag.
    """

    def __init__(self, network: nn.Module, models: Sequence[BagClassifier]) -> None:
        super().__init__()
        self.network = network
        self.models = nn.ModuleList(models)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b classes"]:
        """Logits of tiles."""
        features = features_of(self.network, images)
        return torch.stack([model.parts(features[:, None])[1][:, 0] for model in self.models]).mean(0)  # pyright: ignore[reportCallIssue]


def highest(values: Float[Array, " n"], count: int) -> list[int]:
    """Places of the highest values, the highest first.

    >>> highest(np.array([0.1, 0.5, 0.3]), 2)
    [1, 2]
    """
    return np.argsort(-values, kind="stable")[:count].tolist()
