"""The torchmetrics face of every score here: the mean of its per-image values."""

from collections.abc import Callable
from inspect import signature
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric


class PerImageMean(Metric):
    """Mean over all images seen of a function that gives one value per image; NaN values are counted as undefined.

    Of a function that gives a row of k values per image, the best of the k means: one setting for all images.

    `update` takes what the function takes, by position or by keyword, and ignores keywords that the function does not
    name, so that several metrics share one `MetricCollection`. Options of the function go to the constructor.
    """

    function: ClassVar[Callable[..., Any]]
    sentence: ClassVar[str] = ""
    """What the best `{method}` of a table does, with its `{score}`, in plain words.

    What is no more than a test or a description ranks nothing: its `higher_is_better` is None, and the sentence of a
    test says what is wrong with the `{methods}` that fail it, by a mean clearly above 0.5.
    """
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
        self.sum_name, self.count_name, self.undefined_name = (
            f"{type(self).__name__}_{state}" for state in ("sum", "count", "undefined")
        )
        for name in (self.sum_name, self.count_name, self.undefined_name):
            self.add_state(name, default=torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, *inputs: Any, **named: Any) -> None:
        """Add the images of one batch."""
        values = self.function(*inputs, **{k: v for k, v in named.items() if k in self.wanted}, **self.options).double()
        defined = ~values.isnan()
        setattr(self, self.sum_name, getattr(self, self.sum_name) + values.nansum(0))
        setattr(self, self.count_name, getattr(self, self.count_name) + defined.sum(0))
        setattr(self, self.undefined_name, getattr(self, self.undefined_name) + (~defined).sum(0))

    def compute(self) -> Tensor:
        """Mean of the defined values; NaN if there is none."""
        means = getattr(self, self.sum_name) / getattr(self, self.count_name)
        return means.amin() if self.higher_is_better is False else means.amax()
