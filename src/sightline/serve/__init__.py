"""A page and an HTTP API over one model: predictions, maps, curves. No mathematics."""

from sightline.serve.service import Service, open_service

__all__ = ["Service", "open_service"]
