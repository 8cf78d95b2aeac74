"""Attention blocks by name; each registers itself where it is defined."""

from collections.abc import Callable
from typing import TypeVar

from torch import nn

__all__ = ["ATTENTION", "register"]

Block = TypeVar("Block", bound=Callable[..., nn.Module])

ATTENTION: dict[str, Callable[..., nn.Module]] = {}
"""Blocks by name, built for a number of channels. Those with `out_channels` are poolings, the others keep the shape."""


def register(name: str) -> Callable[[Block], Block]:
    """Decorator that makes a block available by name: to `insert`, recipes and the command line."""

    def add(block: Block) -> Block:
        ATTENTION[name] = block
        return block

    return add


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Refuse an option whose value is not one of the choices.

    >>> check_choice("norm", "max", ("softmax", "sigmoid"))
    Traceback (most recent call last):
    ValueError: expected norm to be one of softmax, sigmoid; got 'max'
    """
    if value not in choices:
        raise ValueError(f"expected {name} to be one of {', '.join(map(str, choices))}; got {value!r}")
