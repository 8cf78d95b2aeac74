"""Finds where attention blocks go: one forward shows every layer's input and output, and how they depend on each other.

Neither names nor numbers of channels show what a tensor is, since an image of three channels and three logits look
alike. The operations do: a feature map comes from the image through convolutions, and its rows and columns can be
followed from there.
"""

import re
from collections import Counter
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sightline.inference import untouched
from sightline.inference.operations import Operation, Operations, tensors_in
from sightline.inference.positions import Positions

# Blocks whose papers name stages; all others go to the end of every residual branch.
STAGES = {"bam": slice(0, 3), "self_attention": slice(-2, None), "non_local": slice(-2, None)}
SIDES = (224, 32, 64, 28, 96, 128, 256, 299, 384, 448)
CHANNELS_FIRST, CHANNELS_LAST = (2, 3), (1, 2)
WEIGHTS = (nn.Linear, nn.Conv1d, nn.Conv2d)
_MIXING = ("conv", "mm", "norm", "pool", "attention", "cat", "mean", "sum")


class Value(NamedTuple):
    """A tensor in the forward.

    Its number is higher than those of the tensors that it depends on. A view shares the number of its base, and a
    tensor that does not depend on the images has none. `axes` are its rows and columns, None if they could not be
    followed.
    """

    shape: torch.Size
    number: int | None
    axes: tuple[int, int] | None

    @property
    def is_map(self) -> bool:
        """Whether it may be (b, c, h, w)."""
        return len(self.shape) == 4 and self.axes in (None, CHANNELS_FIRST)

    @property
    def is_wide(self) -> bool:
        """Whether it may be a map and has more than one position."""
        return self.is_map and self.shape[2] * self.shape[3] > 1


NOTHING = Value(torch.Size((0, 0, 0)), None, None)
"""Stands for what is no tensor."""


class Call(NamedTuple):
    """One run of a layer: its only argument and its result."""

    name: str
    layer: nn.Module
    taken: Value
    given: Value
    kind: str
    device: torch.device
    dtype: torch.dtype

    @property
    def takes_map(self) -> bool:
        """Whether its argument has several positions."""
        return self.taken.is_wide

    @property
    def gives_map(self) -> bool:
        """Whether its result has several positions."""
        return self.given.is_wide

    @property
    def takes_one_position(self) -> bool:
        """Whether a linear layer or a convolution reads one vector per image."""
        width = getattr(self.layer, "in_features", None) or getattr(self.layer, "in_channels", None)
        return self.taken.shape[1:].numel() == width

    @property
    def makes_one_position(self) -> bool:
        """Whether it turns a map into one vector per image."""
        return self.takes_map and self.given.shape[2:].numel() == 1

    @property
    def pools(self) -> bool:
        """Whether it turns a map into one vector per image without linear layers or convolutions."""
        return self.makes_one_position and not any(isinstance(layer, WEIGHTS) for layer in self.layer.modules())


class _Axes(Operations):
    """Follows the rows and columns of the images through every operation."""

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.positions = Positions(images)

    def on(self, operation: Operation) -> Any:
        """The result of the operation."""
        output = operation()
        self.positions.follow(operation, output)
        return output

    def of(self, tensor: Tensor) -> tuple[int, int] | None:
        """Which dimensions of a tensor are rows and columns; None where they could not be followed."""
        layout = self.positions.layout(tensor)
        if layout is None:
            is_pooled = tensor.ndim == 4 and self.positions.knows(tensor) and tensor.shape[2:].numel() == 1
            return CHANNELS_FIRST if is_pooled else None
        if layout.cells:
            return None
        return CHANNELS_FIRST if layout.channels == 1 else CHANNELS_LAST


class _Flow(TorchDispatchMode):
    """Follows how tensors depend on each other, starting from the images."""

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.parents: list[set[int]] = [set()]
        self.convolved = [False]
        self._names = [""]
        self._numbers = {_storage(images): 0}

    def number(self, tensor: Tensor) -> int | None:
        """The number of a tensor at this moment."""
        return self._numbers.get(_storage(tensor))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and record what its results depend on."""
        storages = {_storage(tensor) for tensor in _tensors((args, kwargs))}
        result = func(*args, **kwargs or {})
        written = {  # read off the schema, which is not documented: see tests/test_torch_features.py
            _storage(tensor)
            for argument, tensor in zip(func._schema.arguments, args, strict=False)
            if isinstance(tensor, Tensor) and argument.alias_info is not None and argument.alias_info.is_write
        }
        name = func.__name__.partition(".")[0]
        parents = {self._numbers[storage] for storage in storages if storage in self._numbers}
        fresh = ({_storage(tensor) for tensor in _tensors(result)} - storages) | written
        if parents and fresh:
            self.parents.append(parents)
            self._names.append(name)
            self.convolved.append("conv" in name or any(self.convolved[parent] for parent in parents))
        for storage in fresh:
            if parents:
                self._numbers[storage] = len(self.parents) - 1
            else:
                self._numbers.pop(storage, None)
        return result

    def is_branch_end(self, number: int) -> bool:
        """Whether a value, scaled or not, is added to one that does not depend on it."""
        branch, descendants = {number}, {number}
        for later in range(number + 1, len(self.parents)):
            parents, name = self.parents[later], self._names[later]
            if not parents & descendants:
                continue
            if parents & branch and name in ("add", "add_") and parents - descendants:
                return True
            descendants.add(later)
            if parents & branch and not any(word in name for word in _MIXING):
                branch.add(later)
        return False

    def ways_to(self, end: int) -> tuple[set[int], set[int]]:
        """Numbers on the paths from the images to `end`, and those that lie on every path."""
        on_path = {end}
        for number in range(end, 0, -1):
            if number in on_path:
                on_path |= self.parents[number]
        trunk: set[int] = set()
        earliest = end
        for number in sorted(on_path, reverse=True):
            if number <= earliest:
                trunk.add(number)
            earliest = min([earliest, *self.parents[number]])
        return on_path, trunk


def _tensors(values: Any) -> list[Tensor]:
    return [tensor for tensor in tensors_in(values) if tensor.numel()]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Trace:
    """Every run of a layer in one forward on zeros, in the order in which they end.

    Raises:
        ValueError: the network accepts none of the image sizes tried.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        like = next(model.parameters(), torch.zeros(()))
        config: dict[str, Any] = getattr(model, "default_cfg", None) or {}
        sizes: tuple[tuple[int, int], ...] = (tuple(config["input_size"][1:]),) if "input_size" in config else ()
        built_for = getattr(getattr(model, "patch_embed", None), "img_size", None)  # timm's transformers take no other
        sizes = (built_for, *sizes) if isinstance(built_for, tuple) else sizes
        first = next((layer.in_channels for layer in model.modules() if isinstance(layer, nn.Conv2d)), 3)
        problem = ""
        for size in (*sizes, *((side, side) for side in SIDES)):
            for channels in dict.fromkeys((first, 3)):  # pixels may be moved into channels before the convolution
                try:
                    self._run(torch.zeros(1, channels, *size, device=like.device, dtype=like.dtype))
                    return
                except (RuntimeError, ValueError, TypeError, AssertionError) as error:
                    problem = problem or str(error).strip().splitlines()[0]
        raise ValueError(
            f"expected a model that takes images of {first} channels and {SIDES[0]} or {SIDES[1]} px, "
            f"got {type(model).__name__}, which raises: {problem}"
        )

    def _run(self, images: Tensor) -> None:
        self.images = images
        self.calls: list[Call] = []
        flow, axes = _Flow(images), _Axes(images)
        begun: list[Value] = []

        def value(tensor: Any) -> Value:
            is_tensor = isinstance(tensor, Tensor)
            return Value(tensor.shape, flow.number(tensor), axes.of(tensor)) if is_tensor else NOTHING

        def begin(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
            begun.append(value(inputs[0] if len(inputs) == 1 else None))

        def keep(name: str, layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            kind, like = type(output).__name__, images
            if isinstance(output, Tensor):
                axes.positions.follow_module(layer, inputs, output)
                kind, like = str(tuple(output.shape)), output
            self.calls.append(Call(name, layer, begun.pop(), value(output), kind, like.device, like.dtype))

        with ExitStack() as hooks, untouched(self.model), torch.no_grad(), flow, axes:
            for name, layer in self.model.named_modules():
                hooks.enter_context(layer.register_forward_pre_hook(begin))
                hooks.enter_context(layer.register_forward_hook(partial(keep, name)))
            result = self.model(images)
        self.shapes = shapes_of(result)
        numbers = [flow.number(tensor) for tensor in _tensors(result)]
        self.on_path, self._trunk = flow.ways_to(max((number for number in numbers if number is not None), default=0))
        self._flow = flow
        runs = Counter(call.name for call in self.calls)
        self._once = {name for name, count in runs.items() if count == 1}

    def only_call(self, name: str) -> Call:
        """The one run of a layer.

        Raises:
            ValueError: it never runs, or runs more than once.
        """
        calls = [call for call in self.calls if call.name == name]
        if len(calls) != 1:
            got = f"which it runs {len(calls)} times" if calls else "which it never runs"
            raise ValueError(f"expected a layer that the network runs once, got {name!r}, {got}; name another layer")
        return calls[0]

    def places(self, name: str) -> list[Call]:
        """Where a gating block of this name goes, see `insert`.

        Raises:
            ValueError: no layer yields a feature map.
        """
        ends = [] if name in STAGES else self._branch_ends()
        places = ends or self._stages()[STAGES.get(name, slice(None))]
        if not places:
            last = any(call.given.axes == CHANNELS_LAST for call in self.calls)
            raise ValueError(
                f"expected a CNN of layers that yield maps (b, c, h, w), got {type(self.model).__name__}, "
                f"{'whose maps are (b, h, w, c)' if last else 'which has none that all later layers depend on'}; "
                "name the layers with at"
            )
        return places

    def pool(self) -> Call | None:
        """The layer that pools the features to one position, or else the layer that returns them."""
        features = self._features_of_head()
        if features is None:
            maps = self._maps()
            pool = self._pool_behind(maps[-1]) if maps else None
            return pool if pool is not None and not self._weights_behind(pool) else None
        return self._pool_behind(features) or features

    def _is_features(self, call: Call) -> bool:
        """Whether a layer runs once and returns a map (b, c, h, w) computed from the images by convolutions."""
        value = call.given
        if value.number is None or value.axes != CHANNELS_FIRST or not value.is_map:
            return False
        return call.name in self._once and value.number in self.on_path and self._flow.convolved[value.number]

    def _maps(self) -> list[Call]:
        """Runs that return features of several positions on which everything later depends."""
        return [
            call
            for call in self.calls
            if self._is_features(call)
            and call.gives_map
            and call.given.number in self._trunk
            and call.given != call.taken  # an identity
        ]

    def _weights_behind(self, call: Call) -> list[Call]:
        """Linear layers and convolutions behind a layer, on the way to the result."""
        behind = self.calls[self.calls.index(call) + 1 :]
        return [call for call in behind if isinstance(call.layer, WEIGHTS) and call.given.number in self.on_path]

    def _features_of_head(self) -> Call | None:
        """The run that returns the last map read by layers with weights.

        They read it as one position. The first may also take the map itself, if it reduces it to one position or
        computes logits for each position.
        """
        maps = [call for call in self._maps() if self._weights_behind(call)]
        if not maps:
            return None
        first, *others = self._weights_behind(maps[-1])
        reads = first.takes_one_position or first.makes_one_position
        if getattr(first.layer, "kernel_size", None) == (1, 1) and not others:  # logits of each position, then pooled
            pooled = all(shape[2:].numel() == 1 for shape in self.shapes)
            reads = reads or (pooled and first.taken.number == maps[-1].given.number)
        return maps[-1] if reads and all(call.takes_one_position for call in others) else None

    def _pool_behind(self, features: Call) -> Call | None:
        pools = (call for call in reversed(self.calls) if call.pools and call.taken.number == features.given.number)
        return next((call for call in pools if call.name in self._once), None)

    def _branch_ends(self) -> list[Call]:
        features = {call.name: call for call in self.calls if self._is_features(call)}
        names = {_branch_end(call.name, call.layer, [*features]) for call in self.calls}
        calls = [features[name] for name, _ in self.model.named_modules() if name in names and name in features]
        return [call for call in calls if self._flow.is_branch_end(call.given.number or 0)]

    def _stages(self) -> list[Call]:
        """A ResNet's stages; else, for each resolution of the features, the last unit made of blocks, or the last one.

        A unit at most halves the resolution. The stem, everything before the first blocks, is not a stage.
        """
        maps = self._maps()
        features = self._features_of_head()
        if features is not None:  # logits follow
            maps = maps[: maps.index(features) + 1]
        deep = {call.name for call in maps if _has_blocks(call.layer)}
        named = [call for call in maps if re.fullmatch(r"layer\d", call.name) and call.name in deep]
        if len(named) > 2:  # at high resolution several have one size
            return named
        units = [call for call in maps if not _shrinks(call)]
        names = {call.name for call in units}
        last: dict[tuple[int, ...], Call] = {}
        for call in units:
            side = tuple(call.given.shape[2:])
            behind_blocks = side in last and last[side].name in deep and call.name not in deep
            starts = side not in last and next(call.layer.parameters(), None) is None
            if not (behind_blocks or starts or any(_is_inside(call.name, unit) for unit in names)):
                last[side] = call
        stages = list(last.values())
        if features is None and maps:
            before = self.calls[: self.calls.index(maps[-1]) + 1]
            if len(self._weights_behind(maps[-1])) > sum(isinstance(call.layer, WEIGHTS) for call in before):
                return []  # nothing but the patches of a transformer
        return stages[next((index for index, call in enumerate(stages) if call.name in deep), 0) :]


def _shrinks(call: Call) -> bool:
    """Whether a layer made of layers more than halves the resolution."""
    is_last = call.taken.axes == CHANNELS_LAST
    if not (call.takes_map or is_last) or not list(call.layer.children()):
        return False
    return call.taken.shape[1 if is_last else 2] > 2 * call.given.shape[2]


def _is_inside(name: str, other: str) -> bool:
    return name != other and (not other or name.startswith(f"{other}."))


def _has_blocks(layer: nn.Module) -> bool:
    """Whether a layer contains a block with at least two layers with weights."""
    inner = (block for block in layer.modules() if block is not layer)
    return any(sum(isinstance(part, WEIGHTS) for part in block.modules()) > 1 for block in inner)


def _branch_end(name: str, block: nn.Module, order: list[str]) -> str | None:
    """Last layer of the residual branch in the blocks of torchvision and timm, or None for another module."""
    children = dict(block.named_children())
    if hasattr(block, "downsample") or getattr(block, "has_skip", False):
        numbered = {f"{name}.{child}" for child in children if re.fullmatch(r"(conv|bn|norm)\d", child)}
        return next((layer for layer in reversed(order) if layer in numbered), None)
    if getattr(block, "use_res_connect", False):
        return f"{name}.{'conv' if 'conv' in children else 'block'}"
    return f"{name}.f" if "f" in children and hasattr(block, "proj") else None


def shapes_of(result: Any) -> list[torch.Size]:
    """Shapes of all tensors in a network's output."""
    return [tensor.shape for tensor in tensors_in(result)]
