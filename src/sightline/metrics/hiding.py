"""Scores of images with parts of them hidden: made once, in bounded memory, for every metric that asks for them."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import update_wrapper
from inspect import Parameter, Signature, signature
from math import ceil
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torchvision.transforms.v2.functional import gaussian_blur

from sightline import maps as pixels
from sightline.checks import check_planes, check_whole
from sightline.facts import Progress
from sightline.inference import (
    ForwardCall,
    Output,
    check_classes,
    forward_call,
    one_target_each,
    probabilities_of,
    untouched,
    wide,
)
from sightline.metrics.inpainting import inpaint

Fill = str | float | Tensor
Score = str | Callable[[Tensor, Tensor], Tensor]
Fields = dict[str, Float[Tensor, "b ..."]]
_Key = tuple[str | None, str]  # method, or None where it is the same for all; kind of image

ROAD_SHARES = tuple(tenth / 10 for tenth in range(1, 10))
REGIONS = 32
"""Random squares that `falls` hides, one at a time."""


@dataclass(frozen=True, kw_only=True)
class Hiding:
    """How parts of an image are hidden, and what is read of the model then."""

    steps: int = 32
    """Chunks of equal size in which pixels are replaced."""
    fill: Fill = "zero"
    """`"zero"` (0 in the model's input), `"mean"` (of each image), `"blur"`, `"inpaint"` (from what is left), a number,
    a (c,) tensor, or `"black"`, which needs `mean` and `std` of the preprocessing."""
    score: Score = "probability"
    """`"probability"` (softmax; sigmoid where the model ends in one over several classes), `"logit"` (a single one
    stands for itself, whatever the target), or a function of (logits, targets)."""
    cells: bool = False
    """Whether the cells of the map are replaced whole, instead of the pixels of the resized map one by one."""
    batch_size: int = 64
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    output: Output = None
    """Which tensor of the model's output counts, and whether it holds probabilities; see `explain`."""
    forward_args: Any = ()
    """What the model takes behind the images; see `explain`."""
    forward_kwargs: Mapping[str, Any] | None = None

    @property
    def of_model(self) -> dict[str, Any]:
        """How the model is called and read, as `explain` and other metrics take it."""
        return {name: getattr(self, name) for name in ("output", "forward_args", "forward_kwargs")}

    def call(self, images: Tensor) -> ForwardCall:
        """The same for images of which each has its row in the arguments."""
        return forward_call(images, self.output, self.forward_args, self.forward_kwargs)

    def __post_init__(self) -> None:
        check_whole(steps=self.steps, batch_size=self.batch_size)
        if self.steps < 1:
            raise ValueError(f"expected at least 1 step, got {self.steps}")
        if self.batch_size < 1:
            raise ValueError(f"expected at least 1 image per batch, got {self.batch_size}")
        if isinstance(self.score, str) and self.score not in ("probability", "logit"):
            raise ValueError(f"expected score 'probability', 'logit' or a function, got {self.score!r}")


class HidingMetric:
    """A formula over scores of images with parts hidden, callable as `(model, images, targets, maps) -> (b,)`.

    The formula's parameters without default name what it reads, the others are its options:

    - `original` (b,): score of the whole image; `kept` (b,), `hidden` (b,): of the image times the map and times one
      minus the map, where the map is scaled from 0 to 1 and the rest is filled;
    - `deletion`, `insertion` (b, n + 1): after each chunk of pixels is taken away or put in, highest values first;
      `shares` (b, n + 1): the share of pixels changed; `marked` (b, n): mean of the map in each chunk;
    - `most_first`, `least_first` (b, 9): with the highest or lowest 10, 20, ..., 90 % of pixels painted over;
    - `falls` (b, r): by how much random squares, hidden one at a time, lower the score; `covered` (b, r): sum of the
      map in each of them.

    Options of `Hiding` are taken by keyword. A map with a value that is not finite gives NaN.
    """

    def __init__(self, formula: Callable[..., Float[Tensor, " b"]]) -> None:
        update_wrapper(self, formula)
        self.formula = formula
        parameters = signature(formula).parameters.values()
        self.needs = frozenset(p.name for p in parameters if p.default is p.empty)
        own = [p.replace(kind=Parameter.KEYWORD_ONLY) for p in parameters if p.default is not p.empty]
        self.options = frozenset(p.name for p in own)
        called = [p for p in signature(type(self).__call__).parameters.values() if p.name not in ("self", "options")]
        shared = [p.replace(kind=Parameter.KEYWORD_ONLY) for p in signature(Hiding).parameters.values()]
        self.__signature__ = Signature([*called, *own, *shared])

    def __call__(
        self,
        model: nn.Module,
        images: Float[Tensor, "b c H W"],
        targets: Int[Tensor, " b"] | Int[Tensor, "b 1"],
        maps: Float[Tensor, "b 1 h w"],
        **options: Any,
    ) -> Float[Tensor, " b"]:
        """One value per image."""
        own = {name: options.pop(name) for name in self.options & set(options)}
        fields = hidden_scores(model, images, targets, {"": maps}, self.needs, Hiding(**options))[""]
        return self.of(fields, **own).to(wide(maps))

    def of(self, fields: Fields, **options: Any) -> Float[Tensor, " b"]:
        """The formula on scores that are there already, in float64."""
        return self.formula(**{name: fields[name] for name in self.needs}, **options)


def hidden_scores(
    model: nn.Module,
    images: Float[Tensor, "b c H W"],
    targets: Int[Tensor, " b"] | Int[Tensor, "b 1"],
    maps: Mapping[str, Float[Tensor, "b 1 h w"]],
    needs: Collection[str],
    hiding: Hiding | None = None,
    progress: Progress | None = None,
) -> dict[str, Fields]:
    """What `HidingMetric`s need of the maps of several methods; no image is scored twice.

    At most `batch_size` masked images exist at a time. The model runs in eval mode without gradient and is left as it
    was.

    Raises:
        ValueError: shapes that do not fit, a class that the model does not have, an unknown `fill` or need.
        TypeError: targets that are no class indices.
    """
    hiding = hiding or Hiding()
    check_planes("metrics that hide parts of images", images.shape)
    count, _, height, width = images.shape
    for values in maps.values():
        if values.ndim != 4 or values.shape[:2] != (count, 1):
            raise ValueError(
                f"expected maps of shape ({count}, 1, h, w), one per image, got {tuple(values.shape)}; pass one target"
            )
    targets = one_target_each(targets, count)
    if (targets == -1).any() and not callable(hiding.score):
        raise ValueError(
            "expected class indices as targets, got -1; a map made for a function of the output needs score="
        )
    needs = set(needs)
    scene = _Scene(images, hiding)
    orders = {method: _Order(values.to(images.device), (height, width), hiding) for method, values in maps.items()}
    frames: dict[_Key, _Frames] = {}
    if needs & {"original", "deletion", "insertion", "falls"}:
        frames[None, "original"] = _Frames(1, lambda rows, _: images[rows])
    if needs & {"deletion", "insertion"}:
        frames[None, "empty"] = _Frames(1, scene.empty)
    if "falls" in needs:
        squares = _squares(height, width).to(images.device)
        frames[None, "falls"] = _Frames(len(squares), lambda rows, points: scene.without(rows, squares[points, None]))
    for method, order in orders.items():
        frames |= {(method, name): made for name, made in order.frames(scene).items() if name in needs}
    found = _run(model, scene, targets.to(images.device), frames, progress)
    return {method: _fields(order, method, found, needs) for method, order in orders.items()}


def frames_of(needs: Collection[str], hiding: Hiding, size: Sequence[int]) -> tuple[int, int]:
    """How many masked images these needs take: of every image, and of every image and method.

    >>> frames_of({"deletion", "insertion", "kept"}, Hiding(steps=32), (64, 64))
    (2, 63)
    """
    pixels = size[0] * size[1]
    steps = ceil(pixels / ceil(pixels / hiding.steps))
    curves = len({"deletion", "insertion"} & set(needs))
    shared = (bool({"original", "deletion", "insertion", "falls"} & set(needs))) + bool(curves)
    each = curves * (steps - 1) + len({"kept", "hidden"} & set(needs))
    road = len({"most_first", "least_first"} & set(needs)) * len(ROAD_SHARES)
    return shared + REGIONS * ("falls" in needs), each + road


@dataclass(frozen=True)
class _Frames:
    """`count` masked versions of every image; `make(rows, points)` composes some of them."""

    count: int
    make: Callable[[Int[Tensor, " n"], Int[Tensor, " n"]], Float[Tensor, "n c H W"]]


class _Scene:
    """The images and what takes the place of a hidden pixel."""

    def __init__(self, images: Float[Tensor, "b c H W"], hiding: Hiding) -> None:
        self.images, self.hiding = images, hiding
        self.paints = isinstance(hiding.fill, str) and hiding.fill == "inpaint"
        self.substitute = images if self.paints else substitute(images, hiding.fill, hiding.mean, hiding.std)

    def without(self, rows: Int[Tensor, " n"], hole: Bool[Tensor, "n 1 H W"]) -> Float[Tensor, "n c H W"]:
        """The images with the pixels of the hole replaced."""
        if self.paints:
            return inpaint(self.images[rows], hole)
        return torch.where(hole, self.substitute[rows], self.images[rows])

    def empty(self, rows: Int[Tensor, " n"], _: Tensor) -> Float[Tensor, "n c H W"]:
        """Nothing of the images."""
        return self.without(rows, torch.ones_like(self.images[rows, :1], dtype=torch.bool))

    def mixed(self, rows: Int[Tensor, " n"], share: Float[Tensor, "n 1 H W"]) -> Float[Tensor, "n c H W"]:
        """A share of each pixel, the rest filled."""
        if self.paints:
            raise ValueError("expected a fill that needs no hole for metrics that dim the image, got 'inpaint'")
        return share * self.images[rows] + (1 - share) * self.substitute[rows]


@dataclass
class _Order:
    """The pixels of each image in the order of the map."""

    maps: Float[Tensor, "b 1 h w"]
    size: tuple[int, int]
    hiding: Hiding
    ranks: Int[Tensor, "b H*W"] = field(init=False)
    """Place of each pixel; equal for the pixels of a cell that is replaced whole."""

    def __post_init__(self) -> None:
        maps = self.maps.to(wide(self.maps))
        self.resized = pixels.resize(maps, self.size)
        units = (maps if self.hiding.cells else self.resized).flatten(1)
        order, ranks = _sorted(units)
        n = units.shape[1]
        chunk = ceil(n / self.hiding.steps)
        self.points = torch.arange(ceil(n / chunk) + 1, device=units.device).mul(chunk).clamp(max=n)
        weights = torch.ones(n, dtype=torch.float64, device=units.device)
        self.ranks = ranks
        if self.hiding.cells:
            cells = torch.arange(n, device=units.device, dtype=torch.float32).reshape(1, 1, *self.maps.shape[2:])
            cell = pixels.resize(cells, self.size, "nearest").long().flatten()
            weights = torch.bincount(cell, minlength=n).double()
            self.ranks = ranks[:, cell]
        taken = torch.cat([weights.new_zeros(len(units), 1), weights[order].cumsum(1)], 1)
        self.shares = taken[:, self.points] / taken[:, -1:]
        sums = torch.cat([weights.new_zeros(len(units), 1), units.gather(1, order).double().cumsum(1)], 1)
        self.marked = sums[:, self.points].diff(dim=1) / self.points.diff()
        self.is_finite = units.isfinite().all(1)

    def frames(self, scene: _Scene) -> dict[str, _Frames]:
        """Every kind of masked image that depends on the map."""
        steps = len(self.points) - 2
        scaled = pixels.normalize(self.resized[:, 0])[:, None].to(scene.images.dtype)
        n = int(self.points[-1])

        def holes(rows: Tensor, first: Tensor) -> Tensor:
            return (self.ranks[rows] < first[:, None]).reshape(-1, 1, *self.size)

        shares = torch.tensor(ROAD_SHARES, device=self.ranks.device).mul(n).round().long()

        def road(rows: Tensor, hole: Tensor) -> Tensor:
            return inpaint(scene.images[rows], hole, noise=0.01)

        return {
            "deletion": _Frames(steps, lambda rows, k: scene.without(rows, holes(rows, self.points[k + 1]))),
            "insertion": _Frames(steps, lambda rows, k: scene.without(rows, ~holes(rows, self.points[k + 1]))),
            "kept": _Frames(1, lambda rows, _: scene.mixed(rows, scaled[rows])),
            "hidden": _Frames(1, lambda rows, _: scene.mixed(rows, 1 - scaled[rows])),
            "most_first": _Frames(len(shares), lambda rows, k: road(rows, holes(rows, shares[k]))),
            "least_first": _Frames(len(shares), lambda rows, k: road(rows, ~holes(rows, n - shares[k]))),
        }


def _fields(order: _Order, method: str, found: dict[_Key, Tensor], needs: set[str]) -> Fields:
    """What the formulas read, NaN where the map does not allow it."""
    original, empty = found.get((None, "original")), found.get((None, "empty"))
    fields: Fields = {"shares": order.shares, "marked": order.marked}
    if original is not None:
        fields["original"] = original[:, 0]
    flat = order.resized.flatten(1).amax(1) == order.resized.flatten(1).amin(1)
    for (owner, name), scores in found.items():
        if owner == method:
            fields[name] = scores.where(order.is_finite[:, None], torch.nan)
    for name in ("kept", "hidden"):
        if name in fields:
            fields[name] = fields[name][:, 0].where(~flat, torch.nan)
    ends = {"deletion": (original, empty), "insertion": (empty, original)}
    for name, (first, last) in ends.items():
        if name in needs and first is not None and last is not None:
            between = fields.get(name, first[:, :0])
            fields[name] = torch.cat([first, between, last], 1).where(order.is_finite[:, None], torch.nan)
    if "falls" in needs and original is not None:
        squares = _squares(*order.size).to(order.resized)
        fields["falls"] = original - found[None, "falls"]
        fields["covered"] = torch.einsum("bhw,rhw->br", order.resized[:, 0], squares).double()
    return fields


def _run(
    model: nn.Module,
    scene: _Scene,
    targets: Int[Tensor, " b"],
    frames: dict[_Key, _Frames],
    progress: Progress | None,
) -> dict[_Key, Float[Tensor, "b n"]]:
    """Scores of all frames, batches filled across their kinds."""
    hiding = scene.hiding
    call = hiding.call(scene.images)
    counts = [made.count * len(targets) for made in frames.values()]
    total, done, scores = sum(counts), 0, list[Tensor]()
    with untouched(model) as net, torch.inference_mode(False), torch.no_grad():
        for images, rows in _batches(frames.values(), len(targets), scene):
            answer = call(net, images, rows)
            call = replace(call, kind=answer.call.kind)  # the batches to come are read as the first one
            logits = answer.logits.to(wide(answer.logits))
            if not scores and not callable(hiding.score):
                check_classes(targets, max(2, logits.shape[1]))
            scores.append(_score(logits, answer.activation, targets[rows], hiding.score).double())
            done += len(rows)
            if progress is not None:
                progress("scoring masked images", done, total)
    parts = torch.cat(scores).split(counts) if scores else ()
    return {key: part.reshape(len(targets), -1) for key, part in zip(frames, parts, strict=True)}


def _batches(frames: Collection[_Frames], batch: int, scene: _Scene) -> Iterator[tuple[Tensor, Tensor]]:
    ready: list[tuple[Tensor, Tensor]] = []
    free = size = scene.hiding.batch_size
    for made in frames:
        items = torch.arange(made.count * batch, device=scene.images.device)
        while len(items):
            part, items = items[:free], items[free:]
            rows = part // made.count
            ready.append((made.make(rows, part % made.count), rows))
            free -= len(part)
            if not free:
                yield _joined(ready)
                ready, free = [], size
    if ready:
        yield _joined(ready)


def _joined(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    if len(parts) == 1:
        return parts[0]
    images, rows = zip(*parts, strict=True)
    return torch.cat(images), torch.cat(rows)


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


def _score(logits: Tensor, link: str, targets: Tensor, score: Score) -> Tensor:
    if callable(score):
        return score(logits, targets)
    if score == "logit" and logits.shape[1] == 1:
        return logits[:, 0]
    return (probabilities_of(logits, link) if score == "probability" else logits).gather(1, targets[:, None])[:, 0]


def substitute(
    images: Float[Tensor, "b c *grid"],
    fill: Fill,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Float[Tensor, "b c *grid"]:
    """What replaces a pixel, as images of the same shape.

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
