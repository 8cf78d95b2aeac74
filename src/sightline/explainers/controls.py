"""Maps that never look at the model: an explanation has to beat them."""

import zlib

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sightline.checks import check_whole
from sightline.explainers.explainer import Explainer
from sightline.inference import wide

__all__ = ["random_map", "center_map", "edge_map", "contrast_map"]


@Explainer
def random_map(
    images: Float[Tensor, "b c *grid"], targets: Int[Tensor, "b t"], seed: int = 0, cells: int = 8
) -> Float[Tensor, "b t *cells"]:
    """Uniform random numbers in [0, 1) on a grid of `cells` along each side, as coarse as the maps of a deep layer.

    The generator is seeded by `seed` and the pixels of the image: the same image gets the same map in any batch, and
    the global random state is not used.
    """
    check_whole(seed=seed, cells=cells)
    maps: list[Tensor] = []
    for image in images:
        pixels = zlib.crc32(image.detach().float().cpu().contiguous().numpy().tobytes())
        generator = torch.Generator().manual_seed((seed << 32) + pixels)
        shape = targets.shape[1], *[cells] * (images.ndim - 2)
        maps.append(torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu"))
    return torch.stack(maps).to(images.device)


@Explainer
def center_map(
    images: Float[Tensor, "b c *grid"], targets: Int[Tensor, "b t"], sigma: float = 0.25
) -> Float[Tensor, "b t *grid"]:
    """A Gaussian blob in the middle of the image, where objects usually are; `sigma` is a fraction of the side.

    >>> from sightline.testing import LinearModel
    >>> center_map(LinearModel(torch.ones(2, 3, 3, 3)), torch.zeros(1, 3, 3, 3), sigma=1.0)[0, 0, 1, 1].item()
    1.0
    """
    pixels = [torch.arange(side, dtype=torch.float32, device=images.device) for side in images.shape[2:]]
    sides = [(places + 0.5) / len(places) - 0.5 for places in pixels]
    distances = torch.stack(torch.meshgrid(*sides, indexing="ij")).square().sum(0)
    blob = torch.exp(-distances / (2 * sigma**2))
    return blob.expand(*targets.shape, *blob.shape)


@Explainer
def edge_map(images: Float[Tensor, "b c *grid"], targets: Int[Tensor, "b t"]) -> Float[Tensor, "b t *grid"]:
    """Magnitude of the Sobel gradient, summed over the color channels: edges, whatever the class."""
    planes = images.to(wide(images))
    sides = range(2, images.ndim)
    slopes: list[Tensor] = []
    for along in sides:
        slope = planes
        for side in sides:
            slope = _three(slope, side, (-0.5, 0.0, 0.5) if side == along else (0.25, 0.5, 0.25))
        slopes.append(slope)
    edges = torch.stack(slopes).square().sum(0).sqrt().sum(1, keepdim=True)
    return edges.expand(-1, targets.shape[1], *images.shape[2:])


def _three(planes: Tensor, side: int, weights: tuple[float, float, float]) -> Tensor:
    """Three neighbors along one side, weighted; the border is repeated."""
    length = planes.shape[side]
    at = torch.arange(length, device=planes.device)
    before, after = (planes.index_select(side, at.add(step).clamp(0, length - 1)) for step in (-1, 1))
    return weights[0] * before + weights[1] * planes + weights[2] * after


@Explainer
def contrast_map(images: Float[Tensor, "b c *grid"], targets: Int[Tensor, "b t"]) -> Float[Tensor, "b t *grid"]:
    """Distance of each pixel's color from the mean color of the image, smoothed over 3 pixels along each side."""
    planes = images.to(wide(images))
    mean = planes.flatten(2).mean(2).reshape(*planes.shape[:2], *[1] * (images.ndim - 2))
    smooth = (planes - mean).square().sum(1, keepdim=True).sqrt()
    for side in range(2, images.ndim):
        smooth = _three(smooth, side, (1 / 3, 1 / 3, 1 / 3))
    return smooth.expand(-1, targets.shape[1], *images.shape[2:])
