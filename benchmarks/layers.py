"""Does the automatic layer of known networks show where something is? A patch of the image is changed and looked for.

Each network of families.py gets one random image and eight copies of it, in which one patch differs: at the corners and
at the middle of the sides. Where the layer's output then changes, as sightline reads it, must be where the patch
is. `--only WORD` takes the networks whose name holds the word and writes nothing.
"""

import argparse
import itertools
import math
import time
import warnings
from typing import Any

import torch
from families import Network, timm_networks, torchvision_networks, transformers_networks
from measure import save
from torch import Tensor, nn

from sightline.explainers.evidence import gather

PATCHES = [*itertools.product((1 / 6, 3 / 6, 5 / 6), repeat=2)]
LEAST = 0.5  # correlation of changes with places; 1 is exact, 0 is chance
EARLY = 0.5  # share of the weight layers that must lie before the layer


def planted(size: tuple[int, ...], places: list[tuple[float, float]]) -> Tensor:
    """An image and, for each place (row, column from 0 to 1), a copy with another patch there; all frames of a video."""
    generator = torch.Generator().manual_seed(0)
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


def change(activations: Tensor) -> Tensor:
    """How much each cell changed with each patch, (patches, h, w); over the frames of a video the sum."""
    changed = (activations[1:] - activations[:1]).double().square().sum(1).sqrt()
    return changed.flatten(1, -3).sum(1) if changed.ndim > 3 else changed


def correlation(changed: Tensor, places: list[tuple[float, float]]) -> float:
    """Correlation of the changes with the places of the patches.

    A cell that changes more than others whatever happens, and a patch that changes all of them, count for nothing: the
    mean of each cell and of each patch is taken off, first.
    """
    rows, columns = changed.shape[1:]
    y = (torch.arange(rows).double() + 0.5) / rows
    x = (torch.arange(columns).double() + 0.5) / columns
    expected = torch.stack(
        [
            torch.exp(-(((y[:, None] - row) ** 2) * (rows > 1) + ((x - column) ** 2) * (columns > 1)) / (2 * 0.2**2))
            for row, column in places
        ]
    )
    if min(rows, columns) == 1:  # patches that share the one place left
        changed = changed / changed.mean((1, 2), keepdim=True).clamp_min(1e-300)
    logs = (changed / changed.mean((1, 2), keepdim=True).clamp_min(1e-300)).flatten(1)
    both: list[Tensor] = []
    for values in (logs, expected.flatten(1)):
        both.append(values - values.mean(0) - values.mean(1, keepdim=True) + values.mean())
    norm = both[0].norm() * both[1].norm()
    return float((both[0] * both[1]).sum() / norm) if norm else 0.0


def share_before(model: nn.Module, images: Tensor, layer: str) -> float:
    """Share of the convolutions and linear layers that have run when the layer is done; 1 if it is no module's."""
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
    """What is read of a network, and whether it is right."""
    torch.manual_seed(0)
    model = network.make(5).eval()
    places = PATCHES[:4] + PATCHES[5:] if len(network.size) == 3 else [PATCHES[i] for i in (0, 2, 6, 7)]
    images = planted(network.size, places)
    try:
        gathered = gather(model, images, [(None, frozenset({"activations"}))], 0)
        (evidence,) = next(gathered.blocks())
    except (ValueError, RuntimeError) as error:
        return {"layer": "", "status": "refused" if isinstance(error, ValueError) else "crashed", "reason": str(error)}
    assert evidence is not None
    activations = evidence.activations
    assert activations is not None
    shape = " x ".join(map(str, activations.shape[1:]))
    found = correlation(change(activations.detach()), places)
    before = share_before(model, images[:1], evidence.layer)
    right = found >= LEAST and before >= EARLY and activations.shape[2:] != images.shape[2:]
    reason = "" if right else f"correlation {found:.2f}, {before:.0%} of the weight layers before it"
    notices = list(gathered.scorer.notices)
    return {
        "layer": f"{evidence.layer} ({shape})",
        "status": "right" if right else "wrong",
        "correlation": round(found, 3),
        "before": round(before, 3),
        **({"reason": reason} if reason else {}),
        **({"notices": notices} if notices else {}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", metavar="WORD", help="networks whose name holds the word; writes nothing")
    only = parser.parse_args().only
    warnings.simplefilter("ignore")
    rows: list[dict[str, Any]] = []
    libraries = {"timm": timm_networks, "torchvision": torchvision_networks, "transformers": transformers_networks}
    for library, networks in libraries.items():
        for network in networks():
            if only not in network.name:
                continue
            began = time.perf_counter()
            row = {"library": library, "network": network.name, **judge(network)}
            rows.append(row)
            said = row.get("reason", f"{row.get('correlation', 0):.2f}")
            print(f"{network.name:32} {row['status']:8} {row['layer']:48} {said}", end="")
            print(f"  {time.perf_counter() - began:.1f} s", flush=True)
    for library in libraries:
        counts = {
            s: sum(r["status"] == s for r in rows if r["library"] == library)
            for s in ("right", "refused", "wrong", "crashed")
        }
        print(library, counts)
    if not only:
        print(save("layers", rows))


if __name__ == "__main__":
    main()
