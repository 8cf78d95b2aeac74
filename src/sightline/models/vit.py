"""A small vision transformer for the embedded data set.

Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021, section 3.1: pre-LN blocks, a class token whose
last state is classified, learned positions that are interpolated for images of another size.

Differs: the class token has no position of its own, which would only be added to it. Images whose sides the patch does
not divide get zeros at the right and at the bottom.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from sightline.attention.self_attention import ReceivedAttention, positions_at


class TokenAttention(nn.Module):
    """Multi-head self-attention over a class token and the patches of an image.

    The child `gate` yields what the class token reads from each patch, one map per head. It runs only while a hook
    listens to it.

    >>> TokenAttention(8, 2)(torch.zeros(2, 13, 8), (3, 4)).shape
    torch.Size([2, 13, 8])
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.gate = ReceivedAttention(class_token=True)
        self.project = nn.Linear(width, width)

    def forward(self, tokens: Float[Tensor, "b n c"], size: tuple[int, int]) -> Float[Tensor, "b n c"]:
        """Tokens that gathered from all; `size` is the number of patches, vertically and horizontally."""
        query, key, value = self.qkv(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        return self.project(self.gate.attend(query, key, value, size).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention, then a perceptron with one hidden layer, each added to its input and each behind a LayerNorm.

    >>> Block(8, 2)(torch.zeros(2, 13, 8), (3, 4)).shape
    torch.Size([2, 13, 8])
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attention = TokenAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, tokens: Float[Tensor, "b n c"], size: tuple[int, int]) -> Float[Tensor, "b n c"]:
        """Tokens of the next block."""
        tokens = tokens + self.attention(self.norm1(tokens), size)
        return tokens + self.perceptron(self.norm2(tokens))


class TinyViT(nn.Module):
    """Vision transformer; attention reads as `blocks.0.attention`, `blocks.1.attention`, ...

    Args:
        num_classes: number of logits.
        width: length of a token.
        depth: number of blocks.
        heads: attention maps per block.
        patch: side of a patch in pixels.
        size: side of the images for which the positions are learned; others are interpolated.

    Raises:
        ValueError: a width that the heads do not divide, a size that the patch does not divide, a number below 1.

    >>> TinyViT(10, depth=1)(torch.zeros(2, 3, 40, 56)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        num_classes: int = 10,
        *,
        width: int = 64,
        depth: int = 4,
        heads: int = 4,
        patch: int = 5,
        size: int = 40,
    ) -> None:
        super().__init__()
        if width < 1 or depth < 1:
            raise ValueError(
                f"expected a width and a depth of 1 or more, got {width} and {depth}; the defaults are 64 and 4"
            )
        if heads < 1 or width % heads:
            raise ValueError(f"expected heads that divide width {width}, got {heads}; choose another number")
        if patch < 1 or size < 1 or size % patch:
            raise ValueError(f"expected a patch that divides size {size}, got {patch}; choose another number")
        self.patch = patch
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.class_token = nn.Parameter(torch.empty(1, 1, width))
        self.positions = nn.Parameter(torch.empty(1, width, size // patch, size // patch))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, num_classes)
        nn.init.trunc_normal_(self.class_token, std=0.02)
        nn.init.trunc_normal_(self.positions, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b n"]:
        """Logits."""
        height, width = images.shape[2:]
        patches = self.patches(F.pad(images, (0, -width % self.patch, 0, -height % self.patch)))
        size = patches.shape[2], patches.shape[3]
        placed = (patches + positions_at(self.positions, size)).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(images.shape[0], -1, -1), placed], dim=1)
        for block in self.blocks:
            tokens = block(tokens, size)
        return self.head(self.norm(tokens[:, 0]))
