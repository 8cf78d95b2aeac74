"""Targets by name: functions from a model's output to one score per image, for models that are not plain classifiers.

`sl.explain(model, images, targets=...)` takes each of them, as it takes any function of the output.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, cast, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from sightline import maps
from sightline.checks import check_tensor, check_whole
from sightline.inference.outputs import Pick, logits_of, picked

__all__ = ["Box", "Class", "Difference", "Region", "Similarity", "Target", "Value"]

Reduction = Literal["mean", "sum"]
_LEAST_OVERLAP = 0.1
"""IoU below which a box belongs to no detection: it is elsewhere, or in other units."""


class Target:
    """What is explained: a dataclass whose call is the formula of the score."""

    def __call__(self, output: Any) -> Float[Tensor, " b"]:
        """One score per image."""
        raise NotImplementedError

    def fixed(self, output: Any) -> "Target":
        """The same target, with everything decided that it reads from the output for the original images.

        `explain` calls it once, so that changed images (occlusion, RISE, noise) are asked the same question.
        """
        return self

    def at(self, rows: Int[Tensor, " n"]) -> "Target":
        """The target for images derived from those at these rows."""
        return self

    def __repr__(self) -> str:
        values = [(field, getattr(self, field.name)) for field in fields(self)]  # pyright: ignore[reportArgumentType]
        shown = [f"{field.name}={_shown(value)}" for field, value in values if value is not field.default]
        return f"{type(self).__name__}({', '.join(shown)})"


@dataclass(frozen=True, eq=False, repr=False)
class Value(Target):
    """One number that the model returns for an image, for example of a regression.

    Args:
        index: which of several, from 0; None for a model that returns a single one.
        output: the tensor to read where the model returns several, as in `explain`.

    Raises:
        ValueError: the model returns several numbers and none is selected, or not so many.
        TypeError: it returns nothing of shape (b,) or (b, n).

    >>> Value()(torch.tensor([[3.0], [4.0]])), Value(1)(torch.tensor([[3.0, 5.0]]))
    (tensor([3., 4.]), tensor([5.]))
    >>> Value(index=1)
    Value(index=1)
    """

    index: int | None = None
    output: Pick = None

    def __post_init__(self) -> None:
        check_whole(index=self.index)

    def __call__(self, output: Any) -> Float[Tensor, " b"]:
        """The number."""
        values = logits_of(output, self.output)
        count = values.shape[1]
        if (self.index is None and count > 1) or not 0 <= (self.index or 0) < count:
            got = f"{count} numbers per image" if self.index is None else f"index {self.index} of {count}"
            raise ValueError(f"expected a model with one number, or an index below {count}, got {got}; pass Value(0)")
        return values[:, self.index or 0]


@dataclass(frozen=True, eq=False, repr=False)
class Region(Target):
    """The score of a class in a region, for a model that returns a score per class and position (segmentation).

    With weights w of the region (0 outside, 1 inside) and scores s of the class: sum(w s) / sum(w), or sum(w s).

    Args:
        label: the class.
        mask: (h, w) for all images, or (b, 1, h, w); 3-D likewise. It is resized to the scores. None: the
            positions where this class has the highest score; if there is a single class, where its score is above 0.
        reduction: "mean" or "sum" over the region.
        output: the tensor to read where the model returns several; None: `out` (torchvision), `logits` or the only one.

    Raises:
        ValueError: no such class, a mask of another shape, or an empty region.
        TypeError: the model returns no scores (b, classes, h, w).

    Source: Vinogradova et al. 2020 (2002.11434): the sum over a set of positions.

    >>> scores = torch.tensor([[[[0.0, 4.0, 6.0]], [[1.0, 1.0, 9.0]]]])
    >>> Region(1)(scores), Region(1, mask=torch.tensor([[1, 1, 0]]), reduction="sum")(scores)
    (tensor([5.]), tensor([2.]))
    """

    label: int
    mask: Tensor | None = None
    reduction: Reduction = "mean"
    output: Pick = None

    def __post_init__(self) -> None:
        check_whole(label=self.label)
        if self.mask is not None:
            check_tensor("mask= as a tensor", self.mask)
            if not self.mask.isfinite().all() or (self.mask < 0).any():
                raise ValueError(
                    "expected a mask of weights from 0 to 1, got negative or non-finite ones; pass zeros and ones"
                )
        if self.reduction not in get_args(Reduction):
            raise ValueError(f"expected reduction= 'mean' or 'sum', got {self.reduction!r}; choose one of them")

    def __call__(self, output: Any) -> Float[Tensor, " b"]:
        """Mean or sum of the class's scores over the region."""
        scores = self._scores(output)
        weights = self._weights(scores)
        total = (weights * scores[:, [self.label]]).flatten(1).sum(1)
        return total if self.reduction == "sum" else total / weights.flatten(1).sum(1)

    def fixed(self, output: Any) -> "Region":
        """The region of these images."""
        return replace(self, mask=self._weights(self._scores(output)))

    def at(self, rows: Int[Tensor, " n"]) -> "Region":
        """Each image's own mask, if they have one each."""
        mask = self.mask
        return self if mask is None or mask.ndim < 4 else replace(self, mask=mask[rows.to(mask.device)])

    def _scores(self, output: Any) -> Float[Tensor, "b n *grid"]:
        pick = "out" if self.output is None and isinstance(output, Mapping) and "out" in output else self.output
        scores = picked(output, pick)
        if not isinstance(scores, Tensor) or scores.ndim not in (4, 5):
            raise TypeError(
                f"expected a model that returns scores (b, classes, h, w), got {_shown(scores)}; select them by output="
            )
        if not 0 <= self.label < scores.shape[1]:
            raise ValueError(f"expected a label in 0..{scores.shape[1] - 1}, got {self.label}; the model has no other")
        return scores

    def _weights(self, scores: Float[Tensor, "b n *grid"]) -> Float[Tensor, "b 1 *grid"]:
        grid, mask = scores.shape[2:], self.mask
        if mask is None:
            is_here = scores > 0 if scores.shape[1] == 1 else scores.argmax(1, keepdim=True) == self.label
            weights = is_here.to(scores)
        elif mask.ndim == len(grid) or (mask.ndim == scores.ndim and mask.shape[:2] == (len(scores), 1)):
            whole = mask if mask.ndim == scores.ndim else mask[None, None].expand(len(scores), 1, *mask.shape)
            weights = maps.resize(whole.to(scores), tuple(grid))
        else:
            sides = ", ".join("dhw"[-len(grid) :])
            raise ValueError(
                f"expected a mask ({sides}), or ({len(scores)}, 1, {sides}) with one for each image, got shape "
                f"{tuple(mask.shape)}; reshape it"
            )
        empty = (weights.flatten(1).sum(1) == 0).nonzero()
        if len(empty):
            image = f"image {int(empty[0])}"
            raise ValueError(
                f"expected label {self.label} somewhere in {image}, but the model gives it to no position; pass a mask"
                if mask is None
                else f"expected a mask with at least one position, got an empty one for {image}; leave the image out"
            )
        return weights


@dataclass(frozen=True, eq=False, repr=False)
class Box(Target):
    """The score of the detection at a box: the largest IoU(box, detection) x score among the detections of a class.

    It is 0 where no detection overlaps the box. The gradient is that of the score alone: at the detector's own box the
    IoU has its maximum, where it has no derivative.

    Args:
        box: (x_min, y_min, x_max, y_max) in the detector's units, for all images, or (b, 4).
        label: the class, as the detector counts them; None for any.
        output: what to read: a key, index or attribute, or a function from the model's output to detections. These are
            a list with one dict per image (`boxes`, `scores`, `labels`, as torchvision's detectors return), or a tensor
            (b, n, 4 + classes) of corners and a score per class.

    Raises:
        ValueError: no box of positive area, or one at which the images to explain have no detection (IoU below 0.1).
        TypeError: the output holds no detections.

    Source: Petsiuk et al. 2021 (2006.03204): the same maximum, with the class fixed.

    >>> found = [{"boxes": torch.tensor([[0.0, 0.0, 4.0, 2.0], [5.0, 5.0, 9.0, 9.0]]), "labels": torch.tensor([1, 1]),
    ...           "scores": torch.tensor([0.5, 0.75])}]
    >>> Box([0, 0, 2, 2], label=1)(found), Box([5, 5, 9, 9])(found), Box([0, 0, 2, 2], label=2)(found)
    (tensor([0.2500]), tensor([0.7500]), tensor([0.]))
    """

    box: Sequence[int | float] | Tensor
    label: int | None = None
    output: Pick = None

    def __post_init__(self) -> None:
        check_whole(label=self.label)
        try:
            box = torch.as_tensor(self.box, dtype=torch.float32)
        except (TypeError, ValueError):
            box = torch.zeros(0)
        if box.shape[-1:] != (4,) or box.ndim > 2 or not (box[..., :2] < box[..., 2:]).all():  # NaN too
            raise ValueError(
                "expected a box (x_min, y_min, x_max, y_max) with a positive area, or (b, 4) of them, got "
                f"{_shown(self.box)}; give corners"
            )

    def __call__(self, output: Any) -> Float[Tensor, " b"]:
        """The largest product, or 0."""
        products = [overlaps * scores for overlaps, scores in self._detections(output)]
        return torch.stack([torch.cat([each, each.new_zeros(1)]).max() for each in products])

    def fixed(self, output: Any) -> "Box":
        """The same; an error if there is nothing at the box."""
        for number, (overlaps, _) in enumerate(self._detections(output)):
            best = float(overlaps.max()) if len(overlaps) else 0.0
            if best < _LEAST_OVERLAP:
                raise ValueError(
                    f"expected a detection at the box {_shown(self._boxes(number))}, got none in image {number} of "
                    f"{'any' if self.label is None else 'this'} label with an IoU of {_LEAST_OVERLAP} or more (best: "
                    f"{best:.2g}); give corners in the detector's units"
                )
        return self

    def at(self, rows: Int[Tensor, " n"]) -> "Box":
        """Each image's own box, if they have one each."""
        box = torch.as_tensor(self.box)
        return self if box.ndim == 1 else replace(self, box=box[rows.to(box.device)])

    def _boxes(self, number: int) -> Tensor:
        box = torch.as_tensor(self.box)
        return box if box.ndim == 1 else box[number]

    def _detections(self, output: Any) -> list[tuple[Float[Tensor, " n"], Float[Tensor, " n"]]]:
        """IoU and score of each image's detections of the class."""
        from torchvision.ops import box_iou

        found = output if self.output is None else picked(output, self.output)
        fields = {"boxes", "scores"} | (set() if self.label is None else {"labels"})
        if isinstance(found, Tensor) and found.ndim == 3 and found.shape[2] > 4:
            images = [self._of_row(row) for row in found]
        elif isinstance(found, Sequence) and found and all(isinstance(e, Mapping) and fields <= {*e} for e in found):
            images = [self._of_dict(each) for each in found]
        else:
            raise TypeError(
                "expected detections, a list of dicts with boxes, scores and labels or a tensor (b, n, 4 + classes), "
                f"got {_shown(found)}; make them by output="
            )
        count = len(torch.as_tensor(self.box)) if torch.as_tensor(self.box).ndim == 2 else len(images)
        if count != len(images):
            raise ValueError(f"expected one box, or one for each of {len(images)} images, got {count}; pass as many")
        overlaps = [box_iou(self._boxes(i)[None].to(boxes), boxes.detach())[0] for i, (boxes, _) in enumerate(images)]
        return [(overlap, scores) for overlap, (_, scores) in zip(overlaps, images, strict=True)]

    def _of_row(self, row: Float[Tensor, "n _"]) -> tuple[Float[Tensor, "n 4"], Float[Tensor, " n"]]:
        scores = row[:, 4:]
        if self.label is not None and not 0 <= self.label < scores.shape[1]:
            raise ValueError(
                f"expected a label in 0..{scores.shape[1] - 1}, got {self.label}; a row is 4 corners and the classes"
            )
        return row[:, :4], scores.amax(1) if self.label is None else scores[:, self.label]

    def _of_dict(self, found: Mapping[str, Tensor]) -> tuple[Float[Tensor, "n 4"], Float[Tensor, " n"]]:
        chosen = slice(None) if self.label is None else found["labels"] == self.label
        return found["boxes"][chosen], found["scores"][chosen]


@dataclass(frozen=True, eq=False, repr=False)
class Similarity(Target):
    """Cosine similarity of an image's embedding to a fixed one: of another image, a text, a class.

    Args:
        embedding: (d,) for all images, or (b, d).
        cosine: False: the dot product with the fixed embedding of length 1. Its gradient does not vanish where the two
            are alike, and for a network with average pooling HiRes-CAM divides it among the positions.
        output: the tensor to read where the model returns several, as in `explain`.

    Raises:
        ValueError: embeddings of another length, or not one for each image.
        TypeError: the model returns no embedding (b, d).

    Source: Zhu et al. 2019 (1909.12977): the similarity of two images is explained in place of a logit.

    >>> Similarity(torch.tensor([1.0, 0.0]))(torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
    tensor([0.6000, 0.0000])
    >>> Similarity(torch.tensor([2.0, 0.0]), cosine=False)(torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
    tensor([3., 0.])
    """

    embedding: Tensor
    output: Pick = None
    cosine: bool = True

    def __post_init__(self) -> None:
        check_tensor("embedding= as a tensor", self.embedding)

    def __call__(self, output: Any) -> Float[Tensor, " b"]:
        """The cosine, or the product."""
        values, wanted = logits_of(output, self.output), self.embedding
        if wanted.shape not in (values.shape[1:], values.shape):
            raise ValueError(
                f"expected an embedding ({values.shape[1]},), or {tuple(values.shape)} with one for each image, got "
                f"{tuple(wanted.shape)}; take it from the same model, for example model(image)[0]"
            )
        wanted = wanted.detach().to(values).expand_as(values)
        return F.cosine_similarity(values, wanted, 1) if self.cosine else (values * F.normalize(wanted)).sum(1)

    def at(self, rows: Int[Tensor, " n"]) -> "Similarity":
        """Each image's own embedding, if they have one each."""
        wanted = self.embedding
        return self if wanted.ndim == 1 else replace(self, embedding=wanted[rows.to(wanted.device)])


@dataclass(frozen=True, eq=False, repr=False)
class Class(Target):
    """The model's output for a class, as it is: a final softmax is not undone, which `targets=3` does.

    Args:
        label: the class.
        output: the tensor to read where the model returns several, as in `explain`.

    Raises:
        ValueError: the model has no such class.
        TypeError: it returns nothing of shape (b, n).

    >>> Class(1)(torch.tensor([[3.0, 5.0]]))
    tensor([5.])
    """

    label: int
    output: Pick = None

    def __post_init__(self) -> None:
        check_whole(label=self.label)

    def __call__(self, output: Any) -> Float[Tensor, " b"]:
        """The output."""
        values = logits_of(output, self.output)
        if not 0 <= self.label < values.shape[1]:
            raise ValueError(
                f"expected a label in 0..{values.shape[1] - 1}, got {self.label}; the model has no other class"
            )
        return values[:, self.label]


@dataclass(frozen=True, eq=False, repr=False)
class Difference(Target):
    """One target's score less another's: what speaks for this class, text or region and not for that one.

    Args:
        one: a target, or the label of a class.
        other: what is subtracted, likewise.

    Raises:
        TypeError: neither a target nor a label.

    >>> Difference(0, 1)(torch.tensor([[3.0, 5.0]]))
    tensor([-2.])
    >>> Difference(Value(0), Value(2))
    Difference(one=Value(index=0), other=Value(index=2))
    """

    one: Target | int
    other: Target | int

    def __post_init__(self) -> None:
        for name in ("one", "other"):
            value = getattr(self, name)
            if not isinstance(value, Target):
                check_whole(**{name: value})

    def __call__(self, output: Any) -> Float[Tensor, " b"]:
        """The difference."""
        return _target(self.one)(output) - _target(self.other)(output)

    def fixed(self, output: Any) -> "Difference":
        """Both, with what each reads from the output for these images."""
        return replace(self, one=_target(self.one).fixed(output), other=_target(self.other).fixed(output))

    def at(self, rows: Int[Tensor, " n"]) -> "Difference":
        """Both for these rows."""
        return replace(self, one=_target(self.one).at(rows), other=_target(self.other).at(rows))


def _target(target: Target | int) -> Target:
    return target if isinstance(target, Target) else Class(target)


def name_of(target: Callable[[Any], Tensor]) -> str:
    """A target in words: its formula's name and arguments, or the name of the function.

    >>> name_of(Value(1)), name_of(lambda output: output[:, 0])
    ('Value(index=1)', '<lambda>')
    """
    return repr(target) if isinstance(target, Target) else getattr(target, "__name__", type(target).__name__)


def _shown(value: Any) -> str:
    """A value in one line; a longer tensor by its shape, a function by its name."""
    if isinstance(value, Tensor):
        few = value.ndim == 1 and value.numel() <= 4
        return _shown(value.tolist()) if few else f"a tensor {tuple(value.shape)}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_shown, cast(Sequence[Any], value)))}]"
    if isinstance(value, float):
        return f"{value:.4g}"
    return repr(value) if isinstance(value, int | str | Target) else getattr(value, "__name__", type(value).__name__)
