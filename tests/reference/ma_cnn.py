"""MA-CNN's channel grouping and losses, position by position in float64.

Source: Zheng et al., "Learning Multi-Attention Convolutional Neural Network for Fine-Grained Image Recognition",
ICCV 2017, sections 3.1 and 3.2. Coordinates are fractions of a side, those of the middle of a position.
"""

import math

import numpy as np


def center(y, x, h, w):
    return (y + 0.5) / h, (x + 0.5) / w


def peak(channel):
    """Where a channel (h, w) is largest; the middle of the map if it is 0 everywhere."""
    h, w = channel.shape
    best, place = 0.0, (0.5, 0.5)
    for y, x in np.ndindex(h, w):
        if channel[y, x] > best:
            best, place = channel[y, x], center(y, x, h, w)
    return place


def part_map(features, weights):
    """Map (h, w) of one part of an image (c, h, w): the weighted sum of the channels, of length 1."""
    total = sum(float(d) * channel for d, channel in zip(weights, features, strict=True))
    length = math.sqrt(sum(value**2 for value in total.flatten()))
    return total / length


def part_vector(features, weights):
    one = part_map(features, weights)
    vector = np.zeros(len(features))
    for y, x in np.ndindex(one.shape):
        vector += one[y, x] * features[:, y, x]
    return vector


def distance(maps):
    """Dis, of the maps (k, h, w) of one image."""
    total = 0.0
    for one in maps:
        h, w = one.shape
        top = max(np.ndindex(h, w), key=lambda place: one[place])
        for y, x in np.ndindex(h, w):
            a, b = center(y, x, h, w), center(*top, h, w)
            total += one[y, x] * ((a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2)
    return total


def diversity(maps, margin):
    """Div, of the maps (k, h, w) of one image."""
    total = 0.0
    for i, one in enumerate(maps):
        for place in np.ndindex(one.shape):
            others = [other[place] for j, other in enumerate(maps) if j != i]
            total += one[place] * (max(others) - margin)
    return total


def spread(points, groups):
    """Sum of the squared distances of points (n, d) to the mean of their group."""
    total = 0.0
    for group in set(groups):
        members = [p for p, g in zip(points, groups, strict=True) if g == group]
        middle = sum(members) / len(members)
        total += sum(float(((p - middle) ** 2).sum()) for p in members)
    return total
