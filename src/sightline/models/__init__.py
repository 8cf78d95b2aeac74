"""Networks by name: plain modules, normalised images in, logits out."""

import inspect
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from torch import Tensor, nn

from sightline.attention.insertion import MARK, Block, closest, insert
from sightline.models.protopnet import ProtoPNet
from sightline.models.resnet import CifarResNet, keep_resolution
from sightline.models.vgg import VGG, VGG15, VGGAtt, VGGAtt2, VGGAtt3, VGGGap, VGGPan
from sightline.models.vit import TinyViT

__all__ = ["MODELS", "create_model", "input_of"]

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

    Blocks come to the paper's places, see `sightline.attention.insertion.insert`. With fresh weights they start as in
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
    found = None if weights is None or pretrained else _read(Path(weights))
    blockless = pretrained or (found is not None and not _problems(model, found))
    if attention is not None and not blockless:
        init = "identity" if any(key.endswith(f".{MARK}") for key in found or ()) else "fresh"
        model = insert(model, attention, init=init, inplace=True, **attention_options or {})
    if found is not None:
        _load(model, name, found, weights)
    if attention is not None and blockless:
        model = insert(model, attention, init="identity", inplace=True, **attention_options or {})
    return model


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
        raise OSError(f"expected a safetensors file, cannot read {file} ({error}); is it complete?") from error


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


def _load(model: nn.Module, name: str, found: dict[str, Tensor], source: str | Path | None) -> None:
    problems = _problems(model, found)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ValueError(
            f"weights in {source} do not fit {name}: {problems[0]}{more}; "
            "give the num_classes and options they belong to"
        )
    model.load_state_dict(found)
