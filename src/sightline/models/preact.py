"""Pre-activation ResNet-164 and the networks of "Learn To Pay Attention" on its trunk, RN-att and RN-att2.

The attended features are the raw sums of the bottlenecks, without BatchNorm and ReLU. Dotted names: `features.stage3`,
`attention.stage3`, `attention.stage3.gate`.

Sources: He et al., "Identity Mappings in Deep Residual Networks", ECCV 2016; Jetley et al., "Learn To Pay Attention",
ICLR 2018, layers, Dropout and initialization as in the authors' Torch7 code.

Differs: the last pool takes the maximum of all that is left, so that images of any size pass; linear layers keep
PyTorch's biases.
"""

from collections import OrderedDict
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from sightline.attention.pooling import Compat, Norm, Project
from sightline.models.ltpa import Attended, Head, global_vector, initialize, scaled

CHANNELS = (16, 64, 128, 256)


class Bottleneck(nn.Module):
    """Three convolutions, each behind BatchNorm and ReLU, added to the input.

    Where the size or the number of channels changes, a 1 x 1 convolution of the first BatchNorm and ReLU takes the
    input's place.

    Source: He et al. 2016, "Identity Mappings in Deep Residual Networks", figure 4 (e) and appendix.
    """

    def __init__(self, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        middle = max(1, out_channels // 4)
        self.preactivation = _activation(channels)
        self.residual = nn.Sequential(
            nn.Conv2d(channels, middle, 1, stride, bias=False),
            *_activation(middle),
            nn.Conv2d(middle, middle, 3, padding=1, bias=False),
            *_activation(middle),
            nn.Conv2d(middle, out_channels, 1, bias=False),
        )
        changes = stride > 1 or channels != out_channels
        self.shortcut = nn.Conv2d(channels, out_channels, 1, stride, bias=False) if changes else None

    def forward(self, features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k i j"]:
        """The sum."""
        active = self.preactivation(features)
        return self.residual(active) + (features if self.shortcut is None else self.shortcut(active))


def _activation(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(inplace=True))


def trunk(depth: int, width: float, stem_stride: int, last_bottlenecks: int = 0) -> OrderedDict[str, nn.Module]:
    """`conv1`, `stage1`, `stage2`, `stage3`; the last stage has (depth - 2) / 9 + `last_bottlenecks` bottlenecks.

    >>> [len(layer) for name, layer in trunk(29, 0.25, 1, -1).items() if name.startswith("stage")]
    [3, 3, 2]
    """
    if depth < 11 or depth % 9 != 2:
        raise ValueError(f"expected a depth of 9n + 2, got {depth}; take 20, 29, 56, 110 or 164")
    if stem_stride < 1:
        raise ValueError(f"expected a stem_stride of 1 or more, got {stem_stride}; 1 is the paper's")
    first, *stages = (scaled(channels, width) for channels in CHANNELS)
    layers = OrderedDict[str, nn.Module](conv1=nn.Conv2d(3, first, 3, stem_stride, padding=1, bias=False))
    before = first
    for number, channels in enumerate(stages, start=1):
        count = depth // 9 + (last_bottlenecks if number == 3 else 0)
        blocks = [Bottleneck(before, channels, 2 if number > 1 else 1)]
        layers[f"stage{number}"] = nn.Sequential(
            *blocks, *(Bottleneck(channels, channels, 1) for _ in range(count - 1))
        )
        before = channels
    return layers


class PreActResNet(nn.Module):
    """Pre-activation ResNet-164 for small images, no attention; the paper's baseline RN-164 and its trunk's control.

    Args:
        num_classes: number of logits.
        depth: number of layers with weights, 9n + 2 for n bottlenecks per stage: 164, but also 20 or 29.
        width: factor of all channel numbers (16, then 64, 128 and 256); 1 is the paper's.
        stem_stride: 2 halves all resolutions: quick training, larger images.

    Raises:
        ValueError: a depth that is not 9n + 2, a width of 0 or below, a stride below 1.

    >>> sum(p.numel() for p in PreActResNet(10).parameters())
    1703258
    """

    def __init__(self, num_classes: int = 10, *, depth: int = 164, width: float = 1.0, stem_stride: int = 1) -> None:
        super().__init__()
        channels = scaled(CHANNELS[-1], width)
        self.features = nn.Sequential(trunk(depth, width, stem_stride))
        self.features.add_module("norm", _activation(channels))
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(channels, num_classes)
        initialize(self)

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b n"]:
        """Logits."""
        return self.head(self.pool(self.features(images)))


class RNAtt2(Attended):
    """Learn To Pay Attention on pre-activation ResNet-164, after its second and third stage.

    The global vector g comes from the third stage: BatchNorm, ReLU, a max-pool, one more convolution, the maximum of
    all positions, FC-1.

    Args:
        num_classes: number of logits.
        compat, norm, project: as in `LearnToPayAttention`; with `compat` "none" there is no g, and no layers for it.
        head: "concat", one classifier on all attended vectors; "indep", one for each, probabilities averaged.
        official_head: BatchNorm, ReLU and Dropout of each vector before the last linear layer; False: only that layer.
        depth: number of layers of the trunk and its classifier, 9n + 2; 164 is the paper's.
        width: factor of all channel numbers; 1 is the paper's.
        stem_stride: 2 halves all resolutions: quick training, larger images.
        average_branch_grads: average gradients where paths meet, as the authors' code does, instead of summing them.

    Raises:
        ValueError: as `PreActResNet`.
    """

    rates: ClassVar[tuple[float, float, float]] = (0.4, 0.5, 0.3)
    """Dropout after the convolution for g, before FC-1 and in the head."""

    def __init__(
        self,
        num_classes: int = 10,
        *,
        compat: Compat = "pc",
        norm: Norm = "softmax",
        head: Head = "concat",
        project: Project = "g",
        official_head: bool = True,
        depth: int = 164,
        width: float = 1.0,
        stem_stride: int = 1,
        average_branch_grads: bool = False,
    ) -> None:
        channels = scaled(CHANNELS[-1], width)
        layers, levels = self.trunk(depth, width, stem_stride)
        after_conv, before_fc1, in_head = self.rates
        if compat != "none":
            layers["norm"] = _activation(channels)
            layers["pool"] = nn.MaxPool2d(2, ceil_mode=True)
            conv = nn.Conv2d(channels, channels, 3, padding=1)
            layers["conv4"] = nn.Sequential(
                conv, nn.BatchNorm2d(channels, eps=1e-3), nn.ReLU(inplace=True), nn.Dropout(after_conv)
            )
        super().__init__(
            nn.Sequential(layers),
            {level: (level, scaled(count, width)) for level, count in levels.items()},
            None if compat == "none" else global_vector(channels, before_fc1),
            channels,
            num_classes,
            compat=compat,
            norm=norm,
            head=head,
            project=project,
            official_head=official_head,
            head_dropout=in_head,
            average_branch_grads=average_branch_grads,
        )

    @staticmethod
    def trunk(depth: int, width: float, stem_stride: int) -> tuple[OrderedDict[str, nn.Module], dict[str, int]]:
        """The layers up to the last attended one, and the channels of each attended one before scaling."""
        return trunk(depth, width, stem_stride), {"stage2": CHANNELS[2], "stage3": CHANNELS[3]}


class RNAtt(RNAtt2):
    """Learn To Pay Attention on pre-activation ResNet-164, at one level.

    Two plain 3 x 3 convolutions, `conv2` and `conv3`, take the place of the last bottleneck; the second one is
    attended. Options as in `RNAtt2`, but without Dropout.

    Differs: `conv3` keeps 8 x 8 positions of a 32-pixel image. In the authors' code its stride is 2, although the
    attention that reads it expects 8 x 8.
    """

    rates = (0.0, 0.0, 0.0)

    @staticmethod
    def trunk(depth: int, width: float, stem_stride: int) -> tuple[OrderedDict[str, nn.Module], dict[str, int]]:
        """The layers up to the attended one, and its channels before scaling."""
        if depth == 11:
            raise ValueError("expected a depth of 9n + 2 of at least 20, got 11; rn_att replaces the last bottleneck")
        layers, channels = trunk(depth, width, stem_stride, last_bottlenecks=-1), scaled(CHANNELS[-1], width)
        for name in ("conv2", "conv3"):
            layers[name] = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        return layers, {"conv3": CHANNELS[-1]}
