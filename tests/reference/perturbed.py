"""Scores of perturbed images, one pixel, one image and one frame at a time; imports nothing of the package."""

import math
from itertools import pairwise

import numpy as np
import scipy.sparse.linalg


def curve(score, image, fill, importance, steps, insert):
    """(shares, scores, means of the importance per chunk) of Petsiuk et al. 2018; image, fill (c, n) arrays."""
    n = len(importance)
    order = sorted(range(n), key=lambda i: -importance[i])
    chunk = math.ceil(n / steps)
    current, target = (fill.copy(), image) if insert else (image.copy(), fill)
    shares, scores, means = [0.0], [score(current)], []
    for start in range(0, n, chunk):
        chosen = order[start : start + chunk]
        for i in chosen:
            current[:, i] = target[:, i]
        shares.append((start + len(chosen)) / n)
        scores.append(score(current))
        means.append(sum(importance[i] for i in chosen) / len(chosen))
    return shares, scores, means


def area(shares, scores):
    return sum((b - a) * (y + z) / 2 for a, b, y, z in zip(shares, shares[1:], scores, scores[1:], strict=False))


def pearson(a, b):
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    top = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
    return top / math.sqrt(sum((x - mean_a) ** 2 for x in a) * sum((y - mean_b) ** 2 for y in b))


def correlation(scores, means, insert):
    """Gomez et al. 2022: DC of a deletion curve, IC of an insertion curve."""
    changes = [b - a for a, b in pairwise(scores)]
    return pearson(changes if insert else [-change for change in changes], means)


def dimmed(image, fill, importance, inverse=False):
    """Image times the map scaled from 0 to 1, fill times the rest."""
    low, high = min(importance), max(importance)
    share = (np.array(importance) - low) / (high - low)
    share = 1 - share if inverse else share
    return share * image + (1 - share) * fill


def inpainted(image, hole):
    """Rong et al. 2022 without noise: every pixel of the hole solves the mean of its neighbors; image (c, h, w)."""
    height, width = hole.shape
    unknown = {place: i for i, place in enumerate(zip(*np.nonzero(hole), strict=True))}
    matrix, right = np.zeros((len(unknown), len(unknown))), np.zeros((len(unknown), len(image)))
    for (y, x), i in unknown.items():
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                place = (y + dy, x + dx)
                if (dy, dx) == (0, 0) or not (0 <= place[0] < height and 0 <= place[1] < width):
                    continue
                weight = 1 / 6 if dy == 0 or dx == 0 else 1 / 12
                matrix[i, i] += weight
                if place in unknown:
                    matrix[i, unknown[place]] -= weight
                else:
                    right[i] += weight * image[:, place[0], place[1]]
    found = image.copy()
    solved = np.linalg.solve(matrix, right)
    for place, i in unknown.items():
        found[:, place[0], place[1]] = solved[i]
    return found


def painted(image, hole):
    """The same for one large plane, by a sparse factorisation."""
    places = np.arange(hole.size).reshape(hole.shape)
    rows, columns, weights = [], [], []
    for dy, dx in ((0, 1), (1, 0), (1, 1), (1, -1)):
        one = places[: hole.shape[0] - dy, max(0, -dx) : hole.shape[1] - max(0, dx)].ravel()
        two = places[dy:, max(0, dx) : hole.shape[1] - max(0, -dx)].ravel()
        rows += [one, two]
        columns += [two, one]
        weights += 2 * [np.full(one.size, 1 / 12 if dy and dx else 1 / 6)]
    near = scipy.sparse.csr_array((np.concatenate(weights), (np.concatenate(rows), np.concatenate(columns))))
    matrix = scipy.sparse.diags_array(near.sum(1)) - near
    found = image.astype(float)
    inside, around = hole.ravel(), ~hole.ravel()
    right = -matrix[inside][:, around] @ found.ravel()[around]
    found[hole] = scipy.sparse.linalg.spsolve(matrix[inside][:, inside].tocsc(), right)
    return found


def infidelity(falls, covered, normalize):
    """Yeh et al. 2019, eq. 1, over the squares."""
    factor = 1.0
    if normalize:
        factor = sum(a * b for a, b in zip(covered, falls, strict=True)) / sum(a * a for a in covered)
    return sum((factor * a - b) ** 2 for a, b in zip(covered, falls, strict=True)) / len(falls)
