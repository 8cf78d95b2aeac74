"""The numbers that a map explains, as a function of images."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sightline.checks import check_whole
from sightline.facts import Progress, Verdict
from sightline.inference import ForwardCall, either, probabilities_of, resolve_targets, untouched

Targets = int | Int[Tensor, " b"] | Int[Tensor, "b t"] | Callable[[Any], Tensor] | None
"""None = the predicted class; an int = that class for every image; class indices per image; or a function from whatever
the model returns to one score per image, (b,) or (b, t)."""
"""Called with (what is being done, steps done, steps in all)."""


class Scorer:
    """The explained numbers of images: the logit of each target, or what a function of the model's output says.

    `begin` fixes the targets (the predicted classes, where none were given); from then on the scorer is a function of
    images. Of a binary head with one logit z, class 1 is explained by z and class 0 by -z.
    """

    targets: Int[Tensor, "b t"]
    logits: Float[Tensor, "b n"]
    """Of the images that it began with; a function's scores stand for them."""
    direct: Tensor
    """The same, but of a binary head the single logit."""
    link: str = ""
    """Of what these are the inverse; see `probabilities_of`."""
    scale: int
    """What turns one of these logits into the score."""
    origin: Float[Tensor, "b t"] | float = 0.0
    """The score of an image without information, if the method that holds this scorer looked at one."""
    remarks: tuple[Verdict, ...] = ()
    """What that method has to say about its maps; verdicts."""
    notices: dict[str, None]
    """What was decided about the model that its owner may want otherwise; one sentence each, in order."""

    def __init__(
        self,
        model: nn.Module,
        targets: Targets,
        *,
        forward_call: ForwardCall | None = None,
        batch_size: int = 64,
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
        self.progress = progress or (lambda what, done, total: None)
        self.differentiable = differentiable
        self.notices = {}

    def begin(self, images: Float[Tensor, "b c *grid"]) -> Float[Tensor, "b t"]:
        """Scores of the images to explain, in the caller's grad mode; fixes the targets.

        Raises:
            ValueError, TypeError: targets that are none, images or a model that do not fit.
        """
        if callable(self.asked):
            return self.take(self._scores(self.asked, images, None))
        with untouched(self.model) as net:
            answer = self.forward_call(net, images)
        self.forward_call = answer.call  # the images to come are read as these are
        self.link = answer.link
        if answer.notice:
            self.notices[answer.notice] = None
        return self.take(answer.logits)

    def take(self, logits: Float[Tensor, "b n"]) -> Float[Tensor, "b t"]:
        """The same from logits that are there already.

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
        """The targets as the caller knows them: -1 where a function makes the score, which is of no class."""
        return torch.full_like(targets, -1) if callable(self.asked) else targets

    def of(self, classes: Int[Tensor, "b t"]) -> Float[Tensor, "b t"]:
        """Scores of these classes of the images that it began with."""
        return self.logits.gather(1, classes) * self.scale

    def rivals(self) -> Int[Tensor, "b t"]:
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
        """Scores of other images, in the caller's grad mode; `rows` names the first image whose targets each takes."""
        logits, scale = self._of_classes(self._answer(images, rows)[0])
        return logits.gather(1, self._targets_of(rows)) * scale

    def probabilities(
        self, images: Float[Tensor, "n c *grid"], rows: Int[Tensor, " n"] | None = None
    ) -> Float[Tensor, "n t"]:
        """Probability of each target (see `probabilities_of`); where a function makes the scores, the scores."""
        logits, link = self._answer(images, rows)
        shares = logits if callable(self.asked) else probabilities_of(logits, link)
        return shares.gather(1, self._targets_of(rows))

    def gradients(
        self, images: Float[Tensor, "n c *grid"], rows: Int[Tensor, " n"] | None = None
    ) -> Float[Tensor, "n t c *grid"]:
        """Gradient of each target's score with respect to the images.

        Raises:
            ValueError: the score has no gradient there.
        """
        with torch.enable_grad():
            leaf = images if self.differentiable and images.requires_grad else images.detach().requires_grad_()
            scores = self(leaf, rows)
            found = gradients_of(scores, [leaf], create_graph=self.differentiable)[0] if scores.requires_grad else None
        if found is None:
            raise ValueError(
                "expected scores with a gradient at the images, got none; see that the forward does not switch it off"
            )
        return found

    def stream(
        self,
        what: str,
        total: int,
        make: Callable[[Int[Tensor, " n"]], tuple[Tensor, Int[Tensor, " n"]]],
        of: Callable[[Tensor, Tensor], Tensor],
        *,
        group: int | None = None,
    ) -> Iterator[tuple[Int[Tensor, " n"], Tensor]]:
        """Items 0 to total - 1, at most `batch_size` at a time, each with `of` (a method of this scorer) of its image.

        `make(items)` returns their images and rows. Memory is that of one batch; progress is reported after each.
        No batch holds items of two groups, where every `group` items are one.
        """
        group = group or max(total, 1)
        groups = (range(first, min(first + group, total), self.batch_size) for first in range(0, total, group))
        for start in (start for batches in groups for start in batches):
            stop = min(start + self.batch_size, start - start % group + group, total)
            items = torch.arange(start, stop, device=self.targets.device)
            with torch.inference_mode(False), torch.set_grad_enabled(self.differentiable):
                answer = of(*make(items))
            yield items, answer
            self.progress(what, stop, total)

    def _targets_of(self, rows: Tensor | None) -> Tensor:
        return self.targets if rows is None else self.targets[rows]

    def _of_classes(self, logits: Tensor) -> tuple[Tensor, int]:
        """Logits of at least two classes, or a function's scores, and what turns one of them into the score."""
        return (logits, 1) if callable(self.asked) or logits.shape[1] > 1 else (either(logits), 2)

    def _answer(self, images: Tensor, rows: Tensor | None) -> tuple[Tensor, str]:
        if callable(self.asked):
            return self._scores(self.asked, images, rows), ""
        with untouched(self.model) as net:
            answer = self.forward_call(net, images, rows)
        return answer.logits, answer.link

    def _scores(self, of: Callable[[Any], Tensor], images: Tensor, rows: Tensor | None) -> Tensor:
        with untouched(self.model) as net:
            scores = of(self.forward_call.raw(net, images, rows))
        if not isinstance(scores, Tensor) or scores.ndim not in (1, 2) or len(scores) != len(images):  # pyright: ignore[reportUnnecessaryIsInstance]
            got = f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(f"expected the function in targets to return ({len(images)},) scores, got {got}; mend it")
        return scores.reshape(len(images), -1)


def rows_of(weights: Float[Tensor, "n k"], classes: Int[Tensor, "b t"], divisor: int = 1) -> Float[Tensor, "b t k"]:
    """Each class's row over `divisor`; held once where all images have the same classes."""
    if (classes == classes[:1]).all():
        return (weights[classes[0]] / divisor).expand(len(classes), -1, -1)
    return weights[classes] / divisor


def gradients_of(
    scores: Float[Tensor, "b t"], tensors: Sequence[Tensor], *, create_graph: bool = False, retain_graph: bool = False
) -> list[Tensor | None]:
    """Gradient of every column of the scores at every tensor (b, ...), as (b, t, ...); None where none flows.

    One backward for all columns. Each image's score must depend on that image alone, as in eval mode it does.
    """
    keep = retain_graph or create_graph
    if scores.shape[1] == 1:
        single = torch.autograd.grad(
            scores.sum(), tensors, allow_unused=True, create_graph=create_graph, retain_graph=keep
        )
        return [g if g is None else g[:, None] for g in single]  # pyright: ignore[reportUnnecessaryComparison]
    columns = torch.eye(scores.shape[1], dtype=scores.dtype, device=scores.device)[:, None].expand(-1, len(scores), -1)
    found = torch.autograd.grad(
        scores,
        tensors,
        columns,
        is_grads_batched=True,
        allow_unused=True,
        create_graph=create_graph,
        retain_graph=keep,
    )
    return [g if g is None else g.transpose(0, 1) for g in found]  # pyright: ignore[reportUnnecessaryComparison]
