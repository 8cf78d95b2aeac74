"""What the page draws: images and maps as data URIs, outlines and curves as SVG paths, maps in words."""

import base64
import io
import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from PIL import Image

from sightline import maps

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
        return _uri("png", file.getvalue())
    photo.thumbnail((side, side), Image.Resampling.LANCZOS)
    photo.save(file, "JPEG", quality=88)
    return _uri("jpeg", file.getvalue())


def heat(
    raw: Float[Array, "h w"], ends: tuple[float, float] | None = None, side: int = 96, signed: bool = False
) -> str:
    """A data URI of a map in colours, `side` pixels square. `ends`: values of the first and last colour; None: its own.

    `signed`: on the diverging scale, whose middle is 0; `ends` then lie as far above it as below.

    >>> heat(np.eye(2))[:22]
    'data:image/png;base64,'
    """
    values = torch.from_numpy(raw.astype(np.float64))
    if ends is None:
        values = maps.normalise(values, signed)
    else:
        low, high = (0.0, ends[1]) if signed else ends
        values = (values - low) / (high - low) if high > low else 0 * values
    drawn = maps.resize(values[None, None], (side, side))[0, 0].clamp(-1 if signed else 0, 1)
    return _uri("png", maps.png(maps.colour(drawn, signed)))


def colour_stops(n: int = 17, signed: bool = False) -> list[str]:
    """The colours of the map from 0 to 1, from -1 if `signed`, in `n` equal steps, for a gradient.

    >>> colour_stops(3)
    ['#000004', '#bc3754', '#fcffa4']
    """
    return [f"#{r:02x}{g:02x}{b:02x}" for r, g, b in maps.colour_bar(1, n, signed)[:, 0].T.tolist()]


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
    path, drawing = "", False
    for at, value in zip(x, y, strict=True):
        if np.isfinite(value):
            path += f"{'L' if drawing else 'M'}{at:.1f} {value:.1f}" + ("" if drawing else "h0")
        drawing = bool(np.isfinite(value))
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
    """What a listener should know of a map: the quarter that holds most of its positive values.

    >>> in_words(np.array([[3.0, 1.0], [0.0, -5.0]]))
    '75 % of its positive values lie in the upper left quarter'
    """
    ends = span(raw)
    if ends is None:
        return "it has no finite value"
    if ends[0] == ends[1]:
        return f"it is flat, {ends[0]:.3g} everywhere"
    energy = np.where(np.isfinite(raw), raw, 0).clip(0)
    if not energy.any():
        return "it has no positive value"
    upper, left = (np.clip(n / 2 - np.arange(n), 0, 1) for n in energy.shape)
    shares = np.stack([upper, 1 - upper]) @ (energy / energy.sum()) @ np.stack([left, 1 - left]).T
    row, column = np.unravel_index(shares.argmax(), (2, 2))
    quarter = f"{('upper', 'lower')[row]} {('left', 'right')[column]}"
    return f"{100 * shares.max():.0f} % of its positive values lie in the {quarter} quarter"


def matrix(shares: Float[Array, "c c"]) -> str:
    """A data URI of a matrix with values in [0, 1], one pixel per entry; NaN is grey.

    >>> matrix(np.eye(2))[:22]
    'data:image/png;base64,'
    """
    return _uri("png", maps.png(maps.colour(torch.from_numpy(shares))))


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One quantity over the epochs, on a canvas of `WIDTH` x `HEIGHT`."""

    quantity: str
    text: str
    """Its course in words."""
    lines: dict[str, str]
    """"train" and "val" -> SVG path."""
    x_ticks: dict[str, float]
    y_ticks: dict[str, float]
    """label -> position"""


WIDTH, HEIGHT = 400.0, 200.0


def charts(history: list[dict[str, float]]) -> list[Chart]:
    """Loss and accuracy in training and validation, as far as they have finite values.

    >>> row = {"epoch": 1.0, "train_loss": 2.0, "train_accuracy": 0.5, "val_loss": np.nan, "val_accuracy": np.nan}
    >>> [chart.text for chart in charts([row])]
    ['train loss 2 in epoch 1, 2 in epoch 1', 'train accuracy 0.5 in epoch 1, 0.5 in epoch 1']
    """
    from matplotlib.ticker import MaxNLocator

    epochs = np.array([row["epoch"] for row in history])
    x = WIDTH * np.linspace(0, 1, len(epochs))
    drawn: list[Chart] = []
    for quantity in ("loss", "accuracy"):
        lines = {part: np.array([row[f"{part}_{quantity}"] for row in history]) for part in ("train", "val")}
        lines = {part: line for part, line in lines.items() if np.isfinite(line).any()}
        if not lines:
            continue
        ticks = np.array(MaxNLocator(5, steps=(1, 2, 5, 10)).tick_values(*(span(*lines.values()) or (0.0, 1.0))))
        y = {part: _height(line, ticks) for part, line in lines.items()}
        each = math.ceil(len(epochs) / 8)
        drawn.append(
            Chart(
                quantity=quantity,
                text="; ".join(
                    f"{part} {quantity} {line[0]:.3g} in epoch {epochs[0]:g}, {line[-1]:.3g} in epoch {epochs[-1]:g}"
                    for part, line in lines.items()
                ),
                lines={part: curve(x, y[part]) for part in lines},
                x_ticks={f"{epoch:g}": float(at) for epoch, at in zip(epochs[::each], x[::each], strict=True)},
                y_ticks={f"{tick:.4g}": float(at) for tick, at in zip(ticks, _height(ticks, ticks), strict=True)},
            )
        )
    return drawn


def _height(values: Float[Array, " n"], ticks: Float[Array, " ticks"]) -> Float[Array, " n"]:
    return HEIGHT * (ticks[-1] - values) / (ticks[-1] - ticks[0])


def _uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _runs(edges: Bool[Array, "lines n"]) -> list[tuple[int, int, int]]:
    """(line, start, length) of every run of True."""
    steps = np.diff(np.pad(edges, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    starts, ends = np.argwhere(steps == 1), np.argwhere(steps == -1)
    return [(int(line), int(start), int(end - start)) for (line, start), (_, end) in zip(starts, ends, strict=True)]
