"""The facts that a metric declares, and its torchmetrics face: the mean of its per-image values."""

from collections.abc import Callable
from inspect import signature
from string import Formatter
from types import ModuleType
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from sightline.arguments import needs

Chance = float | Callable[[np.ndarray], float]
"""The value that a map without knowledge is expected to reach: a number, or a function of the areas of the masks."""
INPUTS = frozenset({"model", "images", "targets", "maps", "masks", "explain"})
"""What a metric of maps may need."""
Function = TypeVar("Function", bound=Callable[..., Any])


_DECLARED: dict[Any, dict[str, Any]] = {}


def metric(
    better: Literal["higher", "lower", "neither"],
    meaning: str = "",
    *,
    chance: Chance | None = None,
    explanations: int = 0,
) -> Callable[[Function], Function]:
    """Declare a function that gives one value per image as a metric.

    Its parameters without a default are what it needs, out of `model`, `images`, `targets`, `maps`, `masks` and
    `explain`.

    Args:
        better: "neither" for a test or a description, by which methods are not ranked.
        meaning: what it measures, in a few words that follow its name in sentences. That of a test is a sentence: what
            is wrong with the `{methods}` that fail it by a mean clearly above 0.5.
        chance: see `Chance`; None where there is no such value.
        explanations: how often the metric explains each image.

    Raises:
        ValueError: a placeholder in `meaning` other than the `{methods}` of a test.
    """
    up = {"higher": True, "lower": False}.get(better)
    named = {name for _, name, _, _ in Formatter().parse(meaning) if name is not None}
    if named - ({"methods"} if up is None else set()):
        raise ValueError(
            f"expected meaning= in a few words, with {{methods}} for those that fail a test, got {meaning!r}; say what "
            "the metric measures"
        )
    facts = {"higher_is_better": up, "meaning": meaning, "is_test": bool(named)}
    facts |= {"chance": chance, "explanations": explanations}

    def declared(function: Function) -> Function:
        _DECLARED[function] = facts
        return function

    return declared


class PerImageMean(Metric):
    """Mean over all images seen of a function that gives one value per image; NaN values are counted as undefined.

    For a function that gives a row of k values per image, the best of the k means: one setting for all images.

    `update` takes what the function takes, by position or by keyword, and ignores keywords that the function does not
    name, so that several metrics can share one `MetricCollection`. Options of the function go to the constructor.
    """

    function: ClassVar[Callable[..., Any]]
    meaning: ClassVar[str] = ""
    """See `metric`."""
    is_test: ClassVar[bool] = False
    """Whether methods fail it by a mean clearly above 0.5."""
    chance: ClassVar[Any] = None
    """See `metric`; a `Chance` or None."""
    explanations: ClassVar[int] = 0
    """See `metric`."""
    full_state_update = False
    is_differentiable = False

    def __init__(self, **options: Any) -> None:
        super().__init__()
        wanted = signature(self.function).parameters
        if unknown := set(options) - set(wanted):
            raise TypeError(
                f"expected options of {type(self).__name__} out of {', '.join(wanted)}, got {min(unknown)!r}"
            )
        self.options = options
        self.wanted = frozenset(wanted)
        # MetricCollection merges metrics whose states are equal after the first batch, so no two may share a name
        self.states = [f"{type(self).__name__}_{state}" for state in ("sum", "count", "undefined")]
        for name in self.states:
            self.add_state(name, default=torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, *inputs: Any, **named: Any) -> None:
        """Add the images of one batch."""
        values = self.function(*inputs, **{k: v for k, v in named.items() if k in self.wanted}, **self.options).double()
        defined = ~values.isnan()
        for name, more in zip(self.states, (values.nansum(0), defined.sum(0), (~defined).sum(0)), strict=True):
            setattr(self, name, getattr(self, name) + more)

    def compute(self) -> Tensor:
        """Mean of the defined values; NaN if there is none."""
        total, count, _ = (getattr(self, name) for name in self.states)
        means = total / count
        return means.amin() if self.higher_is_better is False else means.amax()


def mean_of(function: Callable[..., Any], name: str) -> type[PerImageMean]:
    """The torchmetrics class of a declared function.

    >>> @metric("lower")
    ... def spread(maps): return maps.amax((1, 2, 3)) - maps.amin((1, 2, 3))
    >>> Spread = mean_of(spread, "Spread")
    >>> Spread.higher_is_better, Spread()(torch.tensor([[[[3.0, 1.0]]]])).item()
    (False, 2.0)
    """
    described = {"__module__": function.__module__, "__doc__": f"Mean `{function.__name__}`."}
    return type(name, (PerImageMean,), described | _DECLARED[function] | {"function": staticmethod(function)})


def metrics_in(*modules: ModuleType) -> dict[str, type[PerImageMean]]:
    """The metrics of maps that modules declare, by the names of their functions."""
    classes = [value for module in modules for value in vars(module).values() if isinstance(value, type)]
    metrics = [value for value in classes if issubclass(value, PerImageMean) and value is not PerImageMean]
    return {metric.function.__name__: metric for metric in metrics if needs(metric.function) <= INPUTS}
