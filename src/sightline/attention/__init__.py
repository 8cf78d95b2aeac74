"""Attention blocks: plain modules whose child `gate` returns the weights, so that any hook reads the learned map."""

from sightline.attention.pooling import CompatibilityGate, LearnToPayAttention

__all__ = ["CompatibilityGate", "LearnToPayAttention"]
