"""What to distrust in a map."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sightline.explainers.evidence import Evidence, Explainer

_SAME = 0.999  # correlation of the maps of two classes
_GAP = 0.01  # of the relevance


def verdicts_of(
    explainer: Explainer,
    maps: Float[Tensor, "b t *grid"],
    rivals: Float[Tensor, "b t *grid"] | None,
    evidence: Evidence,
) -> list[list[str]]:
    """Per image, what to distrust in its maps; an empty list is a clean map. `rivals` are the maps of another class.

    A verdict is a name, or a name and a figure behind a colon. The device is asked once.
    """
    values = maps.detach().flatten(2)
    low, high, total = values.amin(2), values.amax(2), values.abs().sum(2)
    finite = values.isfinite().flatten(1).all(1)
    flat = finite & (high - low <= 1e-6 * values.abs().amax(2)).any(1)
    found = {"non-finite": ~finite, "flat": flat, "all-negative": finite & (high < 0).any(1)}
    if explainer.is_blind_to_class:
        blind = torch.full_like(flat, not explainer.is_control)
    elif rivals is not None:
        blind = _same(values, rivals.detach().flatten(2)).all(1)
    else:
        blind = _same_among(values, evidence.score.targets)
    found["class-independent"] = finite & ~flat & blind
    gaps = torch.zeros_like(total[:, 0])
    if explainer.sums_to_score:
        gaps = ((values.sum(2) - evidence.score.of(evidence.score.targets).detach()).abs() / total).amax(1)
    rows = torch.stack([*found.values(), gaps], 1).tolist()
    said = [] if evidence.rectifiers is None or not explainer.needs & _RECTIFIED else [evidence.rectifiers.verdict()]
    return [
        [name for name, is_so in zip(found, row, strict=False) if is_so]
        + ([f"conservation gap: {row[-1]:.0%}"] if row[-1] > _GAP else [])
        + said
        for row in rows
    ]


_RECTIFIED = {"guided_gradients", "deconvolved_gradients"}


def _same(one: Float[Tensor, "b t n"], other: Float[Tensor, "b t n"]) -> Tensor:
    """Whether two maps are the same but for scale and offset."""
    one, other = one - one.mean(2, keepdim=True), other - other.mean(2, keepdim=True)
    lengths = one.square().sum(2).sqrt() * other.square().sum(2).sqrt()
    return (one * other).sum(2) >= _SAME * lengths.where(lengths > 0, torch.inf)


def _same_among(maps: Float[Tensor, "b t n"], targets: Int[Tensor, "b t"]) -> Tensor:
    """Whether the maps of an image, each beside that of its next target, are the same though the classes differ."""
    differ = targets != targets.roll(-1, 1)
    return (_same(maps, maps.roll(-1, 1)) | ~differ).all(1) & differ.any(1)
