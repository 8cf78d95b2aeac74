"""The spatial transformer: attention that cuts a window out of an image or a feature map and resamples it."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["SpatialTransformer"]


class Window(nn.Module):
    """Map of where a spatial transformer looks: 1 where the input position lies inside its sampled window, else 0.

    A position p is inside if p = A t + s has a solution t in the square (-1, 1)^2. A window that has collapsed to a
    line or a point is empty.

    >>> zoom = torch.tensor([[[0.5, 0.0, 0.0], [0.0, 1.0, 0.0]]])
    >>> Window()(torch.zeros(1, 1, 1, 4), zoom)
    tensor([[[[0., 1., 1., 0.]]]])
    """

    def forward(self, features: Float[Tensor, "b c h w"], theta: Float[Tensor, "b 2 3"]) -> Float[Tensor, "b 1 h w"]:
        """Window in the input's own resolution, from theta = [A s]."""
        a, b, c, d = theta[:, :, :2].flatten(1).unsqueeze(2).unbind(1)
        x, y = (positions(features.shape[2:], theta) - theta[:, :, 2:]).unbind(1)
        area = (a * d - b * c).abs()
        inside = ((d * x - b * y).abs() < area) & ((a * y - c * x).abs() < area)
        return inside.to(features.dtype).unflatten(1, (1, *features.shape[2:]))


class SpatialTransformer(nn.Module):
    """Samples its input at the positions of an affine grid that it predicts for each image.

    Works on images and on feature maps. A new one returns its input, up to rounding. Output position t takes the
    bilinear value at input position A t + s, where both run from -1 to 1 between the outer edges (x before y); outside
    the input there are zeros. The child `gate` returns the window of the input that is sampled, see `Window`.

    Args:
        channels: channels of the input.
        size: height and width of the output. None: those of the input. Smaller ones are sampled, not averaged.
        hidden: channels of the localization network.
        scale_only: one scale for both axes and a shift, three parameters instead of six.

    Raises:
        ValueError: `hidden` or a side of `size` is below 1.

    Source: Jaderberg et al., "Spatial Transformer Networks", NeurIPS 2015, equations 1, 2 (`scale_only`) and 5.

    Differs: the paper does not specify the localization network; here it ends in an average over 4 x 4 cells.

    >>> SpatialTransformer(8, size=(2, 3))(torch.zeros(2, 8, 5, 7)).shape
    torch.Size([2, 8, 2, 3])
    """

    def __init__(
        self, channels: int, *, size: tuple[int, int] | None = None, hidden: int = 32, scale_only: bool = False
    ) -> None:
        super().__init__()
        if hidden < 1:
            raise ValueError(f"expected hidden of 1 or more, got {hidden}")
        if size is not None and min(size) < 1:
            raise ValueError(f"expected a size of at least 1 x 1, got {size[0]} x {size[1]}; give (height, width)")
        self.size = size
        self.scale_only = scale_only
        self.localize = nn.Sequential(
            nn.Conv2d(channels, hidden, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(hidden, hidden, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
        )
        self.affine = nn.Linear(16 * hidden, 3 if scale_only else 6)
        nn.init.zeros_(self.affine.weight)
        start = [1.0, 0.0, 0.0] if scale_only else [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
        self.affine.bias.data.copy_(torch.tensor(start))
        self.gate = Window()

    def theta(self, features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 2 3"]:
        """Affine map [A s] of each image, at least in float32: a bfloat16 position would be off by pixels."""
        numbers = self.affine(self.localize(features))
        numbers = numbers.to(torch.promote_types(numbers.dtype, torch.float32))
        if self.scale_only:
            scale, x, y = numbers.unbind(1)
            zero = torch.zeros_like(scale)
            numbers = torch.stack([scale, zero, x, zero, scale, y], 1)
        return numbers.unflatten(1, (2, 3))

    def forward(self, features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c out_h out_w"]:
        """The sampled window of each image."""
        theta = self.theta(features)
        self.gate(features, theta)
        size = self.size or features.shape[2:]
        sources = (theta[:, :, :2, None] * positions(size, theta)).sum(2) + theta[:, :, 2:]
        grid = sources.transpose(1, 2).unflatten(1, size)
        return F.grid_sample(features.to(theta.dtype), grid, align_corners=False).to(features.dtype)


def positions(size: torch.Size | tuple[int, int], like: Tensor) -> Float[Tensor, "2 n"]:
    """Centers (x, y) of all pixels, row by row, where -1 and 1 are the outer edges.

    >>> positions((1, 4), torch.zeros(()))
    tensor([[-0.7500, -0.2500,  0.2500,  0.7500],
            [ 0.0000,  0.0000,  0.0000,  0.0000]])
    """
    y, x = ((2 * torch.arange(n, dtype=like.dtype, device=like.device) + 1) / n - 1 for n in size)
    return torch.stack([x.repeat(len(y)), y.repeat_interleave(len(x))])
