"""Channel attention: gates that weigh the channels of a feature map by its global averages."""

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sightline.attention.registry import check_choice, register

__all__ = ["EfficientChannelAttention", "GlobalContext", "SqueezeExcite"]

Pools = Literal["both", "average", "maximum"]


def hidden_width(channels: int, reduction: int) -> int:
    """Channels of a bottleneck: `channels // reduction`, at least 1.

    Raises:
        ValueError: `reduction` below 1.

    >>> hidden_width(100, 16), hidden_width(8, 16)
    (6, 1)
    """
    if reduction < 1:
        raise ValueError(f"expected a reduction of 1 or more, got {reduction}; choose another")
    return max(1, channels // reduction)


def zero(layer: nn.Module) -> None:
    """Fill a layer's weight and bias with zeros."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


def bottleneck(
    channels: int,
    hidden: int,
    *,
    norm: Callable[[int], nn.Module] = nn.Identity,
    bias: bool = True,
    zero_init: bool = False,
) -> nn.Sequential:
    """Linear, norm, ReLU, Linear, from a vector of channels to one of the same length; `zero_init`: it starts at 0.

    >>> bottleneck(4, 2, zero_init=True)(torch.ones(1, 4)).abs()
    tensor([[0., 0., 0., 0.]], grad_fn=<AbsBackward0>)
    """
    last = nn.Linear(hidden, channels, bias=bias)
    if zero_init:
        zero(last)
    return nn.Sequential(nn.Linear(channels, hidden, bias=bias), norm(hidden), nn.ReLU(), last)


class Gating(nn.Module):
    """Multiplies a feature map by the weights from the child `gate`; with `identity`, by twice these weights.

    With `identity`, weights of 0.5 leave the features unchanged.

    >>> Gating(nn.Sigmoid(), identity=True)(torch.zeros(1, 1, 1, 1)).item()
    0.0
    """

    def __init__(self, gate: nn.Module, *, identity: bool) -> None:
        super().__init__()
        self.gate = gate
        self.identity = identity

    def factor(self, features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b _ _ _"]:
        """Factor of the features."""
        weights = self.gate(features)
        return 2 * weights if self.identity else weights

    def forward(self, features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Features with their weights applied."""
        return features * self.factor(features)


class ChannelWeights(nn.Module):
    """One weight per channel, the sigmoid of the sum of W2 relu(W1 z) over its poolings z: averages, maxima or both.

    >>> ChannelWeights(nn.Identity())(torch.zeros(1, 2, 3, 3)).flatten()
    tensor([0.5000, 0.5000])
    """

    def __init__(self, mlp: nn.Module, *, pools: Pools = "average") -> None:
        super().__init__()
        check_choice("pools", pools, get_args(Pools))
        self.mlp = mlp
        self.pools = pools

    def forward(self, features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c 1 1"]:
        """Weight of every channel."""
        if self.pools == "maximum":
            scores = self.mlp(features.amax((2, 3)))
        else:
            scores = self.mlp(features.mean((2, 3)))
            if self.pools == "both":
                scores = scores + self.mlp(features.amax((2, 3)))
        return scores.sigmoid()[:, :, None, None]


@register("se")
class SqueezeExcite(Gating):
    """Weighs each channel by a bottleneck of the averages of all channels.

    Args:
        channels: channels of the feature map.
        reduction: the bottleneck has `channels // reduction` units, at least 1.
        bias: biases in its two layers.
        identity: a new block returns its input: weights count twice and the second layer starts at zero.

    Raises:
        ValueError: `reduction` below 1.

    Source: Hu et al., "Squeeze-and-Excitation Networks", CVPR 2018, equations 2 to 4.
    Elsewhere: `SEModule` (timm), `SqueezeExcitation` (torchvision).

    Differs: the paper writes no biases; published SE-ResNets have them. Fewer channels than `reduction` still get one
    unit; the paper has no such layer.

    >>> SqueezeExcite(4, reduction=2, identity=True)(torch.full((1, 4, 1, 1), 3.0)).flatten().tolist()
    [3.0, 3.0, 3.0, 3.0]
    """

    def __init__(self, channels: int, *, reduction: int = 16, bias: bool = True, identity: bool = False) -> None:
        mlp = bottleneck(channels, hidden_width(channels, reduction), bias=bias, zero_init=identity)
        super().__init__(ChannelWeights(mlp), identity=identity)


class EfficientChannelWeights(nn.Module):
    """One weight per channel, from the averages of the `kernel` channels around it.

    >>> EfficientChannelWeights(3)(torch.zeros(1, 2, 3, 3)).flatten().tolist()
    [0.5, 0.5]
    """

    def __init__(self, kernel: int, *, zero_init: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, kernel, padding=kernel // 2, bias=False)
        if zero_init:
            zero(self.conv)

    def forward(self, features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c 1 1"]:
        """Weight of every channel."""
        return self.conv(features.mean((2, 3)).unsqueeze(1)).sigmoid().transpose(1, 2).unsqueeze(3)


@register("eca")
class EfficientChannelAttention(Gating):
    """Weighs each channel by the averages of its neighboring channels: one convolution along the channels.

    Args:
        channels: channels of the feature map.
        kernel: number of neighbors, the channel itself included; odd. None: the odd number next to
            (log2(channels) + 1) / 2.
        identity: a new block returns its input: weights count twice and the convolution starts at zero.

    Raises:
        ValueError: an even `kernel` or one below 1.

    Source: Wang et al., "ECA-Net", CVPR 2020 (1910.03151), section 3.2, gamma 2 and b 1; ties round up, as in its code.
    Elsewhere: `EcaModule` (timm).

    >>> [EfficientChannelAttention(c).gate.conv.weight.numel() for c in (64, 256, 1024, 2048)]
    [3, 5, 5, 7]
    """

    def __init__(self, channels: int, *, kernel: int | None = None, identity: bool = False) -> None:
        if kernel is None:
            kernel = int((math.log2(channels) + 1) / 2) | 1
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"expected an odd kernel of 1 or more, got {kernel}; choose another")
        super().__init__(EfficientChannelWeights(kernel, zero_init=identity), identity=identity)


class ContextWeights(nn.Module):
    """Weight of every position, softmax of <u, x> over the image.

    >>> ContextWeights(2)(torch.ones(1, 2, 1, 4)).flatten().tolist()
    [0.25, 0.25, 0.25, 0.25]
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.u = nn.Linear(channels, 1, bias=False)

    def forward(self, features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 1 h w"]:
        """Weight of every position."""
        u = self.u.weight.expand(features.shape[0], 1, -1)
        return torch.bmm(u, features.flatten(2)).softmax(2).unflatten(2, features.shape[2:])


@register("gc")
class GlobalContext(nn.Module):
    """Adds one vector to every position: the image's context, an attention-weighted mean, through a bottleneck.

    The child `gate` returns the weights of the positions, which sum to 1.

    Args:
        channels: channels of the feature map.
        reduction: the bottleneck has `channels // reduction` units, at least 2.
        identity: a new block returns its input: the last layer starts at zero, as in the authors' code.

    Raises:
        ValueError: `reduction` below 1.

    Source: Cao et al., "GCNet", ICCVW 2019 (1904.11492), global context block.
    Elsewhere: `GlobalContext` (timm).

    Differs: no bias before the softmax, where it cancels; at least 2 units, because LayerNorm of a single one is
    constant.

    >>> GlobalContext(4, reduction=2, identity=True)(torch.full((1, 4, 1, 1), 3.0)).flatten().tolist()
    [3.0, 3.0, 3.0, 3.0]
    """

    def __init__(self, channels: int, *, reduction: int = 16, identity: bool = False) -> None:
        super().__init__()
        self.gate = ContextWeights(channels)
        hidden = max(2, hidden_width(channels, reduction))
        self.transform = bottleneck(channels, hidden, norm=nn.LayerNorm, zero_init=identity)

    def forward(self, features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Features with their context added."""
        context = torch.bmm(self.gate(features).flatten(2), features.flatten(2).transpose(1, 2)).squeeze(1)
        return features + self.transform(context)[:, :, None, None]
