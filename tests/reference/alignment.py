"""Alignment functions and attention, one query and one key at a time in plain floats.

Source: Chaudhari et al., "An Attentive Survey of Attention Models", table of alignment functions; Nadaraya 1964.
"""

import math


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def times(matrix, vector):
    return [dot(row, vector) for row in matrix]


def plus(*vectors):
    return [sum(numbers) for numbers in zip(*vectors, strict=True)]


def similarity(q, k):
    return dot(q, k) / math.sqrt(dot(q, q) * dot(k, k))


def scaled_dot(q, k):
    return dot(q, k) / math.sqrt(len(k))


def general(q, k, W):
    return sum(q[i] * W[i][j] * k[j] for i in range(len(q)) for j in range(len(k)))


def biased_general(q, k, W, b):
    return dot(k, plus(times(W, q), b))


def activated_general(q, k, W, b, act):
    return act(general(q, k, W) + b)


def generalized_kernel(q, k, phi):
    return dot([phi(x) for x in q], [phi(x) for x in k])


def concat(q, k, W, b, w, act):
    return dot(w, [act(x) for x in plus(times(W, [*q, *k]), b)])


def additive(q, k, W1, W2, b, w, act):
    return dot(w, [act(x) for x in plus(times(W1, q), times(W2, k), b)])


def deep(q, k, W0, W1, b1, inner, w, bL, act):
    """`inner`: the pairs (Wl, bl) of the layers 2 to L - 1."""
    energy = [act(x) for x in plus(times(W1, k), times(W0, q), b1)]
    for W, b in inner:
        energy = [act(x) for x in plus(times(W, energy), b)]
    return dot(w, energy) + bL


def attention_gate(x, g, Wx, Wg, bg, psi, bpsi):
    """Score of a local vector x under a gating vector g. Source: Oktay et al. 2018 (1804.03999), equation 1."""
    return dot(psi, [max(0.0, value) for value in plus(times(Wx, x), times(Wg, g), bg)]) + bpsi


def scores(function, queries, keys):
    """Table (b, q, k) of a function (query, key) over lists (b, q, dq) and (b, k, dk)."""
    return [[[function(q, k) for k in ks] for q in qs] for qs, ks in zip(queries, keys, strict=True)]


def attend(table, values, mask):
    """Weights (b, q, k) and reads (b, q, dv) of the scores in `table`; zeros where the mask allows nothing."""
    weights, reads = [], []
    for rows, allowed, vectors in zip(table, mask, values, strict=True):
        weights.append([])
        reads.append([])
        for row, may in zip(rows, allowed, strict=True):
            e = [math.exp(score) if m else 0.0 for score, m in zip(row, may, strict=True)]
            a = [x / sum(e) for x in e] if sum(e) > 0 else e
            weights[-1].append(a)
            reads[-1].append([dot(a, column) for column in zip(*vectors, strict=True)])
    return weights, reads


def nadaraya_watson(query, keys, values, bandwidth):
    """Sum of kernel times value over the sum of kernels, for numbers."""
    kernels = [math.exp(-((query - key) ** 2) / (2 * bandwidth**2)) for key in keys]
    return dot(kernels, values) / sum(kernels)
