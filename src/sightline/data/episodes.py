"""Episodes of few-shot learning: small classification tasks drawn from images of new classes."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from sightline.checks import check_whole
from sightline.data.sources import Listing

Array = np.ndarray


class Episode(NamedTuple):
    """Some classes, a few images of each to learn from (support), and others to classify (query)."""

    classes: Int64[Array, " ways"]
    support: Int64[Array, "ways shots"]
    """Places of the images in their set; row i holds those of class i of `classes`."""
    query: Int64[Array, "ways queries"]


def episodes(
    images: Listing, count: int = 600, *, ways: int = 5, shots: int = 1, queries: int = 15, seed: int = 0
) -> Iterator[Episode]:
    """Draw episodes: classes without replacement, and of each class different images for support and query.

    Each episode depends on the seed and its number alone, so the first ones of a longer series are those of a shorter
    one. Images without a label are left out.

    Args:
        images: a set of images, or anything else with labels and class names.
        count: number of episodes.
        ways: classes of an episode.
        shots: support images of each class.
        queries: query images of each class.
        seed: of the draws.

    Raises:
        TypeError: a number that is not whole.
        ValueError: a number below 1 (`ways`: below 2), too few classes, or a class with too few images.

    Source: Vinyals et al., "Matching Networks for One Shot Learning", NeurIPS 2016, section 4.1.

    >>> labels = np.repeat([0, 1, 2], 4)
    >>> few = Listing(name="few", classes=("a", "b", "c"), labels=labels, names=[str(i) for i in range(12)])
    >>> [episode] = episodes(few, 1, ways=2, shots=1, queries=3)
    >>> labels[episode.support].shape, (labels[episode.query] == episode.classes[:, None]).all().item()
    ((2, 1), True)
    """
    check_whole(count=count, ways=ways, shots=shots, queries=queries)
    for name, number, least in (("count", count, 1), ("ways", ways, 2), ("shots", shots, 1), ("queries", queries, 1)):
        if number < least:
            raise ValueError(f"expected {name} of {least} or more, got {number}")
    numbers = np.bincount(images.labels[images.labels >= 0], minlength=len(images.classes))
    if len(numbers) < ways:
        raise ValueError(
            f"expected at least {ways} classes for {ways}-way episodes, got {len(numbers)} in {images.name}; lower ways"
        )
    if numbers.min() < shots + queries:
        few = int(numbers.argmin())
        raise ValueError(
            f"expected {shots} + {queries} images of each class, got {numbers[few]} of {images.classes[few]!r}; lower "
            "shots or queries, or leave the class out"
        )
    rows = [np.flatnonzero(images.labels == kind) for kind in range(len(numbers))]
    return (_drawn(rows, np.random.default_rng([seed, number]), ways, shots, queries) for number in range(count))


def _drawn(rows: list[Int64[Array, " _"]], rng: np.random.Generator, ways: int, shots: int, queries: int) -> Episode:
    classes = rng.permutation(len(rows))[:ways]
    drawn = np.stack([rng.choice(rows[kind], shots + queries, replace=False) for kind in classes])
    return Episode(classes, drawn[:, :shots], drawn[:, shots:])
