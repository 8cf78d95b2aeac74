"""One forward that keeps the tensors of the layers that maps are read from."""

import math
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache, partial
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.hooks import RemovableHandle

from sightline.explainers.scorer import Scorer
from sightline.explainers.tokens import MANY_REGISTERS, patch_maps
from sightline.inference import version_of

Layer = str | nn.Module | None
_LARGEST_STRETCH = 2.5  # of a map's height/width against the image's; rounding 3 pixels to 2 and 1 gives 2
_LARGEST_HEAD = 8  # weight layers; VGG has three, LTPA one per level
_LINEAR = {"AddmmBackward0": 1, "MmBackward0": 0}  # node -> place of its input
_POOLED = ("MeanBackward1", "AvgPool2DBackward0")  # adaptive pooling to one position is a mean, too
_RESHAPED = (
    "CloneBackward0",
    "ReshapeAliasBackward0",
    "SqueezeBackward0",
    "SqueezeBackward1",
    "SqueezeBackward2",
    "ToCopyBackward0",
    "UnsafeViewBackward0",
    "UnsqueezeBackward0",
    "ViewBackward0",
)


@dataclass(frozen=True)
class Layout:
    """How a layer's tensor holds its positions: channels first, channels last, or tokens behind `prefix` others."""

    grid: tuple[int, ...]
    channels_last: bool = False
    prefix: int | None = None

    def maps(self, tensor: Tensor, lead: int = 1) -> Tensor:
        """The tensor as (..., k, *grid), with `lead` dimensions before."""
        if self.prefix is not None:
            patches = tensor.narrow(lead, self.prefix, math.prod(self.grid))
            return patches.movedim(-1, lead).unflatten(-1, self.grid)
        return tensor.movedim(-1, lead) if self.channels_last else tensor


@dataclass(frozen=True)
class Captured:
    """Output of a layer, in the graph that leads to the scores."""

    name: str
    tensor: Tensor
    layout: Layout
    call: int
    """Which run of the module of that name, from 0."""

    def head(self, logits: Tensor) -> Tensor | None:
        """Weights (n, k) if the logits are one linear layer and the mean over the positions, read off their graph.

        In either order: a 1 x 1 convolution is a linear layer at each position. Without any layer they are 1 or 0.
        """
        node, weights, pooled, channels = logits.grad_fn, None, False, logits.shape[1]
        while node is not None:
            if node is self.tensor.grad_fn or getattr(node, "variable", None) is self.tensor:
                if not pooled or channels != self.channels:
                    return None
                return torch.eye(channels).to(logits) if weights is None else weights
            name, place = node.name(), 0
            if name in _LINEAR and weights is None and not pooled:
                weights, place = node._saved_mat2.mT, _LINEAR[name]  # pyright: ignore[reportAttributeAccessIssue]
                channels = weights.shape[1]
            elif weights is None and _is_pointwise(node):
                weights = node._saved_weight.flatten(1)  # pyright: ignore[reportAttributeAccessIssue]
                channels = weights.shape[1]
            elif name in _POOLED and not pooled:
                pooled = self._is_mean_of_all(node, channels)
                if not pooled:
                    return None
            elif name not in _RESHAPED and not _picks_the_only_one(node) and not _is_restrided_mean(node, channels):
                return None
            node = node.next_functions[place][0]
        return None

    @property
    def channels(self) -> int:
        """Number of channels."""
        return self.layout.maps(self.tensor.detach()).shape[1]

    def _is_mean_of_all(self, node: Any, channels: int) -> bool:
        if node.name() == "AvgPool2DBackward0":
            whole = tuple(node._saved_self.shape[1:]) == (channels, *node._saved_kernel_size)
            return whole and not any(node._saved_padding) and node._saved_divisor_override is None
        shape = list(node._saved_self_sym_sizes)
        dims = {_signed(dim) % len(shape) for dim in node._saved_dim}
        kept = len(shape) - 1 if self.layout.channels_last else 1
        return dims == set(range(1, len(shape))) - {kept} and shape[kept] == channels


def _signed(dim: int) -> int:
    return dim - 2**64 if dim >= 2**63 else dim


def _is_pointwise(node: Any) -> bool:
    """A 1 x 1 convolution that keeps the grid."""
    if node.name() != "ConvolutionBackward0" or node._saved_transposed or node._saved_groups != 1:
        return False
    return not any(node._saved_padding) and {*node._saved_weight.shape[2:], *node._saved_stride} == {1}


def _picks_the_only_one(node: Any) -> bool:
    return node.name() == "SelectBackward0" and node._saved_self_sym_sizes[_signed(node._saved_dim)] == 1


def _is_restrided_mean(node: Any, channels: int) -> bool:
    """What adaptive pooling does to the mean of a channels-last tensor."""
    if node.name() != "AsStridedBackward1" or node.next_functions[0][0].name() != "MeanBackward1":
        return False
    return tuple(node._saved_stride[:2]) == (channels, 1) and not node._saved_storage_offset


def find_layer(model: nn.Module, layer: str | nn.Module) -> tuple[str, nn.Module]:
    """Name and module of a layer given by either.

    Raises:
        ValueError: the model has no such module; the closest names are shown.

    >>> find_layer(nn.Sequential(nn.ReLU()), "0")
    ('0', ReLU())
    """
    modules = dict(model.named_modules())
    if isinstance(layer, str):
        if layer not in modules:  # DataParallel and torch.compile are looked through
            layer = layer.removeprefix("module.").removeprefix("_orig_mod.")
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
        if isinstance(layer, nn.Module)  # pyright: ignore[reportUnnecessaryIsInstance]
        else f"expected a module of {type(model).__name__} or its dotted name as layer, got {layer!r}"
    )


class Capture:
    """One forward that keeps the output of each layer; None is the last feature map that feeds the scores.

    Unless `whole`, what comes before the first layer runs without gradient, and the graph begins there.
    """

    scores: Tensor
    captured: list[Captured]
    """One per layer."""

    def __init__(
        self, model: nn.Module, scorer: Scorer, layers: Sequence[Layer], *, call: int | None, gates: bool, whole: bool
    ) -> None:
        self.model = model
        self.scorer = scorer
        self.modules = dict(model.named_modules())
        self.names = [None if layer is None else find_layer(model, layer)[0] for layer in layers]
        self.call = call
        self.read_gates = gates
        self.whole = whole

    def run(self, images: Tensor) -> None:
        """Fill `scores`, `captured`, `gates` and what the scorer keeps."""
        self.images = images
        self.gates: dict[str, Tensor] = {}
        self.found: dict[str, Captured] = {}
        self.calls: dict[str, list[tuple[int, ...]]] = {name: [] for name in self.names if name is not None}
        self.grids: list[tuple[int, ...]] = []
        handles: list[RemovableHandle] = []
        last = None
        try:
            with ExitStack() as modes:
                for name in self.calls:
                    handles.append(self.modules[name].register_forward_hook(self._keep(name)))
                for name, module in self.modules.items():
                    if self.calls and isinstance(module, nn.Conv2d | nn.Conv3d):
                        handles.append(module.register_forward_hook(self._see_grid))
                    if self.read_gates and isinstance(gate := getattr(module, "gate", None), nn.Module):
                        handles.append(gate.register_forward_hook(self._keep_gate(name)))
                if self.read_gates:
                    modes.enter_context(patch_maps(self.model, self._keep_gate))
                if None in self.names:
                    last = _LastFeatures(images, cut=not (self.whole or self.calls))
                    handles += [
                        m.register_forward_hook(last.produced(name)) for name, m in self.modules.items() if name
                    ]
                    handles.append(self.model.register_forward_hook(last.end))
                    modes.enter_context(last)
                self.scores = self.scorer.begin(images)
        finally:
            for handle in handles:
                handle.remove()
        for name, calls in self.calls.items():
            self._check_calls(name, calls)
        if last is not None:
            automatic, alone = last.find(self.scores, self.scorer.logits)
            if not alone and automatic.name in self.modules:
                # Attention weights feed the logits too and are made from it: named, it gets their gradient as well.
                self.names = [automatic.name if name is None else name for name in self.names]
                return self.run(images)
            self.found[""] = automatic
        self.captured = [self.found[name or ""] for name in self.names]

    def _check_calls(self, name: str, calls: list[tuple[int, ...]]) -> None:
        if not calls:
            raise ValueError(
                f"expected a layer that the forward runs, got {name!r}, which it never called; choose another"
            )
        shapes = ", ".join(f"call={i} yields {' x '.join(map(str, shape))}" for i, shape in enumerate(calls))
        if self.call is None and len(calls) > 1:
            raise ValueError(
                f"expected a layer that runs once, got {name!r}, which the forward calls {len(calls)} times "
                f"({shapes}); choose one by call="
            )
        if self.call is not None and self.call not in range(len(calls)):
            raise ValueError(f"expected call= of {name!r} in 0..{len(calls) - 1}, got {self.call}; {shapes}")

    def _keep(self, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
            tensor = first = _first(output)
            if tensor is None or tensor.ndim < 3 or not tensor.is_floating_point():
                got = f"shape {tuple(tensor.shape)}" if tensor is not None else type(output).__name__
                raise ValueError(
                    f"expected a layer that yields (b, c, h, w) with h*w > 1, got {got} from {name!r}; choose another"
                )
            self.calls[name].append(tuple(tensor.shape[1:]))
            if len(self.calls[name]) - 1 != (self.call or 0):
                return None
            layout = layout_of(name, tensor, self.images, self.grids)
            torch.set_grad_enabled(True)  # from here to the logits; the caller's no_grad ends it
            if not tensor.requires_grad:
                tensor = tensor.detach().clone().requires_grad_()
            self.found[name] = Captured(name, tensor, layout, self.call or 0)
            handed = tensor.clone()  # an in-place activation behind the layer must not rewrite what was captured
            return tree_map(lambda value: handed if value is first else value, output)

        return hook

    def _see_grid(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.grids.append(tuple(output.shape[2:]))

    def _keep_gate(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.ndim == self.images.ndim:
                if name in self.gates:
                    raise ValueError(f"expected an attention block that runs once, got {name!r}, which runs twice")
                self.gates[name] = output.clone() if self.scorer.differentiable else output.detach().clone()

        return hook


def layout_of(name: str, tensor: Tensor, images: Tensor, grids: Sequence[tuple[int, ...]]) -> Layout:
    """Where the positions are in a layer's tensor, by the images' shape and the grids of the convolutions before it.

    Raises:
        ValueError: the tensor has no positions, or they are not laid out like the image, or no row for each image.
    """
    size, shape = tuple(images.shape[2:]), tuple(tensor.shape)
    if shape[0] != len(images):
        raise ValueError(
            f"expected a layer that yields one row for each of {len(images)} images, got {shape[0]} rows, shape "
            f"{shape}, from {name!r}; choose another"
        )
    if tensor.ndim == images.ndim and (layout := _layout(shape, size)) is not None:
        return layout
    if tensor.ndim == 3:
        fitting = [grid for grid in grids if 0 <= shape[1] - math.prod(grid) <= MANY_REGISTERS]
        fitting.sort(key=math.prod)  # a convolution that only shortens the keys leaves more tokens over
        for grid in [*fitting[-1:], *_grids_like(shape[1], size)]:
            if math.prod(grid) > 1:
                return Layout(grid, prefix=shape[1] - math.prod(grid))
    raise ValueError(
        f"expected a layer that yields (b, c, h, w) with h*w > 1, shaped like the image, or one token per patch, "
        f"got shape {shape} from {name!r}; choose another"
    )


@lru_cache(maxsize=256)
def _layout(shape: tuple[int, ...], size: tuple[int, ...]) -> Layout | None:
    """Channels first or last, whichever is more like the image, give or take a row and a column.

    Where both are, a grid exactly like the image decides, else channels are first.
    """
    readings = [Layout(shape[2:]), Layout(shape[1:-1], channels_last=True)]
    fitting = [r for r in readings if math.prod(r.grid) > 1 and _stretch(r.grid, size) <= _LARGEST_STRETCH]
    return min(fitting, key=lambda r: (_stretch(r.grid, size, rounding=1), _stretch(r.grid, size) > 1), default=None)


def _stretch(grid: Sequence[int], size: Sequence[int], rounding: int = 0) -> float:
    """By how much cells are longer along one side than another, if sides may have so many cells more or less."""
    sides = [*zip(grid, size, strict=True)]
    shortest = [pixels / (cells + rounding) for cells, pixels in sides]
    longest = [pixels / (cells - rounding) if cells > rounding else math.inf for cells, pixels in sides]
    return max(1.0, max(shortest) / min(longest))


def _grids_like(tokens: int, size: Sequence[int]) -> list[tuple[int, ...]]:
    """Grids shaped exactly like the image that leave at most a few tokens before them, fewest first."""
    scale = math.gcd(*size)
    unit = [side // scale for side in size]
    cells = [math.prod(unit) * n ** len(size) for n in range(1, tokens + 1)]
    near = [n for n, count in enumerate(cells, 1) if 0 <= tokens - count <= MANY_REGISTERS]
    return [tuple(side * n for side in unit) for n in reversed(near)]


def _first(output: Any) -> Tensor | None:
    first = output[0] if isinstance(output, tuple | list) and output else output
    return first if isinstance(first, Tensor) else None


@dataclass(frozen=True, eq=False)
class _Leaf:
    tensor: Tensor
    name: str
    call: int
    layers_before: int
    value: Tensor
    """What it was copied from, in this version."""
    version: int


@dataclass(frozen=True, eq=False)
class _Tokens:
    tensor: Tensor
    name: str
    call: int
    version: int
    sources: frozenset[int]


class _LastFeatures(TorchFunctionMode):
    """Watches a forward for the last feature map that the scores are made from.

    An operation that takes a feature map (b, c, h, w) and yields something that is none (a pooling, a flatten) may be
    the beginning of the head: a copy of its input is remembered, and so is what is made from its output, until
    something flows back into a feature map, as the gate of a squeeze-and-excitation block does. With `cut` only what is
    made from such copies has a graph.
    """

    def __init__(self, images: Tensor, *, cut: bool) -> None:
        super().__init__()
        self.images = images
        self.cut = cut
        self.leaves: list[_Leaf] = []
        self.layers = 0
        self.calls: Counter[str] = Counter()
        self.producers: dict[int, tuple[weakref.ref[Tensor], int, str, int]] = {}
        """Of the outputs of modules: as of which version, the name, and which run."""
        self.sources: dict[int, tuple[weakref.ref[Tensor], frozenset[int]]] = {}
        self.tokens: list[_Tokens] = []
        self.ended = False
        self.outputs: set[int] = set()
        """Leaves that a function of the model's output, which runs behind the model, is made from."""
        self.of_images: dict[int, weakref.ref[Tensor]] = {id(images): weakref.ref(images)}
        """What is made from the images, kept for a batch of one: there a parameter (1, c, h, w) looks like a map."""

    def produced(self, name: str) -> Callable[..., None]:
        """Forward hook of the module of that name."""

        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            tensor = _first(output)
            call = self.calls[name]
            self.calls[name] += 1
            if tensor is None or (isinstance(module, nn.Identity) and self._producer(tensor)[0]):
                return
            self.producers[id(tensor)] = weakref.ref(tensor), version_of(tensor), name, call
            sources = self._sources(tensor)
            if tensor.ndim == 3 and len(tensor) == len(self.images) and sources and not isinstance(module, nn.Linear):
                self.tokens.append(_Tokens(tensor, name, call, version_of(tensor), sources))

        return hook

    def end(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """Forward hook of the model itself."""
        self.ended = True

    def _producer(self, tensor: Tensor) -> tuple[str, int]:
        """The module whose output it is and still is, not changed in place, and which of its runs."""
        reference, version, name, call = self.producers.get(id(tensor), (None, 0, "", 0))
        same = reference is not None and reference() is tensor and version == version_of(tensor)
        return (name, call) if same else ("", 0)

    def _sources(self, tensor: Tensor) -> frozenset[int]:
        """Which leaves a tensor is made from."""
        reference, sources = self.sources.get(id(tensor), (None, frozenset[int]()))
        return sources if reference is not None and reference() is tensor else frozenset()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = self._watch(func, args, kwargs or {})
        if len(self.images) == 1 and any(self._is_of_images(a) for a in tree_leaves((args, kwargs))):
            made = [made for made in tree_leaves(output) if isinstance(made, Tensor)]
            self.of_images |= {id(tensor): weakref.ref(tensor) for tensor in made}
        return output

    def _is_of_images(self, value: Any) -> bool:
        return id(value) in self.of_images and self.of_images[id(value)]() is value

    def _watch(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.leaves:  # nothing is made from a summary yet: the next one is all that matters
            output = func(*args, **kwargs)
            if not self._is_summary(_first(output)):
                return output
        tensors = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
        if not tensors:
            return func(*args, **kwargs)  # switching gradients on and off, too
        sources = frozenset[int]().union(*map(self._sources, tensors))
        maps = [a for a in tensors if self._is_feature_map(a)]
        self.layers += bool(sources) and func.__name__ in ("linear", "conv2d")
        with torch.set_grad_enabled(torch.is_grad_enabled() or bool(sources and not maps)):
            output = func(*args, **kwargs)
        first = _first(output)  # a pooling may add its indices
        if maps and self._is_summary(first):
            made: set[int] = set()
            leaf = partial(self._leaf, func, made)
            with torch.enable_grad():
                output = func(*tree_map(leaf, args), **tree_map(leaf, kwargs))
            sources |= made
        elif not sources:
            return output
        elif first is not None and self._is_map(first) and (maps or self._fits(first, sources)):
            return (
                tree_map(lambda value: value.detach() if isinstance(value, Tensor) else value, output)
                if self.cut
                else output
            )
        for tensor in tree_leaves(output if output is not None else args[:1]):
            if isinstance(tensor, Tensor):
                self.sources[id(tensor)] = weakref.ref(tensor), sources | self._sources(tensor)
        return output

    def _is_map(self, value: Tensor) -> bool:
        if value.ndim != self.images.ndim or len(value) != len(self.images):
            return False
        if not value.is_floating_point() or math.prod(value.shape[2:]) <= 1:
            return False
        is_vector = math.prod(value.shape[1:-1]) == 1  # (b, 1, 1, c)
        return not is_vector and _layout(tuple(value.shape), tuple(self.images.shape[2:])) is not None

    def _is_feature_map(self, value: Tensor) -> bool:
        """Whether it is a map that is made from the images, and not from a summary of another."""
        if not self._is_map(value) or self._sources(value):
            return False
        return len(self.images) > 1 or self._is_of_images(value)

    def _is_summary(self, value: Tensor | None) -> TypeGuard[Tensor]:
        if value is None or not value.ndim or value.shape[0] != len(self.images):
            return False
        return value.is_floating_point() and not self._is_map(value)

    def _fits(self, value: Tensor, sources: frozenset[int]) -> bool:
        """Whether its positions are those of one of the leaves that it is made from, or every other of them."""
        grids: set[tuple[int, ...]] = set()
        for leaf in (self.leaves[i] for i in sources):
            layout = _layout(tuple(leaf.tensor.shape), tuple(self.images.shape[2:]))
            if layout is not None:
                grids |= {layout.grid, tuple(-(-side // 2) for side in layout.grid)}
        return tuple(value.shape[2:]) in grids or tuple(value.shape[1:-1]) in grids

    def _leaf(self, func: Callable[..., Any], made: set[int], value: Any) -> Any:
        if not isinstance(value, Tensor) or not self._is_feature_map(value):
            return value
        same = (i for i, leaf in enumerate(self.leaves) if leaf.value is value and leaf.version == version_of(value))
        place = next(same, len(self.leaves))
        if place == len(self.leaves):
            tensor = value.clone() if value.requires_grad else value.detach().clone().requires_grad_()
            name, call = self._producer(value)
            name = name or f"input of {func.__name__}"
            self.leaves.append(_Leaf(tensor, name, call, self.layers, value, version_of(value)))
        made.add(place)
        if self.ended:
            self.outputs.add(place)
        return self.leaves[place].tensor

    def find(self, scores: Tensor, logits: Tensor) -> tuple[Captured, bool]:
        """The last feature map, and whether nothing else feeds the scores; attention weights are no features."""
        leaves = [self.leaves[i] for i in sorted(self._sources(scores))]
        if not leaves:
            raise ValueError(
                "expected a model in which a (b, c, h, w) tensor feeds the logits, got none that does; "
                "pass layer= (see model.named_modules())"
            )
        with torch.enable_grad():
            best = logits.amax(1).sum()
        used = leaves
        if len(leaves) > 1:  # a single one is the answer, with or without a gradient
            found = _gradients(best, [leaf.tensor for leaf in leaves])
            feeding = [(leaf, gradient) for leaf, gradient in zip(leaves, found, strict=True) if gradient is not None]
            used = [leaf for leaf, gradient in feeding if gradient.any()] or [leaf for leaf, _ in feeding] or leaves
        leaf = ([leaf for leaf in used if "gate" not in leaf.name.split(".")] or used)[-1]
        if self.leaves.index(leaf) in self.outputs:
            raise ValueError(
                "expected layer= for a model that returns feature maps, got none; name one before its output "
                "(see model.named_modules())"
            )
        if sum(other.name == leaf.name for other in used) > 1 and " " not in leaf.name:
            raise ValueError(
                f"expected a layer that runs once, got {leaf.name!r}, which the forward calls twice; "
                "choose one by layer= and call="
            )
        layout = layout_of(leaf.name, leaf.tensor, self.images, ())
        behind = self.layers - leaf.layers_before
        if behind > _LARGEST_HEAD or len(used) > 1:  # what joins all that feeds the logits comes after it
            if (tokens := self._last_tokens(best, layout, {self.leaves.index(each) for each in used})) is not None:
                return tokens, True
        if behind > _LARGEST_HEAD:
            raise ValueError(
                f"expected a feature map close to the logits, got {leaf.name!r}, {behind} weight layers away; "
                "pass layer="
            )
        return Captured(leaf.name, leaf.tensor, layout, leaf.call), len(used) == 1

    def _last_tokens(self, best: Tensor, patches: Layout, leaves: set[int]) -> Captured | None:
        """The last tokens of the patches, as wide as most, made from these leaves, with a gradient that is not zero.

        Of a head that is all zeros, as it may be before training, the last ones that it reads.
        """
        cells = math.prod(patches.grid)
        fitting = [
            made
            for made in self.tokens
            if leaves <= made.sources and 0 <= made.tensor.shape[1] - cells <= MANY_REGISTERS
        ]
        widths = Counter(made.tensor.shape[2] for made in fitting)
        width = max(widths, key=lambda each: widths[each], default=0)
        wide = [m for m in reversed(fitting) if version_of(m.tensor) == m.version and m.tensor.shape[2] == width]
        read: Captured | None = None
        for made, gradient in zip(wide, _gradients(best, [made.tensor for made in wide]), strict=True):
            if gradient is not None:
                prefix = made.tensor.shape[1] - cells
                found = Captured(made.name, made.tensor, Layout(patches.grid, prefix=prefix), made.call)
                if gradient[:, prefix:].any():
                    return found
                read = read or found
        return read


def _gradients(score: Tensor, tensors: Sequence[Tensor]) -> list[Tensor | None]:
    """By one backward; None where none flows."""
    found = torch.autograd.grad(score, tensors, allow_unused=True, retain_graph=True) if tensors else []
    return [*found]
