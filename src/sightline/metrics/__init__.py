"""Scores of maps: a function with one value per image, and beside it the torchmetrics class that averages it."""

from sightline.metrics.faithfulness import DeletionAUC, InsertionAUC, deletion_auc, insertion_auc
from sightline.metrics.localisation import EnergyInMask, PointingGame, energy_in_mask, pointing_game
from sightline.metrics.per_image import PerImageMean

__all__ = [
    "METRICS",
    "DeletionAUC",
    "EnergyInMask",
    "InsertionAUC",
    "PerImageMean",
    "PointingGame",
    "deletion_auc",
    "energy_in_mask",
    "insertion_auc",
    "pointing_game",
]

METRICS: dict[str, type[PerImageMean]] = {
    "deletion_auc": DeletionAUC,
    "insertion_auc": InsertionAUC,
    "pointing_game": PointingGame,
    "energy_in_mask": EnergyInMask,
}
