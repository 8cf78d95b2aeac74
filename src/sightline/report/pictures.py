"""Drawings of the page: images and maps as data URIs, outlines and curves as SVG paths, maps in words."""

import io
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from PIL import Image

from sightline import facts, maps
from sightline.evaluation import Curve, Example
from sightline.notebook import uri
from sightline.report.studies import Effect
from sightline.report.tables import along

Array = np.ndarray


def picture(image: UInt8[Array, "h w 3"], side: int = 256) -> str:
    """A data URI: PNG up to 128 pixels, JPEG above, shrunk to `side` pixels where it is larger.

    >>> picture(np.zeros((2, 2, 3), np.uint8))[:22]
    'data:image/png;base64,'
    """
    file = io.BytesIO()
    photo = Image.fromarray(image)
    if max(photo.size) <= 128:
        photo.save(file, "PNG", optimize=True)
        return uri("png", file.getvalue())
    photo.thumbnail((side, side), Image.Resampling.LANCZOS)
    photo.save(file, "JPEG", quality=88)
    return uri("jpeg", file.getvalue())


def heat(
    raw: Float[Array, "h w"], ends: tuple[float, float] | None = None, side: int = 96, signed: bool = False
) -> str:
    """A data URI of a map in colors, `side` pixels square. `ends`: values of the first and last color; None: its own.

    `signed`: on the diverging scale, whose middle is 0; `ends` then lie as far above it as below. Gray where all values
    are the same, or nearly so on a scale of their own.

    >>> heat(np.eye(2))[:22]
    'data:image/png;base64,'
    """
    values = torch.from_numpy(raw.astype(np.float64))
    if ends is None:
        values = maps.normalize(values, signed) if not is_nearly_flat(raw) else torch.nan * values
    else:
        low, high = (0.0, ends[1]) if signed else ends
        values = (values - low) / (high - low) if high > low else torch.nan * values
    drawn = maps.resize(values[None, None], (side, side))[0, 0].clamp(-1 if signed else 0, 1)
    return uri("png", png(maps.color(drawn, signed)))


def is_nearly_flat(raw: Float[Array, "h w"]) -> bool:
    """Whether all values are the same to within 1 %: what `sightline.maps.overlay` draws gray.

    >>> is_nearly_flat(np.array([[0.500, 0.501]])), is_nearly_flat(np.array([[0.0, 1e-9]]))
    (True, False)
    """
    return bool(maps.variation(torch.from_numpy(raw)[None, None]) < maps.NEARLY_FLAT)


def homes(examples: Mapping[str, Example]) -> dict[str, str]:
    """Key of each example -> the first key with the same image and mask: the place where these are drawn.

    >>> from dataclasses import replace
    >>> one = Example(name="a", image=np.zeros((2, 2, 3), np.uint8), label=None, prediction="", probability=1.0,
    ...     maps={}, verdicts={})
    >>> homes({"gallery-1": one, "worst-1": replace(one), "worst-2": replace(one, image=one.image + 1)})
    {'gallery-1': 'gallery-1', 'worst-1': 'gallery-1', 'worst-2': 'worst-2'}
    """
    first: dict[tuple[object, ...], str] = {}

    def of(key: str, example: Example) -> str:
        mask = None if example.mask is None else example.mask.tobytes()
        return first.setdefault((example.image.shape, example.image.tobytes(), mask), key)

    return {key: of(key, example) for key, example in examples.items()}


def color_stops(n: int = 17, signed: bool = False) -> list[str]:
    """The colors of the map from 0 to 1, from -1 if `signed`, in `n` equal steps, for a gradient.

    >>> color_stops(3)
    ['#000004', '#bc3754', '#fcffa4']
    """
    return [f"#{r:02x}{g:02x}{b:02x}" for r, g, b in maps.color_bar(1, n, signed)[:, 0].T.tolist()]


def outline(mask: Bool[Array, "h w"]) -> str:
    """The border of a mask as an SVG path in pixel coordinates.

    >>> outline(np.array([[False, True]]))
    'M1 0h1M1 1h1M1 0v1M2 0v1'
    """
    padded = np.pad(mask, 1)
    across, down = np.diff(padded, axis=0)[:, 1:-1], np.diff(padded, axis=1)[1:-1].T
    horizontal = "".join(f"M{x} {y}h{length}" for y, x, length in _runs(across))
    return horizontal + "".join(f"M{x} {y}v{length}" for x, y, length in _runs(down))


def curve(x: Float[Array, " n"], y: Float[Array, " n"]) -> str:
    """A line through points as an SVG path; a value that is not finite leaves a gap, a lonely point stays a dot.

    >>> curve(np.array([0.0, 1.0, 2.0]), np.array([5.0, np.nan, 4.0]))
    'M0.0 5.0h0M2.0 4.0h0'
    """
    path = ""
    for _, start, length in _runs(np.isfinite(x + y)[None]):
        first, *rest = _points(x, y, slice(start, start + length))
        path += f"M{first}h0" + "".join(f"L{point}" for point in rest)
    return path


def span(*raw: Float[Array, "..."], signed: bool = False) -> tuple[float, float] | None:
    """Lowest and highest finite value of all these arrays, None where there is none; `signed`: as far below 0 as above.

    >>> span(np.array([[1.0, np.inf]]), np.array([[3.0]])), span(np.array([-2.0, 1.0]), signed=True)
    ((1.0, 3.0), (-2.0, 2.0))
    """
    finite = np.concatenate([values[np.isfinite(values)] for values in raw])
    if not finite.size:
        return None
    largest = float(np.abs(finite).max())
    return (-largest, largest) if signed else (float(finite.min()), float(finite.max()))


def in_words(raw: Float[Array, "h w"]) -> str:
    """A map for a screen reader: the quarter that holds most of its positive values.

    >>> in_words(np.array([[3.0, 1.0], [0.0, -5.0]]))
    '75 % of its positive values lie in the upper left quarter'
    """
    ends = span(raw)
    if ends is None:
        return "it has no finite value"
    if ends[0] == ends[1]:
        return f"it is flat, {ends[0]:.3g} everywhere"
    if is_nearly_flat(raw):
        return f"it is nearly flat, {ends[0]:.3g} to within 1 % everywhere"
    energy = np.where(np.isfinite(raw), raw, 0).clip(0)
    if not energy.any():
        return "it has no positive value"
    upper, left = (np.clip(n / 2 - np.arange(n), 0, 1) for n in energy.shape)
    fractions = np.stack([upper, 1 - upper]) @ (energy / energy.sum()) @ np.stack([left, 1 - left]).T
    row, column = np.unravel_index(fractions.argmax(), (2, 2))
    quarter = f"{('upper', 'lower')[row]} {('left', 'right')[column]}"
    return f"{100 * fractions.max():.0f} % of its positive values lie in the {quarter} quarter"


def matrix(values: Float[Array, "c c"]) -> str:
    """A data URI of a matrix with values in [0, 1], one pixel per entry; NaN is gray.

    >>> matrix(np.eye(2))[:22]
    'data:image/png;base64,'
    """
    return uri("png", png(maps.color(torch.from_numpy(values))))


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One quantity over the epochs, or along deletion or insertion, on a canvas of `WIDTH` x `HEIGHT`."""

    quantity: str
    text: str
    """Its course in words."""
    lines: dict[str, str]
    """"train" and "val", or methods -> SVG path."""
    x_ticks: dict[str, float]
    y_ticks: dict[str, float]
    """label -> position"""
    bands: dict[str, str] = field(default_factory=dict)
    """Methods -> SVG path around the 95 % interval."""


WIDTH, HEIGHT = 400.0, 200.0
SIDE = 300.0
"""Side of the square of a scatter plot."""


def charts(history: list[dict[str, float]]) -> list[Chart]:
    """Loss and accuracy in training and validation, as far as they have finite values.

    >>> row = {"epoch": 1.0, "train_loss": 2.0, "train_accuracy": 0.5, "val_loss": np.nan, "val_accuracy": np.nan}
    >>> [chart.text for chart in charts([row])]
    ['train loss 2 in epoch 1, 2 in epoch 1', 'train accuracy 0.5 in epoch 1, 0.5 in epoch 1']
    """
    epochs = [row["epoch"] for row in history]
    x = WIDTH * np.linspace(0, 1, len(epochs))
    each = math.ceil(len(epochs) / 8)
    drawn: list[Chart] = []
    for quantity in ("loss", "accuracy"):
        lines = {part: np.array([row[f"{part}_{quantity}"] for row in history]) for part in ("train", "val")}
        lines = {part: line for part, line in lines.items() if np.isfinite(line).any()}
        text = "; ".join(
            f"{part} {quantity} {line[0]:.3g} in epoch {epochs[0]:g}, {line[-1]:.3g} in epoch {epochs[-1]:g}"
            for part, line in lines.items()
        )
        x_ticks = {f"{epoch:g}": float(at) for epoch, at in zip(epochs[::each], x[::each], strict=True)}
        if lines:
            drawn.append(_chart(quantity, text, {part: (x, line) for part, line in lines.items()}, {}, x_ticks))
    return drawn


def _chart(
    quantity: str,
    text: str,
    lines: Mapping[str, tuple[Array, Array]],
    bands: Mapping[str, tuple[Array, Array]],
    x_ticks: dict[str, float],
) -> Chart:
    """Lines by name, (x, values), and for some of them the ends of a band."""

    def down(values: Array) -> Array:
        return _place(values, ticks, HEIGHT, up=False)

    ticks = _ticks(*(values for _, values in lines.values()), *(end for ends in bands.values() for end in ends))
    return Chart(
        quantity=quantity,
        text=text,
        lines={name: curve(x, down(values)) for name, (x, values) in lines.items()},
        bands={name: _band(lines[name][0], *map(down, ends)) for name, ends in bands.items()},
        x_ticks=x_ticks,
        y_ticks=_labeled(ticks, down(ticks)),
    )


def courses(curves: Mapping[str, Mapping[str, Curve]], foremost: Sequence[str], thin: Collection[str]) -> list[Chart]:
    """The score along deletion and insertion: `foremost` methods with their bands and in words, under them `thin` ones.

    >>> line = np.array([0.0, 1.0])
    >>> curve = Curve(shares=line, mean=line, low=line - 0.5, high=line + 0.5)
    >>> [chart.text for chart in courses({"insertion": {"cam": curve}}, ["cam"], [])]
    ['cam 0 with 0 %, 0.5 with 50 %, 1 with 100 % of the pixels inserted']
    """
    drawn: list[Chart] = []
    x_ticks = {f"{percent} %": WIDTH * percent / 100 for percent in (0, 25, 50, 75, 100)}
    for kind, by_method in curves.items():
        shown = [name for name in (*thin, *reversed(foremost)) if name in by_method]
        lines = {name: (WIDTH * by_method[name].shares, by_method[name].mean) for name in shown}
        bands = {name: (by_method[name].low, by_method[name].high) for name in reversed(foremost) if name in by_method}
        text = "; ".join(_course(name, by_method[name]) for name in foremost if name in by_method)
        text += f" of the pixels {kind.removesuffix('ion')}ed"
        if bands:
            drawn.append(_chart(kind, text, lines, bands, x_ticks))
    return drawn


def _course(name: str, line: Curve) -> str:
    start, _, middle, _, end = along(line)
    return f"{name} {start:.3g} with 0 %, {middle:.3g} with 50 %, {end:.3g} with 100 %"


def _band(x: Float[Array, " n"], low: Float[Array, " n"], high: Float[Array, " n"]) -> str:
    """The area between two lines as an SVG path, one part for each stretch where both are finite."""
    path = ""
    for _, start, length in _runs(np.isfinite(x + low + high)[None]):
        part = slice(start, start + length)
        path += "M" + "L".join([*_points(x, low, part), *_points(x, high, part)[::-1]]) + "z"
    return path


def _points(x: Float[Array, " n"], y: Float[Array, " n"], part: slice) -> list[str]:
    return [f"{at:.1f} {value:.1f}" for at, value in zip(x[part], y[part], strict=True)]


@dataclass(frozen=True, kw_only=True)
class Dot:
    """One method in a scatter."""

    method: str
    x: float
    y: float
    label: tuple[float, float] | None
    """Where its name begins, on the line that letters stand on; None where it is not named, or no place is free."""
    name: str
    """As it is written."""


@dataclass(frozen=True, kw_only=True)
class Scatter:
    """Two metrics over methods, on a canvas of `SIDE` x `SIDE` where right and up are better."""

    dots: tuple[Dot, ...]
    x_ticks: dict[str, float]
    y_ticks: dict[str, float]


LETTER, LINE = 9.5, 17.0
"""Width of a letter and height of a line of a name on a scatter plot, at most."""
_RADIUS = 6.0  # of a dot and its rim
_LEFT, _RIGHT = 0.0, SIDE + 24.0  # between the labels of the ticks and the end of the drawing


def scatter(
    x: Mapping[str, float], y: Mapping[str, float], higher_is_better: tuple[bool, bool], named: Sequence[str]
) -> Scatter | None:
    """The methods that have both values; None where there is none.

    Names of those `named` are written beside their dots, the first ones first, where they hide no dot and no name.

    >>> scatter({"cam": 1.0, "lrp": 2.0}, {"cam": 0.0, "lrp": np.nan}, (False, True), ["cam"]).dots
    (Dot(method='cam', x=150.0, y=150.0, label=(158.0, 155.0), name='CAM'),)
    """
    methods = [method for method in x if np.isfinite([x[method], y.get(method, np.nan)]).all()]
    if not methods:
        return None
    values = [np.array([axis[method] for method in methods]) for axis in (x, y)]
    x_ticks, y_ticks = (_ticks(column) for column in values)
    rightward, downward = higher_is_better[0], not higher_is_better[1]
    across, down = _place(values[0], x_ticks, SIDE, rightward), _place(values[1], y_ticks, SIDE, downward)
    places = {m: (float(at), float(under)) for m, at, under in zip(methods, across, down, strict=True)}
    names = {method: _short(facts.words(method)) for method in methods}
    labels = _labels({method: names[method] for method in named if method in places}, places)
    return Scatter(
        dots=tuple(
            Dot(method=method, x=round(at, 1), y=round(under, 1), label=labels.get(method), name=names[method])
            for method, (at, under) in places.items()
        ),
        x_ticks=_labeled(x_ticks, _place(x_ticks, x_ticks, SIDE, rightward)),
        y_ticks=_labeled(y_ticks, _place(y_ticks, y_ticks, SIDE, downward)),
    )


def _short(name: str, most: int = 20) -> str:
    """Long names without their middle: layers differ in their ends."""
    return name if len(name) <= most else f"{name[: most // 2 - 1]}…{name[-most // 2 :]}"


def _labels(names: Mapping[str, str], dots: Mapping[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """Where names begin: near their dots, in no other name and on no dot."""
    taken = [(at - _RADIUS, under - _RADIUS, at + _RADIUS, under + _RADIUS) for at, under in dots.values()]
    labels: dict[str, tuple[float, float]] = {}
    for method, name in names.items():
        (at, under), width = dots[method], LETTER * len(name)
        for step in (0.0, 1.0, -1.0, 1.7, -1.7):
            for left in (at + 8, at - 8 - width, at - width / 2):
                bottom = under + 5 + LINE * step
                box = (left, bottom - LINE + 4, left + width, bottom + 4)
                inside = box[0] >= _LEFT and box[2] <= _RIGHT and box[1] >= -12 and box[3] <= SIDE
                if method not in labels and inside and not any(_overlap(box, other) for other in taken):
                    labels[method] = round(left, 1), round(bottom, 1)
                    taken.append(box)
    return labels


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


@dataclass(frozen=True, kw_only=True)
class DotPlot:
    """Effects with their intervals, one below the other, on a canvas of `WIDTH` x `height`; positions in pixels."""

    effects: tuple[Effect, ...]
    x_ticks: dict[str, float]
    ticks: Float[Array, " ticks"]

    @property
    def height(self) -> float:
        """28 pixels for each effect."""
        return 28.0 * len(self.effects)

    def at(self, value: float) -> float:
        """Where a value lies across."""
        return round(float(_place(np.array([value], float), self.ticks, WIDTH)[0]), 1)


def dot_plot(effects: Sequence[Effect]) -> DotPlot | None:
    """The highest mean first, and 0 on the canvas; None where there is nothing to draw.

    >>> drawn = dot_plot([Effect(name="SE", values=[1.0, 3.0], mean=2.0, low=-10.0, high=10.0, holds=False)])
    >>> drawn.height, drawn.at(0.0), drawn.at(10.0), drawn.x_ticks["−5"]
    (28.0, 200.0, 400.0, 100.0)
    """
    if not effects:
        return None
    ends = np.array([[0.0, one.mean, one.low, one.high] for one in effects])
    ticks = _ticks(ends, *(np.array(one.values) for one in effects))
    drawn = tuple(sorted(effects, key=lambda one: -one.mean))
    return DotPlot(effects=drawn, x_ticks=_labeled(ticks, _place(ticks, ticks, WIDTH)), ticks=ticks)


def _place(
    values: Float[Array, " n"], ticks: Float[Array, " ticks"], size: float, up: bool = True
) -> Float[Array, " n"]:
    """Where values lie on an axis of this size that ends at the last tick; at the first one if it does not go up."""
    return size * np.abs(values - ticks[0 if up else -1]) / (ticks[-1] - ticks[0])


def _ticks(*values: Float[Array, "..."]) -> Float[Array, " ticks"]:
    from matplotlib.ticker import MaxNLocator

    low, high = span(*values) or (0.0, 1.0)
    if high - low < 1e-9 * max(abs(low), abs(high), 1e-9):
        low, high = low - 0.5, high + 0.5
    return np.array(MaxNLocator(5, steps=(1, 2, 5, 10)).tick_values(low, high))


def _labeled(ticks: Float[Array, " n"], places: Float[Array, " n"]) -> dict[str, float]:
    return {f"{tick + 0:.4g}".replace("-", "−"): round(float(at), 1) for tick, at in zip(ticks, places, strict=True)}


def png(image: UInt8[torch.Tensor, "3 h w"]) -> bytes:
    """A PNG file, with a table of its colors where they are few enough: a third of the size."""
    packed = image.long().permute(1, 2, 0) @ torch.tensor([1 << 16, 1 << 8, 1])
    colors, index = np.unique(packed.numpy(), return_inverse=True)
    if len(colors) > 256:
        return maps.png(image)
    file = io.BytesIO()
    drawn = Image.fromarray(index.reshape(packed.shape).astype(np.uint8))
    drawn.putpalette(np.stack([colors >> 16, colors >> 8 & 255, colors & 255], 1).astype(np.uint8).tobytes())
    drawn.save(file, "PNG", optimize=True)
    return file.getvalue()


def _runs(edges: Bool[Array, "lines n"]) -> list[tuple[int, int, int]]:
    """(line, start, length) of every run of True."""
    steps = np.diff(np.pad(edges, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    starts, ends = np.argwhere(steps == 1), np.argwhere(steps == -1)
    return [(int(line), int(start), int(end - start)) for (line, start), (_, end) in zip(starts, ends, strict=True)]
