"""One forward that keeps the tensors that maps are read from, and what is known about them."""

from sightline.explainers.capture.features import Captured, quantized_in
from sightline.explainers.capture.head import head_of
from sightline.explainers.capture.layers import Capture, LayerLike, find_layer
from sightline.explainers.capture.replay import has_known_plan
from sightline.explainers.capture.structure import is_known_code

__all__ = [
    "Capture",
    "Captured",
    "LayerLike",
    "find_layer",
    "has_known_plan",
    "head_of",
    "is_known_code",
    "quantized_in",
]
