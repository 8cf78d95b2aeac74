"""Spatial attention: gates that weigh the positions of a feature map, also combined with channel attention."""

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import interpolate

from sightline.attention.channel import ChannelWeights, Gating, Pools, bottleneck, hidden_width, zero
from sightline.attention.registry import check_choice, register

__all__ = ["BAM", "CBAM", "AttentionGate", "ChannelGate", "SpatialGate"]

Order = Literal["channel_first", "spatial_first", "parallel"]
Variant = Literal["paper", "official"]
GateNorm = Literal["sigmoid", "softmax", "mean_flow"]


@register("channel_gate")
class ChannelGate(Gating):
    """CBAM's first half: weighs each channel by a bottleneck of the averages and maxima of all channels.

    Args:
        channels: channels of the feature map.
        reduction: the bottleneck has `channels // reduction` units, at least 1.
        pools: which poolings of a channel it reads: "both", "average" or "maximum".
        identity: a new block returns its input: weights count twice and the second layer starts at zero.

    Raises:
        ValueError: `reduction` below 1, unknown `pools`.

    Source: Woo et al., "CBAM", ECCV 2018, equation 2; one pooling alone: table 1.
    Elsewhere: `layers.cbam.ChannelAttn` (timm).

    Differs: fewer channels than `reduction` get one hidden unit; the authors' code then has none.

    >>> ChannelGate(4, reduction=2, identity=True)(torch.full((1, 4, 1, 1), 3.0)).flatten().tolist()
    [3.0, 3.0, 3.0, 3.0]
    """

    def __init__(self, channels: int, *, reduction: int = 16, pools: Pools = "both", identity: bool = False) -> None:
        mlp = bottleneck(channels, hidden_width(channels, reduction), zero_init=identity)
        super().__init__(ChannelWeights(mlp, pools=pools), identity=identity)


class SpatialWeights(nn.Module):
    """One weight per position: maximum and mean over channels, or one of them, pass a convolution and a BatchNorm.

    >>> SpatialWeights(7, zero_init=True)(torch.ones(2, 3, 1, 2))[0].flatten().tolist()
    [0.5, 0.5]
    """

    def __init__(self, kernel: int, *, pools: Pools = "both", zero_init: bool) -> None:
        super().__init__()
        check_choice("pools", pools, get_args(Pools))
        self.pools = pools
        self.conv = nn.Conv2d(2 if pools == "both" else 1, 1, kernel, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(1, momentum=0.01)
        if zero_init:
            zero(self.bn)

    def forward(self, features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 1 h w"]:
        """Weight of every position."""
        pooled: list[Tensor] = []
        if self.pools != "average":
            pooled.append(features.amax(1, keepdim=True))
        if self.pools != "maximum":
            pooled.append(features.mean(1, keepdim=True))
        return self.bn(self.conv(torch.cat(pooled, dim=1))).sigmoid()


@register("spatial_gate")
class SpatialGate(Gating):
    """CBAM's second half: weighs each position by the maximum and the mean over channels around it.

    Args:
        channels: channels of the feature map; any number takes the same weights.
        kernel: side of the convolution; odd.
        pools: what it reads of the channels: "both" maximum and mean, or "average" or "maximum" alone.
        zero_init: the BatchNorm's weight starts at zero, so all weights start at 0.5.
        identity: a new block returns its input: weights count twice and start at 0.5.

    Raises:
        ValueError: an even `kernel` or one below 1, unknown `pools`.

    Source: Woo et al., "CBAM", ECCV 2018, equation 3; BatchNorm, its start and the order of the two maps as in the
    authors' code.
    Elsewhere: `layers.cbam.SpatialAttn` (timm).

    >>> SpatialGate(4)(torch.full((2, 4, 1, 1), 3.0))[0].flatten().tolist()
    [1.5, 1.5, 1.5, 1.5]
    """

    def __init__(
        self,
        channels: int,
        *,
        kernel: int = 7,
        pools: Pools = "both",
        zero_init: bool = True,
        identity: bool = False,
    ) -> None:
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"expected an odd kernel of 1 or more, got {kernel}; choose another")
        super().__init__(SpatialWeights(kernel, pools=pools, zero_init=zero_init or identity), identity=identity)


@register("cbam")
class CBAM(nn.Module):
    """Channel attention, then spatial attention; the children `channel` and `spatial` each have a `gate`.

    Args:
        channels: channels of the feature map.
        reduction: see `ChannelGate`.
        kernel: see `SpatialGate`.
        pools: see `ChannelGate` and `SpatialGate`; the same for both.
        order: which comes first; "parallel": both read the input, and their weights are multiplied.
        zero_init: see `SpatialGate`.
        identity: a new block returns its input: both children do.

    Raises:
        ValueError: an unknown `order` or `pools`, `reduction` below 1, an even `kernel` or one below 1.

    Source: Woo et al., "CBAM", ECCV 2018, equations 1 to 3; for the other orders its table 3.
    Elsewhere: `layers.cbam.CbamModule` (timm).

    Differs: the paper does not say how "parallel" joins the two; here by their product, as in the sequences.

    >>> CBAM(4, reduction=2, identity=True)(torch.full((2, 4, 1, 1), 3.0))[0].flatten().tolist()
    [3.0, 3.0, 3.0, 3.0]
    """

    def __init__(
        self,
        channels: int,
        *,
        reduction: int = 16,
        kernel: int = 7,
        pools: Pools = "both",
        order: Order = "channel_first",
        zero_init: bool = True,
        identity: bool = False,
    ) -> None:
        super().__init__()
        check_choice("order", order, get_args(Order))
        self.order = order
        self.channel = ChannelGate(channels, reduction=reduction, pools=pools, identity=identity)
        self.spatial = SpatialGate(channels, kernel=kernel, pools=pools, zero_init=zero_init, identity=identity)

    def forward(self, features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Features with both weights applied."""
        if self.order == "channel_first":
            return self.spatial(self.channel(features))
        if self.order == "spatial_first":
            return self.channel(self.spatial(features))
        return self.channel(features) * self.spatial.factor(features)


class BAMWeights(nn.Module):
    """One weight per channel and position, from the scores of the children `channel` and `spatial`.

    `channel` returns (b, c, 1, 1), `spatial` (b, 1, h, w). With "paper" (their sum) each channel's weights, and so the
    mean over channels, rank the positions as `spatial` does.

    >>> BAMWeights(4, 2, 4, "paper").eval()(torch.zeros(1, 4, 5, 7)).shape
    torch.Size([1, 4, 5, 7])
    """

    def __init__(
        self, channels: int, reduction: int, dilation: int, variant: Variant, *, zero_init: bool = False
    ) -> None:
        super().__init__()
        self.variant = variant
        hidden = hidden_width(channels, reduction)
        # if both factors start at zero, their product has no gradient
        zero_channel = zero_init and variant == "paper"
        self.channel = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            bottleneck(channels, hidden, norm=nn.BatchNorm1d, zero_init=zero_channel),
            nn.Unflatten(1, (channels, 1, 1)),
        )
        self.spatial = nn.Sequential(nn.Conv2d(channels, hidden, 1), nn.BatchNorm2d(hidden), nn.ReLU())
        for _ in range(2):
            conv = nn.Conv2d(hidden, hidden, 3, padding=dilation, dilation=dilation)
            self.spatial.extend([conv, nn.BatchNorm2d(hidden), nn.ReLU()])
        last = nn.Conv2d(hidden, 1, 1)
        if zero_init:
            zero(last)
        self.spatial.append(last)

    def forward(self, features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Weight of every channel at every position."""
        channel, spatial = self.channel(features), self.spatial(features)
        return (channel + spatial if self.variant == "paper" else channel * spatial).sigmoid()


@register("bam")
class BAM(Gating):
    """Adds the features weighed per channel and position to the features; the weights come from two parallel branches.

    The child `gate` returns the weights, `gate.spatial` the score of each position. Training needs batches of two
    images or more (BatchNorm).

    Args:
        channels: channels of the feature map.
        reduction: both branches have `channels // reduction` hidden channels, at least 1.
        dilation: of the spatial branch's two 3x3 convolutions.
        variant: the branches' scores are added ("paper") or multiplied ("official", as in the authors' code; needed
            for their weights).
        identity: a new block returns its input: x * 2 * weights in place of x + x * weights, weights starting at 0.5.

    Raises:
        ValueError: an unknown `variant`, `reduction` or `dilation` below 1.

    Source: Park et al., "BAM", BMVC 2018 (1807.06514), section 3.

    Differs: BatchNorm after each hidden layer and none at the end, as in the authors' code; fewer channels than
    `reduction` get one hidden channel, where that code has none.

    >>> BAM(4, reduction=2, identity=True)(torch.full((2, 4, 1, 1), 3.0))[0].flatten().tolist()
    [3.0, 3.0, 3.0, 3.0]
    """

    def __init__(
        self,
        channels: int,
        *,
        reduction: int = 16,
        dilation: int = 4,
        variant: Variant = "paper",
        identity: bool = False,
    ) -> None:
        check_choice("variant", variant, get_args(Variant))
        if dilation < 1:
            raise ValueError(f"expected dilation of 1 (dense) or more, got {dilation}; choose another")
        gate = BAMWeights(channels, reduction, dilation, variant, zero_init=identity)
        super().__init__(gate, identity=identity)

    def forward(self, features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Features with their weights applied."""
        factor = self.factor(features)
        return features * factor if self.identity else torch.addcmul(features, features, factor)


class AttentionGateWeights(nn.Module):
    """Weight of every position from the score psi(relu(theta x + phi g)); the query map g is brought to x's size.

    Without a query, g is the average of x.

    >>> AttentionGateWeights(2, 3, 4, "softmax")(torch.ones(1, 2, 1, 2), torch.ones(1, 3, 1, 1)).flatten().tolist()
    [0.5, 0.5]
    """

    def __init__(
        self, channels: int, query_channels: int, hidden: int, norm: GateNorm, *, zero_init: bool = False
    ) -> None:
        super().__init__()
        self.norm = norm
        self.theta = nn.Conv2d(channels, hidden, 1, bias=False)
        self.phi = nn.Conv2d(query_channels, hidden, 1, bias=False)
        self.psi = nn.Conv2d(hidden, 1, 1, bias=norm == "sigmoid")
        if zero_init:
            zero(self.psi)
        elif self.psi.bias is not None:
            nn.init.constant_(self.psi.bias, 3.0)

    def scores(
        self, features: Float[Tensor, "b c h w"], query: Float[Tensor, "b q y x"] | None = None
    ) -> Float[Tensor, "b 1 h w"]:
        """Score of every position, before normalization.

        Raises:
            ValueError: no query, if it has another number of channels than the features.
        """
        if query is not None:
            # phi has no bias, so it commutes with the interpolation and is cheaper before it
            raised = interpolate(self.phi(query), features.shape[2:], mode="bilinear", align_corners=False)
        elif self.phi.in_channels == self.theta.in_channels:
            raised = self.phi(features.mean((2, 3), keepdim=True))
        else:
            raise ValueError(f"expected a query of {self.phi.in_channels} channels, got none; pass one")
        return self.psi((self.theta(features) + raised).relu())

    def forward(
        self, features: Float[Tensor, "b c h w"], query: Float[Tensor, "b q y x"] | None = None
    ) -> Float[Tensor, "b 1 h w"]:
        """Weight of every position."""
        scores = self.scores(features, query)
        if self.norm == "sigmoid":
            return scores.sigmoid()
        if self.norm == "softmax":
            return scores.flatten(2).softmax(2).unflatten(2, features.shape[2:])
        above = scores - scores.amin((2, 3), keepdim=True) + 1e-6
        return above / above.sum((2, 3), keepdim=True)


@register("attention_gate")
class AttentionGate(nn.Module):
    """Weighs each position by how well it matches a coarser map, the query, which has a larger receptive field.

    Args:
        channels: channels of the feature map.
        query_channels: channels of the query. None: `channels`; then the features' average replaces a missing query.
        hidden: channels in which the two are compared. None: `query_channels`.
        norm: how scores become weights: "sigmoid", each between 0 and 1; "softmax", they sum to 1; "mean_flow", each
            score minus the lowest one, divided by their sum.
        identity: a new block returns its input: weights count twice and psi starts at zero.

    Raises:
        ValueError: an unknown `norm`, `hidden` below 1, `identity` with another norm than "sigmoid"; in the forward
            pass, no query if it has another number of channels than the features.

    Source: Oktay et al., "Attention U-Net", MIDL 2018, equations 1 and 2; Schlemper et al., "Attention gated networks",
    MedIA 2019, for "mean_flow".

    Differs: no convolution after the weighting and no biases before psi, as in the authors' code for classification;
    psi's bias starts at 3, as there, and is left out if it cancels; 1e-6 keeps "mean_flow" finite on equal scores.

    >>> AttentionGate(4, identity=True)(torch.full((1, 4, 1, 1), 3.0)).flatten().tolist()
    [3.0, 3.0, 3.0, 3.0]
    """

    def __init__(
        self,
        channels: int,
        query_channels: int | None = None,
        *,
        hidden: int | None = None,
        norm: GateNorm = "sigmoid",
        identity: bool = False,
    ) -> None:
        super().__init__()
        check_choice("norm", norm, get_args(GateNorm))
        if identity and norm != "sigmoid":
            raise ValueError(f"expected norm 'sigmoid' with identity, got {norm!r}; choose one of the two")
        query_channels = channels if query_channels is None else query_channels
        hidden = query_channels if hidden is None else hidden
        if hidden < 1:
            raise ValueError(f"expected hidden of 1 or more, got {hidden}; choose another")
        self.identity = identity
        self.gate = AttentionGateWeights(channels, query_channels, hidden, norm, zero_init=identity)

    def forward(
        self, features: Float[Tensor, "b c h w"], query: Float[Tensor, "b q y x"] | None = None
    ) -> Float[Tensor, "b c h w"]:
        """Features with their weights applied."""
        weights = self.gate(features, query)
        return features * (2 * weights if self.identity else weights)
