"""The processes that train together: one, or those that torchrun or SLURM has started."""

import logging
import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from sightline.inference import copy_of, logits_of
from sightline.recipe import Optim

try:
    from lightning.fabric import Fabric
    from lightning.fabric.strategies.ddp import DDPStrategy
    from lightning.fabric.strategies.model_parallel import ModelParallelStrategy
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("training needs lightning; install it with: pip install 'sightline[train]'") from error


def started() -> tuple[int, int]:
    """Machines, and processes on each, that torchrun or SLURM has started; (1, 1) without them."""
    known = os.environ
    if "TORCHELASTIC_RUN_ID" in known:
        each = int(known["LOCAL_WORLD_SIZE"])
        return int(known["WORLD_SIZE"]) // each, each
    if "SLURM_PROCID" in known and known.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        nodes = int(known.get("SLURM_NNODES", 1))
        return nodes, int(known.get("SLURM_NTASKS", 1)) // nodes
    return 1, 1


def first() -> bool:
    """Whether this is the process that writes files and speaks; one alone is."""
    known = os.environ
    return started() == (1, 1) or int(known.get("RANK", known.get("SLURM_PROCID", 0))) == 0


def begin(optim: Optim, network: nn.Module, size: tuple[int, int]) -> Fabric:
    """Join the processes that train a network on images of a size, and choose the device of this one."""
    nodes, each = started()
    strategy: Any = "auto"
    if nodes * each > 1 and optim.sharded:
        strategy = ModelParallelStrategy(_shard, data_parallel_size=nodes * each, tensor_parallel_size=1)
    elif nodes * each > 1:
        strategy = DDPStrategy(find_unused_parameters=_has_unused(network, size))
    with _quiet():
        fabric = Fabric(accelerator="auto", devices=each, num_nodes=nodes, strategy=strategy, precision=optim.precision)
        fabric.launch()
    return fabric


@contextmanager
def _quiet() -> Generator[None]:
    """Without the library's own announcements."""
    logs = [logging.getLogger(f"lightning.{part}") for part in ("fabric", "pytorch")]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)


def end() -> None:
    """Leave the processes that torchrun or SLURM started."""
    if dist.is_initialized() and started() != (1, 1):
        dist.destroy_process_group()


def shard_alike(fabric: Fabric, module: nn.Module) -> None:
    """Spread a second network as `Fabric.setup` spread the first; nothing where weights are not spread."""
    if isinstance(fabric.strategy, ModelParallelStrategy):
        _shard(module.to(fabric.device), fabric.strategy.device_mesh)


def whole(tensor: Tensor) -> Tensor:
    """A tensor as one process would have it; every process must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own(tensor: Tensor) -> Tensor:
    """The part of a tensor that lies in this process."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def fill(tensor: Tensor, values: Tensor) -> None:
    """Set a tensor to the values of a whole one, in its own memory layout."""
    if isinstance(tensor, DTensor):
        values = distribute_tensor(values.to(tensor.device), tensor.device_mesh, tensor.placements)
    with torch.no_grad():
        tensor.copy_(values)


def total(tensor: Tensor) -> Tensor:
    """Sum over the processes."""
    if dist.is_initialized():
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def any_of(flags: list[bool], device: torch.device) -> list[bool]:
    """For each flag, whether one process has raised it."""
    if not dist.is_initialized():
        return flags
    return [number > 0 for number in total(torch.tensor(flags, dtype=torch.int32, device=device)).tolist()]


def same_buffers(module: nn.Module) -> None:
    """Give the buffers of the first process, such as running means, to all."""
    if dist.is_initialized():
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


def _has_unused(network: nn.Module, size: tuple[int, int]) -> bool:
    """Whether parameters get no gradient, for which the processes would wait."""
    tried = copy_of(network).train()
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        logits_of(tried(torch.zeros(2, 3, *size))).sum().backward()
    return any(p.requires_grad and p.grad is None for p in tried.parameters())


def _shard(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
    for unit in _units(module):
        if any(True for _ in unit.parameters()):
            fully_shard(unit, mesh=mesh["data_parallel"])
    fully_shard(module, mesh=mesh["data_parallel"])
    return module


def _units(module: nn.Module) -> Iterator[nn.Module]:
    """Blocks of a network: what stands in its outermost sequences."""
    for child in module.children():
        if isinstance(module, nn.Sequential | nn.ModuleList):
            yield child
        else:
            yield from _units(child)
