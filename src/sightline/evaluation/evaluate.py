"""Reads the data, predicts, plans, scores, ranks, and says what was found."""

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sightline import maps as pixels
from sightline.data import ImageSet, Preprocess
from sightline.evaluation import ranking
from sightline.evaluation.batches import Batch, Predictions, Source, predict
from sightline.evaluation.findings import findings
from sightline.evaluation.planning import Plan, Task, at_once, check_list, listed, plan
from sightline.evaluation.result import Curve, Evaluation, Example
from sightline.evaluation.scores import PartialResults, Scores, key_of
from sightline.explainers import EXPLAINERS, FAST, Explanation, Method, attention_maps, explain, fitting, named
from sightline.explainers.selection import TOLD, unsuited
from sightline.facts import Progress, Spread, Verdict, current_name, did_you_mean
from sightline.inference import Memory, Output, copy_on_cpu
from sightline.metrics import METRICS, Perturbation, inputs_of, measure
from sightline.metrics.agreement import ranks
from sightline.metrics.classification import quality
from sightline.metrics.per_image import Chance
from sightline.metrics.perturbed import Fill, substitute
from sightline.notebook import bar_of
from sightline.runs import best_device

Array = np.ndarray

_DEFAULT = ("insertion_auc", "deletion_auc", "pointing_game", "energy_in_mask", "parameter_randomization")
_CHEAP = ("attention", "activation_map", "cam", "grad_cam")
_MEAN_MAP_SIDE = 32
_SIMILARITY_SIDE = 16
_WORST = 3


def evaluate(
    model: nn.Module,
    data: ImageSet | str | Path | Iterable[Any],
    methods: Sequence[Method] | str | None = None,
    metrics: Sequence[str] | str | None = None,
    *,
    preprocess: Preprocess | None = None,
    controls: Sequence[Method] = ("random_map", "center_map", "edge_map", "contrast_map"),
    limit: int = 500,
    budget: float | None = None,
    steps: int = 32,
    fill: Fill = "zero",
    cells: bool = False,
    output: Output = None,
    strict: bool = True,
    batch_size: int = 64,
    memory: Memory = None,
    examples: int = 24,
    seed: int = 0,
    name: str | None = None,
    classes: Sequence[str] | None = None,
    provenance: dict[str, str] | None = None,
    progress: Progress | bool | None = None,
    tell: Callable[[str], None] | None = None,
    first: Callable[[Evaluation], object] | None = None,
    partial_results: Path | str | None = None,
    spread: Spread | None = None,
) -> Evaluation:
    """Score every method by every metric on the same images, next to controls.

    `data` is an `ImageSet`; or paths of image files and folders, one or a list, or a list of Pillow's images, without
    labels; or batches: tuples (images, labels) or (images, labels, masks), or dicts with `images` and, where known,
    `labels`, `masks`, `names`, `groups`, and the further arguments of the model for these images, `forward_args` and
    `forward_kwargs`. The images of a batch are what `explain` takes: normalized, or pictures. Batches of up to 1 GB in
    all are read once, others twice. Accuracy counts all images; maps are made for `limit` of them, drawn by `seed`. The
    predicted class is explained.

    Methods are given as in `explain`; None takes the attention of each block, and activation map, CAM and Grad-CAM as
    far as the model allows, `"all"` every method that fits, `"fast"` those of them that take a few passes per image.
    Metrics: None takes insertion, deletion and the randomization test, and where there are masks the pointing game and
    the energy in the mask; `"all"` every one that the data allows. A method that does not look at the model is always a
    control; the control `"other_class"` is the map of the runner-up class, for every method that explains a class.

    Intervals are 95 % percentile bootstrap (2,000 resamples, seeded, widened for few units) over images, or over whole
    groups where there are groups. The interval of an accuracy without groups is Wilson's. Pairs of methods are compared
    by a sign-flip test, corrected for all pairs of a metric.

    Args:
        model: as for `explain`.
        data: see above.
        methods: see above.
        metrics: see above.
        preprocess: how pictures become the model's input. None: as in its training, see `models.preprocess_of`.
        controls: see above.
        limit: number of images to make maps of.
        budget: seconds for all maps and scores. First the number of images is reduced, to 50; then the steps of
            deletion and insertion, to 8; then the images, to 20; then the most expensive method or metric is left out,
            until the rest fits.
        steps, fill, cells: see `Perturbation`.
        output: which tensor of the model's output counts, and what it holds, as for `explain`. None: decided once, by
            the first batch; `notices` tell how.
        strict: whether a named method that does not fit the model is an error; otherwise it is left out, and
            `unsuited` tells why.
        batch_size: most images per forward.
        memory: bytes that a forward, with its backward, may take, or a size such as "2GB"; it decides the number of
            images up to `batch_size`. None: 300 MB on a CPU, half of the free memory on a GPU.
        examples: images to keep for the report.
        seed: for the draw and the intervals.
        name: of the data.
        classes: their names.
        provenance: what to save with the numbers.
        progress: True shows a bar; a function is called with (what, done, total).
        tell: called with a sentence about the expected time before the first map; a few images are timed for it.
        first: called before the scores with what is known then: an evaluation without metrics, of the examples alone,
            by the methods that None takes.
        partial_results: folder for intermediate results; an evaluation with the same arguments resumes from there.
        spread: makes and scores the maps elsewhere; `sightline.scale.spread_by` does so by Ray. Expected times and
            `budget` are those of this machine alone.

    Raises:
        ValueError: an unknown method or metric, a metric that needs masks where there are none, no image at all.
        RuntimeError: with `spread`, processes die repeatedly.

    >>> from sightline.testing import PooledModel
    >>> images, masks = torch.rand(8, 3, 4, 4, generator=torch.Generator().manual_seed(0)), torch.ones(8, 1, 4, 4) > 0
    >>> data = [(images, torch.zeros(8, dtype=torch.long), masks)]
    >>> result = evaluate(PooledModel(torch.eye(3)), data, ["cam"], ["energy_in_mask"], controls=["center_map"])
    >>> result.score("cam", "energy_in_mask").interval.value, result.chance["energy_in_mask"]
    (1.0, 1.0)
    """
    _check_numbers(limit, examples, budget)
    chosen = listed(methods, controls)
    _check_metrics(metrics)
    report = bar_of(progress) or (lambda what, done, total: None)
    source = Source(model, data, batch_size, memory, classes, preprocess)
    sizes: dict[str, Any] = {"batch_size": batch_size, "memory": memory}
    perturbation = Perturbation(steps=steps, fill=fill, cells=cells, mean=source.mean, std=source.std, **sizes)
    predictions = predict(model, source, report, output)
    if predictions.first is not None and not (isinstance(fill, str) and fill == "inpaint"):
        substitute(predictions.first.images[:1], fill, source.mean, source.std)  # a wrong fill is refused at once
    task = Task(
        model=model,
        methods=chosen,
        metrics=_chosen_metrics(metrics, source.has_masks, any(True for _ in model.parameters())),
        perturbation=replace(perturbation, output=predictions.output),
        with_runner_up="other_class" in controls,
    )
    task, unfit = _with_methods(task, predictions, methods, strict)
    partial_files = PartialResults(None if partial_results is None else Path(partial_results))
    order = np.random.default_rng(seed).permutation(len(predictions.labels))

    def evaluated(task: Task, limit: int, files: PartialResults, spread: Spread | None = None) -> Evaluation:
        draw = _draw(predictions, order, limit, examples)
        scores = _score(task, source, predictions, draw, files, report, spread)
        result = _rank(task, source, predictions, scores, draw, seed)
        return replace(result, data=name or source.name, provenance=result.provenance | (provenance or {}))

    if first is not None:
        bare, _ = _with_methods(replace(task, methods={}, metrics=(), with_runner_up=False), predictions, None, strict)
        result = evaluated(bare, max(examples, 1), PartialResults(None))
        first(replace(result, summary=tuple(findings(result, predictions))))
    planned = _planned(task, predictions, order, limit, budget, partial_files, tell)
    task = replace(
        task,
        methods={name: task.methods[name] for name in planned.methods},
        metrics=planned.metrics,
        perturbation=replace(task.perturbation, steps=planned.steps),
    )
    result = evaluated(task, planned.limit, partial_files, spread)
    fewer = f"{planned.steps} steps of deletion and insertion instead of {steps}, to keep to the budget"
    result = replace(
        result,
        notices=(*result.notices, *([fewer] if planned.steps < steps else ())),
        left_out=planned.left_out,
        unsuited=unfit,
    )
    partial_files.clear()
    return replace(result, summary=tuple(findings(result, predictions)))


def _check_numbers(limit: int, examples: int, budget: float | None) -> None:
    if limit < 1:
        raise ValueError(f"expected a limit of at least 1 image, got {limit}; leave it out for 500")
    if examples < 0:
        raise ValueError(f"expected at least 0 examples, got {examples}")
    if budget is not None and not budget > 0:
        raise ValueError(f"expected a budget above 0 seconds, got {budget}; leave it out to do all")


def _check_metrics(metrics: Sequence[str] | str | None) -> None:
    check_list("metrics", metrics, ("all",))
    for metric in () if metrics is None or metrics == "all" else metrics:
        if current_name(metric) not in METRICS:
            hint = did_you_mean(metric, METRICS, f"choose from {', '.join(METRICS)}")
            raise ValueError(f"expected the name of a metric, got {metric!r}{hint}")


def _chosen_metrics(metrics: Sequence[str] | str | None, has_masks: bool, has_weights: bool) -> tuple[str, ...]:
    if metrics is None or metrics == "all":
        return tuple(
            name
            for name in (METRICS if metrics == "all" else _DEFAULT)
            if (has_masks or "masks" not in inputs_of(METRICS[name]))
            and (has_weights or name != "parameter_randomization")
        )
    chosen = tuple(dict.fromkeys(map(current_name, metrics)))
    for metric in chosen:
        if "masks" in inputs_of(METRICS[metric]) and not has_masks:
            raise ValueError(
                f"expected masks or boxes for {metric}, got data without; name their column or drop {metric}"
            )
    return chosen


def _with_methods(
    task: Task, predictions: Predictions, methods: Sequence[Method] | str | None, strict: bool
) -> tuple[Task, dict[str, str]]:
    """The task with methods that fit the model where none are listed, or not `strict`; and why others do not fit."""
    assert predictions.first is not None
    images, of_model = predictions.first.images, _called(task.perturbation, predictions.first).of_model
    if not methods or isinstance(methods, str):
        choices = {"all": tuple(EXPLAINERS), "fast": FAST}.get(str(methods), _CHEAP)
        tried = [name for name in choices if not EXPLAINERS[name].is_control]
        names, reasons = fitting(task.model, images, tried, **of_model)
        call = {name: value for name, value in of_model.items() if name != "output"}
        maps = attention_maps(task.model, images, **call)
        gates = [name for name, gate in maps.items() if gate.shape[2] * gate.shape[3] > 1]
        if len(gates) > 1:
            names = [f"attention@{name}" for name in gates] + names[1:]
        task = replace(task, methods={name: name for name in names} | task.methods)
        return task, reasons if methods else {}
    reasons = unsuited(task.model, images, task.methods.values(), strict, **of_model)
    return replace(task, methods={n: m for n, m in task.methods.items() if n not in reasons}), reasons


def _planned(
    task: Task,
    predictions: Predictions,
    order: Array,
    limit: int,
    budget: float | None,
    files: PartialResults,
    tell: Callable[[str], None] | None,
) -> Plan:
    """All of it, or what fits into the budget; the plan of an earlier try is kept, as new timings make another one."""
    if budget is None and tell is None:
        steps = task.perturbation.steps
        return Plan(methods=tuple(task.methods), metrics=task.metrics, limit=limit, steps=steps, seconds=0.0)

    def make() -> Plan:
        first = predictions.first
        assert first is not None
        first = next(first.pieces(1)) if budget is None else first  # an estimate alone may be rougher
        timed = replace(task, perturbation=_called(task.perturbation, first))
        planned = plan(timed, first.images, predictions.targets(first), min(limit, len(order)), budget or math.inf)
        if tell is not None and planned.seconds > TOLD:
            tell(planned.sentence())
        return planned

    if budget is None:
        return make()
    return files.kept(lambda: f"{_key(task, predictions, limit, budget, order)}-plan.json", make, Plan)


def _key(task: Task, predictions: Predictions, *more: Any) -> str:
    options = {name: named(method)[2] for name, method in task.methods.items()}
    asked = (asdict(task.perturbation), task.names, task.controls, task.metrics, options)
    return key_of(task.model, asked, predictions.names, predictions.probabilities, *more)


@dataclass(frozen=True)
class _Draw:
    """Rows of the data that maps are made for."""

    chosen: Array
    gallery: Array
    wrong: Array
    """The most confident wrong answers, most confident first; they may lie outside `chosen`."""

    @property
    def shown(self) -> Array:
        return np.union1d(self.gallery, self.wrong)


def _draw(predictions: Predictions, order: Array, limit: int, examples: int) -> _Draw:
    wrong = np.flatnonzero((predictions.labels >= 0) & (predictions.labels != predictions.predictions))
    wrong = wrong[np.argsort(-predictions.certainty[wrong], kind="stable")][: max(examples // 2, 1)]
    return _Draw(np.sort(order[:limit]), np.sort(order[: min(examples, limit)]), wrong)


def _score(
    task: Task,
    source: Source,
    predictions: Predictions,
    draw: _Draw,
    files: PartialResults,
    report: Progress,
    spread: Spread | None,
) -> Scores:
    """The scores of all drawn images, with the maps and pictures of those that may be shown."""
    key = files.folder and _key(task, predictions, draw.chosen, draw.gallery, draw.wrong)
    chosen = torch.from_numpy(draw.chosen)
    size = _at_once(task, predictions)
    pieces = (batch.pieces(size) for batch in source.batches(np.union1d(draw.chosen, draw.wrong)))
    begun: dict[int, tuple[Batch, Path | None]] = {}
    finished: dict[int, Scores] = {}
    done = 0

    def todo() -> Iterator[tuple[int, tuple[Batch, Tensor]]]:
        """What no file has."""
        for number, batch in enumerate(chain.from_iterable(pieces)):
            scored = batch.only(torch.isin(batch.rows, chosen))
            if scored is None:
                finish(number, batch, Scores())
                continue
            path = files.path(lambda at=number, on=scored: f"{key}-{at}-{on.digest}.npz")
            stored = None if path is None else Scores.load(path)
            if stored is None:
                begun[number] = batch, path
                yield number, (scored, predictions.targets(scored))
            else:
                finish(number, batch, stored)

    def finish(number: int, batch: Batch, part: Scores) -> None:
        nonlocal done
        is_chosen = torch.isin(batch.rows, chosen)
        if is_chosen.any():
            done += int(is_chosen.sum())
            report("explaining and scoring", done, len(draw.chosen))
        if (shown := batch.only(~is_chosen)) is not None:
            part = part + _batch_maps(task, shown, predictions)
        rows = {int(row) for _, row in part.maps} | set(draw.shown.tolist())
        finished[number] = part + Scores(pictures=_pictures(batch, rows))

    if spread is None:
        coming = ((number, _batch_scores(one, task, draw.shown, report)) for number, one in todo())
    else:
        coming = spread(_scores_elsewhere, todo(), replace(task, model=copy_on_cpu(task.model)), draw.shown)
    for number, part in coming:
        if isinstance(part, str):
            raise RuntimeError(
                f"processes that scored maps died: {part}; the same command goes on with what is missing"
            )
        batch, path = begun.pop(number)
        if path is not None:
            part.save(path)
        finish(number, batch, part)
    return sum((finished[number] for number in sorted(finished)), Scores())


def _scores_elsewhere(one: tuple[Batch, Tensor], task: Task, shown: Array) -> Scores:
    """`_batch_scores` in another process, on its own device."""
    device = best_device()
    task = replace(task, model=task.model.to(device))
    return _batch_scores((one[0].to(device), one[1].to(device)), task, shown)


def _pictures(batch: Batch, rows: Collection[int]) -> dict[int, tuple[Array, Array | None]]:
    masks = [None] * len(batch.names) if batch.masks is None else batch.masks[:, 0].cpu().numpy()
    return {
        row: (picture.permute(1, 2, 0).numpy(), mask)
        for row, picture, mask in zip(batch.rows.tolist(), batch.pictures, masks, strict=True)
        if row in rows
    }


def _at_once(task: Task, predictions: Predictions) -> int:
    assert predictions.first is not None
    one = next(predictions.first.pieces(1))
    return at_once(replace(task, perturbation=_called(task.perturbation, one)), one.images, predictions.targets(one))


def _batch_scores(one: tuple[Batch, Tensor], task: Task, shown: Array, report: Progress | None = None) -> Scores:
    """All of a batch and its targets; the maps of rows in `shown` are kept, and those that score worst."""
    batch, targets = one
    images = batch.images
    perturbation = _called(task.perturbation, batch)
    methods = list(task.methods.values())
    explanation = explain(task.model, images, targets, methods, progress=report, **perturbation.of_explain)
    maps = dict(explanation.maps)
    others = [row for row in task.rows if row.explains_runner_up]
    if others:
        runner_up = explanation.logits.scatter(1, targets[:, None], -torch.inf).argmax(1)
        again = [task.methods[row.method] for row in others]
        other_maps = explain(task.model, images, runner_up, again, **perturbation.of_explain).maps
        maps |= {row.name: other_maps[row.method] for row in others}

    def explain_again(model: nn.Module, images: Tensor, targets: Tensor) -> Mapping[str, Tensor]:
        return explain(model, images, targets, methods, **perturbation.of_explain).maps

    values, fields = measure(
        {name: METRICS[name] for name in task.metrics},
        maps,
        model=task.model,
        images=images,
        targets=targets,
        masks=batch.masks,
        explain=explain_again,
        perturbation=perturbation,
        progress=report,
    )
    table = {key: _array(value) for key, value in values.items()}
    areas = np.zeros(0) if batch.masks is None else _array(batch.masks.double().mean((1, 2, 3)))
    return Scores(
        values=table,
        curves={
            (method, kind): _array(field)
            for method, read in fields.items()
            for kind, field in read.items()
            if kind in ("deletion", "insertion") or (kind == "fractions" and {"deletion", "insertion"} & set(read))
        },
        sums=_map_sums(task, maps, targets),
        maps=_maps_to_show(task, batch, maps, shown, table),
        similarity=_similarity(maps),
        areas=areas[areas > 0],  # an empty mask is undefined for the score too
        verdicts=_verdicts(task, batch, explanation),
        layers={row.name: "" if row.explains_runner_up else explanation.layers[row.method] for row in task.rows},
        positions={name: list(value.shape[2:]) for name, value in maps.items()},
        notices=list(explanation.notices),
    )


def _batch_maps(task: Task, batch: Batch, predictions: Predictions) -> Scores:
    """Maps and verdicts of a batch that is only shown."""
    options = _called(task.perturbation, batch).of_explain
    methods = list(task.methods.values())
    explanation = explain(task.model, batch.images, predictions.targets(batch), methods, **options)
    maps = _maps_to_show(task, batch, explanation.maps, batch.rows.numpy(), {})
    return Scores(maps=maps, verdicts=_verdicts(task, batch, explanation))


def _verdicts(task: Task, batch: Batch, explanation: Explanation) -> dict[tuple[str, int], list[Verdict]]:
    """The verdicts on each map, without class-independence where the method ignores the class."""
    return {
        (row.name, number): [
            verdict
            for verdict in verdicts
            if not (row.explainer.is_blind_to_class and verdict.kind == "class-independent")
        ]
        for row in task.rows
        if not row.explains_runner_up
        for number, verdicts in zip(batch.rows.tolist(), explanation.verdicts[row.method], strict=True)
    }


def _maps_to_show(
    task: Task, batch: Batch, maps: Mapping[str, Tensor], shown: Array, values: Mapping[tuple[str, str], Array]
) -> dict[tuple[str, str], Array]:
    rows = batch.rows.numpy()
    kept: dict[tuple[str, str], Array] = {}
    for row in (row for row in task.rows if not row.explains_runner_up):
        worst = np.zeros(0, int) if row.is_control else _worst(task, values, row.name)
        places = np.union1d(np.flatnonzero(np.isin(rows, shown)), worst)
        kept |= {(row.name, str(rows[place])): maps[row.name][place, 0].float().cpu().numpy() for place in places}
    return kept


def _map_sums(task: Task, maps: Mapping[str, Tensor], targets: Tensor) -> dict[tuple[str, str], Array]:
    """Sum and number of the scaled maps of each class."""
    sums: dict[tuple[str, str], Array] = {}
    for row in task.rows:
        resized = pixels.resize(maps[row.name], (_MEAN_MAP_SIDE, _MEAN_MAP_SIDE))[:, 0]
        scaled = pixels.normalize(resized, signed=row.explainer.is_signed).double()
        varies = pixels.variation(maps[row.name])[:, 0] >= pixels.NEARLY_FLAT
        for image, target in zip(_array(scaled * varies[:, None, None]), targets.tolist(), strict=True):
            if np.isfinite(image).all():
                key = row.name, str(target)
                sums[key] = sums.get(key, 0) + np.stack([image, np.ones_like(image)])
    return sums


def _similarity(maps: Mapping[str, Tensor]) -> Array:
    """Sum over images of the rank correlations between methods, and the number of images behind each, (2, k, k)."""
    side = (_SIMILARITY_SIDE, _SIMILARITY_SIDE)
    small = torch.cat([pixels.resize(value, side).float() for value in maps.values()], 1).flatten(2)
    ranked = ranks(small.double())
    unit = torch.nn.functional.normalize(ranked - ranked.mean(2, keepdim=True), dim=2, eps=0)
    similarity = torch.einsum("bkn,bjn->bkj", unit, unit)
    finite = small.isfinite().all(2)
    similarity = similarity.where(finite[:, :, None] & finite[:, None], torch.nan)
    return _array(torch.stack([similarity.nansum(0), similarity.isfinite().double().sum(0)]))


def _rank(task: Task, source: Source, predictions: Predictions, scores: Scores, draw: _Draw, seed: int) -> Evaluation:
    """All statistics over the scores."""
    groups = None if predictions.groups is None else predictions.groups[draw.chosen]
    up = {metric: METRICS[metric].higher_is_better for metric in task.metrics}
    missing = np.full(len(draw.chosen), np.nan)
    table = {
        metric: {name: _one_column(scores.values.get((name, metric), missing), up[metric]) for name in task.names}
        for metric in task.metrics
    }
    chance = {metric: value for metric in table if (value := _chance(metric, scores.areas)) is not None}
    similarity, counted = scores.similarity
    return Evaluation(
        data=source.name,
        split=source.split,
        model=type(task.model).__name__,
        n_images=len(predictions.labels),
        unit=source.unit,
        classes=predictions.classes,
        methods=task.names,
        controls=task.controls,
        signed=tuple(row.name for row in task.rows if row.explainer.is_signed),
        layers=scores.layers,
        positions={method: tuple(grid) for method, grid in scores.positions.items()},
        metrics=task.metrics,
        higher_is_better=up,
        chance=chance,
        **_classifier(predictions, seed),
        per_image=predictions.columns(draw.chosen, source.unit)
        | {f"{metric}/{name}": column.tolist() for metric in table for name, column in table[metric].items()},
        **_examples(task, predictions, scores, draw),
        mean_maps=_means(task, predictions, scores),
        **_verdict_counts(task, scores, draw),
        **ranking.rank(table, up, task.controls, chance, groups, seed),
        failed=ranking.failing(table, _tested(task, len(predictions.classes)), groups, seed),
        curves=_curves(task, scores, groups, seed),
        method_agreement=similarity / np.where(counted > 0, counted, np.nan),
        notices=tuple(dict.fromkeys([*source.notices, *predictions.notices, *scores.notices])),
        skipped=tuple(source.skipped),
        summary=(),
        provenance={"seed": str(seed), "images with maps": str(len(draw.chosen))},
    )


def _chance(metric: str, areas: Array) -> float | None:
    chance: Chance | None = METRICS[metric].chance
    if chance is None or isinstance(chance, float | int):
        return chance
    return chance(areas) if len(areas) else None


def _tested(task: Task, classes: int) -> dict[str, list[str]]:
    """Test -> the methods that it is asked about."""
    methods = [row for row in task.rows if not row.is_control]
    by_class = [row for row in methods if not row.explainer.is_blind_to_class and classes > 2]
    tests = [metric for metric in task.metrics if METRICS[metric].is_test]
    return {test: [row.name for row in (by_class if test == "random_logit" else methods)] for test in tests}


def _curves(task: Task, scores: Scores, groups: Array | None, seed: int) -> dict[str, dict[str, Curve]]:
    curves: dict[str, dict[str, Curve]] = {"insertion": {}, "deletion": {}}
    for kind, by_method in curves.items():
        for method in (name for name in task.names if (name, kind) in scores.curves):
            fractions = scores.curves[method, "fractions"]
            if curve := ranking.curve_of(fractions, scores.curves[method, kind], groups, seed):
                by_method[method] = curve
    return {kind: by_method for kind, by_method in curves.items() if by_method}


def _classifier(predictions: Predictions, seed: int) -> dict[str, Any]:
    """How good the classifier is on the labeled images, and as good as always naming their most frequent class is."""
    labeled = predictions.labels >= 0
    if not labeled.any():
        return {"accuracy": None, "majority": None, "confusion": None}
    labels, count = predictions.labels[labeled], len(predictions.classes)
    groups = None if predictions.groups is None else predictions.groups[labeled]
    found = quality(predictions.probabilities[labeled], labels, groups, seed)
    pairs = np.bincount(labels * count + predictions.predictions[labeled], minlength=count**2)
    confusion = pairs.reshape(count, count)
    majority = float(confusion.sum(1).max() / len(labels))
    return {"accuracy": found.accuracy, "majority": majority, "confusion": confusion, "quality": found}


def _means(task: Task, predictions: Predictions, scores: Scores) -> dict[str, dict[str, Array]]:
    """The mean map of every method and class."""
    means: dict[str, dict[str, Array]] = {name: {} for name in task.names}
    for name, by_class in means.items():
        for target, label in enumerate(predictions.classes):
            if (name, str(target)) in scores.sums:
                total, number = scores.sums[name, str(target)]
                by_class[label] = (total / number).astype(np.float32)
    return means


def _verdict_counts(task: Task, scores: Scores, draw: _Draw) -> dict[str, Any]:
    levels: dict[str, dict[str, dict[str, int]]] = {name: {} for name in task.names}
    for name, by_kind in levels.items():
        found = [verdict for row in draw.chosen.tolist() for verdict in scores.verdicts.get((name, row), ())]
        for (kind, level), count in Counter((verdict.kind, verdict.level) for verdict in found).items():
            by_kind.setdefault(kind, {})[level] = count
    counts = {name: {kind: sum(found.values()) for kind, found in kinds.items()} for name, kinds in levels.items()}
    return {"verdicts": counts, "verdict_levels": levels}


def _examples(task: Task, predictions: Predictions, scores: Scores, draw: _Draw) -> dict[str, Any]:
    """The images that the report shows."""
    drawn = [row.name for row in task.rows if not row.explains_runner_up]
    methods = [name for name in drawn if name not in task.controls]

    def example(row: int, methods: Sequence[str]) -> Example:
        label = predictions.labels[row]
        return Example(
            name=predictions.names[row],
            image=scores.pictures[row][0],
            label=predictions.classes[label] if label >= 0 else None,
            prediction=predictions.classes[predictions.predictions[row]],
            probability=float(predictions.certainty[row]),
            maps={method: scores.maps[method, str(row)] for method in methods},
            verdicts={method: scores.verdicts[method, row] for method in methods},
            mask=scores.pictures[row][1],
        )

    worst = {method: draw.chosen[_worst(task, scores.values, method)].tolist() for method in methods}
    return {
        "examples": tuple(example(row, drawn) for row in draw.gallery.tolist()),
        "errors": tuple(example(row, drawn) for row in draw.wrong.tolist()),
        "worst": {method: tuple(example(row, [method]) for row in rows) for method, rows in worst.items() if rows},
    }


def _one_column(values: Array, higher_is_better: bool | None) -> Array:
    """The values themselves, or the column with the best mean where a metric has several."""
    if values.ndim == 1:
        return values
    means = np.array([ranking.mean(column) for column in values.T])
    return values[:, np.nanargmax(means if higher_is_better else -means)] if np.isfinite(means).any() else values[:, 0]


def _worst(task: Task, table: Mapping[tuple[str, str], Array], method: str) -> Array:
    """Places of a method's worst defined values in the first metric, worst first, of equal ones the first."""
    lead = next(iter(task.ranking), "")
    values = table.get((method, lead))
    if values is None or values.ndim > 1:
        return np.zeros(0, dtype=int)
    badness = np.where(np.isnan(values), -np.inf, -values if METRICS[lead].higher_is_better else values)
    order = np.argsort(-badness, kind="stable")[:_WORST]
    return order[np.isfinite(badness[order])]


def _called(perturbation: Perturbation, batch: Batch) -> Perturbation:
    """With the further arguments of the model for these images."""
    return replace(perturbation, forward_args=batch.forward_args, forward_kwargs=batch.forward_kwargs)


def _array(values: Tensor) -> Array:
    return values.double().cpu().numpy()
