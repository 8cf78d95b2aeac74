"""What a training shows: what is trained, the expected time, a progress bar, a line per epoch, a logger."""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sightline import data, runs
from sightline.facts import duration
from sightline.recipe import Recipe
from sightline.training.loop import Training

_LISTED = 8
"""Classes whose images are counted one by one."""
_TIMED = 5
"""Steps that the expected time is estimated from, after the first, which is slower."""


class Log(ExitStack):
    """A progress bar on a terminal, one line per epoch, and the figures for a logger, which is closed in the end."""

    def __init__(self, logger: Any, epochs: int, steps: int, show: bool, frozen: int = 0) -> None:
        super().__init__()
        self.epochs, self.steps, self.show = epochs, steps, show
        self.stages = [(start, end) for start, end in ((0, min(frozen, epochs)), (frozen, epochs)) if start < end]
        self.began: tuple[int, float] | None = None
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        columns = TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"), TimeRemainingColumn()
        hidden = not (show and self.console.is_terminal)
        self.bar = self.enter_context(Progress(*columns, console=self.console, transient=True, disable=hidden))
        self.task = self.bar.add_task("", total=epochs * steps)
        self.logger = logger
        if logger is not None:
            self.push(lambda kind, *_: logger.finalize("success" if kind is None else "failed"))

    def step(self, done: int) -> None:
        """Move the bar to this step of the whole training; after the first steps, print the expected time."""
        self.bar.update(self.task, completed=done)
        if self.show and self.stages:
            self._estimate(done)

    def _estimate(self, done: int) -> None:
        start, end = self.stages[0]
        if done > end * self.steps or done <= start * self.steps:  # not this stage
            self.stages = self.stages[1:] if done > end * self.steps else self.stages
            return
        if self.began is None or self.began[0] <= start * self.steps:
            self.began = done, time.perf_counter()
        elif done - self.began[0] >= min(_TIMED, max(self.steps - 2, 1)):
            each = (time.perf_counter() - self.began[1]) / (done - self.began[0])
            which = f" for epoch{'s' * (end > start + 1)} {start + 1}" + f" to {end}" * (end > start + 1)
            self.console.print(f"expected time{which}: about {duration(each * self.steps * (end - start))}")
            self.stages = self.stages[1:]

    def epoch(self, row: dict[str, float]) -> None:
        """Log the figures of an epoch."""
        number = int(row["epoch"])
        if self.logger is not None:
            figures = {name: value for name, value in row.items() if name != "epoch" and not math.isnan(value)}
            self.logger.log_metrics(figures, step=number)
        if self.show:
            line = f"epoch {number}/{self.epochs}  lr {row['lr']:.3g}  loss {row['train_loss']:.3f}"
            line += f"  accuracy {row['train_accuracy']:.1%}"
            if not math.isnan(row["val_loss"]):
                line += f"  val loss {row['val_loss']:.3f}  val accuracy {row['val_accuracy']:.1%}"
            self.console.print(f"{line}  {row['seconds']:.1f} s")


def header(
    recipe: Recipe, training: Training, train: data.ImageSet | data.ImageStream, others: Mapping[str, data.ImageSet]
) -> Iterator[str]:
    """What is trained on what, and how, one line each."""
    model, optim = recipe.model, recipe.optim
    yield f"data: {train.name}, {len(train.classes)} classes; {_counts(train, others)}"
    height, width = train.preprocess.size
    stored = train.source_side if isinstance(train, data.ImageSet) else None
    scaled = f"{stored} px, scaled to " if stored not in (None, max(height, width)) else ""
    yield f"size: {scaled}{width} x {height} px; {_normalization(recipe, train.preprocess)}"
    block = f" with {model.options['attention']}" if model.options.get("attention") else ""
    start = f", weights {model.weights}" if model.weights else ""
    yield f"network: {model.name.removeprefix(runs.OWN)}{block}{start}; {training.freezing.sentence()}"
    parts = [f"{training.last_epoch} epochs of {training.steps} steps", optim.optimizer, f"lr {optim.lr:g}"]
    parts += [f"backbone lr x {optim.backbone_lr:g}"] if optim.backbone_lr != 1 else []
    parts += [f"x {optim.layer_decay:g} from block to block"] if optim.layer_decay != 1 else []
    yield f"training: {', '.join(parts)}"
    device = training.fabric.device
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    yield f"device: {torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type}{threads}"


def _normalization(recipe: Recipe, preprocess: data.Preprocess) -> str:
    whose = "the network was pretrained with" if recipe.model.normalization == "network" else "of the training images"
    mean, std = (", ".join(f"{number:.3g}" for number in numbers) for numbers in (preprocess.mean, preprocess.std))
    return f"mean {mean} and deviation {std} {whose}"


def _counts(train: data.ImageSet | data.ImageStream, others: Mapping[str, data.ImageSet]) -> str:
    """Images of each class in each split."""
    sets = {"train": train, **others}
    total = " + ".join(f"{len(images)}" for images in sets.values())
    text = f"images ({' + '.join(sets)}): {total}"
    if not isinstance(train, data.ImageSet):
        return text
    counts = [
        np.bincount(images.labels[images.labels >= 0], minlength=len(train.classes))
        for images in sets.values()
        if isinstance(images, data.ImageSet)
    ]
    if len(train.classes) > _LISTED:
        return f"{text}; of a class {' + '.join(f'{count.min()} to {count.max()}' for count in counts)}"
    each = (f"{name} {' + '.join(str(count[i]) for count in counts)}" for i, name in enumerate(train.classes))
    return f"{text}; {', '.join(each)}"
