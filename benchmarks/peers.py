"""The same maps from sightline, captum, pytorch-grad-cam, torch-cam and zennit, on eight networks of torchvision.

    python benchmarks/peers.py                  all networks, writes docs/peers/maps*.md and results/peers.json
    python benchmarks/peers.py resnet18 vgg16   measures only these again

A difference is explained only with a proof: the peer's formula, written out here in a few lines, gives the peer's map,
or the peer's map breaks the axiom that defines the method.
"""

import json
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from functools import cached_property, partial
from itertools import product
from math import inf, isfinite
from pathlib import Path
from textwrap import fill
from typing import Any
from unittest import mock

import captum.attr as captum
import pytorch_grad_cam as pgc
import pytorch_grad_cam.base_cam as pgc_base
import torch
import torchcam.methods as tc
from captum.attr._utils.lrp_rules import EpsilonRule
from compare import Case, Proof, compare, distance, files, is_ours, is_theirs, save, table, written
from pytorch_grad_cam.ablation_layer import AblationLayerVit
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

zennit: Any = attribution  # its annotations are narrower than what it accepts
RESULTS, REASONS = files("peers")
SIDE, CLASSES, STEPS, SAMPLES, EQUAL = 64, 20, 8, 4, 1e-5
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
"""Early layers, with few channels, for Score-CAM and Ablation-CAM, which run a network once per channel."""


def channels_first(tokens: Tensor) -> Tensor:
    return tokens.movedim(-1, 1)


def patches_first(tokens: Tensor) -> Tensor:
    side = int((tokens.shape[1] - 1) ** 0.5)
    return tokens[:, 1:].unflatten(1, (side, side)).movedim(-1, 1)


def of_target(scores: Tensor, targets: Tensor) -> Tensor:
    return scores.gather(1, targets[:, None])[:, 0]


class Net:
    """One network in float64, two images, the predicted classes, and the layer that sightline picks by default."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        self.name, self.early = name, EARLY[name]
        options = {"image_size": SIDE} if name == "vit_b_16" else {}
        self.model: nn.Module = getattr(models, name)(num_classes=CLASSES, **options).double()
        for parameter in self.model.parameters():  # biases and scales that have an effect, heads that are not zero
            parameter.data += 0.1 * torch.randn_like(parameter) if parameter.ndim != 4 else 0
        for module in self.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        with torch.no_grad():
            self.model.train()(torch.randn(8, 3, SIDE, SIDE, dtype=torch.double))
        self.model.eval()
        self.images = torch.randn(2, 3, SIDE, SIDE, dtype=torch.double)
        # DenseNet's default layer follows a ReLU that is a function: it has no name
        self.layer = "features" if name == "densenet121" else sl.explain(self.model, self.images).layer.name
        self.reshape = patches_first if name == "vit_b_16" else None
        self.reshape_early = channels_first if name == "swin_t" else None
        self.logits = self.model(self.images).detach()
        self.targets = self.logits.argmax(1)

    def ours(self, method: Any, early: bool = False) -> Tensor:
        images, layer, _ = self.view(early)
        explainer = getattr(sl.explainers, method) if isinstance(method, str) else method
        maps = next(iter(sl.explain(self.model, images, self.targets[: len(images)], [explainer], layer).maps.values()))
        assert maps.isfinite().all(), f"our {method} is not finite: no reason about a peer explains that"
        return maps[:, 0]

    def view(self, early: bool) -> tuple[Tensor, str, Any]:
        """Images, layer and how its output becomes (b, c, h, w)."""
        return (self.images[:1], self.early, self.reshape_early) if early else (self.images, self.layer, self.reshape)

    def one_hot(self) -> Tensor:
        return F.one_hot(self.targets, CLASSES).double()

    def copy(self, *, inplace: bool = True) -> nn.Module:
        model = deepcopy(self.model)
        for module in model.modules():
            if "inplace" in vars(module) and not inplace:
                vars(module)["inplace"] = False
        return model

    def captured(self, *, clone: bool, early: bool = False, score: Any = of_target) -> tuple[Tensor, Tensor]:
        """Activation and gradient at the layer; a clone is safe from operations in place behind the layer."""
        seen: list[Tensor] = []
        model, (_, layer, reshape) = self.copy(), self.view(early)
        model.get_submodule(layer).register_forward_hook(lambda m, i, o: (seen.append(o), o.clone() if clone else o)[1])
        (gradient,) = torch.autograd.grad(score(model(self.images), self.targets).sum(), seen)
        values = seen[0].detach(), gradient
        return values if reshape is None else (reshape(values[0]), reshape(values[1]))

    @cached_property
    def evidence(self) -> tuple[Tensor, Tensor]:
        return self.captured(clone=True)

    @cached_property
    def overwritten(self) -> tuple[Tensor, Tensor]:
        """What the layer's tensor holds after the forward, and the gradient there."""
        return self.captured(clone=False)

    @cached_property
    def early_activations(self) -> Tensor:
        return self.captured(clone=True, early=True)[0][:1]


# ---------------------------------------------------------------------------------------------------- peers' maps


def grad_cam(net: Net, method: str, *, early: bool = False, **options: Any) -> Tensor:
    """A map of pytorch-grad-cam after its ReLU, before it is resized and scaled to [0, 1]."""
    model, (images, layer, reshape) = net.copy(), net.view(early)
    targets: Any = [*map(ClassifierOutputTarget, net.targets[: len(images)].tolist())]
    arguments: dict[str, Any] = {"targets": targets}
    if method == "AblationCAM" and reshape:
        options["ablation_layer"] = AblationLayerVit()
    if method == "FinerCAM":
        arguments = {"targets": None, "comparison_categories": [1]}
    with mock.patch.object(pgc_base, "scale_cam_image", lambda cam, size=None: cam):
        with getattr(pgc, method)(model, [model.get_submodule(layer)], reshape_transform=reshape, **options) as cam:
            return torch.as_tensor(cam(images.clone(), **arguments)).double()
    raise RuntimeError("an IndexError, which the context manager of pytorch-grad-cam prints and hides")


def guided_by_grad_cam(net: Net) -> Tensor:
    maps = GuidedBackpropReLUModel(net.copy())(net.images[:1].clone(), int(net.targets[0]))
    return torch.as_tensor(maps).sum(2)[None]


def torch_cam(net: Net, method: str, *, early: bool = False, **options: Any) -> Tensor:
    """A map of torch-cam with normalized=False."""
    model, (images, layer, reshape) = net.copy(), net.view(early)
    with getattr(tc, method)(model, layer, reshape_transform=reshape, **options) as extractor:
        scores = model(images.clone())
        return extractor(net.targets[: len(images)].tolist(), scores, normalized=False)[0].detach()


def captum_pixels(net: Net, name: str, over_colors: Any = Tensor.sum, **options: Any) -> Tensor:
    maps = getattr(captum, name)(net.copy(inplace=False)).attribute(net.images, target=net.targets, **options)
    return over_colors(maps.detach(), 1)


def captum_layer(net: Net, method: str, **options: Any) -> Tensor:
    model = net.copy()
    explainer = getattr(captum, method)(model, model.get_submodule(net.layer))
    maps = explainer.attribute(net.images, target=net.targets, **options)
    return (net.reshape(maps) if net.reshape else maps).detach().sum(1)


def captum_grad_cam(net: Net) -> Tensor:
    options = {"attr_dim_summation": False} if net.reshape else {"relu_attributions": True}
    return captum_layer(net, "LayerGradCam", **options)


def captum_noise(net: Net, kind: str) -> Tensor:
    """NoiseTunnel, with the noise that sightline draws."""
    seeds = torch.randint(2**62, (SAMPLES,), generator=torch.Generator().manual_seed(0)).tolist()
    noise = [torch.randn(3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed)).double() for seed in seeds]
    pixels = net.images.flatten(1)
    drawn = torch.cat([scale * torch.stack(noise) for scale in 0.15 * (pixels.amax(1) - pixels.amin(1))])
    tunnel: Any = captum.NoiseTunnel(captum.Saliency(net.copy()))
    with mock.patch("torch.normal", lambda mean, std: drawn.view_as(std)):
        maps = tunnel.attribute(net.images, nt_type=kind, nt_samples=SAMPLES, target=net.targets, abs=False).detach()
    return maps.abs().amax(1) if kind == "smoothgrad" else maps.sum(1)


def captum_guided_grad_cam(net: Net, mode: str) -> Tensor:
    model = net.copy(inplace=False)
    method = captum.GuidedGradCam(model, model.get_submodule(net.layer))
    maps = method.attribute(net.images, target=net.targets, interpolate_mode=mode)
    if not maps.numel():
        raise RuntimeError("an empty map: a layer of tokens cannot be interpolated")
    return maps.detach().sum(1)


def captum_occlusion(net: Net, patch: int, stride: int) -> Tensor:
    shapes = {"sliding_window_shapes": (3, patch, patch), "strides": (3, stride, stride)}
    return captum_pixels(net, "Occlusion", **shapes) / 3


def captum_lrp(net: Net, model: nn.Module | None = None) -> Tensor:
    method: Any = captum.LRP(model or net.copy(inplace=False))
    return method.attribute(net.images, target=net.targets).detach().sum(1)


def zennit_maps(net: Net, method: str, model: nn.Module, output: Any = None, **options: Any) -> Tensor:
    with getattr(zennit, method)(model, **options) as attributor:
        return attributor(net.images.clone(), output or net.one_hot())[1].detach()


def zennit_gradient(net: Net, composite: Any = None, over_colors: Any = Tensor.sum) -> Tensor:
    return over_colors(zennit_maps(net, "Gradient", net.copy(inplace=False), composite=composite and composite()), 1)


def zennit_occlusion(net: Net, patch: int) -> Tensor:
    """It adds up the scores of what remains; inverted, and subtracted from the score, it is the drop of the logit."""
    fill = partial(zennit.occlude_independent, fill_fn=torch.zeros_like, invert=True)
    sizes = {"window": (3, patch, patch), "stride": (3, patch, patch), "occlusion_fn": fill}
    maps = zennit_maps(net, "Occlusion", net.copy(), lambda out: out * net.one_hot(), **sizes)
    return of_target(net.logits, net.targets)[:, None, None] - maps[:, 0]


def zennit_lrp(net: Net, model: nn.Module | None = None, *, method: str, stabilizer: float = 1e-6) -> Tensor:
    exact = [(Sum, rules.Norm(stabilizer)), (AvgPool, rules.Norm(stabilizer))]
    canonizer = ResNetCanonizer() if net.name == "resnet18" else canonizers.SequentialMergeBatchNorm()
    options: dict[str, Any] = {"canonizers": [canonizer]}
    if method == "lrp":
        layers = [*exact, *composites.layer_map_base(), (Linear, rules.Epsilon())]
        composite = composites.LayerMapComposite(layers, **options)
    elif method == "lrp_epsilon_gamma_box":
        low = torch.full_like(net.images[:1], -4)
        composite = composites.EpsilonGammaBox(low, -low, layer_map=exact, **options)
    else:
        kinds = {"plus_flat": composites.EpsilonPlusFlat, "alpha2_beta1": composites.EpsilonAlpha2Beta1}
        composite = kinds[method.removeprefix("lrp_epsilon_")](layer_map=exact, **options)
    model, output = model or net.copy(inplace=False), lambda out: out * net.one_hot()
    return zennit_maps(net, "Gradient", model, output, composite=composite).sum(1)


# --------------------------------------------------------------------------------- proofs: the peer's formula, here


def relative(maps: Tensor, reference: Tensor) -> float:
    """Largest absolute difference, divided by the reference's largest absolute value."""
    return distance(maps, reference) / (reference.abs().max().item() or 1)


equals = partial(is_theirs, measure=relative)


def weighted(weights: Tensor, activations: Tensor) -> Tensor:
    return torch.einsum("bk,bkhw->bhw", weights, activations).relu()


def mean_weights(activations: Tensor, gradients: Tensor) -> Tensor:
    return weighted(gradients.mean((2, 3)), activations)


def tokens_as_channels(net: Net) -> Tensor:
    activations, gradients = net.evidence
    return gradients.mean(1) * activations.sum(1)


def epsilon_plus_plus(activations: Tensor, gradients: Tensor) -> Tensor:
    total = activations.sum((2, 3), keepdim=True)
    alphas = gradients**2 / (2 * gradients**2 + total * gradients**3 + 1e-6)
    return weighted((alphas * gradients.relu()).sum((2, 3)), activations)


def undivided_plus_plus(activations: Tensor, gradients: Tensor) -> Tensor:
    return weighted((gradients**2 * gradients.relu()).sum((2, 3)), activations)


def epsilon_x(epsilon: float, activations: Tensor, gradients: Tensor) -> Tensor:
    return weighted((gradients * activations).sum((2, 3)) / (activations.sum((2, 3)) + epsilon), activations)


def finer(net: Net, activations: Tensor, *, clone: bool, epsilon: float = 0) -> Tensor:
    """Grad-CAM of the logit minus the closest other logit, as a mean over one class, weighted by its probability."""

    def lead(scores: Tensor, _: Tensor) -> Tensor:
        best, runner_up = scores.topk(2, 1)[0], scores.softmax(1).topk(2, 1)[0][:, 1]
        return (best[:, 0] - best[:, 1]) * runner_up / (runner_up + epsilon)

    return mean_weights(activations, net.captured(clone=clone, score=lead)[1])


def centered_component(activations: Tensor, theirs: Tensor) -> Tensor:
    """First component of the centered activations, with the peer's sign."""
    components: list[Tensor] = []
    for image, peer in zip(activations, theirs, strict=True):
        rows = image.flatten(1).T
        rows = rows - rows.mean(0)
        component = (rows @ torch.linalg.svd(rows, full_matrices=False)[2][0]).view_as(peer)
        components.append(min(component.relu(), (-component).relu(), key=lambda each: relative(each, peer)))
    return torch.stack(components)


def score_loop(enlarge: Callable[[Tensor], Tensor], net: Net) -> Tensor:
    activations = net.early_activations
    with torch.no_grad():
        masks = enlarge(activations).movedim(1, 0)
        scores = torch.cat([net.model(net.images[:1] * mask) for mask in masks.split(16)])[:, net.targets[0]]
    return weighted(scores.softmax(0)[None], activations)


def aligned_masks(activations: Tensor) -> Tensor:
    masks = F.interpolate(activations, (SIDE, SIDE), mode="bilinear", align_corners=True)
    low, high = masks.amin((2, 3), keepdim=True), masks.amax((2, 3), keepdim=True)
    return (masks - low) / (high - low + 1e-8)


def early_scaled_masks(activations: Tensor) -> Tensor:
    shifted = activations - activations.amin((2, 3), keepdim=True)
    return F.interpolate(shifted / (shifted.amax((2, 3), keepdim=True) + 1e-8), (SIDE, SIDE), mode="bilinear")


def drowned_ablation(net: Net) -> Tensor:
    """Sets a channel to the minimum less 1e7; earlier channels, already ablated, count for the next minimum."""
    activations, model, batch = net.early_activations, net.copy(), 32
    outputs, scores = list[Tensor](), list[Tensor]()
    layer = model.get_submodule(net.early)
    layer.register_forward_hook(lambda m, i, o: outputs[-1].movedim(1, -1) if net.reshape_early else outputs[-1])
    with torch.no_grad():
        for first in range(0, activations.shape[1], batch):
            rows = activations.repeat(min(batch, activations.shape[1] - first), 1, 1, 1)
            for row in range(len(rows)):
                rows[row, first + row] = rows.min() - 1e7
            outputs.append(rows)
            scores.append(model(net.images[:1].repeat(len(rows), 1, 1, 1))[:, net.targets[0]])
    whole = net.logits[0, net.targets[0]]
    return weighted(((whole - torch.cat(scores)) / whole)[None], activations)


def plain_gradient(net: Net, images: Tensor | None = None) -> Tensor:
    leaf = (net.images if images is None else images).detach().requires_grad_()
    return torch.autograd.grad(of_target(net.model(leaf), net.targets).sum(), leaf)[0]


def right_sum(net: Net) -> Tensor:
    gradients = [plain_gradient(net, net.images * step / STEPS) / STEPS for step in range(1, STEPS + 1)]
    return (net.images * sum(gradients)).sum(1)


def guided_modules(net: Net, *, deconvolution: bool = False) -> Tensor:
    """The rule for modules of the class nn.ReLU alone, the plain gradient for everything else."""

    class Guided(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.relu()

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return grads[0].relu() if deconvolution else (grads[0] * (ctx.saved_tensors[0] > 0)).relu()

    leaf, model = net.images.clone().requires_grad_(), net.copy(inplace=False)
    with mock.patch.object(nn.ReLU, "forward", lambda self, x: Guided.apply(x)):
        scores = model(leaf)
    return torch.autograd.grad(of_target(scores, net.targets).sum(), leaf)[0].sum(1)


def clipped_occlusion(net: Net, patch: int, stride: int) -> Tensor:
    """The last patches are cut off at the edge of the image instead of moved inwards."""
    total, count = torch.zeros(2, SIDE, SIDE).double(), torch.zeros(SIDE, SIDE)
    for top, left in product(range(0, SIDE - patch + stride, stride), repeat=2):
        place = (..., slice(top, top + patch), slice(left, left + patch))
        perturbed = net.images.clone()
        perturbed[place] = 0
        total[place] += of_target(net.logits - net.model(perturbed).detach(), net.targets)[:, None, None]
        count[place] += 1
    return total / count


def cam_gap(theirs: Tensor, ours: Tensor | None, net: Net) -> float:
    """How far the mean of the map plus the bias is from the logit; the two are equal by CAM's definition."""
    bias = next(m for m in reversed([*net.model.modules()]) if isinstance(m, nn.Linear)).bias
    assert bias is not None
    return relative(theirs.mean((1, 2)) + bias.detach()[net.targets], of_target(net.logits, net.targets))


def conservation_gap(net: Net, relevance: Tensor) -> float:
    whole = of_target(net.logits, net.targets)
    return ((relevance.sum((1, 2)) - whole) / whole).abs().max().item()


def misses_the_logit(ours: Any, theirs: Callable[[Net, nn.Module], Tensor]) -> Proof:
    """The peer's gap divided by ours, in a network without constants, where relevance must sum to the logit."""

    def proof(_: Tensor, __: Tensor | None, net: Net) -> float:
        bare = deepcopy(net)
        for name, tensor in [*bare.model.named_parameters(), *bare.model.named_buffers()]:
            if name.endswith(("bias", "running_mean", "pos_embedding", "class_token")):
                tensor.data.zero_()
        bare.logits = bare.model(bare.images).detach()
        our_gap = conservation_gap(bare, bare.ours(ours))
        if not isfinite(our_gap):
            raise ValueError(f"our relevance misses the logit by {our_gap}, which proves nothing about the peer's")
        gap = conservation_gap(bare, theirs(bare, bare.copy(inplace=False))) / max(our_gap, 1e-3)
        return gap if isfinite(gap) else inf  # a peer's NaN is no conservation either

    return proof


def exact_poolings(net: Net) -> Tensor:
    model = net.copy(inplace=False)
    for module in model.modules():
        if isinstance(module, nn.MaxPool2d | nn.AdaptiveAvgPool2d):
            vars(module)["rule"] = EpsilonRule(1e-30)
    return captum_lrp(net, model)


def exact_zennit(net: Net, method: str) -> Tensor:
    """With an epsilon of 0 in every batch normalization, in a network of the same function."""
    model = net.copy(inplace=False)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d) and norm.running_var is not None:
            norm.running_var += norm.eps
            norm.eps = 0.0
    return zennit_lrp(net, model, method=method, stabilizer=1e-14)


# ------------------------------------------------------------------------------------------------------- the table


def case(name: str, theirs: Callable[[Net], Tensor], ours: Any = None, after: Any = lambda maps: maps) -> Case:
    early = name in ("score_cam", "ablation_cam")
    return Case(name, theirs, lambda net: after(net.ours(ours or name, early)))


def guided(row: Case, deconvolution: bool = False, rows: slice = slice(None)) -> Case:
    return row.differs("no rectifier", equals(lambda net: plain_gradient(net).sum(1)[rows])).differs(
        "only nn.ReLU", equals(lambda net: guided_modules(net, deconvolution=deconvolution)[rows])
    )


def captum_cases() -> list[Case]:
    ex = sl.explainers
    tiny = partial(ex.lrp, composite=ex.Composite(convolution=ex.Epsilon(1e-9), linear=ex.Epsilon(1e-9)))
    assert EpsilonRule().STABILITY_FACTOR == 1e-9
    legendre = {"n_steps": STEPS, "method": "gausslegendre", "internal_batch_size": 8}

    def enlarged(net: Net, mode: str) -> Tensor:
        return F.interpolate(mean_weights(*net.evidence)[:, None], (SIDE, SIDE), mode=mode)[:, 0]

    def guided_grad_cam(mode: str) -> Case:
        ours = partial(ex.guided_grad_cam, interpolation=mode)
        row = case(f"guided_grad_cam, {mode}", partial(captum_guided_grad_cam, mode=mode), ours)
        if mode == "nearest":
            row.differs("nearest", equals(lambda net: enlarged(net, mode) * net.ours("guided_backprop")))
        row.differs("no rectifier", equals(lambda net: enlarged(net, mode) * plain_gradient(net).sum(1)))
        return row.differs("only nn.ReLU", equals(lambda net: enlarged(net, mode) * guided_modules(net)))

    def occlusion(patch: int, stride: int) -> Case:
        sizes = {"patch": patch, "stride": stride}
        title, ours = f"occlusion, patch {patch}, stride {stride}", partial(ex.occlusion, **sizes)
        row = case(title, partial(captum_occlusion, **sizes), ours)
        return row.differs("clipped", equals(partial(clipped_occlusion, **sizes)))

    def noisy(name: str) -> Case:
        theirs = partial(captum_noise, kind=name.replace("_", ""))
        return case(f"{name}, our noise", theirs, partial(getattr(ex, name), samples=SAMPLES))

    return [
        case("grad_cam", captum_grad_cam).differs("tokens", equals(tokens_as_channels)),
        case("hires_cam", partial(captum_layer, method="LayerGradientXActivation")),
        case("saliency", partial(captum_pixels, name="Saliency", over_colors=Tensor.amax)),
        case("input_x_gradient", partial(captum_pixels, name="InputXGradient")),
        case(
            "integrated_gradients",
            lambda net: captum_pixels(net, "IntegratedGradients", **legendre),
            partial(ex.integrated_gradients, steps=STEPS),
        ),
        noisy("smooth_grad"),
        noisy("var_grad"),
        guided(case("guided_backprop", partial(captum_pixels, name="GuidedBackprop"))),
        guided(case("deconvolution", partial(captum_pixels, name="Deconvolution")), deconvolution=True),
        *map(guided_grad_cam, ("bilinear", "nearest")),
        occlusion(32, 16),
        occlusion(40, 40),
        case("lrp (epsilon)", captum_lrp, tiny)
        .differs("poolings", is_ours(exact_poolings, relative))
        .differs("not conserved", misses_the_logit(tiny, captum_lrp), lambda ratio: ratio > 10),
    ]


def cam_case(peer: str, name: str, method: str, formula: Any = None, reason: str = "", **options: Any) -> Case:
    """A map from activations and gradients; behind an operation in place, each peer mixes these in its way."""
    library, after = (grad_cam, Tensor.relu) if peer == "grad-cam" else (torch_cam, lambda maps: maps)
    row = case(name, partial(library, method=method, **options), after=after)
    if reason:
        row.differs(reason, equals(lambda net: formula(*net.evidence)))
    mixed = (lambda net: (net.overwritten[0], net.evidence[1])) if peer == "grad-cam" else (lambda net: net.overwritten)
    return row.differs("in-place", equals(lambda net: formula(*mixed(net)))) if formula else row


def grad_cam_cases() -> list[Case]:
    row = partial(cam_case, "grad-cam")

    def finer_epsilon(evidence: str) -> Proof:
        return equals(lambda net: finer(net, getattr(net, evidence)[0], clone=True, epsilon=1e-9))

    def centered(evidence: str) -> Proof:
        return lambda theirs, _, net: relative(centered_component(getattr(net, evidence)[0], theirs), theirs)

    return [
        row("grad_cam", "GradCAM", mean_weights),
        row("grad_cam_plus_plus", "GradCAMPlusPlus", epsilon_plus_plus, "epsilon"),
        row("xgrad_cam", "XGradCAM", partial(epsilon_x, 1e-7), "sum epsilon"),
        row("layer_cam", "LayerCAM", lambda a, g: (g.relu() * a).sum(1).relu()),
        row("hires_cam", "HiResCAM", lambda a, g: (g * a).sum(1).relu()),
        row("eigen_cam", "EigenCAM")
        .differs("centered", centered("evidence"))
        .differs("in-place", centered("overwritten")),
        row("finer_cam", "FinerCAM")
        .differs("probability mean", finer_epsilon("evidence"))
        .differs("in-place", finer_epsilon("overwritten")),
        row("score_cam", "ScoreCAM", early=True).differs("aligned", equals(partial(score_loop, aligned_masks))),
        row("ablation_cam", "AblationCAM", early=True).differs("drowned", equals(drowned_ablation)),
        guided(
            case("guided_backprop, first image", guided_by_grad_cam, "guided_backprop", lambda maps: maps[:1]),
            rows=slice(1),
        ),
    ]


def torch_cam_cases() -> list[Case]:
    row = partial(cam_case, "torchcam")
    return [
        row("cam", "CAM").differs("CAM by luck", cam_gap).differs("no CAM", cam_gap, lambda gap: gap > 0.01),
        row("grad_cam", "GradCAM", mean_weights),
        row("grad_cam_plus_plus", "GradCAMpp", undivided_plus_plus, "undivided"),
        row("xgrad_cam", "XGradCAM", partial(epsilon_x, 1e-8), "sum epsilon"),
        row("layer_cam", "LayerCAM", lambda a, g: (g.relu() * a).sum(1).relu()),
        row("finer_cam", "FinerCAM", gamma=1.0, num_references=1).differs(
            "in-place", equals(lambda net: finer(net, net.overwritten[0], clone=False))
        ),
        row("score_cam", "ScoreCAM", early=True).differs(
            "scaled first", equals(partial(score_loop, early_scaled_masks))
        ),
    ]


def zennit_cases() -> list[Case]:
    ex = sl.explainers

    def lrp(method: str) -> Case:
        options: dict[str, Any] = {} if method == "lrp" else {"bias": "share"}  # as zennit without zero_params
        ours = partial(getattr(ex, method), **options | ({"low": -4.0, "high": 4.0} if "box" in method else {}))
        theirs = partial(zennit_lrp, method=method)
        return (
            case("lrp (epsilon)" if method == "lrp" else method, theirs, ours)
            .differs("stabilizer", is_ours(partial(exact_zennit, method=method), relative))
            .differs("not conserved", misses_the_logit(ours, theirs), lambda ratio: ratio > 10)
        )

    return [
        case("saliency", partial(zennit_gradient, over_colors=lambda maps, _: maps.abs().amax(1))),
        case(
            "integrated_gradients",
            lambda net: zennit_maps(net, "IntegratedGradients", net.copy(), n_iter=STEPS).sum(1),
            partial(ex.integrated_gradients, steps=STEPS),
        ).differs("right sum", equals(right_sum)),
        guided(case("guided_backprop", partial(zennit_gradient, composite=composites.GuidedBackprop))),
        guided(case("deconvolution", partial(zennit_gradient, composite=composites.DeconvNet)), deconvolution=True),
        case(
            "occlusion, patch 32, stride 32",
            partial(zennit_occlusion, patch=32),
            partial(ex.occlusion, patch=32, stride=32),
        ),
        *map(lrp, ("lrp", "lrp_epsilon_plus_flat", "lrp_epsilon_gamma_box", "lrp_epsilon_alpha2_beta1")),
    ]


COUNTED = {
    "equal": "equal",
    "explained": "differs",
    "the peer fails or both refuse": "fails",
    "unexplained": "unexplained",
}
CASES = {"captum": captum_cases, "grad-cam": grad_cam_cases, "torchcam": torch_cam_cases, "zennit": zennit_cases}


def measure(net: Net, row: Case) -> dict[str, Any]:
    """One cell of the table."""
    if row.name in ("score_cam", "ablation_cam") and not net.early:
        return {"verdict": "left out"}
    cell = compare(row, net, tolerance=EQUAL, measure=relative)[0]
    return cell | {"verdict": "fails"} if "error" in cell else cell


def main() -> None:
    torch.set_num_threads(2)
    names = sys.argv[1:] or [*EARLY]
    nets: dict[str, Any] = json.loads(RESULTS.read_text())["nets"] if sys.argv[1:] else {}
    for name in names:
        start, net = time.perf_counter(), Net(name)
        cells = {peer: {row.name: measure(net, row) for row in rows()} for peer, rows in CASES.items()}
        nets[name] = {"layer": net.layer, "early_layer": net.early, "cells": cells}
        for peer, method, cell in ((peer, *item) for peer, methods in cells.items() for item in methods.items()):
            if cell["verdict"] in ("unexplained", "fails"):
                print(f"  {name} {peer} {method}: {cell}")
        results = {name: nets[name] for name in EARLY if name in nets}
        save("peers", pages, ("torch", "torchvision", *CASES, "numpy"), nets=results)
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)


def pages(results: dict[str, Any]) -> dict[Path, str]:
    nets: dict[str, Any] = results["nets"]
    bodies: dict[str, str] = {}
    counts: dict[str, dict[str, int]] = {}
    for peer in CASES:
        numbers: dict[str, int] = {}
        methods = next(iter(nets.values()))["cells"][peer]
        head = [f"{peer} {results['versions'][peer]}", *nets]
        cells = [[net["cells"][peer][method] for net in nets.values()] for method in methods]
        rows = [[method, *(shown(cell, numbers) for cell in row)] for method, row in zip(methods, cells, strict=True)]
        listed = [f"{number}. {note.replace('|', '/')}" for note, number in numbers.items()]
        notes = "\n".join(fill(line, 120, subsequent_indent="   ", break_long_words=False) for line in listed)
        bodies[peer] = f"{table(head, *rows)}\n\n## Notes\n\n{notes}"
        verdicts = [cell["verdict"] for row in cells for cell in row]
        counts[peer] = {name: verdicts.count(verdict) for name, verdict in COUNTED.items()}
    layers = "; ".join(
        f"{name} `{net['layer']}`" + (f", `{net['early_layer']}`" if net["early_layer"] else "")
        for name, net in nets.items()
    )
    values = {"layers": layers, "side": SIDE, "classes": CLASSES, "steps": STEPS}
    return written("peers", results, counts, bodies, **values)


def shown(cell: dict[str, Any], numbers: dict[str, int]) -> str:
    """The text of a cell; a new note gets the next number."""
    note = cell.get("error") or REASONS.get(cell.get("reason", ""))
    mark = f"[{numbers.setdefault(note, len(numbers) + 1)}]" if note else "**unexplained**"
    if cell["verdict"] == "left out":
        return "n/a"
    if "error" in cell:
        return f"{'both refuse' if 'refusal' in cell else 'fails'} {mark}"
    value = "we refuse"
    if "difference" in cell:
        value = f"{cell['difference']:.0e}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")
        value = "0" if value == "0e0" else value
    return value if cell["verdict"] == "equal" else f"**{value}** {mark}"


if __name__ == "__main__":
    main()
