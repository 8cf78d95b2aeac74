"""Layer-wise relevance propagation (LRP): the logit, handed down from layer to layer until it lies on the pixels."""

from sightline.explainers.relevance.methods import (
    lrp,
    lrp_epsilon_alpha2_beta1,
    lrp_epsilon_gamma_box,
    lrp_epsilon_plus_flat,
)
from sightline.explainers.relevance.rules import (
    AlphaBeta,
    Composite,
    Epsilon,
    Flat,
    Gamma,
    Rule,
    ZBox,
    Zero,
    ZPlus,
)

__all__ = [
    "AlphaBeta",
    "Composite",
    "Epsilon",
    "Flat",
    "Gamma",
    "Rule",
    "ZBox",
    "ZPlus",
    "Zero",
    "lrp",
    "lrp_epsilon_alpha2_beta1",
    "lrp_epsilon_gamma_box",
    "lrp_epsilon_plus_flat",
]
