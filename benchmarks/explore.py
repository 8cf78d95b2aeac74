"""Does `sightline explore` find a planted shortcut without being told, and does it raise false alarms?

Networks are trained on clutter-shortcut, in which the color of a corner patch tells the class in 90, 50 or 10 % of the
training images, for 6 epochs or (50 %) one, and on clutter, which has no patch. `explore` sees validation images, drawn
like those of training, without masks. A finding is right if its region holds at least half of the patch in at least
half of its pictures.

Whether there is anything to find is measured with the patch known: every patch is recolored in the color of a class,
in images that are neither labeled nor named so. A class can be found if this turns at least 10 % of them into it.

Then three real data sets, for which nothing is known.

    python benchmarks/explore.py [--seeds 0,1,2] [--conditions ...] [--real] [--data DATA]

Each result lies beside its run in --out; a second start measures what is missing. Thresholds were chosen on networks of
the seeds 10 and 11 (90 %, 50 % and plain), and not changed for the seeds shown.
"""

import argparse
import json
import os
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from measure import hardware

from sightline import recipe, runs
from sightline.data.clutter import PATCH_COLORS
from sightline.exploration import Exploration, RunLooks, explore
from sightline.exploration.sources import probabilities
from sightline.exploration.study import LEAST
from sightline.recipe import Data, Model, Optim, Recipe
from sightline.report.explore import write_exploration
from sightline.report.run_evaluation import images_of
from sightline.training import fit

FOLDER = Path(__file__).parent.parent
MODEL = Model(name="cifar_resnet", options={"depth": 8, "stem_stride": 2, "high_resolution": 1})
OPTIM = Optim(epochs=6, batch_size=32, optimizer="adamw", lr=0.006, weight_decay=0.05, schedule="one_cycle")


def patched(share: float) -> Data:
    return Data(source="clutter-shortcut", shortcut=share, mask="digit")


CONDITIONS: dict[str, Recipe] = {
    name: Recipe(data=wanted, model=MODEL, optim=replace(OPTIM, epochs=epochs))
    for name, wanted, epochs in (
        ("share-0.9", patched(0.9), 6),
        ("plain", Data(source="clutter"), 6),
        ("share-0.5", patched(0.5), 6),
        ("share-0.1", patched(0.1), 6),
        ("share-0.5-early", patched(0.5), 1),
    )
}
"""The last one is a network in the middle of its training, which uses the patch a little."""
BLOOD = replace(OPTIM, epochs=30, batch_size=32, lr=0.003, class_weights=True)
REAL: dict[str, tuple[Recipe, str]] = {
    "bccd_wbc": (Recipe(data=Data(size=96), model=MODEL, optim=BLOOD), "train"),
    "glas_tiles": (recipe.load(FOLDER / "recipes/glas.yaml"), "train"),
    "tiny_imagenet50": (recipe.load(FOLDER / "recipes/tiny_imagenet50.yaml"), "test"),
}
"""Recipe, and the split that is explored: small sets have too few test images of a class."""
FILE = Path(__file__).parent / "results" / "explore.json"


def trained(wanted: Recipe, seed: int, folder: Path) -> runs.Run:
    run = fit(replace(wanted, seeds=(seed,)), folder, resume=True, progress=False)
    assert isinstance(run, runs.Run)
    return run


def effects(run: runs.Run) -> list[float]:
    """For each class, the share of other images that get its name once their patch has its color."""
    images, _ = images_of(run, "val", {"data.mask": "patch"})
    batch = images.batch(np.arange(len(images)))
    assert batch.masks is not None
    pixels, labels, patch = batch.images.numpy(), batch.labels.numpy(), batch.masks.numpy()
    model = runs.load_model(run.folder)
    before = probabilities(model, pixels, run.preprocess).argmax(1)
    found: list[float] = []
    for target, color in enumerate(PATCH_COLORS):
        others = np.flatnonzero((labels != target) & (before != target))[:200]
        colored = np.where(patch[others], color[None, :, None, None], pixels[others])
        after = probabilities(model, colored, run.preprocess).argmax(1)
        found.append(float((after == target).mean()))
    return found


def on_patch(exploration: Exploration, run: runs.Run) -> list[bool]:
    """For each confirmed suspicion, whether its region holds the patch."""
    images, _ = images_of(run, "val", {"data.mask": "patch"})
    places = {name: place for place, name in enumerate(images.names)}
    found: list[bool] = []
    for one in (one for ones in exploration.findings for one in ones):
        inside: list[float] = []
        for picture in one.pictures:
            mask = images.batch([places[picture.key]]).masks
            assert mask is not None
            top, left, height, width = picture.region
            inside.append(float(mask[0, 0, top : top + height, left : left + width].sum() / mask.sum()))
        found.append(float(np.mean(np.array(inside) >= 0.5)) >= 0.5)
    return found


def cell(run: runs.Run, split: str, out: Path, known: bool | None) -> dict[str, Any]:
    """Explore a run; `known`: whether its images have a patch, None for real images."""
    start = time.perf_counter()
    images, _ = images_of(run, split, {})
    source = RunLooks(runs.load_model(run.folder), images if known is None else images.unmarked())
    exploration = explore(source)
    exploration = replace(exploration, provenance=runs.surroundings())
    seconds = time.perf_counter() - start
    exploration.to_json(out / "explore.json")
    exploration.to_csv(out / "explore.csv")
    write_exploration(exploration, out)
    findings = [
        {
            "class": one.target, "kind": one.kind, "place": one.place, "verdict": one.verdict, "images": one.images,
            "class share": one.class_share, "lost": [one.cover.difference.value, one.cover.difference.low],
            "won": [one.paste.difference.value, one.paste.difference.low], "p": one.adjusted,
            "in object": one.in_object,
        }
        for ones in exploration.findings
        for one in ones
        if one.cover and one.paste
    ]  # fmt: skip
    facts: dict[str, Any] = {
        "validation accuracy": run.history[-1]["val_accuracy"],
        "train accuracy": run.history[-1]["train_accuracy"],
        "maps": exploration.maps,
        "tested": sum(one.cover is not None for one in exploration.suspicions),
        "suspicions": len(exploration.suspicions),
        "findings": findings,
        "duplicates": exploration.duplicates,
        "notices": exploration.notices,
        "seconds": round(seconds, 1),
    }
    if known:
        for finding, right in zip(findings, on_patch(exploration, run), strict=True):
            finding["on the patch"] = right
        facts["effects"] = effects(run)
    return runs.plain(facts)


def table(cells: dict[str, dict[str, Any]]) -> str:
    """Markdown: per condition, over seeds."""
    lines = [
        "| condition | seed | accuracy | decided by the patch | of these found | others found | wrong | tested |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for condition, seeds in cells.items():
        for seed, one in seeds.items():
            truth = {str(i) for i, effect in enumerate(one.get("effects", [])) if effect >= LEAST}
            right = {finding["class"] for finding in one["findings"] if finding.get("on the patch")}
            wrong = sum(not finding.get("on the patch", False) for finding in one["findings"])
            row = (
                condition, seed, f"{100 * one['validation accuracy']:.1f} %", len(truth), len(truth & right),
                len(right - truth), wrong, one["tested"],
            )  # fmt: skip
            lines.append(f"| {' | '.join(map(str, row))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--conditions", default=",".join(CONDITIONS))
    parser.add_argument("--real", default="", help=f"real sets, of {', '.join(REAL)}")
    parser.add_argument("--data", default=os.environ.get("SIGHTLINE_DATA", "data"), help="folder of the real sets")
    parser.add_argument("--out", type=Path, default=Path("runs/explore"))
    parser.add_argument("--file", type=Path, default=FILE)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    asked = [(name, CONDITIONS[name], "val", name != "plain")
             for name in options.conditions.split(",") if name]  # fmt: skip
    for name in filter(None, options.real.split(",")):
        start, split = REAL[name]
        source = {"data.source": str(Path(options.data) / name)}
        asked.append((name, recipe.load(start, source), split, None))
    for seed in map(int, options.seeds.split(",")):
        for name, wanted, split, known in asked:
            folder = options.out / name / f"seed-{seed}"
            file = folder / "explored.json"
            if not file.is_file():
                measured = cell(trained(wanted, seed, folder), split, folder / "explored", known)
                runs.write(file, json.dumps(measured, indent=1).encode())
                print(name, seed, len(measured["findings"]), "findings", measured["seconds"], "s", flush=True)
    cells: dict[str, dict[str, Any]] = {}
    for name in (*CONDITIONS, *REAL):
        for seed in map(int, options.seeds.split(",")):
            file = options.out / name / f"seed-{seed}" / "explored.json"
            if file.is_file():
                cells.setdefault(name, {})[str(seed)] = json.loads(file.read_text())
    results = {"hardware": hardware(), "versions": runs.surroundings()["versions"], "cells": cells}
    runs.write(options.file, json.dumps(results, indent=1).encode())
    print(table({name: seeds for name, seeds in cells.items() if name in CONDITIONS}))


if __name__ == "__main__":
    main()
