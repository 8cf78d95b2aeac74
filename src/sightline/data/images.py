"""Opens one image file of any kind safely, as 8-bit RGB at the model's size."""

import io
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Shaped, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

Array = np.ndarray
SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
ORIENTATION = 0x0112
_LOSSY = ("JPEG", "MPO", "WEBP", "JPEG2000", "AVIF")


class UnreadableImage(ValueError):
    """An image that cannot be used; the message is the reason, in one line."""


@contextmanager
def quiet() -> Generator[None]:
    """Silence the decoder's warnings, of which one image can bring dozens.

    Python's filters belong to the whole process: enter this in the thread that starts the others, not in each of them.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def open_image(file: Path | bytes, size: tuple[int, int] | int) -> tuple[UInt8[Array, "h w 3"], tuple[int, int]]:
    """Decode an image and resize it, whole, to `size` (height, width), antialiased and bilinear.

    A number as `size` is the longest side that it may have: a smaller image stays as it is, a larger one keeps its
    shape.

    The camera's orientation is applied; of an animation the first frame is taken; what is transparent lies on white;
    white of a 16-bit image is 65,535, of a floating-point image 1.

    Returns:
        The pixels, and the height and width of the upright image before resizing.

    Raises:
        UnreadableImage: not an image, cut off, or so large that it must be meant to fill the memory.
    """
    with _opened(file) as image:
        width, height = image.size
        orientation = image.getexif().get(ORIENTATION, 1)
        upright_size = (width, height) if orientation >= 5 else (height, width)
        if isinstance(size, int):
            scale = min(1.0, size / max(upright_size))
            size = (max(1, round(scale * upright_size[0])), max(1, round(scale * upright_size[1])))
        # a large JPEG is decoded at a half, a quarter or an eighth, never at less than twice the size asked for
        image.draft(None, (2 * max(size), 2 * max(size)))
        upright = ImageOps.exif_transpose(image) if orientation > 1 else image
        pixels = np.array(_rgb(upright).resize((size[1], size[0]), Image.Resampling.BILINEAR))
        return pixels, upright_size


class MaskPixels(NamedTuple):
    """One number per pixel of a mask, and how they are meant."""

    values: Shaped[Array, "h w"]
    least: float | None
    """Smallest value of the object, where values are shades between nothing and all. None: anything but 0."""
    kind: Literal["", "alpha", "lossy"]
    """Why they are shades."""

    def inside(self, chosen: Sequence[int] | None = None) -> Bool[Array, "h w"]:
        """The pixels of the object: those of the values chosen, if any are."""
        if chosen is not None:
            return np.isin(self.values, chosen)
        return self.values != 0 if self.least is None else self.values >= self.least


def read_mask(file: Any) -> MaskPixels:
    """Decode a mask, which may also be rows of numbers. The largest channel of a color counts.

    An alpha channel is the mask where it varies, or where all is transparent and of one color. Formats that blur
    (JPEG) and alpha channels hold shades: half of the largest value, or of opaque, is where the object begins.

    Raises:
        UnreadableImage: it cannot be decoded.
    """
    if not isinstance(file, Path | bytes):
        try:
            values = np.asarray(file, dtype=np.float64)
        except (TypeError, ValueError):
            raise UnreadableImage("its mask cannot be read: expected rows of numbers of one length") from None
        return MaskPixels(values.max(-1) if values.ndim == 3 else values, None, "")
    try:
        with _opened(file) as image:
            upright = ImageOps.exif_transpose(image)
            values, kind = np.asarray(upright), image.format
    except UnreadableImage as error:
        raise UnreadableImage(f"its mask cannot be read: {error}") from error
    if "A" in upright.getbands():
        values, alpha = values[..., :-1].max(-1), values[..., -1]
        if alpha.min() != alpha.max() or (not alpha.any() and values.min() == values.max()):
            return MaskPixels(alpha, 128, "alpha")
    elif values.ndim == 3:
        values = values.max(-1)
    if kind in _LOSSY and (kind in ("JPEG", "MPO") or len(np.unique(values)) > 8):
        return MaskPixels(values, max(float(values.max()) / 2, 1), "lossy")
    return MaskPixels(values, None, "")


def open_mask(
    file: Any, size: tuple[int, int], image_size: tuple[int, int], chosen: Sequence[int] | None = None
) -> Bool[Array, "h w"]:
    """Decode a mask and resize it: a pixel belongs to it where at least half of its area is the object.

    Args:
        file: the mask, see `read_mask`.
        size: height and width to resize to.
        image_size: height and width of the image that it belongs to.
        chosen: values that count as the object. None: anything but 0, or from half on where the values are shades.

    Raises:
        UnreadableImage: it cannot be decoded, or its size is not that of its image.
    """
    inside = read_mask(file).inside(chosen)
    if inside.shape != image_size:
        got = " x ".join(str(n) for n in inside.shape[::-1])
        raise UnreadableImage(
            f"expected a mask as large as its image, {image_size[1]} x {image_size[0]} pixels, got {got}; "
            "make the two the same size"
        )
    area = Image.fromarray(np.where(inside, np.uint8(255), np.uint8(0)))
    return np.asarray(area.resize((size[1], size[0]), Image.Resampling.BOX)) >= 128


def stored_size(file: Path | bytes) -> tuple[int, int]:
    """Height and width in the file's header; nothing is decoded.

    Raises:
        UnreadableImage: there is no such header.
    """
    with _opened(file) as image:
        return image.height, image.width


@contextmanager
def _opened(file: Path | bytes) -> Generator[Image.Image]:
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            yield image
    except UnreadableImage:
        raise
    # a decoder that is given a broken file may raise anything
    except Exception as error:
        raise UnreadableImage(_reason(error, file)) from error


def _reason(error: Exception, file: Path | bytes) -> str:
    if isinstance(error, UnidentifiedImageError):
        empty = len(file) == 0 if isinstance(file, bytes) else file.stat().st_size == 0
        return "the file is empty" if empty else "not an image of a known format"
    if isinstance(error, Image.DecompressionBombError):
        return f"refused as a decompression bomb, more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels; scale it down"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def _rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of an image of any mode."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float32)
        white = 1.0 if image.mode == "F" else 65535.0
        low, high = float(values.min()), float(values.max())
        if not (0 <= low and high <= white):
            raise UnreadableImage(
                f"expected {'floating-point' if image.mode == 'F' else '16-bit'} values in 0 to {white:g}, "
                f"got {low:g} to {high:g}; save the image with 8 or 16 bits"
            )
        image = Image.fromarray(np.rint(values * (255 / white)).astype(np.uint8))
    if image.has_transparency_data:
        colours = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), colours)
    return image.convert("RGB")
