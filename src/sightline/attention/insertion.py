"""Attention blocks in any CNN, and out of it again.

A block becomes the child `attention` of the layer it follows, and a forward hook of that layer applies it. So the
network keeps the dotted names, the state_dict keys and the types of all its layers; `layer1.0.bn3` brings the keys
`layer1.0.bn3.attention.*` and nothing else changes. The output of an `nn.Sequential` is that of its last child, which
then has the block. A layer that loops over its children (a dense block) must not see one more: its last child keeps it.
"""

import difflib
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple, TypeGuard, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sightline.inference import copy_of, untouched

Block = str | Callable[..., nn.Module]
Init = Literal["identity", "fresh"]

# Blocks whose papers name stages; all others go to the end of every residual branch.
STAGES = {"bam": slice(0, 3), "self_attention": slice(-2, None), "non_local": slice(-2, None)}
# Which of two architectures a block has is in its state_dict, or the weights of one would load into the other.
MARK = "inserted_as_identity"
SIDES = (224, 32, 64, 28, 96, 128, 256, 299, 384, 448)


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
    expect another number of channels are made anew, up to the first linear one.

    Args:
        model: a network of `nn.Module`s whose layers yield (b, c, h, w).
        block: a key of `ATTENTION`, or a callable that makes a block for a number of channels.
        at: dotted names or patterns of layers, part by part as in file names: "layer3", "layer*.[0-9].bn2". None: the
            paper's places. For most blocks that is the end of each residual branch, before the sum, and where the
            network has none that is known, the end of each stage; for BAM the end of stages 1 to 3; for
            self-attention and non-local blocks that of the last two; for poolings the global pool.
        init: "identity", a fresh gating block returns its input, so that the logits stay the same bit for bit; "fresh",
            the block's own initialisation. Poolings have one initialisation only. Blocks may compute different things
            in the two settings: a buffer `attention.inserted_as_identity` keeps their weights apart.
        inplace: change `model` itself, not a copy.
        options: keyword arguments of the block.

    Returns:
        The network with blocks; `layer.attention` is the block of a layer, and `remove` takes all of them out.

    Raises:
        ValueError: unknown block, option or layer; a layer that yields no (b, c, h, w), runs twice or has a block
            already; with "identity", a block that changes its input.

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
    calls = _calls(model)
    names = [_global_pool(calls).name] if at is None else _matches(model, [at] if isinstance(at, str) else at)
    pooling = _pools(make, options, _only_call(calls, names[0]))
    if at is None and not pooling:
        names = _paper_places(model, calls, name)
    places: dict[str, tuple[_Place, nn.Module]] = {}
    for wanted in names:
        place = _place(calls, wanted, pooling)
        if place.holder in places:
            raise ValueError(f"expected one block per layer, got two for {place.holder!r}; name fewer layers")
        made = make(place.shape[1], **options).to(place.call.device, place.call.dtype)
        _check(made, place, pooling, init)
        if marked:
            made.register_buffer(MARK, torch.tensor(True, device=place.call.device))
        places[place.holder] = place, made.train(model.training)
    rebuilt: list[dict[str, nn.Module]] = [
        _fitting_head(calls, place, made) if pooling else {} for place, made in places.values()
    ]
    for (place, made), layers in zip(places.values(), rebuilt, strict=True):
        replaced = {name: model.get_submodule(name) for name in layers}
        for name, layer in layers.items():
            _replace(model, name, layer.train(model.training))
        place.holding.attention = made
        hook = _Attend(place.holder[len(place.call.name) :].lstrip("."), replaced)
        if place.before:
            place.call.layer.register_forward_pre_hook(hook)
        else:
            place.call.layer.register_forward_hook(hook)
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
        hook = hooks.pop(key)
        del layer.get_submodule(hook.holder).attention
        for name, original in hook.replaced.items():
            now = next(model.get_submodule(name).parameters())
            _replace(model, name, original.to(now.device, now.dtype).train(model.training))
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


class _Call(NamedTuple):
    name: str
    layer: nn.Module
    taken: torch.Size | None
    given: torch.Size | None
    kind: str
    device: torch.device
    dtype: torch.dtype


class _Place(NamedTuple):
    call: _Call
    holder: str
    holding: nn.Module
    before: bool
    shape: torch.Size


def _hooks(layer: nn.Module) -> list[tuple[dict[int, _Attend], int]]:
    state = vars(layer)
    return [
        (hooks, key)
        for hooks in (state["_forward_pre_hooks"], state["_forward_hooks"])
        for key, hook in hooks.items()
        if isinstance(hook, _Attend)
    ]


def _maker(block: Block, options: dict[str, Any]) -> tuple[str, Callable[..., nn.Module]]:
    from sightline.attention import ATTENTION

    if isinstance(block, str):
        if block not in ATTENTION:
            raise ValueError(
                f"unknown attention {block!r}{closest(block, ATTENTION)}; it is one of {', '.join(ATTENTION)}"
            )
        name, make = block, ATTENTION[block]
    else:
        name, make = next((name for name, known in ATTENTION.items() if known is block), ""), block
    known = inspect.signature(make).parameters
    any_option = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    for option in options:
        if option not in known and not any_option:
            raise ValueError(
                f"{name or 'the block'} has no option {option!r}{closest(option, known)}; "
                f"it has: {', '.join(list(known)[1:]) or 'none'}"
            )
    return name, make


def _calls(model: nn.Module) -> list[_Call]:
    """Every call of a module in one forward on zeros, in the order in which they end."""
    like = next(model.parameters(), torch.zeros(()))
    channels = next((layer.in_channels for layer in model.modules() if isinstance(layer, nn.Conv2d)), 3)
    config: dict[str, Any] = getattr(model, "default_cfg", None) or {}
    known: tuple[tuple[int, int], ...] = (tuple(config["input_size"][1:]),) if "input_size" in config else ()
    calls: list[_Call] = []

    def keeper(name: str) -> Callable[..., None]:
        def keep(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            taken = inputs[0].shape if len(inputs) == 1 and isinstance(inputs[0], Tensor) else None
            tensor = output if isinstance(output, Tensor) else None
            kind = type(output).__name__ if tensor is None else str(tuple(tensor.shape))
            like_output = like if tensor is None else tensor
            given = None if tensor is None else tensor.shape
            calls.append(_Call(name, layer, taken, given, kind, like_output.device, like_output.dtype))

        return keep

    handles = [layer.register_forward_hook(keeper(name)) for name, layer in model.named_modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    problem = ""
    try:
        with untouched(model), torch.no_grad():
            for size in (*known, *((side, side) for side in SIDES)):
                calls.clear()
                try:
                    model(torch.zeros(1, channels, *size, device=like.device, dtype=like.dtype))
                    return calls
                except (RuntimeError, ValueError, TypeError, AssertionError) as error:
                    problem = problem or str(error).strip().splitlines()[0]
    finally:
        for handle in handles:
            handle.remove()
        for buffer, value in buffers:
            buffer.copy_(value)
    raise ValueError(
        f"expected a model that takes images of {channels} channels and {SIDES[0]} or {SIDES[1]} px, "
        f"got {type(model).__name__}, which raises: {problem}"
    )


def _place(calls: list[_Call], name: str, pooling: bool) -> _Place:
    call = _only_call(calls, name)
    if not _is_map(call.given) and not (pooling and _is_wide(call.taken)):
        raise ValueError(
            f"expected a layer that yields (b, c, h, w), got {call.kind} from {name!r}; name another layer"
        )
    before = pooling and _is_wide(call.taken) and not _is_wide(call.given)
    while not before and type(call.layer).forward is nn.Sequential.forward:
        last = [other for other in calls if other.layer is list(call.layer.children())[-1]]
        if len(last) != 1 or last[0].given != call.given:
            break
        call = last[0]
    shape = call.taken if before else call.given
    assert shape is not None
    holder, holding = call.name, call.layer
    if _hooks(call.layer):
        raise ValueError(
            f"expected a layer without a block, got {name!r}, which has one; take it out with remove first"
        )
    while _loops(holding, next(other for other in calls if other.layer is holding)):
        last, holding = list(holding.named_children())[-1]
        holder = f"{holder}.{last}".lstrip(".")
    if hasattr(holding, "attention"):
        raise ValueError(
            f"expected a layer without a child `attention`, got {holder!r}, which has one; name another layer"
        )
    return _Place(call, holder, holding, before, shape)


def _only_call(calls: list[_Call], name: str) -> _Call:
    found = [call for call in calls if call.name == name]
    if len(found) != 1:
        got = f"which it runs {len(found)} times" if found else "which it never runs"
        raise ValueError(f"expected a layer that the network runs once, got {name!r}, {got}; name another layer")
    return found[0]


class _Seen(Exception):
    pass


class _Probe(nn.Module):
    def forward(self, *inputs: Any) -> None:
        raise _Seen


def _loops(layer: nn.Module, call: _Call) -> bool:
    """Whether a layer runs all the children it finds, so that one more would be run too."""
    if call.taken is None or not list(layer.children()):
        return False
    layer.add_module("sightline_probe", _Probe())
    try:
        with untouched(layer), torch.no_grad():
            layer.forward(torch.zeros(call.taken, device=call.device, dtype=call.dtype))
    except _Seen:
        return True
    finally:
        del layer.sightline_probe
    return False


def _pools(make: Callable[..., nn.Module], options: dict[str, Any], call: _Call) -> bool:
    """Whether a block turns a map into one vector per image."""
    maps = sorted(filter(_is_map, (call.given, call.taken)), key=_is_wide)
    if not maps:
        raise ValueError(
            f"expected a layer that yields (b, c, h, w), got {call.kind} from {call.name!r}; name another layer"
        )
    shape = maps[-1]
    devices = [call.device] if call.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        made = make(shape[1], **options).to(call.device, call.dtype).eval()
        return made(torch.zeros(shape, device=call.device, dtype=call.dtype)).ndim == 2


def _check(made: nn.Module, place: _Place, pooling: bool, init: Init) -> None:
    """A gating block keeps the shape and, with "identity", every bit."""
    if pooling:
        return
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


def _fitting_head(calls: list[_Call], place: _Place, made: nn.Module) -> dict[str, nn.Module]:
    """New layers for those behind a pooling, up to the first linear one, that take another number of channels."""
    with untouched(made), torch.no_grad():
        pooled = made(torch.zeros(place.shape, device=place.call.device, dtype=place.call.dtype))
    channels = pooled.shape[1]
    fresh: dict[str, nn.Module] = {}
    for call in calls[calls.index(place.call) + 1 :]:
        layer = call.layer
        own = dict(layer.named_parameters(recurse=False))
        if not own:
            continue
        if isinstance(layer, nn.Linear):
            taken, new = layer.in_features, nn.Linear(channels, layer.out_features, "bias" in own)
        elif isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.groups == 1:
            taken, new = layer.in_channels, nn.Conv2d(channels, layer.out_channels, 1, bias="bias" in own)
        elif isinstance(layer, nn.LayerNorm):
            taken, new = layer.normalized_shape[-1], type(layer)(channels, eps=layer.eps)
        elif isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            taken, new = layer.num_features, type(layer)(channels)
        else:
            raise ValueError(
                f"expected linear, 1x1 convolution or normalisation layers behind the pooling, got "
                f"{type(layer).__name__} at {call.name!r}; name another place or write the head yourself"
            )
        if taken != channels:
            fresh[call.name] = new.to(call.device, next(iter(own.values())).dtype)
        if isinstance(layer, nn.Linear | nn.Conv2d):
            break
    return fresh


def _global_pool(calls: list[_Call]) -> _Call:
    """The last module that makes one position of a map; where none does, the last one that yields a map."""
    wide = max((index for index, call in enumerate(calls) if _is_wide(call.given)), default=None)
    if wide is None:
        raise ValueError("expected a CNN, got a model none of whose layers yields (b, c, h, w) with h*w > 1")
    for call in reversed(calls[wide + 1 :]):
        keeps = call.taken is not None and call.given is not None and call.given[1:2] == call.taken[1:2]
        if keeps and _is_wide(call.taken) and not any(isinstance(m, nn.Linear) for m in call.layer.modules()):
            return call
    return calls[wide]


def _paper_places(model: nn.Module, calls: list[_Call], name: str) -> list[str]:
    if name in STAGES:
        return _stages(model, calls)[STAGES[name]]
    ended = {call.name: index for index, call in enumerate(calls)}
    ends = (_branch_end(name, layer, ended) for name, layer in model.named_modules() if name in ended)
    return [end for end in ends if end] or _stages(model, calls)


def _branch_end(name: str, block: nn.Module, ended: dict[str, int]) -> str | None:
    """Last layer of the residual branch in the blocks of torchvision and timm, or None for another module."""
    children = dict(block.named_children())
    if hasattr(block, "downsample") or getattr(block, "has_skip", False):
        numbered = [f"{name}.{child}" for child in children if re.fullmatch(r"(conv|bn|norm)\d", child)]
        return max((child for child in numbered if child in ended), key=ended.__getitem__, default=None)
    if getattr(block, "use_res_connect", False):
        return f"{name}.{'conv' if 'conv' in children else 'block'}"
    return f"{name}.f" if "f" in children and hasattr(block, "proj") else None


def _stages(model: nn.Module, calls: list[_Call]) -> list[str]:
    """A ResNet's stages; else the last unit at each resolution: of those made of blocks, or of the layers."""
    found = {call.name: call for call in calls}
    own = [name for name in found if re.fullmatch(r"layer\d", name)]
    if len(own) > 2:  # at high resolution several are of one size
        return own
    last: dict[torch.Size, str] = {}
    deep: dict[torch.Size, str] = {}
    for call in _units(model, found[""], found):
        if call.given is None or not _is_wide(call.given):
            continue
        side = call.given[2:]
        if next(call.layer.parameters(), None) is not None or side in last:
            last[side] = call.name
        if any(_linear_layers(inner) > 1 for inner in call.layer.modules() if inner is not call.layer):
            deep[side] = call.name
    return list((deep or last).values())


def _units(model: nn.Module, call: _Call, found: dict[str, _Call]) -> Iterator[_Call]:
    """The network in pieces that halve the resolution at most."""
    shrinks = _is_wide(call.taken) and (not _is_map(call.given) or call.taken[2] > 2 * call.given[2])
    if not shrinks or not list(call.layer.children()):
        yield call
        return
    for inner in _called_children(call.name, call.layer, found):
        yield from _units(model, inner, found)


def _called_children(name: str, layer: nn.Module, found: dict[str, _Call]) -> Iterator[_Call]:
    for child, inner in layer.named_children():
        path = f"{name}.{child}".lstrip(".")
        if path in found:
            yield found[path]
        else:
            yield from _called_children(path, inner, found)


def _linear_layers(layer: nn.Module) -> int:
    return sum(isinstance(inner, nn.Conv2d | nn.Linear) for inner in layer.modules())


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
            raise ValueError(f"no layer is named {pattern!r}{closest(pattern, names, cutoff=0.3)}")
        found |= dict.fromkeys(matching)
    if not found:
        raise ValueError("expected at least one layer to insert at, got none; leave `at` out for the paper's places")
    return list(found)


def closest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """A hint at the names that were perhaps meant; nothing where none is near.

    >>> closest("brnap", ["se", "brnpa"])
    "; did you mean 'brnpa'?"
    """
    found = difflib.get_close_matches(name, list(known), n=3, cutoff=cutoff)
    return f"; did you mean {' or '.join(map(repr, found))}?" if found else ""


def _is_map(shape: torch.Size | None) -> TypeGuard[torch.Size]:
    return shape is not None and len(shape) == 4


def _is_wide(shape: torch.Size | None) -> TypeGuard[torch.Size]:
    return _is_map(shape) and shape[2] * shape[3] > 1
