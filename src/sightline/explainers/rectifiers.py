"""The rectifiers of a model, by whatever name it calls them, with a backward that can be changed."""

from collections import Counter
from collections.abc import Callable
from math import inf
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sightline.facts import Verdict

Rule = Literal["plain", "guided", "deconvolution"]

# What each function of PyTorch clamps, with its own arguments: input, lower end, upper end, whether in place.
_CLAMPED: dict[str, Callable[..., tuple[Any, Any, Any, bool]]] = {
    "relu": lambda input, inplace=False: (input, 0, inf, inplace),
    "relu6": lambda input, inplace=False: (input, 0, 6, inplace),
    "hardtanh": lambda input, min_val=-1.0, max_val=1.0, inplace=False: (input, min_val, max_val, inplace),
    "threshold": lambda input, threshold, value, inplace=False: (input, threshold or value, inf, inplace),
    "clamp": lambda input, min=None, max=None, out=None: (input, min, inf if max is None else max, False),
    "clamp_min": lambda input, min, out=None: (input, min, inf, False),
}
_CLAMPED["clip"] = _CLAMPED["clamp"]
_CLAMPED["maximum"] = lambda input, other, out=None: (
    (other, input, inf, False) if _is_zero(input) else (input, other, inf, False)
)
_SMOOTH = {
    *("celu", "elu", "gelu", "hardshrink", "hardswish", "hardtanh", "leaky_relu", "log_sigmoid", "mish", "prelu"),
    *("rrelu", "selu", "silu", "softplus", "softshrink", "softsign", "tanh", "tanhshrink"),
}
"""Activations that are no rectifiers. Sigmoid and softmax are gates and weights far more often than activations."""


class Rectifiers(TorchFunctionMode):
    """While a model runs under it, its rectifiers that a gradient can flow through are made to obey `rule`.

    Rectifiers are `nn.ReLU`, `F.relu`, `torch.relu`, `Tensor.relu_`, ReLU6, hardtanh, threshold and clamp from 0, in
    place or not, and `torch.maximum` with zeros; the forward is the model's own.
    `rule` may be changed between two backward passes through the same graph:

    - "plain": the ordinary gradient;
    - "guided": of the ordinary gradient at the rectifier's input, the positive part (Springenberg et al. 2014);
    - "deconvolution": of the gradient at its output, the positive part (Zeiler and Fergus 2014).

    Differs: a clamp has gradient 0 at its ends, as ReLU has, which PyTorch before 2.15 gave 1, and a maximum 1/2.

    Not seen are rectifiers that no function names, such as `x * (x > 0)` and `torch.where`, and what TorchScript, or a
    `torch.autograd.Function` of the model's own, computes inside. They keep their ordinary gradient.

    >>> x = torch.tensor([-1.0, 2.0, 3.0], requires_grad=True)
    >>> with Rectifiers() as rectifiers:
    ...     y = x.relu() @ torch.tensor([5.0, 5.0, -5.0])
    >>> for rectifiers.rule in ("plain", "guided", "deconvolution"):
    ...     torch.autograd.grad(y, x, retain_graph=True)[0].tolist()
    [0.0, 5.0, -5.0]
    [0.0, 5.0, 0.0]
    [5.0, 5.0, 0.0]
    >>> rectifiers.verdict()
    'rectifiers intercepted: 1'
    """

    def __init__(self) -> None:
        super().__init__()
        self.rule: Rule = "plain"
        self.intercepted = 0
        """Calls of rectifiers."""
        self.smooth: Counter[str] = Counter()
        """Calls of other activations, by name: their gradient is the ordinary one under every rule."""

    def verdict(self) -> Verdict:
        """How many of the model's activations obey the rule."""
        if not self.smooth:
            return Verdict("rectifiers intercepted", "note", self.intercepted, str(self.intercepted))
        total = self.intercepted + self.smooth.total()
        details = f"{self.intercepted} of {total} activations, {self._others()} are not"
        return Verdict("rectifiers intercepted", "doubt", self.intercepted, details)

    def check(self) -> None:
        """Refuse a model in which there is nothing to change: its guided gradient would be the plain one.

        Raises:
            ValueError: no rectifier was intercepted.
        """
        if not self.intercepted:
            got = f"{self._others()} and none" if self.smooth else "none"
            raise ValueError(
                f"expected rectifiers (ReLU) for guided backpropagation or deconvolution, got a model with {got}; "
                "both would be its plain gradient: use input_x_gradient, smooth_grad or integrated_gradients"
            )

    def _others(self) -> str:
        return ", ".join(f"{count} {name}" for name, count in self.smooth.most_common())

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        written = getattr(func, "__name__", "")
        name = written.strip("_")
        if name in _CLAMPED:
            x, low, high, inplace = _CLAMPED[name](*args, **kwargs)
            if _is_activation(x) and _is_zero(low, x.shape) and not isinstance(high, Tensor):
                self.intercepted += 1
                inplace = inplace or written.endswith("_")
                call = (func, args, kwargs)
                return _Rectify.apply(x, call, self, float(high), inplace, name == "relu")
        if name in _SMOOTH and _is_activation(args[0] if args else kwargs.get("input")):
            self.smooth[name] += 1
        return func(*args, **kwargs)


def _is_zero(value: Any, shape: tuple[int, ...] | None = None) -> bool:
    """Whether it is 0, or a constant tensor of zeros that broadcasts to the shape."""
    if not isinstance(value, Tensor):
        return value == 0
    fits = shape is None or torch.broadcast_shapes(value.shape, shape) == shape
    return fits and not value.requires_grad and not value.any()


def _is_activation(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad and not isinstance(value, nn.Parameter)


class _Rectify(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        call: tuple[Callable[..., Tensor], tuple[Any, ...], dict[str, Any]],
        rectifiers: Rectifiers,
        high: float,
        inplace: bool,
        keeps_output: bool,
    ) -> Tensor:
        func, args, kwargs = call
        ctx.rectifiers, ctx.high = rectifiers, high
        # As PyTorch does: behind ReLU alone the model may not change the output in place.
        before = x.clone() if inplace and not keeps_output else x
        output = func(*args, **kwargs)
        if inplace:
            ctx.mark_dirty(output)
        ctx.save_for_backward(output if keeps_output else before)
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (grad,) = grad_outputs
        rule: Rule = ctx.rectifiers.rule
        if rule != "deconvolution":
            (values,) = ctx.saved_tensors
            if ctx.high < inf:
                grad = torch.ops.aten.hardtanh_backward(grad, values, 0, ctx.high)
            else:
                grad = torch.ops.aten.threshold_backward(grad, values, 0)
        if rule != "plain":
            grad = torch.ops.aten.threshold_backward(grad, grad, 0)
        return grad, None, None, None, None, None
