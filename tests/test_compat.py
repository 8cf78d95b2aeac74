"""Old scripts through `sightline.compat`: the values of the original where it is right, and what the report says."""

import importlib
import inspect
import warnings

import numpy as np
import pytest
import torch
from tests.same import assert_same_state, state_of
from torch import nn
from torch.nn import functional as F

from sightline import compat
from sightline.compat import pytorch_grad_cam as ours
from sightline.compat.pytorch_grad_cam.metrics import cam_mult_image, perturbation_confidence, road
from sightline.compat.pytorch_grad_cam.utils import find_layers, image, model_targets, reshape_transforms
from sightline.compat.pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import captum.attr as captum
    import pytorch_grad_cam as theirs
    from pytorch_grad_cam.utils import model_targets as their_targets

from sightline.compat.captum import attr

EQUAL = ["GradCAM", "HiResCAM", "LayerCAM", "XGradCAM"]
OTHERS = ["GradCAMPlusPlus", "EigenCAM", "EigenGradCAM", "ScoreCAM", "AblationCAM"]


class Net(nn.Module):
    """Two convolutions, pooling to 2 x 2, and a linear layer: no closed form for any method."""

    def __init__(self, in_place=False):
        super().__init__()
        self.one = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.two = nn.Conv2d(6, 8, 3, padding=1)
        self.last = nn.ReLU()
        self.head = nn.Linear(32, 5)
        self.in_place = in_place

    def forward(self, images):
        features = self.two(self.one(images).relu())
        features = F.relu(features, inplace=True) if self.in_place else self.last(features)
        return self.head(F.adaptive_avg_pool2d(features, 2).flatten(1))


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = Net().eval()
    net.head.weight.data *= 20  # gradients far above the original's 1e-7
    return net


@pytest.fixture
def images():
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def fresh_report():
    compat.report(clear=True)


def said():
    return str(compat.report())


def of(library, name, net, images, targets=None, layers=None, **arguments):
    made = getattr(library, name)(model=net, target_layers=layers or [net.last])
    return made(input_tensor=images, targets=targets, **arguments)


@pytest.mark.parametrize("name", [*EQUAL, "FinerCAM"])
@pytest.mark.parametrize("several", [False, True])
def test_maps_are_those_of_the_original(net, images, name, several):
    layers = [net.one, net.last] if several else [net.last]
    expected = of(theirs, name, net, images, layers=layers)
    got = of(ours, name, net, images, layers=layers)
    assert got.dtype == expected.dtype == np.float32 and got.shape == expected.shape == (3, 16, 16)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert got.max() > 0.5


@pytest.mark.parametrize("name", [*EQUAL, *OTHERS, "RandomCAM"])
@pytest.mark.parametrize("option", ["aug_smooth", "eigen_smooth"])
def test_smoothed_maps(net, images, name, option):
    targets = [ClassifierOutputTarget(k) for k in (0, 4, 2)]
    got = of(ours, name, net, images, targets, **{option: True})
    assert got.dtype == np.float32 and got.shape == (3, 16, 16) and 0 <= got.min() and got.max() <= 1
    if name in EQUAL and option == "aug_smooth":
        expected = of(
            theirs, name, net, images, [their_targets.ClassifierOutputTarget(k) for k in (0, 4, 2)], **{option: True}
        )
        np.testing.assert_allclose(got, expected, atol=1e-5)


def test_finer_cam_takes_the_smoothing_of_the_others(net, images):
    """As the example script of pytorch-grad-cam asks for it, which fails there."""
    versions = [factor * (images.flip(-1) if turned else images) for turned in (0, 1) for factor in (1.0, 1.1, 0.9)]
    plain = [of(ours, "FinerCAM", net, version) for version in versions]
    mean = (sum(plain[:3]) + sum(plain[3:])[..., ::-1]) / 6
    np.testing.assert_allclose(of(ours, "FinerCAM", net, images, aug_smooth=True), mean, atol=1e-6)
    with pytest.raises(TypeError, match="aug_smooth"):
        of(theirs, "FinerCAM", net, images, aug_smooth=True)


def test_smoothing_by_a_component_is_that_of_the_weighted_channels(net, images):
    cam = ours.GradCAM(net, [net.last])
    plain = cam(images)
    assert cam.explanation is not None
    kept = {}
    with net.last.register_forward_hook(lambda m, i, o: kept.update(a=o.detach().requires_grad_()) or kept["a"]):
        (gradient,) = torch.autograd.grad(net(images).amax(1).sum(), kept["a"])
    weighted = (gradient.mean((2, 3), keepdim=True) * kept["a"].detach()).flatten(2)
    for row, got in zip(weighted, cam(images, eigen_smooth=True), strict=True):
        _, values, right = torch.linalg.svd(row, full_matrices=False)
        component = (values[0] * right[0]).reshape(1, 1, 8, 8)
        component = component * component.sum().sign()
        wanted = image.scale_cam_image(component[0].clamp(min=0).numpy(), (16, 16))[0]
        np.testing.assert_allclose(got, image.scale_cam_image(wanted[None])[0], atol=1e-4)
    assert not np.allclose(plain, cam(images, eigen_smooth=True), atol=1e-2)


@pytest.mark.parametrize("name", ["ScoreCAM", "EigenCAM", "EigenGradCAM"])
def test_the_others_are_sightlines_own_and_the_report_says_why(net, images, name):
    got = of(ours, name, net, images)
    assert got.shape == (3, 16, 16) and got.max() > 0.5
    assert f"{name} (1 call): " in said()


def test_plus_plus_is_the_original_up_to_its_epsilon(net, images):
    net.head.weight.data *= 5  # squared gradients far above 1e-6
    np.testing.assert_allclose(
        of(ours, "GradCAMPlusPlus", net, images), of(theirs, "GradCAMPlusPlus", net, images), atol=1e-3
    )
    assert "1e-6" not in said()
    net.head.weight.data /= 1e5
    of(ours, "GradCAMPlusPlus", net, images)
    assert "adds 1e-6 to a denominator" in said() and "The share here: 100%." in said()


def test_ablation_is_the_original_where_the_lowest_activation_is_zero(net, images):
    np.testing.assert_allclose(of(ours, "AblationCAM", net, images), of(theirs, "AblationCAM", net, images), atol=1e-4)
    assert "1e7" not in said()
    of(ours, "AblationCAM", net, images, layers=[net.two])
    assert "less 1e7" in said()


def test_the_model_is_left_alone(net, images):
    net.train()
    net.head.weight.grad = torch.ones(5, 32)
    before = state_of(net)
    for name in (*EQUAL, *OTHERS):
        of(ours, name, net, images, aug_smooth=False)
    ours.GuidedBackpropReLUModel(net)(images[:1])
    assert_same_state(before, state_of(net))
    assert "leaves your model in eval mode" in said() and "loses the gradients that your parameters have" in said()


def test_frozen_models_work(net, images):
    expected = of(ours, "GradCAM", net, images)
    net.requires_grad_(False)
    with torch.no_grad():
        np.testing.assert_array_equal(of(ours, "GradCAM", net, images), expected)


def test_a_layer_that_is_changed_in_place_is_read_before(net, images):
    changed = Net(in_place=True)
    changed.load_state_dict(net.state_dict())
    expected = of(ours, "GradCAM", net, images, layers=[net.two])
    assert "in place" not in said()
    np.testing.assert_allclose(of(ours, "GradCAM", changed, images, layers=[changed.two]), expected, atol=1e-6)
    assert "the model changes the output of two in place afterwards" in said()
    assert np.abs(of(theirs, "GradCAM", changed.eval(), images, layers=[changed.two]) - expected).max() > 0.01


def test_one_target_is_for_all_images(net, images):
    expected = of(ours, "GradCAM", net, images, [ClassifierOutputTarget(2)] * 3)
    assert "with one target" not in said()
    np.testing.assert_array_equal(of(ours, "GradCAM", net, images, [ClassifierOutputTarget(2)]), expected)
    assert "with one target for several images" in said()
    with pytest.raises(ValueError, match="expected a target for each of 3 images, got 2; pass as many"):
        of(ours, "GradCAM", net, images, [ClassifierOutputTarget(2)] * 2)


def test_targets_must_be_one_number(net, images):
    with pytest.raises(ValueError, match=r"one number per image from RawScoresOutputTarget\(\), got shape \(5,\)"):
        of(ours, "GradCAM", net, images, [model_targets.RawScoresOutputTarget()] * 3)


def test_the_object_keeps_outputs_and_raw_maps(net, images):
    with ours.GradCAM(net, [net.last]) as cam:
        cam(images, [ClassifierOutputTarget(k) for k in (1, 1, 3)])
    assert torch.equal(cam.outputs, net(images))
    assert cam.explanation["grad_cam@last"].shape == (3, 1, 8, 8)
    assert cam.explanation.target == "ClassifierOutputTarget(1), ClassifierOutputTarget(3)"
    with pytest.raises(IndexError, match="not swallowed"), ours.GradCAM(net, [net.last]):
        raise IndexError("not swallowed")


@pytest.mark.parametrize("output", ["classes", "softmax", "rest", "finer"])
def test_targets_are_those_of_the_original(output):
    values = torch.randn(2, 7, generator=torch.Generator().manual_seed(0))
    name, arguments = {
        "classes": ("ClassifierOutputTarget", (3,)),
        "softmax": ("ClassifierOutputSoftmaxTarget", (3,)),
        "rest": ("ClassifierOutputReST", (3,)),
        "finer": ("FinerWeightedTarget", (1, [2, 4], 0.7)),
    }[output]
    for given in (values, values[0]):
        expected = getattr(their_targets, name)(*arguments)(given)
        torch.testing.assert_close(getattr(model_targets, name)(*arguments)(given), expected)


def test_targets_of_a_single_logit_masks_and_boxes():
    assert model_targets.BinaryClassifierOutputTarget(0)(torch.tensor([2.0])) == -2
    assert model_targets.BinaryClassifierOutputTarget(1)(torch.tensor([2.0])) == 2
    mask = np.array([[1.0, 0.0]])
    assert model_targets.SemanticSegmentationTarget(1, mask)(torch.tensor([[[9.0, 9.0]], [[3.0, 4.0]]])) == 3
    found = {"boxes": torch.tensor([[0.0, 0, 4, 2]]), "labels": torch.tensor([1]), "scores": torch.tensor([0.5])}
    boxes = np.array([[0.0, 0, 4, 2], [0, 0, 4, 2], [0, 0, 1, 1]])
    got = model_targets.FasterRCNNBoxScoreTarget([1, 2, 1], boxes)(found)
    assert got.shape == (1,) and got == 1.5  # IoU 1 and score 0.5; another label; IoU 1/8


def test_transforms_of_tokens_are_compared(images):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Unflatten(1, (1, 3)), Tokens())

    def transform(tokens):
        return reshape_transforms.vit_reshape_transform(tokens, 4, 4)

    plain = ours.GradCAM(model, [model[1].tokens])(images)
    np.testing.assert_array_equal(ours.GradCAM(model, [model[1].tokens], transform)(images), plain)
    np.testing.assert_allclose(theirs.GradCAM(model, [model[1].tokens], transform)(images, None), plain, atol=1e-5)
    layers = [model[1].tokens, model[1].mixed]  # not in the order in which they run
    both = theirs.GradCAM(model, layers, transform)(images, None)
    np.testing.assert_allclose(ours.GradCAM(model, layers, transform)(images), both, atol=1e-5)
    with pytest.raises(ValueError, match=r"expected a reshape_transform to \(6, 4, 4\).*got \(6, 2, 8\).*leave it out"):
        ours.GradCAM(model, [model[1].tokens], lambda tokens: reshape_transforms.vit_reshape_transform(tokens, 2, 8))(
            images
        )


class Tokens(nn.Module):
    """Patches of 4 x 4 as tokens behind one more, and a mean of some of them."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 6, 4, stride=4)
        self.mixed = nn.Linear(6, 6)
        self.tokens = nn.LayerNorm(6)
        self.head = nn.Linear(6, 3)

    def forward(self, images):
        tokens = self.embed(images.flatten(1, 2)).flatten(2).mT
        tokens = self.tokens(self.mixed(torch.cat([tokens.mean(1, keepdim=True), tokens], 1)))
        return self.head((tokens.square() * torch.arange(17)[:, None]).mean(1))


class Pyramid(nn.Module):
    """Two sizes of a feature map in a dict, and classes from the smaller one."""

    def __init__(self):
        super().__init__()
        self.levels = Levels()
        self.head = nn.Linear(4, 3)

    def forward(self, images):
        return self.head(self.levels(images)["pool"].mean((2, 3)))


class Levels(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2, padding=1)

    def forward(self, images):
        features = self.conv(images).relu()
        return {"0": features, "pool": F.max_pool2d(features, 2)}


@pytest.mark.parametrize("name", ["EigenCAM", "ScoreCAM"])
def test_a_transform_may_read_a_feature_pyramid(images, name):
    torch.manual_seed(0)
    model, seen = Pyramid(), []

    def transform(levels):
        seen.append(reshape_transforms.fasterrcnn_reshape_transform(levels))
        return seen[-1]

    got = getattr(ours, name)(model, [model.levels], transform)(images)
    assert got.shape == (3, 16, 16) and got.max() > 0.5
    assert seen[0].shape == (3, 8, 4, 4) and model.training and not model.levels._forward_hooks
    if name == "EigenCAM":
        for row, cam in zip(seen[0].flatten(2), got, strict=True):
            right = torch.linalg.svd(row.mT, full_matrices=False)[2][0]
            component = (right @ row).view(1, 4, 4)
            wanted = image.scale_cam_image((component * component.sum().sign()).clamp(min=0).numpy(), (16, 16))
            np.testing.assert_allclose(cam, image.scale_cam_image(wanted)[0], atol=1e-4)
    with pytest.raises(ValueError, match="got dict from 'levels'; choose another"):
        ours.GradCAM(model, [model.levels], reshape_transforms.fasterrcnn_reshape_transform)(images)


def test_no_layers_and_other_numbers(net, images):
    with pytest.raises(ValueError, match="expected at least one layer, got an empty list"):
        ours.GradCAM(net, [])(images)
    assert of(ours, "GradCAM", net.double(), images.double()).dtype == np.float32


def test_pictures_are_those_of_the_original():
    from pytorch_grad_cam.utils import image as their_image

    generator = np.random.default_rng(0)
    pixels, mask = generator.random((12, 9, 3), dtype=np.float32), generator.random((12, 9), dtype=np.float32)
    for number in (2, 0, 1, 3, 6, 16, 20):
        for arguments in ((True, number), (False, number), (True, number, 0.2)):
            expected = their_image.show_cam_on_image(pixels, mask, *arguments)
            got = image.show_cam_on_image(pixels, mask, *arguments)
            assert got.dtype == np.uint8 and np.abs(expected.astype(int) - got).max() <= 1
    torch.testing.assert_close(image.preprocess_image(pixels), their_image.preprocess_image(pixels))
    np.testing.assert_array_equal(image.deprocess_image(pixels), their_image.deprocess_image(pixels))
    scaled = image.scale_accross_batch_and_channels(pixels[None], (20, 30))
    np.testing.assert_allclose(scaled, their_image.scale_accross_batch_and_channels(pixels[None], (20, 30)), atol=1e-5)
    with pytest.raises(ValueError, match="an image from 0 to 1, got values up to 2; divide it by 255"):
        image.show_cam_on_image(2 * np.ones((1, 1, 3)), mask[:1, :1])
    with pytest.raises(ValueError, match="image_weight from 0 to 1, got 2"):
        image.show_cam_on_image(pixels, mask, image_weight=2)
    with pytest.raises(ValueError, match=r"color maps JET, AUTUMN.*got number 4"):
        image.show_cam_on_image(pixels, mask, colormap=4)


def test_a_layer_with_one_position_has_a_map_of_zeros(net, images):
    net.pool = nn.AdaptiveAvgPool2d(1)
    model = nn.Sequential(net.one, net.last, net.pool, nn.Flatten(), nn.Linear(6, 3))
    got = of(ours, "GradCAM", model, images, layers=[net.pool])
    assert got.shape == (3, 16, 16) and got.dtype == np.float32 and not got.any()
    assert "pool" not in said() and "2 has a single position" in said()
    np.testing.assert_array_equal(of(theirs, "GradCAM", model, images, layers=[net.pool]), got)
    both = of(ours, "GradCAM", model, images, layers=[net.last, net.pool])
    np.testing.assert_allclose(of(theirs, "GradCAM", model, images, layers=[net.last, net.pool]), both, atol=1e-5)
    assert both.any()
    with pytest.raises(ValueError, match="expected a target for each of 3 images, got 2"):
        of(ours, "GradCAM", model, images, [ClassifierOutputTarget(0)] * 2, [net.pool])


def test_a_flat_map_is_zero():
    assert not image.scale_cam_image(np.full((1, 2, 2), 7.0)).any()


def test_layers_are_found_in_the_order_of_the_original(net):
    from pytorch_grad_cam.utils import find_layers as their_layers

    for types in ([nn.Conv2d], [nn.Conv2d, nn.ReLU, nn.Linear]):
        expected = their_layers.find_layer_types_recursive(net, types)
        assert [*map(id, find_layers.find_layer_types_recursive(net, types))] == [*map(id, expected)]


@pytest.mark.parametrize("name", ["DropInConfidence", "IncreaseInConfidence", "CamMultImageConfidenceChange"])
def test_scores_are_those_of_the_original(net, images, name):
    from pytorch_grad_cam.metrics import cam_mult_image as their_scores

    cams = of(ours, "GradCAM", net, images)
    targets = [model_targets.ClassifierOutputSoftmaxTarget(k) for k in (0, 1, 2)]
    expected = getattr(their_scores, name)()(images, cams, targets, net)
    np.testing.assert_allclose(getattr(cam_mult_image, name)()(images, cams, targets, net), expected, atol=1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the original's arrays
def test_road_is_that_of_the_original_but_for_the_noise(net, images):
    from pytorch_grad_cam.metrics import road as their_road

    cams = of(ours, "GradCAM", net, images)
    targets = [ClassifierOutputTarget(k) for k in (0, 1, 2)]
    for name, arguments in (
        ("ROADMostRelevantFirst", (70,)),
        ("ROADLeastRelevantFirst", ()),
        ("ROADCombined", ([40, 80],)),
    ):
        np.random.seed(0)
        got, expected = (getattr(lib, name)(*arguments)(images, cams, targets, net) for lib in (road, their_road))
        assert (
            got.shape == expected.shape == (3,) and np.abs(got - expected).max() < 0.05 * np.abs(expected).max() + 0.01
        )
    mask = torch.from_numpy((cams[0] < 0.6).astype(np.float32))
    torch.testing.assert_close(
        road.NoisyLinearImputer(0.0)(images[0], mask),
        their_road.NoisyLinearImputer(0.0)(images[0], mask),
        atol=1e-3,
        rtol=0,
    )
    _, changed = road.ROADMostRelevantFirst(70)(images, cams, targets, net, return_visualization=True)
    assert changed.shape == images.shape
    with pytest.raises(ValueError, match="expected 3 maps and targets, got 3 and 1; pass as many"):
        road.ROADMostRelevantFirst(70)(images, cams, targets[:1], net)


def test_the_automatic_threshold_removes_the_most_relevant_pixels():
    cv2 = pytest.importorskip("cv2")
    values = np.random.default_rng(0).random((8, 8)) ** 3
    levels = (255 * values).astype(np.uint8)
    threshold, _ = cv2.threshold(levels, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    kept = perturbation_confidence.RemoveMostRelevantFirst("auto", lambda image, mask: image * mask)(
        torch.ones(1, 8, 8), torch.from_numpy(values)
    )
    np.testing.assert_array_equal(kept[0].numpy(), levels <= threshold)
    assert "wrong side of Otsu's threshold" in said()


def test_guided_gradients_are_those_of_the_original(images):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(576, 3))
    for category in (None, 1):
        got = ours.GuidedBackpropReLUModel(net)(images[:1], category)
        expected = theirs.GuidedBackpropReLUModel(net)(images[:1].clone(), category)
        assert got.shape == (16, 16, 3) and got.dtype == np.float32
        np.testing.assert_allclose(got, expected, atol=1e-6)


def test_guided_gradients_need_a_rectifier(images):
    with pytest.raises(ValueError, match=r"expected rectifiers \(ReLU\)"):
        ours.GuidedBackpropReLUModel(nn.Sequential(nn.Conv2d(3, 1, 3), nn.Flatten(), nn.Linear(196, 2)))(images[:1])


def test_all_names_of_the_original_can_be_imported(net):
    import pytorch_grad_cam

    names = {name for name, value in vars(pytorch_grad_cam).items() if inspect.isclass(value)}
    assert names - {*dir(ours)} <= {"ActivationsAndGradients"}
    with pytest.raises(NotImplementedError, match="FullGrad of pytorch-grad-cam is not in sightline; take LayerCAM"):
        ours.FullGrad(net, [])


@pytest.mark.parametrize(
    "path", ["", ".utils.image", ".utils.model_targets", ".utils.reshape_transforms", ".utils.find_layers"]
)
def test_arguments_have_the_names_and_order_of_the_original(path):
    there = importlib.import_module(f"pytorch_grad_cam{path}")
    here = importlib.import_module(f"sightline.compat.pytorch_grad_cam{path}")
    for name in (
        here.__all__
        if path == ""
        else [n for n, v in vars(here).items() if getattr(v, "__module__", "") == here.__name__]
    ):
        if name.startswith("_") or not hasattr(there, name) or (path == "" and name not in (*EQUAL, *OTHERS)):
            continue
        expected, got = (inspect.signature(getattr(module, name)) for module in (there, here))
        assert [*got.parameters] == [*expected.parameters], name


def test_the_report_counts_and_can_be_cleared(net, images):
    assert said() == "no call so far would have given anything else"
    of(ours, "EigenCAM", net, images)
    of(ours, "EigenCAM", net, images)
    (difference,) = compat.report()
    assert difference.calls == 2 and difference.name == "EigenCAM" and "arbitrary sign" in difference.sentence
    assert len(compat.report(clear=True)) == 1 and not compat.report()


def near(got, expected):
    torch.testing.assert_close(got, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)
    return True


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("target", [3, [1, 2, 0], torch.tensor([1, 2, 0])], ids=["int", "list", "tensor"])
def test_captum(net, images, target):
    def same(name, *arguments, of=(), **options):
        got, expected = (
            getattr(lib, name)(net, *of).attribute(images, *arguments, **options) for lib in (attr, captum)
        )
        return near(got, expected)

    assert same("Saliency", target) and same("Saliency", target, abs=False)
    assert same("IntegratedGradients", target=target) and same("IntegratedGradients", 0.3, target, n_steps=7)
    assert same("IntegratedGradients", torch.rand(3, 16, 16)[None], target=target)
    assert same("Occlusion", (3, 4, 4), (3, 2, 2), target=target) and same("Occlusion", (3, 8, 8), 4, 0.5, target)
    assert same("LayerGradCam", target, of=[net.last]) and same(
        "LayerGradCam", target, of=[net.last], relu_attributions=True
    )


@pytest.mark.filterwarnings("ignore")
def test_captum_more(net, images):
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 1)
    )
    images = F.interpolate(images, (24, 24))[:, :, :16, :16]
    got, delta = attr.IntegratedGradients(net).attribute(images, return_convergence_delta=True)
    expected, their_delta = captum.IntegratedGradients(net).attribute(images, return_convergence_delta=True)
    assert near(got, expected)
    torch.testing.assert_close(delta, their_delta, atol=1e-5, rtol=0)
    layers = net[1], net[1]
    for mode in ("nearest", "bilinear"):  # 8 x 8 to 16 x 16: the nearest is the same
        got, expected = (
            lib.GuidedGradCam(net, layer).attribute(images, 0, interpolate_mode=mode)
            for lib, layer in zip((attr, captum), layers, strict=True)
        )
        assert near(got, expected)
    assert attr.LayerAttribution.interpolate(torch.rand(1, 1, 2, 2), (4, 4)).shape == (1, 1, 4, 4)
    with pytest.raises(
        ValueError, match=r"square windows over all colors.*got \(1, 4, 4\) and \(1, 1, 1\); take \(3, 16"
    ):
        attr.Occlusion(net).attribute(images, (1, 4, 4), target=0)
    with pytest.raises(ValueError, match="expected method='gausslegendre'"):
        attr.IntegratedGradients(net).attribute(images, target=0, method="riemann_left")


@pytest.mark.parametrize("name", ["Saliency", "IntegratedGradients", "Occlusion", "LayerGradCam", "GuidedGradCam"])
def test_captums_arguments_have_their_names_and_order(name):
    expected, got = getattr(captum, name), getattr(attr, name)
    there, here = (list(inspect.signature(one).parameters)[: 2 + name.endswith("Cam")] for one in (expected, got))
    assert here[: len(there)] == there
    there, here = (list(inspect.signature(one.attribute).parameters) for one in (expected, got))
    assert here == there[: len(here)] and len(here) > 4


class Grid(nn.Module):
    """A score for each class and position, times a factor."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3, stride=4)

    def forward(self, images, shift):
        return self.conv(images).square() * (1 + shift)


@pytest.mark.filterwarnings("ignore")
def test_captums_targets_and_other_arguments(net, images):
    def same(model, name, target, *more, **options):
        got, expected = (
            getattr(lib, name)(model, **options).attribute(images, *more, target=target) for lib in (attr, captum)
        )
        return near(got, expected)

    assert same(net, "Saliency", torch.tensor([3])) and same(net, "Saliency", torch.tensor(3)) and not compat.report()
    assert same(net, "IntegratedGradients", 2, multiply_by_inputs=False)
    torch.manual_seed(0)
    grid = Grid()
    grid.eval()
    for shift in (0, torch.tensor(0.5), torch.tensor([[[[0.0]]], [[[1.0]]], [[[2.0]]]])):
        got, expected = (
            lib.Saliency(grid).attribute(images, (1, 2, 3), additional_forward_args=shift) for lib in (attr, captum)
        )
        assert near(got, expected) and got.any()
    places = [(0, 1, 1), (1, 2, 3), (1, 0, 0)]
    got, expected = (lib.Saliency(grid).attribute(images, places, additional_forward_args=0) for lib in (attr, captum))
    assert near(got, expected)
    with pytest.raises(ValueError, match=r"expected one number per image from itemgetter\(\), got shape \(5,\)"):
        attr.Saliency(net).attribute(images)
    with pytest.raises(ValueError, match="expected attribute_to_layer_input=False, got True"):
        attr.LayerGradCam(net, net.last).attribute(images, 3, None, True)
