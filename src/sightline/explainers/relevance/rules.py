"""Rules by which a layer hands the relevance of its outputs to its inputs, and which layer takes which."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import vjp

__all__ = ["AlphaBeta", "Composite", "Epsilon", "Flat", "Gamma", "Rule", "ZBox", "ZPlus", "Zero"]

Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""A convolution or a linear layer as a function of input, weight and bias."""
Part = tuple[float | Tensor, Tensor, Tensor, Tensor | None]
"""Fraction of the relevance, and weights of positive inputs, of negative inputs and bias that divide it."""
Bias = Literal["none", "share"]
"""Whether a layer's bias takes the share of its contribution, or none: then all relevance goes to the inputs."""
_STABILIZER = 1e-6


def _adjoint(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, ...]]]:
    """Value of a linear function, and its transpose."""
    value, transposed, *_ = cast("tuple[Any, ...]", vjp(function, *inputs))
    return value, transposed


def _stabilized(value: Tensor, epsilon: float = _STABILIZER) -> Tensor:
    """Away from 0, where a 0 counts as positive."""
    return torch.where(value < 0, value - epsilon, value + epsilon)


class Rule:
    """How a layer hands the relevance of its outputs to its inputs.

    A bias that is one of the contributions (`bias="share"`) keeps its part of the relevance. With `bias="none"` the
    bias is left out of the contributions, and all relevance of an output goes to its inputs, if any has a contribution.
    """

    for_pixels = False
    """Whether `back` yields the relevance, which an input of 0 may have too, and not relevance / input."""
    bias: Bias = "none"
    """What the bias takes."""

    def back(
        self,
        layer: Linear,
        x: Float[Tensor, "..."],
        weight: Float[Tensor, "..."],
        bias: Float[Tensor, "..."] | None,
        c: Float[Tensor, "..."],
    ) -> Float[Tensor, "..."]:
        """Relevance / input from `c` = relevance / output."""
        raise NotImplementedError


@dataclass(frozen=True)
class _WithBias(Rule):
    """Rules under which a bias can be one of the contributions."""

    bias: Bias = field(default="share", kw_only=True)

    def __post_init__(self) -> None:
        if self.bias not in get_args(Bias):
            raise ValueError(f"expected bias='none' or bias='share' in {type(self).__name__}, got {self.bias!r}")

    def contributing(self, bias: Tensor | None) -> Tensor | None:
        """The bias if it is one of the contributions."""
        return bias if self.bias == "share" else None


@dataclass(frozen=True)
class Zero(_WithBias):
    r"""LRP-0, $R_j = \sum_k x_j w_{jk} R_k / y_k$ with $y_k = \sum_j x_j w_{jk} + b_k$: gradient times input.

    With `bias="none"` the divisor is $y_k - b_k$, which may be near 0 where $y_k$ is not: deep networks overflow.

    Source: Bach et al. 2015 (PLoS ONE 10(7): e0130140), eq. 56; Montavon et al. 2019, table 10.1.

    >>> Zero().back(torch.nn.functional.linear, torch.ones(1, 2), torch.tensor([[3.0, -1.0]]), None, torch.ones(1, 1))
    tensor([[ 3., -1.]])
    """

    def back(self, layer: Linear, x: Tensor, weight: Tensor, bias: Tensor | None, c: Tensor) -> Tensor:
        """The ordinary gradient, times y / (y - b) where the bias takes nothing."""
        share = self.contributing(bias)
        z, transposed = _adjoint(lambda v: layer(v, weight, share), x)
        if share is not bias:
            c = c * torch.where(z == 0, 0, layer(x, weight, bias) / z)
        return transposed(c)[0]


@dataclass(frozen=True)
class Epsilon(_WithBias):
    r"""LRP-epsilon, $R_j = \sum_k x_j w_{jk} R_k / (y_k + \epsilon\,\mathrm{sign}\,y_k)$: weak outputs lose relevance.

    With `bias="none"` the divisor is made of $y_k - b_k$, which may be near 0 where $y_k$ is not: deep networks
    overflow unless epsilon is large.

    Raises:
        ValueError: an epsilon that is not positive.

    Source: Bach et al. 2015, eq. 58; Montavon et al. 2019, table 10.1.

    >>> linear, x, weight = torch.nn.functional.linear, torch.ones(1, 2), torch.tensor([[3.0, -2.0]])
    >>> Epsilon(1.0).back(linear, x, weight, None, torch.ones(1, 1))  # y = 1: half of the relevance is kept
    tensor([[ 1.5000, -1.0000]])
    """

    epsilon: float = _STABILIZER

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.epsilon > 0:
            raise ValueError(f"expected a positive epsilon, got {self.epsilon}; without it the rule is Zero()")

    def back(self, layer: Linear, x: Tensor, weight: Tensor, bias: Tensor | None, c: Tensor) -> Tensor:
        """The gradient of the stabilized outputs."""
        share = self.contributing(bias)
        z, transposed = _adjoint(lambda v: layer(v, weight, share), x)
        y = z if share is bias else layer(x, weight, bias)
        return transposed(y / _stabilized(z, self.epsilon) * c)[0]


@dataclass(frozen=True)
class _Signed(_WithBias):
    """Rules that weight positive and negative contributions differently; inputs may have either sign."""

    def parts(self, weight: Tensor, bias: Tensor | None, z: Callable[[], Tensor]) -> list[Part]:
        """The parts that share the relevance; `z()` is the sum of all contributions."""
        raise NotImplementedError

    def back(self, layer: Linear, x: Tensor, weight: Tensor, bias: Tensor | None, c: Tensor) -> Tensor:
        """Each part's relevance in proportion to its contributions."""
        y = layer(x, weight, bias)

        def relevance(fraction: float | Tensor, above: Tensor, below: Tensor, offset: Tensor | None) -> Tensor:
            def contributions(high: Tensor, low: Tensor) -> Tensor:
                return layer(high, above, offset) + layer(low, below, None)

            z, transposed = _adjoint(contributions, x.clamp(min=0), x.clamp(max=0))
            high, low = transposed(fraction * y / _stabilized(z) * c)
            return (x > 0) * high + (x < 0) * low

        share = self.contributing(bias)
        parts = self.parts(weight, share, lambda: y if share is bias else layer(x, weight, share))
        return sum((relevance(*part) for part in parts), torch.zeros_like(x))


@dataclass(frozen=True)
class Gamma(_Signed):
    r"""LRP-gamma: contributions of the sign of their sum count 1 + gamma times.

    $R_j = \sum_k (z_{jk} + \gamma z_{jk}^\pm) R_k / \sum_j (z_{jk} + \gamma z_{jk}^\pm)$ with $z_{jk} = x_j w_{jk}$ and
    + where $z_k = \sum_j z_{jk} > 0$, - where $z_k < 0$. The bias is one of the $z_{jk}$ only with `bias="share"`; then
    $z_k$ is the output.

    Raises:
        ValueError: a negative gamma.

    Source: Montavon et al. 2019, table 10.1, for positive inputs, where this is w + gamma w+; Andéol et al. 2021
    (2106.04923) for inputs and outputs of either sign.
    Differs: a bias that takes nothing does not decide the sign either. If the sign were the output's, as in zennit with
        `zero_params`, the divisor could be 0, and deep networks would overflow.

    >>> linear, x, weight = torch.nn.functional.linear, torch.ones(1, 2), torch.tensor([[2.0, -1.0]])
    >>> Gamma(1.0).back(linear, x, weight, None, torch.ones(1, 1)).round(decimals=4)  # 4 and -1 of 3
    tensor([[ 1.3333, -0.3333]])
    """

    gamma: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.gamma >= 0:
            raise ValueError(f"expected a gamma of 0 or more, got {self.gamma}; 0.25 is usual")

    def parts(self, weight: Tensor, bias: Tensor | None, z: Callable[[], Tensor]) -> list[Part]:
        """One part for positive sums, one for negative sums."""
        total = z()
        more, less = weight + self.gamma * weight.clamp(min=0), weight + self.gamma * weight.clamp(max=0)
        high = None if bias is None else bias + self.gamma * bias.clamp(min=0)
        low = None if bias is None else bias + self.gamma * bias.clamp(max=0)
        return [((total > 0).to(total), more, less, high), ((total < 0).to(total), less, more, low)]


@dataclass(frozen=True)
class AlphaBeta(_Signed):
    r"""LRP-alpha-beta: alpha times the relevance to the positive contributions, -beta times to the negative ones.

    $R_j = \sum_k (\alpha z_{jk}^+ / \sum_j z_{jk}^+ - \beta z_{jk}^- / \sum_j z_{jk}^-) R_k$ with
    $z_{jk} = x_j w_{jk}$; with `bias="share"` the bias is one of the contributions, as in the paper.

    Raises:
        ValueError: alpha - beta is not 1, or one of them is negative.

    Source: Bach et al. 2015, eq. 60.
    Differs: an output without negative (positive) contributions keeps only the alpha (beta) term, so relevance is
    conserved only where both kinds exist. The paper leaves this case open.

    >>> linear, x, weight = torch.nn.functional.linear, torch.ones(1, 3), torch.tensor([[3.0, 1.0, -2.0]])
    >>> AlphaBeta().back(linear, x, weight, None, torch.ones(1, 1)).round(decimals=4)  # 2 * 2 * (3/4, 1/4), -1 * 2
    tensor([[ 3.,  1., -2.]])
    """

    alpha: float = 2.0
    beta: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta < 0 or abs(self.alpha - self.beta - 1) > 1e-6:
            raise ValueError(
                f"expected alpha - beta = 1, none negative, got {self.alpha} and {self.beta}; 2 and 1 are usual"
            )

    def parts(self, weight: Tensor, bias: Tensor | None, z: Callable[[], Tensor]) -> list[Part]:
        """One part for positive contributions, one for negative ones."""
        more, less = weight.clamp(min=0), weight.clamp(max=0)
        high, low = (None, None) if bias is None else (bias.clamp(min=0), bias.clamp(max=0))
        positive, negative = (self.alpha, more, less, high), (-self.beta, less, more, low)
        return [positive, negative] if self.beta else [positive]


@dataclass(frozen=True)
class ZPlus(AlphaBeta):
    r"""LRP-z+: relevance goes to the positive contributions only, $R_j = \sum_k z_{jk}^+ / \sum_j z_{jk}^+\,R_k$.

    Source: Montavon et al. 2017 (1512.02479), z+ rule, for positive inputs; alpha = 1, beta = 0 of Bach et al. 2015
    otherwise.
    Differs: with `bias="share"` the positive part of the bias is one of the contributions; the first paper has no
    positive bias. With `bias="none"` an output without positive contributions loses its relevance.

    >>> linear, x, weight = torch.nn.functional.linear, torch.ones(1, 3), torch.tensor([[3.0, 1.0, -2.0]])
    >>> ZPlus().back(linear, x, weight, None, torch.ones(1, 1)).round(decimals=4)
    tensor([[1.5000, 0.5000, 0.0000]])
    >>> for bias in ("none", "share"):  # y = 6: all of it, or 4 / 8 of it
    ...     rule, b = ZPlus(bias=bias), torch.tensor([4.0])
    ...     rule.back(linear, x, weight, b, torch.ones(1, 1)).round(decimals=4)
    tensor([[4.5000, 1.5000, 0.0000]])
    tensor([[2.2500, 0.7500, 0.0000]])
    """

    alpha: float = 1.0
    beta: float = 0.0


@dataclass(frozen=True)
class ZBox(Rule):
    r"""LRP-z-box for pixels, which lie between `low` and `high`.

    $R_j = \sum_k (x_j w_{jk} - l_j w_{jk}^+ - h_j w_{jk}^-) R_k / \sum_j (x_j w_{jk} - l_j w_{jk}^+ - h_j w_{jk}^-)$.
    The bias gets no relevance.

    Args:
        low: lowest value that a pixel can have, as the first layer sees it: one number, or one per channel. None: the
            lowest value in the image itself, per channel.
        high: the same for the highest.

    Source: Montavon et al. 2017 (1512.02479), z-beta rule.
    """

    for_pixels = True
    low: float | tuple[float, ...] | None = None
    high: float | tuple[float, ...] | None = None

    def back(self, layer: Linear, x: Tensor, weight: Tensor, bias: Tensor | None, c: Tensor) -> Tensor:
        """Relevance of the pixels."""
        space = tuple(range(2, x.ndim))
        low = x.amin(space, keepdim=True) if self.low is None else self._per_channel(self.low, x)
        high = x.amax(space, keepdim=True) if self.high is None else self._per_channel(self.high, x)
        more, less = weight.clamp(min=0), weight.clamp(max=0)

        def box(value: Tensor, low: Tensor, high: Tensor) -> Tensor:
            return layer(value, weight, None) - layer(low, more, None) - layer(high, less, None)

        low, high = low.expand_as(x), high.expand_as(x)
        z, transposed = _adjoint(box, x, low, high)
        parts = transposed(layer(x, weight, bias) / _stabilized(z) * c)
        return sum((v * part for v, part in zip((x, low, high), parts, strict=True)), torch.zeros_like(x))

    @staticmethod
    def _per_channel(value: float | tuple[float, ...], x: Tensor) -> Tensor:
        if isinstance(value, tuple) and len(value) != x.shape[1]:
            raise ValueError(f"expected {x.shape[1]} values for ZBox, one per channel, got {len(value)}; or one number")
        return torch.as_tensor(value, dtype=x.dtype, device=x.device).reshape(-1, *[1] * (x.ndim - 2))


@dataclass(frozen=True)
class Flat(Rule):
    r"""LRP-flat for pixels: the relevance of an output is spread evenly over its inputs.

    Source: Bach et al. 2016 ("Controlling explanatory heatmap resolution and semantics via decomposition depth",
    1603.06463); Lapuschkin et al. 2019 (1902.10178).

    >>> Flat().back(torch.nn.functional.linear, torch.zeros(1, 2), torch.ones(1, 2), torch.ones(1), torch.ones(1, 1))
    tensor([[0.5000, 0.5000]])
    """

    for_pixels = True

    def back(self, layer: Linear, x: Tensor, weight: Tensor, bias: Tensor | None, c: Tensor) -> Tensor:
        """Relevance of the pixels."""
        count, transposed = _adjoint(lambda v: layer(v, torch.ones_like(weight), None), torch.ones_like(x))
        return transposed(layer(x, weight, bias) / count * c)[0]


@dataclass(frozen=True, kw_only=True)
class Composite:
    """Which layer takes which rule.

    Args:
        first: convolutions and linear layers that read the image itself; None = like all others.
        convolution: all other convolutions.
        linear: all other linear layers.
        bias: what biases take under every rule that has the choice; None: what each rule says.

    Raises:
        ValueError: a rule for pixels after the first layer.
    """

    first: Rule | None = None
    convolution: Rule = Epsilon()
    linear: Rule = Epsilon()
    bias: Bias | None = None

    def __post_init__(self) -> None:
        for name, rule in vars(self).copy().items():
            if self.bias is not None and isinstance(rule, _WithBias):
                object.__setattr__(self, name, replace(rule, bias=self.bias))
        for rule in (self.convolution, self.linear):
            if rule.for_pixels:
                raise ValueError(f"expected a rule for any layer, got {rule}, which is for pixels; pass it as first=")
