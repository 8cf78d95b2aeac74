"""The images of a shard, decoded; and the search for those that kill the process. Imports no network."""

import os
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from sightline.data import Preprocess
from sightline.data.images import UnreadableImage, open_image, quiet
from sightline.scale.plan import Content, Entry, Plan, contents_of

Array = np.ndarray
TRIES = 3
"""How often a process has to die on one image before the image is left out."""
LETHAL = (
    f"the process that read or explained it died {TRIES} times, of a crash, too little memory or too much time; "
    "save it again or smaller"
)


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is done with every shard."""

    folder: Path
    """Of the results."""
    plan: Plan
    sources: tuple[str, ...]
    digest: str
    """Of what was asked, see `results.write_asked`."""
    per_shard: int
    preprocess: Preprocess
    max_pixels: int
    layer: str | None
    dtype: str
    batch_size: int
    memory: int | str | None

    def size(self, shard: int) -> int:
        """How many images a shard has."""
        return min(self.per_shard, self.plan.images - shard * self.per_shard)


class Decoded(NamedTuple):
    """The images of a shard, or of a part of it."""

    shard: int
    entries: list[Entry]
    reasons: dict[int, str]
    """Why an image cannot be read, by its place."""
    pixels: UInt8[Array, "n h w 3"]
    """Of the others, in their order."""


class Failed(NamedTuple):
    """A shard that was given up."""

    shard: int
    reason: str


def decode(
    job: Job,
    shard: int,
    lethal: Sequence[int] = (),
    part: Sequence[int] | None = None,
    threads: int = 1,
    alive: Callable[[], None] = lambda: None,
) -> Decoded:
    """Read and decode the images of a shard at the size of the network.

    Args:
        job: what is done with it.
        shard: its number.
        lethal: places of images on which a process dies, which are left out.
        part: places of those to decode; the others are left out. None: all.
        threads: images that are read and decoded at a time.
        alive: called before the first image and after each.

    Raises:
        OSError: a source cannot be reached.
    """
    alive()
    entries, reasons = job.plan.entries(shard), dict.fromkeys(lethal, LETHAL)
    chosen = [place for place in (range(len(entries)) if part is None else part) if place not in reasons]
    pixels = np.empty((len(chosen), *job.preprocess.size, 3), dtype=np.uint8)
    count = 0
    with quiet(), ThreadPoolExecutor(threads) as pool:
        contents = contents_of([entries[place] for place in chosen])
        for place, image in zip(chosen, pool.map(partial(_decoded, job), contents), strict=True):
            alive()
            if isinstance(image, str):
                reasons[place] = image
            else:
                pixels[count] = image
                count += 1
    return Decoded(shard, entries, reasons, pixels[:count])


def _decoded(job: Job, read: Content) -> UInt8[Array, "h w 3"] | str:
    seen, content = job.preprocess, read()
    if isinstance(content, str):
        return content
    try:
        return open_image(content, seen.size, job.max_pixels, seen.crop, seen.interpolation)[0]
    except UnreadableImage as error:
        if getattr(error.__cause__, "errno", None):  # of the system, not of the decoder
            _check_reachable(job.sources, str(content))
        return str(error)


def _check_reachable(sources: Sequence[str], file: str) -> None:
    """Tell a disk that is gone, which leaves no folder or an empty one, from a single missing file."""
    for source in sources:
        if file.startswith(f"{source}/"):
            with os.scandir(source) as entries:
                if not any(entries):
                    raise FileNotFoundError(f"{source} is empty now; mount its disk and run the same command again")


def search_lethal(places: Sequence[int]) -> Generator[Sequence[int], bool, list[int]]:
    """Find the images on which a process dies by halving: yields what to try, and is sent whether a process lived.

    A process that died of something else costs only time: a single image has to do it `TRIES` times.

    >>> search = search_lethal(range(8))
    >>> next(search)
    range(0, 8)
    >>> search.send(False), search.send(True), search.send(False)
    (range(0, 4), range(4, 8), range(4, 6))
    """
    for _ in range(TRIES if len(places) == 1 else 1):
        if (yield places):
            return []
    if len(places) == 1:
        return [*places]
    half = len(places) // 2
    first = yield from search_lethal(places[:half])
    return first + (yield from search_lethal(places[half:]))
