"""Maps of millions of images: shards that are computed on any number of machines, each of them once."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sightline.checks import missing

try:
    import pyarrow  # noqa: F401  # pyright: ignore[reportUnusedImport]
except ModuleNotFoundError:
    raise missing("results in parquet files need the library pyarrow", "scale") from None

if TYPE_CHECKING:
    from sightline.scale.cluster import Cluster, spread_by
    from sightline.scale.looks import ResultLooks
    from sightline.scale.many import Many, explain_many
    from sightline.scale.results import Results, read_map

__all__ = ["Cluster", "Many", "ResultLooks", "Results", "explain_many", "read_map", "spread_by"]

_HOMES = {
    "Cluster": "cluster",
    "Many": "many",
    "ResultLooks": "looks",
    "Results": "results",
    "explain_many": "many",
    "read_map": "results",
    "spread_by": "cluster",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for: a process that decodes needs no network."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
