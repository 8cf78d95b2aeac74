"""Hidden pixels painted from what is left around them."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

_COARSEST = 8  # pixels; below, nothing is gained by a coarser start


def inpaint(
    images: Float[Tensor, "b c H W"], hole: Bool[Tensor, "b 1 H W"], noise: float = 0.0, tolerance: float = 1e-4
) -> Float[Tensor, "b c H W"]:
    """Every hidden pixel the weighted mean of its eight neighbours: 1/6 for the four next, 1/12 for the diagonal ones.

    The linear system is solved to `tolerance` times the image's range. At the border the weights of the neighbours
    that exist are scaled to 1. `noise`: standard deviation of what is added to the hidden pixels, the same for every
    image of a size. Where nothing is left the mean of the image stands.

    Source: Rong et al. 2022 (2202.00449), noisy linear imputation.

    >>> image = torch.tensor([[[[0.0, 9.0, 2.0]]]])
    >>> inpaint(image, torch.tensor([[[[False, True, False]]]]))
    tensor([[[[0., 1., 2.]]]])
    """
    exact = images.double() if images.dtype == torch.float64 else images.float()
    mean = exact.mean((2, 3), keepdim=True)
    scale = exact.amax((2, 3), keepdim=True) - exact.amin((2, 3), keepdim=True)
    painted = _solve(exact, hole, mean, tolerance * scale)
    if noise:
        generator = torch.Generator().manual_seed(0)
        painted = painted + noise * torch.randn(exact.shape[1:], generator=generator).to(exact)
    return torch.where(hole, painted.to(images.dtype), images)


def _neighbours(values: Tensor) -> Tensor:
    """Sum of the eight neighbours' values, each by its weight: [1, 2, 1] along both axes without the middle, by 12."""
    down = F.pad(values, (0, 0, 1, 1))
    down = down[:, :, :-1] + down[:, :, 1:]
    down = down[:, :, :-1] + down[:, :, 1:]
    across = F.pad(down, (1, 1))
    across = across[..., :-1] + across[..., 1:]
    across = across[..., :-1] + across[..., 1:]
    return across.sub_(values, alpha=4).div_(12)


def _solve(known: Tensor, hole: Tensor, mean: Tensor, tolerance: Tensor) -> Tensor:
    """Conjugate gradients from the solution at half the size."""
    inside = hole.to(known)
    weights = _neighbours(torch.ones_like(inside)) * inside
    values = torch.where(hole, _start(known, hole, mean, tolerance), known)
    residual = inside * _neighbours(values) - weights * values
    direction, square = residual, residual.square().sum((2, 3), keepdim=True)
    going = torch.ones_like(square, dtype=torch.bool)
    for turn in range(hole.shape[2] * hole.shape[3]):
        if turn % 8 == 0:  # seldom, since it asks the device; each image by itself, so that its batch changes nothing
            going = going & (residual.abs().amax((2, 3), keepdim=True) > tolerance)
            if not going.any():
                break
        image = (weights * direction).addcmul_(inside, _neighbours(direction), value=-1)
        curvature = (direction * image).sum((2, 3), keepdim=True)
        step = torch.where(going & (curvature > 0), square / curvature, 0.0)
        values = torch.addcmul(values, step, direction)
        residual = torch.addcmul(residual, step, image, value=-1)
        before, square = square, residual.square().sum((2, 3), keepdim=True)
        direction = torch.addcmul(residual, torch.where(before > 0, square / before, 0.0), direction)
    return values


def _start(known: Tensor, hole: Tensor, mean: Tensor, tolerance: Tensor) -> Tensor:
    height, width = hole.shape[2:]
    if min(height, width) <= _COARSEST:
        return mean.expand_as(known)
    left = F.avg_pool2d((~hole).to(known), 2, ceil_mode=True)
    half = F.avg_pool2d(torch.where(hole, 0.0, known), 2, ceil_mode=True) / left.clamp(min=1e-3)
    coarse = _solve(half, left == 0, mean, tolerance)
    return F.interpolate(coarse, (height, width), mode="bilinear", align_corners=False)
