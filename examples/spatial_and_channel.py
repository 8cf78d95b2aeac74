"""Spatial and channel attention side by side: one says *where*, the other says *what*.

A feature map has channels (what was found) and positions (where it was found). A channel gate gives one weight per
channel, the same at all positions; a spatial gate gives one weight per position, the same in all channels:

    channel   x[b, c, i, j] * m[b, c]        m from the averages of all channels (squeeze and excitation)
    spatial   x[b, c, i, j] * m[b, i, j]     m from the mean and maximum over channels around each position

Here both gates belong to one network, trained on noise with one colored square, red, green or blue; the class is the
color. Two things follow from the formulas, and the script checks the first:

    - shift the image: the spatial weights shift with it, and the channel weights stay the same;
    - permute the channels of the feature map and the gate's parameters: the channel weights are permuted alike.

Run it:

    python examples/spatial_and_channel.py --out spatial_and_channel.png
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

CLASSES = ("red", "green", "blue")
SIDE, SQUARE, CHANNELS = 24, 4, 16


def squares(n: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images (n, 3, 24, 24), classes (n,), masks (n, 1, 24, 24); the square stays away from the border."""
    generator = torch.Generator().manual_seed(seed)
    images = 0.5 * torch.randn(n, 3, SIDE, SIDE, generator=generator)
    masks = torch.zeros(n, 1, SIDE, SIDE, dtype=torch.bool)
    labels = torch.randint(3, (n,), generator=generator)
    corners = torch.randint(6, SIDE - SQUARE - 6, (n, 2), generator=generator)
    for image, mask, label, (top, left) in zip(images, masks, labels, corners.tolist(), strict=True):
        image[label, top : top + SQUARE, left : left + SQUARE] += 2
        mask[:, top : top + SQUARE, left : left + SQUARE] = True
    return images, labels, masks


def trained(*blocks: nn.Module, steps: int) -> nn.Sequential:
    """A convolution, the blocks, the mean over positions, a linear layer: trained to name the color of a square."""
    model = nn.Sequential(
        nn.Conv2d(3, CHANNELS, 3, padding=1, padding_mode="circular"),
        nn.ReLU(),
        *blocks,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.BatchNorm1d(CHANNELS),  # without it the gates would open wide just to make their sums larger
        nn.Linear(CHANNELS, len(CLASSES)),
    )
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    for step in range(steps):
        images, labels, _ = squares(64, seed=step)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels, label_smoothing=0.1).backward()
        optimizer.step()
    return model.eval()


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Train, check, draw the figure."""
    parser = argparse.ArgumentParser(description="Spatial and channel attention side by side.")
    parser.add_argument("--out", type=Path, default=Path("spatial_and_channel.png"), help="figure to write")
    parser.add_argument("--steps", type=int, default=150, help="training steps of 64 images (150)")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    channel = sl.attention.SqueezeExcite(CHANNELS, reduction=4)
    spatial = sl.attention.SpatialGate(CHANNELS, kernel=5, zero_init=False)
    model = trained(channel, spatial, steps=options.steps)
    images, labels, masks = squares(120, seed=10_000)
    accuracy = float((model.eval()(images).argmax(1) == labels).float().mean())
    channel, spatial = sl.attention_maps(model, images).values()  # (120, 16, 1, 1) and (120, 1, 24, 24)
    energy, area = float(sl.metrics.energy_in_mask(spatial, masks).mean()), SQUARE**2 / SIDE**2

    moved_channel, moved_spatial = sl.attention_maps(model, images.roll((3, 5), dims=(2, 3))).values()
    inner = (slice(None), slice(None), slice(8, -6), slice(8, -6))  # away from the border, where the gate pads
    shift_error = float((moved_spatial - spatial.roll((3, 5), dims=(2, 3)))[inner].abs().max())
    channel_error = float((moved_channel - channel).abs().max())

    print(f"accuracy {accuracy:.2f}; spatial weights on the square {energy:.3f} (its area: {area:.3f})")
    print("the image shifted by (3, 5):")
    print(f"  spatial weights shift along, to {shift_error:.0e}; channel weights stay, to {channel_error:.0e}")

    figure, axes = plt.subplots(1, 4, figsize=(11, 2.8), layout="constrained", width_ratios=(1, 1, 1, 2))
    for axis, name in zip(axes, CLASSES, strict=False):
        first = int((labels == CLASSES.index(name)).nonzero()[0])
        shown = ((images[first : first + 1].clamp(-1, 3) + 1) / 4 * 255).to(torch.uint8)
        axis.imshow(sl.maps.overlay(shown, spatial[first : first + 1], opacity=0.5)[0, 0].movedim(0, -1).numpy())
        axis.set_title(f"{name}: where")
        axis.axis("off")
    for name in CLASSES:
        mean = channel[labels == CLASSES.index(name)].mean(0).flatten()
        axes[3].plot(mean.numpy(), "o-", color=name, label=name)
    axes[3].legend()
    axes[3].set(title="what: weight of each channel", xlabel="channel", ylim=(0, 1))
    figure.savefig(options.out, dpi=120)
    plt.close(figure)
    print(f"figure: {options.out}")
    return {"accuracy": accuracy, "energy": energy, "area": area, "shift": shift_error, "channel": channel_error}


if __name__ == "__main__":
    main()
