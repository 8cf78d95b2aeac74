"""Poolings without a map: the bilinear CNN, and the plain means that serve as controls."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import normalize

from sightline.attention.registry import register

__all__ = ["BilinearCNN", "GeneralizedMean", "GlobalAveragePool"]

_EPS = 1e-6


def signed_root(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Square root of |x| with the sign of x.

    Differs: computed as x / sqrt(|x| + 1e-6), whose slope at 0 is 1,000 instead of infinite.

    >>> signed_root(torch.tensor([-4.0, 0.0, 9.0]))
    tensor([-2.0000,  0.0000,  3.0000])
    """
    return x * (x.abs() + _EPS).rsqrt()


@register("bilinear")
class BilinearCNN(nn.Module):
    """Pools a feature map into the products of all pairs of channels, summed over positions; signed root, length 1.

    Args:
        channels: channels of the feature map.
        project: channels after a 1x1 convolution; without it, 2,048 channels would yield 4 million numbers.

    Raises:
        ValueError: `project` below 1.

    Source: Lin, RoyChowdhury, Maji, "Bilinear CNN Models for Fine-grained Visual Recognition", ICCV 2015, with
    the same network in both branches.

    Differs: see `signed_root`.

    >>> BilinearCNN(2)(torch.tensor([[[[3.0]], [[0.0]]]]))
    tensor([[1., 0., 0., 0.]])
    """

    def __init__(self, channels: int, *, project: int | None = None) -> None:
        super().__init__()
        if project is not None and project < 1:
            raise ValueError(f"expected project of 1 channel or more, got {project}; None keeps all channels")
        self.project = nn.Identity() if project is None else nn.Conv2d(channels, project, 1)
        self.out_channels = (project or channels) ** 2

    def forward(self, features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b cc"]:
        """The products, row by row."""
        local = self.project(features).flatten(2)
        return normalize(signed_root(torch.bmm(local, local.mT)).flatten(1))


@register("gap")
class GlobalAveragePool(nn.Module):
    """The mean over positions: the usual pooling, and the control of the others.

    Elsewhere: `AdaptiveAvgPool2d` (torch).

    >>> GlobalAveragePool(1)(torch.tensor([[[[1.0, 3.0]]]]))
    tensor([[2.]])
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.out_channels = channels

    def forward(self, features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c"]:
        """The mean of each channel."""
        return features.mean((2, 3))


@register("gem")
class GeneralizedMean(nn.Module):
    """The generalized mean over positions (GeM), whose power is learned: 1 is the mean, infinity the maximum.

    Args:
        channels: channels of the feature map.
        p: power at the start.

    Raises:
        ValueError: `p` not above 0.

    Source: Radenovic, Tolias, Chum, "Fine-tuning CNN Image Retrieval with No Human Annotation" (1711.02512), equation
    3, one power for all channels. Features below 1e-6 count as 1e-6.

    >>> GeneralizedMean(1, p=2.0)(torch.tensor([[[[1.0, 7.0]]]])).item()
    5.0
    """

    def __init__(self, channels: int, *, p: float = 3.0) -> None:
        super().__init__()
        if not p > 0:
            raise ValueError(f"expected p above 0, got {p}; 3 is the paper's")
        self.out_channels = channels
        self.p = nn.Parameter(torch.tensor(float(p)))

    def forward(self, features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c"]:
        """The generalized mean of each channel."""
        return features.clamp_min(_EPS).pow(self.p).mean((2, 3)).pow(1 / self.p)
