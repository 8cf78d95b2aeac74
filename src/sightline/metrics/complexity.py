"""How concentrated is the map?"""

import torch
from jaxtyping import Float
from torch import Tensor


def sparsity(maps: Float[Tensor, "b k h w"]) -> Float[Tensor, " b"]:
    """Largest value of a map divided by its mean, averaged over the k maps of an image: 1 if flat, h * w if one-hot.

    Negative values count as 0. It grows with the number of positions, so compare maps of one resolution, or divide by
    h * w. A map without a positive value, or with one that is not finite, gives NaN.

    Source: Gomez et al. 2021 (2106.02566), code: the inverse of the mean of map / max; the paper gives no formula.

    >>> sparsity(torch.tensor([[[[3.0, 1.0], [0.0, 0.0]]], [[[5.0, 5.0], [5.0, 5.0]]]]))
    tensor([3., 1.])
    """
    positive = maps.clamp(min=0)
    concentration = positive.amax((2, 3)) / positive.mean((2, 3))
    return concentration.where(maps.isfinite().all(3).all(2), torch.nan).mean(1)
