"""Methods and metrics of an evaluation, and how many of them fit into a time budget."""

import json
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sightline.explainers import Explainer, Method, explain, fitting, named
from sightline.inference import ForwardCall, forward
from sightline.metrics import METRICS, Perturbation, inpaint, perturbed_counts
from sightline.metrics.perturbed import ROAD_FRACTIONS, read_by
from sightline.runs import write

_FEWEST = 50
"""Images below which methods or metrics are left out rather than more images."""
_PAINTED = frozenset({"morf", "lerf"})


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of the table: a method, and which class it explains."""

    name: str
    method: str
    explainer: Explainer
    explains_runner_up: bool = False

    @property
    def is_control(self) -> bool:
        """Whether it does not look at the model, or explains another class than the predicted one."""
        return self.explains_runner_up or self.explainer.is_control


@dataclass(frozen=True, kw_only=True)
class Task:
    """Methods, metrics and how they are run."""

    model: nn.Module
    methods: dict[str, Method]
    metrics: tuple[str, ...]
    perturbation: Perturbation
    with_runner_up: bool
    """Whether the map of the runner-up class is a control."""

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """The methods, and then the same with another class where that is a control."""
        rows = [Row(name=name, method=name, explainer=named(method)[1]) for name, method in self.methods.items()]
        others = [
            replace(row, name=f"{row.name} of another class", explains_runner_up=True)
            for row in rows
            if self.with_runner_up and not row.explainer.is_blind_to_class and not row.is_control
        ]
        return (*rows, *others)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the rows."""
        return tuple(row.name for row in self.rows)

    @cached_property
    def controls(self) -> tuple[str, ...]:
        """Names of the rows that are controls."""
        return tuple(row.name for row in self.rows if row.is_control)

    @property
    def ranking(self) -> list[str]:
        """The metrics that say which map is better."""
        return [metric for metric in self.metrics if METRICS[metric].higher_is_better is not None]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Methods, metrics and number of images to evaluate."""

    methods: tuple[str, ...]
    metrics: tuple[str, ...]
    limit: int
    seconds: float
    """Expected duration."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Method or metric -> why."""

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        write(path, json.dumps(asdict(self)).encode())

    @classmethod
    def load(cls, path: Path) -> "Plan | None":
        """What `save` wrote; None where there is no file, or a damaged one."""
        try:
            stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            stored |= {name: tuple(stored[name]) for name in ("methods", "metrics")}
            return cls(**stored)
        except (OSError, ValueError, TypeError, KeyError):
            return None


def unsuited(
    model: nn.Module, images: Tensor, methods: Collection[Method], strict: bool, **options: Any
) -> dict[str, str]:
    """Those of the named methods that do not fit the model, and why; none if `strict`, or if all would be left out.

    Nor is a control among them, a method with a layer or options of its own, or the only other one: `explain` says what
    is wrong with it. The further options are those of `fitting`.
    """
    tried = [one for one in methods if isinstance(one, str) and "@" not in one and not named(one)[1].is_control]
    if strict or len(tried) < 2:
        return {}
    try:
        return fitting(model, images, tried, **options)[1]
    except ValueError:
        return {}


def plan(task: Task, images: Tensor, targets: Tensor, limit: int, budget: float) -> Plan:
    """As many images as fit into `budget` seconds; below 50, the most expensive method or metric is left out first.

    The forward and every method are timed on a few images; of a method that perturbs images only the first batch is.
    """
    cost = _cost_per_image(task, images, targets)
    methods, metrics = tuple(task.methods), task.metrics
    left_out: dict[str, str] = {}
    fewest = min(limit, _FEWEST)
    while cost(methods, metrics) * fewest > budget:
        saved: dict[tuple[str, ...], float] = {}
        explainers = [name for name in methods if name not in task.controls]
        for names in [*((name,) for name in explainers if len(explainers) > 1), *_sharing(metrics)]:
            rest = _without(methods, names), _without(metrics, names)
            seconds = cost(methods, metrics) - cost(*rest)
            if rest[1] and seconds > 0:
                saved[names] = seconds
        if not saved:
            break
        most = max(saved, key=lambda names: (saved[names], -len(names)))
        for name in most:
            shared = f" together with {', '.join(n for n in most if n != name)}" if len(most) > 1 else ""
            seconds = f"{saved[most] * fewest:,.0f} s{shared} for {fewest} images"
            left_out[name] = f"{seconds}, of {budget:,.0f} s for everything"
        methods, metrics = _without(methods, most), _without(metrics, most)
    per_image = cost(methods, metrics)
    count = max(int(min(limit, budget / per_image)), 1)
    return Plan(methods=methods, metrics=metrics, limit=count, seconds=per_image * count, left_out=left_out)


def _without(names: tuple[str, ...], others: Collection[str]) -> tuple[str, ...]:
    return tuple(name for name in names if name not in others)


def _cost_per_image(task: Task, images: Tensor, targets: Tensor) -> Callable[[Collection[str], Collection[str]], float]:
    """Seconds to explain an image by all of the methods and score it by all of the metrics."""
    model, perturbation = task.model, task.perturbation
    rows = torch.arange(len(images), device=images.device)
    rows = rows.repeat(max(perturbation.batch_size // len(images), 1))
    per_forward = _forward_seconds(model, images[rows], perturbation.call(images).at(rows))
    per_painting = _painted_seconds(images[rows]) if _needs(task.metrics) & _PAINTED else 0.0
    explaining = {name: _seconds(model, images, targets, method, perturbation) for name, method in task.methods.items()}

    def cost(methods: Collection[str], metrics: Collection[str]) -> float:
        rows = [row for row in task.rows if row.method in methods]
        needs = _needs(metrics)
        shared, each = perturbed_counts(needs, perturbation, images.shape[2:])
        paintings = len(_PAINTED & needs) * len(ROAD_FRACTIONS) * len(rows)
        again = sum(METRICS[metric].explanations for metric in metrics)
        explanations = sum(explaining[row.method] * (1 if row.explains_runner_up else 1 + again) for row in rows)
        return (shared + len(rows) * each) * per_forward + paintings * per_painting + explanations

    return cost


def _sharing(metrics: Sequence[str]) -> list[tuple[str, ...]]:
    """Each metric, and those that share perturbed images: leaving out one of them alone saves nothing."""
    by_need = [tuple(metric for metric in metrics if need in _needs([metric])) for need in sorted(_needs(metrics))]
    return list(dict.fromkeys([*((metric,) for metric in metrics), *by_need]))


def _needs(metrics: Collection[str]) -> frozenset[str]:
    return read_by(METRICS[metric].function for metric in metrics)


def _forward_seconds(model: nn.Module, images: Tensor, call: ForwardCall) -> float:
    """For one image of a batch."""
    forward(model, images, call=call).cpu()  # the first is slower
    start = time.perf_counter()
    forward(model, images, call=call).cpu()  # waits for the device
    return (time.perf_counter() - start) / len(images)


def _painted_seconds(images: Tensor) -> float:
    """For painting over the brighter half of one image, which is as scattered as the pixels of a map."""
    gray = images.mean(1, keepdim=True)
    hole = gray > gray.flatten(1).median(1).values[:, None, None, None]
    start = time.perf_counter()
    inpaint(images, hole).cpu()
    return (time.perf_counter() - start) / len(images)


def _seconds(model: nn.Module, images: Tensor, targets: Tensor, method: Method, perturbation: Perturbation) -> float:
    """For the map of one image."""

    class Started(Exception):
        pass

    expected = 0.0

    def extrapolate(what: str, done: int, total: int) -> None:
        nonlocal expected
        if images.is_cuda:
            torch.cuda.synchronize(images.device)
        expected = (time.perf_counter() - start) * total / done
        raise Started

    for _ in range(2):  # the first is slower
        start = time.perf_counter()
        try:
            explain(model, images, targets, [method], progress=extrapolate, **perturbation.of_model)
        except Started:
            break
        expected = time.perf_counter() - start
    return expected / len(images)
