"""Costs of the networks of a study, timed side by side in one process."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sightline import data, runs
from sightline.bench.result import Bench
from sightline.bench.study import folder
from sightline.models.costs import Costs, costs

_TIMED = 32
"""Largest batch of a timed forward pass, so that it needs no more memory than a training step."""


def costs_of_rows(result: Bench, out: Path, dataset: str, own: Mapping[str, runs.Own]) -> dict[str, Costs]:
    """Costs of all rows on a data set, per image; costs.json keeps them for the same networks, device and torch."""
    first = {run.row: folder(out, run.row, run.seed, dataset) for run in reversed(result.measured)}
    opened = {row: runs.open_run(path) for row, path in first.items()}
    parameters = {run.row: run.parameters for run in result.measured}
    device = runs.best_device()
    timed = runs.plain(
        {
            "rows": {
                row: {"model": run.recipe.model, "size": run.recipe.data.size, "parameters": parameters[row]}
                for row, run in opened.items()
            },
            "device": torch.cuda.get_device_name() if device == "cuda" else device,
            "torch": torch.__version__,
        }
    )
    file = folder(out, "-", 0, dataset).parent.parent / "costs.json"
    if (stored := _stored(file, timed)) is not None:
        return stored
    by_row: dict[str, Costs] = {}
    for source in dict.fromkeys(run.recipe.data for run in opened.values()):
        splits = data.load(source)
        images = splits.get("test") or splits["query"]
        rows = {row: run for row, run in opened.items() if run.recipe.data == source}
        largest = min(run.recipe.optim.batch_size for run in rows.values())
        batch = images.batch(range(min(_TIMED, largest, len(images))))
        inputs = data.normalize(batch.images.to(device), images.preprocess)
        networks = {row: runs.load_model(run.folder, own.get(row)).to(device) for row, run in rows.items()}
        for row, cost in costs(networks, inputs).items():
            by_row[row] = replace(cost, seconds=cost.seconds / len(inputs), saved=cost.saved // len(inputs))
    by_row = {row: by_row[row] for row in first}
    runs.write(file, json.dumps({"of": timed, "costs": runs.plain(by_row)}, indent=1).encode())
    return by_row


def _stored(file: Path, timed: Any) -> dict[str, Costs] | None:
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        by_row = {row: Costs(**cost | {"ratio": tuple(cost["ratio"])}) for row, cost in stored["costs"].items()}
        return by_row if stored["of"] == timed else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
