"""The rectifiers of a model, whatever function it calls, with a backward that can be changed."""

from collections import Counter
from collections.abc import Callable
from math import inf
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sightline.facts import Verdict
from sightline.inference import operations as ops
from sightline.inference.operations import Operation, Operations

Rule = Literal["plain", "guided", "deconvolution"]

# What each rectifier of PyTorch clamps, with its own arguments: input, lower bound, upper bound, whether in place.
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


class Rectifiers(Operations):
    """While a model runs in this context, its rectifiers get a backward that obeys `rule`.

    Rectifiers are `nn.ReLU`, `F.relu`, `torch.relu`, `Tensor.relu_`, ReLU6, hardtanh, threshold and clamp from 0, in
    place or not, and `torch.maximum` with zeros; the forward is the model's own.
    `rule` may be changed between two backward passes through the same graph:

    - "plain": the ordinary gradient;
    - "guided": of the ordinary gradient at the rectifier's input, the positive part (Springenberg et al. 2014);
    - "deconvolution": of the gradient at its output, the positive part (Zeiler and Fergus 2014).

    Differs: a clamp has gradient 0 at its bounds, as ReLU has; PyTorch before 2.15 has 1 there, and 1/2 for a maximum.

    Rectifiers that no function names, such as `x * (x > 0)` and `torch.where`, and those inside TorchScript or a
    `torch.autograd.Function` of the model are not seen. They keep their ordinary gradient.

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
        """Calls of other activations, by name: they keep their ordinary gradient under every rule."""

    def verdict(self) -> Verdict:
        """How many of the model's activations obey the rule."""
        if not self.smooth:
            return Verdict("rectifiers intercepted", "note", self.intercepted, str(self.intercepted))
        total = self.intercepted + self.smooth.total()
        details = f"{self.intercepted} of {total} activations, {self._others()} are not"
        return Verdict("rectifiers intercepted", "doubt", self.intercepted, details)

    def check(self) -> None:
        """Refuse a model without rectifiers: its guided gradient would be the plain one.

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

    def on(self, operation: Operation) -> Any:
        """A rectifier with a backward that obeys the rule; everything else as it is."""
        name = operation.name
        if name in _CLAMPED:
            x, low, high, inplace = _CLAMPED[name](*operation.args, **operation.kwargs)
            if _is_activation(x) and _is_zero(low, x.shape) and not isinstance(high, Tensor):
                self.intercepted += 1
                in_place = inplace or operation.is_in_place
                return _Rectify.apply(x, operation, self, float(high), in_place, name == "relu")
        if name in ops.SMOOTH_ACTIVATIONS and _is_activation(operation.input):
            self.smooth[name] += 1
        return operation()


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
        operation: Operation,
        rectifiers: Rectifiers,
        high: float,
        inplace: bool,
        keeps_output: bool,
    ) -> Tensor:
        ctx.rectifiers, ctx.high = rectifiers, high
        # As PyTorch does: behind ReLU alone the model may not change the output in place.
        before = x.clone() if inplace and not keeps_output else x
        output = operation()
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
            if ctx.high < inf:  # operators of PyTorch's own backward: see tests/test_torch_features.py
                grad = torch.ops.aten.hardtanh_backward(grad, values, 0, ctx.high)
            else:
                grad = torch.ops.aten.threshold_backward(grad, values, 0)
        if rule != "plain":
            grad = torch.ops.aten.threshold_backward(grad, grad, 0)
        return grad, None, None, None, None, None
