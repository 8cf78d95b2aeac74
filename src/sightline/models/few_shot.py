"""Classifiers made from a few images of each class: functions of the features of support and query images."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn
from torch.nn import functional as F

from sightline import data
from sightline.checks import missing
from sightline.inference import features_of, untouched


def centroid(support: Float[Tensor, "n k d"], query: Float[Tensor, "m d"]) -> Float[Tensor, "m n"]:
    """Nearest centroid: minus the squared Euclidean distance to the mean of each class.

    Source: Snell et al., "Prototypical Networks for Few-shot Learning", NeurIPS 2017, equations 1 and 2.

    >>> centroid(torch.tensor([[[0.0, 0.0], [2.0, 0.0]], [[4.0, 3.0], [4.0, 3.0]]]), torch.tensor([[1.0, 3.0]]))
    tensor([[-9., -9.]])
    """
    differences = query[:, None] - support.mean(1)
    return -differences.square().sum(2)


def cosine(support: Float[Tensor, "n k d"], query: Float[Tensor, "m d"]) -> Float[Tensor, "m n"]:
    """Nearest centroid by angle: the cosine with the mean of each class.

    Source: Chen et al., "Meta-Baseline", ICCV 2021, equation 2.

    >>> cosine(torch.tensor([[[0.0, 1.0], [0.0, 3.0]], [[3.0, 4.0], [3.0, 4.0]]]), torch.tensor([[0.0, 9.0]]))
    tensor([[1.0000, 0.8000]])
    """
    return F.normalize(query, dim=1) @ F.normalize(support.mean(1), dim=1).T


def logistic(support: Float[Tensor, "n k d"], query: Float[Tensor, "m d"]) -> Float[Tensor, "m n"]:
    """Logistic regression on features of length 1: the log-probability of each class.

    It minimizes the summed cross-entropy of the support images + half the squared weights without biases.

    Raises:
        ModuleNotFoundError: scikit-learn is missing.

    Source: Tian et al., "Rethinking Few-Shot Image Classification: a Good Embedding Is All You Need?", ECCV 2020,
    section 3.

    >>> scores = logistic(torch.eye(2)[:, None], torch.tensor([[5.0, 1.0], [1.0, 1.0]]))
    >>> scores.exp()
    tensor([[0.5780, 0.4220],
            [0.5000, 0.5000]])
    """
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise missing("logistic regression needs scikit-learn", "train") from error
    ways, shots, _ = support.shape
    train, test = (F.normalize(x.double(), dim=-1).cpu().numpy() for x in (support.flatten(0, 1), query))
    labels = torch.arange(ways).repeat_interleave(shots).numpy()
    fitted = LogisticRegression(C=1.0, max_iter=1000, tol=1e-9).fit(train, labels)
    return torch.from_numpy(fitted.predict_log_proba(test)).to(query)


Learner = Callable[[Float[Tensor, "n k d"], Float[Tensor, "m d"]], Float[Tensor, "m n"]]
"""From support features (ways, shots, d) and query features (images, d) to scores (images, ways)."""

LEARNERS: dict[str, Learner] = {
    "centroid": centroid,
    "cosine": cosine,
    "logistic": logistic,
}
"""Classifiers by name."""


def gradient_steps(
    weight: Float[Tensor, "n d"], bias: Float[Tensor, " n"], support: Float[Tensor, "n k d"], steps: int, lr: float
) -> tuple[Float[Tensor, "n d"], Float[Tensor, " n"]]:
    """A linear classifier after some steps of gradient descent on the mean cross-entropy of the support images.

    Gradients flow from the result to `weight` and `bias` as if the steps added a constant (first order), and not to
    `support`.

    Source: Sun et al., "Meta-Transfer Learning for Few-Shot Learning", CVPR 2019, equation 3; first order: its code.

    >>> weight, bias = gradient_steps(torch.zeros(2, 2), torch.zeros(2), torch.eye(2)[:, None], steps=1, lr=1.0)
    >>> weight, bias
    (tensor([[ 0.2500, -0.2500],
            [-0.2500,  0.2500]]), tensor([0., 0.]))
    """
    ways, shots, _ = support.shape
    with torch.no_grad():
        images = support.flatten(0, 1)
        labels = torch.eye(ways).to(images).repeat_interleave(shots, 0)
        moved, shifted = weight, bias
        for _ in range(steps):
            errors = (F.linear(images, moved, shifted).softmax(1) - labels) / len(images)
            moved, shifted = moved - lr * errors.T @ images, shifted - lr * errors.sum(0)
        changes = moved - weight, shifted - bias
    return weight + changes[0], bias + changes[1]


def features_at(
    network: nn.Module, images: data.ImageSet, episodes: Sequence[data.Episode], batch_size: int = 64
) -> Float[Tensor, "n d"]:
    """Features of all images that occur in the episodes, in eval mode, on the network's device; zeros for the others.

    Raises:
        ValueError: the logits do not come straight out of an `nn.Linear`.
    """
    rows = np.unique(np.concatenate([part.ravel() for one in episodes for part in (one.support, one.query)]))
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    features: Tensor | None = None
    with untouched(network) as net, torch.no_grad():
        for batch in images.each(np.split(rows, range(batch_size, len(rows), batch_size)), None):
            part = features_of(net, data.normalize(batch.images.to(device), images.preprocess)).float()
            if features is None:
                features = part.new_zeros(len(images), part.shape[1])
            features[batch.indices.to(device)] = part
    assert features is not None  # an episode has images
    return features


def episode_accuracies(
    features: Float[Tensor, "n d"], episodes: Sequence[data.Episode], learner: Learner
) -> Float64[np.ndarray, " e"]:
    """Share of the query images of each episode that a learner classifies right; of equal scores the first counts.

    >>> one = data.Episode(np.array([7, 4]), np.array([[0], [1]]), np.array([[2], [3]]))
    >>> episode_accuracies(torch.tensor([[0.0], [4.0], [1.0], [1.5]]), [one], centroid)
    array([0.5])
    """
    accuracies = np.empty(len(episodes))
    with torch.no_grad():
        for number, one in enumerate(episodes):
            ways, queries = one.query.shape
            rows = torch.from_numpy(np.concatenate([one.support.ravel(), one.query.ravel()])).to(features.device)
            support, query = features[rows].split([one.support.size, one.query.size])
            answers = learner(support.unflatten(0, one.support.shape), query).argmax(1).cpu()
            accuracies[number] = (answers == torch.arange(ways).repeat_interleave(queries)).double().mean()
    return accuracies
