"""ResNets for small images, and ResNets whose last stages keep their resolution."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from sightline.inference import untouched

STAGES = ("layer1", "layer2", "layer3", "layer4")


class _SmallResNet(nn.Module):
    """ResNet of basic blocks: a convolution, three stages of blocks, global average pooling, a linear head."""

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential

    def __init__(
        self, num_classes: int, stem: int, stem_stride: int, stages: Sequence[tuple[int, int]], blocks: int
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, stem, 3, stem_stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.relu = nn.ReLU(inplace=True)
        (first, one), (second, two), (third, three) = stages
        self.layer1 = _stage(stem, first, blocks, one)
        self.layer2 = _stage(first, second, blocks, two)
        self.layer3 = _stage(second, third, blocks, three)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(third, num_classes)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out")

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b n"]:
        """Logits."""
        features = self.relu(self.bn1(self.conv1(images)))
        features = self.layer3(self.layer2(self.layer1(features)))
        return self.fc(self.flatten(self.avgpool(features)))


class CifarResNet(_SmallResNet):
    """ResNet for small images: three stages of 16, 32 and 64 channels, at full, half and a quarter of the resolution.

    Args:
        num_classes: number of logits.
        depth: number of layers with weights, 6n + 2 for n blocks per stage: 20, 32, 44, 56, 110, but also 8 or 14.
        width: factor of the number of channels.
        stem_stride: 2 halves all resolutions: quick training, larger images.

    Raises:
        ValueError: a depth that is not 6n + 2, a width that leaves no channel, a stride below 1.

    Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2.

    Differs: the shortcut of a stage's first block is a 1 x 1 convolution with BatchNorm (option B), not padding (A).

    >>> model = CifarResNet(10, depth=20)
    >>> model(torch.zeros(2, 3, 32, 32)).shape, sum(p.numel() for p in model.parameters())
    (torch.Size([2, 10]), 272474)
    """

    def __init__(self, num_classes: int = 10, *, depth: int = 20, width: float = 1.0, stem_stride: int = 1) -> None:
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"expected a depth of 6n + 2, got {depth}; take 8, 14, 20, 32, 44, 56 or 110")
        _check_width(width)
        if stem_stride < 1:
            raise ValueError(f"expected a stem_stride of 1 or more, got {stem_stride}; 1 is the paper's")
        first, second, third = (round(channels * width) for channels in (16, 32, 64))
        super().__init__(num_classes, first, stem_stride, ((first, 1), (second, 2), (third, 2)), depth // 6)


class MtlResNet(_SmallResNet):
    """The ResNet of meta-transfer learning: three stages of 160, 320 and 640 channels, each at half the resolution.

    At 80 px the last map has 10 x 10 positions; with `high_resolution=2` of `create_model`, 40 x 40. The papers call it
    ResNet-12; with 4 blocks per stage its code has 26 layers with weights.

    Args:
        num_classes: number of logits.
        blocks: residual blocks per stage.
        width: factor of the number of channels.

    Raises:
        ValueError: no block, or a width that leaves no channel.

    Source: Sun et al., "Meta-Transfer Learning for Few-Shot Learning", CVPR 2019, and its PyTorch code; Gomez et al.
    (2106.02566), who changed the strides.

    Differs: the code has a hidden layer of 1,000 units before the logits and a bias in the first convolution; that of
    Gomez et al. cuts two positions off each side of the 40 x 40 map.

    >>> model = MtlResNet(64)
    >>> model(torch.zeros(1, 3, 80, 80)).shape, sum(p.numel() for p in model.parameters())
    (torch.Size([1, 64]), 36620304)
    """

    def __init__(self, num_classes: int = 64, *, blocks: int = 4, width: float = 1.0) -> None:
        if blocks < 1:
            raise ValueError(f"expected 1 block per stage or more, got {blocks}; 4 is the paper's")
        _check_width(width)
        stem, *stages = (round(channels * width) for channels in (80, 160, 320, 640))
        super().__init__(num_classes, stem, 1, [(channels, 2) for channels in stages], blocks)


def _check_width(width: float) -> None:
    if width < 1 / 16:
        raise ValueError(f"expected a width of 1/16 or more, got {width}; 1 is the paper's")


def _stage(channels: int, planes: int, blocks: int, stride: int) -> nn.Sequential:
    shortcut = None
    if stride > 1 or channels != planes:
        shortcut = nn.Sequential(nn.Conv2d(channels, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))
    first = BasicBlock(channels, planes, stride, shortcut)
    return nn.Sequential(first, *(BasicBlock(planes, planes) for _ in range(blocks - 1)))


def keep_resolution(model: nn.Module, stages: int) -> nn.Module:
    """Set the strides of a ResNet's last stages from 2 to 1, in place; parameters and their names stay.

    Convolutions keep their zero padding and get no dilation. Pools of 3 x 3 keep their window; others, which only
    reduce the resolution, become identities.

    Args:
        model: a ResNet, or another network with the stages `layer1`, `layer2`, `layer3` and usually `layer4`.
        stages: how many of the last stages; each doubles the height and width of the final map.

    Raises:
        ValueError: no such stages, or a stage without a stride to change.

    Source: Gomez et al. 2021 (2106.02566), "Improve the Interpretability of Attention" (BR-NPA), official code.

    >>> from torchvision.models import resnet18
    >>> [block.conv1.stride for block in keep_resolution(resnet18(), 1).layer4]
    [(1, 1), (1, 1)]
    """
    present = [(name, layer) for name, layer in model.named_children() if name in STAGES]
    if len(present) < 3:
        raise ValueError(
            f"expected a ResNet with stages layer1 to layer4 for high_resolution, got {type(model).__name__}; "
            "take a ResNet or leave high_resolution out"
        )
    if not 1 <= stages < len(present):
        raise ValueError(
            f"expected high_resolution of 1 to {len(present) - 1} stages, got {stages}; layer1 has no stride to change"
        )
    changed = dict(present[-stages:])
    for name, stage in changed.items():
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
    _check_sizes(model, changed)
    factors = {name: 2**index for index, name in enumerate(changed, 1)}
    feature_info: Any = getattr(model, "feature_info", [])
    for entry in feature_info:
        entry["reduction"] //= factors.get(entry["module"], 1)
    return model


def _check_sizes(model: nn.Module, stages: dict[str, nn.Module]) -> None:
    def hook(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        if output.shape[2:] != inputs[0].shape[2:]:
            raise ValueError(
                f"cannot keep the resolution of {type(model).__name__}: a stage still turns "
                f"{tuple(inputs[0].shape[2:])} into {tuple(output.shape[2:])}; leave high_resolution out"
            )

    like = next(model.parameters())
    channels = next(layer.in_channels for layer in model.modules() if isinstance(layer, nn.Conv2d))
    with untouched(model), torch.no_grad(), ExitStack() as hooks:
        for stage in stages.values():
            hooks.enter_context(stage.register_forward_hook(hook))
        model(torch.zeros(1, channels, 64, 64, device=like.device, dtype=like.dtype))
