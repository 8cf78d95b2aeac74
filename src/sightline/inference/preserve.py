"""Leaves anybody's model, and the state of the process, as they came."""

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel


@contextmanager
def untouched(model: nn.Module) -> Generator[nn.Module]:
    """Run a model in eval mode, then put every module's own train/eval flag and the global random state back.

    Also after an exception. `torch.compile` (also in place), `DataParallel` and `DistributedDataParallel` are looked
    through, so that hooks fire and every image of the batch is seen.

    Raises:
        TypeError: the model is no module.

    >>> model = nn.Sequential(nn.Dropout(), nn.BatchNorm2d(3).eval())
    >>> with untouched(model) as m:
    ...     m[0].training
    False
    >>> model[0].training, model[1].training
    (True, False)
    """
    while hasattr(model, "_orig_mod") or isinstance(model, nn.DataParallel | DistributedDataParallel):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module  # pyright: ignore[reportAssignmentType]
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}; pass the model itself")
    flags = [(module, module.training) for module in model.modules()]
    in_place = [module for module in model.modules() if module.__dict__.get("_compiled_call_impl")]
    calls = [module.__dict__["_compiled_call_impl"] for module in in_place]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"} if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=sorted({d.index or 0 for d in devices})):
        try:
            for module, training in flags:  # eval() may be the model's own, and do more, as merging weights
                if training:
                    module.training = False
            for module in in_place:
                del module.__dict__["_compiled_call_impl"]  # that of the class is None
            yield model
        finally:
            for module, call in zip(in_place, calls, strict=True):
                module.__dict__["_compiled_call_impl"] = call
            for module, training in flags:
                if module.training != training:
                    module.training = training


@contextmanager
def exact() -> Generator[None]:
    """Convolutions of a GPU in full 32 bits instead of TF32, as on a CPU, unless the user has set their precision.

    TF32, which PyTorch takes by default, keeps 10 bits: enough for an answer, not for the small differences that a
    gradient or a relevance is made of.
    """
    flags = torch.backends.cudnn
    try:
        rounded = flags.allow_tf32
    except RuntimeError:  # cannot be read where it was set by its newer names, `fp32_precision`
        rounded = False
    if rounded:
        flags.allow_tf32 = False
    try:
        yield
    finally:
        if rounded:
            flags.allow_tf32 = True
