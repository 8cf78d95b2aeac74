"""The embedded data sets: handwritten digits on a textured canvas among fragments of other digits.

The evidence that is planted in each:

- `clutter`: one digit, which is the class.
- `clutter-shortcut`: the same, and a colored patch that tells the class in training only.
- `clutter-pair`: one digit of {0, 1, 2} and one of {3, 4, 5}; the class names both, neither alone gives it away.
- `clutter-twice`: two different scans of the digit that is the class; either alone gives it away.

Source: the cluttered-MNIST protocol (Mnih et al. 2014, arXiv 1406.6247, section 4.1).
Differs: the digits are scikit-learn's 8 x 8 scans, the canvas is textured and colored, size and colors vary.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int64, Shaped, UInt8

from sightline.checks import missing
from sightline.data.decoded import Composed
from sightline.data.sets import ImageSet, sampled, statistics
from sightline.data.sources import COLUMNS
from sightline.data.splits import held_out
from sightline.recipe import Data

Array = np.ndarray
SPLITS = ("train", "val", "test")
SIZES = {"train": 6000, "val": 1000, "test": 2000}
CELLS = 10  # a scan of 8 x 8 with an empty cell around it
FEWEST, FRAGMENTS = 6, 8
_SINGLE = tuple((k,) for k in range(10))
PARTS: dict[str, tuple[tuple[int, ...], ...]] = {
    "clutter": _SINGLE,
    "clutter-shortcut": _SINGLE,
    "clutter-pair": tuple((a, b) for a in (0, 1, 2) for b in (3, 4, 5)),
    "clutter-twice": tuple((k, k) for k in range(10)),
}
"""The digits that the images of each class show, one or two."""
ORDER = ("first", "second")
"""Masks of a single digit, in the order of `PARTS`."""
Uniform = Callable[..., Float[Array, "b ..."]]
Below = Callable[[Any], Int64[Array, " b"]]
PATCH_COLORS = np.array(
    list(bytes.fromhex("e6192d 32be3c 1446ff ffe614 fa8214 8214be 3cf0f0 fa3cdc ffffff 000000")), dtype=np.uint8
).reshape(-1, 3)


@cache
def digits(split: str) -> tuple[Float[Array, "n 10 10"], Int64[Array, " n"]]:
    """Ink in [0, 1] and classes of the scans that a split may use, sorted by class; no scan is in two splits.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        raise missing("clutter needs scikit-learn, which holds its digits", "train") from None
    dataset: Any = load_digits()
    order = np.argsort(dataset.target, kind="stable")
    scans, classes = dataset.data[order], dataset.target[order].astype(np.int64)
    part = np.full(len(classes), "train", dtype=object)
    part[held_out(classes, 0.2, seed=0)] = "test"
    rest = np.flatnonzero(part == "train")
    part[rest[held_out(classes[rest], 0.1, seed=0)]] = "val"
    ink = np.pad(scans[part == split].reshape(-1, 8, 8) / 16, ((0, 0), (1, 1), (1, 1)))
    return ink.astype(np.float32), classes[part == split]


def _weights(position: Float[Array, "..."]) -> Float[Array, "... 10"]:
    """Cubic interpolation weights of the cells at these positions, in cells."""
    distance = np.abs(position[..., None] - np.arange(CELLS, dtype=np.float32))
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((2.5 - 0.5 * distance) * distance - 4) * distance + 2
    return np.where(distance < 1, near, np.where(distance < 2, far, 0)).astype(np.float32)


def _glyphs(
    ink: Float[Array, "b 10 10"], side: Float[Array, " b"], top: Float[Array, " b"], left: Float[Array, " b"], n: int
) -> Float[Array, "b n n"]:
    """Opacity of n x n pixels, from (top, left) on, of scans drawn `side` pixels high, with edges one pixel soft."""
    cell = (CELLS / side)[:, None]
    steps = np.arange(n, dtype=np.float32) + 0.5
    rows = _weights((top[:, None] + steps) * cell - 0.5)
    columns = _weights((left[:, None] + steps) * cell - 0.5)
    drawn = rows @ ink @ columns.transpose(0, 2, 1)
    return np.clip((drawn - 0.5) * (side / CELLS)[:, None, None] + 0.5, 0, 1)


def hsv(
    hue: Float[Array, "..."], saturation: Float[Array, "..."], value: Float[Array, "..."]
) -> Shaped[Array, "... 3"]:
    """Colors in [0, 1] from hue, saturation and value in [0, 1]."""
    wheel = np.clip(np.abs((hue[..., None] * 6 + np.array([0, 4, 2], np.float32)) % 6 - 3) - 1, 0, 1)
    return (value[..., None] * (1 - saturation[..., None] * (1 - wheel))).astype(np.float32)


def _texture(noise: Float[Array, "b c k k"], size: int) -> Float[Array, "b c s s"]:
    """Noise on a coarse grid, smoothly interpolated."""
    k = noise.shape[-1]
    position = np.linspace(0, k - 1, size, dtype=np.float32)
    weights = _weights(position)[:, :k]
    weights /= weights.sum(1, keepdims=True)
    return weights @ noise @ weights.T


def background(uniform: Uniform, size: int) -> Float[Array, "b s s 3"]:
    """A dark color with soft clouds of other tints, relief and grain."""
    base = hsv(uniform(), 0.15 + 0.4 * uniform(), 0.25 + 0.2 * uniform())[:, None, None]
    tint, relief = _texture(uniform(3, 5, 5), size), _texture(uniform(1, 10, 10), size)
    clouds = (0.2 * (tint - 0.5) + 0.2 * (relief - 0.5)).transpose(0, 2, 3, 1)
    return np.clip(base + clouds + 0.06 * (uniform(size, size, 1) - 0.5), 0, 0.5)


def _ink_color(uniform: Uniform) -> Float[Array, "b 3"]:
    """Lighter than any background; the same for digits and fragments, so that it tells nothing."""
    return hsv(uniform(), 0.6 * uniform(), 0.75 + 0.25 * uniform())


def _square(top: Int64[Array, " b"], left: Int64[Array, " b"], n: int) -> tuple[Array, Array, Array]:
    """Index of n x n pixels in each image."""
    steps = np.arange(n)
    return np.arange(len(top))[:, None, None], (top[:, None] + steps)[:, :, None], (left[:, None] + steps)[:, None, :]


def _paste(canvas: Float[Array, "b s s 3"], where: tuple[Array, Array, Array], alpha: Array, color: Array) -> None:
    canvas[where] += alpha[..., None] * (color[:, None, None] - canvas[where])


def _separate(corners: Int64[Array, "2 2 b"], sides: Int64[Array, "2 b"], size: int, below: Below) -> None:
    """Move two squares apart, down or across, in either order; `corners` is by square and axis."""
    axis, later = below(2), below(2)
    near, far = np.sort([below(size - sides.sum(0) + 1), below(size - sides.sum(0) + 1)], axis=0)
    images = np.arange(len(axis))
    corners[0, axis, images] = np.where(later, far + sides[1], near)
    corners[1, axis, images] = np.where(later, near, far + sides[0])


def compose(
    seed: int,
    split: str,
    indices: Sequence[int] | Int64[Array, " b"],
    size: int = 40,
    shortcut: float | None = None,
    parts: Sequence[tuple[int, ...]] = _SINGLE,
    marked: int | None = None,
) -> tuple[UInt8[Array, "b 3 s s"], Bool[Array, "b s s"], Bool[Array, "b s s"]]:
    """Images with the masks of their digits and of their patch; the class is the index modulo the number of classes.

    Each image depends on (seed, split, index) alone. `parts` holds the digits of each class: one, or two that do not
    overlap and are drawn smaller; two of one class are different scans. The mask is that of all digits, or of digit
    number `marked` alone. With `shortcut`, a patch covers one corner: its
    color is that of the class in this share of the images, and drawn from ten classes in the others. None: no patch.

    >>> images, digit, patch = compose(0, "test", [7])
    >>> images.shape, bool(digit.any()), bool(patch.any())
    ((1, 3, 40, 40), True, False)
    """
    indices = np.asarray(indices, dtype=np.int64)
    generators = [np.random.default_rng([seed, SPLITS.index(split), i]) for i in indices]

    def uniform(*shape: int) -> Float[Array, "b ..."]:
        return np.stack([g.random(shape, dtype=np.float32) for g in generators])

    def below(n: int | Array) -> Int64[Array, " b"]:
        return (uniform() * n).astype(np.int64)

    ink, classes = digits(split)
    label, unit = indices % len(parts), size / 40
    shown = np.array(parts)[label].T
    scans = _scans(shown, np.bincount(classes), below)
    low, high = (20, 28) if len(shown) == 1 else (15, 19)
    largest = round(high * unit)

    def side() -> Float[Array, " b"]:
        return (low + (high - low) * uniform()) * unit

    canvas = np.pad(background(uniform, size), ((0, 0), (0, largest), (0, largest), (0, 0)))
    piece = round(high / 4 * unit)
    for k in range(FRAGMENTS):  # of scans other than the first
        other = (scans[0] + 1 + below(len(ink) - 1)) % len(ink)
        width = side()
        inner = width * (1 - 2 / CELLS) - piece
        alpha = _glyphs(ink[other], width, width / CELLS + uniform() * inner, width / CELLS + uniform() * inner, piece)
        visible = uniform() < (1 if k < FEWEST else 0.5)
        where = _square(below(size - piece + 1), below(size - piece + 1), piece)
        _paste(canvas, where, alpha * visible[:, None, None], _ink_color(uniform))

    sides = [side() for _ in shown]
    corners = np.array([(below(size - side + 1), below(size - side + 1)) for side in sides])
    if len(shown) == 2:
        _separate(corners, np.ceil(sides).astype(np.int64), size, below)
    digit = np.zeros(canvas.shape[:3], dtype=bool)
    edge = np.zeros(len(indices), dtype=np.float32)
    for number, (scan, width, corner) in enumerate(zip(scans, sides, corners, strict=True)):
        alpha = _glyphs(ink[scan], width, edge, edge, largest)
        where = _square(corner[0], corner[1], largest)
        _paste(canvas, where, alpha, _ink_color(uniform))
        digit[where] |= (alpha >= 0.25) & (marked in (None, number))
    images = np.rint(canvas[:, :size, :size] * 255).astype(np.uint8)
    digit = digit[:, :size, :size]

    patch = np.zeros_like(digit)
    if shortcut is not None:
        color = np.where(uniform() < shortcut, label, below(10))
        patch = _paste_patch(images, PATCH_COLORS[color], below)
    return images.transpose(0, 3, 1, 2), digit & ~patch, patch


def _paste_patch(images: UInt8[Array, "b s s 3"], colors: UInt8[Array, "b 3"], below: Below) -> Bool[Array, "b s s"]:
    """A colored square in a random corner of each image, and where it is."""
    size = images.shape[1]
    width, margin = round(size / 8), round(size / 40)
    far = size - width - 2 * margin
    where = _square(margin + below(2) * far, margin + below(2) * far, width)
    images[where] = colors[:, None, None]
    patch = np.zeros(images.shape[:3], dtype=bool)
    patch[where] = True
    return patch


def _scans(shown: Int64[Array, "k b"], count: Int64[Array, " 10"], below: Below) -> Int64[Array, "k b"]:
    """A random scan of each digit shown; two digits of one class get different scans."""
    chosen = [below(count[shown[0]])]
    for other in shown[1:]:
        again = other == shown[0]
        chosen.append((again * (chosen[0] + 1) + below(count[other] - again)) % count[other])
    return (np.cumsum(count) - count)[shown] + chosen


def _with_mask(mask: str, *args: Any, **kwargs: Any) -> tuple[UInt8[Array, "b 3 s s"], Bool[Array, "b s s"]]:
    """What `compose` returns, with one of its masks."""
    images, digit, patch = compose(*args, **kwargs)
    return images, patch if mask == "patch" else digit


def check_composed(data: Data) -> None:
    """Refuse fields about columns and files.

    Raises:
        ValueError: one is set.
    """
    for option in (*COLUMNS, "boxes", "mask_values"):
        if option != "mask" and getattr(data, option) is not None:
            kind = "names a column" if option in COLUMNS else "is for files"
            raise ValueError(f"data.{option} {kind}, but {data.source} is composed; leave it out")


def load(data: Data) -> dict[str, ImageSet]:
    """The three splits of a set named in `PARTS`; test patches do not depend on the class.

    Raises:
        ValueError: a column or mask that the source does not have, or a canvas too small for its parts.
    """
    check_composed(data)
    parts, patched = PARTS[data.source], data.source == "clutter-shortcut"
    kinds = ("digit",) + patched * ("patch",) + (len(parts[0]) > 1) * ORDER
    mask = data.mask or ("patch" if patched else "digit")
    if mask not in kinds:
        raise ValueError(f"expected data.mask of {data.source} to be {' or '.join(kinds)}, got {mask!r}")
    size, width = data.sides or (40, 40)
    if size != width:
        raise ValueError(f"expected data.size of {data.source} as one side, as its images are square, got {data.size}")
    marked = ORDER.index(mask) if mask in ORDER else None
    if size < 24:
        raise ValueError(
            f"expected data.size of at least 24 for {data.source}, got {size}; a digit needs that many pixels"
        )
    sizes = SIZES | {k: n for k, n in (("train", data.train_size), ("test", data.test_size)) if n is not None}
    stores: dict[str, Composed] = {}
    for split in SPLITS:
        shortcut = (0.0 if split == "test" else data.shortcut) if patched else None
        known = {"size": size, "shortcut": shortcut, "parts": parts, "marked": marked}
        composed = partial(_with_mask, mask, data.seed, split, **known)
        stores[split] = Composed(composed, sizes[split], (size, size))
    preprocess = statistics(sampled(stores["train"], sizes["train"], 2000))
    return {
        split: ImageSet(
            name=data.source,
            split=split,
            classes=tuple("+".join(map(str, dict.fromkeys(shown))) for shown in parts),
            preprocess=preprocess,
            labels=np.arange(sizes[split]) % len(parts),
            names=[f"{split}-{i:05d}" for i in range(sizes[split])],
            store=stores[split],
            has_masks=True,
            flip_ok=False,
        )
        for split in SPLITS
    }
