"""Soft against hard attention, on the same scores.

A score says how much each position matters. Soft attention reads the mean of all positions, hard attention reads one:

    scores    c_i = <u, l_i> + b, from the features l_i of position i
    soft      a_i = exp(c_i / T) / sum_j exp(c_j / T); the network reads sum_i a_i l_i
    hard      one position, drawn with the probabilities a_i, or the best one; the network reads its l_i alone

Averaged over many draws, the hard choices give the soft weights; as the temperature T falls, the soft weights become
the hard choice. The choice itself has no gradient. There are two ways to train it anyway:

    REINFORCE           draw; make the drawn position likelier if it did better than usual (Xu et al. 2015)
    straight-through    draw, but let the gradient pass as if the soft weights had been read (Jang et al. 2017)

Each image is noise with two striped patches, and the class is the direction of the stripes. One network is trained with
soft attention and one in each of these two ways. They have the same parameters with the same names, so each network can
be read in all three ways: by its soft weights, at its best position, or at a drawn position. Run it:

    python examples/soft_and_hard.py --out soft_and_hard.png

What to look for: the soft weights lie on both patches, a draw on a single position. The network trained with soft
attention spreads its weights over more positions, and loses accuracy if it gets only one draw; the networks trained on
draws need fewer positions. The share of the soft weights on the patches is the probability that a draw hits one. As in
its paper, REINFORCE reads the soft weights for half of the images during training.
"""

import argparse
from pathlib import Path

import matplotlib
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sightline as sl
from sightline.attention import HardAttention, LearnToPayAttention, MovingBaseline, reinforce_loss
from sightline.attention.hard import HardGate

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.colors import PowerNorm
from matplotlib.patches import Rectangle

SIDE, PATCH, CHANNELS, DRAWS = 24, 7, 16, 1000
COOLING = (1.0, 0.3, 0.1, 0.03, 0.01, 0.001)


def planted(n: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images (n, 3, 24, 24), classes (n,) and masks (n, 1, 24, 24) of two patches, one in each half of the image."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(PATCH), torch.arange(PATCH), indexing="ij")
    stripes = torch.stack([x % 2, y % 2, (x + y) % 3 // 2, (x - y) % 3 // 2]).float().flatten(1)
    stripes = 0.6 * ((stripes - stripes.mean(1, keepdim=True)) / stripes.std(1, keepdim=True)).unflatten(1, y.shape)
    images = torch.randn(n, 3, SIDE, SIDE, generator=generator)
    masks = torch.zeros(n, 1, SIDE, SIDE, dtype=torch.bool)
    labels = torch.randint(4, (n,), generator=generator)
    tops = torch.randint(SIDE - PATCH + 1, (n, 2), generator=generator)
    lefts = torch.randint(SIDE // 2 - PATCH + 1, (n, 2), generator=generator) + torch.tensor([0, SIDE // 2])
    for image, mask, label, *corners in zip(images, masks, labels, tops.tolist(), lefts.tolist(), strict=True):
        for top, left in zip(*corners, strict=True):
            place = (slice(None), slice(top, top + PATCH), slice(left, left + PATCH))
            image[place] += stripes[label]
            mask[place] = True
    return images, labels, masks


class Network(nn.Module):
    """Two convolutions, an attention pooling and a linear layer."""

    def __init__(self, attention: HardAttention | LearnToPayAttention) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((3, CHANNELS), (CHANNELS, CHANNELS)):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.attention = attention
        self.head = nn.Linear(CHANNELS, 4)

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        return self.head(self.attention(self.features(images)))


def train(model: Network, steps: int) -> None:
    baseline = MovingBaseline()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    for step in range(steps):
        images, labels, _ = planted(64, seed=2 + step)
        errors = F.cross_entropy(model(images), labels, reduction="none")
        loss = errors.mean()
        log_prob, entropy = (getattr(model.attention, name, None) for name in ("log_prob", "entropy"))
        if log_prob is not None and entropy is not None:  # REINFORCE: the reward is the log-probability of the class
            loss = loss + reinforce_loss(log_prob, -errors, baseline(-errors), entropy)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


def hard_gate(model: Network, temperature: float = 1.0) -> HardGate:
    """Hard attention on the scores of a network: takes the best position in eval mode, draws one in training mode."""
    generator = torch.Generator().manual_seed(0)
    hard = HardAttention(CHANNELS, temperature=temperature, mixed=0.0, generator=generator)
    hard.load_state_dict(model.attention.state_dict())
    return hard.gate


def read(model: Network, images: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights (b, 1, 24, 24) and logits (b, 4) for each way of reading the network."""
    features, gate = model.features(images), hard_gate(model)
    weights = {"soft": gate.soft(features), "best": gate.eval()(features), "drawn": gate.train()(features)}
    return weights, {way: model.head((values * features).sum((2, 3))) for way, values in weights.items()}


def measured(model: Network, images: Tensor, labels: Tensor, masks: Tensor) -> dict[str, float]:
    """Accuracy for each way of reading the network, and where its weights are."""
    weights, logits = read(model, images)
    accuracy = {way: float((answer.argmax(1) == labels).float().mean()) for way, answer in logits.items()}
    trained = "best" if isinstance(model.attention, HardAttention) else "soft"
    return accuracy | {
        "energy": float(sl.metrics.energy_in_mask(weights["soft"], masks).mean()),
        "hits": float(sl.metrics.energy_in_mask(weights["drawn"], masks).mean()),
        "positions": float(torch.special.entr(weights["soft"]).sum((1, 2, 3)).exp().mean()),
        "gap": float((model(images) - logits[trained]).abs().max()),
    }


def compared(model: Network, images: Tensor) -> dict[str, float]:
    """How soft and hard weights compare on the same scores."""
    features, gate = model.features(images), hard_gate(model)
    soft, best = gate.soft(features), gate.eval()(features)
    gate.train()
    draws = torch.stack([gate(features) for _ in range(DRAWS)])
    choices = torch.cat([best[None], draws]).flatten(2)
    return {
        "sum": float((soft.sum((1, 2, 3)) - 1).abs().max()),
        "not one-hot": float(((choices != 0).sum(2) != 1).sum() + (choices.amax(2) != 1).sum()),
        "distance": float((draws.mean(0) - soft).square().sum((1, 2, 3)).mean().sqrt()),
        "sampling error": float(((1 - soft.square().sum((1, 2, 3))) / DRAWS).mean().sqrt()),
    } | {f"T = {t:g}": float((hard_gate(model, t).soft(features) * (1 - best)).sum((1, 2, 3)).mean()) for t in COOLING}


def draw(networks: dict[str, Network], image: Tensor, mask: Tensor, out: Path) -> None:
    """The image, and next to it one row per network: soft weights, the best position, draws and their means."""
    figure = plt.figure(figsize=(13, 4.9), layout="constrained")
    grid = figure.add_gridspec(len(networks), len(networks) + 6)
    picture = figure.add_subplot(grid[:, : len(networks)])
    picture.imshow(image.mean((0, 1)).numpy(), cmap="gray")
    picture.set_title("the image, colors averaged; patches outlined")
    cells = [picture]
    for row, (name, model) in enumerate(networks.items()):
        features, gate = model.features(image), hard_gate(model)
        soft, best = gate.soft(features), gate.eval()(features)
        drawn = gate.train()(features.expand(DRAWS, -1, -1, -1))
        panels = {
            "soft weights": soft[0],
            "best position": best[0],
            "one draw": drawn[0],
            "another draw": drawn[1],
            "mean of 10 draws": drawn[:10].mean(0),
            f"mean of {DRAWS}": drawn.mean(0),
        }
        for column, (title, weights) in enumerate(panels.items()):
            cell = figure.add_subplot(grid[row, len(networks) + column])
            cell.imshow(weights[0].numpy(), cmap="inferno", norm=PowerNorm(0.5, vmin=0))
            cell.set_title(title if row == 0 else "", fontsize=10)
            cell.set_ylabel(f"trained\n{name}" if column == 0 else "")
            cells.append(cell)
    for cell in cells:
        for half in (0, SIDE // 2):
            top, left = (int(place.min()) for place in mask[0, 0, :, half : half + SIDE // 2].nonzero().T)
            cell.add_patch(Rectangle((half + left - 0.5, top - 0.5), PATCH, PATCH, fill=False, edgecolor="cyan"))
        cell.set(xticks=[], yticks=[])
    figure.supxlabel("brightness: square root of the weight, each panel up to its own largest", fontsize=9)
    figure.savefig(out, dpi=120)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Train, read each network in each way, compare soft and hard weights, draw the figure."""
    parser = argparse.ArgumentParser(description="Soft against hard attention, on the same scores.")
    parser.add_argument("--out", type=Path, default=Path("soft_and_hard.png"), help="figure to write")
    parser.add_argument("--steps", type=int, default=150, help="training steps of 64 images, per network (150)")
    options = parser.parse_args(arguments)

    attentions = {
        "soft": lambda: LearnToPayAttention(CHANNELS, compat="none"),
        "REINFORCE": lambda: HardAttention(CHANNELS),
        "straight-through": lambda: HardAttention(CHANNELS, estimator="gumbel"),
    }
    networks: dict[str, Network] = {}
    for name, attention in attentions.items():
        torch.manual_seed(0)
        networks[name] = Network(attention())
        train(networks[name], options.steps)

    with torch.no_grad():
        images, labels, masks = planted(500, seed=1)
        result = {name: measured(model, images, labels, masks) for name, model in networks.items()}
        together = result["same scores"] = compared(networks["soft"], images[:20])
        weights, _ = read(networks["soft"], images)
        left = weights["soft"][..., : SIDE // 2].sum((1, 2, 3))
        shown = int((left - 0.5).abs().argmin())  # the image whose two patches share the weights most evenly
        draw(networks, images[shown : shown + 1], masks[shown : shown + 1], options.out)

    area = float(masks.float().mean())
    print("                    accuracy on 500 new images, read by        soft weights     spread over")
    print("trained             soft weights   best position   one draw    on the patches   positions")
    for name in networks:
        row = result[name]
        print(f"{name:<20}{row['soft']:<15.3f}{row['best']:<16.3f}{row['drawn']:<12.3f}", end="")
        print(f"{row['energy']:<17.3f}{row['positions']:.1f}")
    print(f"{'by chance':<20}{'0.25':<43}{area:<17.3f}(positions: exp of the entropy)")
    print("on the scores of the network trained soft:")
    print(f"  soft weights sum to 1, to {together['sum']:.0e}", end="")
    print(f"; hard ones that are not one-hot: {together['not one-hot']:.0f}")
    print(f"  mean of {DRAWS} draws: {together['distance']:.4f} from the soft weights", end="")
    print(f"; chance alone makes it {together['sampling error']:.4f}")
    cooled = ", ".join(f"{together[f'T = {t:g}']:.3f} at T = {t:g}" for t in COOLING)
    print(f"  soft weight not at the best position: {cooled}")
    print(f"figure: {options.out}")
    return result


if __name__ == "__main__":
    main()
