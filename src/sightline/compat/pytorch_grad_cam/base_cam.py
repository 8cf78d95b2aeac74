"""The call that all class activation maps share."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sightline import maps
from sightline.compat.differences import note
from sightline.compat.pytorch_grad_cam.of_each import ModelTarget, OfEach, highest
from sightline.compat.pytorch_grad_cam.utils.image import stretched
from sightline.explainers import Explainer, Explanation, explain
from sightline.explainers.capture import find_layer
from sightline.inference import untouched, version_of
from sightline.inference.operations import first_tensor

Reshape = Callable[[Any], Float[Tensor, "b c h w"]]
_BRIGHTNESS = (0.9, 1.0, 1.1)


class BaseCAM:
    """Maps of a batch as pytorch-grad-cam returns them: each stretched to 0..1, resized to the images, averaged.

    A subclass names the explainer, and the one that smooths by the first principal component.
    """

    explainer: Explainer
    smoothed: Explainer
    doubts: tuple[tuple[Explainer, str], ...] = ()
    """Explainers that measure, in the same pass, which share of the call a difference concerns, and the sentence."""
    sentence = ""
    """A difference that concerns every call."""
    reads_gradients = True
    reads_reshaped = False
    """Whether what `reshape_transform` makes of a layer's output is read, whatever that output is."""

    def __init__(
        self, model: nn.Module, target_layers: Sequence[nn.Module] | None, reshape_transform: Reshape | None = None
    ) -> None:
        """Nothing is done with the model before the call.

        Args:
            model: your model; its modes, gradients and hooks are left as they are.
            target_layers: modules whose maps are averaged. None: the last feature map.
            reshape_transform: how the layer's output becomes a feature map. EigenCAM and ScoreCAM read what it makes;
                for the others sightline finds positions itself, and refuses a transform that sees them elsewhere.
        """
        self.model = model
        self.target_layers = target_layers
        self.reshape_transform = reshape_transform
        self.tta_transforms: Sequence[Any] | None = None
        self.outputs: Any = None
        """What the model returned for the images of the last call."""
        self.explanation: Explanation | None = None
        """Of the last call: the raw maps, and the verdicts on each."""
        self._is_checked = False
        self._reshaped: list[tuple[str, Tensor]] = []

    def __enter__(self) -> "BaseCAM":
        return self

    def __exit__(self, *_: object) -> Literal[False]:
        return False

    def __call__(
        self,
        input_tensor: Float[Tensor, "b c *grid"],
        targets: Sequence[ModelTarget] | None = None,
        aug_smooth: bool = False,
        eigen_smooth: bool = False,
    ) -> Float[np.ndarray, "b *grid"]:
        """Maps from 0 to 1, one per image.

        Args:
            input_tensor: images as the model wants them.
            targets: one for each image, from its row of the output to a number. None: the highest class.
            aug_smooth: the mean over six versions of the images: mirrored or not, in three brightnesses.
            eigen_smooth: in place of the sum over the channels, their projection on the first principal component.

        Raises:
            ValueError: not one target for each image, or a layer that cannot be read.
        """
        make = partial(self.forward, targets=targets, eigen_smooth=eigen_smooth)
        return self.mean_of_versions(input_tensor, make) if aug_smooth else make(input_tensor)

    def forward(
        self,
        input_tensor: Float[Tensor, "b c *grid"],
        targets: Sequence[ModelTarget] | None,
        eigen_smooth: bool = False,
        choose: Callable[[Any], Sequence[ModelTarget]] = highest,
    ) -> Float[np.ndarray, "b *grid"]:
        """The maps of one version of the images."""
        parameter = next(self.model.parameters(), input_tensor)
        images = input_tensor.to(parameter.device)
        self._note(eigen_smooth)
        explainer = self.smoothed if eigen_smooth else self.explainer
        asked = OfEach(targets, choose, type(self).__name__, self._keep)
        seen: list[Tensor] = []
        methods = [explainer, *(doubt for doubt, _ in self.doubts)]
        model, layers, reshape = self.model, self.target_layers, self.reshape_transform
        if layers and reshape is not None and self.reads_reshaped:
            model = _Reshaped(model, layers, reshape)
            layers = [*model.read]
        elif layers and not self._is_checked:
            methods += [_reader(seen)] * (reshape is not None)
            layers = self._with_positions(images, layers)
        if self.target_layers and not layers:
            return self._without_positions(images, asked)
        self.explanation = explanation = explain(
            model,
            images,
            asked,
            methods,
            layers,
            call=0,  # pytorch-grad-cam reads the first of several runs
            batch_size=getattr(self, "batch_size", 64),
        )
        for (name, reshaped), read in zip(self._reshaped, seen, strict=False):
            _check_positions(name, reshaped, read[:1])
        self._is_checked = layers is self.target_layers
        for doubt, sentence in self.doubts:
            share = float(torch.cat(_of(explanation, doubt)).mean())
            if share:
                note(type(self).__name__, sentence, share)
        sides = tuple(images.shape[2:])
        scaled = [
            maps.resize(stretched(values.clamp(min=0)[:, 0])[:, None], sides) for values in _of(explanation, explainer)
        ]
        return stretched(torch.cat(scaled, 1).mean(1)).float().cpu().numpy()

    def mean_of_versions(
        self, images: Float[Tensor, "b c *grid"], make: Callable[[Tensor], np.ndarray]
    ) -> Float[np.ndarray, "b *grid"]:
        """The mean of the maps that `make` makes of all versions of the images, turned back."""
        maps: list[Tensor] = []
        if self.tta_transforms is not None:
            for transform in self.tta_transforms:
                values = torch.from_numpy(make(transform.augment_image(images)))
                maps.append(transform.deaugment_mask(values[:, None])[:, 0])
        else:
            for mirrored in (False, True):
                for factor in _BRIGHTNESS:
                    values = torch.from_numpy(make(factor * (images.flip(-1) if mirrored else images)))
                    maps.append(values.flip(-1) if mirrored else values)
        return torch.stack(maps).mean(0).numpy()

    def _keep(self, outputs: Any) -> None:
        self.outputs = outputs.detach() if isinstance(outputs, Tensor) else outputs

    def _note(self, eigen_smooth: bool) -> None:
        name = type(self).__name__
        if self.sentence:
            note(name, self.sentence)
        if eigen_smooth and self.smoothed is not self.explainer:
            note(name, "with eigen_smooth, " + EIGEN)
        if any(module.training for module in self.model.modules()):
            note(name, "pytorch-grad-cam leaves your model in eval mode; here its modes come back after the call.")
        if self.reads_gradients and any(parameter.requires_grad for parameter in self.model.parameters()):
            had = any(parameter.grad is not None for parameter in self.model.parameters())
            note(
                name,
                "pytorch-grad-cam calls zero_grad(), which loses the gradients that your parameters have, and leaves "
                "others; here they stay."
                if had
                else "pytorch-grad-cam leaves a gradient on every parameter; here they have none.",
            )

    def _with_positions(self, images: Tensor, layers: Sequence[nn.Module]) -> Sequence[nn.Module]:
        """The layers with more than one position, found in a forward of the first image.

        It also shows whether their outputs are changed later, and what `reshape_transform` makes of them.
        """
        kept: dict[str, tuple[Any, Tensor, int]] = {}

        def keep(name: str, output: Any) -> None:
            first = first_tensor(output)
            if first is not None and name not in kept:
                copied = None if self.reshape_transform is None else self.reshape_transform(output)
                kept[name] = copied, first, version_of(first)

        with untouched(self.model) as network, torch.no_grad(), ExitStack() as hooks:
            names = [find_layer(network, layer)[0] for layer in layers]
            for name, layer in zip(names, layers, strict=True):
                hook = layer.register_forward_hook(lambda _, inputs, output, name=name: keep(name, output))
                hooks.callback(hook.remove)
            network(images[:1])
        single: set[str] = set()
        for name, (_, tensor, version) in kept.items():
            if version_of(tensor) != version:
                note(
                    type(self).__name__,
                    f"the model changes the output of {name} in place afterwards: on a CPU, pytorch-grad-cam reads the "
                    "activations after the change, and the gradients before it; here both are before it.",
                )
            if tensor.ndim == images.ndim and tensor[0, 0].numel() == 1:
                single.add(name)
                note(type(self).__name__, f"{name} has a single position, so its map is 0, as in pytorch-grad-cam.")
        read = [name for name in names if name not in single]
        self._reshaped = [(name, kept[name][0]) for name in read if name in kept and kept[name][0] is not None]
        return [layer for name, layer in zip(names, layers, strict=True) if name in read] if single else layers

    def _without_positions(self, images: Tensor, asked: OfEach) -> Float[np.ndarray, "b *grid"]:
        """Maps of 0, after the targets are checked."""
        with untouched(self.model) as network, torch.no_grad():
            output = network(images)
            asked.fixed(output)(output)
        return np.zeros((len(images), *images.shape[2:]), dtype=np.float32)


class _Reshaped(nn.Module):
    """A model that also hands what a transform makes of each layer's output to a child, where it is read."""

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module], reshape: Reshape) -> None:
        super().__init__()
        self.model, self.reshape = model, reshape
        self.read = nn.ModuleList(nn.Identity() for _ in layers)
        self.pairs = [*zip(layers, self.read, strict=True)]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns."""

        def hand(read: nn.Module, output: Any) -> None:
            read(self.reshape(output))

        with ExitStack() as hooks:
            for layer, read in self.pairs:
                hook = layer.register_forward_hook(lambda _, inputs, output, read=read: hand(read, output))
                hooks.callback(hook.remove)
            return self.model(*args, **kwargs)


def _check_positions(name: str, wanted: Tensor, here: Tensor) -> None:
    if wanted.shape != here.shape or (wanted - here).abs().max() > 1e-3 * here.abs().max():
        raise ValueError(
            f"expected a reshape_transform to {tuple(here.shape[1:])}, the positions that sightline finds in {name}, "
            f"got {tuple(wanted.shape[1:])} or another order; leave it out"
        )


EIGEN = (
    "pytorch-grad-cam centers the channels and keeps the arbitrary sign of the component, so that a map may be inside "
    "out; here they are not centered, as in the paper (2008.00299), and the sum of the map is positive."
)


def _of(explanation: Explanation, explainer: Explainer) -> list[Tensor]:
    """The explainer's map at each layer, in order."""
    return [value for name, value in explanation.maps.items() if name.partition("@")[0] == explainer.name]


def _reader(seen: list[Tensor]) -> Explainer:
    """An explainer that keeps what it reads."""

    def read(activations: Float[Tensor, "b k *cells"], targets: Int[Tensor, "b t"]) -> Float[Tensor, "b t *ones"]:
        seen.append(activations)
        return activations.new_zeros(*targets.shape, *[1] * (activations.ndim - 2))

    return Explainer(read)
