"""Scores of perturbed images: made once, in bounded memory, for every metric that asks for them."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import update_wrapper
from itertools import accumulate, pairwise
from math import ceil
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torchvision.transforms.v2.functional import gaussian_blur

from sightline import maps as pixels
from sightline.arguments import check_needs, checked_options, named_in, needs, signature_with_options
from sightline.checks import bytes_of, check_planes, check_whole
from sightline.facts import Progress
from sightline.inference import (
    ForwardCall,
    Memory,
    Output,
    check_classes,
    forward_call,
    in_batches,
    one_target_each,
    probabilities_of,
    untouched,
    wide,
)
from sightline.metrics.inpainting import inpaint
from sightline.notebook import brief

Fill = str | float | Tensor
Score = str | Callable[[Tensor, Tensor], Tensor]
Fields = dict[str, Float[Tensor, "b ..."]]
_Key = tuple[str | None, str]  # method, or None for versions that all methods share; kind of version

ROAD_FRACTIONS = tuple(tenth / 10 for tenth in range(1, 10))
REGIONS = 32
"""Random squares that are removed, one at a time, to measure `drops`."""
_SHARED = {
    "original": frozenset({"original", "deletion", "insertion", "drops"}),
    "empty": frozenset({"deletion", "insertion"}),
    "drops": frozenset({"drops"}),
}
"""Versions of an image that are the same for every method, and the fields computed from them."""
_PER_MAP = ("deletion", "insertion", "preserved", "removed", "morf", "lerf")
RANKED_BYTES = 16
"""Bytes that are held for each pixel of the image while a map is scored: its place, its value, its scaled value."""
FIELDS = (*_PER_MAP, "original", "drops", "fractions", "map_means", "map_sums")
"""What a `PerturbationMetric` can read."""


@dataclass(frozen=True, kw_only=True)
class Perturbation:
    """How images are perturbed, and which score of the model is read then."""

    __repr__ = brief

    steps: int = 32
    """Number of equal chunks in which pixels are replaced."""
    fill: Fill = "zero"
    """`"zero"` (0 in the model's input), `"mean"` (of each image), `"blur"`, `"inpaint"` (from the remaining pixels), a
    number, a (c,) tensor, or `"black"`, which needs `mean` and `std` of the preprocessing."""
    score: Score = "probability"
    """`"probability"` (softmax; sigmoid where the model ends in one over several classes), `"logit"` (a single one
    stands for itself, whatever the target), or a function of (logits, targets)."""
    cells: bool = False
    """Whether each cell of the map is replaced as a whole, rather than single pixels of the resized map."""
    batch_size: int = 64
    """Most perturbed images per forward; `memory` decides how many there are up to that."""
    memory: Memory = None
    """Bytes that a forward may take, or a size such as "2GB"; None: 300 MB on a CPU, half of what is free on a GPU."""
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    output: Output = None
    """Which tensor of the model's output counts, and whether it holds probabilities; see `explain`."""
    forward_args: Any = ()
    """Further positional arguments of the model; see `explain`."""
    forward_kwargs: Mapping[str, Any] | None = None

    @property
    def of_model(self) -> dict[str, Any]:
        """How the model is called and read, as `explain` and other metrics take it."""
        return {name: getattr(self, name) for name in ("output", "forward_args", "forward_kwargs")}

    @property
    def of_explain(self) -> dict[str, Any]:
        """The same and the size of batches, as `explain` takes them."""
        return self.of_model | {"batch_size": self.batch_size, "memory": self.memory}

    def call(self, images: Tensor) -> ForwardCall:
        """The same for images that each have a row in the arguments."""
        return forward_call(images, self.output, self.forward_args, self.forward_kwargs)

    def __post_init__(self) -> None:
        check_whole(steps=self.steps, batch_size=self.batch_size)
        if self.steps < 1:
            raise ValueError(f"expected at least 1 step, got {self.steps}")
        if self.memory is not None:
            bytes_of(self.memory)
        if self.batch_size < 1:
            raise ValueError(f"expected at least 1 image per batch, got {self.batch_size}")
        if isinstance(self.score, str) and self.score not in ("probability", "logit"):
            raise ValueError(f"expected score 'probability', 'logit' or a function, got {self.score!r}")


class PerturbationMetric:
    """A formula over scores of perturbed images, callable as `(model, images, targets, maps) -> (b,)`.

    The parameters of the formula without a default name what it reads, the others are its options:

    - `original` (b,): score of the whole image; `preserved` (b,), `removed` (b,): score of the image times the map, and
      times one minus the map, where the map is scaled from 0 to 1 and the rest is filled;
    - `deletion`, `insertion` (b, n + 1): score after each chunk of pixels is removed or inserted, highest values first;
      `fractions` (b, n + 1): fraction of the pixels changed; `map_means` (b, n): mean of the map in each chunk;
    - `morf`, `lerf` (b, 9): score with the most or the least relevant 10, 20, ..., 90 % of the pixels painted over;
    - `drops` (b, r): how much the score drops when random squares are removed, one at a time; `map_sums` (b, r): sum of
      the map in each of them.

    Options of `Perturbation` are taken by keyword. A map with a value that is not finite gives NaN.

    Raises:
        ValueError: the formula reads something else.
    """

    def __init__(self, formula: Callable[..., Float[Tensor, " b"]]) -> None:
        update_wrapper(self, formula)
        check_needs(formula, FIELDS, "parameters of a perturbation metric")
        self.formula = formula
        self.needs = needs(formula)
        self.__signature__ = signature_with_options(type(self).__call__, formula, Perturbation)

    def __call__(
        self,
        model: nn.Module,
        images: Float[Tensor, "b c H W"],
        targets: Int[Tensor, " b"] | Int[Tensor, "b 1"],
        maps: Float[Tensor, "b 1 h w"],
        **options: Any,
    ) -> Float[Tensor, " b"]:
        """One value per image."""
        of_formula = named_in(self.formula, options)
        others = {name: value for name, value in options.items() if name not in of_formula}
        perturbation = Perturbation(**checked_options(Perturbation, others, self.formula.__name__, TypeError))
        fields = perturbed_scores(model, images, targets, {"": maps}, self.needs, perturbation)[""]
        return self.value(fields, **of_formula).to(wide(maps))

    def value(self, fields: Fields, **options: Any) -> Float[Tensor, " b"]:
        """The formula on scores that exist already, in float64."""
        return self.formula(**named_in(self.formula, fields), **options)


def read_by(functions: Iterable[Callable[..., Any]]) -> frozenset[str]:
    """Everything that the perturbation metrics among some functions read."""
    return frozenset(name for one in functions if isinstance(one, PerturbationMetric) for name in one.needs)


def perturbed_scores(
    model: nn.Module,
    images: Float[Tensor, "b c H W"],
    targets: Int[Tensor, " b"] | Int[Tensor, "b 1"],
    maps: Mapping[str, Float[Tensor, "b 1 h w"]],
    needs: Collection[str],
    perturbation: Perturbation | None = None,
    progress: Progress | None = None,
) -> dict[str, Fields]:
    """What `PerturbationMetric`s read, for the maps of several methods; no image is scored twice.

    As many perturbed images exist at a time as `batch_size` and `memory` allow. The model runs in eval mode without
    gradient and is left unchanged.

    Raises:
        ValueError: shapes that do not fit, a class that the model does not have, an unknown `fill`.
        TypeError: targets that are no class indices.
    """
    perturbation = perturbation or Perturbation()
    check_planes("perturbation metrics", images.shape)
    count, _, height, width = images.shape
    for values in maps.values():
        if values.ndim != 4 or values.shape[:2] != (count, 1):
            raise ValueError(
                f"expected maps of shape ({count}, 1, h, w), one per image, got {tuple(values.shape)}; pass one target"
            )
    targets = one_target_each(targets, count)
    if (targets == -1).any() and not callable(perturbation.score):
        raise ValueError(
            "expected class indices as targets, got -1; a map made for a function of the output needs score="
        )
    needs = frozenset(needs)
    filler = _Filler(images, perturbation)
    orders = {
        method: _Order(values.to(images.device), (height, width), perturbation) for method, values in maps.items()
    }
    versions: dict[_Key, _Versions] = {(None, name): filler.shared(name) for name in _shared_kinds(needs)}
    for method, order in orders.items():
        versions |= {(method, name): version for name, version in order.versions(filler).items() if name in needs}
    scores = _run(model, filler, targets.to(images.device), versions, progress)
    return {method: _fields(order, method, scores, needs) for method, order in orders.items()}


def perturbed_counts(needs: Collection[str], perturbation: Perturbation, size: Sequence[int]) -> tuple[int, int]:
    """How many perturbed images these needs take: per image, and per image and method.

    >>> perturbed_counts({"deletion", "insertion", "preserved"}, Perturbation(steps=32), (64, 64))
    (2, 63)
    """
    n = size[0] * size[1]
    steps = ceil(n / ceil(n / perturbation.steps)) - 1
    counts = {"deletion": steps, "insertion": steps, "morf": len(ROAD_FRACTIONS), "lerf": len(ROAD_FRACTIONS)}
    shared = sum(REGIONS if name == "drops" else 1 for name in _shared_kinds(needs))
    return shared, sum(counts.get(name, 1) for name in _PER_MAP if name in needs)


def _shared_kinds(needs: Collection[str]) -> list[str]:
    return [name for name, readers in _SHARED.items() if readers.intersection(needs)]


@dataclass(frozen=True)
class _Versions:
    """`count` perturbed versions of every image; `make(rows, points)` composes some of them."""

    count: int
    make: Callable[[Int[Tensor, " n"], Int[Tensor, " n"]], Float[Tensor, "n c H W"]]


class _Filler:
    """The images, and what replaces a removed pixel."""

    def __init__(self, images: Float[Tensor, "b c H W"], perturbation: Perturbation) -> None:
        self.images, self.perturbation = images, perturbation
        self.paints = isinstance(perturbation.fill, str) and perturbation.fill == "inpaint"
        self.substitute = (
            images if self.paints else substitute(images, perturbation.fill, perturbation.mean, perturbation.std)
        )

    def without(self, rows: Int[Tensor, " n"], hole: Bool[Tensor, "n 1 H W"]) -> Float[Tensor, "n c H W"]:
        """The images with the pixels of the hole replaced."""
        if self.paints:
            return inpaint(self.images[rows], hole)
        return torch.where(hole, self.substitute[rows], self.images[rows])

    def mixed(self, rows: Int[Tensor, " n"], weight: Float[Tensor, "n 1 H W"]) -> Float[Tensor, "n c H W"]:
        """A fraction of each pixel, the rest filled."""
        if self.paints:
            raise ValueError("expected a fill that needs no hole for metrics that dim the image, got 'inpaint'")
        return weight * self.images[rows] + (1 - weight) * self.substitute[rows]

    def shared(self, kind: str) -> _Versions:
        """The versions that depend on no map."""
        if kind == "original":
            return _Versions(1, lambda rows, _: self.images[rows])
        if kind == "empty":
            return _Versions(
                1, lambda rows, _: self.without(rows, torch.ones_like(self.images[rows, :1], dtype=torch.bool))
            )
        squares = _squares(*self.images.shape[2:]).to(self.images.device)
        return _Versions(len(squares), lambda rows, points: self.without(rows, squares[points, None]))


@dataclass
class _Order:
    """The pixels of each image in the order of the map."""

    maps: Float[Tensor, "b 1 h w"]
    size: tuple[int, int]
    perturbation: Perturbation
    ranks: Int[Tensor, "b H*W"] = field(init=False)
    """Place of each pixel; equal for the pixels of a cell that is replaced as a whole."""

    def __post_init__(self) -> None:
        maps = self.maps.to(wide(self.maps))
        self.resized = pixels.resize(maps, self.size)
        units = (maps if self.perturbation.cells else self.resized).flatten(1)
        order, self.ranks = _sorted(units)
        n = units.shape[1]
        chunk = ceil(n / self.perturbation.steps)
        self.points = torch.arange(ceil(n / chunk) + 1, device=units.device).mul(chunk).clamp(max=n)
        weights = torch.ones(n, dtype=torch.float64, device=units.device)
        if self.perturbation.cells:
            cells = torch.arange(n, device=units.device, dtype=torch.float32).reshape(1, 1, *self.maps.shape[2:])
            cell = pixels.resize(cells, self.size, "nearest").long().flatten()
            weights = torch.bincount(cell, minlength=n).double()
            self.ranks = self.ranks[:, cell]
        changed = torch.cat([weights.new_zeros(len(units), 1), weights[order].cumsum(1)], 1)
        self.fractions = changed[:, self.points] / changed[:, -1:]
        sums = torch.cat([weights.new_zeros(len(units), 1), units.gather(1, order).double().cumsum(1)], 1)
        self.map_means = sums[:, self.points].diff(dim=1) / self.points.diff()
        self.is_finite = units.isfinite().all(1)

    def versions(self, filler: _Filler) -> dict[str, _Versions]:
        """Every kind of perturbed image that depends on the map."""
        steps = len(self.points) - 2
        scaled = pixels.normalize(self.resized[:, 0])[:, None].to(filler.images.dtype)
        n = int(self.points[-1])

        def highest(rows: Tensor, count: Tensor) -> Tensor:
            return (self.ranks[rows] < count[:, None]).reshape(-1, 1, *self.size)

        painted = torch.tensor(ROAD_FRACTIONS, device=self.ranks.device).mul(n).round().long()

        def road(rows: Tensor, hole: Tensor) -> Tensor:
            return inpaint(filler.images[rows], hole, noise=0.01)

        return {
            "deletion": _Versions(steps, lambda rows, k: filler.without(rows, highest(rows, self.points[k + 1]))),
            "insertion": _Versions(steps, lambda rows, k: filler.without(rows, ~highest(rows, self.points[k + 1]))),
            "preserved": _Versions(1, lambda rows, _: filler.mixed(rows, scaled[rows])),
            "removed": _Versions(1, lambda rows, _: filler.mixed(rows, 1 - scaled[rows])),
            "morf": _Versions(len(painted), lambda rows, k: road(rows, highest(rows, painted[k]))),
            "lerf": _Versions(len(painted), lambda rows, k: road(rows, ~highest(rows, n - painted[k]))),
        }


def _fields(order: _Order, method: str, scores: dict[_Key, Tensor], needs: Collection[str]) -> Fields:
    """The inputs of the formulas, NaN where the map does not allow it."""
    original, empty = scores.get((None, "original")), scores.get((None, "empty"))
    fields: Fields = {"fractions": order.fractions, "map_means": order.map_means}
    if original is not None:
        fields["original"] = original[:, 0]
    flat = order.resized.flatten(1).amax(1) == order.resized.flatten(1).amin(1)
    for (owner, name), values in scores.items():
        if owner == method:
            fields[name] = values.where(order.is_finite[:, None], torch.nan)
    for name in ("preserved", "removed"):
        if name in fields:
            fields[name] = fields[name][:, 0].where(~flat, torch.nan)
    ends = {"deletion": (original, empty), "insertion": (empty, original)}
    for name, (first, last) in ends.items():
        if name in needs and first is not None and last is not None:
            between = fields.get(name, first[:, :0])
            fields[name] = torch.cat([first, between, last], 1).where(order.is_finite[:, None], torch.nan)
    if "drops" in needs and original is not None:
        squares = _squares(*order.size).to(order.resized)
        fields["drops"] = original - scores[None, "drops"]
        fields["map_sums"] = torch.einsum("bhw,rhw->br", order.resized[:, 0], squares).double()
    return fields


def _run(
    model: nn.Module,
    filler: _Filler,
    targets: Int[Tensor, " b"],
    versions: dict[_Key, _Versions],
    progress: Progress | None,
) -> dict[_Key, Float[Tensor, "b n"]]:
    """Scores of all versions, with batches that span several kinds."""
    perturbation, images = filler.perturbation, filler.images
    call = perturbation.call(images)
    counts = [version.count * len(targets) for version in versions.values()]
    spans = [*zip(versions.values(), pairwise(accumulate(counts, initial=0)), strict=True)]
    scores: list[Tensor] = []

    def scored(items: range) -> Tensor:
        nonlocal call
        parts: list[tuple[Tensor, Tensor]] = []
        for version, (first, last) in spans:
            within = range(max(items.start, first) - first, min(items.stop, last) - first)
            if within:
                numbers = torch.arange(within.start, within.stop, device=images.device)
                rows = numbers // version.count
                parts.append((version.make(rows, numbers % version.count), rows))
        perturbed, rows = parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts, strict=True))
        del parts
        answer = call(net, perturbed, rows)
        call = replace(call, kind=answer.call.kind)  # the following batches are read as the first one
        logits = answer.logits.to(wide(answer.logits))
        if not scores and not callable(perturbation.score):
            check_classes(targets, max(2, logits.shape[1]))
        return _score(logits, answer.activation, targets[rows], perturbation.score).double()

    sizes: dict[str, Any] = {"batch_size": perturbation.batch_size, "memory": perturbation.memory}
    with untouched(model) as net, torch.inference_mode(False), torch.no_grad():
        for items, part in in_batches(scored, sum(counts), images[:1].nbytes, images.device, **sizes):
            scores.append(part)
            if progress is not None:
                progress("scoring masked images", items.stop, sum(counts))
    parts = torch.cat(scores).split(counts) if scores else ()
    return {key: part.reshape(len(targets), -1) for key, part in zip(versions, parts, strict=True)}


def _sorted(importance: Float[Tensor, "b n"]) -> tuple[Int[Tensor, "b n"], Int[Tensor, "b n"]]:
    """Pixels in the order of decreasing importance, and the place of each in it; ties in a fixed scattered order."""
    scatter = torch.randperm(importance.shape[1], generator=torch.Generator().manual_seed(0)).to(importance.device)
    order = scatter[importance[:, scatter].argsort(dim=1, descending=True, stable=True)]
    places = torch.arange(importance.shape[1], device=importance.device).expand_as(order)
    return order, torch.empty_like(order).scatter_(1, order, places)


def _squares(height: int, width: int) -> Bool[Tensor, "r H W"]:
    """Random squares with sides up to half of the image's shorter one; the same for every image of a size."""
    generator = torch.Generator().manual_seed(0)
    largest = max(min(height, width) // 2, 1)
    side, top, left = torch.rand(3, REGIONS, 1, generator=generator).double()
    side = (side * largest).floor() + 1
    top, left = (top * (height - side + 1)).floor(), (left * (width - side + 1)).floor()
    rows, columns = torch.arange(height), torch.arange(width)
    down = (rows >= top) & (rows < top + side)
    across = (columns >= left) & (columns < left + side)
    return down[:, :, None] & across[:, None]


def _score(logits: Tensor, activation: str, targets: Tensor, score: Score) -> Tensor:
    if callable(score):
        return score(logits, targets)
    if score == "logit" and logits.shape[1] == 1:
        return logits[:, 0]
    return (probabilities_of(logits, activation) if score == "probability" else logits).gather(1, targets[:, None])[
        :, 0
    ]


def substitute(
    images: Float[Tensor, "b c *grid"],
    fill: Fill,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Float[Tensor, "b c *grid"]:
    """The values that replace removed pixels, as images of the same shape.

    Raises:
        ValueError: an unknown fill, a color of another length, `"black"` without `mean` and `std`.
    """
    channels = images.shape[1]
    if isinstance(fill, Tensor):
        if fill.shape != (channels,):
            raise ValueError(f"expected a fill of shape ({channels},), one number per channel, got {tuple(fill.shape)}")
        return fill.to(images).view(-1, *[1] * (images.ndim - 2)).expand_as(images)
    if fill == "zero" or isinstance(fill, int | float):
        return torch.full_like(images, 0.0 if isinstance(fill, str) else fill)
    if fill == "mean":
        return images.mean(tuple(range(2, images.ndim)), keepdim=True).expand_as(images)
    if fill == "blur":
        check_planes("fill='blur'", images.shape)
        side = max(min(images.shape[2:]) // 5, 9) // 2 * 2 + 1
        reach = min(side, 2 * min(images.shape[2:]) - 1)  # the reflected border is at most one pixel short of the image
        return gaussian_blur(images, [reach, reach], [side / 4, side / 4])
    if fill == "black":
        if mean is None or std is None:
            raise ValueError("expected mean= and std= of the preprocessing for fill='black', got none; pass them")
        black = -torch.tensor(mean).to(images) / torch.tensor(std).to(images)
        return black.view(-1, *[1] * (images.ndim - 2)).expand_as(images)
    raise ValueError(
        f"expected fill 'zero', 'mean', 'blur', 'inpaint', 'black', a number or a ({channels},) tensor, got {fill!r}"
    )
