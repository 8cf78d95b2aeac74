"""Does a training that is killed at random moments, or while it writes its state, end with the same weights?

Each training runs in its own process, which is killed by SIGKILL after a random time and restarted until it finishes.
Its weights are then compared, bit by bit, with those of an undisturbed training. A second series is killed at every
stage of a write: before it, in the middle of the bytes, and before and after the file is renamed.
"""

import argparse
import csv
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np

from sightline import runs
from sightline.recipe import Augment, Data, Model, Optim, Recipe
from sightline.training import checkpoints, fit

TINY = Recipe(
    data=Data(train_size=160, test_size=20, val=0.02),
    augment=Augment(crop=2),
    model=Model(name="vgg_att2", options={"width": 1 / 16, "stem_pool": 4}),
    optim=Optim(epochs=4, batch_size=32, lr=0.01, ema=0.9),
)
PLACES = ("before the bytes", "in the middle of the bytes", "before the new name", "after the new name")
WRITES = [
    ("checkpoint.safetensors", 1),
    ("checkpoint-2.safetensors", 1),
    ("checkpoint.safetensors", 5),
    ("run.json", 1),
    ("run.json", 2),
    ("model.safetensors", 1),
    ("model.safetensors", 4),
    ("metrics.csv", 3),
]


def train(recipe: Recipe, out: Path, save_every: float) -> None:
    """Train in the process that is killed."""
    checkpoints.CHECKPOINT_EVERY = save_every
    fit(recipe, out, resume=True, progress=False)


def train_and_die_writing(recipe: Recipe, out: Path, save_every: float, file: str, write: int, place: str) -> None:
    """Train, and send SIGKILL to itself at one place of the n-th write of a file."""
    original, count = runs.write, 0

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def write_and_die(path: Path, content: bytes) -> None:
        nonlocal count
        count += path.name == file
        if path.name != file or count != write:
            original(path, content)
        elif place == PLACES[0]:
            die()
        elif place == PLACES[1]:
            path.with_name(f".{path.name}.tmp").write_bytes(content[: len(content) // 2])
            die()
        elif place == PLACES[2]:
            os.replace = lambda *_: die()
            original(path, content)
        else:
            original(path, content)
            die()

    runs.write = write_and_die
    train(recipe, out, save_every)


def started(what: Callable[..., None], *arguments: Any) -> BaseProcess:
    """A process that runs the function, forked from one that has imported everything and computed nothing."""
    context = get_context("forkserver")
    imported = (
        "sightline.training sightline.data sightline.models torchvision timm sklearn.datasets torch.utils.tensorboard"
    )
    context.set_forkserver_preload(imported.split())
    process = context.Process(target=what, args=arguments)
    process.start()
    return process


def ran(what: Callable[..., None], *arguments: Any) -> int | None:
    """Exit code of a process that runs the function to its end."""
    process = started(what, *arguments)
    process.join()
    return process.exitcode


def kill_until_done(recipe: Recipe, out: Path, save_every: float, rng: np.random.Generator, longest: float) -> int:
    """Number of kills until the training finished; the first comes within `longest` seconds, later ones wait longer."""
    kills = 0
    while True:
        process = started(train, recipe, out, save_every)
        process.join(rng.uniform(0, longest * 1.05**kills))
        if process.exitcode is None:
            process.kill()
        process.join()
        if process.exitcode == 0:
            return kills
        assert process.exitcode == -signal.SIGKILL, f"the training failed without being killed: {process.exitcode}"
        kills += 1


def die_in_every_write(recipe: Recipe, out: Path, save_every: float) -> Iterator[tuple[str, Path]]:
    """Folders of trainings that were killed once, at one place of one write, and then resumed to their end."""
    for file, write in WRITES:
        for place in PLACES:
            folder = out / f"{file}, {write}, {place}"
            ended = ran(train_and_die_writing, recipe, folder, save_every, file, write, place)
            assert ended == -signal.SIGKILL, f"the training was not killed: {ended}"
            assert ran(train, recipe, folder, save_every) == 0, f"{folder.name}: the training does not resume"
            yield folder.name, folder


def result(run: Path) -> tuple[bytes, list[dict[str, str]], set[str]]:
    """Everything that two trainings must have in common: weights, history without times, names of files."""
    with (run / "metrics.csv").open() as file:
        rows = [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]
    return (run / "model.safetensors").read_bytes(), rows, {path.name for path in run.iterdir()}


def main() -> None:
    from measure import save

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=60, metavar="N", help="least number of kills (60)")
    wanted = parser.parse_args().kills
    rng = np.random.default_rng()
    recipes = {
        "AdamW, average of weights": TINY,
        "SGD, clipped": replace(TINY, optim=Optim(epochs=4, lr=0.05, optimizer="sgd", clip_norm=1.0)),
        "bf16, mixup": replace(
            TINY, augment=Augment(crop=2, mixup=0.2), optim=Optim(epochs=4, lr=0.01, precision="bf16-mixed")
        ),
    }
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, recipe in recipes.items():
            undisturbed = Path(folder) / f"{name}, undisturbed"
            assert ran(train, recipe, undisturbed, 300.0) == 0
            began = time.perf_counter()
            assert ran(train, recipe, Path(folder) / f"{name}, timed", 300.0) == 0
            longest = 0.8 * (time.perf_counter() - began)
            kills, runs_done, equal = 0, 0, 0
            while kills * len(recipes) < wanted:
                out = Path(folder) / f"{name}, {runs_done}"
                kills += kill_until_done(recipe, out, 0.0, rng, longest)
                runs_done += 1
                equal += result(out) == result(undisturbed)
                print(f"{name}: {kills} kills, {equal} of {runs_done} trainings equal", flush=True)
            rows.append({"what": f"{name}: SIGKILL at random", "kills": kills, "trainings": runs_done, "equal": equal})
        undisturbed = Path(folder) / f"{next(iter(recipes))}, undisturbed"
        runs_killed = [run for _, run in die_in_every_write(TINY, Path(folder) / "w", 0.0)]
        equal = sum(result(run) == result(undisturbed) for run in runs_killed)
        kills = len(runs_killed)
        print(f"killed in a write: {equal} of {kills} trainings equal")
        rows.append({"what": "SIGKILL in a write", "kills": kills, "trainings": kills, "equal": equal})
    print(save("interruption", rows))


if __name__ == "__main__":
    main()
