"""Recognizes a forward that was analyzed before, by its operations, so that it need not be analyzed again.

Where the positions lie and which feature map is the last follow from the operations of the forward: which ones, in
which order, on which tensors, with which arguments. Nothing else counts: a layer that was replaced, a hook, a changed
attribute or another branch for this image shows in the operations or makes no difference. What they cannot show (which
module of which name returned the layer's tensor) is checked beside them. The operations of models whose code is known
need not even be compared, see `structure`.
"""

import weakref
from collections.abc import Callable, Generator, Hashable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import (
    BuiltinFunctionType,
    EllipsisType,
    MethodDescriptorType,
    MethodWrapperType,
    NoneType,
    WrapperDescriptorType,
)
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.weak import WeakIdKeyDictionary

from sightline.explainers.capture.features import with_graph
from sightline.explainers.capture.structure import Structure
from sightline.inference.axes import Layout
from sightline.inference.operations import Operation, unseen
from sightline.inference.probabilities import Origin, Probabilities

_SETTINGS = {torch.dtype, torch.device, torch.layout, torch.memory_format}
_PLAIN = {int, float, bool, str, NoneType, EllipsisType} | _SETTINGS
_BUILT_IN = (BuiltinFunctionType, MethodDescriptorType, MethodWrapperType, WrapperDescriptorType)
_READS = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "ndim", "dtype", "device", "requires_grad", "is_cuda")),
    *(Tensor.dim, Tensor.size, Tensor.numel, Tensor.is_floating_point, Tensor.__len__),
    torch._assert,  # pyright: ignore[reportPrivateUsage]
}
"""They say what tensors look like, which the operations before them decide."""
_UNSEEN = None, 0
_MOST_PLANS = 8  # per model: layers and shapes of images
_MOST_MISSES = 2  # per model: afterwards its forward counts as one that varies


class Mark(NamedTuple):
    """A tensor of a forward: how many operations ran before it was seen, and its number."""

    after: int
    number: int | None


@dataclass(frozen=True)
class Place:
    """A layer that was read."""

    name: str
    module: weakref.ref[nn.Module]
    mark: Mark
    layout: Layout

    def of(self, model: nn.Module) -> nn.Module | None:
        """The model's module of that name."""
        module: Any = model
        for part in self.name.split("."):
            module = getattr(module, "_modules", {}).get(part)
        return module


@dataclass(frozen=True)
class Plan:
    """What the analysis of a forward yields, and the operations for which this holds."""

    steps: list[Any]
    answer: int
    """Number of the tensor of logits."""
    names: dict[str | None, str]
    """Name of the place for each layer as it was asked for."""
    places: list[Place]
    notices: dict[str, None]
    structure: Structure | None = None
    """The model that runs these operations whatever the images show; None if that is not certain."""

    def known_by(self, structure: Structure | None) -> "Plan":
        """The same plan for a model of this structure, unless its forward reads values of tensors."""
        if structure is not None:
            reads_values = not all(_holds_tensors(results) for *_, results in self.steps)
            structure = None if reads_values else structure.calling(function for function, *_ in self.steps)
        return replace(self, structure=structure)


@dataclass
class _Plans:
    by_call: dict[Hashable, Plan] = field(default_factory=dict[Hashable, Plan])
    misses: int = 0


_PLANS: Any = WeakIdKeyDictionary()


def plan_of(model: nn.Module, call: Hashable) -> tuple[Plan, dict[str, nn.Module]] | None:
    """The plan for such a call of the model, and its layers by name, if these are still there."""
    plans: _Plans | None = _PLANS.get(model)
    plan = None if plans is None else plans.by_call.get(call)
    if plan is None:
        return None
    modules: dict[str, nn.Module] = {}
    for place in plan.places:
        module = place.of(model)
        if module is None or module is not place.module():
            return None
        modules[place.name] = module
    return plan, modules


def has_known_plan(model: nn.Module) -> bool:
    """Whether the model may be recognized without running it, and then leaves itself as it is."""
    plans: _Plans | None = _PLANS.get(model)
    return plans is not None and any(plan.structure is not None for plan in plans.by_call.values())


def keep(model: nn.Module, call: Hashable, plan: Plan) -> None:
    """Keep a plan, unless the forward of the model varies from call to call."""
    plans: _Plans = _PLANS.setdefault(model, _Plans())
    if plans.misses < _MOST_MISSES:
        plans.by_call.pop(call, None)
        plans.by_call[call] = plan
        for oldest in [*plans.by_call][:-_MOST_PLANS]:
            plans.by_call.pop(oldest, None)


def forget(model: nn.Module, call: Hashable) -> None:
    """Drop a plan whose forward ran other operations than it says."""
    plans: _Plans = _PLANS.setdefault(model, _Plans())
    plans.by_call.pop(call, None)
    plans.misses += 1


class _Unrecordable(Exception):
    """An argument that may not be the same, or may not be compared, the next time."""


class _Trace:
    """Numbers the tensors of a forward, so that its operations can be compared with those of another one."""

    def __init__(self, images: Tensor) -> None:
        self.numbers: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self.count = 0
        self.put(images, 0)

    def put(self, tensor: Tensor, number: int) -> None:
        """Give a tensor a number."""
        self.numbers[id(tensor)] = weakref.ref(tensor), number

    def number(self, tensor: Any) -> int | None:
        """The number of a tensor that was seen."""
        reference, number = self.numbers.get(id(tensor), _UNSEEN)
        return number if reference is not None and reference() is tensor else None

    def before(self, value: Any) -> Any:
        """An argument in a form that can be compared: its number if it is a tensor that was seen, else its shape.

        Raises:
            _Unrecordable: it may be another one the next time without looking so.
        """
        if isinstance(value, Tensor):
            number = self.number(value)
            if number is None and is_lazy(value):
                raise _Unrecordable
            return (value.shape, value.dtype) if number is None else [number]
        kind = type(value)
        if kind in _PLAIN:
            return value
        if isinstance(value, tuple | list):
            return tuple(value) if _PLAIN.issuperset(map(type, value)) else [*map(self.before, value)]
        if kind is slice:
            return [slice, self.before(value.start), self.before(value.stop), self.before(value.step)]
        raise _Unrecordable

    def after(self, output: Any) -> Any:
        """The shapes of results, which get numbers."""
        if isinstance(output, Tensor):
            self.count += 1
            self.put(output, self.count)
            return output.shape, output.dtype
        return [*map(self.after, output)] if isinstance(output, tuple | list) else None


class Recording(Probabilities):
    """Follows probabilities, and records the operations of the model."""

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.trace = _Trace(images)
        self.steps: list[Any] = []
        self.marks: dict[str, Mark] = {}
        self.answer: int | None = None
        self.is_whole = True
        """Whether the operations say all."""
        self.is_paused = False
        self.is_over = False

    def on(self, operation: Operation) -> Any:
        """The result of the operation."""
        if self.is_paused or self.is_over or not self.is_whole or operation.func in _READS:
            return super().on(operation)
        with unseen():
            try:
                before = self.trace.before((operation.args, *operation.kwargs.items()))
            except _Unrecordable:
                before, self.is_whole = None, False
        output = super().on(operation)
        if self.is_whole:
            with unseen():
                self.steps.append((operation.func, before, self.trace.after(output)))
            self.is_whole = _is_of_torch(operation.func)
        return output

    @contextmanager
    def paused(self) -> Generator[None]:
        """Record nothing that runs in this context."""
        self.is_paused = True
        yield
        self.is_paused = False

    def mark(self, name: str, tensor: Tensor) -> None:
        """Note the tensor that a module returns."""
        self.marks[name] = Mark(len(self.steps), self.trace.number(tensor))

    def alias(self, copy: Tensor, tensor: Tensor) -> None:
        """Give the copy of a tensor that was seen the same number."""
        if (number := self.trace.number(tensor)) is not None:
            self.trace.put(copy, number)

    def end(self, *_: Any) -> None:
        """Forward hook of the model, after which operations do not count."""
        self.is_over = True

    def origin_of(self, tensor: Any) -> Origin | None:
        """The origin of a tensor of probabilities; where the logits have one, it is more than the operations say."""
        origin = super().origin_of(tensor)
        if self.is_over and self.answer is None:
            self.answer = self.trace.number(tensor)
            self.is_whole &= origin is None and self.answer is not None
        return origin

    def plan(
        self,
        names: dict[str | None, str],
        places: Mapping[str, tuple[nn.Module | None, Layout]],
        notices: dict[str, None],
        structure: Structure | None,
    ) -> Plan | None:
        """The plan for such forwards; None if the operations do not say all.

        `structure` is that of the model before the forward.
        """
        whole: list[Place] = []
        for name, (module, layout) in places.items():
            mark = self.marks.get(name, Mark(0, None))
            if module is None or mark.number is None:
                return None
            whole.append(Place(name, weakref.ref(module), mark, layout))
        if not self.is_whole or self.answer is None:
            return None
        return Plan(self.steps, self.answer, names, whole, notices).known_by(structure)


def _holds_tensors(results: Any) -> bool:
    """Whether these, as a trace has them, are tensors and nothing else."""
    return isinstance(results, tuple) or (isinstance(results, list) and all(map(_holds_tensors, results)))


def _is_of_torch(function: Any) -> bool:
    """Whether keeping a function keeps nothing else, such as the model, alive."""
    return isinstance(function, _BUILT_IN) or str(getattr(function, "__module__", "")).startswith("torch")


class Rerun(Probabilities):
    """A forward that should run the operations of a plan; keeps its layers."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        self.is_same = True
        self.is_over = False
        self.kept: dict[str, Tensor] = {}

    def keep(self, place: Place, tensor: Any) -> Tensor | None:
        """Begin the graph at a layer's tensor; the tensor to hand on in its place."""
        self.is_same &= isinstance(tensor, Tensor) and place.name not in self.kept
        if not self.is_same:
            return None
        torch.set_grad_enabled(True)
        if not tensor.requires_grad:
            tensor = tensor.detach().clone().requires_grad_()
        self.kept[place.name] = tensor
        return tensor.clone()

    def end(self, *_: Any) -> None:
        """Forward hook of the model."""
        self.is_over = True
        self.is_same &= len(self.kept) == len(self.plan.places)

    def origin_of(self, tensor: Any) -> None:
        """None, as for the logits of the recorded forward."""


class Known(Rerun):
    """One that is known to run them, so that no operation is seen."""

    def __enter__(self) -> "Known":
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Replay(Rerun):
    """One whose operations are compared with those of the plan."""

    def __init__(self, plan: Plan, images: Tensor) -> None:
        super().__init__(plan)
        self.trace = _Trace(images)
        self.place = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _READS:
            return func(*args, **kwargs)
        before = None
        if self.is_same and not self.is_over:
            try:
                before = self.trace.before((args, *kwargs.items()))
            except _Unrecordable:
                self.is_same = False
        output = with_graph(Operation(func, args, kwargs)) if self.kept else func(*args, **kwargs)
        if self.is_same and not self.is_over:
            steps, place = self.plan.steps, self.place
            self.place += 1
            self.is_same = place < len(steps) and (func, before, self.trace.after(output)) == steps[place]
        return output

    def keep(self, place: Place, tensor: Any) -> Tensor | None:
        """The same, if it is the tensor of the plan."""
        self.is_same &= isinstance(tensor, Tensor) and place.mark == (self.place, self.trace.number(tensor))
        with unseen():
            handed = super().keep(place, tensor)
        if handed is not None:
            self.trace.put(handed, place.mark.number or 0)
        return handed

    def end(self, *_: Any) -> None:
        """Forward hook of the model."""
        super().end()
        self.is_same &= self.place == len(self.plan.steps)

    def origin_of(self, tensor: Any) -> None:
        """None; checks that the tensor is that of the plan."""
        self.is_same &= self.trace.number(tensor) == self.plan.answer
