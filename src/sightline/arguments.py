"""Fills a function's arguments by name.

A parameter without default is a need: the caller has it ready under that name. A parameter with a default is an option.
"""

from collections.abc import Callable, Iterable, Mapping
from inspect import Parameter, Signature, signature
from typing import Any

from sightline.facts import current_name


def needs(function: Callable[..., Any]) -> frozenset[str]:
    """Names of the parameters without default.

    >>> def weighted(maps, masks, power=1.0): ...
    >>> sorted(needs(weighted)), sorted(options(weighted))
    (['maps', 'masks'], ['power'])
    """
    return frozenset(p.name for p in signature(function).parameters.values() if p.default is p.empty)


def options(function: Callable[..., Any]) -> frozenset[str]:
    """Names of the parameters with a default."""
    return frozenset(signature(function).parameters) - needs(function)


def check_needs(function: Callable[..., Any], available: Iterable[str], what: str) -> None:
    """Check that a function needs only what is available.

    Raises:
        ValueError: it needs something else.

    >>> check_needs(lambda mask: mask, ["maps", "masks"], "inputs")
    Traceback (most recent call last):
    ValueError: expected inputs out of maps, masks, got 'mask'
    """
    available = [*available]
    if unknown := {name for name in needs(function) if current_name(name) not in available}:
        raise ValueError(f"expected {what} out of {', '.join(available)}, got {min(unknown)!r}")


def named_in(function: Callable[..., Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Those values that a function has a parameter for.

    >>> named_in(lambda maps, power=1.0: maps, {"maps": 3, "masks": 4})
    {'maps': 3}
    """
    parameters = signature(function).parameters
    return {name: value for name, value in values.items() if name in parameters}


def checked_options(
    function: Callable[..., Any], given: Mapping[str, Any], name: str, error: type[Exception] = ValueError
) -> dict[str, Any]:
    """Options for a function by their current names.

    Raises:
        ValueError (or `error`): the function has no such option.

    >>> checked_options(lambda maps, normalize=True: maps, {"normalise": False}, "weighted")
    {'normalize': False}
    >>> checked_options(lambda maps, power=1.0: maps, {"scale": 2.0}, "weighted")
    Traceback (most recent call last):
    ValueError: expected options of weighted out of: power, got 'scale'
    """
    choices = options(function)
    current = {key if key in choices else current_name(key): value for key, value in given.items()}
    if unknown := set(current) - choices:
        raise error(f"expected options of {name} out of: {', '.join(sorted(choices)) or 'none'}, got {min(unknown)!r}")
    return current


def signature_with_options(call: Callable[..., Any], *functions: Callable[..., Any]) -> Signature:
    """The signature of a method `call(self, ..., **options)`, with the options of functions spelled out.

    >>> def call(self, maps, **options): ...
    >>> signature_with_options(call, lambda masks, power=1.0: masks)
    <Signature (maps, *, power=1.0)>
    """
    own = [p for p in signature(call).parameters.values() if p.name != "self" and p.kind is not p.VAR_KEYWORD]
    listed = [p for function in functions for p in signature(function).parameters.values() if p.default is not p.empty]
    return Signature([*own, *(p.replace(kind=Parameter.KEYWORD_ONLY) for p in listed)])
