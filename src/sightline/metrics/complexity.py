"""How concentrated is the map?"""

import torch
from jaxtyping import Float
from torch import Tensor


def sparsity(maps: Float[Tensor, "b k h w"]) -> Float[Tensor, " b"]:
    """Largest value of a map divided by its mean: 1 for a flat map, h * w for a one-hot one.

    Of the k maps of an image the harmonic mean. Negative values count as 0. It grows with the number of positions, so
    compare maps of one resolution, or divide by h * w. A map without a positive value, or with one that is not finite,
    gives NaN.

    Source: Gomez et al. 2021 (2106.02566), code: the inverse of the mean of map / max, where each map is first
    multiplied by the norm of the features; the paper gives no formula.

    >>> sparsity(torch.tensor([[[[3.0, 1.0], [0.0, 0.0]]], [[[5.0, 5.0], [5.0, 5.0]]]]))
    tensor([3., 1.])
    """
    positive = maps.clamp(min=0)
    shares = positive.mean((2, 3)) / positive.amax((2, 3))
    return 1 / shares.where(maps.isfinite().all(3).all(2), torch.nan).mean(1)
