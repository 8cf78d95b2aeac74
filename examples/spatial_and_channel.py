"""Spatial and channel attention side by side: one says *where*, the other says *what*.

A feature map has channels (what was found) and positions (where it was found). A channel gate gives one weight per
channel, the same at all positions; a spatial gate gives one weight per position, the same in all channels:

    channel   x[b, c, i, j] * m[b, c]        m from the averages of all channels (squeeze and excitation)
    spatial   x[b, c, i, j] * m[b, i, j]     m from the mean and maximum over channels around each position

Each gate gets a task that needs it, and a network of one convolution:

    where     a colored square lies somewhere in noise, and its color is the class
    what      a patch has stripes in red, in green and in blue, each across or down; the whole image is lit in one of
              these colors, and the class is the direction of the stripes of this color

In the second task the light says which channels count. The script shows that the channel weights follow the light, and
that the network needs them: with the weights of another light it guesses. It also checks what follows from the
formulas: if the image is shifted, the spatial weights shift with it, and the channel weights stay the same.

Run it:

    python examples/spatial_and_channel.py --out spatial_and_channel.png
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import matplotlib
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sightline as sl

COLORS = ("red", "green", "blue")
SIDE, PATCH, CHANNELS = 24, 4, 24


def squares(n: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images (n, 3, 24, 24), their classes (n,), colors (n,) and masks (n, 1, 24, 24): the class is the color."""
    images, colors, places, masks = noise(n, seed, 0.5)
    for image, color, place in zip(images, colors, places, strict=True):
        image[color][place] += 2
    return images, colors, colors, masks


def stripes(n: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same for stripes under a light: the class is 1 where those in the color of the light lie across."""
    images, lights, places, masks = noise(n, seed, 0.8)
    across = torch.randint(2, (n, 3), generator=torch.Generator().manual_seed(seed + 1))
    rows = torch.tensor([-2.0, 2.0]).repeat(PATCH // 2)[:, None].expand(PATCH, PATCH)
    for image, light, place, directions in zip(images, lights, places, across, strict=True):
        image[light] += 0.5
        for channel, is_across in zip(image, directions, strict=True):
            channel[place] += rows if is_across else rows.T
    return images, across[torch.arange(n), lights], lights, masks


def noise(n: int, seed: int, sigma: float) -> tuple[Tensor, Tensor, list[tuple[slice, slice]], Tensor]:
    """Noise (n, 3, 24, 24), colors (n,), places of a patch away from the border, and their masks (n, 1, 24, 24)."""
    generator = torch.Generator().manual_seed(seed)
    images = sigma * torch.randn(n, 3, SIDE, SIDE, generator=generator)
    colors = torch.randint(3, (n,), generator=generator)
    corners = torch.randint(6, SIDE - PATCH - 6, (n, 2), generator=generator).tolist()
    places = [(slice(top, top + PATCH), slice(left, left + PATCH)) for top, left in corners]
    masks = torch.zeros(n, 1, SIDE, SIDE, dtype=torch.bool)
    for mask, place in zip(masks, places, strict=True):
        mask[0][place] = True
    return images, colors, places, masks


def trained(
    block: nn.Module, draw: Callable[[int, int], tuple[Tensor, ...]], classes: int, lr: float, steps: int
) -> nn.Sequential:
    """A convolution, the block, the mean over positions and a linear layer, trained on images that `draw` makes."""
    model = nn.Sequential(
        nn.Conv2d(3, CHANNELS, 3, padding=1, padding_mode="circular"),
        nn.ReLU(),
        block,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.BatchNorm1d(CHANNELS),  # without it the gates would open wide just to make their sums larger
        nn.Linear(CHANNELS, classes),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr)
    for step in range(steps):
        images, labels, *_ = draw(64, step)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels, label_smoothing=0.1).backward()
        optimizer.step()
    return model.eval()


def weights_of(model: nn.Module, images: Tensor) -> Tensor:
    """The attention of the only block: (b, 24, 1, 1) of channels, or (b, 1, 24, 24) of positions."""
    (weights,) = sl.attention_maps(model, images).values()
    return weights


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of right classes."""
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).float().mean())


def with_weights(model: nn.Sequential, weights: Tensor, images: Tensor, labels: Tensor) -> float:
    """Accuracy with these channel weights (b, 24, 1, 1) in place of the gate's own."""
    handle = model[2].gate.register_forward_hook(lambda gate, inputs, output: weights)
    try:
        return accuracy(model, images, labels)
    finally:
        handle.remove()


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Train, check, draw the figures."""
    parser = argparse.ArgumentParser(description="Spatial and channel attention side by side.")
    parser.add_argument("--out", type=Path, default=Path("spatial_and_channel.png"), help="figure to write")
    parser.add_argument("--steps", type=int, default=300, help="training steps of 64 images, for each network (300)")
    options = parser.parse_args(arguments)
    found: dict[str, float] = {}

    torch.manual_seed(0)
    where = trained(sl.attention.SpatialGate(CHANNELS, kernel=5, zero_init=False), squares, 3, 0.01, options.steps)
    images, labels, colors, masks = squares(120, 10_000)
    spatial = weights_of(where, images)
    found["accuracy, where"] = accuracy(where, images, labels)
    found["energy"] = float(sl.metrics.energy_in_mask(spatial, masks).mean())
    found["area"] = PATCH**2 / SIDE**2
    moved = weights_of(where, images.roll((3, 5), dims=(2, 3)))
    inner = (slice(None), slice(None), slice(8, -6), slice(8, -6))  # away from the border, where the gate pads
    found["shift"] = float((moved - spatial.roll((3, 5), dims=(2, 3)))[inner].abs().max())
    print(
        f"where: accuracy {found['accuracy, where']:.2f}; on the square lie {found['energy']:.3f} of the weights, ",
        end="",
    )
    print(f"its area is {found['area']:.3f}; shifted with the image, to {found['shift']:.0e}")

    what = trained(sl.attention.SqueezeExcite(CHANNELS, reduction=2), stripes, 2, 0.02, options.steps)
    lit, directions, lights, _ = stripes(300, 10_000)
    channel = weights_of(what, lit)
    means = torch.stack([channel[lights == light].mean(0) for light in range(3)])
    others = (channel[:, None] - means).flatten(2).norm(dim=2).argmin(1)
    found["accuracy, what"] = accuracy(what, lit, directions)
    found["named"] = float((others == lights).float().mean())
    found["spread"] = float((means.amax(0) - means.amin(0)).max())
    found["channel"] = float((weights_of(what, lit.roll((3, 5), dims=(2, 3))) - channel).abs().max())
    found["mean weights"] = with_weights(what, means[lights], lit, directions)
    found["other light"] = with_weights(what, means[(lights + 1) % 3], lit, directions)
    print(f"what: accuracy {found['accuracy, what']:.2f}; the weights of channels name the light of ", end="")
    print(f"{found['named']:.0%} of the images and differ by up to {found['spread']:.2f} between lights; ", end="")
    print(f"unchanged by the shift, to {found['channel']:.0e}")
    print(f"  with the mean weights of its own light the network is right in {found['mean weights']:.0%}, ", end="")
    print(f"with those of another light in {found['other light']:.0%} (guessing: 50%)")

    shown = ((images.clamp(-1, 3) + 1) / 4 * 255).to(torch.uint8)
    first = [int((colors == color).nonzero()[0]) for color in range(3)]
    options.out.write_bytes(sl.maps.png(sl.maps.side_by_side(shown[first], {"where": spatial[first]})))
    curves = options.out.with_stem(f"{options.out.stem}-what")
    with matplotlib.rc_context({"axes.prop_cycle": matplotlib.cycler(color=COLORS)}):
        sl.maps.channel_weights({"what: channels under each light": channel}, lights, COLORS).savefig(curves)
    print(f"figures: {options.out}, {curves}")
    return found


if __name__ == "__main__":
    main()
