"""Rollout: the attention of all layers of a transformer, multiplied into one map."""

from functools import partial
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sightline.explainers.explainer import Explainer
from sightline.explainers.scorer import Scorer, gradients_of
from sightline.explainers.tokens import AttentionWeights
from sightline.inference import wide

__all__ = ["attention_rollout", "gradient_rollout"]

_FUSE = {"mean": torch.mean, "max": torch.amax, "min": torch.amin}


@partial(Explainer, ignores_class=True)
def attention_rollout(
    images: Float[Tensor, "b c *size"],
    targets: Int[Tensor, "b t"],
    score: Scorer,
    heads: Literal["mean", "max", "min"] = "mean",
) -> Float[Tensor, "b t *grid"]:
    r"""Attention that reaches the head from each patch, if every layer mixes its attention and its input equally.

    $\prod_l (A_l + I) / 2$, the last layer leftmost, with $A_l$ the mean over the heads. The same for every target. The
    map is the row of the first token if the head reads that token, else the mean over the rows of the patches.

    Args:
        images: the model's input.
        targets: only their number matters.
        score: runs the model.
        heads: how the heads are combined; with "max" or "min" the rows of $A_l + I$ are divided by their sums.

    Raises:
        ValueError: other heads, or a model that mixes its tokens in another way than by attention between all of them.

    Source: Abnar and Zuidema 2020 (2005.00928), equation 1 and section 3.

    Differs: the paper only has the mean over the heads and a class token.
    """
    if heads not in _FUSE:
        raise ValueError(f"expected heads 'mean', 'max' or 'min', got {heads!r}; choose one of them")
    with torch.set_grad_enabled(score.differentiable):
        with AttentionWeights(score.model) as seen:
            score(images)
        fused = [_FUSE[heads](weights.to(wide(images)), dim=1, keepdim=True) for _, weights in seen.weights]
        sums = [attention + torch.eye(attention.shape[-1], device="cpu").to(attention) for attention in fused]
        rolled = _rolled(score, seen, [both / both.sum(-1, keepdim=True) for both in sums])
    return rolled.expand(-1, targets.shape[1], *seen.grid)


@Explainer
def gradient_rollout(
    images: Float[Tensor, "b c *size"], targets: Int[Tensor, "b t"], score: Scorer
) -> Float[Tensor, "b t *grid"]:
    r"""Rollout of the attention that raises the target's logit: $R \leftarrow R + \bar A R$ from layer to layer.

    $\bar A = E_h[(\nabla A \odot A)^+]$, with $\nabla A$ the gradient of the logit with respect to the attention, and
    $R = I$ at the start. The map is the row of the first token if the head reads that token, else the mean over the
    rows of the patches. The gradients of all targets come from one backward.

    Raises:
        ValueError: a model that mixes its tokens in another way than by attention between all of them.

    Source: Chefer, Gur and Wolf 2021 (2103.15679), equations 1, 5 and 6.

    Differs: the paper's vision transformers have a class token. The mean over the patches includes the identity
    that $R$ starts with: the same number at every patch.
    """
    with torch.enable_grad():
        with AttentionWeights(score.model) as seen:
            scores = score(images if score.differentiable else images.detach())
        weights = [w for _, w in seen.weights]
        gradients = gradients_of(scores, weights, create_graph=score.differentiable)
    factors: list[Tensor] = []
    with torch.set_grad_enabled(score.differentiable):
        for attention, gradient in zip(weights, gradients, strict=True):
            if gradient is not None:
                raising = (gradient.to(wide(images)) * attention.to(wide(images))[:, None]).relu().mean(2)
                factors.append(raising + torch.eye(raising.shape[-1], device="cpu").to(raising))
        return _rolled(score, seen, factors)


def _rolled(
    score: Scorer, seen: AttentionWeights, factors: list[Float[Tensor, "b t n n"]]
) -> Float[Tensor, "b t *grid"]:
    """The row of the product of the factors (the last one leftmost) that the head reads, one matrix at a time."""
    if seen.obstacle or not factors:
        raise ValueError(
            "expected a transformer whose attention is between all its tokens and feeds the logits, got "
            f"{type(score.model).__name__} with {seen.obstacle or 'none that could be seen'}; try grad_cam"
        )
    patches = factors[0].shape[-1] - seen.prefix
    row = factors[0].new_zeros(1, factors[0].shape[-1])
    if seen.from_first:
        row[:, 0] = 1
    else:
        row[:, seen.prefix :] = 1 / patches
    for factor in reversed(factors):
        row = row @ factor
    return row[..., 0, seen.prefix :].unflatten(-1, seen.grid)
