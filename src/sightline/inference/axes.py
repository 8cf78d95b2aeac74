"""How the positions of the images lie in a tensor: in which dimensions, in which order, beside which other entries."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

BATCH, OTHER, PAIR = -1, -2, -3
_LARGEST_TRIM = 0.75  # a slice of at least this fraction of an axis is a trim (of padding, say), not a crop
_LARGEST_STRETCH = 2.5  # of height/width between image and map; rounding 3 pixels to 2 and 1 gives 2


class Atom(NamedTuple):
    """A digit of an index: the index along an axis is the sum of value * stride over the digits of that axis."""

    axis: int
    """An axis of the images (0, 1, 2), BATCH, OTHER (not a position), or PAIR (concatenated batches)."""
    size: int
    stride: int = 1
    length: int = 0
    """Cells along the whole axis, at stride 1."""
    mirrored: bool = False


class Dim(NamedTuple):
    """A dimension of a tensor: entries without positions, then the digits, outermost first, then more such entries."""

    atoms: tuple[Atom, ...]
    before: int = 0
    after: int = 0

    @property
    def size(self) -> int:
        """Number of entries."""
        return self.before + math.prod(atom.size for atom in self.atoms) + self.after

    @property
    def has_axis(self) -> bool:
        """Whether positions lie along this dimension."""
        return any(atom.axis >= 0 for atom in self.atoms)


Dims = tuple[Dim, ...]


def other(size: int) -> Dim:
    """A dimension without positions."""
    return Dim((Atom(OTHER, size),) if size != 1 else ())


def axis_of(atom: Atom, size: int) -> Dim:
    """The whole axis at another resolution."""
    return Dim((Atom(atom.axis, size, 1, size, atom.mirrored),) if size > 1 else ())


def merged(atoms: Iterable[Atom]) -> tuple[Atom, ...]:
    """The same digits, with adjacent digits of one axis merged."""
    whole: list[Atom] = []
    for atom in atoms:
        last = whole[-1] if whole else None
        if atom.size == 1:
            continue
        alike = last is not None and last.axis == atom.axis and last.mirrored == atom.mirrored
        if last is not None and alike and (atom.axis == OTHER or last.stride == atom.stride * atom.size):
            whole[-1] = atom._replace(size=last.size * atom.size)
        else:
            whole.append(atom)
    return tuple(whole)


def reshaped(dims: Dims, shape: Sequence[int]) -> Dims | None:
    """The dimensions after a reshape; None if it splits one that also holds other entries."""
    parts: list[Atom | Dim] = []
    for dim in reversed(dims):
        parts += [dim] if dim.before or dim.after else [atom for atom in reversed(dim.atoms) if atom.size > 1]
    result: list[Dim] = []
    for size in shape:
        atoms: list[Atom] = []
        whole: Dim | None = None
        left = size
        while left > 1:
            if not parts:
                return None
            part = parts.pop()
            if isinstance(part, Dim):
                if atoms or part.size != left:
                    return None
                whole, left = part, 1
            elif left % part.size == 0:
                atoms.append(part)
                left //= part.size
            elif part.size % left == 0:
                inner = part.size // left
                atoms.append(part._replace(size=left, stride=part.stride * inner))
                parts.append(part._replace(size=inner))
                left = 1
            else:
                return None
        result.append(whole or Dim(merged(atoms)))
    return tuple(result)


def sliced(dim: Dim, start: int, stop: int, step: int = 1) -> Dim:
    """A slice of a dimension."""
    size = len(range(start, stop, step))
    if size == dim.size:
        return dim
    first, last = dim.before, dim.size - dim.after
    if dim.before or dim.after:
        keeps_all = step == 1 and start <= first and stop >= last
        return Dim(dim.atoms, first - start, stop - last) if keeps_all else other(size)
    atom = dim.atoms[0] if len(dim.atoms) == 1 and dim.has_axis else None
    if atom is None or atom.stride * atom.size != atom.length or stop - start < _LARGEST_TRIM * dim.size:
        return other(size)
    return axis_of(atom, size)


@dataclass(frozen=True)
class Layout:
    """How the positions lie in a layer's tensor; `maps` puts them in order."""

    grid: tuple[int, ...]
    channels: int = 1
    """Which dimension holds the channels."""
    rows: tuple[Atom, ...] = ()
    """Digits of positions that follow the batch in the first dimension."""
    cells: Dims = ()
    """The other dimensions, in order; empty if they are simply those of the grid."""
    fold: int = 1
    """Number of batches that are concatenated in the first dimension."""
    part: int = 0
    """Which of these batches is read."""

    @property
    def channels_last(self) -> bool:
        """Whether all dimensions except the first and the last are positions, in any order."""
        plain = not self.rows and self.fold == 1 and not any(dim.before or dim.after for dim in self.cells)
        return plain and self.channels == (len(self.cells) or len(self.grid)) + 1 > 1

    def maps(self, tensor: Tensor, lead: int = 1) -> Tensor:
        """The tensor as (b, ..., k, *grid), with `lead` dimensions before the channels."""
        if self.fold > 1:
            tensor = tensor.unflatten(0, (self.fold, -1))[self.part]
        values = tensor if self.channels == 1 else tensor.movedim(self.channels + lead - 1, lead)
        if not self.cells and not self.rows:
            return values
        for place, dim in enumerate(self.cells, lead + 1):
            if dim.before or dim.after:
                values = values.narrow(place, dim.before, dim.size - dim.before - dim.after)
        digits = [*self.rows]
        if self.rows:
            values = values.unflatten(0, (-1, *(atom.size for atom in self.rows)))
            moved = range(1, 1 + len(self.rows))
            values = values.movedim([*moved], [place + lead for place in moved])
        for dim in self.cells:
            digits += dim.atoms
        values = values.reshape(*values.shape[: lead + 1], *(atom.size for atom in digits))
        values = values.flip([lead + 1 + i for i, atom in enumerate(digits) if atom.mirrored])
        order = sorted(range(len(digits)), key=lambda i: (digits[i].axis, -digits[i].stride))
        values = values.permute(*range(lead + 1), *(lead + 1 + i for i in order))
        return values.reshape(*values.shape[: lead + 1], *self.grid)


@lru_cache(maxsize=1024)
def layout_in(dims: Dims, axes: int) -> Layout | None:
    """The layout of a tensor; None if positions are incomplete or doubled, or if two dimensions hold channels."""
    first, rest = dims[0], dims[1:]
    if first.before or first.after or not rest:
        return None
    fold, rows = 1, [*first.atoms]
    if rows and rows[0].axis == PAIR:
        fold = rows.pop(0).size
    if rows and rows[0].axis == BATCH:
        rows.pop(0)
    if any(atom.axis < 0 for atom in rows):
        return None
    channels = [i for i, dim in enumerate(rest) if dim.atoms and not dim.has_axis]
    if not channels:
        channels = [i for i, dim in enumerate(rest) if not dim.has_axis][:1]
    cells = [dim for i, dim in enumerate(rest) if i not in channels]
    digits = [*rows, *(atom for dim in cells for atom in dim.atoms)]
    if len(channels) != 1 or any(atom.axis < 0 for atom in digits):
        return None
    grid: list[int] = []
    for axis in range(axes):
        along = sorted((atom for atom in digits if atom.axis == axis), key=lambda atom: -atom.stride)
        whole = along[:1] == [] or along[0].stride * along[0].size == along[0].length
        if not whole or any(one.stride != two.stride * two.size for one, two in pairwise(along)):
            return None
        grid.append(math.prod(atom.size for atom in along))
    if math.prod(grid) <= 1:
        return None
    in_order = [atom.axis for atom in digits] == [axis for axis, size in enumerate(grid) if size > 1]
    plain = in_order and not any(atom.mirrored for atom in digits) and len(cells) == axes
    plain = plain and not rows and all(dim.size == size for dim, size in zip(cells, grid, strict=True))
    return Layout(tuple(grid), channels[0] + 1, tuple(rows), () if plain else tuple(cells), fold)


@lru_cache(maxsize=256)
def guessed(shape: tuple[int, ...], size: tuple[int, ...]) -> Layout | None:
    """Channels first or last by shape alone: the grid that is more like the image, up to one row and one column.

    If both are equally like it, a grid with exactly the shape of the image wins, else channels first.
    """
    readings = [Layout(shape[2:]), Layout(shape[1:-1], len(shape) - 1)]
    fitting = [r for r in readings if math.prod(r.grid) > 1 and _stretch(r.grid, size) <= _LARGEST_STRETCH]
    return min(fitting, key=lambda r: (_stretch(r.grid, size, rounding=1), _stretch(r.grid, size) > 1), default=None)


def _stretch(grid: Sequence[int], size: Sequence[int], rounding: int = 0) -> float:
    """Longest side of a cell over its shortest, if each side of the grid may be off by `rounding` cells."""
    sides = [*zip(grid, size, strict=True)]
    shortest = [pixels / (cells + rounding) for cells, pixels in sides]
    longest = [pixels / (cells - rounding) if cells > rounding else math.inf for cells, pixels in sides]
    return max(1.0, max(shortest) / min(longest))


def grids_like(tokens: int, size: Sequence[int], most: int) -> list[tuple[int, ...]]:
    """Grids with exactly the shape of the image and at most `most` tokens before them, fewest first."""
    scale = math.gcd(*size)
    unit = [side // scale for side in size]
    cells = [math.prod(unit) * n ** len(size) for n in range(1, tokens + 1)]
    near = [n for n, count in enumerate(cells, 1) if 0 <= tokens - count <= most]
    return [tuple(side * n for side in unit) for n in reversed(near)]


def tokens_of(tokens: int, grid: tuple[int, ...]) -> Layout:
    """Tokens (b, n, c) of the cells of a grid, row by row, after any other tokens."""
    atoms = [Atom(axis, size, 1, size) for axis, size in enumerate(grid) if size > 1]
    return Layout(grid, 2, cells=(Dim(tuple(atoms), before=tokens - math.prod(grid)),))
