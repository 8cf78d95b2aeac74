"""Attention blocks: plain modules whose child `gate` returns the weights, so that any hook reads the learned map."""

from collections.abc import Callable
from functools import partial

from torch import nn

from sightline.attention.alignment import ALIGNMENT, Attend, NadarayaWatson
from sightline.attention.bags import MILPooling
from sightline.attention.bilinear import BilinearCNN, GeneralizedMean, GlobalAveragePool
from sightline.attention.channel import EfficientChannelAttention, GlobalContext, SqueezeExcite
from sightline.attention.hard import Glimpse, HardAttention, MovingBaseline, reinforce_loss
from sightline.attention.insertion import WithMaps, insert, remove
from sightline.attention.parts import BilinearAttentionPooling, RepresentativeVectors
from sightline.attention.pooling import CompatibilityGate, LearnToPayAttention
from sightline.attention.self_attention import NonLocal, SelfAttention
from sightline.attention.spatial import BAM, CBAM, AttentionGate, ChannelGate, SpatialGate
from sightline.attention.transformer import SpatialTransformer
from sightline.facts import old_names

__all__ = [
    "ALIGNMENT",
    "ATTENTION",
    "BAM",
    "CBAM",
    "Attend",
    "AttentionGate",
    "BilinearAttentionPooling",
    "BilinearCNN",
    "ChannelGate",
    "CompatibilityGate",
    "EfficientChannelAttention",
    "GeneralizedMean",
    "Glimpse",
    "GlobalAveragePool",
    "GlobalContext",
    "HardAttention",
    "LearnToPayAttention",
    "MILPooling",
    "MovingBaseline",
    "NadarayaWatson",
    "NonLocal",
    "RepresentativeVectors",
    "SelfAttention",
    "SpatialGate",
    "SpatialTransformer",
    "SqueezeExcite",
    "WithMaps",
    "insert",
    "reinforce_loss",
    "remove",
]

ATTENTION: dict[str, Callable[..., nn.Module]] = {
    "se": SqueezeExcite,
    "eca": EfficientChannelAttention,
    "gc": GlobalContext,
    "cbam": CBAM,
    "channel_gate": ChannelGate,
    "spatial_gate": SpatialGate,
    "bam": BAM,
    "attention_gate": AttentionGate,
    "self_attention": SelfAttention,
    "non_local": NonLocal,
    "ltpa": partial(LearnToPayAttention, compat="none"),
    "brnpa": RepresentativeVectors,
    "bap": BilinearAttentionPooling,
    "bilinear": BilinearCNN,
    "mil": MILPooling,
    "hard": HardAttention,
    "gap": GlobalAveragePool,
    "gem": GeneralizedMean,
}
"""Blocks by name, made for a number of channels. Those with `out_channels` are poolings, the others keep the shape.

`ltpa` scores positions without a query; inside the networks of its paper the query is the global vector.
"""


__getattr__ = old_names("sightline.attention")
