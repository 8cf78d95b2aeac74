"""Fine-tuning an ImageNet network on four small data sets: is it worth it, and do its maps look where the object is?

Rows: from scratch, the linear probe of the pretrained features, fine-tuned, and fine-tuned with CBAM and with BR-NPA;
each with three seeds. Figures: accuracy on the test images with its 95 % interval (over patients where they are named),
and the share of Grad-CAM (and of the network's own attention) inside the masks or boxes beside that of control maps and
the share that chance gives.

    python benchmarks/finetune.py WEIGHTS DATA [--sets bccd_wbc,wbc_masks] [--seeds 0,1,2]

WEIGHTS are those of timm's tf_efficientnet_lite0 in any form that `--weights` takes, DATA is the folder of the sets.
The results are written after every cell, into results/finetune.json; a second start measures what is missing.
"""

import argparse
import json
import time
import warnings
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from measure import hardware

from sightline import runs
from sightline.facts import Notice
from sightline.recipe import Recipe
from sightline.recipe import load as load_recipe
from sightline.report.run_evaluation import evaluate_run
from sightline.training import fit

NETWORK = "tf_efficientnet_lite0"
SETS: dict[str, dict[str, Any]] = {
    "bccd_wbc": {"data.size": 128, "optim.class_weights": True},
    "wbc_masks": {"data.size": 128, "data.mask": "mask", "optim.class_weights": True},
    "glas_tiles": {"data.size": 128, "data.group": "patient", "data.resplit": True, "augment.rotate": True},
    "tiny_imagenet50": {"data.size": 128, "data.train_size": 1000},
}
"""Sizes that a CPU trains in minutes, and 20 training images of each class of Tiny ImageNet."""
PROBE = "linear probe"
ROWS: dict[str, dict[str, Any]] = {
    "from scratch": {},
    "fine-tuned": {"model.weights": "WEIGHTS"},
    "fine-tuned, CBAM": {"model.weights": "WEIGHTS", "model.options": {"attention": "cbam"}},
    "fine-tuned, BR-NPA": {"model.weights": "WEIGHTS", "model.options": {"attention": "brnpa"}},
}
"""The linear probe is measured before the row `fine-tuned` and is one more row."""
METHODS = ("grad_cam", "attention")
FILE = Path(__file__).parent / "results" / "finetune.json"


def cell(name: str, row: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train and evaluate one network."""
    changes = {"data.source": str(options.data / name), "model.name": NETWORK}
    changes |= SETS[name] | ROWS[row] | {"seeds": [seed]}
    if "model.weights" in changes:
        changes["model.weights"] = str(options.weights)
    changes |= dict(pair.split("=", 1) for pair in options.set)
    start = time.perf_counter()
    run = fit(
        load_recipe(Recipe(), changes),
        options.out / name / row.replace(", ", "-").replace(" ", "-") / f"seed-{seed}",
        resume=True,
    )
    assert isinstance(run, runs.Run)
    seconds = time.perf_counter() - start
    result = evaluate_run(run, methods=METHODS, metrics=["energy_in_mask"], limit=options.limit).evaluation
    energy = {
        method: {"mean": score.interval.value, "low": score.interval.low, "high": score.interval.high}
        for method in result.methods
        for score in [result.score(method, "energy_in_mask")]
    }
    assert result.accuracy is not None
    return runs.plain(
        {
            "accuracy": result.accuracy,
            "majority": result.majority,
            "unit": result.unit,
            "energy": energy,
            "chance": result.chance.get("energy_in_mask"),
            "controls": result.controls,
            "seconds": round(seconds, 1),
            "epochs": len(run.history),
            "probe": run.probe,
        }
    )


def read() -> dict[str, Any]:
    """What was measured before: set -> row -> seed -> cell."""
    return json.loads(FILE.read_text()) if FILE.is_file() else {"cells": {}}


def table(cells: dict[str, Any]) -> str:
    """Markdown, one line per set and row: means over the seeds; interval and best control of the first seed."""
    head = (
        "set",
        "row",
        "seeds",
        "accuracy, %",
        "interval",
        *(f"{m} in mask" for m in METHODS),
        "best control",
        "chance",
    )
    lines: list[tuple[str, ...]] = [head, ("---",) * len(head)]
    for name, rows in cells.items():
        fine = rows.get("fine-tuned", {})
        if probe := next((one["probe"] for one in fine.values() if one.get("probe")), None):
            lines.append((name, PROBE, "1", f"{100 * probe['value']:.1f}", span(probe), "–", "–", "–", "–"))
        for row, seeds in rows.items():
            if seeds:
                lines.append((name, row, *columns([*seeds.values()])))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def columns(measured: list[dict[str, Any]]) -> list[str]:
    """A line of the table."""
    first, accuracies = measured[0], [100 * one["accuracy"]["value"] for one in measured]
    spread = f" ± {stdev(accuracies):.1f}" if len(accuracies) > 1 else ""
    shares = [[one["energy"][m]["mean"] for one in measured if m in one["energy"]] for m in METHODS]
    shown = [f"{mean(values):.3f}" if values and None not in values else "–" for values in shares]
    control = max(first["controls"], key=lambda one: first["energy"][one]["mean"] or 0)
    best = f"{first['energy'][control]['mean']:.3f} ({control})"
    return [
        str(len(measured)),
        f"{mean(accuracies):.1f}{spread}",
        span(first["accuracy"]),
        *shown,
        best,
        f"{first['chance']:.3f}",
    ]


def span(accuracy: dict[str, float]) -> str:
    """The interval in percent."""
    return f"{100 * accuracy['low']:.1f} to {100 * accuracy['high']:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--sets", default=",".join(SETS), help="data sets to measure (all)")
    parser.add_argument("--rows", default=";".join(ROWS), help="rows to measure, separated by semicolons (all)")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--limit", type=int, default=200, help="images to make maps of (200)")
    parser.add_argument("--out", type=Path, default=Path("runs/finetune"), help="folder of the runs (runs/finetune)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="further fields of the recipe"
    )
    options = parser.parse_args()
    warnings.simplefilter("ignore", Notice)
    results = read()
    settings = {"limit": options.limit, "set": options.set, "network": NETWORK, "sets": SETS}
    if results["cells"] and results["settings"] != settings:
        parser.error(f"expected the settings of {FILE.name}, {results['settings']}, got {settings}; move the file away")
    results |= {"settings": settings, "hardware": hardware(), "versions": runs.surroundings()["versions"]}
    for seed in map(int, options.seeds.split(",")):
        for name in options.sets.split(","):
            for row in options.rows.split(";"):
                seeds = results["cells"].setdefault(name, {}).setdefault(row, {})
                if str(seed) not in seeds:
                    seeds[str(seed)] = cell(name, row, seed, options)
                    runs.write(FILE, json.dumps(results, indent=1).encode())
                    print(
                        f"{name}, {row}, seed {seed}: {100 * seeds[str(seed)]['accuracy']['value']:.1f} %", flush=True
                    )
    print(table(results["cells"]))


if __name__ == "__main__":
    main()
