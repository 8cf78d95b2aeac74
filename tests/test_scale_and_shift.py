"""Scales and shifts of a frozen network: the identity bit for bit, and the formula written out."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sightline.models import create_model
from sightline.models.resnet import MtlResNet
from sightline.models.scale_and_shift import ScaleAndShift
from sightline.training.loop import memory_layout

SMALL = {"width": 0.0625, "blocks": 1}
IMAGES = torch.randn(4, 3, 24, 24, generator=torch.Generator().manual_seed(0))


def trained(network: nn.Module) -> nn.Module:
    """The network with statistics and weights of BatchNorm as after a training."""
    generator = torch.Generator().manual_seed(1)
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            for values in (part.weight, part.bias, part.running_mean, part.running_var):
                nn.init.uniform_(values, 0.5, 1.5, generator=generator)
    return network.eval()


def heads() -> list:
    brnpa = {"attention": "brnpa", "attention_options": {"k": 3}}
    b_cnn = {"attention": "bap", "attention_options": {"k": 3, "variant": "brnpa"}}
    return [{}, brnpa, b_cnn, brnpa | {"high_resolution": 2}]


@pytest.mark.parametrize("options", heads(), ids=["none", "brnpa", "b-cnn", "high resolution"])
def test_ones_and_zeros_are_the_network_bit_for_bit(options):
    network = trained(create_model("mtl_resnet", num_classes=5, **SMALL, **options))
    expected = network(IMAGES)
    learning = ScaleAndShift(network, (24, 24))
    assert torch.equal(learning(IMAGES), expected)
    assert torch.equal(learning.folded()(IMAGES), expected)
    assert len(learning.scales) == sum(isinstance(part, nn.Conv2d) for part in network.modules())


def moved(learning: ScaleAndShift) -> ScaleAndShift:
    generator = torch.Generator().manual_seed(2)
    for values in (*learning.scales, *learning.shifts):
        nn.init.normal_(values, generator=generator)
    return learning


def test_a_convolution_with_bias_follows_the_formula():
    conv, head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)
    learning = moved(ScaleAndShift(nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head), (24, 24)))
    scale, shift = learning.scales[0], learning.shifts[0]
    assert scale.shape == (4, 3, 1, 1) and shift.shape == (4,)
    features = F.conv2d(IMAGES, conv.weight * scale, conv.bias + shift).mean((2, 3))
    torch.testing.assert_close(learning(IMAGES), head(features))
    torch.testing.assert_close(learning.folded()(IMAGES), head(features))


def test_a_convolution_without_bias_is_shifted_before_its_batch_norm():
    conv, norm, head = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Linear(4, 2)
    network = trained(nn.Sequential(conv, norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head))
    learning = moved(ScaleAndShift(network, (24, 24)))
    shifted = F.conv2d(IMAGES, conv.weight * learning.scales[0]) + learning.shifts[0][:, None, None]
    expected = head(norm(shifted).relu().mean((2, 3)))
    torch.testing.assert_close(learning(IMAGES), expected)
    torch.testing.assert_close(learning.folded()(IMAGES), expected)
    gradients = [torch.autograd.grad(out.square().sum(), learning.shifts[0])[0] for out in (learning(IMAGES), expected)]
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().max() > 0


def test_only_scales_and_shifts_learn_and_the_network_stays():
    network = create_model("mtl_resnet", num_classes=5, **SMALL).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    learning = ScaleAndShift(network, (24, 24)).train()
    assert network.training and not any(part.training for part in learning.network.modules())
    assert all(p.requires_grad for p in network.parameters())
    trainable = {name for name, p in learning.named_parameters() if p.requires_grad}
    assert all(name.startswith(("scales.", "shifts.")) for name in trainable)
    learning(IMAGES).sum().backward()
    assert {name for name, p in learning.named_parameters() if p.grad is not None} == trainable
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(1728, 2)), "expected a network with convolutions to scale"),
        (nn.Sequential(nn.Conv2d(3, 2, 24, bias=False), nn.Flatten(), nn.Linear(2, 2)), "got neither for '0'"),
    ],
)
def test_networks_without_a_place_are_refused(network, message):
    with pytest.raises(ValueError, match=message):
        ScaleAndShift(network, (24, 24))


@pytest.mark.parametrize(("high_resolution", "side"), [(0, 10), (2, 40)])
def test_the_resnet_has_the_resolutions_of_its_papers(high_resolution, side):
    network = create_model("mtl_resnet", num_classes=3, high_resolution=high_resolution, **SMALL)
    shapes = []
    network.get_submodule("layer3").register_forward_hook(lambda _, inputs, output: shapes.append(output.shape))
    network.eval()(torch.zeros(1, 3, 80, 80))
    assert shapes == [(1, 40, side, side)]


@pytest.mark.parametrize(("options", "message"), [({"blocks": 0}, "1 block per stage"), ({"width": 0.01}, "1/16")])
def test_impossible_resnets_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MtlResNet(3, **options)


@pytest.mark.parametrize(("width", "layout"), [(0.1, torch.contiguous_format), (0.2, torch.channels_last)])
def test_strided_convolutions_of_few_channels_keep_the_safe_layout(width, layout):
    """With 8 channels, of a vector of 16, the other layout damages memory on a CPU with AVX-512."""
    assert memory_layout(MtlResNet(3, width=width, blocks=1), torch.device("cpu")) == layout
