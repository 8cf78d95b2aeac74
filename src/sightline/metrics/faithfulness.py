"""Does the model need what the map marks? Formulas over the scores of images with parts hidden."""

import torch
from jaxtyping import Float
from torch import Tensor

from sightline.metrics.hiding import HidingMetric
from sightline.metrics.per_image import PerImageMean


@HidingMetric
def deletion_auc(deletion: Float[Tensor, "b points"], shares: Float[Tensor, "b points"]) -> Float[Tensor, " b"]:
    """Area under the score of the target while pixels are replaced by `fill`, most important first; lower is better.

    The curve holds the score of the whole image and then one point after each of `steps` equal chunks of pixels (the
    last may be smaller); its x-axis is the true share of pixels replaced, from 0 to 1; the area is trapezoidal.
    Maps are resized bilinearly to the image. Tied pixels go in a fixed scattered order, so a flat map is a random
    one. A map with a value that is not finite gives NaN.

    Source: Petsiuk et al. 2018 (1806.07421).
    Differs: the area is on [0, 1] whatever `steps`; the unperturbed score is part of the curve.

    >>> from sightline.testing import LinearModel
    >>> image = torch.tensor([[[[0.4, 0.3], [0.2, 0.1]]]])
    >>> deletion_auc(LinearModel(torch.ones(1, 1, 2, 2)), image, torch.tensor([0]), image, steps=2, score="logit")
    tensor([0.4000])
    """
    return torch.trapezoid(deletion, shares, dim=1)


@HidingMetric
def insertion_auc(insertion: Float[Tensor, "b points"], shares: Float[Tensor, "b points"]) -> Float[Tensor, " b"]:
    """Area under the score of the target while an image of `fill` is replaced by its pixels, most important first.

    Higher is better; everything else as for `deletion_auc`. The curve ends with the score of the whole image.

    Source: Petsiuk et al. 2018 (1806.07421).
    Differs: the paper starts from a blurred image, here the default fill is that of deletion; `fill="blur"` is a
    Gaussian of a fifth of the shorter side (at least 9 pixels, odd), sigma a quarter of that.

    >>> from sightline.testing import LinearModel
    >>> image = torch.tensor([[[[0.4, 0.3], [0.2, 0.1]]]])
    >>> insertion_auc(LinearModel(torch.ones(1, 1, 2, 2)), image, torch.tensor([0]), image, steps=2, score="logit")
    tensor([0.6000])
    """
    return torch.trapezoid(insertion, shares, dim=1)


@HidingMetric
def deletion_correlation(deletion: Float[Tensor, "b points"], marked: Float[Tensor, "b n"]) -> Float[Tensor, " b"]:
    """Correlation between the map's mean in a chunk and how much the score falls when it is taken away; -1 to 1.

    Deletion's area sees only the order of pixels, this sees the values: 1 if they are the falls up to scale and shift.
    NaN where the falls or the means are all the same.

    Source: Gomez et al. 2022 (2201.13291), deletion correlation.

    >>> from sightline.testing import LinearModel
    >>> image = torch.tensor([[[[0.4, 0.3], [0.2, 0.1]]]])
    >>> deletion_correlation(LinearModel(torch.ones(1, 1, 2, 2)), image, torch.tensor([0]), image, score="logit")
    tensor([1.])
    """
    return _correlation(deletion, -deletion.diff(dim=1), marked)


@HidingMetric
def insertion_correlation(insertion: Float[Tensor, "b points"], marked: Float[Tensor, "b n"]) -> Float[Tensor, " b"]:
    """Correlation between the map's mean in a chunk and how much the score rises when it is put in; -1 to 1.

    As `deletion_correlation`, along the curve of insertion.

    Source: Gomez et al. 2022 (2201.13291), insertion correlation.

    >>> from sightline.testing import LinearModel
    >>> image = torch.tensor([[[[0.4, 0.3], [0.2, 0.1]]]])
    >>> insertion_correlation(LinearModel(torch.ones(1, 1, 2, 2)), image, torch.tensor([0]), -image, score="logit")
    tensor([-1.])
    """
    return _correlation(insertion, insertion.diff(dim=1), marked)


@HidingMetric
def average_drop(original: Float[Tensor, " b"], kept: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """Share of the score that is lost where the image is dimmed by the map, 0 to 1; lower is better.

    max(0, y - y_m) / y, where the pixels of y_m are the image's times the map, scaled from 0 to 1, and `fill` times the
    rest. A rise counts as 0. NaN for a flat map and where y is not positive.

    Source: Chattopadhyay et al. 2018 (1710.11063), section 5.1; a share, not per cent.

    >>> from sightline.testing import LinearModel
    >>> image = torch.tensor([[[[0.4, 0.3, 0.2, 0.1]]]])
    >>> one = torch.tensor([[[[1.0, 0.0, 0.0, 0.0]]]])
    >>> average_drop(LinearModel(torch.ones(1, 1, 1, 4)), image, torch.tensor([0]), one, score="logit")
    tensor([0.6000])
    """
    return _relative((original - kept).clamp(min=0), original)


@HidingMetric
def increase_in_confidence(original: Float[Tensor, " b"], kept: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """1 where the score rises when the image is dimmed by the map, else 0; higher is better.

    Dimmed as in `average_drop`. NaN for a flat map.

    Source: Chattopadhyay et al. 2018 (1710.11063), section 5.1.

    >>> from sightline.testing import LinearModel
    >>> image, target = torch.tensor([[[[2.0, -1.0]]]]), torch.tensor([0])
    >>> increase_in_confidence(LinearModel(torch.ones(1, 1, 1, 2)), image, target, image, score="logit")
    tensor([1.])
    """
    return (kept > original).double().where(kept.isfinite(), torch.nan)


@HidingMetric
def average_gain(original: Float[Tensor, " b"], kept: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """Share of what the score lacks to 1 that is gained where the image is dimmed by the map; higher is better.

    max(0, y_m - y) / (1 - y), dimmed as in `average_drop`. NaN for a flat map and where y is not below 1.

    Source: Zhang et al. 2023, Opti-CAM (2301.07002), eq. 17.
    """
    return _relative((kept - original).clamp(min=0), 1 - original)


@HidingMetric
def add(original: Float[Tensor, " b"], hidden: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """Average drop in deletion: share of the score lost where what the map marks is dimmed; higher is better, up to 1.

    (y - y_i) / y, where the pixels of y_i are the image's times one minus the map, scaled from 0 to 1, and `fill` times
    the map. Negative where the score rises. NaN for a flat map and where y is not positive.

    Source: Jung & Oh 2021, LIFT-CAM (2102.05228).

    >>> from sightline.testing import LinearModel
    >>> image = torch.tensor([[[[0.4, 0.3, 0.2, 0.1]]]])
    >>> one = torch.tensor([[[[1.0, 0.0, 0.0, 0.0]]]])
    >>> add(LinearModel(torch.ones(1, 1, 1, 4)), image, torch.tensor([0]), one, score="logit")
    tensor([0.4000])
    """
    return _relative(original - hidden, original)


@HidingMetric
def road_morf(most_first: Float[Tensor, "b points"]) -> Float[Tensor, " b"]:
    """Mean score with the highest 10, 20, ..., 90 % of pixels painted over from their surroundings; lower is better.

    The painting is `inpaint` with noise of 0.01, so that a hole does not tell where it is. `fill` counts for nothing.

    Source: Rong et al. 2022 (2202.00449), ROAD, most relevant first.
    Differs: the mean score of the target, where the paper has the accuracy per share.
    """
    return most_first.mean(1)


@HidingMetric
def road_lerf(least_first: Float[Tensor, "b points"]) -> Float[Tensor, " b"]:
    """Mean score with the lowest 10, 20, ..., 90 % of pixels painted over from their surroundings; higher is better.

    Source: Rong et al. 2022 (2202.00449), ROAD, least relevant first; see `road_morf`.
    """
    return least_first.mean(1)


@HidingMetric
def road(most_first: Float[Tensor, "b points"], least_first: Float[Tensor, "b points"]) -> Float[Tensor, " b"]:
    """Half of `road_lerf` minus `road_morf`: above 0 the map's order is better than its reverse, -0.5 to 0.5.

    Source: Rong et al. 2022 (2202.00449); the difference of both orders is that of pytorch-grad-cam's ROADCombined.
    """
    return (least_first.mean(1) - most_first.mean(1)) / 2


@HidingMetric
def infidelity(
    falls: Float[Tensor, "b r"], covered: Float[Tensor, "b r"], normalize: bool = True
) -> Float[Tensor, " b"]:
    """Mean squared difference between the map's sum in a square and how much hiding it lowers the score; lower better.

    Over 32 random squares of up to half the image's side, the same for every image and method. `normalize` first
    multiplies the map by the factor that fits best, so that maps of any scale compare; a map without any value scores
    the mean squared fall. The factor may be negative: a map and its negative score the same.

    Source: Yeh et al. 2019 (1901.09392), eq. 1 with square removal; the factor is that of their section 4.2.

    >>> from sightline.testing import LinearModel
    >>> image = torch.rand(1, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    >>> model, target = LinearModel(torch.ones(1, 1, 6, 6)), torch.tensor([0])
    >>> infidelity(model, image, target, 7 * image, score="logit") < 1e-9
    tensor([True])
    """
    if normalize:
        own = covered.square().mean(1, keepdim=True)
        factor = (covered * falls).mean(1, keepdim=True) / own.where(own > 0, 1)
        covered = factor * covered
    return (covered - falls).square().mean(1)


def _correlation(curve: Tensor, changes: Tensor, marked: Tensor) -> Float[Tensor, " b"]:
    """Pearson's; NaN where the changes or the map are all the same up to rounding."""
    varies = (_spread(changes) > 1e-6 * curve.abs().amax(1)) & (_spread(marked) > 1e-6 * marked.abs().amax(1))
    a, b = (x - x.mean(1, keepdim=True) for x in (changes, marked))
    return ((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))).where(varies, torch.nan)


def _spread(values: Float[Tensor, "b n"]) -> Float[Tensor, " b"]:
    return values.amax(1) - values.amin(1)


def _relative(change: Tensor, whole: Tensor) -> Tensor:
    return (change / whole).where(whole > 0, torch.nan)


class DeletionAUC(PerImageMean):
    """Mean `deletion_auc`."""

    function = deletion_auc
    sentence = "Hiding what {method} marks brings the model's confidence down fastest (deletion AUC {score})"
    higher_is_better = False


class InsertionAUC(PerImageMean):
    """Mean `insertion_auc`."""

    function = insertion_auc
    sentence = "Showing only what {method} marks brings the model's confidence up fastest (insertion AUC {score})"
    higher_is_better = True


class DeletionCorrelation(PerImageMean):
    """Mean `deletion_correlation`."""

    function = deletion_correlation
    sentence = "The values of {method} agree best with how the confidence falls (deletion correlation {score})"
    higher_is_better = True


class InsertionCorrelation(PerImageMean):
    """Mean `insertion_correlation`."""

    function = insertion_correlation
    sentence = "The values of {method} agree best with how the confidence rises (insertion correlation {score})"
    higher_is_better = True


class AverageDrop(PerImageMean):
    """Mean `average_drop`."""

    function = average_drop
    sentence = "The model keeps most of its confidence in what {method} leaves of the image (average drop {score})"
    higher_is_better = False


class IncreaseInConfidence(PerImageMean):
    """Mean `increase_in_confidence`."""

    function = increase_in_confidence
    sentence = "The model is surer of what {method} leaves of the image than of the whole most often ({score})"
    higher_is_better = True


class AverageGain(PerImageMean):
    """Mean `average_gain`."""

    function = average_gain
    sentence = "The model gains most confidence where {method} dims the image (average gain {score})"
    higher_is_better = True


class ADD(PerImageMean):
    """Mean `add`."""

    function = add
    sentence = "Dimming what {method} marks costs the model most of its confidence (ADD {score})"
    higher_is_better = True


class RoadMorf(PerImageMean):
    """Mean `road_morf`."""

    function = road_morf
    sentence = "Painting over what {method} marks brings the confidence down most (ROAD, MoRF {score})"
    higher_is_better = False


class RoadLerf(PerImageMean):
    """Mean `road_lerf`."""

    function = road_lerf
    sentence = "Painting over what {method} does not mark harms the confidence least (ROAD, LeRF {score})"
    higher_is_better = True


class Road(PerImageMean):
    """Mean `road`."""

    function = road
    sentence = "The order of values in {method} tells best which pixels the model needs (ROAD {score})"
    higher_is_better = True


class Infidelity(PerImageMean):
    """Mean `infidelity`."""

    function = infidelity
    sentence = "The sums of {method} over squares predict best what hiding them costs (infidelity {score})"
    higher_is_better = False
