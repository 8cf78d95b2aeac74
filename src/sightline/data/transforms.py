"""Random changes of training images, whole batches at once on their own device; the random numbers are arguments."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int64, Shaped, UInt8
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from sightline.recipe import Augment

DRAWS = 14
BLOCK = 2**17  # pixels that a core's cache holds, with all that is made of them on the way
Boxes = list[Float32[Tensor, "_ 4"]]


def draws(seed: int, epoch: int, places: Int64[Tensor, " b"], n: int) -> Float32[Tensor, "b n"]:
    """Uniform numbers in [0, 1), n for each place; each depends on (seed, epoch, place, column) alone.

    They are the same bits on every device.
    Source: SplitMix64 (Steele, Lea and Flood 2014, doi 10.1145/2660193.2660195).
    Differs: its counter is started by the place and then, for the columns, by what that gives.

    >>> [round(x, 4) for x in draws(0, 0, torch.tensor([7]), 2)[0].tolist()]
    [0.7497, 0.6237]
    """
    key = int(np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64).view(np.int64)[0])
    step = 0x9E3779B97F4A7C15 - 2**64
    columns = torch.arange(1, n + 1, device=places.device)
    bits = _mixed(_mixed(places * step + key)[:, None] + columns * step)
    return _shifted(bits, 40).float() / 2**24


def _mixed(x: Int64[Tensor, "..."]) -> Int64[Tensor, "..."]:
    x = (x ^ _shifted(x, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ _shifted(x, 27)) * (0x94D049BB133111EB - 2**64)
    return x ^ _shifted(x, 31)


def _shifted(x: Int64[Tensor, "..."], bits: int) -> Int64[Tensor, "..."]:
    """To the right, with zeros from the left, as if x had no sign."""
    return (x >> bits) & (2 ** (64 - bits) - 1)


def augment(
    images: UInt8[Tensor, "b 3 h w"],
    masks: Bool[Tensor, "b 1 h w"] | None,
    boxes: Boxes | None,
    what: Augment,
    uniform: Float32[Tensor, "b 14"],
    fill: tuple[int, int, int],
) -> tuple[UInt8[Tensor, "b 3 h w"], Bool[Tensor, "b 1 h w"] | None, Boxes | None]:
    """Change each image by its own row of `uniform`, numbers in [0, 1); masks and boxes follow.

    Pixels outside the image are black, a cutout becomes `fill`. Boxes that leave the image are dropped. Nothing is
    changed in place, and, without boxes, the host never waits for the device.
    """
    # as many for each image as the fullest has, the rest without area; (x, y) of first and last corner
    corners = pad_sequence(boxes, batch_first=True).unflatten(2, (2, 2)) if boxes else None
    if what.scale < 1:
        window = _Window.drawn(what, uniform, *images.shape[-2:])
        images = window.enlarged(images)
        masks = None if masks is None else window.nearest(masks)
        corners = None if corners is None else window.around(corners)
    if what.crop or what.flip or what.rotate:
        move = _Move.drawn(what, uniform, *images.shape[-2:])
        images = move.pixels(images)
        masks = None if masks is None else move.pixels(masks)
        corners = None if corners is None else move.corners(corners)
    if what.color:
        images = _colored(images, 1 + what.color * (2 * uniform[:, 9:12] - 1))
    if what.cutout:
        images = _cut_out(images, what.cutout, uniform[:, 12:14], fill)
    if corners is not None:
        full = (corners[:, :, 1] > corners[:, :, 0]).all(2)
        boxes = list(corners[full].flatten(1).split(full.sum(1).tolist()))
    return images, masks, boxes


class _Window(NamedTuple):
    """A random part of each image, which is enlarged to the size of the whole."""

    start: Int64[Tensor, "b 2"]
    """Left and top, in pixels."""
    size: Int64[Tensor, "b 2"]
    """Its width and height."""
    whole: tuple[int, int]
    """Width and height of the image."""

    @classmethod
    def drawn(cls, what: Augment, uniform: Float32[Tensor, "b 14"], height: int, width: int) -> "_Window":
        area = what.scale + (1 - what.scale) * uniform[:, 0]
        ratio = (4 / 3) ** (2 * uniform[:, 1] - 1)
        h = (height * (area / ratio).sqrt()).round().clamp(1, height)
        w = (width * (area * ratio).sqrt()).round().clamp(1, width)
        left, top = (width - w + 1) * uniform[:, 3], (height - h + 1) * uniform[:, 2]
        return cls(torch.stack([left, top], 1).long(), torch.stack([w, h], 1).long(), (width, height))

    def enlarged(self, images: UInt8[Tensor, "b 3 h w"]) -> UInt8[Tensor, "b 3 h w"]:
        """Bilinear, rounded after each axis; nothing shrinks, so nothing needs smoothing."""
        block = max(BLOCK // (self.whole[0] * self.whole[1]), 1) if images.device.type == "cpu" else len(images)
        taps = [tap.split(block) for axis in (0, 1) for tap in self._taps(axis)]
        return torch.cat([_blended(*part) for part in zip(images.split(block), *taps, strict=True)])

    def _taps(self, axis: int) -> tuple[Int64[Tensor, "b n"], Int64[Tensor, "b n"], Float32[Tensor, "b n"]]:
        """For each new pixel the two old ones that it lies between, and the weight of the second."""
        start, size, n = self.start[:, axis, None], self.size[:, axis, None], self.whole[axis]
        middle = torch.arange(n, device=start.device) + 0.5
        place = (middle * (size / n) - 0.5).clamp(min=0)
        first = place.long()
        return start + first, start + torch.minimum(first + 1, size - 1), place - first

    def nearest(self, masks: Bool[Tensor, "b 1 h w"]) -> Bool[Tensor, "b 1 h w"]:
        columns, rows = (
            self.start[:, axis, None] + (torch.arange(n, device=masks.device) * (self.size[:, axis, None] / n)).long()
            for axis, n in enumerate(self.whole)
        )
        return _columns(_rows(masks, rows), columns)

    def around(self, corners: Float32[Tensor, "b k 2 2"]) -> Float32[Tensor, "b k 2 2"]:
        start, size = self.start[:, None, None], self.size[:, None, None]
        whole = torch.tensor(self.whole, device=start.device)
        return (corners - start).clamp(min=0).minimum(size.float()) * (whole / size)


class _Move(NamedTuple):
    """Whole pixels of each image shifted, mirrored and turned, in this order."""

    shift: Int64[Tensor, "b 2"]
    """To the left and up, in pixels."""
    mirrored: Bool[Tensor, "b 2"]
    """Left to right, and top to bottom."""
    turned: Bool[Tensor, " b"] | None
    """Whether rows become columns. None: never."""
    whole: tuple[int, int]
    """Width and height of the image."""

    @classmethod
    def drawn(cls, what: Augment, uniform: Float32[Tensor, "b 14"], height: int, width: int) -> "_Move":
        shift = (uniform[:, 4:6].flip(1) * (2 * what.crop + 1)).long() - what.crop
        left_right = (uniform[:, 6] < 0.5) & bool(what.flip)
        up_down, turned = torch.zeros_like(left_right), None
        if what.rotate:
            quarter = 1 if height == width else 2
            turns = (uniform[:, 7] * (4 // quarter)).long() * quarter
            turned, upset = turns % 2 == 1, uniform[:, 8] < 0.5
            left_right = left_right ^ (turns == 1) ^ (turns == 2) ^ (upset & turned)
            up_down = (turns >= 2) ^ (upset & ~turned)
            turned = turned if height == width else None
        return cls(shift, torch.stack([left_right, up_down], 1), turned, (width, height))

    def pixels(self, x: Shaped[Tensor, "b c h w"]) -> Shaped[Tensor, "b c h w"]:
        columns, rows = (self._places(axis) for axis in (0, 1))
        moved = _columns(_rows(pad(x, (0, 1, 0, 1)), rows), columns)
        return moved if self.turned is None else torch.where(self.turned[:, None, None, None], moved.mT, moved)

    def _places(self, axis: int) -> Int64[Tensor, "b n"]:
        """Which old pixel each new one is, before any turn; n, one beyond the last, for none."""
        n = self.whole[axis]
        steps = torch.arange(n, device=self.shift.device)
        places = torch.where(self.mirrored[:, axis, None], steps.flip(0), steps) + self.shift[:, axis, None]
        return torch.where((places >= 0) & (places < n), places, n)

    def corners(self, corners: Float32[Tensor, "b k 2 2"]) -> Float32[Tensor, "b k 2 2"]:
        whole = torch.tensor(self.whole, device=self.shift.device)
        corners = (corners - self.shift[:, None, None]).clamp(min=0).minimum(whole.float())
        corners = torch.where(self.mirrored[:, None, None], whole - corners.flip(2), corners)
        if self.turned is not None:
            corners = torch.where(self.turned[:, None, None, None], corners.flip(3), corners)
        return corners


def _rows(x: Shaped[Tensor, "b c h w"], rows: Int64[Tensor, "b n"]) -> Shaped[Tensor, "b c n w"]:
    """These rows of each image."""
    b, c, h, w = x.shape
    first = torch.arange(b * c, device=x.device).reshape(b, c, 1) * h
    return x.reshape(-1, w).index_select(0, (first + rows[:, None]).flatten()).reshape(b, c, rows.shape[1], w)


def _columns(x: Shaped[Tensor, "b c h w"], columns: Int64[Tensor, "b n"]) -> Shaped[Tensor, "b c h n"]:
    """These columns of each image."""
    return x.gather(3, columns[:, None, None].expand(-1, x.shape[1], x.shape[2], -1))


def _blended(
    images: UInt8[Tensor, "b 3 h w"],
    left: Int64[Tensor, "b n"],
    right: Int64[Tensor, "b n"],
    across: Float32[Tensor, "b n"],
    upper: Int64[Tensor, "b m"],
    lower: Int64[Tensor, "b m"],
    down: Float32[Tensor, "b m"],
) -> UInt8[Tensor, "b 3 m n"]:
    columns = _columns(images, left).float().lerp_(_columns(images, right).float(), across[:, None, None])
    columns = columns.add_(0.5).floor_()
    rows = _rows(columns, upper).lerp_(_rows(columns, lower), down[:, None, :, None])
    return _gray_levels(rows.add_(0.5))


def _colored(images: UInt8[Tensor, "b 3 h w"], factors: Float32[Tensor, "b 3"]) -> UInt8[Tensor, "b 3 h w"]:
    """Brightness, contrast and saturation multiplied by factors, in this order, each rounded down to a gray level."""
    brightness, contrast, saturation = factors[:, :, None, None, None].unbind(1)
    x = (images * brightness).clamp_(max=255).floor_()
    mean = _gray(x).mean((1, 2, 3), keepdim=True)
    x = (x * contrast).add_(mean * (1 - contrast)).clamp_(0, 255).floor_()
    x = (x * saturation).add_(_gray(x) * (1 - saturation)).clamp_(0, 255)
    return _gray_levels(x)


def _gray(x: Float32[Tensor, "b 3 h w"]) -> Float32[Tensor, "b 1 h w"]:
    """Brightness as the eye sees it (ITU-R BT.601), rounded down."""
    red, green, blue = x.split(1, 1)
    return (red * 0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114).floor_()


def _cut_out(
    images: UInt8[Tensor, "b 3 h w"], side: int, uniform: Float32[Tensor, "b 2"], fill: tuple[int, int, int]
) -> UInt8[Tensor, "b 3 h w"]:
    """Source: DeVries and Taylor 2017, arXiv 1708.04552: its center is in the image, the rest may be outside."""
    height, width = images.shape[-2:]
    top, left = ((uniform[:, k, None] * n).long() - side // 2 for k, n in enumerate((height, width)))
    steps_y, steps_x = (torch.arange(n, device=images.device) for n in (height, width))
    rows, columns = ((steps >= first) & (steps < first + side) for steps, first in ((steps_y, top), (steps_x, left)))
    hole = rows[:, :, None] & columns[:, None]
    return torch.stack([x.masked_fill(hole, v) for x, v in zip(images.unbind(1), fill, strict=True)], 1)


def _gray_levels(x: Float32[Tensor, "*_"]) -> UInt8[Tensor, "*_"]:
    # float to uint8 directly is four times as slow on a CPU
    return x.to(torch.int16).to(torch.uint8)
