"""The features that a classifier computes before its last linear layer."""

from collections.abc import Callable, Generator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sightline.inference.outputs import run


@contextmanager
def embedder(model: nn.Module) -> Generator[Callable[[Tensor], Float[Tensor, "b d"]]]:
    """A function from images to the inputs of the `nn.Linear` that returns the logits, while the context is open.

    It raises ValueError for a model whose logits do not come straight out of one.

    >>> with embedder(nn.Sequential(nn.Flatten(), nn.Linear(3, 2))) as embed:
    ...     embed(torch.ones(1, 3, 1, 1)).tolist()
    [[1.0, 1.0, 1.0]]
    """
    calls: list[tuple[Tensor, Tensor]] = []

    def remember(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls.append((inputs[0], output))

    def embed(images: Tensor) -> Tensor:
        calls.clear()
        logits = run(model, images)
        if not calls or not torch.equal(calls[-1][1].to(logits), logits):
            raise ValueError(
                f"expected a model whose logits come straight out of an nn.Linear, got {type(model).__name__}; wrap "
                "its head in one"
            )
        return calls[-1][0]

    hooks = [part.register_forward_hook(remember) for part in model.modules() if isinstance(part, nn.Linear)]
    try:
        yield embed
    finally:
        for hook in hooks:
            hook.remove()
