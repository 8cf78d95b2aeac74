"""How a tensor holds the positions of the images: which dimension, in which order, beside which other entries."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

BATCH, OTHER, PAIR = -1, -2, -3
_KEPT = 0.75  # share of an axis that a slice must keep to count as a trim (of padding, say) and not as a crop
_LARGEST_STRETCH = 2.5  # of a map's height/width relative to the image's; rounding 3 pixels to 2 and 1 gives 2


class Atom(NamedTuple):
    """A digit of an index: along `axis` the index is the sum of value * stride over the axis' digits."""

    axis: int
    """An axis of the images (0, 1, 2), BATCH, OTHER (not a position), or PAIR (batches one behind the other)."""
    size: int
    stride: int = 1
    length: int = 0
    """Cells of the whole axis, in units of the stride 1."""
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
        """Whether positions lie along it."""
        return any(atom.axis >= 0 for atom in self.atoms)


Dims = tuple[Dim, ...]


def other(size: int) -> Dim:
    """A dimension without positions."""
    return Dim((Atom(OTHER, size),) if size != 1 else ())


def axis_of(atom: Atom, size: int) -> Dim:
    """The whole axis at another resolution."""
    return Dim((Atom(atom.axis, size, 1, size, atom.mirrored),) if size > 1 else ())


def merged(atoms: Iterable[Atom]) -> tuple[Atom, ...]:
    """The same digits, with neighbors along one axis merged into one."""
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
    """The dimensions after a reshape; None where it splits one that holds other entries too."""
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
    """A stretch of a dimension, or every `step`-th entry of it."""
    size = len(range(start, stop, step))
    cells = dim.size - dim.before - dim.after
    if size == dim.size or not dim.atoms:
        return dim if size == dim.size else other(size)
    first, last = dim.before, dim.before + cells
    if step == 1 and (dim.before or dim.after) and start <= first and stop >= last:
        return Dim(dim.atoms, first - start, stop - last)
    if dim.before or dim.after or len(dim.atoms) != 1 or not dim.has_axis:
        return other(size)
    atom = dim.atoms[0]
    whole = atom.stride * atom.size == atom.length and stop - start >= _KEPT * cells
    return axis_of(atom, size) if whole else other(size)


@dataclass(frozen=True)
class Layout:
    """How a layer's tensor holds its positions, as `maps` takes them out of it."""

    grid: tuple[int, ...]
    channels: int = 1
    """Which dimension holds the channels."""
    rows: tuple[Atom, ...] = ()
    """Digits of positions that lie behind the batch in the first dimension."""
    cells: Dims = ()
    """The other dimensions, in order; empty if they are those of the grid."""
    fold: int = 1
    """Images of each row that lie one batch behind the other in the first dimension."""
    part: int = 0
    """Which of them is read."""

    @property
    def channels_last(self) -> bool:
        """Whether all but the first and the last dimension are positions, whatever their order."""
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
    """The layout of a tensor; None where positions are incomplete, doubled, or beside two dimensions of channels."""
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
        own = sorted((atom for atom in digits if atom.axis == axis), key=lambda atom: -atom.stride)
        whole = own[:1] == [] or own[0].stride * own[0].size == own[0].length
        if not whole or any(one.stride != two.stride * two.size for one, two in pairwise(own)):
            return None
        grid.append(math.prod(atom.size for atom in own))
    if math.prod(grid) <= 1:
        return None
    in_order = [atom.axis for atom in digits] == [axis for axis, size in enumerate(grid) if size > 1]
    plain = in_order and not any(atom.mirrored for atom in digits) and len(cells) == axes
    plain = plain and not rows and all(dim.size == size for dim, size in zip(cells, grid, strict=True))
    return Layout(tuple(grid), channels[0] + 1, tuple(rows), () if plain else tuple(cells), fold)


@lru_cache(maxsize=256)
def guessed(shape: tuple[int, ...], size: tuple[int, ...]) -> Layout | None:
    """Channels first or last, by shape alone: whichever grid is more like the image, give or take a row and a column.

    Where both are alike, a grid shaped exactly like the image decides; otherwise channels are first.
    """
    readings = [Layout(shape[2:]), Layout(shape[1:-1], len(shape) - 1)]
    fitting = [r for r in readings if math.prod(r.grid) > 1 and _stretch(r.grid, size) <= _LARGEST_STRETCH]
    return min(fitting, key=lambda r: (_stretch(r.grid, size, rounding=1), _stretch(r.grid, size) > 1), default=None)


def _stretch(grid: Sequence[int], size: Sequence[int], rounding: int = 0) -> float:
    """How much longer cells are along one side than another, if each side may have so many cells more or fewer."""
    sides = [*zip(grid, size, strict=True)]
    shortest = [pixels / (cells + rounding) for cells, pixels in sides]
    longest = [pixels / (cells - rounding) if cells > rounding else math.inf for cells, pixels in sides]
    return max(1.0, max(shortest) / min(longest))


def grids_like(tokens: int, size: Sequence[int], most: int) -> list[tuple[int, ...]]:
    """Grids shaped exactly like the image, with at most so many tokens left before them, fewest first."""
    scale = math.gcd(*size)
    unit = [side // scale for side in size]
    cells = [math.prod(unit) * n ** len(size) for n in range(1, tokens + 1)]
    near = [n for n, count in enumerate(cells, 1) if 0 <= tokens - count <= most]
    return [tuple(side * n for side in unit) for n in reversed(near)]


def tokens_of(tokens: int, grid: tuple[int, ...]) -> Layout:
    """Tokens (b, n, c) of a grid's cells, row by row, behind any tokens left over."""
    atoms = [Atom(axis, size, 1, size) for axis, size in enumerate(grid) if size > 1]
    return Layout(grid, 2, cells=(Dim(tuple(atoms), before=tokens - math.prod(grid)),))
