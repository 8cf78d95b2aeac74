"""Networks side by side: changes to one recipe x seeds, each trained and measured alike, a control among them."""

import json
import math
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sightline import data, models, recipe, runs
from sightline.attention import RepresentativeVectors
from sightline.explainers import Progress, attention_maps, explain
from sightline.inference import forward, untouched
from sightline.metrics import energy_in_mask
from sightline.metrics.complexity import sparsity
from sightline.recipe import Recipe
from sightline.runs import Run
from sightline.training import begin, fit

_BATCH = 250


@dataclass(frozen=True, kw_only=True)
class Study:
    """One recipe and the changes that make its rows. The first row is the control."""

    recipe: Recipe
    rows: dict[str, dict[str, Any]]
    """name -> dotted field -> value. An `optim.teacher` that is the name of a row means its run of the same seed."""

    def of(self, row: str, seed: int, out: Path) -> Recipe:
        """The recipe of one run."""
        changes = dict(self.rows[row])
        if changes.get("optim.teacher") in self.rows:
            changes["optim.teacher"] = str(folder(out, changes["optim.teacher"], seed))
        return replace(recipe.load(self.recipe, changes), seeds=(seed,))


@dataclass(frozen=True, kw_only=True)
class Maps:
    """Means over the test images of what a network's own maps are worth; NaN where there is no such map or no mask."""

    energy: dict[str, float]
    """block -> share of its map (the mean of its maps, if there are several) in the mask."""
    sparsity: dict[str, float]
    """block -> `sightline.metrics.complexity.sparsity` of its maps."""
    activation_energy: float
    """Share in the mask of the norm of the last feature map; a transformer has none."""
    similarity: float
    """Representative vectors only: cosine of an image's vectors with one another."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One trained network."""

    row: str
    seed: int
    accuracy: float
    """On the test images."""
    majority: float
    """Accuracy of always answering their most frequent class."""
    area: float
    """Share of the mask in the image: the energy of a map that knows nothing."""
    parameters: int
    seconds: float
    """Of one epoch, the median."""
    before: Maps
    """With the weights it started from."""
    after: Maps


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
class Bench:
    """All runs of a study. `table` sums them up."""

    control: str
    """The study's first row, also where only others were asked for."""
    rows: tuple[str, ...]
    measured: tuple[Measured, ...]
    failed: dict[str, str]
    """Run -> why there is no figure of it."""

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Names of the columns, and a line of texts per row; columns in which no row has anything are left out.

        Means and deviations are over seeds, `to control` is the interval of `difference` in percent.
        """
        found = [self._line(row) for row in self.rows if any(of.row == row for of in self.measured)]
        columns = [name for name in (found[0] if found else {}) if any(line[name] != "-" for line in found)]
        return columns, [[line[name] for name in columns] for line in found]

    def markdown(self) -> str:
        """The table as Markdown."""
        columns, lines = self.table()
        return "".join(f"| {' | '.join(cells)} |\n" for cells in (columns, ["---"] * len(columns), *lines))

    def over_seeds(self, row: str, value: Callable[[Measured], float]) -> Summary:
        """Mean and standard deviation of one figure."""
        return summary(value(of) for of in self.measured if of.row == row)

    def difference(self, row: str) -> tuple[float, float] | None:
        """95 % interval of the difference in accuracy to the control, from the seeds both have; None below two seeds.

        It is Student's, over seeds: what another training of the same two networks may give.
        """
        own = {of.seed: of.accuracy for of in self.measured if of.row == row}
        control = {of.seed: of.accuracy for of in self.measured if of.row == self.control}
        pairs = [own[seed] - control[seed] for seed in own.keys() & control.keys()]
        return None if row == self.control else student_interval(pairs)

    def _line(self, row: str) -> dict[str, str]:
        own = [run for run in self.measured if run.row == row]

        def of(value: Callable[[Maps], float], maps: str) -> Summary:
            return summary(value(getattr(run, maps)) for run in own)

        def places(kind: str, maps: str, digits: int) -> str:
            """One figure per block, in the order of the network."""
            blocks: dict[str, float] = getattr(getattr(own[0], maps), kind)
            found = [of(lambda known, block=block: getattr(known, kind)[block], maps) for block in blocks]
            return " / ".join(figure.text(digits) for figure in found) or "-"

        ends = self.difference(row)
        return {
            "network": row,
            "accuracy, %": self.over_seeds(row, lambda run: run.accuracy).text(1, percent=True),
            "to control": "-" if ends is None else f"[{100 * ends[0]:+.1f}, {100 * ends[1]:+.1f}]",
            "parameters": f"{own[0].parameters:,}",
            "s / epoch": f"{mean(run.seconds for run in own):.1f}",
            "own maps in mask, before": places("energy", "before", 2),
            "own maps in mask, after": places("energy", "after", 2),
            "sparsity, after": places("sparsity", "after", 1),
            "activation map in mask, after": of(lambda maps: maps.activation_energy, "after").text(2),
            "cosine of vectors, before": of(lambda maps: maps.similarity, "before").text(2),
            "cosine of vectors, after": of(lambda maps: maps.similarity, "after").text(2),
        }


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
    """95 % interval of a mean of few values by Student's t; None for fewer than two.

    >>> low, high = student_interval([1.0, 2.0, 3.0])
    >>> round(low, 3), round(high, 3)
    (-0.484, 4.484)
    """
    from scipy.stats import t

    found = list(values)
    if len(found) < 2:
        return None
    half = float(t.ppf(0.975, len(found) - 1)) * stdev(found) / math.sqrt(len(found))
    return mean(found) - half, mean(found) + half


def load(path: Path | str, overrides: Mapping[str, Any] | None = None) -> Study:
    """Read a study: a recipe with one part more, `rows`.

    Raises:
        OSError: there is no such file.
        TypeError, ValueError: no rows, or a field that is wrong; the row is named.
    """
    found = recipe.read(Path(path))
    rows = found.pop("rows", None) if isinstance(found, dict) else None
    if not isinstance(rows, dict) or not rows or not all(isinstance(row, dict) for row in rows.values()):
        raise ValueError(
            f"{path}: expected a part `rows`, each a name with changes to the recipe such as "
            "`se: {model.options.attention: se}`; the first is the control"
        )
    study = Study(recipe=recipe.load(found, overrides), rows={str(name): row for name, row in rows.items()})
    folders = [folder(Path(), name, 0) for name in study.rows]
    for name, own in zip(study.rows, folders, strict=True):
        if folders.count(own) > 1:
            raise ValueError(f"{path}: expected names of rows that differ in more than signs, got {name!r} twice")
        try:
            study.of(name, 0, Path())
        except (TypeError, ValueError) as error:
            raise type(error)(f"row {name!r}: {error}") from error
        teacher = study.rows[name].get("optim.teacher")
        if teacher in study.rows and study.rows[teacher].get("optim.teacher") in study.rows:
            raise ValueError(f"row {name!r}: expected a teacher that has no row as its own teacher, got {teacher!r}")
    return study


def bench(
    study: Study, out: Path | str, only: Iterable[str] | None = None, jobs: int = 1, progress: Progress | None = None
) -> Bench:
    """Train and measure every row with every seed of the study's recipe; what is done in `out` is not done again.

    Args:
        study: see `load`.
        out: folder; each run is `out`/row/seed-0, ...
        only: rows to do. None: all, and bench.json and bench.md are written.
        jobs: runs at a time, each in a process of its own with its share of the cores. With more than one, a script
            needs the guard `if __name__ == "__main__"`.
        progress: told of each finished run.

    Returns:
        What was measured. A run that fails (its loss became infinite, `out` has it with another recipe) does not stop
        the others.

    Raises:
        ValueError: an unknown row, or a network that cannot be built.
        OSError: `out` cannot be written.
    """
    out = Path(out)
    rows = list(study.rows if only is None else only)
    if unknown := [row for row in rows if row not in study.rows]:
        raise ValueError(f"expected rows out of: {'; '.join(study.rows)}; got {unknown[0]!r}")
    if jobs < 1:
        raise ValueError(f"expected 1 job or more, got {jobs}; as many as cores at most")
    runs.check_writable(out)
    for row in rows:
        _check(row, study.of(row, 0, out))
    teachers = {study.rows[row].get("optim.teacher") for row in rows} & set(study.rows)
    rows = [row for row in study.rows if row in {*rows, *teachers}]
    found: dict[tuple[str, int], Measured] = {}
    failed: dict[str, str] = {}
    seeds = study.recipe.seeds
    for part in ([row for row in rows if row in teachers], [row for row in rows if row not in teachers]):
        tasks = {(row, seed): (row, study.of(row, seed, out), folder(out, row, seed)) for row in part for seed in seeds}
        for (row, seed), result in _done(tasks, jobs):
            if isinstance(result, Measured):
                found[row, seed] = result
            else:
                failed[f"{row}, seed {seed}"] = result
            if progress:
                progress("training and measuring", len(found) + len(failed), len(rows) * len(seeds))
    order = [(row, seed) for row in rows for seed in seeds]
    measured = tuple(found[run] for run in order if run in found)
    result = Bench(control=next(iter(study.rows)), rows=tuple(rows), measured=measured, failed=failed)
    if only is None:
        runs.write(out / "bench.json", json.dumps(runs.plain(result), indent=1).encode())
        runs.write(out / "bench.md", result.markdown().encode())
    return result


def folder(out: Path, row: str, seed: int) -> Path:
    """Where a run of a study lies."""
    return out / "".join(letter if letter.isalnum() or letter in "-_.," else "_" for letter in row) / f"seed-{seed}"


def fresh(run: Run) -> nn.Module:
    """The network of a run with the weights that its training began with."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        return begin(run.recipe.model, len(run.classes), run.seed).eval()


def _check(row: str, wanted: Recipe) -> None:
    try:
        with torch.random.fork_rng(devices=[]):
            models.create_model(wanted.model.name, num_classes=2, **wanted.model.options)
    except ValueError as error:
        raise ValueError(f"row {row!r}: {error}") from error


def _done(
    tasks: dict[tuple[str, int], tuple[str, Recipe, Path]], jobs: int
) -> Iterator[tuple[tuple[str, int], Measured | str]]:
    if jobs == 1:
        for key, task in tasks.items():
            yield key, _train_and_measure(*task)
        return
    threads = max((os.cpu_count() or 1) // jobs, 1)
    with ProcessPoolExecutor(jobs, get_context("spawn"), _prepare, (threads,)) as pool:
        futures: dict[Future[Measured | str], tuple[str, int]] = {
            pool.submit(_train_and_measure, *task): key for key, task in tasks.items()
        }
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _prepare(threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a run in training listens for itself
    torch.set_num_threads(threads)


def _train_and_measure(row: str, wanted: Recipe, where: Path) -> Measured | str:
    try:
        run = fit(wanted, where, resume=True, progress=False)
        assert isinstance(run, Run)
        file = where / "measured.json"
        if file.is_file():
            known = _with_nan(json.loads(file.read_text(encoding="utf-8")))
            return Measured(**known | {"before": Maps(**known["before"]), "after": Maps(**known["after"])})
        found = measure(row, run)
        runs.write(file, json.dumps(runs.plain(found), indent=1).encode())
    except (ValueError, OSError, RuntimeError) as error:
        return " ".join(str(error).split())
    return found


def _with_nan(value: Any) -> Any:
    """What `runs.plain` was given."""
    if isinstance(value, dict):
        return {name: _with_nan(item) for name, item in value.items()}
    return math.nan if value is None else value


def measure(row: str, run: Run) -> Measured:
    """What a run is worth on its test images."""
    images = replace(data.load(run.recipe.data)["test"], preprocess=run.preprocess)
    model = runs.load(run.folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    correct = area = 0.0
    counts = torch.zeros(len(run.classes), dtype=torch.int64)
    model.to(device)
    for batch in data.batches(images, _BATCH):
        logits = forward(model, data.normalise(batch.images.to(device), run.preprocess), _BATCH)
        correct += float((logits.argmax(1).cpu() == batch.labels).sum())
        counts += torch.bincount(batch.labels, minlength=len(run.classes))
        area += math.nan if batch.masks is None else float(batch.masks.float().mean((1, 2, 3)).sum())
    seconds = sorted(epoch["seconds"] for epoch in run.history)
    return Measured(
        row=row,
        seed=run.seed,
        accuracy=correct / len(images),
        majority=int(counts.max()) / len(images),
        area=area / len(images),
        parameters=sum(p.numel() for p in model.parameters()),
        seconds=seconds[len(seconds) // 2],
        before=_maps(fresh(run).to(device), images),
        after=_maps(model, images),
    )


def _maps(model: nn.Module, images: data.ImageSet) -> Maps:
    device = next(model.parameters()).device
    energies: dict[str, list[Tensor]] = {}
    sparsities: dict[str, list[Tensor]] = {}
    activation: list[Tensor] = []
    cosines: list[Tensor] = []
    for batch in data.batches(images, _BATCH):
        inputs = data.normalise(batch.images.to(device), images.preprocess)
        masks = None if batch.masks is None else batch.masks.to(device)
        for name, weights in attention_maps(model, inputs).items():
            if weights.shape[2] * weights.shape[3] > 1:
                sparsities.setdefault(name, []).append(sparsity(weights))
                energies.setdefault(name, []).append(_energy(weights.mean(1, keepdim=True), masks))
        try:
            norms = explain(model, inputs, methods=["activation_map"])["activation_map"]
        except ValueError:  # a transformer has no feature map
            norms = inputs.new_full((len(inputs), 1, 1, 1), math.nan)
        activation.append(_energy(norms, masks))
        cosines += _similarities(model, inputs)
    return Maps(
        energy={name: _mean(values) for name, values in energies.items()},
        sparsity={name: _mean(values) for name, values in sparsities.items()},
        activation_energy=_mean(activation),
        similarity=_mean(cosines),
    )


def _energy(maps: Tensor, masks: Tensor | None) -> Tensor:
    return maps.new_full((len(maps),), math.nan) if masks is None else energy_in_mask(maps, masks)


def _similarities(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Mean cosine of two different vectors, for each image and block."""
    found: list[Tensor] = []

    def look(block: RepresentativeVectors, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        k = block.k
        if k > 1:
            units = nn.functional.normalize(output.unflatten(1, (k, -1)), dim=2)
            cosines = units @ units.mT
            found.append((cosines.sum((1, 2)) - k) / (k * (k - 1)))

    blocks = [block for block in model.modules() if isinstance(block, RepresentativeVectors)]
    handles = [block.register_forward_hook(look) for block in blocks]
    try:
        if blocks:
            with untouched(model), torch.no_grad():
                model(images)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _mean(values: list[Tensor]) -> float:
    return float(torch.cat(values).nanmean()) if values else math.nan
