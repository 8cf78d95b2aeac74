"""Metrics that hide parts of images beside the bare forwards that they cannot do without, and beside other libraries.

ResNet-18 at 64 px, 8 images, 32 steps, zero fill. The weights are random: the time of a score does not depend on what
the net has learned. `--rounds 3` is a quick look; `--only WORD` picks rows; the results are written when all rows ran.
"""

import argparse
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import numpy as np
import timm
import torch
from measure import bare, batches_of, keep_freed_memory, pairs, peak, report, save
from torch import Tensor, nn

import sightline as sl
from sightline.metrics import METRICS, measure

SEVEN = (
    "deletion_auc",
    "insertion_auc",
    "deletion_correlation",
    "insertion_correlation",
    "average_drop",
    "increase_in_confidence",
    "add",
)
STEPS = 32


def quantus_library(model: nn.Module, images: Tensor, targets: Tensor, maps: Tensor) -> None:
    import quantus

    np.trapz = np.trapezoid  # gone in numpy 2.4, called by quantus 0.6
    pixels = images.shape[2] * images.shape[3]
    metric = quantus.PixelFlipping(
        features_in_step=pixels // STEPS,
        perturb_baseline="black",
        return_auc_per_sample=True,
        disable_warnings=True,
        display_progressbar=False,
    )
    metric(model=model, x_batch=images.numpy(), y_batch=targets.numpy(), a_batch=maps.numpy(), device="cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=21, metavar="N", help="interleaved rounds of a row (21)")
    parser.add_argument("--only", default="", metavar="WORD", help="rows whose name holds the word; writes nothing")
    arguments = parser.parse_args()
    keep_freed_memory()
    torch.manual_seed(0)
    torch.set_num_threads(2)
    model = timm.create_model("resnet18").eval()
    images, maps = torch.randn(8, 3, 64, 64), torch.rand(8, 1, 64, 64)
    targets = model(images).argmax(1)
    many = torch.randn(64, 3, 64, 64)
    rows: list[dict[str, object]] = []
    curves = partial(measure, {name: METRICS[name] for name in SEVEN[:2]}, {"": maps})
    together = partial(measure, {name: METRICS[name] for name in SEVEN}, {"": maps})
    given = {"model": model, "images": images, "targets": targets}

    def row(what: str, ours: Callable[[], object], reference: Callable[[], object], bar: float | None, n: int) -> None:
        if arguments.only not in what:
            return
        ratio = pairs(ours, reference, n)
        report(what, ratio, bar)
        rows.append({"what": what, "rounds": n, **ratio._asdict(), "bar": bar})

    n = arguments.rounds
    deletion = partial(sl.metrics.deletion_auc, model, images, targets, maps, steps=STEPS)
    of_deletion = partial(bare, model, many, batches_of(model, deletion))
    row("deletion AUC / its bare forwards", deletion, of_deletion, 1.05, n)
    both = partial(bare, model, many, batches_of(model, partial(curves, **given)))
    row("seven metrics together / bare forwards of deletion and insertion", partial(together, **given), both, 1.10, n)
    four = partial(bare, model, many, batches_of(model, partial(sl.metrics.road, model, images, targets, maps)))
    row("ROAD / its bare forwards", partial(sl.metrics.road, model, images, targets, maps), four, None, n)
    if not arguments.only:
        memory = peak(partial(together, **given)) / peak(both)
        rows.append({"what": "seven metrics, peak memory / that of the bare forwards", "median": memory, "bar": None})
        print(f"{rows[-1]['what']:62} {memory:.3f}", flush=True)
    if find_spec("quantus") is not None:
        library = partial(quantus_library, model, images, targets, maps)
        row("quantus, PixelFlipping / the bare forwards of deletion", library, of_deletion, None, n)
    if not arguments.only:
        print(save("metrics", [{"where": "resnet18, 64 px, 8 images, 32 steps, cpu, 2 threads"}, *rows]))


if __name__ == "__main__":
    main()
