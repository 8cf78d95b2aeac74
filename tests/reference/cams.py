"""Class activation maps with plain loops, straight from the papers; imports nothing of the package."""

from fractions import Fraction
from itertools import product

import torch


def grad_cam(activations, gradients):
    """Selvaraju et al. 2017, eqs. 1 and 2: activations (k, *grid), gradients (k, *grid) of one logit."""
    found = torch.zeros(activations.shape[1:], dtype=activations.dtype)
    for k in range(len(activations)):
        total = 0.0
        for at in positions(activations):
            total += gradients[k][at]
        alpha = total / len(positions(activations))
        found += alpha * activations[k]
    return found.clamp(min=0)


def cam(activations, weights):
    """Zhou et al. 2016, eq. 2: activations (k, *grid), weights (k,) of one class."""
    found = torch.zeros(activations.shape[1:], dtype=activations.dtype)
    for k in range(len(weights)):
        found += weights[k] * activations[k]
    return found


def positions(array):
    """Every index into the grid of an array (k, *grid)."""
    return list(product(*(range(size) for size in array.shape[1:])))


def weighted(activations, weights):
    """ReLU of the channels' weighted sum."""
    return cam(activations, weights).clamp(min=0)


def grad_cam_plus_plus(activations, gradients, normalize_alpha=False):
    """Chattopadhyay et al. 2018, eqs. 5 and 19, in fractions, which neither round nor underflow."""
    weights = []
    for k in range(len(activations)):
        total = sum(Fraction(float(activations[k][at])) for at in positions(activations))
        alphas, weight = Fraction(0), Fraction(0)
        for at in positions(activations):
            g = Fraction(float(gradients[k][at]))
            denominator = 2 * g**2 + total * g**3
            alpha = g**2 / denominator if denominator else Fraction(0)
            if g > 0:
                alphas += alpha
                weight += alpha * g
        if normalize_alpha:
            weight = weight / alphas if alphas else Fraction(0)
        weights.append(float(weight))
    return weighted(activations, weights)


def xgrad_cam(activations, gradients):
    """Fu et al. 2020: the gradient's mean, weighted by the activation's share of its channel."""
    weights = []
    for k in range(len(activations)):
        total = sum(float(activations[k][at]) for at in positions(activations))
        weight = 0.0
        for at in positions(activations):
            if total != 0:
                weight += float(activations[k][at]) / total * float(gradients[k][at])
        weights.append(weight)
    return weighted(activations, weights)


def hires_cam(activations, gradients):
    """Draelos and Carin 2020: gradient times activation, summed over the channels."""
    found = torch.zeros(activations.shape[1:], dtype=activations.dtype)
    for at in positions(activations):
        for k in range(len(activations)):
            found[at] += gradients[k][at] * activations[k][at]
    return found


def layer_cam(activations, gradients):
    """Jiang et al. 2021: each position's own weight, the positive part of its gradient."""
    found = torch.zeros(activations.shape[1:], dtype=activations.dtype)
    for at in positions(activations):
        for k in range(len(activations)):
            found[at] += max(float(gradients[k][at]), 0.0) * activations[k][at]
        found[at] = max(float(found[at]), 0.0)
    return found


def eigen_cam(activations):
    """Muhammad and Yeasin 2020: positions x channels times its first right singular vector; the sum is not negative."""
    rows = torch.stack([activations[(slice(None), *at)] for at in positions(activations)])
    found = rows @ torch.linalg.svd(rows, full_matrices=False)[2][0]
    return (-found if found.sum() < 0 else found).reshape(activations.shape[1:])


def finer_cam(activations, gradients, runner_up_gradients, gamma):
    """Zhang et al. 2025: Grad-CAM of the difference of two logits, the second times gamma."""
    weights = []
    for k in range(len(activations)):
        total = 0.0
        for at in positions(activations):
            total += float(gradients[k][at]) - gamma * float(runner_up_gradients[k][at])
        weights.append(total / len(positions(activations)))
    return weighted(activations, weights)
