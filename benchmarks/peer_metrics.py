"""The same scores of maps from sightline, captum, torch-cam, pytorch-grad-cam, Quantus and saliency-maps-metrics.

    python benchmarks/peer_metrics.py    writes docs/peer_metrics.md and benchmarks/results/peer_metrics.json

A difference is explained only if the script proves it: the peer's formula, written out here in a few lines, gives the
peer's score, or the peer is shown to contradict itself. A peer that is not installed is left out.
"""

import json
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from copy import deepcopy
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache, partial
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from io import StringIO
from math import inf, isfinite, log
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sightline import maps as pixels
from sightline import metrics
from sightline.metrics.perturbed import substitute
from sightline.testing import ConstantModel, LinearModel

ROOT = Path(__file__).parents[1]
PAGE, RESULTS = ROOT / "docs/peer_metrics.md", ROOT / "benchmarks/results/peer_metrics.json"
PEERS = {
    "captum": "captum",
    "torchcam": "torchcam",
    "grad-cam": "pytorch_grad_cam",
    "quantus": "quantus",
    "saliency-maps-metrics": "saliency_maps_metrics",
}
TOLERANCE = {"captum": 1e-5, "torchcam": 1e-5, "grad-cam": 1e-4, "quantus": 1e-4, "saliency-maps-metrics": 1e-5}
"""1e-4 for peers that compute in float32."""
SIDE, CLASSES = 20, 5
SHARES = range(10, 100, 10)

Verdict = Literal["equal", "differs", "peer is wrong"]
Proof = Callable[[Tensor, Tensor], float]
"""Of the peer's values and ours: what is left of the difference once the reason is taken into account."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One score of one peer beside ours."""

    metric: str
    """The peer's, with its options and what it is given."""
    ours: str
    theirs: Callable[[], Any]
    mine: Callable[[], Any]
    truth: Sequence[float] | None = None
    """Worked out by hand."""
    verdict: Verdict = "equal"
    reason: str = ""
    proof: Proof | None = None
    error: str = ""
    """What the peer's error says, where it fails."""


# ---------------------------------------------------------------------------------------------------------- inputs


class Recorder(nn.Module):
    """Keeps what a model is given."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.seen: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(images.detach())
        return self.model(images)


@cache
def net(channels: int = 3, dtype: torch.dtype = torch.double) -> nn.Module:
    """A small net whose probabilities vary."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = nn.Sequential(
            nn.Conv2d(channels, 6, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(6, 8, 3, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(8 * 9**2, CLASSES),
        )
        layers.get_submodule("5").get_parameter("weight").data *= 4
    return layers.to(dtype).eval().requires_grad_(False)


def probabilities(model: nn.Module) -> nn.Module:
    return nn.Sequential(model, nn.Softmax(1))


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


IMAGES = drawn(3, 3, SIDE, SIDE)
TARGETS = net()(IMAGES).argmax(1)
MIXED = torch.stack([net()(IMAGES).argmin(1), TARGETS])[torch.tensor([0, 1, 0]), torch.arange(3)]
"""The least likely, the likeliest and the least likely class."""
SIGNED = drawn(3, 1, SIDE, SIDE, seed=2)
MAPS = pixels.normalize(SIGNED[:, 0])[:, None]
COARSE = pixels.normalize(drawn(3, 5, 5, seed=3))[:, None]
GRAY = drawn(16, 1, SIDE, SIDE, seed=4).float()
GRAY_TARGETS = net(1, torch.float)(GRAY).argmax(1)
GRAY_MAPS = torch.rand(16, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(5))
FLAT = torch.zeros(1, 1, SIDE, SIDE).double()
FLAT_AND_NOT = torch.cat([FLAT, MAPS[:1]])
"""As Quantus refuses batches of zeros only."""
MASKS = torch.zeros(3, 1, SIDE, SIDE, dtype=torch.bool)
MASKS[:, :, 2:10, 4:14] = True
CORNERS = torch.zeros(2, 1, SIDE, SIDE, dtype=torch.bool)
CORNERS[0, :, :10, :10] = CORNERS[1, :, 10:, 10:] = True
SQUARE = torch.tensor([[[[0.4, 0.3], [0.2, 0.1]]]]).double()
ONE = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]]).double()
FIVE = torch.tensor([[[[0.3, 0.25, 0.2, 0.15, 0.1]]]]).double()
FIRST = torch.tensor([0])


def summing(*shape: int) -> nn.Module:
    """The sum of all pixels, of either class."""
    return LinearModel(torch.ones(2, *shape).double()).eval()


def gradient_maps(model: nn.Module, images: Tensor, targets: Tensor, channels: bool = False) -> Tensor:
    """Input x gradient, summed over the colors."""
    with torch.enable_grad():
        given = images.detach().clone().requires_grad_()
        score = model(given).gather(1, targets.reshape(-1, 1)).sum()
        found = given.detach() * torch.autograd.grad(score, given)[0]
    return found if channels else found.sum(1, keepdim=True)


@cache
def squares() -> Tensor:
    """The squares that our infidelity hides, read off an image of ones."""
    image, spy = torch.ones(1, 1, SIDE, SIDE), Recorder(summing(1, SIDE, SIDE).float())
    metrics.infidelity(spy, image, FIRST, image)
    hidden = torch.cat(spy.seen) == 0
    return hidden[hidden.any((1, 2, 3))]


@cache
def small_noise() -> Tensor:
    """The noise of our max_sensitivity, (samples, c, h, w), read off an image of zeros."""
    seen: list[Tensor] = []

    def explain(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        seen.append(images)
        return images.sum(1, keepdim=True)

    metrics.max_sensitivity(nn.Identity(), torch.zeros_like(IMAGES[:1]), FIRST, explain)
    return torch.cat(seen[1:])


def painting_noise(channels: int) -> Tensor:
    """The noise of our ROAD, read off a wholly hidden image of zeros."""
    image = torch.zeros(1, channels, SIDE, SIDE)
    return 0.01 * metrics.inpaint(image, torch.ones(1, 1, SIDE, SIDE, dtype=torch.bool), noise=1.0)[0]


def correct(logits: Tensor, targets: Tensor) -> Tensor:
    return (logits.argmax(1) == targets).float()


def perturbed_fields(
    *needs: str, model: nn.Module, images: Tensor, targets: Tensor, maps: Tensor, **options: Any
) -> Any:
    return metrics.perturbed_scores(model, images, targets, {"": maps}, needs, metrics.Perturbation(**options))[""]


# ---------------------------------------------------------------------------------------------------------- proofs


def distance(found: Tensor, reference: Tensor) -> float:
    """Largest absolute difference; NaN equals NaN only."""
    found, reference = found.double().reshape(-1), reference.double().reshape(-1)
    if found.shape != reference.shape or (found.isnan() != reference.isnan()).any():
        return inf
    same = (found == reference) | found.isnan()
    return (found - reference).abs().masked_fill(same, 0.0).max().item()


def is_theirs(formula: Callable[[], Tensor]) -> Proof:
    """The formula, written out, gives what the peer gives."""
    return lambda theirs, mine: distance(formula(), theirs)


def is_mine(changed: Callable[[], Tensor]) -> Proof:
    """The peer, with the cause taken away, gives what we give."""
    return lambda theirs, mine: distance(changed(), mine)


def differ(first: Callable[[], Tensor], second: Callable[[], Tensor]) -> Proof:
    """Two runs of the peer that should agree do not."""
    return lambda theirs, mine: 0.0 if distance(first(), second()) > 1e-6 else inf


def both(*proofs: Proof) -> Proof:
    return lambda theirs, mine: max(proof(theirs, mine) for proof in proofs)


def one_by_one(call: Callable[..., Tensor], *batches: Tensor) -> Tensor:
    return torch.cat([call(*(batch[i : i + 1] for batch in batches)).reshape(-1) for i in range(len(batches[0]))])


# ---------------------------------------------------------------------------------------------------------- captum


def captum_infidelity(maps: Tensor, images: Tensor = IMAGES, *, decorated: bool = False, **options: Any) -> Tensor:
    """With our squares: its perturbation is what is multiplied with the attribution, here 1 in the square."""
    from captum.metrics import infidelity, infidelity_perturb_func_decorator

    def hide(given: Tensor) -> Any:
        mask = squares().repeat(len(given) // len(squares()), 3, 1, 1)
        hidden = given.masked_fill(mask, 0.0)
        return hidden if decorated else (mask.to(given), hidden)

    perturb: Any = infidelity_perturb_func_decorator(True)(hide) if decorated else hide
    attributions = maps.expand_as(images) / 3
    count = len(squares())
    return infidelity(net(), perturb, images, attributions, target=TARGETS, n_perturb_samples=count, **options)


def black_pixels_left_out() -> Tensor:
    """What captum's decorator computes: a hidden pixel that was 0 already does not count."""
    images = IMAGES * (IMAGES > 0)
    falls = perturbed_fields("drops", model=net(), images=images, targets=TARGETS, maps=SIGNED, score="logit")["drops"]
    counted = torch.einsum("bchw,rhw->br", (images != 0) * SIGNED.expand_as(images) / 3, squares()[:, 0].double())
    return (counted - falls).square().mean(1)


def captum_sensitivity(*, lent: bool, rows: int = 3, explain: Any = gradient_maps) -> Tensor:
    sensitivity_max: Any = import_module("captum.metrics").sensitivity_max

    def explained(images: Any, target: Tensor) -> tuple[Tensor]:
        return (explain(net(), images[0] if isinstance(images, tuple) else images, target),)

    def disturb(images: Tensor) -> Tensor:
        return images + small_noise().double().repeat(rows, 1, 1, 1)

    options: dict[str, Any] = {"perturb_func": disturb} if lent else {}
    return sensitivity_max(explained, IMAGES[:rows], target=TARGETS[:rows], **options)


def red_beyond(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    """A map that is 0 for the images and not 0 for images with noise."""
    return (images[:, :1] - IMAGES[:, 0].amax()).relu()


def max_sensitivity(explain: Any = gradient_maps) -> Any:
    return metrics.max_sensitivity(net(), IMAGES, TARGETS, explain)


def captum_cases() -> list[Case]:
    ours = partial(metrics.infidelity, net(), IMAGES, TARGETS, score="logit")
    dark = IMAGES * (IMAGES > 0)
    zeros = torch.zeros_like(SIGNED)
    return [
        Case(
            metric="infidelity, our squares",
            ours='infidelity(normalize=False, score="logit")',
            theirs=lambda: captum_infidelity(SIGNED),
            mine=lambda: ours(SIGNED, normalize=False),
        ),
        Case(
            metric="infidelity(normalize=True), our squares",
            ours='infidelity(score="logit")',
            theirs=lambda: captum_infidelity(SIGNED, normalize=True),
            mine=lambda: ours(SIGNED),
        ),
        Case(
            metric="infidelity(normalize=True), map of zeros",
            ours='infidelity(score="logit")',
            theirs=lambda: captum_infidelity(zeros, normalize=True),
            mine=lambda: ours(zeros),
        ),
        Case(
            metric="infidelity with its decorator, our squares, images with black pixels",
            ours='infidelity(normalize=False, score="logit")',
            theirs=lambda: captum_infidelity(SIGNED, dark, decorated=True),
            mine=lambda: metrics.infidelity(net(), dark, TARGETS, SIGNED, normalize=False, score="logit"),
            verdict="differs",
            reason="What the map says of a pixel that is 0 already is left out of the sum, as hiding it changes "
            "nothing. We take the map's whole sum in the square. Proof: that sum gives captum's score.",
            proof=is_theirs(black_pixels_left_out),
        ),
        Case(
            metric="sensitivity_max, our noise",
            ours="max_sensitivity()",
            theirs=lambda: captum_sensitivity(lent=True),
            mine=max_sensitivity,
        ),
        Case(
            metric="sensitivity_max",
            ours="max_sensitivity()",
            theirs=lambda: captum_sensitivity(lent=False),
            mine=max_sensitivity,
            verdict="differs",
            reason="The noise comes from the global generator: two runs differ. Proof: they do; with our noise "
            "it gives our score.",
            proof=both(
                differ(lambda: captum_sensitivity(lent=False), lambda: captum_sensitivity(lent=False)),
                is_mine(lambda: captum_sensitivity(lent=True)),
            ),
        ),
        Case(
            metric="sensitivity_max, our noise, maps of zeros that the noise changes",
            ours="max_sensitivity()",
            theirs=lambda: captum_sensitivity(lent=True, explain=red_beyond),
            mine=lambda: max_sensitivity(red_beyond),
            verdict="differs",
            reason="Where the map is 0 captum divides by 1: the score has the map's unit, among others that have "
            "none. Ours is undefined. Proof: the largest norm, not divided, gives captum's score.",
            proof=is_theirs(
                lambda: torch.stack(
                    [red_beyond(net(), IMAGES + noise, TARGETS).flatten(1).norm(dim=1) for noise in small_noise()]
                ).amax(0)
            ),
        ),
    ]


# --------------------------------------------------------------------------------------------------------- torchcam


class Given:
    """Stands in for an extractor of torch-cam and hands out a map that is there already."""

    def __init__(self, model: nn.Module, maps: Tensor) -> None:
        self.model, self.maps = model, maps

    def __call__(self, *_: Any, **__: Any) -> list[Tensor]:
        return [self.maps[:, 0]]

    def fuse_cams(self, cams: list[Tensor]) -> Tensor:
        return cams[0]

    def _hooks_off(self) -> AbstractContextManager[None]:
        return nullcontext()


def softmax(logits: Tensor) -> Tensor:
    return logits.softmax(1)


def torchcam_score(
    what: str, model: nn.Module, images: Tensor, targets: Tensor, maps: Tensor, logits_fn: Any = None, **options: Any
) -> Tensor:
    """One value per image: its metrics keep a mean, so they see one image at a time."""
    import torchcam.metrics as peer

    kind = peer.DeletionInsertionMetric if "auc" in what else peer.ClassificationMetric
    found: list[float] = []
    for i in range(len(images)):
        metric = kind(Given(model, maps[i : i + 1]), logits_fn, **options)
        metric.update(images[i : i + 1], int(targets[i]))
        found.append(metric.summary()[what])
    return torch.tensor(found, dtype=torch.double)


def torchcam_mean_with_nan() -> Tensor:
    import torchcam.metrics as peer

    metric = peer.DeletionInsertionMetric(Given(net(), with_nan()), softmax, steps=8)
    metric.update(IMAGES, TARGETS.tolist())
    return torch.tensor([metric.summary()["deletion_auc"]])


def mean_with_nan() -> Tensor:
    metric = metrics.DeletionAUC(steps=8)
    metric.update(net(), IMAGES, TARGETS, with_nan())
    return metric.compute()[None]


def with_nan() -> Tensor:
    maps = MAPS.clone()
    maps[1, 0, 3, 3] = torch.nan
    return maps


def raw_grad_cam() -> Tensor:
    """Of the probability, as its metric gives the extractor what `logits_fn` returns."""
    from torchcam.methods import GradCAM

    model = deepcopy(net()).requires_grad_(True)
    with GradCAM(model, "2") as extractor:
        return extractor(TARGETS.tolist(), softmax(model(IMAGES)), normalized=False)[0].detach()[:, None]


def torchcam_whole() -> Tensor:
    """Average drop of its own Grad-CAM."""
    from torchcam.methods import GradCAM
    from torchcam.metrics import ClassificationMetric

    found: list[float] = []
    for image, target in zip(IMAGES, TARGETS.tolist(), strict=True):
        model = deepcopy(net()).requires_grad_(True)
        with GradCAM(model, "2") as extractor:
            metric = ClassificationMetric(extractor, softmax)
            metric.update(image[None], target)
            found.append(metric.summary()["avg_drop"])
    return torch.tensor(found)


def drop(share: Tensor, images: Tensor = IMAGES, targets: Tensor = TARGETS, relative: bool = True) -> Tensor:
    """Fall of the probability where the images are multiplied with `share`."""
    before, after = (net()(x.double()).softmax(1).gather(1, targets[:, None])[:, 0] for x in (images, share * images))
    return (before - after).clamp(min=0) / (before if relative else 1)


def enlarged(maps: Tensor) -> Tensor:
    return F.interpolate(maps, (SIDE, SIDE), mode="bilinear", align_corners=False)


def in_rows(maps: Tensor) -> Tensor:
    """A map without ties: the same order, and tied pixels row by row from the top."""
    order = maps.flatten(1).argsort(dim=1, descending=True, stable=True)
    return -order.argsort(dim=1).double().reshape(maps.shape)


UPPER = torch.zeros(1, 1, SIDE, SIDE).double()
UPPER[..., : SIDE // 2, :] = 2 / SIDE**2
"""Evidence in the upper half."""


def torchcam_cases() -> list[Case]:
    small = partial(torchcam_score, model=summing(1, 2, 2), images=SQUARE, targets=FIRST)
    upper = partial(torchcam_score, "deletion_auc", summing(1, SIDE, SIDE), UPPER, FIRST, FLAT, steps=20)
    negative = torch.tensor([[[[2.0, -3.0]]]]).double()
    second = torch.tensor([[[[0.0, 1.0]]]]).double()
    curves: dict[str, Any] = {"deletion_auc": metrics.deletion_auc, "insertion_auc": metrics.insertion_auc}
    cases: list[Case] = []
    for what, by_hand, by_hand_of_five in (("deletion_auc", 0.4, 0.41), ("insertion_auc", 0.6, 0.59)):
        mine = curves[what]
        cases += [
            Case(
                metric=f"DeletionInsertionMetric, {what}, a sum, 2 steps",
                ours=f'{what}(score="logit", steps=2)',
                theirs=partial(small, what, maps=SQUARE, steps=2),
                mine=partial(mine, summing(1, 2, 2), SQUARE, FIRST, SQUARE, steps=2, score="logit"),
                truth=[by_hand],
            ),
            Case(
                metric=f"DeletionInsertionMetric, {what}, a sum of 5 pixels, 3 steps",
                ours=f'{what}(score="logit", steps=3)',
                theirs=partial(torchcam_score, what, summing(1, 1, 5), FIVE, FIRST, FIVE, steps=3),
                mine=partial(mine, summing(1, 1, 5), FIVE, FIRST, FIVE, steps=3, score="logit"),
                truth=[by_hand_of_five],
            ),
            Case(
                metric=f"DeletionInsertionMetric, {what}, softmax, 7 steps",
                ours=f"{what}(steps=7)",
                theirs=partial(torchcam_score, what, net(), IMAGES, TARGETS, MAPS, softmax, steps=7),
                mine=partial(mine, net(), IMAGES, TARGETS, MAPS, steps=7),
            ),
            Case(
                metric=f"DeletionInsertionMetric, {what}, softmax, 7 steps, map of 5 x 5",
                ours=f"{what}(steps=7)",
                theirs=partial(torchcam_score, what, net(), IMAGES, TARGETS, COARSE, softmax, steps=7),
                mine=partial(mine, net(), IMAGES, TARGETS, COARSE, steps=7),
                verdict="differs",
                reason="The enlarged map has tied pixels along its border. torch-cam takes them row by row, we in a "
                "scattered order. Proof: of a map without ties, whose order is torch-cam's, our score is the peer's.",
                proof=is_theirs(partial(mine, net(), IMAGES, TARGETS, in_rows(enlarged(COARSE)), steps=7)),
            ),
        ]
    return [
        *cases,
        Case(
            metric="DeletionInsertionMetric, mean where one map of three has a NaN",
            ours="DeletionAUC(steps=8)",
            theirs=torchcam_mean_with_nan,
            mine=mean_with_nan,
        ),
        Case(
            metric="DeletionInsertionMetric, deletion_auc, a sum over the upper half, flat map",
            ours='deletion_auc(score="logit", steps=20)',
            theirs=upper,
            mine=lambda: metrics.deletion_auc(summing(1, SIDE, SIDE), UPPER, FIRST, FLAT, score="logit", steps=20),
            verdict="differs",
            reason="Tied pixels go row by row from the top, so a flat map is good where the evidence is at the top "
            "and bad where it is at the bottom. Ours go in a scattered order, so it is about as good as chance, 0.5. "
            "Proof: as above.",
            proof=is_theirs(
                lambda: metrics.deletion_auc(
                    summing(1, SIDE, SIDE), UPPER, FIRST, in_rows(FLAT), score="logit", steps=20
                )
            ),
        ),
        Case(
            metric="ClassificationMetric, avg_drop, a sum, one pixel",
            ours='average_drop(score="logit")',
            theirs=partial(small, "avg_drop", maps=ONE),
            mine=partial(metrics.average_drop, summing(1, 2, 2), SQUARE, FIRST, ONE, score="logit"),
            truth=[0.6],
        ),
        Case(
            metric="ClassificationMetric, avg_drop, softmax, map from 0 to 1",
            ours="average_drop()",
            theirs=partial(torchcam_score, "avg_drop", net(), IMAGES, TARGETS, MAPS, softmax),
            mine=partial(metrics.average_drop, net(), IMAGES, TARGETS, MAPS),
        ),
        Case(
            metric="ClassificationMetric, conf_increase, softmax, map from 0 to 1, likely and unlikely classes",
            ours="increase_in_confidence()",
            theirs=partial(torchcam_score, "conf_increase", net(), IMAGES, MIXED, MAPS, softmax),
            mine=partial(metrics.increase_in_confidence, net(), IMAGES, MIXED, MAPS),
        ),
        Case(
            metric="ClassificationMetric, avg_drop of its own Grad-CAM",
            ours="average_drop()",
            theirs=torchcam_whole,
            mine=lambda: metrics.average_drop(net(), IMAGES, TARGETS, raw_grad_cam()),
            verdict="differs",
            reason="torch-cam scales the map from 0 to 1 and then enlarges it, after which it may reach neither. "
            "We scale the enlarged map. (The map is that of the probability, as `logits_fn` comes before it; ours is "
            "given the same.) Proof: the drop of that mask, written out, gives the peer's score.",
            proof=is_theirs(lambda: drop(enlarged(pixels.normalize(raw_grad_cam()[:, 0])[:, None]))),
        ),
        Case(
            metric="ClassificationMetric without its `logits_fn`, avg_drop, the score falls from -1 to -3",
            ours='average_drop(score="logit")',
            theirs=partial(torchcam_score, "avg_drop", summing(1, 1, 2), negative, FIRST, second),
            mine=partial(metrics.average_drop, summing(1, 1, 2), negative, FIRST, second, score="logit"),
            verdict="peer is wrong",
            reason="A share of a logit that is negative: the worse the fall, the better the score, and it is below 0. "
            "Ours is undefined there. Proof: it is 2 / -1.",
            proof=is_theirs(lambda: torch.tensor([-2.0])),
        ),
    ]


# --------------------------------------------------------------------------------------------------------- grad-cam


def grad_cam_score(
    name: str, maps: Tensor, *, images: Tensor = IMAGES, targets: Tensor = TARGETS, model: nn.Module | None = None
) -> Tensor:
    from pytorch_grad_cam.metrics import cam_mult_image, road
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputSoftmaxTarget

    metric = getattr(road if "ROAD" in name else cam_mult_image, name)()
    chosen = [ClassifierOutputSoftmaxTarget(target) for target in targets.tolist()]
    model = model or net(dtype=torch.float)
    return torch.as_tensor(metric(images.float(), maps[:, 0].float().numpy(), chosen, model)).double()


def grad_cam_with_our_noise(name: str, maps: Tensor) -> Tensor:
    from pytorch_grad_cam.metrics.road import NoisyLinearImputer

    plain: Any = NoisyLinearImputer.__call__
    noise = painting_noise(3)

    def painted(self: Any, image: Tensor, kept: Tensor) -> Tensor:
        self.noise = 0.0
        return plain(self, image, kept) + noise * (kept == 0)

    with mock.patch.object(NoisyLinearImputer, "__call__", painted):
        return grad_cam_score(name, maps)


def before() -> Tensor:
    return net()(IMAGES).softmax(1).gather(1, TARGETS[:, None])[:, 0]


def kept_and_whole() -> Tensor:
    fields = perturbed_fields("preserved", "original", model=net(), images=IMAGES, targets=TARGETS, maps=MAPS)
    return fields["preserved"] - fields["original"]


def rectified() -> Tensor:
    """A map that is 0 on 60 % of the pixels, as behind a ReLU."""
    return (MAPS - MAPS.flatten(1).quantile(0.6, dim=1)[:, None, None, None]).clamp(min=0)


def pixels_left(maps: Tensor) -> Tensor:
    """How many pixels grad-cam leaves of the first image where it should leave 10, 20, ..., 90 % of 400."""
    from pytorch_grad_cam.metrics.perturbation_confidence import RemoveMostRelevantFirst

    def count(image: Tensor, kept: Tensor) -> Tensor:
        return kept.sum()

    return torch.stack([RemoveMostRelevantFirst(share, count)(IMAGES[0], maps[0, 0]) for share in SHARES])


def ours_of_road(maps: Tensor) -> Tensor:
    return metrics.road_morf(net(dtype=torch.float), IMAGES.float(), TARGETS, maps.float())


def grad_cam_cases() -> list[Case]:
    morf, lerf, combined = "ROADMostRelevantFirstAverage", "ROADLeastRelevantFirstAverage", "ROADCombined"
    ours = partial(metrics.road, net(dtype=torch.float), IMAGES.float(), TARGETS, MAPS.float())
    least = partial(metrics.road_lerf, net(dtype=torch.float), IMAGES.float(), TARGETS, MAPS.float())
    return [
        Case(
            metric="CamMultImageConfidenceChange, map from 0 to 1",
            ours="preserved - original of perturbed_scores()",
            theirs=lambda: grad_cam_score("CamMultImageConfidenceChange", MAPS),
            mine=kept_and_whole,
        ),
        Case(
            metric="IncreaseInConfidence, map from 0 to 1, likely and unlikely classes",
            ours="increase_in_confidence()",
            theirs=lambda: grad_cam_score("IncreaseInConfidence", MAPS, targets=MIXED),
            mine=lambda: metrics.increase_in_confidence(net(), IMAGES, MIXED, MAPS),
        ),
        Case(
            metric="DropInConfidence, map from 0 to 1",
            ours="average_drop()",
            theirs=lambda: grad_cam_score("DropInConfidence", MAPS),
            mine=lambda: metrics.average_drop(net(), IMAGES, TARGETS, MAPS),
            verdict="peer is wrong",
            reason="It gives the fall itself; the paper (1710.11063) has its share of the score before. "
            "Proof: divided by that score it is ours.",
            proof=lambda theirs, mine: distance(theirs / before(), mine),
        ),
        Case(
            metric="DropInConfidence, map from 0 to 0.5",
            ours="average_drop()",
            theirs=lambda: grad_cam_score("DropInConfidence", MAPS / 2),
            mine=lambda: metrics.average_drop(net(), IMAGES, TARGETS, MAPS / 2),
            verdict="differs",
            reason="The map is taken as it is: all pixels get at most half as bright. We scale it from 0 to 1. "
            "Proof: the fall of the image times the map, written out, gives the peer's score.",
            proof=is_theirs(lambda: drop(MAPS / 2, relative=False)),
        ),
        Case(
            metric=f"{morf}, our noise",
            ours="road_morf(), less the score of the whole image",
            theirs=lambda: grad_cam_with_our_noise(morf, MAPS),
            mine=lambda: ours_of_road(MAPS) - before(),
        ),
        Case(
            metric=f"{lerf}, our noise",
            ours="road_lerf(), less the score of the whole image",
            theirs=lambda: grad_cam_with_our_noise(lerf, MAPS),
            mine=lambda: least() - before(),
        ),
        Case(
            metric=f"{combined}, our noise",
            ours="road()",
            theirs=lambda: grad_cam_with_our_noise(combined, MAPS),
            mine=ours,
        ),
        Case(
            metric=combined,
            ours="road()",
            theirs=lambda: grad_cam_score(combined, MAPS),
            mine=ours,
            verdict="differs",
            reason="The noise comes from the global generator. Proof: two runs differ; with our noise it gives our "
            "score.",
            proof=both(
                differ(lambda: grad_cam_score(combined, MAPS), lambda: grad_cam_score(combined, MAPS)),
                is_mine(lambda: grad_cam_with_our_noise(combined, MAPS)),
            ),
        ),
        Case(
            metric=f"{morf}, our noise, map with 60 % of zeros",
            ours="road_morf(), less the score of the whole image",
            theirs=lambda: grad_cam_with_our_noise(morf, rectified()),
            mine=lambda: ours_of_road(rectified()) - before(),
            verdict="peer is wrong",
            reason="It removes what reaches a percentile, and of tied pixels all: of a map with 60 % of zeros, as "
            "behind a ReLU, nothing is left where 10 to 50 % of the image should be, and there is nothing to paint "
            "from. Proof: the pixels that it leaves are counted.",
            proof=lambda theirs, mine: distance(
                pixels_left(rectified()), torch.tensor([0, 0, 0, 0, 0, 240, 280, 320, 360])
            ),
        ),
    ]


# ---------------------------------------------------------------------------------------------------------- quantus


def quantus_score(
    name: str,
    images: Tensor,
    maps: Tensor | None = None,
    masks: Tensor | None = None,
    *,
    model: nn.Module | None = None,
    targets: Tensor | None = None,
    call: dict[str, Any] | None = None,
    old_numpy: bool = False,
    **options: Any,
) -> Tensor:
    quantus = import_module("quantus")
    lent: AbstractContextManager[Any] = mock.patch.object(np, "trapz", np.trapezoid, create=True)
    with lent if old_numpy else nullcontext(), redirect_stdout(StringIO()):
        metric = getattr(quantus, name)(disable_warnings=True, display_progressbar=False, **options)
        found = metric(
            model=model,
            x_batch=images.numpy(),
            y_batch=(torch.zeros(len(images), dtype=torch.long) if targets is None else targets).numpy(),
            a_batch=None if maps is None else maps.numpy().copy(),
            s_batch=None if masks is None else masks.numpy(),
            channel_first=True,
            **call or {},
        )
    if isinstance(found, dict):
        found = list(found.values())
    return torch.as_tensor(np.asarray(found, dtype=float))


def quantus_explain(model: nn.Module, inputs: Any, targets: Any, **_: Any) -> Any:
    return gradient_maps(model, torch.as_tensor(inputs).float(), torch.as_tensor(targets)).numpy()


def quantus_net(name: str, images: Tensor, targets: Tensor, maps: Tensor | None = None, **options: Any) -> Tensor:
    return quantus_score(name, images, maps, model=net(images.shape[1], torch.float), targets=targets, **options)


def sums(maps: Tensor, masks: Tensor) -> Tensor:
    return (maps * masks).sum((1, 2, 3))


def area(masks: Tensor) -> Tensor:
    return masks.double().mean((1, 2, 3))


def localization_cases() -> list[Case]:
    twice = partial(
        quantus_score,
        "AttributionLocalisation",
        *(x.repeat(2, 1, 1, 1) for x in (IMAGES, SIGNED, MASKS)),
        weighted=True,
    )
    points = partial(quantus_score, "PointingGame", IMAGES)
    ranks = partial(quantus_score, "RelevanceRankAccuracy", IMAGES)
    mass = partial(quantus_score, "RelevanceMassAccuracy", IMAGES)
    inside = partial(quantus_score, "AttributionLocalisation", IMAGES)
    absolute, balanced = SIGNED.abs(), SIGNED - SIGNED.mean((2, 3), keepdim=True) + 0.01
    planted = torch.where(MASKS, 1.0, 0.1) + 1e-3 * MAPS
    planted[1] = 2 - planted[1]  # in the second image everything but the evidence
    none, whole = torch.zeros_like(MASKS), MASKS.clone()
    whole[0] = True
    pair = IMAGES[:2]
    zero_first = torch.tensor([True, False]).reshape(2, 1, 1, 1)
    flat_ranks = partial(quantus_score, "RelevanceRankAccuracy", pair, FLAT_AND_NOT)
    share = int(MASKS[0].sum())
    return [
        Case(
            metric="PointingGame, planted maps",
            ours="pointing_game()",
            theirs=lambda: points(planted, MASKS),
            mine=lambda: metrics.pointing_game(planted, MASKS),
            truth=[1, 0, 1],
        ),
        Case(
            metric="PointingGame, a map of zeros and another, masks of a quarter",
            ours="pointing_game()",
            theirs=lambda: quantus_score("PointingGame", pair, FLAT_AND_NOT, CORNERS),
            mine=lambda: metrics.pointing_game(FLAT_AND_NOT, CORNERS),
            truth=[0.25, float(CORNERS[1].flatten()[MAPS[0].argmax()])],
            verdict="peer is wrong",
            reason="It is a hit if any of the highest pixels lies in the mask, so a map of zeros wins every game. "
            "Chance is the mask's share of the image, which is our score. (A batch of nothing but zeros it refuses.) "
            "Proof: 1 where any of the highest pixels is inside gives the peer's score.",
            proof=is_theirs(
                lambda: ((FLAT_AND_NOT == FLAT_AND_NOT.amax((2, 3), keepdim=True)) & CORNERS).any(3).any(2)
            ),
        ),
        Case(
            metric="PointingGame, empty masks",
            ours="pointing_game()",
            theirs=lambda: points(MAPS, none),
            mine=lambda: metrics.pointing_game(MAPS, none),
            verdict="peer is wrong",
            reason="It means to give NaN, but writes it into an array of bool, where it becomes True: nothing to find "
            "is a hit. Proof: NaN as bool gives the peer's score.",
            proof=is_theirs(lambda: torch.from_numpy(np.full(3, np.nan).astype(bool))),
        ),
        Case(
            metric="RelevanceMassAccuracy, positive maps",
            ours="energy_in_mask()",
            theirs=lambda: mass(MAPS, MASKS),
            mine=lambda: metrics.energy_in_mask(MAPS, MASKS),
        ),
        Case(
            metric="RelevanceMassAccuracy, signed maps",
            ours="energy_in_mask()",
            theirs=lambda: mass(balanced, MASKS),
            mine=lambda: metrics.energy_in_mask(balanced, MASKS),
            verdict="peer is wrong",
            reason="Negative values are summed too; the share is then below 0, above 1 or divided by nearly nothing. "
            "The paper (2003.07258) pools to positive relevance first, we cut off at 0. Proof: the signed quotient "
            "gives the peer's score, and it is not in [0, 1].",
            proof=both(
                is_theirs(lambda: sums(balanced, MASKS) / balanced.sum((1, 2, 3))),
                lambda theirs, mine: 0.0 if (theirs < 0).any() or (theirs > 1).any() else inf,
            ),
        ),
        Case(
            metric="RelevanceMassAccuracy, a map of zeros, an empty mask",
            ours="energy_in_mask()",
            theirs=lambda: quantus_score("RelevanceMassAccuracy", pair, FLAT_AND_NOT, MASKS[:2] & zero_first),
            mine=lambda: metrics.energy_in_mask(FLAT_AND_NOT, MASKS[:2] & zero_first),
        ),
        Case(
            metric="AttributionLocalisation",
            ours="energy_in_mask(maps.abs(), masks)",
            theirs=lambda: inside(SIGNED, MASKS),
            mine=lambda: metrics.energy_in_mask(absolute, MASKS),
        ),
        Case(
            metric="AttributionLocalisation(positive_attributions=True)",
            ours="energy_in_mask()",
            theirs=lambda: inside(SIGNED, MASKS, positive_attributions=True),
            mine=lambda: metrics.energy_in_mask(SIGNED, MASKS),
            verdict="peer is wrong",
            reason="By default absolute values are taken before negative ones are cut off: the option does nothing. "
            "Proof: it gives the score of the absolute map; with `abs=False` it gives ours.",
            proof=both(
                is_theirs(lambda: sums(absolute, MASKS) / absolute.sum((1, 2, 3))),
                is_mine(lambda: inside(SIGNED, MASKS, positive_attributions=True, abs=False)),
            ),
        ),
        Case(
            metric="AttributionLocalisation(weighted=True)",
            ours="energy_in_mask(maps.abs(), masks) / mask's share of the image",
            theirs=lambda: inside(SIGNED, MASKS, weighted=True),
            mine=lambda: metrics.energy_in_mask(absolute, MASKS) / area(MASKS),
            verdict="peer is wrong",
            reason="The area of the mask is divided by the number of values of all images but the first two, and the "
            "score multiplied with that, so it depends on the batch. Proof: that product gives the peer's score, and "
            "the same images twice in a batch get a quarter of it.",
            proof=both(
                is_theirs(lambda: sums(absolute, MASKS) / absolute.sum((1, 2, 3)) * MASKS.sum((1, 2, 3)) / 1200),
                lambda theirs, mine: distance(theirs / 4, twice()[:3]),
            ),
        ),
        Case(
            metric="RelevanceRankAccuracy, maps without ties",
            ours="relevance_rank()",
            theirs=lambda: ranks(SIGNED, MASKS),
            mine=lambda: metrics.relevance_rank(SIGNED, MASKS),
        ),
        Case(
            metric="RelevanceRankAccuracy, planted maps, full and empty masks",
            ours="relevance_rank()",
            theirs=lambda: ranks(planted, torch.cat([MASKS[:1], whole[:1], none[:1]])),
            mine=lambda: metrics.relevance_rank(planted, torch.cat([MASKS[:1], whole[:1], none[:1]])),
            truth=[1, 1, torch.nan],
        ),
        Case(
            metric="RelevanceRankAccuracy, a map of zeros and another, masks of a quarter",
            ours="relevance_rank()",
            theirs=lambda: flat_ranks(CORNERS),
            mine=lambda: metrics.relevance_rank(FLAT_AND_NOT, CORNERS),
            verdict="peer is wrong",
            reason="Of tied pixels those that the sort happens to put first are taken. A flat map knows nothing and "
            "should score chance, a quarter. Proof: opposite corners get different scores; the other map gets ours.",
            proof=both(
                differ(lambda: flat_ranks(CORNERS)[:1], lambda: flat_ranks(CORNERS.flip(0))[:1]),
                lambda theirs, mine: distance(theirs[1:], mine[1:]),
                lambda theirs, mine: distance(mine[:1], torch.tensor([0.25])),
            ),
        ),
        Case(
            metric="TopKIntersection, k the size of the mask",
            ours="relevance_rank()",
            theirs=lambda: quantus_score("TopKIntersection", IMAGES, SIGNED, MASKS, k=share),
            mine=lambda: metrics.relevance_rank(SIGNED, MASKS),
        ),
        Case(
            metric="AUC, a map without ties, one of two values, a full mask",
            ours="mask_auc()",
            theirs=lambda: quantus_score("AUC", IMAGES, torch.cat([MAPS[:1], MAPS[:2].round()]), whole.roll(2, 0)),
            mine=lambda: metrics.mask_auc(torch.cat([MAPS[:1], MAPS[:2].round()]), whole.roll(2, 0)),
        ),
    ]


def shannon(maps: Tensor) -> Tensor:
    return metrics.entropy(maps) * log(SIDE**2)


def complexity_cases() -> list[Case]:
    sparse, complexity = (partial(quantus_score, name, IMAGES) for name in ("Sparseness", "Complexity"))
    faint = MAPS * torch.tensor([1.0, 1e-6, 1e-8])[:, None, None, None]
    shifted = faint / faint.max() + 1e-7
    return [
        Case(
            metric="Sparseness",
            ours="gini(maps.abs())",
            theirs=lambda: sparse(SIGNED),
            mine=lambda: metrics.gini(SIGNED.abs()),
        ),
        Case(
            metric="Sparseness, signed maps",
            ours="gini()",
            theirs=lambda: sparse(SIGNED),
            mine=lambda: metrics.gini(SIGNED),
            verdict="differs",
            reason="By default it takes absolute values: evidence against the class counts as evidence for it. "
            "Proof: our index of the absolute map gives the peer's score.",
            proof=is_theirs(lambda: metrics.gini(SIGNED.abs())),
        ),
        Case(
            metric="Sparseness, the same kind of map at scales of 1, 1e-6 and 1e-8",
            ours="gini()",
            theirs=lambda: sparse(faint),
            mine=lambda: metrics.gini(faint),
            verdict="peer is wrong",
            reason="The maps are divided by the largest value of the whole batch, and then 1e-7 is added, so that a "
            "faint map beside a strong one looks flat; the index is free of scale. Proof: so computed it gives the "
            "peer's score; one image at a time the peer gives ours.",
            proof=both(
                is_theirs(lambda: metrics.gini(shifted)),
                is_mine(lambda: one_by_one(partial(quantus_score, "Sparseness"), IMAGES, faint)),
            ),
        ),
        Case(
            metric="Sparseness, a map of zeros and another",
            ours="gini()",
            theirs=lambda: quantus_score("Sparseness", IMAGES[:2], FLAT_AND_NOT),
            mine=lambda: metrics.gini(FLAT_AND_NOT),
            verdict="differs",
            reason="With 1e-7 added a map of zeros is a flat one, of index 0. Ours is undefined. Proof: the index of "
            "a flat map gives the peer's score.",
            proof=is_theirs(lambda: metrics.gini(FLAT_AND_NOT + 1e-7)),
        ),
        Case(
            metric="Complexity",
            ours="entropy(maps.abs()) * log(h * w)",
            theirs=lambda: complexity(SIGNED),
            mine=lambda: shannon(SIGNED.abs()),
        ),
        Case(
            metric="Complexity, a flat map and one pixel",
            ours="entropy() * log(h * w)",
            theirs=lambda: quantus_score("Complexity", IMAGES[:2], torch.cat([FLAT + 1, one_pixel()])),
            mine=lambda: shannon(torch.cat([FLAT + 1, one_pixel()])),
            truth=[log(SIDE**2), 0],
        ),
        Case(
            metric="Complexity, signed maps",
            ours="entropy() * log(h * w)",
            theirs=lambda: complexity(SIGNED),
            mine=lambda: shannon(SIGNED),
            verdict="differs",
            reason="As Sparseness: absolute values. Proof: our entropy of the absolute map gives the peer's score.",
            proof=is_theirs(lambda: shannon(SIGNED.abs())),
        ),
    ]


def one_pixel() -> Tensor:
    return F.one_hot(torch.tensor(7), SIDE**2).reshape(1, 1, SIDE, SIDE).double()


def deletion_curve(images: Tensor, targets: Tensor, maps: Tensor, fill: float = 0.0) -> Tensor:
    """From the first chunk on."""
    given: dict[str, Any] = {"images": images, "targets": targets, "maps": maps, "fill": fill, "steps": 20}
    return perturbed_fields("deletion", model=net(images.shape[1], torch.float), **given)["deletion"][:, 1:]


def accuracy_painted(images: Tensor, targets: Tensor, maps: Tensor) -> Tensor:
    """Accuracy at 10, 20, ..., 90 % of our most_first."""
    given: dict[str, Any] = {"images": images, "targets": targets, "maps": maps}
    return perturbed_fields("morf", model=net(1, torch.float), score=correct, **given)["morf"].mean(0)


def quantus_road(images: Tensor, targets: Tensor, maps: Tensor, *, batch: int = 64) -> Tensor:
    impute = import_module("quantus.functions.perturb_func").noisy_linear_imputation
    noise = painting_noise(1).numpy()

    def paint(arr: Any, indices: Any, **_: Any) -> Any:
        painted = impute(arr=arr, indices=indices, noise=0.0)
        painted.reshape(1, -1)[:, indices] += noise.reshape(1, -1)[:, indices]
        return painted

    options: dict[str, Any] = {"percentages": list(SHARES), "perturb_func": paint, "call": {"batch_size": batch}}
    return quantus_net("ROAD", images, targets, maps, **options)


def stacked_patches(*, stacked: bool) -> Tensor:
    """Mean of (sum of map x what a patch hides - fall)^2 over 25 patches of 4 x 4, each on top of those before or not.

    In one color, as the peer takes the map once per color.
    """
    model, images, found = net(1, torch.float), GRAY[:3], list[Tensor]()
    whole = model(images).gather(1, TARGETS[:, None])[:, 0]
    hidden = images.clone()
    for top in range(0, SIDE, 4):
        for left in range(0, SIDE, 4):
            hidden = hidden.clone() if stacked else images.clone()
            hidden[:, :, top : top + 4, left : left + 4] = 0
            fall = whole - model(hidden).gather(1, TARGETS[:, None])[:, 0]
            found.append((sums(GRAY_MAPS[:3], images - hidden) - fall).square())
    return torch.stack(found).mean(0)


def quantus_infidelity(**options: Any) -> Tensor:
    return quantus_net("Infidelity", GRAY[:3], TARGETS, GRAY_MAPS[:3], perturb_baseline=0.0, **options)


def hide_alone(arr: Any, indices: Any, **_: Any) -> Any:
    """A perturbation for Quantus' Infidelity that puts back what was hidden before."""
    changed = GRAY[:3].reshape(3, -1).numpy().copy()
    changed[np.arange(3)[:, None], indices] = 0
    return changed


def quantus_sensitivity(*, lent: bool) -> Tensor:
    given: dict[str, Any] = {"nr_samples": len(small_noise()), "lower_bound": 0.02}
    if lent:
        noise = iter(small_noise().numpy())
        given["perturb_func"] = lambda arr, indices, **_: arr + next(noise).reshape(1, -1)
    call = {"explain_func": quantus_explain}
    maps = gradient_maps(net(dtype=torch.float), IMAGES.float(), TARGETS)
    return quantus_net("MaxSensitivity", IMAGES.float(), TARGETS, maps, call=call, **given)


def quantus_random_logit(similarity: bool) -> Tensor:
    quantus = import_module("quantus")
    model, images, targets = two_classes()
    options: dict[str, Any] = {"num_classes": 2, "abs": True}
    if similarity:
        options["similarity_func"] = quantus.functions.similarity_func.correlation_spearman
    maps = gradient_maps(model, images, targets)
    call = {"explain_func": quantus_explain}
    return quantus_score("RandomLogit", images, maps, model=model, targets=targets, call=call, **options)


def two_classes() -> tuple[nn.Module, Tensor, Tensor]:
    model = deepcopy(net(dtype=torch.float))
    assert isinstance(model, nn.Sequential)
    model[5].weight, model[5].bias = (nn.Parameter(p[:2], False) for p in model[5].parameters())
    return model, IMAGES.float(), torch.tensor([0, 1, 0])


def our_random_logit() -> Any:
    model, images, targets = two_classes()
    return metrics.random_logit(model, images, targets, gradient_maps)


def quantus_mprt(**options: Any) -> Tensor:
    images = IMAGES.float()
    maps = gradient_maps(net(dtype=torch.float), images, TARGETS)
    call = {"explain_func": quantus_explain}
    return quantus_net("MPRT", images, TARGETS, maps, call=call, abs=True, **options)


def redrawn() -> Tensor:
    """Rank correlations after each layer, from the last to the first, was drawn anew, always with the same seed."""
    model, images = deepcopy(net(dtype=torch.float)), IMAGES.float()
    before = gradient_maps(model, images, TARGETS).abs()
    found: list[Tensor] = []
    with torch.random.fork_rng():
        for module in [m for m in model.modules() if hasattr(m, "reset_parameters")][::-1]:
            torch.manual_seed(43)
            getattr(module, "reset_parameters")()  # noqa: B009
            found.append(metrics.rank_correlation(before, gradient_maps(model, images, TARGETS).abs()))
    return torch.stack(found, 1)


def twins(*_: Tensor) -> float:
    """How far two layers of one shape are apart when Quantus has drawn both anew."""
    peer: Any = import_module("quantus.helpers.model.pytorch_model")
    pair = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.random.fork_rng():
        model = list(peer.PyTorchModel(pair).get_random_layer_generator())[-1][1]
    return distance(model[0].weight, model[1].weight)


def shuffled_curve() -> Tensor:
    curve = metrics.randomization_curve(net(dtype=torch.float), IMAGES.float(), TARGETS, gradient_maps)[1]
    assert isinstance(curve, Tensor)
    return curve


def flipping_cases() -> list[Case]:
    images, maps, targets = GRAY[:3], GRAY_MAPS[:3], GRAY_TARGETS[:3]
    constant = ConstantModel(torch.zeros(2)).eval()
    steps = {"features_in_step": SIDE, "perturb_baseline": 0.0}
    flip = partial(quantus_net, "PixelFlipping", call={"softmax": True})
    always = partial(
        quantus_score,
        "PixelFlipping",
        images[:1],
        maps[:1],
        model=constant,
        call={"softmax": True},
        return_auc_per_sample=True,
        perturb_baseline=0.0,
    )
    ours: dict[str, Any] = {"steps": 20}
    return [
        Case(
            metric="PixelFlipping, curve, one color",
            ours="deletion of perturbed_scores(steps=20), without its first point",
            theirs=lambda: flip(images, targets, maps, **steps),
            mine=lambda: deletion_curve(images, targets, maps),
        ),
        Case(
            metric="PixelFlipping, curve, three colors, every third point",
            ours="deletion of perturbed_scores(steps=20), without its first point",
            theirs=lambda: flip(IMAGES.float(), TARGETS, MAPS.float(), **steps)[:, 2::3],
            mine=lambda: deletion_curve(IMAGES.float(), TARGETS, MAPS.float()),
        ),
        Case(
            metric='PixelFlipping(perturb_baseline="black"), its default, curve',
            ours="deletion of perturbed_scores(steps=20), without its first point",
            theirs=lambda: flip(images, targets, maps, features_in_step=SIDE),
            mine=lambda: deletion_curve(images, targets, maps),
            verdict="differs",
            reason="Its black is the smallest value of each image, ours 0 in the model's input. Proof: with that value "
            "as our `fill` both are equal.",
            proof=is_theirs(
                lambda: torch.cat(
                    [
                        deletion_curve(images[i : i + 1], targets[i : i + 1], maps[i : i + 1], images[i].min().item())
                        for i in range(3)
                    ]
                )
            ),
        ),
        Case(
            metric="PixelFlipping(return_auc_per_sample=True)",
            ours="deletion_auc(steps=20)",
            theirs=lambda: flip(images, targets, maps, return_auc_per_sample=True, **steps),
            mine=lambda: metrics.deletion_auc(net(1, torch.float), images, targets, maps, **ours),
            verdict="peer is wrong",
            reason="It fails with NumPy 2.4, which has no `trapz`.",
            error="'trapz'",
        ),
        Case(
            metric="the same, given a `trapz`",
            ours="deletion_auc(steps=20)",
            theirs=lambda: flip(images, targets, maps, return_auc_per_sample=True, old_numpy=True, **steps),
            mine=lambda: metrics.deletion_auc(net(1, torch.float), images, targets, maps, **ours),
            verdict="peer is wrong",
            reason="The curve lacks the whole image, and its x-axis counts steps. Proof: the area of our curve "
            "without its first point, with steps of 1, gives the peer's score.",
            proof=is_theirs(lambda: torch.trapezoid(deletion_curve(images, targets, maps), dx=1)),
        ),
        Case(
            metric="the same, model that always says 0.5",
            ours="deletion_auc(steps=20)",
            theirs=lambda: always(features_in_step=SIDE, old_numpy=True),
            mine=lambda: metrics.deletion_auc(constant, images[:1], targets[:1], maps[:1], **ours),
            truth=[0.5],
            verdict="peer is wrong",
            reason="As above: the area depends on `features_in_step` and is no mean score. Proof: with 40 pixels a "
            "step, where 20 should change nothing, it is 4.5.",
            proof=lambda theirs, mine: distance(
                torch.cat([theirs, always(features_in_step=2 * SIDE, old_numpy=True)]), torch.tensor([9.5, 4.5])
            ),
        ),
    ]


def faithfulness_cases() -> list[Case]:
    road = partial(quantus_road, GRAY, GRAY_TARGETS, GRAY_MAPS)
    colors = partial(quantus_net, "ROAD", IMAGES.float(), TARGETS, MAPS.float(), percentages=[50])
    painted = partial(accuracy_painted, GRAY, GRAY_TARGETS, GRAY_MAPS)
    weights = drawn(1, 1, SIDE, SIDE, seed=7).float().expand(3, -1, -1, -1)
    linear = LinearModel(weights[:2]).eval()
    ours = partial(metrics.infidelity, net(1, torch.float), GRAY[:3], TARGETS, normalize=False, score="logit")
    whole_numbers = torch.arange(4.0).reshape(1, 1, 2, 2)
    tenths = GRAY[:3] * weights
    gap: Any = lambda maps, model, images: (  # noqa: E731
        metrics.completeness(model, images, torch.zeros(len(images), dtype=torch.long), maps) < 1e-5
    ).double()
    complete = partial(quantus_score, "Completeness", perturb_baseline=0.0)
    return [
        *flipping_cases(),
        Case(
            metric="ROAD, accuracy at 10 to 90 %, one color, our noise",
            ours="morf of perturbed_scores(), scored by whether the class is right",
            theirs=road,
            mine=painted,
        ),
        Case(
            metric="the same, `batch_size=4` for 16 images",
            ours="morf of perturbed_scores(), scored by whether the class is right",
            theirs=lambda: road(batch=4),
            mine=painted,
            verdict="peer is wrong",
            reason="Only the first batch counts. Proof: it gives the score of the first four images alone.",
            proof=is_theirs(lambda: accuracy_painted(GRAY[:4], GRAY_TARGETS[:4], GRAY_MAPS[:4])),
        ),
        Case(
            metric="ROAD, three colors",
            ours="road_morf()",
            theirs=colors,
            mine=lambda: metrics.road_morf(net(), IMAGES, TARGETS, MAPS),
            verdict="peer is wrong",
            reason="It fails: it ranks the colors of a pixel one by one and takes their numbers for those of pixels.",
            error="out of bounds",
        ),
        Case(
            metric="Infidelity, exact map of a linear model",
            ours='infidelity(normalize=False, score="logit") of map x image',
            theirs=lambda: quantus_score("Infidelity", GRAY[:3], weights, model=linear, perturb_baseline=0.0),
            mine=lambda: metrics.infidelity(
                linear, GRAY[:3], torch.zeros(3, dtype=torch.long), tenths, normalize=False, score="logit"
            ),
            truth=[0, 0, 0],
        ),
        Case(
            metric="Infidelity",
            ours='infidelity(normalize=False, score="logit") of map x image',
            theirs=quantus_infidelity,
            mine=lambda: ours(GRAY_MAPS[:3] * GRAY[:3]),
            verdict="peer is wrong",
            reason="Each patch is hidden on top of all patches before it, so that most of the image is gone for most "
            "of them, and the ten samples are ten times the same. Proof: stacked patches, written out, give the "
            "peer's score, with one sample as with ten; patches one at a time give what it gives when its "
            "perturbation puts the earlier ones back. Ours hides other squares, so the values do not compare.",
            proof=both(
                is_theirs(lambda: stacked_patches(stacked=True)),
                is_theirs(lambda: quantus_infidelity(n_perturb_samples=1)),
                lambda theirs, mine: distance(
                    quantus_infidelity(perturb_func=hide_alone), stacked_patches(stacked=False)
                ),
            ),
        ),
        Case(
            metric="Completeness, exact map of a linear model, 1 = complete",
            ours="completeness() < 1e-5",
            theirs=lambda: complete(whole_numbers, whole_numbers, model=summing(1, 2, 2).float()),
            mine=lambda: gap(whole_numbers, summing(1, 2, 2).float(), whole_numbers),
            truth=[1],
            verdict="peer is wrong",
            reason="By default the map is divided by its largest value before it is summed. Proof: with "
            "`normalize=False` it is found complete.",
            proof=is_mine(
                lambda: complete(whole_numbers, whole_numbers, model=summing(1, 2, 2).float(), normalize=False)
            ),
        ),
        Case(
            metric="Completeness(normalize=False), the same for products that are rounded, 1 = complete",
            ours="completeness() < 1e-5",
            theirs=lambda: complete(GRAY[:3], tenths, model=linear, normalize=False),
            mine=lambda: gap(tenths, linear, GRAY[:3]),
            truth=[1, 1, 1],
            verdict="peer is wrong",
            reason="Two sums in floating point are compared by `==`. Proof: they differ by less than 1e-5 of their "
            "size and are not found equal.",
            proof=lambda theirs, mine: ((sums(tenths, tenths * 0 + 1) / linear(GRAY[:3])[:, 0]) - 1).abs().max().item(),
        ),
    ]


def sanity_cases() -> list[Case]:
    return [
        Case(
            metric="MaxSensitivity, our noise",
            ours="max_sensitivity()",
            theirs=lambda: quantus_sensitivity(lent=True),
            mine=lambda: metrics.max_sensitivity(net(dtype=torch.float), IMAGES.float(), TARGETS, gradient_maps),
        ),
        Case(
            metric="MaxSensitivity(lower_bound=0.02, nr_samples=10)",
            ours="max_sensitivity()",
            theirs=lambda: quantus_sensitivity(lent=False),
            mine=lambda: metrics.max_sensitivity(net(dtype=torch.float), IMAGES.float(), TARGETS, gradient_maps),
            verdict="differs",
            reason="The noise comes from NumPy's global generator. Proof: two runs differ; with our noise it gives our "
            "score.",
            proof=both(
                differ(lambda: quantus_sensitivity(lent=False), lambda: quantus_sensitivity(lent=False)),
                is_mine(lambda: quantus_sensitivity(lent=True)),
            ),
        ),
        Case(
            metric="RandomLogit(similarity_func=correlation_spearman, abs=True), two classes",
            ours="random_logit()",
            theirs=lambda: quantus_random_logit(True),
            mine=our_random_logit,
        ),
        Case(
            metric="RandomLogit(abs=True), two classes",
            ours="random_logit()",
            theirs=lambda: quantus_random_logit(False),
            mine=our_random_logit,
            verdict="differs",
            reason="Structural similarity of the maps, laid out as one row of pixels; ours is a rank correlation. "
            "Proof: with rank correlation it gives our score.",
            proof=is_mine(lambda: quantus_random_logit(True)),
        ),
        Case(
            metric="MPRT(abs=True, return_last_correlation=True)",
            ours="parameter_randomization()",
            theirs=lambda: quantus_mprt(return_last_correlation=True),
            mine=lambda: metrics.parameter_randomization(
                net(dtype=torch.float), IMAGES.float(), TARGETS, gradient_maps
            ),
            verdict="differs",
            reason="It draws the weights anew, and every layer with the same seed, so that layers of one shape get "
            "the same weights; we shuffle those of each layer. Proof: drawn so, our rank correlation gives the peer's "
            "score; two equal layers come out the same.",
            proof=both(is_theirs(lambda: redrawn()[:, -1]), twins),
        ),
        Case(
            metric="MPRT(abs=True, return_average_correlation=True)",
            ours="mean of randomization_curve()",
            theirs=lambda: quantus_mprt(return_average_correlation=True),
            mine=lambda: shuffled_curve().mean(1),
            verdict="peer is wrong",
            reason="Its mean over the layers also counts the correlation of the untouched model's maps with "
            "themselves, 1. Proof: with that 1 and its own draws the mean gives the peer's score.",
            proof=is_theirs(lambda: F.pad(redrawn(), (1, 0), value=1.0).mean(1)),
        ),
    ]


def quantus_cases() -> list[Case]:
    return [*localization_cases(), *complexity_cases(), *faithfulness_cases(), *sanity_cases()]


# -------------------------------------------------------------------------------------------- saliency-maps-metrics


def multi_step(
    what: str,
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    maps: Tensor,
    *,
    blur: bool = False,
    substitutes: Tensor | None = None,
    old_numpy: bool = True,
    **options: Any,
) -> Tensor:
    """dauc, dc, iauc or ic; one image at a time, as it gives means."""
    peer = import_module("saliency_maps_metrics.multi_step_metrics")
    kind = peer.Deletion if what.startswith("d") else peer.Insertion
    metric = kind(data_replace_method="blur" if blur else "black", **options)
    lent: AbstractContextManager[Any] = mock.patch.object(np, "trapz", np.trapezoid, create=True)
    with lent if old_numpy else nullcontext():
        return torch.tensor(
            [
                metric(
                    model,
                    images[i : i + 1],
                    maps[i : i + 1],
                    targets[i : i + 1],
                    None if substitutes is None else substitutes[i : i + 1],
                )[what].item()
                for i in range(len(images))
            ]
        )


def single_step(what: str, model: nn.Module, images: Tensor, targets: Tensor, maps: Tensor) -> Tensor:
    """ad, iic or add: a mean over the images."""
    peer = import_module("saliency_maps_metrics.single_step_metrics")
    metric = peer.ADD() if what == "add" else peer.IIC_AD()
    return torch.tensor([float(metric(model, images, maps, targets)[what])])


def each_single_step(what: str, maps: Tensor = MAPS) -> Tensor:
    return one_by_one(partial(single_step, what, probabilities(net())), IMAGES, TARGETS, maps)


def saliency_maps_metrics_cases() -> list[Case]:
    ramp = torch.arange(25.0).reshape(1, 1, 5, 5).double()
    falling = (24 - ramp) / 300  # a sum of 1
    sure = probabilities(net())
    uneven = MAPS * torch.tensor([1.0, 0.3, 0.1])[:, None, None, None]
    given: dict[str, Any] = {"steps": 25, "cells": True}
    mine: dict[str, Any] = {
        "dauc": metrics.deletion_auc,
        "iauc": metrics.insertion_auc,
        "dc": metrics.deletion_correlation,
        "ic": metrics.insertion_correlation,
        "ad": metrics.average_drop,
        "iic": metrics.increase_in_confidence,
        "add": metrics.add,
    }
    ours: dict[str, str] = {name: function.__name__ for name, function in mine.items()}
    flat = FLAT + 0.2
    single, images = net(dtype=torch.float), IMAGES.float()  # its blur is in float32
    insertion = partial(multi_step, "iauc", probabilities(single), images, TARGETS, COARSE.float(), blur=True)
    one: dict[str, Any] = {"steps": 25, "score": "logit"}
    five_by_five = summing(1, 5, 5)
    curves = [
        Case(
            metric=f"{name}, 25 cells",
            ours=f"{ours[name]}(steps=25, cells=True)",
            theirs=partial(multi_step, name, sure, IMAGES, TARGETS, COARSE),
            mine=partial(mine[name], net(), IMAGES, TARGETS, COARSE, **given),
        )
        for name in ("dauc", "iauc", "dc", "ic")
    ]
    masks = [
        Case(
            metric=f"{name}, map from 0 to 1, one image at a time",
            ours=f"{ours[name]}()",
            theirs=partial(each_single_step, name),
            mine=partial(mine[name], net(), IMAGES, TARGETS, MAPS),
        )
        for name in ("ad", "iic", "add")
    ]
    return [
        Case(
            metric="Deletion, dauc",
            ours="deletion_auc(steps=25, cells=True)",
            theirs=partial(multi_step, "dauc", sure, IMAGES, TARGETS, COARSE, old_numpy=False),
            mine=partial(metrics.deletion_auc, net(), IMAGES, TARGETS, COARSE, **given),
            verdict="peer is wrong",
            reason="It fails with NumPy 2.4, which has no `trapz`. In all rows below it is given one.",
            error="'trapz'",
        ),
        Case(
            metric="dauc, a sum of 25 equal pixels",
            ours='deletion_auc(steps=25, score="logit")',
            theirs=partial(multi_step, "dauc", five_by_five, ramp * 0 + 0.04, FIRST, ramp),
            mine=partial(metrics.deletion_auc, five_by_five, ramp * 0 + 0.04, FIRST, ramp, **one),
            truth=[0.5],
        ),
        Case(
            metric="dc, a sum, the map is the image",
            ours='deletion_correlation(steps=25, score="logit")',
            theirs=partial(multi_step, "dc", five_by_five, falling, FIRST, falling),
            mine=partial(metrics.deletion_correlation, five_by_five, falling, FIRST, falling, **one),
            truth=[1.0],
        ),
        *curves,
        Case(
            metric="iauc, its default: starts from a blurred image",
            ours='insertion_auc(steps=25, cells=True, fill="blur")',
            theirs=insertion,
            mine=lambda: metrics.insertion_auc(single, images, TARGETS, COARSE.float(), fill="blur", **given),
            verdict="differs",
            reason="Its blur is a box that runs into black at the border; ours is a Gaussian (the paper, 1806.07421, "
            "has one) of the same width. Proof: given our blurred images it gives our score.",
            proof=is_mine(lambda: insertion(substitutes=substitute(images, "blur"))),
        ),
        Case(
            metric="dauc, map of 21 x 21",
            ours="deletion_auc(steps=221, cells=True)",
            theirs=lambda: multi_step("dauc", sure, IMAGES[:1], TARGETS[:1], drawn(1, 1, 21, 21, seed=8)),
            mine=lambda: metrics.deletion_auc(
                net(), IMAGES[:1], TARGETS[:1], drawn(1, 1, 21, 21, seed=8), steps=221, cells=True
            ),
            verdict="peer is wrong",
            reason="It fails: its last chunk of 2 takes cell 442 of 441.",
            error="out of range",
        ),
        *masks,
        Case(
            metric="ad, three maps of different strength, mean",
            ours="AverageDrop()",
            theirs=lambda: single_step("ad", sure, IMAGES, TARGETS, uneven),
            mine=lambda: metrics.average_drop(net(), IMAGES, TARGETS, uneven).mean()[None],
            verdict="peer is wrong",
            reason="Maps are scaled from 0 to 1 over the whole batch: the score of a map depends on what is scored "
            "beside it. Proof: the mean of the same images one at a time is ours.",
            proof=is_mine(lambda: each_single_step("ad", uneven).mean()[None]),
        ),
        Case(
            metric="ad, coarse map, one image at a time",
            ours="average_drop()",
            theirs=lambda: each_single_step("ad", COARSE),
            mine=lambda: metrics.average_drop(net(), IMAGES, TARGETS, COARSE),
            verdict="differs",
            reason="It scales the map from 0 to 1 and then enlarges it with cubic interpolation, which leaves that "
            "range: pixels get brighter or change their sign. We scale what was enlarged linearly. Proof: the drop of "
            "that mask, written out, gives the peer's score.",
            proof=is_theirs(lambda: drop(F.interpolate(COARSE, (SIDE, SIDE), mode="bicubic", align_corners=False))),
        ),
        Case(
            metric="ad, flat map of 0.2",
            ours="average_drop()",
            theirs=lambda: single_step("ad", sure, IMAGES[:1], TARGETS[:1], flat),
            mine=lambda: metrics.average_drop(net(), IMAGES[:1], TARGETS[:1], flat),
            verdict="peer is wrong",
            reason="A flat map is not scaled at all: its score depends on its value. Ours is undefined. Proof: "
            "the drop of a fifth of the image gives the peer's score.",
            proof=is_theirs(lambda: drop(flat, IMAGES[:1], TARGETS[:1])),
        ),
    ]


# ------------------------------------------------------------------------------------------------- measure and write

CASES: dict[str, Callable[[], list[Case]]] = {
    "captum": captum_cases,
    "torchcam": torchcam_cases,
    "grad-cam": grad_cam_cases,
    "quantus": quantus_cases,
    "saliency-maps-metrics": saliency_maps_metrics_cases,
}


def measure(peer: str, case: Case) -> dict[str, Any]:
    """The row of the JSON file; "unexplained" if a check fails, ours against the truth among them."""
    tolerance = TOLERANCE[peer]
    mine = case.mine().detach().double().reshape(-1)
    row: dict[str, Any] = {"metric": case.metric, "ours": case.ours, "our_values": numbers(mine)}
    truth = None if case.truth is None else torch.tensor(case.truth, dtype=torch.double)
    if truth is not None:
        row["truth"] = numbers(truth)
    wrong = truth is not None and not distance(mine, truth) <= tolerance
    verdict: str = "unexplained"
    try:
        theirs = case.theirs().detach().double().reshape(-1)
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        if case.error and case.error in row["error"] and not wrong:
            verdict = case.verdict
    else:
        difference = distance(theirs, mine)
        row |= {"their_values": numbers(theirs), "difference": difference if isfinite(difference) else None}
        if difference <= tolerance and not wrong:
            verdict = "equal"
        elif case.proof is not None and not wrong:
            left = case.proof(theirs, mine)
            row["left"] = left if isfinite(left) else None
            verdict = case.verdict if left <= tolerance else verdict
    row["verdict"] = verdict
    if verdict not in ("equal", "unexplained"):
        row["reason"] = case.reason
    return row


def numbers(values: Tensor) -> list[float | None]:
    """With 9 digits; None where undefined."""
    return [float(f"{value:.9g}") if isfinite(value) else None for value in values.tolist()]


def main() -> None:
    warnings.simplefilter("ignore")  # the peers' divisions by zero are what is looked at
    torch.manual_seed(0)
    np.random.seed(0)
    found: dict[str, Any] = {
        "script": "benchmarks/peer_metrics.py",
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {name: version(name) for name in ("torch", "numpy")},
        "peers": {},
    }
    for peer, cases in CASES.items():
        installed = find_spec(PEERS[peer]) is not None
        found["versions"][peer] = version(peer) if installed else None
        found["peers"][peer] = [measure(peer, case) for case in cases()] if installed else []
        for row in found["peers"][peer]:
            if row["verdict"] == "unexplained":
                print(peer, json.dumps(row, indent=1))
        print(f"{peer}: {len(found['peers'][peer])} rows", flush=True)
    RESULTS.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
    PAGE.write_text(page(found))


def page(found: dict[str, Any]) -> str:
    def shown(values: list[float | None]) -> str:
        texts = ["NaN" if value is None else f"{value:.4g}" for value in values[:3]]
        return ", ".join(texts) + ", ..." * (len(values) > 3)

    def size(row: dict[str, Any]) -> str:
        return "-" if row.get("difference") is None else f"{row['difference']:.2g}"

    def line(row: dict[str, Any]) -> str:
        theirs = "fails" if "error" in row else shown(row["their_values"])
        why = "equal" if row["verdict"] == "equal" else f"**{row['verdict']}**"
        if "truth" in row:
            why += f" (by hand: {shown(row['truth'])})"
        why += f": {row['reason']}" if "reason" in row else ""
        cells = (row["metric"], f"`{row['ours']}`", theirs, shown(row["our_values"]), size(row), why)
        return "| " + " | ".join(cells) + " |"

    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items() if number)
    verdicts = [row["verdict"] for rows in found["peers"].values() for row in rows]
    counts = {name: verdicts.count(name) for name in ("equal", "differs", "peer is wrong", "unexplained")}
    tables: list[str] = []
    for peer, rows in found["peers"].items():
        if not rows:
            tables.append(f"## {peer}\n\nNot installed when this page was written; its rows are left out.")
            continue
        head = ["| metric | ours | peer's value | our value | largest difference | what and why |", "|---" * 6 + "|"]
        tables.append(f"## {peer} {found['versions'][peer]}\n\n" + "\n".join([*head, *map(line, rows)]))
    return f"""# The same scores from other libraries

Written by `python benchmarks/peer_metrics.py` on {found["date"]}, not by hand; {versions}.
Every number is in `benchmarks/results/peer_metrics.json`.

Each row scores the same maps with a metric of another library and with ours, and gives both values, one per image (the
first three). Up to 1e-5 (1e-4 where the peer computes in float32) the two are *equal*. *differs*: both can be defended.
*peer is wrong*: it fails, contradicts itself, or gives something else than its paper says. Both stand there only if the
script has *proven* the reason: the peer's formula, written out, gives the peer's value, or the peer without the cause
gives ours. "by hand": what the score must be, worked out on paper; ours was checked against it. NaN: undefined.

Rows: {counts["equal"]} equal, {counts["differs"]} where the two differ, {counts["peer is wrong"]} where the peer is
wrong, {counts["unexplained"]} unexplained.

Inputs: a small net with random weights (two convolutions, a linear layer, {CLASSES} classes), random images of
{SIDE} x {SIDE} pixels, the predicted classes and random maps, all seeded; sums of pixels where the score can be worked
out. "Our noise", "our squares": the peer is handed the random numbers that ours draws.

{(chr(10) * 2).join(tables)}
"""


if __name__ == "__main__":
    main()
