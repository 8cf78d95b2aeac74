"""Maps from the scores of perturbed images: patches covered, pixels masked, or channels of a layer set to 0."""

from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.hooks import RemovableHandle

from sightline import maps
from sightline.checks import check_whole
from sightline.explainers.explainer import Explainer
from sightline.explainers.scorer import Scorer, rows_of
from sightline.inference import untouched, wide

__all__ = ["occlusion", "rise", "score_cam", "ablation_cam"]


@partial(Explainer, is_signed=True, many_passes=True)
def occlusion(
    images: Float[Tensor, "b c *grid"],
    score: Scorer,
    patch: int | None = None,
    stride: int | None = None,
    fill: float = 0.0,
) -> Float[Tensor, "b t *grid"]:
    """By how much the logit drops when a patch is covered; a pixel gets the mean over the patches that contain it.

    Args:
        patch: side of the square patches in pixels. None: an eighth of each side of the image.
        stride: step between patches. None: half the patch.
        fill: value of a covered pixel, in the model's input (0 = the mean color of normalized images).

    Raises:
        ValueError: a patch larger than the image, or a stride that leaves gaps between the patches.

    Source: Zeiler and Fergus 2014 (1311.2901), section 4.2.
    Elsewhere: `Occlusion` (captum), `Occlusion` (zennit).

    Differs: the paper plots the probability at the center of the patch; here all pixels of the patch get the drop of
    the logit, and the last patches are moved inwards so that they lie entirely in the image.

    >>> from sightline.testing import LinearModel
    >>> images, model = torch.tensor([[[[1.0, 2.0]]]]), LinearModel(torch.tensor([[[[3.0, 5.0]]]]).repeat(2, 1, 1, 1))
    >>> score = Scorer(model, 0)
    >>> _ = score.begin(images)
    >>> occlusion.formula(images, score).tolist()  # weight x image
    [[[[3.0, 10.0]]]]
    """
    if not isinstance(fill, int | float):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"expected a number as fill of occlusion, in the model's input, got {fill!r}")
    covered = _covered(images, patch, stride)
    positions = torch.Size([len(table) for table in covered])
    patches = positions.numel()

    def occluded(items: Tensor) -> tuple[Tensor, Tensor]:
        rows = items // patches
        holes, left = torch.ones_like(items, dtype=torch.bool), items % patches
        for table in reversed(covered):  # torch.unravel_index would wait for a GPU
            holes = table[left % len(table)].view(len(items), -1, *[1] * (holes.ndim - 1)) & holes[:, None]
            left = left // len(table)
        return torch.where(holes[:, None], fill, images[rows]), rows

    scores = score.collect("occlusion", len(images) * patches, occluded, score).unflatten(0, (len(images), -1))
    drops = (score.of(score.targets)[:, None] - scores).mT.unflatten(2, positions)
    for table in covered:  # the patches over a pixel are a product of its rows and columns: so is their mean
        drops = torch.einsum("btp...,ps->bt...s", drops, table.to(drops) / table.sum(0))
    return drops


@partial(Explainer, many_passes=True)
def rise(
    images: Float[Tensor, "b c *grid"],
    score: Scorer,
    masks: int = 2000,
    cells: int = 8,
    keep: float = 0.5,
    seed: int = 0,
) -> Float[Tensor, "b t *grid"]:
    r"""Random masks, summed, each weighted by the probability of the class in the masked image.

    $\frac{1}{Np} \sum_i f(x \odot M_i) \, M_i$ with $f$ the softmax probability, or the probability that the model
    itself returns. A mask is a coarse grid of zeros and ones, enlarged bilinearly and shifted at random; all images get
    the same masks. The map estimates the probability given that the pixel is visible, so it is positive even where
    nothing matters.

    Args:
        masks: number of masks, $N$.
        cells: cells of the grid along each side.
        keep: probability $p$ that a cell is kept.
        seed: seed of the masks; the global random state is not used.

    Raises:
        ValueError: fewer than one mask or cell, or `keep` outside (0, 1].

    Source: Petsiuk et al. 2018 (1806.07421), eq. 6 and section 3.2.

    Differs: cells are $\lceil H/h \rceil$ pixels large, as in the authors' code; the paper rounds down. In the half
    cell along the border a mask keeps the value of its outermost cell; the authors' code mirrors the grid there.
    """
    check_whole(masks=masks, cells=cells, seed=seed)
    if min(masks, cells) < 1 or not 0 < keep <= 1:
        raise ValueError(f"expected masks and cells of at least 1 and keep in (0, 1], got {masks}, {cells} and {keep}")
    sides = images.shape[2:]
    generator = torch.Generator().manual_seed(seed)
    dtype = wide(images)
    drawn = torch.rand(masks, *[cells] * len(sides), generator=generator, dtype=torch.float32, device="cpu") < keep
    grids = drawn.to(images.device, dtype)
    ramps: list[tuple[Tensor, Tensor]] = []  # per axis: weight of each cell in each pixel by shift, and the shifts
    for side in sides:
        cell = -(-side // cells)
        ramp = F.interpolate(torch.eye(cells, dtype=dtype, device="cpu")[None], (cells + 1) * cell, mode="linear")[0]
        shifts = torch.randint(cell, (masks,), generator=generator, device="cpu")
        ramps.append((ramp.unfold(1, side, 1).to(images.device), shifts.to(images.device)))

    def mask(chosen: Tensor) -> Tensor:
        enlarged = grids[chosen]
        for ramp, shifts in ramps:
            enlarged = torch.einsum("nk...,kns->n...s", enlarged, ramp[:, shifts[chosen]])
        return enlarged

    def masked(items: Tensor) -> tuple[Tensor, Tensor]:
        rows = items % len(images)
        return images[rows] * mask(items // len(images))[:, None].to(images.dtype), rows

    weights = score.collect("rise", masks * len(images), masked, score.probabilities).unflatten(0, (masks, -1))
    chunks = torch.arange(masks, device=images.device).split(score.batch_size)
    parts = (torch.einsum("nbt,n...->bt...", weights[chunk], mask(chunk).to(weights.dtype)) for chunk in chunks)
    return sum(parts, weights.new_zeros(())) / (masks * keep)


@partial(Explainer, many_passes=True)
def score_cam(
    images: Float[Tensor, "b c *grid"],
    activations: Float[Tensor, "b k *small"],
    score: Scorer,
    channels: int | None = None,
) -> Float[Tensor, "b t *small"]:
    r"""Channels weighted by the logit of the image seen through them, $\mathrm{ReLU}(\sum_k w_k^c A^k)$.

    The image is multiplied by each channel, which is first enlarged bilinearly and scaled to [0, 1]; the weights are
    the softmax over the channels of the logits of these images. A constant channel hides the whole image: it gets
    weight 0 and does not enter the softmax.

    Args:
        channels: use only this many channels, those with the largest norm in each image. None: all.

    Raises:
        ValueError: fewer than one channel.

    Source: Wang et al. 2020 (1910.01279), algorithm 1. Its baseline $f(X_b)$ is the same for all channels and cancels.
    Elsewhere: `ScoreCAM` (pytorch-grad-cam), `ScoreCAM` (torch-cam).

    Differs: from the authors' code, whose weights are the class's probabilities, not a softmax over channels; from
    pytorch-grad-cam, which enlarges with aligned corners, and torch-cam, which scales before it enlarges: both also
    weight flat channels.
    """
    weights = score_weights(images, activations, score, channels)
    return torch.einsum("bkt,bk...->bt...", weights, activations).relu()


@partial(Explainer, many_passes=True)
def ablation_cam(
    images: Float[Tensor, "b c *grid"],
    activations: Float[Tensor, "b k *small"],
    head: Float[Tensor, "n k"] | None,
    layer: str,
    call: int,
    score: Scorer,
) -> Float[Tensor, "b t *small"]:
    r"""Channels weighted by the fraction of the logit that is lost without them, $\mathrm{ReLU}(\sum_k w_k^c A^k)$.

    $w_k^c = (y^c - y_k^c) / y^c$, with $y_k^c$ the logit when channel $k$ of the layer is set to 0. Behind global
    average pooling and one linear layer that is $w_k \, \mathrm{mean}(A^k) / y^c$. Otherwise the part of the model
    before the layer runs on one image, and the part behind it on that image's ablated versions; where the model does
    not allow this (it joins the layer's output with an earlier tensor), the whole model runs on copies of the image.

    A logit below 0 reverses the sign of the weights; if the logit is exactly 0, all weights are 0.

    Raises:
        ValueError: the layer is no module, and what is behind it is not global average pooling and one linear layer.

    Source: Desai and Ramaswamy 2020, "Ablation-CAM: Visual Explanations for Deep Convolutional Network via
    Gradient-free Localization", eqs. 3 and 4.
    Elsewhere: `AblationCAM` (pytorch-grad-cam).

    Differs: from pytorch-grad-cam, which sets a channel to its layer's minimum less 1e7 where the layer has negative
    values.
    """
    weights = ablation_weights(images, activations, head, layer, call, score)
    return torch.einsum("bkt,bk...->bt...", weights, activations).relu()


def score_weights(
    images: Float[Tensor, "b c *grid"],
    activations: Float[Tensor, "b k *small"],
    score: Scorer,
    channels: int | None = None,
) -> Float[Tensor, "b k t"]:
    """The channels' weights of `score_cam`."""
    check_whole(channels=channels)
    if channels is not None and channels < 1:
        raise ValueError(f"expected channels of at least 1, got {channels}; leave it out for all")
    flat = activations.flatten(2)
    chosen = flat.amax(2) - flat.amin(2) > 8 * torch.finfo(flat.dtype).eps * flat.abs().amax(2)
    if channels is not None and channels < flat.shape[1]:
        most = flat.norm(dim=2).where(chosen, -1).topk(channels, dim=1).indices
        chosen = chosen & torch.zeros_like(chosen).scatter(1, most, True)
    rows, columns = chosen.nonzero(as_tuple=True)

    def seen(items: Tensor) -> tuple[Tensor, Tensor]:
        row = rows[items]
        masks = maps.resize(activations[row, columns[items], None], tuple(images.shape[2:]))
        dims = tuple(range(2, masks.ndim))
        low, high = masks.amin(dims, keepdim=True), masks.amax(dims, keepdim=True)
        masks = (masks - low) / (high - low).clamp(min=torch.finfo(masks.dtype).tiny)
        return images[row] * masks.to(images.dtype), row

    scores = activations.new_full((*chosen.shape, score.targets.shape[1]), torch.finfo(activations.dtype).min)
    if len(rows):
        scores[rows, columns] = score.collect("score_cam", len(rows), seen, score).to(scores.dtype)
    return scores.softmax(1).where(chosen[..., None], 0)


def ablation_weights(
    images: Float[Tensor, "b c *grid"],
    activations: Float[Tensor, "b k *small"],
    head: Float[Tensor, "n k"] | None,
    layer: str,
    call: int,
    score: Scorer,
) -> Float[Tensor, "b k t"]:
    """The channels' weights of `ablation_cam`."""
    whole = score.of(score.targets)[:, None].to(activations.dtype)
    if head is not None:
        lost = activations.flatten(2).mean(2)[:, :, None] * rows_of(head, score.targets).mT
    else:
        lost = whole - _ablated_scores(images, activations, layer, call, score)
    return torch.where(whole != 0, lost / whole, 0)


def _covered(images: Tensor, patch: int | None, stride: int | None) -> list[Bool[Tensor, "positions side"]]:
    """Which pixels each patch covers, along each axis."""
    check_whole(patch=patch, stride=stride)
    sides = images.shape[2:]
    if patch is not None and not 1 <= patch <= min(sides):
        raise ValueError(f"expected patch in 1..{min(sides)}, the shortest side of the images, got {patch}")
    covered: list[Tensor] = []
    for side in sides:
        length = patch or max(1, round(side / 8))
        step = max(1, length // 2) if stride is None else stride
        if not 1 <= step <= length:
            raise ValueError(f"expected stride in 1..{length}, the side of a patch, got {step}; it leaves gaps")
        pixels = torch.arange(side, device=images.device)
        starts = torch.arange(0, side - length + step, step, device=images.device).clamp(max=side - length)[:, None]
        covered.append((pixels >= starts) & (pixels < starts + length))
    return covered


def _ablated_scores(
    images: Float[Tensor, "b c *grid"], activations: Float[Tensor, "b k *small"], layer: str, call: int, score: Scorer
) -> Float[Tensor, "b k t"]:
    """Scores of each image without its first, second, ... channel."""
    group = activations.shape[1]
    with untouched(score.model) as net:
        module = dict(net.named_modules()).get(layer)
    if module is None:
        raise ValueError(
            f"expected a layer that is a module of the model for ablation_cam, got {layer!r}; pass layer= "
            "(see model.named_modules())"
        )
    copies = False

    def ablated(items: Tensor, rows: Tensor) -> Tensor:
        nonlocal copies
        inputs = images[rows[:1]].expand(len(items), *images.shape[1:])
        if not copies:
            first_only = net.register_forward_pre_hook(lambda module, inputs: (inputs[0][:1], *inputs[1:]))
            try:
                with _ablating(module, call, items % group, activations), first_only:
                    return score(inputs, rows)
            except torch.OutOfMemoryError:
                raise
            except (AssertionError, IndexError, RuntimeError, TypeError, ValueError):
                # One image before the layer and many behind it do not fit; a model that fails anyway fails again.
                copies = True
        with _ablating(module, call, items % group, activations):
            return score(inputs, rows)

    total = len(images) * group
    scores = score.collect("ablation_cam", total, lambda items: (items, items // group), ablated, group=group)
    return scores.unflatten(0, (len(images), group))


def _ablating(
    module: nn.Module, call: int, channels: Int[Tensor, " n"], activations: Float[Tensor, "b k *small"]
) -> RemovableHandle:
    """In that run of the module the n-th row of its output lacks the n-th of these channels."""
    count, grid = activations.shape[1], activations.shape[2:]
    keep = torch.arange(count, device=channels.device) != channels[:, None]

    calls = iter(range(call + 1))

    def ablate(module: nn.Module, inputs: Any, output: Any) -> Any:
        if next(calls, None) != call:
            return None
        leaves, spec = tree_flatten(output)
        for index, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and leaf.ndim > 2:
                first = leaf.shape[1:] == (count, *grid)
                if first or (leaf.shape[-1] == count and leaf.shape[1:-1].numel() >= grid.numel()):
                    kept = keep.view(len(keep), *[1] * (leaf.ndim - 2), count)
                    leaves[index] = leaf.where(kept.movedim(-1, 1) if first else kept, 0)
                    return tree_unflatten(leaves, spec)
        raise ValueError(
            f"expected a layer that yields {count} channels on a grid of {' x '.join(map(str, grid))}, got none in its "
            "output; choose another"
        )

    return module.register_forward_hook(ablate)
