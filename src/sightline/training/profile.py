"""Where the time of a training step goes."""

import os
from collections.abc import Iterable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile, schedule

PARTS = ("images", "forward", "backward", "optimizer")
_SKIPPED, _WARM, _MEASURED, _OPERATIONS = 3, 2, 10, 8


class StepProfile:
    """Watches ten steps after the first five and prints a table; the steps run slower while they are watched.

    Raises:
        ValueError: so many steps do not come.
    """

    def __init__(self, device: torch.device, steps: int) -> None:
        self._left = _SKIPPED + _WARM + _MEASURED
        if steps < self._left:
            raise ValueError(f"a profile expects {self._left} steps, got {steps}; set optim.epochs higher")
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it speaks of GPUs where there is none
        self._on_gpu = device.type == "cuda"
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if self._on_gpu else [])
        plan = schedule(skip_first=_SKIPPED, wait=0, warmup=_WARM, active=_MEASURED, repeat=1)
        self._profiler = profile(activities=activities, schedule=plan, on_trace_ready=self._show)
        self._profiler.start()

    def step(self) -> None:
        """A step is done."""
        if self._left:
            self._profiler.step()
            self._left -= 1
            if not self._left:
                self._profiler.stop()

    def _show(self, profiler: Any) -> None:
        events = profiler.key_averages()
        parts = [event for event in events if event.key in PARTS]  # each twice on a GPU: on the host and there
        host = {event.key: event.cpu_time_total for event in parts if "CPU" in str(event.device_type)}
        host = {name: host[name] for name in PARTS if name in host}
        device = {event.key: event.device_time_total for event in parts if "CPU" not in str(event.device_type)}
        whole = sum(event.cpu_time_total for event in events if event.key.startswith("ProfilerStep"))
        table = Table(title=f"where {_MEASURED} steps spent their time, ms per step")
        for name in ("part", "host", "share of host", *(["device"] if self._on_gpu else [])):
            table.add_column(name, justify="left" if name == "part" else "right")
        for name, time in (host | {"the rest": whole - sum(host.values())}).items():
            cells = [_ms(time), f"{time / whole:.0%}"] + ([_ms(device.get(name, 0))] if self._on_gpu else [])
            table.add_row(name, *cells)
        table.add_row("a step", _ms(whole), "100%", *([_ms(sum(device.values()))] if self._on_gpu else []))
        table.add_section()
        for event in self._costliest(events):
            own = event.self_device_time_total if self._on_gpu else event.self_cpu_time_total
            cells = ["", _ms(own)] if self._on_gpu else [f"{own / whole:.0%}"]
            table.add_row(event.key, "" if self._on_gpu else _ms(own), *cells)
        Console(stderr=True).print(table)

    def _costliest(self, events: Iterable[Any]) -> list[Any]:
        """Operations by their own time, without the parts around them."""
        operations = [event for event in events if event.key not in PARTS and not event.key.startswith("Profiler")]
        time = "self_device_time_total" if self._on_gpu else "self_cpu_time_total"
        return sorted(operations, key=lambda event: getattr(event, time), reverse=True)[:_OPERATIONS]


def _ms(microseconds: float) -> str:
    return f"{microseconds / 1000 / _MEASURED:.2f}"
