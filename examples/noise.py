"""Does attention help against noise? Accuracy of SE, CBAM, BAM and a control on noisy images.

The networks are those of a study, trained on clean images; a network that is already trained is not trained again. The
test images get Gaussian noise of standard deviation sigma, in units of the pixel range, and are then clipped and
rounded as in a camera. All networks see the same noise. Each accuracy is a mean over seeds with its standard deviation,
and each difference to the control has Student's 95 % interval over seeds.

    python examples/noise.py --out runs/blocks --jobs 2
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

import sightline as sl
from sightline import bench, data
from sightline.inference import forward

SIGMAS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3)
ROWS = ("control", "SE", "CBAM", "BAM")


def noisy(images: Tensor, sigma: float, seed: int) -> Tensor:
    """Add Gaussian noise to uint8 images (b, 3, h, w)."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    return (images + 255 * sigma * noise).round().clamp(0, 255).to(torch.uint8)


def accuracy(model: nn.Module, images: data.ImageSet, sigma: float) -> float:
    """Share of the images that the model classifies correctly."""
    right = 0
    for place, batch in enumerate(data.batches(images, 250)):
        inputs = data.normalize(noisy(batch.images, sigma, place), images.preprocess)
        right += int((forward(model, inputs).argmax(1) == batch.labels).sum())
    return right / len(images)


def main(arguments: list[str] | None = None) -> dict[tuple[str, float], list[float]]:
    """Train missing networks, add noise, print both tables; return the accuracy of each seed."""
    parser = argparse.ArgumentParser(description="SE, CBAM, BAM and a control on noisy images.")
    parser.add_argument("--study", default="recipes/bench_blocks.yaml", help="study with the rows " + ", ".join(ROWS))
    parser.add_argument("--out", type=Path, default=Path("runs/blocks"), help="folder of the study's runs")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (1)")
    options = parser.parse_args(arguments)

    study = bench.load_study(options.study)
    done = bench.bench(study, options.out, ROWS, options.jobs)
    if done.failed:
        raise SystemExit("; ".join(f"{run}: {reason}" for run, reason in done.failed.items()))
    images = data.load(study.recipe.data)["test"]
    accuracies: dict[tuple[str, float], list[float]] = {}
    for row in ROWS:
        for seed in study.recipe.seeds:
            model = sl.load(bench.folder(options.out, row, seed))
            for sigma in SIGMAS:
                accuracies.setdefault((row, sigma), []).append(accuracy(model, images, sigma))

    head = f"| sigma | {' | '.join(f'{sigma:g}' for sigma in SIGMAS)} |\n|{' --- |' * (len(SIGMAS) + 1)}"
    print(head)
    for row in ROWS:
        means = [bench.summary(accuracies[row, sigma]).text(1, percent=True) for sigma in SIGMAS]
        print(f"| {row} | {' | '.join(means)} |")
    print("\ndifference to the control in percentage points, 95 % interval over seeds")
    print(head)
    for row in ROWS[1:]:
        cells: list[str] = []
        for sigma in SIGMAS:
            pairs = zip(accuracies[row, sigma], accuracies["control", sigma], strict=True)
            ends = bench.student_interval(block - control for block, control in pairs)
            cells.append("-" if ends is None else f"[{100 * ends[0]:+.1f}, {100 * ends[1]:+.1f}]")
        print(f"| {row} | {' | '.join(cells)} |")
    return accuracies


if __name__ == "__main__":
    main()
