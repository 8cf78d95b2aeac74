"""Maps by hand, by slow reference, by identity, and by another library."""

from functools import partial

import pytest
import torch
from tests.reference import cams as reference
from tests.same import assert_same_state, close, state_of
from torch import nn
from torch.nn import functional as F

import sightline.explainers as explainers
from sightline.attention import LearnToPayAttention
from sightline.explainers import attention_maps, explain
from sightline.explainers.evidence import gather
from sightline.models.vit import TinyViT
from sightline.testing import PlantedAttention, PooledModel


class Net(nn.Module):
    """Convolutions, an in-place ReLU, pooling, one linear layer."""

    def __init__(self, inplace=True):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.bn = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.relu = nn.ReLU(inplace=inplace)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.drop = nn.Dropout()
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.relu(self.conv2(F.relu(self.bn(self.conv1(x)))))
        return self.fc(self.drop(self.pool(x).flatten(1)))


class GatedNet(Net):
    """A squeeze-and-excitation gate in the middle: it pools, but it is not the head."""

    def __init__(self):
        super().__init__()
        self.squeeze = nn.Linear(6, 6)

    def forward(self, x):
        x = F.relu(self.bn(self.conv1(x)))
        x = x * self.squeeze(x.mean((2, 3))).sigmoid()[:, :, None, None]
        return self.fc(self.pool(self.relu(self.conv2(x))).flatten(1))


class FlatHead(Net):
    """No pooling before the linear layers, as in VGG."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(8 * 5 * 4, 7), nn.ReLU(), nn.Linear(7, 5))

    def forward(self, x):
        return self.fc(torch.flatten(self.relu(self.conv2(self.conv1(x))), 1))


class ListHead(Net):
    """Max and mean of the last feature map, joined by a list; nothing behind the map is a module."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        x = F.relu(self.conv2(self.conv1(x)))
        high, _ = F.adaptive_max_pool2d(x, 1, return_indices=True)
        return self.fc(torch.cat([high.flatten(1), x.mean((2, 3))], 1))


class Tokens(nn.Module):
    """A small transformer: its patches are a feature map, its tokens are not."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 2, stride=2)
        self.blocks = nn.Sequential(*[nn.Linear(8, 8) for _ in range(10)])
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(self.blocks(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


class Half(nn.Module):
    """Forgets every other image."""

    def forward(self, x):
        return x[::2]


class Twins(nn.Module):
    """The same features of an image and of its mirror image."""

    def __init__(self):
        super().__init__()
        self.features = nn.Conv2d(3, 8, 3, padding=1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(self.features(x).mean((2, 3)) + self.features(x.flip(3)).mean((2, 3)))


@pytest.fixture
def images():
    return torch.randn(4, 3, 9, 8, generator=torch.Generator().manual_seed(1))


def seeded(build, dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build().to(dtype).eval()


def slow_evidence(model, image, target, layer):
    """Activations and gradients of one image by a plain hook and a plain backward through the whole net."""
    kept = []
    handle = model.get_submodule(layer).register_forward_hook(lambda m, i, o: kept.append(o))
    logits = model(image[None].clone().requires_grad_())
    handle.remove()
    gradient = torch.autograd.grad(logits[0, target], kept[0])[0]
    return kept[0][0].detach(), gradient[0]


@pytest.mark.parametrize("build", [Net, GatedNet, FlatHead])
def test_grad_cam_equals_the_loop_of_the_paper(build, images):
    model = seeded(partial(build), torch.float64)
    images = images.double()
    targets = torch.tensor([[0, 3], [1, 1], [4, 0], [2, 3]])
    found = explain(model, images, targets, ["grad_cam"], layer="relu")["grad_cam"]
    assert found.shape[:2] == (4, 2) and found.dtype == torch.float64
    assert found.max() > 0
    for i in range(4):
        for t in range(2):
            slow = reference.grad_cam(*slow_evidence(model, images[i], int(targets[i, t]), "relu"))
            assert close(slow, found[i, t])


@pytest.mark.parametrize(("build", "name"), [(Net, "relu"), (GatedNet, "relu"), (FlatHead, "relu")])
def test_the_automatic_layer_is_the_last_feature_map_before_the_logits(build, name, images):
    model = seeded(build)
    automatic = explain(model, images, 2, ["grad_cam", "activation_map"])
    named = explain(model, images, 2, ["grad_cam", "activation_map"], layer=name)
    assert automatic.layer == named.layer == f"{name} (8 x 5 x 4)"
    for method in ("grad_cam", "activation_map"):
        assert torch.equal(automatic[method], named[method])


def test_the_automatic_layer_is_found_through_lists_and_pairs(images):
    model = seeded(ListHead, torch.float64)
    found = explain(model, images.double(), 2, ["grad_cam"])
    assert found.layer == "input of adaptive_max_pool2d_with_indices (8 x 5 x 4)"
    features = F.relu(model.conv2(model.conv1(images.double()))).requires_grad_()
    high = F.adaptive_max_pool2d(features, 1).flatten(1)
    logits = model.fc(torch.cat([high, features.mean((2, 3))], 1))
    gradients = torch.autograd.grad(logits[:, 2].sum(), features)[0]
    assert gradients.abs().max() > 0
    slow = [reference.grad_cam(a, g) for a, g in zip(features.detach(), gradients, strict=True)]
    assert close(torch.stack(slow)[:, None], found["grad_cam"])


def test_attention_weights_are_no_features_and_pass_the_gradient_on(images):
    """Pooled with weights that are made from the features: both feed the logits, only one is a feature map."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), LearnToPayAttention(6, compat="none"), nn.Linear(6, 5))
    model, images = model.double().eval(), images.double()
    found = explain(model, images, 2, ["grad_cam", "attention", "activation_map"])
    assert found.layer == found.layers["activation_map"] == "1 (6 x 7 x 6)"
    features = model[:2](images).requires_grad_()
    gradients = torch.autograd.grad(model[2:](features)[:, 2].sum(), features)[0]
    slow = [reference.grad_cam(a, g) for a, g in zip(features.detach(), gradients, strict=True)]
    assert close(torch.stack(slow)[:, None], found["grad_cam"]) and found["grad_cam"].max() > 0


def test_an_automatic_and_a_named_layer_in_one_call(images):
    model = seeded(ListHead)
    both = explain(model, images, 2, ["grad_cam", "edge_map", "grad_cam@conv1", "activation_map"])
    alone = explain(model, images, 2, ["grad_cam"]), explain(model, images, 2, ["grad_cam"], layer="conv1")
    assert torch.equal(both["grad_cam"], alone[0]["grad_cam"]) and both.layers["edge_map"] == ""
    assert torch.equal(both["grad_cam@conv1"], alone[1]["grad_cam"])
    assert both.layers["activation_map"] == both.layer == "input of adaptive_max_pool2d_with_indices (8 x 5 x 4)"


def test_a_layer_read_inplace_afterwards_is_captured_as_it_was(images):
    inplace, copying = seeded(partial(Net, inplace=True)), seeded(partial(Net, inplace=False))
    for method in ("grad_cam", "activation_map"):
        a = explain(inplace, images, 1, [method], layer="conv2")[method]
        b = explain(copying, images, 1, [method], layer="conv2")[method]
        assert torch.equal(a, b)
    assert (
        explain(inplace, images, 1, [partial(explainers.activation_map, norm="mean")], layer="conv2").maps[
            "activation_map(norm=mean)"
        ]
        < 0
    ).any()


def test_grad_cam_is_relu_of_cam_over_positions_on_a_pooled_net(images):
    model = seeded(Net, torch.float64)
    found = explain(model, images.double(), torch.arange(5).expand(4, 5), ["cam", "grad_cam"])
    assert close(found["cam"].relu() / 20, found["grad_cam"])
    assert close(found["cam"].mean((2, 3)) + model.fc.bias.detach(), found.logits)
    weights = model.fc.weight.detach()
    kept, _ = slow_evidence(model, images[0].double(), 0, "relu")
    assert close(reference.cam(kept, weights[3]), found["cam"][0, 3])


def test_grad_cam_agrees_with_captum(images):
    captum = pytest.importorskip("captum.attr")
    model = seeded(Net)
    theirs = captum.LayerGradCam(model, model.conv2).attribute(
        images, torch.tensor([0, 1, 2, 3]), relu_attributions=True
    )
    ours = explain(model, images, torch.tensor([0, 1, 2, 3]), ["grad_cam"], layer=model.conv2)["grad_cam"]
    assert close(theirs.detach(), ours)


def test_several_targets_and_single_images_give_the_same_maps(images):
    model = seeded(Net)
    targets = torch.tensor([[0, 1, 2]]).expand(4, 3)
    methods = ["grad_cam", "cam", "activation_map", "random_map", "center_map", "edge_map", "contrast_map"]
    together = explain(model, images, targets, methods)
    for method in methods:
        if method != "random_map":
            for t in range(3):
                assert close(explain(model, images, t, [method])[method], together[method][:, t : t + 1])
        for i in range(4):
            assert close(
                explain(model, images[i : i + 1], targets[i : i + 1], [method])[method], together[method][i : i + 1]
            )


def test_targets_default_to_the_prediction(images):
    model = seeded(Net)
    found = explain(model, images)
    assert torch.equal(found.targets[:, 0], model(images).argmax(1))
    assert torch.equal(found["grad_cam"], explain(model, images, found.targets)["grad_cam"])


def test_several_layers_from_one_forward(images):
    model = seeded(Net)
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    both = explain(model, images, 1, ["grad_cam"], layer=["bn", "relu"])
    handle.remove()
    assert len(calls) == 1
    for layer in ("bn", "relu"):
        assert torch.equal(both["grad_cam", layer], explain(model, images, 1, layer=layer)["grad_cam"])
    at = explain(model, images, 1, ["grad_cam@bn", "cam"])
    assert torch.equal(at["grad_cam@bn"], both["grad_cam", "bn"])
    assert at.layers == {"grad_cam@bn": "bn (6 x 9 x 8)", "cam": "relu (8 x 5 x 4)"}


def test_attention_of_a_planted_gate():
    images = torch.rand(2, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    model = PlantedAttention()
    expected = images[:, :1].flatten(1).softmax(1).reshape(2, 1, 3, 3)
    assert torch.equal(attention_maps(model, images)["pool"], expected)
    found = explain(model, images, torch.tensor([[0, 1], [1, 2]]), ["attention"], layer="pool")
    assert torch.equal(found["attention"], expected.expand(2, 2, 3, 3))
    assert found.layer == "pool (1 x 3 x 3)"
    with pytest.raises(ValueError, match=r"expected an attention block .* got Net without one"):
        explain(seeded(Net), images, methods=["attention"])
    with pytest.raises(ValueError, match=r"got 'pool.gate' without one; blocks of this model: pool"):
        explain(model, images, methods=["attention"], layer="pool.gate")
    assert attention_maps(seeded(Net), images) == {}


def test_layer_that_the_model_names_itself(images):
    model = seeded(Net)
    model.default_layer = "bn"
    assert explain(model, images).layer == "bn (6 x 9 x 8)"


def test_controls_do_not_depend_on_the_model(images):
    a, b = seeded(Net), PooledModel(torch.eye(3))
    for control in ("random_map", "center_map", "edge_map", "contrast_map"):
        assert torch.equal(explain(a, images, 0, [control])[control], explain(b, images, 0, [control])[control])


def test_controls_by_hand():
    step = torch.zeros(1, 3, 5, 6)
    step[..., 3:] = 2.0
    edges = explainers.edge_map(PooledModel(torch.eye(3)), step)[0, 0]
    assert edges[0].tolist() == [0, 0, 3, 3, 0, 0]  # 3 channels x (4 * 2 / 8)
    dot = torch.zeros(1, 1, 5, 5)
    dot[0, 0, 2, 2] = 25.0
    contrast = explainers.contrast_map(PooledModel(torch.ones(2, 1)), dot)[0, 0]
    assert contrast[2, 2].item() == pytest.approx((24 + 8) / 9) and contrast[0, 0].item() == pytest.approx(1)
    random = explainers.random_map(PooledModel(torch.eye(3)), step, torch.tensor([[0, 1]]), seed=3, cells=5)
    assert random.shape == (1, 2, 5, 5) and 0 <= random.min() and random.max() < 1 and random.unique().numel() == 50
    center = explainers.center_map(PooledModel(torch.eye(3)), torch.zeros(1, 3, 4, 8))[0, 0]
    assert torch.equal(center, center.flip(0, 1)) and center.argmax() in (11, 12, 19, 20)


def test_verdicts(images):
    model = seeded(Net)
    nn.init.zeros_(model.fc.weight[:1])
    with torch.no_grad():
        model.fc.weight[1] = -1
    found = explain(model, images, torch.tensor([0, 1, 2, 2]), ["grad_cam", "cam", "activation_map"])
    assert found.verdicts["grad_cam"][:2] == [["flat"], ["flat"]]
    assert found.verdicts["cam"][1][-1:] == ["all-negative"] or found["cam"][1].max() == 0
    assert found.verdicts["activation_map"] == [["class-independent"]] * 4
    images[3, 0, 0, 0] = torch.nan
    assert explain(model, images, 2, ["activation_map"]).verdicts["activation_map"][3] == ["non-finite"]


def test_a_dead_head_gives_flat_maps_at_the_last_feature_map(images):
    model = seeded(Net)
    nn.init.zeros_(model.fc.weight)
    found = explain(model, images)
    assert found.layer == "relu (8 x 5 x 4)" and found.verdicts["grad_cam"] == [["flat"]] * 4


def test_resized(images):
    model = seeded(Net)
    found = explain(model, images, methods=["grad_cam", "edge_map"]).resized((18, 16))
    assert {value.shape[2:] for value in found.maps.values()} == {(18, 16)}


def model_for(method):
    """A network that the method has evidence for."""
    if "rollout" in method:
        return TinyViT(num_classes=5, size=8, patch=2, width=8, depth=2, heads=2)
    return PlantedAttention() if method == "attention" else seeded(Net)


@pytest.mark.parametrize("method", list(explainers.EXPLAINERS))
def test_the_model_is_left_as_it_was(method, images):
    model = model_for(method)
    model.train()
    for module in list(model.modules())[1:2]:
        module.eval()
    for parameter in list(model.parameters())[:2]:
        parameter.grad = torch.ones_like(parameter)
    before = state_of(model)
    explain(model, images, 1, [method])
    assert_same_state(before, state_of(model))
    with pytest.raises(ValueError, match="expected targets in 0"):
        explain(model, images, 99, [method])
    assert_same_state(before, state_of(model))
    with torch.no_grad():
        explain(model, images, 1, [method])
    if method not in ("random_map", "center_map", "edge_map", "contrast_map"):
        with pytest.raises(ValueError, match="expected the name of a layer"):
            explain(model, images, 1, [method], layer="nowhere")
        assert_same_state(before, state_of(model))


def test_a_model_that_raises_is_left_as_it_was(images):
    model = seeded(Net).train()
    before = state_of(model)
    handle = model.fc.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("broken")))
    for layer in (None, "relu"):
        with pytest.raises(RuntimeError, match="broken"):
            explain(model, images, layer=layer)
    handle.remove()
    assert_same_state(before, state_of(model))


def test_frozen_no_grad_and_inference_mode_change_nothing(images):
    model = seeded(Net)
    expected = explain(model, images, 1)["grad_cam"]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert torch.equal(explain(model, images, 1)["grad_cam"], expected)
    with torch.no_grad():
        assert torch.equal(explain(model, images, 1, layer="relu")["grad_cam"], expected)
    with torch.inference_mode():
        assert torch.equal(explain(model, images.clone(), 1)["grad_cam"], expected)


def test_no_graph_of_the_trunk_is_kept(images):
    model = seeded(Net)
    ((evidence,),) = gather(model, images, [(None, frozenset({"activations", "gradients"}))]).blocks()
    assert not any(value.requires_grad for value in (evidence.logits, evidence.activations, evidence.gradients))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_half_precision_gives_float32_maps(images):
    model = seeded(Net)
    exact = explain(model, images, 1)["grad_cam"]
    half = explain(model.bfloat16(), images.bfloat16(), 1)["grad_cam"]
    assert half.dtype == torch.float32
    assert (half - exact).abs().max() < 0.05 * exact.max()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"methods": ["grad_camm"]}, r"got 'grad_camm'; did you mean 'grad_cam'\?"),
        ({"methods": "grad_cam"}, r"expected a list of methods, got 'grad_cam'"),
        ({"layer": "rellu"}, r"expected the name of a layer of Net, got 'rellu'; did you mean 'relu'"),
        ({"layer": "fc"}, r"expected a layer that yields \(b, c, h, w\).* got shape \(4, 5\) from 'fc'"),
        ({"layer": "spare"}, r"got 'spare', which it never called"),
        ({"layer": nn.ReLU()}, r"expected a module of Net, got another ReLU"),
        ({"targets": 5}, r"expected targets in 0..4, got 5..5"),
        ({"targets": torch.tensor([1])}, r"expected targets of shape \(4,\) or \(4, t\).*got \(1,\)"),
        (
            {"targets": torch.ones(4)},
            r"expected targets None, an int, an integer tensor or a function, got a torch",
        ),
        (
            {"methods": [partial(explainers.activation_map, power=2)]},
            r"options of activation_map out of: norm, got 'power'",
        ),
        ({"methods": [partial(explainers.activation_map, norm="l1")]}, r"expected norm 'l2' or 'mean', got 'l1'"),
        ({"layer": []}, "expected at least one layer, got an empty list"),
        ({"methods": ["grad_cam@"]}, "expected the name of a layer after @, got 'grad_cam@'"),
        ({"methods": [3]}, "expected a method by name, an explainer or a functools.partial of one, got 3"),
        ({"methods": [partial(explain)]}, "expected a method by name, an explainer or a functools.partial of one"),
        ({"methods": ["nope"]}, "got 'nope'; choose from attention, "),
        ({"targets": torch.empty(4, 0, dtype=torch.long)}, r"one row per image, got \(4, 0\)"),
        ({"methods": ["cam"], "layer": "bn"}, r"behind 'bn' for cam, got another head; use grad_cam"),
    ],
)
def test_bad_requests_say_what_to_do(arguments, message, images, unchecked):
    model = seeded(Net)
    model.spare = nn.Conv2d(3, 3, 1)
    with pytest.raises((ValueError, TypeError), match=message):
        explain(model, images, **arguments)


def test_bad_models_and_images_say_what_to_do(images, unchecked):
    with pytest.raises(ValueError, match=r"for one image pass images\[None\]"):
        explain(seeded(Net), images.long())
    with pytest.raises(ValueError, match="expected a model in which a"):
        explain(
            nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)).requires_grad_(False)[1:],
            torch.randn(1, 3, 1, 1),
        )
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module, got function"):
        explain(F.relu, images)
    with pytest.raises(
        TypeError, match=r"expected paths or Pillow images, one or a list, got ndarray; PIL.Image.fromarray makes"
    ):
        explain(seeded(Net), images.numpy())
    with pytest.raises(RuntimeError, match=r"images that Net can take, got 4 x 1 x 9 x 8, torch.float32 on cpu: "):
        explain(seeded(Net), images[:, :1])
    with pytest.raises(RuntimeError, match=r"expected images that Net can take, .* torch.float64 on cpu: "):
        explain(seeded(Net), images.double())
    with pytest.raises(ValueError, match="expected one row of logits per image, got 2 for 4 images"):
        explain(nn.Sequential(seeded(Net), Half()), images)
    with pytest.raises(ValueError, match="'features', which the forward calls twice; choose one by layer="):
        explain(seeded(Twins), images)
    twice = seeded(Net)
    twice.bn = nn.Identity()
    twice.conv1 = nn.Sequential(twice.conv1, twice.bn)
    with pytest.raises(ValueError, match="expected a layer that runs once"):
        explain(twice, images, layer=twice.bn)
    with pytest.raises(TypeError, match=r"expected logits of shape \(batch, classes\)"):
        explain(nn.Conv2d(3, 3, 1), images)


def test_logits_are_found_in_tuples_dicts_and_objects(images):
    class Wrapped(nn.Module):
        def __init__(self, model, wrap):
            super().__init__()
            self.model, self.wrap = model, wrap

        def forward(self, x):
            return self.wrap(self.model(x))

    model = seeded(Net)
    expected = explain(model, images, 1)["grad_cam"]
    for wrap in (lambda y: (y, None), lambda y: {"logits": y}, lambda y: type("Output", (), {"logits": y})()):
        assert torch.equal(explain(Wrapped(model, wrap), images, 1)["grad_cam"], expected)


def test_an_explainer_shows_its_options_in_its_signature():
    from inspect import signature

    asked = ["model", "images", "targets", "layer", "preprocess", "output", "forward_args", "forward_kwargs"]
    asked += ["call", "batch_size", "memory", "progress"]
    assert list(signature(explainers.activation_map).parameters) == [*asked, "norm"]
    assert list(signature(explainers.cam).parameters) == asked


def test_signed_maps_are_those_that_go_below_zero(images):
    model = seeded(Net)
    fit, _ = explainers.fitting(model, images)
    found = explain(model, images, targets=torch.arange(5).expand(len(images), 5), methods=fit)
    for name in fit:
        assert explainers.EXPLAINERS[name].is_signed == bool((found[name] < 0).any()), name
    assert not explainers.attention_rollout.is_signed and not explainers.gradient_rollout.is_signed


def test_memory_that_runs_out_is_no_reason(images):
    model = seeded(Net)
    model.forward = lambda x: (_ for _ in ()).throw(torch.OutOfMemoryError("too much"))
    with pytest.raises(torch.OutOfMemoryError, match="too much"):
        explainers.fitting(model, images)


def test_what_does_not_fit_is_named_with_its_reason(images, unchecked):
    model = seeded(Net)
    seen = []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    fit, reasons = explainers.fitting(model, images)
    assert sorted([*fit, *reasons]) == sorted(explainers.EXPLAINERS)
    assert reasons.keys() == {"attention", "attention_rollout", "gradient_rollout"}
    assert "expected an attention block with a spatial map" in reasons["attention"]
    assert sum(seen) < 1000  # RISE alone would look at 2,000 changed images
    fit, reasons = explainers.fitting(nn.Sequential(nn.Flatten(), nn.Linear(images[0].numel(), 3), nn.GELU()), images)
    assert {"lrp", "saliency", "rise"} <= set(fit) and {"cam", "guided_backprop"} <= reasons.keys()
    for wrong in ({"targets": 7}, {"layer": "nowhere"}):
        with pytest.raises(ValueError, match="expected at least one method that fits this model, got none: expected"):
            explainers.fitting(model, images, **wrong)


def test_convolutions_are_exact_meanwhile_and_as_they_were_afterwards():
    flags = torch.backends.cudnn
    seen: list[bool] = []

    class Watched(nn.Module):
        def __init__(self, wrong: bool) -> None:
            super().__init__()
            self.conv, self.wrong = nn.Conv2d(3, 2, 1), wrong

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            seen.append(flags.allow_tf32)
            if self.wrong:
                raise RuntimeError("broken")
            return self.conv(images).mean((2, 3))

    before = (flags.allow_tf32, flags.conv.fp32_precision)
    explain(Watched(False), torch.ones(1, 3, 4, 4))
    explainers.saliency(Watched(False), torch.ones(1, 3, 4, 4))
    explainers.attention_maps(Watched(False), torch.ones(1, 3, 4, 4))
    with pytest.raises(RuntimeError, match="broken"):
        explain(Watched(True), torch.ones(1, 3, 4, 4))
    assert before[0] and seen and not any(seen)
    assert (flags.allow_tf32, flags.conv.fp32_precision) == before
    seen.clear()
    try:
        flags.conv.fp32_precision = "ieee"  # the newer name, beside which the older one cannot be read
        with pytest.raises(RuntimeError, match="allow_tf32"):
            explain(Watched(False), torch.ones(1, 3, 4, 4))  # in our own model
        assert flags.conv.fp32_precision == "ieee"
    finally:
        flags.conv.fp32_precision = before[1]
    assert flags.allow_tf32


def test_an_explainer_goes_the_same_way_whether_it_is_called_or_named():
    images, model = torch.rand(2, 3, 8, 8), Net().eval()
    reports, sizes = [], []
    model.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    options = {"masks": 3, "cells": 2}
    called = explainers.rise(model, images, 1, batch_size=2, progress=lambda *report: reports.append(report), **options)
    assert reports == [("rise", 2, 6), ("rise", 4, 6), ("rise", 6, 6)] and max(sizes) == 2
    method = partial(explainers.rise, **options)
    (named,) = explain(model, images, 1, [method], batch_size=2).maps.values()
    assert torch.equal(called, named)
    with pytest.raises(ValueError, match=r"^expected call= of 'conv1' in 0\.\.0, got 1"):
        explainers.grad_cam(model, images, layer="conv1", call=1)
    with pytest.raises(ValueError, match=r"^expected options of rise out of: cells, keep, masks, seed, got 'mask'$"):
        explainers.rise(model, images, mask=3)


def test_names_of_version_0_1_are_understood():
    images, model = torch.rand(2, 3, 8, 8), Net().eval()
    explanation = explain(model, images, 1, ["centre_map"])
    assert torch.equal(explanation["centre_map"], explainers.center_map(model, images))
    assert explainers.centre_map is explainers.center_map
    new = explainers.grad_cam_plus_plus(model, images, 1, normalize_alpha=True)
    assert torch.equal(new, explainers.grad_cam_plus_plus(model, images, 1, normalise_alpha=True))
    old = partial(explainers.grad_cam_plus_plus, normalise_alpha=True)
    explanation = explain(model, images, 1, [old])
    assert torch.equal(new, explanation["grad_cam_plus_plus(normalize_alpha=True)"])

    @explainers.Explainer
    def against(rival_gradients):
        return rival_gradients.sum(2)

    @explainers.Explainer
    def against_too(runner_up_gradients):
        return runner_up_gradients.sum(2)

    assert torch.equal(against(model, images, 1), against_too(model, images, 1))


def test_a_formula_returns_what_else_it_has_to_say():
    remark = explainers.Verdict("made up", "note")

    @partial(explainers.Explainer, sums_to_score=True)
    def halves(images, score):
        values = torch.ones(*score.targets.shape, *images.shape[2:])
        return explainers.Map(values=values, total=values.sum((2, 3)) / 2, remarks=(remark,))

    model, images = PooledModel(torch.eye(3)), torch.rand(2, 3, 2, 2)
    explanation = explain(model, images, 1, [halves, "grad_cam"])
    assert explanation["halves"].equal(torch.ones(2, 1, 2, 2))
    for verdicts in explanation.verdicts["halves"]:
        assert "conservation gap: 200 % of the expected total reaches the pixels" in verdicts and remark in verdicts
    assert not any("made up" in verdicts for verdicts in explanation.verdicts["grad_cam"])
