"""Groups of maps that look at the same places (spectral relevance analysis), and how strange each group is."""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64

from sightline import maps as pixels
from sightline.checks import missing

Array = np.ndarray
GRID = 8
"""Positions along either side of the grid on which maps are compared."""
MOST = 8
"""Most clusters of one class."""
FEWEST = 12
"""Maps below which a class is not divided."""
_ZERO = 1e-9
_STARTS: Any = 10  # of k-means; its stubs ask for a string


def weights(maps: Float[Array, "n h w"]) -> Float[Array, "n h w"]:
    """The positive part of each map, divided by its sum; NaN for a map without a positive or finite value.

    >>> weights(np.array([[[3.0, -1.0], [1.0, 0.0]], [[-1.0, 0.0], [0.0, -2.0]]])).tolist()
    [[[0.75, 0.0], [0.25, 0.0]], [[nan, nan], [nan, nan]]]
    """
    positive = np.maximum(np.asarray(maps, dtype=np.float64), 0)
    total = positive.sum((1, 2), keepdims=True)
    with np.errstate(invalid="ignore", over="ignore"):
        return np.where(np.isfinite(total) & (total > 0), positive / np.where(total > 0, total, 1), np.nan)


def shrunk(maps: Float[Array, "n h w"], grid: int = GRID) -> Float[Array, "n grid grid"]:
    """`weights` on a common grid, where each still sums to 1: its positive part, averaged over the cells.

    >>> shrunk(np.ones((1, 16, 16)), 2).tolist()
    [[[0.25, 0.25], [0.25, 0.25]]]
    """
    positive = torch.from_numpy(weights(maps))[:, None]
    return weights(pixels.resize(positive, (grid, grid))[:, 0].numpy())


def spectral(looks: Float[Array, "n d"], most: int = MOST, seed: int = 0) -> Int64[Array, " n"]:
    """Cluster of each map, 0 for the largest: spectral clustering whose number of clusters is chosen by the eigengap.

    The affinity joins each map to its sqrt(n) nearest neighbors (Euclidean), and is made symmetric. The number of
    clusters is the k from 1 to `most` after which the eigenvalues of the normalized Laplacian grow most. Rows are the
    first k eigenvectors, scaled to length 1, in k clusters by k-means. Fewer than `FEWEST` maps are one cluster.

    Memory and time grow with n squared and cubed: `explore` passes a sample.

    Source: Lapuschkin et al. 2019 (1902.10178), spectral relevance analysis; Ng, Jordan and Weiss 2001, On spectral
    clustering, for the scaled rows; von Luxburg 2007 (0711.0189), section 8.3, for the eigengap.

    Differs: the paper joins ln(n) neighbors, which breaks a class of a hundred maps into groups of five, and looks at
    the clusters by eye, on an embedding by t-SNE.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.

    >>> spectral(np.eye(3)).tolist()  # too few maps to be divided
    [0, 0, 0]
    """
    try:
        from sklearn.cluster import KMeans
        from sklearn.neighbors import kneighbors_graph
    except ModuleNotFoundError:
        raise missing("clusters of maps need scikit-learn", "train") from None
    from scipy.linalg import eigh
    from scipy.sparse.csgraph import laplacian

    n = len(looks)
    if n < FEWEST:
        return np.zeros(n, dtype=np.int64)
    joined = kneighbors_graph(looks, round(math.sqrt(n)), include_self=False).toarray()
    matrix = laplacian(np.maximum(joined, joined.T), normed=True)
    values, vectors = eigh(matrix, subset_by_index=[0, min(most, n - 1)])
    # an eigenvalue of 0 for each connected part: with more parts than `most`, the gap lies beyond them
    k = most if values[-1] < _ZERO else int(np.argmax(np.diff(values))) + 1
    if k == 1:
        return np.zeros(n, dtype=np.int64)
    rows = vectors[:, :k]
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(float).tiny)
    found = KMeans(k, n_init=_STARTS, random_state=seed).fit_predict(rows)
    order = np.argsort(-np.bincount(found, minlength=k), kind="stable")
    return np.argsort(order)[found].astype(np.int64)


class Strangeness(NamedTuple):
    """Why a cluster is strange: `score` is the product of the three others, each from 0 to 1."""

    score: float
    rarity: float
    """Share of the class's maps that are not in the cluster."""
    distance: float
    """How much of the cluster's mean weight lies elsewhere than that of the class's other maps."""
    confidence: float
    """Mean probability of the explained class over the images of the cluster."""


def strangeness(
    looks: Float[Array, "n d"], confidence: Float[Array, " n"], clusters: Int64[Array, " n"]
) -> list[Strangeness]:
    """How strange each cluster of a class is: small, far from the class's other maps, and the network is sure.

    The distance is the total variation distance, half the sum of the absolute differences, between the mean weights of
    the cluster and those of all other maps. A class of one cluster has none that is strange: 0.

    >>> looks = np.array([[1.0, 0.0]] * 3 + [[0.5, 0.5]])
    >>> strangeness(looks, np.array([0.9, 0.9, 0.9, 0.5]), np.array([0, 0, 0, 1]))[1]
    Strangeness(score=0.1875, rarity=0.75, distance=0.5, confidence=0.5)
    """
    found: list[Strangeness] = []
    for cluster in range(int(clusters.max()) + 1):
        inside = clusters == cluster
        rarity = float((~inside).mean())
        sure = float(confidence[inside].mean())
        apart = 0.0 if inside.all() else float(np.abs(looks[inside].mean(0) - looks[~inside].mean(0)).sum() / 2)
        found.append(Strangeness(rarity * apart * sure, rarity, apart, sure))
    return found
