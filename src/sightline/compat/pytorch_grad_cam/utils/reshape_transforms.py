"""From a layer's output to a feature map. `explain` finds the positions of tokens itself; these are for old scripts."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def vit_reshape_transform(
    tensor: Float[Tensor, "b n c"], height: int = 14, width: int = 14
) -> Float[Tensor, "b c h w"]:
    """Patch tokens behind one class token as a grid."""
    return tensor[:, 1:].mT.unflatten(2, (height, width))


def swinT_reshape_transform(
    tensor: Float[Tensor, "b n c"], height: int = 7, width: int = 7
) -> Float[Tensor, "b c h w"]:
    """Patch tokens as a grid."""
    return tensor.mT.unflatten(2, (height, width))


def fasterrcnn_reshape_transform(x: Mapping[str, Float[Tensor, "b c _ _"]]) -> Float[Tensor, "b _ h w"]:
    """All levels of a feature pyramid at the size of the last, as absolute values."""
    size = x["pool"].shape[2:]
    return torch.cat([F.interpolate(level.abs(), size, mode="bilinear") for level in x.values()], 1)
