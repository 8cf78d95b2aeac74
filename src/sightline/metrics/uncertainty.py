"""How certain a mean or a difference of means is: bootstrap and sign flips over images or groups, Wilson, Holm."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from math import sqrt

import numpy as np
from jaxtyping import Float, Int, Shaped

from sightline.facts import Interval

Array = np.ndarray
_RESAMPLES = 2000
_FLIPS = 10_000
_EXACT = 13
"""Units up to which all 2^n sign flips are tried, which are fewer than `_FLIPS`."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two methods under one metric, image by image."""

    metric: str = ""
    method: str
    other: str
    """A method or a control."""
    difference: Interval
    """Difference of the means over common images, `method` minus `other`; NaN where there is none."""
    p: float
    """p-value of a paired sign-flip test, over images or whole groups; see `paired_test`."""
    adjusted: float
    """The same, corrected for all pairs of the metric (Holm)."""


def mean_interval(values: Float[Array, " n"], groups: Shaped[Array, " n"] | None = None, seed: int = 0) -> Interval:
    """Mean of the values that are not NaN, with its 95 % bootstrap interval over values or groups.

    Percentiles of 2,000 resamples, expanded for few units. Fewer than two units give NaN. Values that are all 0 or all
    1 are taken as a fraction, with its Wilson limits; any other constant has an interval without width, which does not
    mean certainty: the bootstrap has seen no variation. The interval never leaves the range of the data, so that it
    covers the truth in at most 50 % of cases for two units, 75 % for three, 87.5 % for four.

    Source: Hesterberg 2014 (1411.5279), expanded percentile: level Phi(-sqrt(n / (n - 1)) t) with the 97.5 % quantile t
    of Student's distribution of n - 1 degrees of freedom, in place of 2.5 %.

    >>> mean_interval(np.array([0.5, 0.5, np.nan]))
    Interval(value=0.5, low=0.5, high=0.5, n=2)
    >>> round(mean_interval(np.ones(10)).low, 3)
    0.722
    """
    return mean_intervals(values[:, None], groups, seed)[0]


def mean_intervals(
    values: Float[Array, "n k"], groups: Shaped[Array, " n"] | None = None, seed: int = 0
) -> list[Interval]:
    """`mean_interval` of each column, from the same resamples of all rows that are not NaN throughout.

    >>> [interval.value for interval in mean_intervals(np.array([[1.0, 2.0], [np.nan, 4.0]]))]
    [1.0, 3.0]
    """
    defined = ~np.isnan(values).all(1)
    sums, counts = _by_unit(values[defined], None if groups is None else groups[defined])
    low, high = _mean_limits(sums, counts, seed)
    n = (counts > 0).sum(0)
    with np.errstate(invalid="ignore"):
        means = sums.sum(0) / counts.sum(0)
    return [interval_of(*one) for one in zip(means.tolist(), low.tolist(), high.tolist(), n.tolist(), strict=True)]


def wilson_interval(hits: int, n: int) -> Interval:
    """Fraction of hits with Wilson's 95 % interval, which is valid at 0 and 1 too.

    Source: Wilson 1927, Probable inference, the law of succession, and statistical inference.

    >>> interval = wilson_interval(10, 10)
    >>> interval.value, round(interval.low, 3), round(interval.high, 3)
    (1.0, 0.722, 1.0)
    """
    from scipy.stats import binomtest

    ends = binomtest(hits, n).proportion_ci(method="wilson")
    return Interval(value=hits / n, low=float(ends.low), high=float(ends.high), n=n)


def interval_of(value: float, low: float, high: float, n: int) -> Interval:
    """An interval of a bootstrap; Wilson's where all resamples are 0 or all are 1."""
    return (
        wilson_interval(round(value) * n, n)
        if low == high == value in (0, 1)
        else Interval(value=value, low=low, high=high, n=n)
    )


def paired_test(differences: Float[Array, " n"], groups: Shaped[Array, " n"] | None = None, seed: int = 0) -> float:
    """Two-sided p-value of a mean difference: how often a sum with random signs is at least as far from 0.

    The sum over a group keeps one sign. Exact, over all 2^n flips, for at most 13 units; else the smaller of
    (reached + 1) / 10,001 for 10,000 seeded flips, and Hoeffding's bound 2 exp(-(sum d)^2 / (2 sum d^2)). The bound is
    never below the exact value and reaches p-values too small for 10,000 flips, which a correction for hundreds of
    pairs needs. NaN is left out; no difference at all gives 1, no value NaN.

    Source: Fisher 1935, The design of experiments, section 21; Phipson and Smyth 2010 (1603.05766) for the + 1;
    Hoeffding 1963, Probability inequalities for sums of bounded random variables, theorem 2.

    >>> paired_test(np.array([1.0, 2.0, 3.0]))  # of the 8 signs only +++ and --- reach 6
    0.25
    """
    sums, counts = _by_unit(differences[:, None], groups)
    return float(_sign_flips(sums[counts[:, 0] > 0], seed)[0]) if counts.any() else float("nan")


def paired_tests(
    values: Mapping[str, Float[Array, " n"]], groups: Shaped[Array, " n"] | None = None, seed: int = 0
) -> list[Comparison]:
    """Compare every pair of methods on their common images, with the same resamples and sign flips.

    Intervals as in `mean_interval` and p-values as in `paired_test`, exact if there are at most 13 units in all. Pairs
    without a common image are NaN and do not count for the correction.

    >>> (pair,) = paired_tests({"a": np.array([3.0, 4.0, 6.0]), "b": np.array([1.0, 1.0, 1.0])})
    >>> pair.method, pair.other, round(pair.difference.value, 4), pair.p
    ('a', 'b', 3.3333, 0.25)
    """
    if len(values) < 2:
        return []
    pairs = list(combinations(values, 2))
    sums, counts = _by_unit(np.stack([values[a] - values[b] for a, b in pairs], 1), groups)
    with np.errstate(invalid="ignore"):
        difference = sums.sum(0) / counts.sum(0)
    p = np.where(counts.any(0), _sign_flips(sums, seed), np.nan)
    columns = np.stack([difference, *_mean_limits(sums, counts, seed), p, holm(p)], 1).tolist()
    return [
        Comparison(
            method=method,
            other=other,
            difference=Interval(value=value, low=low, high=high, n=len(sums)),
            p=p,
            adjusted=adjusted,
        )
        for (method, other), (value, low, high, p, adjusted) in zip(pairs, columns, strict=True)
    ]


def holm(p_values: Float[Array, " m"]) -> Float[Array, " m"]:
    """P-values adjusted so that rejecting those below .05 errs anywhere in at most 5 % of cases.

    NaN stays NaN and is not counted.

    Source: Holm 1979, A simple sequentially rejective multiple test procedure.

    >>> holm(np.array([0.01, 0.04, 0.03, 0.005])).round(4).tolist()
    [0.03, 0.06, 0.06, 0.02]
    """
    adjusted = np.full(p_values.shape, np.nan)
    order = np.argsort(p_values)[: int((~np.isnan(p_values)).sum())]
    steps = np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps * p_values[order]), 1)
    return adjusted


def resamples(units: int, seed: int) -> Iterator[Float[Array, "r units"]]:
    """How often each unit is drawn in each of 2,000 resamples, some resamples at a time."""
    rng = np.random.default_rng(seed)
    for _ in range(0, _RESAMPLES, 100):
        drawn = rng.integers(units, size=(100, units)) + units * np.arange(100)[:, None]
        yield np.bincount(drawn.ravel(), minlength=100 * units).reshape(100, units).astype(float)


def limits(statistics: Float[Array, "r k"], n: Int[Array, " k"]) -> tuple[Float[Array, " k"], Float[Array, " k"]]:
    """Ends of the expanded percentile interval of each column, resamples of n units; NaN left out.

    NaN where n is below two.
    """
    ends = np.full((2, len(n)), np.nan)
    for column, units in enumerate(n.tolist()):
        values = statistics[:, column]
        values = values[~np.isnan(values)]
        if units > 1 and len(values):
            level = _expanded_level(units)
            ends[:, column] = np.quantile(values, [level, 1 - level])
    return ends[0], ends[1]


def _by_unit(values: Array, groups: Array | None) -> tuple[Array, Array]:
    """Sum and number of the values that are not NaN, in each column, (units, k)."""
    defined = ~np.isnan(values)
    sums, counts = np.where(defined, values, 0.0), defined.astype(float)
    if groups is None:
        return sums, counts
    names, which = np.unique(groups, return_inverse=True)
    total, number = np.zeros((2, len(names), values.shape[1]))
    np.add.at(total, which, sums)
    np.add.at(number, which, counts)
    return total, number


def _mean_limits(sums: Array, counts: Array, seed: int) -> tuple[Array, Array]:
    if not len(sums):
        missing = np.full(sums.shape[1], np.nan)
        return missing, missing
    with np.errstate(invalid="ignore"):
        means = [(weights @ sums) / (weights @ counts) for weights in resamples(len(sums), seed)]
    return limits(np.concatenate(means), (counts > 0).sum(0))


def _sign_flips(sums: Array, seed: int) -> Array:
    """p-value of each column of sums, (units, k)."""
    units, total = len(sums), np.abs(sums.sum(0))
    least = total - 1e-12 * np.abs(sums).sum(0)  # the same sum in another order may round differently
    if units <= _EXACT:
        signs = 1.0 - 2 * (np.arange(2**units)[:, None] >> np.arange(units) & 1)
        return (np.abs(signs @ sums) >= least).mean(0)
    rng, size = np.random.default_rng(seed), max(2_000_000 // max(sums.shape), 1)
    reached = np.ones(sums.shape[1])
    for start in range(0, _FLIPS, size):
        signs = 1.0 - 2 * rng.integers(2, size=(min(size, _FLIPS - start), units), dtype=np.int8)
        reached += (np.abs(signs @ sums) >= least).sum(0)
    bound = 2 * np.exp(-(total**2) / np.maximum(2 * (sums**2).sum(0), np.finfo(float).tiny))
    return np.minimum(reached / (_FLIPS + 1), bound)


@cache
def _expanded_level(n: int) -> float:
    from scipy.special import ndtr, stdtrit

    return float(ndtr(-sqrt(n / (n - 1)) * stdtrit(n - 1, 0.975)))
