"""Hard attention: reads one position (or k) instead of a mean over all of them."""

from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from sightline.attention.pooling import Compat, CompatibilityGate
from sightline.attention.registry import check_choice, register

__all__ = ["Glimpse", "HardAttention", "MovingBaseline", "reinforce_loss"]

Estimator = Literal["reinforce", "gumbel", "top_k"]


class HardGate(CompatibilityGate):
    """Weights of the positions of a feature map: one-hot (1/k each at k positions), or soft for comparison.

    Options as in `HardAttention`. `scores` and `soft` are those of soft attention, and the parameters have the names
    of `LearnToPayAttention`, so a soft model's weights load into a hard one.

    Attributes:
        log_prob: "reinforce", after a forward in training mode: log-probability (b,) of the positions drawn, with its
            graph; if the soft weights were used, their negative entropy, whose gradient in this form is zero.
        entropy: the entropy (b,) of the distribution they were drawn from.

    >>> gate = HardGate(1).eval()
    >>> gate.u.weight.data.fill_(1.0).item()
    1.0
    >>> gate(torch.tensor([[[[1.0, 3.0, 2.0]]]])).tolist()
    [[[[0.0, 1.0, 0.0]]]]
    """

    def __init__(
        self,
        channels: int,
        *,
        estimator: Estimator = "reinforce",
        k: int = 1,
        temperature: float = 1.0,
        mixed: float = 0.5,
        compat: Compat = "none",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(channels, compat=compat)
        check_choice("estimator", estimator, get_args(Estimator))
        if k < 1 or (k > 1 and estimator != "top_k"):
            raise ValueError(f"expected k of 1, or more with estimator='top_k'; got {k} with {estimator!r}")
        if temperature <= 0:
            raise ValueError(f"expected a temperature above 0, got {temperature}; 1 leaves the scores as they are")
        if not 0 <= mixed <= 1:
            raise ValueError(f"expected mixed to be a probability, got {mixed}; 0 always samples, 1 never")
        self.estimator = estimator
        self.k = k
        self.temperature = temperature
        self.mixed = mixed
        self.generator = generator
        self.log_prob: Float[Tensor, " b"] | None = None
        self.entropy: Float[Tensor, " b"] | None = None

    def soft(
        self, features: Float[Tensor, "b c h w"], query: Float[Tensor, "b c"] | None = None
    ) -> Float[Tensor, "b 1 h w"]:
        """Soft attention on the same scores: their softmax at this temperature."""
        return (self._rows(features, query) / self.temperature).softmax(1).unflatten(1, (1, *features.shape[2:]))

    def forward(
        self, features: Float[Tensor, "b c h w"], query: Float[Tensor, "b c"] | None = None
    ) -> Float[Tensor, "b 1 h w"]:
        """Weight of every position.

        Raises:
            ValueError: fewer positions than `k`; "pc" or "dp" without a query.
        """
        scores = self._rows(features, query)
        if self.k > scores.shape[1]:
            raise ValueError(f"expected at least k = {self.k} positions, got {scores.shape[1]}; choose a smaller k")
        if not self.training:
            weights = self._best(scores)
        elif self.estimator == "reinforce":
            weights = self._sampled(scores)
        else:
            noisy = scores if self.estimator == "top_k" else scores + self._gumbel(scores)
            soft = (noisy / self.temperature).softmax(1)
            weights = self._best(noisy) + (soft - soft.detach())
        return weights.to(features.dtype).unflatten(1, (1, *features.shape[2:]))

    def reinforced(self, reward: Float[Tensor, " b"]) -> Float[Tensor, ""]:
        """`reinforce_loss` of the positions drawn last; the baseline is the mean reward of the batch's other images.

        0 if none were drawn, and for a single image, which has no others.
        """
        if self.log_prob is None or self.entropy is None or len(reward) < 2:
            return reward.new_zeros(())
        others = (reward.sum() - reward) / (len(reward) - 1)
        return reinforce_loss(self.log_prob, reward - others, 0.0, self.entropy)

    def __getstate__(self) -> dict[str, Any]:
        """State for copies and files, without the tensors of the last forward's graph."""
        return self.__dict__ | {"log_prob": None, "entropy": None}

    def _rows(self, features: Tensor, query: Tensor | None) -> Float[Tensor, "b n"]:
        return self.scores(features, query).flatten(1)

    def _best(self, scores: Float[Tensor, "b n"]) -> Float[Tensor, "b n"]:
        return torch.zeros_like(scores).scatter(1, scores.topk(self.k, dim=1).indices, 1 / self.k)

    def _gumbel(self, scores: Float[Tensor, "b n"]) -> Float[Tensor, "b n"]:
        dtype = torch.promote_types(scores.dtype, torch.float32)
        return -torch.empty_like(scores, dtype=dtype).exponential_(generator=self.generator).log()

    def _sampled(self, scores: Float[Tensor, "b n"]) -> Float[Tensor, "b n"]:
        logs = (scores / self.temperature).log_softmax(1)
        soft = logs.exp()
        sample = self._best(logs + self._gumbel(logs)).detach()
        chance = torch.empty_like(soft[:, :1], dtype=torch.float32).uniform_(generator=self.generator)
        weights = torch.where(chance < self.mixed, soft, sample)
        self.log_prob = (weights.detach() * logs).sum(1)
        self.entropy = -(soft * logs).sum(1)
        return weights


@register("hard")
class HardAttention(nn.Module):
    """Pools a feature map into the local vector of one position per image (or the mean of k), chosen by its score.

    In eval mode it takes the position(s) of the largest score. In training mode, by `estimator`:

    - "reinforce" draws a position from the softmax of the scores. No gradient flows through the choice: add
      `reinforce_loss` with `log_prob` and `entropy` of the last forward in training mode.
    - "gumbel" draws one, too; the gradient is that of the soft weights (straight-through Gumbel-softmax).
    - "top_k" takes the k best, each with the weight 1/k; the gradient is that of the soft weights.

    The child `gate` returns the weights used, `gate.soft` the soft weights on the same scores.

    Args:
        channels: channels of the feature map.
        estimator: see above.
        k: number of positions, for "top_k".
        temperature: the scores are divided by it before a softmax.
        mixed: "reinforce": probability that an image uses its soft weights instead of a sample.
        compat: score of a position, see `CompatibilityGate`; "pc" and "dp" need a query of length `channels`.
        generator: source of random numbers. None: the global generator, as in Dropout.

    Raises:
        ValueError: an unknown or impossible option; in the forward pass, fewer positions than `k`.

    Source: Xu et al., "Show, Attend and Tell", ICML 2015, section 4.1; Jang et al., "Categorical Reparameterization
    with Gumbel-Softmax", ICLR 2017, section 2.2.

    Differs: the authors' code chooses soft weights for a whole batch; the paper and this module, for each image.

    >>> HardAttention(8)(torch.zeros(2, 8, 5, 7)).shape
    torch.Size([2, 8])
    """

    def __init__(
        self,
        channels: int,
        *,
        estimator: Estimator = "reinforce",
        k: int = 1,
        temperature: float = 1.0,
        mixed: float = 0.5,
        compat: Compat = "none",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.out_channels = channels
        self.gate = HardGate(
            channels,
            estimator=estimator,
            k=k,
            temperature=temperature,
            mixed=mixed,
            compat=compat,
            generator=generator,
        )

    @property
    def log_prob(self) -> Float[Tensor, " b"] | None:
        """Log-probability of the positions drawn by the last "reinforce" forward in training mode, see `HardGate`."""
        return self.gate.log_prob

    @property
    def entropy(self) -> Float[Tensor, " b"] | None:
        """Entropy of the distribution they were drawn from."""
        return self.gate.entropy

    def forward(
        self, features: Float[Tensor, "b c h w"], query: Float[Tensor, "b c"] | None = None
    ) -> Float[Tensor, "b c"]:
        """Vector of the chosen position of each image."""
        weights = self.gate(features, query).flatten(2)
        return torch.bmm(weights, features.flatten(2).transpose(1, 2)).squeeze(1)

    def own_loss(self, logits: Float[Tensor, "b n"], labels: Int[Tensor, " b"]) -> Float[Tensor, ""]:
        """`reinforce_loss` of the last forward in training mode; 0 with other estimators and for a single image.

        The reward of an image is the log-probability of its label, the baseline the mean reward of the other images.

        Differs: the paper's baseline is a moving average over batches, which would be additional training state.
        """
        return self.gate.reinforced(-F.cross_entropy(logits, labels, reduction="none"))


def reinforce_loss(
    log_prob: Float[Tensor, " b"],
    reward: Float[Tensor, " b"],
    baseline: float | Float[Tensor, ""],
    entropy: Float[Tensor, " b"],
    *,
    entropy_weight: float = 0.002,
) -> Float[Tensor, ""]:
    """Loss whose gradient estimates that of minus the expected reward, with a bonus for entropy.

    Add it to the loss of the task; the reward, usually the log-probability of the label, gets no gradient.

    Source: Xu et al., "Show, Attend and Tell", ICML 2015, section 4.1, last equation; `entropy_weight` as in the
    authors' code. Their weight of the reward term can be applied to `reward` and `baseline`.

    >>> reinforce_loss(torch.tensor([-1.0]), torch.tensor([3.0]), 1.0, torch.tensor([0.5]), entropy_weight=2.0).item()
    1.0
    """
    return -((reward.detach() - baseline) * log_prob + entropy_weight * entropy).mean()


class MovingBaseline(nn.Module):
    """Exponential moving average of the rewards, starting at 0: b <- decay * b + (1 - decay) * mean reward.

    A call returns the value before this batch, which keeps the estimate unbiased, and then, in training mode, updates
    it with the batch.

    Raises:
        ValueError: a decay outside [0, 1).

    Source: Xu et al., "Show, Attend and Tell", ICML 2015, section 4.1.

    >>> baseline = MovingBaseline(decay=0.5)
    >>> baseline(torch.tensor([2.0, 4.0])).item(), baseline(torch.tensor([0.0])).item(), baseline.value.item()
    (0.0, 1.5, 0.75)
    """

    value: Tensor

    def __init__(self, decay: float = 0.9) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"expected a decay of 0 or more and below 1, got {decay}; the paper's is 0.9")
        self.decay = decay
        self.register_buffer("value", torch.zeros(()))

    def forward(self, reward: Float[Tensor, " b"]) -> Float[Tensor, ""]:
        """Baseline for this batch."""
        before = self.value.clone()
        if self.training:
            self.value.lerp_(reward.detach().mean().to(self.value), 1 - self.decay)
        return before


class Glimpse(nn.Module):
    """Square crop of an image around the attended location: the mean of the positions, weighted by attention.

    The crop stays inside the image. With `hard` it starts at a whole pixel and copies pixels; otherwise it is
    interpolated bilinearly and differentiable with respect to the weights (except at the border, where it is clamped).

    Args:
        size: side of the crop in pixels.
        hard: copy whole pixels.

    Raises:
        ValueError: a size below 1; in the forward pass, an image smaller than the crop.

    Source: Mnih et al., "Recurrent Models of Visual Attention", NeurIPS 2014, for the glimpse; Jaderberg et al.,
    "Spatial Transformer Networks", NeurIPS 2015, equation 5, for the interpolation.

    >>> image = torch.arange(16.0).reshape(1, 1, 4, 4)
    >>> Glimpse(2, hard=True)(image, torch.tensor([[[[0.0, 0.0], [0.0, 1.0]]]])).tolist()
    [[[[10.0, 11.0], [14.0, 15.0]]]]
    """

    def __init__(self, size: int, *, hard: bool = False) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"expected a crop of at least 1 pixel, got {size}; choose a larger size")
        self.size = size
        self.hard = hard

    def forward(
        self, images: Float[Tensor, "b c H W"], weights: Float[Tensor, "b 1 h w"]
    ) -> Float[Tensor, "b c {self.size} {self.size}"]:
        """Crop each image where its weights, which sum to 1, are."""
        if self.size > min(images.shape[2:]):
            raise ValueError(
                f"expected images of at least {self.size} pixels, got {images.shape[2]} x {images.shape[3]}; "
                "choose a smaller crop"
            )
        rows = self._pixels(weights.sum(3).squeeze(1), images.shape[2]).to(images.dtype)
        columns = self._pixels(weights.sum(2).squeeze(1), images.shape[3]).to(images.dtype)
        return rows.unsqueeze(1) @ images @ columns.unsqueeze(1).transpose(2, 3)

    def _pixels(self, weights: Float[Tensor, "b n"], side: int) -> Float[Tensor, "b s side"]:
        """Share of each pixel along one axis in each pixel of the crop."""
        exact = weights.to(torch.promote_types(weights.dtype, torch.float32))
        centers = (torch.arange(exact.shape[1], device=exact.device, dtype=exact.dtype) + 0.5) * side / exact.shape[1]
        first = ((exact * centers).sum(1) - self.size / 2).clamp(0, side - self.size)
        first = first.round() if self.hard else first
        at = first[:, None] + torch.arange(self.size, device=exact.device)
        return (1 - (at[:, :, None] - torch.arange(side, device=exact.device)).abs()).clamp(min=0)
