"""The result of an evaluation, as plain frozen data."""

import csv
import io
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from sightline import notebook
from sightline.facts import Finding, Interval, Verdict, listed, words
from sightline.metrics.classification import Quality
from sightline.metrics.uncertainty import Comparison
from sightline.notebook import brief
from sightline.runs import plain, write

Array = np.ndarray
_ARROWS = {True: "↑", False: "↓", None: "(not ranked)"}
_NAMED = 5  # metrics whose best method the short form names


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

    One beats another if its mean is better and the paired test, corrected for all pairs of the metric, says p < .05.
    """

    best: str
    tied: tuple[str, ...]
    """Methods that cannot be told apart from it."""
    unbeaten: tuple[str, ...]
    """Controls, and `chance`, that it does not beat."""
    above_chance: tuple[str, ...] = ()
    """Methods that beat `chance`; none where the metric has no such value."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The score along deletion or insertion, mean over images."""

    __repr__ = brief

    shares: Float[Array, " n"]
    """Fractions of the pixels changed."""
    mean: Float[Array, " n"]
    low: Float[Array, " n"]
    high: Float[Array, " n"]
    """Ends of the 95 % interval of the mean, point by point."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One image with what the report shows of it."""

    __repr__ = brief

    name: str
    image: UInt8[Array, "h w 3"]
    label: str | None
    prediction: str
    probability: float
    """Probability of the prediction."""
    maps: dict[str, Float[Array, "_ _"]]
    """Raw map per method and control, at its own resolution."""
    verdicts: dict[str, list[Verdict]]
    """Reasons to distrust the map of each method; an empty list is a clean map."""
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
    """The units that an interval resamples: `images`, or the name of the group column."""
    classes: tuple[str, ...]
    methods: tuple[str, ...]
    controls: tuple[str, ...]
    """Those of `methods` that never look at the model, or explain another class."""
    signed: tuple[str, ...] = ()
    """Those of `methods` whose negative values speak against the class."""
    layers: dict[str, str]
    """method -> where its map was read, for example `features.conv13 (512 x 5 x 5)`."""
    positions: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """method -> height and width of its maps."""
    metrics: tuple[str, ...]
    higher_is_better: dict[str, bool | None]
    """None for a test or a description, by which methods are not ranked."""
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
    verdict_levels: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)
    """method -> verdict -> level ("note", "doubt", "do not read") -> number of images."""
    standings: dict[str, Standing]
    """metric -> how its best method stands to the others; left out where no method is defined for enough images."""
    failed: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Test -> the methods that fail it; `random_logit` asks only those that explain a class, of more than two."""
    comparisons: tuple[Comparison, ...] = ()
    """Every pair of methods under every metric."""
    curves: dict[str, dict[str, Curve]] = field(default_factory=dict)
    """`deletion` or `insertion` -> method -> curve."""
    worst: dict[str, tuple[Example, ...]] = field(default_factory=dict)
    """method -> the images on which it does worst in the first metric, with its map alone, worst first."""
    reliability: dict[str, float] = field(default_factory=dict)
    """metric -> Krippendorff's alpha over the methods, controls left out: 1 if all images rank them alike, 0 if they
    agree as chance would."""
    metric_agreement: Float[Array, "m m"] | None = None
    """Rank correlation between those of `ranking`, better above worse, over the means of all methods and controls."""
    method_agreement: Float[Array, "k k"] | None = None
    """Mean rank correlation between the maps of two methods, over images."""
    quality: Quality | None = None
    """More on the classifier than its accuracy."""
    unsuited: dict[str, str] = field(default_factory=dict)
    """Methods that do not fit the model, with the reason."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Methods and metrics that did not fit the time budget, with the reason."""
    summary: tuple[Finding, ...]
    """Sentences in plain words, none stronger than its interval; the most important first."""
    skipped: tuple[tuple[str, str], ...]
    """Images that could not be read, with the reason."""
    notices: tuple[str, ...] = ()
    """Automatic decisions about the images or the model that may need a correction."""
    provenance: dict[str, str]
    """command, seed, date, wall time, hardware, versions."""

    @property
    def title(self) -> str:
        """What was evaluated on what."""
        split = f" ({self.split})" if self.split not in ("", self.data) else ""
        return f"{self.model} on {self.data}{split}, {self.provenance.get('images with maps', self.n_images)} images"

    def __repr__(self) -> str:
        controls = f" and {len(self.controls)} controls" if self.controls else ""
        size = f"{len(self.methods) - len(self.controls)} methods{controls} by {len(self.metrics)} metrics"
        lines = [f"Evaluation of {self.title}: {size}"]
        for metric, standing in [*self.standings.items()][:_NAMED]:
            tied = f"; like {listed(standing.tied, 2)}" if standing.tied else ""
            unbeaten = f"; does not beat {listed(standing.unbeaten, 2)}" if standing.unbeaten else ""
            best = f"{words(standing.best)} {self.score(standing.best, metric).interval}"
            lines.append(f"  best in {words(metric)}: {best}{tied}{unbeaten}")
        if (more := len(self.standings) - _NAMED) > 0:
            lines.append(f"  and {more} more metrics")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        scores = notebook.table(*self.table()) if self.metrics else ""
        return notebook.heading(self.title) + scores + notebook.sentences([*self.summary, *self.notices])

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Names of the columns, and a line of texts per method: the means with their intervals, then chance."""
        lines = [
            [self.label(method), *(_cell(self.score(method, metric)) for metric in self.metrics)]
            for method in self.methods
        ]
        if self.chance:
            chance = (f"{self.chance[metric]:.3f}" if metric in self.chance else "" for metric in self.metrics)
            lines.append(["chance", *chance])
        return ["method", *(f"{metric} {_ARROWS[self.higher_is_better[metric]]}" for metric in self.metrics)], lines

    @property
    def ranking(self) -> tuple[str, ...]:
        """Those of `metrics` that say which map is better."""
        return tuple(metric for metric in self.metrics if self.higher_is_better[metric] is not None)

    def label(self, method: str) -> str:
        """The method as a table names it."""
        return f"{method} (control)" if method in self.controls else method

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

    def pairs(self, metric: str) -> list[Comparison]:
        """The comparisons of methods by one metric; empty if the metric does not rank them."""
        return [pair for pair in self.comparisons if pair.metric == metric]

    def to_json(self, path: Path | str) -> Path:
        """Write everything but the pictures, with findings as text; values that are not finite become null."""
        left_out = ("per_image", "examples", "errors", "mean_maps", "worst", "unsuited")
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


def _cell(score: Score) -> str:
    return f"{score.interval}, {score.undefined} undefined" if score.undefined else str(score.interval)
