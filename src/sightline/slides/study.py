"""Training on bags: attention beside controls; slides are predicted by networks that saw no slide of their patient."""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from sightline import runs
from sightline.checks import missing
from sightline.data.slides import SLIDES
from sightline.facts import Interval, Progress
from sightline.metrics.uncertainty import interval_of, limits, resamples
from sightline.slides.bags import read_bag
from sightline.slides.pooling import POOLINGS, BagClassifier

Array = np.ndarray
RUN = "slides.json"
CONTROL = "uniform"
PATIENT = "patient"
_STANDARDIZING = 2**17  # most tiles of all slides whose mean and deviation are taken


@dataclass(frozen=True, kw_only=True)
class Labels:
    """A table of slides."""

    slides: tuple[str, ...]
    """File names."""
    labels: tuple[int, ...]
    """Index of each slide's class."""
    classes: tuple[str, ...]
    patients: tuple[str, ...]
    """The slide itself where the table has no patients."""


def read_labels(file: Path, label: str = "label", patient: str = PATIENT, slide: str = "slide") -> Labels:
    """A CSV table with a row per slide: its file name, its class, and its patient if there is such a column.

    Without a column "patient", each slide counts as a patient; a column of another name has to be there.

    Raises:
        OSError: no such file.
        ValueError: it is no such table, a column is missing, a row has no slide or no label, a slide has two rows, or
            there are fewer than two classes.
    """
    with file.open(newline="", encoding="utf-8-sig") as opened:
        try:
            cells = [[cell.strip() for cell in row] for row in csv.reader(opened) if any(map(str.strip, row))]
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{file}: expected a table in CSV, got another file: {error}") from error
    columns = cells[0] if cells else []
    rows = [dict(zip_longest(columns, row[: len(columns)], fillvalue="")) for row in cells[1:]]
    for name in (slide, label, *([patient] if patient != PATIENT else [])):
        if name not in columns:
            raise ValueError(f"{file}: expected a column {name!r}, got {', '.join(columns) or 'none'}; rename one")
    names = [row[slide] for row in rows]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"{file}: expected one row for each slide, got two for {twice}; remove one")
    if "" in names:
        raise ValueError(f"{file}: expected the file name of a slide in every row, got a row without; remove it")
    if empty := next((row[slide] for row in rows if not row[label]), None):
        raise ValueError(
            f"{file}: expected a {label} for every slide, got none for {empty}; fill it in or remove the row"
        )
    classes = tuple(sorted({row[label] for row in rows}))
    if len(classes) < 2:
        raise ValueError(f"{file}: expected two classes or more, got {', '.join(classes) or 'no slide'}")
    return Labels(
        slides=tuple(names),
        labels=tuple(classes.index(row[label]) for row in rows),
        classes=classes,
        patients=tuple((row.get(patient) or row[slide]) for row in rows),
    )


@dataclass(frozen=True, kw_only=True)
class Training:
    """How bag classifiers are trained and compared.

    Raises:
        ValueError: a number is out of its range.
    """

    poolings: tuple[str, ...] = POOLINGS
    folds: int = 5
    """Parts of the patients; each is predicted by networks trained on the others. Fewer if there are fewer patients."""
    seeds: int = 3
    epochs: int = 40
    lr: float = 5e-4
    weight_decay: float = 1e-3
    batch_size: int = 8
    """Slides per step."""
    tiles: int = 1024
    """Most tiles of a slide in a step, drawn anew in each epoch."""

    def __post_init__(self) -> None:
        if min(self.seeds, self.epochs, self.batch_size, self.tiles) < 1 or self.folds < 2 or not self.lr > 0:
            raise ValueError(f"expected 2 folds or more and other numbers above 0, got {self}")
        if wrong := next((name for name in self.poolings if name not in POOLINGS), None):
            raise ValueError(f"expected a pooling out of {', '.join(POOLINGS)}; got {wrong!r}")


def folds_of(
    labels: Int[Array, " n"], patients: Sequence[str], count: int, seed: int, classes: Sequence[str] = ()
) -> Int[Array, " n"]:
    """The part of each slide: no patient is in two, and classes are spread as evenly as that allows.

    Raises:
        ValueError: fewer than two patients of a class.
    """
    try:
        from sklearn.model_selection import StratifiedGroupKFold
    except ImportError as error:
        raise missing("splitting slides by patient needs scikit-learn", "slides") from error
    named = np.array(patients)
    kinds = range(len(classes)) if classes else np.unique(labels)
    found = {kind: len(np.unique(named[labels == kind])) for kind in kinds}
    for kind, number in found.items():
        if number < 2:
            name = classes[kind] if classes else f"class {kind}"
            number = "one" if number else "none"
            raise ValueError(f"expected two patients or more of each class, got {number} of {name}; add slides")
    count = min(count, *found.values())
    parts = np.empty(len(labels), dtype=int)
    splitter = StratifiedGroupKFold(count, shuffle=True, random_state=seed)
    for part, (_, inside) in enumerate(splitter.split(named[:, None], labels, named)):
        parts[inside] = part
    return parts


def train_one(
    bags: Sequence[Float[Tensor, "_ c"]],
    labels: Int[Tensor, " b"],
    classes: int,
    pooling: str,
    how: Training,
    seed: int,
) -> BagClassifier:
    """One classifier, trained on these bags alone for a fixed number of epochs: nothing is chosen by other slides."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        model = BagClassifier(bags[0].shape[1], classes, pooling)
        rng = torch.Generator().manual_seed(seed)
        most = min(how.tiles, max(2, _STANDARDIZING // len(bags)))
        drawn = [bag[torch.randperm(len(bag), generator=rng)[:most]] for bag in bags]
        model.standardize(torch.cat(drawn))
        optimizer = torch.optim.AdamW(model.parameters(), how.lr, weight_decay=how.weight_decay)
        counts = torch.bincount(labels, minlength=classes)
        weights = len(labels) / (classes * counts.clamp_min(1))
        model.train()
        for _ in range(how.epochs):
            for rows in torch.randperm(len(bags), generator=rng).split(how.batch_size):
                some = [bags[i][torch.randperm(len(bags[i]), generator=rng)[: how.tiles]] for i in rows.tolist()]
                mask = pad_sequence([torch.ones(len(bag), dtype=torch.bool) for bag in some], batch_first=True)
                logits = model(pad_sequence(some, batch_first=True), mask)
                loss = nn.functional.cross_entropy(logits, labels[rows], weights)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return model.eval()


def auroc(
    scores: Float[Array, " n"], positive: Array, weights: Float[Array, "r n"] | None = None
) -> Float[Array, " r"]:
    """Probability that a positive scores above a negative, ties half; once, or for each row of weights.

    NaN where one kind is missing.

    >>> auroc(np.array([0.1, 0.4, 0.4, 0.9]), np.array([False, True, False, True])).tolist()
    [0.875]
    """
    weights = np.ones((1, len(scores))) if weights is None else weights
    positive = positive.astype(bool)
    above = (scores[positive][:, None] > scores[~positive]) + 0.5 * (scores[positive][:, None] == scores[~positive])
    high, low = weights[:, positive], weights[:, ~positive]
    with np.errstate(invalid="ignore"):
        return ((high @ above) * low).sum(1) / (high.sum(1) * low.sum(1))


def mean_auroc(
    probabilities: Float[Array, "s n classes"], labels: Int[Array, " n"], weights: Float[Array, "r n"] | None = None
) -> Float[Array, " r"]:
    """Mean over seeds, and over classes one against the rest; of two classes that of the second."""
    classes = probabilities.shape[2]
    kinds = [1] if classes == 2 else range(classes)
    values = [auroc(one[:, kind], labels == kind, weights) for one in probabilities for kind in kinds]
    return np.mean(values, 0)


def auroc_intervals(
    probabilities: Mapping[str, Float[Array, "s n classes"]], labels: Int[Array, " n"], patients: Sequence[str]
) -> tuple[dict[str, Interval], dict[str, Interval]]:
    """AUROC of each pooling, and its difference to the control, with bootstrap intervals over patients.

    All poolings are resampled together.
    """
    names, which = np.unique(np.array(patients), return_inverse=True)
    drawn: dict[str, list[Array]] = {name: [] for name in probabilities}
    for weights in resamples(len(names), 0):
        for name, one in probabilities.items():
            drawn[name].append(mean_auroc(one, labels, weights[:, which]))
    values = {name: float(mean_auroc(one, labels)[0]) for name, one in probabilities.items()}
    all_drawn = {name: np.concatenate(parts) for name, parts in drawn.items()}

    def ends(statistics: Array) -> tuple[float, float]:
        low, high = limits(statistics[:, None], np.array([len(names)]))
        return float(low[0]), float(high[0])

    def difference(name: str) -> Interval:
        low, high = ends(all_drawn[name] - all_drawn[CONTROL])
        return Interval(value=values[name] - values[CONTROL], low=low, high=high, n=len(names))

    own = {name: interval_of(values[name], *ends(all_drawn[name]), len(names)) for name in probabilities}
    differences = {name: difference(name) for name in probabilities if CONTROL in probabilities and name != CONTROL}
    return own, differences


@dataclass(frozen=True, kw_only=True)
class SlideRun:
    """Trained bag classifiers of all folds and seeds, in a folder."""

    folder: Path
    classes: tuple[str, ...]
    slides: tuple[str, ...]
    """File names."""
    labels: tuple[int, ...]
    patients: tuple[str, ...]
    settings: dict[str, Any]
    """What made the features; new slides are cut and embedded in the same way."""
    network: tuple[str, str | None]
    """The network of the features: its name or run folder, and the file of its weights."""
    training: dict[str, Any]
    folds: list[list[int]]
    """For each seed, the part of each slide."""
    channels: int
    predictions: dict[str, list[list[list[float]]]] = field(repr=False)
    """Pooling -> seed -> slide -> probabilities."""

    def title(self) -> str:
        """What was trained on, in one line."""
        counts = ", ".join(f"{self.labels.count(i)} {name}" for i, name in enumerate(self.classes))
        folds = max(max(parts) for parts in self.folds) + 1
        return (
            f"{len(self.slides)} slides ({counts}) of {len(set(self.patients))} patients, {folds} folds by patient, "
            f"{len(self.folds)} seeds; intervals over patients"
        )

    def probabilities(self, pooling: str) -> Float[Array, "s n classes"]:
        """What was predicted for each slide by networks that had seen no slide of its patient, for each seed."""
        return np.array(self.predictions[pooling])

    def models(self, slide: str, pooling: str = "attention") -> list[BagClassifier]:
        """The classifiers that have seen no slide of this one's patient; for a new slide, all of them.

        Raises:
            ValueError: no such pooling in this run.
        """
        if pooling not in self.training["poolings"]:
            raise ValueError(f"expected a pooling of this run, {', '.join(self.training['poolings'])}; got {pooling!r}")
        place = self.slides.index(slide) if slide in self.slides else None
        found: list[BagClassifier] = []
        for seed, parts in enumerate(self.folds):
            for part in range(max(parts) + 1) if place is None else [parts[place]]:
                model = BagClassifier(self.channels, len(self.classes), pooling)
                model.load_state_dict(load((self.folder / _weights(pooling, seed, part)).read_bytes()))
                found.append(model.eval())
        return found


def _weights(pooling: str, seed: int, part: int) -> str:
    return f"{pooling}-seed-{seed}-fold-{part}.safetensors"


def train(
    bags: Mapping[str, Path],
    table: Labels,
    out: Path,
    how: Training | None = None,
    *,
    network: tuple[str, str | None] = ("", None),
    progress: Progress | None = None,
) -> SlideRun:
    """Train every pooling on every fold with every seed, and keep the networks and what they predict in a folder.

    Args:
        bags: slide -> its file.
        table: classes and patients; slides without a bag are left out.
        out: folder of the run.
        how: settings.
        network: see `SlideRun.network`; kept for new slides.
        progress: called with (what, done, total).

    Raises:
        OSError: `out` cannot be written.
        ValueError: too few patients, or bags made in different ways.
    """
    how = how or Training()
    runs.check_writable(out)
    rows = [i for i, slide in enumerate(table.slides) if slide in bags]
    patients = tuple(table.patients[i] for i in rows)
    labels = np.array([table.labels[i] for i in rows])
    loaded = [read_bag(bags[table.slides[i]]) for i in rows]
    if not loaded:
        raise ValueError("expected features of the slides of the table, got none of them")
    slides = tuple(bag.name for bag in loaded)  # a table may name them without their ending
    if other := next((bag for bag in loaded if bag.settings != loaded[0].settings), None):
        raise ValueError(f"expected bags made in one way, got others in {other.name}; choose another folder")
    vectors = [bag.features for bag in loaded]
    targets = torch.from_numpy(labels)
    folds = [folds_of(labels, patients, how.folds, seed, table.classes) for seed in range(how.seeds)]
    classes = len(table.classes)
    found = {name: np.zeros((how.seeds, len(slides), classes)) for name in how.poolings}
    total = len(how.poolings) * sum(int(parts.max()) + 1 for parts in folds)
    done = 0
    (out / RUN).unlink(missing_ok=True)  # the folds of an earlier run would not be those of the new networks
    for seed, parts in enumerate(folds):
        for part in range(int(parts.max()) + 1):
            inside, outside = np.flatnonzero(parts != part), np.flatnonzero(parts == part)
            for pooling in how.poolings:
                chosen = [vectors[i] for i in inside]
                model = train_one(chosen, targets[torch.from_numpy(inside)], classes, pooling, how, seed)
                with torch.inference_mode():
                    for i in outside:
                        found[pooling][seed, i] = model(vectors[i][None])[0].softmax(0).numpy()
                runs.write(out / _weights(pooling, seed, part), save(model.state_dict()))
                done += 1
                if progress is not None:
                    progress("training", done, total)
    facts = {
        "classes": table.classes,
        "slides": slides,
        "labels": labels.tolist(),
        "patients": patients,
        "settings": loaded[0].settings,
        "network": network,
        "training": asdict(how),
        "folds": [parts.tolist() for parts in folds],
        "channels": vectors[0].shape[1],
        "predictions": {name: one.tolist() for name, one in found.items()},
    }
    runs.write(out / RUN, json.dumps(facts).encode())
    return open_slide_run(out)


def open_slide_run(folder: Path) -> SlideRun:
    """Open a folder that `train` wrote.

    Raises:
        FileNotFoundError: it is none.
        ValueError: its file is damaged.
    """
    file = folder / RUN
    if not file.is_file():
        raise FileNotFoundError(f"{folder}: expected a run of `sightline slides train`, got a folder without {RUN}")
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
        tuples = {name: tuple(facts.pop(name)) for name in ("classes", "slides", "labels", "patients", "network")}
        return SlideRun(folder=folder, **tuples, **facts)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: expected a run of `sightline slides train`, got a damaged file: {error}") from error


def slide_files(folder: Path, names: Sequence[str]) -> list[Path]:
    """Files of slides in a folder, by their names; a name without its ending is enough if one file fits.

    A slide that is not there keeps its name, so that it is listed when it is read.

    Raises:
        FileNotFoundError: no such folder, or none of the slides is in it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    there = [file for file in folder.iterdir() if file.is_file() and file.name.lower().endswith(SLIDES)]
    found: list[Path] = []
    for name in names:
        fitting = [file for file in there if file.name == name or file.name.startswith(f"{name}.")]
        found.append(fitting[0] if len(fitting) == 1 else folder / name)
    if not any(file in there for file in found):
        raise FileNotFoundError(f"none of the {len(found)} slides of the table is in {folder}; the first is {names[0]}")
    return found


@dataclass(frozen=True, kw_only=True)
class PoolingScore:
    """How well slides are told apart by one pooling."""

    name: str
    auroc: Interval
    """With its interval over patients."""
    difference: Interval | None
    """To uniform weights; None for these themselves, and in a run without them."""
    seeds: tuple[float, ...]
    """The AUROC of each seed."""

    def columns(self) -> list[str]:
        """Name, AUROC and difference for a table."""
        return [self.name, _span(self.auroc), _span(self.difference, "+") if self.difference else "-"]


def scores_of(run: SlideRun) -> list[PoolingScore]:
    """The score of each pooling of a run."""
    by_name = {name: run.probabilities(name) for name in run.training["poolings"]}
    labels = np.array(run.labels)
    own, differences = auroc_intervals(by_name, labels, run.patients)
    return [
        PoolingScore(
            name=name,
            auroc=own[name],
            difference=differences.get(name),
            seeds=tuple(float(mean_auroc(one[None], labels)[0]) for one in by_name[name]),
        )
        for name in by_name
    ]


def conclusion(scores: Sequence[PoolingScore]) -> str:
    """Whether attention tells slides apart better than uniform weights, in one sentence.

    >>> interval = Interval(value=0.1, low=-0.1, high=0.3, n=9)
    >>> conclusion([PoolingScore(name="attention", auroc=interval, difference=interval, seeds=())])
    'Attention has not been shown to differ from uniform weights'
    """
    found = next((one.difference for one in scores if one.name == "attention"), None)
    if found is None or math.isnan(found.low):
        return f"Poolings of {len(scores)} kinds side by side" if len(scores) > 1 else f"One pooling: {scores[0].name}"
    if found.low <= 0 <= found.high:
        return f"Attention has not been shown to differ from {CONTROL} weights"
    return f"Attention tells slides apart {'better' if found.low > 0 else 'worse'} than {CONTROL} weights"


def _span(interval: Interval, sign: str = "") -> str:
    if math.isnan(interval.low):
        return f"{interval.value:{sign}.3f}"
    return f"{interval.value:{sign}.3f} [{interval.low:{sign}.3f}, {interval.high:{sign}.3f}]"
