"""Maps of images as files, and an evaluation or a study as a page of HTML."""

from typing import TYPE_CHECKING, Any

from sightline.report.pages import Pages, pages

if TYPE_CHECKING:
    from sightline.report.html import write, write_study

__all__ = ["Pages", "pages", "write", "write_study"]


def __getattr__(name: str) -> Any:
    """Import what HTML needs, all metrics among it, only if it is asked for: `pages` needs none of it."""
    if name in ("write", "write_study"):
        from sightline.report import html

        return getattr(html, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
