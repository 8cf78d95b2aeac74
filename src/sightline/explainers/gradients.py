"""Maps from the gradient of the score with respect to the pixels."""

from functools import partial

import torch
from jaxtyping import Float, Int
from numpy.polynomial.legendre import leggauss
from torch import Tensor

from sightline import maps
from sightline.checks import check_whole
from sightline.explainers.cams import grad_cam, grad_cam_plus_plus
from sightline.explainers.explainer import Explainer
from sightline.explainers.scorer import Scorer
from sightline.explainers.verdicts import Map
from sightline.inference import wide

__all__ = [
    "saliency",
    "input_x_gradient",
    "integrated_gradients",
    "smooth_grad",
    "var_grad",
    "guided_backprop",
    "deconvolution",
    "guided_grad_cam",
    "guided_grad_cam_plus_plus",
]


@Explainer
def saliency(input_gradients: Float[Tensor, "b t c *grid"]) -> Float[Tensor, "b t *grid"]:
    r"""How strongly a pixel could change the score: $\max_c |\partial y / \partial x_c|$ over its colors.

    Source: Simonyan et al. 2013 (1312.6034), section 3.1.
    Elsewhere: `Saliency` (captum), `Gradient` (zennit).

    >>> saliency.formula(torch.tensor([[[[[1.0, 0.0]], [[-3.0, 0.5]]]]])).tolist()
    [[[[3.0, 0.5]]]]
    """
    return input_gradients.abs().amax(2)


@partial(Explainer, is_signed=True)
def input_x_gradient(
    images: Float[Tensor, "b c *grid"], input_gradients: Float[Tensor, "b t c *grid"]
) -> Float[Tensor, "b t *grid"]:
    r"""Contribution of a pixel to the score, to first order: $\sum_c x_c \, \partial y / \partial x_c$.

    On a piecewise linear net without biases the map sums to the score.

    Source: Shrikumar et al. 2016 (1605.01713), section 3.2.
    Elsewhere: `InputXGradient` (captum).

    >>> images = torch.tensor([[[[1.0, 2.0]], [[3.0, 0.0]]]])
    >>> input_x_gradient.formula(images, torch.tensor([[[[[1.0, 1.0]], [[-1.0, 5.0]]]]])).tolist()
    [[[[-2.0, 2.0]]]]
    """
    return (images[:, None] * input_gradients).sum(2)


@partial(Explainer, is_signed=True, sums_to_score=True, many_passes=True)
def integrated_gradients(
    images: Float[Tensor, "b c *grid"], score: Scorer, steps: int = 32, baseline: float | Tensor = 0.0
) -> Map:
    r"""Contribution of each pixel along the straight line from the baseline $x'$ to the image $x$, summed over colors.

    $(x - x') \int_0^1 \frac{\partial y}{\partial x}(x' + \alpha (x - x')) \, d\alpha$. The map sums to the score of the
    image minus that of the baseline (completeness), up to the error of the integral.

    The Gauss-Legendre rule has by far the smallest completeness error on smooth nets (SiLU, GELU: 1e-10 of the score
    with 16 steps, against 1e-4 for midpoints). Where ReLUs make the gradient jump, no rule is better than the others
    and only more steps help; a gap is a verdict.

    Options:
        steps: gradients per image.
        baseline: the image without information, in the model's own (normalized) values: a number, one per color (c,),
            an image (c, ...), or one for each image (b, c, ...).

    Raises:
        ValueError: less than one step, or a baseline of another shape.

    Source: Sundararajan et al. 2017 (1703.01365), eq. 1.
    Elsewhere: `IntegratedGradients` (captum), `IntegratedGradients` (zennit).

    Differs: Gauss-Legendre nodes and weights; the paper's eq. 3 sums equal steps from the right.
    """
    start, mean = gradients_on_the_way(images, score, steps, baseline)
    ends = score.stream("baseline of integrated_gradients", len(images), lambda rows: (start[rows], rows), score)
    total = score.of(score.targets).detach() - torch.cat([end for _, end in ends])
    return Map(values=((images - start)[:, None] * mean).sum(2), total=total)


@partial(Explainer, many_passes=True)
def smooth_grad(
    images: Float[Tensor, "b c *grid"], score: Scorer, samples: int = 25, noise: float = 0.15, seed: int = 0
) -> Float[Tensor, "b t *grid"]:
    r"""Saliency of the mean gradient of noisy copies: $\max_c |\frac{1}{n} \sum_i g_c(x + \epsilon_i)|$.

    One copy without noise gives `saliency`.

    Options:
        samples: noisy copies of each image.
        noise: standard deviation of the Gaussian noise, as a fraction of the image's range (maximum - minimum).
        seed: seed of the noise, which is the same for every image except for its scale.

    Raises:
        ValueError: less than one sample, negative noise.

    Source: Smilkov et al. 2017 (1706.03825), section 2.1; the absolute value, which they recommend for display,
    section 3.1.
    Elsewhere: `NoiseTunnel(Saliency(model)), nt_type="smoothgrad"` (captum), `SmoothGrad` (zennit).
    """
    return _moments("smooth_grad", images, score, samples, noise, seed)[0].abs().amax(2)


@partial(Explainer, many_passes=True)
def var_grad(
    images: Float[Tensor, "b c *grid"], score: Scorer, samples: int = 25, noise: float = 0.15, seed: int = 0
) -> Float[Tensor, "b t *grid"]:
    r"""How much the gradient varies between noisy copies: $\sum_c \mathrm{Var}_i \, g_c(x + \epsilon_i)$.

    The copies are those of `smooth_grad`; their squared deviations are divided by their number.

    Options:
        samples: noisy copies of each image.
        noise: standard deviation of the Gaussian noise, as a fraction of the image's range (maximum - minimum).
        seed: seed of the noise, which is the same for every image except for its scale.

    Raises:
        ValueError: less than one sample, negative noise.

    Source: Adebayo et al. 2018 (1810.03307), section 2.
    Elsewhere: `NoiseTunnel(Saliency(model)), nt_type="vargrad"` (captum).
    """
    return _moments("var_grad", images, score, samples, noise, seed)[1].sum(2)


@partial(Explainer, is_signed=True)
def guided_backprop(guided_gradients: Float[Tensor, "b t c *grid"]) -> Float[Tensor, "b t *grid"]:
    """Gradient of which each rectifier passes only the positive part, where it was on; summed over colors.

    Warning: fails randomization tests: it draws the edges of the image, whatever the last layers have learned (Adebayo
    et al. 2018, 1810.03292). A sharp map is not necessarily right.

    Source: Springenberg et al. 2014 (1412.6806), section 3.4.
    Elsewhere: `GuidedBackprop` (captum), `GuidedBackpropReLUModel` (pytorch-grad-cam), `GuidedBackprop` (zennit).

    >>> guided_backprop.formula(torch.tensor([[[[[1.0, 0.0]], [[-3.0, 0.5]]]]])).tolist()
    [[[[-2.0, 0.5]]]]
    """
    return guided_gradients.sum(2)


@partial(Explainer, is_signed=True)
def deconvolution(deconvolved_gradients: Float[Tensor, "b t c *grid"]) -> Float[Tensor, "b t *grid"]:
    """Gradient that every rectifier rectifies, whether or not it was on in the forward; summed over colors.

    Warning: like `guided_backprop` it hardly depends on the class or on what the last layers have learned, and fails
    randomization tests (Adebayo et al. 2018, 1810.03292; Nie et al. 2018, 1805.07039).

    Source: Zeiler and Fergus 2014 (1311.2901), section 2.1.
    Elsewhere: `Deconvolution` (captum), `DeconvNet` (zennit).

    >>> deconvolution.formula(torch.tensor([[[[[1.0, 0.0]], [[-3.0, 0.5]]]]])).tolist()
    [[[[-2.0, 0.5]]]]
    """
    return deconvolved_gradients.sum(2)


@partial(Explainer, is_signed=True)
def guided_grad_cam(
    activations: Float[Tensor, "b k *cells"],
    mean_gradients: Float[Tensor, "b t k"],
    guided_gradients: Float[Tensor, "b t c *grid"],
    interpolation: maps.Mode = "bilinear",
) -> Float[Tensor, "b t *grid"]:
    """Guided backpropagation times Grad-CAM, resized to the image.

    Warning: its detail is that of `guided_backprop`, which fails randomization tests (Adebayo et al. 2018, 1810.03292);
    only the coarse `grad_cam` depends on the class.

    Options:
        interpolation: how Grad-CAM is resized, "bilinear" or "nearest" (see `sightline.maps.resize`).

    Raises:
        ValueError: another interpolation.

    Source: Selvaraju et al. 2017 (1610.02391), section 3.2.
    Elsewhere: `GuidedGradCam` (captum).
    """
    return _guided(grad_cam.formula(activations, mean_gradients), guided_gradients, interpolation)


@partial(Explainer, is_signed=True)
def guided_grad_cam_plus_plus(
    activations: Float[Tensor, "b k *cells"],
    gradients: Float[Tensor, "b t k *cells"],
    guided_gradients: Float[Tensor, "b t c *grid"],
    interpolation: maps.Mode = "bilinear",
) -> Float[Tensor, "b t *grid"]:
    """Guided backpropagation times Grad-CAM++, resized to the image.

    Warning: its detail is that of `guided_backprop`, which fails randomization tests (Adebayo et al. 2018, 1810.03292);
    only the coarse `grad_cam_plus_plus` depends on the class.

    Options:
        interpolation: how Grad-CAM++ is resized, "bilinear" or "nearest" (see `sightline.maps.resize`).

    Raises:
        ValueError: another interpolation.

    Source: Chattopadhyay et al. 2018 (1710.11063), eq. 20.
    """
    return _guided(grad_cam_plus_plus.formula(activations, gradients), guided_gradients, interpolation)


def gradients_on_the_way(
    images: Float[Tensor, "b c *grid"], score: Scorer, steps: int, baseline: float | Tensor
) -> tuple[Float[Tensor, "b c *grid"], Float[Tensor, "b t c *grid"]]:
    """The baseline of each image, and the mean gradient on the line from there; see `integrated_gradients`."""
    check_whole(steps=steps)
    if steps < 1:
        raise ValueError(f"expected at least one step, got steps={steps}; take 32")
    start = _baseline(images, baseline)
    points, factors = leggauss(steps)
    places = torch.as_tensor((points + 1) / 2, dtype=wide(images), device=images.device)
    weights = torch.as_tensor(factors / 2, dtype=wide(images), device=images.device)
    mean = _zeros(images, score)

    def on_the_way(items: Int[Tensor, " n"]) -> tuple[Tensor, Tensor]:
        rows = items // steps
        there = _over(places[items % steps], images).to(images)
        return start[rows] + there * (images - start)[rows], rows

    for items, gradients in score.stream("integrated_gradients", len(images) * steps, on_the_way, score.gradients):
        mean.index_add_(0, items // steps, gradients.to(mean) * _over(weights[items % steps], gradients))
    return start, mean


def _guided(
    cams: Float[Tensor, "b t *cells"], guided_gradients: Float[Tensor, "b t c *grid"], interpolation: maps.Mode
) -> Float[Tensor, "b t *grid"]:
    return maps.resize(cams, tuple(guided_gradients.shape[3:]), interpolation) * guided_gradients.sum(2)


def _moments(
    name: str, images: Float[Tensor, "b c *grid"], score: Scorer, samples: int, noise: float, seed: int
) -> tuple[Float[Tensor, "b t c *grid"], Float[Tensor, "b t c *grid"]]:
    """Mean and variance of the gradients of noisy copies, in one pass (Welford 1962)."""
    check_whole(samples=samples, seed=seed)
    if samples < 1 or noise < 0:
        raise ValueError(
            f"expected at least one sample and noise of 0 or more, got samples={samples}, noise={noise}; "
            "take samples=25, noise=0.15"
        )
    batch = len(images)
    pixels = images.flatten(1)
    scales = _over(noise * (pixels.amax(1) - pixels.amin(1)), images)
    generator = torch.Generator().manual_seed(seed)
    seeds: list[int] = torch.randint(2**62, (samples,), generator=generator, device="cpu").tolist()

    def noisy(items: Int[Tensor, " n"]) -> tuple[Tensor, Tensor]:
        rows, copies, sides = items % batch, items // batch, images.shape[1:]
        first, last = int(copies[0]), int(copies[-1])
        drawn = [
            torch.randn(sides, generator=generator.manual_seed(each), dtype=torch.float32, device="cpu")
            for each in seeds[first : last + 1]
        ]
        return images[rows] + scales[rows] * torch.stack(drawn).to(images)[copies - first], rows

    mean = _zeros(images, score)
    squares = torch.zeros_like(mean)
    for items, streamed in score.stream(name, batch * samples, noisy, score.gradients):
        copies = items // batch
        for copy in copies.unique().tolist():
            rows, gradients = items[copies == copy] % batch, streamed[copies == copy].to(mean)
            step = gradients - mean[rows]
            mean[rows] += step / (copy + 1)
            squares[rows] += step * (gradients - mean[rows])
    return mean, squares / samples


def _baseline(images: Float[Tensor, "b c *grid"], baseline: float | Tensor) -> Float[Tensor, "b c *grid"]:
    start = torch.as_tensor(baseline, dtype=images.dtype, device=images.device)
    try:
        return _over(start, images[0]).expand_as(images) if start.ndim == 1 else start.expand_as(images)
    except RuntimeError:
        raise ValueError(
            f"expected a baseline that is a number, {tuple(images.shape[1:2])}, {tuple(images.shape[1:])} or "
            f"{tuple(images.shape)}, got shape {tuple(start.shape)}; give it in the model's own values"
        ) from None


def _over(values: Float[Tensor, " n"], like: Tensor) -> Tensor:
    """One value for each entry of the first axis."""
    return values.view(-1, *[1] * (like.ndim - 1))


def _zeros(images: Float[Tensor, "b c *grid"], score: Scorer) -> Float[Tensor, "b t c *grid"]:
    return images.new_zeros(len(images), score.targets.shape[1], *images.shape[1:], dtype=wide(images))
