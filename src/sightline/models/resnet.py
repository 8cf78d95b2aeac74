"""ResNets whose last stages keep their resolution."""

from typing import Any

import torch
from torch import Tensor, nn

from sightline.inference import untouched

STAGES = ("layer1", "layer2", "layer3", "layer4")


def keep_resolution(model: nn.Module, stages: int) -> nn.Module:
    """Set the strides of a ResNet's last stages from 2 to 1, in place: maps grow, parameters and their names stay.

    Convolutions keep their zero padding and get no dilation. Pools of 3 x 3 keep their window; others, which only bring
    the resolution down, become identities.

    Args:
        model: a ResNet of torchvision or timm, or another network with the stages `layer1` to `layer4`.
        stages: how many of the last stages; each doubles the height and width of the final map.

    Raises:
        ValueError: no such stages, or a number of them for which there is no stride to change.

    Source: Gomez et al. 2021 (2106.02566), "Improve the Interpretability of Attention" (BR-NPA), official code.

    >>> from torchvision.models import resnet18
    >>> [block.conv1.stride for block in keep_resolution(resnet18(), 1).layer4]
    [(1, 1), (1, 1)]
    """
    found = [(name, layer) for name, layer in model.named_children() if name in STAGES]
    if len(found) != len(STAGES):
        raise ValueError(
            f"expected a ResNet with stages layer1 to layer4 for high_resolution, got {type(model).__name__}; "
            "take a ResNet or leave high_resolution out"
        )
    if not 1 <= stages <= 3:
        raise ValueError(f"expected high_resolution of 1 to 3 stages, got {stages}; layer1 has no stride to change")
    for name, stage in found[-stages:]:
        strided = [(path, layer) for path, layer in stage.named_modules() if getattr(layer, "stride", 1) in (2, (2, 2))]
        for path, layer in strided:
            odd_pool = isinstance(layer, nn.AvgPool2d | nn.MaxPool2d) and layer.kernel_size in (3, (3, 3))
            if odd_pool or next(layer.parameters(), None) is not None:
                vars(layer)["stride"] = (1, 1) if isinstance(layer, nn.Conv2d) else 1
            else:
                parent, _, child = path.rpartition(".")
                setattr(stage.get_submodule(parent), child, nn.Identity())
        if not strided:
            raise ValueError(
                f"expected a stride of 2 in {name} of {type(model).__name__}, got none; lower high_resolution"
            )
    _check(model, dict(found[-stages:]))
    factors = {name: 2**index for index, (name, _) in enumerate(found[-stages:], 1)}
    described: Any = getattr(model, "feature_info", [])
    for entry in described:
        entry["reduction"] //= factors.get(entry["module"], 1)
    return model


def _check(model: nn.Module, stages: dict[str, nn.Module]) -> None:
    def hook(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        if output.shape[2:] != inputs[0].shape[2:]:
            raise ValueError(
                f"cannot keep the resolution of {type(model).__name__}: a stage still turns "
                f"{tuple(inputs[0].shape[2:])} into {tuple(output.shape[2:])}; leave high_resolution out"
            )

    handles = [stage.register_forward_hook(hook) for stage in stages.values()]
    like = next(model.parameters())
    channels = next(layer.in_channels for layer in model.modules() if isinstance(layer, nn.Conv2d))
    try:
        with untouched(model), torch.no_grad():
            model(torch.zeros(1, channels, 64, 64, device=like.device, dtype=like.dtype))
    finally:
        for handle in handles:
            handle.remove()
