"""Trainings in two processes of this machine, as torchrun would start them."""

import os
import signal
import socket
from pathlib import Path
from typing import Any

from benchmarks.interruption import started

from sightline.recipe import Recipe
from sightline.training import checkpoints, fit
from sightline.training.log import Log


def train_as(rank: int, port: int, recipe: Recipe, out: Path, changes: dict[str, Any], die_at: int) -> None:
    """One of two processes, which save their state after every second step and may be killed after one."""
    checkpoints.CHECKPOINT_EVERY, checkpoints._AGREE_EVERY = 0.0, 2
    plain = Log.step

    def step(log: Log, done: int) -> None:
        plain(log, done)
        if done == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    Log.step = step
    os.environ |= {
        "TORCHELASTIC_RUN_ID": "test",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    fit(recipe, out, changes, resume=True, progress=False)


def train_in_two(
    recipe: Recipe, out: Path, changes: dict[str, Any] | None = None, die_at: int = -1
) -> list[int | None]:
    """Exit codes of the two."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = [started(train_as, rank, port, recipe, out, changes or {}, die_at) for rank in (0, 1)]
    for process in both:
        process.join(120)
        process.kill()
        process.join()
    return [process.exitcode for process in both]
