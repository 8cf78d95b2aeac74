"""Maps as pictures: resize, normalise, colour, overlay, colour bar, PNG."""

import io
from functools import cache

import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

UNDEFINED = 128
"""Grey level of a value that is not finite; no colour of the map is grey."""


@cache
def _palette() -> UInt8[Tensor, "256 3"]:
    from matplotlib import colormaps

    return torch.tensor(
        [[round(255 * channel) for channel in colormaps["inferno"](i)[:3]] for i in range(256)], dtype=torch.uint8
    )


def resize(maps: Float[Tensor, "b t h w"], size: tuple[int, int]) -> Float[Tensor, "b t new_h new_w"]:
    """Maps at another (height, width): bilinear between pixel centres (`align_corners=False`), averaged if they shrink.

    Raises:
        ValueError: a side of `size` is below 1.

    >>> resize(torch.tensor([[[[0.0, 1.0]]]]), (1, 4))
    tensor([[[[0.0000, 0.2500, 0.7500, 1.0000]]]])
    """
    if min(size) < 1:
        raise ValueError(f"expected a size of at least 1 x 1 pixels, got {size[0]} x {size[1]}; give (height, width)")
    shrinks = size[0] < maps.shape[-2] or size[1] < maps.shape[-1]
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False, antialias=shrinks)


def normalise(maps: Float[Tensor, "*b h w"]) -> Float[Tensor, "*b h w"]:
    """Each map stretched to [0, 1], order kept: its lowest finite value becomes 0, its highest 1.

    A flat map becomes 0, a value that is not finite NaN.

    >>> normalise(torch.tensor([[[-2.0, 0.0], [1.0, 2.0]], [[7.0, 7.0], [7.0, 7.0]]]))
    tensor([[[0.0000, 0.5000],
             [0.7500, 1.0000]],
    <BLANKLINE>
            [[0.0000, 0.0000],
             [0.0000, 0.0000]]])
    """
    finite = maps.isfinite()
    halves = maps / 2  # the difference of two extreme values would overflow
    low = halves.where(finite, torch.inf).amin((-2, -1), keepdim=True)
    high = halves.where(finite, -torch.inf).amax((-2, -1), keepdim=True)
    return ((halves - low) / (high - low)).where(high > low, 0.0).where(finite, torch.nan)


def colour(maps: Float[Tensor, "*b h w"]) -> UInt8[Tensor, "*b 3 h w"]:
    """RGB of values in [0, 1] on matplotlib's perceptually uniform `inferno` (black, red, yellow); NaN is grey.

    Raises:
        ValueError: a value outside [0, 1].

    >>> colour(torch.tensor([[0.0, 0.5, 1.0]]))[:, 0].T.tolist()
    [[0, 0, 4], [188, 55, 84], [252, 255, 164]]
    """
    if ((maps < 0) | (maps > 1)).any():
        raise ValueError(
            f"expected values in [0, 1], got {maps.min():.4g} to {maps.max():.4g}; call maps.normalise first"
        )
    defined = ~maps.isnan()
    index = (maps.where(defined, 0.0) * 256).long().clamp(max=255)
    rgb = _palette().to(maps.device)[index].movedim(-1, -3)
    return rgb.where(defined.unsqueeze(-3), torch.tensor(UNDEFINED, dtype=torch.uint8, device=maps.device))


def overlay(
    images: UInt8[Tensor, "b 3 h w"], maps: Float[Tensor, "b t map_h map_w"], opacity: float = 0.5
) -> UInt8[Tensor, "b t 3 h w"]:
    """Raw maps, each stretched to its own range and resized, laid over their images with an `opacity` of 0 to 1.

    Raises:
        ValueError: `opacity` outside [0, 1].

    >>> black = torch.zeros(1, 3, 1, 1, dtype=torch.uint8)
    >>> overlay(black, torch.tensor([[[[0.0, 1.0]]]]), opacity=1.0).flatten().tolist()
    [188, 55, 84]
    """
    if not 0 <= opacity <= 1:
        raise ValueError(f"expected an opacity from 0 to 1, got {opacity}; 0 shows the image alone, 1 the map alone")
    height, width = images.shape[-2:]
    above = colour(resize(normalise(maps), (height, width)).clamp(0, 1)).float()
    return torch.lerp(images.unsqueeze(1).float(), above, opacity).round().to(torch.uint8)


def colour_bar(height: int, width: int) -> UInt8[Tensor, "3 h w"]:
    """The colours from 0 (left) to 1 (right).

    >>> colour_bar(1, 3)[:, 0].T.tolist()
    [[0, 0, 4], [188, 55, 84], [252, 255, 164]]
    """
    return colour(torch.linspace(0, 1, width).expand(height, width))


def png(image: UInt8[Tensor, "3 h w"]) -> bytes:
    """One RGB image as the bytes of a PNG file.

    >>> png(colour_bar(1, 2))[1:4]
    b'PNG'
    """
    file = io.BytesIO()
    Image.fromarray(image.movedim(0, -1).cpu().numpy()).save(file, "PNG", optimize=True)
    return file.getvalue()
