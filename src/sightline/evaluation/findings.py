"""The numbers in plain words; no sentence is stronger than its interval."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import combinations

import numpy as np

from sightline.evaluation.batches import Predictions
from sightline.evaluation.conclusions import (
    BELIEVE,
    LOOKS,
    asked,
    beaten,
    compared,
    ends,
    maps_made,
    where_it_looks,
    which_map,
    won,
)
from sightline.evaluation.ranking import LEVEL, UNDEFINED_FRACTION
from sightline.evaluation.result import Evaluation
from sightline.facts import LEVELS, Finding, capitalized, listed, percent, words
from sightline.maps import COARSE, NEARLY_FLAT
from sightline.metrics import METRICS
from sightline.metrics.uncertainty import paired_test

_FEW_GROUPS = 20
_AT_ODDS = -1.96  # standard errors of a rank correlation over methods that have nothing in common
_STATES = {
    "flat": "are flat: one value everywhere",
    "nearly flat": f"are nearly flat: their positions differ by less than {NEARLY_FLAT:.0%}",
    "all-negative": "are all-negative: nothing in them speaks for the class",
    "non-finite": "are non-finite: infinite or undefined",
    "class-independent": "are class-independent: another class has the same map",
    "conservation gap": "have a conservation gap: their values do not sum to the score",
    "plain gradient": "contain plain gradients: LRP has no rule for some operations",
    "rectifiers intercepted": "are in part plain gradients: some activations are not rectifiers",
}
"""Verdict -> its meaning, for readers of the summary alone."""

ANSWERS = {
    "accuracy": "What does the model get right?",
    "no better than majority": "What does the model get right?",
    "no accuracy": "What does the model get right?",
    LOOKS: "Where does it look?",
    BELIEVE: "Which map can you believe?",
}
"""Kinds of the first three findings, each the answer to a question."""

DOUBTS = frozenset(
    {
        "no better than majority",
        "not better than a control",
        "fails a test",
        "metrics at odds",
        "verdict",
        "coarse maps",
    }
)
"""Kinds of findings that speak against the model or its maps."""
GAPS = frozenset({"left out", "unreadable", "not judged", "unlabeled", "absent classes", "few groups", "too few"})
"""Kinds of findings that tell what is missing."""


def findings(result: Evaluation, predictions: Predictions) -> Iterator[Finding]:
    """Sentences: three answers (see `ANSWERS`), then what stands behind them, the most important first."""
    for finding in _findings(result, predictions):
        yield Finding(finding.kind, capitalized(finding), **finding.values)


def _findings(result: Evaluation, predictions: Predictions) -> Iterator[Finding]:
    n_maps = maps_made(result)
    units = max((score.interval.n for score in result.scores), default=0)
    is_too_few = _is_too_few(result, units)
    believe = which_map(result, units, is_too_few)
    yield _accuracy(result, predictions)
    yield where_it_looks(result, believe.values["believed"])
    yield believe
    yield from _missing(result, predictions)
    if result.unit != "images" and units < _FEW_GROUPS:
        text = f"The intervals of the maps rest on only {units} groups ({result.unit}), so they are wide and rough."
        yield Finding("few groups", text, groups=units)
    if is_too_few:
        behind = "images" if result.unit == "images" else f"groups ({result.unit})"
        text = f"{units} {behind} are too few to show that a method beats another method or a control."
        yield Finding("too few", text, units=units)
    methods = [method for method in result.methods if method not in result.controls]
    for metric in result.metrics:
        yield from _not_judged(result, metric, methods, n_maps)
        yield from _best(result, metric)
    yield from _no_better(result, methods)
    for test, failing in result.failed.items():
        if failing:
            figures = [f"{words(method)} ({result.score(method, test).interval})" for method in failing]
            text = METRICS[test].meaning.format(methods=", ".join(figures)) + "."
            yield Finding("fails a test", text, test=test, methods=failing)
    yield from _at_odds(result)
    yield from _verdicts(result, methods, n_maps)
    yield from _coarse(result, methods)
    if result.left_out:
        text = f"Left out for lack of time: {listed(result.left_out, 99)}."
        yield Finding("left out", text, names=tuple(result.left_out))
    if result.skipped:
        text = f"{len(result.skipped)} images could not be read and were left out."
        yield Finding("unreadable", text, images=len(result.skipped))


def _accuracy(result: Evaluation, predictions: Predictions) -> Finding:
    has_label = predictions.labels >= 0
    if result.accuracy is None or result.majority is None:
        why = "it was not measured here" if has_label.any() else "the images have no labels"
        return Finding("no accuracy", f"It is not known how often the model is right: {why}.")
    is_better = result.accuracy.low > result.majority
    if predictions.groups is not None:
        lead = (predictions.labels == predictions.predictions)[has_label] - result.majority
        is_better = is_better and paired_test(lead, predictions.groups[has_label]) < LEVEL
    better = "more" if is_better else "not reliably more"
    return Finding(
        "accuracy" if is_better else "no better than majority",
        f"The model names the right class in {percent(result.accuracy.value)} of {int(has_label.sum()):,} images "
        f"{ends(result.accuracy)}, {better} than by always naming the most frequent class "
        f"({percent(result.majority)}).",
        accuracy=result.accuracy.value,
        majority=result.majority,
    )


def _missing(result: Evaluation, predictions: Predictions) -> Iterator[Finding]:
    """What is not known about the accuracy."""
    if result.accuracy is None:
        return
    if unlabeled := int((predictions.labels < 0).sum()):
        text = f"{unlabeled:,} of {result.n_images:,} images have no label and do not count toward the accuracy."
        yield Finding("unlabeled", text, images=unlabeled)
    absent = [name for i, name in enumerate(result.classes) if not (predictions.labels == i).any()]
    if absent:
        some = ", ".join(absent[:5]) + (f" and {len(absent) - 5} other classes" if len(absent) > 5 else "")
        yield Finding("absent classes", f"No image shows {some}, so the accuracy there is unknown.", names=absent)


def _is_too_few(result: Evaluation, units: int) -> bool:
    """Whether even differences that are the same on every image would not be significant after the correction."""
    pairs = Counter(pair.metric for pair in result.comparisons)
    return bool(pairs) and min(pairs.values()) * paired_test(np.ones(units)) >= LEVEL


def _not_judged(result: Evaluation, metric: str, methods: Sequence[str], n_maps: int) -> Iterator[Finding]:
    for method in methods:
        defined = n_maps - result.score(method, metric).undefined
        if defined < (1 - UNDEFINED_FRACTION) * n_maps:
            text = f"{words(method)} is not judged in {words(metric)}: only {defined} of {n_maps} images have a value."
            yield Finding("not judged", text, metric=metric, method=method, images=defined)


def _best(result: Evaluation, metric: str) -> Iterator[Finding]:
    standing = result.standings.get(metric)
    if standing is None:
        return
    best = standing.best
    interval = result.score(best, metric).interval
    known = compared(result, metric)
    undefined = [control for control in result.controls if control not in known]
    text = f"{words(best)} is best in {asked(metric)} with {interval}"
    if len(undefined) == len(result.controls) and metric not in result.chance:
        why = "no control is defined for enough images" if undefined else "without controls, this says little"
        yield Finding("best without controls", f"{text}; {why}.", metric=metric, method=best)
        return
    if standing.unbeaten:
        ahead = beaten(result, best, metric)
        behind = f"; {listed(ahead)} reliably {'beats' if len(ahead) == 1 else 'beat'} it" if ahead else ""
        left = listed(standing.unbeaten)
        if len(result.controls) > 1 and set(result.controls) <= set(standing.unbeaten):
            left = "any control or chance" if "chance" in standing.unbeaten else "any control"
        text += f", but does not reliably beat {left}{behind}."
        yield Finding("not better than a control", text, metric=metric, method=best, unbeaten=standing.unbeaten)
        return
    if chance := result.chance.get(metric):
        text += f", {interval.value / chance:.1f} times what a map without knowledge reaches ({chance:.3f})"
    others = [control for control in result.controls if control in known]
    text += "; it beats every control" if others else ""
    text += f" that is defined for enough images (not {listed(undefined)})" if others and undefined else ""
    if standing.tied:
        text += f"{' but' if others else '; it'} cannot be told apart from {listed(standing.tied)}"
    yield Finding("best", f"{text}.", metric=metric, method=best, tied=standing.tied)


def _no_better(result: Evaluation, methods: Sequence[str]) -> Iterator[Finding]:
    """Methods that beat no control under the first metric, where the best does."""
    metric = next(iter(result.ranking), "")
    standing = result.standings.get(metric)
    if standing is None or standing.unbeaten:
        return
    known, victories = compared(result, metric), won(result, metric)
    alike = defaultdict[tuple[str, ...], list[str]](list)
    for method in methods:
        controls = [c for c in result.controls if {c, method} <= known and (method, c) not in victories]
        if controls:
            alike[tuple(controls)].append(method)
    for controls, names in alike.items():
        who = f"{words(names[0])} is not" if len(names) == 1 else f"None of {listed(names, 99)} is"
        left = "any control" if len(controls) == len(result.controls) > 1 else listed(controls)
        text = f"{who} shown to be better than {left} in {asked(metric)}."
        yield Finding("not better than a control", text, metric=metric, methods=names, unbeaten=controls)


def _at_odds(result: Evaluation) -> Iterator[Finding]:
    table = result.metric_agreement
    if table is None:
        return
    known = {metric: compared(result, metric) for metric in result.ranking}
    pairs = [
        (a, b, float(table[i, j]))
        for (i, a), (j, b) in combinations(enumerate(result.ranking), 2)
        if np.isfinite(table[i, j]) and table[i, j] < _AT_ODDS / np.sqrt(len(known[a] & known[b]) - 1)
    ]
    if pairs:
        shown = ", ".join(f"{words(a)} and {words(b)} ({value:+.2f})" for a, b, value in pairs[:5])
        more = f" and {len(pairs) - 5} other pairs" if len(pairs) > 5 else ""
        text = f"These metrics put the methods in opposite orders: {shown}{more} (rank correlation over methods; -1: "
        text += "reversed), so which method is best depends on the metric."
        yield Finding("metrics at odds", text, pairs=pairs)


def _verdicts(result: Evaluation, methods: Sequence[str], n_maps: int) -> Iterator[Finding]:
    """Verdicts graver than a note, the gravest first."""
    for level in reversed(LEVELS[1:]):
        alike = defaultdict[tuple[str, int], list[str]](list)
        for method in methods:
            for verdict, levels in result.verdict_levels.get(method, {}).items():
                if level in levels:
                    alike[verdict, levels[level]].append(method)
        for (verdict, count), names in alike.items():
            which = f"{'each of ' if len(names) > 1 else ''}{listed(names, 99)}"
            what_to_do = "; do not read them" if level == "do not read" else ""
            text = f"{count} of {n_maps} maps of {which} {_STATES.get(verdict, f'are {verdict}')}{what_to_do}."
            yield Finding("verdict", text, verdict=verdict, level=level, methods=names, images=count)


def _coarse(result: Evaluation, methods: Sequence[str]) -> Iterator[Finding]:
    alike = defaultdict[tuple[int, ...], list[str]](list)
    for method in methods:
        if min(result.positions.get(method, (COARSE,))) < COARSE:
            alike[result.positions[method]].append(method)
    for positions, names in alike.items():
        text = (
            f"Maps of {listed(names, 99)} have only {' x '.join(map(str, positions))} positions: for finer ones, train "
            "on larger images (--data.size) or name an earlier layer (METHOD@LAYER)."
        )
        yield Finding("coarse maps", text, positions=positions, methods=names)
