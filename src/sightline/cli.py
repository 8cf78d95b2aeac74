"""The command line: each verb calls one function and prints what it returns. Verbs import torch, not this file."""

import ctypes
import logging
import os
import re
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sightline import recipe, terminal
from sightline.arguments import options as options_of
from sightline.options import KINDS, parse

if TYPE_CHECKING:
    from sightline.bench import Bench, Study

SMALL = {"width": 0.25, "stem_pool": 2, "dropout": 0.0}
"""Default options of the VGG networks: a size that two CPU cores train in minutes."""
DEMO = recipe.Recipe(
    data=recipe.Data(source="clutter"),
    model=recipe.Model(name="vgg_att2", options=SMALL),
    optim=recipe.Optim(epochs=6, lr=0.006),
)
_ERRORS = (ValueError, TypeError, OSError, ModuleNotFoundError, RuntimeError, MemoryError, AssertionError)
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # numbers of malloc.h
_LARGEST_KEPT = 2**25  # the highest threshold that glibc takes
_OF_RAY_ALONE = ("gpus", "cores", "shared_memory", "address")  # for verbs with workers of their own
_OF_RAY = ("workers", *_OF_RAY_ALONE)
_ELSEWHERE = """\
  not for insertion: the spatial transformer, in front of a network (--model.options.spatial_transformer {{}}),
    Glimpse, Attend with the alignment functions {};
    networks of their own: vgg_att3 (Learn To Pay Attention), protopnet, tiny_vit, timm's transformers"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one verb; bad input ends with one line on stderr and exit code 2, Ctrl-C with 130."""
    keep_freed_memory()
    try:
        options, overrides = parse(sys.argv[1:] if arguments is None else arguments, VERBS)
        with terminal.notices_shown():
            VERBS[options.verb](options, overrides)
    except KeyboardInterrupt as stop:
        print(f"sightline: {str(stop) or 'stopped; no half-written file was left behind'}", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except _ERRORS as error:
        print(f"sightline: error: {terminal.one_line(error)}", file=sys.stderr)
        sys.exit(2)


def keep_freed_memory() -> None:
    """Tell glibc to keep the memory of freed tensors for the next ones instead of returning it to the system.

    Returned memory comes back page by page, each with a fault and filled with zeros: up to a third of the time of a
    forward on a CPU (benchmarks/README.md). Nothing is changed where the environment already sets the allocator
    (`MALLOC_...`, `GLIBC_TUNABLES`) or `SIGHTLINE_KEEP_MEMORY` is 0.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    is_set = "glibc.malloc" in tunables or any(name.startswith("MALLOC_") for name in os.environ)
    if is_set or os.environ.get("SIGHTLINE_KEEP_MEMORY") == "0":
        return
    if sys.platform == "linux" and "CS_GNU_LIBC_VERSION" in os.confstr_names and os.confstr("CS_GNU_LIBC_VERSION"):
        libc = ctypes.CDLL(None)
        libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT)


def demo(options: Namespace, overrides: dict[str, Any]) -> None:
    """Train an attention network on composed digits, see where it looks, and measure it."""
    _train(DEMO, options, overrides)


def train(options: Namespace, overrides: dict[str, Any]) -> None:
    """Train a classifier on images, then evaluate it and write the report; with identities, measure retrieval."""
    start = _small(overrides.get("model.name")) if options.recipe is None else recipe.load(options.recipe)
    if options.print_recipe:
        from sightline.runs import filled

        print(recipe.dump(filled(recipe.load(start, overrides))), end="")
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


def _train(start: recipe.Recipe, options: Namespace, overrides: dict[str, Any], profile: bool = False) -> None:
    from sightline.data import has_identities
    from sightline.explainers import named
    from sightline.report.run_evaluation import check_size
    from sightline.training import fit, processes

    names = ("limit", "methods", "steps", "budget")
    chosen = {name: value for name in names if (value := getattr(options, name, None)) is not None}
    for name in chosen.get("methods", ()):
        if name not in ("all", "fast"):
            named(name)  # a wrong name is refused before the training
    check_size(recipe.load(start, overrides))
    trained = fit(start, options.out, overrides, resume=options.resume, profile=profile)
    if not processes.first():
        return
    runs = trained if isinstance(trained, list) else [trained]
    terminal.tell_skipped(runs[0].skipped)
    if has_identities(runs[0].recipe.data):
        for run in runs:
            _perform("retrieval", run, run.folder, {})
        return
    evaluations = [_evaluate(run, first=_tell_first, **chosen) for run in runs]
    told = runs[0].notices
    terminal.tell_notices(notice for one in evaluations for notice in one.notices if notice not in told)
    if len(runs) > 1:
        import numpy as np

        accuracies = [evaluation.accuracy.value for evaluation in evaluations if evaluation.accuracy is not None]
        spread = f"{np.mean(accuracies):.2%} ± {np.std(accuracies, ddof=1):.2%} (standard deviation)"
        print(f"test accuracy over {len(accuracies)} seeds: {spread}")


def _tell_first(report: Path) -> None:
    print(f"report: {report} (accuracy, gallery and errors; the scores follow)", flush=True)


def _evaluate(run: Any, **options: Any) -> Any:
    """Evaluate a run and print its scores."""
    from sightline.report.run_evaluation import evaluate_run

    with terminal.Bar() as bar:
        evaluated = evaluate_run(run, progress=bar.update, tell=bar.tell, **options)
    terminal.print_scores(evaluated.evaluation)
    terminal.tell("left out:", evaluated.left_out.items())
    terminal.print_sentences(evaluated.evaluation.summary)
    print(f"report: {evaluated.report}")
    return evaluated.evaluation


def evaluate(options: Namespace, overrides: dict[str, Any]) -> None:
    """Score a trained run's maps by every metric, with intervals and controls, and write the report."""
    from sightline.runs import open_run

    names = ("split", "methods", "metrics", "controls", "steps", "fill", "budget", "memory", "output", "limit", "out")
    chosen = {name: value for name in names if (value := getattr(options, name)) is not None}
    if chosen.get("metrics") == ["all"]:
        chosen["metrics"] = "all"
    chosen["spread"] = _spread(options)
    terminal.tell_notices(_evaluate(open_run(options.run), overrides=overrides, **chosen).notices)


def explain(options: Namespace, overrides: dict[str, Any]) -> None:
    """Draw where a model, or several, look: a page per image as PNG, the raw maps as .npz, a table as CSV."""
    from sightline import report

    if options.engine or options.shard:
        _explain_many(options, overrides)
        return
    _refuse_ray(options)
    if given := next((name for name in ("shard_size", "float16") if getattr(options, name)), None):
        raise ValueError(f"expected --{given.replace('_', '-')} with --engine or --shard, got none; add --engine local")
    out = Path(options.out)
    before = set(out.iterdir()) if out.is_dir() else set[Path]()
    images = list(options.images)
    model, classes, name = _opened(options)
    if name is None:
        others: list[str] = []
        while images and (Path(images[0]) / "run.json").is_file():
            others.append(images.pop(0))
        if not images:
            raise ValueError(f"expected images behind the run folders, got {others[-1]} as the last; name some images")
        model = [options.run, *others] if others else options.run
    limits = {"max_pixels": overrides["data.max_pixels"]} if "data.max_pixels" in overrides else {}
    with terminal.Bar() as bar:
        pages = report.pages(
            model,
            images,
            out,
            options.methods,
            options.target,
            options.layer,
            output=options.output,
            classes=classes,
            name=name,
            whole=options.whole,
            batch_size=options.batch_size,
            memory=options.memory,
            overlays=options.overlays,
            strict=overrides.get("data.strict", False),
            progress=bar.update,
            tell=bar.tell,
            **limits,
        )
    terminal.tell_skipped(pages.skipped)
    terminal.tell("left out:", pages.left_out.items())
    print(*pages.lines(), sep="\n")
    terminal.tell_notices(pages.notices)
    if pages.unchecked:
        print(f"not compared with the map of another class: {', '.join(pages.unchecked)}")
    if old := len(before - pages.written):
        print(f"{old} other file{'s' * (old > 1)} remain{'s' * (old == 1)} in {out}", file=sys.stderr)


def _opened(options: Namespace) -> tuple[Any, Sequence[str], str | None]:
    """The folder of a run, or a model by name with its class names and its name."""
    from sightline import models, runs

    if Path(options.run).is_dir():
        if options.weights or options.classes:
            raise ValueError(
                "expected --weights and --classes only with the name of a model, got a run folder; leave them out"
            )
        return options.run, (), None
    runs.check_writable(Path(options.out))
    model, classes = models.named_model(options.run, options.weights, options.classes)
    return model.to(runs.best_device()), classes, options.run


def _explain_many(options: Namespace, overrides: dict[str, Any]) -> None:
    """Write the maps of many images as shards."""
    from sightline.scale import explain_many

    refused = {"overlays": options.overlays, "strict": overrides.get("data.strict")}
    refused["several runs"] = (Path(options.images[0]) / "run.json").is_file()
    if given := next((name for name, value in refused.items() if value), None):
        raise ValueError(f"expected one run without --overlays or --strict with --engine, got {given}; leave it out")
    engine = options.engine or "local"
    if engine == "local":
        _refuse_ray(options)
    model, classes, name = _opened(options)
    limits = {"max_pixels": overrides["data.max_pixels"]} if "data.max_pixels" in overrides else {}
    if options.shard_size is not None:
        limits["per_shard"] = options.shard_size
    with terminal.Bar() as bar:
        many = explain_many(
            model,
            options.images,
            options.out,
            options.methods,
            options.target,
            options.layer,
            engine=engine,
            shard=options.shard or (0, 1),
            cluster=_cluster(options),
            output=options.output,
            whole=options.whole,
            classes=classes,
            name=name,
            dtype="float16" if options.float16 else "float32",
            batch_size=options.batch_size,
            memory=options.memory,
            progress=bar.update,
            **limits,
        )
    terminal.tell("left out:", many.left_out.items())
    print(*many.lines(), sep="\n")
    terminal.tell_notices(many.notices)
    if many.failed:
        sys.exit(1)


def bench(options: Namespace, overrides: dict[str, Any]) -> None:
    """Train the rows of a study with every seed, a control among them, and compare: accuracy, maps, cost."""
    from sightline import bench

    study = bench.load_study(options.study, overrides, options.row, options.dataset)
    result = _bench(study, options, options.dataset)
    seeds = len(study.recipe.seeds)
    for dataset in result.datasets:
        part = result.on(dataset)
        name = f"{Path(options.study).stem}{f' on {dataset}' if dataset else ''}"
        terminal.print_columns(f"{name}, {seeds} seed{'s' * (seeds > 1)}, mean ± deviation", *part.table())
        terminal.print_columns("maps after training", *part.map_table())
        terminal.print_sentences(part.sentences())
    _tell_end(result, options.row is None and options.dataset is None, options.out)
    if result.failed:
        sys.exit(1)


def reproduce(options: Namespace, overrides: dict[str, Any]) -> None:
    """Published numbers beside ours, trained by one recipe: the paper's, the authors' log's, the control's."""
    from sightline.bench.published import PUBLISHED, published
    from sightline.data.class_lists import SOURCES as CLASS_LISTS_OF_HUB
    from sightline.data.hugging_face import ALIASES

    if options.name is None:
        if options.out is not None or overrides:
            raise ValueError(f"expected an experiment with these options, one of {', '.join(PUBLISHED)}; got none")
        width = max(map(len, PUBLISHED))
        for name, experiment in PUBLISHED.items():
            print(f"{name:<{width}}  {experiment.title}; needs {experiment.needs}")
        return
    paper, study = published(options.name, overrides)
    out = None if options.out is None else Path(options.out)
    result = None if out is None else _bench(study, options, None)
    columns, lines = paper.lines(result)
    if paper.figures:
        terminal.print_columns(paper.title, columns, lines)
    else:
        print(paper.title)
    changed = paper.changed(study) if result else []
    terminal.print_sentences(paper.notes)
    terminal.print_sentences([f"Ours was trained with {'; '.join(changed)}."] if changed else [])
    if result is None or out is None:
        is_online = study.recipe.data.source in (*ALIASES, *CLASS_LISTS_OF_HUB)
        print(f"needs {paper.needs}: --data FOLDER{', or it is downloaded' * is_online}")
        print(f"to train ours: sightline reproduce {options.name} --out runs/{options.name}")
        return
    terminal.print_sentences(result.sentences())
    _tell_end(result, options.row is None, str(out))
    done = {run.row for run in result.measured if run.seed == study.recipe.seeds[0]}
    if paper.draws and options.row is None and {*paper.draws} <= done:
        _draw(paper.draws, study, out)
    if result.failed:
        sys.exit(1)


def _draw(draws: dict[str, list[str]], study: "Study", out: Path) -> None:
    """A page of the maps of several rows, for the first test images."""
    import numpy as np

    from sightline import bench, report, runs
    from sightline.report.run_evaluation import images_of

    folders = [bench.folder(out, row, study.recipe.seeds[0]) for row in draws]
    images, _ = images_of(runs.open_run(folders[0]), "test", {})
    shown = images.picked(np.arange(min(4, len(images))))
    pages = report.pages([*folders], shown, out / "maps", [*draws.values()])
    print(*pages.lines(), sep="\n")


def _bench(study: "Study", options: Namespace, datasets: list[str] | None) -> "Bench":
    from sightline import bench

    cluster = _cluster(options) if getattr(options, "engine", None) else None
    if cluster is None:
        _refuse_ray(options)
    with terminal.Bar(lines=True) as bar:
        return bench.bench(study, options.out, options.row, options.jobs, bar.update, datasets, cluster)


def _cluster(options: Namespace) -> Any:
    from sightline.scale import Cluster

    return Cluster(
        address=options.address,
        workers=options.workers,
        gpus=options.gpus,
        cores=options.cores,
        memory=options.shared_memory,
    )


def _spread(options: Namespace, of_ray: Sequence[str] = _OF_RAY) -> Any:
    """Ray, if it is asked for."""
    if options.engine is None:
        _refuse_ray(options, of_ray)
        return None
    from sightline.scale import spread_by

    return spread_by(_cluster(options))


def _refuse_ray(options: Namespace, of_ray: Sequence[str] = _OF_RAY) -> None:
    """Refuse options of Ray where it is not used."""
    if given := next((name for name in of_ray if getattr(options, name, None) is not None), None):
        raise ValueError(f"expected --{given.replace('_', '-')} with --engine ray, got it without; add --engine ray")


def _tell_end(result: "Bench", is_whole: bool, out: str) -> None:
    terminal.tell("failed:", result.failed.items())
    if is_whole:
        print(f"table: {Path(out) / 'bench.md'}\npage: {Path(out) / 'bench.html'}")


def task(options: Namespace, overrides: dict[str, Any]) -> None:
    """Measure a trained run in another task than naming its test images: figures with intervals."""
    from sightline import runs

    run = runs.open_run(options.run)
    out = Path(options.out or run.folder)
    runs.check_writable(out)
    _perform(options.name, run, out, {name.removeprefix("task."): value for name, value in overrides.items()})


def _perform(name: str, run: Any, out: Path, chosen: dict[str, Any]) -> None:
    """Measure a run in a task, print the figures and keep them."""
    from sightline import tasks

    outcome = tasks.perform(name, run, **chosen)
    file = out / f"task-{name}.json"
    outcome.to_json(file)
    terminal.print_columns(f"{name}: {run.recipe.model.name}", *outcome.table())
    terminal.print_sentences(outcome.notices)
    print(f"figures: {file}")
    if name == "retrieval":
        from sightline.report.ranked import write_ranked
        from sightline.runs import load_model

        model = load_model(run.folder)
        found = tasks.find(run, model, **tasks.check_options(name, chosen))
        print(f"ranked lists: {write_ranked(found, model, out / 'ranked.html', run)}")


def sight(options: Namespace, overrides: dict[str, Any]) -> None:
    """Which explainer finds evidence that is known, and which metric would have shown it without knowing."""
    if options.run or options.weights:
        _sight_mosaics(options, overrides)
        return
    from sightline.sight import sight_test

    only = [name for name in ("classes", "methods") if getattr(options, name)]
    if "data.source" in overrides:
        only.append("data")
    if only:
        raise ValueError(
            f"--{only[0]}: expected --run RUN, or --model NAME with --weights FILE, for the grid pointing game, got "
            "neither; add one, or leave it out to train on planted images"
        )
    if options.known and overrides:
        raise ValueError(
            f"--{min(overrides)}: expected no recipe field with --known, which trains nothing; leave it out"
        )
    with terminal.Bar() as bar:
        result = sight_test(
            Path(options.out),
            DEMO,
            overrides,
            sets=options.sets,
            known=options.known,
            limit=options.limit or 100,
            budget=options.budget,
            progress=bar.update,
            tell=bar.tell,
        )
    print(result.markdown(), end="")
    print(f"tables: {Path(options.out) / 'sight.md'}")


def _sight_mosaics(options: Namespace, overrides: dict[str, Any]) -> None:
    from sightline import models, runs
    from sightline.report.run_evaluation import images_of
    from sightline.sight import mosaic_table, photos, sight_mosaics

    name: str = overrides.get("model.name", "")
    if options.known or options.sets or (options.run and (options.weights or options.classes or name)):
        raise ValueError(
            "expected either --run RUN, or --model NAME with --weights FILE, and neither --sets nor --known, which are "
            "about planted images; leave the others out"
        )
    if wrong := [field for field in overrides if not field.startswith("data.") and field != "model.name"]:
        raise ValueError(f"--{wrong[0]}: expected only data fields, as nothing is trained; leave it out")
    if options.weights and not (name and "data.source" in overrides):
        missing = "--data PATH" if name else "--model NAME"
        raise ValueError(f"expected --weights FILE with --model NAME and --data PATH, got no {missing}; add it")
    runs.check_writable(Path(options.out))
    if options.run:
        run = runs.open_run(options.run)
        name, model = run.recipe.model.name, runs.load_model(run.folder)
        images, strict = images_of(run, "test", overrides)
    else:
        model, classes = models.named_model(name, options.weights, options.classes)
        wanted = recipe.load(recipe.Recipe(), overrides).data
        images = photos(wanted, models.preprocess_of(model), model, classes)
        strict = wanted.strict
    with terminal.Bar() as bar:
        result = sight_mosaics(
            Path(options.out),
            model.to(runs.best_device()),
            images,
            options.methods,
            name=name,
            grid=options.grid,
            confidence=options.confidence,
            limit=options.limit or 50,
            budget=options.budget,
            strict=strict,
            progress=bar.update,
        )
    terminal.tell_skipped(result.skipped)
    terminal.tell("left out:", (result.unsuited | result.left_out).items())
    terminal.tell_notices(result.notices)
    print(mosaic_table(result), end="")
    terminal.print_sentences(result.summary)
    print(f"tables: {Path(options.out) / 'sight.md'}\nreport: {Path(options.out) / 'report.html'}")


def explore(options: Namespace, overrides: dict[str, Any]) -> None:
    """Findings from many maps: where a network looks by class, what is strange, and whether that region decides."""
    from dataclasses import replace

    from sightline import exploration, runs
    from sightline.report.explore import write_exploration

    out = Path(options.out)
    runs.check_writable(out)
    source = _maps_of_run(options, overrides) if options.results is None else _maps_in(options, overrides)
    with terminal.Bar() as bar:
        found = exploration.explore(
            source, sample=options.sample, tests=options.tests, window=options.window, progress=bar.update
        )
    made_by = {"network": options.run, **({} if options.results is None else {"maps": options.results})}
    found = replace(found, provenance=made_by | runs.surroundings())
    found.to_json(out / "explore.json")
    found.to_csv(out / "explore.csv")
    page = write_exploration(found, out)
    terminal.tell_notices(found.notices)
    terminal.print_sentences([*found.summary, *found.duplicates])
    print(f"page: {page}\ntable: {out / 'explore.csv'}")


def _maps_of_run(options: Namespace, overrides: dict[str, Any]) -> Any:
    """The images of a run's data, whose maps are made while they are explored."""
    from sightline import runs
    from sightline.explainers import named
    from sightline.exploration import RunLooks
    from sightline.report.run_evaluation import images_of

    if options.weights or options.classes:
        raise ValueError("expected --weights and --classes only with RESULTS, got no results; name a run folder alone")
    methods = options.methods or ["grad_cam"]
    for name in methods:
        named(name)  # a wrong name is refused before the images are read
    run = runs.open_run(options.run)
    images, _ = images_of(run, options.split or "test", overrides)
    terminal.tell_skipped(images.skipped)
    return RunLooks(runs.load_model(run.folder).to(runs.best_device()), images, methods)


def _maps_in(options: Namespace, overrides: dict[str, Any]) -> Any:
    """The maps in a folder of results."""
    from sightline import runs
    from sightline.scale import ResultLooks, Results

    given = {"methods": options.methods, "split": options.split}
    if other := next((name for name in (*given, *overrides) if given.get(name, True)), None):
        raise ValueError(f"--{other}: expected it without results, which say what was explained; leave it out")
    results = Results.open(options.results)
    model, _, name = _opened(options)
    return ResultLooks(results, model if name else runs.load_model(model).to(runs.best_device()))


def serve(options: Namespace, _: dict[str, Any]) -> None:
    """Serve a page where you drop in images and see where a model looks, and an HTTP API, until Ctrl-C."""
    from sightline import serve as server

    with server.listening(options.host, options.port) as listening, terminal.Bar() as bar:
        server.serve(
            listening,
            options.run,
            options.weights,
            options.classes,
            whole=options.whole,
            token=options.token,
            tell=bar.tell,
            progress=bar.update,
        )


def slides(options: Namespace, _: dict[str, Any]) -> None:
    """Tissue slides with one label each: learn with attention over tiles, and see where on a slide it looks."""
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # hundreds of lines on one damaged file
    {"train": _train_slides, "explain": _explain_slides}[options.action](options)


def _train_slides(options: Namespace) -> None:
    import numpy as np

    from sightline import runs
    from sightline.report.slide_run import write_run
    from sightline.slides import POOLINGS, bags, networks, study

    out, spread = Path(options.out), _spread(options, _OF_RAY_ALONE)
    runs.check_writable(out)
    table = study.read_labels(Path(options.labels), options.label, options.patient, options.slide)
    files = study.slide_files(Path(options.slides), table.slides)
    how = study.Training(
        poolings=tuple(options.poolings or POOLINGS), folds=options.folds, seeds=options.repeats, epochs=options.epochs
    )
    network, preprocess, identity = networks.open_network(options.model, options.weights)
    study.folds_of(np.array(table.labels), table.patients, how.folds, 0, table.classes)  # raises before the work
    grid = bags.Grid(
        size=options.size or preprocess.size[0], mpp=options.tile_mpp, overlap=options.overlap, least=options.tissue
    )
    with terminal.Bar() as bar:
        written = bags.write_bags(
            files, out / "bags", network.to(runs.best_device()), preprocess, grid,
            mpp=options.mpp, made_by=identity, batch_size=options.batch_size, workers=_ahead(options), spread=spread,
            progress=bar.update,
        )  # fmt: skip
    terminal.tell_skipped(tuple(written.skipped.items()))
    terminal.tell("tiles that could not be read:", ((name, str(n)) for name, n in written.damaged.items()))
    print(written.line())
    named = {
        name: written.files[file.name]
        for name, file in zip(table.slides, files, strict=True)
        if file.name in written.files
    }
    with terminal.Bar() as bar:
        run = study.train(named, table, out, how, network=(options.model, options.weights), progress=bar.update)
    page = write_run(run, written.reports, written.skipped)
    terminal.print_columns(run.title(), *page.table())
    print(f"run: {out}\npage: {page.file}\nto see where it looks: sightline slides explain {out} SLIDE --out FOLDER")


def _ahead(options: Namespace) -> int:
    """Processes that read tiles ahead of a network in this one."""
    return 1 if options.workers is None else options.workers


def _explain_slides(options: Namespace) -> None:
    from sightline.report.slides import SlidePages, explain_slides
    from sightline.slides import study

    written, spread = 0, _spread(options, _OF_RAY_ALONE)
    with terminal.Bar() as bar:
        for name, found in explain_slides(
            study.open_slide_run(Path(options.run)),
            options.slides,
            options.out,
            weights=options.weights,
            target=options.target,
            method=options.method,
            tiles=options.inside,
            annotations=options.annotations,
            names=options.names or (),
            mpp=options.mpp,
            batch_size=options.batch_size,
            workers=_ahead(options),
            spread=spread,
            progress=bar.update,
        ):
            if not isinstance(found, SlidePages):
                terminal.tell("skipped", [(name, found)])
                continue
            written += 1
            if found.without:
                terminal.tell("without annotations:", [(name, found.without)])
            terminal.print_columns(f"{name}: {found.prediction}, {found.probability:.1%}", *found.columns())
            print(f"page: {found.files['page']}")
    if not written:
        sys.exit(1)


def push(options: Namespace, _: dict[str, Any]) -> None:
    """Put a run into a repository of the Hugging Face hub, with a model card, without the paths of this machine."""
    from sightline import hub

    print(f"pushed: {hub.push(options.run, options.name, options.private)}")


def pull(options: Namespace, _: dict[str, Any]) -> None:
    """Copy a run from a repository of the Hugging Face hub into a folder."""
    from sightline import hub

    print(f"run: {hub.pull(options.name, options.out).folder}")


def export(options: Namespace, _: dict[str, Any]) -> None:
    """Write a network as ONNX or as PyTorch's exported program: pixels in, logits and maps out."""
    from sightline import models
    from sightline.exporting import check_request
    from sightline.exporting import export as write

    maps: dict[str, Any] = {
        "maps": options.maps or (),
        "layer": options.layer,
        "targets": options.target,
        "opset": options.opset,
    }
    check_request(options.out, **maps)
    model, preprocess, classes = options.run, None, ()
    if not Path(options.run).is_dir():
        model, classes = models.named_model(options.run, options.weights, options.classes)
        preprocess = models.preprocess_of(model)
    elif options.weights or options.classes:
        raise ValueError(
            "expected --weights and --classes only with the name of a model, got a run folder; leave them out"
        )
    exported = write(model, options.out, preprocess, classes, any_size=options.any_size, **maps)
    height, width = ("height", "width") if options.any_size else exported.size
    given = f"images uint8 (b, 3, {height}, {width})" + ", targets int64 (b,)" * (options.target == "input")
    print(f"{exported.path}: {given} -> {', '.join(exported.outputs)}")
    if exported.difference is None:
        print("not checked: onnxruntime is not installed; pip install 'sightline[export]'", file=sys.stderr)
    else:
        print(f"checked: differs from the network by at most {exported.difference:.1e} of the largest value")


def show(options: Namespace, _: dict[str, Any]) -> None:
    """List data sets, models, attention blocks, explainers, metrics and tasks, one line each."""
    if options.compare:
        if options.kind != "attention":
            raise ValueError("expected --compare with `list attention`, got another list; leave it out")
        _compare(options.compare)
        return
    from sightline import attention, data, explainers, metrics, models, tasks

    tables: dict[str, dict[str, Any]] = {
        "datasets": data.DATASETS,
        "models": models.MODELS,
        "attention": attention.ATTENTION,
        "explainers": explainers.EXPLAINERS,
        "metrics": {n: metric.function for n, metric in (metrics.METRICS | metrics.MOSAIC_METRICS).items()},
        "tasks": tasks.TASKS,
    }
    for kind in [options.kind] if options.kind else KINDS:
        print(f"{kind}:")
        width = max(map(len, tables[kind]), default=0)
        for name, thing in tables[kind].items():
            thing = getattr(thing, "func", thing)  # of a partial
            line = thing if isinstance(thing, str) else (thing.__doc__ or "").strip().splitlines()[0]
            line = re.sub(r"[:,]?( of)? \$[^$]*\$", "", line)  # formulas are for the pages of the documentation
            print(f"  {name:<{width}}  {line}")
            if kind == "tasks":
                names = [f"--task.{option}" for option in sorted(options_of(tasks.TASKS[name]))]
                print(f"  {'':<{width}}  options: {', '.join(names) or 'none'}")
        if kind == "models":
            print(f"  {'any timm model':<{width}}  by its timm name, for example resnet18 or convnext_tiny")
        if kind == "attention":
            print(_ELSEWHERE.format(", ".join(attention.ALIGNMENT)))


def _compare(name: str) -> None:
    from sightline.models.costs import block_costs

    with terminal.Bar() as bar:
        (height, width), costs, left_out = block_costs(name, progress=bar.update)
    terminal.print_costs(f"{name}, {width} x {height} pixels, each block at its paper's places", costs)
    for block, reason in left_out.items():
        print(f"left out: {block}: {reason}")


VERBS = {
    "demo": demo,
    "train": train,
    "explain": explain,
    "bench": bench,
    "reproduce": reproduce,
    "evaluate": evaluate,
    "task": task,
    "sight": sight,
    "explore": explore,
    "serve": serve,
    "slides": slides,
    "push": push,
    "pull": pull,
    "export": export,
    "list": show,
}
"""What each verb calls, in the order of the help."""
