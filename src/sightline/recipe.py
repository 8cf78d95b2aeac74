"""What to train on what, and how: frozen dataclasses; YAML is only their file form. Imports no torch."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from sightline.facts import did_you_mean
from sightline.notebook import brief

_Value = TypeVar("_Value")


class Limit(NamedTuple):
    """What a value must be: in words, and as a test."""

    words: str
    holds: Callable[[Any], bool]


COUNT = Limit("1 or more", lambda x: x >= 1)
POSITIVE = Limit("a finite number above 0", lambda x: 0 < x < float("inf"))
NOT_NEGATIVE = Limit("0 or more", lambda x: 0 <= x < float("inf"))
FRACTION = Limit("between 0 and 1", lambda x: 0 <= x <= 1)
BELOW_ONE = Limit("0 or more and below 1", lambda x: 0 <= x < 1)
SEED = Limit("a whole number from 0 to 2**32 - 1", lambda x: 0 <= x < 2**32)
UP_TO_ONE = Limit("above 0 and at most 1", lambda x: 0 < x <= 1)
SIDES = Limit(
    "1 or more, or a height and a width such as 256,128",
    lambda x: x >= 1 if isinstance(x, int) else len(x) == 2 and min(x) >= 1,
)
PIXELS = Limit("1 to 178,956,970", lambda x: 1 <= x <= 178_956_970)
MASK_VALUES = Limit("one whole number of 0 or more, or several", lambda x: len(x) > 0 and min(x) >= 0)
FREEZE = Limit("0 or more epochs, or names of modules", lambda x: x >= 0 if isinstance(x, int) else len(x) > 0)
NAMES = Limit("one name or several", lambda x: len(x) > 0)
SEEDS = Limit(
    "different whole numbers from 0 to 2**32 - 1",
    lambda x: len(x) > 0 and len(set(x)) == len(x) and min(x) >= 0 and max(x) < 2**32,
)


def _field(default: Any, text: str, limit: Limit | None = None) -> Any:
    """A field with its help text and limit."""
    return field(default=default, metadata={"help": text, "limit": limit})


@dataclass(frozen=True, kw_only=True)
class Data:
    """Which images, which columns, which splits."""

    __repr__ = brief

    source: str = _field(
        "clutter",
        "A name from `sightline list datasets`, a folder of class folders, a table (labels.csv, or a folder with a "
        "metadata.csv), a parquet file or folder, or hub:OWNER/NAME.",
    )
    image: str | None = _field(
        None, "Column of the image. None: the only one of images (tables: `image`, `file_name`)."
    )
    label: str | None = _field(None, "Column of the class. None: `label`, or the only one of classes, or the folder.")
    mask: str | None = _field(
        None,
        "Column of the evidence mask. None: `mask` (clutter-shortcut: `digit` or `patch`; two digits: `digit`, `first` "
        "or `second`).",
    )
    box: str | None = _field(None, "Column with one box or several. None: `bbox` if there is one.")
    boxes: Literal["xyxy", "xywh", "relative", "relative_xywh", "cxcywh"] | None = _field(
        None,
        "How a box is written: `xyxy` [x0, y0, x1, y1] or `xywh` [x, y, width, height] in pixels of the stored image; "
        "`relative`, `relative_xywh` the same as fractions of its sides; `cxcywh` (YOLO) [center x, center y, width, "
        "height] as fractions. None: xyxy, refused if the boxes look like another form.",
    )
    mask_values: tuple[int, ...] | None = _field(
        None, "Mask values that count as the object, such as 1 or 8,9 or 128-255. None: all but 0.", MASK_VALUES
    )
    group: str | None = _field(
        None, "Column of patient, slide or bird: groups stay within one split. None: `group` in tables, else no groups."
    )
    classes: str | None = _field(
        None,
        "Few-shot: class lists `cifar_fs`, `fc100`, `mini_imagenet`, or a JSON file with the names of the classes of "
        "train, val and test. Training uses those of train alone. None: all classes.",
    )
    camera: str | None = _field(
        None,
        "Column of the camera; with it the classes are identities, and the test asks for images of the same identity "
        "from other cameras. None: no cameras (`clutter-person` and folders in Market-1501's layout have theirs).",
    )
    size: int | tuple[int, ...] | None = _field(
        None,
        "Side of the model's square input in pixels, or its height and width, such as 256,128. None: with "
        "model.weights the network's own, else the source's (clutter 40, cifar 32, folder 128).",
        SIDES,
    )
    resplit: bool = _field(False, "Merge the source's splits and split again (by group if a group column is named).")
    val: float = _field(0.1, "Fraction of the training images for validation if the source has none.", BELOW_ONE)
    test: float = _field(0.2, "Fraction of the images for testing if the source has none.", BELOW_ONE)
    train_size: int | None = _field(None, "Number of training images, drawn by seed, stratified. None: all.", COUNT)
    test_size: int | None = _field(None, "Number of test images, drawn by seed, stratified. None: all.", COUNT)
    seed: int = _field(0, "Seed of the splits, of the draws and of the composed images.", SEED)
    shortcut: float = _field(
        0.9, "clutter-shortcut: fraction of training images whose patch color gives the class away.", FRACTION
    )
    streaming: bool = _field(False, "Read training images in order, without cache; for sets larger than the disk.")
    strict: bool = _field(False, "Stop at the first image that cannot be read instead of listing and skipping it.")
    max_pixels: int = _field(
        89_478_485,
        "Skip images with more pixels to decode, which bounds memory; large JPEGs are decoded reduced.",
        PIXELS,
    )
    drop_duplicates: bool = _field(
        False, "Leave out test and validation images that are copies of training images, and copies with two labels."
    )

    @property
    def sides(self) -> tuple[int, int] | None:
        """Height and width of the input, if `size` says.

        >>> Data(size=32).sides, Data(size=(256, 128)).sides
        ((32, 32), (256, 128))
        """
        if self.size is None or isinstance(self.size, int):
            return None if self.size is None else (self.size, self.size)
        height, width = self.size
        return height, width


@dataclass(frozen=True, kw_only=True)
class Augment:
    """Random changes of a training image; masks and boxes follow the image."""

    __repr__ = brief

    crop: int = _field(0, "Pad by so many pixels and crop back at a random place. 0: no crop.", NOT_NEGATIVE)
    flip: bool | None = _field(None, "Mirror left and right half of the time. None: yes, except for digits.")
    scale: float = _field(1.0, "Smallest area of a random resized crop, as a fraction. 1: no such crop.", UP_TO_ONE)
    rotate: bool = _field(False, "Rotate by multiples of 90 degrees and mirror vertically: for tissue, aerial views.")
    color: float = _field(0.0, "Strength of random brightness, contrast and saturation, 0 to 1.", FRACTION)
    cutout: int = _field(0, "Side in pixels of a random square filled with the mean color. 0: none.", NOT_NEGATIVE)
    mixup: float = _field(
        0.0, "Blend pairs of images and labels, by a weight from Beta(mixup, mixup). 0: no blend.", NOT_NEGATIVE
    )


@dataclass(frozen=True, kw_only=True)
class Model:
    """Which network."""

    __repr__ = brief

    name: str = _field("vgg_att2", "A name from `sightline list models`, or any timm model.")
    options: dict[str, Any] = field(
        default_factory=dict[str, Any],
        metadata={"help": "Keyword arguments of the model, for example `{width: 0.25, stem_pool: 2}`.", "limit": None},
    )
    weights: str | None = _field(
        None,
        "Weights to start from: a safetensors or .pth file, a run folder, or `pretrained` (timm's, downloaded). For "
        "another number of classes than theirs, the head starts at zero. None: fresh.",
    )
    normalization: Literal["data", "network"] | None = _field(
        None,
        "Mean and standard deviation of the input: those of the training images, or those that the network was "
        "pretrained with. None: `network` with model.weights, else `data`.",
    )


@dataclass(frozen=True, kw_only=True)
class Optim:
    """How the weights are optimized."""

    __repr__ = brief

    epochs: int | None = _field(None, "Passes over the training images. None: 10 with model.weights, else 20.", COUNT)
    batch_size: int = _field(32, "Images per step, over all processes; an incomplete last batch is dropped.", COUNT)
    images_per_class: int | None = _field(
        None,
        "Fill each batch with so many images of each of its classes, so that a triplet loss finds pairs (usual: 4). "
        "None: images in random order.",
        COUNT,
    )
    optimizer: Literal["sgd", "adamw"] = _field("adamw", "SGD with momentum, or AdamW.")
    lr: float | None = _field(None, "Highest learning rate. None: 0.001 with model.weights, else 0.003.", POSITIVE)
    freeze: int | tuple[str, ...] | None = _field(
        None,
        "First epochs in which only the head and inserted attention are trained, or names of modules to freeze "
        "throughout, such as `conv_stem,blocks.[0-3]`. None: 1 with model.weights, else 0.",
        FREEZE,
    )
    backbone_lr: float | None = _field(
        None,
        "Factor on the learning rate of all but the head and inserted attention. None: 0.1 with model.weights, else 1.",
        POSITIVE,
    )
    fixed_statistics: bool | None = _field(
        None,
        "Keep the BatchNorm statistics of all but the head and inserted attention as they are, so that few steps train "
        "the network that is evaluated. None: true with model.weights, else false.",
    )
    layer_decay: float | None = _field(
        None,
        "Further factor on the learning rate from each block to the one before it, for timm networks. None: 0.75 for "
        "transformers with model.weights, else 1.",
        UP_TO_ONE,
    )
    momentum: float = _field(0.9, "Momentum of SGD.", BELOW_ONE)
    nesterov: bool = _field(True, "Nesterov's form of the momentum.")
    weight_decay: float = _field(0.05, "Weight decay; not applied to biases and normalization layers.", NOT_NEGATIVE)
    schedule: Literal["one_cycle", "cosine", "step", "constant"] = _field(
        "one_cycle", "Course of the learning rate over the whole training."
    )
    warmup: float = _field(0.0, "Epochs of linear warm-up; not for one_cycle, which has its own.", NOT_NEGATIVE)
    step_epochs: int = _field(25, "step: epochs between two reductions.", COUNT)
    step_factor: float = _field(0.5, "step: factor of each reduction.", POSITIVE)
    label_smoothing: float = _field(0.0, "Part of the target that is spread over all classes.", BELOW_ONE)
    class_weights: bool = _field(False, "Weight each class by the inverse of its frequency, for unbalanced data.")
    clip_norm: float | None = _field(None, "Largest norm of the gradient. None: not clipped.", POSITIVE)
    ema: float | None = _field(
        None, "Decay of a moving average of the weights, validated and saved. None: no.", BELOW_ONE
    )
    patience: int | None = _field(
        None, "Epochs without a better validation accuracy before stopping. None: all.", COUNT
    )
    teacher: str | None = _field(None, "Run folder of a network whose outputs this one learns too. None: labels alone.")
    temperature: float = _field(4.0, "teacher: divides its logits; more shows more of small probabilities.", POSITIVE)
    divergence: Literal["teacher_student", "student_teacher"] = _field(
        "teacher_student",
        "teacher: KL(teacher || student), as Hinton's, or KL(student || teacher), as the slides of BR-NPA print it.",
    )
    alpha: float = _field(0.6, "teacher: weight of the labels in the loss; the teacher has the rest.", FRACTION)
    map_loss: str | None = _field(
        None,
        "Method whose maps are trained to lie in the masks or boxes of the data: `saliency` (right for the right "
        "reasons), or a class activation map or `attention`. None: no such loss.",
    )
    map_weight: float = _field(1.0, "map_loss: its weight beside that of the labels, 1.", POSITIVE)
    map_layer: str | None = _field(
        None, "map_loss: where the map is read, or which block of attention. None: as `sightline explain` chooses."
    )
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = _field("32-true", "Arithmetic of the training step.")
    compile: bool = _field(False, "Use torch.compile: pays off on a GPU after minutes. Needs a C++ compiler.")
    micro_batches: int = _field(
        1,
        "Parts in which a batch is processed, to save memory; BatchNorm sees parts. 0: as many as needed.",
        NOT_NEGATIVE,
    )
    sharded: bool = _field(False, "Several processes: shard weights and moments (FSDP), for very large networks.")
    sync_batch_norm: bool = _field(False, "Several processes with a GPU each: BatchNorm over the batch of all of them.")


@dataclass(frozen=True, kw_only=True)
class Watch:
    """What can be watched while the network trains; it changes no weight."""

    logger: Literal["tensorboard", "wandb", "mlflow", "trackio", "csv"] | None = _field(
        None, "Where the figures of each epoch go, and the maps. None: TensorBoard if it is installed."
    )
    every: int = _field(
        0, "Draw the maps of the same images after every so many epochs, and before the first. 0: never.", NOT_NEGATIVE
    )
    images: int = _field(4, "Images that are drawn, from the validation images, else the training images.", COUNT)
    measured: int = _field(
        64, "Images on which the share of each map in its mask is measured, where the data has masks or boxes.", COUNT
    )
    methods: tuple[str, ...] = _field(("grad_cam",), "Which maps, such as `grad_cam,attention`.", NAMES)
    layer: str | None = _field(None, "Where the maps are read. None: as `sightline explain` chooses.")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training: data, model, optimization, what is watched, seeds."""

    __repr__ = brief

    data: Data = field(default_factory=Data)
    augment: Augment = field(default_factory=Augment)
    model: Model = field(default_factory=Model)
    optim: Optim = field(default_factory=Optim)
    watch: Watch = field(default_factory=Watch)
    seeds: tuple[int, ...] = _field(
        (0,), "Seeds of weights, order and augmentation; several seeds give one run each.", SEEDS
    )


FROM_SCRATCH: dict[str, Any] = {
    "model.normalization": "data",
    "optim.epochs": 20,
    "optim.lr": 0.003,
    "optim.freeze": 0,
    "optim.backbone_lr": 1.0,
    "optim.fixed_statistics": False,
    "optim.layer_decay": 1.0,
}
"""Values of the fields that depend on `model.weights`, without such weights."""
FINE_TUNING = FROM_SCRATCH | {
    "model.normalization": "network",
    "optim.epochs": 10,
    "optim.lr": 0.001,
    "optim.freeze": 1,
    "optim.backbone_lr": 0.1,
    "optim.fixed_statistics": True,
}
"""The same, with such weights."""


class Setting(NamedTuple):
    """One field of a recipe."""

    kind: Any
    """Its type."""
    limit: Limit | None
    help: str
    """One or two sentences, and the default."""


_SECTIONS: dict[str, Any] = {"data": Data, "augment": Augment, "model": Model, "optim": Optim, "watch": Watch}
PARTS = tuple(_SECTIONS)
"""The parts of a recipe that have fields."""


def _setting(section: Any, one: Field[Any]) -> Setting:
    default = "" if one.default is MISSING else f" [{one.default!r}]"
    return Setting(get_type_hints(section)[one.name], one.metadata["limit"], one.metadata["help"] + default)


SETTINGS = {
    f"{part}.{one.name}".lstrip("."): _setting(section, one)
    for part, section in [*_SECTIONS.items(), ("", Recipe)]
    for one in fields(section)
    if one.metadata
}
"""Every field of a recipe by its dotted name."""


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
    ValueError: optim.epoch: no such field in a recipe; did you mean 'optim.epochs'?
    """
    if isinstance(source, Recipe):
        source = asdict(source)
    values = _flat(source if isinstance(source, Mapping) else read(Path(source)))
    changes = dict(overrides or {})
    singly = {name: changes.pop(name) for name in [*changes] if name.startswith("model.options.")}
    values |= {name: None if value == "null" else value for name, value in changes.items()}
    for name, value in singly.items():
        option = {name.removeprefix("model.options."): yaml.safe_load(value) if isinstance(value, str) else value}
        values["model.options"] = {**(_check("model.options", values.get("model.options") or {})), **option}
    checked = {name: _check(name, value) for name, value in values.items()}

    parts = {
        part: section(
            **{name.partition(".")[2]: value for name, value in checked.items() if name.startswith(f"{part}.")}
        )
        for part, section in _SECTIONS.items()
    }
    return Recipe(**parts, seeds=checked.get("seeds", Recipe.seeds))


def filled(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """The recipe with `values` (dotted field -> value) in the fields that are None.

    >>> filled(Recipe(optim=Optim(lr=0.1)), FROM_SCRATCH).optim.lr, filled(Recipe(), FROM_SCRATCH).optim.epochs
    (0.1, 20)
    """
    for name, value in values.items():
        part, _, field_name = name.partition(".")
        section = getattr(recipe, part)
        if getattr(section, field_name) is None:
            recipe = replace(recipe, **{part: replace(section, **{field_name: value})})
    return recipe


def resolved(value: _Value | None) -> _Value:
    """A field that depends on others, of a recipe in which `filled` has filled it.

    Raises:
        ValueError: it is still None.
    """
    if value is None:
        raise ValueError("expected a recipe whose fields are filled, got one with None; pass it to `recipe.filled`")
    return value


def of_run(path: Path) -> Recipe:
    """The recipe of a run; fields that an older version did not write have the values that it trained with.

    Raises:
        OSError, TypeError, ValueError: see `load`.
    """
    return load({**FROM_SCRATCH, **_flat(read(path))})


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
        nearby = {p.stem: p for folder in (Path("recipes"), path.parent) for p in folder.glob("*.y*ml")}
        raise FileNotFoundError(
            f"recipe {path} not found{did_you_mean(path.stem, nearby, 'expected a YAML file', shown=nearby.get)}"
        )
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error


def _flat(fields: Any) -> dict[str, Any]:
    if not isinstance(fields, Mapping):
        raise TypeError(f"expected a recipe with the parts {', '.join(_SECTIONS)}, seeds; got {fields!r}")
    values: dict[str, Any] = {}
    for key, value in fields.items():
        if key in PARTS and isinstance(value, dict | NoneType):
            values |= {f"{key}.{name}": inner for name, inner in (value or {}).items()}
        else:
            values[str(key)] = value
    return values


def _check(name: str, value: Any) -> Any:
    if name in _SECTIONS:
        raise TypeError(f"{name}: expected fields, got {value!r}; write them indented below `{name}:`")
    if name not in SETTINGS:
        ends = {setting.rpartition(".")[2]: setting for setting in SETTINGS}
        siblings = [setting for setting in SETTINGS if setting.startswith(name.partition(".")[0] + ".")]
        choices = f"expected one of {', '.join(siblings or (*PARTS, 'seeds'))}"
        raise ValueError(
            f"{name}: no such field in a recipe{did_you_mean(name.rpartition('.')[2], ends, choices, shown=ends.get)}"
        )
    kind, limit, _ = SETTINGS[name]
    checked = converted(name, value, kind)
    if checked is not None and limit is not None and not limit.holds(checked):
        raise ValueError(f"{name}: expected {limit.words}, got {value!r}")
    return checked


def converted(name: str, value: Any, kind: Any) -> Any:
    """A value, perhaps as text of a command line, as the type of a field.

    Raises:
        TypeError: it is none; the message begins with `name`.

    >>> converted("ways", "5", int), converted("sets", "a,b", tuple[str, ...])
    (5, ('a', 'b'))
    """
    try:
        return _convert(value, kind)
    except (TypeError, ValueError, yaml.YAMLError) as error:
        expected, *choices = _words(kind)
        raise TypeError(f"{name}: expected {expected}, got {value!r}{did_you_mean(str(value), choices)}") from error


def _convert(value: Any, kind: Any) -> Any:
    """The value as the type `kind`; an error where that would be a guess."""
    origin = get_origin(kind)
    if origin in (Union, UnionType):
        if value is None:
            return None
        first, *others = (one for one in get_args(kind) if one is not NoneType)
        try:
            return _convert(value, first)
        except (TypeError, ValueError, yaml.YAMLError):
            if not others:
                raise
            return _convert(value, Union[tuple(others)])  # noqa: UP007
    if isinstance(value, str) and origin is tuple:
        value = value.strip("[] ").split(",")
    if isinstance(value, str) and (kind in (int, bool) or origin is dict):
        value = yaml.safe_load(value)
    if kind == tuple[str, ...] and isinstance(value, list | tuple):
        if not all(isinstance(item, str) for item in value):
            raise TypeError(kind)
        return tuple(name for item in value if (name := item.strip()))
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
        names = ", names of modules" if tuple[str, ...] in get_args(kind) else ""
        return (f"{words}{names} or null", *choices)
    if get_origin(kind) is Literal:
        return (f"one of {', '.join(get_args(kind))}", *get_args(kind))
    words = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
    plural = {tuple: "a list of whole numbers such as [0, 1, 2]", dict: "names with plain values such as {width: 0.25}"}
    return (words.get(kind) or plural[get_origin(kind)],)
