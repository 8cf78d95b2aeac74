"""The options of each verb of the command line, as argparse reads them. Imports no torch."""

import argparse
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from sightline import recipe
from sightline.checks import bytes_of
from sightline.facts import did_you_mean
from sightline.version import __version__

if TYPE_CHECKING:
    from sightline.inference import Output

_Add = Callable[..., Any]
"""`add_argument` of a parser."""
KINDS = ("datasets", "models", "attention", "explainers", "metrics", "tasks")
"""What `sightline list` lists."""
RECIPE_PARTS = {
    **dict.fromkeys(("demo", "train", "bench", "reproduce", "sight"), recipe.PARTS),
    "evaluate": ("data",),
    "explore": ("data",),
    "task": ("task",),
}
"""Parts of the recipe whose fields a verb takes as options; `task`: the options of a task, which no recipe has."""
SHORT = {
    "--data": "data.source",
    "--model": "model.name",
    "--weights": "model.weights",
    "--attention": "model.options.attention",
    "--seeds": "seeds",
    "--strict": "data.strict",
    "--max-pixels": "data.max_pixels",
    "--drop-duplicates": "data.drop_duplicates",
}
"""Short options for fields of the recipe."""


class _Parser(argparse.ArgumentParser):
    """Errors in one line, with a hint at what was meant; the recipe's fields below the help of verbs that take them."""

    def format_help(self) -> str:
        parts = RECIPE_PARTS.get(self.prog.partition(" ")[2])
        return super().format_help() + (_fields(parts) if parts and parts != ("task",) else "")

    def error(self, message: str) -> NoReturn:
        if "invalid choice: " in message:
            wrong, _, choices = message.partition("invalid choice: ")[2].partition(" (choose from ")
            choices = choices.replace("'", "").rstrip(")")
            message = f"{wrong} is none of {choices}{did_you_mean(wrong.strip(chr(39)), choices.split(', '))}"
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def parse(
    arguments: Sequence[str], verbs: Mapping[str, Callable[..., None]]
) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The options of a verb, and the fields of the recipe that the command line changes.

    Raises:
        ValueError: a field of the recipe without a value, or one that the verb does not take.
        SystemExit: the line is wrong in another way, or asks for help.
    """
    rest, overrides = _split(arguments)
    options = parser(verbs).parse_args(rest)
    parts = RECIPE_PARTS.get(options.verb, ())
    wrong = [name for name in overrides if parts != recipe.PARTS and name.partition(".")[0] not in parts]
    if wrong:
        allowed = f"only {' and '.join(parts)} fields" if parts else "no recipe field"
        raise ValueError(f"--{wrong[0]}: expected {allowed} with {options.verb}; leave it out")
    short = {name: getattr(options, name, None) for name in SHORT.values()}
    return options, {name: value for name, value in short.items() if value is not None} | overrides


def _split(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Take `--data.size 64` and `--data.size=64` out of the arguments, as {"data.size": "64"}."""
    left, rest, overrides = list(arguments), list[str](), dict[str, str]()
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
        overrides[name] = value
    return rest, overrides


def parser(verbs: Mapping[str, Callable[..., None]]) -> argparse.ArgumentParser:
    """The parser of the verbs; the docstring of each verb's function is its help."""
    whole = _Parser(
        prog="sightline",
        description="See where an image classifier looks, teach it to look, and measure whether the picture tells the "
        "truth.",
    )
    whole.add_argument("--version", action="version", version=f"sightline {__version__}")
    subparsers = whole.add_subparsers(required=True, metavar="VERB", dest="verb")
    for name, function in verbs.items():
        line = (function.__doc__ or "").strip()
        added = subparsers.add_parser(name, help=line, description=line, allow_abbrev=False)
        if name in _ACTIONS:
            actions = added.add_subparsers(required=True, metavar="ACTION", dest="action")
            for action, (text, options) in _ACTIONS[name].items():
                options(actions.add_parser(action, help=text, description=text, allow_abbrev=False).add_argument)
        else:
            _OPTIONS[name](added.add_argument)
    return whole


def _short(add: _Add, flag: str, text: str, metavar: str = "", **kwargs: Any) -> None:
    kwargs |= {"metavar": metavar} if metavar else {"action": "store_const", "const": True}
    add(flag, dest=SHORT[flag], help=f"{text} ({SHORT[flag]})", **kwargs)


def _out(add: _Add, text: str, metavar: str = "FOLDER", **kwargs: Any) -> None:
    add("--out", type=_nonempty, metavar=metavar, help=text, **kwargs)


def _limit(add: _Add) -> None:
    add("--limit", type=_count, default=100, metavar="N", help="images to make maps of (100)")


def _budget(add: _Add) -> None:
    add("--budget", type=_seconds, metavar="TIME", help="such as 90s, 10min, 2h: do what fits, list what does not")


def _memory(add: _Add) -> None:
    text = "memory per forward, such as 200MB or 2GB (300MB; on a GPU half of what is free)"
    add("--memory", type=_bytes, metavar="SIZE", help=text)


def _scores(add: _Add) -> None:
    methods = "see sightline list explainers; name@layer; all = every one that fits, fast = without the slow ones"
    add("--methods", type=_names, metavar="A,B,...", help=methods)
    _budget(add)
    add("--steps", type=_count, metavar="N", help="points of the deletion and insertion curves (32)")


def _images(add: _Add) -> None:
    _short(add, "--strict", "stop at the first unreadable image, or named method that does not fit, not skip it")
    _short(add, "--max-pixels", "skip larger images, 89478485", "N", type=_count)


def _output(add: _Add) -> None:
    text = "key or index of the model's output, logits or probabilities, or both: prediction,probabilities"
    add("--output", type=_which, metavar="WHICH", help=text)


def _demo(add: _Add) -> None:
    _out(add, "run folder to write (runs/demo)", default="runs/demo")
    add("--resume", action="store_true", help="continue an interrupted run")
    _limit(add)


def _train(add: _Add) -> None:
    _short(add, "--data", "folder, table, parquet, hub:OWNER/NAME or a name", "PATH_OR_NAME")
    _short(add, "--model", "network, see sightline list models", "NAME")
    _short(add, "--weights", "fine-tune these: file, run folder or `pretrained`", "FILE")
    _short(add, "--attention", "block to insert, see sightline list attention", "NAME")
    _out(add, "run folder to write")
    add("--recipe", metavar="FILE", help="YAML file to start from")
    _short(add, "--seeds", "one run per seed", "A,B,...")
    add("--resume", action="store_true", help="continue an interrupted run")
    _images(add)
    _short(add, "--drop-duplicates", "leave out copies in other splits or with two labels")
    add("--print-recipe", action="store_true", help="print the resolved recipe and stop")
    add("--profile", action="store_true", help="show where the time of ten steps goes")
    _scores(add)
    _limit(add)


def _explain(add: _Add) -> None:
    text = "run folders, compared on one page, or a timm / torchvision: model with --weights"
    add("run", metavar="RUN_OR_MODEL", help=text)
    text = "files or folders; with --engine also parquet and .tar files, hub:OWNER/NAME, s3://..."
    add("images", nargs="+", metavar="[RUN ...] IMAGE", help=text)
    methods = (
        "see sightline list explainers; all = every one that fits, fast = without the slow ones (grad_cam); "
        "of several runs A,B;C;... = those of each"
    )
    add("--methods", type=_lists, default=["grad_cam"], metavar="A,B,...", help=methods)
    add("--layer", type=_nonempty, metavar="NAME", help="layer or attention block (the last that feeds the logits)")
    add("--target", metavar="CLASS", help="class to explain, by name or index (the predicted one)")
    _output(add)
    add("--batch-size", type=_count, default=64, metavar="N", help="most images per forward (64)")
    _memory(add)
    text = "weights of a timm / torchvision: model, safetensors or .pth; pretrained = timm's, downloaded"
    add("--weights", metavar="FILE", help=text)
    add("--classes", metavar="FILE", help="text file with one class name per line (ImageNet's for 1,000 classes)")
    text = "squeeze all of an image into the input (a model by name: cut out the middle, as in its training)"
    add("--whole", action="store_true", help=text)
    add("--overlays", action="store_true", help="also write a picture of each map alone")
    _out(add, "folder to write", required=True)
    _images(add)
    _many(add)


def _many(add: _Add) -> None:
    text = "for many images: parquet shards instead of pages, one after the other or by Ray; finished ones are kept"
    add("--engine", choices=("local", "ray"), help=text)
    add("--shard", type=_share, metavar="I/N", help="only every N-th shard, from shard I = 0 to N - 1 on (all)")
    add("--shard-size", type=_count, metavar="N", help="images of a shard (1000)")
    add("--float16", action="store_true", help="half as many bytes for the maps in shards")
    _ray(add, "networks that Ray holds (one per GPU; without, one per core but one)")


def _ray(add: _Add, workers: str, number: Callable[[str], int] | None = None) -> None:
    add("--workers", type=number or _count, metavar="N", help=workers)
    add("--gpus", type=_positive, metavar="SHARE", help="GPUs per worker of Ray; 0.5 = two share one (1)")
    add("--cores", type=_count, metavar="N", help="cores of this machine for Ray (all)")
    text = "memory of this machine for images that Ray has decoded, such as 2GB (a third)"
    add("--shared-memory", type=_bytes, metavar="SIZE", help=text)
    add("--address", metavar="HOST:PORT", help="a Ray cluster that runs ($RAY_ADDRESS; else Ray of this machine)")


def _study(add: _Add) -> None:
    text = "only this row (may be given several times); no bench.md"
    add("--row", action="append", metavar="NAME", help=text)
    _short(add, "--seeds", "one run per seed and row", "A,B,...")
    add("--jobs", type=_count, default=1, metavar="N", help="runs at a time, sharing cores, GPUs (1)")


def _bench(add: _Add) -> None:
    add("study", metavar="FILE", help="YAML file: a recipe with one more part, `rows`")
    _out(add, "folder of all runs; finished ones are kept", required=True)
    text = "only this of its `datasets` (may be given several times)"
    add("--dataset", action="append", metavar="NAME", help=text)
    _study(add)
    add("--engine", choices=("ray",), help="train on a Ray cluster, or by Ray on this machine, instead of in --jobs")
    _ray(add, "runs at a time on Ray (one per GPU; without, one per core but one)")


def _reproduce(add: _Add) -> None:
    add("name", nargs="?", metavar="NAME", help="an experiment (list them all)")
    _out(add, "train ours there; finished runs are kept (print the published figures)")
    _short(add, "--data", "where the images are", "PATH_OR_NAME")
    _study(add)


def _evaluate(add: _Add) -> None:
    add("run", metavar="RUN", help="run folder")
    _short(add, "--data", "other data than the run's own", "PATH_OR_NAME")
    add("--split", default="test", metavar="SPLIT", help="train, val or test (test)")
    _scores(add)
    metrics = "see sightline list metrics; all = all that the data allows"
    add("--metrics", type=_names, metavar="A,B,...", help=metrics)
    controls = "maps that ignore the model; other_class = the runner-up's (the first four)"
    add("--controls", type=_names, metavar="A,B,...", help=controls)
    _memory(add)
    _output(add)
    fill = "what replaces a pixel: zero, mean, blur, inpaint, black, a number (zero)"
    add("--fill", type=_fill, default="zero", help=fill)
    _out(add, "folder to write (the run's own)")
    _images(add)
    _short(add, "--drop-duplicates", "leave out copies in other splits or with two labels")
    _limit(add)
    add("--engine", choices=("ray",), help="make and score the maps on a Ray cluster, or by Ray on this machine")
    _ray(add, "networks that Ray holds (one per GPU; without, one per core but one)")


def _task(add: _Add) -> None:
    add("name", metavar="NAME", help="see sightline list tasks; its options are given as --task.OPTION VALUE")
    add("run", metavar="RUN", help="run folder")
    _out(add, "folder to write task-NAME.json into (the run's own)")


def _sight(add: _Add) -> None:
    _out(add, "folder of all networks, or of the tables; finished parts are kept", required=True)
    add("--sets", type=_names, metavar="A,B,...", help="planted sets (all four)")
    text = "train nothing: models that are built to use the planted pixels"
    add("--known", action="store_true", help=text)
    add("--run", metavar="RUN", help="play the grid pointing game with a trained run, on its test images or --data")
    add("--weights", metavar="FILE", help="play it with --model NAME and these weights, on --data")
    _short(add, "--model", "network, see sightline list models", "NAME")
    _short(add, "--data", "folder of photos, table, parquet or a name", "PATH_OR_NAME")
    add("--classes", metavar="FILE", help="text file with one class name per line")
    methods = "of the game; all = every one that fits (those that fit and take a few passes)"
    add("--methods", type=_names, metavar="A,B,...", help=methods)
    add("--grid", type=_grid, default=(2, 2), metavar="ROWSxCOLUMNS", help="cells of a mosaic (2x2)")
    text = "use images that the network names correctly with this probability or more (0.5)"
    add("--confidence", type=_probability, default=0.5, metavar="P", help=text)
    _images(add)
    _budget(add)
    add("--limit", type=_count, metavar="N", help="images to make maps of (100), or mosaics (50)")


def _explore(add: _Add) -> None:
    add("run", metavar="RUN_OR_MODEL", help="run folder, or with RESULTS a timm / torchvision: model with --weights")
    text = "maps that `sightline explain --engine` wrote; without them, those of the run's images are made"
    add("results", nargs="?", metavar="RESULTS", help=text)
    add("--weights", metavar="FILE", help="weights of a model by name")
    add("--classes", metavar="FILE", help="its class names, one per line (ImageNet's for 1,000 classes)")
    _short(add, "--data", "other images than the run's own", "PATH_OR_NAME")
    add("--split", metavar="SPLIT", help="train, val or test (test)")
    methods = "maps to make, see sightline list explainers (grad_cam)"
    add("--methods", type=_names, metavar="A,B,...", help=methods)
    add("--sample", type=_count, default=500, metavar="N", help="maps of each class that are compared (500)")
    add("--tests", type=_count, default=50, metavar="N", help="suspicions to test, the strongest first (50)")
    text = "side of the region that is covered and pasted, as a share of the image's (0.25)"
    add("--window", type=_probability, default=0.25, metavar="SHARE", help=text)
    _images(add)
    _out(add, "folder to write", required=True)


def _serve(add: _Add) -> None:
    add("run", metavar="RUN_OR_MODEL", help="run folder, or a timm / torchvision: model with --weights")
    text = "weights of a timm / torchvision: model, safetensors or .pth; pretrained = timm's, downloaded"
    add("--weights", metavar="FILE", help=text)
    add("--classes", metavar="FILE", help="text file with one class name per line (ImageNet's for 1,000 classes)")
    text = "squeeze all of an image into the input (a model by name: cut out the middle, as in its training)"
    add("--whole", action="store_true", help=text)
    text = "address to listen on (127.0.0.1: only programs of this machine can ask)"
    add("--host", type=_nonempty, default="127.0.0.1", metavar="ADDRESS", help=text)
    add("--port", type=_port, default=8000, metavar="N", help="0 = any that is free (8000)")
    text = "what a client has to send (none on 127.0.0.1, else one is made)"
    add("--token", type=_nonempty, metavar="TEXT", help=text)


def _slides_train(add: _Add) -> None:
    add("--slides", metavar="FOLDER", required=True, help="where the files of the slides are")
    add("--labels", metavar="TABLE.csv", required=True, help="columns slide, label and patient, one row per slide")
    columns = ("slide", "the file", "label", "the class", "patient", "the patient, who is never in two folds")
    for name, text in zip(columns[::2], columns[1::2], strict=True):
        add(f"--{name}", type=_nonempty, default=name, metavar="COLUMN", help=f"column of {text} ({name})")
    add("--model", metavar="NAME_OR_RUN", required=True, help="network of the features, by name or a run folder")
    add("--weights", metavar="FILE", help="its weights: safetensors or .pth; pretrained = timm's, downloaded")
    _tiles(add)
    add("--poolings", type=_names, metavar="A,B,...", help="attention, uniform, mean, max, top_k (all)")
    add("--folds", type=_count, default=5, metavar="N", help="parts of the patients, each predicted by the others (5)")
    add("--repeats", type=_count, default=3, metavar="N", help="how often, with other folds and weights (3)")
    add("--epochs", type=_count, default=40, metavar="N", help="passes over the slides (40)")
    _out(add, "run folder; features that are there are kept", required=True)


def _slides_explain(add: _Add) -> None:
    add("run", metavar="RUN", help="folder of sightline slides train")
    add("slides", nargs="+", metavar="SLIDE", help="files of slides")
    add("--target", metavar="CLASS", help="class to explain (the predicted one)")
    text = "explainer for the inside of the tiles with the highest attention (grad_cam)"
    add("--method", type=_nonempty, default="grad_cam", metavar="NAME", help=text)
    add("--inside", type=_count, default=50, metavar="N", help="how many of these tiles (50)")
    text = "GeoJSON from QuPath, or a folder with NAME.geojson for slides NAME.*"
    add("--annotations", metavar="PATH", help=text)
    add("--names", type=_names, metavar="A,B,...", help="classifications of annotations that count (all)")
    add("--weights", metavar="FILE", help="weights of the network, where their file has moved")
    _reading(add)
    _out(add, "folder to write", required=True)


def _tiles(add: _Add) -> None:
    add("--size", type=_count, metavar="PIXELS", help="side of a tile (the network's)")
    add("--tile-mpp", type=_positive, default=0.5, metavar="UM", help="micrometers per pixel of a tile (0.5)")
    add("--overlap", type=int, default=0, metavar="PIXELS", help="pixels that neighbors share (0)")
    add("--tissue", type=_probability, default=0.5, metavar="SHARE", help="least share of tissue in a tile (0.5)")
    _reading(add)


def _reading(add: _Add) -> None:
    text = "micrometers per pixel of slides whose files do not tell them"
    add("--mpp", type=_positive, metavar="UM", help=text)
    add("--batch-size", type=_count, default=64, metavar="N", help="tiles per forward (64)")
    add("--engine", choices=("ray",), help="make features of several slides at a time, by Ray")
    _ray(add, "processes that read tiles ahead (1); of Ray: slides at a time (one per GPU or core but one)", int)


def _push(add: _Add) -> None:
    add("run", metavar="RUN", help="run folder")
    add("name", metavar="OWNER/NAME", help="repository; created if missing")
    add("--private", action="store_true", help="make it private")


def _pull(add: _Add) -> None:
    add("name", metavar="OWNER/NAME", help="repository; OWNER/NAME@REVISION for a branch, tag or commit")
    _out(add, "run folder to write", required=True)


def _export(add: _Add) -> None:
    add("run", metavar="RUN_OR_MODEL", help="run folder, or a timm / torchvision: model with --weights")
    text = "maps in the file, such as grad_cam,layer_cam@layer3 (the weights of each attention block)"
    add("--maps", type=_names, metavar="A,B,...", help=text)
    add("--layer", type=_nonempty, metavar="NAME", help="layer or attention block (the last that feeds the logits)")
    text = "class of the maps: predicted, input = a second input, all = one map per class (predicted)"
    add("--target", choices=("predicted", "input", "all"), default="predicted", metavar="WHICH", help=text)
    add("--any-size", action="store_true", help="take images of any height and width")
    add("--opset", type=_count, metavar="N", help="version of ONNX's operators, 18 to 23 (that of torch.onnx)")
    text = "weights of a timm / torchvision: model, safetensors or .pth; pretrained = timm's, downloaded"
    add("--weights", metavar="FILE", help=text)
    add("--classes", metavar="FILE", help="text file with one class name per line (ImageNet's for 1,000 classes)")
    _out(add, "FILE.onnx, or FILE.pt2 for torch.export.load", "FILE", required=True)


def _list(add: _Add) -> None:
    add("kind", nargs="?", choices=KINDS, metavar="KIND", help=", ".join(KINDS))
    add("--compare", metavar="MODEL", help="list attention: what each block costs in a timm network")


_OPTIONS: dict[str, Callable[[_Add], None]] = {
    "demo": _demo,
    "train": _train,
    "explain": _explain,
    "bench": _bench,
    "reproduce": _reproduce,
    "evaluate": _evaluate,
    "task": _task,
    "sight": _sight,
    "explore": _explore,
    "serve": _serve,
    "push": _push,
    "pull": _pull,
    "export": _export,
    "list": _list,
}

_ACTIONS: dict[str, dict[str, tuple[str, Callable[[_Add], None]]]] = {
    "slides": {
        "train": ("Learn from the labels of slides, and compare attention with its controls.", _slides_train),
        "explain": ("Write the map of slides: a page, GeoJSON for QuPath, OME-TIFF and a table.", _slides_explain),
    },
}
"""Verbs with several actions: what each does, and its options."""


def _fields(parts: Sequence[str]) -> str:
    """Help on the fields of some parts of the recipe."""
    whose = "of the recipe" if parts == recipe.PARTS else f"of the recipe's {' and '.join(parts)}"
    lines = ["", f"every field {whose} can be given as --PART.FIELD VALUE:"]
    for name, setting in recipe.SETTINGS.items():
        if name.partition(".")[0] in parts:
            first, *rest = textwrap.wrap(setting.help, 74)
            lines += [f"  {'--' + name:<25} {first}", *(f"  {'':<25} {line}" for line in rest)]
    return "\n".join([*lines, ""])


def _nonempty(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("expected a name, got an empty one; fill it in, or leave the option out")
    return text


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError(f"expected one name or several, A,B,..., got {text!r}; see sightline list")
    return names


def _lists(text: str) -> list[str] | list[list[str]]:
    """Names, or names for each of several things between semicolons."""
    return [_names(part) for part in text.split(";")] if ";" in text else _names(text)


def _seconds(text: str) -> float:
    number, unit = text.rstrip("hmins"), text.lstrip("0123456789.")
    scale = {"s": 1, "min": 60, "h": 3600}.get(unit)
    if scale is None or not number.replace(".", "", 1).isdigit() or not float(number):
        raise argparse.ArgumentTypeError(f"expected a time such as 90s, 10min or 2h, got {text!r}")
    return scale * float(number)


def _port(text: str) -> int:
    if not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"expected a port from 0 to 65535, got {text!r}")
    return int(text)


def _probability(text: str) -> float:
    if not re.fullmatch(r"[01]|[01]?\.\d+", text) or float(text) > 1:
        raise argparse.ArgumentTypeError(f"expected a probability from 0 to 1, got {text!r}")
    return float(text)


def _positive(text: str) -> float:
    if not re.fullmatch(r"\d*\.?\d+", text) or float(text) <= 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return float(text)


def _grid(text: str) -> tuple[int, int]:
    rows, _, columns = text.partition("x")
    if not (rows.isdigit() and columns.isdigit()) or int(rows) * int(columns) < 2:
        raise argparse.ArgumentTypeError(f"expected rows and columns of cells such as 2x2 or 3x3, got {text!r}")
    return int(rows), int(columns)


def _share(text: str) -> tuple[int, int]:
    first, _, every = text.partition("/")
    if not (first.isdigit() and every.isdigit()) or int(first) >= int(every):
        raise argparse.ArgumentTypeError(f"expected I/N from 0/N to N-1/N, such as 0/4 to 3/4, got {text!r}")
    return int(first), int(every)


def _bytes(text: str) -> int:
    try:
        return bytes_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _which(text: str) -> "Output":
    which, comma, kind = text.partition(",")
    pick = int(which) if which.isdecimal() else which
    return (pick, kind) if comma else pick


def _fill(text: str) -> float | str:
    return float(text) if text.replace(".", "", 1).lstrip("-").isdigit() else text


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)
