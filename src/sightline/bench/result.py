"""What a study found: tables, differences to the control, sentences no stronger than their intervals."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from statistics import mean, stdev
from typing import NamedTuple

import numpy as np

from sightline.bench.measured import QUALITY, Maps, Measured
from sightline.evaluation.ranking import LEVEL
from sightline.metrics.uncertainty import holm
from sightline.models.costs import Costs
from sightline.report.studies import Cell

_MAPS = {"own": "own map", "activation_map": "activation map", "center_map": "center control"}
_WORTH = {"energy_in_mask": "in mask", "sparsity": "sparsity", "deletion_auc": "deletion"}
_SPREAD = 1e-9
"""Below it differences are the same but for rounding."""
CHEAP = (
    "p, corrected",
    "parameters",
    "M multiply-adds",
    "ms / image",
    "s / epoch",
    *(f"deletion, {m}" for m in _MAPS.values()),
)
"""Columns of which less is better."""


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
    """Ends of Student's 95 % interval over seeds, what another training of the same two networks may give; NaN below
    two seeds, or where all are the same."""
    p: float
    """Of Student's paired test; NaN below two seeds, or where all are the same: that shows no spread, not certainty."""
    adjusted: float
    """After Holm's correction over all rows compared on the data set; NaN for rows that are there as controls."""
    whole: bool = True
    """Whether no run of the two is missing."""

    @property
    def holds(self) -> bool:
        """Whether the difference remains after the correction, and rests on all runs that were asked for."""
        return self.whole and self.adjusted < LEVEL

    def points(self, unit: str = "") -> str:
        """In percentage points, with the interval if there is one.

        >>> paired({"a": ("b", {0: 0.01, 1: 0.02, 2: 0.03})})["a"].points(" points")
        '+2.0 points [-0.5, +4.5]'
        """
        ends = "" if math.isnan(self.low) else f" [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"
        return f"{100 * self.mean:+.1f}{unit}{ends}"


@dataclass(frozen=True, kw_only=True)
class Bench:
    """All runs of a study. `table` and `map_table` sum them up, of one data set at a time: see `on`."""

    control: str
    """The study's first row, also where only others were asked for."""
    rows: tuple[str, ...]
    measured: tuple[Measured, ...]
    failed: dict[str, str]
    """Run -> why there is no figure of it."""
    datasets: tuple[str, ...] = ("",)
    controls: dict[str, str] = field(default_factory=dict[str, str])
    """Row -> its control, where that is not the first row."""
    as_large_as: dict[str, str] = field(default_factory=dict[str, str])
    """Row -> the row whose number of parameters it was given by its width."""
    seeds: tuple[int, ...] = ()
    """Asked for; a row without a run of one of them is named with the number it has."""
    costs: dict[str, dict[str, Costs]] = field(default_factory=dict[str, dict[str, Costs]])
    """Data set -> row -> costs of a forward pass, time and memory per image, all rows timed in turns on one batch."""
    no_costs: dict[str, str] = field(default_factory=dict[str, str])
    """Data set -> why there are no costs of it."""

    def on(self, dataset: str) -> "Bench":
        """The same on one data set alone.

        Raises:
            ValueError: the study has no such data set.
        """
        if dataset not in self.datasets:
            raise ValueError(f"expected a data set out of {', '.join(self.datasets)}; got {dataset!r}")
        measured = tuple(run for run in self.measured if run.dataset == dataset)
        return replace(self, datasets=(dataset,), measured=measured)

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Names of the columns, and a line of texts per row; columns in which no row has anything are left out.

        Means and deviations are over seeds, `to control` is the difference in percentage points with its interval.
        """
        return _texts(self.cells())

    def map_table(self) -> tuple[list[str], list[list[str]]]:
        """The same of `Measured.quality`: each row's own map and its activation map beside the center control."""
        return _texts(self.map_cells())

    def markdown(self) -> str:
        """Sentences and tables of every data set as Markdown."""
        parts: list[str] = []
        for dataset in self.datasets:
            own = self.on(dataset)
            parts += [f"## {dataset}\n"] if dataset else []
            parts += ["".join(f"- {sentence}\n" for sentence in own.sentences())]
            for columns, lines in (own.table(), own.map_table()):
                if len(columns) > 1:
                    table = (columns, ["---"] * len(columns), *lines)
                    escaped = ([text.replace("|", "\\|") for text in cells] for cells in table)
                    parts.append("".join(f"| {' | '.join(cells)} |\n" for cells in escaped))
        if self.failed:
            parts.append("".join(f"- failed: {run}: {reason}\n" for run, reason in self.failed.items()))
        return "\n".join(part for part in parts if part)

    def over_seeds(self, row: str, value: Callable[[Measured], float]) -> Summary:
        """Mean and standard deviation of one figure."""
        return summary(value(of) for of in self._runs() if of.row == row)

    def difference(self, row: str) -> tuple[float, float] | None:
        """95 % interval of the difference in accuracy to the control, from the seeds both have; None below two seeds.

        It is Student's, over seeds: what another training of the same two networks may give.
        """
        found = self.differences().get(row)
        return None if found is None or math.isnan(found.low) else (found.low, found.high)

    def differences(self) -> dict[str, Difference]:
        """Of the accuracy of each row to its control, as far as both have a run of the same seed."""
        pairs = {row: (self._control(row), self._gaps(row, self._control(row))) for row in self.rows}
        gaps = {row: (other, gaps) for row, (other, gaps) in pairs.items() if row != other and gaps}
        found = paired(gaps, [row for row in gaps if row in self.as_large_as or row in self.controls.values()])
        return {row: replace(of, whole=self._is_whole(row, of.other)) for row, of in found.items()}

    def sentences(self) -> list[str]:
        """What can be said of one data set, and what cannot; no sentence says more than its interval."""
        found = self.differences()
        place = f"On {self.datasets[0]}, " if self.datasets[0] else ""
        tested = {row: of for row, of in found.items() if not math.isnan(of.adjusted)}
        same = [row for row, of in found.items() if len(of.by_seed) > 1 and math.isnan(of.p)]
        to = {row: row if of.other == self.control else f"{row} (to {of.other})" for row, of in found.items()}

        def points(rows: Iterable[str]) -> str:
            return "; ".join(f"{to[row]} {found[row].points(' points')}" for row in rows)

        said: list[str] = []
        if found and all(len(of.by_seed) == 1 for of in found.values()):
            said.append(f"{place}there is one seed: no difference to a control can be tested.")
        if tested:
            better = [row for row, of in tested.items() if of.holds and of.mean > 0]
            worse = [row for row, of in tested.items() if of.holds and of.mean < 0]
            still = [row for row, of in tested.items() if not of.holds]
            best = max(tested, key=lambda row: tested[row].mean)
            said.append(
                f"{place}better than the control after correction: {points(better)}."
                if better
                else f"{place}no row is shown to be better than its control after correction; {to[best]} has the "
                f"highest mean difference, {tested[best].points(' points')}."
            )
            if worse:
                said.append(f"{place}worse than the control after correction: {points(worse)}.")
            if still:
                said.append(
                    f"Better, worse or as good as the control is open for {_listed([to[row] for row in still])}: their "
                    "intervals allow more than one of these, or do not hold after the correction or for want of a run."
                )
        if same:
            said.append(f"{place}to the control, {points(same)}: the same in all seeds, not tested.")
        for row, other in self.as_large_as.items():
            if gaps := self._gaps(other, row):
                gap = paired({other: (row, gaps)})[other]
                sizes = [next(run.parameters for run in self._runs() if run.row == name) for name in (row, other)]
                said.append(
                    f"With as many parameters ({row} {sizes[0]:,}, {other} {sizes[1]:,}), {other} minus {row} is "
                    f"{gap.points(' points')}, not corrected."
                )
        said += self._map_sentences()
        if (why := self.no_costs.get(self.datasets[0])) is not None:
            said.append(f"Costs are left out: {why}.")
        if short := [f"{row} has{self._missing(row)}" for row in self.rows if self._missing(row)]:
            said.append(
                "Runs are missing, so that nothing can hold for what they are compared with: "
                f"{_listed(short).replace('(', '').replace(')', '')}."
            )
        return [one[0].upper() + one[1:] for one in said]

    def _map_sentences(self) -> list[str]:
        said: list[str] = []
        for worth, verb, sign in (("energy_in_mask", "lies more on the mask than", 1), ("deletion_auc", "beats", -1)):
            gaps: dict[str, tuple[str, dict[int, float]]] = {}
            for row in self.rows:
                of = {run.seed: run.quality for run in self._runs() if run.row == row and run.quality}
                both = {seed: getattr(q["own"], worth) - getattr(q["center_map"], worth) for seed, q in of.items()}
                gaps[row] = "center_map", {seed: sign * gap for seed, gap in both.items() if not math.isnan(gap)}
            known = {row: replace(gap, whole=self._is_whole(row)) for row, gap in paired(gaps).items()}
            found = {row: gap for row, gap in known.items() if not math.isnan(gap.low)}
            ahead = [row for row, gap in found.items() if gap.holds and gap.mean > 0]
            behind = [row for row, gap in found.items() if gap.holds and gap.mean < 0]
            if found:
                where = " in deletion" if worth == "deletion_auc" else ""
                said.append(
                    f"After correction, the own map {verb} a blob in the center{where} "
                    f"for {_listed(ahead) or 'no row'}; the blob is ahead for {_listed(behind) or 'none'}"
                    f"{'; the rest is open' if len(known) > len(ahead) + len(behind) else ''}."
                )
        return said

    def cells(self) -> list[dict[str, Cell]]:
        """A line per row that has a run, by column: accuracy, difference, cost, and the maps of every block."""
        differences = self.differences()
        return [self._line(row, differences.get(row)) for row in self._done()]

    def map_cells(self) -> list[dict[str, Cell]]:
        """A line per row that has a run, by column: what `Measured.quality` holds."""
        lines: list[dict[str, Cell]] = []
        for row in self._done():
            line = {"network": Cell(row)}
            for worth in QUALITY:
                for name, words in _MAPS.items():
                    values = (
                        getattr(run.quality[name], worth) for run in self._runs() if run.row == row and run.quality
                    )
                    of = summary(values)
                    line[f"{_WORTH[worth]}, {words}"] = Cell(of.text(1 if worth == "sparsity" else 3), of.mean)
            lines.append(line)
        return lines

    def _line(self, row: str, difference: Difference | None) -> dict[str, Cell]:
        own = [run for run in self._runs() if run.row == row]
        cost = self.costs.get(self.datasets[0], {}).get(row)

        def of(value: Callable[[Maps], float], maps: str) -> Summary:
            return summary(value(getattr(run, maps)) for run in own)

        def places(kind: str, maps: str, digits: int) -> Cell:
            """One figure per block, in the order of the network; the last one counts for the order of the rows."""
            blocks: dict[str, float] = getattr(getattr(own[0], maps), kind)
            found = [of(lambda known, block=block: getattr(known, kind)[block], maps) for block in blocks]
            last = found[-1].mean if found else math.nan
            return Cell(" / ".join(figure.text(digits) for figure in found) or "-", last)

        def figure(found: Summary, digits: int) -> Cell:
            return Cell(found.text(digits), found.mean)

        like = f" (as {self.as_large_as[row]})" if row in self.as_large_as else ""
        time = mean(run.seconds for run in own)
        accuracy = self.over_seeds(row, lambda run: run.accuracy)
        line = {
            "network": Cell(row),
            "accuracy, %": Cell(accuracy.text(1, percent=True) + self._missing(row), accuracy.mean),
            "to control": Cell("-") if difference is None else Cell(difference.points(), difference.mean),
            "p, corrected": Cell("-"),
            "control": Cell(self.controls.get(row, "-")),
            "parameters": Cell(f"{own[0].parameters:,}{like}", own[0].parameters),
            "M multiply-adds": Cell("-") if cost is None else Cell(f"{cost.macs / 1e6:.1f}", cost.macs),
            "ms / image": Cell("-") if cost is None else Cell(f"{1000 * cost.seconds:.2f}", cost.seconds),
            "s / epoch": Cell(f"{time:.1f}", time),
            "own maps in mask, before": places("energy", "before", 2),
            "own maps in mask, after": places("energy", "after", 2),
            "sparsity, after": places("sparsity", "after", 1),
            "activation map in mask, after": figure(of(lambda maps: maps.activation_energy, "after"), 2),
            "cosine of vectors, before": figure(of(lambda maps: maps.similarity, "before"), 2),
            "cosine of vectors, after": figure(of(lambda maps: maps.similarity, "after"), 2),
        }
        if difference is not None and not math.isnan(difference.adjusted):
            p = "<0.001" if difference.adjusted < 0.001 else f"{difference.adjusted:.3f}"
            line["p, corrected"] = Cell(f"{p}, holds" if difference.holds else p, difference.adjusted)
        return line

    def _done(self) -> list[str]:
        return [row for row in self.rows if any(run.row == row for run in self._runs())]

    def _runs(self) -> tuple[Measured, ...]:
        if len(self.datasets) > 1:
            raise ValueError(f"expected one data set, got {', '.join(self.datasets)}; take on(NAME) first")
        return self.measured

    def _missing(self, row: str) -> str:
        """What is said of the number of runs; nothing where there is one of every seed."""
        count = len({run.seed for run in self._runs() if run.row == row} & set(self.seeds))
        return f" ({count} of {len(self.seeds)} seeds)" if count < len(self.seeds) else ""

    def _is_whole(self, *rows: str) -> bool:
        return not any(self._missing(row) for row in rows)

    def _control(self, row: str) -> str:
        return self.controls.get(row, self.control)

    def _gaps(self, row: str, other: str) -> dict[int, float]:
        own, theirs = ({run.seed: run.accuracy for run in self._runs() if run.row == name} for name in (row, other))
        return {seed: own[seed] - theirs[seed] for seed in sorted(own.keys() & theirs.keys())}


def summary(values: Iterable[float]) -> Summary:
    """Mean and standard deviation of values, those that are NaN left out.

    >>> summary([1.0, 3.0, math.nan])
    Summary(mean=2.0, deviation=1.4142135623730951)
    """
    defined = [value for value in values if not math.isnan(value)]
    return Summary(
        mean(defined) if defined else math.nan,
        stdev(defined) if len(defined) > 1 else math.nan,
    )


def student_interval(values: Iterable[float]) -> tuple[float, float] | None:
    """95 % interval of a mean of few values by Student's t; None for fewer than two, or where all are the same.

    >>> low, high = student_interval([1.0, 2.0, 3.0])
    >>> round(low, 3), round(high, 3)
    (-0.484, 4.484)
    """
    from scipy.stats import t

    found = list(values)
    if len(found) < 2 or stdev(found) < _SPREAD:
        return None
    half = float(t.ppf(0.975, len(found) - 1)) * stdev(found) / math.sqrt(len(found))
    return mean(found) - half, mean(found) + half


def paired(
    gaps: Mapping[str, tuple[str, Mapping[int, float]]], untested: Collection[str] = ()
) -> dict[str, Difference]:
    """Of each row, its differences by seed to another row as a mean with interval; corrected over all but `untested`.

    >>> found = paired({"a": ("control", {0: 1.0, 1: 2.0, 2: 3.0}), "b": ("control", {0: 1.0, 1: -1.0})})
    >>> round(found["a"].p, 4), round(found["a"].adjusted, 4), found["b"].p
    (0.0742, 0.1484, 1.0)
    """
    given = {row: (other, dict(by_seed)) for row, (other, by_seed) in gaps.items() if by_seed}
    p = [_student_p(list(by_seed.values())) for _, by_seed in given.values()]
    tests = [math.nan if row in untested else own for row, own in zip(given, p, strict=True)]
    found: dict[str, Difference] = {}
    for (row, (other, by_seed)), own, adjusted in zip(given.items(), p, holm(np.array(tests)).tolist(), strict=True):
        low, high = student_interval(by_seed.values()) or (math.nan, math.nan)
        middle = mean(by_seed.values())
        found[row] = Difference(other=other, by_seed=by_seed, mean=middle, low=low, high=high, p=own, adjusted=adjusted)
    return found


def _student_p(values: list[float]) -> float:
    from scipy.stats import t

    spread = stdev(values) if len(values) > 1 else 0.0
    if spread < _SPREAD:
        return math.nan
    return 2 * float(t.sf(abs(mean(values)) / (spread / math.sqrt(len(values))), len(values) - 1))


def _listed(names: list[str]) -> str:
    return ", ".join(names[:-1]) + (" and " if len(names) > 1 else "") + names[-1] if names else ""


def _texts(lines: list[dict[str, Cell]]) -> tuple[list[str], list[list[str]]]:
    columns = [name for name in (lines[0] if lines else {}) if any(line[name].text != "-" for line in lines)]
    return columns, [[line[name].text for name in columns] for line in lines]
