"""The one forward and the one head-only backward that every map is computed from."""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial, update_wrapper
from inspect import Parameter, Signature, signature
from typing import Any, TypeGuard, overload

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import one_hot
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.hooks import RemovableHandle

from sightline.explainers.tokens import patch_maps
from sightline.inference import check_images, run, untouched

Targets = int | Int[Tensor, " b"] | Int[Tensor, "b t"] | None
Layer = str | nn.Module | None
_LARGEST_STRETCH = 2.5  # of a map's height/width against the image's; rounding 3 pixels to 2 and 1 gives 2
_LARGEST_HEAD = 8  # weight layers; VGG has three, LTPA one per level


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What one forward and one backward showed at one layer. A map is a formula over these fields."""

    images: Float[Tensor, "b c H W"]
    logits: Float[Tensor, "b n"]
    targets: Int[Tensor, "b t"]
    layer: str
    """Dotted name of the module whose output was read, or of the attention block; empty for a control."""
    activations: Float[Tensor, "b k h w"] | None
    """Output of the layer."""
    gradients: Float[Tensor, "b t k h w"] | None
    """Gradient of each target's logit with respect to the activations."""
    gate: Float[Tensor, "b _ _ _"] | None
    """Learned weights of the attention block."""
    gates: dict[str, Float[Tensor, "b _ _ _"]]
    """Learned weights of all blocks: the 4-D outputs of every child module called `gate`, by the name of its block, and
    the attention of timm's vision transformers, by the name of its module."""
    linear_heads: tuple[nn.Linear, ...]
    """Linear layers of the model that yield as many numbers as there are classes."""


class Explainer:
    """A formula over evidence, callable on a model: `(model, images, targets=None, layer=None) -> (b, t, h, w)`.

    The formula's parameters without default name the fields of `Evidence` that it reads; the others are its options.
    """

    def __init__(self, formula: Callable[..., Float[Tensor, "b t h w"]]) -> None:
        update_wrapper(self, formula)
        self.name = formula.__name__
        self.formula = formula
        parameters = signature(formula).parameters.values()
        self.needs = frozenset(p.name for p in parameters if p.default is p.empty)
        own = [p.replace(kind=Parameter.KEYWORD_ONLY) for p in parameters if p.default is not p.empty]
        self.options = frozenset(p.name for p in own)
        called = [p for p in signature(type(self).__call__).parameters.values() if p.name not in ("self", "options")]
        self.__signature__ = Signature([*called, *own])

    @property
    def is_control(self) -> bool:
        """Whether the map is made without looking at what the model does."""
        return self.needs <= {"images", "targets"}

    def __call__(
        self,
        model: nn.Module,
        images: Float[Tensor, "b c H W"],
        targets: Targets = None,
        layer: Layer = None,
        **options: Any,
    ) -> Float[Tensor, "b t h w"]:
        """Raw map per target, at the layer's own resolution, float32 (float64 where the model computes in it)."""
        return self.map_of(gather(model, images, [(layer, self.needs)], targets)[0], **options)

    def map_of(self, evidence: Evidence, **options: Any) -> Float[Tensor, "b t h w"]:
        """The formula on evidence that is already there."""
        with torch.autocast(evidence.images.device.type, enabled=False):
            return self.formula(**{name: getattr(evidence, name) for name in self.needs}, **options)


def resolve_targets(targets: Targets, logits: Float[Tensor, "b n"]) -> Int[Tensor, "b t"]:
    """Class indices as (batch, targets): None = the predicted class, an int = that class for every image.

    Raises:
        ValueError: another length than the batch, or a class that does not exist.
        TypeError: neither None, an int, nor an integer tensor.

    >>> resolve_targets(None, torch.tensor([[0.0, 3.0], [2.0, 1.0]])).tolist()
    [[1], [0]]
    """
    batch, classes = logits.shape
    if targets is None:
        return logits.argmax(1, keepdim=True)
    if isinstance(targets, int) and not isinstance(targets, bool):
        found = torch.full((batch, 1), targets, device=logits.device)
    elif isinstance(targets, Tensor) and not targets.is_floating_point() and targets.dtype != torch.bool:
        found = targets.to(logits.device, torch.long)
        if found.ndim not in (1, 2) or len(found) != batch or not found.numel():
            raise ValueError(
                f"expected targets of shape ({batch},) or ({batch}, t), one row per image, got {tuple(targets.shape)}; "
                "pass an int to explain the same class in every image"
            )
        found = found.reshape(batch, -1)
    else:
        got = f"a {targets.dtype} tensor" if isinstance(targets, Tensor) else f"{targets!r}"
        raise TypeError(f"expected targets None, an int or an integer tensor, got {got}; pass class indices")
    if not (0 <= int(found.min()) and int(found.max()) < classes):
        raise ValueError(
            f"expected targets in 0..{classes - 1}, got {int(found.min())}..{int(found.max())}; "
            f"the model has {classes} classes, counted from 0"
        )
    return found


def find_layer(model: nn.Module, layer: str | nn.Module) -> tuple[str, nn.Module]:
    """Name and module of a layer given by either.

    Raises:
        ValueError: the model has no such module; the closest names are shown.

    >>> find_layer(nn.Sequential(nn.ReLU()), "0")
    ('0', ReLU())
    """
    modules = dict(model.named_modules())
    if isinstance(layer, str):
        if layer and layer in modules:
            return layer, modules[layer]
        close = get_close_matches(layer, modules, n=3)
        hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "see model.named_modules()"
        raise ValueError(f"expected the name of a layer of {type(model).__name__}, got {layer!r}; {hint}")
    for name, module in modules.items():
        if module is layer:
            return name, module
    raise ValueError(
        f"expected a module of {type(model).__name__}, got another {type(layer).__name__}; pass its dotted name"
    )


def gather(
    model: nn.Module,
    images: Float[Tensor, "b c H W"],
    requests: Sequence[tuple[Layer, frozenset[str]]],
    targets: Targets = None,
) -> list[Evidence]:
    """Run the model once, and its head backward once, and return the evidence for each (layer, needed fields).

    The part before the (first) layer runs without gradient, so no graph of the trunk is kept and no parameter gets a
    gradient; frozen parameters, an outer `no_grad` and in-place activations change nothing.
    The layer None is the model's `default_layer` if it has one, else the last tensor with h*w > 1, found in this very
    forward, through which the gradient of the logits is not zero. For a `gate` the layer names the attention block;
    None is the last block with h*w > 1.

    Raises:
        ValueError: bad images, targets or layer.
        TypeError: targets that are no class indices, a model that is none.
    """
    check_images(images)
    with untouched(model) as net, torch.inference_mode(False), torch.no_grad():
        images = images.clone() if images.is_inference() else images.detach()
        reads = [bool(needs & {"activations", "gradients"}) for _, needs in requests]
        default = getattr(net, "default_layer", None)
        layers = [default if layer is None else layer for (layer, _), read in zip(requests, reads, strict=True) if read]
        if None in layers and any(layer is not None for layer in layers):
            return _apart(net, images, requests, targets)
        capture = _Capture(net, layers, gates=any(needs & {"gate", "gates"} for _, needs in requests))
        logits = capture.run(images)
        classes = resolve_targets(targets, logits)
        backward = any("gradients" in needs for _, needs in requests)
        gradients = capture.gradients(logits, classes) if backward else [None] * len(layers)
    heads = tuple(m for m in net.modules() if isinstance(m, nn.Linear) and m.out_features == logits.shape[1])
    gates = {name: _at_least_float32(gate) for name, gate in capture.gates.items()}
    captured = iter(zip(capture.names, capture.tensors, gradients, strict=True))
    found: list[Evidence] = []
    for (layer, needs), read in zip(requests, reads, strict=True):
        name, activations, gradient = next(captured) if read else ("", None, None)
        if "gate" in needs:
            name = _find_block(net, gates, layer)
        found.append(
            Evidence(
                images=images,
                logits=_at_least_float32(logits),
                targets=classes,
                layer=name,
                activations=_at_least_float32(activations),
                gradients=_at_least_float32(gradient),
                gate=gates[name] if "gate" in needs else None,
                gates=gates,
                linear_heads=heads,
            )
        )
    return found


def _apart(
    model: nn.Module, images: Tensor, requests: Sequence[tuple[Layer, frozenset[str]]], targets: Targets
) -> list[Evidence]:
    """One forward for the named layers, another for the automatic one: it may be the output of no module."""
    automatic = [layer is None and bool(needs & {"activations", "gradients"}) for layer, needs in requests]
    found: dict[bool, Iterator[Evidence]] = {}
    for choice in (False, True):
        half = [request for request, chosen in zip(requests, automatic, strict=True) if chosen == choice]
        found[choice] = iter(gather(model, images, half, targets))
    return [next(found[choice]) for choice in automatic]


def _find_block(model: nn.Module, gates: dict[str, Tensor], layer: Layer) -> str:
    spatial = [name for name, gate in gates.items() if _is_spatial(gate)]
    if layer is None and spatial:
        return spatial[-1]
    name = "" if layer is None else find_layer(model, layer)[0]
    if name not in spatial:
        blocks = ", ".join(spatial) or "none"
        raise ValueError(
            f"expected an attention block with a spatial map, got {name or 'a model'!r} without one; "
            f"blocks of this model: {blocks}; for another map try grad_cam"
        )
    return name


class _Capture:
    """One forward that turns the wanted tensors into leaves, and the gradient of the logits at them."""

    def __init__(self, model: nn.Module, layers: Sequence[Layer], *, gates: bool) -> None:
        self.model = model
        self.automatic = [index for index, layer in enumerate(layers) if layer is None]
        self.wanted = {i: find_layer(model, layer) for i, layer in enumerate(layers) if layer is not None}
        self.read_gates = gates
        self.gates: dict[str, Tensor] = {}
        self.captured: dict[str, Tensor] = {}
        self.names: list[str] = [""] * len(layers)
        self.tensors: list[Tensor] = []

    def run(self, images: Tensor) -> Tensor:
        handles: list[RemovableHandle] = []
        head = _LastSpatial(self.model, len(images)) if self.automatic else None
        try:
            for name, module in dict(self.wanted.values()).items():
                handles.append(module.register_forward_hook(self._keep(name)))
            if self.read_gates:
                for name, module in self.model.named_modules():
                    gate = getattr(module, "gate", None)
                    if isinstance(gate, nn.Module):
                        handles.append(gate.register_forward_hook(self._keep_gate(name)))
            attention = patch_maps(self.model, self._keep_gate) if self.read_gates else nullcontext()
            with attention, head or nullcontext():
                logits = run(self.model, images)
        finally:
            for handle in handles:
                handle.remove()
            if head is not None:
                head.remove()
        found: dict[int, tuple[str, Tensor]] = {}
        for index, (name, _) in self.wanted.items():
            if name not in self.captured:
                raise ValueError(
                    f"expected a layer that the forward runs, got {name!r}, which it never called; choose another"
                )
            found[index] = name, self.captured[name]
        if head is not None:
            name, tensor, alone = head.last(logits)
            if not alone and name in dict(self.model.named_modules()):
                # Attention weights feed the logits too and are made from it: named, it gets their gradient as well.
                self.wanted = dict.fromkeys(self.automatic, find_layer(self.model, name))
                self.automatic = []
                self.gates.clear()
                return self.run(images)
            found |= dict.fromkeys(self.automatic, (name, tensor))
        self.names = [found[index][0] for index in range(len(found))]
        self.tensors = [found[index][1] for index in range(len(found))]
        for name, tensor in zip(self.names, self.tensors, strict=True):
            stretch = tensor.shape[2] * images.shape[3] / (tensor.shape[3] * images.shape[2])
            if max(stretch, 1 / stretch) > _LARGEST_STRETCH:
                raise ValueError(
                    f"expected a (b, c, h, w) tensor shaped like the image at {name!r}, got {tuple(tensor.shape)} "
                    "(channels last, or tokens?); choose another layer"
                )
        return logits

    def _keep(self, name: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> Tensor:
            if not _is_spatial(output):
                got = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
                raise ValueError(
                    f"expected a layer that yields (b, c, h, w) with h*w > 1, got {got} from {name!r}; choose another"
                )
            if name in self.captured:
                raise ValueError(
                    f"expected a layer that runs once, got {name!r}, which the forward calls twice; choose another"
                )
            torch.set_grad_enabled(True)  # from here to the logits; the caller's no_grad ends it
            if not output.requires_grad:
                output = output.detach().clone().requires_grad_()
            self.captured[name] = output
            return output.clone()  # an in-place activation behind the layer must not rewrite what was captured

        return hook

    def _keep_gate(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.ndim == 4:
                if name in self.gates:
                    raise ValueError(f"expected an attention block that runs once, got {name!r}, which runs twice")
                self.gates[name] = output.detach().clone()

        return hook

    def gradients(self, logits: Tensor, targets: Tensor) -> list[Tensor]:
        chosen = one_hot(targets.T, logits.shape[1]).to(logits.dtype)
        if not logits.requires_grad:
            raise ValueError(
                f"expected a layer that the logits depend on, got {self.names[0]!r}; choose another, "
                "and see that the forward does not switch gradients off"
            )
        inputs = {id(tensor): (name, tensor) for name, tensor in zip(self.names, self.tensors, strict=True)}
        one = len(chosen) == 1
        found = torch.autograd.grad(
            logits,
            [tensor for _, tensor in inputs.values()],
            chosen[0] if one else chosen,
            allow_unused=True,
            is_grads_batched=not one,
        )
        of: dict[int, Tensor] = {}
        for (key, (name, _)), gradient in zip(inputs.items(), found, strict=True):
            if gradient is None:  # pyright: ignore[reportUnnecessaryComparison]
                raise ValueError(f"expected a layer that the logits depend on, got {name!r}; choose another")
            of[key] = gradient[None] if one else gradient
        return [of[id(tensor)].transpose(0, 1) for tensor in self.tensors]


class _LastSpatial(TorchFunctionMode):
    """Watches a forward that runs without gradient and gives a graph only to what happens to a feature map's summary.

    An operation that takes a feature map (b, c, h, w) and yields something that is none (a pooling, a flatten) may be
    the beginning of the head: its input becomes a leaf and its output carries a graph, as does all that follows from
    it, until something flows back into a feature map, as the gate of a squeeze-and-excitation block does.
    """

    def __init__(self, model: nn.Module, batch: int) -> None:
        super().__init__()
        self.batch = batch
        self.leaves: dict[tuple[int, int], tuple[Tensor, str, int, Tensor]] = {}
        self.layers_behind = 0
        self.producers: dict[int, tuple[weakref.ref[Tensor], str]] = {}
        self.handles = [m.register_forward_hook(self._produced(name)) for name, m in model.named_modules() if name]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def _produced(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not (isinstance(module, nn.Identity) and self._name(output)):
                self.producers[id(output)] = weakref.ref(output), name

        return hook

    def _name(self, tensor: Tensor) -> str:
        reference, name = self.producers.get(id(tensor), (None, ""))
        return name if reference is not None and reference() is tensor else ""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
        maps = [a for a in tensors if self._is_map(a)]
        carries = any(a.requires_grad and not isinstance(a, nn.Parameter) for a in tensors)
        if maps or not carries:
            output = func(*args, **kwargs)
            first = output[0] if isinstance(output, tuple) and output else output  # a pooling may add its indices
            if not maps or not isinstance(first, Tensor) or not first.is_floating_point() or self._is_map(first):
                return output
            if not first.ndim or first.shape[0] != self.batch:
                return output
            with torch.enable_grad():
                leaf = partial(self._leaf, func)
                return func(*tree_map(leaf, args), **tree_map(leaf, kwargs))
        self.layers_behind += func.__name__ in ("linear", "conv2d")
        with torch.enable_grad():
            output = func(*args, **kwargs)
        return output.detach() if isinstance(output, Tensor) and self._is_map(output) else output

    def _is_map(self, value: Tensor) -> bool:
        is_vector = value.shape[1:3] == (1, 1)  # (b, 1, 1, c)
        return _is_spatial(value) and value.shape[0] == self.batch and not is_vector

    def _leaf(self, func: Callable[..., Any], value: Any) -> Any:
        if not isinstance(value, Tensor) or not self._is_map(value):
            return value
        key = id(value), value._version
        if key not in self.leaves:
            leaf = value.detach().clone().requires_grad_()
            name = self._name(value) or f"input of {func.__name__}"
            self.leaves[key] = leaf, name, self.layers_behind, value  # the value is kept so that its id stays its own
        return self.leaves[key][0]

    def last(self, logits: Tensor) -> tuple[str, Tensor, bool]:
        """Name and leaf of the last feature map, and whether nothing else feeds the logits; weights are no features."""
        leaves = list(self.leaves.values())
        if logits.requires_grad and leaves:
            with torch.enable_grad():
                best = logits.amax(1).sum()
            found = torch.autograd.grad(best, [leaf[0] for leaf in leaves], allow_unused=True, retain_graph=True)
            feeding = [(leaf, gradient) for leaf, gradient in zip(leaves, found, strict=True) if gradient is not None]  # pyright: ignore[reportUnnecessaryComparison]
            used = [leaf for leaf, gradient in feeding if gradient.any()] or [leaf for leaf, _ in feeding]
            features = [leaf for leaf in used if "gate" not in leaf[1].split(".")]
            tensor, name, before, _ = (features or used)[-1]
            if sum(leaf[1] == name for leaf in used) > 1:
                raise ValueError(
                    f"expected a layer that runs once, got {name!r}, which the forward calls twice; pass layer="
                )
            if (behind := self.layers_behind - before) > _LARGEST_HEAD:
                raise ValueError(
                    f"expected a feature map close to the logits, got {name!r}, {behind} weight layers away "
                    "(a transformer, whose tokens are no feature map?); pass layer="
                )
            return name, tensor, len(used) == 1
        raise ValueError(
            "expected a model in which a (b, c, h, w) tensor feeds the logits, got none that does; "
            "pass layer= (see model.named_modules())"
        )


def _is_spatial(value: Any) -> TypeGuard[Tensor]:
    return (
        isinstance(value, Tensor)
        and value.ndim == 4
        and value.is_floating_point()
        and value.shape[2] * value.shape[3] > 1
    )


@overload
def _at_least_float32(value: Tensor) -> Tensor: ...
@overload
def _at_least_float32(value: Tensor | None) -> Tensor | None: ...
def _at_least_float32(value: Tensor | None) -> Tensor | None:
    if value is None or value.dtype == torch.float64:
        return value if value is None else value.detach()
    return value.detach().float()
