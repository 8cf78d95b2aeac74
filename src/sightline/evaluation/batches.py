"""The data to evaluate as batches of one form, and the model's predictions for it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from sightline import inference
from sightline.checks import check_planes
from sightline.data import ImageSet, Preprocess, read_images
from sightline.evaluation.scores import digest_of, exact_text
from sightline.facts import Progress
from sightline.inference import Memory, Output, classes_of, forward_call, inputs_of, normalized, preparation

Array = np.ndarray

MEMORY = 1 << 30
"""Bytes of batches up to which data that is not an `ImageSet` stays in memory, so that it is read only once."""
PROBED = 4
"""Images on which methods are tried and timed."""


@dataclass(frozen=True)
class Batch:
    """Some of the images, and what is known about them."""

    images: Tensor
    labels: Tensor
    masks: Tensor | None
    names: list[str]
    groups: list[str] | None
    rows: Tensor
    """Place of each image in the whole data."""
    pictures: Tensor
    """uint8, to be shown."""
    forward_args: Any = ()
    """Further arguments of the model; see `explain`."""
    forward_kwargs: Mapping[str, Any] | None = None

    @property
    def digest(self) -> str:
        """The same for equal inputs of maps and scores, and for no others."""
        return digest_of(self.images, self.masks, also=exact_text((self.forward_args, self.forward_kwargs)))

    def to(self, device: str | torch.device) -> "Batch":
        """The same with what a model takes on a device."""
        of_model = ("images", "masks", "forward_args", "forward_kwargs")
        return replace(self, **_on(device, {name: getattr(self, name) for name in of_model}))

    def pieces(self, size: int) -> "Iterator[Batch]":
        """The same images, at most so many at a time."""
        places = torch.arange(len(self.names))
        for start in range(0, len(places), size):
            piece = self.only((places >= start) & (places < start + size))
            assert piece is not None
            yield piece

    def only(self, keep: Tensor) -> "Batch | None":
        """Those images alone; None where there is none."""
        if keep.all():
            return self
        if not keep.any():
            return None
        call = forward_call(self.images, None, self.forward_args, self.forward_kwargs)
        call = call.at(keep.nonzero()[:, 0].to(self.images.device))
        kept: dict[str, Any] = {"forward_args": call.args, "forward_kwargs": call.kwargs}
        for name in ("images", "labels", "masks", "rows", "pictures"):
            values: Tensor | None = getattr(self, name)
            kept[name] = None if values is None else values[keep.to(values.device)]
        for name in ("names", "groups"):
            kept[name] = getattr(self, name) and list(compress(getattr(self, name), keep.tolist()))
        return Batch(**kept)


class Source:
    """The data to evaluate, and what the first pass tells about it."""

    def __init__(
        self,
        model: nn.Module,
        data: Any,
        batch_size: int,
        memory: Memory,
        classes: Sequence[str] | None,
        preprocess: Preprocess | None = None,
    ) -> None:
        weights = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(0))
        self.model, self.preprocess, self.device = model, preprocess, weights.device
        paths: Any = [data] if isinstance(data, str | Path) else data if isinstance(data, list | tuple) else []
        told: tuple[str, ...] = ()
        if paths and all(isinstance(path, str | Path) for path in paths):
            preprocess, told = preparation(model, preprocess)
            data = read_images(paths, preprocess)
        elif paths and all(isinstance(image, Image.Image) for image in paths):
            data = [{"images": paths}]
        elif isinstance(data, ImageSet) and preprocess is not None:
            raise ValueError(
                "expected no preprocess= with an image set, which has its own; dataclasses.replace sets it"
            )
        self.data = data
        self.batch_size = batch_size
        self.memory_limit = memory
        self.has_masks = False
        images = data if isinstance(data, ImageSet) else None
        if images is None and isinstance(data, Iterator):
            raise ValueError("expected data that can be read twice, got an iterator; pass a list or a DataLoader")
        self.name = images.name if images else "images"
        self.split = images.split if images else ""
        self.unit = (images.group_name or "images") if images else "images"
        self.classes = classes or (images.classes if images else None)
        self.skipped = images.skipped if images else ()
        self.notices = (*images.notices, *told) if images else ()
        known = images.preprocess if images else preprocess
        self.mean, self.std = (known.mean, known.std) if known else (None, None)
        self.total = len(images) if images else 0
        self.sums: dict[int, Tensor] = {}  # of each image, by the first of its batch
        self.memory: list[Any] | None = None

    def batches(self, rows: Array | None = None) -> Iterator[Batch]:
        """All images, or those at sorted places."""
        if isinstance(self.data, ImageSet):
            yield from self._of_set(self.data, np.arange(len(self.data)) if rows is None else rows)
            return
        start = 0
        wanted = None if rows is None else torch.from_numpy(rows)
        for given in self._given():
            batch = self._converted(given, start)
            start += len(batch.names)
            chosen = batch if wanted is None else batch.only(torch.isin(batch.rows, wanted))
            if chosen is not None:
                yield chosen

    def _given(self) -> Iterator[Any]:
        """The batches as they come, from memory where all of them fit."""
        if self.memory is not None:
            yield from self.memory
            return
        memory, size = list[Any](), 0
        given: Any = self.data
        for batch in given:
            size += sum(leaf.nbytes for leaf in tree_leaves(batch) if isinstance(leaf, Tensor | np.ndarray))
            if size <= MEMORY:
                memory.append(batch)
            else:
                memory.clear()
            yield batch
        self.memory = memory if size <= MEMORY else None

    def _of_set(self, images: ImageSet, rows: Array) -> Iterator[Batch]:
        for at in range(0, len(rows), self.batch_size):
            batch = images.batch(rows[at : at + self.batch_size])
            pictures = batch.images
            batch = batch.to(self.device)
            yield Batch(
                images=normalized(self.model, batch.images, images.preprocess),
                labels=batch.labels.cpu(),
                masks=batch.regions,
                names=batch.names,
                groups=None if images.groups is None else [str(images.groups[i]) for i in batch.indices.tolist()],
                rows=batch.indices.cpu(),
                pictures=pictures,
            )

    def _converted(self, batch: Any, start: int) -> Batch:
        if isinstance(batch, tuple | list):
            batch = dict(zip(("images", "labels", "masks"), batch, strict=False))
        if not isinstance(batch, dict) or "images" not in batch:
            raise ValueError(
                f"expected batches (images, labels[, masks]) or dicts with 'images', got {type(batch).__name__}"
            )
        batch = {key: value for key, value in batch.items() if value is not None}
        inputs = inputs_of(self.model, batch["images"], self.preprocess)
        self.notices = (*dict.fromkeys((*self.notices, *inputs.notices)),)
        check_planes("evaluate", inputs.images.shape)
        images = inputs.images.to(self.device)
        count = len(images)
        where = f"the batch that starts with image {start}"
        self._check_same(images, start, where)
        labels = _checked_labels(batch.get("labels", [-1] * count), count, where)
        masks = _checked_masks(batch["masks"], images.shape, where) if "masks" in batch else None
        for key in ("names", "groups"):
            if key in batch and len(batch[key]) != count:
                raise ValueError(f"expected {count} {key} in {where}, got {len(batch[key])}; give one per image")
        names = inputs.names if all(inputs.names) else ()
        return Batch(
            images=images,
            labels=labels,
            masks=None if masks is None else masks.to(self.device).bool(),
            names=[str(name) for name in batch.get("names", names or [f"image {start + i}" for i in range(count)])],
            groups=[str(group) for group in batch["groups"]] if "groups" in batch else None,
            rows=torch.arange(start, start + count),
            pictures=_stretched(images) if inputs.pixels is None else inputs.pixels.cpu(),
            forward_args=_on(self.device, batch.get("forward_args", ())),
            forward_kwargs=_on(self.device, batch.get("forward_kwargs")),
        )

    def _check_same(self, images: Tensor, start: int, where: str) -> None:
        sums = images.flatten(1).sum(1, dtype=torch.float64)
        seen = self.sums.setdefault(start, sums)
        if len(seen) != len(sums) or not torch.allclose(seen, sums, rtol=0, atol=0, equal_nan=True):
            raise ValueError(
                f"expected the same images in every pass over the data, got others in {where}; "
                "leave out shuffling and random augmentation"
            )


def _stretched(images: Float[Tensor, "b c h w"]) -> UInt8[Tensor, "b 3 h w"]:
    """Pictures of normalized images: from the lowest value of each to its highest."""
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    pictures = ((images - low) / (high - low).clamp(min=1e-12) * 255).round().to(torch.uint8).cpu()
    return pictures.expand(-1, 3, -1, -1) if pictures.shape[1] == 1 else pictures[:, :3]


def _checked_labels(labels: Any, count: int, where: str) -> Int[Tensor, " b"]:
    labels = torch.as_tensor(labels).cpu()
    if labels.shape != (count,) or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(
            f"expected {count} class numbers as labels in {where}, got {labels.dtype} of shape "
            f"{tuple(labels.shape)}; give one whole number per image, -1 where it is unknown"
        )
    return labels.long()


def _checked_masks(masks: Any, shape: Sequence[int], where: str) -> Tensor:
    masks, expected = torch.as_tensor(masks), (shape[0], 1, *shape[2:])
    if masks.shape != expected:
        raise ValueError(
            f"expected masks of shape {expected} in {where}, got {tuple(masks.shape)}; make them as large as the images"
        )
    if not ((masks == 0) | (masks == 1)).all():
        raise ValueError(
            f"expected masks that are bool or 0 and 1 in {where}, got values from {masks.min()} to {masks.max()}; "
            "compare them with the values of the object"
        )
    return masks


def _on(device: str | torch.device, values: Any) -> Any:
    return tree_map(lambda value: value.to(device) if isinstance(value, Tensor) else value, values)


@dataclass(frozen=True)
class Predictions:
    """The model's predictions for all images, with their labels, names and groups."""

    classes: tuple[str, ...]
    labels: Int[Array, " n"]
    predictions: Int[Array, " n"]
    certainty: Float[Array, " n"]
    """Probability of the prediction."""
    probabilities: Float[Array, "n c"]
    names: list[str]
    groups: Array | None
    output: Output = None
    """How further outputs of the model are to be read."""
    notices: tuple[str, ...] = ()
    """How the output is read, where that was decided here."""
    first: Batch | None = None
    """The first images, at most `PROBED`."""

    def targets(self, batch: Batch) -> Int[Tensor, " b"]:
        """The predicted class of each image of a batch."""
        return torch.from_numpy(self.predictions[batch.rows.numpy()]).to(batch.images.device)

    def columns(self, rows: Array, unit: str) -> dict[str, list[Any]]:
        """The first columns of the table per image."""
        names = {"name": [self.names[row] for row in rows]}
        answers: dict[str, list[Any]] = {
            "label": [self.classes[i] if i >= 0 else "" for i in self.labels[rows]],
            "prediction": [self.classes[i] for i in self.predictions[rows]],
            "probability": self.certainty[rows].tolist(),
        }
        if self.groups is None:
            return names | answers
        return names | {"group" if unit in names | answers else unit: self.groups[rows].tolist()} | answers


def predict(model: nn.Module, source: Source, progress: Progress, output: Output = None) -> Predictions:
    """One forward over all images; tells the source whether all of them have masks.

    How the model's `output` is to be read is decided once, by the first images.

    Raises:
        ValueError: no image, logits that are not finite, labels out of range, another number of classes than the data
            has.
    """
    probabilities: list[Tensor] = []
    labels: list[int] = []
    names: list[str] = []
    groups: list[str] = []
    first, notice, has_masks = None, "", True
    for batch in source.batches():
        call = forward_call(batch.images, output, batch.forward_args, batch.forward_kwargs)
        if first is None:
            first = batch.only(torch.arange(len(batch.names)) < PROBED)
            call, notice = call.settled(model, batch.images)
            output = call.output
        _, answers = inference.answers(model, batch.images, source.batch_size, call, source.memory_limit)
        probabilities.append(answers.cpu())
        labels += batch.labels.tolist()
        names += batch.names
        groups += batch.groups or []
        has_masks &= batch.masks is not None
        progress("predicting", len(names), source.total or len(names))
    if not names:
        raise ValueError("expected at least one image to evaluate, got none; see the list of skipped images")
    source.has_masks = has_masks
    if groups and len(groups) < len(names):
        raise ValueError(f"expected groups of all {len(names)} images or of none, got {len(groups)}; name every group")
    if groups and source.unit == "images":
        source.unit = "group"
    joined = torch.cat(probabilities)
    count = joined.shape[1]
    classes = tuple(source.classes or classes_of(model, count) or map(str, range(count)))
    _check_predictions(joined, names, labels, classes)
    certainty, predictions = joined.max(1)
    return Predictions(
        classes=classes,
        labels=np.array(labels),
        predictions=predictions.numpy(),
        certainty=certainty.numpy(),
        probabilities=joined.numpy(),
        names=names,
        groups=np.array(groups) if groups else None,
        output=output,
        notices=(notice,) if notice else (),
        first=first,
    )


def _check_predictions(
    probabilities: Tensor, names: Sequence[str], labels: Sequence[int], classes: Sequence[str]
) -> None:
    if broken := np.flatnonzero(~probabilities.isfinite().all(1).numpy()).tolist():
        more = f" and {len(broken) - 1:,} more" if len(broken) > 1 else ""
        raise ValueError(
            f"expected finite logits, got others for {names[broken[0]]!r}{more}; "
            "leave out such images, or repair the weights"
        )
    count = probabilities.shape[1]
    if len(classes) != count:
        raise ValueError(f"expected a model with {len(classes)} classes like the data, got {count}; pass its own data")
    if wrong := [label for label in labels if not -1 <= label < count]:
        raise ValueError(f"expected labels in 0..{count - 1}, or -1 where unknown, got {wrong[0]}; count them from 0")
