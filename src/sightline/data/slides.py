"""Tissue slides: reads parts of images that are too large for memory, at a resolution in micrometers per pixel."""

import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable
from xml.etree import ElementTree

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image

from sightline.checks import missing
from sightline.data.images import Box

Array = np.ndarray
SLIDES = (".svs", ".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".bif", ".svslide", ".dcm", ".czi", ".tif", ".tiff")
"""File names that may be slides."""
_MICROSCOPE = (0.02, 50.0)  # micrometers per pixel; others are the 72 dpi of a program that knew no better
_BLOCK = 2048  # pixels a side of the parts that an overview is put together from
_LONGEST = 4096  # pixels of the longest side of an overview for finding tissue
_TISSUE_MPP = 8.0
_GRAY, _COLORED = 0.05, 0.15  # saturations: up to the first nothing is tissue, above the second everything
_PART = 2**28  # bytes of the largest tile or strip of a TIFF that is decoded
_BLACK = 25  # of 255: around a scan, where the noise of JPEG has any color
_UNITS = {"nm": 1e-3, "µm": 1.0, "μm": 1.0, "um": 1.0, "mm": 1e3, "cm": 1e4, "m": 1e6, "inch": 25400.0, "in": 25400.0}


def stem(name: str) -> str:
    """File name of a slide without its ending.

    >>> stem("a.b.svs"), stem("a.ome.tif")
    ('a.b', 'a')
    """
    ending = next((one for one in (".ome.tif", ".ome.tiff", *SLIDES) if name.lower().endswith(one)), "")
    return name[: len(name) - len(ending)]


class UnreadableSlide(ValueError):
    """A slide, or a part of one, that cannot be read; the message is the reason, in one line."""


class Level(NamedTuple):
    """One resolution of a slide."""

    height: int
    width: int
    scale: float
    """Pixels of the full resolution per pixel, along a side."""


@runtime_checkable
class _Source(Protocol):
    levels: list[Level]
    mpp: float | None

    def read(self, level: int, left: int, top: int, width: int, height: int) -> UInt8[Array, "h w 3"]:
        """A part of a level, in its pixels; white outside."""
        ...

    def close(self) -> None: ...


class Slide:
    """A slide that is open for reading; `open_slide` opens one.

    Places are in pixels of the full resolution, from its upper left corner.
    """

    def __init__(self, path: Path, source: _Source, mpp: float) -> None:
        self.path = path
        self.mpp = mpp
        """Micrometers per pixel of the full resolution."""
        self.levels = tuple(source.levels)
        self._source = source

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.levels[0].height, self.levels[0].width

    def region(self, box: Box, size: tuple[int, int]) -> UInt8[Array, "h w 3"]:
        """The part of the slide in a box (left, top, right, bottom), at a size (height, width); white outside.

        It is read from the smallest level that is at least as fine, and then resampled (bilinear, over the area of a
        pixel), so that neighboring regions fit together.

        Raises:
            UnreadableSlide: the file is damaged there.
        """
        (height, width), (left, top, right, bottom) = size, box
        asked = min((right - left) / width, (bottom - top) / height)
        index = max(i for i, level in enumerate(self.levels) if i == 0 or level.scale <= 1.01 * asked)
        level = self.levels[index]
        part = [place / level.scale for place in box]
        try:
            return self._resampled(index, part, size, margin=True)
        except UnreadableSlide:
            return self._resampled(index, part, size, margin=False)  # the damage may lie beside it

    def _resampled(self, index: int, part: list[float], size: tuple[int, int], margin: bool) -> UInt8[Array, "h w 3"]:
        (height, width), level = size, self.levels[index]
        x, x_end = _read(part[0], part[2], width if margin else None, level.width)
        y, y_end = _read(part[1], part[3], height if margin else None, level.height)
        try:
            pixels = self._source.read(index, x, y, x_end - x, y_end - y)
        except UnreadableSlide:
            raise
        except _DAMAGE as error:
            raise UnreadableSlide(f"{self.path.name}: {_line(error)}") from error
        inner = (part[0] - x, part[1] - y, part[2] - x, part[3] - y)
        return np.array(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR, inner))

    def overview(self, mpp: float) -> UInt8[Array, "h w 3"]:
        """The whole slide at a coarse resolution, read in blocks: memory is bounded also where coarse levels lack.

        Raises:
            UnreadableSlide: no block can be read. Damaged blocks are white.
        """
        scale = mpp / self.mpp
        height, width = (max(1, round(side / scale)) for side in self.size)
        step = max(1, int(_BLOCK * min(1.0, self._nearest(scale) / scale)))
        drawn = np.full((height, width, 3), 255, dtype=np.uint8)
        reasons: list[str] = []
        places = [(top, left) for top in range(0, height, step) for left in range(0, width, step)]
        across, down = self.size[1] / width, self.size[0] / height
        for top, left in places:
            bottom, right = min(top + step, height), min(left + step, width)
            box = left * across, top * down, right * across, bottom * down
            try:
                drawn[top:bottom, left:right] = self.region(box, (bottom - top, right - left))
            except UnreadableSlide as error:
                reasons.append(str(error))
        if len(reasons) == len(places):
            raise UnreadableSlide(reasons[0])
        return drawn

    def _nearest(self, scale: float) -> float:
        return max(level.scale for level in self.levels if level.scale <= 1.01 * scale or level == self.levels[0])

    def close(self) -> None:
        """Close the file."""
        self._source.close()

    def __enter__(self) -> "Slide":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _read(start: float, end: float, pixels: int | None, whole: int) -> tuple[int, int]:
    """The part of a side to read: with the pixels beside it that resampling looks at, if the side has them."""
    first, last = math.floor(start), math.ceil(end)
    margin = 0 if pixels is None else math.ceil((end - start) / pixels) + 1
    return max(first - margin, min(first, 0)), min(last + margin, max(last, whole))


def open_slide(path: str | Path, mpp: float | None = None) -> Slide:
    """Open a slide: any format of OpenSlide, and plain or OME pyramids in TIFF.

    Args:
        path: the file.
        mpp: micrometers per pixel of its full resolution, where the file does not tell them or what it tells is no
            microscope's.

    Raises:
        FileNotFoundError: no such file.
        ModuleNotFoundError: the libraries of the extra `slides` are not installed.
        UnreadableSlide: no slide, or no resolution in the file and none given.
        ValueError: `mpp` is not above 0.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    if mpp is not None and not (math.isfinite(mpp) and mpp > 0):
        raise ValueError(f"expected micrometers per pixel above 0, got {mpp}; 0.5 is usual at 20 x")
    source = _source(path)
    is_told = source.mpp is not None and _MICROSCOPE[0] <= source.mpp <= _MICROSCOPE[1]
    known = source.mpp if is_told else mpp
    if known is None:
        source.close()
        told = "none" if source.mpp is None else f"{source.mpp:.4g}, which is no microscope's"
        raise UnreadableSlide(
            f"{path.name}: expected the micrometers per pixel in the file, got {told}; give them: --mpp 0.5"
        )
    return Slide(path, source, known)


def _source(path: Path) -> _Source:
    try:
        import openslide
        import tifffile
    except (ImportError, OSError) as error:
        raise missing("reading slides needs openslide-python, openslide-bin and tifffile", "slides") from error
    kind = openslide.OpenSlide.detect_format(str(path))
    # OpenSlide reads only the full resolution of an OME pyramid
    if kind is not None and not (kind == "generic-tiff" and _is_ome(path)):
        try:
            return _OpenSlide(path)
        except (openslide.OpenSlideError, *_DAMAGE) as error:
            raise UnreadableSlide(f"{path.name}: {_line(error)}") from error
    try:
        return _Tiff(path)
    except (tifffile.TiffFileError, *_DAMAGE) as error:
        raise UnreadableSlide(f"{path.name}: expected a slide, got a file that is none: {_line(error)}") from error


def _is_ome(path: Path) -> bool:
    import tifffile

    try:
        with tifffile.TiffFile(path) as file:
            return file.is_ome
    except (tifffile.TiffFileError, *_DAMAGE):
        return False


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# what tifffile and the codecs raise at damaged tags and pixels
_DAMAGE = (
    ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError, OSError, MemoryError,
    AssertionError, zlib.error, struct.error,
)  # fmt: skip


class _OpenSlide:
    """A file that OpenSlide reads."""

    def __init__(self, path: Path) -> None:
        import openslide

        self._path = path
        self._file = openslide.OpenSlide(path)
        properties = self._file.properties
        # the scanned part of a mostly empty slide; places of QuPath count from it, too
        bounds = [int(properties.get(f"openslide.bounds-{name}", 0)) for name in ("x", "y", "width", "height")]
        self._corner = (bounds[0], bounds[1])
        whole = self._file.dimensions
        wide, high = bounds[2] or whole[0] - bounds[0], bounds[3] or whole[1] - bounds[1]
        self.levels = [
            Level(max(1, round(high * height / whole[1])), max(1, round(wide * width / whole[0])), scale)
            for (width, height), scale in zip(self._file.level_dimensions, self._file.level_downsamples, strict=True)
        ]
        sides = [properties.get(f"openslide.mpp-{axis}") for axis in "xy"]
        known = [float(side) for side in sides if side is not None]
        self.mpp = sum(known) / len(known) if known else None
        color = properties.get("openslide.background-color", "ffffff")
        self._background = tuple(bytes.fromhex(color))

    def read(self, level: int, left: int, top: int, width: int, height: int) -> UInt8[Array, "h w 3"]:
        import openslide

        scale = self.levels[level].scale
        place = round(self._corner[0] + left * scale), round(self._corner[1] + top * scale)
        try:
            part = self._file.read_region(place, level, (width, height))
        except openslide.OpenSlideError as error:
            self._reopen()
            raise UnreadableSlide(f"{self._path.name}: {_line(error)}") from error
        whole = Image.new("RGBA", part.size, (*self._background, 255))
        return np.asarray(Image.alpha_composite(whole, part).convert("RGB"))

    def _reopen(self) -> None:
        """After an error, an open file of OpenSlide refuses every read."""
        import openslide

        try:
            opened = openslide.OpenSlide(self._path)
        except (openslide.OpenSlideError, OSError):
            return  # the old one goes on telling its error
        self._file.close()
        self._file = opened

    def close(self) -> None:
        self._file.close()


class _Tiff:
    """A pyramid of TIFF pages, of which only the tiles or strips that are asked for are decoded."""

    def __init__(self, path: Path) -> None:
        import tifffile

        self._path = path
        self._file = tifffile.TiffFile(path)
        try:
            pictures = [one for one in self._file.series if _is_picture(one)]
            if not pictures:
                found = ", ".join(f"{one.axes} {one.shape} {one.dtype}" for one in self._file.series) or "nothing"
                raise ValueError(f"8 or 16 bits of gray or RGB are read, the file has {found}")
            largest = max(pictures, key=lambda one: math.prod(one.shape))
            self._pages = [level.keyframe for level in largest.levels]
            if reason := _unusable(self._pages[0]):
                raise ValueError(reason)
            self._pages = [page for page in self._pages if not _unusable(page)]
            height, width = self._pages[0].imagelength, self._pages[0].imagewidth
            self.levels = [Level(p.imagelength, p.imagewidth, width / p.imagewidth) for p in self._pages]
            if any(abs(level.height * level.scale - height) > 2 * level.scale for level in self.levels):
                self._pages, self.levels = self._pages[:1], self.levels[:1]
            self.mpp = _ome_mpp(self._file.ome_metadata or "", width, height) or _tag_mpp(self._pages[0])
        except BaseException:
            self._file.close()
            raise

    def read(self, level: int, left: int, top: int, width: int, height: int) -> UInt8[Array, "h w 3"]:
        page = self._pages[level]
        drawn = np.full((height, width, 3), 255, dtype=np.uint8)
        high, wide, rows, columns, planes = _parts(page)
        right, bottom = min(left + width, page.imagewidth), min(top + height, page.imagelength)
        for row in range(max(top, 0) // high, -(-bottom // high)):
            for column in range(max(left, 0) // wide, -(-right // wide)):
                place = row * columns + column
                parts = [self._decode(page, place + plane * rows * columns) for plane in range(planes)]
                segment = _rgb(parts, page.photometric == 0)
                if segment is None:
                    continue
                y, x = row * high, column * wide
                lines = slice(max(top, y), min(bottom, y + segment.shape[0]))
                across = slice(max(left, x), min(right, x + segment.shape[1]))
                drawn[lines.start - top : lines.stop - top, across.start - left : across.stop - left] = segment[
                    lines.start - y : lines.stop - y, across.start - x : across.stop - x
                ]
        return drawn

    def _decode(self, page: Any, place: int) -> Array | None:
        file = self._file.filehandle
        if not page.databytecounts[place]:
            return None
        file.seek(page.dataoffsets[place])
        data = file.read(page.databytecounts[place])
        segment, _, shape = page.decode(data, place, jpegtables=page.jpegtables)
        return None if segment is None else segment[0, : shape[1], : shape[2]]

    def close(self) -> None:
        self._file.close()


def _parts(page: Any) -> tuple[int, int, int, int, int]:
    """Height and width of the tiles or strips of a page, and how many there are: rows, columns, planes."""
    high = min(page.tilelength if page.is_tiled else page.rowsperstrip, page.imagelength)
    wide = page.tilewidth if page.is_tiled else page.imagewidth
    planes = page.samplesperpixel if page.planarconfig == 2 else 1
    return high, wide, -(-page.imagelength // high), -(-page.imagewidth // wide), planes


def _unusable(page: Any) -> str | None:
    """Why a page cannot be read in parts."""
    high, wide, rows, columns, planes = _parts(page)
    size = high * wide * page.samplesperpixel // planes * page.dtype.itemsize
    if size > _PART:
        return f"tiles or strips of up to {_PART >> 20} MB are read, the file has one of {size >> 20:,} MB; write tiles"
    if len(page.dataoffsets) < rows * columns * planes:
        return f"its size needs {rows * columns * planes} tiles or strips, the file has {len(page.dataoffsets)}"
    return None


def _is_picture(series: Any) -> bool:
    return (
        series.axes in ("YX", "YXS", "SYX")
        and series.keyframe.samplesperpixel in (1, 3, 4)
        and str(series.dtype) in ("uint8", "uint16")
        and series.keyframe.photometric in (0, 1, 2, 6)
    )


def _rgb(parts: Sequence[Array | None], is_inverted: bool) -> UInt8[Array, "h w 3"] | None:
    """Planes, or one part with all samples, as RGB; None where the file has nothing there."""
    given = [part for part in parts if part is not None]
    if len(given) < len(parts):
        return None
    pixels = np.concatenate(given, axis=2)[..., :3]
    if pixels.dtype == np.uint16:
        pixels = (pixels >> 8).astype(np.uint8)
    if is_inverted:
        pixels = 255 - pixels
    return np.repeat(pixels[..., :1], 3, axis=2) if pixels.shape[2] < 3 else pixels


def _ome_mpp(metadata: str, width: int, height: int) -> float | None:
    """Micrometers per pixel of the image of this size in OME-XML, mean of both sides; of the first, if none fits."""
    if not metadata:
        return None
    try:
        images = [one.attrib for one in ElementTree.fromstring(metadata).iter() if one.tag.endswith("}Pixels")]
        fitting = [one for one in images if (one.get("SizeX"), one.get("SizeY")) == (str(width), str(height))]
        pixels = (fitting or images)[0]
        sides = [
            float(pixels[f"PhysicalSize{axis}"]) * _UNITS[pixels.get(f"PhysicalSize{axis}Unit", "µm")]
            for axis in "XY"
            if f"PhysicalSize{axis}" in pixels
        ]
    except (ElementTree.ParseError, ValueError, LookupError):
        return None
    return sum(sides) / len(sides) if sides else None


def _tag_mpp(page: Any) -> float | None:
    """Micrometers per pixel by the resolution tags of a TIFF page."""
    resolution, unit = page.tags.get("XResolution"), page.tags.get("ResolutionUnit")
    micrometers = {2: 25400.0, 3: 10000.0}.get(int(unit.value) if unit else 2)
    if resolution is None or micrometers is None or not all(resolution.value):
        return None
    pixels, units = resolution.value
    return micrometers * units / pixels


def tissue_of(
    slide: Slide, *, specks: float = 10_000.0, holes: float = 10_000.0
) -> tuple[Bool[Array, "h w"], UInt8[Array, "h w 3"]]:
    """Where a slide has tissue, at about 8 micrometers per pixel and at most 4096 pixels, and the slide at that size.

    Tissue is what has more color than the glass: its saturation lies above Otsu's threshold.

    Args:
        slide: the slide.
        specks: patches of tissue up to this area, in square micrometers, are left out.
        holes: holes in the tissue up to this area are filled.

    Raises:
        UnreadableSlide: nothing of it can be read.

    Source: Otsu, "A threshold selection method from gray-level histograms", IEEE Trans. SMC 1979.

    Differs: the threshold is kept between 0.05 and 0.15, so that glass alone has no tissue, and a slide without glass
    is not divided into pale and dark tissue; black is no tissue.
    """
    mpp = max(_TISSUE_MPP, slide.mpp, slide.mpp * max(slide.size) / _LONGEST)
    drawn = slide.overview(mpp)
    return tissue_in(drawn, specks / mpp**2, holes / mpp**2), drawn


def tissue_in(drawn: UInt8[Array, "h w 3"], specks: float = 0.0, holes: float = 0.0) -> Bool[Array, "h w"]:
    """`tissue_of` for a picture, with areas in pixels.

    >>> drawn = np.full((4, 6, 3), 240, dtype=np.uint8)
    >>> drawn[1:3, 1:4] = 200, 100, 180
    >>> tissue_in(drawn).sum().item(), tissue_in(drawn, specks=6.0).any().item()
    (6, False)
    """
    try:
        from skimage.filters import threshold_otsu
        from skimage.morphology import remove_small_holes, remove_small_objects
    except ImportError as error:
        raise missing("finding tissue needs scikit-image", "slides") from error
    most, least = drawn.max(2).astype(float), drawn.min(2).astype(float)
    saturation = np.where(most < _BLACK, 0.0, (most - least) / np.maximum(most, 1.0))
    if saturation.max() <= _GRAY:
        return np.zeros(drawn.shape[:2], dtype=bool)
    mask = saturation > min(max(_GRAY, float(threshold_otsu(saturation))), _COLORED)
    mask = remove_small_objects(mask, max_size=int(specks))
    return remove_small_holes(mask, max_size=int(holes))


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Squares of a slide on a grid, those with enough tissue."""

    corners: Float[Array, "n 2"]
    """Left and top of each, in pixels of the full resolution."""
    places: Int[Array, "n 2"]
    """Row and column of each in the grid."""
    tissue: Float[Array, " n"]
    """Share of each that is tissue."""
    extent: float
    """Side in pixels of the full resolution."""
    size: int
    """Side in pixels when it is read."""
    mpp: float
    """Micrometers per pixel when it is read."""

    def __len__(self) -> int:
        return len(self.corners)

    def picked(self, rows: Sequence[int] | Bool[Array, " n"]) -> "Tiles":
        """Some of the tiles."""
        rows = np.asarray(rows)
        parts = {name: getattr(self, name)[rows] for name in ("corners", "places", "tissue")}
        return replace(self, **parts)

    def box(self, index: int) -> Box:
        """Left, top, right and bottom of one tile, in pixels of the full resolution."""
        left, top = self.corners[index].tolist()
        return left, top, left + self.extent, top + self.extent


def tiles_of(
    slide: Slide,
    tissue: Bool[Array, "h w"],
    *,
    size: int = 256,
    mpp: float = 0.5,
    overlap: int = 0,
    least: float = 0.5,
) -> Tiles:
    """The tiles of a slide that lie wholly inside it, row by row, and have enough tissue.

    Args:
        slide: the slide.
        tissue: where it has tissue, at any resolution; see `tissue_of`.
        size: side of a tile in pixels.
        mpp: micrometers per pixel of a tile. One finer than the slide itself has is refused.
        overlap: pixels that neighbors share.
        least: share of a tile that must be tissue, from 0 to 1.

    Raises:
        ValueError: a size below 1, an overlap that is not below the size, or a finer resolution than the slide has.
    """
    if size < 1 or not 0 <= overlap < size:
        raise ValueError(f"expected an overlap from 0 to below the tile's {size} pixels, got {overlap}; lower it")
    if mpp < 0.99 * slide.mpp:
        raise ValueError(
            f"{slide.path.name}: expected tiles of {slide.mpp:.4g} micrometers per pixel or more, as the slide has, "
            f"got {mpp:g}; a network trained at {mpp:g} does not fit this slide"
        )
    extent = size * mpp / slide.mpp
    step = (size - overlap) * mpp / slide.mpp
    height, width = slide.size
    rows, columns = (max(0, math.floor((side - extent) / step + 1e-9) + 1) for side in (height, width))
    places = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), -1).reshape(-1, 2)
    corners = places[:, ::-1] * step
    shares = shares_of(tissue, corners, extent, slide.size)
    kept = shares >= max(least, 1e-9)
    return Tiles(corners=corners[kept], places=places[kept], tissue=shares[kept], extent=extent, size=size, mpp=mpp)


def shares_of(
    mask: Bool[Array, "h w"], corners: Float[Array, "n 2"], extent: float, size: tuple[int, int]
) -> Float[Array, " n"]:
    """Share of each square that a mask covers: exact, by the mask's integral, which is linear within its pixels.

    Args:
        mask: of a whole slide, at any resolution.
        corners: left and top of the squares, in pixels of the full resolution.
        extent: their side in these pixels.
        size: height and width of the slide in these pixels.

    >>> shares_of(np.array([[True, False]]), np.array([[2.0, 0.0]]), 4.0, (4, 8)).tolist()
    [0.5]
    """
    whole = np.pad(mask, ((1, 0), (1, 0))).cumsum(0, dtype=np.float64).cumsum(1)
    scales = np.array([mask.shape[1] / size[1], mask.shape[0] / size[0]])
    low, high = corners * scales, (corners + extent) * scales

    def up_to(x: Float[Array, " n"], y: Float[Array, " n"]) -> Float[Array, " n"]:
        x, y = x.clip(0, mask.shape[1]), y.clip(0, mask.shape[0])
        left, top = np.minimum(x.astype(int), mask.shape[1] - 1), np.minimum(y.astype(int), mask.shape[0] - 1)
        a, b = x - left, y - top
        upper = (1 - a) * whole[top, left] + a * whole[top, left + 1]
        lower = (1 - a) * whole[top + 1, left] + a * whole[top + 1, left + 1]
        return (1 - b) * upper + b * lower

    (x0, y0), (x1, y1) = low.T, high.T
    inside = up_to(x1, y1) - up_to(x0, y1) - up_to(x1, y0) + up_to(x0, y0)
    return inside / (extent**2 * scales.prod())


def sharpness(image: UInt8[Array, "h w 3"]) -> float:
    """Variance of the Laplacian of the gray image, from 0; blurred tiles have little.

    Source: Pech-Pacheco et al., "Diatom autofocusing in brightfield microscopy: a comparative study", ICPR 2000.

    >>> sharpness(np.full((8, 8, 3), 200, dtype=np.uint8))
    0.0
    """
    gray = image.astype(float) @ np.array([0.299, 0.587, 0.114])
    inner = gray[1:-1, 1:-1]
    edges = gray[:-2, 1:-1] + gray[2:, 1:-1] + gray[1:-1, :-2] + gray[1:-1, 2:] - 4 * inner
    return round(float(edges.var()), 6)


def stain(image: UInt8[Array, "h w 3"]) -> float:
    """Mean optical density of the pixels and colors, from 0 (white) to 2.4 (black): how much dye there is.

    >>> round(stain(np.full((4, 4, 3), 25, dtype=np.uint8)), 3)
    0.993
    """
    return float(_DENSITY[image].mean())


_DENSITY = -np.log10((np.arange(256) + 1) / 256)
