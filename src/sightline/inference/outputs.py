"""Reads the logits from a model's output, however it returns them."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any, NamedTuple, cast, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils._pytree import SUPPORTED_NODES, tree_flatten_with_path, tree_map

from sightline.checks import check_whole
from sightline.inference.memory import Memory, in_batches
from sightline.inference.preserve import untouched
from sightline.inference.probabilities import Kind, Probabilities, read

Pick = str | int | Callable[[Any], Any] | None
Output = Pick | tuple[Pick, str]
"""Which part of a model's output to read: a key, an index or a (dotted) attribute, or a function from the output to
(b,) or (b, n); `"logits"` or `"probabilities"` to say what it holds; or a tuple of both."""
_KINDS = get_args(Kind)


def check_images(images: object) -> None:
    """Check images before PyTorch does.

    Raises:
        TypeError: they are not a tensor.
        ValueError: they are not floating-point, not of shape (b, c, h, w) or (b, c, d, h, w), or empty.

    >>> check_images(torch.zeros(1, 3, 8, 8))
    """
    if not isinstance(images, Tensor):
        raise TypeError(
            f"expected a tensor of images (b, c, h, w), got {type(images).__name__}; see sightline.data.read_images"
        )
    if images.ndim not in (4, 5) or not images.is_floating_point() or not images.numel():
        raise ValueError(
            f"expected float images of shape (b, c, h, w), normalized as the model wants them, got {images.dtype} of "
            f"shape {tuple(images.shape)}; for one image pass images[None]"
        )


def wide(values: Tensor) -> torch.dtype:
    """The type in which maps are summed and scored: at least float32."""
    return torch.promote_types(values.dtype, torch.float32)


@dataclass(frozen=True, eq=False, kw_only=True)
class ForwardCall:
    """How a model is called and read: its arguments besides the images, and the part of its output to read.

    Call it as `(model, images)`, or `(model, images, rows)` for images derived from those at `rows`: tensors with one
    row for each of the original `batch` images are then indexed with these rows. See `forward_call`.
    """

    pick: Pick = None
    kind: Kind | None = None
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    batch: int = 0
    """Tensors of this length among the arguments have one row per image."""

    @property
    def output(self) -> Output:
        """The `output` argument with which `forward_call` reads outputs in the same way."""
        return self.pick if self.kind is None else (self.pick, self.kind)

    def at(self, rows: Int[Tensor, " n"]) -> "ForwardCall":
        """The call for images derived from those at these rows."""

        def chosen(value: Any) -> Any:
            has_rows = isinstance(value, Tensor) and value.ndim and len(value) == self.batch
            return value[rows.to(value.device)] if has_rows else value

        args, kwargs = tree_map(chosen, (self.args, dict(self.kwargs)))
        return replace(self, args=args, kwargs=kwargs, batch=len(rows))

    def raw(self, model: nn.Module, images: Float[Tensor, "n c *grid"], rows: Int[Tensor, " n"] | None = None) -> Any:
        """Whatever the model returns.

        Raises:
            RuntimeError: the model cannot take the images (their size, channels, type or device).
            TypeError: it needs other arguments.
        """
        call = self if rows is None else self.at(rows)
        try:
            return model(images, *call.args, **call.kwargs)
        except torch.OutOfMemoryError:
            raise
        except TypeError:
            _check_arguments(model, images, call)
            raise
        except RuntimeError as error:
            shape = " x ".join(map(str, images.shape))
            raise RuntimeError(
                f"expected images that {type(model).__name__} can take, got {shape}, {images.dtype} on "
                f"{images.device}: {str(error).strip().splitlines()[0]}{self._hint(rows) or _channels_last(images)}"
            ) from error

    def __call__(
        self,
        model: nn.Module,
        images: Float[Tensor, "n c *grid"],
        rows: Int[Tensor, " n"] | None = None,
        seen: Probabilities | None = None,
    ) -> "Answer":
        """Logits, one row per image; a softmax, log-softmax or sigmoid at the end of the model is undone.

        `seen` follows the forward in place of a new `Probabilities`.

        Raises:
            RuntimeError: the model cannot take the images (their size, channels, type or device).
            ValueError: the number of rows is not that of the images, several tensors may be the logits, or they are not
                the probabilities that `kind` promises.
            TypeError: it returns no logits, or needs other arguments.
        """
        with seen or Probabilities() as seen:
            values = logits_of(self.raw(model, images, rows), self.pick, len(images))
            if len(values) != len(images):
                raise ValueError(
                    f"expected one row of logits per image, got {len(values)} for {len(images)} images"
                    + (self._hint(rows) or "; wrap the model")
                )
            logits, activation, kind, notice = read(values, seen, self.kind)
        return Answer(logits, activation, replace(self, kind=kind), notice)

    def settled(self, model: nn.Module, images: Float[Tensor, "b c *grid"]) -> tuple["ForwardCall", str]:
        """The call that reads all outputs as it reads those of the first images, and a notice of what was decided."""
        rows = torch.arange(min(len(images), 64), device=images.device)
        with untouched(model) as net, torch.inference_mode(False), torch.no_grad():
            answer = self(net, images[rows], rows)
        return replace(self, kind=answer.call.kind), answer.notice

    def _hint(self, rows: Tensor | None) -> str:
        """Why a model may fail on more images than it was given."""
        if rows is None or len(rows) == self.batch:
            return ""
        return "; pass a second input that the model keeps for its first batch by forward_args="


def _channels_last(images: Tensor) -> str:
    """Advice where the colors seem to be the last axis."""
    is_last = images.shape[-1] in (1, 3) and images.shape[1] not in (1, 3)
    return "; move the channels: images.movedim(-1, 1)" if is_last else ""


class Answer(NamedTuple):
    """A model's answer for some images."""

    logits: Float[Tensor, "b n"]
    activation: str
    """The output activation that was undone to get the logits (see `probabilities_of`); empty if none was."""
    call: ForwardCall
    """Reads further outputs of the model in the same way."""
    notice: str
    """What was decided by the values; empty if nothing was."""


def forward_call(
    images: Tensor, output: Output = None, args: Any = (), kwargs: Mapping[str, Any] | None = None
) -> ForwardCall:
    """How to call a model for these images; `args` is a tuple, or a single argument.

    A tensor with as many rows as there are images has one for each of them; everything else is passed on unchanged.

    Raises:
        TypeError: `output` has a type that selects nothing.

    >>> forward_call(torch.zeros(2, 3, 4, 4), "prediction", torch.ones(2, 1)).at(torch.tensor([1, 1, 1])).args[0].shape
    torch.Size([3, 1])
    """
    pick: Any
    pick, kind = output if isinstance(output, tuple) and len(output) == 2 else (output, None)
    if kind is None and isinstance(pick, str) and pick in _KINDS:
        kind = pick
    is_pick = pick is None or callable(pick) or (isinstance(pick, str | int) and not isinstance(pick, bool))
    if not is_pick or kind not in (None, *_KINDS):
        raise TypeError(
            "expected output= a key, an index, an attribute or a function, 'logits' or 'probabilities', or a tuple of "
            f"both, got {output!r}; leave it out for a model that returns logits alone"
        )
    return ForwardCall(
        pick=pick,
        kind=cast("Kind | None", kind),
        args=args if isinstance(args, tuple) else (args,),
        kwargs=dict(kwargs or {}),
        batch=len(images),
    )


def logits_of(output: Any, pick: Pick = None, batch: int | None = None) -> Float[Tensor, "b n"]:
    """Find the logits in whatever a classifier returned: a tensor, a tuple, a dict, or an object with `.logits`.

    In a tuple or a dict without `logits`, they are the only (batch, classes) tensor; a (batch,) tensor is one logit per
    image. `pick` selects another one.

    Raises:
        TypeError: there is nothing of shape (batch, classes).
        ValueError: several tensors may be the logits, or the selected one is missing or holds class indices.

    >>> logits_of({"logits": torch.zeros(2, 5)}).shape, logits_of((torch.zeros(2, 8), torch.zeros(2, 4)), 1).shape
    (torch.Size([2, 5]), torch.Size([2, 4]))
    """
    if pick is None and isinstance(output, list) and output and isinstance(output[0], Mapping) and "boxes" in output[0]:
        raise TypeError(
            "expected logits of shape (batch, classes) from the model, got detections; explain one of them by "
            "targets=sl.targets.Box(...)"
        )
    values = picked(output, pick, batch)
    shape = tuple(values.shape) if isinstance(values, Tensor) else ()
    if isinstance(values, Tensor) and len(shape) in (1, 2) and not values.is_floating_point():
        raise ValueError(
            f"expected logits of shape (batch, classes) from the model, got {values.dtype} of shape {shape}, "
            "which look like class indices; return the logits instead"
        )
    if isinstance(values, Tensor) and len(shape) == 1:
        values = values[:, None]
    if not isinstance(values, Tensor) or values.ndim != 2:
        raise TypeError(f"expected logits of shape (batch, classes) from the model, got {_not_logits(values, output)}")
    return values


def _not_logits(values: Any, output: Any) -> str:
    """What a model returned in place of logits, and what explains it."""
    tensors = [output] if isinstance(output, Tensor) else [leaf for _, leaf in _leaves(output)]
    for tensor in tensors:
        if isinstance(tensor, Tensor) and tensor.ndim in (4, 5):
            shape = tuple(tensor.shape)
            return f"scores of shape {shape}; explain a class in a region by targets=sl.targets.Region(...)"
    got = f"a tensor of shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(output).__name__
    return f"{got}; wrap it so that it does, or say what to explain by a function in targets= (see sl.targets)"


def picked(output: Any, pick: Pick, batch: int | None = None) -> Any:
    """What `pick` selects from a model's output; None selects the logits, or the only tensor that may be them.

    Raises:
        ValueError: it is missing, or several tensors may be the logits.

    >>> picked({"loss": 1.0, "out": {"head": 2.0}}, "out.head")
    2.0
    """
    if pick is None or pick in _KINDS:
        for name in dict.fromkeys((str(pick or "logits"), "logits")):
            values = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
            if isinstance(values, Tensor):
                return values
        return _only(output, batch)
    if not isinstance(pick, str | int):
        return pick(output)
    value = output
    for step in pick.split(".") if isinstance(pick, str) else [pick]:
        try:
            if isinstance(value, Mapping):
                value = value[step]
            elif isinstance(value, Sequence) and str(step).removeprefix("-").isdecimal():
                value = value[int(step)]
            elif isinstance(value, Tensor):
                raise KeyError(step)
            else:
                value = getattr(value, str(step))
        except (AttributeError, IndexError, KeyError):
            raise ValueError(
                f"expected output= that the model returns, got {pick!r} and {_contents(output)}; choose one of them"
            ) from None
    return value


def _only(output: Any, batch: int | None) -> Any:
    """The only tensor that may be the logits."""
    if isinstance(output, Tensor):
        return output
    tensors = list({id(leaf): leaf for _, leaf in _leaves(output) if isinstance(leaf, Tensor)}.values())
    for dimensions in (2, 1):
        fitting = [one for one in tensors if one.ndim == dimensions and one.is_floating_point()]
        fitting = [one for one in fitting if batch is None or len(one) == batch] or fitting
        if len(fitting) > 1:
            names = [int(name) if name.isdecimal() else name for name, leaf in _leaves(output) if leaf is fitting[-1]]
            raise ValueError(
                f"expected one tensor of logits from the model, got {_contents(output)}; choose one, as "
                f"output={names[0]!r} does"
            )
        if fitting:
            return fitting[0]
    return next((one for one in tensors if one.ndim in (1, 2)), output)


def _contents(output: Any) -> str:
    """The entries of an output that can be selected."""
    if isinstance(output, Tensor):
        return f"a tensor of shape {tuple(output.shape)}"
    shapes = [f"{name} {tuple(leaf.shape)}" for name, leaf in _leaves(output) if isinstance(leaf, Tensor)]
    return ", ".join(shapes) or type(output).__name__


def _leaves(output: Any) -> list[tuple[str, Any]]:
    """Everything in an output, by the name that selects it."""
    is_tree = type(output) in SUPPORTED_NODES or isinstance(output, Mapping | Sequence)
    leaves, _ = tree_flatten_with_path(output if is_tree or not hasattr(output, "__dict__") else dict(vars(output)))
    steps = ("key", "idx", "name")  # of mappings, sequences, attributes
    return [(".".join(str(getattr(k, s)) for k in path for s in steps if hasattr(k, s)), leaf) for path, leaf in leaves]


def _check_arguments(model: nn.Module, images: Tensor, call: ForwardCall) -> None:
    """Refuse a forward that needs other arguments than it was given."""
    try:
        inspect.signature(model.forward).bind(images, *call.args, **call.kwargs)
    except TypeError as error:
        first = next(iter(inspect.signature(model.forward).parameters), "")
        if first in call.kwargs:
            raise TypeError(
                f"expected a model that takes images first, got {type(model).__name__}, whose first argument is "
                f"{first}; wrap it in a module whose forward takes images"
            ) from error
        raise TypeError(
            f"expected a model that takes images and what forward_args= and forward_kwargs= hold, got "
            f"{type(model).__name__}: {error}; pass its other inputs by forward_args= or forward_kwargs="
        ) from error
    except ValueError:  # a forward without a signature
        pass


def either(logits: Float[Tensor, "b n"]) -> Float[Tensor, "b classes"]:
    """Logits of both classes if a binary head has a single one: their softmax is sigmoid(-z) and sigmoid(z).

    >>> either(torch.tensor([[3.0]])), either(torch.tensor([[1.0, 2.0]]))
    (tensor([[-1.5000,  1.5000]]), tensor([[1., 2.]]))
    """
    return torch.cat([-logits / 2, logits / 2], 1) if logits.shape[1] == 1 else logits


def run(model: nn.Module, images: Float[Tensor, "b c *grid"]) -> Float[Tensor, "b n"]:
    """Logits of a model that takes images alone; see `ForwardCall`.

    >>> run(nn.Sequential(nn.Flatten(), nn.Linear(12, 2), nn.Softmax(1)), torch.zeros(3, 3, 2, 2)).shape
    torch.Size([3, 2])
    """
    return ForwardCall()(model, images).logits


def probabilities_of(logits: Float[Tensor, "b n"], activation: str = "") -> Float[Tensor, "b classes"]:
    """Probability of each class: the sigmoid if the model ended in one over several classes, else the softmax.

    The logits are those of an `Answer`, before `either`.

    >>> probabilities_of(torch.zeros(1, 4), "sigmoid"), probabilities_of(torch.zeros(1, 4))
    (tensor([[0.5000, 0.5000, 0.5000, 0.5000]]), tensor([[0.2500, 0.2500, 0.2500, 0.2500]]))
    """
    return logits.sigmoid() if activation == "sigmoid" and logits.shape[1] > 1 else either(logits).softmax(1)


def forward(
    model: nn.Module,
    images: Float[Tensor, "b c *grid"],
    batch_size: int = 64,
    call: ForwardCall | None = None,
    memory: Memory = None,
) -> Float[Tensor, "b n"]:
    """Logits of all images in float32, in eval mode, without gradient, in batches as `in_batches` cuts them.

    >>> forward(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), torch.zeros(3, 3, 2, 2), batch_size=2).shape
    torch.Size([3, 2])
    """
    return answers(model, images, batch_size, call, memory)[0]


def answers(
    model: nn.Module,
    images: Float[Tensor, "b c *grid"],
    batch_size: int = 64,
    call: ForwardCall | None = None,
    memory: Memory = None,
) -> tuple[Float[Tensor, "b n"], Float[Tensor, "b classes"]]:
    """The same logits, and the probability of each class.

    >>> logits, probabilities = answers(nn.Sequential(nn.Flatten(), nn.Linear(12, 1)), torch.zeros(3, 3, 2, 2))
    >>> logits.shape, probabilities.shape
    (torch.Size([3, 1]), torch.Size([3, 2]))
    """
    check_whole(batch_size=batch_size)
    call = call or ForwardCall()
    kind = call.kind
    with untouched(model) as net, torch.inference_mode(False), torch.no_grad():

        def answered(items: range) -> tuple[Tensor, Tensor]:
            nonlocal kind
            rows = torch.arange(items.start, items.stop, device=images.device)
            answer = replace(call, kind=kind)(net, images[rows], rows)
            kind = answer.call.kind
            logits = answer.logits.float()
            return logits, probabilities_of(logits, answer.activation)

        sizes: dict[str, Any] = {"batch_size": batch_size, "memory": memory}
        parts = [part for _, part in in_batches(answered, len(images), images[:1].nbytes, images.device, **sizes)]
    logits, probabilities = zip(*parts, strict=True)
    return torch.cat(logits), torch.cat(probabilities)


def resolve_targets(targets: int | Tensor | None, logits: Float[Tensor, "b n"]) -> Int[Tensor, "b t"]:
    """Class indices as (batch, targets): None = the predicted class, an int = that class for every image.

    Raises:
        ValueError: their number differs from the batch, or a class does not exist.
        TypeError: they are neither None, an int nor an integer tensor.

    >>> resolve_targets(None, torch.tensor([[0.0, 3.0], [2.0, 1.0]])).tolist()
    [[1], [0]]
    """
    if targets is None:
        return logits.argmax(1, keepdim=True)
    classes = logits.shape[1]
    indices = check_classes(_indices(targets, len(logits)).to(logits.device), classes)
    if 2 < indices.shape[1] == classes and int(indices.max()) == 1:
        raise ValueError(
            f"expected class indices, got zeros and ones for all {classes} classes, which look like labels of several "
            f"classes; pass torch.arange({classes}).expand({len(logits)}, -1) for a map of each class"
        )
    return indices


def one_target_each(targets: int | Tensor, batch: int) -> Int[Tensor, " b"]:
    """Class indices, one per image; `check_classes` checks that the model has them.

    Raises:
        ValueError: their number differs from the batch, or an image has several targets.
        TypeError: they are neither an int nor an integer tensor.

    >>> one_target_each(torch.tensor([[1], [0]]), 2).tolist()
    [1, 0]
    """
    if isinstance(targets, Tensor) and tuple(targets.shape) not in ((batch,), (batch, 1)):
        raise ValueError(
            f"expected {batch} targets, one per image, got shape {tuple(targets.shape)}; pass one for each"
        )
    return _indices(targets, batch)[:, 0]


def _instead_of(targets: object) -> str:
    """What to pass in place of targets that are none."""
    each = cast(Sequence[object], targets) if isinstance(targets, list | tuple) else []
    if each and all(isinstance(one, str) for one in each):
        return f"pass class indices, and methods as methods={targets!r}"
    if each and all(isinstance(one, Integral) for one in each):
        return f"pass torch.tensor({targets!r})"
    if each and all(callable(one) for one in each):
        return "pass one function for the whole batch"
    return "pass class indices"


def check_classes(indices: Int[Tensor, "..."], classes: int) -> Int[Tensor, "..."]:
    """The same indices, if the classes exist; a wrong index would break the GPU for the whole process.

    Raises:
        ValueError: a class that does not exist.

    >>> check_classes(torch.tensor([0, 1]), 2).tolist()
    [0, 1]
    """
    low, high = int(indices.min()), int(indices.max())
    if not 0 <= low <= high < classes:
        raise ValueError(
            f"expected targets in 0..{classes - 1}, got {low}..{high}; the model has {classes} classes, counted from 0"
        )
    return indices


def check_names(names: Sequence[str], logits: Float[Tensor, "b n"]) -> None:
    """Check that class names, if there are any, are as many as the classes; a single logit stands for two.

    Raises:
        ValueError: there are more names, or fewer.

    >>> check_names(["cat", "dog"], torch.zeros(1, 1))
    >>> check_names(["cat", "dog"], torch.zeros(1, 3))
    Traceback (most recent call last):
    ValueError: expected 3 class names, one per class of the model, got 2; name all of them, or none
    """
    count = max(2, logits.shape[1])
    if names and len(names) != count:
        raise ValueError(
            f"expected {count} class names, one per class of the model, got {len(names)}; name all of them, or none"
        )


def _indices(targets: int | Tensor, batch: int) -> Int[Tensor, "b t"]:
    if not isinstance(targets, bool) and isinstance(targets, Integral):  # NumPy's, too
        return torch.full((batch, 1), int(targets))
    if not isinstance(targets, Tensor) or targets.is_floating_point() or targets.dtype == torch.bool:
        got = f"a {targets.dtype} tensor" if isinstance(targets, Tensor) else f"{targets!r}"
        raise TypeError(
            f"expected targets None, an int, an integer tensor or a function, got {got}; {_instead_of(targets)}"
        )
    if targets.ndim not in (1, 2) or len(targets) != batch or not targets.numel():
        raise ValueError(
            f"expected targets of shape ({batch},) or ({batch}, t), one row per image, got {tuple(targets.shape)}; "
            "pass an int to explain the same class in every image"
        )
    return targets.to(torch.long, copy=True).reshape(batch, -1)  # a tensor made in inference mode has no gradient
