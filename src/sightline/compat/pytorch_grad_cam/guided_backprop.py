"""Guided backpropagation as pytorch-grad-cam returns it."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from sightline.compat.differences import note
from sightline.compat.pytorch_grad_cam.of_each import OfEach, highest
from sightline.compat.pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from sightline.explainers import Explainer, explain


class GuidedBackpropReLUModel:
    """Guided gradients at the pixels of one image, a value for each color."""

    def __init__(self, model: nn.Module, device: torch.device | str | None = None) -> None:
        """`device`: where the image goes; the model is not moved. None: where the model is."""
        self.model = model
        self.device = next(model.parameters(), torch.zeros(0)).device if device is None else torch.device(device)

    def forward(self, input_img: Float[Tensor, "b c h w"]) -> Any:
        """What the model returns."""
        return self.model(input_img)

    def __call__(
        self, input_img: Float[Tensor, "1 c h w"], target_category: int | None = None
    ) -> Float[np.ndarray, "h w c"]:
        """The gradients of one image.

        Args:
            input_img: the image; of a batch, the first.
            target_category: the class. None: the highest.

        Raises:
            ValueError: the model has no ReLU, so that nothing would be guided.
        """
        name = "GuidedBackpropReLUModel"
        if any(module.training for module in self.model.modules()):
            note(name, "pytorch-grad-cam leaves your model in eval mode; here its modes come back after the call.")
        note(
            name,
            "pytorch-grad-cam exchanges all nn.ReLU of your model for one that is not in place, keeps other rectifiers "
            "as they are, adds to the gradient of your image from call to call, and leaves one on every parameter.",
        )
        image = input_img[:1].to(self.device)
        asked = OfEach(
            None, highest if target_category is None else lambda _: [ClassifierOutputTarget(target_category)]
        )
        guided = explain(self.model, image, asked, [_guided])["_guided"]
        return guided[0, 0].unflatten(0, image.shape[1:3]).movedim(0, -1).cpu().numpy()


@Explainer
def _guided(guided_gradients: Float[Tensor, "b t c h w"]) -> Float[Tensor, "b t rows w"]:
    """The colors' planes, one below the other."""
    return guided_gradients.flatten(2, 3)
