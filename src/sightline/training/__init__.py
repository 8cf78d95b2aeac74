"""Training: `fit` builds data and network from a recipe, runs the loop and keeps a run folder."""

from sightline.checks import missing

try:
    import lightning  # noqa: F401  # pyright: ignore[reportUnusedImport]
except ModuleNotFoundError:
    raise missing("training needs lightning", "train") from None

from sightline.training.callback import Watch
from sightline.training.episodic import Schedule, meta_transfer, prototypical
from sightline.training.fit import fit, initial_network
from sightline.training.loop import Training

__all__ = ["Schedule", "Training", "Watch", "fit", "initial_network", "meta_transfer", "prototypical"]
