"""Attention blocks: plain modules whose child `gate` returns the weights, so that any hook reads the learned map."""

from sightline.attention.alignment import *
from sightline.attention.bags import *
from sightline.attention.bilinear import *
from sightline.attention.channel import *
from sightline.attention.hard import *
from sightline.attention.insertion import *
from sightline.attention.ma_cnn import *
from sightline.attention.parts import *
from sightline.attention.pooling import *
from sightline.attention.registry import *
from sightline.attention.self_attention import *
from sightline.attention.spatial import *
from sightline.attention.transformer import *
from sightline.facts import old_names

__getattr__ = old_names("sightline.attention")
