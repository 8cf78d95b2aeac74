"""The sight test: explainers ranked by known evidence, metrics by how well they forecast that ranking."""

import json
import sys
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

from sightline import cli, models, runs
from sightline.data import Preprocess, read_images
from sightline.evaluation import evaluate
from sightline.recipe import Data, Model, Recipe
from sightline.sight import SETS, TRUTH, photos, predicted, sight_test
from sightline.testing import PLANTED, PooledModel, planted

pytestmark = pytest.mark.usefixtures("without_shape_checks")

METHODS = ["grad_cam", "saliency", "lrp", "activation_map"]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    out = tmp_path_factory.mktemp("sight")
    return out, sight_test(out, Recipe(), known=True, sets=["clutter", "pair"], methods=METHODS, limit=12)


def test_models_of_known_evidence_rank_the_explainers(found):
    out, result = found
    assert set(result.evaluations) == {"clutter", "pair"}
    for name, evaluation in result.evaluations.items():
        assert evaluation.accuracy.value == 1
        truth = {m: evaluation.score(m, TRUTH).interval.value for m in evaluation.methods}
        assert truth["grad_cam"] > 0.99 and truth["saliency"] > 0.99
        assert truth["random_map"] < 2 * evaluation.chance[TRUTH]
        assert set(result.predicts[name]) == set(evaluation.ranking) - {TRUTH, "energy_in_mask"}
    kept = json.loads((out / "sight.json").read_text())
    assert kept["pair"]["insertion_auc"]["value"] == result.predicts["pair"]["insertion_auc"].value
    text = (out / "sight.md").read_text()
    assert "| random_map (control) |" in text and "| insertion_auc |" in text and text == result.markdown()


def test_a_forecast_is_a_rank_correlation_over_methods():
    images, targets, masks = planted("clutter", 30)
    metrics = [TRUTH, "mask_auc", "insertion_auc", "deletion_auc", "gini"]
    found = evaluate(PLANTED["clutter"](), [(images, targets, masks)], METHODS, metrics, limit=30)

    def changed(metric, of):
        columns = {f"{metric}/{m}": [of(x) for x in found.per_image[f"{TRUTH}/{m}"]] for m in found.methods}
        return replace(found, per_image=found.per_image | columns)

    rng = np.random.default_rng(0)
    same = predicted(changed("insertion_auc", lambda x: 2 * x + 1), TRUTH)["insertion_auc"]
    assert (same.value, same.low, same.high) == (pytest.approx(1), pytest.approx(1), pytest.approx(1))
    # lower is better, so that the truth itself as deletion forecasts the reverse
    reverse = predicted(changed("deletion_auc", lambda x: x), TRUTH)["deletion_auc"]
    assert reverse.value == pytest.approx(-1) and reverse.high == pytest.approx(-1)
    noise = predicted(changed("insertion_auc", lambda x: rng.normal()), TRUTH)["insertion_auc"]
    assert noise.low < 0.5 and noise.high - noise.low > 0.5
    assert set(predicted(found, TRUTH)) == {"insertion_auc", "deletion_auc"}  # mask_auc knows masks, gini does not rank


@pytest.mark.usefixtures("few_validation_images")
def test_a_network_is_trained_once(tmp_path, capsys, monkeypatch):
    tiny = [
        "--data.train_size",
        "64",
        "--data.test_size",
        "20",
        "--data.size",
        "24",
        "--optim.epochs",
        "1",
        "--model.options.width",
        "0.1",
    ]
    arguments = [
        "sight",
        "--out",
        str(tmp_path / "s"),
        "--sets",
        "clutter-pair",
        "--limit",
        "4",
        "--budget",
        "2s",
        *tiny,
    ]
    cli.main(arguments)
    first = capsys.readouterr().out
    assert "| method | clutter-pair |" in first and "tables: " in first
    weights = tmp_path / "s" / "clutter-pair" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    monkeypatch.setattr(sys.modules["sightline.sight"], "evaluate", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(SystemExit):
        cli.main(arguments)
    assert weights.stat().st_mtime_ns == before


def test_bad_requests_say_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"expected sets out of clutter, clutter-twice, .*, got 'cluter'"):
        sight_test(tmp_path, Recipe(), sets=["cluter"])
    assert set(SETS) == {"clutter", "clutter-twice", "clutter-pair", "clutter-shortcut"}


# mosaics of photos


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Red, green and blue photos, and a network that names them whatever weights it is given."""
    rng = np.random.default_rng(0)
    for number in range(18):
        folder = tmp_path / "photos" / ("blue", "green", "red")[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 60, (40, 40, 3), np.uint8)
        pixels[..., 2 - number % 3] += 180
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SIGHTLINE_CACHE", str(tmp_path / "cache"))
    model = PooledModel(8 * torch.eye(3).flip(0))  # blue is class 0
    monkeypatch.setattr(models, "named_model", lambda name, weights, classes=None: (model, []))
    preprocess = Preprocess(size=(32, 32), mean=(0.5,) * 3, std=(0.5,) * 3)
    monkeypatch.setattr(models, "preprocess_of", lambda model: preprocess)
    monkeypatch.setattr(runs, "load_model", lambda folder: model)
    return tmp_path


GAME = ["sight", "--grid", "1x2", "--methods", "grad_cam,saliency", "--limit", "5"]


def test_a_network_by_name_plays_the_grid_pointing_game(place, capsys):
    cli.main([*GAME, "--model", "resnet18", "--weights", "w.safetensors", "--data", "photos", "--out", "own"])
    printed = capsys.readouterr().out
    text = (place / "own" / "sight.md").read_text()
    assert text in printed and "5 mosaics of 10 images" in text
    assert "| grad_cam | 1.00 [" in text and "| saliency | 0.50 [0.50, 0.50] | 1.00 [" in text
    assert "| center_map (control) | 0.50 [" in text and "| grad_cam of another class (control) | 0.00 [" in text
    assert "| chance | 0.500 | 0.500 |" in text
    page = (place / "own" / "report.html").read_text()
    assert "Where resnet18 looks on mosaics of photos" in page and "grid pointing game" in page
    assert json.loads((place / "own" / "evaluation.json").read_text())["unit"] == "mosaic"
    picture = np.asarray(Image.open(place / "own" / "mosaic.png"))
    assert picture.shape[0] > 100 and (picture == 255).all(-1).any()
    assert (place / "own" / "per_image.csv").read_text().count("\n") == 11
    assert not (place / "own" / ".evaluation").exists()


def test_a_run_plays_it_on_its_test_images(place, capsys):
    preprocess = Preprocess(size=(32, 32), mean=(0.5,) * 3, std=(0.5,) * 3)
    recipe = Recipe(data=Data(source="photos", size=32, test=0.5), model=Model(name="vgg_gap"))
    run = runs.Run(
        folder=place / "run",
        recipe=recipe,
        seed=0,
        classes=("blue", "green", "red"),
        preprocess=preprocess,
        info={},
        history=[],
        skipped=[],
    )
    runs.save(run, {})
    cli.main([*GAME, "--run", "run", "--out", "own"])
    assert "4 mosaics of 8 images" in capsys.readouterr().out
    cli.main([*GAME, "--run", "run", "--data", "photos", "--out", "whole"])
    assert "5 mosaics of 10 images" in capsys.readouterr().out
    assert "Where vgg_gap looks" in (place / "own" / "report.html").read_text()


@pytest.mark.parametrize("word", ["fast", "all"])
def test_a_word_stands_for_several_methods(place, capsys, word):
    given = ["--grid", "1x2", "--methods", word, "--limit", "1", "--model", "resnet18", "--weights", "w.safetensors"]
    cli.main(["sight", *given, "--data", "photos", "--out", "own"])
    text = (place / "own" / "sight.md").read_text()
    assert "| grad_cam |" in text and ("| rise |" in text) == (word == "all")


@pytest.mark.parametrize("source", ["photos", "photos/red"])
def test_images_are_prepared_as_explain_does(place, source):
    """With labels and without: the middle of each, and it is said."""
    preprocess = Preprocess(size=(16, 16), mean=(0.5,) * 3, std=(0.5,) * 3, crop=0.5, interpolation="bicubic")
    images = photos(Data(source=source), preprocess, models.named_model("", "")[0])
    expected = read_images([source], preprocess)
    assert (len(images.classes) == 3) == (source == "photos") and len(images) == len(expected) > 5
    found = [batch.images for batch in (images.batch(range(6)), expected.batch(range(6)))]
    assert torch.equal(*found) and found[0].shape == (6, 3, 16, 16)
    assert (
        images.notices[-1] == f"images are {preprocess}" and "the middle 16 x 16 px are cut out" in images.notices[-1]
    )


def test_labels_count_where_they_fit_the_model(place):
    preprocess = Preprocess(size=(32, 32), mean=(0.5,) * 3, std=(0.5,) * 3)
    model = models.named_model("", "")[0]
    labeled = photos(Data(source="photos"), preprocess, model)
    assert labeled.classes == ("blue", "green", "red") and len(labeled) == 18 and (labeled.labels >= 0).all()
    assert labeled.preprocess == preprocess
    other = photos(Data(source="photos"), preprocess, PooledModel(torch.ones(5, 3)))
    assert (other.labels == -1).all() and "has 3 classes and the model 5, so the class that the" in other.notices[-1]
    named = photos(Data(source="photos"), preprocess, PooledModel(torch.ones(4, 3)), ["red", "blue", "pink", "green"])
    assert sorted(set(named.labels.tolist())) == [0, 1, 3]
    loose = photos(Data(source="photos/red"), preprocess, model)
    assert len(loose) == 6 and (loose.labels == -1).all()
    with pytest.raises(FileNotFoundError):
        photos(Data(source="nowhere"), preprocess, model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--weights w --data photos", "got no --model NAME; add it"),
        ("--weights w --model resnet18", "got no --data PATH; add it"),
        ("--data photos", "--data: expected --run RUN, or --model NAME with --weights FILE"),
        ("--methods grad_cam", "--methods: expected --run RUN, or --model NAME"),
        ("--run run --weights w", "expected either --run RUN, or --model NAME"),
        ("--weights w --model resnet18 --data photos --known", "expected either --run RUN"),
        ("--weights w --model resnet18 --data photos --optim.lr 1", "--optim.lr: expected only data fields"),
        ("--weights w --model resnet18 --data photos --grid 2", "expected rows and columns of cells such as 2x2"),
        ("--weights w --model resnet18 --data photos --confidence 2", "expected a probability from 0 to 1"),
        ("--weights w --model resnet18 --data photos", "got 18 such images of 3 classes; give more images, or choose"),
        ("--run nowhere", "nowhere"),
    ],
)
def test_a_game_that_cannot_be_played_is_one_line(place, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        cli.main(["sight", *arguments.split(), "--out", "own"])
    line = capsys.readouterr().err
    assert stop.value.code == 2 and message in line and line.count("\n") == 1
