"""Which of the vectors that a block pools carry the class: linear classifiers on some of them."""

from itertools import combinations

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from sightline import data, runs
from sightline.attention import RepresentativeVectors
from sightline.checks import missing
from sightline.inference import forward
from sightline.metrics.classification import linear_answers
from sightline.tasks.images import each, images_for
from sightline.tasks.outcome import Figure, Outcome, register

_MOST = 4


@register("vectors")
def vectors(run: runs.Run, model: nn.Module) -> Outcome:
    """Accuracy of linear classifiers on all representative vectors, on some, and on one: which carry the class?

    The network stays as it is; the classifiers are fitted to the training images. Chance: always naming their most
    frequent class.

    Args:
        run: a trained run whose network has BR-NPA with two to four vectors.
        model: its network.

    Raises:
        ValueError: a network without such a block.
        OSError: the images are missing.
        ModuleNotFoundError: without scikit-learn.

    Source: Gomez et al. 2021 (2106.02566), BR-NPA, the table of the number and rank of vectors: linear heads on
    detached features.

    Differs: the classifier is a logistic regression (L2, C = 1) on linear_answers vectors, fitted to its optimum.
    """
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise missing("vectors needs scikit-learn", "train") from error
    block = next((module for module in model.modules() if isinstance(module, RepresentativeVectors)), None)
    if block is None or not 2 <= block.k <= _MOST:
        got = f"one with k={block.k}" if block else f"{run.recipe.model.name} without BR-NPA"
        raise ValueError(f"expected a network with 2 to {_MOST} vectors, got {got}; train one with --attention brnpa")
    sets = images_for(run, None, None)
    (train, labels), (test, truth) = (_read(model, block, sets[split]) for split in ("train", "test"))
    chance = float((truth == np.bincount(labels).argmax()).mean())
    figures: dict[str, Figure] = {}
    for count in range(block.k, 0, -1):
        for used in combinations(range(block.k), count):
            start, tested = (part[:, list(used)].reshape(len(part), -1) for part in (train, test))
            classifier = LogisticRegression(max_iter=10_000, tol=1e-9)
            right = (linear_answers(classifier, start, labels, tested) == truth).astype(float)
            name = f"{{{','.join(str(number + 1) for number in used)}}}"
            figures[name] = Figure(values=right, unit="images", groups=sets["test"].groups, chance=chance)
    return Outcome(task="vectors", figures=figures, names={"images": sets["test"].names})


def _read(
    model: nn.Module, block: RepresentativeVectors, images: data.ImageSet
) -> tuple[Float[np.ndarray, "n k c"], Int64[np.ndarray, " n"]]:
    """The block's vectors for all images, and their classes."""
    pooled: list[Tensor] = []
    labels: list[Tensor] = []
    hook = block.register_forward_hook(lambda layer, inputs, output: pooled.append(output.unflatten(1, (layer.k, -1))))
    try:
        for batch in each(images.unmarked(), np.arange(len(images)), model):
            forward(model, data.normalize(batch.images, images.preprocess), len(batch.images))
            labels.append(batch.labels.cpu())
    finally:
        hook.remove()
    return torch.cat(pooled).double().cpu().numpy(), torch.cat(labels).numpy()
