r"""Layer-wise relevance propagation (LRP): the logit, handed down from layer to layer until it lies on the pixels.

What flows backward is not the relevance R of a tensor but R divided by the tensor, $c = R / a$. For a linear operation
LRP-0 is then the ordinary gradient, so sums, concatenations, poolings (of a maximum the winner takes all), reshapes and
products with constants need no rule. The operations named at the end of the rules are intercepted where the model calls
them, whether a module or a function does, in place or not: the model is never changed. What is in none of these lists
passes its plain gradient back, and a verdict names it.
"""

import inspect
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import vjp
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from sightline.explainers.evidence import Explainer
from sightline.explainers.scorer import Scorer, gradients_of
from sightline.facts import Verdict
from sightline.inference import wide

Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""A convolution or a linear layer as a function of input, weight and bias."""
_STABILISER = 1e-6
_TARGETS_AT_ONCE = 8  # which bounds memory


def _adjoint(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, ...]]]:
    """Value of a linear function, and its transpose."""
    found: Any = vjp(function, *inputs)
    return found[0], found[1]


def _stabilised(value: Tensor, epsilon: float = _STABILISER) -> Tensor:
    """Away from 0, where a 0 counts as positive."""
    return torch.where(value < 0, value - epsilon, value + epsilon)


class Rule:
    """How a layer hands the relevance of its outputs to its inputs."""

    for_pixels = False
    """Whether `back` yields the relevance itself, which an input of 0 may have too, and not relevance / input."""

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
class Zero(Rule):
    r"""LRP-0, $R_j = \sum_k x_j w_{jk} R_k / y_k$ with $y_k = \sum_j x_j w_{jk} + b_k$: gradient times input.

    Source: Bach et al. 2015 (PLoS ONE 10(7): e0130140), eq. 56; Montavon et al. 2019, table 10.1.

    >>> Zero().back(torch.nn.functional.linear, torch.ones(1, 2), torch.tensor([[3.0, -1.0]]), None, torch.ones(1, 1))
    tensor([[ 3., -1.]])
    """

    def back(self, layer: Linear, x: Tensor, weight: Tensor, bias: Tensor | None, c: Tensor) -> Tensor:
        """The ordinary gradient."""
        return _adjoint(lambda v: layer(v, weight, bias), x)[1](c)[0]


@dataclass(frozen=True)
class Epsilon(Rule):
    r"""LRP-epsilon, $R_j = \sum_k x_j w_{jk} R_k / (y_k + \epsilon\,\mathrm{sign}\,y_k)$: weak outputs lose theirs.

    Raises:
        ValueError: an epsilon that is not positive.

    Source: Bach et al. 2015, eq. 58; Montavon et al. 2019, table 10.1.

    >>> linear, x, weight = torch.nn.functional.linear, torch.ones(1, 2), torch.tensor([[3.0, -2.0]])
    >>> Epsilon(1.0).back(linear, x, weight, None, torch.ones(1, 1))  # y = 1: half of the relevance is kept
    tensor([[ 1.5000, -1.0000]])
    """

    epsilon: float = _STABILISER

    def __post_init__(self) -> None:
        if not self.epsilon > 0:
            raise ValueError(f"expected a positive epsilon, got {self.epsilon}; without it the rule is Zero()")

    def back(self, layer: Linear, x: Tensor, weight: Tensor, bias: Tensor | None, c: Tensor) -> Tensor:
        """The gradient of the stabilised outputs."""
        y, transposed = _adjoint(lambda v: layer(v, weight, bias), x)
        return transposed(y / _stabilised(y, self.epsilon) * c)[0]


class _Signed(Rule):
    """Rules that weigh positive and negative contributions differently; inputs may have either sign."""

    def parts(
        self, weight: Tensor, bias: Tensor | None, y: Tensor
    ) -> list[tuple[float | Tensor, Tensor, Tensor, Tensor | None]]:
        """What share of the relevance goes by which weights of positive inputs, of negative inputs, and bias."""
        raise NotImplementedError

    def back(self, layer: Linear, x: Tensor, weight: Tensor, bias: Tensor | None, c: Tensor) -> Tensor:
        """Each part's relevance in proportion to its contributions."""
        y = layer(x, weight, bias)
        found = torch.zeros_like(x)
        for share, above, below, offset in self.parts(weight, bias, y):

            def contributions(
                high: Tensor, low: Tensor, above: Tensor = above, below: Tensor = below, offset: Tensor | None = offset
            ) -> Tensor:
                return layer(high, above, offset) + layer(low, below, None)

            z, transposed = _adjoint(contributions, x.clamp(min=0), x.clamp(max=0))
            high, low = transposed(share * y / _stabilised(z) * c)
            found = found + (x > 0) * high + (x < 0) * low
        return found


@dataclass(frozen=True)
class Gamma(_Signed):
    r"""LRP-gamma: contributions of the output's own sign count 1 + gamma times.

    $R_j = \sum_k (z_{jk} + \gamma z_{jk}^\pm) R_k / \sum_j (z_{jk} + \gamma z_{jk}^\pm)$ with $z_{jk} = x_j w_{jk}$,
    the bias among the contributions, and + where $y_k > 0$, - where $y_k < 0$.

    Raises:
        ValueError: a negative gamma.

    Source: Montavon et al. 2019, table 10.1, for positive inputs, where this is w + gamma w+; Andéol et al. 2021
    (2106.04923) for inputs and outputs of either sign.

    >>> linear, x, weight = torch.nn.functional.linear, torch.ones(1, 2), torch.tensor([[2.0, -1.0]])
    >>> Gamma(1.0).back(linear, x, weight, None, torch.ones(1, 1)).round(decimals=4)  # 4 and -1 of 3
    tensor([[ 1.3333, -0.3333]])
    """

    gamma: float = 0.25

    def __post_init__(self) -> None:
        if not self.gamma >= 0:
            raise ValueError(f"expected a gamma of 0 or more, got {self.gamma}; 0.25 is usual")

    def parts(
        self, weight: Tensor, bias: Tensor | None, y: Tensor
    ) -> list[tuple[float | Tensor, Tensor, Tensor, Tensor | None]]:
        """One part for positive outputs, one for negative outputs."""
        more, less = weight + self.gamma * weight.clamp(min=0), weight + self.gamma * weight.clamp(max=0)
        high = None if bias is None else bias + self.gamma * bias.clamp(min=0)
        low = None if bias is None else bias + self.gamma * bias.clamp(max=0)
        return [((y > 0).to(y), more, less, high), ((y < 0).to(y), less, more, low)]


@dataclass(frozen=True)
class AlphaBeta(_Signed):
    r"""LRP-alpha-beta: alpha times the relevance to the positive contributions, -beta times to the negative ones.

    $R_j = \sum_k (\alpha z_{jk}^+ / \sum_j z_{jk}^+ - \beta z_{jk}^- / \sum_j z_{jk}^-) R_k$ with
    $z_{jk} = x_j w_{jk}$; the bias is one of the contributions and keeps its share.

    Raises:
        ValueError: alpha - beta is not 1, or one of them is negative.

    Source: Bach et al. 2015, eq. 60.
    Differs: an output without negative (positive) contributions keeps only the alpha (beta) term, so relevance is
    conserved only where both kinds are there. The paper leaves that case open.

    >>> linear, x, weight = torch.nn.functional.linear, torch.ones(1, 3), torch.tensor([[3.0, 1.0, -2.0]])
    >>> AlphaBeta().back(linear, x, weight, None, torch.ones(1, 1)).round(decimals=4)  # 2 * 2 * (3/4, 1/4), -1 * 2
    tensor([[ 3.,  1., -2.]])
    """

    alpha: float = 2.0
    beta: float = 1.0

    def __post_init__(self) -> None:
        if self.beta < 0 or abs(self.alpha - self.beta - 1) > 1e-6:
            raise ValueError(
                f"expected alpha - beta = 1, none negative, got {self.alpha} and {self.beta}; 2 and 1 are usual"
            )

    def parts(
        self, weight: Tensor, bias: Tensor | None, y: Tensor
    ) -> list[tuple[float | Tensor, Tensor, Tensor, Tensor | None]]:
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
    Differs: the positive part of the bias is one of the contributions; the first paper has no positive bias.

    >>> linear, x, weight = torch.nn.functional.linear, torch.ones(1, 3), torch.tensor([[3.0, 1.0, -2.0]])
    >>> ZPlus().back(linear, x, weight, None, torch.ones(1, 1)).round(decimals=4)
    tensor([[1.5000, 0.5000, 0.0000]])
    """

    alpha: float = 1.0
    beta: float = 0.0


@dataclass(frozen=True)
class ZBox(Rule):
    r"""LRP-z-box for pixels, which lie between `low` and `high`.

    $R_j = \sum_k (x_j w_{jk} - l_j w_{jk}^+ - h_j w_{jk}^-) R_k / \sum_j (x_j w_{jk} - l_j w_{jk}^+ - h_j w_{jk}^-)$.
    The bias takes no share.

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
        parts = transposed(layer(x, weight, bias) / _stabilised(z) * c)
        return sum((v * part for v, part in zip((x, low, high), parts, strict=True)), torch.zeros_like(x))

    @staticmethod
    def _per_channel(value: float | tuple[float, ...], x: Tensor) -> Tensor:
        if isinstance(value, tuple) and len(value) != x.shape[1]:
            raise ValueError(f"expected {x.shape[1]} values for ZBox, one per channel, got {len(value)}; or one number")
        return torch.as_tensor(value, dtype=x.dtype, device=x.device).reshape(-1, *[1] * (x.ndim - 2))


@dataclass(frozen=True)
class Flat(Rule):
    r"""LRP-flat for pixels: an output's relevance is spread evenly over the inputs that it is connected to.

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
        first: convolutions and linear layers that see the image itself; None = as any other.
        convolution: all other convolutions.
        linear: all other linear layers.

    Raises:
        ValueError: a rule for pixels behind the first layer.
    """

    first: Rule | None = None
    convolution: Rule = Epsilon()
    linear: Rule = Epsilon()

    def __post_init__(self) -> None:
        for rule in (self.convolution, self.linear):
            if rule.for_pixels:
                raise ValueError(f"expected a rule for any layer, got {rule}, which is for pixels; pass it as first=")


_EPSILON = Composite()


@partial(Explainer, is_signed=True, sums_to_score=True)
def lrp(
    images: Float[Tensor, "b c *grid"], score: Scorer, composite: Composite = _EPSILON
) -> Float[Tensor, "b t *grid"]:
    r"""Layer-wise relevance propagation: how much of the logit each pixel accounts for; positive and negative.

    Without biases the relevance of all pixels sums to the logit (but for epsilon); each bias keeps its own share. The
    gap between the two is what a map does not explain. `composite` says which layer takes which rule; LRP-epsilon by
    default.

    What else a model does: batch normalization directly behind a convolution, transposed or not, or a linear layer is
    folded into it for the pass, and so is any other constant that shifts whole channels, with the scale before it
    (frozen batch normalization); elsewhere (DenseNet) batch normalization is a layer of its own with LRP-epsilon.
    Activations hand on all of their relevance, SiLU and its kind too, $c \mapsto c f(x)/x$. In a product of two tensors
    made from the image one is the gate, a constant: what came out of a sigmoid, else the one that is broadcast; two
    equals share their relevance. Softmax, attention weights, divisors and the standard deviation of layer and group
    normalization are constants. What a model does to the pixels before its first layer (normalizing, padding, resizing)
    only moves relevance. Operations that no rule knows pass their plain gradient back: the verdict `plain gradient`
    names them.

    Raises:
        ValueError: no convolution or linear layer is met on the way from the images to the score, or a graph of the map
            is asked for.

    Source: Bach et al. 2015 (PLoS ONE 10(7): e0130140); Montavon et al. 2019 ("Layer-Wise Relevance Propagation: An
    Overview"); Ali et al. 2022 (2202.07304) for softmax and layer normalization; Arras et al. 2017 (1706.07206) for
    gates; Achtibat et al. 2024 (2402.05602) for products of equals.
    Differs: inside `nn.MultiheadAttention` the projections of values and outputs take LRP-0, whatever the composite.
    """
    if not isinstance(composite, Composite):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"expected a Composite as composite of lrp, got {composite!r}; see sightline.explainers")
    if score.differentiable:
        raise ValueError("expected differentiable=False for LRP, got True; its rules have no second derivative")
    with torch.inference_mode(False), torch.enable_grad():
        leaf = images.detach().requires_grad_()
        propagation = _Propagation(composite)
        pixels = propagation.begin(leaf)
        with propagation:
            scores = score(pixels)
        propagation.check(scores)
        parts = [gradients_of(part, [leaf], retain_graph=True)[0] for part in scores.split(_TARGETS_AT_ONCE, 1)]
    if unruled := Counter(propagation.calls[call] for call in propagation.unruled):
        details = ", ".join(f"{count} {name}" for name, count in unruled.most_common())
        score.remarks = (Verdict("plain gradient", amount=unruled.total(), details=details),)
    relevance = torch.cat([part.sum(2) for part in parts if part is not None], 1)
    return relevance if relevance.dtype == torch.float64 else relevance.float()


@partial(Explainer, is_signed=True, sums_to_score=True)
def lrp_epsilon_plus_flat(images: Float[Tensor, "b c *grid"], score: Scorer) -> Float[Tensor, "b t *grid"]:
    """LRP: flat for the first layer, z+ for convolutions, epsilon for linear layers. See `lrp`.

    Source: Montavon et al. 2019; Kohlbrenner et al. 2020 (1910.09840).
    """
    return lrp.formula(images, score, Composite(first=Flat(), convolution=ZPlus()))


@partial(Explainer, is_signed=True, sums_to_score=True)
def lrp_epsilon_gamma_box(
    images: Float[Tensor, "b c *grid"],
    score: Scorer,
    low: float | tuple[float, ...] | None = None,
    high: float | tuple[float, ...] | None = None,
) -> Float[Tensor, "b t *grid"]:
    """LRP: z-box for the first layer, gamma for convolutions, epsilon for linear layers. See `lrp` and `ZBox`.

    Source: Montavon et al. 2019.
    """
    return lrp.formula(images, score, Composite(first=ZBox(low, high), convolution=Gamma()))


@partial(Explainer, is_signed=True, sums_to_score=True)
def lrp_epsilon_alpha2_beta1(images: Float[Tensor, "b c *grid"], score: Scorer) -> Float[Tensor, "b t *grid"]:
    """LRP: alpha = 2, beta = 1 for convolutions, epsilon for linear layers. See `lrp` and `AlphaBeta`.

    Source: Bach et al. 2015; Kohlbrenner et al. 2020 (1910.09840).
    """
    return lrp.formula(images, score, Composite(convolution=AlphaBeta()))


_CONVOLUTIONS = {f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3)}
_GATES = {"sigmoid", "hardsigmoid", "erf"}  # the last is that of a GELU written out
_POINTWISE = _GATES | set(
    "relu relu6 leaky_relu prelu rrelu elu selu celu gelu silu mish hardswish hardtanh hardshrink softshrink "
    "tanhshrink softplus softsign tanh logsigmoid log_sigmoid threshold clamp clip clamp_min clamp_max abs absolute "
    "pow ipow rpow float_power square sqrt rsqrt reciprocal rdiv rtruediv exp exp2 expm1 log log2 log10 log1p sin cos "
    "tan sinh cosh asin acos atan asinh acosh atanh arcsin arccos arctan sinc erfc normalize rms_norm round floor ceil "
    "trunc nan_to_num".split()
)
_MOVES = set(
    "get getitem view view_as reshape reshape_as flatten unflatten permute transpose movedim swapaxes swapdims t "
    "contiguous clone to type_as type float double half bfloat16 unsqueeze squeeze expand expand_as repeat cat concat "
    "stack split chunk unbind narrow select index_select flip roll pad unfold interpolate pixel_shuffle "
    "pixel_unshuffle channel_shuffle dropout alpha_dropout feature_dropout dropout1d dropout2d dropout3d".split()
)
_DIVISIONS = {"div", "truediv", "itruediv", "divide", "true_divide"}
_ELEMENTWISE_PRODUCTS = {"mul", "rmul", "imul", "multiply"}
_PRODUCTS = _ELEMENTWISE_PRODUCTS | {"matmul", "rmatmul", "bmm", "einsum"}
_SHIFTS = _DIVISIONS | _ELEMENTWISE_PRODUCTS | {"add", "radd", "iadd", "sub", "rsub", "isub", "subtract", "batch_norm"}
_AFFINE = {
    *(torch.add, torch.sub, torch.subtract, torch.rsub, torch.mul, torch.multiply),
    *(torch.div, torch.divide, torch.true_divide),
    *(getattr(Tensor, name) for name in "add sub subtract mul multiply div divide true_divide".split()),
    *(getattr(Tensor, f"__{name}__") for name in "add radd sub rsub mul rmul truediv".split()),
}
"""None of them in place."""
_NORMS = {"layer_norm", "group_norm", "instance_norm"}
_CONSTANTS: dict[str, tuple[str, ...]] = {
    "scaled_dot_product_attention": ("query", "key"),
    "multi_head_attention_forward": ("query", "key"),
    **dict.fromkeys(_DIVISIONS, ("", "other")),
}
"""Arguments that are constants: their names, in the order of the positions."""
_MULTILINEAR = set("linear bilinear mv dot vdot inner tensordot addmm addmv addbmm baddbmm addcmul grid_sample".split())
_SUMS_AND_CHOICES = set(
    "neg negative pos positive sum nansum mean nanmean cumsum diff tril triu diag diagonal diag_embed adjoint ravel "
    "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d max_pool1d "
    "max_pool2d max_pool3d max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices adaptive_max_pool1d "
    "adaptive_max_pool2d adaptive_max_pool3d adaptive_max_pool1d_with_indices adaptive_max_pool2d_with_indices "
    "adaptive_max_pool3d_with_indices max_unpool1d max_unpool2d max_unpool3d amax amin max min maximum minimum fmax "
    "fmin median sort topk kthvalue gather take take_along_dim where index_add index_put index_fill index_copy "
    "masked_fill masked_select masked_scatter scatter scatter_add hstack vstack dstack column_stack concatenate "
    "tensor_split hsplit vsplit dsplit unsafe_chunk unsafe_split split_with_sizes repeat_interleave tile broadcast_to "
    "broadcast_tensors rot90 fliplr flipud moveaxis meshgrid fft_fft fft_ifft fft_rfft fft_irfft fft_fft2 fft_ifft2 "
    "fft_rfft2 fft_irfft2 fft_fftn fft_ifftn fft_fftshift fft_ifftshift view_as_real view_as_complex real imag fold "
    "upsample affine_grid as_strided cpu cuda alias requires_grad".split()
)
_LINEAR = _MOVES | _SHIFTS | _PRODUCTS | _SUMS_AND_CHOICES
"""Operations that hand on their relevance by the plain gradient. The multilinear ones do if one factor is constant."""


@dataclass(frozen=True)
class _Made:
    """The layer that a tensor came out of, into which a scale and a shift of its channels can be folded."""

    layer: Linear
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    rule: Rule
    version: int
    axis: int
    """Of the tensor's channels."""
    is_transposed: bool

    def folded(self, scale: Float[Tensor, " k"], shift: Float[Tensor, " k"]) -> "_Made":
        """The layer that yields the scaled and shifted output."""
        if self.is_transposed:  # its weights are (inputs, outputs of a group, ...)
            by_group = scale.reshape(-1, 1, self.weight.shape[1], *[1] * (self.weight.ndim - 2))
            weight = (self.weight.unflatten(0, (len(by_group), -1)) * by_group).flatten(0, 1)
        else:
            weight = self.weight * scale.reshape(-1, *[1] * (self.weight.ndim - 1))
        return replace(self, weight=weight, bias=shift if self.bias is None else shift + scale * self.bias)


class _Layer(torch.autograd.Function):
    """A layer whose gradient is what its rule says."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Callable[[], Tensor], back: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Whatever the layer yields."""
        ctx.save_for_backward(x)
        ctx.back = back
        return value()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        """Whatever the rule yields."""
        return ctx.back(ctx.saved_tensors[0], grad_outputs[0]), None, None


class _Propagation(TorchFunctionMode):
    """Runs a model so that the gradient of its outputs at the images is their relevance."""

    def __init__(self, composite: Composite) -> None:
        super().__init__()
        self.composite = composite
        self.layers = 0
        self.first_layers = 0
        self.calls: list[str] = []
        """Operations without a rule that are not known to be linear, by name."""
        self.unruled: set[int] = set()
        """Those of them through which relevance has flowed."""
        self.made: Any = WeakTensorKeyDictionary()
        self.kinds: Any = WeakTensorKeyDictionary()
        """"pixels": only moved and scaled since the image, the gradient here is R, not R / pixel; "gate": a sigmoid."""

    def begin(self, leaf: Tensor) -> Tensor:
        """The images to call the model with: no leaf, so that it may change them in place."""
        images = leaf.clone()
        self.kinds[images] = "pixels"
        return images

    def check(self, scores: Tensor) -> None:
        """Say why there is no relevance, before there is a map of nothing."""
        if not self.layers or (self.composite.first is not None and not self.first_layers):
            where = "on the images themselves" if self.layers else "of torch.nn.functional between images and score"
            raise ValueError(
                f"expected a convolution or linear layer {where} for LRP, got none; use input_x_gradient for this model"
            )
        if not scores.requires_grad:
            raise ValueError("expected a score made of logits for LRP, got a constant or a softmax; explain the logit")

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        everything = args, kwargs or {}
        name = getattr(func, "__name__", "").strip("_")
        inputs = _made_from_images(everything)
        if not inputs:
            if not any(isinstance(value, Tensor) for value in tree_leaves(everything)):
                return func(*args, **everything[1])
            with torch.no_grad():
                return func(*args, **everything[1])
        if name.endswith("_as"):  # of the other tensor only the shape or type
            inputs = inputs[:1]
        kinds = {self.kinds.get(tensor, "") for tensor in inputs}
        kind = kinds.pop() if len(kinds) == 1 else ""
        args, options = tree_map(_constant_if_parameter, everything)
        if (kind and name in _MOVES) or (kind == "gate" and name in _SHIFTS and len(inputs) == 1):
            return self._marked(func(*args, **options), kind)
        if kind == "pixels" and name in _SHIFTS and len(inputs) == 1:
            shifted = self._shift(func, args, options, inputs[0])
            if shifted is not None:
                return shifted
        operand = args[0] if args else options.get("input")
        if (name in _CONVOLUTIONS or name == "linear") and operand is inputs[0]:
            return self._layer(func, name, *args, **options)
        entered, options = tree_map(self._entered, (args, options))
        output = self._hidden(func, name, entered, options)
        if isinstance(output, Tensor) and entered and output is entered[0] and output is not args[0]:
            del self.kinds[args[0]]  # an operation on the pixels, in place
            return args[0].copy_(output)
        return output

    def _hidden(self, func: Callable[..., Any], name: str, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """An operation on what layers made of the pixels."""
        inputs = _made_from_images((args, options))
        if func is F.batch_norm:
            return self._batch_norm(func, *args, **options)
        if func is F.instance_norm:
            given = _bound(func, *args, **options)
            if not given.pop("use_input_stats"):
                return self._batch_norm(F.batch_norm, **given)
        if len(inputs) == 1 and (affine := self._affine(func, name, args, options, inputs[0])) is not None:
            return affine
        dividend = args[0] if args else options.get("input")
        if len(inputs) == 1 and (name in _POINTWISE or (name in _DIVISIONS and dividend is not inputs[0])):
            output = _pointwise(func, args, options, inputs[0])
            return self._marked(output, "gate") if name in _GATES else output
        if name in _PRODUCTS and len(inputs) > 1:
            return self._product(func, name, args, options, inputs)
        if name in _NORMS and func is getattr(F, name):
            return _normalized(func, name, *args, **options)
        if func is F.glu:
            return _gated(*args, **options)
        if name in _CONSTANTS:
            args, options = _with_constants(_CONSTANTS[name], args, options)
        output = func(*args, **options)
        if name == "softmax":
            return output.detach()
        if name not in _LINEAR | _CONSTANTS.keys() | (_MULTILINEAR if len(inputs) == 1 else set()):
            call = len(self.calls)
            self.calls.append(name)
            for tensor in _made_from_images(output):
                tensor.register_hook(lambda gradient: self.unruled.add(call))
        return output

    def _marked(self, output: Any, kind: str) -> Any:
        for tensor in _made_from_images(output):
            self.kinds[tensor] = kind
        return output

    def _entered(self, value: Any) -> Any:
        """Pixels for an operation that takes relevance / pixel."""
        if isinstance(value, Tensor) and self.kinds.get(value) == "pixels":
            return _with_gradient_of(value, value * value.detach().clone())
        return value

    def _shift(self, func: Callable[..., Any], args: Any, options: Any, pixels: Tensor) -> Tensor | None:
        """A change of every pixel by itself; None if there is more to it."""
        copy = pixels.detach().clone()
        args, options = tree_map(lambda value: copy if value is pixels else value, (args, options))
        value = func(*args, **options)
        if value.shape != pixels.shape:
            return None
        output = _with_gradient_of(value, pixels)
        return self._marked(pixels.copy_(output) if value is copy else output, "pixels")

    def _layer(
        self,
        func: Callable[..., Tensor],
        name: str,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *rest: Any,
        **options: Any,
    ) -> Tensor:
        def layer(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return func(x, weight, bias, *rest, **options)

        rule = self.composite.linear if name == "linear" else self.composite.convolution
        self.layers += 1
        if self.kinds.get(input) == "pixels":
            self.first_layers += 1
            rule = self.composite.first or rule
        x = input if rule.for_pixels else self._entered(input)
        weight, bias = weight.detach(), None if bias is None else bias.detach()
        axis, is_transposed = -1 if name == "linear" else 1, "transpose" in name
        made = _Made(layer, x, weight, bias, rule, 0, axis, is_transposed)
        return self._of_layer(made, lambda: layer(x, weight, bias))

    def _of_layer(self, made: _Made, value: Callable[[], Tensor]) -> Tensor:
        output = _ruled(made.rule, made.layer, made.x, made.weight, made.bias, value)
        self.made[output] = replace(made, version=output._version, axis=made.axis % output.ndim)
        return output

    def _made_by(self, output: Tensor) -> _Made | None:
        """The layer that it came out of and was not changed since."""
        made: _Made | None = self.made.get(output)
        return made if made is not None and made.version == output._version else None

    def _affine(self, func: Callable[..., Tensor], name: str, args: Any, options: Any, input: Tensor) -> Tensor | None:
        """A constant that shifts whole channels behind a layer, or scales them before a shift; None otherwise.

        The shift is folded into the layer with the scales before it, as batch normalization is, which it may be.
        """
        made = self._made_by(input)
        if made is None or func not in _AFFINE or not any(value is input for value in args) or "out" in options:
            return None
        if name in _DIVISIONS and (args[0] is not input or "rounding_mode" in options):
            return None
        zeros = input.new_zeros([side if axis == made.axis else 1 for axis, side in enumerate(input.shape)])
        zeros.requires_grad_()

        def at(x: Tensor) -> Tensor:
            return func(*tree_map(lambda value: x if value is input else value, args), **options)

        shift = at(zeros)
        if shift.shape != zeros.shape or shift.dtype != zeros.dtype:
            return None
        (scale,) = torch.autograd.grad(shift.sum(), zeros)
        folded = made.folded(scale.flatten(), shift.detach().flatten())
        if name in _DIVISIONS | _PRODUCTS:
            output = at(input)
            self.made[output] = replace(folded, version=output._version)
            return output
        return self._of_layer(folded, lambda: at(input.detach()))

    def _batch_norm(
        self,
        func: Callable[..., Tensor],
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        x, space = input.detach(), (0, *range(2, input.ndim))
        mean = x.mean(space) if training or running_mean is None else running_mean
        variance = x.var(space, correction=0) if training or running_var is None else running_var
        scale = (variance + eps).rsqrt() * (1 if weight is None else weight)
        shift = (0 if bias is None else bias) - mean * scale

        def value() -> Tensor:
            return func(x, running_mean, running_var, weight, bias, training, momentum, eps)

        made = self._made_by(input)
        if made is not None and made.axis == 1:
            return self._of_layer(made.folded(scale, shift), value)
        scale, shift = (v.reshape(-1, *[1] * (input.ndim - 2)) for v in (scale, shift))
        return _ruled(Epsilon(), _diagonal, input, scale, shift, value)

    def _product(self, func: Callable[..., Any], name: str, args: Any, options: Any, inputs: list[Tensor]) -> Any:
        gates = [tensor for tensor in inputs if self.kinds.get(tensor) == "gate"]
        if not gates and name in _ELEMENTWISE_PRODUCTS and inputs[0].numel() != inputs[1].numel():
            gates = [min(inputs, key=Tensor.numel)]
        if 0 < len(gates) < len(inputs):

            def constant(value: Any) -> Any:
                return value.detach() if any(value is gate for gate in gates) else value

            args, options = tree_map(constant, (args, options))
            return func(*args, **options)
        output = func(*args, **options)
        shared = _with_gradient_of(output, output / len(inputs))
        shared = output.copy_(shared) if output is args[0] else shared
        return self._marked(shared, "gate") if gates else shared


def _made_from_images(values: Any) -> list[Tensor]:
    """Tensors with a graph: all that is made of parameters alone is computed without one."""
    return [v for v in tree_leaves(values) if isinstance(v, Tensor) and v.requires_grad and not v.is_leaf]


def _constant_if_parameter(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) and value.requires_grad and value.is_leaf else value


def _with_gradient_of(value: Tensor, carrier: Tensor) -> Tensor:
    return value.detach() + (carrier - carrier.detach())


def _diagonal(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x * weight if bias is None else x * weight + bias


def _ruled(
    rule: Rule, layer: Linear, x: Tensor, weight: Tensor, bias: Tensor | None, value: Callable[[], Tensor]
) -> Tensor:
    def back(x: Tensor, c: Tensor) -> Tensor:
        dtype = wide(x)  # in half precision the stabiliser would vanish
        offset = None if bias is None else bias.to(dtype)
        return rule.back(layer, x.to(dtype), weight.to(dtype), offset, c.to(dtype)).to(x.dtype)

    output = _Layer.apply(x, value, back)
    assert isinstance(output, Tensor)
    return output


def _pointwise(func: Callable[..., Tensor], args: Any, options: Any, input: Tensor) -> Tensor:
    x, copy = input.detach(), input.detach().clone()
    args, options = tree_map(lambda value: copy if value is input else value, (args, options))
    value = func(*args, **options)
    output = _with_gradient_of(value, input * torch.where(x == 0, 0, value.detach() / x))
    return input.copy_(output) if value is copy else output


def _with_constants(names: tuple[str, ...], args: Any, options: Any) -> tuple[Any, Any]:
    """The arguments, of which those with a name are constants; the names stand in the order of the positions."""
    constant = [place for place, name in enumerate(names) if name]
    args = [_constant(value) if place in constant else value for place, value in enumerate(args)]
    return args, {name: _constant(value) if name and name in names else value for name, value in options.items()}


def _constant(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _gated(input: Tensor, dim: int = -1) -> Tensor:
    values, gates = input.chunk(2, dim)
    return values * gates.detach().sigmoid()


def _bound(func: Callable[..., Any], *args: Any, **options: Any) -> dict[str, Any]:
    bound = inspect.signature(func).bind(*args, **options)
    bound.apply_defaults()
    return bound.arguments


def _normalized(func: Callable[..., Tensor], name: str, input: Tensor, *rest: Any, **options: Any) -> Tensor:
    """Layer, group or instance normalization with a constant standard deviation."""
    given = _bound(func, input, *rest, **options)
    if name == "layer_norm":
        x = input.flatten(-len(given["normalized_shape"]))
    else:
        x = input.reshape(len(input), given.get("num_groups", input.shape[1]), -1)
    centered = x - x.mean(-1, keepdim=True)
    scaled = (centered * (centered.detach().square().mean(-1, keepdim=True) + given["eps"]).rsqrt()).reshape(
        input.shape
    )
    weight: Tensor | None = given["weight"]
    if weight is not None:
        scaled = scaled * (weight if name == "layer_norm" else weight.reshape(-1, *[1] * (input.ndim - 2)))
    return _with_gradient_of(func(input.detach(), *rest, **options), scaled)
