"""Does a small change of the image change the map, or the prediction?"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from sightline.checks import check_whole
from sightline.inference import ForwardCall, Output, check_classes, either, forward_call, one_target_each, untouched
from sightline.metrics.per_image import mean_of, metric
from sightline.metrics.sanity import Explain, Values

__all__ = [
    "FoolingRate",
    "MaxSensitivity",
    "fooling_rate",
    "max_sensitivity",
]


@metric("neither", explanations=11)
def max_sensitivity(
    model: nn.Module,
    images: Float[Tensor, "b c *grid"],
    targets: Int[Tensor, " b"] | Int[Tensor, "b 1"],
    explain: Explain,
    *,
    radius: float = 0.02,
    samples: int = 10,
    seed: int = 0,
) -> Values:
    """Largest relative change of the map under noise, max |map(x + noise) - map(x)| / |map(x)|; 0 is best.

    `samples` times uniform noise of up to `radius`, in units of the model's input, the same for every image. A map that
    never changes scores 0. A map of zeros, or a value that is not finite in any of the maps, gives NaN.

    Raises:
        ValueError: less than one sample, a negative radius.

    Source: Yeh et al. 2019 (1901.09392), definition 3.
    Differs: relative to the map, so that maps of any scale compare; NaN for a map of zeros.
    Elsewhere: `sensitivity_max` (captum), `MaxSensitivity` (Quantus).

    >>> image = torch.ones(1, 1, 2, 2)
    >>> max_sensitivity(nn.Identity(), image, torch.tensor([0]), lambda model, images, targets: 0 * images + 1)
    tensor([0.])
    """
    check_whole(samples=samples, seed=seed)
    if samples < 1 or radius < 0:
        raise ValueError(f"expected at least 1 sample and a radius of at least 0, got {samples} and {radius}")
    generator = torch.Generator().manual_seed(seed)
    changes = list[Any]()
    with untouched(model) as net:
        maps = explain(net, images, targets)
        for _ in range(samples):
            noise = radius * (2 * torch.rand(images.shape[1:], generator=generator) - 1)
            changes.append(tree_map(_change, maps, explain(net, images + noise.to(images), targets)))
    return tree_map(lambda *values: torch.stack(values).amax(0), *changes)


MaxSensitivity = mean_of(max_sensitivity, "MaxSensitivity")


@metric("lower")
def fooling_rate(
    model: nn.Module,
    images: Float[Tensor, "b c *grid"],
    labels: Int[Tensor, " b"] | Int[Tensor, "b 1"],
    *,
    epsilon: float = 0.03,
    output: Output = None,
    forward_args: Any = (),
    forward_kwargs: Mapping[str, Any] | None = None,
) -> Float[Tensor, " b"]:
    """1 where one step of `epsilon` along the sign of the gradient of the loss flips the prediction, else 0.

    NaN where the model does not predict its label before the step. Lower is better.
    `epsilon` is in units of the model's input; `output`, `forward_args` and `forward_kwargs` are as for `explain`.

    Raises:
        ValueError: a negative `epsilon`, a label that is no class of the model.

    Source: Goodfellow et al. 2014 (1412.6572), fast gradient sign method, with cross-entropy.
    Differs: the image is not clipped to valid colors, which the model's input does not tell.

    >>> from sightline.testing import LinearModel
    >>> model, image = LinearModel(torch.tensor([[[[1.0]]], [[[-1.0]]]])), torch.tensor([[[[0.5]]]])
    >>> [fooling_rate(model, image, torch.tensor([0]), epsilon=epsilon).item() for epsilon in (0.4, 0.6)]
    [0.0, 1.0]
    """
    if epsilon < 0:
        raise ValueError(f"expected an epsilon of at least 0, got {epsilon}")
    call = forward_call(images, output, forward_args, forward_kwargs)
    with untouched(model) as net, torch.inference_mode(False):
        climb = loss_signs(net, images, labels, call)
        with torch.no_grad():
            after = either(climb.call(net, images + epsilon * climb.signs).logits)
    return (after.argmax(1) != climb.labels).float().where(climb.right, torch.nan)


FoolingRate = mean_of(fooling_rate, "FoolingRate")


class Climb(NamedTuple):
    """Where the loss of a model rises."""

    signs: Float[Tensor, "b c *grid"]
    """Of the gradient of the loss with respect to each value of the images: -1, 0 or 1."""
    labels: Int[Tensor, " b"]
    right: Bool[Tensor, " b"]
    """Whether the model predicts the label."""
    call: ForwardCall
    """How to call the model again."""


def loss_signs(
    net: nn.Module, images: Float[Tensor, "b c *grid"], labels: Int[Tensor, "b ..."], call: ForwardCall
) -> Climb:
    """The direction of the fast gradient sign method, with cross-entropy; the model must be in eval mode.

    Raises:
        ValueError: a label that is no class of the model.

    Source: Goodfellow et al. 2014 (1412.6572).

    >>> from sightline.testing import LinearModel
    >>> model, image = LinearModel(torch.tensor([[[[1.0]]], [[[-1.0]]]])), torch.tensor([[[[0.5]]]])
    >>> loss_signs(model, image, torch.tensor([0]), forward_call(image)).signs.item()
    -1.0
    """
    with torch.inference_mode(False), torch.enable_grad():
        changed = images.detach().clone().requires_grad_()
        answer = call(net, changed)
        before = either(answer.logits.float())
        labels = check_classes(one_target_each(labels, len(images)).to(images.device), before.shape[1])
        column = labels[:, None]
        # cross-entropy's gradient divided by 1 - p, which is 0 in float32 where the model is sure
        loss = before.scatter(1, column, -torch.inf).logsumexp(1) - before.gather(1, column)[:, 0]
        (gradient,) = torch.autograd.grad(loss.sum(), changed)
    return Climb(gradient.sign(), labels, before.argmax(1) == labels, answer.call)


def _change(maps: Float[Tensor, "b 1 *cells"], others: Float[Tensor, "b 1 *cells"]) -> Float[Tensor, " b"]:
    """Distance of the maps relative to the first."""
    maps, others = maps.detach(), others.detach()
    change = (others - maps).flatten(1).double().norm(dim=1) / maps.flatten(1).double().norm(dim=1)
    return change.where(change.isfinite(), torch.nan).to(maps.dtype)
