"""Results of a study: tables, differences to the control, sentences no stronger than their intervals."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import mean, stdev
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import ttest_1samp

from sightline import notebook
from sightline.bench.measured import QUALITY, MeasuredRun
from sightline.evaluation.ranking import LEVEL
from sightline.facts import capitalized, joined
from sightline.metrics.uncertainty import holm
from sightline.models.costs import Costs
from sightline.report.studies import Cell

_MAPS = {"own": "own map", "activation_map": "activation map", "center_map": "center control"}
_MEASURES = {"energy_in_mask": "in mask", "sparsity": "sparsity", "deletion_auc": "deletion"}
_SPREAD = 1e-9
"""Standard deviation below which differences are equal up to rounding."""
CHEAP = (
    "p, corrected",
    "parameters",
    "M multiply-adds",
    "ms / image",
    "s / epoch",
    *(f"deletion, {m}" for m in _MAPS.values()),
)
"""Columns in which lower is better."""


class Summary(NamedTuple):
    """Mean and standard deviation over seeds; NaN where there is none."""

    mean: float
    deviation: float

    def text(self, digits: int = 3, percent: bool = False) -> str:
        """The two with a ± between; "-" for NaN.

        >>> Summary(0.961, 0.003).text(1, percent=True), Summary(math.nan, math.nan).text()
        ('96.1 ± 0.3', '-')
        """
        scale = 100 if percent else 1
        if math.isnan(self.mean):
            return "-"
        spread = "" if math.isnan(self.deviation) else f" ± {scale * self.deviation:.{digits}f}"
        return f"{scale * self.mean:.{digits}f}{spread}"


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A row's figure minus another one, paired over the seeds that both have."""

    other: str
    by_seed: dict[int, float]
    mean: float
    low: float
    high: float
    """Ends of Student's 95 % interval over seeds, that is over other trainings of the same two networks; NaN below
    two seeds, or if all differences are equal."""
    p: float
    """Of Student's paired test; NaN below two seeds, or if all differences are equal, which is no certainty."""
    adjusted: float
    """After Holm's correction over all rows compared on the data set; NaN for rows that serve as controls."""
    whole: bool = True
    """Whether both rows have all their runs."""

    @property
    def holds(self) -> bool:
        """Whether the difference is significant after the correction, and no run is missing."""
        return self.whole and self.adjusted < LEVEL

    def points(self, unit: str = "") -> str:
        """Percentage points, with the interval if there is one.

        >>> paired({"a": ("b", {0: 0.01, 1: 0.02, 2: 0.03})})["a"].points(" points")
        '+2.0 points [-0.5, +4.5]'
        """
        ends = "" if math.isnan(self.low) else f" [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"
        return f"{100 * self.mean:+.1f}{unit}{ends}"


def _accuracy(run: MeasuredRun) -> float:
    return run.accuracy


@dataclass(frozen=True, kw_only=True)
class Bench:
    """All runs of a study. `table` and `map_table` summarize them, for one data set at a time: see `on`."""

    control: str
    """The study's first row, even if only others were trained."""
    rows: tuple[str, ...]
    measured: tuple[MeasuredRun, ...]
    failed: dict[str, str]
    """Run -> why it failed."""
    datasets: tuple[str, ...] = ("",)
    controls: dict[str, str] = field(default_factory=dict[str, str])
    """Row -> its control, if that is not the first row."""
    as_large_as: dict[str, str] = field(default_factory=dict[str, str])
    """Row -> the row whose number of parameters its width matches."""
    seeds: tuple[int, ...] = ()
    """Seeds of the study; a row that lacks some is reported with the number it has."""
    costs: dict[str, dict[str, Costs]] = field(default_factory=dict[str, dict[str, Costs]])
    """Data set -> row -> costs of a forward pass, time and memory per image; forward passes are interleaved."""
    no_costs: dict[str, str] = field(default_factory=dict[str, str])
    """Data set -> why its costs were not measured."""

    def __repr__(self) -> str:
        failed = f", {len(self.failed)} failed" if self.failed else ""
        lines = [f"Bench of {len(self.rows)} networks: {len(self.measured)} runs{failed}"]
        for dataset in self.datasets:
            result = self.on(dataset)
            accuracy = {row: result.over_seeds(row, _accuracy) for row in self.rows}
            accuracy = {row: over_seeds for row, over_seeds in accuracy.items() if not math.isnan(over_seeds.mean)}
            if accuracy:
                best = max(accuracy, key=lambda row: accuracy[row].mean)
                control = f"; control {self.control} {accuracy[self.control].text(1, percent=True)} %"
                where = f"on {dataset}: " if dataset else ""
                shown = control if self.control in accuracy and self.control != best else ""
                lines.append(f"  {where}most accurate {best} {accuracy[best].text(1, percent=True)} %{shown}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        parts: list[str] = []
        for dataset in self.datasets:
            result = self.on(dataset)
            parts += [notebook.heading(dataset)] if dataset else []
            parts += [notebook.sentences(result.sentences())]
            parts += [notebook.table(*table) for table in (result.table(), result.map_table()) if len(table[0]) > 1]
        return "".join(parts) + notebook.sentences(f"failed: {run}: {reason}" for run, reason in self.failed.items())

    def on(self, dataset: str) -> "Bench":
        """The results on one data set.

        Raises:
            ValueError: the study has no such data set.
        """
        if dataset not in self.datasets:
            raise ValueError(f"expected a data set out of {', '.join(self.datasets)}; got {dataset!r}")
        measured = tuple(run for run in self.measured if run.dataset == dataset)
        return replace(self, datasets=(dataset,), measured=measured)

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Names of the columns, and a line of texts per row; empty columns are left out.

        Means and deviations are over seeds, `to control` is the difference in percentage points with its interval.
        """
        return _texts(self.cells())

    def map_table(self) -> tuple[list[str], list[list[str]]]:
        """The same for `MeasuredRun.quality`: each row's own map and its activation map beside the center control."""
        return _texts(self.map_cells())

    def markdown(self) -> str:
        """Sentences and tables of every data set as Markdown."""
        parts: list[str] = []
        for dataset in self.datasets:
            result = self.on(dataset)
            parts += [f"## {dataset}\n"] if dataset else []
            parts += ["".join(f"- {sentence}\n" for sentence in result.sentences())]
            for columns, lines in (result.table(), result.map_table()):
                if len(columns) > 1:
                    table = (columns, ["---"] * len(columns), *lines)
                    escaped = ([text.replace("|", "\\|") for text in cells] for cells in table)
                    parts.append("".join(f"| {' | '.join(cells)} |\n" for cells in escaped))
        if self.failed:
            parts.append("".join(f"- failed: {run}: {reason}\n" for run, reason in self.failed.items()))
        return "\n".join(part for part in parts if part)

    def over_seeds(self, row: str, value: Callable[[MeasuredRun], float]) -> Summary:
        """Mean and standard deviation of one value."""
        return summary(value(run) for run in self._runs(row))

    def difference(self, row: str) -> tuple[float, float] | None:
        """Student's 95 % interval of the difference in accuracy to the control; None below two common seeds."""
        difference = self.differences().get(row)
        return None if difference is None or math.isnan(difference.low) else (difference.low, difference.high)

    def differences(self, value: Callable[[MeasuredRun], float] = _accuracy) -> dict[str, Difference]:
        """Difference in accuracy, or another value, of each row to its control, over the seeds that both have."""
        others = {row: self.controls.get(row, self.control) for row in self.rows}
        gaps = {row: (other, self._gaps(row, other, value)) for row, other in others.items() if row != other}
        controls = [row for row in self.rows if row in self.as_large_as or row in self.controls.values()]
        return {
            row: replace(difference, whole=self._is_whole(row, difference.other))
            for row, difference in paired(gaps, controls).items()
        }

    def sentences(self) -> list[str]:
        """What the results on one data set show, and what they leave open."""
        place = f"On {self.datasets[0]}, " if self.datasets[0] else ""
        sentences = [*self._difference_sentences(place), *self._size_sentences()]
        for title, figure in self._task_figures(first=True):
            words = ("have", f"a higher {figure} ({title})", f"a lower {figure} ({title})")
            is_cheap = any(
                run.tasks[title].higher_is_better[figure] is False for run in self.measured if title in run.tasks
            )
            sentences += self._difference_sentences(place, partial(figure_of, title, figure), words, is_cheap)
        sentences += self._task_sentences()
        sentences += self._map_sentences()
        if (reason := self.no_costs.get(self.datasets[0])) is not None:
            sentences.append(f"Costs are left out: {reason}.")
        if incomplete := [f"{row} has {seeds}" for row in self.rows if (seeds := self._seeds_of(row))]:
            sentences.append(
                f"Runs are missing, so that nothing can hold for what they are compared with: {joined(incomplete)}."
            )
        return [capitalized(sentence) for sentence in sentences]

    def _task_sentences(self) -> Iterable[str]:
        """Rows that do not suit a task, and why."""
        rows: dict[tuple[str, str], dict[str, None]] = {}
        for run in self.measured:
            for title, reason in run.no_tasks.items():
                rows.setdefault((title, reason), {})[run.row] = None
        for (title, reason), names in rows.items():
            yield f"there are no figures of {title} for {joined([*names])}: {reason}."

    def answers(self) -> dict[str, str]:
        """The first sentences, each by the question that it answers."""
        place = f"On {self.datasets[0]}, " if self.datasets[0] else ""
        parts = {
            "Which network is more accurate?": self._difference_sentences(place),
            "Does its own map beat a blob in the middle?": self._map_sentences(),
        }
        first = {question: next(iter(sentences), "") for question, sentences in parts.items()}
        return {question: capitalized(text) for question, text in first.items() if text}

    def _difference_sentences(
        self,
        place: str,
        value: Callable[[MeasuredRun], float] = _accuracy,
        words: tuple[str, str, str] = ("be", "more accurate", "less accurate"),
        lower_is_better: bool = False,
    ) -> Iterable[str]:
        verb, more, less = words
        differences = self.differences(value)
        names = {row: row if d.other == self.control else f"{row} (to {d.other})" for row, d in differences.items()}

        def points(rows: Iterable[str]) -> str:
            return "; ".join(f"{names[row]} {differences[row].points(' points')}" for row in rows)

        if differences and all(len(difference.by_seed) == 1 for difference in differences.values()):
            yield f"{place}there is one seed: no difference to a control can be tested."
        if tested := {row: d for row, d in differences.items() if not math.isnan(d.adjusted)}:
            better, worse, unclear = _by_sign(tested)
            best = max(tested, key=lambda row: tested[row].mean)
            if lower_is_better:
                better, worse, more, less = worse, better, less, more
                best = min(tested, key=lambda row: tested[row].mean)
            extreme = "lowest" if lower_is_better else "largest"
            if better:
                yield f"{place}{more} than the control, also after correction: {points(better)}."
            else:
                yield (
                    f"{place}no network is shown to {verb} {more} than its control; the {extreme} mean difference "
                    f"is that of {names[best]}, {tested[best].points(' points')}."
                )
            if worse:
                yield f"{place}{less} than the control, also after correction: {points(worse)}."
            if unclear:
                yield (
                    f"Better, worse or as good as the control is open for {joined([names[row] for row in unclear])}: "
                    "their intervals allow more than one of these, or do not hold after the correction or for want of "
                    "a run."
                )
        if equal := [row for row, d in differences.items() if len(d.by_seed) > 1 and math.isnan(d.p)]:
            yield f"{place}to the control, {points(equal)}: the same in all seeds, not tested."

    def _size_sentences(self) -> Iterable[str]:
        for row, other in self.as_large_as.items():
            if gaps := self._gaps(other, row, _accuracy):
                difference = paired({other: (row, gaps)})[other]
                sizes = [f"{name} {self._runs(name)[0].parameters:,}" for name in (row, other)]
                yield (
                    f"With as many parameters ({', '.join(sizes)}), {other} minus {row} is "
                    f"{difference.points(' points')}, not corrected."
                )

    def _map_sentences(self) -> Iterable[str]:
        for measure, verb, sign in (("energy_in_mask", "lies more on the mask than", 1), ("deletion_auc", "beats", -1)):
            gaps: dict[str, tuple[str, dict[int, float]]] = {}
            for row in self.rows:
                quality = {run.seed: run.quality for run in self._runs(row) if run.quality}
                by_seed = {
                    seed: sign * (getattr(maps["own"], measure) - getattr(maps["center_map"], measure))
                    for seed, maps in quality.items()
                }
                gaps[row] = "center_map", {seed: gap for seed, gap in by_seed.items() if not math.isnan(gap)}
            differences = {row: replace(d, whole=self._is_whole(row)) for row, d in paired(gaps).items()}
            tested = {row: d for row, d in differences.items() if not math.isnan(d.low)}
            ahead, behind, _ = _by_sign(tested)
            if tested:
                where = " in deletion" if measure == "deletion_auc" else ""
                yield (
                    f"After correction, the own map {verb} a blob in the center{where} "
                    f"for {joined(ahead) or 'no network'}; the blob is ahead for {joined(behind) or 'none'}"
                    f"{'; the rest is open' if len(differences) > len(ahead) + len(behind) else ''}."
                )

    def cells(self) -> list[dict[str, Cell]]:
        """A line per row with a run, by column: accuracy, difference, cost, and the maps of every block.

        Columns that are empty in every row are left out.
        """
        differences = self.differences()
        return _filled([self._line(row, differences.get(row)) for row in self.rows if self._runs(row)])

    def map_cells(self) -> list[dict[str, Cell]]:
        """The same for `MeasuredRun.quality`."""
        lines: list[dict[str, Cell]] = []
        for row in (row for row in self.rows if self._runs(row)):
            line = {"network": Cell(row)}
            for measure in QUALITY:
                for name, title in _MAPS.items():
                    values = summary(getattr(run.quality[name], measure) for run in self._runs(row) if run.quality)
                    line[f"{_MEASURES[measure]}, {title}"] = _cell(values, 1 if measure == "sparsity" else 3)
            lines.append(line)
        return _filled(lines)

    def _line(self, row: str, difference: Difference | None) -> dict[str, Cell]:
        runs = self._runs(row)
        cost = self.costs.get(self.datasets[0], {}).get(row)

        def per_block(kind: str, maps: str, digits: int) -> Cell:
            """One value per block, in the order of the network; rows are sorted by the last one."""
            blocks = [getattr(getattr(run, maps), kind) for run in runs]
            values = [summary(of_run[block] for of_run in blocks) for block in blocks[0]]
            text = " / ".join(value.text(digits) for value in values)
            return Cell(text or "-", values[-1].mean if values else math.nan)

        size_note = f" (as {self.as_large_as[row]})" if row in self.as_large_as else ""
        seeds_note = f" ({seeds})" if (seeds := self._seeds_of(row)) else ""
        seconds = mean(run.seconds for run in runs)
        accuracy = self.over_seeds(row, lambda run: run.accuracy)
        line = {
            "network": Cell(row),
            "accuracy, %": Cell(accuracy.text(1, percent=True) + seeds_note, accuracy.mean),
            "to control": Cell("-") if difference is None else Cell(difference.points(), difference.mean),
            "p, corrected": Cell("-"),
            **self._task_cells(row),
            "control": Cell(self.controls.get(row, "-")),
            "parameters": Cell(f"{runs[0].parameters:,}{size_note}", runs[0].parameters),
            "M multiply-adds": Cell("-") if cost is None else Cell(f"{cost.macs / 1e6:.1f}", cost.macs),
            "ms / image": Cell("-") if cost is None else Cell(f"{1000 * cost.seconds:.2f}", cost.seconds),
            "s / epoch": Cell(f"{seconds:.1f}", seconds),
            "own maps in mask, before": per_block("energy", "before", 2),
            "own maps in mask, after": per_block("energy", "after", 2),
            "sparsity, after": per_block("sparsity", "after", 1),
            "activation map in mask, after": _cell(self.over_seeds(row, lambda run: run.after.activation_energy), 2),
            "cosine of vectors, before": _cell(self.over_seeds(row, lambda run: run.before.similarity), 2),
            "cosine of vectors, after": _cell(self.over_seeds(row, lambda run: run.after.similarity), 2),
        }
        if difference is not None and not math.isnan(difference.adjusted):
            p = "<0.001" if difference.adjusted < 0.001 else f"{difference.adjusted:.3f}"
            line["p, corrected"] = Cell(f"{p}, holds" if difference.holds else p, difference.adjusted)
        return line

    def _task_figures(self, first: bool = False) -> list[tuple[str, str]]:
        """Title and figure of each task, in the study's order; `first`: only the first figure of each."""
        figures = {
            title: [*task.figures][: 1 if first else None] for run in self.measured for title, task in run.tasks.items()
        }
        return [(title, figure) for title, names in figures.items() for figure in names]

    def _task_cells(self, row: str) -> dict[str, Cell]:
        cells: dict[str, Cell] = {}
        first = self._task_figures(first=True)
        for title, figure in self._task_figures():
            value = partial(figure_of, title, figure)
            cells[f"{title}, {figure}"] = _cell(self.over_seeds(row, value), 3)
            if (title, figure) in first:
                difference = self.differences(value).get(row)
                text = Cell("-") if difference is None else Cell(difference.points(), difference.mean)
                cells[f"{title}, {figure} to control"] = text
        return cells

    def _runs(self, row: str) -> list[MeasuredRun]:
        if len(self.datasets) > 1:
            raise ValueError(f"expected one data set, got {', '.join(self.datasets)}; take on(NAME) first")
        return [run for run in self.measured if run.row == row]

    def _seeds_of(self, row: str) -> str:
        """How many of the study's seeds a row has; empty if none is missing."""
        count = len({run.seed for run in self._runs(row)} & set(self.seeds))
        return f"{count} of {len(self.seeds)} seeds" if count < len(self.seeds) else ""

    def _is_whole(self, *rows: str) -> bool:
        return not any(self._seeds_of(row) for row in rows)

    def _gaps(self, row: str, other: str, value: Callable[[MeasuredRun], float]) -> dict[int, float]:
        """Difference in a value by seed, where both have it."""
        ours, theirs = (
            {run.seed: found for run in self._runs(name) if not math.isnan(found := value(run))}
            for name in (row, other)
        )
        return {seed: ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())}


def figure_of(title: str, figure: str, run: MeasuredRun) -> float:
    """A figure of a task of the study; NaN where the run lacks it."""
    return run.tasks[title].figures.get(figure, math.nan) if title in run.tasks else math.nan


def summary(values: Iterable[float]) -> Summary:
    """Mean and standard deviation of the values that are not NaN.

    >>> summary([1.0, 3.0, math.nan])
    Summary(mean=2.0, deviation=1.4142135623730951)
    """
    defined = [value for value in values if not math.isnan(value)]
    return Summary(mean(defined) if defined else math.nan, stdev(defined) if len(defined) > 1 else math.nan)


def student_interval(values: Iterable[float]) -> tuple[float, float] | None:
    """Student's 95 % interval of a mean of few values; None for fewer than two, or if all are equal.

    >>> low, high = student_interval([1.0, 2.0, 3.0])
    >>> round(low, 3), round(high, 3)
    (-0.484, 4.484)
    """
    low, high, _ = _student(list(values))
    return None if math.isnan(low) else (low, high)


def _student(values: list[float]) -> tuple[float, float, float]:
    """Ends of Student's 95 % interval of the mean, and p of the test against 0; NaN if there is no spread."""
    if len(values) < 2 or stdev(values) < _SPREAD:
        return math.nan, math.nan, math.nan
    test: Any = ttest_1samp(values, 0.0)
    low, high = test.confidence_interval(0.95)
    return float(low), float(high), float(test.pvalue)


def paired(
    gaps: Mapping[str, tuple[str, Mapping[int, float]]], untested: Collection[str] = ()
) -> dict[str, Difference]:
    """Mean and interval of each row's differences by seed to another row; p is corrected over all but `untested`.

    >>> differences = paired({"a": ("control", {0: 1.0, 1: 2.0, 2: 3.0}), "b": ("control", {0: 1.0, 1: -1.0})})
    >>> round(differences["a"].p, 4), round(differences["a"].adjusted, 4), differences["b"].p
    (0.0742, 0.1484, 1.0)
    """
    given = {row: (other, dict(by_seed)) for row, (other, by_seed) in gaps.items() if by_seed}
    tests = {row: _student([*by_seed.values()]) for row, (_, by_seed) in given.items()}
    adjusted = holm(np.array([math.nan if row in untested else p for row, (_, _, p) in tests.items()])).tolist()
    return {
        row: Difference(other=other, by_seed=by_seed, mean=mean(by_seed.values()), low=low, high=high, p=p, adjusted=q)
        for (row, (other, by_seed)), (low, high, p), q in zip(given.items(), tests.values(), adjusted, strict=True)
    }


def _by_sign(differences: Mapping[str, Difference]) -> tuple[list[str], list[str], list[str]]:
    """Rows that are better, worse, and those whose difference does not hold."""
    better = [row for row, difference in differences.items() if difference.holds and difference.mean > 0]
    worse = [row for row, difference in differences.items() if difference.holds and difference.mean < 0]
    return better, worse, [row for row, difference in differences.items() if not difference.holds]


def _cell(value: Summary, digits: int) -> Cell:
    return Cell(value.text(digits), value.mean)


def _filled(lines: list[dict[str, Cell]]) -> list[dict[str, Cell]]:
    columns = [name for name in (lines[0] if lines else {}) if any(line[name].text != "-" for line in lines)]
    return [{name: line[name] for name in columns} for line in lines]


def _texts(lines: list[dict[str, Cell]]) -> tuple[list[str], list[list[str]]]:
    return [*lines[0]] if lines else [], [[cell.text for cell in line.values()] for line in lines]
