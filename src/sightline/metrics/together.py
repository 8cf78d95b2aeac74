"""Many metrics of many methods' maps of the same images, with no hidden image scored twice."""

from collections.abc import Mapping
from inspect import signature
from typing import Any, NamedTuple

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sightline.facts import Progress
from sightline.inference import wide
from sightline.metrics.hiding import Fields, Hiding, HidingMetric, hidden_scores
from sightline.metrics.per_image import PerImageMean
from sightline.metrics.sanity import Explain


class Measured(NamedTuple):
    """What `measure` found."""

    values: dict[tuple[str, str], Float[Tensor, "b ..."]]
    """By (method, metric)."""
    fields: dict[str, Fields]
    """By method, what was read of masked images: the curves of deletion and insertion among them."""


def inputs_of(metric: type[PerImageMean]) -> frozenset[str]:
    """Names of what a metric asks for.

    >>> from sightline.metrics import METRICS
    >>> sorted(inputs_of(METRICS["energy_in_mask"]))
    ['maps', 'masks']
    """
    parameters = signature(metric.function).parameters.values()
    return frozenset(p.name for p in parameters if p.default is p.empty)


def measure(
    metrics: Mapping[str, type[PerImageMean]],
    maps: Mapping[str, Float[Tensor, "b 1 *cells"]],
    *,
    model: nn.Module | None = None,
    images: Float[Tensor, "b c *grid"] | None = None,
    targets: Int[Tensor, " b"] | Int[Tensor, "b 1"] | None = None,
    masks: Bool[Tensor, "b 1 *grid"] | None = None,
    explain: Explain | None = None,
    hiding: Hiding | None = None,
    progress: Progress | None = None,
) -> Measured:
    """Values per image of every metric and method. Metrics that hide parts of the images share every forward.

    `explain` makes the maps again, by method, for metrics that change the images or the model. `hiding` is for those
    that hide parts of the images; the others take from it how the model is called and read, and their own defaults.

    Raises:
        ValueError: something that a metric asks for is not given.

    >>> import torch
    >>> from sightline.metrics import METRICS
    >>> masks = torch.tensor([[[[True, False]]]])
    >>> chosen = {name: METRICS[name] for name in ("energy_in_mask", "pointing_game")}
    >>> measure(chosen, {"a": torch.tensor([[[[3.0, 1.0]]]])}, masks=masks).values["a", "energy_in_mask"]
    tensor([0.7500])
    """
    given = {"model": model, "images": images, "targets": targets, "masks": masks, "explain": explain}
    given = {name: value for name, value in given.items() if value is not None}
    hiding = hiding or Hiding()
    for name, metric in metrics.items():
        if missing := inputs_of(metric) - {*given, "maps"}:
            raise ValueError(f"expected {' and '.join(sorted(missing))} for {name}, got none; pass it or drop {name}")
    dtypes = {method: wide(value) for method, value in maps.items()}
    values: dict[tuple[str, str], Tensor] = {}
    fields: dict[str, Fields] = {}
    hides = {name: metric.function for name, metric in metrics.items() if isinstance(metric.function, HidingMetric)}
    if hides and model is not None and images is not None and targets is not None:
        needs = frozenset[str]().union(*(function.needs for function in hides.values()))
        fields = hidden_scores(model, images, targets, maps, needs, hiding, progress)
    for name, metric in metrics.items():
        function = metric.function
        if isinstance(function, HidingMetric):
            values |= {(method, name): function.of(read).to(dtypes[method]) for method, read in fields.items()}
            continue
        wanted = signature(function).parameters
        known: dict[str, Any] = {key: value for key, value in (hiding.of_model | given).items() if key in wanted}
        if "explain" in known:
            found: Any = function(**known)
            values |= {(method, name): found[method] for method in maps if method in found}
        else:
            values |= {(method, name): function(**known, maps=value) for method, value in maps.items()}
    return Measured(values, fields)
