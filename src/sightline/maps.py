"""Maps as pictures and boxes: resize, normalize, color, overlay, color bar, slices, parts, side by side, PNG, boxes."""

import io
import re
import string
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from sightline.checks import check_tensor
from sightline.facts import old_names, words

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
_SMALLEST = 96  # longer side of an image that is shown, in pixels
_NARROWEST = 0.7  # width of a column as a share of the height of the images


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


def ends(values: Float[Tensor, "h w"], signed: bool = False) -> tuple[float, float] | None:
    """What the first and the last color of `overlay` stand for in a raw map; None if it has no finite value.

    >>> ends(torch.tensor([[1.0, 3.0]])), ends(torch.tensor([[1.0, -3.0]]), signed=True)
    ((1.0, 3.0), (-3.0, 3.0))
    """
    cut = _cut(values, signed)
    cut = cut[cut.isfinite()]
    if not len(cut):
        return None
    low, high = float(cut.min()), float(cut.max())
    largest = max(-low, high)
    return (-largest, largest) if signed else (low, high)


def color_bar(height: int, width: int, signed: bool = False) -> UInt8[Tensor, "3 h w"]:
    """The colors from 0 (left) to 1 (right), from -1 if `signed`.

    >>> color_bar(1, 3)[:, 0].T.tolist()
    [[0, 0, 4], [188, 55, 84], [252, 255, 164]]
    """
    return color(torch.linspace(-1 if signed else 0, 1, width).expand(height, width), signed)


def slices(
    volumes: Float[Tensor, "b c d h w"] | UInt8[Tensor, "b c d h w"], depths: int | Sequence[int] = 5
) -> Float[Tensor, "b c h W"] | UInt8[Tensor, "b c h W"]:
    """Slices of volumes, or of maps over them, next to each other in one flat image each.

    For `overlay` and `side_by_side`: the slices of a map then share its colors. Cut volume and map at the same depths,
    the map `resize`d to the volume. For slices along another axis, move it first: `volumes.movedim(-1, 2)`.

    Args:
        volumes: (b, c, d, h, w), pictures or maps.
        depths: which slices, or how many of them, evenly spaced.

    Raises:
        ValueError: not 5-D, no slices, or more than there are.

    >>> volume = torch.arange(8.0).reshape(1, 1, 4, 1, 2)
    >>> slices(volume, 2), slices(volume, [3])
    (tensor([[[[2., 3., 6., 7.]]]]), tensor([[[[6., 7.]]]]))
    """
    _check_tensor("volumes", volumes, "(b, c, d, h, w)", 5)
    depth = volumes.shape[2]
    is_count = isinstance(depths, int | np.integer)
    chosen = [(2 * i + 1) * depth // (2 * depths) for i in range(depths)] if is_count else list(depths)
    if not 1 <= len(chosen) <= depth or not all(0 <= each < depth for each in chosen):
        wanted = f"1 to {depth} slices" if is_count else f"slices out of 0..{depth - 1}"
        raise ValueError(f"expected {wanted}, got {depths or 'none'}; the volume has {depth}")
    return torch.cat(volumes[:, :, chosen].unbind(2), 3)


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


def channel_weights(
    weights: Mapping[str, Float[Tensor, "b _ _ _"]],
    labels: Int[Tensor, " b"],
    classes: Sequence[str] | None = None,
) -> "Figure":
    """Curves of channel attention, one panel per block: the mean weight of each channel in the images of a class.

    `channel_weights(sl.attention_maps(model, images), labels, classes)` draws the squeeze-and-excitation blocks of a
    network, the first one first, and every other block with one position and several channels (ECA, the channel gate of
    CBAM). "all" is the mean over all these images. Curves that lie on each other: the block weighs its channels alike
    for all classes. The figure is matplotlib's: `figure.savefig("weights.png")`.

    Args:
        weights: block -> its weights (b, c, 1, 1); blocks of other shapes are left out.
        labels: class of each image.
        classes: names of the classes 0, 1, ...; None: their numbers.

    Raises:
        ValueError: no block has one position and several channels, or labels that do not fit images or classes.

    Source: Hu et al., "Squeeze-and-Excitation Networks", CVPR 2018, figure 5.

    >>> weights = torch.tensor([[0.0, 1.0], [0.5, 1.0]])[:, :, None, None]
    >>> figure = channel_weights({"layer1.se": weights}, torch.tensor([1, 0]), ["cat", "dog"])
    >>> {line.get_label(): line.get_ydata().tolist() for line in figure.axes[0].lines}
    {'cat': [0.5, 1.0], 'dog': [0.0, 1.0], 'all': [0.25, 1.0]}
    """
    from matplotlib.figure import Figure

    shown = {name: one for name, one in weights.items() if one.ndim == 4 and one.shape[1] > 1 == one.shape[2:].numel()}
    if not shown:
        shapes = ", ".join(f"{name} {tuple(one.shape)}" for name, one in weights.items())
        raise ValueError(
            f"expected weights of channels (b, c, 1, 1), got {shapes or 'no attention'}; choose a network with a block "
            "such as se, or draw maps of positions with overlay"
        )
    for name, one in shown.items():
        if labels.shape != one.shape[:1]:
            raise ValueError(
                f"expected a label for each of the {len(one)} images of {name!r}, got labels of shape "
                f"{tuple(labels.shape)}"
            )
    present = labels.unique().tolist()
    if not present or (classes is not None and not 0 <= present[0] <= present[-1] < len(classes)):
        count = "any number of" if classes is None else len(classes)
        raise ValueError(f"expected labels of {count} classes for at least one image, got {present or 'none'}")
    columns = min(4, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(max(5.0, 3.4 * columns), 0.6 + 2.6 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
    for panel, (name, one) in zip(panels, shown.items(), strict=False):
        values = one.detach().flatten(1).float().cpu()
        for label in present:
            mean = values[(labels == label).cpu()].mean(0)
            panel.plot(mean.numpy(), linewidth=1, label=str(label) if classes is None else classes[label])
        panel.plot(values.mean(0).numpy(), "--", color="black", linewidth=1, label="all")
        panel.set(title=name, xlabel="channel", ylim=(0, max(1.0, float(values.max()))))
    for panel in panels[len(shown) :]:
        panel.set_axis_off()
    for panel in panels[::columns]:
        panel.set_ylabel("mean weight")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    return figure


def side_by_side(
    images: UInt8[Tensor, "b 3 h w"],
    columns: Mapping[str, Float[Tensor, "b 1 _ _"] | UInt8[Tensor, "b 3 _ _"]],
    opacity: float = 0.5,
    *,
    signed: Collection[str] | None = None,
    scales: bool = False,
    captions: Mapping[str, str] | None = None,
    per_row: int | None = None,
    title: str | None = "image",
    heading: str = "",
) -> UInt8[Tensor, "3 H W"]:
    """One figure: a row per image, first the image, then each column under its title.

    A raw map (b, 1, h, w) is laid over the images; a picture (b, 3, h, w), from `parts` for example, is resized and
    shown as it is. Images of which no side has 96 pixels are enlarged by a whole factor. The columns of tall images are
    wider than these, to leave room for the text. Texts are wrapped; names of methods are written as in the field.

    Args:
        images: as they look, not normalized.
        columns: what to show, by title; `explanation.maps` for example.
        opacity: as for `overlay`.
        signed: titles of the maps whose negative values speak against the class; None: all with a negative value.
        scales: below each map its colors, and what its ends stand for.
        captions: text at the foot of columns, by title.
        per_row: number of columns beside the images; the others go below, beside the images again.
        title: over the images. None: leave out their column; with `opacity` 1 the maps are alone.
        heading: over all of it, the first line in larger letters.

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
    factor = -(-_SMALLEST // max(images.shape[2:]))
    enlarged = images.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    height, width = enlarged.shape[2:]
    wide = max(width, round(_NARROWEST * height), _SMALLEST)
    sides = (wide - width) // 2, -((width - wide) // 2)

    def cell(picture: UInt8[Tensor, "b 3 _ _"], *below: UInt8[Tensor, "b 3 _ _"]) -> UInt8[Tensor, "b 3 _ _"]:
        return torch.cat([F.pad(picture, sides, value=255), *(strip.to(picture.device) for strip in below)], 2)

    cells = [cell(enlarged, *[_scale(None, len(images), wide)] * scales)]
    for name, column in columns.items():
        _check_column(name, column, len(images))
        is_map = column.is_floating_point()
        as_signed = is_map and (bool((column < 0).any()) if signed is None else name in signed)
        if is_map:
            shown = overlay(enlarged, column, opacity, as_signed)[:, 0]
        else:
            mode = "nearest" if column.shape == images.shape else "bilinear"
            shown = resize(column.to(images.device).float(), (height, width), mode).round().to(torch.uint8)
        values = column.detach().cpu() if is_map else None
        cells.append(cell(shown, *[_scale(values, len(images), wide, as_signed)] * scales))
    names, count = list(columns), per_row or max(1, len(columns))
    first = 0 if title is None else 1
    panels = [
        _panel(
            [title or ""] * first + names[i : i + count], cells[:first] + cells[i + 1 : i + 1 + count], captions or {}
        )
        for i in range(0, max(1, len(names)), count)
    ]
    full = panels[0].shape[2]
    if len(panels) > 1:
        panels = [F.pad(panel, (0, full - panel.shape[2], 0, 3 * _GAP), value=255) for panel in panels]
    head = [_heading(heading, full, wide).to(images.device)] if heading else []
    return torch.cat(head + panels, 1)


def _panel(
    titles: Sequence[str], cells: Sequence[UInt8[Tensor, "b 3 h w"]], captions: Mapping[str, str]
) -> UInt8[Tensor, "3 H W"]:
    """Columns of cells below their titles, with captions below those that have one."""
    width = cells[0].shape[3]
    grid = F.pad(torch.stack(list(cells), 1), (0, _GAP, 0, _GAP), value=255)
    grid = grid.permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)
    heads = _texts([words(title) for title in titles], width, _large(width), "md")
    panel = torch.cat([heads.to(grid.device), grid[:, :-_GAP, :-_GAP]], 1)
    if not captions.keys() & set(titles):
        return panel
    foot = _texts([captions.get(name, "") for name in titles], width, _small(width), "ma")
    return torch.cat([panel, foot.to(grid.device)], 1)


def _check_column(name: str, column: Tensor, count: int) -> None:
    _check_tensor(f"column {name!r}", column, f"({count}, 1, h, w)")
    is_map = column.is_floating_point()
    if column.shape != (count, 1 if is_map else 3, *column.shape[-2:]) or not (is_map or column.dtype == torch.uint8):
        raise ValueError(
            f"expected column {name!r} to be a float map ({count}, 1, h, w) or a uint8 picture ({count}, 3, h, w), got "
            f"{column.dtype} {tuple(column.shape)}; "
            + ("cut volumes by maps.slices" if column.ndim == 5 else "choose one target and image rows")
        )


def _scale(
    maps: Float[Tensor, "b 1 h w"] | None, count: int, width: int, signed: bool = False
) -> UInt8[Tensor, "b 3 _ width"]:
    """The colors of each map and what their ends stand for; white for other columns."""
    letters = _small(width)
    bar, line = max(4, width // 40), round(1.5 * letters)
    strips = torch.full((count, 3, _GAP + bar + line, width), 255, dtype=torch.uint8)
    if maps is None:
        return strips

    def fits(texts: Sequence[str]) -> bool:
        return sum(_font(text, letters).getlength(text) for text in texts) + 4 * _GAP <= width

    varies = (variation(maps) >= NEARLY_FLAT)[:, 0].tolist()
    for strip, values, has_colors in zip(strips, maps, varies, strict=True):
        colors = color_bar(bar, width - 2 * _GAP, signed)
        strip[:, _GAP : _GAP + bar, _GAP:-_GAP] = colors if has_colors else UNDEFINED
        picture = Image.new("RGB", (width, line), "white")
        draw = ImageDraw.Draw(picture)
        choices = _end_texts(values[0], signed, has_colors)
        texts = next((one for one in choices if fits(one)), choices[-1])
        places = [(width / 2, "md")] if len(texts) == 1 else [(_GAP, "ld"), (width - _GAP, "rd")]
        for (x, anchor), text in zip(places, texts, strict=True):
            draw.text((x, line), text, "black", _font(text, letters), anchor=anchor)
        strip[:, -line:] = torch.from_numpy(np.array(picture)).movedim(-1, 0)
    return strips


def _end_texts(values: Float[Tensor, "h w"], signed: bool, has_colors: bool) -> list[tuple[str, ...]]:
    """What to write below the colors of a map, the longest first: what the first and the last one stand for."""
    both = ends(values, signed)
    if both is None:
        return [("no finite value",)]
    low, high = both
    values = values[values.isfinite()]
    digits = next((n for n in range(2, 9) if f"{low:.{n}g}" != f"{high:.{n}g}"), 2)
    first, last = (f"{end:.{digits}g}".replace("-", "−") for end in (low, high))
    if not has_colors:
        flat = ("flat", last) if low == high else ("nearly flat", f"{first} to {last}")
        return [(": ".join(flat),), (flat[1],)]
    is_beyond = float((values.abs() if signed else values).max()) > high
    if signed:
        return [(f"against: {'≤ ' * is_beyond}{first}", f"for: {'≥ ' * is_beyond}{last}"), (first, last)]
    return [(f"lowest: {first}", f"≥ {last}" if is_beyond else f"highest: {last}"), (first, last)]


def _large(width: int) -> int:
    """Size of the letters above a column of this width."""
    return max(12, 8 + width // 36)


def _small(width: int) -> int:
    """Size of the letters below a map of this width."""
    return max(10, 8 + width // 64)


def _heading(text: str, width: int, column: int) -> UInt8[Tensor, "3 h width"]:
    """Lines over a whole figure, the first one in larger letters."""
    lines: list[tuple[str, ImageFont.FreeTypeFont]] = []
    for number, line in enumerate(text.splitlines()):
        letters = _small(column) if number else round(1.3 * _large(column))
        font = _font(line, letters)
        lines += [(part, font) for part in _wrapped(line, font, width - 2 * _GAP)]
    tops = np.cumsum([_GAP, *(round(1.5 * font.size) for _, font in lines)]).tolist()
    picture = Image.new("RGB", (width, tops[-1] + 2 * _GAP), "white")
    draw = ImageDraw.Draw(picture)
    for top, (line, font) in zip(tops, lines, strict=False):
        draw.text((_GAP, top), line, "black", font)
    return torch.from_numpy(np.array(picture)).movedim(-1, 0)


def _texts(texts: Sequence[str], width: int, letters: int, anchor: Literal["ma", "md"]) -> UInt8[Tensor, "3 h w"]:
    """One text per column, wrapped, with the first ("ma") or last ("md") lines at one height."""
    fonts = [_font(text, letters) for text in texts]
    texts = ["\n".join(_wrapped(text, font, width - 2 * _GAP)) for text, font in zip(texts, fonts, strict=True)]
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    boxes = [ruler.multiline_textbbox((0, 0), text, font) for text, font in zip(texts, fonts, strict=True)]
    height = _GAP + round(max(box[3] for box in boxes))
    picture = Image.new("RGB", (len(texts) * (width + _GAP) - _GAP, height + _GAP), "white")
    draw = ImageDraw.Draw(picture)
    for i, (text, font) in enumerate(zip(texts, fonts, strict=True)):
        at = i * (width + _GAP) + width / 2, height if anchor == "md" else _GAP
        draw.multiline_text(at, text, "black", font, anchor=anchor, align="center")
    return torch.from_numpy(np.array(picture)).movedim(-1, 0)


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines that are no wider than this; a longer word is cut after a dot or the like, or else anywhere."""
    lines: list[str] = []
    for paragraph in text.splitlines():
        line = ""
        for word in paragraph.split(" "):
            whole = f"{line} {word}" if line else word
            if font.getlength(whole) <= width:
                line = whole
                continue
            lines += [line] if line else []
            line = ""
            pieces = [word] if font.getlength(word) <= width else re.split(r"(?<=[._@/-])", word)
            for piece in chain.from_iterable(p if font.getlength(p) > width else [p] for p in pieces):
                if line and font.getlength(line + piece) > width:
                    lines.append(line)
                    line = ""
                line += piece
        lines.append(line)
    return lines


def is_writable(text: str) -> bool:
    """Whether a font on this machine has all letters of a text, so that `side_by_side` can write it.

    >>> is_writable("chat noir, кошка"), is_writable("\uf8ff")
    (True, False)
    """
    return _font_file(text) is not None


def _font(text: str, letters: int) -> ImageFont.FreeTypeFont:
    """The font for a text: DejaVu Sans, or else the first one here that has all of its letters."""
    return _loaded(_font_file(text) or _usual_font(), letters)


def _font_file(text: str) -> Path | None:
    wanted = {ord(letter) for letter in text + string.ascii_letters + string.digits if not letter.isspace()}
    usual = _usual_font()
    if wanted <= _letters_in(usual):
        return usual
    return next((file for file in _other_fonts() if wanted <= _letters_in(file)), None)


_loaded = cache(ImageFont.truetype)


@cache
def _usual_font() -> Path:
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


@cache
def _other_fonts() -> list[Path]:
    from matplotlib.font_manager import findSystemFonts

    return sorted(map(Path, findSystemFonts()))


@cache
def _letters_in(file: Path) -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(FT2Font(file).get_charmap())
    except RuntimeError:  # no font that FreeType reads
        return frozenset()


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
    # files are 4 % larger than with `optimize`, and written in a seventh of the time
    Image.fromarray(image.movedim(0, -1).cpu().numpy()).save(file, "PNG", compress_level=4)
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


def _check_tensor(name: str, value: Tensor, shape: str, axes: int | None = None) -> None:
    """Report a wrong argument before PyTorch does."""
    check_tensor(f"{name} as a tensor {shape}", value)
    if axes is not None and value.ndim != axes:
        hint = "cut volumes by maps.slices" if value.ndim == 5 else "index or unsqueeze it"
        raise ValueError(f"expected {name} of shape {shape}, got {tuple(value.shape)}; {hint}")


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
