"""Which images are kept for validation and test: seeded, stratified by class, never splitting a group."""

import numpy as np
from jaxtyping import Bool, Int64, Shaped

from sightline.recipe import Data

Array = np.ndarray


def _rank_in_class(
    labels: Int64[Array, " n"], rng: np.random.Generator
) -> tuple[Int64[Array, " n"], Int64[Array, " n"]]:
    """Place of each row in a random order of its class, and the size of that class."""
    order = rng.permutation(len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    _, starts, counts = np.unique(labels[by_class], return_index=True, return_counts=True)
    rank, count = np.empty((2, len(labels)), dtype=np.int64)
    rank[by_class] = np.arange(len(labels)) - np.repeat(starts, counts)
    count[by_class] = np.repeat(counts, counts)
    return rank, count


def draw(labels: Int64[Array, " n"], size: int, seed: int) -> Int64[Array, " k"]:
    """Rows of a stratified draw, ascending: first one of every class, then in proportion.

    A smaller draw lies within a larger one of the same seed.

    >>> labels = np.array([0, 0, 0, 0, 0, 0, 1, 1])
    >>> np.bincount(labels[draw(labels, 4, seed=0)]).tolist()
    [3, 1]
    """
    rng = np.random.default_rng(seed)
    rank, count = _rank_in_class(labels, rng)
    ties = rng.random(len(labels))
    return np.sort(np.lexsort((ties, rank / count))[:size])


def drawn(labels: Int64[Array, " n"], split: str, size: int | None, seed: int) -> Int64[Array, " k"]:
    """Rows of a draw of so many images of a split, as `data.train_size` and `data.test_size` ask; all if that is None.

    Raises:
        ValueError: there are fewer.
    """
    if size is None:
        return np.arange(len(labels))
    if size > len(labels):
        raise ValueError(f"expected data.{split}_size of at most {len(labels)}, got {size}; there are no more")
    return draw(labels, size, seed)


def held_out(
    labels: Int64[Array, " n"], share: float, seed: int, groups: Shaped[Array, " n"] | None = None
) -> Bool[Array, " n"]:
    """Which rows to keep for testing: about this fraction of every class; with `groups`, whole groups only.

    Without groups, a class of two rows or more has a row on both sides.

    Raises:
        ValueError: one group holds all rows.

    >>> labels = np.array([0, 0, 0, 0, 0, 1, 1, 1, 1, 1])
    >>> np.bincount(labels[held_out(labels, 0.2, seed=0)]).tolist()
    [1, 1]
    """
    rng = np.random.default_rng(seed)
    if groups is not None:
        return _held_out_groups(labels, share, rng, groups)
    rank, count = _rank_in_class(labels, rng)
    ties = rng.random(len(labels))
    key = np.where(rank == count - 1, np.inf, rank / count)
    chosen = np.zeros(len(labels), dtype=bool)
    chosen[np.lexsort((ties, key))[: round(share * len(labels))]] = True
    return chosen & np.isfinite(key)


def _held_out_groups(
    labels: Int64[Array, " n"], share: float, rng: np.random.Generator, groups: Shaped[Array, " n"]
) -> Bool[Array, " n"]:
    """Take groups in random order while they improve the fraction of every class; the best of eight orders."""
    names, group = np.unique(groups, return_inverse=True)
    if len(names) < 2:
        raise ValueError(
            f"expected at least two groups to split by, got one ({str(names[0])!r}); name another group column or none"
        )
    classes, label = np.unique(labels, return_inverse=True)
    fractions = np.zeros((len(names), len(classes)))
    np.add.at(fractions, (group, label), 1.0)
    fractions /= fractions.sum(0)
    best: tuple[float, list[int]] = (np.inf, [])
    for _ in range(8):
        taken = np.zeros(len(classes))
        chosen: list[int] = []
        for i in rng.permutation(len(names)):
            if np.square(taken + fractions[i] - share).sum() < np.square(taken - share).sum():
                taken += fractions[i]
                chosen.append(int(i))
        loss = float(np.square(taken - share).sum())
        if chosen and loss < best[0]:
            best = (loss, chosen)
    # every group is larger than the fraction: the smallest one is closest
    chosen = best[1] or [int(fractions.sum(1).argmin())]
    return np.isin(group, chosen)


def assign(
    labels: Int64[Array, " n"],
    classes: tuple[str, ...],
    parts: Shaped[Array, " n"],
    groups: Shaped[Array, " n"] | None,
    data: Data,
) -> dict[str, Int64[Array, " _"]]:
    """Rows of train, val and test: the source's own splits, or drawn from its training images.

    Args:
        labels: Class of each row.
        classes: Names of the classes.
        parts: train, val, test or nothing, as the source has it.
        groups: Group of each row, if there are groups.
        data: Fractions, sizes and seed.

    Raises:
        ValueError: labels are missing, there are too few images or classes, or the source's own splits share groups.
    """
    part = np.where(parts == "", "train", parts).astype("<U5")
    for name in ("train", "val", "test"):
        check_labeled(labels[part == name], name)
    if data.resplit:
        part[:] = "train"
    elif groups is not None:
        _check_disjoint(part, groups, data.group)
    if "train" not in part:
        raise ValueError(
            f"expected training images, got only {' and '.join(np.unique(part))}; add some, or split again with "
            "--data.resplit true"
        )
    for name, share in (("test", data.test), ("val", data.val)):
        if name not in part and share > 0:
            rows = np.flatnonzero(part == "train")
            chosen = held_out(labels[rows], share, data.seed, None if groups is None else groups[rows])
            part[rows[chosen]] = name
    if "test" not in part:
        raise ValueError(
            f"expected images to test with, got none of {len(labels)} with data.test {data.test}; add images"
        )
    rows = {name: np.flatnonzero(part == name) for name in ("train", "val", "test") if name in part}
    for name, size in (("train", data.train_size), ("test", data.test_size)):
        rows[name] = rows[name][drawn(labels[rows[name]], name, size, data.seed)]
    trained = np.unique(labels[rows["train"]])
    if len(trained) < 2:
        raise ValueError(
            f"expected at least two classes to tell apart, got only {classes[trained[0]]!r}; add images of another"
        )
    unknown = np.setdiff1d(labels[rows["test"]], trained)
    if len(unknown):
        raise ValueError(
            f"the class {classes[unknown[0]]!r} occurs in test but not in training; add training images of it"
        )
    return rows


def check_labeled(labels: Int64[Array, " n"], split: str) -> None:
    """Refuse images without a label.

    Raises:
        ValueError: there are some.
    """
    if (labels < 0).any():
        raise ValueError(
            f"{(labels < 0).sum()} of {len(labels)} {split} images have no label; label them or leave them out "
            "(`sightline explain` takes images without labels)"
        )


def _check_disjoint(part: Shaped[Array, " n"], groups: Shaped[Array, " n"], column: str | None) -> None:
    for one, other in (("train", "test"), ("train", "val"), ("val", "test")):
        held = np.unique(groups[part == other])
        shared = np.intersect1d(groups[part == one], held)
        if len(shared):
            raise ValueError(
                f"{len(shared)} of {len(held)} {column} groups in {other} also occur in {one}, "
                "which would flatter the scores; add some, or split again with --data.resplit true"
            )
