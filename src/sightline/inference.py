"""Calls anybody's model without leaving a trace."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


def check_images(images: object) -> None:
    """Say what is wrong with images before PyTorch does.

    Raises:
        TypeError: no tensor.
        ValueError: not floating-point, another shape than (b, c, h, w), or empty.

    >>> check_images(torch.zeros(1, 3, 8, 8))
    """
    if not isinstance(images, Tensor):
        raise TypeError(
            f"expected a tensor of images (b, c, h, w), got {type(images).__name__}; see sightline.data.read_images"
        )
    if images.ndim != 4 or not images.is_floating_point() or not images.numel():
        raise ValueError(
            f"expected float images of shape (b, c, h, w), normalised as the model wants them, got {images.dtype} of "
            f"shape {tuple(images.shape)}; for one image pass images[None]"
        )


@contextmanager
def untouched(model: nn.Module) -> Generator[nn.Module]:
    """Run a model in eval mode, then put every module's own train/eval flag and the global random state back.

    Also after an exception. A wrapper of `torch.compile` is looked through, so that hooks fire.

    Raises:
        TypeError: the model is no module.

    >>> model = nn.Sequential(nn.Dropout(), nn.BatchNorm2d(3).eval())
    >>> with untouched(model) as m:
    ...     m[0].training
    False
    >>> model[0].training, model[1].training
    (True, False)
    """
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}; pass the model itself")
    flags = [(module, module.training) for module in model.modules()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted({d.index or 0 for d in devices})):
        try:
            model.eval()
            yield model
        finally:
            for module, training in flags:
                module.training = training


def logits_of(output: Any) -> Float[Tensor, "b n"]:
    """Find the logits in whatever a classifier returned: a tensor, a tuple, a dict, or an object with `.logits`.

    Raises:
        TypeError: nothing of shape (batch, classes) is in it.

    >>> logits_of({"logits": torch.zeros(2, 5)}).shape
    torch.Size([2, 5])
    """
    found = output
    if isinstance(found, Mapping):
        found = found.get("logits", next(iter(found.values()), None))
    found = getattr(found, "logits", found)
    if isinstance(found, tuple | list):
        found = found[0] if found else None
    if not isinstance(found, Tensor) or found.ndim != 2:
        got = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(output).__name__
        raise TypeError(f"expected logits of shape (batch, classes) from the model, got {got}; wrap it so that it does")
    return found


def run(model: nn.Module, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n"]:
    """Logits, one row per image.

    Raises:
        RuntimeError: the model cannot take the images (their size, channels, type or device).
        ValueError: it returns more or fewer rows than images.
        TypeError: the model returns no logits.

    >>> run(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), torch.zeros(3, 3, 2, 2)).shape
    torch.Size([3, 2])
    """
    try:
        logits = logits_of(model(images))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        shape = " x ".join(map(str, images.shape))
        raise RuntimeError(
            f"expected images that {type(model).__name__} can take, got {shape}, {images.dtype} on {images.device}: "
            f"{str(error).strip().splitlines()[0]}"
        ) from error
    if len(logits) != len(images):
        raise ValueError(
            f"expected one row of logits per image, got {len(logits)} for {len(images)} images; wrap the model"
        )
    return logits


def forward(model: nn.Module, images: Float[Tensor, "b c h w"], batch_size: int = 64) -> Float[Tensor, "b n"]:
    """Logits of all images in float32, in eval mode, without gradient, at most `batch_size` images at a time.

    >>> forward(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), torch.zeros(3, 3, 2, 2), batch_size=2).shape
    torch.Size([3, 2])
    """
    with untouched(model) as m, torch.inference_mode(False), torch.no_grad():
        return torch.cat([run(m, chunk).float() for chunk in images.split(batch_size)])
