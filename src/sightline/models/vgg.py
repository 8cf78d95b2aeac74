"""The VGG networks of "Learn To Pay Attention", their baselines and their control.

The attended networks drop VGG's pools after convolutions 2 and 4 and add two convolutions at the end, so that an image
of 32 pixels has 32, 16 and 8 pixels at convolutions 7, 10 and 13. Dotted names read as in the paper: `features.conv13`,
`attention.conv13`, `attention.conv13.gate`.

Source: Jetley et al., "Learn To Pay Attention", ICLR 2018, section 4.1; layers, Dropout and initialization as in the
authors' Torch7 code.

Differs: pools round up and the last one takes the maximum of all that is left, so that images of any size pass; at 32
pixels that changes nothing.
"""

from collections import OrderedDict
from itertools import pairwise
from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor, nn

from sightline.attention.channel import Gating
from sightline.attention.pooling import Compat, CompatibilityGate, LearnToPayAttention, Norm, Project
from sightline.models.ltpa import Attended, ConcatHead, Head, global_vector, initialize, scaled

Read = Literal["before", "after"]

CHANNELS = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512, 512, 512)
DROPOUT = {1: 0.3, 3: 0.4, 5: 0.4, 6: 0.4, 8: 0.4, 9: 0.4, 11: 0.4, 12: 0.4, 14: 0.4, 15: 0.4}


def trunk(convs: int, pools: tuple[int, ...], width: float, stem_pool: int, dropout: float) -> nn.Sequential:
    """Convolutions conv1, conv2, ... up to number `convs`, each followed by a max-pool if its number is in `pools`.

    >>> [name for name, _ in trunk(4, (3,), width=0.25, stem_pool=2, dropout=1.0).named_children()]
    ['conv1', 'conv2', 'stem_pool', 'conv3', 'pool3', 'conv4']
    """
    if stem_pool < 1:
        raise ValueError(f"expected stem_pool of 1 (no pool) or more, got {stem_pool}")
    if not 0 <= dropout <= 1:
        raise ValueError(f"expected dropout between 0 (none) and 1 (the paper's), got {dropout}")
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    channels = (3, *(scaled(c, width) for c in CHANNELS[:convs]))
    for number, (before, after) in enumerate(pairwise(channels), start=1):
        conv = nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after, eps=1e-3), nn.ReLU(True))
        if number in DROPOUT and dropout > 0:
            conv.append(nn.Dropout(dropout * DROPOUT[number]))
        layers[f"conv{number}"] = conv
        if number == 2 and stem_pool > 1:
            layers["stem_pool"] = nn.MaxPool2d(stem_pool, ceil_mode=True)
        if number in pools:
            layers[f"pool{number}"] = nn.MaxPool2d(2, ceil_mode=True)
    return nn.Sequential(layers)


class VGG(nn.Module):
    """VGG-16 with BatchNorm: 13 convolutions, 5 pools, no attention; the paper's baseline.

    Args:
        num_classes: number of logits.
        width: factor of all channel numbers; 1 is the paper's.
        stem_pool: side of a max-pool after convolution 2; 1: no such pool.
        dropout: factor of all Dropout rates between convolutions; 1 is the paper's, narrow networks need a lower one.
        official_head: BatchNorm, ReLU and Dropout before the last linear layer; False: only that layer.
    """

    convs: ClassVar[int] = 13
    pools: ClassVar[tuple[int, ...]] = (2, 4, 7, 10)

    def __init__(
        self,
        num_classes: int = 10,
        *,
        width: float = 1.0,
        stem_pool: int = 1,
        dropout: float = 1.0,
        official_head: bool = True,
    ) -> None:
        super().__init__()
        channels = scaled(CHANNELS[-1], width)
        self.features = trunk(self.convs, self.pools, width, stem_pool, dropout)
        self.add_vector(channels)
        self.head = ConcatHead([channels], num_classes, official=official_head)
        initialize(self)

    def add_vector(self, channels: int) -> None:
        """Add the layers between the last feature map and the vector that the head classifies."""
        self.fc1 = global_vector(channels)

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b n"]:
        """Logits."""
        return self.head([self.fc1(self.features(images))])


class VGG15(VGG):
    """The trunk of the attended networks, 15 convolutions, without attention: the control.

    The only difference to `vgg_att`: the head classifies the global vector g, not the attended one. Maps are read
    at convolution 13, as there.
    """

    convs = 15
    pools = (7, 10, 13, 14)
    default_layer = "features.conv13"


class VGGGap(nn.Module):
    """The attended networks' 13 convolutions, global average pooling, one linear layer: for class activation maps.

    Source: Zhou et al., "Learning Deep Features for Discriminative Localization", CVPR 2016, on the authors' trunk.

    Args:
        num_classes: number of logits.
        width: factor of all channel numbers; 1 is the paper's.
        stem_pool: side of a max-pool after convolution 2; 1: no such pool.
        dropout: factor of all Dropout rates between convolutions; 1 is the paper's, narrow networks need a lower one.
    """

    def __init__(self, num_classes: int = 10, *, width: float = 1.0, stem_pool: int = 1, dropout: float = 1.0) -> None:
        super().__init__()
        self.features = trunk(13, (7, 10), width, stem_pool, dropout)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(scaled(CHANNELS[-1], width), num_classes)
        initialize(self)

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b n"]:
        """Logits."""
        return self.head(self.pool(self.features(images)))


class VGGPan(VGG):
    """Progressive attention: a sigmoid mask at convolution 10, softmax pooling at convolution 13.

    Source: Seo et al., "Progressive Attention Networks for Visual Attribute Prediction", BMVC 2018.

    Differs: on the trunk of "Learn To Pay Attention", whose authors score both levels against a global vector; here the
    score is <u, l> + b. Options as in `VGG`.
    """

    pools = (7, 10)
    default_layer = "features.conv13"

    def add_vector(self, channels: int) -> None:
        """Add both levels of attention and FC-1."""
        mask = Gating(CompatibilityGate(channels, compat="none", norm="sigmoid"), identity=False)
        self.attention = nn.ModuleDict({"conv10": mask, "conv13": LearnToPayAttention(channels, compat="none")})
        self.fc1 = nn.Linear(channels, channels)

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b n"]:
        """Logits."""
        x = images
        for name, layer in self.features.named_children():
            x = layer(x)
            if name == "conv10":
                x = self.attention[name](x)
        return self.head([self.fc1(self.attention["conv13"](x))])


class VGGAtt(Attended):
    """Learn To Pay Attention at convolution 13.

    Args:
        num_classes: number of logits.
        compat: score of a position: "pc", <u, l + g>; "dp", <l, g>; "none", <u, l>. With "none" there is no global
            vector g, and no convolutions 14, 15 and FC-1. With "pc" and "softmax" g cancels: the logits
            are those of "none" and the same layers get no gradient.
        norm: "softmax", weights sum to 1; "sigmoid", each between 0 and 1; "uniform", with `compat` "none": the same
            weight everywhere, so the same network without attention.
        head: "concat", one classifier on all attended vectors; "indep", one for each, probabilities averaged.
        project: at convolution 7, which has half the channels of g: "g" projects g, "l" projects the features.
        read: attend the features before or after the max-pool.
        official_head: BatchNorm, ReLU and Dropout of each vector before the last linear layer; False: only that layer.
        width: factor of all channel numbers; 1 is the paper's.
        stem_pool: side of a max-pool after convolution 2; 1: no such pool.
        dropout: factor of all Dropout rates between convolutions; 1 is the paper's, narrow networks need a lower one.
        average_branch_grads: average gradients where paths meet, as the authors' code does, instead of summing them.
    """

    levels: ClassVar[tuple[int, ...]] = (13,)

    def __init__(
        self,
        num_classes: int = 10,
        *,
        compat: Compat = "pc",
        norm: Norm = "softmax",
        head: Head = "concat",
        project: Project = "g",
        read: Read = "before",
        official_head: bool = True,
        width: float = 1.0,
        stem_pool: int = 1,
        dropout: float = 1.0,
        average_branch_grads: bool = False,
    ) -> None:
        channels = scaled(CHANNELS[-1], width)
        if compat == "none":
            features = trunk(13, (7, 10) if read == "before" else (7, 10, 13), width, stem_pool, dropout)
            fc1 = None
        else:
            features = trunk(15, (7, 10, 13, 14), width, stem_pool, dropout)
            fc1 = global_vector(channels)
        child = "conv" if read == "before" else "pool"
        super().__init__(
            features,
            {f"conv{level}": (f"{child}{level}", scaled(CHANNELS[level - 1], width)) for level in self.levels},
            fc1,
            channels,
            num_classes,
            compat=compat,
            norm=norm,
            head=head,
            project=project,
            official_head=official_head,
            head_dropout=0.5,
            average_branch_grads=average_branch_grads,
        )


class VGGAtt2(VGGAtt):
    """Learn To Pay Attention at convolutions 10 and 13; options as in `VGGAtt`."""

    levels = (10, 13)


class VGGAtt3(VGGAtt):
    """Learn To Pay Attention at convolutions 7, 10 and 13; options as in `VGGAtt`."""

    levels = (7, 10, 13)
