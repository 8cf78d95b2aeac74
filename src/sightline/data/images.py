"""Opens one image file of any kind safely, as 8-bit RGB at the model's size."""

import io
import math
import threading
import warnings
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Shaped, UInt8
from PIL import Image, Jpeg2KImagePlugin, TiffImagePlugin, UnidentifiedImageError

Array = np.ndarray
MAX_PIXELS = 89_478_485  # Pillow warns above this
OR_RAISE = " or raise data.max_pixels"
"""End of the reason for refusing a large image, for those who can."""
LARGE = 2**24  # pixels; larger images are decoded one at a time and brought to their size in bands
_MOST_BYTES = 900_000_000  # that one image may take while it is decoded
_MOST_IN_PYTHON = 2**23  # pixels of formats whose decoder is written in Python: about a million in a second
_BLOCK = 2**26  # bytes; the C library gives blocks of this size back to the system when they are freed
ORIENTATION = 0x0112
HEIF = "needs the package pillow-heif; pip install pillow-heif"
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# EPS starts another program; the others are known to Pillow by name alone
_NOT_READ = {"BUFR", "EPS", "FPX", "GRIB", "HDF5", "MIC", "MPEG", "WMF"}
_one_at_a_time = threading.Lock()
_loading = threading.Lock()
_LOSSY = ("JPEG", "MPO", "WEBP", "JPEG2000", "AVIF")
Interpolation = Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]
Box = tuple[float, float, float, float]
"""Left, top, right and bottom, in pixels."""
File = Path | bytes | Image.Image
"""A file, its content, or an image that Pillow has opened."""


class UnreadableImage(ValueError):
    """An image that cannot be used; the message is the reason, in one line."""


class quiet:
    """Silence the decoder's warnings, of which one image can cause dozens.

    The filters of warnings belong to the whole process: the first thread that enters sets them, and the last that
    leaves restores them.
    """

    _lock = threading.Lock()
    _inside = 0
    _filters = warnings.catch_warnings()

    def __enter__(self) -> None:
        with quiet._lock:
            if not quiet._inside:
                quiet._filters = warnings.catch_warnings()
                quiet._filters.__enter__()
                warnings.simplefilter("ignore")
            quiet._inside += 1

    def __exit__(self, *error: Any) -> None:
        with quiet._lock:
            quiet._inside -= 1
            if not quiet._inside:
                quiet._filters.__exit__(*error)


@cache
def formats() -> dict[str, str]:
    """Suffix -> format, of all that Pillow decodes, and HEIC if pillow-heif is installed; in the order Pillow tries."""
    with suppress(ModuleNotFoundError):
        from pillow_heif import register_heif_opener  # pyright: ignore[reportMissingImports]

        register_heif_opener()
    suffixes = Image.registered_extensions().items()
    order = {name: i for i, name in enumerate(Image.ID) if name not in _NOT_READ}
    return dict(sorted((pair for pair in suffixes if pair[1] in order), key=lambda pair: order[pair[1]]))


def is_image(file: Path) -> bool:
    """Whether a file begins like an image of a known format, whatever its name."""
    with suppress(UnreadableImage):
        return bool(stored_size(file))
    return False


def window(size: tuple[int, int], crop: float | None, whole: tuple[int, int]) -> Box:
    """The part of an image of `whole` (height, width) that becomes the model's input of `size`, in pixels of the image.

    None as `crop`: all of it. A fraction: the image is scaled, in its own shape, to cover `size` / `crop`, and the
    middle of `size` is cut out, as timm and torchvision do for ImageNet.

    >>> window((224, 224), 0.875, (256, 512))
    (144.0, 16.0, 368.0, 240.0)
    """
    (high, wide), (top, left) = _scaling(size, crop, whole)
    across, down = whole[1] / wide, whole[0] / high
    return left * across, top * down, (left + size[1]) * across, (top + size[0]) * down


def _scaling(
    size: tuple[int, int], crop: float | None, whole: tuple[int, int]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Height and width that the whole image is scaled to, and top and left of what is then cut out."""
    if crop is None:
        return size, (0, 0)
    covered = [math.floor(side / crop + 1e-6) for side in size]
    scale = max(covered[0] / whole[0], covered[1] / whole[1])
    high, wide = (max(int(side * scale + 1e-6), least) for side, least in zip(whole, covered, strict=True))
    return (high, wide), (round((high - size[0]) / 2), round((wide - size[1]) / 2))


def open_image(
    file: File,
    size: tuple[int, int] | int,
    max_pixels: int = MAX_PIXELS,
    crop: float | None = None,
    interpolation: Interpolation = "bilinear",
) -> tuple[UInt8[Array, "h w 3"], tuple[int, int]]:
    """Decode an image and resize its `window` to `size` (height, width), antialiased.

    A number as `size` is the longest side that the whole image may have: a smaller one stays as it is, a larger one
    keeps its shape.

    The camera's orientation is applied; of an animation the first frame is taken; what is transparent lies on white;
    white of a 16-bit image is 65,535, of a floating-point image 1. `max_pixels` bounds what is decoded: large JPEG,
    JPEG 2000 and pyramidal TIFF files are decoded at a fraction of their size.

    Returns:
        The pixels, and the height and width of the upright image before resizing.

    Raises:
        UnreadableImage: not an image, cut off, or of more pixels than allowed.
    """
    with ExitStack() as room:  # is left when the decoded image is gone
        upright, whole = _decoded(file, _scaled(size, crop), max_pixels, room)
        if isinstance(size, int):
            return _shown(upright, size, whole), whole
        return _resized(upright, size, whole, crop, interpolation), whole


def open_picture(
    file: File,
    size: tuple[int, int],
    longest: int,
    max_pixels: int = MAX_PIXELS,
    crop: float | None = None,
    interpolation: Interpolation = "bilinear",
) -> tuple[UInt8[Array, "h w 3"], UInt8[Array, "shown_h shown_w 3"]]:
    """What `open_image` gives, and the same part of the image to be shown, in its own shape, no side above `longest`.

    Both come from one decoding, unless a large image is decoded at another fraction of its size for each.

    Raises:
        UnreadableImage: not an image, cut off, or of more pixels than allowed.
    """
    side = _scaled(size, crop)
    with ExitStack() as room:
        upright, whole = _decoded(file, longest, max_pixels, room)
        shown = _shown(upright, longest, whole, window(size, crop, whole))
        if _reduced(file, side) == _reduced(file, longest):
            return _resized(upright, size, whole, crop, interpolation), shown
    return open_image(file, size, max_pixels, crop, interpolation)[0], shown


def _reduced(file: File, side: int) -> tuple[int, ...]:
    """The size at which an image is decoded, and for the largest also the side that it is averaged to."""
    with _opened(file) as image:
        side = min(side, max(image.size))
        _draft(image, side)
        return image.size if image.width * image.height <= LARGE else (*image.size, side)


def _scaled(size: tuple[int, int] | int, crop: float | None) -> int:
    """Side of an image whose window becomes `size`."""
    return math.ceil((size if isinstance(size, int) else max(size)) / (crop or 1))


def _resized(
    upright: Image.Image,
    size: tuple[int, int],
    whole: tuple[int, int],
    crop: float | None,
    interpolation: Interpolation = "bilinear",
) -> UInt8[Array, "h w *colors"]:
    """The window of the decoded image, which may be smaller than the `whole` one."""
    resampling = Image.Resampling[interpolation.upper()]
    (high, wide), (top, left) = _scaling(size, crop, whole)
    if high * wide > LARGE:  # a very long image
        return _part(upright, size, whole, window(size, crop, whole), resampling)
    scaled = upright.resize((wide, high), resampling)
    return np.array(scaled if crop is None else scaled.crop((left, top, left + size[1], top + size[0])))


def _shown(
    upright: Image.Image, longest: int, whole: tuple[int, int], part: Box | None = None
) -> UInt8[Array, "h w 3"]:
    """A part of the decoded image, or all of it, in its own shape, no side above `longest`."""
    left, top, right, bottom = part or (0.0, 0.0, float(whole[1]), float(whole[0]))
    tall, wide = bottom - top, right - left
    scale = min(1.0, longest / max(tall, wide))
    size = (max(1, round(scale * tall)), max(1, round(scale * wide)))
    return _part(upright, size, whole, (left, top, right, bottom), Image.Resampling.BILINEAR)


def _part(
    upright: Image.Image, size: tuple[int, int], whole: tuple[int, int], part: Box, resampling: Image.Resampling
) -> UInt8[Array, "h w *colors"]:
    left, top, right, bottom = part
    across, down = upright.width, upright.height
    box = (left * across / whole[1], top * down / whole[0], right * across / whole[1], bottom * down / whole[0])
    box = (*box[:2], min(box[2], across), min(box[3], down))  # what rounding put beyond the edge
    return np.array(upright.resize((size[1], size[0]), resampling, box))


def _decoded(file: File, side: int, max_pixels: int, room: ExitStack) -> tuple[Image.Image, tuple[int, int]]:
    """An upright RGB image, large ones reduced, and its own height and width."""
    with _opened(file) as image:
        width, height = image.size
        side = min(side, max(image.size))
        pixels = _draft(image, side)
        room.enter_context(_room(pixels, max_pixels, image))
        drafted = image.size
        image.load()
        turned = image.size == drafted[::-1] != drafted  # a TIFF turns itself; most say its upright size before
        orientation = _orientation(image)
        upright = _turned(_in_bands(image, side, _ends(image)), orientation)
        if turned != (orientation in (5, 6, 7, 8)):
            width, height = height, width
        return upright, (height, width)


class MaskPixels(NamedTuple):
    """One number per pixel of a mask, and what the numbers mean."""

    values: Shaped[Array, "h w"]
    least: float | None
    """Smallest value of the object if the values are shades. None: any value but 0."""
    kind: Literal["", "alpha", "lossy"]
    """Why the values are shades."""

    def inside(self, chosen: Sequence[int] | None = None) -> Bool[Array, "h w"]:
        """The pixels of the object: those with the chosen values, if any are chosen."""
        if chosen is not None:
            return np.isin(self.values, chosen)
        return self.values != 0 if self.least is None else self.values >= self.least


def read_mask(file: Any, max_pixels: int = MAX_PIXELS) -> MaskPixels:
    """Decode a mask, which may also be rows of numbers. The largest channel of a color is its value.

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
        with _opened(file) as image, _room(_draft(image, max(image.size)), max_pixels, image):
            image.load()
            upright = _turned(image, _orientation(image))
            return _mask_pixels(np.asarray(upright), "A" in upright.getbands(), image.format or "")
    except UnreadableImage as error:
        raise UnreadableImage(f"its mask cannot be read: {error}") from error


def _mask_pixels(values: Shaped[Array, "h w *_"], has_alpha: bool, kind: str) -> MaskPixels:
    if has_alpha:
        values, alpha = values[..., :-1].max(-1), values[..., -1]
        if alpha.min() != alpha.max() or (not alpha.any() and values.min() == values.max()):
            return MaskPixels(alpha, 128, "alpha")
    elif values.ndim == 3:
        values = values.max(-1)
    if kind in _LOSSY and (kind in ("JPEG", "MPO") or len(np.unique(values)) > 8):
        return MaskPixels(values, max(float(values.max()) / 2, 1), "lossy")
    return MaskPixels(values, None, "")


def open_mask(
    file: Any,
    size: tuple[int, int],
    image_size: tuple[int, int],
    chosen: Sequence[int] | None = None,
    max_pixels: int = MAX_PIXELS,
    crop: float | None = None,
) -> Bool[Array, "h w"]:
    """Decode a mask and resize its `window`: a pixel belongs to it if at least half of its area is the object.

    Args:
        file: the mask, see `read_mask`.
        size: height and width to resize to.
        image_size: height and width of the image that it belongs to.
        chosen: values that count as the object. None: anything but 0, or from half on where the values are shades.
        max_pixels: most pixels that it may take to decode.
        crop: see `window`.

    Raises:
        UnreadableImage: it cannot be decoded, or its size is not that of its image.
    """
    inside = read_mask(file, max_pixels).inside(chosen)
    if inside.shape != image_size:
        got = " x ".join(str(n) for n in inside.shape[::-1])
        raise UnreadableImage(
            f"expected a mask as large as its image, {image_size[1]} x {image_size[0]} pixels, got {got}; "
            "make the two the same size"
        )
    area = Image.fromarray(np.where(inside, np.uint8(255), np.uint8(0)))
    return _resized(area, size, image_size, crop, "box") >= 128


def few_values(file: Path) -> bool:
    """Whether 32 colors cover nearly all of an image, as in masks and label maps, also after JPEG.

    Raises:
        UnreadableImage: it cannot be decoded.
    """
    with _opened(file) as image, _room(_draft(image, max(image.size)), MAX_PIXELS, image):
        small = np.asarray(image.resize((min(256, image.width), min(256, image.height)), Image.Resampling.NEAREST))
    _, counts = np.unique(small.reshape(small.shape[0] * small.shape[1], -1), axis=0, return_counts=True)
    return bool(np.sort(counts)[-32:].sum() >= 0.95 * counts.sum())


def stored_size(file: Path | bytes) -> tuple[int, int]:
    """Height and width in the file's header, before the camera's orientation is applied; nothing is decoded.

    Raises:
        UnreadableImage: there is no such header.
    """
    with _opened(file) as image:
        return image.height, image.width


@contextmanager
def _opened(file: File) -> Generator[Image.Image]:
    kinds = tuple(dict.fromkeys(formats().values()))
    try:
        if isinstance(file, Image.Image):
            with _loading:  # the same image may be given twice
                file.load()  # then nothing below changes it
            yield file
            return
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=kinds) as image:
            yield image
    except UnreadableImage:
        raise
    # a decoder that is given a broken file may raise anything
    except Exception as error:
        raise UnreadableImage(_reason(error, file)) from error


def _reason(error: Exception, file: File) -> str:
    if isinstance(error, UnidentifiedImageError) and not isinstance(file, Image.Image):
        with io.BytesIO(file) if isinstance(file, bytes) else file.open("rb") as opened:
            head = opened.read(12)
        if head[4:12] in (b"ftypheic", b"ftypheix", b"ftypmif1"):
            return HEIF
        return "not an image of a known format" if head else "the file is empty"
    if isinstance(error, Image.DecompressionBombError):
        return f"refused as a decompression bomb, more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels; scale it down"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def _draft(image: Image.Image, side: int) -> int:
    """Let a large file be decoded at a fraction of its size, but at least at twice the side asked for.

    Returns:
        How many pixels are then decoded.
    """
    whole = image.width * image.height
    if not getattr(image, "tile", ()):  # it is decoded already
        return whole
    image.draft(None, (2 * side, 2 * side))  # JPEG: a half, a quarter or an eighth
    if whole <= LARGE:
        return image.width * image.height
    if isinstance(image, Jpeg2KImagePlugin.Jpeg2KImageFile):
        most = min((min(image.size) // (2 * side)).bit_length() - 1, _levels(image))
        # Pillow rounds sides to the nearest, the decoder up; it fails where they differ
        fitting = [n for n in range(1, most + 1) if all(-(-s >> n) == (s + (1 << n - 1)) >> n for s in image.size)]
        halvings = max(fitting, default=0)
        image.reduce = halvings
        return 3 * (whole >> 2 * halvings)  # its decoder is slow
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        image.seek(_smallest_page(image, side))
    # a progressive JPEG is held whole until its last scan
    return whole if image.info.get("progressive") else image.width * image.height


def _levels(image: Jpeg2KImagePlugin.Jpeg2KImageFile) -> int:
    """How often a JPEG 2000 file can be halved: a byte of its coding style marker."""
    if image.fp is None:
        return 0
    image.fp.seek(0)
    header = image.fp.read(2**16)
    at = header.find(b"\xff\x52\x00")
    return header[at + 9] if 0 <= at < len(header) - 9 else 0


def _smallest_page(image: TiffImagePlugin.TiffImageFile, side: int) -> int:
    """The smallest of a TIFF's reduced copies of its first page that is still twice as large as asked for."""
    size, orientation = image.size, image.tag_v2.get(ORIENTATION, 1)
    best, pixels = 0, size[0] * size[1]
    for page in range(1, min(image.n_frames, 32)):
        image.seek(page)
        width, height = image.size
        is_copy = image.tag_v2.get(254, 0) == 1 and image.tag_v2.get(ORIENTATION, 1) == orientation
        if is_copy and abs(width * size[1] / (height * size[0]) - 1) < 0.01 and min(width, height) >= 2 * side:
            best, pixels = min((best, pixels), (page, width * height), key=lambda copy: copy[1])
    return best


@contextmanager
def _room(pixels: int, max_pixels: int, image: Image.Image) -> Generator[None]:
    """Allow an image to be decoded if it is not too large; large ones are decoded one at a time.

    Raises:
        UnreadableImage: more pixels are to be decoded than allowed, or than this format's decoder can cope with.
    """
    if pixels > max_pixels:
        raise UnreadableImage(
            f"expected at most {max_pixels:,} pixels to decode, got {pixels:,}; scale it down{OR_RAISE}"
        )
    most, reason = _most(image, pixels)
    if pixels > most:
        raise UnreadableImage(f"expected at most {most:,} pixels, {reason}, got {pixels:,}; scale it down")
    if pixels <= LARGE:
        yield
        return
    with _one_at_a_time:
        usual = Image.core.get_block_size()
        Image.core.set_block_size(max(usual, _BLOCK))
        try:
            yield
        finally:
            Image.core.set_block_size(usual)


def _most(image: Image.Image, pixels: int) -> tuple[int, str]:
    """How many pixels such an image may have, which bounds time and memory, and the reason."""
    kind, colors = image.format or "", len(image.getbands())
    if any(tile[0] in Image.DECODERS for tile in getattr(image, "tile", ())):
        return _MOST_IN_PYTHON, f"since the {kind} decoder is slow"
    # of JPEG 2000, three times as many pixels are counted, see `_draft`
    each = {"WEBP": 16, "AVIF": 4 * colors - 2, "JPEG2000": 2.5 * colors}.get(kind, 4)
    if image.info.get("progressive"):
        each = 2 * colors + 4 * image.width * image.height / pixels  # all of it before the draft is made
    elif isinstance(image, TiffImagePlugin.TiffImageFile):
        is_tiled, rows = 322 in image.tag_v2, image.tag_v2.get(278, image.height)
        if image.tag_v2.get(ORIENTATION, 1) != 1 or not (is_tiled or rows <= image.height // 2):
            each = 8  # it is turned while it is read, or its one strip is held besides
    return int(_MOST_BYTES / each), f"since the {kind} decoder takes {each:.0f} bytes for each"


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:  # what the camera wrote is broken, its pixels need not be
        return 1


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


def _ends(image: Image.Image) -> tuple[float, float]:
    """The values of black and white of images with more than 8 bits."""
    white = 1.0 if image.mode == "F" else 65535.0
    if isinstance(image, TiffImagePlugin.TiffImageFile) and image.mode.startswith("I"):
        white = 4095.0 if image.tag_v2.get(258) == (12,) else white
        if image.tag_v2.get(262) == 0:  # white is zero; Pillow turns that around for 8 bits alone
            return white, 0.0
    return 0.0, white


def _in_bands(image: Image.Image, side: int, ends: tuple[float, float]) -> Image.Image:
    """8-bit RGB of a decoded image; a large one is averaged band by band to no less than twice `side`."""
    width, height = image.size
    if width * height <= LARGE:
        return _rgb(image, ends)
    across, down = max(1, width // (2 * side)), max(1, height // (2 * side))
    rows = max(1, 2**20 // (width * down)) * down
    small = Image.new("RGB", (-(-width // across), -(-height // down)))
    for top in range(0, height, rows):
        band = image.crop((0, top, width, min(top + rows, height)))
        small.paste(_rgb(band, ends).reduce((across, down)), (0, top // down))
    whole = (0, 0, width / across, height / down)  # the last cells may be cut off
    return small.resize((width // across, height // down), Image.Resampling.BILINEAR, box=whole)


def _rgb(image: Image.Image, ends: tuple[float, float]) -> Image.Image:
    """8-bit RGB of an image of any mode."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float32)
        low, high = float(values.min()), float(values.max())
        if not (0 <= low and high <= max(ends)):
            raise UnreadableImage(
                f"expected {'floating-point' if image.mode == 'F' else '16-bit'} values in 0 to {max(ends):g}, "
                f"got {low:g} to {high:g}; save the image with 8 or 16 bits"
            )
        black, white = ends
        bright = np.rint((values - black) * (255 / (white - black)))
        clear = image.info.get("transparency")
        if isinstance(clear, int):
            bright[values == clear] = 255
        image = Image.fromarray(bright.astype(np.uint8))
    if image.has_transparency_data:
        colors = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), colors)
    return image if image.mode == "RGB" else image.convert("RGB")
