"""Recognizes a model that is what it was when its forward was analyzed, so that its operations need not be compared.

A forward runs the same operations as before if it runs the same code on the same values, and no value of a tensor
decides what runs. The code of torch, torchvision, timm and sightline is taken to read nothing but attributes of the
model and names of the modules of its classes, all of which are compared here; models with other code are compared by
their operations.
"""

import os
import sys
from abc import ABC
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property, partial
from itertools import chain, compress
from operator import attrgetter, is_, itemgetter
from types import FunctionType, MethodType, NoneType
from typing import Any, Generic

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module

from sightline.inference import is_unchanged, modules_of, values_of, version_of

_LIBRARIES = {"torch", "torchvision", "timm", "sightline"}
_ADDED = {"jaxtyping", "transformers"}  # wraps functions in tests; adds a function to nn.Module
_STANDARD = sys.stdlib_module_names - {"unittest"}  # a mock may do anything
_STANDARD_FOLDER = os.path.dirname(os.__file__)
_BASES = {ABC, Generic}
_HOLDERS = (staticmethod, classmethod, property, cached_property, partial, MethodType)
_PLAIN = {int, float, bool, str, NoneType, torch.dtype, torch.device}
_CONTAINERS = {dict, OrderedDict, list, tuple, set, torch.Size}
_MEMBERS = ("_parameters", "_buffers", "_modules")
_NAMESPACES = (torch, F, Tensor, torch.special, torch.linalg)


@dataclass(frozen=True, eq=False)
class Structure:
    """All that decides which operations the forward of a model runs."""

    classes: list[type]
    names: list[str]
    """Of the attributes of all modules."""
    types: list[type]
    is_empty: list[bool]
    """Which of the attributes are empty containers, as those of hooks are."""
    is_plain: list[bool]
    plain: list[Any]
    """Values of these attributes."""
    is_tensor: list[bool]
    """Which of the attributes are tensors that are neither parameters nor buffers."""
    shapes: list[torch.Size]
    """Of these tensors."""
    members: Any
    code: list[tuple[Mapping[str, Any], list[Any]]]
    """The classes and their modules, and what these held."""
    functions: list[tuple[Any, str, Any]]
    """Functions of PyTorch by name."""
    versions: list[int]

    def was_left_alone(self, model: nn.Module) -> bool:
        """Whether a forward has changed nothing in the model, and written to none of its tensors."""
        return is_unchanged(model) and _versions(model) == self.versions

    def is_that_of(self, model: nn.Module) -> bool:
        """Whether the model and the code that it runs are still the same."""
        modules = modules_of(model)
        if [*map(type, modules)] != self.classes or _is_watched():
            return False
        attributes = [*map(vars, modules)]
        values = values_of(attributes)
        return (
            [*map(type, values)] == self.types
            and [*chain.from_iterable(attributes)] == self.names
            and not any(compress(values, self.is_empty))
            and [*compress(values, self.is_plain)] == self.plain
            and [value.shape for value in compress(values, self.is_tensor)] == self.shapes
            and _members(attributes) == self.members
            and all(len(space) == len(code) and all(map(is_, space.values(), code)) for space, code in self.code)
            and all(getattr(space, name, None) is function for space, name, function in self.functions)
        )

    def calling(self, functions: Iterable[Any]) -> "Structure | None":
        """The same with the functions of PyTorch that the forward calls; None if one has no name."""
        places: list[tuple[Any, str, Any]] = []
        for function in dict.fromkeys(functions):
            is_attribute = function.__name__ == "__get__"
            one = function.__self__ if is_attribute else function
            spaces = [space for space in _NAMESPACES if getattr(space, one.__name__, None) is one]
            if not spaces:
                return None
            places += [(space, one.__name__, one) for space in spaces]
        return replace(self, functions=places)


def structure_of(model: nn.Module) -> Structure | None:
    """The structure of a model; None if something about it cannot be compared."""
    modules = modules_of(model)
    classes = [*map(type, modules)]
    bases = dict.fromkeys(chain.from_iterable(kind.__mro__[:-1] for kind in classes))
    if not all(map(_is_known, bases)) or _is_watched():
        return None
    spaces = [*map(vars, bases), *(vars(sys.modules[name]) for name in {kind.__module__ for kind in bases}), vars(F)]
    attributes = [*map(vars, modules)]
    names, values = [*chain.from_iterable(attributes)], values_of(attributes)
    types = [*map(type, values)]
    is_tensor = [kind in {Tensor, nn.Parameter} for kind in types]
    others = [name not in _MEMBERS and not tensor for name, tensor in zip(names, is_tensor, strict=True)]
    is_empty = [other and type(value) in _CONTAINERS and not value for other, value in zip(others, values, strict=True)]
    is_plain = [other and not empty for other, empty in zip(others, is_empty, strict=True)]
    plain = [*compress(values, is_plain)]
    if not (all(map(_can_be_compared, plain)) and all(map(_has_known_functions, spaces))):
        return None
    return Structure(
        classes=classes,
        names=names,
        types=types,
        is_empty=is_empty,
        is_plain=is_plain,
        plain=deepcopy(plain),
        is_tensor=is_tensor,
        shapes=[value.shape for value in compress(values, is_tensor)],
        members=_members(attributes),
        code=[(space, [*space.values()]) for space in spaces],
        functions=[],
        versions=_versions(model),
    )


def _versions(model: nn.Module) -> list[int]:
    attributes = values_of(map(vars, modules_of(model)))
    tensors = chain(model.parameters(), model.buffers(), (value for value in attributes if isinstance(value, Tensor)))
    return [version_of(tensor) for tensor in tensors]


def _members(attributes: Sequence[dict[str, Any]]) -> tuple[list[Any], ...]:
    """Parameters, buffers and children: how many, their names and types, and the shapes of tensors."""
    members = [*chain.from_iterable(map(itemgetter(*_MEMBERS), attributes))]
    values = values_of(members)
    shapes = [value.shape for value in values if isinstance(value, Tensor)]
    return [*map(len, members)], [*chain.from_iterable(members)], [*map(type, values)], shapes


def _can_be_compared(value: Any) -> bool:
    """Whether equal values of this kind are interchangeable."""
    kind = type(value)
    if kind in _CONTAINERS:
        return all(map(_can_be_compared, value.values() if isinstance(value, dict) else value))
    return kind in _PLAIN or isinstance(value, Enum | type)


def _is_known(kind: type) -> bool:
    """Whether a class is the one of that name in a module whose code is known."""
    try:
        module = vars(sys.modules[kind.__module__])
        is_there = attrgetter(kind.__qualname__)(sys.modules[kind.__module__]) is kind
    except (AttributeError, KeyError):
        return False
    return kind in _BASES or (is_there and _is_of_library(module))


def _has_known_functions(space: Mapping[str, Any]) -> bool:
    return all(is_known_code(value) for value in space.values() if callable(value) or isinstance(value, _HOLDERS))


def is_known_code(value: Any) -> bool:
    """Whether calling this runs code of the libraries known here, or of Python, and nothing else that can be seen."""
    match value:
        case property():
            inside = [value.fget, value.fset, value.fdel]
        case staticmethod() | classmethod() | MethodType():
            inside = [value.__func__]
        case cached_property() | partial():
            inside = [value.func]
        case FunctionType():
            inside = [vars(value).get("__wrapped__")]
            space = value.__globals__
            if not (_is_of_library(space) or _is_of_python(space) or _root(space) in _ADDED):
                return False
        case type():
            return True  # makes objects; those in the model are looked at themselves
        case _:
            inside = [getattr(value, "__wrapped__", None)]
            root = str(type(value).__module__).partition(".")[0]
            if root not in _LIBRARIES | _STANDARD | _ADDED:
                return False
    return all(map(is_known_code, filter(None, inside)))


def _root(module: Mapping[str, Any]) -> str:
    return str(module.get("__name__")).partition(".")[0]


def _is_of_library(module: Mapping[str, Any]) -> bool:
    return _root(module) in _LIBRARIES


def _is_of_python(module: Mapping[str, Any]) -> bool:
    return _root(module) in _STANDARD and str(module.get("__file__", _STANDARD_FOLDER)).startswith(_STANDARD_FOLDER)


def _is_watched() -> bool:
    """Whether hooks on all modules, or modes, see what the forward does and may change it."""
    return bool(
        torch_module._has_any_global_hook()  # pyright: ignore[reportPrivateUsage]
        or torch._C._len_torch_function_stack()  # pyright: ignore[reportPrivateUsage]
        or torch._C._len_torch_dispatch_stack()  # pyright: ignore[reportPrivateUsage]
    )
