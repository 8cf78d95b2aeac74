"""All maps side by side, for a few images of a run's test split and every method that fits the network.

The images are drawn at random from those that the network classifies correctly, and the maps explain the predicted
class. Each map is colored from its lowest to its highest value, except for a few extreme pixels (see
`sightline.maps.overlay`). If negative values speak against the class, blue is below 0, white is 0 and red is above. The
terminal shows why a method does not fit the network, and how similar each method's maps are to those of the others.

    python examples/page_of_maps.py runs/glas --data $SIGHTLINE_DATA/glas_tiles --out maps
"""

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import sightline as sl
from sightline import data, maps, runs
from sightline.explainers import EXPLAINERS
from sightline.inference import forward

COLUMNS = 11  # maps in a row beside the images; the others go below
CELL = 96


def drawn(model: torch.nn.Module, images: data.ImageSet, count: int, seed: int) -> np.ndarray:
    """Indices of images that the model classifies correctly, in random order."""
    order = np.random.default_rng(seed).permutation(len(images))
    chosen: list[int] = []
    for start in range(0, len(order), 100):
        batch = images.batch(order[start : start + 100])
        right = forward(model, data.normalize(batch.images, images.preprocess)).argmax(1) == batch.labels
        chosen += batch.indices[right].tolist()
        if len(chosen) >= count:
            break
    return np.array(chosen[:count])


def page_of(pictures: Tensor, raw: Mapping[str, Tensor]) -> Tensor:
    """The images beside their maps."""
    signed = [name for name in raw if EXPLAINERS[name].is_signed]
    return maps.side_by_side(pictures, raw, 0.75, signed=signed, per_row=COLUMNS)


def correlations(raw: Mapping[str, Tensor], size: tuple[int, ...]) -> Tensor:
    """Correlation of the positive parts of the maps of each two methods, mean over the images; (methods, methods)."""
    resized = [maps.resize(values, size)[:, 0].double().relu().flatten(1) for values in raw.values()]
    return torch.stack([torch.corrcoef(each) for each in torch.stack(resized, 1)]).nanmean(0)


def main(arguments: list[str] | None = None) -> dict[str, list[str]]:
    """Draw the pages; return the methods on them and the names of the images."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run folder")
    parser.add_argument("--data", help="where the run's data is now (the run's own)")
    parser.add_argument("--images", type=int, default=5, help="images on the page (5)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw (0)")
    parser.add_argument("--out", default="maps", help="folder to write; page.png in it has all images (maps)")
    options = parser.parse_args(arguments)

    run, out = runs.open_run(options.run), Path(options.out)
    source = replace(run.recipe.data, source=options.data or run.recipe.data.source)
    images = replace(data.load(source)["test"], preprocess=run.preprocess)
    batch = images.batch(drawn(sl.load(options.run), images, options.images, options.seed))
    pages = sl.report.pages(options.run, batch.images, out, ["all"])
    for name, reason in pages.left_out.items():
        print(f"left out: {name}: {reason}")
    methods = list(pages.verdicts)
    answers = pages.rows[:: len(methods)]  # one row per image and method
    for name, row in zip(batch.names, answers, strict=True):
        print(f"{name}: {row['prediction']}, {float(row['prediction_probability']):.0%}")

    files = [np.load(out / f"{row['maps']}.npz") for row in answers]
    raw = {name: torch.stack([torch.from_numpy(file[name]) for file in files])[:, None] for name in methods}
    table = correlations(raw, run.preprocess.size)
    controls = [name for name in ("center_map", "edge_map") if name in methods]
    for name, row in zip(methods, table, strict=True):
        order = [place for place in row.argsort(descending=True).tolist() if methods[place] != name]
        shown = [methods[place] for place in (order[0], order[-1])] + controls
        print(f"{name:28}" + ", ".join(f"{other} {float(row[methods.index(other)]):.2f}" for other in shown))

    pictures = maps.resize(batch.images.float(), (CELL, CELL)).round().to(torch.uint8)
    page = page_of(pictures, raw)
    Image.fromarray(page.movedim(0, -1).numpy()).quantize(256, kmeans=3).save(out / "page.png", optimize=True)
    print(f"{len(methods)} methods: {out / 'page.png'}")
    return {"methods": methods, "images": batch.names}


if __name__ == "__main__":
    main()
