"""Checks of arguments that many functions share."""

import re
from collections.abc import Sequence
from numbers import Integral

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def check_whole(**options: object) -> None:
    """Check options that count something; None stands for one that was left out.

    Raises:
        TypeError: an option is not a whole number.

    >>> check_whole(steps=3, stride=None)
    >>> check_whole(steps=1.5)
    Traceback (most recent call last):
    TypeError: expected a whole number as steps, got 1.5; give an int
    """
    for name, value in options.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, Integral)):
            raise TypeError(f"expected a whole number as {name}, got {value!r}; give an int")


def check_tensor(what: str, value: object) -> None:
    """Report an array or a list before PyTorch does, which would not say which argument it is.

    Raises:
        TypeError: it is no tensor.

    >>> check_tensor("mask= as a tensor", [1])
    Traceback (most recent call last):
    TypeError: expected mask= as a tensor, got list; torch.from_numpy makes one of an array
    """
    from torch import Tensor  # here, so that the command line starts without torch

    if not isinstance(value, Tensor):
        raise TypeError(f"expected {what}, got {type(value).__name__}; torch.from_numpy makes one of an array")


def missing(needed: str, extra: str) -> ModuleNotFoundError:
    """The error for a library that is not installed, with the extra of sightline that has it.

    >>> missing("the linear probe needs scikit-learn", "train")
    ModuleNotFoundError("the linear probe needs scikit-learn; install it: pip install 'sightline[train]'")
    """
    return ModuleNotFoundError(f"{needed}; install it: pip install 'sightline[{extra}]'")


def check_planes(what: str, shape: Sequence[int]) -> None:
    """Check that images or maps are (b, c, h, w), for functions that do not support volumes.

    Raises:
        ValueError: they are volumes.

    >>> check_planes("max_box_accuracy", (1, 1, 6, 6, 6))
    Traceback (most recent call last):
    ValueError: expected (b, c, h, w) for max_box_accuracy, got a volume (1, 1, 6, 6, 6); score its slices one by one
    """
    if len(shape) == 5:
        raise ValueError(f"expected (b, c, h, w) for {what}, got a volume {tuple(shape)}; score its slices one by one")


def bytes_of(memory: int | str) -> int:
    """A size of memory in bytes.

    Raises:
        ValueError: neither a number of bytes, at least 1, nor a size such as "2GB" (10^9 bytes) or "1GiB" (2^30).

    >>> bytes_of("1.5GB"), bytes_of("512MiB"), bytes_of(1000)
    (1500000000, 536870912, 1000)
    """
    parts = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kmgt]?i?)b?", str(memory).strip().lower())
    size = int(float(parts[1]) * _UNITS.get(parts[2], 0)) if parts else 0
    if isinstance(memory, bool) or size < 1:
        raise ValueError(f"expected memory in bytes or as 500MB, 2GB or 1GiB, got {memory!r}")
    return size
