"""Alignment functions: twelve ways to score how relevant each key is to a query, and the attention built on a score.

All have one signature: queries (b, q, dq), keys (b, k, dk) and an optional mask (b, q, k), True where a query may
attend to a key, to scores (b, q, k). A score that the mask forbids is -inf. In the formulas q is one query and k one
key; W, w and b are learned; `act` is any function of a tensor, tanh unless another is given.

Source: Chaudhari et al., "An Attentive Survey of Attention Models" (1904.02874), table of alignment functions.
"""

import math
from collections.abc import Callable
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["ALIGNMENT", "Attend", "NadarayaWatson"]

Function = Callable[[Tensor], Tensor]
Queries = Float[Tensor, "b q dq"]
Keys = Float[Tensor, "b k dk"]
Mask = Bool[Tensor, "b q k"]
Scores = Float[Tensor, "b q k"]


class Alignment(nn.Module):
    """Base of the alignment functions: applies the mask. A subclass defines `scores`."""

    def forward(self, queries: Queries, keys: Keys, mask: Mask | None = None) -> Scores:
        """Score of every key for every query, -inf where the mask is False.

        Raises:
            ValueError: a mask that is not boolean.
        """
        scores = self.scores(queries, keys)
        if mask is None:
            return scores
        if mask.dtype != torch.bool:
            raise ValueError(f"expected a boolean mask, True = may attend, got {mask.dtype}; take mask > 0")
        return scores.masked_fill(~mask, -torch.inf)

    def scores(self, queries: Queries, keys: Keys) -> Scores:
        """Score of every key for every query, before the mask."""
        raise NotImplementedError


class Similarity(Alignment):
    """Cosine of the angle between query and key; 0 where one of them is zero.

    Raises:
        ValueError: queries and keys of different lengths.

    Source: Graves et al., "Neural Turing Machines", 2014.

    >>> Similarity()(torch.tensor([[[3.0, 0.0]]]), torch.tensor([[[2.0, 0.0], [0.0, 5.0]]]))
    tensor([[[1., 0.]]])
    """

    def scores(self, queries: Queries, keys: Keys) -> Scores:
        """See `Alignment.scores`."""
        return _products(F.normalize(queries, dim=2), F.normalize(keys, dim=2))


class DotProduct(Alignment):
    """q^T k.

    Raises:
        ValueError: queries and keys of different lengths.

    Source: Luong et al. 2015 (1508.04025), "dot".

    >>> DotProduct()(torch.tensor([[[3.0, 1.0]]]), torch.tensor([[[2.0, 0.0], [0.0, 5.0]]]))
    tensor([[[6., 5.]]])
    """

    def scores(self, queries: Queries, keys: Keys) -> Scores:
        """See `Alignment.scores`."""
        return _products(queries, keys)


class ScaledDotProduct(Alignment):
    """q^T k / sqrt(d), where d is the length of a key.

    Raises:
        ValueError: queries and keys of different lengths.

    Source: Vaswani et al. 2017 (1706.03762), equation 1.

    >>> ScaledDotProduct()(torch.tensor([[[1.0, 2.0, 2.0, 1.0]]]), torch.ones(1, 1, 4))
    tensor([[[3.]]])
    """

    def scores(self, queries: Queries, keys: Keys) -> Scores:
        """See `Alignment.scores`."""
        return _products(queries / math.sqrt(keys.shape[2]), keys)


class General(Alignment):
    """q^T W k.

    The queries are projected, because there are usually fewer of them: `project.weight` is W transposed.

    Source: Luong et al. 2015 (1508.04025), "general".

    >>> General(4, 3)(torch.zeros(2, 5, 4), torch.zeros(2, 7, 3)).shape
    torch.Size([2, 5, 7])
    """

    has_bias: ClassVar = False

    def __init__(self, query_channels: int, key_channels: int) -> None:
        super().__init__()
        self.project = nn.Linear(query_channels, key_channels, bias=self.has_bias)

    def scores(self, queries: Queries, keys: Keys) -> Scores:
        """See `Alignment.scores`."""
        return _products(self.project(queries), keys)


class BiasedGeneral(General):
    """k^T (W q + b).

    Source: Sordoni et al. 2016 (1606.02245).

    >>> BiasedGeneral(4, 3)(torch.zeros(2, 5, 4), torch.zeros(2, 7, 3)).shape
    torch.Size([2, 5, 7])
    """

    has_bias = True


class ActivatedGeneral(General):
    """act(q^T W k + b), with one number b. `project.weight` is W transposed, as in `General`.

    Source: Ma et al. 2017, "Interactive Attention Networks" (1709.00893).

    >>> ActivatedGeneral(4, 3)(torch.zeros(2, 5, 4), torch.zeros(2, 7, 3)).shape
    torch.Size([2, 5, 7])
    """

    def __init__(self, query_channels: int, key_channels: int, *, activation: Function = torch.tanh) -> None:
        super().__init__(query_channels, key_channels)
        self.bias = nn.Parameter(torch.zeros(1))
        self.activation = activation

    def scores(self, queries: Queries, keys: Keys) -> Scores:
        """See `Alignment.scores`."""
        return self.activation(super().scores(queries, keys) + self.bias)


class GeneralizedKernel(Alignment):
    """phi(q)^T phi(k).

    Args:
        feature_map: phi, along the last dimension; a module's parameters are learned.

    Raises:
        ValueError: phi makes queries and keys of different lengths.

    Source: Choromanski et al. 2021 (2009.14794), "Rethinking Attention with Performers".

    >>> GeneralizedKernel(torch.relu)(torch.tensor([[[3.0, -1.0]]]), torch.tensor([[[2.0, -4.0]]]))
    tensor([[[6.]]])
    """

    def __init__(self, feature_map: Function) -> None:
        super().__init__()
        self.feature_map = feature_map

    def scores(self, queries: Queries, keys: Keys) -> Scores:
        """See `Alignment.scores`."""
        return _products(self.feature_map(queries), self.feature_map(keys))


class Concat(Alignment):
    """w^T act(W [q; k] + b).

    W is split into its parts for queries and keys, so the pairs [q; k] are never materialized.

    Source: Luong et al. 2015 (1508.04025), "concat".

    Differs: with the bias b of the survey.

    >>> Concat(4, 3, hidden=8)(torch.zeros(2, 5, 4), torch.zeros(2, 7, 3)).shape
    torch.Size([2, 5, 7])
    """

    def __init__(
        self, query_channels: int, key_channels: int, hidden: int, *, activation: Function = torch.tanh
    ) -> None:
        super().__init__()
        self.W = nn.Linear(query_channels + key_channels, hidden)
        self.w = nn.Linear(hidden, 1, bias=False)
        self.activation = activation

    def scores(self, queries: Queries, keys: Keys) -> Scores:
        """See `Alignment.scores`."""
        for_queries, for_keys = self.W.weight.split((queries.shape[2], keys.shape[2]), dim=1)
        hidden = _sums(F.linear(queries, for_queries, self.W.bias), F.linear(keys, for_keys))
        return self.w(self.activation(hidden)).squeeze(3)


class Additive(Alignment):
    """w^T act(W1 q + W2 k + b).

    Source: Bahdanau et al. 2015 (1409.0473), appendix A.1.2.

    Differs: with the bias b of the survey.

    >>> Additive(4, 3, hidden=8)(torch.zeros(2, 5, 4), torch.zeros(2, 7, 3)).shape
    torch.Size([2, 5, 7])
    """

    def __init__(
        self, query_channels: int, key_channels: int, hidden: int, *, activation: Function = torch.tanh
    ) -> None:
        super().__init__()
        self.W1 = nn.Linear(query_channels, hidden)
        self.W2 = nn.Linear(key_channels, hidden, bias=False)
        self.w = nn.Linear(hidden, 1, bias=False)
        self.activation = activation

    def scores(self, queries: Queries, keys: Keys) -> Scores:
        """See `Alignment.scores`."""
        return self.w(self.activation(_sums(self.W1(queries), self.W2(keys)))).squeeze(3)


class Deep(Alignment):
    """A perceptron of L layers: E1 = act(W1 k + W0 q + b1), El = act(Wl E(l-1) + bl), score w^T E(L-1) + bL.

    A softmax over the keys cancels bL, which then is not learned.

    Args:
        query_channels: length of a query.
        key_channels: length of a key.
        hidden: length of E.
        layers: L, at least 2.
        activation: act.

    Raises:
        ValueError: fewer than 2 layers.

    Source: Pavlopoulos et al. 2017, "Deeper Attention to Abusive User Content Moderation".

    >>> Deep(4, 3, hidden=8, layers=4)(torch.zeros(2, 5, 4), torch.zeros(2, 7, 3)).shape
    torch.Size([2, 5, 7])
    """

    def __init__(
        self,
        query_channels: int,
        key_channels: int,
        hidden: int,
        *,
        layers: int = 3,
        activation: Function = torch.tanh,
    ) -> None:
        super().__init__()
        if layers < 2:
            raise ValueError(f"expected layers of 2 or more, got {layers}; take General for a score without one")
        self.W0 = nn.Linear(query_channels, hidden, bias=False)
        self.W1 = nn.Linear(key_channels, hidden)
        self.inner = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(layers - 2))
        self.w = nn.Linear(hidden, 1)
        self.activation = activation

    def scores(self, queries: Queries, keys: Keys) -> Scores:
        """See `Alignment.scores`."""
        energy = self.activation(_sums(self.W0(queries), self.W1(keys)))
        for layer in self.inner:
            energy = self.activation(layer(energy))
        return self.w(energy).squeeze(3)


class LocationBased(Alignment):
    """W q: row i of W scores the key at position i from the query only; the content of the keys does not matter.

    Args:
        query_channels: length of a query.
        max_keys: rows of W; fewer keys take the first rows.

    Raises:
        ValueError: in the forward pass, more than `max_keys` keys.

    Source: Luong et al. 2015 (1508.04025), equation 8.

    >>> LocationBased(4, max_keys=9)(torch.zeros(2, 5, 4), torch.zeros(2, 7, 3)).shape
    torch.Size([2, 5, 7])
    """

    def __init__(self, query_channels: int, max_keys: int) -> None:
        super().__init__()
        self.W = nn.Linear(query_channels, max_keys, bias=False)

    def scores(self, queries: Queries, keys: Keys) -> Scores:
        """See `Alignment.scores`."""
        if keys.shape[1] > self.W.out_features:
            raise ValueError(
                f"expected at most {self.W.out_features} keys, got {keys.shape[1]}; build it with a larger max_keys"
            )
        return self.W(queries)[:, :, : keys.shape[1]]


class FeatureBased(Alignment):
    """w^T act(W1 phi1(K) + W2 phi2(K) + b): two features of the keys K; the query does not matter.

    Args:
        phi1: first feature, all keys (b, k, dk) to (b, k, f1); a module's parameters are learned.
        phi2: second feature, (b, k, dk) to (b, k, f2).
        channels: (f1, f2).
        hidden: length of the input of `activation`.
        activation: act.

    Source: Li et al. 2019, as given in the survey.

    >>> FeatureBased(nn.Identity(), torch.square, (3, 3), hidden=8)(torch.zeros(2, 5, 4), torch.zeros(2, 7, 3)).shape
    torch.Size([2, 5, 7])
    """

    def __init__(
        self,
        phi1: Function,
        phi2: Function,
        channels: tuple[int, int],
        hidden: int,
        *,
        activation: Function = torch.tanh,
    ) -> None:
        super().__init__()
        self.phi1, self.phi2 = phi1, phi2
        self.W1 = nn.Linear(channels[0], hidden)
        self.W2 = nn.Linear(channels[1], hidden, bias=False)
        self.w = nn.Linear(hidden, 1, bias=False)
        self.activation = activation

    def scores(self, queries: Queries, keys: Keys) -> Scores:
        """See `Alignment.scores`."""
        scores = self.w(self.activation(self.W1(self.phi1(keys)) + self.W2(self.phi2(keys))))
        return scores.transpose(1, 2).expand(-1, queries.shape[1], -1)


class GaussianKernel(Alignment):
    """Logarithm of a Gaussian kernel: -||q - k||^2 / (2 bandwidth^2).

    Raises:
        ValueError: a bandwidth that is not positive.

    >>> GaussianKernel(bandwidth=1.0)(torch.tensor([[[0.0, 0.0]]]), torch.tensor([[[0.0, 0.0], [0.0, 2.0]]]))
    tensor([[[-0., -2.]]])
    """

    def __init__(self, bandwidth: float) -> None:
        super().__init__()
        if not 0 < bandwidth < math.inf:
            raise ValueError(f"expected a bandwidth above 0, got {bandwidth}; take about the spacing of the keys")
        self.bandwidth = bandwidth

    def scores(self, queries: Queries, keys: Keys) -> Scores:
        """See `Alignment.scores`."""
        # by subtraction: ||q||^2 - 2 q^T k + ||k||^2 cancels far from zero; cdist has no half precision
        dtype = torch.promote_types(queries.dtype, torch.float32)
        distances = torch.cdist(queries.to(dtype), keys.to(dtype), compute_mode="donot_use_mm_for_euclid_dist")
        return (-0.5 * (distances / self.bandwidth).square()).to(queries.dtype)


class AlignmentGate(nn.Module):
    """Softmax of the scores over the keys; zeros for a query that may attend to no key.

    >>> gate = AlignmentGate(DotProduct())
    >>> gate(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), torch.tensor([[[True, True], [False, False]]]))
    tensor([[[0.5000, 0.5000],
             [0.0000, 0.0000]]])
    """

    def __init__(self, alignment: Alignment) -> None:
        super().__init__()
        self.alignment = alignment

    def forward(self, queries: Queries, keys: Keys, mask: Mask | None = None) -> Scores:
        """Weight of every key for every query."""
        scores = self.alignment(queries, keys, mask)
        if mask is None:
            return scores.softmax(2)
        # filled before the softmax, too, because the softmax of a row of -inf and its gradient are NaN
        nothing = ~mask.any(2, keepdim=True)
        return scores.masked_fill(nothing, 0).softmax(2).masked_fill(nothing, 0)


class Attend(nn.Module):
    """Weighted mean of values: each query reads the values whose keys align with it.

    The child `gate` returns the weights (b, q, k). A query that may attend to no key reads zeros.

    Args:
        alignment: how well a key fits a query, one of `ALIGNMENT` or any other `Alignment`.

    Source: Bahdanau et al. 2015 (1409.0473), equations 5 and 6.

    >>> Attend(DotProduct())(torch.zeros(1, 1, 2), torch.zeros(1, 2, 2), torch.tensor([[[1.0], [3.0]]]))
    tensor([[[2.]]])
    """

    def __init__(self, alignment: Alignment) -> None:
        super().__init__()
        self.gate = AlignmentGate(alignment)

    def forward(
        self, queries: Queries, keys: Keys, values: Float[Tensor, "b k dv"], mask: Mask | None = None
    ) -> Float[Tensor, "b q dv"]:
        """What each query reads."""
        return torch.bmm(self.gate(queries, keys, mask), values)


class NadarayaWatson(Attend):
    """Kernel regression: the value at a query is the mean of the given values, weighted by the nearness of their keys.

    The weight is a Gaussian kernel of the distance, exp(-||q - k||^2 / (2 bandwidth^2)). That is attention with
    `GaussianKernel`, so a query far from all keys reads the nearest value instead of 0 / 0.

    Raises:
        ValueError: a bandwidth that is not positive.

    Source: Nadaraya 1964; Watson 1964.

    >>> line = torch.tensor([[[0.0], [1.0], [2.0]]])
    >>> NadarayaWatson(bandwidth=0.5)(torch.tensor([[[1.0]]]), line, line).round(decimals=3)
    tensor([[[1.]]])
    """

    def __init__(self, bandwidth: float) -> None:
        super().__init__(GaussianKernel(bandwidth))


ALIGNMENT: dict[str, type[Alignment]] = {
    "similarity": Similarity,
    "dot": DotProduct,
    "scaled_dot": ScaledDotProduct,
    "general": General,
    "biased_general": BiasedGeneral,
    "activated_general": ActivatedGeneral,
    "generalized_kernel": GeneralizedKernel,
    "concat": Concat,
    "additive": Additive,
    "deep": Deep,
    "location": LocationBased,
    "feature": FeatureBased,
}


def _products(queries: Tensor, keys: Tensor) -> Tensor:
    if queries.shape[2] != keys.shape[2]:
        raise ValueError(
            f"expected queries and keys of one length, got {queries.shape[2]} and {keys.shape[2]}; "
            "project one of them, or take General"
        )
    return torch.bmm(queries, keys.transpose(1, 2))


def _sums(queries: Tensor, keys: Tensor) -> Tensor:
    return queries.unsqueeze(2) + keys.unsqueeze(1)
