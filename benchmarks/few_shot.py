"""Few-shot learning on CIFAR-FS with and without attention, as in the table of BR-NPA, at a width that CPUs train.

For each head and seed: ordinary training on the 64 training classes (recipes/cifar_fs.yaml), then that network as it is
(nearest centroid and logistic regression on its features), trained on as a prototypical network, and with meta-transfer
learning (MTL). Figures: 5-way 1-shot accuracy on the 20 test classes over 600 episodes, the same for all rows. Epochs
and the rate of the base learner are chosen on the 16 validation classes alone.

    python benchmarks/few_shot.py DATA [--heads "no attention;B-CNN"] [--seeds 0,1,2]

DATA is a folder of CIFAR-100. Each result lies beside its run in --out; a second start measures what is missing, and
several processes may share the heads or seeds. The table is written into results/few_shot.json.
"""

import argparse
import json
import shutil
import time
import warnings
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from measure import hardware

from sightline import recipe, runs, tasks
from sightline.facts import Notice
from sightline.tasks.new_classes import half_width
from sightline.training import Schedule, fit, meta_transfer, prototypical

RECIPE = Path(__file__).parent.parent / "recipes" / "cifar_fs.yaml"
BRNPA = {"attention": "brnpa", "attention_options": {"k": 3}}
HEADS: dict[str, dict[str, Any]] = {
    "no attention": {},
    "B-CNN": {"attention": "bap", "attention_options": {"k": 3, "variant": "brnpa"}},
    "BR-NPA": BRNPA,
    "BR-NPA, high resolution": BRNPA | {"high_resolution": 2},
    "no attention, high resolution": {"high_resolution": 2},
}
"""The last one is the control of the one before it, and in no paper."""
TEACHERS = {"BR-NPA, high resolution": "BR-NPA"}
"""Distilled from the same seed of this head, with the temperature and weight that the authors found best."""
PUBLISHED = {
    "no attention": "61.7 ± 0.9",
    "B-CNN": "58.1 ± 1.1",
    "BR-NPA": "69.9 ± 0.9",
    "BR-NPA, high resolution": "65.7 ± 0.7",
}
"""Table 3 of BR-NPA, all with MTL, at full width and 80 px; their search looked at the test classes."""
SCHEDULE = Schedule(epochs=4, episodes=60)
METHODS = {"baseline": ("centroid", "logistic"), "prototypical": ("centroid",), "MTL": ("base learner",)}
FILE = Path(__file__).parent / "results" / "few_shot.json"


def folder_of(head: str, seed: int, options: argparse.Namespace) -> Path:
    return options.out / head.replace(", ", "-").replace(" ", "-") / f"seed-{seed}"


def trained(head: str, seed: int, options: argparse.Namespace) -> runs.Run:
    """The network of a head, trained on the training classes; a second call returns it or continues."""
    changes: dict[str, Any] = {"data.source": str(options.data), "seeds": [seed]}
    changes |= {f"model.options.{name}": value for name, value in HEADS[head].items()}
    changes |= dict(pair.split("=", 1) for pair in options.set)
    if head in TEACHERS:
        teacher = trained(TEACHERS[head], seed, options)
        changes |= {"optim.teacher": str(teacher.folder), "optim.temperature": 16.0, "optim.alpha": 0.6}
    run = fit(recipe.load(RECIPE, changes), folder_of(head, seed, options) / "baseline", resume=True)
    assert isinstance(run, runs.Run)
    return run


def cell(head: str, seed: int, method: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train one network and measure it."""
    start = time.perf_counter()
    run, out = trained(head, seed, options), folder_of(head, seed, options) / method
    schedule = replace(options.schedule, seed=seed)
    if method != "baseline":
        shutil.rmtree(out, ignore_errors=True)  # of a process that was stopped
        run = prototypical(run, out, schedule) if method == "prototypical" else meta_transfer(run, out, schedule)
    seconds = time.perf_counter() - start
    figures: dict[str, Any] = {}
    for part, episodes in (("val", options.schedule.validation), ("test", options.episodes)):
        outcome = tasks.perform("few_shot", run, learners=METHODS[method], part=part, episodes=episodes)
        for name, figure in outcome.figures.items():
            figures.setdefault(name, {})[part] = {"mean": figure.interval.value, "half": half_width(figure.values)}
    accuracy = run.history[-1]["val_accuracy"]  # of the training classes, or of validation episodes
    facts = {"kept": run.info.get("training", ""), "seconds": round(seconds, 1), "last_validation": accuracy}
    return runs.plain(facts | {"figures": figures})


def table(cells: dict[str, Any]) -> str:
    """Markdown, one line per head, method and classifier: mean and deviation over seeds, half interval of the first."""
    head = ("head", "training", "classifier", "seeds", "test, %", "± over episodes, %", "validation, %", "published, %")
    lines: list[tuple[str, ...]] = [head, ("---",) * len(head)]
    for name, methods in cells.items():
        for method, seeds in methods.items():
            for learner in METHODS[method] if seeds else ():
                parts = {part: [one["figures"][learner][part] for one in seeds.values()] for part in ("test", "val")}
                published = PUBLISHED.get(name, "–") if method == "MTL" else "–"
                shown = {part: spread([one["mean"] for one in ones]) for part, ones in parts.items()}
                half = f"{100 * parts['test'][0]['half']:.1f}"
                lines.append((name, method, learner, str(len(seeds)), shown["test"], half, shown["val"], published))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def spread(means: list[float]) -> str:
    """Mean and deviation in percent."""
    return f"{100 * mean(means):.1f}" + (f" ± {100 * stdev(means):.1f}" if len(means) > 1 else "")


def collected(options: argparse.Namespace) -> dict[str, Any]:
    """What all processes have measured: head -> method -> seed -> cell."""
    cells: dict[str, Any] = {}
    for head in HEADS:
        for method in METHODS:
            for seed in range(100):
                file = folder_of(head, seed, options) / f"{method}.json"
                if file.is_file():
                    cells.setdefault(head, {}).setdefault(method, {})[str(seed)] = json.loads(file.read_text())
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--heads", default=";".join(HEADS), help="heads to measure, separated by semicolons (all)")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--episodes", type=int, default=600, help="test episodes (600)")
    parser.add_argument("--epochs", type=int, default=SCHEDULE.epochs, help="epochs of episodes (4)")
    parser.add_argument("--per-epoch", type=int, default=SCHEDULE.episodes, help="training episodes of an epoch (60)")
    parser.add_argument("--validation", type=int, default=SCHEDULE.validation, help="validation episodes (100)")
    parser.add_argument("--out", type=Path, default=Path("runs/few_shot"), help="folder of the runs (runs/few_shot)")
    parser.add_argument("--file", type=Path, default=FILE, help="the table (results/few_shot.json)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="further fields of the recipe"
    )
    options = parser.parse_args()
    warnings.simplefilter("ignore", Notice)
    options.schedule = Schedule(epochs=options.epochs, episodes=options.per_epoch, validation=options.validation)
    names = ("episodes", "epochs", "per_epoch", "validation", "set")
    settings = {name: getattr(options, name) for name in names}
    about = options.out / "settings.json"
    if about.is_file() and (before := json.loads(about.read_text())) != settings:
        parser.error(f"expected the settings of {about}, {before}, got {settings}; choose another --out")
    runs.write(about, json.dumps(settings).encode())
    for seed in map(int, options.seeds.split(",")):
        for head in options.heads.split(";"):
            for method in METHODS:
                file = folder_of(head, seed, options) / f"{method}.json"
                if file.is_file():
                    continue
                measured = cell(head, seed, method, options)
                runs.write(file, json.dumps(measured).encode())
                results = {"settings": settings, "hardware": hardware(), "versions": runs.surroundings()["versions"]}
                runs.write(options.file, json.dumps(results | {"cells": collected(options)}, indent=1).encode())
                test = {name: f"{100 * one['test']['mean']:.1f} %" for name, one in measured["figures"].items()}
                print(f"{head}, seed {seed}, {method}: {test}, {measured['seconds']:.0f} s", flush=True)
    print(table(collected(options)))


if __name__ == "__main__":
    main()
