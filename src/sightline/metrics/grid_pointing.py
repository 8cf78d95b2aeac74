"""The grid pointing game: images of different classes in one mosaic, where the evidence of each class has its cell."""

from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from sightline.checks import check_planes, check_whole
from sightline.inference import Output, either, forward_call, wide
from sightline.metrics.agreement import check_one_target
from sightline.metrics.per_image import PerImageMean, mean_of, metric

__all__ = [
    "MOSAIC_METRICS",
    "Disconnected",
    "DisconnectedPointingGame",
    "GridPointingGame",
    "disconnected_pointing_game",
    "draw_mosaics",
    "grid_pointing_game",
    "mosaics",
]

Array = np.ndarray
Grid = tuple[int, int]
"""Rows and columns of cells."""


@metric("higher", "the share of the map in the class's own cell of a mosaic")
def grid_pointing_game(
    maps: Float[Tensor, "b 1 h w"], cells: Int[Tensor, " b"], *, grid: Grid = (2, 2)
) -> Float[Tensor, " b"]:
    """Share of the map's positive values that lies in the cell of the explained class, 0 to 1; higher is better.

    A map is that of one class of a mosaic (see `mosaics`), and `cells` tells where its image is: cells are counted from
    0, row by row. Chance, and the score of a map that is the same everywhere: 1 / number of cells. Negative values
    count as 0. Each position of a map counts as a rectangle, which may belong to several cells by its area. A map
    without a positive value or with a value that is not finite gives NaN.

    Raises:
        ValueError: shapes that do not fit (volumes too), a cell that does not exist.

    Source: Böhle et al. 2021 (2104.00032), localization metric, and its code; Rao et al. 2022 (2205.10435), GridPG.
    Differs: both enlarge a map bilinearly to the mosaic first, which spreads values at a border over both cells, and
    give a map without a positive value 0.

    >>> grid_pointing_game(torch.tensor([[[[3.0, 1.0], [0.0, -4.0]]]]), torch.tensor([0]))
    tensor([0.7500])
    """
    check_planes("grid_pointing_game", maps.shape)
    check_one_target("maps", "score", maps, maps)
    rows, columns = _checked(grid)
    if cells.shape != (len(maps),) or cells.is_floating_point():
        raise ValueError(
            f"expected the number of one cell for each of {len(maps)} maps, got {cells.dtype} of shape "
            f"{tuple(cells.shape)}; count cells from 0, row by row"
        )
    if len(cells) and not 0 <= int(cells.min()) <= int(cells.max()) < rows * columns:
        raise ValueError(
            f"expected cells in 0..{rows * columns - 1}, got {int(cells.min())}..{int(cells.max())}; pass the grid"
        )
    cells = cells.to(maps.device)
    positive = maps[:, 0].double().clamp(min=0)
    down = _overlaps(rows, maps.shape[2], maps.device)[cells // columns]
    across = _overlaps(columns, maps.shape[3], maps.device)[cells % columns]
    share = torch.einsum("bhw,bh,bw->b", positive, down, across) / positive.sum((1, 2))
    return share.where(maps.isfinite().flatten(1).all(1), torch.nan).to(wide(maps))


GridPointingGame = mean_of(grid_pointing_game, "GridPointingGame")


@metric("higher", "the share of the map in the class's own cell, where cells cannot see each other")
def disconnected_pointing_game(
    maps: Float[Tensor, "b 1 h w"], cells: Int[Tensor, " b"], *, grid: Grid = (2, 2)
) -> Float[Tensor, " b"]:
    """`grid_pointing_game` of maps of a `Disconnected` model: what lies outside the own cell is the map's own fault.

    There the class's score comes from its own cell alone, so the right answer is exactly 1. In the ordinary game the
    model itself may use the other cells.

    Raises:
        ValueError: as `grid_pointing_game`.

    Source: Rao et al. 2022 (2205.10435), DiFull.
    Differs: as `grid_pointing_game`; and all cells hold different classes, where the authors put one class into the
    first and the last cell and score these two.

    >>> disconnected_pointing_game(torch.tensor([[[[3.0, 0.0], [0.0, 0.0]]]]), torch.tensor([0]))
    tensor([1.])
    """
    return grid_pointing_game(maps, cells, grid=grid)


DisconnectedPointingGame = mean_of(disconnected_pointing_game, "DisconnectedPointingGame")

MOSAIC_METRICS: dict[str, type[PerImageMean]] = {
    "grid_pointing_game": GridPointingGame,
    "disconnected_pointing_game": DisconnectedPointingGame,
}
"""Metrics of maps of mosaics, by the names of their functions."""


def draw_mosaics(
    classes: Int[Array, " n"],
    confidence: Float[Array, " n"],
    limit: int,
    *,
    grid: Grid = (2, 2),
    least: float = 0.5,
    seed: int = 0,
) -> Int[Array, "m cells"]:
    """Choose the images of as many mosaics as possible, at most `limit`: one row of image numbers for each.

    No image is used twice and no class occurs twice in a mosaic. Only images of at least the `least` confidence are
    used, the most confident first; give NaN to leave an image out, as those that the model names wrongly. Which classes
    meet, and in which cells, is drawn by `seed`; the images of a class are dealt out in their order.

    Raises:
        ValueError: there are not enough images of different classes for a single mosaic, or `limit` is below 1.

    Source: code of Böhle et al. 2021 (2104.00032): correctly classified, the most confident first, no class twice.
    Differs: as many mosaics as the images allow; Rao et al. 2022 draw among images with a confidence of at least 0.99.

    >>> drawn = draw_mosaics(np.array([0, 1, 1, 2, 3]), np.array([0.9, 0.6, 0.8, 0.7, 0.9]), limit=9)
    >>> np.sort(drawn).tolist()
    [[0, 2, 3, 4]]
    """
    rows, columns = _checked(grid)
    check_whole(limit=limit)
    if limit < 1:
        raise ValueError(f"expected a limit of at least 1 mosaic, got {limit}; leave it out for all")
    size = rows * columns
    usable = np.flatnonzero(confidence >= least)
    usable = usable[np.argsort(-confidence[usable], kind="stable")]
    each, numbers = np.unique(classes[usable], return_inverse=True)
    counts = np.bincount(numbers, minlength=len(each))
    number = next(
        (m for m in range(min(limit, len(usable) // size), 0, -1) if np.minimum(counts, m).sum() >= size * m), 0
    )
    if not number:
        raise ValueError(
            f"expected images of at least {size} classes that the model names correctly with a probability of at least "
            f"{least}, got {len(usable)} such images of {len(each)} classes; give more images, or choose a smaller "
            "grid or a lower confidence"
        )
    before = np.zeros(len(each), dtype=int)
    chosen: list[tuple[int, int]] = []
    rng = np.random.default_rng(seed)
    place = rng.permutation(len(each))
    for image, kind in zip(usable.tolist(), numbers.tolist(), strict=True):
        if before[kind] < number and len(chosen) < size * number:
            chosen.append((int(place[kind]), image))
            before[kind] += 1
    # dealt out class by class, the images of one class, no more than mosaics, come to different mosaics
    dealt = np.array([image for _, image in sorted(chosen)]).reshape(size, number).T
    return rng.permuted(dealt, axis=1)


def mosaics(images: Shaped[Tensor, "m cells c h w"], grid: Grid = (2, 2)) -> Shaped[Tensor, "m c H W"]:
    """One image for each row of images: these side by side, row by row, on a grid of cells.

    Raises:
        ValueError: other images than the grid has cells.

    >>> mosaics(torch.tensor([1, 2, 3, 4]).reshape(1, 4, 1, 1, 1))[0, 0].tolist()
    [[1, 2], [3, 4]]
    """
    rows, columns = _checked(grid)
    if images.ndim != 5 or images.shape[1] != rows * columns:
        raise ValueError(
            f"expected images (mosaics, {rows * columns}, c, h, w) for a grid of {rows} x {columns} cells, got "
            f"{tuple(images.shape)}; pass the grid"
        )
    return _tiled(images.flatten(0, 1), grid)


class Disconnected(nn.Module):
    """A model that sees each cell of a mosaic alone: no cell can influence the score of another.

    It takes mosaics, runs the model on every cell, and returns the logits of all cells behind one another: class c of
    cell k is the output k n + c of n classes. The features of one `layer`, of shape (b, k, h, w), are put together as
    the mosaic is, and explainers read them there; a method that reads another layer does not fit.

    Raises:
        ValueError: the model has no such layer, or, when it runs, its output is not of that shape.

    Source: Rao et al. 2022 (2205.10435), DiFull.

    >>> from sightline.testing import PooledModel
    >>> model = Disconnected(PooledModel(torch.eye(2)), (1, 2), "features")
    >>> model(torch.tensor([[[[1.0, 0.0]], [[0.0, 5.0]]]])).tolist()
    [[1.0, 0.0, 0.0, 5.0]]
    """

    default_layer = "tiled"

    def __init__(self, model: nn.Module, grid: Grid = (2, 2), layer: str | None = None, output: Output = None) -> None:
        super().__init__()
        if layer is not None and layer not in dict(model.named_modules()):
            raise ValueError(
                f"expected the name of a layer of {type(model).__name__}, got {layer!r}; see named_modules()"
            )
        self.model = model
        self.grid = _checked(grid)
        self.layer = layer
        self.output = output
        self.tiled = nn.Identity()

    def forward(self, images: Float[Tensor, "m c H W"]) -> Float[Tensor, "m outputs"]:
        """Logits of all cells."""
        rows, columns = self.grid
        # rolled by nothing: the positions of the mosaic are not those of the cells, and need not be followed into them
        cells = _cut(images, self.grid).roll(0, 0)

        def together(module: nn.Module, inputs: object, features: Any) -> Tensor:
            if not isinstance(features, Tensor) or features.ndim != 4:
                got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
                raise ValueError(
                    f"expected a layer whose output (b, k, h, w) can be put together as the cells are, got {got} from "
                    f"{self.layer}; name a convolution"
                )
            return _cut(self.tiled(_tiled(features, self.grid)), self.grid)

        with ExitStack() as hooks:
            if self.layer is not None:
                hooks.enter_context(self.model.get_submodule(self.layer).register_forward_hook(together))
            logits = either(forward_call(cells, self.output)(self.model, cells).logits)
        return logits.unflatten(0, (-1, rows * columns)).flatten(1)


def _checked(grid: Grid) -> Grid:
    rows, columns = grid
    check_whole(rows=rows, columns=columns)
    if min(rows, columns) < 1 or rows * columns < 2:
        raise ValueError(f"expected a grid of at least two cells, got {rows} x {columns}; (2, 2) is usual")
    return rows, columns


def _tiled(cells: Shaped[Tensor, "b c h w"], grid: Grid) -> Shaped[Tensor, "m c H W"]:
    rows, columns = grid
    several = cells.unflatten(0, (-1, rows, columns))
    return several.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def _cut(images: Shaped[Tensor, "m c H W"], grid: Grid) -> Shaped[Tensor, "b c h w"]:
    """What `_tiled` put together."""
    rows, columns = grid
    if images.shape[2] % rows or images.shape[3] % columns:
        raise ValueError(
            f"expected mosaics of {rows} x {columns} equal cells, got {images.shape[2]} x {images.shape[3]} pixels; "
            "make them with sightline.metrics.mosaics"
        )
    several = images.unflatten(3, (columns, -1)).unflatten(2, (rows, -1))
    return several.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)


def _overlaps(cells: int, positions: int, device: torch.device) -> Float[Tensor, "cells positions"]:
    """Share of each position's length that lies in each cell, along one side; whole numbers keep it exact."""
    starts = torch.arange(positions, device=device) * cells
    borders = torch.arange(cells, device=device)[:, None] * positions
    lengths = torch.minimum(starts + cells, borders + positions) - torch.maximum(starts, borders)
    return lengths.clamp(min=0).double() / cells
