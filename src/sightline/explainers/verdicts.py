"""What to distrust in a map."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sightline.explainers.evidence import Evidence, Explainer

_SAME = 0.999  # correlation of the maps of two classes
_GAP = 0.01  # of the sum of the map's absolute values
_FOUND = ("non-finite", "flat", "all-negative", "class-independent")


def signs_of(
    explainer: Explainer,
    maps: Float[Tensor, "b t *grid"],
    rivals: Float[Tensor, "b t *grid"] | None,
    evidence: Evidence,
) -> Float[Tensor, "b 6"]:
    """Per image what `verdicts_of` reads: which of the names hold, the gap, and whether classes were compared.

    `rivals` are the maps of another class. A tensor, so that the device is asked once for all methods.
    """
    values = maps.detach().flatten(2)
    low, high, total = values.amin(2), values.amax(2), values.abs().sum(2)
    finite = values.isfinite().flatten(1).all(1)
    targets = evidence.score.targets
    if not explainer.is_control:
        finite &= evidence.score.of(targets).detach().isfinite().all(1)
    flat = finite & (high - low <= 1e-6 * values.abs().amax(2)).any(1)
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
    signs = [~finite, flat, finite & (high < 0).any(1), finite & ~flat & same, gaps, compared]
    return torch.stack([sign.float() for sign in signs], 1)


def verdicts_of(explainer: Explainer, evidence: Evidence, signs: list[list[float]]) -> list[list[str]]:
    """Per image, what to distrust in its maps; an empty list says that nothing was found.

    A verdict is a name, or a name and more behind a colon.
    """
    said = list(evidence.score.remarks)
    if evidence.rectifiers is not None and explainer.needs & {"guided_gradients", "deconvolved_gradients"}:
        said.append(evidence.rectifiers.verdict())
    return [
        [name for name, is_so in zip(_FOUND, row, strict=False) if is_so]
        + ([f"conservation gap: {row[4]:.0%}"] if row[4] > _GAP else [])
        + said
        for row in signs
    ]


def _same(one: Float[Tensor, "b t n"], other: Float[Tensor, "b t n"]) -> Tensor:
    """Whether two maps are the same but for scale and offset."""
    one, other = one - one.mean(2, keepdim=True), other - other.mean(2, keepdim=True)
    lengths = one.square().sum(2).sqrt() * other.square().sum(2).sqrt()
    return (one * other).sum(2) >= _SAME * lengths.where(lengths > 0, torch.inf)


def _same_among(maps: Float[Tensor, "b t n"], targets: Int[Tensor, "b t"]) -> tuple[Tensor, Tensor]:
    """Whether the maps of an image, each beside that of its next target, are the same though the classes differ.

    And whether there are two classes to compare.
    """
    differ = targets != targets.roll(-1, 1)
    return (_same(maps, maps.roll(-1, 1)) | ~differ).all(1) & differ.any(1), differ.any(1)
