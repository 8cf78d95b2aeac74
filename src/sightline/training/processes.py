"""The processes that train together: a single one, or those started by torchrun or SLURM."""

import logging
import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies.ddp import DDPStrategy
from lightning.fabric.strategies.model_parallel import ModelParallelStrategy
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from sightline.inference import copy_of, logits_of
from sightline.recipe import Optim


def started() -> tuple[int, int]:
    """Number of machines, and of processes on each, started by torchrun or SLURM; (1, 1) without them."""
    environment = os.environ
    if "TORCHELASTIC_RUN_ID" in environment:
        per_node = int(environment["LOCAL_WORLD_SIZE"])
        return int(environment["WORLD_SIZE"]) // per_node, per_node
    if "SLURM_PROCID" in environment and environment.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        nodes = int(environment.get("SLURM_NNODES", 1))
        return nodes, int(environment.get("SLURM_NTASKS", 1)) // nodes
    return 1, 1


def first() -> bool:
    """Whether this process writes the files and the messages."""
    return started() == (1, 1) or int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0))) == 0


def join(optim: Optim, network: nn.Module, size: tuple[int, int]) -> Fabric:
    """Join the processes that train this network on images of this size, and choose a device."""
    nodes, per_node = started()
    strategy: Any = "auto"
    if nodes * per_node > 1 and optim.sharded:
        strategy = ModelParallelStrategy(_shard, data_parallel_size=nodes * per_node, tensor_parallel_size=1)
    elif nodes * per_node > 1:
        freezes = isinstance(optim.freeze, int) and optim.freeze > 0
        strategy = DDPStrategy(find_unused_parameters=freezes or _has_unused(network, size))
    with _quiet():
        fabric = Fabric(
            accelerator="auto", devices=per_node, num_nodes=nodes, strategy=strategy, precision=optim.precision
        )
        fabric.launch()
    return fabric


@contextmanager
def _quiet() -> Generator[None]:
    """Without Lightning's own messages."""
    logs = [logging.getLogger(f"lightning.{part}") for part in ("fabric", "pytorch")]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)


def leave() -> None:
    """Leave the group of processes started by torchrun or SLURM."""
    if dist.is_initialized() and started() != (1, 1):
        dist.destroy_process_group()


def shard_alike(fabric: Fabric, module: nn.Module) -> None:
    """Shard a second network as `Fabric.setup` sharded the first, if it did."""
    if isinstance(fabric.strategy, ModelParallelStrategy):
        _shard(module.to(fabric.device), fabric.strategy.device_mesh)


def full_tensor(tensor: Tensor) -> Tensor:
    """A sharded tensor with all its shards; every process must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_tensor(tensor: Tensor) -> Tensor:
    """This process's shard of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def copy_full(tensor: Tensor, values: Tensor) -> None:
    """Copy a full tensor into one that may be sharded; the target keeps its memory layout."""
    if isinstance(tensor, DTensor):
        values = distribute_tensor(values.to(tensor.device), tensor.device_mesh, tensor.placements)
    with torch.no_grad():
        tensor.copy_(values)


def all_reduce(tensor: Tensor) -> Tensor:
    """Sum over the processes."""
    if dist.is_initialized():
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def any_process(flags: list[bool], device: torch.device) -> list[bool]:
    """Whether any process has raised the flag, for each flag."""
    if not dist.is_initialized():
        return flags
    return [number > 0 for number in all_reduce(torch.tensor(flags, dtype=torch.int32, device=device)).tolist()]


def broadcast_buffers(module: nn.Module) -> None:
    """Copy the first process's buffers, such as running means, to all others."""
    if dist.is_initialized():
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


def _has_unused(network: nn.Module, size: tuple[int, int]) -> bool:
    """Whether some parameters get no gradient, for which the processes would wait forever."""
    network = copy_of(network).train()
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        logits_of(network(torch.zeros(2, 3, *size))).sum().backward()
    return any(p.requires_grad and p.grad is None for p in network.parameters())


def _shard(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
    for unit in _units(module):
        if any(True for _ in unit.parameters()):
            fully_shard(unit, mesh=mesh["data_parallel"])
    fully_shard(module, mesh=mesh["data_parallel"])
    return module


def _units(module: nn.Module) -> Iterator[nn.Module]:
    """Blocks of a network: the children of its outermost sequences."""
    for child in module.children():
        if isinstance(module, nn.Sequential | nn.ModuleList):
            yield child
        else:
            yield from _units(child)
