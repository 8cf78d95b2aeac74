"""What a step of our training loop costs beside the same network in a bare PyTorch loop, and whether data keeps up.

Ours is a whole pass of the loop over one batch that lies in memory: batch, normalisation, forward, backward, optimiser,
bookkeeping, and what an epoch ends with. The bare step has its images already normalised, in the same memory layout.
"""

import os
from functools import partial
from pathlib import Path

import numpy as np
import torch
from measure import pairs, save, seconds
from torch.nn import functional as F

from sightline import data, models
from sightline.data.sets import Pixels
from sightline.recipe import Augment, Data, Optim, Recipe
from sightline.training import Training
from sightline.training.losses import Loss

SIZE, BATCH = 32, 128


class Resident:
    """A store whose images lie in memory."""

    def __init__(self, images: np.ndarray) -> None:
        self.images = images

    def read(self, rows: np.ndarray) -> Pixels:
        return Pixels(self.images[rows], None, None)


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return models.create_model("vgg_att3", num_classes=10, width=0.25)


def one_batch(images: data.ImageSet) -> data.ImageSet:
    """As many images as a batch has, in memory."""
    batch = images.batch(range(BATCH))
    return data.ImageSet(
        name="resident",
        split="train",
        classes=images.classes,
        preprocess=images.preprocess,
        labels=batch.labels.numpy(),
        names=batch.names,
        store=Resident(batch.images.numpy()),
    )


def loader_rate(images: data.ImageSet) -> float:
    """Images per second in the second pass, with the augmentation of the CIFAR recipes."""
    change = Augment(crop=4, flip=True)
    for epoch in range(2):
        order = (0, epoch)
        passed = data.batches(images, BATCH, shuffle=order, augment=(change, *order), drop_last=True)
        time = seconds(partial(list, passed))
    return len(images) / time


def main() -> None:
    sources = {"clutter": Data(size=SIZE, train_size=4000, test_size=100)}
    if root := os.environ.get("SIGHTLINE_DATA"):
        sources["cifar10"] = Data(source=str(Path(root) / "cifar10"), train_size=10_000)
    sets = {name: data.load(source)["train"] for name, source in sources.items()}

    recipe = Recipe(augment=Augment(flip=False), optim=Optim(epochs=1000, batch_size=BATCH, schedule="constant"))
    resident = one_batch(sets["clutter"])
    training = Training(network(), resident, None, recipe, Loss(recipe.optim))
    ours = partial(next, training.epochs(lambda: None))

    bare = network().to(training.fabric.device, memory_format=torch.channels_last)
    optimiser = torch.optim.SGD(bare.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    batch = resident.batch(range(BATCH)).to(training.fabric.device)
    images = data.normalise(batch.images, resident.preprocess).to(memory_format=torch.channels_last)

    def step() -> None:
        F.cross_entropy(bare(images), batch.labels).backward()
        optimiser.step()
        optimiser.zero_grad()
        if training.fabric.device.type == "cuda":
            torch.cuda.synchronize()

    ratio = pairs(ours, step)
    rate = BATCH / float(np.median([seconds(step) for _ in range(5)]))
    what = f"vgg_att3, width 1/4, {SIZE} px, batch {BATCH}, {training.fabric.device}"
    rows = [{"what": f"step, {what}: ours / bare", **ratio._asdict(), "bar": 1.05}]
    print(f"ours / bare {ratio.median:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]  A/A {ratio.aa:.3f}  bar 1.05")
    for name, images_of in sets.items():
        loaded = loader_rate(images_of)
        print(f"{name:8} {loaded:8.0f} images/s loaded, {rate:.0f} consumed: {loaded / rate:.1f} times  bar 2")
        row = {"what": f"loader of {name}", "loaded per second": loaded, "consumed per second": rate}
        rows.append({**row, "times": loaded / rate, "bar": 2})
    print(save("training_step", rows))


if __name__ == "__main__":
    main()
