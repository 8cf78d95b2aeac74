"""Which method is best under a metric, and what it reliably beats."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import combinations, product
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Shaped

from sightline.evaluation.result import Comparison, Curve, Score, Standing
from sightline.facts import Interval
from sightline.metrics.agreement import correlation, ranks, reliability
from sightline.metrics.uncertainty import Paired, mean_interval, mean_intervals, paired_test, paired_tests

Array = np.ndarray

UNDEFINED_FRACTION = 0.1
"""Fraction of undefined images above which a method is not compared."""
ALIKE = 0.5
"""Rank correlation with the map of a shuffled model, or of another class, above which a method fails."""
LEVEL = 0.05
"""Corrected p below which one method is called better than another."""

Values = Mapping[str, Float[Array, " n"]]
"""Method -> one value per image under one metric, NaN where undefined."""


def rank(
    table: Mapping[str, Values],
    higher_is_better: Mapping[str, bool | None],
    controls: Collection[str],
    chance: Mapping[str, float],
    groups: Shaped[Array, " n"] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """The fields of `Evaluation` that follow from the values per image, `table[metric]`."""
    scores: list[Score] = []
    standings: dict[str, Standing] = {}
    pairs: list[Comparison] = []
    ranking = {metric: up for metric in table if (up := higher_is_better[metric]) is not None}
    for metric, values in table.items():
        intervals = mean_intervals(np.stack(list(values.values()), 1), groups, seed)
        for (method, column), interval in zip(values.items(), intervals, strict=True):
            undefined = int(np.isnan(column).sum())
            scores.append(Score(method=method, metric=metric, interval=interval, undefined=undefined))
        if metric not in ranking:
            continue
        given: dict[str, Any] = {"groups": groups, "seed": seed}
        paired = compare(values, **given)
        units = len(next(iter(values.values()))) if groups is None else len(np.unique(groups))
        pairs += [] if paired is None else comparisons(metric, paired, units)
        given |= {"higher_is_better": ranking[metric], "chance": chance.get(metric), "paired": paired}
        standing = standing_of(values, list(controls), **given)
        if standing is not None:
            standings[metric] = standing
    compared = {
        metric: {
            method: column if _is_compared(column) else np.full_like(column, np.nan) for method, column in v.items()
        }
        for metric, v in table.items()
    }
    means = np.array([[mean(column) for column in compared[metric].values()] for metric in ranking]).T
    return {
        "scores": tuple(scores),
        "standings": standings,
        "comparisons": tuple(pairs),
        "reliability": {
            metric: reliability(
                {method: compared[metric][method] for method in compared[metric] if method not in controls}
            )
            for metric in standings
        },
        "metric_agreement": metric_agreement(means, list(ranking.values())) if len(ranking) > 1 else None,
    }


def failing(
    table: Mapping[str, Values],
    asked: Mapping[str, Collection[str]],
    groups: Shaped[Array, " n"] | None = None,
    seed: int = 0,
) -> dict[str, tuple[str, ...]]:
    """Test -> those of the methods asked whose values in `table[test]` lie reliably above `ALIKE`."""

    def fails(values: Array) -> bool:
        return _is_compared(values) and _lies_beyond(values, ALIKE, True, groups, seed)

    return {test: tuple(method for method in methods if fails(table[test][method])) for test, methods in asked.items()}


def mean(values: Float[Array, " n"]) -> float:
    """Mean of the defined values; NaN if there is none."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else np.nan


def _is_compared(values: Float[Array, " n"]) -> bool:
    return bool(np.isnan(values).mean() <= UNDEFINED_FRACTION)


def _lies_beyond(values: Array, bound: float, above: bool, groups: Array | None, seed: int) -> bool:
    """Whether the interval of the mean lies beyond a bound, and the sign-flip test agrees."""
    interval = mean_interval(values, groups, seed)
    beyond = interval.low > bound if above else interval.high < bound
    return beyond and paired_test(values - bound, groups, seed) < LEVEL


def compare(values: Values, *, groups: Shaped[Array, " n"] | None = None, seed: int = 0) -> Paired | None:
    """Paired tests between all methods; None if fewer than two can be compared."""
    compared = {method: column for method, column in values.items() if _is_compared(column)}
    return paired_tests(compared, groups, seed) if len(compared) > 1 else None


def comparisons(metric: str, paired: Paired, n: int) -> Iterator[Comparison]:
    """Each pair of methods once."""
    for i, j in combinations(range(len(paired.names)), 2):
        difference, low, high, p, adjusted = (
            float(table[i, j]) for table in (paired.difference, paired.low, paired.high, paired.p, paired.adjusted)
        )
        yield Comparison(
            metric=metric,
            method=paired.names[i],
            other=paired.names[j],
            difference=Interval(value=difference, low=low, high=high, n=n),
            p=p,
            adjusted=adjusted,
        )


def standing_of(
    values: Values,
    controls: Sequence[str] = (),
    *,
    higher_is_better: bool = True,
    chance: float | None = None,
    groups: Shaped[Array, " n"] | None = None,
    seed: int = 0,
    paired: Paired | None = None,
) -> Standing | None:
    """Who is best in a metric, from its values per image (NaN where undefined); None if no method can be compared.

    Methods and controls that are undefined for more than a tenth of the images are not compared. The best has the
    highest mean of those that no other beats image by image. It beats `chance` if its interval lies beyond and the
    sign-flip test agrees. `paired`: the result of `compare`, if it exists already.

    >>> hard = np.random.default_rng(0).normal(size=50)  # images differ more than methods do
    >>> noise = np.tile([0.3, -0.3], 25)
    >>> standing_of({"a": hard + 0.1, "b": hard, "c": hard + 0.05 + noise, "edges": hard}, ["edges"])
    Standing(best='a', tied=('c',), unbeaten=())
    """
    sign = 1 if higher_is_better else -1
    means = {
        method: sign * float(np.nanmean(column))
        for method, column in values.items()
        if method not in controls and _is_compared(column)
    }
    if not means:
        return None
    paired = paired or compare(values, groups=groups, seed=seed)

    def beats(one: str, other: str) -> bool:
        if paired is None:
            return False
        at = paired.names.index(one), paired.names.index(other)
        return bool(sign * paired.difference[at] > 0 and paired.adjusted[at] < LEVEL)

    unbeaten = [method for method in means if not any(beats(other, method) for other in means if other != method)]
    best = max(unbeaten or means, key=lambda method: means[method])
    beats_chance = chance is not None and _lies_beyond(values[best], chance, higher_is_better, groups, seed)
    equal = [control for control in controls if _is_compared(values[control]) and not beats(best, control)]
    return Standing(
        best=best,
        tied=tuple(method for method in means if method != best and not beats(best, method)),
        unbeaten=(*equal, *(["chance"] if chance is not None and not beats_chance else [])),
    )


def curve_of(
    fractions: Float[Array, "b n"], scores: Float[Array, "b n"], groups: Shaped[Array, " b"] | None, seed: int
) -> Curve | None:
    """Mean curve with its band, images without one left out; None where there is none."""
    defined = np.isfinite(scores).all(1)
    if not defined.any():
        return None
    points = mean_intervals(scores[defined], None if groups is None else groups[defined], seed)
    mean, low, high = np.array([(point.value, point.low, point.high) for point in points]).T
    return Curve(shares=fractions[defined].mean(0), mean=mean, low=low, high=high)


def metric_agreement(means: Float[Array, "methods metrics"], higher_is_better: Sequence[bool]) -> Float[Array, "m m"]:
    """Rank correlation between metrics over methods; NaN where fewer than three methods have both.

    >>> metric_agreement(np.array([[1.0, 9.0], [2.0, 7.0], [3.0, 6.0]]), [True, False]).round(9).tolist()
    [[1.0, 1.0], [1.0, 1.0]]
    """
    oriented = torch.from_numpy((means * np.where(higher_is_better, 1.0, -1.0)).T)
    agreement = np.full((len(oriented),) * 2, np.nan)
    for i, j in product(range(len(oriented)), repeat=2):
        pair = oriented[[i, j]]
        pair = pair[:, pair.isfinite().all(0)]
        if pair.shape[1] > 2:
            agreement[i, j] = correlation(*ranks(pair))
    return agreement
