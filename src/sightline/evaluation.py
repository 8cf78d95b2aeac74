"""Methods x metrics over a data set, with intervals and controls."""

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, is_dataclass, replace
from difflib import get_close_matches
from inspect import signature
from math import isnan, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn

from sightline import maps as pixels
from sightline.data import ImageSet, normalise
from sightline.explainers import EXPLAINERS, Explanation, attention_maps, explain, find_explainer
from sightline.inference import forward
from sightline.metrics import METRICS

Array = np.ndarray
Progress = Callable[[str, int, int], None]
"""Called with (what is being done, images done, images in all)."""

_RESAMPLES = 2000
_MEAN_MAP_SIDE = 32


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean with its 95 % interval."""

    value: float
    low: float
    high: float
    n: int
    """Independent units behind it: images, or groups where a group column is named."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """One cell of the methods-by-metrics table."""

    method: str
    metric: str
    interval: Interval
    undefined: int
    """Images that this metric leaves out (an empty mask, a flat map, a non-finite value)."""


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
    """method -> class -> mean of the maps scaled to [0, 1]."""
    verdicts: dict[str, dict[str, int]]
    """method -> verdict -> number of images."""
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
        return _write(Path(path), json.dumps(_plain(facts), indent=1))

    def to_csv(self, path: Path | str) -> Path:
        """Write the table of scores of each image, one row per image."""
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(self.per_image)
        writer.writerows(zip(*self.per_image.values(), strict=True))
        return _write(Path(path), text.getvalue())


def evaluate(
    model: nn.Module,
    data: ImageSet | Iterable[Any],
    methods: Sequence[str] | None = None,
    metrics: Sequence[str] | None = None,
    *,
    controls: Sequence[str] = ("random_map", "centre_map", "edge_map", "contrast_map"),
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
    for `limit` of them, drawn by `seed`. The predicted class is explained. `methods=None` takes every method that this
    model has evidence for, each attention block for itself; `metrics=None` every metric that the data has masks for.

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
    metrics = _known(metrics, METRICS, "metric")
    controls = _known(controls, EXPLAINERS, "control") or []
    for method in methods or ():
        find_explainer(method.partition("@")[0])
    report = progress or (lambda what, done, total: None)
    source = _Source(model, data, batch_size, classes)

    logits: list[Tensor] = []
    for batch in source.batches(None):
        logits.append(forward(model, batch.images, batch_size).cpu())
        source.collect(batch)
        report("predicting", len(source.names), source.total)
    if not logits:
        raise ValueError("expected at least one image to evaluate, got none; see the list of skipped images")
    probabilities = torch.cat(logits).softmax(1)
    certainty, predictions = probabilities.max(1)
    labels = torch.tensor(source.labels)
    names = source.class_names(probabilities.shape[1])
    n = len(labels)
    chosen = np.sort(np.random.default_rng(seed).permutation(n)[:limit])

    has_masks = source.has_masks
    if metrics is None:
        metrics = [metric for metric in METRICS if has_masks or not _needs_masks(metric)]
    if not has_masks and any(map(_needs_masks, metrics)):
        needing = next(filter(_needs_masks, metrics))
        raise ValueError(
            f"expected masks or boxes for {needing}, got data without them; name their column or drop the metric"
        )
    if methods is None:
        methods = _methods_of(model, next(iter(source.batches(chosen[:1]))).images)
    methods = list(dict.fromkeys([*methods, *controls]))

    maps = _Maps(names)
    values: dict[tuple[str, str], list[Tensor]] = {(method, metric): [] for metric in metrics for method in methods}
    verdicts: dict[str, Counter[str]] = {method: Counter() for method in methods}
    layers: dict[str, str] = {}
    areas: list[Tensor] = []
    shown: dict[int, Example] = {}
    wrong = [int(i) for i in certainty.argsort(descending=True) if 0 <= labels[i] != predictions[i]]
    errors_wanted = set(wrong[: max(examples // 2, 1)])
    examples_wanted = set(chosen[:examples].tolist())
    needed = np.array(sorted(set(chosen.tolist()) | errors_wanted))
    among = set(chosen.tolist())
    done = 0
    for batch in source.batches(needed):
        targets = predictions[batch.rows].to(batch.images.device)
        explanation = explain(model, batch.images, targets, methods)
        layers |= explanation.layers
        for place, row in enumerate(batch.rows.tolist()):
            if row in examples_wanted | errors_wanted:
                shown[row] = _example(explanation, place, batch, row, names, source, certainty, predictions, controls)
        keep = torch.tensor([row in among for row in batch.rows.tolist()])
        picked = batch.picked(keep)
        if picked is None:
            continue
        if picked.masks is not None:
            areas.append(picked.masks.float().mean((1, 2, 3)).cpu())
        for method in methods:
            made = explanation[method][keep.to(batch.images.device)]
            maps.add(method, made, [names[int(predictions[row])] for row in picked.rows])
            for place in keep.nonzero()[:, 0].tolist():
                verdicts[method].update(explanation.verdicts[method][place])
            named = {"model": model, "images": picked.images, "maps": made, "masks": picked.masks}
            named |= {"targets": targets[keep.to(targets.device)]}
            for metric in metrics:
                options: dict[str, Any] = {} if _needs_masks(metric) else {"steps": steps, "fill": fill}
                if fill == "black" and options:
                    options |= {"mean": source.mean, "std": source.std}
                wanted = METRICS[metric].function
                inputs = {key: value for key, value in named.items() if key in _inputs(metric)}
                values[method, metric].append(wanted(**inputs, **options).double().cpu())
        done += int(keep.sum())
        report("explaining and scoring", done, len(chosen))

    groups = np.array(source.groups) if source.groups else None
    chosen_groups = None if groups is None else groups[chosen]
    table = {key: torch.cat(value).numpy() for key, value in values.items()}
    scores = tuple(
        Score(
            method=method,
            metric=metric,
            interval=mean_interval(table[method, metric], chosen_groups, seed),
            undefined=int(np.isnan(table[method, metric]).sum()),
        )
        for method in methods
        for metric in metrics
    )
    labelled = (labels >= 0).numpy()
    accuracy = majority = confusion = None
    if labelled.any():
        correct = (predictions == labels).numpy()[labelled]
        accuracy = (
            wilson_interval(int(correct.sum()), len(correct))
            if groups is None
            else mean_interval(correct.astype(float), groups[labelled], seed)
        )
        counts = np.bincount(labels.numpy()[labelled], minlength=len(names))
        majority = float(counts.max() / counts.sum())
        confusion = np.zeros((len(names), len(names)), dtype=np.int64)
        np.add.at(confusion, (labels.numpy()[labelled], predictions.numpy()[labelled]), 1)
    area = float(torch.cat(areas).mean()) if areas else None
    per_image: dict[str, list[Any]] = {"name": [source.names[i] for i in chosen]}
    if source.groups:
        per_image[source.unit] = [source.groups[i] for i in chosen]
    per_image |= {
        "label": [names[i] if i >= 0 else "" for i in labels[chosen].tolist()],
        "prediction": [names[i] for i in predictions[chosen].tolist()],
        "probability": certainty[chosen].tolist(),
    }
    per_image |= {f"{metric}/{method}": table[method, metric].tolist() for metric in metrics for method in methods}
    found = Evaluation(
        data=name or source.name,
        split=source.split,
        model=type(model).__name__,
        n_images=n,
        unit=source.unit,
        classes=names,
        methods=tuple(methods),
        controls=tuple(controls),
        layers=layers,
        metrics=tuple(metrics),
        higher_is_better={metric: bool(METRICS[metric].higher_is_better) for metric in metrics},
        chance={metric: area for metric in metrics if area is not None and _needs_masks(metric)},
        scores=scores,
        accuracy=accuracy,
        majority=majority,
        confusion=confusion,
        per_image=per_image,
        examples=tuple(shown[row] for row in sorted(examples_wanted)),
        errors=tuple(shown[row] for row in wrong[: len(errors_wanted)]),
        mean_maps=maps.means(),
        verdicts={method: dict(counts) for method, counts in verdicts.items()},
        summary=(),
        skipped=tuple(source.skipped),
        provenance={"seed": str(seed), "images with maps": str(len(chosen)), **(provenance or {})},
    )
    return replace(found, summary=tuple(_summary(found, table, chosen_groups, seed)))


def mean_interval(values: Float[Array, " n"], groups: Array | None = None, seed: int = 0) -> Interval:
    """Mean of the values that are not NaN, with its 95 % percentile bootstrap interval over values or groups.

    >>> mean_interval(np.array([1.0, 1.0, np.nan]))
    Interval(value=1.0, low=1.0, high=1.0, n=2)
    """
    defined = ~np.isnan(values)
    values = values[defined]
    if not len(values):
        return Interval(value=float("nan"), low=float("nan"), high=float("nan"), n=0)
    sums, counts = values, np.ones_like(values)
    if groups is not None:
        _, which = np.unique(groups[defined], return_inverse=True)
        sums, counts = np.bincount(which, values), np.bincount(which).astype(float)
    rng = np.random.default_rng(seed)
    means: list[Array] = []
    for _ in range(0, _RESAMPLES, 100):
        draws = rng.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=100)
        means.append((draws @ sums) / (draws @ counts))
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return Interval(value=float(values.mean()), low=float(low), high=float(high), n=len(sums))


def wilson_interval(hits: int, n: int) -> Interval:
    """Share of hits with Wilson's 95 % interval, which is honest at 0 and 1 too.

    Source: Wilson 1927, Probable inference, the law of succession, and statistical inference.

    >>> interval = wilson_interval(10, 10)
    >>> interval.value, round(interval.low, 3), round(interval.high, 3)
    (1.0, 0.722, 1.0)
    """
    z = 1.959963984540054
    share = hits / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    reach = z * sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return Interval(value=share, low=max(0.0, middle - reach), high=min(1.0, middle + reach), n=n)


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
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.data = data
        self.batch_size = batch_size
        self.labels: list[int] = []
        self.names: list[str] = []
        self.groups: list[str] = []
        self.has_masks = True
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

    def class_names(self, count: int) -> tuple[str, ...]:
        names = tuple(self.classes or map(str, range(count)))
        if len(names) != count:
            raise ValueError(
                f"expected a model with {len(names)} classes like the data, got {count}; evaluate it on its own data"
            )
        return names

    def collect(self, batch: _Known) -> None:
        self.labels += batch.labels.tolist()
        self.names += batch.names
        self.groups += batch.groups or []
        self.has_masks &= batch.masks is not None
        self.unit = "group" if batch.groups and self.unit == "images" else self.unit

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
                images=normalise(batch.images, images.preprocess),
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
        images, masks = batch["images"].to(self.device), batch.get("masks")
        count = len(images)
        low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
        pictures = ((images - low) / (high - low).clamp(min=1e-12) * 255).round().to(torch.uint8).cpu()
        return _Known(
            images=images,
            labels=torch.as_tensor(batch.get("labels", [-1] * count)).cpu(),
            masks=None if masks is None else masks.to(self.device).bool(),
            names=list(batch.get("names", [f"image {start + i}" for i in range(count)])),
            groups=[str(group) for group in batch["groups"]] if "groups" in batch else None,
            rows=torch.arange(start, start + count),
            pictures=pictures.expand(-1, 3, -1, -1) if pictures.shape[1] == 1 else pictures[:, :3],
        )


class _Maps:
    """Running means of the maps of each class."""

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = classes
        self.sums: dict[tuple[str, str], Tensor] = {}
        self.counts: Counter[tuple[str, str]] = Counter()

    def add(self, method: str, maps: Tensor, classes: Sequence[str]) -> None:
        scaled = pixels.normalise(pixels.resize(maps, (_MEAN_MAP_SIDE, _MEAN_MAP_SIDE)))[:, 0].double().cpu()
        for image, name in zip(scaled, classes, strict=True):
            if image.isfinite().all():
                self.sums[method, name] = self.sums.get((method, name), torch.zeros_like(image)) + image
                self.counts[method, name] += 1

    def means(self) -> dict[str, dict[str, Array]]:
        found: dict[str, dict[str, Array]] = {}
        for name in self.classes:
            for method, of in self.sums:
                if of == name:
                    mean = self.sums[method, name] / self.counts[method, name]
                    found.setdefault(method, {})[name] = mean.float().numpy()
        return found


def _example(
    explanation: Explanation,
    place: int,
    batch: _Known,
    row: int,
    names: tuple[str, ...],
    source: _Source,
    certainty: Tensor,
    predictions: Tensor,
    controls: Sequence[str],
) -> Example:
    label = source.labels[row]
    methods = [method for method in explanation.maps if method not in controls]
    return Example(
        name=batch.names[place],
        image=batch.pictures[place].permute(1, 2, 0).numpy(),
        label=names[label] if label >= 0 else None,
        prediction=names[int(predictions[row])],
        probability=float(certainty[row]),
        maps={method: explanation[method][place, 0].float().cpu().numpy() for method in methods},
        verdicts={method: explanation.verdicts[method][place] for method in methods},
        mask=None if batch.masks is None else batch.masks[place, 0].cpu().numpy(),
    )


def _methods_of(model: nn.Module, images: Tensor) -> list[str]:
    """Every method that this model has evidence for."""
    gates = [name for name, gate in attention_maps(model, images).items() if gate.shape[2] * gate.shape[3] > 1]
    methods = [f"attention@{name}" for name in gates] if len(gates) > 1 else ["attention"] * len(gates)
    for method, explainer in EXPLAINERS.items():
        if method != "attention" and not explainer.is_control:
            try:
                explainer(model, images)
            except ValueError:
                continue
            methods.append(method)
    return methods


def _summary(found: Evaluation, table: dict[tuple[str, str], Array], groups: Array | None, seed: int) -> Iterator[str]:
    """What the numbers say in plain words; nothing that its interval does not bear."""
    if found.accuracy is not None and found.majority is not None:
        better = "better than" if found.accuracy.low > found.majority else "not reliably better than"
        yield (
            f"The model names the right class in {_percent(found.accuracy)} of {found.n_images:,} images, {better} "
            f"always giving the most frequent answer ({found.majority:.1%})."
        )
    real = [method for method in found.methods if method not in found.controls]
    for metric in found.metrics:
        sign = 1 if found.higher_is_better[metric] else -1
        ranked = sorted(
            (m for m in real if not isnan(found.score(m, metric).interval.value)),
            key=lambda m: sign * found.score(m, metric).interval.value,
            reverse=True,
        )
        if not ranked:
            continue
        best = found.score(ranked[0], metric)
        text = f"{metric}: {best.method} is best with {_figures(best.interval)}"
        if metric in found.chance:
            times = best.interval.value / found.chance[metric]
            text += f", {times:.1f} times what a map without knowledge reaches ({found.chance[metric]:.3f})"
        beaten = [
            control
            for control in found.controls
            if mean_interval(sign * (table[best.method, metric] - table[control, metric]), groups, seed).low > 0
        ]
        if found.controls:
            rest = [control for control in found.controls if control not in beaten]
            text += "; it beats every control" if not rest else f"; it does not reliably beat {', '.join(rest)}"
        tied = [
            m
            for m in ranked[1:]
            if not mean_interval(sign * (table[best.method, metric] - table[m, metric]), groups, seed).low > 0
        ]
        text += f"; {', '.join(tied)} cannot be told apart from it." if tied else "."
        yield text
    made = int(found.provenance["images with maps"])
    for method in real:
        for verdict, count in found.verdicts[method].items():
            yield f"{count} of {made} maps of {method} are {verdict}: they say nothing about where the model looks."
    if found.skipped:
        yield f"{len(found.skipped)} images could not be read and were left out."


def _percent(interval: Interval) -> str:
    return f"{interval.value:.1%} [{interval.low:.1%}, {interval.high:.1%}]"


def _figures(interval: Interval) -> str:
    return f"{interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def _inputs(metric: str) -> set[str]:
    """Names of what a metric asks for."""
    parameters = signature(METRICS[metric].function).parameters.values()
    return {p.name for p in parameters if p.default is p.empty}


def _needs_masks(metric: str) -> bool:
    return "masks" in _inputs(metric)


def _known(names: Sequence[str] | None, among: Iterable[str], what: str) -> list[str] | None:
    for name in names or ():
        if name not in among:
            close = get_close_matches(name, among, n=1, cutoff=0.4)
            hint = f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(among)}"
            raise ValueError(f"expected the name of a {what}, got {name!r}; {hint}")
    return None if names is None else list(names)


def _plain(value: Any) -> Any:
    """JSON's own types; NaN and infinities become None."""
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    partial.write_text(text, encoding="utf-8", newline="")
    os.replace(partial, path)
    return path
