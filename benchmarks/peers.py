"""The same maps from sightline, captum, pytorch-grad-cam, torch-cam and zennit, on eight networks of torchvision.

    python benchmarks/peers.py                  all networks, writes docs/peers.md and benchmarks/results/peers.json
    python benchmarks/peers.py resnet18 vgg16   measures these again, keeps what the JSON file has of the others

A difference is explained only if the script proves it: the peer's formula, written out here in a few lines, is compared
with the peer, or the peer's map is shown to break the axiom that defines the method.
"""

import json
import sys
import time
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from copy import deepcopy
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property, partial
from importlib.metadata import version
from io import StringIO
from math import inf, isfinite
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import captum.attr as captum
import pytorch_grad_cam as pgc
import pytorch_grad_cam.base_cam as pgc_base
import torch
import torchcam.methods as tc
from captum.attr._utils.lrp_rules import EpsilonRule
from pytorch_grad_cam.ablation_layer import AblationLayer, AblationLayerVit
from pytorch_grad_cam.guided_backprop import GuidedBackpropReLUModel
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models
from zennit import attribution, canonizers, composites, rules
from zennit.layer import Sum
from zennit.torchvision import ResNetCanonizer
from zennit.types import AvgPool, Linear

import sightline as sl
from sightline.explainers.relevance import Composite, Epsilon

zennit_attribution: Any = attribution  # whose annotations are narrower than what it takes
ROOT = Path(__file__).parents[1]
PAGE, RESULTS = ROOT / "docs/peers.md", ROOT / "benchmarks/results/peers.json"
PEERS = ("captum", "grad-cam", "torchcam", "zennit")
SIDE, CLASSES, STEPS, SAMPLES = 64, 20, 8, 4
EQUAL = 1e-5

# The layers of Score-CAM and Ablation-CAM, which run a network once per channel: early ones, with few channels.
EARLY = {
    "resnet18": "layer1",
    "vgg16": "features.4",
    "densenet121": "features.pool0",
    "mobilenet_v3_large": "features.1",
    "efficientnet_b0": "features.1",
    "convnext_tiny": "features.1",
    "vit_b_16": "",
    "swin_t": "features.1",
}
NAMED = {"densenet121": "features"}  # the automatic layer lies behind a ReLU that is a function: it has no name


def channels_first(tokens: Tensor) -> Tensor:
    return tokens.movedim(-1, 1)


def patches_first(tokens: Tensor) -> Tensor:
    side = int((tokens.shape[1] - 1) ** 0.5)
    return tokens[:, 1:].unflatten(1, (side, side)).movedim(-1, 1)


class Net:
    """One network in float64, two images, the predicted classes, and the layer that sightline picks by itself."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        self.name = name
        options = {"image_size": SIDE} if name == "vit_b_16" else {}
        self.model: nn.Module = getattr(models, name)(num_classes=CLASSES, **options).double()
        norms = [module for module in self.model.modules() if isinstance(module, nn.BatchNorm2d)]
        for parameter in self.model.parameters():  # biases and scales that do something, heads that are not zero
            parameter.data += 0.1 * torch.randn_like(parameter) if parameter.ndim != 4 else 0
        for norm in norms:
            norm.momentum = 1.0
        with torch.no_grad():
            self.model.train()(torch.randn(8, 3, SIDE, SIDE, dtype=torch.double))
        self.model.eval()
        self.images = torch.randn(2, 3, SIDE, SIDE, dtype=torch.double)
        self.layer = NAMED.get(name) or sl.explain(self.model, self.images).layer.split(" ")[0]
        self.early = EARLY[name]
        self.reshape = patches_first if name == "vit_b_16" else None
        self.reshape_early = channels_first if name == "swin_t" else None
        self.logits = self.model(self.images).detach()
        self.targets = self.logits.argmax(1)
        self.picks: list[int] = self.targets.tolist()

    def ours(self, method: Any, *, early: bool = False) -> Tensor:
        images = self.images[:1] if early else self.images
        layer = self.early if early else self.layer
        method = getattr(sl.explainers, method) if isinstance(method, str) else method
        explanation = sl.explain(self.model, images, self.targets[: len(images)], [method], layer)
        return next(iter(explanation.maps.values()))[:, 0]

    def copy(self, *, inplace: bool = True) -> nn.Module:
        model = deepcopy(self.model)
        if not inplace:
            for module in model.modules():
                if "inplace" in vars(module):
                    vars(module)["inplace"] = False
        return model

    def module(self, model: nn.Module, *, early: bool = False) -> nn.Module:
        return model.get_submodule(self.early if early else self.layer)

    def _captured(self, layer: str, *, keep: bool, reshape: Any) -> tuple[Tensor, Tensor]:
        """Activation and gradient at the layer, as a hook sees them: safe from what follows in place, if `keep`."""
        seen: list[Tensor] = []

        def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            seen.append(output)
            return output.clone() if keep else output

        model = self.copy()
        model.get_submodule(layer).register_forward_hook(hook)
        scores = model(self.images).gather(1, self.targets[:, None]).sum()
        (gradient,) = torch.autograd.grad(scores, seen)
        found = seen[0].detach(), gradient
        return found if reshape is None else (reshape(found[0]), reshape(found[1]))

    @cached_property
    def evidence(self) -> tuple[Tensor, Tensor]:
        return self._captured(self.layer, keep=True, reshape=self.reshape)

    @cached_property
    def overwritten(self) -> tuple[Tensor, Tensor]:
        """What is in the layer's tensor when the forward is over, and the gradient there."""
        return self._captured(self.layer, keep=False, reshape=self.reshape)

    @cached_property
    def early_activations(self) -> Tensor:
        return self._captured(self.early, keep=True, reshape=self.reshape_early)[0][:1]

    def one_hot(self) -> Tensor:
        return F.one_hot(self.targets, CLASSES).double()


# ---------------------------------------------------------------------------------------------------- peers' maps


def grad_cam_library(net: Net, method: str, *, early: bool = False, **options: Any) -> Tensor:
    """A map of pytorch-grad-cam before it is resized and scaled to [0, 1]: after its ReLU."""
    model, reshape = net.copy(), net.reshape_early if early else net.reshape
    images = net.images[:1] if early else net.images
    with mock.patch.object(pgc_base, "scale_cam_image", lambda cam, size=None: cam):
        with getattr(pgc, method)(model, [net.module(model, early=early)], reshape_transform=reshape, **options) as cam:
            chosen = None if method == "FinerCAM" else [ClassifierOutputTarget(i) for i in net.picks[: len(images)]]
            more: dict[str, Any] = {"comparison_categories": [1]} if method == "FinerCAM" else {}
            return torch.as_tensor(cam(images.clone(), chosen, **more)).double()
    raise RuntimeError("an IndexError, which the context manager of pytorch-grad-cam prints and hides")


def ablation_of_grad_cam_library(net: Net) -> Tensor:
    layer = AblationLayerVit() if net.reshape_early else AblationLayer()
    return grad_cam_library(net, "AblationCAM", early=True, ablation_layer=layer)


def guided_of_grad_cam_library(net: Net) -> Tensor:
    found = GuidedBackpropReLUModel(net.copy())(net.images[:1].clone(), net.picks[0])
    return torch.as_tensor(found).sum(2)[None]


def torchcam_library(net: Net, method: str, *, early: bool = False, **options: Any) -> Tensor:
    """A map of torch-cam with normalized=False."""
    model, images = net.copy(), net.images[:1] if early else net.images
    layer, reshape = (net.early, net.reshape_early) if early else (net.layer, net.reshape)
    with getattr(tc, method)(model, layer, reshape_transform=reshape, **options) as extractor:
        scores = model(images.clone())
        return extractor(net.picks[: len(images)], scores, normalized=False)[0].detach()


def captum_pixels(net: Net, name: str, **options: Any) -> Tensor:
    found = getattr(captum, name)(net.copy(inplace=False)).attribute(net.images, target=net.targets, **options)
    return found.detach().sum(1)


def captum_layer(net: Net, method: str, **options: Any) -> Tensor:
    model = net.copy()
    found = getattr(captum, method)(model, net.module(model)).attribute(net.images, target=net.targets, **options)
    return (net.reshape(found) if net.reshape else found).detach().sum(1)


def captum_grad_cam(net: Net) -> Tensor:
    if net.reshape is None:
        return captum_layer(net, "LayerGradCam", relu_attributions=True)
    return captum_layer(net, "LayerGradCam", attr_dim_summation=False)


def captum_noise(net: Net, kind: str) -> Tensor:
    """NoiseTunnel, given the noise that sightline draws."""
    seeds = torch.randint(2**62, (SAMPLES,), generator=torch.Generator().manual_seed(0)).tolist()
    noise = [torch.randn(3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed)).double() for seed in seeds]
    pixels = net.images.flatten(1)
    scales = 0.15 * (pixels.amax(1) - pixels.amin(1))
    drawn = torch.cat([scale * torch.stack(noise) for scale in scales])
    tunnel: Any = captum.NoiseTunnel(captum.Saliency(net.copy()))
    with mock.patch("torch.normal", lambda mean, std: drawn.view_as(std)):
        found = tunnel.attribute(net.images, nt_type=kind, nt_samples=SAMPLES, target=net.targets, abs=False)
    return found.detach().abs().amax(1) if kind == "smoothgrad" else found.detach().sum(1)


def captum_guided_grad_cam(net: Net, mode: str) -> Tensor:
    model = net.copy(inplace=False)
    method = captum.GuidedGradCam(model, net.module(model))
    found = method.attribute(net.images, target=net.targets, interpolate_mode=mode)
    if not found.numel():
        raise RuntimeError("an empty map: a layer of tokens cannot be interpolated")
    return found.detach().sum(1)


def captum_occlusion(net: Net, patch: int, stride: int) -> Tensor:
    shapes = {"sliding_window_shapes": (3, patch, patch), "strides": (3, stride, stride)}
    return captum_pixels(net, "Occlusion", **shapes) / 3


def captum_lrp(net: Net, model: nn.Module | None = None) -> Tensor:
    model = model or net.copy(inplace=False)
    method: Any = captum.LRP(model)
    return method.attribute(net.images, target=net.targets).detach().sum(1)


def zennit_gradient(net: Net, composite: Any = None) -> Tensor:
    with zennit_attribution.Gradient(net.copy(inplace=False), composite) as attributor:
        return attributor(net.images.clone(), net.one_hot())[1].detach()


def zennit_integrated(net: Net) -> Tensor:
    with zennit_attribution.IntegratedGradients(net.copy(), n_iter=STEPS) as attributor:
        return attributor(net.images.clone(), net.one_hot())[1].detach().sum(1)


def zennit_occlusion(net: Net, patch: int) -> Tensor:
    """It adds up the scores of what it leaves; turned round, and taken from the score, it is the fall of the logit."""
    covered = partial(zennit_attribution.occlude_independent, fill_fn=torch.zeros_like, invert=True)
    sizes = {"window": (3, patch, patch), "stride": (3, patch, patch)}
    with zennit_attribution.Occlusion(net.copy(), occlusion_fn=covered, **sizes) as attributor:
        found = attributor(net.images.clone(), lambda out: out * net.one_hot())[1].detach()
    return net.logits.gather(1, net.targets[:, None])[:, :, None] - found[:, 0]


def exact_norms(model: nn.Module) -> nn.Module:
    """The same function with an epsilon of 0 in every batch normalization."""
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d) and norm.running_var is not None:
            norm.running_var += norm.eps
            norm.eps = 0.0
    return model


def zennit_lrp(net: Net, method: str, model: nn.Module | None = None, stabiliser: float = 1e-6) -> Tensor:
    exact = [(Sum, rules.Norm(stabiliser)), (AvgPool, rules.Norm(stabiliser))]
    own = ResNetCanonizer() if net.name == "resnet18" else canonizers.SequentialMergeBatchNorm()
    options: dict[str, Any] = {"canonizers": [own]}
    if method == "lrp":
        rest = [*exact, *composites.layer_map_base(), (Linear, rules.Epsilon())]
        composite = composites.LayerMapComposite(rest, **options)
    elif method == "lrp_epsilon_gamma_box":
        low = torch.full_like(net.images[:1], -4)
        composite = composites.EpsilonGammaBox(low, -low, layer_map=exact, **options)
    else:
        kinds = {"plus_flat": composites.EpsilonPlusFlat, "alpha2_beta1": composites.EpsilonAlpha2Beta1}
        composite = kinds[method.removeprefix("lrp_epsilon_")](layer_map=exact, **options)
    model = model or net.copy(inplace=False)
    with zennit_attribution.Gradient(model, composite) as attributor:
        return attributor(net.images.clone(), lambda out: out * net.one_hot())[1].detach().sum(1)


# --------------------------------------------------------------------------------- proofs: the peer's formula, here

Proof = Callable[[Net, Tensor | None, Tensor], float]
"""What is left of the difference once the reason is taken into account."""


def distance(found: Tensor, reference: Tensor) -> float:
    largest = reference.abs().max().item()
    return (found - reference).abs().max().item() / largest if largest else found.abs().max().item()


def emulated(formula: Callable[[Net], Tensor]) -> Proof:
    return lambda net, ours, theirs: distance(formula(net), theirs)


def weighted(weights: Tensor, activations: Tensor) -> Tensor:
    return torch.einsum("bk,bkhw->bhw", weights, activations).relu()


def mixed_evidence(net: Net) -> tuple[Tensor, Tensor]:
    """Of pytorch-grad-cam: the activation after the operation in place, the gradient before it."""
    return net.overwritten[0], net.evidence[1]


def mean_weights(activations: Tensor, gradients: Tensor) -> Tensor:
    return weighted(gradients.mean((2, 3)), activations)


def tokens_as_channels(net: Net) -> Tensor:
    activations, gradients = net.evidence
    return gradients.mean(1) * activations.sum(1)


def epsilon_plus_plus(activations: Tensor, gradients: Tensor) -> Tensor:
    sums = activations.sum((2, 3), keepdim=True)
    alphas = gradients**2 / (2 * gradients**2 + sums * gradients**3 + 1e-6)
    return weighted((alphas * gradients.relu()).sum((2, 3)), activations)


def undivided_plus_plus(activations: Tensor, gradients: Tensor) -> Tensor:
    return weighted((gradients**2 * gradients.relu()).sum((2, 3)), activations)


def epsilon_x(epsilon: float, activations: Tensor, gradients: Tensor) -> Tensor:
    sums = activations.sum((2, 3))
    return weighted((gradients * activations).sum((2, 3)) / (sums + epsilon), activations)


def positive_products(activations: Tensor, gradients: Tensor) -> Tensor:
    return (gradients.relu() * activations).sum(1).relu()


def products(activations: Tensor, gradients: Tensor) -> Tensor:
    return (gradients * activations).sum(1).relu()


def finer(net: Net, activations: Tensor, *, before: bool, epsilon: float = 0) -> Tensor:
    """Grad-CAM of the logit less the nearest other logit, as the mean of one, weighted by its probability."""
    seen: list[Tensor] = []
    model = net.copy()
    net.module(model).register_forward_hook(lambda m, i, o: (seen.append(o), o.clone() if before else o)[1])
    scores = model(net.images)
    best, rival = scores.topk(2, 1)[0], scores.softmax(1).topk(2, 1)[0][:, 1]
    objective = (best[:, 0] - best[:, 1]) * rival / (rival + epsilon)
    (gradients,) = torch.autograd.grad(objective.sum(), seen)
    return mean_weights(activations, gradients if net.reshape is None else net.reshape(gradients))


def centered_component(activations: Tensor, theirs: Tensor) -> Tensor:
    """First component of the centered activations; of its two signs the one that the peer got."""
    parts: list[Tensor] = []
    for image, peer in zip(activations, theirs, strict=True):
        rows = image.flatten(1).T
        rows = rows - rows.mean(0)
        found = (rows @ torch.linalg.svd(rows, full_matrices=False)[2][0]).view_as(peer)
        parts.append(min((found.relu(), (-found).relu()), key=lambda each: distance(each, peer)))
    return torch.stack(parts)


def score_loop(net: Net, enlarged: Callable[[Tensor], Tensor]) -> Tensor:
    activations = net.early_activations
    with torch.no_grad():
        masks = enlarged(activations).movedim(1, 0)
        scores = torch.cat([net.model(net.images[:1] * mask) for mask in masks.split(16)])[:, net.picks[0]]
    return weighted(scores.softmax(0)[None], activations)


def aligned_masks(activations: Tensor) -> Tensor:
    masks = F.interpolate(activations, (SIDE, SIDE), mode="bilinear", align_corners=True)
    low, high = masks.amin((2, 3), keepdim=True), masks.amax((2, 3), keepdim=True)
    return (masks - low) / (high - low + 1e-8)


def early_scaled_masks(activations: Tensor) -> Tensor:
    shifted = activations - activations.amin((2, 3), keepdim=True)
    return F.interpolate(shifted / (shifted.amax((2, 3), keepdim=True) + 1e-8), (SIDE, SIDE), mode="bilinear")


def drowned_ablation(net: Net) -> Tensor:
    """A channel is set to the minimum less 1e7, and the minimum is taken again with the channels of before ablated."""
    activations, model, batch = net.early_activations, net.copy(), 32
    put: list[Tensor] = []
    back = (lambda a: a.movedim(1, -1)) if net.reshape_early else (lambda a: a)
    net.module(model, early=True).register_forward_hook(lambda m, i, o: back(put[0]))
    scores: list[Tensor] = []
    with torch.no_grad():
        for first in range(0, activations.shape[1], batch):
            rows = activations.repeat(min(batch, activations.shape[1] - first), 1, 1, 1)
            for row in range(len(rows)):
                rows[row, first + row] = rows.min() - 1e7
            put[:] = [rows]
            scores.append(model(net.images[:1].repeat(len(rows), 1, 1, 1))[:, net.picks[0]])
    whole = net.logits[0, net.picks[0]]
    return weighted(((whole - torch.cat(scores)) / whole)[None], activations)


def right_sum(net: Net) -> Tensor:
    total = torch.zeros_like(net.images)
    for step in range(1, STEPS + 1):
        total += plain_gradient(net, net.images * step / STEPS) / STEPS
    return (net.images * total).sum(1)


def plain_gradient(net: Net, images: Tensor | None = None) -> Tensor:
    leaf = (net.images if images is None else images).detach().requires_grad_()
    return torch.autograd.grad(net.model(leaf).gather(1, net.targets[:, None]).sum(), leaf)[0]


def guided_modules(net: Net, *, deconvolution: bool) -> Tensor:
    """The rule for modules of the class nn.ReLU alone, the ordinary gradient for everything else."""

    class Guided(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.relu()

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            on = ctx.saved_tensors[0] > 0
            return grads[0].relu() if deconvolution else (grads[0] * on).relu()

    leaf = net.images.clone().requires_grad_()
    model = net.copy(inplace=False)
    with mock.patch.object(nn.ReLU, "forward", lambda self, x: Guided.apply(x)):
        scores = model(leaf)
    return torch.autograd.grad(scores.gather(1, net.targets[:, None]).sum(), leaf)[0].sum(1)


def clipped_occlusion(net: Net, patch: int, stride: int) -> Tensor:
    """The last patches are cut off at the edge of the image instead of moved inwards."""
    starts = range(0, SIDE - patch + stride, stride)
    total, count = torch.zeros(2, SIDE, SIDE).double(), torch.zeros(SIDE, SIDE)
    for top in starts:
        for left in starts:
            place = (..., slice(top, top + patch), slice(left, left + patch))
            covered = net.images.clone()
            covered[place] = 0
            fall = (net.logits - net.model(covered).detach()).gather(1, net.targets[:, None])
            total[place] += fall[:, :, None]
            count[place] += 1
    return total / count


def cam_gap(net: Net, theirs: Tensor) -> float:
    """How far mean of the map + bias is from the logit, which is what defines CAM."""
    bias = next(m for m in reversed([*net.model.modules()]) if isinstance(m, nn.Linear)).bias
    assert bias is not None
    whole = net.logits.gather(1, net.targets[:, None])[:, 0]
    return distance(theirs.mean((1, 2)) + bias.detach()[net.targets], whole)


def without_biases(net: Net) -> Net:
    """The same network without anything that adds a constant: there, relevance must sum to the logit."""
    bare = deepcopy(net)
    for name, tensor in [*bare.model.named_parameters(), *bare.model.named_buffers()]:
        if name.endswith(("bias", "running_mean", "pos_embedding", "class_token")):
            tensor.data.zero_()
    bare.logits = bare.model(bare.images).detach()
    return bare


def conservation(net: Net, relevance: Tensor) -> float:
    whole = net.logits.gather(1, net.targets[:, None])[:, 0]
    return ((relevance.sum((1, 2)) - whole) / whole).abs().max().item()


# ------------------------------------------------------------------------------------------------------- the table


class Reason(NamedTuple):
    note: str
    proof: Proof
    shows: Callable[[float], bool] = lambda left: left <= EQUAL


@dataclass(frozen=True)
class Case:
    peer: str
    method: str
    ours: Callable[[Net], Tensor]
    theirs: Callable[[Net], Tensor]
    reasons: tuple[Reason, ...] = ()
    early: bool = False


NOTES = {
    "in-place": "The network changes the layer's output in place (`F.relu(..., inplace=True)` behind DenseNet's "
    "`features`) and the peer keeps no copy: torch-cam reads activation and gradient behind the ReLU, "
    "pytorch-grad-cam the activation behind it and the gradient before it. Ours are both of the layer that was asked "
    "for. Proof: the peer's formula (with what else is odd about it in this row) on that mixture equals the peer.",
    "epsilon": "pytorch-grad-cam adds 1e-6 to the denominator of the alphas of Grad-CAM++, which decides where "
    "squared gradients are not much larger. Proof: its formula with that epsilon, written out, equals the peer.",
    "undivided": "torch-cam's Grad-CAM++ never divides (it does, but in a copy that is thrown away): the weights "
    "are the sum of g^2 ReLU(g), not eq. 19. Proof: that sum equals the peer.",
    "sum epsilon": "The peer adds an epsilon to the denominator of XGrad-CAM, the sum of a channel; where the "
    "channel is (nearly) zero or its signs cancel, that decides. Proof: the formula with the epsilon equals the "
    "peer.",
    "share": "pytorch-grad-cam takes a mean over rival classes weighted by their probabilities p, divided by their sum "
    "plus 1e-9: where p is not far above that, the map shrinks with it. Proof: Grad-CAM of that score equals the peer.",
    "centered": "pytorch-grad-cam centers the activations before the decomposition (the paper does not) and takes "
    "whichever sign the singular vector happens to have. Proof: the centered component, with the peer's sign, equals "
    "it.",
    "aligned": "pytorch-grad-cam enlarges the masks of Score-CAM with aligned corners, and flat channels take "
    "their share of the softmax. Proof: a loop with that enlargement equals the peer.",
    "scaled first": "torch-cam scales the masks of Score-CAM to [0, 1] before it enlarges them, and flat channels "
    "take their share. Proof: a loop that does so equals the peer.",
    "drowned": "pytorch-grad-cam does not set an ablated channel to 0 where the smallest activation is not exactly "
    "0, but to that minimum less 1e7, and takes the minimum again for the next one. Proof: a loop that does so "
    "equals it.",
    "only nn.ReLU": "The peer changes modules of the class `nn.ReLU` and nothing else; a functional ReLU keeps its "
    "plain gradient. Proof: the rule on these modules alone equals the peer.",
    "no rectifier": "The network has no rectifier to guide (SiLU, GELU). We refuse; the peer returns the plain "
    "gradient under the name of the method. Proof: it equals the plain gradient.",
    "no CAM": "We refuse: what follows the layer is not average pooling and one linear layer. The peer takes the "
    "weights of the linear layer all the same; the mean of its map plus the bias misses the logit, which defines "
    "CAM.",
    "CAM by luck": "We refuse, as a ReLU follows the layer; torch-cam, which reads the tensor after the ReLU has "
    "changed it in place, gets the CAM of that: the mean of its map plus the bias is the logit.",
    "right sum": "zennit integrates with equal steps taken at their right ends, we with as many Gauss-Legendre "
    "nodes. Proof: the right sum, written out, equals the peer.",
    "nearest": "captum's `nearest` rounds positions down (PyTorch's oldest rule), ours takes the nearest center; they "
    "differ where the sides do not divide. Proof: our guided gradient times a map enlarged that way equals captum.",
    "clipped": "The last patches do not fit: captum cuts them off at the edge, we move them inwards, so that all "
    "patches are equally large. Proof: a loop with cut patches equals captum.",
    "stabiliser": "zennit also stabilises sums and poolings, with 1e-6, and what it leaves of a merged batch "
    "normalization still divides by the root of 1 + its epsilon, so that it explains slightly other logits. Proof: "
    "with 1e-14 there, and that epsilon 0 in a network of the same function, it equals ours.",
    "poolings": "captum also stabilises poolings, with 1e-9, where nothing can be 0/0. Proof: with 1e-30 there "
    "it equals ours.",
    "not conserved": "The peer has no rule for something in this network (sums that are no module, gates, "
    "normalization, attention) and lets the plain gradient carry the relevance across. Proof: in a copy of the network "
    "without biases, where relevance must sum to the logit, the peer's misses it by more than 1 % and by more than 10 "
    "times as much as ours (which misses it where the rule itself does: alpha-beta where an output has contributions "
    "of one sign only).",
    "tokens": "captum takes the tokens of a transformer for channels and averages the gradient over the features: "
    "each token has a weight of its own, where Grad-CAM weighs features. It has no `reshape_transform`. Proof: that "
    "formula equals the peer.",
}


def cam_reasons(library: str, formula: Callable[[Tensor, Tensor], Tensor], *own: Reason) -> tuple[Reason, ...]:
    mixture = mixed_evidence if library == "grad-cam" else (lambda net: net.overwritten)
    return (*own, Reason("in-place", emulated(lambda net: formula(*mixture(net)))))


def on_layer(note: str, formula: Callable[[Tensor, Tensor], Tensor]) -> Reason:
    return Reason(note, emulated(lambda net: formula(*net.evidence)))


def not_conserved(ours: Any, theirs: Callable[[Net, nn.Module], Tensor]) -> Reason:
    def proof(net: Net, _: Tensor | None, __: Tensor) -> float:
        bare = without_biases(net)
        mine = conservation(bare, bare.ours(ours))
        if not isfinite(mine):
            raise ValueError(f"our relevance misses the logit by {mine}, which proves nothing about the peer's")
        left = conservation(bare, theirs(bare, bare.copy(inplace=False))) / max(mine, 1e-3)
        return left if isfinite(left) else inf  # a peer's nan is no conservation either

    return Reason("not conserved", proof, lambda ratio: ratio > 10)


def relu_of(method: Any, **options: Any) -> Callable[[Net], Tensor]:
    return lambda net: net.ours(method, **options).relu()


def of(method: Any, **options: Any) -> Callable[[Net], Tensor]:
    return lambda net: net.ours(method, **options)


def guided_reasons(*, deconvolution: bool, first: bool = False) -> tuple[Reason, ...]:
    rows = slice(0, 1) if first else slice(None)
    return (
        Reason("no rectifier", emulated(lambda net: plain_gradient(net).sum(1)[rows])),
        Reason("only nn.ReLU", emulated(lambda net: guided_modules(net, deconvolution=deconvolution)[rows])),
    )


def cases() -> Iterator[Case]:
    ex = sl.explainers
    yield Case("captum", "grad_cam", of("grad_cam"), captum_grad_cam, (Reason("tokens", emulated(tokens_as_channels)),))
    yield Case("captum", "hires_cam", of("hires_cam"), lambda net: captum_layer(net, "LayerGradientXActivation"))
    yield Case("captum", "saliency", of("saliency"), captum_saliency)
    yield Case("captum", "input_x_gradient", of("input_x_gradient"), lambda net: captum_pixels(net, "InputXGradient"))
    legendre = {"n_steps": STEPS, "method": "gausslegendre", "internal_batch_size": 8}
    yield Case(
        "captum",
        "integrated_gradients",
        of(partial(ex.integrated_gradients, steps=STEPS)),
        lambda net: captum_pixels(net, "IntegratedGradients", **legendre),
    )
    smooth = partial(ex.smooth_grad, samples=SAMPLES)
    yield Case("captum", "smooth_grad, our noise", of(smooth), lambda net: captum_noise(net, "smoothgrad"))
    varied = partial(ex.var_grad, samples=SAMPLES)
    yield Case("captum", "var_grad, our noise", of(varied), lambda net: captum_noise(net, "vargrad"))
    guided, reverse = (guided_reasons(deconvolution=flag) for flag in (False, True))
    yield Case(
        "captum", "guided_backprop", of("guided_backprop"), lambda net: captum_pixels(net, "GuidedBackprop"), guided
    )
    yield Case("captum", "deconvolution", of("deconvolution"), lambda net: captum_pixels(net, "Deconvolution"), reverse)
    nearest = partial(ex.guided_grad_cam, interpolation="nearest")
    for mode, method in (("bilinear", ex.guided_grad_cam), ("nearest", nearest)):
        yield Case(
            "captum",
            f"guided_grad_cam, {mode}",
            of(method),
            partial(captum_guided_grad_cam, mode=mode),
            tuple(guided_grad_cam_reasons(mode)),
        )
    for patch, stride in ((32, 16), (40, 40)):
        yield Case(
            "captum",
            f"occlusion, patch {patch}, stride {stride}",
            of(partial(ex.occlusion, patch=patch, stride=stride)),
            partial(captum_occlusion, patch=patch, stride=stride),
            (Reason("clipped", emulated(partial(clipped_occlusion, patch=patch, stride=stride))),),
        )
    tiny = partial(ex.lrp, composite=Composite(convolution=Epsilon(1e-9), linear=Epsilon(1e-9)))
    assert EpsilonRule().STABILITY_FACTOR == 1e-9
    yield Case(
        "captum",
        "lrp (epsilon)",
        of(tiny),
        captum_lrp,
        (Reason("poolings", exact_poolings), not_conserved(tiny, captum_lrp)),
    )

    def maker(peer: str, ours: Any, run: Any) -> Callable[..., Case]:
        def case(name: str, method: str, formula: Any, *own: Reason) -> Case:
            return Case(peer, name, ours(name), lambda net: run(net, method), cam_reasons(peer, formula, *own))

        return case

    library = maker("grad-cam", relu_of, grad_cam_library)
    yield library("grad_cam", "GradCAM", mean_weights)
    yield library("grad_cam_plus_plus", "GradCAMPlusPlus", epsilon_plus_plus, on_layer("epsilon", epsilon_plus_plus))
    epsilon = partial(epsilon_x, 1e-7)
    yield library("xgrad_cam", "XGradCAM", epsilon, on_layer("sum epsilon", epsilon))
    yield library("layer_cam", "LayerCAM", positive_products)
    yield library("hires_cam", "HiResCAM", products)
    yield Case(
        "grad-cam",
        "eigen_cam",
        relu_of("eigen_cam"),
        lambda net: grad_cam_library(net, "EigenCAM"),
        (
            Reason("centered", lambda net, _, theirs: distance(centered_component(net.evidence[0], theirs), theirs)),
            Reason("in-place", lambda net, _, theirs: distance(centered_component(net.overwritten[0], theirs), theirs)),
        ),
    )
    yield Case(
        "grad-cam",
        "finer_cam",
        of("finer_cam"),
        lambda net: grad_cam_library(net, "FinerCAM"),
        (
            Reason("share", emulated(lambda net: finer(net, net.evidence[0], before=True, epsilon=1e-9))),
            Reason("in-place", emulated(lambda net: finer(net, net.overwritten[0], before=True, epsilon=1e-9))),
        ),
    )
    yield Case(
        "grad-cam",
        "score_cam",
        of("score_cam", early=True),
        lambda net: grad_cam_library(net, "ScoreCAM", early=True),
        (Reason("aligned", emulated(lambda net: score_loop(net, aligned_masks))),),
        early=True,
    )
    yield Case(
        "grad-cam",
        "ablation_cam",
        of("ablation_cam", early=True),
        ablation_of_grad_cam_library,
        (Reason("drowned", emulated(drowned_ablation)),),
        early=True,
    )
    yield Case(
        "grad-cam",
        "guided_backprop, first image",
        lambda net: net.ours("guided_backprop")[:1],
        guided_of_grad_cam_library,
        guided_reasons(deconvolution=False, first=True),
    )

    yield Case(
        "torchcam",
        "cam",
        of("cam"),
        lambda net: torchcam_library(net, "CAM"),
        (
            Reason("CAM by luck", lambda net, _, theirs: cam_gap(net, theirs)),
            Reason("no CAM", lambda net, _, theirs: cam_gap(net, theirs), lambda gap: gap > 0.01),
        ),
    )

    torch_cam = maker("torchcam", of, torchcam_library)
    yield torch_cam("grad_cam", "GradCAM", mean_weights)
    yield torch_cam("grad_cam_plus_plus", "GradCAMpp", undivided_plus_plus, on_layer("undivided", undivided_plus_plus))
    epsilon = partial(epsilon_x, 1e-8)
    yield torch_cam("xgrad_cam", "XGradCAM", epsilon, on_layer("sum epsilon", epsilon))
    yield torch_cam("layer_cam", "LayerCAM", positive_products)
    yield Case(
        "torchcam",
        "finer_cam",
        of("finer_cam"),
        lambda net: torchcam_library(net, "FinerCAM", gamma=1.0, num_references=1),
        (Reason("in-place", emulated(lambda net: finer(net, net.overwritten[0], before=False))),),
    )
    yield Case(
        "torchcam",
        "score_cam",
        of("score_cam", early=True),
        lambda net: torchcam_library(net, "ScoreCAM", early=True),
        (Reason("scaled first", emulated(lambda net: score_loop(net, early_scaled_masks))),),
        early=True,
    )

    yield Case("zennit", "saliency", of("saliency"), lambda net: zennit_gradient(net).abs().amax(1))
    yield Case(
        "zennit",
        "integrated_gradients",
        of(partial(ex.integrated_gradients, steps=STEPS)),
        zennit_integrated,
        (Reason("right sum", emulated(right_sum)),),
    )
    for name, composite, reasons in (
        ("guided_backprop", composites.GuidedBackprop, guided),
        ("deconvolution", composites.DeconvNet, reverse),
    ):
        yield Case("zennit", name, of(name), partial(zennit_colours, composite), reasons)
    yield Case(
        "zennit",
        "occlusion, patch 32, stride 32",
        of(partial(ex.occlusion, patch=32, stride=32)),
        partial(zennit_occlusion, patch=32),
    )
    for name in ("lrp", "lrp_epsilon_plus_flat", "lrp_epsilon_gamma_box", "lrp_epsilon_alpha2_beta1"):
        method = partial(ex.lrp_epsilon_gamma_box, low=-4.0, high=4.0) if "box" in name else getattr(ex, name)
        yield Case(
            "zennit",
            name if name != "lrp" else "lrp (epsilon)",
            of(method),
            partial(zennit_lrp, method=name),
            (
                Reason("stabiliser", partial(exact_zennit, method=name)),
                not_conserved(method, lambda bare, model, name=name: zennit_lrp(bare, name, model)),
            ),
        )


def captum_saliency(net: Net) -> Tensor:
    return captum.Saliency(net.copy()).attribute(net.images, target=net.targets).detach().amax(1)


def guided_grad_cam_reasons(mode: str) -> Iterator[Reason]:
    def guided(net: Net, gradient: Tensor) -> Tensor:
        cams = mean_weights(*net.evidence)[:, None]
        return F.interpolate(cams, (SIDE, SIDE), mode=mode)[:, 0] * gradient

    if mode == "nearest":
        yield Reason("nearest", emulated(lambda net: guided(net, net.ours("guided_backprop"))))
    yield Reason("no rectifier", emulated(lambda net: guided(net, plain_gradient(net).sum(1))))
    yield Reason("only nn.ReLU", emulated(lambda net: guided(net, guided_modules(net, deconvolution=False))))


def zennit_colours(composite: Any, net: Net) -> Tensor:
    return zennit_gradient(net, composite()).sum(1)


def exact_poolings(net: Net, ours: Tensor | None, theirs: Tensor) -> float:
    model = net.copy(inplace=False)
    for module in model.modules():
        if isinstance(module, nn.MaxPool2d | nn.AdaptiveAvgPool2d):
            vars(module)["rule"] = EpsilonRule(1e-30)
    return float("inf") if ours is None else distance(captum_lrp(net, model), ours)


def exact_zennit(net: Net, ours: Tensor | None, theirs: Tensor, method: str) -> float:
    model = exact_norms(net.copy(inplace=False))
    return float("inf") if ours is None else distance(zennit_lrp(net, method, model, 1e-14), ours)


@contextmanager
def silence() -> Generator[None]:
    with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        warnings.simplefilter("ignore")
        yield


def line_of(error: Exception) -> str:
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text[:160]}"


def measure(net: Net, case: Case) -> dict[str, Any]:
    """One cell: the relative difference, its reason with what the proof leaves, or the peer's error, or our refusal."""
    if case.early and not net.early:
        return {"left_out": True}
    ours, refusal = None, ""
    try:
        ours = case.ours(net)
        assert ours.isfinite().all(), f"our {case.method} is not finite: no reason of a peer's explains that"
    except ValueError as error:
        refusal = line_of(error)
    try:
        with silence():
            theirs = case.theirs(net)
    except Exception as error:
        return {"error": line_of(error)} | ({"refusal": refusal} if refusal else {})
    cell: dict[str, Any] = {"refusal": refusal} if ours is None else {"difference": distance(theirs, ours)}
    if ours is not None and ours.shape != theirs.shape:
        return {"error": f"a map of shape {tuple(theirs.shape)} for {tuple(ours.shape)}"}
    if ours is not None and cell["difference"] <= EQUAL:
        return cell
    for reason in case.reasons:
        try:
            with silence():
                left = reason.proof(net, ours, theirs)
        except Exception as error:
            cell.setdefault("proofs_failed", []).append(f"{reason.note}: {line_of(error)}")
            continue
        if reason.shows(left):
            return cell | {"reason": reason.note, "proof": left}
        cell.setdefault("rejected", {})[reason.note] = left
    return cell


def main() -> None:
    torch.set_num_threads(2)
    chosen = sys.argv[1:] or [*EARLY]
    stored: dict[str, Any] = json.loads(RESULTS.read_text())["nets"] if RESULTS.exists() and sys.argv[1:] else {}
    for name in chosen:
        start, net = time.perf_counter(), Net(name)
        cells: dict[str, dict[str, Any]] = {}
        for case in cases():
            begun = time.perf_counter()
            cell = cells.setdefault(case.peer, {})[case.method] = measure(net, case)
            if "reason" not in cell and not cell.get("difference", 1) <= EQUAL:
                print(f"  {name} {case.peer} {case.method}: {cell}  {time.perf_counter() - begun:.1f} s", flush=True)
        stored[name] = {"layer": net.layer, "early_layer": net.early, "cells": cells}
        save({name: stored[name] for name in EARLY if name in stored})
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)


def save(nets: dict[str, Any]) -> None:
    found = {
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {name: version(name) for name in ("torch", "torchvision", *PEERS, "numpy")},
        "nets": nets,
    }
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    PAGE.write_text(page(found))


def page(found: dict[str, Any]) -> str:
    nets: dict[str, Any] = found["nets"]
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    letters: dict[str, str] = {}

    def mark(text: str) -> str:
        return letters.setdefault(text, f"{len(letters) + 1}")

    def written(cell: dict[str, Any]) -> str:
        if "left_out" in cell:
            return "n/a"
        if "error" in cell:
            both = "both refuse" if "refusal" in cell else "fails"
            return f"{both} [{mark(cell['error'])}]"
        value = "we refuse"
        if "difference" in cell:
            value = f"{cell['difference']:.0e}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")
            value = "0" if value == "0e0" else value
        if cell.get("difference", 1) <= EQUAL:
            return value
        return f"**{value}** " + (f"[{mark(NOTES[cell['reason']])}]" if "reason" in cell else "**unexplained**")

    counts = {"equal": 0, "explained": 0, "fails": 0, "unexplained": 0}
    tables: list[str] = []
    for peer in PEERS:
        methods = list(next(iter(nets.values()))["cells"][peer])
        rows = [f"| {peer} {found['versions'][peer]} | " + " | ".join(nets) + " |", "|---" * (len(nets) + 1) + "|"]
        for method in methods:
            cells = [net["cells"][peer][method] for net in nets.values()]
            rows.append(f"| {method} | " + " | ".join(map(written, cells)) + " |")
            for cell in cells:
                if "left_out" not in cell:
                    equal = cell.get("difference", 1) <= EQUAL
                    kind = "fails" if "error" in cell else "equal" if equal else "explained" if "reason" in cell else ""
                    counts[kind or "unexplained"] += 1
        tables.append(f"## {peer}\n\n" + "\n".join(rows))
    layers = "; ".join(
        f"{name} `{net['layer']}`" + (f", `{net['early_layer']}`" if net["early_layer"] else "")
        for name, net in nets.items()
    )
    notes = "\n".join(f"{number}. {text.replace('|', '/')}" for text, number in letters.items())
    return f"""# The same maps from other libraries

Written by `python benchmarks/peers.py` on {found["date"]}, not by hand; {versions}.
Every number and what each proof leaves is in `benchmarks/results/peers.json`.

A cell is the largest absolute difference between the peer's map and ours, divided by the largest absolute value of
ours. Up to 1e-5 the two are *equal*. What differs is in bold, with a note that says why. A note stands there only if
the script has *proven* it on that very network, mostly by writing the peer's formula out and finding the peer's map
with it to 1e-5; without a proof the cell says "unexplained". "fails" = the peer raises an error, "we refuse" =
sightline does, "both refuse" = both do, "n/a" = left out.

Cells: {counts["equal"]} equal, {counts["explained"]} explained, {counts["fails"]} where the peer fails or both refuse,
{counts["unexplained"]} unexplained.

Networks: torchvision, random weights (seed 0), biases and scales jittered, statistics of batch normalization from one
batch; {CLASSES} classes, two images of {SIDE} x {SIDE} pixels, float64 (pytorch-grad-cam computes Eigen-, Score- and
Ablation-CAM partly in float32), the predicted classes. Everybody reads the layer that sightline picks by itself (of
DenseNet the one before it, since the ReLU between them is a function, which no peer can name); for
Score-CAM and Ablation-CAM, which run a network once per channel, it is an early one with few channels, and the first
image only: {layers}.

Common footing: raw maps at the layer's size. The resizing and scaling to [0, 1] of pytorch-grad-cam and the scaling of
torch-cam are switched off; pytorch-grad-cam cuts all maps off at 0, so ours are cut off there too. Pixel maps are sums
over colors (saliency and SmoothGrad: the largest absolute value). captum and zennit get copies of the network without
operations in place, as they demand; every peer gets a fresh copy for every call. Integrated gradients: {STEPS} steps.
The LRP maps of zennit are made with its own canonizers.

{chr(10).join(chr(10) + table for table in tables).strip()}

## Notes

{notes}
"""


if __name__ == "__main__":
    main()
