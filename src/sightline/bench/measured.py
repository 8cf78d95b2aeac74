"""What a trained network is worth: accuracy, what its maps show, what it cost."""

import json
import math
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sightline import data, metrics, runs
from sightline.attention import BilinearAttentionPooling, RepresentativeVectors
from sightline.data.splits import draw
from sightline.explainers import attention_maps, explain
from sightline.facts import current_name
from sightline.inference import forward, untouched
from sightline.metrics import energy_in_mask
from sightline.metrics.complexity import sparsity
from sightline.runs import Run
from sightline.training import initial_network

_BATCH = 250
_SCORED = 200
"""Test images of which maps are deleted."""
QUALITY = ("energy_in_mask", "sparsity", "deletion_auc")


@dataclass(frozen=True, kw_only=True)
class Maps:
    """Means over the test images of what a network's own maps are worth; NaN where there is no such map or no mask."""

    energy: dict[str, float]
    """block -> share of its map (the mean of its maps, if there are several) in the mask."""
    sparsity: dict[str, float]
    """block -> `sightline.metrics.complexity.sparsity` of its maps. Those of BR-NPA and bilinear attention pooling are
    first multiplied by the norm of the features that they pool, as in Table 6 of BR-NPA."""
    activation_energy: float
    """Share in the mask of the norm of the last feature map; a transformer has none."""
    similarity: float
    """Representative vectors only: cosine of an image's vectors with one another."""


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Means over up to 200 test images of what one map is worth; NaN where there is no such map or no mask.

    Names as in `sightline.metrics.METRICS`. Of deletion less is better, and a network that is sure of itself begins
    higher: compare it with that of the same network's center map.
    """

    energy_in_mask: float
    sparsity: float
    deletion_auc: float


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One trained network."""

    dataset: str = ""
    row: str
    seed: int
    accuracy: float
    """On the test images."""
    majority: float
    """Accuracy of always answering their most frequent class."""
    area: float
    """Share of the mask in the image: the energy of a map that knows nothing."""
    parameters: int
    seconds: float
    """Of one epoch, the median."""
    before: Maps
    """With the weights it started from."""
    after: Maps
    quality: dict[str, Quality] = field(default_factory=dict[str, Quality])
    """Map -> what it is worth after training: `own`, the network's attention, or its activation map if it has none;
    `activation_map`; and `center_map`, a blob that never looks at the image."""


def fresh(run: Run) -> nn.Module:
    """The network of a run with the weights that its training began with."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        return initial_network(run.recipe.model, len(run.classes), run.seed).eval()


def read(file: Path) -> Measured | None:
    """What `measure` found and `runs.plain` wrote; None where there is none, or another file."""
    if not file.is_file():
        return None
    try:
        known = _with_nan(json.loads(file.read_text(encoding="utf-8")))
        quality = {current_name(name): Quality(**of) for name, of in known["quality"].items()}
        maps = {name: Maps(**known[name]) for name in ("before", "after")}
        return Measured(**known | maps | {"quality": quality})
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def _with_nan(value: Any) -> Any:
    """What `runs.plain` was given."""
    if isinstance(value, dict):
        return {name: _with_nan(item) for name, item in value.items()}
    return math.nan if value is None else value


def measure(row: str, run: Run, dataset: str = "") -> Measured:
    """What a run is worth on its test images."""
    images = replace(data.load(run.recipe.data)["test"], preprocess=run.preprocess)
    model = runs.load_model(run.folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    correct = area = 0.0
    counts = torch.zeros(len(run.classes), dtype=torch.int64)
    model.to(device)
    for batch in data.batches(images, _BATCH):
        logits = forward(model, data.normalize(batch.images.to(device), run.preprocess), _BATCH)
        correct += float((logits.argmax(1).cpu() == batch.labels).sum())
        counts += torch.bincount(batch.labels, minlength=len(run.classes))
        area += math.nan if batch.masks is None else float(batch.masks.float().mean((1, 2, 3)).sum())
    seconds = sorted(epoch["seconds"] for epoch in run.history)
    return Measured(
        dataset=dataset,
        row=row,
        seed=run.seed,
        accuracy=correct / len(images),
        majority=int(counts.max()) / len(images),
        area=area / len(images),
        parameters=sum(p.numel() for p in model.parameters()),
        seconds=seconds[len(seconds) // 2],
        before=_maps(fresh(run).to(device), images),
        after=_maps(model, images),
        quality=_quality(model, images),
    )


def _maps(model: nn.Module, images: data.ImageSet) -> Maps:
    device = next(model.parameters()).device
    energies: dict[str, list[Tensor]] = {}
    sparsities: dict[str, list[Tensor]] = {}
    activation: list[Tensor] = []
    cosines: list[Tensor] = []
    for batch in data.batches(images, _BATCH):
        inputs = data.normalize(batch.images.to(device), images.preprocess)
        masks = None if batch.masks is None else batch.masks.to(device)
        with _pooled_norms(model) as norms:
            maps = attention_maps(model, inputs)
        for name, weights in maps.items():
            if weights.shape[2] * weights.shape[3] > 1:
                sparsities.setdefault(name, []).append(sparsity(weights * norms.get(name, 1)))
                energies.setdefault(name, []).append(_energy(weights.mean(1, keepdim=True), masks))
        try:
            size = explain(model, inputs, methods=["activation_map"])["activation_map"]
        except ValueError:  # a transformer has no feature map
            size = inputs.new_full((len(inputs), 1, 1, 1), math.nan)
        activation.append(_energy(size, masks))
        cosines += _similarities(model, inputs)
    return Maps(
        energy={name: _mean(values) for name, values in energies.items()},
        sparsity={name: _mean(values) for name, values in sparsities.items()},
        activation_energy=_mean(activation),
        similarity=_mean(cosines),
    )


def _quality(model: nn.Module, images: data.ImageSet) -> dict[str, Quality]:
    batch = images.batch(draw(images.labels, _SCORED, seed=0))
    device = next(model.parameters()).device
    inputs = data.normalize(batch.images.to(device), images.preprocess)
    masks = None if batch.masks is None else batch.masks.to(device)
    found = explain(model, inputs, methods=["center_map"])
    maps = found.maps
    for method in ("activation_map", "attention"):
        try:
            maps = {method: explain(model, inputs, methods=[method])[method], **maps}
        except ValueError:  # many networks have no attention, some transformers no feature map
            continue
    chosen = {name: metrics.METRICS[name] for name in QUALITY if masks is not None or name != "energy_in_mask"}
    scores = metrics.measure(chosen, maps, model=model, images=inputs, targets=found.targets, masks=masks).values
    worth = {
        name: Quality(**{of: _mean([scores[name, of]] if of in chosen else []) for of in QUALITY}) for name in maps
    }
    nothing = Quality(**dict.fromkeys(QUALITY, math.nan))
    activation = worth.get("activation_map", nothing)
    return {
        "own": worth.get("attention", activation),
        "activation_map": activation,
        "center_map": worth["center_map"],
    }


def _energy(maps: Tensor, masks: Tensor | None) -> Tensor:
    return maps.new_full((len(maps),), math.nan) if masks is None else energy_in_mask(maps, masks)


@contextmanager
def _pooled_norms(model: nn.Module) -> Generator[dict[str, Float[Tensor, "b 1 h w"]]]:
    """Norms of the features that poolings into several vectors take, by name, once the model has run."""
    norms: dict[str, Tensor] = {}

    def keeper(name: str) -> Callable[..., None]:
        def keep(block: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            norms[name] = torch.linalg.vector_norm(inputs[0].detach(), dim=1, keepdim=True)

        return keep

    kinds = RepresentativeVectors | BilinearAttentionPooling
    poolings = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    handles = [block.register_forward_pre_hook(keeper(name)) for name, block in poolings.items()]
    try:
        yield norms
    finally:
        for handle in handles:
            handle.remove()


def _similarities(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Mean cosine of two different vectors, for each image and block."""
    found: list[Tensor] = []

    def look(block: RepresentativeVectors, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        k = block.k
        if k > 1:
            units = nn.functional.normalize(output.unflatten(1, (k, -1)), dim=2)
            cosines = units @ units.mT
            found.append((cosines.sum((1, 2)) - k) / (k * (k - 1)))

    blocks = [block for block in model.modules() if isinstance(block, RepresentativeVectors)]
    with untouched(model), torch.no_grad():
        handles = [block.register_forward_hook(look) for block in blocks]
        try:
            if blocks:
                model(images)
        finally:
            for handle in handles:
                handle.remove()
    return found


def _mean(values: list[Tensor]) -> float:
    return float(torch.cat(values).nanmean()) if values else math.nan
