"""Other poolings, position by position in float64.

Sources: bilinear attention pooling, Hu et al., 1901.09891, equations 1 to 3; bilinear CNN, Lin et al., ICCV
2015; attention over instances, Ilse et al., 1802.04712, equations 7 to 9.
"""

import math

import numpy as np


def positions(image):
    """Local vectors of an image (c, h, w)."""
    return [image[:, y, x] for y in range(image.shape[1]) for x in range(image.shape[2])]


def attended(features, maps):
    """Mean over positions of map times features, for each map: (b, k, c)."""
    result = np.zeros((features.shape[0], maps.shape[1], features.shape[1]))
    for n, k in np.ndindex(result.shape[:2]):
        local = positions(features[n])
        weights = positions(maps[n, k][None])
        result[n, k] = sum(float(w[0]) * f for w, f in zip(weights, local, strict=True)) / len(local)
    return result


def signed_root(vector, eps=0.0):
    """The exact one, or with the finite slope that `eps` gives it at 0."""
    return np.array([x / math.sqrt(abs(x) + eps) for x in vector])


def bilinear(image):
    """Vector (c * c) of one image (c, h, w)."""
    rooted = signed_root(sum(np.outer(f, f) for f in positions(image)).flatten())
    return rooted / math.sqrt(sum(x * x for x in rooted))


def instances(vectors, V, v_bias, U, u_bias, w):
    """Weights (n) and pooled vector (c) of one bag (n, c); U None: without the gate."""
    scores = []
    for h in vectors:
        hidden = np.tanh(V @ h + v_bias)
        if U is not None:
            hidden = hidden / (1 + np.exp(-(U @ h + u_bias)))
        scores.append(math.exp(w @ hidden))
    weights = np.array(scores) / sum(scores)
    return weights, sum(a * h for a, h in zip(weights, vectors, strict=True))
