"""The images that a task measures a trained network on."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Int64
from torch import nn

from sightline import data, recipe, runs

_BATCH = 64


def images_for(run: runs.Run, source: str | None, fields: Mapping[str, Any] | None) -> dict[str, data.ImageSet]:
    """The splits of the run's own data, or of another source, at the run's size and with its mean and deviation.

    Args:
        run: a trained run.
        source: as `data.source` of a recipe. None: the run's data.
        fields: further fields of the recipe's `data`, without that prefix.

    Raises:
        OSError: the images are missing.
        ValueError: a wrong field, data without split for training, identities, or another size than the run's.
    """
    start = run.recipe.data if source is None else recipe.Data(source=source, size=run.preprocess.size, val=0.0)
    changes = {f"data.{name}": value for name, value in (fields or {}).items()}
    if changes.keys() & {"data.size", "data.source", "data.streaming"}:
        raise ValueError(
            f"expected fields without size, source and streaming, got {', '.join(fields or {})}; the size is the run's"
        )
    wanted = recipe.load(replace(run.recipe, data=start), changes).data
    if wanted.streaming:
        raise ValueError("expected data that is split for training and testing, got a run whose data is streamed")
    if data.has_identities(wanted):
        raise ValueError(f"expected images with classes, got identities of {wanted.source}; use the task retrieval")
    return {split: replace(images, preprocess=run.preprocess) for split, images in data.load(wanted).items()}


def each(images: data.ImageSet, rows: Int64[np.ndarray, " n"], model: nn.Module) -> Iterator[data.Batch]:
    """The images at these places in batches on the model's device."""
    device = next(model.parameters()).device
    for batch in images.each(np.split(rows, range(_BATCH, len(rows), _BATCH)), None):
        yield batch.to(device)
