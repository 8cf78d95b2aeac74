"""ProtoPNet: a class is recognized by patches that look like learned prototypes, which are patches of training images.

Source: Chen et al., "This Looks Like That: Deep Learning for Interpretable Image Recognition", NeurIPS 2019
(1806.10574), section 2; constants and schedule as in the authors' code.

The paper's best figures on birds are those of several networks together, on images cropped to the bird.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from sightline import maps
from sightline.inference import untouched

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True)
class Stages:
    """The authors' course of a training, with Adam: which layers move in an epoch, and when prototypes are pushed.

    Source: Chen et al. 2019, section 2.2; rates and lengths as in the authors' code.
    """

    warm: int = 5
    """Epochs in which add-on layers and prototypes move alone."""
    push_every: int = 10
    """Epochs after which the prototypes become patches of images and the head is trained; also done after the last."""
    last: int = 20
    """Epochs of the head's training after each push."""
    features_lr: float = 1e-4
    lr: float = 3e-3
    head_lr: float = 1e-4

    def rates(self, epoch: int) -> dict[str, float]:
        """Learning rate of each child of the network in an epoch, counted from 0; the others stand still.

        >>> Stages(warm=1).rates(0)
        {'add_on': 0.003, 'prototypes': 0.003}
        """
        fall = 0.1 ** (max(epoch - self.warm, 0) // 5)
        new = {"add_on": self.lr * fall, "prototypes": self.lr * fall}
        return new if epoch < self.warm else {"features": self.features_lr * fall} | new

    def settles(self, epoch: int, epochs: int) -> bool:
        """Whether the prototypes are pushed after this epoch, counted from 0."""
        return (epoch + 1) % self.push_every == 0 or epoch + 1 == epochs


class Similarity(nn.Module):
    """Similarity log((d + 1) / (d + 1e-4)) of squared distances d: 9.2 at distance 0, towards 0 far away.

    >>> Similarity()(torch.tensor([[[[0.0, 1.0, 1e9]]]]))
    tensor([[[[9.2103, 0.6930, 0.0000]]]])
    """

    def forward(self, distances: Float[Tensor, "b p h w"]) -> Float[Tensor, "b p h w"]:
        """Similarity of every position to every prototype."""
        return ((distances + 1) / (distances + 1e-4)).log()


class Prototypes(nn.Module):
    """Pools a feature map into how similar its best patch is to each of `count` learned vectors.

    The child `gate` returns the similarity maps.

    >>> Prototypes(8, 6)(torch.zeros(2, 8, 5, 7)).shape
    torch.Size([2, 6])
    """

    def __init__(self, channels: int, count: int) -> None:
        super().__init__()
        self.vectors = nn.Parameter(torch.rand(count, channels))
        self.gate = Similarity()

    def distances(self, latent: Float[Tensor, "b c h w"]) -> Float[Tensor, "b p h w"]:
        """Squared distances ||z||^2 - 2 <z, p> + ||p||^2, at least in float32: near 0 little is left of them."""
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

    Prototype j belongs to class j // prototypes. It is trained in `stages` of its own, by `sightline train` and
    `sightline.fit` too, or on tensors by `fit_prototypes`; `push` makes each prototype a patch of a training image,
    `this_looks_like_that` draws them.

    Args:
        num_classes: number of logits, at least 2.
        backbone: name of a convolutional timm model.
        pretrained: start from timm's weights, which are downloaded.
        level: which of the backbone's feature maps: -1 is the last, lower ones are larger.
        prototypes: number of prototypes per class.
        channels: length of a prototype.
        warm: epochs of the training in which the backbone stands still.
        push_every: epochs of the training after which the prototypes become patches of images.
        last: epochs of the head's own training after that.

    Raises:
        ValueError: fewer than 2 classes, no prototype or channel, an unknown backbone or one without feature maps.

    >>> model = ProtoPNet(3, prototypes=2, channels=16)
    >>> model.head.weight[0].tolist()
    [1.0, 1.0, -0.5, -0.5, -0.5, -0.5]
    """

    own: Bool[Tensor, "n p"]

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
        import timm

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
        if not timm.is_model(backbone):
            raise ValueError(f"expected the name of a timm model as backbone, got {backbone!r}; see timm.list_models()")
        try:
            features = timm.create_model(backbone, pretrained=pretrained, features_only=True, out_indices=(level,))
        except (AssertionError, IndexError, RuntimeError) as error:
            raise ValueError(
                f"expected a backbone with a feature map at level {level}, got {backbone}: {error}; take another level"
            ) from error
        known = cast(Any, features)
        if getattr(known, "output_fmt", "NCHW") != "NCHW":
            raise ValueError(
                f"expected a backbone with feature maps (b, c, h, w), got {backbone}; take a convolutional one"
            )
        self.stages = Stages(warm=warm, push_every=push_every, last=last)
        self.features = features
        self.add_on = nn.Sequential(
            nn.Conv2d(known.feature_info.channels()[-1], channels, 1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 1),
            nn.Sigmoid(),
        )
        self.prototypes = Prototypes(channels, num_classes * prototypes)
        self.head = nn.Linear(num_classes * prototypes, num_classes, bias=False)
        own = torch.eye(num_classes, dtype=torch.bool).repeat_interleave(prototypes, 1)
        self.register_buffer("own", own, persistent=False)
        self.head.weight.data.copy_(torch.where(own, 1.0, -0.5))

    def latent(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
        """Feature map that the prototypes are compared with, between 0 and 1."""
        return self.add_on(self.features(images)[0])

    def distances(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b p h w"]:
        """Squared distance of each position to each prototype."""
        return self.prototypes.distances(self.latent(images))

    def objective(
        self, images: Float[Tensor, "b 3 H W"], labels: Int[Tensor, " b"]
    ) -> tuple[Float[Tensor, "b n"], Float[Tensor, ""]]:
        """Logits, and the loss of the first and second stage (`prototype_loss`)."""
        distances = self.distances(images)
        return self.logits_of_distances(distances), prototype_loss(self, distances, labels)

    def settle(
        self,
        batches: Callable[[], Iterable[tuple[Tensor, Tensor]]],
        batch_size: int,
        seed: int,
        stages: Stages | None = None,
    ) -> "Pushed":
        """Push the prototypes, then train the head on the images' distances to them, in eval mode.

        Args:
            batches: gives the training images and labels, neither shuffled nor changed; called twice.
            batch_size: images per step of the head's training.
            seed: of its order.
            stages: others than the network's own.
        """
        stages = stages or self.stages
        pushed = push(self, batches())
        device = self.head.weight.device
        with untouched(self), torch.no_grad():
            parts = [(self.distances(x.to(device)).amin((2, 3), keepdim=True), y.to(device)) for x, y in batches()]
        nearest, labels = (torch.cat(each) for each in zip(*parts, strict=True))
        moved = self.head.weight.requires_grad
        optimizer = torch.optim.Adam([self.head.weight.requires_grad_()], stages.head_lr)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(stages.last):
            for rows in torch.randperm(len(labels), generator=generator).to(device).split(batch_size):
                optimizer.zero_grad()
                prototype_loss(self, nearest[rows], labels[rows]).backward(inputs=[self.head.weight])
                optimizer.step()
        optimizer.zero_grad()
        self.head.weight.requires_grad_(moved)
        return pushed

    def logits_of_distances(self, distances: Float[Tensor, "b p h w"]) -> Float[Tensor, "b n"]:
        """Logits from `distances`."""
        return self.head(self.prototypes.pool(distances))

    def forward(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b n"]:
        """Logits."""
        return self.logits_of_distances(self.distances(images))


def prototype_loss(
    model: ProtoPNet,
    distances: Float[Tensor, "b p h w"],
    labels: Int[Tensor, " b"],
    *,
    cluster: float = 0.8,
    separation: float = 0.08,
    sparsity: float = 1e-4,
) -> Float[Tensor, ""]:
    """Cross-entropy + cluster * Clst - separation * Sep + sparsity * L1, from `model.distances(images)`.

    Clst is the mean distance of an image's nearest patch to the nearest prototype of its class, Sep to the nearest of
    another class, L1 the sum of the head's absolute weights between a class and prototypes of others.

    Source: Chen et al. 2019, section 2.2, equations for stage 1 and 3; the weights are those of the authors' code.

    >>> model = ProtoPNet(2, prototypes=1, channels=4)
    >>> distances = torch.tensor([1.0, 3.0]).reshape(1, 2, 1, 1)
    >>> error, loss = (prototype_loss(model, distances, torch.tensor([0]), cluster=w) for w in (0.0, 0.8))
    >>> round((loss - error).item(), 4)
    0.8
    """
    nearest = distances.amin((2, 3))
    own = model.own[labels]
    attraction = nearest.masked_fill(~own, torch.inf).amin(1).mean()
    repulsion = nearest.masked_fill(own, torch.inf).amin(1).mean()
    error = F.cross_entropy(model.logits_of_distances(distances), labels)
    off_class = model.head.weight.masked_fill(model.own, 0).abs().sum()
    return error + cluster * attraction - separation * repulsion + sparsity * off_class


@dataclass(frozen=True)
class Pushed:
    """Where the prototypes come from.

    Attributes:
        image: number of the image, in the order in which they were given.
        row: of the image's feature map.
        column: of the image's feature map.
        distance: squared length of the prototype's move; large where the prototype was like no patch of its class.
    """

    image: Int[Tensor, " p"]
    row: Int[Tensor, " p"]
    column: Int[Tensor, " p"]
    distance: Float[Tensor, " p"]


@torch.no_grad()
def push(model: ProtoPNet, batches: Iterable[tuple[Tensor, Tensor]]) -> Pushed:
    """Make each prototype the nearest latent patch of its own class in images (b, 3, H, W) with labels (b,).

    Runs in eval mode; nothing but the prototypes changes. A loader must neither shuffle nor augment, or the images that
    are returned cannot be found again.

    Raises:
        ValueError: a class without an image; the prototypes are as before then.

    Source: Chen et al. 2019, section 2.2, stage 2.
    """
    vectors = model.prototypes.vectors
    best = torch.full((len(vectors),), torch.inf, dtype=torch.promote_types(vectors.dtype, torch.float32))
    best = best.to(vectors.device)
    image, row, column = torch.zeros(3, len(vectors), dtype=torch.long, device=vectors.device)
    found = vectors.clone()
    seen = 0
    with untouched(model):
        for images, labels in batches:
            latent = model.latent(images.to(vectors.device))
            distances = model.prototypes.distances(latent)
            others = ~model.own[labels.to(vectors.device)]
            distances = distances.masked_fill(others[:, :, None, None], torch.inf).transpose(0, 1)
            least, index = distances.flatten(1).min(1)
            height, width = latent.shape[2:]
            place = (index // (height * width), index // width % height, index % width)
            patches = latent.permute(0, 2, 3, 1)[place].to(found.dtype)
            closer = least < best
            best = torch.where(closer, least, best)
            found = torch.where(closer[:, None], patches, found)
            image = torch.where(closer, seen + place[0], image)
            row, column = torch.where(closer, place[1], row), torch.where(closer, place[2], column)
            seen += len(images)
    missing = (model.own & best.isinf()).any(1).nonzero().flatten().tolist()
    if missing:
        raise ValueError(f"expected images of every class, got none of class {missing[0]}; push with the training set")
    vectors.copy_(found)
    return Pushed(image, row, column, best)


def fit_prototypes(
    model: ProtoPNet,
    images: Float[Tensor, "n 3 H W"],
    labels: Int[Tensor, " n"],
    *,
    epochs: int = 20,
    warm: int = 5,
    push_every: int = 10,
    last: int = 20,
    batch_size: int = 80,
    features_lr: float = 1e-4,
    lr: float = 3e-3,
    head_lr: float = 1e-4,
    seed: int = 0,
) -> Pushed:
    """Train in three stages with Adam; returns where the prototypes come from in the end.

    `warm` epochs move add-on layers and prototypes only, the others the backbone as well, at rates that fall to a tenth
    every 5 epochs. After every `push_every` epochs, and at the end, the prototypes are pushed and the head is trained
    for `last` epochs, in eval mode, so that the prototypes stay patches of images. The head is fixed otherwise.

    Raises:
        ValueError: no epoch, or a class without an image.

    Source: Chen et al. 2019, section 2.2; rates and lengths as in the authors' code.
    Differs: the head's optimizer begins anew after each push; the authors' keeps its moments.
    """
    if min(epochs, push_every, batch_size) < 1:
        raise ValueError(
            f"expected epochs, push_every and batch_size of 1 or more, got {epochs}, {push_every}, {batch_size}"
        )
    generator = torch.Generator().manual_seed(seed)
    stages = Stages(warm=warm, push_every=push_every, last=last, features_lr=features_lr, lr=lr, head_lr=head_lr)
    parts = [*zip(images.split(batch_size), labels.split(batch_size), strict=True)]
    pushed: Pushed | None = None
    optimizers: dict[tuple[str, ...], torch.optim.Optimizer] = {}
    model.train()
    for epoch in range(epochs):
        rates = stages.rates(epoch)
        groups = [{"params": [*model.get_submodule(child).parameters()], "lr": rate} for child, rate in rates.items()]
        if tuple(rates) not in optimizers:  # each stage begins without moments
            optimizers[tuple(rates)] = torch.optim.Adam(groups)
        optimizer = optimizers[tuple(rates)]
        for group, rate in zip(optimizer.param_groups, rates.values(), strict=True):
            group["lr"] = rate
        moved = [p for child in rates for p in model.get_submodule(child).parameters()]
        for batch in torch.randperm(len(images), generator=generator).to(images.device).split(batch_size):
            optimizer.zero_grad()
            _, loss = model.objective(images[batch], labels[batch])
            loss.backward(inputs=moved)
            optimizer.step()
        if stages.settles(epoch, epochs):
            pushed = model.settle(parts.__iter__, batch_size, seed + epoch, stages)
    assert pushed is not None  # the last epoch settles
    return pushed


def this_looks_like_that(
    model: ProtoPNet,
    images: Float[Tensor, "b 3 H W"],
    source: Float[Tensor, "n 3 H W"],
    pushed: Pushed,
    *,
    top: int = 3,
) -> "Figure":
    """One row per image: the image, then the source images of its `top` most similar prototypes, the best one first.

    Frames of one color belong together: the cell of the feature map that is similar, and the one it is similar to.
    What a cell sees is larger. Colors are stretched to each image's own range.

    Args:
        model: network whose prototypes have been pushed.
        images: images to explain.
        source: the images that `push` was given, in that order.
        pushed: what `push` returned.
        top: number of prototypes.

    Raises:
        ValueError: `top` below 1 or above the number of prototypes.

    Source: Chen et al. 2019, figures 1 and 3.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    if not 1 <= top <= model.own.shape[1]:
        raise ValueError(f"expected top from 1 to {model.own.shape[1]}, the number of prototypes; got {top}")
    with untouched(model), torch.no_grad():
        similar = model.prototypes.gate(model.distances(images))
    height, width = similar.shape[2:]
    scores, prototypes = similar.amax((2, 3)).topk(top)
    figure = Figure(figsize=(2 * (top + 1), 2.2 * len(images)), layout="constrained")
    axes = figure.subplots(len(images), top + 1, squeeze=False)

    def frame(axis: "Axes", image: Tensor, row: int, column: int, color: str) -> None:
        high, wide = image.shape[1] / height, image.shape[2] / width
        corner = (column * wide - 0.5, row * high - 0.5)
        axis.add_patch(Rectangle(corner, wide, high, fill=False, edgecolor=color, linewidth=2))

    for number, image in enumerate(images):
        axes[number, 0].imshow(_shown(image))
        axes[number, 0].set_title("this looks like" if number == 0 else "")
        for place, j in enumerate(prototypes[number].tolist()):
            axis, color = axes[number, place + 1], f"C{place}"
            row, column = divmod(int(similar[number, j].argmax()), width)
            frame(axes[number, 0], image, row, column, color)
            origin = source[int(pushed.image[j])]
            axis.imshow(_shown(origin))
            frame(axis, origin, int(pushed.row[j]), int(pushed.column[j]), color)
            axis.set_title(f"class {int(model.own[:, j].nonzero())}: {float(scores[number, place]):.1f}")
    for axis in axes.flat:
        axis.set_axis_off()
    return figure


def _shown(image: Float[Tensor, "3 H W"]) -> Float[np.ndarray, "H W 3"]:
    return maps.normalize(image.flatten(1)).unflatten(1, image.shape[1:]).movedim(0, -1).float().cpu().numpy()
