"""What one forward of a model and a few backwards through it show."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sightline.checks import bytes_of, check_whole
from sightline.explainers.capture import Capture, Captured, LayerLike, find_layer, head_of, quantized_in
from sightline.explainers.compiled import CompiledCapture
from sightline.explainers.rectifiers import Rectifiers, Rule
from sightline.explainers.scorer import Scorer, Targets, gradients_of, rows_of
from sightline.explainers.tokens import SmoothAttention
from sightline.facts import Progress
from sightline.inference import ForwardCall, Memory, unwrapped
from sightline.inference.axes import Layout

_OF_LAYER = {"activations", "gradients", "mean_gradients", "runner_up_gradients", "head"}
_OF_IMAGE: dict[str, Rule] = {
    "input_gradients": "plain",
    "guided_gradients": "guided",
    "deconvolved_gradients": "deconvolution",
}
GUIDED = {"guided_gradients", "deconvolved_gradients"}
_GRADIENTS = {"gradients", "mean_gradients", "runner_up_gradients"}
_AT_POSITIONS = {"gradients", "runner_up_gradients"}
_OF_TARGET = {*_OF_IMAGE, "runner_up_gradients", "score"}  # not gathered for the runner-up
_LARGEST_BLOCK = 2**26  # numbers of a gradient that are held at once: 256 MiB
_INPUT_GRAPH = 20  # the largest gradient on the way back to the images, in images

Request = tuple[LayerLike, frozenset[str]]
"""A layer, and the fields of `Evidence` to read there."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How evidence is gathered; see `explain`."""

    call: int | None = None
    batch_size: int = 64
    memory: Memory = None
    progress: Progress | None = None
    differentiable: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        check_whole(call=self.call)
        if self.memory is not None:
            bytes_of(self.memory)


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What one forward and one backward showed at one layer. A map is a formula over these fields."""

    images: Float[Tensor, "b c *grid"]
    logits: Float[Tensor, "b n"]
    targets: Int[Tensor, "b t"]
    """Class indices; -1 where a function of the model's output makes the score."""
    score: Scorer
    """The explained scores as a function of images, for methods that look at other images too."""
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
    runner_up_gradients: Float[Tensor, "b s k *cells"] | None = None
    """Gradient of the highest logit except the target's."""
    head: Float[Tensor, "n k"] | None
    """Weights of the head per class, if it is one linear layer on the mean of the activations."""
    input_gradients: Float[Tensor, "b s c *grid"] | None = None
    """Gradient of each target's score with respect to the images."""
    guided_gradients: Float[Tensor, "b s c *grid"] | None = None
    """The same with only positive gradients passed back through each rectifier."""
    deconvolved_gradients: Float[Tensor, "b s c *grid"] | None = None
    """The same with positive gradients passed back wherever a rectifier was, on or off."""
    gate: Float[Tensor, "b _ *cells"] | None
    """Learned weights of the attention block."""
    gates: dict[str, Float[Tensor, "b _ ..."]]
    """Learned weights of all blocks: the 4-D outputs of every child module called `gate`, by the name of its block, and
    the attention of vision transformers, by the name of its module."""
    rectifiers: Rectifiers
    """What was intercepted for guided gradients."""
    runner_up: "Evidence | None" = None
    """The same for the highest class except the target, where it cost next to nothing."""


class _Place:
    """What the forward showed where one request reads."""

    def __init__(self, request: Request, captured: Captured | None, scorer: Scorer) -> None:
        self.layer, self.needs = request
        self.captured = captured
        self.activations: Tensor | None = None
        self.head: Tensor | None = None
        if captured is not None:
            self.activations = _as_float(captured.layout.maps(captured.tensor), scorer)
            head = captured.head
            if head is None and not callable(scorer.asked):
                head = head_of(scorer.direct, captured)
            self.head = head if head is None or scorer.scale == 1 else torch.cat([-head, head])

    @property
    def at(self) -> Captured:
        """The tensor that was read."""
        assert self.captured is not None
        return self.captured

    @property
    def reads_gradients(self) -> bool:
        """Whether gradients of the targets' scores are read here, or cost nothing."""
        return bool(self.needs & {"gradients", "mean_gradients"}) or ("head" in self.needs and self.head is not None)

    @property
    def has_cheap_runner_up(self) -> bool:
        """Whether the same can be read for another class in closed form, or behind the last feature map."""
        return self.reads_gradients and (self.head is not None or self.layer is None) and not self.needs & _OF_TARGET


@runtime_checkable
class Seen(Protocol):
    """What a forward showed, and how its scores are made."""

    model: nn.Module
    scorer: Scorer
    gates: dict[str, Tensor]
    captured: list[Captured]


class Gathered:
    """One forward with its graph; `blocks` goes back through it, as many targets at a time as memory should hold."""

    def __init__(
        self,
        capture: Seen,
        requests: Sequence[Request],
        images: Tensor,
        rectifiers: Rectifiers,
    ) -> None:
        self.model = capture.model
        self.scorer = capture.scorer
        self.images = images
        self.rectifiers = rectifiers
        self.gates = {name: _as_float(gate, self.scorer) for name, gate in capture.gates.items()}
        layers = iter(capture.captured)
        self.places = [_Place(r, next(layers) if r[1] & _OF_LAYER else None, self.scorer) for r in requests]

    @property
    def logits(self) -> Float[Tensor, "b n"]:
        """Logits of the images."""
        return _as_float(self.scorer.logits, self.scorer)

    @property
    def probabilities(self) -> Float[Tensor, "b n"]:
        """Probabilities of the images' classes; where a function makes the scores, the scores."""
        return self.scorer.probable(_as_float(self.scorer.direct, self.scorer), self.scorer.activation)

    def blocks(self) -> Iterator[list[Evidence | None]]:
        """Evidence of every request, for some targets at a time; one that asks the scorer comes once, with all targets.

        Raises:
            ValueError: the scores do not depend on a layer, or there is no runner-up.
        """
        size = self._block_size()
        starts = range(0, self.scorer.targets.shape[1], size)
        for start in starts:
            # A checkpointed part of the model runs once more in the backward: in eval mode, as the first time.
            with torch.inference_mode(False), torch.enable_grad():
                block = self._block(slice(start, start + size), is_last=start == starts[-1])
            yield [None if start and "score" in p.needs else e for p, e in zip(self.places, block, strict=True)]

    def whole(self) -> list[Evidence]:
        """Evidence of every request with all targets at once, in the caller's grad mode."""
        return self._block(slice(None), is_last=True)

    def _block_size(self) -> int:
        """Targets whose gradients, at all layers and on the way back to the images, are held at once."""
        sizes: dict[tuple[int, bool], int] = {}
        for place in self.places:
            for field in place.needs & (_GRADIENTS if place.head is None else _GRADIENTS - {"mean_gradients"}):
                sizes[id(place.at.tensor), field == "runner_up_gradients"] = place.at.tensor.numel()
        of_image = any(place.needs & _OF_IMAGE.keys() for place in self.places)
        numbers = sum(sizes.values()) + of_image * _INPUT_GRAPH * self.images.numel()
        return max(1, _LARGEST_BLOCK // max(1, numbers))

    def _passes(self) -> dict[str, list[_Place]]:
        """The backwards that are needed, and the places at which each of them ends besides the images."""
        of_image = [field for field in _OF_IMAGE if any(field in place.needs for place in self.places)]
        plain = "input_gradients" if "input_gradients" in of_image else "layers"
        passes = {plain: [place for place in self.places if place.reads_gradients]}
        passes |= {field: [] for field in of_image if field != plain}
        against = [place for place in self.places if "runner_up_gradients" in place.needs]
        if self.scorer.targets.shape[1] == 1 < self.scorer.logits.shape[1]:
            against += [place for place in self.places if place.has_cheap_runner_up]
        return passes | ({"runner_up": against} if against else {})

    def _block(self, columns: slice, *, is_last: bool) -> list[Evidence]:
        """One backward for each kind of gradient that is needed; the graph is let go after the last one."""
        passes = self._passes()
        targets = self.scorer.targets[:, columns]
        runners_up = self.scorer.runners_up()[:, columns] if "runner_up" in passes else targets
        at_layers: dict[str, dict[_Place, Tensor | None]] = {}
        of_image: dict[str, Tensor] = {}
        for name, places in passes.items():
            self.rectifiers.rule = _OF_IMAGE.get(name, "plain")
            classes = runners_up if name == "runner_up" else targets
            keep = not is_last or name != [*passes][-1]
            at_layers[name], at_images = self._gradients(classes, places, name in _OF_IMAGE, keep)
            if at_images:
                (of_image[name],) = at_images
        self.rectifiers.rule = "plain"  # a loss on the maps goes back through the same graph
        of_target, of_runner_up = at_layers[next(iter(passes))], at_layers.get("runner_up", {})
        block: list[Evidence] = []
        for place in self.places:
            more: dict[str, Any] = {**of_image}
            if "runner_up_gradients" in place.needs:
                more["runner_up_gradients"] = of_runner_up[place]
            elif place in of_runner_up:
                more["runner_up"] = self._evidence(place, runners_up, of_runner_up[place], {})
            block.append(self._evidence(place, targets, of_target.get(place), more))
        return block

    def _gradients(
        self, classes: Tensor, places: Sequence[_Place], of_image: bool, keep: bool
    ) -> tuple[dict[_Place, Tensor | None], list[Tensor]]:
        """Gradients of the scores at the layers, (b, t, k, *grid), and at the images; in closed form where possible.

        None where a closed form is asked only for its mean.
        """
        through = [place for place in places if place.head is None]
        read = [place.at for place in through]
        if of_image:
            read.append(Captured("the images", self.images, Layout(tuple(self.images.shape[2:])), 0))
        tensors, graph = [captured.tensor for captured in read], self.scorer.differentiable
        scores = self.scorer.of(classes) if tensors else self.scorer.logits
        back = gradients_of(scores, tensors, create_graph=graph, retain_graph=keep)
        gradients: list[Tensor] = []
        for captured, gradient in zip(read, back, strict=True):
            if gradient is None:
                raise ValueError(
                    quantized_in(self.model)
                    or f"expected a layer that the logits depend on, got {captured.name!r}; choose another, and make "
                    "sure the forward does not switch gradients off"
                    + " and the function in targets= does not detach" * callable(self.scorer.asked)
                )
            gradients.append(captured.layout.maps(_as_float(gradient, self.scorer), lead=2))
        at_layers: dict[_Place, Tensor | None] = dict(zip(through, gradients, strict=False))
        for place in {*places} - {*through}:
            if not place.needs & _AT_POSITIONS:
                at_layers[place] = None
                continue
            weights, grid = self._mean(place, classes, None), place.at.layout.grid
            at_layers[place] = weights.reshape(*weights.shape, *[1] * len(grid)).expand(*weights.shape, *grid)
        return at_layers, gradients[len(through) :]

    def _mean(self, place: _Place, classes: Tensor, gradients: Tensor | None) -> Tensor:
        """Gradient at a layer, averaged over its positions."""
        if place.head is None:
            assert gradients is not None
            return gradients.flatten(3).mean(3)
        return rows_of(_as_float(place.head, self.scorer), classes, divisor=math.prod(place.at.layout.grid))

    def _evidence(self, place: _Place, targets: Tensor, gradients: Tensor | None, more: Mapping[str, Any]) -> Evidence:
        name = "" if place.captured is None else place.captured.name
        if "gate" in place.needs:
            name = _find_block(self.model, self.gates, place.layer)
        if "score" in place.needs:
            targets = self.scorer.targets
        return Evidence(
            images=self.images if self.scorer.differentiable else self.images.detach(),
            logits=self.logits,
            targets=self.scorer.classes_of(targets),
            score=self.scorer,
            layer=name,
            call=0 if place.captured is None else place.captured.call,
            activations=place.activations,
            gradients=gradients,
            mean_gradients=self._mean(place, targets, gradients) if "mean_gradients" in place.needs else None,
            head=None if place.head is None else _as_float(place.head, self.scorer),
            gate=self.gates[name] if "gate" in place.needs else None,
            gates=self.gates,
            rectifiers=self.rectifiers,
            **more,
        )


def gather(
    model: nn.Module,
    images: Float[Tensor, "b c *grid"],
    requests: Sequence[Request],
    targets: Targets = None,
    forward_call: ForwardCall | None = None,
    settings: Settings | None = None,
) -> Gathered:
    """Run the model once for all (layer, needed fields); the evidence is that of `Gathered.blocks`.

    Unless gradients with respect to the images are needed, what comes before the (first) layer runs without gradient,
    so no graph of the trunk is kept. No parameter gets a gradient; frozen parameters, an outer `no_grad` and in-place
    activations change nothing. The layer None is the model's `default_layer` if it has one, else the last tensor with
    h*w > 1 in this very forward through which the gradient of the logits is not zero. For a `gate` the layer names the
    attention block; None is the last block with h*w > 1. The caller keeps the model `untouched`.

    Raises:
        ValueError: bad targets or layer, no rectifier for guided gradients.
        TypeError: targets that are no class indices, a model that is none.
    """
    settings = settings or Settings()
    needs = frozenset[str]().union(*(needs for _, needs in requests))
    reads_images = bool(needs & _OF_IMAGE.keys())
    whole = settings.differentiable or reads_images
    net = unwrapped(model)
    with torch.inference_mode(False), torch.set_grad_enabled(whole):
        if not (settings.differentiable and images.requires_grad):
            images = images.detach().clone().requires_grad_(reads_images)
        scorer = Scorer(
            net,
            targets,
            forward_call=forward_call,
            batch_size=settings.batch_size,
            memory=settings.memory,
            progress=settings.progress,
            differentiable=settings.differentiable,
        )
        for layer, fields in requests:
            if layer is not None and not fields & _OF_LAYER:
                find_layer(net, layer)
        default = getattr(net, "default_layer", None)
        layers = [default if layer is None else layer for layer, fields in requests if fields & _OF_LAYER]
        if settings.compile:
            _check_compiled(layers, needs, scorer, settings)
            capture = CompiledCapture(net, scorer, layers[0], images, len(layers))
            return Gathered(capture, requests, images, Rectifiers())
        gates = bool(needs & {"gate", "gates"})
        capture = Capture(net, scorer, layers, images, call=settings.call, gates=gates, whole=whole)
        rectifiers, guided = Rectifiers(), needs & GUIDED
        with SmoothAttention() if settings.differentiable else nullcontext(), rectifiers if guided else nullcontext():
            capture.run()
        if guided:
            rectifiers.check()
        return Gathered(capture, requests, images, rectifiers)


def _as_float(value: Tensor, scorer: Scorer) -> Tensor:
    """The value in float32, or float64 if it is that, without its graph unless a map may stand in a loss."""
    value = value if scorer.differentiable else value.detach()
    return value if value.dtype == torch.float64 else value.float()


def _check_compiled(layers: Sequence[LayerLike], needs: frozenset[str], scorer: Scorer, settings: Settings) -> None:
    call = scorer.forward_call
    missing = needs - _OF_LAYER - {"images", "targets", "logits", "layer"}
    refused = {
        f"a method that reads {min(missing, default='')}": missing,
        f"{len({*layers})} layers": len({*layers}) != 1,
        "a function as targets": callable(scorer.asked),
        "differentiable=True": settings.differentiable,
        "call=": settings.call is not None,
        "output= or other inputs than images": call.output is not None or call.args or call.kwargs,
    }
    for what, is_asked in refused.items():
        if is_asked:
            raise ValueError(
                f"expected class activation maps at one layer, without a graph, for compile=True, got {what}; "
                "leave compile out"
            )


def _find_block(model: nn.Module, gates: dict[str, Tensor], layer: LayerLike) -> str:
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
