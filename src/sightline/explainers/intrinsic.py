"""Maps that the model itself makes: its learned attention, and the size of its activations."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sightline.data import Preprocess
from sightline.explainers.evidence import gather
from sightline.explainers.explainer import Explainer
from sightline.inference import Images, forward_call, inputs_of, preserving

__all__ = ["attention_maps", "attention", "activation_map"]


@preserving
def attention_maps(
    model: nn.Module,
    images: Images,
    *,
    preprocess: Preprocess | None = None,
    forward_args: Any = (),
    forward_kwargs: Mapping[str, Any] | None = None,
) -> dict[str, Float[Tensor, "b _ _ _"]]:
    """Every learned attention map of a model, by the dotted name of its block, each of shape (b, k, h, w).

    A block is any module with a child called `gate` that returns a 4-D tensor, or the attention of a vision transformer
    between all its tokens: (b, heads, h, w), the attention that each patch receives from the class token if the head
    reads that token, else from all patches on average. The model runs once, in eval mode, and is left unchanged.
    `images`, `preprocess`, `forward_args` and `forward_kwargs` are those of `explain`.

    >>> from sightline.testing import PlantedAttention
    >>> attention_maps(PlantedAttention(), torch.ones(1, 3, 2, 2))["pool"].flatten().tolist()
    [0.25, 0.25, 0.25, 0.25]
    """
    images = inputs_of(model, images, preprocess).images
    forward = forward_call(images, None, forward_args, forward_kwargs)
    no_score = images.new_zeros(len(images))  # the model may return anything
    return gather(model, images, [(None, frozenset({"gates"}))], lambda output: no_score, forward).gates


@Explainer
def attention(gate: Float[Tensor, "b k *grid"], targets: Int[Tensor, "b t"]) -> Float[Tensor, "b t *grid"]:
    """Learned attention of the chosen block, the same for every target; with several heads their mean.

    `layer` names the block; by default the last block whose map has more than one position.

    Raises:
        ValueError: the model has no block with a spatial map, or not this one.

    Source: Jetley et al. 2018 (1804.02391), eq. 3, for Learn To Pay Attention; for other blocks the output of `gate`.
    """
    return gate.mean(1, keepdim=True).expand(-1, targets.shape[1], *gate.shape[2:])


@Explainer
def activation_map(
    activations: Float[Tensor, "b k *grid"], targets: Int[Tensor, "b t"], norm: Literal["l2", "mean"] = "l2"
) -> Float[Tensor, "b t *grid"]:
    r"""Size of the activations at each position, the same for every target.

    $\|A_{:ij}\|_2$ (`norm="l2"`), or the mean over the channels, which can be negative (`norm="mean"`).

    Source: Gomez et al. 2021 (2106.02566), code, for the norm; the mean is the definition on the lecture slides.

    >>> activation_map.formula(torch.tensor([[[[3.0]], [[4.0]]]]), torch.tensor([[0]])).item()
    5.0
    """
    if norm not in ("l2", "mean"):
        raise ValueError(f"expected norm 'l2' or 'mean', got {norm!r}; choose one of them")
    size = torch.linalg.vector_norm if norm == "l2" else torch.mean
    return size(activations, dim=1, keepdim=True).expand(-1, targets.shape[1], *activations.shape[2:])
