"""Five attributions of captum: the same arguments, shapes and values; `sightline.compat.report` says where not."""

from collections.abc import Sequence
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sightline.compat.differences import note
from sightline.compat.pytorch_grad_cam.of_each import OfEach
from sightline.explainers import Explainer, Explanation, explain, occlusion
from sightline.explainers.cams import grad_cam
from sightline.explainers.gradients import gradients_on_the_way
from sightline.explainers.scorer import Scorer
from sightline.maps import Mode, resize

Target = int | tuple[int, ...] | list[Any] | Int[Tensor, "*b"] | None
"""A class, or a place in an output with more axes; a list or tensor has one for each image. None: the only output."""
Cells = Float[Tensor, "b k *cells"]
Weights = Float[Tensor, "b t k"]
Gradients = Float[Tensor, "b t c *grid"]
Images = Float[Tensor, "b c *grid"]
Colors = Float[Tensor, "b t rows w"]
"""A map in which the planes of the colors follow one another from top to bottom."""


class _Attribution:
    def __init__(self, forward_func: nn.Module, layer: nn.Module | None = None, device_ids: object = None) -> None:
        """`forward_func`: the model; `layer`: where the map is read; `device_ids` does nothing."""
        self.forward_func = forward_func
        self.layer = layer

    def _explained(self, method: Any, inputs: Tensor, target: Target, args: Any) -> tuple[Tensor, Explanation]:
        """The only map, and the explanation."""
        asked, given = OfEach(_targets(target, len(inputs))), () if args is None else args
        explanation = explain(self.forward_func, inputs, asked, [method], self.layer, forward_args=given)
        if any(module.training for module in self.forward_func.modules()):
            note(type(self).__name__, "captum runs a model in training mode as it is; here it runs in eval mode.")
        return next(iter(explanation.maps.values())), explanation


class Saliency(_Attribution):
    """The gradient at each color of each pixel, or its absolute value."""

    def attribute(
        self, inputs: Images, target: Target = None, abs: bool = True, additional_forward_args: Any = None
    ) -> Images:
        """One value per color."""
        values = self._explained(_gradient, inputs, target, additional_forward_args)[0].reshape(inputs.shape)
        return values.abs() if abs else values


class IntegratedGradients(_Attribution):
    """`integrated_gradients`, one value per color; `internal_batch_size` does nothing, as batches fit into memory."""

    def __init__(self, forward_func: nn.Module, multiply_by_inputs: bool = True) -> None:
        """`multiply_by_inputs`: False for the mean gradient alone."""
        super().__init__(forward_func)
        self.multiply_by_inputs = multiply_by_inputs

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
        """One value per color; with `return_convergence_delta` also how far their sum is from completeness, (b,)."""
        if method != "gausslegendre":
            raise ValueError(f"expected method='gausslegendre', the most exact rule, got {method!r}; leave it out")
        start = 0.0 if baselines is None else baselines
        given = partial(_integrated, steps=n_steps, baseline=start, multiply=self.multiply_by_inputs)
        values, explanation = self._explained(given, inputs, target, additional_forward_args)
        values = values.reshape(inputs.shape)
        if not return_convergence_delta:
            return values
        there = torch.as_tensor(start).to(inputs).expand_as(inputs)
        _, beginning = self._explained(_gradient, there, target, additional_forward_args)
        return values, values.flatten(1).sum(1) - (explanation.logits - beginning.logits)[:, 0]


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
        """One value per pixel, the same for its colors; `perturbations_per_eval` and `show_progress` do nothing."""
        colors, *sides = sliding_window_shapes
        steps = (strides,) * 3 if isinstance(strides, int) else strides or (1,) * 3
        if colors != inputs.shape[1] or len({*sides}) > 1 or len({*steps[1:]}) > 1:
            got = f"({colors}, {', '.join(map(str, sides))}) and {steps}; take ({inputs.shape[1]}, 16, 16)"
            raise ValueError(f"expected square windows over all colors and equal strides, got {got}")
        if any((side - sides[0]) % steps[1] for side in inputs.shape[2:]):
            note(
                "Occlusion", "captum cuts the last patches off at the border of the image; here they are moved inwards."
            )
        given = partial(occlusion, patch=sides[0], stride=steps[1], fill=0.0 if baselines is None else baselines)
        return self._explained(given, inputs, target, additional_forward_args)[0].expand_as(inputs)


class LayerGradCam(_Attribution):
    """`grad_cam` at a layer's own resolution, with negative values unless `relu_attributions`."""

    def attribute(
        self,
        inputs: Images,
        target: Target = None,
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False,
        relu_attributions: bool = False,
    ) -> Cells:
        """One value per position of the layer."""
        if attribute_to_layer_input:
            raise ValueError("expected attribute_to_layer_input=False, got True; pass the module before this layer")
        method = grad_cam if relu_attributions else _signed_grad_cam
        return self._explained(method, inputs, target, additional_forward_args)[0]


class GuidedGradCam(_Attribution):
    """`guided_grad_cam`, one value per color."""

    def __init__(self, model: nn.Module, layer: nn.Module, device_ids: object = None) -> None:
        """`layer`: where Grad-CAM is read; `device_ids` does nothing."""
        super().__init__(model, layer)

    def attribute(
        self,
        inputs: Images,
        target: Target = None,
        additional_forward_args: Any = None,
        interpolate_mode: Mode = "nearest",
    ) -> Images:
        """One value per color."""
        name = "GuidedGradCam"
        note(name, "captum guides only modules of type nn.ReLU; here every rectifier, also called as a function.")
        if interpolate_mode == "nearest":
            note(name, "captum's nearest position is half a pixel off where the sides are not multiples.")
        method = partial(_guided, interpolation=interpolate_mode)
        return self._explained(method, inputs, target, additional_forward_args)[0].reshape(inputs.shape)


class LayerAttribution:
    """Resizing of a layer's map."""

    @staticmethod
    def interpolate(layer_attribution: Cells, interpolate_dims: Any, interpolate_mode: str = "nearest") -> Images:
        """The map at another size."""
        return nn.functional.interpolate(layer_attribution, interpolate_dims, mode=interpolate_mode)


def _targets(target: Target, count: int) -> list[Any]:
    """A target for each image; the place () is the whole output."""
    places = () if target is None else target
    if not isinstance(places, int | tuple | list):
        places = torch.as_tensor(places).flatten().tolist()
    each = places if isinstance(places, list) else [places]
    return [itemgetter(place) for place in (each * count if len(each) == 1 else each)]


@Explainer
def _gradient(input_gradients: Gradients) -> Colors:
    return input_gradients.flatten(2, 3)


@Explainer
def _integrated(
    images: Images, score: Scorer, steps: int = 50, baseline: float | Tensor = 0.0, multiply: bool = True
) -> Colors:
    start, mean = gradients_on_the_way(images, score, steps, baseline)
    return ((images - start)[:, None] * mean if multiply else mean).flatten(2, 3)


@Explainer
def _signed_grad_cam(activations: Cells, mean_gradients: Weights) -> Float[Tensor, "b t *cells"]:
    return grad_cam.formula(activations, mean_gradients) - grad_cam.formula(-activations, mean_gradients)


@Explainer
def _guided(
    activations: Cells, mean_gradients: Weights, guided_gradients: Gradients, interpolation: Mode = "nearest"
) -> Colors:
    cams = resize(grad_cam.formula(activations, mean_gradients), tuple(guided_gradients.shape[3:]), interpolation)
    return (cams[:, :, None] * guided_gradients).flatten(2, 3)
