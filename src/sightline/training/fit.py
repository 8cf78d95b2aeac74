"""`fit`: data and network from a recipe, the training loop, and the run folder."""

import sys
import threading
import time
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import nn

from sightline import data, models, runs
from sightline.facts import Interval, notice, percent
from sightline.recipe import Data, Model, Recipe, Watch
from sightline.recipe import load as load_recipe
from sightline.runs import Run
from sightline.training import checks, processes
from sightline.training.checkpoints import Checkpoints, RunFiles
from sightline.training.environment import many_graphs, stop_requests, tf32
from sightline.training.freezing import zero_fresh_head
from sightline.training.log import Log, header
from sightline.training.loggers import create_logger
from sightline.training.loop import Training
from sightline.training.losses import Loss, class_weights
from sightline.training.probe import probe
from sightline.training.profile import StepProfile
from sightline.training.stages import check_stages
from sightline.training.watch import Watcher


class _Stop(Exception):
    """A stop was requested, and the training state is consistent."""


_Train = data.ImageSet | data.ImageStream
"""Images to train on."""


@overload
def fit(
    recipe: Recipe | Path | str,
    out: Path | str,
    overrides: Mapping[str, Any] | None = None,
    resume: bool = False,
    progress: bool = True,
    profile: bool = False,
) -> Run | list[Run]: ...


@overload
def fit(
    model: runs.Own,
    data: Recipe | Data | Path | str,
    out: Path | str,
    overrides: Mapping[str, Any] | None = None,
    resume: bool = False,
    progress: bool = True,
    profile: bool = False,
) -> Run | list[Run]: ...


def fit(*args: Any, **kwargs: Any) -> Run | list[Run]:
    """Train what a recipe describes, or a network of your own, into a run folder.

    `fit(recipe, out)` trains the network that a recipe names; `fit(model, data, out)` trains your own `nn.Module`.
    With several seeds there is one run each, in `out`/seed-0, ...

    From the first epoch on, the folder holds weights that `sightline.load` reads. After Ctrl-C, a crash or a power cut,
    `resume` continues from the last checkpoint and reaches the same weights, bit for bit, as an uninterrupted training
    (on the same machine; on a GPU, as far as its kernels are deterministic). A checkpoint is written after each epoch,
    or after several if an epoch is shorter than ten times the time of writing, and every five minutes. Two checkpoints
    are kept, so a damaged file costs minutes.

    Processes started by torchrun or SLURM train together: each takes its share of every batch, and the first one
    writes the folder, which all of them must see.

    Args:
        recipe: a Recipe or its YAML file.
        model: your own network, from normalized images to logits: a module, of which a copy is trained, or a function
            or class that builds one for a number of classes (see `sightline.runs.build`). The run folder holds its
            weights, not its code: load it by `sightline.load(run, model=...)`.
        data: of your own network: a source as in `data.source`, a `recipe.Data`, or a Recipe or its YAML file, whose
            part `model` is then ignored.
        out: folder to write, new or empty.
        overrides: dotted field -> value, as in `{"optim.epochs": 3}`.
        resume: continue in `out`: finished runs stay, missing ones are started.
        progress: show what is trained, a bar, and a line per epoch, on stderr.
        profile: show where the time of ten steps goes, on stderr.

    Returns:
        The run, or the list of runs if the recipe names several seeds.

    Raises:
        ValueError: the recipe is wrong, or differs from that of the run to resume, or is too short for a profile, or
            the loss is not finite, or the network does not return a logit for each class.
        OSError: `out` cannot be written or holds something else, or the disk is too small.
        MemoryError: a step does not fit into memory.
        KeyboardInterrupt: after Ctrl-C, once the checkpoint is written.
    """
    first = args[0] if args else kwargs.get("recipe", kwargs.get("model"))
    own = first is not None and not isinstance(first, Recipe | Path | str)
    return _fit_own(*args, **kwargs) if own else _fit(*args, **kwargs)


def _fit_own(model: runs.Own, data: Recipe | Data | Path | str, *args: Any, **kwargs: Any) -> Run | list[Run]:
    if isinstance(data, Data):
        start = Recipe(data=data)
    elif isinstance(data, Recipe) or Path(data).suffix in (".yaml", ".yml"):
        start = load_recipe(data)
    else:
        start = Recipe(data=Data(source=str(data)))
    if start.model.weights is not None:
        raise ValueError("expected no model.weights with a module of your own; load them into it before you pass it")
    return _fit(
        replace(start, model=replace(start.model, name=runs.own_name(model), options={})), *args, **kwargs, own=model
    )


def _fit(
    recipe: Recipe | Path | str,
    out: Path | str,
    overrides: Mapping[str, Any] | None = None,
    resume: bool = False,
    progress: bool = True,
    profile: bool = False,
    own: runs.Own | None = None,
) -> Run | list[Run]:
    recipe, out = runs.filled(load_recipe(recipe, overrides)), Path(out)
    checks.check_folder(out, resume)
    if recipe.data.streaming:
        train, others = data.load_stream(recipe.data)
    else:
        others = data.load(recipe.data)
        train = others.pop("train")
    if recipe.model.normalization == "network":
        train, others = _normalized_for(recipe.model, own, train, others)
    checks.check_possible(recipe, train, others)
    progress, profile = progress and processes.first(), profile and processes.first()
    if progress:
        for notice in train.notices:
            print(f"notice: {notice}", file=sys.stderr)
    teacher = None if recipe.optim.teacher is None else checks.checked_teacher(recipe.optim.teacher, train)
    folders = {seed: out / f"seed-{seed}" if len(recipe.seeds) > 1 else out for seed in recipe.seeds}
    with stop_requests() as stop, tf32(), many_graphs() if recipe.optim.compile else nullcontext():
        try:
            trainer = _Trainer(train, others, teacher, own, stop, progress, profile)
            trained = [trainer.run(replace(recipe, seeds=(seed,)), folder) for seed, folder in folders.items()]
        finally:
            processes.leave()
    return trained if len(trained) > 1 else trained[0]


def _normalized_for(
    model: Model, own: runs.Own | None, train: _Train, others: dict[str, data.ImageSet]
) -> tuple[_Train, dict[str, data.ImageSet]]:
    """The images with the mean and standard deviation that the network was pretrained with."""
    numbers = None if own is not None else runs.pretrained_input(model)
    if numbers is None:
        raise ValueError(
            f"model.normalization: expected a network of timm or torchvision, or weights from a run, got {model.name}; "
            "set it to data"
        )
    preprocess = replace(train.preprocess, mean=numbers.mean, std=numbers.std)
    return replace(train, preprocess=preprocess), {
        split: replace(images, preprocess=preprocess) for split, images in others.items()
    }


def initial_network(model: Model, num_classes: int, seed: int, own: runs.Own | None = None) -> nn.Module:
    """The network that training starts from; sets the global random state to `seed`."""
    torch.manual_seed(seed)
    if own is not None:
        return runs.build(own, num_classes)
    return models.create_model(model.name, num_classes=num_classes, weights=model.weights, **model.options)


@dataclass(frozen=True)
class _Trainer:
    """Trains one run after another on the same images."""

    train: _Train
    others: dict[str, data.ImageSet]
    teacher: nn.Module | None
    own: runs.Own | None
    stop: threading.Event
    progress: bool
    profile: bool
    probes: list[Interval | None] = field(default_factory=lambda: [])
    """The probe of the pretrained features, once it is made: the same for every seed."""

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
            if self.progress:
                print(*header(recipe, training, self.train, self.others), sep="\n", file=sys.stderr)
            if earlier is not None:
                training.restore(*checkpoints.read())
            profiler = None
            if self.profile:
                steps = training.steps * (training.last_epoch - training.epoch) - training.step
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
                probe=self._probe(recipe, training) if earlier is None else earlier.probe,
            )
            return self._train(training, run, RunFiles(folder, checkpoints, training), profiler)

    def _watcher(self, watch: Watch) -> Watcher | None:
        """What looks at the network between epochs, in the first process."""
        if not watch.every or not processes.first():
            return None
        images = self.others.get("val") or self.train
        assert isinstance(images, data.ImageSet)  # `check_possible` refuses streams
        chosen = np.random.default_rng(0).permutation(len(images))[: max(watch.images, watch.measured)]
        batch = images.batch(chosen)
        is_known = images.classes == self.train.classes and bool((batch.labels >= 0).all())
        return Watcher(
            pictures=batch.images,
            inputs=data.normalize(batch.images, images.preprocess),
            masks=batch.regions,
            labels=batch.labels if is_known else None,
            methods=watch.methods,
            layer=watch.layer,
            drawn=watch.images,
        )

    def _probe(self, recipe: Recipe, training: Training) -> Interval | None:
        """The linear probe of pretrained weights, on the test images."""
        test = self.others.get("test")
        if not recipe.model.weights or not isinstance(self.train, data.ImageSet) or not test or not processes.first():
            return None
        if not self.probes:
            start, accuracy = time.perf_counter(), None
            try:
                accuracy = probe(training.network, self.train, test)
                text = f"{percent(accuracy.value)} of {len(test)} test images, {time.perf_counter() - start:.1f} s"
            except ValueError as error:
                text = f"none, {error}"
            if self.progress:
                print(f"linear probe of the pretrained features: {text}", file=sys.stderr)
            self.probes.append(accuracy)
        return self.probes[0]

    def _training(self, recipe: Recipe) -> tuple[Training, str]:
        network = initial_network(recipe.model, len(self.train.classes), recipe.seeds[0], self.own)
        ignored = check_stages(network, recipe)
        if recipe.model.weights is not None and recipe.model.name != "protopnet":
            zero_fresh_head(network, recipe.model.weights, self.train.preprocess.size)
        if ignored and self.progress:
            print(f"notice: {ignored}", file=sys.stderr)
        checks.check_forward(network, recipe, self.train.preprocess.size, len(self.train.classes))
        checks.check_mixup(network, recipe, self.train.preprocess.size)
        checks.check_map_loss(network, recipe, self.train)
        weights = None
        if recipe.optim.class_weights and isinstance(self.train, data.ImageSet):
            weights = class_weights(self.train.labels, len(self.train.classes))
        loss = Loss(recipe.optim, weights, self.teacher, network)
        return Training(network, self.train, self.others.get("val") or None, recipe, loss), ignored

    def _train(self, training: Training, run: Run, files: RunFiles, profiler: StepProfile | None) -> Run:
        watch = run.recipe.watch
        watcher = self._watcher(watch)
        first = None if watcher is None else watcher.look(training.result)  # refuses methods before anything is written
        files.write_checkpoint()
        files.write_run(run)
        logger = create_logger(watch.logger, run.folder) if processes.first() else None
        with Log(logger, training.last_epoch, training.steps, self.progress, training.freezing.epochs) as log:
            if watcher is not None and first is not None and not training.epoch:
                watcher.judge(first)
                watcher.log(logger, first, 0)

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
                    if watcher is not None and (training.epoch % watch.every == 0 or training.finished):
                        look = watcher.look(training.result)
                        watcher.log(logger, look, training.epoch)
                        if sentence := watcher.judge(look, row["val_accuracy"]):
                            notice(sentence)
                            run = replace(run, info=run.info | {"shortcut": sentence})
                            files.write_run(run)
            except _Stop:
                training.check_finite()
                files.write_checkpoint()
                place = f"epoch {training.epoch + 1}, step {training.step} of {training.steps}"
                raise KeyboardInterrupt(f"stopped in {place}; continue with --resume (fit: resume=True)") from None
        files.finish()
        return run

    def _skipped(self) -> list[tuple[str, str]]:
        return [skipped for images in (self.train, *self.others.values()) for skipped in images.skipped]
