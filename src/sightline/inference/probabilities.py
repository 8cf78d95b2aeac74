"""Whether outputs are probabilities, and of which logits: by the operations that made them, else by their values."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

Kind = Literal["logits", "probabilities", "softmax", "sigmoid"]
"""What outputs are: logits, or the probability of one class among all ("softmax") or of each label for itself
("sigmoid"); "probabilities" leaves open which of the two."""

_LINKS = {name: name for name in ("softmax", "log_softmax", "sigmoid")} | {"expit": "sigmoid"}
_PICKS = set("getitem select narrow index_select chunk split unbind amax amin max min".split())
_MOVES = _PICKS | set(
    "squeeze unsqueeze flatten unflatten view reshape contiguous clone to type float double half bfloat16 permute "
    "transpose movedim flip expand cpu cuda".split()
)
_BOUNDS = set("clamp clip clamp_min clamp_max nan_to_num".split())
_JOINS = set("stack cat concat concatenate hstack vstack dstack column_stack".split())
_MULTIPLIES, _DIVIDES = {"mul", "multiply"}, {"div", "divide", "true_divide"}
_FOLLOWED = (
    _MOVES | _BOUNDS | _JOINS | _MULTIPLIES | _DIVIDES | set("add sum mean prod maximum minimum rsub log exp".split())
)
_LARGEST_MIXTURE = 3  # dimensions, such as (members, images, classes): a gate on a feature map has more
_ROUNDING = 1e-5
_READ = "The outputs were read as probabilities, so {}; if they are logits, pass output='logits'"
_IN_DOUBT = "All outputs are 0 or 1 and were read as logits; if they are probabilities, pass output='probabilities'"


@dataclass(frozen=True, eq=False)
class _Link:
    """A tensor of probabilities, in one version."""

    version: int
    name: str
    """`softmax`, `log_softmax` or `sigmoid` of `logits()`."""
    logits: Callable[[], Tensor]
    logs: Callable[[], Tensor]
    """Logarithm of the probabilities, exact where they round to 0 or 1."""
    is_mixed: bool = False
    """Whether it is an average or selection of probabilities, so that its kind depends on its values, too."""
    largest: float = 1.0
    """No value can be larger."""

    def mixed(self, logs: Callable[[], Tensor], name: str = "", largest: float | None = None) -> "_Link":
        """The link of a mixture, which has no logits of its own."""
        name = name or self.name
        logits = logs if name == "softmax" else lambda: _log_odds(logs())
        largest = self.largest if largest is None else largest
        return _Link(self.version, name, logits, logs, is_mixed=True, largest=largest)


class Reading(NamedTuple):
    """A model's output as it was read."""

    logits: Float[Tensor, "b n"]
    link: str
    """The function that was undone to get the logits: "softmax", "log_softmax" or "sigmoid"; empty if none was."""
    kind: Kind | None
    """To read further outputs of the model in the same way."""
    notice: str
    """What was decided by the values; empty if nothing was."""


class Probabilities(TorchFunctionMode):
    """Follows each softmax and sigmoid of a forward, and all that is moved, mixed or split from it."""

    def __init__(self) -> None:
        super().__init__()
        self.links: Any = WeakTensorKeyDictionary()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        written: str = getattr(func, "__name__", "")
        name = written.removeprefix("special_").strip("_")
        given, rest = (args[0], args[1:]) if args else (kwargs.get("input"), ())
        if name in _LINKS and isinstance(given, Tensor):
            before = given.clone() if written.endswith("_") else given
            output = func(*args, **kwargs)
            self.links[output] = _link(_LINKS[name], before, output, kwargs.get("dim", rest[0] if rest else None))
            return output
        follow = None
        if name in _FOLLOWED and args and len(self.links):
            in_place = written.endswith("_") and not written.startswith("_")
            follow = self._follow(func, name, given, rest, kwargs, in_place)
        output = func(*args, **kwargs)
        if follow is not None:
            parts = output if isinstance(output, tuple | list) else [output]
            for index, part in enumerate(parts):
                link = follow(part, index) if isinstance(part, Tensor) else None
                if link is not None and (not link.is_mixed or part.ndim <= _LARGEST_MIXTURE):
                    self.links[part] = replace(link, version=version_of(part))
        return output

    def link_of(self, tensor: Any) -> _Link | None:
        """The link of a tensor, unless an in-place operation has made another version of it."""
        link = self.links.get(tensor) if isinstance(tensor, Tensor) and len(self.links) else None
        return link if link is not None and link.version == version_of(tensor) else None

    def _follow(
        self, func: Callable[..., Any], name: str, given: Any, rest: tuple[Any, ...], options: Any, in_place: bool
    ) -> Callable[[Tensor, int], _Link | None] | None:
        """What an operation makes of probabilities, given its output, and which of them; None if none."""
        link = self.link_of(given)
        other = rest[0] if rest else options.get("other")
        if name in _JOINS:
            joined = [self.link_of(one) for one in given] if isinstance(given, list | tuple) else []
            links = [one for one in joined if one is not None and one.name != "log_softmax"]
            if not links or len(links) < len(joined):
                return None
            return lambda output, _: _joined(links, lambda values: func(values, *rest, **options))
        if name in ("max", "min") and isinstance(other, Tensor):
            return None
        if name in _MULTIPLIES | {"add"} and link is None and isinstance(other, Tensor):
            link, other = self.link_of(other), given
        if link is None:
            return None
        if name in _BOUNDS:
            return lambda output, _: link
        if name in _MOVES:

            def again(values: Tensor, index: int) -> Tensor:
                moved = func(values.clone() if in_place else values, *rest, **options)
                return moved[index] if isinstance(moved, tuple | list) else moved

            return lambda output, index: _moved(link, name, output, lambda values: again(values, index))
        if link.name == "log_softmax":
            return (lambda output, _: replace(link, name="softmax")) if name == "exp" else None
        if name == "log":
            return (lambda output, _: replace(link, name="log_softmax")) if link.name == "softmax" else None
        made = _mixed(name, link, self.link_of(other), other, given, rest, options)
        return None if made is None else lambda output, _: made


def _link(name: str, before: Tensor, output: Tensor, dim: Any) -> _Link:
    if name == "sigmoid":
        return _Link(version_of(output), name, lambda: before, lambda: F.logsigmoid(before))
    axis = dim if isinstance(dim, int) else -1
    return _Link(version_of(output), name, lambda: before, lambda: before.log_softmax(axis))


def _moved(link: _Link, name: str, output: Tensor, again: Callable[[Tensor], Tensor]) -> _Link | None:
    if name not in _PICKS or link.name == "sigmoid":
        made = replace(link, logs=lambda: again(link.logs()))
        return replace(made, logits=lambda: again(link.logits())) if not link.is_mixed else link.mixed(made.logs)
    if link.name == "log_softmax":
        return None
    before = link.logits
    classes = before().shape
    is_whole = output.ndim > 1 and output.shape[-1] == classes[-1]
    if not (link.is_mixed or is_whole) and len(classes) == 2 == classes[1]:
        odds = lambda: again(before() - before().flip(1))  # noqa: E731
        return replace(link, name="sigmoid", logits=odds, logs=lambda: F.logsigmoid(odds()))
    return link.mixed(lambda: again(link.logs()), "softmax" if is_whole else "sigmoid")


def _joined(links: Sequence[_Link], join: Callable[[list[Tensor]], Tensor]) -> _Link:
    logs = lambda: join([link.logs() for link in links])  # noqa: E731
    if all(link.name == "sigmoid" and not link.is_mixed for link in links):
        return replace(links[0], logits=lambda: join([link.logits() for link in links]), logs=logs)
    return links[0].mixed(logs, _common(links), max(link.largest for link in links))


def _mixed(
    name: str,
    link: _Link,
    second: _Link | None,
    other: Any,
    given: Any,
    rest: tuple[Any, ...],
    options: Any,
) -> _Link | None:
    """Sums, averages, products, extremes and complements (1 - p), in logarithms."""
    if name in ("sum", "mean", "prod"):
        dims = options.get("dim", rest[0] if rest else None)
        keep = bool(options.get("keepdim", rest[1] if len(rest) > 1 else False))
        if dims is None or options.get("dtype") is not None:
            return None
        if name == "prod":
            return link.mixed(lambda: link.logs().sum(dims, keepdim=keep)) if link.largest <= 1 + _ROUNDING else None
        count = math.prod(given.shape[dim] for dim in ([dims] if isinstance(dims, int) else dims))
        shift = math.log(count) if name == "mean" else 0.0
        largest = link.largest * (1 if name == "mean" else count)
        return link.mixed(lambda: link.logs().logsumexp(dims, keepdim=keep) - shift, largest=largest)
    number = float(other) if isinstance(other, Real) else None
    if name == "rsub":
        if number != 1 or link.largest > 1 + _ROUNDING:
            return None
        if link.name == "sigmoid" and not link.is_mixed:
            return replace(link, logits=lambda: -link.logits(), logs=lambda: F.logsigmoid(-link.logits()))
        return link.mixed(lambda: _log_rest(link.logs()), "sigmoid", 1.0)
    if name in ("maximum", "minimum"):
        if second is None or second.name == "log_softmax":
            return None
        largest = max(link.largest, second.largest)
        return link.mixed(lambda: getattr(torch, name)(link.logs(), second.logs()), _common([link, second]), largest)
    if name == "add":
        if second is None or second.name == "log_softmax" or options:
            return link if number == 0 else None
        logs = lambda: torch.logaddexp(link.logs(), second.logs())  # noqa: E731
        return link.mixed(logs, _common([link, second]), link.largest + second.largest)
    if name not in _MULTIPLIES | _DIVIDES or options:
        return None
    sign = 1 if name in _MULTIPLIES else -1
    if number is not None:
        if number <= 0 or number == 1:
            return link if number == 1 else None
        shift = sign * math.log(number)
        return link.mixed(lambda: link.logs() + shift, largest=link.largest * math.exp(shift))
    if not isinstance(other, Tensor) or other.ndim > _LARGEST_MIXTURE:
        return None
    if second is not None and second.name != "log_softmax" and sign == 1:
        logs = lambda: link.logs() + second.logs()  # noqa: E731
        return link.mixed(logs, _common([link, second]), link.largest * second.largest)
    return link.mixed(lambda: _weighted(link.logs(), other, sign), largest=math.inf)


def _weighted(logs: Tensor, weights: Tensor, sign: int) -> Tensor:
    return logs + sign * weights.to(logs.dtype).log()


def _common(links: Sequence[_Link]) -> str:
    return links[0].name if len({link.name for link in links}) == 1 else "sigmoid"


def read(values: Float[Tensor, "b n"], seen: Probabilities, kind: Kind | None) -> Reading:
    """The logits behind the values; for probabilities without logits, their logarithms, whose softmax they are.

    Without a `kind`, values count as probabilities if a softmax or a sigmoid, or averages and selections of such, made
    them. Values without a visible origin do if all rows lie in [0, 1] and sum to 1, unless all of them are 0 or 1.

    Raises:
        ValueError: the values are not the probabilities that `kind` promises.
    """
    link = seen.link_of(values)
    if kind == "logits":
        return Reading(values, "", kind, "")
    if link is not None and not link.is_mixed:
        return Reading(link.logits(), link.name, "probabilities", "")
    if link is not None and not _agrees(link, values):
        link = None
    asked = kind
    if kind is None or kind == "probabilities":
        kind, notice = _kind_of(values.detach(), link, kind)
    else:
        notice = ""
    if kind == "logits":
        return Reading(values, "", kind, notice)
    if link is not None:
        logs = link.logs()
    else:
        wide = values.to(torch.promote_types(values.dtype, torch.float32))
        logs = wide.clamp(min=torch.finfo(wide.dtype).tiny).log()
    return Reading(logs if kind == "softmax" else _log_odds(logs), kind, kind, "" if asked else notice)


def _kind_of(values: Tensor, link: _Link | None, kind: Kind | None) -> tuple[Kind, str]:
    """The kind of the values, and what to say about it."""
    slack = max(_ROUNDING, 2 * torch.finfo(values.dtype).eps)
    outside = (values < 0) | (values > 1 + slack)  # what is not a number says nothing
    if bool(outside.any()):
        if kind is None:
            return "logits", ""
        low, high = (float(end) for end in values.nan_to_num().aminmax())
        raise ValueError(
            f"expected probabilities from 0 to 1, got {low:.4g} to {high:.4g}; pass output='logits', or leave it out"
        )
    rows = values.double()[values.isfinite().all(1)]
    each = link is not None and link.largest <= 1 + _ROUNDING
    sums_to_one = values.shape[1] > 1 and len(rows) > 0 and bool(((rows.sum(1) - 1).abs() <= slack).all())
    if sums_to_one and kind is None and link is None and bool(((rows == 0) | (rows == 1)).all()):
        return "logits", _IN_DOUBT
    if sums_to_one and not (each and link is not None and link.name == "sigmoid"):
        return "softmax", _READ.format("maps explain the log-probability of the class")
    if each or kind is not None:
        return "sigmoid", _READ.format("maps explain the log-odds of the label, log(p / (1 - p))")
    return "logits", ""


def _agrees(link: _Link, values: Tensor) -> bool:
    """Whether the operations, repeated in logarithms, yield the values."""
    with torch.no_grad():
        again = link.logs().exp()
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
    return 0 if tensor.is_inference() else tensor._version
