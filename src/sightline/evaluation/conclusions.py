"""What an evaluation comes to: where the model looks, and which map to believe."""

import math
from collections.abc import Collection, Mapping
from itertools import permutations

from sightline.evaluation.ranking import UNDEFINED_FRACTION, wins
from sightline.evaluation.result import Evaluation
from sightline.facts import Finding, Interval, joined, listed, percent, words
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
    return {name for pair in result.pairs(metric) for name in (pair.method, pair.other)}


def won(result: Evaluation, metric: str) -> set[tuple[str, str]]:
    """(winner, loser) by the corrected paired test."""
    return wins(result.pairs(metric), result.higher_is_better[metric] is True)


def unbeaten(result: Evaluation, method: str, metric: str) -> Unbeaten:
    """The controls, and `chance`, that a method does not beat; None if it cannot be compared with any."""
    known, victories, standing = compared(result, metric), won(result, metric), result.standings[metric]
    controls = [control for control in result.controls if control in known]
    is_defined = math.isfinite(result.score(method, metric).interval.value)
    if not is_defined or (method not in known and controls) or (metric not in result.chance and not controls):
        return None
    left = [control for control in controls if (method, control) not in victories]
    is_at_chance = metric in result.chance and method not in standing.above_chance
    return (*left, *(["chance"] if is_at_chance else []))


def maps_made(result: Evaluation) -> int:
    """The number of images whose maps were scored."""
    return int(result.provenance["images with maps"])


def flaws(result: Evaluation) -> dict[str, str]:
    """Method -> why its maps are not to be believed, whatever they score."""
    maps = maps_made(result)
    found: dict[str, str] = {}
    for method in result.methods:
        bad = {kind: levels.get("do not read", 0) for kind, levels in result.verdict_levels.get(method, {}).items()}
        kind = max(bad, key=lambda kind: bad[kind], default="")
        if kind and bad[kind] > UNDEFINED_FRACTION * maps:
            found[method] = f"is {kind} on {bad[kind]} of {maps} images"
    for test, failing in result.failed.items():
        found |= {method: _FAILS.get(test, f"fails {words(test)}") for method in failing}
    return found


def beaten(result: Evaluation, method: str, metric: str) -> list[str]:
    """The controls that beat a method."""
    victories = won(result, metric)
    return [control for control in result.controls if (control, method) in victories]


def which_map(result: Evaluation, units: int, is_too_few: bool) -> Finding:
    """Which map to believe, from how often each beats every control, by `units` images or groups.

    A method counts in a metric if it beats every control image by image, and chance. It is out if it fails a sanity
    test, if more than a tenth of its maps are not to be read, or if controls beat it in more metrics than it counts in.
    The methods to believe are those of the rest that count in the most metrics. The first one named is one that no
    other beats in more metrics than it beats that other; if there are several, the one that beats most of the others.
    """
    methods = [method for method in result.methods if method not in result.controls]
    judged = [metric for metric in result.ranking if metric in result.standings]
    judged = [metric for metric in judged if compared(result, metric) & {*result.controls}]
    behind = f"{units:,} images" if result.unit == "images" else f"{units:,} groups ({result.unit})"
    if not result.ranking:
        return _open("No metric that ranks maps was computed, so it is not known which of them to believe.")
    if not judged:
        return _open("It is not known which map to believe: no control was included, or none is defined often enough.")
    beats = {method: [m for m in judged if unbeaten(result, method, m) == ()] for method in methods}
    flawed = {method: why for method, why in flaws(result).items() if method in methods}
    for method, metrics in beats.items():
        losses = sum(bool(beaten(result, method, metric)) for metric in judged)
        if losses > len(metrics) > 0:
            flawed.setdefault(method, f"is beaten by a control in {losses}")
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

    def lead(one: str, other: str) -> int:
        return ahead(one, other) - ahead(other, one)

    def rank(one: str) -> tuple[bool, int]:
        return any(lead(one, other) < 0 for other in leaders), -sum(lead(one, other) for other in leaders)

    best, *others = sorted(leaders, key=rank)  # in place, `rank` would see an empty list
    tied = [other for other in others if lead(best, other) <= 0]
    text = _believed(result, [best, *tied], beats, judged)
    if not any(ahead(one, other) for one, other in permutations([best, *tied], 2)):
        text += f"; {behind} cannot tell them apart" if tied else ""
    elif any(ahead(best, other) or ahead(other, best) for other in tied):
        text += "; which of them is better depends on the measure"
    else:
        text += f"; {behind} cannot tell {words(best)} from the others"
    text += _untested(result, [best, *tied])
    return Finding(BELIEVE, f"{text}.", believed=(best, *tied), beats=beats)


def _open(text: str) -> Finding:
    return Finding(BELIEVE, text, believed=())


def _untested(result: Evaluation, methods: list[str]) -> str:
    """What is missing of the randomization test."""
    test = "parameter_randomization"
    if test not in result.metrics:
        return "; the randomization test was not run"
    maps = maps_made(result)
    unknown = [name for name in methods if result.score(name, test).undefined > UNDEFINED_FRACTION * maps]
    return f"; the randomization test is not defined often enough for {listed(unknown, 4)}" if unknown else ""


def _believed(result: Evaluation, believed: list[str], beats: Mapping[str, list[str]], judged: list[str]) -> str:
    names, best, several = listed(believed, 4), believed[0], len(believed) > 1
    counted = beats[best]
    is_whole = all({*result.controls} <= compared(result, metric) for metric in counted)
    bar = "every control" if is_whole else "every control that is defined for enough images"
    who = f"{'each beats' if several else 'it beats'} {bar}"
    where = f"in {len(counted)} of {len(judged)} measures"
    if len(judged) == 1:
        where = f"in the only measure, {asked(judged[0])}"
    if len(counted) == len(judged):
        return f"{names} {'are the maps' if several else 'is the map'} to believe here: {who} {where}"
    text = f"Believe {names} with reservations: {who} {where}"
    if any(beats[name] != counted for name in believed):
        return text
    text += f", {joined(map(asked, counted))}"
    missed = [metric for metric in judged if metric not in counted]
    if several:
        return text
    lost = [metric for metric in missed if beaten(result, best, metric)]
    if lost:
        above = beaten(result, best, lost[0])
        return f"{text}, but {_controls(above)} {'beats' if len(above) == 1 else 'beat'} it in {asked(lost[0])}"
    rest = unbeaten(result, best, missed[0])
    return f"{text}, but {f'not {_controls(rest)}' if rest else 'is not defined often enough'} in {asked(missed[0])}"


def _none(
    result: Evaluation,
    methods: list[str],
    judged: list[str],
    beats: dict[str, list[str]],
    flawed: dict[str, str],
    behind: str,
) -> str:
    if out := [method for method in methods if beats[method]]:
        of = f"of {len(judged)} measure{'s' * (len(judged) > 1)}"
        why = (f"{words(one)} beats every control in {len(beats[one])} {of} but {flawed[one]}" for one in out[:3])
        return f"Do not rely on these maps: {'; '.join(why)}; no other map beats every control in any."
    never = set[str](result.controls) | {"chance"}
    for metric in judged:
        victories = won(result, metric)
        losers = {control for method in methods for control in result.controls if (method, control) in victories}
        of_best = result.standings[metric].unbeaten
        never &= (compared(result, metric) - losers) | ({"chance"} & set(of_best))
    where = f"in {asked(judged[0])}" if len(judged) == 1 else f"in any of {len(judged)} measures"
    if blind := [name for name in (*_BLIND, *result.controls, "chance") if name in never]:
        return f"Do not rely on these maps: with {behind}, none is shown to beat {_controls(blind[:1])} {where}."
    return f"Do not rely on these maps: with {behind}, none is shown to beat every control {where}."


def _controls(names: Collection[str]) -> str:
    return joined(f"{_BLIND[name]} ({words(name)})" if name in _BLIND else words(name) for name in names)


def where_it_looks(result: Evaluation, believed: Collection[str]) -> Finding:
    """What the first of the believed maps shows about the masks, or the best of them if none is."""
    metric = next((metric for metric in _LOCALIZED if metric in result.standings and metric in result.chance), None)
    if metric is None:
        has_masks = any(example.mask is not None for example in result.examples)
        why = "no metric that uses masks was computed" if has_masks else "there are no masks to compare the maps with"
        return Finding(LOOKS, f"It is not known where it looks: {why}.")
    defined = (name for name in believed if math.isfinite(result.score(name, metric).interval.value))
    method = next(defined, result.standings[metric].best)
    interval, chance = result.score(method, metric).interval, result.chance[metric]
    share = f"{percent(interval.value)} {ends(interval)}"
    text = _LOCALIZED[metric].format(method=words(method), share=share, chance=percent(chance))
    rest, controls = unbeaten(result, method, metric), compared(result, metric) & {*result.controls}
    there = "the cell of its class" if metric == "grid_pointing_game" else "what the masks mark"
    values = {"metric": metric, "method": method, "share": interval.value, "chance": chance}
    if not believed:
        start = "It is not known where it looks, since no map here can be relied on. The best of them"
    elif rest == () and not controls:
        start = f"It looks at {there} more than by chance"
    elif rest == ():
        start = f"It looks at {there}"
        text += ", more than with any control"
        text += "" if controls == {*result.controls} else " that is defined for enough images"
    elif rest and "chance" not in rest:
        start = f"It looks at {there} more than by chance"
        text += f", but {words(method)} is not shown to beat {_controls(rest[:2])}"
    else:
        start = f"It is not shown to look at {there}"
    return Finding(LOOKS, f"{start}: {text}.", **values)
