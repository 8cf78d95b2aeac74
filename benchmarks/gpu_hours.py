"""How long would the published experiments train on one GPU? Estimated from counted multiplications, not measured.

Hours of a run = training images x epochs x multiply-adds of a forward pass / multiply-adds per second in training; a
student also runs its teacher forward, a third of a training step. Validation, tasks and reading of images are left out.

The rate is one that others measured: timm's table of training speeds has 1218.01 images per second for ResNet-50 at 224
pixels (4.09 G multiply-adds) on an RTX 3090, mixed precision, channels last, PyTorch 1.12
(https://github.com/huggingface/pytorch-image-models, results/benchmark-train-amp-nhwc-pt112-cu113-rtx3090.csv).
A network of small images or few channels uses a GPU worse than that one does, so expect more than its figure.

    python benchmarks/gpu_hours.py

The table is written into results/gpu_hours.json.
"""

import json
import warnings
from typing import Any

import torch
from measure import RESULTS
from torch.utils.flop_counter import FlopCounterMode

from sightline import runs
from sightline.bench.published import PUBLISHED, Published
from sightline.facts import Notice
from sightline.models import create_model

IMAGES = {
    "cifar10": 49_000,
    "cifar100": 49_000,
    "svhn": 71_792,
    "cub200": 5_994,
    "fgvc_aircraft": 6_667,
    "stanford_cars": 8_144,
    "Market-1501-v15.09.15": 12_936,
    "cifar_fs": 36_480,
}
"""Training images of each data set, less those for validation where the recipe takes a share of them."""
SIDES = {"cifar10": 32, "cifar100": 32, "svhn": 32}
"""Pixels a side, where the recipe takes the images as they are."""
IDENTITIES = 751
PER_SECOND = 1218.01 * 4.09e9


def macs(experiment: Published, row: str) -> float:
    """Multiply-adds of a forward pass for one image, on tensors without values."""
    recipe = experiment.study.changed(row)
    size = recipe.data.size or SIDES[recipe.data.source]
    height, width = size if isinstance(size, tuple) else (size, size)
    classes = experiment.classes or (64 if recipe.data.source == "cifar_fs" else IDENTITIES)
    model = create_model(recipe.model.name, num_classes=classes, **recipe.model.options)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, 3, height, width))
    return counter.get_total_flops() / 2


def hours(experiment: Published) -> dict[str, float]:
    """Row -> hours of one run."""
    each = {row: macs(experiment, row) for row in experiment.study.rows}
    by_row: dict[str, float] = {}
    for row, work in each.items():
        recipe = experiment.study.changed(row)
        teacher = each.get(experiment.study.rows[row].get("optim.teacher", ""), 0.0)
        passes = IMAGES[recipe.data.source] * (recipe.optim.epochs or 0)
        by_row[row] = passes * (work + teacher / 3) / PER_SECOND / 3600
    return by_row


def main() -> None:
    warnings.simplefilter("ignore", Notice)
    estimated: dict[str, Any] = {}
    print("| experiment | networks | seeds | hours of the longest run | hours in all |\n|---|---|---|---|---|")
    for name, experiment in PUBLISHED.items():
        seeds = len(experiment.study.recipe.seeds)
        by_row = hours(experiment)
        estimated[name] = {"rows": {row: round(value, 2) for row, value in by_row.items()}, "seeds": seeds}
        total = seeds * sum(by_row.values())
        print(f"| `{name}` | {len(by_row)} | {seeds} | {max(by_row.values()):.1f} | {total:.0f} |", flush=True)
    runs.write(RESULTS / "gpu_hours.json", json.dumps(estimated, indent=1).encode())


if __name__ == "__main__":
    main()
