"""MG-CNN: coarse and fine classes, each with an attention of its own.

Source: Wang et al., "Multiple Granularity Descriptors for Fine-Grained Categorization", ICCV 2015.
"""

from itertools import count
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from sightline.attention.pooling import LearnToPayAttention
from sightline.models.trunks import Trunk


class MGCNN(nn.Module):
    """A trunk with two attention poolings: one for the coarse class, one for the fine class, which sees both vectors.

    The coarse class follows from the fine one, so no further labels are needed. In training the coarse attention learns
    from the coarse labels alone; the loss is the sum of both cross entropies. `sl.fit` and `sightline train` do this.
    The children `coarse` and `fine` have the maps.

    Args:
        num_classes: number of fine classes, and of logits.
        parents: coarse class of each fine class, counted from 0, as in `[0, 0, 1, 1]`. None: every class is its own.
        coarse_weight: of the coarse cross entropy. 0: both attentions learn from the fine labels alone: the control.
        backbone: name of a convolutional timm model, or `cifar_resnet`.
        backbone_options: keyword arguments of the backbone.
        pretrained: start from timm's weights, which are downloaded.
        level: which of a timm backbone's feature maps: -1 is the last, lower ones are larger.

    Raises:
        ValueError: not one parent for each class, a coarse class without fine ones, a negative weight, an unknown
            backbone.

    Source: Wang et al., ICCV 2015: a description per granularity, descriptions joined, free labels from the ontology.

    Differs: the paper has a network per granularity and finds regions by detection; here one trunk is shared and an
    attention map takes the place of the regions. Three granularities there, two here.

    >>> model = MGCNN(4, parents=[0, 0, 1, 1], backbone="cifar_resnet", backbone_options={"depth": 8})
    >>> model(torch.zeros(2, 3, 32, 32)).shape, model.coarse_head.out_features
    (torch.Size([2, 4]), 2)
    """

    parent: Int[Tensor, " n"]
    coarse_logits: Float[Tensor, "b m"] | None = None
    """Of the last forward in training mode, until `own_loss` has used them."""

    def __init__(
        self,
        num_classes: int = 10,
        *,
        parents: list[int] | None = None,
        coarse_weight: float = 1.0,
        backbone: str = "resnet18",
        backbone_options: dict[str, Any] | None = None,
        pretrained: bool = False,
        level: int = -1,
    ) -> None:
        super().__init__()
        parents = [*range(num_classes)] if parents is None else parents
        if len(parents) != num_classes:
            raise ValueError(f"expected parents of {num_classes} classes, got {len(parents)}; name one for each class")
        for parent in parents:
            if not isinstance(parent, int) or parent < 0:  # pyright: ignore[reportUnnecessaryIsInstance]
                raise ValueError(
                    f"expected parents as whole numbers from 0 on, got {parent!r}; number them 0, 1, 2, ..."
                )
        missing = next(number for number in count() if number not in parents)
        if missing < max(parents):
            raise ValueError(
                f"expected parents without gaps, got {max(parents)} but no {missing}; number them 0, 1, ..."
            )
        if coarse_weight < 0:
            raise ValueError(f"expected a coarse_weight of 0 or more, got {coarse_weight}; the paper's sum has 1")
        self.coarse_weight = coarse_weight
        self.features = Trunk(backbone, backbone_options, pretrained=pretrained, level=level)
        channels = self.features.channels
        self.coarse, self.fine = (LearnToPayAttention(channels, compat="none") for _ in range(2))
        self.coarse_head = nn.Linear(channels, max(parents) + 1)
        self.head = nn.Linear(2 * channels, num_classes)
        self.register_buffer("parent", torch.tensor(parents), persistent=False)

    def forward(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b n"]:
        """Logits of the fine classes."""
        features = self.features(images)
        coarse, fine = self.coarse(features), self.fine(features)
        self.coarse_logits = None
        if self.training and self.coarse_weight:
            self.coarse_logits = self.coarse_head(coarse)
            coarse = coarse.detach()  # the fine labels do not move the coarse attention
        return self.head(torch.cat([coarse, fine], 1))

    def own_loss(self, logits: Float[Tensor, "b n"], labels: Int[Tensor, " b"]) -> Float[Tensor, ""]:
        """`coarse_weight` times the cross entropy of the coarse class, of the last forward in training mode."""
        coarse, self.coarse_logits = self.coarse_logits, None
        if coarse is None:
            return logits.new_zeros(())
        return self.coarse_weight * F.cross_entropy(coarse, self.parent[labels])

    def __getstate__(self) -> dict[str, Any]:
        """State for copies and files, without the tensors of the last forward's graph."""
        return self.__dict__ | {"coarse_logits": None}
