"""The names of pytorch-grad-cam 1.5.7 over `sightline.explain`.

In an old script, replace `pytorch_grad_cam` by `sightline.compat.pytorch_grad_cam` in the imports. Names, arguments,
shapes and types are the same; `sightline.compat.report()` lists where the values are not.
"""

from sightline.compat.pytorch_grad_cam.ablation_layer import AblationLayer, AblationLayerFasterRCNN, AblationLayerVit
from sightline.compat.pytorch_grad_cam.absent import absent
from sightline.compat.pytorch_grad_cam.base_cam import BaseCAM
from sightline.compat.pytorch_grad_cam.finer_cam import FinerCAM
from sightline.compat.pytorch_grad_cam.guided_backprop import GuidedBackpropReLUModel
from sightline.compat.pytorch_grad_cam.methods import (
    AblationCAM,
    EigenCAM,
    EigenGradCAM,
    GradCAM,
    GradCAMPlusPlus,
    HiResCAM,
    LayerCAM,
    RandomCAM,
    ScoreCAM,
    XGradCAM,
)

FEM = absent("FEM", "take EigenCAM, which does not look at the class either")
FullGrad = absent("FullGrad", "take LayerCAM with several target_layers")
GradCAMElementWise = absent("GradCAMElementWise", "take LayerCAM or HiResCAM")
KPCA_CAM = absent("KPCA_CAM", "take EigenCAM")
RefineCAM = absent("RefineCAM", "give several target_layers, whose maps are averaged")
SegEigenCAM = absent("SegEigenCAM", "take EigenGradCAM")
SESS = absent("SESS", "take aug_smooth=True")
ShapleyCAM = absent("ShapleyCAM", "take HiResCAM")
DeepFeatureFactorization = absent("DeepFeatureFactorization", "factorize explain(...)'s activation_map layers yourself")

__all__ = [
    "AblationCAM",
    "AblationLayer",
    "AblationLayerFasterRCNN",
    "AblationLayerVit",
    "BaseCAM",
    "DeepFeatureFactorization",
    "EigenCAM",
    "EigenGradCAM",
    "FEM",
    "FinerCAM",
    "FullGrad",
    "GradCAM",
    "GradCAMElementWise",
    "GradCAMPlusPlus",
    "GuidedBackpropReLUModel",
    "HiResCAM",
    "KPCA_CAM",
    "LayerCAM",
    "RandomCAM",
    "RefineCAM",
    "SESS",
    "ScoreCAM",
    "SegEigenCAM",
    "ShapleyCAM",
    "XGradCAM",
]
