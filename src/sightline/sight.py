"""The sight test: which explainer finds known evidence, and which metric would have told without knowing it.

On planted images, and in mosaics of any images for any model.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn

from sightline import data, inference, maps, report, runs
from sightline.data import ImageSet, Preprocess
from sightline.evaluation import Evaluation, as_word, evaluate, evaluate_mosaics
from sightline.evaluation.ranking import UNDEFINED_FRACTION
from sightline.explainers import Method
from sightline.facts import Interval, Progress
from sightline.metrics import METRICS, inputs_of
from sightline.metrics.agreement import correlation, ranks
from sightline.planted import PLANTED, planted
from sightline.recipe import Data, Recipe

Array = np.ndarray

TRUTH = "relevance_rank"
"""The explainers are ranked by the fraction of their highest pixels, as many as the evidence has, that lie in it."""
SETS: Mapping[str, Mapping[str, object]] = {
    "clutter": {},
    "clutter-twice": {},
    "clutter-pair": {},
    "clutter-shortcut": {"data.shortcut": 0.95},
}
"""Data set -> changes to the recipe."""
_RESAMPLES = 2000
_PER_ROW = 6  # maps beside a mosaic


@dataclass(frozen=True, kw_only=True)
class Sight:
    """The result of the sight test."""

    def __repr__(self) -> str:
        return "\n".join(["Sight:", *(f"  {name}: {result}" for name, result in self.evaluations.items())])

    def _repr_markdown_(self) -> str:
        return self.markdown()

    evaluations: dict[str, Evaluation]
    predicts: dict[str, dict[str, Interval]]
    """Data set -> metric -> rank correlation over methods and controls between the metric and the truth."""

    def markdown(self) -> str:
        """Two tables: methods by truth, metrics by how well they predict it."""
        results, names = self.evaluations, list(self.evaluations)
        truth: dict[str, dict[str, Interval]] = {}
        forecasts: dict[str, dict[str, Interval]] = {}
        for name, result in results.items():
            for method in result.methods:
                truth.setdefault(result.label(method), {})[name] = result.score(method, TRUTH).interval
            for metric, interval in self.predicts[name].items():
                forecasts.setdefault(metric, {})[name] = interval
        chance = ["chance", *(f"{result.chance[TRUTH]:.3f}" for result in results.values())]
        counts = ", ".join(f"{result.provenance['images with maps']} ({name})" for name, result in results.items())
        first = f"`{TRUTH}` of each map, mean over the images: {counts}. 1 is the truth."
        then = "How well each metric forecasts that order of the maps: rank correlation, 1 always, 0 as a draw would."
        methods = _table(["method", *names], truth) + _line(chance)
        return f"{first}\n\n{methods}\n{then}\n\n{_table(['metric', *names], forecasts)}"


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
    progress: Progress | bool | None = None,
    tell: Callable[[str], None] | None = None,
) -> Sight:
    """Rank all explainers by known evidence, and all metrics by how well they forecast that ranking.

    A small network is trained on each planted set; finished steps in `out` are not repeated. The evidence of
    `clutter-shortcut` is the patch. With `known` nothing is trained: the models of `sightline.testing` use exactly the
    planted pixels, by construction.

    Args:
        out: folder; each network is `out`/set.
        start: recipe of the networks.
        overrides: of the recipe.
        sets: which of `SETS`, or of `sightline.testing.PLANTED`; all of them.
        known: see above.
        methods: as for `evaluate`.
        limit: number of images to make maps of.
        budget: seconds for the maps and scores of one set.
        progress: True shows a bar; a function is called with (what, done, total).
        tell: as for `evaluate`.

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
    chosen: dict[str, Any] = {"methods": methods, "metrics": [TRUTH, "energy_in_mask", *_without_masks()]}
    chosen |= {"limit": limit, "budget": budget, "progress": progress, "tell": tell, "provenance": runs.surroundings()}
    evaluations: dict[str, Evaluation] = {}
    for name in sets:
        if known:
            model, images, seed = PLANTED[name](), [planted(name, limit)], 0
        else:
            model, images, seed = _trained(name, out, start, overrides or {})
        partial_results = out / name / ".evaluation"
        result = evaluate(model, images, **chosen, seed=seed, name=name, partial_results=partial_results)
        result.to_json(out / name / "evaluation.json")
        result.to_csv(out / name / "per_image.csv")
        evaluations[name] = result
    predicts = {name: predicted(result, TRUTH) for name, result in evaluations.items()}
    sight = Sight(evaluations=evaluations, predicts=predicts)
    runs.write(out / "sight.json", json.dumps(runs.plain(predicts), indent=1).encode())
    runs.write(out / "sight.md", sight.markdown().encode())
    return sight


def sight_mosaics(
    out: Path | str,
    model: nn.Module,
    images: ImageSet,
    methods: Sequence[Method] | str | None = None,
    *,
    name: str = "",
    grid: tuple[int, int] = (2, 2),
    confidence: float = 0.5,
    limit: int = 50,
    budget: float | None = None,
    strict: bool = False,
    progress: Progress | bool | None = None,
) -> Evaluation:
    """Rank explainers on any model by the grid pointing game, see `evaluate_mosaics`; nothing is trained.

    Writes into `out`: sight.md (the table), mosaic.png (one mosaic with the maps of its classes), report.html,
    evaluation.json and per_image.csv. A call with the same arguments resumes an interrupted one.

    Args:
        out: folder.
        model: any classifier.
        images: of its classes, or without labels; see `photos`.
        methods: as for `evaluate_mosaics`.
        name: of the model.
        grid: rows and columns of a mosaic.
        confidence: probability from which on images are used.
        limit: number of mosaics.
        budget: seconds for all maps.
        strict: whether a named method that does not fit the model is an error.
        progress: True shows a bar; a function is called with (what, done, total).

    Raises:
        ValueError: not enough images of different classes that the model names correctly.
        OSError: `out` cannot be written.
    """
    out = Path(out)
    runs.check_writable(out)
    result = evaluate_mosaics(
        model,
        images,
        as_word(methods),
        grid=grid,
        confidence=confidence,
        limit=limit,
        budget=budget,
        strict=strict,
        name=f"mosaics of {images.name}",
        provenance=runs.surroundings(),
        progress=progress,
        partial_results=out / ".evaluation",
    )
    result = replace(result, model=name or result.model)
    result.to_json(out / "evaluation.json")
    result.to_csv(out / "per_image.csv")
    report.write(result, out)
    runs.write(out / "mosaic.png", maps.png(mosaic_picture(result)))
    runs.write(out / "sight.md", mosaic_table(result).encode())
    return result


def mosaic_table(result: Evaluation) -> str:
    """The scores of `evaluate_mosaics` as a table, the best first."""
    rows = {
        result.label(method): {metric: result.score(method, metric).interval for metric in result.metrics}
        for method in result.methods
    }
    first = (
        f"Share of each map's positive values in the cell of its class: {result.provenance['mosaics']} mosaics of "
        f"{len(result.per_image['name'])} images. 1 is the truth where cells cannot see each other "
        f"(`{result.metrics[-1]}`); in the other column the model itself may use other cells."
    )
    chance = ["chance", *(f"{result.chance[metric]:.3f}" for metric in result.metrics)]
    notices = "".join(f"\n{notice}.\n" for notice in result.notices)
    return f"{first}\n\n{_table(['method', *result.metrics], rows)}{_line(chance)}{notices}"


def mosaic_picture(result: Evaluation) -> UInt8[Tensor, "3 H W"]:
    """The first mosaic once for each of its classes, with every map of that class."""
    shown = [example for example in result.examples if (example.image == result.examples[0].image).all()]
    pictures = torch.stack([torch.from_numpy(example.image).movedim(-1, 0) for example in shown])
    columns = {
        method: torch.stack([torch.from_numpy(example.maps[method]) for example in shown])[:, None]
        for method in shown[0].maps
    }
    framed = torch.stack([_framed(p, torch.from_numpy(e.mask)) for p, e in zip(pictures, shown, strict=True)])
    return maps.side_by_side(
        framed,
        columns,
        signed=[method for method in columns if method in result.signed],
        per_row=_PER_ROW,
        title="explained: the class of the framed image",
    )


def photos(wanted: Data, preprocess: Preprocess, model: nn.Module, classes: Sequence[str] = ()) -> ImageSet:
    """Images for `sight_mosaics`: a labeled source, its test part if it has one, or a folder of images without classes.

    Labels are used if the source has as many classes as the model, which must be in the order of its outputs, or if
    `classes` names those of the model. Otherwise the class that the model names counts as right, and a notice says so.

    Raises:
        OSError: there is nothing of that name.
        ValueError: what is there is no set of images, or one of its classes is none of `classes`.
    """
    images = _read(replace(wanted, size=preprocess.size[0]), preprocess)
    if images.preprocess == preprocess:  # composed images are as they are
        images = replace(images, notices=(*images.notices, f"images are {preprocess}"))
    images = replace(images, preprocess=preprocess)
    if classes and images.classes:
        return images.with_classes(classes)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    one = data.normalize(images.batch([0]).images.to(device), preprocess)
    count = inference.answers(model, one)[1].shape[1]
    if len(images.classes) == count:
        return images
    unlabeled = replace(images, labels=np.full(len(images), -1), classes=tuple(classes))
    if not images.classes:
        return unlabeled
    notice = (
        f"{images.name} has {len(images.classes)} classes and the model {count}, so the class that the model names "
        "counts as right; name the model's classes by --classes FILE to use the labels"
    )
    return replace(unlabeled, notices=(*images.notices, notice))


def _read(wanted: Data, preprocess: Preprocess) -> ImageSet:
    try:
        splits = data.load_whole(wanted, preprocess)
    except ValueError:
        if not Path(wanted.source).is_dir():
            raise
        return data.read_images([wanted.source], preprocess, wanted.strict, wanted.max_pixels)
    return splits.get("test") or next(iter(splits.values()))


def _framed(picture: UInt8[Tensor, "3 h w"], mask: Bool[Tensor, "h w"]) -> UInt8[Tensor, "3 h w"]:
    """A white frame inside the mask."""
    width = max(1, mask.shape[0] // 100)
    padded = torch.nn.functional.pad(mask[None].float(), [width] * 4)
    inner = -torch.nn.functional.max_pool2d(-padded, 2 * width + 1, 1)[0]
    return picture.masked_fill(mask & (inner == 0), 255)


def _without_masks() -> list[str]:
    """Metrics that rank methods without any mask."""
    return [n for n, m in METRICS.items() if "masks" not in inputs_of(m) and m.higher_is_better is not None]


def _trained(
    name: str, out: Path, start: Recipe, overrides: Mapping[str, object]
) -> tuple[nn.Module, data.ImageSet, int]:
    from sightline.training import fit

    run = fit(start, out / name, {"data.source": name, **SETS[name], **overrides}, resume=True)
    assert isinstance(run, runs.Run)
    images = replace(data.load(run.recipe.data)["test"], preprocess=run.preprocess)
    return runs.load_model(run.folder), images, run.seed


def predicted(result: Evaluation, truth: str, seed: int = 0) -> dict[str, Interval]:
    """How well each ranking metric that needs no mask ranks as `truth` does: rank correlation, 95 % bootstrap.

    Images are resampled, the same for the metric and the truth; methods are not. Better counts as higher, whatever the
    metric's direction. Resampling adds noise to the order as sampling did, which lowers a correlation, so the interval
    reaches as far as the percentiles or their mirror image at the value, whichever is further, within -1 and 1. A
    method that is undefined for more than a tenth of the images is ignored.
    """
    n = len(result.per_image["name"])
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=_RESAMPLES)
    weights = np.concatenate([np.ones((1, n)), drawn])  # the first row is the data itself
    reference = _oriented(result, truth)
    answers: dict[str, Interval] = {}
    for metric in (metric for metric in result.ranking if metric in _without_masks() and metric != truth):
        table = _oriented(result, metric)
        both = np.isfinite([table, reference]).mean(1).min(0) >= 1 - UNDEFINED_FRACTION
        pair = [ranks(torch.from_numpy(_means(one[:, both], weights))) for one in (table, reference)]
        value, *resampled = correlation(*pair).tolist()
        resampled = [one for one in resampled if np.isfinite(one)]
        ends = np.percentile(resampled, [2.5, 97.5]) if resampled else np.full(2, np.nan)
        ends = np.clip([*ends, *(2 * value - ends)], -1, 1)
        answers[metric] = Interval(value=value, low=float(ends.min()), high=float(ends.max()), n=n)
    return answers


def _oriented(result: Evaluation, metric: str) -> Float[Array, "n methods"]:
    sign = 1 if result.higher_is_better[metric] else -1
    return sign * np.array([result.per_image[f"{metric}/{method}"] for method in result.methods], dtype=float).T


def _means(table: Float[Array, "n methods"], weights: Float[Array, "r n"]) -> Float[Array, "r methods"]:
    defined = np.isfinite(table)
    counts = weights @ defined
    return (weights @ np.where(defined, table, 0)) / np.where(counts > 0, counts, np.nan)


def _table(heads: Sequence[str], rows: Mapping[str, Mapping[str, Interval]]) -> str:
    """A row for each method or metric, a column for each set; the highest mean first, of the defined values."""

    def mean(row: str) -> float:
        values = [interval.value for interval in rows[row].values() if np.isfinite(interval.value)]
        return float(np.mean(values)) if values else -np.inf

    lines = _line(heads) + _line(["---"] * len(heads))
    for row in sorted(rows, key=mean, reverse=True):
        lines += _line([row, *(_figures(rows[row].get(name)) for name in heads[1:])])
    return lines


def _figures(interval: Interval | None) -> str:
    if interval is None or not np.isfinite(interval.value):
        return "-"
    return f"{interval.value:.2f} [{interval.low:.2f}, {interval.high:.2f}]"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |\n"
