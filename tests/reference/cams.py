"""Class activation maps with plain loops, straight from the papers; imports nothing of the package."""

import torch


def grad_cam(activations, gradients):
    """Selvaraju et al. 2017, eqs. 1 and 2: activations (k, h, w), gradients (k, h, w) of one logit."""
    channels, height, width = activations.shape
    cam = torch.zeros(height, width, dtype=activations.dtype)
    for k in range(channels):
        total = 0.0
        for i in range(height):
            for j in range(width):
                total += gradients[k, i, j]
        alpha = total / (height * width)
        cam += alpha * activations[k]
    return cam.clamp(min=0)


def cam(activations, weights):
    """Zhou et al. 2016, eq. 2: activations (k, h, w), weights (k,) of one class."""
    found = torch.zeros(activations.shape[1:], dtype=activations.dtype)
    for k in range(len(weights)):
        found += weights[k] * activations[k]
    return found
