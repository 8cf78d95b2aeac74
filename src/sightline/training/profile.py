"""Where the time of a training step goes."""

import os
from typing import Any

import torch
from rich.console import Console
from rich.table import Column, Table
from torch.profiler import ProfilerActivity, profile, schedule

PARTS = ("images", "forward", "backward", "optimizer")
_SKIPPED, _WARMUP, _MEASURED, _OPERATIONS = 3, 2, 10, 8


class StepProfile:
    """Profiles ten steps after the first five and prints a table; profiled steps are slower.

    Args:
        device: where the training runs.
        steps: steps that will follow.
        seen: images of the epoch that are trained already.

    Raises:
        ValueError: fewer steps than a profile takes.
    """

    def __init__(self, device: torch.device, steps: int, seen: int) -> None:
        self._left, self._seen = _SKIPPED + _WARMUP + _MEASURED, seen
        if steps < self._left:
            raise ValueError(f"a profile expects {self._left} steps, got {steps}; set optim.epochs higher")
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler warns about missing GPUs
        self._device = "device" if device.type == "cuda" else "cpu"
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
        plan = schedule(skip_first=_SKIPPED, wait=0, warmup=_WARMUP, active=_MEASURED, repeat=1)
        self._profiler = profile(activities=activities, schedule=plan, on_trace_ready=self._print)
        self._profiler.start()

    def step(self, seen: int) -> None:
        """Count a training step; a validated batch, after which no more images are `seen`, is none."""
        if self._left and seen != self._seen:
            self._seen = seen
            self._profiler.step()
            self._left -= 1
            if not self._left:
                self._profiler.stop()

    def _print(self, profiler: Any) -> None:
        events = profiler.key_averages()
        parts = [event for event in events if event.key in PARTS]  # each twice on a GPU: host and device
        host = {event.key: event.cpu_time_total for event in parts if "CPU" in str(event.device_type)}
        host = {name: host[name] for name in PARTS if name in host}
        device = {event.key: event.device_time_total for event in parts if "CPU" not in str(event.device_type)}
        total = sum(event.cpu_time_total for event in events if event.key.startswith("ProfilerStep"))
        rows = [*host.items(), ("other", total - sum(host.values())), ("total", total)]
        device["total"] = sum(device.values())
        on_gpu = self._device == "device"
        columns = ("host", "share of host", *(["device"] if on_gpu else []))
        right = [Column(name, justify="right") for name in columns]
        table = Table("part", *right, title=f"where {_MEASURED} steps spent their time, ms per step")
        for name, time in rows:
            table.add_row(name, _ms(time), f"{time / total:.0%}", *([_ms(device.get(name, 0))] if on_gpu else []))
        table.add_section()
        key = f"self_{self._device}_time_total"
        operations = [event for event in events if event.key not in PARTS and not event.key.startswith("Profiler")]
        operations.sort(key=lambda event: getattr(event, key), reverse=True)
        for event in operations[:_OPERATIONS]:
            time = getattr(event, key)
            table.add_row(event.key, *(["", "", _ms(time)] if on_gpu else [_ms(time), f"{time / total:.0%}"]))
        Console(stderr=True).print(table)


def _ms(microseconds: float) -> str:
    return f"{microseconds / 1000 / _MEASURED:.2f}"
