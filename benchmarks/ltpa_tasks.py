"""Is a network with learned attention good for more? Features on other images, objects by its map, small changes.

The tasks of "Learn To Pay Attention" on data at hand, for two trunks (VGG and pre-activation ResNet): the attended
network beside the same trunk without attention and beside the same network with uniform weights, three seeds each.

    python benchmarks/ltpa_tasks.py DATA [--sets cifar10,wbc_masks] [--seeds 0,1,2]
    python benchmarks/ltpa_tasks.py DATA --sets ""      only the tables of what is in the results

DATA is the folder of the sets. Trained networks and measured tasks are kept in OUT/SET, with a page bench.html for each
set; a second start continues. The figures are written into results/ltpa_tasks.json after each set.
"""

import argparse
import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from measure import hardware

from sightline import recipe, runs
from sightline.bench import Bench, Study, bench

START: dict[str, Any] = {
    "model.name": "vgg15",
    "optim.epochs": 10,
    "optim.batch_size": 64,
    "optim.lr": 0.003,
    "augment.crop": 4,
    "augment.flip": True,
}
SETS: dict[str, dict[str, Any]] = {
    "cifar10": {"data.train_size": 5000, "optim.epochs": 8},
    "tiny_imagenet50": {"data.size": 64},
    "wbc_masks": {"data.size": 64, "optim.epochs": 30, "optim.class_weights": True, "augment.rotate": True},
    "glas_tiles": {"data.size": 96, "data.group": "patient", "data.resplit": True, "augment.rotate": True},
}
STEM = {"cifar10": 2, "tiny_imagenet50": 4, "wbc_masks": 4, "glas_tiles": 4}
"""First pool or stride: with it the attended maps of a set have 4 to 12 pixels a side at the last level."""
SOME = {"train_size": 1500, "test_size": 800}
OTHERS: dict[str, dict[str, Any]] = {
    "cifar10": SOME,
    "cifar100": SOME,
    "tiny_imagenet50": SOME,
    "wbc_masks": {},
    "glas_tiles": {"group": "patient", "resplit": True},
}
TRANSFERS = {"cifar10": [*OTHERS][1:], "tiny_imagenet50": ["cifar10", "cifar100"]}
"""Sets whose networks are tested on other sets, and on which."""
LEFT_OUT = (
    "fooled, 2/255",
    "fooled by noise, 1/255",
    "fooled by noise, 2/255",
    "random_map",
    "edge_map",
    "contrast_map",
)
"""Figures that the tables of the page do not show."""
FILE = Path(__file__).parent / "results" / "ltpa_tasks.json"


def rows(name: str, vgg: dict[str, Any], residual: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Name -> changes to the recipe; the first row is the control, that of the residual networks RN."""
    vgg = {"stem_pool": STEM[name], "dropout": 0.0, **vgg}
    residual = {"stem_stride": STEM[name], **residual}
    uniform = {"compat": "none", "norm": "uniform"}
    return {
        "VGG": {"model.options": vgg},
        "VGG-att2": {"model.name": "vgg_att2", "model.options": vgg},
        "VGG-att2, uniform": {"model.name": "vgg_att2", "model.options": vgg | uniform},
        "VGG-GAP": {"model.name": "vgg_gap", "model.options": vgg},
        "RN": {"model.name": "rn164", "model.options": residual},
        "RN-att2": {"model.name": "rn_att2", "model.options": residual, "control": "RN"},
        "RN-att2, uniform": {"model.name": "rn_att2", "model.options": residual | uniform, "control": "RN"},
    }


def tasks(name: str, data: Path) -> dict[str, dict[str, Any]]:
    """Title -> task and options."""
    masked = name if name in ("wbc_masks", "glas_tiles") else "tiny_imagenet50"
    asked: dict[str, dict[str, Any]] = {"robustness": {"epsilons": [1, 2, 4, 8]}}
    where = {} if masked == name else {"data": str(data / masked)}
    asked[f"objects of {masked}"] = {"task": "segmentation", "limit": 300, **where}
    for other in TRANSFERS.get(name, []):
        asked[f"features on {other}"] = {"task": "cross_domain", "data": str(data / other), "fields": OTHERS[other]}
    return asked


def facts(result: Bench) -> list[dict[str, Any]]:
    """What the file keeps of a set: accuracy and figures of each run."""
    return [
        {
            "row": run.row,
            "seed": run.seed,
            "accuracy": run.accuracy,
            "parameters": run.parameters,
            "tasks": {title: task.figures for title, task in run.tasks.items()},
        }
        for run in result.measured
    ]


def tables(kept: dict[str, Any]) -> str:
    """The tables of docs/results/ltpa-tasks.md: for each set the networks, mean and deviation over the seeds."""
    lines: list[str] = []
    for name, of_set in kept["sets"].items():
        first = of_set["runs"][0]["tasks"]
        figures = [(title, figure) for title, of_task in first.items() for figure in of_task if figure not in LEFT_OUT]
        heads = ["network", "seeds", "accuracy", *(f"{title}: {figure}" for title, figure in figures)]
        lines += ["", f"{name}:", "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        for row in dict.fromkeys(run["row"] for run in of_set["runs"]):
            runs_of = [run for run in of_set["runs"] if run["row"] == row]
            values = [[run["accuracy"] for run in runs_of]]
            values += [[run["tasks"][title][figure] for run in runs_of] for title, figure in figures]
            cells = [f"{mean(one):.3f} ± {stdev(one) if len(one) > 1 else 0:.3f}" for one in values]
            lines.append(f"| {' | '.join([row, str(len(runs_of)), *cells])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--sets", default=",".join(SETS), help="data sets to train on (all)")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--vgg-width", type=float, default=0.125, help="width of the VGG networks (0.125)")
    parser.add_argument("--depth", type=int, default=20, help="depth of the residual networks (20)")
    parser.add_argument("--width", type=float, default=0.25, help="their width (0.25)")
    parser.add_argument("--jobs", type=int, default=1, help="networks to train at a time (1)")
    parser.add_argument("--out", type=Path, default=Path("runs/ltpa_tasks"), help="folder of the runs")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="further fields of the recipe"
    )
    parser.add_argument("--rows", metavar="A;B", help="networks to train (all)")
    options = parser.parse_args()
    kept: dict[str, Any] = json.loads(FILE.read_text()) if FILE.is_file() else {"sets": {}}
    for name in filter(None, options.sets.split(",")):
        changes = {"data.source": str(options.data / name), "seeds": options.seeds, **START, **SETS[name]}
        changes |= dict(pair.split("=", 1) for pair in options.set)
        study = Study(
            recipe=recipe.load(recipe.Recipe(), changes),
            rows=rows(name, {"width": options.vgg_width}, {"depth": options.depth, "width": options.width}),
            tasks=tasks(name, options.data),
        )
        chosen = options.rows.split(";") if options.rows else None
        result = bench(
            study, options.out / name, chosen, jobs=options.jobs, progress=lambda what, *_: print(what, flush=True)
        )
        kept["sets"][name] = {"runs": facts(result), "failed": {str(run): why for run, why in result.failed.items()}}
        kept |= {"hardware": hardware(), "versions": runs.surroundings()["versions"]}
        runs.write(FILE, json.dumps(runs.plain(kept), indent=1).encode())
        print("\n".join(result.sentences()))
    print(tables(kept))


if __name__ == "__main__":
    main()
