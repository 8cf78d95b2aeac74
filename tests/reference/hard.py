"""Hard attention on a grid small enough to enumerate, in float64. Source: Xu et al. 2015, section 4.1."""

import math

import numpy as np


def softmax(scores):
    exponentials = [math.exp(s - max(scores)) for s in scores]
    return [e / sum(exponentials) for e in exponentials]


def expected_reward(scores, rewards):
    return sum(p * r for p, r in zip(softmax(scores), rewards, strict=True))


def entropy(scores):
    return -sum(p * math.log(p) for p in softmax(scores))


def gradient(function, scores, step=1e-6):
    """Central differences of a function of the scores."""
    found = []
    for i in range(len(scores)):
        up, down = ([s + sign * step * (i == j) for j, s in enumerate(scores)] for sign in (1, -1))
        found.append((function(up) - function(down)) / (2 * step))
    return found


def bilinear_crop(image, top, left, size):
    """Pixels of (c, h, w) at top + i, left + j, interpolated between the four neighbors."""
    crop = np.zeros((len(image), size, size))
    for c in range(len(image)):
        for i in range(size):
            for j in range(size):
                y, x = top + i, left + j
                for m in (math.floor(y), math.floor(y) + 1):
                    for n in (math.floor(x), math.floor(x) + 1):
                        share = (1 - abs(y - m)) * (1 - abs(x - n))
                        if share:
                            crop[c, i, j] += share * image[c, m, n]
    return crop
