"""The tables of the page: methods by metrics, pairs of methods, agreement, and the confusion of classes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from sightline.evaluation import Curve, Evaluation, Score
from sightline.evaluation.conclusions import compared
from sightline.evaluation.findings import DOUBTS, GAPS
from sightline.evaluation.ranking import LEVEL
from sightline.facts import LEVELS, Finding, Interval
from sightline.metrics.classification import ClassQuality

Array = np.ndarray

LARGEST = 24
"""Classes up to which the page shows all of them at once: the confusion matrix as counts, the mean maps unfolded."""
MANY = 8
"""Methods, metrics or sentences above which the page folds away what would take several screens."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """One metric of the methods-by-metrics table."""

    scores: dict[str, Score]
    """By method."""
    best: str | None
    """See `best`."""
    failed: tuple[str, ...]
    """The methods that fail this test."""
    low: float
    high: float
    """Values between which the intervals of the column are drawn."""

    def at(self, value: float) -> float:
        """Where a value lies between `low` and `high`, in percent."""
        return 100 * (value - self.low) / (self.high - self.low)


def column(evaluation: Evaluation, metric: str) -> Column:
    """One metric as the table shows it."""
    scores = {score.method: score for score in evaluation.scores if score.metric == metric}
    ends = [end for score in scores.values() for end in (score.interval.low, score.interval.high)]
    ends = [end for end in (*ends, evaluation.chance.get(metric, math.nan)) if math.isfinite(end)] or [0.0]
    margin = 0.05 * (max(ends) - min(ends)) or 0.5
    return Column(
        scores=scores,
        best=best(evaluation, metric),
        failed=evaluation.failed.get(metric, ()),
        low=min(ends) - margin,
        high=max(ends) + margin,
    )


def best(evaluation: Evaluation, metric: str) -> str | None:
    """The method with the best mean, if it beats every control that is defined for enough images, and chance.

    None without such controls: there is nothing to be better than.
    """
    standing = evaluation.standings.get(metric)
    is_compared = compared(evaluation, metric) & {*evaluation.controls}
    return standing.best if standing and is_compared and not standing.unbeaten else None


def grouped(findings: Sequence[Finding]) -> dict[str, list[Finding]]:
    """Findings under headings, in order; up to `MANY` of them under none.

    >>> grouped([Finding("best", "cam is best."), Finding("verdict", "3 of 9 maps of cam are flat.")])
    {'': ['cam is best.', '3 of 9 maps of cam are flat.']}
    """
    if len(findings) <= MANY:
        return {"": list(findings)} if findings else {}
    groups: dict[str, list[Finding]] = {"What was found": [], "What to distrust": [], "What is missing": []}
    for finding in findings:
        doubt, gap = finding.kind in DOUBTS, finding.kind in GAPS
        groups["What to distrust" if doubt else "What is missing" if gap else "What was found"].append(finding)
    return {title: group for title, group in groups.items() if group}


def doubts(evaluation: Evaluation) -> list[tuple[str, str, str, int]]:
    """(method, verdict, level, number of maps), controls last, the gravest level first."""
    rows = [
        (method, verdict, level, count)
        for method, verdicts in evaluation.verdict_levels.items()
        for verdict, levels in verdicts.items()
        for level, count in levels.items()
    ]
    return sorted(rows, key=lambda row: (row[0] in evaluation.controls, -LEVELS.index(row[2])))


@dataclass(frozen=True, kw_only=True)
class Lead:
    """How the best method of a metric compares with another one."""

    other: str
    difference: Interval
    """The best minus the other."""
    adjusted: float
    outcome: str


def leads(evaluation: Evaluation, metric: str) -> list[Lead]:
    """The best method of a metric against each other method and control, the closest first."""
    if metric not in evaluation.standings:
        return []
    best, sign = evaluation.standings[metric].best, 1 if evaluation.higher_is_better[metric] else -1
    rows: list[Lead] = []
    for pair in evaluation.pairs(metric):
        if best not in (pair.method, pair.other):
            continue
        gap, other = pair.difference, pair.other
        if best == pair.other:
            gap, other = Interval(value=-gap.value, low=-gap.high, high=-gap.low, n=gap.n), pair.method
        outcome = "cannot be told apart"
        if not math.isfinite(gap.value + pair.adjusted):
            outcome = "–"
        elif pair.adjusted < LEVEL:
            outcome = "better" if sign * gap.value > 0 else "worse"
        rows.append(Lead(other=other, difference=gap, adjusted=pair.adjusted, outcome=outcome))

    def distance(row: Lead) -> float:
        return sign * row.difference.value if math.isfinite(row.difference.value) else math.inf

    return sorted(rows, key=distance)


def along(curve: Curve) -> list[float]:
    """Its values with 0, 25, 50, 75 and 100 % of the pixels changed; NaN where it has none.

    >>> along(Curve(shares=np.array([0.0, 1.0]), mean=np.array([1.0, 0.0]), low=np.zeros(2), high=np.zeros(2)))
    [1.0, 0.75, 0.5, 0.25, 0.0]
    """
    defined = np.isfinite(curve.shares + curve.mean)
    if not defined.any():
        return [math.nan] * 5
    return np.interp([0, 0.25, 0.5, 0.75, 1], curve.shares[defined], curve.mean[defined]).tolist()


def area(curve: Curve) -> float:
    """Under its mean; NaN if a point is missing."""
    return float(np.trapezoid(curve.mean, curve.shares))


def foremost(evaluation: Evaluation, most: int = 6) -> list[str]:
    """The methods to draw in color, controls left out, by the mean of their places in all charts of curves."""
    places: dict[str, list[int]] = {}
    for kind, curves in evaluation.curves.items():
        sign = -1 if kind == "insertion" else 1
        areas = {name: sign * area(curve) for name, curve in curves.items() if name not in evaluation.controls}
        ranked = sorted((name for name in areas if math.isfinite(areas[name])), key=lambda name: areas[name])
        for place, name in enumerate(ranked):
            places.setdefault(name, []).append(place)
    return sorted(places, key=lambda name: sum(places[name]) / len(places[name]))[:most]


def extremes(names: Sequence[str], table: Float[Array, "k k"], among: Sequence[str]) -> list[tuple[str, str, float]]:
    """The pairs with one `among` them that have the lowest and the highest value; one or none if there are no more.

    >>> extremes("abc", np.array([[1, 0.2, 0.9], [0.2, 1, np.nan], [0.9, np.nan, 1]]), "abc")
    [('a', 'b', 0.2), ('a', 'c', 0.9)]
    """
    pairs = [
        (a, b, float(table[i, j]))
        for i, a in enumerate(names)
        for j, b in enumerate(names)
        if i < j and (a in among or b in among) and math.isfinite(table[i, j])
    ]
    ends = [min(pairs, key=lambda pair: pair[2]), max(pairs, key=lambda pair: pair[2])] if pairs else []
    return list(dict.fromkeys(ends))


def means(evaluation: Evaluation, metric: str) -> dict[str, float]:
    """Method -> its value in the table."""
    return {score.method: score.interval.value for score in evaluation.scores if score.metric == metric}


def value_of(evaluation: Evaluation, metric: str, method: str, image: str) -> float:
    """Score of one image; NaN where it has none, or where two images have this name."""
    names = [str(name) for name in evaluation.per_image["name"]]
    values = evaluation.per_image.get(f"{metric}/{method}")
    return float(values[names.index(image)]) if values and names.count(image) == 1 else math.nan


def row_shares(confusion: Int[Array, "c c"]) -> Float[Array, "c c"]:
    """Each row of counts as shares of its class; NaN for a class without images.

    >>> row_shares(np.array([[3, 1], [0, 0]])).tolist()
    [[0.75, 0.25], [nan, nan]]
    """
    totals = confusion.sum(1, keepdims=True).astype(float)
    return confusion / np.where(totals > 0, totals, np.nan)


@dataclass(frozen=True, kw_only=True)
class ClassRow:
    """How the images of one class were classified."""

    name: str
    images: int
    right: int
    mistaken_for: str | None
    """The most frequent wrong answer; None where there is none."""
    mistaken: int
    """How often it was given."""
    quality: ClassQuality | None
    """Precision, recall with its interval, F1, where they are known."""


def per_class(
    classes: tuple[str, ...], confusion: Int[Array, "c c"], quality: Sequence[ClassQuality] = ()
) -> list[ClassRow]:
    """One row per class that has images, the least recognized first.

    >>> per_class(("cat", "dog"), np.array([[3, 0], [1, 1]]))[0]
    ClassRow(name='dog', images=2, right=1, mistaken_for='cat', mistaken=1, quality=None)
    """
    rows: list[ClassRow] = []
    for i in np.flatnonzero(confusion.sum(1)).tolist():
        wrong = confusion[i] * (np.arange(len(classes)) != i)
        rows.append(
            ClassRow(
                name=classes[i],
                images=int(confusion[i].sum()),
                right=int(confusion[i, i]),
                mistaken_for=classes[wrong.argmax()] if wrong.any() else None,
                mistaken=int(wrong.max()),
                quality=quality[i] if i < len(quality) else None,
            )
        )
    return sorted(rows, key=lambda row: row.right / row.images)
