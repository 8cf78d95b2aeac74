"""Self-attention over a feature map, query by query in float64. Source: Vaswani et al. 2017; Wang et al. 2018."""

import math

import numpy as np


def attend(query, key, value, scale, bias=None):
    """Weights (n, n) and weighted values (n, d) of one head; `bias(i, j)` adds to the score of query i and key j."""
    n = len(query)
    weights, mixed = np.zeros((n, n)), np.zeros_like(value)
    for i in range(n):
        scores = [scale * float(query[i] @ key[j]) + (bias(i, j) if bias else 0.0) for j in range(n)]
        largest = max(scores)
        exponentials = [math.exp(s - largest) for s in scores]
        for j in range(n):
            weights[i, j] = exponentials[j] / sum(exponentials)
            mixed[i] += weights[i, j] * value[j]
    return weights, mixed


def self_attention(features, qkv, project, project_bias, heads, table=None):
    """Attention received (b, heads, h, w) and output (b, c, h, w); `table` (heads, 2r+1, 2s+1) by clipped offset."""
    images, channels, height, width = features.shape
    d = channels // heads
    received = np.zeros((images, heads, height, width))
    output = np.zeros_like(features)
    for n in range(images):
        tokens = np.stack([features[n, :, y, x] for y in range(height) for x in range(width)])
        gathered = np.zeros_like(tokens)
        for head in range(heads):
            q, k, v = (tokens @ qkv[start : start + d].T for start in range(head * d, 3 * channels, channels))

            def bias(i, j, head=head):
                down, right = table.shape[1] // 2, table.shape[2] // 2
                dy = min(max(j // width - i // width, -down), down)
                dx = min(max(j % width - i % width, -right), right)
                return float(table[head, dy + down, dx + right])

            weights, mixed = attend(q, k, v, 1 / math.sqrt(d), None if table is None else bias)
            received[n, head] = weights.mean(0).reshape(height, width)
            gathered[:, head * d : (head + 1) * d] = mixed
        added = gathered @ project.T + project_bias
        output[n] = features[n] + added.T.reshape(channels, height, width)
    return received, output


def non_local(features, qkv, project, bn_weight, bn_bias, mean, variance, eps):
    """The same of a non-local block in eval mode."""
    images, channels, height, width = features.shape
    d = len(qkv) // 3
    received = np.zeros((images, 1, height, width))
    output = np.zeros_like(features)
    for n in range(images):
        tokens = np.stack([features[n, :, y, x] for y in range(height) for x in range(width)])
        q, k, v = (tokens @ qkv[part * d : (part + 1) * d].T for part in range(3))
        weights, mixed = attend(q, k, v, 1.0)
        received[n, 0] = weights.mean(0).reshape(height, width)
        z = bn_weight * (mixed @ project.T - mean) / np.sqrt(variance + eps) + bn_bias
        output[n] = features[n] + z.T.reshape(channels, height, width)
    return received, output
