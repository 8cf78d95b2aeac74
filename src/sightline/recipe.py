"""What to train on what, and how: frozen dataclasses; YAML is only their file form. Imports no torch."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml


@dataclass(frozen=True, kw_only=True)
class Data:
    """Which images, which columns, which splits."""

    source: str = "clutter"
    """A name from `sightline list datasets`, a folder of class folders, a table (labels.csv, or a folder with a
    metadata.csv), a parquet file or folder, or hub:OWNER/NAME."""
    image: str | None = None
    """Column with the image. None: the column whose type is an image (tables: `image` or `file_name`)."""
    label: str | None = None
    """Column with the class. None: `label`, or the only class-label column (tables without one: the class folder)."""
    mask: str | None = None
    """Column with the mask of the evidence. None: `mask` where there is one (clutter-shortcut: `digit` or `patch`)."""
    box: str | None = None
    """Column with one box or several. None: `bbox` if there is one."""
    boxes: Literal["xyxy", "xywh", "relative", "relative_xywh", "cxcywh"] | None = None
    """How a box is written: `xyxy` [x0, y0, x1, y1] or `xywh` [x, y, width, height] in pixels of the stored image;
    `relative`, `relative_xywh` the same as shares of its sides; `cxcywh` (YOLO) [center x, center y, width, height] as
    shares. None: xyxy, refused where the boxes look like another form."""
    mask_values: tuple[int, ...] | None = None
    """Values of a mask that count as the object, such as 1 or 8,9 or 128-255. None: all but 0."""
    group: str | None = None
    """Column that names the patient, slide or bird: no group is split between train and test. None: no groups
    (tables: `group` if there is one)."""
    size: int | None = None
    """Side of the square that the model sees, in pixels. None: the source's own (clutter 40, cifar 32, folder 128)."""
    resplit: bool = False
    """Merge the splits that the source brings and split anew (by group where a group column is named)."""
    val: float = 0.1
    """Share of the training images kept for validation where the source has no such split."""
    test: float = 0.2
    """Share of the images kept for testing where the source has no such split."""
    train_size: int | None = None
    """Use only so many training images, drawn by seed and stratified by class. None: all."""
    test_size: int | None = None
    """Use only so many test images, drawn by seed and stratified by class. None: all."""
    seed: int = 0
    """Seed of the splits, of the draws and of the composed images."""
    shortcut: float = 0.9
    """clutter-shortcut only: share of training images in which the color of the patch gives the class away."""
    streaming: bool = False
    """Read training images one after the other instead of holding or caching them; for sets larger than the disk."""
    strict: bool = False
    """Stop at the first image that cannot be read instead of listing and skipping it."""
    max_pixels: int = 89_478_485
    """Skip images of more pixels to decode, so that memory stays bounded; large JPEGs are decoded reduced."""
    drop_duplicates: bool = False
    """Leave out test and validation images that are copies of training images, and copies with different labels."""


@dataclass(frozen=True, kw_only=True)
class Augment:
    """Random changes of a training image; masks and boxes follow the image."""

    crop: int = 0
    """Pad by so many pixels and crop back at a random place. 0: no crop."""
    flip: bool | None = None
    """Mirror left and right half of the time. None: yes, except for digits."""
    scale: float = 1.0
    """Smallest share of the image's area in a random resized crop. 1: no such crop."""
    rotate: bool = False
    """Turn by a random multiple of 90 degrees and mirror vertically: for tissue and other views from above."""
    color: float = 0.0
    """Strength of random brightness, contrast and saturation, 0 to 1."""
    cutout: int = 0
    """Side of a square, in pixels, at a random place, that is filled with the mean color. 0: none."""
    mixup: float = 0.0
    """Blend each image of a batch and its label with another one, by a share from Beta(mixup, mixup); 0: no blend."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """Which network."""

    name: str = "vgg_att2"
    """A name from `sightline list models`, or any timm model."""
    options: dict[str, Any] = field(default_factory=lambda: {})
    """Keyword arguments of the model, for example `{width: 0.25, stem_pool: 2}`."""
    weights: str | None = None
    """A safetensors file or run folder to start from, or `pretrained` (timm's, downloaded). None: fresh weights."""


@dataclass(frozen=True, kw_only=True)
class Optim:
    """How the weights are found."""

    epochs: int = 20
    """Passes over the training images."""
    batch_size: int = 32
    """Images per step, of all processes together; the last incomplete batch of a pass is left out."""
    optimizer: Literal["sgd", "adamw"] = "adamw"
    """SGD with momentum, or AdamW."""
    lr: float = 0.003
    """Highest learning rate."""
    momentum: float = 0.9
    """Momentum of SGD."""
    nesterov: bool = True
    """Nesterov's form of the momentum."""
    weight_decay: float = 0.05
    """Weight decay; not applied to biases and normalization layers."""
    schedule: Literal["one_cycle", "cosine", "step", "constant"] = "one_cycle"
    """Course of the learning rate over the whole training."""
    warmup: float = 0.0
    """Epochs of linear warm-up before cosine, step and constant; one_cycle has its own."""
    step_epochs: int = 25
    """step: epochs between two reductions."""
    step_factor: float = 0.5
    """step: factor of each reduction."""
    label_smoothing: float = 0.0
    """Share of the target spread over all classes."""
    class_weights: bool = False
    """Weigh each class by the inverse of its frequency, for unbalanced data."""
    clip_norm: float | None = None
    """Largest norm of the gradient. None: not clipped."""
    ema: float | None = None
    """Decay of an exponential moving average of the weights, which is then validated and saved. None: no average."""
    patience: int | None = None
    """Stop after so many epochs without a better validation accuracy; the best weights stay. None: train to the end."""
    teacher: str | None = None
    """Run folder of a trained network whose answers this one learns too (distillation). None: labels alone."""
    temperature: float = 4.0
    """teacher: its logits are divided by this before they become probabilities; higher shows more of the small ones."""
    alpha: float = 0.6
    """teacher: share of the labels in the loss; the teacher has the rest."""
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    """Arithmetic of the training step."""
    compile: bool = False
    """Compile the network (torch.compile): pays on a GPU in a training of minutes. Needs a C++ compiler."""
    micro_batches: int = 1
    """Parts in which a batch goes through the network, to save memory; BatchNorm sees parts. 0: as many as it takes."""
    sharded: bool = False
    """Several processes: spread weights, gradients and moments over them (FSDP), for networks too large for one."""
    sync_batch_norm: bool = False
    """Several processes with a GPU each: BatchNorm over the batch of all of them."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training: data, model, optimization, seeds."""

    data: Data = field(default_factory=Data)
    augment: Augment = field(default_factory=Augment)
    model: Model = field(default_factory=Model)
    optim: Optim = field(default_factory=Optim)
    seeds: tuple[int, ...] = (0,)
    """Seeds of weights, order and augmentation; several seeds give one run each."""


_SECTIONS = {"data": Data, "augment": Augment, "model": Model, "optim": Optim}
_KINDS: dict[str, Any] = {
    f"{section}.{name}": kind for section, cls in _SECTIONS.items() for name, kind in get_type_hints(cls).items()
} | {"seeds": tuple[int, ...]}

_Limit = tuple[str, Callable[[Any], bool]]
_COUNT: _Limit = ("1 or more", lambda x: x >= 1)
_POSITIVE: _Limit = ("a finite number above 0", lambda x: 0 < x < float("inf"))
_NOT_NEGATIVE: _Limit = ("0 or more", lambda x: 0 <= x < float("inf"))
_SHARE: _Limit = ("between 0 and 1", lambda x: 0 <= x <= 1)
_PART: _Limit = ("0 or more and below 1", lambda x: 0 <= x < 1)
_LIMITS: dict[str, _Limit] = {
    "data.size": _COUNT,
    "data.val": _PART,
    "data.test": _PART,
    "data.train_size": _COUNT,
    "data.test_size": _COUNT,
    "data.seed": ("a whole number from 0 to 2**32 - 1", lambda x: 0 <= x < 2**32),
    "data.shortcut": _SHARE,
    "data.max_pixels": ("1 to 178,956,970", lambda x: 1 <= x <= 178_956_970),
    "data.mask_values": ("one whole number of 0 or more, or several", lambda x: len(x) > 0 and min(x) >= 0),
    "augment.crop": _NOT_NEGATIVE,
    "augment.scale": ("above 0 and at most 1", lambda x: 0 < x <= 1),
    "augment.color": _SHARE,
    "augment.cutout": _NOT_NEGATIVE,
    "augment.mixup": _NOT_NEGATIVE,
    "optim.epochs": _COUNT,
    "optim.batch_size": _COUNT,
    "optim.micro_batches": _NOT_NEGATIVE,
    "optim.lr": _POSITIVE,
    "optim.momentum": _PART,
    "optim.weight_decay": _NOT_NEGATIVE,
    "optim.warmup": _NOT_NEGATIVE,
    "optim.step_epochs": _COUNT,
    "optim.step_factor": _POSITIVE,
    "optim.label_smoothing": _PART,
    "optim.clip_norm": _POSITIVE,
    "optim.ema": _PART,
    "optim.patience": _COUNT,
    "optim.temperature": _POSITIVE,
    "optim.alpha": _SHARE,
    "seeds": (
        "different whole numbers from 0 to 2**32 - 1",
        lambda x: len(x) > 0 and len(set(x)) == len(x) and min(x) >= 0 and max(x) < 2**32,
    ),
}


def load(source: Path | str | Recipe | Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe from YAML (or take one as it is), change single fields, and check every field.

    Args:
        source: a YAML file, in which any field may be left out, what such a file holds, or a Recipe.
        overrides: dotted field -> value, as in `{"optim.epochs": 3}`. Text (of a command line) is read as YAML where
            the field is not text itself; `null` is None.

    Raises:
        OSError: there is no such file.
        TypeError: a value of the wrong type.
        ValueError: an unknown field, a value out of its range, or a file that is not YAML.

    >>> load(Recipe(), {"model.options.width": 0.25, "seeds": "0,1"}).seeds
    (0, 1)
    >>> load(Recipe(), {"optim.epoch": 3})
    Traceback (most recent call last):
    ValueError: optim.epoch: no such field in a recipe; did you mean optim.epochs?
    """
    if isinstance(source, Recipe):
        source = asdict(source)
    values = _flat(source if isinstance(source, Mapping) else read(Path(source)))
    for name, value in (overrides or {}).items():
        if name.startswith("model.options."):
            option = {name.removeprefix("model.options."): yaml.safe_load(value) if isinstance(value, str) else value}
            values["model.options"] = {**(values.get("model.options") or {}), **option}
        else:
            values[name] = None if value == "null" else value
    checked = {name: _check(name, value) for name, value in values.items()}

    def part(section: str) -> dict[str, Any]:
        return {name.partition(".")[2]: value for name, value in checked.items() if name.startswith(f"{section}.")}

    return Recipe(
        data=Data(**part("data")),
        augment=Augment(**part("augment")),
        model=Model(**part("model")),
        optim=Optim(**part("optim")),
        seeds=checked.get("seeds", Recipe.seeds),
    )


def dump(recipe: Recipe) -> str:
    """Every field of a recipe as YAML; `load` reads it back.

    >>> dump(Recipe(seeds=(1, 2))).splitlines()[-3:]
    ['seeds:', '- 1', '- 2']
    """
    return yaml.safe_dump(asdict(recipe), sort_keys=False, width=120)


def read(path: Path) -> Any:
    """What a YAML file holds.

    Raises:
        OSError: there is no such file.
        ValueError: it is not YAML.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; expected a recipe, which is a YAML file")
    if not path.exists():
        nearby = [str(p) for folder in dict.fromkeys((path.parent, Path("recipes"))) for p in folder.glob("*.y*ml")]
        close = get_close_matches(path.stem, [Path(p).stem for p in nearby], 1)
        hint = next((f"; did you mean {p}?" for p in nearby if close and Path(p).stem == close[0]), "")
        raise FileNotFoundError(f"recipe {path} not found{hint or '; expected a YAML file'}")
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error


def _flat(fields: Any) -> dict[str, Any]:
    if not isinstance(fields, Mapping):
        raise TypeError(f"expected a recipe with the parts {', '.join(_SECTIONS)}, seeds; got {fields!r}")
    values: dict[str, Any] = {}
    for key, value in fields.items():
        if key in _SECTIONS and isinstance(value, dict | NoneType):
            values |= {f"{key}.{name}": inner for name, inner in (value or {}).items()}
        else:
            values[str(key)] = value
    return values


def _check(name: str, value: Any) -> Any:
    if name in _SECTIONS:
        raise TypeError(f"{name}: expected fields, got {value!r}; write them indented below `{name}:`")
    if name not in _KINDS:
        ends = {known.rpartition(".")[2]: known for known in _KINDS}
        close = get_close_matches(name.rpartition(".")[2], ends, 1)
        section = [known for known in _KINDS if known.startswith(name.partition(".")[0] + ".")]
        known = ", ".join(section or (*_SECTIONS, "seeds"))
        hint = f"did you mean {ends[close[0]]}?" if close else f"expected one of {known}"
        raise ValueError(f"{name}: no such field in a recipe; {hint}")
    try:
        found = _convert(value, _KINDS[name])
    except (TypeError, ValueError, yaml.YAMLError) as error:
        expected, *choices = _words(_KINDS[name])
        close = get_close_matches(str(value), choices, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise TypeError(f"{name}: expected {expected}, got {value!r}{hint}") from error
    words, allowed = _LIMITS.get(name, ("", lambda x: True))
    if found is not None and not allowed(found):
        raise ValueError(f"{name}: expected {words}, got {value!r}")
    return found


def _convert(value: Any, kind: Any) -> Any:
    """The value as the type `kind`; an error where that would be a guess."""
    origin = get_origin(kind)
    if origin in (Union, UnionType):
        return None if value is None else _convert(value, get_args(kind)[0])
    if isinstance(value, str) and origin is tuple:
        value = value.strip("[] ").split(",")
    if isinstance(value, str) and (kind in (int, bool) or origin is dict):
        value = yaml.safe_load(value)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(number for item in value for number in _numbers(item))
    if origin is dict and isinstance(value, dict):
        return yaml.safe_load(yaml.safe_dump(value))  # a recipe is data: an object that YAML cannot hold is refused
    if origin is Literal and value in get_args(kind):
        return value
    if kind is float and type(value) in (int, float, str):
        return float(value)  # YAML 1.1 reads 1e-4 as text
    if type(value) is kind:
        return value
    raise TypeError(kind)


def _numbers(item: Any) -> Iterable[int]:
    """One whole number, or those of a range in text.

    >>> [*_numbers("128-130"), *_numbers(7)]
    [128, 129, 130, 7]
    """
    if isinstance(item, str) and (ends := re.fullmatch(r" *(\d+) *- *(\d+) *", item)):
        first, last = int(ends[1]), int(ends[2])
        if not first <= last <= first + 65535:
            raise ValueError(item)
        return range(first, last + 1)
    return (_convert(item, int),)


def _words(kind: Any) -> tuple[str, ...]:
    """What a field expects, in plain words, then the choices where there are some."""
    if get_origin(kind) in (Union, UnionType):
        words, *choices = _words(get_args(kind)[0])
        return (f"{words} or null", *choices)
    if get_origin(kind) is Literal:
        return (f"one of {', '.join(get_args(kind))}", *get_args(kind))
    words = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
    plural = {tuple: "a list of whole numbers such as [0, 1, 2]", dict: "names with plain values such as {width: 0.25}"}
    return (words.get(kind) or plural[get_origin(kind)],)
