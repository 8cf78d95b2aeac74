"""ROAD: pixels are removed by painting them from their neighbors (Rong et al. 2022, 2202.00449)."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from torch import Tensor, nn

from sightline.compat.differences import note
from sightline.compat.pytorch_grad_cam.metrics.perturbation_confidence import (
    AveragerAcrossThresholds,
    PerturbationConfidenceMetric,
    RemoveLeastRelevantFirst,
    RemoveMostRelevantFirst,
)
from sightline.compat.pytorch_grad_cam.of_each import ModelTarget
from sightline.metrics.inpainting import inpaint

_PERCENTILES = (10, 20, 30, 40, 50, 60, 70, 80, 90)


class NoisyLinearImputer:
    """Paints the pixels where the mask is 0 from their neighbors, and adds noise of this standard deviation."""

    def __init__(self, noise: int | float = 0.01) -> None:
        self.noise = noise

    def __call__(self, img: Float[Tensor, "c h w"], mask: Float[Tensor, "h w"]) -> Float[Tensor, "c h w"]:
        """The painted image."""
        if self.noise:
            note(
                "NoisyLinearImputer",
                "pytorch-grad-cam draws new noise for every image from the global random state; here it is seeded.",
            )
        return inpaint(img[None], (mask == 0)[None, None], self.noise)[0]


class ROADMostRelevantFirst(PerturbationConfidenceMetric):
    """Change of the score without the pixels above a percentile of the map."""

    def __init__(self, percentile: int | float | str = 80) -> None:
        super().__init__(RemoveMostRelevantFirst(percentile, NoisyLinearImputer()))


class ROADLeastRelevantFirst(PerturbationConfidenceMetric):
    """The same without the pixels that matter least."""

    def __init__(self, percentile: int | float | str = 20) -> None:
        super().__init__(RemoveLeastRelevantFirst(percentile, NoisyLinearImputer()))


class ROADMostRelevantFirstAverage(AveragerAcrossThresholds):
    """Its mean over percentiles."""

    def __init__(self, percentiles: Sequence[int | float] = _PERCENTILES) -> None:
        super().__init__(ROADMostRelevantFirst, percentiles)


class ROADLeastRelevantFirstAverage(AveragerAcrossThresholds):
    """Its mean over percentiles."""

    def __init__(self, percentiles: Sequence[int | float] = _PERCENTILES) -> None:
        super().__init__(ROADLeastRelevantFirst, percentiles)


class ROADCombined:
    """Half of how much less the score falls if the least relevant pixels are removed first; larger is better."""

    def __init__(self, percentiles: Sequence[int | float] = _PERCENTILES) -> None:
        self.percentiles = percentiles
        self.morf_averager = ROADMostRelevantFirstAverage(percentiles)
        self.lerf_averager = ROADLeastRelevantFirstAverage(percentiles)

    def __call__(
        self,
        input_tensor: Float[Tensor, "b c h w"],
        cams: Float[np.ndarray, "b h w"],
        targets: Sequence[ModelTarget],
        model: nn.Module,
    ) -> Float[np.ndarray, " b"]:
        """One number per image."""
        lerf = self.lerf_averager(input_tensor, cams, targets, model)
        return (lerf - self.morf_averager(input_tensor, cams, targets, model)) / 2
