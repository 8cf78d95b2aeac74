"""Prototypical networks and meta-transfer learning against their algorithms written out, their runs, and the task."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from sightline import cli, data, runs, tasks
from sightline.data.episodes import episodes
from sightline.inference import features_of
from sightline.models.few_shot import LEARNERS, centroid
from sightline.models.scale_and_shift import ScaleAndShift
from sightline.recipe import Augment, Data, Model, Optim, Recipe
from sightline.tasks.new_classes import half_width
from sightline.training import Schedule, episodic, fit, meta_transfer, prototypical
from sightline.training.episodic import BaseLearner, read_base_learner

LISTS = {"train": ["ant", "bee", "crab", "dog"], "val": ["eel", "fox"], "test": ["gnu", "hare", "ibis"]}
SHORT = Schedule(epochs=2, episodes=3, ways=2, queries=4, validation=5)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> runs.Run:
    """A network of four classes, trained for one epoch; its recipe lists five other classes, all with 12 images."""
    root = tmp_path_factory.mktemp("few")
    rng = np.random.default_rng(0)
    for kind, name in enumerate(name for part in LISTS.values() for name in part):
        (root / "animals" / name).mkdir(parents=True)
        for i in range(12):
            pixels = np.full((16, 16, 3), np.array([kind % 3, kind // 3, 1]) * 60) + rng.integers(0, 80, (16, 16, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(root / "animals" / name / f"{i:02d}.png")
    (root / "lists.json").write_text(json.dumps(LISTS))
    recipe = Recipe(
        data=Data(source=str(root / "animals"), classes=str(root / "lists.json"), val=0.1, test=0.1),
        augment=Augment(crop=1, flip=True, mixup=0.5),
        model=Model(name="cifar_resnet", options={"depth": 8, "width": 0.25}),
        optim=Optim(epochs=1, batch_size=8),
    )
    trained = fit(recipe, root / "run", progress=False)
    assert isinstance(trained, runs.Run)
    return trained


def pixels(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 2, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def course(network: nn.Module, learner, *groups) -> episodic._Course:
    return episodic._Course("test", network, learner, torch.optim.SGD(groups, lr=1.0), lambda: episodic._Kept({}, {}))


def test_a_step_of_prototypical_networks_is_algorithm_1():
    embedding = nn.Linear(12, 3, bias=False).double()
    network = nn.Sequential(nn.Flatten(), embedding, nn.Linear(3, 7).double())
    images, before = pixels(3 * 2 + 3 * 4), embedding.weight.detach().clone().requires_grad_()
    loss, accuracy = episodic._step(course(network, centroid, {"params": [embedding.weight]}), images, 3, 2)

    embedded = images.flatten(1) @ before.T
    prototypes = [(embedded[2 * k] + embedded[2 * k + 1]) / 2 for k in range(3)]
    total, hits = 0.0, 0
    for k in range(3):
        for x in embedded[6 + 4 * k : 10 + 4 * k]:
            distances = torch.stack([(x - prototype).square().sum() for prototype in prototypes])
            total = total + (distances[k] + torch.logsumexp(-distances, 0)) / (3 * 4)
            hits += int(distances.argmin()) == k
    torch.testing.assert_close((loss, accuracy), (total.item(), hits / 12))
    torch.testing.assert_close(embedding.weight, before - torch.autograd.grad(total, before)[0])


def test_a_step_of_meta_transfer_learning_is_its_first_order_algorithm():
    network = nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8, 7)).double()
    conv = network[0]
    assert isinstance(conv, nn.Conv2d) and conv.bias is not None
    learning = ScaleAndShift(network, (2, 2))
    start = [torch.randn(3, 8).double(), torch.randn(3).double()]
    weight, bias = (nn.Parameter(value.clone()) for value in start)
    images = pixels(3 * 1 + 3 * 2)
    learned = [*learning.scales, *learning.shifts, weight, bias]
    episodic._step(course(learning, BaseLearner(weight, bias, 4, 0.5), {"params": learned}), images, 3, 1)

    scale, shift = torch.ones(2, 3, 1, 1).double().requires_grad_(), torch.zeros(2).double().requires_grad_()
    first = [value.requires_grad_() for value in start]
    embedded = F.conv2d(images, conv.weight.detach() * scale, conv.bias.detach() + shift).relu().flatten(1)
    fast = first
    for _ in range(4):
        inner = F.cross_entropy(F.linear(embedded[:3], *fast), torch.arange(3))
        gradients = torch.autograd.grad(inner, fast, retain_graph=True)  # constants: no second derivatives
        fast = [value - 0.5 * gradient for value, gradient in zip(fast, gradients, strict=True)]
    outer = F.cross_entropy(F.linear(embedded[3:], *fast), torch.arange(3).repeat_interleave(2))
    parameters = [scale, shift, *first]
    expected = [p - g for p, g in zip(parameters, torch.autograd.grad(outer, parameters), strict=True)]
    torch.testing.assert_close([p.detach() for p in learned], [p.detach() for p in expected])


@pytest.fixture(scope="module")
def trained(run, tmp_path_factory) -> dict[str, runs.Run]:
    folder = tmp_path_factory.mktemp("trained")
    return {
        "prototypical": prototypical(run, folder / "prototypical", SHORT, progress=False),
        "meta_transfer": meta_transfer(run, folder / "meta", SHORT, lr=0.01, steps=5, progress=False),
    }


@pytest.mark.parametrize("name", ["prototypical", "meta_transfer"])
def test_training_leaves_a_run_of_the_best_epoch(name, trained, run):
    new = trained[name]
    assert [row["epoch"] for row in new.history] == [1.0, 2.0]
    best = max(row["val_accuracy"] for row in new.history)
    drawn = [*SHORT.drawn(data.load_new_classes(run.recipe.data, run.preprocess)["val"], SHORT.validation)]
    val = data.load_new_classes(run.recipe.data, run.preprocess)["val"]
    learner = centroid if name == "prototypical" else read_base_learner(new.folder)

    def accuracy(folder: Path) -> float:
        network = runs.load_model(folder)
        hits = []
        for one in drawn:
            x = [val.batch(rows.ravel()).images for rows in (one.support, one.query)]
            support, query = (features_of(network, data.normalize(images, run.preprocess)) for images in x)
            hits += (
                learner(support.unflatten(0, (2, 1)), query).argmax(1) == torch.arange(2).repeat_interleave(4)
            ).tolist()
        return float(np.mean(hits))

    with torch.no_grad():
        reached = accuracy(new.folder)
    assert f"validation accuracy {100 * reached:.1f} %" in new.info["training"]
    assert reached >= best - 1e-9
    assert (f"kept: epoch {1 + [row['val_accuracy'] for row in new.history].index(best)}," in new.info["training"]) == (
        "no epoch" not in new.info["training"]
    )


def test_meta_transfer_keeps_the_network_where_no_epoch_is_better(run, tmp_path):
    new = meta_transfer(run, tmp_path / "still", SHORT, lr=0.0, learner_lr=0.0, steps=5, progress=False)
    before, after = (runs.load_model(one.folder).state_dict() for one in (run, new))
    assert "kept: no epoch" in new.info["training"]
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    learner = read_base_learner(new.folder)
    assert not learner.weight.any() and not learner.bias.any()


def test_an_epoch_that_is_only_as_good_keeps_the_weights_of_the_one_before(run, tmp_path, monkeypatch):
    monkeypatch.setattr("sightline.training.episodic._validated", lambda course, images: 0.5)
    new = prototypical(run, tmp_path / "tied", SHORT, progress=False)
    before, after = (runs.load_model(one.folder).state_dict() for one in (run, new))
    assert "kept: no epoch" in new.info["training"]
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_meta_transfer_starts_with_the_rate_that_is_best_on_validation_classes(run, tmp_path):
    quiet = {"lr": 0.0, "learner_lr": 0.0, "steps": 5, "progress": False}
    one = replace(SHORT, epochs=1, episodes=1, validation=20)
    scores = {
        rate: meta_transfer(run, tmp_path / str(rate), one, base_lrs=[rate], **quiet).history[0]["val_accuracy"]
        for rate in (1e-9, 1.0)
    }
    chosen = meta_transfer(run, tmp_path / "both", one, base_lrs=[1e-9, 1.0], **quiet)
    assert scores[1e-9] != scores[1.0]
    assert read_base_learner(chosen.folder).lr == max(scores, key=scores.__getitem__)


@pytest.mark.parametrize("train", [prototypical, meta_transfer])
def test_training_is_repeatable_and_leaves_run_and_random_state(train, run, tmp_path, trained):
    files = {file.name: file.read_bytes() for file in run.folder.iterdir() if file.is_file()}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    options = {"lr": 0.01, "steps": 5} if train is meta_transfer else {}
    again = train(run, tmp_path / "again", SHORT, progress=False, **options)
    assert torch.equal(torch.get_rng_state(), state)
    assert {file.name: file.read_bytes() for file in run.folder.iterdir() if file.is_file()} == files
    first = trained[train.__name__]
    assert (again.folder / "model.safetensors").read_bytes() == (first.folder / "model.safetensors").read_bytes()
    figures = [[{**row, "seconds": 0, "val_loss": 0} for row in one.history] for one in (again, first)]
    assert figures[0] == figures[1]


@pytest.mark.parametrize("train", [prototypical, meta_transfer])
def test_what_is_impossible_is_refused_before_anything_is_written(train, run, tmp_path):
    with pytest.raises(ValueError, match="expected at least 3 classes for 3-way"):
        train(run, tmp_path / "new", replace(SHORT, ways=3))
    with pytest.raises(ValueError, match=r"expected 1 \+ 11 images of each class, got \d+"):
        train(run, tmp_path / "new", replace(SHORT, queries=11))
    with pytest.raises(ValueError, match=r"expected data\.classes"):
        train(replace(run, recipe=replace(run.recipe, data=replace(run.recipe.data, classes=None))), tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(FileExistsError, match="not empty"):
        train(run, run.folder, SHORT)


@pytest.mark.parametrize("changes", [{"epochs": 0}, {"episodes": 0}])
def test_a_schedule_without_episodes_is_refused(changes):
    with pytest.raises(ValueError, match="expected 1 epoch or more of 1 episode or more"):
        Schedule(**changes)


def test_a_loss_that_is_not_finite_stops_the_training(run, tmp_path):
    with pytest.raises(ValueError, match=r"the loss became (nan|inf) in epoch \d; .* lower lr"):
        prototypical(run, tmp_path / "wild", SHORT, lr=1e30, progress=False)
    assert torch.isfinite(torch.cat([p.flatten() for p in runs.load_model(tmp_path / "wild").parameters()])).all()


def test_a_base_learner_knows_its_number_of_classes():
    with pytest.raises(ValueError, match=r"expected episodes of 3 classes.* got 2; set ways to 3"):
        BaseLearner(torch.zeros(3, 4), torch.zeros(3), 1, 0.1)(torch.zeros(2, 1, 4), torch.zeros(2, 4))


# the task


def test_the_figures_are_those_of_a_loop(run):
    outcome = tasks.perform("few_shot", run, ways=3, shots=2, queries=4, episodes=20, seed=7)
    images = data.load_new_classes(run.recipe.data, run.preprocess)["test"]
    network = runs.load_model(run.folder)
    batch = images.batch(range(len(images)))
    with torch.no_grad():
        features = features_of(network, data.normalize(batch.images, run.preprocess))
    for number, one in enumerate(episodes(images, 20, ways=3, shots=2, queries=4, seed=7)):
        means = [features[rows].mean(0) for rows in one.support]
        hits = [
            min(range(3), key=lambda k: float((features[row] - means[k]).square().sum())) == kind
            for kind in range(3)
            for row in one.query[kind]
        ]
        assert outcome.figures["centroid"].values[number] == pytest.approx(np.mean(hits))
        assert outcome.names["episodes"][number] == ", ".join(images.classes[kind] for kind in one.classes)
    assert [*outcome.figures] == [*LEARNERS]
    figure = outcome.figures["centroid"]
    assert (figure.chance, figure.unit, figure.interval.n) == (1 / 3, "episodes", 20)
    mean, spread = 100 * figure.values.mean(), 196 * np.std(figure.values, ddof=1) / np.sqrt(20)
    [notice] = outcome.notices
    assert notice.startswith("3-way 2-shot, 4 queries per class, 3 test classes; mean ± 1.96 s / sqrt(20): ")
    assert f"centroid {mean:.2f} ± {spread:.2f} %" in notice


def test_the_spread_of_one_episode_is_unknown():
    assert half_width(np.array([0.25, 0.75])) == pytest.approx(1.96 * np.sqrt(0.125) / np.sqrt(2))
    assert np.isnan(half_width(np.array([0.5])))


def test_a_run_of_meta_transfer_learning_is_measured_with_its_base_learner(trained):
    options = {"ways": 2, "queries": 4, "episodes": 5}
    meta = tasks.perform("few_shot", trained["meta_transfer"], **options)
    assert [*meta.figures] == ["base learner", *LEARNERS]
    only = tasks.perform("few_shot", trained["meta_transfer"], learners=["cosine"], **options)
    assert [*only.figures] == ["cosine"] and (only.figures["cosine"].values == meta.figures["cosine"].values).all()
    with pytest.raises(ValueError, match="set ways to 2"):
        tasks.perform("few_shot", trained["meta_transfer"], ways=3, queries=4, episodes=5)


def test_validation_classes_are_measured_on_request(run):
    outcome = tasks.perform("few_shot", run, ways=2, queries=4, episodes=5, part="val", learners=["cosine"])
    assert {name for names in outcome.names["episodes"] for name in names.split(", ")} == {"eel", "fox"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task.learners", "cosin"], "no learner 'cosin' for this run; did you mean 'cosine'?"),
        (["--task.learners", "base learner"], "no learner 'base learner' for this run; it has centroid"),
        (["--task.ways", "4"], "expected at least 4 classes for 4-way episodes, got 3"),
        (["--task.ways", "3", "--task.queries", "12"], "expected 1 + 12 images of each class, got 12 of 'gnu'"),
        (["--task.part", "tset"], "did you mean 'test'?"),
    ],
)
def test_the_command_line_refuses_in_one_line(run, tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit):
        cli.main(["task", "few_shot", str(run.folder), *arguments, "--out", str(tmp_path)])
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_run_without_a_base_learner_has_none(run):
    with pytest.raises(FileNotFoundError, match="has no base learner"):
        read_base_learner(run.folder)


def test_a_damaged_base_learner_is_refused(tmp_path):
    (tmp_path / runs.BASE_LEARNER).write_bytes(runs.pack({"weight": torch.zeros(2, 2)}, {}))
    with pytest.raises(ValueError, match="is damaged: no 'bias'"):
        read_base_learner(tmp_path)
