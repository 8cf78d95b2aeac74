"""Pre-activation ResNets and RN-att, layer by layer from named arrays in float64, with loops.

Sources: He et al., "Identity Mappings in Deep Residual Networks", 2016, figure 4 (e) and section 3; Jetley et al.,
"Learn To Pay Attention", 2018. Weights are read by name out of a state dict; dropout is off, BatchNorm uses its
statistics.
"""

import numpy as np
from tests.reference.ltpa import attend


def conv(x, weight, bias, stride, padding):
    x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    out, _, size, _ = weight.shape
    height, width = ((side - size) // stride + 1 for side in x.shape[2:])
    y = np.zeros((len(x), out, height, width), dtype=np.float64)
    for i in range(height):
        for j in range(width):
            patch = x[:, :, i * stride : i * stride + size, j * stride : j * stride + size]
            for k in range(out):
                y[:, k, i, j] = (patch * weight[k]).sum((1, 2, 3)) + (0 if bias is None else bias[k])
    return y


def norm(x, state, name, eps):
    view = (1, -1) + (1,) * (x.ndim - 2)
    mean, var, scale, shift = (
        state[f"{name}.{key}"].reshape(view) for key in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / np.sqrt(var + eps) * scale + shift


def relu(x):
    return np.maximum(x, 0)


def max_pool(x, size):
    height, width = (-(-side // size) for side in x.shape[2:])
    y = np.zeros((*x.shape[:2], height, width))
    for i in range(height):
        for j in range(width):
            y[:, :, i, j] = x[:, :, i * size : (i + 1) * size, j * size : (j + 1) * size].max((2, 3))
    return y


def bottleneck(x, state, name, stride):
    """x + F(x), F = three times BatchNorm, ReLU, convolution; where sizes change, h(relu(bn(x))) + F(x)."""
    active = relu(norm(x, state, f"{name}.preactivation.0", 1e-5))
    y = conv(active, state[f"{name}.residual.0.weight"], None, stride, 0)
    y = relu(norm(y, state, f"{name}.residual.1", 1e-5))
    y = conv(y, state[f"{name}.residual.3.weight"], None, 1, 1)
    y = relu(norm(y, state, f"{name}.residual.4", 1e-5))
    y = conv(y, state[f"{name}.residual.6.weight"], None, 1, 0)
    shortcut = state.get(f"{name}.shortcut.weight")
    return y + (x if shortcut is None else conv(active, shortcut, None, stride, 0))


def stage(x, state, number, blocks):
    for block in range(blocks):
        x = bottleneck(x, state, f"features.stage{number}.{block}", 2 if number > 1 and block == 0 else 1)
    return x


def linear(x, state, name):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def rn164(images, state, n):
    """Logits of the network with n bottlenecks per stage."""
    x = conv(images, state["features.conv1.weight"], None, 1, 1)
    for number in (1, 2, 3):
        x = stage(x, state, number, n)
    return linear(relu(norm(x, state, "features.norm.0", 1e-5)).mean((2, 3)), state, "head")


def rn_att(images, state, n, levels, compat):
    """Logits of RN-att (1 level) and RN-att2 (2 levels)."""
    x = conv(images, state["features.conv1.weight"], None, 1, 1)
    x = stage(x, state, 1, n)
    local = {"stage2": stage(x, state, 2, n)}
    if levels == 2:
        local["stage3"] = stage(local["stage2"], state, 3, n)
    else:
        x = stage(local["stage2"], state, 3, n - 1)
        x = conv(x, state["features.conv2.weight"], None, 1, 1)
        local = {"conv3": conv(x, state["features.conv3.weight"], None, 1, 1)}
    g = max_pool(relu(norm([*local.values()][-1], state, "features.norm.0", 1e-5)), 2)
    g = conv(g, state["features.conv4.0.weight"], state["features.conv4.0.bias"], 1, 1)
    g = relu(norm(g, state, "features.conv4.1", 1e-3)).max((2, 3))
    g = linear(g, state, "fc1.linear")
    vectors = []
    for index, (level, features) in enumerate(local.items()):
        name, query = f"attention.{level}", g
        if g.shape[1] != features.shape[1]:
            query = relu(norm(g, state, f"{name}.project_query.0", 1e-5))
            query = linear(query, state, f"{name}.project_query.3")
        u, b = (None, None) if compat == "dp" else (state[f"{name}.gate.u.weight"][0], state[f"{name}.gate.u.bias"][0])
        pooled = attend(features, query, u, b, compat, "softmax")[2]
        vectors.append(relu(norm(pooled, state, f"head.prepare.{index}.0", 1e-5)))
    return linear(np.concatenate(vectors, 1), state, "head.linear")
