"""Time of perturbation metrics against the bare forward passes that they need, and against other libraries.

ResNet-18 at 64 px, 8 images, 32 steps, zero fill. The weights are random, because time does not depend on what the
network has learned. `--rounds 3` is a quick check and `--only WORD` selects rows; results are written only if all rows
ran.
"""

from functools import partial
from importlib.util import find_spec

import numpy as np
import timm
import torch
from measure import Rows, bare, batches_of, keep_freed_memory
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

    np.trapz = np.trapezoid  # removed in numpy 2.4, used by quantus 0.6
    pixels = images.shape[2] * images.shape[3]
    # a step counts single colors and must divide the number of pixels, so there are three times as many steps as ours
    metric = quantus.PixelFlipping(
        features_in_step=pixels // STEPS,
        perturb_baseline="black",
        return_auc_per_sample=True,
        disable_warnings=True,
        display_progressbar=False,
    )
    metric(model=model, x_batch=images.numpy(), y_batch=targets.numpy(), a_batch=maps.numpy(), device="cpu")


def main() -> None:
    rows = Rows(__doc__)
    keep_freed_memory()
    torch.manual_seed(0)
    torch.set_num_threads(2)
    model = timm.create_model("resnet18").eval()
    images, maps = torch.randn(8, 3, 64, 64), torch.rand(8, 1, 64, 64)
    targets = model(images).argmax(1)
    many = torch.randn(64, 3, 64, 64)
    areas = partial(measure, {name: METRICS[name] for name in SEVEN[:2]}, {"": maps})
    seven = partial(measure, {name: METRICS[name] for name in SEVEN}, {"": maps})
    arguments = {"model": model, "images": images, "targets": targets}

    deletion = partial(sl.metrics.deletion_auc, model, images, targets, maps, steps=STEPS)
    deletion_forwards = partial(bare, model, many, batches_of(model, deletion))
    rows.ratio("deletion AUC / its bare forwards", deletion, deletion_forwards, 1.05)
    area_forwards = partial(bare, model, many, batches_of(model, partial(areas, **arguments)))
    what = "seven metrics together / bare forwards of deletion and insertion"
    rows.ratio(what, partial(seven, **arguments), area_forwards, 1.10)
    road = partial(sl.metrics.road, model, images, targets, maps)
    road_forwards = partial(bare, model, many, batches_of(model, road))
    rows.ratio("ROAD / its bare forwards", road, road_forwards, None)
    rows.memory("seven metrics, peak memory / that of the bare forwards", partial(seven, **arguments), area_forwards)
    if find_spec("quantus") is not None:
        library = partial(quantus_library, model, images, targets, maps)
        rows.ratio(
            "quantus, PixelFlipping in 96 steps / the bare forwards of deletion in 32", library, deletion_forwards, None
        )
        library_forwards = partial(bare, model, many, batches_of(model, library))
        rows.ratio("quantus, PixelFlipping in 96 steps / its bare forwards", library, library_forwards, None)
    rows.save("metrics", "resnet18, 64 px, 8 images, 32 steps, cpu, 2 threads")


if __name__ == "__main__":
    main()
