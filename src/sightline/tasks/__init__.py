"""What a trained network is good for besides naming its own test images."""

from sightline.tasks import cross_domain, robustness, segmentation
from sightline.tasks.new_classes import few_shot
from sightline.tasks.outcome import TASKS, Figure, Outcome, check_options, perform, register
from sightline.tasks.retrieval import Found, embed, encoder, find, retrieval

__all__ = [
    "TASKS",
    "Figure",
    "Found",
    "Outcome",
    "check_options",
    "cross_domain",
    "embed",
    "encoder",
    "few_shot",
    "find",
    "perform",
    "register",
    "retrieval",
    "robustness",
    "segmentation",
]
