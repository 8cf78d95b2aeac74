"""Class activation maps: channels of one layer, weighted by what they do for a class."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import linear

from sightline.explainers.evidence import Explainer


@Explainer
def cam(
    activations: Float[Tensor, "b k h w"],
    logits: Float[Tensor, "b n"],
    targets: Int[Tensor, "b t"],
    linear_heads: tuple[nn.Linear, ...],
    layer: str,
) -> Float[Tensor, "b t h w"]:
    r"""Channels weighted by the linear layer behind global average pooling, summed: $\sum_k w_k^c A^k$, no ReLU.

    The mean of the map plus the layer's bias is the logit, which is also how the head is recognised: a linear layer
    that reproduces the logits from the mean activations. No backward pass is needed, however many targets.

    Raises:
        ValueError: the head is another one.

    Source: Zhou et al. 2016 (1512.04150), eq. 2.
    """
    means = activations.mean((2, 3))
    for head in linear_heads:
        if head.in_features == means.shape[1]:
            weight = head.weight.detach().to(means)
            bias = None if head.bias is None else head.bias.detach().to(means)  # pyright: ignore[reportUnnecessaryComparison]
            close = 8 * torch.finfo(head.weight.dtype).eps + 1e-3
            if torch.allclose(linear(means, weight, bias), logits, rtol=close, atol=close * float(logits.abs().max())):
                return torch.einsum("btk,bkhw->bthw", weight[targets], activations)
    raise ValueError(
        f"expected global average pooling and one linear layer behind {layer!r} for cam, got another head; use grad_cam"
    )


@Explainer
def grad_cam(activations: Float[Tensor, "b k h w"], gradients: Float[Tensor, "b t k h w"]) -> Float[Tensor, "b t h w"]:
    r"""Channels weighted by the mean gradient of the class's logit, summed, the positive part.

    $\mathrm{ReLU}(\sum_k \alpha_k^c A^k)$, with $\alpha_k^c$ the mean over positions of $\partial y^c / \partial A^k$.
    $y^c$ is the logit, not the probability. On a net with global average pooling and one linear layer this is
    ReLU(CAM) divided by the number of positions.

    Source: Selvaraju et al. 2017 (1610.02391), eqs. 1 and 2.

    >>> activations = torch.tensor([[[[1.0, 2.0]], [[3.0, 0.0]]]])
    >>> gradients = torch.tensor([[[[[2.0, 0.0]], [[-1.0, -1.0]]]]])
    >>> grad_cam.formula(activations, gradients).tolist()  # weights 1 and -1
    [[[[0.0, 2.0]]]]
    """
    return torch.einsum("btk,bkhw->bthw", gradients.mean((-2, -1)), activations).relu()
