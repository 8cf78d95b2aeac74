"""Calls anybody's model without leaving a trace."""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves


def check_images(images: object) -> None:
    """Say what is wrong with images before PyTorch does.

    Raises:
        TypeError: no tensor.
        ValueError: not floating-point, another shape than (b, c, h, w) or (b, c, d, h, w), or empty.

    >>> check_images(torch.zeros(1, 3, 8, 8))
    """
    if not isinstance(images, Tensor):
        raise TypeError(
            f"expected a tensor of images (b, c, h, w), got {type(images).__name__}; see sightline.data.read_images"
        )
    if images.ndim not in (4, 5) or not images.is_floating_point() or not images.numel():
        raise ValueError(
            f"expected float images of shape (b, c, h, w), normalised as the model wants them, got {images.dtype} of "
            f"shape {tuple(images.shape)}; for one image pass images[None]"
        )


@contextmanager
def untouched(model: nn.Module) -> Generator[nn.Module]:
    """Run a model in eval mode, then put every module's own train/eval flag and the global random state back.

    Also after an exception. `torch.compile` (also in place), `DataParallel` and `DistributedDataParallel` are looked
    through, so that hooks fire and every image of the batch is seen.

    Raises:
        TypeError: the model is no module.

    >>> model = nn.Sequential(nn.Dropout(), nn.BatchNorm2d(3).eval())
    >>> with untouched(model) as m:
    ...     m[0].training
    False
    >>> model[0].training, model[1].training
    (True, False)
    """
    while hasattr(model, "_orig_mod") or isinstance(model, nn.DataParallel | DistributedDataParallel):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module  # pyright: ignore[reportAssignmentType]
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}; pass the model itself")
    flags = [(module, module.training) for module in model.modules()]
    in_place = [module for module in model.modules() if module.__dict__.get("_compiled_call_impl")]
    calls = [module.__dict__["_compiled_call_impl"] for module in in_place]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted({d.index or 0 for d in devices})):
        try:
            model.eval()
            for module in in_place:
                del module.__dict__["_compiled_call_impl"]  # that of the class is None
            yield model
        finally:
            for module, call in zip(in_place, calls, strict=True):
                module.__dict__["_compiled_call_impl"] = call
            for module, training in flags:
                module.training = training


_LINKS = ("softmax", "log_softmax", "sigmoid")


class _LastLink(TorchFunctionMode):
    """Remembers the last softmax or sigmoid of a forward, and what it was applied to."""

    def __init__(self) -> None:
        super().__init__()
        self.applied: tuple[Any, Any] = None, None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in _LINKS:
            self.applied = output, args[0] if args else (kwargs or {})["input"]
        return output

    def undone(self, output: Tensor) -> Tensor:
        """What the last link was applied to if the output is its result, else the output."""
        return self.applied[1] if self.applied[0] is output else output


def logits_of(output: Any) -> Float[Tensor, "b n"]:
    """Find the logits in whatever a classifier returned: a tensor, a tuple, a dict, or an object with `.logits`.

    In a tuple or a dict without `logits` the first (batch, classes) tensor; a (batch,) tensor is one logit per image.

    Raises:
        TypeError: nothing of shape (batch, classes) is in it.

    >>> logits_of({"logits": torch.zeros(2, 5)}).shape
    torch.Size([2, 5])
    """
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if found is None:
        found = next((leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.ndim == 2), output)
    if isinstance(found, Tensor) and found.ndim == 1:
        found = found[:, None]
    if not isinstance(found, Tensor) or found.ndim != 2:
        got = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(output).__name__
        raise TypeError(f"expected logits of shape (batch, classes) from the model, got {got}; wrap it so that it does")
    return found


def either(logits: Float[Tensor, "b n"]) -> Float[Tensor, "b classes"]:
    """Logits of both classes where a binary head has a single one: softmax gives sigmoid(-z) and sigmoid(z).

    >>> either(torch.tensor([[3.0]])), either(torch.tensor([[1.0, 2.0]]))
    (tensor([[-1.5000,  1.5000]]), tensor([[1., 2.]]))
    """
    return torch.cat([-logits / 2, logits / 2], 1) if logits.shape[1] == 1 else logits


def output_of(model: nn.Module, images: Float[Tensor, "b c *grid"]) -> Any:
    """Whatever the model returns.

    Raises:
        RuntimeError: the model cannot take the images (their size, channels, type or device).
    """
    try:
        return model(images)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        shape = " x ".join(map(str, images.shape))
        raise RuntimeError(
            f"expected images that {type(model).__name__} can take, got {shape}, {images.dtype} on {images.device}: "
            f"{str(error).strip().splitlines()[0]}"
        ) from error


def run(model: nn.Module, images: Float[Tensor, "b c *grid"]) -> Float[Tensor, "b n"]:
    """Logits, one row per image; a softmax, log-softmax or sigmoid as the model's last operation is undone.

    Raises:
        RuntimeError: the model cannot take the images (their size, channels, type or device).
        ValueError: it returns more or fewer rows than images.
        TypeError: the model returns no logits.

    >>> run(nn.Sequential(nn.Flatten(), nn.Linear(12, 2), nn.Softmax(1)), torch.zeros(3, 3, 2, 2)).shape
    torch.Size([3, 2])
    """
    with _LastLink() as link:
        output = output_of(model, images)
        logits = link.undone(logits_of(link.undone(output) if isinstance(output, Tensor) else output))
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
