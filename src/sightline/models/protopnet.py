"""ProtoPNet: a class is recognized by patches that look like learned prototypes, which are patches of training images.

Source: Chen et al., "This Looks Like That: Deep Learning for Interpretable Image Recognition", NeurIPS 2019
(1806.10574), section 2; constants and schedule as in the authors' code.

The paper's best figures on birds are those of several networks together, on images cropped to the bird.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sightline.models.trunks import timm_features


@dataclass(frozen=True, kw_only=True)
class Stages:
    """The authors' training schedule, with Adam: which layers train in an epoch, and when prototypes are pushed.

    Source: Chen et al. 2019, section 2.2; rates and lengths as in the authors' code.
    """

    warm: int = 5
    """Epochs in which only add-on layers and prototypes train."""
    push_every: int = 10
    """Epochs between two pushes, each followed by a training of the head; the last epoch ends with a push, too."""
    last: int = 20
    """Epochs of the head's training after a push."""
    features_lr: float = 1e-4
    lr: float = 3e-3
    head_lr: float = 1e-4

    def rates(self, epoch: int) -> dict[str, float]:
        """Learning rate of each child of the network in an epoch, counted from 0; the others are frozen.

        >>> Stages(warm=1).rates(0)
        {'add_on': 0.003, 'prototypes': 0.003}
        """
        factor = 0.1 ** (max(epoch - self.warm, 0) // 5)
        new = {"add_on": self.lr * factor, "prototypes": self.lr * factor}
        return new if epoch < self.warm else {"features": self.features_lr * factor} | new

    def pushes_after(self, epoch: int, epochs: int) -> bool:
        """Whether the prototypes are pushed after this epoch, counted from 0."""
        return (epoch + 1) % self.push_every == 0 or epoch + 1 == epochs


class LogSimilarity(nn.Module):
    """Similarity log((d + 1) / (d + 1e-4)) of squared distances d: 9.2 at distance 0, towards 0 far away.

    >>> LogSimilarity()(torch.tensor([[[[0.0, 1.0, 1e9]]]]))
    tensor([[[[9.2103, 0.6930, 0.0000]]]])
    """

    def forward(self, distances: Float[Tensor, "b p h w"]) -> Float[Tensor, "b p h w"]:
        """Similarity of every position to every prototype."""
        return ((distances + 1) / (distances + 1e-4)).log()


class Prototypes(nn.Module):
    """Pools a feature map into the similarity of its nearest patch to each of `count` learned vectors.

    The child `gate` returns the similarity maps.

    >>> Prototypes(8, 6)(torch.zeros(2, 8, 5, 7)).shape
    torch.Size([2, 6])
    """

    def __init__(self, channels: int, count: int) -> None:
        super().__init__()
        self.vectors = nn.Parameter(torch.rand(count, channels))
        self.gate = LogSimilarity()

    def distances(self, latent: Float[Tensor, "b c h w"]) -> Float[Tensor, "b p h w"]:
        """Squared distances ||z||^2 - 2 <z, p> + ||p||^2, at least in float32, because they cancel near 0."""
        dtype = torch.promote_types(latent.dtype, torch.float32)
        with torch.autocast(latent.device.type, enabled=False):
            z, p = latent.to(dtype).flatten(2), self.vectors.to(dtype)
            squared = z.square().sum(1, keepdim=True) - 2 * (p @ z) + p.square().sum(1)[:, None]
        return squared.clamp(min=0).unflatten(2, latent.shape[2:])

    def pool(self, distances: Float[Tensor, "b p h w"]) -> Float[Tensor, "b p"]:
        """Similarity of the nearest patch, in the type of the parameters."""
        return self.gate(distances).amax((2, 3)).to(self.vectors.dtype)

    def forward(self, latent: Float[Tensor, "b c h w"]) -> Float[Tensor, "b p"]:
        """Similarity of the nearest patch to each prototype."""
        return self.pool(self.distances(latent))


class ProtoPNet(nn.Module):
    """A timm backbone whose last feature map is compared with prototypes, each of one class; logits add similarities.

    Prototype j belongs to class j // prototypes. The network trains in its own `stages`, by `sightline train` and
    `sightline.fit`, or on tensors by `sightline.training.prototypes.fit_prototypes`; `push` there makes each prototype
    a patch of a training image, and `sightline.report.prototypes.this_looks_like_that` draws them.

    Args:
        num_classes: number of logits, at least 2.
        backbone: name of a convolutional timm model.
        pretrained: start from timm's weights, which are downloaded.
        level: which of the backbone's feature maps: -1 is the last, lower ones are larger.
        prototypes: number of prototypes per class.
        channels: length of a prototype.
        warm: epochs of the training in which the backbone is frozen.
        push_every: epochs of the training between two pushes, which make the prototypes patches of images.
        last: epochs of the head's own training after a push.

    Raises:
        ValueError: fewer than 2 classes, no prototype or channel, an unknown backbone or one without feature maps.

    >>> model = ProtoPNet(3, prototypes=2, channels=16)
    >>> model.head.weight[0].tolist()
    [1.0, 1.0, -0.5, -0.5, -0.5, -0.5]
    """

    of_class: Bool[Tensor, "n p"]
    """Whether a prototype belongs to a class."""
    last_distances: Float[Tensor, "b p h w"] | None = None
    """Of the last forward in training mode, until `own_loss` has used them."""

    def __init__(
        self,
        num_classes: int = 10,
        *,
        backbone: str = "resnet18",
        pretrained: bool = False,
        level: int = -1,
        prototypes: int = 10,
        channels: int = 128,
        warm: int = 5,
        push_every: int = 10,
        last: int = 20,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("num_classes", num_classes, 2),
            ("prototypes", prototypes, 1),
            ("channels", channels, 1),
            ("warm", warm, 0),
            ("push_every", push_every, 1),
            ("last", last, 0),
        ):
            if value < least:
                raise ValueError(f"expected {name} of {least} or more, got {value}")
        features = timm_features(backbone, pretrained=pretrained, level=level)
        self.stages = Stages(warm=warm, push_every=push_every, last=last)
        self.features = features
        self.add_on = nn.Sequential(
            nn.Conv2d(cast(Any, features).feature_info.channels()[-1], channels, 1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 1),
            nn.Sigmoid(),
        )
        self.prototypes = Prototypes(channels, num_classes * prototypes)
        self.head = nn.Linear(num_classes * prototypes, num_classes, bias=False)
        of_class = torch.eye(num_classes, dtype=torch.bool).repeat_interleave(prototypes, 1)
        self.register_buffer("of_class", of_class, persistent=False)
        self.head.weight.data.copy_(torch.where(of_class, 1.0, -0.5))

    def latent(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
        """Feature map that the prototypes are compared with, between 0 and 1."""
        return self.add_on(self.features(images)[0])

    def distances(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b p h w"]:
        """Squared distance of each position to each prototype."""
        return self.prototypes.distances(self.latent(images))

    def logits_of_distances(self, distances: Float[Tensor, "b p h w"]) -> Float[Tensor, "b n"]:
        """Logits from `distances`."""
        return self.head(self.prototypes.pool(distances))

    def forward(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b n"]:
        """Logits."""
        distances = self.distances(images)
        self.last_distances = distances if self.training else None
        return self.logits_of_distances(distances)

    def own_loss(self, logits: Float[Tensor, "b n"], labels: Int[Tensor, " b"]) -> Float[Tensor, ""]:
        """The terms of `prototype_terms` for the last forward in training mode."""
        distances, self.last_distances = self.last_distances, None
        return logits.new_zeros(()) if distances is None else prototype_terms(self, distances, labels)

    def __getstate__(self) -> dict[str, Any]:
        """State for copies and files, without the tensors of the last forward's graph."""
        return self.__dict__ | {"last_distances": None}


def prototype_terms(
    model: ProtoPNet,
    distances: Float[Tensor, "b p h w"],
    labels: Int[Tensor, " b"],
    *,
    cluster: float = 0.8,
    separation: float = 0.08,
    sparsity: float = 1e-4,
) -> Float[Tensor, ""]:
    """Cluster * Clst - separation * Sep + sparsity * L1, from `model.distances(images)`.

    Clst is the mean distance of an image's nearest patch to the nearest prototype of its class, Sep to the nearest of
    another class, L1 the sum of the head's absolute weights between a class and prototypes of others.

    Source: Chen et al. 2019, section 2.2, equations for stage 1 and 3; the weights are those of the authors' code.

    >>> model = ProtoPNet(2, prototypes=1, channels=4)
    >>> distances = torch.tensor([1.0, 3.0]).reshape(1, 2, 1, 1)
    >>> round(prototype_terms(model, distances, torch.tensor([0]), separation=0.0, sparsity=0.0).item(), 4)
    0.8
    """
    nearest = distances.amin((2, 3))
    same_class = model.of_class[labels]
    attraction = nearest.masked_fill(~same_class, torch.inf).amin(1).mean()
    repulsion = nearest.masked_fill(same_class, torch.inf).amin(1).mean()
    off_class = model.head.weight.masked_fill(model.of_class, 0).abs().sum()
    return cluster * attraction - separation * repulsion + sparsity * off_class
