"""Does the automatic layer of known networks show where something is? Change a patch of the image and look for it.

Each network of families.py gets one random image and eight copies of it, in which one patch differs: at the corners and
at the middle of the sides. The layer's output, as sightline reads it, must change where the patch is. Every row is
written immediately; `--resume` continues, and `--only WORD` judges some networks again.
"""

import argparse
import itertools
import json
import math
import time
import warnings
from collections import Counter
from typing import Any

import torch
from families import Network, timm_networks, torchvision_networks, transformers_networks
from measure import RESULTS, save
from torch import Tensor, nn

from sightline.explainers.evidence import gather

PATCHES = [*itertools.product((1 / 6, 3 / 6, 5 / 6), repeat=2)]
LEAST = 0.5  # correlation of changes with places: 1 is exact, 0 is chance, and a mirrored map is below 0
ALIKE = 0.1  # least contrast at which a network can be judged: below it every patch changes all cells alike
EARLY = 0.5  # fraction of the weight layers that must come before the layer


def planted(size: tuple[int, ...], places: list[tuple[float, float]], seed: int) -> Tensor:
    """An image and, for each place (row, column from 0 to 1), a copy with another patch there, in every frame."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(size, generator=generator)
    images = image.repeat(1 + len(places), *[1] * len(size))
    for one, place in zip(images[1:], places, strict=True):
        area: list[slice] = []
        for side, center in zip(size[-2:], place, strict=True):
            first = round(center * side - side / 6)
            area.append(slice(max(first, 0), first + math.ceil(side / 3)))
        patch = one[..., *area]
        patch.copy_(3 * torch.randn(patch.shape, generator=generator))
    return images


def calibrate(model: nn.Module, size: tuple[int, ...]) -> None:
    """Give batch normalizations the statistics of noise, and learned attention biases a preference for their own place.

    With the statistics of a new network signals may vanish, and without such biases all positions of LeViT are alike.
    """
    for name, parameter in model.named_parameters():
        if name.endswith("attention_biases"):
            parameter.data[:, 0] += 10
    model.train().eval()  # clears the biases that LeViT caches
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    if norms:
        with torch.no_grad():
            model(torch.randn(2 if len(size) > 3 else 8, *size, generator=torch.Generator().manual_seed(1)))
    model.eval()


def change(activations: Tensor) -> Tensor:
    """Change of each cell with each patch, (patches, h, w), divided by the mean; summed over the frames of a video."""
    changed = (activations[1:] - activations[:1]).double().square().sum(1)
    changed = changed.flatten(1, -3).sum(1).sqrt() if changed.ndim > 3 else changed.sqrt()
    return changed / changed.mean((1, 2), keepdim=True).clamp_min(1e-300)


def correlation(changed: Tensor, places: list[tuple[float, float]]) -> float:
    """Correlation of the changes with the places of the patches.

    The mean of each cell and of each patch is subtracted first, so cells that always change more than others, and
    patches that change all cells, have no influence.
    """
    y, x = ((torch.arange(side).double() + 0.5) / side for side in changed.shape[1:])
    expected = [torch.exp(-((y[:, None] - row) ** 2 + (x - column) ** 2) / (2 * 0.2**2)) for row, column in places]
    both: list[Tensor] = []
    for values in (changed.flatten(1), torch.stack(expected).flatten(1)):
        both.append(values - values.mean(0) - values.mean(1, keepdim=True) + values.mean())
    return float((both[0] * both[1]).sum() / (both[0].norm() * both[1].norm()).clamp_min(1e-300))


def contrast(changed: Tensor) -> float:
    """Fraction of the changes that depends on both the cell and the patch; near 0 all cells change alike."""
    values = changed.flatten(1)
    both = values - values.mean(0) - values.mean(1, keepdim=True) + values.mean()
    return float(both.norm() / values.norm().clamp_min(1e-300))


def share_before(model: nn.Module, images: Tensor, layer: str) -> float:
    """Fraction of the convolutions and linear layers that run before the layer; 1 for a layer that is not a module."""
    done = total = before = 0

    def count(module: nn.Module, inputs: Any, output: Any) -> None:
        nonlocal done
        done += 1

    def arrive(module: nn.Module, inputs: Any, output: Any) -> None:
        nonlocal before
        before = done

    modules = dict(model.named_modules())
    if layer not in modules:
        return 1.0
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    handles = [module.register_forward_hook(count) for module in modules.values() if isinstance(module, kinds)]
    handles.append(modules[layer].register_forward_hook(arrive))
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    total = done
    return before / max(total, 1)


def judge(network: Network) -> dict[str, Any]:
    """The layer read from a network, and whether it is right: as it is, then with calibrated norms, then on average."""
    torch.manual_seed(0)
    model = network.make(5).eval()
    places = PATCHES[:4] + PATCHES[5:] if len(network.size) == 3 else [PATCHES[i] for i in (0, 2, 6, 7)]
    changes: list[Tensor] = []
    row: dict[str, Any] = {}
    for attempt in range(6):
        if attempt == 1:
            calibrate(model, network.size)
            changes.clear()
        images = planted(network.size, places, attempt)
        try:
            gathered = gather(model, images, [(None, frozenset({"activations"}))], 0)
            (evidence,) = next(gathered.blocks())
        except (ValueError, RuntimeError) as error:
            status = "refused" if isinstance(error, ValueError) else "crashed"
            return {"layer": "", "status": status, "reason": str(error)}
        assert evidence is not None
        activations = evidence.activations
        assert activations is not None
        changes.append(change(activations.detach()))
        mean = torch.stack(changes).mean(0)
        match = correlation(mean, places)
        before = share_before(model, images[:1], evidence.layer)
        shape = " x ".join(map(str, activations.shape[1:]))
        is_late = before >= EARLY and activations.shape[2:] != images.shape[2:]
        row = {
            "layer": f"{evidence.layer} ({shape})",
            "status": "right" if match >= LEAST and is_late else "wrong",
            "correlation": round(match, 3),
            "contrast": round(contrast(mean), 3),
            "mirrored": round(correlation(mean.flip(1, 2), places), 3),
            "before": round(before, 3),
            **({"notices": list(gathered.scorer.notices)} if gathered.scorer.notices else {}),
        }
        if row["status"] == "right" or not is_late or len(network.size) > 3:
            return row
    return {**row, "status": "undecided"} if row["contrast"] < ALIKE else row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", metavar="WORD", help="networks whose name contains the word")
    parser.add_argument("--library", default="", help="timm, torchvision or transformers")
    parser.add_argument("--resume", action="store_true", help="skip networks that were judged already")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    path = RESULTS / "layers.json"
    old_rows = json.loads(path.read_text())["rows"] if path.exists() else []
    rows: dict[tuple[str, str], dict[str, Any]] = {(row["library"], row["network"]): row for row in old_rows}
    libraries = {"timm": timm_networks, "torchvision": torchvision_networks, "transformers": transformers_networks}
    for library, networks in libraries.items():
        for network in networks():
            key = library, network.name
            is_chosen = arguments.library in library and arguments.only in network.name
            if not is_chosen or (arguments.resume and key in rows):
                continue
            began = time.perf_counter()
            row = {"library": library, "network": network.name, **judge(network)}
            rows[key] = row
            details = row.get("reason") or f"{row['correlation']:.2f}, {row['before']:.0%} of the layers before it"
            print(f"{network.name:32} {row['status']:8} {row['layer']:48} {details}", end="")
            print(f"  {time.perf_counter() - began:.1f} s", flush=True)
            save("layers", [*rows.values()])
    for library in libraries:
        print(library, dict(Counter(row["status"] for row in rows.values() if row["library"] == library)))


if __name__ == "__main__":
    main()
