"""Evaluation, or study -> one self-contained HTML page that needs neither network nor server."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2

from sightline import facts, recipe, runs
from sightline.evaluation import Evaluation
from sightline.maps import COARSE
from sightline.metrics import METRICS, MOSAIC_METRICS
from sightline.report import pictures, tables
from sightline.report.studies import Part

__all__ = ["write", "write_study"]


def write(evaluation: Evaluation, folder: str | Path, run: runs.Run | None = None) -> Path:
    """Write `folder`/report.html, the whole file or none of it, and return its path.

    Args:
        evaluation: what to draw. The first sentence of its summary is the verdict under the title.
        folder: made where it is missing.
        run: the training that the model comes from, for its curves and recipe.

    Raises:
        OSError: the folder cannot be written to.
    """
    path = Path(folder) / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    methods = [method for method in evaluation.methods if method not in evaluation.controls]
    described = METRICS | MOSAIC_METRICS
    foremost = tables.foremost(evaluation)
    worst = {method: evaluation.worst[method] for method in methods if evaluation.worst.get(method)}
    cards = {f"gallery-{i}": example for i, example in enumerate(evaluation.examples, 1)}
    cards |= {f"error-{i}": example for i, example in enumerate(evaluation.errors, 1) if evaluation.accuracy}
    cards |= {f"worst-{i}-{j}": e for i, shown in enumerate(worst.values(), 1) for j, e in enumerate(shown, 1)}
    page = _template("report.html").render(
        evaluation=evaluation,
        run=run,
        maps_made=len(evaluation.per_image["name"]),
        methods=methods,
        columns={metric: tables.column(evaluation, metric) for metric in evaluation.metrics},
        doubts=tables.doubts(evaluation),
        coarse=COARSE,
        meanings={
            metric: _first_line(described[metric].function) for metric in evaluation.metrics if metric in described
        },
        groups=tables.grouped(evaluation.summary[1:]),
        charts=pictures.courses(evaluation.curves, foremost, evaluation.controls),
        foremost=foremost,
        leads={metric: rows for metric in evaluation.metrics if (rows := tables.leads(evaluation, metric))},
        worst=worst,
        homes=pictures.homes(cards),
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
    page = _template("bench.html").render(
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


def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sightline.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=percent, number=number, p_value=p_value, hundredths=hundredths, words=facts.words
    )
    return environment.get_template(name)


def _first_line(thing: object) -> str:
    return (thing.__doc__ or "").strip().splitlines()[0].replace("`", "")


def percent(fraction: float) -> str:
    """A fraction in percent, never rounded to a certainty, with a narrow space that does not break.

    >>> percent(0.5), percent(0.99999)
    ('50.0 %', '>99.9 %')
    """
    return facts.percent(fraction).replace(" ", "\u202f")


def number(value: float | None) -> str:
    """Three decimals, one above 10, powers of ten for the very small and the very large; a dash for what is undefined.

    >>> number(0.12345), number(-43.21), number(0.00002), number(float("nan")), number(None)
    ('0.123', '−43.2', '2.0e−05', '–', '–')
    """
    if value is None or not math.isfinite(value):
        return "–"
    size = abs(value)
    if size and not 0.001 <= size < 10_000:
        text = f"{value:.1e}"
    else:
        text = f"{value:.3f}" if size < 10 else f"{value:.1f}"
    return text.replace("-", "−")


def p_value(p: float) -> str:
    """Three decimals, never a zero.

    >>> p_value(0.0004), p_value(0.25), p_value(float("nan"))
    ('<0.001', '0.250', '–')
    """
    return "<0.001" if p < 0.001 else f"{p:.3f}" if math.isfinite(p) else "–"


def hundredths(value: float) -> str:
    """A correlation.

    >>> hundredths(-0.5), hundredths(-0.001), hundredths(float("nan"))
    ('−0.50', '0.00', '–')
    """
    return f"{round(value, 2) + 0:.2f}".replace("-", "−") if math.isfinite(value) else "–"
