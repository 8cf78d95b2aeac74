"""What a training shows while it runs: a progress bar, a line per epoch, TensorBoard."""

import math
from contextlib import ExitStack, suppress
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sightline.training.processes import first


class Log(ExitStack):
    """A progress bar on a terminal, one line per epoch, and scalars for TensorBoard if it is installed."""

    def __init__(self, folder: Path, epochs: int, steps: int, show: bool) -> None:
        super().__init__()
        self.epochs, self.show = epochs, show
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        columns = TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"), TimeRemainingColumn()
        hidden = not (show and self.console.is_terminal)
        self.bar = self.enter_context(Progress(*columns, console=self.console, transient=True, disable=hidden))
        self.task = self.bar.add_task("", total=epochs * steps)
        self.writer = None
        if first():
            with suppress(ModuleNotFoundError):
                from torch.utils.tensorboard import SummaryWriter

                self.writer = self.enter_context(SummaryWriter(str(folder / "tensorboard")))

    def step(self, done: int) -> None:
        """Move the bar to this step of the whole training."""
        self.bar.update(self.task, completed=done)

    def epoch(self, row: dict[str, float]) -> None:
        """Log the figures of an epoch."""
        number = int(row["epoch"])
        if self.writer is not None:
            for name, value in row.items():
                if name != "epoch" and not math.isnan(value):
                    self.writer.add_scalar(name, value, number)
        if self.show:
            line = f"epoch {number}/{self.epochs}  lr {row['lr']:.3g}  loss {row['train_loss']:.3f}"
            line += f"  accuracy {row['train_accuracy']:.1%}"
            if not math.isnan(row["val_loss"]):
                line += f"  val loss {row['val_loss']:.3f}  val accuracy {row['val_accuracy']:.1%}"
            self.console.print(f"{line}  {row['seconds']:.1f} s")
