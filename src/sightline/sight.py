"""The sight test: which explainer finds evidence that is known, and which metric would have told so without knowing."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import nn

from sightline import data, runs
from sightline.evaluation import Evaluation, evaluate
from sightline.evaluation.standings import UNDEFINED_SHARE
from sightline.explainers import Method
from sightline.facts import Interval, Progress
from sightline.metrics import METRICS, inputs_of
from sightline.metrics.agreement import ranks
from sightline.recipe import Recipe
from sightline.testing import PLANTED, planted
from sightline.training import fit

Array = np.ndarray

TRUTH = "relevance_rank"
"""What the explainers are ranked by: of as many pixels as the evidence has, the share that lies in it."""
SETS: Mapping[str, Mapping[str, object]] = {
    "clutter": {},
    "clutter-twice": {},
    "clutter-pair": {},
    "clutter-shortcut": {"data.shortcut": 0.95},
}
"""Data set -> changes to the recipe."""
_RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True)
class Sight:
    """What the sight test found."""

    evaluations: dict[str, Evaluation]
    predicts: dict[str, dict[str, Interval]]
    """Data set -> metric -> rank correlation over methods and controls between the metric and the truth."""

    def markdown(self) -> str:
        """Two tables: methods by truth, metrics by how well they predict it."""
        sets = list(self.evaluations)
        methods = dict.fromkeys(m for found in self.evaluations.values() for m in found.methods)
        controls = {m for found in self.evaluations.values() for m in found.controls}

        def truth(method: str, name: str) -> float:
            found = self.evaluations[name]
            return found.score(method, TRUTH).interval.value if method in found.methods else np.nan

        order = sorted(methods, key=lambda method: -_mean(truth(method, name) for name in sets))
        lines = [["method", *sets]]
        for method in order:
            cells: list[str] = []
            for name in sets:
                found = self.evaluations[name]
                cells.append(_figures(found.score(method, TRUTH).interval) if method in found.methods else "-")
            lines.append([f"{method} (control)" if method in controls else method, *cells])
        lines.append(["chance", *(f"{found.chance[TRUTH]:.3f}" for found in self.evaluations.values())])
        metrics = dict.fromkeys(metric for of in self.predicts.values() for metric in of)
        none = Interval(value=np.nan, low=np.nan, high=np.nan, n=0)

        def forecast(metric: str, name: str) -> Interval:
            return self.predicts[name].get(metric, none)

        best = sorted(metrics, key=lambda metric: -_mean(forecast(metric, name).value for name in sets))
        second = [["metric", *sets], *([m, *(_figures(forecast(m, name)) for name in sets)] for m in best)]
        made = ", ".join(f"{found.provenance['images with maps']} ({name})" for name, found in self.evaluations.items())
        first = f"`{TRUTH}` of each map, mean over the images: {made}. 1 is the truth."
        then = "How well each metric forecasts that order of the maps: rank correlation, 1 always, 0 as a draw would."
        return f"{first}\n\n{_table(lines)}\n{then}\n\n{_table(second)}"


def sight_test(
    out: Path | str,
    start: Recipe,
    overrides: Mapping[str, object] | None = None,
    *,
    sets: Sequence[str] | None = None,
    known: bool = False,
    methods: Sequence[Method] | str = "all",
    limit: int = 200,
    budget: float | None = None,
    progress: Progress | None = None,
) -> Sight:
    """Rank all explainers by evidence that is known, and all metrics by how well they forecast that ranking.

    A small network is trained on each planted set; what is done in `out` is not done again. Of `clutter-shortcut` the
    evidence is the patch. With `known` nothing is trained: the models of `sightline.testing` use exactly the planted
    pixels, by construction.

    Args:
        out: folder; each network is `out`/set.
        start: recipe of the networks.
        overrides: of the recipe.
        sets: which of `SETS`, or of `sightline.testing.PLANTED`; all of them.
        known: see above.
        methods: as for `evaluate`.
        limit: images to make maps of.
        budget: seconds for the maps and scores of one set.
        progress: called with (what, done, total).

    Raises:
        ValueError: an unknown set.
        OSError: `out` cannot be written.
    """
    among = list(PLANTED if known else SETS)
    sets = among if sets is None else list(sets)
    if unknown := [name for name in sets if name not in among]:
        raise ValueError(f"expected sets out of {', '.join(among)}, got {unknown[0]!r}")
    out = Path(out)
    runs.check_writable(out)
    blind = [name for name, of in METRICS.items() if "masks" not in inputs_of(of) and of.higher_is_better is not None]
    evaluations: dict[str, Evaluation] = {}
    for name in sets:
        model, images, seed = _known(name, limit) if known else _trained(name, out, start, overrides or {})
        evaluations[name] = evaluate(
            model,
            images,
            methods,
            [TRUTH, "energy_in_mask", *blind],
            limit=limit,
            budget=budget,
            seed=seed,
            name=name,
            partial_results=out / name / ".evaluation",
            provenance=runs.surroundings(),
            progress=progress,
        )
        evaluations[name].to_json(out / name / "evaluation.json")
        evaluations[name].to_csv(out / name / "per_image.csv")
    predicts = {name: predicted(found, TRUTH) for name, found in evaluations.items()}
    result = Sight(evaluations=evaluations, predicts=predicts)
    runs.write(out / "sight.json", json.dumps(runs.plain(predicts), indent=1).encode())
    runs.write(out / "sight.md", result.markdown().encode())
    return result


def _known(kind: str, n: int) -> tuple[nn.Module, Any, int]:
    return PLANTED[kind](), [planted(kind, n)], 0


def _trained(
    name: str, out: Path, start: Recipe, overrides: Mapping[str, object]
) -> tuple[nn.Module, data.ImageSet, int]:
    run = fit(start, out / name, {"data.source": name, **SETS[name], **overrides}, resume=True)
    assert isinstance(run, runs.Run)
    images = replace(data.load(run.recipe.data)["test"], preprocess=run.preprocess)
    return runs.load_model(run.folder), images, run.seed


def predicted(found: Evaluation, truth: str, seed: int = 0) -> dict[str, Interval]:
    """How well each ranking metric that knows no mask ranks as `truth` does: rank correlation, 95 % bootstrap.

    Images are resampled, for the metric and the truth alike, methods are not; better counts as higher, whatever the
    metric's direction. Resampling adds noise to the order as sampling did, which pulls a correlation down, so the
    interval reaches as far as the percentiles or their mirror image at the value, whichever is further, within -1 and
    1. A method that is undefined for more than a tenth of the images counts for nothing.
    """
    tables = {
        metric: _oriented(found, metric)
        for metric in (truth, *found.ranking)
        if metric == truth or "masks" not in inputs_of(METRICS[metric])
    }
    n = len(found.per_image["name"])
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(n, np.full(n, 1 / n), size=_RESAMPLES).astype(float)
    known, drawn = _means(tables[truth], np.ones((1, n))), _means(tables[truth], weights)
    answers: dict[str, Interval] = {}
    for metric, table in tables.items():
        if metric == truth:
            continue
        both = np.isfinite([table, tables[truth]]).mean(1).min(0) >= 1 - UNDEFINED_SHARE
        value = float(_spearman(_means(table, np.ones((1, n)))[:, both], known[:, both])[0])
        resampled = _spearman(_means(table, weights)[:, both], drawn[:, both])
        resampled = resampled[np.isfinite(resampled)]
        ends = np.percentile(resampled, [2.5, 97.5]) if len(resampled) else np.full(2, np.nan)
        ends = np.clip([*ends, *(2 * value - ends)], -1, 1)
        answers[metric] = Interval(value=value, low=float(ends.min()), high=float(ends.max()), n=n)
    return answers


def _oriented(found: Evaluation, metric: str) -> Float[Array, "n methods"]:
    sign = 1 if found.higher_is_better[metric] else -1
    return sign * np.array([found.per_image[f"{metric}/{method}"] for method in found.methods], dtype=float).T


def _means(table: Float[Array, "n methods"], weights: Float[Array, "r n"]) -> Float[Array, "r methods"]:
    defined = np.isfinite(table)
    counts = weights @ defined
    return (weights @ np.where(defined, table, 0)) / np.where(counts > 0, counts, np.nan)


def _spearman(a: Float[Array, "r k"], b: Float[Array, "r k"]) -> Float[Array, " r"]:
    a, b = (np.asarray(ranks(x)) for x in (a, b))
    a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    lengths = np.sqrt((a**2).sum(1) * (b**2).sum(1))
    return (a * b).sum(1) / np.where(lengths > 0, lengths, np.nan)


def _mean(values: Iterable[float]) -> float:
    """Of the defined ones; the lowest of all numbers where there is none."""
    defined = [value for value in values if np.isfinite(value)]
    return float(np.mean(defined)) if defined else -np.inf


def _figures(interval: Interval) -> str:
    if not np.isfinite(interval.value):
        return "-"
    return f"{interval.value:.2f} [{interval.low:.2f}, {interval.high:.2f}]"


def _table(lines: Sequence[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (lines[0], ["---"] * len(lines[0]), *lines[1:]))
