"""Networks by name: plain modules, normalized images in, logits out."""

import inspect
import json
import warnings
import zipfile
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from torch import Tensor, nn

from sightline import recipe
from sightline.attention.insertion import MARK, Block, closest, insert
from sightline.data.tables import read_class_names
from sightline.facts import old_names
from sightline.models.protopnet import ProtoPNet
from sightline.models.resnet import CifarResNet, keep_resolution
from sightline.models.vgg import VGG, VGG15, VGGAtt, VGGAtt2, VGGAtt3, VGGGap, VGGPan
from sightline.models.vit import TinyViT

__all__ = ["MODELS", "create_model", "input_of", "named_model"]

MODELS: dict[str, Callable[..., nn.Module]] = {
    "vgg": VGG,
    "vgg_gap": VGGGap,
    "vgg_pan": VGGPan,
    "vgg15": VGG15,
    "vgg_att": VGGAtt,
    "vgg_att2": VGGAtt2,
    "vgg_att3": VGGAtt3,
    "cifar_resnet": CifarResNet,
    "tiny_vit": TinyViT,
    "protopnet": ProtoPNet,
}


def create_model(
    name: str,
    *,
    num_classes: int | None = None,
    weights: str | Path | None = None,
    attention: Block | None = None,
    attention_options: dict[str, Any] | None = None,
    high_resolution: int = 0,
    **options: Any,
) -> nn.Module:
    """Build a network by name, with fresh weights or those of a file, and attention if wanted.

    Blocks go where `sightline.attention.insertion.insert` puts them by itself. With fresh weights they start as in
    their papers; beside weights that know no blocks, pretrained ones for example, they start as the identity, so that
    the logits are those of the weights. Weights of another resolution fit.

    Args:
        name: a key of `MODELS`, a timm model, or "torchvision:" and a torchvision classifier.
        num_classes: number of logits. None: 10 for a key of `MODELS`, the model's own (mostly 1000) otherwise.
        weights: a safetensors file, a run folder, or "pretrained" for timm's own weights, which are downloaded.
        attention: a key of `sightline.attention.ATTENTION`, or a callable that makes a block for a number of channels.
        attention_options: keyword arguments of the block; with `at`, the layers to insert at.
        high_resolution: number of last stages of a ResNet whose stride becomes 1; 2 at 448 px: 56 x 56 positions
            instead of 14 x 14.
        options: keyword arguments of the network, for example `width=0.25`.

    Raises:
        ValueError: unknown name or option, weights of another network, or no ResNet for `high_resolution`.
        OSError: weights that cannot be read or downloaded.

    >>> sum(p.numel() for p in create_model("vgg_att2", num_classes=10).parameters())
    19720780
    """
    if num_classes is not None and num_classes < 1:
        raise ValueError(f"expected num_classes of 1 or more, got {num_classes}")
    classes = {} if num_classes is None else {"num_classes": num_classes}
    pretrained = weights == "pretrained"
    if name not in MODELS and not name.startswith("torchvision:"):
        model = _timm(name, pretrained, {**classes, **options})
    elif pretrained:
        raise ValueError(
            f"{name!r} has no pretrained weights, only timm models have; give a safetensors file or run folder"
        )
    elif name in MODELS:
        checked = _checked(name, options)
        if weights is not None and "pretrained" in checked:
            checked["pretrained"] = False  # a file's weights replace what would be downloaded
        model = _built(f"cannot build {name!r}", MODELS[name], {**classes, **checked})
    else:
        model = _torchvision(name, {**classes, **options})
    if high_resolution:
        keep_resolution(model, high_resolution)
    if attention_options and attention is None:
        raise ValueError(f"expected attention to go with attention_options {attention_options}, got none; name a block")
    found = None if weights is None or pretrained else _renamed(model, _read(Path(weights)))
    blockless = pretrained or (found is not None and not _problems(model, found))
    if attention is not None and not blockless:
        init = "identity" if any(key.endswith(f".{MARK}") for key in found or ()) else "fresh"
        model = insert(model, attention, init=init, inplace=True, **attention_options or {})
    if found is not None and weights is not None:
        _load(model, name, found, Path(weights))
    if attention is not None and blockless:
        model = insert(model, attention, init="identity", inplace=True, **attention_options or {})
    return model


def named_model(
    name: str, weights: str | Path | None, classes: str | Path | None = None
) -> tuple[nn.Module, list[str]]:
    """A network by name with the weights of a file, and its class names from a text file with one per line.

    Raises:
        OSError: there is no such file, or no such run folder if `name` is a path.
        ValueError: no weights, or they do not fit the network and its number of classes.
    """
    if Path(name).exists() or "/" in name:
        raise FileNotFoundError(f"{name}: no such run folder; expected one that `sightline train` wrote, or a model")
    if not weights:
        raise ValueError(f"expected --weights FILE for model {name!r}, got none; untrained maps mean nothing")
    names = [] if classes is None else read_class_names(Path(classes))
    try:
        return create_model(name, num_classes=len(names) or None, weights=weights).eval(), names
    except ValueError as error:
        if "num_classes" not in str(error):
            raise
        advice = f"{classes} names {len(names)} classes" if names else "name its classes by --classes FILE"
        raise ValueError(f"{error}; {advice}") from error


def input_of(
    model: nn.Module,
) -> tuple[tuple[int, int], tuple[float, float, float], tuple[float, float, float]]:
    """Size (height, width), mean and std of the images that a timm model was trained on; 224 px ImageNet for others.

    >>> input_of(nn.Identity())[0]
    (224, 224)
    """
    from timm.data.config import resolve_model_data_config

    known = resolve_model_data_config(model)
    return known["input_size"][1:], known["mean"], known["std"]


def _checked(name: str, options: dict[str, Any]) -> dict[str, Any]:
    parameters = dict(inspect.signature(MODELS[name]).parameters)
    del parameters["num_classes"]
    checked: dict[str, Any] = {}
    for option, value in options.items():
        if option not in parameters:
            raise ValueError(
                f"{name} has no option {option!r}{closest(option, parameters)}; it has: {', '.join(parameters)}"
            )
        wanted = parameters[option].annotation
        if wanted is float and type(value) is int:
            value = float(value)
        literal = get_origin(wanted) is Literal
        if value not in get_args(wanted) if literal else type(value) is not wanted:
            expected = " or ".join(map(repr, get_args(wanted))) if literal else wanted.__name__
            raise ValueError(f"option {option} of {name}: expected {expected}, got {value!r}")
        checked[option] = value
    return checked


def _timm(name: str, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    import timm

    if not timm.is_model(name):
        raise ValueError(
            f"unknown model {name!r}{closest(name, [*MODELS, *timm.list_models()])}; see `sightline list models`"
        )
    try:
        build = partial(timm.create_model, name, pretrained=pretrained)
        return _built(f"timm cannot build {name!r}", build, options)
    except OSError as error:
        raise OSError(f"cannot download the weights of {name!r}; check the connection or give a file") from error


def _torchvision(name: str, options: dict[str, Any]) -> nn.Module:
    import torchvision

    known = [f"torchvision:{known}" for known in torchvision.models.list_models(torchvision.models)]
    if name not in known:
        raise ValueError(f"unknown model {name!r}{closest(name, known)}; see `torchvision.models.list_models()`")
    options = {"name": name.removeprefix("torchvision:"), "weights": None, **options}
    return _built(f"torchvision cannot build {name!r}", torchvision.models.get_model, options)


def _built(failure: str, build: Callable[..., nn.Module], options: dict[str, Any]) -> nn.Module:
    """A network with these options, whatever fails in its constructor told in one line."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Initializing zero-element tensors")  # an error follows, in one line
            return build(**options)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # options are anybody's: a text where a layer class belongs, a patch of 0
        reason = " ".join(str(error).split()) or type(error).__name__
        classes = [name for name, value in options.items() if name.endswith(("_layer", "block")) and value is not None]
        hint = f"; leave out {classes[0]}, which takes a class, not {options[classes[0]]!r}" if classes else ""
        raise ValueError(f"{failure}: {reason}{hint}") from error


def _read(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(
            f"expected weights in {file}, found no such file; give a safetensors file or a run folder"
        )
    try:
        return load_file(file)
    except SafetensorError as error:
        raise OSError(f"expected a safetensors file, cannot read {file} ({error}); {_advice(file)}") from error


def _advice(file: Path) -> str:
    """What a file is that is no safetensors file, and what to do about it."""
    with file.open("rb") as opened:
        start = opened.read(10**7)
    text = start[:1000].lstrip().lower()
    if start.startswith(b"PK\x03\x04"):
        return _archive_advice(file)
    if start.startswith(b"\x80"):
        return _convert(file, start)
    if start.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf", b"Rar!")):
        return "it is compressed; unpack it and give the safetensors file in it"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page; download the file itself, which often has another address"
    if text.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS; fetch what it points to: git lfs pull"
    if text.startswith(b"{"):
        return "it is JSON; give the safetensors file that belongs to it, in one piece"
    if start.startswith(b"\x89HDF"):
        return "it is an HDF5 file, as Keras writes them; save the weights of the PyTorch network instead"
    return "is it complete?"


def _archive_advice(file: Path) -> str:
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
            if any("/code/" in name for name in names):
                return "it is a TorchScript archive; save the state_dict of the network it was made from instead"
            pickled = next((name for name in names if name.endswith("data.pkl")), None)
            if pickled is None:
                return "it is a zip archive; unpack it and give the safetensors file in it"
            with archive.open(pickled) as opened:
                return _convert(file, opened.read(10**7))
    # a damaged archive may raise anything
    except Exception:
        return "it is a zip archive, perhaps of torch.save, and damaged; is it complete?"


def _convert(file: Path, pickled: bytes) -> str:
    """What a pickle is, and Python that turns its weights into a safetensors file; nothing in it is run."""
    what = "a Lightning checkpoint" if b"pytorch-lightning_version" in pickled else "a pickle that torch.save wrote"
    keys = (key for key in ("state_dict", "model_state_dict", "model") if _short_text(key) in pickled)
    part = "".join(f"[{key!r}]" for key in islice(keys, 1))
    return (
        f"it is {what}; convert it once: import torch; from safetensors.torch import save_file; "
        f"w = torch.load({str(file)!r}, map_location='cpu', weights_only=True){part}; "
        f"save_file({{k: v.clone() for k, v in w.items()}}, {str(file.with_suffix('.safetensors'))!r})"
    )


def _short_text(key: str) -> bytes:
    """A string as a pickle holds it."""
    return b"X" + len(key).to_bytes(4, "little") + key.encode()


def _renamed(model: nn.Module, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights without what wrappers put in front of all names, as far as the model knows more of them then.

    DataParallel writes `module.`, torch.compile `_orig_mod.` (anywhere), a Lightning module the name of an attribute,
    an average of weights `module.` and one count more.
    """
    wanted = model.state_dict().keys()
    best, names = found, {key: key.replace("_orig_mod.", "") for key in found if key != "n_averaged"}
    while names:
        if len(wanted & set(names.values())) > len(wanted & best.keys()):
            best = {name: found[key] for key, name in names.items()}
        if len({name.partition(".")[0] for name in names.values()}) > 1:
            break
        names = {key: rest for key, name in names.items() if (rest := name.partition(".")[2])}
    return best


def _problems(model: nn.Module, found: dict[str, Tensor]) -> list[str]:
    wanted = model.state_dict()
    problems = [f"{key} is missing" for key in wanted if key not in found]
    problems += [f"{key} is unknown to the model" for key in sorted(found) if key not in wanted]
    problems += [
        f"{key} has shape {tuple(found[key].shape)} instead of {tuple(value.shape)}"
        for key, value in wanted.items()
        if key in found and found[key].shape != value.shape
    ]
    return problems


def _load(model: nn.Module, name: str, found: dict[str, Tensor], source: Path) -> None:
    problems = _problems(model, found)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ValueError(
            f"weights in {source} do not fit {name}: {problems[0]}{more}; {_remedy(model, name, found, source)}"
        )
    model.load_state_dict(found)


def _remedy(model: nn.Module, name: str, found: dict[str, Tensor], source: Path) -> str:
    """Whose the weights are, as far as they tell, and what to do."""
    wanted = model.state_dict()
    shared = [key for key in wanted if key in found]
    differing = [(wanted[key].shape, found[key].shape) for key in shared if wanted[key].shape != found[key].shape]
    if len(shared) == len(wanted) == len(found):
        sizes = {(ours[:1], theirs[:1]) for ours, theirs in differing}
        rest = all(ours[1:] == theirs[1:] for ours, theirs in differing)
        (ours, theirs), *others = sizes
        if rest and not others and ours and theirs:
            return f"give num_classes={theirs[0]}, they are those of {theirs[0]} classes, not {ours[0]}"
    written = _written_for(source)
    if written is not None and written[0] != name:
        return f"they are those of {written[0]} with {written[1]} classes; give that name, and its options"
    inner = [p for p in dict.fromkeys(k.partition(".")[0] + "." for k in found) if _fits_below(wanted, found, p)]
    if inner:
        return f"names below {inner[0]!r} fit; save these alone, without {inner[0]!r} in front"
    if 2 * len(shared) < len(wanted):
        example = f", they start with {min(found)}" if found else ""
        return (
            f"{len(shared)} of its {len(wanted)} names are there, so they belong to another network{example}; "
            "give the name of that"
        )
    return "give the num_classes and options they belong to"


def _fits_below(wanted: dict[str, Tensor], found: dict[str, Tensor], prefix: str) -> bool:
    return all(prefix + key in found for key in wanted)


def _written_for(source: Path) -> tuple[str, int] | None:
    """The network and number of classes that the files beside weights tell: a run's, or config.json of a timm model."""
    folder = source if source.is_dir() else source.parent
    try:
        if (folder / "recipe.yaml").is_file():
            facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
            return recipe.load(folder / "recipe.yaml").model.name, len(facts["classes"])
        facts = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return str(facts["architecture"]), int(facts["num_classes"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


__getattr__ = old_names("sightline.models")
