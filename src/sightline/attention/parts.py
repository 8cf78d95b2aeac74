"""Poolings that give several vectors per image, each with a map: representative vectors and bilinear attention."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, cast, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.overrides import handle_torch_function, has_torch_function_unary
from torchvision.models.resnet import BasicBlock

from sightline.attention.bilinear import signed_root
from sightline.attention.registry import check_choice, register

__all__ = ["BilinearAttentionPooling", "RepresentativeVectors"]

Update = Literal["cosine", "normalized"]
First = Literal["norm", "random"]
Variant = Literal["wsdan", "brnpa"]

_EPS = 1e-5  # of a vector's norm, as in the official code
_GOLDEN_RATIO = 0.618033988749895


class _Refined(torch.autograd.Function):
    """Picks and the vectors around them. The backward pass allocates one tensor of the features' size, its result.

    With u_k = f_p / n_p of pick p and n_i = |f_i| + eps, every gradient that reaches the cosine s_ki = <f_i, u_k> / n_i
    is a number times f_p, u_k or f_i. So all of them and that of v_k = sum_i w_ki f_i are one product (c,2k) x (2k,n)
    on top of the features scaled by a number per position. Only inputs and outputs are saved, and the backward pass is
    made of differentiable operations: second derivatives are exact.
    """

    @staticmethod
    def forward(
        features: Tensor, start: Tensor | None, k: int, update: Update, power: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        lengths = torch.linalg.vector_norm(features, dim=1)
        norms = lengths + _EPS
        # Scaled, since half precision cannot hold the square of a norm of 256.
        scores = (norms / norms.amax(1, keepdim=True)) ** power if start is None else start
        cosines: list[Tensor] = []
        picks: list[Tensor] = []
        for _ in range(k):
            pick = scores.argmax(1, keepdim=True)
            unit = _at(features, pick).mT / norms.gather(1, pick).unsqueeze(2)
            cosine = (torch.bmm(unit, features).squeeze(1) / norms).relu()
            scores = scores * (1 - (cosine if update == "cosine" else _normalized(cosine)))
            cosines.append(cosine)
            picks.append(pick)
        stacked = torch.stack(cosines, 1)
        return torch.bmm(_normalized(stacked), features.mT), stacked, lengths, torch.cat(picks, 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(inputs[0], *output)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        features, vectors, cosines, lengths, picks = ctx.saved_tensors
        grad_vectors, grad_cosines, grad_lengths, _ = grad_outputs
        with _no_autocast(features.device.type):
            norms = lengths + _EPS
            tiny = torch.finfo(features.dtype).tiny
            through_weights = torch.bmm(grad_vectors, features) - (grad_vectors * vectors).sum(2, keepdim=True)
            grad_cosines = grad_cosines + through_weights / cosines.sum(2, keepdim=True).clamp_min(tiny)
            grad_cosines = grad_cosines * (cosines > 0)
            products = grad_cosines / norms.unsqueeze(1) / norms.gather(1, picks).unsqueeze(2)
            shrink = grad_cosines * cosines
            grad_picks = shrink.sum(2) / norms.gather(1, picks)
            grad_lengths = (grad_lengths - shrink.sum(1) / norms).scatter_add(1, picks, -grad_picks)
            left = torch.cat([grad_vectors.mT, _at(features, picks)], 2)
            right = torch.cat([_normalized(cosines), products], 1)
            gradient = features * (grad_lengths / lengths.clamp_min(tiny)).unsqueeze(1)
            if features.is_contiguous():
                gradient.baddbmm_(left, right)
            else:  # channels-last: the same product the way its memory runs
                gradient.mT.baddbmm_(right.mT, left.mT)
            index = picks.unsqueeze(1).expand(-1, features.shape[1], -1)
            gradient.scatter_add_(2, index, torch.bmm(features, products.mT))
        return gradient, None, None, None, None


def _no_autocast(device: str) -> AbstractContextManager[object]:
    # the meta device has no autocast
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def _at(features: Tensor, picks: Tensor) -> Tensor:
    return features.gather(2, picks.unsqueeze(1).expand(-1, features.shape[1], -1))


def _normalized(cosines: Tensor) -> Tensor:
    return cosines / cosines.sum(-1, keepdim=True).clamp_min(torch.finfo(cosines.dtype).tiny)


def representative_vectors(
    features: Float[Tensor, "b c h w"],
    start: Float[Tensor, "b n"] | None = None,
    *,
    k: int = 3,
    update: Update = "cosine",
    power: int = 1,
) -> tuple[Float[Tensor, "b k c"], Float[Tensor, "b k h w"], Int[Tensor, "b k"]]:
    """Vectors, weights and picked positions of `RepresentativeVectors`.

    Args:
        features: the feature map.
        start: score of each position before the first pick. None: its norm.
        k: number of vectors.
        update: see `RepresentativeVectors`.
        power: see `RepresentativeVectors`.

    Raises:
        ValueError: fewer positions than vectors.

    >>> vectors, maps, picks = representative_vectors(torch.tensor([[[[2.0, 0.0, 0.0]], [[0.0, 1.0, 0.0]]]]), k=2)
    >>> vectors.tolist(), maps.tolist(), picks.tolist()
    ([[[2.0, 0.0], [0.0, 1.0]]], [[[[1.0, 0.0, 0.0]], [[0.0, 1.0, 0.0]]]], [[0, 1]])
    """
    if has_torch_function_unary(features):  # autograd functions do not reach torch-function modes by themselves
        return handle_torch_function(
            representative_vectors, (features,), features, start, k=k, update=update, power=power
        )
    h, w = features.shape[2:]
    if h * w < k:
        raise ValueError(f"expected at least k={k} positions, got {h * w} ({h}x{w}); take a smaller k or a larger map")
    with _no_autocast(features.device.type):
        outputs = _Refined.apply(features.flatten(2), start, k, update, power)
        vectors, cosines, _, picks = cast(tuple[Tensor, Tensor, Tensor, Tensor], outputs)
        return vectors, _normalized(cosines).unflatten(2, (h, w)), picks


@register("brnpa")
class RepresentativeVectors(nn.Module):
    """Pools a feature map into k vectors around k positions that differ from one another; it learns nothing itself.

    The first position is the one with the largest norm |f_i|. Its map is the cosine of every position with it, divided
    by the sum, and its vector the features weighted by that map. Then each position's score is multiplied by one minus
    its cosine, and the next position is the one with the highest score. The child `gate` hands on the k maps.

    The gradient flows through features and cosines, not through the choice of the positions. Maps of an image sum to 1;
    where all features are 0, maps and vectors are 0.

    Meant for features that are not negative, as after a ReLU. In others a negative cosine counts as 0, so positions
    that point away belong to no part.

    Args:
        channels: channels of the feature map. None: unknown, and `out_channels` is None.
        k: number of vectors.
        update: "cosine", a score is multiplied by 1 - cosine; "normalized", by 1 - cosine / sum of the cosines. The
            latter hardly changes a score where there are many positions, so that the same one is picked again.
        power: power of the norm that is the first score.
        refine: False: the vectors are those at the picked positions themselves.
        first: "random", random scores instead of the norms: in training from torch's random state; in eval mode they
            depend on the position only and are the same for all images.

    Raises:
        ValueError: a bad option; in the forward pass, fewer positions than vectors.

    Source: Gomez et al., "Improve the Interpretability of Attention: A Fast, Accurate, and Interpretable
    High-Resolution Attention Model" (BR-NPA), Pattern Recognition 2022 (2106.02566), and its code.

    Differs: the lecture slides have update "normalized" and the squared norm (`power=2`); the authors' code, like
    the defaults here, "cosine" and the norm. The code keeps negative cosines.

    >>> parts = RepresentativeVectors(512, k=3)
    >>> parts.out_channels, parts(torch.zeros(2, 512, 5, 7)).shape, parts.weights(torch.zeros(2, 512, 5, 7)).shape
    (1536, torch.Size([2, 1536]), torch.Size([2, 3, 5, 7]))
    """

    def __init__(
        self,
        channels: int | None = None,
        *,
        k: int = 3,
        update: Update = "cosine",
        power: Literal[1, 2] = 1,
        refine: bool = True,
        first: First = "norm",
    ) -> None:
        super().__init__()
        check_choice("update", update, get_args(Update))
        check_choice("first", first, get_args(First))
        check_choice("power", power, (1, 2))
        _check_vectors(k)
        self.k = k
        self.update: Update = update
        self.power = power
        self.refine = refine
        self.first = first
        self.out_channels = None if channels is None else k * channels
        self.gate = nn.Identity()

    def forward(self, features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b kc"]:
        """The k vectors of each image, one after the other."""
        vectors, maps, picks = self._represent(features)
        gated = self.gate(maps)
        if not self.refine:
            vectors = _at(features.flatten(2), picks).mT
        elif gated is not maps:  # a hook on the gate has replaced the maps
            vectors = torch.bmm(gated.flatten(2), features.flatten(2).mT)
        return vectors.flatten(1)

    def weights(self, features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k h w"]:
        """The k maps."""
        return self._represent(features)[1]

    def similarities(self, features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k k"]:
        """Cosine of each vector with each: near 1 everywhere means that the vectors show the same part.

        >>> RepresentativeVectors(k=2).similarities(torch.eye(2)[None, :, None]).tolist()
        [[[1.0, 0.0], [0.0, 1.0]]]
        """
        units = normalize(self(features).unflatten(1, (self.k, -1)), dim=2)
        return units @ units.mT

    def extra_repr(self) -> str:
        """Options."""
        return f"k={self.k}, update={self.update}, power={self.power}, refine={self.refine}, first={self.first}"

    def _represent(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        start = None if self.first == "norm" else self._start(features)
        return representative_vectors(features, start, k=self.k, update=self.update, power=self.power)

    def _start(self, features: Tensor) -> Tensor:
        images, _, h, w = features.shape
        if self.training:
            return torch.rand(images, h * w, device=features.device)
        positions = torch.arange(1, h * w + 1, device=features.device)
        return (positions * _GOLDEN_RATIO % 1).expand(images, -1)


@register("bap")
class BilinearAttentionPooling(nn.Module):
    """Pools a feature map into k vectors, each the mean over positions of the features times a learned map.

    The child `gate` returns the k maps, which are not negative and sum to anything.

    Args:
        channels: channels of the feature map.
        k: number of maps and vectors; WS-DAN has 32.
        variant: origin of the maps: "wsdan", a 1x1 convolution, BatchNorm, ReLU; "brnpa", the model that BR-NPA
            is compared with, a residual block of two 3x3 convolutions, a 1x1 convolution, ReLU.
        normalized: signed square root of the vector, then length 100. None: in "wsdan" only.

    Raises:
        ValueError: an unknown `variant`, k below 1.

    Source: Hu et al., "See Better Before Looking Closer: Weakly Supervised Data Augmentation Network" (1901.09891),
    equations 1 to 3; "brnpa": Gomez et al., BR-NPA (2106.02566), its "B-CNN (our impl.)".

    >>> BilinearAttentionPooling(8, k=2)(torch.zeros(2, 8, 5, 7)).shape
    torch.Size([2, 16])
    """

    def __init__(
        self, channels: int, *, k: int = 3, variant: Variant = "wsdan", normalized: bool | None = None
    ) -> None:
        super().__init__()
        check_choice("variant", variant, get_args(Variant))
        _check_vectors(k)
        self.out_channels = k * channels
        self.normalized = variant == "wsdan" if normalized is None else normalized
        if variant == "wsdan":
            self.gate = nn.Sequential(nn.Conv2d(channels, k, 1, bias=False), nn.BatchNorm2d(k), nn.ReLU())
        else:
            self.gate = nn.Sequential(BasicBlock(channels, channels), nn.Conv2d(channels, k, 1), nn.ReLU())

    def forward(self, features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b kc"]:
        """The k vectors of each image, one after the other."""
        maps = self.gate(features).flatten(2)
        vectors = torch.bmm(maps / maps.shape[2], features.flatten(2).mT).flatten(1)
        return 100 * normalize(signed_root(vectors)) if self.normalized else vectors


def _check_vectors(k: int) -> None:
    if k < 1:
        raise ValueError(f"expected k of 1 or more vectors, got {k}; 3 is the paper's")
