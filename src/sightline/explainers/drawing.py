"""Figures of maps: an image and beside it its maps, each with its title, color scale, layer and verdicts in words."""

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from sightline import maps
from sightline.facts import Layer, Verdict, percent, words, worst

if TYPE_CHECKING:
    from sightline.explainers.explainer import Explanation

_CRISP = 96  # images up to this side are enlarged by a whole factor, so that their pixels are seen
_MARGIN = 12  # around a figure, in pixels
_SIDE, _PER_ROW = 224, 3  # longest side of an image in a notebook, and the maps beside it: as wide as its page
_SLICES = 5
_TARGETS = 8  # most targets of an image that are drawn
NO_BREAK = "\N{NO-BREAK SPACE}"


class Column(NamedTuple):
    """One map, or one picture of several, as a figure shows it."""

    name: str
    title: str
    content: Float[Tensor, "1 1 *grid"] | UInt8[Tensor, "1 3 _ _"]
    caption: str
    is_signed: bool


def column(explanation: "Explanation", method: str, place: int, target: int = 0, before: str = "") -> Column:
    """The map of one method for one image, with a caption that says where it was read and what to distrust."""
    values, verdicts = explanation.maps[method][place, target], explanation.verdicts[method][place]
    return Column(
        name=method,
        title=titled(method, verdicts, method in explanation.controls),
        content=values.detach().float().cpu()[None, None],
        caption="\n".join(filter(None, (before, caption(values.shape, explanation.layers[method], verdicts)))),
        is_signed=method in explanation.signed,
    )


def figure(
    picture: UInt8[Tensor, "3 h w"] | None,
    columns: Sequence[Column],
    heading: str,
    *,
    side: int = _SIDE,
    per_row: int | None = _PER_ROW,
    title: str = "image",
) -> UInt8[Tensor, "3 H W"]:
    """An image, its longer side about `side` pixels, and beside it its maps laid over it; without it, the maps alone.

    >>> map = Column("saliency", "saliency", torch.eye(2)[None, None], "2 x 2 positions", False)
    >>> figure(None, [map], "explained: cat").shape[2]
    248
    """
    titles: dict[str, Column] = {}
    for each in columns:
        titles[each.name if each.title in titles else each.title] = each
    contents = {name: each.content for name, each in titles.items()}
    if picture is None:
        contents, which = _alone(contents, side)
        heading = f"{heading}\n{which}".strip()
        picture = torch.zeros(3, *next(iter(contents.values())).shape[2:], dtype=torch.uint8)
        over: dict[str, Any] = {"opacity": 1.0, "title": None}
    else:
        picture = sized(picture, side)
        over = {"title": title}
    drawn = maps.side_by_side(
        picture[None],
        contents,
        signed=[name for name, each in titles.items() if each.is_signed],
        scales=True,
        captions={name: each.caption for name, each in titles.items()},
        per_row=per_row,
        heading=heading,
        **over,
    )
    return F.pad(drawn, [_MARGIN] * 4, value=255)


def _alone(contents: Mapping[str, Tensor], side: int) -> tuple[dict[str, Float[Tensor, "1 1 _ _"]], str]:
    """Maps without an image, all of one size, their positions as squares; of volumes some slices, and which ones."""
    grid = [max(sides) for sides in zip(*(values.shape[2:] for values in contents.values()), strict=True)]
    flat, which = dict(contents), ""
    if len(grid) == 3:
        count = min(_SLICES, grid[0])
        depths = [(2 * i + 1) * grid[0] // (2 * count) for i in range(count)]
        which = f"slices {', '.join(map(str, depths))} of 0 to {grid[0] - 1}"
        whole = {name: maps.resize(values, tuple(grid), "nearest") for name, values in contents.items()}
        flat = {name: maps.slices(values, depths) for name, values in whole.items()}
        grid, side = [grid[1], count * grid[2]], 2 * side
    scale = side / max(grid)
    size = max(1, round(scale * grid[0])), max(1, round(scale * grid[1]))
    mode = "nearest" if scale >= 1 else "bilinear"
    return {name: maps.resize(values, size, mode) for name, values in flat.items()}, which


def figure_of(
    explanation: "Explanation", rows: Sequence[int] | None = None, captions: Mapping[str, str] | None = None
) -> UInt8[Tensor, "3 H W"]:
    """All maps of these images, one image below the other; None: all images.

    Raises:
        ValueError: as `rows_of`, or there is no map with such a caption.
    """
    chosen = rows_of(explanation, rows)
    if wrong := [name for name in captions or () if name not in explanation.maps]:
        raise ValueError(f"expected captions of maps out of {', '.join(explanation.maps)}; got {wrong[0]!r}")
    methods = sorted(explanation.maps, key=lambda method: method in explanation.controls)
    is_volume = any(values.ndim == 5 for values in explanation.maps.values())
    drawn: list[Tensor] = []
    for row in chosen:
        for target in range(min(explanation.targets.shape[1], _TARGETS)):
            columns = [column(explanation, method, row, target, (captions or {}).get(method, "")) for method in methods]
            shown = explanation.images[row] if explanation.images and not is_volume else None
            per_row = 1 if is_volume else _PER_ROW if shown is not None else _PER_ROW + 1
            drawn.append(figure(shown, columns, heading_of(explanation, row, target), per_row=per_row))
    width = max(each.shape[2] for each in drawn)
    return torch.cat([F.pad(each, (0, width - each.shape[2], 0, 0), value=255) for each in drawn], 1)


def rows_of(explanation: "Explanation", rows: Sequence[int] | None) -> Sequence[int]:
    """The images that are asked for; None: all.

    Raises:
        ValueError: there is no such image, or none is asked for.
    """
    count = len(explanation.targets)
    chosen = range(count) if rows is None else rows
    if wrong := [row for row in chosen if not 0 <= row < count]:
        raise ValueError(f"expected images out of 0..{count - 1}, got {wrong[0]}; count them from 0")
    if not chosen:
        raise ValueError(f"expected at least one image out of 0..{count - 1}, got none; count them from 0")
    return chosen


def text_of(explanation: "Explanation", rows: Sequence[int]) -> str:
    """The same in words, for a screen reader."""
    texts: list[str] = []
    for row in rows:
        heading = heading_of(explanation, row, 0).replace("\n", ", ")
        columns = [column(explanation, method, row) for method in explanation.maps]
        texts.append("; ".join([heading, *(f"{each.title}: {each.caption}" for each in columns)]).replace("\n", ", "))
    return ". ".join(texts)


def heading_of(explanation: "Explanation", row: int, target: int) -> str:
    """What is over the maps of one image: what is explained, what is predicted, and the name of the image."""
    targets, probabilities = explanation.targets[row].tolist(), explanation.probabilities[row]
    if explanation.target:
        first = f"explained: {explanation.target} ({float(explanation.logits[row, target]):.4g})"
    else:
        first = answer(probabilities.tolist(), targets[target], int(probabilities.argmax()), explanation.classes)
    name = explanation.names[row] if explanation.names else ""
    number = f"image {row}" if len(explanation.targets) > 1 else ""
    second = f"image: {name}" if name and maps.is_writable(name) else number
    return f"{first}\n{second}".strip()


def answer(
    probabilities: Sequence[float], explained: int, predicted: int, classes: Sequence[str], before: str = "explained: "
) -> str:
    """Which class is explained, how probable it is, and what the network predicts.

    >>> answer([0.25, 0.75], 0, 1, ["cat"]), answer([0.25, 0.75], 1, 1, [])
    ('explained: cat (25.0 %); prediction: class 1 (75.0 %)', 'explained: class 1 (75.0 %), the prediction')
    """

    def shown(index: int) -> str:
        name = classes[index] if index < len(classes) else ""
        return f"{name if name and maps.is_writable(name) else f'class {index}'} ({percent(probabilities[index])})"

    prediction = ", the prediction" if explained == predicted else f"; prediction: {shown(predicted)}"
    return f"{before}{shown(explained)}{prediction}"


def jpeg(image: UInt8[Tensor, "3 h w"]) -> bytes:
    """One RGB image as the bytes of a JPEG file, a third of the size of a PNG.

    >>> jpeg(torch.zeros(3, 2, 2, dtype=torch.uint8))[:2].hex()
    'ffd8'
    """
    file = io.BytesIO()
    Image.fromarray(image.movedim(0, -1).numpy()).save(file, "JPEG", quality=90, subsampling=0)
    return file.getvalue()


def packed(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Arrays by name as the bytes of a compressed .npz file.

    >>> np.load(io.BytesIO(packed({"cam": np.ones(2)})))["cam"].tolist()
    [1.0, 1.0]
    """
    file = io.BytesIO()
    content: dict[str, Any] = dict(arrays)
    np.savez_compressed(file, allow_pickle=False, **content)
    return file.getvalue()


def titled(method: str, verdicts: Sequence[Verdict], is_control: bool = False) -> str:
    """A method with the most severe level of the verdicts on its map, unless that is a note.

    >>> titled("lrp", [Verdict("flat")]), titled("center_map", [], is_control=True)
    ('LRP (doubt)', 'control: center map')
    """
    level, title = worst(verdicts), f"{'control: ' * is_control}{words(method)}"
    return title if level in (None, "note") else f"{title} ({level.replace(' ', NO_BREAK)})"


def caption(grid: Sequence[int], layer: Layer, verdicts: Sequence[Verdict]) -> str:
    r"""Where a map was read, how many positions it has, and in further lines the verdicts on it.

    >>> caption((4, 4), Layer("layer4", (512, 4, 4)), [Verdict("flat", "do not read")])
    'layer4, 4 x 4 positions (coarse)\nflat'
    """
    place = f"{layer.name}, " if layer else ""
    coarse = " (coarse)" if min(grid) < maps.COARSE else ""
    return "\n".join([f"{place}{' x '.join(map(str, grid))} positions{coarse}", *verdicts])


def sized(picture: UInt8[Tensor, "3 h w"], side: int) -> UInt8[Tensor, "3 _ _"]:
    """A picture as it is shown on a page, its longer side about `side` pixels.

    Small ones are enlarged by a whole factor, so that each of their pixels is seen, others smoothly.

    >>> sized(torch.zeros(3, 64, 32, dtype=torch.uint8), 448).shape, sized(torch.zeros(3, 300, 200).byte(), 448).shape
    (torch.Size([3, 448, 224]), torch.Size([3, 448, 299]))
    """
    height, width = picture.shape[1:]
    longest = max(height, width)
    if longest <= _CRISP:
        return picture.repeat_interleave(side // longest, 1).repeat_interleave(side // longest, 2)
    size = max(1, round(width * side / longest)), max(1, round(height * side / longest))
    resized = Image.fromarray(picture.movedim(0, -1).numpy()).resize(size, Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(resized)).movedim(-1, 0)
