"""Who is best in a metric, and what can be said of it."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped

from sightline.evaluation.result import Comparison, Curve, Score, Standing
from sightline.facts import Interval
from sightline.metrics.agreement import ranks, reliability
from sightline.metrics.uncertainty import Paired, mean_interval, mean_intervals, paired_test, paired_tests

Array = np.ndarray

UNDEFINED_SHARE = 0.1
"""Of the images; a method with more is not compared."""
ALIKE = 0.5
"""Rank correlation with the map of a shuffled model, or of another class, above which a method fails."""
LEVEL = 0.05
"""Of a corrected p below which one method is said to be better than another."""


@dataclass(frozen=True, kw_only=True)
class League:
    """See the fields of `Evaluation`."""

    scores: tuple[Score, ...]
    standings: dict[str, Standing]
    comparisons: tuple[Comparison, ...]
    reliability: dict[str, float]
    metric_agreement: Float[Array, "m m"] | None


def league(
    table: Mapping[str, Mapping[str, Float[Array, " n"]]],
    higher_is_better: Mapping[str, bool | None],
    controls: Sequence[str],
    *,
    chance: Mapping[str, float],
    groups: Shaped[Array, " n"] | None = None,
    seed: int = 0,
) -> League:
    """All that is said of methods from their values per image, `table[metric][method]`, NaN where undefined."""
    scores: list[Score] = []
    standings: dict[str, Standing] = {}
    pairs: list[Comparison] = []
    for metric, values in table.items():
        intervals = mean_intervals(np.stack(list(values.values()), 1), groups, seed)
        for (method, of), interval in zip(values.items(), intervals, strict=True):
            scores.append(Score(method=method, metric=metric, interval=interval, undefined=int(np.isnan(of).sum())))
        up = higher_is_better[metric]
        if up is None:
            continue
        given: dict[str, Any] = {"groups": groups, "seed": seed}
        paired = compare(values, **given)
        units = len(next(iter(values.values()))) if groups is None else len(np.unique(groups))
        pairs += [] if paired is None else comparisons(metric, paired, units)
        standing = standing_of(values, controls, higher_is_better=up, chance=chance.get(metric), paired=paired, **given)
        if standing is not None:
            standings[metric] = standing
    ranking = {metric: up for metric in table if (up := higher_is_better[metric]) is not None}
    means = np.array(
        [[mean(of) if _is_compared(of) else np.nan for of in table[metric].values()] for metric in ranking]
    ).T
    return League(
        scores=tuple(scores),
        standings=standings,
        comparisons=tuple(pairs),
        reliability={
            metric: reliability({m: of for m, of in table[metric].items() if m not in controls and _is_compared(of)})
            for metric in standings
        },
        metric_agreement=metric_agreement(means, list(ranking.values())) if len(ranking) > 1 else None,
    )


def failing(
    table: Mapping[str, Mapping[str, Float[Array, " n"]]],
    asked: Mapping[str, Collection[str]],
    groups: Shaped[Array, " n"] | None = None,
    seed: int = 0,
) -> dict[str, tuple[str, ...]]:
    """Of each test, those of the methods asked whose values in `table[test]` lie reliably above `ALIKE`."""

    def fails(values: Array) -> bool:
        return _is_compared(values) and _lies_beyond(values, ALIKE, True, groups, seed)

    return {test: tuple(method for method in methods if fails(table[test][method])) for test, methods in asked.items()}


def mean(values: Float[Array, " n"]) -> float:
    """Of the defined ones; NaN if there is none."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else np.nan


def _is_compared(values: Float[Array, " n"]) -> bool:
    return bool(np.isnan(values).mean() <= UNDEFINED_SHARE)


def _lies_beyond(values: Array, bound: float, above: bool, groups: Array | None, seed: int) -> bool:
    """Whether the interval of the mean does, and flipping the signs of the differences says so too."""
    interval = mean_interval(values, groups, seed)
    beyond = interval.low > bound if above else interval.high < bound
    return beyond and paired_test(values - bound, groups, seed) < LEVEL


def compare(
    values: Mapping[str, Float[Array, " n"]], *, groups: Shaped[Array, " n"] | None = None, seed: int = 0
) -> Paired | None:
    """Paired tests between all methods; None if fewer than two can be compared."""
    compared = {name: of for name, of in values.items() if _is_compared(of)}
    return paired_tests(compared, groups, seed) if len(compared) > 1 else None


def comparisons(metric: str, paired: Paired, n: int) -> Iterator[Comparison]:
    """Each pair of methods once."""
    for i, method in enumerate(paired.names):
        for j, other in enumerate(paired.names[i + 1 :], i + 1):
            interval = Interval(
                value=float(paired.difference[i, j]), low=float(paired.low[i, j]), high=float(paired.high[i, j]), n=n
            )
            yield Comparison(
                metric=metric,
                method=method,
                other=other,
                difference=interval,
                p=float(paired.p[i, j]),
                adjusted=float(paired.adjusted[i, j]),
            )


def standing_of(
    values: Mapping[str, Float[Array, " n"]],
    controls: Sequence[str] = (),
    *,
    higher_is_better: bool = True,
    chance: float | None = None,
    groups: Shaped[Array, " n"] | None = None,
    seed: int = 0,
    paired: Paired | None = None,
) -> Standing | None:
    """Who is best in a metric, from its values per image (NaN where undefined); None if no method can be compared.

    A method that is undefined for more than a tenth of the images is not compared, and neither is such a control. Best
    is the highest mean among those that no other beats image by image. It beats `chance` if its interval lies beyond,
    and flipping the signs of the differences says so too. `paired`: what `compare` found.

    >>> hard = np.random.default_rng(0).normal(size=50)  # images differ more than methods do
    >>> noise = np.tile([0.3, -0.3], 25)
    >>> standing_of({"a": hard + 0.1, "b": hard, "c": hard + 0.05 + noise, "edges": hard}, ["edges"])
    Standing(best='a', tied=('c',), unbeaten=())
    """
    sign = 1 if higher_is_better else -1
    means = {
        method: sign * float(np.nanmean(of))
        for method, of in values.items()
        if method not in controls and _is_compared(of)
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
    rivals = [control for control in controls if _is_compared(values[control]) and not beats(best, control)]
    return Standing(
        best=best,
        tied=tuple(method for method in means if method != best and not beats(best, method)),
        unbeaten=(*rivals, *(["chance"] if chance is not None and not beats_chance else [])),
    )


def curve_of(
    shares: Float[Array, "b n"], scores: Float[Array, "b n"], groups: Shaped[Array, " b"] | None, seed: int
) -> Curve | None:
    """Mean curve with its band, images without one left out; None where there is none."""
    defined = np.isfinite(scores).all(1)
    if not defined.any():
        return None
    means = mean_intervals(scores[defined], None if groups is None else groups[defined], seed)
    mean, low, high = np.array([(point.value, point.low, point.high) for point in means]).T
    return Curve(shares=shares[defined].mean(0), mean=mean, low=low, high=high)


def metric_agreement(means: Float[Array, "methods metrics"], higher_is_better: Sequence[bool]) -> Float[Array, "m m"]:
    """Rank correlation between metrics over methods; NaN where fewer than three methods have both.

    >>> metric_agreement(np.array([[1.0, 9.0], [2.0, 7.0], [3.0, 6.0]]), [True, False]).tolist()
    [[1.0, 1.0], [1.0, 1.0]]
    """
    oriented = means * np.where(higher_is_better, 1, -1)
    found = np.full((means.shape[1],) * 2, np.nan)
    for i in range(means.shape[1]):
        for j in range(means.shape[1]):
            both = np.isfinite(oriented[:, i]) & np.isfinite(oriented[:, j])
            if both.sum() > 2:
                a, b = (ranks(oriented[both, k]) for k in (i, j))
                a, b = a - a.mean(), b - b.mean()
                length = np.sqrt((a @ a) * (b @ b))
                found[i, j] = a @ b / length if length else np.nan
    return found
