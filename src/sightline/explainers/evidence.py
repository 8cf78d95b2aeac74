"""What one forward and one backward of a model show, and the formulas over it."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from copy import copy
from dataclasses import dataclass, fields, replace
from functools import update_wrapper
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sightline import arguments
from sightline.checks import check_whole
from sightline.explainers.capture import Capture, Captured, Layer, find_layer
from sightline.explainers.compiled import CompiledCapture
from sightline.explainers.features import quantized_in
from sightline.explainers.rectifiers import Rectifiers, Rule
from sightline.explainers.scorer import Scorer, Targets, gradients_of, rows_of
from sightline.explainers.tokens import SmoothAttention
from sightline.facts import Progress
from sightline.inference import (
    ForwardCall,
    Output,
    check_images,
    exact,
    forward_call,
    probabilities_of,
    untouched,
    version_of,
)

_OF_LAYER = {"activations", "gradients", "mean_gradients", "rival_gradients", "head"}
_OF_IMAGE: dict[str, Rule] = {
    "input_gradients": "plain",
    "guided_gradients": "guided",
    "deconvolved_gradients": "deconvolution",
}
_GRADIENTS = {"gradients", "mean_gradients", "rival_gradients"}
_OF_ITSELF = {*_OF_IMAGE, "rival_gradients", "score"}  # not known for a rival
_LARGEST_BLOCK = 2**26  # numbers of a gradient that are held at once: 256 MiB
_INPUT_GRAPH = 20  # the largest gradient on the way back to the images, in images

Request = tuple[Layer, frozenset[str]]
"""A layer, and the fields of `Evidence` to read there."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What one forward and one backward showed at one layer. A map is a formula over these fields."""

    images: Float[Tensor, "b c *grid"]
    logits: Float[Tensor, "b n"]
    targets: Int[Tensor, "b t"]
    """Class indices; -1 where a function of the model's output makes the score."""
    score: Scorer
    """The explained numbers as a function of images, for methods that look at other images too."""
    layer: str
    """Dotted name of the module whose output was read, or of the attention block; empty for a control."""
    call: int
    """Which run of that module, from 0."""
    activations: Float[Tensor, "b k *cells"] | None
    """Output of the layer."""
    gradients: Float[Tensor, "b s k *cells"] | None
    """Gradient of each target's score with respect to the activations."""
    mean_gradients: Float[Tensor, "b s k"] | None
    """Their mean over the positions."""
    rival_gradients: Float[Tensor, "b s k *cells"] | None
    """Gradient of the highest logit but the target's."""
    head: Float[Tensor, "n k"] | None
    """Weights of the head per class, if it is one linear layer on the mean of the activations."""
    input_gradients: Float[Tensor, "b s c *grid"] | None
    """Gradient of each target's score with respect to the images."""
    guided_gradients: Float[Tensor, "b s c *grid"] | None
    """The same with only positive gradients passed back through each rectifier."""
    deconvolved_gradients: Float[Tensor, "b s c *grid"] | None
    """The same with positive gradients passed back wherever a rectifier was, on or off."""
    gate: Float[Tensor, "b _ *cells"] | None
    """Learned weights of the attention block."""
    gates: dict[str, Float[Tensor, "b _ ..."]]
    """Learned weights of all blocks: the 4-D outputs of every child module called `gate`, by the name of its block, and
    the attention of vision transformers, by the name of its module."""
    rectifiers: Rectifiers | None
    """What was intercepted for guided gradients."""
    rival: "Evidence | None"
    """The same for the highest class but the target, where it cost next to nothing."""


class Explainer:
    """A formula over evidence, callable on a model: `(model, images, targets=None, layer=None) -> (b, t, h, w)`.

    The formula's parameters without default name the fields of `Evidence` that it reads; the others are its options.
    `@partial(Explainer, is_signed=True)` says that negative values of the map speak against the target,
    `sums_to_score=True` that it should add up to the explained score, and `ignores_class=True` that it is the same for
    all classes though it reads something of which this cannot be seen.
    """

    def __init__(
        self,
        formula: Callable[..., Float[Tensor, "b t ..."]],
        *,
        is_signed: bool = False,
        sums_to_score: bool = False,
        ignores_class: bool = False,
    ) -> None:
        update_wrapper(self, formula)
        self.name = formula.__name__
        self.formula = formula
        self.is_signed = is_signed
        """Whether 0 is the middle of the map: above it speaks for the target, below against it."""
        self.sums_to_score = sums_to_score
        """Whether the map hands the score (less that of its baseline) out to the pixels; a gap is a verdict."""
        arguments.check_needs(formula, (field.name for field in fields(Evidence)), "fields of Evidence")
        self.needs = arguments.needs(formula)
        self.is_blind_to_class = ignores_class or self.needs <= {"images", "targets", "activations", "gate", "layer"}
        """Whether the map is the same for all classes by construction."""
        self.options = arguments.options(formula)
        self.__signature__ = arguments.signature_with_options(type(self).__call__, formula)

    def __repr__(self) -> str:
        return f"<Explainer {self.name}>"

    @property
    def is_control(self) -> bool:
        """Whether the map is made without looking at what the model does."""
        return self.needs <= {"images", "targets"}

    def __call__(
        self,
        model: nn.Module,
        images: Float[Tensor, "b c *grid"],
        targets: Targets = None,
        layer: Layer = None,
        *,
        output: Output = None,
        forward_args: Any = (),
        forward_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Float[Tensor, "b t *cells"]:
        """Raw map per target, at the layer's own resolution, float32 (float64 where the model computes in it)."""
        with untouched(model), exact():
            check_images(images)
            asked = forward_call(images, output, forward_args, forward_kwargs)
            gathered = gather(model, images, [(layer, self.needs)], targets, asked=asked)
            return torch.cat([self.map_of(one, **options) for (one,) in gathered.blocks() if one is not None], 1)

    def map_of(self, evidence: Evidence, **options: Any) -> Float[Tensor, "b t *grid"]:
        """The formula on evidence that is already there.

        Raises:
            ValueError: it returns something else than one map per target.
            RuntimeError: it changes evidence in place, which other formulas read.
        """
        given = {name: getattr(evidence, name) for name in self.needs}
        versions = {name: version_of(value) for name, value in given.items() if isinstance(value, Tensor)}
        score = evidence.score
        autocast = torch.autocast(evidence.images.device.type, enabled=False)
        still = untouched(score.model) if "score" in self.needs else nullcontext()
        smooth = SmoothAttention() if "score" in self.needs and score.differentiable else nullcontext()
        with still, smooth, autocast, torch.inference_mode(False), torch.set_grad_enabled(score.differentiable):
            found = self.formula(**given, **options)
        if changed := [name for name, version in versions.items() if version_of(given[name]) != version]:
            raise RuntimeError(
                f"expected a formula that leaves its evidence alone, got {self.name}, which changes {changed[0]!r} in "
                "place; change a clone"
            )
        shape, dimensions = tuple(evidence.targets.shape), evidence.images.ndim
        is_map = isinstance(found, Tensor) and found.is_floating_point() and found.ndim == dimensions  # pyright: ignore[reportUnnecessaryIsInstance]
        if not is_map or found.shape[:2] != shape:
            got = f"{found.dtype} of shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__  # pyright: ignore[reportUnnecessaryIsInstance]
            sides = ", ".join("dhw"[5 - dimensions :])
            raise ValueError(f"expected float maps ({shape[0]}, {shape[1]}, {sides}) from {self.name}, got {got}")
        return found if found.dtype == evidence.logits.dtype == torch.float64 else found.float()


class Gathered:
    """One forward with its graph; `blocks` goes back through it, as many targets at a time as memory should hold."""

    def __init__(
        self,
        capture: Capture | CompiledCapture,
        requests: Sequence[Request],
        images: Tensor,
        rectifiers: Rectifiers | None,
    ) -> None:
        self.model = capture.model
        self.scorer = capture.scorer
        self.scores = capture.scores
        self.requests = requests
        self.images = images
        self.rectifiers = rectifiers
        self.gates = {name: self._float(gate) for name, gate in capture.gates.items()}
        layers = iter(capture.captured)
        self.captured = [next(layers) if needs & _OF_LAYER else None for _, needs in requests]
        self.activations = [None if c is None else self._float(c.layout.maps(c.tensor)) for c in self.captured]
        self.heads = [None if c is None else self._head(c) for c in self.captured]

    def blocks(self) -> Iterator[list[Evidence | None]]:
        """Evidence of every request, for some targets at a time; one that asks the scorer comes once, with all targets.

        Raises:
            ValueError: the scores do not depend on a layer, or there is no rival.
        """
        every = self.scorer.targets
        size = self._block_size()
        starts = range(0, every.shape[1], size)
        for start in starts:
            last = start == starts[-1]
            columns = slice(start, start + size)
            # A checkpointed part of the model runs once more in the backward: in eval mode, as the first time.
            with untouched(self.model), torch.inference_mode(False), torch.enable_grad():
                block = self._block(columns, last=last)
            yield [None if start and "score" in needs else block[i] for i, (_, needs) in enumerate(self.requests)]

    @property
    def logits(self) -> Float[Tensor, "b n"]:
        """Logits of the images."""
        return self._float(self.scorer.logits)

    @property
    def probabilities(self) -> Float[Tensor, "b n"]:
        """Probabilities of the images' classes; where a function makes the scores, the scores."""
        direct = self._float(self.scorer.direct)
        return direct if callable(self.scorer.asked) else probabilities_of(direct, self.scorer.link)

    def _head(self, captured: Captured) -> Tensor | None:
        """Weights of each class's score; none if a function makes the scores."""
        weights = None if callable(self.scorer.asked) else captured.head(self.scorer.direct)
        return weights if weights is None or self.scorer.scale == 1 else torch.cat([-weights, weights])

    def _block_size(self) -> int:
        """Targets whose gradients, at all layers and on the way back to the images, are held at once."""
        sizes: dict[tuple[int, bool], int] = {}
        for (_, needs), captured, head in zip(self.requests, self.captured, self.heads, strict=True):
            for field in needs & (_GRADIENTS if head is None else _GRADIENTS - {"mean_gradients"}):
                if captured is not None:
                    sizes[id(captured.tensor), field == "rival_gradients"] = captured.tensor.numel()
        of_image = any(needs & _OF_IMAGE.keys() for _, needs in self.requests)
        numbers = sum(sizes.values()) + of_image * _INPUT_GRAPH * self.images.numel()
        return max(1, _LARGEST_BLOCK // max(1, numbers))

    def _block(self, columns: slice, *, last: bool) -> list[Evidence]:
        """One backward for each kind of gradient that is needed; the graph is let go after the last one."""
        needs = [needs for _, needs in self.requests]
        every = range(len(needs))
        at_layers = [
            i
            for i in every
            if needs[i] & {"gradients", "mean_gradients"} or ("head" in needs[i] and self.heads[i] is not None)
        ]
        against = [i for i in every if "rival_gradients" in needs[i]]
        if self.scorer.targets.shape[1] == 1 < self.scorer.logits.shape[1]:
            cheap = [i for i in at_layers if self.heads[i] is not None or self.requests[i][0] is None]
            against += [i for i in cheap if not needs[i] & _OF_ITSELF]
        passes: list[str] = [field for field in _OF_IMAGE if any(field in own for own in needs)]
        if at_layers and "input_gradients" not in passes:
            passes.insert(0, "layers")
        if against:
            passes.append("rival")
        targets = self.scorer.targets[:, columns]
        rivals = self.scorer.rivals()[:, columns] if against else targets
        found: dict[int, Tensor] = {}
        rival: dict[int, Tensor] = {}
        of_image: dict[str, Tensor] = {}
        for name in passes:
            if self.rectifiers is not None:
                self.rectifiers.rule = _OF_IMAGE.get(name, "plain")
            keep = not last or name != passes[-1]
            if name == "rival":
                rival, _ = self._gradients(self.scorer.of(rivals), rivals, against, None, keep)
                continue
            places = at_layers if name in ("layers", "input_gradients") else []
            leaf = self.images if name in _OF_IMAGE else None
            at_places, at_images = self._gradients(self.scores[:, columns], targets, places, leaf, keep)
            found |= at_places
            if at_images is not None:
                of_image[name] = at_images
        if self.rectifiers is not None:
            self.rectifiers.rule = "plain"  # a loss on the maps goes back through the same graph
        made = [self._evidence(i, targets, found.get(i), rival.get(i), of_image) for i in every]
        alike = set(rival) - {i for i in every if "rival_gradients" in needs[i]}
        other = [self._evidence(i, rivals, rival[i], None, {}) if i in alike else None for i in every]
        return [replace(one, rival=two) for one, two in zip(made, other, strict=True)]

    def _gradients(
        self, scores: Tensor, classes: Tensor, places: Sequence[int], leaf: Tensor | None, keep: bool
    ) -> tuple[dict[int, Tensor], Tensor | None]:
        """Gradients of the scores at the layers, (b, t, k, *grid), and at the images; in closed form where known."""
        through = [i for i in places if self.heads[i] is None]
        tensors = [self._of(i).tensor for i in through] + ([] if leaf is None else [leaf])
        names = [self._of(i).name for i in through] + ["the images"]
        if tensors and not scores.requires_grad:
            raise ValueError(
                quantized_in(self.model)
                or f"expected a layer that the logits depend on, got {names[0]!r}; choose another, "
                "and see that the forward does not switch gradients off"
            )
        differentiable = self.scorer.differentiable
        back = gradients_of(scores, tensors, create_graph=differentiable, retain_graph=keep) if tensors else []
        for name, gradient in zip(names, back, strict=False):
            if gradient is None:
                raise ValueError(
                    quantized_in(self.model)
                    or f"expected a layer that the logits depend on, got {name!r}; choose another, and see that the "
                    "forward does not switch gradients off"
                )
        made = [self._float(gradient) for gradient in back if gradient is not None]
        found = {i: self._of(i).layout.maps(gradient, lead=2) for i, gradient in zip(through, made, strict=False)}
        for i in set(places) - set(through):
            weights = self._mean(i, classes, None)
            grid = self._of(i).layout.grid
            found[i] = weights.reshape(*weights.shape, *[1] * len(grid)).expand(*weights.shape, *grid)
        return found, None if leaf is None else made[-1]

    def _mean(self, i: int, classes: Tensor, gradients: Tensor | None) -> Tensor:
        """Gradient at a layer, averaged over its positions."""
        head = self.heads[i]
        if head is None:
            assert gradients is not None
            return gradients.flatten(3).mean(3)
        return rows_of(self._float(head), classes, divisor=math.prod(self._of(i).layout.grid))

    def _of(self, i: int) -> Captured:
        captured = self.captured[i]
        assert captured is not None
        return captured

    def _float(self, value: Tensor) -> Tensor:
        value = value if self.scorer.differentiable else value.detach()
        return value if value.dtype == torch.float64 else value.float()

    def _evidence(
        self,
        i: int,
        targets: Tensor,
        gradients: Tensor | None,
        rival: Tensor | None,
        of_image: dict[str, Tensor],
    ) -> Evidence:
        layer, needs = self.requests[i]
        captured = self.captured[i]
        name = "" if captured is None else captured.name
        if "gate" in needs:
            name = _find_block(self.model, self.gates, layer)
        if "score" in needs:
            targets = self.scorer.targets
        head = self.heads[i]
        return Evidence(
            images=self.images if self.scorer.differentiable else self.images.detach(),
            logits=self.logits,
            targets=self.scorer.classes_of(targets),
            score=copy(self.scorer),  # on which a method may leave its remarks
            layer=name,
            call=0 if captured is None else captured.call,
            activations=self.activations[i],
            gradients=gradients,
            mean_gradients=self._mean(i, targets, gradients) if "mean_gradients" in needs else None,
            rival_gradients=rival,
            head=None if head is None else self._float(head),
            gate=self.gates[name] if "gate" in needs else None,
            gates=self.gates,
            rectifiers=self.rectifiers,
            rival=None,
            input_gradients=of_image.get("input_gradients"),
            guided_gradients=of_image.get("guided_gradients"),
            deconvolved_gradients=of_image.get("deconvolved_gradients"),
        )


def gather(
    model: nn.Module,
    images: Float[Tensor, "b c *grid"],
    requests: Sequence[Request],
    targets: Targets = None,
    *,
    asked: ForwardCall | None = None,
    call: int | None = None,
    batch_size: int = 64,
    progress: Progress | None = None,
    differentiable: bool = False,
    compile: bool = False,
) -> Gathered:
    """Run the model once for all (layer, needed fields); the evidence is that of `Gathered.blocks`.

    Unless gradients with respect to the images are needed, what comes before the (first) layer runs without gradient,
    so no graph of the trunk is kept. No parameter gets a gradient; frozen parameters, an outer `no_grad` and in-place
    activations change nothing. The layer None is the model's `default_layer` if it has one, else the last tensor with
    h*w > 1, found in this very forward, through which the gradient of the logits is not zero. For a `gate` the layer
    names the attention block; None is the last block with h*w > 1.

    Raises:
        ValueError: bad images, targets or layer, no rectifier for guided gradients.
        TypeError: targets that are no class indices, a model that is none.
    """
    check_images(images)
    check_whole(call=call)
    needs = frozenset[str]().union(*(own for _, own in requests))
    whole = differentiable or bool(needs & _OF_IMAGE.keys())
    with untouched(model) as net, torch.inference_mode(False), torch.set_grad_enabled(whole):
        if not (differentiable and images.requires_grad):
            images = images.detach().clone().requires_grad_(bool(needs & _OF_IMAGE.keys()))
        scorer = Scorer(
            net,
            targets,
            forward_call=asked,
            batch_size=batch_size,
            progress=progress,
            differentiable=differentiable,
        )
        for layer, _ in requests:
            if layer is not None:
                find_layer(net, layer)
        default = getattr(net, "default_layer", None)
        layers = [default if layer is None else layer for layer, own in requests if own & _OF_LAYER]
        if compile:
            _check_compiled(layers, needs, targets, differentiable, call, scorer.forward_call)
            return Gathered(CompiledCapture(net, scorer, layers[0], images, len(layers)), requests, images, None)
        capture = Capture(net, scorer, layers, call=call, gates=bool(needs & {"gate", "gates"}), whole=whole)
        rectifiers = Rectifiers() if needs & {"guided_gradients", "deconvolved_gradients"} else None
        with SmoothAttention() if differentiable else nullcontext(), rectifiers or nullcontext():
            capture.run(images)
        if rectifiers is not None:
            rectifiers.check()
        return Gathered(capture, requests, images, rectifiers)


def _check_compiled(
    layers: Sequence[Layer],
    needs: frozenset[str],
    targets: Targets,
    differentiable: bool,
    call: int | None,
    asked: ForwardCall,
) -> None:
    if missing := needs - _OF_LAYER - {"images", "targets", "logits", "layer"}:
        wrong = f"a method that reads {min(missing)}"
    elif len(set(layers)) != 1:
        wrong = f"{len(set(layers))} layers"
    elif callable(targets):
        wrong = "a function as targets"
    elif differentiable or call is not None:
        wrong = "differentiable=True" if differentiable else "call="
    elif asked.output is not None or asked.args or asked.kwargs:
        wrong = "output= or other inputs than images"
    else:
        return
    raise ValueError(
        f"expected class activation maps at one layer, without a graph, for compile=True, got {wrong}; "
        "leave compile out"
    )


def _find_block(model: nn.Module, gates: dict[str, Tensor], layer: Layer) -> str:
    spatial = [name for name, gate in gates.items() if gate[0, 0].numel() > 1]
    if layer is None and spatial:
        return spatial[-1]
    name = "" if layer is None else find_layer(model, layer)[0]
    if name not in spatial:
        blocks = ", ".join(spatial) or "none"
        wanted = repr(name) if name else type(model).__name__
        raise ValueError(
            f"expected an attention block with a spatial map, got {wanted} without one; "
            f"blocks of this model: {blocks}; for another map try grad_cam"
        )
    return name
