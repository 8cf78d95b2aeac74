"""Methods x metrics over a data set, with intervals and controls."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sightline import maps as pixels
from sightline.data import ImageSet
from sightline.evaluation.budget import Plan, kept, plan
from sightline.evaluation.parts import Part, clear, key_of
from sightline.evaluation.result import Comparison, Curve, Evaluation, Example, Score, Standing
from sightline.evaluation.sentences import OF_ANOTHER_CLASS, summary
from sightline.evaluation.source import Answers, Known, Source, predict
from sightline.evaluation.standings import curve_of, failing, league, mean, standing_of
from sightline.explainers import (
    EXPLAINERS,
    Explanation,
    Method,
    Progress,
    Verdict,
    attention_maps,
    explain,
    fitting,
    named,
)
from sightline.inference import Output
from sightline.metrics import METRICS, Hiding, inputs_of, measure
from sightline.metrics.agreement import ranks
from sightline.metrics.classification import quality
from sightline.metrics.hiding import Fill

__all__ = ["Comparison", "Curve", "Evaluation", "Example", "Score", "Standing", "evaluate", "standing_of"]

Array = np.ndarray
_Verdicts = Mapping[str, Mapping[int, list[Verdict]]]  # method -> row -> what to distrust

_DEFAULT = ("insertion_auc", "deletion_auc", "pointing_game", "energy_in_mask", "parameter_randomization")
_MEAN_MAP_SIDE = 32
_ALIKE_SIDE = 16
_WORST = 3
_TRIED = 4  # images on which methods are timed


def evaluate(
    model: nn.Module,
    data: ImageSet | Iterable[Any],
    methods: Sequence[Method] | str | None = None,
    metrics: Sequence[str] | str | None = None,
    *,
    controls: Sequence[Method] = ("random_map", "center_map", "edge_map", "contrast_map"),
    limit: int = 500,
    budget: float | None = None,
    steps: int = 32,
    fill: Fill = "zero",
    cells: bool = False,
    output: Output = None,
    batch_size: int = 64,
    examples: int = 24,
    seed: int = 0,
    name: str | None = None,
    classes: Sequence[str] | None = None,
    provenance: dict[str, str] | None = None,
    progress: Progress | None = None,
    partial_results: Path | str | None = None,
) -> Evaluation:
    """Score every method by every metric on the same images, the controls beside them.

    `data` is an `ImageSet`, or batches of normalized images: tuples (images, labels) or (images, labels, masks), or
    dicts with `images` and, as known, `labels`, `masks`, `names`, `groups`, and the `forward_args` and `forward_kwargs`
    that the model takes beside these images (see `explain`). Accuracy counts all images; maps are made for `limit` of
    them, drawn by `seed`. The predicted class is explained.

    Methods are given as in `explain`; None takes the attention of each block, and activation map, CAM and Grad-CAM as
    far as this model has evidence for them, `"all"` every method that fits. Metrics: None takes insertion, deletion and
    the randomization test, and where there are masks the pointing game and the energy in the mask; `"all"` every one
    that the data allows. What never looks at the model is a control, wherever it is named; the control
    `"other_class"` is the map of the runner-up class, for every method that asks for the class.

    Intervals are 95 % percentile bootstrap (2,000 resamples, seeded, widened for few units) of images, or of whole
    groups where there are groups. The interval of an accuracy without groups is Wilson's. Pairs of methods are compared
    by a sign-flip test, corrected for all pairs of a metric.

    Args:
        model: as for `explain`.
        data: see above.
        methods: see above.
        metrics: see above.
        controls: see above.
        limit: images to make maps of.
        budget: seconds for all maps and scores. The images become fewer, and below 50 of them the dearest method or
            metric is left out, until they fit.
        steps, fill, cells: see `Hiding`.
        output: which tensor of the model's output counts, and what it holds, as for `explain`. None: decided once, by
            the first batch, and said in `notices`.
        batch_size: images per forward.
        examples: images to keep for the report.
        seed: of the draw and of the intervals.
        name: of the data.
        classes: their names.
        provenance: what to keep beside the numbers.
        progress: called with (what, done, total).
        partial_results: folder for what is done; an evaluation that asks the same goes on from there.

    Raises:
        ValueError: an unknown method or metric, a metric that needs masks where there are none, no image at all.

    >>> from sightline.testing import PooledModel
    >>> images, masks = torch.rand(8, 3, 4, 4, generator=torch.Generator().manual_seed(0)), torch.ones(8, 1, 4, 4) > 0
    >>> data = [(images, torch.zeros(8, dtype=torch.long), masks)]
    >>> found = evaluate(PooledModel(torch.eye(3)), data, ["cam"], ["energy_in_mask"], controls=["center_map"])
    >>> found.score("cam", "energy_in_mask").interval.value, found.chance["energy_in_mask"]
    (1.0, 1.0)
    """
    if limit < 1:
        raise ValueError(f"expected a limit of at least 1 image, got {limit}; leave it out for 500")
    if examples < 0:
        raise ValueError(f"expected at least 0 examples, got {examples}")
    if budget is not None and not budget > 0:
        raise ValueError(f"expected a budget above 0 seconds, got {budget}; leave it out to do all")
    for what, names in (("methods or 'all'", methods), ("metrics or 'all'", metrics), ("controls", controls)):
        if isinstance(names, str) and (names != "all" or what == "controls"):
            keyword = what.partition(" ")[0]
            raise ValueError(f"expected a list of {what}, got {names!r}; write {keyword}=[{names!r}]")
    wanted = None if metrics is None or metrics == "all" else list(dict.fromkeys(metrics))
    _check(wanted or (), METRICS, "metric")
    with_other_class = "other_class" in controls
    listed = [] if methods is None or isinstance(methods, str) else list(methods)
    asked = {named(one)[0]: one for one in [*listed, *(one for one in controls if one != "other_class")]}
    blind = [name for name, method in asked.items() if named(method)[1].is_control]
    given = [named(control)[0] for control in controls if control != "other_class"]
    if looking := [name for name in given if name not in blind]:
        raise ValueError(f"expected controls that never look at the model, got {looking[0]!r}; give it as a method")
    report = progress or (lambda what, done, total: None)
    source = Source(model, data, batch_size, classes)
    hiding = Hiding(steps=steps, fill=fill, cells=cells, batch_size=batch_size, mean=source.mean, std=source.std)
    answers = predict(model, source, report, output)
    hiding = replace(hiding, output=answers.output)
    wanted = _metrics_of(wanted, metrics == "all", source.has_masks, any(True for _ in model.parameters()))
    drawn = np.random.default_rng(seed).permutation(len(answers.labels))
    first = next(source.batches(np.sort(drawn[:_TRIED])))
    if not listed:
        own = _methods_of(model, first.images, methods == "all", _called(hiding, first).of_model)
        asked = {name: name for name in own} | asked
    folder = None if partial_results is None else Path(partial_results)
    files: list[Path] = []
    options = {name: named(method)[2] for name, method in asked.items()}
    asking = (asdict(hiding), answers.names, answers.probabilities, options, with_other_class)
    planned = Plan(methods=tuple(asked), metrics=tuple(wanted), limit=limit, seconds=0.0, left_out={})
    if budget is not None:
        targets = torch.from_numpy(answers.predictions[first.rows.numpy()]).to(first.images.device)
        others = [n for n, of in asked.items() if with_other_class and not named(of)[1].is_blind_to_class]
        if folder is not None:
            files.append(folder / f"{key_of(model, *asking, wanted, limit, budget, drawn, blind)}-plan.json")
        planned = kept(
            files[0] if files else None,
            partial(
                plan,
                model,
                first.images,
                targets,
                asked,
                blind,
                wanted,
                _called(hiding, first),
                min(limit, len(drawn)),
                budget,
                others,
            ),
        )
        asked = {name: asked[name] for name in planned.methods}
    wrong = np.flatnonzero((answers.labels >= 0) & (answers.labels != answers.predictions))
    wrong = wrong[np.argsort(-answers.certainty[wrong], kind="stable")][: max(examples // 2, 1)]
    rows = _Drawn(np.sort(drawn[: planned.limit]), np.sort(drawn[: min(examples, planned.limit)]), wrong)

    maker = _Maker(model, asked, tuple(blind), with_other_class, planned.metrics, hiding, answers)
    shown = (rows.chosen, rows.gallery, wrong)
    key = "" if folder is None else key_of(model, *asking, maker.methods, planned.metrics, shown)
    whole: Part | None = None
    done = 0
    for number, batch in enumerate(source.batches(rows.chosen)):
        part = None
        if folder is not None:
            files.append(folder / f"{key}-{number}-{batch.digest}.npz")
            part = Part.load(files[-1])
        if part is None:
            part = maker.part(batch, np.union1d(rows.gallery, wrong))
            if folder is not None:
                part.save(files[-1])
        whole = part if whole is None else whole + part
        done += len(batch.names)
        report("explaining and scoring", done, len(rows.chosen))
    assert whole is not None
    said = {method: dict(zip(rows.chosen.tolist(), of, strict=True)) for method, of in whole.verdicts.items()}
    for batch in source.batches(np.setdiff1d(wrong, rows.chosen)):
        maps, verdicts = maker.shown(batch)
        whole = replace(whole, maps=whole.maps | maps)
        for method, images in verdicts.items():
            said[method].update(zip(batch.rows.tolist(), images, strict=True))
    found = _found(source, answers, maker, whole, said, rows, seed)
    known = found.provenance | (provenance or {})
    found = replace(found, data=name or source.name, left_out=planned.left_out, provenance=known)
    if folder is not None:
        clear(folder, files)
    return replace(found, summary=tuple(summary(found, answers)))


def _metrics_of(wanted: Sequence[str] | None, everything: bool, has_masks: bool, has_weights: bool) -> list[str]:
    if wanted is None:
        return [
            name
            for name in (METRICS if everything else _DEFAULT)
            if (has_masks or not _needs_masks(name)) and (has_weights or name != "parameter_randomization")
        ]
    for metric in wanted:
        if _needs_masks(metric) and not has_masks:
            raise ValueError(
                f"expected masks or boxes for {metric}, got data without; name their column or drop {metric}"
            )
    return list(wanted)


@dataclass
class _Maker:
    """Makes and scores the maps of one batch after the other."""

    model: nn.Module
    asked: dict[str, Method]
    blind: tuple[str, ...]
    with_other_class: bool
    metrics: tuple[str, ...]
    hiding: Hiding
    answers: Answers

    def __post_init__(self) -> None:
        self.explainers = {name: named(method)[1] for name, method in self.asked.items()}
        by_class = [name for name, method in self.explainers.items() if not method.is_blind_to_class]
        self.of_others = [name for name in by_class if name not in self.blind] if self.with_other_class else []
        self.by_class = frozenset(by_class)
        self.methods = (*self.asked, *(name + OF_ANOTHER_CLASS for name in self.of_others))
        self.controls = (*self.blind, *self.methods[len(self.asked) :])
        ranking = [metric for metric in self.metrics if METRICS[metric].higher_is_better is not None]
        self.lead = next(iter(ranking), None)
        self.signed = tuple(
            name for name in self.methods if self.explainers[name.removesuffix(OF_ANOTHER_CLASS)].is_signed
        )

    def part(self, batch: Known, shown: Array) -> Part:
        """All of a batch; the maps of rows in `shown` are kept, and of those that score worst."""
        images, rows = batch.images, batch.rows.numpy()
        targets = torch.from_numpy(self.answers.predictions[rows]).to(images.device)
        hiding = _called(self.hiding, batch)
        explanation = explain(self.model, images, targets, list(self.asked.values()), **hiding.of_model)
        maps = dict(explanation.maps)
        if self.of_others:
            logits = explanation.logits
            others = logits.scatter(1, targets[:, None], -torch.inf).argmax(1)
            methods = [self.asked[name] for name in self.of_others]
            rivals = explain(self.model, images, others, methods, **hiding.of_model)
            maps |= {name + OF_ANOTHER_CLASS: value for name, value in rivals.maps.items()}

        def again(model: nn.Module, images: Tensor, targets: Tensor) -> Mapping[str, Tensor]:
            return explain(model, images, targets, list(self.asked.values()), **hiding.of_model).maps

        chosen = {name: METRICS[name] for name in self.metrics}
        given: dict[str, Any] = {"model": self.model, "images": images, "targets": targets, "explain": again}
        values, fields = measure(chosen, maps, **given, masks=batch.masks, hiding=hiding)
        table = {key: value.double().cpu().numpy() for key, value in values.items()}
        curves = {
            (method, kind): read[kind].double().cpu().numpy()
            for method, read in fields.items()
            for kind in ("deletion", "insertion", "shares")
            if kind in read and (kind != "shares" or {"deletion", "insertion"} & set(read))
        }
        areas = np.zeros(0) if batch.masks is None else batch.masks.double().mean((1, 2, 3)).cpu().numpy()
        sums, counts = self._means(maps, rows)
        keep = {name: np.isin(rows, shown) for name in maps}
        for method in maps:
            keep[method] = keep[method] | self._worst(None if self.lead is None else table.get((method, self.lead)))
        return Part(
            values=table,
            curves=curves,
            sums=sums,
            counts=counts,
            maps=self._kept(maps, rows, keep),
            alike=_alike(maps),
            areas=areas[areas > 0],  # an empty mask is undefined for the score too
            verdicts={name: [list[Verdict]() for _ in rows] for name in maps} | self._verdicts(explanation),
            layers=explanation.layers | {name: "" for name in maps if name not in self.asked},
            positions={name: list(value.shape[2:]) for name, value in maps.items()},
            notices=list(explanation.notices),
        )

    def shown(self, batch: Known) -> tuple[dict[tuple[str, str], Array], dict[str, list[list[Verdict]]]]:
        """Maps and verdicts of a batch that is only looked at."""
        rows = batch.rows.numpy()
        targets = torch.from_numpy(self.answers.predictions[rows]).to(batch.images.device)
        hiding = _called(self.hiding, batch)
        found = explain(self.model, batch.images, targets, list(self.asked.values()), **hiding.of_model)
        return self._kept(found.maps, rows, {name: rows >= 0 for name in found.maps}), self._verdicts(found)

    def _verdicts(self, explanation: Explanation) -> dict[str, list[list[Verdict]]]:
        """What to distrust; that a map is the same for every class only where it should not be."""
        return {
            method: [[v for v in said if v != "class-independent" or method in self.by_class] for said in images]
            for method, images in explanation.verdicts.items()
        }

    def _kept(self, maps: Mapping[str, Tensor], rows: Array, keep: Mapping[str, Array]) -> dict[tuple[str, str], Array]:
        return {
            (method, str(rows[place])): value[place, 0].float().cpu().numpy()
            for method, value in maps.items()
            if method not in self.controls
            for place in np.flatnonzero(keep[method])
        }

    def _worst(self, values: Array | None) -> Array:
        if values is None or values.ndim > 1:  # which column counts is known when all images are
            return np.zeros((), dtype=bool)
        assert self.lead is not None
        return np.isin(np.arange(len(values)), _worst_places(values, METRICS[self.lead].higher_is_better))

    def _means(
        self, maps: Mapping[str, Tensor], rows: Array
    ) -> tuple[dict[tuple[str, str], Array], dict[tuple[str, str], Array]]:
        sums: dict[tuple[str, str], Array] = {}
        counts: Counter[tuple[str, str]] = Counter()
        for method, value in maps.items():
            resized = pixels.resize(value, (_MEAN_MAP_SIDE, _MEAN_MAP_SIDE))[:, 0]
            scaled = pixels.normalize(resized, signed=method in self.signed).double()
            varies = pixels.variation(value)[:, 0] >= pixels.NEARLY_FLAT
            scaled = (scaled * varies[:, None, None]).cpu().numpy()
            for image, row in zip(scaled, rows, strict=True):
                if np.isfinite(image).all():
                    key = method, str(self.answers.predictions[row])
                    sums[key] = sums.get(key, 0) + image
                    counts[key] += 1
        return sums, {key: np.array(count) for key, count in counts.items()}


def _alike(maps: Mapping[str, Tensor]) -> Array:
    """Sum over images of the rank correlations between methods, and the number of images behind each, (2, k, k)."""
    small = torch.cat([pixels.resize(value, (_ALIKE_SIDE, _ALIKE_SIDE)).float() for value in maps.values()], 1)
    ranked = ranks(small.flatten(2).double())
    centered = ranked - ranked.mean(2, keepdim=True)
    unit = centered / centered.norm(dim=2, keepdim=True)
    found = torch.einsum("bkn,bjn->bkj", unit, unit)
    finite = small.flatten(2).isfinite().all(2)
    found = found.where(finite[:, :, None] & finite[:, None], torch.nan)
    return torch.stack([found.nansum(0), found.isfinite().double().sum(0)]).cpu().numpy()


@dataclass(frozen=True)
class _Drawn:
    """Rows of the data that maps are made for."""

    chosen: Array
    gallery: Array
    wrong: Array
    """The most confident wrong answers, most confident first; they may lie outside `chosen`."""


def _found(
    source: Source, answers: Answers, maker: _Maker, whole: Part, verdicts: _Verdicts, rows: _Drawn, seed: int
) -> Evaluation:
    """All statistics over the joined parts."""
    methods, looks = maker.methods, tuple(method for method in maker.methods if method not in maker.controls)
    groups = None if answers.groups is None else answers.groups[rows.chosen]
    up = {metric: METRICS[metric].higher_is_better for metric in maker.metrics}
    missing = np.full(len(rows.chosen), np.nan)
    table = {
        metric: {method: _one_column(whole.values.get((method, metric), missing), up[metric]) for method in methods}
        for metric in maker.metrics
    }
    area = {m: float(np.mean(whole.areas)) for m in table if m in _CHANCE_IS_AREA and len(whole.areas)}
    chance = area | {metric: value for metric, value in _CHANCE.items() if metric in table}
    found = league(table, up, maker.controls, chance=chance, groups=groups, seed=seed)
    tests = [metric for metric in table if up[metric] is None and METRICS[metric].sentence]
    of_classes = [method for method in looks if method in maker.by_class and len(answers.classes) > 2]
    asked = {test: of_classes if test == "random_logit" else looks for test in tests}
    curves = {
        kind: {
            method: curve
            for method in methods
            if (method, kind) in whole.curves
            and (curve := curve_of(whole.curves[method, "shares"], whole.curves[method, kind], groups, seed))
        }
        for kind in ("insertion", "deletion")
    }
    accuracy, majority, confusion = answers.quality(seed)
    known = answers.labels >= 0
    worst = {
        method: rows.chosen[_worst_places(table[maker.lead][method], up[maker.lead])]
        for method in looks
        if maker.lead is not None and whole.values[method, maker.lead].ndim == 1
    }
    shown = np.unique(np.concatenate([rows.gallery, rows.wrong, *worst.values()])).astype(np.int64)
    example = _examples(source, answers, whole, verdicts, shown)
    alike, counted = whole.alike
    return Evaluation(
        data=source.name,
        split=source.split,
        model=type(maker.model).__name__,
        n_images=len(answers.labels),
        unit=source.unit,
        classes=answers.classes,
        methods=methods,
        controls=maker.controls,
        signed=maker.signed,
        layers=whole.layers,
        positions={method: tuple(grid) for method, grid in whole.positions.items()},
        metrics=maker.metrics,
        higher_is_better=up,
        chance=chance,
        accuracy=accuracy,
        majority=majority,
        confusion=confusion,
        per_image=answers.columns(rows.chosen, source.unit)
        | {f"{metric}/{method}": values.tolist() for metric, of in table.items() for method, values in of.items()},
        examples=tuple(example(row, looks) for row in rows.gallery.tolist()),
        errors=tuple(example(row, looks) for row in rows.wrong.tolist()),
        mean_maps={
            method: {
                answers.classes[target]: (whole.sums[method, str(target)] / whole.counts[method, str(target)]).astype(
                    np.float32
                )
                for target in range(len(answers.classes))
                if (method, str(target)) in whole.sums
            }
            for method in methods
        },
        verdicts={
            method: dict(Counter(verdict.kind for image in images for verdict in image))
            for method, images in whole.verdicts.items()
        },
        verdict_levels={method: _levels(images) for method, images in whole.verdicts.items()},
        failed=failing(table, asked, groups, seed),
        curves={kind: of for kind, of in curves.items() if of},
        worst={method: tuple(example(int(row), [method]) for row in of) for method, of in worst.items() if len(of)},
        method_agreement=alike / np.where(counted > 0, counted, np.nan),
        quality=quality(
            answers.probabilities[known],
            answers.labels[known],
            None if answers.groups is None else answers.groups[known],
            seed,
        )
        if known.any()
        else None,
        summary=(),
        notices=tuple(dict.fromkeys([*source.notices, *answers.notices, *whole.notices])),
        skipped=tuple(source.skipped),
        provenance={"seed": str(seed), "images with maps": str(len(rows.chosen))},
        **vars(found),
    )


def _levels(images: Sequence[Sequence[Verdict]]) -> dict[str, dict[str, int]]:
    counts: dict[str, Counter[str]] = {}
    for verdict in (verdict for image in images for verdict in image):
        counts.setdefault(verdict.kind, Counter())[verdict.level] += 1
    return {name: dict(levels) for name, levels in counts.items()}


def _examples(
    source: Source, answers: Answers, whole: Part, verdicts: _Verdicts, rows: Array
) -> Callable[[int, Sequence[str]], Example]:
    """(row, methods) -> what the report shows of it, for any of the rows."""
    pictures = {row: (batch, place) for batch in source.batches(rows) for place, row in enumerate(batch.rows.tolist())}

    def example(row: int, methods: Sequence[str]) -> Example:
        batch, place = pictures[row]
        label = answers.labels[row]
        return Example(
            name=answers.names[row],
            image=batch.pictures[place].permute(1, 2, 0).numpy(),
            label=answers.classes[label] if label >= 0 else None,
            prediction=answers.classes[answers.predictions[row]],
            probability=float(answers.certainty[row]),
            maps={method: whole.maps[method, str(row)] for method in methods},
            verdicts={method: verdicts[method][row] for method in methods},
            mask=None if batch.masks is None else batch.masks[place, 0].cpu().numpy(),
        )

    return example


_CHANCE_IS_AREA = ("pointing_game", "energy_in_mask", "relevance_rank")
_CHANCE = {"mask_auc": 0.5, "point_biserial": 0.0, "road": 0.0}


def _one_column(values: Array, higher_is_better: bool | None) -> Array:
    """Of a metric with several columns, the one whose mean is best."""
    if values.ndim == 1:
        return values
    means = np.array([mean(column) for column in values.T])
    return values[:, np.nanargmax(means if higher_is_better else -means)] if np.isfinite(means).any() else values[:, 0]


def _worst_places(values: Array, higher_is_better: bool | None) -> Array:
    """Places of the worst values, worst first, of equal ones the first; what is not defined is none."""
    badness = np.where(np.isnan(values), -np.inf, -values if higher_is_better else values)
    order = np.argsort(-badness, kind="stable")[:_WORST]
    return order[np.isfinite(badness[order])]


def _called(hiding: Hiding, batch: Known) -> Hiding:
    """The same with what the model takes beside these images."""
    return replace(hiding, forward_args=batch.forward_args, forward_kwargs=batch.forward_kwargs)


def _methods_of(model: nn.Module, images: Tensor, everything: bool, of_model: dict[str, Any]) -> list[str]:
    """Attention of every block, and what costs no more than the forward; or everything that the model allows."""
    cheap = ("attention", "activation_map", "cam", "grad_cam")
    names = [name for name, method in EXPLAINERS.items() if not method.is_control] if everything else cheap
    methods, _ = fitting(model, images, names, **of_model)
    beside = {name: value for name, value in of_model.items() if name != "output"}
    maps = attention_maps(model, images, **beside)
    gates = [name for name, gate in maps.items() if gate.shape[2] * gate.shape[3] > 1]
    return [f"attention@{name}" for name in gates] + methods[1:] if len(gates) > 1 else methods


def _needs_masks(metric: str) -> bool:
    return "masks" in inputs_of(METRICS[metric])


def _check(names: Sequence[str], among: Iterable[str], what: str) -> None:
    for name in names:
        if name not in among:
            close = get_close_matches(name, among, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(among)}"
            raise ValueError(f"expected the name of a {what}, got {name!r}; {hint}")
