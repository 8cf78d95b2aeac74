"""A spatial transformer in front of a network."""

from typing import Any

from torch import Tensor, nn

from sightline.attention import SpatialTransformer

NAME = "spatial_transformer"


def add_transformer(model: nn.Module, **options: Any) -> nn.Module:
    """Let a spatial transformer resample the images that a network gets, in place; its layers and their names stay.

    The transformer is the child `spatial_transformer`; fresh, it hands the images on unchanged up to rounding. Maps of
    layers then show the window that it has cut out, not the image: `attention` shows where that is, and methods that
    work on the pixels, such as `saliency` and `occlusion`, show the image.

    Args:
        model: a network of images with three channels.
        options: of `sightline.attention.SpatialTransformer`.

    Raises:
        ValueError: the network has one already, or an option is wrong.

    Source: Jaderberg et al., "Spatial Transformer Networks", NeurIPS 2015; ST-CNN.

    >>> import torch
    >>> from torchvision.models import resnet18
    >>> model = resnet18().eval()
    >>> images = torch.rand(1, 3, 64, 64)
    >>> before = model(images)
    >>> bool(torch.allclose(add_transformer(model)(images), before, atol=1e-4))
    True
    """
    if hasattr(model, NAME):
        raise ValueError(f"expected a network without a spatial transformer, got {type(model).__name__} with one")
    try:
        model.add_module(NAME, SpatialTransformer(3, **options))
    except TypeError as error:
        raise ValueError(
            f"{NAME}: expected options out of size, hidden, scale_only, got {', '.join(options)}"
        ) from error
    model.register_forward_pre_hook(_through)
    return model


def _through(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return model.get_submodule(NAME)(inputs[0]), *inputs[1:]
