"""Ranks, agreement, sign flips and scores of classifiers in plain loops; imports nothing of the package."""

import itertools
import math


def mean_ranks(values):
    return [sum(v < w for v in values) + (sum(v == w for v in values) + 1) / 2 for w in values]


def spearman(a, b):
    a, b = mean_ranks(a), mean_ranks(b)
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    top = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
    return top / math.sqrt(sum((x - mean_a) ** 2 for x in a) * sum((y - mean_b) ** 2 for y in b))


def krippendorff(ratings, level):
    """Krippendorff 2011, steps B to D: coincidences of values, then their expected and observed differences."""
    units = [[row[u] for row in ratings if not math.isnan(row[u])] for u in range(len(ratings[0]))]
    units = [unit for unit in units if len(unit) > 1]
    values = sorted({v for unit in units for v in unit})
    together = {pair: 0.0 for pair in itertools.product(values, repeat=2)}
    for unit in units:
        for i, j in itertools.permutations(range(len(unit)), 2):
            together[unit[i], unit[j]] += 1 / (len(unit) - 1)
    counts = {c: sum(together[c, k] for k in values) for c in values}
    n = sum(counts.values())

    def difference(c, k):
        if level == "nominal":
            return float(c != k)
        if level == "interval":
            return (c - k) ** 2
        between = sum(counts[g] for g in values if min(c, k) <= g <= max(c, k))
        return (between - (counts[c] + counts[k]) / 2) ** 2

    observed = sum(together[c, k] * difference(c, k) for c, k in together) / n
    expected = sum(counts[c] * counts[k] * difference(c, k) for c, k in together) / (n * (n - 1))
    return 1 - observed / expected


def sign_flip(sums):
    """Exact two-sided p-value."""
    total = abs(sum(sums))
    flips = list(itertools.product((1, -1), repeat=len(sums)))
    reached = sum(abs(sum(s * d for s, d in zip(signs, sums, strict=True))) >= total - 1e-9 for signs in flips)
    return reached / len(flips)


def holm(p_values):
    """The smallest level at which the step-down procedure rejects each hypothesis."""
    ordered = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for step, i in enumerate(ordered):
        largest = max(largest, (len(p_values) - step) * p_values[i])
        adjusted[i] = min(largest, 1)
    return adjusted


def macro_f1(answers, labels, classes):
    scores = []
    for k in range(classes):
        hits = sum(a == y == k for a, y in zip(answers, labels, strict=True))
        occurs = sum(a == k for a in answers) + sum(y == k for y in labels)
        if occurs:
            scores.append(2 * hits / occurs)
    return sum(scores) / len(scores)


def calibration_error(confidences, correct, bins=15):
    """Guo et al. 2017, equations 3 and 5."""
    error = 0.0
    for m in range(bins):
        inside = [i for i, c in enumerate(confidences) if m / bins < c <= (m + 1) / bins]
        if inside:
            confidence = sum(confidences[i] for i in inside) / len(inside)
            accuracy = sum(correct[i] for i in inside) / len(inside)
            error += len(inside) / len(confidences) * abs(accuracy - confidence)
    return error
