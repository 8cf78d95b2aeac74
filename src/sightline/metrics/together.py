"""Many metrics of many methods' maps of the same images, with no perturbed image scored twice."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sightline.arguments import named_in, needs
from sightline.facts import Progress
from sightline.inference import wide
from sightline.metrics.per_image import PerImageMean
from sightline.metrics.perturbed import Fields, Perturbation, PerturbationMetric, perturbed_scores, read_by
from sightline.metrics.sanity import Explain


class Measured(NamedTuple):
    """The result of `measure`."""

    values: dict[tuple[str, str], Float[Tensor, "b ..."]]
    """By (method, metric)."""
    fields: dict[str, Fields]
    """By method, the scores of perturbed images: the curves of deletion and insertion among them."""


def inputs_of(metric: type[PerImageMean]) -> frozenset[str]:
    """Names of the inputs that a metric needs.

    >>> from sightline.metrics import METRICS
    >>> sorted(inputs_of(METRICS["energy_in_mask"]))
    ['maps', 'masks']
    """
    return needs(metric.function)


def measure(
    metrics: Mapping[str, type[PerImageMean]],
    maps: Mapping[str, Float[Tensor, "b 1 *cells"]],
    *,
    model: nn.Module | None = None,
    images: Float[Tensor, "b c *grid"] | None = None,
    targets: Int[Tensor, " b"] | Int[Tensor, "b 1"] | None = None,
    masks: Bool[Tensor, "b 1 *grid"] | None = None,
    explain: Explain | None = None,
    perturbation: Perturbation | None = None,
    progress: Progress | None = None,
) -> Measured:
    """Values per image of every metric and method. Perturbation metrics share every forward.

    `explain` makes the maps again, by method, for metrics that change the images or the model. `perturbation` applies
    to perturbation metrics; the others take from it how the model is called and read, and keep their own defaults.

    Raises:
        ValueError: an input that a metric needs is missing.

    >>> import torch
    >>> from sightline.metrics import METRICS
    >>> masks = torch.tensor([[[[True, False]]]])
    >>> chosen = {name: METRICS[name] for name in ("energy_in_mask", "pointing_game")}
    >>> measure(chosen, {"a": torch.tensor([[[[3.0, 1.0]]]])}, masks=masks).values["a", "energy_in_mask"]
    tensor([0.7500])
    """
    inputs = {"model": model, "images": images, "targets": targets, "masks": masks, "explain": explain}
    inputs: dict[str, Any] = {name: value for name, value in inputs.items() if value is not None}
    for name, metric in metrics.items():
        if missing := inputs_of(metric) - {*inputs, "maps"}:
            raise ValueError(f"expected {' and '.join(sorted(missing))} for {name}, got none; pass it or drop {name}")
    functions = {name: metric.function for name, metric in metrics.items()}
    perturbation = perturbation or Perturbation()
    fields: dict[str, Fields] = {}
    if read := read_by(functions.values()):
        given = named_in(perturbed_scores, inputs)
        fields = perturbed_scores(**given, maps=maps, needs=read, perturbation=perturbation, progress=progress)
    values: dict[tuple[str, str], Tensor] = {}
    for name, function in functions.items():
        given = named_in(function, perturbation.of_model | inputs)
        if isinstance(function, PerturbationMetric):
            scores = {method: function.value(fields[method]).to(wide(maps[method])) for method in maps}
        elif "explain" in given:
            scores = function(**given)
        else:
            scores = {method: function(**given, maps=one) for method, one in maps.items()}
        values |= {(method, name): scores[method] for method in maps if method in scores}
    return Measured(values, fields)
