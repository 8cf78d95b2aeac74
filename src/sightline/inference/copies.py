"""Copies of any model."""

import copy
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sightline.inference.operations import Operation, Operations

Model = TypeVar("Model", bound=nn.Module)


def copy_of(model: Model) -> Model:
    """A deep copy with its hooks, even of a model that PyTorch refuses to copy after a forward.

    Tensors with a graph that a forward leaves in the model (`torch.nn.utils.weight_norm`, `spectral_norm`, `prune`) are
    copied without it, and objects that cannot be copied (locks, open files) are shared.

    >>> from torch.nn.utils.prune import identity
    >>> layer = identity(nn.Linear(2, 2), "weight")
    >>> layer.weight.is_leaf, copy_of(layer).weight.is_leaf
    (False, True)
    """
    with _WithoutGraphs():
        try:
            return copy.deepcopy(model)
        except (TypeError, NotImplementedError):
            shared: dict[int, Any] = {}
            for module in model.modules():
                shared |= {id(value): value for value in tree_leaves(vars(module)) if not _can_be_copied(value)}
            return copy.deepcopy(model, shared)


def copy_on_cpu(model: Model) -> Model:
    """A copy to be sent to another process, which may have no GPU, or another one."""
    return copy_of(model).to("cpu")


class _WithoutGraphs(Operations):
    def on(self, operation: Operation) -> Any:
        if operation.func is Tensor.__deepcopy__ and not operation.args[0].is_leaf:
            return operation.args[0].detach().clone()
        return operation()


def _can_be_copied(value: Any) -> bool:
    if isinstance(value, Tensor | nn.Module):
        return True
    try:
        copy.deepcopy(value)
    except (TypeError, NotImplementedError):
        return False
    return True
