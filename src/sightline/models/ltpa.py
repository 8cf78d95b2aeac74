"""What the networks of "Learn To Pay Attention" share: attended levels, the global vector, heads, initialization.

Source: Jetley et al., "Learn To Pay Attention", ICLR 2018, sections 3 and 4.1; the authors' Torch7 code.
"""

import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sightline.attention.pooling import Compat, LearnToPayAttention, Norm, Project

Head = Literal["concat", "indep"]


def scaled(channels: int, width: float) -> int:
    """Channels of a layer in a network `width` times as wide, at least 1."""
    if not 0 < width < math.inf:
        raise ValueError(f"expected width above 0 (1 is the paper's), got {width}")
    return max(1, round(width * channels))


def initialize(model: nn.Module) -> None:
    """Draw the convolutions from N(0, sqrt(2 / (k * k * outputs))), bias 0; linear layers keep PyTorch's, as in Torch7.

    Source: He et al., "Delving Deep into Rectifiers", ICCV 2015, equation 14; the authors' code.

    Differs: the authors' u is a convolution with one output, hence from N(0, sqrt(2)): its softmax starts with a single
    position and learns slowly. Ours is a linear layer.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def with_gradient(x: Tensor, factor: float) -> Tensor:
    """The same values with their gradient multiplied by `factor`."""
    return x.detach() + factor * (x - x.detach())


def global_vector(channels: int, dropout: float = 0.5) -> nn.Sequential:
    """From the last feature map to the global vector g: the maximum of all positions, Dropout, Linear (FC-1)."""
    layers: dict[str, nn.Module] = {
        "pool": nn.AdaptiveMaxPool2d(1),
        "flatten": nn.Flatten(),
        "dropout": nn.Dropout(dropout),
    }
    return nn.Sequential(OrderedDict(layers, linear=nn.Linear(channels, channels)))


def prepared(channels: int, official: bool, dropout: float) -> nn.Sequential:
    """Layers before the classifier of a vector: BatchNorm, ReLU, Dropout as in the authors' code, or none."""
    return nn.Sequential(nn.BatchNorm1d(channels), nn.ReLU(), nn.Dropout(dropout)) if official else nn.Sequential()


class ConcatHead(nn.Module):
    """One linear classifier on the concatenated vectors.

    >>> ConcatHead([8, 4], 3)([torch.zeros(2, 8), torch.zeros(2, 4)]).shape
    torch.Size([2, 3])
    """

    def __init__(self, channels: list[int], num_classes: int, *, official: bool = True, dropout: float = 0.5) -> None:
        super().__init__()
        self.prepare = nn.ModuleList(prepared(c, official, dropout) for c in channels)
        self.linear = nn.Linear(sum(channels), num_classes)

    def forward(self, vectors: list[Tensor]) -> Float[Tensor, "b n"]:
        """Logits."""
        return self.linear(torch.cat([step(v) for step, v in zip(self.prepare, vectors, strict=True)], dim=1))


class IndepHead(nn.Module):
    """One linear classifier per vector; the logits are the log of their mean softmax probability.

    Differs: the authors' code sums log-probabilities (two levels) or logits (three levels).

    >>> IndepHead([8, 4], 3)([torch.zeros(2, 8), torch.zeros(2, 4)]).shape
    torch.Size([2, 3])
    """

    def __init__(self, channels: list[int], num_classes: int, *, official: bool = True, dropout: float = 0.5) -> None:
        super().__init__()
        self.prepare = nn.ModuleList(prepared(c, official, dropout) for c in channels)
        self.linear = nn.ModuleList(nn.Linear(c, num_classes) for c in channels)

    def forward(self, vectors: list[Tensor]) -> Float[Tensor, "b n"]:
        """Logits."""
        levels = zip(self.prepare, self.linear, vectors, strict=True)
        logs = torch.stack([linear(step(vector)).log_softmax(1) for step, linear, vector in levels])
        return logs.logsumexp(0) - math.log(len(vectors))


class Attended(nn.Module):
    """A trunk that Learn To Pay Attention reads at some levels, and a head for the pooled vectors.

    Args:
        features: the trunk; its children run one after the other.
        levels: for each level, the child of `features` whose output is pooled, and its number of channels.
        fc1: from the trunk's output to the global vector g; None: no g, for a `compat` of "none".
        channels: length of g.
        num_classes: number of logits.
        compat, norm, project: as in `LearnToPayAttention`.
        head: "concat", one classifier on all attended vectors; "indep", one for each, probabilities averaged.
        official_head: BatchNorm, ReLU and Dropout of each vector before the last linear layer; False: only that layer.
        head_dropout: rate of that Dropout.
        average_branch_grads: average gradients where paths meet, as the authors' code does, instead of summing them.
    """

    def __init__(
        self,
        features: nn.Sequential,
        levels: Mapping[str, tuple[str, int]],
        fc1: nn.Sequential | None,
        channels: int,
        num_classes: int,
        *,
        compat: Compat,
        norm: Norm,
        head: Head,
        project: Project,
        official_head: bool,
        head_dropout: float,
        average_branch_grads: bool,
    ) -> None:
        super().__init__()
        self.features = features
        self.fc1 = fc1
        self.reads = tuple(child for child, _ in levels.values())
        self.default_layer = f"features.{self.reads[-1]}"
        blocks = {
            level: LearnToPayAttention(local, channels, compat=compat, norm=norm, project=project)
            for level, (_, local) in levels.items()
        }
        self.attention = nn.ModuleDict(blocks)
        vectors = [block.out_channels for block in blocks.values()]
        build = {"concat": ConcatHead, "indep": IndepHead}[head]
        self.head = build(vectors, num_classes, official=official_head, dropout=head_dropout)
        self.average_branch_grads = average_branch_grads
        initialize(self)

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b n"]:
        """Logits."""
        x = images
        read: list[Tensor] = []
        last = len(self.features) - 1
        for index, (name, layer) in enumerate(self.features.named_children()):
            x = layer(x)
            if name in self.reads:
                if self.average_branch_grads and index < last:
                    x = with_gradient(x, 1 / 2)
                read.append(x)
        g = None if self.fc1 is None else self.fc1(x)
        if self.average_branch_grads and g is not None:
            g = with_gradient(g, 1 / len(read))
        return self.head([block(features, g) for block, features in zip(self.attention.values(), read, strict=True)])
