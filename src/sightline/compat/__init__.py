"""Names and arguments of other libraries over the methods of this one: change an import, and a script runs."""

from sightline.compat.differences import Difference, Report, report

__all__ = ["Difference", "Report", "report"]
