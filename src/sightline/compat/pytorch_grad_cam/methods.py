"""The class activation maps by their names in pytorch-grad-cam."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sightline.compat.differences import note
from sightline.compat.pytorch_grad_cam.ablation_layer import AblationLayer
from sightline.compat.pytorch_grad_cam.base_cam import EIGEN, BaseCAM, Reshape
from sightline.explainers import EXPLAINERS, Explainer
from sightline.explainers.cams import eigen_cam, plus_plus_weights, xgrad_weights
from sightline.explainers.perturbation import ablation_weights, score_weights
from sightline.explainers.scorer import Scorer

Activations = Float[Tensor, "b k *grid"]
Gradients = Float[Tensor, "b t k *grid"]
Map = Float[Tensor, "b t *grid"]
Share = Float[Tensor, "b 1 *ones"]


def _component(weights: Float[Tensor, "b k *_"], activations: Activations) -> Map:
    """The weighted channels projected on their first principal component."""
    weighted = weights.reshape(*weights.shape, *[1] * (activations.ndim - weights.ndim)) * activations
    return eigen_cam.formula(weighted, torch.zeros(len(weighted), 1, dtype=torch.long, device=weighted.device))


@Explainer
def _grad_cam(activations: Activations, mean_gradients: Float[Tensor, "b t k"]) -> Map:
    return _component(mean_gradients[:, 0], activations)


@Explainer
def _grad_cam_plus_plus(activations: Activations, gradients: Gradients) -> Map:
    return _component(plus_plus_weights(activations, gradients)[:, 0], activations)


@Explainer
def _xgrad_cam(activations: Activations, gradients: Gradients) -> Map:
    return _component(xgrad_weights(activations, gradients)[:, 0], activations)


@Explainer
def _layer_cam(activations: Activations, gradients: Gradients) -> Map:
    return _component(gradients[:, 0].relu(), activations)


@Explainer
def _hires_cam(activations: Activations, gradients: Gradients) -> Map:
    return _component(gradients[:, 0], activations)


@Explainer
def _score_cam(images: Float[Tensor, "b c *_"], activations: Activations, score: Scorer) -> Map:
    return _component(score_weights(images, activations, score)[..., 0], activations)


@Explainer
def _ablation_cam(
    images: Float[Tensor, "b c *_"],
    activations: Activations,
    head: Float[Tensor, "n k"] | None,
    layer: str,
    call: int,
    score: Scorer,
) -> Map:
    return _component(ablation_weights(images, activations, head, layer, call, score)[..., 0], activations)


@Explainer
def _epsilon(activations: Activations, gradients: Gradients) -> Share:
    """Share of the positions with a positive gradient at which 1e-6 is the larger part of the denominator."""
    squares = 2 * gradients[:, 0].square()
    sums = activations.flatten(2).sum(2).reshape(*activations.shape[:2], *[1] * (activations.ndim - 2))
    positive = gradients[:, 0] > 0
    lost = positive & ((squares + sums * gradients[:, 0] ** 3).abs() < 1e-6)
    share = lost.flatten(1).sum(1) / positive.flatten(1).sum(1).clamp(min=1)
    return share.reshape(-1, *[1] * (activations.ndim - 1))


@Explainer
def _negative(activations: Activations, targets: Int[Tensor, "b t"]) -> Share:
    """1 where the layer's lowest value is not 0."""
    lowest = activations.flatten(1).amin(1) != 0
    return lowest.to(activations).reshape(-1, *[1] * (activations.ndim - 1))


class GradCAM(BaseCAM):
    """`grad_cam`."""

    explainer, smoothed = EXPLAINERS["grad_cam"], _grad_cam


class GradCAMPlusPlus(BaseCAM):
    """`grad_cam_plus_plus`."""

    explainer, smoothed = EXPLAINERS["grad_cam_plus_plus"], _grad_cam_plus_plus
    doubts = (
        (
            _epsilon,
            "pytorch-grad-cam adds 1e-6 to a denominator of squared gradients that is often smaller, so that the "
            "weights there follow the cube of the gradients instead of equation 19 (share of the positions with a "
            "positive gradient).",
        ),
    )


class XGradCAM(BaseCAM):
    """`xgrad_cam`."""

    explainer, smoothed = EXPLAINERS["xgrad_cam"], _xgrad_cam


class LayerCAM(BaseCAM):
    """`layer_cam`."""

    explainer, smoothed = EXPLAINERS["layer_cam"], _layer_cam


class HiResCAM(BaseCAM):
    """`hires_cam`."""

    explainer, smoothed = EXPLAINERS["hires_cam"], _hires_cam


class EigenCAM(BaseCAM):
    """`eigen_cam`."""

    explainer = smoothed = EXPLAINERS["eigen_cam"]
    sentence, reads_gradients, reads_reshaped = EIGEN, False, True


class EigenGradCAM(BaseCAM):
    """Activation times gradient, projected on the first principal component over the channels."""

    explainer = smoothed = _hires_cam
    sentence = EIGEN


class ScoreCAM(BaseCAM):
    """`score_cam`; `batch_size` is the number of images per forward."""

    explainer, smoothed = EXPLAINERS["score_cam"], _score_cam
    reads_gradients, reads_reshaped = False, True
    sentence = (
        "pytorch-grad-cam enlarges the channels with aligned corners, and gives channels without contrast a weight too."
    )


class RandomCAM(BaseCAM):
    """`random_map`."""

    explainer = smoothed = EXPLAINERS["random_map"]
    sentence, reads_gradients = "other random numbers; here the same image always gets the same map.", False


class AblationCAM(BaseCAM):
    """`ablation_cam`; `ablation_layer` is not needed, and all channels are ablated."""

    explainer, smoothed, reads_gradients = EXPLAINERS["ablation_cam"], _ablation_cam, False
    doubts = (
        (
            _negative,
            "where the layer's lowest value is not 0, pytorch-grad-cam sets a channel to the lowest value less 1e7; "
            "here, as in the paper, always to 0 (share of the images).",
        ),
    )

    def __init__(
        self,
        model: nn.Module,
        target_layers: Sequence[nn.Module] | None,
        reshape_transform: Reshape | None = None,
        ablation_layer: AblationLayer | None = None,
        batch_size: int = 32,
        ratio_channels_to_ablate: int | float = 1.0,
    ) -> None:
        """As BaseCAM, and `batch_size`: versions of an image per forward."""
        super().__init__(model, target_layers, reshape_transform)
        self.batch_size = batch_size
        if ratio_channels_to_ablate < 1:
            note("AblationCAM", "pytorch-grad-cam ablates ratio_channels_to_ablate of the channels; here all of them.")
