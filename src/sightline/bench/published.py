"""Published results beside ours: the numbers of papers, slides and logs, and the study that trains ours."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from sightline import data, recipe
from sightline.bench.measured import MeasuredRun
from sightline.bench.result import Bench, figure_of
from sightline.bench.study import Study
from sightline.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Published:
    """One experiment: a table, or a figure of maps, and how to train it here."""

    title: str
    needs: str
    """The data set."""
    study: Study
    figures: dict[str, dict[str, float | str]] = field(default_factory=dict[str, dict[str, float | str]])
    """Column -> row -> number, in percent unless the column says otherwise. Rows that the study lacks are quoted."""
    ours: dict[str, str] = field(default_factory=lambda: {"ours, error %": "error"})
    """Column -> what is measured of our runs: error, accuracy, sparsity, or TITLE, FIGURE of a task of the study."""
    figures_of: str = ""
    """A row of the study, where the rows of the table are figures of one task of it."""
    recalled: list[str] = field(default_factory=list[str])
    """Rows of the first column that were recalled, not read in a source: not to be quoted."""
    classes: int | None = None
    draws: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    """Row -> methods, of a page of maps of the first test images."""
    notes: list[str] = field(default_factory=list[str])

    def lines(self, result: Bench | None = None) -> tuple[list[str], list[list[str]]]:
        """Names of the columns, and a line of texts per row; with ours if there is a result."""
        first = next(iter(self.figures), "")
        quoted = dict.fromkeys(row for numbers in self.figures.values() for row in numbers)
        rows = [*(row for row in self.study.rows if row not in quoted and not self.figures_of), *quoted]
        columns = ["network", *self.figures]
        texts = {column: _texts(numbers) for column, numbers in self.figures.items()}
        if first:
            texts[first] |= {row: f"{texts[first][row]} *" for row in self.recalled}
        lines = [[row, *(of_row.get(row, "-") for of_row in texts.values())] for row in rows]
        if result is None:
            return columns, lines
        differences = {} if self.figures_of else result.differences()
        for column, measure in self.ours.items():
            columns.append(column)
            for line in lines:
                row = self.figures_of or line[0]
                digits, is_percent = (1, False) if measure == "sparsity" else (2, True)
                value = _value(measure.format(row=line[0]))
                line.append(result.over_seeds(row, value).text(digits, is_percent) if row in self.study.rows else "-")
        if differences:
            columns.append("accuracy to the control, points")
            for line in lines:
                line.append(differences[line[0]].points() if line[0] in differences else "-")
        return columns, lines

    def changed(self, study: Study) -> list[str]:
        """Differences between a study's recipe and this one, except where the data lies."""
        before, after = _fields(self.study.recipe), _fields(study.recipe)
        return [
            f"{name} {after.get(name)} instead of {before.get(name)}"
            for name in before | after
            if before.get(name) != after.get(name) and name != "data.source"
        ]


def _texts(numbers: Mapping[str, float | str]) -> dict[str, str]:
    """Numbers with the same decimals, as many as the source has; texts as they are.

    >>> _texts({"a": 30.62, "b": 7.7, "c": "61.7 ± 0.9"})
    {'a': '30.62', 'b': '7.70', 'c': '61.7 ± 0.9'}
    """
    digits = max((len(str(n).partition(".")[2]) for n in numbers.values() if not isinstance(n, str)), default=0)
    return {row: n if isinstance(n, str) else f"{n:.{digits}f}" for row, n in numbers.items()}


def _value(measure: str) -> Callable[[MeasuredRun], float]:
    named: dict[str, Callable[[MeasuredRun], float]] = {
        "error": lambda run: 1 - run.accuracy,
        "accuracy": lambda run: run.accuracy,
        "sparsity": lambda run: [*run.after.sparsity.values(), float("nan")][0],
    }
    return named[measure] if measure in named else partial(figure_of, *measure.split(", ", 1))


def _fields(start: Recipe) -> dict[str, Any]:
    parts = asdict(start)
    seeds, options = parts.pop("seeds"), parts["model"].pop("options")
    fields = {f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()}
    return fields | {f"model.options.{name}": value for name, value in options.items()} | {"seeds": seeds}


def _read() -> dict[str, Published]:
    content = recipe.read(Path(__file__).with_suffix(".yaml"))
    recipes: dict[str, dict[str, Any]] = content["recipes"]
    published: dict[str, Published] = {}
    for name, facts in content["published"].items():
        start = dict(recipes[facts.pop("recipe")])
        rows, tasks = start.pop("rows"), start.pop("tasks", {})
        only: Collection[str] = facts.pop("only", rows)
        study = Study(
            recipe=recipe.load(recipe.load(start), facts.pop("changes", {})),
            rows={row: rows[row] for row in only},
            tasks=facts.pop("tasks", tasks),
        )
        published[name] = Published(study=study, **facts)
    return published


PUBLISHED = _read()


def published(name: str, overrides: Mapping[str, Any] | None = None) -> tuple[Published, Study]:
    """A published experiment, and its study with single fields of the recipe changed.

    Raises:
        ValueError: nothing of this name, a field that is wrong, or images of another number of classes.
        OSError: there are no such images.
        TypeError: a field of the wrong type.

    >>> published("ltpa-cifar100")[0].figures["authors' log, error %"]["(VGG-att3)-concat-pc"]
    22.98
    """
    if name not in PUBLISHED:
        raise ValueError(f"expected one of {', '.join(PUBLISHED)}; got {name!r}")
    experiment = PUBLISHED[name]
    start = recipe.load(experiment.study.recipe, overrides)
    if start.data.source != experiment.study.recipe.data.source and experiment.classes is not None:
        classes = len(data.load(start.data)["test"].classes)
        if classes != experiment.classes:
            raise ValueError(
                f"expected images of {experiment.classes} classes as in {name}, got {classes} in {start.data.source}; "
                "use `sightline bench` to train these networks on other images"
            )
    return experiment, Study(recipe=start, rows=experiment.study.rows, tasks=experiment.study.tasks)
