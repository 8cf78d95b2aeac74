"""Slow forms of the tasks of "Learn To Pay Attention": support vector machine, Jaccard index, fast gradient sign."""

import numpy as np
from scipy.optimize import minimize


def machine(features, labels, tested, strength):
    """Classes by one linear machine per class with squared hinge, each minimized by gradient descent on its formula.

    Of two classes, a single machine decides.
    """
    mean, deviation = features.mean(0), features.std(0)
    x, t = ((np.c_[(one - mean) / deviation, np.ones(len(one))]) for one in (features, tested))
    classes = sorted(set(labels.tolist()))
    scores = []
    for k in classes:
        y = np.where(labels == k, 1.0, -1.0)

        def loss(w, y=y):
            gap = np.maximum(0, 1 - y * (x @ w))
            return w @ w / 2 + strength * (gap**2).sum(), w - 2 * strength * x.T @ (y * gap)

        found = minimize(loss, np.zeros(x.shape[1]), jac=True, tol=1e-14, options={"maxiter": 5000})
        scores.append(t @ found.x)
    return np.array(classes)[np.argmax(scores, 0)]


def jaccard(values, mask, threshold):
    """Of a map and a mask of one image as lists of rows; the map is scaled from 0 to 1 first."""
    flat = [v for row in values for v in row]
    low, high = min(flat), max(flat)
    both = either = 0
    for row, truth in zip(values, mask, strict=True):
        for v, inside in zip(row, truth, strict=True):
            marked = high == low or (v - low) / (high - low) >= threshold
            both += marked and inside
            either += marked or inside
    return both / either


def flip(weights, bias, pixels, label, epsilon):
    """1 or 0 of a linear classifier of two classes or more by its gradient written out; None if it is wrong before."""
    logits = weights @ pixels + bias
    if logits.argmax() != label:
        return None
    exponents = np.exp(logits - logits.max())
    gradient = (exponents / exponents.sum() - np.eye(len(bias))[label]) @ weights
    stepped = np.clip(pixels + epsilon * np.sign(gradient), 0, 1)
    return float((weights @ stepped + bias).argmax() != label)
