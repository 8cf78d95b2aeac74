"""MA-CNN: parts of an object as groups of channels that peak at the same places."""

from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sightline.attention.registry import check_choice, register

__all__ = ["MultiAttention", "distance_loss", "diversity_loss", "k_means", "peak_positions"]

Teacher = Literal["losses", "grouping", "labels"]

_SURE = 4.0  # its sigmoid is 0.98: near 1, yet not where the gradient vanishes
_RESTARTS, _ROUNDS = 10, 30


def peak_positions(features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c 2"]:
    """Row and column of each channel's largest value, as fractions of the sides; the middle if no value is above 0.

    >>> peak_positions(torch.tensor([[[[0.0, 0.0], [0.0, 3.0]], [[0.0, 0.0], [0.0, 0.0]]]])).tolist()
    [[[0.75, 0.75], [0.5, 0.5]]]
    """
    h, w = features.shape[2:]
    best, index = features.flatten(2).max(2)
    places = torch.stack([(index // w + 0.5) / h, (index % w + 0.5) / w], 2)
    return torch.where((best > 0)[:, :, None], places, 0.5)


def k_means(points: Float[Tensor, "n d"], k: int, seed: int = 0) -> Int[Tensor, " n"]:
    """Group of each point, by Lloyd's algorithm from the best of ten random starts; groups count from the first point.

    Raises:
        ValueError: fewer different points than groups.

    Source: Arthur and Vassilvitskii, "k-means++", SODA 2007, for the starts.

    >>> k_means(torch.tensor([[0.0], [9.0], [1.0], [8.0]]), 2).tolist()
    [0, 1, 0, 1]
    """
    if len(points.unique(dim=0)) < k:
        raise ValueError(f"expected at least {k} different points for {k} groups, got {len(points.unique(dim=0))}")
    generator = torch.Generator().manual_seed(seed)
    points = points.detach().double().cpu()
    least, best = torch.inf, torch.zeros(len(points), dtype=torch.long)
    for _ in range(_RESTARTS):
        centers = points[torch.randint(len(points), (1,), generator=generator)]
        while len(centers) < k:
            nearest = torch.cdist(points, centers).amin(1).square()
            centers = torch.cat([centers, points[torch.multinomial(nearest, 1, generator=generator)]])
        for _ in range(_ROUNDS):
            members = torch.eye(k, dtype=points.dtype)[torch.cdist(points, centers).argmin(1)]
            counts = members.sum(0)[:, None]
            centers = torch.where(counts > 0, members.mT @ points / counts.clamp(min=1), centers)
        distances, groups = torch.cdist(points, centers).min(1)
        spread = float(distances.square().sum())
        if spread < least:
            least, best = spread, groups
    order = torch.stack([(best == group).int().argmax() + len(points) * (best != group).all() for group in range(k)])
    return order.argsort().argsort()[best]


def distance_loss(maps: Float[Tensor, "b k h w"]) -> Float[Tensor, " b"]:
    """Dis: squared distance of each position from the map's peak, times the map there, summed over an image's maps.

    Small if each map is compact. Distances are fractions of the sides.

    Source: Zheng et al., ICCV 2017, section 3.2, Dis.

    Differs: there in positions, so that the weight of Div would depend on the resolution.

    >>> distance_loss(torch.tensor([[[[1.0, 0.0, 0.5, 0.0]]]])).item()
    0.125
    """
    h, w = maps.shape[2:]
    y, x = ((torch.arange(n, device=maps.device, dtype=maps.dtype) + 0.5) / n for n in (h, w))
    index = maps.flatten(2).argmax(2)
    squared = (y - y[index // w][..., None]).square()[..., None] + (x - x[index % w][..., None]).square()[..., None, :]
    return (maps * squared).sum((1, 2, 3))


def diversity_loss(maps: Float[Tensor, "b k h w"], margin: float = 0.02) -> Float[Tensor, " b"]:
    """Div: each map times (the largest of the other maps - `margin`), summed over an image's positions and maps.

    Small if no two maps are large at the same position.

    Source: Zheng et al., ICCV 2017, section 3.2, Div.

    >>> apart, same = torch.eye(2).reshape(1, 2, 1, 2), torch.ones(1, 2, 1, 2)
    >>> diversity_loss(apart, 0.25).item(), diversity_loss(same, 0.25).item()
    (-0.5, 3.0)
    """
    k = maps.shape[1]
    own = torch.eye(k, dtype=torch.bool, device=maps.device)[None, :, :, None, None]
    others = maps[:, None].masked_fill(own, -torch.inf).amax(2)
    return (maps * (others - margin)).sum((1, 2, 3))


class PartGates(nn.Module):
    """Maps of k parts: the features weighted by k nets that see their mean, summed over channels, of length 1.

    >>> PartGates(8, 2)(torch.ones(1, 8, 3, 3)).square().sum((2, 3)).round(decimals=3).tolist()
    [[1.0, 1.0]]
    """

    def __init__(self, channels: int, k: int) -> None:
        super().__init__()
        self.nets = nn.ModuleList(
            nn.Sequential(nn.Linear(channels, channels), nn.Tanh(), nn.Linear(channels, channels), nn.Sigmoid())
            for _ in range(k)
        )

    def channel_weights(self, features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k c"]:
        """Share of each channel in each part, between 0 and 1."""
        pooled = features.mean((2, 3))
        return torch.stack([net(pooled) for net in self.nets], 1)

    def forward(
        self, features: Float[Tensor, "b c h w"], weights: Float[Tensor, "b k c"] | None = None
    ) -> Float[Tensor, "b k h w"]:
        """The maps; with `weights`, of these instead of `channel_weights`."""
        weights = self.channel_weights(features) if weights is None else weights
        sums = torch.bmm(weights, features.flatten(2)).relu()
        return nn.functional.normalize(sums, dim=2).unflatten(2, features.shape[2:])


@register("ma_cnn")
class MultiAttention(nn.Module):
    """Pools a feature map into the vectors of k parts; a part is a group of channels that peak at the same places.

    A small net per part weighs the channels by what the image shows. The part's map is the weighted sum of the
    channels, its vector the sum over positions of the features times the map. The child `gate` returns the k maps,
    which are not negative and have length 1.

    Training, by `gates`:

    - "losses": in the first `warm` epochs the gates stay as they are. Then the channels are grouped by where they peak
      in the training images, each gate is set to one group, and two losses go on side by side: the gates learn by Dis
      and Div alone, everything else by the labels alone.
    - "grouping": the gates stay at their groups.
    - "labels": no groups and no losses; the gates learn from the labels like other blocks: the control.

    `sl.fit` and `sightline train` do all this. In a loop of your own, call `prepare` once and add `own_loss`.

    Args:
        channels: channels of the feature map, at least k.
        k: number of parts; the paper has 2 and 4.
        gates: what trains them, see above.
        warm: epochs before the grouping, which needs features that have learned something.
        balance: weight of Div beside Dis.
        margin: of Div.

    Raises:
        ValueError: fewer than 2 parts, more parts than channels, an unknown `gates`, a negative `warm`.

    Source: Zheng et al., "Learning Multi-Attention Convolutional Neural Network for Fine-Grained Image Recognition",
    ICCV 2017, sections 3.1 and 3.2. `margin` is the paper's as remembered; its text was not at hand.

    Differs: maps have length 1, as in ports of the code; the paper has a sigmoid, which is above 0.5 wherever a
    feature is. Dis is in fractions of the sides here and in positions there: on a square map of n positions a
    `balance` of 2.0 weighs Div as 2.0 * n does there. One linear layer reads all vectors, where the paper has a
    classifier for each part. The paper alternates between the two losses; here each step takes both, each on its own
    parameters. The gates are set to their groups, not trained towards them: the group is the same for every image.
    Networks on crops at the peaks are left out.

    >>> block = MultiAttention(8, k=2)
    >>> block(torch.zeros(2, 8, 5, 7)).shape
    torch.Size([2, 16])
    """

    grouped: Tensor
    maps: Float[Tensor, "b k h w"] | None = None
    """Of the last forward in training mode, with a gradient to the gates alone, until `own_loss` has used them."""

    def __init__(
        self,
        channels: int,
        *,
        k: int = 2,
        gates: Teacher = "losses",
        warm: int = 3,
        balance: float = 2.0,
        margin: float = 0.02,
    ) -> None:
        super().__init__()
        check_choice("gates", gates, get_args(Teacher))
        if not 2 <= k <= channels:
            raise ValueError(f"expected k from 2 to {channels}, the number of channels, got {k}; the paper has 2 and 4")
        if warm < 0:
            raise ValueError(f"expected warm of 0 or more epochs, got {warm}")
        self.out_channels = k * channels
        self.gates: Teacher = gates
        self.warm = warm
        self.balance = balance
        self.margin = margin
        self.gate = PartGates(channels, k)
        self.register_buffer("grouped", torch.tensor(False))

    def forward(self, features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b kc"]:
        """The k vectors of each image, one after the other."""
        if self.training and self.gates != "labels":
            weights = self.gate.channel_weights(features.detach())
            self.maps = self.gate(features.detach(), weights)
            maps = self.gate(features, weights.detach())
        else:
            self.maps = None
            maps = self.gate(features)
        return torch.bmm(maps.flatten(2), features.flatten(2).mT).flatten(1)

    def own_loss(self, logits: Float[Tensor, "b n"], labels: Int[Tensor, " b"]) -> Float[Tensor, ""]:
        """Dis + balance * Div of the last forward in training mode; 0 before the grouping and without "losses"."""
        maps, self.maps = self.maps, None
        # no gradient before the grouping: with one of zero, weight decay would move the gates
        if maps is None or self.gates != "losses" or not self.grouped:
            return logits.new_zeros(())
        return (distance_loss(maps) + self.balance * diversity_loss(maps, self.margin)).mean()

    def is_due(self, epoch: int, epochs: int) -> bool:
        """Whether the channels are grouped before this epoch, counted from 0: after `warm`, or before the last one."""
        return self.gates != "labels" and epoch == min(self.warm, epochs - 1)

    @torch.no_grad()
    def prepare(self, features: Iterable[Float[Tensor, "_ c h w"]], seed: int = 0) -> None:
        """Group the channels by their peaks in these features of the training images, and set each gate to a group.

        Raises:
            ValueError: all channels peak at the same places.
        """
        peaks = torch.cat([peak_positions(batch).transpose(0, 1).flatten(1) for batch in features], 1)
        groups = k_means(peaks, len(self.gate.nets), seed)
        for number, net in enumerate(self.gate.nets):
            last: Any = net.get_submodule("2")
            last.weight.zero_()
            last.bias.copy_(torch.where(groups == number, _SURE, -_SURE))
        self.grouped.fill_(True)

    def __getstate__(self) -> dict[str, Any]:
        """State for copies and files, without the tensors of the last forward's graph."""
        return self.__dict__ | {"maps": None}
