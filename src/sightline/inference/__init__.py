"""Calls anybody's model without leaving a trace."""

from sightline.inference.outputs import (
    answers,
    check_images,
    either,
    forward,
    logits_of,
    output_of,
    probabilities_of,
    run,
    run_with_link,
    version_of,
    wide,
)
from sightline.inference.preserve import exact, preserving, untouched

__all__ = [
    "answers",
    "check_images",
    "either",
    "exact",
    "forward",
    "logits_of",
    "output_of",
    "preserving",
    "probabilities_of",
    "run",
    "run_with_link",
    "untouched",
    "version_of",
    "wide",
]
