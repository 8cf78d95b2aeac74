"""Two processes on this machine train as one does: the same weights, the same counts, one run folder."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.interruption import ran, train
from tests.same import close
from tests.together import train_in_two
from torch import Tensor

from sightline import runs
from sightline.recipe import Augment, Data, Model, Optim, Recipe
from sightline.training import fit, processes

PLAIN = Recipe(  # neither BatchNorm nor Dropout, which see the images of their own process
    data=Data(train_size=100, test_size=20, val=0.033),
    augment=Augment(crop=2),
    model=Model(name="tiny_vit", options={"patch": 10, "width": 16, "depth": 1, "heads": 2}),
    optim=Optim(epochs=2, batch_size=30, optimizer="sgd", lr=0.05, clip_norm=1.0),
)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "run"
    assert ran(train, PLAIN, out, 300.0) == 0
    return out


def weights(run: Path) -> dict[str, Tensor]:
    return runs.load_model(run).state_dict()


@pytest.mark.parametrize("changes", [{}, {"optim.sharded": True}], ids=["ddp", "fsdp"])
def test_two_processes_train_as_one(changes: dict[str, bool], alone: Path, tmp_path: Path):
    """33 validation images in batches of 30: the last batch is uneven, and each image counts once."""
    assert train_in_two(PLAIN, tmp_path / "run", changes) == [0, 0]
    one, two = weights(alone), weights(tmp_path / "run")
    assert one.keys() == two.keys()
    assert all(close(two[name], one[name]) for name in one)
    for single, double in zip(runs.open_run(alone).history, runs.open_run(tmp_path / "run").history, strict=True):
        assert double["train_accuracy"] == single["train_accuracy"]
        assert double["val_accuracy"] == single["val_accuracy"]
        assert double["train_loss"] == pytest.approx(single["train_loss"], rel=1e-5)
        assert double["val_loss"] == pytest.approx(single["val_loss"], rel=1e-5)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {path.name for path in alone.iterdir()}


VGG = {"model.name": "vgg_att2", "model.options": {"width": 1 / 16, "stem_pool": 4}}


@pytest.mark.parametrize(
    "kind",
    [pytest.param(VGG, id="ddp, dropout"), pytest.param({"optim.sharded": True}, id="fsdp", marks=pytest.mark.slow)],
)
def test_two_processes_go_on_as_if_nothing_had_happened(kind: dict[str, Any], tmp_path: Path):
    """With moments, a moving average and micro-batches in the state; killed in the second epoch."""
    changes = {"optim.optimizer": "adamw", "optim.ema": 0.9, "optim.micro_batches": 2} | kind
    assert train_in_two(PLAIN, tmp_path / "through", changes) == [0, 0]
    assert set(train_in_two(PLAIN, tmp_path / "killed", changes, die_at=5)) == {-signal.SIGKILL}
    assert train_in_two(PLAIN, tmp_path / "killed", changes) == [0, 0]
    through, killed = weights(tmp_path / "through"), weights(tmp_path / "killed")
    assert all(torch.equal(through[name], killed[name]) for name in through)
    rows = [
        [{name: value for name, value in row.items() if name != "seconds"} for row in runs.open_run(run).history]
        for run in (tmp_path / "through", tmp_path / "killed")
    ]
    assert rows[0] == rows[1]


def test_what_processes_cannot_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match=r"^optim.sync_batch_norm: needs GPUs, found none; set it false"):
        fit(PLAIN, tmp_path / "run", {"optim.sync_batch_norm": True}, progress=False)
    monkeypatch.setattr("sightline.training.processes.started", lambda: (2, 20))
    with pytest.raises(
        ValueError, match=r"expected at least one image for each of 40 processes, got 30; start fewer processes"
    ):
        fit(PLAIN, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ({}, (1, 1)),
        ({"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}, (2, 4)),
        ({"SLURM_PROCID": "3", "SLURM_NNODES": "2", "SLURM_NTASKS": "8", "SLURM_JOB_NAME": "train"}, (2, 4)),
        ({"SLURM_PROCID": "0", "SLURM_NNODES": "1", "SLURM_NTASKS": "8", "SLURM_JOB_NAME": "bash"}, (1, 1)),
    ],
)
def test_who_started_us(known: dict[str, str], expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch):
    for name in [name for name in os.environ if name.startswith(("SLURM", "TORCHELASTIC"))]:
        monkeypatch.delenv(name)
    for name, value in known.items():
        monkeypatch.setenv(name, value)
    assert processes.started() == expected
