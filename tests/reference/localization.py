"""Scores against a mask, and of concentration, pixel by pixel in float64; imports nothing of the package."""

import itertools
import math

from tests.reference.maps import box


def pointing(rows, mask, tolerance):
    """Zhang et al. 2016 (1608.00507): share of the highest pixels whose circle holds a pixel of the mask."""
    cells = list(itertools.product(range(len(rows)), range(len(rows[0]))))
    highest = max(rows[y][x] for y, x in cells)
    points = [(y, x) for y, x in cells if rows[y][x] == highest]
    inside = [(y, x) for y, x in cells if mask[y][x]]
    hits = [any(math.hypot(y - v, x - u) <= tolerance for v, u in inside) for y, x in points]
    return sum(hits) / len(points)


def rank(values, mask):
    """Arras et al. 2022 (2003.07258): the mean over all orders in which equal values can be sorted."""
    size, shares = sum(mask), []
    for order in itertools.permutations(range(len(values))):
        first = sorted(order, key=lambda i: -values[i])[:size]
        shares.append(sum(mask[i] for i in first) / size)
    return sum(shares) / len(shares)


def jaccard(values, mask, threshold):
    marked = {i for i, value in enumerate(values) if value >= threshold * max(values)}
    inside = {i for i, wanted in enumerate(mask) if wanted}
    return len(marked & inside) / len(marked | inside)


def box_hits(rows, mask, least):
    """Choe et al. 2020 (2001.07437): whether the boxes fit at thresholds 0, 0.05, ..., 0.95."""
    low, high = min(map(min, rows)), max(map(max, rows))
    scaled = [[(value - low) / (high - low) for value in row] for row in rows]
    ys = [y for y, row in enumerate(mask) if any(row)]
    xs = [x for row in mask for x, inside in enumerate(row) if inside]
    wanted = set(itertools.product(range(min(ys), max(ys) + 1), range(min(xs), max(xs) + 1)))
    hits = []
    for step in range(20):
        left, top, right, bottom = box(scaled, step / 20)
        found = set(itertools.product(range(top, bottom), range(left, right)))
        hits.append(float(len(found & wanted) / len(found | wanted) >= least))
    return hits


def auc(values, mask):
    """Every pixel inside against every pixel outside."""
    inside = [value for value, wanted in zip(values, mask, strict=True) if wanted]
    outside = [value for value, wanted in zip(values, mask, strict=True) if not wanted]
    wins = sum((a > b) + (a == b) / 2 for a in inside for b in outside)
    return wins / (len(inside) * len(outside))


def point_biserial(values, mask):
    """Tate 1954: difference of the two means over the deviation of all, times the root of both shares."""
    n = len(values)
    inside = [value for value, wanted in zip(values, mask, strict=True) if wanted]
    outside = [value for value, wanted in zip(values, mask, strict=True) if not wanted]
    mean = sum(values) / n
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / n)
    difference = sum(inside) / len(inside) - sum(outside) / len(outside)
    return difference / deviation * math.sqrt(len(inside) * len(outside)) / n


def gini(values):
    """Half the mean absolute difference over the mean."""
    positive = [max(value, 0.0) for value in values]
    n = len(positive)
    return sum(abs(a - b) for a in positive for b in positive) / (2 * n * sum(positive))


def entropy(values):
    positive = [max(value, 0.0) for value in values]
    shares = [value / sum(positive) for value in positive if value > 0]
    return -sum(share * math.log(share) for share in shares) / math.log(len(values))
