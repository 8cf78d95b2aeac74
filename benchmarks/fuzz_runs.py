"""Hostile run folders: do `explain` and `evaluate` work, or exit with code 2 and a one-line error?

Every key of run.json and recipe.yaml is removed, null, of another type, huge or nested; every file is missing, empty,
truncated, noise or a folder; model options name a layer class, or are zero. A run contains no code, so the script does
not try to run any.
"""

import contextlib
import copy
import io
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from measure import save
from PIL import Image

from sightline import cli, models, runs
from sightline.data import Preprocess
from sightline.recipe import Data, Model, Recipe

SECONDS = 120
MEMORY = 12 * 2**30
NETWORKS = {
    "vgg_gap": {"width": 1 / 16, "stem_pool": 2},
    "tiny_vit": {"patch": 8},
    "cifar_resnet": {"depth": 8, "width": 0.25},
    "test_resnet": {},
    "test_vit": {"img_size": 32},
    "torchvision:resnet18": {},
}
VALUES: dict[str, Any] = {
    "null": None,
    "a number": 7,
    "zero": 0,
    "a negative number": -1,
    "a fraction": 0.5,
    "NaN": float("nan"),
    "a huge number": 10**30,
    "a text": "text",
    "an empty text": "",
    "a huge text": "x" * 200_000,
    "a truth value": True,
    "an empty list": [],
    "a list": [1, "two", None],
    "an empty mapping": {},
    "a mapping": {"a": {"b": [1]}},
    "a nested list": [[[[[[[[]]]]]]]],
}
OPTIONS = {
    "null": None,
    "zero": 0,
    "a negative number": -1,
    "a text": "relu",
    "nonsense": "layer.of.nothing",
    "a list": [1, 2],
    "a mapping": {"a": 1},
}
OF_TIMM = (
    "act_layer",
    "norm_layer",
    "block",
    "aa_layer",
    "drop_block_rate",
    "layers",
    "channels",
    "in_chans",
    "patch_size",
    "embed_dim",
    "depth",
    "num_heads",
    "img_size",
    "global_pool",
    "stem_type",
)
HISTORIES = {
    "other columns": "a,b\n1,2\n",
    "a column too few": "epoch,lr,train_loss\n1,2,3\n",
    "a column too many": "epoch,lr,train_loss,train_accuracy,val_loss,val_accuracy,seconds\n1,2,3,4,5,6,7,8\n",
    "a row cut off": "epoch,lr,train_loss,train_accuracy,val_loss,val_accuracy,seconds\n1,2\n",
    "text": "epoch,lr,train_loss,train_accuracy,val_loss,val_accuracy,seconds\na,b,c,d,e,f,g\n",
    "infinite": "epoch,lr,train_loss,train_accuracy,val_loss,val_accuracy,seconds\ninf,inf,inf,inf,inf,inf,inf\n",
    "a huge field": "epoch,lr,train_loss,train_accuracy,val_loss,val_accuracy,seconds\n"
    + "1" * 200_000
    + ",2,3,4,5,6,7\n",
    "a huge header": "x" * 200_000 + "\n1\n",
    "one quote": 'epoch,lr\n"1,2\n',
    "no rows": "epoch,lr,train_loss,train_accuracy,val_loss,val_accuracy,seconds\n",
    "a NUL": "epoch,lr\n1,\0\n",
}

Change = Callable[[Path], None]


def base(folder: Path, name: str, options: dict[str, Any]) -> None:
    """Save a run with untrained weights."""
    torch.manual_seed(0)
    classes = tuple("0123456789")
    row = {"epoch": 1.0, "lr": 0.1, "train_loss": 2.0, "train_accuracy": 0.3, "val_loss": 1.5, "val_accuracy": 0.5}
    run = runs.Run(
        folder=folder,
        recipe=Recipe(
            data=Data(source="clutter", train_size=20, test_size=10), model=Model(name=name, options=options)
        ),
        seed=0,
        classes=classes,
        preprocess=Preprocess(size=(32, 32), mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7)),
        info={"command": "sightline train"},
        history=[row | {"seconds": 1.0}],
        skipped=[("a.jpg", "not an image")],
    )
    runs.save(run, models.create_model(name, num_classes=len(classes), **options).state_dict())


def edited(file: str, path: tuple[str, ...], value: Any = None, drop: bool = False) -> Change:
    """Set or remove one key of a JSON or YAML file."""

    def change(folder: Path) -> None:
        text = (folder / file).read_text()
        content = json.loads(text) if file.endswith("json") else yaml.safe_load(text)
        if not path:
            content = value
        else:
            inner = content
            for key in path[:-1]:
                inner = inner.setdefault(key, {})
            if drop:
                inner.pop(path[-1])
            else:
                inner[path[-1]] = copy.deepcopy(value)
        (folder / file).write_text(json.dumps(content) if file.endswith("json") else yaml.safe_dump(content))

    return change


def written(file: str, content: bytes) -> Change:
    """Replace the content of a file."""
    return lambda folder: (folder / file).write_bytes(content) and None


def replaced_by_folder(file: str) -> Change:
    """Replace a file with a folder."""

    def change(folder: Path) -> None:
        (folder / file).unlink()
        (folder / file).mkdir()

    return change


def cases(folder: Path) -> Iterator[tuple[str, Change]]:
    """A description of each fault, and the change that gives it to a good run."""
    facts = json.loads((folder / "run.json").read_text())
    keys = [(), *((key,) for key in facts), *(("preprocess", key) for key in facts["preprocess"])]
    for path in keys:
        if path:
            yield f"run.json without {'.'.join(path)}", edited("run.json", path, drop=True)
        for what, value in VALUES.items():
            yield f"{what} as {'.'.join(path) or 'run.json'}", edited("run.json", path, value)
    for numbers in ([0, 0], [-1, 24], [1, 1], [10**9, 10**9], [24], [24.5, 24.5], ["a", "b"], [24, 24, 24]):
        yield f"{numbers} as preprocess.size", edited("run.json", ("preprocess", "size"), numbers)
    for numbers in ([0.0, 0.0, 0.0], [float("nan")] * 3, [1.0], ["a", "b", "c"], [10**400] * 3):
        yield f"{str(numbers)[:40]} as preprocess.std", edited("run.json", ("preprocess", "std"), numbers)
    for names in (["a"], ["a"] * 10, [str(i) for i in range(9)], [str(i) for i in range(11)], [None] * 10, [[]] * 10):
        yield f"{len(names)} x {names[0]!r} as classes", edited("run.json", ("classes",), names)
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    fields = [(), *((part,) for part in recipe)]
    fields += [(part, key) for part in ("data", "model") for key in recipe[part]]
    for path in fields:
        if path:
            yield f"recipe.yaml without {'.'.join(path)}", edited("recipe.yaml", path, drop=True)
        for what, value in VALUES.items():
            yield f"{what} as {'.'.join(path) or 'recipe.yaml'}", edited("recipe.yaml", path, value)
    for key in ("epochs", "lr", "optimizer", "batch_size"):
        for what, value in VALUES.items():
            yield f"{what} as optim.{key}", edited("recipe.yaml", ("optim", key), value)
    noise = np.random.default_rng(0).bytes(5000)
    for file in ("run.json", "recipe.yaml", "metrics.csv", "model.safetensors"):
        whole = (folder / file).read_bytes()
        yield f"no {file}", lambda folder, file=file: (folder / file).unlink()
        yield f"a folder as {file}", replaced_by_folder(file)
        parts = {
            "empty": b"",
            "cut off": whole[: len(whole) // 2],
            "noise": noise,
            "NULs": b"\0" * 100,
            "deep": b"[" * 100_000,
            "deep YAML": b"{a: " * 3000,
        }
        for what, content in parts.items():
            yield f"{what} {file}", written(file, content)
    for what, text in HISTORIES.items():
        yield f"metrics.csv: {what}", written("metrics.csv", text.encode())


def option_cases(name: str) -> Iterator[tuple[str, Change]]:
    """Invalid options of a network."""
    if name in models.MODELS:
        import inspect

        options = [option for option in inspect.signature(models.MODELS[name]).parameters if option != "num_classes"]
        options += ["attention", "attention_options", "high_resolution", "num_classes", "weights", "name"]
    else:
        options = [*OF_TIMM, "attention", "attention_options", "high_resolution", "num_classes", "weights", "name"]
    for option in options:
        for what, value in OPTIONS.items():
            yield f"{name}: {what} as option {option}", edited("recipe.yaml", ("model", "options", option), value)
    for block in ("se", "cbam", "brnpa"):
        for what, value in {
            "nothing": {"nothing": 1},
            "zero": {"reduction": 0, "k": 0},
            "at": {"at": 3},
            "at nothing": {"at": ["nowhere"]},
            "init": {"init": "x"},
        }.items():
            both = {"attention": block, "attention_options": value}
            yield f"{name}: {block} with {what}", edited("recipe.yaml", ("model", "options"), both)


class TooSlow(BaseException):
    """The command took more than `SECONDS`."""


def answer(arguments: list[str]) -> tuple[str, str]:
    """(outcome, error output) of one command line."""

    def late(*_: Any) -> None:
        raise TooSlow

    out, errors = io.StringIO(), io.StringIO()
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            cli.main(arguments)
        return "worked", ""
    except SystemExit as stop:
        lines = errors.getvalue().strip().splitlines()
        refused = stop.code == 2 and bool(lines) and lines[-1].startswith("sightline: error: ")
        others = [line for line in lines[:-1] if not line.startswith(("skipped ", "left out: ", "notice: "))]
        return ("one line" if refused and not others else "other", errors.getvalue().strip())
    except TooSlow:
        return "too slow", ""
    except BaseException as error:
        return "traceback", f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    only = sys.argv[1] if len(sys.argv) > 1 else ""
    counts: Counter[tuple[str, str]] = Counter()
    wrong: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        os.chdir(root)
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)).save(root / "a.png")
        for name, options in NETWORKS.items():
            good = root / "good" / name.replace(":", "-")
            base(good, name, options)
            listed = [*(cases(good) if name == "vgg_gap" else ()), *option_cases(name)]
            for what, change in [("a good run", lambda folder: None), *listed]:
                if only not in what:
                    continue
                verbs = {
                    "explain": ["explain", "run", "a.png", "--out", "maps"],
                    "evaluate": [
                        "evaluate",
                        "run",
                        "--limit",
                        "2",
                        "--steps",
                        "2",
                        "--metrics",
                        "deletion_auc",
                        "--methods",
                        "grad_cam",
                        "--controls",
                        "center_map",
                        "--out",
                        "scores",
                    ],
                }
                for verb, arguments in verbs.items():
                    shutil.rmtree("run", ignore_errors=True)
                    shutil.copytree(good, "run")
                    change(root / "run")
                    start = time.perf_counter()
                    outcome, output = answer(arguments)
                    counts[verb, outcome] += 1
                    if outcome not in ("worked", "one line") or (what == "a good run" and outcome != "worked"):
                        row = {"verb": verb, "what": what, "outcome": outcome, "said": output[:300]}
                        wrong.append(row)
                        print(json.dumps(row), f"{time.perf_counter() - start:.1f} s", flush=True)
    for (verb, outcome), count in sorted(counts.items()):
        print(f"{verb}: {outcome}: {count}")
    rows = [{"verb": verb, "outcome": outcome, "cases": count} for (verb, outcome), count in sorted(counts.items())]
    if not only:
        print(save("fuzz_runs", [*rows, *wrong]))


if __name__ == "__main__":
    main()
