"""A compiled model is explained like the plain one; without the shape checker, which torch.compile cannot trace."""

import copy
import shutil

import pytest
import timm
import torch
from torch import nn

import sightline as sl
from sightline.explainers import Explanation

pytestmark = pytest.mark.compile
CAMS = ["cam", "grad_cam", "grad_cam_plus_plus", "xgrad_cam", "layer_cam", "hires_cam", "eigen_cam", "finer_cam"]


def assert_same(one: Explanation, other: Explanation) -> None:
    assert one.layers == other.layers and torch.equal(one.targets, other.targets)
    for method in one.maps:
        assert (one[method] - other[method]).abs().max() <= 1e-5 * one[method].abs().max(), method
    assert one.verdicts == other.verdicts


@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_model_is_explained_like_the_plain_one(in_place: bool) -> None:
    model = sl.create_model("vgg_att2", width=1 / 16).eval()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    methods = ["attention", "grad_cam", "activation_map", "saliency", "guided_backprop", "lrp"]
    plain = sl.explain(model, images, methods=methods)
    if in_place:
        model.compile(backend="aot_eager")
        compiled = model
    else:
        compiled = torch.compile(model, backend="aot_eager")
    before = model(images)
    call = model._compiled_call_impl
    assert_same(plain, sl.explain(compiled, images, methods=methods))
    assert model._compiled_call_impl is call and torch.equal(model(images), before)


@pytest.mark.skipif(shutil.which("g++") is None, reason="the compiler of PyTorch needs one of C++")
def test_compile_gives_the_same_maps_and_notices_other_weights() -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=7)
    images = torch.randn(3, 3, 64, 64)
    targets = torch.tensor([[0, 6], [3, 3], [1, 2]])
    state = copy.deepcopy(model.state_dict())
    for _ in range(2):
        for asked in (None, targets):
            plain = sl.explain(model, images, asked, CAMS)
            assert_same(plain, sl.explain(model, images, asked, CAMS, compile=True))
            assert not sl.explain(model, images, asked, CAMS, compile=True)["cam"].requires_grad
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items()) and model.training
        with torch.no_grad():
            model.fc.weight.mul_(-2)
        state = copy.deepcopy(model.state_dict())


@pytest.mark.skipif(shutil.which("g++") is None, reason="the compiler of PyTorch needs one of C++")
@pytest.mark.slow
def test_compile_notices_other_sizes_of_images() -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=7)
    for images in (torch.randn(2, 3, 64, 64), torch.randn(2, 3, 96, 96), torch.randn(2, 3, 64, 96)):
        plain = sl.explain(model, images, 1, CAMS)
        assert_same(plain, sl.explain(model, images, 1, CAMS, compile=True))


def test_compile_says_what_it_cannot_do() -> None:
    images = torch.randn(1, 3, 32, 32)
    pooled = timm.create_model("test_resnet", num_classes=7)
    for got, options in {
        "a method that reads input_gradients": {"methods": ["saliency"]},
        "2 layers": {"layer": ["layer3", "layer4"]},
        "differentiable=True": {"differentiable": True},
        "call=": {"call": 0},
    }.items():
        with pytest.raises(ValueError, match=f"without a graph, for compile=True, got {got}; leave compile out"):
            sl.explain(pooled, images, compile=True, **options)
    for other in (nn.Sequential(pooled, nn.Softmax(1)), timm.create_model("vgg11", num_classes=7)):
        with pytest.raises(ValueError, match="pooled into one linear layer that yields the logits, for compile=True"):
            sl.explain(other, images, compile=True)
