"""What the command line shows on the terminal: a progress bar, tables, sentences."""

import sys
import textwrap
import time
import warnings
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sightline.facts import Notice, duration

if TYPE_CHECKING:
    from sightline.evaluation import Evaluation
    from sightline.models.costs import Costs

_EVERY = 30.0  # seconds between lines of progress
_LONG = 600  # letters of an error that are shown, at its start and at its end
_LISTED = 20  # unreadable images that are named; the report names all
_COLUMNS = 6  # columns of a study side by side
_METRICS = 4  # metrics side by side
_WIDTH = 140  # columns of a table where there is no terminal


@contextmanager
def notices_shown() -> Generator[None]:
    """Print each `sightline.facts.Notice` as a line on stderr."""
    usual = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if issubclass(category, Notice):
            tell_notices([str(message)])
        else:
            usual(message, category, *where, **more)

    with warnings.catch_warnings():
        warnings.simplefilter("default", Notice)
        warnings.showwarning = show
        yield


class Bar:
    """Progress on stderr: bars on a terminal; elsewhere, in a log say, a line every half minute."""

    def __init__(self, lines: bool = False) -> None:
        """`lines`: where there is no terminal, print a line for each step."""
        self.every = 0.0 if lines else _EVERY

    def __enter__(self) -> "Bar":
        from rich.console import Console
        from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

        console = Console(stderr=True)
        columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
        self.progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self.progress.start()
        self.tasks: dict[str, Any] = {}
        self.first: dict[str, tuple[float, int]] = {}
        self.printed = time.monotonic()
        return self

    def update(self, what: str, done: int, total: int) -> None:
        """Show how many of `total` are done, and how long the others will take."""
        now = time.monotonic()
        if what not in self.tasks:
            self.tasks[what] = self.progress.add_task(what, total=total)
        self.progress.update(self.tasks[what], completed=done, total=total, visible=done < total)
        start, before = self.first.get(what, (now, done))
        if done <= before:  # it begins, or begins again
            start, before = self.first[what] = now, done
        if not sys.stderr.isatty() and now - self.printed >= self.every:
            left = (now - start) / max(done - before, 1) * (total - done)
            time_left = f", {duration(left)} left" if self.every and before < done < total else ""
            print(f"{what}: {done:,} of {total:,}{time_left}", file=sys.stderr, flush=True)
            self.printed = now

    def tell(self, sentence: str) -> None:
        """Print a sentence above the bars."""
        print(sentence, file=sys.stderr, flush=True)

    def __exit__(self, *error: Any) -> None:
        self.progress.stop()


def print_columns(title: str, columns: Sequence[str], lines: Iterable[Sequence[str]], width: int = _COLUMNS) -> None:
    """A table whose first column names the lines, in parts of `width` further columns."""
    from rich.console import Console
    from rich.table import Table

    lines, console = list(lines), Console(width=None if Console().is_terminal else _WIDTH)
    for start in range(1, len(columns), width):
        part = slice(start, start + width)
        table = Table(title=(title or None) if start == 1 else None)
        table.add_column(columns[0])
        for name in columns[part]:
            table.add_column(name, justify="right")
        for line in lines:
            if any(line[part]):
                table.add_row(line[0], *line[part])
        console.print(table)


def print_scores(evaluation: "Evaluation") -> None:
    """Scores of all methods, with intervals."""
    print_columns(evaluation.title, *evaluation.table(), width=_METRICS)


def print_costs(title: str, costs: Mapping[str, "Costs"]) -> None:
    """What networks cost, beside the first of them."""
    first = next(iter(costs.values()))
    lines = [
        (
            name,
            f"{cost.parameters:,} ({cost.parameters / first.parameters - 1:+.1%})",
            f"{cost.macs / 1e9:.3f}",
            "{:.2f} x [{:.2f}, {:.2f}]".format(*cost.ratio),
            f"{cost.saved / 2**20:.0f} MiB ({cost.saved / first.saved:.2f} x)",
        )
        for name, cost in costs.items()
    ]
    print_columns(title, ("block", "parameters", "GMACs / image", "time / without", "kept for backward"), lines)


def print_sentences(sentences: Iterable[str]) -> None:
    """Wrapped list items."""
    for sentence in sentences:
        print(textwrap.fill(f"- {sentence}", 100, subsequent_indent="  "))


def tell(what: str, reasons: Iterable[tuple[str, str]]) -> None:
    """Names and reasons on stderr, of images that were skipped or methods that were left out."""
    for name, reason in reasons:
        print(f"{what} {name}: {reason}", file=sys.stderr)


def tell_skipped(skipped: Sequence[tuple[str, str]]) -> None:
    """Images that could not be read, on stderr."""
    tell("skipped", skipped[:_LISTED])
    if len(skipped) > _LISTED:
        print(f"skipped {len(skipped) - _LISTED} more", file=sys.stderr)


def tell_notices(notices: Iterable[str]) -> None:
    """Decisions that the user may want to change, on stderr."""
    for notice in dict.fromkeys(notices):
        print(f"notice: {notice}", file=sys.stderr)


def one_line(error: Exception) -> str:
    """The message of an error, without the middle if it would fill the screen."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 2 * _LONG else f"{text[:_LONG]} ... {text[-_LONG:]}"
