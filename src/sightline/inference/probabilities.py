"""Decides whether outputs are probabilities, and of which logits, by the operations behind them or by their values."""

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from numbers import Real
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from sightline.inference import operations as ops
from sightline.inference.operations import Operation, Operations

Kind = Literal["logits", "probabilities", "softmax", "sigmoid"]
"""What outputs are: logits, or the probability of one class among all ("softmax") or of each label on its own
("sigmoid"); "probabilities" leaves open which of the two."""

_ACTIVATIONS = {name: name for name in ("softmax", "log_softmax", "sigmoid")} | {"expit": "sigmoid"}
_SELECTIONS = ops.PICKS | ops.EXTREMES
_MOVES = ops.MOVES | ops.EXTREMES
_FOLLOWED = (
    _MOVES
    | ops.BOUNDS
    | ops.MULTIPLICATIONS
    | ops.DIVISIONS
    | set("add sum mean prod maximum minimum rsub log exp".split())
)
_PAIRS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[float, float], float]]] = {
    "maximum": (torch.maximum, max),
    "minimum": (torch.minimum, max),
    "add": (torch.logaddexp, operator.add),
    **dict.fromkeys(ops.MULTIPLICATIONS, (torch.add, operator.mul)),
}
"""Operations on two tensors of probabilities: the same on their logarithms, and the upper bound of the result."""
_LARGEST_MIXTURE = 3  # dimensions, such as (members, images, classes): a gate on a feature map has more
_ROUNDING = 1e-5
_READ = "The outputs were read as probabilities, so {}; if they are logits, pass output='logits'"
_IN_DOUBT = "All outputs are 0 or 1 and were read as logits; if they are probabilities, pass output='probabilities'"


@dataclass(frozen=True, eq=False)
class Origin:
    """The origin of a tensor of probabilities."""

    name: str
    """`softmax`, `log_softmax` or `sigmoid` of `logits()`."""
    logits: Callable[[], Tensor]
    """A mixture has none; here are its `logs` then."""
    logs: Callable[[], Tensor]
    """Logarithm of the probabilities, exact even where they round to 0 or 1."""
    is_mixed: bool = False
    """Whether it is an average or a selection of probabilities, so that its kind also depends on its values."""
    largest: float = 1.0
    """Upper bound of the values."""

    def mixed(self, logs: Callable[[], Tensor], name: str = "", largest: float | None = None) -> "Origin":
        """The origin of a mixture."""
        largest = self.largest if largest is None else largest
        return Origin(name or self.name, logs, logs, is_mixed=True, largest=largest)


class Probabilities(Operations):
    """Follows each softmax and sigmoid of a forward through everything that moves, mixes or splits it."""

    def __init__(self) -> None:
        super().__init__()
        self.origins: Any = WeakTensorKeyDictionary()

    def on(self, operation: Operation) -> Any:
        """The result of the operation; if it holds probabilities, their origin is kept."""
        name, given = operation.name, operation.input
        follow = None
        if name in _ACTIVATIONS and isinstance(given, Tensor):
            before = given.clone() if operation.is_in_place else given
            follow = _activated(_ACTIVATIONS[name], before, operation.argument(1, "dim"))
        elif name in _FOLLOWED and operation.args and len(self.origins):
            follow = self._follow(operation)
        output = operation()
        if follow is not None:
            for index, part in enumerate(output if isinstance(output, tuple | list) else [output]):
                origin = follow if isinstance(follow, Origin) else follow(part, index)
                if origin is not None and (not origin.is_mixed or part.ndim <= _LARGEST_MIXTURE):
                    self.origins[part] = origin, version_of(part)
        return output

    def origin_of(self, tensor: Any) -> Origin | None:
        """The origin of a tensor, unless it was changed in place since."""
        if not isinstance(tensor, Tensor):
            return None
        origin, version = self.origins.get(tensor, (None, 0))
        return origin if version == version_of(tensor) else None

    def _follow(self, operation: Operation) -> Origin | Callable[[Tensor, int], Origin | None] | None:
        """The origin of the operation's outputs, or a function from an output and its number to it; None without."""
        name, given, rest, options = operation.name, operation.args[0], operation.args[1:], operation.kwargs
        origin = self.origin_of(given)
        other = operation.argument(1, "other")
        if name in ops.JOINS:
            origins = [self.origin_of(one) for one in given] if isinstance(given, list | tuple) else []
            probabilities = [one for one in origins if one is not None and one.name != "log_softmax"]
            if not probabilities or len(probabilities) < len(origins):
                return None
            return _joined(probabilities, lambda values: operation.func(values, *rest, **options))
        if name in ("max", "min") and isinstance(other, Tensor):
            return None
        if name in ops.MULTIPLICATIONS | {"add"} and origin is None and isinstance(other, Tensor):
            origin, other = self.origin_of(other), given
        if origin is None:
            return None
        if name in ops.BOUNDS:
            return origin
        if name in _MOVES:

            def again(values: Tensor, index: int) -> Tensor:
                moved = operation.func(values.clone() if operation.is_in_place else values, *rest, **options)
                return moved[index] if isinstance(moved, tuple | list) else moved

            return lambda output, index: _moved(origin, name, output, lambda values: again(values, index))
        if origin.name == "log_softmax":
            return replace(origin, name="softmax") if name == "exp" else None
        if name == "log":
            return replace(origin, name="log_softmax") if origin.name == "softmax" else None
        return _mixed(operation, origin, self.origin_of(other), other)


def _activated(name: str, before: Tensor, dim: Any) -> Origin:
    axis = dim if isinstance(dim, int) else -1
    logs = partial(F.logsigmoid, before) if name == "sigmoid" else partial(before.log_softmax, axis)
    return Origin(name, lambda: before, logs)


def _moved(origin: Origin, name: str, output: Tensor, again: Callable[[Tensor], Tensor]) -> Origin | None:
    if name not in _SELECTIONS or origin.name == "sigmoid":
        logs = lambda: again(origin.logs())  # noqa: E731
        if origin.is_mixed:
            return origin.mixed(logs)
        return replace(origin, logits=lambda: again(origin.logits()), logs=logs)
    if origin.name == "log_softmax":
        return None
    before = origin.logits
    classes = before().shape
    is_whole = output.ndim > 1 and output.shape[-1] == classes[-1]
    if not (origin.is_mixed or is_whole) and len(classes) == 2 == classes[1]:
        odds = lambda: again(before() - before().flip(1))  # noqa: E731
        return replace(origin, name="sigmoid", logits=odds, logs=lambda: F.logsigmoid(odds()))
    return origin.mixed(lambda: again(origin.logs()), "softmax" if is_whole else "sigmoid")


def _joined(origins: Sequence[Origin], join: Callable[[list[Tensor]], Tensor]) -> Origin:
    logs = lambda: join([origin.logs() for origin in origins])  # noqa: E731
    if all(origin.name == "sigmoid" and not origin.is_mixed for origin in origins):
        return replace(origins[0], logits=lambda: join([origin.logits() for origin in origins]), logs=logs)
    return origins[0].mixed(logs, _common(origins), max(origin.largest for origin in origins))


def _mixed(operation: Operation, origin: Origin, second: Origin | None, other: Any) -> Origin | None:
    """Sums, averages, products, extremes and complements (1 - p), in logarithms."""
    name, options = operation.name, operation.kwargs
    if name in ("sum", "mean", "prod"):
        dims = operation.argument(1, "dim")
        keep = bool(operation.argument(2, "keepdim", False))
        if dims is None or options.get("dtype") is not None:
            return None
        if name == "prod":
            is_bounded = origin.largest <= 1 + _ROUNDING
            return origin.mixed(lambda: origin.logs().sum(dims, keepdim=keep)) if is_bounded else None
        count = math.prod(operation.input.shape[dim] for dim in ([dims] if isinstance(dims, int) else dims))
        shift = math.log(count) if name == "mean" else 0.0
        largest = origin.largest * (1 if name == "mean" else count)
        return origin.mixed(lambda: origin.logs().logsumexp(dims, keepdim=keep) - shift, largest=largest)
    number = float(other) if isinstance(other, Real) else None
    if name == "rsub":
        if number != 1 or origin.largest > 1 + _ROUNDING:
            return None
        if origin.name == "sigmoid" and not origin.is_mixed:
            return replace(origin, logits=lambda: -origin.logits(), logs=lambda: F.logsigmoid(-origin.logits()))
        return origin.mixed(lambda: _log_rest(origin.logs()), "sigmoid", 1.0)
    if name in _PAIRS and second is not None and second.name != "log_softmax" and not options:
        combine, bound = _PAIRS[name]
        largest = bound(origin.largest, second.largest)
        return origin.mixed(lambda: combine(origin.logs(), second.logs()), _common([origin, second]), largest)
    if name == "add" and number == 0:
        return origin
    if name not in ops.MULTIPLICATIONS | ops.DIVISIONS or options:
        return None
    sign = 1 if name in ops.MULTIPLICATIONS else -1
    if number is not None:
        if number <= 0 or number == 1:
            return origin if number == 1 else None
        shift = sign * math.log(number)
        return origin.mixed(lambda: origin.logs() + shift, largest=origin.largest * math.exp(shift))
    if not isinstance(other, Tensor) or other.ndim > _LARGEST_MIXTURE:
        return None

    def weighted() -> Tensor:
        logs = origin.logs()
        return logs + sign * other.to(logs.dtype).log()

    return origin.mixed(weighted, largest=math.inf)


def _common(origins: Sequence[Origin]) -> str:
    return origins[0].name if len({origin.name for origin in origins}) == 1 else "sigmoid"


def read(
    values: Float[Tensor, "b n"], seen: Probabilities, kind: Kind | None
) -> tuple[Float[Tensor, "b n"], str, Kind, str]:
    """The logits behind the values; for probabilities without logits, their logarithms, whose softmax they are.

    Returns:
        The logits; the output activation that was undone to get them, "softmax", "log_softmax", "sigmoid" or ""; the
        kind with which to read further outputs in the same way; a notice of what was decided by the values alone.

    Without a `kind`, values are probabilities if they come from a softmax or a sigmoid, or from averages and selections
    of such. Values without a known origin are if all rows lie in [0, 1] and sum to 1, unless all of them are 0 or 1.

    Raises:
        ValueError: the values are not the probabilities that `kind` promises.
    """
    origin = seen.origin_of(values)
    if kind == "logits":
        return values, "", kind, ""
    if origin is not None and not origin.is_mixed:
        return origin.logits(), origin.name, "probabilities", ""
    if origin is not None and not _agrees(origin, values):
        origin = None
    asked, notice = kind, ""
    if kind is None or kind == "probabilities":
        kind, notice = _kind_of(values.detach(), origin, kind)
    if kind == "logits":
        return values, "", kind, notice
    if origin is not None:
        logs = origin.logs()
    else:
        wide = values.to(torch.promote_types(values.dtype, torch.float32))
        logs = wide.clamp(min=torch.finfo(wide.dtype).tiny).log()
    return logs if kind == "softmax" else _log_odds(logs), kind, kind, "" if asked else notice


def _kind_of(values: Tensor, origin: Origin | None, kind: Kind | None) -> tuple[Kind, str]:
    """The kind of the values, and a notice about it."""
    slack = max(_ROUNDING, 2 * torch.finfo(values.dtype).eps)
    if bool((values < 0).any()) or bool((values > 1 + slack).any()):  # False for NaN
        if kind is None:
            return "logits", ""
        low, high = (float(end) for end in values.nan_to_num().aminmax())
        raise ValueError(
            f"expected probabilities from 0 to 1, got {low:.4g} to {high:.4g}; pass output='logits', or leave it out"
        )
    rows = values.double()[values.isfinite().all(1)]
    each = origin is not None and origin.largest <= 1 + _ROUNDING
    sums_to_one = values.shape[1] > 1 and len(rows) > 0 and bool(((rows.sum(1) - 1).abs() <= slack).all())
    if sums_to_one and kind is None and origin is None and bool(((rows == 0) | (rows == 1)).all()):
        return "logits", _IN_DOUBT
    if sums_to_one and not (each and origin is not None and origin.name == "sigmoid"):
        return "softmax", _READ.format("maps explain the log-probability of the class")
    if each or kind is not None:
        return "sigmoid", _READ.format("maps explain the log-odds of the label, log(p / (1 - p))")
    return "logits", ""


def _agrees(origin: Origin, values: Tensor) -> bool:
    """Whether the operations, repeated in logarithms, yield the values."""
    with torch.no_grad():
        again = origin.logs().exp()
    slack = max(_ROUNDING, 2 * torch.finfo(values.dtype).eps)
    return again.shape == values.shape and torch.allclose(
        again.double(), values.detach().double(), rtol=0, atol=slack, equal_nan=True
    )


def _log_rest(logs: Tensor) -> Tensor:
    """log(1 - p) of log(p)."""
    rest = -torch.expm1(logs)
    return rest.clamp(min=torch.finfo(rest.dtype).tiny).log()


def _log_odds(logs: Tensor) -> Tensor:
    return logs - _log_rest(logs)


def version_of(tensor: Tensor) -> int:
    """How often a tensor was changed in place; 0 for tensors of inference mode, which do not count it.

    >>> version_of(torch.zeros(1)), version_of(torch.zeros(1).add_(1))
    (0, 1)
    """
    return 0 if tensor.is_inference() else tensor._version  # not documented: see tests/test_torch_features.py
