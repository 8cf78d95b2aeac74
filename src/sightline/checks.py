"""Checks of arguments that many functions share."""

from collections.abc import Sequence
from numbers import Integral


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
