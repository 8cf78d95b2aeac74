"""Which of several methods fit a model, and what those with many passes will take."""

import time
from collections.abc import Collection
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from sightline.explainers.explain import Method, explain, fitting, named
from sightline.explainers.scorer import Targets

TOLD = 10.0
"""Expected seconds from which on they are told."""
_TIMED = 8  # images in a batch that is timed on a CPU, where larger ones are no faster
_LONG = 1.0  # seconds after which no second timing is needed


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


def prices(
    model: nn.Module, images: Tensor, targets: Targets, methods: Collection[Method], **options: Any
) -> dict[str, float]:
    """Expected seconds per image of those methods that run the model on many changed images.

    Their first batches are timed, small ones on a CPU; the options are those of `explain`.
    """
    options["batch_size"] = timed_size(images, options.get("batch_size", 64))
    slow = {name: method for method in methods for name, explainer, *_ in [named(method)] if explainer.many_passes}
    return {name: seconds_per_image(model, images, targets, method, **options) for name, method in slow.items()}


def timed_size(images: Tensor, batch_size: int) -> int:
    """Images in a batch whose time is taken."""
    return batch_size if images.is_cuda else min(batch_size, _TIMED)


def seconds_per_image(model: nn.Module, images: Tensor, targets: Targets, method: Method, **options: Any) -> float:
    """Expected seconds for the map of one image; of a method with many passes, the first batches are timed, twice."""

    class Enough(Exception):
        pass

    expected = 0.0
    marks: list[tuple[float, int]] = []

    def extrapolate(what: str, done: int, total: int) -> None:
        nonlocal expected
        if images.is_cuda:
            torch.cuda.synchronize(images.device)
        now, (before, already) = time.perf_counter(), marks[-1]
        expected = (now - before) * total / (done - already)
        marks.append((now, done))
        if len(marks) > 2 or done == total:
            raise Enough

    for _ in range(2):  # the first is slower
        marks[:] = [(time.perf_counter(), 0)]
        with suppress(Enough):
            explain(model, images, targets, [method], progress=extrapolate, **options)
            expected = time.perf_counter() - marks[0][0]
        if time.perf_counter() - marks[0][0] > _LONG:
            break
    return expected / len(images)
