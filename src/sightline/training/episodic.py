"""Training on episodes: prototypical networks, and meta-transfer learning of a frozen network."""

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from sightline import data, runs
from sightline.facts import duration, percent
from sightline.inference import features_of
from sightline.metrics.classification import right_answers
from sightline.models.few_shot import Learner, centroid, episode_accuracies, features_at, gradient_steps
from sightline.models.scale_and_shift import ScaleAndShift
from sightline.training.checks import check_folder
from sightline.training.loop import memory_layout


class BaseLearner(NamedTuple):
    """The linear classifier of meta-transfer learning: where it starts, and its gradient steps in an episode."""

    weight: Float[Tensor, "n d"]
    bias: Float[Tensor, " n"]
    steps: int
    lr: float

    def __call__(self, support: Float[Tensor, "n k d"], query: Float[Tensor, "m d"]) -> Float[Tensor, "m n"]:
        """Logits of the query images after the steps on the support images.

        Raises:
            ValueError: an episode of another number of classes.
        """
        if len(support) != len(self.weight):
            raise ValueError(
                f"expected episodes of {len(self.weight)} classes, as the base learner was trained on, got "
                f"{len(support)}; set ways to {len(self.weight)}"
            )
        start = self.weight.to(support), self.bias.to(support)
        return F.linear(query, *gradient_steps(*start, support, self.steps, self.lr))


def read_base_learner(folder: Path) -> BaseLearner:
    """The base learner that `meta_transfer` has put into a run folder.

    Raises:
        FileNotFoundError: the run has none.
        ValueError: the file is damaged.
    """
    file = folder / runs.BASE_LEARNER
    if not file.is_file():
        raise FileNotFoundError(f"{folder} has no base learner; it is not a run of sightline.training.meta_transfer")
    tensors, facts = runs.unpack(file)
    try:
        return BaseLearner(tensors["weight"], tensors["bias"], facts["steps"], facts["lr"])
    except KeyError as error:
        raise ValueError(f"{file} is damaged: no {error}; train it again") from error


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How many episodes of what kind.

    Raises:
        ValueError: no epoch or no episode.
    """

    epochs: int = 20
    episodes: int = 100
    """Per epoch."""
    ways: int = 5
    shots: int = 1
    queries: int = 15
    validation: int = 100
    """Episodes on the validation classes after each epoch."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.episodes < 1:
            raise ValueError(f"expected 1 epoch or more of 1 episode or more, got {self.epochs} of {self.episodes}")

    def drawn(self, images: data.ImageSet, count: int) -> Iterator[data.Episode]:
        """Episodes of this kind."""
        shape = {"ways": self.ways, "shots": self.shots, "queries": self.queries}
        return data.episodes(images, count, seed=self.seed, **shape)


SCHEDULE = Schedule()
"""The usual one: 20 epochs of 100 episodes, 5-way 1-shot."""


def prototypical(
    run: runs.Run, out: Path | str, schedule: Schedule = SCHEDULE, *, lr: float = 1e-4, progress: bool = True
) -> runs.Run:
    """Train a run's network on, so that images lie near the centroid of their class: prototypical networks.

    The loss of an episode is the cross-entropy of its query images, whose logits are minus the squared distances to
    the means of the support images. Images are those of the run's training part, changed as in its recipe, without
    mixup. The weights of the epoch that is best on the validation classes are kept, or the run's own if none is better.
    The last layer stays that of the run, though the features change.

    Args:
        run: a run whose recipe has class lists; its network is the start.
        out: folder of the new run, new or empty.
        schedule: the episodes.
        lr: learning rate of Adam.
        progress: print a line per epoch.

    Raises:
        FileExistsError: `out` is not empty.
        ValueError: the recipe has no class lists, an impossible schedule, or a loss that is not finite.

    Source: Snell et al., "Prototypical Networks for Few-shot Learning", NeurIPS 2017, algorithm 1.

    Differs: the paper starts from random weights with a rate of 1e-3, which ruins features that are trained already;
    it trains on more classes per episode than it tests with, and halves the rate every 2,000 episodes.
    """
    check_folder(Path(out), resume=False)
    images = _images(run, schedule)
    network = _network(run)
    optimizer = torch.optim.Adam(network.parameters(), lr=lr)

    def kept() -> _Kept:
        return _Kept(network.state_dict(), {})

    course = _Course("prototypical networks", network, centroid, optimizer, kept)
    return _train(run, Path(out), schedule, images, course, progress)


def meta_transfer(
    run: runs.Run,
    out: Path | str,
    schedule: Schedule = SCHEDULE,
    *,
    lr: float = 1e-4,
    learner_lr: float = 1e-3,
    steps: int = 50,
    base_lrs: Sequence[float] = (0.01, 0.1, 1.0),
    progress: bool = True,
) -> runs.Run:
    """Meta-transfer learning: freeze a run's network and learn a scale per kernel and a shift per filter.

    In an episode a linear classifier takes gradient steps on the support images; the cross-entropy of the query images
    then trains scales, shifts, and the values that the classifier starts from. The new run holds a plain network with
    scales and shifts worked in, and the classifier's start in `base_learner.safetensors`. Images, and the epoch that is
    kept, as in `prototypical`.

    Args:
        run: a run whose recipe has class lists; its network is frozen.
        out: folder of the new run, new or empty.
        schedule: the episodes.
        lr: learning rate of Adam for scales and shifts.
        learner_lr: the same for the start of the classifier.
        steps: gradient steps of the classifier.
        base_lrs: rates of these steps; that which is best on the validation classes before the training is used.
        progress: print a line per epoch.

    Raises:
        FileExistsError: `out` is not empty.
        ValueError: as `prototypical` and `ScaleAndShift`.

    Source: Sun et al., "Meta-Transfer Learning for Few-Shot Learning", CVPR 2019, equations 3 to 5, and its code for
    first order, rates and steps.

    Differs: no batches of hard tasks; the classifier starts at 0, not at random; further differences in
    `ScaleAndShift`.
    """
    check_folder(Path(out), resume=False)
    images = _images(run, schedule)
    network = ScaleAndShift(_network(run), run.preprocess.size)
    features = images.of_validation(network)
    start = torch.zeros(schedule.ways, features.shape[1], device=features.device)
    weight, bias = nn.Parameter(start), nn.Parameter(start[:, 0].clone())
    learners = [BaseLearner(weight, bias, steps, rate) for rate in base_lrs]
    learner = max(learners, key=lambda one: episode_accuracies(features, images.episodes, one).mean())
    groups = [{"params": [*network.scales, *network.shifts], "lr": lr}, {"params": [weight, bias], "lr": learner_lr}]

    def kept() -> _Kept:
        state = runs.pack({"weight": weight, "bias": bias}, {"steps": learner.steps, "lr": learner.lr})
        return _Kept(network.folded().state_dict(), {runs.BASE_LEARNER: state})

    course = _Course("meta-transfer learning", network, learner, torch.optim.Adam(groups), kept)
    return _train(run, Path(out), schedule, images, course, progress)


class _Kept(NamedTuple):
    """What a run keeps of an epoch."""

    weights: dict[str, Tensor]
    files: dict[str, bytes]
    """Further files by name."""


class _Course(NamedTuple):
    """What learns on episodes."""

    name: str
    network: nn.Module
    learner: Learner
    optimizer: torch.optim.Optimizer
    kept: Callable[[], _Kept]


class _Images(NamedTuple):
    """The images of a run to train on, and those of the validation episodes."""

    train: data.ImageSet
    val: data.ImageSet
    episodes: list[data.Episode]

    def of_validation(self, network: nn.Module) -> Float[Tensor, "n d"]:
        """Features of the images in the validation episodes; zeros for the others."""
        return features_at(network, self.val, self.episodes)


def _images(run: runs.Run, schedule: Schedule) -> _Images:
    val = data.load_new_classes(run.recipe.data, run.preprocess)["val"].unmarked()
    train = replace(data.load(run.recipe.data)["train"], preprocess=run.preprocess).unmarked()
    return _Images(train, val, [*schedule.drawn(val, schedule.validation)])


def _network(run: runs.Run) -> nn.Module:
    device = torch.device(runs.best_device())
    network = runs.load_model(run.folder).to(device)
    return network.to(memory_format=memory_layout(network, device))


def _train(run: runs.Run, out: Path, schedule: Schedule, images: _Images, course: _Course, progress: bool) -> runs.Run:
    """Train epoch by epoch; the folder always holds the best epoch so far."""
    augment, history = replace(run.recipe.augment, mixup=0.0), list[dict[str, float]]()
    info = run.info | runs.surroundings()
    new = replace(run, folder=out, seed=schedule.seed, history=history, info=info)
    episodes = schedule.drawn(images.train, schedule.epochs * schedule.episodes)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(schedule.seed)  # of dropout
        best = _validated(course, images)
        kept = f"{course.name} from {run.folder.name}, kept: no epoch, validation accuracy {percent(best)}"
        _save(replace(new, info=info | {"training": kept}), course.kept())
        for epoch in range(1, schedule.epochs + 1):
            start, figures = time.perf_counter(), list[tuple[float, float]]()
            course.network.train()
            for number, episode in enumerate(islice(episodes, schedule.episodes), (epoch - 1) * schedule.episodes):
                rows = np.concatenate([episode.support.ravel(), episode.query.ravel()])
                batch = images.train.batch(rows, (augment, schedule.seed, number))
                figures.append(_step(course, data.normalize(batch.images, run.preprocess), *episode.support.shape))
            loss, accuracy = np.mean(figures, axis=0).tolist()
            if not math.isfinite(loss):
                raise ValueError(
                    f"the loss became {loss} in epoch {epoch}; {out} keeps the best epoch before; lower lr"
                )
            validation = _validated(course, images)
            history.append(
                {
                    "epoch": float(epoch),
                    "lr": course.optimizer.param_groups[0]["lr"],
                    "train_loss": loss,
                    "train_accuracy": accuracy,
                    "val_loss": math.nan,
                    "val_accuracy": validation,
                    "seconds": round(time.perf_counter() - start, 3),
                }
            )
            is_best = validation > best
            if is_best:
                best = validation
                kept = f"{course.name} from {run.folder.name}, kept: epoch {epoch}, validation accuracy {percent(best)}"
            info |= {"wall time": f"{sum(row['seconds'] for row in history):.1f} s", "training": kept}
            _save(replace(new, info=info), course.kept() if is_best else None)
            if progress:
                text = f"episodes: training {percent(accuracy)}, validation {percent(validation)}"
                print(f"epoch {epoch}/{schedule.epochs}, {text}, {duration(history[-1]['seconds'])}", file=sys.stderr)
    return runs.open_run(out)


def _validated(course: _Course, images: _Images) -> float:
    features = images.of_validation(course.network)
    return float(episode_accuracies(features, images.episodes, course.learner).mean())


def _step(course: _Course, images: Float[Tensor, "b 3 h w"], ways: int, shots: int) -> tuple[float, float]:
    """Loss and accuracy of the query images, which come after the support images."""
    device = next(course.network.parameters()).device
    support, query = features_of(course.network, images.to(device)).split([ways * shots, len(images) - ways * shots])
    scores = course.learner(support.unflatten(0, (ways, shots)), query)
    labels = torch.arange(ways, device=device).repeat_interleave(len(query) // ways)
    loss = F.cross_entropy(scores, labels)
    course.optimizer.zero_grad()
    loss.backward()
    course.optimizer.step()
    return loss.item(), right_answers(scores, labels).float().mean().item()


def _save(run: runs.Run, kept: _Kept | None) -> None:
    runs.save(run, None if kept is None else kept.weights)
    for name, content in ({} if kept is None else kept.files).items():
        runs.write(run.folder / name, content)
