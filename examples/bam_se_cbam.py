"""BAM against SE and CBAM on one page: three blocks that reweight a feature map x of c channels and h x w positions.

    SE    (Hu et al. 2018)    x * sigmoid(C(x))
          C(x) = MLP(mean over positions)
    CBAM  (Woo et al. 2018)   y = x * sigmoid(C(x)), then y * sigmoid(S(y))
          C(x) = MLP(mean over positions) + MLP(maximum over positions)
          S(y) = 7x7 convolution of the mean and the maximum over channels
    BAM   (Park et al. 2018)  x + x * sigmoid(C(x) + S(x))
          C(x) = MLP(mean over positions)
          S(x) = 1x1, two 3x3 with dilation 4, 1x1 convolutions

The MLP goes from c channels to c / 16 and back; BatchNorms are left out here. BAM's authors write the sum C + S, but
their code computes the product (`BAM(channels, variant="official")`).

What the weights say:

    SE    *what*: one weight per channel, the same at every position. There is no map to look at.
    CBAM  *what*, then *where*: one weight per channel, then one per position. Both can only reduce x.
    BAM   both at once: one weight per channel and position. It can only increase x, up to 2 x, so no position is lost.

Places: SE and CBAM go to the end of every residual branch, before the sum (16 places in a ResNet-50). BAM goes after
each of the first three stages (3 places).

Costs: the script counts them. The lecture's table says that SE has the lowest overhead. That is true for
multiplications, but not for parameters or for the memory that training needs: one BAM is larger than one SE or CBAM,
but three BAMs are smaller than sixteen SEs or CBAMs.

Gains: on ImageNet, with the same recipe for all, a ResNet-50 reached 76.4 % without a block, 76.9 % with BAM, 77.2 %
with SE and 77.6 % with CBAM (README of implus/PytorchInsight). If `--bench` names the result file of a study, the
script prints our own accuracies too. Finally, a tiny network with each block learns to name the color of a square. It
learns that without a block as well, so the figure shows what the blocks do, not that they are needed. Run it:

    python examples/bam_se_cbam.py --out bam_se_cbam.png
"""

import argparse
import json
from pathlib import Path
from statistics import mean

import matplotlib
import torch
from spatial_and_channel import CHANNELS, COLORS, squares, trained
from torch import Tensor, nn

import sightline as sl
from sightline.attention import BAM, CBAM, SqueezeExcite
from sightline.models.costs import costs

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle

BLOCKS: dict[str, type[nn.Module]] = {"SE": SqueezeExcite, "CBAM": CBAM, "BAM": BAM}
EQUATIONS = {
    "SE": r"$x \cdot \sigma(C(x))$",
    "CBAM": r"$y = x \cdot \sigma(C(x))$,  $y \cdot \sigma(S(y))$",
    "BAM": r"$x + x \cdot \sigma(C(x) + S(x))$",
}


def priced(pixels: int) -> dict[str, dict[str, float]]:
    """Costs of a ResNet-50 without a block and with each block."""
    plain = sl.create_model("resnet50")
    networks = {"none": plain} | {name: sl.insert(plain, name.lower(), init="fresh") for name in BLOCKS}
    network_costs = costs(networks, torch.randn(2, 3, pixels, pixels), rounds=1)
    result: dict[str, dict[str, float]] = {}
    for name, cost in network_costs.items():
        counted: dict[str, float] = {"parameters": cost.parameters, "macs": cost.macs, "saved": cost.saved}
        more = {f"more {what}": count / getattr(network_costs["none"], what) - 1 for what, count in counted.items()}
        result[name] = counted | more | {"single": 0, "places": 0}
        if block := BLOCKS.get(name):
            result[name]["single"] = sum(p.numel() for p in block(256).parameters())
            result[name]["places"] = sum(isinstance(layer, block) for layer in networks[name].modules())
    return result


def by_hand(block: nn.Module, x: Tensor) -> Tensor:
    """The equations above, computed with the block's layers."""
    layer = block.get_submodule
    if isinstance(block, SqueezeExcite):
        return x * layer("gate.mlp")(x.mean((2, 3))).sigmoid()[:, :, None, None]
    if isinstance(block, CBAM):
        mlp, conv, norm = layer("channel.gate.mlp"), layer("spatial.gate.conv"), layer("spatial.gate.bn")
        y = x * (mlp(x.mean((2, 3))) + mlp(x.amax((2, 3)))).sigmoid()[:, :, None, None]
        return y * norm(conv(torch.cat([y.amax(1, keepdim=True), y.mean(1, keepdim=True)], 1))).sigmoid()
    return x + x * (layer("gate.channel")(x) + layer("gate.spatial")(x)).sigmoid()


def study(file: Path) -> None:
    """Print the accuracies that `sightline bench recipes/bench_blocks.yaml` measured."""
    measured = json.loads(file.read_text(encoding="utf-8"))["measured"]
    print(f"accuracy in the study {file}")
    for name in ("control", *BLOCKS):
        accuracies = [100 * run["accuracy"] for run in measured if run["row"] == name]
        text = f"{mean(accuracies):.1f} %, mean of {len(accuracies)} seeds" if accuracies else "not in it"
        print(f"{name:<8}{text}")


def main(arguments: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Count costs, train, measure, draw the figure."""
    parser = argparse.ArgumentParser(description="BAM against SE and CBAM on one page.")
    parser.add_argument("--out", type=Path, default=Path("bam_se_cbam.png"), help="figure to write")
    parser.add_argument("--steps", type=int, default=120, help="training steps of 64 images, per network (120)")
    parser.add_argument("--pixels", type=int, default=224, help="side of the images that costs are counted on (224)")
    parser.add_argument("--bench", type=Path, help="bench.json of `sightline bench recipes/bench_blocks.yaml`")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    result = priced(options.pixels)
    print(f"ResNet-50, {options.pixels} px           block for          multiply-accumulates   kept for the backward")
    print("      parameters          256 channels  places   per image              pass of 2 images")
    for name, row in result.items():
        print(
            f"{name:<6}{row['parameters']:,} ({row['more parameters']:+.1%})  {row['single']:<14,}{row['places']:<9}",
            end="",
        )
        print(f"{row['macs'] / 1e9:.3f} G ({row['more macs']:+.2%})       ", end="")
        print(f"{row['saved'] / 2**20:.0f} MiB ({row['more saved']:+.1%})")
    if options.bench:
        study(options.bench)

    images, labels, _, masks = squares(300, 10_000)
    blocks = {
        "none": nn.Identity(),
        "SE": SqueezeExcite(CHANNELS, reduction=4),
        "CBAM": CBAM(CHANNELS, reduction=4, zero_init=False),
        "BAM": BAM(CHANNELS, reduction=4),
    }
    where: dict[str, Tensor] = {}
    what: dict[str, Tensor] = {}
    for name, block in blocks.items():
        model = trained(block, squares, len(COLORS), 0.01, options.steps)
        with torch.no_grad():
            result[name]["accuracy"] = float((model(images).argmax(1) == labels).float().mean())
            if name == "none":
                continue
            x = model[:2](images)
            y, equation = block(x), by_hand(block, x)
        factors = (y / x)[x > 0.01]
        result[name] |= {"low": float(factors.min()), "high": float(factors.max())}
        result[name]["error"] = float((y - equation).abs().max())
        maps = list(
            sl.attention_maps(model, images).values()
        )  # SE (b, c, 1, 1); CBAM also (b, 1, h, w); BAM (b, c, h, w)
        what[name] = maps[0].mean((2, 3))
        if maps[-1].shape[2] > 1:
            where[name] = maps[-1].mean(1, keepdim=True)
            result[name]["contrast"] = float(where[name][masks].mean() / where[name][~masks].mean())

    print("small networks                x is multiplied by   weights of the positions,   equation above - block,")
    print("on squares     accuracy       (least, most)        on the square / elsewhere   at most")
    for name in blocks:
        row = result[name]
        if name == "none":
            print(f"{name:<15}{row['accuracy']:.3f}")
            continue
        contrast = f"{row['contrast']:.2f}" if name in where else "no map"
        print(f"{name:<15}{row['accuracy']:<15.3f}{row['low']:.2f}, {row['high']:<15.2f}", end="")
        print(f"{contrast:<28}{row['error']:.0e}")
    draw(result, images[0], masks[0], where, what, labels, options.out)
    print(f"figure: {options.out}")
    return result


def draw(
    result: dict[str, dict[str, float]],
    image: Tensor,
    mask: Tensor,
    where: dict[str, Tensor],
    what: dict[str, Tensor],
    labels: Tensor,
    out: Path,
) -> None:
    """Top: the image and each block's position weights. Bottom: costs and channel weights."""
    figure, axes = plt.subplots(2, 4, figsize=(13, 6.2), layout="constrained")
    axes[0, 0].imshow(((image.movedim(0, -1).clamp(-1, 3) + 1) / 4).numpy())
    axes[0, 0].set_title("image, its square outlined")
    axes[0, 1].text(0.5, 0.5, "no map: the same weight\nat every position", ha="center", va="center")
    axes[0, 1].set_aspect("equal")
    top, left = (int(place.min()) for place in mask[0].nonzero().T)
    side = int(mask.sum() ** 0.5)
    for axis, name in zip(axes[0, 2:], where, strict=True):
        shown = axis.imshow(where[name][0, 0].numpy(), cmap="inferno", vmin=0, vmax=1)
        figure.colorbar(shown, ax=axis, shrink=0.85)
    for axis in axes[0, [0, 2, 3]]:
        axis.add_patch(Rectangle((left - 0.5, top - 0.5), side, side, fill=False, edgecolor="cyan"))
    for axis, (name, equation) in zip(axes[0, 1:], EQUATIONS.items(), strict=True):
        axis.set_title(f"{name}: {equation}", fontsize=10)
    for axis in axes[0]:
        axis.set(xticks=[], yticks=[])
    axes[0, 1].set_ylabel("where: weight of each position")

    rows = {"parameters": "more parameters", "multiplications": "more macs", "memory in training": "more saved"}
    for offset, (name, gray) in enumerate(zip(BLOCKS, ("0.8", "0.55", "0.2"), strict=True)):
        added = [100 * result[name][row] for row in rows.values()]
        bars = axes[1, 0].barh([row + 0.27 * (offset - 1) for row in range(3)], added, 0.25, color=gray, label=name)
        axes[1, 0].bar_label(bars, [f" {share:.2g}" for share in added], fontsize=8)
    axes[1, 0].set_yticks(range(3), rows)
    axes[1, 0].invert_yaxis()
    axes[1, 0].set(title="what it adds to a ResNet-50", xlim=(0, 70), xlabel="% more")
    axes[1, 0].legend()
    for axis, name in zip(axes[1, 1:], BLOCKS, strict=True):
        for label, color in enumerate(COLORS):
            axis.plot(what[name][labels == label].mean(0).numpy(), "o-", color=color, label=color)
        axis.set(ylim=(0, 1), xlabel="channel")
    axes[1, 1].set_ylabel("what: weight of each channel")
    axes[1, 1].legend(title="square")
    axes[1, 3].set_xlabel("channel (mean over the positions)")
    figure.savefig(out, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
