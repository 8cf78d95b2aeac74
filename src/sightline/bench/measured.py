"""Measurements of a trained network: accuracy, quality of its maps, size and time."""

import io
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median_high
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor, nn

from sightline import data, metrics, runs
from sightline.attention import RepresentativeVectors
from sightline.data.splits import draw
from sightline.evaluation import Example
from sightline.explainers import explain
from sightline.facts import current_name
from sightline.inference import forward
from sightline.metrics import energy_in_mask
from sightline.metrics.classification import accuracy
from sightline.metrics.complexity import sparsity
from sightline.notebook import brief
from sightline.report.parts import attention_and_parts
from sightline.runs import Run
from sightline.tasks import perform
from sightline.training import initial_network

_BATCH = 250
_SCORED = 200
"""Number of test images for deletion."""
SHOWN = 4
"""Number of test images, the first ones, whose maps are kept for the page."""
QUALITY = ("energy_in_mask", "sparsity", "deletion_auc")


@dataclass(frozen=True, kw_only=True)
class Maps:
    """Quality of a network's own maps, means over the test images; NaN without such a map or without masks."""

    energy: dict[str, float]
    """block -> share of its map (the mean of its maps, if there are several) inside the mask."""
    sparsity: dict[str, float]
    """block -> `sightline.metrics.complexity.sparsity` of its maps. Maps of BR-NPA and bilinear attention pooling are
    first multiplied by the norm of the pooled features, as in Table 6 of BR-NPA."""
    activation_energy: float
    """Share of the norm of the last feature map inside the mask; NaN for transformers."""
    similarity: float
    """Representative vectors only: mean cosine between the vectors of an image."""


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Quality of one map, means over up to 200 test images; NaN without such a map or without masks.

    Names as in `sightline.metrics.METRICS`. Lower deletion is better, and a confident network starts higher: compare
    it with that of the same network's center map.
    """

    energy_in_mask: float
    sparsity: float
    deletion_auc: float


@dataclass(frozen=True, kw_only=True)
class TaskFigures:
    """What a network reaches in a task of the study."""

    asked: dict[str, Any]
    """The task's name and options as the study has them."""
    figures: dict[str, float]
    """Means, in the order of importance."""
    higher_is_better: dict[str, bool | None]


@dataclass(frozen=True, kw_only=True)
class MeasuredRun:
    """One trained network."""

    __repr__ = brief

    dataset: str = ""
    row: str
    seed: int
    accuracy: float
    """Of the test images."""
    majority: float
    """Accuracy of always predicting their most frequent class."""
    area: float
    """Share of the image inside the mask: the energy of a uniform map."""
    parameters: int
    seconds: float
    """Of an epoch, the median."""
    before: Maps
    """With the initial weights."""
    after: Maps
    quality: dict[str, Quality] = field(default_factory=dict[str, Quality])
    """Map -> its quality after training: `own`, the network's attention, or its activation map if it has none;
    `activation_map`; and `center_map`, a blob that ignores the image."""
    tasks: dict[str, TaskFigures] = field(default_factory=dict[str, TaskFigures])
    """Title in the study -> figures."""
    no_tasks: dict[str, str] = field(default_factory=dict[str, str])
    """Title of a task that the run does not suit -> why."""


def fresh(run: Run, own: runs.Own | None = None) -> nn.Module:
    """The network of a run with its initial weights; `own`: of a run of a network of your own."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        return initial_network(run.recipe.model, len(run.classes), run.seed, own).eval()


def read(file: Path) -> MeasuredRun | None:
    """The measurements in a file; None if there is none, or the file holds something else."""
    if not file.is_file():
        return None
    try:
        facts = _with_nan(json.loads(file.read_text(encoding="utf-8")))
        quality = {current_name(name): Quality(**scores) for name, scores in facts["quality"].items()}
        maps = {name: Maps(**facts[name]) for name in ("before", "after")}
        tasks = {title: TaskFigures(**figures) for title, figures in facts.get("tasks", {}).items()}
        return MeasuredRun(**facts | maps | {"quality": quality, "tasks": tasks})
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def _with_nan(value: Any) -> Any:
    """The inverse of `runs.plain`: None becomes NaN."""
    if isinstance(value, dict):
        return {name: _with_nan(item) for name, item in value.items()}
    return math.nan if value is None else value


def measure_run(row: str, run: Run, dataset: str = "", own: runs.Own | None = None) -> MeasuredRun:
    """Measure a run on its test images, and keep maps of the first ones in its folder; `own`: see `runs.load_model`."""
    splits = data.load(run.recipe.data)
    has_identities = "query" in splits  # which are none of the network's classes: see `tasks.retrieval`
    images = replace(splits["query" if has_identities else "test"], preprocess=run.preprocess)
    device = runs.best_device()
    model = runs.load_model(run.folder, own).to(device)
    logits: list[Tensor] = []
    areas: list[Tensor] = []
    for batch in data.batches(images, _BATCH):
        logits.append(forward(model, data.normalize(batch.images.to(device), run.preprocess), _BATCH).cpu().double())
        areas += [] if batch.masks is None else [batch.masks.double().mean((1, 2, 3))]
    quality, examples = _quality(model, images, run.classes)
    _keep(run.folder / _MAPS, examples)
    return MeasuredRun(
        dataset=dataset,
        row=row,
        seed=run.seed,
        accuracy=math.nan if has_identities else accuracy(torch.cat(logits).softmax(1).numpy(), images.labels),
        majority=math.nan if has_identities else int(np.bincount(images.labels).max()) / len(images),
        area=_mean(areas),
        parameters=sum(p.numel() for p in model.parameters()),
        seconds=median_high(epoch["seconds"] for epoch in run.history),
        before=_maps(fresh(run, own).to(device), images),
        after=_maps(model, images),
        quality=quality,
    )


def measure_tasks(
    measured: MeasuredRun, run: Run, asked: Mapping[str, Mapping[str, Any]], own: runs.Own | None = None
) -> MeasuredRun:
    """The measurements with those of the tasks that they lack, or that were asked otherwise.

    A task that the run does not suit is left out, with the reason in `no_tasks`.

    Raises:
        OSError: the images of a task are missing.
    """
    tasks, no_tasks = dict(measured.tasks), dict[str, str]()
    todo = {title: dict(task) for title, task in asked.items() if title not in tasks or tasks[title].asked != task}
    model = runs.load_model(run.folder, own).to(runs.best_device()) if todo else None
    for title, task in todo.items():
        options = {name: value for name, value in task.items() if name != "task"}
        try:
            outcome = perform(task.get("task", title), run, model, **options)
        except ValueError as error:
            tasks.pop(title, None)
            no_tasks[title] = " ".join(str(error).split())
            continue
        tasks[title] = TaskFigures(
            asked=task,
            figures={name: figure.interval.value for name, figure in outcome.figures.items()},
            higher_is_better={name: figure.higher_is_better for name, figure in outcome.figures.items()},
        )
    return replace(measured, tasks={title: tasks[title] for title in asked if title in tasks}, no_tasks=no_tasks)


def _maps(model: nn.Module, images: data.ImageSet) -> Maps:
    device = next(model.parameters()).device
    energies: defaultdict[str, list[Tensor]] = defaultdict(list)
    sparsities: defaultdict[str, list[Tensor]] = defaultdict(list)
    activation: list[Tensor] = []
    cosines: list[Tensor] = []
    for batch in data.batches(images, _BATCH):
        inputs = data.normalize(batch.images.to(device), images.preprocess)
        masks = None if batch.masks is None else batch.masks.to(device)
        maps, parts = attention_and_parts(model, inputs)
        for name, weights in maps.items():
            if weights.shape[2] * weights.shape[3] > 1:
                sparsities[name].append(sparsity(weights * (parts[name].norms if name in parts else 1)))
                energies[name].append(_energy(weights.mean(1, keepdim=True), masks))
        for name, part in parts.items():
            block = model.get_submodule(name)
            if isinstance(block, RepresentativeVectors) and block.k > 1:
                with torch.no_grad():
                    pairs = block.similarities(part.features)
                cosines.append((pairs.sum((1, 2)) - block.k) / (block.k * (block.k - 1)))
        activation += [_energy(size, masks) for size in _maps_by("activation_map", model, inputs).values()]
    return Maps(
        energy={name: _mean(values) for name, values in energies.items()},
        sparsity={name: _mean(values) for name, values in sparsities.items()},
        activation_energy=_mean(activation),
        similarity=_mean(cosines),
    )


def _quality(
    model: nn.Module, images: data.ImageSet, classes: Sequence[str]
) -> tuple[dict[str, Quality], list[Example]]:
    """The quality of each map, and the first images with their own maps; `classes` are the network's."""
    batch = images.batch(draw(images.labels, _SCORED, seed=0))
    device = next(model.parameters()).device
    inputs = data.normalize(batch.images.to(device), images.preprocess)
    masks = None if batch.masks is None else batch.masks.to(device)
    explanation = explain(model, inputs, methods=["center_map"])
    maps = {**_maps_by("attention", model, inputs), **_maps_by("activation_map", model, inputs), **explanation.maps}
    chosen = {name: metrics.METRICS[name] for name in QUALITY if masks is not None or name != "energy_in_mask"}
    scores = metrics.measure(chosen, maps, model=model, images=inputs, targets=explanation.targets, masks=masks).values

    def quality_of(name: str) -> Quality:
        keys = {metric: (name, metric) for metric in QUALITY}
        return Quality(**{metric: _mean([scores[key]] if key in scores else []) for metric, key in keys.items()})

    own = "attention" if "attention" in maps else "activation_map"
    quality = {"own": quality_of(own)} | {name: quality_of(name) for name in ("activation_map", "center_map")}
    probabilities = explanation.probabilities.cpu()
    examples = [
        Example(
            name=batch.names[i],
            image=batch.images[i].cpu().movedim(0, -1).numpy(),
            label=images.classes[int(batch.labels[i])],
            prediction=classes[int(explanation.targets[i, 0])],
            probability=float(probabilities[i].max()),
            maps={name: maps[name][i, 0].float().cpu().numpy() for name in (own, "center_map") if name in maps},
            verdicts={},
        )
        for i in range(min(SHOWN, len(batch.names)))
    ]
    return quality, examples


_MAPS = "maps.npz"


def _keep(file: Path, examples: Sequence[Example]) -> None:
    """Write images and their maps beside the run."""
    arrays: dict[str, Any] = {
        name: np.array([getattr(example, name) for example in examples])
        for name in ("name", "image", "label", "prediction", "probability")
    }
    for method in examples[0].maps if examples else ():
        arrays[f"map {method}"] = np.stack([example.maps[method] for example in examples])
    packed = io.BytesIO()
    np.savez_compressed(packed, allow_pickle=False, **arrays)
    runs.write(file, packed.getvalue())


def kept(folder: Path) -> list[Example]:
    """The images and maps kept beside a run; empty if there are none, or if the file holds something else."""
    try:
        return _examples(folder / _MAPS)
    except (OSError, EOFError, ValueError, KeyError, BadZipFile):
        return []


def _examples(file: Path) -> list[Example]:
    with np.load(file) as arrays:
        maps = {name.removeprefix("map "): arrays[name] for name in arrays if name.startswith("map ")}
        return [
            Example(
                name=str(name),
                image=image,
                label=str(label),
                prediction=str(prediction),
                probability=float(probability),
                maps={method: values[i] for method, values in maps.items()},
                verdicts={},
            )
            for i, (name, image, label, prediction, probability) in enumerate(
                zip(*(arrays[name] for name in ("name", "image", "label", "prediction", "probability")), strict=True)
            )
        ]


def _maps_by(method: str, model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """None where it does not fit: many networks have no attention, some transformers no feature map."""
    try:
        return {method: explain(model, inputs, methods=[method])[method]}
    except ValueError:
        return {}


def _energy(maps: Tensor, masks: Tensor | None) -> Tensor:
    return maps.new_full((len(maps),), math.nan) if masks is None else energy_in_mask(maps, masks)


def _mean(values: list[Tensor]) -> float:
    return float(torch.cat(values).nanmean()) if values else math.nan
