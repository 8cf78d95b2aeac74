"""Image files without labels: which ones a list of paths names, and each decoded once for the model and for a page."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from sightline.data.folders import contents, marked, of_others
from sightline.data.images import File, Interpolation, UnreadableImage, open_picture, quiet

Array = np.ndarray


class Picture(NamedTuple):
    """One image twice."""

    image: UInt8[Array, "h w 3"]
    """At the model's size."""
    shown: UInt8[Array, "shown_h shown_w 3"]
    """The same part of it at its own size, or smaller."""


Given = str | Path | Image.Image
"""The path of a file or folder, or an image that Pillow has opened."""


def image_files(
    images: Given | Sequence[Given], strict: bool = False
) -> tuple[list[Path | Image.Image], list[tuple[str, str]], tuple[str, ...]]:
    """The image files among paths, or a single path, and in folders and their sub-folders; opened images as they are.

    Returns:
        The files, (file, reason) of each that is skipped, and notices about files that are taken for masks.

    Raises:
        FileNotFoundError: a path does not exist, or a folder holds no image.
        TypeError: neither paths nor images of Pillow.
        ValueError: with `strict`, a file is skipped.
    """
    files: list[Path | Image.Image] = []
    skipped: list[tuple[str, str]] = []
    notices: list[str] = []
    for given in _each(images):
        if isinstance(given, Image.Image):
            files.append(given)
            continue
        path = Path(given).expanduser()
        if not path.exists():
            raise FileNotFoundError(f"no file or folder {path}")
        if not path.is_dir():
            files.append(path)
            continue
        inner = contents(path)
        found, _, of_masks = marked(inner.images)
        if not found and not inner.skipped:
            raise FileNotFoundError(f"the folder {path} holds no image")
        files += found
        skipped += [(str(file), reason) for file, reason in inner.skipped]
        notices += [*of_masks, *of_others(inner.others)]
    if strict and skipped:
        raise ValueError(": ".join(skipped[0]))
    return files, skipped, tuple(notices)


def _each(images: Any) -> Sequence[Given]:
    if isinstance(images, Given):
        return [images]
    wrong = (
        [image for image in images if not isinstance(image, Given)] if isinstance(images, list | tuple) else [images]
    )
    if wrong:
        hint = "torch.stack makes one tensor of several" if hasattr(wrong[0], "dtype") else "give one of these"
        hint = "PIL.Image.fromarray makes an image of an array" if isinstance(wrong[0], Array) else hint
        where = "" if wrong[0] is images else " in a list"
        raise TypeError(f"expected paths or Pillow images, one or a list, got {type(wrong[0]).__name__}{where}; {hint}")
    return images


def path_of(file: Path | Image.Image) -> Path | None:
    """Where a file is; of an image that Pillow has opened too, if it comes from a file."""
    path = getattr(file, "filename", "") if isinstance(file, Image.Image) else file
    return Path(path) if path and isinstance(path, str | Path) else None


def decode_pictures(
    files: Sequence[File],
    size: tuple[int, int],
    longest: int,
    max_pixels: int,
    crop: float | None = None,
    interpolation: Interpolation = "bilinear",
) -> list[Picture | str]:
    """Each file at the model's `size` and with a `longest` side to be shown, or why it cannot be read; on all cores."""

    def decode(file: File) -> Picture | str:
        try:
            return Picture(*open_picture(file, size, longest, max_pixels, crop, interpolation))
        except UnreadableImage as error:
            return str(error)

    with quiet(), ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(decode, files))
