"""The content of the page of a study."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sightline.evaluation import Example


class Cell(NamedTuple):
    """A text of a table, and the number that its column is sorted by; NaN comes last."""

    text: str
    value: float = math.nan


@dataclass(frozen=True, kw_only=True)
class Table:
    """Lines of cells by column; the first column names the line."""

    caption: str
    columns: dict[str, bool]
    """Name -> whether the highest comes first when it is sorted."""
    lines: list[dict[str, Cell]]


@dataclass(frozen=True, kw_only=True)
class Effect:
    """A row of the dot plot: single differences, their mean and its interval."""

    name: str
    values: Sequence[float]
    mean: float
    low: float
    high: float
    """NaN where there is no interval."""
    holds: bool
    """After correction."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """The page's part about one data set."""

    name: str
    """Empty where there is only one."""
    answers: Mapping[str, str]
    """Question -> the sentence that answers it, out of `sentences`."""
    sentences: Sequence[str]
    pictured: Mapping[str, Sequence[Example]]
    """Network -> the same first images with its own map and the center map, where they were kept."""
    tables: Sequence[Table]
    effects: Sequence[Effect]
    """Differences in percentage points."""
    cost: Mapping[str, float]
    """Network -> millions of multiply-adds per image."""
    accuracy: Mapping[str, float]
    """Network -> percent."""
    controls: Collection[str]

    @property
    def foremost(self) -> list[str]:
        """The controls and the most accurate, 5 at most: more names do not fit on the scatter."""
        best = sorted(self.accuracy, key=lambda name: -self.accuracy[name])
        return list(dict.fromkeys([*(name for name in best if name in self.controls), *best]))[:5]
