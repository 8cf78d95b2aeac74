"""Channel and spatial gates, position by position in float64.

Sources: Hu et al., CVPR 2018 (squeeze_excite); Wang et al., CVPR 2020 (efficient_channel); Cao et al., ICCVW 2019
(global_context); Woo et al., ECCV 2018 (channel_gate, spatial_gate); Park et al., BMVC 2018 (bam, with BatchNorm after
the hidden layers); Oktay et al., MIDL 2018 (attention_gate).

One image at a time, features (c, h, w). A bottleneck is its four arrays (w1, b1, w2, b2); norm layers are functions.
"""

import math

import numpy as np


def sigmoid(score):
    return 1 / (1 + math.exp(-score))


def average(features):
    return np.array([sum(channel.ravel().tolist()) / channel.size for channel in features])


def maximum(features):
    return np.array([max(channel.ravel().tolist()) for channel in features])


def relu(values):
    return np.where(values > 0, values, 0.0)


def bottleneck(vector, w1, b1, w2, b2, norm=lambda hidden: hidden):
    return w2 @ relu(norm(w1 @ vector + b1)) + b2


def conv(features, weight, bias=0.0, dilation=1):
    """Convolution (o, c, k, k) with zeros around the features, same size."""
    outputs, channels, side, _ = weight.shape
    _, height, width = features.shape
    result = np.full((outputs, height, width), 0.0)
    for o in range(outputs):
        for y in range(height):
            for x in range(width):
                total = 0.0
                for dy in range(side):
                    for dx in range(side):
                        row, column = y + (dy - side // 2) * dilation, x + (dx - side // 2) * dilation
                        if 0 <= row < height and 0 <= column < width:
                            for c in range(channels):
                                total += weight[o, c, dy, dx] * features[c, row, column]
                result[o, y, x] = total
    return result + np.reshape(bias, (-1, 1, 1))


def batch_norm(mean, variance, weight, bias, eps=1e-5):
    """BatchNorm in eval mode over the first axis."""

    def norm(values):
        shape = (-1,) + (1,) * (values.ndim - 1)
        m, v, w, b = (np.reshape(array, shape) for array in (mean, variance, weight, bias))
        return (values - m) / np.sqrt(v + eps) * w + b

    return norm


def layer_norm(weight, bias, eps=1e-5):
    def norm(values):
        mean = sum(values) / len(values)
        variance = sum((value - mean) ** 2 for value in values) / len(values)
        return (values - mean) / math.sqrt(variance + eps) * weight + bias

    return norm


def squeeze_excite(features, mlp):
    """Weights (c,)."""
    return np.array([sigmoid(score) for score in bottleneck(average(features), *mlp)])


def efficient_channel(features, kernel):
    """Weights (c,): each channel from its neighbors."""
    z, half = average(features), len(kernel) // 2
    weights = []
    for c in range(len(z)):
        near = [(j, c + j - half) for j in range(len(kernel)) if 0 <= c + j - half < len(z)]
        weights.append(sigmoid(sum(kernel[j] * z[other] for j, other in near)))
    return np.array(weights)


def global_context(features, u, mlp, norm):
    """Weights (h, w) and output (c, h, w)."""
    _, height, width = features.shape
    exps = np.array([[math.exp(u @ features[:, y, x]) for x in range(width)] for y in range(height)])
    weights = exps / exps.sum()
    context = sum(weights[y, x] * features[:, y, x] for y in range(height) for x in range(width))
    return weights, features + bottleneck(context, *mlp, norm=norm)[:, None, None]


def channel_gate(features, mlp, pools="both"):
    """Weights (c,)."""
    scores = np.zeros(len(features))
    if pools != "maximum":
        scores = scores + bottleneck(average(features), *mlp)
    if pools != "average":
        scores = scores + bottleneck(maximum(features), *mlp)
    return np.array([sigmoid(score) for score in scores])


def spatial_gate(features, weight, norm, pools="both"):
    """Weights (h, w); the maximum over channels comes first."""
    channels, height, width = features.shape
    both = np.zeros((2, height, width))
    for y in range(height):
        for x in range(width):
            both[0, y, x] = max(features[:, y, x].tolist())
            both[1, y, x] = sum(features[:, y, x].tolist()) / channels
    pooled = {"both": both, "maximum": both[:1], "average": both[1:]}[pools]
    return np.vectorize(sigmoid)(norm(conv(pooled, weight))[0])


def bam(features, mlp, channel_norm, convs, norms, dilation, variant):
    """Weights (c, h, w) and output; `convs` are four (weight, bias), the first three followed by a norm."""
    channel = bottleneck(average(features), *mlp, norm=channel_norm)
    spatial = features
    for (weight, bias), norm in zip(convs[:3], norms, strict=True):
        spatial = relu(norm(conv(spatial, weight, bias, dilation if weight.shape[2] == 3 else 1)))
    spatial = conv(spatial, *convs[3])[0]
    weights = np.zeros_like(features)
    for c, y, x in np.ndindex(features.shape):
        one, other = channel[c], spatial[y, x]
        weights[c, y, x] = sigmoid(one + other if variant == "paper" else one * other)
    return weights, features + features * weights


def bilinear(features, height, width):
    """Resize with pixel centers at half-integers (align_corners=False)."""
    channels, rows, columns = features.shape

    def around(index, size, old):
        at = min(max((index + 0.5) * old / size - 0.5, 0.0), old - 1.0)
        low = min(int(at), old - 1)
        return low, min(low + 1, old - 1), at - low

    result = np.zeros((channels, height, width))
    for y in range(height):
        top, bottom, down = around(y, height, rows)
        for x in range(width):
            left, right, across = around(x, width, columns)
            upper = (1 - across) * features[:, top, left] + across * features[:, top, right]
            lower = (1 - across) * features[:, bottom, left] + across * features[:, bottom, right]
            result[:, y, x] = (1 - down) * upper + down * lower
    return result


def attention_gate(features, query, theta, phi, psi, bias, norm):
    """Scores (h, w) and weights (h, w)."""
    _, height, width = features.shape
    query = bilinear(query, height, width)
    scores = np.zeros((height, width))
    for y in range(height):
        for x in range(width):
            scores[y, x] = psi @ relu(theta @ features[:, y, x] + phi @ query[:, y, x]) + bias
    if norm == "sigmoid":
        return scores, np.vectorize(sigmoid)(scores)
    weights = np.exp(scores) if norm == "softmax" else scores - scores.min()
    return scores, weights / weights.sum()
