"""The sight test: explainers ranked by known evidence, metrics by how well they forecast that ranking."""

import json
from dataclasses import replace

import numpy as np
import pytest

from sightline import cli
from sightline.evaluation import evaluate
from sightline.recipe import Recipe
from sightline.sight import SETS, TRUTH, predicted, sight_test
from sightline.testing import PLANTED, planted

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
    assert set(predicted(found, TRUTH)) == {"insertion_auc", "deletion_auc"}  # mask_auc knows masks, gini ranks nothing


@pytest.mark.usefixtures("few_validation_images")
def test_a_network_is_trained_once(tmp_path, capsys):
    tiny = ["--data.train_size", "64", "--data.test_size", "20", "--optim.epochs", "1", "--model.options.width", "0.1"]
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
    cli.main(arguments)
    assert weights.stat().st_mtime_ns == before


def test_bad_requests_say_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"expected sets out of clutter, clutter-twice, .*, got 'cluter'"):
        sight_test(tmp_path, Recipe(), sets=["cluter"])
    assert set(SETS) == {"clutter", "clutter-twice", "clutter-pair", "clutter-shortcut"}
