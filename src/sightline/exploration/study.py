"""`explore`: from many maps to suspicions, and from suspicions to findings."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64

from sightline import maps as pixels
from sightline.checks import check_whole
from sightline.data import duplicates
from sightline.exploration import clusters as clustering
from sightline.exploration import interventions, regions
from sightline.exploration.regions import DETECTORS
from sightline.exploration.result import Cluster, Exploration, Group, Picture, Share, Suspicion
from sightline.exploration.sources import Look, Source
from sightline.facts import Finding, Progress, joined, percent, words
from sightline.metrics.uncertainty import holm

Array = np.ndarray
LEAST = 0.1
"""Both differences to the controls have to be this large at the lower end of their intervals."""
LEVEL = 0.05
"""Corrected p below which a suspicion is confirmed."""
RATIO = 2.0
"""Weight in a place, in shares of its area, from which an image is suspicious."""
FEWEST = 8
"""Images below which nothing is suspected."""
COVERED, PASTED = 64, 100
"""Most images whose region is covered, and images that regions are pasted into."""
COMPARED = 10_000
"""Most images of each split that are compared to find copies in several splits."""
_FINEST = 32  # positions along a side up to which maps are kept
_KEPT = 20_000  # maps in the samples of all classes and methods, if there are at least `_SMALLEST` of each
_SMALLEST = 20
_SHOWN = 6  # pictures of a suspicion
_IMAGES = 64  # read at once


@dataclass
class _Sample:
    """A random sample of the maps of one class and method."""

    count: int = 0
    looks: list[Look] = field(default_factory=list[Look])

    def add(self, look: Look, most: int, rng: np.random.Generator) -> None:
        self.count += 1
        if len(self.looks) < most:
            self.looks.append(look._replace(map=_kept(look.map)))
        elif (place := int(rng.integers(self.count))) < most:
            self.looks[place] = look._replace(map=_kept(look.map))

    @property
    def places(self) -> list[int]:
        return [look.place for look in self.looks]

    def maps(self) -> Float[Array, "n h w"]:
        """At the size of the first."""
        size = self.looks[0].map.shape
        return np.stack([look.map if look.map.shape == size else _resized(look.map, size) for look in self.looks])


class _Suspect(NamedTuple):
    """A suspicion and the rows of its sample."""

    facts: Suspicion
    sample: _Sample
    rows: Int64[Array, " n"]


def explore(
    source: Source,
    *,
    sample: int = 500,
    tests: int = 50,
    window: float = 0.25,
    seed: int = 0,
    progress: Progress | None = None,
) -> Exploration:
    """Cluster maps by where they look, suspect what is strange about them, and test each suspicion by intervention.

    Only maps of the predicted class are read. For each class and method:

    1. The maps are clustered (see `spectral`), and the strangest cluster of at least 8 images is suspected, if it holds
       at most half of the class.
    2. For each kind of place (`DETECTORS`), the images are suspected whose map has twice the place's share of the area
       in it, or more, if there are at least 8 of them.

    A suspicion is tested on a window in each of its images: where the map is highest, or highest in the place. It is
    covered there, and pasted into images of other classes (see `cover_effect`, `paste_effect`). It becomes a finding if
    both differences to equally large random windows are reliable: the larger of the two p-values, corrected for all
    tested suspicions (Holm), is below 0.05, and both intervals lie above 0.1. If the data marks objects and most of the
    windows' area lies in them, the finding is the object and no shortcut.

    Maps are read once and in bounded memory: of each class and method a random sample is kept, of at most `sample`
    maps, fewer if there are more than 40 classes times methods (20,000 maps in all, but 20 of each), at 32 x 32
    positions or fewer.

    Args:
        source: maps, images and network.
        sample: most maps of a class and method that are compared; the time grows with its cube.
        tests: most suspicions to test, those with the largest weight first.
        window: side of the region, as a share of the image's, at most a third.
        seed: of samples, random regions and bootstraps.
        progress: called with (what, done, total).

    Raises:
        ValueError: no map can be compared, or an option is out of range.
        ModuleNotFoundError: scikit-learn is not installed.
    """
    check_whole(sample=sample, tests=tests)
    if sample < FEWEST or tests < 1 or not 0 < window <= 1 / 3:
        raise ValueError(
            f"expected a sample of at least {FEWEST} maps, 1 test or more and a window above 0 and up to 1/3, got "
            f"{sample}, {tests} and {window}"
        )
    rng = np.random.default_rng(seed)
    most = max(_SMALLEST, min(sample, _KEPT // max(len(source.classes) * len(source.methods), 1)))
    samples, left_out, splits, read = _sampled(source, min(sample, most), rng, progress)
    if not samples:
        raise ValueError(f"expected maps with a positive value, got none among {read:,}; choose another method")
    groups: list[Group] = []
    clusters: list[Cluster] = []
    suspects: list[_Suspect] = []
    for done, ((method, target), one) in enumerate(sorted(samples.items())):
        if progress is not None:
            progress("classes", done, len(samples))
        group, its_clusters, its_suspects = _examined(source, method, target, one, seed)
        groups.append(group)
        clusters += its_clusters
        suspects += its_suspects
    clusters.sort(key=lambda cluster: -cluster.strangeness.score)
    suspects.sort(key=lambda suspect: -suspect.facts.weight)
    tested: list[Suspicion] = []
    for done, suspect in enumerate(suspects[:tests]):
        if progress is not None:
            progress("suspicions", done, min(len(suspects), tests))
        tested.append(_tested(source, suspect, samples, window, seed))
    confirmed = _confirmed(tested)
    sentences, compared = _copies(source, splits)
    exploration = Exploration(
        name=source.name,
        classes=source.classes,
        methods=source.methods,
        maps=read,
        left_out=dict(left_out),
        groups=tuple(groups),
        clusters=tuple(clusters),
        suspicions=(
            *sorted(confirmed, key=lambda one: not one.is_finding),
            *(suspect.facts for suspect in suspects[tests:]),
        ),
        summary=(),
        duplicates=sentences,
        compared=compared,
        settings={
            "sample": min(sample, most), "tests": tests, "window": window, "seed": seed, "least difference": LEAST,
            "level": LEVEL, "ratio to chance": RATIO, "fewest images": FEWEST, "random regions": interventions.CONTROLS,
        },
        notices=source.notices,
    )  # fmt: skip
    return replace(exploration, summary=tuple(_summary(exploration)))


def _kept(raw: Float[Array, "h w"]) -> Float[Array, "h2 w2"]:
    """The positive part of a map, at `_FINEST` positions along a side at most, in 32 bits."""
    positive = np.maximum(np.nan_to_num(raw, posinf=0.0), 0).astype(np.float32)
    height, width = positive.shape
    return (
        positive if max(height, width) <= _FINEST else _resized(positive, (min(height, _FINEST), min(width, _FINEST)))
    )


def _resized(raw: Float[Array, "h w"], size: tuple[int, ...]) -> Float[Array, "h2 w2"]:
    return pixels.resize(torch.from_numpy(raw)[None, None], size)[0, 0].numpy()


def _sampled(
    source: Source, most: int, rng: np.random.Generator, progress: Progress | None
) -> tuple[dict[tuple[str, int], _Sample], Counter[str], dict[str, list[tuple[int, str]]], int]:
    """A sample per method and class, why other maps were left out, the first images of each split, and a count."""
    samples: dict[tuple[str, int], _Sample] = {}
    left_out: Counter[str] = Counter()
    splits: dict[str, list[tuple[int, str]]] = {}
    read, last = 0, -1
    for look in source.looks(progress):
        read += 1
        if look.place != last:
            last = look.place
            if len(images := splits.setdefault(look.split, [])) < COMPARED:
                images.append((look.place, look.key))
        if look.target != look.predicted:
            left_out["of another class than the predicted one"] += 1
        elif not (np.where(np.isfinite(look.map), look.map, 0) > 0).any():
            left_out["without a positive value"] += 1
        else:
            samples.setdefault((look.method, look.target), _Sample()).add(look, most, rng)
    return samples, left_out, splits, read


def _examined(
    source: Source, method: str, target: int, sample: _Sample, seed: int
) -> tuple[Group, list[Cluster], list[_Suspect]]:
    """Clusters and suspicions of one class and method."""
    maps, name = sample.maps(), source.classes[target]
    looks = clustering.shrunk(maps)
    flat = looks.reshape(len(looks), -1)
    confidence = np.array([look.confidence for look in sample.looks])
    numbers = clustering.spectral(flat, seed=seed)
    strange = clustering.strangeness(flat, confidence, numbers)
    in_places, area = _in_places(source, sample.places, clustering.weights(maps))

    def places_of(rows: Array) -> dict[str, Share]:
        return {
            place: Share(float(in_places[place][rows].mean()), float(area[place][rows].mean())) for place in DETECTORS
        }

    def suspect(kind: str, place: str, rows: Int64[Array, " n"], weight: float) -> _Suspect:
        facts = Suspicion(
            method=method, target=name, kind=kind, place=place, weight=weight, images=len(rows),
            class_share=len(rows) / len(flat), places=places_of(rows),
            examples=tuple(sample.looks[row].key for row in rows[:_SHOWN]),
        )  # fmt: skip
        return _Suspect(facts, sample, rows)

    clusters: list[Cluster] = []
    for number, its in enumerate(strange):
        rows = np.flatnonzero(numbers == number)
        clusters.append(
            Cluster(
                method=method, target=name, number=number, images=len(rows), strangeness=its, places=places_of(rows),
                mean_map=looks[rows].mean(0), examples=tuple(sample.looks[row].key for row in rows[:_SHOWN]),
            )
        )  # fmt: skip
    found: list[_Suspect] = []
    rare = [one for one in clusters if one.images >= FEWEST and one.strangeness.rarity >= 0.5]
    if rare:
        first = max(rare, key=lambda one: one.strangeness.score)
        found.append(suspect("cluster", "", np.flatnonzero(numbers == first.number), first.strangeness.score))
    for place in DETECTORS:
        excess = in_places[place] - area[place]
        rows = np.flatnonzero((area[place] > 0) & (in_places[place] >= RATIO * area[place]))
        if len(rows) >= FEWEST:
            found.append(suspect("place", place, rows, float((excess[rows] * confidence[rows]).mean())))
    group = Group(
        method=method, target=name, count=sample.count, sampled=len(flat), confidence=float(confidence.mean()),
        places=places_of(np.arange(len(flat))), mean_map=looks.mean(0), clusters=len(clusters),
    )  # fmt: skip
    return group, clusters, found


def _in_places(
    source: Source, numbers: Sequence[int], weights: Float[Array, "n h w"]
) -> tuple[dict[str, Float[Array, " n"]], dict[str, Float[Array, " n"]]]:
    """For each kind of place, the share of each map's weight in it, and the share of the area."""
    shares: dict[str, list[tuple[Array, Array]]] = {place: [] for place in DETECTORS}
    for start in range(0, len(numbers), _IMAGES):
        part = slice(start, start + _IMAGES)
        images = source.images(numbers[part])
        for place, detect in DETECTORS.items():
            shares[place].append(regions.shares(weights[part], detect(images)))
    inside, area = (
        {place: np.concatenate([pair[which] for pair in pairs]) for place, pairs in shares.items()} for which in (0, 1)
    )
    return inside, area


def _tested(
    source: Source, suspect: _Suspect, samples: dict[tuple[str, int], _Sample], window: float, seed: int
) -> Suspicion:
    """Both interventions."""
    facts = suspect.facts
    rng = np.random.default_rng([seed, *facts.method.encode(), *facts.target.encode(), *facts.place.encode()])
    target = source.classes.index(facts.target)
    rows = np.sort(rng.permutation(suspect.rows)[:COVERED])
    looks = [suspect.sample.looks[row] for row in rows]
    numbers = [look.place for look in looks]
    images = source.images(numbers)
    size = images.shape[2], images.shape[3]
    sides = _sides(window, size)
    places = DETECTORS[facts.place](images) if facts.place else None
    maps = suspect.sample.maps()[rows]
    windows = regions.hottest(maps, size, sides, places)
    labels = np.array([look.label for look in looks])
    cover = interventions.cover_effect(images, windows, sides, target, source.predict, labels, seed)
    others = _others(samples, facts.method, target, rng)
    paste = None
    if others:
        into = source.images([look.place for look in others])
        truth = np.array([look.label for look in others])
        paste = interventions.paste_effect(into, images, windows, sides, target, source.predict, truth, seed)
    marks = source.marked(numbers)
    inside = None if marks is None else _inside(marks, interventions.windows_of(windows, size, sides))
    shown = range(min(len(rows), _SHOWN))
    return replace(
        facts,
        cover=cover,
        paste=paste,
        pasted=len(others),
        in_object=inside,
        pictures=tuple(
            Picture(looks[i].key, images[i].transpose(1, 2, 0).copy(), maps[i], (*windows[i].tolist(), *sides))
            for i in shown
        ),
    )


def _sides(window: float, size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the region, so that a second one has room beside it.

    >>> _sides(0.25, (224, 30)), _sides(1 / 3, (224, 32))
    ((56, 8), (74, 10))
    """
    height, width = (max(min(round(window * side), side // 3), 1) for side in size)
    return height, width


def _others(samples: dict[tuple[str, int], _Sample], method: str, target: int, rng: np.random.Generator) -> list[Look]:
    """Random images that are neither labeled nor predicted as a class."""
    looks = [
        look
        for (its_method, its_target), sample in samples.items()
        for look in sample.looks
        if its_method == method and its_target != target and look.label != target
    ]
    return [looks[place] for place in rng.permutation(len(looks))[:PASTED]]


def _inside(marks: Bool[Array, "n h w"], windows: Bool[Array, "n h w"]) -> Share:
    return Share(float(marks[windows].mean()), float(marks.mean()))


def _confirmed(tested: Sequence[Suspicion]) -> list[Suspicion]:
    """Which suspicions are findings, with p-values corrected for all of them."""
    p = np.array([max(one.cover.p, one.paste.p) if one.cover and one.paste else np.nan for one in tested])
    confirmed: list[Suspicion] = []
    for one, adjusted in zip(tested, holm(p).tolist(), strict=True):
        effects = [effect for effect in (one.cover, one.paste) if effect is not None]
        is_large = len(effects) == 2 and all(effect.difference.low > LEAST for effect in effects)
        confirmed.append(replace(one, adjusted=adjusted, is_finding=is_large and adjusted < LEVEL))
    return confirmed


def _copies(source: Source, splits: dict[str, list[tuple[int, str]]]) -> tuple[tuple[str, ...], int]:
    """Sentences about images that occur in several splits, and how many images were compared."""
    if len(splits) < 2:
        return (), 0
    order = sorted(splits, key=lambda split: (_ORDER.get(split, 3), split))
    places, names = zip(*(image for split in order for image in splits[split]), strict=True)
    prints: list[Array] = []
    for start in range(0, len(names), _IMAGES):
        images = source.images(places[start : start + _IMAGES])
        prints += [duplicates.imprint(image.tobytes(), image) for image in images]
    numbers = np.repeat(np.arange(len(order)), [len(splits[split]) for split in order])
    repeats = duplicates.copies(np.stack(prints), numbers, np.full(len(names), -1))
    told = duplicates.sentences(repeats, [order[number] for number in numbers], names)
    return tuple(told), len(names)


_ORDER = {"train": 0, "val": 1, "test": 2}


def _summary(exploration: Exploration) -> Iterator[Finding]:
    """An answer, one line per class and method with a finding, and what was not tested."""
    tested = [one for one in exploration.suspicions if one.cover is not None]
    findings = exploration.findings
    decided = sorted({ones[0].target for ones in findings if not ones[0].is_object}, key=exploration.classes.index)
    if decided:
        yield Finding(
            "confirmed",
            f"{len(decided)} of {len(exploration.classes)} classes depend on a small region: "
            f"{joined([f'“{name}”' for name in decided], 10)}. See whether it belongs to the object.",
            classes=decided,
        )
    else:
        yield Finding(
            "none confirmed",
            f"No shortcut was found: of {len(tested)} suspicions none was confirmed"
            + (", except for marked objects." if findings else "."),
            tested=len(tested),
        )
    for ones in findings:
        yield Finding(ones[0].verdict, sentence(ones), suspicion=exploration.suspicions.index(ones[0]))
    if untested := len(exploration.suspicions) - len(tested):
        yield Finding("not tested", f"{untested} weaker suspicions were not tested; --tests tests more.")


REGIONS = {
    "": "one small region",
    "border": "a region at the border",
    "corners": "a region in a corner",
    "text": "a region like text",
    "colored patch": "a colored patch",
}
"""What a finding of each kind of place says."""


def sentence(ones: Sequence[Suspicion]) -> str:
    """Confirmed suspicions of a class and method in a line; the numbers are those of the first."""
    first = ones[0]
    assert first.cover and first.paste
    also = [REGIONS[one.place] for one in ones[1:]]
    return (
        f"“{first.target}” depends on {REGIONS[first.place]} in {percent(first.class_share)} of its images, says "
        f"{words(first.method)}{f' (also confirmed: {joined(also)})' if also else ''}. If it is covered, "
        f"{percent(1 - first.cover.region.value)} of {first.cover.region.n} images lose that name (a random region: "
        f"{percent(1 - first.cover.control.value)}); pasted into {first.pasted} images of other classes, it turns "
        f"{percent(first.paste.region.value)} into “{first.target}” (a random region: "
        f"{percent(first.paste.control.value)}).{' It lies in the marked object.' if first.is_object else ''}"
    )
