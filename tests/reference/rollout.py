"""Rollouts with plain loops and a pre-LN vision transformer written out, in float64; imports nothing of the package."""

import torch
from torch.nn import functional as F


def transformer(image, p):
    """Logits (classes,) of one image (c, H, W), and the attention (n, n) of each head of each layer.

    `p` holds patches (weight, bias), prefix (m, c), positions (n, c), layers, norm, eps, heads, and readers: pairs of
    (which tokens, head) whose results are averaged, where a head takes the mean over its tokens.
    """
    patches = F.conv2d(image[None], *p["patches"], stride=p["patches"][0].shape[-1])[0]
    tokens = [*p["prefix"], *(patches[:, y, x] for y in range(patches.shape[1]) for x in range(patches.shape[2]))]
    x = torch.stack([token + position for token, position in zip(tokens, p["positions"], strict=True)])
    n, c = x.shape
    d = c // p["heads"]
    seen = []
    for layer in p["layers"]:
        y = F.layer_norm(x, (c,), *layer["norm1"], eps=p["eps"])
        q, k, v = (y @ weight.T + bias for weight, bias in layer["qkv"])
        mixed, maps = [], []
        for head in range(p["heads"]):
            at = slice(head * d, (head + 1) * d)
            rows = []
            for i in range(n):
                exponentials = torch.stack([(q[i, at] @ k[j, at] / d**0.5).exp() for j in range(n)])
                rows.append(exponentials / exponentials.sum())
            maps.append(torch.stack(rows))
            mixed.append(maps[-1] @ v[:, at])
        seen.append(maps)
        x = x + F.linear(torch.cat(mixed, 1), *layer["project"])
        y = F.layer_norm(x, (c,), *layer["norm2"], eps=p["eps"])
        x = x + F.linear(F.gelu(F.linear(y, *layer["up"])), *layer["down"])
    read = [head(F.layer_norm(x, (c,), *p["norm"], eps=p["eps"])[which].mean(0)) for which, head in p["readers"]]
    return sum(read) / len(read), seen


def attention_rollout(attention, prefix, grid, from_first, heads="mean"):
    """Abnar and Zuidema 2020, equation 1: attention (heads, n, n) of each layer to a map (h, w)."""
    rolled = None
    for maps in attention:
        n = maps.shape[1]
        layer = torch.zeros(n, n, dtype=torch.float64)
        for i in range(n):
            for j in range(n):
                values = [float(head[i, j]) for head in maps]
                fused = {"mean": sum(values) / len(values), "max": max(values), "min": min(values)}[heads]
                layer[i, j] = 0.5 * fused + 0.5 * (i == j)
            layer[i] /= sum(float(value) for value in layer[i])
        rolled = layer if rolled is None else layer @ rolled
    return received(rolled, prefix, grid, from_first)


def gradient_rollout(attention, gradients, prefix, grid, from_first):
    """Chefer et al. 2021, equations 5 and 6: attention and its gradient (heads, n, n) of each layer to a map (h, w)."""
    n = attention[0].shape[1]
    relevance = torch.eye(n, dtype=torch.float64)
    for maps, slopes in zip(attention, gradients, strict=True):
        raising = torch.zeros(n, n, dtype=torch.float64)
        for head, slope in zip(maps, slopes, strict=True):
            for i in range(n):
                for j in range(n):
                    raising[i, j] += max(float(head[i, j]) * float(slope[i, j]), 0.0) / len(maps)
        relevance = relevance + raising @ relevance
    return received(relevance, prefix, grid, from_first)


def received(rolled, prefix, grid, from_first):
    """What the first token, or the mean patch, received from each patch."""
    n = len(rolled)
    rows = [0] if from_first else list(range(prefix, n))
    found = [sum(float(rolled[i, j]) for i in rows) / len(rows) for j in range(prefix, n)]
    return torch.tensor(found, dtype=torch.float64).view(grid)
