"""A training comes to the same weights, bit for bit, however it is interrupted; what cannot go on says why."""

import resource
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks.interruption import PLACES, TINY, kill_until_done, ran, result, train, train_and_die_writing
from tests.same import close
from torch import Tensor, nn

from sightline import models, runs
from sightline.recipe import Recipe
from sightline.training import Training, checkpoints, fit
from sightline.training.checkpoints import Checkpoints
from sightline.training.log import Log

SHORT = replace(TINY, optim=replace(TINY.optim, epochs=2))


@pytest.fixture(scope="module")
def through(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The training that nobody disturbs."""
    out = tmp_path_factory.mktemp("through") / "run"
    assert ran(train, SHORT, out, 300.0) == 0
    return out


@pytest.mark.slow
def test_killed_at_random_moments(through: Path, tmp_path: Path):
    kills = trainings = 0
    while not kills:
        out = tmp_path / str(trainings)
        kills += kill_until_done(SHORT, out, 0.0, np.random.default_rng([7, trainings]), 4.0)
        trainings += 1
        assert result(out) == result(through)


@pytest.mark.parametrize(
    ("file", "write", "place"),
    [
        pytest.param("model.safetensors", 1, PLACES[1], marks=pytest.mark.slow),
        ("model.safetensors", 1, PLACES[3]),
        pytest.param("checkpoint.safetensors", 1, PLACES[2], marks=pytest.mark.slow),
        ("checkpoint-2.safetensors", 3, PLACES[1]),
        pytest.param("run.json", 2, PLACES[3], marks=pytest.mark.slow),
    ],
)
def test_killed_while_it_writes(file: str, write: int, place: str, through: Path, tmp_path: Path):
    assert ran(train_and_die_writing, SHORT, tmp_path / "run", 0.0, file, write, place) == -signal.SIGKILL
    assert ran(train, SHORT, tmp_path / "run", 0.0) == 0 and result(tmp_path / "run") == result(through)


def die_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    plain = Log.step

    def crash(log: Log, done: int) -> None:
        plain(log, done)
        if done == step:
            monkeypatch.setattr(Log, "step", plain)
            raise RuntimeError("power cut")

    monkeypatch.setattr(Log, "step", crash)


def crashed(folder: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> Path:
    """A run that saved its state after every step, and crashed after one."""
    monkeypatch.setattr(checkpoints, "CHECKPOINT_EVERY", 0.0)
    die_at(monkeypatch, step)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(SHORT, folder, progress=False)
    return folder


def test_a_damaged_state_falls_back_to_the_one_before_and_says_so(
    through: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """It dies in step 3, before that step's state is written: the newest is that of step 2."""
    run = crashed(tmp_path / "run", monkeypatch, 3)
    states = {file: runs.unpack(file)[1]["step"] for file in run.glob("checkpoint*")}
    assert sorted(states.values()) == [1, 2]
    newest = max(states, key=lambda file: states[file])
    whole = newest.read_bytes()
    newest.write_bytes(whole[: len(whole) // 2])
    with pytest.warns(UserWarning, match=rf"^{newest.name} is damaged .*; resuming from epoch 1, step 1 instead$"):
        fit(SHORT, run, resume=True, progress=False)
    assert result(run)[:2] == result(through)[:2]


def test_without_a_whole_state_it_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = crashed(tmp_path / "run", monkeypatch, 3)
    for file in run.glob("checkpoint*"):
        file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"damaged .* and .*damaged .* cannot resume; train again in a new"):
        fit(SHORT, run, resume=True, progress=False)


def test_states_are_written_in_turns(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path)
    assert not checkpoints.exist()
    for step in range(5):
        checkpoints.write({"x": torch.tensor([step])}, {"epoch": step // 3, "step": step % 3})
        again = Checkpoints(tmp_path)
        assert again.exist() and again.read()[0]["x"].item() == step
    again.write({"x": torch.tensor([9])}, {"epoch": 2, "step": 0})
    assert sorted(runs.unpack(file)[0]["x"].item() for file in tmp_path.iterdir()) == [4, 9]
    again.remove()
    assert not list(tmp_path.iterdir())


def test_the_state_is_saved_between_epochs_too(through: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = crashed(tmp_path / "run", monkeypatch, 2)
    steps: list[int] = []
    plain = Log.step

    def note(log: Log, done: int) -> None:
        steps.append(done)
        plain(log, done)

    monkeypatch.setattr(Log, "step", note)
    fit(SHORT, run, resume=True, progress=False)
    assert steps[0] == 2
    assert result(run)[:2] == result(through)[:2]


def test_sigterm_stops_as_ctrl_c_does(through: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plain = Log.step

    def step(log: Log, done: int) -> None:
        plain(log, done)
        if done == 2:
            monkeypatch.setattr(Log, "step", plain)
            signal.raise_signal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(Log, "step", step)
    with pytest.raises(KeyboardInterrupt, match="stopped in epoch 1, step 2 of 5; continue with --resume"):
        fit(SHORT, tmp_path / "run", progress=False)
    assert signal.getsignal(signal.SIGTERM) is before
    fit(SHORT, tmp_path / "run", resume=True, progress=False)
    assert result(tmp_path / "run")[:2] == result(through)[:2]


def limited(recipe: Recipe, out: Path, size: int, said: Path) -> None:
    """Train where no file may grow beyond a size, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    sys.dont_write_bytecode = True  # the compiled files would be cut off as well
    checkpoints.CHECKPOINT_EVERY = 0.0
    plain = Training.state
    steps = 0

    def state(self: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        return plain(self)

    Training.state = state
    try:
        fit(recipe, out, progress=False)
    except OSError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        said.write_text(str(error))


def test_a_full_disk_keeps_the_last_state(through: Path, tmp_path: Path):
    assert ran(limited, SHORT, tmp_path / "run", 10_000, tmp_path / "said") == 0
    said = (tmp_path / "said").read_text()
    assert "File too large" in said and "holds the last checkpoint that was written, make room and use --resume" in said
    assert ran(train, SHORT, tmp_path / "run", 300.0) == 0 and result(tmp_path / "run") == result(through)


class Hungry(nn.Module):
    """A network that runs out of memory with more than a few images at once."""

    most = 8

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        self.network[0].running_mean += 1  # a trace that a failed attempt must not leave
        if len(images) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return self.network(images)


@pytest.fixture
def hungry(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(name: str, *, num_classes: int, weights: Path | None, **options: object) -> nn.Module:
        layers = nn.BatchNorm2d(3, momentum=0.0), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, num_classes)
        network = Hungry(nn.Sequential(*layers))
        network.load_state_dict(runs.unpack(weights)[0] if weights else network.state_dict())
        return network

    monkeypatch.setattr(models, "create_model", build)


def test_out_of_memory_says_what_to_do(hungry: None, tmp_path: Path):
    message = r"^out of memory in a step with 32 images of 40 x 40 pixels in 1 parts; set optim\.micro_batches higher"
    with pytest.raises(MemoryError, match=message):
        fit(SHORT, tmp_path / "run", progress=False)


def test_micro_batches_are_found(hungry: None, tmp_path: Path):
    """Found as four of eight images, it is the training with four; failed attempts leave nothing."""
    found = fit(SHORT, tmp_path / "found", {"optim.micro_batches": 0}, progress=False)
    named = fit(SHORT, tmp_path / "named", {"optim.micro_batches": 4}, progress=False)
    assert isinstance(found, runs.Run) and isinstance(named, runs.Run)
    assert result(found.folder)[:2] == result(named.folder)[:2]


def test_micro_batches_give_the_gradient_of_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Without BatchNorm and Dropout three parts of 32 images, of different sizes, do what one does."""
    linear = nn.Sequential(nn.AdaptiveAvgPool2d(6), nn.Flatten(), nn.Linear(108, 10))
    start = {name: tensor.clone() for name, tensor in linear.state_dict().items()}

    def build(name: str, *, num_classes: int, weights: Path | None, **options: object) -> nn.Module:
        linear.load_state_dict(start)
        return linear

    monkeypatch.setattr(models, "create_model", build)
    found: list[Tensor] = []
    for parts in (1, 3):
        changes = {"optim.micro_batches": parts, "optim.ema": None, "optim.optimizer": "sgd", "optim.lr": 0.1}
        run = fit(SHORT, tmp_path / str(parts), changes, progress=False)
        assert isinstance(run, runs.Run)
        found.append(runs.unpack(run.folder / "model.safetensors")[0]["2.weight"])
    assert close(found[1], found[0])
    assert not close(found[0], start["2.weight"])
