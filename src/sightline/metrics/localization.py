"""Is the map where the evidence is? Scores against masks of the evidence."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_iou

from sightline import maps as pixels
from sightline.checks import check_planes, check_whole
from sightline.inference import wide
from sightline.metrics.agreement import check_one_target, correlation, ranks
from sightline.metrics.per_image import mean_of, metric

__all__ = [
    "EnergyInMask",
    "IoU",
    "MaskAUC",
    "MaxBoxAccuracy",
    "PointBiserial",
    "PointingGame",
    "RelevanceRank",
    "energy_in_mask",
    "iou",
    "mask_auc",
    "max_box_accuracy",
    "point_biserial",
    "pointing_game",
    "relevance_rank",
]


def _mean_area(areas: np.ndarray) -> float:
    return float(np.mean(areas)) if len(areas) else math.nan


@metric(
    "higher",
    "how often the map's highest point lies in the mask",
    chance=_mean_area,
)
def pointing_game(
    maps: Float[Tensor, "b 1 *small"], masks: Shaped[Tensor, "b 1 *grid"], *, tolerance: int = 0
) -> Float[Tensor, " b"]:
    """1 where the highest value of the map lies in the mask, else 0; higher is better. Chance: the mask's area.

    The map is resized bilinearly to the mask. If several pixels share the highest value, the score is the
    fraction of them inside the mask, so that a flat map scores chance. `tolerance`: largest distance of a hit from the
    mask, in pixels of the mask; chance is then the area of the mask enlarged by it. An empty mask or a value that is
    not finite gives NaN.

    Raises:
        ValueError: shapes that do not fit, a negative tolerance.

    Source: Zhang et al. 2016 (1608.00507), whose code has a circle of radius 15 at the size of the original image.
    Differs: the circle's rim is part of it, in TorchRay's code it is not: a mask exactly `tolerance` pixels away is a
    miss there. TorchRay takes one of several highest pixels, and the mean over classes.
    Elsewhere: `PointingGame` (Quantus).

    >>> masks = torch.tensor([[[[True, False]]], [[[False, True]]]])
    >>> pointing_game(torch.tensor([[[[2.0, 1.0]]], [[[2.0, 1.0]]]]), masks)
    tensor([1., 0.])
    """
    check_whole(tolerance=tolerance)
    if tolerance < 0:
        raise ValueError(f"expected a tolerance of at least 0 pixels, got {tolerance}; 15 is that of the paper")
    maps, masks = _fit(maps, masks)
    squares = torch.arange(-tolerance, tolerance + 1, device=maps.device).square()
    distances = torch.stack(torch.meshgrid([squares] * (maps.ndim - 2), indexing="ij")).sum(0)
    ball = (distances <= tolerance**2).float()
    convolve = F.conv2d if maps.ndim == 4 else F.conv3d
    near = (convolve(masks.float(), ball[None, None], padding=tolerance) > 0.5).flatten(1)
    values = maps.flatten(1)
    highest = values == values.amax(1, keepdim=True)
    return _where_defined((highest & near).sum(1).double() / highest.sum(1), maps, masks)


PointingGame = mean_of(pointing_game, "PointingGame")


@metric("higher", "the share of the map that lies in the mask", chance=_mean_area)
def energy_in_mask(maps: Float[Tensor, "b 1 *small"], masks: Shaped[Tensor, "b 1 *grid"]) -> Float[Tensor, " b"]:
    """Share of the map's positive values that lies in the mask, 0 to 1; higher is better. Chance: the mask's area.

    The map is resized bilinearly to the mask; negative values count as 0. An empty mask, a map without a positive value
    or a value that is not finite gives NaN.

    Raises:
        ValueError: shapes that do not fit.

    Source: Wang et al. 2020 (1910.01279), energy-based pointing game.
    Elsewhere: `RelevanceMassAccuracy` (Quantus).

    >>> energy_in_mask(torch.tensor([[[[3.0, 1.0]]]]), torch.tensor([[[[True, False]]]]))
    tensor([0.7500])
    """
    maps, masks = _fit(maps, masks)
    positive = maps.flatten(1).double().clamp(min=0)
    return _where_defined((positive * masks.flatten(1)).sum(1) / positive.sum(1), maps, masks)


EnergyInMask = mean_of(energy_in_mask, "EnergyInMask")


@metric("higher", "how much of the mask the map's highest pixels fill", chance=_mean_area)
def relevance_rank(maps: Float[Tensor, "b 1 *small"], masks: Shaped[Tensor, "b 1 *grid"]) -> Float[Tensor, " b"]:
    """Fraction of the highest pixels, as many as the mask has, that lie in the mask, 0 to 1; higher is better.

    Chance: the mask's area. The map is resized bilinearly to the mask. Pixels with equal values count by their
    expected share under a random choice, so that a flat map scores chance. A full mask gives 1; an empty one or a value
    that is not finite gives NaN.

    Raises:
        ValueError: shapes that do not fit.

    Source: Arras et al. 2022 (2003.07258), relevance rank accuracy.
    Elsewhere: `RelevanceRankAccuracy` (Quantus).

    >>> relevance_rank(torch.tensor([[[[4.0, 3.0, 2.0, 1.0]]]]), torch.tensor([[[[True, False, True, False]]]]))
    tensor([0.5000])
    """
    maps, masks = _fit(maps, masks)
    values, inside = maps.flatten(1), masks.flatten(1)
    size = inside.sum(1, keepdim=True)
    last = values.sort(dim=1, descending=True).values.gather(1, (size - 1).clamp(min=0))
    above, tied = values > last, values == last
    left = size[:, 0] - above.sum(1)
    fraction_of_tied = (tied & inside).sum(1).double() / tied.sum(1)
    return _where_defined(((above & inside).sum(1) + left * fraction_of_tied) / size[:, 0], maps, masks)


RelevanceRank = mean_of(relevance_rank, "RelevanceRank")


@metric("higher", "how well the map tells the mask from the rest", chance=0.5)
def mask_auc(maps: Float[Tensor, "b 1 *small"], masks: Shaped[Tensor, "b 1 *grid"]) -> Float[Tensor, " b"]:
    """Chance that a pixel of the mask has a higher value than one outside, ties half, 0 to 1; higher is better.

    The area under the ROC curve of the map as a detector of the mask. Chance: 0.5, which a flat map scores too. The map
    is resized bilinearly to the mask. An empty or full mask (a single pixel among them) or a value that is not finite
    gives NaN.

    Raises:
        ValueError: shapes that do not fit.

    Source: Mann & Whitney 1947: the rank sum.
    Elsewhere: `AUC` (Quantus).

    >>> mask_auc(torch.tensor([[[[3.0, 2.0, 2.0, 1.0]]]]), torch.tensor([[[[True, True, False, False]]]]))
    tensor([0.8750])
    """
    maps, masks = _fit(maps, masks)
    inside = masks.flatten(1)
    m = inside.sum(1).double()
    rank_sum = (ranks(maps.flatten(1).double()) * inside).sum(1)  # at least m (m + 1) / 2
    return _where_defined((rank_sum - m * (m + 1) / 2) / (m * (inside.shape[1] - m)), maps, masks)


MaskAUC = mean_of(mask_auc, "MaskAUC")


@metric("higher", "how well the map correlates with the mask", chance=0.0)
def point_biserial(maps: Float[Tensor, "b 1 *small"], masks: Shaped[Tensor, "b 1 *grid"]) -> Float[Tensor, " b"]:
    """Pearson's correlation between the map and the mask as 0 and 1, -1 to 1; higher is better. Chance: 0.

    Of the signed map, resized bilinearly to the mask. A flat map, an empty or full mask (a single pixel among them) or
    a value that is not finite gives NaN.

    Raises:
        ValueError: shapes that do not fit.

    Source: Tate 1954, the point-biserial correlation.

    >>> point_biserial(torch.tensor([[[[3.0, 1.0]]]]), torch.tensor([[[[True, False]]]]))
    tensor([1.])
    """
    maps, masks = _fit(maps, masks)
    a, b = pixels.normalize(maps.flatten(2)).double().flatten(1), masks.double().flatten(1)
    return _where_defined(correlation(a, b), maps, masks)


PointBiserial = mean_of(point_biserial, "PointBiserial")


@metric("higher", "how far the marked part and the mask overlap")
def iou(
    maps: Float[Tensor, "b 1 *small"], masks: Shaped[Tensor, "b 1 *grid"], *, threshold: float = 0.15
) -> Float[Tensor, " b"]:
    """Intersection over union of the mask and the pixels of at least `threshold` times the maximum; higher is better.

    0 to 1; a map that marks every pixel scores the mask's area. The map is resized bilinearly to the mask. A map
    without a positive value or with one that is not finite gives NaN, an empty mask too.

    Raises:
        ValueError: shapes that do not fit, `threshold` outside [0, 1].

    Source: the Jaccard index; 15 % of the maximum as Selvaraju et al. 2017 (1610.02391) take for Grad-CAM.

    >>> iou(torch.tensor([[[[5.0, 1.0, 0.0, 0.0]]]]), torch.tensor([[[[True, True, True, False]]]]), threshold=0.2)
    tensor([0.6667])
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"expected a threshold from 0 to 1, got {threshold}; it is a share of the map's maximum")
    maps, masks = _fit(maps, masks)
    values, inside = maps.flatten(1), masks.flatten(1)
    highest = values.amax(1, keepdim=True)
    marked = values >= threshold * highest
    intersection, union = (marked & inside).sum(1), (marked | inside).sum(1)
    return _where_defined((intersection.double() / union).where(highest[:, 0] > 0, torch.nan), maps, masks)


IoU = mean_of(iou, "IoU")


def jaccard(
    maps: Float[Tensor, "b 1 h w"], masks: Shaped[Tensor, "b 1 H W"], thresholds: Sequence[float]
) -> Float[Tensor, "b thresholds"]:
    """`iou` of each map, scaled from its minimum 0 to its maximum 1, at each threshold; a flat map marks every pixel.

    Raises:
        ValueError: as `iou`.

    >>> mask = torch.tensor([[[[True, True, False, False]]]])
    >>> jaccard(torch.tensor([[[[9.0, 7.0, 5.0, 1.0]]]]), mask, [0.0, 0.5, 0.7, 0.9])
    tensor([[0.5000, 0.6667, 1.0000, 0.5000]])
    """
    check_planes("jaccard", maps.shape)
    scaled, masks = _fit(maps, masks)
    scaled = _stretched(scaled)
    return torch.stack([iou(scaled, masks, threshold=threshold) for threshold in thresholds], 1)


@metric("higher", "how often a box around the marked part fits the object")
def max_box_accuracy(
    maps: Float[Tensor, "b 1 h w"],
    masks: Shaped[Tensor, "b 1 H W"],
    *,
    iou: float = 0.5,
    thresholds: int | Sequence[float] = 20,
) -> Float[Tensor, "b thresholds"]:
    """1 where the box of the map fits that of the mask, at each threshold; higher is better.

    The box around the largest connected component (`sightline.maps.boxes`) of the pixels whose value, scaled from the
    map's minimum 0 to its maximum 1, reaches the threshold; it fits if its intersection over union with the box around
    the mask is at least `iou`. MaxBoxAcc is the mean over all images at the best threshold, one for the data set:
    `MaxBoxAccuracy`. Chance: at threshold 0 every map's box is the whole image, so that none scores below the share of
    images whose object's box covers at least `iou` of the image; a flat map has that box at every threshold.
    `thresholds`: from 0 to 1, or how many in equal steps: 20 are 0, 0.05, ..., 0.95. More of them find a better best
    one, so compare scores of equal thresholds; published ones have 1000.

    The map is resized bilinearly to the mask. An empty mask or a value that is not finite gives NaN.

    Raises:
        ValueError: shapes that do not fit (volumes too), `iou` not in (0, 1], no threshold or one outside [0, 1].

    Source: Choe et al. 2020 (2001.07437), MaxBoxAcc.
    Differs: 20 thresholds, in the authors' code 1000; there the map has 8 bits, a box is one pixel longer, and the box
    of any one object counts, where here one box goes around the whole mask.

    >>> mask = torch.tensor([[[[True, True, False, False]]]])
    >>> max_box_accuracy(torch.tensor([[[[8.0, 4.0, 0.0, 0.0]]]]), mask, iou=0.6)[:, ::5]
    tensor([[0., 1., 1., 0.]])
    """
    if not 0 < iou <= 1:
        raise ValueError(f"expected an iou above 0 and up to 1, got {iou}; it is the least overlap of a hit")
    if isinstance(thresholds, str) or not isinstance(thresholds, Sequence):
        check_whole(thresholds=thresholds)
        count = int(thresholds)
        thresholds = [step / count for step in range(count)]
    if not thresholds or not all(0 <= threshold <= 1 for threshold in thresholds):
        raise ValueError(
            f"expected thresholds from 0 to 1, at least one, got {thresholds}; they are shares of the range"
        )
    check_planes("max_box_accuracy", maps.shape)
    maps, masks = _fit(maps, masks)
    scaled = _stretched(maps)
    boxes = torch.cat([pixels.boxes(scaled, threshold) for threshold in thresholds], 1)
    truth = pixels.box_around(masks)
    return _where_defined((box_iou(boxes, truth)[..., 0] >= iou).double(), maps, masks)


MaxBoxAccuracy = mean_of(max_box_accuracy, "MaxBoxAccuracy")


def _fit(maps: Tensor, masks: Tensor) -> tuple[Float[Tensor, "b 1 *grid"], Bool[Tensor, "b 1 *grid"]]:
    """Maps of at least 32 bits, resized to the masks, and masks as bool."""
    check_one_target("maps and masks", "score", maps, masks)
    if masks.dtype != torch.bool and not ((masks == 0) | (masks == 1)).all():
        raise ValueError(
            f"expected masks that are bool or 0 and 1, got values up to {masks.max()}; compare them with 0"
        )
    maps = maps.to(wide(maps))
    return pixels.resize(maps, tuple(masks.shape[2:])), masks.to(maps.device).bool()


def _stretched(maps: Tensor) -> Tensor:
    """From the minimum 0 to the maximum 1; a flat map is 1 everywhere."""
    flat = maps.amax((2, 3), keepdim=True) == maps.amin((2, 3), keepdim=True)
    return pixels.normalize(maps).masked_fill(flat, 1.0)


def _where_defined(scores: Tensor, maps: Tensor, masks: Tensor) -> Tensor:
    """NaN for an empty mask and for a map with a value that is not finite."""
    defined = maps.isfinite().flatten(1).all(1) & masks.flatten(1).any(1)
    return scores.to(maps.dtype).where(defined.view(-1, *[1] * (scores.ndim - 1)), torch.nan)
