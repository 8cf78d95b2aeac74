"""Networks side by side: changes to one recipe x seeds x data sets, trained and measured alike, with controls."""

import json
import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import torch
import yaml

from sightline import data, models, recipe, report, runs
from sightline.bench.measured import Maps, Measured, Quality, fresh, measure, read
from sightline.bench.result import CHEAP, Bench, Difference, Summary, student_interval, summary
from sightline.bench.study import Study, folder, load, width_for
from sightline.facts import Progress
from sightline.models.costs import Costs, costs
from sightline.recipe import Recipe
from sightline.report.studies import Cell, Effect, Part, Table
from sightline.runs import Run
from sightline.training import fit

__all__ = [
    "Bench",
    "Difference",
    "Maps",
    "Measured",
    "Quality",
    "Study",
    "Summary",
    "bench",
    "devices_for",
    "folder",
    "fresh",
    "load",
    "measure",
    "student_interval",
    "summary",
    "width_for",
]

_TIMED = 32
"""Images of a forward pass that is timed, at most: no more than a step of training takes."""
_Task = tuple[str, Recipe, Path, str]


def bench(
    study: Study,
    out: Path | str,
    only: Iterable[str] | None = None,
    jobs: int = 1,
    progress: Progress | None = None,
    datasets: Iterable[str] | None = None,
) -> Bench:
    """Train and measure every row with every seed of the study's recipe; what is done in `out` is not done again.

    Args:
        study: see `load`.
        out: folder; each run is `out`/row/seed-0, ..., or `out`/dataset/row/seed-0 where the study names data sets.
        only: rows to do. None: all, timed side by side.
        jobs: runs at a time, each in a process of its own with its share of the cores, and of the GPUs if there are
            several. With more than one, a script needs the guard `if __name__ == "__main__"`.
        progress: told of each finished run.
        datasets: data sets to do. None: all; then, if all rows are done too, bench.json, bench.md and bench.html are
            written.

    Returns:
        What was measured. A run that fails (its loss became infinite, `out` has it with another recipe) does not stop
        the others.

    Raises:
        ValueError: an unknown row or data set, or a network that cannot be built.
        OSError: `out` cannot be written.
    """
    out = Path(out)
    rows = _chosen("rows", only, study.rows)
    places = _chosen("data sets", datasets, study.datasets)
    if jobs < 1:
        raise ValueError(f"expected 1 job or more, got {jobs}; as many as cores at most")
    runs.check_writable(out)
    for place in places:
        for row in rows:
            _check(row, study.changed(row, place))
    teachers = {study.rows[row].get("optim.teacher") for row in rows} & set(study.rows)
    rows = [row for row in study.rows if row in {*rows, *teachers}]
    found: dict[tuple[str, str, int], Measured] = {}
    failed: dict[str, str] = {}
    order = [(place, row, seed) for place in places for row in rows for seed in study.recipe.seeds]
    for part in ([key for key in order if key[1] in teachers], [key for key in order if key[1] not in teachers]):
        tasks = {
            (place, row, seed): (row, study.of(row, seed, out, place), folder(out, row, seed, place), place)
            for place, row, seed in part
        }
        for (place, row, seed), result in _done(tasks, jobs):
            if isinstance(result, Measured):
                found[place, row, seed] = result
            else:
                failed[f"{place + ', ' if place else ''}{row}, seed {seed}"] = result
            if progress:
                progress("training and measuring", len(found) + len(failed), len(order))
    result = Bench(
        control=study.control,
        rows=tuple(rows),
        measured=tuple(found[key] for key in order if key in found),
        failed=failed,
        datasets=tuple(places),
        controls=study.named("control"),
        seeds=study.recipe.seeds,
        as_large_as=study.named("as_large_as"),
    )
    if only is None:
        for place in places:
            try:
                result.costs[place] = _costs(result.on(place), out, place)
            except (ValueError, TypeError, KeyError, OSError, RuntimeError) as error:
                result.no_costs[place] = " ".join(str(error).split())
        if datasets is None:
            _write(result, study, out)
    return result


def _chosen(kind: str, asked: Iterable[str] | None, known: Iterable[str]) -> list[str]:
    known = list(known)
    chosen = known if asked is None else list(asked)
    if unknown := [name for name in chosen if name not in known]:
        among = "; ".join(known) or "none"
        raise ValueError(f"expected {kind} out of: {among}; got {unknown[0]!r}")
    return chosen


def _check(row: str, wanted: Recipe) -> None:
    try:
        with torch.random.fork_rng(devices=[]):
            models.create_model(wanted.model.name, num_classes=2, **wanted.model.options)
    except ValueError as error:
        raise ValueError(f"row {row!r}: {error}") from error


def _done(tasks: dict[tuple[str, str, int], _Task], jobs: int) -> Iterator[tuple[tuple[str, str, int], Measured | str]]:
    if jobs == 1:
        for key, task in tasks.items():
            yield key, _train_and_measure(*task)
        return
    threads = max((os.cpu_count() or 1) // jobs, 1)
    context = get_context("spawn")
    devices: SimpleQueue[str | None] = context.SimpleQueue()
    for device in devices_for(jobs, torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")):
        devices.put(device)
    with ProcessPoolExecutor(jobs, context, _prepare, (threads, devices)) as pool:
        futures: dict[Future[Measured | str], tuple[str, str, int]] = {
            pool.submit(_train_and_measure, *task): key for key, task in tasks.items()
        }
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def devices_for(jobs: int, count: int, visible: str | None) -> list[str | None]:
    """What CUDA_VISIBLE_DEVICES becomes in each worker: one of `count` GPUs, in turn; None where there is none.

    `visible` is its value here, whose names are kept.

    >>> devices_for(3, 2, None), devices_for(2, 2, "GPU-a1,GPU-b2"), devices_for(2, 0, "")
    (['0', '1', '0'], ['GPU-a1', 'GPU-b2'], [None, None])
    """
    names = visible.split(",") if visible else [str(i) for i in range(count)]
    return [names[job % count].strip() if count else None for job in range(jobs)]


def _prepare(threads: int, devices: "SimpleQueue[str | None]") -> None:
    device = devices.get()
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device  # read when CUDA starts, which importing torch does not do
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a run in training listens for itself
    torch.set_num_threads(threads)


def _train_and_measure(row: str, wanted: Recipe, where: Path, dataset: str) -> Measured | str:
    try:
        run = fit(wanted, where, resume=True, progress=False)
        assert isinstance(run, Run)
        file = where / "measured.json"
        found = read(file)
        if found is None:
            found = measure(row, run, dataset)
            runs.write(file, json.dumps(runs.plain(found), indent=1).encode())
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        return " ".join(str(error).split())
    return replace(found, row=row, dataset=dataset)  # a row may have another name than when it was measured


def _costs(found: Bench, out: Path, dataset: str) -> dict[str, Costs]:
    """Of all rows of a data set, in turns in one process; kept as long as networks, device and torch are the same."""
    first = {run.row: folder(out, run.row, run.seed, dataset) for run in reversed(found.measured)}
    opened = {row: runs.open_run(where) for row, where in first.items()}
    sizes = {run.row: run.parameters for run in found.measured}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    timed = runs.plain(
        {
            "rows": {
                row: {"model": run.recipe.model, "size": run.recipe.data.size, "parameters": sizes[row]}
                for row, run in opened.items()
            },
            "device": torch.cuda.get_device_name() if device == "cuda" else device,
            "torch": torch.__version__,
        }
    )
    file = folder(out, "-", 0, dataset).parent.parent / "costs.json"
    if (known := _known_costs(file, timed)) is not None:
        return known
    result: dict[str, Costs] = {}
    for source in dict.fromkeys(run.recipe.data for run in opened.values()):
        images = data.load(source)["test"]
        same = {row: run for row, run in opened.items() if run.recipe.data == source}
        trained = min(run.recipe.optim.batch_size for run in same.values())
        batch = images.batch(range(min(_TIMED, trained, len(images))))
        inputs = data.normalize(batch.images.to(device), images.preprocess)
        alike = {row: runs.load(run.folder).to(device) for row, run in same.items()}
        for row, cost in costs(alike, inputs).items():
            seconds, saved = cost.seconds / len(inputs), cost.saved // len(inputs)
            result[row] = replace(cost, seconds=seconds, saved=saved)
    result = {row: result[row] for row in first}
    runs.write(file, json.dumps({"of": timed, "costs": runs.plain(result)}, indent=1).encode())
    return result


def _known_costs(file: Path, timed: Any) -> dict[str, Costs] | None:
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
        kept = {row: Costs(**cost | {"ratio": tuple(cost["ratio"])}) for row, cost in known["costs"].items()}
        return kept if known["of"] == timed else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _write(found: Bench, study: Study, out: Path) -> None:
    differences = {place: found.on(place).differences() for place in found.datasets}
    facts = runs.plain(found) | {"differences": runs.plain(differences)}
    runs.write(out / "bench.json", json.dumps(facts, indent=1).encode())
    runs.write(out / "bench.md", found.markdown().encode())
    plan = recipe.dump(study.recipe) + yaml.safe_dump({"datasets": study.datasets, "rows": study.rows}, sort_keys=False)
    report.write_study([_part(found.on(place)) for place in found.datasets], out, found.failed, plan)


def _part(found: Bench) -> Part:
    dataset = found.datasets[0]
    cost = found.costs.get(dataset, {})
    accuracy = {row: found.over_seeds(row, lambda run: 100 * run.accuracy).mean for row in cost}
    return Part(
        name=dataset,
        sentences=found.sentences(),
        tables=[
            Table(caption=caption, columns={name: name not in CHEAP for name in lines[0]}, lines=_filled(lines))
            for caption, lines in (
                (
                    "Mean ± standard deviation over seeds. To control: mean difference in percentage points, paired by "
                    "seed [Student’s 95 % interval over seeds], and its p after Holm’s correction for all rows of the "
                    "table that are not there as controls of others; “holds” where that is below 0.05 and no run is "
                    "missing. Maps of several blocks are divided by a slash, in the "
                    "order of the network.",
                    found.cells(),
                ),
                (
                    "Maps after training, on up to 200 test images: the network’s own map (the attention of its last "
                    "block with a spatial map, or its activation map if it has none), its activation map, and a blob "
                    "in the center that never looks at the image. In mask: share of the map in the mask, higher is "
                    "better. Deletion: area under the probability of the predicted class while pixels are removed, "
                    "lower is better, to be read against the center control of the same network. Sparsity ranks "
                    "nothing.",
                    found.map_cells(),
                ),
            )
            if lines
        ],
        effects=[
            Effect(
                name=row,
                values=[100 * gap for gap in of.by_seed.values()],
                mean=100 * of.mean,
                low=100 * of.low,
                high=100 * of.high,
                holds=of.holds,
            )
            for row, of in found.differences().items()
        ],
        cost={row: of.macs / 1e6 for row, of in cost.items()},
        accuracy=accuracy,
        controls={found.control, *found.controls.values()},
    )


def _filled(lines: Sequence[dict[str, Cell]]) -> list[dict[str, Cell]]:
    """Without the columns in which no row has anything."""
    names = [name for name in lines[0] if any(line[name].text != "-" for line in lines)]
    return [{name: line[name] for name in names} for line in lines]
