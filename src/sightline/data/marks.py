"""How masks and boxes are written, and signs of another form."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Float32

from sightline.data.images import MaskPixels, UnreadableImage, open_image, quiet, read_mask
from sightline.recipe import Data

Array = np.ndarray
BoxForm = Literal["xyxy", "xywh", "relative", "relative_xywh", "cxcywh"]
_CORNERS = np.ix_([0, -1], [0, -1])
_GRID = 128  # side of the grid on which the area of boxes is counted


@dataclass(frozen=True, kw_only=True)
class Marks:
    """How the masks and boxes of a source are read."""

    boxes: BoxForm = "xyxy"
    mask_values: tuple[int, ...] | None = None
    """Values of the object; None: every value but 0."""


USUAL = Marks()


class Record(NamedTuple):
    """One image as its source has it."""

    image: Path | bytes
    mask: Any = None
    """A file, its bytes, rows of numbers, or a tuple of files that mark one part each."""
    boxes: Any = None

    @property
    def masks(self) -> tuple[Any, ...]:
        """Its masks, each of which marks a part."""
        several = self.mask if isinstance(self.mask, tuple) else (self.mask,)
        return tuple(mask for mask in several if mask is not None)


def pixel_boxes(cell: Any, form: BoxForm, size: tuple[int, int]) -> Float32[Array, "_ 4"]:
    """The boxes in a cell, [x0, y0, x1, y1] in pixels, clipped at the edges of an image of this height and width.

    Raises:
        UnreadableImage: a box is not four finite numbers, has no area or lies outside the image.

    >>> pixel_boxes([10, 10, 20, 10], "xywh", (40, 60)).tolist()
    [[10.0, 10.0, 30.0, 20.0]]
    >>> pixel_boxes([0.5, 0.5, 1, 0.5], "cxcywh", (40, 60)).tolist()
    [[0.0, 10.0, 60.0, 30.0]]
    """
    numbers = _numbers(cell)
    boxes = _corners(numbers, form, size)
    height, width = size
    for numbers_of_box, (x0, y0, x1, y1) in zip(numbers, boxes.tolist(), strict=True):
        got = f"[{', '.join(f'{value:g}' for value in numbers_of_box)}] ({form})"
        if not (x0 < x1 and y0 < y1):
            raise UnreadableImage(
                f"expected a box with some area, got {got}; correct it, or leave its cell empty if there is none"
            )
        if x1 <= 0 or y1 <= 0 or x0 >= width or y0 >= height:
            raise UnreadableImage(
                f"expected a box on the image of {width} x {height} pixels, got {got}, which lies outside; correct it"
            )
    return boxes.clip(0, np.array([width, height, width, height], dtype=np.float32))


def _numbers(cell: Any) -> Float32[Array, "_ 4"]:
    """The numbers in a cell of one box, several or none, or of objects with a field `bbox`."""
    if isinstance(cell, dict):
        cell = cell.get("bbox")
    try:
        numbers = np.asarray([] if cell is None else cell, dtype=np.float32)
        numbers = numbers.reshape(-1, 4) if numbers.size else np.empty((0, 4), np.float32)
    except (TypeError, ValueError):
        raise UnreadableImage(f"expected boxes [x0, y0, x1, y1], got {str(cell)[:80]}") from None
    if not np.isfinite(numbers).all():
        raise UnreadableImage(
            f"expected finite numbers in its boxes, got {str(cell)[:80]}; leave the cell empty where there is no box"
        )
    return numbers


def _corners(numbers: Float32[Array, "n 4"], form: BoxForm, size: tuple[int, int]) -> Float32[Array, "n 4"]:
    first, second = numbers[:, :2], numbers[:, 2:]
    if form in ("xywh", "relative_xywh"):
        second = first + second
    elif form == "cxcywh":
        first, second = first - second / 2, first + second / 2
    corners = np.concatenate([first, second], 1)
    return corners if form in ("xyxy", "xywh") else corners * np.array([*size[::-1], *size[::-1]], dtype=np.float32)


def settle(data: Data, name: str, records: Sequence[Record]) -> tuple[Marks, tuple[str, ...]]:
    """How to read the masks and boxes of a source, and notices about it.

    Args:
        data: the form of boxes and the mask values, if set.
        name: name of the source.
        records: some of its images.

    Raises:
        ValueError: the boxes look like a form other than xyxy and no form was set.
    """
    form = data.boxes or "xyxy"
    with quiet():
        boxes = _look_at_boxes(records, name, form, is_named=data.boxes is not None)
        masks = _masks_of(records)
    if data.mask_values is not None:
        values = tuple(np.atleast_1d(data.mask_values).tolist())
    else:
        values = tuple(range(1, 255)) if any(map(_has_void, masks)) else None
    notices = _look_at_masks(masks, name, values, is_named=data.mask_values is not None)
    return Marks(boxes=form, mask_values=values), (*boxes, *notices)


def evenly_spaced(n: int, most: int = 32) -> list[int]:
    """At most so many of `n` rows.

    >>> evenly_spaced(10, 4)
    [0, 3, 6, 9]
    """
    return np.unique(np.linspace(0, n - 1, min(n, most)).astype(int)).tolist()


def _look_at_boxes(records: Sequence[Record], name: str, form: BoxForm, is_named: bool) -> list[str]:
    boxes: list[tuple[Float32[Array, "_ 4"], tuple[int, int]]] = []
    for record in records:
        try:
            if len(numbers := _numbers(record.boxes)):
                boxes.append((numbers, open_image(record.image, 8)[1]))
        except UnreadableImage:
            continue
    if not boxes:
        return []
    count = sum(len(numbers) for numbers, _ in boxes)
    misfits = {other: _misfits(boxes, other) for other in get_args(BoxForm)}
    if form in ("xyxy", "xywh") and all(np.abs(n).max() <= 1.5 and max(size) > 3 for n, size in boxes):
        fitting = [other for other in ("relative", "relative_xywh", "cxcywh") if misfits[other] == 0]
        likely = " or ".join(f"--data.boxes {other}" for other in fitting) or "--data.boxes relative"
        raise ValueError(
            f"boxes of {name} look like fractions of the image, all numbers are between 0 and 1; write {likely} "
            f"(relative: x0 y0 x1 y1, relative_xywh: x y width height, cxcywh: center x, center y, width, height)"
        )
    other = "xywh" if form == "xyxy" else "xyxy"
    doubt = ""
    if form in ("xyxy", "xywh") and misfits[other] < misfits[form]:
        doubt = (
            f"{misfits[form]} of {count} boxes of {name} do not fit their images as {form}, {misfits[other]} as {other}"
        )
        if not is_named:
            raise ValueError(
                f"{doubt}; write --data.boxes xywh if they are [x, y, width, height], or --data.boxes xyxy to leave "
                "out images whose boxes are wrong"
            )
        doubt = f"; {doubt}"
    share = np.mean([_area(_corners(numbers, form, size), size) for numbers, size in boxes])
    return [
        f"boxes are read as {form} and cover {share:.1%} of an image on average ({len(boxes)} looked at){doubt}; "
        "if that is wrong, set data.boxes"
    ]


def _misfits(boxes: Sequence[tuple[Float32[Array, "_ 4"], tuple[int, int]]], form: BoxForm) -> int:
    """Boxes that are reversed, empty, or reach beyond their image by more than a rounding error."""
    count = 0
    for numbers, size in boxes:
        low, high = np.split(_corners(numbers, form, size), 2, axis=1)
        limit = np.array(size[::-1])
        slack = 1 + 0.02 * limit
        count += int(((low >= high) | (low < -slack) | (high > limit + slack)).any(1).sum())
    return count


def _area(corners: Float32[Array, "_ 4"], size: tuple[int, int]) -> float:
    """Fraction of the image inside a box."""
    inside = np.zeros((_GRID, _GRID), dtype=bool)
    x, y = ((np.arange(_GRID) + 0.5) * side / _GRID for side in size[::-1])
    for x0, y0, x1, y1 in corners.tolist():
        inside |= ((y0 <= y) & (y < y1))[:, None] & ((x0 <= x) & (x < x1))
    return float(inside.mean())


def _masks_of(records: Sequence[Record]) -> list[MaskPixels]:
    masks: list[MaskPixels] = []
    for mask in (mask for record in records for mask in record.masks):
        try:
            if (pixels := read_mask(mask)).values.ndim == 2:
                masks.append(pixels)
        except UnreadableImage:
            continue
    return masks


def _has_void(pixels: MaskPixels) -> bool:
    """Whether 255 occurs beside class numbers, as in Pascal VOC and Cityscapes, where it means void."""
    positive = np.unique(pixels.values[pixels.values > 0])
    return bool(pixels.least is None and len(positive) > 1 and positive[-1] == 255 and positive[-2] <= 100)


def _look_at_masks(masks: Sequence[MaskPixels], name: str, chosen: tuple[int, ...] | None, is_named: bool) -> list[str]:
    if not masks:
        return []
    inside = [pixels.inside(chosen) for pixels in masks]
    areas = np.array([part.mean() for part in inside])
    covers = f"the object covers {areas.mean():.1%} of an image on average ({len(masks)} masks looked at)"
    seen = np.unique(np.concatenate([np.unique(pixels.values).astype(np.float64) for pixels in masks]))
    words = _listed(seen)
    if chosen is not None and not is_named:
        return [
            f"masks of {name} hold {words}; 255 beside class numbers is taken as void, every other value but 0 as the "
            f"object; {covers}; to change that, set data.mask_values to the values of the object"
        ]
    if chosen is not None:
        nowhere = "" if areas.any() else ", so none of them marks anything"
        picked = _listed(np.array(chosen))
        return [f"masks of {name} hold {words}; {picked} is the object{nowhere}; {covers}"]
    shades = {pixels.kind for pixels in masks} - {""}
    notices: list[str] = []
    if "alpha" in shades:
        notices.append(f"masks of {name} lie in the alpha channel; opaque is the object; {covers}")
    if "lossy" in shades:
        notices.append(
            f"masks of {name} are stored in a format that blurs their edges (JPEG); from half of the largest value on "
            f"is the object; {covers}"
        )
    positive = seen[seen != 0]
    option = "set data.mask_values to the values of the object"
    if (areas == 1).all():
        hint = " (a trimap has 1 for the object)" if set(seen) in ({1, 2}, {1, 2, 3}) else ""
        whole = f"every mask of {name} covers its whole image, the values are {words} and none is 0"
        return [*notices, f"{whole}; {option}{hint}"]
    if len(positive) > 1 and not shades:
        half = ", such as 128-255 for what is at least half" if len(positive) > 30 else ""
        notices.append(
            f"masks of {name} hold {words}; all but 0 is the object, which covers {areas.mean():.1%} of an "
            f"image on average ({len(masks)} masks looked at); to change that, {option}{half}"
        )
    if areas.mean() > 0.5 and np.mean([part[_CORNERS].all() for part in inside]) >= 0.8:
        notices.append(
            f"masks of {name} look inverted: {covers} and lies in all four corners; "
            "if 0 is the object, set data.mask_values to 0"
        )
    return notices


def _listed(values: Array) -> str:
    """The values in words: all of them, or their number and range.

    >>> _listed(np.array([0, 8, 255])), _listed(np.arange(100))
    ('0, 8, 255', '100 values from 0 to 99')
    """
    if len(values) > 12:
        return f"{len(values)} values from {values.min():g} to {values.max():g}"
    return ", ".join(f"{value:g}" for value in values)
