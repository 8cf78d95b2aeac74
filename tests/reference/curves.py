"""Deletion, insertion and localization one pixel at a time; imports nothing of the package."""

import math


def area(score, image, fill, importance, steps, insert):
    """Petsiuk et al. 2018 on one image: lists (c, n), importance (n,) without ties, score(image) -> number."""
    n = len(importance)
    order = sorted(range(n), key=lambda i: -importance[i])
    chunk = math.ceil(n / steps)
    current = [list(plane) for plane in (fill if insert else image)]
    target = image if insert else fill
    xs, ys = [0.0], [score(current)]
    done = 0
    while done < n:
        for i in order[done : done + chunk]:
            for plane, wanted in zip(current, target, strict=True):
                plane[i] = wanted[i]
        done = min(done + chunk, n)
        xs.append(done / n)
        ys.append(score(current))
    return sum((xs[k + 1] - xs[k]) * (ys[k + 1] + ys[k]) / 2 for k in range(len(xs) - 1))


def energy(importance, mask):
    """Share of the positive importance inside the mask."""
    positive = [max(value, 0.0) for value in importance]
    return sum(value for value, inside in zip(positive, mask, strict=True) if inside) / sum(positive)
