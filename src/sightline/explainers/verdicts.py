"""Verdicts: reasons to distrust a map, and how strong they are."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sightline import maps as pixels
from sightline.explainers.evidence import Evidence, Explainer
from sightline.facts import Level, Verdict

_SAME = 0.999  # correlation of the maps of two classes
_GAPS: tuple[tuple[float, Level], ...] = ((1.0, "do not read"), (0.1, "doubt"), (0.01, "note"))
"""Least conservation gap of each level, as a share of the sum of the map's absolute values."""


def signs_of(
    explainer: Explainer,
    maps: Float[Tensor, "b t *grid"],
    rivals: Float[Tensor, "b t *grid"] | None,
    evidence: Evidence,
) -> Float[Tensor, "b 7"]:
    """The input of `verdicts_of`, per image: which verdicts hold, variation, gap, and whether classes were compared.

    `rivals` are the maps of another class. A tensor, so that the device is asked once for all methods.
    """
    values = maps.detach().flatten(2)
    low, high, total = values.amin(2), values.amax(2), values.abs().sum(2)
    finite = values.isfinite().flatten(1).all(1)
    targets = evidence.score.targets
    if not explainer.is_control:
        finite &= evidence.score.of(targets).detach().isfinite().all(1)
    variation = pixels.variation(maps.detach()).amin(1)
    flat = finite & (variation <= pixels.ROUNDING)
    compared = torch.ones_like(flat)
    if explainer.is_blind_to_class:
        same = torch.full_like(flat, not explainer.is_control)
    elif rivals is not None:
        same = _same(values, rivals.detach().flatten(2)).all(1)
    else:
        same, compared = _same_among(values, targets)
    gaps = torch.zeros_like(total[:, 0])
    if explainer.sums_to_score:
        score = (evidence.score.of(targets) - evidence.score.origin).detach()
        gaps = ((values.sum(2) - score).abs() / total).amax(1)
    negative = finite & ((high <= 0) & (low < 0)).any(1)
    signs = [~finite, flat, variation, negative, finite & ~flat & same, gaps, compared]
    return torch.stack([sign.float() for sign in signs], 1)


def verdicts_of(explainer: Explainer, evidence: Evidence, signs: list[list[float]]) -> list[list[Verdict]]:
    """Verdicts on the maps of each image; an empty list means that nothing was found."""
    of_all = list(evidence.score.remarks)
    rectifiers = evidence.rectifiers
    if rectifiers is not None and explainer.needs & {"guided_gradients", "deconvolved_gradients"}:
        of_all.append(rectifiers.verdict())

    def of_image(
        broken: float, flat: float, variation: float, negative: float, same: float, gap: float, _: float
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
            verdicts.append(Verdict("class-independent", "note" if explainer.is_blind_to_class else "doubt"))
        level: Level | None = next((level for least, level in _GAPS if gap > least), None)
        if level is not None:
            verdicts.append(Verdict("conservation gap", level, gap, f"{gap:.0%}"))
        return verdicts

    return [of_image(*row) + of_all for row in signs]


def _same(one: Float[Tensor, "b t n"], other: Float[Tensor, "b t n"]) -> Tensor:
    """Whether two maps are the same except for scale and offset."""
    one, other = one - one.mean(2, keepdim=True), other - other.mean(2, keepdim=True)
    lengths = one.square().sum(2).sqrt() * other.square().sum(2).sqrt()
    return (one * other).sum(2) >= _SAME * lengths.where(lengths > 0, torch.inf)


def _same_among(maps: Float[Tensor, "b t n"], targets: Int[Tensor, "b t"]) -> tuple[Tensor, Tensor]:
    """Whether an image's maps for different classes, each compared with the next target's, are the same.

    Also whether there are two classes to compare.
    """
    differ = targets != targets.roll(-1, 1)
    return (_same(maps, maps.roll(-1, 1)) | ~differ).all(1) & differ.any(1), differ.any(1)
