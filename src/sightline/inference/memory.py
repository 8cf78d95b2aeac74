"""How many images fit into memory at once, measured on the batches that run."""

import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sightline.checks import bytes_of
from sightline.inference.operations import tensors_in

T = TypeVar("T")
Memory = int | str | None
"""Bytes, or a size such as "2GB"; None: see `allowance`."""

_ON_CPU = 300_000_000
_ON_GPU = 0.5  # of what is free
_ASSUMED = 500  # bytes held for each byte of an image, where nothing was measured
_COPYING = (torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default)


def allowance(memory: Memory, device: torch.device) -> int:
    """Bytes that a batch may take: those asked for, or 300 MB on a CPU and half of the free memory on a GPU.

    Raises:
        ValueError: no such size.

    >>> allowance("2GB", torch.device("cpu")), allowance(None, torch.device("cpu"))
    (2000000000, 300000000)
    """
    if memory is not None:
        return bytes_of(memory)
    if device.type != "cuda":
        return _ON_CPU
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(_ON_GPU * (torch.cuda.mem_get_info(device)[0] + unused))


def fitting_size(allowed: int, item_bytes: int, batch_size: int, held: int | None = None) -> int:
    """Items that fit into the bytes allowed, from 1 to `batch_size`, if each holds `held` bytes; None: 500 x its own.

    >>> fitting_size(10_000, 10, 64), fitting_size(10_000, 10, 64, held=2_500)
    (2, 4)
    """
    return max(min(allowed // max(_ASSUMED * item_bytes if held is None else held, 1), batch_size), 1)


class Held(TorchDispatchMode):
    """Counts the bytes of the tensors that are made in this context and still exist; `peak` is the most at once.

    A tensor that is saved for a backward exists, too. While a convolution runs, its arguments and results count twice:
    on a CPU it copies them into another layout. What other operations need only inside themselves is not counted.

    >>> with Held() as held:
    ...     doubled = torch.ones(10).mul(2)
    >>> held.peak, held.bytes
    (80, 40)
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.peak = 0
        self._storages: dict[int, Any] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation and count its results."""
        result = func(*args, **(kwargs or {}))
        made = {key: storage for key, storage in _storages(result) if key not in self._storages}
        for key, _ in _storages((args, kwargs)) if made else ():
            made.pop(key, None)  # a view of something older
        for key, storage in made.items():
            size = storage.nbytes()
            self.bytes += size
            self._storages[key] = weakref.ref(storage, partial(self._free, key, size))
        copied = sum(tensor.nbytes for tensor in tensors_in((args, result))) if func in _COPYING else 0
        self.peak = max(self.peak, self.bytes + copied)
        return result

    def _free(self, key: int, size: int, _: Any) -> None:
        self._storages.pop(key, None)
        self.bytes -= size


def _storages(values: Any) -> Iterator[tuple[int, torch.UntypedStorage]]:
    for tensor in tensors_in(values):
        storage = tensor.untyped_storage()
        yield storage._cdata, storage  # pyright: ignore[reportPrivateUsage]


def held_by(call: Callable[[], T]) -> tuple[T, int | None]:
    """What a function returns, and the most bytes of tensors that it held at once; None where that cannot be seen."""
    try:
        with Held() as held:
            return call(), held.peak
    except NotImplementedError:  # sparse tensors have no storage, and some operations run under no mode
        return call(), None


def in_batches(
    call: Callable[[range], T],
    total: int,
    item_bytes: int,
    device: torch.device,
    *,
    batch_size: int = 64,
    memory: Memory = None,
    group: int | None = None,
) -> Iterator[tuple[range, T]]:
    """The function of items 0 to total - 1, as many at a time as fit into `memory`, at most `batch_size`.

    The first batch assumes that 500 times the bytes of an image are held; then the bytes that a batch did hold decide,
    until the number stays the same. Every `group` consecutive items form a group, and no batch mixes two groups.

    >>> [len(items) for items, _ in in_batches(len, 5, 8, torch.device("cpu"), batch_size=2)]
    [2, 2, 1]
    """
    allowed, group = allowance(memory, device), group or max(total, 1)
    size = fitting_size(allowed, item_bytes, batch_size)
    is_settled, start = total <= size, 0
    while start < total:
        items = range(start, min(start + size, start - start % group + group, total))
        if is_settled or len(items) < size:  # a smaller batch tells less
            yield items, call(items)
        else:
            result, held = held_by(lambda items=items: call(items))
            yield items, result
            del result
            fits = size if held is None else fitting_size(size * allowed, item_bytes, batch_size, held)
            is_settled, size = fits == size, fits
        start = items.stop
