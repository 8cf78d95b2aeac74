"""Training: `fit` builds data and network from a recipe, runs the loop and keeps a run folder."""

import math
import os
import shutil
import signal
import sys
import threading
import time
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from errno import ENOSPC
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from sightline import data, models, runs
from sightline.inference import copy_of
from sightline.recipe import Model, Recipe
from sightline.recipe import load as load_recipe
from sightline.runs import Run
from sightline.training import processes
from sightline.training.checkpoints import Checkpoints
from sightline.training.log import Log
from sightline.training.loop import Training
from sightline.training.losses import Loss, class_weights
from sightline.training.profile import StepProfile
from sightline.training.stages import check_stages

CHECKPOINT_EVERY = 300.0
"""Seconds between two states on the disk; an epoch ends with one, too, where that is no great part of its time."""
_SHARE = 0.1
"""Of the time, at most, that the states at the end of epochs may take to be written."""
_AGREE_EVERY = 50  # steps after which several processes ask one another whether to stop or to save


class _Stop(Exception):
    """Somebody asked to stop, and the state is whole."""


def fit(
    recipe: Recipe | Path | str,
    out: Path | str,
    overrides: Mapping[str, Any] | None = None,
    resume: bool = False,
    progress: bool = True,
    profile: bool = False,
) -> Run | list[Run]:
    """Train what a recipe says into a run folder; with several seeds, one run each in `out`/seed-0, ...

    From the first epoch on the folder holds weights that `sightline.load` reads. After Ctrl-C, a crash or a power cut,
    `resume` goes on from the last checkpoint and comes to the same weights, bit for bit, as without the interruption
    (on the same machine; on a GPU, as far as its kernels repeat themselves). The state is saved after each epoch, or
    after several that are shorter than ten times what that takes, and every five minutes; twice, so that a damaged file
    costs minutes.

    Processes that torchrun or SLURM has started train together: each takes its share of every batch, and the first one
    writes the folder, which all of them must see.

    Args:
        recipe: a Recipe or its YAML file.
        out: folder to write, new or empty.
        overrides: dotted field -> value, as in `{"optim.epochs": 3}`.
        resume: go on in `out`: what is finished stays, what has not begun begins.
        progress: show a bar, and a line per epoch, on stderr.
        profile: show where the time of ten steps goes, on stderr.

    Returns:
        The run, or the list of runs where the recipe names several seeds.

    Raises:
        ValueError: the recipe is wrong, or differs from that of the run to resume, or is too short for a profile, or
            the loss is not finite.
        OSError: `out` cannot be written or holds something else, or the disk is too small.
        MemoryError: a step does not fit into memory.
        KeyboardInterrupt: after Ctrl-C, when the state is saved.
    """
    asked = load_recipe(recipe, overrides)
    out = Path(out)
    _check_folder(out, resume)
    if asked.data.streaming:
        train, others = data.load_stream(asked.data)
    else:
        others = data.load(asked.data)
        train = others.pop("train")
    _check_possible(asked, train, others)
    show = (progress, profile) if processes.first() else (False, False)
    if show[0]:
        for notice in train.notices:
            print(f"notice: {notice}", file=sys.stderr)
    teacher = None if asked.optim.teacher is None else _teacher(asked.optim.teacher, train)
    folders = {seed: out / f"seed-{seed}" if len(asked.seeds) > 1 else out for seed in asked.seeds}
    with _asked_to_stop() as stop, _tf32(), _many_graphs() if asked.optim.compile else nullcontext():
        try:
            done = [
                _fit_one(replace(asked, seeds=(seed,)), train, others, teacher, folder, show, stop)
                for seed, folder in folders.items()
            ]
        finally:
            processes.end()
    return done if len(done) > 1 else done[0]


def begin(wanted: Model, num_classes: int, seed: int) -> nn.Module:
    """The network that training begins with; the global random state goes on from `seed`."""
    torch.manual_seed(seed)
    return models.create_model(wanted.name, num_classes=num_classes, weights=wanted.weights, **wanted.options)


def _fit_one(
    recipe: Recipe,
    train: data.ImageSet | data.ImageStream,
    others: dict[str, data.ImageSet],
    teacher: nn.Module | None,
    folder: Path,
    show: tuple[bool, bool],
    stop: threading.Event,
) -> Run:
    progress, profile = show
    checkpoints = Checkpoints(folder)
    begun = runs.open_run(folder) if (folder / "run.json").exists() else None
    if begun is not None:
        _check_same(recipe, begun, train.classes)
        if not checkpoints.exist():
            return begun
    cuda = range(torch.cuda.device_count())
    with torch.random.fork_rng(devices=cuda), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)
        network = begin(recipe.model, len(train.classes), recipe.seeds[0])
        if (unheeded := check_stages(network, recipe)) and progress:
            print(f"notice: {unheeded}", file=sys.stderr)
        _try(network, recipe, train.preprocess.size)
        weights = None
        if recipe.optim.class_weights and isinstance(train, data.ImageSet):
            weights = class_weights(train.labels, len(train.classes))
        loss = Loss(recipe.optim, weights, teacher, network)
        training = Training(network, train, others.get("val") or None, recipe, loss)
        if begun is not None:
            training.restore(*checkpoints.read())
        coming = training.steps * (recipe.optim.epochs - training.epoch) - training.step
        watched, profiled = StepProfile(training.fabric.device, coming) if profile else None, training.seen
        run = Run(
            folder=folder,
            recipe=recipe,
            seed=recipe.seeds[0],
            classes=train.classes,
            preprocess=train.preprocess,
            info=_info(network) | ({"training": unheeded} if unheeded else {}) if begun is None else begun.info,
            history=[*training.history],
            skipped=_skipped(train, others),
            notices=[*train.notices],
        )
        keep = _Keeper(folder, checkpoints, training)
        keep.state()
        keep.run(run)
        with Log(folder, recipe.optim.epochs, training.steps, progress) as log:

            def tick() -> None:
                log.step(training.epoch * training.steps + training.step)
                nonlocal profiled
                if watched is not None and training.seen != profiled:  # not after a batch that is validated
                    watched.step()
                    profiled = training.seen
                stopped, due = keep.asked(stop.is_set())
                if stopped:
                    raise _Stop
                if due:
                    training.check_finite()
                    keep.state()

            try:
                for row in training.epochs(tick):
                    seconds = sum(past["seconds"] for past in training.history)
                    info = run.info | {"wall time": f"{seconds:.1f} s"}
                    run = replace(run, info=info, history=[*training.history], skipped=_skipped(train, others))
                    keep.run(run, training.weights() if training.improved else None)
                    keep.epoch()
                    log.epoch(row)
            except _Stop:
                training.check_finite()
                keep.state()
                place = f"epoch {training.epoch + 1}, step {training.step} of {training.steps}"
                raise KeyboardInterrupt(f"stopped in {place}; go on with --resume (fit: resume=True)") from None
        keep.finish()
    return run


class _Keeper:
    """Writes the files of a run; of several processes, the first one does, and the others wait for it."""

    def __init__(self, folder: Path, checkpoints: Checkpoints, training: Training) -> None:
        self.folder, self.checkpoints, self.training = folder, checkpoints, training
        training.fabric.barrier()  # all have read what is there
        self.ticks, self.saved, self.took = 0, time.monotonic(), 0.0
        if processes.first():
            _check_space(folder, training)
            folder.mkdir(parents=True, exist_ok=True)

    def asked(self, stop: bool) -> tuple[bool, bool]:
        """Whether to stop, and whether to save the state, at a place on which all processes agree."""
        self.ticks += 1
        if self.training.part[1] > 1 and self.ticks % _AGREE_EVERY:
            return False, False
        due = time.monotonic() - self.saved > CHECKPOINT_EVERY
        stop, due = processes.any_of([stop, due], self.training.fabric.device)
        return stop, due

    def state(self) -> None:
        """Write how the training stands."""
        began = time.monotonic()
        state = self.training.state()
        if processes.first():
            with _advice(self.folder):
                self.checkpoints.write(*state)
        self.saved = time.monotonic()
        self.took = self.saved - began

    def epoch(self) -> None:
        """Write how the training stands, unless writing would take too much of the time; all processes agree."""
        due = self.took <= _SHARE * (time.monotonic() - self.saved)
        if processes.any_of([due], self.training.fabric.device)[0]:
            self.state()

    def run(self, run: Run, weights: dict[str, Tensor] | None = None) -> None:
        """Write what the user has of the run."""
        if processes.first():
            with _advice(self.folder):
                runs.save(run, weights)

    def finish(self) -> None:
        """Remove what only a training that goes on needs."""
        if processes.first():
            self.checkpoints.remove()
        self.training.fabric.barrier()


@contextmanager
def _advice(folder: Path) -> Generator[None]:
    """Say what to do where a file cannot be written."""
    try:
        yield
    except OSError as error:
        what = f"{error.strerror or error}; {folder} holds the last state that could be written, make room and --resume"
        raise OSError(error.errno, what) from error


@contextmanager
def _tf32() -> Generator[None]:
    """Matrix products of a GPU in TF32, as its convolutions are anyway, unless the user has set their precision."""
    try:
        default = torch.cuda.is_available() and torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # cannot be read where it was set by its newer names, `fp32_precision`
        default = False
    if default:
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        if default:
            torch.set_float32_matmul_precision("highest")


@contextmanager
def _many_graphs() -> Generator[None]:
    """Let networks of many sizes be compiled in one process, as a study does; PyTorch gives up after eight."""
    from torch import _dynamo

    with _dynamo.config.patch(recompile_limit=max(_dynamo.config.recompile_limit, 128)):
        yield


@contextmanager
def _asked_to_stop() -> Generator[threading.Event]:
    """An event that the first Ctrl-C (or SIGTERM) sets; the second one stops at once, in the middle of a step."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: FrameType | None) -> None:
        stop.set()
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _check_folder(out: Path, resume: bool) -> None:
    runs.check_writable(out)
    if not resume and out.is_dir() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty; choose a new folder, or go on with --resume (fit: resume=True)")


def _check_possible(recipe: Recipe, train: data.ImageSet | data.ImageStream, others: dict[str, data.ImageSet]) -> None:
    optim, side = recipe.optim, min(train.preprocess.size)
    if recipe.augment.crop >= side:
        raise ValueError(f"augment.crop: expected less than the side of the images, {side}, got {recipe.augment.crop}")
    if optim.patience is not None and not others.get("val"):
        raise ValueError("optim.patience needs validation images; set data.val above 0")
    if optim.class_weights and isinstance(train, data.ImageStream):
        raise ValueError("optim.class_weights needs all labels beforehand; set data.streaming to false")
    together = math.prod(processes.started())
    if min(optim.batch_size, len(train)) < together:
        raise ValueError(
            f"optim.batch_size: expected an image or more for each of {together} processes, got {optim.batch_size}; "
            "start fewer processes"
        )
    if optim.micro_batches == 0 and together > 1:
        raise ValueError("optim.micro_batches: 0 is found out by one process alone; give several a number")
    each, devices = processes.started()[1], torch.cuda.device_count()
    if each > devices > 0:
        raise ValueError(f"expected one GPU for each of {each} processes on a machine, got {devices}; start fewer")
    if optim.sync_batch_norm and not torch.cuda.is_available():
        raise ValueError("optim.sync_batch_norm: there is no BatchNorm over several CPUs, only over GPUs; set it false")
    if optim.compile and torch.cuda.is_available() and not any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc"))):
        raise ValueError("optim.compile: needs a C compiler beside the GPU, found none; install gcc or set it false")
    if optim.precision == "16-mixed" and not torch.cuda.is_available():
        raise ValueError("optim.precision: 16-mixed needs a GPU, there is none; use bf16-mixed or 32-true")


def _teacher(folder: str, train: data.ImageSet | data.ImageStream) -> nn.Module:
    run = runs.open_run(folder)
    if run.classes != train.classes:
        raise ValueError(
            f"optim.teacher: expected a run on the {len(train.classes)} classes of the data, got {folder} with "
            f"{len(run.classes)} others; train one on this data"
        )
    if (run.preprocess.mean, run.preprocess.std) != (train.preprocess.mean, train.preprocess.std):
        raise ValueError(
            f"optim.teacher: expected a run on images normalized alike, got {folder} with mean {run.preprocess.mean}; "
            "train one on this data"
        )
    return runs.load(folder)


def _try(network: nn.Module, recipe: Recipe, size: tuple[int, int]) -> None:
    """One pass through a copy of the network, before anything is written."""
    batch = min(recipe.optim.batch_size, 2)
    try:
        with torch.no_grad():
            copy_of(network).train()(torch.zeros(batch, 3, *size))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ValueError(
            f"{recipe.model.name} cannot be trained on batches of {recipe.optim.batch_size} images of {size[1]} x "
            f"{size[0]} pixels: {' '.join(str(error).split())}; change data.size or optim.batch_size"
        ) from error


def _skipped(train: data.ImageSet | data.ImageStream, others: dict[str, data.ImageSet]) -> list[tuple[str, str]]:
    return [skipped for images in (train, *others.values()) for skipped in images.skipped]


def _check_space(folder: Path, training: Training) -> None:
    """Two states (weights, two moments, average) stay, and a third is there while one is replaced; so the weights."""
    weights = sum(t.numel() * t.element_size() for t in training.network.state_dict().values())
    existing = next(path for path in folder.absolute().parents if path.exists())
    needed, free = 14 * weights, shutil.disk_usage(existing).free
    if free < needed:
        room = f"expected {needed / 2**20:.0f} MiB free for the run, got {free / 2**20:.0f} MiB"
        raise OSError(ENOSPC, f"disk too full, {room}", str(folder))


def _check_same(recipe: Recipe, run: Run, classes: tuple[str, ...]) -> None:
    old, new = asdict(run.recipe), asdict(recipe)
    changed = [
        f"{part}.{name} was {old[part][name]!r}, now {value!r}"
        for part in ("data", "augment", "model", "optim")
        for name, value in new[part].items()
        if value != old[part][name]
    ]
    if run.recipe.seeds != recipe.seeds:
        changed.append(f"seeds was {run.recipe.seeds}, now {recipe.seeds}")
    if changed:
        raise ValueError(f"run {run.folder} was begun with another recipe: {'; '.join(changed)}; choose a new folder")
    if run.classes != classes:
        other = sorted({*run.classes} ^ {*classes}) or ["the same in another order"]
        raise ValueError(
            f"run {run.folder} was begun with {len(run.classes)} classes, the data now has {len(classes)}; they differ "
            f"in {', '.join(other[:3])}{', ...' * (len(other) > 3)}; choose a new folder"
        )


def _info(network: nn.Module) -> dict[str, str]:
    return runs.surroundings() | {"parameters": f"{sum(p.numel() for p in network.parameters()):,}"}
