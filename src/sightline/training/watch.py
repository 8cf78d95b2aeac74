"""Where a network looks while it trains: maps of the same images again and again, and whether they leave the object."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor, nn

from sightline import maps
from sightline.checks import check_tensor
from sightline.explainers import explain
from sightline.facts import percent
from sightline.metrics.localization import energy_in_mask
from sightline.metrics.uncertainty import mean_interval
from sightline.training.loggers import log_picture

_AT_ONCE = 32
_SIDE = 128  # longer side of an image that is drawn, in pixels
_GAIN = 0.1  # share of the wrong answers that must have become right: less is chance, while maps still wander
_FEWEST = 8  # images with a mask from which the rule draws conclusions


class Look(NamedTuple):
    """What was seen at one moment."""

    picture: UInt8[Tensor, "3 h w"]
    """A row per image: the image, then its maps."""
    shares: dict[str, Float[np.ndarray, " n"]]
    """Method -> share of each map's positive values in its mask; empty without masks."""
    chance: float
    """Accuracy of guessing."""


@dataclass(kw_only=True)
class Watcher:
    """The same images at every look, and what was seen so far.

    Raises:
        TypeError: pictures that are not uint8 images, or not tensors.
        ValueError: volumes, no images, or masks, labels or inputs that do not fit them.
    """

    pictures: UInt8[Tensor, "n _ h w"]
    """As they look."""
    inputs: Float[Tensor, "n _ H W"]
    """As the network takes them."""
    masks: Bool[Tensor, "n 1 h w"] | None = None
    labels: Int64[Tensor, " n"] | None = None
    """The class that is explained; None: the predicted one."""
    methods: Sequence[str] = ("grad_cam",)
    layer: str | None = None
    drawn: int = 4
    """Number of images in the picture; shares are measured on all."""
    seen: list[tuple[float, dict[str, Float[np.ndarray, " n"]]]] = field(default_factory=lambda: [])
    """Accuracy and shares of every look that was judged."""
    warned: bool = False

    def __post_init__(self) -> None:
        for name in ("pictures", "inputs"):
            check_tensor(f"{name} as a tensor (n, c, h, w)", getattr(self, name))
        if self.pictures.ndim != 4 or self.inputs.ndim != 4:
            shape = tuple((self.pictures if self.pictures.ndim != 4 else self.inputs).shape)
            raise ValueError(f"expected flat images (n, c, h, w) to watch, got {shape}; choose a slice of each volume")
        if self.pictures.dtype != torch.uint8 or self.pictures.shape[1] not in (1, 3):
            raise TypeError(
                f"expected images to watch as they look, uint8 with 1 or 3 channels, got {self.pictures.dtype} "
                f"{tuple(self.pictures.shape)}; give them before normalization, which belongs in preprocess"
            )
        count = len(self.pictures)
        for name in ("inputs", "masks", "labels"):
            value = getattr(self, name)
            if value is not None and (len(value) != count or not count):
                raise ValueError(f"expected one of {name} for each of {count or 'some'} images, got {len(value)}")
        if self.masks is not None and self.masks.shape != (count, 1, *self.pictures.shape[2:]):
            raise ValueError(
                f"expected masks of shape {(count, 1, *self.pictures.shape[2:])}, got {tuple(self.masks.shape)}"
            )
        if not self.methods:
            raise ValueError("expected at least one method, got none; name one such as grad_cam")

    def look(self, model: nn.Module) -> Look:
        """The maps at this moment; the model, its mode and gradients and all random states are left as they were."""
        device = next((tensor.device for tensor in model.parameters()), self.inputs.device)
        parts: dict[str, list[Tensor]] = {}
        classes = 2  # a single logit counts as two
        signed: tuple[str, ...] = ()
        with torch.enable_grad():
            for start in range(0, len(self.inputs), _AT_ONCE):
                rows = slice(start, start + _AT_ONCE)
                targets = None if self.labels is None else self.labels[rows].to(device)
                explanation = explain(model, self.inputs[rows].to(device), targets, self.methods, self.layer)
                classes, signed = max(classes, explanation.logits.shape[-1]), explanation.signed
                for method, one in explanation.maps.items():
                    parts.setdefault(str(method), []).append(one[:, :1].detach().float().cpu())
        found = {method: torch.cat(ones) for method, ones in parts.items()}
        shares: dict[str, Any] = {}
        if self.masks is not None:
            masks = self.masks.cpu()
            shares = {method: energy_in_mask(one, masks).numpy() for method, one in found.items()}
        return Look(self._picture(found, signed), shares, 1 / classes)

    def _picture(self, found: Mapping[str, Tensor], signed: Sequence[str]) -> UInt8[Tensor, "3 h w"]:
        pictures = self.pictures[: self.drawn].cpu()
        factor = min(1.0, _SIDE / max(pictures.shape[2:]))
        size = tuple(max(1, round(factor * side)) for side in pictures.shape[2:])
        small = maps.resize(pictures.float(), size).round().to(torch.uint8).expand(-1, 3, -1, -1)
        return maps.side_by_side(small, {method: one[: self.drawn] for method, one in found.items()}, signed=signed)

    def log(self, logger: Any, look: Look, step: int) -> None:
        """Give the picture and the mean shares to a logger of Lightning."""
        if logger is None:
            return
        log_picture(logger, "watch/maps", look.picture, step)
        means = {
            f"watch/{_plain(method)}_in_mask": np.nanmean(one) for method, one in look.shares.items() if _some(one)
        }
        if means:
            logger.log_metrics({name: float(mean) for name, mean in means.items()}, step=step)

    def judge(self, look: Look, accuracy: float | None = None) -> str:
        """One sentence, once, if the maps leave the object while the validation accuracy rises; else nothing.

        The maps of a method leave the object if, compared with the earlier look at which the largest share of them lay
        in the masks,

        - the mean difference of the shares, image by image, lies below 0 with its whole 95 % bootstrap interval;
        - the mean share is below the area of the masks, so equal weights everywhere would show more of the object;
        - the accuracy has gained a tenth or more of what it lacked; None: before training, that of guessing.
        """
        accuracy = look.chance if accuracy is None else accuracy
        if math.isnan(accuracy):
            return ""
        sentence = "" if self.warned else self._sentence(look, accuracy)
        self.seen.append((accuracy, look.shares))
        self.warned = self.warned or bool(sentence)
        return sentence

    def _sentence(self, look: Look, accuracy: float) -> str:
        for method, now in look.shares.items():
            earlier = [(before, shares[method]) for before, shares in self.seen if _some(shares[method])]
            if not earlier or self.masks is None:
                continue
            before, best = max(earlier, key=lambda one: float(np.nanmean(one[1])))
            difference = mean_interval(now - best)
            area = float(self.masks.double().mean((1, 2, 3))[torch.from_numpy(~np.isnan(now))].mean())
            mean = float(np.nanmean(now)) if _some(now) else math.nan
            rises = accuracy > before + _GAIN * (1 - before)
            if rises and difference.n >= _FEWEST and difference.high < 0 and mean < area:
                return (
                    f"maps leave the object while validation accuracy rises to {percent(accuracy)}: of {method}, "
                    f"{percent(float(np.nanmean(best)))} lay in the masks, now {percent(mean)}, less than their area "
                    f"of {percent(area)}; the network may be learning a shortcut, see the pictures watch/maps"
                )
        return ""


def _some(shares: Float[np.ndarray, " n"]) -> bool:
    return bool((~np.isnan(shares)).any())


def _plain(name: str) -> str:
    """A method as a part of a metric's name, without signs that trackers refuse.

    >>> _plain("grad_cam@layer3")
    'grad_cam_layer3'
    """
    return re.sub(r"[^\w.-]+", "_", name)
