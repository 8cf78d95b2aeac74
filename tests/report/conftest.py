from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from sightline import data, runs
from sightline.evaluation import Comparison, Curve, Evaluation, Example, Score, Standing
from sightline.evaluation.ranking import metric_agreement
from sightline.explainers import Verdict
from sightline.facts import Finding, Interval
from sightline.metrics.classification import Quality, quality
from sightline.recipe import Recipe

METHODS = ("attention", "activation_map", "cam", "grad_cam")
CONTROLS = ("random_map", "center_map", "edge_map", "contrast_map")
METRICS = ("deletion_auc", "insertion_auc", "pointing_game", "energy_in_mask")
CLASSES = tuple("zero one two three four five six seven eight nine".split())


def blob(side: int, center: np.ndarray, radius: float) -> np.ndarray:
    rows, columns = np.mgrid[:side, :side]
    return np.exp(-((rows - center[0]) ** 2 + (columns - center[1]) ** 2) / (2 * radius**2))


def example(index: int, side: int, rng: np.random.Generator, wrong: bool = False) -> Example:
    """A colored object on a textured ground, with maps that look at it, more or less."""
    center = rng.uniform(0.25, 0.75, 2) * side
    ground = np.kron(rng.uniform(40, 150, (8, 8, 3)), np.ones((side // 8 + 1, side // 8 + 1, 1)))[:side, :side]
    ground += rng.normal(0, 18, (side, side, 3))
    thing = blob(side, center, side / 8)
    color = rng.uniform(60, 255, 3)
    image = (ground * (1 - thing[..., None]) + color * thing[..., None]).clip(0, 255).astype(np.uint8)
    near = blob(10, center * 10 / side, 1.6)
    maps = {
        "attention": (near / near.sum()).astype(np.float32),
        "activation_map": (3 + 9 * near + rng.normal(0, 1, (10, 10))).astype(np.float32),
        "cam": (4 * near - 1 + rng.normal(0, 0.5, (10, 10))).astype(np.float32),
        "grad_cam": (1e-4 * near + rng.uniform(0, 1e-5, (10, 10))).astype(np.float32),
    }
    maps |= {control: rng.uniform(0, 1, (10, 10)).astype(np.float32) for control in CONTROLS}
    verdicts: dict[str, list[Verdict]] = {method: [] for method in METHODS}
    if index == 2:
        maps["grad_cam"] = np.zeros((10, 10), np.float32)
        verdicts["grad_cam"] = [Verdict("flat", "do not read")]
    if index == 3:
        maps["cam"][:3, :3] = np.nan
        verdicts["cam"] = [Verdict("non-finite", "do not read")]
    label = int(rng.integers(10))
    return Example(
        name=f"test/{index:05d}.png",
        image=image,
        label=CLASSES[label],
        prediction=CLASSES[(label + wrong) % 10],
        probability=float(rng.uniform(0.6, 0.9999)),
        maps=maps,
        verdicts=verdicts,
        mask=thing > 0.5,
    )


MEANS = {
    "attention": (0.31, 0.71, 0.93, 0.52),
    "activation_map": (0.36, 0.66, 0.88, 0.31),
    "cam": (0.24, 0.78, 0.97, 0.61),
    "grad_cam": (0.26, 0.77, 0.95, 0.58),
    "random_map": (0.52, 0.51, 0.08, 0.071),
    "center_map": (0.44, 0.58, 0.30, 0.12),
    "edge_map": (0.25, 0.55, 0.22, 0.10),
    "contrast_map": (0.41, 0.60, 0.25, 0.13),
}
"""By metric. Deletion: lower is better. `cam` is best everywhere but in deletion, where the edges do as well."""


def scores() -> tuple[Score, ...]:
    half = (0.02, 0.02, 0.03, 0.012)
    return tuple(
        Score(
            method=method,
            metric=metric,
            interval=Interval(value=value, low=value - half[i], high=min(value + half[i], 1), n=250),
            undefined=12 if (method, metric) == ("grad_cam", "energy_in_mask") else 0,
        )
        for method, values in MEANS.items()
        for i, (metric, value) in enumerate(zip(METRICS, values, strict=True))
    )


def comparisons() -> Iterator[Comparison]:
    """Differences of less than 0.015 are no differences."""
    for i, metric in enumerate(METRICS):
        for method, other in combinations(MEANS, 2):
            gap = MEANS[method][i] - MEANS[other][i]
            interval = Interval(value=gap, low=gap - 0.015, high=gap + 0.015, n=250)
            p = 0.2 if abs(gap) < 0.015 else 0.0001
            yield Comparison(metric=metric, method=method, other=other, difference=interval, p=p / 4, adjusted=p)


def curve(method: str, kind: str) -> Curve:
    """A power of the share that is left or, with insertion, the same turned over; good methods have high powers."""
    shares = np.linspace(0, 1, 33)
    deletion, insertion, *_ = MEANS[method]
    mean = 0.9 * ((1 - shares) ** (1 / deletion) if kind == "deletion" else 1 - (1 - shares) ** (5 * insertion))
    return Curve(shares=shares, mean=mean, low=mean - 0.02, high=mean + 0.02)


def quality_of(counts: np.ndarray) -> Quality:
    """Of a classifier with this confusion that is always sure to 90 %."""
    truth, answer = (np.repeat(of.ravel(), counts.ravel()) for of in np.indices(counts.shape))
    probabilities = np.full((len(truth), len(counts)), 0.1 / (len(counts) - 1))
    probabilities[np.arange(len(truth)), answer] = 0.9
    return quality(probabilities, truth)


def confusion(rng: np.random.Generator, classes: int) -> np.ndarray:
    counts = rng.poisson(0.1, (classes, classes))
    return (counts + np.diag(rng.integers(30, 45, classes))).astype(np.int64)


def evaluation_of(side: int, n: int = 24, errors: int = 6) -> Evaluation:
    rng = np.random.default_rng(0)
    counts = confusion(rng, 10)
    shown = tuple(example(i, side, rng) for i in range(n))
    wrong = tuple(example(100 + i, side, rng, wrong=True) for i in range(errors))
    lonely = example(900, side, rng)
    return Evaluation(
        data="clutter",
        split="test",
        model="vgg_att2",
        n_images=400,
        unit="images",
        classes=CLASSES,
        methods=METHODS + CONTROLS,
        controls=CONTROLS,
        layers={method: "features.conv13 (128 x 10 x 10)" for method in METHODS},
        metrics=METRICS,
        higher_is_better={metric: metric != "deletion_auc" for metric in METRICS},
        chance={"pointing_game": 0.068, "energy_in_mask": 0.068},
        scores=scores(),
        accuracy=Interval(value=0.9725, low=0.953, high=0.986, n=400),
        majority=0.1175,
        confusion=counts,
        per_image={
            "name": [f"test/{i:05d}.png" for i in range(250)],
            **{f"deletion_auc/{method}": [i / 250 for i in range(250)] for method in METHODS},
        },
        examples=shown,
        errors=wrong,
        mean_maps={
            method: {name: blob(10, rng.uniform(3, 6, 2), 3).astype(np.float32) for name in CLASSES}
            for method in METHODS
        },
        verdicts={method: {"flat": 3} if method == "grad_cam" else {} for method in METHODS},
        verdict_levels={"grad_cam": {"flat": {"do not read": 3}}},
        standings={
            metric: Standing(best="cam", tied=(), unbeaten=("edge_map",) if metric == "deletion_auc" else ())
            for metric in METRICS
        },
        comparisons=tuple(comparisons()),
        curves={kind: {method: curve(method, kind) for method in MEANS} for kind in ("insertion", "deletion")},
        worst={
            method: tuple(
                replace(one, maps={method: one.maps[method]}, verdicts={method: one.verdicts[method]})
                for one in (shown[i], wrong[i], lonely)
            )
            for i, method in enumerate(METHODS)
        },
        reliability=dict(zip(METRICS, (0.31, 0.62, -0.04, 0.87), strict=True)),
        metric_agreement=metric_agreement(np.array(list(MEANS.values())), [False, True, True, True]),
        method_agreement=0.9 ** np.abs(np.subtract.outer(np.arange(8), np.arange(8))) - 0.5 * (1 - np.eye(8)),
        quality=quality_of(counts),
        left_out={"rise": "312 s for 50 images, of 600 s for everything"},
        summary=(
            Finding(
                "accuracy", "The model names the right class in 97.2 % of 400 images, more than by guessing (11.8 %)."
            ),
            Finding("where it looks", "It looks at what the masks mark: 61 % of CAM lies in the masks."),
            Finding("which map", "CAM is the map to believe here.", believed=("cam",)),
            Finding("best", "CAM is best in insertion with 0.780."),
            Finding(
                "not better than a control",
                "No method deletes evidence measurably better than the edges of the image: do not read deletion here.",
            ),
        ),
        skipped=(("broken/17.jpg", "truncated after 812 bytes"), ("notes.jpg", "no image: it begins with 'Dear '")),
        provenance={
            "command": "sightline evaluate runs/demo --data clutter --out report",
            "seed": "0",
            "date": "2025-11-21 02:00 UTC",
            "wall time": "41 s",
            "hardware": "2 CPU cores",
            "versions": "sightline 0.1.0, torch 2.15.0, timm 1.0.20, Python 3.11.7",
        },
    )


@pytest.fixture(scope="session")
def evaluation() -> Evaluation:
    """24 small images, 4 methods, 4 controls, everything filled in."""
    return evaluation_of(40)


@pytest.fixture(scope="session")
def photos() -> Evaluation:
    """The same of 224 pixels, with as many errors as examples."""
    return evaluation_of(224, errors=12)


@pytest.fixture(scope="session")
def run() -> runs.Run:
    epochs = np.arange(1, 13)
    return runs.Run(
        folder=Path("runs/demo"),
        recipe=Recipe(),
        seed=0,
        classes=CLASSES,
        preprocess=data.Preprocess(size=(40, 40), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)),
        info={"command": "sightline train --data clutter", "parameters": "1,292,370", "wall time": "96 s"},
        history=[
            {
                "epoch": float(epoch),
                "lr": float(0.1 * (1 - epoch / 13)),
                "train_loss": float(2.3 * np.exp(-epoch / 4) + 0.03),
                "train_accuracy": float(1 - 0.9 * np.exp(-epoch / 3)),
                "val_loss": float(2.3 * np.exp(-epoch / 4) + 0.12 + 0.05 * np.sin(epoch)),
                "val_accuracy": float(0.97 - 0.9 * np.exp(-epoch / 3)),
                "seconds": 7.9,
            }
            for epoch in epochs
        ],
        skipped=[("train/gone.png", "zero bytes")],
    )
