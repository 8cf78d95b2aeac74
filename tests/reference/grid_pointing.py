"""The grid pointing game, position by position in fractions; imports nothing of the package."""

from fractions import Fraction
from itertools import combinations


def share(rows, cell, grid):
    """Böhle et al. 2021 (2104.00032): positive values in the cell over all; each position is cut into equal pieces."""
    inside = total = Fraction(0)
    height, width = len(rows) * grid[0], len(rows[0]) * grid[1]
    for y in range(height):
        for x in range(width):
            value = Fraction(max(rows[y // grid[0]][x // grid[1]], 0.0))
            place = y // len(rows) * grid[1] + x // len(rows[0])
            total += value
            inside += value * (place == cell)
    return float(inside / total)


def most_mosaics(classes, size):
    """The largest number of disjoint sets of `size` images of different classes, by trying all."""
    best = 0
    for chosen in combinations(range(len(classes)), size):
        if len({classes[i] for i in chosen}) == size:
            rest = [kind for i, kind in enumerate(classes) if i not in chosen]
            best = max(best, 1 + most_mosaics(rest, size))
    return best
