"""Scores of maps: a function with one value per image, and beside it the torchmetrics class that averages it."""

from sightline.facts import old_names
from sightline.metrics import (
    complexity,
    conservation,
    faithfulness,
    grid_pointing,
    localization,
    retrieval,
    robustness,
    sanity,
)
from sightline.metrics.agreement import krippendorff_alpha, rank_correlation, reliability, top_overlap, win_rate
from sightline.metrics.classification import (
    Quality,
    accuracy,
    expected_calibration_error,
    linear_probe,
    macro_f1,
    quality,
)
from sightline.metrics.complexity import *
from sightline.metrics.conservation import *
from sightline.metrics.faithfulness import *
from sightline.metrics.grid_pointing import *
from sightline.metrics.inpainting import inpaint
from sightline.metrics.localization import *
from sightline.metrics.per_image import PerImageMean, mean_of, metric, metrics_in
from sightline.metrics.perturbed import Perturbation, PerturbationMetric, perturbed_counts, perturbed_scores
from sightline.metrics.robustness import *
from sightline.metrics.sanity import *
from sightline.metrics.together import Measured, inputs_of, measure

__all__ = [
    "METRICS",
    "Measured",
    "PerImageMean",
    "Perturbation",
    "PerturbationMetric",
    "Quality",
    "accuracy",
    "expected_calibration_error",
    "inpaint",
    "inputs_of",
    "krippendorff_alpha",
    "linear_probe",
    "macro_f1",
    "mean_of",
    "measure",
    "metric",
    "perturbed_counts",
    "perturbed_scores",
    "quality",
    "rank_correlation",
    "reliability",
    "retrieval",
    "top_overlap",
    "win_rate",
]
__all__ += complexity.__all__
__all__ += conservation.__all__
__all__ += faithfulness.__all__
__all__ += grid_pointing.__all__
__all__ += localization.__all__
__all__ += robustness.__all__
__all__ += sanity.__all__

METRICS: dict[str, type[PerImageMean]] = metrics_in(
    faithfulness, localization, sanity, robustness, conservation, complexity
)

__getattr__ = old_names("sightline.metrics")
