"""Finds images that occur twice, in two splits or with two labels, by their bytes and by their looks."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int64, Shaped, UInt8
from PIL import Image

Array = np.ndarray
IMPRINT = np.dtype([("file", "<u8", (2,)), ("look", "<u4", (2,)), ("small", "u1", (16, 16))])
"""Hash of a file's bytes; whether each of 8 x 8 cells is brighter than the one left of it, above and below the middle;
the image in 16 x 16 grays."""
_MEAN, _MOST = 2, 12  # gray levels by which small pictures of images that look alike may differ
_BITS = 8  # of their looks


def imprint(file: Path | bytes, image: UInt8[Array, "3 h w"]) -> Array:
    """Fingerprint of an image: a scalar of type `IMPRINT`."""
    if isinstance(file, Path):
        with file.open("rb") as opened:
            hashed = hashlib.file_digest(opened, lambda: hashlib.blake2b(digest_size=16)).digest()
    else:
        hashed = hashlib.blake2b(file, digest_size=16).digest()
    gray = Image.fromarray(image.transpose(1, 2, 0)).convert("L")
    cells = np.asarray(gray.resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    brighter = cells[:, 1:] > cells[:, :-1] + 2  # noise of compression does not count
    small = np.asarray(gray.resize((16, 16), Image.Resampling.BOX))
    look = np.packbits(brighter).view("<u4")
    return np.array((np.frombuffer(hashed, "<u8"), look, small), dtype=IMPRINT)


class Copies(NamedTuple):
    """For each image, the index of another one that it repeats; -1: none."""

    earlier: Int64[Array, " n"]
    """The same bytes in an earlier split."""
    alike: Int64[Array, " n"]
    """Other bytes that look the same in an earlier split; -1 where `earlier` is none."""
    relabeled: Int64[Array, " n"]
    """The same bytes with another label."""
    alike_relabeled: Int64[Array, " n"]
    """Other bytes that look the same, with another label; -1 where `relabeled` is none."""


def copies(imprints: Array, splits: Int64[Array, " n"], labels: Int64[Array, " n"]) -> Copies:
    """Images that repeat one of an earlier split, or one with another label; unlabeled images contradict no label.

    Args:
        imprints: See `imprint`.
        splits: Number of each image's split; 0 comes first.
        labels: Class of each image; -1 where there is none.
    """
    n = len(imprints)
    repeats = Copies(*(np.full(n, -1) for _ in range(4)))
    _, same = np.unique(imprints["file"], axis=0, return_inverse=True)
    same = same.reshape(-1)
    for rows in _repeated(same):
        first = rows[splits[rows].argmin()]
        repeats.earlier[rows[splits[rows] > splits[first]]] = first
        labeled = rows[labels[rows] >= 0]
        others = _relabeled(labels, labeled[0], labeled) if len(labeled) else labeled
        if len(others):
            repeats.relabeled[labeled] = np.where(labels[labeled] == labels[labeled[0]], others[0], labeled[0])
    looks, smalls = imprints["look"], imprints["small"].astype(np.int16)
    for half in (0, 1):
        for rows in _repeated(looks[:, half]):
            if looks[rows[0], half] == 0 or len({*zip(splits[rows], labels[rows], strict=True)}) == 1:
                continue  # nothing is seen in a flat half
            for row in rows.tolist():
                near = rows[np.bitwise_count(looks[rows] ^ looks[row]).sum(1) <= _BITS]
                difference = np.abs(smalls[near] - smalls[row])
                close = (difference.mean((1, 2)) <= _MEAN) & (difference.max((1, 2)) <= _MOST)
                others = near[close & (same[near] != same[row])]
                if repeats.earlier[row] < 0:
                    _first(repeats.alike, row, others[splits[others] < splits[row]])
                if repeats.relabeled[row] < 0:
                    _first(repeats.alike_relabeled, row, _relabeled(labels, row, others))
    return repeats


def _repeated(keys: Shaped[Array, " n"]) -> Iterator[Int64[Array, " _"]]:
    """The rows of each key that occurs more than once."""
    order = np.argsort(keys, kind="stable")
    ends = np.flatnonzero(np.diff(keys[order])) + 1
    yield from (rows for rows in np.split(order, ends) if len(rows) > 1)


def _relabeled(labels: Int64[Array, " n"], row: Any, others: Int64[Array, " _"]) -> Int64[Array, " _"]:
    return others[(labels[others] >= 0) & (labels[row] >= 0) & (labels[others] != labels[row])]


def _first(places: Int64[Array, " n"], row: int, others: Int64[Array, " _"]) -> None:
    if len(others):
        places[row] = others[0]


def sentences(
    repeats: Copies, splits: Sequence[str], names: Sequence[str], dropped: Bool[Array, " n"] | None = None
) -> Iterator[str]:
    """Notices about copies.

    Args:
        repeats: The copies.
        splits: Split of each image.
        names: Name of each image.
        dropped: The images left out as copies; None if that was not requested.
    """
    total = Counter(splits)
    way = "were left out" if dropped is not None else "--drop-duplicates leaves them out"
    for split in total:
        for places, exact in ((repeats.earlier, True), (repeats.alike, False)):
            rows = [row for row in np.flatnonzero(places >= 0).tolist() if splits[row] == split]
            if rows:
                pair = f"such as {names[rows[0]]} and {names[places[rows[0]]]}"
                many = f"{len(rows):,} of {total[split]:,} {split} images"
                yield (
                    f"{many} are copies of images in an earlier split, {pair}: they flatter the scores; {way}"
                    if exact
                    else f"{many} look like an image in an earlier split, {pair}: compare them; none was left out"
                )
    for places, exact in ((repeats.relabeled, True), (repeats.alike_relabeled, False)):
        rows = np.flatnonzero(places >= 0).tolist()
        if len(rows):
            pair = f"such as {names[rows[0]]} and {names[int(places[rows[0]])]}"
            yield (
                f"{len(rows):,} images are copies of one another with different labels, {pair}; "
                f"{'all of them ' if dropped is not None else ''}{way}"
                if exact
                else f"{len(rows):,} images look like one with another label, {pair}: compare them; none was left out"
            )
