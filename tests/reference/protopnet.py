"""Prototype distances and similarities, position by position. Source: Chen et al., NeurIPS 2019, section 2.1."""

import math

import numpy as np


def compare(latent, prototypes):
    """Squared distances (b, p, h, w) of latent patches (b, c, h, w) to prototypes (p, c); best similarities (b, p)."""
    images, _, height, width = latent.shape
    distances = np.zeros((images, len(prototypes), height, width))
    scores = np.zeros((images, len(prototypes)))
    for n in range(images):
        for j, prototype in enumerate(prototypes):
            for y in range(height):
                for x in range(width):
                    distances[n, j, y, x] = sum(
                        (z - p) ** 2 for z, p in zip(latent[n, :, y, x], prototype, strict=True)
                    )
            nearest = distances[n, j].min()
            scores[n, j] = math.log((nearest + 1) / (nearest + 1e-4))
    return distances, scores
