"""Functions that measure and store every speed in this folder."""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from sightline.cli import keep_freed_memory as keep_freed_memory

RESULTS = Path(__file__).parent / "results"


class Ratio(NamedTuple):
    """Time of one thing divided by the time of another; `low` to `high` is the 95 % interval of the median."""

    median: float
    low: float
    high: float
    aa: float
    """Median of the same ratio for two calls of the identical reference: how far noise alone moves it."""


def seconds(call: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def cpu_seconds(call: Callable[[], object]) -> float:
    """Processor time of one call, of all threads of this process: other programs change it little."""
    start = time.process_time()
    call()
    return time.process_time() - start


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % bootstrap interval of the median; the same values always give the same interval."""
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(np.asarray(values), size=(10_000, len(values))), axis=1)
    low, high = np.quantile(medians, [0.025, 0.975])
    return float(low), float(high)


def pairs(
    ours: Callable[[], object],
    reference: Callable[[], object],
    n: int = 21,
    clock: Callable[[Callable[[], object]], float] = seconds,
) -> Ratio:
    """Ratio ours / reference over `n` interleaved rounds of reference, ours, reference.

    The order of the first two alternates, because the machine drifts less within a round than between rounds. Each call
    runs once before measuring. A bar holds if it lies inside or above the interval.
    """
    ours()
    reference()
    ratios: list[float] = []
    same: list[float] = []
    for turn in range(n):
        if turn % 2:
            mine, first = clock(ours), clock(reference)
        else:
            first, mine = clock(reference), clock(ours)
        second = clock(reference)
        ratios.append(mine / first)
        same.append(second / first)
    return Ratio(statistics.median(ratios), *interval(ratios), statistics.median(same))


def contest(calls: Mapping[str, Callable[[], object]], reference: Callable[[], object], n: int) -> dict[str, Ratio]:
    """Ratio of each call to the reference over `n` rounds, in each of which everything runs, the reference twice.

    The order of the calls moves on by one from round to round. Each runs twice before measuring.
    """
    for call in (*calls.values(), reference) * 2:
        call()
    ratios: dict[str, list[float]] = {name: [] for name in calls}
    same: list[float] = []
    for turn in range(n):
        first = seconds(reference)
        names = [*calls][turn % len(calls) :] + [*calls][: turn % len(calls)]
        for place, name in enumerate(names):
            ratios[name].append(seconds(calls[name]) / first)
            if place == len(names) // 2:
                same.append(seconds(reference) / first)
    aa = statistics.median(same)
    return {name: Ratio(statistics.median(values), *interval(values), aa) for name, values in ratios.items()}


def peak(call: Callable[[], object]) -> int:
    """Highest number of bytes that a call allocates at once, without its arguments."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        result = call()
    del result
    held = highest = 0
    for event in sorted(record.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            highest = max(highest, held)
    return highest


def batches_of(model: nn.Module, call: Callable[[], object]) -> list[int]:
    """Number of images in each forward pass of the call."""
    seen: list[int] = []
    handle = model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    call()
    handle.remove()
    return seen


def bare(model: nn.Module, images: Tensor, sizes: list[int]) -> None:
    with torch.no_grad():
        for size in sizes:
            model(images[:size])


class Rows:
    """The rows of one script: each is printed once measured, and all are written if none was left out."""

    def __init__(self, about: str | None) -> None:
        parser = argparse.ArgumentParser(description=about)
        parser.add_argument("--rounds", type=int, default=21, metavar="N", help="interleaved rounds of a row (21)")
        parser.add_argument("--only", default="", metavar="WORD", help="rows that contain the word; writes nothing")
        arguments = parser.parse_args()
        self.rounds, self.only = arguments.rounds, arguments.only
        self.rows: list[dict[str, object]] = []

    def ratio(
        self,
        what: str,
        ours: Callable[[], object],
        reference: Callable[[], object],
        bar: float | None,
        most: int | None = None,
    ) -> None:
        """Measure one row, in at most `most` rounds."""
        if self.only not in what:
            return
        rounds = min(self.rounds, most or self.rounds)
        self._add(what, pairs(ours, reference, rounds), rounds, bar)

    def contest(
        self, calls: Mapping[str, Callable[[], object]], reference: Callable[[], object], bars: Mapping[str, float]
    ) -> None:
        """Measure a row for each call, all in the same rounds."""
        calls = {what: call for what, call in calls.items() if self.only in what}
        if calls:
            for what, ratio in contest(calls, reference, self.rounds).items():
                self._add(what, ratio, self.rounds, bars.get(what))

    def _add(self, what: str, ratio: Ratio, rounds: int, bar: float | None) -> None:
        end = "" if bar is None else f"  bar {bar:.2f}"
        print(f"{what:62} {ratio.median:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]  A/A {ratio.aa:.3f}{end}", flush=True)
        self.rows.append({"what": what, "rounds": rounds, **ratio._asdict(), "bar": bar})

    def memory(self, what: str, ours: Callable[[], object], reference: Callable[[], object]) -> None:
        """Peak memory divided by that of the reference, on a CPU."""
        if self.only not in what:
            return
        self.number(what, peak(ours) / peak(reference), None)

    def number(self, what: str, value: float, bar: float | None) -> None:
        """Add a row that is not a time."""
        if self.only not in what:
            return
        print(f"{what:62} {value:.3g}" + ("" if bar is None else f"  bar {bar}"), flush=True)
        self.rows.append({"what": what, "median": value, "bar": bar})

    def save(self, name: str, where: str) -> None:
        """Write all rows, if all were asked for."""
        if not self.only:
            print(save(name, [{"where": where}, *self.rows]))


def hardware() -> str:
    """Processor, cores this process may use, and accelerator, without the name of the machine."""
    names = [
        line.split(":", 1)[1].strip()
        for line in (Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else "").splitlines()
        if line.startswith("model name")
    ]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{names[0] if names else platform.machine()}, {cores} cores{gpu}"


def save(name: str, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write `results/<name>.json`: the rows, the versions and the hardware."""
    packages = ("torch", "torchvision", "timm", "numpy", "lightning", "datasets", "onnxruntime")
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    document = {
        "script": f"benchmarks/{name}.py",
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware(),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in packages if find_spec(name)},
        "rows": [dict(row) for row in rows],
    }
    path.write_text(json.dumps(document, indent=2) + "\n")
    return path
