"""ProtoPNet against the paper, by hand, and on images whose decisive part is known."""

import copy
import inspect
import math
from dataclasses import replace

import pytest
import torch
from tests.reference.protopnet import compare
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

from sightline import data, runs
from sightline.explainers import attention_maps
from sightline.models.protopnet import LogSimilarity, ProtoPNet, Prototypes, Stages
from sightline.recipe import Data, Model, Optim, Recipe
from sightline.report.prototypes import this_looks_like_that
from sightline.training import fit, initial_network
from sightline.training.checkpoints import RunFiles
from sightline.training.prototypes import fit_prototypes, prototype_loss, push


def network(num_classes=3, seed=0, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ProtoPNet(num_classes, **({"level": 1, "prototypes": 2, "channels": 8} | options)).eval()


def images_of(n, side=16, seed=0):
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


def batches(images, labels, size=4):
    return zip(images.split(size), labels.split(size), strict=True)


def test_distances_and_similarities_equal_the_loop():
    model = network().double()
    images = images_of(2, side=12).double()
    latent = model.latent(images).detach()
    assert latent.shape == (2, 8, 3, 3) and (latent > 0).all() and (latent < 1).all()
    distances, scores = map(torch.from_numpy, compare(latent.numpy(), model.prototypes.vectors.detach().numpy()))
    torch.testing.assert_close(model.distances(images), distances, rtol=0, atol=1e-10)
    torch.testing.assert_close(model.prototypes(latent), scores, rtol=0, atol=1e-10)
    torch.testing.assert_close(model(images), scores @ model.head.weight.T, rtol=0, atol=1e-10)


def test_a_fresh_network_is_the_papers():
    model = network(10, level=-1, prototypes=10, channels=128)
    assert [type(layer).__name__ for layer in model.add_on] == ["Conv2d", "ReLU", "Conv2d", "Sigmoid"]
    assert model.add_on[0].weight.shape == (128, 512, 1, 1) and model.add_on[2].weight.shape == (128, 128, 1, 1)
    assert model.prototypes.vectors.shape == (100, 128)
    expected = torch.full((10, 100), -0.5)
    for number in range(10):
        expected[number, 10 * number : 10 * number + 10] = 1
    assert torch.equal(model.head.weight, expected) and model.head.bias is None
    assert model(images_of(2, side=64)).shape == (2, 10)
    assert "own" not in model.state_dict()
    assert not [p for p in inspect.signature(ProtoPNet).parameters.values() if p.annotation not in (int, bool, str)]


def test_similarity_falls_from_its_maximum():
    values = LogSimilarity()(torch.linspace(0, 50, 500, dtype=torch.float64).reshape(1, 1, 1, -1)).flatten()
    assert values[0].item() == pytest.approx(math.log(1e4)) and (values.diff() < 0).all() and (values > 0).all()


def test_distances_survive_low_precision():
    latent = torch.rand(2, 128, 3, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    layer = Prototypes(128, 2).bfloat16()
    layer.vectors.data.copy_(latent[0, :, :2, 1].T)
    exact = (latent.double()[:, None] - layer.vectors.double()[:, :, None, None]).square().sum(2)
    assert layer(latent).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        for got in (layer.distances(latent), layer.float().distances(latent.float())):
            assert (got >= 0).all() and got[0, 0, 0, 1] < 1e-4 and got[0, 1, 1, 1] < 1e-4
            torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-4)


def test_gradients():
    layer = Prototypes(4, 3).double()
    latent = torch.rand(2, 4, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda latent, vectors: layer(latent), (latent, layer.vectors))


def test_the_gate_yields_the_similarity_maps():
    model, images = network(), images_of(2)
    maps = attention_maps(model, images)
    assert list(maps) == ["prototypes"] and maps["prototypes"].shape == (2, 6, 4, 4)
    torch.testing.assert_close(maps["prototypes"].amax((2, 3)) @ model.head.weight.T, model(images))


def test_losses_by_hand():
    model = network(2, prototypes=2)
    nearest = torch.tensor([[1.0, 2.0, 5.0, 4.0], [3.0, 7.0, 6.0, 8.0]])
    distances = torch.stack([nearest, nearest + 1], 2)[:, :, :, None]
    labels = torch.tensor([0, 1])
    model.head.weight.data.copy_(torch.tensor([[1.0, 2.0, -3.0, 0.5], [-0.25, 0.0, 9.0, 9.0]]))
    scores = [[math.log((d + 1) / (d + 1e-4)) for d in row] for row in nearest.tolist()]
    logits = torch.tensor(
        [[sum(w * s for w, s in zip(line, row, strict=True)) for line in model.head.weight.tolist()] for row in scores]
    )
    error = F.cross_entropy(logits, labels).item()
    attraction, repulsion, sparse = (1 + 6) / 2, (4 + 3) / 2, 3 + 0.5 + 0.25

    def loss(**weights):
        return prototype_loss(model, distances, labels, **weights).item()

    off = {"cluster": 0.0, "separation": 0.0, "sparsity": 0.0}
    assert loss(**off) == pytest.approx(error, rel=1e-5)
    assert loss(**off | {"cluster": 1.0}) == pytest.approx(error + attraction, rel=1e-5)
    assert loss(**off | {"separation": 1.0}) == pytest.approx(error - repulsion, rel=1e-5)
    assert loss(**off | {"sparsity": 1.0}) == pytest.approx(error + sparse, rel=1e-5)
    assert loss() == pytest.approx(error + 0.8 * attraction - 0.08 * repulsion + 1e-4 * sparse, rel=1e-5)


def test_push_finds_the_nearest_patch_of_the_own_class():
    model = network().double()
    model.features.train()
    images, labels = images_of(11).double(), torch.arange(11) % 3
    before, flags = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    old = model.prototypes.vectors.detach().clone()
    pushed = push(model, batches(images, labels))

    assert [module.training for module in model.modules()] == flags
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"prototypes.vectors"}
    assert model.prototypes.vectors.requires_grad and model.prototypes.vectors.grad is None
    model.eval()
    latent = model.latent(images).detach()
    distances, _ = compare(latent.numpy(), old.numpy())
    for j in range(6):
        allowed = {n: distances[n, j] for n in range(11) if labels[n] == j // 2}
        wanted = min((value, n, y, x) for n, one in allowed.items() for (y, x), value in _cells(one))
        assert (int(pushed.image[j]), int(pushed.row[j]), int(pushed.column[j])) == wanted[1:]
        assert pushed.distance[j].item() == pytest.approx(wanted[0], abs=1e-10)
        torch.testing.assert_close(model.prototypes.vectors[j].detach(), latent[(wanted[1], slice(None), *wanted[2:])])
    again = push(model, batches(images, labels, size=3))
    assert torch.equal(again.image, pushed.image) and (again.distance < 1e-10).all()


def _cells(values):
    return (((y, x), values[y, x].item()) for y in range(values.shape[0]) for x in range(values.shape[1]))


def test_push_with_non_square_images():
    model = network()
    images, labels = torch.randn(6, 3, 8, 24, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3
    pushed = push(model, batches(images, labels))
    latent = model.latent(images).detach()
    assert latent.shape[2:] == (2, 6) and pushed.column.max() > 1
    patches = latent.permute(0, 2, 3, 1)[pushed.image, pushed.row, pushed.column]
    torch.testing.assert_close(patches, model.prototypes.vectors.detach(), rtol=0, atol=1e-5)


def test_push_without_a_class_changes_nothing():
    model = network()
    old = model.prototypes.vectors.detach().clone()
    with pytest.raises(ValueError, match="expected images of every class, got none of class 1; push with the"):
        push(model, batches(images_of(4), torch.tensor([0, 2, 2, 0])))
    assert torch.equal(model.prototypes.vectors, old)


def test_stages_move_what_they_should():
    images, labels = images_of(12), torch.arange(12) % 3

    def moved(epochs, **stages):
        model = network()
        before = copy.deepcopy(dict(model.named_parameters()))
        fit_prototypes(model, images, labels, Stages(**stages), epochs=epochs, batch_size=4)
        changed = {key for key, value in model.named_parameters() if not torch.equal(value, before[key])}
        return {key.split(".")[0] for key in changed}

    assert moved(epochs=2, warm=2, last=0) == {"add_on", "prototypes"}
    assert moved(epochs=2, warm=1, last=0) == {"features", "add_on", "prototypes"}
    assert moved(epochs=1, warm=1, last=1, lr=0.0) == {"prototypes", "head"}  # the push moves prototypes


def test_the_schedule_is_the_authors():
    rates = []
    hook = register_optimizer_step_post_hook(
        lambda optimizer, *_: rates.append([group["lr"] for group in optimizer.param_groups if group["lr"]])
    )
    try:
        stages = Stages(warm=2, push_every=4, last=1)
        fit_prototypes(network(), images_of(12), torch.arange(12) % 3, stages, epochs=8)
    finally:
        hook.remove()
    warming, joint, head = [3e-3] * 2, [1e-4, 3e-3, 3e-3], [1e-4]
    expected = [warming] * 2 + [joint] * 2 + [head] + [joint] * 3 + [[1e-5, 3e-4, 3e-4], head]
    assert all(got == pytest.approx(wanted) for got, wanted in zip(rates, expected, strict=True))


def planted(n, seed, side=32):
    """Noise with a green square and, by class, a red or a blue one; masks of the latter."""
    generator = torch.Generator().manual_seed(seed)
    images, masks, labels = (
        0.3 * torch.randn(n, 3, side, side, generator=generator),
        torch.zeros(n, side, side),
        torch.arange(n) % 2,
    )
    for image, mask, label in zip(images, masks, labels.tolist(), strict=True):
        (row, column), (y, x) = torch.randint(side - 7, (2, 2), generator=generator).tolist()
        image[1, y : y + 8, x : x + 8] += 2
        image[:, row : row + 8, column : column + 8] = torch.tensor([2.0, 0, 0]).roll(2 * label)[:, None, None]
        image[:, row : row + 8, column : column + 8] += 0.3 * torch.randn(3, 8, 8, generator=generator)
        mask[row : row + 8, column : column + 8] = 1
    return images, labels, masks


def test_it_learns_the_parts_that_decide():
    images, labels, masks = planted(400, seed=0)
    model = network(2, prototypes=1, channels=16)
    pushed = fit_prototypes(model, images, labels, Stages(warm=1), epochs=8, batch_size=40)
    model.eval()
    new, new_labels, new_masks = planted(200, seed=1)
    with torch.no_grad():
        assert (model(new).argmax(1) == new_labels).float().mean() > 0.9
        latent, similar = model.latent(images), model.prototypes.gate(model.distances(new))
    assert labels[pushed.image].tolist() == [0, 1]
    cells = F.avg_pool2d(masks, 4)
    assert (cells[pushed.image, pushed.row, pushed.column] > 0.25).all()
    assert (F.avg_pool2d(masks, 4) > 0.25).float().mean() < 0.12
    patches = latent.permute(0, 2, 3, 1)[pushed.image, pushed.row, pushed.column]
    torch.testing.assert_close(patches, model.prototypes.vectors.detach(), rtol=0, atol=1e-5)
    own = similar[torch.arange(200), new_labels].flatten(1).argmax(1)
    assert (F.avg_pool2d(new_masks, 4).flatten(1)[torch.arange(200), own] > 0).float().mean() > 0.9


def test_the_figure_shows_the_most_similar_prototypes_first():
    model = network()
    source, labels = images_of(6), torch.arange(6) % 3
    pushed = push(model, batches(source, labels))
    j = int((pushed.row != pushed.column).nonzero()[0])
    figure = this_looks_like_that(model, source[pushed.image[[j]]], source, pushed, top=2)
    shown, first, second = figure.axes
    assert first.get_title() == f"class {j // 2}: 9.2" and float(second.get_title().split()[-1]) <= 9.2
    row, column = int(pushed.row[j]), int(pushed.column[j])
    for axis in (shown, first):
        frame = axis.patches[0]
        assert frame.get_xy() == (4 * column - 0.5, 4 * row - 0.5) and (frame.get_width(), frame.get_height()) == (4, 4)
    assert shown.patches[0].get_edgecolor() == first.patches[0].get_edgecolor() != second.patches[0].get_edgecolor()
    drawn = torch.from_numpy(first.images[0].get_array().data).movedim(2, 0)
    origin = source[pushed.image[j]]
    torch.testing.assert_close(drawn, ((origin - origin.min()) / (origin.max() - origin.min())).to(drawn.dtype))
    assert len(this_looks_like_that(model, source[:2], source, pushed, top=6).axes) == 14
    with pytest.raises(ValueError, match="expected top from 1 to 6, the number of prototypes; got 7"):
        this_looks_like_that(model, source[:1], source, pushed, top=7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 1}, "expected num_classes of 2 or more, got 1"),
        ({"prototypes": 0}, "expected prototypes of 1 or more, got 0"),
        ({"channels": 0}, "expected channels of 1 or more, got 0"),
        ({"backbone": "resnet19"}, "expected the name of a timm model as backbone, got 'resnet19'"),
        ({"level": 9}, "expected a backbone with a feature map at level 9, got resnet18: .*; take another level"),
        ({"backbone": "swin_tiny_patch4_window7_224"}, r"feature maps \(b, c, h, w\), got swin_tiny.*; take a"),
    ],
)
def test_impossible_options_are_one_clear_line(options, message):
    with pytest.raises(ValueError, match=message):
        ProtoPNet(**options)


def test_fitting_needs_an_epoch():
    with pytest.raises(ValueError, match="expected epochs, push_every and batch_size of 1 or more, got 0, 10, 80"):
        fit_prototypes(network(), images_of(3), torch.arange(3), epochs=0)


@pytest.mark.compile
def test_compiled_and_exported():
    model, images = network(), images_of(2)
    expected = model(images)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(images), expected)
    torch.testing.assert_close(torch.export.export(model, (images,)).module()(images), expected)


def trained(folder, **overrides):
    options = {"level": 1, "prototypes": 2, "channels": 8, "warm": 1, "push_every": 2, "last": 2}
    recipe = Recipe(
        data=Data(source="clutter", size=32, train_size=60, test_size=20, val=0.2),
        model=Model(name="protopnet", options=options),
        optim=Optim(epochs=3, batch_size=16),
    )
    return fit(recipe, folder, overrides, progress=False), recipe


def moves(run):
    """How far each prototype of a run is from the nearest patch of its class in the training images."""
    images = replace(data.load(run.recipe.data)["train"], preprocess=run.preprocess)
    model = runs.load_model(run.folder)
    parts = ((data.normalize(b.images, run.preprocess), b.labels) for b in data.batches(images, 50))
    return push(model, parts).distance


def test_training_by_a_recipe_ends_with_patches_of_images(tmp_path):
    run, _ = trained(tmp_path / "a")
    assert (moves(run) < 1e-5).all()
    assert run.history[0]["lr"] == 3e-3 and len(run.history) == 3
    before = initial_network(run.recipe.model, 10, 0)
    after = dict(runs.load_model(run.folder).features.named_parameters())
    assert not all(torch.equal(after[name], value) for name, value in before.features.named_parameters())


def test_the_first_stage_leaves_the_backbone_alone(tmp_path):
    run, _ = trained(tmp_path / "a", **{"optim.epochs": 1})
    before, after = initial_network(run.recipe.model, 10, 0), runs.load_model(run.folder)
    pairs = ((name, value, after.get_parameter(name)) for name, value in before.named_parameters())
    alike = {name.split(".")[0] for name, one, other in pairs if torch.equal(one, other)}
    assert "features" in alike and not alike & {"add_on", "prototypes", "head"}


def test_an_interrupted_training_in_stages_comes_to_the_same_weights(tmp_path, monkeypatch):
    whole, recipe = trained(tmp_path / "whole")
    for after in (2, 8):  # in the first stage, and after a push
        ticks = iter(range(after))
        state = RunFiles.poll

        def asked(keeper, stop, ticks=ticks, state=state):
            state(keeper, stop)
            return next(ticks, None) is None, False

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match="continue with --resume"):
            patch.setattr(RunFiles, "poll", asked)
            fit(recipe, tmp_path / f"part-{after}", progress=False)
        part = fit(recipe, tmp_path / f"part-{after}", resume=True, progress=False)
        one, other = runs.load_model(whole.folder).state_dict(), runs.load_model(part.folder).state_dict()
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"optim.ema": 0.9},
            "no optim.ema 0.9 with protopnet, which trains in its own stages; leave it out",
        ),
        ({"optim.patience": 3}, "expected no optim.patience 3 with protopnet"),
        ({"augment.mixup": 0.2}, "expected no augment.mixup 0.2 with protopnet"),
    ],
)
def test_what_does_not_go_with_stages_is_refused_before_anything_is_written(tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        trained(tmp_path / "a", **overrides)
    assert not (tmp_path / "a").exists()


def test_rates_of_the_recipe_that_are_not_used_are_named(tmp_path, capfd):
    _, recipe = trained(tmp_path / "a", **{"optim.epochs": 1})
    recipe = replace(recipe, optim=replace(recipe.optim, epochs=1, lr=0.1, schedule="step"))
    run = fit(recipe, tmp_path / "b")
    notice = "protopnet trains in its own stages, by Adam at its own rates; ignored: optim.lr, optim.schedule"
    assert f"notice: {notice}\n" in capfd.readouterr().err and run.info["training"] == notice
