"""The command line. torch is imported inside the verbs, so that `--help` is quick."""

import argparse
import ast
import re
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn
from unicodedata import normalize

from sightline import recipe
from sightline.version import __version__

if TYPE_CHECKING:
    import torch
    from rich.table import Table
    from torch import nn

    from sightline.bench import Bench, Study
    from sightline.data import ImageSet
    from sightline.evaluation import Evaluation, Score
    from sightline.explainers import Verdict
    from sightline.inference import Output
    from sightline.runs import Run

SMALL = {"width": 0.25, "stem_pool": 2, "dropout": 0.0}
"""Options of the VGG networks where nothing else is said: a size that two CPU cores train in minutes."""
DEMO = recipe.Recipe(
    data=recipe.Data(source="clutter"),
    model=recipe.Model(name="vgg_att2", options=SMALL),
    optim=recipe.Optim(epochs=6, lr=0.006),
)
_PER_ROW, _SIDE = 6, 512  # maps in a row of a page, and longest side of an image on it; half where there are more rows
_STRICT = "stop at the first unreadable image, or named method that does not fit, instead of leaving it out"
_SMALL_SIDE = 32  # of images on which some networks have no map
_LONG = 600  # letters of an error that are shown, at its start and at its end
_LISTED = 20  # unreadable images named on the terminal; the report names all
_ABREAST = 6  # columns of a study side by side
_PARTS = ("data", "augment", "model", "optim")
_KINDS = ("datasets", "models", "attention", "explainers", "metrics")


class _Parser(argparse.ArgumentParser):
    """One line per error, with a hint at what was meant; the recipe's fields below the help of verbs that take them."""

    def format_help(self) -> str:
        return super().format_help() + (_fields(parts) if (parts := self.get_default("recipe_parts")) else "")

    def error(self, message: str) -> NoReturn:
        if "invalid choice: " in message:
            wrong, _, choices = message.partition("invalid choice: ")[2].partition(" (choose from ")
            close = get_close_matches(wrong.strip("'"), choices.replace("'", "").rstrip(")").split(", "), n=1)
            message = f"{wrong} is none of {choices.rstrip(')')}" + (f"; did you mean {close[0]}?" if close else "")
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one verb; bad input ends with one line on stderr and exit code 2, Ctrl-C with 130."""
    try:
        rest, overrides = _split(sys.argv[1:] if arguments is None else arguments)
        options = _parser().parse_args(rest)
        parts = options.recipe_parts
        wrong = [name for name in overrides if parts != _PARTS and name.partition(".")[0] not in parts]
        if wrong:
            allowed = f"only {' and '.join(parts)} fields" if parts else "no recipe field"
            raise ValueError(f"--{wrong[0]}: expected {allowed} with {options.verb_name}; leave it out")
        options.verb(options, overrides)
    except KeyboardInterrupt as stop:
        print(f"sightline: {stop or 'stopped; nothing half-written was left behind'}", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except (ValueError, TypeError, OSError, ModuleNotFoundError, RuntimeError, MemoryError, AssertionError) as error:
        print(f"sightline: error: {_one_line(error)}", file=sys.stderr)
        sys.exit(2)


def demo(options: argparse.Namespace, overrides: dict[str, Any]) -> None:
    """Train an attention network on composed digits, see where it looks, and measure it."""
    _train(DEMO, options, overrides)


def train(options: argparse.Namespace, overrides: dict[str, Any]) -> None:
    """Train a classifier on a set of images, then evaluate it and write the report."""
    named = {"data.source": options.data, "model.name": options.model, "seeds": options.seeds}
    named["data.strict"] = options.strict or None
    named["data.drop_duplicates"] = options.drop_duplicates or None
    named["data.max_pixels"] = options.max_pixels
    overrides = {name: value for name, value in named.items() if value is not None} | overrides
    start = _small(overrides.get("model.name")) if options.recipe is None else recipe.load(options.recipe)
    if options.print_recipe:
        print(recipe.dump(recipe.load(start, overrides)), end="")
        return
    if options.out is None:
        raise ValueError("expected --out FOLDER for the run, got none; choose a new folder")
    _train(start, options, overrides, options.profile)


def _small(name: str | None) -> recipe.Recipe:
    from sightline.models import MODELS

    name = name or recipe.Model.name
    return recipe.Recipe(
        model=recipe.Model(name=name, options=SMALL if name in MODELS and name.startswith("vgg") else {})
    )


def _train(start: recipe.Recipe, options: argparse.Namespace, overrides: dict[str, Any], profile: bool = False) -> None:
    from sightline.training import fit, processes

    _check_positions(recipe.load(start, overrides))
    found = fit(start, _folder(options.out), overrides, resume=options.resume, profile=profile)
    if not processes.first():
        return
    runs = found if isinstance(found, list) else [found]
    _list_skipped(runs[0].skipped)
    evaluations = [_evaluate_run(run, {}, "test", run.folder, options.limit, {}) for run in runs]
    _print_notices(notice for one in evaluations for notice in one.notices if notice not in runs[0].notices)
    if len(runs) > 1:
        import numpy as np

        scores = [e.accuracy.value for e in evaluations if e.accuracy is not None]
        spread = np.std(scores, ddof=1)
        print(f"test accuracy over {len(scores)} seeds: {np.mean(scores):.2%} ± {spread:.2%} (standard deviation)")


def _check_positions(wanted: recipe.Recipe) -> None:
    """Refuse images so small that no map would have more than one position, before a network is trained on them."""
    import torch

    from sightline import models
    from sightline.explainers import fitting

    size = wanted.data.size
    if size is None or size >= _SMALL_SIDE:
        return
    with torch.random.fork_rng(devices=[]):
        try:
            model = models.create_model(wanted.model.name, num_classes=2, **wanted.model.options).eval()
            model(torch.zeros(1, 3, size, size))
        except Exception:  # whatever it is, the training says it better
            return
        try:
            fitting(model, torch.rand(1, 3, size, size), ("attention", "activation_map"))
        except ValueError as error:
            raise ValueError(
                f"data.size: expected images on which a map of {wanted.model.name} has several positions, got "
                f"{size} x {size} pixels; choose a larger size"
            ) from error


def bench(options: argparse.Namespace, overrides: dict[str, Any]) -> None:
    """Train the rows of a study with every seed, a control among them, and compare: accuracy, maps, cost."""
    from sightline import bench

    seeds = {"seeds": options.seeds} if options.seeds else {}
    study = bench.load(options.study, seeds | overrides, options.row, options.dataset)
    found = _bench(study, options, options.dataset)
    for dataset in found.datasets:
        own = found.on(dataset)
        name = f"{Path(options.study).stem}{f' on {dataset}' if dataset else ''}"
        title = f"{name}, {_counted(len(study.recipe.seeds), 'seed')}, mean ± deviation"
        _print_lines(title, *own.table())
        _print_lines("maps after training", *own.map_table())
        _print_sentences(own.sentences())
    _end_of(found, options.row is None and options.dataset is None, options.out)


def reproduce(options: argparse.Namespace, overrides: dict[str, Any]) -> None:
    """Published errors beside ours, trained by the same recipe: the paper's, the authors' log's, the control's."""
    from sightline.bench.published import published

    named = {"data.source": options.data, "seeds": options.seeds}
    overrides = {name: value for name, value in named.items() if value is not None} | overrides
    known, study = published(options.name, overrides)
    found = None if options.out is None else _bench(study, options, None)
    _print_lines(known.title, *known.lines(found))
    changed = known.changed(study) if found else []
    _print_sentences(known.notes)
    _print_sentences([f"Ours was trained with {'; '.join(changed)}."] if changed else [])
    _print_sentences(found.sentences() if found else [])
    if found is None:
        print(f"to train ours: sightline reproduce {options.name} --out runs/{options.name}")
    else:
        _end_of(found, options.row is None, str(options.out))


def _bench(study: "Study", options: argparse.Namespace, datasets: list[str] | None) -> "Bench":
    from sightline import bench

    with _Bar() as bar:

        def tell(what: str, done: int, total: int) -> None:
            bar.update(what, done, total)
            if not sys.stderr.isatty():
                print(f"{what}: {done} of {total}", file=sys.stderr, flush=True)

        return bench.bench(study, _folder(options.out), options.row, options.jobs, tell, datasets)


def _end_of(found: "Bench", is_whole: bool, out: str) -> None:
    for run, reason in found.failed.items():
        print(f"failed: {run}: {reason}", file=sys.stderr)
    if is_whole:
        print(f"table: {Path(out) / 'bench.md'}\npage: {Path(out) / 'bench.html'}")
    if found.failed:
        sys.exit(1)


def _print_lines(title: str, columns: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """A table whose first column names the lines, in parts of `_ABREAST` other columns."""
    from rich.table import Table

    for start in range(1, len(columns), _ABREAST):
        part = slice(start, start + _ABREAST)
        table = Table(title=title if start == 1 else None)
        table.add_column(columns[0])
        for name in columns[part]:
            table.add_column(name, justify="right")
        for line in lines:
            table.add_row(line[0], *line[part])
        _print(table)


def _print_notices(notices: Iterable[str]) -> None:
    for notice in dict.fromkeys(notices):
        print(f"notice: {notice}", file=sys.stderr)


def _print_sentences(sentences: Iterable[str]) -> None:
    for sentence in sentences:
        print(textwrap.fill(f"- {sentence}", 100, subsequent_indent="  "))


def sight(options: argparse.Namespace, overrides: dict[str, Any]) -> None:
    """Which explainer finds evidence that is known, and which metric would have told so without knowing."""
    from sightline.sight import sight_test

    if options.known and overrides:
        raise ValueError(
            f"--{min(overrides)}: expected no recipe field with --known, which trains nothing; leave it out"
        )
    with _Bar() as bar:
        found = sight_test(
            _folder(options.out),
            DEMO,
            overrides,
            sets=_names(options.sets),
            known=options.known,
            limit=options.limit,
            budget=options.budget,
            progress=bar.update,
        )
    print(found.markdown(), end="")
    print(f"tables: {Path(options.out) / 'sight.md'}")


def evaluate(options: argparse.Namespace, overrides: dict[str, Any]) -> None:
    """Score a trained run's maps by every metric, with intervals and controls, and write the report."""
    from sightline.runs import open_run

    if options.data is not None:
        overrides = {"data.source": options.data} | overrides
    named = {"data.strict": options.strict or None, "data.drop_duplicates": options.drop_duplicates or None}
    named["data.max_pixels"] = options.max_pixels
    overrides = overrides | {name: value for name, value in named.items() if value is not None}
    run = open_run(options.run)
    out = run.folder if options.out is None else _folder(options.out)
    chosen = {
        "methods": _names_or_all(options.methods),
        "metrics": _names_or_all(options.metrics),
        "controls": _names(options.controls),
        "steps": options.steps,
        "budget": options.budget,
        "output": options.output,
    }
    fill = options.fill
    chosen["fill"] = float(fill) if fill.replace(".", "", 1).lstrip("-").isdigit() else fill
    _print_notices(_evaluate_run(run, overrides, options.split, out, options.limit, chosen).notices)


def _evaluate_run(
    run: "Run", overrides: dict[str, Any], split: str, out: Path, limit: int, chosen: dict[str, Any]
) -> "Evaluation":
    from dataclasses import replace

    from sightline import data, report, runs
    from sightline.evaluation import evaluate

    runs.check_writable(out)
    start = time.perf_counter()
    own = recipe.Data() if "data.source" in overrides else run.recipe.data
    side = run.preprocess.size[0]
    wanted = recipe.load(replace(run.recipe, data=replace(own, size=side)), overrides)
    if wanted.data.size != side:
        raise ValueError(
            f"data.size: expected {side}, the size that the run was trained with, got {wanted.data.size}; "
            "leave it out, or train with that size"
        )
    try:
        whole = "data.source" in overrides and not overrides.keys() & {"data.resplit", "data.test", "data.val"}
        splits = (data.load_whole if whole else data.load)(wanted.data)
    except FileNotFoundError as error:
        if "data.source" in overrides:
            raise
        raise FileNotFoundError(f"{error}; the run was trained on {wanted.data.source}: pass --data PATH") from error
    if split not in splits or not len(splits[split]):
        raise ValueError(f"expected a split with images out of {', '.join(splits)}, got {split!r}; choose with --split")
    images = _in_order_of(replace(splits[split], preprocess=run.preprocess), run.classes)
    model = _on_best_device(runs.load(run.folder))
    reasons: dict[str, str] = {}
    if (methods := chosen.get("methods")) is not None:
        asked = ["all"] if methods == "all" else methods
        fit, reasons = _fitting(
            model, _first(model, images), asked, output=chosen.get("output"), strict=wanted.data.strict
        )
        chosen = chosen | ({} if methods == "all" else {"methods": fit})
    with _Bar() as bar:
        found = evaluate(
            model,
            images,
            limit=limit,
            seed=run.seed,
            progress=bar.update,
            partial_results=out / ".evaluation",
            provenance={
                "run": str(run.folder),
                **{f"left out: {method}": reason for method, reason in reasons.items()},
                **runs.surroundings(),
            },
            **{key: value for key, value in chosen.items() if value is not None},
        )
    seconds = time.perf_counter() - start
    found = replace(
        found, model=run.recipe.model.name, provenance={**found.provenance, "evaluation time": f"{seconds:.0f} s"}
    )
    found.to_json(out / "evaluation.json")
    found.to_csv(out / "per_image.csv")
    page = report.write(found, out, run)
    _print_tables(found)
    for what, why in found.left_out.items():
        print(f"left out: {what}: {why}", file=sys.stderr)
    _print_sentences(found.summary)
    print(f"report: {page}")
    return found


def explain(options: argparse.Namespace, _: dict[str, Any]) -> None:
    """Draw where a model looks: a page per image as PNG, the raw maps as .npz, a table as CSV."""
    import csv
    import io

    import numpy as np
    import torch

    from sightline import data, maps, runs
    from sightline.data.images import open_image, quiet
    from sightline.explainers import Verdict, explain, named
    from sightline.facts import worst

    out = _folder(options.out)
    runs.check_writable(out)
    if any(Path(path).is_dir() and out.resolve() == Path(path).resolve() for path in options.images):
        raise ValueError(f"expected another folder than that of the images, got --out {out}; choose a new one")
    model, preprocess, classes = _model_of(options)
    target = _class_index(options.target, classes)
    max_pixels = options.max_pixels or recipe.Data.max_pixels
    images = data.read_images(options.images, preprocess, strict=options.strict, max_pixels=max_pixels)
    _list_skipped(images.skipped)
    if not len(images):
        raise ValueError(f"expected at least one readable image in {', '.join(options.images)}, got none")
    model = _on_best_device(model)
    device = next(model.parameters()).device
    methods = _names(options.methods) or ["grad_cam"]
    if options.layer == "":
        raise ValueError("expected --layer NAME, got an empty one; leave it out for the model's own")
    layer = None if options.layer is None else options.layer.partition(" (")[0]  # as `explanation.layer` shows it
    methods, _ = _fitting(
        model, _first(model, images), methods, target, layer, output=options.output, strict=options.strict
    )
    before = set(out.iterdir()) if out.is_dir() else set[Path]()
    rows: list[dict[str, Any]] = []
    written, unchecked, notices = {out / "maps.csv"}, dict[str, None](), dict.fromkeys(images.notices)
    verdicts_of: dict[str, list[list[Verdict]]] = {}
    grids: dict[str, str] = {}
    stems = _unique(Path(name).stem for name in images.names)
    with _Bar() as bar:
        for batch in data.batches(images, min(16, options.batch_size)):
            inputs = data.normalize(batch.images.to(device), preprocess)
            found = explain(
                model,
                inputs,
                target,
                methods,
                layer,
                output=options.output,
                batch_size=options.batch_size,
                progress=bar.update,
            )
            unchecked |= dict.fromkeys(found.unchecked)
            notices |= dict.fromkeys(found.notices)
            certainty = found.probabilities
            for place, index in enumerate(batch.indices.tolist()):
                pair = [int(found.targets[place, 0]), int(certainty[place].argmax())]
                names = [classes[i] if i < len(classes) else str(i) for i in pair]
                shares = [float(certainty[place, i]) for i in pair]
                raw = {method: value[place, 0].float().cpu().numpy() for method, value in found.maps.items()}
                packed = io.BytesIO()
                np.savez_compressed(packed, allow_pickle=False, **raw)
                files = {f"{stems[index]}.npz": packed.getvalue()}
                side = _SIDE if len(raw) < _PER_ROW else _SIDE // 2
                with quiet():
                    pixels = open_image(Path(batch.names[place]), side, max_pixels)[0]
                picture = torch.from_numpy(pixels).movedim(-1, 0)[None]  # the network saw all of it
                columns: dict[str, torch.Tensor] = {}
                captions: dict[str, str] = {}
                signed: list[str] = []
                for method, values in raw.items():
                    verdicts = found.verdicts[method][place]
                    verdicts_of.setdefault(method, []).append(verdicts)
                    can_be_trained = Path(options.run).is_dir() and not named(method)[1].is_control
                    grids[method] = _positions(values.shape, bool(found.layers[method]), can_be_trained)
                    at, *shape = found.layers[method].removesuffix(")").split(" (")
                    rows.append(
                        {
                            "image": batch.names[place],
                            "maps": stems[index],
                            "class": names[0],
                            "probability": f"{shares[0]:.4f}",
                            "prediction": names[1],
                            "prediction_probability": f"{shares[1]:.4f}",
                            "method": method,
                            "layer": at,
                            "shape": "".join(shape),
                            "positions": " x ".join(map(str, values.shape)),
                            "lowest": float(values.min()),
                            "highest": float(values.max()),
                            "level": worst(verdicts) or "",
                            "verdicts": "; ".join(verdicts),
                        }
                    )
                    title = _titled(method, verdicts)
                    captions[title] = grids[method]
                    columns[title] = torch.from_numpy(values)[None, None]
                    if named(method)[1].is_signed:
                        signed.append(title)
                    if options.overlays:
                        alone = maps.overlay(picture, columns[title], signed=title in signed)[0, 0]
                        files[f"{stems[index]}--{_file_name(method)}.png"] = maps.png(alone)
                said = [f"{name} ({share:.0%})" for name, share in zip(names, shares, strict=True)]
                title = f"explained: {said[0]}" + (f"; predicted: {said[1]}" if pair[0] != pair[1] else "")
                page = maps.side_by_side(
                    picture, columns, signed=signed, scales=True, captions=captions, per_row=_PER_ROW, title=title
                )
                files[f"{stems[index]}--page.png"] = maps.png(page)
                for file, content in files.items():
                    runs.write(out / file, content)
                    written.add(out / file)
            bar.update("explaining", len(rows) // len(found.maps), len(images))
    table = io.StringIO()
    writer = csv.DictWriter(table, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    runs.write(out / "maps.csv", table.getvalue().encode())
    counts = f"{_counted(len(images), 'image')} x {_counted(len(verdicts_of), 'method')}"
    print(f"{counts} in {out}; {_levels(verdicts_of)}, see maps.csv")
    for line in _doubts(verdicts_of):
        print(line)
    for grid in dict.fromkeys(grids.values()):
        print(f"{grid}: {', '.join(method for method, own in grids.items() if own == grid)}")
    _print_notices(notices)
    if unchecked:
        print(f"not compared with the map of another class: {', '.join(unchecked)}")
    if old := len(before - written):
        print(f"{_counted(old, 'file')} from before still in {out}", file=sys.stderr)


def _first(model: "nn.Module", images: "ImageSet") -> "torch.Tensor":
    """The first image, as the model takes it."""
    from sightline import data

    device = next(model.parameters()).device
    return data.normalize(next(data.batches(images, 1)).images.to(device), images.preprocess)


def _fitting(
    model: "nn.Module",
    first: "torch.Tensor",
    methods: list[str],
    target: int | None = None,
    layer: str | None = None,
    *,
    output: "Output" = None,
    strict: bool,
) -> tuple[list[str], dict[str, str]]:
    """Those methods that the model has evidence for, and for each of the others why not, which is printed too.

    A method that is the only one, or has a layer of its own, or `strict`, is left in: its error will be the answer.
    """
    from sightline.explainers import EXPLAINERS, fitting, named

    everything = methods == ["all"]
    if not everything and (strict or len(methods) == 1):
        return methods, {}
    names = list(EXPLAINERS) if everything else methods
    for name in names:
        named(name)  # a misspelled name is no method that does not fit
    try:
        fit, reasons = fitting(model, first, names, target, layer, output=output)
    except ValueError:
        if everything:
            raise
        return methods, {}
    if any("@" in name for name in reasons):
        return methods, {}
    reasons = {name: " ".join(reason.split()) for name, reason in reasons.items()}
    for name, reason in reasons.items():
        print(f"left out: {name}: {reason}", file=sys.stderr)
    return fit, reasons


def _titled(method: str, verdicts: Sequence["Verdict"]) -> str:
    """A method's name with what is to be distrusted in its map; the gravest level in brackets, unless it is a note."""
    from sightline.facts import worst

    level = worst(verdicts)
    brackets = f" ({level})" if level not in (None, "note") else ""
    return f"{method}{brackets}: {'; '.join(verdicts)}" if verdicts else method


def _positions(grid: Sequence[int], has_layer: bool, can_be_trained: bool) -> str:
    """The positions of a map, and of a coarse one what gives more."""
    from sightline.maps import COARSE

    ways = ["train with a larger --data.size"] * can_be_trained + ["name an earlier --layer"] * has_layer
    finer = f" (coarse; for finer maps {' or '.join(ways)})" if min(grid) < COARSE and ways else ""
    return f"{' x '.join(map(str, grid))} positions{finer}"


def _levels(verdicts: dict[str, list[list["Verdict"]]]) -> str:
    """How many maps have a verdict, by its gravest level."""
    from sightline.facts import LEVELS, worst

    counts = Counter(worst(image) for images in verdicts.values() for image in images)
    levels = [f"{counts[level]} {level}" for level in reversed(LEVELS) if counts[level]]
    return f"{_counted(sum(counts.values()) - counts[None], 'map')} with a verdict" + (
        f" ({', '.join(levels)})" if levels else ""
    )


def _doubts(verdicts: dict[str, list[list["Verdict"]]]) -> Iterator[str]:
    """The verdicts above a note, by level and method, each with a figure that is always the same, and how often."""
    from sightline.facts import LEVELS

    for level in reversed(LEVELS[1:]):
        for method, images in verdicts.items():
            alike: dict[str, list[str]] = {}
            for verdict in (verdict for image in images for verdict in image if verdict.level == level):
                alike.setdefault(verdict.kind, []).append(verdict)
            counts = [
                f"{texts[0] if len(set(texts)) == 1 else name} ({_counted(len(texts), 'image')})"
                for name, texts in alike.items()
            ]
            if counts:
                yield f"  {level}: {method}: {', '.join(counts)}"


def _class_index(text: str | None, classes: Sequence[str]) -> int | None:
    """A class by its name, or else by its index."""
    if text is None:
        return None
    if text in classes:
        return list(classes).index(text)
    if text.removeprefix("-").isdecimal():
        return int(text)
    close = get_close_matches(text, classes, n=1)
    known = (
        f"one of {len(classes)} classes such as {', '.join(classes[:3])}" if classes else "an index, there are no names"
    )
    raise ValueError(
        f"expected --target CLASS by name or index, {known}; got {text!r}"
        + (f"; did you mean {close[0]!r}?" if close else "")
    )


def push(options: argparse.Namespace, _: dict[str, Any]) -> None:
    """Put a run into a repository of the Hugging Face hub, with a model card, without the paths of this machine."""
    from sightline import hub

    print(f"pushed: {hub.push(options.run, options.name, options.private)}")


def pull(options: argparse.Namespace, _: dict[str, Any]) -> None:
    """Copy a run from a repository of the Hugging Face hub into a folder."""
    from sightline import hub

    print(f"run: {hub.pull(options.name, _folder(options.out)).folder}")


def export(options: argparse.Namespace, _: dict[str, Any]) -> None:
    """Write the network of a run as ONNX or as PyTorch's exported program: pixels in, logits and maps out."""
    from sightline.export import write

    found = write(options.run, options.out)
    height, width = found.size
    print(f"{found.path}: images uint8 (b, 3, {height}, {width}) -> {', '.join(found.outputs)}")
    if found.difference is None:
        print("not checked: onnxruntime is not installed; pip install 'sightline[export]'", file=sys.stderr)
    else:
        print(f"checked: differs from the run by at most {found.difference:.1e} of the largest value")


def show(options: argparse.Namespace, _: dict[str, Any]) -> None:
    """List data sets, models, attention blocks, explainers and metrics, one line each."""
    if options.compare:
        if options.kind != "attention":
            raise ValueError("expected --compare with `list attention`, got another list; leave it out")
        _compare(options.compare)
        return
    from sightline import attention, data, explainers, metrics, models

    tables: dict[str, dict[str, Any]] = {
        "datasets": data.DATASETS,
        "models": models.MODELS,
        "attention": attention.ATTENTION,
        "explainers": explainers.EXPLAINERS,
        "metrics": {name: metric.function for name, metric in metrics.METRICS.items()},
    }
    for kind in [options.kind] if options.kind else _KINDS:
        print(f"{kind}:")
        width = max(map(len, tables[kind]))
        for name, thing in tables[kind].items():
            thing = getattr(thing, "func", thing)  # of a partial
            line = thing if isinstance(thing, str) else (thing.__doc__ or "").strip().splitlines()[0]
            line = re.sub(r"[:,]?( of)? \$[^$]*\$", "", line)  # formulas are for the pages of the documentation
            print(f"  {name:<{width}}  {line}")
        if kind == "models":
            print(f"  {'any timm model':<{width}}  by its timm name, for example resnet18 or convnext_tiny")
        if kind == "attention":
            print(
                "  not for insertion: sl.attention.SpatialTransformer (in front of a network), Glimpse, Attend with the"
            )
            print(f"    alignment functions {', '.join(attention.ALIGNMENT)};")
            print(
                "    networks of their own: vgg_att3 (Learn To Pay Attention), protopnet, tiny_vit, timm's transformers"
            )


def _compare(name: str) -> None:
    """What each attention block costs in a network."""
    import torch
    from rich.table import Table

    from sightline import attention, models
    from sightline.models.costs import costs

    plain = models.create_model(name)
    size, _, _ = models.input_of(plain)
    compared = {"none": plain}
    left_out: list[str] = []
    for block in attention.ATTENTION:
        options: dict[str, Any] = {"project": 64} if block == "bilinear" else {}
        try:
            compared[block] = attention.insert(plain, block, init="fresh", **options)
        except ValueError as error:
            left_out.append(f"{block}: {error}")
    with _Bar() as bar:
        found = costs(compared, torch.randn(2, 3, *size), rounds=9, progress=bar.update)
    table = Table(title=f"{name}, {size[1]} x {size[0]} pixels, each block at its paper's places")
    for column in ("block", "parameters", "GMACs / image", "time / without", "kept for backward"):
        table.add_column(column, justify="left" if column == "block" else "right")
    own = found["none"]
    for block, cost in found.items():
        table.add_row(
            block,
            f"{cost.parameters:,} ({cost.parameters / own.parameters - 1:+.1%})",
            f"{cost.macs / 1e9:.3f}",
            "{:.2f} x [{:.2f}, {:.2f}]".format(*cost.ratio),
            f"{cost.saved / 2**20:.0f} MiB ({cost.saved / own.saved:.2f} x)",
        )
    _print(table)
    for line in left_out:
        print(f"left out: {line}")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="sightline",
        description="See where an image classifier looks, teach it to look, and measure whether the picture is true.",
    )
    parser.add_argument("--version", action="version", version=f"sightline {__version__}")
    verbs = parser.add_subparsers(required=True, metavar="VERB", dest="verb_name")

    def verb(name: str, run: Callable[..., None], recipe_parts: Sequence[str] = ()) -> argparse.ArgumentParser:
        line = (run.__doc__ or "").strip()
        new = verbs.add_parser(name, help=line, description=line, allow_abbrev=False)
        new.set_defaults(verb=run, recipe_parts=recipe_parts)
        return new

    def evaluation(new: argparse.ArgumentParser) -> None:
        new.add_argument("--limit", type=_count, default=100, metavar="N", help="images to make maps of (100)")

    def images(new: argparse.ArgumentParser, strict: str = _STRICT, duplicates: bool = False) -> None:
        new.add_argument("--strict", action="store_true", help=strict)
        new.add_argument(
            "--max-pixels", type=_count, metavar="N", help="skip larger images, 89478485 (data.max_pixels)"
        )
        if duplicates:
            new.add_argument(
                "--drop-duplicates",
                action="store_true",
                help="leave out copies in other splits or with two labels (data.drop_duplicates)",
            )

    new = verb("demo", demo, _PARTS)
    new.add_argument("--out", default="runs/demo", metavar="FOLDER", help="run folder to write (runs/demo)")
    new.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    evaluation(new)

    new = verb("train", train, _PARTS)
    new.add_argument(
        "--data", metavar="PATH_OR_NAME", help="folder, table, parquet, hub:OWNER/NAME or a name (data.source)"
    )
    new.add_argument("--model", metavar="NAME", help="network, see sightline list models (model.name)")
    new.add_argument("--out", metavar="FOLDER", help="run folder to write")
    new.add_argument("--recipe", metavar="FILE", help="YAML file to start from")
    new.add_argument("--seeds", metavar="A,B,...", help="one run per seed (seeds)")
    new.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    images(new, "stop at the first unreadable image (data.strict)", duplicates=True)
    new.add_argument("--print-recipe", action="store_true", help="print the resolved recipe and stop")
    new.add_argument("--profile", action="store_true", help="show where the time of ten steps goes")
    evaluation(new)

    def output(new: argparse.ArgumentParser) -> None:
        new.add_argument(
            "--output",
            type=_output,
            metavar="WHICH",
            help="key or index of the model's output, logits or probabilities, or both: prediction,probabilities",
        )

    new = verb("explain", explain)
    new.add_argument("run", metavar="RUN_OR_MODEL", help="run folder, or a timm / torchvision: model with --weights")
    new.add_argument("images", nargs="+", metavar="IMAGE", help="files or folders")
    new.add_argument(
        "--methods", metavar="A,B,...", help="see sightline list explainers; all = every one that fits (grad_cam)"
    )
    new.add_argument("--layer", metavar="NAME", help="layer or attention block (the last that feeds the logits)")
    new.add_argument("--target", metavar="CLASS", help="class to explain, by name or index (the predicted one)")
    output(new)
    new.add_argument(
        "--batch-size", type=_count, default=64, metavar="N", help="images per forward; less takes less memory (64)"
    )
    new.add_argument("--weights", metavar="FILE", help="safetensors weights of a timm / torchvision: model")
    new.add_argument("--classes", metavar="FILE", help="text file with one class name per line")
    new.add_argument("--overlays", action="store_true", help="a picture of each map alone, too")
    new.add_argument("--out", required=True, metavar="FOLDER", help="folder to write")
    images(new)

    def study(new: argparse.ArgumentParser) -> None:
        new.add_argument(
            "--row", action="append", metavar="NAME", help="only this row (may be given several times); no bench.md"
        )
        new.add_argument("--seeds", metavar="A,B,...", help="one run per seed and row (seeds)")
        new.add_argument("--jobs", type=_count, default=1, metavar="N", help="runs at a time, sharing cores, GPUs (1)")

    new = verb("bench", bench, _PARTS)
    new.add_argument("study", metavar="FILE", help="YAML file: a recipe with one part more, `rows`")
    new.add_argument("--out", required=True, metavar="FOLDER", help="folder of all runs; what is done there stays")
    new.add_argument(
        "--dataset", action="append", metavar="NAME", help="only this of its `datasets` (may be given several times)"
    )
    study(new)

    new = verb("reproduce", reproduce, _PARTS)
    new.add_argument("name", metavar="NAME", help="ltpa-cifar10, ltpa-cifar100 or ltpa-cub")
    new.add_argument("--out", metavar="FOLDER", help="train ours there; what is done stays (print what is published)")
    new.add_argument("--data", metavar="PATH_OR_NAME", help="where the images lie (data.source)")
    study(new)

    new = verb("evaluate", evaluate, ("data",))
    new.add_argument("run", metavar="RUN", help="run folder")
    new.add_argument("--data", metavar="PATH_OR_NAME", help="other data than the run's own")
    new.add_argument("--split", default="test", metavar="SPLIT", help="train, val or test (test)")
    new.add_argument(
        "--methods", metavar="A,B,...", help="see sightline list explainers; name@layer; all = every one that fits"
    )
    new.add_argument("--metrics", metavar="A,B,...", help="see sightline list metrics; all = all that the data allows")
    new.add_argument(
        "--controls", metavar="A,B,...", help="maps that know nothing; other_class = the runner-up's (the first four)"
    )
    new.add_argument(
        "--budget", type=_seconds, metavar="TIME", help="such as 90s, 10min, 2h: do what fits, say what does not"
    )
    output(new)
    new.add_argument("--steps", type=_count, metavar="N", help="points of the deletion and insertion curves (32)")
    new.add_argument(
        "--fill", default="zero", help="what replaces a pixel: zero, mean, blur, inpaint, black, a number (zero)"
    )
    new.add_argument("--out", metavar="FOLDER", help="folder to write (the run's own)")
    images(new, duplicates=True)
    evaluation(new)

    new = verb("sight", sight, _PARTS)
    new.add_argument("--out", required=True, metavar="FOLDER", help="folder of all networks; what is done there stays")
    new.add_argument("--sets", metavar="A,B,...", help="planted sets (all four)")
    new.add_argument(
        "--known", action="store_true", help="train nothing: models that are built to use the planted pixels"
    )
    new.add_argument("--budget", type=_seconds, metavar="TIME", help="for the maps and scores of one set")
    evaluation(new)

    new = verb("push", push)
    new.add_argument("run", metavar="RUN", help="run folder")
    new.add_argument("name", metavar="OWNER/NAME", help="repository, made where it is missing")
    new.add_argument("--private", action="store_true", help="make it private")

    new = verb("pull", pull)
    new.add_argument("name", metavar="OWNER/NAME", help="repository; OWNER/NAME@REVISION for a branch, tag or commit")
    new.add_argument("--out", required=True, metavar="FOLDER", help="run folder to write")

    new = verb("export", export)
    new.add_argument("run", metavar="RUN", help="run folder")
    new.add_argument("--out", required=True, metavar="FILE", help="FILE.onnx, or FILE.pt2 for torch.export.load")

    new = verb("list", show)
    new.add_argument("kind", nargs="?", choices=_KINDS, metavar="KIND", help=", ".join(_KINDS))
    new.add_argument("--compare", metavar="MODEL", help="list attention: what each block costs in a timm network")
    return parser


def _fields(parts: Sequence[str]) -> str:
    tree = ast.parse(Path(recipe.__file__).read_text(encoding="utf-8"))
    whose = "of the recipe" if parts == _PARTS else f"of the recipe's {' and '.join(parts)}"
    lines = ["", f"every field {whose} can be given as --PART.FIELD VALUE:"]
    for part in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        if part.name.lower() not in parts:
            continue
        for field, text in zip(part.body, part.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                name = f"--{part.name.lower()}.{ast.unparse(field.target)}"
                default = ast.unparse(field.value) if field.value else ""
                about = f"{text.value.value} [{default}]" if "field(" not in default else str(text.value.value)
                body = textwrap.wrap(about, 74)
                lines += [f"  {name:<25} {body[0]}", *(f"  {'':<25} {line}" for line in body[1:])]
    return "\n".join([*lines, ""])


def _split(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Take `--data.size 64` and `--data.size=64` out of the arguments, as {"data.size": "64"}."""
    left, rest, found = list(arguments), list[str](), dict[str, str]()
    while left:
        flag = left.pop(0)
        name, equals, value = flag.removeprefix("--").partition("=")
        if not (flag.startswith("--") and "." in name):
            rest.append(flag)
            continue
        if not equals:
            if not left or left[0].startswith("--"):
                raise ValueError(f"{flag}: expected a value, got none; write {flag} VALUE")
            value = left.pop(0)
        found[name] = value
    return rest, found


def _model_of(options: argparse.Namespace) -> tuple["nn.Module", Any, Sequence[str]]:
    """Model, preprocessing and class names of a run folder or of a named model."""
    from sightline import data, models, runs

    if Path(options.run).is_dir():
        if options.weights or options.classes:
            raise ValueError(
                "expected --weights and --classes only with the name of a model, got a run folder; leave them out"
            )
        run = runs.open_run(options.run)
        return runs.load(options.run), run.preprocess, run.classes
    if Path(options.run).exists() or "/" in options.run:
        raise FileNotFoundError(
            f"{options.run}: no such run folder; expected one that `sightline train` wrote, or a model"
        )
    if not options.weights:
        raise ValueError(f"expected --weights FILE for model {options.run!r}, got none; untrained maps mean nothing")
    classes = [] if options.classes is None else _class_names(Path(options.classes))
    try:
        model = models.create_model(options.run, num_classes=len(classes) or None, weights=options.weights)
    except ValueError as error:
        hint = "; name the classes it was trained on by --classes FILE"
        if classes:
            hint = f"; {options.classes} names {len(classes)} classes"
        raise ValueError(f"{error}{hint}" if "num_classes" in str(error) else str(error)) from error
    size, mean, std = models.input_of(model)
    return model, data.Preprocess(size=size, mean=mean, std=std), classes


def _class_names(file: Path) -> list[str]:
    """The class names in a text file, one per line; the first line is class 0.

    Raises:
        OSError: it cannot be read.
        ValueError: it holds something else, an empty line among the names, or a name twice.
    """
    from sightline.data.tables import read_text

    expected = "expected a text file with one class name per line"
    try:
        lines = [line.strip() for line in read_text(file).rstrip().splitlines()]
    except ValueError as error:
        raise ValueError(f"{file}: {expected}; {str(error).removeprefix(f'{file}: ')}") from error
    if lines == []:
        raise ValueError(f"{file}: {expected}, it is empty")
    if lines[0].startswith(("[", "{")) or (len(lines) == 1 and re.search("[,;\t]", lines[0])):
        raise ValueError(f"{file}: {expected}, got {lines[0][:60]!r}; write one per line")
    if "" in lines:
        raise ValueError(f"{file}: {expected}, got none in line {lines.index('') + 1}; remove or fill empty lines")
    if doubled := [i for i, name in enumerate(lines) if name in lines[:i]]:
        name = lines[doubled[0]]
        raise ValueError(f"{file}: {expected}, got {name!r} in lines {lines.index(name) + 1} and {doubled[0] + 1}")
    return lines


def _in_order_of(images: "ImageSet", classes: Sequence[str]) -> "ImageSet":
    """The same images with labels counted as the model counts them."""
    import numpy as np

    if tuple(images.classes) == tuple(classes):
        return images
    known = [normalize("NFC", name) for name in classes]  # one name has several forms in Unicode
    names = [normalize("NFC", name) for name in images.classes]
    if missing := [name for name in names if name not in known]:
        raise ValueError(
            f"expected data with the classes of the run, got {missing[0]!r}, which is none of {', '.join(classes)}; "
            "leave its images out, or name it as in training"
        )
    from dataclasses import replace

    place = np.array([*(known.index(name) for name in names), -1])
    return replace(images, labels=place[images.labels], classes=tuple(classes))


def _on_best_device(model: "nn.Module") -> "nn.Module":
    import torch

    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


class _Bar:
    """A progress bar on stderr; nothing where that is no terminal."""

    def __enter__(self) -> "_Bar":
        from rich.console import Console
        from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

        console = Console(stderr=True)
        columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
        self.progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self.progress.start()
        self.tasks: dict[str, Any] = {}
        return self

    def update(self, what: str, done: int, total: int) -> None:
        """Show that `done` of `total` images are through."""
        if what not in self.tasks:
            self.tasks[what] = self.progress.add_task(what, total=total)
        self.progress.update(self.tasks[what], completed=done, total=total)

    def __exit__(self, *error: Any) -> None:
        self.progress.stop()


_COLUMNS = 4  # metrics side by side
_ARROWS = {True: "↑", False: "↓", None: "(no rank)"}


def _print_tables(found: "Evaluation") -> None:
    from rich.table import Table

    for start in range(0, len(found.metrics), _COLUMNS):
        metrics = found.metrics[start : start + _COLUMNS]
        images = found.provenance["images with maps"]
        table = Table(title=None if start else f"{found.model} on {found.data} ({found.split}), {images} images")
        table.add_column("method")
        for metric in metrics:
            table.add_column(f"{metric} {_ARROWS[found.higher_is_better[metric]]}", justify="right")
        for method in found.methods:
            cells = [found.score(method, metric) for metric in metrics]
            label = f"{method} (control)" if method in found.controls else method
            table.add_row(label, *map(_cell, cells))
        if found.chance.keys() & set(metrics):
            table.add_row("chance", *(f"{found.chance[m]:.3f}" if m in found.chance else "" for m in metrics))
        _print(table)


def _print(table: "Table") -> None:
    """As wide as the terminal; 140 columns where there is none."""
    from rich.console import Console

    console = Console()
    Console(width=console.width if console.is_terminal else 140).print(table)


def _cell(score: "Score") -> str:
    found = score.interval
    text = f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"
    return f"{text}, {score.undefined} undefined" if score.undefined else text


def _list_skipped(skipped: Sequence[tuple[str, str]]) -> None:
    for name, reason in skipped[:_LISTED]:
        print(f"skipped {name}: {reason}", file=sys.stderr)
    if len(skipped) > _LISTED:
        print(f"skipped {len(skipped) - _LISTED} more", file=sys.stderr)


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _folder(text: str) -> Path:
    if not text:
        raise ValueError("expected --out FOLDER, got an empty name; write . for the current folder")
    return Path(text)


def _unique(names: Iterable[str]) -> list[str]:
    found: dict[str, None] = {}
    for name in names:
        name = "".join(c if c.isprintable() else "_" for c in name)
        free = (name, *(f"{name}-{n}" for n in range(2, len(found) + 3)))
        found[next(choice for choice in free if choice not in found)] = None
    return list(found)


def _file_name(method: str) -> str:
    return "".join(c if c.isalnum() or c in "._-@" else "_" for c in method)


def _names(text: str | None) -> list[str] | None:
    found = None if text is None else [name.strip() for name in text.split(",") if name.strip()]
    if found == []:
        raise ValueError(f"expected one name or several, A,B,..., got {text!r}; see sightline list")
    return found


def _names_or_all(text: str | None) -> list[str] | str | None:
    return "all" if text == "all" else _names(text)


def _seconds(text: str) -> float:
    number, unit = text.rstrip("hmins"), text.lstrip("0123456789.")
    scale = {"s": 1, "min": 60, "h": 3600}.get(unit)
    if scale is None or not number.replace(".", "", 1).isdigit() or not float(number):
        raise argparse.ArgumentTypeError(f"expected a time such as 90s, 10min or 2h, got {text!r}")
    return scale * float(number)


def _output(text: str) -> "Output":
    which, comma, kind = text.partition(",")
    pick = int(which) if which.isdecimal() else which
    return (pick, kind) if comma else pick


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _one_line(error: Exception) -> str:
    """What an error says, without the middle of a text that fills the screen."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 2 * _LONG else f"{text[:_LONG]} ... {text[-_LONG:]}"
