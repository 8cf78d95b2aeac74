"""The convolutional part of a network by name, for networks that put heads of their own on it."""

from collections.abc import Mapping
from typing import Any, cast

from jaxtyping import Float
from torch import Tensor, nn

from sightline.arguments import checked_options
from sightline.models.resnet import CifarResNet


def timm_features(backbone: str, *, pretrained: bool = False, level: int = -1, **options: Any) -> nn.Module:
    """A timm backbone that returns a list with one feature map; `feature_info.channels()` has its channels.

    Raises:
        ValueError: an unknown backbone, or one without such a feature map.
    """
    import timm

    if not timm.is_model(backbone):
        raise ValueError(f"expected the name of a timm model as backbone, got {backbone!r}; see timm.list_models()")
    try:
        features = timm.create_model(
            backbone, pretrained=pretrained, features_only=True, out_indices=(level,), **options
        )
    except (AssertionError, IndexError, RuntimeError) as error:
        raise ValueError(
            f"expected a backbone with a feature map at level {level}, got {backbone}: {error}; take another level"
        ) from error
    if getattr(features, "output_fmt", "NCHW") != "NCHW":
        raise ValueError(
            f"expected a backbone with feature maps (b, c, h, w), got {backbone}; take a convolutional one"
        )
    return features


class Trunk(nn.Module):
    """Images to one feature map of a timm backbone, or to the last one of `cifar_resnet`.

    Args:
        backbone: name of a convolutional timm model, or `cifar_resnet`.
        options: keyword arguments of the backbone, as in `{"depth": 8}`.
        pretrained: start from timm's weights, which are downloaded.
        level: which of a timm backbone's feature maps: -1 is the last, lower ones are larger.

    Raises:
        ValueError: an unknown backbone, one without such a feature map, or a bad option of `cifar_resnet`.

    >>> Trunk("cifar_resnet", {"depth": 8}).channels
    64
    """

    def __init__(
        self, backbone: str, options: Mapping[str, Any] | None = None, *, pretrained: bool = False, level: int = -1
    ) -> None:
        super().__init__()
        options = options or {}
        if backbone == "cifar_resnet":
            if pretrained:
                raise ValueError("expected a timm backbone with pretrained weights, got cifar_resnet; leave them out")
            chosen = checked_options(CifarResNet, options, backbone)
            try:
                network = CifarResNet(**chosen)
            except TypeError as error:
                raise ValueError(f"cifar_resnet: expected numbers as options, got {dict(options)}") from error
            layers = [*network.children()]
            self.network: nn.Module = nn.Sequential(*layers[: layers.index(network.layer3) + 1])
            self.channels: int = network.fc.in_features
        else:
            self.network = timm_features(backbone, pretrained=pretrained, level=level, **options)
            self.channels = cast(Any, self.network).feature_info.channels()[-1]

    def forward(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
        """The feature map."""
        features = self.network(images)
        return features if isinstance(features, Tensor) else features[0]
