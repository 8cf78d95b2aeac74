"""Training of a ProtoPNet: its loss, its stages, and the push of prototypes onto patches of training images."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from sightline.inference import untouched
from sightline.models.protopnet import ProtoPNet, Stages, prototype_terms
from sightline.training.stages import enter_epoch, staged_optimizer

Batches = Iterable[tuple[Tensor, Tensor]]
"""Images (b, 3, H, W) and labels (b,)."""


def prototype_loss(
    model: ProtoPNet, distances: Float[Tensor, "b p h w"], labels: Int[Tensor, " b"], **weights: float
) -> Float[Tensor, ""]:
    """Cross-entropy and `prototype_terms`, from `model.distances(images)`; the weights are those of the terms.

    Source: Chen et al. 2019, section 2.2, equations for stage 1 and 3.

    >>> model = ProtoPNet(2, prototypes=1, channels=4)
    >>> distances = torch.tensor([1.0, 3.0]).reshape(1, 2, 1, 1)
    >>> error, loss = (prototype_loss(model, distances, torch.tensor([0]), cluster=w) for w in (0.0, 0.8))
    >>> round((loss - error).item(), 4)
    0.8
    """
    error = F.cross_entropy(model.logits_of_distances(distances), labels)
    return error + prototype_terms(model, distances, labels, **weights)


@dataclass(frozen=True)
class Pushed:
    """The image patches that the prototypes were pushed to.

    Attributes:
        image: number of the image, in the order in which they were given.
        row: of the image's feature map.
        column: of the image's feature map.
        distance: squared length of the prototype's move; large if no patch of its class was like the prototype.
    """

    image: Int[Tensor, " p"]
    row: Int[Tensor, " p"]
    column: Int[Tensor, " p"]
    distance: Float[Tensor, " p"]


@torch.no_grad()
def push(model: ProtoPNet, batches: Iterable[tuple[Tensor, Tensor]]) -> Pushed:
    """Make each prototype the nearest latent patch of its own class in images (b, 3, H, W) with labels (b,).

    Runs in eval mode; only the prototypes change. A loader must neither shuffle nor augment, or the numbers of the
    images mean nothing.

    Raises:
        ValueError: a class without an image; the prototypes are then unchanged.

    Source: Chen et al. 2019, section 2.2, stage 2.
    """
    vectors = model.prototypes.vectors
    best = torch.full_like(vectors[:, 0], torch.inf, dtype=torch.promote_types(vectors.dtype, torch.float32))
    image, row, column = torch.zeros(3, len(vectors), dtype=torch.long, device=vectors.device)
    nearest = vectors.clone()
    seen = 0
    with untouched(model):
        for images, labels in batches:
            latent = model.latent(images.to(vectors.device))
            distances = model.prototypes.distances(latent)
            others = ~model.of_class[labels.to(vectors.device)]
            distances = distances.masked_fill(others[:, :, None, None], torch.inf).transpose(0, 1)
            least, index = distances.flatten(1).min(1)
            height, width = latent.shape[2:]
            place = (index // (height * width), index // width % height, index % width)
            patches = latent.permute(0, 2, 3, 1)[place].to(nearest.dtype)
            closer = least < best
            best = torch.where(closer, least, best)
            nearest = torch.where(closer[:, None], patches, nearest)
            image = torch.where(closer, seen + place[0], image)
            row, column = torch.where(closer, place[1], row), torch.where(closer, place[2], column)
            seen += len(images)
    missing = (model.of_class & best.isinf()).any(1).nonzero().flatten().tolist()
    if missing:
        raise ValueError(f"expected images of every class, got none of class {missing[0]}; push with the training set")
    vectors.copy_(nearest)
    return Pushed(image, row, column, best)


def finish_stage(
    model: ProtoPNet, stages: Stages, batches: Callable[[], Batches], batch_size: int, seed: int
) -> Pushed:
    """Push the prototypes, then train the head on the images' distances to them, in eval mode.

    Args:
        model: the network.
        stages: how long the head is trained, and at which rate.
        batches: returns the training images, neither shuffled nor augmented; called twice.
        batch_size: images per step of the head's training.
        seed: of its order.
    """
    pushed = push(model, batches())
    weight = model.head.weight
    device = weight.device
    with untouched(model), torch.no_grad():
        parts = [(model.distances(x.to(device)).amin((2, 3), keepdim=True), y.to(device)) for x, y in batches()]
    nearest, labels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    required = weight.requires_grad
    optimizer = torch.optim.Adam([weight.requires_grad_()], stages.head_lr)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(stages.last):
        for rows in torch.randperm(len(labels), generator=generator).to(device).split(batch_size):
            optimizer.zero_grad()
            prototype_loss(model, nearest[rows], labels[rows]).backward(inputs=[weight])
            optimizer.step()
    optimizer.zero_grad()
    weight.requires_grad_(required)
    return pushed


def fit_prototypes(
    model: ProtoPNet,
    images: Float[Tensor, "n 3 H W"],
    labels: Int[Tensor, " n"],
    stages: Stages | None = None,
    *,
    epochs: int = 20,
    batch_size: int = 80,
    seed: int = 0,
) -> Pushed:
    """Train in three stages with Adam and return the patches that the prototypes are in the end.

    The first `stages.warm` epochs train add-on layers and prototypes only, the others the backbone as well, at rates
    that fall to a tenth every 5 epochs. After every `stages.push_every` epochs, and at the end, the prototypes are
    pushed and the head is trained in eval mode, so the prototypes stay patches of images. The head is fixed otherwise.

    Raises:
        ValueError: no epoch, or a class without an image.

    Source: Chen et al. 2019, section 2.2; rates and lengths as in the authors' code.
    Differs: the head's optimizer starts afresh after each push; the authors' keeps its moments.
    """
    stages = stages or model.stages
    if min(epochs, stages.push_every, batch_size) < 1:
        raise ValueError(
            f"expected epochs, push_every and batch_size of 1 or more, got {epochs}, {stages.push_every}, {batch_size}"
        )
    generator = torch.Generator().manual_seed(seed)
    parts = [*zip(images.split(batch_size), labels.split(batch_size), strict=True)]
    pushed: Pushed | None = None
    optimizer = staged_optimizer(model)
    model.train()
    for epoch in range(epochs):
        enter_epoch(optimizer, stages, epoch)
        for rows in torch.randperm(len(images), generator=generator).to(images.device).split(batch_size):
            optimizer.zero_grad()
            prototype_loss(model, model.distances(images[rows]), labels[rows]).backward()
            optimizer.step()
        if stages.pushes_after(epoch, epochs):
            pushed = finish_stage(model, stages, parts.__iter__, batch_size, seed + epoch)
    model.requires_grad_()
    assert pushed is not None  # the last epoch ends with a push
    return pushed
