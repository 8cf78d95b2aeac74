"""Watches a forward for positions and for the last feature map behind the scores."""

import math
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle

from sightline.explainers.scorer import gradients_of
from sightline.explainers.tokens import MANY_REGISTERS
from sightline.inference import version_of
from sightline.inference.axes import BATCH, Dims, Layout, guessed, layout_in, tokens_of
from sightline.inference.operations import WEIGHT_LAYERS, Operation, Operations, first_tensor, tensors_in, unseen
from sightline.inference.positions import Positions

_LARGEST_HEAD = 8  # weight layers; VGG has three, LTPA one per level
_LARGEST_BLOCK = 16  # weight layers behind tokens: the rest of a block of attention, its head, and other branches


def hook_on(module: nn.Module, hook: Callable[..., Any]) -> RemovableHandle:
    """A forward hook, even on a part compiled by TorchScript, where PyTorch allows none."""
    if not isinstance(module, torch.jit.ScriptModule):
        return module.register_forward_hook(hook)
    return register_module_forward_hook(lambda m, inputs, output: hook(m, inputs, output) if m is module else None)


def quantized_in(model: nn.Module) -> str:
    """The error message for a quantized model, through which no gradient flows; empty for other models."""
    for name, module in model.named_modules():
        if ".quantized." in type(module).__module__ and "_packed_params" not in name:
            return (
                f"expected a model with gradients, got quantized layers ({name!r}: {type(module).__name__}), through "
                "which none flows; explain the model it was made from, or take occlusion or rise"
            )
    return ""


def with_graph(operation: Operation) -> Any:
    """The result, with a graph if it depends on a layer that was read, even if the model switches gradients off."""
    if not torch.is_grad_enabled():
        if any(tensor.requires_grad and not isinstance(tensor, nn.Parameter) for tensor in operation.tensors):
            with torch.enable_grad():
                return operation()
    return operation()


@dataclass(frozen=True)
class Captured:
    """A tensor of the forward from which a map is read, in the graph that leads to the scores."""

    name: str
    tensor: Tensor
    layout: Layout
    call: int
    """Which run of the module, or of the operation, of that name, from 0."""
    head: Tensor | None = None
    """Weights of the head, where they are known without a graph."""


class Watch(Operations):
    """Tracks the positions, and keeps gradients on after a layer that was read, even if the model turns them off.

    With `cut`, everything before the layer runs without gradient. A `no_grad` in the model itself restores the mode it
    found, which is why the mode is set for each operation.
    """

    def __init__(self, images: Tensor, *, cut: bool) -> None:
        super().__init__()
        self.images = images
        self.cut = cut
        self.positions = Positions(images)

    def on(self, operation: Operation) -> Any:
        """The result of the operation, with a graph if it depends on a layer that was read."""
        output = with_graph(operation) if self.cut else operation()
        self.positions.follow(operation, output)
        return output

    def hook(self, name: str) -> Callable[..., None]:
        """The forward hook of the module of that name."""
        return self.passed

    def passed(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """Forward hook of every module, since the operations inside some are hidden."""
        with unseen():
            tensor = first_tensor(output)
            if tensor is not None:
                self.positions.follow_module(module, inputs, tensor)


@dataclass(frozen=True, eq=False)
class _Leaf:
    tensor: Tensor
    name: str
    call: int
    layout: Layout
    is_guess: bool
    layers_before: int
    behind_before: int
    value: Tensor
    """The tensor that it is a copy of, at this version."""
    version: int


@dataclass(frozen=True, eq=False)
class _Tokens:
    tensor: Tensor
    name: str
    call: int
    layout: Layout | None
    """None if unknown."""
    version: int
    sources: frozenset[int]
    behind_before: int


class LastFeatures(Watch):
    """Watches a forward for the last feature map behind the scores.

    An operation that takes a feature map (b, c, h, w) and returns a summary (a pooling, a flatten) may be the beginning
    of the head. Its input is replaced by a copy, a leaf, and tensors that depend on leaves are tracked until one flows
    back into a feature map, as the gate of a squeeze-and-excitation block does. With `cut`, only tensors that depend on
    leaves have a graph.
    """

    def __init__(self, images: Tensor, *, cut: bool, mark: Callable[[str, Tensor], None]) -> None:
        super().__init__(images, cut=cut)
        self.mark = mark
        self.leaves: list[_Leaf] = []
        self.layers = 0
        """Weight layers so far."""
        self.layers_behind = 0
        """Weight layers so far that read a tensor that depends on a leaf."""
        self.calls: Counter[str] = Counter()
        self.operations: Counter[str] = Counter()
        """Calls so far, by the name of the function."""
        self.producers: dict[int, tuple[weakref.ref[Tensor], int, str, int]] = {}
        """By id of a module's output: the output, its version, the module's name, and which of its runs it was."""
        self.sources: dict[int, tuple[weakref.ref[Tensor], frozenset[int]]] = {}
        self.tokens: list[_Tokens] = []
        self.ended = False
        self.outputs: set[int] = set()
        """Leaves made after the model has returned, by a function of its output."""

    def hook(self, name: str) -> Callable[..., None]:
        """The forward hook of the module of that name; the model itself has none."""
        return partial(self._produced, name) if name else self._end

    def _produced(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        self.passed(module, inputs, output)
        with unseen():
            self._keep_producer(name, module, first_tensor(output))

    def _keep_producer(self, name: str, module: nn.Module, tensor: Tensor | None) -> None:
        call = self.calls[name]
        self.calls[name] += 1
        if tensor is not None:
            self.mark(name, tensor)
        if tensor is None or (isinstance(module, nn.Identity) and self._producer(tensor)[0]):
            return
        self.producers[id(tensor)] = weakref.ref(tensor), version_of(tensor), name, call
        sources = self.sources_of(tensor)
        if sources and tensor.ndim == 3 and not isinstance(module, nn.Linear):
            layout, is_tracked = self.positions.layout(tensor), self.positions.of(tensor) is not None
            if layout is not None or (not is_tracked and len(tensor) == len(self.images)):
                self.tokens.append(_Tokens(tensor, name, call, layout, version_of(tensor), sources, self.layers_behind))

    def _end(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.ended = True

    def _producer(self, tensor: Tensor) -> tuple[str, int]:
        """The module that returned a tensor, if it was not changed in place since, and which of the module's runs."""
        reference, version, name, call = self.producers.get(id(tensor), (None, 0, "", 0))
        same = reference is not None and reference() is tensor and version == version_of(tensor)
        return (name, call) if same else ("", 0)

    def sources_of(self, tensor: Tensor) -> frozenset[int]:
        """The leaves that a tensor depends on."""
        reference, sources = self.sources.get(id(tensor), (None, frozenset[int]()))
        return sources if reference is not None and reference() is tensor else frozenset()

    def on(self, operation: Operation) -> Any:
        """The result of the operation, with a graph if it depends on a feature map that may be the last."""
        is_weight_layer = operation.name in WEIGHT_LAYERS
        self.operations[getattr(operation.func, "__name__", "")] += 1
        self.layers += is_weight_layer
        if not self.leaves:  # only the first summary matters until there is one
            output = operation()
            self.positions.follow(operation, output)
            first = first_tensor(output)
            if first is None or not self._is_summary(first):
                return output
        tensors = operation.tensors
        if not tensors:
            return operation()  # such as switching gradients on and off
        sources = frozenset[int]().union(*map(self.sources_of, tensors))
        maps = [tensor for tensor in tensors if self._is_feature_map(tensor)]
        self.layers_behind += bool(sources) and is_weight_layer
        with torch.set_grad_enabled(torch.is_grad_enabled() or bool(sources and not maps)):
            output = operation()
        self.positions.follow(operation, output)
        first = first_tensor(output)  # a pooling may add its indices
        if maps and first is not None and self._is_summary(first):
            output, leaves = self._from_leaves(operation, self.positions.of(first))
            sources |= leaves
        elif not sources:
            return output
        elif first is not None and self._flows_back(first, maps, sources):
            if not self.cut:
                return output
            detached = tree_map(lambda value: value.detach() if isinstance(value, Tensor) else value, output)
            self.positions.follow(operation, detached)
            return detached
        for tensor in tensors_in(output if output is not None else operation.args[:1]):
            self.sources[id(tensor)] = weakref.ref(tensor), sources | self.sources_of(tensor)
        return output

    def _from_leaves(self, operation: Operation, dims: Dims | None) -> tuple[Any, set[int]]:
        """The operation on copies of its feature maps, where a graph begins, and the numbers of these leaves."""
        leaves: set[int] = set()
        args, kwargs = tree_map(partial(self._leaf, operation, leaves), (operation.args, operation.kwargs))
        with torch.enable_grad():
            output = operation.func(*args, **kwargs)
        for tensor in tensors_in(output):
            self.positions.put(tensor, dims)
        return output, leaves

    def _layout(self, value: Tensor) -> tuple[Layout | None, bool]:
        """Layout of a feature map, and whether it is guessed from the shape."""
        dims = self.positions.of(value)
        axes = self.positions.axes
        if dims is not None:
            layout = layout_in(dims, axes)
            if layout is None or any(len({atom.axis for atom in dim.atoms}) > 1 for dim in layout.cells):
                return None, False
            frames = len(layout.rows)
            return (layout if value.ndim + frames == axes + 2 and frames < 2 else None), False
        if value.ndim != axes + 2 or len(value) != len(self.images):
            return None, True
        is_vector = value.shape[1:-1].numel() == 1  # (b, 1, 1, c)
        return None if is_vector else guessed(tuple(value.shape), tuple(self.images.shape[2:])), True

    def _is_map(self, value: Tensor) -> bool:
        return value.ndim > 2 and value.is_floating_point() and self._layout(value)[0] is not None

    def _is_feature_map(self, value: Tensor) -> bool:
        """Whether a tensor is a map that depends on the images, and not on a summary of another map.

        In a batch of one, a parameter (1, c, h, w) looks like a map.
        """
        if value.ndim < 3 or self.sources_of(value):
            return False
        return (self.positions.knows(value) or len(self.images) > 1) and self._is_map(value)

    def _is_summary(self, value: Tensor) -> bool:
        if not value.ndim or not value.is_floating_point():
            return False
        if value.shape[0] != len(self.images):  # frames, or the images of a pair, in one batch
            dims = self.positions.of(value)
            atoms = () if dims is None else tuple(atom for atom in dims[0].atoms if atom.axis != BATCH)
            if len(atoms) != 1 or atoms[0].stride > 1:
                return False
        return not self._is_map(value)

    def _flows_back(self, value: Tensor, maps: list[Tensor], sources: frozenset[int]) -> bool:
        """Whether it is a feature map again: its positions are tracked, or its grid is that of its sources."""
        if not self._is_map(value):
            return False
        if maps or self.positions.of(value) is not None:
            return True
        grids: set[tuple[int, ...]] = set()
        for leaf in (self.leaves[i] for i in sources):
            grids |= {leaf.layout.grid, tuple(-(-side // 2) for side in leaf.layout.grid)}
        return tuple(value.shape[2:]) in grids or tuple(value.shape[1:-1]) in grids

    def _leaf(self, operation: Operation, leaves: set[int], value: Any) -> Any:
        if not isinstance(value, Tensor) or not self._is_feature_map(value):
            return value
        same = (i for i, leaf in enumerate(self.leaves) if leaf.value is value and leaf.version == version_of(value))
        place = next(same, len(self.leaves))
        if place == len(self.leaves):
            tensor = value.clone() if value.requires_grad else value.detach().clone().requires_grad_()
            layout, is_guess = self._layout(value)
            assert layout is not None
            name, call = self._producer(value)
            if not name:
                func = operation.func.__name__
                name, call = f"input of {func}", self.operations[func] - 1
            counts = self.layers - (operation.name in WEIGHT_LAYERS), self.layers_behind
            self.leaves.append(_Leaf(tensor, name, call, layout, is_guess, *counts, value, version_of(value)))
        leaves.add(place)
        if self.ended:
            self.outputs.add(place)
        return self.leaves[place].tensor

    def is_read_alone(self, scores: Tensor, captured: Captured) -> bool:
        """Whether the tensor is the only feature map before the scores, whatever the weights, and a module's output."""
        leaves = [self.leaves[i] for i in self.sources_of(scores)]
        return [leaf.tensor is captured.tensor for leaf in leaves] == [True] and self.calls[captured.name] == 1

    def find(self, scores: Tensor, logits: Tensor, notices: dict[str, None], name: str = "") -> tuple[Captured, bool]:
        """The last feature map (of that name), and whether nothing else feeds the scores.

        Attention weights are not features.
        """
        leaves = [self.leaves[i] for i in sorted(self.sources_of(scores))]
        if not leaves:
            raise ValueError(
                "expected a model in which a (b, c, h, w) tensor feeds the logits, got none that does; "
                "pass layer= (see model.named_modules())"
            )
        with torch.enable_grad():
            best = logits.amax(1, keepdim=True)
        used = leaves
        if len(leaves) > 1:  # a single one is the answer, with or without a gradient
            back = gradients_of(best, [leaf.tensor for leaf in leaves], retain_graph=True)
            feeding = [(leaf, gradient) for leaf, gradient in zip(leaves, back, strict=True) if gradient is not None]
            used = [leaf for leaf, gradient in feeding if gradient.any()] or [leaf for leaf, _ in feeding] or leaves
        features = [leaf for leaf in used if "gate" not in leaf.name.split(".")] or used
        named = [leaf for leaf in features if not name or leaf.name == name]
        if not named:
            names = " and ".join(repr(leaf.name) for leaf in features)
            raise ValueError(
                f"expected the name of a layer, got {name!r}; the feature map behind the logits is {names}"
            )
        leaf = named[-1]
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
        if leaf.layout.fold > 1:
            raise ValueError(
                f"expected a layer that sees each image once, got {leaf.name!r}, whose batch holds {leaf.layout.fold} "
                f"parts of every image; choose one by layer= and call=0 to {leaf.layout.fold - 1}"
            )
        behind = self.layers_behind - leaf.behind_before
        is_stem = leaf.layers_before <= 1 and behind > 1
        if not name and (behind > _LARGEST_HEAD or len(used) > 1 or is_stem):
            # Tokens after it may join everything that feeds the logits.
            if (tokens := self._last_tokens(best, leaf.layout, {self.leaves.index(each) for each in used})) is not None:
                return tokens, True
        if behind > _LARGEST_HEAD:
            raise ValueError(
                f"expected a feature map close to the logits, got {leaf.name!r}, {behind} weight layers away; "
                "pass layer="
            )
        self._notice(leaf, named, behind, notices)
        return Captured(leaf.name, leaf.tensor, leaf.layout, leaf.call), len(used) == 1

    def _notice(self, leaf: _Leaf, features: list[_Leaf], behind: int, notices: dict[str, None]) -> None:
        """Add notices about decisions that the owner of the model may want to change."""
        if leaf.is_guess:
            notices[guess_of(leaf.name, leaf.tensor, leaf.layout)] = None
        others = list(dict.fromkeys(other.name for other in features if other is not leaf))
        if others and leaf.name not in others:
            both = ", ".join(repr(each) for each in [*others, leaf.name])
            notices[
                f"{leaf.name!r} was read, but the logits depend on {' and '.join(map(repr, others))} beside it; "
                f"layer=[{both}] reads all of them"
            ] = None
        alike = sum(other.name == leaf.name for other in features)
        if alike > 1:
            notices[
                f"{leaf.name!r} was read, the last of {alike} of that name that feed the logits beside each other; "
                "read the others by naming the layers before them in layer="
            ] = None
        if leaf.layers_before == 0 and behind:
            notices[
                f"{leaf.name!r} was read, which holds the pixels: no layer with weights lies before it; "
                "name a later one by layer= if the model has one with positions"
            ] = None
        elif leaf.layers_before == 1 and behind > 2:
            notices[
                f"{leaf.name!r} was read, the first layer of the model: {behind} layers lie behind it; "
                "name a later one by layer= if the model has one with positions"
            ] = None

    def _last_tokens(self, best: Tensor, patches: Layout, leaves: set[int]) -> Captured | None:
        """The last patch tokens with a gradient that depend on these leaves and have the most common width.

        If the head is all zeros, as it may be before training, the last tokens that it reads.
        """
        cells = math.prod(patches.grid)
        fitting: list[tuple[_Tokens, Layout]] = []
        for tokens in reversed(self.tokens):
            layout = tokens.layout
            if layout is None and 0 <= tokens.tensor.shape[1] - cells <= MANY_REGISTERS:
                layout = tokens_of(tokens.tensor.shape[1], patches.grid)
            if layout is not None and leaves <= tokens.sources and version_of(tokens.tensor) == tokens.version:
                fitting.append((tokens, layout))
        back = gradients_of(best, [tokens.tensor for tokens, _ in fitting], retain_graph=True)
        read = [(one, gradient) for one, gradient in zip(fitting, back, strict=True) if gradient is not None]
        live = [one for one, gradient in read if one[1].maps(gradient[:, 0]).any()]
        for tokens, layout in live or [one for one, _ in read]:
            widths = Counter(other.tensor.shape[layout.channels] for other, same in fitting if same.grid == layout.grid)
            if tokens.tensor.shape[layout.channels] != max(widths, key=lambda width: widths[width]):
                continue
            behind = self.layers_behind - tokens.behind_before
            if behind > _LARGEST_BLOCK:
                raise ValueError(
                    f"expected tokens close to the logits, got {tokens.name!r}, {behind} weight layers away; "
                    "pass layer="
                )
            return Captured(tokens.name, tokens.tensor, layout, tokens.call)
        return None


def guess_of(name: str, tensor: Tensor, layout: Layout) -> str:
    """The notice that positions were guessed."""
    shape = " x ".join(map(str, tensor.shape[1:]))
    order = "last" if layout.channels > 1 else "first"
    return (
        f"where the positions lie in {name!r} ({shape}) was guessed from its shape: channels {order}; "
        "what made it could not be followed"
    )
