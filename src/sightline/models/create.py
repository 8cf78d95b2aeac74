"""`create_model`: a network by name, from here, timm or torchvision."""

import inspect
import warnings
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin

from torch import nn

from sightline.attention.insertion import MARK, Block, insert
from sightline.data.tables import read_class_names
from sightline.facts import current_name, did_you_mean, notice
from sightline.inference import imagenet_classes, preprocess_of
from sightline.models.fcan import FCAN
from sightline.models.mg_cnn import MGCNN
from sightline.models.neck import add_neck
from sightline.models.preact import PreActResNet, RNAtt, RNAtt2
from sightline.models.pretrained import OtherClasses, load_weights, mismatches, named_as, other_classes
from sightline.models.protopnet import ProtoPNet
from sightline.models.resnet import CifarResNet, MtlResNet, keep_resolution
from sightline.models.transformed import add_transformer
from sightline.models.vgg import VGG, VGG15, VGGAtt, VGGAtt2, VGGAtt3, VGGGap, VGGPan
from sightline.models.vit import TinyViT
from sightline.models.weights import read_weights

MODELS: dict[str, Callable[..., nn.Module]] = {
    "vgg": VGG,
    "vgg_gap": VGGGap,
    "vgg_pan": VGGPan,
    "vgg15": VGG15,
    "vgg_att": VGGAtt,
    "vgg_att2": VGGAtt2,
    "vgg_att3": VGGAtt3,
    "rn164": PreActResNet,
    "rn_att": RNAtt,
    "rn_att2": RNAtt2,
    "cifar_resnet": CifarResNet,
    "mtl_resnet": MtlResNet,
    "tiny_vit": TinyViT,
    "protopnet": ProtoPNet,
    "fcan": FCAN,
    "mg_cnn": MGCNN,
}


def create_model(
    name: str,
    *,
    num_classes: int | None = None,
    weights: str | Path | None = None,
    new_head: bool = True,
    attention: Block | None = None,
    attention_options: dict[str, Any] | None = None,
    high_resolution: int = 0,
    neck: dict[str, float] | None = None,
    spatial_transformer: dict[str, Any] | None = None,
    **options: Any,
) -> nn.Module:
    """Build a network by name, with fresh weights or those of a file, and optionally with attention blocks.

    Blocks go where `sightline.attention.insertion.insert` puts them by default. With fresh weights they start as in
    their papers. With weights of a network without blocks, pretrained ones for example, they start as the identity, so
    the logits stay those of the weights. The weights may come from another image resolution.

    Args:
        name: a key of `MODELS`, a timm model, or "torchvision:" and a torchvision classifier.
        num_classes: number of logits. None: 10 for a key of `MODELS`, the model's default (mostly 1000) otherwise.
        weights: a file in safetensors or as torch.save writes it (a state dict, or a checkpoint that holds one), a run
            folder, or "pretrained" for timm's own weights, which are downloaded. No code in a file is run. Prefixes of
            wrappers are taken off, and weights with other names are matched by their order where that is safe; each
            such decision is told as a warning, a `sightline.facts.Notice`.
        new_head: what to do with weights of another number of classes than `num_classes`: keep the model's fresh head
            and tell so, or refuse them.
        attention: a key of `sightline.attention.ATTENTION`, or a callable that makes a block for a number of channels.
        attention_options: keyword arguments of the block; with `at`, the layers to insert at.
        high_resolution: number of last stages of a ResNet whose stride becomes 1; 2 at 448 px: 56 x 56 positions
            instead of 14 x 14.
        neck: options of a `BNNeck` that replaces the last linear layer, for re-identification: `{}`, or
            `{"triplet": 1.0}` with a triplet loss. None: none.
        spatial_transformer: options of a `SpatialTransformer` in front of the network, `{}` for its defaults; see
            `add_transformer`. None: none.
        options: keyword arguments of the network, for example `width=0.25`.

    Raises:
        ValueError: unknown name or option, weights of another network, or no ResNet for `high_resolution`.
        OSError: weights that cannot be read or downloaded.

    >>> sum(p.numel() for p in create_model("vgg_att2", num_classes=10).parameters())
    19720780
    """
    if weights is not None and not isinstance(weights, str | Path):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"expected weights as a file, a run folder or 'pretrained', got {type(weights).__name__}; build the model "
            "without weights= and call its load_state_dict"
        )
    if num_classes is not None and num_classes < 1:
        raise ValueError(f"expected num_classes of 1 or more, got {num_classes}")
    if not isinstance(neck, dict | None):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"expected neck as options such as {{}} or {{triplet: 1.0}}, got {neck!r}; leave it out for none"
        )
    if not isinstance(spatial_transformer, dict | None):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"expected spatial_transformer as options such as {{}} or {{hidden: 16}}, got {spatial_transformer!r}; "
            "leave it out for none"
        )
    if attention_options and attention is None:
        raise ValueError(f"expected attention to go with attention_options {attention_options}, got none; name a block")
    options = {current_name(option): value for option, value in options.items()}
    if num_classes is not None:
        options = {"num_classes": num_classes, **options}
    model = _built(name, weights, options)
    if high_resolution:
        keep_resolution(model, high_resolution)
    new_classes = num_classes if new_head else None
    file = None if weights is None or weights == "pretrained" else Path(weights)
    read = None if file is None else named_as(model, read_weights(file))
    state = {} if read is None else read.state
    notices = _head_of_download(name, model, num_classes, new_head) if weights == "pretrained" else ()
    # weights without blocks are loaded first; blocks that start as the identity then keep their logits
    counts = other_classes(model.state_dict(), state)
    is_plain = not mismatches(model, state) or (counts is not None and counts[0] == new_classes)
    blocks_last = weights == "pretrained" or (read is not None and is_plain)

    def add_blocks(init: Literal["identity", "fresh"]) -> nn.Module:
        return model if attention is None else insert(model, attention, init=init, inplace=True, **block_options)

    block_options = attention_options or {}
    if not blocks_last:
        model = add_blocks("identity" if any(key.endswith(f".{MARK}") for key in state) else "fresh")
    if neck is not None and not blocks_last:
        add_neck(model, **neck)
    if spatial_transformer is not None and not blocks_last:
        add_transformer(model, **spatial_transformer)
    if read is not None and file is not None:
        notices = load_weights(model, name, read, file, new_classes)
    model = add_blocks("identity") if blocks_last else model
    if neck is not None and blocks_last:
        add_neck(model, **neck)
    if spatial_transformer is not None and blocks_last:
        add_transformer(model, **spatial_transformer)
    if spatial_transformer is not None:
        tell_of_window()
    for text in notices:
        notice(text)
    return model


@cache
def tell_of_window() -> None:
    """Tell, once per process, what maps of a network behind a spatial transformer show."""
    notice(
        "maps of layers show the window that the spatial transformer cuts out, not the image; attention shows "
        "where it lies, and saliency, occlusion and other methods on the pixels show the image"
    )


def named_model(
    name: str, weights: str | Path | None, classes: str | Path | None = None
) -> tuple[nn.Module, list[str]]:
    """A network by name with the weights of a file, and its class names from a text file with one per line.

    Without such a file, the 1,000 classes of a timm or torchvision network get ImageNet's names.

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
        model = create_model(name, num_classes=len(names) or None, weights=weights, new_head=False).eval()
    except OtherClasses as error:
        advice = f"{classes} names {len(names)} classes" if names else "name its classes by --classes FILE"
        raise ValueError(f"{error}; {advice}") from error
    if not names and name not in MODELS and getattr(model, "num_classes", 1000) == 1000:
        names = [*imagenet_classes()]
        notice("1,000 classes without names are taken for those of ImageNet; name yours by --classes FILE")
    return model, names


def input_of(
    model: nn.Module,
) -> tuple[tuple[int, int], tuple[float, float, float], tuple[float, float, float]]:
    """Size (height, width), mean and std of the images that a model was trained on, see `preprocess_of`.

    >>> input_of(nn.Identity())[0]
    (224, 224)
    """
    preprocess = preprocess_of(model)
    return preprocess.size, preprocess.mean, preprocess.std


def _head_of_download(name: str, model: nn.Module, num_classes: int | None, new_head: bool) -> tuple[str, ...]:
    theirs = getattr(model, "pretrained_cfg", {}).get("num_classes")
    if num_classes in (None, theirs):
        return ()
    if not new_head:
        raise OtherClasses(f"the downloaded weights of {name} are those of {theirs} classes, not {num_classes}")
    return (f"weights: the head starts fresh: the downloaded one is of {theirs} classes, not {num_classes}",)


def _built(name: str, weights: str | Path | None, options: dict[str, Any]) -> nn.Module:
    pretrained = weights == "pretrained"
    if name not in MODELS and not name.startswith("torchvision:"):
        return _timm(name, pretrained, options)
    if pretrained:
        raise ValueError(
            f"{name!r} has no pretrained weights, only timm models have; give a file of weights or a run folder"
        )
    if name not in MODELS:
        return _torchvision(name, options, weights)
    options = _checked(name, options)
    if weights is not None and "pretrained" in options:
        options["pretrained"] = False  # the file's weights replace the download
    return _call(f"cannot build {name!r}", MODELS[name], options)


def _checked(name: str, options: dict[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(MODELS[name]).parameters
    choices = [parameter for parameter in parameters if parameter != "num_classes"]
    checked: dict[str, Any] = {}
    for option, value in options.items():
        if option not in parameters:
            hint = did_you_mean(option, choices, n=3)
            raise ValueError(f"{name} has no option {option!r}{hint}; it has: {', '.join(choices)}")
        annotation = parameters[option].annotation
        if annotation is float and type(value) is int:
            value = float(value)
        literal = get_origin(annotation) is Literal
        kinds = get_args(annotation) if literal or get_origin(annotation) is UnionType else (annotation,)
        if value not in kinds if literal else type(value) not in [get_origin(kind) or kind for kind in kinds]:
            expected = " or ".join(repr(kind) if literal else (get_origin(kind) or kind).__name__ for kind in kinds)
            raise ValueError(f"option {option} of {name}: expected {expected}, got {value!r}")
        checked[option] = value
    return checked


def _timm(name: str, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    import timm

    if not timm.is_model(name):
        hint = did_you_mean(name, [*MODELS, *timm.list_models()], n=3)
        raise ValueError(f"unknown model {name!r}{hint}; see `sightline list models`")
    try:
        build = partial(timm.create_model, name, pretrained=pretrained)
        return _call(f"timm cannot build {name!r}", build, options)
    except OSError as error:
        raise OSError(f"cannot download the weights of {name!r}; check the connection or give a file") from error


def _torchvision(name: str, options: dict[str, Any], weights: str | Path | None) -> nn.Module:
    """A network with the configuration of its weights, in timm's form; of several, of those with this file's name."""
    import torchvision

    names = [f"torchvision:{model}" for model in torchvision.models.list_models(torchvision.models)]
    if name not in names:
        hint = did_you_mean(name, names, n=3)
        raise ValueError(f"unknown model {name!r}{hint}; see `torchvision.models.list_models()`")
    bare = name.removeprefix("torchvision:")
    build = partial(torchvision.models.get_model, bare)
    model = _call(f"torchvision cannot build {name!r}", build, {"weights": None, **options})
    known = torchvision.models.get_model_weights(bare)
    chosen = next((one for one in known if Path(one.url).name == Path(weights or "").name), known["DEFAULT"])
    transform = chosen.transforms()
    side = transform.crop_size[0]
    config: Any = {
        "input_size": (3, side, side),
        "mean": tuple(transform.mean),
        "std": tuple(transform.std),
        "interpolation": transform.interpolation.value,
        "crop_pct": side / transform.resize_size[0],
        "num_classes": len(chosen.meta["categories"]),
    }
    model.pretrained_cfg = config
    return model


def _call(failure: str, build: Callable[..., nn.Module], options: dict[str, Any]) -> nn.Module:
    """Call a constructor; whatever it raises becomes one line."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Initializing zero-element tensors")  # an error follows
            return build(**options)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # options are arbitrary: a string in place of a layer class, a patch size of 0
        reason = " ".join(str(error).split()) or type(error).__name__
        classes = [name for name, value in options.items() if name.endswith(("_layer", "block")) and value is not None]
        hint = f"; leave out {classes[0]}, which takes a class, not {options[classes[0]]!r}" if classes else ""
        raise ValueError(f"{failure}: {reason}{hint}") from error
