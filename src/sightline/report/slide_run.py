"""A page of a training on slides: how well each pooling tells them apart, and what was predicted for each slide."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sightline import runs
from sightline.report.formats import template
from sightline.slides.bags import TileReport
from sightline.slides.study import CONTROL, PoolingScore, SlideRun, conclusion, scores_of

__all__ = ["RunPage", "write_run"]


@dataclass(frozen=True, kw_only=True)
class RunPage:
    """What `write_run` wrote, and the scores on it."""

    file: Path
    scores: list[PoolingScore] = field(repr=False)

    def table(self) -> tuple[list[str], list[list[str]]]:
        """The scores for the terminal."""
        return ["pooling", "AUROC", f"to {CONTROL} weights"], [one.columns() for one in self.scores]


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """A line of the table of slides."""

    name: str
    patient: str
    label: str
    predicted: str
    probability: float
    """Of the true class."""
    tiles: int
    damaged: int


def write_run(run: SlideRun, reports: Mapping[str, TileReport], skipped: Mapping[str, str] | None = None) -> RunPage:
    """Write RUN/slides.html, the whole file or none of it.

    Args:
        run: trained bag classifiers.
        reports: slide -> how its tiles were read.
        skipped: slide -> why it was left out.

    Raises:
        OSError: the file cannot be written.
    """
    scores = scores_of(run)
    shown = "attention" if "attention" in run.training["poolings"] else run.training["poolings"][0]
    mean = run.probabilities(shown).mean(0)
    slides = [
        Predicted(
            name=run.slides[i],
            patient=run.patients[i],
            label=run.classes[run.labels[i]],
            predicted=run.classes[int(mean[i].argmax())],
            probability=float(mean[i, run.labels[i]]),
            tiles=reports[run.slides[i]].read,
            damaged=reports[run.slides[i]].damaged,
        )
        for i in np.argsort(mean[np.arange(len(mean)), list(run.labels)], kind="stable")
    ]
    page = template("slide_run.html").render(
        answer=conclusion(scores),
        run=run,
        poolings=scores,
        spans={one.name: one.columns()[1:] for one in scores},
        control=CONTROL,
        shown=shown,
        slides=slides,
        skipped=skipped or {},
        facts={"run": str(run.folder), **run.settings, **run.training, **runs.surroundings()},
    )
    file = run.folder / "slides.html"
    runs.write(file, page.encode())
    return RunPage(file=file, scores=scores)
