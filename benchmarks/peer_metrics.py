"""The same scores of maps from sightline, captum, torch-cam, pytorch-grad-cam, Quantus and saliency-maps-metrics.

    python benchmarks/peer_metrics.py    writes docs/peers/scores*.md and benchmarks/results/peer_metrics.json

A difference is explained only with a proof: the peer's formula, written out here in a few lines, gives the peer's
score, or the peer contradicts itself. Peers that are not installed are left out.
"""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import replace
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from itertools import product
from math import inf, isfinite, log
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from compare import VERDICTS, Case, both, compare, differ, distance, files, is_ours, is_theirs, save, table, written
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2.functional import gaussian_blur

from sightline import metrics
from sightline.maps import normalize
from sightline.testing import ConstantModel, LinearModel

RESULTS, REASONS = files("peer_metrics")
MODULES = {"grad-cam": "pytorch_grad_cam", "saliency-maps-metrics": "saliency_maps_metrics"}
TOLERANCE = {"captum": 1e-5, "torchcam": 1e-5, "grad-cam": 1e-4, "quantus": 1e-4, "saliency-maps-metrics": 1e-5}
"""1e-4 for peers that compute in float32."""
SIDE, CLASSES, PERCENTAGES = 20, 5, range(10, 100, 10)
Inputs = tuple[nn.Module, Tensor, Tensor]
"""A model, images and a class for each."""


# ---------------------------------------------------------------------------------------------------------- inputs


@cache
def net(channels: int = 3, dtype: torch.dtype = torch.double) -> nn.Module:
    """A small network whose probabilities vary."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        convolutions = nn.Conv2d(channels, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3, stride=2), nn.ReLU()
        model = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(8 * 9**2, CLASSES))
    model.get_submodule("5").get_parameter("weight").data *= 4
    return model.to(dtype).eval().requires_grad_(False)


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def summing(*shape: int) -> nn.Module:
    """The sum of all pixels, for both of two classes."""
    return LinearModel(torch.ones(2, *shape).double()).eval()


def of_target(scores: Tensor, targets: Tensor) -> Tensor:
    return scores.gather(1, targets.reshape(-1, 1))[:, 0]


IMAGES = normal(3, 3, SIDE, SIDE)
TARGETS = net()(IMAGES).argmax(1)
DOUBLE, SINGLE = (net(), IMAGES, TARGETS), (net(dtype=torch.float), IMAGES.float(), TARGETS)
SURE = (nn.Sequential(net(), nn.Softmax(1)), IMAGES, TARGETS)
MIXED = (net(), IMAGES, torch.stack([net()(IMAGES).argmin(1), TARGETS])[torch.tensor([0, 1, 0]), torch.arange(3)])
"""With the least likely, the likeliest and the least likely class."""
SIGNED = normal(3, 1, SIDE, SIDE, seed=2)
MAPS = normalize(SIGNED[:, 0])[:, None]
COARSE = normalize(normal(3, 5, 5, seed=3))[:, None]
GRAY_IMAGES = normal(16, 1, SIDE, SIDE, seed=4).float()
GRAY = (net(1, torch.float), GRAY_IMAGES, net(1, torch.float)(GRAY_IMAGES).argmax(1))
GRAY_MAPS = torch.rand(16, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(5))
FLAT = torch.zeros(1, 1, SIDE, SIDE).double()
FLAT_AND_NOT = torch.cat([FLAT, MAPS[:1]])
"""Quantus refuses batches of zeros only."""
MASKS = torch.zeros(3, 1, SIDE, SIDE, dtype=torch.bool)
MASKS[:, :, 2:10, 4:14] = True
FIRST = torch.tensor([0])
softmax = nn.Softmax(1)


def rows(inputs: Inputs, *others: Tensor, at: slice) -> tuple[Any, ...]:
    """Some of the images, with their classes and whatever else there is one of per image."""
    return inputs[0], *(values[at] for values in (*inputs[1:], *others))


def one_by_one(score: Callable[..., Tensor], inputs: Inputs, *others: Tensor) -> Tensor:
    parts = [rows(inputs, *others, at=slice(i, i + 1)) for i in range(len(inputs[1]))]
    return torch.cat([score(part[:3], *part[3:]).reshape(-1) for part in parts])


def gradient_maps(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    """Input x gradient, summed over the colors."""
    with torch.enable_grad():
        leaf = images.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(of_target(model(leaf), targets).sum(), leaf)
    return (leaf.detach() * gradient).sum(1, keepdim=True)


@cache
def squares() -> Tensor:
    """The squares that our infidelity removes, read off an image of ones."""
    image, model, seen = torch.ones(1, 1, SIDE, SIDE), summing(1, SIDE, SIDE).float(), list[Tensor]()
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    metrics.infidelity(model, image, FIRST, image)
    removed = torch.cat(seen) == 0
    return removed[removed.any((1, 2, 3))]


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
    """The noise of our ROAD, read off a wholly removed image of zeros."""
    image = torch.zeros(1, channels, SIDE, SIDE)
    return 0.01 * metrics.inpaint(image, torch.ones(1, 1, SIDE, SIDE, dtype=torch.bool), noise=1.0)[0]


deletion_curve = metrics.PerturbationMetric(lambda deletion: deletion[:, 1:])
road_curve = metrics.PerturbationMetric(lambda morf: morf)


def drop(mask: Tensor, inputs: Inputs = DOUBLE, relative: bool = True) -> Tensor:
    """How far the probability falls when the images are multiplied with the mask."""
    model, images, targets = inputs
    before, after = (of_target(model(x.double()).softmax(1), targets) for x in (images, mask * images))
    return (before - after).clamp(min=0) / (before if relative else 1)


def before() -> Tensor:
    return of_target(net()(IMAGES).softmax(1), TARGETS)


# ---------------------------------------------------------------------------------------------------------- captum


def captum_infidelity(maps: Tensor, images: Tensor = IMAGES, *, decorated: bool = False, **options: Any) -> Tensor:
    """With our squares; captum multiplies its perturbation, here 1 in the square, with the attribution."""
    captum = import_module("captum.metrics")

    def remove(inputs: Tensor) -> Any:
        mask = squares().repeat(len(inputs) // len(squares()), 3, 1, 1)
        perturbed = inputs.masked_fill(mask, 0.0)
        return perturbed if decorated else (mask.to(inputs), perturbed)

    perturb = captum.infidelity_perturb_func_decorator(True)(remove) if decorated else remove
    options |= {"target": TARGETS, "n_perturb_samples": len(squares())}
    return captum.infidelity(net(), perturb, images, maps.expand_as(images) / 3, **options)


def infidelity_without_black_pixels() -> Tensor:
    """What captum's decorator computes: a removed pixel that was 0 already does not count."""
    images = IMAGES.clamp(min=0)
    perturbed = torch.stack([of_target(net()(images.masked_fill(square, 0.0)), TARGETS) for square in squares()], 1)
    drops = of_target(net()(images), TARGETS)[:, None] - perturbed
    map_sums = torch.einsum("bchw,rhw->br", (images != 0) * SIGNED / 3, squares()[:, 0].double())
    return (map_sums - drops).square().mean(1)


def captum_sensitivity(explain: Any = gradient_maps, *, our_noise: bool = True) -> Tensor:
    def attribute(images: Any, target: Tensor) -> tuple[Tensor]:
        return (explain(net(), images[0] if isinstance(images, tuple) else images, target),)

    def disturb(images: Tensor) -> Tensor:
        return images + small_noise().double().repeat(3, 1, 1, 1)

    options: dict[str, Any] = {"perturb_func": disturb} if our_noise else {}
    return import_module("captum.metrics").sensitivity_max(attribute, IMAGES, target=TARGETS, **options)


def redder(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    """A map that is 0 for the images and not 0 for images with noise."""
    return (images[:, :1] - IMAGES[:, 0].amax()).relu()


def redder_norm() -> Tensor:
    norms = [redder(net(), IMAGES + noise, TARGETS).flatten(1).norm(dim=1) for noise in small_noise()]
    return torch.stack(norms).amax(0)


def captum_cases() -> list[Case]:
    ours, logit = partial(metrics.infidelity, *DOUBLE), {"score": "logit"}
    of_dark = partial(metrics.infidelity, net(), IMAGES.clamp(min=0), TARGETS, SIGNED)
    sensitivity, their_noise = partial(metrics.max_sensitivity, *DOUBLE), partial(captum_sensitivity, our_noise=False)
    theirs, plain, zeros = partial(captum_infidelity, normalize=True), {"normalize": False, **logit}, 0 * SIGNED
    decorated = partial(captum_infidelity, SIGNED, IMAGES.clamp(min=0), decorated=True)
    name, dark = "infidelity(normalize=True)", "infidelity with its decorator, our squares, images with black pixels"
    return [
        Case("infidelity, our squares", partial(captum_infidelity, SIGNED), partial(ours, SIGNED, **plain)),
        Case(f"{name}, our squares", partial(theirs, SIGNED), partial(ours, SIGNED, **logit)),
        Case(f"{name}, map of zeros", partial(theirs, zeros), partial(ours, zeros, **logit)),
        Case(dark, decorated, partial(of_dark, **plain)).differs(
            "black pixels left out", is_theirs(infidelity_without_black_pixels)
        ),
        Case("sensitivity_max, our noise", captum_sensitivity, partial(sensitivity, gradient_maps)),
        Case("sensitivity_max", their_noise, partial(sensitivity, gradient_maps)).differs(
            "global generator", both(differ(their_noise), is_ours(captum_sensitivity))
        ),
        Case(
            "sensitivity_max, our noise, maps of zeros that the noise changes",
            partial(captum_sensitivity, redder),
            partial(sensitivity, redder),
        ).differs("divided by 1", is_theirs(redder_norm)),
    ]


# --------------------------------------------------------------------------------------------------------- torchcam


class Extractor:
    """Stands in for an extractor of torch-cam and returns a map that exists already."""

    def __init__(self, model: nn.Module, maps: Tensor) -> None:
        self.model, self.maps = model, maps

    def __call__(self, *_: Any, **__: Any) -> list[Tensor]:
        return [self.maps[:, 0]]

    def fuse_cams(self, cams: list[Tensor]) -> Tensor:
        return cams[0]

    def _hooks_off(self) -> AbstractContextManager[None]:
        return nullcontext()


def torchcam(
    name: str, inputs: Inputs, maps: Tensor | None, logits_fn: Any = None, *, batch: int = 1, **options: Any
) -> Tensor:
    """One mean per batch, by default of one image; without maps, of torch-cam's own Grad-CAM."""
    peer, means = import_module("torchcam.metrics"), list[float]()
    for at in (slice(start, start + batch) for start in range(0, len(inputs[1]), batch)):
        model, images, targets = rows(inputs, at=at)
        with grad_cam() if maps is None else nullcontext(Extractor(model, maps[at])) as extractor:
            metric = getattr(peer, torchcam_class(name))(extractor, logits_fn, **options)
            metric.update(images, targets.tolist())
            means.append(metric.summary()[name])
    return torch.tensor(means, dtype=torch.double)


def torchcam_class(name: str) -> str:
    return "DeletionInsertionMetric" if "auc" in name else "ClassificationMetric"


def torchcam_case(name: str, text: str, ours: Any, inputs: Inputs, maps: Tensor, truth: Any = None, **ask: Any) -> Case:
    """For the probability or, where `score` is "logit", for the logit."""
    options = {key: value for key, value in ask.items() if key != "score"}
    theirs = partial(torchcam, name, inputs, maps, None if "score" in ask else softmax, **options)
    return Case(f"{torchcam_class(name)}, {name}, {text}", theirs, partial(ours, *inputs, maps, **ask), truth=truth)


def grad_cam() -> Any:
    return import_module("torchcam.methods").GradCAM(deepcopy(net()).requires_grad_(True), "2")


def raw_grad_cam() -> Tensor:
    """For the probability, because torch-cam's metric passes the output of `logits_fn` to the extractor."""
    with grad_cam() as extractor:
        return extractor(TARGETS.tolist(), softmax(extractor.model(IMAGES)), normalized=False)[0].detach()[:, None]


def mean_of_deletion_auc(maps: Tensor, **options: Any) -> Tensor:
    metric = metrics.DeletionAUC(**options)
    metric.update(*DOUBLE, maps)
    return metric.compute()[None]


def enlarged(maps: Tensor, mode: str = "bilinear") -> Tensor:
    return F.interpolate(maps, (SIDE, SIDE), mode=mode, align_corners=False)


def in_rows(maps: Tensor) -> Tensor:
    """A map without ties: the same order, and tied pixels row by row from the top."""
    order = maps.flatten(1).argsort(dim=1, descending=True, stable=True)
    return -order.argsort(dim=1).double().reshape(maps.shape)


def torchcam_cases() -> list[Case]:
    square, one = torch.tensor([[[[0.4, 0.3], [0.2, 0.1]]], [[[1.0, 0.0], [0.0, 0.0]]]]).double().split(1)
    five = torch.tensor([[[[0.3, 0.25, 0.2, 0.15, 0.1]]]]).double()
    negative, second = torch.tensor([[[[2.0, -3.0]]], [[[0.0, 1.0]]]]).double().split(1)
    upper, with_nan = torch.zeros(1, 1, SIDE, SIDE).double(), MAPS.clone()
    upper[..., : SIDE // 2, :], with_nan[1, 0, 3, 3] = 2 / SIDE**2, torch.nan
    of_square, of_five = (summing(1, 2, 2), square, FIRST), (summing(1, 1, 5), five, FIRST)
    of_upper, of_negative = (summing(1, SIDE, SIDE), upper, FIRST), (summing(1, 1, 2), negative, FIRST)
    cases: list[Case] = []
    for name, by_hand, by_hand_of_five in (("deletion_auc", 0.4, 0.41), ("insertion_auc", 0.6, 0.59)):
        ours = getattr(metrics, name)
        row, ordered = partial(torchcam_case, name), partial(ours, *DOUBLE, in_rows(enlarged(COARSE)), steps=7)
        cases += [
            row("a sum, 2 steps", ours, of_square, square, [by_hand], score="logit", steps=2),
            row("a sum of 5 pixels, 3 steps", ours, of_five, five, [by_hand_of_five], score="logit", steps=3),
            row("softmax, 7 steps", ours, DOUBLE, MAPS, steps=7),
            row("softmax, 7 steps, map of 5 x 5", ours, DOUBLE, COARSE, steps=7).differs(
                "ties in rows", is_theirs(ordered)
            ),
        ]
    drops, logit, deletion_auc = metrics.average_drop, {"score": "logit"}, metrics.deletion_auc
    return [
        *cases,
        Case(
            "DeletionInsertionMetric, mean where one map of three has a NaN",
            partial(torchcam, "deletion_auc", DOUBLE, with_nan, softmax, batch=3, steps=8),
            partial(mean_of_deletion_auc, with_nan, steps=8),
            "DeletionAUC(steps=8)",
        ),
        torchcam_case(
            "deletion_auc", "a sum over the upper half, flat map", deletion_auc, of_upper, FLAT, **logit, steps=20
        ).differs("ties from the top", is_theirs(partial(deletion_auc, *of_upper, in_rows(FLAT), **logit, steps=20))),
        torchcam_case("avg_drop", "a sum, one pixel", drops, of_square, one, [0.6], **logit),
        torchcam_case("avg_drop", "softmax, map from 0 to 1", drops, DOUBLE, MAPS),
        torchcam_case(
            "conf_increase",
            "softmax, map from 0 to 1, likely and unlikely classes",
            metrics.increase_in_confidence,
            MIXED,
            MAPS,
        ),
        Case(
            "ClassificationMetric, avg_drop of its own Grad-CAM",
            partial(torchcam, "avg_drop", DOUBLE, None, softmax),
            partial(drops, *DOUBLE, raw_grad_cam()),
        ).differs(
            "scaled before enlarging", is_theirs(lambda: drop(enlarged(normalize(raw_grad_cam()[:, 0])[:, None])))
        ),
        torchcam_case(
            "avg_drop", "without its `logits_fn`, the score falls from -1 to -3", drops, of_negative, second, **logit
        ).wrong("negative logit", is_theirs(lambda: torch.tensor([-2.0]))),
    ]


# --------------------------------------------------------------------------------------------------------- grad-cam


def grad_cam_score(name: str, maps: Tensor, inputs: Inputs = SINGLE, *, our_noise: bool = False) -> Tensor:
    peer = import_module(f"pytorch_grad_cam.metrics.{'road' if 'ROAD' in name else 'cam_mult_image'}")
    target = import_module("pytorch_grad_cam.utils.model_targets").ClassifierOutputSoftmaxTarget
    imputer = import_module("pytorch_grad_cam.metrics.road").NoisyLinearImputer
    plain, noise = imputer.__call__, painting_noise(3)

    def paint(self: Any, image: Tensor, preserved: Tensor) -> Tensor:
        self.noise = 0.0
        return plain(self, image, preserved) + noise * (preserved == 0)

    arrays = inputs[1].float(), maps[:, 0].float().numpy()
    with mock.patch.object(imputer, "__call__", paint if our_noise else plain):
        return torch.as_tensor(getattr(peer, name)()(*arrays, [*map(target, inputs[2].tolist())], SINGLE[0])).double()


def pixels_left(maps: Tensor) -> Tensor:
    """How many pixels grad-cam leaves of the first image where it should leave 10, 20, ..., 90 % of 400."""
    removal = import_module("pytorch_grad_cam.metrics.perturbation_confidence").RemoveMostRelevantFirst
    return torch.stack([removal(percent, lambda _, left: left.sum())(IMAGES[0], maps[0, 0]) for percent in PERCENTAGES])


def grad_cam_cases() -> list[Case]:
    morf, lerf, combined = "ROADMostRelevantFirstAverage", "ROADLeastRelevantFirstAverage", "ROADCombined"
    ours, noisy = partial(metrics.road, *SINGLE, MAPS.float()), partial(grad_cam_score, our_noise=True)
    rectified = (MAPS - MAPS.flatten(1).quantile(0.6, dim=1)[:, None, None, None]).clamp(min=0)
    names = "CamMultImageConfidenceChange", "IncreaseInConfidence", "DropInConfidence"
    change, increase, theirs = (partial(grad_cam_score, name) for name in names)

    def our_change() -> Tensor:
        gain, loss = metrics.average_gain(*DOUBLE, MAPS), metrics.average_drop(*DOUBLE, MAPS)
        return gain * (1 - before()) - loss * before()

    def road(name: str, text: str, metric: Any, maps: Tensor) -> Case:
        label = f"{metric.__name__}(), less the score of the whole image"
        ours = lambda: metric(*SINGLE, maps.float()) - before()  # noqa: E731
        return Case(f"{name}, our noise{text}", partial(noisy, name, maps), ours, label)

    average_drop, change_label = metrics.average_drop, "average_gain() * (1 - score) - average_drop() * score"
    likely_or_not, our_increase = ", likely and unlikely classes", partial(metrics.increase_in_confidence, *MIXED, MAPS)
    return [
        Case(f"{names[0]}, map from 0 to 1", partial(change, MAPS), our_change, change_label),
        Case(f"{names[1]}, map from 0 to 1{likely_or_not}", partial(increase, MAPS, MIXED), our_increase),
        Case(f"{names[2]}, map from 0 to 1", partial(theirs, MAPS), partial(average_drop, *DOUBLE, MAPS)).wrong(
            "drop not divided", lambda theirs, ours: distance(theirs / before(), ours)
        ),
        Case(
            f"{names[2]}, map from 0 to 0.5", partial(theirs, MAPS / 2), partial(average_drop, *DOUBLE, MAPS / 2)
        ).differs("map used as it is", is_theirs(lambda: drop(MAPS / 2, relative=False))),
        road(morf, "", metrics.road_morf, MAPS),
        road(lerf, "", metrics.road_lerf, MAPS),
        Case(f"{combined}, our noise", partial(noisy, combined, MAPS), ours),
        Case(combined, partial(grad_cam_score, combined, MAPS), ours).differs(
            "global generator",
            both(differ(partial(grad_cam_score, combined, MAPS)), is_ours(partial(noisy, combined, MAPS))),
        ),
        road(morf, ", map with 60 % of zeros", metrics.road_morf, rectified).wrong(
            "all tied pixels removed",
            lambda *_: distance(pixels_left(rectified), torch.tensor([0] * 5 + [240, 280, 320, 360])),
        ),
    ]


# ---------------------------------------------------------------------------------------------------------- quantus


def numpy_with_trapz(score: Any) -> Any:
    """The score, computed while NumPy has the function that it lost in version 2.4."""
    return mock.patch.object(np, "trapz", np.trapezoid, create=True)(score)


def quantus(
    name: str, inputs: Any, maps: Tensor, masks: Tensor | None = None, call: Any = None, **options: Any
) -> Tensor:
    model, *batches = *inputs, maps, masks
    arrays = [None if values is None else values.numpy().copy() for values in batches]
    named = dict(zip(("x_batch", "y_batch", "a_batch", "s_batch"), arrays, strict=True))
    metric = getattr(import_module("quantus"), name)(disable_warnings=True, display_progressbar=False, **options)
    scores = metric(model=model, **named, channel_first=True, **call or {})
    return torch.as_tensor(np.asarray([*scores.values()] if isinstance(scores, dict) else scores, dtype=float))


def located(name: str, maps: Tensor, masks: Tensor | None = None, **options: Any) -> Tensor:
    """A score that needs no model."""
    images = IMAGES.repeat(2, 1, 1, 1)[: len(maps)]
    return quantus(name, (None, images, torch.zeros(len(images), dtype=torch.long)), maps, masks, **options)


def quantus_explain(model: nn.Module, inputs: Any, targets: Any, **_: Any) -> Any:
    return gradient_maps(model, torch.as_tensor(inputs).float(), torch.as_tensor(targets)).numpy()


def explained(name: str, inputs: Inputs = SINGLE, **options: Any) -> Tensor:
    """A score that explains perturbed images or models again."""
    return quantus(name, inputs, gradient_maps(*inputs), call={"explain_func": quantus_explain}, **options)


def sums(maps: Tensor, masks: Tensor | float = 1.0) -> Tensor:
    return (maps * masks).sum((1, 2, 3))


def localization_cases() -> list[Case]:
    corners, none = torch.zeros(2, 1, SIDE, SIDE, dtype=torch.bool), torch.zeros_like(MASKS)
    corners[0, :, :10, :10] = corners[1, :, 10:, 10:] = True
    absolute, balanced = SIGNED.abs(), SIGNED - SIGNED.mean((2, 3), keepdim=True) + 0.01
    planted, whole = torch.where(MASKS, 1.0, 0.1) + 1e-3 * MAPS, torch.ones_like(MASKS[:1])
    planted[1] = 2 - planted[1]  # in the second image everything but the evidence
    two_values = torch.cat([MAPS[:1], MAPS[:2].round()])
    highest = FLAT_AND_NOT == FLAT_AND_NOT.amax((2, 3), keepdim=True)
    inside, of_three = "AttributionLocalisation", ", a map without ties, one of two values, a full mask"
    weighted = partial(located, inside, weighted=True)

    def row(name: str, ours: Any, text: str, maps: Tensor, masks: Tensor, truth: Any = None, **options: Any) -> Case:
        theirs = partial(located, name, maps, masks, **options)
        return Case(f"{name}{text}", theirs, partial(ours, maps, masks), truth=truth)

    points = partial(row, "PointingGame", metrics.pointing_game)
    mass = partial(row, "RelevanceMassAccuracy", metrics.energy_in_mask)
    ranks = partial(row, "RelevanceRankAccuracy", metrics.relevance_rank)
    their_ranks, energy = partial(located, "RelevanceRankAccuracy", FLAT_AND_NOT), metrics.energy_in_mask
    quarters, ratio = ", a map of zeros and another, masks of a quarter", sums(absolute, MASKS) / sums(absolute)
    chance = [0.25, float(corners[1].flatten()[MAPS[0].argmax()])]
    label = "energy_in_mask(maps.abs(), masks)"
    full_and_empty, one_empty = torch.cat([MASKS[:1], whole, none[:1]]), torch.cat([MASKS[:1], none[:1]])
    return [
        points(", planted maps", planted, MASKS, [1, 0, 1]),
        points(quarters, FLAT_AND_NOT, corners, chance).wrong(
            "any of the highest pixels", is_theirs(lambda: (highest & corners).any(3).any(2))
        ),
        points(", empty masks", MAPS, none).wrong("NaN as bool", is_theirs(lambda: torch.full((3,), torch.nan).bool())),
        mass(", positive maps", MAPS, MASKS),
        mass(", signed maps", balanced, MASKS).wrong(
            "negative values summed",
            both(
                is_theirs(lambda: sums(balanced, MASKS) / sums(balanced)),
                lambda theirs, _: inf if ((theirs >= 0) & (theirs <= 1)).all() else 0.0,
            ),
        ),
        mass(", a map of zeros, an empty mask", FLAT_AND_NOT, one_empty),
        Case(inside, partial(located, inside, SIGNED, MASKS), partial(energy, absolute, MASKS), label),
        row(inside, energy, "(positive_attributions=True)", SIGNED, MASKS, positive_attributions=True).wrong(
            "absolute values first",
            both(
                is_theirs(lambda: ratio),
                is_ours(partial(located, inside, SIGNED, MASKS, positive_attributions=True, abs=False)),
            ),
        ),
        Case(
            f"{inside}(weighted=True)",
            partial(weighted, SIGNED, MASKS),
            lambda: energy(absolute, MASKS) / MASKS.double().mean((1, 2, 3)),
            f"{label} / the mask's fraction of the image",
        ).wrong(
            "area of the batch",
            both(
                is_theirs(lambda: ratio * MASKS.sum((1, 2, 3)) / 1200),
                lambda theirs, _: distance(theirs / 4, weighted(torch.cat([SIGNED] * 2), torch.cat([MASKS] * 2))[:3]),
            ),
        ),
        ranks(", maps without ties", SIGNED, MASKS),
        ranks(", planted maps, full and empty masks", planted, full_and_empty, [1, 1, torch.nan]),
        ranks(quarters, FLAT_AND_NOT, corners).wrong(
            "ties by the sort",
            both(
                differ(lambda: their_ranks(corners)[:1], lambda: their_ranks(corners.flip(0))[:1]),
                lambda theirs, ours: distance(theirs[1:], ours[1:]),
                lambda _, ours: distance(ours[:1], torch.tensor([0.25])),
            ),
        ),
        row("TopKIntersection", metrics.relevance_rank, ", k the size of the mask", SIGNED, MASKS, k=80),
        row("AUC", metrics.mask_auc, of_three, two_values, torch.cat([MASKS[:2], whole])),
    ]


def complexity_cases() -> list[Case]:
    faint = MAPS * torch.tensor([1.0, 1e-6, 1e-8])[:, None, None, None]
    one_pixel = F.one_hot(torch.tensor(7), SIDE**2).reshape(1, 1, SIDE, SIDE).double()
    flat_and_one = torch.cat([FLAT + 1, one_pixel])

    def index(text: str, maps: Tensor, our_maps: Tensor | None = None, label: str = "") -> Case:
        ours = partial(metrics.gini, maps if our_maps is None else our_maps)
        return Case(f"Sparseness{text}", partial(located, "Sparseness", maps), ours, label)

    def entropy(text: str, maps: Tensor, our_maps: Tensor, argument: str = "", truth: Any = None) -> Case:
        ours, label = lambda: metrics.entropy(our_maps) * log(SIDE**2), f"entropy({argument}) * log(h * w)"
        return Case(f"Complexity{text}", partial(located, "Complexity", maps), ours, label, truth)

    return [
        index("", SIGNED, SIGNED.abs(), "gini(maps.abs())"),
        index(", signed maps", SIGNED).differs("absolute values", is_theirs(lambda: metrics.gini(SIGNED.abs()))),
        index(", the same kind of map at scales of 1, 1e-6 and 1e-8", faint).wrong(
            "scale of the batch",
            both(
                is_theirs(lambda: metrics.gini(faint / faint.max() + 1e-7)),
                is_ours(lambda: torch.cat([located("Sparseness", faint[i : i + 1]) for i in range(3)])),
            ),
        ),
        index(", a map of zeros and another", FLAT_AND_NOT).differs(
            "1e-7 added", is_theirs(lambda: metrics.gini(FLAT_AND_NOT + 1e-7))
        ),
        entropy("", SIGNED, SIGNED.abs(), "maps.abs()"),
        entropy(", a flat map and one pixel", flat_and_one, flat_and_one, truth=[log(SIDE**2), 0]),
        entropy(", signed maps", SIGNED, SIGNED).differs(
            "absolute values in Complexity", is_theirs(lambda: metrics.entropy(SIGNED.abs()) * log(SIDE**2))
        ),
    ]


def flipping_cases() -> list[Case]:
    three = rows(GRAY, GRAY_MAPS, at=slice(3))
    inputs, maps = three[:3], three[3]
    constant = (ConstantModel(torch.zeros(2)).eval(), *rows(GRAY, GRAY_MAPS, at=slice(1))[1:])
    label = "curve of deletion_auc(steps=20), without its first point"
    flip = partial(quantus, "PixelFlipping", call={"softmax": True}, features_in_step=SIDE)
    black = partial(flip, perturb_baseline=0.0)
    area, curve = partial(black, return_auc_per_sample=True), partial(deletion_curve, *three, steps=20)
    always = partial(numpy_with_trapz(area), constant[:3], constant[3])
    our_area = partial(metrics.deletion_auc, *three, steps=20)

    def filled_with_minimum() -> Tensor:
        parts = [rows(GRAY, GRAY_MAPS, at=slice(i, i + 1)) for i in range(3)]
        return torch.cat([deletion_curve(*part, steps=20, fill=part[1].min().item()) for part in parts])

    return [
        Case("PixelFlipping, curve, one color", partial(black, inputs, maps), curve, label),
        Case(
            "PixelFlipping, curve, three colors, every third point",
            lambda: black(SINGLE, MAPS.float())[:, 2::3],
            partial(deletion_curve, *SINGLE, MAPS.float(), steps=20),
            label,
        ),
        Case(
            'PixelFlipping(perturb_baseline="black"), its default, curve', partial(flip, inputs, maps), curve, label
        ).differs("smallest value as black", is_theirs(filled_with_minimum)),
        Case("PixelFlipping(return_auc_per_sample=True)", partial(area, inputs, maps), our_area).wrong(
            "no trapz", "'trapz'"
        ),
        Case("the same, given a `trapz`", partial(numpy_with_trapz(area), inputs, maps), our_area).wrong(
            "curve without its start", is_theirs(lambda: torch.trapezoid(curve(), dx=1))
        ),
        Case(
            "the same, model that always says 0.5",
            always,
            partial(metrics.deletion_auc, *constant, steps=20),
            truth=[0.5],
        ).wrong(
            "area depends on the step",
            lambda theirs, _: distance(torch.cat([theirs, always(features_in_step=40)]), torch.tensor([9.5, 4.5])),
        ),
    ]


def quantus_road(inputs: Inputs, maps: Tensor, *, batch: int = 64) -> Tensor:
    """Accuracy at 10, 20, ..., 90 %, with our noise."""
    impute = import_module("quantus.functions.perturb_func").noisy_linear_imputation
    noise = painting_noise(1).numpy().reshape(1, -1)

    def paint(arr: Any, indices: Any, **_: Any) -> Any:
        painted = impute(arr=arr, indices=indices, noise=0.0)
        painted.reshape(1, -1)[:, indices] += noise[:, indices]
        return painted

    return quantus("ROAD", inputs, maps, call={"batch_size": batch}, percentages=[*PERCENTAGES], perturb_func=paint)


def road_accuracy(inputs: Inputs, maps: Tensor) -> Tensor:
    return road_curve(*inputs, maps, score=lambda logits, targets: (logits.argmax(1) == targets).float()).mean(0)


def patches(*, stacked: bool) -> Tensor:
    """Mean of (sum of map x removed pixels - drop)^2 over 25 patches of 4 x 4, each on top of the earlier ones or not.

    In one color, as the peer uses the map once per color.
    """
    model, images, errors = GRAY[0], GRAY_IMAGES[:3], list[Tensor]()
    perturbed = images
    for top, left in product(range(0, SIDE, 4), repeat=2):
        perturbed = (perturbed if stacked else images).clone()
        perturbed[:, :, top : top + 4, left : left + 4] = 0
        drops = of_target(model(images), TARGETS) - of_target(model(perturbed), TARGETS)
        errors.append((sums(GRAY_MAPS[:3], images - perturbed) - drops).square())
    return torch.stack(errors).mean(0)


def remove_alone(arr: Any, indices: Any, **_: Any) -> Any:
    """A perturbation for Quantus' Infidelity that restores the earlier patches."""
    perturbed = GRAY_IMAGES[:3].reshape(3, -1).numpy().copy()
    perturbed[np.arange(3)[:, None], indices] = 0
    return perturbed


def faithfulness_cases() -> list[Case]:
    weights = normal(1, 1, SIDE, SIDE, seed=7).float().expand(3, -1, -1, -1)
    gray, maps = (GRAY[0], GRAY_IMAGES[:3], TARGETS), GRAY_MAPS[:3]
    linear = (LinearModel(weights[:2]).eval(), gray[1], torch.zeros(3, dtype=torch.long))
    products, integers = gray[1] * weights, torch.arange(4.0).reshape(1, 1, 2, 2)
    whole_numbers = (summing(1, 2, 2).float(), integers, FIRST)
    infidelity = partial(quantus, "Infidelity", perturb_baseline=0.0)
    complete = partial(quantus, "Completeness", perturb_baseline=0.0)
    exact, label = {"normalize": False, "score": "logit"}, 'infidelity(normalize=False, score="logit") of map x image'

    def is_complete(inputs: Inputs, maps: Tensor) -> Callable[[], Tensor]:
        return lambda: (metrics.completeness(*inputs, maps) < 1e-5).double()

    return [
        *flipping_cases(),
        Case(
            "ROAD, accuracy at 10 to 90 %, one color, our noise",
            partial(quantus_road, GRAY, GRAY_MAPS),
            partial(road_accuracy, GRAY, GRAY_MAPS),
            "accuracy at each step of road_morf()",
        ),
        Case(
            "the same, `batch_size=4` for 16 images",
            partial(quantus_road, GRAY, GRAY_MAPS, batch=4),
            partial(road_accuracy, GRAY, GRAY_MAPS),
            "accuracy at each step of road_morf()",
        ).wrong("first batch only", is_theirs(lambda: road_accuracy(rows(GRAY, at=slice(4)), GRAY_MAPS[:4]))),
        Case(
            "ROAD, three colors",
            partial(quantus, "ROAD", SINGLE, MAPS.float(), percentages=[50]),
            partial(metrics.road_morf, *DOUBLE, MAPS),
        ).wrong("colors as pixels", "out of bounds"),
        Case(
            "Infidelity, exact map of a linear model",
            partial(infidelity, linear, weights),
            partial(metrics.infidelity, *linear, products, **exact),
            label,
            truth=[0, 0, 0],
        ),
        Case(
            "Infidelity",
            partial(infidelity, gray, maps),
            partial(metrics.infidelity, *gray, maps * gray[1], **exact),
            label,
        ).wrong(
            "stacked patches",
            both(
                is_theirs(lambda: patches(stacked=True)),
                is_theirs(partial(infidelity, gray, maps, n_perturb_samples=1)),
                lambda *_: distance(infidelity(gray, maps, perturb_func=remove_alone), patches(stacked=False)),
            ),
        ),
        Case(
            "Completeness, exact map of a linear model, 1 = complete",
            partial(complete, whole_numbers, integers),
            is_complete(whole_numbers, integers),
            "completeness() < 1e-5",
            truth=[1],
        ).wrong(
            "map divided by its largest value", is_ours(partial(complete, whole_numbers, integers, normalise=False))
        ),
        Case(
            "Completeness(normalise=False), the same for products that are rounded, 1 = complete",
            partial(complete, linear, products, normalise=False),
            is_complete(linear, products),
            "completeness() < 1e-5",
            truth=[1, 1, 1],
        ).wrong("sums compared by ==", lambda *_: (sums(products) / linear[0](gray[1])[:, 0] - 1).abs().max().item()),
    ]


def quantus_sensitivity(*, our_noise: bool = True) -> Tensor:
    noise = iter(small_noise().numpy())
    ours: dict[str, Any] = {"perturb_func": lambda arr, indices, **_: arr + next(noise).reshape(1, -1)}
    options = {"nr_samples": len(small_noise()), "lower_bound": 0.02}
    return explained("MaxSensitivity", **options, **ours if our_noise else {})


def reinitialized() -> Tensor:
    """Rank correlations after each layer, last to first, is initialized again, always with the same seed."""
    model, maps, correlations = deepcopy(SINGLE[0]), gradient_maps(*SINGLE).abs(), list[Tensor]()
    with torch.random.fork_rng():
        for layer in [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)][::-1]:
            torch.manual_seed(43)
            layer.reset_parameters()
            correlations.append(metrics.rank_correlation(maps, gradient_maps(model, *SINGLE[1:]).abs()))
    return torch.stack(correlations, 1)


def twins(*_: Tensor) -> float:
    """How far two layers of one shape are apart after Quantus has initialized both again."""
    wrapper = import_module("quantus.helpers.model.pytorch_model").PyTorchModel
    with torch.random.fork_rng():
        layers = wrapper(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))).get_random_layer_generator()
        model = list(layers)[-1][1]
    return distance(model[0].weight, model[1].weight)


def sanity_cases() -> list[Case]:
    model: Any = deepcopy(SINGLE[0])
    model[5].weight, model[5].bias = (nn.Parameter(p[:2], False) for p in model[5].parameters())
    two_classes = (model, IMAGES.float(), torch.tensor([0, 1, 0]))
    logit, our_logit = partial(explained, "RandomLogit", two_classes, num_classes=2, abs=True), metrics.random_logit
    ranked = partial(logit, similarity_func=import_module("quantus.functions.similarity_func").correlation_spearman)
    mprt, their_noise = partial(explained, "MPRT", abs=True), partial(quantus_sensitivity, our_noise=False)
    our_logit = partial(metrics.random_logit, *two_classes, gradient_maps)
    sensitivity = partial(metrics.max_sensitivity, *SINGLE, gradient_maps)
    return [
        Case("MaxSensitivity, our noise", quantus_sensitivity, sensitivity),
        Case("MaxSensitivity(lower_bound=0.02, nr_samples=10)", their_noise, sensitivity).differs(
            "NumPy's generator", both(differ(their_noise), is_ours(quantus_sensitivity))
        ),
        Case("RandomLogit(similarity_func=correlation_spearman, abs=True), two classes", ranked, our_logit),
        Case("RandomLogit(abs=True), two classes", logit, our_logit).differs("structural similarity", is_ours(ranked)),
        Case(
            "MPRT(abs=True, return_last_correlation=True)",
            partial(mprt, return_last_correlation=True),
            partial(metrics.parameter_randomization, *SINGLE, gradient_maps),
        ).differs("one seed for all layers", both(is_theirs(lambda: reinitialized()[:, -1]), twins)),
        Case(
            "MPRT(abs=True, return_average_correlation=True)",
            partial(mprt, return_average_correlation=True),
            lambda: torch.as_tensor(metrics.randomization_curve(*SINGLE, gradient_maps)[1]).mean(1),
            "mean of randomization_curve()",
        ).wrong("unchanged model counted", is_theirs(lambda: F.pad(reinitialized(), (1, 0), value=1.0).mean(1))),
    ]


# -------------------------------------------------------------------------------------------- saliency-maps-metrics


def multi_step(name: str, inputs: Inputs, maps: Tensor, *fills: Tensor, method: str = "black") -> Tensor:
    """dauc, dc, iauc or ic; one image at a time, because it gives means."""
    peer = import_module("saliency_maps_metrics.multi_step_metrics")
    metric = (peer.Deletion if name.startswith("d") else peer.Insertion)(data_replace_method=method)

    def score(part: Inputs, maps: Tensor, fill: Tensor | None = None) -> Tensor:
        return torch.as_tensor(metric(part[0], part[1], maps, part[2], fill)[name])

    return one_by_one(score, inputs, maps, *fills)


def single_step(name: str, inputs: Inputs, maps: Tensor) -> Tensor:
    """ad, iic or add: a mean over the images."""
    peer = import_module("saliency_maps_metrics.single_step_metrics")
    metric = peer.ADD() if name == "add" else peer.IIC_AD()
    return torch.tensor([float(metric(inputs[0], inputs[1], maps, inputs[2])[name])])


def saliency_maps_metrics_cases() -> list[Case]:
    ramp = torch.arange(25.0).reshape(1, 1, 5, 5).double()
    falling = (24 - ramp) / 300  # a sum of 1
    equal_pixels, falling_pixels = ((summing(1, 5, 5), image, FIRST) for image in (ramp * 0 + 0.04, falling))
    uneven = MAPS * torch.tensor([1.0, 0.3, 0.1])[:, None, None, None]
    flat, large = FLAT + 0.2, normal(1, 1, 21, 21, seed=8)
    scored = numpy_with_trapz(multi_step)
    dropped, average_drop = partial(one_by_one, partial(single_step, "ad"), SURE), metrics.average_drop
    single = nn.Sequential(SINGLE[0], nn.Softmax(1)), *SINGLE[1:]  # its blur is in float32
    insertion = partial(scored, "iauc", single, COARSE.float(), method="blur")
    first, of_cells = partial(rows, at=slice(1)), {"steps": 25, "cells": True}
    curves = {"dauc": "deletion_auc", "iauc": "insertion_auc"}
    curves |= {"dc": "deletion_correlation", "ic": "insertion_correlation"}
    masks = {"ad": "average_drop", "iic": "increase_in_confidence", "add": "add"}

    def one(name: str, text: str, inputs: Inputs, maps: Tensor, truth: float) -> Case:
        ours = partial(getattr(metrics, curves[name]), *inputs, maps, steps=25, score="logit")
        return Case(f"{name}, {text}", partial(scored, name, inputs, maps), ours, truth=[truth])

    def curve(name: str, theirs: Any) -> Case:
        ours = partial(getattr(metrics, curves[name]), *DOUBLE, COARSE, **of_cells)
        return Case(f"{name}, 25 cells", partial(theirs, name, SURE, COARSE), ours)

    def mask(name: str) -> Case:
        theirs, ours = partial(one_by_one, partial(single_step, name), SURE), getattr(metrics, masks[name])
        title = f"{name}, map from 0 to 1, one image at a time"
        return Case(title, partial(theirs, MAPS), partial(ours, *DOUBLE, MAPS))

    return [
        replace(curve("dauc", multi_step), name="Deletion, dauc").wrong("no trapz in NumPy", "'trapz'"),
        one("dauc", "a sum of 25 equal pixels", equal_pixels, ramp, 0.5),
        one("dc", "a sum, the map is the image", falling_pixels, falling, 1.0),
        *(curve(name, scored) for name in curves),
        Case(
            "iauc, its default: starts from a blurred image",
            insertion,
            partial(metrics.insertion_auc, *SINGLE, COARSE.float(), **of_cells, fill="blur"),
        ).differs("box blur", is_ours(lambda: insertion(gaussian_blur(SINGLE[1], [9, 9], [9 / 4, 9 / 4])))),
        Case(
            "dauc, map of 21 x 21",
            partial(scored, "dauc", first(SURE), large),
            partial(metrics.deletion_auc, *first(DOUBLE, large), steps=221, cells=True),
        ).wrong("past the last cell", "out of range"),
        *map(mask, masks),
        Case(
            "ad, three maps of different strength, mean",
            partial(single_step, "ad", SURE, uneven),
            lambda: average_drop(*DOUBLE, uneven).mean()[None],
            "AverageDrop()",
        ).wrong("scaled over the batch", is_ours(lambda: dropped(uneven).mean()[None])),
        Case(
            "ad, coarse map, one image at a time", partial(dropped, COARSE), partial(average_drop, *DOUBLE, COARSE)
        ).differs("cubic enlargement", is_theirs(lambda: drop(enlarged(COARSE, "bicubic")))),
        Case(
            "ad, flat map of 0.2",
            partial(single_step, "ad", first(SURE), flat),
            partial(average_drop, *first(DOUBLE, flat)),
        ).wrong("flat map not scaled", is_theirs(lambda: drop(flat, first(DOUBLE)))),
    ]


# ------------------------------------------------------------------------------------------------- measure and write

CASES: dict[str, Callable[[], list[Case]]] = {
    "captum": captum_cases,
    "torchcam": torchcam_cases,
    "grad-cam": grad_cam_cases,
    "quantus": lambda: [*localization_cases(), *complexity_cases(), *faithfulness_cases(), *sanity_cases()],
    "saliency-maps-metrics": saliency_maps_metrics_cases,
}


def measure(peer: str, case: Case) -> dict[str, Any]:
    """The row of the JSON file."""
    row, theirs, ours = compare(case, tolerance=TOLERANCE[peer])
    truth = None if case.truth is None else torch.tensor(case.truth)
    tensors = {"our_values": ours, "their_values": theirs, "truth": truth}
    values = {name: digits(tensor) for name, tensor in tensors.items() if tensor is not None}
    return {"metric": case.name, "ours": case.label, **values, **row}


def digits(values: Tensor) -> list[float | None]:
    """With 9 digits; None where undefined."""
    return [float(f"{value:.9g}") if isfinite(value) else None for value in values.double().flatten().tolist()]


def main() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    peers: dict[str, list[dict[str, Any]]] = {}
    for peer, cases in CASES.items():
        installed = find_spec(MODULES.get(peer, peer)) is not None
        peers[peer] = [measure(peer, case) for case in cases()] if installed else []
        print(f"{peer}: {len(peers[peer])} rows", flush=True)
        for row in peers[peer]:
            if row["verdict"] == "unexplained":
                print(json.dumps(row, indent=1))
    save("peer_metrics", pages, ("torch", "numpy", *CASES), peers=peers)


def shown(values: list[float | None]) -> str:
    texts = ["NaN" if value is None else f"{value:.4g}" for value in values[:3]]
    return ", ".join(texts) + ", ..." * (len(values) > 3)


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    verdict = "equal" if row["verdict"] == "equal" else f"**{row['verdict']}**"
    verdict += f" (by hand: {shown(row['truth'])})" if "truth" in row else ""
    verdict += f": {REASONS[row['reason']]}" if "reason" in row else ""
    theirs = "fails" if "error" in row else shown(row["their_values"])
    difference = "-" if row.get("difference") is None else f"{row['difference']:.2g}"
    return row["metric"], f"`{row['ours']}`", theirs, shown(row["our_values"]), difference, verdict


def pages(results: dict[str, Any]) -> dict[Path, str]:
    head = ("metric", "ours", "peer's value", "our value", "largest difference", "what and why")
    bodies = {
        peer: table(head, *map(cells, rows)) if rows else "Not installed when this page was written."
        for peer, rows in results["peers"].items()
    }
    verdicts = {peer: [row["verdict"] for row in rows] for peer, rows in results["peers"].items()}
    counts = {peer: {verdict: each.count(verdict) for verdict in VERDICTS} for peer, each in verdicts.items()}
    return written("peer_metrics", results, counts, bodies, side=SIDE, classes=CLASSES)


if __name__ == "__main__":
    main()
