"""The grid pointing game of many methods on one model: known evidence without a mask, on anybody's images."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from sightline import maps as pixels
from sightline.data import ImageSet
from sightline.evaluation import ranking
from sightline.evaluation.batches import PROBED, Predictions, Source, predict
from sightline.evaluation.findings import findings
from sightline.evaluation.planning import Plan, Task, listed, plan
from sightline.evaluation.result import Evaluation, Example
from sightline.evaluation.scores import PartialResults, Scores, digest_of, key_of
from sightline.explainers import EXPLAINERS, FAST, Method, explain, fitting, named
from sightline.explainers.selection import unsuited
from sightline.facts import Progress
from sightline.inference import Memory, Output, forward, forward_call
from sightline.metrics import MOSAIC_METRICS, Disconnected, Perturbation, draw_mosaics, grid_pointing_game, mosaics
from sightline.notebook import bar_of

Array = np.ndarray

_JOINED, _APART = MOSAIC_METRICS


def evaluate_mosaics(
    model: nn.Module,
    data: ImageSet | Iterable[Any],
    methods: Sequence[Method] | str | None = None,
    *,
    grid: tuple[int, int] = (2, 2),
    confidence: float = 0.5,
    controls: Sequence[Method] = ("random_map", "center_map", "edge_map", "contrast_map", "other_class"),
    limit: int = 50,
    budget: float | None = None,
    output: Output = None,
    strict: bool = True,
    batch_size: int = 64,
    memory: Memory = None,
    examples: int = 4,
    seed: int = 0,
    name: str | None = None,
    classes: Sequence[str] | None = None,
    provenance: dict[str, str] | None = None,
    progress: Progress | bool | None = None,
    partial_results: Path | str | None = None,
) -> Evaluation:
    """Score methods by the grid pointing game: is the map of each class of a mosaic in the cell of its image?

    Images that the model names correctly with a probability of at least `confidence` are put together, four or nine of
    different classes in one mosaic, and every class is explained: `grid_pointing_game`. A model that cannot take a
    mosaic of this size gets it shrunk to the size of one image; a notice says so. The same maps of a model that sees
    each cell alone, whose evidence is certain, are scored by `disconnected_pointing_game`; there a method reads the
    last feature map, the layer that it names, or none. A method that does not fit such a model is undefined there: one
    that reads tokens, as those of a transformer, or an attention block.

    Images without a label count as those of the class that the model names. The control `"other_class"` is the map of
    the class in the next cell. Intervals and tests resample whole mosaics, see `evaluate`; the result can be drawn by
    `sightline.report.write`.

    Args:
        model: as for `explain`.
        data: as for `evaluate`; masks are not needed.
        methods: as for `explain`; None or `"fast"`: those that fit the model and take a few passes, `"all"`: all that
            fit.
        grid: rows and columns of a mosaic.
        confidence: probability from which on images are used.
        controls: as for `evaluate`.
        limit: number of mosaics.
        budget: seconds for all maps; see `evaluate`.
        output: as for `evaluate`.
        strict: as for `evaluate`.
        batch_size: most images per forward, of the size of one cell.
        memory: see `explain`.
        examples: mosaics to keep for the report.
        seed: for the draw and the intervals.
        name: of the data.
        classes: their names.
        provenance: what to save with the numbers.
        progress: True shows a bar; a function is called with (what, done, total).
        partial_results: folder for intermediate results: one file for each method that is done.

    Raises:
        ValueError: an unknown method, or not enough images of different classes that the model names correctly.

    >>> from sightline.testing import PooledModel
    >>> images = torch.eye(4)[:, :, None, None].expand(4, 4, 2, 2) * 9
    >>> data = [(images, torch.arange(4))]
    >>> result = evaluate_mosaics(PooledModel(torch.eye(4)), data, ["grad_cam"], controls=["center_map"])
    >>> result.score("grad_cam", "grid_pointing_game").interval.value, result.chance["grid_pointing_game"]
    (1.0, 0.25)
    """
    report = bar_of(progress) or (lambda what, done, total: None)
    source = Source(model, data, batch_size, memory, classes)
    predictions = predict(model, source, report, output)
    game = _game(model, source, predictions, grid, confidence, limit, seed)
    task, reasons = _task(game, methods, controls, strict)
    files = PartialResults(None if partial_results is None else Path(partial_results))
    options = {name: named(method)[2] for name, method in task.methods.items()}
    asked = grid, task.with_runner_up, examples, options, game.output, game.targets, game.images
    key = files.folder and key_of(model, *asked)
    planned = _planned(game, task, budget, files, f"{key}-{budget}-plan.json")
    game = game.first(planned.limit)
    task = replace(task, methods={name: task.methods[name] for name in planned.methods})
    scores = Scores()
    for number, label in enumerate(task.methods):
        make = partial(_scores, game, label, task, examples)
        file = f"{key}-{len(game.rows)}-{digest_of(also=label)}.npz"
        scores = scores + files.kept(lambda file=file: file, make, Scores)
        report("explaining mosaics", number + 1, len(task.methods))
    result = _ranked(game, source, predictions, task, scores, seed)
    result = replace(
        result,
        data=name or source.name,
        examples=_examples(game, predictions, scores, task, examples),
        left_out=planned.left_out,
        unsuited=reasons,
        provenance=result.provenance | (provenance or {}),
    )
    files.clear()
    return replace(result, summary=tuple(findings(result, predictions)))


@dataclass(frozen=True, eq=False, kw_only=True)
class _Game:
    """Mosaics, the model that sees them whole, and the one that sees each cell alone."""

    model: nn.Module
    apart: Disconnected
    grid: tuple[int, int]
    output: Output
    classes: int
    at_once: int
    """Mosaics in a forward."""
    memory: Memory
    size: tuple[int, int] | None
    """Height and width to which a mosaic is shrunk for the model."""
    device: torch.device
    rows: Int[Array, "m cells"]
    """Place of each image in the data."""
    targets: Int[Tensor, "m cells"]
    images: Float[Tensor, "m cells c h w"]
    pictures: UInt8[Tensor, "m cells 3 h w"]
    notices: tuple[str, ...] = ()

    def first(self, count: int) -> "_Game":
        """The same with no more than so many mosaics."""
        return replace(
            self, **{name: getattr(self, name)[:count] for name in ("rows", "targets", "images", "pictures")}
        )

    def whole(self, part: slice) -> Float[Tensor, "_ c H W"]:
        """Some mosaics as the model takes them."""
        joined = self.joined(part)
        return joined if self.size is None else pixels.resize(joined, self.size)

    def joined(self, part: slice) -> Float[Tensor, "_ c H W"]:
        """Some mosaics with cells as large as the images."""
        return mosaics(self.images[part], self.grid).to(self.device)


def _game(
    model: nn.Module,
    source: Source,
    predictions: Predictions,
    grid: tuple[int, int],
    least: float,
    limit: int,
    seed: int,
) -> _Game:
    is_wrong = (predictions.labels >= 0) & (predictions.labels != predictions.predictions)
    confidence = np.where(is_wrong, np.nan, predictions.certainty)
    rows = draw_mosaics(predictions.predictions, confidence, limit, grid=grid, least=least, seed=seed)
    images: dict[int, Tensor] = {}
    pictures: dict[int, Tensor] = {}
    for batch in source.batches(np.unique(rows)):
        images |= zip(batch.rows.tolist(), batch.images.cpu(), strict=True)
        pictures |= zip(batch.rows.tolist(), batch.pictures.cpu(), strict=True)
    order = rows.flatten().tolist()
    one = images[order[0]][None].to(source.device)
    game = _Game(
        model=model,
        apart=Disconnected(model, grid, _last_features(model, one, predictions.output), predictions.output),
        grid=grid,
        output=predictions.output,
        classes=predictions.probabilities.shape[1],
        at_once=max(source.batch_size // (grid[0] * grid[1]), 1),
        memory=source.memory_limit,
        size=None,
        device=source.device,
        rows=rows,
        targets=torch.from_numpy(predictions.predictions[rows]),
        images=torch.stack([images[row] for row in order]).unflatten(0, rows.shape),
        pictures=torch.stack([pictures[row] for row in order]).unflatten(0, rows.shape),
    )
    mosaic = game.joined(slice(1))
    if _takes(model, mosaic, predictions.output):
        return game
    height, width = one.shape[2:]
    notice = (
        f"{type(model).__name__} takes no mosaic of {mosaic.shape[2]} x {mosaic.shape[3]} pixels, so mosaics are "
        f"shrunk to {height} x {width}: it sees each image smaller than the one it named"
    )
    return replace(game, size=(height, width), notices=(notice,))


def _takes(model: nn.Module, images: Tensor, output: Output) -> bool:
    try:
        forward(model, images, call=forward_call(images, output))
    except torch.OutOfMemoryError:
        raise
    except (AssertionError, RuntimeError, TypeError, ValueError):  # what a model raises depends on the model
        return False
    return True


def _last_features(model: nn.Module, image: Tensor, output: Output) -> str | None:
    """Name of the last feature map that feeds the logits, if a module returns it as (b, k, h, w)."""
    try:
        layer = explain(model, image, methods=["activation_map"], output=output).layer
    except (RuntimeError, ValueError):
        return None
    module = dict(model.named_modules()).get(layer.name)
    shapes: list[tuple[int, ...]] = []
    if module is not None:
        with module.register_forward_hook(lambda module, inputs, features: shapes.append(tuple(features.shape[1:]))):
            forward(model, image, call=forward_call(image, output))
    return layer.name if shapes == [layer.shape] else None


def _task(
    game: _Game, methods: Sequence[Method] | str | None, controls: Sequence[Method], strict: bool
) -> tuple[Task, dict[str, str]]:
    """Methods and controls that fit the model, and why others do not."""
    chosen = listed(methods, controls)
    given: dict[str, Any] = {"targets": game.targets[:1], "output": game.output}
    if methods is None or isinstance(methods, str):
        names = EXPLAINERS if methods == "all" else FAST
        wanted = [name for name in names if not EXPLAINERS[name].is_control]
        fit, reasons = fitting(game.model, game.whole(slice(1)), wanted, **given)
        chosen = {name: name for name in fit} | chosen
        reasons = reasons if methods == "all" else {}
    else:
        reasons = unsuited(game.model, game.whole(slice(1)), chosen.values(), strict, **given)
        chosen = {name: method for name, method in chosen.items() if name not in reasons}
    task = Task(
        model=game.model,
        methods=chosen,
        metrics=("energy_in_mask",),  # costs nothing, as the game
        perturbation=Perturbation(batch_size=game.at_once, memory=game.memory, output=game.output),
        with_runner_up="other_class" in controls,
    )
    return task, reasons


def _planned(game: _Game, task: Task, budget: float | None, files: PartialResults, file: str) -> Plan:
    """All of it, or what fits into the budget; every mosaic is explained twice, and another class costs nothing."""
    if budget is None:
        steps = task.perturbation.steps
        return Plan(methods=tuple(task.methods), metrics=(), limit=len(game.rows), steps=steps, seconds=0.0)

    def make() -> Plan:
        some = slice(min(PROBED, game.at_once))
        targets = game.targets[some].to(game.device)
        timed = replace(task, with_runner_up=False)
        planned = plan(timed, game.whole(some), targets, 2 * len(game.rows), budget)
        return replace(planned, limit=max(planned.limit // 2, 1))

    return files.kept(lambda: file, make, Plan)


def _scores(game: _Game, label: str, task: Task, examples: int) -> Scores:
    """One method in both games."""
    names = [row.name for row in task.rows if row.method == label]
    cells = game.rows.shape[1]
    offsets = game.classes * torch.arange(cells)
    scores = Scores()
    apart, alone = game.apart, task.methods[label]
    if isinstance(alone, str) and "@" in alone:
        alone, layer = alone.split("@", 1)
        apart = Disconnected(game.model, game.grid, layer, game.output)
    for metric, model, method, output, targets, images in (
        (_JOINED, game.model, task.methods[label], game.output, game.targets, game.whole),
        (_APART, apart, alone, "logits", game.targets + offsets, game.joined),
    ):
        for start in range(0, len(game.rows), game.at_once):
            part = slice(start, start + game.at_once)
            try:
                if metric == _APART and scores.layers[label] and apart.layer is None:
                    raise ValueError("no feature map (b, k, h, w) feeds the logits; name a convolution, method@layer")
                explanation = explain(
                    model,
                    images(part),
                    targets[part],
                    [method],
                    output=output,
                    batch_size=game.at_once,
                    memory=game.memory,
                )
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, ValueError) as error:
                if metric == _JOINED or start:
                    raise
                notice = f"{label} does not work on cells that cannot see each other: {' '.join(str(error).split())}"
                undefined = np.full(game.rows.size, np.nan)
                scores = scores + Scores(values={(name, metric): undefined for name in names}, notices=[notice])
                break
            (maps,) = explanation.maps.values()
            values = {(names[0], metric): _game_of(maps, game.grid)}
            if len(names) > 1:  # the map of the class in the next cell
                values[names[1], metric] = _game_of(maps.roll(-1, 1), game.grid)
            scores = scores + Scores(values=values)
            if metric == _JOINED:
                shown = range(start, min(start + len(maps), examples))
                scores = scores + Scores(
                    maps={
                        (label, f"{mosaic} {cell}"): maps[mosaic - start, cell].float().cpu().numpy()
                        for mosaic in shown
                        for cell in range(cells)
                    },
                    verdicts={(label, mosaic): explanation.verdicts[label][mosaic - start] for mosaic in shown},
                    layers={label: explanation.layers[label]},
                    positions={label: list(maps.shape[2:])},
                    notices=list(explanation.notices),
                )
    return scores


def _game_of(maps: Float[Tensor, "b cells h w"], grid: tuple[int, int]) -> Float[Array, " values"]:
    cells = torch.arange(maps.shape[1], device=maps.device).repeat(len(maps))
    return grid_pointing_game(maps.flatten(0, 1)[:, None], cells, grid=grid).double().cpu().numpy()


def _ranked(
    game: _Game,
    source: Source,
    predictions: Predictions,
    task: Task,
    scores: Scores,
    seed: int,
) -> Evaluation:
    count, cells = game.rows.shape
    rows = game.rows.flatten()
    mosaic = np.repeat(np.arange(count), cells)
    table = {metric: {name: scores.values[name, metric] for name in task.names} for metric in (_JOINED, _APART)}
    chance: dict[str, float] = {metric: 1 / cells for metric in table}
    up = dict.fromkeys(table, True)
    columns = predictions.columns(rows, "group")
    return Evaluation(
        data=source.name,
        split=source.split,
        model=type(game.model).__name__,
        n_images=len(predictions.labels),
        unit="mosaic",
        classes=predictions.classes,
        methods=task.names,
        controls=task.controls,
        signed=tuple(row.name for row in task.rows if row.explainer.is_signed and not row.explains_runner_up),
        layers={name: scores.layers.get(name, "") for name in task.names},
        positions={name: tuple(side) for name, side in scores.positions.items()},
        metrics=tuple(table),
        higher_is_better=dict(up),
        chance=chance,
        accuracy=None,
        majority=None,
        confusion=None,
        per_image={"name": columns.pop("name"), "mosaic": [str(number) for number in mosaic]}
        | columns
        | {f"{metric}/{name}": values.tolist() for metric in table for name, values in table[metric].items()},
        examples=(),
        errors=(),
        mean_maps={},
        verdicts={name: {} for name in task.names},
        **ranking.rank(table, up, task.controls, chance, mosaic, seed),
        notices=tuple(dict.fromkeys([*source.notices, *predictions.notices, *game.notices, *scores.notices])),
        skipped=tuple(source.skipped),
        summary=(),
        provenance={"seed": str(seed), "images with maps": str(rows.size), "mosaics": str(count)},
    )


def _examples(game: _Game, predictions: Predictions, scores: Scores, task: Task, count: int) -> tuple[Example, ...]:
    """The first mosaics, once for each of their classes, with the outline of its cell."""
    cells = game.rows.shape[1]
    height, width = game.pictures.shape[3:]
    shown = [row.name for row in task.rows if not row.is_control]
    examples: list[Example] = []
    for number, rows in enumerate(game.rows[:count].tolist()):
        picture = mosaics(game.pictures[number : number + 1], game.grid)[0].permute(1, 2, 0).numpy()
        for cell, row in enumerate(rows):
            target = predictions.classes[predictions.predictions[row]]
            inside = torch.zeros(1, cells, 1, height, width, dtype=torch.bool)
            inside[:, cell] = True
            examples.append(
                Example(
                    name=f"mosaic {number + 1}: {predictions.names[row]}",
                    image=picture,
                    label=target if predictions.labels[row] >= 0 else None,
                    prediction=target,
                    probability=float(predictions.certainty[row]),
                    maps={label: scores.maps[label, f"{number} {cell}"] for label in shown},
                    verdicts={label: scores.verdicts[label, number] for label in shown},
                    mask=mosaics(inside, game.grid)[0, 0].numpy(),
                )
            )
    return tuple(examples)
