"""Maps of where a model looks. `explain` computes all of them from as few forwards and backwards as they need."""

from sightline.explainers import cams, controls, gradients, intrinsic, perturbation, relevance, rollout
from sightline.explainers.cams import *
from sightline.explainers.controls import *
from sightline.explainers.explain import EXPLAINERS, FAST, Method, explain, find_explainer, fitting, named
from sightline.explainers.explainer import Explainer, Explanation
from sightline.explainers.gradients import *
from sightline.explainers.intrinsic import *
from sightline.explainers.perturbation import *
from sightline.explainers.relevance import *
from sightline.explainers.rollout import *
from sightline.explainers.verdicts import Map
from sightline.facts import Progress, Verdict, old_names

__all__ = [
    "EXPLAINERS",
    "Explainer",
    "Explanation",
    "FAST",
    "Map",
    "Method",
    "Progress",
    "Verdict",
    "explain",
    "find_explainer",
    "fitting",
    "named",
]
__all__ += cams.__all__
__all__ += controls.__all__
__all__ += gradients.__all__
__all__ += intrinsic.__all__
__all__ += perturbation.__all__
__all__ += relevance.__all__
__all__ += rollout.__all__

__getattr__ = old_names("sightline.explainers")
