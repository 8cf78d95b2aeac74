"""Costs of a network: parameters, multiplications, time, and memory kept for the backward pass."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from jaxtyping import Float
from scipy.stats import binom
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sightline.attention import ATTENTION, insert
from sightline.facts import Progress
from sightline.inference import copy_of, untouched
from sightline.models.create import create_model, input_of


@dataclass(frozen=True, kw_only=True)
class Costs:
    """One network, for one batch."""

    parameters: int
    macs: int
    """Multiply-accumulate operations of convolutions and matrix products, per image."""
    seconds: float
    """Median time of a forward pass in eval mode."""
    ratio: tuple[float, float, float]
    """Its time / the first network's time in the same round: median over the rounds, and the limits of its 95 %
    interval from order statistics, which are infinite for fewer than six rounds."""
    saved: int
    """Bytes of distinct tensors that a training forward keeps for its backward pass, without the parameters."""


def costs(
    models: Mapping[str, nn.Module],
    images: Float[Tensor, "b c h w"],
    rounds: int = 9,
    progress: Progress | None = None,
) -> dict[str, Costs]:
    """Costs of networks side by side: their forward passes are interleaved, so a busy machine slows all alike.

    Every other round runs in reverse order. The models, on the device of the images, are left unchanged.

    >>> cost = costs({"one": nn.Conv2d(3, 4, 1)}, torch.zeros(2, 3, 5, 5), rounds=1)["one"]
    >>> cost.parameters, cost.macs
    (16, 300)
    """
    times: dict[str, list[float]] = {name: [] for name in models}
    report = progress or (lambda what, done, total: None)
    for turn in range(rounds + 1):
        for name, model in [*models.items()][:: -1 if turn % 2 else 1]:
            with untouched(model), torch.inference_mode():
                start = time.perf_counter()
                model(images)
                if images.is_cuda:
                    torch.cuda.synchronize(images.device)
                if turn:  # the first one is a warm-up
                    times[name].append(time.perf_counter() - start)
        report("timing", turn + 1, rounds + 1)
    first = next(iter(times.values()), [])
    by_name: dict[str, Costs] = {}
    for name, model in models.items():
        by_name[name] = Costs(
            parameters=sum(p.numel() for p in model.parameters()),
            macs=_macs(model, images[:1]),
            seconds=median(times[name]),
            ratio=_median_interval([seconds / other for seconds, other in zip(times[name], first, strict=True)]),
            saved=_saved(model, images),
        )
        report("counting", len(by_name), len(models))
    return by_name


def block_costs(
    name: str, rounds: int = 9, progress: Progress | None = None
) -> tuple[tuple[int, int], dict[str, Costs], dict[str, str]]:
    """What each attention block costs in a network by name, each at its paper's places.

    Returns:
        Height and width of the images, costs by block, first of the network without ("none"), and the reason for each
        block that cannot be inserted.

    Raises:
        ValueError: there is no such network.
    """
    plain = create_model(name)
    size = input_of(plain)[0]
    compared, left_out = {"none": plain}, dict[str, str]()
    for block in ATTENTION:
        options: dict[str, Any] = {"project": 64} if block == "bilinear" else {}
        try:
            compared[block] = insert(plain, block, init="fresh", **options)
        except ValueError as error:
            left_out[block] = str(error)
    return size, costs(compared, torch.randn(2, 3, *size), rounds, progress), left_out


def _median_interval(values: list[float]) -> tuple[float, float, float]:
    """Median, and the two order statistics that enclose it with probability 95 % or more."""
    ordered = [-math.inf, *sorted(values), math.inf]
    place = int(binom.ppf(0.025, len(values), 0.5))  # this many values or fewer lie below the median
    return median(values), ordered[place], ordered[-1 - place]


def _macs(model: nn.Module, image: Tensor) -> int:
    with untouched(model), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    return counter.get_total_flops() // 2


def _saved(model: nn.Module, images: Tensor) -> int:
    model = copy_of(model).train()  # a training forward changes the statistics of BatchNorm
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.random.fork_rng(devices=[images.device] if images.is_cuda else []), torch.enable_grad():
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            result = model(images)
        del result
    return sum(sizes.values())
