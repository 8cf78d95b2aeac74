"""What the page counts and compares: the methods-by-metrics table and the confusion of classes."""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from sightline.evaluation import Evaluation, Score

Array = np.ndarray

LARGEST = 24
"""Classes up to which the page shows all of them at once: the confusion matrix as counts, the mean maps unfolded."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """One metric of the methods-by-metrics table."""

    scores: dict[str, Score]
    """By method."""
    best: str | None
    """See `best`."""
    low: float
    high: float
    """Values between which the intervals of the column are drawn."""

    def at(self, value: float) -> float:
        """Where a value lies between `low` and `high`, in percent."""
        return 100 * (value - self.low) / (self.high - self.low)


def column(evaluation: Evaluation, metric: str) -> Column:
    """All that the table shows of one metric."""
    scores = {score.method: score for score in evaluation.scores if score.metric == metric}
    ends = [end for score in scores.values() for end in (score.interval.low, score.interval.high)]
    ends = [end for end in (*ends, evaluation.chance.get(metric, math.nan)) if math.isfinite(end)] or [0.0]
    margin = 0.05 * (max(ends) - min(ends)) or 0.5
    return Column(scores=scores, best=best(evaluation, metric), low=min(ends) - margin, high=max(ends) + margin)


def best(evaluation: Evaluation, metric: str) -> str | None:
    """The method with the best mean, if it beats every control and chance.

    None without controls: there is nothing to be better than.
    """
    standing = evaluation.standings.get(metric)
    return standing.best if standing and evaluation.controls and not standing.unbeaten else None


def row_shares(confusion: Int[Array, "c c"]) -> Float[Array, "c c"]:
    """Each row of counts as shares of its class; NaN for a class without images.

    >>> row_shares(np.array([[3, 1], [0, 0]])).tolist()
    [[0.75, 0.25], [nan, nan]]
    """
    totals = confusion.sum(1, keepdims=True).astype(float)
    return confusion / np.where(totals > 0, totals, np.nan)


@dataclass(frozen=True, kw_only=True)
class ClassRow:
    """What became of the images of one class."""

    name: str
    images: int
    right: int
    mistaken_for: str | None
    """The most frequent wrong answer; None where there is none."""
    mistaken: int
    """How often it was given."""


def per_class(classes: tuple[str, ...], confusion: Int[Array, "c c"]) -> list[ClassRow]:
    """One row per class that has images, the least recognised first.

    >>> per_class(("cat", "dog"), np.array([[3, 0], [1, 1]]))[0]
    ClassRow(name='dog', images=2, right=1, mistaken_for='cat', mistaken=1)
    """
    rows: list[ClassRow] = []
    for i in np.flatnonzero(confusion.sum(1)):
        wrong = confusion[i] * (np.arange(len(classes)) != i)
        rows.append(
            ClassRow(
                name=classes[i],
                images=int(confusion[i].sum()),
                right=int(confusion[i, i]),
                mistaken_for=classes[wrong.argmax()] if wrong.any() else None,
                mistaken=int(wrong.max()),
            )
        )
    return sorted(rows, key=lambda row: row.right / row.images)
