"""What strangers ran into: functions as targets, dense outputs, explainers of one's own, options of other types."""

from functools import partial

import pytest
import torch
from tests.same import close
from torch import nn
from torch.nn import functional as F

from sightline import explainers
from sightline.explainers import Explainer, explain
from sightline.metrics import deletion_auc
from sightline.testing import PooledModel


@pytest.fixture
def images():
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Dense(nn.Module):
    """A class for every pixel; `size` enlarges the output as segmentation networks do."""

    def __init__(self, size=None):
        super().__init__()
        torch.manual_seed(0)
        self.c1, self.c2, self.size = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 1), size

    def forward(self, x):
        found = self.c2(self.c1(x).relu())
        return {"out": found if self.size is None else F.interpolate(found, self.size)}


def pooled(classes=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, classes))


@pytest.mark.parametrize("pick", [lambda o: o[:, 2], lambda o: o[:, :2], lambda o: o])
def test_a_function_names_no_class_and_metrics_say_so(pick, images):
    model = PooledModel(torch.eye(3))
    found = explain(model, images, pick, ["grad_cam", "rise", "random_map", "lrp"])
    assert (found.targets == -1).all() and found.targets.shape == found["grad_cam"].shape[:2]
    with pytest.raises(ValueError, match=r"^expected class indices as targets, got -1.* needs score=$"):
        deletion_auc(model, images, found.targets[:, :1], found["grad_cam"][:, :1])


def test_a_function_that_picks_a_class_has_its_score():
    model, images = PooledModel(torch.eye(3)), torch.rand(2, 3, 4, 4)
    auc = deletion_auc(model, images, torch.tensor([2, 2]), images[:, 2:])
    mine = deletion_auc(
        model, images, torch.tensor([0, 0]), images[:, 2:], score=lambda logits, _: logits.softmax(1)[:, 2]
    )
    assert torch.equal(auc, mine)


@pytest.mark.parametrize("end", [lambda o: o[:, 2], lambda o: o])
def test_cam_says_that_it_needs_classes(end, images):
    with pytest.raises(ValueError, match=r"^expected class indices as targets for cam, .* use hires_cam$"):
        explain(PooledModel(torch.eye(3)), images, end, ["cam"])


@pytest.mark.parametrize("size", [None, (16, 16)])
@pytest.mark.parametrize(
    "score", [lambda o: o["out"][:, 3, 2, 2], lambda o: F.interpolate(o["out"], (4, 4))[:, 1].mean((1, 2))]
)
def test_the_output_itself_is_no_layer_to_read(size, score, images):
    with pytest.raises(ValueError, match=r"^expected layer= for a model that returns feature maps, got none"):
        explain(Dense(size), images, score, ["grad_cam", "hires_cam"])
    found = explain(Dense(size), images, score, ["hires_cam"], layer="c1")
    assert found.layer == "c1 (6 x 8 x 8)"
    assert explain(Dense(size), images, score, ["saliency"])["saliency"].shape == (2, 1, 8, 8)


@pytest.mark.parametrize("end", [nn.Identity(), nn.Flatten(0), nn.Sigmoid()])
def test_class_activation_maps_of_a_single_logit(end, images):
    model = pooled(1).append(end).eval()
    methods = ["cam", "grad_cam", "hires_cam", "ablation_cam"]
    z = nn.Sequential(*model[:5])(images).detach()
    features, weights = model[:2](images).detach(), model[4].weight.detach()
    map_of_one = torch.einsum("nk,bkhw->bnhw", weights, features)
    for target, sign in ((1, 1), (0, -1)):
        found = explain(model, images, target, methods)
        assert close(found["cam"], sign * map_of_one) and close(found["hires_cam"], sign * map_of_one / 36)
        assert close(found["grad_cam"], (sign * map_of_one / 36).relu())
        shares = features.mean((2, 3)) * weights / z
        assert close(found["ablation_cam"], torch.einsum("bk,bkhw->bhw", shares, features)[:, None].relu())
    assert close(found.logits, torch.cat([-z, z], 1) / 2)


def test_an_image_that_is_not_finite_is_said_so(images):
    images[1] = torch.nan
    # No gradient passes a ReLU of NaNs: the map of zeros is finite.
    methods = ["saliency", "guided_backprop", "grad_cam", "activation_map", "random_map"]
    found = explain(pooled().eval(), images, 0, methods)
    for method in methods[:-1]:
        assert "non-finite" not in found.verdicts[method][0] and "non-finite" in found.verdicts[method][1], method
    assert found.verdicts["random_map"] == [[], []]


def test_names_that_are_no_evidence_are_refused():
    def mine(features, gradients):
        return features

    with pytest.raises(ValueError, match=r"^expected fields of Evidence out of .*activations, .*, got 'features'$"):
        Explainer(mine)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda maps: maps[:, 0],
        lambda maps: maps[:1],
        lambda maps: maps.repeat(1, 2, 1, 1),
        lambda maps: maps.flatten(2),
        lambda maps: maps > 0,
        lambda maps: maps.numpy(),
    ],
)
def test_a_map_of_another_shape_or_type_is_refused(wrong, images, unchecked):
    def mine(activations):
        return wrong(activations.mean(1, keepdim=True))

    for ask in (Explainer(mine), lambda *args: explain(*args, [Explainer(mine)])):
        with pytest.raises(ValueError, match=r"^expected float maps \(2, 1, h, w\) from mine, got "):
            ask(pooled(), images, 1)


def test_maps_are_float64_only_where_the_model_is(images):
    def mine(activations):
        return activations.mean(1, keepdim=True).double()

    assert explain(pooled(), images, 0, [Explainer(mine)])["mine"].dtype == torch.float32
    assert Explainer(mine)(pooled().double(), images.double()).dtype == torch.float64


@pytest.mark.parametrize("name", ["activations", "gradients", "images"])
def test_a_formula_that_changes_its_evidence_is_refused(name, images):
    def change(value):
        return value.mul_(2).flatten(3).sum(1 if value.ndim == 4 else 2)[:, :1]

    def activations_of(activations):
        return change(activations)

    def gradients_of(gradients):
        return change(gradients)

    def images_of(images):
        return change(images)

    formula = {"activations": activations_of, "gradients": gradients_of, "images": images_of}[name]
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(216, 3))
    with pytest.raises(RuntimeError, match=rf"^expected a formula that leaves its evidence alone, got .*'{name}'"):
        explain(model, images, 0, [Explainer(formula), "grad_cam"])


def test_a_model_that_changes_its_images_in_place_is_no_such_formula(images):
    model = nn.Sequential(nn.ReLU(inplace=True), *pooled()).eval()
    methods = ["occlusion", "ablation_cam", "score_cam", "contrast_map", partial(explainers.rise, masks=2)]
    assert len(explain(model, images, 0, methods, layer="1").maps) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": [partial(explainers.lrp, composite="epsilon_plus")]}, r"^expected a Composite .*'epsilon_plus'"),
        ({"methods": [partial(explainers.occlusion, fill="gray")]}, r"^expected a number as fill.*'gray'"),
        ({"methods": ["occlusion"], "batch_size": 0}, r"^expected at least 1 image per batch, got 0"),
        ({"layer": 3}, r"^expected a module of Sequential or its dotted name as layer, got 3"),
        ({"layer": [3]}, r"^expected a module of Sequential or its dotted name as layer, got 3"),
    ],
)
def test_options_of_another_kind_are_refused_in_one_line(options, message, images, unchecked):
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        explain(pooled(), images, 0, **options)
    assert "\n" not in str(caught.value)


def test_representations_are_short(images):
    found = explain(pooled().eval(), images, 1, ["grad_cam", "saliency"])
    assert repr(found) == ("Explanation(grad_cam (2, 1, 6, 6) at 1 (6 x 6 x 6), saliency (2, 1, 8, 8))")
    assert repr(explainers.grad_cam) == "<Explainer grad_cam>"
