"""Attention blocks: plain modules whose child `gate` returns the weights, so that any hook reads the learned map."""

from torch import nn

from sightline.attention.pooling import CompatibilityGate, LearnToPayAttention

__all__ = ["ATTENTION", "CompatibilityGate", "LearnToPayAttention"]

ATTENTION: dict[str, type[nn.Module]] = {"ltpa": LearnToPayAttention}
