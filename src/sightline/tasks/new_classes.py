"""Few-shot classification: classes that the network has never seen, from a few images of each."""

from math import sqrt
from typing import Literal

import numpy as np
from torch import nn

from sightline import data, runs
from sightline.facts import did_you_mean
from sightline.models.few_shot import LEARNERS, Learner, episode_accuracies, features_at
from sightline.tasks.outcome import Figure, Outcome, register

META_TRANSFER = "base learner"


@register("few_shot")
def few_shot(
    run: runs.Run,
    model: nn.Module,
    *,
    learners: tuple[str, ...] | None = None,
    ways: int = 5,
    shots: int = 1,
    queries: int = 15,
    episodes: int = 600,
    seed: int = 1,
    part: Literal["val", "test"] = "test",
) -> Outcome:
    """Accuracy on new classes, from a few images of each: the mean over episodes.

    In each episode a classifier is made from the features of the support images and asked about the query images.

    Args:
        run: a run whose recipe has class lists (`data.classes`); its network was trained on other classes.
        model: its network, whose logits come out of an `nn.Linear`; the features are the input of that layer.
        learners: classifiers, out of `centroid`, `cosine` and `logistic`, and `base learner` for a run of
            meta-transfer learning. None: all that the run has, its base learner first.
        ways: classes of an episode.
        shots: support images of each class.
        queries: query images of each class.
        episodes: number of episodes.
        seed: of the episodes: the same for all networks.
        part: the classes to test with, or those to choose on.

    Raises:
        ValueError: no class lists, an unknown learner, an impossible episode, or a network without a linear head.
        OSError: the images are missing.
        ModuleNotFoundError: logistic regression without scikit-learn.

    Source: Bertinetto et al. 2019 (1805.08136), section 4: CIFAR-FS; 5-way 1-shot with 15 queries and 600 episodes as
    in Snell et al. 2017 and Gomez et al. (2106.02566).

    Differs: Bertinetto et al. test with 10,000 episodes.
    """
    own: dict[str, Learner] = {}
    if (run.folder / runs.BASE_LEARNER).is_file():
        from sightline.training.episodic import read_base_learner

        own = {META_TRANSFER: read_base_learner(run.folder)}
    available = own | LEARNERS
    for name in learners or ():
        if name not in available:
            hint = did_you_mean(name, available, f"it has {', '.join(available)}")
            raise ValueError(f"{run.folder}: no learner {name!r} for this run{hint}")
    images = data.load_new_classes(run.recipe.data, run.preprocess)[part].unmarked()
    shape = {"ways": ways, "shots": shots, "queries": queries}
    drawn = [*data.episodes(images, episodes, seed=seed, **shape)]
    features = features_at(model, images, drawn)
    accuracies = {name: episode_accuracies(features, drawn, available[name]) for name in learners or available}
    figures = {name: Figure(values=a, unit="episodes", chance=1 / ways) for name, a in accuracies.items()}
    spreads = [f"{name} {100 * a.mean():.2f} ± {100 * half_width(a):.2f} %" for name, a in accuracies.items()]
    classes = [", ".join(images.classes[kind] for kind in one.classes) for one in drawn]
    what = f"{ways}-way {shots}-shot, {queries} queries per class, {len(images.classes)} {part} classes"
    notices = (f"{what}; mean ± 1.96 s / sqrt({episodes}): {', '.join(spreads)}",)
    return Outcome(task="few_shot", figures=figures, names={"episodes": classes}, notices=notices)


def half_width(values: np.ndarray) -> float:
    """Half of the usual 95 % interval of few-shot papers: 1.96 standard deviations / sqrt(n); NaN for one value.

    >>> round(half_width(np.array([0.0, 1.0])), 4)
    0.98
    """
    return float(1.96 * values.std(ddof=1) / sqrt(len(values))) if len(values) > 1 else float("nan")
