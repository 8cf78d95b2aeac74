"""The score that a map explains, as a function of images."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from sightline.checks import check_whole
from sightline.facts import Progress
from sightline.inference import (
    ForwardCall,
    Memory,
    either,
    in_batches,
    probabilities_of,
    resolve_targets,
    untouched,
    wide,
)
from sightline.inference.outputs import Answer
from sightline.inference.probabilities import Probabilities
from sightline.targets import Target

Targets = int | Int[Tensor, " b"] | Int[Tensor, "b t"] | Callable[[Any], Tensor] | None
"""None = the predicted class; an int = that class for every image; class indices per image; or a function from whatever
the model returns to one score per image, (b,) or (b, t)."""


Make = Callable[[Int[Tensor, " n"]], tuple[Float[Tensor, "n ..."], Int[Tensor, " n"]]]
"""From the numbers of items to their images and rows."""
Read = Callable[[Tensor, Tensor], Tensor]
"""From images and rows to a row of values for each."""


class Scorer:
    """The explained scores of images: the logit of each target, or what a function computes from the model's output.

    `begin` fixes the targets (the predicted classes, if none were given); from then on the scorer is a function of
    images. For a binary head with one logit z, the score of class 1 is z and that of class 0 is -z.
    """

    targets: Int[Tensor, "b t"]
    logits: Float[Tensor, "b n"]
    """Of the images passed to `begin`; if a function makes the scores, these."""
    direct: Tensor
    """The same, but the single logit of a binary head."""
    activation: str = ""
    """The output activation that was undone to get these; see `probabilities_of`."""
    scale: int
    """Factor from one of the `logits` to the score."""
    notices: dict[str, None]
    """Decisions about the model that its owner may want to change; one sentence each, in order."""

    def __init__(
        self,
        model: nn.Module,
        targets: Targets,
        *,
        forward_call: ForwardCall | None = None,
        batch_size: int = 64,
        memory: Memory = None,
        progress: Progress | None = None,
        differentiable: bool = False,
    ) -> None:
        check_whole(batch_size=batch_size)
        if batch_size < 1:
            raise ValueError(f"expected at least 1 image per batch, got {batch_size}")
        self.model = model
        self.asked = targets
        self.forward_call = forward_call or ForwardCall()
        self.batch_size = batch_size
        self.memory = memory
        self.image_bytes = 0
        self.progress = progress or (lambda what, done, total: None)
        self.differentiable = differentiable
        self.notices = {}

    def begin(self, images: Float[Tensor, "b c *grid"], seen: Probabilities | None = None) -> Float[Tensor, "b t"]:
        """Scores of the images to explain, in the caller's grad mode; fixes the targets.

        Who passes `seen` (see `ForwardCall`) keeps the model `untouched`.

        Raises:
            ValueError, TypeError: bad targets, or images that the model cannot take.
        """
        self.image_bytes = images[:1].nbytes
        answer = self._answer(images, None, seen, begins=True)
        self.forward_call = answer.call  # the images to come are read as these are
        self.activation = answer.activation
        if answer.notice:
            self.notices[answer.notice] = None
        return self.take(answer.logits)

    def take(self, logits: Float[Tensor, "b n"]) -> Float[Tensor, "b t"]:
        """The same from logits that are already computed.

        Raises:
            ValueError, TypeError: as `begin`.
        """
        self.direct = logits
        self.logits, self.scale = self._of_classes(logits)
        if not callable(self.asked):
            self.targets = resolve_targets(self.asked, self.logits)
        else:
            self.targets = torch.arange(logits.shape[1], device=logits.device).expand(logits.shape)
        return self.of(self.targets)

    def classes_of(self, targets: Int[Tensor, "b t"]) -> Int[Tensor, "b t"]:
        """The targets for the caller: -1 where a function makes the score, which belongs to no class."""
        return torch.full_like(targets, -1) if callable(self.asked) else targets

    def of(self, classes: Int[Tensor, "b t"]) -> Float[Tensor, "b t"]:
        """Scores of these classes for the images passed to `begin`."""
        scores = self.logits.gather(1, classes)
        return scores if self.scale == 1 else scores * self.scale

    def runners_up(self) -> Int[Tensor, "b t"]:
        """For each target the highest-scoring other class.

        Raises:
            ValueError: there is a single score.
        """
        if self.logits.shape[1] < 2:
            raise ValueError(
                "expected at least two classes to compare, got a single score; pass class indices as targets"
            )
        first, second = self.logits.topk(2).indices[:, :, None].unbind(1)
        return torch.where(first == self.targets, second, first)

    def __call__(
        self, images: Float[Tensor, "n c *grid"], rows: Int[Tensor, " n"] | None = None
    ) -> Float[Tensor, "n t"]:
        """Scores of other images, in the caller's grad mode; each has the targets of the original image at `rows`."""
        logits, scale = self._of_classes(self._answer(images, rows).logits)
        return logits.gather(1, self._targets_of(rows)) * scale

    def probabilities(
        self, images: Float[Tensor, "n c *grid"], rows: Int[Tensor, " n"] | None = None
    ) -> Float[Tensor, "n t"]:
        """Probability of each target (see `probabilities_of`); if a function makes the scores, the scores."""
        answer = self._answer(images, rows)
        return self.probable(answer.logits, answer.activation).gather(1, self._targets_of(rows))

    def probable(self, logits: Float[Tensor, "n _"], activation: str) -> Float[Tensor, "n classes"]:
        """Probabilities from logits as the model returns them; a function's scores as they are."""
        return logits if callable(self.asked) else probabilities_of(logits, activation)

    def gradients(
        self, images: Float[Tensor, "n c *grid"], rows: Int[Tensor, " n"] | None = None
    ) -> Float[Tensor, "n t c *grid"]:
        """Gradient of each target's score with respect to the images.

        Raises:
            ValueError: the scores have no gradient at the images.
        """
        with torch.enable_grad():
            leaf = images if self.differentiable and images.requires_grad else images.detach().requires_grad_()
            (gradient,) = gradients_of(self(leaf, rows), [leaf], create_graph=self.differentiable)
        if gradient is None:
            raise ValueError(
                "expected scores with a gradient at the images, got none; make sure the forward does not switch it off"
            )
        return gradient

    def stream(
        self, what: str, total: int, make: Make, read: Read, *, group: int | None = None
    ) -> Iterator[tuple[Int[Tensor, " n"], Tensor]]:
        """Items 0 to total - 1, in batches (see `in_batches`), each with what `read`, a method of this scorer, says.

        `make(items)` returns their images and rows. One batch is in memory at a time; progress is reported after each.
        Every `group` consecutive items form a group, and no batch mixes two groups.
        """

        def answer(numbers: range) -> tuple[Tensor, Tensor]:
            items = torch.arange(numbers.start, numbers.stop, device=self.targets.device)
            with torch.inference_mode(False), torch.set_grad_enabled(self.differentiable):
                return items, read(*make(items))

        sizes: dict[str, Any] = {"batch_size": self.batch_size, "memory": self.memory, "group": group}
        for numbers, answers in in_batches(answer, total, self.image_bytes, self.targets.device, **sizes):
            yield answers
            self.progress(what, numbers.stop, total)

    def collect(
        self, what: str, total: int, make: Make, read: Read, *, group: int | None = None
    ) -> Float[Tensor, "total ..."]:
        """All that `stream` yields, in one tensor of at least 32 bits."""
        values = torch.cat([value for _, value in self.stream(what, total, make, read, group=group)])
        return values.to(wide(values))

    def _targets_of(self, rows: Tensor | None) -> Tensor:
        return self.targets if rows is None else self.targets[rows]

    def _of_classes(self, logits: Tensor) -> tuple[Tensor, int]:
        """Logits of at least two classes, or a function's scores, and the factor from them to the score."""
        return (logits, 1) if callable(self.asked) or logits.shape[1] > 1 else (either(logits), 2)

    def _answer(
        self, images: Tensor, rows: Tensor | None, seen: Probabilities | None = None, *, begins: bool = False
    ) -> Answer:
        with untouched(self.model) if seen is None else nullcontext(self.model) as net:
            if not callable(self.asked):
                return self.forward_call(net, images, rows, seen)
            output = self.forward_call.raw(net, images, rows)
        target = self.asked
        if isinstance(target, Target):
            if begins:
                self.asked = target = target.fixed(output)
            target = target if rows is None else target.at(rows)
        scores = target(output)
        if not isinstance(scores, Tensor) or scores.ndim not in (1, 2) or len(scores) != len(images):  # pyright: ignore[reportUnnecessaryIsInstance]
            got = f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(
                f"expected the function in targets= to return one score per image, ({len(images)},), got {got}; fix it"
            )
        return Answer(scores.reshape(len(images), -1), "", self.forward_call, "")


def rows_of(weights: Float[Tensor, "n k"], classes: Int[Tensor, "b t"], divisor: int = 1) -> Float[Tensor, "b t k"]:
    """Each class's row divided by `divisor`; stored once if all images have the same classes."""
    count = classes.shape[0]
    alike = count == 1 or classes.stride(0) == 0
    if alike or (not isinstance(classes, FakeTensor) and (classes == classes[:1]).all()):  # a tracer has no values
        return (weights[classes[0]] / divisor).expand(count, -1, -1)
    return weights[classes] / divisor


def gradients_of(
    scores: Float[Tensor, "b t"], tensors: Sequence[Tensor], *, create_graph: bool = False, retain_graph: bool = False
) -> list[Tensor | None]:
    """Gradient of every column of the scores at every tensor (b, ...), as (b, t, ...); None where none flows.

    One backward for all columns. Each image's score must depend on that image alone, as it does in eval mode.
    """
    if not tensors or not scores.requires_grad:
        return [None for _ in tensors]
    keep = retain_graph or create_graph
    back = partial(torch.autograd.grad, inputs=tensors, allow_unused=True, create_graph=create_graph, retain_graph=keep)
    if scores.shape[1] == 1:
        single = back(scores, grad_outputs=torch.ones_like(scores))
        return [g if g is None else g[:, None] for g in single]  # pyright: ignore[reportUnnecessaryComparison]
    columns = torch.eye(scores.shape[1], dtype=scores.dtype, device=scores.device)[:, None].expand(-1, len(scores), -1)
    gradients = back(scores, grad_outputs=columns, is_grads_batched=True)
    return [g if g is None else g.transpose(0, 1) for g in gradients]  # pyright: ignore[reportUnnecessaryComparison]
