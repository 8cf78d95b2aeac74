"""The templates of the pages, and how they write numbers and pictures."""

import math

import jinja2

from sightline import facts


def template(name: str, *packages: str) -> jinja2.Template:
    """A template of the report, or of other packages that extend these, with the filters of this file."""
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader(package) for package in (*packages, "sightline.report")]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=percent, number=number, p_value=p_value, hundredths=hundredths, words=facts.words
    )
    return environment.get_template(name)


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
