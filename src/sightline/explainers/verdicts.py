"""Maps and the verdicts on them: reasons to distrust a map, and how strong they are."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from sightline import maps as pixels
from sightline.facts import Level, Verdict
from sightline.notebook import brief

_SAME = 0.999  # correlation of the maps of two classes
_GAPS: tuple[tuple[float, Level], ...] = ((1.0, "do not read"), (0.1, "doubt"), (0.01, "note"))
"""Least conservation gap of each level, as a share of the sum of the map's absolute values."""
_LARGEST_COPY = 2**16  # numbers in maps


@dataclass(frozen=True, kw_only=True)
class Map:
    """What a formula returns if it has more to say than the values of its map."""

    __repr__ = brief

    values: Float[Tensor, "b t *grid"]
    """Raw; larger = more important."""
    total: Float[Tensor, "b t"] | None = None
    """What each map should sum to, if that is not the explained score."""
    remarks: tuple[Verdict, ...] = ()
    """What to distrust in all of them."""


class Compared(NamedTuple):
    """What the verdicts on the maps of one method follow from."""

    maps: Float[Tensor, "b t *grid"]
    targets: Int[Tensor, "b t"]
    """The classes that they explain."""
    runner_up: Float[Tensor, "b t *grid"] | None
    """Maps of another class."""
    score: Float[Tensor, "b t"] | None
    """The explained score; None for a control, which explains none."""
    total: Float[Tensor, "b t"] | None
    """What the maps should sum to, if anything."""


class Doubts:
    """The verdicts on the maps of one method, computed when they are asked for.

    Small maps are copied, with all that is compared with them, so that the caller may change them in place before that;
    the signs of large ones are taken at once.

    Args:
        compared: the maps, and what speaks for or against them.
        is_blind_to_class: whether they are the same for all classes by construction.
        whole: what the maps should sum to, in words.
        remarks: verdicts on all of the maps.
    """

    def __init__(self, compared: Compared, *, is_blind_to_class: bool, whole: str, remarks: Sequence[Verdict]) -> None:
        self.is_blind_to_class = is_blind_to_class
        self.whole = whole
        self.remarks = remarks
        is_small = compared.maps.numel() <= _LARGEST_COPY
        values: Any = (None if value is None else value.detach() for value in compared)
        if is_small:
            values = (None if value is None else value.clone() for value in values)
        signs = partial(_signs_of, Compared(*values), is_blind_to_class)
        self._signs = signs if is_small else signs()

    def signs(self) -> Float[Tensor, "b 9"]:
        """Per image: which verdicts hold, variation, gap, whether classes were compared.

        The gap is the largest of the image's maps, with what this map sums to and what it should sum to. A tensor, so
        that the device is asked once for all methods.
        """
        return self._signs if isinstance(self._signs, Tensor) else self._signs()

    def verdicts(self, signs: list[list[float]]) -> list[list[Verdict]]:
        """Verdicts on the maps of each image, those on all of them last; an empty list means that nothing is wrong."""
        return [[*self._of_image(*row), *self.remarks] for row in signs]

    def _of_image(
        self,
        broken: float,
        flat: float,
        variation: float,
        negative: float,
        same: float,
        gap: float,
        reached: float,
        expected: float,
        _: float,
    ) -> list[Verdict]:
        verdicts: list[Verdict] = []
        if broken:
            verdicts.append(Verdict("non-finite", "do not read"))
        if flat:
            verdicts.append(Verdict("flat", "do not read"))
        elif variation < pixels.NEARLY_FLAT and not broken:
            verdicts.append(Verdict("nearly flat", "do not read", variation, f"varies {100 * variation:.1g} %"))
        if negative:
            verdicts.append(Verdict("all-negative"))
        if same:
            verdicts.append(Verdict("class-independent", "note" if self.is_blind_to_class else "doubt"))
        level: Level | None = next((level for least, level in _GAPS if gap > least), None)
        if level is not None:
            verdicts.append(Verdict("conservation gap", level, gap, reach(reached, expected, self.whole)))
        return verdicts


def _signs_of(compared: Compared, is_blind_to_class: bool) -> Float[Tensor, "b 9"]:
    maps, targets, runner_up, score, total = compared
    values = maps.flatten(2)
    low, high, absolute = values.amin(2), values.amax(2), values.abs().sum(2)
    finite = values.isfinite().flatten(1).all(1)
    if score is not None:
        finite &= score.isfinite().all(1)
    variation = pixels.variation(maps).amin(1)
    flat = finite & (variation <= pixels.ROUNDING)
    checked = torch.ones_like(flat)
    if is_blind_to_class:
        same = torch.full_like(flat, score is not None)
    elif runner_up is not None:
        same = _same(values, runner_up.flatten(2)).all(1)
    else:  # each with the next target's
        differ = targets != targets.roll(-1, 1)
        checked = differ.any(1)
        same = (_same(values, values.roll(-1, 1)) | ~differ).all(1) & checked
    sums = values.sum(2)
    expected = sums if total is None else total
    gaps, widest = ((sums - expected).abs() / absolute).max(1, keepdim=True)
    negative = finite & ((high <= 0) & (low < 0)).any(1)
    gap = [value[:, 0] for value in (gaps, sums.gather(1, widest), expected.gather(1, widest))]
    signs = [~finite, flat, variation, negative, finite & ~flat & same, *gap, checked]
    return torch.stack([sign.float() for sign in signs], 1)


def reach(reached: float, expected: float, whole: str) -> str:
    """How much of what a map should sum to is in it; both values where a percentage would say nothing.

    >>> reach(0.0015, 7.8, "logit"), reach(7.1, 7.8, "logit")
    ('0.019 % of the logit reaches the pixels', '91 % of the logit reaches the pixels')
    >>> reach(-0.94, 7.8, "logit"), reach(0.5, 0.0, "score")
    ('the pixels sum to -0.94, the logit is 7.8', 'the pixels sum to 0.5, the score is 0')
    """
    share = reached / expected if expected else math.inf
    if not 0 <= share < 10:
        return f"the pixels sum to {reached:.2g}, the {whole} is {expected:.2g}"
    return f"{100 * share:{'.2g' if share < 0.1 else '.0f'}} % of the {whole} reaches the pixels"


def _same(one: Float[Tensor, "b t n"], other: Float[Tensor, "b t n"]) -> Tensor:
    """Whether two maps are the same except for scale and offset."""
    one, other = one - one.mean(2, keepdim=True), other - other.mean(2, keepdim=True)
    return F.cosine_similarity(one, other, 2, eps=0) >= _SAME  # not a number, so not the same, where one is constant
