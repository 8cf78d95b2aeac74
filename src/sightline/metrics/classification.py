"""How good is the classifier? Accuracy, macro-F1, calibration, each class, and a probe of its features."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from sightline.checks import missing
from sightline.inference import features_of, untouched
from sightline.metrics.uncertainty import Interval, interval_of, limits, mean_interval, resamples, wilson_interval
from sightline.notebook import brief

Array = np.ndarray
Batches = tuple[Tensor, Tensor] | Iterable[tuple[Tensor, Tensor]]
_BINS = 15


@dataclass(frozen=True, kw_only=True)
class ClassQuality:
    """One class against all others."""

    precision: float
    """Share of the images predicted as this class that belong to it; NaN if there is none."""
    recall: Interval
    """Share of the images of this class that are predicted as it; NaN if there is none."""
    f1: float
    """Harmonic mean of precision and recall; NaN if the class is neither a label nor a prediction of any image."""
    n: int
    """Images of this class."""


@dataclass(frozen=True, kw_only=True)
class Quality:
    """The quality of a classifier on labeled images; 95 % intervals over images or groups."""

    __repr__ = brief

    accuracy: Interval
    macro_f1: Interval
    calibration_error: Interval
    per_class: tuple[ClassQuality, ...]


def quality(
    probabilities: Float[Array, "n classes"],
    labels: Int[Array, " n"],
    groups: Shaped[Array, " n"] | None = None,
    seed: int = 0,
) -> Quality:
    """Accuracy, macro-F1, expected calibration error and each class.

    Accuracy and recall have Wilson's intervals, with groups those of `mean_interval`; the others resample images or
    groups. Resampling adds as much to a calibration error as sampling did, so its percentiles are mirrored at the value
    ("basic" bootstrap), and the interval is limited to 0 to 1 and always holds the value. It holds the true error of a
    perfectly calibrated model, 0, only about half of the time.

    Raises:
        ValueError: no image, a label that is no class.

    >>> result = quality(np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]]), np.array([0, 1, 1]))
    >>> round(result.accuracy.value, 3), round(result.macro_f1.value, 3), round(result.per_class[1].recall.value, 3)
    (0.667, 0.667, 0.5)
    """
    _check(probabilities, labels)
    answers = probabilities.argmax(1)
    correct = right_answers(probabilities, labels)
    which = np.arange(len(labels)) if groups is None else np.unique(groups, return_inverse=True)[1]
    units = int(which.max()) + 1
    once = np.ones((1, len(labels)))
    f1, error = (float(score(probabilities, labels, once)[0]) for score in (_macro_f1, _calibration_error))
    draws = [
        np.stack([score(probabilities, labels, drawn[:, which]) for score in (_macro_f1, _calibration_error)], 1)
        for drawn in resamples(units, seed)
    ]
    (f1_low, low), (f1_high, high) = np.array(limits(np.concatenate(draws), np.full(2, units))).tolist()
    mirrored = max(min(2 * error - high, error), 0.0), min(max(2 * error - low, error), 1.0)
    hits, given, actual = (
        np.bincount(classes, minlength=probabilities.shape[1]).tolist()
        for classes in (labels[correct], answers, labels)
    )

    def of_class(k: int) -> ClassQuality:
        mine = labels == k
        return ClassQuality(
            precision=_ratio(hits[k], given[k]),
            recall=_share(correct[mine], None if groups is None else groups[mine], seed),
            f1=_ratio(2 * hits[k], given[k] + actual[k]),
            n=actual[k],
        )

    return Quality(
        accuracy=_share(correct, groups, seed),
        macro_f1=interval_of(f1, f1_low, f1_high, units),
        calibration_error=interval_of(error, *mirrored, units),
        per_class=tuple(of_class(k) for k in range(probabilities.shape[1])),
    )


def right_answers(
    scores: Float[Tensor, "n classes"] | Float[Array, "n classes"], labels: Int[Tensor, " n"] | Int[Array, " n"]
) -> Any:
    """Whether the class with the highest score is right, for each image; of equally high ones the first counts.

    Scores may be probabilities or logits; arrays, or tensors on any device.

    >>> right_answers(torch.tensor([[2.0, -1.0], [0.5, 0.5]]), torch.tensor([0, 1]))
    tensor([ True, False])
    """
    return scores.argmax(1) == labels


def accuracy(probabilities: Float[Array, "n classes"], labels: Int[Array, " n"]) -> float:
    """Share of images whose most probable class is right; of equally probable classes the first counts.

    Chance: 1 / classes; see also the share of the most frequent class.

    Raises:
        ValueError: as `quality`.

    >>> accuracy(np.array([[0.9, 0.1], [0.6, 0.4]]), np.array([0, 1]))
    0.5
    """
    _check(probabilities, labels)
    return float(right_answers(probabilities, labels).mean())


def macro_f1(probabilities: Float[Array, "n classes"], labels: Int[Array, " n"]) -> float:
    """Unweighted mean F1 of the classes, 0 to 1; higher is better.

    Classes that are neither a label nor a prediction are left out; a class that is only one of them counts 0.

    Raises:
        ValueError: as `quality`.

    >>> macro_f1(np.array([[0.9, 0.1, 0.0], [0.6, 0.4, 0.0]]), np.array([0, 1])).__round__(4)
    0.3333
    """
    _check(probabilities, labels)
    return float(_macro_f1(probabilities, labels, np.ones((1, len(labels))))[0])


def expected_calibration_error(probabilities: Float[Array, "n classes"], labels: Int[Array, " n"]) -> float:
    """Mean gap between confidence and accuracy over 15 equal bins of the confidence, 0 to 1; lower is better.

    Even a calibrated model scores above 0 on few images: about the root of (filled bins / images) times 0.3.

    Raises:
        ValueError: as `quality`.

    Source: Guo et al. 2017 (1706.04599), equations 2, 3 and 5; bins are open below and closed above.

    >>> expected_calibration_error(np.array([[0.75, 0.25], [0.75, 0.25]]), np.array([0, 1]))
    0.25
    """
    _check(probabilities, labels)
    return float(_calibration_error(probabilities, labels, np.ones((1, len(labels))))[0])


def linear_probe(
    model: nn.Module,
    train: Batches,
    test: Batches,
    *,
    penalty: float = 1.0,
    batch_size: int = 64,
    groups: Shaped[Array, " n"] | None = None,
) -> Interval:
    """Accuracy on `test` of a linear classifier of the model's features, fitted on `train`, with its interval.

    The features are the input of the `nn.Linear` that makes the logits. Each is scaled by its mean and standard
    deviation over `train`. `train` and `test`: (images, labels), or batches of them, of any data set whose images the
    model can take. `penalty`: see the source. The interval is Wilson's, or resamples whole `groups` of the
    test images. Nothing else is random, and the model stays unchanged.

    Raises:
        ValueError: no image, a negative label, or logits that do not come straight out of an `nn.Linear`.
        ModuleNotFoundError: scikit-learn is missing.

    Source: Jetley et al. 2018 (1804.02391), section 5.3, cross-domain classification. The classifier is multinomial
    logistic regression; it minimizes the summed cross-entropy + penalty / 2 x the squared weights without biases.

    Differs: the paper fits linear SVMs.

    >>> from sightline.testing import PooledModel
    >>> images = torch.eye(2).repeat(20, 1)[:, :, None, None].expand(-1, -1, 4, 4)
    >>> data = images, torch.arange(40) % 2
    >>> linear_probe(PooledModel(torch.ones(3, 2)), data, data).value
    1.0
    """
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise missing("the linear probe needs scikit-learn", "train") from error
    features, labels = head_features(model, train, batch_size)
    tested, truth = head_features(model, test, batch_size)
    probe = LogisticRegression(C=1 / penalty if penalty else np.inf, max_iter=10_000, tol=1e-9)
    return _share(linear_answers(probe, features, labels, tested) == truth, groups, 0)


def linear_answers(
    classifier: Any, features: Float[Array, "n d"], labels: Int[Array, " n"], tested: Float[Array, "m d"]
) -> Int[Array, " m"]:
    """What a classifier of scikit-learn, fitted to standardized features, says of others; of one class, that class.

    >>> from sklearn.linear_model import LogisticRegression
    >>> known, labels = np.array([[0.0], [1.0], [5.0], [6.0]]), np.array([2, 2, 7, 7])
    >>> linear_answers(LogisticRegression(), known, labels, np.array([[0.5], [9.0]])).tolist()
    [2, 7]
    """
    if len(np.unique(labels)) == 1:
        return np.full(len(tested), labels[0])
    mean, deviation = features.mean(0), features.std(0)
    scale = np.where(deviation > 1e-12 * np.abs(features).max(0), deviation, np.inf)  # a constant feature becomes 0
    return classifier.fit((features - mean) / scale, labels).predict((tested - mean) / scale)


def head_features(
    model: nn.Module, data: Batches, batch_size: int = 64
) -> tuple[Float[Array, "n d"], Int[Array, " n"]]:
    """The input of the `nn.Linear` that makes the logits, in float64, and labels; the model stays unchanged.

    Raises:
        ValueError: no image, a negative label, or logits that do not come straight out of an `nn.Linear`.
    """
    is_pair = isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], Tensor)
    batches = cast("Iterable[tuple[Tensor, Tensor]]", [data] if is_pair else data)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    features: list[Tensor] = []
    labels: list[Tensor] = []
    with untouched(model) as net, torch.inference_mode(False), torch.no_grad():
        for images, truth in batches:
            features += [features_of(net, chunk.to(device)).cpu().double() for chunk in images.split(batch_size)]
            labels.append(truth.cpu().long())
    if not features:
        raise ValueError("expected at least one image to fit and one to test, got none")
    classes = torch.cat(labels)
    if (classes < 0).any():
        raise ValueError(f"expected labels of at least 0, got {int(classes.min())}; leave out images without a label")
    return torch.cat(features).numpy(), classes.numpy()


def _check(probabilities: Array, labels: Array) -> None:
    if not len(labels) or len(probabilities) != len(labels):
        raise ValueError(
            f"expected one row of probabilities per label and at least one, got {len(probabilities)} and {len(labels)}"
        )
    if probabilities.min() < 0 or probabilities.max() > 1 + 1e-6:
        raise ValueError(
            f"expected probabilities from 0 to 1, got {probabilities.min():.4g} to {probabilities.max():.4g}; "
            "apply softmax to logits first"
        )
    if labels.min() < 0 or labels.max() >= probabilities.shape[1]:
        raise ValueError(
            f"expected labels in 0..{probabilities.shape[1] - 1}, got {labels.min()} to {labels.max()}; "
            "leave out images without a label"
        )


def _share(correct: Array, groups: Array | None, seed: int) -> Interval:
    if groups is None and len(correct):
        return wilson_interval(int(correct.sum()), len(correct))
    return mean_interval(correct.astype(float), groups, seed)


def _ratio(top: int, bottom: int) -> float:
    return top / bottom if bottom else float("nan")


def _macro_f1(probabilities: Array, labels: Array, weights: Float[Array, "r n"]) -> Float[Array, " r"]:
    """For each row of weights of the images."""
    answers, classes = probabilities.argmax(1), probabilities.shape[1]
    hits = _totals(labels, weights * right_answers(probabilities, labels), classes)
    occurs = _totals(labels, weights, classes) + _totals(answers, weights, classes)
    return (2 * hits / np.maximum(occurs, 1)).sum(1) / (occurs > 0).sum(1)


def _calibration_error(probabilities: Array, labels: Array, weights: Float[Array, "r n"]) -> Float[Array, " r"]:
    confidence = probabilities.max(1).astype(float)
    bins = np.digitize(confidence, np.arange(1, _BINS) / _BINS, right=True)
    gaps = right_answers(probabilities, labels) - confidence
    return np.abs(_totals(bins, weights * gaps, _BINS)).sum(1) / weights.sum(1)


def _totals(kinds: Int[Array, " n"], weights: Float[Array, "r n"], count: int) -> Float[Array, "r count"]:
    """Sum of each row's weights over each kind."""
    places = kinds + count * np.arange(len(weights))[:, None]
    return np.bincount(places.ravel(), weights.ravel(), len(weights) * count).reshape(-1, count)
