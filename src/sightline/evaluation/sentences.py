"""What the numbers say in plain words; nothing that its interval does not bear."""

from collections.abc import Collection, Iterator, Sequence
from itertools import combinations

import numpy as np

from sightline.evaluation.result import Evaluation
from sightline.evaluation.source import Answers
from sightline.evaluation.standings import LEVEL, UNDEFINED_SHARE
from sightline.metrics import METRICS
from sightline.metrics.uncertainty import Interval

_FEW_GROUPS = 20
_AT_ODDS = -1.96  # standard errors of a rank correlation over methods that have nothing in common
OF_ANOTHER_CLASS = " of another class"


def summary(found: Evaluation, answers: Answers, by_class: Collection[str]) -> Iterator[str]:
    """Sentences, the most important first. `by_class`: methods that should differ between classes."""
    yield from _accuracy(found, answers)
    made = int(found.provenance["images with maps"])
    units = found.scores[0].interval.n if found.scores else 0
    if found.unit != "images" and units < _FEW_GROUPS:
        yield f"Only {units} groups ({found.unit}) stand behind the intervals of the maps: they are wide, and rough."
    real = [method for method in found.methods if method not in found.controls]
    for metric in found.metrics:
        for method in real:
            left = made - found.score(method, metric).undefined
            if left < (1 - UNDEFINED_SHARE) * made:
                yield f"{metric} of {method} is defined for {left} of {made} images only and is not compared."
        yield from _best(found, metric)
    yield from _no_better(found, real)
    for test, methods in found.failed.items():
        if methods:
            figures = [f"{method} ({_figures(found.score(method, test).interval)})" for method in methods]
            yield METRICS[test].sentence.format(methods=", ".join(figures)) + "."
    yield from _at_odds(found)
    for method in real:
        for verdict, count in found.verdicts[method].items():
            if verdict != "rectifiers intercepted" and (verdict != "class-independent" or method in by_class):
                yield f"{count} of {made} maps of {method} {'have a' if ' ' in verdict else 'are'} {verdict}."
    if found.left_out:
        yield f"Left out, since the time would not have been enough: {', '.join(found.left_out)}."
    if found.skipped:
        yield f"{len(found.skipped)} images could not be read and were left out."


def _accuracy(found: Evaluation, answers: Answers) -> Iterator[str]:
    if found.accuracy is None or found.majority is None:
        return
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


def _best(found: Evaluation, metric: str) -> Iterator[str]:
    standing = found.standings.get(metric)
    if standing is None:
        return
    score = found.score(standing.best, metric).interval
    if not found.controls and metric not in found.chance:
        yield f"The best in {metric} is {standing.best} with {_figures(score)}; without controls that says little."
        return
    if standing.unbeaten:
        rivals = ", ".join(standing.unbeaten)
        best = f"{standing.best}, the best in {metric} with {_figures(score)}"
        yield f"{best}, does not reliably beat {rivals}."
        return
    text = METRICS[metric].sentence.format(method=standing.best, score=_figures(score))
    if found.chance.get(metric):
        times = score.value / found.chance[metric]
        text += f", {times:.1f} times what a map without knowledge reaches ({found.chance[metric]:.3f})"
    yield text + (", and beats every control." if found.controls else ".")
    if standing.tied:
        yield f"Not told apart from {standing.best} in {metric}: {', '.join(standing.tied)}."


def _no_better(found: Evaluation, real: Sequence[str]) -> Iterator[str]:
    """Methods that under the first metric beat a control nowhere, where the best does."""
    metric = next(iter(found.ranking), "")
    standing = found.standings.get(metric)
    if standing is None or standing.unbeaten:
        return
    up = found.higher_is_better[metric]
    for method in real:
        rivals: list[str] = []
        for pair in found.comparisons:
            if pair.metric == metric and method in (pair.method, pair.other):
                other = pair.other if pair.method == method else pair.method
                ahead = (pair.difference.value > 0) == (up == (pair.method == method))
                if other in found.controls and not (ahead and pair.adjusted < LEVEL):
                    rivals.append(other)
        if rivals:
            yield f"{method} is not shown to be better than {', '.join(rivals)} in {metric}."


def _at_odds(found: Evaluation) -> Iterator[str]:
    table = found.metric_agreement
    if table is None:
        return
    beyond = _AT_ODDS / np.sqrt(len(found.methods) - 1)
    pairs = [
        f"{a} and {b} ({table[i, j]:+.2f})"
        for (i, a), (j, b) in combinations(enumerate(found.ranking), 2)
        if np.isfinite(table[i, j]) and table[i, j] < beyond
    ]
    if pairs:
        shown = ", ".join(pairs[:5]) + (f" and {len(pairs) - 5} other pairs" if len(pairs) > 5 else "")
        yield f"These metrics rank the methods against one another: {shown}; which is best depends on which is asked."


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} other classes" if len(names) > 5 else "")


def _share(share: float) -> str:
    return f"{100 * share:.1f} %"


def _percent(interval: Interval) -> str:
    return f"{_share(interval.value)} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def _figures(interval: Interval) -> str:
    return f"{interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"
