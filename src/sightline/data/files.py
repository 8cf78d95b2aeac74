"""Image files without labels: which ones a list of paths names, and each decoded once for the model and for a page."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from sightline.data.folders import contents, marked, of_others
from sightline.data.images import File, Interpolation, UnreadableImage, open_picture, quiet

Array = np.ndarray


class Picture(NamedTuple):
    """One image twice."""

    image: UInt8[Array, "h w 3"]
    """At the model's size."""
    shown: UInt8[Array, "shown_h shown_w 3"]
    """The same part of it at its own size, or smaller."""


def image_files(
    paths: str | Path | Sequence[str | Path], strict: bool = False
) -> tuple[list[Path], list[tuple[str, str]], tuple[str, ...]]:
    """The image files among paths, or a single path, and in folders and their sub-folders.

    Returns:
        The files, (file, reason) of each that is skipped, and notices about files that are taken for masks.

    Raises:
        FileNotFoundError: a path does not exist, or a folder holds no image.
        ValueError: with `strict`, a file is skipped.
    """
    files: list[Path] = []
    skipped: list[tuple[str, str]] = []
    notices: list[str] = []
    each = [paths] if isinstance(paths, str | Path) else paths
    for path in (Path(p).expanduser() for p in each):
        if not path.exists():
            raise FileNotFoundError(f"no file or folder {path}")
        if not path.is_dir():
            files.append(path)
            continue
        inner = contents(path)
        images, _, of_masks = marked(inner.images)
        if not images and not inner.skipped:
            raise FileNotFoundError(f"the folder {path} holds no image")
        files += images
        skipped += [(str(file), reason) for file, reason in inner.skipped]
        notices += [*of_masks, *of_others(inner.others)]
    if strict and skipped:
        raise ValueError(": ".join(skipped[0]))
    return files, skipped, tuple(notices)


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
