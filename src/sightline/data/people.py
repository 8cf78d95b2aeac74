"""`clutter-person`: upright figures of four parts, seen by four cameras; the colors of the parts are the identity.

Head, torso, legs and bag have one color each, and no two identities share all four. A camera has a tint, a brightness
and a side from which it sees the bag. Each image has its own place, scale, stride, textured background, and often
something in front of the figure or an edge that cuts it.
"""

from collections.abc import Sequence
from functools import cache, partial

import numpy as np
from jaxtyping import Bool, Float, Int64, UInt8

from sightline.data.clutter import background, check_composed, hsv
from sightline.data.decoded import Composed
from sightline.data.reid import queries_and_gallery
from sightline.data.sets import ImageSet, sampled, statistics
from sightline.data.splits import drawn
from sightline.recipe import Data

Array = np.ndarray
NAME = "clutter-person"
PARTS = ("head", "torso", "legs", "bag")
IDENTITIES = {"train": 200, "val": 50, "gallery": 100}
IMAGES = {"train": 16, "val": 8, "gallery": 8}
"""Per identity, over all cameras."""
CAMERAS = 4
_SKIN = hsv(np.array([0.08, 0.08, 0.06, 0.0]), np.array([0.3, 0.6, 0.8, 0.0]), np.array([0.95, 0.7, 0.35, 0.6]))
_CLOTHES = hsv(
    np.array([0.0, 0.09, 0.16, 0.35, 0.5, 0.63, 0.8, 0.0]),
    np.array([0.85, 0.9, 0.85, 0.8, 0.7, 0.85, 0.6, 0.0]),
    np.array([0.85, 0.95, 0.95, 0.6, 0.8, 0.85, 0.75, 0.95]),
)
_PALETTES = (_SKIN, _CLOTHES, _CLOTHES, _CLOTHES[:6])
_COMBINATIONS = int(np.prod([len(palette) for palette in _PALETTES]))


def compose_people(
    seed: int, split: str, indices: Sequence[int] | Int64[Array, " b"], size: tuple[int, int] = (64, 32)
) -> tuple[UInt8[Array, "b 3 h w"], Bool[Array, "b 4 h w"]]:
    """Images with the visible pixels of head, torso, legs and bag.

    Each image depends on (seed, split, index) alone. Identity: the index modulo `IDENTITIES` of the split; camera: the
    quotient modulo 4.

    >>> images, parts = compose_people(0, "gallery", [7])
    >>> images.shape, parts.any((2, 3)).tolist()
    ((1, 3, 64, 32), [[True, True, True, True]])
    """
    indices = np.asarray(indices, dtype=np.int64)
    order = [*IDENTITIES].index(split)
    generators = [np.random.default_rng([seed, order, i]) for i in indices]
    (height, width), b = size, len(indices)

    def uniform(*shape: int) -> Float[Array, "b ..."]:
        return np.stack([g.random(shape, dtype=np.float32) for g in generators])

    def between(low: float, high: float) -> Float[Array, "b 1 1"]:
        return (low + (high - low) * uniform())[:, None, None]

    camera = indices // IDENTITIES[split] % CAMERAS
    tint, is_mirrored = _cameras(seed)
    # (0, 0) is the top of the head, and 1 the height of the figure
    tall = between(0.75, 1.05) * height
    y = (np.arange(height)[:, None] + 0.5 - between(-0.06, 0.12) * height) / tall
    x = (np.arange(width) + 0.5 - between(0.4, 0.6) * width) / tall
    x = np.where(is_mirrored[camera][:, None, None], -x, x) + between(-0.06, 0.06) * (y - 0.5)
    stride = between(0.01, 0.05)
    legs = (y > 0.52) & (y < 1) & (np.abs(np.abs(x) - 0.06 - stride * (y - 0.52)) < 0.045)
    figure = np.stack(
        [
            (x / 0.075) ** 2 + ((y - 0.085) / 0.085) ** 2 < 1,
            (y > 0.17) & (y < 0.54) & (np.abs(x) < 0.12),
            legs,
            (y > 0.36) & (y < 0.56) & (x > 0.1) & (x < 0.22),
        ],
        1,
    )
    parts = figure & ~np.flip(np.cumsum(np.flip(figure, 1), 1) - np.flip(figure, 1), 1).astype(bool)  # later in front

    first = sum(n for name, n in IDENTITIES.items() if [*IDENTITIES].index(name) < order)
    shown = _colors(seed)[first + indices % IDENTITIES[split]]
    light = 1 + 0.3 * (background(uniform, max(size)).mean(3)[:, :height, :width] - 0.3)
    canvas = background(uniform, max(size))[:, :height, :width] + 0.25
    for k in range(len(PARTS)):
        canvas = np.where(parts[:, k, :, :, None], (shown[:, k, None, None] * light[..., None]), canvas)
    # half of the images have something in front of a third of the figure
    top, left, is_hidden = between(0.05, 0.8), between(-0.3, 0.1), uniform()[:, None, None] < 0.5
    hidden = is_hidden & (y > top) & (y < top + between(0.15, 0.3)) & (x > left) & (x < left + between(0.15, 0.4))
    canvas = np.where(hidden[..., None], hsv(uniform(), 0.3 * uniform(), 0.3 + 0.5 * uniform())[:, None, None], canvas)
    canvas = canvas * tint[camera][:, None, None] * between(0.85, 1.15)[..., None]
    images = np.rint(np.clip(canvas + 0.04 * (uniform(height, width, 3) - 0.5), 0, 1) * 255).astype(np.uint8)
    return images.transpose(0, 3, 1, 2), parts & ~hidden[:, None].reshape(b, 1, height, width)


@cache
def _colors(seed: int) -> Float[Array, "n 4 3"]:
    """Colors of the four parts of every identity that there can be, in random order."""
    numbers = np.random.default_rng([seed, 1]).permutation(_COMBINATIONS)
    places = np.unravel_index(numbers, [len(palette) for palette in _PALETTES])
    return np.stack([palette[place] for palette, place in zip(_PALETTES, places, strict=True)], 1)


@cache
def _cameras(seed: int) -> tuple[Float[Array, "4 3"], Bool[Array, " 4"]]:
    """Tint of each camera, and whether it sees the figure mirrored."""
    gains = np.random.default_rng([seed, 2]).uniform(0.75, 1.15, (CAMERAS, 3)).astype(np.float32)
    return gains, np.arange(CAMERAS) % 2 == 1


def load(data: Data) -> dict[str, ImageSet]:
    """The splits train, val, query and gallery of `clutter-person`, each with its own identities.

    Raises:
        ValueError: a column that the source does not have, another mask, too few pixels, or more images than there are.
    """
    check_composed(data)
    size = data.sides or (64, 32)
    if size[0] < 32 or size[1] < 16:
        raise ValueError(f"expected data.size of at least 32,16 for {NAME}, got {size[0]},{size[1]}; a figure is small")
    mask = data.mask or "person"
    if mask not in ("person", *PARTS):
        raise ValueError(f"expected data.mask of {NAME} to be person, {', '.join(PARTS)}, got {mask!r}")
    rows = {split: np.arange(n * IMAGES[split]) for split, n in IDENTITIES.items()}
    whole = {
        split: Composed(partial(_masked, mask, data.seed, split, size), len(of), size) for split, of in rows.items()
    }
    rows["train"] = drawn(rows["train"] % IDENTITIES["train"], "train", data.train_size, data.seed)
    stores = {split: store.picked(rows[split]) for split, store in whole.items()}
    preprocess = statistics(sampled(stores["train"], len(rows["train"]), 1000))
    sets = {
        split: ImageSet(
            name=NAME,
            split=split,
            classes=tuple(f"{split} {i:03d}" for i in range(IDENTITIES[split])),
            preprocess=preprocess,
            labels=rows[split] % IDENTITIES[split],
            names=[f"{split}-{i:05d}" for i in rows[split].tolist()],
            cameras=(rows[split] // IDENTITIES[split] % CAMERAS + 1).astype(str),
            store=store,
            has_masks=True,
        )
        for split, store in stores.items()
    }
    return queries_and_gallery(sets, data)


def _masked(
    mask: str, seed: int, split: str, size: tuple[int, int], rows: Int64[Array, " b"]
) -> tuple[UInt8[Array, "b 3 h w"], Bool[Array, "b h w"]]:
    images, parts = compose_people(seed, split, rows, size)
    return images, np.asarray(parts.any(1) if mask == "person" else parts[:, PARTS.index(mask)])
