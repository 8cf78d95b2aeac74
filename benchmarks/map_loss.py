"""Does a loss on maps make a network right for the right reasons? With and without it, three seeds, two data sets.

    python benchmarks/map_loss.py DATA                 wbc_masks from this folder, and the embedded clutter-shortcut
    python benchmarks/map_loss.py DATA --seeds 0,1     fewer seeds

Every network is the same, a small CNN with a spatial gate; only the loss differs. Runs are kept in --out, and a second
start continues. Writes results/map_loss.json and prints the tables of docs/results/map-loss.md.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import contest, save
from torch import Tensor, nn
from torch.nn import functional as F

import sightline as sl
from sightline import data
from sightline.metrics.localization import energy_in_mask
from sightline.metrics.uncertainty import mean_interval
from sightline.recipe import Data
from sightline.training.map_loss import MapLoss

BATCH, SCORED = 50, 300
LOSSES = {
    "none": ("", 0.0),
    "saliency": ("saliency", 1.0),
    "saliency x 100": ("saliency", 100.0),
    "grad_cam": ("grad_cam", 1.0),
    "attention": ("attention", 1.0),
}
"""Name -> method and weight."""
REFERENCE = "none, no patch in training"
PLAIN = Data(source="clutter", size=24, train_size=1500, test_size=500)
MAPS = ("saliency", "grad_cam", "attention")


def network(classes: int) -> nn.Module:
    """Four convolutions, a gate of positions in the middle, average pooling."""

    def stage(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    features = [*stage(3, 12), nn.MaxPool2d(2), *stage(12, 24), nn.MaxPool2d(2), sl.attention.SpatialGate(24)]
    return nn.Sequential(
        *features, *stage(24, 32), *stage(32, 32), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, classes)
    )


def sets(folder: Path) -> dict[str, tuple[Data, int, dict[str, data.ImageSet]]]:
    """Name -> what to train on, epochs, and the test sets by name."""
    patched = Data(source="clutter-shortcut", mask="digit", size=24, shortcut=1.0, train_size=1500, test_size=500)
    cells = Data(source=str(folder / "wbc_masks"), size=40)
    return {
        "clutter-shortcut": (
            patched,
            10,
            {"patch of a random color": data.load(patched)["test"], "no patch": data.load(PLAIN)["test"]},
        ),
        "wbc_masks": (cells, 20, {"test": data.load(cells)["test"]}),
    }


def trained(name: str, what: Data, epochs: int, method: str, seed: int, out: Path) -> Path:
    """The run folder of one training, which is made if it is missing."""
    folder = out / name / method / f"seed-{seed}"
    changes: dict[str, Any] = {
        "optim.epochs": epochs,
        "optim.batch_size": BATCH,
        "seeds": (seed,),
        "watch.logger": "csv",
    }
    kind, weight = LOSSES.get(method, ("", 0.0))
    if kind:
        changes |= {"optim.map_loss": kind, "optim.map_weight": weight}
    sl.fit(network, what, folder, changes, resume=folder.exists(), progress=False)
    return folder


def scored(folder: Path, images: data.ImageSet) -> dict[str, np.ndarray]:
    """For each image whether it is named correctly, and the share of each map in its mask."""
    model = sl.load(folder, model=network)
    preprocess = model.preprocess
    values: dict[str, list[Tensor]] = {}
    count = min(len(images), SCORED)
    for start in range(0, count, 100):
        batch = images.batch(np.arange(start, min(start + 100, count)))
        explanation = sl.explain(model, data.normalize(batch.images, preprocess), batch.labels, list(MAPS))
        values.setdefault("accuracy", []).append((explanation.logits.argmax(1) == batch.labels).float())
        for method in MAPS:
            values.setdefault(method, []).append(energy_in_mask(explanation[method], batch.regions))
    return {key: torch.cat(parts).double().numpy() for key, parts in values.items()}


def costs(images: data.ImageSet) -> list[dict[str, Any]]:
    """Time of a training step with each loss, divided by that of a step without."""
    torch.manual_seed(0)
    model = network(len(images.classes)).train()
    batch = images.batch(np.arange(BATCH))
    inputs = data.normalize(batch.images, images.preprocess)

    def step(method: str) -> None:
        loss = F.cross_entropy(model(inputs), batch.labels)
        if method != "none":
            outside, logits = MapLoss(method)(model, inputs, batch.labels, batch.regions)
            loss = (loss + F.cross_entropy(logits, batch.labels)) / 2 + outside
        model.zero_grad()
        loss.backward()

    calls = {method: (lambda method=method: step(method)) for method in MAPS}
    ratios = contest(calls, lambda: step("none"), 21)
    return [{"step with": name, **ratio._asdict()} for name, ratio in ratios.items()]


def shown(values: np.ndarray, digits: int = 3) -> dict[str, float]:
    """Mean over images of the mean over seeds, its interval, and the seeds' own means."""
    interval = mean_interval(np.nanmean(values, 0))
    return {
        "mean": round(interval.value, digits),
        "low": round(interval.low, digits),
        "high": round(interval.high, digits),
        "seeds": [round(float(np.nanmean(one)), digits) for one in values],
    }


def tables(rows: Sequence[Mapping[str, Any]]) -> str:
    """The tables of docs/results/map-loss.md: a row per loss, then what a step costs."""
    scores = [row for row in rows if "loss" in row]
    lines: list[str] = []
    for place in dict.fromkeys((row["data"], row["images"]) for row in scores):
        here = {(row["loss"], row["measure"]): row for row in scores if (row["data"], row["images"]) == place}
        lines += ["", f"{place[0]}, {place[1]}:", "", "| loss | accuracy | over control | " + " | ".join(MAPS) + " |"]
        lines.append("|---|---|---|" + "---|" * len(MAPS))
        for loss in dict.fromkeys(row["loss"] for row in scores if (row["data"], row["images"]) == place):
            gain = here[loss, "accuracy"]["over control"]
            cells = [_cell(here[loss, "accuracy"]), "" if loss == "none" else _cell(gain, "+")]
            lines.append(f"| {loss} | " + " | ".join([*cells, *(_cell(here[loss, one]) for one in MAPS)]) + " |")
    lines += ["", "| a step with | time, without = 1 | A/A |", "|---|---|---|"]
    for row in rows:
        if "step with" in row:
            lines.append(
                f"| {row['step with']} | {row['median']:.2f} [{row['low']:.2f}, {row['high']:.2f}] | {row['aa']:.2f} |"
            )
    return "\n".join(lines)


def _cell(row: Mapping[str, Any], sign: str = "") -> str:
    return f"{row['mean']:{sign}.3f} [{row['low']:{sign}.3f}, {row['high']:{sign}.3f}]"


def main() -> None:
    """Train what is missing, score it, print tables and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with wbc_masks/")
    parser.add_argument("--out", type=Path, default=Path("runs/map-loss"), help="where runs are kept")
    parser.add_argument("--seeds", default="0,1,2")
    arguments = parser.parse_args()
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    rows: list[dict[str, Any]] = []
    found = sets(arguments.data)
    for name, (what, epochs, tests) in found.items():
        folders = {
            (method, seed): trained(name, what, epochs, method, seed, arguments.out)
            for seed in seeds
            for method in LOSSES
        }
        arms = [*LOSSES]
        if name == "clutter-shortcut":
            arms.append(REFERENCE)
            for seed in seeds:
                folders[REFERENCE, seed] = trained(name, PLAIN, epochs, REFERENCE, seed, arguments.out)
        for split, images in tests.items():
            scores = {method: [scored(folders[method, seed], images) for seed in seeds] for method in arms}
            for method in arms:
                for measure in ("accuracy", *MAPS):
                    values = np.stack([one[measure] for one in scores[method]])
                    control = np.stack([one[measure] for one in scores["none"]])
                    row = {"data": name, "images": split, "loss": method, "measure": measure, **shown(values)}
                    row["over control"] = shown(values - control)
                    row["undefined"] = round(float(np.isnan(values).mean()), 4)
                    rows.append(row)
    area = {
        name: float(next(iter(t.values())).batch(np.arange(100)).regions.float().mean())
        for name, (_, _, t) in found.items()
    }
    rows += [{"data": name, "measure": "area of the masks", "mean": round(value, 4)} for name, value in area.items()]
    cost = costs(next(iter(found["clutter-shortcut"][2].values())))
    save("map_loss", [*rows, *cost])
    print(tables([*rows, *cost]))


if __name__ == "__main__":
    main()
