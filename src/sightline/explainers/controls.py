"""Maps that never look at the model: what any explanation has to beat."""

import zlib

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d, pad

from sightline.explainers.evidence import Explainer


@Explainer
def random_map(
    images: Float[Tensor, "b c H W"], targets: Int[Tensor, "b t"], seed: int = 0, cells: int = 8
) -> Float[Tensor, "b t h w"]:
    """Uniform random numbers in [0, 1) on a grid of `cells` x `cells`, as coarse as the maps of a deep layer.

    Drawn from a generator seeded by `seed` and the pixels of each image: the same image gets the same map in any batch,
    and the global random state is left alone.
    """
    maps: list[Tensor] = []
    for image in images:
        pixels = zlib.crc32(image.detach().float().cpu().contiguous().numpy().tobytes())
        generator = torch.Generator().manual_seed((seed << 32) + pixels)
        maps.append(torch.rand(targets.shape[1], cells, cells, generator=generator))
    return torch.stack(maps).to(images.device)


@Explainer
def centre_map(
    images: Float[Tensor, "b c H W"], targets: Int[Tensor, "b t"], sigma: float = 0.25
) -> Float[Tensor, "b t h w"]:
    """A Gaussian blob in the middle of the image; `sigma` is a share of the side. Photographers centre their objects.

    >>> from sightline.testing import LinearModel
    >>> centre_map(LinearModel(torch.ones(2, 3, 3, 3)), torch.zeros(1, 3, 3, 3), sigma=1.0)[0, 0, 1, 1].item()
    1.0
    """
    *_, height, width = images.shape
    y = (torch.arange(height, device=images.device) + 0.5) / height - 0.5
    x = (torch.arange(width, device=images.device) + 0.5) / width - 0.5
    blob = torch.exp(-(y[:, None] ** 2 + x**2) / (2 * sigma**2))
    return blob.expand(*targets.shape, -1, -1)


@Explainer
def edge_map(images: Float[Tensor, "b c H W"], targets: Int[Tensor, "b t"]) -> Float[Tensor, "b t h w"]:
    """Size of the Sobel gradient, summed over the colour channels: an edge detector knows no class."""
    images = images.to(torch.promote_types(images.dtype, torch.float32))
    across = images.new_tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 8
    kernels = torch.stack([across, across.T])[:, None]
    batch, channels, height, width = images.shape
    planes = pad(images.reshape(-1, 1, height, width), (1, 1, 1, 1), mode="replicate")
    edges = conv2d(planes, kernels).square().sum(1).sqrt().reshape(batch, channels, height, width).sum(1, keepdim=True)
    return edges.expand(-1, targets.shape[1], -1, -1)


@Explainer
def contrast_map(images: Float[Tensor, "b c H W"], targets: Int[Tensor, "b t"]) -> Float[Tensor, "b t h w"]:
    """How far each pixel's colour lies from the mean colour of its image, smoothed over 3 x 3 pixels."""
    images = images.to(torch.promote_types(images.dtype, torch.float32))
    distance = (images - images.mean((2, 3), keepdim=True)).square().sum(1, keepdim=True).sqrt()
    smooth = avg_pool2d(pad(distance, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return smooth.expand(-1, targets.shape[1], -1, -1)
