"""Layer-wise relevance propagation (LRP): the logit, handed down from layer to layer until it lies on the pixels."""

from sightline.explainers.relevance import methods, rules
from sightline.explainers.relevance.methods import *
from sightline.explainers.relevance.rules import *

__all__: list[str] = []
__all__ += methods.__all__
__all__ += rules.__all__
