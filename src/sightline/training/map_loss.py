"""A loss on maps: a network is trained so that what decides lies in the masks."""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from sightline import maps
from sightline.explainers import Explainer, explain
from sightline.inference import logits_of, wide

GRADIENT = "saliency"
"""The method whose loss is that of Ross et al.; all others have `share_outside`."""


@Explainer
def squared_gradients(input_gradients: Float[Tensor, "b t c *grid"]) -> Float[Tensor, "b t *grid"]:
    """Squared gradient at each pixel, summed over its colors."""
    return input_gradients.square().sum(2)


def share_outside(values: Float[Tensor, "b 1 h w"], masks: Bool[Tensor, "b 1 H W"]) -> Float[Tensor, " b"]:
    """Share of a map's positive values outside the mask, 0 to 1; 0 for a map without positive values.

    The map is resized bilinearly to the mask. It is 1 - `energy_in_mask`, where that is defined.

    >>> import torch
    >>> values, masks = torch.tensor([[[[3.0, 1.0]]], [[[-3.0, 0.0]]]]), torch.tensor([[[[True, False]]]])
    >>> share_outside(values, masks.expand(2, 1, 1, 2))
    tensor([0.2500, 0.0000])
    """
    positive = maps.resize(values, tuple(masks.shape[2:])).relu().flatten(1)
    total = positive.sum(1)
    outside = (positive * ~masks.flatten(1)).sum(1)
    return outside / total.masked_fill(total == 0, 1)


@dataclass(frozen=True)
class MapLoss:
    r"""How much of the maps lies outside the masks, the mean over the images that have a mask.

    `saliency`: $\sum_d (A_d \, \partial / \partial x_d \sum_k \log p_k)^2$ over the pixels and colors $d$, with $A$ 1
    outside the mask and 0 inside. Other methods: `share_outside` of the map of the label.

    Source: Ross et al. 2017 (1703.03717), equation 1, second term (saliency).

    Differs: the paper sums over the images; maps here are made in eval mode.
    """

    method: str
    layer: str | None = None

    def __call__(
        self,
        network: nn.Module,
        images: Float[Tensor, "b 3 h w"],
        labels: Int64[Tensor, " b"],
        masks: Bool[Tensor, "b 1 h w"],
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "b n"]]:
        """The loss, 0 if no image has a mask, and the logits, both of the network in eval mode.

        Raises:
            ValueError: a method that does not work on this network, or has no second derivative.
        """
        if self.method == GRADIENT:
            logits: list[Tensor] = []

            def log_probabilities(output: Any) -> Float[Tensor, " b"]:
                values = logits_of(output)
                logits.append(values.to(wide(values)))
                return logits[-1].log_softmax(1).sum(1)

            explanation = explain(network, images, log_probabilities, [squared_gradients], differentiable=True)
            losses = (explanation["squared_gradients"] * ~masks).flatten(1).sum(1)
            answer = logits[-1]
        else:
            explanation = explain(network, images, labels, [self.method], self.layer, differentiable=True)
            losses = share_outside(explanation[self.method], masks)
            answer = explanation.logits
        marked = masks.flatten(1).any(1)
        return (losses * marked).sum() / marked.sum().clamp(min=1), answer
