"""What a trained network is good for besides naming its own test images."""

from sightline.tasks.new_classes import few_shot
from sightline.tasks.outcome import TASKS, Figure, Outcome, check_options, perform, register

__all__ = ["TASKS", "Figure", "Outcome", "check_options", "few_shot", "perform", "register"]
