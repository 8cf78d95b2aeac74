"""Attention of timm's vision transformers as maps of the image."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


def patch_map(
    weights: Float[Tensor, "b heads n n"], grid: tuple[int, int], *, from_first: bool
) -> Float[Tensor, "b heads h w"]:
    """Attention that each patch receives from the first token, or from all patches on average; `grid` (h, w).

    The patches are the last h * w tokens. What the tokens before them receive is left out: a map sums to 1 less that.

    >>> import torch
    >>> patch_map(torch.tensor([[[[0.5, 0.25, 0.25], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]]]), (1, 2), from_first=True)
    tensor([[[[0.2500, 0.2500]]]])
    """
    patches = grid[0] * grid[1]
    received = weights[:, :, 0] if from_first else weights[:, :, -patches:].mean(2)
    return received[:, :, -patches:].unflatten(2, grid)


@contextmanager
def patch_maps(model: nn.Module, keep: Callable[[str], Callable[..., None]]) -> Generator[None]:
    """While the model runs, hand the maps of each attention block to the hook `keep(its name)`.

    A block is a module with `fused_attn` and a Dropout `attn_drop` in a timm model with a patch embedding, whose
    weights are between all its tokens: windows, subsampled keys and channels are passed over. The fused kernel, which
    shows no weights, is off until the model has run.
    The maps are those of the class token's query if the head reads that token, else the mean over the patches' queries.
    """
    fused: list[tuple[Any, bool]] = []
    handles: list[RemovableHandle] = []
    try:
        for path, vit in model.named_modules():
            if not hasattr(getattr(vit, "patch_embed", None), "dynamic_feat_size"):
                continue
            grid = _Grid(vit)
            handles.append(grid.embedding.register_forward_pre_hook(grid.measure))
            for name, block in vit.named_modules(prefix=path):
                drop = getattr(block, "attn_drop", None)
                if hasattr(block, "fused_attn") and isinstance(drop, nn.Module):
                    fused.append((block, bool(block.fused_attn)))
                    handles.append(drop.register_forward_hook(grid.hand_to(keep(name))))
        for block, _ in fused:
            block.fused_attn = False
        yield
    finally:
        for handle in handles:
            handle.remove()
        for block, was in fused:
            block.fused_attn = was


class _Grid:
    """Patches of the images that a transformer is looking at."""

    def __init__(self, vit: Any) -> None:
        self.embedding = vit.patch_embed
        self.prefix: int = getattr(vit, "num_prefix_tokens", 0)
        has_class = getattr(vit, "cls_token", None) is not None and self.prefix > 0
        self.from_first = has_class and getattr(vit, "global_pool", "token") == "token"
        self.size = 0, 0

    def measure(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.size = self.embedding.dynamic_feat_size(tuple(inputs[0].shape[2:]))

    def hand_to(self, keep: Callable[..., None]) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            tokens = self.prefix + self.size[0] * self.size[1]
            if output.ndim == 4 and output.shape[2:] == (tokens, tokens):
                keep(module, inputs, patch_map(output, self.size, from_first=self.from_first))

        return hook
