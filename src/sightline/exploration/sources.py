"""Where maps come from: those of a trained run are made on the way."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import nn

from sightline.data import ImageSet, Preprocess, batches
from sightline.explainers import explain
from sightline.facts import Progress
from sightline.inference import Output, answers, forward_call, normalized

Array = np.ndarray
_BATCH = 64


class Look(NamedTuple):
    """One map."""

    place: int
    """Number of the image in its source."""
    key: str
    """Name of the image."""
    method: str
    map: Float[Array, "h w"]
    target: int
    """The explained class."""
    predicted: int
    confidence: float
    """Probability of the predicted class."""
    label: int
    """-1 where there is none."""
    split: str


@runtime_checkable
class Source(Protocol):
    """Maps of images, the images, and the network."""

    name: str
    classes: tuple[str, ...]
    methods: tuple[str, ...]
    notices: tuple[str, ...]

    def looks(self, progress: Progress | None = None) -> Iterator[Look]:
        """All maps, one by one."""
        ...

    def images(self, places: Sequence[int]) -> UInt8[Array, "n 3 h w"]:
        """Images at the size of the network's input."""
        ...

    def marked(self, places: Sequence[int]) -> Bool[Array, "n h w"] | None:
        """Where the objects of images are, if the data says so."""
        ...

    def predict(self, images: UInt8[Array, "n 3 h w"]) -> Int64[Array, " n"]:
        """The class that the network predicts for images of that size."""
        ...


class RunLooks:
    """The maps of a network for an image set, made while they are read."""

    def __init__(self, model: nn.Module, images: ImageSet, methods: Sequence[str] = ("grad_cam",)) -> None:
        """`images` are as the network wants them, with its mean and deviation and its classes."""
        self.model, self.methods = model, tuple(methods)
        self.set, self.classes = images, tuple(images.classes)
        self.name = f"{images.name} ({images.split})"
        self.notices = images.notices

    def looks(self, progress: Progress | None = None) -> Iterator[Look]:
        """All maps of the predicted classes."""
        done = 0
        for batch in batches(self.set.unmarked(), _BATCH):
            explanation = explain(
                self.model, normalized(self.model, batch.images, self.set.preprocess), None, self.methods
            )
            confidence, predicted = explanation.probabilities.max(1)
            maps = {name: values[:, 0].float().cpu().numpy() for name, values in explanation.maps.items()}
            answers_of = zip(predicted.tolist(), confidence.tolist(), batch.labels.tolist(), strict=True)
            for row, (answer, sure, label) in enumerate(answers_of):
                for method, values in maps.items():
                    yield Look(
                        place=done + row,
                        key=batch.names[row],
                        method=method,
                        map=values[row],
                        target=answer,
                        predicted=answer,
                        confidence=sure,
                        label=label,
                        split=self.set.split,
                    )
            done += len(batch.labels)
            if progress is not None:
                progress("maps", done, len(self.set))

    def images(self, places: Sequence[int]) -> UInt8[Array, "n 3 h w"]:
        """Images of the set."""
        return self.set.unmarked().batch(places).images.cpu().numpy()

    def marked(self, places: Sequence[int]) -> Bool[Array, "n h w"] | None:
        """Masks or boxes of the set; None if it has neither."""
        if not (self.set.has_masks or self.set.has_boxes):
            return None
        regions = self.set.batch(places).regions
        return None if regions is None else regions[:, 0].cpu().numpy()

    def predict(self, images: UInt8[Array, "n 3 h w"]) -> Int64[Array, " n"]:
        """The most probable class."""
        return probabilities(self.model, images, self.set.preprocess).argmax(1)


def probabilities(
    model: nn.Module, images: UInt8[Array, "n 3 h w"], preprocess: Preprocess, output: Output = None
) -> Float[Array, "n classes"]:
    """The probability of each class by a network, for images at the size of its input."""
    inputs = normalized(model, torch.from_numpy(images), preprocess)
    return answers(model, inputs, _BATCH, forward_call(inputs, output))[1].cpu().numpy()
