"""A module of one's own is trained, loaded, evaluated and compared like a network that a recipe names."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sightline as sl
from sightline import bench, cli, data, runs
from sightline.recipe import Data, Model, Optim, Recipe
from sightline.report.run_evaluation import evaluate_run
from sightline.training import fit

pytestmark = pytest.mark.usefixtures("few_validation_images")

SMALL = {"data.train_size": 48, "data.test_size": 20, "data.size": 24, "optim.epochs": 1, "optim.batch_size": 16}


class Net(nn.Module):
    """A convolution, average pooling, a linear layer."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU())
        self.fc = nn.Linear(8, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(self.features(images).mean((2, 3)))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> runs.Run:
    """A trained run of `Net`."""
    one = fit(Net, "clutter", tmp_path_factory.mktemp("own") / "run", SMALL, progress=False)
    assert isinstance(one, runs.Run)
    return one


def test_a_module_is_trained_as_a_copy_and_its_weights_load_back(tmp_path: Path):
    torch.manual_seed(1)
    mine = Net()
    before = {name: tensor.clone() for name, tensor in mine.state_dict().items()}
    trained = sl.fit(mine, "clutter", out=tmp_path / "run", overrides=SMALL, progress=False)
    assert isinstance(trained, runs.Run) and trained.recipe.model == Model(name="own:Net", normalization="data")
    assert all(torch.equal(tensor, before[name]) for name, tensor in mine.state_dict().items()) and mine.training
    for builder in (mine, Net, lambda: Net(10)):
        loaded = sl.load(tmp_path / "run", model=builder)
        assert loaded is not mine and not loaded.training
        assert not torch.equal(loaded.fc.weight, mine.fc.weight)
    assert all(torch.equal(tensor, before[name]) for name, tensor in mine.state_dict().items())
    assert runs.open_run(tmp_path / "run") == trained


def test_it_equals_the_same_network_named_by_a_recipe(tmp_path: Path):
    """The same seed, data and initial weights give the same run, bit for bit."""
    options = {"depth": 8, "stem_stride": 2}
    named = Recipe(data=Data(source="clutter"), model=Model(name="cifar_resnet", options=options))
    factory = partial(sl.create_model, "cifar_resnet", **options)
    fit(named, tmp_path / "named", SMALL, progress=False)
    fit(factory, named, tmp_path / "own", SMALL, progress=False)
    one, other = sl.load(tmp_path / "named"), sl.load(tmp_path / "own", factory)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_a_run_holds_no_code(run: runs.Run, tmp_path: Path):
    assert {p.name for p in run.folder.iterdir()} >= {"model.safetensors", "recipe.yaml", "run.json"}
    assert not [p for p in run.folder.rglob("*") if p.suffix in (".py", ".pkl", ".pt")]
    with pytest.raises(ValueError, match=r"holds a network of your own, Net, and no code to build it; in Python, pass"):
        sl.load(run.folder)
    with pytest.raises(ValueError, match=r"^weights of run .* do not fit the model: .*; pass what was trained$"):
        sl.load(run.folder, model=nn.Linear(2, 2))
    named = Recipe(model=Model(name="cifar_resnet", options={"depth": 8, "stem_stride": 2}))
    fit(named, tmp_path / "named", SMALL, progress=False)
    with pytest.raises(ValueError, match=r"holds cifar_resnet, which sightline builds itself; leave `model` out$"):
        sl.load(tmp_path / "named", model=Net)


def test_the_command_line_says_that_it_cannot_build_it(run: runs.Run, tmp_path: Path, capsys: Any):
    with pytest.raises(SystemExit) as stop:
        cli.main(["evaluate", str(run.folder), "--out", str(tmp_path)])
    assert stop.value.code == 2
    assert "holds a network of your own, Net" in capsys.readouterr().err


def test_data_are_a_source_a_part_or_a_whole_recipe(run: runs.Run, tmp_path: Path):
    (tmp_path / "own.yaml").write_text("data: {source: clutter}\nmodel: {name: vgg}\n")
    for number, given in enumerate((Data(source="clutter"), Recipe(), tmp_path / "own.yaml")):
        same = fit(Net, given, tmp_path / str(number), SMALL, progress=False)
        assert isinstance(same, runs.Run) and same.recipe == run.recipe


def test_it_resumes(run: runs.Run):
    assert fit(Net, "clutter", run.folder, SMALL, resume=True, progress=False) == run


def test_another_number_of_logits_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"^own:Net: expected a logit for each of 10 classes, \(2, 10\), got \(2, 7\)"):
        fit(Net(7), "clutter", tmp_path / "run", SMALL, progress=False)
    assert not (tmp_path / "run").exists()


def test_weights_beside_a_module_are_refused(tmp_path: Path):
    start = Recipe(model=Model(weights="x.safetensors"))
    with pytest.raises(ValueError, match=r"^expected no model\.weights with a module of your own; load them into it"):
        fit(Net, start, tmp_path / "run", progress=False)


def test_how_a_network_is_built():
    assert runs.build(Net, 3).fc.out_features == 3
    assert runs.build(lambda classes: Net(classes), 4).fc.out_features == 4
    assert runs.build(lambda width=8: Net(5), 4).fc.out_features == 5
    assert runs.build(partial(sl.create_model, "vgg_gap", width=1 / 16), 6)(torch.rand(1, 3, 32, 32)).shape == (1, 6)
    with pytest.raises(TypeError, match=r"^expected a function that returns a torch\.nn\.Module, got int from it$"):
        runs.build(lambda: 3, 3)


def test_frozen_parts_and_slower_rates_work_on_a_module_too(tmp_path: Path):
    torch.manual_seed(1)
    mine = Net()
    fit(mine, "clutter", tmp_path / "run", {**SMALL, "optim.freeze": 1, "optim.backbone_lr": 0.1}, progress=False)
    state = sl.load(tmp_path / "run", Net).state_dict()
    assert {n for n, t in mine.state_dict().items() if not torch.equal(t, state[n])} == {"fc.weight", "fc.bias"}


def test_it_is_evaluated_with_a_report(run: runs.Run, tmp_path: Path):
    first: list[str] = []
    options: dict[str, Any] = {"methods": ["grad_cam"], "metrics": ["sparsity"], "limit": 4}
    evaluated = evaluate_run(run, tmp_path, model=Net, first=lambda path: first.append(path.read_text()), **options)
    assert "Where Net looks on clutter" in first[0] and "open this page again later" in first[0]
    assert "Where Net looks on clutter" in evaluated.report.read_text()


def test_a_study_has_rows_of_one_s_own(tmp_path: Path):
    start = Recipe(
        data=Data(train_size=32, test_size=10, size=24),
        model=Model(name="cifar_resnet", options={"depth": 8, "stem_stride": 2}),
        optim=Optim(epochs=1, batch_size=16),
    )
    study = bench.Study(recipe=start, rows={"control": {}, "mine": {"model": Net, "optim.lr": 0.01}})
    result = bench.bench(study, tmp_path / "study")
    assert not result.failed and [run.row for run in result.measured] == ["control", "mine"]
    assert result.measured[1].parameters == sum(p.numel() for p in Net().parameters())
    assert runs.open_run(tmp_path / "study/mine/seed-0").recipe.optim.lr == 0.01
    assert set(result.costs[""]) == {"control", "mine"}
    assert "own:Net" in (tmp_path / "study/bench.html").read_text()
    with pytest.raises(ValueError, match=r"^row 'mine': expected networks that recipes name with `as_large_as`"):
        bench.Study(recipe=start, rows={"control": {}, "mine": {"model": Net, "as_large_as": "control"}})


def test_a_module_without_a_known_input_needs_its_preprocessing(tmp_path: Path):
    with pytest.raises(ValueError, match=r"^expected `preprocess` for Net, got none; give the size, mean and standard"):
        sl.export(Net(), tmp_path / "net.pt2")


@pytest.mark.compile
def test_a_module_is_exported_and_stays_as_it_is(tmp_path: Path):
    mine = Net().train()
    preprocess = data.Preprocess(size=(24, 24), mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    exported = sl.export(mine, tmp_path / "net.pt2", preprocess, classes=[f"class {i}" for i in range(10)])
    assert exported.size == (24, 24) and exported.outputs == ("logits",) and mine.training
    images = torch.randint(0, 256, (2, 3, 24, 24), dtype=torch.uint8)
    with torch.no_grad():
        (logits,) = torch.export.load(tmp_path / "net.pt2").module()(images)
        torch.testing.assert_close(logits, mine.eval()(data.normalize(images, preprocess)), rtol=1e-4, atol=1e-5)
