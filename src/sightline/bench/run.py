"""`bench`: train and measure every row of a study with every seed, in one process or several."""

import json
import os
import signal
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sightline import models, runs
from sightline.bench.costs import costs_of_rows
from sightline.bench.measured import MeasuredRun, measure_run, measure_tasks, read
from sightline.bench.page import write_bench
from sightline.bench.result import Bench
from sightline.bench.study import Study, folder
from sightline.facts import Progress
from sightline.notebook import bar_of
from sightline.recipe import Recipe
from sightline.runs import Run
from sightline.scale.cluster import Cluster, check_installed, on_cluster
from sightline.training import fit

_Key = tuple[str, str, int]
"""Data set, row and seed."""


class _Job(NamedTuple):
    """One run to train and measure."""

    key: _Key
    recipe: Recipe
    folder: Path
    own: runs.Own | None
    tasks: Mapping[str, Mapping[str, Any]]


def bench(
    study: Study,
    out: Path | str,
    only: Iterable[str] | None = None,
    jobs: int = 1,
    progress: Progress | bool | None = None,
    datasets: Iterable[str] | None = None,
    cluster: Cluster | None = None,
) -> Bench:
    """Train and measure every row with every seed of the study's recipe; finished runs in `out` are not repeated.

    Args:
        study: see `load`.
        out: folder; each run is `out`/row/seed-0, ..., or `out`/dataset/row/seed-0 if the study names data sets.
        only: rows to do. None: all, timed side by side.
        jobs: runs at a time, each in its own process with its share of the cores, and of the GPUs if there are
            several. With more than one, a script needs the guard `if __name__ == "__main__"`, and networks of your own
            must be classes or functions of a module.
        progress: True shows a bar; a function is called with (what, done, total) after each run.
        datasets: data sets to do. None: all; then, if all rows are done too, bench.json, bench.md and bench.html are
            written.
        cluster: train on Ray instead of in `jobs` processes; its `workers` are the runs at a time. `out` and the images
            are on a disk that all machines share.

    Returns:
        The measurements. A run that fails (its loss became infinite, `out` has it with another recipe) does not stop
        the others.

    Raises:
        ValueError: an unknown row or data set, or a network that cannot be built.
        OSError: `out` cannot be written.
    """
    out, report = Path(out), bar_of(progress)
    rows = _chosen("rows", only, study.rows)
    chosen_datasets = _chosen("data sets", datasets, study.datasets)
    if cluster is not None:
        check_installed()
    if jobs < 1:
        raise ValueError(f"expected 1 job or more, got {jobs}; as many as cores at most")
    runs.check_writable(out)
    for dataset in chosen_datasets:
        for row in rows:
            network = study.changed(row, dataset).model
            if row in study.own:
                continue
            try:
                with torch.random.fork_rng(devices=[]):
                    models.create_model(network.name, num_classes=2, **network.options)
            except ValueError as error:
                raise ValueError(f"row {row!r}: {error}") from error
    teachers = {study.rows[row].get("optim.teacher") for row in rows} & set(study.rows)
    rows = [row for row in study.rows if row in {*rows, *teachers}]
    keys = [(dataset, row, seed) for dataset in chosen_datasets for row in rows for seed in study.recipe.seeds]
    outcomes: dict[_Key, MeasuredRun | str] = {}
    for is_teacher in (True, False):  # students need the runs of their teachers
        part = [(d, r, s) for d, r, s in keys if (r in teachers) == is_teacher]
        todo = [
            _Job((d, r, s), study.of(r, s, out, d), folder(out, r, s, d), study.own.get(r), study.tasks)
            for d, r, s in part
        ]
        for key, outcome in _results(todo, jobs, cluster):
            outcomes[key] = outcome
            if report is not None:
                report("training and measuring", len(outcomes), len(keys))
    reasons = {key: reason for key in keys if isinstance(reason := outcomes[key], str)}
    result = Bench(
        control=study.control,
        rows=tuple(rows),
        measured=tuple(run for key in keys if isinstance(run := outcomes[key], MeasuredRun)),
        failed={", ".join(filter(None, (d, r, f"seed {s}"))): reason for (d, r, s), reason in reasons.items()},
        datasets=tuple(chosen_datasets),
        controls=study.named("control"),
        seeds=study.recipe.seeds,
        as_large_as=study.named("as_large_as"),
    )
    if only is not None:
        return result
    for dataset in result.datasets:
        try:
            result.costs[dataset] = costs_of_rows(result.on(dataset), out, dataset, study.own)
        except (ValueError, TypeError, KeyError, OSError, RuntimeError) as error:
            result.no_costs[dataset] = " ".join(str(error).split())
    if datasets is None:
        write_bench(result, study, out)
    return result


def _chosen(kind: str, names: Iterable[str] | None, choices: Iterable[str]) -> list[str]:
    choices = list(choices)
    chosen = choices if names is None else list(names)
    if unknown := [name for name in chosen if name not in choices]:
        raise ValueError(f"expected {kind} out of: {'; '.join(choices) or 'none'}; got {unknown[0]!r}")
    return chosen


def _results(todo: list[_Job], jobs: int, cluster: Cluster | None) -> Iterator[tuple[_Key, MeasuredRun | str]]:
    """The measurements of each job, or why it failed, as they finish."""
    if cluster is not None:
        # a run that is cut short goes on where it stopped, also on another machine
        yield from on_cluster(cluster, _train_and_measure, ((job.key, job) for job in todo))
        return
    if jobs == 1:
        yield from ((job.key, _train_and_measure(job)) for job in todo)
        return
    threads = max((os.cpu_count() or 1) // jobs, 1)
    context = get_context("spawn")
    devices: SimpleQueue[str | None] = context.SimpleQueue()
    for device in devices_for(jobs, torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")):
        devices.put(device)
    with ProcessPoolExecutor(jobs, context, _prepare, (threads, devices)) as pool:
        futures = {pool.submit(_train_and_measure, job): job.key for job in todo}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def devices_for(jobs: int, count: int, visible: str | None) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES of each worker: one of `count` GPUs, round robin; None if there is none.

    `visible` is its value in this process, whose names are kept.

    >>> devices_for(3, 2, None), devices_for(2, 2, "GPU-a1,GPU-b2"), devices_for(2, 0, "")
    (['0', '1', '0'], ['GPU-a1', 'GPU-b2'], [None, None])
    """
    names = visible.split(",") if visible else [str(i) for i in range(count)]
    return [names[job % count].strip() if count else None for job in range(jobs)]


def _prepare(threads: int, devices: "SimpleQueue[str | None]") -> None:
    device = devices.get()
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device  # read when CUDA starts, which importing torch does not do
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a training handles it itself
    torch.set_num_threads(threads)


def _train_and_measure(job: _Job) -> MeasuredRun | str:
    dataset, row, _ = job.key
    try:
        if job.own is None:
            run = fit(job.recipe, job.folder, resume=True, progress=False)
        else:
            run = fit(job.own, job.recipe, job.folder, resume=True, progress=False)
        assert isinstance(run, Run)
        file = job.folder / "measured.json"
        kept = read(file)
        if kept is None:
            kept = measure_run(row, run, dataset, job.own)
            _keep(kept, file)
        measured = measure_tasks(kept, run, job.tasks, job.own)
        if measured != kept:
            _keep(measured, file)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        return " ".join(str(error).split())
    return replace(measured, row=row, dataset=dataset)  # the row may have been renamed since


def _keep(measured: MeasuredRun, file: Path) -> None:
    runs.write(file, json.dumps(runs.plain(measured), indent=1).encode())
