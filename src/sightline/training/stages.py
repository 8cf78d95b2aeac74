"""Networks that define their own training stages, and blocks that look at the images between epochs."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields

import torch
from torch import Tensor, nn

from sightline.attention import Prepared
from sightline.inference import untouched
from sightline.models.protopnet import ProtoPNet, Stages
from sightline.recipe import FROM_SCRATCH, Optim, Recipe
from sightline.training import processes

_REPLACED = (
    "optimizer", "lr", "momentum", "nesterov", "weight_decay", "schedule", "warmup", "step_epochs", "step_factor",
)  # fmt: skip
_IMPOSSIBLE = (
    "freeze", "backbone_lr", "fixed_statistics", "layer_decay", "label_smoothing", "class_weights", "ema", "patience",
    "teacher", "compile", "sharded",
)  # fmt: skip


def check_stages(network: nn.Module, recipe: Recipe) -> str:
    """One sentence that names the recipe fields this network's own stages ignore; empty if there are none.

    Raises:
        ValueError: the recipe has a setting that such a training does not support.
    """
    if any(isinstance(block, Prepared) for block in network.modules()):
        _check_prepared(recipe)
    if not isinstance(network, ProtoPNet):
        return ""
    name = recipe.model.name
    defaults = {f"optim.{field.name}": field.default for field in fields(Optim)} | FROM_SCRATCH
    settings = {field.name: getattr(recipe.optim, field.name) for field in fields(Optim)}
    changed = {field: value for field, value in settings.items() if value not in (defaults[f"optim.{field}"], None)}
    wrong = [f"optim.{field} {value}" for field, value in changed.items() if field in _IMPOSSIBLE]
    wrong += [f"augment.mixup {recipe.augment.mixup}"] if recipe.augment.mixup else []
    wrong += ["data.streaming true"] if recipe.data.streaming else []
    wrong += ["several processes"] if processes.started() != (1, 1) else []
    if wrong:
        raise ValueError(f"expected no {wrong[0]} with {name}, which trains in its own stages; leave it out")
    ignored = [f"optim.{field}" for field in changed if field in _REPLACED]
    return (
        f"{name} trains in its own stages, by Adam at its own rates; ignored: {', '.join(ignored)}" if ignored else ""
    )


def _check_prepared(recipe: Recipe) -> None:
    wrong = [f"optim.{field} {value}" for field in ("ema", "sharded") if (value := getattr(recipe.optim, field))]
    wrong += ["data.streaming true"] if recipe.data.streaming else []
    wrong += ["several processes"] if processes.started() != (1, 1) else []
    if wrong:
        raise ValueError(f"expected no {wrong[0]} with a block that looks at all training images; leave it out")


def prepare(
    network: nn.Module, epoch: int, epochs: int, batches: Callable[[], Iterable[tuple[Tensor, Tensor]]], seed: int
) -> None:
    """Show the training images to the blocks that want to see them before this epoch."""
    for module in network.modules():
        block = module
        if isinstance(block, Prepared) and block.is_due(epoch, epochs):
            block.prepare(_inputs_of(module, network, (images for images, _ in batches())), seed)


def _inputs_of(block: nn.Module, network: nn.Module, batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """What a block of a network gets from batches of images, in eval mode and without gradient."""
    seen: list[Tensor] = []
    hook = block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        with untouched(network), torch.no_grad():
            for images in batches:
                network(images)
                yield seen.pop()
    finally:
        hook.remove()


def staged_optimizer(network: nn.Module) -> torch.optim.Optimizer:
    """Adam, with one group of parameters for each child; `enter_epoch` sets the rates."""
    groups = [{"params": [*child.parameters()], "child": name} for name, child in network.named_children()]
    return torch.optim.Adam([group for group in groups if group["params"]])


def enter_epoch(optimizer: torch.optim.Optimizer, stages: Stages, epoch: int, step: int = 0) -> None:
    """Set the rates of an epoch and freeze the other children; before the first step of a stage, reset the moments."""
    rates = stages.rates(epoch)
    if not step and rates.keys() != stages.rates(epoch - 1).keys():
        optimizer.state.clear()
    for group in optimizer.param_groups:
        group["lr"] = rates.get(group["child"], 0.0)
        for parameter in group["params"]:
            parameter.requires_grad_(group["child"] in rates)
