"""What a model's output says: its logits, however it returns them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from sightline.checks import check_whole
from sightline.inference.preserve import untouched


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


_LINKS = {name: name for name in ("softmax", "log_softmax", "sigmoid")} | {"expit": "sigmoid"}
_MOVES = set("squeeze unsqueeze flatten view reshape contiguous clone to type float double half bfloat16".split())
_BOUNDS = set("clamp clip clamp_min clamp_max nan_to_num".split())
_PICKS = {"__getitem__", "select"}


@dataclass(frozen=True, eq=False)
class _Link:
    """A tensor, in one version, that is a softmax or sigmoid of `logits()`."""

    output: Tensor
    version: int
    name: str
    logits: Callable[[], Tensor]


class _LastLink(TorchFunctionMode):
    """Remembers the last softmax or sigmoid of a forward, what it was applied to, and its result however reshaped."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[_Link] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name: str = getattr(func, "__name__", "")
        link = _LINKS.get(name.removeprefix("special_").removesuffix("_"))
        given, rest = (args[0], args[1:]) if args else (kwargs.get("input"), ())
        if link is not None and isinstance(given, Tensor):
            before = given.clone() if name.endswith("_") else given
            output = func(*args, **kwargs)
            self.links = [_Link(output, version_of(output), link, lambda: before)]
            return output
        made = self._link_of(given)  # an operation in place makes another version of it
        output = func(*args, **kwargs)
        if made is not None and isinstance(output, Tensor) and (follows := _following(func, name, made, rest, kwargs)):
            self.links.append(_Link(output, version_of(output), *follows))
        return output

    def _link_of(self, tensor: Any) -> _Link | None:
        return next((link for link in self.links if link.output is tensor and link.version == version_of(tensor)), None)

    def undone(self, output: Tensor) -> tuple[Tensor, str]:
        """What the last link was applied to if the output is its result, and its name; else the output."""
        link = self._link_of(output)
        return (output, "") if link is None else (link.logits(), link.name)


def _following(
    func: Callable[..., Any], name: str, link: _Link, rest: tuple[Any, ...], options: dict[str, Any]
) -> tuple[str, Callable[[], Tensor]] | None:
    """The link, and the logits, of what an operation makes of probabilities; None if that is neither's."""
    if name.removesuffix("_") in _BOUNDS:
        return link.name, link.logits
    if name == "log" and link.name == "softmax":
        return "log_softmax", link.logits
    if name in _MOVES or (name in _PICKS and link.name == "sigmoid"):
        return link.name, lambda: func(link.logits(), *rest, **options)
    if name in _PICKS and link.name == "softmax" and link.output.ndim == 2 and link.output.shape[1] == 2:
        return "sigmoid", lambda: func(link.logits() - link.logits().flip(1), *rest, **options)
    return None


def wide(values: Tensor) -> torch.dtype:
    """float32 at least: the type in which maps are summed and scored."""
    return torch.promote_types(values.dtype, torch.float32)


def version_of(tensor: Tensor) -> int:
    """How often it was changed in place; 0 for those of inference mode, which do not count.

    >>> version_of(torch.zeros(1)), version_of(torch.zeros(1).add_(1))
    (0, 1)
    """
    return 0 if tensor.is_inference() else tensor._version


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
    return run_with_link(model, images)[0]


def run_with_link(model: nn.Module, images: Float[Tensor, "b c *grid"]) -> tuple[Float[Tensor, "b n"], str]:
    """The same, and the name of what was undone; empty if nothing was. See `probabilities_of`."""
    with _LastLink() as seen:
        output = output_of(model, images)
        inner, first = seen.undone(output) if isinstance(output, Tensor) else (output, "")
        logits, second = seen.undone(logits_of(inner))
    if len(logits) != len(images):
        raise ValueError(
            f"expected one row of logits per image, got {len(logits)} for {len(images)} images; wrap the model"
        )
    return logits, first or second


def probabilities_of(logits: Float[Tensor, "b n"], link: str = "") -> Float[Tensor, "b classes"]:
    """Probability of each class: of its own where the model ended in a sigmoid over several, else by softmax.

    The logits are those that `run_with_link` returns, before `either`.

    >>> probabilities_of(torch.zeros(1, 4), "sigmoid"), probabilities_of(torch.zeros(1, 4))
    (tensor([[0.5000, 0.5000, 0.5000, 0.5000]]), tensor([[0.2500, 0.2500, 0.2500, 0.2500]]))
    """
    return logits.sigmoid() if link == "sigmoid" and logits.shape[1] > 1 else either(logits).softmax(1)


def forward(model: nn.Module, images: Float[Tensor, "b c *grid"], batch_size: int = 64) -> Float[Tensor, "b n"]:
    """Logits of all images in float32, in eval mode, without gradient, at most `batch_size` images at a time.

    >>> forward(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), torch.zeros(3, 3, 2, 2), batch_size=2).shape
    torch.Size([3, 2])
    """
    return answers(model, images, batch_size)[0]


def answers(
    model: nn.Module, images: Float[Tensor, "b c *grid"], batch_size: int = 64
) -> tuple[Float[Tensor, "b n"], Float[Tensor, "b classes"]]:
    """The same logits and, beside them, the probability of each class.

    >>> logits, probabilities = answers(nn.Sequential(nn.Flatten(), nn.Linear(12, 1)), torch.zeros(3, 3, 2, 2))
    >>> logits.shape, probabilities.shape
    (torch.Size([3, 1]), torch.Size([3, 2]))
    """
    check_whole(batch_size=batch_size)
    found: list[tuple[Tensor, Tensor]] = []
    with untouched(model) as m, torch.inference_mode(False), torch.no_grad():
        for chunk in images.split(batch_size):
            logits, link = run_with_link(m, chunk)
            found.append((logits.float(), probabilities_of(logits.float(), link)))
    logits, probabilities = zip(*found, strict=True)
    return torch.cat(logits), torch.cat(probabilities)
