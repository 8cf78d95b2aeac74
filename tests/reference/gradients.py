"""Gradient methods with plain loops, straight from the papers; imports nothing of the package. Float64, one image."""

import torch
from torch import nn


def rectify(rule, x, gradient, high=None):
    """Backward of one rectifier, number by number. Springenberg et al. 2014, figure 1; 0 and `high` count as off."""
    found = []
    for value, incoming in zip(x.flatten().tolist(), gradient.flatten().tolist(), strict=True):
        on = value > 0 and (high is None or value < high)
        passes = {"plain": on, "guided": on and incoming > 0, "deconvolution": incoming > 0}[rule]
        found.append(incoming if passes else 0)
    return torch.tensor(found, dtype=gradient.dtype).view(gradient.shape)


def backpropagate(layers, image, target, rule="plain"):
    """Gradient of one logit at the image (c, ...): every layer's input is kept, then layer by layer backwards."""
    inputs, x = [], image[None]
    for layer in layers:
        inputs.append(x)
        x = layer(x)
    gradient = torch.zeros_like(x)
    gradient[0, target] = 1
    for layer, x in zip(reversed(layers), reversed(inputs), strict=True):
        if isinstance(layer, nn.ReLU | nn.ReLU6):
            gradient = rectify(rule, x, gradient, 6 if isinstance(layer, nn.ReLU6) else None)
        else:
            gradient = torch.func.vjp(layer, x)[1](gradient)[0]
    return gradient[0]


def summed(maps):
    """Sum over colors, (c, h, w) to (h, w)."""
    found = torch.zeros_like(maps[0])
    for channel in maps:
        found += channel
    return found


def largest(maps):
    """Largest absolute value over colors."""
    found = torch.zeros_like(maps[0])
    for channel in maps:
        found = torch.maximum(found, channel.abs())
    return found


def gauss_legendre(steps):
    """Nodes and weights on [0, 1] from the eigenvalues of the Jacobi matrix (Golub and Welsch 1969)."""
    jacobi = torch.zeros(steps, steps, dtype=torch.float64)
    for k in range(1, steps):
        jacobi[k, k - 1] = jacobi[k - 1, k] = k / (4 * k * k - 1) ** 0.5
    values, vectors = torch.linalg.eigh(jacobi)
    return [(float(v) + 1) / 2 for v in values], [float(vectors[0, k]) ** 2 for k in range(steps)]


def integrated_gradients(gradient_at, image, baseline, steps):
    """Sundararajan et al. 2017, eq. 1, the integral by the Gauss-Legendre rule."""
    total = torch.zeros_like(image)
    for alpha, weight in zip(*gauss_legendre(steps), strict=True):
        total += weight * gradient_at(baseline + alpha * (image - baseline))
    return summed((image - baseline) * total)


def mean_and_variance(gradient_at, copies):
    """Mean of the gradients at each noisy copy, and their mean squared distance from it."""
    gradients = [gradient_at(copy) for copy in copies]
    mean = sum(gradients) / len(copies)
    variance = sum((gradient - mean) ** 2 for gradient in gradients) / len(copies)
    return mean, variance


def enlarge_nearest(cam, size):
    """(h, w) at another size: each pixel takes the cell that holds its center."""
    found = torch.zeros(size, dtype=cam.dtype)
    for i in range(size[0]):
        for j in range(size[1]):
            found[i, j] = cam[int((i + 0.5) * cam.shape[0] / size[0]), int((j + 0.5) * cam.shape[1] / size[1])]
    return found


def grad_cam_plus_plus(activations, gradients):
    """Chattopadhyay et al. 2018, eqs. 5 and 19 as printed, without the exponential."""
    channels, height, width = activations.shape
    cam = torch.zeros(height, width, dtype=activations.dtype)
    for k in range(channels):
        total, weight = float(activations[k].sum()), 0.0
        for i in range(height):
            for j in range(width):
                g = float(gradients[k, i, j])
                denominator = 2 * g**2 + total * g**3
                weight += g**2 / denominator * max(g, 0.0) if denominator else 0.0
        cam += weight * activations[k]
    return cam.clamp(min=0)
