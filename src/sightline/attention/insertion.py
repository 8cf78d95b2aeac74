"""Insert attention blocks into any CNN, and remove them again.

A block becomes the child `attention` of the layer it follows, and a forward hook of that layer applies it. So the
network keeps the dotted names, the state_dict keys and the types of all its layers; a block after `layer1.0.bn3` adds
the keys `layer1.0.bn3.attention.*` and changes nothing else. The output of an `nn.Sequential` is that of its last
child, which then holds the block. A layer that loops over its children (a dense block) would run one more child, so its
last child holds the block.
"""

import inspect
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sightline.attention.places import NOTHING, Call, Trace, Value, shapes_of
from sightline.attention.registry import ATTENTION, check_choice
from sightline.facts import current_name, did_you_mean
from sightline.inference import copy_of, untouched

__all__ = ["WithMaps", "insert", "inserted", "layers_named", "remove"]

Block = str | Callable[..., nn.Module]
Maker = partial[nn.Module]
Init = Literal["identity", "fresh"]

# A buffer that keeps the weights of the two variants of a block apart.
MARK = "inserted_as_identity"


def insert(
    model: nn.Module,
    block: Block,
    at: str | Sequence[str] | None = None,
    init: Init = "identity",
    inplace: bool = False,
    **options: Any,
) -> nn.Module:
    """Insert attention into a CNN; its own layers, weights, dotted names and state_dict keys stay.

    A gating block follows each place: the parent sees the layer's output with the block applied. A pooling replaces the
    global average; layers behind it that expect another number of channels are rebuilt.

    Args:
        model: a network of `nn.Module`s whose layers yield (b, c, h, w).
        block: a key of `ATTENTION`, `alignment:` and a key of `ALIGNMENT`, or a callable that makes a block for a
            number of channels.
        at: dotted names or patterns of layers, part by part as in file names: "layer3", "layer*.[0-9].bn2". None, for
            most blocks: the end of each residual branch, before the sum, in ResNets, RegNets and inverted residual
            blocks of timm and torchvision, and in other networks the end of each stage. BAM: the end of stages 1 to 3;
            self-attention and non-local blocks: of the last two. Poolings: the global pool, or the map in front of it
            if a function pools or the classifier is a convolution. A stage is `layer1` to `layer4`, or the last
            layer of a resolution that all later ones depend on.
        init: "identity", a fresh gating block returns its input, so the logits stay the same bit for bit; "fresh",
            the block's own initialization. Poolings have one initialization only. Blocks may compute different things
            in the two settings: a buffer `attention.inserted_as_identity` keeps their weights apart.
        inplace: change `model` itself, not a copy.
        options: keyword arguments of the block.

    Returns:
        The network with blocks; `layer.attention` is the block of a layer, and `remove` removes all of them.

    Raises:
        ValueError: unknown block, option or layer; a layer that yields no (b, c, h, w), runs twice or has a block; no
            such places; with "identity", a block that changes its input; a network that with the block fails or
            returns another shape. The model is then unchanged.

    Source: Hu et al. 2018 and Woo et al. 2018 (before the sum), Park et al. 2018 (BAM after stages 1 to 3).

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    >>> inserted = insert(model, lambda channels: nn.Conv2d(channels, channels, 1), at="0", init="fresh")
    >>> [name for name, _ in inserted[0].named_parameters()]
    ['weight', 'bias', 'attention.weight', 'attention.bias']
    """
    check_choice("init", init, get_args(Init))
    name, make = _maker(block, options, init)
    model = model if inplace else copy_of(model)
    trace = Trace(model)
    calls, pooling = _calls(trace, name, make, at)
    places = [_place(trace, call, pooling) for call in calls]
    holders = [place.holder for place in places]
    if twice := [holder for holder in holders if holders.count(holder) > 1]:
        raise ValueError(f"expected one block per layer, got two for {twice[0]!r}; name fewer layers")
    blocks = [_block(make, place, None if pooling else init).train(model.training) for place in places]
    hooks = [_attach(place, attention) for place, attention in zip(places, blocks, strict=True)]
    behind = {call.name for call in trace.calls[trace.calls.index(calls[0]) + 1 :]} if pooling else set[str]()
    try:
        _fit(model, trace, blocks, behind, hooks[0].replaced)
    except BaseException:
        for place in places:
            _detach(model, place.call.layer, *_hooks(place.call.layer)[0])
        raise
    return model


def remove(model: nn.Module, inplace: bool = False) -> nn.Module:
    """Remove every block that `insert` inserted, and restore a head that a pooling has replaced.

    Raises:
        ValueError: no block was inserted.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    >>> list(remove(insert(model, nn.BatchNorm2d, init="fresh")).state_dict())
    ['0.weight', '0.bias']
    """
    model = model if inplace else copy_of(model)
    inserted = [(layer, hooks, key) for layer in model.modules() for hooks, key in _hooks(layer)]
    if not inserted:
        raise ValueError(f"expected a model with inserted blocks, got {type(model).__name__} without; see insert")
    for layer, hooks, key in inserted:
        _detach(model, layer, hooks, key)
    return model


def inserted(model: nn.Module) -> list[nn.Module]:
    """The blocks that `insert` inserted, and the layers that it rebuilt for another number of channels.

    >>> [type(block).__name__ for block in inserted(insert(nn.Sequential(nn.Conv2d(3, 8, 3)), "se", at="0"))]
    ['SqueezeExcite']
    """
    modules: list[nn.Module] = []
    for layer in model.modules():
        for hooks, key in _hooks(layer):
            modules.append(layer.get_submodule(f"{hooks[key].holder}.attention".lstrip(".")))
            modules += [model.get_submodule(name) for name in hooks[key].replaced]
    return modules


class WithMaps(nn.Module):
    """A network that returns (logits, map, map, ...): for runtimes without hooks, such as ONNX.

    The maps are the outputs of the child `gate` of every block, each (b, k, h, w), in the order of `names`.

    Raises:
        ValueError: the network has no block with a `gate`.

    >>> from sightline.testing import PlantedAttention
    >>> logits, weights = WithMaps(PlantedAttention())(torch.ones(1, 3, 2, 2))
    >>> weights.flatten().tolist()
    [0.25, 0.25, 0.25, 0.25]
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.names = [
            name for name, block in model.named_modules() if isinstance(getattr(block, "gate", None), nn.Module)
        ]
        if not self.names:
            raise ValueError(f"expected a model with attention blocks, got {type(model).__name__} without; see insert")

    def forward(self, images: Float[Tensor, "b c h w"]) -> tuple[Tensor, ...]:
        """Logits, then the map of every block."""
        maps: dict[str, Tensor] = {}

        def keep(name: str, gate: nn.Module, inputs: Any, weights: Tensor) -> None:
            maps[name] = weights

        gates = {name: self.model.get_submodule(f"{name}.gate".lstrip(".")) for name in self.names}
        handles = [gate.register_forward_hook(partial(keep, name)) for name, gate in gates.items()]
        try:
            logits = self.model(images)
        finally:
            for handle in handles:
                handle.remove()
        return logits, *(maps[name] for name in self.names)


class _Attend:
    """Hook that applies the block to the layer's output or, before a global pool, to its input."""

    def __init__(self, holder: str, replaced: dict[str, nn.Module]) -> None:
        self.holder = holder
        self.replaced = replaced

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor | None = None) -> Tensor:
        block = layer.get_submodule(f"{self.holder}.attention".lstrip("."))
        attended = block(inputs[0] if output is None else output)
        return attended if attended.ndim == 4 else attended[:, :, None, None]


class _Place(NamedTuple):
    call: Call
    holder: str
    holding: nn.Module
    before: bool
    shape: torch.Size


def _attach(place: _Place, attention: nn.Module) -> _Attend:
    place.holding.attention = attention
    hook = _Attend(place.holder[len(place.call.name) :].lstrip("."), {})
    if place.before:
        place.call.layer.register_forward_pre_hook(hook)
    else:
        place.call.layer.register_forward_hook(hook)
    return hook


def _detach(model: nn.Module, layer: nn.Module, hooks: dict[int, _Attend], key: int) -> None:
    hook = hooks.pop(key)
    del layer.get_submodule(hook.holder).attention
    for name, original in hook.replaced.items():
        like = next(model.get_submodule(name).parameters())
        _replace(model, name, original.to(like.device, like.dtype).train(model.training))


def _hooks(layer: nn.Module) -> list[tuple[dict[int, _Attend], int]]:
    state = vars(layer)
    return [
        (hooks, key)
        for hooks in (state["_forward_pre_hooks"], state["_forward_hooks"])
        for key, hook in hooks.items()
        if isinstance(hook, _Attend)
    ]


def _maker(block: Block, options: dict[str, Any], init: Init) -> tuple[str, Maker]:
    """Name of a block, empty if it has none, and a constructor with its options."""
    if isinstance(block, str) and block.startswith("alignment:"):
        if "function" in options:
            raise ValueError(
                f"expected one alignment function, got {block} and function={options['function']!r}; leave out one"
            )
        return _maker("alignment", {**options, "function": block.partition(":")[2]}, init)
    if isinstance(block, str):
        if block not in ATTENTION:
            hint = did_you_mean(block, [*ATTENTION], n=3)
            raise ValueError(f"unknown attention {block!r}{hint}; it is one of {', '.join(ATTENTION)}")
        name, make = block, ATTENTION[block]
    else:
        name, make = next((name for name, registered in ATTENTION.items() if registered is block), ""), block
    parameters = inspect.signature(make).parameters
    options = {current_name(option): value for option, value in options.items()}
    any_option = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for option in options:
        if option not in parameters and not any_option:
            raise ValueError(
                f"{name or 'the block'} has no option {option!r}{did_you_mean(option, [*parameters], n=3)}; "
                f"it has: {', '.join(list(parameters)[1:]) or 'none'}"
            )
    identity = {"identity": init == "identity"} if "identity" in parameters else {}
    return name, partial(make, **identity | options)


def _calls(trace: Trace, name: str, make: Maker, at: str | Sequence[str] | None) -> tuple[list[Call], bool]:
    """Calls of the layers to insert at, and whether the block is a pooling."""
    if at is not None:
        calls = [trace.only_call(layer) for layer in layers_named(trace.model, [at] if isinstance(at, str) else at)]
        return calls, _pools(make, calls[0])
    pool = trace.pool()
    places = trace.places(name) if pool is None else [pool]
    if not _pools(make, places[0]):
        return places if pool is None else trace.places(name), False
    if pool is None:
        raise ValueError(
            f"expected a network with one map (b, c, h, w) that becomes one position before the classifier, got "
            f"{type(trace.model).__name__}; name the layer with at"
        )
    return [pool], True


def _block(make: Maker, place: _Place, init: Init | None) -> nn.Module:
    """A block for a place; with `init`, one that keeps the shape and, with "identity", every bit."""
    attention = _build(make, place.call, place.shape[1])
    if init is not None:
        features = torch.randn(place.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        features = features.to(place.call.device, place.call.dtype)
        with untouched(attention), torch.no_grad():
            gated = attention(features)
        if gated.shape != features.shape:
            raise ValueError(
                f"expected a block that keeps the shape, {tuple(features.shape)} at {place.call.name!r}, "
                f"got {tuple(gated.shape)}; give it as many output channels as input channels"
            )
        if init == "identity" and not torch.equal(gated, features):
            raise ValueError(
                f"expected a block that returns its input while it is new, got one that changes it by up to "
                f"{(gated - features).abs().max().item():.2g}, and so the logits; "
                "give the block an option `identity`, or insert with init='fresh'"
            )
    if make.keywords.get("identity", False):
        attention.register_buffer(MARK, torch.tensor(True, device=place.call.device))
    return attention


def _place(trace: Trace, call: Call, pooling: bool) -> _Place:
    name, value = call.name, _map_at(call, pooling)
    before = value is call.taken
    while not before and type(call.layer).forward is nn.Sequential.forward:
        last = [other for other in trace.calls if other.layer is list(call.layer.children())[-1]]
        if len(last) != 1 or last[0].given != call.given:
            break
        call = last[0]
    holder, holding = call.name, call.layer
    if _hooks(call.layer):
        raise ValueError(
            f"expected a layer without a block, got {name!r}, which has one; take it out with remove first"
        )
    while _loops(holding, next(other for other in trace.calls if other.layer is holding)):
        child, holding = list(holding.named_children())[-1]
        holder = f"{holder}.{child}".lstrip(".")
    if hasattr(holding, "attention"):
        raise ValueError(
            f"expected a layer without a child `attention`, got {holder!r}, which has one; name another layer"
        )
    return _Place(call, holder, holding, before, value.shape)


class _ProbeRan(Exception):
    pass


class _Probe(nn.Module):
    def forward(self, *inputs: Any) -> None:
        raise _ProbeRan


def _loops(layer: nn.Module, call: Call) -> bool:
    """Whether a layer loops over its children, and would run one more."""
    if call.taken == NOTHING or not list(layer.children()):
        return False
    with untouched(layer), torch.no_grad():
        layer.add_module("sightline_probe", _Probe())
        try:
            layer.forward(torch.zeros(call.taken.shape, device=call.device, dtype=call.dtype))
        except _ProbeRan:
            return True
        finally:
            del layer.sightline_probe
    return False


def _build(make: Maker, call: Call, channels: int) -> nn.Module:
    try:
        return make(channels).to(call.device, call.dtype)
    except ValueError as error:
        raise ValueError(f"{error} (at {call.name!r})") from error


def _map_at(call: Call, pooling: bool) -> Value:
    """The map that a block gets: a layer's output or, before a layer that pools, its input."""
    value = call.taken if pooling and call.takes_map and not call.gives_map else call.given
    if not value.is_map:
        raise ValueError(
            f"expected a layer that yields (b, c, h, w), got {call.kind} from {call.name!r}; name another layer"
        )
    return value


def _pools(make: Maker, call: Call) -> bool:
    """Whether a block turns a map into one vector per image."""
    value = _map_at(call, pooling=True)
    devices = [call.device] if call.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        attention = _build(make, call, value.shape[1]).eval()
        return attention(torch.zeros(value.shape, device=call.device, dtype=call.dtype)).ndim == 2


class _Misfit(Exception):
    """The name of a layer, and how many channels it was given instead of its own number."""


def _fit(
    model: nn.Module, trace: Trace, blocks: list[nn.Module], behind: set[str], replaced: dict[str, nn.Module]
) -> None:
    """Run the network with its blocks; rebuild layers behind a pooling that expect another number of channels.

    Raises:
        ValueError: it cannot run, or its output has another shape.
    """
    runs: Counter[nn.Module] = Counter()

    def count(block: nn.Module, inputs: Any, output: Any) -> None:
        runs[block] += 1

    def check(name: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        channels = inputs[0].shape[-1 if isinstance(layer, nn.Linear) else 1]
        if isinstance(layer, nn.LayerNorm):  # of one position, wherever its channels are
            channels = inputs[0].shape[1:].numel()
        if channels != _width(layer):
            raise _Misfit(name, channels)

    while True:
        runs.clear()
        try:
            with untouched(model), torch.no_grad(), ExitStack() as hooks:
                for block in blocks:
                    hooks.enter_context(block.register_forward_hook(count))
                for name, layer in model.named_modules():
                    if name in behind and _width(layer):
                        hooks.enter_context(layer.register_forward_pre_hook(partial(check, name)))
                result = model(trace.images)
            break
        except _Misfit as misfit:
            name, channels = misfit.args
            layer = model.get_submodule(name)
            _replace(model, name, _resized(name, layer, channels))
            replaced[name] = layer
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:
            raise ValueError(
                f"expected a network that runs with the block, got {type(model).__name__}, which then raises: "
                f"{str(error).strip().splitlines()[0]}; name another layer with at"
            ) from error
    if odd := [runs[block] for block in blocks if runs[block] != 1]:
        raise ValueError(f"expected a block that the network runs once, got one that it runs {odd[0]} times")
    if shapes_of(result) != trace.shapes:
        before, after = ([tuple(shape) for shape in shapes] for shapes in (trace.shapes, shapes_of(result)))
        raise ValueError(
            f"expected a network that returns {before}, as without the block, got {after}; name another layer with at"
        )


def _width(layer: nn.Module) -> int:
    """Input channels of a layer of a head; 0 for any other layer."""
    if isinstance(layer, nn.Linear):
        return layer.in_features
    if isinstance(layer, nn.Conv2d):
        return layer.in_channels
    if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
        return layer.num_features
    return layer.normalized_shape[-1] if isinstance(layer, nn.LayerNorm) else 0


def _resized(name: str, layer: nn.Module, channels: int) -> nn.Module:
    """A fresh layer like another one, for another number of channels."""
    like = next(layer.parameters(), torch.zeros(()))
    to: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
    if isinstance(layer, nn.Linear):
        new = nn.Linear(channels, layer.out_features, "bias" in dict(layer.named_parameters()), **to)
    elif isinstance(layer, nn.Conv2d):
        if layer.groups > 1 or (type(layer) is not nn.Conv2d and layer.kernel_size != (1, 1)):
            raise ValueError(
                f"expected linear, convolution or normalization layers behind the pooling, got {type(layer).__name__} "
                f"of {layer.groups} groups at {name!r}; name another place or write the head yourself"
            )
        shape: Any = layer.kernel_size, layer.stride, layer.padding, layer.dilation
        new = nn.Conv2d(channels, layer.out_channels, *shape, bias="bias" in dict(layer.named_parameters()), **to)
    else:
        new = copy_of(layer)
        sizes = {"normalized_shape": (channels,)} if isinstance(layer, nn.LayerNorm) else {"num_features": channels}
        vars(new).update(sizes)
        for key, old in layer.named_parameters(recurse=False):
            setattr(new, key, nn.Parameter(old.new_full((channels,), float(key == "weight")), old.requires_grad))
        for key, old in layer.named_buffers(recurse=False):
            setattr(new, key, old.new_full((channels,) if old.ndim else (), float(key == "running_var")))
    return new.train(layer.training)


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def layers_named(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Dotted names of the layers that match a name or pattern, part by part: "layer3", "layer*.[0-9].bn2".

    Raises:
        ValueError: a pattern matches no layer.

    >>> layers_named(nn.Sequential(nn.ReLU(), nn.Sequential(nn.ReLU())), ["*.0"])
    ['1.0']
    """
    names = [name for name, _ in model.named_modules() if name]
    matches: dict[str, None] = {}
    for pattern in patterns:
        parts = pattern.split(".")
        matching = [
            name
            for name in names
            if name.count(".") == len(parts) - 1 and all(map(fnmatchcase, name.split("."), parts))
        ]
        if not matching:
            raise ValueError(f"no layer is named {pattern!r}{did_you_mean(pattern, names, n=3, cutoff=0.3)}")
        matches |= dict.fromkeys(matching)
    if not matches:
        raise ValueError("expected at least one layer to insert at, got none; leave `at` out for the paper's places")
    return list(matches)
