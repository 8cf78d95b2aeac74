"""By how much the targets' scores change when the image is changed where the map says."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from sightline.compat.differences import note
from sightline.compat.pytorch_grad_cam.of_each import ModelTarget, rows_of
from sightline.inference import untouched

Perturb = Callable[[Float[Tensor, "c h w"], Float[Tensor, "h w"]], Float[Tensor, "c h w"]]
"""From an image and a map to the changed image."""


class PerturbationConfidenceMetric:
    """Score of the changed image less that of the image, by a perturbation that takes an image and its map."""

    def __init__(self, perturbation: Perturb) -> None:
        self.perturbation = perturbation

    def __call__(
        self,
        input_tensor: Float[Tensor, "b c h w"],
        cams: Float[np.ndarray, "b h w"],
        targets: Sequence[ModelTarget],
        model: nn.Module,
        return_visualization: bool = False,
        return_diff: bool = True,
    ) -> Any:
        """One number per image.

        Args:
            input_tensor: the images.
            cams: their maps, 0 to 1.
            targets: what is scored, one for each image.
            model: the model, which runs in eval mode and is left as it came.
            return_visualization: also return the changed images.
            return_diff: False: the score of the changed image alone.

        Raises:
            ValueError: not one map and one target for each image.
        """
        count = len(input_tensor)
        if len(cams) != count or len(targets) != count:
            raise ValueError(f"expected {count} maps and targets, got {len(cams)} and {len(targets)}; pass as many")
        pairs = zip(input_tensor.cpu(), torch.from_numpy(cams), strict=True)
        changed = torch.stack([self.perturbation(image, cam) for image, cam in pairs]).to(input_tensor)
        with untouched(model) as network, torch.no_grad():
            scores = _scores(network(changed), targets)
            if return_diff:
                scores = scores - _scores(network(input_tensor), targets)
        return (scores, changed) if return_visualization else scores


class RemoveMostRelevantFirst:
    """Removes the pixels at and above a percentile of the map, or above Otsu's threshold ("auto")."""

    def __init__(self, percentile: int | float | str, imputer: Perturb) -> None:
        self.percentile = percentile
        self.imputer = imputer

    def __call__(self, input_tensor: Float[Tensor, "c h w"], mask: Float[Tensor, "h w"]) -> Float[Tensor, "c h w"]:
        """The image with these pixels replaced."""
        values = mask.cpu().numpy()
        if isinstance(self.percentile, str):
            note(
                type(self).__name__,
                "with percentile='auto' pytorch-grad-cam removes the pixels on the wrong side of Otsu's threshold.",
            )
            levels = (values * 255).astype(np.uint8)
            kept = levels <= _otsu(levels)
        else:
            kept = values < np.percentile(values, self.percentile)
        return self.imputer(input_tensor, torch.from_numpy(kept.astype(np.float32)).to(mask.device))


class RemoveLeastRelevantFirst(RemoveMostRelevantFirst):
    """The same with the map turned around."""

    def __call__(self, input_tensor: Float[Tensor, "c h w"], mask: Float[Tensor, "h w"]) -> Float[Tensor, "c h w"]:
        """The image with the pixels replaced that matter least."""
        return super().__call__(input_tensor, 1 - mask)


class AveragerAcrossThresholds:
    """The mean of a metric over percentiles."""

    def __init__(
        self, imputer: Callable[[Any], Any], percentiles: Sequence[int | float] = (10, 20, 30, 40, 50, 60, 70, 80, 90)
    ) -> None:
        self.imputer = imputer
        self.percentiles = percentiles

    def __call__(
        self,
        input_tensor: Float[Tensor, "b c h w"],
        cams: Float[np.ndarray, "b h w"],
        targets: Sequence[ModelTarget],
        model: nn.Module,
    ) -> Float[np.ndarray, " b"]:
        """One number per image."""
        scores = [self.imputer(percentile)(input_tensor, cams, targets, model) for percentile in self.percentiles]
        return np.mean(np.stack(scores), axis=0)


def _scores(output: Any, targets: Sequence[ModelTarget]) -> Float[np.ndarray, "b *_"]:
    return np.stack([target(row).float().cpu().numpy() for target, row in zip(targets, rows_of(output), strict=True)])


def _otsu(values: np.ndarray) -> int:
    """The threshold between two classes of bytes whose means are furthest apart, by their sizes (Otsu 1979)."""
    counts = np.bincount(values.ravel(), minlength=256) / values.size
    below, mean = np.cumsum(counts), np.cumsum(counts * np.arange(256))
    with np.errstate(divide="ignore", invalid="ignore"):
        between = (mean[-1] * below - mean) ** 2 / (below * (1 - below))
    return int(np.nanargmax(np.where(np.isfinite(between), between, 0)))
