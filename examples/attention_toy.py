"""An attention network from end to end, in less than a minute.

Each image is noise with one small striped patch somewhere. The class is the direction of the stripes, so the network
has to find the patch; nobody tells it where the patch is. The network has three convolutions, one attention pooling and
one linear layer:

    features  l_i   one vector per position, from the convolutions
    scores    c_i = <u, l_i> + b, how much position i matters; u and b are learned
    weights   a_i = exp(c_i) / sum_j exp(c_j), one per position; they sum to 1
    summary   g = sum_i a_i l_i, which the linear layer classifies

The weights are the attention map. The map needs no extra computation, and here it can be checked: we know where the
patch is, so a map that tells the truth puts its weight there. Run it:

    python examples/attention_toy.py --out attention_toy.png
"""

import argparse
from pathlib import Path

import matplotlib
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sightline as sl

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CLASSES = ("|", "-", "/", "\\")
SIDE, PATCH = 20, 5


def planted(n: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images (n, 3, 20, 20), classes (n,) and masks (n, 1, 20, 20) of the patch."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(PATCH), torch.arange(PATCH), indexing="ij")
    stripes = torch.stack([x % 2, y % 2, (x + y) % 3 // 2, (x - y) % 3 // 2]).float()
    images = torch.randn(n, 3, SIDE, SIDE, generator=generator)
    masks = torch.zeros(n, 1, SIDE, SIDE, dtype=torch.bool)
    labels = torch.randint(4, (n,), generator=generator)
    tops, lefts = torch.randint(SIDE - PATCH + 1, (2, n), generator=generator)
    for image, mask, label, top, left in zip(images, masks, labels, tops, lefts, strict=True):
        place = (slice(None), slice(int(top), int(top) + PATCH), slice(int(left), int(left) + PATCH))
        image[place] = 4 * stripes[label] - 2
        mask[place] = True
    return images, labels, masks


class Network(nn.Module):
    """Three convolutions, an attention pooling and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((3, 16), (16, 16), (16, 16)):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.attention = sl.attention.LearnToPayAttention(16, compat="none")
        self.head = nn.Linear(16, len(CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        return self.head(self.attention(self.features(images)))


def measured(model: nn.Module, images: Tensor, labels: Tensor, masks: Tensor) -> tuple[float, float]:
    """Accuracy, and the share of the attention that lies on the patch."""
    explanation = sl.explain(model, images, methods=["attention"])
    accuracy = (explanation.logits.argmax(1) == labels).float().mean()
    return float(accuracy), float(sl.metrics.energy_in_mask(explanation["attention"], masks).mean())


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Train, measure before and after training, draw the figure."""
    parser = argparse.ArgumentParser(description="An attention network from end to end.")
    parser.add_argument("--out", type=Path, default=Path("attention_toy.png"), help="figure to write")
    parser.add_argument("--steps", type=int, default=120, help="training steps of 64 images (120)")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    model, test = Network(), planted(200, seed=1)
    before = measured(model, *test)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    for step in range(options.steps):
        images, labels, _ = planted(64, seed=2 + step)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    after = measured(model, *test)

    area = PATCH**2 / SIDE**2
    for when, (accuracy, energy) in (("before", before), ("after", after)):
        print(f"{when} training: accuracy {accuracy:.2f}, attention on the patch {energy:.2f} (its area: {area:.2f})")

    images, labels, _ = (part[:6] for part in test)
    maps = sl.attention_maps(model, images)["attention"]
    shown = ((images.clamp(-3, 3) + 3) / 6 * 255).to(torch.uint8)
    overlays = sl.maps.overlay(shown, maps, opacity=0.6)[:, 0]
    figure, axes = plt.subplots(2, 6, figsize=(9, 3.4), layout="constrained")
    for i in range(6):
        for row, picture in ((0, shown[i]), (1, overlays[i])):
            axes[row, i].imshow(picture.movedim(0, -1).numpy())
            axes[row, i].axis("off")
        axes[0, i].set_title(f"stripes {CLASSES[labels[i]]}")
    figure.suptitle("images, and where the trained network looks")
    figure.savefig(options.out, dpi=120)
    plt.close(figure)
    print(f"figure: {options.out}")
    return {"accuracy": after[0], "energy": after[1], "energy before": before[1], "area": area}


if __name__ == "__main__":
    main()
