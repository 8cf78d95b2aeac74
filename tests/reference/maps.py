"""Boxes and pictures of maps, cell by cell. Sources: Zhou et al. (1512.04150) for boxes, Gomez et al. (2106.02566)."""

import itertools
import math


def box(rows, threshold):
    """Box of the largest component of one map, a list of rows: flood fill over 8 neighbors."""
    height, width = len(rows), len(rows[0])
    values = [value for row in rows for value in row]
    if not all(math.isfinite(value) for value in values) or max(values) <= 0:
        return [0, 0, 0, 0]
    left = {(y, x) for y in range(height) for x in range(width) if max(rows[y][x], 0) >= threshold * max(values)}
    components = []
    for start in itertools.product(range(height), range(width)):
        if start not in left:
            continue
        left.remove(start)
        component, waiting = [], [start]
        while waiting:
            y, x = waiting.pop()
            component.append((y, x))
            for near in itertools.product((y - 1, y, y + 1), (x - 1, x, x + 1)):
                if near in left:
                    left.remove(near)
                    waiting.append(near)
        components.append(component)
    # max() keeps the first of equals, and the components are in reading order of their first cells
    best = max(components, key=lambda cells: (len(cells), max(rows[y][x] for y, x in cells)))
    ys, xs = [y for y, _ in best], [x for _, x in best]
    return [min(xs), min(ys), max(xs) + 1, max(ys) + 1]


def linear_at(values, n):
    """A list of values at n >= len(values) positions: linear between the centers of the cells, constant outside."""
    out = []
    for i in range(n):
        position = min(max((i + 0.5) * len(values) / n - 0.5, 0), len(values) - 1)
        low = int(position)
        high = min(low + 1, len(values) - 1)
        out.append(values[low] + (position - low) * (values[high] - values[low]))
    return out


def nearest_at(values, n):
    """A list of values at n positions: the cell that holds the center."""
    return [values[int((i + 0.5) * len(values) / n)] for i in range(n)]


def parts(maps, norm=None):
    """RGB rows of one image's maps, lists of rows: color k = map k / its maximum, times norm / its maximum."""
    height, width = len(maps[0]), len(maps[0][0])
    picture = [[[0, 0, 0] for _ in range(width)] for _ in range(height)]
    for k, rows in enumerate(maps[:3]):
        for y, x in itertools.product(range(height), range(width)):
            share = rows[y][x] / max(map(max, rows))
            if norm is not None:
                share *= norm[y][x] / max(map(max, norm))
            picture[y][x][k] = round(255 * share)
    return picture
