"""One small network of every family of timm, torchvision and transformers, with random weights.

`timm_networks()`, `torchvision_networks()` and `transformers_networks()` list them, and `network.make(num_classes)`
builds one. Images are not square if the network allows it, so rows and columns cannot be confused.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import timm
import torchvision
import transformers
from torch import Tensor, nn

WIDE = (3, 128, 160)
SQUARE = (3, 224, 224)


class Network(NamedTuple):
    """A network with random weights."""

    name: str
    make: Callable[[int], nn.Module]
    """Builds the network for a number of classes."""
    size: tuple[int, ...]
    """Channels, height, width of an image; channels, frames, height, width of a video."""
    is_convolutional: bool
    """Whether only convolutions and poolings mix positions, not attention or layers across all of them."""


_CONVOLUTIONAL: dict[str, str | tuple[str, dict[str, Any]]] = {
    "byobnet": "test_byobnet",
    "convmixer": "convmixer_768_32",
    "convnext": "test_convnext",
    "cspnet": "cs3darknet_focus_s",
    "cspnext": "cspnext_tiny",
    "densenet": "densenet121",
    "dla": "dla46_c",
    "dpn": "dpn48b",
    "efficientnet": "test_efficientnet",
    "fasternet": "fasternet_t0",
    "fastvit": "fastvit_t8",
    "focalnet": "focalnet_tiny_srf",
    "ghostnet": "ghostnet_050",
    "hardcorenas": "hardcorenas_a",
    "hgnet": "hgnetv2_b0",
    "hrnet": "hrnet_w18_small",
    "inception_next": "inception_next_atto",
    "inception_resnet_v2": "inception_resnet_v2",
    "inception_v3": "inception_v3",
    "inception_v4": "inception_v4",
    "lcnetv2": "lcnetv2_small",
    "mambaout": "test_mambaout",
    "metaformer": "poolformer_s12",
    "mobilenetv3": "mobilenetv3_small_050",
    "nasnet": ("nasnetalarge", {"stem_size": 48, "num_features": 2016}),
    "nfnet": "test_nfnet",
    "pnasnet": "pnasnet5large",
    "rdnet": "rdnet_tiny",
    "regnet": "regnetx_002",
    "repghost": "repghostnet_050",
    "repvit": "repvit_m0_9",
    "res2net": "res2net50_14w_8s",
    "resnest": "resnest14d",
    "resnet": "test_resnet",
    "resnetv2": "resnetv2_18",
    "rexnet": "rexnet_100",
    "selecsls": "selecsls42",
    "senet": "legacy_seresnet18",
    "sknet": "skresnet18",
    "starnet": "starnet_s050",
    "tresnet": ("tresnet_m", {"width_factor": 0.5}),
    "vgg": "vgg11",
    "vovnet": "ese_vovnet19b_slim_dw",
    "xception": "xception",
    "xception_aligned": "xception41p",
}
_MIXING: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "beit": ("beit_base_patch16_224", (3, 96, 128), {"img_size": (96, 128), "embed_dim": 48, "depth": 3}),
    "byoanet": ("halonet_h1", (3, 256, 256), {}),
    "cait": ("cait_xxs24_224", (3, 128, 128), {"img_size": 128, "depth": 3}),
    "coat": ("coat_tiny", SQUARE, {}),
    "coat_lite": ("coat_lite_tiny", SQUARE, {}),
    "convit": ("convit_tiny", SQUARE, {"depth": 4}),
    "cpubone": ("cpubone_nano", WIDE, {}),
    "crossvit": ("crossvit_tiny_240", (3, 240, 240), {}),
    "csatv2": ("csatv2", (3, 256, 256), {}),
    "davit": ("davit_tiny", SQUARE, {"embed_dims": (24, 48, 96, 192)}),
    "deepseek_vit": ("deepseek_vit_412m", (3, 126, 126), {"depth": 2}),
    "deit": ("deit_tiny_patch16_224", (3, 96, 128), {"img_size": (96, 128), "depth": 3}),
    "deit_distilled": ("deit_tiny_distilled_patch16_224", (3, 96, 128), {"img_size": (96, 128), "depth": 3}),
    "edgenext": ("edgenext_xx_small", WIDE, {}),
    "efficientformer": ("efficientformer_l1", SQUARE, {}),
    "efficientformer_v2": ("efficientformerv2_s0", SQUARE, {}),
    "efficientvim": ("efficientvim_m1", SQUARE, {}),
    "efficientvit_mit": ("efficientvit_b0", WIDE, {}),
    "efficientvit_msra": ("efficientvit_m0", SQUARE, {}),
    "eva": ("eva02_tiny_patch14_224", (3, 112, 112), {"img_size": 112, "depth": 3}),
    "gcvit": ("gcvit_xxtiny", SQUARE, {"embed_dim": 32}),
    "gemma4_vit": ("gemma4_vit_167m", (3, 192, 192), {"depth": 2}),
    "hiera": ("hiera_tiny_224", SQUARE, {"embed_dim": 24}),
    "hieradet_sam2": ("sam2_hiera_tiny", SQUARE, {"embed_dim": 24}),
    "iformer": ("iformer_t", SQUARE, {}),
    "levit": ("levit_128s", SQUARE, {}),
    "levit_conv": ("levit_conv_128s", SQUARE, {}),
    "lowformer": ("lowformer_b0", WIDE, {}),
    "maxxvit_coatnet": ("test_coatnet", (3, 160, 160), {}),
    "maxxvit_maxvit": ("test_maxvit", (3, 160, 160), {}),
    "mlp_mixer": ("gmlp_ti16_224", SQUARE, {}),
    "mobilenetv5": ("mobilenetv5_base", (3, 128, 128), {}),
    "mobilevit": ("mobilevit_xxs", (3, 128, 128), {}),
    "mobilevitv2": ("mobilevitv2_050", (3, 128, 128), {}),
    "mvitv2": ("mvitv2_tiny", SQUARE, {}),
    "naflexvit": ("naflexvit_base_patch16_gap", (3, 96, 128), {"depth": 2, "embed_dim": 48}),
    "nest": ("nest_tiny", SQUARE, {}),
    "nextvit": ("nextvit_small", WIDE, {}),
    "pit": ("pit_ti_224", SQUARE, {}),
    "pvt_v2": ("pvt_v2_b0", (3, 128, 160), {}),
    "qwen3_vit": ("qwen3_vit_88m", (3, 128, 160), {"depth": 2}),
    "sequencer": ("sequencer2d_s", SQUARE, {}),
    "shvit": ("shvit_s1", SQUARE, {}),
    "swiftformer": ("swiftformer_xs", SQUARE, {}),
    "swin_transformer": ("swin_tiny_patch4_window7_224", SQUARE, {"embed_dim": 24}),
    "swin_transformer_v2": ("swinv2_tiny_window8_256", (3, 256, 256), {"embed_dim": 24}),
    "swin_transformer_v2_cr": ("swinv2_cr_tiny_224", SQUARE, {"embed_dim": 24}),
    "tiny_vit": ("tiny_vit_5m_224", SQUARE, {}),
    "tnt": ("tnt_s_patch16_224", SQUARE, {"depth": 3}),
    "twins": ("twins_svt_small", SQUARE, {"embed_dims": (16, 32, 64, 128)}),
    "twins_pcpvt": ("twins_pcpvt_small", SQUARE, {}),
    "visformer": ("visformer_tiny", SQUARE, {}),
    "vision_transformer": ("test_vit", (3, 160, 160), {}),
    "vision_transformer_hybrid": ("vit_tiny_r_s16_p8_224", SQUARE, {"depth": 3}),
    "vision_transformer_relpos": ("test_vit_relpos", (3, 160, 160), {}),
    "vision_transformer_sam": ("samvit_base_patch16_224", SQUARE, {"embed_dim": 48, "depth": 3}),
    "vitamin": ("vitamin_small_224", SQUARE, {}),
    "volo": ("volo_d1_224", SQUARE, {}),
    "xcit": ("xcit_nano_12_p8_224", (3, 96, 96), {"img_size": 96, "depth": 3}),
}
_TORCHVISION = (
    *("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet", "inception_v3"),
    *("mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_x_400mf", "regnet_y_400mf", "resnet18"),
    *("resnext50_32x4d", "shufflenet_v2_x0_5", "squeezenet1_0", "squeezenet1_1", "vgg11", "vgg11_bn"),
    "wide_resnet50_2",
)
_TORCHVISION_MIXING = {"maxvit_t": SQUARE, "swin_t": SQUARE, "swin_v2_t": (3, 256, 256), "vit_b_32": SQUARE}
_VIDEO = {
    "mc3_18": (3, 8, 64, 96),
    "r2plus1d_18": (3, 16, 64, 96),
    "r3d_18": (3, 16, 64, 96),
    "s3d": (3, 16, 224, 256),
    "mvit_v2_s": (3, 16, 224, 224),
    "swin3d_t": (3, 8, 128, 160),
}
_LARGER = {"inception_v3", "inception_v4", "inception_resnet_v2", "nasnet", "pnasnet", "xception", "xception_aligned"}


def _timm(name: str, options: dict[str, Any], num_classes: int) -> nn.Module:
    return timm.create_model(name, num_classes=num_classes, **options)


def timm_networks() -> list[Network]:
    """One network of each module of `timm.models`; a few modules contain two kinds."""
    networks: list[Network] = []
    for family, entry in _CONVOLUTIONAL.items():
        name, options = (entry, {}) if isinstance(entry, str) else entry
        size = (3, 192, 224) if family in _LARGER else WIDE
        networks.append(Network(name, partial(_timm, name, options), size, True))
    for name, size, options in _MIXING.values():
        networks.append(Network(name, partial(_timm, name, options), size, False))
    return networks


def _torchvision(name: str, num_classes: int) -> nn.Module:
    options: dict[str, Any] = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
    return torchvision.models.get_model(name, num_classes=num_classes, **options)


def torchvision_networks() -> list[Network]:
    """One network of each family of torchvision's image classifiers, and its video classifiers."""
    convolutional = [
        Network(name, partial(_torchvision, name), (3, 192, 224) if name == "inception_v3" else WIDE, True)
        for name in _TORCHVISION
    ]
    mixing = [Network(name, partial(_torchvision, name), size, False) for name, size in _TORCHVISION_MIXING.items()]
    video = [
        Network(name, partial(_torchvision, name), size, not name.startswith(("mvit", "swin")))
        for name, size in _VIDEO.items()
    ]
    return convolutional + mixing + video


_VIT = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
_PATCHES = {**_VIT, "image_size": (96, 128), "patch_size": 16}
_SWIN = {"image_size": (96, 128), "embed_dim": 16, "depths": [1, 1, 2], "num_heads": [1, 2, 4], "window_size": 4}
_TRANSFORMERS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "Beit": ((3, 96, 128), {**_PATCHES, "use_relative_position_bias": True}),
    "Bit": (WIDE, {"embedding_size": 16, "hidden_sizes": [16, 32, 64, 128], "depths": [1, 1, 1, 1], "num_groups": 4}),
    "ConvNext": (WIDE, {"hidden_sizes": [16, 32, 64, 128], "depths": [1, 1, 2, 1]}),
    "ConvNextV2": (WIDE, {"hidden_sizes": [16, 32, 64, 128], "depths": [1, 1, 2, 1]}),
    "Cvt": (WIDE, {"embed_dim": [16, 32, 64], "num_heads": [1, 2, 4], "depth": [1, 2, 3]}),
    "Data2VecVision": ((3, 96, 128), _PATCHES),
    "DeiT": ((3, 96, 128), _PATCHES),
    "Dinov2": ((3, 96, 96), {**_VIT, "image_size": 96, "patch_size": 16, "mlp_ratio": 2}),
    "Dinov2WithRegisters": ((3, 96, 96), {**_VIT, "image_size": 96, "patch_size": 16, "mlp_ratio": 2}),
    "EfficientNet": (WIDE, {"width_coefficient": 0.25, "depth_coefficient": 0.25, "hidden_dim": 320}),
    "FocalNet": (WIDE, {"image_size": 128, "embed_dim": 16, "depths": [1, 1, 2], "focal_levels": [2, 2, 2]}),
    "Hiera": (SQUARE, {"embed_dim": 16, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8]}),
    "IJepa": ((3, 96, 128), _PATCHES),
    "Levit": (SQUARE, {}),
    "MobileNetV1": (WIDE, {"depth_multiplier": 0.25}),
    "MobileNetV2": (WIDE, {"depth_multiplier": 0.35}),
    "MobileViT": ((3, 128, 128), {"image_size": 128}),
    "MobileViTV2": ((3, 128, 128), {"image_size": 128, "width_multiplier": 0.5}),
    "PoolFormer": (WIDE, {"hidden_sizes": [16, 32, 64, 128], "depths": [1, 1, 2, 1]}),
    "Pvt": (SQUARE, {"hidden_sizes": [8, 16, 40, 64], "depths": [1, 1, 2, 1]}),
    "PvtV2": (WIDE, {"image_size": (128, 160), "hidden_sizes": [8, 16, 40, 64], "depths": [1, 1, 2, 1]}),
    "RegNet": (
        WIDE,
        {"embedding_size": 16, "hidden_sizes": [16, 32, 64, 128], "depths": [1, 1, 2, 1], "groups_width": 8},
    ),
    "ResNet": (WIDE, {"embedding_size": 16, "hidden_sizes": [16, 32, 64, 128], "depths": [1, 1, 2, 1]}),
    "Segformer": (WIDE, {"hidden_sizes": [8, 16, 32, 64], "depths": [1, 1, 2, 1]}),
    "SwiftFormer": (WIDE, {"depths": [1, 1, 2, 1], "embed_dims": [16, 32, 48, 64]}),
    "Swin": ((3, 96, 128), _SWIN),
    "Swinv2": ((3, 96, 128), _SWIN),
    "TextNet": (WIDE, {}),
    "ViT": ((3, 96, 128), _PATCHES),
    "ViTMSN": ((3, 96, 128), _PATCHES),
}
_TRANSFORMERS_CONVOLUTIONAL = {
    *("Bit", "ConvNext", "ConvNextV2", "EfficientNet", "FocalNet", "MobileNetV1", "MobileNetV2", "PoolFormer"),
    *("RegNet", "ResNet", "TextNet"),
}
_CLIP = {**_VIT, "image_size": 96, "patch_size": 16}
_TRANSFORMERS_VIDEO = {
    "VideoMAE": ((3, 4, 96, 96), {**_VIT, "image_size": 96, "num_frames": 4, "tubelet_size": 2}),
    "Timesformer": ((3, 4, 96, 96), {**_VIT, "image_size": 96, "num_frames": 4}),
    "Vivit": ((3, 4, 96, 96), {**_VIT, "image_size": 96, "num_frames": 4, "tubelet_size": [2, 16, 16]}),
}


class _FramesFirst(nn.Module):
    """Takes (b, c, t, h, w), as sightline does, for a network that expects (b, t, c, h, w)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, videos: Tensor) -> Any:
        return self.network(videos.transpose(1, 2))


def _transformers(name: str, kind: str, options: dict[str, Any], num_classes: int) -> nn.Module:
    config = getattr(transformers, f"{name}Config")(num_labels=num_classes, **options)
    network = getattr(transformers, f"{name}For{kind}Classification")(config)
    return _FramesFirst(network) if kind == "Video" else network


def transformers_networks() -> list[Network]:
    """Image and video classifiers of transformers, from small configurations."""
    networks = [
        Network(name, partial(_transformers, name, "Image", options), size, name in _TRANSFORMERS_CONVOLUTIONAL)
        for name, (size, options) in _TRANSFORMERS.items()
    ]
    for name in ("CLIP", "Siglip"):
        options = {"vision_config": _CLIP}
        networks.append(Network(name, partial(_transformers, name, "Image", options), (3, 96, 96), False))
    for name, (size, options) in _TRANSFORMERS_VIDEO.items():
        networks.append(Network(name, partial(_transformers, name, "Video", options), size, False))
    return networks
