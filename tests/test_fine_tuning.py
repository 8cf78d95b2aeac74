"""Fine-tuning: what is frozen, how fast the rest learns, the defaults with pretrained weights, the linear probe."""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor, nn

from sightline import cli, data, models, recipe, runs
from sightline.attention import insert
from sightline.facts import Interval, Notice
from sightline.metrics import linear_probe
from sightline.recipe import Data, Model, Optim, Recipe
from sightline.training import fit, initial_network
from sightline.training import probe as probing
from sightline.training.freezing import Freezing, zero_fresh_head

pytestmark = pytest.mark.usefixtures("few_validation_images")

HEAD = "head.linear"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a small residual network with statistics of its own."""
    torch.manual_seed(0)
    model = models.create_model("cifar_resnet", num_classes=10, depth=8, stem_stride=2)
    with torch.no_grad():
        model.train()(torch.randn(16, 3, 24, 24))
    file = tmp_path_factory.mktemp("weights") / "resnet.safetensors"
    runs.write(file, runs.pack(model.state_dict(), {}))
    return file


def recipe_of(weights: Path, options: dict[str, Any] | None = None, **optim: Any) -> Recipe:
    given: dict[str, Any] = {
        "epochs": 1,
        "batch_size": 16,
        "backbone_lr": 1.0,
        "lr": 0.01,
        "fixed_statistics": False,
        **optim,
    }
    return Recipe(
        data=Data(train_size=48, test_size=20, size=24),
        model=Model(
            name="cifar_resnet", weights=str(weights), options={"depth": 8, "stem_stride": 2, **(options or {})}
        ),
        optim=Optim(**given),
    )


def trained(start: Recipe, out: Path, **options: Any) -> dict[str, Tensor]:
    run = fit(start, out, progress=False, **options)
    assert isinstance(run, runs.Run)
    return runs.load_model(run.folder).state_dict()


def changed(start: Path, state: dict[str, Tensor]) -> set[str]:
    before = runs.unpack(start)[0]
    return {name for name in before if not torch.equal(before[name], state[name])}


def head(weights: Path) -> set[str]:
    """The last two entries of a state dict: weight and bias of the linear layer."""
    model = models.create_model("cifar_resnet", num_classes=10, depth=8, stem_stride=2)
    return set([*model.state_dict()][-2:])


def test_frozen_epochs_change_the_head_alone_statistics_included(weights: Path, tmp_path: Path):
    assert changed(weights, trained(recipe_of(weights, freeze=1), tmp_path / "a")) == head(weights)
    state = trained(recipe_of(weights, freeze=1, epochs=2), tmp_path / "b")
    assert changed(weights, state) == set(state)


def test_statistics_can_stay_while_all_weights_are_trained(weights: Path, tmp_path: Path):
    state = trained(recipe_of(weights, freeze=0, fixed_statistics=True), tmp_path / "run")
    statistics = {name for name in state if "running" in name or "num_batches" in name}
    assert changed(weights, state) == set(state) - statistics and statistics


def test_modules_are_frozen_by_name(weights: Path, tmp_path: Path):
    state = trained(recipe_of(weights, freeze=("layer[12]",)), tmp_path / "run")
    same = {name for name in state if name.startswith(("layer1.", "layer2."))}
    assert changed(weights, state) == set(state) - same and same
    with pytest.raises(ValueError, match=r"no layer is named 'layer9'; did you mean"):
        fit(recipe_of(weights, freeze=("layer9",)), tmp_path / "none", progress=False)


def test_nothing_left_to_train_is_refused():
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    with pytest.raises(ValueError, match=r"^optim\.freeze: expected parameters left to train, got none with \('1',\)$"):
        Freezing(network, Optim(freeze=("1",)), (2, 2))
    without_head = nn.Sequential(nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(ValueError, match=r"^optim\.freeze: expected parameters left to train, got none with 1$"):
        Freezing(without_head, Optim(freeze=1), (2, 2))


@pytest.mark.parametrize("named", ["0", "0.attention"])
def test_attention_in_a_frozen_module_is_trained_unless_it_is_named(named: str):
    network = insert(
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)), "se", at="0"
    )
    freezing = Freezing(network, Optim(freeze=(named,)), (2, 2))
    freezing.enter(0)
    left = {name for name, p in network.named_parameters() if not p.requires_grad}
    blocks = {name for name, _ in network.named_parameters() if name.startswith("0.attention.")}
    assert left == (blocks if named == "0.attention" else {"0.weight", "0.bias"}) and len(blocks) == 4


def test_what_the_user_froze_stays_frozen():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(16, 2))
    network[0].bias.requires_grad_(False)
    freezing = Freezing(network, Optim(freeze=1), (2, 2))
    for epoch, expected in ((0, [False, False, True, True]), (1, [True, False, True, True])):
        freezing.enter(epoch)
        assert [p.requires_grad for p in network.parameters()] == expected


def test_attention_starts_at_bit_equal_logits_and_is_trained_from_the_first_epoch(weights: Path, tmp_path: Path):
    start = recipe_of(weights, {"attention": "cbam"}, freeze=1)
    images = torch.randn(4, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    with torch.random.fork_rng():
        with_blocks = initial_network(start.model, 10, seed=0).eval()
        without = initial_network(recipe_of(weights).model, 10, seed=0).eval()
    with torch.no_grad():
        assert torch.equal(with_blocks(images), without(images))
    state = trained(start, tmp_path / "run")
    assert changed(weights, state) == head(weights)
    first = with_blocks.state_dict()
    blocks = {name for name, _ in with_blocks.named_parameters() if ".attention." in name}
    assert {name for name in blocks if not torch.equal(first[name], state[name])}


def test_a_head_of_another_width_starts_at_zero_and_one_of_the_weights_stays(weights: Path):
    state = runs.unpack(weights)[0]
    with torch.random.fork_rng():
        same = initial_network(recipe_of(weights).model, 10, seed=0)
        with pytest.warns(Notice, match="start fresh"):
            other = initial_network(recipe_of(weights).model, 3, seed=0)
    for network in (same, other):
        zero_fresh_head(network, str(weights), (24, 24))
    assert all(torch.equal(tensor, state[name]) for name, tensor in same.state_dict().items())
    assert {n for n, p in other.named_parameters() if not p.any()} >= head(weights)
    assert all(torch.equal(t, state[n]) for n, t in other.state_dict().items() if n not in head(weights))


def test_a_downloaded_head_stays_and_one_for_other_classes_starts_at_zero(tmp_path: Path):
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    runs.write(tmp_path / "w.safetensors", runs.pack({"another": torch.ones(3, 12)}, {}))
    zero_fresh_head(network, str(tmp_path / "w.safetensors"), (2, 2))
    assert not any(p.any() for p in network.parameters())
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    for downloaded in (3, 1000):
        network.pretrained_cfg = {"num_classes": downloaded}  # pyright: ignore[reportArgumentType]
        zero_fresh_head(network, "pretrained", (2, 2))
        assert all(p.any() == (downloaded == 3) for p in network.parameters())


@pytest.mark.parametrize("pooling", ["brnpa"])
def test_a_pooling_and_what_it_rebuilds_count_as_new(pooling: str, weights: Path):
    with torch.random.fork_rng():
        network = initial_network(recipe_of(weights, {"attention": pooling}).model, 10, seed=0)
    freezing = Freezing(network, Optim(freeze=1), (24, 24))
    freezing.enter(0)
    trained_names = {name for name, p in network.named_parameters() if p.requires_grad}
    assert any(".attention." in name for name in trained_names) or pooling == "brnpa"
    assert head(weights) <= trained_names and not any(name.startswith("layer1") for name in trained_names)


def test_one_step_moves_the_backbone_by_its_share_of_the_head_s_rate(weights: Path, tmp_path: Path):
    """Of plain gradient descent, whose step is rate x gradient."""
    plain = {"optimizer": "sgd", "momentum": 0.0, "nesterov": False, "weight_decay": 0.0, "schedule": "constant"}
    before = runs.unpack(weights)[0]
    steps: dict[float, dict[str, Tensor]] = {}
    for factor in (1.0, 0.25):
        start = recipe_of(weights, freeze=0, batch_size=48, backbone_lr=factor, lr=0.1, **plain)
        state = trained(start, tmp_path / str(factor))
        steps[factor] = {name: state[name] - before[name] for name in before if "running" not in name}
    for name, step in steps[1.0].items():
        if "num_batches" not in name:
            share = 1.0 if name in head(weights) else 0.25
            assert step.abs().max() > 0, name
            torch.testing.assert_close(steps[0.25][name], share * step, rtol=1e-3, atol=1e-7)


def test_layers_of_a_transformer_learn_the_more_slowly_the_earlier_they_are():
    network = models.create_model("tiny_vit", num_classes=3, depth=2)
    scales = Freezing(network, Optim(layer_decay=0.5, backbone_lr=0.1), (32, 32)).scales(
        Optim(layer_decay=0.5, backbone_lr=0.1)
    )
    expected = {"blocks.1.norm1.weight": 0.05, "blocks.0.norm1.weight": 0.025, "patch_embed.proj.weight": 0.0125}
    assert {name: pytest.approx(scales[name]) for name in expected} == expected
    assert "head.weight" not in scales
    with pytest.raises(ValueError, match=r"^optim\.layer_decay: expected a timm network, got Sequential; set it to 1$"):
        optim = Optim(layer_decay=0.5)
        Freezing(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), optim, (2, 2)).scales(optim)


@pytest.mark.parametrize("steps", [2, 4])
def test_stopped_and_resumed_is_bit_equal(
    steps: int, weights: Path, tmp_path: Path, ctrl_c_after: Callable[[int], None]
):
    start = recipe_of(weights, freeze=1, epochs=2, backbone_lr=0.1)
    through = trained(start, tmp_path / "through")
    ctrl_c_after(steps)
    with pytest.raises(KeyboardInterrupt, match="continue with --resume"):
        fit(start, tmp_path / "stopped", progress=False)
    resumed = trained(start, tmp_path / "stopped", resume=True)
    assert all(torch.equal(through[name], resumed[name]) for name in through)


def test_without_weights_the_defaults_are_those_of_training_from_scratch():
    filled = runs.filled(Recipe())
    assert (filled.optim.epochs, filled.optim.lr, filled.optim.freeze) == (20, 0.003, 0)
    assert (filled.optim.backbone_lr, filled.optim.layer_decay, filled.model.normalization) == (1.0, 1.0, "data")
    assert filled.data.size is None and runs.filled(filled) == filled
    staged = Recipe(model=Model(name="protopnet", weights="x"))  # which sets rates and freezes by its own stages
    assert runs.filled(staged).optim == filled.optim


def test_with_weights_the_defaults_are_those_of_fine_tuning_and_of_the_network():
    start = Recipe(model=Model(name="tf_efficientnet_lite0", weights="file.safetensors"))
    filled = runs.filled(start)
    assert (filled.optim.epochs, filled.optim.lr, filled.optim.freeze) == (10, 0.001, 1)
    assert (filled.optim.backbone_lr, filled.optim.layer_decay, filled.optim.fixed_statistics) == (0.1, 1.0, True)
    assert filled.data.size == 224 and filled.model.normalization == "network"
    own = runs.pretrained_input(start.model)
    assert own is not None and own.mean == own.std == (0.5, 0.5, 0.5)
    given = Recipe(
        data=Data(size=64),
        model=replace(start.model, normalization="data"),
        optim=Optim(epochs=3, lr=0.1, freeze=0, backbone_lr=1.0, fixed_statistics=False, layer_decay=1.0),
    )
    assert runs.filled(given) == given


def test_the_structure_of_a_network_tells_its_input_without_weights(monkeypatch: pytest.MonkeyPatch):
    built: list[nn.Module] = []
    create: Callable[..., nn.Module] = models.create_model
    monkeypatch.setattr(models, "create_model", lambda *a, **k: built.append(create(*a, **k)) or built[-1])
    runs._described_by.cache_clear()  # pyright: ignore[reportPrivateUsage]
    state = torch.get_rng_state()
    start = Recipe(model=Model(name="vit_tiny_patch16_224", weights="file.safetensors"))
    assert runs.filled(start).optim.layer_decay == 0.75 and torch.equal(torch.get_rng_state(), state)
    found = runs.pretrained_input(start.model)
    assert len(built) == 1 and {p.device.type for p in built[0].parameters()} == {"meta"}
    assert found == models.preprocess_of(create("vit_tiny_patch16_224", depth=1))


def test_a_transformer_with_weights_has_layer_wise_decay(monkeypatch: pytest.MonkeyPatch):
    start = Recipe(model=Model(name="vit_tiny_patch16_224", weights="file.safetensors", options={"img_size": 32}))
    state = torch.get_rng_state()
    filled = runs.filled(start)
    assert filled.optim.layer_decay == 0.75 and filled.data.size == 32
    hybrid = Recipe(model=Model(name="mobilevit_xxs", weights="file.safetensors"))  # convolutions around attention
    assert runs.filled(hybrid).optim.layer_decay == 1.0
    assert torch.equal(torch.get_rng_state(), state)  # networks were built to look at them
    monkeypatch.setattr(models, "create_model", lambda name, **options: nn.MultiheadAttention(8, 1))
    unknown = Recipe(model=Model(name="torchvision:attention", weights="file.safetensors"))  # only timm tells layers
    assert runs.filled(unknown).optim.layer_decay == 1.0


def test_a_run_as_weights_gives_its_size_and_normalization(weights: Path, tmp_path: Path):
    first = fit(recipe_of(weights, freeze=0), tmp_path / "first", progress=False)
    assert isinstance(first, runs.Run)
    start = replace(recipe_of(first.folder), data=Data(train_size=32, test_size=10, seed=3))
    run = fit(start, tmp_path / "second", progress=False)
    assert isinstance(run, runs.Run)
    assert run.recipe.data.size == 24 and run.recipe.model.normalization == "network"
    assert run.preprocess == first.preprocess
    assert runs.filled(recipe_of(weights)).model.normalization == "data"  # a file does not tell


def test_a_network_that_tells_no_normalization_is_refused(tmp_path: Path):
    start = Recipe(data=Data(train_size=20, test_size=10), model=Model(name="vgg_gap", normalization="network"))
    with pytest.raises(ValueError, match=r"^model\.normalization: expected a network of timm or torchvision, or weigh"):
        fit(start, tmp_path / "run", progress=False)


def test_what_was_used_is_in_the_recipe_of_the_run(weights: Path, tmp_path: Path):
    start = replace(recipe_of(weights), optim=Optim(batch_size=16, epochs=1))
    fit(start, tmp_path / "run", progress=False)
    written = yaml.safe_load((tmp_path / "run/recipe.yaml").read_text())
    fields = ("epochs", "lr", "freeze", "backbone_lr", "layer_decay", "fixed_statistics")
    assert [written["optim"][field] for field in fields] == [1, 0.001, 1, 0.1, 1.0, True]
    assert written["model"]["normalization"] == "data"
    assert recipe.of_run(tmp_path / "run/recipe.yaml") == runs.filled(start)


def test_an_old_run_with_weights_was_trained_without_freezing(tmp_path: Path):
    whole = yaml.safe_load(recipe.dump(runs.filled(Recipe(model=Model(weights="x.safetensors", normalization="data")))))
    for part, name in (
        ("model", "normalization"),
        *(("optim", n) for n in ("freeze", "backbone_lr", "layer_decay", "fixed_statistics")),
    ):
        del whole[part][name]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(whole))
    old = recipe.of_run(tmp_path / "recipe.yaml")
    assert (old.optim.freeze, old.optim.backbone_lr, old.model.normalization) == (0, 1.0, "data")


@pytest.mark.parametrize(
    ("text", "value"),
    [("2", 2), (2, 2), ("stem,layer*.0", ("stem", "layer*.0")), (["0"], ("0",)), ("null", None)],
)
def test_freeze_is_epochs_or_names(text: Any, value: Any):
    assert recipe.load(Recipe(), {"optim.freeze": text}).optim.freeze == value
    assert recipe.load({"optim": {"freeze": value}}) == Recipe(optim=Optim(freeze=value))


@pytest.mark.parametrize("value", [-1, "", 1.5, [3]])
def test_freeze_that_is_neither(value: Any):
    with pytest.raises((TypeError, ValueError), match=r"^optim\.freeze: expected .*names of modules.*, got "):
        recipe.load(Recipe(), {"optim.freeze": value})


def test_the_linear_probe_of_the_pretrained_features_is_in_the_run(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    start = recipe_of(weights)
    run = fit(start, tmp_path / "run")
    assert isinstance(run, runs.Run) and run.probe is not None
    with torch.random.fork_rng():
        network = initial_network(start.model, 10, seed=0)
    sets = data.load(start.data)
    inputs: list[tuple[Tensor, Tensor]] = []
    for split in ("train", "test"):
        batch = sets[split].batch(range(len(sets[split])))
        inputs.append((data.normalize(batch.images, run.preprocess), batch.labels))
    assert run.probe == linear_probe(network, *inputs)
    assert json.loads((tmp_path / "run/run.json").read_text())["probe"]["value"] == run.probe.value
    assert runs.open_run(tmp_path / "run") == run
    assert (
        f"linear probe of the pretrained features: {100 * run.probe.value:.1f} % of 20 test" in capsys.readouterr().err
    )
    scratch = fit(replace(start, model=replace(start.model, weights=None)), tmp_path / "scratch", progress=False)
    assert isinstance(scratch, runs.Run) and scratch.probe is None


def test_the_probe_takes_so_many_training_images_of_each_class_and_the_labeled_test_images(
    monkeypatch: pytest.MonkeyPatch,
):
    sets = data.load(Data(train_size=48, test_size=20, size=24))
    labels = np.where(np.arange(20) < 5, -1, sets["test"].labels)
    test = replace(sets["test"], labels=labels, groups=np.arange(20))
    asked: dict[str, Any] = {}

    def linear_probe(network: nn.Module, *batches: Any, **options: Any) -> Interval:
        asked.update(options, labels=[torch.cat([labels for _, labels in part]).numpy() for part in batches])
        return Interval(value=0.5, low=0.4, high=0.6, n=15)

    monkeypatch.setattr(probing, "linear_probe", linear_probe)
    monkeypatch.setattr(probing, "_MOST", 20)
    probing.probe(nn.Flatten(), replace(sets["train"], labels=np.sort(sets["train"].labels)), test)
    assert np.bincount(asked["labels"][0]).tolist() == [2] * 10
    assert np.array_equal(asked["labels"][1], labels[5:]) and np.array_equal(asked["groups"], np.arange(5, 20))


def test_the_header_says_what_is_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rng = np.random.default_rng(0)
    for name, count in {"train/a": 20, "train/b": 12, "val/a": 2, "val/b": 1, "test/a": 4, "test/b": 3}.items():
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 255, (200, 150, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i}.png")
    start = Recipe(
        data=Data(source=str(tmp_path / "photos"), size=24),
        model=Model(name="cifar_resnet", options={"depth": 8, "stem_stride": 2}),
        optim=Optim(epochs=2, batch_size=8, freeze=1),
    )
    fit(start, tmp_path / "run")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "data: photos, 2 classes; images (train + val + test): 32 + 3 + 7; a 20 + 2 + 4, b 12 + 1 + 3"
    assert lines[1].startswith("size: 200 px, scaled to 24 x 24 px; mean 0.4")
    assert lines[1].endswith(" of the training images")
    network = runs.load_model(tmp_path / "run")
    parameters = sum(p.numel() for p in network.parameters())
    last = next(layer for layer in reversed([*network.modules()]) if isinstance(layer, nn.Linear))
    trained = f"network: cifar_resnet; {parameters:,} parameters, {parameters:,} of them trained"
    assert lines[2] == f"{trained}, in the first epoch {sum(p.numel() for p in last.parameters()):,}"
    assert lines[3] == "training: 2 epochs of 4 steps, adamw, lr 0.003"
    assert re.fullmatch(r"device: (cpu, \d+ threads|.*)", lines[4])
    expected = [line for line in lines if line.startswith("expected time")]
    assert [re.sub(r"\d+ (s|min)$", "TIME", line) for line in expected] == [
        "expected time for epoch 1: about TIME",
        "expected time for epoch 2: about TIME",
    ]


def counted(step: Callable[..., Any], name: str, done: list[str]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        done.append(name)
        return step(*args, **kwargs)

    return call


def test_the_command_line_writes_a_report_at_once_and_scores_by_the_options(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    from sightline.report import run_evaluation

    first: list[str] = []
    done: list[str] = []
    plain: Callable[..., Any] = run_evaluation.evaluate_run
    evaluating = sys.modules["sightline.evaluation.evaluate"]

    def evaluate_run(run: runs.Run, **options: Any) -> Any:
        assert options["methods"] == ["grad_cam"] and options["steps"] == 2 and options["budget"] == 600

        def tell_first(path: Path) -> None:
            first.append(path.read_text())
            options["first"](path)

        with monkeypatch.context() as patch:
            for module, name in ((runs, "load_model"), (data, "load"), (evaluating, "predict")):
                step: Callable[..., Any] = getattr(module, name)
                patch.setattr(module, name, counted(step, name, done))
            return plain(run, **(options | {"first": tell_first}))

    monkeypatch.setattr(run_evaluation, "evaluate_run", evaluate_run)
    command = ["train", "--data", "clutter", "--model", "cifar_resnet", "--model.options", "{depth: 8, stem_stride: 2}"]
    command += ["--weights", str(weights), "--attention", "se", "--data.train_size", "48", "--data.test_size", "20"]
    command += ["--optim.epochs", "1", "--optim.batch_size", "16", "--limit", "4", "--out", str(tmp_path / "run")]
    cli.main([*command, "--methods", "grad_cam", "--steps", "2", "--budget", "10min"])
    shown = capsys.readouterr().out
    assert "report.html (accuracy, gallery and errors; the scores follow)" in shown.splitlines()[0]
    assert done == ["load", "load_model", "predict"], "once, for the first report and for the scores"
    assert "open this page again later" in first[0] and "No metric was asked for" in first[0]
    last = (tmp_path / "run/report.html").read_text()
    written = yaml.safe_load((tmp_path / "run/recipe.yaml").read_text())["model"]
    assert written["weights"] == str(weights) and written["options"]["attention"] == "se"
    assert "open this page again later" not in last
    assert "Linear probe before fine-tuning" in last and "Linear probe before fine-tuning" in first[0]


def test_a_wrong_method_is_refused_before_the_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        cli.main(["train", "--data", "clutter", "--methods", "grad_kam", "--out", str(tmp_path / "run")])
    assert "did you mean 'grad_cam'?" in capsys.readouterr().err and not (tmp_path / "run").exists()
