"""Which of BR-NPA's vectors carry the class? Table 5 of the slides, for a network of your own.

The script trains and freezes a network with three representative vectors; a network that is already trained is not
trained again. It then fits linear classifiers to all three vectors, to two of them and to one. The paper's figures, for
birds at 448 pixels, are printed next to ours; they too come from linear classifiers on frozen features.

    python examples/vectors.py --out runs/resolution

Source: Gomez et al. 2021 (2106.02566), BR-NPA, and the slides on it, Table 5.
Differs: the classifier is a logistic regression (L2, C = 1) on standardized vectors, fitted to its optimum.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

import sightline as sl
from sightline import bench, data
from sightline.inference import forward

PAPER: dict[tuple[int, ...], float] = {(1, 2, 3): 79.5, (1, 2): 79.1, (2, 3): 77.9, (1,): 77.3, (2,): 73.2, (3,): 56.8}


def vectors(model: nn.Module, images: data.ImageSet) -> tuple[np.ndarray, np.ndarray]:
    """The vectors (n, k, c) of all images and their classes (n,)."""
    block = next(module for module in model.modules() if isinstance(module, sl.attention.RepresentativeVectors))
    features: list[Tensor] = []
    labels: list[Tensor] = []
    handle = block.register_forward_hook(
        lambda layer, inputs, output: features.append(output.unflatten(1, (layer.k, -1)))
    )
    for batch in data.batches(images, 250):
        forward(model, data.normalize(batch.images, images.preprocess))
        labels.append(batch.labels)
    handle.remove()
    return torch.cat(features).numpy(), torch.cat(labels).numpy()


def main(arguments: list[str] | None = None) -> dict[tuple[int, ...], list[float]]:
    """Train, freeze, fit and print; return each seed's accuracy for every choice of vectors."""
    parser = argparse.ArgumentParser(description="Accuracy of linear classifiers on some of BR-NPA's vectors.")
    parser.add_argument("--study", default="recipes/bench_resolution.yaml", help="study that has the row")
    parser.add_argument("--row", default="BR-NPA 20x20", help="a row with three representative vectors")
    parser.add_argument("--out", type=Path, default=Path("runs/resolution"), help="folder of the study's runs")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (1)")
    options = parser.parse_args(arguments)

    study = bench.load_study(options.study)
    done = bench.bench(study, options.out, [options.row], options.jobs)
    if done.failed:
        raise SystemExit("; ".join(f"{run}: {reason}" for run, reason in done.failed.items()))
    sets = data.load(study.recipe.data)
    accuracies: dict[tuple[int, ...], list[float]] = {}
    for seed in study.recipe.seeds:
        model = sl.load(bench.folder(options.out, options.row, seed))
        (train, train_labels), (test, test_labels) = vectors(model, sets["train"]), vectors(model, sets["test"])
        for used in PAPER:
            at = [number - 1 for number in used]
            classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
            classifier.fit(train[:, at].reshape(len(train), -1), train_labels)
            right = classifier.predict(test[:, at].reshape(len(test), -1)) == test_labels
            accuracies.setdefault(used, []).append(float(right.mean()))
    print("| vectors | accuracy, % | paper, birds |\n| --- | --- | --- |")
    for used, values in accuracies.items():
        print(f"| {used} | {bench.summary(values).text(1, percent=True)} | {PAPER[used]} |".replace(",)", ")"))
    return accuracies


if __name__ == "__main__":
    main()
