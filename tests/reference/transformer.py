"""The spatial transformer pixel by pixel in float64. Source: Jaderberg et al., NeurIPS 2015, equations 1 and 5."""

import math

import numpy as np


def sample(features, theta, size):
    """Windows (b, c, *size) of features (b, c, h, w) under theta (b, 2, 3); -1 and 1 are the outer edges."""
    images, channels, height, width = features.shape
    out = np.zeros((images, channels, *size))
    for n in range(images):
        for i in range(size[0]):
            for j in range(size[1]):
                target = np.array([(2 * j + 1) / size[1] - 1, (2 * i + 1) / size[0] - 1, 1.0])
                x, y = theta[n] @ target
                column, row = ((x + 1) * width - 1) / 2, ((y + 1) * height - 1) / 2
                for m in range(height):
                    for k in range(width):
                        weight = max(0.0, 1 - abs(column - k)) * max(0.0, 1 - abs(row - m))
                        out[n, :, i, j] += weight * features[n, :, m, k]
    return out


def inside(theta, size):
    """Whether each pixel center of an input (h, w) lies in the parallelogram that theta (2, 3) makes of the square."""
    corners = [theta @ np.array([x, y, 1.0]) for x, y in ((-1, -1), (1, -1), (1, 1), (-1, 1))]
    found = np.zeros(size, dtype=bool)
    for i in range(size[0]):
        for j in range(size[1]):
            x, y = (2 * j + 1) / size[1] - 1, (2 * i + 1) / size[0] - 1
            sides = [
                (b[0] - a[0]) * (y - a[1]) - (b[1] - a[1]) * (x - a[0])
                for a, b in zip(corners, corners[1:] + corners[:1], strict=True)
            ]
            found[i, j] = len({math.copysign(1, side) for side in sides}) == 1
    return found
