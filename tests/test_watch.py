"""Where a network looks while it trains: what loggers get, that training does not change, when there is a warning."""

import csv
import io
import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import sightline as sl
from sightline import cli, data, runs
from sightline.facts import Notice
from sightline.metrics import energy_in_mask
from sightline.recipe import Data, Model, Optim, Recipe, Watch
from sightline.training import fit
from sightline.training.loggers import create_logger, log_picture
from sightline.training.watch import Look, Watcher

pytestmark = pytest.mark.usefixtures("few_validation_images")

TINY = Recipe(
    data=Data(train_size=64, test_size=20),
    model=Model(name="vgg_att2", options={"width": 1 / 16, "stem_pool": 4, "dropout": 0.5}),
    optim=Optim(epochs=3, batch_size=32, optimizer="sgd", lr=0.05),
)
WATCHED = replace(TINY, watch=Watch(every=2, images=2, measured=5, methods=("grad_cam", "attention", "smooth_grad")))
PICTURE = torch.arange(3 * 4 * 5).reshape(3, 4, 5).to(torch.uint8)


def run_of(recipe: Recipe, folder: Path) -> runs.Run:
    run = fit(recipe, folder, progress=False)
    assert isinstance(run, runs.Run)
    return run


def events(folder: Path) -> EventAccumulator:
    read = EventAccumulator(str(folder), size_guidance={"images": 0})
    read.Reload()
    return read


def pixels(encoded: bytes) -> Tensor:
    return torch.from_numpy(np.array(Image.open(io.BytesIO(encoded)))).movedim(-1, 0)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_tensorboard_has_the_maps_and_shares_of_each_look_and_training_is_bit_equal(tmp_path: Path) -> None:
    plain, watched = run_of(TINY, tmp_path / "plain"), run_of(WATCHED, tmp_path / "watched")
    weights = [runs.load_model(run.folder).state_dict() for run in (plain, watched)]
    assert same(*weights)
    assert [row["val_loss"] for row in plain.history] == [row["val_loss"] for row in watched.history]

    read = events(watched.folder / "tensorboard")
    images = read.Images("watch/maps")
    assert [image.step for image in images] == [0, 2, 3]  # before training, after every second epoch, at the end
    assert read.Tags()["images"] == ["watch/maps"]
    assert [scalar.step for scalar in read.Scalars("val_accuracy")] == [1, 2, 3]
    assert "watch/maps" not in events(plain.folder / "tensorboard").Tags()["images"]

    val = data.load(WATCHED.data)["val"]
    batch = val.batch(np.random.default_rng(0).permutation(50)[:5])
    model = runs.load_model(watched.folder)
    inputs = data.normalize(batch.images, watched.preprocess)
    maps = sl.explain(model, inputs, batch.labels, ["grad_cam", "attention"]).maps
    for method in ("grad_cam", "attention"):
        scalars = read.Scalars(f"watch/{method}_in_mask")
        assert [scalar.step for scalar in scalars] == [0, 2, 3]
        share = energy_in_mask(maps[method], batch.masks).nanmean().item()
        assert scalars[-1].value == pytest.approx(share, abs=1e-5)
    shown = sl.maps.side_by_side(batch.images[:2], {name: one[:2] for name, one in maps.items()})
    drawn = pixels(images[-1].encoded_image_string)
    assert drawn.shape[2] > shown.shape[2] and drawn.shape[1] == shown.shape[1]
    assert (drawn[:, :, : shown.shape[2]].int() - shown.int()).abs().max() <= 2
    assert not torch.equal(pixels(images[0].encoded_image_string), drawn)


def test_a_watched_training_goes_on_to_the_same_bits(tmp_path: Path, ctrl_c_after: Callable[[int], None]) -> None:
    through = run_of(replace(WATCHED, optim=replace(WATCHED.optim, ema=0.9)), tmp_path / "through")
    ctrl_c_after(3)
    with pytest.raises(KeyboardInterrupt):
        fit(through.recipe, tmp_path / "stopped", progress=False)
    resumed = fit(replace(through.recipe, watch=Watch(every=1, logger="csv")), tmp_path / "stopped", resume=True)
    assert same(*[runs.load_model(run.folder).state_dict() for run in (through, resumed)])
    with (resumed.folder / "csv" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["watch/grad_cam_in_mask"]]
    assert [row["step"] for row in rows] == ["2", "3"]


def test_a_look_leaves_the_model_and_the_random_states() -> None:
    torch.manual_seed(0)
    model = sl.create_model("test_resnet", num_classes=3, attention="cbam").train()
    model(torch.rand(4, 3, 32, 32)).sum().backward()
    next(iter(model.children())).eval()
    pictures = torch.randint(256, (6, 3, 32, 32), dtype=torch.uint8)
    watcher = Watcher(pictures=pictures, inputs=pictures / 255, methods=["grad_cam", "smooth_grad"])
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    modes = [module.training for module in model.modules()]
    random = torch.get_rng_state(), np.random.get_state()[1].copy()
    with torch.no_grad():
        look = watcher.look(model)
    assert same(model.state_dict(), state) and [module.training for module in model.modules()] == modes
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert torch.equal(torch.get_rng_state(), random[0]) and (np.random.get_state()[1] == random[1]).all()
    assert look.shares == {} and look.chance == 1 / 3 and watcher.judge(look) == watcher.judge(look, 1.0) == ""


class Strangers(LightningModule):
    """Somebody's network, which drops out, normalizes by batches and logs its validation accuracy."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout2d(0.3),
            nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: Any, index: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def validation_step(self, batch: Any, index: int) -> None:
        images, labels = batch
        self.log("val_acc", (self(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 0.05)


def squares(n: int, side: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """Noise with a bright square in the upper left (class 0) or lower right, and where it is."""
    generator = torch.Generator().manual_seed(n)
    images = torch.randint(100, (n, 3, side, side), generator=generator, dtype=torch.uint8)
    labels, masks = torch.arange(n) % 2, torch.zeros(n, 1, side, side, dtype=torch.bool)
    for image, label, mask in zip(images, labels, masks, strict=True):
        at = slice(9, 14) if label else slice(2, 7)
        image[:, at, at] += 150 if label else 60
        mask[:, at, at] = True
    return images, labels, masks


def trained(folder: Path, *callbacks: Any, logger: Any = False, epochs: int = 2, checkpoint: Any = None) -> Strangers:
    seed_everything(1, verbose=False)
    module = Strangers()
    images, labels, _ = squares(64)
    loader = DataLoader(TensorDataset(images / 255, labels), 16, shuffle=True)
    images, labels, _ = squares(20)
    trainer = Trainer(
        max_epochs=epochs, accelerator="cpu", logger=logger, callbacks=list(callbacks), default_root_dir=folder,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, num_sanity_val_steps=0,
        log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(module, loader, DataLoader(TensorDataset(images / 255, labels), 20), ckpt_path=checkpoint)
    return module


quiet = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*TypedStorage", "ignore:.*treespec")


@quiet
@pytest.mark.parametrize("model", [None, "net", lambda module: module.net], ids=["module", "name", "function"])
def test_somebody_else_s_module(model: Any, tmp_path: Path) -> None:
    images, labels, masks = squares(8)
    methods = ["grad_cam", "smooth_grad"]
    callback = sl.training.Watch(images, masks, labels, methods=methods, model=model, every=2, drawn=3)
    logger, table = TensorBoardLogger(tmp_path / "board"), CSVLogger(tmp_path / "table")
    plain, watched = trained(tmp_path, epochs=3), trained(tmp_path, callback, logger=[logger, table], epochs=3)
    assert same(plain.state_dict(), watched.state_dict())
    read = events(Path(logger.log_dir))
    assert [image.step for image in read.Images("watch/maps")] == [0, 8, 12]  # steps of 4 batches
    shares = read.Scalars("watch/grad_cam_in_mask")
    maps = sl.explain(watched.net, images / 255, labels).maps["grad_cam"]
    assert shares[-1].value == pytest.approx(energy_in_mask(maps, masks).nanmean().item(), abs=1e-5)
    picture = pixels(read.Images("watch/maps")[-1].encoded_image_string)
    assert picture.shape == sl.maps.side_by_side(images[:3], dict.fromkeys(methods, maps[:3])).shape
    assert "watch/smooth_grad_in_mask" in (Path(table.log_dir) / "metrics.csv").read_text()


@quiet
def test_a_module_is_looked_at_before_it_trains(tmp_path: Path) -> None:
    images = squares(4)[0]
    for options, message in (
        ({"model": "nte"}, "expected model= as an attribute that is a network, got 'nte'; did you mean 'net'?"),
        ({"methods": ["attention"]}, "attention"),
        ({"layer": "net.99"}, "net.99"),
        ({"labels": torch.tensor([0, 1, 2, 0])}, "targets"),
    ):
        with pytest.raises(ValueError, match=message.replace("?", r"\?")):
            trained(tmp_path, sl.training.Watch(images, **options))


@pytest.mark.parametrize("strategy", [FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy])
def test_weights_in_parts_are_refused_in_every_process(strategy: type, unchecked: None) -> None:
    trainer = SimpleNamespace(strategy=object.__new__(strategy), is_global_zero=False)
    callback = sl.training.Watch(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match=f"got {strategy.__name__}; use DDP, or leave Watch out"):
        callback.setup(trainer, None, "fit")


@quiet
def test_a_training_that_goes_on_is_not_taken_for_a_fresh_one(tmp_path: Path) -> None:
    class Kept(Callback):
        def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            trainer.save_checkpoint(tmp_path / "last.ckpt")

    images, labels, masks = squares(8)
    first, second = (sl.training.Watch(images, masks, labels, model="net") for _ in range(2))
    trained(tmp_path, first, Kept(), epochs=1)
    assert len(first.watcher.seen) == 2 and first.watcher.seen[0][0] == 0.5
    trained(tmp_path, second, epochs=2, checkpoint=tmp_path / "last.ckpt")
    assert len(second.watcher.seen) == 1  # after its epoch; the look before it is not that of a network that guesses


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": torch.zeros(2, 3, 4, 8, 8, dtype=torch.uint8)}, ValueError, "expected flat images"),
        ({"images": torch.zeros(2, 3, 8, 8)}, TypeError, "uint8 with 1 or 3 channels, got torch.float32"),
        ({"images": torch.zeros(2, 5, 8, 8, dtype=torch.uint8)}, TypeError, "uint8 with 1 or 3 channels"),
        ({"images": np.zeros((2, 3, 8, 8), np.uint8)}, TypeError, "torch.from_numpy makes one"),
        ({"images": torch.zeros(0, 3, 8, 8, dtype=torch.uint8)}, ValueError, "for each of some images, got 0"),
        ({"masks": torch.zeros(2, 1, 4, 4, dtype=torch.bool)}, ValueError, r"expected masks of shape \(2, 1, 8, 8\)"),
        ({"masks": torch.zeros(3, 1, 8, 8, dtype=torch.bool)}, ValueError, "one of masks for each of 2 images, got 3"),
        ({"labels": torch.zeros(1, dtype=torch.long)}, ValueError, "one of labels for each of 2 images, got 1"),
        ({"methods": []}, ValueError, "at least one method"),
        ({"every": 0}, ValueError, "every and drawn of 1 or more, got 0 and 4"),
        ({"preprocess": lambda images: images[:1]}, ValueError, "one of inputs for each of 2 images, got 1"),
    ],
)
def test_bad_input_is_one_line(change: dict[str, Any], error: type[Exception], message: str, unchecked: None) -> None:
    given = {"images": torch.zeros(2, 3, 8, 8, dtype=torch.uint8), **change}
    with pytest.raises(error, match=message) as caught:
        sl.training.Watch(given.pop("images"), **given)
    assert "\n" not in str(caught.value)


def test_the_callback_is_found_by_its_documented_name() -> None:
    code = "import sightline as sl, lightning.pytorch as pl; assert issubclass(sl.training.Watch, pl.Callback)"
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_gray_images_and_large_ones() -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1))
    pictures = torch.randint(256, (2, 1, 400, 200), dtype=torch.uint8)
    look = Watcher(pictures=pictures, inputs=pictures / 255).look(network)
    assert look.chance == 0.5 and max(look.picture.shape[1:]) < 320  # 128 px each


def test_a_map_is_drawn_in_the_colors_of_its_method() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    network[-1].weight.data.abs_()
    pictures = torch.randint(256, (2, 3, 100, 100), dtype=torch.uint8)
    given = {"methods": ["grad_cam", "hires_cam"], "layer": "1"}
    look = Watcher(pictures=pictures, inputs=pictures / 255, **given).look(network)
    maps = sl.explain(network, pictures / 255, **given).maps
    assert all((one >= 0).all() for one in maps.values())  # no value shows which of them is signed
    assert torch.equal(look.picture, sl.maps.side_by_side(pictures, maps, signed=["hires_cam"]))


def seen(**shares: list[float]) -> dict[str, np.ndarray]:
    return {method: np.array(values) for method, values in shares.items()}


EIGHT = np.linspace(-0.01, 0.01, 8)


@pytest.mark.parametrize(
    ("shares", "accuracies", "warned"),
    [
        ([0.3, 0.05], [0.5, 0.9], True),
        ([0.3, 0.05], [0.9, 0.5], False),  # the accuracy falls
        ([0.3, 0.05], [0.5, 0.54], False),  # by less than a tenth of what it lacked
        ([0.3, 0.05], [0.89, 0.9], False),
        ([0.3, 0.05], [0.888, 0.9], True),
        ([0.3, 0.2], [0.5, 0.9], False),  # still more than the area of the masks, 0.125
        ([0.05, 0.05], [0.5, 0.9], False),  # never there
        ([0.05, 0.3, 0.05], [0.5, 0.6, 0.9], True),  # compared with the best look
        ([0.3, 0.05], [math.nan, 0.9], False),  # no accuracy, no conclusion
        ([0.3, 0.05], [0.5, math.nan], False),
        ([math.nan, 0.05], [0.5, 0.9], False),  # maps of zeros before training
        ([0.3, math.nan], [0.5, 0.9], False),
    ],
)
def test_the_rule_of_the_warning(shares: list[float], accuracies: list[float], warned: bool) -> None:
    pictures = torch.zeros(8, 3, 4, 4, dtype=torch.uint8)
    masks = torch.zeros(8, 1, 4, 4, dtype=torch.bool)
    masks[:, :, 0, :2] = True
    watcher = Watcher(pictures=pictures, inputs=pictures / 255, masks=masks)
    looks = [Look(PICTURE, seen(grad_cam=list(share + EIGHT)), 0.1) for share in shares]
    sentences = [watcher.judge(look, accuracy) for look, accuracy in zip(looks, accuracies, strict=True)]
    assert [bool(sentence) for sentence in sentences] == [False] * (len(shares) - 1) + [warned]
    if warned:
        assert sentences[-1].startswith(
            "maps leave the object while validation accuracy rises to 90.0 %: of grad_cam, "
        )
        assert "30.0 % lay in the masks, now 5.0 %, less than their area of 12.5 %" in sentences[-1]
        assert watcher.judge(looks[-1], 1.0) == ""  # said once


def test_a_fall_within_its_interval_or_of_few_images_is_no_reason() -> None:
    for n, noise in ((7, 0.0), (8, 1.0)):
        pictures = torch.zeros(n, 3, 4, 4, dtype=torch.uint8)
        masks = torch.zeros(n, 1, 4, 4, dtype=torch.bool)
        masks[:, :, :2] = True
        watcher = Watcher(pictures=pictures, inputs=pictures / 255, masks=masks)
        spread = noise * np.where(np.arange(n) % 2, 0.4, -0.4)
        watcher.judge(Look(PICTURE, seen(cam=list(0.5 + spread)), 0.1))
        assert watcher.judge(Look(PICTURE, seen(cam=list(0.4 - spread)), 0.1), 0.9) == ""


def test_a_warning_is_given_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sentence(watcher: Watcher, look: Look, accuracy: float) -> str:
        return f"maps leave the object in look {len(watcher.seen)}" if watcher.seen else ""

    monkeypatch.setattr(Watcher, "_sentence", sentence)
    with pytest.warns(Notice, match="maps leave the object in look 1") as given:
        run = run_of(WATCHED, tmp_path / "run")
    assert len(given) == 1 and runs.open_run(run.folder).info["shortcut"] == "maps leave the object in look 1"


class Wandb:
    """`log_image` as Lightning 2.6 documents it for `WandbLogger`."""

    def __init__(self) -> None:
        self.images: list[Any] = []

    def log_image(self, key: str, images: list[Any], step: int | None = None, **kwargs: Any) -> None:
        self.images.append((key, images, step))


class Mlflow:
    """`experiment` and `run_id` as Lightning 2.6 documents them for `MLFlowLogger`, with a client's `log_image`."""

    run_id = "run-7"

    def __init__(self) -> None:
        self.images: list[Any] = []
        self.experiment = SimpleNamespace(log_image=self._log_image)

    def _log_image(
        self, run_id: str, image: np.ndarray, artifact_file: str | None = None, key: str | None = None,
        step: int | None = None, timestamp: int | None = None, synchronous: bool | None = None,
    ) -> None:  # fmt: skip
        assert run_id == "run-7" and artifact_file is None and key is not None and "/" not in key
        self.images.append((key, [image], step))


def test_pictures_go_to_each_kind_of_logger() -> None:
    for logger, key in ((Wandb(), "watch/maps"), (Mlflow(), "watch.maps")):
        assert log_picture(logger, "watch/maps", PICTURE, 3)
        [(name, [image], step)] = logger.images
        assert (name, step) == (key, 3) and (image == PICTURE.permute(1, 2, 0).numpy()).all()
    assert not log_picture(SimpleNamespace(experiment=SimpleNamespace()), "watch/maps", PICTURE, 3)


def test_trackio_gets_figures_and_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trackio = ModuleType("trackio")
    trackio.__spec__ = SimpleNamespace(name="trackio")  # type: ignore[assignment]
    said: list[Any] = []
    trackio.init = lambda project, name: said.append((project, name))  # type: ignore[attr-defined]
    trackio.log = lambda metrics, step: said.append((metrics, step))  # type: ignore[attr-defined]
    trackio.Image = lambda image: image.shape  # type: ignore[attr-defined]
    trackio.finish = lambda: said.append("finished")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    run_of(replace(WATCHED, watch=replace(WATCHED.watch, logger="trackio")), tmp_path / "photos")
    assert said[0] == ("sightline", "photos") and said[-1] == "finished"
    pictures = [
        (step, shape) for content, step in said[1:-1] for name, shape in content.items() if name == "watch/maps"
    ]
    assert [step for step, _ in pictures] == [0, 2, 3] and all(shape[2] == 3 for _, shape in pictures)
    assert [step for content, step in said[1:-1] if "val_accuracy" in content] == [1, 2, 3]
    assert not (tmp_path / "photos" / "tensorboard").exists()


@pytest.mark.filterwarnings("default")  # of libraries that they import
@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_the_real_loggers(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    logger = create_logger(name, tmp_path / "run")
    logger.log_metrics({"watch/grad_cam_in_mask": 0.25}, step=2)
    assert log_picture(logger, "watch/maps", PICTURE, 2)
    logger.finalize("success")
    assert [*(tmp_path / "run").rglob("*.png")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--watch.logger", "wandb"], "watch.logger: wandb is not installed; install it: pip install wandb"),
        (["--watch.logger", "wanb"], "expected one of tensorboard, wandb, mlflow, trackio, csv"),
        (["--watch.every", "-1"], "watch.every: expected 0 or more, got '-1'"),
        (["--watch.every", "1", "--watch.methods", "grad_cm"], "did you mean 'grad_cam'?"),
        (["--watch.every", "1", "--watch.layer", "nowhere"], "nowhere"),
        (["--watch.every", "1", "--watch.methods", ""], "watch.methods: expected one name or several"),
    ],
)
def test_the_command_line_refuses_before_training(
    arguments: list[str], message: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sightline.training.loggers.find_spec", lambda name: None)
    small = ["--data", "clutter", "--data.train_size", "40", "--optim.epochs", "1", "--model", "vgg_att2"]
    with pytest.raises(SystemExit):
        cli.main(["train", *small, *arguments, "--out", str(tmp_path / "run")])
    error = capsys.readouterr().err
    assert message in error.splitlines()[-1] and not (tmp_path / "run" / "run.json").exists()


def test_the_page_tells_the_hits_and_false_alarms_that_were_measured() -> None:
    root = Path(__file__).parent.parent
    rows = json.loads((root / "benchmarks/results/watch.json").read_text())["rows"]
    page = (root / "docs/howto/watch-training.md").read_text()
    for method, written in (("grad_cam", "Grad-CAM"), ("attention",) * 2, ("saliency",) * 2):
        of = {
            source: sum(row["warned in epoch"][method] > 0 for row in rows if row["data"] == source)
            for source in ("clutter-shortcut", "clutter")
        }
        line = next(line for line in page.splitlines() if line.startswith(f"| {written} |"))
        assert line.split("|")[2].strip().startswith(f"{of['clutter-shortcut']},") and line.split("|")[3].strip() == "0"
        assert of["clutter"] == 0
