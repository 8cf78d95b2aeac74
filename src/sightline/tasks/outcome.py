"""What a network reaches in a task: figures with intervals, and how they are read."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import numpy as np
from jaxtyping import Float64, Shaped
from torch import nn

from sightline import notebook, recipe, runs
from sightline.arguments import checked_options
from sightline.facts import Interval, did_you_mean
from sightline.metrics.uncertainty import mean_interval
from sightline.notebook import brief

_Function = TypeVar("_Function", bound=Callable[..., "Outcome"])
Array = np.ndarray


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure of a task: the mean of a value per unit, such as a query, an episode or an image.

    >>> Figure(values=np.array([0.0, 1.0, np.nan]), unit="queries").interval.value
    0.5
    """

    __repr__ = brief

    values: Float64[Array, " n"]
    """One per unit; NaN where there is none."""
    unit: str
    """What is counted, in the plural."""
    groups: Shaped[Array, " n"] | None = None
    """Units with the same group, such as the queries of a person, are drawn together for the interval."""
    of: str = "groups"
    """What the groups are, in the plural."""
    higher_is_better: bool | None = True
    """None: neither."""
    chance: float | None = None
    """What guessing reaches, if that is known."""

    @cached_property
    def interval(self) -> Interval:
        """The mean with its 95 % bootstrap interval."""
        return mean_interval(self.values, self.groups)

    @property
    def counted(self) -> str:
        """How many units the mean is over, and how many groups the interval.

        >>> Figure(values=np.ones(4), unit="queries", groups=np.array([0, 0, 1, 1]), of="identities").counted
        '4 queries of 2 identities'
        """
        units = f"{self._defined:,} {self.unit}"
        return units if self.groups is None else f"{units} of {self.interval.n:,} {self.of}"

    @property
    def _defined(self) -> int:
        return int((~np.isnan(self.values)).sum())

    def facts(self) -> dict[str, Any]:
        """What a file keeps of it."""
        interval = self.interval
        return {
            "value": interval.value,
            "low": interval.low,
            "high": interval.high,
            "n": self._defined,
            "unit": self.unit,
            "groups": None if self.groups is None else interval.n,
            "of": None if self.groups is None else self.of,
            "undefined": len(self.values) - self._defined,
            "higher_is_better": self.higher_is_better,
            "chance": self.chance,
        }


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a network reaches in one task."""

    task: str
    figures: dict[str, Figure]
    """In the order of importance: a study compares its rows by the first."""
    names: dict[str, list[str]]
    """Unit -> the name of each, where they have names."""
    notices: tuple[str, ...] = ()
    """Decisions that a reader of the figures should know; one sentence each."""

    def __repr__(self) -> str:
        figures = (
            f"  {name}: {figure.interval} over {figure.interval.n:,} {figure.unit}"
            for name, figure in self.figures.items()
        )
        return "\n".join([f"Outcome of {self.task}:", *figures])

    def _repr_html_(self) -> str:
        return notebook.heading(self.task) + notebook.table(*self.table()) + notebook.sentences(self.notices)

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Names of the columns, and a line of texts per figure.

        >>> hits = Figure(values=np.array([0.0, 1.0, 1.0, 1.0]), unit="queries", chance=0.1)
        >>> Outcome(task="retrieval", figures={"rank-1": hits}, names={}).table()[1][0][:2]
        ['rank-1', '0.750']
        """
        lines: list[list[str]] = []
        for name, figure in self.figures.items():
            interval = figure.interval
            chance = "-" if figure.chance is None else f"{figure.chance:.3f}"
            ends = f"[{interval.low:.3f}, {interval.high:.3f}]"
            lines.append([name, f"{interval.value:.3f}", ends, chance, figure.counted])
        return ["figure", "mean", "95 % interval", "chance", "over"], lines

    def to_json(self, file: Path) -> None:
        """Write the figures, and the value of each unit."""
        content = {
            "task": self.task,
            "figures": {name: figure.facts() for name, figure in self.figures.items()},
            "notices": list(self.notices),
            "values": {name: figure.values.tolist() for name, figure in self.figures.items()},
            "names": self.names,
        }
        runs.write(file, json.dumps(runs.plain(content), indent=1).encode())


TASKS: dict[str, Callable[..., Outcome]] = {}
"""Name -> what measures a network in a task, called with (run, model, **options)."""


def register(name: str) -> Callable[[_Function], _Function]:
    """Enter a task into `TASKS`: a function of a run and its network, whose further parameters are options."""

    def enter(function: _Function) -> _Function:
        TASKS[name] = function
        return function

    return enter


def check_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a task, each as its type; text, as of a command line, is read.

    Raises:
        ValueError: no such task or option.
        TypeError: an option of the wrong type.
    """
    if name not in TASKS:
        choices = f"expected one of {', '.join(TASKS)}"
        raise ValueError(f"no task {name!r}{did_you_mean(name, TASKS, choices)}")
    given = checked_options(TASKS[name], options, f"task {name}")
    kinds = get_type_hints(TASKS[name])
    return {
        option: recipe.converted(f"task.{option}", None if value == "null" else value, kinds[option])
        for option, value in given.items()
    }


def perform(name: str, run: runs.Run, model: nn.Module | None = None, **options: Any) -> Outcome:
    """Measure a run in a task.

    Args:
        name: a key of `TASKS`.
        run: a trained run.
        model: its network, if it is loaded already. None: that of the run, on the best device.
        options: of the task; see `check_options`.

    Raises:
        ValueError: no such task or option, or the run does not suit the task.
        TypeError: an option of the wrong type.
        OSError: the run or the images of the task are missing.
    """
    chosen = check_options(name, options)
    if model is None:
        model = runs.load_model(run.folder).to(runs.best_device())
    return TASKS[name](run, model, **chosen)
