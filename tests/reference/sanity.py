"""Sanity and robustness of maps, one number at a time in double precision; imports nothing of the package."""

import math


def mean_ranks(values):
    """1 for the lowest; equal values share the mean of their places."""
    ranks = []
    for value in values:
        lower = sum(other < value for other in values)
        equal = sum(other == value for other in values)
        ranks.append(lower + (equal + 1) / 2)
    return ranks


def spearman(a, b):
    """Pearson's correlation of the ranks; None where one of the lists is flat."""
    a, b = mean_ranks(a), mean_ranks(b)
    mean = (len(a) + 1) / 2
    top = sum((x - mean) * (y - mean) for x, y in zip(a, b, strict=True))
    bottom = sum((x - mean) ** 2 for x in a) * sum((y - mean) ** 2 for y in b)
    return top / math.sqrt(bottom) if bottom else None


def max_sensitivity(explain, image, noises):
    """Yeh et al. 2019, relative; lists of numbers."""
    whole = explain(image)
    norm = math.sqrt(sum(v * v for v in whole))
    found = []
    for noise in noises:
        changed = explain([x + d for x, d in zip(image, noise, strict=True)])
        found.append(math.sqrt(sum((v - w) ** 2 for v, w in zip(changed, whole, strict=True))) / norm)
    return max(found)


def fast_gradient_sign(weights, image, label, epsilon):
    """Goodfellow et al. 2014 for a linear softmax classifier: the image one step up the cross-entropy."""
    logits = [sum(w * x for w, x in zip(row, image, strict=True)) for row in weights]
    total = sum(math.exp(z) for z in logits)
    errors = [math.exp(z) / total - (k == label) for k, z in enumerate(logits)]
    slopes = [sum(e * row[i] for e, row in zip(errors, weights, strict=True)) for i in range(len(image))]
    return [x + epsilon * ((s > 0) - (s < 0)) for x, s in zip(image, slopes, strict=True)]


def largest_logit(weights, image):
    logits = [sum(w * x for w, x in zip(row, image, strict=True)) for row in weights]
    return logits.index(max(logits))
