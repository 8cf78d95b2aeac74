"""How concentrated is the map? A map that marks one wrong pixel is as concentrated as one that marks the right one."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from sightline.inference import wide
from sightline.metrics.per_image import mean_of, metric

__all__ = [
    "Entropy",
    "Gini",
    "Sparsity",
    "entropy",
    "gini",
    "sparsity",
]


@metric("neither")
def sparsity(maps: Float[Tensor, "b k *grid"]) -> Float[Tensor, " b"]:
    """Largest value of a map divided by its mean: 1 for a flat map, the number of positions for a one-hot one.

    Harmonic mean over an image's k maps. Negative values count as 0. It grows with the number of positions: compare
    maps of one resolution, or divide by that number. A map without a positive value, or with one that is not finite,
    gives NaN.

    Source: Gomez et al. 2021 (2106.02566), code: the inverse of the mean of map / max, where each map is first
    multiplied by the norm of the features; the paper gives no formula.

    >>> sparsity(torch.tensor([[[[3.0, 1.0], [0.0, 0.0]]], [[[5.0, 5.0], [5.0, 5.0]]]]))
    tensor([3., 1.])
    """
    values = maps.flatten(2)
    positive = values.clamp(min=0)
    ratios = positive.mean(2) / positive.amax(2)
    return 1 / ratios.where(values.isfinite().all(2), torch.nan).mean(1)


Sparsity = mean_of(sparsity, "Sparsity")


@metric("neither")
def gini(maps: Float[Tensor, "b 1 *grid"]) -> Float[Tensor, " b"]:
    """Gini index of the map's positive values: 0 for a flat map (one pixel too), 1 - 1 / n for a one-hot one of n.

    Higher is more concentrated. Negative values count as 0. Repeating every pixel changes nothing, but smooth
    enlargement does: compare maps of one resolution. A map without a positive value, or with one that is not finite,
    gives NaN.

    Source: Hurley & Rickard 2009 (0811.4706), the Gini index; for explanations Chalasani et al. 2020 (1810.06583).
    Differs: Chalasani et al. take |.|, which counts evidence against the class as evidence for it.
    Elsewhere: `Sparseness` (Quantus).

    >>> gini(torch.tensor([[[[5.0, 0.0], [0.0, 0.0]]], [[[1.0, 1.0], [1.0, 1.0]]]]))
    tensor([0.7500, 0.0000])
    """
    ascending = _fractions(maps).sort(dim=1).values
    n = ascending.shape[1]
    places = torch.arange(1, n + 1, dtype=torch.float64, device=maps.device)
    return (1 - 2 * (ascending * (n - places + 0.5)).sum(1) / n).to(wide(maps))


Gini = mean_of(gini, "Gini")


@metric("neither")
def entropy(maps: Float[Tensor, "b 1 *grid"]) -> Float[Tensor, " b"]:
    """Entropy of the map's positive values over log(n): 1 for a flat map (one pixel too), 0 for a one-hot one of n.

    Lower is more concentrated. Negative values count as 0; the rest is divided by its sum. Compare maps of one
    resolution. A map without a positive value, or with one that is not finite, gives NaN.

    Source: Bhatt et al. 2020 (2005.00631), complexity.
    Differs: max(map, 0) for |.|; divided by the entropy of a flat map.
    Elsewhere: `Complexity` (Quantus).

    >>> entropy(torch.tensor([[[[2.0, 2.0], [0.0, 0.0]]]]))
    tensor([0.5000])
    """
    fractions = _fractions(maps)
    n = fractions.shape[1]
    return (1 - torch.xlogy(fractions, n * fractions).sum(1) / (math.log(n) or 1)).to(wide(maps))


Entropy = mean_of(entropy, "Entropy")


def _fractions(maps: Tensor) -> Float[Tensor, "b n"]:
    """Positive values in float64 over their sum; a row of NaN where there is none, or a value is not finite."""
    positive = maps.flatten(1).double().clamp(min=0)
    return (positive / positive.sum(1, keepdim=True)).where(maps.isfinite().flatten(1).all(1, keepdim=True), torch.nan)
