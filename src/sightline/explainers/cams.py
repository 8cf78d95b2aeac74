"""Class activation maps: the channels of one layer, weighted by their effect on a class."""

from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sightline.explainers.explainer import Explainer
from sightline.explainers.scorer import rows_of

__all__ = ["cam", "grad_cam", "grad_cam_plus_plus", "xgrad_cam", "layer_cam", "hires_cam", "eigen_cam", "finer_cam"]


@partial(Explainer, is_signed=True)
def cam(
    activations: Float[Tensor, "b k *grid"],
    targets: Int[Tensor, "b t"],
    head: Float[Tensor, "n k"] | None,
    layer: str,
) -> Float[Tensor, "b t *grid"]:
    r"""Channels weighted by the linear layer behind global average pooling, summed: $\sum_k w_k^c A^k$, no ReLU.

    The mean of the map plus the layer's bias is the logit; a single logit z counts as z for class 1 and -z for class 0.
    The head is read off the graph of the logits: a mean over all positions and at most one linear layer, in either
    order; a 1 x 1 convolution is one. No backward pass is needed, however many targets there are.

    Raises:
        ValueError: another head, or a function as targets, which has no weights.

    Source: Zhou et al. 2016 (1512.04150), eq. 2.
    Elsewhere: `CAM` (torch-cam).
    """
    if head is None:
        raise ValueError(
            "expected class indices as targets for cam, which reads their weights, got a function; use hires_cam"
            if (targets < 0).any()
            else f"expected global average pooling and one linear layer behind {layer!r} for cam, got another head; "
            "use grad_cam"
        )
    return _weighted(rows_of(head, targets), activations)


@Explainer
def grad_cam(
    activations: Float[Tensor, "b k *grid"], mean_gradients: Float[Tensor, "b t k"]
) -> Float[Tensor, "b t *grid"]:
    r"""Channels weighted by the mean gradient of the class's logit, summed, the positive part.

    $\mathrm{ReLU}(\sum_k \alpha_k^c A^k)$, with $\alpha_k^c$ the mean over positions of $\partial y^c / \partial A^k$.
    $y^c$ is the logit, not the probability. On a net with global average pooling and one linear layer this is
    ReLU(CAM) divided by the number of positions.

    Source: Selvaraju et al. 2017 (1610.02391), eqs. 1 and 2.
    Elsewhere: `GradCAM` (pytorch-grad-cam), `GradCAM` (torch-cam), `LayerGradCam` (captum).

    >>> grad_cam.formula(torch.tensor([[[[1.0, 2.0]], [[3.0, 0.0]]]]), torch.tensor([[[1.0, -1.0]]])).tolist()
    [[[[0.0, 2.0]]]]
    """
    return _weighted(mean_gradients, activations).relu()


@Explainer
def grad_cam_plus_plus(
    activations: Float[Tensor, "b k *grid"], gradients: Float[Tensor, "b t k *grid"], normalize_alpha: bool = False
) -> Float[Tensor, "b t *grid"]:
    r"""Channels weighted by their positive gradients, each with its own factor, summed, the positive part.

    $\mathrm{ReLU}(\sum_k w_k^c A^k)$ with $w_k^c = \sum_{ij} \alpha_{ij}^{kc} \, \mathrm{ReLU}(g_{ij}^{kc})$. The
    factor $\alpha = g^2 / (2 g^2 + \sum_{ab} A_{ab}^k \, g^3)$ is computed as $1 / (2 + \sum_{ab} A_{ab}^k \, g)$ and
    is 0 where the denominator is 0: no third power of a small gradient is lost, and no epsilon is needed.
    With `normalize_alpha` a channel's factors are divided by their sum over its positions with a positive gradient.

    Source: Chattopadhyay et al. 2018 (1710.11063), eqs. 5 and 19; `normalize_alpha`: the authors' code.
    Elsewhere: `GradCAMPlusPlus` (pytorch-grad-cam), `GradCAMpp` (torch-cam).

    Differs: the factor $e^{y^c}$ of the whole map, which comes from explaining $e^{y^c}$ and can overflow, is left out.

    >>> activations, gradients = torch.tensor([[[[1.0, 2.0]]]]), torch.tensor([[[[[2.0, -1.0]]]]])
    >>> grad_cam_plus_plus.formula(activations, gradients).tolist()  # weight 2 / (2 + 3 * 2)
    [[[[0.25, 0.5]]]]
    """
    return _weighted(plus_plus_weights(activations, gradients, normalize_alpha), activations).relu()


@Explainer
def xgrad_cam(
    activations: Float[Tensor, "b k *grid"], gradients: Float[Tensor, "b t k *grid"]
) -> Float[Tensor, "b t *grid"]:
    r"""Channels weighted by the mean of their gradients, averaged with the activations, summed, the positive part.

    $\mathrm{ReLU}(\sum_k w_k^c A^k)$ with $w_k^c = \sum_{ij} A_{ij}^k g_{ij}^{kc} / \sum_{ij} A_{ij}^k$, and 0 for a
    channel whose sum is 0. Before the ReLU the map sums to $\sum_k \sum_{ij} A_{ij}^k g_{ij}^{kc}$. Meant for
    activations behind a ReLU: a channel whose values cancel out gets a large weight.

    Source: Fu et al. 2020 (2008.02312).
    Elsewhere: `XGradCAM` (pytorch-grad-cam), `XGradCAM` (torch-cam).

    Differs: the authors' code adds an epsilon to the denominator.

    >>> activations, gradients = torch.tensor([[[[1.0, 3.0]]]]), torch.tensor([[[[[2.0, 4.0]]]]])
    >>> xgrad_cam.formula(activations, gradients).tolist()  # weight (2 + 12) / 4
    [[[[3.5, 10.5]]]]
    """
    return _weighted(xgrad_weights(activations, gradients), activations).relu()


@Explainer
def layer_cam(
    activations: Float[Tensor, "b k *grid"], gradients: Float[Tensor, "b t k *grid"]
) -> Float[Tensor, "b t *grid"]:
    r"""Each activation weighted by its own positive gradient, summed over channels, the positive part.

    $\mathrm{ReLU}(\sum_k \mathrm{ReLU}(g^{kc}_{ij}) A^k_{ij})$.

    Source: Jiang et al. 2021, "LayerCAM: Exploring Hierarchical Class Activation Maps for Localization".
    Elsewhere: `LayerCAM` (pytorch-grad-cam), `LayerCAM` (torch-cam).

    >>> activations, gradients = torch.tensor([[[[1.0, 3.0]]]]), torch.tensor([[[[[2.0, -4.0]]]]])
    >>> layer_cam.formula(activations, gradients).tolist()
    [[[[2.0, 0.0]]]]
    """
    return _products(_distinct(gradients).relu(), activations).relu()


@partial(Explainer, is_signed=True)
def hires_cam(
    activations: Float[Tensor, "b k *grid"], gradients: Float[Tensor, "b t k *grid"]
) -> Float[Tensor, "b t *grid"]:
    r"""Activation times gradient, summed over channels: $\sum_k g^{kc}_{ij} A^k_{ij}$, no ReLU.

    If everything behind the layer is linear, the sum of the map plus the contribution of the biases is the logit.

    Source: Draelos and Carin 2020 (2011.08891).
    Elsewhere: `HiResCAM` (pytorch-grad-cam).

    >>> activations, gradients = torch.tensor([[[[1.0, 3.0]]]]), torch.tensor([[[[[2.0, -4.0]]]]])
    >>> hires_cam.formula(activations, gradients).tolist()
    [[[[2.0, -12.0]]]]
    """
    return _products(_distinct(gradients), activations)


@Explainer
def eigen_cam(activations: Float[Tensor, "b k *grid"], targets: Int[Tensor, "b t"]) -> Float[Tensor, "b t *grid"]:
    r"""Activations projected on their first principal component, the same for every target.

    $A v_1$ with $v_1$ the first right singular vector of the activations $A$ (positions x channels), not centered. The
    sign of a singular vector is arbitrary; it is chosen so that the sum of the map is not negative.

    Source: Muhammad and Yeasin 2020 (2008.00299).
    Elsewhere: `EigenCAM` (pytorch-grad-cam).

    >>> eigen_cam.formula(torch.tensor([[[[3.0, 0.0]], [[4.0, 0.0]]]]), torch.tensor([[0]])).round(decimals=5).tolist()
    [[[[5.0, 0.0]]]]
    """
    columns = activations.flatten(2)
    few_channels = columns.shape[1] < columns.shape[2]
    gram = columns @ columns.mT if few_channels else columns.mT @ columns
    # Otherwise eigh refuses the whole batch for one image with a non-finite value; its own map stays non-finite.
    gram = gram.masked_fill(~gram.isfinite(), 0)
    first = torch.linalg.eigh(gram)[1][:, :, -1:]
    if not few_channels:
        first = columns @ first
        first = _ratio(first, torch.linalg.vector_norm(first, dim=1, keepdim=True))
    projected = first.mT @ columns
    projected = torch.where(projected.sum(2, keepdim=True) < 0, -projected, projected)
    return projected.unflatten(2, activations.shape[2:]).expand(-1, targets.shape[1], *activations.shape[2:])


@Explainer
def finer_cam(
    activations: Float[Tensor, "b k *grid"],
    mean_gradients: Float[Tensor, "b t k"],
    runner_up_gradients: Float[Tensor, "b t k *grid"],
    gamma: float = 1.0,
) -> Float[Tensor, "b t *grid"]:
    r"""Grad-CAM of what speaks for the class and not for the runner-up: of $y^c - \gamma y^d$.

    The runner-up $d$ is the class with the highest other logit; `gamma` is how much of it is subtracted, 0 is Grad-CAM.

    Source: Zhang et al. 2025 (2501.11309); `gamma`: the authors' code compares two classes with 1.
    Elsewhere: `FinerCAM` (pytorch-grad-cam), `FinerCAM` (torch-cam).

    Differs: one other class, where the authors' code can also average several; it ranks them by the distance of their
    logit from the target's, which is the same for the predicted class.

    >>> activations = torch.tensor([[[[1.0, 1.0]], [[0.0, 1.0]]]])
    >>> runner_up = torch.tensor([[[[[1.0, 1.0]], [[0.0, 0.0]]]]])
    >>> finer_cam.formula(activations, torch.tensor([[[1.0, 1.0]]]), runner_up).tolist()  # weights 0 and 1
    [[[[0.0, 1.0]]]]
    """
    return _weighted(mean_gradients - gamma * _distinct(runner_up_gradients).mean(3), activations).relu()


def plus_plus_weights(
    activations: Float[Tensor, "b k *grid"], gradients: Float[Tensor, "b t k *grid"], normalize_alpha: bool = False
) -> Float[Tensor, "b t k"]:
    """The channels' weights of `grad_cam_plus_plus`."""
    flat = activations.flatten(2)
    distinct = _distinct(gradients)
    alphas = _ratio((distinct > 0).to(distinct), 2 + flat.sum(2)[:, None, :, None] * distinct)
    weights = (alphas * distinct).sum(3)
    return _ratio(weights, alphas.sum(3)) if normalize_alpha else weights * (flat.shape[2] // distinct.shape[3])


def xgrad_weights(
    activations: Float[Tensor, "b k *grid"], gradients: Float[Tensor, "b t k *grid"]
) -> Float[Tensor, "b t k"]:
    """The channels' weights of `xgrad_cam`."""
    distinct = _distinct(gradients)
    parts = activations.flatten(2).unflatten(2, (distinct.shape[3], -1)).sum(3)
    return _ratio((distinct * parts[:, None]).sum(3), parts.sum(2)[:, None])


def _weighted(weights: Float[Tensor, "b t k"], activations: Float[Tensor, "b k *grid"]) -> Float[Tensor, "b t *grid"]:
    if weights.stride(0) == 0 < weights.shape[0] - 1:  # the same for all images: one product, not one for each
        columns = activations.transpose(0, 1).flatten(1)
        return (weights[0] @ columns).unflatten(1, (activations.shape[0], *activations.shape[2:])).transpose(0, 1)
    return (weights @ activations.flatten(2)).unflatten(2, activations.shape[2:])


def _distinct(gradients: Float[Tensor, "b t k *grid"]) -> Float[Tensor, "b t k p"]:
    """Gradients by position: p = 1 where one number is expanded over the grid (average pooling), else all positions."""
    flat = gradients.flatten(3)
    return flat[..., :1] if flat.stride(3) == 0 else flat


def _products(
    gradients: Float[Tensor, "b t k p"], activations: Float[Tensor, "b k *grid"]
) -> Float[Tensor, "b t *grid"]:
    """Sum over the channels of gradient times activation; the first as `_distinct` gives it."""
    if gradients.shape[3] == 1:
        return _weighted(gradients[..., 0], activations)
    return (gradients * activations.flatten(2)[:, None]).sum(2).unflatten(2, activations.shape[2:])


def _ratio(numerators: Tensor, denominators: Tensor) -> Tensor:
    """Quotient, 0 where the denominator is 0, with a finite gradient there."""
    return numerators / denominators.masked_fill(denominators == 0, torch.inf)
