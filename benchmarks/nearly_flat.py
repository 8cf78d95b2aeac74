"""How much do maps vary, and how much of that is rounding? The reason for the thresholds of `flat` and `nearly flat`.

Each map is made twice, the second time with every pixel moved by one unit in its last place. `noise` is the largest
change of a map divided by its largest absolute value, the unit of `sightline.maps.variation`.

    python benchmarks/nearly_flat.py RUN [RUN ...]
"""

import sys
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import timm
import torch
from measure import save

from sightline import data, explainers, runs
from sightline.explainers import explain, fitting
from sightline.maps import NEARLY_FLAT, ROUNDING, variation

IMAGES = 4
FRESH = ("test_resnet", "test_vit", "mobilenetv3_small_050")
LARGE = 3_000_000  # parameters; bfloat16 takes minutes on a CPU
SLOW = ("rise", "occlusion", "score_cam", "ablation_cam")
Methods = dict[str, str | partial[torch.Tensor]]


def networks(folders: list[str]):
    """Name, model and images of each trained run, then of untrained networks."""
    for folder in folders:
        run = runs.open_run(folder)
        batch = next(data.batches(data.load(run.recipe.data)["test"], IMAGES))
        yield Path(folder).name, runs.load_model(folder), data.normalize(batch.images, run.preprocess)
    for name in FRESH:
        torch.manual_seed(0)
        yield f"{name}, fresh weights", timm.create_model(name, num_classes=10).eval(), torch.randn(IMAGES, 3, 64, 64)


def methods_of(model: torch.nn.Module, images: torch.Tensor) -> Methods:
    """The methods that fit the model, without controls, and with cheaper options for RISE and occlusion."""
    names = [name for name, method in explainers.EXPLAINERS.items() if not method.is_control]
    fit, _ = fitting(model, images, [name for name in names if name not in SLOW])
    patch = max(images.shape[-1] // 5, 1)
    cheaper: Methods = {
        "rise": partial(explainers.rise, masks=200),
        "occlusion": partial(explainers.occlusion, patch=patch, stride=patch),
    }
    return {name: name for name in fit} | cheaper


def main() -> None:
    rows = []
    for name, model, images in networks(sys.argv[1:]):
        methods = methods_of(model, images)
        is_large = sum(parameter.numel() for parameter in model.parameters()) > LARGE
        for dtype in (torch.float32,) if is_large else (torch.float32, torch.bfloat16):
            model, inputs = model.to(dtype), images.to(dtype)
            steps = torch.where(torch.rand_like(images) < 0.5, -1.0, 1.0) * torch.finfo(dtype).eps
            moved = (inputs.double() * (1 + steps)).to(dtype)
            maps = {}
            for method, how in methods.items():
                torch.manual_seed(0)
                try:
                    first, second = (next(iter(explain(model, x, 0, [how]).maps.values())) for x in (inputs, moved))
                except (RuntimeError, ValueError):
                    continue  # the method does not support this dtype
                maps[method] = first[:, 0], second[:, 0]
            varies = {m: variation(a[:, None])[:, 0].numpy() for m, (a, _) in maps.items()}
            noise = {
                m: ((b - a).flatten(1).abs().amax(1) / a.flatten(1).abs().amax(1)).nan_to_num().numpy()
                for m, (a, b) in maps.items()
            }
            v, n = np.concatenate([*varies.values()]), np.concatenate([*noise.values()])
            flat, nearly = v <= ROUNDING, (v > ROUNDING) & (v < NEARLY_FLAT)
            flagged = Counter({m: int((x < NEARLY_FLAT).sum()) for m, x in varies.items()})
            missed = {m: int(((varies[m] >= NEARLY_FLAT) & (varies[m] < 2 * noise[m])).sum()) for m in varies}
            row = {
                "network": name,
                "dtype": str(dtype).removeprefix("torch."),
                "maps": len(v),
                "flat": int(flat.sum()),
                "nearly flat": int(nearly.sum()),
                "flagged by method": {m: count for m, count in flagged.items() if count},
                "least variation of the others": float(v[v >= NEARLY_FLAT].min(initial=np.inf)),
                "noise, median": float(np.median(n)),
                "noise, 99 %": float(np.quantile(n, 0.99)),
                "noise of flagged maps, largest": float(n[v < NEARLY_FLAT].max(initial=0.0)),
                "not flagged though mostly noise": {m: count for m, count in missed.items() if count},
            }
            print(row, flush=True)
            rows.append(row)
            save("nearly_flat", rows)


if __name__ == "__main__":
    main()
