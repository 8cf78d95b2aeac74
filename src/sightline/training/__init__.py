"""Training: `fit` builds data and network from a recipe, runs the loop and keeps a run folder."""

import copy
import shutil
import signal
import threading
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from errno import ENOSPC
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

from sightline import data, models, runs
from sightline.recipe import Model, Recipe
from sightline.recipe import load as load_recipe
from sightline.runs import Run
from sightline.training.log import Log
from sightline.training.loop import Training
from sightline.training.losses import Loss, class_weights


class _Stop(Exception):
    """Somebody asked to stop, and the state is whole."""


def fit(
    recipe: Recipe | Path | str,
    out: Path | str,
    overrides: Mapping[str, Any] | None = None,
    resume: bool = False,
    progress: bool = True,
) -> Run | list[Run]:
    """Train what a recipe says into a run folder; with several seeds, one run each in `out`/seed-0, ...

    From the first epoch on the folder holds weights that `sightline.load` reads. After Ctrl-C, a crash or a power cut,
    `resume` goes on from the last checkpoint and comes to the same weights, bit for bit, as without the interruption
    (on the same machine; on a GPU, as far as its kernels repeat themselves).

    Args:
        recipe: a Recipe or its YAML file.
        out: folder to write, new or empty.
        overrides: dotted field -> value, as in `{"optim.epochs": 3}`.
        resume: go on in `out`: what is finished stays, what has not begun begins.
        progress: show a bar, and a line per epoch, on stderr.

    Returns:
        The run, or the list of runs where the recipe names several seeds.

    Raises:
        ValueError: the recipe is wrong, or differs from that of the run to resume, or the loss is not finite.
        OSError: `out` cannot be written or holds something else, or the disk is too small.
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
    teacher = None if asked.optim.teacher is None else _teacher(asked.optim.teacher, train)
    folders = {seed: out / f"seed-{seed}" if len(asked.seeds) > 1 else out for seed in asked.seeds}
    with _asked_to_stop() as stop:
        done = [
            _fit_one(replace(asked, seeds=(seed,)), train, others, teacher, folder, progress, stop)
            for seed, folder in folders.items()
        ]
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
    progress: bool,
    stop: threading.Event,
) -> Run:
    checkpoint = folder / "checkpoint.safetensors"
    begun = runs.open_run(folder) if (folder / "run.json").exists() else None
    if begun is not None:
        _check_same(recipe, begun)
        if not checkpoint.exists():
            return begun
    cuda = range(torch.cuda.device_count())
    with torch.random.fork_rng(devices=cuda), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)
        network = begin(recipe.model, len(train.classes), recipe.seeds[0])
        _try(network, recipe, train.preprocess.size)
        weights = None
        if recipe.optim.class_weights and isinstance(train, data.ImageSet):
            weights = class_weights(train.labels, len(train.classes))
        loss = Loss(recipe.optim, weights, teacher, network)
        training = Training(network, train, others.get("val") or None, recipe, loss)
        if checkpoint.exists():
            training.restore(*runs.unpack(checkpoint))
        run = Run(
            folder=folder,
            recipe=recipe,
            seed=recipe.seeds[0],
            classes=train.classes,
            preprocess=train.preprocess,
            info=_info(network) if begun is None else begun.info,
            history=[*training.history],
            skipped=_skipped(train, others),
        )
        _check_space(folder, training)
        folder.mkdir(parents=True, exist_ok=True)
        runs.write(checkpoint, runs.pack(*training.state()))
        runs.save(run)
        with Log(folder, recipe.optim.epochs, training.steps, progress) as log:

            def tick() -> None:
                log.step(training.epoch * training.steps + training.step)
                if stop.is_set():
                    raise _Stop

            try:
                for row in training.epochs(tick):
                    seconds = sum(past["seconds"] for past in training.history)
                    info = run.info | {"wall time": f"{seconds:.1f} s"}
                    run = replace(run, info=info, history=[*training.history], skipped=_skipped(train, others))
                    runs.save(run, training.result.state_dict() if training.improved else None)
                    runs.write(checkpoint, runs.pack(*training.state()))
                    log.epoch(row)
            except _Stop:
                training.check_finite()
                runs.write(checkpoint, runs.pack(*training.state()))
                place = f"epoch {training.epoch + 1}, step {training.step} of {training.steps}"
                raise KeyboardInterrupt(f"stopped in {place}; go on with --resume (fit: resume=True)") from None
        checkpoint.unlink()
    return run


@contextmanager
def _asked_to_stop() -> Generator[threading.Event]:
    """An event that the first Ctrl-C sets; the second one stops at once, in the middle of a step."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.getsignal(signal.SIGINT)

    def ask(number: int, frame: FrameType | None) -> None:
        stop.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


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
            f"optim.teacher: expected a run on images normalised alike, got {folder} with mean {run.preprocess.mean}; "
            "train one on this data"
        )
    return runs.load(folder)


def _try(network: nn.Module, recipe: Recipe, size: tuple[int, int]) -> None:
    """One pass through a copy of the network, before anything is written."""
    batch = min(recipe.optim.batch_size, 2)
    try:
        with torch.no_grad():
            copy.deepcopy(network).train()(torch.zeros(batch, 3, *size))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ValueError(
            f"{recipe.model.name} cannot be trained on batches of {recipe.optim.batch_size} images of {size[1]} x "
            f"{size[0]} pixels: {' '.join(str(error).split())}; change data.size or optim.batch_size"
        ) from error


def _skipped(train: data.ImageSet | data.ImageStream, others: dict[str, data.ImageSet]) -> list[tuple[str, str]]:
    return [skipped for images in (train, *others.values()) for skipped in images.skipped]


def _check_space(folder: Path, training: Training) -> None:
    """A checkpoint (weights, two moments, average) stands twice on the disk while it is replaced, the weights too."""
    weights = sum(t.numel() * t.element_size() for t in training.network.state_dict().values())
    existing = next(path for path in folder.absolute().parents if path.exists())
    needed, free = 10 * weights, shutil.disk_usage(existing).free
    if free < needed:
        room = f"expected {needed / 2**20:.0f} MiB free for the run, got {free / 2**20:.0f} MiB"
        raise OSError(ENOSPC, f"disk too full, {room}", str(folder))


def _check_same(recipe: Recipe, run: Run) -> None:
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


def _info(network: nn.Module) -> dict[str, str]:
    return runs.surroundings() | {"parameters": f"{sum(p.numel() for p in network.parameters()):,}"}
