"""Methods x metrics on planted data whose answers are known."""

import csv
import json
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from tests.elsewhere import in_reverse
from torch import nn

from sightline import explainers
from sightline.data import ImageSet, Preprocess
from sightline.data.sets import Pixels
from sightline.evaluation import Standing, evaluate, planning, standing_of
from sightline.evaluation.evaluate import _similarity
from sightline.evaluation.findings import ANSWERS
from sightline.explainers import selection
from sightline.inference import forward_call
from sightline.metrics import METRICS, Perturbation, energy_in_mask
from sightline.metrics.uncertainty import mean_interval, wilson_interval
from sightline.testing import PlantedAttention, PooledModel


class Planted:
    """Store of images in which one bright red, green or blue square is the class and the evidence."""

    def __init__(self, n, side=16, square=4, seed=0):
        rng = np.random.default_rng(seed)
        self.labels = rng.integers(3, size=n)
        self.images = rng.integers(0, 40, size=(n, 3, side, side), dtype=np.uint8)
        self.masks = np.zeros((n, side, side), dtype=bool)
        for image, mask, label in zip(self.images, self.masks, self.labels, strict=True):
            y, x = rng.integers(0, side - square + 1, size=2)
            image[label, y : y + square, x : x + square] = 255
            mask[y : y + square, x : x + square] = True

    def read(self, rows):
        return Pixels(self.images[rows].copy(), self.masks[rows].copy(), None)


def planted(n=40, groups=None, labels=None, skipped=()):
    store = Planted(n)
    return ImageSet(
        name="planted",
        split="test",
        classes=("red", "green", "blue"),
        preprocess=Preprocess(size=(16, 16), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)),
        labels=store.labels.astype(np.int64) if labels is None else labels,
        names=[f"{i}.png" for i in range(n)],
        store=store,
        groups=groups,
        group_name=None if groups is None else "patient",
        skipped=skipped,
        has_masks=True,
    )


@pytest.fixture(scope="module")
def found():
    return evaluate(PooledModel(torch.eye(3)), planted(), limit=30, steps=8, examples=5)


def test_the_true_map_beats_every_control(found):
    assert found.accuracy.value == 1 and found.accuracy.high == 1 and found.n_images == 40
    assert found.methods == (
        "activation_map",
        "cam",
        "grad_cam",
        "random_map",
        "center_map",
        "edge_map",
        "contrast_map",
    )
    assert found.metrics == (
        "insertion_auc",
        "deletion_auc",
        "pointing_game",
        "energy_in_mask",
        "parameter_randomization",
    )
    assert found.chance == {"pointing_game": 1 / 16, "energy_in_mask": 1 / 16}
    cam = {metric: found.score("cam", metric).interval for metric in found.metrics}
    assert cam["pointing_game"].value == 1
    for control in ("random_map", "center_map"):
        assert cam["energy_in_mask"].low > found.score(control, "energy_in_mask").interval.high
        assert cam["insertion_auc"].low > found.score(control, "insertion_auc").interval.high
        assert cam["deletion_auc"].high < found.score(control, "deletion_auc").interval.low
    assert found.layers["cam"] == "features (3 x 16 x 16)" and found.layers["random_map"] == ""
    assert len(found.examples) == 5 and found.errors == ()


def test_scores_are_those_of_the_functions(found):
    data = planted()
    rows = [data.names.index(name) for name in found.per_image["name"]]
    batch = data.batch(rows)
    maps = batch.images.float()[torch.arange(30), batch.labels][:, None] / 255
    assert np.allclose(found.per_image["energy_in_mask/cam"], energy_in_mask(maps, batch.masks), atol=1e-6)
    assert found.score("cam", "energy_in_mask").interval.value == pytest.approx(
        np.mean(found.per_image["energy_in_mask/cam"])
    )
    assert len(set(rows)) == 30 and rows == sorted(rows)


def test_batch_size_changes_nothing(found):
    other = evaluate(PooledModel(torch.eye(3)), planted(), limit=30, steps=8, examples=5, batch_size=7)
    for a, b in zip(found.scores, other.scores, strict=True):
        assert a.interval.value == pytest.approx(b.interval.value, abs=1e-5)
    assert other.per_image["name"] == found.per_image["name"]


def test_the_summary_says_no_more_than_the_intervals(found):
    text = "\n".join(found.summary)
    assert "right class in 100.0 % of 40 images (95 % interval 9" in text and "more than by always naming" in text
    assert "best in insertion (how fast the class returns" in text and "beats every control" in text
    constant = evaluate(PooledModel(torch.zeros(3, 3)), planted(), ["grad_cam"], ["energy_in_mask"], limit=20)
    text = "\n".join(constant.summary)
    assert "not reliably more than by always" in text and "20 of 20 maps of Grad-CAM are flat: one value" in text
    assert constant.score("grad_cam", "energy_in_mask").undefined == 20
    assert np.isnan(constant.score("grad_cam", "energy_in_mask").interval.value)
    blind = evaluate(
        PooledModel(torch.eye(3)), planted(), ["activation_map"], ["energy_in_mask"], controls=["contrast_map"]
    )
    assert [finding.kind in ANSWERS for finding in blind.summary] == [True, True, True, False]


def test_mistakes_are_shown_most_confident_first():
    weight = torch.eye(3)
    weight[2] = -1
    found = evaluate(PooledModel(weight), planted(), ["cam"], ["energy_in_mask"], limit=4, examples=6)
    wrong = found.confusion.sum() - np.trace(found.confusion)
    assert wrong == (planted().labels == 2).sum() and found.accuracy.value == pytest.approx(1 - wrong / 40)
    assert len(found.errors) == 3 and len(found.examples) == 4
    assert [e.label for e in found.errors] == ["blue"] * 3 and all(e.prediction != "blue" for e in found.errors)
    assert [e.probability for e in found.errors] == sorted((e.probability for e in found.errors), reverse=True)
    assert found.majority == np.bincount(planted().labels).max() / 40


def test_learned_attention_is_scored_beside_the_others():
    found = evaluate(PlantedAttention(), planted(), limit=10, steps=4)
    assert found.methods[0] == "attention" and found.layers["attention"] == "pool (1 x 16 x 16)"
    two = torch.nn.Sequential()
    two.append(PlantedAttention())
    with pytest.raises(ValueError, match="did you mean 'attention'"):
        evaluate(two, planted(), ["atention"])


def test_groups_are_resampled_whole():
    groups = np.repeat([f"p{i}" for i in range(4)], 10)
    found = evaluate(PooledModel(torch.eye(3)), planted(groups=groups), ["cam"], ["energy_in_mask"], controls=())
    assert found.unit == "patient" and found.accuracy.n == 4
    assert found.score("cam", "energy_in_mask").interval.n == 4
    assert found.per_image["patient"] == groups.tolist()
    values = np.repeat([0.0, 0.0, 1.0, 1.0], 25)
    wide, narrow = mean_interval(values, np.repeat(list("abcd"), 25)), mean_interval(values)
    assert (wide.low, wide.high) == (0, 1) and 0.38 < narrow.low < narrow.high < 0.62
    uneven = mean_interval(np.array([1.0, 1.0, 1.0, 0.0]), np.array(["a", "a", "a", "b"]))
    assert uneven.value == 0.75 and uneven.n == 2


def test_intervals_have_their_textbook_values():
    # Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29
    for hits, n, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        interval = wilson_interval(hits, n)
        assert (interval.low, interval.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))
    values = np.random.default_rng(0).normal(3, 2, 400)
    interval = mean_interval(values)
    reach = 1.96 * values.std() / 20
    assert interval.low == pytest.approx(values.mean() - reach, abs=0.03)
    assert interval.high == pytest.approx(values.mean() + reach, abs=0.03)
    assert mean_interval(values) == interval and mean_interval(values, seed=1) != interval
    assert np.isnan(mean_interval(np.array([np.nan])).value)


def test_own_batches_of_tuples_and_dicts():
    data = planted()
    batch = data.batch(range(40))
    images = batch.images.float() / 255
    tuples = [(images[:25], batch.labels[:25], batch.masks[:25]), (images[25:], batch.labels[25:], batch.masks[25:])]
    one = evaluate(PooledModel(torch.eye(3)), tuples, ["cam"], limit=30, steps=4)
    own = evaluate(PooledModel(torch.eye(3)), data, ["cam"], limit=30, steps=4)
    for a, b in zip(one.scores, own.scores, strict=True):
        assert a.interval.value == pytest.approx(b.interval.value, abs=1e-5)
    dicts = [{"images": images[:8], "names": list("abcdefgh"), "groups": list("xxxxyyyy")}]
    found = evaluate(PooledModel(torch.eye(3)), dicts, ["cam"], steps=4)
    assert found.accuracy is None and found.confusion is None and found.unit == "group"
    assert found.metrics == ("insertion_auc", "deletion_auc", "parameter_randomization")
    assert found.examples[0].label is None and found.examples[0].name == "a"


def test_methods_may_be_explainers_and_partials(found):
    methods = [explainers.cam, partial(explainers.activation_map, norm="mean"), "center_map"]
    own = evaluate(PooledModel(torch.eye(3)), planted(), methods, ["energy_in_mask"], limit=30, controls=["edge_map"])
    assert own.methods == ("cam", "activation_map(norm=mean)", "center_map", "edge_map")
    assert own.controls == ("center_map", "edge_map") and set(own.examples[0].maps) == set(own.methods)
    for method in ("cam", "center_map"):
        assert own.score(method, "energy_in_mask") == found.score(method, "energy_in_mask")


def test_the_best_is_said_with_what_it_does_not_beat(found):
    standing = found.standings["energy_in_mask"]
    assert standing.best in ("cam", "grad_cam") and standing.unbeaten == ()
    values = {"a": np.full(20, 0.9), "b": np.full(20, 0.8), "control": np.full(20, 0.5), "none": np.full(20, np.nan)}
    assert standing_of(values, ["control"]) == Standing(best="a", tied=(), unbeaten=())
    assert standing_of(values, ["control"], higher_is_better=False) == Standing(
        best="b", tied=(), unbeaten=("control",)
    )
    assert standing_of(values, ["control"], chance=0.9) == Standing(best="a", tied=(), unbeaten=("chance",))
    assert standing_of(values, ["none"]).unbeaten == ()  # a control that was never measured is no rival
    hits = {"a": np.ones(14), "b": np.zeros(14)}
    assert standing_of(hits, ["b"], chance=0.9).unbeaten == ("chance",)  # 14 hits of 14 happen in 23 % of cases
    assert standing_of(hits, ["b"], chance=0.3).unbeaten == ()
    easy = np.r_[np.zeros(10), np.ones(90)] + np.linspace(0, 0.01, 100)  # a is not defined for the ten hard images
    means = {"a": np.where(np.arange(100) < 10, np.nan, easy), "b": easy + 0.05}
    assert np.nanmean(means["a"]) > means["b"].mean()
    assert standing_of(means) == Standing(best="b", tied=(), unbeaten=())
    assert standing_of({"none": values["none"]}) is None and standing_of(values, list(values)) is None
    values["a"][:3] = np.nan  # undefined for more than a tenth: not compared
    assert standing_of(values, ["control"]).best == "b"


def test_a_model_of_another_type_gets_images_of_its_type(found):
    half = evaluate(PooledModel(torch.eye(3)).bfloat16(), planted(), ["cam"], ["energy_in_mask"], limit=30)
    expected = found.score("cam", "energy_in_mask").interval.value
    assert half.score("cam", "energy_in_mask").interval.value == pytest.approx(expected, abs=0.01)


def test_images_and_classes_without_answer_are_counted():
    labels = planted(20).labels.copy()
    labels[labels == 2] = -1
    found = evaluate(PooledModel(torch.eye(3)), planted(20, labels=labels), ["cam"], ["energy_in_mask"])
    text = "\n".join(found.summary)
    assert f"of {(labels >= 0).sum()} images (95 %" in text
    assert f"{(labels < 0).sum()} of 20 images have no label and do not count toward the accuracy." in text
    assert "No image shows blue, so the accuracy there is unknown." in text


def test_files_hold_what_was_found(found, tmp_path):
    read = json.loads(found.to_json(tmp_path / "sub" / "evaluation.json").read_text())
    assert read["scores"][0]["method"] == "activation_map" and read["accuracy"]["value"] == 1
    assert read["confusion"] == found.confusion.tolist()
    rows = list(csv.DictReader(found.to_csv(tmp_path / "per_image.csv").read_text().splitlines()))
    assert len(rows) == 30 and float(rows[3]["energy_in_mask/cam"]) == found.per_image["energy_in_mask/cam"][3]


def test_a_single_logit_counts_as_two_classes():
    model, images = PooledModel(torch.tensor([[1.0, -1.0, 0.0]])), torch.rand(6, 3, 4, 4)
    labels = (model(images)[:, 0] > 0).long()
    found = evaluate(model, [(images, labels)], ["grad_cam"], ["insertion_auc"], controls=[])
    assert found.classes == ("0", "1") and found.accuracy.value == 1
    certainty = torch.tensor(found.per_image["probability"])
    assert torch.allclose(certainty, model(images)[:, 0].abs().sigmoid())
    two = nn.Sequential(model, Both())
    expected = evaluate(two, [(images, labels)], ["grad_cam"], ["insertion_auc"], controls=[])
    assert found.score("grad_cam", "insertion_auc") == expected.score("grad_cam", "insertion_auc")


@explainers.Explainer
def of_my_own(activations, targets):
    """As a user would write one."""
    return activations.amax(1, keepdim=True).expand(-1, targets.shape[1], -1, -1)


def test_an_explainer_of_ones_own_is_scored_like_any():
    found = evaluate(PooledModel(torch.eye(3)), planted(8), [of_my_own, "cam"], ["energy_in_mask"])
    assert found.methods[:2] == ("of_my_own", "cam")
    assert found.verdicts["of_my_own"] == {}  # that it is the same for every class is its nature


class Both(nn.Module):
    """Two logits that say what one said."""

    def forward(self, logits):
        return torch.cat([-logits / 2, logits / 2], 1)


def test_bad_requests_say_what_to_do(unchecked):
    model, data = PooledModel(torch.eye(3)), planted(4)
    with pytest.raises(ValueError, match="got 'deletion'; did you mean 'deletion_auc'"):
        evaluate(model, data, metrics=["deletion"])
    with pytest.raises(ValueError, match="expected the name of an explainer, got 'noise'"):
        evaluate(model, data, controls=["noise"])
    with pytest.raises(ValueError, match="expected controls that never look at the model, got 'cam'"):
        evaluate(model, data, controls=["cam"])
    with pytest.raises(ValueError, match="expected masks or boxes for energy_in_mask"):
        evaluate(model, [(torch.rand(2, 3, 4, 4), torch.zeros(2, dtype=torch.long))], metrics=["energy_in_mask"])
    with pytest.raises(ValueError, match="expected at least one image"):
        evaluate(model, [])
    with pytest.raises(ValueError, match="expected data that can be read twice"):
        evaluate(model, iter([(torch.rand(2, 3, 4, 4),)]))
    with pytest.raises(ValueError, match="expected a model with 3 classes like the data, got 2"):
        evaluate(PooledModel(torch.ones(2, 3)), data)
    with pytest.raises(ValueError, match=r"expected batches \(images, labels"):
        evaluate(model, [3])
    with pytest.raises(FileNotFoundError, match="no file or folder picture"):
        evaluate(model, ["picture"])


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((torch.rand(2, 3, 4, 4), torch.tensor([0, 3])), r"expected labels in 0..2, or -1 where unknown, got 3"),
        ((torch.rand(2, 3, 4, 4), torch.tensor([0.0, 1.0])), "expected 2 class numbers as labels .* got torch.float32"),
        ((torch.rand(2, 3, 4, 4), torch.eye(2).long()), r"starts with image 2, got torch.int64 of shape \(2, 2\)"),
        ((torch.rand(2, 3, 4, 4), torch.tensor([0])), r"expected 2 class numbers as labels .* of shape \(1,\)"),
        (
            (torch.rand(2, 3, 4, 4), torch.tensor([0, 1]), torch.ones(2, 4, 4)),
            r"expected masks of shape \(2, 1, 4, 4\)",
        ),
        (
            (torch.rand(2, 3, 4, 4), torch.tensor([0, 1]), torch.full((2, 1, 4, 4), 2, dtype=torch.uint8)),
            r"expected masks that are bool or 0 and 1 in the batch that starts with image 2, got values from 2 to 2",
        ),
        ((torch.zeros(2, 3, 4, 4, dtype=torch.int64), torch.tensor([0, 1])), "expected float images of shape"),
        ({"images": torch.rand(2, 3, 4, 4), "names": ["a"]}, "expected 2 names in the batch .*, got 1"),
    ],
)
def test_bad_batches_say_what_to_do(batch, message, unchecked):
    good = (torch.rand(2, 3, 4, 4), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=message):
        evaluate(PooledModel(torch.eye(3)), [good, batch], ["cam"], ["deletion_auc"])


def test_mean_maps_of_signed_methods_keep_their_zero():
    images = torch.zeros(1, 3, 2, 2)
    images[0, 0, 0], images[0, 1, 0, 0] = torch.tensor([4.0, 2.0]), 6.0  # red minus green is -2 and 2, else 0
    model = PooledModel(torch.tensor([[1.0, -1.0, 0.0], [-1.0, 0.0, 0.0], [-2.0, 0.0, 0.0]]))
    found = evaluate(model, [(images, torch.tensor([0]))], methods=["cam", "grad_cam"], metrics=[], steps=1)
    assert found.signed == ("cam",)
    (cam,), (grad_cam,) = (list(found.mean_maps[name].values()) for name in ("cam", "grad_cam"))
    assert (cam[0, 0], cam[0, -1], cam[-1, 0]) == (-1, 1, 0) and cam.min() == -1
    assert (grad_cam[0, 0], grad_cam[0, -1], grad_cam[-1, 0]) == (0, 1, 0)


class Counting(PooledModel):
    """Counts the images it sees."""

    seen = 0

    def forward(self, images):
        type(self).seen += len(images)
        return super().forward(images)


def test_an_interrupted_evaluation_goes_on_where_it_stopped(tmp_path):
    asked = {"methods": ["cam"], "metrics": ["insertion_auc", "energy_in_mask"], "limit": 20, "batch_size": 8}
    asked |= {"steps": 4, "examples": 6}
    whole = evaluate(PooledModel(torch.eye(3)), planted(), **asked)

    def stop(what, done, total):
        if what == "explaining and scoring" and done >= 16:
            raise KeyboardInterrupt

    model = Counting(torch.eye(3))
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, planted(), partial_results=tmp_path / "parts", progress=stop, **asked)
    kept = sorted((tmp_path / "parts").iterdir())
    assert len(kept) == 2
    kept[1].write_bytes(kept[1].read_bytes()[:100])  # half-written: made again
    Counting.seen = 0
    found = evaluate(model, planted(), partial_results=tmp_path / "parts", **asked)
    resumed, Counting.seen = Counting.seen, 0
    assert not (tmp_path / "parts").exists()
    evaluate(model, planted(), **asked)
    assert resumed < Counting.seen
    assert_same(found, whole)
    assert found.mean_maps["cam"].keys() == whole.mean_maps["cam"].keys()


def assert_same(found, whole):
    assert repr(found.scores) == repr(whole.scores)  # NaN differs from NaN
    assert repr(found.per_image) == repr(whole.per_image) and found.summary == whole.summary
    assert found.verdicts == whole.verdicts and found.notices == whole.notices
    for one, other in zip((*found.examples, *found.worst["cam"]), (*whole.examples, *whole.worst["cam"]), strict=True):
        assert one.name == other.name and np.array_equal(one.maps["cam"], other.maps["cam"])


def test_maps_made_elsewhere_are_the_same(tmp_path):
    asked = {"methods": ["cam"], "metrics": ["insertion_auc", "energy_in_mask", "parameter_randomization"]}
    asked |= {"controls": ["random_map", "other_class"], "limit": 20, "batch_size": 8, "steps": 4, "examples": 6}
    model = PooledModel(torch.eye(3)).train()
    whole = evaluate(model, planted(), **asked)
    assert_same(evaluate(model, planted(), spread=in_reverse, **asked), whole)

    given = []

    def dies(function, pairs, *common):
        for number, argument in pairs:
            given.append(number)
            yield number, "killed" if number == 2 else function(argument, *common)

    parts = tmp_path / "parts"
    with pytest.raises(
        RuntimeError, match="processes that scored maps died: killed; the same command goes on with what is"
    ):
        evaluate(model, planted(), spread=dies, partial_results=parts, **asked)
    assert given == [0, 1, 2] and len([*parts.iterdir()]) == 2

    def lives(function, pairs, *common):
        for number, argument in pairs:
            given.append(number)
            yield number, function(argument, *common)

    assert_same(evaluate(model, planted(), spread=lives, partial_results=parts, **asked), whole)
    assert given == [0, 1, 2, 2] and not parts.exists() and model.training


def test_another_question_does_not_take_the_kept_answers(tmp_path):
    parts = tmp_path / "parts"

    def stop(what, done, total):
        if what == "explaining and scoring":
            raise KeyboardInterrupt

    changes = ({"steps": 8}, {"seed": 1}, {"fill": "mean"}, {"methods": ["activation_map"]}, {"examples": 3})
    for change in (*changes, {"controls": ["other_class"]}):
        with pytest.raises(KeyboardInterrupt):
            evaluate(
                PooledModel(torch.eye(3)),
                planted(),
                **{"methods": ["cam"], "limit": 8, "steps": 4} | change,
                partial_results=parts,
                progress=stop,
            )
    with pytest.raises(KeyboardInterrupt):
        evaluate(PooledModel(2 * torch.eye(3)), planted(), ["cam"], limit=8, partial_results=parts, progress=stop)
    assert len(list(parts.iterdir())) == 7


def test_pairs_of_methods_are_compared_and_corrected(found):
    pairs = [pair for pair in found.comparisons if pair.metric == "energy_in_mask"]
    names = found.methods
    undefined = {m for m in found.methods if found.score(m, "energy_in_mask").undefined > 3}
    left = len(names) - len(undefined)
    assert len(pairs) == left * (left - 1) / 2
    for pair in pairs:
        assert pair.p <= pair.adjusted <= 1 and pair.difference.low <= pair.difference.value <= pair.difference.high
    cam = next(p for p in pairs if (p.method, p.other) == ("cam", "random_map"))
    assert cam.adjusted < 0.05 and cam.difference.low > 0
    of = {m: found.score(m, "energy_in_mask").interval.value for m in ("cam", "random_map")}
    assert cam.difference.value == pytest.approx(of["cam"] - of["random_map"], abs=1e-6)


def test_three_images_prove_nothing():
    found = evaluate(PooledModel(torch.eye(3)), planted(), ["cam"], ["energy_in_mask"], limit=3)
    assert found.standings["energy_in_mask"].unbeaten == (*found.controls, "chance")
    assert "CAM is best in energy in mask (the share of the map that lies in the mask) with" in "\n".join(found.summary)
    assert "does not reliably beat any control or chance" in "\n".join(found.summary)
    assert "3 images are too few to show" in "\n".join(found.summary)
    two = evaluate(PooledModel(torch.eye(3)), planted(), ["cam"], ["energy_in_mask"], controls=["random_map"], limit=6)
    assert two.standings["energy_in_mask"].unbeaten == () and "too few" not in "\n".join(two.summary)


def test_a_control_that_beats_the_best_is_said_to():
    @explainers.Explainer
    def least(activations):
        return -activations.sum(1, keepdim=True)

    found = evaluate(PooledModel(torch.eye(3)), planted(), [least], ["mask_auc"], controls=["random_map", "center_map"])
    assert found.standings["mask_auc"].unbeaten == ("random_map", "center_map", "chance")
    assert (
        "does not reliably beat any control or chance; random map and center map reliably beat it." in found.summary[3]
    )


def test_methods_of_which_the_same_is_said_share_a_sentence():
    @explainers.Explainer
    def nothing(activations):
        return activations[:, :1] * 0

    @explainers.Explainer
    def empty(activations):
        return activations[:, 1:2] * 0

    found = evaluate(PooledModel(torch.eye(3)), planted(), ["cam", nothing, empty], ["deletion_auc"], limit=20, steps=4)
    assert found.standings["deletion_auc"].unbeaten == ()
    text = "None of nothing and empty is shown to be better than any control in deletion (how fast"
    assert any(finding.startswith(text) for finding in found.summary)
    assert (
        "20 of 20 maps of each of nothing and empty are flat: one value everywhere; do not read them." in found.summary
    )


def test_the_best_and_its_equals_stand_in_one_sentence():
    found = evaluate(PooledModel(torch.eye(3)), planted(), ["cam", "grad_cam"], ["energy_in_mask"])
    assert found.standings["energy_in_mask"].tied == ("grad_cam",)
    assert found.summary[3].endswith("; it beats every control but cannot be told apart from Grad-CAM.")
    assert not any("Not told apart" in sentence for sentence in found.summary)


def test_curves_are_those_behind_the_areas(found):
    for kind in ("deletion", "insertion"):
        for method in found.methods:
            curve = found.curves[kind][method]
            area = np.trapezoid(curve.mean, curve.shares)
            assert area == pytest.approx(found.score(method, f"{kind}_auc").interval.value, abs=1e-6)
            assert (curve.low <= curve.mean).all() and (curve.mean <= curve.high).all()
    assert found.curves["deletion"]["cam"].mean[0] == pytest.approx(found.curves["insertion"]["cam"].mean[-1])


def test_the_map_of_the_runner_up_is_a_control():
    controls = ["random_map", "other_class"]
    found = evaluate(
        PooledModel(torch.eye(3)), planted(), ["cam", "activation_map"], controls=controls, limit=20, steps=4
    )
    assert found.methods == ("cam", "activation_map", "random_map", "cam of another class")
    assert found.controls == ("random_map", "cam of another class")
    own, other = (found.score(m, "energy_in_mask").interval for m in ("cam", "cam of another class"))
    assert own.low > 0.4 > 0.1 > other.high
    assert "cam of another class" not in found.examples[0].maps


def test_agreement_of_metrics_methods_and_images(found):
    table = found.metric_agreement
    assert table.shape == (4, 4) and np.allclose(np.diag(table), 1) and np.allclose(table, table.T)
    alike = found.method_agreement
    assert alike.shape == (7, 7) and np.allclose(np.diag(alike), 1)
    i = found.methods.index
    assert alike[i("cam"), i("grad_cam")] > 0.99  # ReLU ties what was negative: nothing here is
    assert abs(alike[i("random_map"), i("center_map")]) < 0.2
    assert set(found.reliability) == set(found.standings)
    assert found.reliability["energy_in_mask"] > 0.5


def test_a_map_that_is_broken_is_like_no_other():
    maps = {"a": torch.rand(3, 1, 8, 8), "b": torch.rand(3, 1, 8, 8)}
    maps["b"][:, :, 2, 2] = torch.nan
    sums, counts = _similarity(maps)
    assert counts.tolist() == [[3, 0], [0, 0]] and sums[0, 1] == sums[1, 0] == 0


def test_groups_of_some_batches_only_are_refused():
    images = torch.rand(4, 3, 4, 4)
    data = [{"images": images, "groups": ["a"] * 4}, {"images": images}]
    with pytest.raises(ValueError, match="expected groups of all 8 images or of none, got 4; name every group"):
        evaluate(PooledModel(torch.eye(3)), data, ["cam"], ["gini"])


@pytest.mark.parametrize("change", ["masks", "layer"])
def test_what_is_kept_belongs_to_these_masks_and_this_layer(tmp_path, change):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    model.extend([nn.Flatten(), nn.Linear(4, 3)])
    batch = planted(8).batch(range(8))
    images = batch.images.float() / 255

    def run(masks, progress=None):
        data = [{"images": images[i : i + 4], "masks": masks[i : i + 4]} for i in (0, 4)]
        asked = {"controls": ["random_map"], "batch_size": 4, "partial_results": tmp_path, "progress": progress}
        return evaluate(model, data, ["grad_cam"], ["energy_in_mask"], **asked).per_image["energy_in_mask/grad_cam"]

    def stop(what, done, total):
        if what == "explaining and scoring":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(batch.masks, stop)
    other = batch.masks
    if change == "masks":
        other = ~batch.masks
    else:
        model.default_layer = "0"
    found = run(other)
    for part in tmp_path.iterdir():
        part.unlink()
    assert np.allclose(found, run(other), equal_nan=True)


def test_worst_images_are_the_worst(found):
    values = dict(zip(found.per_image["name"], found.per_image["insertion_auc/cam"], strict=True))
    assert [example.name for example in found.worst["cam"]] == sorted(values, key=values.get)[:3]
    assert set(found.worst) == {"activation_map", "cam", "grad_cam"}
    assert all(set(example.maps) == {"cam"} for example in found.worst["cam"])


def test_worst_of_equal_images_are_the_first_in_every_batch():
    for batch_size in (5, 64):
        found = evaluate(PooledModel(torch.eye(3)), planted(20), ["cam"], ["pointing_game"], batch_size=batch_size)
        assert [example.name for example in found.worst["cam"]] == found.per_image["name"][:3]


def test_a_metric_of_several_columns_may_come_first():
    found = evaluate(PooledModel(torch.eye(3)), planted(12), ["cam"], ["max_box_accuracy"], batch_size=5)
    assert found.worst == {} and found.score("cam", "max_box_accuracy").interval.value > 0.5


def test_maps_that_ignore_the_weights_are_named():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3))
    found = evaluate(model, planted(), ["activation_map"], ["parameter_randomization"], limit=20, controls=["edge_map"])
    score = found.score("activation_map", "parameter_randomization").interval
    assert ("Do not use activation map" in "\n".join(found.summary)) == (score.low > 0.5)
    assert found.failed == {"parameter_randomization": ("activation_map",) if score.low > 0.5 else ()}
    assert found.score("edge_map", "parameter_randomization").interval.value == pytest.approx(1)


@pytest.mark.parametrize("metric", ["parameter_randomization", "random_logit", "sparsity", "gini", "entropy"])
def test_tests_and_descriptions_rank_nothing(metric):
    model = PooledModel(torch.eye(3))
    found = evaluate(model, planted(), ["cam", "activation_map"], [metric, "energy_in_mask"], limit=20)
    assert found.metrics == (metric, "energy_in_mask") and found.ranking == ("energy_in_mask",)
    assert set(found.standings) == set(found.reliability) == {"energy_in_mask"}
    assert {pair.metric for pair in found.comparisons} == {"energy_in_mask"} and found.metric_agreement is None
    assert sum(finding.kind in ("best", "not better than a control") for finding in found.summary) == 1
    values = dict(zip(found.per_image["name"], found.per_image["energy_in_mask/cam"], strict=True))
    assert [example.name for example in found.worst["cam"]] == sorted(values, key=values.get)[:3]


def test_maps_that_are_alike_for_all_classes_are_named():
    model = PooledModel(torch.eye(3) + 2)  # the classes share most of their evidence
    found = evaluate(model, planted(), ["cam", "activation_map"], ["random_logit"], limit=20)
    said = [sentence for sentence in found.summary if sentence.startswith("Do not ask CAM (")]
    assert found.score("cam", "random_logit").interval.low > 0.5
    assert len(said) == 1 and "activation map" not in said[0]  # which nobody asks for a class
    assert found.failed == {"random_logit": ("cam",)}
    two = PooledModel(torch.tensor([[1.0, 0, 0], [-1, 0, 0]]))  # the map of one class rightly is that of the other
    batch = planted().batch(range(20))
    data = [(batch.images.float() / 255, torch.zeros(20, dtype=torch.long))]
    found = evaluate(two, data, ["input_x_gradient"], ["random_logit"])
    assert found.score("input_x_gradient", "random_logit").interval.value > 0.99
    assert not any("Do not ask" in sentence for sentence in found.summary) and found.failed == {"random_logit": ()}


def test_everything_that_the_model_and_the_data_allow():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model.append(nn.Linear(4, 3))
    found = evaluate(model, planted(6), "all", "all", limit=2, steps=4, examples=1, controls=["random_map"])
    assert {"grad_cam", "rise", "lrp", "occlusion", "guided_backprop"} < set(found.methods)
    assert "attention" not in found.methods and "attention_rollout" not in found.methods
    assert set(found.metrics) == set(METRICS)
    with pytest.raises(ValueError, match="expected a list of methods or 'all' or 'fast', got 'cam'"):
        evaluate(model, planted(6), "cam")


def task_of(model, methods, metrics):
    return planning.Task(
        model=model,
        methods={name: name for name in methods},
        metrics=metrics,
        perturbation=Perturbation(),
        with_runner_up=False,
    )


def test_a_budget_gives_up_images_first_and_the_dearest_then(monkeypatch, tmp_path):
    model = PooledModel(torch.eye(3))
    costs = {"cam": 0.001, "grad_cam": 0.001, "rise": 10.0, "random_map": 0.0}
    monkeypatch.setattr(planning, "seconds_per_image", lambda model, images, targets, method, **options: costs[method])
    monkeypatch.setattr(planning, "_forward_seconds", lambda model, images, call, memory: 0.001)
    images, targets = torch.rand(2, 3, 4, 4), torch.tensor([0, 1])

    def planned(budget, metrics=("energy_in_mask", "deletion_auc", "max_sensitivity"), limit=500):
        return planning.plan(task_of(model, costs, metrics), images, targets, limit, budget)

    everything = planned(1e6)
    assert everything.limit == 500 and everything.left_out == {} and len(everything.methods) == 4
    fewer = planned(11 * 10.5 * 60)
    assert 50 < fewer.limit < 500 and fewer.left_out == {} and fewer.steps == 32
    assert fewer.seconds <= 11 * 10.5 * 60
    cheap = planned(30.0)
    assert cheap.methods == ("cam", "grad_cam", "random_map") and list(cheap.left_out) == ["rise"]
    assert "of 30 s for everything" in cheap.left_out["rise"]
    cheap.save(tmp_path / "plan.json")
    assert planning.Plan.load(tmp_path / "plan.json") == cheap
    tight = planned(0.2)
    assert set(tight.left_out) >= {"rise", "deletion_auc"} and len(tight.metrics) >= 1
    assert planned(1e-9).limit == 1


def test_metrics_that_share_images_are_given_up_together(monkeypatch):
    """ROAD three times costs as much as once: a single one saves nothing, and methods would go instead."""
    model = PooledModel(torch.eye(3))
    for name, seconds in {"seconds_per_image": 0.001, "_forward_seconds": 0.0001, "_painted_seconds": 0.1}.items():
        monkeypatch.setattr(planning, name, lambda *given, seconds=seconds, **options: seconds)
    metrics = ("energy_in_mask", "road", "road_morf", "road_lerf")
    methods = ("cam", "grad_cam", "saliency", "random_map")
    images, targets = torch.rand(2, 3, 4, 4), torch.tensor([0, 1])
    planned = planning.plan(task_of(model, methods, metrics), images, targets, 100, 5.0)
    assert planned.methods == methods and planned.metrics == ("energy_in_mask",)
    assert planned.left_out["road"] == "72 s together with road_lerf for 20 images, of 5 s for everything"


def test_a_budget_lowers_images_then_steps_then_images_again_before_it_leaves_anything_out(monkeypatch):
    """A forward takes 1 s, a map nothing: an image costs 2 + 2 n forwards a method with n = steps - 1 points between.

    256 pixels in 32 steps: 2 + 3 x 62 = 188 s; in 16: 92 s; in 8: 44 s.
    """
    monkeypatch.setattr(planning, "seconds_per_image", lambda *given, **options: 0.0)
    monkeypatch.setattr(planning, "_forward_seconds", lambda *given: 1.0)
    images, targets = torch.rand(2, 3, 16, 16), torch.tensor([0, 1])
    metrics = ("energy_in_mask", "insertion_auc", "deletion_auc")
    task = task_of(PooledModel(torch.eye(3)), ("cam", "grad_cam", "random_map"), metrics)

    def planned(budget, limit=100):
        plan = planning.plan(task, images, targets, limit, float(budget))
        return plan.limit, plan.steps, plan.seconds, [*plan.left_out]

    assert planned(math.inf) == (100, 32, 18_800, [])
    assert planned(9_400) == (50, 32, 9_400, [])
    assert planned(9_399) == (100, 16, 9_200, [])
    assert planned(4_600) == (50, 16, 4_600, [])
    assert planned(4_599) == (100, 8, 4_400, [])
    assert planned(2_199) == (49, 8, 49 * 44, [])
    assert planned(880) == (20, 8, 880, [])
    assert planned(879) == (100, 32, 0, ["insertion_auc", "deletion_auc"])
    assert planned(440, limit=10) == (10, 8, 440, [])
    without = replace(task, metrics=("energy_in_mask", "increase_in_confidence"))
    assert planning.plan(without, images, targets, 100, 100.0).steps == 32  # no curve to shorten


class Clock:
    """Stands in for the module `time`."""

    now = 0.0

    def perf_counter(self):
        return self.now


def test_a_method_is_timed_on_the_batch_that_follows_the_first(monkeypatch):
    clock, done = Clock(), []
    for module in (selection, planning):
        monkeypatch.setattr(module, "time", clock)

    def explain(model, images, targets, methods, progress, **options):
        done.append([])
        for number in (3, 5, 10):
            clock.now += {3: 9.0, 5: 0.5, 10: 9.0}[number] / (1000 if options["quick"] else 1)
            done[-1].append(number)
            progress("", number, 10)

    monkeypatch.setattr(selection, "explain", explain)
    images = torch.zeros(4, 3, 2, 2)
    assert selection.seconds_per_image(PooledModel(torch.eye(3)), images, None, "rise", quick=False) == 0.5 * 10 / 2 / 4
    assert done == [[3, 5]]  # one timing is enough where it takes long
    done.clear()
    quick = selection.seconds_per_image(PooledModel(torch.eye(3)), images, None, "rise", quick=True)
    assert quick == pytest.approx(0.0005 * 10 / 2 / 4) and done == [[3, 5]] * 2
    monkeypatch.setattr(selection, "explain", lambda *given, **options: setattr(clock, "now", clock.now + 2.0))
    assert selection.seconds_per_image(PooledModel(torch.eye(3)), images, None, "cam") == 0.5
    waits = iter([5.0, 2.0])  # the first forward is slower

    def forward(model, images, **options):
        clock.now += next(waits)
        return images

    monkeypatch.setattr(planning, "forward", forward)
    assert planning._forward_seconds(PooledModel(torch.eye(3)), images, forward_call(images, None), None) == 0.5


def test_the_map_of_another_class_is_made_once_and_never_again(monkeypatch):
    monkeypatch.setattr(planning, "seconds_per_image", lambda *given, **options: 1.0)
    monkeypatch.setattr(planning, "_forward_seconds", lambda *given: 0.0)
    images, targets = torch.rand(2, 3, 4, 4), torch.tensor([0, 1])
    task = replace(task_of(PooledModel(torch.eye(3)), ("cam",), ("max_sensitivity",)), with_runner_up=True)
    assert task.names == ("cam", "cam of another class")
    again = METRICS["max_sensitivity"].explanations
    assert again > 1 and planning.plan(task, images, targets, 7).seconds == 7 * (1 + again + 1)


def test_what_to_expect_is_told_before_the_maps_if_it_is_long(monkeypatch):
    told, model = [], PooledModel(torch.eye(3))
    monkeypatch.setattr(planning, "seconds_per_image", lambda *given, **options: 0.1)
    monkeypatch.setattr(planning, "_forward_seconds", lambda *given: 0.0)
    asked = {"metrics": ["energy_in_mask"], "controls": ["center_map"], "limit": 30, "tell": told.append}
    evaluate(model, planted(), ["cam"], **asked)
    assert told == []
    monkeypatch.setattr(planning, "seconds_per_image", lambda *given, **options: 3.0)
    evaluate(model, planted(), ["cam"], **asked)
    assert told == ["expected time: 3 min for 30 images (maps: 2, metrics: 1)"]
    evaluate(model, planted(), ["cam", "grad_cam"], **asked)
    assert told[1] == "expected time: 4 min 30 s for 30 images (maps: 3, metrics: 1), of which cam: 1 min 30 s"


def test_fewer_steps_are_a_notice(monkeypatch):
    monkeypatch.setattr(planning, "seconds_per_image", lambda *given, **options: 0.0)
    monkeypatch.setattr(planning, "_forward_seconds", lambda *given: 1.0)
    result = evaluate(PooledModel(torch.eye(3)), planted(), ["cam"], ["deletion_auc"], limit=20, budget=1000.0)
    assert result.notices[-1] == "8 steps of deletion and insertion instead of 32, to keep to the budget"
    assert result.curves["deletion"]["cam"] and len(result.per_image["deletion_auc/cam"]) == 20


def test_fast_takes_the_methods_of_few_passes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    result = evaluate(model, planted(6), "fast", ["sparsity"], controls=["center_map"], limit=2)
    assert {"cam", "grad_cam", "saliency"} <= set(result.methods)
    assert not {"rise", "score_cam", "integrated_gradients"} & {*result.methods, *result.unsuited}


def test_a_budget_is_kept_and_said():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    found = evaluate(model, planted(), ["cam", "rise"], ["energy_in_mask"], controls=["random_map"], budget=0.05)
    assert "rise" in found.left_out and "rise" not in found.methods
    assert "Left out for lack of time: RISE" in "\n".join(found.summary)
