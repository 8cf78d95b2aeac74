"""`ablation_layer=` of AblationCAM: here channels are found by themselves, also among tokens."""


class AblationLayer:
    """Accepted by `AblationCAM`, which needs none."""


class AblationLayerVit(AblationLayer):
    """The same for tokens."""


class AblationLayerFasterRCNN(AblationLayer):
    """The same for feature pyramids."""
