"""Training: it learns, it can stop and go on anywhere to the same bits, and it refuses in one line."""

import math
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from sightline import data, models, runs
from sightline.attention import HardAttention
from sightline.recipe import Augment, Data, Model, Optim, Recipe
from sightline.training import Training, checks, fit, loop
from sightline.training.checkpoints import Checkpoints
from sightline.training.log import Log
from sightline.training.losses import Loss, class_weights, distillation
from sightline.training.optimizers import average, create_optimizer
from sightline.training.schedule import learning_rate

pytestmark = pytest.mark.usefixtures("few_validation_images")

TINY = Recipe(
    data=Data(train_size=96, test_size=20),
    augment=Augment(crop=2),
    model=Model(name="vgg_att2", options={"width": 1 / 16, "stem_pool": 4}),
    optim=Optim(epochs=2, batch_size=32, optimizer="sgd", lr=0.05, weight_decay=5e-4),
)


def optim(**changes: object) -> Recipe:
    return replace(TINY, optim=replace(TINY.optim, **changes))


def weights(run: object) -> dict[str, Tensor]:
    assert isinstance(run, runs.Run)
    return runs.load_model(run.folder).state_dict()


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def without_time(run: object) -> list[dict[str, float]]:
    assert isinstance(run, runs.Run)
    return [{name: value for name, value in row.items() if name != "seconds"} for row in run.history]


def test_a_run_is_whole(tmp_path: Path):
    run = fit(TINY, tmp_path / "run", {"seeds": [5]}, progress=False)
    assert isinstance(run, runs.Run)
    assert runs.open_run(run.folder) == run
    assert run.seed == 5 and run.recipe.seeds == (5,)
    assert len(run.classes) == 10
    assert set(run.info) == {"command", "date", "hardware", "versions", "parameters", "wall time"}
    assert run.info["parameters"] == f"{sum(p.numel() for p in runs.load_model(run.folder).parameters()):,}"
    assert [row["epoch"] for row in run.history] == [1.0, 2.0]
    assert all(0 < row["seconds"] < 60 and 0 <= row["val_accuracy"] <= 1 for row in run.history)
    files = {path.name for path in run.folder.iterdir()}
    assert files == {"recipe.yaml", "model.safetensors", "run.json", "metrics.csv", "tensorboard"}


def test_it_learns_and_validates_what_it_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A linear model remembers 64 images; the accuracy in the history is that of the saved weights."""

    def linear(name: str, *, num_classes: int, weights: Path | None, **options: object) -> nn.Module:
        network = nn.Sequential(nn.AdaptiveAvgPool2d(10), nn.Flatten(), nn.Linear(300, num_classes))
        network.load_state_dict(runs.unpack(weights)[0] if weights else network.state_dict())
        return network

    monkeypatch.setattr(models, "create_model", linear)
    asked = Recipe(data=Data(train_size=64), optim=Optim(epochs=20, batch_size=16, lr=0.05, weight_decay=0.0))
    run = fit(asked, tmp_path / "run", progress=False)
    assert isinstance(run, runs.Run)
    assert run.history[0]["train_accuracy"] < 0.3 < 0.9 < run.history[-1]["train_accuracy"]
    assert run.history[-1]["train_loss"] < 0.5 * run.history[0]["train_loss"]
    val = data.load(asked.data)["val"]
    batch = val.batch(range(len(val)))
    right = runs.load_model(run.folder)(data.normalize(batch.images, run.preprocess)).argmax(1) == batch.labels
    assert run.history[-1]["val_accuracy"] == float(right.double().mean())


@pytest.mark.parametrize(
    ("recipe", "steps"),
    [
        pytest.param(optim(clip_norm=1.0), 1, id="sgd-first-step"),
        pytest.param(optim(ema=0.9, label_smoothing=0.1), 3, id="ema-after-the-last-step-of-an-epoch"),
        pytest.param(optim(optimizer="adamw", lr=0.01, class_weights=True), 5, id="adamw-second-epoch"),
        pytest.param(optim(precision="bf16-mixed", schedule="cosine", warmup=0.5), 4, id="bf16"),
        pytest.param(optim(patience=1, epochs=3), 4, id="patience"),
    ],
)
def test_stopped_and_resumed_is_bit_equal(
    recipe: Recipe, steps: int, tmp_path: Path, ctrl_c_after: Callable[[int], None]
):
    through = fit(recipe, tmp_path / "through", progress=False)
    ctrl_c_after(steps)
    with pytest.raises(KeyboardInterrupt, match=r"stopped in epoch \d, step \d of 3; continue with --resume"):
        fit(recipe, tmp_path / "stopped", progress=False)
    torch.manual_seed(99)
    resumed = fit(recipe, tmp_path / "stopped", resume=True, progress=False)
    assert equal(weights(through), weights(resumed))
    assert without_time(through) == without_time(resumed)
    assert not (tmp_path / "stopped" / "checkpoint.safetensors").exists()


def test_a_crash_resumes_from_the_last_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sightline.training.checkpoints._SHARE", math.inf)
    through = fit(TINY, tmp_path / "through", progress=False)
    plain = Log.step

    def crash(log: Log, done: int) -> None:
        plain(log, done)
        if done == 5:
            raise RuntimeError("power cut")

    monkeypatch.setattr(Log, "step", crash)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(TINY, tmp_path / "crashed", progress=False)
    assert len(runs.open_run(tmp_path / "crashed").history) == 1
    runs.load_model(tmp_path / "crashed")
    steps: list[int] = []
    monkeypatch.setattr(Log, "step", lambda log, done: steps.append(done))
    assert equal(weights(through), weights(fit(TINY, tmp_path / "crashed", resume=True, progress=False)))
    assert steps[:3] == [4, 5, 6]


def test_states_of_epochs_take_no_great_part_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    written: list[tuple[int, int]] = []
    plain = Checkpoints.write

    def slowly(checkpoints: Checkpoints, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        written.append((facts["epoch"], facts["step"]))
        plain(checkpoints, tensors, facts)
        time.sleep(0.2)

    monkeypatch.setattr(Checkpoints, "write", slowly)
    for share, expected in {0.0: [(0, 0)], math.inf: [(0, 0), (1, 0), (2, 0)]}.items():
        monkeypatch.setattr("sightline.training.checkpoints._SHARE", share)
        written.clear()
        run = fit(TINY, tmp_path / str(share), progress=False)
        assert isinstance(run, runs.Run) and len(run.history) == 2 and written == expected


def test_resume_of_a_finished_run_and_of_none(tmp_path: Path):
    run = fit(TINY, tmp_path / "run", {"optim.epochs": 1}, resume=True, progress=False)
    assert fit(TINY, tmp_path / "run", {"optim.epochs": 1}, resume=True, progress=False) == run


def test_resume_on_other_images_is_refused(tmp_path: Path, ctrl_c_after: Callable[[int], None]):
    rng = np.random.default_rng(0)
    for name, count in {"train/a": 20, "train/b": 20, "test/a": 4, "test/b": 4}.items():
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)).save(tmp_path / "images" / name / f"{i}.png")
    changes = {"data.source": str(tmp_path / "images"), "data.size": 16, "optim.batch_size": 8}
    changes |= {
        "data.train_size": None,
        "data.test_size": None,
        "model.name": "cifar_resnet",
        "model.options": {"depth": 8},
    }
    ctrl_c_after(7)
    with pytest.raises(KeyboardInterrupt):
        fit(optim(epochs=2), tmp_path / "run", changes, progress=False)
    (tmp_path / "images/train/c").mkdir()
    (tmp_path / "images/train/b/0.png").rename(tmp_path / "images/train/c/0.png")
    with pytest.raises(ValueError, match="started with 2 classes, the data now has 3; they differ in c; choose a new"):
        fit(optim(epochs=2), tmp_path / "run", changes, progress=False, resume=True)
    shutil.rmtree(tmp_path / "images/train/c")
    for i in range(1, 9):
        (tmp_path / f"images/train/b/{i}.png").unlink()
    with pytest.raises(ValueError, match="4 steps per epoch, as when the training started, got 3; restore"):
        fit(optim(epochs=2), tmp_path / "run", changes, progress=False, resume=True)


def test_resume_with_another_recipe_is_refused(tmp_path: Path):
    fit(TINY, tmp_path / "run", {"optim.epochs": 1}, progress=False)
    with pytest.raises(ValueError, match=r"another recipe: optim\.epochs was 1, now 2; seeds was \(0,\), now \(3,\);"):
        fit(TINY, tmp_path / "run", {"seeds": [3]}, resume=True, progress=False)


def test_several_seeds_give_one_run_each(tmp_path: Path):
    one = optim(epochs=1)
    several = fit(one, tmp_path / "both", {"seeds": [0, 2]}, progress=False)
    assert isinstance(several, list)
    assert [run.folder for run in several] == [tmp_path / "both" / "seed-0", tmp_path / "both" / "seed-2"]
    alone = fit(one, tmp_path / "alone", {"seeds": [2]}, progress=False)
    assert equal(weights(several[1]), weights(alone))
    assert not equal(weights(several[0]), weights(several[1]))
    assert fit(one, tmp_path / "both", {"seeds": [0, 2]}, resume=True, progress=False) == several


def test_ctrl_c_in_one_of_several_seeds(tmp_path: Path, ctrl_c_after: Callable[[int], None]):
    asked = replace(optim(epochs=1), seeds=(0, 2))
    ctrl_c_after(3)
    with pytest.raises(KeyboardInterrupt, match="stopped in epoch 1, step 3 of 3"):
        fit(asked, tmp_path / "both", progress=False)
    assert [path.name for path in (tmp_path / "both").iterdir()] == ["seed-0"]
    several = fit(asked, tmp_path / "both", resume=True, progress=False)
    assert isinstance(several, list)
    assert [len(run.history) for run in several] == [1, 1]


def test_images_that_are_streamed(tmp_path: Path, ctrl_c_after: Callable[[int], None]):
    datasets = pytest.importorskip("datasets")
    source = data.load(Data(train_size=100, test_size=10, size=24))
    for split in ("train", "test"):
        batch = source[split].batch(range(len(source[split])))
        table = {
            "image": [image.permute(1, 2, 0).numpy() for image in batch.images],
            "label": [f"digit {label}" for label in batch.labels.tolist()],
        }
        features = datasets.Features(
            {"image": datasets.Image(), "label": datasets.ClassLabel(names=sorted({*table["label"]}))}
        )
        datasets.Dataset.from_dict(table, features).to_parquet(tmp_path / f"{split}.parquet")
    asked = replace(TINY, data=Data(source=str(tmp_path), streaming=True, size=24, val=0.2))
    through = fit(asked, tmp_path / "through", progress=False)
    ctrl_c_after(3)
    with pytest.raises(KeyboardInterrupt, match="stopped in epoch 2, step 1 of 2"):
        fit(asked, tmp_path / "stopped", progress=False)
    assert equal(weights(through), weights(fit(asked, tmp_path / "stopped", resume=True, progress=False)))
    with pytest.raises(
        ValueError, match=r"^optim\.class_weights needs all labels in advance; set data\.streaming to false$"
    ):
        fit(asked, tmp_path / "weighted", {"optim.class_weights": True}, progress=False)


def test_the_random_state_of_the_user_is_left_alone(tmp_path: Path):
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1]
    handler = signal.getsignal(signal.SIGINT)
    fit(TINY, tmp_path / "run", {"optim.epochs": 1}, progress=False)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)
    assert signal.getsignal(signal.SIGINT) is handler


def test_patience_keeps_the_best_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    accuracies = iter([0.3, 0.5, 0.4, 0.5, 0.6])
    saved: list[bool] = []
    plain = runs.save

    def save(run: runs.Run, weights: dict[str, Tensor] | None = None) -> None:
        saved.append(weights is not None)
        plain(run, weights)

    monkeypatch.setattr(Training, "_validate", lambda self, images, tick: (next(accuracies), 1.0))
    monkeypatch.setattr(runs, "save", save)
    run = fit(optim(epochs=9, patience=2), tmp_path / "run", progress=False)
    assert isinstance(run, runs.Run)
    assert [row["val_accuracy"] for row in run.history] == [0.3, 0.5, 0.4, 0.5]
    assert saved == [False, True, True, False, False]


def test_without_validation_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    load = data.load
    monkeypatch.setattr(data, "load", lambda asked: {"train": load(asked)["train"]})
    run = fit(optim(epochs=1), tmp_path / "run", progress=False)
    assert isinstance(run, runs.Run)
    assert math.isnan(run.history[0]["val_accuracy"])
    with pytest.raises(ValueError, match=r"^optim\.patience needs validation images; set data\.val above 0$"):
        fit(optim(patience=3), tmp_path / "other", progress=False)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    one = fit(optim(schedule="constant"), tmp_path / "one", {"optim.epochs": 1}, progress=False)
    plain = learning_rate

    def explode(optim: Optim, step: int, steps_per_epoch: int) -> float:
        return 1e30 if step == 3 else plain(optim, step, steps_per_epoch)

    monkeypatch.setattr("sightline.training.loop.learning_rate", explode)
    with pytest.raises(
        ValueError,
        match=r"^the loss became nan in epoch 2, step 2 \(train-00059, train-00005, train-00088, \.\.\.\); the "
        r"weights of epoch 1 are kept; lower optim\.lr or set optim\.clip_norm$",
    ):
        fit(optim(schedule="constant"), tmp_path / "run", progress=False)
    assert equal(weights(one), runs.load_model(tmp_path / "run").state_dict())


def test_folders_that_cannot_take_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(data, "load", lambda asked: pytest.fail("work began before the folder was checked"))
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError, match="file is a file; expected a folder to write to"):
        fit(TINY, tmp_path / "file")
    with pytest.raises(FileExistsError, match="is not empty; choose a new folder, or continue with --resume"):
        fit(TINY, tmp_path)
    with pytest.raises(OSError, match=r"file is a file; expected a folder to write to$"):
        fit(TINY, tmp_path / "file" / "run")
    assert (tmp_path / "file").read_text() == "x"


def test_a_read_only_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(dir: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(PermissionError, match=r"^cannot write to .*run: Permission denied; choose another folder$"):
        fit(TINY, tmp_path / "run")


def test_a_disk_too_full_is_seen_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 100_000})())
    monkeypatch.setattr(Training, "epochs", lambda *_: pytest.fail("training began"))
    with pytest.raises(OSError, match=r"disk too full, expected \d+ MiB free for the run, got 0 MiB"):
        fit(TINY, tmp_path / "run", progress=False)


def test_wrong_recipes_are_refused_before_anything_is_written(tmp_path: Path):
    for changes, message in [
        ({"optim.epochs": 0}, r"^optim\.epochs: expected 1 or more, got 0$"),
        ({"model.name": "vgg_at2"}, "did you mean 'vgg_att2'"),
        ({"optim.precision": "16-mixed"}, r"^optim\.precision: 16-mixed needs a GPU"),
    ]:
        with pytest.raises(ValueError, match=message):
            fit(TINY, tmp_path / "run", changes, progress=False)
        assert not any((tmp_path / "run").glob("*"))


def test_fewer_images_than_a_batch(tmp_path: Path):
    run = fit(optim(batch_size=500, epochs=1), tmp_path / "run", progress=False)
    assert isinstance(run, runs.Run)
    assert run.history[0]["train_loss"] > 0


def test_one_line_per_epoch_where_there_is_no_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    fit(TINY, tmp_path / "run", {"optim.precision": "bf16-mixed"})
    shown = capfd.readouterr()
    assert shown.out == ""
    lines = shown.err.splitlines()
    epochs = [line for line in lines if line.startswith("epoch ")]
    assert lines[0].startswith("data: clutter") and [line[:12] for line in epochs] == ["epoch 1/2  l", "epoch 2/2  l"]
    assert "val accuracy" in epochs[0]


def test_channels_are_last_where_that_is_safe():
    cpu = torch.device("cpu")
    unsafe = models.create_model("cifar_resnet", num_classes=2, width=0.25)
    assert loop.memory_layout(unsafe, cpu) == torch.contiguous_format  # its shortcut: 1 x 1, stride 2, 4 channels
    assert loop.memory_layout(unsafe, torch.device("cuda")) == torch.channels_last
    assert loop.memory_layout(models.create_model("cifar_resnet", num_classes=2), cpu) == torch.channels_last


@pytest.mark.parametrize("epochs", [1, 4, 13])
def test_one_cycle_is_that_of_pytorch(epochs: int):
    asked = Optim(epochs=epochs, lr=0.3)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1)
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.3, epochs * 7, cycle_momentum=False)
    for step in range(epochs * 7):
        assert learning_rate(asked, step, 7) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        theirs.step()


def test_cosine_step_and_constant():
    cosine = Optim(epochs=10, lr=2.0, schedule="cosine")
    assert [learning_rate(cosine, s, 10) for s in (0, 50)] == pytest.approx([2.0, 1.0])
    assert 0 < learning_rate(cosine, 99, 10) < 0.001
    step = Optim(epochs=100, lr=1.0, schedule="step", step_epochs=25, step_factor=0.5)
    assert [learning_rate(step, s, 2) for s in (0, 49, 50, 150)] == [1.0, 1.0, 0.5, 0.125]
    warm = Optim(epochs=5, lr=1.0, schedule="constant", warmup=2.0)
    assert [learning_rate(warm, s, 2) for s in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_class_weights_make_classes_count_alike():
    labels = np.array([0] * 6 + [1] * 3 + [2] * 1)
    each = class_weights(labels, 3)
    assert (each * torch.tensor([6, 3, 1])).tolist() == pytest.approx([10 / 3] * 3)


def test_norms_and_biases_are_not_decayed():
    network = models.create_model("vgg_att2", width=1 / 16)
    decayed, plain = create_optimizer(network, Optim(lr=0.003, weight_decay=0.1, optimizer="adamw")).param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in network.named_parameters()}
    assert all(names[id(p)].endswith("weight") for p in decayed["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(names)
    assert {"features.conv1.1.weight", "features.conv1.0.bias"} <= {names[id(p)] for p in plain["params"]}


def test_the_moving_average_takes_buffers_along():
    old, new = nn.BatchNorm1d(1), nn.BatchNorm1d(1)
    new(torch.tensor([[1.0], [3.0]]))
    average(old, new, 0.5)
    assert old.running_mean.item() == pytest.approx(0.1)
    assert old.num_batches_tracked.item() == 1


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_step_is_that_of_plain_pytorch(name: str, tmp_path: Path):
    """Three steps against a bare loop: same images, same dropout, same optimizer."""
    asked = replace(
        TINY, optim=Optim(epochs=1, batch_size=32, lr=0.01, weight_decay=5e-4, optimizer=name, schedule="constant")
    )
    run = fit(asked, tmp_path / "run", progress=False)
    images = data.load(asked.data)["train"]
    torch.manual_seed(0)
    network = models.create_model("vgg_att2", num_classes=10, **TINY.model.options).to(
        memory_format=torch.channels_last
    )
    groups = [
        {"params": [p for p in network.parameters() if p.ndim > 1], "weight_decay": 5e-4},
        {"params": [p for p in network.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = (
        torch.optim.SGD(groups, lr=0.01, momentum=0.9, nesterov=True, fused=True)
        if name == "sgd"
        else torch.optim.AdamW(groups, lr=0.01, fused=True)
    )
    passed = data.batches(images, 32, shuffle=(0, 0), augment=(asked.augment, 0, 0), drop_last=True)
    for step, batch in enumerate(passed):
        torch.manual_seed(int(np.random.SeedSequence((0, 0, step)).generate_state(1, np.uint64)[0]))
        x = data.normalize(batch.images.to(memory_format=torch.channels_last), images.preprocess)
        nn.functional.cross_entropy(network(x), batch.labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert equal(weights(run), network.state_dict())


def test_distillation_is_hintons_loss_by_hand():
    student, teacher = torch.tensor([[0.0, 0.0], [1.0, 3.0]]), torch.tensor([[0.0, 4.0], [1.0, 3.0]])
    # at T = 2 the first teacher says 1 and e^2 over 1 + e^2, the student 1/2 and 1/2; the second pair agrees
    p = math.exp(2) / (1 + math.exp(2))
    by_hand = 4 * (p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p))) / 2
    assert float(distillation(student, teacher, 2.0)) == pytest.approx(by_hand, rel=1e-6)
    labels = torch.tensor([1, 1])
    table = nn.Linear(2, 2, bias=False)
    table.weight.data = torch.eye(2)
    images = teacher[:, :, None, None]
    loss = Loss(replace(TINY.optim, alpha=0.25, temperature=2.0), None, nn.Sequential(nn.Flatten(), table))
    wanted = 0.25 * torch.nn.functional.cross_entropy(student, labels) + 0.75 * by_hand
    assert float(loss(images, student, labels)) == pytest.approx(float(wanted), rel=1e-6)


def test_distillation_as_the_slides_print_it_by_hand():
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 4.0]])
    p = math.exp(2) / (1 + math.exp(2))
    by_hand = 4 * (0.5 * math.log(0.5 / p) + 0.5 * math.log(0.5 / (1 - p)))
    assert float(distillation(student, teacher, 2.0, "student_teacher")) == pytest.approx(by_hand, rel=1e-6)
    asked = replace(TINY.optim, alpha=0.0, temperature=2.0, divergence="student_teacher")
    loss = Loss(asked, None, nn.Sequential(nn.Flatten(), nn.Identity()))
    assert float(loss(teacher[:, :, None, None], student, torch.tensor([1]))) == pytest.approx(by_hand, rel=1e-6)


def test_hard_attention_is_trained_by_reinforce():
    """By hand: the cross entropy, and each image's reward above that of the others times its log-probability."""
    network = nn.Sequential(HardAttention(2, mixed=0.0), nn.Linear(2, 3))
    images, labels = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 2])
    loss = Loss(TINY.optim, network=network)
    logits = network(images)
    gate = network[0].gate
    reward = logits.detach().log_softmax(1)[torch.arange(4), labels]
    by_hand = -logits.log_softmax(1)[torch.arange(4), labels].mean() - 0.002 * gate.entropy.mean()
    for i in range(4):
        others = torch.stack([reward[j] for j in range(4) if j != i]).mean()
        by_hand = by_hand - (reward[i] - others) * gate.log_prob[i] / 4
    torch.testing.assert_close(loss(images, logits, labels), by_hand)
    loss(images, logits, labels).backward()
    assert gate.u.weight.grad.abs().sum() > 0
    plain = Loss(TINY.optim)(images, logits, labels)
    torch.testing.assert_close(Loss(TINY.optim, network=network.eval()[1:])(images, logits, labels), plain)
    assert not list(loss.parameters())


def test_a_student_that_hears_its_teacher_alone_comes_near_it(tmp_path: Path):
    teacher = fit(TINY, tmp_path / "teacher", progress=False)
    assert isinstance(teacher, runs.Run)
    before = (tmp_path / "teacher" / "model.safetensors").read_bytes()
    heard = {"optim.teacher": str(teacher.folder), "optim.alpha": 0.0, "optim.epochs": 3, "seeds": "1"}
    calm = heard | {"model.options.dropout": 0.0, "optim.epochs": 12, "augment.crop": 0}
    student = fit(TINY, tmp_path / "student", calm, progress=False)
    assert isinstance(student, runs.Run) and student.recipe.optim.teacher == str(teacher.folder)
    assert student.history[-1]["train_loss"] < 0.5 * student.history[0]["train_loss"]
    assert (tmp_path / "teacher" / "model.safetensors").read_bytes() == before
    deaf = fit(TINY, tmp_path / "deaf", heard | {"optim.alpha": 1.0}, progress=False)
    alone = fit(TINY, tmp_path / "alone", {"optim.epochs": 3, "seeds": "1"}, progress=False)
    assert equal(weights(deaf), weights(alone))


def test_a_teacher_of_other_classes_is_refused(tmp_path: Path):
    fit(TINY, tmp_path / "teacher", progress=False)
    run = tmp_path / "teacher" / "run.json"
    run.write_text(run.read_text().replace('"9"', '"nine"'))
    with pytest.raises(ValueError, match=r"optim.teacher: expected a run on the 10 classes of the data"):
        fit(TINY, tmp_path / "student", {"optim.teacher": str(tmp_path / "teacher")}, progress=False)
    with pytest.raises(FileNotFoundError, match="no such run"):
        fit(TINY, tmp_path / "student", {"optim.teacher": str(tmp_path / "nobody")}, progress=False)
    assert not (tmp_path / "student").exists()


def test_mixup_counts_both_labels():
    """By hand: the loss of a blend is that of each label, by its share; a share of one is the plain loss."""
    logits, labels, others = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([0]), torch.tensor([2])
    loss = Loss(replace(TINY.optim, label_smoothing=0.1))
    each = [float(loss(torch.zeros(1, 3, 1, 1), logits, of)) for of in (labels, others)]
    mixed = float(loss(torch.zeros(1, 3, 1, 1), logits, labels, (others, 0.7)))
    assert mixed == pytest.approx(0.7 * each[0] + 0.3 * each[1], rel=1e-6)
    assert float(loss(torch.zeros(1, 3, 1, 1), logits, labels, (others, 1.0))) == each[0]


PARTS = {"name": "cifar_resnet", "depth": 8, "width": 0.25}
SYSTEM = {"backbone": "cifar_resnet", "backbone_options": {"depth": 8, "width": 0.25}}


@pytest.mark.parametrize(
    ("options", "block"),
    [
        ({"name": "fcan", **SYSTEM}, "FCAN"),
        ({"name": "mg_cnn", "parents": [0, 0, 1, 1], **SYSTEM}, "MGCNN"),
        ({**PARTS, "attention": "hard"}, "HardAttention"),
        ({**PARTS, "attention": "ma_cnn"}, None),  # its losses take no label
        ({**PARTS, "neck": {"triplet": 1.0}}, "BNNeck"),
        ({**PARTS, "attention": "hard", "attention_options": {"estimator": "gumbel"}}, None),
        ({**PARTS, "attention": "hard", "attention_options": {"estimator": "top_k", "k": 2}}, None),
        ({**PARTS, "attention": "ma_cnn", "attention_options": {"gates": "labels"}}, None),
        ({**PARTS, "neck": {}}, None),
        ({"name": "mg_cnn", "parents": [0, 0, 1, 1], "coarse_weight": 0.0, **SYSTEM}, None),
        ({**PARTS, "attention": "se"}, None),
    ],
)
def test_blends_are_refused_where_a_block_has_a_loss_of_one_label_per_image(options: dict[str, Any], block: str | None):
    network = models.create_model(num_classes=4, **options)
    checks.check_mixup(network, replace(TINY, augment=replace(TINY.augment, mixup=0.0)), (32, 32))
    blended = replace(TINY, augment=replace(TINY.augment, mixup=0.2))
    if block is None:
        checks.check_mixup(network, blended, (32, 32))
        return
    with pytest.raises(ValueError, match=f"mixup: expected 0 with {block}, whose own loss takes one label .*, got 0.2"):
        checks.check_mixup(network, blended, (32, 32))


def test_images_are_blended_by_the_share_of_their_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[tuple[Tensor, Tensor, float]] = []
    plain = Training._gradients

    def look(
        self: Training, seed: int, images: Tensor, labels: Tensor, mixed: tuple[Tensor, float] | None, masks: None
    ) -> None:
        assert mixed is not None and masks is None
        batch = next(self._batches(self.step))
        raw = data.normalize(batch.images, self.train.preprocess)
        share = mixed[1]
        torch.testing.assert_close(images, share * raw + (1 - share) * raw.roll(1, 0))
        assert torch.equal(mixed[0], batch.labels.roll(1, 0)) and torch.equal(labels, batch.labels)
        seen.append((images, labels, share))
        plain(self, seed, images, labels, mixed, masks)

    monkeypatch.setattr(Training, "_gradients", look)
    fit(optim(epochs=1), tmp_path / "run", {"augment.mixup": 0.4}, progress=False)
    shares = {share for _, _, share in seen}
    assert len(seen) == len(shares) == 3 and all(0 < share < 1 for share in shares)


def test_a_profile_shows_where_the_time_goes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    changes = {"data.train_size": 96, "optim.batch_size": 8, "model.options.width": 1 / 32}
    profiled = fit(optim(epochs=2), tmp_path / "run", changes, progress=False, profile=True)
    shown = capsys.readouterr().err
    assert "where 10 steps spent their time, ms per step" in shown
    lines = {line.split("│")[1].strip(): line.split("│")[2:4] for line in shown.splitlines() if line.startswith("│")}
    parts = [float(lines[name][0]) for name in ("images", "forward", "backward", "optimizer", "other")]
    assert sum(parts) == pytest.approx(float(lines["total"][0]), abs=0.03) and min(parts) >= 0
    assert equal(weights(profiled), weights(fit(optim(epochs=2), tmp_path / "plain", changes, progress=False)))
    with pytest.raises(ValueError, match=r"a profile expects 15 steps, got 12; set optim\.epochs higher"):
        fit(optim(epochs=1), tmp_path / "short", changes, progress=False, profile=True)
    assert not (tmp_path / "short").exists()
