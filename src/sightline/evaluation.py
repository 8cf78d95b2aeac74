"""Methods x metrics over a data set, with intervals and controls."""

import csv
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped, UInt8
from torch import Tensor, nn

from sightline import maps as pixels
from sightline.data import ImageSet, normalise
from sightline.explainers import Explanation, Method, Progress, attention_maps, explain, fitting, named
from sightline.inference import check_images, either, forward
from sightline.metrics import METRICS
from sightline.metrics.uncertainty import Interval, mean_interval, wilson_interval
from sightline.runs import plain, write

Array = np.ndarray

_MEAN_MAP_SIDE = 32
_FEW_GROUPS = 20
_UNDEFINED_SHARE = 0.1  # of the images; a method with more is not compared


@dataclass(frozen=True, kw_only=True)
class Score:
    """One cell of the methods-by-metrics table."""

    method: str
    metric: str
    interval: Interval
    undefined: int
    """Images that this metric leaves out (an empty mask, a flat map, a non-finite value)."""


@dataclass(frozen=True, kw_only=True)
class Standing:
    """The best method of a metric, controls left out, and what it does not beat.

    One beats another if the 95 % interval of their difference, image by image, lies above 0.
    """

    best: str
    tied: tuple[str, ...]
    """Methods that cannot be told apart from it."""
    unbeaten: tuple[str, ...]
    """Controls, and `chance`, that it does not beat."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One image with everything the report shows of it."""

    name: str
    image: UInt8[Array, "h w 3"]
    label: str | None
    prediction: str
    probability: float
    """Softmax probability of the prediction."""
    maps: dict[str, Float[Array, "_ _"]]
    """Raw map per method, at the method's own resolution; controls left out."""
    verdicts: dict[str, list[str]]
    """What to distrust, per method; an empty list is a clean map."""
    mask: Bool[Array, "h w"] | None = None


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What `evaluate` found. `to_json` and `to_csv` write it; `sightline.report` draws it."""

    data: str
    """Name of the data set."""
    split: str
    model: str
    n_images: int
    unit: str
    """What an interval resamples: `images`, or the name of the group column."""
    classes: tuple[str, ...]
    methods: tuple[str, ...]
    controls: tuple[str, ...]
    """Those of `methods` that never look at the model."""
    signed: tuple[str, ...] = ()
    """Those of `methods` whose negative values speak against the class."""
    layers: dict[str, str]
    """method -> where its map was read, for example `features.conv13 (512 x 5 x 5)`."""
    metrics: tuple[str, ...]
    higher_is_better: dict[str, bool]
    chance: dict[str, float]
    """metric -> the value that a map without knowledge is expected to reach, where there is such a value."""
    scores: tuple[Score, ...]
    accuracy: Interval | None
    """None where the images have no labels."""
    majority: float | None
    """Accuracy of always answering the most frequent class of these images."""
    confusion: Int[Array, "c c"] | None
    """Counts, rows = true class, columns = predicted class."""
    per_image: dict[str, list[str] | list[int] | list[float]]
    """Columns of equal length: name, group, label, prediction, probability, then `metric/method`."""
    examples: tuple[Example, ...]
    errors: tuple[Example, ...]
    """The most confident wrong answers, most confident first."""
    mean_maps: dict[str, dict[str, Float[Array, "_ _"]]]
    """method -> predicted class -> mean of the maps, each scaled to [0, 1], signed ones to [-1, 1]."""
    verdicts: dict[str, dict[str, int]]
    """method -> verdict -> number of images."""
    standings: dict[str, Standing]
    """metric -> how its best method stands to the others; left out where no method is defined for enough images."""
    summary: tuple[str, ...]
    """Sentences in plain words, none stronger than its interval."""
    skipped: tuple[tuple[str, str], ...]
    """Images that could not be read, with the reason."""
    provenance: dict[str, str]
    """command, seed, date, wall time, hardware, versions."""

    def score(self, method: str, metric: str) -> Score:
        """One cell of the table.

        Raises:
            KeyError: no such cell.
        """
        for score in self.scores:
            if (score.method, score.metric) == (method, metric):
                return score
        raise KeyError(
            f"expected methods {', '.join(self.methods)} x metrics {', '.join(self.metrics)}, got {(method, metric)}"
        )

    def to_json(self, path: Path | str) -> Path:
        """Write everything but the pictures; values that are not finite become null."""
        left_out = ("per_image", "examples", "errors", "mean_maps")
        facts = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in left_out}
        path = Path(path)
        write(path, json.dumps(plain(facts), indent=1).encode())
        return path

    def to_csv(self, path: Path | str) -> Path:
        """Write the table of scores of each image, one row per image."""
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(self.per_image)
        writer.writerows(zip(*self.per_image.values(), strict=True))
        path = Path(path)
        write(path, text.getvalue().encode())
        return path


def evaluate(
    model: nn.Module,
    data: ImageSet | Iterable[Any],
    methods: Sequence[Method] | None = None,
    metrics: Sequence[str] | None = None,
    *,
    controls: Sequence[Method] = ("random_map", "centre_map", "edge_map", "contrast_map"),
    limit: int = 500,
    steps: int = 32,
    fill: str | float = "zero",
    batch_size: int = 64,
    examples: int = 24,
    seed: int = 0,
    name: str | None = None,
    classes: Sequence[str] | None = None,
    provenance: dict[str, str] | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Score every method by every metric on the same images, the controls beside them.

    `data` is an `ImageSet`, or batches of normalised images: tuples (images, labels) or (images, labels, masks), or
    dicts with `images` and, as known, `labels`, `masks`, `names`, `groups`. Accuracy counts all images; maps are made
    for `limit` of them, drawn by `seed`. The predicted class is explained. `methods=None` takes the attention of each
    block, and activation map, CAM and Grad-CAM as far as this model has evidence for them; they are given as in
    `explain`. `metrics=None` takes every metric that the data has masks for. What never looks at the model is a
    control, wherever it is named.

    Intervals are 95 % percentile bootstrap (2,000 resamples, seeded) of images, or of whole groups where there are
    groups; with fewer than about 20 groups they come out too narrow. The interval of an accuracy without groups is
    Wilson's.

    Raises:
        ValueError: an unknown method or metric, a metric that needs masks where there are none, no image at all.

    >>> from sightline.testing import PooledModel
    >>> images, masks = torch.rand(8, 3, 4, 4, generator=torch.Generator().manual_seed(0)), torch.ones(8, 1, 4, 4) > 0
    >>> data = [(images, torch.zeros(8, dtype=torch.long), masks)]
    >>> found = evaluate(PooledModel(torch.eye(3)), data, ["cam"], ["energy_in_mask"], controls=["centre_map"])
    >>> found.score("cam", "energy_in_mask").interval.value, found.chance["energy_in_mask"]
    (1.0, 1.0)
    """
    _check(metrics or (), METRICS, "metric")
    asked = {named(method)[0]: method for method in [*(methods or ()), *controls]}
    blind = tuple(name for name, method in asked.items() if named(method)[1].is_control)
    if looking := [name for name in (named(control)[0] for control in controls) if name not in blind]:
        raise ValueError(f"expected controls that never look at the model, got {looking[0]!r}; give it as a method")
    report = progress or (lambda what, done, total: None)
    source = _Source(model, data, batch_size, classes)
    answers = _predict(model, source, report)
    if metrics is None:
        metrics = [metric for metric in METRICS if source.has_masks or not _needs_masks(metric)]
    for metric in metrics:
        if _needs_masks(metric) and not source.has_masks:
            raise ValueError(
                f"expected masks or boxes for {metric}, got data without; name their column or drop {metric}"
            )
    drawn = np.random.default_rng(seed).permutation(len(answers.labels))[:limit]
    chosen, gallery = np.sort(drawn), np.sort(drawn[:examples])
    if methods is None:
        own = _methods_of(model, next(source.batches(chosen[:1])).images)
        asked = {name: name for name in own} | asked
    names = tuple(asked)

    labelled = answers.labels >= 0
    wrong = np.flatnonzero(labelled & (answers.labels != answers.predictions))
    wrong = wrong[np.argsort(-answers.certainty[wrong], kind="stable")][: max(examples // 2, 1)]
    seen = _Seen(answers, asked, blind, tuple(metrics))
    options: dict[str, Any] = {"steps": steps, "fill": fill, "batch_size": batch_size}
    if fill == "black":
        options |= {"mean": source.mean, "std": source.std}
    for batch in source.batches(chosen):
        explanation = seen.explain(model, batch)
        seen.show(explanation, batch, np.union1d(gallery, wrong))
        seen.score(model, explanation, batch, options)
        report("explaining and scoring", seen.scored, len(chosen))
    for batch in source.batches(np.setdiff1d(wrong, chosen)):
        seen.show(seen.explain(model, batch), batch, wrong)

    groups = None if answers.groups is None else answers.groups[chosen]
    table = {key: torch.cat(values).numpy() for key, values in seen.values.items()}
    accuracy, majority, confusion = answers.quality(seed)
    found = Evaluation(
        data=name or source.name,
        split=source.split,
        model=type(model).__name__,
        n_images=len(answers.labels),
        unit=source.unit,
        classes=answers.classes,
        methods=names,
        controls=blind,
        signed=seen.signed,
        layers=seen.layers,
        metrics=tuple(metrics),
        higher_is_better={metric: bool(METRICS[metric].higher_is_better) for metric in metrics},
        chance={metric: float(np.mean(seen.areas)) for metric in metrics if _needs_masks(metric) and seen.areas},
        scores=tuple(
            Score(
                method=method,
                metric=metric,
                interval=mean_interval(table[method, metric], groups, seed),
                undefined=int(np.isnan(table[method, metric]).sum()),
            )
            for method in names
            for metric in metrics
        ),
        accuracy=accuracy,
        majority=majority,
        confusion=confusion,
        per_image=answers.columns(chosen, source.unit)
        | {f"{metric}/{method}": table[method, metric].tolist() for metric in metrics for method in names},
        examples=tuple(seen.examples[row] for row in gallery.tolist()),
        errors=tuple(seen.examples[row] for row in wrong.tolist()),
        mean_maps=seen.mean_maps(),
        verdicts={method: dict(counts) for method, counts in seen.verdicts.items()},
        standings={},
        summary=(),
        skipped=tuple(source.skipped),
        provenance={"seed": str(seed), "images with maps": str(len(chosen)), **(provenance or {})},
    )
    for metric in metrics:
        standing = standing_of(
            {method: table[method, metric] for method in names},
            blind,
            higher_is_better=found.higher_is_better[metric],
            chance=found.chance.get(metric),
            groups=groups,
            seed=seed,
        )
        if standing is not None:
            found.standings[metric] = standing
    by_class = {name for name, method in asked.items() if not named(method)[1].is_blind_to_class}
    return replace(found, summary=tuple(_summary(found, answers, by_class)))


@dataclass(frozen=True)
class _Known:
    """A batch in one form, whatever it came as."""

    images: Tensor
    labels: Tensor
    masks: Tensor | None
    names: list[str]
    groups: list[str] | None
    rows: Tensor
    """Place of each image among all."""
    pictures: Tensor
    """uint8, to be shown."""

    def picked(self, keep: Tensor) -> "_Known | None":
        if keep.all():
            return self
        if not keep.any():
            return None
        at = keep.nonzero()[:, 0]
        on = at.to(self.images.device)
        return _Known(
            images=self.images[on],
            labels=self.labels[at],
            masks=None if self.masks is None else self.masks[on],
            names=[self.names[i] for i in at.tolist()],
            groups=None if self.groups is None else [self.groups[i] for i in at.tolist()],
            rows=self.rows[at],
            pictures=self.pictures[at],
        )


class _Source:
    """The data to evaluate, and what is learned of it on the first pass."""

    def __init__(self, model: nn.Module, data: Any, batch_size: int, classes: Sequence[str] | None) -> None:
        weights = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(0))
        self.device, self.dtype = weights.device, weights.dtype
        self.data = data
        self.batch_size = batch_size
        self.has_masks = False
        own = data if isinstance(data, ImageSet) else None
        if own is None and isinstance(data, Iterator):
            raise ValueError("expected data that can be read twice, got an iterator; pass a list or a DataLoader")
        self.name = own.name if own else "images"
        self.split = own.split if own else ""
        self.unit = (own.group_name or "images") if own else "images"
        self.classes = classes or (own.classes if own else None)
        self.skipped = list(own.skipped) if own else []
        self.mean, self.std = (own.preprocess.mean, own.preprocess.std) if own else (None, None)
        self.total = len(own) if own else 0

    def batches(self, rows: Array | None) -> Iterator[_Known]:
        """All images, or those at sorted places."""
        if isinstance(self.data, ImageSet):
            yield from self._own(self.data, np.arange(len(self.data)) if rows is None else rows)
            return
        start = 0
        wanted = None if rows is None else torch.from_numpy(rows)
        for batch in self.data:
            known = self._foreign(batch, start)
            start += len(known.names)
            picked = known if wanted is None else known.picked(torch.isin(known.rows, wanted))
            if picked is not None:
                yield picked

    def _own(self, images: ImageSet, rows: Array) -> Iterator[_Known]:
        for at in range(0, len(rows), self.batch_size):
            batch = images.batch(rows[at : at + self.batch_size])
            pictures = batch.images
            batch = batch.to(self.device)
            yield _Known(
                images=normalise(batch.images, images.preprocess).to(self.dtype),
                labels=batch.labels.cpu(),
                masks=batch.regions,
                names=batch.names,
                groups=None if images.groups is None else [str(images.groups[i]) for i in batch.indices.tolist()],
                rows=batch.indices.cpu(),
                pictures=pictures,
            )

    def _foreign(self, batch: Any, start: int) -> _Known:
        if isinstance(batch, tuple | list):
            batch = dict(zip(("images", "labels", "masks"), batch, strict=False))
        if not isinstance(batch, dict) or not isinstance(batch.get("images"), Tensor):
            raise ValueError(
                f"expected batches (images, labels[, masks]) or dicts with 'images', got {type(batch).__name__}"
            )
        where = f"the batch that starts with image {start}"
        check_images(batch["images"])
        images, masks = batch["images"].to(self.device), batch.get("masks")
        count = len(images)
        labels = torch.as_tensor(batch.get("labels", [-1] * count)).cpu()
        if labels.shape != (count,) or labels.is_floating_point() or labels.dtype == torch.bool:
            raise ValueError(
                f"expected {count} class numbers as labels in {where}, got {labels.dtype} of shape "
                f"{tuple(labels.shape)}; give one whole number per image, -1 where it is unknown"
            )
        if masks is not None and masks.shape != (count, 1, *images.shape[2:]):
            raise ValueError(
                f"expected masks of shape {(count, 1, *images.shape[2:])} in {where}, got {tuple(masks.shape)}; "
                "make them as large as the images"
            )
        for key in ("names", "groups"):
            if key in batch and len(batch[key]) != count:
                raise ValueError(f"expected {count} {key} in {where}, got {len(batch[key])}; give one per image")
        low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
        pictures = ((images - low) / (high - low).clamp(min=1e-12) * 255).round().to(torch.uint8).cpu()
        return _Known(
            images=images,
            labels=labels.long(),
            masks=None if masks is None else masks.to(self.device).bool(),
            names=list(batch.get("names", [f"image {start + i}" for i in range(count)])),
            groups=[str(group) for group in batch["groups"]] if "groups" in batch else None,
            rows=torch.arange(start, start + count),
            pictures=pictures.expand(-1, 3, -1, -1) if pictures.shape[1] == 1 else pictures[:, :3],
        )


@dataclass(frozen=True)
class _Answers:
    """What the model said of all images, and what is known of them."""

    classes: tuple[str, ...]
    labels: Int[Array, " n"]
    predictions: Int[Array, " n"]
    certainty: Float[Array, " n"]
    """Softmax probability of the prediction."""
    names: list[str]
    groups: Array | None

    def quality(self, seed: int) -> tuple[Interval | None, float | None, Array | None]:
        """Accuracy, share of the most frequent class, confusion matrix; of the labelled images."""
        known = self.labels >= 0
        if not known.any():
            return None, None, None
        labels, predictions = self.labels[known], self.predictions[known]
        correct = labels == predictions
        confusion = np.zeros((len(self.classes), len(self.classes)), dtype=np.int64)
        np.add.at(confusion, (labels, predictions), 1)
        if self.groups is None:
            accuracy = wilson_interval(int(correct.sum()), len(correct))
        else:
            accuracy = mean_interval(correct.astype(float), self.groups[known], seed)
        return accuracy, float(confusion.sum(1).max() / len(labels)), confusion

    def columns(self, rows: Array, unit: str) -> dict[str, list[Any]]:
        """The first columns of the table per image."""
        found: dict[str, list[Any]] = {"name": [self.names[row] for row in rows]}
        if self.groups is not None:
            found[unit] = self.groups[rows].tolist()
        return found | {
            "label": [self.classes[i] if i >= 0 else "" for i in self.labels[rows]],
            "prediction": [self.classes[i] for i in self.predictions[rows]],
            "probability": self.certainty[rows].tolist(),
        }


def _predict(model: nn.Module, source: _Source, report: Progress) -> _Answers:
    logits: list[Tensor] = []
    labels: list[int] = []
    names: list[str] = []
    groups: list[str] = []
    masked = True
    for batch in source.batches(None):
        logits.append(forward(model, batch.images, source.batch_size).cpu())
        labels += batch.labels.tolist()
        names += batch.names
        groups += batch.groups or []
        masked &= batch.masks is not None
        report("predicting", len(names), source.total or len(names))
    if not logits:
        raise ValueError("expected at least one image to evaluate, got none; see the list of skipped images")
    source.has_masks = masked
    if groups and source.unit == "images":
        source.unit = "group"
    scores = either(torch.cat(logits))
    certainty, predictions = scores.softmax(1).max(1)
    count = scores.shape[1]
    classes = tuple(source.classes or map(str, range(count)))
    if len(classes) != count:
        raise ValueError(
            f"expected a model with {len(classes)} classes like the data, got {count}; give it its own data"
        )
    if strange := [label for label in labels if not -1 <= label < count]:
        raise ValueError(f"expected labels in 0..{count - 1}, or -1 where unknown, got {strange[0]}; count them from 0")
    return _Answers(
        classes, np.array(labels), predictions.numpy(), certainty.numpy(), names, np.array(groups) if groups else None
    )


class _Seen:
    """Maps of the images so far: their scores, verdicts, means and the examples to show."""

    def __init__(
        self, answers: _Answers, asked: dict[str, Method], controls: tuple[str, ...], metrics: tuple[str, ...]
    ) -> None:
        self.answers, self.asked, self.controls, self.metrics = answers, asked, controls, metrics
        self.methods = methods = tuple(asked)
        self.signed = tuple(name for name, method in asked.items() if named(method)[1].is_signed)
        self.values: dict[tuple[str, str], list[Tensor]] = {(x, y): [] for x in methods for y in metrics}
        self.verdicts: dict[str, Counter[str]] = {method: Counter() for method in methods}
        self.layers: dict[str, str] = {}
        self.areas: list[float] = []
        self.examples: dict[int, Example] = {}
        self.sums: dict[tuple[str, int], Tensor] = {}
        self.counts: Counter[tuple[str, int]] = Counter()
        self.scored = 0

    def explain(self, model: nn.Module, batch: _Known) -> Explanation:
        """Maps of the predicted class by every method."""
        targets = torch.from_numpy(self.answers.predictions[batch.rows.numpy()])
        explanation = explain(model, batch.images, targets, list(self.asked.values()))
        self.layers = explanation.layers
        return explanation

    def show(self, explanation: Explanation, batch: _Known, rows: Array) -> None:
        """Keep those images of the batch whose row is among `rows`."""
        answers = self.answers
        for place, row in enumerate(batch.rows.tolist()):
            if row not in rows:
                continue
            label = answers.labels[row]
            shown = [method for method in self.methods if method not in self.controls]
            self.examples[row] = Example(
                name=batch.names[place],
                image=batch.pictures[place].permute(1, 2, 0).numpy(),
                label=answers.classes[label] if label >= 0 else None,
                prediction=answers.classes[answers.predictions[row]],
                probability=float(answers.certainty[row]),
                maps={method: explanation[method][place, 0].float().cpu().numpy() for method in shown},
                verdicts={method: explanation.verdicts[method][place] for method in shown},
                mask=None if batch.masks is None else batch.masks[place, 0].cpu().numpy(),
            )

    def score(self, model: nn.Module, explanation: Explanation, batch: _Known, options: dict[str, Any]) -> None:
        """Every method by every metric."""
        self.scored += len(batch.names)
        if batch.masks is not None:
            areas = batch.masks.float().mean((1, 2, 3))
            self.areas += areas[areas > 0].tolist()  # an empty mask is undefined for the score too
        known = {"model": model, "images": batch.images, "targets": explanation.targets, "masks": batch.masks}
        for method in self.methods:
            maps = explanation[method]
            found = (verdict.partition(":")[0] for image in explanation.verdicts[method] for verdict in image)
            self.verdicts[method].update(found)
            self._add_means(method, maps, batch.rows)
            for metric in self.metrics:
                given = {name: value for name, value in {**known, "maps": maps}.items() if name in _inputs(metric)}
                function = METRICS[metric].function
                values = function(**given, **(options if "steps" in signature(function).parameters else {}))
                self.values[method, metric].append(values.double().cpu())

    def _add_means(self, method: str, maps: Tensor, rows: Tensor) -> None:
        resized = pixels.resize(maps, (_MEAN_MAP_SIDE, _MEAN_MAP_SIDE))[:, 0]
        scaled = pixels.normalise(resized, signed=method in self.signed).double().cpu()
        for image, row in zip(scaled, rows.tolist(), strict=True):
            if image.isfinite().all():
                key = method, int(self.answers.predictions[row])
                self.sums[key] = self.sums.get(key, torch.zeros_like(image)) + image
                self.counts[key] += 1

    def mean_maps(self) -> dict[str, dict[str, Array]]:
        """Mean map by method and predicted class."""
        found: dict[str, dict[str, Array]] = {method: {} for method in self.methods}
        for method, target in sorted(self.sums):
            mean = self.sums[method, target] / self.counts[method, target]
            found[method][self.answers.classes[target]] = mean.float().numpy()
        return found


def _methods_of(model: nn.Module, images: Tensor) -> list[str]:
    """Attention of every block, and what costs no more than the forward, as far as this model has evidence for it."""
    methods, _ = fitting(model, images, ("attention", "activation_map", "cam", "grad_cam"))
    gates = [name for name, gate in attention_maps(model, images).items() if gate.shape[2] * gate.shape[3] > 1]
    return [f"attention@{name}" for name in gates] + methods[1:] if len(gates) > 1 else methods


def standing_of(
    values: dict[str, Float[Array, " n"]],
    controls: Sequence[str] = (),
    *,
    higher_is_better: bool = True,
    chance: float | None = None,
    groups: Shaped[Array, " n"] | None = None,
    seed: int = 0,
) -> Standing | None:
    """Who is best in a metric, from its values per image (NaN where undefined); None if no method can be compared.

    A method that is undefined for more than a tenth of the images is not compared.

    >>> hard = np.random.default_rng(0).normal(size=50)  # images differ more than methods do
    >>> noise = np.tile([0.3, -0.3], 25)
    >>> standing_of({"a": hard + 0.1, "b": hard, "c": hard + 0.05 + noise, "edges": hard}, ["edges"])
    Standing(best='a', tied=('c',), unbeaten=())
    """
    sign = 1 if higher_is_better else -1
    means = {
        method: sign * float(np.nanmean(of))
        for method, of in values.items()
        if method not in controls and np.isnan(of).mean() <= _UNDEFINED_SHARE
    }
    if not means:
        return None

    def beats(a: str, b: str) -> bool:
        return mean_interval(sign * (values[a] - values[b]), groups, seed).low > 0

    best = max(means, key=lambda method: means[method])
    unbeaten = [control for control in controls if not beats(best, control)]
    if chance is not None and not mean_interval(sign * (values[best] - chance), groups, seed).low > 0:
        unbeaten.append("chance")
    tied = tuple(method for method in means if method != best and not beats(best, method))
    return Standing(best=best, tied=tied, unbeaten=tuple(unbeaten))


def _summary(found: Evaluation, answers: "_Answers", by_class: set[str]) -> Iterator[str]:
    """What the numbers say in plain words; nothing that its interval does not bear. `by_class`: methods that ask it."""
    if found.accuracy is not None and found.majority is not None:
        better = "better than" if found.accuracy.low > found.majority else "not reliably better than"
        labelled = int((answers.labels >= 0).sum())
        yield (
            f"The model names the right class in {_percent(found.accuracy)} of {labelled:,} images, {better} "
            f"always giving the most frequent answer ({_share(found.majority)})."
        )
        if labelled < found.n_images:
            yield f"{found.n_images - labelled:,} of {found.n_images:,} images have no label and count for no accuracy."
        absent = [name for i, name in enumerate(found.classes) if not (answers.labels == i).any()]
        if absent:
            yield f"No image shows {_few(absent)}: nothing is known of the accuracy there."
    made = int(found.provenance["images with maps"])
    units = found.scores[0].interval.n if found.scores else 0
    if found.unit != "images" and units < _FEW_GROUPS:
        yield f"Only {units} groups ({found.unit}) stand behind the intervals, which therefore are too narrow."
    real = [method for method in found.methods if method not in found.controls]
    for metric in found.metrics:
        for method in real:
            left = made - found.score(method, metric).undefined
            if left < (1 - _UNDEFINED_SHARE) * made:
                yield f"{metric} of {method} is defined for {left} of {made} images only and is not compared."
        if metric not in found.standings:
            continue
        standing = found.standings[metric]
        score = found.score(standing.best, metric).interval
        if standing.unbeaten:
            rivals = ", ".join(standing.unbeaten)
            yield f"No map reliably beats {rivals} in {metric}; the best is {standing.best} with {_figures(score)}."
            continue
        best = " and ".join([standing.best, *standing.tied])
        text = METRICS[metric].sentence.format(method=best, score=_figures(score))
        if metric in found.chance:
            times = score.value / found.chance[metric]
            text += f", {times:.1f} times what a map without knowledge reaches ({found.chance[metric]:.3f})"
        if standing.tied:
            text += f"; the figures are those of {standing.best}, the others cannot be told apart from it"
        yield text + ("; every control map is beaten." if found.controls else ".")
    for method in real:
        for verdict, count in found.verdicts[method].items():
            if verdict != "rectifiers intercepted" and (verdict != "class-independent" or method in by_class):
                yield f"{count} of {made} maps of {method} {'have a' if ' ' in verdict else 'are'} {verdict}."
    if found.skipped:
        yield f"{len(found.skipped)} images could not be read and were left out."


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} other classes" if len(names) > 5 else "")


def _share(share: float) -> str:
    return f"{100 * share:.1f} %"


def _percent(interval: Interval) -> str:
    return f"{_share(interval.value)} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def _figures(interval: Interval) -> str:
    return f"{interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def _inputs(metric: str) -> set[str]:
    """Names of what a metric asks for."""
    parameters = signature(METRICS[metric].function).parameters.values()
    return {p.name for p in parameters if p.default is p.empty}


def _needs_masks(metric: str) -> bool:
    return "masks" in _inputs(metric)


def _check(names: Sequence[str], among: Iterable[str], what: str) -> None:
    for name in names:
        if name not in among:
            close = get_close_matches(name, among, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(among)}"
            raise ValueError(f"expected the name of a {what}, got {name!r}; {hint}")
