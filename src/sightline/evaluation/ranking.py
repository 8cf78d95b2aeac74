"""Which method is best under a metric, and what it reliably beats."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Shaped

from sightline.evaluation.result import Curve, Score, Standing
from sightline.metrics.agreement import correlation, ranks, reliability
from sightline.metrics.uncertainty import Comparison, mean_interval, mean_intervals, paired_test, paired_tests

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
    agreed: dict[str, float] = {}
    pairs: list[Comparison] = []
    means: list[list[float]] = []
    ups: list[bool] = []
    given: dict[str, Any] = {"groups": groups, "seed": seed}
    for metric, values in table.items():
        intervals = mean_intervals(np.stack(list(values.values()), 1), **given)
        for (method, column), interval in zip(values.items(), intervals, strict=True):
            undefined = int(np.isnan(column).sum())
            scores.append(Score(method=method, metric=metric, interval=interval, undefined=undefined))
        up = higher_is_better[metric]
        if up is None:
            continue
        ups.append(up)
        compared = {method: column for method, column in values.items() if _is_compared(column)}
        means.append([mean(column) if method in compared else np.nan for method, column in values.items()])
        paired = paired_tests(compared, **given)
        pairs += [replace(pair, metric=metric) for pair in paired]
        bound = chance.get(metric)
        standing = standing_of(values, list(controls), higher_is_better=up, chance=bound, paired=paired, **given)
        if standing is not None:
            standings[metric] = standing
            agreed[metric] = reliability({m: column for m, column in compared.items() if m not in controls})
    return {
        "scores": tuple(scores),
        "standings": standings,
        "comparisons": tuple(pairs),
        "reliability": agreed,
        "metric_agreement": metric_agreement(np.array(means).T, ups) if len(ups) > 1 else None,
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


def wins(pairs: Iterable[Comparison], higher_is_better: bool) -> set[tuple[str, str]]:
    """(winner, loser) of each pair that can be told apart."""
    return {
        (pair.method, pair.other) if (pair.difference.value > 0) == higher_is_better else (pair.other, pair.method)
        for pair in pairs
        if pair.adjusted < LEVEL
    }


def standing_of(
    values: Values,
    controls: Sequence[str] = (),
    *,
    higher_is_better: bool = True,
    chance: float | None = None,
    groups: Shaped[Array, " n"] | None = None,
    seed: int = 0,
    paired: Sequence[Comparison] | None = None,
) -> Standing | None:
    """Who is best in a metric, from its values per image (NaN where undefined); None if no method can be compared.

    Methods and controls that are undefined for more than a tenth of the images are not compared. The best has the
    highest mean of those that no other beats image by image. A method beats `chance` if its interval lies beyond and
    the sign-flip test agrees. `paired`: the tests of all that can be compared, if they exist already.

    >>> hard = np.random.default_rng(0).normal(size=50)  # images differ more than methods do
    >>> noise = np.tile([0.3, -0.3], 25)
    >>> standing_of({"a": hard + 0.1, "b": hard, "c": hard + 0.05 + noise, "edges": hard}, ["edges"])
    Standing(best='a', tied=('c',), unbeaten=(), above_chance=())
    """
    sign = 1 if higher_is_better else -1
    compared = {method: column for method, column in values.items() if _is_compared(column)}
    means = {method: sign * mean(column) for method, column in compared.items() if method not in controls}
    if not means:
        return None
    pairs = paired_tests(compared, groups, seed) if paired is None else paired
    won = wins(pairs, higher_is_better)
    unbeaten = [method for method in means if not any((other, method) in won for other in means)]
    best = max(unbeaten or means, key=lambda method: means[method])

    def beats_chance(method: str) -> bool:
        return chance is not None and _lies_beyond(values[method], chance, higher_is_better, groups, seed)

    equal = [control for control in controls if control in compared and (best, control) not in won]
    ahead = tuple(filter(beats_chance, means))
    return Standing(
        best=best,
        tied=tuple(method for method in means if method != best and (best, method) not in won),
        unbeaten=(*equal, *(["chance"] if chance is not None and best not in ahead else [])),
        above_chance=ahead,
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
