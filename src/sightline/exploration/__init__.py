"""Findings from many maps: where a network looks by class, what is strange about it, and whether that place decides."""

from sightline.exploration.clusters import Strangeness, spectral, strangeness
from sightline.exploration.interventions import Effect, cover_effect, paste_effect
from sightline.exploration.regions import DETECTORS, shares
from sightline.exploration.result import Cluster, Exploration, Group, Suspicion
from sightline.exploration.sources import Look, RunLooks, Source
from sightline.exploration.study import explore

__all__ = [
    "DETECTORS",
    "Cluster",
    "Effect",
    "Exploration",
    "Group",
    "Look",
    "RunLooks",
    "Source",
    "Strangeness",
    "Suspicion",
    "cover_effect",
    "explore",
    "paste_effect",
    "shares",
    "spectral",
    "strangeness",
]
