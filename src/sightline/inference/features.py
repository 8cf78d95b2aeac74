"""The features of a classifier: what its last linear layer gets."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sightline.inference.outputs import logits_of


def features_of(model: nn.Module, images: Float[Tensor, "b c *grid"]) -> Float[Tensor, "b d"]:
    """The input of the `nn.Linear` that makes the logits, in the mode in which the model is; gradients flow through it.

    Raises:
        ValueError: the logits do not come straight out of an `nn.Linear`.

    >>> from sightline.testing import PooledModel
    >>> features_of(PooledModel(torch.ones(3, 2)), torch.tensor([1.0, 5.0])[None, :, None, None])
    tensor([[1., 5.]])
    """
    calls: list[tuple[Tensor, Tensor]] = []

    def remember(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls.append((inputs[0], output))

    hooks = [part.register_forward_hook(remember) for part in model.modules() if isinstance(part, nn.Linear)]
    try:
        logits = logits_of(model(images))
    finally:
        for hook in hooks:
            hook.remove()
    # by identity where possible: NaN does not equal itself
    if not calls or not (calls[-1][1] is logits or torch.equal(calls[-1][1].to(logits), logits)):
        raise ValueError(
            f"expected a model whose logits come straight out of an nn.Linear, got {type(model).__name__}; wrap its "
            "head in one"
        )
    return calls[-1][0]
