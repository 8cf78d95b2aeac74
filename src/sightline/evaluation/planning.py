"""Methods and metrics of an evaluation, and how many of them fit into a time budget."""

import json
import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sightline.explainers import Explainer, Method, explain, named
from sightline.explainers.selection import seconds_per_image, timed_size
from sightline.facts import duration
from sightline.inference import ForwardCall, Memory, allowance, fitting_size, forward, held_by
from sightline.metrics import METRICS, Perturbation, inpaint, perturbed_counts
from sightline.metrics.perturbed import RANKED_BYTES, ROAD_FRACTIONS, read_by
from sightline.runs import write

_FEWEST = 50, 20
"""Images below which curves get fewer steps, and below which methods or metrics are left out."""
_FEWEST_STEPS = 8
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
    steps: int
    """Of the curves of deletion and insertion."""
    seconds: float
    """Expected duration."""
    most: dict[str, float] = field(default_factory=dict)
    """Method or metrics -> how many of these seconds they take."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Method or metric -> why."""

    def sentence(self) -> str:
        """What to expect."""
        size = f"{self.limit} images (maps: {len(self.methods)}, metrics: {len(self.metrics)})"
        name = max(self.most, key=lambda name: self.most[name], default="")
        most = f", of which {name}: {duration(self.most[name])}" if name and len(self.most) > 1 else ""
        return f"expected time: {duration(self.seconds)} for {size}{most}"

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


def check_list(keyword: str, names: Any, words: Sequence[str] = ()) -> None:
    """A list of names, or one of these words.

    Raises:
        ValueError: another text.
    """
    if isinstance(names, str) and names not in words:
        what = " or ".join([keyword, *map(repr, words)])
        raise ValueError(f"expected a list of {what}, got {names!r}; write {keyword}=[{names!r}]")


def listed(methods: Sequence[Method] | str | None, controls: Sequence[Method] | str) -> dict[str, Method]:
    """Methods, where they are listed, and controls by name.

    Raises:
        ValueError: a text instead of a list, or a control that looks at the model.
    """
    check_list("methods", methods, ("all", "fast"))
    check_list("controls", controls)
    for name, explainer, *_ in (named(control) for control in controls if control != "other_class"):
        if not explainer.is_control:
            raise ValueError(f"expected controls that never look at the model, got {name!r}; give it as a method")
    chosen = () if methods is None or isinstance(methods, str) else methods
    return {named(one)[0]: one for one in [*chosen, *(one for one in controls if one != "other_class")]}


def as_word(methods: Sequence[Method] | str | None) -> Sequence[Method] | str | None:
    """`["all"]` and `["fast"]`, as a command line has them, as the words "all" and "fast".

    >>> as_word(["all"]), as_word(["cam"])
    ('all', ['cam'])
    """
    return str(methods[0]) if methods is not None and list(methods) in (["all"], ["fast"]) else methods


def at_once(task: Task, images: Tensor, targets: Tensor) -> int:
    """How many images are explained and scored together, so that their maps fit into memory; one is measured."""
    perturbation = task.perturbation
    allowed = allowance(perturbation.memory, images.device)
    sizes = allowed, images[:1].nbytes, perturbation.batch_size
    if fitting_size(*sizes) == perturbation.batch_size:
        return perturbation.batch_size
    fast = [method for method in task.methods.values() if not named(method)[1].many_passes] or ["center_map"]
    _, held = held_by(lambda: explain(task.model, images, targets, fast, **perturbation.of_explain))
    ranked = RANKED_BYTES * len(task.rows) * images[0, 0].numel() if _needs(task.metrics) else 0
    return fitting_size(*sizes, held=None if held is None else held + ranked)


def plan(task: Task, images: Tensor, targets: Tensor, limit: int, budget: float = math.inf) -> Plan:
    """As many images as fit into `budget` seconds.

    Below 50 images, the curves of deletion and insertion get fewer steps, down to 8. Below 20 images with these, the
    most expensive method or metric is left out, and so on until the rest fits. The forward and every method are timed
    on a few images; of a method with many passes only the first batches are.
    """
    cost = _cost_per_image(task, images, targets)
    methods, metrics = tuple(task.methods), task.metrics
    left_out: dict[str, str] = {}

    def saved(steps: int) -> dict[tuple[str, ...], float]:
        """Seconds per image without a method, a metric, or those that only together save something."""
        explainers = [name for name in methods if name not in task.controls]
        seconds: dict[tuple[str, ...], float] = {}
        for names in [*((name,) for name in explainers if len(explainers) > 1), *_sharing(metrics)]:
            rest = _without(methods, names), _without(metrics, names)
            less = cost(methods, metrics, steps) - cost(*rest, steps)
            if rest[1] and less > 0:
                seconds[names] = less
        return seconds

    while True:
        levels = _levels(metrics, task.perturbation.steps, limit)
        fitting = (steps for steps, fewest in levels if cost(methods, metrics, steps) * fewest <= budget)
        steps, fewest = levels[-1]
        steps = next(fitting, None) or steps
        choices = saved(steps)
        if cost(methods, metrics, steps) * fewest <= budget or not choices:
            break
        most = max(choices, key=lambda names: (choices[names], -len(names)))
        for name in most:
            shared = f" together with {', '.join(n for n in most if n != name)}" if len(most) > 1 else ""
            seconds = f"{choices[most] * fewest:,.0f} s{shared} for {fewest} images"
            left_out[name] = f"{seconds}, of {budget:,.0f} s for everything"
        methods, metrics = _without(methods, most), _without(metrics, most)
    per_image = cost(methods, metrics, steps)
    count = limit if per_image * limit <= budget else max(int(budget / per_image), 1)
    return Plan(
        methods=methods,
        metrics=metrics,
        limit=count,
        steps=steps,
        seconds=per_image * count,
        most={", ".join(names): seconds * count for names, seconds in choices.items()},
        left_out=left_out,
    )


def _levels(metrics: Collection[str], steps: int, limit: int) -> list[tuple[int, int]]:
    """Steps, and the fewest images with so many, from the best to what is accepted before something is left out."""
    has_curves = bool(_needs(metrics) & {"deletion", "insertion"})
    halved = [steps >> times for times in range(steps.bit_length()) if steps >> times >= _FEWEST_STEPS]
    all_steps = halved if has_curves and halved else [steps]
    return [*((few, min(limit, _FEWEST[0])) for few in all_steps), (all_steps[-1], min(limit, _FEWEST[1]))]


def _without(names: tuple[str, ...], others: Collection[str]) -> tuple[str, ...]:
    return tuple(name for name in names if name not in others)


def _cost_per_image(
    task: Task, images: Tensor, targets: Tensor
) -> Callable[[Collection[str], Collection[str], int], float]:
    """Seconds to explain an image by all of the methods and score it by all of the metrics, with so many steps."""
    model, perturbation = task.model, task.perturbation
    rows = torch.arange(len(images), device=images.device)
    rows = rows.repeat(max(timed_size(images, perturbation.batch_size) // len(images), 1))
    per_forward = _forward_seconds(model, images[rows], perturbation.call(images).at(rows), perturbation.memory)
    per_painting = _painted_seconds(images[rows]) if _needs(task.metrics) & _PAINTED else 0.0
    options = perturbation.of_explain
    explaining = {
        name: seconds_per_image(model, images, targets, method, **options) for name, method in task.methods.items()
    }

    def cost(methods: Collection[str], metrics: Collection[str], steps: int) -> float:
        rows = [row for row in task.rows if row.method in methods]
        needs = _needs(metrics)
        shared, each = perturbed_counts(needs, replace(perturbation, steps=steps), images.shape[2:])
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


def _forward_seconds(model: nn.Module, images: Tensor, call: ForwardCall, memory: Memory) -> float:
    """For one image of a batch."""
    forward(model, images, call=call, memory=memory).cpu()  # the first is slower
    start = time.perf_counter()
    forward(model, images, call=call, memory=memory).cpu()  # waits for the device
    return (time.perf_counter() - start) / len(images)


def _painted_seconds(images: Tensor) -> float:
    """For painting over the brighter half of one image, which is as scattered as the pixels of a map."""
    gray = images.mean(1, keepdim=True)
    hole = gray > gray.flatten(1).median(1).values[:, None, None, None]
    start = time.perf_counter()
    inpaint(images, hole).cpu()
    return (time.perf_counter() - start) / len(images)
