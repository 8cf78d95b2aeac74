"""Layer-wise relevance propagation as explainers."""

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from sightline.explainers.explainer import Explainer
from sightline.explainers.relevance.propagation import Propagation
from sightline.explainers.relevance.rules import AlphaBeta, Bias, Composite, Flat, Gamma, ZBox, ZPlus
from sightline.explainers.scorer import Scorer, gradients_of
from sightline.explainers.verdicts import Map
from sightline.facts import Verdict

__all__ = ["lrp", "lrp_epsilon_alpha2_beta1", "lrp_epsilon_gamma_box", "lrp_epsilon_plus_flat"]

_EPSILON = Composite()
_TARGETS_AT_ONCE = 8  # bounds memory


@partial(Explainer, is_signed=True, sums_to_score=True)
def lrp(images: Float[Tensor, "b c *grid"], score: Scorer, composite: Composite = _EPSILON) -> Map:
    r"""Layer-wise relevance propagation: how much of the logit each pixel accounts for, positive or negative.

    Without biases the relevance of all pixels sums to the logit (up to epsilon). A bias absorbs its contribution if it
    takes a share (`Composite.bias`); then, and where an output has no input to hand its relevance to, the pixels get
    less. The gap is what a map does not explain. `composite` says which layer takes which rule; LRP-epsilon with biases
    that take their share by default.

    Batch normalization directly behind a convolution, transposed or not, or a linear layer is folded into it for the
    pass, and so is any other constant that shifts whole channels, with the scale before it (frozen batch
    normalization); elsewhere (DenseNet) batch normalization is a separate layer with LRP-epsilon. Activations, SiLU and
    the like too, pass on all of their relevance, $c \mapsto c f(x)/x$. In a product of two tensors made from the image,
    the gate is a constant: the output of a sigmoid, else the tensor that is broadcast; two equal factors share the
    relevance. Softmax, attention weights, divisors and the standard deviation of layer and group normalization are
    constants. Operations on the pixels before the first layer (normalizing, padding, resizing) only move relevance.
    Operations without a rule pass their plain gradient back: the verdict `plain gradient` names them.

    Raises:
        ValueError: no convolution or linear layer lies between the images and the score, or `differentiable=True`.

    Source: Bach et al. 2015 (PLoS ONE 10(7): e0130140); Montavon et al. 2019 ("Layer-Wise Relevance Propagation: An
    Overview"); Ali et al. 2022 (2202.07304) for softmax and layer normalization; Arras et al. 2017 (1706.07206) for
    gates; Achtibat et al. 2024 (2402.05602) for products of equals.
    Differs: inside `nn.MultiheadAttention` the projections of values and outputs take LRP-0, whatever the composite.
        Biases of layer and group normalization and other constants that are added always keep their share.
    Elsewhere: `LRP` (captum).
    """
    if not isinstance(composite, Composite):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"expected a Composite as composite of lrp, got {composite!r}; see sightline.explainers")
    if score.differentiable:
        raise ValueError("expected differentiable=False for LRP, got True; its rules have no second derivative")
    with torch.inference_mode(False), torch.enable_grad():
        leaf = images.detach().requires_grad_()
        propagation = Propagation(composite)
        pixels = propagation.begin(leaf)
        with propagation:
            scores = score(pixels)
        propagation.check(scores)
        parts = [gradients_of(part, [leaf], retain_graph=True)[0] for part in scores.split(_TARGETS_AT_ONCE, 1)]
    relevance = torch.cat([part.sum(2) for part in parts if part is not None], 1)
    unruled = propagation.unruled
    details = ", ".join(f"{count} {name}" for name, count in unruled.most_common())
    remarks = (Verdict("plain gradient", amount=unruled.total(), details=details),) if unruled else ()
    return Map(values=relevance, remarks=remarks)


@partial(Explainer, is_signed=True, sums_to_score=True)
def lrp_epsilon_plus_flat(images: Float[Tensor, "b c *grid"], score: Scorer, bias: Bias = "share") -> Map:
    """LRP: flat for the first layer, z+ for convolutions, epsilon for linear layers. See `lrp`.

    Options:
        bias: what biases take. "share": the part of their contribution, which in deep networks with batch normalization
            is nearly all relevance. "none": nothing, so that much more reaches the pixels.

    Source: Montavon et al. 2019; Kohlbrenner et al. 2020 (1910.09840).
    Elsewhere: `EpsilonPlusFlat` (zennit).
    """
    return lrp.formula(images, score, Composite(first=Flat(), convolution=ZPlus(), bias=bias))


@partial(Explainer, is_signed=True, sums_to_score=True)
def lrp_epsilon_gamma_box(
    images: Float[Tensor, "b c *grid"],
    score: Scorer,
    low: float | tuple[float, ...] | None = None,
    high: float | tuple[float, ...] | None = None,
    bias: Bias = "share",
) -> Map:
    """LRP: z-box for the first layer, gamma for convolutions, epsilon for linear layers. See `lrp` and `ZBox`.

    Options:
        low, high: range of the pixels, as in `ZBox`.
        bias: as in `lrp_epsilon_plus_flat`.

    Source: Montavon et al. 2019.
    Elsewhere: `EpsilonGammaBox` (zennit).
    """
    return lrp.formula(images, score, Composite(first=ZBox(low, high), convolution=Gamma(), bias=bias))


@partial(Explainer, is_signed=True, sums_to_score=True)
def lrp_epsilon_alpha2_beta1(images: Float[Tensor, "b c *grid"], score: Scorer, bias: Bias = "share") -> Map:
    """LRP: alpha = 2, beta = 1 for convolutions, epsilon for linear layers. See `lrp` and `AlphaBeta`.

    Options:
        bias: as in `lrp_epsilon_plus_flat`.

    Source: Bach et al. 2015; Kohlbrenner et al. 2020 (1910.09840).
    Elsewhere: `EpsilonAlpha2Beta1` (zennit).
    """
    return lrp.formula(images, score, Composite(convolution=AlphaBeta(), bias=bias))
