"""The networks whose maps a page shows: each with its input, its methods and what the first images decided."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from sightline import maps, models, runs
from sightline.data import Preprocess
from sightline.data.files import Picture, decode_pictures
from sightline.data.images import File
from sightline.explainers import EXPLAINERS, FAST, Explanation, explain, fitting
from sightline.explainers.selection import unsuited
from sightline.facts import Progress, did_you_mean
from sightline.inference import Output, check_names, forward_call, normalized
from sightline.report.parts import POOLINGS, PartMaps, attention_and_parts

_DIGITS, _SHOWN = 19, 60  # letters of an index, and of a name in an error
Network = nn.Module | str | Path
"""A classifier, or the folder of a run."""


class Explained(NamedTuple):
    """What one network gives for a batch."""

    explanation: Explanation
    parts: dict[str, PartMaps]
    """Method -> the maps of its block, if that has several."""

    def picture(self, method: str, place: int) -> UInt8[Tensor, "1 3 h w"] | None:
        """The maps of a block with several in color; None for other methods."""
        if method not in self.parts:
            return None
        part = self.parts[method]
        return maps.parts(part.maps[place, None].float(), part.norms[place, None].float()).cpu()


@dataclass
class ExplainedNetwork:
    """A model, how images become its input, and what the first images decided."""

    model: nn.Module
    preprocess: Preprocess
    classes: Sequence[str]
    name: str
    is_run: bool
    methods: Sequence[str]
    target: int | None
    every: tuple[str, ...]
    """All methods that are to be tried, where they were not named."""
    notices: tuple[str, ...]
    prefix: str = ""
    """In front of its methods, where there are several networks."""
    output: Output = None
    left_out: dict[str, str] = field(default_factory=dict[str, str])

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next((parameter.device for parameter in self.model.parameters()), torch.device("cpu"))

    def asked(self) -> Sequence[str]:
        """The methods that are asked for, before those that do not fit are left out."""
        return self.every or self.methods

    def label(self, method: str) -> str:
        """A method, with the network's name where there are several."""
        return f"{self.prefix}{method}"

    def decoder(self, longest: int, max_pixels: int) -> Callable[[Sequence[File]], list[Picture | str]]:
        """Reads files as the network's input and as they are shown."""
        return partial(
            decode_pictures,
            size=self.preprocess.size,
            longest=longest,
            max_pixels=max_pixels,
            crop=self.preprocess.crop,
            interpolation=self.preprocess.interpolation,
        )

    def inputs(self, images: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        """Images of its size as the network takes them."""
        return normalized(self.model, images, self.preprocess)

    def settle(self, inputs: Tensor, layer: str | None, output: Output, strict: bool) -> list[str]:
        """Decide, on the first images, what the output is and which methods fit; what to tell about it."""
        call, notice = forward_call(inputs, output).settled(self.model, inputs)
        self.output = call.output
        given: dict[str, Any] = {"targets": self.target, "layer": layer, "output": self.output}
        if self.every:
            self.methods, self.left_out = fitting(self.model, inputs, self.every, **given)
        else:
            self.left_out = unsuited(self.model, inputs, self.methods, strict, **given)
            self.methods = [method for method in self.methods if method not in self.left_out]
        return [notice] if notice else []

    def explain(
        self, inputs: Tensor, layer: str | None, progress: Progress | None, sizes: Mapping[str, Any]
    ) -> Explained:
        """The maps of all methods, and those of a block with several."""
        chosen: dict[str, Any] = {"output": self.output, "progress": progress, **sizes}
        explanation = explain(self.model, inputs, self.target, self.methods, layer, **chosen)
        check_names(self.classes, explanation.logits)
        blocks = {
            method: explanation.layers[method].name
            for method in explanation.maps
            if method.partition("@")[0] == "attention"
        }
        if not any(isinstance(module, POOLINGS) for module in self.model.modules()) or not blocks:
            return Explained(explanation, {})
        parts = attention_and_parts(self.model, inputs)[1]
        return Explained(explanation, {method: parts[block] for method, block in blocks.items() if block in parts})


def network_of(
    model: Network,
    methods: Sequence[str],
    target: int | str | None,
    preprocess: Preprocess | None,
    whole: bool,
    classes: Sequence[str],
    name: str | None,
    is_file: bool,
) -> ExplainedNetwork:
    """A network as `pages` was given it; `is_file`: for image files, so that it is told how they become its input."""
    is_run = not isinstance(model, nn.Module)
    if is_run:
        run = runs.open_run(model)
        name = name or run.recipe.model.name.removeprefix(runs.OWN)
        model, preprocess, classes = runs.load_model(model).to(runs.best_device()), run.preprocess, run.classes
    is_of_model = preprocess is None
    preprocess = preprocess or models.preprocess_of(model)
    if whole:
        preprocess = replace(preprocess, crop=None)
    notices: tuple[str, ...] = ()
    if is_of_model and is_file:
        other = "; whole=True (--whole) takes all of each image" if preprocess.crop else ""
        notices = (f"images are {preprocess}{other}",)
    return ExplainedNetwork(
        model=model,
        preprocess=preprocess,
        classes=classes,
        name=name or type(model).__name__,
        is_run=is_run,
        methods=methods,
        every={"all": tuple(EXPLAINERS), "fast": FAST}.get(methods[0] if len(methods) == 1 else "", ()),
        target=class_index(target, classes),
        notices=notices,
    )


def methods_of(methods: Sequence[str] | Sequence[Sequence[str]], count: int) -> list[Sequence[str]]:
    """The methods of each network."""
    lists = [method for method in methods if not isinstance(method, str)]
    if not lists:
        return [[method for method in methods if isinstance(method, str)]] * count
    if len(lists) != count or len(lists) != len(methods):
        raise ValueError(f"expected methods for all networks, or a list for each of {count}, got {len(lists)} lists")
    return lists


def name_apart(networks: Sequence[ExplainedNetwork], given: Sequence[Network]) -> None:
    """Name several networks by their folders, as far as these differ, and put the name in front of their methods."""
    if len(networks) < 2:
        return
    paths = [
        Path(one).resolve().parts if isinstance(one, str | Path) else (network.name,)
        for one, network in zip(given, networks, strict=True)
    ]
    depth = next((n for n in range(1, 9) if len({path[-n:] for path in paths}) == len(paths)), 0)
    for number, (network, path) in enumerate(zip(networks, paths, strict=True), 1):
        network.name = "/".join(path[-depth:]) if depth else f"{number}: {network.name}"
        network.prefix = f"{network.name}: "


def class_index(target: int | str | None, classes: Sequence[str]) -> int | None:
    """A class by its name, or else by its index."""
    if target is None or isinstance(target, int):
        return target
    if target in classes:
        return list(classes).index(target)
    if target.removeprefix("-").isdecimal() and len(target) < _DIGITS:
        return int(target)
    names = f"one of {len(classes)} classes such as {', '.join(classes[:3])}"
    raise ValueError(
        f"expected the target class by name or index, {names if classes else 'an index, there are no names'}, "
        f"got {target[:_SHOWN]!r}{did_you_mean(target, classes)}"
    )
