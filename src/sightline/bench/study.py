"""A study: one recipe, the changes that make its rows, and the data sets on which they are compared."""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from sightline import data, models, recipe, runs
from sightline.notebook import brief
from sightline.recipe import Data, Model, Recipe
from sightline.tasks import check_options

_STEPS = 1024
"""Number of widths between 0 and 1 to try: twice the channels of the widest layer of a VGG."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """One recipe and the changes that make its rows. The first row is the control.

    Raises:
        ValueError: a row whose `control` or `as_large_as` cannot be one, or no such task or option of it.
        TypeError: an option of a task that is of the wrong type.
    """

    __repr__ = brief

    recipe: Recipe
    rows: dict[str, dict[str, Any]]
    """name -> dotted field -> value. An `optim.teacher` that is the name of a row means its run of the same seed.
    `control: ROW` names another control than the first row. `as_large_as: ROW` chooses the network's width so that its
    number of parameters is as near that row's as its channels allow. In Python, `model` is a network of your own: a
    module, or what builds it (see `sightline.runs.build`)."""
    datasets: dict[str, dict[str, Any]] = field(default_factory=lambda: {"": {}})
    """name -> dotted field -> value. The empty name: the data of the recipe."""
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    """Title -> `task: NAME`, a key of `sightline.tasks.TASKS`, and its options: what is measured beside accuracy."""

    def __post_init__(self) -> None:
        for name, row in self.rows.items():
            for key in ("control", "as_large_as"):
                other = row.get(key)
                if key in row and (other not in self.rows or other == name):
                    among = "; ".join(row for row in self.rows if row != name)
                    raise ValueError(f"row {name!r}: expected `{key}` to be another row out of: {among}; got {other!r}")
            if "as_large_as" in self.rows.get(row.get("as_large_as", ""), {}):
                raise ValueError(
                    f"row {name!r}: expected `as_large_as` a row without `as_large_as`, got {row['as_large_as']!r}"
                )
            if "as_large_as" in row and "model.options.width" in row:
                raise ValueError(f"row {name!r}: expected no model.options.width beside `as_large_as`, which sets it")
            if {name, row.get("as_large_as", name)} & self.own.keys() and "as_large_as" in row:
                raise ValueError(f"row {name!r}: expected networks that recipes name with `as_large_as`, got your own")

        for title, asked in self.tasks.items():
            options = {name: value for name, value in asked.items() if name != "task"}
            try:
                check_options(asked.get("task", title), options)
            except (TypeError, ValueError) as error:
                raise type(error)(f"task {title!r}: {error}") from error

    @property
    def control(self) -> str:
        """The first row."""
        return next(iter(self.rows))

    def named(self, key: str) -> dict[str, str]:
        """Row -> the row that it names as its `control` or `as_large_as`."""
        return {name: row[key] for name, row in self.rows.items() if key in row}

    @property
    def own(self) -> dict[str, runs.Own]:
        """Row -> its network of your own."""
        return {name: row["model"] for name, row in self.rows.items() if callable(row.get("model"))}

    def plain(self) -> dict[str, dict[str, Any]]:
        """The rows with the names of networks of your own in their place, as YAML can hold them."""
        own = self.own
        return {
            name: {key: value for key, value in row.items() if key != "model"}
            | {"model.name": runs.own_name(own[name])}
            if name in own
            else row
            for name, row in self.rows.items()
        }

    def changed(self, row: str, dataset: str = "") -> Recipe:
        """The recipe of a row, before its width is chosen and its teacher is a folder."""
        changes = {name: value for name, value in self.plain()[row].items() if name not in ("control", "as_large_as")}
        if row in self.own:
            changes |= {"model.options": {}, "model.weights": None}
        return recipe.load(self.recipe, {**self.datasets[dataset], **changes})

    def of(self, row: str, seed: int, out: Path, dataset: str = "") -> Recipe:
        """The recipe of one run. For a row `as_large_as` another, the data is read for its number of classes."""
        start = replace(self.changed(row, dataset), seeds=(seed,))
        if (teacher := self.rows[row].get("optim.teacher")) in self.rows:
            start = replace(start, optim=replace(start.optim, teacher=str(folder(out, teacher, seed, dataset))))
        if "as_large_as" in self.rows[row]:
            model = self.changed(self.rows[row]["as_large_as"], dataset).model
            classes = _classes(start.data)
            try:
                width = width_for(start.model, classes, _parameters(model.name, _options(model), classes))
            except ValueError as error:
                raise ValueError(f"row {row!r}, as large as {self.rows[row]['as_large_as']!r}: {error}") from error
            start = recipe.load(start, {"model.options.width": width})
        return start


def width_for(model: Model, classes: int, parameters: int) -> float:
    """The width, in steps of 1/1024, that brings a network nearest to a number of parameters.

    Raises:
        ValueError: the network has no width, or cannot have that many parameters.

    >>> width_for(Model(name="vgg15", options={"width": 0.125}), 10, 300_000)
    0.123046875
    """
    counts: dict[int, int] = {}

    def is_below(step: int) -> bool:
        options = _options(replace(model, options={**model.options, "width": step / _STEPS}))
        counts[step] = _parameters(model.name, options, classes)
        return counts[step] < parameters

    low, high = 0, max(round(_STEPS * model.options.get("width", 1.0)), 1)
    while is_below(high):
        low, high = high, 2 * high
        if high > 64 * _STEPS:
            raise ValueError(f"expected a network that can have {parameters:,} parameters, got {model.name}")
    while high - low > 1:
        middle = (low + high) // 2
        try:
            below = is_below(middle)
        except ValueError:  # too narrow to be built
            below = True
        low, high = (middle, high) if below else (low, middle)
    return min(counts, key=lambda step: (abs(counts[step] - parameters), step)) / _STEPS


def _options(model: Model) -> str:
    return json.dumps(model.options, sort_keys=True)


@cache
def _parameters(name: str, options: str, classes: int) -> int:
    with torch.random.fork_rng(devices=[]):
        model = models.create_model(name, num_classes=classes, **json.loads(options))
    return sum(p.numel() for p in model.parameters())


@cache
def _classes(source: Data) -> int:
    return len(data.load(source)["test"].classes)


def load_study(
    path: Path | str,
    overrides: Mapping[str, Any] | None = None,
    rows_done: Collection[str] | None = None,
    datasets_done: Collection[str] | None = None,
) -> Study:
    """Read a study: a recipe with an additional part `rows`, and optionally `datasets` and `tasks`.

    Args:
        path: the file.
        overrides: fields of the recipe. One that a row or data set sets itself is refused.
        rows_done: rows that will be trained; only these matter for `overrides`. None: all.
        datasets_done: the same for data sets.

    Raises:
        OSError: there is no such file.
        TypeError, ValueError: no rows, or a field that is wrong; the row is named.
    """
    content = recipe.read(Path(path))
    parts: dict[str, Any] = {"rows": None, "datasets": {"": {}}, "tasks": {}}
    if isinstance(content, dict):
        parts |= {kind: content.pop(kind) for kind in parts if kind in content}
    tasks = parts.pop("tasks")
    if isinstance(tasks, list):
        tasks = {name: {} for name in tasks}
    if not isinstance(tasks, dict) or not all(isinstance(options, dict) for options in tasks.values()):
        raise ValueError(f"{path}: expected `tasks` as names, or each a title with `task: NAME` and its options")
    rows, datasets = (_changes(path, kind, part) for kind, part in parts.items())
    study = Study(recipe=recipe.load(content, overrides), rows=rows, datasets=datasets, tasks=tasks)
    for kind, changes, done in (("data set", study.datasets, datasets_done), ("row", study.rows, rows_done)):
        for name in changes if done is None else [name for name in changes if name in done]:
            if covered := [override for override in overrides or {} if override in changes[name]]:
                raise ValueError(
                    f"--{covered[0]}: expected a field that the study does not set, got one that its {kind} {name!r} "
                    f"sets itself; change it in the file, or choose by --{kind.replace(' ', '')}"
                )
    for name, row in study.rows.items():
        for dataset, changes in study.datasets.items():
            place = f"row {name!r}" + (f" on {dataset}" if dataset else "")
            if "seeds" in row or "seeds" in changes:
                raise ValueError(f"{place}: expected the same seeds everywhere; write `seeds` beside `rows`")
            try:
                study.changed(name, dataset)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{place}: {error}") from error
        teacher = row.get("optim.teacher")
        if teacher in study.rows and study.rows[teacher].get("optim.teacher") in study.rows:
            raise ValueError(f"row {name!r}: expected a teacher that has no row as its own teacher, got {teacher!r}")
    return study


_EXPECTED = {
    "rows": "a part `rows`, each a name with changes to the recipe such as `se: {model.options.attention: se}`; the "
    "first is the control",
    "datasets": "each of `datasets` to be a name with changes to the recipe such as `cifar10: {data.source: cifar10}`",
}


def _changes(path: Path | str, kind: str, part: Any) -> dict[str, dict[str, Any]]:
    """One part of a study: names that can be folders, and changes to the recipe."""
    if not isinstance(part, dict) or not part or not all(isinstance(changes, dict) for changes in part.values()):
        raise ValueError(f"{path}: expected {_EXPECTED[kind]}")
    folders = [_plain(str(name)) for name in part]
    for name, plain in zip(part, folders, strict=True):
        if not any(letter.isalnum() for letter in plain) and (kind, part) != ("datasets", {"": {}}):
            raise ValueError(f"{path}: expected names of {kind} with a letter or a digit, got {name!r}")
        if folders.count(plain) > 1:
            raise ValueError(f"{path}: expected names of {kind} that differ in letters or digits, got {name!r} twice")
    return {str(name): changes for name, changes in part.items()}


def folder(out: Path, row: str, seed: int, dataset: str = "") -> Path:
    """The folder of a run of a study.

    >>> folder(Path("out"), "LTPA pc", 0).as_posix(), folder(Path("out"), "SE", 1, "cifar10").as_posix()
    ('out/LTPA_pc/seed-0', 'out/cifar10/SE/seed-1')
    """
    return out / _plain(dataset) / _plain(row) / f"seed-{seed}"


def _plain(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_.," else "_" for letter in name)
