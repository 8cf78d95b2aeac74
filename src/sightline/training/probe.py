"""A quick baseline for fine-tuning: the pretrained features as they are, and a linear classifier."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Int64
from torch import Tensor, nn

from sightline import data
from sightline.data.splits import draw
from sightline.facts import Interval
from sightline.metrics.classification import linear_probe

_MOST = 5000
"""Training images that the classifier is fitted on."""
_BATCH = 64


def probe(network: nn.Module, train: data.ImageSet, test: data.ImageSet) -> Interval:
    """Accuracy of `linear_probe` on the test images, fitted on up to 5,000 training images, drawn stratified.

    Raises:
        ValueError: the logits do not come straight out of an `nn.Linear`.
    """
    rows = np.arange(len(train)) if len(train) <= _MOST else draw(train.labels, _MOST, seed=0)
    labeled = np.flatnonzero(test.labels >= 0)
    groups = None if test.groups is None else test.groups[labeled]
    return linear_probe(network, _inputs(train, rows), _inputs(test, labeled), batch_size=_BATCH, groups=groups)


def _inputs(images: data.ImageSet, rows: Int64[np.ndarray, " n"]) -> Iterator[tuple[Tensor, Tensor]]:
    parts = np.split(rows, range(_BATCH, len(rows), _BATCH))
    for batch in images.unmarked().each(parts, None):
        yield data.normalize(batch.images, images.preprocess), batch.labels
