"""Explainers: formulas over evidence, and the one way from a model and images to their maps."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from functools import cached_property, update_wrapper
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from sightline import arguments, maps, notebook
from sightline.data import Preprocess
from sightline.explainers import drawing
from sightline.explainers.capture import LayerLike, has_known_plan, is_known_code
from sightline.explainers.evidence import GUIDED, Evidence, Settings, gather
from sightline.explainers.scorer import Targets
from sightline.explainers.tokens import SmoothAttention
from sightline.explainers.verdicts import Compared, Doubts, Map
from sightline.facts import Layer, Progress, Verdict, current_name
from sightline.files import write
from sightline.inference import (
    ForwardCall,
    Images,
    Inputs,
    Memory,
    Output,
    classes_of,
    exact,
    forward_call,
    inputs_of,
    untouched,
    unwrapped,
    version_of,
)
from sightline.targets import name_of

_SHOWN = 8  # most images that are shown unasked
_TALLEST = 65_000  # pixels; no JPEG can be taller than 65,500
_FIELDS = [field.name for field in fields(Evidence)]
_SAME_FOR_ALL_CLASSES = {"images", "targets", "activations", "gate", "layer"}


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Maps of a batch, with what was explained and where. `explanation["grad_cam"]` is the raw map."""

    maps: dict[str, Float[Tensor, "b t ..."]]
    """Raw float32 maps by method; larger = more important; `method@layer` where several layers were asked for."""
    targets: Int[Tensor, "b t"]
    """Class indices; -1 where a function made the score."""
    target: str = ""
    """The function that made the score, such as `Region(label=2)`; empty for classes."""
    logits: Float[Tensor, "b n"]
    """Two classes of a single logit z: -z/2 and z/2, whose softmax is its sigmoid; the scores that a function made.
    Logarithms of probabilities that have no logits."""
    probabilities: Float[Tensor, "b n"]
    """Of each class, or of each label on its own, as the model has it; where a function made the scores, the scores."""
    layers: dict[str, Layer]
    """Where each map was read: name and shape, for example `features.conv13 (128 x 5 x 5)`; empty for controls."""
    notices: tuple[str, ...] = ()
    """Decisions about the model that you may want to change, one sentence each: how its output was read, where a
    layer's positions were guessed."""
    signed: tuple[str, ...] = ()
    """Maps whose negative values speak against the class."""
    controls: tuple[str, ...] = ()
    """Maps that were made without looking at what the model does."""
    classes: tuple[str, ...] = ()
    """Names of the classes, where they are known: the model's attribute `classes`, as `sightline.load` sets it, or
    ImageNet's for a network of timm with its 1,000 classes."""
    images: tuple[UInt8[Tensor, "3 _ _"], ...] = ()
    """The images as they look, each in its own shape; empty where they were given normalized."""
    names: tuple[str, ...] = ()
    """Names of the image files."""
    doubts: dict[str, Doubts]
    """What the verdicts on each map are made from."""

    @cached_property
    def _rows(self) -> dict[str, list[list[float]]]:
        """The signs of all maps, asked from the device in one go."""
        signs = torch.stack([doubts.signs() for doubts in self.doubts.values()])
        return dict(zip(self.doubts, signs.tolist(), strict=True))

    @cached_property
    def verdicts(self) -> dict[str, list[list[Verdict]]]:
        """For each method and image the reasons to distrust its map; an empty list says that there are none.

        They are strings with a `level`: "note", "doubt" or "do not read".
        """
        return {name: self.doubts[name].verdicts(rows) for name, rows in self._rows.items()}

    @cached_property
    def unchecked(self) -> tuple[str, ...]:
        """Maps that were not compared with those of another class in every image.

        That would have taken another backward or two: a missing `class-independent` says nothing there. Ask for two
        targets to compare.
        """
        return tuple(name for name, rows in self._rows.items() if not all(row[-1] for row in rows))

    def __repr__(self) -> str:
        places = {name: f" at {layer}" if layer else "" for name, layer in self.layers.items()}
        shapes = ", ".join(f"{name} {tuple(value.shape)}{places[name]}" for name, value in self.maps.items())
        return f"Explanation({shapes}{f' of {self.target}' if self.target else ''})"

    def _repr_html_(self) -> str:
        return self._html(None)

    def _html(self, rows: Sequence[int] | None) -> str:
        count = len(self.targets)
        shown = range(min(count, _SHOWN)) if rows is None else rows
        figure = drawing.figure_of(self, shown)
        texts = {0: drawing.text_of(self, shown)}
        image = "".join(
            notebook.picture(drawing.jpeg(part), texts.get(i, ""), figure.shape[2])
            for i, part in enumerate(figure.split(_TALLEST, 1))
        )
        left_out = f"These are {len(shown)} of {count} images: show([{count - 1}]) shows the last, save() writes all."
        return image + notebook.sentences([*self.notices, *([left_out] if len(shown) < count and rows is None else ())])

    def show(self, rows: Sequence[int] | None = None) -> None:
        """Show the maps in a notebook, as an explanation at the end of a cell shows itself; each image is a row.

        In a terminal it prints how to write them into a file.

        Args:
            rows: which images, counted from 0. None: the first eight.

        Raises:
            ValueError: there is no such image, or none is asked for.
        """
        if not notebook.in_notebook():
            print(f"{self}\nPictures are shown in notebooks; here, write a file: explanation.save('maps.png')")
            return
        from IPython.display import HTML, display

        display(HTML(self._html(rows)))

    def save(
        self, path: str | Path, rows: Sequence[int] | None = None, captions: Mapping[str, str] | None = None
    ) -> Path:
        """Write the maps, the whole file or none of it.

        A .png is what `show` shows. An .npz holds the raw maps by method, as those of `sightline explain`: (h, w) if
        one image and one target are explained, and otherwise as they are in `maps`.

        Args:
            path: a name that ends in .png or .npz.
            rows: which images, counted from 0. None: all.
            captions: method -> further words below its maps, in a .png.

        Raises:
            ValueError: another ending, no such image, or in a .png no such method.
            OSError: the file cannot be written.
        """
        path = Path(path)
        if path.suffix.lower() not in (".png", ".npz"):
            raise ValueError(f"expected a file name that ends in .png or .npz, got {path}; choose one of them")
        if path.suffix.lower() == ".png":
            write(path, maps.png(drawing.figure_of(self, rows, captions)))
            return path
        chosen = [*drawing.rows_of(self, rows)]
        raw = {name: value[chosen].detach().float().cpu().numpy() for name, value in self.maps.items()}
        is_single = len(chosen) == self.targets.shape[1] == 1
        write(path, drawing.packed({name: value[0, 0] if is_single else value for name, value in raw.items()}))
        return path

    @property
    def layer(self) -> Layer:
        """Where the first map was read that has a layer."""
        return next((layer for layer in self.layers.values() if layer), Layer())

    def __getitem__(self, key: str | tuple[str, str]) -> Float[Tensor, "b t ..."]:
        name = "@".join(key) if isinstance(key, tuple) else key
        if name not in self.maps:
            raise KeyError(f"expected one of {', '.join(self.maps)}, got {name!r}; name it in methods= of explain")
        return self.maps[name]

    def resized(self, size: tuple[int, ...]) -> "Explanation":
        """The same explanation with every map at another size (height, width; of volumes depth, height, width)."""
        return replace(self, maps={name: maps.resize(value, size) for name, value in self.maps.items()})


class Explainer:
    """A formula over evidence, callable on a model: `(model, images, targets=None, layer=None) -> (b, t, h, w)`.

    The formula's parameters without default name the fields of `Evidence` that it reads; the others are its options.
    It returns the maps, or a `Map`. `@partial(Explainer, is_signed=True)` says that negative values of the map speak
    against the target, `sums_to_score=True` that it should add up to the explained score, `ignores_class=True` that it
    is the same for all classes though it reads something that does not show this, and `many_passes=True` that it runs
    the model on many changed images.
    """

    def __init__(
        self,
        formula: Callable[..., Float[Tensor, "b t ..."] | Map],
        *,
        is_signed: bool = False,
        sums_to_score: bool = False,
        ignores_class: bool = False,
        many_passes: bool = False,
    ) -> None:
        update_wrapper(self, formula)
        self.name = formula.__name__
        self.formula: Callable[..., Any] = formula
        self.is_signed = is_signed
        """Whether 0 is the middle of the map: above it speaks for the target, below against it."""
        self.sums_to_score = sums_to_score
        """Whether the map distributes the score (less that of its baseline) over the pixels; a gap is a verdict."""
        self.many_passes = many_passes
        """Whether it runs the model on many changed images for a map, in batches; all others take a few passes."""
        arguments.check_needs(formula, _FIELDS, "fields of Evidence")
        self.parameters = arguments.needs(formula)
        """Fields of `Evidence`, as the formula calls them."""
        self.needs = frozenset(map(current_name, self.parameters))
        self.options = arguments.options(formula)
        self.is_blind_to_class = ignores_class or self.needs <= _SAME_FOR_ALL_CLASSES
        """Whether the map is the same for all classes by construction."""
        self.__signature__ = arguments.signature_with_options(type(self).__call__, formula)

    def __repr__(self) -> str:
        return f"<Explainer {self.name}>"

    @property
    def is_control(self) -> bool:
        """Whether the map is made without looking at what the model does."""
        return self.needs <= {"images", "targets"}

    def __call__(
        self,
        model: nn.Module,
        images: Images,
        targets: Targets = None,
        layer: LayerLike = None,
        *,
        preprocess: Preprocess | None = None,
        output: Output = None,
        forward_args: Any = (),
        forward_kwargs: Mapping[str, Any] | None = None,
        call: int | None = None,
        batch_size: int = 64,
        memory: Memory = None,
        progress: Progress | bool | None = None,
        **options: Any,
    ) -> Float[Tensor, "b t *cells"]:
        """The map that `explain` makes, alone: raw, per target, at the layer's own resolution, float32 or float64."""
        inputs = inputs_of(model, images, preprocess)
        request = Request(self.name, self, arguments.checked_options(self.formula, options, self.name), layer)
        forward = forward_call(inputs.images, output, forward_args, forward_kwargs)
        settings = Settings(call=call, batch_size=batch_size, memory=memory, progress=notebook.bar_of(progress))
        return explanation_of(model, inputs, targets, [request], forward, settings)[self.name]

    def map_of(self, evidence: Evidence, **options: Any) -> Map:
        """The formula on evidence that is already there.

        Raises:
            ValueError: it returns something else than one map per target.
            RuntimeError: it changes evidence in place, which other formulas read.
        """
        given = {name: getattr(evidence, current_name(name)) for name in self.parameters}
        versions = {name: version_of(value) for name, value in given.items() if isinstance(value, Tensor)}
        score = evidence.score
        device = evidence.images.device.type
        autocast = torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
        still = untouched(score.model) if "score" in self.needs else nullcontext()
        smooth = SmoothAttention() if "score" in self.needs and score.differentiable else nullcontext()
        with still, smooth, autocast, torch.inference_mode(False), torch.set_grad_enabled(score.differentiable):
            result = self.formula(**given, **options)
        if changed := [name for name, version in versions.items() if version_of(given[name]) != version]:
            raise RuntimeError(
                f"expected a formula that leaves its evidence alone, got {self.name}, which changes {changed[0]!r} in "
                "place; change a clone"
            )
        made = result if isinstance(result, Map) else Map(values=result)
        values: Any = made.values
        shape, dimensions = tuple(evidence.targets.shape), evidence.images.ndim
        is_tensor = isinstance(values, Tensor)
        if not is_tensor or not values.is_floating_point() or values.ndim != dimensions or values.shape[:2] != shape:
            got = f"{values.dtype} of shape {tuple(values.shape)}" if is_tensor else type(values).__name__
            sides = ", ".join("dhw"[5 - dimensions :])
            raise ValueError(f"expected float maps ({shape[0]}, {shape[1]}, {sides}) from {self.name}, got {got}")
        is_kept = values.dtype in (torch.float32, torch.promote_types(evidence.logits.dtype, torch.float32))
        return made if is_kept else replace(made, values=values.float())


class Request(NamedTuple):
    """A map to make."""

    name: str | None
    """None: the name of the explainer and that of the layer which will have been read."""
    explainer: Explainer
    options: dict[str, Any]
    layer: LayerLike


def explanation_of(
    model: nn.Module,
    inputs: Inputs,
    targets: Targets,
    requests: Sequence[Request],
    forward: ForwardCall,
    settings: Settings,
) -> Explanation:
    """The maps of all requests and their verdicts, from one forward and one backward of each kind that they need.

    Raises:
        ValueError: as `gather`; or two maps would have one name.
    """
    explainers = [request.explainer for request in requests]
    is_ours = all(type(explainer) is Explainer and is_known_code(explainer.formula) for explainer in explainers)
    with untouched(model, lazily=is_ours and not settings.compile and has_known_plan(unwrapped(model))), exact():
        return _explanation(model, inputs, targets, requests, forward, settings)


def _explanation(
    model: nn.Module,
    inputs: Inputs,
    targets: Targets,
    requests: Sequence[Request],
    forward: ForwardCall,
    settings: Settings,
) -> Explanation:
    explainers = [request.explainer for request in requests]
    fields = [(request.layer, request.explainer.needs) for request in requests]
    gathered = gather(model, inputs.images, fields, targets, forward, settings)
    first: Sequence[Evidence | None] = ()
    parts: list[list[Map]] = [[] for _ in requests]
    for block in gathered.blocks():
        first = first or block
        for pieces, request, evidence in zip(parts, requests, block, strict=True):
            if evidence is not None:
                pieces.append(request.explainer.map_of(evidence, **request.options))
    scorer = gathered.scorer
    score = scorer.of(scorer.targets)
    values: dict[str, Tensor] = {}
    layers: dict[str, Layer] = {}
    doubts: dict[str, Doubts] = {}
    for pieces, request, evidence in zip(parts, requests, first, strict=True):
        assert evidence is not None
        explainer, other = request.explainer, evidence.runner_up
        name = f"{explainer.name}@{evidence.layer}" if request.name is None else request.name
        if name in values:
            raise ValueError(f"expected every map to have its own name, got {name!r} twice; ask for it once")
        values[name] = torch.cat([piece.values for piece in pieces], 1)  # a copy: formulas may return what they read
        source = evidence.gate if evidence.gate is not None else evidence.activations
        layers[name] = Layer() if source is None else Layer(evidence.layer, source.shape[1:])
        total = score if pieces[0].total is None else pieces[0].total
        whole = "score" if callable(targets) else "logit"
        compared = Compared(
            maps=values[name],
            targets=scorer.targets,
            runner_up=None if other is None else explainer.map_of(other, **request.options).values,
            score=None if explainer.is_control else score,
            total=total if explainer.sums_to_score else None,
        )
        doubts[name] = Doubts(
            compared,
            is_blind_to_class=explainer.is_blind_to_class,
            whole=whole if pieces[0].total is None else "expected total",
            remarks=pieces[0].remarks + ((evidence.rectifiers.verdict(),) if explainer.needs & GUIDED else ()),
        )
    return Explanation(
        maps=values,
        targets=scorer.classes_of(scorer.targets),
        target=name_of(targets) if callable(targets) else "",
        logits=gathered.logits,
        probabilities=gathered.probabilities,
        layers=layers,
        signed=tuple(name for name, explainer in zip(values, explainers, strict=True) if explainer.is_signed),
        controls=tuple(name for name, explainer in zip(values, explainers, strict=True) if explainer.is_control),
        classes=() if callable(targets) else classes_of(model, gathered.logits.shape[1]),
        images=inputs.shown,
        names=inputs.names,
        notices=(*inputs.notices, *scorer.notices),
        doubts=doubts,
    )
