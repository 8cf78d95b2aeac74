"""Two-level attention: first find the object, then its parts, without any box or mask in training.

A pipeline of four steps after Xiao et al., "The Application of Two-Level Attention Models in Deep Convolutional Neural
Network for Fine-Grained Image Classification", CVPR 2015:

    proposals       windows everywhere in the image
    FilterNet       a network trained on other images keeps the windows that show an object of the right kind
    DomainNet       trained on the kept windows with the image's label; an image's score is the mean over its windows
    parts           DomainNet's filters are clustered; each cluster is a detector that picks its best window, and a
                    linear classifier reads the windows of all detectors; both scores are added

Here an image shows two digits among fragments of digits, and its class names both (`clutter-pair`). FilterNet has
learned digits and background on images of single digits (`clutter`). Run it:

    python examples/two_level_attention.py --out two_level.png

What to look for: far more of the kept windows show a digit than of all windows. DomainNet on kept windows beats the
same network on as many random windows. The masks, which no network has seen, tell whether the two detectors pick
different digits; the figure shows it.

Differs from the paper: windows on a grid instead of selective search; filters are compared by their responses to the
windows, not by their weights; a small linear classifier instead of an SVM.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from sklearn.cluster import SpectralClustering
from torch import Tensor, nn
from torch.nn import functional as F

import sightline as sl

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle

SIDE, STRIDE, KEPT, PARTS = 20, 5, 4, 2


def read(source: str, split: str, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Normalized images (n, 3, 40, 40), classes (n,) and masks (n, digits, 40, 40) of the digits."""
    settings = sl.recipe.Data(source=source, train_size=n, test_size=n)
    kinds = ("first", "second") if source == "clutter-pair" else ("digit",)
    sets = [sl.data.load(replace(settings, mask=kind))[split] for kind in kinds]
    batches = [images.batch(np.arange(n)) for images in sets]
    masks = torch.cat([batch.masks for batch in batches if batch.masks is not None], 1)
    return sl.data.normalize(batches[0].images, sets[0].preprocess), batches[0].labels, masks


def windows(images: Tensor) -> Tensor:
    """All proposals of images or masks (n, c, 40, 40): (n, 25, c, 20, 20), row by row."""
    return images.unfold(2, SIDE, STRIDE).unfold(3, SIDE, STRIDE).flatten(2, 3).transpose(1, 2)


def shown(masks: Tensor) -> Tensor:
    """Share of each digit that lies in each proposal: (n, 25, digits)."""
    return windows(masks.float()).sum((3, 4)) / masks.sum((2, 3)).clamp(min=1)[:, None]


class Network(nn.Module):
    """Three convolutions, the maximum over positions and a linear layer."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((3, 16), (16, 32), (32, 64)):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
        self.features = nn.Sequential(*layers[:-1])
        self.head = nn.Linear(64, classes)

    def responses(self, patches: Tensor) -> Tensor:
        """Largest response of each of the last filters."""
        return self.features(patches).amax((2, 3))

    def forward(self, patches: Tensor) -> Tensor:
        """Logits."""
        return self.head(self.responses(patches))


def trained(classes: int, patches: Tensor, labels: Tensor, steps: int) -> Network:
    """A network trained on patches (n, 3, 20, 20)."""
    torch.manual_seed(0)
    network = Network(classes)
    optimizer = torch.optim.AdamW(network.parameters(), 0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=steps)
    for _ in range(steps):
        rows = torch.randint(len(patches), (128,))
        optimizer.zero_grad()
        F.cross_entropy(network(patches[rows]), labels[rows]).backward()
        optimizer.step()
        schedule.step()
    return network.eval()


def filter_net(n: int, steps: int) -> Network:
    """A network for ten digits and background, from images of single digits and where these digits are."""
    images, labels, masks = read("clutter", "train", n)
    share = shown(masks)[..., 0]
    labels = torch.where(share > 0.8, labels[:, None], 10)[(share > 0.8) | (share < 0.3)]
    patches = windows(images)[(share > 0.8) | (share < 0.3)]
    background = torch.nonzero(labels == 10).flatten()
    chosen = torch.cat([torch.nonzero(labels < 10).flatten(), background[: int((labels < 10).sum())]])
    return trained(11, patches[chosen], labels[chosen], steps)


@torch.no_grad()
def run(network: nn.Module | Any, patches: Tensor) -> Tensor:
    """Outputs for patches (n, k, 3, 20, 20), in batches."""
    return torch.cat([network(part.flatten(0, 1)).unflatten(0, part.shape[:2]) for part in patches.split(100)])


def kept(filters: Network, images: Tensor) -> Tensor:
    """Number of the proposals (n, 4) that FilterNet finds least like background, none next to a better one."""
    scores = -run(filters, windows(images)).log_softmax(2)[..., 10]
    row, column = torch.arange(25) // 5, torch.arange(25) % 5
    near = ((row[:, None] - row).abs() <= 1) & ((column[:, None] - column).abs() <= 1)
    chosen: list[Tensor] = []
    for _ in range(KEPT):
        chosen.append(scores.argmax(1))
        scores = scores.masked_fill(near[chosen[-1]], -torch.inf)
    return torch.stack(chosen, 1)


def take(values: Tensor, index: Tensor) -> Tensor:
    """Values (n, 25, ...) of the proposals (n, k) named."""
    return values[torch.arange(len(values))[:, None], index]


def object_scores(domain: Network, patches: Tensor) -> Tensor:
    """Log of the mean over an image's windows of their class probabilities."""
    return run(domain, patches).softmax(2).mean(1).log()


def clusters(responses: Tensor) -> Tensor:
    """Cluster (64,) of each filter, by the cosines of their responses (m, 64) to windows."""
    units = F.normalize(responses, dim=0)
    alike = (units.mT @ units).clamp(min=0).numpy()
    spectral = SpectralClustering(PARTS, affinity="precomputed", random_state=0)
    return torch.from_numpy(spectral.fit_predict(alike.astype(np.float64))).long()


def picks(responses: Tensor, scale: Tensor, groups: Tensor) -> Tensor:
    """The window (n, parts) where each cluster of filters responds most, from responses (n, k, 64)."""
    return torch.stack([(responses / scale)[..., groups == part].sum(2).argmax(1) for part in range(PARTS)], 1)


def linear(vectors: Tensor, labels: Tensor, classes: int) -> nn.Linear:
    """A linear classifier on vectors."""
    torch.manual_seed(0)
    head = nn.Linear(vectors.shape[1], classes)
    optimizer = torch.optim.AdamW(head.parameters(), 0.01, weight_decay=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        F.cross_entropy(head(vectors), labels).backward()
        optimizer.step()
    return head


def draw(images: Tensor, index: Tensor, out: Path) -> None:
    """Images with the window of each detector."""
    figure, axes = plt.subplots(2, 6, figsize=(9, 3.2))
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    for axis, image, places in zip(axes.flat, (images - low) / (high - low), index.tolist(), strict=False):
        axis.imshow(image.movedim(0, -1))
        axis.axis("off")
        for place, color in zip(places, ("red", "cyan"), strict=True):
            top, left = (STRIDE * step for step in divmod(place, 5))
            axis.add_patch(Rectangle((left - 0.5, top - 0.5), SIDE, SIDE, fill=False, color=color, linewidth=1.5))
    figure.suptitle("The window that each detector picks")
    figure.savefig(out, dpi=120)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Train both networks, find the detectors, measure and draw."""
    parser = argparse.ArgumentParser(description="Two-level attention: proposals, FilterNet, DomainNet, parts.")
    parser.add_argument("--out", type=Path, default=Path("two_level.png"), help="figure to write")
    parser.add_argument("--images", type=int, default=1800, help="training images (1800)")
    parser.add_argument("--steps", type=int, default=600, help="training steps of 128 windows, per network (600)")
    options = parser.parse_args(arguments)

    images, labels, _ = read("clutter-pair", "train", options.images)
    new_images, new_labels, new_masks = read("clutter-pair", "test", 450)
    proposals, new_proposals = windows(images), windows(new_images)
    filters = filter_net(options.images, options.steps)
    generator = torch.Generator().manual_seed(0)
    anywhere = [torch.rand(len(some), 25, generator=generator).topk(KEPT).indices for some in (images, new_images)]
    index, new_index = kept(filters, images), kept(filters, new_images)
    result: dict[str, float] = {}

    def object_level(name: str, index: Tensor, new_index: Tensor) -> tuple[Network, Tensor]:
        """DomainNet and its scores of the new images."""
        patches = take(proposals, index).flatten(0, 1)
        domain = trained(9, patches, labels.repeat_interleave(KEPT), options.steps)
        scores = object_scores(domain, take(new_proposals, new_index))
        result[f"{name} windows, accuracy"] = float((scores.argmax(1) == new_labels).float().mean())
        on_digit = take(shown(new_masks).amax(2), new_index) > 0.8
        result[f"{name} windows, on a digit"] = float(on_digit.float().mean())
        return domain, scores

    object_level("random", *anywhere)
    domain, scores = object_level("kept", index, new_index)
    responses = run(domain.responses, take(proposals, index))
    new_responses = run(domain.responses, take(new_proposals, new_index))
    scale = responses.flatten(0, 1).std(0) + 1e-3
    groups = clusters(responses.flatten(0, 1))
    chosen, new_chosen = picks(responses, scale, groups), picks(new_responses, scale, groups)
    vectors, new_vectors = take(responses, chosen).flatten(1), take(new_responses, new_chosen).flatten(1)
    parts = linear(vectors, labels, 9)(new_vectors).detach().log_softmax(1)
    both = scores + parts
    result["parts, accuracy"] = float((parts.argmax(1) == new_labels).float().mean())
    result["both, accuracy"] = float((both.argmax(1) == new_labels).float().mean())
    picked = take(new_index, new_chosen)
    digits = take(shown(new_masks), picked)
    seen = digits.amax(2) > 0.5
    result["detectors on different digits"] = float(
        (seen.all(1) & (digits[:, 0].argmax(1) != digits[:, 1].argmax(1))).float().mean()
    )
    result["filters in the smaller cluster"] = float(groups.bincount(minlength=PARTS).min())
    draw(new_images[:12], picked[:12], options.out)
    for name, value in result.items():
        print(f"{name:<32}{value:.3f}")
    print(f"accuracy by chance              {1 / 9:.3f}")
    print(f"figure: {options.out}")
    return result


if __name__ == "__main__":
    main()
