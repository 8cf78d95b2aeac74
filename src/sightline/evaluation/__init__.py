"""Methods x metrics over a data set, with intervals and controls."""

from sightline.evaluation.evaluate import evaluate
from sightline.evaluation.mosaics import evaluate_mosaics
from sightline.evaluation.planning import as_word
from sightline.evaluation.ranking import standing_of
from sightline.evaluation.result import Curve, Evaluation, Example, Score, Standing
from sightline.metrics.uncertainty import Comparison

__all__ = [
    "Comparison",
    "Curve",
    "Evaluation",
    "Example",
    "Score",
    "Standing",
    "as_word",
    "evaluate",
    "evaluate_mosaics",
    "standing_of",
]
