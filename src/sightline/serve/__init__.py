"""A page and an HTTP API over one model: predictions, maps, curves. No mathematics."""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from sightline.checks import missing

if TYPE_CHECKING:
    from sightline.serve.app import create_app
    from sightline.serve.port import listening
    from sightline.serve.server import serve
    from sightline.serve.service import Service, open_service
    from sightline.serve.uploads import Limits

__all__ = ["Limits", "Service", "create_app", "listening", "open_service", "serve"]

_HOMES = {
    "Limits": "uploads",
    "Service": "service",
    "create_app": "app",
    "listening": "port",
    "open_service": "service",
    "serve": "server",
}
_LIBRARIES = ("starlette", "uvicorn", "python_multipart")


def __getattr__(name: str) -> Any:
    """Import what is asked for: a port needs no model, and a `Service` no web framework."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    if _HOMES[name] != "service" and any(find_spec(library) is None for library in _LIBRARIES):
        raise missing("serving needs starlette, uvicorn and python-multipart", "serve")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
