"""What the server does with pictures, without HTTP: predictions, maps, curves and the facts of one model."""

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn

from sightline import maps, models, runs
from sightline.data import ImageSet, Preprocess
from sightline.data.images import MAX_PIXELS, open_mask, open_picture, quiet
from sightline.explainers import EXPLAINERS, Explainer, Explanation, explain, find_explainer, fitting, named
from sightline.explainers.drawing import packed, sized
from sightline.facts import Layer, Progress, Verdict, notice
from sightline.inference import SHOWN, answers, check_names, forward_call
from sightline.inference.operations import first_tensor
from sightline.report.networks import Explained, ExplainedNetwork, Network, class_index, network_of

SAMPLES = 200
"""Test images of a run that are offered."""
CONTROLS = tuple(name for name, explainer in EXPLAINERS.items() if explainer.is_control)
FILLS = ("blur", "mean")
_AT_ONCE = 16  # images explained together
_BEST = 5  # classes of a prediction


class Picture(NamedTuple):
    """An image as the model takes it and as it is shown."""

    name: str
    image: UInt8[Tensor, "3 h w"]
    """At the model's size."""
    shown: UInt8[Tensor, "3 _ _"]
    sample: int | None = None
    """Its index among the samples, if it is one."""


class Method(NamedTuple):
    """What is known of an explainer for the model."""

    name: str
    explainer: Explainer
    reason: str | None
    """Why it does not work; None if it does."""

    @property
    def summary(self) -> str:
        """The first line of its docstring."""
        return (self.explainer.formula.__doc__ or "").strip().splitlines()[0]


class Asked(NamedTuple):
    """Images to explain, and how."""

    pictures: Sequence[Picture]
    methods: tuple[str, ...]
    target: int | None
    """None: the predicted class of each."""
    layer: str | None


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """One map of one image."""

    method: str
    layer: Layer
    values: Float[np.ndarray, "h w"]
    """The raw map."""
    parts: Float[np.ndarray, "k h w"] | None
    """The maps of a block with several."""
    colored: UInt8[Tensor, "3 _ _"]
    """At the size of the image as it is shown."""
    is_signed: bool
    ends: tuple[float, float] | None
    """What the first and the last color stand for."""
    verdicts: Sequence[Verdict]
    is_unchecked: bool
    seconds: float
    """Of the call that made it, with all methods and images that shared it."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The maps of one image."""

    picture: Picture
    probabilities: Float[Tensor, " classes"]
    target: int
    maps: Sequence[Drawn]


class Answers(NamedTuple):
    """The maps of several images."""

    images: Sequence[Answer]
    notices: tuple[str, ...]


class Curve(NamedTuple):
    """The score of one image along deletion or insertion."""

    metric: str
    method: str
    is_control: bool
    shares: list[float]
    """Of the pixels that are removed or inserted."""
    scores: list[float]
    area: float


@dataclass(kw_only=True)
class Service:
    """A model, how images become its input, and what is known of it."""

    network: ExplainedNetwork
    lines: Sequence[str]
    """Python that makes `model`, `preprocess` and `classes`."""
    samples: ImageSet | None = None
    methods: dict[str, Method] = field(default_factory=dict[str, Method])
    layers: list[Layer] = field(default_factory=list[Layer])
    default_layer: str = ""
    count: int = 0
    """Number of classes."""

    @property
    def device(self) -> str:
        """Where the model is."""
        return str(self.network.device)

    @property
    def preprocess(self) -> Preprocess:
        """How an image becomes the input."""
        return self.network.preprocess

    def class_name(self, index: int) -> str:
        """The name of a class, or its number."""
        return self.network.classes[index] if index < len(self.network.classes) else str(index)

    def try_out(self, progress: Progress | None = None) -> None:
        """Fill in what is known only after the model has run: methods that fit, layers, number of classes.

        Raises:
            ValueError: no method fits.
        """
        image = torch.rand(1, 3, *self.preprocess.size, generator=torch.Generator().manual_seed(0))
        inputs = self.inputs([(255 * image[0]).to(torch.uint8)])
        call, decision = forward_call(inputs, None).settled(self.network.model, inputs)
        notices = (*self.network.notices, decision) if decision else self.network.notices
        self.network = replace(self.network, output=call.output, notices=notices)
        _, reasons = fitting(self.network.model, inputs, output=call.output, progress=progress)
        self.methods = {name: Method(name, explainer, reasons.get(name)) for name, explainer in EXPLAINERS.items()}
        probabilities = self.probabilities(inputs)
        check_names(self.network.classes, probabilities)
        self.count = probabilities.shape[1]
        self.layers, self.default_layer = _layers(self.network, inputs)

    def read(self, name: str, content: bytes, max_pixels: int = MAX_PIXELS) -> Picture:
        """Decode an image file as the command line does.

        Raises:
            UnreadableImage: not an image, cut off, or of too many pixels.
        """
        seen = self.preprocess
        with quiet():
            image, shown = open_picture(content, seen.size, SHOWN, max_pixels, seen.crop, seen.interpolation)
        pixels, picture = (torch.from_numpy(array).movedim(-1, 0) for array in (image, shown))
        return Picture(name, pixels, sized(picture, SHOWN))

    def sample(self, index: int) -> Picture:
        """One of the run's test images.

        Raises:
            IndexError: there is none with that index.
        """
        count = len(self.sample_names())
        if self.samples is None or not 0 <= index < count:
            raise IndexError(f"expected a sample below {count}, got {index}; see /samples")
        image = self.samples[index].images[0].cpu()
        return Picture(self.samples.names[index], image, sized(image, SHOWN), index)

    def sample_names(self) -> list[tuple[str, str]]:
        """Name and class of each sample."""
        if self.samples is None:
            return []
        labels = self.samples.labels[:SAMPLES].tolist()
        return [
            (name, self.samples.classes[label] if label >= 0 else "")
            for name, label in zip(self.samples.names, labels, strict=False)
        ]

    def inputs(self, images: Sequence[UInt8[Tensor, "3 h w"]]) -> Float[Tensor, "b 3 h w"]:
        """Images as the model takes them."""
        return self.network.inputs(torch.stack(list(images)))

    def probabilities(self, inputs: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b classes"]:
        """Of each class."""
        return answers(self.network.model, inputs, call=forward_call(inputs, self.network.output))[1].cpu()

    def best(self, probabilities: Float[Tensor, " classes"]) -> list[tuple[int, float]]:
        """The most probable classes, and how probable they are."""
        values, indices = probabilities.topk(min(_BEST, len(probabilities)))
        return [*zip(indices.tolist(), values.tolist(), strict=True)]

    def target(self, text: str) -> int | None:
        """A class by name or index; None for an empty text.

        Raises:
            ValueError: there is no such class.
        """
        index = class_index(text, self.network.classes) if text else None
        if index is not None and not 0 <= index < self.count:
            raise ValueError(f"expected a target class in 0..{self.count - 1}, got {index}; see /classes")
        return index

    def chosen(self, names: Sequence[str]) -> tuple[str, ...]:
        """The methods of these names, each once.

        Raises:
            ValueError: there is no such method, or it does not work on the model.
        """
        for name in names:
            base = find_explainer(name.partition("@")[0]).name
            if (reason := self.methods[base].reason) and "@" not in name:
                raise ValueError(f"expected a method that works on this model, got {name}: {reason}; see /methods")
            named(name)
        return tuple(dict.fromkeys(names))

    def explain(self, asked: Asked, progress: Progress | None = None) -> Answers:
        """The maps of images, as `sightline.explain` makes them.

        Raises:
            ValueError: there is no such layer, or a method does not work on it.
        """
        network = replace(self.network, methods=asked.methods, target=asked.target)
        is_slow = any(named(method)[1].many_passes for method in asked.methods)
        at_once, total = 1 if is_slow else _AT_ONCE, len(asked.pictures)
        images: list[Answer] = []
        notices = dict.fromkeys(network.notices)
        for start in range(0, total, at_once):
            part = asked.pictures[start : start + at_once]
            if progress is not None:
                progress("explaining", start, total)
            begun = time.perf_counter()
            explained = network.explain(self.inputs([picture.image for picture in part]), asked.layer, progress, {})
            seconds = time.perf_counter() - begun
            notices |= dict.fromkeys(explained.explanation.notices)
            images += [_answer(explained, place, picture, seconds) for place, picture in enumerate(part)]
        return Answers(images, tuple(notices))

    def code(self, asked: Asked) -> str:
        """Python that makes the same maps."""
        samples = [picture.sample for picture in asked.pictures if picture.sample is not None]
        if samples:
            read = f'images = data.load(run.recipe.data)["test"].batch({samples}).images'
        else:
            names = [picture.name for picture in asked.pictures]
            read = f"images = data.read_images({names}, preprocess).batch(range({len(names)})).images"
        options = [f"methods={[*asked.methods]}"]
        options += [f"targets={asked.target}"] if asked.target is not None else []
        options += [f"layer={asked.layer!r}"] if asked.layer is not None else []
        lines = [
            "import sightline as sl",
            "from sightline import data, models, runs",
            "",
            *self.lines,
            read,
            "inputs = data.normalize(images, preprocess)",
            f"explanation = sl.explain(model, inputs, {', '.join(options)})",
        ]
        return "\n".join([*lines, *(f"explanation[{method!r}]" for method in asked.methods)])

    def mask(self, content: bytes, picture: Picture, max_pixels: int = MAX_PIXELS) -> Bool[Tensor, "h w"]:
        """The white part of an image file as large as a picture is shown, at the model's size.

        Raises:
            UnreadableImage: it cannot be decoded, or has another size.
        """
        height, width = picture.shown.shape[1:]
        with quiet():
            return torch.from_numpy(open_mask(content, self.preprocess.size, (height, width), max_pixels=max_pixels))

    def predict(
        self, picture: Picture, hidden: Bool[Tensor, "h w"] | None = None, fill: str = "blur"
    ) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
        """The most probable classes of an image, and of the image with a part replaced by `fill`."""
        from sightline.metrics.perturbed import substitute

        inputs = self.inputs([picture.image])
        if hidden is None:
            hidden = torch.zeros(self.preprocess.size, dtype=torch.bool)
        filled = substitute(inputs, fill).where(hidden.to(inputs.device), inputs)
        before, after = self.probabilities(torch.cat([inputs, filled]))
        return self.best(before), self.best(after)

    def measure(self, asked: Asked, progress: Progress | None = None) -> list[Curve]:
        """Insertion and deletion curve of one image, for the methods and the controls.

        Raises:
            ValueError: as `explain`.
        """
        from sightline.metrics import METRICS
        from sightline.metrics.perturbed import Perturbation
        from sightline.metrics.together import measure

        (picture,) = asked.pictures
        methods = tuple(dict.fromkeys((*asked.methods, *CONTROLS)))
        inputs = self.inputs([picture.image])
        network = replace(self.network, methods=methods, target=asked.target)
        explanation: Explanation = network.explain(inputs, asked.layer, progress, {}).explanation
        chosen = {name: METRICS[name] for name in ("insertion_auc", "deletion_auc")}
        measured = measure(
            chosen,
            {method: explanation[method] for method in methods},
            model=network.model,
            images=inputs,
            targets=explanation.targets,
            perturbation=Perturbation(output=network.output),
            progress=progress,
        )
        return [
            Curve(
                metric.removesuffix("_auc"),
                method,
                named(method)[1].is_control,
                measured.fields[method]["fractions"][0].tolist(),
                measured.fields[method][metric.removesuffix("_auc")][0].tolist(),
                float(measured.values[method, metric][0]),
            )
            for metric in chosen
            for method in methods
        ]


def open_service(
    model: Network,
    weights: str | Path | None = None,
    classes: str | Path | Sequence[str] | None = None,
    *,
    preprocess: Preprocess | None = None,
    whole: bool = False,
    progress: Progress | None = None,
) -> Service:
    """The service of a model, which is tried out.

    Args:
        model: a run folder, a network by name, or a module.
        weights: those of a network by name: a file, or "pretrained".
        classes: the file with the class names of a network by name, or the class names of a module.
        preprocess: how an image becomes the input. None: as in the run, or see `models.preprocess_of`.
        whole: resize all of each image, whatever its shape.
        progress: called with (what, done, total).

    Raises:
        OSError: a file is missing.
        ValueError: the weights do not fit, or no method works on the model.
    """
    name, samples = None, None
    names = [] if classes is None or isinstance(classes, str | Path) else [*classes]
    is_by_name = not isinstance(model, nn.Module) and not Path(model).is_dir()
    if not is_by_name and (weights or (classes and not names)):
        given = "a module" if isinstance(model, nn.Module) else "a run folder"
        raise ValueError(f"expected --weights and --classes only with the name of a model, got {given}; leave them out")
    if isinstance(model, nn.Module):
        lines = ["model = ...  # yours"]
    elif Path(model).is_dir():
        samples = _samples(runs.open_run(model))
        lines = [f"run, model = runs.open_run({str(model)!r}), sl.load({str(model)!r})"]
    else:
        name, file = str(model), None if classes is None else str(classes)
        named_files = ", ".join(repr(str(one)) for one in (name, weights, file) if one is not None)
        lines = [f"model, classes = models.named_model({named_files})"]
        model, names = models.named_model(name, weights, file)
        model = model.to(runs.best_device())
    network = network_of(model, (), None, preprocess, whole, names, name, is_file=True)
    service = Service(network=network, lines=[*lines, f"preprocess = data.{network.preprocess!r}"], samples=samples)
    service.try_out(progress)
    return service


def _samples(run: runs.Run) -> ImageSet | None:
    """The run's test images, if they are still there."""
    from sightline.report.run_evaluation import images_of

    try:
        return images_of(run, "test", {})[0]
    except (OSError, ValueError) as error:
        notice(f"no test images are offered: {error}")
    return None


def _layers(network: ExplainedNetwork, inputs: Float[Tensor, "1 3 h w"]) -> tuple[list[Layer], str]:
    """Blocks whose output has positions, by name in the order in which they run, and the automatic layer."""
    outputs: dict[str, int] = {}
    kept: list[Any] = []

    def keep(name: str) -> Any:
        def hook(module: nn.Module, given: Any, output: Any) -> None:
            tensor = first_tensor(output)
            if tensor is not None and tensor.ndim > 2:
                kept.append(tensor)  # so that no other gets its id
                outputs[name] = id(tensor)

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in network.model.named_modules() if name]
    try:
        answers(network.model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    by_tensor: dict[int, str] = {}
    for name, tensor in outputs.items():  # of modules that return the same tensor, the outermost one
        by_tensor[tensor] = min(by_tensor.get(tensor, name), name, key=lambda one: one.count("."))
    modules = dict(network.model.named_modules())
    blocks = [name for name in by_tensor.values() if any([*part.parameters()] for part in modules[name].children())]
    found: list[Layer] = []
    automatic = _read(network, inputs, None)
    for name in blocks if len(blocks) > 1 else by_tensor.values():
        layer = _read(network, inputs, name)
        if layer is not None:
            found.append(layer)
    if automatic is not None and automatic.name not in [layer.name for layer in found]:
        found.append(automatic)
    return found, "" if automatic is None else automatic.name


def _read(network: ExplainedNetwork, inputs: Tensor, layer: str | None) -> Layer | None:
    """A layer as it is read for maps; None if it cannot be."""
    with suppress(ValueError, RuntimeError):
        return explain(network.model, inputs, 0, ["activation_map"], layer, output=network.output).layer
    return None


def _answer(explained: Explained, place: int, picture: Picture, seconds: float) -> Answer:
    explanation = explained.explanation
    drawn: list[Drawn] = []
    height, width = picture.shown.shape[1:]
    for method, values in explanation.maps.items():
        explainer = named(method)[1]
        raw = values[place, :1].float().cpu()
        parts = explained.picture(method, place)
        colored = (
            maps.overlay(picture.shown[None], raw[None], 1.0, explainer.is_signed)[0, 0]
            if parts is None
            else maps.resize(parts.float(), (height, width))[0].round().clamp(0, 255).to(torch.uint8)
        )
        drawn.append(
            Drawn(
                method=method,
                layer=explanation.layers[method],
                values=raw[0].numpy(),
                parts=None if parts is None else explained.parts[method].maps[place].float().cpu().numpy(),
                colored=colored,
                is_signed=explainer.is_signed,
                ends=maps.ends(raw[0], explainer.is_signed),
                verdicts=explanation.verdicts[method][place],
                is_unchecked=method in explanation.unchecked,
                seconds=seconds,
            )
        )
    return Answer(
        picture=picture,
        probabilities=explanation.probabilities[place].cpu(),
        target=int(explanation.targets[place, 0]),
        maps=drawn,
    )


def raw_maps(drawn: Sequence[Drawn]) -> bytes:
    """The raw maps of one image as `sightline explain` writes them: method -> (h, w) in a .npz file."""
    raw: dict[str, np.ndarray] = {}
    for one in drawn:
        raw[one.method] = one.values
        if one.parts is not None:
            raw[f"{one.method} parts"] = one.parts
    return packed(raw)
