r"""Runs a model so that the gradient of its output at the images is their relevance.

What flows backward is not the relevance R of a tensor but R divided by the tensor, $c = R / a$. For a linear operation
LRP-0 is then the ordinary gradient, so sums, concatenations, poolings (in a maximum the winner takes all), reshapes and
products with constants need no rule. Other operations are intercepted where the model calls them, whether a module or a
function does, in place or not: the model is never changed. An operation in none of the lists here passes its plain
gradient back, and a verdict names it.
"""

import inspect
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from sightline.explainers.relevance.rules import Composite, Epsilon, Linear, Rule
from sightline.inference import operations as ops
from sightline.inference import version_of, wide
from sightline.inference.operations import Operation, Operations, tensors_in

_POINTWISE = (
    ops.GATES
    | ops.SMOOTH_ACTIVATIONS
    | ops.BOUNDS
    | set(
        "relu relu6 threshold abs absolute pow ipow rpow float_power square sqrt rsqrt reciprocal rdiv rtruediv exp "
        "exp2 expm1 log log2 log10 log1p sin cos tan sinh cosh asin acos atan asinh acosh atanh arcsin arccos arctan "
        "sinc erfc normalize rms_norm round floor ceil trunc".split()
    )
)
_MOVES = ops.MOVES | set("roll pad unfold interpolate pixel_shuffle pixel_unshuffle channel_shuffle".split())
_PRODUCTS = ops.MULTIPLICATIONS | {"matmul", "rmatmul", "bmm", "einsum"}
_SHIFTS = ops.DIVISIONS | ops.MULTIPLICATIONS | ops.ADDITIONS | ops.SUBTRACTIONS | {"batch_norm"}
_AFFINE = _SHIFTS - {"batch_norm", "iadd", "isub", "imul", "itruediv"}
_CONSTANTS: dict[str, tuple[str, ...]] = {
    "scaled_dot_product_attention": ("query", "key"),
    "multi_head_attention_forward": ("query", "key"),
    **dict.fromkeys(ops.DIVISIONS, ("", "other")),
}
"""Arguments that are constants: their names, in the order of the positions."""
_MULTILINEAR = set("linear bilinear mv dot vdot inner tensordot addmm addmv addbmm baddbmm addcmul grid_sample".split())
_POOLINGS = {
    f"{kind}{axes}d{indices}"
    for kind in ("avg_pool", "adaptive_avg_pool", "max_pool", "adaptive_max_pool", "max_unpool")
    for axes in (1, 2, 3)
    for indices in ("", "_with_indices")
}
_SUMS_AND_CHOICES = set(
    "neg negative pos positive sum nansum mean nanmean cumsum diff tril triu diag diagonal diag_embed maximum minimum "
    "fmax fmin median sort topk kthvalue gather take take_along_dim where index_add index_put index_fill index_copy "
    "masked_fill masked_select masked_scatter scatter scatter_add rot90 meshgrid fft_fft fft_ifft fft_rfft fft_irfft "
    "fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2 fft_fftn fft_ifftn fft_fftshift fft_ifftshift view_as_real "
    "view_as_complex real imag fold upsample affine_grid as_strided requires_grad".split()
)
_LINEAR = _MOVES | _SHIFTS | _PRODUCTS | _POOLINGS | ops.EXTREMES | _SUMS_AND_CHOICES
"""Operations that hand on their relevance by the plain gradient. The multilinear ones do if one factor is constant."""


@dataclass(frozen=True)
class _Weighted:
    """A layer with weights and its input; a scale and a shift of its output's channels can be folded into it."""

    layer: Linear
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    rule: Rule
    axis: int
    """Which dimension of the output holds the channels."""
    is_transposed: bool = False
    version: int = 0
    """Of the output."""

    def folded(self, scale: Float[Tensor, " k"], shift: Float[Tensor, " k"]) -> "_Weighted":
        """The layer that yields the scaled and shifted output."""
        if self.is_transposed:  # its weights are (inputs, outputs of a group, ...)
            by_group = scale.reshape(-1, 1, self.weight.shape[1], *[1] * (self.weight.ndim - 2))
            weight = (self.weight.unflatten(0, (len(by_group), -1)) * by_group).flatten(0, 1)
        else:
            weight = self.weight * scale.reshape(-1, *[1] * (self.weight.ndim - 1))
        return replace(self, weight=weight, bias=shift if self.bias is None else shift + scale * self.bias)

    def output(self, value: Callable[[], Tensor]) -> Tensor:
        """The value, whose gradient at the input is what the rule says."""

        def back(x: Tensor, c: Tensor) -> Tensor:
            dtype = wide(x)  # in half precision the stabilizer would vanish
            bias = None if self.bias is None else self.bias.to(dtype)
            return self.rule.back(self.layer, x.to(dtype), self.weight.to(dtype), bias, c.to(dtype)).to(x.dtype)

        output = _Ruled.apply(self.x, value, back)
        assert isinstance(output, Tensor)
        return output


class _Ruled(torch.autograd.Function):
    """A layer whose gradient is what its rule says."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Callable[[], Tensor], back: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Whatever the layer yields."""
        ctx.save_for_backward(x)
        ctx.back = back
        return value()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        """Whatever the rule yields."""
        return ctx.back(ctx.saved_tensors[0], grad_outputs[0]), None, None


class Propagation(Operations):
    """While a model runs in this context on `begin(images)`, the gradient of its output at the images is relevance."""

    def __init__(self, composite: Composite) -> None:
        super().__init__()
        self.composite = composite
        self.layers = 0
        self.first_layers = 0
        self._calls: list[str] = []
        self._reached: set[int] = set()
        self._weighted: Any = WeakTensorKeyDictionary()
        self._kinds: Any = WeakTensorKeyDictionary()
        """"pixels": only moved and scaled since the image, the gradient here is R, not R / pixel; "gate": a sigmoid."""

    @property
    def unruled(self) -> Counter[str]:
        """Operations without a rule that are not known to be linear, through which relevance has flowed, by name."""
        return Counter(self._calls[call] for call in self._reached)

    def begin(self, leaf: Tensor) -> Tensor:
        """The images to call the model with: no leaf, so that it may change them in place."""
        images = leaf.clone()
        self._kinds[images] = "pixels"
        return images

    def check(self, scores: Tensor) -> None:
        """Check that there is relevance.

        Raises:
            ValueError: no layer with weights made the scores, or they have no gradient.
        """
        if not self.layers or (self.composite.first is not None and not self.first_layers):
            where = "on the images themselves" if self.layers else "of torch.nn.functional between images and score"
            raise ValueError(
                f"expected a convolution or linear layer {where} for LRP, got none; use input_x_gradient for this model"
            )
        if not scores.requires_grad:
            raise ValueError("expected a score made of logits for LRP, got a constant or a softmax; explain the logit")

    def on(self, operation: Operation) -> Any:
        """The result of the operation, with a gradient that hands relevance back."""
        func, name, everything = operation.func, operation.name, (operation.args, operation.kwargs)
        inputs = _made_from_images(everything)
        if not inputs:
            if not tensors_in(everything):
                return operation()
            with torch.no_grad():
                return operation()
        if name.endswith("_as"):  # of the other tensor only the shape or type counts
            inputs = inputs[:1]
        kinds = {self._kinds.get(tensor, "") for tensor in inputs}
        kind = kinds.pop() if len(kinds) == 1 else ""
        args, options = tree_map(_constant_if_parameter, everything)
        is_move = name in _MOVES or operation.reads_attribute
        if (kind and is_move) or (kind == "gate" and name in _SHIFTS and len(inputs) == 1):
            return self._marked(func(*args, **options), kind)
        if kind == "pixels" and name in _SHIFTS and len(inputs) == 1:
            shifted = self._shift(Operation(func, args, options), inputs[0])
            if shifted is not None:
                return shifted
        if (name in ops.CONVOLUTIONS or name == "linear") and operation.input is inputs[0]:
            return self._layer(func, name, *args, **options)
        entered = Operation(func, *tree_map(self._entered, (args, options)))
        output = self._hidden(entered)
        if isinstance(output, Tensor) and entered.args and output is entered.args[0] and output is not args[0]:
            del self._kinds[args[0]]  # an operation on the pixels, in place
            return args[0].copy_(output)
        return output

    def _hidden(self, operation: Operation) -> Any:
        """An operation on what layers made of the pixels."""
        func, name, args, options = operation.func, operation.name, operation.args, operation.kwargs
        inputs = _made_from_images((args, options))
        if func is F.batch_norm:
            return self._batch_norm(_arguments(operation))
        if func is F.instance_norm:
            given = _arguments(operation)
            if not given.pop("use_input_stats"):
                return self._batch_norm({"training": False, **given})
        if len(inputs) == 1 and (affine := self._affine(operation, inputs[0])) is not None:
            return affine
        if len(inputs) == 1 and (name in _POINTWISE or (name in ops.DIVISIONS and operation.input is not inputs[0])):
            output = _pointwise(operation, inputs[0])
            return self._marked(output, "gate") if name in ops.GATES else output
        if name in _PRODUCTS and len(inputs) > 1:
            return self._product(operation, inputs)
        if name in ops.NORMS and func is getattr(F, name):
            return _normalized(operation)
        if func is F.glu:
            return _gated(*args, **options)
        if name in _CONSTANTS:
            args, options = _with_constants(_CONSTANTS[name], args, options)
        output = func(*args, **options)
        if name == "softmax":
            return output.detach()
        if name not in _LINEAR | _CONSTANTS.keys() | (_MULTILINEAR if len(inputs) == 1 else set()):
            call = len(self._calls)
            self._calls.append(name)
            for tensor in _made_from_images(output):
                tensor.register_hook(lambda gradient: self._reached.add(call))
        return output

    def _marked(self, output: Any, kind: str) -> Any:
        for tensor in _made_from_images(output):
            self._kinds[tensor] = kind
        return output

    def _entered(self, value: Any) -> Any:
        """Pixels for an operation that takes relevance / pixel."""
        if isinstance(value, Tensor) and self._kinds.get(value) == "pixels":
            return _with_gradient_of(value, value * value.detach().clone())
        return value

    def _shift(self, operation: Operation, pixels: Tensor) -> Tensor | None:
        """A change of every pixel by itself; None if there is more to it."""
        copy = pixels.detach().clone()
        value = _instead(operation, pixels, copy)
        if value.shape != pixels.shape:
            return None
        output = _with_gradient_of(value, pixels)
        return self._marked(pixels.copy_(output) if value is copy else output, "pixels")

    def _layer(
        self,
        func: Callable[..., Tensor],
        name: str,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *rest: Any,
        **options: Any,
    ) -> Tensor:
        def layer(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return func(x, weight, bias, *rest, **options)

        rule = self.composite.linear if name == "linear" else self.composite.convolution
        self.layers += 1
        if self._kinds.get(input) == "pixels":
            self.first_layers += 1
            rule = self.composite.first or rule
        x = input if rule.for_pixels else self._entered(input)
        weight, bias = weight.detach(), None if bias is None else bias.detach()
        axis = -1 if name == "linear" else 1
        weighted = _Weighted(layer, x, weight, bias, rule, axis, is_transposed="transpose" in name)
        return self._remembered(weighted, lambda: layer(x, weight, bias))

    def _remembered(self, weighted: _Weighted, value: Callable[[], Tensor]) -> Tensor:
        output = weighted.output(value)
        self._weighted[output] = replace(weighted, version=version_of(output), axis=weighted.axis % output.ndim)
        return output

    def _layer_of(self, output: Tensor) -> _Weighted | None:
        """The layer that a tensor came out of and was not changed since."""
        weighted: _Weighted | None = self._weighted.get(output)
        return weighted if weighted is not None and weighted.version == version_of(output) else None

    def _affine(self, operation: Operation, input: Tensor) -> Tensor | None:
        """A constant that shifts whole channels behind a layer, or scales them before a shift; None otherwise.

        The shift is folded into the layer with the scales before it, as batch normalization is, which it may be.
        """
        weighted, name, args = self._layer_of(input), operation.name, operation.args
        is_plain = name in _AFFINE and not operation.is_in_place and any(value is input for value in args)
        if weighted is None or not is_plain or "out" in operation.kwargs:
            return None
        if name in ops.DIVISIONS and (args[0] is not input or "rounding_mode" in operation.kwargs):
            return None
        zeros = input.new_zeros([side if axis == weighted.axis else 1 for axis, side in enumerate(input.shape)])
        zeros.requires_grad_()
        shift = _instead(operation, input, zeros)
        if shift.shape != zeros.shape or shift.dtype != zeros.dtype:
            return None
        (scale,) = torch.autograd.grad(shift.sum(), zeros)
        folded = weighted.folded(scale.flatten(), shift.detach().flatten())
        if name in ops.DIVISIONS | ops.MULTIPLICATIONS:
            output = _instead(operation, input, input)
            self._weighted[output] = replace(folded, version=version_of(output))
            return output
        return self._remembered(folded, lambda: _instead(operation, input, input.detach()))

    def _batch_norm(self, given: dict[str, Any]) -> Tensor:
        """Batch normalization, folded into the layer before it where there is one; `given` as `F.batch_norm` has it."""
        input: Tensor = given["input"]
        x, space = input.detach(), (0, *range(2, input.ndim))
        detached: dict[str, Any] = {**given, "input": x}
        estimates = given["training"] or given["running_mean"] is None
        mean = x.mean(space) if estimates else given["running_mean"]
        variance = x.var(space, correction=0) if estimates else given["running_var"]
        scale = (variance + given["eps"]).rsqrt() * (1 if given["weight"] is None else given["weight"])
        shift = (0 if given["bias"] is None else given["bias"]) - mean * scale

        weighted = self._layer_of(input)
        if weighted is not None and weighted.axis == 1:
            return self._remembered(weighted.folded(scale, shift), lambda: F.batch_norm(**detached))
        scale, shift = (v.reshape(-1, *[1] * (input.ndim - 2)) for v in (scale, shift))
        rule = Epsilon(bias=self.composite.convolution.bias)
        return _Weighted(_diagonal, input, scale, shift, rule, 1).output(lambda: F.batch_norm(**detached))

    def _product(self, operation: Operation, inputs: list[Tensor]) -> Any:
        gates = [tensor for tensor in inputs if self._kinds.get(tensor) == "gate"]
        if not gates and operation.name in ops.MULTIPLICATIONS and inputs[0].numel() != inputs[1].numel():
            gates = [min(inputs, key=Tensor.numel)]
        if 0 < len(gates) < len(inputs):

            def constant(value: Any) -> Any:
                return value.detach() if any(value is gate for gate in gates) else value

            args, options = tree_map(constant, (operation.args, operation.kwargs))
            return operation.func(*args, **options)
        output = operation()
        halved = _with_gradient_of(output, output / len(inputs))
        halved = output.copy_(halved) if output is operation.args[0] else halved
        return self._marked(halved, "gate") if gates else halved


def _made_from_images(values: Any) -> list[Tensor]:
    """Tensors with a graph: all that is made of parameters alone is computed without one."""
    return [tensor for tensor in tensors_in(values) if tensor.requires_grad and not tensor.is_leaf]


def _constant_if_parameter(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) and value.requires_grad and value.is_leaf else value


def _instead(operation: Operation, input: Tensor, other: Tensor) -> Tensor:
    """The operation on another tensor."""
    args, options = tree_map(lambda value: other if value is input else value, (operation.args, operation.kwargs))
    return operation.func(*args, **options)


def _with_gradient_of(value: Tensor, carrier: Tensor) -> Tensor:
    return value.detach() + (carrier - carrier.detach())


def _diagonal(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x * weight if bias is None else x * weight + bias


def _pointwise(operation: Operation, input: Tensor) -> Tensor:
    x, copy = input.detach(), input.detach().clone()
    value = _instead(operation, input, copy)
    output = _with_gradient_of(value, input * torch.where(x == 0, 0, value.detach() / x))
    return input.copy_(output) if value is copy else output


def _with_constants(names: tuple[str, ...], args: Any, options: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The arguments, of which those with a name are constants; the names stand in the order of the positions."""
    constant = [place for place, name in enumerate(names) if name]
    args = [_constant(value) if place in constant else value for place, value in enumerate(args)]
    return args, {name: _constant(value) if name and name in names else value for name, value in options.items()}


def _constant(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _gated(input: Tensor, dim: int = -1) -> Tensor:
    values, gates = input.chunk(2, dim)
    return values * gates.detach().sigmoid()


def _arguments(operation: Operation) -> dict[str, Any]:
    """All arguments of a function of torch.nn.functional by name."""
    bound = inspect.signature(operation.func).bind(*operation.args, **operation.kwargs)
    bound.apply_defaults()
    return bound.arguments


def _normalized(operation: Operation) -> Tensor:
    """Layer, group or instance normalization with a constant standard deviation."""
    given, is_layer_norm = _arguments(operation), operation.name == "layer_norm"
    input: Tensor = given["input"]
    if is_layer_norm:
        x = input.flatten(-len(given["normalized_shape"]))
    else:
        x = input.reshape(len(input), given.get("num_groups", input.shape[1]), -1)
    centered = x - x.mean(-1, keepdim=True)
    scale = (centered.detach().square().mean(-1, keepdim=True) + given["eps"]).rsqrt()
    scaled = (centered * scale).reshape(input.shape)
    weight: Tensor | None = given["weight"]
    if weight is not None:
        scaled = scaled * (weight if is_layer_norm else weight.reshape(-1, *[1] * (input.ndim - 2)))
    return _with_gradient_of(_instead(operation, input, input.detach()), scaled)
