"""What of an evaluation fits into a time budget."""

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from sightline.explainers import Method, explain
from sightline.inference import forward
from sightline.metrics import METRICS, Hiding, HidingMetric, frames_of, inpaint, inputs_of
from sightline.metrics.hiding import ROAD_SHARES

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
    many = images.repeat(max(hiding.batch_size // len(images), 1), *[1] * (images.ndim - 1))
    per_forward = _forward_seconds(model, many)
    per_painted = _painted_seconds(many) if _needs(metrics) & _PAINTED else 0.0
    explaining = {name: _seconds(model, images, targets, method) for name, method in methods.items()}
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
        saved = {name: whole - cost(kept.keys() - {name}, measured) for name in kept if name not in controls}
        saved = saved if len(saved) > 1 else {}
        if len(measured) > 1:
            saved |= {name: whole - cost(kept, [m for m in measured if m != name]) for name in measured}
        saved = {name: seconds for name, seconds in saved.items() if seconds > 0}
        if not saved:
            break
        dearest = max(saved, key=lambda name: saved[name])
        left_out[dearest] = f"{saved[dearest] * fewest:,.0f} s for {fewest} images, of {budget:,.0f} s for everything"
        kept.pop(dearest, None)
        measured = [metric for metric in measured if metric != dearest]
    per_image = cost(kept, measured)
    images_made = max(min(limit, int(budget / per_image)), 1)
    return Plan(
        methods=tuple(kept),
        metrics=tuple(measured),
        limit=images_made,
        seconds=per_image * images_made,
        left_out=left_out,
    )


def _needs(metrics: Collection[str]) -> frozenset[str]:
    functions = [METRICS[metric].function for metric in metrics]
    return frozenset[str]().union(*(function.needs for function in functions if isinstance(function, HidingMetric)))


def _forward_seconds(model: nn.Module, images: Tensor) -> float:
    """Of one image of a batch."""
    forward(model, images[:1]).cpu()
    start = time.perf_counter()
    forward(model, images).cpu()  # waits for the device
    return (time.perf_counter() - start) / len(images)


def _painted_seconds(images: Tensor) -> float:
    """Of painting over the brighter half of one image, which is as scattered as the pixels of a map."""
    grey = images.mean(1, keepdim=True)
    hole = grey > grey.flatten(1).median(1).values[:, None, None, None]
    start = time.perf_counter()
    inpaint(images, hole).cpu()
    return (time.perf_counter() - start) / len(images)


def _seconds(model: nn.Module, images: Tensor, targets: Tensor, method: Method) -> float:
    """Of one image's map."""

    class Started(Exception):
        pass

    expected = 0.0

    def extrapolate(what: str, done: int, total: int) -> None:
        nonlocal expected
        expected = (time.perf_counter() - start) * total / done
        raise Started

    def run() -> None:
        try:
            explain(model, images, targets, [method], progress=extrapolate)
        except Started:
            pass

    start = time.perf_counter()
    run()
    if expected:
        return expected / len(images)
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) / len(images)
