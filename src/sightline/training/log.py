"""What a person sees of a training: a bar, a line per epoch, TensorBoard."""

import math
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sightline.training.processes import first


class Log:
    """A bar on a terminal, one line per epoch anywhere, and scalars for TensorBoard where it is installed."""

    def __init__(self, folder: Path, epochs: int, steps: int, show: bool) -> None:
        self.folder, self.epochs, self.show = folder, epochs, show
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        columns = (
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TimeRemainingColumn(),
        )
        hidden = not (show and self.console.is_terminal)
        self.bar = Progress(*columns, console=self.console, transient=True, disable=hidden)
        self.task = self.bar.add_task("", total=epochs * steps)

    def __enter__(self) -> "Log":
        self.writer = None
        if first():
            with suppress(ModuleNotFoundError):
                from torch.utils.tensorboard import SummaryWriter

                self.writer = SummaryWriter(str(self.folder / "tensorboard"))
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()
        if self.writer is not None:
            self.writer.close()

    def step(self, done: int) -> None:
        """Move the bar to so many steps of the whole training."""
        self.bar.update(self.task, completed=done)

    def epoch(self, row: dict[str, float]) -> None:
        """Write down the figures of an epoch."""
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
