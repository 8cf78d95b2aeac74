"""Perturbation methods with plain loops, straight from the papers; imports nothing of the package."""

import math

import torch


def enlarge(grid, height, width):
    """Bilinear interpolation of (h, w) between pixel centers, constant beyond the outermost ones."""
    found = torch.zeros(height, width, dtype=grid.dtype)
    for i in range(height):
        for j in range(width):
            y = min(max((i + 0.5) * grid.shape[0] / height - 0.5, 0), grid.shape[0] - 1)
            x = min(max((j + 0.5) * grid.shape[1] / width - 0.5, 0), grid.shape[1] - 1)
            top, left = math.floor(y), math.floor(x)
            bottom, right = min(top + 1, grid.shape[0] - 1), min(left + 1, grid.shape[1] - 1)
            upper = grid[top, left] * (1 - x + left) + grid[top, right] * (x - left)
            lower = grid[bottom, left] * (1 - x + left) + grid[bottom, right] * (x - left)
            found[i, j] = upper * (1 - y + top) + lower * (y - top)
    return found


def occlusion(score, image, patch, stride, fill):
    """Zeiler and Fergus 2014 on one image (c, h, w); score(image) -> number. The last patches end at the border."""
    _, height, width = image.shape

    def starts(side):
        found = [0]
        while found[-1] + patch < side:
            found.append(min(found[-1] + stride, side - patch))
        return found

    total, count = torch.zeros(height, width, dtype=image.dtype), torch.zeros(height, width, dtype=image.dtype)
    for top in starts(height):
        for left in starts(width):
            covered = image.clone()
            covered[:, top : top + patch, left : left + patch] = fill
            fall = score(image) - score(covered)
            for i in range(top, top + patch):
                for j in range(left, left + patch):
                    total[i, j] += fall
                    count[i, j] += 1
    return total / count


def rise_masks(height, width, masks, cells, keep, seed, dtype):
    """Petsiuk et al. 2018, section 3.2: h x w cells enlarged to (h + 1) cells' sides, cropped at a random indent."""
    generator = torch.Generator().manual_seed(seed)
    grids = torch.rand(masks, cells, cells, generator=generator) < keep
    tall, wide = math.ceil(height / cells), math.ceil(width / cells)
    downs = torch.randint(tall, (masks,), generator=generator)
    rights = torch.randint(wide, (masks,), generator=generator)
    found = []
    for grid, down, right in zip(grids, downs.tolist(), rights.tolist(), strict=True):
        large = enlarge(grid.to(dtype), (cells + 1) * tall, (cells + 1) * wide)
        found.append(large[down : down + height, right : right + width])
    return found


def rise(probability, image, masks, keep):
    """Petsiuk et al. 2018, eq. 6; probability(image) -> number."""
    total = torch.zeros(image.shape[1:], dtype=image.dtype)
    for mask in masks:
        total += probability(image * mask) * mask
    return total / (len(masks) * keep)


def score_cam(score, image, activations):
    """Wang et al. 2020, algorithm 1: activations (k, h, w), score(image) -> logit; flat channels are left out."""
    channels, logits = [], []
    for channel in activations:
        if channel.max() > channel.min():
            mask = enlarge(channel, *image.shape[1:])
            channels.append(channel)
            logits.append(float(score(image * (mask - mask.min()) / (mask.max() - mask.min()))))
    shares = [math.exp(logit - max(logits)) for logit in logits]
    total = torch.zeros(activations.shape[1:], dtype=activations.dtype)
    for channel, share in zip(channels, shares, strict=True):
        total += share / sum(shares) * channel
    return total.clamp(min=0)


def ablation_cam(head, activations):
    """Desai and Ramaswamy 2020: activations (k, h, w), head(activations) -> logit."""
    whole = head(activations)
    total = torch.zeros(activations.shape[1:], dtype=activations.dtype)
    for k in range(len(activations)):
        ablated = activations.clone()
        ablated[k] = 0
        total += (whole - head(ablated)) / whole * activations[k]
    return total.clamp(min=0)
