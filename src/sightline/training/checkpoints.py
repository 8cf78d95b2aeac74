"""The files of a training run: its last two checkpoints, and what its user reads."""

import time
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from sightline import runs
from sightline.runs import Run
from sightline.training import processes
from sightline.training.checks import check_space
from sightline.training.loop import Training

CHECKPOINT_EVERY = 300.0
"""Seconds between two checkpoints within an epoch."""
_SHARE = 0.1
"""Largest share of the time that checkpoints at the ends of epochs may take."""
_AGREE_EVERY = 50  # steps between two agreements of several processes on whether to stop or to write a checkpoint

State = tuple[dict[str, Tensor], dict[str, Any]]


class Checkpoints:
    """Two files written alternately, so the older one stays intact whatever happens to the newer one.

    >>> import tempfile
    >>> import torch
    >>> checkpoints = Checkpoints(Path(tempfile.mkdtemp()))
    >>> for step in range(3):
    ...     checkpoints.write({"weight": torch.tensor([step])}, {"epoch": 0, "step": step})
    >>> tensors, facts = checkpoints.read()
    >>> tensors["weight"], facts["step"]
    (tensor([2]), 2)
    """

    def __init__(self, folder: Path) -> None:
        self._files = (folder / "checkpoint.safetensors", folder / "checkpoint-2.safetensors")
        self._next = 0

    def exist(self) -> bool:
        """Whether there is a training to resume."""
        return any(file.exists() for file in self._files)

    def read(self) -> State:
        """The newest intact state; a warning names a damaged one.

        Raises:
            ValueError: all are damaged.
        """
        states: list[tuple[int, int, int, State]] = []
        damage: list[str] = []
        for number, file in enumerate(self._files):
            if file.exists():
                try:
                    tensors, facts = runs.unpack(file)
                    states.append((facts["epoch"], facts["step"], number, (tensors, facts)))
                except (ValueError, KeyError) as error:
                    damage.append(f"{file.name} is damaged ({' '.join(str(error).split())})")
        if not states:
            raise ValueError(f"{' and '.join(damage)}, so the training cannot resume; train again in a new folder")
        epoch, step, number, state = max(states, key=lambda entry: entry[:3])
        if damage:
            warnings.warn(f"{damage[0]}; resuming from epoch {epoch + 1}, step {step} instead", stacklevel=2)
        self._next = 1 - number
        return state

    def write(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Replace the older of the two states.

        Raises:
            OSError: the disk is full or gone; the newer state is kept.
        """
        runs.write(self._files[self._next], runs.pack(tensors, facts))
        self._next = 1 - self._next

    def remove(self) -> None:
        """Delete both after the training, the newer one last."""
        for number in (self._next, 1 - self._next):
            self._files[number].unlink(missing_ok=True)


class RunFiles:
    """Writes the files of a run; of several processes, the first one writes and the others wait."""

    def __init__(self, folder: Path, checkpoints: Checkpoints, training: Training) -> None:
        self.folder, self.checkpoints, self.training = folder, checkpoints, training
        training.fabric.barrier()  # all have read the earlier files
        self._ticks, self._written_at, self._write_seconds = 0, time.monotonic(), 0.0
        if processes.first():
            check_space(folder, training.network)
            folder.mkdir(parents=True, exist_ok=True)

    def poll(self, stop: bool) -> tuple[bool, bool]:
        """Whether to stop, and whether a checkpoint is due; all processes agree on both."""
        self._ticks += 1
        if self.training.world_size > 1 and self._ticks % _AGREE_EVERY:
            return False, False
        due = time.monotonic() - self._written_at > CHECKPOINT_EVERY
        stop, due = processes.any_process([stop, due], self.training.fabric.device)
        return stop, due

    def write_checkpoint(self) -> None:
        """Write the state of the training."""
        start = time.monotonic()
        state = self.training.state()
        if processes.first():
            with self._advice():
                self.checkpoints.write(*state)
        self._written_at = time.monotonic()
        self._write_seconds = self._written_at - start

    def end_epoch(self) -> None:
        """Write a checkpoint unless that would take too much of the time; all processes agree."""
        due = self._write_seconds <= _SHARE * (time.monotonic() - self._written_at)
        if processes.any_process([due], self.training.fabric.device)[0]:
            self.write_checkpoint()

    def write_run(self, run: Run, weights: dict[str, Tensor] | None = None) -> None:
        """Write what the user reads of the run."""
        if processes.first():
            with self._advice():
                runs.save(run, weights)

    def finish(self) -> None:
        """Delete the checkpoints."""
        if processes.first():
            self.checkpoints.remove()
        self.training.fabric.barrier()

    @contextmanager
    def _advice(self) -> Generator[None]:
        """Add advice to the error if a file cannot be written."""
        try:
            yield
        except OSError as error:
            reason = error.strerror or error
            advice = f"{reason}; {self.folder} holds the last checkpoint that was written, make room and use --resume"
            raise OSError(error.errno, advice) from error
