"""Attention between the tokens of a vision transformer, of any implementation, as maps of the image."""

import inspect
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from math import prod
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.nn import functional as F

from sightline.inference.operations import Operation, Operations, tensors_in

Grid = tuple[int, ...]

# To a mode the function behind nn.MultiheadAttention is one call. Without its first question, which hands the call to
# the mode, a mode sees what it does. Breaks if PyTorch moves that question elsewhere: see tests/test_torch_features.py.
_multi_head_attention = FunctionType(
    F.multi_head_attention_forward.__code__,
    {**vars(F), "has_torch_function": lambda tensors: False},  # pyright: ignore[reportUnknownLambdaType]
    argdefs=F.multi_head_attention_forward.__defaults__,
)
MANY_REGISTERS = 16  # of tokens before the patches there may be as many, or as many as patches
# The frame in which every module runs; breaks if PyTorch calls `forward` elsewhere or renames its locals.
_CALL = nn.Module._call_impl.__code__  # pyright: ignore[reportPrivateUsage]


@contextmanager
def patch_maps(model: nn.Module, keep: Callable[[str, Tensor], None]) -> Generator[None]:
    """When this context ends, `keep` gets the name of each attention block and its maps.

    A block is a module that attends between all its tokens, once (see `AttentionWeights`). Blocks with a child `gate`
    are skipped, since that yields their map. A map (b, heads, h, w) is that of the first token's query if the head
    reads that token, else the mean over the patches' queries. The attention that other tokens receive is left out, so
    a map may sum to less than 1.
    """

    def both(weights: Tensor, grid: Grid) -> Tensor:  # the reader is known only at the end, and n x n is too much
        patches = prod(grid)
        received = torch.stack([weights[:, :, -patches:].mean(2), weights[:, :, 0]])
        return received[..., -patches:].unflatten(3, grid)

    with AttentionWeights(model, both) as seen:
        yield
    modules = dict(model.named_modules())
    times = Counter(name for name, _ in seen.weights)
    for name, maps in seen.weights:
        gate = getattr(modules[name], "gate", None)
        if times[name] == 1 and (not isinstance(gate, nn.Module) or isinstance(gate, nn.Linear)):
            keep(name, maps[int(seen.from_first)])


class _Attention(NamedTuple):
    """The arguments of `scaled_dot_product_attention`."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    def output(self, keep: Callable[[Tensor], Tensor] = lambda weights: weights) -> Tensor:
        """The attention written out; `keep` sees the weights, and returns those to use."""
        key, value, mask = self.key, self.value, self.attn_mask
        if self.enable_gqa:
            key, value = (part.repeat_interleave(self.query.shape[-3] // part.shape[-3], -3) for part in (key, value))
        scores = self.query * (self.query.shape[-1] ** -0.5 if self.scale is None else self.scale) @ key.mT
        if self.is_causal:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if mask is not None and mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, -torch.inf)
        elif mask is not None:
            scores = scores + mask
        return F.dropout(keep(scores.softmax(-1)), self.dropout_p) @ value


class SmoothAttention(Operations):
    """Computes attention by operations that have a second derivative, which PyTorch's fused kernels lack.

    >>> query = torch.ones(1, 1, 2, 4, requires_grad=True)
    >>> with SmoothAttention():
    ...     F.scaled_dot_product_attention(query, query, query).grad_fn.name()
    'UnsafeViewBackward0'
    """

    def on(self, operation: Operation) -> Any:
        """Attention written out; everything else as it is."""
        if operation.func is F.multi_head_attention_forward:
            with self:
                return _multi_head_attention(*operation.args, **operation.kwargs)
        if operation.func is F.scaled_dot_product_attention:
            return self.attend(operation)
        return operation()

    def attend(self, operation: Operation) -> Tensor:
        """The result of `scaled_dot_product_attention`."""
        return _Attention(*operation.args, **operation.kwargs).output()


class AttentionWeights(SmoothAttention):
    """Collects every attention between all tokens of the images while a model runs in this context.

    It sees `scaled_dot_product_attention`, whose weights are computed here so that they exist and carry gradients, the
    softmax of scores (b, heads, n, n) or (b * heads, n, n), and both inside `nn.MultiheadAttention`, whose fused
    kernels PyTorch does not use while a mode watches. The model is not changed, and its results are the same to float
    tolerance. The patches are the last tokens: a feature map that was flattened before the first attention. Attention
    whose queries differ from its keys (windows, subsampled keys, channels, a pooling token) is skipped.

    Args:
        model: provides the names.
        keep: what to keep of the weights (b, heads, n, n), given the grid of patches too. None: the weights.
    """

    weights: list[tuple[str, Tensor]]
    """In call order: dotted name of the innermost running module, and what was kept."""
    grid: Grid
    """Rows and columns of patches."""
    prefix: int
    """Tokens before the patches: class token, distillation token, registers."""
    from_first: bool
    """Whether the first token was selected after the last attention, as a head that reads a class token does."""
    obstacle: str
    """What else mixes the tokens, if anything: a skipped attention, two in one module, or a convolution."""

    def __init__(self, model: nn.Module, keep: Callable[[Tensor, Grid], Tensor] | None = None) -> None:
        super().__init__()
        self.weights, self.grid, self.prefix, self.from_first, self.obstacle = [], (), 0, False, ""
        self._names = {module: name for name, module in model.named_modules()}
        self._reduce = keep
        self._flattened: list[tuple[int, Grid]] = []
        self._begun = False

    def on(self, operation: Operation) -> Any:
        """The result of the operation, which is remembered if it is attention or tells what its tokens are."""
        output, name, first = super().on(operation), operation.name, operation.input
        if not isinstance(output, Tensor) or not isinstance(first, Tensor):
            return output
        if name == "softmax":
            last = operation.argument(1, "dim") in (-1, output.ndim - 1)
            if last and (output.ndim > 3 or (output.ndim == 3 and output.shape[1] == output.shape[2])):
                place = self._place(output.shape)
                return output if place is None else self._keep(*place, output)
        elif name in ("flatten", "reshape", "view") and not self._begun and output.ndim == 3 and first.ndim > 3:
            self._flattened += [(first.shape[0], grid) for grid in _grids(first.shape, output.shape)]
        elif name in ("getitem", "select", "narrow", "index_select") and self.weights and first.ndim == 3:
            self.from_first |= self._picks_first(first, operation)
        elif name.startswith("conv") and self.weights:
            self.obstacle = self.obstacle or f"a convolution behind the attention of {self.weights[-1][0]!r}"
        return output

    def attend(self, operation: Operation) -> Tensor:
        """The attention, whose weights are kept if they are between all tokens."""
        attention = _Attention(*operation.args, **operation.kwargs)
        place = self._place(torch.Size((*attention.query.shape[:-1], attention.key.shape[-2])))
        return operation() if place is None else attention.output(partial(self._keep, *place))

    def _place(self, shape: torch.Size) -> tuple[str, int] | None:
        """Name of the running module and number of images, if weights of this shape link all tokens of each image."""
        name, batch = self._running()
        if name.rpartition(".")[2] == "gate":
            return None
        self._begun = True
        rows, queries, keys = shape[0], *shape[-2:]
        if not self.weights:
            fitting = [
                grid
                for images, grid in self._flattened
                if images == batch and 0 <= keys - prod(grid) <= max(prod(grid), MANY_REGISTERS)
            ]
            self.grid = fitting[-1] if fitting else ()
            self.prefix = keys - prod(self.grid)
        is_whole = rows == batch or (len(shape) == 3 and batch and rows % batch == 0)
        if self.grid and is_whole and queries == keys == self.prefix + prod(self.grid):
            return name, batch
        self.obstacle = self.obstacle or f"{queries} queries and {keys} keys in {name or 'itself'!r}"
        return None

    def _keep(self, name: str, batch: int, weights: Tensor) -> Tensor:
        """The weights again, computed from the tensor that is kept, so that gradients flow through it."""
        seen = weights.reshape(batch, -1, *weights.shape[-2:])
        if self._reduce is None and torch.is_grad_enabled() and not seen.requires_grad:
            seen = seen.detach().requires_grad_()
        if name in dict(self.weights):
            self.obstacle = self.obstacle or f"two attentions in {name!r}"
        self.weights.append((name, seen if self._reduce is None else self._reduce(seen, self.grid)))
        self.from_first = False
        return seen.reshape(weights.shape)

    def _running(self) -> tuple[str, int]:
        """Name of the innermost running module, and the number of images that the outermost one was called with."""
        names: list[str] = []
        batch = 0
        frame = inspect.currentframe()
        while frame is not None:
            if frame.f_code is _CALL and frame.f_locals["self"] in self._names:
                if not isinstance(frame.f_locals["self"], nn.Softmax):
                    names.append(self._names[frame.f_locals["self"]])
                given = tensors_in((frame.f_locals["args"], frame.f_locals["kwargs"]))
                batch = next((tensor.shape[0] for tensor in given if tensor.ndim), 0)
            frame = frame.f_back
        return names[0] if names else "", batch

    def _picks_first(self, tokens: Tensor, pick: Operation) -> bool:
        if not self.prefix:
            return False
        count = self.prefix + prod(self.grid)
        with unset_fake_temporarily(), disable_proxy_modes_tracing():  # a tracer has no values
            places = torch.arange(count, device=tokens.device)
            sides = [side if type(side) is int else 1 for side in tokens.shape]
            return any(
                sides[axis] == count
                and not bool(pick.func(places.view(shape).expand(sides), *pick.args[1:], **pick.kwargs).any())
                for axis, shape in enumerate([(-1, 1, 1), (1, -1, 1)])  # (n, b, c) or (b, n, c)
            )


def _grids(before: torch.Size, after: torch.Size) -> list[Grid]:
    """Grids that a reshape of (b, k, *grid) to (b, k, n), or of (b, *grid, ...) to (b, n, k), may have flattened."""
    if len(before) > 3 and after == (*before[:2], prod(before[2:])):
        return [tuple(before[2:])]
    return [tuple(before[1:i]) for i in range(3, len(before)) if after[:2] == (before[0], prod(before[1:i]))]
