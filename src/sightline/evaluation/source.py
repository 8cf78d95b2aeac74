"""The data to evaluate, in one form whatever it came as, and the model's answers to it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from sightline import inference
from sightline.checks import check_planes
from sightline.data import ImageSet, normalize
from sightline.evaluation.parts import digest_of, exact_text
from sightline.facts import Interval, Progress
from sightline.inference import Output, check_images, forward_call
from sightline.metrics.uncertainty import mean_interval, wilson_interval

Array = np.ndarray


@dataclass(frozen=True)
class Known:
    """A batch in one form, whatever it came as."""

    images: Tensor
    labels: Tensor
    masks: Tensor | None
    names: list[str]
    groups: list[str] | None
    rows: Tensor
    """Place of each image among all."""
    pictures: Tensor
    """uint8, to be shown."""
    forward_args: Any = ()
    """What the model takes beside the images; see `explain`."""
    forward_kwargs: Mapping[str, Any] | None = None

    @property
    def digest(self) -> str:
        """The same for what maps and scores are made of, and for nothing else."""
        return digest_of(self.images, self.masks, also=exact_text((self.forward_args, self.forward_kwargs)))

    def picked(self, keep: Tensor) -> "Known | None":
        """Those images alone; None where there is none."""
        if keep.all():
            return self
        if not keep.any():
            return None
        at = keep.nonzero()[:, 0]
        on = at.to(self.images.device)
        call = forward_call(self.images, None, self.forward_args, self.forward_kwargs).at(on)
        return Known(
            images=self.images[on],
            labels=self.labels[at],
            masks=None if self.masks is None else self.masks[on],
            names=[self.names[i] for i in at.tolist()],
            groups=None if self.groups is None else [self.groups[i] for i in at.tolist()],
            rows=self.rows[at],
            pictures=self.pictures[at],
            forward_args=call.args,
            forward_kwargs=call.kwargs,
        )


class Source:
    """The data to evaluate, and what is learned of it on the first pass."""

    def __init__(self, model: nn.Module, data: Any, batch_size: int, classes: Sequence[str] | None) -> None:
        weights = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(0))
        self.device, self.dtype = weights.device, weights.dtype
        self.data = data
        self.batch_size = batch_size
        self.has_masks = False
        own = data if isinstance(data, ImageSet) else None
        if own is None and isinstance(data, Iterator):
            raise ValueError("expected data that can be read twice, got an iterator; pass a list or a DataLoader")
        self.name = own.name if own else "images"
        self.split = own.split if own else ""
        self.unit = (own.group_name or "images") if own else "images"
        self.classes = classes or (own.classes if own else None)
        self.skipped = list(own.skipped) if own else []
        self.notices = own.notices if own else ()
        self.mean, self.std = (own.preprocess.mean, own.preprocess.std) if own else (None, None)
        self.total = len(own) if own else 0
        self.sums: dict[int, Tensor] = {}  # of each image, by the first of its batch

    def batches(self, rows: Array | None) -> Iterator[Known]:
        """All images, or those at sorted places."""
        if isinstance(self.data, ImageSet):
            yield from self._own(self.data, np.arange(len(self.data)) if rows is None else rows)
            return
        start = 0
        wanted = None if rows is None else torch.from_numpy(rows)
        for batch in self.data:
            known = self._foreign(batch, start)
            start += len(known.names)
            picked = known if wanted is None else known.picked(torch.isin(known.rows, wanted))
            if picked is not None:
                yield picked

    def _own(self, images: ImageSet, rows: Array) -> Iterator[Known]:
        for at in range(0, len(rows), self.batch_size):
            batch = images.batch(rows[at : at + self.batch_size])
            pictures = batch.images
            batch = batch.to(self.device)
            yield Known(
                images=normalize(batch.images, images.preprocess).to(self.dtype),
                labels=batch.labels.cpu(),
                masks=batch.regions,
                names=batch.names,
                groups=None if images.groups is None else [str(images.groups[i]) for i in batch.indices.tolist()],
                rows=batch.indices.cpu(),
                pictures=pictures,
            )

    def _foreign(self, batch: Any, start: int) -> Known:
        if isinstance(batch, tuple | list):
            batch = dict(zip(("images", "labels", "masks"), batch, strict=False))
        if not isinstance(batch, dict) or not isinstance(batch.get("images"), Tensor):
            raise ValueError(
                f"expected batches (images, labels[, masks]) or dicts with 'images', got {type(batch).__name__}"
            )
        where = f"the batch that starts with image {start}"
        batch = {key: value for key, value in batch.items() if value is not None}
        check_images(batch["images"])
        check_planes("evaluate", batch["images"].shape)
        images = batch["images"].to(self.device)
        masks = torch.as_tensor(batch["masks"]) if "masks" in batch else None
        sums = images.flatten(1).sum(1, dtype=torch.float64)
        seen = self.sums.setdefault(start, sums)
        if len(seen) != len(sums) or not torch.allclose(seen, sums, rtol=0, atol=0, equal_nan=True):
            raise ValueError(
                f"expected the same images in every pass over the data, got others in {where}; "
                "leave out shuffling and random augmentation"
            )
        count = len(images)
        labels = torch.as_tensor(batch.get("labels", [-1] * count)).cpu()
        if labels.shape != (count,) or labels.is_floating_point() or labels.dtype == torch.bool:
            raise ValueError(
                f"expected {count} class numbers as labels in {where}, got {labels.dtype} of shape "
                f"{tuple(labels.shape)}; give one whole number per image, -1 where it is unknown"
            )
        if masks is not None and masks.shape != (count, 1, *images.shape[2:]):
            raise ValueError(
                f"expected masks of shape {(count, 1, *images.shape[2:])} in {where}, got {tuple(masks.shape)}; "
                "make them as large as the images"
            )
        if masks is not None and not ((masks == 0) | (masks == 1)).all():
            raise ValueError(
                f"expected masks that are bool or 0 and 1 in {where}, got values from {masks.min()} to {masks.max()}; "
                "compare them with the values of the object"
            )
        for key in ("names", "groups"):
            if key in batch and len(batch[key]) != count:
                raise ValueError(f"expected {count} {key} in {where}, got {len(batch[key])}; give one per image")
        low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
        pictures = ((images - low) / (high - low).clamp(min=1e-12) * 255).round().to(torch.uint8).cpu()
        return Known(
            images=images,
            labels=labels.long(),
            masks=None if masks is None else masks.to(self.device).bool(),
            names=[str(name) for name in batch.get("names", [f"image {start + i}" for i in range(count)])],
            groups=[str(group) for group in batch["groups"]] if "groups" in batch else None,
            rows=torch.arange(start, start + count),
            pictures=pictures.expand(-1, 3, -1, -1) if pictures.shape[1] == 1 else pictures[:, :3],
            forward_args=_on(self.device, batch.get("forward_args", ())),
            forward_kwargs=_on(self.device, batch.get("forward_kwargs")),
        )


def _on(device: torch.device, values: Any) -> Any:
    return tree_map(lambda value: value.to(device) if isinstance(value, Tensor) else value, values)


@dataclass(frozen=True)
class Answers:
    """What the model said of all images, and what is known of them."""

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
    """What was decided for that."""

    def quality(self, seed: int) -> tuple[Interval | None, float | None, Array | None]:
        """Accuracy, share of the most frequent class, confusion matrix; of the labeled images."""
        known = self.labels >= 0
        if not known.any():
            return None, None, None
        labels, predictions = self.labels[known], self.predictions[known]
        correct = labels == predictions
        confusion = np.zeros((len(self.classes), len(self.classes)), dtype=np.int64)
        np.add.at(confusion, (labels, predictions), 1)
        if self.groups is None:
            accuracy = wilson_interval(int(correct.sum()), len(correct))
        else:
            accuracy = mean_interval(correct.astype(float), self.groups[known], seed)
        return accuracy, float(confusion.sum(1).max() / len(labels)), confusion

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


def predict(model: nn.Module, source: Source, progress: Progress, output: Output = None) -> Answers:
    """One forward over all images; tells the source whether all of them have masks.

    How the model's `output` is to be read is decided once, by the first images.

    Raises:
        ValueError: no image, logits that are not finite, labels out of range, another number of classes than the data
            has.
    """
    shares: list[Tensor] = []
    labels: list[int] = []
    names: list[str] = []
    groups: list[str] = []
    masked = True
    notice = ""
    for batch in source.batches(None):
        call = forward_call(batch.images, output, batch.forward_args, batch.forward_kwargs)
        if not shares:
            call, notice = call.settled(model, batch.images)
            output = call.output
        shares.append(inference.answers(model, batch.images, source.batch_size, call)[1].cpu())
        labels += batch.labels.tolist()
        names += batch.names
        groups += batch.groups or []
        masked &= batch.masks is not None
        progress("predicting", len(names), source.total or len(names))
    if not shares:
        raise ValueError("expected at least one image to evaluate, got none; see the list of skipped images")
    source.has_masks = masked
    if groups and len(groups) < len(names):
        raise ValueError(f"expected groups of all {len(names)} images or of none, got {len(groups)}; name every group")
    if groups and source.unit == "images":
        source.unit = "group"
    probabilities = torch.cat(shares)
    if broken := [name for name, of in zip(names, probabilities.isfinite().all(1).tolist(), strict=True) if not of]:
        more = f" and {len(broken) - 1:,} more" if len(broken) > 1 else ""
        raise ValueError(
            f"expected finite logits, got others for {broken[0]!r}{more}; leave such images out, or mend the weights"
        )
    certainty, predictions = probabilities.max(1)
    count = probabilities.shape[1]
    classes = tuple(source.classes or map(str, range(count)))
    if len(classes) != count:
        raise ValueError(
            f"expected a model with {len(classes)} classes like the data, got {count}; give it its own data"
        )
    if strange := [label for label in labels if not -1 <= label < count]:
        raise ValueError(f"expected labels in 0..{count - 1}, or -1 where unknown, got {strange[0]}; count them from 0")
    return Answers(
        classes=classes,
        labels=np.array(labels),
        predictions=predictions.numpy(),
        certainty=certainty.numpy(),
        probabilities=probabilities.numpy(),
        names=names,
        groups=np.array(groups) if groups else None,
        output=output,
        notices=(notice,) if notice else (),
    )
