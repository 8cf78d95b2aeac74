"""Leaves any model and the state of the process unchanged, in every thread and after any interruption.

Some of that state has no public interface in PyTorch: tests/test_torch_features.py has one test for each part of it.
"""

import os
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable, Sequence
from functools import lru_cache, wraps
from io import IOBase
from itertools import chain, compress
from operator import call, is_
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sightline.inference.operations import unseen
from sightline.inference.turns import Random, Turn, line, lock, renew_lock, unlock

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

_CONTAINERS = {dict, OrderedDict, list, set}
_MISSING = object()


class Ensured(IOBase, Generic[T]):
    """A context that always ends, even if an interrupt comes while it begins, in its body, or while it ends.

    `end` is called twice; if an interrupt stops the first call, the second one does the rest. An interrupt before the
    first line of an `__exit__` written in Python would skip all of it. The `__exit__` of IOBase is written in C, and so
    is `close` of a generator, which continues inside the two `finally`. A second interrupt within about a millisecond,
    while the first is being handled, is not covered.
    """

    def __init__(self, begin: Callable[[], T], end: Callable[[], None]) -> None:
        super().__init__()
        self._steps = _steps(begin, end)
        self.close = self._steps.close

    def __enter__(self) -> T:  # pyright: ignore[reportIncompatibleMethodOverride]
        try:
            return next(self._steps)
        except BaseException:
            self._steps.close()
            raise


def _steps(begin: Callable[[], T], end: Callable[[], None]) -> Generator[T]:
    try:
        try:
            yield begin()
        finally:
            end()
    finally:
        end()


def untouched(model: nn.Module, *, lazily: bool = False) -> Ensured[nn.Module]:
    """Run a model in eval mode, then restore everything that a forward, a hook or an exception may have changed in it.

    This restores every module's train/eval flag, its attributes, the contents of lists, dicts and sets among them
    (hooks, children, a log), and the values of its buffers; the random states of PyTorch, NumPy and Python; and the
    thread's gradient, inference and autocast modes and stacks of modes. Attributes are bound again to the same objects:
    a counter, a cache or a saved feature map is what it was before. Parameters that a forward changes or replaces, and
    contents deeper than one container, are not restored.

    One thread at a time uses a model, or models that share a module; the others wait for their turn. Inside another
    such context with the same model, this one restores only flags and random states.

    `torch.compile` (also in place), `DataParallel` and `DistributedDataParallel` are unwrapped, so that hooks fire and
    see every image of the batch.

    `lazily`: of attributes, buffers and NumPy's state only that is restored which `remember` was told to. Another such
    context inside this one remembers all of it before it begins.

    Raises:
        TypeError: the model is not a module.
        RuntimeError: two threads are each in a context with a model that the other one asks for.

    >>> model = nn.Sequential(nn.Dropout(), nn.BatchNorm2d(3).eval())
    >>> with untouched(model) as m:
    ...     m[0].training
    False
    >>> model[0].training, model[1].training
    (True, False)
    """
    model = unwrapped(model)
    use = _Again(model) if _uses_of(model) else _Use(model, lazily=lazily)
    return Ensured(use.begin, use.end)


def remember(model: nn.Module, modules: Sequence[nn.Module] | None = None) -> None:
    """Restore these modules, or all of them, at the end of the context of this thread that leaves the model untouched.

    To be called before anything changes in them.
    """
    for use in _uses_of(model):
        use.remember(modules)


def is_unchanged(model: nn.Module) -> bool:
    """Whether there is nothing to restore so far in the contexts of this thread that leave the model untouched."""
    uses = _uses_of(model)
    same = (use.kept is not None and use.kept.is_unchanged() and use.random.is_same_for_numpy() for use in uses)
    return bool(uses) and all(same)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile` (also in place), `DataParallel` and `DistributedDataParallel`.

    Raises:
        TypeError: it is not a module.
    """
    while hasattr(model, "_orig_mod") or isinstance(model, nn.DataParallel | DistributedDataParallel):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module  # pyright: ignore[reportAssignmentType]
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}; pass the model itself")
    return model


def modules_of(model: nn.Module) -> list[nn.Module]:
    """What `model.modules()` yields, in another order, in a fifth of the time."""
    for use in _uses_of(model):
        if use.model is model and use.kept is None:  # nothing has run since they were found
            return use.modules
    modules, waiting = {id(model): model}, [model]
    while waiting:
        for module in waiting.pop()._modules.values():  # pyright: ignore[reportPrivateUsage]
            if module is not None and id(module) not in modules:
                modules[id(module)] = module
                waiting.append(module)
    return [*modules.values()]


def values_of(dictionaries: Iterable[dict[str, Any]]) -> list[Any]:
    """The values of all of them, such as the attributes of modules."""
    return [*chain.from_iterable(map(dict[str, Any].values, dictionaries))]


def exact() -> Ensured[None]:
    """Run a GPU's convolutions in full 32 bits instead of TF32, as on a CPU, unless you set their precision yourself.

    TF32, PyTorch's default, keeps 10 bits: enough for a prediction, but not for the small differences that make up a
    gradient or a relevance. The setting applies to the whole process and is restored once no thread needs it.
    """
    use = _Exact()
    return Ensured(use.begin, use.end)


def preserving(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function of a model so that it runs in `untouched` and `exact`."""

    @wraps(function)
    def preserved(*args: P.args, **kwargs: P.kwargs) -> R:
        model: Any = args[0] if args else kwargs.get("model")
        with untouched(model), exact():
            return function(*args, **kwargs)

    return preserved


class _Use(Turn):
    """Everything that `untouched` does."""

    def __init__(self, model: nn.Module, *, lazily: bool) -> None:
        self.model = model
        self.modules = modules_of(model)
        super().__init__(self.modules)
        self.lazily = lazily
        self.training: list[nn.Module] = []
        self.modes: _Modes | None = None
        self.kept: _Modules | None = None
        self.is_over = False

    def begin(self) -> nn.Module:
        self.take()
        self.modes = _Modes()
        self.modes.leave_inference()
        self.training = [module for module in self.modules if module.training]
        for module in self.training:  # a model may override eval() to do more, such as merging weights
            module.training = False
        compiled = [module for module in self.modules if "_compiled_call_impl" in vars(module)]
        if compiled or not self.lazily:
            self.remember()
        for module in compiled:
            vars(module).pop("_compiled_call_impl")  # the class has None
        return self.model

    def remember(self, modules: Sequence[nn.Module] | None = None) -> None:
        if modules is None:
            modules = self.modules
            self.random.add_numpy()
        if self.kept is None:
            self.kept = _Modules(modules)
        elif not set(map(id, modules)) <= set(map(id, self.kept.modules)):
            self.kept = _Modules(self.modules)

    def end(self) -> None:
        if self.is_over:
            return
        try:
            try:
                if self.modes is not None:
                    self.modes.put_back()
                if self.kept is not None:
                    self.kept.put_back()
            finally:
                self.train()
        except Exception:  # a broken GPU, say; after an interrupt the second call continues while others wait
            self.leave()
            raise
        self.leave()
        self.is_over = True

    def train(self) -> None:
        """Set the flags again that were set before."""
        for module in self.training:
            module.training = True


def _uses_of(model: nn.Module) -> list[_Use]:
    """Contexts that this thread is in with a model."""
    here = threading.get_ident()
    turns = (turn for turn in line() if turn.thread == here and turn.is_running and id(model) in turn.ids)
    return [turn for turn in turns if isinstance(turn, _Use)]


class _Again:
    """The same inside another such context with the model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.training = [module for module in modules_of(model) if module.training]
        self.random = Random()
        self.random.add_numpy()
        self.is_over = False

    def begin(self) -> nn.Module:
        remember(self.model)
        for module in self.training:
            module.training = False
        return self.model

    def end(self) -> None:
        if not self.is_over:
            for module in self.training:
                module.training = True
            self.random.put_back()
            self.is_over = True


class _Exact:
    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.rounded = False

    def begin(self) -> None:
        lock()
        self.rounded = _EXACT[0].rounded if _EXACT else _rounds()
        _EXACT.append(self)
        if self.rounded:
            torch.backends.cudnn.allow_tf32 = False
        unlock()

    def end(self) -> None:
        lock()
        if self in _EXACT:
            _EXACT.remove(self)
        if self.rounded and not _EXACT:
            torch.backends.cudnn.allow_tf32 = True
        self.rounded = False
        unlock()


_EXACT: list[_Exact] = []


def _rounds() -> bool:
    try:
        return torch.backends.cudnn.allow_tf32
    except RuntimeError:  # cannot be read if it was set by its newer name, `fp32_precision`
        return False


class _Modes:
    """State that PyTorch keeps for each thread."""

    def __init__(self) -> None:
        self.gradients = torch.is_grad_enabled()
        kinds = ("cpu", "cuda")
        self.autocast = {kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds}
        self.cache = torch.is_autocast_cache_enabled()
        self.nesting = _autocast_nesting()
        self.functions = torch._C._len_torch_function_stack()  # pyright: ignore[reportPrivateUsage]
        self.dispatches = torch._C._len_torch_dispatch_stack()  # pyright: ignore[reportPrivateUsage]
        self.seen = unseen()
        switches: Any = (self.seen.__enter__, self.seen.__exit__)
        any(map(call, switches))  # it keeps whether modes saw operations before
        self.inference: Any = None

    def leave_inference(self) -> None:
        """Switch inference mode off, since tensors computed in it have no gradient."""
        if torch.is_inference_mode_enabled():
            self.inference = torch._C._InferenceMode(False)  # pyright: ignore[reportPrivateUsage]
            self.inference.__enter__()
            torch.set_grad_enabled(self.gradients)

    def put_back(self) -> None:
        self.seen.__exit__(None, None, None)
        while torch._C._len_torch_function_stack() > self.functions:  # pyright: ignore[reportPrivateUsage]
            torch._C._pop_torch_function_stack()  # pyright: ignore[reportPrivateUsage]
        while torch._C._len_torch_dispatch_stack() > self.dispatches:  # pyright: ignore[reportPrivateUsage]
            torch._C._pop_torch_dispatch_stack(None)  # pyright: ignore[reportPrivateUsage]
        if self.inference is not None:
            self.inference.__exit__(None, None, None)
        if torch.is_grad_enabled() != self.gradients:
            torch.set_grad_enabled(self.gradients)
        for kind, (enabled, dtype) in self.autocast.items():
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)
        torch.set_autocast_cache_enabled(self.cache)
        for _ in range(_autocast_nesting() - self.nesting):
            torch.autocast_decrement_nesting()


def _autocast_nesting() -> int:
    # One step up and one down shows the level; no interrupt comes between the two while a map is unpacked.
    _, level = map(call, (torch.autocast_increment_nesting, torch.autocast_decrement_nesting))
    return level


class _Modules:
    """Attributes of modules, contents of containers among these, and values of buffers."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.modules = modules
        self.classes = [*map(type, modules)]
        self.training = [module.training for module in modules]
        self.attributes = [*map(dict[str, Any].copy, map(vars, modules))]
        self.values = values_of(self.attributes)
        are_containers, are_tensors = _kinds_of(tuple(map(type, self.values)))
        self.containers = [] if _is_sharded(modules) else [*compress(self.values, are_containers)]
        self.lengths = [*map(len, self.containers)]
        self.filled = [*compress(self.containers, self.lengths)]
        self.contents = [value.copy() for value in self.filled]
        groups: dict[tuple[Any, ...], list[Tensor]] = {}
        buffers = (attributes.get("_buffers", {}).values() for attributes in self.attributes)
        for tensor in chain(chain.from_iterable(buffers), compress(self.values, are_tensors)):
            if type(tensor) is Tensor and not tensor.requires_grad:
                groups.setdefault((tensor.dtype, tensor.device, tensor.layout), []).append(tensor)
        self.buffers = [(tensors, _joined(tensors)) for tensors in groups.values() if _has_values(tensors[0])]

    def put_back(self) -> None:
        """Change only what was changed: another thread may be running the model directly."""
        self.put_back_attributes()
        for tensors, joined in self.buffers:
            if not _same_bits(_joined(tensors), joined):
                for tensor, value in zip(tensors, joined.split([tensor.numel() for tensor in tensors]), strict=True):
                    if not _same_bits(tensor.reshape(-1), value):
                        with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                            tensor.copy_(value.view_as(tensor))

    def is_unchanged(self) -> bool:
        same = (_same_bits(_joined(tensors), joined) for tensors, joined in self.buffers)
        return self._has_same_attributes() and all(same)

    def put_back_attributes(self) -> None:
        """Everything but the values of buffers."""
        for module, training in zip(self.modules, self.training, strict=True):
            if module.training != training:  # TorchScript does not keep the flag among the attributes
                module.training = training
        if self._has_same_attributes():
            return
        others = set[int]()
        for module, kind, attributes in zip(self.modules, self.classes, self.attributes, strict=True):
            if type(module) is not kind:  # the first forward turns nn.LazyLinear into nn.Linear for good
                others |= set(map(id, attributes.values()))
            elif not _same(vars(module), attributes):
                _fill(vars(module), attributes)
        filled = set(map(id, self.filled))
        for value in compress(self.containers, self.containers):
            if id(value) not in others | filled:
                value.clear()
        for value, content in zip(self.filled, self.contents, strict=True):
            if id(value) not in others and not _same(value, content):
                _fill(value, content)

    def _has_same_attributes(self) -> bool:
        now = values_of(map(vars, self.modules))
        return (
            [*map(type, self.modules)] == self.classes
            and len(now) == len(self.values)
            and all(map(is_, now, self.values))
            and [*map(len, self.containers)] == self.lengths
            and all(map(_same, self.filled, self.contents))
        )


@lru_cache(maxsize=16)
def _kinds_of(types: tuple[type, ...]) -> tuple[list[bool], list[bool]]:
    """Which of the values are containers, and which are tensors."""
    return [kind in _CONTAINERS for kind in types], [kind is Tensor for kind in types]


def _is_sharded(modules: Sequence[nn.Module]) -> bool:
    """Whether FSDP swaps their parameters in and out, by hooks that its first forward adds."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and any(isinstance(module, fsdp.FSDPModule) for module in modules)


def _has_values(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_quantized and tensor.device.type != "meta"


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """A copy of all values."""
    if len(tensors) == 1:
        return tensors[0].reshape(-1).clone()
    return torch._C._nn.flatten_dense_tensors(tensors)  # pyright: ignore


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.uint8), other.view(torch.uint8))


def _same(one: Any, other: Any) -> bool:
    """Whether two containers of the same type hold the very same objects in the same order."""
    if len(one) != len(other):
        return False
    if isinstance(one, dict):
        return all(map(is_, one, other)) and all(map(is_, one.values(), other.values()))
    return one == other if isinstance(one, set) else all(map(is_, one, other))


def _fill(container: Any, content: Any) -> None:
    """Give a container the contents of another one."""
    if isinstance(container, list):
        container[:] = content
    elif isinstance(container, set):
        container &= content
        container |= content
    else:
        for key in [key for key in container if key not in content]:
            del container[key]
        for key, value in content.items():
            if container.get(key, _MISSING) is not value:
                container[key] = value
        if [*container] != [*content]:  # the order in which hooks are called
            for key in content:
                container[key] = container.pop(key)


def _forget_other_threads() -> None:
    """In a forked process, end the calls of threads that exist only in the parent process."""
    renew_lock()
    here = threading.get_ident()
    for use in (turn for turn in line() if turn.thread != here):
        if isinstance(use, _Use):
            if use.kept is not None:
                use.kept.put_back_attributes()  # not the values: comparing large tensors uses threads, too
            use.train()
        use.leave()
    for use in [use for use in _EXACT if use.thread != here]:
        use.end()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_other_threads)
