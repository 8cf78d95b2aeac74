"""Five attributions of captum: the same arguments, shapes and values; `sightline.compat.report` says where not."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from sightline import maps
from sightline.compat.differences import note
from sightline.compat.pytorch_grad_cam.of_each import OfEach
from sightline.compat.pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget, RawScoresOutputTarget
from sightline.explainers import Explainer, Explanation, explain, occlusion
from sightline.explainers.cams import grad_cam
from sightline.explainers.gradients import gradients_on_the_way, guided_grad_cam
from sightline.explainers.scorer import Scorer

Target = int | Sequence[int] | Int[Tensor, " b"] | None
"""The class of all images or of each; None for a model with one output."""
Cells = Float[Tensor, "b k *cells"]
Maps = Float[Tensor, "b t *cells"]
Gradients = Float[Tensor, "b t c *grid"]
Images = Float[Tensor, "b c *grid"]
Colors = Float[Tensor, "b t rows w"]
"""A map in which the planes of the colors follow one another from top to bottom."""


class _Attribution:
    def __init__(self, forward_func: nn.Module) -> None:
        """`forward_func`: the model."""
        self.forward_func = forward_func

    def _explained(
        self, method: Explainer | partial[Any], inputs: Tensor, target: Target, args: Any, layer: Any = None
    ) -> tuple[Tensor, Explanation]:
        """The only map, and the explanation."""
        if any(module.training for module in self.forward_func.modules()):
            note(type(self).__name__, "captum runs a model in training mode as it is; here it runs in eval mode.")
        if target is None:
            targets: list[Any] = [RawScoresOutputTarget()] * len(inputs)
        else:
            classes = [target] * len(inputs) if isinstance(target, int) else torch.as_tensor(target).flatten().tolist()
            targets = [ClassifierOutputTarget(each) for each in classes]
        explanation = explain(self.forward_func, inputs, OfEach(targets), [method], layer, forward_args=args or ())
        return next(iter(explanation.maps.values())), explanation


class Saliency(_Attribution):
    """The gradient at each color of each pixel, or its absolute value."""

    def attribute(
        self, inputs: Images, target: Target = None, abs: bool = True, additional_forward_args: Any = None
    ) -> Images:
        """One value per color."""
        values, _ = self._explained(_gradient, inputs, target, additional_forward_args)
        values = values[:, 0].unflatten(1, inputs.shape[1:3])
        return values.abs() if abs else values


class IntegratedGradients(_Attribution):
    """`integrated_gradients`, one value per color."""

    def attribute(
        self,
        inputs: Images,
        baselines: int | float | Tensor | None = None,
        target: Target = None,
        additional_forward_args: Any = None,
        n_steps: int = 50,
        method: str = "gausslegendre",
        internal_batch_size: int | None = None,
        return_convergence_delta: bool = False,
    ) -> Any:
        """One value per color; with `return_convergence_delta` also how far their sum is from completeness, (b,).

        `internal_batch_size` is not needed: batches are cut to fit into memory. Another `method` is refused.
        """
        if method != "gausslegendre":
            raise ValueError(f"expected method='gausslegendre', the most exact rule, got {method!r}; leave it out")
        start = 0.0 if baselines is None else baselines
        given = partial(_integrated, steps=n_steps, baseline=start)
        values, explanation = self._explained(given, inputs, target, additional_forward_args)
        values = values[:, 0].unflatten(1, inputs.shape[1:3])
        if not return_convergence_delta:
            return values
        there = torch.as_tensor(start).to(inputs).expand_as(inputs)
        _, beginning = self._explained(_gradient, there, target, additional_forward_args)
        gain = explanation.logits[:, 0] - beginning.logits[:, 0]
        return values, values.flatten(1).sum(1) - gain


class Occlusion(_Attribution):
    """`occlusion` by squares over all colors."""

    def attribute(
        self,
        inputs: Images,
        sliding_window_shapes: Sequence[int],
        strides: int | Sequence[int] | None = None,
        baselines: int | float | None = None,
        target: Target = None,
        additional_forward_args: Any = None,
        perturbations_per_eval: int = 1,
        show_progress: bool = False,
    ) -> Images:
        """One value per pixel, the same for its colors. A window that is no square over all colors is refused.

        `perturbations_per_eval` and `show_progress` do nothing.
        """
        sides = tuple(sliding_window_shapes)
        steps = (strides,) * len(sides) if isinstance(strides, int) else strides or (1,) * len(sides)
        if sides[0] != inputs.shape[1] or len({*sides[1:]}) > 1 or len({*steps[1:]}) > 1:
            raise ValueError(
                f"expected square windows over all {inputs.shape[1]} colors and equal strides, got {sides} and "
                f"{tuple(steps)}; take ({inputs.shape[1]}, 16, 16)"
            )
        if any((side - sides[1]) % steps[1] for side in inputs.shape[2:]):
            note(
                type(self).__name__,
                "captum cuts the last patches off at the border of the image; here they are moved inwards.",
            )
        given = partial(occlusion, patch=sides[1], stride=steps[1], fill=0.0 if baselines is None else baselines)
        return self._explained(given, inputs, target, additional_forward_args)[0].expand_as(inputs)


class _AtLayer(_Attribution):
    def __init__(self, model: nn.Module, layer: nn.Module, device_ids: object = None) -> None:
        """`layer`: where the map is read; `device_ids` does nothing."""
        super().__init__(model)
        self.layer = layer


class LayerGradCam(_AtLayer):
    """`grad_cam` at a layer's own resolution, with negative values unless `relu_attributions`."""

    def attribute(
        self,
        inputs: Images,
        target: Target = None,
        additional_forward_args: Any = None,
        relu_attributions: bool = False,
    ) -> Cells:
        """One value per position of the layer."""
        method = grad_cam if relu_attributions else _signed_grad_cam
        return self._explained(method, inputs, target, additional_forward_args, self.layer)[0]


class GuidedGradCam(_AtLayer):
    """`guided_grad_cam`, one value per color."""

    def attribute(
        self,
        inputs: Images,
        target: Target = None,
        additional_forward_args: Any = None,
        interpolate_mode: maps.Mode = "nearest",
    ) -> Images:
        """One value per color."""
        note(
            type(self).__name__,
            "captum guides only modules of type nn.ReLU; here every rectifier, also called as a function.",
        )
        if interpolate_mode == "nearest":
            note(
                type(self).__name__, "captum's nearest position is half a pixel off where the sides are not multiples."
            )
        method = partial(_guided, interpolation=interpolate_mode)
        values, _ = self._explained(method, inputs, target, additional_forward_args, self.layer)
        return values[:, 0].unflatten(1, inputs.shape[1:3])


class LayerAttribution:
    """Resizing of a layer's map."""

    @staticmethod
    def interpolate(
        layer_attribution: Cells, interpolate_dims: int | tuple[int, ...], interpolate_mode: str = "nearest"
    ) -> Images:
        """The map at another size."""
        return F.interpolate(layer_attribution, interpolate_dims, mode=interpolate_mode)


@Explainer
def _gradient(input_gradients: Gradients) -> Colors:
    return input_gradients.flatten(2, 3)


@Explainer
def _integrated(images: Images, score: Scorer, steps: int = 50, baseline: float | Tensor = 0.0) -> Colors:
    start, mean = gradients_on_the_way(images, score, steps, baseline)
    return ((images - start)[:, None] * mean).flatten(2, 3)


@Explainer
def _signed_grad_cam(activations: Cells, mean_gradients: Float[Tensor, "b t k"]) -> Maps:
    return grad_cam.formula(activations, mean_gradients) - grad_cam.formula(-activations, mean_gradients)


@Explainer
def _guided(
    activations: Cells,
    mean_gradients: Float[Tensor, "b t k"],
    guided_gradients: Gradients,
    interpolation: maps.Mode = "nearest",
) -> Colors:
    colors = guided_gradients.split(1, 2)
    maps_of = [guided_grad_cam.formula(activations, mean_gradients, color, interpolation) for color in colors]
    return torch.stack(maps_of, 2).flatten(2, 3)
