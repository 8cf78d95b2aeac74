"""Maps as pictures and boxes: resize, normalize, color, overlay, color bar, parts, side by side, PNG, boxes."""

import io
import textwrap
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from sightline.facts import old_names

UNDEFINED = 128
"""Gray level of a value that is not finite, and of a map that is nearly flat; no color of the map is gray."""
ROUNDING = 1e-6
"""Variation up to which a float32 map is flat: its positions differ by rounding errors."""
NEARLY_FLAT = 0.01
"""Variation below which a map is nearly flat: all positions have the same value to within one percent."""
COARSE = 7
"""Positions along either side below which a map enlarged to its image suggests more detail than it has."""


Mode = Literal["bilinear", "nearest"]

_GRAY = (0.299, 0.587, 0.114)  # brightness of red, green and blue (ITU-R BT.601)
_SHARE = 100  # one position of so many may lie beyond the colors of an overlay
_GAP = 4  # pixels between the cells of a figure
_SMALLEST, _LONGEST = 96, 2048  # side of an image that is shown, in pixels


@cache
def _palette(name: str) -> UInt8[Tensor, "256 3"]:
    from matplotlib import colormaps

    return torch.tensor(
        [[round(255 * channel) for channel in colormaps[name](i)[:3]] for i in range(256)], dtype=torch.uint8
    )


def resize(
    maps: Float[Tensor, "b t *grid"], size: tuple[int, ...], mode: Mode = "bilinear"
) -> Float[Tensor, "b t *new_grid"]:
    """Maps at another (height, width), or 3-D maps at another (depth, height, width).

    "bilinear": linear along each axis between pixel centers (`align_corners=False`), averaged if the map shrinks.
    "nearest": each new pixel takes the old one that holds its center, also if the map shrinks.

    Raises:
        TypeError: the maps are not a tensor.
        ValueError: `size` does not have one side per axis of the map, or one is below 1; an unknown `mode`.

    >>> resize(torch.tensor([[[[0.0, 1.0]]]]), (1, 4))
    tensor([[[[0.0000, 0.2500, 0.7500, 1.0000]]]])
    """
    if mode not in get_args(Mode):
        raise ValueError(f"expected mode to be one of {', '.join(get_args(Mode))}; got {mode!r}")
    _check_tensor("maps", maps, "(b, t, h, w)")
    if not isinstance(size, Sequence) or len(size) != maps.ndim - 2 or len(size) not in (2, 3):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(
            f"expected a size with one side for each axis of the map after (b, t), 2 or 3 of them, got {size} for maps "
            f"of shape {tuple(maps.shape)}; give (height, width) or (depth, height, width)"
        )
    if min(size) < 1:
        raise ValueError(
            f"expected a size of at least {' x '.join('1' * len(size))} pixels, got {' x '.join(map(str, size))}; "
            f"give ({'depth, ' * (len(size) == 3)}height, width)"
        )
    if len(size) == 3:  # the kernels are products over the axes: first height and width, then depth
        slices = resize(maps.flatten(1, 2), size[1:], mode).unflatten(1, maps.shape[1:3])
        return resize(slices.flatten(3), (size[0], size[1] * size[2]), mode).unflatten(3, size[1:])
    if mode == "nearest":
        return F.interpolate(maps, size=size, mode="nearest-exact")
    shrinks = size[0] < maps.shape[-2] or size[1] < maps.shape[-1]
    resized = F.interpolate(maps, size=size, mode="bilinear", align_corners=False, antialias=shrinks)
    # rounding may leave the map's range, and would give a flat map a highest pixel
    undefined = maps.isnan()
    low = maps.where(~undefined, torch.inf).amin((2, 3), keepdim=True)
    return resized.clamp(low, maps.where(~undefined, -torch.inf).amax((2, 3), keepdim=True))


def variation(maps: Float[Tensor, "b t *grid"]) -> Float[Tensor, "b t"]:
    """Highest less lowest finite value of each map, as a share of its largest absolute value; 0 for a map of zeros.

    0 counts as a value that means something: no weight, no evidence. A map that reaches 0, or has values on both sides
    of it, varies by 1 at least, however small its values are, and adding a constant to a map makes it flatter.

    >>> variation(torch.tensor([[[[0.50, 0.51]], [[0.0, 1e-9]], [[-1.0, 1.0]], [[7.0, 7.0]]]]))
    tensor([[0.0196, 1.0000, 2.0000, 0.0000]])
    """
    values = maps.flatten(2) / 2  # the difference of two extreme values would overflow
    finite = values.isfinite()
    high, low = values.where(finite, -torch.inf).amax(2), values.where(finite, torch.inf).amin(2)
    largest = values.where(finite, 0.0).abs().amax(2)
    return ((high - low) / largest).where(largest > 0, 0.0)


def normalize(maps: Float[Tensor, "*b h w"], signed: bool = False) -> Float[Tensor, "*b h w"]:
    """Each map stretched to [0, 1], order kept: its lowest finite value becomes 0, its highest 1.

    `signed`: divided by its largest absolute value instead, so that it lies in [-1, 1] and 0 stays 0. For maps whose
    negative values speak against the class (input x gradient, integrated gradients, guided methods, LRP, CAM).

    A flat map (signed: a map of zeros) becomes 0, a value that is not finite NaN.

    >>> normalize(torch.tensor([[-2.0, 0.0, 1.0]]), signed=True)
    tensor([[-1.0000,  0.0000,  0.5000]])
    >>> normalize(torch.tensor([[[-2.0, 0.0], [1.0, 2.0]], [[7.0, 7.0], [7.0, 7.0]]]))
    tensor([[[0.0000, 0.5000],
             [0.7500, 1.0000]],
    <BLANKLINE>
            [[0.0000, 0.0000],
             [0.0000, 0.0000]]])
    """
    finite = maps.isfinite()
    if signed:
        largest = maps.abs().where(finite, 0.0).amax((-2, -1), keepdim=True)
        return (maps / largest).where(largest > 0, 0.0).where(finite, torch.nan)
    halves = maps / 2  # the difference of two extreme values would overflow
    low = halves.where(finite, torch.inf).amin((-2, -1), keepdim=True)
    high = halves.where(finite, -torch.inf).amax((-2, -1), keepdim=True)
    return ((halves - low) / (high - low)).where(high > low, 0.0).where(finite, torch.nan)


def color(maps: Float[Tensor, "*b h w"], signed: bool = False) -> UInt8[Tensor, "*b 3 h w"]:
    """RGB of values in [0, 1] on matplotlib's perceptually uniform `inferno` (black, red, yellow); NaN is gray.

    `signed`: of values in [-1, 1] on the diverging `RdBu_r` (blue is negative, white is 0, red is positive).

    Raises:
        ValueError: a value outside [0, 1], or [-1, 1] if `signed`.

    >>> color(torch.tensor([[0.0, 0.5, 1.0]]))[:, 0].T.tolist()
    [[0, 0, 4], [188, 55, 84], [252, 255, 164]]
    """
    lowest = -1 if signed else 0
    if ((maps < lowest) | (maps > 1)).any():
        raise ValueError(
            f"expected values in [{lowest}, 1], got {maps.min():.4g} to {maps.max():.4g}; "
            f"call maps.normalize{'(..., signed=True)' * signed} first"
        )
    defined = ~maps.isnan()
    index = ((maps.where(defined, 0.0) - lowest) * (256 / (1 - lowest))).long().clamp(max=255)
    rgb = _palette("RdBu_r" if signed else "inferno").to(maps.device)[index].movedim(-1, -3)
    return rgb.where(defined.unsqueeze(-3), torch.tensor(UNDEFINED, dtype=torch.uint8, device=maps.device))


def overlay(
    images: UInt8[Tensor, "b 3 h w"],
    maps: Float[Tensor, "b t map_h map_w"],
    opacity: float = 0.5,
    signed: bool = False,
) -> UInt8[Tensor, "b t 3 h w"]:
    """Raw maps, each stretched to its own range and resized, laid over their images with an `opacity` of 0 to 1.

    The images become gray: every color is the map's, also on stained tissue. `signed` as in `normalize` and `color`:
    for a map with negative values, whose 0 would otherwise get any color.

    Of 100 positions the one with the highest value (signed: farthest from 0) may lie beyond the scale and gets its last
    color, where a few extreme pixels would otherwise leave none for the others; but no map is brightened more than
    tenfold, so that rounding errors stay dark. Maps of fewer than 100 positions have their whole range on the scale.

    A map that is flat or nearly so (`variation` below 1 %) is gray: colors would draw differences that mean nothing.

    Raises:
        TypeError: images that are not uint8, or not a tensor.
        ValueError: `opacity` outside [0, 1]; shapes other than those of images and maps, or different numbers of them.

    >>> black = torch.zeros(1, 3, 1, 1, dtype=torch.uint8)
    >>> overlay(black, torch.tensor([[[[0.0, 1.0]]]]), opacity=1.0).flatten().tolist()
    [188, 55, 84]
    """
    if not 0 <= opacity <= 1:
        raise ValueError(f"expected an opacity from 0 to 1, got {opacity}; 0 shows the image alone, 1 the map alone")
    _check_images(images)
    _check_tensor("maps", maps, "(b, t, h, w)", 4)
    if len(maps) != len(images):
        raise ValueError(
            f"expected as many maps as images, got {len(maps)} and {len(images)}; pick the same rows of both"
        )
    height, width = images.shape[-2:]
    maps = maps.to(images.device)
    intensities = resize(normalize(_cut(maps, signed), signed), (height, width)).clamp(-1 if signed else 0, 1)
    varies = (variation(maps) >= NEARLY_FLAT)[:, :, None, None]
    above = color(intensities.where(varies, torch.nan), signed).float()
    gray = torch.einsum("bchw,c->bhw", images.float(), above.new_tensor(_GRAY))
    return torch.lerp(gray[:, None, None], above, opacity).round().to(torch.uint8)


def _cut(maps: Float[Tensor, "*b h w"], signed: bool) -> Float[Tensor, "*b h w"]:
    """Maps without their highest 1 % (signed: farthest from 0), which are clipped to the end of the scale."""
    finite = maps.isfinite()
    values = (maps.abs() if signed else maps).where(finite, -torch.inf)
    highest = values.flatten(-2).topk(maps.shape[-2] * maps.shape[-1] // _SHARE + 1).values.unsqueeze(-1)
    low = 0 * highest[..., :1, :] if signed else maps.where(finite, torch.inf).amin((-2, -1), keepdim=True)
    end = torch.maximum(highest[..., -1:, :], 0.9 * low + 0.1 * highest[..., :1, :])
    return maps.clamp(-end if signed else low, end).where(finite, torch.nan)


def color_bar(height: int, width: int, signed: bool = False) -> UInt8[Tensor, "3 h w"]:
    """The colors from 0 (left) to 1 (right), from -1 if `signed`.

    >>> color_bar(1, 3)[:, 0].T.tolist()
    [[0, 0, 4], [188, 55, 84], [252, 255, 164]]
    """
    return color(torch.linspace(-1 if signed else 0, 1, width).expand(height, width), signed)


def parts(maps: Float[Tensor, "b k h w"], norm: Float[Tensor, "b 1 h w"] | None = None) -> UInt8[Tensor, "b 3 h w"]:
    """Several attention maps in one picture: red, green, blue = maps 1, 2, 3, brightness = norm of the features.

    Each map is divided by its maximum, the norm by its own, and the two are multiplied. Maps after the third are not
    shown, colors without a map stay 0, a pixel with a value that is not finite is gray. For a model that ends in a
    BR-NPA block: `parts(sl.attention_maps(model, images)[block], explanation["activation_map"])`, where the explanation
    is `sl.explain(model, images, methods=["activation_map"])`.

    Raises:
        ValueError: a negative value, or maps and norm of different sizes.

    Source: Gomez et al. 2021 (2106.02566), the figures of BR-NPA.

    Differs: the authors' code keeps maps and norm in 8 bits, whose product wraps around; here the result is rounded.

    >>> maps = torch.tensor([[[[0.25, 0.5]], [[3.0, 0.0]]]])
    >>> parts(maps, norm=torch.tensor([[[[8.0, 4.0]]]]))[0, :, 0].T.tolist()
    [[128, 255, 0], [128, 0, 0]]
    """
    if norm is not None and norm.shape != (len(maps), 1, *maps.shape[2:]):
        raise ValueError(
            f"expected a norm of shape {(len(maps), 1, *maps.shape[2:])}, got {tuple(norm.shape)}; "
            "read it at the layer that feeds the block"
        )
    if (maps < 0).any() or (norm is not None and (norm < 0).any()):
        raise ValueError("expected maps and a norm of at least 0, got a negative value; show signed maps with overlay")
    channels = normalize(maps[:, :3], signed=True)
    if norm is not None:
        channels = channels * normalize(norm, signed=True)
    rgb = F.pad(channels, (0, 0, 0, 0, 0, 3 - channels.shape[1]))
    undefined = rgb.isnan().any(1, keepdim=True)
    return (rgb.float() * 255).round().masked_fill(undefined, UNDEFINED).to(torch.uint8)


def side_by_side(
    images: UInt8[Tensor, "b 3 h w"],
    columns: Mapping[str, Float[Tensor, "b 1 _ _"] | UInt8[Tensor, "b 3 _ _"]],
    opacity: float = 0.5,
    *,
    signed: Collection[str] | None = None,
    scales: bool = False,
    captions: Mapping[str, str] | None = None,
    per_row: int | None = None,
    title: str = "image",
) -> UInt8[Tensor, "3 H W"]:
    """One figure: a row per image, first the image, then each column under its title.

    A raw map (b, 1, h, w) is laid over the images; a picture (b, 3, h, w), from `parts` for example, is resized and
    shown as it is. Images below 96 pixels are enlarged by a whole factor, to 2,048 pixels at most. Titles are wrapped,
    with spaces for underscores.

    Args:
        images: as they look, not normalized.
        columns: what to show, by title; `explanation.maps` for example.
        opacity: as for `overlay`.
        signed: titles of the maps whose negative values speak against the class; None: all with a negative value.
        scales: below each map its colors, with the first and last value.
        captions: text at the foot of columns, by title.
        per_row: number of columns beside the images; the others go below, beside the images again.
        title: over the images.

    Raises:
        TypeError: images that are not uint8, or not a tensor.
        ValueError: a column that is neither, or not of as many rows as there are images; a title in `signed`
            or `captions` that is not a column; `opacity` outside [0, 1].

    >>> images = torch.zeros(2, 3, 100, 100, dtype=torch.uint8)
    >>> side_by_side(images, {"Grad-CAM": torch.zeros(2, 1, 7, 7)}).shape[2]
    204
    """
    _check_images(images)
    for what, names in (("signed columns", signed or ()), ("captions of columns", captions or ())):
        if unknown := [name for name in names if name not in columns]:
            raise ValueError(f"expected {what} out of {', '.join(columns)}; got {unknown[0]!r}")
    factor = max(1, min(-(-_SMALLEST // min(images.shape[2:])), _LONGEST // max(images.shape[2:])))
    enlarged = images.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    blank = _scale(None, len(images), enlarged.shape[3])
    first = [torch.cat([enlarged, blank.to(images.device)], 2) if scales else enlarged]
    cells: list[UInt8[Tensor, "b 3 _ _"]] = []
    for name, column in columns.items():
        _check_column(name, column, len(images))
        is_map = column.is_floating_point()
        as_signed = is_map and (bool((column < 0).any()) if signed is None else name in signed)
        if is_map:
            cell = overlay(enlarged, column, opacity, as_signed)[:, 0]
        else:
            mode = "nearest" if column.shape == images.shape else "bilinear"
            cell = resize(column.to(images.device).float(), enlarged.shape[2:], mode).round().to(torch.uint8)
        scale = _scale(column.detach() if is_map else None, len(images), enlarged.shape[3], as_signed)
        cells.append(torch.cat([cell, scale.to(cell.device)], 2) if scales else cell)
    names, count = list(columns), per_row or max(1, len(columns))
    panels = [
        _panel([title, *names[i : i + count]], first + cells[i : i + count], captions or {})
        for i in range(0, max(1, len(names)), count)
    ]
    if len(panels) == 1:
        return panels[0]
    width = panels[0].shape[2]
    return torch.cat([F.pad(panel, (0, width - panel.shape[2], 0, 3 * _GAP), value=255) for panel in panels], 1)


def _panel(
    titles: Sequence[str], cells: Sequence[UInt8[Tensor, "b 3 h w"]], captions: Mapping[str, str]
) -> UInt8[Tensor, "3 H W"]:
    """Columns of cells below their titles, with captions below those that have one."""
    width = cells[0].shape[3]
    grid = F.pad(torch.stack(list(cells), 1), (0, _GAP, 0, _GAP), value=255)
    grid = grid.permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)
    heads = _texts([title.replace("_", " ") for title in titles], width, max(12, width // 14), "md")
    panel = torch.cat([heads.to(grid.device), grid[:, :-_GAP, :-_GAP]], 1)
    if not captions.keys() & set(titles[1:]):
        return panel
    foot = _texts(["", *(captions.get(name, "") for name in titles[1:])], width, _letters(width), "ma")
    return torch.cat([panel, foot.to(grid.device)], 1)


def _check_column(name: str, column: Tensor, count: int) -> None:
    _check_tensor(f"column {name!r}", column, f"({count}, 1, h, w)")
    is_map = column.is_floating_point()
    if column.shape != (count, 1 if is_map else 3, *column.shape[-2:]) or not (is_map or column.dtype == torch.uint8):
        raise ValueError(
            f"expected column {name!r} to be a float map ({count}, 1, h, w) or a uint8 picture ({count}, 3, h, w), got "
            f"{column.dtype} {tuple(column.shape)}; choose one target and image rows"
        )


def _scale(
    maps: Float[Tensor, "b 1 h w"] | None, count: int, width: int, signed: bool = False
) -> UInt8[Tensor, "b 3 _ width"]:
    """The colors of each map with the first and last value; white for other columns."""
    letters = _letters(width)
    font = ImageFont.load_default(letters)
    bar, line = max(4, width // 40), round(1.5 * letters)
    strips = torch.full((count, 3, _GAP + bar + line, width), 255, dtype=torch.uint8)
    if maps is None:
        return strips
    varies = (variation(maps) >= NEARLY_FLAT)[:, :, None, None].cpu()
    strips[:, :, _GAP : _GAP + bar] = color_bar(bar, width, signed).where(varies, UNDEFINED)
    for strip, values in zip(strips, _cut(maps, signed).cpu(), strict=True):
        values = values[values.isfinite()]
        ends = (float(values.min()), float(values.max())) if len(values) else (torch.nan, torch.nan)
        low, high = (-max(map(abs, ends)), max(map(abs, ends))) if signed else ends
        digits = next((n for n in range(2, 9) if f"{low:.{n}g}" != f"{high:.{n}g}"), 2)
        picture = Image.new("RGB", (width, line), "white")
        draw = ImageDraw.Draw(picture)
        draw.text((_GAP, line), f"{low:.{digits}g}", "black", font, anchor="ld")
        draw.text((width - _GAP, line), f"{high:.{digits}g}", "black", font, anchor="rd")
        strip[:, -line:] = torch.from_numpy(np.array(picture)).movedim(-1, 0)
    return strips


def _letters(width: int) -> int:
    """Size of the letters below a map of this width."""
    return max(10, width // 22)


def _texts(texts: Sequence[str], width: int, letters: int, anchor: Literal["ma", "md"]) -> UInt8[Tensor, "3 h w"]:
    """One text per column, wrapped, with the first ("ma") or last ("md") lines at one height."""
    font = ImageFont.load_default(letters)

    def wrapped(text: str) -> str:
        for length in range(len(text), 1, -1):
            lines = textwrap.fill(text, length, break_on_hyphens=False)
            if max(map(font.getlength, lines.splitlines()), default=0) <= width - _GAP:
                return lines
        return text

    texts = [wrapped(text) for text in texts]
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    height = _GAP + round(max(ruler.multiline_textbbox((0, 0), text, font)[3] for text in texts))
    picture = Image.new("RGB", (len(texts) * (width + _GAP) - _GAP, height + _GAP), "white")
    draw = ImageDraw.Draw(picture)
    for i, text in enumerate(texts):
        at = i * (width + _GAP) + width / 2, height if anchor == "md" else _GAP
        draw.multiline_text(at, text, "black", font, anchor=anchor, align="center")
    return torch.from_numpy(np.array(picture)).movedim(-1, 0)


def png(image: UInt8[Tensor, "3 h w"]) -> bytes:
    """One RGB image as the bytes of a PNG file.

    Raises:
        TypeError: not a uint8 tensor.
        ValueError: not of shape (3, h, w).

    >>> png(color_bar(1, 2))[1:4]
    b'PNG'
    """
    _check_images(image, "one image", "(3, h, w)")
    file = io.BytesIO()
    Image.fromarray(image.movedim(0, -1).cpu().numpy()).save(file, "PNG", optimize=True)
    return file.getvalue()


def boxes(maps: Float[Tensor, "b t h w"], threshold: float = 0.2) -> Int[Tensor, "b t 4"]:
    """Box around the largest connected component of the cells with max(map, 0) / its maximum >= threshold.

    (x_min, y_min, x_max, y_max) in cells of the map, half-open: x_max - x_min is the width. Cells connect to their 8
    neighbors, size is the number of cells; of equally large components the one with the higher peak wins, then the
    first in reading order. A map without a positive value, or with one that is not finite, has no component: its box
    is empty (0, 0, 0, 0). A flat positive map gives the whole map. For a box in pixels `resize` the map first.

    Raises:
        TypeError: the maps are not a tensor.
        ValueError: `threshold` outside [0, 1]; maps of another shape.

    Source: Zhou et al. 2016 (1512.04150), section 3.2: 20 % of the maximum for CAM; Selvaraju et al. 2017 (1610.02391)
    take 15 % for Grad-CAM. 8 neighbors and the empty box as in the evaluation code of Choe et al. 2020 (2001.07437).

    Differs: Choe's code quantizes the map to 8 bits, compares with >, and measures the area within the outer contour.

    >>> boxes(torch.tensor([[[[0.0, 5.0, 0.0, 0.0], [4.0, 0.0, 0.0, 9.0]]]])).tolist()
    [[[0, 0, 2, 2]]]
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"expected a threshold from 0 to 1, got {threshold}; it is a share of the map's maximum")
    _check_tensor("maps", maps, "(b, t, h, w)", 4)
    values = maps.detach().flatten(0, 1).clamp(min=0)
    highest = values.amax((1, 2), keepdim=True)
    is_finite = maps.isfinite().flatten(0, 1).flatten(1).all(1)[:, None, None]
    inside = (values / highest >= threshold) & (highest > 0) & is_finite
    chosen = inside.cpu()
    for cells, peaks in zip(chosen.numpy(), values.double().cpu().numpy(), strict=True):
        _keep_largest(cells, peaks)
    return box_around(chosen.to(maps.device)).unflatten(0, maps.shape[:2])


def _keep_largest(inside: Bool[np.ndarray, "h w"], values: Float[np.ndarray, "h w"]) -> None:
    """Clear all cells except the largest connected component's."""
    from scipy import ndimage

    labels = np.empty(inside.shape, dtype=np.int32)
    ndimage.label(inside, np.ones((3, 3)), labels)
    sizes = np.bincount(labels.ravel())
    peaks = ndimage.maximum(values, labels, range(len(sizes)))
    best = max(range(1, len(sizes)), key=lambda label: (sizes[label], peaks[label]), default=0)
    inside &= labels == best


def box_around(inside: Bool[Tensor, "*b h w"]) -> Int[Tensor, "*b 4"]:
    """Box (x_min, y_min, x_max, y_max), half-open, around all cells inside; (0, 0, 0, 0) if there is none.

    >>> box_around(torch.tensor([[False, True, True], [False, False, True]])).tolist()
    [1, 0, 3, 2]
    """
    height, width = inside.shape[-2:]
    columns, rows = inside.any(-2).int(), inside.any(-1).int()
    box = [columns.argmax(-1), rows.argmax(-1), width - columns.flip(-1).argmax(-1), height - rows.flip(-1).argmax(-1)]
    return torch.stack(box, -1) * inside.any((-2, -1)).unsqueeze(-1)


def _check_tensor(name: str, value: object, shape: str, axes: int | None = None) -> None:
    """Report a wrong argument before PyTorch does."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"expected {name} as a tensor {shape}, got {type(value).__name__}; torch.from_numpy makes one of an array"
        )
    if axes is not None and value.ndim != axes:
        raise ValueError(f"expected {name} of shape {shape}, got {tuple(value.shape)}; index or unsqueeze it")


def _check_images(images: Tensor, name: str = "images", shape: str = "(b, 3, h, w)") -> None:
    axes = shape.count(",") + 1
    _check_tensor(name, images, shape, axes)
    if images.shape[-3] != 3:
        hint = "move the channels: .movedim(-1, -3)" if images.shape[-1] == 3 else "give red, green and blue"
        raise ValueError(f"expected {name} of shape {shape}, got {tuple(images.shape)}; {hint}")
    if images.dtype != torch.uint8:
        raise TypeError(
            f"expected {name} as bytes, torch.uint8 from 0 to 255, got {images.dtype}; give the images before "
            "normalizing, or (255 * images).round().byte() of values from 0 to 1"
        )


__getattr__ = old_names("sightline.maps")
