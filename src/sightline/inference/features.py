"""The head of a classifier, its last linear layer, and the features that it gets."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sightline.inference.outputs import logits_of
from sightline.inference.preserve import untouched


class LayerCall(NamedTuple):
    """One run of a layer."""

    layer: nn.Module
    features: Tensor
    """What it got."""
    output: Tensor


def calls_of(
    model: nn.Module, images: Float[Tensor, "b c *grid"], *kinds: type[nn.Module]
) -> tuple[list[LayerCall], Any]:
    """Runs of the layers of these kinds, in the order in which they end, and what the model returns."""
    calls: list[LayerCall] = []

    def remember(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls.append(LayerCall(layer, inputs[0], output))

    hooks = [part.register_forward_hook(remember) for part in model.modules() if isinstance(part, kinds)]
    try:
        return calls, model(images)
    finally:
        for hook in hooks:
            hook.remove()


def features_of(model: nn.Module, images: Float[Tensor, "b c *grid"]) -> Float[Tensor, "b d"]:
    """The input of the `nn.Linear` that makes the logits, in the mode in which the model is; gradients flow through it.

    Raises:
        ValueError: the logits do not come straight out of an `nn.Linear`.

    >>> from sightline.testing import PooledModel
    >>> features_of(PooledModel(torch.ones(3, 2)), torch.tensor([1.0, 5.0])[None, :, None, None])
    tensor([[1., 5.]])
    """
    return _head_call(model, images).features


def head_name(model: nn.Module, images: Float[Tensor, "b c *grid"]) -> str:
    """Dotted name of the `nn.Linear` that makes the logits of these images, whatever was registered behind it.

    Raises:
        ValueError: the logits do not come straight out of an `nn.Linear`.

    >>> head_name(nn.Sequential(nn.Flatten(), nn.Linear(3, 2)), torch.ones(1, 3, 1, 1))
    '1'
    """
    with untouched(model) as net, torch.no_grad():
        head = _head_call(net, images).layer
        return next(name for name, part in net.named_modules() if part is head)


def _head_call(model: nn.Module, images: Tensor) -> LayerCall:
    calls, result = calls_of(model, images, nn.Linear)
    logits = logits_of(result)
    # by identity where possible: NaN does not equal itself
    if not calls or not (calls[-1].output is logits or torch.equal(calls[-1].output.to(logits), logits)):
        raise ValueError(
            f"expected a model whose logits come straight out of an nn.Linear, got {type(model).__name__}; wrap its "
            "head in one"
        )
    return calls[-1]
