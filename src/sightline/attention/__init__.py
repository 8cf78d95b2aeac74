"""Attention blocks: plain modules whose child `gate` returns the weights, so that any hook reads the learned map."""

from sightline.attention import (
    alignment,
    bags,
    bilinear,
    channel,
    hard,
    insertion,
    parts,
    pooling,
    self_attention,
    spatial,
    transformer,
)
from sightline.attention.alignment import *
from sightline.attention.bags import *
from sightline.attention.bilinear import *
from sightline.attention.channel import *
from sightline.attention.hard import *
from sightline.attention.insertion import *
from sightline.attention.parts import *
from sightline.attention.pooling import *
from sightline.attention.registry import ATTENTION, register
from sightline.attention.self_attention import *
from sightline.attention.spatial import *
from sightline.attention.transformer import *
from sightline.facts import old_names

__all__ = ["ATTENTION", "register"]
__all__ += alignment.__all__
__all__ += bags.__all__
__all__ += bilinear.__all__
__all__ += channel.__all__
__all__ += hard.__all__
__all__ += insertion.__all__
__all__ += parts.__all__
__all__ += pooling.__all__
__all__ += self_attention.__all__
__all__ += spatial.__all__
__all__ += transformer.__all__

__getattr__ = old_names("sightline.attention")
