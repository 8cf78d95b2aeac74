"""Do two maps agree, and do images agree on which method is better?"""

from collections.abc import Mapping
from typing import Literal, TypeVar, get_args

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from sightline import maps as pixels
from sightline.facts import Interval
from sightline.inference import wide
from sightline.metrics.per_image import mean_of, metric
from sightline.metrics.uncertainty import mean_interval

Array = np.ndarray
Level = Literal["nominal", "ordinal", "interval"]
Values = TypeVar("Values", Tensor, Array)


@metric("higher", "how alike the two maps order the image")
def rank_correlation(maps: Float[Tensor, "b 1 *grid"], others: Float[Tensor, "b 1 *other_grid"]) -> Float[Tensor, " b"]:
    """Spearman's rank correlation of two maps, -1 to 1; 1: the same order of all cells. Chance: 0.

    Signs count, ties share their mean rank. The map with fewer rows or columns is resized bilinearly to the other's. A
    flat map, one of a single pixel, or a value that is not finite gives NaN.

    Raises:
        ValueError: shapes that do not fit.

    Source: Spearman 1904, The proof and measurement of association between two things.

    >>> rank_correlation(torch.tensor([[[[1.0, 2.0, 3.0]]]]), torch.tensor([[[[0.0, 9.0, 5.0]]]]))
    tensor([0.5000])
    """
    first, second = _fit(maps, others)
    defined = _varies(maps) & _varies(others.to(maps.device))
    return correlation(ranks(first.double()), ranks(second.double())).where(defined, torch.nan).to(maps.dtype)


RankCorrelation = mean_of(rank_correlation, "RankCorrelation")


@metric("higher", "how many of their highest cells the two maps share")
def top_overlap(
    maps: Float[Tensor, "b 1 *grid"], others: Float[Tensor, "b 1 *other_grid"], *, share: float = 0.1
) -> Float[Tensor, " b"]:
    """Intersection over union of the highest `share` of the cells of two maps, 0 to 1; 1: the same cells.

    Chance: share / (2 - share), also for a flat map. Cells that tie at the threshold belong to the top in equal parts,
    so that nothing depends on their order; intersection and union are then sums of minima and maxima. At least one cell
    is taken. The map with fewer rows or columns is resized bilinearly to the other's. A value that is not finite gives
    NaN.

    Raises:
        ValueError: shapes that do not fit, a share outside (0, 1].

    >>> top_overlap(torch.tensor([[[[4.0, 3.0, 2.0, 1.0]]]]), torch.tensor([[[[4.0, 1.0, 2.0, 3.0]]]]), share=0.5)
    tensor([0.3333])
    """
    if not 0 < share <= 1:
        raise ValueError(f"expected a share above 0 and at most 1, got {share}; 0.1 is the highest tenth of the cells")
    first, second = _fit(maps, others)
    a, b = _top(first, share), _top(second, share)
    overlap = torch.minimum(a, b).sum(1) / torch.maximum(a, b).sum(1)
    return overlap.where((first.isfinite() & second.isfinite()).all(1), torch.nan).to(maps.dtype)


TopOverlap = mean_of(top_overlap, "TopOverlap")


def correlation(a: Float[Tensor, "*b n"], b: Float[Tensor, "*b n"]) -> Float[Tensor, "*b"]:
    """Pearson's, over the last axis; NaN where one of them is constant."""
    a, b = (x - x.mean(-1, keepdim=True) for x in (a, b))
    length = a.norm(dim=-1) * b.norm(dim=-1)
    return ((a * b).sum(-1) / length).where(length > 0, torch.nan)


def ranks(values: Values) -> Values:
    """Ranks along the last axis, 1 for the lowest; ties share their mean rank.

    A tensor or an array. NaN ranks above all else, in no order.

    >>> ranks(np.array([2.0, 1.0, 2.0]))
    array([2.5, 1. , 2.5])
    """
    if isinstance(values, np.ndarray):
        return ranks(torch.from_numpy(values.copy())).numpy()
    ordered, order = values.sort(dim=-1)
    places = torch.arange(values.shape[-1], device=values.device).expand_as(order)
    differs = ordered[..., 1:] != ordered[..., :-1]
    starts = torch.nn.functional.pad(differs, (1, 0), value=True)
    ends = torch.nn.functional.pad(differs, (0, 1), value=True)
    first = places.where(starts, 0).cummax(-1).values
    last = places.where(ends, values.shape[-1]).flip(-1).cummin(-1).values.flip(-1)
    mean = (first + last).to(wide(values)) / 2 + 1
    return torch.empty_like(mean).scatter_(-1, order, mean)


def win_rate(
    values_a: Float[Array, " n"],
    values_b: Float[Array, " n"],
    *,
    higher_is_better: bool,
    groups: Shaped[Array, " n"] | None = None,
    seed: int = 0,
) -> Interval:
    """Share of images on which a scores better than b, a tie counting half; images with a NaN are left out.

    Chance: 0.5.

    Source: Chattopadhay et al. 2018 (1710.11063), section 4.1, "win %".

    >>> win_rate(np.array([1.0, 2.0, 3.0]), np.array([0.0, 2.0, 4.0]), higher_is_better=True).value
    0.5
    """
    lead = values_a - values_b if higher_is_better else values_b - values_a
    return mean_interval((1 + np.sign(lead)) / 2, groups, seed)


def krippendorff_alpha(ratings: Float[Array, "raters units"], level: Level = "nominal") -> float:
    """Agreement of raters, NaN where one did not rate: 1 is perfect, 0 is chance, below 0 is worse than chance.

    `level`: values are "nominal" (equal or not), "ordinal" (only their order counts), or "interval" (differences
    count). Units with fewer than two ratings are left out. NaN if no unit is left or all ratings are equal.

    Raises:
        ValueError: an unknown level.

    Source: Krippendorff 2011, Computing Krippendorff's alpha-reliability. Its sums of squared differences over pairs of
    ratings are written as variances here: alpha = 1 - mean variance within units / variance of all ratings. Ordinal
    differences are those of the ratings' mean ranks, nominal ones those of indicator variables.

    >>> krippendorff_alpha(np.array([[1.0, 2.0, 3.0], [1.0, 2.0, np.nan]]))
    1.0
    """
    if level not in get_args(Level):
        raise ValueError(f"expected level to be one of {', '.join(get_args(Level))}; got {level!r}")
    ratings = ratings[:, (~np.isnan(ratings)).sum(0) > 1]
    rated = ~np.isnan(ratings)
    counts, total = rated.sum(0), int(rated.sum())
    values = ratings[rated]
    if len(np.unique(values)) < 2:
        return float("nan")
    if level == "ordinal":
        values = ranks(values)
    coordinates = values[:, None] if level != "nominal" else (values[:, None] == np.unique(values)).astype(float)
    spread = ((coordinates - coordinates.mean(0)) ** 2).sum()
    unit = np.nonzero(rated)[1]
    means = np.zeros((len(counts), coordinates.shape[1]))
    np.add.at(means, unit, coordinates)
    within = ((coordinates - (means / counts[:, None])[unit]) ** 2).sum(1)
    weights = counts / (counts - 1)
    return float(1 - (within * weights[unit]).sum() / total / (spread / (total - 1)))


def reliability(values: Mapping[str, Float[Array, " n"]]) -> float:
    """Whether images agree on which method is better. 1: every image ranks the methods alike; 0: as chance would.

    Krippendorff's ordinal alpha with images as raters, methods as units, and a method's rank in that image as its
    rating. Methods without any value are left out, and then images where a method has none, because ranks among fewer
    methods differ. NaN for fewer than two images or methods.

    Source: Tomsett et al. 2020 (1912.01451), inter-rater reliability.

    >>> reliability({"a": np.array([0.1, 5.0]), "b": np.array([0.2, 7.0]), "c": np.array([0.3, 9.0])})
    1.0
    """
    if not values:
        return float("nan")
    table = np.stack(list(values.values()), 1)
    table = table[:, ~np.isnan(table).all(0)]
    return krippendorff_alpha(ranks(table[~np.isnan(table).any(1)]), "ordinal")


def check_one_target(what: str, verb: str, maps: Tensor, others: Tensor) -> None:
    """Check that maps, and what they are compared with, are one for each of the same images.

    Raises:
        ValueError: shapes that do not fit.
    """
    if not (maps.ndim == others.ndim in (4, 5) and maps.shape[1] == 1 and others.shape[:2] == maps.shape[:2]):
        raise ValueError(
            f"expected {what} of shape (b, 1, h, w), or both (b, 1, d, h, w), got "
            f"{tuple(maps.shape)} and {tuple(others.shape)}; {verb} one target at a time"
        )


def _fit(maps: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Both on the larger grid, flattened to (b, n)."""
    check_one_target("two maps", "compare", maps, others)
    size = tuple(map(max, maps.shape[2:], others.shape[2:]))
    return pixels.resize(maps, size).flatten(1), pixels.resize(others.to(maps.device), size).flatten(1)


def _varies(maps: Tensor) -> Tensor:
    """Whether a map is finite and not flat; checked before resizing, which rounds."""
    cells = maps.flatten(1)
    return cells.isfinite().all(1) & (cells.amax(1) > cells.amin(1))


def _top(cells: Float[Tensor, "b n"], share: float) -> Float[Tensor, "b n"]:
    """The degree to which each cell belongs to the highest share of the cells."""
    count = max(round(share * cells.shape[1]), 1)
    least = cells.topk(count, 1).values[:, -1:]
    above, tied = (cells > least).double(), (cells == least).double()
    return above + tied * (count - above.sum(1, keepdim=True)) / tied.sum(1, keepdim=True)
