"""What of an evaluation fits into a time budget."""

import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sightline.explainers import Method, explain
from sightline.inference import ForwardCall, forward
from sightline.metrics import METRICS, Hiding, HidingMetric, frames_of, inpaint, inputs_of
from sightline.metrics.hiding import ROAD_SHARES
from sightline.runs import write

_FEWEST = 50
"""Images below which rather a method or a metric is given up than more images."""
_PAINTED = frozenset({"most_first", "least_first"})
_ROUNDS = {"max_sensitivity": 11}
"""How often a metric explains all images again; the others twice."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to do, and what not."""

    methods: tuple[str, ...]
    metrics: tuple[str, ...]
    limit: int
    seconds: float
    """Expected for all of it."""
    left_out: dict[str, str]
    """Method or metric -> why."""


def kept(path: Path | None, make: Callable[[], Plan]) -> Plan:
    """The plan that `path` holds, else a new one that is put there: times measured again would make another."""
    if path is not None:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            return Plan(**found | {name: tuple(found[name]) for name in ("methods", "metrics")})
        except (OSError, ValueError, TypeError, KeyError):
            pass
    made = make()
    if path is not None:
        write(path, json.dumps(asdict(made)).encode())
    return made


def plan(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    methods: Mapping[str, Method],
    controls: Collection[str],
    metrics: Sequence[str],
    hiding: Hiding,
    limit: int,
    budget: float,
    others: Collection[str] = (),
) -> Plan:
    """As many images as fit into `budget` seconds; below 50, the dearest method or metric is left out first.

    Of `others` the map of another class is made and scored too.

    The forward and every method are timed on a few images; of a method that looks at many changed images only the
    first batch is.
    """
    rows = torch.arange(len(images), device=images.device).repeat(max(hiding.batch_size // len(images), 1))
    many = images[rows]
    per_forward = _forward_seconds(model, many, hiding.call(images).at(rows))
    per_painted = _painted_seconds(many) if _needs(metrics) & _PAINTED else 0.0
    explaining = {name: _seconds(model, images, targets, method, hiding) for name, method in methods.items()}
    kept, measured = dict(explaining), list(metrics)
    left_out: dict[str, str] = {}

    def cost(names: Collection[str], chosen: Collection[str]) -> float:
        """Seconds per image."""
        needs = _needs(chosen)
        shared, each = frames_of(needs, hiding, images.shape[2:])
        again = sum(_ROUNDS.get(metric, 2) for metric in chosen if "explain" in inputs_of(METRICS[metric]))
        more = [name for name in names if name in others]
        scored = len(names) + len(more)
        painted = len(_PAINTED & needs) * len(ROAD_SHARES) * scored
        hiding_seconds = (shared + scored * each) * per_forward + painted * per_painted
        seconds = sum(explaining[name] for name in names) * (1 + again) + sum(explaining[name] for name in more)
        return hiding_seconds + seconds

    fewest = min(limit, _FEWEST)
    while cost(kept, measured) * fewest > budget:
        whole = cost(kept, measured)
        looks = [name for name in kept if name not in controls]
        saved: dict[tuple[str, ...], float] = {}
        if len(looks) > 1:
            saved = {(name,): whole - cost(kept.keys() - {name}, measured) for name in looks}
        for together in _sharing(measured):
            if rest := [metric for metric in measured if metric not in together]:
                saved[together] = whole - cost(kept, rest)
        saved = {names: seconds for names, seconds in saved.items() if seconds > 0}
        if not saved:
            break
        dearest = max(saved, key=lambda names: (saved[names], -len(names)))
        for name in dearest:
            shared = f" together with {', '.join(n for n in dearest if n != name)}" if len(dearest) > 1 else ""
            seconds = f"{saved[dearest] * fewest:,.0f} s{shared} for {fewest} images"
            left_out[name] = f"{seconds}, of {budget:,.0f} s for everything"
            kept.pop(name, None)
        measured = [metric for metric in measured if metric not in dearest]
    per_image = cost(kept, measured)
    images_made = max(int(min(limit, budget / per_image)), 1)
    return Plan(
        methods=tuple(kept),
        metrics=tuple(measured),
        limit=images_made,
        seconds=per_image * images_made,
        left_out=left_out,
    )


def _sharing(metrics: Sequence[str]) -> list[tuple[str, ...]]:
    """Each metric, and those that share masked images: one of them alone saves nothing."""
    by_need = [tuple(metric for metric in metrics if need in _needs([metric])) for need in sorted(_needs(metrics))]
    return list(dict.fromkeys([*((metric,) for metric in metrics), *by_need]))


def _needs(metrics: Collection[str]) -> frozenset[str]:
    functions = [METRICS[metric].function for metric in metrics]
    return frozenset[str]().union(*(function.needs for function in functions if isinstance(function, HidingMetric)))


def _forward_seconds(model: nn.Module, images: Tensor, call: ForwardCall) -> float:
    """Of one image of a batch."""
    forward(model, images, call=call).cpu()  # the first is slower
    start = time.perf_counter()
    forward(model, images, call=call).cpu()  # waits for the device
    return (time.perf_counter() - start) / len(images)


def _painted_seconds(images: Tensor) -> float:
    """Of painting over the brighter half of one image, which is as scattered as the pixels of a map."""
    gray = images.mean(1, keepdim=True)
    hole = gray > gray.flatten(1).median(1).values[:, None, None, None]
    start = time.perf_counter()
    inpaint(images, hole).cpu()
    return (time.perf_counter() - start) / len(images)


def _seconds(model: nn.Module, images: Tensor, targets: Tensor, method: Method, hiding: Hiding) -> float:
    """Of one image's map."""

    class Started(Exception):
        pass

    expected = 0.0

    def extrapolate(what: str, done: int, total: int) -> None:
        nonlocal expected
        if images.is_cuda:
            torch.cuda.synchronize(images.device)
        expected = (time.perf_counter() - start) * total / done
        raise Started

    def run() -> None:
        try:
            explain(model, images, targets, [method], progress=extrapolate, **hiding.of_model)
        except Started:
            pass

    start = time.perf_counter()
    run()
    if expected:
        return expected / len(images)
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) / len(images)
