"""Does the map add up to the score?"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sightline.inference import Output, check_classes, either, forward, forward_call, one_target_each
from sightline.metrics.inpainting import inpaint
from sightline.metrics.per_image import mean_of, metric
from sightline.metrics.perturbed import Fill, substitute

__all__ = [
    "Completeness",
    "completeness",
]


@metric("neither")
def completeness(
    model: nn.Module,
    images: Float[Tensor, "b c *grid"],
    targets: Int[Tensor, " b"] | Int[Tensor, "b 1"],
    maps: Float[Tensor, "b 1 *cells"],
    *,
    fill: Fill = "zero",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    output: Output = None,
    forward_args: Any = (),
    forward_kwargs: Mapping[str, Any] | None = None,
) -> Float[Tensor, " b"]:
    """Gap between the sum s of the map and the difference d of the target's logit to an image of `fill`, 0 to 1.

    |s - d| / (|s| + |d|): 0 is complete, 1/3 off by a factor of two, 1 of the wrong sign or a map that sums to zero.
    The map is summed at its own resolution. With a single logit z, target 1 has z and target 0 has -z. NaN where both
    are 0 and for a value that is not finite. Only methods that promise it (integrated gradients, LRP, input x gradient
    of a network without biases) need to score well. `output`, `forward_args` and `forward_kwargs` are as for `explain`.

    Raises:
        ValueError: a target that is no class of the model, an unknown fill, or "black" without `mean` and `std`.

    Source: Sundararajan et al. 2017 (1703.01365), proposition 1.
    Differs: the paper states the identity s = d; this measures its failure, divided so that a small d does not dominate
    a mean over images.
    Elsewhere: `Completeness` (Quantus).

    >>> from sightline.testing import LinearModel
    >>> image = torch.tensor([[[[2.0, 4.0]]]])
    >>> completeness(LinearModel(torch.ones(2, 1, 1, 2)), image, torch.tensor([0]), 2 * image)
    tensor([0.3333])
    """
    if isinstance(fill, str) and fill == "inpaint":
        empty = inpaint(images, torch.ones_like(images[:, :1], dtype=torch.bool))
    else:
        empty = substitute(images, fill, mean, std)
    call, _ = forward_call(images, output, forward_args, forward_kwargs).settled(model, images)
    raw = torch.cat([forward(model, each, call=call) for each in (images, empty)]).double()
    logits = either(raw) * (2 if raw.shape[1] == 1 else 1)
    classes = check_classes(one_target_each(targets, len(images)), logits.shape[1]).to(raw.device)
    full, none = logits.gather(1, classes.repeat(2)[:, None])[:, 0].chunk(2)
    total, difference = maps.double().flatten(1).sum(1).to(raw.device), full - none
    return ((total - difference).abs() / (total.abs() + difference.abs())).to(maps)


Completeness = mean_of(completeness, "Completeness")
