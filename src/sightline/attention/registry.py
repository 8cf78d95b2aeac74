"""Attention blocks by name; each registers itself where it is defined."""

from collections.abc import Callable
from typing import TypeVar

from torch import nn

Block = TypeVar("Block", bound=Callable[..., nn.Module])

ATTENTION: dict[str, Callable[..., nn.Module]] = {}
"""Blocks by name, built for a number of channels. Those with `out_channels` are poolings, the others keep the shape."""


def register(name: str) -> Callable[[Block], Block]:
    """Decorator that makes a block available by name: to `insert`, recipes and the command line."""

    def add(block: Block) -> Block:
        ATTENTION[name] = block
        return block

    return add
