"""Re-identification: rank-1 and mAP with intervals over identities, and whether the maps of part networks find parts.

Reads the runs of a study, which trains what is missing:

    sightline bench recipes/bench_reid.yaml --out runs/reid
    python benchmarks/reid.py recipes/bench_reid.yaml runs/reid

Figures of ranked lists are means over the seeds of each query's value; intervals resample identities. Parts are those
of `clutter-person`: the share of each of a network's maps (times the norm of the features) in head, torso, legs and
bag, divided by the share of the image that the part covers, so that 1 is chance. Controls are the same maps on the
parts of another image, which a map that ignores its image would hit as well, and the same network before training.

The results are written into results/NAME.json; a second start measures what is missing.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import RESULTS, hardware
from torch import Tensor, nn

from sightline import bench, data, runs
from sightline.data import people
from sightline.metrics import energy_in_mask
from sightline.metrics.uncertainty import mean_interval
from sightline.report.parts import attention_and_parts
from sightline.runs import Run
from sightline.tasks import perform

FIGURES = ("rank-1", "rank-5", "mAP", "mAP (trapezoid)")
BATCH = 100


def cell(run: Run, options: dict[str, Any]) -> dict[str, Any]:
    """What one network reaches: values of the queries, and the energy of its maps on the parts."""
    model = runs.load_model(run.folder)
    outcome = perform("retrieval", run, model, **options)
    first = outcome.figures["rank-1"]
    assert first.groups is not None
    measured: dict[str, Any] = {
        "values": {name: outcome.figures[name].values.round(6).tolist() for name in FIGURES},
        "identities": first.groups.tolist(),
        "chance": {name: outcome.figures[name].chance for name in FIGURES},
        "seconds": sum(epoch["seconds"] for epoch in run.history),
    }
    if run.recipe.data.source == people.NAME:
        measured["parts"] = {
            "trained": energies(model, run),
            "parts of another image": energies(model, run, shift=1),
            "untrained": energies(bench.fresh(run).eval(), run),
        }
    return runs.plain(measured)


def energies(model: nn.Module, run: Run, shift: int = 0) -> list[list[float]]:
    """Map x part: share of the map in the part divided by the part's area, over the images of the gallery."""
    images, parts = people.compose_people(
        run.recipe.data.seed,
        "gallery",
        range(people.IDENTITIES["gallery"] * people.IMAGES["gallery"]),
        run.preprocess.size,
    )
    shares: list[Tensor] = []
    for start in range(0, len(images), BATCH):
        inputs = data.normalize(torch.from_numpy(images[start : start + BATCH]), run.preprocess)
        blocks = attention_and_parts(model, inputs)[1]
        if not blocks:
            return []
        (block,) = blocks.values()
        masks = torch.from_numpy(np.roll(parts, shift, axis=0)[start : start + BATCH])
        maps = block.maps * block.norms
        rows = [
            torch.stack([energy_in_mask(maps[:, [k]], masks[:, [part]]) for part in range(len(people.PARTS))], 1)
            for k in range(maps.shape[1])
        ]
        shares.append(torch.stack(rows, 1))
    mean = torch.cat(shares).double().nanmean(0)
    return (mean / torch.from_numpy(parts).double().mean((0, 2, 3))).tolist()


def ranked_table(cells: dict[str, dict[str, Any]], study: bench.Study) -> Iterator[str]:
    """Markdown, a line per row of the study, each beside its control."""
    yield f"| row | seeds | {' | '.join(FIGURES)} | rank-1 to its control |"
    yield f"|{'---|' * (len(FIGURES) + 3)}"
    for row, seeds in cells.items():
        groups = np.array(next(iter(seeds.values()))["identities"])
        shown = [span(mean_interval(over_seeds(seeds, name), groups)) for name in FIGURES]
        control = study.named("control").get(row, study.control)
        others = cells.get(control, {}) if row != control else {}
        gaps = [values(seeds[seed], "rank-1") - values(others[seed], "rank-1") for seed in seeds if seed in others]
        gap = f"{span(mean_interval(np.mean(gaps, 0), groups), '+')} ({control})" if gaps else "-"
        yield f"| {row} | {len(seeds)} | {' | '.join(shown)} | {gap} |"
    chance = next(iter(next(iter(cells.values())).values()))["chance"]
    yield f"| chance | - | {' | '.join(f'{chance[name]:.3f}' for name in FIGURES)} | - |"


def values(one: dict[str, Any], name: str) -> np.ndarray:
    """Of every query; NaN without a match."""
    return np.array(one["values"][name], dtype=float)


def over_seeds(seeds: dict[str, Any], name: str) -> np.ndarray:
    """Mean over the seeds of each query's value."""
    return np.mean([values(one, name) for one in seeds.values()], 0)


def span(interval: Any, sign: str = "") -> str:
    return f"{interval.value:{sign}.3f} [{interval.low:{sign}.3f}, {interval.high:{sign}.3f}]"


def parts_table(cells: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Markdown, a line per row, map and control: mean over the seeds and their deviation, 1 = chance."""
    yield f"| row | map | of | {' | '.join(people.PARTS)} |"
    yield f"|{'---|' * (len(people.PARTS) + 3)}"
    for row, seeds in cells.items():
        kinds: dict[str, Any] = next(iter(seeds.values())).get("parts", {})
        for kind in kinds:
            found = np.array([one["parts"][kind] for one in seeds.values()], dtype=float)
            for k in range(found.shape[1]):
                mean, deviation = found[:, k].mean(0), found[:, k].std(0, ddof=1) if len(found) > 1 else None
                texts = [
                    f"{m:.2f}" + ("" if deviation is None else f" ± {deviation[i]:.2f}") for i, m in enumerate(mean)
                ]
                yield f"| {row} | {k + 1} | {kind} | {' | '.join(texts)} |"


def measure(study: bench.Study, out: Path, file: Path, tell: Callable[[str], object] = print) -> dict[str, Any]:
    """Row -> seed -> cell, of all runs that are there; kept in the file after each."""
    kept = json.loads(file.read_text()) if file.is_file() else {"cells": {}}
    options = {name: value for name, value in study.tasks["retrieval"].items() if name != "task"}
    for row in study.rows:
        for seed in study.recipe.seeds:
            folder = bench.folder(out, row, seed)
            if str(seed) in kept["cells"].get(row, {}) or not (folder / "model.safetensors").is_file():
                continue
            kept["cells"].setdefault(row, {})[str(seed)] = cell(runs.open_run(folder), options)
            tell(f"measured: {row}, seed {seed}")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(kept | {"hardware": hardware()}) + "\n")
    return kept["cells"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("runs", type=Path, help="folder that `sightline bench` wrote")
    options = parser.parse_args()
    study = bench.load_study(options.study)
    cells = measure(study, options.runs, RESULTS / f"{options.study.stem.removeprefix('bench_')}.json")
    if not cells:
        raise SystemExit(f"no finished run of {options.study} in {options.runs}; start sightline bench first")
    print(*ranked_table(cells, study), "", sep="\n")
    if any("parts" in one for seeds in cells.values() for one in seeds.values()):
        print(*parts_table(cells), sep="\n")


if __name__ == "__main__":
    main()
