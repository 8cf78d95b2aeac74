"""What `explore` found, as plain frozen data."""

import csv
import io
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from sightline.exploration.clusters import Strangeness
from sightline.exploration.interventions import Effect
from sightline.facts import Finding, Interval
from sightline.notebook import brief
from sightline.runs import plain, write

Array = np.ndarray


class Share(NamedTuple):
    """How much of the maps lies in a kind of place."""

    weight: float
    """Mean share of the maps' weight in it."""
    chance: float
    """Mean share of the images' area that it covers."""


class Picture(NamedTuple):
    """An image with its map and the suspected region."""

    key: str
    image: UInt8[Array, "h w 3"]
    map: Float[Array, "map_h map_w"]
    region: tuple[int, int, int, int]
    """Top, left, height and width, in pixels of the image."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Maps of one class and method that look at the same places."""

    __repr__ = brief

    method: str
    target: str
    number: int
    """0 is the largest of its class."""
    images: int
    strangeness: Strangeness
    places: dict[str, Share]
    mean_map: Float[Array, "grid grid"]
    examples: tuple[str, ...]
    """Keys of the first images."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """The maps of one class and method."""

    __repr__ = brief

    method: str
    target: str
    count: int
    """Maps of the class that is predicted."""
    sampled: int
    """Those among them that were compared: all, or a random sample."""
    confidence: float
    """Mean probability of the class."""
    places: dict[str, Share]
    mean_map: Float[Array, "grid grid"]
    clusters: int


@dataclass(frozen=True, kw_only=True)
class Suspicion:
    """Images of a class in which a small region may decide, and what covering and pasting that region says."""

    __repr__ = brief

    method: str
    target: str
    kind: str
    """`cluster`: the strangest cluster of the class. `place`: images whose map lies on a kind of place."""
    place: str
    """border, corners, text or colored patch; empty for a cluster."""
    weight: float
    """How much speaks for it, 0 to 1: decides which suspicions are tested if there are too many."""
    images: int
    """In the sample."""
    class_share: float
    """They are so much of the class's sample."""
    places: dict[str, Share]
    examples: tuple[str, ...]
    cover: Effect | None = None
    """None: not tested."""
    paste: Effect | None = None
    pasted: int = 0
    """Images that regions were pasted into."""
    adjusted: float = math.nan
    """The larger p of the two tests, corrected for all suspicions that were tested (Holm)."""
    in_object: Share | None = None
    """How much of the regions lies in the marked objects, and how much of the image is marked; None without marks."""
    is_finding: bool = False
    pictures: tuple[Picture, ...] = ()

    @property
    def reach(self) -> float:
        """Share of the class's images times the lower end of the smaller effect; 0 if it was not tested."""
        effects = [effect.difference.low for effect in (self.cover, self.paste) if effect is not None]
        return self.class_share * min(effects, default=0.0)

    @property
    def is_object(self) -> bool:
        """Whether most of the regions' area lies in the marked objects: evidence, and no shortcut."""
        return self.in_object is not None and self.in_object.weight >= 0.5

    @property
    def verdict(self) -> str:
        """`confirmed`: the region decides; `object`: so it does, in a marked object; `not confirmed`; `not tested`."""
        if self.cover is None:
            return "not tested"
        return "not confirmed" if not self.is_finding else "object" if self.is_object else "confirmed"


@dataclass(frozen=True, kw_only=True)
class Exploration:
    """What the maps of a network say about it. `to_json` and `to_csv` write it; `sightline.report` draws it."""

    __repr__ = brief

    name: str
    """Of the images."""
    classes: tuple[str, ...]
    methods: tuple[str, ...]
    maps: int
    """Maps that were read."""
    left_out: dict[str, int]
    """Why maps were not compared -> how many."""
    groups: tuple[Group, ...]
    clusters: tuple[Cluster, ...]
    """Strangest first."""
    suspicions: tuple[Suspicion, ...]
    """Findings first, then the other tested ones by weight, then those not tested."""
    summary: tuple[Finding, ...]
    duplicates: tuple[str, ...]
    """Sentences about images that occur in several splits."""
    compared: int
    """Images that were compared to find these."""
    settings: dict[str, float | int]
    notices: tuple[str, ...] = ()
    provenance: dict[str, str] = field(default_factory=dict[str, str])

    @property
    def findings(self) -> tuple[tuple[Suspicion, ...], ...]:
        """Suspicions that both interventions confirm, by class and method; those that reach farthest come first."""
        found: dict[tuple[str, str, bool], list[Suspicion]] = {}
        for one in self.suspicions:
            if one.is_finding:
                found.setdefault((one.method, one.target, one.is_object), []).append(one)
        ordered = (tuple(sorted(ones, key=lambda one: -one.reach)) for ones in found.values())
        return tuple(sorted(ordered, key=lambda ones: (ones[0].is_object, -ones[0].reach)))

    def to_json(self, path: Path | str) -> Path:
        """Write everything but the pictures."""
        facts = {name: getattr(self, name) for name in self.__dataclass_fields__}
        facts["suspicions"] = [
            {name: getattr(one, name) for name in one.__dataclass_fields__ if name != "pictures"}
            | {"verdict": one.verdict}
            for one in self.suspicions
        ]
        path = Path(path)
        write(path, json.dumps(plain(facts), indent=1, ensure_ascii=False).encode())
        return path

    def to_csv(self, path: Path | str) -> Path:
        """Write the suspicions, one row each."""
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(_COLUMNS)
        for one in self.suspicions:
            effects = [_cells(effect) for effect in (one.cover, one.paste)]
            inside = "" if one.in_object is None else f"{one.in_object.weight:.4f}"
            adjusted = "" if math.isnan(one.adjusted) else f"{one.adjusted:.3g}"
            first = (one.verdict, one.method, one.target, one.kind, one.place, one.images, f"{one.weight:.4f}")
            writer.writerow([*first, *effects[0], *effects[1], adjusted, inside, *one.examples[:1]])
        path = Path(path)
        write(path, text.getvalue().encode())
        return path


_EFFECT = ("region", "random", "difference", "low", "high")
_COLUMNS = (
    *("verdict", "method", "class", "kind", "place", "images", "weight"),
    *(f"{what}_{name}" for what in ("cover", "paste") for name in _EFFECT),
    *("adjusted_p", "in_object", "example"),
)


def _cells(effect: Effect | None) -> list[str]:
    if effect is None:
        return [""] * len(_EFFECT)
    difference: Interval = effect.difference
    values = (effect.region.value, effect.control.value, difference.value, difference.low, difference.high)
    return [f"{value:.4f}" for value in values]
