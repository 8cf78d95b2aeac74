"""Layer-wise relevance propagation on dense matrices, rule by rule from the papers; imports nothing of the package."""

import torch
from torch.autograd.functional import jacobian


def dense(layer, x):
    """Matrix and offset of an affine function at the shape of x (no batch): y = matrix @ x + offset."""
    zero = torch.zeros_like(x)
    offset = layer(zero[None])[0].flatten()
    matrix = jacobian(lambda v: layer(v[None])[0].flatten(), zero).reshape(len(offset), -1)
    return matrix.detach(), offset.detach()


def away(value, epsilon):
    return value + (epsilon if value >= 0 else -epsilon)


def contributions(row, x, offset, bias):
    """Of the inputs, and of the bias last, which is no contribution where it is to take nothing."""
    return torch.cat([row * x, offset[None] if bias == "share" else torch.zeros_like(offset[None])])


def epsilon(matrix, offset, x, relevance, epsilon=1e-6, bias="share"):
    """Bach et al. 2015, eq. 58; epsilon = 0 is LRP-0, eq. 56."""
    found = torch.zeros_like(x)
    for k, row in enumerate(matrix):
        parts = contributions(row, x, offset[k], bias)
        found += parts[:-1] * relevance[k] / away(parts.sum(), epsilon)
    return found


def gamma(matrix, offset, x, relevance, gamma=0.25, bias="share"):
    """Montavon et al. 2019: contributions of the sign of their sum count 1 + gamma times."""
    found = torch.zeros_like(x)
    for k, row in enumerate(matrix):
        parts = contributions(row, x, offset[k], bias)
        if parts.sum() != 0:
            parts = parts + gamma * parts * (parts * parts.sum() > 0)
            found += parts[:-1] * relevance[k] / away(parts.sum(), 1e-6)
    return found


def alpha_beta(matrix, offset, x, relevance, alpha=2.0, beta=1.0, bias="share"):
    """Bach et al. 2015, eq. 60."""
    found = torch.zeros_like(x)
    for k, row in enumerate(matrix):
        parts = contributions(row, x, offset[k], bias)
        positive, negative = parts * (parts > 0), parts * (parts < 0)
        found += alpha * positive[:-1] * relevance[k] / away(positive.sum(), 1e-6)
        found -= beta * negative[:-1] * relevance[k] / away(negative.sum(), 1e-6)
    return found


def z_plus(matrix, offset, x, relevance, bias="share"):
    """Montavon et al. 2017: the positive contributions only."""
    return alpha_beta(matrix, offset, x, relevance, 1.0, 0.0, bias)


def z_box(matrix, offset, x, relevance, low, high):
    """Montavon et al. 2017: pixels between low and high, both of x's shape; the offset takes nothing."""
    found = torch.zeros_like(x)
    for k, row in enumerate(matrix):
        parts = row * x - low * row.clamp(min=0) - high * row.clamp(max=0)
        found += parts * relevance[k] / away(parts.sum(), 1e-6)
    return found


def flat(matrix, offset, x, relevance):
    """The same to every input with a connection."""
    found = torch.zeros_like(x)
    for k, row in enumerate(matrix):
        connected = (row != 0).to(x)
        found += connected * relevance[k] / connected.sum()
    return found


def lrp(stages, image, target):
    """Relevance of the pixels of one image; a stage is (affine function, rule), or a ReLU where the rule is None."""
    inputs, value = [], image
    for function, _ in stages:
        inputs.append(value)
        value = function(value[None])[0].detach()
    relevance = torch.zeros_like(value)
    relevance[target] = value[target]
    for (function, rule), x in zip(reversed(stages), reversed(inputs), strict=True):
        if rule is not None:  # a ReLU hands on what it got: it gets nothing where it is 0
            matrix, offset = dense(function, x)
            relevance = rule(matrix, offset, x.flatten(), relevance.flatten())
        relevance = relevance.reshape(x.shape)
    return relevance.sum(0)
