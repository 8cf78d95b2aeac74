"""What an evaluation comes to: where the model looks, and which map to believe."""

import math
from collections.abc import Collection, Iterator, Mapping

from sightline.evaluation.ranking import UNDEFINED_FRACTION, wins
from sightline.evaluation.result import Evaluation
from sightline.facts import Finding, Interval, listed, percent, words
from sightline.metrics import METRICS, MOSAIC_METRICS

Unbeaten = tuple[str, ...] | None
LOOKS, BELIEVE = "where it looks", "which map"
"""Kinds of the two findings."""

_LOCALIZED = {
    "energy_in_mask": "{share} of {method} lies in the masks, which cover {chance} of the images",
    "pointing_game": "the highest point of {method} lies in the mask on {share} of the images, {chance} by chance",
    "relevance_rank": "the highest pixels of {method} fill {share} of the masks, {chance} by chance",
    "grid_pointing_game": "{share} of {method} lies in the cell of the class in a mosaic, {chance} by chance",
}
"""Metric -> what it says about where the model looks; the first that was measured is taken."""
_FAILS = {
    "parameter_randomization": "stays much the same when the model's weights are shuffled",
    "random_logit": "stays much the same for another class",
}
_BLIND = {
    "random_map": "random values",
    "center_map": "a blob in the middle",
    "edge_map": "the edges in the image",
    "contrast_map": "the contrast in the image",
}


def asked(metric: str) -> str:
    """A metric with what it measures.

    >>> asked("insertion_auc")
    'insertion (how fast the class returns as the most important pixels are shown)'
    """
    meaning = (METRICS | MOSAIC_METRICS)[metric].meaning
    return f"{words(metric)} ({meaning})" if meaning else words(metric)


def ends(interval: Interval) -> str:
    """The ends of an interval of a share.

    >>> ends(Interval(value=0.5, low=0.4, high=0.6123, n=9))
    '(95 % interval 40.0 to 61.2 %)'
    """
    if not math.isfinite(interval.low + interval.high):
        return "(no interval)"
    return f"(95 % interval {100 * interval.low:.1f} to {100 * interval.high:.1f} %)"


def compared(result: Evaluation, metric: str) -> set[str]:
    """The methods and controls that are defined for enough images."""
    return {name for pair in result.comparisons if pair.metric == metric for name in (pair.method, pair.other)}


def won(result: Evaluation, metric: str) -> set[tuple[str, str]]:
    """(winner, loser) by the corrected paired test."""
    pairs = [pair for pair in result.comparisons if pair.metric == metric]
    return wins(pairs, result.higher_is_better[metric] is True)


def unbeaten(result: Evaluation, method: str, metric: str) -> Unbeaten:
    """The controls, and `chance`, that a method does not beat; None if it cannot be compared with any."""
    known, victories, chance = compared(result, metric), won(result, metric), result.chance.get(metric)
    controls = [control for control in result.controls if control in known]
    score = {score.method: score for score in result.scores if score.metric == metric}.get(method)
    if score is None or (method not in known and controls) or (chance is None and not controls):
        return None
    interval, up = score.interval, result.higher_is_better[metric]
    is_beyond = chance is None or (interval.low > chance if up else interval.high < chance)
    standing = result.standings.get(metric)
    if standing is not None and standing.best == method:
        is_beyond = "chance" not in standing.unbeaten  # it was tested, too
    left = [control for control in controls if (method, control) not in victories]
    return (*left, *([] if is_beyond else ["chance"]))


def flaws(result: Evaluation) -> dict[str, str]:
    """Method -> why its maps are not to be believed, whatever they score."""
    maps = int(result.provenance.get("images with maps", 0)) or len(result.per_image["name"])
    found: dict[str, str] = {}
    for method in result.methods:
        bad = {kind: levels.get("do not read", 0) for kind, levels in result.verdict_levels.get(method, {}).items()}
        kind = max(bad, key=lambda kind: bad[kind], default="")
        if kind and bad[kind] > UNDEFINED_FRACTION * maps:
            found[method] = f"is {kind} on {bad[kind]} of {maps} images"
    for test, failing in result.failed.items():
        found |= {method: _FAILS.get(test, f"fails {words(test)}") for method in failing}
    return found


def which_map(result: Evaluation, units: int, is_too_few: bool) -> Finding:
    """Which map to believe, from how often each beats every control, by `units` images or groups.

    A method counts in a metric if it beats every control image by image, and chance. Those that fail a sanity test, or
    that are not to be read on a tenth of the images, are out. Of the others, those that count in most metrics are to be
    believed; the first of them is the one that beats most of the others.
    """
    methods = [method for method in result.methods if method not in result.controls]
    judged = [metric for metric in result.ranking if metric in result.standings]
    behind = f"{units:,} images" if result.unit == "images" else f"{units:,} groups ({result.unit})"
    left = {(method, metric): unbeaten(result, method, metric) for method in methods for metric in judged}
    judged = [metric for metric in judged if any(left[method, metric] is not None for method in methods)]
    if not result.ranking:
        return _open("No metric that ranks maps was computed, so it is not known which of them to believe.")
    if not judged:
        return _open("It is not known which map to believe: no control was included, or none is defined often enough.")
    beats = {method: [metric for metric in judged if left[method, metric] == ()] for method in methods}
    flawed = {method: why for method, why in flaws(result).items() if method in methods}
    sound = [method for method in methods if method not in flawed]
    most = max((len(beats[method]) for method in sound), default=0)
    if not most:
        if is_too_few:
            return _open(f"It is not known which map to believe: {behind} are too few for a significant difference.")
        return Finding(BELIEVE, _none(result, methods, judged, beats, flawed, behind), believed=())
    leaders = [method for method in sound if len(beats[method]) == most]
    victories = {metric: won(result, metric) for metric in judged}

    def ahead(one: str, other: str) -> int:
        return sum((one, other) in victories[metric] for metric in judged)

    leaders.sort(key=lambda one: -sum(ahead(one, other) - ahead(other, one) for other in leaders))
    tied = [other for other in leaders[1:] if ahead(leaders[0], other) <= ahead(other, leaders[0])]
    text = _believed(leaders[0], tied, beats[leaders[0]], judged, left)
    if tied:
        told_apart = any(ahead(leaders[0], other) for other in tied)
        text += "; which of them is better depends on the measure" if told_apart else ""
        text += "" if told_apart else f"; {behind} cannot tell them apart"
    if "parameter_randomization" not in result.metrics:
        text += "; the randomization test was not run"
    return Finding(BELIEVE, f"{text}.", believed=(leaders[0], *tied), beats=beats)


def _open(text: str) -> Finding:
    return Finding(BELIEVE, text, believed=())


def _believed(
    best: str,
    tied: list[str],
    beaten_in: list[str],
    judged: list[str],
    left: Mapping[tuple[str, str], Unbeaten],
) -> str:
    names, several = listed([best, *tied], 4), bool(tied)
    who = "each beats" if several else "it beats"
    if len(judged) == 1:
        where = f"in the only measure, {asked(judged[0])}"
    else:
        where = f"in {len(beaten_in)} of {len(judged)} measures"
    if len(beaten_in) == len(judged):
        return f"{names} {'are the maps' if several else 'is the map'} to believe here: {who} every control {where}"
    text = f"Believe {names} with reservations: {who} every control {where}, {_joined(map(asked, beaten_in))}"
    if several:
        return text
    missed = next(metric for metric in judged if metric not in beaten_in)
    rest = left[best, missed]
    return f"{text}, but {f'not {_controls(rest)}' if rest else 'is not defined often enough'} in {asked(missed)}"


def _none(
    result: Evaluation,
    methods: list[str],
    judged: list[str],
    beats: dict[str, list[str]],
    flawed: dict[str, str],
    behind: str,
) -> str:
    if out := [method for method in methods if beats[method]]:
        why = "; ".join(f"{words(method)} beats every control but {flawed[method]}" for method in out[:3])
        return f"Do not rely on these maps: {why}; no other map beats every control."
    never = set[str](result.controls) | {"chance"}
    for metric in judged:
        victories = won(result, metric)
        beaten = {control for method in methods for control in result.controls if (method, control) in victories}
        of_best = result.standings[metric].unbeaten
        never &= (compared(result, metric) - beaten) | ({"chance"} & set(of_best))
    where = f"in {asked(judged[0])}" if len(judged) == 1 else f"in any of {len(judged)} measures"
    if blind := [name for name in (*_BLIND, *result.controls, "chance") if name in never]:
        return f"Do not rely on these maps: with {behind}, none is shown to beat {_controls(blind[:1])} {where}."
    return f"Do not rely on these maps: with {behind}, none is shown to beat every control {where}."


def _controls(names: Collection[str]) -> str:
    return _joined(f"{_BLIND[name]} ({words(name)})" if name in _BLIND else words(name) for name in names)


def _joined(texts: Iterator[str] | Collection[str]) -> str:
    *first, last = texts
    return f"{', '.join(first)} and {last}" if first else last


def where_it_looks(result: Evaluation, believed: Collection[str]) -> Finding:
    """What the first of the believed maps shows about the masks, or the best of them if none is."""
    metric = next((metric for metric in _LOCALIZED if metric in result.standings), None)
    if metric is None:
        has_masks = any(example.mask is not None for example in result.examples)
        why = "no metric that uses masks was computed" if has_masks else "there are no masks to compare the maps with"
        return Finding(LOOKS, f"It is not known where it looks: {why}.")
    defined = (name for name in believed if math.isfinite(result.score(name, metric).interval.value))
    method = next(defined, result.standings[metric].best)
    interval, chance = result.score(method, metric).interval, result.chance.get(metric, 0.0)
    share = f"{percent(interval.value)} {ends(interval)}"
    text = _LOCALIZED[metric].format(method=words(method), share=share, chance=percent(chance))
    rest = unbeaten(result, method, metric)
    there = "the cell of its class" if metric == "grid_pointing_game" else "what the masks mark"
    values = {"metric": metric, "method": method, "share": interval.value, "chance": chance}
    if not believed:
        start = "It is not known where it looks, since no map here can be relied on. The best of them"
    elif rest == ():
        start = f"It looks at {there}"
        text += ", more than with any control"
    elif rest and "chance" not in rest:
        start = f"It looks at {there} more than by chance"
        text += f", but {words(method)} is not shown to beat {_controls(rest[:2])}"
    else:
        start = f"It is not shown to look at {there}"
    return Finding(LOOKS, f"{start}: {text}.", **values)
