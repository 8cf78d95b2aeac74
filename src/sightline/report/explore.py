"""An exploration as a page: findings with their images first, then all that was suspected, then every class."""

from pathlib import Path

from sightline import runs
from sightline.exploration import Exploration
from sightline.exploration.study import REGIONS, sentence
from sightline.facts import capitalized
from sightline.report import pictures
from sightline.report.formats import template

__all__ = ["write_exploration"]

_FINDINGS, _CLUSTERS, _CLASSES = 20, 12, 60  # most that the page shows; the files have all


def write_exploration(exploration: Exploration, folder: str | Path) -> Path:
    """Write `folder`/explore.html, the whole file or none of it, and return its path.

    Args:
        exploration: what to draw.
        folder: made if missing.

    Raises:
        OSError: the folder cannot be written to.
    """
    findings = exploration.findings
    groups = sorted(exploration.groups, key=lambda group: -group.count)
    page = template("explore.html").render(
        exploration=exploration,
        answer=exploration.summary[0],
        rest=[finding for finding in exploration.summary[1:] if finding.kind == "not tested"],
        decided=len({ones[0].target for ones in findings}),
        findings=[(ones, sentence(ones)) for ones in findings[:_FINDINGS]],
        more=[sentence(ones) for ones in findings[_FINDINGS:]],
        tested=[one for one in exploration.suspicions if one.cover is not None],
        clusters=exploration.clusters[:_CLUSTERS],
        groups=groups[:_CLASSES],
        places=list(exploration.groups[0].places),
        regions={place: capitalized(region) for place, region in REGIONS.items()},
        facts=exploration.provenance | exploration.settings,
        colors=pictures.color_stops(),
        pictures=pictures,
    )
    path = Path(folder) / "explore.html"
    runs.write(path, page.encode())
    return path
