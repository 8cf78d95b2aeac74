"""One forward that keeps the tensors of the layers that maps are read from."""

import math
import re
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from sightline.explainers.capture.features import Captured, LastFeatures, Watch, guess_of, hook_on, quantized_in
from sightline.explainers.capture.replay import Known, Place, Plan, Recording, Replay, Rerun, forget, keep, plan_of
from sightline.explainers.capture.structure import structure_of
from sightline.explainers.scorer import Scorer
from sightline.explainers.tokens import MANY_REGISTERS, patch_maps
from sightline.facts import did_you_mean
from sightline.inference import remember, untouched
from sightline.inference.axes import Layout, grids_like, guessed, layout_in, other, tokens_of
from sightline.inference.operations import first_tensor, unseen

LayerLike = str | nn.Module | None
_WRITTEN_VIEW = "A view was created in no_grad mode"  # PyTorch's words; the search has turned gradients on meanwhile
_SHAPE = re.compile(r" \(\d+( x \d+)*\)$")  # behind the name, as explanations show it


def find_layer(model: nn.Module, layer: str | nn.Module) -> tuple[str, nn.Module]:
    """Name and module of a layer given by either.

    Raises:
        ValueError: the model has no such module; the closest names are shown.

    >>> find_layer(nn.Sequential(nn.ReLU()), "0")
    ('0', ReLU())
    """
    modules = dict(model.named_modules())
    if isinstance(layer, str):
        layer = _SHAPE.sub("", layer)
        if layer not in modules:  # DataParallel and torch.compile are looked through
            layer = layer.removeprefix("module.").removeprefix("_orig_mod.")
        if layer and layer in modules:
            return layer, modules[layer]
        if layer.startswith("input of "):  # name of the automatic layer where no module returns it
            return layer, model
        hint = did_you_mean(layer, modules, "see model.named_modules()", n=3)
        raise ValueError(f"expected the name of a layer of {type(model).__name__}, got {layer!r}{hint}")
    for name, module in modules.items():
        if module is layer:
            return name, module
    raise ValueError(
        f"expected a module of {type(model).__name__}, got another {type(layer).__name__}; pass its dotted name"
        if isinstance(layer, nn.Module)  # pyright: ignore[reportUnnecessaryIsInstance]
        else f"expected a module of {type(model).__name__} or its dotted name as layer, got {layer!r}"
    )


class Capture:
    """One forward that keeps the output of each layer; None is the last feature map that feeds the scores.

    Unless `whole`, everything before the first layer runs without gradient, and the graph begins at that layer.
    """

    captured: list[Captured]
    """One per layer."""

    def __init__(
        self,
        model: nn.Module,
        scorer: Scorer,
        layers: Sequence[LayerLike],
        images: Tensor,
        *,
        call: int | None,
        gates: bool,
        whole: bool,
    ) -> None:
        self.model = model
        self.scorer = scorer
        self.images = images
        self.layers = [find_layer(model, layer)[0] if isinstance(layer, nn.Module) else layer for layer in layers]
        self.call = call
        self.read_gates = gates
        self.whole = whole
        self.gates: dict[str, Tensor] = {}
        self.notices: dict[str, None] = {}
        forward = scorer.forward_call
        says_all = not (whole or gates or callable(forward.pick) or callable(scorer.asked)) and call is None
        given = images.shape, images.dtype, images.device, type(images)
        self.key = (frozenset(self.layers), given, forward.pick, forward.kind) if says_all and layers else None
        """What a plan is kept for; None where the operations of the forward do not say everything."""

    def run(self) -> None:
        """Fill `captured`, `gates` and the tensors that the scorer keeps."""
        if not self._is_replayed():
            remember(self.model)
            self.modules = dict(self.model.named_modules())
            modules = self.modules.items()
            self.scripted = [name for name, module in modules if isinstance(module, torch.jit.ScriptModule)]
            self.names = ["" if layer is None else find_layer(self.model, layer)[0] for layer in self.layers]
            self._analyze()
        self.scorer.notices |= self.notices

    def _is_replayed(self) -> bool:
        """Fill in everything as a forward with the same operations did; False if there was none."""
        kept = None if self.key is None else plan_of(self.model, self.key)
        if kept is None:
            return False
        plan, modules = kept
        structure, forward = plan.structure, self.scorer.forward_call
        if structure is not None and not (forward.args or forward.kwargs):
            if structure.is_that_of(self.model) and self._replayed(plan, modules, Known(plan)):
                return True
            remember(self.model)
            structure = structure_of(self.model)
        if not self._replayed(plan, modules, Replay(plan, self.images)):
            forget(self.model, self.key)
            return False
        if structure is not plan.structure:
            is_harmless = structure is not None and structure.was_left_alone(self.model)
            keep(self.model, self.key, plan.known_by(structure if is_harmless else None))
        return True

    def _replayed(self, plan: Plan, modules: dict[str, nn.Module], replay: Rerun) -> bool:
        """Whether the forward runs as the plan says; then everything is filled in."""
        scorer = self.scorer
        before, gradients = scorer.forward_call, torch.is_grad_enabled()
        with ExitStack() as contexts:
            if isinstance(replay, Replay):  # if another forward follows, it draws the same random numbers
                contexts.enter_context(untouched(self.model))
            remember(self.model, [self.model, *modules.values()])
            for place in plan.places:
                hook = partial(self._keep_again, replay, place)
                contexts.enter_context(modules[place.name].register_forward_hook(hook))
            contexts.enter_context(self.model.register_forward_hook(replay.end))
            try:
                scorer.begin(self.images, replay)
            except Exception:  # the analysis raises it again, unless the graph from the layer on is to blame
                if replay.is_over and replay.is_same:
                    raise
                replay.is_same = False
        if not replay.is_same:
            torch.set_grad_enabled(gradients)
            scorer.forward_call = before
            scorer.notices.clear()
            return False
        self.notices = plan.notices
        read = {p.name: Captured(p.name, replay.kept[p.name], p.layout, 0) for p in plan.places}
        self.captured = [read[plan.names[layer]] for layer in self.layers]
        return True

    def _keep_again(self, replay: Rerun, place: Place, module: nn.Module, inputs: Any, output: Any) -> Any:
        first = first_tensor(output)
        handed = replay.keep(place, first)
        if handed is None or first is output:
            return handed
        return tree_map(lambda value: handed if value is first else value, output)

    def _analyze(self) -> None:
        searched = [name for name in dict.fromkeys(self.names) if name not in self.modules or not name]
        structure = None if self.key is None else structure_of(self.model)
        try:
            with self._watched(search=bool(searched)), untouched(self.model):
                scores = self.scorer.begin(self.images, self.recording)
        except RuntimeError as error:
            if not searched or _WRITTEN_VIEW not in str(error):
                raise
            raise ValueError(
                f"expected layer= for {type(self.model).__name__}, whose forward writes into views, so that its last "
                "feature map cannot be found; name a layer (see model.named_modules())"
            ) from error
        if self.watch.positions.obstacle:
            raise ValueError(self.watch.positions.obstacle)
        for name, calls in self.calls.items():
            self._check_calls(name, calls)
        for name in searched:
            assert isinstance(self.watch, LastFeatures)
            if not self.watch.sources_of(scores) and (quantized := quantized_in(self.model)):
                raise ValueError(quantized)
            automatic, alone = self.watch.find(scores, self.scorer.logits, self.notices, name)
            if not alone and automatic.name in self.modules:
                # Attention weights feed the logits too and are made from it; a named layer gets their gradient as well.
                self.names = [automatic.name if name == "" else name for name in self.names]
                self.key = None  # which layer is read may depend on the weights
                return self._analyze()
            self.read[name] = automatic
        self.captured = [self.read[name] for name in self.names]
        if isinstance(self.watch, LastFeatures):
            is_sure = searched == [""] == [*self.read] and self.watch.is_read_alone(scores, self.read[""])
        else:
            is_sure = all(len(calls) == 1 and self.read[name].layout.fold == 1 for name, calls in self.calls.items())
        if is_sure and not self.watch.positions.is_assumed and self.key is not None:
            names = {layer: captured.name for layer, captured in zip(self.layers, self.captured, strict=True)}
            places = {one.name: (self.modules.get(one.name), one.layout) for one in self.captured}
            if structure is not None and not structure.was_left_alone(self.model):
                structure = None
            if (plan := self.recording.plan(names, places, self.notices, structure)) is not None:
                keep(self.model, self.key, plan)

    @contextmanager
    def _watched(self, *, search: bool) -> Generator[None]:
        """Hooks and modes around one forward."""
        self.gates = {}
        self.recording = Recording(self.images)
        self.read: dict[str, Captured] = {}
        self.calls: dict[str, list[tuple[int, ...]]] = {
            name: [] for name in self.names if name in self.modules and name
        }
        self.grids: list[tuple[int, ...]] = []
        is_read = search or self.calls or self.read_gates
        if isinstance(self.model, torch.jit.ScriptModule) and is_read:
            raise ValueError(
                f"expected a model of Python modules, whose layers can be read, got {type(self.model).__name__} of "
                "TorchScript; explain the model it was made from, or take saliency, occlusion or rise"
            )
        cut = not self.whole
        self.watch = (
            LastFeatures(self.images, cut=cut and not self.calls, mark=self.recording.mark)
            if search
            else Watch(self.images, cut=cut)
        )
        with ExitStack() as contexts:
            for name in self.calls:
                contexts.enter_context(hook_on(self.modules[name], partial(self._keep, name)))
            for name, module in self.modules.items():
                if not is_read or self._compiled_around(name):
                    continue
                contexts.enter_context(hook_on(module, self.watch.hook(name)))
                if not name:
                    contexts.enter_context(module.register_forward_hook(self.recording.end))
                if self.calls and isinstance(module, nn.Conv2d | nn.Conv3d):
                    contexts.enter_context(module.register_forward_hook(self._see_grid))
                if self.read_gates and isinstance(gate := getattr(module, "gate", None), nn.Module):
                    contexts.enter_context(gate.register_forward_hook(partial(self._keep_gate, name)))
            if self.read_gates:
                contexts.enter_context(patch_maps(self.model, self._keep_map))
            if is_read:
                contexts.enter_context(self.watch)
            yield

    def _compiled_around(self, name: str) -> str:
        """Name of the part that TorchScript has compiled, if the module lies inside one."""
        return next((part for part in self.scripted if name.startswith(f"{part}.")), "")

    def _check_calls(self, name: str, calls: list[tuple[int, ...]]) -> None:
        if not calls:
            part = self._compiled_around(name)
            raise ValueError(
                f"expected a layer of Python, got {name!r} inside {part!r}, which TorchScript has compiled; "
                f"name {part!r} itself"
                if part
                else f"expected a layer that the forward runs, got {name!r}, which it never called; choose another"
            )
        shapes = ", ".join(f"call={i} yields {' x '.join(map(str, shape))}" for i, shape in enumerate(calls))
        if self.call is None and len(calls) > 1:
            raise ValueError(
                f"expected a layer that runs once, got {name!r}, which the forward calls {len(calls)} times "
                f"({shapes}); choose one by call="
            )
        if self.call is not None and self.call not in range(len(calls)):
            raise ValueError(f"expected call= of {name!r} in 0..{len(calls) - 1}, got {self.call}; {shapes}")

    def _keep(self, name: str, module: nn.Module, inputs: Any, output: Any) -> Any:
        with self.recording.paused():
            return self._kept(name, module, inputs, output)

    def _kept(self, name: str, module: nn.Module, inputs: Any, output: Any) -> Any:
        tensor = first = first_tensor(output)
        if tensor is not None and tensor.is_quantized:
            raise ValueError(quantized_in(self.model))
        if tensor is None or tensor.ndim < 3 or not tensor.is_floating_point():
            got = f"shape {tuple(tensor.shape)}" if tensor is not None else type(output).__name__
            raise ValueError(
                f"expected a layer that yields (b, c, h, w) with h*w > 1, got {got} from {name!r}; choose another"
            )
        calls = self.calls[name]
        self.watch.passed(module, inputs, tensor)
        layout = self._layout_of(name, tensor)
        before = len(calls)
        calls += [tuple(tensor.shape[1:])] * layout.fold  # the images of a pair, one batch behind the other
        call = self.call or 0
        if not before <= call < len(calls):
            return None
        layout = replace(layout, part=call - before)
        torch.set_grad_enabled(True)  # from here to the logits; the caller's no_grad ends it
        if not tensor.requires_grad:
            tensor = tensor.detach().clone().requires_grad_()
        self.read[name] = Captured(name, tensor, layout, call)
        assert first is not None
        self.recording.mark(name, first)
        handed = tensor.clone()  # an in-place activation behind the layer must not rewrite what was captured
        self.recording.alias(handed, first)
        return tree_map(lambda value: handed if value is first else value, output)

    def _layout_of(self, name: str, tensor: Tensor) -> Layout:
        """Where the positions are in a layer's tensor: as tracked, else by the shapes of images and convolutions.

        Raises:
            ValueError: the tensor has no positions, or not one row for each image.
        """
        positions, shape = self.watch.positions, tuple(tensor.shape)
        if (layout := positions.layout(tensor)) is not None:
            return layout
        if shape[0] != len(self.images):
            raise ValueError(
                f"expected a layer that yields one row for each of {len(self.images)} images, got {shape[0]} rows, "
                f"shape {shape}, from {name!r}; choose another"
            )
        layout = _guess(tensor, self.images, self.grids) if positions.of(tensor) is None else None
        if layout is None:
            is_pooled = len(shape) > 2 and math.prod(shape[2:]) == 1
            raise ValueError(
                f"expected a layer that yields (b, c, h, w) with h*w > 1, or one token per patch, got shape {shape} "
                f"from {name!r}, {'which has one position' if is_pooled else 'whose positions are unknown'}; choose "
                f"{'an earlier one' if is_pooled else 'another'}"
            )
        self.notices[guess_of(name, tensor, layout)] = None
        return layout

    def _see_grid(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        with unseen():
            self.grids.append(tuple(output.shape[2:]))

    def _keep_gate(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if not isinstance(output, Tensor):
            return
        dims = self.watch.positions.of(output)
        axes = self.images.ndim - 2
        if dims is not None and output.ndim == 3 and axes == 2:  # (b, queries, keys): what the keys receive
            if dims[1].has_axis:
                output, dims = output.mean(1, keepdim=True), (dims[0], other(1), dims[2])
        layout = None if dims is None else layout_in(dims, axes)
        self._keep_map(name, output if layout is None else layout.maps(output))

    def _keep_map(self, name: str, maps: Tensor) -> None:
        if maps.ndim == self.images.ndim:
            if name in self.gates:
                raise ValueError(f"expected an attention block that runs once, got {name!r}, which runs twice")
            self.gates[name] = maps.clone() if self.scorer.differentiable else maps.detach().clone()


def _guess(tensor: Tensor, images: Tensor, grids: Sequence[tuple[int, ...]]) -> Layout | None:
    """A guess by the images' shape, however stretched, and the grids of the convolutions before the layer."""
    size, shape = tuple(images.shape[2:]), tuple(tensor.shape)
    if tensor.ndim == images.ndim:
        return guessed(shape, size) or (Layout(shape[2:]) if math.prod(shape[2:]) > 1 else None)
    if tensor.ndim == 3:
        fitting = [grid for grid in grids if 0 <= shape[1] - math.prod(grid) <= MANY_REGISTERS]
        fitting.sort(key=math.prod)  # a convolution that only shortens the keys leaves more tokens over
        for grid in [*fitting[-1:], *grids_like(shape[1], size, MANY_REGISTERS)]:
            if math.prod(grid) > 1:
                return tokens_of(shape[1], grid)
    return None
