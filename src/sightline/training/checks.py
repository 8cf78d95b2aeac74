"""What is refused before a training starts."""

import os
import shutil
from dataclasses import asdict
from errno import ENOSPC
from pathlib import Path

import numpy as np
import torch
from torch import nn

from sightline import data, runs
from sightline.attention import WithLoss
from sightline.data.reid import matched
from sightline.explainers.explain import find_explainer
from sightline.inference import copy_of, logits_of
from sightline.recipe import Recipe
from sightline.runs import Run
from sightline.training import processes
from sightline.training.loggers import check_logger
from sightline.training.map_loss import GRADIENT, MapLoss


def check_folder(out: Path, resume: bool) -> None:
    """A folder that can be written, and is new or empty unless a training resumes in it."""
    runs.check_writable(out)
    if not resume and out.is_dir() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty; choose a new folder, or continue with --resume (fit: resume=True)")


def check_possible(recipe: Recipe, train: data.ImageSet | data.ImageStream, others: dict[str, data.ImageSet]) -> None:
    """Settings that these images, processes and devices allow."""
    optim, side = recipe.optim, min(train.preprocess.size)
    check_logger(recipe.watch.logger)
    if recipe.watch.every and optim.sharded:
        raise ValueError("watch.every: maps need the whole network in one process; set optim.sharded to false")
    if recipe.watch.every and isinstance(train, data.ImageStream) and not others.get("val"):
        raise ValueError("watch.every: expected validation images beside a stream, got none; set it to 0")
    nodes, per_node = processes.started()
    devices = torch.cuda.device_count()
    if recipe.augment.crop >= side:
        raise ValueError(f"augment.crop: expected less than the side of the images, {side}, got {recipe.augment.crop}")
    val = others.get("val")
    if val is not None and val.cameras is not None and not matched(val, val).any():
        raise ValueError(
            f"expected a val image whose identity another camera has seen, got none of {len(val)}; add some, or set "
            "data.val to 0 if they were drawn"
        )
    if optim.patience is not None and not val:
        raise ValueError("optim.patience needs validation images; set data.val above 0")
    if optim.class_weights and isinstance(train, data.ImageStream):
        raise ValueError("optim.class_weights needs all labels in advance; set data.streaming to false")
    if optim.images_per_class is not None:
        if isinstance(train, data.ImageStream):
            raise ValueError("optim.images_per_class needs all labels in advance; set data.streaming to false")
        if optim.batch_size % (optim.images_per_class * nodes * per_node):
            raise ValueError(
                f"optim.batch_size: expected a multiple of optim.images_per_class x processes, "
                f"{optim.images_per_class} x {nodes * per_node}, got {optim.batch_size}"
            )
    if recipe.augment.rotate and len({*train.preprocess.size}) > 1:
        raise ValueError("augment.rotate: expected images as high as wide, got others; set data.size to one side")
    if min(optim.batch_size, len(train)) < nodes * per_node:
        raise ValueError(
            f"optim.batch_size: expected at least one image for each of {nodes * per_node} processes, got "
            f"{optim.batch_size}; start fewer processes"
        )
    if optim.micro_batches == 0 and nodes * per_node > 1:
        raise ValueError("optim.micro_batches: 0 (automatic) works with one process only; give a number")
    if per_node > devices > 0:
        raise ValueError(f"expected one GPU for each of {per_node} processes on a machine, got {devices}; start fewer")
    if optim.sync_batch_norm and not devices:
        raise ValueError("optim.sync_batch_norm: needs GPUs, found none; set it false")
    if optim.compile and devices and not any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc"))):
        raise ValueError("optim.compile: needs a C compiler beside the GPU, found none; install gcc or set it false")
    if optim.precision == "16-mixed" and not devices:
        raise ValueError("optim.precision: 16-mixed needs a GPU, there is none; use bf16-mixed or 32-true")


def check_forward(network: nn.Module, recipe: Recipe, size: tuple[int, int], classes: int) -> None:
    """A network that runs on batches of this size, tried on a copy before anything is written."""
    batch = min(recipe.optim.batch_size, 2)
    try:
        with torch.no_grad():
            logits = logits_of(copy_of(network).train()(torch.zeros(batch, 3, *size)))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ValueError(
            f"{recipe.model.name} cannot be trained on batches of {recipe.optim.batch_size} images of {size[1]} x "
            f"{size[0]} pixels: {' '.join(str(error).split())}; change data.size or optim.batch_size"
        ) from error
    if recipe.model.name.startswith(runs.OWN) and logits.shape != (batch, classes):
        raise ValueError(
            f"{recipe.model.name}: expected a logit for each of {classes} classes, ({batch}, {classes}), got "
            f"{tuple(logits.shape)} for {batch} images; change its last layer"
        )


def check_mixup(network: nn.Module, recipe: Recipe, size: tuple[int, int]) -> None:
    """No blended images for a block whose own loss learns from one label per image, tried on a copy."""
    if not recipe.augment.mixup:
        return
    images, labels = torch.zeros(2, 3, *size), torch.zeros(2, dtype=torch.long)
    trained = copy_of(network).train()
    logits = logits_of(trained(images))
    for block in trained.modules():
        if isinstance(block, WithLoss) and block.own_loss(logits, labels).requires_grad:  # else it is 0
            raise ValueError(
                f"augment.mixup: expected 0 with {type(block).__name__}, whose own loss takes one label per image, "
                f"got {recipe.augment.mixup}; leave it out"
            )


def check_map_loss(network: nn.Module, recipe: Recipe, train: data.ImageSet | data.ImageStream) -> None:
    """A loss on maps that these images, settings and this network allow, tried on a copy."""
    optim = recipe.optim
    if optim.map_loss is None:
        if optim.map_layer is not None:
            raise ValueError("optim.map_layer: expected a method as optim.map_loss, got none; name one")
        return
    if isinstance(train, data.ImageStream) or not (train.has_masks or train.has_boxes):
        kind = "a stream" if isinstance(train, data.ImageStream) else f"{train.name} without"
        raise ValueError(
            f"optim.map_loss: expected training images with masks or boxes, got {kind}; name their column in data.mask "
            "or data.box"
        )
    for name, is_set in (("augment.mixup", recipe.augment.mixup), ("optim.sharded", optim.sharded)):
        if is_set:
            raise ValueError(
                f"{name}: cannot be combined with optim.map_loss, whose maps are of whole images; unset it"
            )
    if own := next((type(block).__name__ for block in network.modules() if isinstance(block, WithLoss)), ""):
        raise ValueError(f"optim.map_loss: cannot be combined with {own}, which has a loss of its own; leave one out")
    try:
        explainer = find_explainer(optim.map_loss)
    except ValueError as error:
        raise ValueError(f"optim.map_loss: {error}") from None
    if explainer.many_passes or explainer.is_control:
        why = "runs the network on many changed images" if explainer.many_passes else "does not look at the network"
        raise ValueError(f"optim.map_loss: {optim.map_loss} {why}; take saliency, grad_cam or attention")
    if optim.map_loss == GRADIENT and optim.map_layer is not None:
        raise ValueError("optim.map_layer: saliency is read at the pixels; leave it out")
    batch = train.batch(np.arange(min(len(train), 2)))
    images, masks = (
        data.normalize(batch.images, train.preprocess),
        torch.zeros(len(batch.images), 1, *train.preprocess.size),
    )
    masks[..., : masks.shape[3] // 2] = 1
    try:
        loss, _ = MapLoss(optim.map_loss, optim.map_layer)(copy_of(network), images, batch.labels, masks.bool())
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"optim.map_loss: {optim.map_loss} cannot be trained: {' '.join(str(error).split())}"
        ) from error
    if not loss.requires_grad:
        raise ValueError(f"optim.map_loss: {optim.map_loss} has no gradient at the weights; take saliency or grad_cam")


def check_same(recipe: Recipe, run: Run, classes: tuple[str, ...]) -> None:
    """A recipe and classes like those that a run was started with."""
    old, new = asdict(run.recipe), asdict(recipe)
    changed = [
        f"{part}.{name} was {old[part][name]!r}, now {value!r}"
        for part in ("data", "augment", "model", "optim")
        for name, value in new[part].items()
        if value != old[part][name]
    ]
    if run.recipe.seeds != recipe.seeds:
        changed.append(f"seeds was {run.recipe.seeds}, now {recipe.seeds}")
    if changed:
        raise ValueError(f"run {run.folder} was started with another recipe: {'; '.join(changed)}; choose a new folder")
    if run.classes != classes:
        other = sorted({*run.classes} ^ {*classes}) or ["the order alone"]
        raise ValueError(
            f"run {run.folder} was started with {len(run.classes)} classes, the data now has {len(classes)}; they "
            f"differ in {', '.join(other[:3])}{', ...' * (len(other) > 3)}; choose a new folder"
        )


def check_space(folder: Path, network: nn.Module) -> None:
    """Room for three checkpoints (weights, two moments, average; two stay, a third replaces one) and the weights."""
    weights = sum(t.numel() * t.element_size() for t in network.state_dict().values())
    existing = next(path for path in folder.absolute().parents if path.exists())
    needed, free = 14 * weights, shutil.disk_usage(existing).free
    if free < needed:
        room = f"expected {needed / 2**20:.0f} MiB free for the run, got {free / 2**20:.0f} MiB"
        raise OSError(ENOSPC, f"disk too full, {room}", str(folder))


def checked_teacher(folder: str, train: data.ImageSet | data.ImageStream) -> nn.Module:
    """The trained network of a run on the same classes and equally normalized images."""
    run = runs.open_run(folder)
    if run.classes != train.classes:
        raise ValueError(
            f"optim.teacher: expected a run on the {len(train.classes)} classes of the data, got {folder} with "
            f"{len(run.classes)} others; train one on this data"
        )
    if (run.preprocess.mean, run.preprocess.std) != (train.preprocess.mean, train.preprocess.std):
        raise ValueError(
            f"optim.teacher: expected a run on equally normalized images, got {folder} with mean "
            f"{run.preprocess.mean}; train one on this data"
        )
    return runs.load_model(folder)
