"""What a step of our training loop costs beside the same network in a bare PyTorch loop, and whether data keeps up.

    python benchmarks/training_step.py            # about 3 minutes on two idle CPU cores

The loop is timed whole, from one step to the next: batch, normalisation, forward, backward, optimiser, bookkeeping, on
images that lie in memory. After each of our steps come two bare steps (one of them before it in every other round),
on images already normalised: the first against ours, the two against each other (A/A), which shows what the machine
alone varies. The bar: at most 1.05 times the bare step; the loader gives at least twice what the step takes.
"""

import argparse
import json
import os
import platform
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from sightline import data, models
from sightline.data.sets import Pixels
from sightline.recipe import Augment, Data, Optim, Recipe
from sightline.training import Training

RESULT = Path(__file__).parent / "results" / "training_step.json"


class Resident:
    """A store whose images lie in memory."""

    def __init__(self, images: np.ndarray) -> None:
        self.images = images

    def read(self, rows: np.ndarray) -> Pixels:
        return Pixels(self.images[rows], None, None)


def median_with_interval(ratios: list[float]) -> dict[str, float]:
    """Median and the 95 % interval of the median by bootstrap."""
    draws = np.random.default_rng(0).choice(ratios, (10_000, len(ratios)))
    low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
    return {"median": round(float(np.median(ratios)), 4), "low": round(float(low), 4), "high": round(float(high), 4)}


def seconds_of(call) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def loader_rate(images: data.ImageSet, batch_size: int, epochs: int = 3) -> float:
    """Images per second of the last passes over the data, with the augmentation of the CIFAR recipes."""
    change = Augment(crop=4, flip=True)
    rates = []
    for epoch in range(epochs):
        order = (0, epoch)
        passed = data.batches(images, batch_size, shuffle=order, augment=(change, *order), drop_last=True)
        rates.append(len(images) / seconds_of(lambda passed=passed: [None for _ in passed]))
    return max(rates)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--pairs", type=int, default=21)
    arguments.add_argument("--batch-size", type=int, default=128)
    asked = arguments.parse_args()
    size, warm = 32, 2
    rounds = asked.pairs + warm

    sources = {"clutter": Data(source="clutter", size=size, train_size=2000, test_size=100)}
    if root := os.environ.get("SIGHTLINE_DATA"):
        sources["cifar10 (parquet, cached)"] = Data(source=str(Path(root) / "cifar10"), train_size=10_000)
    sets = {name: data.load(source)["train"] for name, source in sources.items()}

    first = sets["clutter"]
    pixels = np.concatenate([first.batch(range(i, i + 100)).images.numpy() for i in range(0, 2000, 100)])
    places = np.arange(rounds * asked.batch_size) % 2000
    resident = data.ImageSet(
        name="resident",
        split="train",
        classes=first.classes,
        preprocess=first.preprocess,
        labels=first.labels[places],
        names=[str(i) for i in places],
        store=Resident(pixels[places]),
    )

    def network() -> torch.nn.Module:
        torch.manual_seed(0)
        return models.create_model("vgg_att3", num_classes=10, width=0.25)

    recipe = Recipe(augment=Augment(flip=False), optim=Optim(epochs=1, batch_size=asked.batch_size, schedule="constant"))
    training = Training(network(), resident, None, recipe)

    bare = network().to(training.fabric.device, memory_format=torch.channels_last)
    optimiser = torch.optim.SGD(bare.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    batch = resident.batch(range(asked.batch_size)).to(training.fabric.device)
    images = data.normalise(batch.images, first.preprocess).to(memory_format=torch.channels_last)

    def bare_step() -> None:
        F.cross_entropy(bare(images), batch.labels).backward()
        optimiser.step()
        optimiser.zero_grad()

    ours: list[float] = []
    bares: list[tuple[float, float]] = []
    before = [seconds_of(bare_step)]
    mark = time.perf_counter()

    def tick() -> None:
        nonlocal mark
        ours.append(time.perf_counter() - mark)
        after = [seconds_of(bare_step) for _ in range(2 - len(before))]
        bares.append((before + after)[0:2] if len(ours) % 2 else (before + after)[1::-1])
        before[:] = [seconds_of(bare_step)] if len(ours) % 2 == 0 else []
        mark = time.perf_counter()

    for _ in training.epochs(tick):
        pass
    ours, bares = ours[warm:], bares[warm:]
    step_rate = asked.batch_size / float(np.median(ours))
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": f"{platform.machine()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads, {training.fabric.device}",
        "versions": {name: version(name) for name in ("torch", "lightning", "numpy")} | {"python": platform.python_version()},
        "network": f"vgg_att3, width 1/4, {size} px, batch {asked.batch_size}",
        "pairs": len(ours),
        "ours / bare": median_with_interval([a / b[0] for a, b in zip(ours, bares, strict=True)]),
        "bare / bare": median_with_interval([b[1] / b[0] for b in bares]),
        "step, images per second": round(step_rate, 1),
        "loader, images per second": {name: round(loader_rate(s, asked.batch_size), 1) for name, s in sets.items()},
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
