"""What the numbers say in plain words; nothing that its interval does not bear."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import combinations

import numpy as np

from sightline.evaluation.result import Evaluation
from sightline.evaluation.source import Answers
from sightline.evaluation.standings import LEVEL, UNDEFINED_SHARE
from sightline.facts import LEVELS, Interval
from sightline.maps import COARSE, NEARLY_FLAT
from sightline.metrics import METRICS
from sightline.metrics.uncertainty import paired_test

_FEW_GROUPS = 20
_AT_ODDS = -1.96  # standard errors of a rank correlation over methods that have nothing in common
OF_ANOTHER_CLASS = " of another class"
_STATES = {
    "flat": "are flat: one value everywhere",
    "nearly flat": f"are nearly flat: their positions differ by less than {NEARLY_FLAT:.0%}",
    "all-negative": "are all-negative: nothing in them speaks for the class",
    "non-finite": "are non-finite: infinite or undefined",
    "class-independent": "are class-independent: another class has the same",
    "conservation gap": "have a conservation gap: they do not add up to the score",
    "plain gradient": "have a plain gradient: some operations have no rule",
    "rectifiers intercepted": "are in part plain gradients: some activations are no rectifiers",
}
"""Verdict -> what it means, for those who read no page."""


def summary(found: Evaluation, answers: Answers) -> Iterator[str]:
    """Sentences, the most important first."""
    yield from _accuracy(found, answers)
    made = int(found.provenance["images with maps"])
    units = max((score.interval.n for score in found.scores), default=0)
    if found.unit != "images" and units < _FEW_GROUPS:
        yield f"Only {units} groups ({found.unit}) stand behind the intervals of the maps: they are wide, and rough."
    yield from _too_few(found)
    real = [method for method in found.methods if method not in found.controls]
    for metric in found.metrics:
        for method in real:
            left = made - found.score(method, metric).undefined
            if left < (1 - UNDEFINED_SHARE) * made:
                yield f"{metric} of {method} is defined for {left} of {made} images only and is not judged."
        yield from _best(found, metric)
    yield from _no_better(found, real)
    for test, methods in found.failed.items():
        if methods:
            figures = [f"{method} ({_figures(found.score(method, test).interval)})" for method in methods]
            yield METRICS[test].sentence.format(methods=", ".join(figures)) + "."
    yield from _at_odds(found)
    yield from _doubtful(found, real, made)
    yield from _coarse(found, real)
    if found.left_out:
        yield f"Left out, since the time would not have been enough: {', '.join(found.left_out)}."
    if found.skipped:
        yield f"{len(found.skipped)} images could not be read and were left out."


def _doubtful(found: Evaluation, real: Sequence[str], made: int) -> Iterator[str]:
    """Verdicts graver than a note, the gravest first."""
    for level in reversed(LEVELS[1:]):
        alike = defaultdict[tuple[str, int], list[str]](list)
        for method in real:
            for verdict, levels in found.verdict_levels.get(method, {}).items():
                if level in levels:
                    alike[verdict, levels[level]].append(method)
        for (verdict, count), methods in alike.items():
            which = f"{'each of ' if len(methods) > 1 else ''}{', '.join(methods)}"
            what_to_do = "; do not read them" if level == "do not read" else ""
            yield f"{count} of {made} maps of {which} {_STATES.get(verdict, f'are {verdict}')}{what_to_do}."


def _coarse(found: Evaluation, real: Sequence[str]) -> Iterator[str]:
    alike = defaultdict[tuple[int, ...], list[str]](list)
    for method in real:
        if min(found.positions.get(method, (COARSE,))) < COARSE:
            alike[found.positions[method]].append(method)
    for positions, methods in alike.items():
        yield (
            f"Maps of {', '.join(methods)} have only {' x '.join(map(str, positions))} positions: for finer ones train "
            "on larger images (--data.size), or name an earlier layer (METHOD@LAYER)."
        )


def _accuracy(found: Evaluation, answers: Answers) -> Iterator[str]:
    if found.accuracy is None or found.majority is None:
        return
    known = answers.labels >= 0
    labeled = int(known.sum())
    above = found.accuracy.low > found.majority
    if answers.groups is not None:
        lead = (answers.labels == answers.predictions)[known] - found.majority
        above = above and paired_test(lead, answers.groups[known]) < LEVEL
    better = "better than" if above else "not reliably better than"
    yield (
        f"The model names the right class in {_percent(found.accuracy)} of {labeled:,} images, {better} "
        f"always naming the most frequent class ({_share(found.majority)})."
    )
    if labeled < found.n_images:
        yield f"{found.n_images - labeled:,} of {found.n_images:,} images have no label and count for no accuracy."
    absent = [name for i, name in enumerate(found.classes) if not (answers.labels == i).any()]
    if absent:
        yield f"No image shows {_few(absent)}: nothing is known of the accuracy there."


def _best(found: Evaluation, metric: str) -> Iterator[str]:
    standing = found.standings.get(metric)
    if standing is None:
        return
    score = found.score(standing.best, metric).interval
    compared = _compared(found, metric)
    left = [control for control in found.controls if control not in compared]
    if len(left) == len(found.controls) and metric not in found.chance:
        why = "no control is defined for enough images" if left else "without controls that says little"
        yield f"The best in {metric} is {standing.best} with {_figures(score)}; {why}."
        return
    if standing.unbeaten:
        rivals = ", ".join(standing.unbeaten)
        best = f"{standing.best}, the best in {metric} with {_figures(score)}"
        ahead = [control for control in standing.unbeaten if _beats(found, metric, control, standing.best)]
        behind = f"; {', '.join(ahead)} reliably {'beats' if len(ahead) == 1 else 'beat'} it" if ahead else ""
        yield f"{best}, does not reliably beat {rivals}{behind}."
        return
    text = METRICS[metric].sentence.format(method=standing.best, score=_figures(score))
    if found.chance.get(metric):
        times = score.value / found.chance[metric]
        text += f", {times:.1f} times what a map without knowledge reaches ({found.chance[metric]:.3f})"
    beaten = [control for control in found.controls if control in compared]
    text += "; it beats every control" if beaten else ""
    text += f" that is defined for enough images (not {', '.join(left)})" if beaten and left else ""
    tied = f"{' but' if beaten else '; it'} cannot be told apart from {', '.join(standing.tied)}"
    yield text + (f"{tied}." if standing.tied else ".")


def _no_better(found: Evaluation, real: Sequence[str]) -> Iterator[str]:
    """Methods that under the first metric beat a control nowhere, where the best does."""
    metric = next(iter(found.ranking), "")
    standing = found.standings.get(metric)
    if standing is None or standing.unbeaten:
        return
    compared = _compared(found, metric)
    alike = defaultdict[tuple[str, ...], list[str]](list)
    for method in real:
        rivals = [c for c in found.controls if {c, method} <= compared and not _beats(found, metric, method, c)]
        if rivals:
            alike[tuple(rivals)].append(method)
    for rivals, methods in alike.items():
        who = f"{methods[0]} is not" if len(methods) == 1 else f"None of {', '.join(methods)} is"
        yield f"{who} shown to be better than {', '.join(rivals)} in {metric}."


def _compared(found: Evaluation, metric: str) -> set[str]:
    return {name for pair in found.comparisons if pair.metric == metric for name in (pair.method, pair.other)}


def _beats(found: Evaluation, metric: str, method: str, other: str) -> bool:
    """Whether the corrected paired test says so."""
    up = found.higher_is_better[metric]
    for pair in found.comparisons:
        if pair.metric == metric and {pair.method, pair.other} == {method, other}:
            ahead = (pair.difference.value > 0) == (up == (pair.method == method))
            return ahead and pair.adjusted < LEVEL
    return False


def _too_few(found: Evaluation) -> Iterator[str]:
    """Where even differences that are the same on every image would not be significant after the correction."""
    pairs = Counter(pair.metric for pair in found.comparisons)
    units = max((score.interval.n for score in found.scores), default=0)
    if pairs and min(pairs.values()) * paired_test(np.ones(units)) >= LEVEL:
        behind = "images" if found.unit == "images" else f"groups ({found.unit})"
        yield f"Only {units} {behind}: too few to say of any method that it beats another one or a control."


def _at_odds(found: Evaluation) -> Iterator[str]:
    table = found.metric_agreement
    if table is None:
        return
    compared = {metric: _compared(found, metric) for metric in found.ranking}
    pairs = [
        f"{a} and {b} ({table[i, j]:+.2f})"
        for (i, a), (j, b) in combinations(enumerate(found.ranking), 2)
        if np.isfinite(table[i, j]) and table[i, j] < _AT_ODDS / np.sqrt(len(compared[a] & compared[b]) - 1)
    ]
    if pairs:
        shown = ", ".join(pairs[:5]) + (f" and {len(pairs) - 5} other pairs" if len(pairs) > 5 else "")
        yield f"These metrics rank the methods against one another: {shown}; which is best depends on which is asked."


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} other classes" if len(names) > 5 else "")


def _share(share: float) -> str:
    """Never rounded to a certainty."""
    return "<0.1 %" if 0 < share < 0.0005 else ">99.9 %" if 0.9995 <= share < 1 else f"{100 * share:.1f} %"


def _percent(interval: Interval) -> str:
    return f"{_share(interval.value)} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def _figures(interval: Interval) -> str:
    return f"{interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"
