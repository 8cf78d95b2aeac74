"""`fit`: data and network from a recipe, the training loop, and the run folder."""

import sys
import threading
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sightline import data, models, runs
from sightline.recipe import Model, Recipe
from sightline.recipe import load as load_recipe
from sightline.runs import Run
from sightline.training import checks, processes
from sightline.training.checkpoints import Checkpoints, RunFiles
from sightline.training.environment import many_graphs, stop_requests, tf32
from sightline.training.log import Log
from sightline.training.loop import Training
from sightline.training.losses import Loss, class_weights
from sightline.training.profile import StepProfile
from sightline.training.stages import check_stages


class _Stop(Exception):
    """A stop was requested, and the training state is consistent."""


def fit(
    recipe: Recipe | Path | str,
    out: Path | str,
    overrides: Mapping[str, Any] | None = None,
    resume: bool = False,
    progress: bool = True,
    profile: bool = False,
) -> Run | list[Run]:
    """Train what a recipe describes into a run folder; with several seeds, one run each in `out`/seed-0, ...

    From the first epoch on, the folder holds weights that `sightline.load` reads. After Ctrl-C, a crash or a power cut,
    `resume` continues from the last checkpoint and reaches the same weights, bit for bit, as an uninterrupted training
    (on the same machine; on a GPU, as far as its kernels are deterministic). A checkpoint is written after each epoch,
    or after several if an epoch is shorter than ten times the time of writing, and every five minutes. Two checkpoints
    are kept, so a damaged file costs minutes.

    Processes started by torchrun or SLURM train together: each takes its share of every batch, and the first one
    writes the folder, which all of them must see.

    Args:
        recipe: a Recipe or its YAML file.
        out: folder to write, new or empty.
        overrides: dotted field -> value, as in `{"optim.epochs": 3}`.
        resume: continue in `out`: finished runs stay, missing ones are started.
        progress: show a bar, and a line per epoch, on stderr.
        profile: show where the time of ten steps goes, on stderr.

    Returns:
        The run, or the list of runs if the recipe names several seeds.

    Raises:
        ValueError: the recipe is wrong, or differs from that of the run to resume, or is too short for a profile, or
            the loss is not finite.
        OSError: `out` cannot be written or holds something else, or the disk is too small.
        MemoryError: a step does not fit into memory.
        KeyboardInterrupt: after Ctrl-C, once the checkpoint is written.
    """
    recipe, out = load_recipe(recipe, overrides), Path(out)
    checks.check_folder(out, resume)
    if recipe.data.streaming:
        train, others = data.load_stream(recipe.data)
    else:
        others = data.load(recipe.data)
        train = others.pop("train")
    checks.check_possible(recipe, train, others)
    progress, profile = progress and processes.first(), profile and processes.first()
    if progress:
        for notice in train.notices:
            print(f"notice: {notice}", file=sys.stderr)
    teacher = None if recipe.optim.teacher is None else checks.checked_teacher(recipe.optim.teacher, train)
    folders = {seed: out / f"seed-{seed}" if len(recipe.seeds) > 1 else out for seed in recipe.seeds}
    with stop_requests() as stop, tf32(), many_graphs() if recipe.optim.compile else nullcontext():
        try:
            trainer = _Trainer(train, others, teacher, stop, progress, profile)
            trained = [trainer.run(replace(recipe, seeds=(seed,)), folder) for seed, folder in folders.items()]
        finally:
            processes.leave()
    return trained if len(trained) > 1 else trained[0]


def initial_network(model: Model, num_classes: int, seed: int) -> nn.Module:
    """The network that training starts from; sets the global random state to `seed`."""
    torch.manual_seed(seed)
    return models.create_model(model.name, num_classes=num_classes, weights=model.weights, **model.options)


@dataclass(frozen=True)
class _Trainer:
    """Trains one run after another on the same images."""

    train: data.ImageSet | data.ImageStream
    others: dict[str, data.ImageSet]
    teacher: nn.Module | None
    stop: threading.Event
    progress: bool
    profile: bool

    def run(self, recipe: Recipe, folder: Path) -> Run:
        """Train, or continue, one run; a finished one is returned as it is."""
        checkpoints = Checkpoints(folder)
        earlier = runs.open_run(folder) if (folder / "run.json").exists() else None
        if earlier is not None:
            checks.check_same(recipe, earlier, self.train.classes)
            if not checkpoints.exist():
                return earlier
        cuda = range(torch.cuda.device_count())
        with torch.random.fork_rng(devices=cuda), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)
            training, ignored = self._training(recipe)
            if earlier is not None:
                training.restore(*checkpoints.read())
            profiler = None
            if self.profile:
                steps = training.steps * (recipe.optim.epochs - training.epoch) - training.step
                profiler = StepProfile(training.fabric.device, steps, training.seen)
            info = runs.surroundings() | {"parameters": f"{sum(p.numel() for p in training.network.parameters()):,}"}
            run = Run(
                folder=folder,
                recipe=recipe,
                seed=recipe.seeds[0],
                classes=self.train.classes,
                preprocess=self.train.preprocess,
                info=earlier.info if earlier is not None else info | ({"training": ignored} if ignored else {}),
                history=[*training.history],
                skipped=self._skipped(),
                notices=[*self.train.notices],
            )
            return self._train(training, run, RunFiles(folder, checkpoints, training), profiler)

    def _training(self, recipe: Recipe) -> tuple[Training, str]:
        network = initial_network(recipe.model, len(self.train.classes), recipe.seeds[0])
        ignored = check_stages(network, recipe)
        if ignored and self.progress:
            print(f"notice: {ignored}", file=sys.stderr)
        checks.check_forward(network, recipe, self.train.preprocess.size)
        weights = None
        if recipe.optim.class_weights and isinstance(self.train, data.ImageSet):
            weights = class_weights(self.train.labels, len(self.train.classes))
        loss = Loss(recipe.optim, weights, self.teacher, network)
        return Training(network, self.train, self.others.get("val") or None, recipe, loss), ignored

    def _train(self, training: Training, run: Run, files: RunFiles, profiler: StepProfile | None) -> Run:
        files.write_checkpoint()
        files.write_run(run)
        with Log(run.folder, run.recipe.optim.epochs, training.steps, self.progress) as log:

            def tick() -> None:
                log.step(training.epoch * training.steps + training.step)
                if profiler is not None:
                    profiler.step(training.seen)
                stop, due = files.poll(self.stop.is_set())
                if stop:
                    raise _Stop
                if due:
                    training.check_finite()
                    files.write_checkpoint()

            try:
                for row in training.epochs(tick):
                    seconds = sum(epoch["seconds"] for epoch in training.history)
                    info = run.info | {"wall time": f"{seconds:.1f} s"}
                    run = replace(run, info=info, history=[*training.history], skipped=self._skipped())
                    files.write_run(run, training.weights() if training.improved else None)
                    files.end_epoch()
                    log.epoch(row)
            except _Stop:
                training.check_finite()
                files.write_checkpoint()
                place = f"epoch {training.epoch + 1}, step {training.step} of {training.steps}"
                raise KeyboardInterrupt(f"stopped in {place}; continue with --resume (fit: resume=True)") from None
        files.finish()
        return run

    def _skipped(self) -> list[tuple[str, str]]:
        return [skipped for images in (self.train, *self.others.values()) for skipped in images.skipped]
