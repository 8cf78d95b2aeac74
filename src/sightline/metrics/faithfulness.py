"""Does the model need what the map marks? Scores that hide or show pixels in the order of the map."""

from collections.abc import Callable, Sequence
from math import ceil

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torchvision.transforms.v2.functional import gaussian_blur

from sightline import maps as pixels
from sightline.inference import either, forward
from sightline.metrics.per_image import PerImageMean

Fill = str | float | Tensor
Score = str | Callable[[Tensor, Tensor], Tensor]


def deletion_auc(
    model: nn.Module,
    images: Float[Tensor, "b c H W"],
    targets: Int[Tensor, " b"] | Int[Tensor, "b 1"],
    maps: Float[Tensor, "b 1 h w"],
    *,
    steps: int = 32,
    fill: Fill = "zero",
    score: Score = "probability",
    batch_size: int = 64,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Float[Tensor, " b"]:
    """Area under the score of the target while pixels are replaced by `fill`, most important first; lower is better.

    The curve holds the score of the whole image and then one point after each of `steps` equal chunks of pixels (the
    last may be smaller); its x-axis is the true share of pixels replaced, from 0 to 1; the area is trapezoidal.
    Maps are resized bilinearly to the image. Tied pixels go in a fixed scattered order, so a flat map is a random
    one. A map with a value that is not finite gives NaN.
    `fill`: `"zero"` (0 in the model's input), `"mean"` (of each image), `"blur"`, a number, a (c,) tensor, or
    `"black"`, which needs `mean` and `std` of the preprocessing. `score`: `"probability"` (softmax), `"logit"`, or a
    function of (logits, targets).

    Raises:
        ValueError: shapes that do not fit, an unknown `fill` or `score`.

    Source: Petsiuk et al. 2018 (1806.07421).
    Differs: the area is on [0, 1] whatever `steps`; the unperturbed score is part of the curve.

    >>> from sightline.testing import LinearModel
    >>> image = torch.tensor([[[[0.4, 0.3], [0.2, 0.1]]]])
    >>> deletion_auc(LinearModel(torch.ones(1, 1, 2, 2)), image, torch.tensor([0]), image, steps=2, score="logit")
    tensor([0.4000])
    """
    return _area(model, images, targets, maps, False, steps, fill, score, batch_size, mean, std)


def insertion_auc(
    model: nn.Module,
    images: Float[Tensor, "b c H W"],
    targets: Int[Tensor, " b"] | Int[Tensor, "b 1"],
    maps: Float[Tensor, "b 1 h w"],
    *,
    steps: int = 32,
    fill: Fill = "zero",
    score: Score = "probability",
    batch_size: int = 64,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Float[Tensor, " b"]:
    """Area under the score of the target while an image of `fill` is replaced by its pixels, most important first.

    Higher is better; everything else as for `deletion_auc`. The curve ends with the score of the whole image.

    Raises:
        ValueError: shapes that do not fit, an unknown `fill` or `score`.

    Source: Petsiuk et al. 2018 (1806.07421).
    Differs: the paper starts from a blurred image, here the default fill is that of deletion; `fill="blur"` is a
    Gaussian of a fifth of the shorter side (at least 9 pixels, odd), sigma a quarter of that.

    >>> from sightline.testing import LinearModel
    >>> image = torch.tensor([[[[0.4, 0.3], [0.2, 0.1]]]])
    >>> insertion_auc(LinearModel(torch.ones(1, 1, 2, 2)), image, torch.tensor([0]), image, steps=2, score="logit")
    tensor([0.6000])
    """
    return _area(model, images, targets, maps, True, steps, fill, score, batch_size, mean, std)


class DeletionAUC(PerImageMean):
    """Mean `deletion_auc`."""

    function = staticmethod(deletion_auc)
    sentence = "Hiding what {method} marks brings the model's confidence down fastest (deletion AUC {score})"
    higher_is_better = False


class InsertionAUC(PerImageMean):
    """Mean `insertion_auc`."""

    function = staticmethod(insertion_auc)
    sentence = "Showing only what {method} marks brings the model's confidence up fastest (insertion AUC {score})"
    higher_is_better = True


def _area(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    maps: Tensor,
    insert: bool,
    steps: int,
    fill: Fill,
    score: Score,
    batch_size: int,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> Tensor:
    batch, _, height, width = images.shape
    if maps.ndim != 4 or maps.shape[:2] != (batch, 1):
        raise ValueError(
            f"expected maps of shape ({batch}, 1, h, w), one per image, got {tuple(maps.shape)}; pass one target"
        )
    if targets.numel() != batch:
        raise ValueError(f"expected {batch} targets, one per image, got shape {tuple(targets.shape)}")
    if steps < 1:
        raise ValueError(f"expected at least 1 step, got {steps}")
    targets = targets.reshape(batch).to(images.device)
    substitute = _substitute(images, fill, mean, std)
    importance = pixels.resize(maps.to(images.device), (height, width)).flatten(1)
    ranks = _ranks(importance)
    chunk = ceil(ranks.shape[1] / steps)
    changed = [min(step * chunk, ranks.shape[1]) for step in range(ceil(ranks.shape[1] / chunk) + 1)]
    start, end = (substitute, images) if insert else (images, substitute)
    points = torch.tensor(changed, device=images.device)
    pairs = torch.cartesian_prod(torch.arange(batch), torch.arange(len(changed))).to(images.device)
    scores: list[Tensor] = []
    for image, point in (pair.T for pair in pairs.split(batch_size)):
        done = (ranks[image] < points[point][:, None]).reshape(-1, 1, height, width)
        logits = forward(model, torch.where(done, end[image], start[image]), batch_size)
        scores.append(_score(logits, targets[image], score))
    curve = torch.cat(scores).reshape(batch, -1).double()
    share = points.double() / ranks.shape[1]
    area = torch.trapezoid(curve, share, dim=1)
    return area.where(importance.isfinite().all(1), torch.nan).float()


def _ranks(importance: Float[Tensor, "b n"]) -> Int[Tensor, "b n"]:
    """Place of each pixel in the order of decreasing importance."""
    scatter = torch.randperm(importance.shape[1], generator=torch.Generator().manual_seed(0)).to(importance.device)
    order = scatter[importance[:, scatter].argsort(dim=1, descending=True, stable=True)]
    places = torch.arange(importance.shape[1], device=importance.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)


def _score(logits: Tensor, targets: Tensor, score: Score) -> Tensor:
    if callable(score):
        return score(logits, targets)
    if score not in ("probability", "logit"):
        raise ValueError(f"expected score 'probability', 'logit' or a function, got {score!r}")
    return (either(logits).softmax(1) if score == "probability" else logits).gather(1, targets[:, None])[:, 0]


def _substitute(images: Tensor, fill: Fill, mean: Sequence[float] | None, std: Sequence[float] | None) -> Tensor:
    """What replaces a pixel: images of the same shape."""
    channels = images.shape[1]
    if isinstance(fill, Tensor):
        if fill.shape != (channels,):
            raise ValueError(f"expected a fill of shape ({channels},), one number per channel, got {tuple(fill.shape)}")
        return fill.to(images)[None, :, None, None].expand_as(images)
    if fill == "zero" or isinstance(fill, int | float):
        return torch.full_like(images, 0.0 if isinstance(fill, str) else fill)
    if fill == "mean":
        return images.mean((2, 3), keepdim=True).expand_as(images)
    if fill == "blur":
        side = max(min(images.shape[2:]) // 5, 9) // 2 * 2 + 1
        reach = min(side, 2 * min(images.shape[2:]) - 1)  # the reflected border is at most one pixel short of the image
        return gaussian_blur(images, [reach, reach], [side / 4, side / 4])
    if fill == "black":
        if mean is None or std is None:
            raise ValueError("expected mean= and std= of the preprocessing for fill='black', got none; pass them")
        black = -torch.tensor(mean).to(images) / torch.tensor(std).to(images)
        return black[None, :, None, None].expand_as(images)
    raise ValueError(f"expected fill 'zero', 'mean', 'blur', 'black', a number or a ({channels},) tensor, got {fill!r}")
