"""See where an image classifier looks, teach it to look, and measure whether the picture tells the truth."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sightline.version import __version__ as __version__

if TYPE_CHECKING:
    from sightline import (
        attention,
        bench,
        compat,
        data,
        explainers,
        hub,
        maps,
        metrics,
        models,
        recipe,
        report,
        runs,
        targets,
        testing,
        training,
    )
    from sightline.attention import insert
    from sightline.evaluation import evaluate
    from sightline.explainers import attention_maps, explain
    from sightline.exporting import export
    from sightline.hub import load
    from sightline.models import create_model
    from sightline.training import fit

__all__ = [
    "attention",
    "attention_maps",
    "bench",
    "compat",
    "create_model",
    "data",
    "evaluate",
    "explain",
    "explainers",
    "export",
    "fit",
    "hub",
    "insert",
    "load",
    "maps",
    "metrics",
    "models",
    "recipe",
    "report",
    "runs",
    "targets",
    "testing",
    "training",
]

_HOMES = {
    "attention_maps": "explainers",
    "create_model": "models",
    "evaluate": "evaluation",
    "explain": "explainers",
    "export": "exporting",
    "fit": "training",
    "insert": "attention",
    "load": "hub",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for, so that `import sightline` itself loads nothing heavy (PEP 562)."""
    if name in _HOMES:
        return getattr(import_module(f"sightline.{_HOMES[name]}"), name)
    if name in __all__:
        return import_module(f"sightline.{name}")
    raise AttributeError(f"module 'sightline' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return __all__
