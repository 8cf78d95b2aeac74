"""The head of a model, read off the graph of its logits.

Names of autograd nodes and what they save are no public interface of PyTorch. A release that renames or splits one
makes `head_of` return None: `cam` then refuses the model, and the other maps take a backward. Each node has its test in
tests/test_torch_features.py.
"""

from typing import Any

import torch
from torch import Tensor

from sightline.explainers.capture.features import Captured

_LINEAR = {"AddmmBackward0": 1, "MmBackward0": 0}  # node -> place of its input
_POOLED = ("MeanBackward1", "AvgPool2DBackward0")  # adaptive pooling to one position is a mean, too
_RESHAPED = set(
    "CloneBackward0 ReshapeAliasBackward0 SqueezeBackward0 SqueezeBackward1 SqueezeBackward2 ToCopyBackward0 "
    "UnsafeViewBackward0 UnsqueezeBackward0 ViewBackward0".split()
)


def head_of(logits: Tensor, captured: Captured) -> Tensor | None:
    """Weights (n, k) if the logits are one linear layer and the mean over a layer's positions; None for another head.

    The order does not matter: a 1 x 1 convolution is a linear layer at each position. Without a linear layer, the
    weights are the identity.
    """
    node, weights, pooled, channels = logits.grad_fn, None, False, logits.shape[1]
    while node is not None:
        if node is captured.tensor.grad_fn or getattr(node, "variable", None) is captured.tensor:
            if not pooled or channels != captured.layout.maps(captured.tensor.detach()).shape[1]:
                return None
            return torch.eye(channels).to(logits) if weights is None else weights
        name, place = node.name(), 0
        if name in _LINEAR and weights is None and not pooled:
            weights, place = node._saved_mat2.mT, _LINEAR[name]  # pyright: ignore[reportAttributeAccessIssue]
            channels = weights.shape[1]
        elif weights is None and _is_pointwise(node):
            weights = node._saved_weight.flatten(1)  # pyright: ignore[reportAttributeAccessIssue]
            channels = weights.shape[1]
        elif name in _POOLED and not pooled:
            pooled = _is_mean_of_all(node, channels, channels_last=captured.layout.channels_last)
            if not pooled:
                return None
        elif name not in _RESHAPED and not _picks_the_only_one(node) and not _is_restrided_mean(node, channels):
            return None
        node = node.next_functions[place][0]
    return None


def _is_mean_of_all(node: Any, channels: int, *, channels_last: bool) -> bool:
    """A mean over all positions, or an average pooling whose kernel is the whole grid."""
    if node.name() == "AvgPool2DBackward0":
        whole = tuple(node._saved_self.shape[1:]) == (channels, *node._saved_kernel_size)
        return whole and not any(node._saved_padding) and node._saved_divisor_override is None
    shape = list(node._saved_self_sym_sizes)
    dims = {_signed(dim) % len(shape) for dim in node._saved_dim}
    channel_dim = len(shape) - 1 if channels_last else 1
    return dims == set(range(1, len(shape))) - {channel_dim} and shape[channel_dim] == channels


def _signed(dim: int) -> int:
    return dim - 2**64 if dim >= 2**63 else dim


def _is_pointwise(node: Any) -> bool:
    """A 1 x 1 convolution that keeps the grid."""
    if node.name() != "ConvolutionBackward0" or node._saved_transposed or node._saved_groups != 1:
        return False
    return not any(node._saved_padding) and {*node._saved_weight.shape[2:], *node._saved_stride} == {1}


def _picks_the_only_one(node: Any) -> bool:
    return node.name() == "SelectBackward0" and node._saved_self_sym_sizes[_signed(node._saved_dim)] == 1


def _is_restrided_mean(node: Any, channels: int) -> bool:
    """The step that adaptive pooling adds behind the mean of a channels-last tensor."""
    if node.name() != "AsStridedBackward1" or node.next_functions[0][0].name() != "MeanBackward1":
        return False
    return tuple(node._saved_stride[:2]) == (channels, 1) and not node._saved_storage_offset
