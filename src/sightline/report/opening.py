"""What a report begins with: a few images with their maps, chosen by rule, and three answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest

import numpy as np

from sightline.evaluation import Evaluation, Example
from sightline.evaluation.conclusions import BELIEVE
from sightline.evaluation.findings import ANSWERS
from sightline.facts import Finding

IMAGES, METHODS = 6, 4
"""Most images and methods that are shown."""
_WELL_KNOWN = ("grad_cam", "attention", "cam", "integrated_gradients", "lrp", "activation_map", "saliency")


@dataclass(frozen=True, kw_only=True)
class Opening:
    """The first screen of a report."""

    examples: tuple[Example, ...]
    methods: tuple[str, ...]
    """The best of the ranking first, then the best known."""
    control: str | None
    """The best of the controls in the first metric."""
    rule: str
    """How the images were chosen."""
    answers: tuple[Finding, ...]


def opening(evaluation: Evaluation) -> Opening:
    """Choose what to show: no image is picked by its maps."""
    examples, rule = _chosen(evaluation.examples)
    drawn = [name for name in evaluation.methods if all(name in example.maps for example in examples)]
    return Opening(
        examples=examples,
        methods=tuple(_foremost(evaluation, [name for name in drawn if name not in evaluation.controls])),
        control=_best_control(evaluation, [name for name in drawn if name in evaluation.controls]),
        rule=rule,
        answers=tuple(finding for finding in evaluation.summary if finding.kind in ANSWERS)[:3],
    )


def _chosen(examples: Sequence[Example]) -> tuple[tuple[Example, ...], str]:
    """As many right as wrong ones, as far as there are, in turn; and the rule in words."""
    right = [example for example in examples if example.label == example.prediction]
    wrong = [example for example in examples if example.label not in (None, example.prediction)]
    unknown = [example for example in examples if example.label is None]
    wrongs = min(len(wrong), max(IMAGES // 2, IMAGES - len(right) - len(unknown)))
    rights = min(len(right), IMAGES - wrongs)
    chosen = [one for one in chain(*zip_longest(right[:rights], wrong[:wrongs])) if one is not None]
    unlabeled = unknown[: IMAGES - len(chosen)]
    of = f"{len(examples)} images drawn at random"
    kinds = {"right": rights, "wrong": wrongs, "unlabeled": len(unlabeled)}
    parts = [f"the first {f'{count} ' * (count > 1)}{kind}" for kind, count in kinds.items() if count]
    if len(parts) < 2:
        how = "correctly" if right else "wrongly"
        same = f", all named {how}" if len(right) + len(wrong) > 1 and not unknown else ""
        return (*chosen, *unlabeled), f"The first {len(chosen) + len(unlabeled)} of {of}{same}."
    answers = "" if unlabeled else " answer" if wrongs == 1 else " answers"
    return (*chosen, *unlabeled), f"T{', '.join(parts[:-1])[1:]} and {parts[-1]}{answers} among {of}."


def _foremost(evaluation: Evaluation, methods: Sequence[str]) -> list[str]:
    best = [name for finding in evaluation.summary if finding.kind == BELIEVE for name in finding.values["believed"]]
    best = best[:1] or [standing.best for standing in evaluation.standings.values()][:1]
    known = [name for base in _WELL_KNOWN for name in methods if name.partition("@")[0] == base]
    return [name for name in dict.fromkeys([*best, *known, *methods]) if name in methods][:METHODS]


def _best_control(evaluation: Evaluation, controls: Sequence[str]) -> str | None:
    metric = next(iter(evaluation.ranking), None)
    means = {score.method: score.interval.value for score in evaluation.scores if score.metric == metric}
    means = {name: means[name] for name in controls if np.isfinite(means.get(name, np.nan))}
    if metric is None or not means:
        return next(iter(controls), None)
    return (max if evaluation.higher_is_better[metric] else min)(means, key=lambda name: means[name])
