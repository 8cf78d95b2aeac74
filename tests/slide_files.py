"""Small slides in the forms in which programs write them."""

from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

RNG = np.random.default_rng(0)
TILED = {"tile": (64, 64), "photometric": "rgb", "resolutionunit": "CENTIMETER", "compression": "deflate"}


def picture(height: int = 400, width: int = 600) -> np.ndarray:
    """Colored noise, coarse enough to survive resampling."""
    small = RNG.integers(0, 255, (height // 20, width // 20, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)).copy()


def halved(pixels: np.ndarray, times: int) -> np.ndarray:
    size = (pixels.shape[1] >> times, pixels.shape[0] >> times)
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BOX))


def pyramid(path: Path, pixels: np.ndarray, levels: int = 3, mpp: float | None = 0.5, **options: object) -> Path:
    """As many programs write them: pages that get smaller."""
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        for level in range(levels):
            tags = {"resolutionunit": "NONE"} if mpp is None else {"resolution": (1e4 / mpp / 2**level,) * 2}
            file.write(halved(pixels, level), subfiletype=int(level > 0), metadata=None, **TILED | options | tags)
    return path


def ome(path: Path, pixels: np.ndarray, levels: int = 3, mpp: float = 0.5, unit: str = "µm", **options: object) -> Path:
    """As OME describes pyramids: the smaller levels hang below the first page."""
    size = {f"PhysicalSize{axis}": mpp for axis in "XY"} | {f"PhysicalSize{axis}Unit": unit for axis in "XY"}
    with tifffile.TiffWriter(path, ome=True, bigtiff=True) as file:
        file.write(pixels, subifds=levels - 1, metadata={"axes": "YXS", **size}, **TILED | options)
        for level in range(1, levels):
            file.write(halved(pixels, level), subfiletype=1, **TILED | options)
    return path
