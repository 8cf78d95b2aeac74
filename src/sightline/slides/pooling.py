"""From the tiles of a slide to its class: attention, and the controls that it is compared with."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sightline.attention.bags import InstanceGate

POOLINGS = ("attention", "uniform", "mean", "max", "top_k")


class BagClassifier(nn.Module):
    """Classes of bags of vectors.

    Every tile gets a vector by a small network, and a score for each class by a linear layer; the score of the bag is a
    weighted mean of the tiles' scores, so each tile's share in it is exact. The kinds differ in the weights:

    - `attention`: learned, and sum to 1;
    - `uniform`: the same for all tiles, in the same network, so that the difference to it is what attention adds;
    - `mean`: the same, without the small network: a linear classifier of the mean of the features;
    - `max`: all on the tile with the highest score, for each class on its own;
    - `top_k`: the same on each of the k tiles with the highest scores (hard attention).

    Args:
        channels: length of the features.
        classes: number of classes.
        pooling: one of these kinds.
        hidden: length of the tiles' vectors.
        k: tiles of `top_k`; fewer if a bag has fewer.
        dropout: of the tiles' vectors.

    Raises:
        ValueError: no such kind, or a number below 1.

    Source: Ilse, Tomczak, Welling, "Attention-based Deep Multiple Instance Learning", ICML 2018 (1802.04712), equations
    7 to 9, and its baselines of mean and max.

    Differs: pooling and the linear layer are exchanged, which changes nothing for weights that sum to 1.

    >>> BagClassifier(8, 2, "mean")(torch.ones(3, 5, 8)).shape
    torch.Size([3, 2])
    """

    mean: Tensor
    deviation: Tensor

    def __init__(
        self,
        channels: int,
        classes: int,
        pooling: str = "attention",
        *,
        hidden: int = 128,
        k: int = 8,
        dropout: float = 0.25,
    ) -> None:
        super().__init__()
        if pooling not in POOLINGS:
            raise ValueError(f"expected a pooling out of {', '.join(POOLINGS)}; got {pooling!r}")
        if min(channels, classes, hidden, k) < 1:
            raise ValueError(f"expected sizes of 1 or more, got {channels}, {classes}, {hidden} and k {k}")
        self.pooling = pooling
        self.k = k
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("deviation", torch.ones(channels))
        is_plain = pooling == "mean"
        self.embed = (
            nn.Identity() if is_plain else nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Dropout(dropout))
        )
        length = channels if is_plain else hidden
        self.gate = InstanceGate(length) if pooling == "attention" else None
        self.score = nn.Linear(length, classes)

    def standardize(self, features: Float[Tensor, "n c"]) -> None:
        """Take mean and deviation of the features from these, those of all training tiles."""
        self.mean.copy_(features.mean(0))
        self.deviation.copy_(features.std(0).clamp_min(1e-6))

    def parts(
        self, features: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"] | None = None
    ) -> tuple[Float[Tensor, "b n classes"], Float[Tensor, "b n classes"]]:
        """Weight and score of each tile for each class; the logits are the sums of their products.

        `mask` is True at tiles, False at the padding of shorter bags; the weights there are 0.
        """
        there = torch.ones(features.shape[:2], dtype=torch.bool, device=features.device) if mask is None else mask
        vectors = self.embed((features - self.mean) / self.deviation)
        scores = self.score(vectors)
        if self.gate is not None:
            positions = vectors.mT.unsqueeze(3)
            weights = self.gate(positions, there[:, None, :, None]).flatten(2).mT.expand_as(scores)
        elif self.pooling in ("max", "top_k"):
            k = 1 if self.pooling == "max" else min(self.k, scores.shape[1])
            hidden = scores.masked_fill(~there[..., None], torch.finfo(scores.dtype).min)
            highest = hidden.detach().topk(k, dim=1).indices
            weights = torch.zeros_like(scores).scatter(1, highest, 1.0) * there[..., None]
            weights = weights / weights.sum(1, keepdim=True)
        else:
            weights = (there / there.sum(1, keepdim=True))[..., None].expand_as(scores)
        return weights, scores

    def pooled(
        self, weights: Float[Tensor, "n classes"], scores: Float[Tensor, "n classes"]
    ) -> Float[Tensor, " classes"]:
        """Logits of a bag of some tiles of another bag, by their `parts` there: nothing is computed again."""
        if self.pooling in ("max", "top_k"):
            k = 1 if self.pooling == "max" else min(self.k, len(scores))
            return scores.topk(k, dim=0).values.mean(0)
        return (weights * scores).sum(0) / weights.sum(0)

    def forward(
        self, features: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b classes"]:
        """Logits of each bag."""
        weights, scores = self.parts(features, mask)
        return (weights * scores).sum(1)
