"""Layers by type or by a test, in the order of the model's modules."""

from collections.abc import Callable, Collection

from torch import nn


def find_layer_types_recursive(model: nn.Module, layer_types: Collection[type]) -> list[nn.Module]:
    """All layers of exactly these types.

    >>> find_layer_types_recursive(nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU()), [nn.ReLU])
    [ReLU()]
    """
    return find_layer_predicate_recursive(model, lambda layer: type(layer) in layer_types)


def find_layer_predicate_recursive(model: nn.Module, predicate: Callable[[nn.Module], bool]) -> list[nn.Module]:
    """All layers that pass the test, but the model itself."""
    return [layer for layer in model.modules() if layer is not model and predicate(layer)]
