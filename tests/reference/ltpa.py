"""Learn To Pay Attention, equations 1 to 5, position by position in float64. Source: Jetley et al., ICLR 2018."""

import math

import numpy as np


def attend(local, query, u, b, compat, norm):
    """Scores (b, h, w), weights (b, h, w) and pooled vectors (b, c) of local features (b, c, h, w)."""
    images, channels, height, width = local.shape
    scores = np.zeros((images, height, width), dtype=np.float64)
    weights = np.zeros_like(scores)
    pooled = np.zeros((images, channels), dtype=np.float64)
    for n in range(images):
        for y in range(height):
            for x in range(width):
                c = 0.0
                for k in range(channels):
                    if compat == "pc":
                        c += u[k] * (local[n, k, y, x] + query[n, k])
                    elif compat == "dp":
                        c += local[n, k, y, x] * query[n, k]
                    else:
                        c += u[k] * local[n, k, y, x]
                scores[n, y, x] = c if compat == "dp" else c + b
        total = sum(math.exp(scores[n, y, x]) for y in range(height) for x in range(width))
        for y in range(height):
            for x in range(width):
                if norm == "softmax":
                    weights[n, y, x] = math.exp(scores[n, y, x]) / total
                else:
                    weights[n, y, x] = 1 / (1 + math.exp(-scores[n, y, x]))
                for k in range(channels):
                    share = 1 if norm == "softmax" else height * width
                    pooled[n, k] += weights[n, y, x] * local[n, k, y, x] / share
    return scores, weights, pooled
