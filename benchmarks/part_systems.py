"""Do the maps of MA-CNN, FCAN and MG-CNN lie on different parts, and is it their own losses that put them there?

Data: `clutter-pair`, whose classes are pairs of digits; the mask of each digit is known. Each system stands beside the
same network without its losses, and all beside a network without attention. Figures, on test images:

- accuracy;
- own part: share of each map on the digit that is its own, mean of both maps. Which map owns which digit is decided
  once per network, on validation images;
- either part: share of the maps on both digits together;
- apart: share of the images in which the two maps have most of their digits' energy on different digits;
- overlap: cosine of the two maps.

The maps of FCAN are the windows of its two glimpses, those of MG-CNN its coarse attention (the coarse class is the
first digit) and its fine attention (which needs both).

    python benchmarks/part_systems.py [--rows "MA-CNN;FCAN"] [--seeds 0,1,2] [--set FIELD=VALUE]

The results are written after every cell, into results/part_systems.json; a second start measures what is missing.
"""

import argparse
import json
import time
import warnings
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from measure import hardware
from torch import Tensor, nn
from torch.nn.functional import normalize

import sightline as sl
from sightline import runs
from sightline.attention.hard import Glimpse
from sightline.data import ImageSet
from sightline.facts import Notice
from sightline.metrics.uncertainty import mean_interval
from sightline.models.fcan import FCAN
from sightline.recipe import Data, Recipe
from sightline.recipe import load as load_recipe
from sightline.training import fit

PARTS = ("first", "second")
_RESNET = {"model.name": "cifar_resnet", "model.options": {"depth": 8, "stem_stride": 2, "high_resolution": 1}}
_FCAN = {"backbone": "cifar_resnet", "backbone_options": {"depth": 8, "stem_stride": 2}}
_MG_CNN = {"backbone": "cifar_resnet", "backbone_options": {"depth": 8}, "parents": [0, 0, 0, 1, 1, 1, 2, 2, 2]}


def ma_cnn(gates: str) -> dict[str, Any]:
    options = _RESNET["model.options"] | {"attention": "ma_cnn", "attention_options": {"gates": gates}}
    return _RESNET | {"model.options": options}


def fcan(reward: str) -> dict[str, Any]:
    return {"model.name": "fcan", "model.options": _FCAN | {"reward": reward}}


def mg_cnn(weight: float) -> dict[str, Any]:
    return {"model.name": "mg_cnn", "model.options": _MG_CNN | {"coarse_weight": weight}}


ROWS: dict[str, dict[str, Any]] = {
    "no attention": _RESNET,
    "MA-CNN": ma_cnn("losses"),
    "MA-CNN, groups alone": ma_cnn("grouping"),
    "MA-CNN, labels alone": ma_cnn("labels"),
    "FCAN": fcan("greedy"),
    "FCAN, reward at the end": fcan("final"),
    "FCAN, no reward": fcan("none"),
    "MG-CNN": mg_cnn(1.0),
    "MG-CNN, no coarse labels": mg_cnn(0.0),
}
COMMON: dict[str, Any] = {"data.source": "clutter-pair", "data.test_size": 1000, "optim.epochs": 10, "optim.lr": 0.006}
FIGURES = ("own part", "either part", "apart", "overlap")
FILE = Path(__file__).parent / "results" / "part_systems.json"
BATCH = 100


def maps_of(model: nn.Module, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b 2 h w"]:
    """The two maps of each image."""
    maps = torch.cat([*sl.attention_maps(model, images).values()], 1)
    return windows(images, maps, model.attention.share) if isinstance(model, FCAN) else maps


def windows(
    images: Float[Tensor, "b 3 H W"], positions: Float[Tensor, "b g h w"], share: float
) -> Float[Tensor, "b g H W"]:
    """1 in the pixels of each glimpse, 0 elsewhere."""
    height, width = images.shape[2:]
    crop = Glimpse(round(share * min(height, width)), hard=True)
    pixels = torch.arange(height * width, dtype=torch.float64).reshape(1, 1, height, width)
    chosen = crop(pixels.expand(positions.shape[0] * positions.shape[1], -1, -1, -1), positions.flatten(0, 1)[:, None])
    seen = torch.zeros(len(chosen), height * width).scatter(1, chosen.flatten(1).long(), 1.0)
    return seen.reshape(*positions.shape[:2], height, width)


def shares(
    maps: Float[Tensor, "b 2 h w"], first: Bool[Tensor, "b 1 H W"], second: Bool[Tensor, "b 1 H W"]
) -> Float[Tensor, "b 2 2"]:
    """Share of each map (second axis) on each part (third axis)."""
    on = [[sl.metrics.energy_in_mask(maps[:, i : i + 1], mask) for mask in (first, second)] for i in range(2)]
    return torch.stack([torch.stack(row, 1) for row in on], 1)


def owners(energy: Float[Tensor, "b 2 2"]) -> tuple[int, ...]:
    """The part of each map, no part twice, for which the maps' mean share on their parts is largest."""
    means = energy.mean(0).tolist()
    return max(permutations(range(2)), key=lambda order: sum(means[i][part] for i, part in enumerate(order)))


def figures(energy: Float[Tensor, "b 2 2"], maps: Float[Tensor, "b 2 h w"], order: tuple[int, ...]) -> dict[str, Any]:
    """Value of each figure for each image."""
    units = normalize(maps.flatten(2), dim=2)
    return {
        "own part": energy[:, range(2), order].mean(1),
        "either part": energy.sum(2).mean(1),
        "apart": (energy[:, 0].argmax(1) != energy[:, 1].argmax(1)).float(),
        "overlap": (units[:, 0] * units[:, 1]).sum(1),
    }


def read_images(recipe: Recipe, split: str) -> dict[str, ImageSet]:
    """The images of a split, with the mask of each part."""
    return {part: sl.data.load(replace(recipe.data, mask=part))[split] for part in PARTS}


def measured(model: nn.Module, sets: dict[str, ImageSet], attends: bool) -> dict[str, Tensor]:
    """Whether each image is classified correctly, the area of its parts and, with attention, energy and maps."""
    found: dict[str, list[Tensor]] = {}
    one = sets["first"]
    for rows in np.array_split(np.arange(len(one)), -(-len(one) // BATCH)):
        batches = [sets[part].batch(rows) for part in PARTS]
        images = sl.data.normalize(batches[0].images, one.preprocess)
        masks = [batch.masks for batch in batches]
        assert masks[0] is not None and masks[1] is not None
        with torch.no_grad():
            values = {"correct": (model(images).argmax(1) == batches[0].labels).float()}
            values["area"] = torch.stack([mask.float().mean((1, 2, 3)) for mask in masks], 1)
            if attends:
                maps = maps_of(model, images)
                values |= {"maps": maps, "energy": shares(maps, masks[0], masks[1])}
        for name, value in values.items():
            found.setdefault(name, []).append(value)
    return {name: torch.cat(parts) for name, parts in found.items()}


def cell(row: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train and measure one network."""
    changes = COMMON | ROWS[row] | {"seeds": [seed]} | dict(pair.split("=", 1) for pair in options.set)
    start = time.perf_counter()
    folder = options.out / row.replace(", ", "-").replace(" ", "-") / f"seed-{seed}"
    run = fit(load_recipe(Recipe(data=Data()), changes), folder, resume=True)
    assert isinstance(run, runs.Run)
    seconds = time.perf_counter() - start
    model, attends = sl.load(folder), row != "no attention"
    test = measured(model, read_images(run.recipe, "test"), attends)
    result: dict[str, Any] = {
        "accuracy": mean_interval(test["correct"].numpy()),
        "chance": float(test["area"].mean()),
        "seconds": round(seconds, 1),
    }
    if attends:
        order = owners(measured(model, read_images(run.recipe, "val"), attends)["energy"])
        values = figures(test["energy"], test["maps"], order)
        result |= {"order": [*order], "energy": test["energy"].mean(0).tolist()}
        result |= {name: mean_interval(value.double().numpy()) for name, value in values.items()}
    return runs.plain(result)


def read() -> dict[str, Any]:
    """What was measured before: row -> seed -> cell."""
    return json.loads(FILE.read_text()) if FILE.is_file() else {"cells": {}}


def table(cells: dict[str, Any]) -> str:
    """Markdown, one line per row: mean and standard deviation over the seeds."""
    head = ("row", "seeds", "accuracy, %", *FIGURES, "one part, by chance")
    lines: list[tuple[str, ...]] = [head, ("---",) * len(head)]
    for row, seeds in cells.items():
        all_of = [*seeds.values()]
        if all_of:
            accuracy = spread([100 * one["accuracy"]["value"] for one in all_of], 1)
            shown = [[one[name]["value"] for one in all_of if name in one] for name in FIGURES]
            columns = [spread(values, 3) if values else "–" for values in shown]
            lines.append((row, str(len(all_of)), accuracy, *columns, f"{mean(one['chance'] for one in all_of):.3f}"))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def spread(values: list[float], digits: int) -> str:
    """Mean, and standard deviation if there are several."""
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=";".join(ROWS), help="rows to measure, separated by semicolons (all)")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--out", type=Path, default=Path("runs/part_systems"), help="folder of the runs")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="further fields of the recipe"
    )
    options = parser.parse_args(arguments)
    if wrong := [row for row in options.rows.split(";") if row not in ROWS]:
        parser.error(f"expected rows of {'; '.join(ROWS)}, got {wrong[0]}")
    warnings.simplefilter("ignore", Notice)
    results = read()
    settings = {"common": COMMON, "rows": ROWS, "set": options.set}
    if results["cells"] and results["settings"] != settings:
        parser.error(f"expected the settings of {FILE.name}, {results['settings']}, got {settings}; move the file away")
    results |= {"settings": settings, "hardware": hardware(), "versions": runs.surroundings()["versions"]}
    for seed in map(int, options.seeds.split(",")):
        for row in options.rows.split(";"):
            seeds = results["cells"].setdefault(row, {})
            if str(seed) not in seeds:
                seeds[str(seed)] = cell(row, seed, options)
                runs.write(FILE, json.dumps(results, indent=1).encode())
                print(f"{row}, seed {seed}: {seeds[str(seed)]['accuracy']['value']:.1%}", flush=True)
    print(table(results["cells"]))


if __name__ == "__main__":
    main()
