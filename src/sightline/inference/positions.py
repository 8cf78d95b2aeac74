"""Tracks the positions of the images through the operations of a forward."""

import re
import weakref
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from sightline.inference import operations as ops
from sightline.inference.axes import (
    BATCH,
    OTHER,
    PAIR,
    Atom,
    Dim,
    Dims,
    Layout,
    axis_of,
    layout_in,
    merged,
    other,
    reshaped,
    sliced,
)
from sightline.inference.operations import Operation, tensors_in

_SPATIAL = re.compile(r"(?:conv|pool)\w*?([123])d")
_SPATIAL_MODULE = re.compile(r"(?:Conv|Pool|BatchNorm|InstanceNorm)\w*?([123])d")
_RESIZES = {"interpolate", "upsample", "upsample_nearest", "upsample_bilinear", "pixel_shuffle", "pixel_unshuffle"}
_SHUFFLES = set(
    "roll sort argsort topk gather take take_along_dim rot90 fold im2col col2im grid_sample as_strided scatter "
    "scatter_add index_put index_add index_copy index masked_select masked_scatter nonzero fft fft2 ifft2 rfft2 irfft2 "
    "rfft irfft fftn ifftn view_as_complex view_as_real einops kron cdist embedding conv_tbc".split()
)
_FRESH = re.compile(r"(?:new_|empty|zeros|ones|full|rand).*|.*_like")
_SPLIT_AXES = {"vsplit": 0, "hsplit": 1, "dsplit": 2}
_PRIMES = (2, 3, 5, 7, 11, 13, 17, 19)


@lru_cache(maxsize=1024)
def _sliding(name: str) -> int:
    """Number of axes that an operation slides over, 0 if none."""
    spatial = _SPATIAL.search(name)
    return int(spatial[1]) if spatial else 0


class Positions:
    """Where the positions lie in every tensor that depends on the images, or None if that is unknown.

    Convolutions and poolings have them in their last dimensions. Elementwise operations keep them, reshapes and
    permutations move them, and products and slices remove some of them.
    """

    def __init__(self, images: Tensor) -> None:
        self.axes = images.ndim - 2
        self.obstacle = ""
        """The error message if the model uses the images in a way that rules out a map; else empty."""
        self.is_assumed = False
        """Whether operations were hidden, so that the type of a module had to say what it does."""
        spatial = [Dim((Atom(i, n, 1, n),) if n > 1 else ()) for i, n in enumerate(images.shape[2:])]
        self.batch = Dim((Atom(BATCH, len(images)),) if len(images) > 1 else ())
        self._seen: dict[int, tuple[weakref.ref[Tensor], Dims | None]] = {}
        self.put(images, (self.batch, other(images.shape[1]), *spatial))

    def knows(self, tensor: Tensor) -> bool:
        """Whether a tensor depends on the images."""
        reference, _ = self._seen.get(id(tensor), (None, None))
        return reference is not None and reference() is tensor

    def of(self, tensor: Tensor) -> Dims | None:
        """Dimensions of a tensor; None if they are unknown."""
        reference, dims = self._seen.get(id(tensor), (None, None))
        return dims if reference is not None and reference() is tensor else None

    def layout(self, tensor: Tensor) -> Layout | None:
        """Layout of a tensor; None if it has no positions or they are unknown."""
        dims = self.of(tensor)
        return None if dims is None else layout_in(dims, self.axes)

    def put(self, tensor: Tensor, dims: Dims | None) -> None:
        """Record the dimensions of a tensor."""
        if dims is not None and tuple(dim.size for dim in dims) != tuple(tensor.shape):
            dims = None
        self._seen[id(tensor)] = weakref.ref(tensor), dims

    def follow(self, operation: Operation, output: Any) -> None:
        """Record the results of an operation."""
        if isinstance(output, Tensor):
            results = [output]
        elif output is None:  # an assignment
            results = [a for a in operation.args[:1] if isinstance(a, Tensor) and not self.knows(a)]
        else:
            results = tensors_in(output)
        tensors = operation.tensors
        if not results or not any(map(self.knows, tensors)):
            return
        tracked: list[Dims | None] = []
        if output is not None and operation.name not in _SHUFFLES:
            if _FRESH.fullmatch(operation.name):
                return
            tracked = self._results(operation, tensors, results)
        for i, result in enumerate(results):
            self.put(result, tracked[i] if i < len(tracked) else None)

    def follow_module(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        """Record the output of a module whose operations are hidden, as in TorchScript and quantized layers."""
        if self.knows(output):
            return
        given = [tensor for tensor in tensors_in(inputs) if self.knows(tensor)]
        if not given:
            return
        self.is_assumed = True
        dims, kind = self.of(given[0]), getattr(module, "original_name", type(module).__name__)
        spatial = _SPATIAL_MODULE.match(kind)
        if spatial:
            count, convolved = int(spatial[1]), kind.startswith("Conv")
            known = dims is not None
            dims = self._spatial(dims, output, count, convolved=convolved) if known else self._assumed(output, count)
        self.put(output, dims)

    def _results(self, operation: Operation, tensors: list[Tensor], results: list[Tensor]) -> list[Dims | None]:
        name, first = operation.name, operation.input
        dims = self.of(first) if isinstance(first, Tensor) else None
        shape = tuple(results[0].shape)
        sliding = _sliding(name)
        if name in ("cat", "concat", "concatenate"):
            return [self._joined(operation, shape)]
        if name in ("stack", "einsum"):
            return [self._stacked(operation) if name == "stack" else self._summed(operation.args)]
        if name in ops.MATRIX_PRODUCTS:
            return [self._product(tensors[-2:] if name in ("baddbmm", "addmm", "addbmm") else tensors[:2], shape, name)]
        if isinstance(first, Tensor) and dims is None and (sliding or name == "linear" or name in ops.RECURRENT):
            return [self._assumed(result, sliding) if sliding else None for result in results]
        if dims is None or not isinstance(first, Tensor):
            return [self._broadcast(tensors, result) for result in results]
        if sliding or name in _RESIZES:
            count = sliding or first.ndim - 2
            convolved = name.startswith("conv") or "shuffle" in name
            return [self._spatial(dims, result, count, convolved=convolved) for result in results]
        if name in ("linear", "multi_head_attention_forward") or name in ops.RECURRENT:
            return [(*dims[:-1], other(shape[-1])), *[tuple(map(other, r.shape)) for r in results[1:]]]
        if name == "scaled_dot_product_attention":
            return [(*dims[:-1], (self.of(operation.argument(2, "value")) or (other(shape[-1]),))[-1])]
        if name in ops.RESHAPES:
            return [reshaped(dims, shape)]
        if name == "unfold":
            return [_unfolded(dims, operation.args[1:], operation.kwargs)]
        if name in ops.PICKS:
            return _taken(operation, dims, results)
        if name == "flip":
            flipped = {d % len(dims) for d in tree_leaves(operation.kwargs.get("dims", operation.args[1:]))}
            return [tuple(_mirrored(dim) if i in flipped else dim for i, dim in enumerate(dims))]
        if name == "pad":
            return [_padded(dims, operation.argument(1, "pad"))]
        alone = len(tensors) == 1
        if alone and (name in ops.PERMUTATIONS or (name in ops.REDUCTIONS and results[0].shape != first.shape)):
            return [_probed(operation, dims)] * len(results)
        return [self._broadcast(tensors, result) for result in results]

    def _broadcast(self, tensors: list[Tensor], result: Tensor) -> Dims | None:
        """An elementwise operation: each dimension is that of the operand with positions there."""
        operands = [dims for tensor in tensors if (dims := self.of(tensor)) is not None]
        if len(operands) == 1 and tuple(dim.size for dim in operands[0]) == result.shape:
            return operands[0]
        if not operands or any(len(dims) > result.ndim for dims in operands):
            return None
        return _aligned(operands, result.shape)

    def _spatial(self, dims: Dims, result: Tensor, count: int, *, convolved: bool) -> Dims | None:
        """Channels, then the axes, as convolutions, poolings and resizes have them."""
        if len(dims) != count + 2 or result.ndim != count + 2:
            return None
        channel = dims[1]
        if convolved and any(atom.axis == 0 for atom in channel.atoms) and self.axes == 3:
            self.obstacle = (
                "expected a model that takes (b, c, d, h, w), got one whose second dimension is the frames; wrap it so "
                "that it transposes them itself"
            )
        moved = [dims[0], other(result.shape[1]) if convolved or channel.size != result.shape[1] else channel]
        everywhere = [atom for dim in dims for atom in dim.atoms]
        for dim, size in zip(dims[2:], result.shape[2:], strict=True):
            if dim.size == size:
                moved.append(dim)
                continue
            atom = dim.atoms[0] if len(dim.atoms) == 1 and not (dim.before or dim.after) else None
            alone = atom is not None and atom.axis >= 0 and sum(a.axis == atom.axis for a in everywhere) == 1
            moved.append(axis_of(atom, size) if atom is not None and alone else other(size))
        return tuple(moved)

    def _assumed(self, result: Tensor, count: int) -> Dims | None:
        """The axes in their usual places, for a convolution or pooling with an untracked input."""
        if count != self.axes or result.ndim != count + 2 or len(result) != self.batch.size:
            return None
        return (self.batch, other(result.shape[1]), *(axis_of(Atom(i, 1), n) for i, n in enumerate(result.shape[2:])))

    def _joined(self, operation: Operation, shape: Sequence[int]) -> Dims | None:
        axis = operation.argument(1, "dim", operation.kwargs.get("axis", 0)) % len(shape)
        parts = [part for part in operation.argument(0, "tensors") if part.shape[axis]]
        if all(self.of(part) is None for part in parts):
            return None
        pieces = [self._certain(part) for part in parts]
        along = [dims[axis] for dims in pieces]
        with_axis = [i for i, dim in enumerate(along) if dim.has_axis]
        if axis == 0 and len(set(pieces)) == 1 and not (along[0].before or along[0].after):
            joined = Dim(merged([Atom(PAIR, len(along)), *along[0].atoms]))
        elif len(with_axis) == 1:
            i = with_axis[0]
            before, after = (sum(dim.size for dim in side) for side in (along[:i], along[i + 1 :]))
            joined = Dim(along[i].atoms, before + along[i].before, along[i].after + after)
        else:
            joined = other(shape[axis])
        beside = _aligned(pieces, shape)
        return (*beside[:axis], joined, *beside[axis + 1 :])

    def _stacked(self, operation: Operation) -> Dims | None:
        parts = operation.argument(0, "tensors")
        pieces = [dims for part in parts if (dims := self.of(part)) is not None]
        if not pieces:
            return None
        axis = operation.argument(1, "dim", 0) % (len(pieces[0]) + 1)
        stacked = Dim((Atom(PAIR, len(parts)),)) if axis == 0 and len(parts) > 1 else other(len(parts))
        return (*pieces[0][:axis], stacked, *pieces[0][axis:])

    def _summed(self, args: tuple[Any, ...]) -> Dims | None:
        """An Einstein sum: the dimension of each letter is that of the first operand with positions there."""
        equation, *operands = args
        if len(operands) == 1 and isinstance(operands[0], list | tuple):
            operands = [*operands[0]]
        if not isinstance(equation, str) or "->" not in equation or "." in equation:
            return None
        left, right = equation.replace(" ", "").split("->")
        letters: dict[str, list[Dim]] = {letter: [] for letter in left}
        for names, operand in zip(left.split(","), operands, strict=True):
            for letter, dim in zip(names, self._certain(operand), strict=True):
                letters[letter].append(dim)
        return tuple(_chosen(letters[letter], max(dim.size for dim in letters[letter])) for letter in right)

    def _product(self, tensors: list[Tensor], shape: Sequence[int], name: str) -> Dims | None:
        if len(tensors) != 2 or any(tensor.ndim < 2 for tensor in tensors):
            return None
        one, two = reversed(tensors) if name == "rmatmul" else tensors
        rows, columns = self._certain(one), self._certain(two)
        return (*_aligned([rows[:-2], columns[:-2]], shape[:-2]), rows[-2], columns[-1])

    def _certain(self, tensor: Tensor) -> Dims:
        """Dimensions of a tensor, without positions if they are unknown."""
        return self.of(tensor) or tuple(map(other, tensor.shape))


def _aligned(operands: Sequence[Dims], shape: Sequence[int]) -> Dims:
    """The dimensions of a result whose operands are broadcast."""
    places = zip(range(-len(shape), 0), shape, strict=True)
    return tuple(_chosen([dims[i] for dims in operands if len(dims) >= -i], size) for i, size in places)


def _chosen(options: Iterable[Dim], size: int) -> Dim:
    """The one dimension of this size with positions, else one with images; neither if several with positions differ."""
    fitting = {dim: None for dim in options if dim.size == size}
    if sum(dim.has_axis for dim in fitting) > 1:
        return other(size)
    return max(fitting, key=lambda dim: max((atom.axis for atom in dim.atoms), default=OTHER), default=other(size))


def _taken(operation: Operation, dims: Dims, results: list[Tensor]) -> list[Dims | None]:
    name = operation.name
    if name == "getitem":
        return [_indexed(dims, operation.args[1])]
    place = 1 if name in ("select", "narrow", "index_select", "unbind") else 2
    axis = _SPLIT_AXES[name] if name in _SPLIT_AXES else operation.argument(place, "dim", 0)
    axis %= len(dims)
    if name in ("select", "unbind"):
        indices: list[Any] = [0] * len(results)
    elif name == "index_select":
        indices = [operation.argument(2, "index")]
    else:
        start = int(operation.argument(2, "start")) if name == "narrow" else 0
        ends = accumulate((result.shape[axis] for result in results), initial=start)
        indices = [slice(*pair) for pair in pairwise(ends)]
    return [_indexed(dims, (*[slice(None)] * axis, index)) for index in indices]


def _mirrored(dim: Dim) -> Dim:
    if dim.before or dim.after:
        return other(dim.size) if dim.has_axis else dim
    return Dim(tuple(atom._replace(mirrored=not atom.mirrored) if atom.axis >= 0 else atom for atom in dim.atoms))


def _padded(dims: Dims, pad: Sequence[int]) -> Dims:
    """Entries added at both ends: cells of an axis that is alone in its dimension, otherwise tokens."""
    padded = [*dims]
    for i in range(len(pad) // 2):
        low, high = pad[2 * i], pad[2 * i + 1]
        dim = padded[-1 - i]
        if low == high == 0:
            continue
        if len(dim.atoms) == 1 and dim.has_axis and dim == Dim(dim.atoms):
            padded[-1 - i] = axis_of(dim.atoms[0], dim.size + low + high)
        elif dim.has_axis and low >= 0 and high >= 0:
            padded[-1 - i] = Dim(dim.atoms, dim.before + low, dim.after + high)
        else:
            padded[-1 - i] = other(dim.size + low + high)
    return tuple(padded)


def _unfolded(dims: Dims, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Dims | None:
    """One axis (tensor method) or two (function) cut into adjacent pieces; None if they overlap."""
    if len(args) == 3:
        axis, size, step = args[0] % len(dims), *args[1:]
        parts = _cut(dims[axis], size, step)
        return None if parts is None else (*dims[:axis], parts[0], *dims[axis + 1 :], parts[1])
    given = [args[0], kwargs.get("dilation", 1), kwargs.get("padding", 0), kwargs.get("stride", 1)]
    kernel, dilation, padding, stride = (pair if isinstance(pair, tuple | list) else (pair, pair) for pair in given)
    if len(dims) != 4 or (*dilation, *padding) != (1, 1, 0, 0):
        return None
    rows, columns = (_cut(dim, size, step) for dim, size, step in zip(dims[2:], kernel, stride, strict=True))
    if rows is None or columns is None:
        return None
    flat = (dims[0], dims[1], rows[1], columns[1], rows[0], columns[0])
    inner = dims[1].size * rows[1].size * columns[1].size
    return reshaped(flat, (dims[0].size, inner, rows[0].size * columns[0].size))


def _cut(dim: Dim, size: int, step: int) -> Dims | None:
    return reshaped((dim,), (dim.size // size, size)) if size == step and dim.size % size == 0 else None


def _indexed(dims: Dims, index: Any) -> Dims | None:
    items = [*index] if isinstance(index, tuple) else [index]
    if sum(isinstance(item, Tensor | list) for item in items) > 1:
        return None
    at = next((i for i, item in enumerate(items) if item is Ellipsis), len(items))
    taken = sum(item is not None and item is not Ellipsis for item in items)
    items[at : at + 1] = [slice(None)] * (len(dims) - taken)
    remaining: list[Dim] = []
    rest = [*dims]
    for item in items:
        if item is None:
            remaining.append(Dim(()))
            continue
        dim = rest.pop(0)
        if isinstance(item, slice):
            remaining.append(sliced(dim, *item.indices(dim.size)))
        elif isinstance(item, Tensor | list):
            if isinstance(item, Tensor) and (item.ndim != 1 or item.dtype == torch.bool):
                return None
            remaining.append(other(len(item)))
        elif isinstance(item, bool):
            return None
    return tuple(remaining)


def _probed(operation: Operation, dims: Dims) -> Dims | None:
    """Dimensions found by running the operation on an empty tensor whose sides tell one dimension from another."""
    probe = torch.empty(_PRIMES[: len(dims)], device="meta")
    args = tree_map(lambda value: probe if isinstance(value, Tensor) else value, operation.args)
    try:
        sides = tree_leaves(operation.func(*args, **operation.kwargs))[0].shape
    except (RuntimeError, IndexError, TypeError, NotImplementedError):
        return None
    return tuple(Dim(()) if side == 1 else dims[_PRIMES.index(side)] for side in sides)
