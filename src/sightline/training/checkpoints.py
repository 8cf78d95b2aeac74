"""The state of a training on the disk: the last one and the one before, each written as a whole."""

import warnings
from pathlib import Path
from typing import Any

from torch import Tensor

from sightline import runs

State = tuple[dict[str, Tensor], dict[str, Any]]


class Checkpoints:
    """Two files that are written in turns, so that the older one is whole whatever happens to the newer one.

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
        """Whether there is a training to go on with."""
        return any(file.exists() for file in self._files)

    def read(self) -> State:
        """The newest state that is whole; a damaged one is named in a warning.

        Raises:
            ValueError: all are damaged.
        """
        found: list[tuple[tuple[int, int], int, State]] = []
        damage: list[str] = []
        for place, file in enumerate(self._files):
            if file.exists():
                try:
                    tensors, facts = runs.unpack(file)
                    found.append(((facts["epoch"], facts["step"]), place, (tensors, facts)))
                except (ValueError, KeyError) as error:
                    damage.append(f"{file.name} is damaged ({' '.join(str(error).split())})")
        if not found:
            raise ValueError(f"{' and '.join(damage)}, so there is no state to go on from; train anew in a new folder")
        (epoch, step), place, state = max(found, key=lambda one: one[0])
        if damage:
            warnings.warn(f"{damage[0]}; going on from epoch {epoch + 1}, step {step} instead", stacklevel=2)
        self._next = 1 - place
        return state

    def write(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Replace the older of the two states.

        Raises:
            OSError: the disk is full or gone; the newer state is still there.
        """
        runs.write(self._files[self._next], runs.pack(tensors, facts))
        self._next = 1 - self._next

    def remove(self) -> None:
        """The training is finished; the newer state goes last."""
        for place in (self._next, 1 - self._next):
            self._files[place].unlink(missing_ok=True)
