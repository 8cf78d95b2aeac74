"""Pixels to the model's input, and maps to pictures. Needs no OpenCV."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from sightline import maps

_JET = 2
_COLORS = {
    0: "autumn",
    1: "bone",
    3: "winter",
    6: "summer",
    7: "spring",
    8: "cool",
    13: "magma",
    14: "inferno",
    15: "plasma",
    16: "viridis",
    17: "cividis",
    18: "twilight",
    19: "twilight_shifted",
    20: "turbo",
}
"""OpenCV's numbers of color maps that matplotlib has too."""


def preprocess_image(
    img: Float[np.ndarray, "h w c"] | UInt8[np.ndarray, "h w c"],
    mean: Sequence[int | float] = (0.5, 0.5, 0.5),
    std: Sequence[int | float] = (0.5, 0.5, 0.5),
) -> Float[Tensor, "1 c h w"]:
    """An image as the model's input: bytes from 0 to 1, less the mean, by the standard deviation.

    >>> preprocess_image(np.zeros((1, 1, 3), dtype=np.uint8)).flatten().tolist()
    [-1.0, -1.0, -1.0]
    """
    pixels = torch.from_numpy(img.transpose(2, 0, 1).copy())
    values = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels
    return ((values - values.new_tensor(mean)[:, None, None]) / values.new_tensor(std)[:, None, None])[None]


def deprocess_image(img: Float[np.ndarray, "..."]) -> UInt8[np.ndarray, "..."]:
    """Signed values as bytes: the mean becomes mid-gray, a standard deviation a tenth of the range."""
    scaled = (img - np.mean(img)) / (np.std(img) + 1e-5)
    return (np.clip(0.1 * scaled + 0.5, 0, 1) * 255).astype(np.uint8)


def show_cam_on_image(
    img: Float[np.ndarray, "h w 3"],
    mask: Float[np.ndarray, "h w"],
    use_rgb: bool = False,
    colormap: int = _JET,
    image_weight: int | float = 0.5,
) -> UInt8[np.ndarray, "h w 3"]:
    """A map in colors over an image, scaled so that its brightest value is 255.

    Args:
        img: RGB, or BGR, from 0 to 1.
        mask: the map, 0 to 1.
        use_rgb: the image is RGB.
        colormap: OpenCV's number of one, such as cv2.COLORMAP_JET.
        image_weight: 1 shows the image alone, 0 the map alone.

    Raises:
        ValueError: an image above 1, a weight outside 0 to 1, or a color map that only OpenCV has.

    >>> show_cam_on_image(np.ones((1, 1, 3)), np.zeros((1, 1)), use_rgb=True).tolist()
    [[[169, 169, 255]]]
    """
    if np.max(img) > 1:
        raise ValueError(f"expected an image from 0 to 1, got values up to {np.max(img):g}; divide it by 255")
    if not 0 <= image_weight <= 1:
        raise ValueError(f"expected image_weight from 0 to 1, got {image_weight}; 0.5 shows both")
    heat = _palette(colormap)[(255 * mask).astype(np.uint8)]
    blend = (1 - image_weight) * (heat if use_rgb else heat[..., ::-1]) + image_weight * img
    return (255 * (blend / np.max(blend))).astype(np.uint8)


def scale_cam_image(
    cam: Float[np.ndarray, "b *grid"], target_size: tuple[int, ...] | None = None
) -> Float[np.ndarray, "b *new_grid"]:
    """Each map stretched to 0..1, and then resized to (width, height).

    >>> scale_cam_image(np.array([[[2.0, 4.0]]])).tolist()
    [[[0.0, 1.0]]]
    """
    values = stretched(torch.from_numpy(np.asarray(cam, dtype=np.float32)))
    return (values if target_size is None else maps.resize(values[:, None], target_size[::-1])[:, 0]).numpy()


def scale_accross_batch_and_channels(
    tensor: Float[np.ndarray, "b k h w"], target_size: tuple[int, int]
) -> Float[np.ndarray, "b k _ _"]:
    """The same for the channels of each image."""
    scaled = scale_cam_image(tensor.reshape(-1, *tensor.shape[2:]), target_size)
    return scaled.reshape(*tensor.shape[:2], *scaled.shape[1:])


def stretched(values: Float[Tensor, "b *grid"]) -> Float[Tensor, "b *grid"]:
    """Each map stretched to 0..1, over all of its axes."""
    return maps.normalize(values.flatten(1)[:, None]).reshape(values.shape)


def _palette(colormap: int) -> Float[np.ndarray, "256 3"]:
    """RGB of the 256 colors, in steps of 1/255."""
    steps = np.arange(256) / 255
    if colormap == _JET:  # matplotlib's jet has other corners
        colors: Any = np.clip(1.5 - np.abs(4 * steps[:, None] - [3, 2, 1]), 0, 1)
    elif colormap in _COLORS:
        from matplotlib import colormaps

        colors = colormaps[_COLORS[colormap]](steps)[:, :3]
    else:
        known = ", ".join(name.upper() for name in ("jet", *_COLORS.values()))
        raise ValueError(f"expected one of OpenCV's color maps {known}, got number {colormap}; choose one of them")
    return (np.rint(255 * colors) / 255).astype(np.float32)
