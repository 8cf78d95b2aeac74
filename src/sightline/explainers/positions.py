"""Tracks the positions of the images through the tensors of a forward, from operation to operation."""

import re
import weakref
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from sightline.explainers.layout import (
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

_SPATIAL = re.compile(r"(?:conv|pool)\w*?([123])d")
_SPATIAL_MODULE = re.compile(r"(?:Conv|Pool|BatchNorm|InstanceNorm)\w*?([123])d")
_RESIZED = {"interpolate", "upsample", "upsample_nearest", "upsample_bilinear", "pixel_shuffle", "pixel_unshuffle"}
_RESHAPED = set("view reshape flatten unflatten squeeze unsqueeze view_as reshape_as ravel _unsafe_view".split())
_PERMUTED = set("permute transpose t T mT H mH movedim moveaxis swapaxes swapdims adjoint".split())
_REDUCED = set(
    "mean sum amax amin max min norm vector_norm linalg_vector_norm std var logsumexp prod median any all argmax "
    "argmin nanmean nansum std_mean var_mean".split()
)
_PRODUCTS = set("matmul bmm mm __matmul__ __rmatmul__ baddbmm addmm addbmm".split())
_RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu"}
_SHUFFLED = set(
    "roll sort argsort topk gather take take_along_dim rot90 unfold fold im2col col2im grid_sample as_strided scatter "
    "scatter_add index_put index_add index_copy index masked_select masked_scatter nonzero fft fft2 ifft2 rfft2 irfft2 "
    "rfft irfft fftn ifftn view_as_complex view_as_real einops kron cdist embedding conv_tbc".split()
)
_FRESH = re.compile(r"(?:new_|empty|zeros|ones|full|rand).*|.*_like")
_PRIMES = (2, 3, 5, 7, 11, 13, 17, 19)


def tensors_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors among the arguments of an operation, also in lists."""
    tensors: list[Tensor] = []
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            tensors.append(value)
        elif isinstance(value, list | tuple) and not all(type(each) is int for each in value):
            tensors += [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    return tensors


@lru_cache(maxsize=1024)
def _name(func: Callable[..., Any]) -> tuple[str, int]:
    """Name of an operation, without the in-place mark, and the number of axes it slides over (0 if none)."""
    name: str = getattr(func, "__name__", "")
    if name == "__get__":
        name = getattr(getattr(func, "__self__", None), "__name__", "")
    name = name if name.endswith("__") else name.rstrip("_")
    spatial = _SPATIAL.search(name)
    return name, int(spatial[1]) if spatial else 0


class Positions:
    """Where the positions are in every tensor made from the images, or None where that is not known.

    A convolution or a pooling has them in its last dimensions. Elementwise operations pass them on, reshapes and
    permutations move them, and products and slices remove some of them.
    """

    def __init__(self, images: Tensor) -> None:
        self.axes = images.ndim - 2
        self.obstacle = ""
        """The error to raise if the model does something with the images that rules out a map; empty if not."""
        spatial = [Dim((Atom(i, n, 1, n),) if n > 1 else ()) for i, n in enumerate(images.shape[2:])]
        self.batch = Dim((Atom(BATCH, len(images)),) if len(images) > 1 else ())
        self._seen: dict[int, tuple[weakref.ref[Tensor], Dims | None]] = {}
        self.put(images, (self.batch, other(images.shape[1]), *spatial))

    def knows(self, tensor: Tensor) -> bool:
        """Whether a tensor is made from the images."""
        reference, _ = self._seen.get(id(tensor), (None, None))
        return reference is not None and reference() is tensor

    def of(self, tensor: Tensor) -> Dims | None:
        """Dimensions of a tensor; None where they are not known."""
        reference, dims = self._seen.get(id(tensor), (None, None))
        return dims if reference is not None and reference() is tensor else None

    def layout(self, tensor: Tensor) -> Layout | None:
        """Layout of a tensor; None where it has no positions or they are not known."""
        dims = self.of(tensor)
        return None if dims is None else layout_in(dims, self.axes)

    def put(self, tensor: Tensor, dims: Dims | None) -> None:
        """Record the dimensions of a tensor."""
        if dims is not None and tuple(dim.size for dim in dims) != tuple(tensor.shape):
            dims = None
        self._seen[id(tensor)] = weakref.ref(tensor), dims

    def follow(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Record the results of an operation."""
        if isinstance(output, Tensor):
            results = [output]
        elif output is None:  # an assignment
            results = [a for a in args[:1] if isinstance(a, Tensor) and not self.knows(a)]
        else:
            results = [value for value in tree_leaves(output) if isinstance(value, Tensor)]
        if not results:
            return
        tensors = tensors_in(args, kwargs)
        if not any(map(self.knows, tensors)):
            return
        name, spatial = _name(func)
        if output is None or name in _SHUFFLED:
            dims = self.of(args[0]) if name == "unfold" and args else None
            known = [] if dims is None else [_unfolded(dims, args[1:], kwargs)]
        elif _FRESH.fullmatch(name):
            return
        else:
            known = self._results(func, name, spatial, args, kwargs, tensors, results)
        for i, result in enumerate(results):
            self.put(result, known[i] if i < len(known) else None)

    def follow_module(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        """The same for a module whose operations are hidden, as in TorchScript and quantized layers."""
        if self.knows(output):
            return
        given = [value for value in tree_leaves(inputs) if isinstance(value, Tensor) and self.knows(value)]
        if not given:
            return
        dims, kind = self.of(given[0]), getattr(module, "original_name", type(module).__name__)
        spatial = _SPATIAL_MODULE.match(kind)
        if spatial:
            count = int(spatial[1])
            moved = None if dims is None else self._spatial(dims, output, count, convolved=kind.startswith("Conv"))
            self.put(output, self._assumed(output, count) if dims is None else moved)
        else:
            self.put(output, dims if dims is not None and output.shape == given[0].shape else None)

    def _results(
        self,
        func: Callable[..., Any],
        name: str,
        spatial: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tensors: list[Tensor],
        results: list[Tensor],
    ) -> list[Dims | None]:
        first = args[0] if args and isinstance(args[0], Tensor) else kwargs.get("input")
        dims = self.of(first) if isinstance(first, Tensor) else None
        shape = tuple(results[0].shape)
        if name == "cat" or name in ("concat", "concatenate"):
            return [self._joined(args, kwargs, shape)]
        if name in ("stack", "einsum"):
            return [self._stacked(args, kwargs) if name == "stack" else self._summed(args)]
        if name in _PRODUCTS:
            return [self._product(tensors[-2:] if name in ("baddbmm", "addmm", "addbmm") else tensors[:2], shape, name)]
        if isinstance(first, Tensor) and dims is None and (spatial or name in ("linear", *_RECURRENT)):
            return [self._assumed(result, spatial) if spatial else None for result in results]
        if dims is None or not isinstance(first, Tensor):
            return [self._broadcast(tensors, result) for result in results]
        if spatial or name in _RESIZED:
            count = spatial or first.ndim - 2
            convolved = name.startswith("conv") or "shuffle" in name
            return [self._spatial(dims, result, count, convolved=convolved) for result in results]
        if name == "linear":
            return [(*dims[:-1], other(shape[-1]))]
        if name in _RECURRENT:
            return [(*dims[:-1], other(shape[-1])), *[tuple(map(other, r.shape)) for r in results[1:]]]
        if name == "multi_head_attention_forward":
            return [dims, *[tuple(map(other, r.shape)) for r in results[1:]]]
        if name == "scaled_dot_product_attention":
            value = args[2] if len(args) > 2 else kwargs["value"]
            return [(*dims[:-1], (self.of(value) or (other(shape[-1]),))[-1])]
        if name in _RESHAPED:
            return [reshaped(dims, shape)]
        if name in ("__getitem__", "select", "narrow", "index_select", "unbind", "split", "chunk", "tensor_split") or (
            name in ("split_with_sizes", "unsafe_split", "unsafe_chunk")
        ):
            return self._taken(name, dims, args, kwargs, results)
        if name == "flip":
            asked = kwargs.get("dims", args[1:])
            flipped = {d % len(dims) for d in tree_leaves(asked)}
            return [tuple(_mirrored(dim) if i in flipped else dim for i, dim in enumerate(dims))]
        if name == "pad":
            return [_padded(dims, args[1] if len(args) > 1 else kwargs["pad"])]
        alone = len(tensors) == 1
        if alone and (name in _PERMUTED or (name in _REDUCED and results[0].shape != first.shape)):
            return [_probed(func, dims, args, kwargs)] * len(results)
        return [self._broadcast(tensors, result) for result in results]

    def _broadcast(self, tensors: list[Tensor], result: Tensor) -> Dims | None:
        """An elementwise operation: each dimension comes from the operand that has positions there."""
        operands = [dims for tensor in tensors if (dims := self.of(tensor)) is not None]
        if len(operands) == 1 and tuple(dim.size for dim in operands[0]) == result.shape:
            return operands[0]
        if not operands or any(len(dims) > result.ndim for dims in operands):
            return None
        made: list[Dim] = []
        for place in range(-result.ndim, 0):
            size = result.shape[place]
            fitting = [dims[place] for dims in operands if len(dims) >= -place and dims[place].size == size]
            made.append(next((dim for dim in fitting if dim.has_axis), fitting[0] if fitting else other(size)))
        return tuple(made)

    def _spatial(self, dims: Dims, result: Tensor, count: int, *, convolved: bool) -> Dims | None:
        """Channels and the axes behind them, as convolutions, poolings and resizes hold them."""
        if len(dims) != count + 2 or result.ndim != count + 2:
            return None
        channel = dims[1]
        if convolved and any(atom.axis == 0 for atom in channel.atoms) and self.axes == 3:
            self.obstacle = (
                "expected a model that takes (b, c, d, h, w), got one that takes the second dimension for frames; wrap "
                "it so that it transposes them itself"
            )
        made = [dims[0], other(result.shape[1]) if convolved or channel.size != result.shape[1] else channel]
        everywhere = [atom for dim in dims for atom in dim.atoms]
        for dim, size in zip(dims[2:], result.shape[2:], strict=True):
            if dim.size == size:
                made.append(dim)
                continue
            atom = dim.atoms[0] if len(dim.atoms) == 1 and not (dim.before or dim.after) else None
            alone = atom is not None and atom.axis >= 0 and sum(a.axis == atom.axis for a in everywhere) == 1
            made.append(axis_of(atom, size) if atom is not None and alone else other(size))
        return tuple(made)

    def _assumed(self, result: Tensor, count: int) -> Dims | None:
        """The axes in their usual places, for a convolution or pooling whose input could not be tracked."""
        if count != self.axes or result.ndim != count + 2 or len(result) != self.batch.size:
            return None
        return (self.batch, other(result.shape[1]), *(axis_of(Atom(i, 1), n) for i, n in enumerate(result.shape[2:])))

    def _joined(self, args: tuple[Any, ...], kwargs: dict[str, Any], shape: Sequence[int]) -> Dims | None:
        parts = args[0] if args else kwargs["tensors"]
        axis = (args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))) % len(shape)
        known = [self.of(part) for part in parts]
        pieces = [dims for dims in known if dims is not None and len(dims) == len(shape)]
        if not pieces:
            return None
        rest = self._beside(pieces, shape, axis)
        along = [
            dims[axis] if dims is not None else other(part.shape[axis]) for part, dims in zip(parts, known, strict=True)
        ]
        along = [dim for dim, part in zip(along, parts, strict=True) if part.shape[axis]]
        with_axis = [i for i, dim in enumerate(along) if dim.has_axis]
        if axis == 0 and len(set(known)) == 1 and not (along[0].before or along[0].after):
            joined = Dim(merged([Atom(PAIR, len(along)), *along[0].atoms]))
        elif len(with_axis) == 1:
            i = with_axis[0]
            before, after = (sum(dim.size for dim in side) for side in (along[:i], along[i + 1 :]))
            joined = Dim(along[i].atoms, before + along[i].before, along[i].after + after)
        else:
            joined = other(shape[axis])
        return (*rest[:axis], joined, *rest[axis:])

    def _beside(self, pieces: list[Dims], shape: Sequence[int], axis: int) -> list[Dim]:
        """All dimensions but one, each taken from the first piece that has positions there."""
        rest: list[Dim] = []
        for place in (i for i in range(len(shape)) if i != axis):
            options = list(dict.fromkeys(d[place] for d in pieces if d[place].size == shape[place]))
            lying = [dim for dim in options if dim.has_axis] or options
            rest.append(lying[0] if len(lying) == 1 or not lying[0].has_axis else other(shape[place]))
        return rest

    def _stacked(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Dims | None:
        parts = args[0] if args else kwargs["tensors"]
        pieces = [dims for part in parts if (dims := self.of(part)) is not None]
        if not pieces:
            return None
        axis = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % (len(pieces[0]) + 1)
        stacked = Dim((Atom(PAIR, len(parts)),)) if axis == 0 and len(parts) > 1 else other(len(parts))
        return (*pieces[0][:axis], stacked, *pieces[0][axis:])

    def _summed(self, args: tuple[Any, ...]) -> Dims | None:
        """An Einstein sum: each letter comes from the first operand that has positions there."""
        equation, *operands = args
        if len(operands) == 1 and isinstance(operands[0], list | tuple):
            operands = [*operands[0]]
        if not isinstance(equation, str) or "->" not in equation or "." in equation:
            return None
        left, right = equation.replace(" ", "").split("->")
        letters: dict[str, Dim] = {}
        for names, operand in zip(left.split(","), operands, strict=True):
            dims = self.of(operand) or tuple(map(other, operand.shape))
            for letter, dim in zip(names, dims, strict=True):
                if letter not in letters or (dim.has_axis and not letters[letter].has_axis):
                    letters[letter] = dim
        return tuple(letters[letter] for letter in right)

    def _product(self, tensors: list[Tensor], shape: Sequence[int], name: str) -> Dims | None:
        if len(tensors) != 2 or any(tensor.ndim < 2 for tensor in tensors):
            return None
        one, two = reversed(tensors) if name == "__rmatmul__" else tensors
        rows, columns = (self.of(t) or tuple(map(other, t.shape)) for t in (one, two))
        batch: list[Dim] = []
        for place in range(-len(shape), -2):
            options = [d[place] for d in (rows, columns) if len(d) >= -place and d[place].size == shape[place]]
            chosen = next((d for d in options if any(a.axis != OTHER for a in d.atoms)), None)
            batch.append(chosen or (options[0] if options else other(shape[place])))
        return (*batch, rows[-2], columns[-1])

    def _taken(
        self, name: str, dims: Dims, args: tuple[Any, ...], kwargs: dict[str, Any], results: list[Tensor]
    ) -> list[Dims | None]:
        if name == "__getitem__":
            return [_indexed(dims, args[1])]
        place = 1 if name in ("select", "narrow", "index_select", "unbind") else 2
        axis = (args[place] if len(args) > place else kwargs.get("dim", 0)) % len(dims)
        before, after = dims[:axis], dims[axis + 1 :]
        if name in ("select", "unbind"):
            return [(*before, *after)] * len(results)
        if name == "index_select":
            return [(*before, other(results[0].shape[axis]), *after)]
        start = (args[2] if len(args) > 2 else kwargs["start"]) if name == "narrow" else 0
        made: list[Dims | None] = []
        for result in results:
            size = result.shape[axis]
            made.append((*before, sliced(dims[axis], int(start), int(start) + size), *after))
            start += size
        return made


def _mirrored(dim: Dim) -> Dim:
    if dim.before or dim.after:
        return other(dim.size) if dim.has_axis else dim
    return Dim(tuple(atom._replace(mirrored=not atom.mirrored) if atom.axis >= 0 else atom for atom in dim.atoms))


def _padded(dims: Dims, pad: Sequence[int]) -> Dims:
    """Entries added at both ends: padding of an axis that is alone in its dimension, otherwise tokens."""
    made = [*dims]
    for i in range(len(pad) // 2):
        low, high = pad[2 * i], pad[2 * i + 1]
        dim = made[-1 - i]
        if low == high == 0:
            continue
        if len(dim.atoms) == 1 and dim.has_axis and dim == Dim(dim.atoms):
            made[-1 - i] = axis_of(dim.atoms[0], dim.size + low + high)
        elif dim.has_axis and low >= 0 and high >= 0:
            made[-1 - i] = Dim(dim.atoms, dim.before + low, dim.after + high)
        else:
            made[-1 - i] = other(dim.size + low + high)
    return tuple(made)


def _unfolded(dims: Dims, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Dims | None:
    """One axis (tensor method) or two (function) cut into adjacent pieces; None where they overlap."""
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
    taken = sum(item is not None and item is not Ellipsis for item in items)
    if Ellipsis in [item for item in items if not isinstance(item, Tensor | list)]:
        at = next(i for i, item in enumerate(items) if item is Ellipsis)
        items[at : at + 1] = [slice(None)] * (len(dims) - taken)
    else:
        items += [slice(None)] * (len(dims) - taken)
    made: list[Dim] = []
    rest = [*dims]
    for item in items:
        if item is None:
            made.append(Dim(()))
            continue
        dim = rest.pop(0)
        if isinstance(item, slice):
            made.append(sliced(dim, *item.indices(dim.size)))
        elif isinstance(item, Tensor | list):
            if isinstance(item, Tensor) and (item.ndim != 1 or item.dtype == torch.bool):
                return None
            made.append(other(len(item)))
        elif isinstance(item, bool):
            return None
    return tuple(made)


def _probed(func: Callable[..., Any], dims: Dims, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Dims | None:
    """Dimensions found by running the operation on an empty tensor whose sides tell one dimension from another."""
    probe = torch.empty(_PRIMES[: len(dims)], device="meta")
    try:
        sides = tree_leaves(func(*tree_map(lambda a: probe if isinstance(a, Tensor) else a, args), **kwargs))[0].shape
    except (RuntimeError, IndexError, TypeError, NotImplementedError):
        return None
    return tuple(Dim(()) if side == 1 else dims[_PRIMES.index(side)] for side in sides)
