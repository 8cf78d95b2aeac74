"""The change of the score when the image is multiplied by its map."""

from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from sightline.compat.differences import note
from sightline.compat.pytorch_grad_cam.metrics.perturbation_confidence import PerturbationConfidenceMetric


def multiply_tensor_with_cam(input_tensor: Float[Tensor, "c h w"], cam: Float[Tensor, "h w"]) -> Float[Tensor, "c h w"]:
    """The image seen through the map."""
    return input_tensor * cam


class CamMultImageConfidenceChange(PerturbationConfidenceMetric):
    """Score of the image seen through its map, less that of the image."""

    def __init__(self) -> None:
        super().__init__(multiply_tensor_with_cam)


class DropInConfidence(CamMultImageConfidenceChange):
    """The fall of the score, 0 where it rises."""

    def __call__(self, *args: Any, **kwargs: Any) -> Float[np.ndarray, " b"]:
        """One number per image."""
        note(
            "DropInConfidence",
            "the fall is absolute, as in pytorch-grad-cam; in the paper (1710.11063) it is relative to the score: "
            "sightline.metrics.average_drop.",
        )
        return np.maximum(-super().__call__(*args, **kwargs), 0)


class IncreaseInConfidence(CamMultImageConfidenceChange):
    """1 where the score rises, else 0."""

    def __call__(self, *args: Any, **kwargs: Any) -> Float[np.ndarray, " b"]:
        """One number per image."""
        return (super().__call__(*args, **kwargs) > 0).astype(np.float32)
