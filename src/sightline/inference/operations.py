"""The operations of PyTorch by name, and the mode through which all that follow or replace them see them."""

from collections.abc import Callable, Mapping
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

unseen = torch._C.DisableTorchFunction  # pyright: ignore[reportPrivateUsage]
"""A context in which no mode sees operations: for looking at tensors, whose attributes are operations, too."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


RESHAPES = _words("view reshape flatten unflatten squeeze unsqueeze view_as reshape_as ravel unsafe_view")
PERMUTATIONS = _words("permute transpose t T mT H mH movedim moveaxis swapaxes swapdims adjoint")
PICKS = _words(
    "getitem select narrow index_select chunk split unbind tensor_split split_with_sizes unsafe_split unsafe_chunk "
    "hsplit vsplit dsplit"
)
COPIES = _words("contiguous clone to type type_as float double half bfloat16 cpu cuda alias data")
EXPANSIONS = _words("expand expand_as repeat tile repeat_interleave broadcast_to broadcast_tensors")
JOINS = _words("stack cat concat concatenate hstack vstack dstack column_stack")
DROPOUTS = _words("dropout alpha_dropout feature_dropout dropout1d dropout2d dropout3d")
MOVES = RESHAPES | PERMUTATIONS | PICKS | COPIES | EXPANSIONS | JOINS | DROPOUTS | {"flip", "fliplr", "flipud"}
"""Operations that move values and change none; in eval mode dropout moves nothing either."""

EXTREMES = _words("amax amin max min")
REDUCTIONS = EXTREMES | _words(
    "mean sum norm vector_norm linalg_vector_norm std var logsumexp prod median any all argmax argmin nanmean nansum "
    "std_mean var_mean"
)
BOUNDS = _words("clamp clip clamp_min clamp_max nan_to_num")
MULTIPLICATIONS = _words("mul rmul imul multiply")
DIVISIONS = _words("div truediv itruediv divide true_divide")
ADDITIONS = _words("add radd iadd")
SUBTRACTIONS = _words("sub rsub isub subtract")
MATRIX_PRODUCTS = _words("matmul bmm mm rmatmul baddbmm addmm addbmm")
CONVOLUTIONS = frozenset(f"conv{kind}{axes}d" for kind in ("", "_transpose") for axes in (1, 2, 3))
WEIGHT_LAYERS = _words("linear conv1d conv2d conv3d")
RECURRENT = _words("lstm gru rnn_tanh rnn_relu")
NORMS = _words("layer_norm group_norm instance_norm")
SMOOTH_ACTIVATIONS = _words(
    "celu elu gelu hardshrink hardswish hardtanh leaky_relu log_sigmoid logsigmoid mish prelu rrelu selu silu softplus "
    "softshrink softsign tanh tanhshrink"
)
"""Activations that are no rectifiers. Sigmoid and softmax are far more often gates and weights."""
GATES = _words("sigmoid hardsigmoid erf")
"""The last is that of a GELU written out."""


class Operation:
    """One call of a function of PyTorch, as a mode sees it.

    Its `name` is the same for a function, a method and an operator, in place or not; an attribute has its own name.

    >>> import torch
    >>> [Operation(f, (), {}).name for f in (torch.relu_, Tensor.__getitem__, Tensor.T.__get__)]
    ['relu', 'getitem', 'T']
    """

    def __init__(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.func = func
        self.args = args
        self.kwargs = kwargs
        self.name = _name(func)

    def __call__(self) -> Any:
        """The result."""
        return self.func(*self.args, **self.kwargs)

    @property
    def is_in_place(self) -> bool:
        """Whether a method with a trailing underscore writes into its first argument."""
        written: str = getattr(self.func, "__name__", "")
        return written.endswith("_") and not written.startswith("_")

    @property
    def reads_attribute(self) -> bool:
        """Whether it reads an attribute of a tensor."""
        return getattr(self.func, "__name__", "") == "__get__"

    @property
    def input(self) -> Any:
        """The first argument."""
        return self.args[0] if self.args else self.kwargs.get("input")

    def argument(self, place: int, name: str, default: Any = None) -> Any:
        """An argument by position or by name."""
        return self.args[place] if len(self.args) > place else self.kwargs.get(name, default)

    @cached_property
    def tensors(self) -> list[Tensor]:
        """The tensors among the arguments, also in lists."""
        found: list[Tensor] = []
        for value in (*self.args, *self.kwargs.values()):
            if isinstance(value, Tensor):
                found.append(value)
            elif isinstance(value, list | tuple) and not all(type(each) is int for each in value):
                found += tensors_in(value)
        return found


class Operations(TorchFunctionMode):
    """Every operation that runs in this context goes through `on`, which returns its result.

    It is called for functions, methods, operators and attributes of tensors; not for what TorchScript, a compiled
    kernel or a `torch.autograd.Function` does inside.
    """

    def on(self, operation: Operation) -> Any:
        """The result of the operation, or something in its place."""
        raise NotImplementedError

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self.on(Operation(func, args, kwargs or {}))


def tensors_in(values: Any) -> list[Tensor]:
    """All tensors in nested containers."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


@lru_cache(maxsize=1024)
def _name(func: Callable[..., Any]) -> str:
    name: str = getattr(func, "__name__", "")
    if name == "__get__":
        name = getattr(getattr(func, "__self__", None), "__name__", "")
    return name.strip("_").removeprefix("special_")


def first_tensor(output: Any) -> Tensor | None:
    """The tensor that an operation or a module returns, or the first of several."""
    first = output[0] if isinstance(output, tuple | list) and output else output
    return first if isinstance(first, Tensor) and not is_lazy(first) else None
