"""Poolings that replace global average pooling by a weighted mean with learned weights."""

from functools import partial
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from sightline.attention.alignment import ALIGNMENT, Alignment, AlignmentGate
from sightline.attention.registry import ATTENTION, check_choice, register

__all__ = ["AlignmentPooling", "CompatibilityGate", "LearnToPayAttention"]

Compat = Literal["pc", "dp", "none"]
Norm = Literal["softmax", "sigmoid", "uniform"]
Project = Literal["g", "l"]
Query = Literal["mean", "learned"]


class CompatibilityGate(nn.Module):
    """Weights of the positions of a feature map: how well each local vector l matches a query g.

    The score is <u, l + g> + b ("pc", parameterized compatibility: u and b are learned), <l, g> ("dp", dot product) or
    <u, l> + b ("none": no query). "softmax" makes the weights of an image sum to 1, "sigmoid" puts each in (0, 1).
    "uniform", with "none" only, learns nothing and gives every position the same weight, with sum 1: the control.

    Raises:
        ValueError: an unknown `compat` or `norm`, or "uniform" with a score.

    Source: Jetley et al., "Learn To Pay Attention", ICLR 2018, equations 1 to 5.

    >>> gate = CompatibilityGate(2, compat="dp")
    >>> gate.scores(torch.tensor([[[[1.0, 2.0]], [[3.0, 4.0]]]]), torch.tensor([[10.0, 1.0]]))
    tensor([[[[13., 24.]]]])
    """

    def __init__(self, channels: int, *, compat: Compat = "pc", norm: Norm = "softmax") -> None:
        super().__init__()
        check_choice("compat", compat, get_args(Compat))
        check_choice("norm", norm, get_args(Norm))
        if norm == "uniform" and compat != "none":
            raise ValueError(f"expected compat 'none' with norm 'uniform', which needs no score; got {compat!r}")
        self.compat = compat
        self.norm = norm
        if compat != "dp" and norm != "uniform":
            self.u = nn.Linear(channels, 1)

    def scores(
        self, features: Float[Tensor, "b c h w"], query: Float[Tensor, "b c"] | None = None
    ) -> Float[Tensor, "b 1 h w"]:
        """Compatibility of every position, before normalization.

        Raises:
            ValueError: "pc" or "dp" without a query.
        """
        if self.norm == "uniform":
            return features.new_zeros(features.shape[0], 1, *features.shape[2:])
        if self.compat == "none":
            return self._linear(features) + self.u.bias
        if query is None:
            raise ValueError(f"expected a query of shape (batch, channels) for compat={self.compat!r}, got none")
        if self.compat == "dp":
            return self._products(features, query)
        # u is linear: <u, l + g> = <u, l> + <u, g> needs no second map of the features' size.
        return self._linear(features) + self.u(query)[:, :, None, None]

    def forward(
        self, features: Float[Tensor, "b c h w"], query: Float[Tensor, "b c"] | None = None
    ) -> Float[Tensor, "b 1 h w"]:
        """Weight of every position."""
        scores = self.scores(features, query)
        if self.norm == "sigmoid":
            return scores.sigmoid()
        return scores.flatten(2).softmax(2).unflatten(2, features.shape[2:])

    def _linear(self, features: Tensor) -> Tensor:
        local = features.flatten(2).mT
        if local.is_contiguous():  # channels-last; the gradient of the other form would not be
            return F.linear(local, self.u.weight).mT.unflatten(2, features.shape[2:])
        return self._products(features, self.u.weight.expand(features.shape[0], -1))

    @staticmethod
    def _products(features: Tensor, vector: Tensor) -> Tensor:
        # On a CPU up to four times as fast as a 1x1 convolution with one output channel.
        return torch.bmm(vector.unsqueeze(1), features.flatten(2)).unflatten(2, features.shape[2:])


class LearnToPayAttention(nn.Module):
    """Pools a feature map into one vector per image, weighing each position by how well it matches a query vector.

    "softmax": the weighted sum of the local vectors; "sigmoid": their weighted mean over all positions; "uniform":
    their mean, the control of attention. The child `gate` returns the weights.

    With "pc" and "softmax" the query's part of the score is the same at every position and cancels: the result equals
    that of "none", and no gradient reaches the query. Use "dp" or "sigmoid" to make the query matter.

    Args:
        channels: channels of the feature map.
        query_channels: length of the query. None: `channels`.
        compat: score of a position, see `CompatibilityGate`; changes nothing else.
        norm: how scores become weights, see `CompatibilityGate`.
        project: if the two lengths differ, "g" projects the query to the features, "l" the features to the query (the
            pooled vector is then as long as the query).
        official: if the two lengths differ, the query passes BatchNorm, ReLU and Dropout first.

    Raises:
        ValueError: an unknown `compat`, `norm` or `project`; in the forward pass, "pc" or "dp" without a query.

    Source: Jetley et al., "Learn To Pay Attention", ICLR 2018, equations 1 to 5; `official`: the authors' Torch7 code.

    Differs: the paper has "softmax" only; "sigmoid" with the mean is SaoYan's re-implementation.

    >>> LearnToPayAttention(8, 16)(torch.zeros(2, 8, 5, 7), torch.zeros(2, 16)).shape
    torch.Size([2, 8])
    """

    def __init__(
        self,
        channels: int,
        query_channels: int | None = None,
        *,
        compat: Compat = "pc",
        norm: Norm = "softmax",
        project: Project = "g",
        official: bool = True,
    ) -> None:
        super().__init__()
        check_choice("project", project, get_args(Project))
        query_channels = query_channels or channels
        self.project_features = nn.Identity()
        self.project_query = nn.Sequential()
        if query_channels != channels:
            if compat != "none" and official:
                self.project_query.extend([nn.BatchNorm1d(query_channels), nn.ReLU(), nn.Dropout(0.5)])
            if project == "l":
                self.project_features = nn.Conv2d(channels, query_channels, 1)
                channels = query_channels
            elif compat != "none":
                self.project_query.append(nn.Linear(query_channels, channels))
        self.out_channels = channels
        self.gate = CompatibilityGate(channels, compat=compat, norm=norm)

    def forward(
        self, features: Float[Tensor, "b c h w"], query: Float[Tensor, "b q"] | None = None
    ) -> Float[Tensor, "b k"]:
        """Pool the features of each image."""
        features = self.project_features(features)
        query = None if query is None or self.gate.compat == "none" else self.project_query(query)
        weights = self.gate(features, query).flatten(2)
        if self.gate.norm == "sigmoid":
            weights = weights / weights.shape[2]
        return torch.bmm(weights, features.flatten(2).transpose(1, 2)).squeeze(1)


@register("alignment")
class AlignmentPooling(nn.Module):
    """Pools a feature map into one vector per image, each position weighted by one of the twelve alignment functions.

    The keys and values are the vectors of the positions; the query is their mean, or one learned vector for all images.
    The child `gate` returns the weights, which sum to 1. By name: `alignment:additive`.

    Args:
        channels: channels of the feature map.
        function: a key of `sightline.attention.ALIGNMENT`.
        query: "mean", the global average of the features, or "learned".
        hidden: length of the hidden vector of `concat`, `additive`, `deep` and `feature`. None: `channels`.
        max_keys: of `location`: the most positions that a feature map can have; 56 x 56 by default.

    Raises:
        ValueError: an unknown `function` or `query`, `hidden` below 1; in the forward pass, more than `max_keys`
            positions.

    Source: Chaudhari et al., "An Attentive Survey of Attention Models" (1904.02874), table of alignment functions.

    Differs: the table leaves functions open: `generalized_kernel` has elu + 1 as its feature map (Katharopoulos et al.
    2020), `feature` the features and their squares, those with a hidden layer tanh.

    >>> AlignmentPooling(8, function="additive")(torch.zeros(2, 8, 5, 7)).shape
    torch.Size([2, 8])
    """

    def __init__(
        self,
        channels: int,
        *,
        function: str = "scaled_dot",
        query: Query = "mean",
        hidden: int | None = None,
        max_keys: int = 3136,
    ) -> None:
        super().__init__()
        check_choice("function", function, tuple(ALIGNMENT))
        check_choice("query", query, get_args(Query))
        hidden = channels if hidden is None else hidden
        if hidden < 1:
            raise ValueError(f"expected hidden of 1 or more, got {hidden}; leave it out for {channels}")
        self.out_channels = channels
        self.query = nn.Parameter(torch.randn(channels) / channels**0.5) if query == "learned" else None
        self.gate = _AlignmentMap(_alignment(function, channels, hidden, max_keys))

    def forward(self, features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c"]:
        """Pool the features of each image."""
        query = features.mean((2, 3)) if self.query is None else self.query.expand(len(features), -1)
        weights = self.gate(features, query).flatten(2)
        return torch.bmm(weights, features.flatten(2).mT).squeeze(1)


class _AlignmentMap(nn.Module):
    """The weights of an alignment function as a map."""

    def __init__(self, alignment: Alignment) -> None:
        super().__init__()
        self.attend = AlignmentGate(alignment)

    def forward(self, features: Float[Tensor, "b c h w"], query: Float[Tensor, "b c"]) -> Float[Tensor, "b 1 h w"]:
        return self.attend(query.unsqueeze(1), features.flatten(2).mT).unflatten(2, features.shape[2:])


def _alignment(function: str, channels: int, hidden: int, max_keys: int) -> Alignment:
    kind: Any = ALIGNMENT[function]
    match function:
        case "generalized_kernel":
            return kind(_positive)
        case "concat" | "additive" | "deep":
            return kind(channels, channels, hidden)
        case "general" | "biased_general" | "activated_general":
            return kind(channels, channels)
        case "location":
            return kind(channels, max_keys)
        case "feature":
            return kind(nn.Identity(), torch.square, (channels, channels), hidden)
        case _:
            return kind()


def _positive(features: Tensor) -> Tensor:
    return F.elu(features) + 1


# without a query; inside the networks of its paper the query is the global vector
ATTENTION["ltpa"] = partial(LearnToPayAttention, compat="none")
