"""The optimizer, and the moving average of the weights."""

import torch
from torch import nn

from sightline.recipe import Optim
from sightline.training.processes import local_tensor


def create_optimizer(network: nn.Module, optim: Optim) -> torch.optim.Optimizer:
    """SGD or AdamW; parameters of one dimension (biases, weights of normalization layers) are not decayed.

    >>> [len(group["params"]) for group in create_optimizer(nn.Linear(2, 2), Optim()).param_groups]
    [1, 1]
    """
    trained = [p for p in network.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": optim.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    # fused optimizers do not accept sharded weights, and with 16-mixed unscale gradients only after clipping
    fused = not optim.sharded and optim.precision != "16-mixed"
    if optim.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=optim.lr, fused=fused)
    nesterov = optim.nesterov and optim.momentum > 0
    return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum, nesterov=nesterov, fused=fused)


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
