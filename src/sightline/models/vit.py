"""A small vision transformer for the embedded data set.

Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021, section 3.1: pre-LN blocks, a class token whose
last state is classified, learned positions that are interpolated for images of another size; timm's code.

Differs: the class token has no position of its own, which would only be added to it, and starts like the positions.
Images whose sides the patch does not divide are padded with zeros at the right and at the bottom.
"""

from typing import Any

from timm.layers.attention import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from sightline.attention.self_attention import ReceivedAttention

_OLD_NAMES = {
    "patches": "patch_embed.proj",
    "class_token": "cls_token",
    "positions": "pos_embed",
    ".attention.": ".attn.",
    ".project.": ".proj.",
    ".perceptron.0.": ".mlp.fc1.",
    ".perceptron.2.": ".mlp.fc2.",
}
"""Parts of the parameters' names in version 0.1, and what they are called now."""


class GridAttention(Attention):
    """timm's attention with a child `gate`, which yields what the class token reads from each patch: a map per head.

    The gate runs only while a hook listens to it.
    """

    grid: tuple[int, int] = (0, 0)
    """Height and width of the current images in patches."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.gate = ReceivedAttention(class_token=True)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Tokens that gathered from all others; timm's other arguments are not used."""
        query, key, value = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        return self.proj(self.gate.attend(query, key, value, self.grid).transpose(1, 2).flatten(2))


class TinyViT(VisionTransformer):
    """Vision transformer; attention reads as `blocks.0.attn`, `blocks.1.attn`, ...

    Args:
        num_classes: number of logits.
        width: length of a token.
        depth: number of blocks.
        heads: attention maps per block.
        patch: side of a patch in pixels.
        size: side of the images for which the positions are learned; they are interpolated for others.

    Raises:
        ValueError: a width that the heads do not divide, a size that the patch does not divide, a number below 1.

    >>> import torch
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
        if width < 1 or depth < 1:
            raise ValueError(
                f"expected a width and a depth of 1 or more, got {width} and {depth}; the defaults are 64 and 4"
            )
        if heads < 1 or width % heads:
            raise ValueError(f"expected heads that divide width {width}, got {heads}; choose another number")
        if patch < 1 or size < 1 or size % patch:
            raise ValueError(f"expected a patch that divides size {size}, got {patch}; choose another number")
        super().__init__(
            img_size=size,
            patch_size=patch,
            num_classes=num_classes,
            embed_dim=width,
            depth=depth,
            num_heads=heads,
            no_embed_class=True,
            dynamic_img_size=True,
            dynamic_img_pad=True,
            attn_layer=GridAttention,
        )
        assert self.cls_token is not None
        nn.init.trunc_normal_(self.cls_token, std=0.02)

    def _pos_embed(self, x: Tensor) -> Tensor:
        for module in self.blocks.modules():
            if isinstance(module, GridAttention):
                module.grid = x.shape[1], x.shape[2]
        return super()._pos_embed(x)

    @staticmethod
    def current_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of version 0.1 by their current names; others as they are."""
        if "class_token" not in state:
            return state
        renamed: dict[str, Tensor] = {}
        for name, values in state.items():
            for old, new in _OLD_NAMES.items():
                name = name.replace(old, new)
            renamed[name] = values.flatten(2).mT.contiguous() if name == "pos_embed" else values
        return renamed
