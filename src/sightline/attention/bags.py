"""Multiple-instance attention: pools many positions, or many tiles of an image too large for one pass."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sightline.attention.registry import register

__all__ = ["MILPooling"]


class InstanceGate(nn.Module):
    """Weights of the positions of a feature map, which sum to 1: softmax of <w, tanh(V l) * sigmoid(U l)>.

    Args:
        channels: channels of the feature map.
        hidden: rows of V and U.
        gated: False: <w, tanh(V l)>.

    Source: Ilse, Tomczak, Welling, "Attention-based Deep Multiple Instance Learning", ICML 2018 (1802.04712), equations
    8 and 9.

    Differs: V and U have a bias, as in the authors' code.

    >>> InstanceGate(8)(torch.zeros(2, 8, 2, 2))[0, 0]
    tensor([[0.2500, 0.2500],
            [0.2500, 0.2500]], grad_fn=<SelectBackward0>)
    """

    def __init__(self, channels: int, *, hidden: int = 128, gated: bool = True) -> None:
        super().__init__()
        self.tanh = nn.Conv2d(channels, hidden, 1)
        self.sigmoid = nn.Conv2d(channels, hidden, 1) if gated else None
        self.score = nn.Conv2d(hidden, 1, 1, bias=False)

    def forward(
        self, features: Float[Tensor, "b c h w"], mask: Bool[Tensor, "b 1 h w"] | None = None
    ) -> Float[Tensor, "b 1 h w"]:
        """Weight of every position; 0 where the mask is false."""
        x = self.tanh(features).tanh()
        if self.sigmoid is not None:
            x = x * self.sigmoid(features).sigmoid()
        scores = self.score(x)
        if mask is not None:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        weights = scores.flatten(2).softmax(2).unflatten(2, scores.shape[2:])
        return weights if mask is None else weights * mask


@register("mil")
class MILPooling(nn.Module):
    """Pools a feature map, or a bag of vectors, into one vector: their mean with learned weights that sum to 1.

    A slide too large for one pass is cut into tiles, each is encoded as a vector, and `forward_bag` pools them. The
    child `gate` returns the weights: over positions (b, 1, h, w), over tiles (b, 1, n, 1).

    Args:
        channels: channels of the feature map, or length of the vectors.
        hidden: rows of the scoring layer.
        gated: a sigmoid unit for every tanh unit of the scoring layer.

    Raises:
        ValueError: `hidden` below 1.

    Source: Ilse, Tomczak, Welling, "Attention-based Deep Multiple Instance Learning", ICML 2018 (1802.04712), equations
    7 to 9.

    >>> MILPooling(2)(torch.ones(1, 2, 3, 1)).shape, MILPooling(2).forward_bag(torch.ones(1, 5, 2)).shape
    (torch.Size([1, 2]), torch.Size([1, 2]))
    """

    def __init__(self, channels: int, *, hidden: int = 128, gated: bool = True) -> None:
        super().__init__()
        if hidden < 1:
            raise ValueError(f"expected hidden of 1 or more, got {hidden}; 128 is the paper's")
        self.out_channels = channels
        self.gate = InstanceGate(channels, hidden=hidden, gated=gated)

    def forward(self, features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c"]:
        """One vector per feature map."""
        return self._pool(features, self.gate(features))

    def forward_bag(
        self, vectors: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b c"]:
        """One vector per bag; bags of different sizes are padded, and `mask` is True at vectors.

        The padding does not matter unless it is infinite or NaN. An empty bag yields 0.
        """
        features = vectors.mT.unsqueeze(3)
        return self._pool(features, self.gate(features, None if mask is None else mask[:, None, :, None]))

    @staticmethod
    def _pool(features: Tensor, weights: Tensor) -> Tensor:
        return torch.bmm(weights.flatten(2), features.flatten(2).mT).squeeze(1)
