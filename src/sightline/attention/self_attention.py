"""Self-attention over a feature map: every position attends to every other."""

from numbers import Integral
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from sightline.attention.channel import hidden_width, zero
from sightline.attention.registry import check_choice, register
from sightline.inference import untouched

__all__ = ["NonLocal", "SelfAttention", "attention_from"]

Positions = Literal["none", "learned", "relative"]


class ReceivedAttention(nn.Module):
    """Attention that each position receives: the mean over all queries of softmax(scale <q, k> + bias).

    A block with n positions attends through `attend`, which never holds the n x n weights in memory. `attend` runs this
    module only while it has a forward hook; the result of `attend` is the same, bit for bit.

    Args:
        scale: factor of the dot products. None: 1 / sqrt(their length).
        class_token: the first token is no position. Only its query counts, and its attention to itself is left out, so
            a map sums to 1 minus that attention.

    Source: Vaswani et al., "Attention Is All You Need", NeurIPS 2017, equation 1.

    >>> ReceivedAttention()(torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 2), (2, 2)).flatten().tolist()
    [0.25, 0.25, 0.25, 0.25]
    """

    def __init__(self, *, scale: float | None = None, class_token: bool = False) -> None:
        super().__init__()
        self.scale = scale
        self.class_token = class_token

    def attend(
        self,
        query: Float[Tensor, "b heads n d"],
        key: Float[Tensor, "b heads n d"],
        value: Float[Tensor, "b heads n d"],
        size: tuple[int, int],
        bias: Float[Tensor, "heads n n"] | None = None,
    ) -> Float[Tensor, "b heads n d"]:
        """Mean of the values, weighted by attention; `size` is the height and width of the positions."""
        if self._forward_hooks:
            self(query, key, size, bias)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=self.scale)

    def forward(
        self,
        query: Float[Tensor, "b heads n d"],
        key: Float[Tensor, "b heads n d"],
        size: tuple[int, int],
        bias: Float[Tensor, "heads n n"] | None = None,
    ) -> Float[Tensor, "b heads h w"]:
        """Attention received, one map per head."""
        received = self.weights(query[:, :, :1] if self.class_token else query, key, bias).mean(2)
        return received[:, :, int(self.class_token) :].unflatten(2, size)

    def weights(
        self,
        query: Float[Tensor, "b heads q d"],
        key: Float[Tensor, "b heads n d"],
        bias: Float[Tensor, "heads q n"] | None = None,
    ) -> Float[Tensor, "b heads q n"]:
        """Attention that each query pays to each key."""
        scale = query.shape[3] ** -0.5 if self.scale is None else self.scale
        scores = (query * scale) @ key.transpose(2, 3)
        return (scores if bias is None else scores + bias).softmax(3)


def positions_at(positions: Float[Tensor, "1 c h w"], size: tuple[int, int]) -> Float[Tensor, "1 c H W"]:
    """Learned position vectors for a map of this size, interpolated bicubically if they were learned for another.

    >>> positions_at(torch.ones(1, 8, 4, 4), (2, 3)).shape
    torch.Size([1, 8, 2, 3])
    """
    if positions.shape[2:] == size:
        return positions
    exact = positions.to(torch.promote_types(positions.dtype, torch.float32))  # there is no bfloat16 kernel
    return F.interpolate(exact, size, mode="bicubic", antialias=True).to(positions.dtype)


class RelativeBias(nn.Module):
    """One learned number per head and offset (row and column) from a query to a key, added to their score.

    Offsets beyond `size` - 1 share the number of the outermost one, so maps of any size pass. All start at 0.

    Source: Shaw et al., "Self-Attention with Relative Position Representations", NAACL 2018, for the clipping; Liu et
    al., "Swin Transformer", ICCV 2021, equation 4, for the bias.

    >>> RelativeBias(2, (3, 3))((4, 5)).shape
    torch.Size([2, 20, 20])
    """

    def __init__(self, heads: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(heads, *(2 * side - 1 for side in size)))

    def forward(self, size: tuple[int, int]) -> Float[Tensor, "heads n n"]:
        """Bias of every query (second axis) and key (third axis)."""
        rows, columns = (
            self._offsets(side, reach // 2) for side, reach in zip(size, self.table.shape[1:], strict=True)
        )
        return self.table[:, rows][..., columns].transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def _offsets(self, side: int, reach: int) -> Tensor:
        at = torch.arange(side, device=self.table.device)
        return (at - at[:, None]).clamp(-reach, reach) + reach


@register("self_attention")
class SelfAttention(nn.Module):
    """Multi-head self-attention over all positions of a feature map, added to it.

    The child `gate` yields the mean attention that each position receives, one map per head, each with the sum 1. It
    runs only while a hook listens to it, see `ReceivedAttention`.

    Without `positions`, permuting the positions of the input permutes the result in the same way.

    Args:
        channels: channels of the feature map.
        heads: number of attention maps; each sees `channels / heads` of the channels.
        positions: "learned": a vector for each position is added before attention, interpolated bicubically to maps of
            another size; "relative": a bias for each offset, see `RelativeBias`, which costs memory for heads * n * n
            numbers; "none": neither.
        size: height and width of the map. "learned" needs it; for "relative" the largest offset is one less, 7 by
            default.
        identity: start with a zero output projection, so that the block returns its input.

    Raises:
        ValueError: channels that the heads do not divide, unknown `positions`, or "learned" without `size`.

    Source: Vaswani et al., "Attention Is All You Need", NeurIPS 2017, section 3.2.2; over feature maps: Bello et al.,
    "Attention Augmented Convolutional Networks", ICCV 2019.
    Elsewhere: `MultiheadAttention` (torch).

    Differs: queries, keys and values have no bias. That of the keys cancels in the softmax, that of the values is
    equivalent to the bias of the output projection.

    >>> SelfAttention(8, heads=2)(torch.zeros(2, 8, 5, 7)).shape
    torch.Size([2, 8, 5, 7])
    """

    def __init__(
        self,
        channels: int,
        *,
        heads: int = 4,
        positions: Positions = "none",
        size: tuple[int, int] | None = None,
        identity: bool = False,
    ) -> None:
        super().__init__()
        if heads < 1 or channels % heads:
            raise ValueError(f"expected heads that divide {channels} channels, got {heads}; choose another number")
        check_choice("positions", positions, get_args(Positions))
        if positions == "learned" and size is None:
            raise ValueError(
                "expected the size of the map for positions='learned', got none; pass size=(height, width)"
            )
        self.heads = heads
        self.positions = None
        self.bias = None
        if positions == "learned" and size is not None:
            self.positions = nn.Parameter(torch.empty(1, channels, *size))
            nn.init.trunc_normal_(self.positions, std=0.02)
        elif positions == "relative":
            self.bias = RelativeBias(heads, size or (8, 8))
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.gate = ReceivedAttention()
        self.project = nn.Linear(channels, channels)
        if identity:
            zero(self.project)

    def forward(self, features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Features plus what each position gathered from all."""
        size = features.shape[2], features.shape[3]
        placed = features if self.positions is None else features + positions_at(self.positions, size)
        qkv = self.qkv(placed.flatten(2).transpose(1, 2)).unflatten(2, (3, self.heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind()
        bias = None if self.bias is None else self.bias(size)
        attended = self.gate.attend(query, key, value, size, bias).transpose(1, 2).flatten(2)
        return features + self.project(attended).transpose(1, 2).unflatten(2, size)


@register("non_local")
class NonLocal(nn.Module):
    """Non-local block, embedded Gaussian: each position adds a projected mean of all others, weighted by similarity.

    The child `gate` yields the mean attention that each position receives, one map with the sum 1. It runs only while a
    hook listens to it, see `ReceivedAttention`.

    Args:
        channels: channels of the feature map.
        reduction: queries, keys and values have `channels // reduction` numbers, at least 1.
        identity: has no effect: the last BatchNorm always starts at zero, as in the paper, and the block returns its
            input.

    Raises:
        ValueError: `reduction` below 1.

    Source: Wang et al., "Non-local Neural Networks", CVPR 2018, equations 4 and 6, section 4.1.
    Elsewhere: `NonLocalAttn` (timm).

    Differs: no convolution has a bias. That of the keys cancels in the softmax, those of the values and of the last
    convolution in BatchNorm.

    >>> NonLocal(8)(torch.ones(2, 8, 5, 7)).equal(torch.ones(2, 8, 5, 7))
    True
    """

    def __init__(self, channels: int, *, reduction: int = 2, identity: bool = False) -> None:
        super().__init__()
        hidden = hidden_width(channels, reduction)
        self.qkv = nn.Conv2d(channels, 3 * hidden, 1, bias=False)
        self.gate = ReceivedAttention(scale=1.0)
        self.project = nn.Conv2d(hidden, channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        nn.init.zeros_(self.norm.weight)

    def forward(self, features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Features plus what each position gathered from all."""
        size = features.shape[2], features.shape[3]
        query, key, value = self.qkv(features).flatten(2).mT.unsqueeze(1).chunk(3, 3)
        attended = self.gate.attend(query, key, value, size).squeeze(1).mT.unflatten(2, size)
        # keep the features' memory layout, or the norm and the sum would mix two
        last = features.is_contiguous(memory_format=torch.channels_last)
        attended = attended.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        return features + self.norm(self.project(attended))


def attention_from(
    model: nn.Module, images: Float[Tensor, "b c H W"], position: tuple[int, int], block: str | None = None
) -> Float[Tensor, "b heads h w"]:
    """Attention that one position pays to all: how a part of an image, an eye for example, relates to the others.

    The mean of this map over all positions is the block's map in `sightline.attention_maps`. The model stays unchanged.

    Args:
        model: a network with `SelfAttention` or `NonLocal` blocks.
        images: normalized as the model wants them.
        position: row and column of a pixel; its cell of the block's grid asks.
        block: dotted name of the block. None: the last one that runs.

    Returns:
        A map per head, each with the sum 1.

    Raises:
        ValueError: no such block, a position outside the images, or images of another shape.

    Source: Vaswani et al. 2017 (1706.03762), equation 1: a row of the attention matrix.

    >>> model = nn.Sequential(SelfAttention(4, heads=2), nn.Flatten())
    >>> attention_from(model, torch.zeros(1, 4, 2, 2), (0, 1))[0, 0].tolist()
    [[0.25, 0.25], [0.25, 0.25]]
    """
    if images.ndim != 4:
        raise ValueError(f"expected images of shape (batch, channels, height, width), got {tuple(images.shape)}")
    if len(position) != 2 or not all(isinstance(number, Integral) for number in position):
        raise ValueError(f"expected a position of two whole numbers, row and column, got {position}; round it")
    height, width = images.shape[2:]
    row, column = position
    if not (0 <= row < height and 0 <= column < width):
        raise ValueError(f"expected a position in images of {height} x {width} pixels, got row {row}, column {column}")
    blocks = {name: part for name, part in model.named_modules() if isinstance(part, SelfAttention | NonLocal)}
    if not blocks or block not in (None, *blocks):
        choices = f"out of {', '.join(blocks)}" if blocks else "of self-attention in the model"
        raise ValueError(f"expected a block {choices}, got {block or type(model).__name__}; see attention_maps")
    found: list[Tensor] = []

    def read(gate: ReceivedAttention, inputs: tuple[Any, ...], output: Tensor) -> None:
        query, key, (h, w), *biases = inputs
        cell = row * h // height * w + column * w // width
        bias = biases[0] if biases else None
        asked = gate.weights(query[:, :, cell, None], key, None if bias is None else bias[:, cell, None])
        found.append(asked.squeeze(2).unflatten(2, (h, w)))

    with untouched(model) as net, torch.no_grad():
        for name in blocks if block is None else [block]:
            net.get_submodule(f"{name}.gate".lstrip(".")).register_forward_hook(read)
        net(images)
    if not found:
        raise ValueError(f"expected a block that runs, got {block or ', '.join(blocks)}, which did not")
    return found[-1]
