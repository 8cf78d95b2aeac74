"""Attention blocks in any CNN, and out of it again.

A block becomes the child `attention` of the layer it follows, and a forward hook of that layer applies it. So the
network keeps the dotted names, the state_dict keys and the types of all its layers; `layer1.0.bn3` brings the keys
`layer1.0.bn3.attention.*` and nothing else changes. The output of an `nn.Sequential` is that of its last child, which
then has the block. A layer that loops over its children (a dense block) must not see one more: its last child keeps it.
"""

import inspect
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sightline.attention.places import Call, Trace, shapes_of
from sightline.attention.registry import ATTENTION
from sightline.facts import did_you_mean
from sightline.inference import copy_of, untouched

__all__ = ["WithMaps", "insert", "remove"]

Block = str | Callable[..., nn.Module]
Init = Literal["identity", "fresh"]

# Which of two architectures a block has is in its state_dict, or the weights of one would load into the other.
MARK = "inserted_as_identity"


def insert(
    model: nn.Module,
    block: Block,
    at: str | Sequence[str] | None = None,
    init: Init = "identity",
    inplace: bool = False,
    **options: Any,
) -> nn.Module:
    """Put attention into a CNN; its own layers, weights, dotted names and state_dict keys stay.

    A gating block follows each place: the parent sees the layer's output with the block applied. A pooling replaces
    the global average: it hands the network a map of one position, whose average is itself. Layers behind it that
    expect another number of channels are made anew.

    Args:
        model: a network of `nn.Module`s whose layers yield (b, c, h, w).
        block: a key of `ATTENTION`, or a callable that makes a block for a number of channels.
        at: dotted names or patterns of layers, part by part as in file names: "layer3", "layer*.[0-9].bn2". None, for
            most blocks: the end of each residual branch, before the sum, in ResNets, RegNets and inverted residual
            blocks of timm and torchvision, and in other networks the end of each stage. BAM: the end of stages 1 to 3;
            self-attention and non-local blocks: of the last two. Poolings: the global pool, or the map in front of it
            where a function pools or the classifier is a convolution. A stage is `layer1` to `layer4`, or the last
            layer of a resolution that all later ones depend on.
        init: "identity", a fresh gating block returns its input, so that the logits stay the same bit for bit; "fresh",
            the block's own initialization. Poolings have one initialization only. Blocks may compute different things
            in the two settings: a buffer `attention.inserted_as_identity` keeps their weights apart.
        inplace: change `model` itself, not a copy.
        options: keyword arguments of the block.

    Returns:
        The network with blocks; `layer.attention` is the block of a layer, and `remove` takes all of them out.

    Raises:
        ValueError: unknown block, option or layer; a layer that yields no (b, c, h, w), runs twice or has a block
            already; no such places; with "identity", a block that changes its input; a network that with the block
            does not run or returns another shape. The model is left as it was.

    Source: Hu et al. 2018 and Woo et al. 2018 (before the sum), Park et al. 2018 (BAM after stages 1 to 3).

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    >>> inserted = insert(model, lambda channels: nn.Conv2d(channels, channels, 1), at="0", init="fresh")
    >>> [name for name, _ in inserted[0].named_parameters()]
    ['weight', 'bias', 'attention.weight', 'attention.bias']
    """
    if init not in get_args(Init):
        raise ValueError(f"expected init to be one of {', '.join(get_args(Init))}; got {init!r}")
    name, make = _maker(block, options)
    if "identity" in inspect.signature(make).parameters:
        options = {"identity": init == "identity", **options}
    marked = options.get("identity", False)
    model = model if inplace else copy_of(model)
    trace = Trace(model)
    if at is not None:
        calls = [trace.only_call(name) for name in _matches(model, [at] if isinstance(at, str) else at)]
        pooling = _pools(make, options, calls[0])
    else:
        pool = trace.pool()
        calls = trace.places(name) if pool is None else [pool]
        pooling = _pools(make, options, calls[0])
        if pooling and pool is None:
            raise ValueError(
                f"expected a network with one map (b, c, h, w) that becomes one position before the classifier, got "
                f"{type(model).__name__}; name the layer with at"
            )
        calls = calls if pooling else trace.places(name)
    places: dict[str, tuple[_Place, nn.Module]] = {}
    for call in calls:
        place = _place(trace, call, pooling)
        if place.holder in places:
            raise ValueError(f"expected one block per layer, got two for {place.holder!r}; name fewer layers")
        made = _made(make, options, place.call, place.shape[1])
        if not pooling:
            _check(made, place, init)
        if marked:
            made.register_buffer(MARK, torch.tensor(True, device=place.call.device))
        places[place.holder] = place, made.train(model.training)
    hooks = [_attach(place, made) for place, made in places.values()]
    behind = trace.calls[trace.calls.index(calls[0]) + 1 :] if pooling else []
    try:
        _fit(model, trace, [made for _, made in places.values()], {call.name for call in behind}, hooks[0].replaced)
    except BaseException:
        for place, _ in places.values():
            _detach(model, place.call.layer, *_hooks(place.call.layer)[0])
        raise
    return model


def remove(model: nn.Module, inplace: bool = False) -> nn.Module:
    """Take out every block that `insert` put in; a head that a pooling had replaced comes back.

    Raises:
        ValueError: no block was inserted.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    >>> list(remove(insert(model, nn.BatchNorm2d, init="fresh")).state_dict())
    ['0.weight', '0.bias']
    """
    model = model if inplace else copy_of(model)
    found = [(layer, hooks, key) for layer in model.modules() for hooks, key in _hooks(layer)]
    if not found:
        raise ValueError(f"expected a model with inserted blocks, got {type(model).__name__} without; see insert")
    for layer, hooks, key in found:
        _detach(model, layer, hooks, key)
    return model


class WithMaps(nn.Module):
    """A network that returns (logits, map, map, ...): for runtimes without hooks, such as ONNX.

    The maps are what the child `gate` of every block yields, each (b, k, h, w), in the order of `names`.

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

        def keeper(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
            def keep(gate: nn.Module, inputs: Any, weights: Tensor) -> None:
                maps[name] = weights

            return keep

        handles = [
            self.model.get_submodule(f"{name}.gate".lstrip(".")).register_forward_hook(keeper(name))
            for name in self.names
        ]
        try:
            logits = self.model(images)
        finally:
            for handle in handles:
                handle.remove()
        return logits, *(maps[name] for name in self.names)


class _Attend:
    """Hook that applies the block: to what the layer returns, or, before a global pool, to what it takes."""

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


def _attach(place: _Place, made: nn.Module) -> _Attend:
    place.holding.attention = made
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
        now = next(model.get_submodule(name).parameters())
        _replace(model, name, original.to(now.device, now.dtype).train(model.training))


def _hooks(layer: nn.Module) -> list[tuple[dict[int, _Attend], int]]:
    state = vars(layer)
    return [
        (hooks, key)
        for hooks in (state["_forward_pre_hooks"], state["_forward_hooks"])
        for key, hook in hooks.items()
        if isinstance(hook, _Attend)
    ]


def _maker(block: Block, options: dict[str, Any]) -> tuple[str, Callable[..., nn.Module]]:
    if isinstance(block, str):
        if block not in ATTENTION:
            raise ValueError(
                f"unknown attention {block!r}{did_you_mean(block, ATTENTION, n=3)}; it is one of {', '.join(ATTENTION)}"
            )
        name, make = block, ATTENTION[block]
    else:
        name, make = next((name for name, known in ATTENTION.items() if known is block), ""), block
    known = inspect.signature(make).parameters
    any_option = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    for option in options:
        if option not in known and not any_option:
            raise ValueError(
                f"{name or 'the block'} has no option {option!r}{did_you_mean(option, known, n=3)}; "
                f"it has: {', '.join(list(known)[1:]) or 'none'}"
            )
    return name, make


def _place(trace: Trace, call: Call, pooling: bool) -> _Place:
    name = call.name
    if not (call.given is not None and call.given.is_map) and not (pooling and call.takes_map):
        raise ValueError(
            f"expected a layer that yields (b, c, h, w), got {call.kind} from {name!r}; name another layer"
        )
    before = pooling and call.takes_map and not call.gives_map
    while not before and type(call.layer).forward is nn.Sequential.forward:
        last = [other for other in trace.calls if other.layer is list(call.layer.children())[-1]]
        if len(last) != 1 or last[0].given != call.given:
            break
        call = last[0]
    value = call.taken if before else call.given
    assert value is not None
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


class _Seen(Exception):
    pass


class _Probe(nn.Module):
    def forward(self, *inputs: Any) -> None:
        raise _Seen


def _loops(layer: nn.Module, call: Call) -> bool:
    """Whether a layer runs all the children it finds, so that one more would be run too."""
    if call.taken is None or not list(layer.children()):
        return False
    with untouched(layer), torch.no_grad():
        layer.add_module("sightline_probe", _Probe())
        try:
            layer.forward(torch.zeros(call.taken.shape, device=call.device, dtype=call.dtype))
        except _Seen:
            return True
        finally:
            del layer.sightline_probe
    return False


def _made(make: Callable[..., nn.Module], options: dict[str, Any], call: Call, channels: int) -> nn.Module:
    try:
        return make(channels, **options).to(call.device, call.dtype)
    except ValueError as error:
        raise ValueError(f"{error} (at {call.name!r})") from error


def _pools(make: Callable[..., nn.Module], options: dict[str, Any], call: Call) -> bool:
    """Whether a block turns a map into one vector per image."""
    value = call.taken if call.takes_map and not call.gives_map else call.given
    if value is None or not value.is_map:
        raise ValueError(
            f"expected a layer that yields (b, c, h, w), got {call.kind} from {call.name!r}; name another layer"
        )
    devices = [call.device] if call.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        made = _made(make, options, call, value.shape[1]).eval()
        return made(torch.zeros(value.shape, device=call.device, dtype=call.dtype)).ndim == 2


def _check(made: nn.Module, place: _Place, init: Init) -> None:
    """A gating block keeps the shape and, with "identity", every bit."""
    features = torch.randn(place.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    features = features.to(place.call.device, place.call.dtype)
    with untouched(made), torch.no_grad():
        gated = made(features)
    if gated.shape != features.shape:
        raise ValueError(
            f"expected a block that yields the shape it takes, {tuple(features.shape)} at {place.call.name!r}, "
            f"got {tuple(gated.shape)}; give it as many output channels as input channels"
        )
    if init == "identity" and not torch.equal(gated, features):
        raise ValueError(
            f"expected a block that returns its input while it is new, got one that changes it by up to "
            f"{(gated - features).abs().max().item():.2g}, and so the logits; "
            "give the block an option `identity`, or insert with init='fresh'"
        )


class _Misfit(Exception):
    def __init__(self, name: str, channels: int) -> None:
        self.name = name
        self.channels = channels


def _fit(
    model: nn.Module, trace: Trace, blocks: list[nn.Module], behind: set[str], replaced: dict[str, nn.Module]
) -> None:
    """Run the network with its blocks; layers behind a pooling that take another number of channels are made anew.

    Raises:
        ValueError: it cannot run so, or does not return what it did.
    """
    runs: list[nn.Module] = []
    while True:
        try:
            with untouched(model), torch.no_grad(), _watched(model, blocks, behind, runs):
                result = model(trace.images)
            break
        except _Misfit as misfit:
            layer = model.get_submodule(misfit.name)
            fresh = _remade(misfit.name, layer, misfit.channels)
            replaced[misfit.name] = layer
            _replace(model, misfit.name, fresh)
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:
            raise ValueError(
                f"expected a network that runs with the block, got {type(model).__name__}, which then raises: "
                f"{str(error).strip().splitlines()[0]}; name another layer with at"
            ) from error
    count = next((runs.count(block) for block in blocks if runs.count(block) != 1), 1)
    if count != 1:
        raise ValueError(f"expected a block that the network runs once, got one that it runs {count} times")
    if shapes_of(result) != trace.shapes:
        before, after = ([tuple(shape) for shape in shapes] for shapes in (trace.shapes, shapes_of(result)))
        raise ValueError(
            f"expected a network that returns {before}, as without the block, got {after}; name another layer with at"
        )


@contextmanager
def _watched(model: nn.Module, blocks: list[nn.Module], behind: set[str], runs: list[nn.Module]) -> Generator[None]:
    def count(block: nn.Module, inputs: Any, output: Any) -> None:
        runs.append(block)

    def check(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def compare(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            channels = inputs[0].shape[-1 if isinstance(layer, nn.Linear) else 1]
            if isinstance(layer, nn.LayerNorm):  # of one position, wherever its channels are
                channels = inputs[0].shape[1:].numel()
            if channels != _width(layer):
                raise _Misfit(name, channels)

        return compare

    runs.clear()
    handles = [block.register_forward_hook(count) for block in blocks]
    handles += [
        layer.register_forward_pre_hook(check(name))
        for name, layer in model.named_modules()
        if name in behind and _width(layer)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _width(layer: nn.Module) -> int:
    """Channels that a layer of a head takes; 0 for any other layer."""
    if isinstance(layer, nn.Linear):
        return layer.in_features
    if isinstance(layer, nn.Conv2d):
        return layer.in_channels
    if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
        return layer.num_features
    return layer.normalized_shape[-1] if isinstance(layer, nn.LayerNorm) else 0


def _remade(name: str, layer: nn.Module, channels: int) -> nn.Module:
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
        new.__dict__["normalized_shape" if isinstance(layer, nn.LayerNorm) else "num_features"] = (
            (channels,) if isinstance(layer, nn.LayerNorm) else channels
        )
        for own, old in layer.named_parameters(recurse=False):
            setattr(new, own, nn.Parameter(old.new_full((channels,), float(own == "weight")), old.requires_grad))
        for own, old in layer.named_buffers(recurse=False):
            setattr(new, own, old.new_full((channels,) if old.ndim else (), float(own == "running_var")))
    return new.train(layer.training)


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def _matches(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    names = [name for name, _ in model.named_modules() if name]
    found: dict[str, None] = {}
    for pattern in patterns:
        parts = pattern.split(".")
        matching = [
            name
            for name in names
            if name.count(".") == len(parts) - 1 and all(map(fnmatchcase, name.split("."), parts))
        ]
        if not matching:
            raise ValueError(f"no layer is named {pattern!r}{did_you_mean(pattern, names, n=3, cutoff=0.3)}")
        found |= dict.fromkeys(matching)
    if not found:
        raise ValueError("expected at least one layer to insert at, got none; leave `at` out for the paper's places")
    return list(found)
