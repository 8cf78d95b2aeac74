"""Robustness: right predictions that flip under small changes of the pixels, chosen to do harm or at random."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torchvision.transforms import Normalize

from sightline import runs
from sightline.data.splits import draw
from sightline.inference import forward, forward_call, untouched
from sightline.metrics.robustness import loss_signs
from sightline.tasks.images import each, images_for
from sightline.tasks.outcome import Figure, Outcome, register


@register("robustness")
def robustness(
    run: runs.Run, model: nn.Module, *, epsilons: tuple[int, ...] = (1, 2, 4, 8, 16), limit: int = 1000
) -> Outcome:
    """Fooling rate: right predictions that flip when each pixel moves by epsilon to raise the loss, or at random.

    The first is the fast gradient sign method. A low rate shows that this attack fails, not that others would.

    Args:
        run: a trained run; its test images are attacked.
        model: its network.
        epsilons: sizes of the change, in 255ths of the range from black to white.
        limit: number of test images.

    Raises:
        OSError: the images are missing.
        ValueError: no epsilon, the same twice or one outside 1 to 255, or a limit below 1.

    Source: Goodfellow et al. 2014 (1412.6572); Jetley et al. 2018 (1804.02391), "Learn To Pay Attention", experiment on
    adversarial images.
    """
    if not epsilons or len(set(epsilons)) < len(epsilons) or not all(1 <= epsilon <= 255 for epsilon in epsilons):
        raise ValueError(f"expected different epsilons of 1 to 255 (255ths of black to white), got {list(epsilons)}")
    if limit < 1:
        raise ValueError(f"expected a limit of 1 image or more, got {limit}")
    images = images_for(run, None, None)["test"].unmarked()
    rows = draw(images.labels, limit, seed=0)
    network = nn.Sequential(Normalize(run.preprocess.mean, run.preprocess.std), model)
    generator = torch.Generator().manual_seed(0)
    parts: list[Tensor] = []
    for batch in each(images, rows, model):
        pixels = batch.images.float() / 255
        noise = 2 * torch.randint(2, pixels.shape, generator=generator).to(pixels) - 1
        parts.append(flips(network, pixels, batch.labels, [epsilon / 255 for epsilon in epsilons], noise).cpu())
    rates = torch.cat(parts).double().numpy()
    kinds = [f"{kind}, {epsilon}/255" for kind in ("fooled", "fooled by noise") for epsilon in epsilons]
    groups = None if images.groups is None else images.groups[rows]
    right = int((rates[:, 0] == rates[:, 0]).sum())
    return Outcome(
        task="robustness",
        figures={
            kind: Figure(values=values, unit="images", groups=groups, higher_is_better=False)
            for kind, values in zip(kinds, rates.T, strict=True)
        },
        names={"images": [images.names[i] for i in rows.tolist()]},
        notices=(f"Rates are of the {right:,} of {len(rows):,} images that are classified right before the change.",),
    )


def flips(
    network: nn.Module,
    pixels: Float[Tensor, "b c *grid"],
    labels: Int[Tensor, " b"],
    epsilons: Sequence[float],
    noise: Float[Tensor, "b c *grid"],
) -> Float[Tensor, "b twice"]:
    """1 where a change of the pixels flips a right prediction, else 0; NaN where the prediction is wrong before.

    For each epsilon x becomes x + epsilon sign(gradient of the loss at x), then for each x + epsilon noise, both cut to
    0 to 1.

    >>> from sightline.testing import LinearModel
    >>> model, pixels = LinearModel(torch.tensor([[[[1.0, -1.0]]], [[[-1.0, 1.0]]]])), torch.tensor([[[[0.3, 0.2]]]])
    >>> flips(model, pixels, torch.tensor([0]), [0.04, 0.06], torch.ones(1, 1, 1, 2))
    tensor([[0., 1., 0., 0.]])
    """
    with untouched(network) as net:
        climb = loss_signs(net, pixels, labels, forward_call(pixels))
        changed = [(pixels + epsilon * signs).clamp(0, 1) for signs in (climb.signs, noise) for epsilon in epsilons]
        wrong = [forward(net, images).argmax(1) != climb.labels for images in changed]
    return torch.stack(wrong, 1).float().where(climb.right[:, None], torch.nan)
