"""A list of pytorch-grad-cam's targets, one for each image, as one target of `explain`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sightline.compat.differences import note
from sightline.compat.pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from sightline.inference.outputs import logits_of
from sightline.targets import Target

ModelTarget = Callable[[Any], Tensor]
"""From one row of the model's output to a number."""


def rows_of(output: Any) -> Any:
    """What the targets see one by one: rows of a tensor, detections of a list, or rows of the logits."""
    return output if isinstance(output, Tensor | list) else logits_of(output)


def highest(outputs: Any) -> list[ModelTarget]:
    """The class with the highest output of each image."""
    if not isinstance(outputs, Tensor) or outputs.ndim != 2:
        got = f"shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ValueError(f"expected targets for a model that returns no classes (b, n), got none with {got}; pass them")
    return [ClassifierOutputTarget(category) for category in outputs.argmax(1).tolist()]


@dataclass(frozen=True, eq=False, repr=False)
class OfEach(Target):
    """The target of each image, from the row of the model's output that is its own."""

    targets: Sequence[ModelTarget] | None
    """None: the model's output for the images decides, by `choose`."""
    choose: Callable[[Any], Sequence[ModelTarget]] = highest
    name: str = ""
    """Who asks; see `report`."""
    keep: Callable[[Any], None] = lambda outputs: None
    """Called with the model's output for the images."""

    def __call__(self, output: Any) -> Float[Tensor, " b"]:
        """One score per image."""
        assert self.targets is not None
        rows = zip(self.targets, rows_of(output), strict=True)
        return torch.stack([_number(target, target(row)) for target, row in rows])

    def fixed(self, output: Any) -> "OfEach":
        """One target for each of these images."""
        rows = rows_of(output)
        self.keep(rows)
        targets = self.choose(rows) if self.targets is None else list(self.targets)
        if len(targets) == 1 < len(rows):
            note(
                self.name,
                "with one target for several images, pytorch-grad-cam leaves all but the first without a map; here it "
                "is used for all of them.",
            )
            targets = [*targets] * len(rows)
        if len(targets) != len(rows):
            raise ValueError(f"expected a target for each of {len(rows)} images, got {len(targets)}; pass as many")
        return replace(self, targets=targets)

    def at(self, rows: Int[Tensor, " n"]) -> "OfEach":
        """Each image's own target."""
        assert self.targets is not None
        return replace(self, targets=[self.targets[row] for row in rows.tolist()])

    def __repr__(self) -> str:
        return ", ".join(dict.fromkeys(map(_name, self.targets or ())))


def _number(target: ModelTarget, score: Tensor) -> Tensor:
    if score.numel() != 1:
        raise ValueError(
            f"expected one number per image from {_name(target)}, got shape {tuple(score.shape)}; sum it, or pick one"
        )
    return score.reshape(())


def _name(target: ModelTarget) -> str:
    return target.__name__ if hasattr(target, "__name__") else f"{type(target).__name__}({_arguments(target)})"


def _arguments(target: ModelTarget) -> str:
    return ", ".join(str(value) for value in getattr(target, "__dict__", {}).values() if isinstance(value, int | str))
