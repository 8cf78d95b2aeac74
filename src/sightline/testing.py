"""Toy models whose maps and scores can be computed by hand, and images with planted evidence."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sightline.facts import old_names
from sightline.planted import COLORS as COLORS
from sightline.planted import PLANTED as PLANTED
from sightline.planted import EitherModel as EitherModel
from sightline.planted import PatchColorModel as PatchColorModel
from sightline.planted import TwoPartsModel as TwoPartsModel
from sightline.planted import planted as planted


class LinearModel(nn.Module):
    """Logits are the inner products of the image with one weight image per class.

    Its deletion and insertion curves are straight sums, and weight x image is the exact explanation.

    >>> LinearModel(torch.ones(2, 1, 2, 2))(torch.ones(1, 1, 2, 2)).tolist()
    [[4.0, 4.0]]
    """

    def __init__(self, weight: Float[Tensor, "n c h w"]) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n"]:
        """Inner products."""
        return torch.einsum("bchw,nchw->bn", images, self.weight)


class ConstantModel(nn.Module):
    """The same logits for every image: no map of it is meaningful, and every curve is flat.

    >>> ConstantModel(torch.tensor([0.0, 1.0]))(torch.ones(2, 3, 2, 2)).tolist()
    [[0.0, 1.0], [0.0, 1.0]]
    """

    def __init__(self, logits: Float[Tensor, " n"]) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n"]:
        """The constant."""
        return self.logits.expand(len(images), -1) + 0 * images.flatten(1).sum(1, keepdim=True)


class PooledModel(nn.Module):
    """Identity features, global average pooling, one linear layer: the net on which CAM is exact.

    >>> PooledModel(torch.eye(3))(torch.ones(1, 3, 2, 2)).tolist()
    [[1.0, 1.0, 1.0]]
    """

    def __init__(self, weight: Float[Tensor, "n c"]) -> None:
        super().__init__()
        self.features = nn.Identity()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(weight.shape[1], weight.shape[0])
        self.head.weight = nn.Parameter(weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n"]:
        """Linear layer on the mean color."""
        return self.head(self.pool(self.features(images)).flatten(1))


class _SoftmaxOfRed(nn.Module):
    def forward(self, features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 1 h w"]:
        red = features[:, :1]
        return red.flatten(1).softmax(1).reshape(red.shape)


class _AttendedMean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = _SoftmaxOfRed()

    def forward(self, features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c"]:
        return (self.gate(features) * features).sum((2, 3))


class PlantedAttention(nn.Module):
    """Attention is the softmax of the red channel, the logits are the attended color: the map is known in advance.

    >>> PlantedAttention()(torch.ones(1, 3, 2, 2)).tolist()
    [[1.0, 1.0, 1.0]]
    """

    def __init__(self) -> None:
        super().__init__()
        self.pool = _AttendedMean()

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3"]:
        """Attended color."""
        return self.pool(images)


__getattr__ = old_names("sightline.testing")
