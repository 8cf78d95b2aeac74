"""Published results beside ours: the paper's row, that of the authors' log, and the study that trains ours."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sightline import data, recipe
from sightline.bench.result import Bench
from sightline.bench.study import Study
from sightline.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Published:
    """Top-1 errors of one experiment in percent, and how to train it here."""

    title: str
    classes: int
    study: Study
    paper: dict[str, float]
    """Row -> error in the paper's table."""
    recalled: list[str]
    """Rows of `paper` that were recalled, not read in a source: not to be quoted."""
    log: dict[str, float]
    """Row -> error in the authors' run scripts, converted from the accuracy written there."""
    notes: list[str]

    def lines(self, result: Bench | None = None) -> tuple[list[str], list[list[str]]]:
        """Names of the columns, and a line of texts per row; with ours if there is a result."""
        columns = ["network", "paper, error %", "authors' log, error %"]
        lines: list[list[str]] = []
        for row in self.study.rows:
            paper = f"{self.paper[row]:.2f}" + (" *" if row in self.recalled else "") if row in self.paper else "-"
            lines.append([row, paper, f"{self.log[row]:.2f}" if row in self.log else "-"])
        if result is not None:
            columns += ["ours, error %", "accuracy to the control, points"]
            differences = result.differences()
            for line in lines:
                line.append(result.over_seeds(line[0], lambda run: 1 - run.accuracy).text(2, percent=True))
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


def _fields(start: Recipe) -> dict[str, Any]:
    parts = asdict(start)
    seeds, options = parts.pop("seeds"), parts["model"].pop("options")
    fields = {f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()}
    return fields | {f"model.options.{name}": value for name, value in options.items()} | {"seeds": seeds}


def _read() -> dict[str, Published]:
    content = recipe.read(Path(__file__).with_suffix(".yaml"))
    experiments, rows = content.pop("published"), content.pop("rows")
    start = recipe.load(content)
    published: dict[str, Published] = {}
    for name, facts in experiments.items():
        chosen = {row: changes for row, changes in rows.items() if row in facts["log"] or row == next(iter(rows))}
        study = Study(recipe=recipe.load(start, facts.pop("changes")), rows=chosen)
        published[name] = Published(study=study, **facts)
    return published


PUBLISHED = _read()


def published(name: str, overrides: Mapping[str, Any] | None = None) -> tuple[Published, Study]:
    """A published experiment, and its study with single fields of the recipe changed.

    Raises:
        ValueError: nothing of this name, a field that is wrong, or images of another number of classes.
        OSError: there are no such images.
        TypeError: a field of the wrong type.

    >>> published("ltpa-cifar100")[0].log["(VGG-att3)-concat-pc"]
    22.98
    """
    if name not in PUBLISHED:
        raise ValueError(f"expected one of {', '.join(PUBLISHED)}; got {name!r}")
    experiment = PUBLISHED[name]
    start = recipe.load(experiment.study.recipe, overrides)
    if start.data.source != experiment.study.recipe.data.source:
        classes = len(data.load(start.data)["test"].classes)
        if classes != experiment.classes:
            raise ValueError(
                f"expected images of {experiment.classes} classes as in {name}, got {classes} in {start.data.source}; "
                "use `sightline bench` to train these networks on other images"
            )
    return experiment, Study(recipe=start, rows=experiment.study.rows)
