"""Training: `fit` builds data and network from a recipe, runs the loop and keeps a run folder."""

from typing import TYPE_CHECKING, Any

from sightline.training.episodic import Schedule, meta_transfer, prototypical
from sightline.training.fit import fit, initial_network
from sightline.training.loop import Training

if TYPE_CHECKING:
    from sightline.training.callback import Watch

__all__ = ["Schedule", "Training", "Watch", "fit", "initial_network", "meta_transfer", "prototypical"]


def __getattr__(name: str) -> Any:
    if name == "Watch":  # it takes a second to import Lightning's trainer
        from sightline.training.callback import Watch

        return Watch
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
