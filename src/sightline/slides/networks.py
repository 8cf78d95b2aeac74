"""The network whose features stand for tiles, by name or by a run folder."""

import hashlib
from pathlib import Path
from typing import Any

from torch import nn

from sightline import models, runs
from sightline.data import Preprocess


def open_network(name: str, weights: str | None = None) -> tuple[nn.Module, Preprocess, dict[str, Any]]:
    """A network with its preprocessing, and what identifies it: its name and a checksum of its weights.

    Args:
        name: a run folder, for example of a classifier of tiles, or a network as `sightline.create_model` takes it.
        weights: file of its weights, or "pretrained"; only for a network by name.

    Raises:
        OSError: no such file or folder.
        ValueError: weights for a run folder, or none for a network by name.
    """
    folder = Path(name)
    if folder.is_dir():
        if weights is not None:
            raise ValueError("expected --weights only with the name of a network, got a run folder; leave them out")
        run = runs.open_run(folder)
        file = str(folder / "model.safetensors")
        return runs.load_model(folder), run.preprocess, {"network": run.recipe.model.name, "weights": _checksum(file)}
    model, _ = models.named_model(name, weights)
    identity = weights if weights == "pretrained" else _checksum(str(weights))
    return model, models.preprocess_of(model), {"network": name, "weights": identity}


def _checksum(file: str) -> str:
    with Path(file).open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()[:16]
