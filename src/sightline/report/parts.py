"""Maps of blocks that pool a feature map into several vectors, each with a map of its own."""

from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sightline.attention import BilinearAttentionPooling, MultiAttention, RepresentativeVectors
from sightline.explainers import attention_maps

POOLINGS = (RepresentativeVectors, BilinearAttentionPooling, MultiAttention)


class PartMaps(NamedTuple):
    """The maps of one such block, and what it pools."""

    maps: Float[Tensor, "b k h w"]
    features: Float[Tensor, "b c h w"]

    @property
    def norms(self) -> Float[Tensor, "b 1 h w"]:
        """Norm of the pooled features at each position."""
        return torch.linalg.vector_norm(self.features, dim=1, keepdim=True)


def attention_and_parts(
    model: nn.Module, images: Float[Tensor, "b c H W"]
) -> tuple[dict[str, Float[Tensor, "b _ _ _"]], dict[str, PartMaps]]:
    """`sightline.attention_maps`, and those of blocks with several maps together with what these pool, by block.

    >>> from sightline.models import create_model
    >>> model = create_model("cifar_resnet", depth=8, attention="brnpa").eval()
    >>> _, parts = attention_and_parts(model, torch.rand(2, 3, 32, 32))
    >>> [(name, part.maps.shape, part.norms.shape) for name, part in parts.items()]
    [('avgpool.attention', torch.Size([2, 3, 8, 8]), torch.Size([2, 1, 8, 8]))]
    """
    features: dict[str, Tensor] = {}

    def keep(name: str, block: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        features[name] = inputs[0].detach()

    poolings = {name: module for name, module in model.named_modules() if isinstance(module, POOLINGS)}
    with ExitStack() as handles:
        for name, block in poolings.items():
            handles.callback(block.register_forward_pre_hook(partial(keep, name)).remove)
        weights = attention_maps(model, images)
    return weights, {name: PartMaps(weights[name], pooled) for name, pooled in features.items()}
