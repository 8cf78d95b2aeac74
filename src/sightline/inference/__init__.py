"""Calls anybody's model without leaving a trace."""

from sightline.inference.copies import copy_of
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
from sightline.inference.preserve import exact, untouched

__all__ = [
    "answers",
    "check_images",
    "copy_of",
    "either",
    "exact",
    "forward",
    "logits_of",
    "output_of",
    "probabilities_of",
    "run",
    "run_with_link",
    "untouched",
    "version_of",
    "wide",
]
