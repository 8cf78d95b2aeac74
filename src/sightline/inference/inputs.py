"""Images of any kind as a model takes them, and what it says about them: their preparation, its classes."""

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from sightline.data import Preprocess, normalize
from sightline.data.files import Given, decode_pictures, image_files, path_of
from sightline.data.images import MAX_PIXELS, OR_RAISE
from sightline.facts import notice
from sightline.inference.outputs import check_images
from sightline.inference.preserve import unwrapped

Images = Float[Tensor, "b c *grid"] | UInt8[Tensor, "b 3 h w"] | Given | Sequence[Given]
"""Normalized images, or pictures: uint8 at the size that the model is to see, Pillow's images, or paths."""
SHOWN = 448
"""Longest side of a picture that is kept to be shown, in pixels."""


class Inputs(NamedTuple):
    """Images as a model takes them, and as they look."""

    images: Float[Tensor, "b c *grid"]
    """Normalized."""
    pixels: UInt8[Tensor, "b 3 h w"] | None = None
    """The same before that; None where they were given normalized."""
    shown: tuple[UInt8[Tensor, "3 _ _"], ...] = ()
    """The same part of each image in its own shape, to be shown; empty where they were given normalized."""
    names: tuple[str, ...] = ()
    """Names of the files; empty for tensors."""
    notices: tuple[str, ...] = ()
    """How they were prepared, where that was decided here."""


def inputs_of(model: nn.Module, images: Images, preprocess: Preprocess | None = None) -> Inputs:
    """Images as a model takes them, on its device.

    A float tensor is normalized already, and stays as it is. A uint8 tensor is only normalized. Pillow's images and
    files, and those in folders, are decoded as `sightline explain` does, and brought to the model's size: the camera's
    orientation is applied, what is transparent lies on white, and 16-bit, gray and CMYK images become 8-bit RGB.

    Args:
        model: whose input they become.
        images: a tensor (b, c, h, w), one image of Pillow or path, or a list of them.
        preprocess: how pictures become the input. None: see `preprocess_of`.

    Raises:
        FileNotFoundError: there is no such file, or a folder holds no image.
        TypeError: neither a tensor nor pictures.
        ValueError: tensors of another shape, a file that cannot be read, or `preprocess` for a float tensor.

    >>> from PIL import Image
    >>> gray = Preprocess(size=(2, 2), mean=(0.5,) * 3, std=(0.5,) * 3)
    >>> inputs_of(nn.Identity(), Image.new("L", (8, 4), 255), gray).images[0, :, 0, 0].tolist()
    [1.0, 1.0, 1.0]
    """
    if isinstance(images, Tensor) and images.dtype != torch.uint8:
        check_images(images)
        if preprocess is not None:
            raise ValueError(
                "expected no preprocess= with float images, which are normalized already; leave it out, or give uint8"
            )
        return Inputs(images)
    wanted, told = preparation(model, preprocess)
    if isinstance(images, Tensor):
        _check_pixels(images)
        return Inputs(normalized(model, images, wanted), images, tuple(images.cpu().clone()), (), told[1:])
    files, _, notices = image_files(images, strict=True)
    if not files:
        raise ValueError("expected at least one image, got an empty list; name files or folders")
    names = tuple("" if path is None else path.name for path in map(path_of, files))
    pictures = decode_pictures(files, wanted.size, SHOWN, MAX_PIXELS, wanted.crop, wanted.interpolation)
    for file, picture in zip(files, pictures, strict=True):
        if isinstance(picture, str):
            raise ValueError(f"{path_of(file) or 'an image'}: {picture.removesuffix(OR_RAISE)}")
    readable = [picture for picture in pictures if not isinstance(picture, str)]
    pixels = torch.stack([torch.from_numpy(picture.image).movedim(-1, 0) for picture in readable]).contiguous()
    shown = tuple(torch.from_numpy(picture.shown).movedim(-1, 0) for picture in readable)
    return Inputs(normalized(model, pixels, wanted), pixels, shown, names, (*notices, *told))


def preparation(model: nn.Module, preprocess: Preprocess | None) -> tuple[Preprocess, tuple[str, ...]]:
    """How files become a model's input, and notices about what was decided here: the size first, then the colors.

    >>> preparation(nn.Identity(), None)[1][0]
    'images are resized to 224 x 224 px, all of the image (bilinear); preprocess= chooses another way'
    """
    wanted = preprocess or preprocess_of(model)
    if wanted is preprocess or wanted is getattr(unwrapped(model), "preprocess", None):
        return wanted, ()
    how = f"images are {wanted}; preprocess= chooses another way"
    guess = (
        "the model does not say how its images are normalized: mean and deviation of ImageNet are assumed; preprocess= "
        "gives others"
    )
    return wanted, (how,) if _config_of(model) else (how, guess)


def normalized(model: nn.Module, pixels: UInt8[Tensor, "b 3 h w"], preprocess: Preprocess) -> Float[Tensor, "b 3 h w"]:
    """Pixels as the input of a model, on its device and in its precision."""
    weights = next((each for each in model.parameters() if each.is_floating_point()), torch.zeros(0))
    return normalize(pixels.to(weights.device), preprocess).to(weights.dtype)


def _check_pixels(images: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] != 3 or not images.numel():
        hint = "for one image pass images[None]" if images.ndim == 3 else "move the channels: images.movedim(-1, 1)"
        raise ValueError(f"expected uint8 images of shape (b, 3, h, w), got {tuple(images.shape)}; {hint}")


def preprocess_of(model: nn.Module) -> Preprocess:
    """How images become the input of a timm model, or of one that `create_model` or `load` made: as in its training.

    A model without such a configuration gets all of each image at 224 px, with the mean and deviation of ImageNet. Two
    ways of timm are not followed: images that are squashed and then cut, and images that are padded; there all of each
    image is resized, and a notice says so. A model with a `Preprocess` as its attribute `preprocess` gets that.

    For all of each image instead of the middle: `dataclasses.replace(preprocess_of(model), crop=None)`.

    >>> from timm import create_model
    >>> print(preprocess_of(create_model("tf_efficientnet_lite0")))
    scaled until the shorter side is 256 px, and the middle 224 x 224 px are cut out (crop 0.875, bicubic)
    >>> print(preprocess_of(nn.Identity()))
    resized to 224 x 224 px, all of the image (bilinear)
    """
    from timm.data.config import resolve_model_data_config

    model = unwrapped(model)
    own = getattr(model, "preprocess", None)
    if isinstance(own, Preprocess):
        return own
    config = resolve_model_data_config(model)
    size, mean, std = config["input_size"][1:], config["mean"], config["std"]
    if not _config_of(model):
        return Preprocess(size=size, mean=mean, std=std)
    mode, crop = config["crop_mode"], config["crop_pct"]
    if mode == "border" or (mode == "squash" and crop < 1):
        theirs = "pads them to its shape" if mode == "border" else f"cuts out the middle {crop:.4g} of each side"
        width, height = size[1], size[0]
        notice(
            f"images are resized to {width} x {height} px, all of each; timm {theirs}, so scores may differ a little"
        )
    crop = crop if mode == "center" else None
    return Preprocess(size=size, mean=mean, std=std, crop=crop, interpolation=config["interpolation"])


def classes_of(model: nn.Module, count: int) -> tuple[str, ...]:
    """Names of a model's classes: its attribute `classes`, or ImageNet's for a timm model of ImageNet; else none.

    >>> from timm import create_model
    >>> classes_of(create_model("tf_efficientnet_lite0"), 1000)[282], classes_of(nn.Identity(), 1000)
    ('tiger cat', ())
    """
    model = unwrapped(model)
    names = getattr(model, "classes", None)
    if isinstance(names, list | tuple) and len(names) == count and all(isinstance(name, str) for name in names):
        return tuple(names)
    return imagenet_classes() if count == 1000 == _config_of(model).get("num_classes") else ()


def _config_of(model: nn.Module) -> dict[str, Any]:
    """What timm knows about the training of its model; empty for other models."""
    config = getattr(unwrapped(model), "pretrained_cfg", None)
    return config if isinstance(config, dict) else {}


@cache
def imagenet_classes() -> tuple[str, ...]:
    """The 1,000 classes of ImageNet (ILSVRC 2012) in their usual order; a number is added where two share a name.

    >>> names = imagenet_classes()
    >>> names[281], names[134], names[517]
    ('tabby', 'crane (134)', 'crane (517)')
    """
    from timm.data.imagenet_info import ImageNetInfo

    names = [text.partition(",")[0] for text in ImageNetInfo().label_descriptions()]
    return tuple(f"{name} ({i})" if names.count(name) > 1 else name for i, name in enumerate(names))
