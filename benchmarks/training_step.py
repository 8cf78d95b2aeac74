"""Time of our training loop against a bare PyTorch loop and against a public loop, with the same network.

Our loop runs an epoch over batches in memory: order, batch, normalization, forward, backward, optimizer, and the end of
the epoch. The bare loop has normalized images in the same memory layout, and the same optimizer.

The public loop is that of a popular PyTorch implementation of "Learn To Pay Attention", rewritten: torchvision's
transforms, one image at a time (without its worker processes), the default memory layout, precision and optimizer, and
every ten steps another forward pass in eval mode for the accuracy of the batch. It is compared with our loop in 32 bits
and in bfloat16.

The script also compares the arithmetic per second of our loop with that of one large matrix product of the same type on
the same device. On a GPU everything runs at full width with batches of 256, and the arithmetic with a compiled network.
"""

import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import Ratio, pairs, save, seconds
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

from sightline import data, models
from sightline.data.sets import Pixels
from sightline.recipe import Augment, Data, Optim, Recipe
from sightline.training import Training
from sightline.training.losses import Loss

ON_GPU = torch.cuda.is_available()
SIZE, BATCH, STEPS = 32, 256 if ON_GPU else 16, 10
SGD = {"lr": 0.01, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
NETWORKS: dict[str, dict[str, Any]] = {
    "vgg_att3": {"name": "vgg_att3", "width": 1.0 if ON_GPU else 0.25},
    "resnet18 + cbam": {"name": "resnet18", "attention": "cbam"},
}
DTYPES = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16}


class Resident:
    """A store that holds its images in memory."""

    def __init__(self, images: np.ndarray) -> None:
        self.images = images

    def read(self, rows: np.ndarray) -> Pixels:
        return Pixels(self.images[rows], None, None)


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return models.create_model(num_classes=10, **NETWORKS[name])


def some_batches(images: data.ImageSet) -> data.ImageSet:
    """The images of a few batches, in memory."""
    batch = images.batch(range(STEPS * BATCH))
    return data.ImageSet(
        name="resident",
        split="train",
        classes=images.classes,
        preprocess=images.preprocess,
        labels=batch.labels.numpy(),
        names=batch.names,
        store=Resident(batch.images.numpy()),
    )


def our_epoch(
    name: str, images: data.ImageSet, augment: Augment, **options: Any
) -> tuple[partial[object], torch.device]:
    """An epoch of our loop with these options of `Optim`, and its device."""
    optim = Optim(
        epochs=1000, batch_size=BATCH, optimizer="sgd", schedule="constant", lr=0.01, weight_decay=5e-4, **options
    )
    recipe = Recipe(augment=augment, optim=optim)
    training = Training(network(name), images, None, recipe, Loss(recipe.optim))
    return partial(next, training.epochs(lambda: None)), training.fabric.device


def bare_epoch(name: str, images: data.ImageSet, device: torch.device) -> partial[object]:
    """The same number of steps, all on the same images."""
    bare = network(name).to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(bare.parameters(), **SGD, fused=True)
    batch = images.batch(range(BATCH)).to(device)
    inputs = data.normalize(batch.images, images.preprocess).to(memory_format=torch.channels_last)

    def steps() -> None:
        for _ in range(STEPS):
            F.cross_entropy(bare(inputs), batch.labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return partial(steps)


def public_epoch(name: str, images: data.ImageSet, device: torch.device) -> partial[object]:
    """The public loop over the same images."""
    transform = transforms.Compose(
        [
            transforms.RandomCrop(SIZE, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(images.preprocess.mean, images.preprocess.std),
        ]
    )
    pictures = [transforms.functional.to_pil_image(image) for image in images.batch(range(len(images))).images]
    examples = [(picture, int(label)) for picture, label in zip(pictures, images.labels, strict=True)]

    def collate(examples: list[tuple[Any, int]]) -> tuple[Tensor, Tensor]:
        inputs, labels = zip(*((transform(picture), label) for picture, label in examples), strict=True)
        return torch.stack(inputs), torch.tensor(labels)

    loader: Any = torch.utils.data.DataLoader(examples, BATCH, shuffle=True, collate_fn=collate)  # pyright: ignore[reportArgumentType]
    model = network(name).to(device)
    optimizer = torch.optim.SGD(model.parameters(), **SGD)

    def epoch() -> None:
        for number, (inputs, labels) in enumerate(loader):
            model.train()
            model.zero_grad()
            optimizer.zero_grad()
            inputs, labels = inputs.to(device), labels.to(device)
            F.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
            if number % 10 == 0:
                model.eval()
                (model(inputs).argmax(1) == labels).float().mean().item()

    return partial(epoch)


def arithmetic(name: str, device: torch.device) -> float:
    """Floating-point operations of a training step, per image."""
    model = network(name).to(device)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(2, 3, SIZE, SIZE, device=device)).sum().backward()
    return counter.get_total_flops() / 2


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large matrix product."""
    n = 8192 if ON_GPU else 2048
    a, b = torch.randn(2, n, n, device=device).to(dtype)

    def multiply() -> None:
        a @ b
        if ON_GPU:
            torch.cuda.synchronize()

    multiply()
    return 2 * n**3 / float(np.median([seconds(multiply) for _ in range(9)]))


def arithmetic_rate(name: str, images: data.ImageSet, precision: str) -> dict[str, Any]:
    """Images and operations per second of our loop, and its share of the rate of a matrix product."""
    ours, device = our_epoch(name, images, Augment(crop=4, flip=True), precision=precision, compile=ON_GPU)
    for _ in range(2):
        ours()
    rate = STEPS * BATCH / float(np.median([seconds(ours) for _ in range(9)]))
    flops, best = rate * arithmetic(name, device), product_rate(device, DTYPES[precision])
    return {
        "images per second": rate,
        "TFLOP/s": flops / 1e12,
        "TFLOP/s of a product": best / 1e12,
        "share": flops / best,
    }


def _exhaust(batches: Iterable[data.Batch]) -> None:
    """Iterate over all batches, and wait for the device."""
    for batch in batches:
        last = batch
    last.labels.sum().item()


def loader_rate(images: data.ImageSet) -> float:
    """Images per second in the second pass, with the augmentation of the CIFAR recipes."""
    images, augment = images.to("cuda") if ON_GPU else images, Augment(crop=4, flip=True)
    for epoch in range(2):
        order = (0, epoch)
        batches = data.batches(images, BATCH, shuffle=order, augment=(augment, *order), drop_last=True)
        time = seconds(partial(_exhaust, batches))
    return len(images) / time


def show(what: str, ratio: Ratio, bar: str) -> None:
    print(f"{what:32} {ratio.median:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]  A/A {ratio.aa:.3f}  {bar}", flush=True)


def main() -> None:
    sources = {"clutter": Data(size=SIZE, train_size=4000, test_size=100)}
    if root := os.environ.get("SIGHTLINE_DATA"):
        sources["cifar10"] = Data(source=str(Path(root) / "cifar10"), train_size=10_000)
    sets = {name: data.load(source)["train"] for name, source in sources.items()}
    resident = some_batches(sets["clutter"])
    rows: list[dict[str, Any]] = []
    rate = 0.0
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU, as within `fit`
    for name in NETWORKS:
        ours, device = our_epoch(name, resident, Augment(flip=False))
        bare = bare_epoch(name, resident, device)
        ratio = pairs(ours, bare)
        rate = max(rate, STEPS * BATCH / float(np.median([seconds(bare) for _ in range(3)])))
        what = f"{name}, {NETWORKS[name]}, {SIZE} px, batch {BATCH}, {device}"
        rows.append({"what": f"{STEPS} steps, {what}: ours / bare", **ratio._asdict(), "bar": 1.03})
        show(f"{name}: ours / bare", ratio, "bar 1.03")
        if name != "vgg_att3":  # the network of the public loop
            continue
        ours, device = our_epoch(name, resident, Augment(crop=4, flip=True))
        public = public_epoch(name, resident, device)
        ratio = pairs(public, ours)
        rows.append({"what": f"{STEPS} steps, {what}: public loop / ours", **ratio._asdict(), "at least": 1.3})
        show(f"{name}: public loop / ours", ratio, "at least 1.3")
        ours, device = our_epoch(name, resident, Augment(crop=4, flip=True), precision="bf16-mixed")
        ratio = pairs(public, ours)
        rows.append({"what": f"{STEPS} steps, {what}: public loop / ours in bfloat16", **ratio._asdict()})
        show(f"{name}: public loop / ours, bf16", ratio, "")
        for precision in DTYPES:
            rates = arithmetic_rate(name, resident, precision)
            rows.append({"what": f"arithmetic of {what}, {precision}", **rates})
            print(
                f"{name}, {precision}: " + ", ".join(f"{value:.3g} {key}" for key, value in rates.items()), flush=True
            )
    for name, images_of in sets.items():
        loaded = loader_rate(images_of)
        print(f"{name:8} {loaded:8.0f} images/s loaded, {rate:.0f} consumed: {loaded / rate:.1f} times  bar 2")
        row = {"what": f"loader of {name}", "loaded per second": loaded, "consumed per second": rate}
        rows.append({**row, "times": loaded / rate, "bar": 2})
    print(save("training_step", rows))


if __name__ == "__main__":
    main()
