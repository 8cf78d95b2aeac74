"""A page and an HTTP API over one model: predictions, maps, curves. No mathematics."""

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from sightline.checks import missing
from sightline.serve.service import Service, open_service

if TYPE_CHECKING:
    from sightline.serve.app import create_app
    from sightline.serve.server import listening, serve
    from sightline.serve.uploads import Limits

__all__ = ["Limits", "Service", "create_app", "listening", "open_service", "serve"]


def __getattr__(name: str) -> Any:
    """Import what needs the web framework only if it is asked for: `Service` needs none."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    if any(find_spec(library) is None for library in ("starlette", "uvicorn", "python_multipart")):
        raise missing("serving needs starlette, uvicorn and python-multipart", "serve")
    from sightline.serve import app, server, uploads

    return {
        "Limits": uploads.Limits,
        "create_app": app.create_app,
        "listening": server.listening,
        "serve": server.serve,
    }[name]
