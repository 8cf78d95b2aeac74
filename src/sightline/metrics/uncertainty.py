"""How sure a mean is: bootstrap over images or groups, and Wilson's interval of a share."""

from dataclasses import dataclass
from math import sqrt

import numpy as np
from jaxtyping import Float, Shaped

Array = np.ndarray
_RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean with its 95 % interval."""

    value: float
    low: float
    high: float
    n: int
    """Independent units behind it: images, or groups where a group column is named."""


def mean_interval(values: Float[Array, " n"], groups: Shaped[Array, " n"] | None = None, seed: int = 0) -> Interval:
    """Mean of the values that are not NaN, with its 95 % percentile bootstrap interval over values or groups.

    >>> mean_interval(np.array([1.0, 1.0, np.nan]))
    Interval(value=1.0, low=1.0, high=1.0, n=2)
    """
    defined = ~np.isnan(values)
    values = values[defined]
    if not len(values):
        return Interval(value=float("nan"), low=float("nan"), high=float("nan"), n=0)
    sums, counts = values, np.ones_like(values)
    if groups is not None:
        _, which = np.unique(groups[defined], return_inverse=True)
        sums, counts = np.bincount(which, values), np.bincount(which).astype(float)
    if len(sums) < 2:
        return Interval(value=float(values.mean()), low=float("nan"), high=float("nan"), n=1)
    rng = np.random.default_rng(seed)
    means: list[Array] = []
    for _ in range(0, _RESAMPLES, 100):
        draws = rng.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=100)
        means.append((draws @ sums) / (draws @ counts))
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return Interval(value=float(values.mean()), low=float(low), high=float(high), n=len(sums))


def wilson_interval(hits: int, n: int) -> Interval:
    """Share of hits with Wilson's 95 % interval, which is honest at 0 and 1 too.

    Source: Wilson 1927, Probable inference, the law of succession, and statistical inference.

    >>> interval = wilson_interval(10, 10)
    >>> interval.value, round(interval.low, 3), round(interval.high, 3)
    (1.0, 0.722, 1.0)
    """
    z = 1.959963984540054
    share = hits / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    reach = z * sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return Interval(value=share, low=max(0.0, middle - reach), high=min(1.0, middle + reach), n=n)
