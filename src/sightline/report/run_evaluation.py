"""Evaluates a trained run on its own or other data, and writes the scores and the report."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sightline import data, models, recipe, runs
from sightline.data import ImageSet
from sightline.evaluation import Evaluation, as_word, evaluate
from sightline.explainers import fitting
from sightline.facts import Progress
from sightline.report import write

_SMALL_SIDE = 32  # pixels; some networks have no map of smaller images


class EvaluatedRun(NamedTuple):
    """The scores of a run, and where they are."""

    evaluation: Evaluation
    left_out: dict[str, str]
    """Methods and metrics that were left out, and why."""
    report: Path


def evaluate_run(
    run: runs.Run,
    out: Path | str | None = None,
    *,
    split: str = "test",
    overrides: dict[str, Any] | None = None,
    methods: Sequence[str] | None = None,
    progress: Progress | None = None,
    first: Callable[[Path], object] | None = None,
    model: runs.Own | None = None,
    **options: Any,
) -> EvaluatedRun:
    """Evaluate a run and write evaluation.json, per_image.csv and report.html.

    Args:
        run: what to evaluate.
        out: folder to write to; None: the run's.
        split: split of the data.
        overrides: fields of the recipe's data that differ, by dotted name; with `data.source` all data fields are those
            of the new source.
        methods: as for `sightline.evaluate`; also `["all"]` and `["fast"]`. Of several, those that do not fit the model
            are left out.
        progress: called with (what, done, total).
        first: called before the scores with the path of a first report: accuracy, gallery, errors and training.
        model: the network of a run of a network of your own, see `sightline.load`.
        options: further ones of `sightline.evaluate`.

    Raises:
        OSError: the data or the weights are missing, or `out` cannot be written.
        ValueError: the data have no such split, other classes or another size, or an option is wrong.
    """
    out = run.folder if out is None else Path(out)
    runs.check_writable(out)
    start = time.perf_counter()
    images, strict = images_of(run, split, overrides or {})
    network = runs.load_model(run.folder, model).to(runs.best_device())
    named = run.recipe.model.name.removeprefix(runs.OWN)

    def write_first(evaluation: Evaluation) -> None:
        notices = (*evaluation.notices, "The scores of the maps are being computed: open this page again later.")
        path = write(replace(evaluation, model=named, notices=notices), out, run)
        if first is not None:
            first(path)

    evaluation = evaluate(
        network,
        images,
        as_word(methods),
        strict=strict,
        seed=run.seed,
        progress=progress,
        first=None if first is None else write_first,
        partial_results=out / ".evaluation",
        provenance={"run": str(run.folder), **runs.surroundings()},
        **options,
    )
    why_left_out = {f"left out: {method}": reason for method, reason in evaluation.unsuited.items()}
    seconds = f"{time.perf_counter() - start:.0f} s"
    evaluation = replace(
        evaluation,
        model=named,
        provenance={**evaluation.provenance, **why_left_out, "evaluation time": seconds},
    )
    evaluation.to_json(out / "evaluation.json")
    evaluation.to_csv(out / "per_image.csv")
    return EvaluatedRun(evaluation, {**evaluation.unsuited, **evaluation.left_out}, write(evaluation, out, run))


def images_of(run: runs.Run, split: str, overrides: dict[str, Any]) -> tuple[ImageSet, bool]:
    """The images to evaluate a run on, labeled as the run counts classes, and whether the data is read strictly.

    Raises:
        OSError: the data is missing.
        ValueError: the data has no such split, other classes or another size.
    """
    size = run.preprocess.size
    has_other_source = "data.source" in overrides
    fields = recipe.Data() if has_other_source else run.recipe.data
    sides = size[0] if size[0] == size[1] else size
    wanted = recipe.load(replace(run.recipe, data=replace(fields, size=sides)), overrides).data
    if wanted.sides != size:
        raise ValueError(
            f"data.size: expected {sides}, the size that the run was trained with, got {wanted.size}; "
            "leave it out, or train with that size"
        )
    try:
        whole = has_other_source and not overrides.keys() & {"data.resplit", "data.test", "data.val"}
        splits = (data.load_whole if whole else data.load)(wanted)
    except FileNotFoundError as error:
        if has_other_source:
            raise
        raise FileNotFoundError(f"{error}; the run was trained on {wanted.source}: pass --data PATH") from error
    if split not in splits or not len(splits[split]):
        raise ValueError(f"expected a split with images out of {', '.join(splits)}, got {split!r}; choose with --split")
    return replace(splits[split], preprocess=run.preprocess).with_classes(run.classes), wanted.strict


def check_size(wanted: recipe.Recipe) -> None:
    """Refuse, before training, images so small that every map of the network would have a single position.

    Raises:
        ValueError: they are.
    """
    size = wanted.data.sides
    if size is None or max(size) >= _SMALL_SIDE:
        return
    with torch.random.fork_rng(devices=[]):
        try:
            model = models.create_model(wanted.model.name, num_classes=2, **wanted.model.options).eval()
            model(torch.zeros(1, 3, *size))
        except Exception:  # training fails in the same way, with a better message
            return
        try:
            fitting(model, torch.rand(1, 3, *size), ("attention", "activation_map"))
        except ValueError as error:
            raise ValueError(
                f"data.size: expected images on which a map of {wanted.model.name} has several positions, got "
                f"{size[1]} x {size[0]} pixels; choose a larger size"
            ) from error
