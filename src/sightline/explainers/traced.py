"""The maps of `explain` as plain operations, gradients included, for torch.export and runtimes without a backward."""

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch._decomp import core_aten_decompositions
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from sightline.explainers.capture import Captured, LayerLike, head_of
from sightline.explainers.evidence import Gathered, gather
from sightline.explainers.explain import EXPLAINERS, Method, explain, requests_of
from sightline.explainers.explainer import Explainer, Request
from sightline.explainers.rectifiers import Rectifiers
from sightline.explainers.scorer import Scorer
from sightline.explainers.tokens import SmoothAttention, patch_maps
from sightline.inference import exact, logits_of, untouched
from sightline.inference.operations import Operation, Operations, first_tensor

Classes = Literal["predicted", "input", "all"]
"""Whose maps: those of the predicted class, of a class that is an input, or of every class."""

_AT_POSITIONS = {"gradients", "runner_up_gradients", "input_gradients"}
_READ = _AT_POSITIONS | set("images logits targets layer call activations mean_gradients head gate gates".split())


class WithExplanations(nn.Module):
    """A network that returns (logits, map, map, ...), the maps of `explain` in the order of `names`.

    Where each map is read is settled once, on `images`. Maps are (b, 1, h, w); of all classes (b, classes, h, w).

    Raises:
        ValueError: as `explain`; a method that takes more than a forward and a backward; maps of all classes that take
            a backward for each; a network that ends in a softmax or a sigmoid.

    >>> from sightline.testing import PooledModel
    >>> network = WithExplanations(PooledModel(torch.eye(3)), torch.rand(2, 3, 2, 2), ["grad_cam"])
    >>> logits, cam = network(torch.ones(1, 3, 2, 2))
    >>> logits.tolist(), cam.flatten().tolist()
    ([[1.0, 1.0, 1.0]], [0.25, 0.25, 0.25, 0.25])
    """

    def __init__(
        self,
        model: nn.Module,
        images: Float[Tensor, "b c h w"],
        methods: Sequence[Method],
        layer: LayerLike = None,
        classes: Classes = "predicted",
    ) -> None:
        super().__init__()
        self.model = model
        self.methods = methods
        self.layer = layer
        self.classes = classes
        self.requests = requests_of(methods, layer)
        self.names = [_name(request) for request in self.requests]
        check_methods(self.requests)
        self.fields = [(request.layer, request.explainer.needs) for request in self.requests]
        self.reads_pixels = any("input_gradients" in needs for _, needs in self.fields)
        explanation = explain(model, images, None, methods, layer)  # says what is wrong with a method or a layer
        self.layers = {name: str(place) for name, place in explanation.layers.items()}
        self.signed = explanation.signed
        with untouched(model), exact():
            gathered = gather(model, images, self.fields)
        self.reads_tokens = not {name for name, _ in _gates(model)} >= gathered.gates.keys()
        scorer = gathered.scorer
        if scorer.activation:
            raise ValueError(
                f"expected a network that returns logits, got {type(model).__name__}, which ends in a "
                f"{scorer.activation}; export it without"
            )
        self.places: list[Captured | None] = []
        self.heads: list[str | Tensor | None] = []
        for name, place in zip(self.names, gathered.places, strict=True):
            captured = place.captured
            if captured is not None and (captured.layout.fold > 1):
                raise ValueError(f"expected a layer that sees each image once, got {captured.name!r}; choose another")
            if classes == "all" and (place.needs & _AT_POSITIONS or (place.reads_gradients and place.head is None)):
                raise ValueError(
                    f"expected maps that need no backward for each class, got {name} of {type(model).__name__}; take "
                    "cam or grad_cam of a network that ends in pooling and one linear layer, or the class as an input"
                )
            head = None if captured is None else head_of(scorer.direct, captured)
            self.heads.append(head if head is None else self._source(head))
            self.places.append(None if captured is None else replace(captured, tensor=captured.tensor.to("meta")))

    def _source(self, head: Tensor) -> str | Tensor:
        """The name of the parameter that holds these weights, so that a file holds them once, or else the weights."""
        for name, parameter in self.model.named_parameters():
            if parameter.numel() == head.numel() and torch.equal(parameter.detach().reshape(head.shape), head):
                return name
        return head.detach().clone()

    def forward(
        self, images: Float[Tensor, "b c h w"], targets: Int[Tensor, " b"] | None = None
    ) -> tuple[Float[Tensor, "b n"] | Float[Tensor, "b t h w"], ...]:
        """Logits, then the maps; `targets` are the classes where they are an input."""
        with torch.enable_grad() if self.reads_pixels else torch.no_grad():
            if self.reads_pixels:
                images = images.detach().requires_grad_()
            capture = _Forward(self, images, targets)
            gathered = Gathered(capture, self.fields, images, Rectifiers())
            with torch.enable_grad():
                evidence = gathered.whole()
        maps = [
            request.explainer.map_of(one, **request.options).values
            for request, one in zip(self.requests, evidence, strict=True)
        ]
        return capture.scorer.direct.detach(), *(one.detach() for one in maps)


def fitting_names() -> list[str]:
    """Explainers whose maps take one forward and one backward."""
    return [name for name, one in EXPLAINERS.items() if not _obstacle(one)]


def check_methods(requests: Sequence[Request]) -> None:
    """Check that maps take one forward and one backward, and that each has a name of its own.

    Raises:
        ValueError: one takes more, or is asked for twice.
    """
    names = [_name(request) for request in requests]
    for name, request in zip(names, requests, strict=True):
        if obstacle := _obstacle(request.explainer):
            raise ValueError(
                f"expected maps of one forward and one backward for a file, got {name}, which {obstacle}; choose from "
                f"{', '.join(fitting_names())}"
            )
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"expected each map once, got {twice[0]} twice; leave one out")


def _name(request: Request) -> str:
    return request.name or request.explainer.name


def _obstacle(explainer: Explainer) -> str:
    """What keeps a map out of a file; empty if nothing does."""
    if explainer.is_control:
        return "does not look at the network"
    if explainer.many_passes or "score" in explainer.needs:
        return "runs the network many times" if explainer.many_passes else "runs the network by rules of its own"
    return f"reads {min(extra)}" if (extra := explainer.needs - _READ) else ""


class _Forward:
    """What `Capture` finds, by a forward whose layers are known."""

    def __init__(self, network: WithExplanations, images: Tensor, targets: Tensor | None) -> None:
        self.model = model = network.model
        self.gates: dict[str, Tensor] = {}
        self.kept: dict[tuple[str, int], Tensor] = {}
        places = [place for place in network.places if place is not None]
        handles = [gate.register_forward_hook(partial(self._keep_gate, name)) for name, gate in _gates(model)]
        for name in {place.name for place in places if not place.name.startswith("input of ")}:
            calls = {place.call for place in places if place.name == name}
            handles.append(model.get_submodule(name).register_forward_hook(_Keep(self, name, calls)))
        inputs = {(p.name.removeprefix("input of "), p.call): p for p in places if p.name.startswith("input of ")}
        attention = patch_maps(model, self._keep_map) if network.reads_tokens else SmoothAttention()
        try:
            with _Means(), attention, _Inputs(self, inputs):
                logits = logits_of(model(images))
        finally:
            for handle in handles:
                handle.remove()
        self.scorer = Scorer(model, None)
        self.scorer.take(logits)
        if network.classes == "all":
            count = self.scorer.logits.shape[1]
            self.scorer.targets = torch.arange(count).expand(logits.shape[0], count)
        elif targets is not None:
            self.scorer.targets = targets[:, None]
        weights = dict(model.named_parameters())
        self.captured: list[Captured] = []
        for place, source in zip(network.places, network.heads, strict=True):
            if place is None:
                continue
            tensor, layout = self.kept[place.name, place.call], place.layout
            if not (layout.cells or layout.rows):
                layout = replace(layout, grid=tuple(layout.maps(tensor).shape[2:]))
            head = weights[source].detach().flatten(1) if isinstance(source, str) else source
            self.captured.append(replace(place, tensor=tensor, layout=layout, head=head))

    def leaf(self, key: tuple[str, int], tensor: Tensor) -> Tensor:
        """Begin the graph here; the tensor to hand on, which an in-place activation may change."""
        torch.set_grad_enabled(True)  # from here to the logits
        self.kept[key] = tensor if tensor.requires_grad else tensor.detach().requires_grad_()
        return self.kept[key].clone()

    def _keep_gate(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            self._keep_map(name, output)

    def _keep_map(self, name: str, maps: Tensor) -> None:
        if maps.ndim == 4:
            self.gates[name] = maps.detach()


class _Keep:
    """Forward hook that begins the graph at a module's output, in those of its calls."""

    def __init__(self, forward: _Forward, name: str, calls: set[int]) -> None:
        self.forward = forward
        self.name = name
        self.calls = calls
        self.call = 0

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        first, call = first_tensor(output), self.call
        self.call += 1
        if first is None or call not in self.calls:
            return None
        handed = self.forward.leaf((self.name, call), first)
        return tree_map(lambda value: handed if value is first else value, output)


class _Means(Operations):
    """Global average pooling as a mean, since PyTorch's sets the strides of a channels-last map, unknown to ONNX."""

    def on(self, operation: Operation) -> Any:
        """The result of the operation."""
        size = operation.argument(1, "output_size")
        if operation.name == "adaptive_avg_pool2d" and size in (1, (1, 1), [1, 1]):
            return operation.input.mean((-2, -1), keepdim=True)
        return operation()


class _Inputs(Operations):
    """Begins the graph at the input of an operation, where no module returns the feature map."""

    def __init__(self, forward: _Forward, inputs: dict[tuple[str, int], Captured]) -> None:
        super().__init__()
        self.forward = forward
        self.inputs = inputs
        self.calls: Counter[str] = Counter()
        self.replaced: dict[int, tuple[Tensor, Tensor]] = {}
        """By id: a feature map, and what is read in its place from then on."""

    def on(self, operation: Operation) -> Any:
        """The result of the operation on the tensors where graphs begin."""
        name = getattr(operation.func, "__name__", "")
        place = self.inputs.get((name, self.calls[name]))
        self.calls[name] += 1
        if place is not None:
            sides = place.tensor.ndim
            inputs = [one for one in operation.tensors if one.ndim == sides and not isinstance(one, nn.Parameter)]
            fitting = {id(one): one for one in inputs}
            if len(fitting) != 1:
                raise ValueError(
                    f"expected one feature map as {place.name}, got {len(fitting)}; choose a module's output by --layer"
                )
            ((key, first),) = fitting.items()
            self.replaced[key] = first, self.forward.leaf((place.name, place.call), first)
        if not self.replaced:
            return operation()
        args, kwargs = tree_map(self._value, (operation.args, operation.kwargs))
        return operation.func(*args, **kwargs)

    def _value(self, value: Any) -> Any:
        before, after = self.replaced.get(id(value), (None, None))
        return after if before is not None and before is value else value


def _gates(model: nn.Module) -> list[tuple[str, nn.Module]]:
    gates = [(name, getattr(module, "gate", None)) for name, module in model.named_modules()]
    return [(name, gate) for name, gate in gates if isinstance(gate, nn.Module)]


def traced(network: nn.Module, inputs: Sequence[Tensor], free: Sequence[Collection[int]]) -> torch.fx.GraphModule:
    """The network in eval mode as a graph of operations, its backward among them.

    Args:
        network: calls `torch.autograd.grad` inside.
        inputs: examples.
        free: for each of them the dimensions whose size stays open.
    """
    mode = FakeTensorMode(shape_env=ShapeEnv(duck_shape=False), allow_non_fake_inputs=True)
    fakes: list[Tensor] = []
    for value, axes in zip(inputs, free, strict=True):
        sizes = [DimDynamic.DYNAMIC if axis in axes else DimDynamic.STATIC for axis in range(value.ndim)]
        fakes.append(mode.from_tensor(value, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes)))
    trace = make_fx(network, decomposition_table=backwards(), tracing_mode="symbolic", _allow_non_fake_inputs=True)
    graph = trace(*fakes)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _convolution_backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    bias_sizes: Any,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    mask: Sequence[bool],
) -> Any:
    """The gradient at the input alone: the transposed convolution with the same weights, or the other way round.

    Weights that depend on the image need a gradient, too: then PyTorch's operation stays.
    """
    if any(mask[1:]):
        return NotImplemented
    convolution = torch.ops.aten.convolution.default
    if transposed:
        zeros = [0] * len(stride)
        return convolution(grad, weight, None, stride, padding, dilation, False, zeros, groups), None, None
    left_over: list[Any] = [
        size - ((size_out - 1) * step - 2 * pad + space * (side - 1) + 1)
        for size, size_out, step, pad, space, side in zip(
            input.shape[2:], grad.shape[2:], stride, padding, dilation, weight.shape[2:], strict=True
        )
    ]
    if all(isinstance(size, int) for size in left_over):
        return convolution(grad, weight, None, stride, padding, dilation, True, left_over, groups), None, None
    zeros = [0] * len(stride)  # an image of any size: what is left over is no constant, as ONNX wants it
    whole = convolution(grad, weight, None, stride, zeros, dilation, True, zeros, groups)
    whole = F.pad(whole, [side for step in reversed(stride) for side in (0, step - 1)])
    for axis, (pad, size) in enumerate(zip(padding, input.shape[2:], strict=True), 2):
        whole = whole.narrow(axis, pad, size)
    return whole, None, None


def _max_pool_backward(grad: Tensor, input: Tensor, indices: Tensor) -> Tensor:
    zeros = torch.zeros_like(input).flatten(2)
    return zeros.scatter_add(2, indices.flatten(2), grad.flatten(2)).view_as(input)


def _average_pool_backward(
    grad: Tensor,
    input: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor: int | None,
) -> Tensor:
    windows: list[list[tuple[int, int, float]]] = []
    for axis, (size, step, pad) in enumerate(zip(kernel, stride or kernel, padding, strict=True), 2):
        length, ends = input.shape[axis], input.shape[axis] + (pad if count_include_pad else 0)
        first = -pad if count_include_pad else 0
        starts = [i * step - pad for i in range(_known(grad.shape[axis]))]
        counts = [1 if divisor else min(start + size, ends) - max(start, first) for start in starts]
        bounds = [(max(start, 0), min(start + size, _known(length))) for start in starts]
        windows.append([(*bound, 1 / count) for bound, count in zip(bounds, counts, strict=True)])
    return _unpooled(grad if divisor is None else grad / divisor, input, windows)


def _adaptive_average_pool_backward(grad: Tensor, input: Tensor) -> Tensor:
    windows: list[list[tuple[int, int, float]]] = []
    for axis in (2, 3):
        length, count = _known(input.shape[axis]), _known(grad.shape[axis])
        bounds = [(i * length // count, -(-(i + 1) * length // count)) for i in range(count)]
        windows.append([(start, stop, 1 / (stop - start)) for start, stop in bounds])
    return _unpooled(grad, input, windows)


def _unpooled(grad: Tensor, input: Tensor, windows: Sequence[Sequence[tuple[int, int, float]]]) -> Tensor:
    """Spreads what each window got over its cells, by a matrix (windows, cells) for each of the two axes."""
    rows, columns = (
        torch.tensor(
            [[share if start <= i < stop else 0.0 for i in range(input.shape[axis])] for start, stop, share in along],
            dtype=grad.dtype,
        )
        for axis, along in enumerate(windows, 2)
    )
    return rows.mT @ grad @ columns


def _known(size: Any) -> int:
    if not isinstance(size, int):
        raise ValueError("the average pooling behind the layer has other windows for images of another size")
    return size


def backwards() -> dict[Any, Callable[..., Any]]:
    """Backwards of single operations, written in other operations."""
    aten = torch.ops.aten
    table = {op: written for op, written in core_aten_decompositions().items() if "backward" in op.name()}
    table[aten.convolution_backward.default] = _convolution_backward
    table[aten.adaptive_max_pool2d_backward.default] = _max_pool_backward
    table[aten.max_pool2d_with_indices_backward.default] = lambda grad, input, k, s, p, d, ceil, indices: (
        _max_pool_backward(grad, input, indices)
    )
    table[aten.avg_pool2d_backward.default] = _average_pool_backward
    table[aten._adaptive_avg_pool2d_backward.default] = _adaptive_average_pool_backward
    table[aten.empty_permuted.default] = lambda size, order, **options: aten.empty.memory_format(size, **options)
    return table
