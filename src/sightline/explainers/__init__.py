"""Maps of where a model looks. `explain` computes all of them from one forward and one head-only backward."""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sightline import maps
from sightline.explainers.cams import cam, grad_cam
from sightline.explainers.controls import centre_map, contrast_map, edge_map, random_map
from sightline.explainers.evidence import Explainer, Layer, Targets, gather
from sightline.explainers.intrinsic import activation_map, attention, attention_maps

__all__ = [
    "EXPLAINERS",
    "Explainer",
    "Explanation",
    "activation_map",
    "attention",
    "attention_maps",
    "cam",
    "centre_map",
    "contrast_map",
    "edge_map",
    "explain",
    "grad_cam",
    "random_map",
]

EXPLAINERS: dict[str, Explainer] = {
    "attention": attention,
    "activation_map": activation_map,
    "cam": cam,
    "grad_cam": grad_cam,
    "random_map": random_map,
    "centre_map": centre_map,
    "edge_map": edge_map,
    "contrast_map": contrast_map,
}

Method = str | Explainer | partial[Any]


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Maps of a batch, with what was explained and where. `explanation["grad_cam"]` is the raw map."""

    maps: dict[str, Float[Tensor, "b t _ _"]]
    """Raw float32 maps by method; larger = more important; `method@layer` where several layers were asked for."""
    targets: Int[Tensor, "b t"]
    logits: Float[Tensor, "b n"]
    layers: dict[str, str]
    """Where each map was read: name and shape, for example `features.conv13 (128 x 5 x 5)`; empty for controls."""
    verdicts: dict[str, list[list[str]]]
    """For each method and image what to distrust; an empty list is a clean map."""

    @property
    def layer(self) -> str:
        """Where the first map was read that has a layer."""
        return next((layer for layer in self.layers.values() if layer), "")

    def __getitem__(self, key: str | tuple[str, str]) -> Float[Tensor, "b t h w"]:
        name = "@".join(key) if isinstance(key, tuple) else key
        if name not in self.maps:
            raise KeyError(f"expected one of {', '.join(self.maps)}, got {name!r}; name it in methods= of explain")
        return self.maps[name]

    def resized(self, size: tuple[int, int]) -> "Explanation":
        """The same explanation with every map at another size (height, width)."""
        resized = {name: maps.resize(value, size) for name, value in self.maps.items()}
        return Explanation(
            maps=resized, targets=self.targets, logits=self.logits, layers=self.layers, verdicts=self.verdicts
        )


def explain(
    model: nn.Module,
    images: Float[Tensor, "b c H W"],
    targets: Targets = None,
    methods: Sequence[Method] = ("grad_cam",),
    layer: Layer | Sequence[str | nn.Module] = None,
) -> Explanation:
    """All maps of all methods for a batch, from one forward and at most one backward through the head.

    A method is a name from `EXPLAINERS`, an explainer, or a `functools.partial` of one for its options; `name@layer`
    asks for one method at a layer of its own. `layer` is a dotted name, a module, or a list of them (then the maps are
    found as `explanation[method, layer]`); None is the model's `default_layer`, else the last feature map that feeds
    the logits. `targets`: None = predicted class, an int, or an integer tensor (b,) or (b, t).

    The model, its flags and gradients, and the random state are left as they were.

    Raises:
        ValueError: an unknown method or layer, targets out of range, a method that this model has no evidence for.

    >>> import torch
    >>> from sightline.testing import PooledModel
    >>> explanation = explain(PooledModel(torch.eye(3)), torch.ones(1, 3, 2, 2), targets=1, methods=["cam", "grad_cam"])
    >>> explanation["cam"].flatten().tolist(), explanation["grad_cam"].flatten().tolist()
    ([1.0, 1.0, 1.0, 1.0], [0.25, 0.25, 0.25, 0.25])
    >>> explanation.layer, explanation.verdicts["cam"]
    ('features (3 x 2 x 2)', [['flat']])
    """
    asked = _requests(methods, layer)
    found = gather(model, images, [(at, method.needs) for _, method, _, at in asked], targets)
    made: dict[str, Tensor] = {}
    layers: dict[str, str] = {}
    for (name, method, options, _), evidence in zip(asked, found, strict=True):
        name = name if name is not None else f"{method.name}@{evidence.layer}"
        if name in made:
            raise ValueError(f"expected every map to have a name of its own, got {name!r} twice; ask for it once")
        made[name] = method.map_of(evidence, **options)
        source = evidence.gate if evidence.gate is not None else evidence.activations
        shape = " x ".join(map(str, source.shape[1:])) if source is not None else ""
        layers[name] = f"{evidence.layer} ({shape})" if shape else ""
    verdicts = {name: _verdicts(value) for name, value in made.items()}
    return Explanation(maps=made, targets=found[0].targets, logits=found[0].logits, layers=layers, verdicts=verdicts)


def find_explainer(name: str) -> Explainer:
    """The explainer of that name.

    Raises:
        ValueError: there is none; the closest names are shown.
    """
    if name not in EXPLAINERS:
        close = get_close_matches(name, EXPLAINERS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(EXPLAINERS)}"
        raise ValueError(f"expected the name of an explainer, got {name!r}; {hint}")
    return EXPLAINERS[name]


def named(method: Method) -> tuple[str, Explainer, dict[str, Any], Layer]:
    """Name, explainer, options and layer of its own, if any, of a method however it is given.

    Raises:
        ValueError: there is no such method, or it has no such option.
        TypeError: neither a name, an explainer nor a partial of one.

    >>> named(partial(activation_map, norm="mean"))[0], named("cam@features")[0]
    ('activation_map(norm=mean)', 'cam@features')
    """
    if isinstance(method, str):
        base, at, layer = method.partition("@")
        if at and not layer:
            raise ValueError(f"expected the name of a layer after @, got {method!r}; write {base}@LAYER")
        return method, find_explainer(base), {}, layer or None
    if isinstance(method, Explainer):
        return method.name, method, {}, None
    if not isinstance(method, partial) or not isinstance(method.func, Explainer):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"expected a method by name, an explainer or a functools.partial of one, got {method!r}; "
            "see sightline.explainers.EXPLAINERS"
        )
    explainer, options = method.func, dict(method.keywords)
    if method.args:
        raise ValueError(f"expected options of {explainer.name} by keyword, got {method.args[0]!r}; name it")
    if unknown := set(options) - explainer.options:
        choices = ", ".join(sorted(explainer.options)) or "none"
        raise ValueError(f"expected options of {explainer.name} out of: {choices}, got {min(unknown)!r}")
    text = ", ".join(f"{key}={value}" for key, value in options.items())
    return f"{explainer.name}({text})", explainer, options, None


def _requests(
    methods: Sequence[Method], layer: Layer | Sequence[str | nn.Module]
) -> list[tuple[str | None, Explainer, dict[str, Any], Layer]]:
    if isinstance(methods, str) or not methods:
        raise ValueError(f"expected a list of methods, got {methods!r}; write methods=['grad_cam']")
    layers: list[Layer] = [layer] if layer is None or isinstance(layer, str | nn.Module) else [*layer]
    several = not (layer is None or isinstance(layer, str | nn.Module))
    if not layers:
        raise ValueError("expected at least one layer, got an empty list; leave it out for the model's own")
    asked: list[tuple[str | None, Explainer, dict[str, Any], Layer]] = []
    for method in methods:
        name, explainer, options, own = named(method)
        by_layer = several and own is None and not explainer.is_control
        places = layers if own is None and not explainer.is_control else [own]
        asked += [(None if by_layer else name, explainer, options, at) for at in places]
    return asked


def _verdicts(values: Float[Tensor, "b t h w"]) -> list[list[str]]:
    """What to distrust in the maps of each image; the device is asked once."""
    low, high = values.amin((2, 3)), values.amax((2, 3))
    finite = values.isfinite().all((1, 2, 3))
    flat = (high - low <= 1e-6 * values.abs().amax((2, 3))).any(1)
    negative = (high < 0).any(1)
    signs = torch.stack([~finite, finite & flat, finite & negative], 1).tolist()
    names = ("non-finite", "flat", "all-negative")
    return [[name for name, found in zip(names, row, strict=True) if found] for row in signs]
