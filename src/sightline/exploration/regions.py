"""Places where a network should seldom have to look, and the window of an image where it looks most."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, UInt8
from scipy import ndimage
from torch.nn import functional as F

from sightline import maps as pixels

Array = np.ndarray
_FRAME = 1 / 16  # width of the border, as a share of the side
_CORNER = 1 / 5  # side of a corner
_STROKE = 0.25  # least step of brightness at the edge of a letter, of 1
_STROKES = 0.25  # least share of such steps around a pixel of text
_COLORFUL = 0.5  # least difference between the channels of a colored patch
_EVEN = 0.15  # most difference within 3 x 3 pixels of a patch
_LARGEST = 1 / 8  # share of the image above which an even area is a background


def border(images: UInt8[Array, "n 3 h w"]) -> Bool[Array, "n h w"]:
    """The outer sixteenth of the image on each side (at least a pixel).

    >>> border(np.zeros((1, 3, 3, 3), np.uint8))[0].astype(int).tolist()
    [[1, 1, 1], [1, 0, 1], [1, 1, 1]]
    """
    n, _, height, width = images.shape
    rows, columns = (max(round(side * _FRAME), 1) for side in (height, width))
    outside = np.ones((n, height, width), dtype=bool)
    outside[:, rows : height - rows, columns : width - columns] = False
    return outside


def corners(images: UInt8[Array, "n 3 h w"]) -> Bool[Array, "n h w"]:
    """The four corners, each a fifth of the height by a fifth of the width (at least a pixel).

    >>> corners(np.zeros((1, 3, 3, 3), np.uint8))[0].astype(int).tolist()
    [[1, 0, 1], [0, 0, 0], [1, 0, 1]]
    """
    n, _, height, width = images.shape
    rows, columns = (max(round(side * _CORNER), 1) for side in (height, width))
    down, across = (np.minimum(np.arange(side), np.arange(side)[::-1]) for side in (height, width))
    return np.broadcast_to((down < rows)[:, None] & (across < columns), (n, height, width)).copy()


def text(images: UInt8[Array, "n 3 h w"]) -> Bool[Array, "n h w"]:
    """Places like lines of text: many strong steps of brightness from left to right and back, close together.

    A pixel counts if, in the window around it that is a sixteenth of the image high and a quarter wide, the brightness
    (0 to 1) changes by 0.25 or more between neighbors in a row at a quarter of the places or more, as often upwards
    as downwards to within a factor of two. Fences and hair count too; text of a few pixels does not.
    """
    gray = np.einsum("nchw,c->nhw", images / np.float32(255), np.array([0.299, 0.587, 0.114], np.float32))
    steps = np.diff(gray, axis=2, prepend=gray[:, :, :1])
    window: Any = (1, max(round(gray.shape[1] / 16), 3), max(round(gray.shape[2] / 4), 3))
    up, down = (ndimage.uniform_filter((sign * steps >= _STROKE).astype(np.float32), window) for sign in (1, -1))
    return (up + down >= _STROKES) & (np.minimum(up, down) * 2 >= np.maximum(up, down))


def colored_patch(images: UInt8[Array, "n 3 h w"]) -> Bool[Array, "n h w"]:
    """Small even areas of a strong color.

    A pixel counts if its channels differ by 0.5 or more (of 1), no channel varies by more than 0.15 in the 3 x 3
    pixels around it, and the area of such pixels, grown back by the pixel that its edge lost, is at most an eighth of
    the image. White, gray and black patches are not colored.
    """
    values = images / np.float32(255)
    size = (1, 1, 3, 3)
    spread = (ndimage.maximum_filter(values, size) - ndimage.minimum_filter(values, size)).max(1)
    core = (values.max(1) - values.min(1) >= _COLORFUL) & (spread <= _EVEN)
    found = np.zeros_like(core)
    for one, kept in zip(core, found, strict=True):
        labeled: Any = ndimage.label(one)
        areas, count = labeled
        sizes = np.bincount(areas.ravel(), minlength=count + 1)
        small = sizes <= _LARGEST * one.size
        small[0] = False
        kept[:] = small[areas]
    return ndimage.binary_dilation(found, np.ones((1, 3, 3), dtype=bool))


DETECTORS: dict[str, Callable[[UInt8[Array, "n 3 h w"]], Bool[Array, "n h w"]]] = {
    "border": border,
    "corners": corners,
    "text": text,
    "colored patch": colored_patch,
}
"""Name -> which pixels of images belong to the place."""


def shares(
    weights: Float[Array, "n map_h map_w"], places: Bool[Array, "n h w"]
) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    """Share of each map's weight in its image's place, and the share of the area that the place covers: chance.

    A cell of the map spreads its weight evenly over its pixels.

    >>> half = np.array([[[True, True, False, False]]])
    >>> [values.tolist() for values in shares(np.array([[[0.9, 0.1]]]), half)]
    [[0.9], [0.5]]
    """
    covered = F.adaptive_avg_pool2d(torch.from_numpy(places)[:, None].double(), weights.shape[1:])[:, 0].numpy()
    return (weights * covered).sum((1, 2)), places.mean((1, 2))


def hottest(
    maps: Float[Array, "n map_h map_w"],
    size: tuple[int, int],
    window: tuple[int, int],
    places: Bool[Array, "n h w"] | None = None,
) -> Int64[Array, "n 2"]:
    """Top and left of the window of each image that holds most of the map's positive part, in pixels.

    Args:
        maps: raw maps.
        size: height and width of the image.
        window: height and width of the window.
        places: count only these pixels.

    >>> hottest(np.array([[[0.0, 0.0, 1.0], [0.0, 0.0, 3.0], [0.0, 0.0, 0.0]]]), (3, 3), (2, 1)).tolist()
    [[0, 2]]
    """
    positive = torch.from_numpy(np.maximum(np.nan_to_num(maps, posinf=0.0), 0).astype(np.float64))[:, None]
    counted = pixels.resize(positive, size)[:, 0]
    if places is not None:
        counted = counted * torch.from_numpy(places)
    whole = F.pad(counted.cumsum(1).cumsum(2), (1, 0, 1, 0))
    (height, width), (high, wide) = size, window
    rows, columns = slice(0, height - high + 1), slice(0, width - wide + 1)
    low = whole[:, high:, :]
    inside = low[:, :, wide:] - low[:, :, columns] - whole[:, rows, wide:] + whole[:, rows, columns]
    best = inside.flatten(1).argmax(1).numpy()
    return np.stack(np.divmod(best, width - wide + 1), 1).astype(np.int64)


def elsewhere(
    windows: Int64[Array, "n 2"],
    size: tuple[int, int],
    window: tuple[int, int],
    rng: np.random.Generator,
) -> Int64[Array, "n 2"]:
    """Random windows of the same size that do not overlap the given ones, uniformly.

    Raises:
        ValueError: the image has no room for a second window.
    """
    ends = np.array(size) - np.array(window)
    if (np.array(size) < 3 * np.array(window)).all():
        raise ValueError(f"expected windows of at most a third of the image, got {window} of {size}")
    drawn = np.empty_like(windows)
    left = np.arange(len(windows))
    while len(left):
        drawn[left] = rng.integers(0, ends + 1, (len(left), 2))
        overlap = (np.abs(drawn[left] - windows[left]) < window).all(1)
        left = left[overlap]
    return drawn
