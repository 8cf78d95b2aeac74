"""Scores of the classifier against torchmetrics, scikit-learn and plain loops."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from tests.reference import statistics as reference
from tests.same import assert_same_state, state_of
from torch import nn
from torchmetrics.functional import calibration_error
from torchmetrics.functional.classification import multiclass_f1_score, multiclass_precision, multiclass_recall

from sightline.metrics.classification import (
    accuracy,
    expected_calibration_error,
    linear_probe,
    macro_f1,
    quality,
)
from sightline.metrics.uncertainty import mean_interval, wilson_interval
from sightline.testing import ConstantModel, PooledModel


def answers(seed=0, n=200, classes=4, sharpness=1.0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, classes)) * 1.5
    odds = np.exp(logits)
    labels = np.array([rng.choice(classes, p=row / row.sum()) for row in odds])
    odds = np.exp(sharpness * logits)
    return odds / odds.sum(1, keepdims=True), labels


@pytest.mark.parametrize(("n", "classes"), [(200, 4), (5, 7), (1, 2)])
def test_scores_equal_torchmetrics_and_loops(n, classes):
    for seed in range(3):
        probabilities, labels = answers(seed, n, classes)
        scores, truth = torch.from_numpy(probabilities), torch.from_numpy(labels)
        predictions = probabilities.argmax(1)
        slow = reference.macro_f1(predictions.tolist(), labels.tolist(), classes)
        theirs = multiclass_f1_score(scores, truth, classes, average="macro").item()
        assert macro_f1(probabilities, labels) == pytest.approx(slow, abs=1e-12) == pytest.approx(theirs, abs=1e-6)
        correct = predictions == labels
        slow = reference.calibration_error(probabilities.max(1).tolist(), correct.tolist())
        theirs = calibration_error(scores, truth, task="multiclass", num_classes=classes, n_bins=15).item()
        found = expected_calibration_error(probabilities, labels)
        assert found == pytest.approx(slow, abs=1e-12) == pytest.approx(theirs, abs=1e-6)
        assert accuracy(probabilities, labels) == correct.mean()


def test_each_class_equals_torchmetrics():
    probabilities, labels = answers(n=60)
    found = quality(probabilities, labels)
    scores, truth = torch.from_numpy(probabilities), torch.from_numpy(labels)
    for read, theirs in [
        (lambda one: one.precision, multiclass_precision),
        (lambda one: one.recall.value, multiclass_recall),
        (lambda one: one.f1, multiclass_f1_score),
    ]:
        expected = theirs(scores, truth, 4, average=None).tolist()
        assert [read(one) for one in found.per_class] == pytest.approx(expected, abs=1e-6)
    assert [one.n for one in found.per_class] == np.bincount(labels).tolist()
    hits = int(((probabilities.argmax(1) == 2) & (labels == 2)).sum())
    assert found.per_class[2].recall == wilson_interval(hits, int((labels == 2).sum()))


def test_classes_that_do_not_occur():
    probabilities, labels = np.eye(4)[[0, 0, 1]], np.array([0, 1, 1])
    found = quality(probabilities, labels)
    assert found.macro_f1.value == pytest.approx(2 / 3)
    absent = found.per_class[3]
    assert absent.n == absent.recall.n == 0 and np.isnan([absent.precision, absent.recall.value, absent.f1]).all()
    only_answered = quality(np.eye(3)[[0, 2]], np.array([0, 0]))
    assert only_answered.macro_f1.value == pytest.approx((2 / 3 + 0) / 2)
    assert only_answered.per_class[2].precision == 0 and only_answered.per_class[2].f1 == 0
    never_answered = quality(np.eye(3)[[0, 0]], np.array([0, 1])).per_class[1]
    assert np.isnan(never_answered.precision) and never_answered.recall.value == 0 and never_answered.f1 == 0


def test_intervals_of_images():
    probabilities, labels = answers(n=300)
    found = quality(probabilities, labels)
    correct = probabilities.argmax(1) == labels
    assert found.accuracy == wilson_interval(int(correct.sum()), 300)
    rng = np.random.default_rng(5)
    draws = [rng.integers(300, size=300) for _ in range(600)]
    slow = [macro_f1(probabilities[rows], labels[rows]) for rows in draws]
    assert (found.macro_f1.low, found.macro_f1.high) == pytest.approx(np.percentile(slow, [2.5, 97.5]), abs=0.01)
    slow = [expected_calibration_error(probabilities[rows], labels[rows]) for rows in draws]
    low, high = np.percentile(slow, [2.5, 97.5])
    error = found.calibration_error
    assert (error.low, error.high) == pytest.approx((max(2 * error.value - high, 0), 2 * error.value - low), abs=0.01)
    assert quality(probabilities, labels) == found != quality(probabilities, labels, seed=1)


def test_groups_widen_the_intervals():
    probabilities, labels = answers(n=40)
    together, each = np.repeat(np.arange(40), 5), np.repeat([f"p{i}" for i in range(40)], 5)
    alone, whole = (
        quality(probabilities[together], labels[together]),
        quality(probabilities[together], labels[together], each),
    )
    correct = (probabilities.argmax(1) == labels)[together].astype(float)
    assert whole.accuracy == mean_interval(correct, each) and whole.macro_f1.n == 40 and alone.macro_f1.n == 200
    for wide, narrow in [(whole.accuracy, alone.accuracy), (whole.macro_f1, alone.macro_f1)]:
        assert wide.value == pytest.approx(narrow.value) and wide.high - wide.low > 1.7 * (narrow.high - narrow.low)
    mine = labels[together] == 1
    assert whole.per_class[1].recall == mean_interval(correct[mine], each[mine])
    one = quality(probabilities, labels, np.array(["same"] * 40))
    assert one.macro_f1.n == 1 and np.isnan([one.accuracy.low, one.macro_f1.low, one.calibration_error.high]).all()


def test_perfect_and_calibrated():
    found = quality(np.eye(3)[[0, 1, 2, 0, 1, 2, 0, 1, 2, 0]], np.array([0, 1, 2, 0, 1, 2, 0, 1, 2, 0]))
    assert found.accuracy == found.macro_f1 == wilson_interval(10, 10)
    assert found.calibration_error == wilson_interval(0, 10)
    # Guo's bins are closed above: .8 = 12/15 shares the bin of .78, not that of .82
    pair = [np.array([[0.8, 0.2], [other, 1 - other]]) for other in (0.78, 0.82)]
    labels = np.array([1, 0])
    assert expected_calibration_error(pair[0], labels) == pytest.approx((0.8 - 0.22) / 2)
    assert expected_calibration_error(pair[1], labels) == pytest.approx((0.8 + 0.18) / 2)


def test_calibration_intervals_hold_the_error_of_an_overconfident_model():
    truth = expected_calibration_error(*answers(99, 20_000, sharpness=2.0))
    found = [quality(*answers(seed, 150, sharpness=2.0), seed=seed).calibration_error for seed in range(40)]
    assert np.mean([one.low <= truth <= one.high for one in found]) >= 0.85
    assert all(0 <= one.low <= one.value <= one.high <= 1 for one in found)


def test_what_is_no_probability_and_no_label(unchecked):
    probabilities, labels = answers(n=10)
    for function in (quality, accuracy, macro_f1, expected_calibration_error):
        with pytest.raises(ValueError, match=r"expected probabilities from 0 to 1, .* apply softmax"):
            function(probabilities * 20, labels)
        with pytest.raises(ValueError, match=r"expected labels in 0\.\.3, got -1 to .* leave out"):
            function(probabilities, np.append(labels[1:], -1))
        with pytest.raises(ValueError, match=r"expected one row of probabilities per label"):
            function(probabilities, labels[1:])
        with pytest.raises(ValueError, match=r"at least one"):
            function(probabilities[:0], labels[:0])


class Net(nn.Module):
    """Features of the mean color, a side branch that is linear too, and a head."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(5, 3)
        self.lift = nn.Linear(3, 5)
        self.drop = nn.Dropout()

    def forward(self, images):
        return self.head(self.drop(self.lift(images.mean((2, 3))).relu()))


def pictures(seed, n=60):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    color = nn.functional.one_hot(labels, 3) + torch.randn(n, 3, generator=generator)
    return color[:, :, None, None] + 0.1 * torch.randn(n, 3, 4, 4, generator=generator), labels


@pytest.mark.parametrize("penalty", [0.1, 1.0, 30.0])
def test_probe_answers_like_scikit_learn(penalty):
    torch.manual_seed(0)
    model, train, test = Net(), pictures(1), pictures(2, 300)
    with torch.no_grad():
        a, b = (model.lift(images.mean((2, 3))).relu().double().numpy() for images, _ in (train, test))
    spread = a.std(0)
    spread[spread == 0] = np.inf
    theirs = LogisticRegression(C=1 / penalty, tol=1e-10, max_iter=5000).fit((a - a.mean(0)) / spread, train[1].numpy())
    hits = int((theirs.predict((b - a.mean(0)) / spread) == test[1].numpy()).sum())
    found = linear_probe(model, train, test, penalty=penalty)
    assert found == wilson_interval(hits, 300) and found.low > 1 / 3


def test_probe_takes_batches_and_leaves_the_model_alone():
    torch.manual_seed(0)
    model, (images, labels), test = Net().train(), pictures(1), pictures(2)
    before = state_of(model)
    found = linear_probe(model, (images, labels), test)
    batches = [(images[:25], labels[:25]), (images[25:], labels[25:])]
    assert linear_probe(model, batches, tuple([test, test][:1]), batch_size=7) == found
    with torch.no_grad(), torch.inference_mode():
        assert linear_probe(model, (images, labels), test) == found
    assert_same_state(before, state_of(model))
    with pytest.raises(RuntimeError):
        linear_probe(model, (images[:, :2], labels), test)
    assert_same_state(before, state_of(model))


def test_probe_transfers_to_other_classes():
    labels = torch.arange(60) % 4  # four classes where the model has three
    images = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]])[labels][:, :, None, None].expand(-1, -1, 4, 4)
    assert linear_probe(PooledModel(torch.eye(3)), (images, labels), (images, labels)).value == 1
    assert linear_probe(PooledModel(torch.eye(3)), (images, labels), (images, labels + 5)).value == 0


def test_probe_needs_a_linear_head():
    images, labels = pictures(1)
    with pytest.raises(ValueError, match=r"come straight out of an nn\.Linear, got ConstantModel; wrap its head"):
        linear_probe(ConstantModel(torch.zeros(3)), (images, labels), (images, labels))
    with pytest.raises(ValueError, match=r"come straight out of an nn\.Linear, got Sequential"):
        linear_probe(
            nn.Sequential(PooledModel(torch.eye(3)), nn.Hardtanh(-0.1, 0.1)), (images, labels), (images, labels)
        )
    with pytest.raises(ValueError, match=r"expected at least one image"):
        linear_probe(PooledModel(torch.eye(3)), [], (images, labels))
    with pytest.raises(ValueError, match=r"expected labels of at least 0, got -100; leave out images without a label"):
        linear_probe(PooledModel(torch.eye(3)), (images, torch.full_like(labels, -100)), (images, labels))
