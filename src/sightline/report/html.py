"""Evaluation, or study -> one self-contained HTML page that needs neither network nor server."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from sightline import recipe, runs
from sightline.evaluation import Evaluation
from sightline.evaluation.findings import ANSWERS
from sightline.facts import capitalized
from sightline.maps import COARSE
from sightline.metrics import METRICS, MOSAIC_METRICS
from sightline.metrics.per_image import PerImageMean
from sightline.report import pictures, tables
from sightline.report.formats import number, template
from sightline.report.opening import opening
from sightline.report.studies import Part

__all__ = ["write", "write_study"]


def write(evaluation: Evaluation, folder: str | Path, run: runs.Run | None = None) -> Path:
    """Write `folder`/report.html, the whole file or none of it, and return its path.

    Args:
        evaluation: what to draw.
        folder: made where it is missing.
        run: the training that the model comes from, for its curves and recipe.

    Raises:
        OSError: the folder cannot be written to.
    """
    path = Path(folder) / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    methods = [method for method in evaluation.methods if method not in evaluation.controls]
    first = opening(evaluation)
    described = METRICS | MOSAIC_METRICS
    foremost = tables.foremost(evaluation)
    worst = {method: evaluation.worst[method] for method in methods if evaluation.worst.get(method)}
    cards = {f"opening-{i}": example for i, example in enumerate(first.examples, 1)}
    cards |= {f"gallery-{i}": example for i, example in enumerate(evaluation.examples, 1)}
    cards |= {f"error-{i}": example for i, example in enumerate(evaluation.errors, 1) if evaluation.accuracy}
    cards |= {f"worst-{i}-{j}": e for i, shown in enumerate(worst.values(), 1) for j, e in enumerate(shown, 1)}
    homes = pictures.homes(cards)
    drawn: dict[tuple[str, str], str] = {}
    for i, _ in enumerate(first.examples, 1):
        for j, method in enumerate([*first.methods, *filter(None, [first.control])], 1):
            drawn.setdefault((homes[f"opening-{i}"], method), f"opening-{i}-map-{j}")
    page = template("report.html").render(
        evaluation=evaluation,
        run=run,
        maps_made=len(evaluation.per_image["name"]),
        methods=methods,
        columns={metric: tables.column(evaluation, metric) for metric in evaluation.metrics},
        doubts=tables.doubts(evaluation),
        coarse=COARSE,
        meanings={metric: _meaning(described[metric]) for metric in evaluation.metrics if metric in described},
        opening=first,
        groups=tables.grouped([finding for finding in evaluation.summary if finding not in first.answers]),
        charts=pictures.courses(evaluation.curves, foremost, evaluation.controls),
        foremost=foremost,
        reliability={
            metric: number(alpha)
            for metric, alpha in evaluation.reliability.items()
            if math.isfinite(alpha) and len(methods) > 1
        },
        leads={metric: rows for metric in evaluation.metrics if (rows := tables.leads(evaluation, metric))},
        worst=worst,
        homes=homes,
        drawn=drawn,
        questions=ANSWERS,
        masked=any(example.mask is not None for example in cards.values()),
        training={"seed": run.seed, **run.info} if run else {},
        recipe=recipe.dump(run.recipe) if run else "",
        pictures=pictures,
        tables=tables,
    )
    runs.write(path, page.encode())
    return path


def write_study(parts: Sequence[Part], folder: str | Path, failed: Mapping[str, str], plan: str) -> Path:
    """Write `folder`/bench.html, the whole file or none of it, and return its path.

    Args:
        parts: one for each data set.
        folder: made where it is missing.
        failed: run -> why there is no figure of it.
        plan: recipe, rows and data sets, as YAML.

    Raises:
        OSError: the folder cannot be written to.
    """
    page = template("bench.html").render(
        parts=parts,
        failed=failed,
        plan=plan,
        facts=runs.surroundings(),
        plots=[pictures.dot_plot(part.effects) for part in parts],
        scatters=[pictures.scatter(part.cost, part.accuracy, (False, True), part.foremost) for part in parts],
        pictures=pictures,
    )
    path = Path(folder) / "bench.html"
    runs.write(path, page.encode())
    return path


def _meaning(metric: type[PerImageMean]) -> str:
    line = (metric.function.__doc__ or "").strip().splitlines()[0].replace("`", "")
    is_short = metric.meaning and not metric.is_test
    return f"{capitalized(metric.meaning)}. {line}" if is_short else line
