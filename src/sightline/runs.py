"""A run folder: recipe.yaml, model.safetensors, run.json, metrics.csv."""

import csv
import inspect
import io
import json
import math
import os
import platform
import shlex
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from sightline import data, models, recipe
from sightline.facts import Interval, old_names
from sightline.files import write
from sightline.inference import copy_of
from sightline.version import __version__

Own = nn.Module | Callable[..., nn.Module]
"""A network of your own: a module, or a function or class that builds one (see `build`)."""
OWN = "own:"
"""Start of the name of such a network in a recipe; what follows only tells its reader which one it was."""
BASE_LEARNER = "base_learner.safetensors"
"""File of a run of meta-transfer learning: where its base learner starts, and how it learns."""
_TRANSFORMER_DECAY = 0.75
_BLOCK_OPTIONS = ("attention", "attention_options", "high_resolution", "neck", "spatial_transformer")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training: its recipe, its results, and what a user of the weights needs to know."""

    def __repr__(self) -> str:
        what = f"{self.recipe.model.name} on {self.recipe.data.source}, {len(self.classes)} classes, seed {self.seed}"
        return f"Run({str(self.folder)!r}: {what}, {len(self.history)} epochs)"

    folder: Path
    recipe: recipe.Recipe
    """With every field resolved, and this run's seed only."""
    seed: int
    classes: tuple[str, ...]
    preprocess: data.Preprocess
    info: dict[str, str]
    """command, date, hardware, versions, number of parameters, wall time."""
    history: list[dict[str, float]]
    """One row per epoch: epoch, lr, train_loss, train_accuracy, val_loss, val_accuracy (0 to 1; NaN without
    validation images), seconds."""
    skipped: list[tuple[str, str]]
    """Images that could not be read, with the reason."""
    notices: list[str] = field(default_factory=lambda: [])
    """Decisions about the images that their owner may want to change."""
    probe: Interval | None = None
    """Accuracy on the test images of a linear classifier of the features of `model.weights`, before training."""


def open_run(folder: Path | str) -> Run:
    """Read everything of a run except its weights.

    Raises:
        FileNotFoundError: the folder is missing or is no run.
        ValueError: a file in it is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such run; expected a folder that `sightline train` wrote")
    if missing := [name for name in ("recipe.yaml", "run.json") if not (folder / name).is_file()]:
        seeds = sorted(p.name for p in folder.glob("seed-*"))
        hint = f"open one of {', '.join(seeds)} in it" if seeds else "expected a folder that `sightline train` wrote"
        raise FileNotFoundError(f"{folder} is not a run, it has no {missing[0]}; {hint}")
    try:
        facts = _checked(json.loads((folder / "run.json").read_text(encoding="utf-8")), _FACTS, "run.json")
        numbers = _checked(facts["preprocess"], _PREPROCESS, "preprocess")
        return Run(
            folder=folder,
            recipe=recipe.of_run(folder / "recipe.yaml"),
            seed=facts["seed"],
            classes=tuple(facts["classes"]),
            preprocess=data.Preprocess(
                **{name: tuple(numbers[name]) for name in _PREPROCESS},
                **{name: numbers[name] for name in ("crop", "interpolation") if name in numbers},
            ),
            info=facts["info"],
            history=_read_history(folder / "metrics.csv"),
            skipped=[(name, reason) for name, reason in facts["skipped"]],
            notices=[*facts.get("notices", [])],
            probe=Interval(**facts["probe"]) if facts.get("probe") else None,
        )
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"run {folder} is damaged or of another version: {error}") from error


def load_model(folder: Path | str, model: Own | None = None) -> nn.Module:
    """The trained model of a run, a plain module in eval mode on the CPU.

    Its attributes `preprocess` and `classes` are those of the run, unless the network has such attributes itself.

    Args:
        folder: the run.
        model: the module that was trained, or what builds it, for a run of a network of your own: a run folder holds
            data, no code. The module itself is not changed.

    Raises:
        OSError: the folder is no run, has no weights yet, or they are damaged.
        ValueError: the weights are those of another model, or `model` is missing or not needed.
    """
    run = open_run(folder)
    weights = run.folder / "model.safetensors"
    if not weights.is_file():
        raise FileNotFoundError(
            f"run {folder} has no model.safetensors yet; train it to the end of an epoch with --resume"
        )
    network = run.recipe.model
    if (model is not None) != network.name.startswith(OWN):
        raise ValueError(
            f"run {folder} holds {network.name}, which sightline builds itself; leave `model` out"
            if model is not None
            else f"run {folder} holds a network of your own, {network.name.removeprefix(OWN)}, and no code to build "
            f"it; in Python, pass the module or what builds it: sl.load({str(folder)!r}, model=...)"
        )
    with torch.random.fork_rng(devices=[]):
        if model is None:
            loaded = models.create_model(
                network.name, num_classes=len(run.classes), weights=weights, new_head=False, **network.options
            )
            return _described_by_run(loaded, run).eval()
        loaded = build(model, len(run.classes))
    try:
        loaded.load_state_dict(unpack(weights)[0])
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"weights of run {folder} do not fit the model: {reason}; pass what was trained") from error
    return _described_by_run(loaded, run).eval()


def _described_by_run(model: nn.Module, run: Run) -> nn.Module:
    """The same model, which now says how its images are prepared and what its classes are called."""
    for name in ("preprocess", "classes"):
        if not hasattr(model, name):
            setattr(model, name, getattr(run, name))
    return model


def build(model: Own, num_classes: int) -> nn.Module:
    """A network of your own: a copy of a module, or what a function or class returns.

    It is called with `num_classes=` if it takes that keyword, with the number alone if it needs exactly one argument,
    and otherwise without arguments.

    Raises:
        TypeError: it returns no module.

    >>> build(lambda classes: nn.Linear(2, classes), 3)
    Linear(in_features=2, out_features=3, bias=True)
    """
    if isinstance(model, nn.Module):
        return copy_of(model)
    parameters = inspect.signature(model).parameters.values()
    needed = [p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if any(p.name == "num_classes" or p.kind is p.VAR_KEYWORD for p in parameters):
        network = model(num_classes=num_classes)
    else:
        network = model(num_classes) if len(needed) == 1 else model()
    if not isinstance(network, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"expected a function that returns a torch.nn.Module, got {type(network).__name__} from it")
    return network


def own_name(model: Own) -> str:
    """The name of a network of your own in a recipe.

    >>> own_name(nn.Flatten()), own_name(nn.Flatten)
    ('own:Flatten', 'own:Flatten')
    """
    named = type(model) if isinstance(model, nn.Module) else getattr(model, "func", model)  # of a partial
    return f"{OWN}{getattr(named, '__qualname__', type(named).__name__)}"


def filled(start: recipe.Recipe) -> recipe.Recipe:
    """A recipe in which every field that depends on `model.weights` has its value.

    With weights, also the size and the normalization are those of the network, and layers of transformers learn the
    more slowly the earlier they are.

    Raises:
        OSError: the weights are those of a run folder that is none.
        ValueError: no such network.
    """
    if start.model.weights is None or start.model.name == "protopnet":
        return recipe.filled(start, recipe.FROM_SCRATCH)
    values = dict(recipe.FINE_TUNING)
    if None in (start.data.size, start.model.normalization, start.optim.layer_decay):
        own = pretrained_input(start.model)
        if own is None:
            values["model.normalization"] = "data"
        else:
            values["data.size"] = own.size if len({*own.size}) > 1 else own.size[0]
        if start.model.name not in models.MODELS and _described(start.model)[1]:
            values["optim.layer_decay"] = _TRANSFORMER_DECAY
    return recipe.filled(start, values)


def pretrained_input(model: recipe.Model) -> data.Preprocess | None:
    """Size, mean and standard deviation that a network was pretrained with; None if nothing tells them.

    Raises:
        OSError: the weights are those of a run folder that is none.
        ValueError: no such network.
    """
    if model.weights is not None and Path(model.weights).is_dir():
        return open_run(model.weights).preprocess
    return None if model.name in models.MODELS or model.name.startswith(OWN) else _described(model)[0]


def _described(model: recipe.Model) -> tuple[data.Preprocess, bool]:
    """The input of a network of timm or torchvision, and whether it is a transformer."""
    options = {name: value for name, value in model.options.items() if name not in _BLOCK_OPTIONS}
    return _described_by(model.name, json.dumps(options))


@cache
def _described_by(name: str, options: str) -> tuple[data.Preprocess, bool]:
    with torch.random.fork_rng(devices=[]), torch.device("meta"):  # its structure alone, without weights
        network = models.create_model(name, **json.loads(options))
    preprocess, side = models.preprocess_of(network), json.loads(options).get("img_size")
    if isinstance(side, int):
        preprocess = replace(preprocess, size=(side, side))
    kinds = {type(part).__name__ for part in network.modules()}
    attends = any("Attention" in kind for kind in kinds)
    return preprocess, attends and hasattr(network, "group_matcher") and not any("BatchNorm" in kind for kind in kinds)


def best_device() -> str:
    """The GPU if there is one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def save(run: Run, weights: dict[str, Tensor] | None = None) -> None:
    """Write a run into its folder; each file is either the old or the new one, never a part of it.

    Args:
        run: the run to write.
        weights: state_dict of the model. None: keep the file of weights.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    if weights is not None:
        write(run.folder / "model.safetensors", pack(weights, {}))
    table = io.StringIO()
    writer = csv.DictWriter(table, list(run.history[0]) if run.history else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(run.history)
    aside = ("folder", "recipe", "history", *(["probe"] if run.probe is None else []))
    facts = {key: value for key, value in asdict(run).items() if key not in aside}
    facts["preprocess"] = run.preprocess.facts()
    write(run.folder / "metrics.csv", table.getvalue().encode())
    write(run.folder / "recipe.yaml", recipe.dump(run.recipe).encode())
    write(run.folder / "run.json", json.dumps(facts, indent=2, ensure_ascii=False).encode())


def check_writable(folder: Path) -> None:
    """Raise before the work starts if a folder cannot be created or written; leaves nothing behind.

    Raises:
        OSError: a file is in the way, or the disk is full or read-only.
    """
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise NotADirectoryError(f"{nearest} is a file; expected a folder to write to")
    try:
        with tempfile.TemporaryFile(dir=nearest):  # nameless: others may check the same folder at the same time
            pass
    except OSError as error:
        raise type(error)(f"cannot write to {folder}: {error.strerror}; choose another folder") from error


def pack(tensors: dict[str, Tensor], facts: dict[str, Any]) -> bytes:
    """Tensors as a safetensors file with JSON in its header.

    >>> safetensors.torch.load(pack({"a": torch.ones(2)}, {"epoch": 3}))
    {'a': tensor([1., 1.])}
    """
    # safetensors refuses tensors that share memory or are not contiguous (tied weights, channels-last)
    copies = {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    return safetensors.torch.save(copies, {name: json.dumps(value) for name, value in facts.items()})


def unpack(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts that `pack` has written.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            facts = {name: json.loads(value) for name, value in (file.metadata() or {}).items()}
            return {name: file.get_tensor(name) for name in file.keys()}, facts
    except (safetensors.SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}; delete the run and train it again") from error


def plain(value: Any) -> Any:
    """Convert to JSON's types; NaN and infinities, which JSON does not have, become None.

    >>> plain({"a": (1, float("nan"))})
    {'a': [1, None]}
    """
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def surroundings() -> dict[str, str]:
    """How a result was produced: command, date, hardware, versions."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads"
    versions = {"python": platform.python_version(), "sightline": __version__}
    versions |= {name: version(name) for name in ("torch", "torchvision", "timm", "numpy")}
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": f"{platform.machine()}, {os.cpu_count()} CPUs, {gpu}",
        "versions": ", ".join(f"{name} {number}" for name, number in versions.items()),
    }


_Limit = tuple[str, Callable[[Any], bool]]
_LARGEST_SIDE = 2**14


def _are(values: Any, count: int, is_one: Callable[[Any], bool]) -> bool:
    return isinstance(values, list) and len(values) == count and all(is_one(value) for value in values)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e9


_FACTS: dict[str, _Limit] = {
    "seed": ("a whole number from 0 to 2**32 - 1", lambda x: type(x) is int and 0 <= x < 2**32),
    "classes": (
        "a list of different names",
        lambda x: isinstance(x, list) and 0 < len(x) == len({name for name in x if isinstance(name, str)}),
    ),
    "preprocess": ("size, mean and std", lambda x: isinstance(x, dict)),
    "info": ("names with texts", lambda x: isinstance(x, dict) and all(isinstance(text, str) for text in x.values())),
    "skipped": (
        "pairs of file and reason",
        lambda x: isinstance(x, list) and all(_are(pair, 2, lambda text: isinstance(text, str)) for pair in x),
    ),
}
_PREPROCESS: dict[str, _Limit] = {
    "size": (
        f"two whole numbers from 1 to {_LARGEST_SIDE:,}",
        lambda x: _are(x, 2, lambda side: type(side) is int and 0 < side <= _LARGEST_SIDE),
    ),
    "mean": ("three numbers", lambda x: _are(x, 3, _is_number)),
    "std": ("three numbers above 0", lambda x: _are(x, 3, lambda value: _is_number(value) and value > 0)),
}
_COLUMNS = ("epoch", "lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy")


def _checked(facts: Any, limits: Mapping[str, _Limit], where: str) -> dict[str, Any]:
    """JSON facts whose values keep the limits.

    Raises:
        ValueError: no mapping, a name is missing, or a value breaks its limit.
    """
    if not isinstance(facts, dict):
        raise ValueError(f"expected {', '.join(limits)} in {where}, got {facts!r}")
    for name, (expected, is_valid) in limits.items():
        if name not in facts:
            raise ValueError(f"expected {name} in {where}, got none")
        if not is_valid(facts[name]):
            raise ValueError(f"expected {expected} as {name} in {where}, got {facts[name]!r}")
    return facts


def _read_history(path: Path) -> list[dict[str, float]]:
    with path.open(encoding="utf-8", newline="") as file:
        try:
            rows = list(csv.DictReader(file, strict=True))
        except csv.Error as error:
            raise ValueError(f"{path.name} is not a table: {error}") from error
    for row in rows:
        if None in row or None in row.values() or any(name not in row for name in _COLUMNS):
            got = ", ".join(str(name) for name, value in row.items() if value is not None)
            raise ValueError(f"expected the columns {', '.join(_COLUMNS)} in {path.name}, got {got}")
    return [{name: float(value) for name, value in row.items()} for row in rows]


__getattr__ = old_names("sightline.runs", load="load_model")
