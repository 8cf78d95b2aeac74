"""Is the map where the evidence is? Scores against masks of the evidence."""

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from sightline import maps as pixels
from sightline.metrics.per_image import PerImageMean


def pointing_game(
    maps: Float[Tensor, "b 1 h w"], masks: Shaped[Tensor, "b 1 H W"], *, tolerance: int = 0
) -> Float[Tensor, " b"]:
    """1 where the highest value of the map lies in the mask, else 0. Chance: the mask's share of the image.

    The map is resized bilinearly to the mask. If several pixels share the highest value, the score is their share
    inside the mask, so that a flat map scores chance. `tolerance`: a hit may miss the mask by so many pixels along
    each axis. An empty mask or a value that is not finite gives NaN.

    Raises:
        ValueError: shapes that do not fit.

    Source: Zhang et al. 2016 (1608.00507), who allow 15 pixels.

    >>> masks = torch.tensor([[[[True, False]]], [[[False, True]]]])
    >>> pointing_game(torch.tensor([[[[2.0, 1.0]]], [[[2.0, 1.0]]]]), masks)
    tensor([1., 0.])
    """
    maps, masks = _fit(maps, masks)
    if tolerance:
        side = 2 * tolerance + 1
        grown = torch.nn.functional.max_pool2d(masks.float(), side, stride=1, padding=tolerance)
        masks_hit = grown > 0
    else:
        masks_hit = masks
    highest = maps == maps.amax((2, 3), keepdim=True)
    share = (highest & masks_hit).sum((1, 2, 3)) / highest.sum((1, 2, 3))
    return share.where(_defined(maps, masks), torch.nan)


def energy_in_mask(maps: Float[Tensor, "b 1 h w"], masks: Shaped[Tensor, "b 1 H W"]) -> Float[Tensor, " b"]:
    """Share of the map's positive values that lies in the mask, 0 to 1. Chance: the mask's share of the image.

    The map is resized bilinearly to the mask; negative values count as 0. An empty mask, a map without a positive value
    or a value that is not finite gives NaN.

    Raises:
        ValueError: shapes that do not fit.

    Source: Wang et al. 2020 (1910.01279), energy-based pointing game.

    >>> energy_in_mask(torch.tensor([[[[3.0, 1.0]]]]), torch.tensor([[[[True, False]]]]))
    tensor([0.7500])
    """
    maps, masks = _fit(maps, masks)
    positive = maps.clamp(min=0)
    inside, total = (positive * masks).sum((1, 2, 3)), positive.sum((1, 2, 3))
    return (inside / total).where(_defined(maps, masks) & (total > 0), torch.nan)


class PointingGame(PerImageMean):
    """Mean `pointing_game`."""

    function = staticmethod(pointing_game)
    sentence = "The highest point of {method} lies in the marked region most often (share of images {score})"
    higher_is_better = True


class EnergyInMask(PerImageMean):
    """Mean `energy_in_mask`."""

    function = staticmethod(energy_in_mask)
    sentence = "{method} has the largest share of its weight in the marked region ({score})"
    higher_is_better = True


def _fit(maps: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    if maps.ndim != 4 or masks.ndim != 4 or maps.shape[1] != 1 or masks.shape[:2] != maps.shape[:2]:
        raise ValueError(
            f"expected maps and masks of shape (b, 1, h, w), got {tuple(maps.shape)} and {tuple(masks.shape)}; "
            "score one target at a time"
        )
    if masks.dtype != torch.bool and not ((masks == 0) | (masks == 1)).all():
        raise ValueError(
            f"expected masks that are bool or 0 and 1, got values up to {masks.max()}; compare them with 0"
        )
    return pixels.resize(maps, (masks.shape[2], masks.shape[3])), masks.to(maps.device).bool()


def _defined(maps: Tensor, masks: Tensor) -> Tensor:
    return maps.isfinite().all((1, 2, 3)) & masks.any((1, 2, 3))
