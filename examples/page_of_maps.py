"""All maps side by side, for a few images of a run's test split and every method that fits the network.

The images are drawn at random from those that the network classifies correctly, and the maps explain the predicted
class. Each map is colored from its lowest to its highest value, except for a few extreme pixels (see
`sightline.maps.overlay`). If negative values speak against the class, blue is below 0, white is 0 and red is above. The
terminal shows why a method does not fit the network, and how similar each method's maps are to those of the others.

    python examples/page_of_maps.py runs/glas --data $SIGHTLINE_DATA/glas_tiles --out page.png
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import sightline as sl
from sightline import data, maps, runs
from sightline.explainers import EXPLAINERS, Explanation, fitting
from sightline.inference import forward

COLUMNS = 11  # maps in a row beside the images; the others go below
CELL = 96


def drawn(model: torch.nn.Module, images: data.ImageSet, count: int, seed: int) -> np.ndarray:
    """Indices of images that the model classifies correctly, in random order."""
    order = np.random.default_rng(seed).permutation(len(images))
    found: list[int] = []
    for start in range(0, len(order), 100):
        batch = images.batch(order[start : start + 100])
        right = forward(model, data.normalize(batch.images, images.preprocess)).argmax(1) == batch.labels
        found += batch.indices[right].tolist()
        if len(found) >= count:
            break
    return np.array(found[:count])


def page_of(pictures: Tensor, found: Explanation) -> Tensor:
    """The images beside their maps."""
    signed = [name for name in found.maps if EXPLAINERS[name].is_signed]
    return maps.side_by_side(pictures, found.maps, 0.75, signed=signed, per_row=COLUMNS)


def correlations(found: Explanation, methods: list[str], size: tuple[int, ...]) -> Tensor:
    """Correlation between the positive parts of every two methods' maps, mean over images; (methods, methods)."""
    resized = found.resized(size)
    values = torch.stack([resized[name][:, 0].cpu().double().relu().flatten(1) for name in methods], 1)
    return torch.stack([torch.corrcoef(each) for each in values]).nanmean(0)


def main(arguments: list[str] | None = None) -> dict[str, list[str]]:
    """Draw the page; return the methods on it and the names of the images."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run folder")
    parser.add_argument("--data", help="where the run's data is now (the run's own source)")
    parser.add_argument("--images", type=int, default=5, help="images on the page (5)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw (0)")
    parser.add_argument("--out", default="page.png", help="PNG file to write (page.png)")
    options = parser.parse_args(arguments)

    run = runs.open_run(options.run)
    source = replace(run.recipe.data, source=options.data or run.recipe.data.source)
    images = replace(data.load(source)["test"], preprocess=run.preprocess)
    model = sl.load(options.run)
    batch = images.batch(drawn(model, images, options.images, options.seed))
    inputs = data.normalize(batch.images, run.preprocess)
    methods, reasons = fitting(model, inputs)
    for name, reason in reasons.items():
        print(f"left out: {name}: {reason}")
    found = sl.explain(model, inputs, methods=methods)
    for name, shares in zip(batch.names, found.logits.softmax(1), strict=True):
        print(f"{name}: {run.classes[int(shares.argmax())]}, {float(shares.max()):.0%}")

    table = correlations(found, methods, tuple(inputs.shape[2:]))
    controls = [name for name in ("center_map", "edge_map") if name in methods]
    for name, row in zip(methods, table, strict=True):
        order = [place for place in row.argsort(descending=True).tolist() if methods[place] != name]
        shown = [methods[place] for place in (order[0], order[-1])] + controls
        print(f"{name:28}" + ", ".join(f"{other} {float(row[methods.index(other)]):.2f}" for other in shown))

    pictures = maps.resize(batch.images.float(), (CELL, CELL)).round().to(torch.uint8)
    page = page_of(pictures, found)
    Image.fromarray(page.movedim(0, -1).numpy()).quantize(256, kmeans=3).save(options.out, optimize=True)
    print(f"{len(methods)} methods: {Path(options.out)}")
    return {"methods": methods, "images": batch.names}


if __name__ == "__main__":
    main()
