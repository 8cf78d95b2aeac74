"""Removed pixels painted from their surroundings."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from sightline.checks import check_planes

_TURNS = 100  # no hole takes more than 20
_UNSEEN = 5  # the error that is left, at most, in sizes of the next correction

Grid = tuple[Float[Tensor, "b 1 _ _"], Float[Tensor, "b 1 _ _"]]
"""Where the hole is, and there 1 over the weight of a pixel's neighbors."""


def inpaint(
    images: Float[Tensor, "b c H W"], hole: Bool[Tensor, "b 1 H W"], noise: float = 0.0, tolerance: float = 1e-4
) -> Float[Tensor, "b c H W"]:
    """Images where every pixel of the hole is the weighted mean of its neighbors: 1/6 for four, 1/12 for diagonal ones.

    No pixel is further than `tolerance` times the image's range from the exact solution of these linear equations. At
    the border the weights of the neighbors that exist are scaled to 1. `noise`: standard deviation of the noise added
    to the painted pixels, the same for every image of a size. An image without any pixel left becomes its mean.

    Source: Rong et al. 2022 (2202.00449), noisy linear imputation.

    >>> image = torch.tensor([[[[0.0, 9.0, 2.0]]]])
    >>> inpaint(image, torch.tensor([[[[False, True, False]]]])).round(decimals=4)
    tensor([[[[0., 1., 2.]]]])
    """
    check_planes("painting", images.shape)
    exact = images.double() if images.dtype == torch.float64 else images.float()
    scale = exact.amax((2, 3), keepdim=True) - exact.amin((2, 3), keepdim=True)
    left = (~hole).sum((2, 3), keepdim=True)
    mean = exact.where(~hole | (left == 0), 0.0).sum((2, 3), keepdim=True) / left.where(left > 0, hole[0].numel())
    painted = mean + _solve(torch.where(hole, 0.0, exact - mean), hole & (left > 0), tolerance * scale)
    if noise:
        generator = torch.Generator().manual_seed(0)
        painted = painted + noise * torch.randn(exact.shape[1:], generator=generator).to(exact)
    return torch.where(hole, painted.to(images.dtype), images)


def _neighbors(values: Tensor) -> Tensor:
    """Sum of the eight neighbors' values, each by its weight: [1, 2, 1] along both axes without the middle, by 12."""
    down = 2 * values
    down[:, :, 1:] += values[:, :, :-1]
    down[:, :, :-1] += values[:, :, 1:]
    across = 2 * down
    across[..., 1:] += down[..., :-1]
    across[..., :-1] += down[..., 1:]
    return across.sub_(values, alpha=4).div_(12)


def _solve(values: Tensor, hole: Tensor, tolerance: Tensor) -> Tensor:
    """Conjugate gradients; the preconditioner is a multigrid cycle, which also tells how large the error still is."""
    grids = _grids(hole.to(values))
    inside, weights = grids[0][0], _neighbors(torch.ones_like(values[:1, :1]))
    residual = inside * (_neighbors(values) - weights * values)
    direction = correction = _cycle(grids, residual)
    product = (residual * correction).sum((2, 3), keepdim=True)
    going = torch.ones_like(product, dtype=torch.bool)
    for turn in range(_TURNS):
        if turn % 2 == 0:  # not always, as it waits for the device; per image, so that its batch changes nothing
            going = going & (correction.abs().amax((2, 3), keepdim=True) > tolerance / _UNSEEN)
            if not going.any():
                break
        image = (weights * direction).addcmul_(inside, _neighbors(direction), value=-1)
        curvature = (direction * image).sum((2, 3), keepdim=True)
        step = torch.where(going & (curvature > 0), product / curvature, 0.0)
        values = torch.addcmul(values, step, direction)
        residual = torch.addcmul(residual, step, image, value=-1)
        correction = _cycle(grids, residual)
        before, product = product, (residual * correction).sum((2, 3), keepdim=True)
        direction = torch.addcmul(correction, torch.where(before > 0, product / before, 0.0), direction)
    return values + correction


def _grids(inside: Tensor) -> list[Grid]:
    """The hole at full size, at half of it, and so on; a coarse pixel is in it if all that it stands for are."""
    grids: list[Grid] = []
    while not grids or (min(grids[-1][0].shape[2:]) > 2 and inside.any()):
        grids.append((inside, inside / _neighbors(torch.ones_like(inside[:1]))))
        inside = 1 - F.max_pool2d(1 - inside, 2, ceil_mode=True)
    return grids


def _cycle(grids: list[Grid], residual: Tensor) -> Tensor:
    """An approximate correction for this residual: one step of Jacobi, the coarser grid, another step."""
    inside, inverse = grids[0]
    correction = inverse * residual
    if len(grids) > 1:
        rest = _halved(_halved(inside * _neighbors(correction)).mT).mT
        coarse = _cycle(grids[1:], rest * grids[1][0])
        fine = F.interpolate(coarse, scale_factor=2, mode="bilinear")[..., : inside.shape[2], : inside.shape[3]]
        correction = torch.addcmul(correction, inside, fine)
    return inverse * (residual + _neighbors(correction))


def _halved(values: Tensor) -> Tensor:
    """Along the last axis, the transpose of bilinear enlargement to twice the size."""
    last = values.shape[-1] % 2
    padded = F.pad(values, (1, 1 + last))
    padded[..., 0] = values[..., 0]
    if not last:
        padded[..., -1] = values[..., -1]
    outer = padded[..., :-3:2] + padded[..., 3::2]
    return outer.add_(padded[..., 1:-2:2] + padded[..., 2:-1:2], alpha=3).div_(4)
