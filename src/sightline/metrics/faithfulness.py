"""Does the model need what the map marks? Formulas over the scores of perturbed images."""

import torch
from jaxtyping import Float
from torch import Tensor

from sightline.metrics.agreement import correlation
from sightline.metrics.per_image import mean_of, metric
from sightline.metrics.perturbed import PerturbationMetric

__all__ = [
    "ADD",
    "AverageDrop",
    "AverageGain",
    "DeletionAUC",
    "DeletionCorrelation",
    "IncreaseInConfidence",
    "Infidelity",
    "InsertionAUC",
    "InsertionCorrelation",
    "Road",
    "RoadLerf",
    "RoadMorf",
    "add",
    "average_drop",
    "average_gain",
    "deletion_auc",
    "deletion_correlation",
    "increase_in_confidence",
    "infidelity",
    "insertion_auc",
    "insertion_correlation",
    "road",
    "road_lerf",
    "road_morf",
]


@metric("higher", "how fast the class returns as the most important pixels are shown")
@PerturbationMetric
def insertion_auc(insertion: Float[Tensor, "b points"], fractions: Float[Tensor, "b points"]) -> Float[Tensor, " b"]:
    """Area under the score of the target while an image of `fill` is replaced by its pixels, most important first.

    Higher is better; everything else as for `deletion_auc`. The curve ends with the score of the whole image.

    Source: Petsiuk et al. 2018 (1806.07421).
    Differs: the paper starts from a blurred image, here the default fill is that of deletion; `fill="blur"` is a
    Gaussian of a fifth of the shorter side (at least 9 pixels, odd), sigma a quarter of that.
    Elsewhere: `DeletionInsertionMetric` (torch-cam), `Insertion` (saliency-maps-metrics).

    >>> from sightline.testing import LinearModel
    >>> image = torch.tensor([[[[0.4, 0.3], [0.2, 0.1]]]])
    >>> insertion_auc(LinearModel(torch.ones(1, 1, 2, 2)), image, torch.tensor([0]), image, steps=2, score="logit")
    tensor([0.6000])
    """
    return torch.trapezoid(insertion, fractions, dim=1)


InsertionAUC = mean_of(insertion_auc, "InsertionAUC")


@metric("lower", "how fast the class is lost as the most important pixels are removed")
@PerturbationMetric
def deletion_auc(deletion: Float[Tensor, "b points"], fractions: Float[Tensor, "b points"]) -> Float[Tensor, " b"]:
    """Area under the score of the target while pixels are replaced by `fill`, most important first; lower is better.

    The curve holds the score of the whole image and then one point after each of `steps` equal chunks of pixels (the
    last may be smaller); its x-axis is the true fraction of pixels replaced, from 0 to 1; the area is trapezoidal.
    Maps are resized bilinearly to the image. Tied pixels go in a fixed scattered order, so a flat map is a random
    one. A map with a value that is not finite gives NaN.

    Source: Petsiuk et al. 2018 (1806.07421).
    Differs: the area is on [0, 1] whatever `steps`; the unperturbed score is part of the curve.
    Elsewhere: `DeletionInsertionMetric` (torch-cam), `PixelFlipping` (Quantus), `Deletion` (saliency-maps-metrics).

    >>> from sightline.testing import LinearModel
    >>> image = torch.tensor([[[[0.4, 0.3], [0.2, 0.1]]]])
    >>> deletion_auc(LinearModel(torch.ones(1, 1, 2, 2)), image, torch.tensor([0]), image, steps=2, score="logit")
    tensor([0.4000])
    """
    return torch.trapezoid(deletion, fractions, dim=1)


DeletionAUC = mean_of(deletion_auc, "DeletionAUC")


@metric("higher", "how well the map predicts what each part adds to the score when it is shown")
@PerturbationMetric
def insertion_correlation(insertion: Float[Tensor, "b points"], map_means: Float[Tensor, "b n"]) -> Float[Tensor, " b"]:
    """Correlation between the map's mean in a chunk and the rise of the score when it is inserted; -1 to 1.

    Like `deletion_correlation`, along the insertion curve.

    Source: Gomez et al. 2022 (2201.13291), insertion correlation.

    >>> from sightline.testing import LinearModel
    >>> image = torch.tensor([[[[0.4, 0.3], [0.2, 0.1]]]])
    >>> insertion_correlation(LinearModel(torch.ones(1, 1, 2, 2)), image, torch.tensor([0]), -image, score="logit")
    tensor([-1.])
    """
    return _correlation(insertion, insertion.diff(dim=1), map_means)


InsertionCorrelation = mean_of(insertion_correlation, "InsertionCorrelation")


@metric("higher", "how well the map predicts what each part takes from the score when it is removed")
@PerturbationMetric
def deletion_correlation(deletion: Float[Tensor, "b points"], map_means: Float[Tensor, "b n"]) -> Float[Tensor, " b"]:
    """Correlation between the map's mean in a chunk and the drop of the score when it is removed; -1 to 1.

    Deletion AUC uses only the order of the pixels, this also their values: 1 if they equal the drops up to scale and
    shift. NaN where the drops or the means are all the same.

    Source: Gomez et al. 2022 (2201.13291), deletion correlation.

    >>> from sightline.testing import LinearModel
    >>> image = torch.tensor([[[[0.4, 0.3], [0.2, 0.1]]]])
    >>> deletion_correlation(LinearModel(torch.ones(1, 1, 2, 2)), image, torch.tensor([0]), image, score="logit")
    tensor([1.])
    """
    return _correlation(deletion, -deletion.diff(dim=1), map_means)


DeletionCorrelation = mean_of(deletion_correlation, "DeletionCorrelation")


@metric("lower", "how much of the score is lost when only the marked part is kept")
@PerturbationMetric
def average_drop(original: Float[Tensor, " b"], preserved: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """Fraction of the score that is lost when the map dims the image, 0 to 1; lower is better.

    max(0, y - y_m) / y, where y_m is the score of the image times the map (scaled from 0 to 1) plus `fill` times the
    rest. A rise counts as 0. NaN for a flat map and where y is not positive.

    Source: Chattopadhyay et al. 2018 (1710.11063), section 5.1; a fraction, not per cent.
    Elsewhere: `ClassificationMetric, avg_drop` (torch-cam), `DropInConfidence` (pytorch-grad-cam).

    >>> from sightline.testing import LinearModel
    >>> image = torch.tensor([[[[0.4, 0.3, 0.2, 0.1]]]])
    >>> one = torch.tensor([[[[1.0, 0.0, 0.0, 0.0]]]])
    >>> average_drop(LinearModel(torch.ones(1, 1, 1, 4)), image, torch.tensor([0]), one, score="logit")
    tensor([0.6000])
    """
    return _relative((original - preserved).clamp(min=0), original)


AverageDrop = mean_of(average_drop, "AverageDrop")


@metric("higher", "how often the score rises when only the marked part is kept")
@PerturbationMetric
def increase_in_confidence(original: Float[Tensor, " b"], preserved: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """1 where the score rises when the map dims the image, else 0; higher is better.

    Dimmed as in `average_drop`. NaN for a flat map.

    Source: Chattopadhyay et al. 2018 (1710.11063), section 5.1.
    Elsewhere: `ClassificationMetric, conf_increase` (torch-cam), `IncreaseInConfidence` (pytorch-grad-cam).

    >>> from sightline.testing import LinearModel
    >>> image, target = torch.tensor([[[[2.0, -1.0]]]]), torch.tensor([0])
    >>> increase_in_confidence(LinearModel(torch.ones(1, 1, 1, 2)), image, target, image, score="logit")
    tensor([1.])
    """
    return (preserved > original).double().where(preserved.isfinite(), torch.nan)


IncreaseInConfidence = mean_of(increase_in_confidence, "IncreaseInConfidence")


@metric("higher", "how much the score gains when only the marked part is kept")
@PerturbationMetric
def average_gain(original: Float[Tensor, " b"], preserved: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """Gain of the score when the map dims the image, as a fraction of the largest gain possible; higher is better.

    max(0, y_m - y) / (1 - y), dimmed as in `average_drop`. NaN for a flat map and where y is not below 1.

    Source: Zhang et al. 2023, Opti-CAM (2301.07002), eq. 17.
    """
    return _relative((preserved - original).clamp(min=0), 1 - original)


AverageGain = mean_of(average_gain, "AverageGain")


@metric("higher", "how much of the score is lost when the marked part is dimmed")
@PerturbationMetric
def add(original: Float[Tensor, " b"], removed: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """Average drop in deletion: fraction of the score lost when the marked part is dimmed; higher is better, up to 1.

    (y - y_i) / y, where y_i is the score of the image times one minus the map (scaled from 0 to 1) plus `fill` times
    the map. Negative where the score rises. NaN for a flat map and where y is not positive.

    Source: Jung & Oh 2021, LIFT-CAM (2102.05228).

    >>> from sightline.testing import LinearModel
    >>> image = torch.tensor([[[[0.4, 0.3, 0.2, 0.1]]]])
    >>> one = torch.tensor([[[[1.0, 0.0, 0.0, 0.0]]]])
    >>> add(LinearModel(torch.ones(1, 1, 1, 4)), image, torch.tensor([0]), one, score="logit")
    tensor([0.4000])
    """
    return _relative(original - removed, original)


ADD = mean_of(add, "ADD")


@metric("higher", "how much more painting over the highest pixels costs than painting over the lowest", chance=0.0)
@PerturbationMetric
def road(morf: Float[Tensor, "b points"], lerf: Float[Tensor, "b points"]) -> Float[Tensor, " b"]:
    """Half of `road_lerf` minus `road_morf`: above 0 the map's order is better than its reverse, -0.5 to 0.5.

    Source: Rong et al. 2022 (2202.00449); the difference of both orders is that of pytorch-grad-cam's ROADCombined.
    Elsewhere: `ROADCombined` (pytorch-grad-cam), `ROAD` (Quantus).
    """
    return (lerf.mean(1) - morf.mean(1)) / 2


Road = mean_of(road, "Road")


@metric("lower", "what is left of the score when the highest pixels are painted over")
@PerturbationMetric
def road_morf(morf: Float[Tensor, "b points"]) -> Float[Tensor, " b"]:
    """Mean score with the highest 10, 20, ..., 90 % of pixels painted over from their surroundings; lower is better.

    The painting is `inpaint` with noise of 0.01, so that the model cannot tell where the hole is. `fill` is ignored.

    Source: Rong et al. 2022 (2202.00449), ROAD, most relevant first.
    Differs: the mean score of the target, where the paper has the accuracy per fraction.
    Elsewhere: `ROADMostRelevantFirstAverage` (pytorch-grad-cam).
    """
    return morf.mean(1)


RoadMorf = mean_of(road_morf, "RoadMorf")


@metric("higher", "what is left of the score when the lowest pixels are painted over")
@PerturbationMetric
def road_lerf(lerf: Float[Tensor, "b points"]) -> Float[Tensor, " b"]:
    """Mean score with the lowest 10, 20, ..., 90 % of pixels painted over from their surroundings; higher is better.

    Source: Rong et al. 2022 (2202.00449), ROAD, least relevant first; see `road_morf`.
    Elsewhere: `ROADLeastRelevantFirstAverage` (pytorch-grad-cam).
    """
    return lerf.mean(1)


RoadLerf = mean_of(road_lerf, "RoadLerf")


@metric("lower", "how far the map is from what hiding a square costs")
@PerturbationMetric
def infidelity(
    drops: Float[Tensor, "b r"], map_sums: Float[Tensor, "b r"], normalize: bool = True
) -> Float[Tensor, " b"]:
    """Mean squared difference between the map's sum over a square and the score's drop without it; lower is better.

    Over 32 random squares of up to half the image's side, the same for every image and method. `normalize` first
    multiplies the map by the factor that fits best, so that maps of any scale can be compared; a map of zeros scores
    the mean squared drop. The factor may be negative: a map and its negative score the same.

    Source: Yeh et al. 2019 (1901.09392), eq. 1 with square removal; the factor is that of their section 4.2.
    Elsewhere: `infidelity` (captum), `Infidelity` (Quantus).

    >>> from sightline.testing import LinearModel
    >>> image = torch.rand(1, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    >>> model, target = LinearModel(torch.ones(1, 1, 6, 6)), torch.tensor([0])
    >>> infidelity(model, image, target, 7 * image, score="logit") < 1e-9
    tensor([True])
    """
    if normalize:
        squared = map_sums.square().mean(1, keepdim=True)
        factor = (map_sums * drops).mean(1, keepdim=True) / squared.where(squared > 0, 1)
        map_sums = factor * map_sums
    return (map_sums - drops).square().mean(1)


Infidelity = mean_of(infidelity, "Infidelity")


def _correlation(curve: Tensor, changes: Tensor, map_means: Tensor) -> Float[Tensor, " b"]:
    """NaN where the changes or the map are all the same up to rounding."""
    varies = (_spread(changes) > 1e-6 * curve.abs().amax(1)) & (_spread(map_means) > 1e-6 * map_means.abs().amax(1))
    return correlation(changes, map_means).where(varies, torch.nan)


def _spread(values: Float[Tensor, "b n"]) -> Float[Tensor, " b"]:
    return values.amax(1) - values.amin(1)


def _relative(change: Tensor, whole: Tensor) -> Tensor:
    return (change / whole).where(whole > 0, torch.nan)
