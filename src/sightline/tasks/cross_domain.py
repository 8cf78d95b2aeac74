"""Cross-domain classification: other images, told apart by a linear classifier of a trained network's features."""

from typing import Any

import numpy as np
from jaxtyping import Float, Int64, Shaped
from torch import nn

from sightline import runs
from sightline.checks import missing
from sightline.data import ImageSet, normalize
from sightline.data.splits import held_out
from sightline.metrics.classification import head_features, linear_answers
from sightline.tasks.images import each, images_for
from sightline.tasks.outcome import Figure, Outcome, register

Array = np.ndarray
STRENGTHS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Values of C to choose from."""
_HELD_OUT = 0.2
"""Fraction of the training images that chooses C."""


@register("cross_domain")
def cross_domain(
    run: runs.Run, model: nn.Module, *, data: str | None = None, fields: dict[str, Any] | None = None
) -> Outcome:
    """Accuracy on other images of a linear support vector machine on the network's features.

    The network stays as it is. The features are the input of the `nn.Linear` that makes the logits. C is chosen on a
    fifth of the other images' training part, whole groups of it where there are groups. Chance: always naming its most
    frequent class.

    Args:
        run: a trained run.
        model: its network.
        data: the other images, as `data.source` of a recipe; they are resized to the run's size.
        fields: further fields of their `data`, for example `{group: patient, resplit: true}`.

    Raises:
        OSError: the images are missing.
        ValueError: no images named, or logits that do not come straight out of an `nn.Linear`.
        ModuleNotFoundError: scikit-learn is missing.

    Source: Jetley et al. 2018 (1804.02391), "Learn To Pay Attention", experiment on cross-domain classification.
    Differs: features are linear_answers; the paper does not tell how C was chosen.
    """
    if data is None:
        raise ValueError("expected the images to classify, got none; name them by --task.data PATH_OR_NAME")
    sets = images_for(run, data, fields)
    features, labels = _features(model, sets["train"])
    tested, truth = _features(model, sets["test"])
    answers, strength = support_vectors(features, labels, tested, sets["train"].groups)
    accuracy = Figure(
        values=(answers == truth).astype(float),
        unit="images",
        groups=sets["test"].groups,
        chance=float((truth == np.bincount(labels).argmax()).mean()),
    )
    at_end = "; the best lies at an end of that range" if strength in (STRENGTHS[0], STRENGTHS[-1]) else ""
    notice = (
        f"C = {strength:g} was chosen out of {STRENGTHS[0]:g} to {STRENGTHS[-1]:g} on {_HELD_OUT:.0%} of the "
        f"{len(labels):,} training images{at_end}; {features.shape[1]} features."
    )
    return Outcome(
        task="cross_domain",
        figures={"accuracy": accuracy},
        names={"images": sets["test"].names},
        notices=(notice, *sets["train"].notices),
    )


def support_vectors(
    features: Float[Array, "n d"],
    labels: Int64[Array, " n"],
    tested: Float[Array, "m d"],
    groups: Shaped[Array, " n"] | None = None,
) -> tuple[Int64[Array, " m"], float]:
    """Classes of the tested features by a linear support vector machine, and its C.

    One machine per class against all others minimizes (|w|^2 + b^2) / 2 + C sum max(0, 1 - y (wx + b))^2.
    C is the one of `STRENGTHS` with most right answers on a fifth of the rows, and of several the smallest; the machine
    is then fitted on all rows.

    Raises:
        ModuleNotFoundError: scikit-learn is missing.
        ValueError: all rows are of one group.

    Differs: the usual machine has the hinge without the square, and does not penalize b.

    >>> rows = np.repeat([[0.0, 1.0], [1.0, 0.0]], 5, 0)
    >>> support_vectors(rows, np.repeat([0, 1], 5), np.array([[0.9, 0.2], [0.3, 0.8]]))[0].tolist()
    [1, 0]
    """
    held = held_out(labels, _HELD_OUT, 0, groups)
    hits = [
        (_answers(features[~held], labels[~held], features[held], strength) == labels[held]).mean()
        for strength in STRENGTHS
    ]
    strength = STRENGTHS[int(np.argmax(hits))]
    return _answers(features, labels, tested, strength), strength


def _answers(features: Array, labels: Array, tested: Array, strength: float) -> Array:
    try:
        from sklearn.svm import LinearSVC
    except ImportError as error:
        raise missing("cross-domain classification needs scikit-learn", "train") from error
    machine: Any = LinearSVC(C=strength, dual=False, tol=1e-6, max_iter=10_000)  # pyright: ignore[reportArgumentType]
    return linear_answers(machine, features, labels, tested)


def _features(model: nn.Module, images: ImageSet) -> tuple[Array, Array]:
    batches = each(images.unmarked(), np.arange(len(images)), model)
    return head_features(model, ((normalize(b.images, images.preprocess), b.labels) for b in batches))
