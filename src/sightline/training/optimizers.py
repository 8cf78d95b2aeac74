"""The optimizer, and the moving average of the weights."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from sightline.recipe import Optim, resolved
from sightline.training.processes import local_tensor


def create_optimizer(
    network: nn.Module, optim: Optim, scales: Mapping[str, float] | None = None
) -> torch.optim.Optimizer:
    """SGD or AdamW; parameters of one dimension (biases, weights of normalization layers) are not decayed.

    `scales`: factors on the learning rate by names of parameters; the `scale` of a group is that of its parameters.

    >>> optimizer = create_optimizer(nn.Linear(2, 2), Optim(lr=0.1), {"bias": 0.5})
    >>> [(group["scale"], group["weight_decay"]) for group in optimizer.param_groups if group["params"]]
    [(1.0, 0.05), (0.5, 0.0)]
    """
    scales, rate = scales or {}, resolved(optim.lr)
    trained = [(p, scales.get(name, 1.0)) for name, p in network.named_parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = []
    for scale in sorted({1.0} | {scale for _, scale in trained}, reverse=True):
        part = [p for p, its_scale in trained if its_scale == scale]
        group = {"lr": rate * scale, "scale": scale}
        groups.append(group | {"params": [p for p in part if p.ndim > 1], "weight_decay": optim.weight_decay})
        groups.append(group | {"params": [p for p in part if p.ndim <= 1], "weight_decay": 0.0})
    # fused optimizers do not accept sharded weights, and with 16-mixed unscale gradients only after clipping
    fused = not optim.sharded and optim.precision != "16-mixed"
    if optim.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=rate, fused=fused)
    nesterov = optim.nesterov and optim.momentum > 0
    return torch.optim.SGD(groups, lr=rate, momentum=optim.momentum, nesterov=nesterov, fused=fused)


@torch.no_grad()
def average(averaged: nn.Module, network: nn.Module, decay: float) -> None:
    """Move every number of `averaged`, including running statistics, towards that of `network` by 1 - decay.

    >>> old, new = nn.Linear(1, 1), nn.Linear(1, 1)
    >>> _ = nn.init.constant_(old.bias, 0.0), nn.init.constant_(new.bias, 1.0)
    >>> average(old, new, decay=0.75)
    >>> old.bias.item()
    0.25
    """
    old, new = ({name: local_tensor(t) for name, t in module.state_dict().items()} for module in (averaged, network))
    floats = [name for name, tensor in new.items() if tensor.is_floating_point()]
    torch.optim.swa_utils.get_ema_multi_avg_fn(decay)([old[n] for n in floats], [new[n] for n in floats], None)
    for name in new.keys() - set(floats):
        old[name].copy_(new[name])
