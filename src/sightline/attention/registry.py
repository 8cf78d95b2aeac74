"""Attention blocks by name; each registers itself where it is defined."""

from collections.abc import Callable, Iterable
from typing import Protocol, TypeVar, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor, nn

__all__ = ["ATTENTION", "Prepared", "WithLoss", "register"]

Block = TypeVar("Block", bound=Callable[..., nn.Module])

ATTENTION: dict[str, Callable[..., nn.Module]] = {}
"""Blocks by name, built for a number of channels. Those with `out_channels` are poolings, the others keep the shape."""


def register(name: str) -> Callable[[Block], Block]:
    """Decorator that makes a block available by name: to `insert`, recipes and the command line."""

    def add(block: Block) -> Block:
        ATTENTION[name] = block
        return block

    return add


@runtime_checkable
class WithLoss(Protocol):
    """A block or network with a loss of its own; `sl.fit` and `sightline train` add it to the loss of the labels.

    A forward in training mode keeps what `own_loss` needs; the latter is called once after each such forward.
    """

    def own_loss(self, logits: Float[Tensor, "b n"], labels: Int[Tensor, " b"]) -> Float[Tensor, ""]:
        """Mean over the images of the last forward in training mode; 0 if there is nothing to learn from it."""
        ...


@runtime_checkable
class Prepared(Protocol):
    """A block that looks at all training images before some epochs; `sl.fit` and `sightline train` show them to it."""

    def is_due(self, epoch: int, epochs: int) -> bool:
        """Whether `prepare` is to be called before this epoch, counted from 0, of so many."""
        ...

    def prepare(self, features: Iterable[Float[Tensor, "b c h w"]], seed: int = 0) -> None:
        """Look at what the block gets from the images, in eval mode and without augmentation, one batch at a time."""
        ...


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Refuse an option whose value is not one of the choices.

    >>> check_choice("norm", "max", ("softmax", "sigmoid"))
    Traceback (most recent call last):
    ValueError: expected norm to be one of softmax, sigmoid; got 'max'
    """
    if value not in choices:
        raise ValueError(f"expected {name} to be one of {', '.join(map(str, choices))}; got {value!r}")
