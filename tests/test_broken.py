"""What a search for wrong maps broke: unusual shapes, layers, heads, targets and states of models."""

from collections import namedtuple
from functools import partial

import numpy as np
import pytest
import timm
import torch
from tests.same import assert_same_state, close, state_of
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sightline import explainers
from sightline.explainers import explain
from sightline.inference import run, untouched

DRAWN = [
    "integrated_gradients",
    "smooth_grad",
    "var_grad",
    partial(explainers.rise, masks=4),
    "random_map",
    "center_map",
    "edge_map",
    "contrast_map",
    "occlusion",
    "lrp_epsilon_gamma_box",
    "saliency",
]


@pytest.fixture
def images():
    return torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Two convolutions and a head that is not linear; `between` is what happens to the last features."""

    def __init__(self, between=torch.relu, channels=6):
        super().__init__()
        torch.manual_seed(0)
        self.c1 = nn.Conv2d(3, channels, 3, padding=1)
        self.c2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.fc = nn.Linear(channels, 4)
        self.between = between

    def features(self, x):
        return self.between(self.c2(torch.tanh(self.c1(x))))

    def head(self, features):
        return self.fc(torch.tanh(features.mean((2, 3))))

    def forward(self, x):
        return self.head(self.features(x))


def torch_seeded(build, *arguments, **options):
    torch.manual_seed(0)
    return build(*arguments, **options)


# --- where the positions are -----------------------------------------------------------------------------------------


def shrunk(side, stride):
    return -(-side // stride)


@pytest.mark.parametrize("channels", [32, 64, 256, 512, 600])
@pytest.mark.parametrize(("height", "width", "stride"), [(980, 50, 32), (1024, 64, 32), (500, 60, 16), (131, 65, 4)])
def test_features_of_tall_and_wide_images_are_channels_first(channels, height, width, stride):
    class Shrinking(nn.Module):
        def __init__(self):
            super().__init__()
            self.features = nn.Conv2d(1, channels, 1, stride=stride)
            self.fc = nn.Linear(channels, 2)

        def forward(self, x):
            return self.fc(torch.tanh(self.features(x)).mean((2, 3)))

    model = torch_seeded(Shrinking)
    for sides in ((height, width), (width, height)):
        images = torch.ones(2, 1, *sides)
        grid = tuple(shrunk(side, stride) for side in sides)
        for layer in (None, "features"):
            found = explain(model, images, 1, ["activation_map"], layer)
            assert found["activation_map"].shape == (2, 1, *grid), found.layer


@pytest.mark.parametrize("sides", [(64, 64), (64, 128), (128, 64), (32, 256)])
def test_channels_last_stages_of_any_images_stay_channels_last(sides):
    class Patches(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.patches = nn.Conv2d(3, channels, 8, stride=8)
            self.norm = nn.LayerNorm(channels)
            self.fc = nn.Linear(channels, 2)

        def forward(self, x):
            return self.fc(self.norm(self.patches(x).permute(0, 2, 3, 1)).mean((1, 2)))

    for channels in (16, 48, 96, 192):
        found = explain(torch_seeded(Patches, channels), torch.randn(2, 3, *sides), 1, ["grad_cam"], "norm")
        assert found["grad_cam"].shape[2:] == tuple(side // 8 for side in sides), (channels, found.layer)


def test_tokens_beside_a_convolution_that_shortens_the_keys_keep_their_grid():
    model = torch_seeded(timm.create_model, "twins_pcpvt_small", img_size=64, num_classes=5, depths=(1, 1, 2, 1))
    found = explain(model, torch.randn(1, 3, 64, 64), 1, ["grad_cam"], "blocks.2.1")
    assert found.layer == "blocks.2.1 (320 x 4 x 4)"


@pytest.mark.parametrize("batch", [1, 3])
def test_a_layer_without_a_row_for_each_image_is_refused(batch, images):
    class Flipping(Net):
        def forward(self, x):
            return super().forward(torch.cat([x, x.flip(3)])).unflatten(0, (2, -1)).mean(0)

    class PositionsFirst(Net):
        def __init__(self):
            super().__init__()
            self.tokens = nn.Identity()

        def forward(self, x):
            return self.fc(self.tokens(self.features(x).flatten(2).permute(2, 0, 1)).tanh().mean(0))

    inputs = torch.randn(batch, 3, 32, 32)
    for model, layer in ((Flipping(), "c2"), (PositionsFirst(), "tokens"))[:batch]:
        with pytest.raises(ValueError, match=rf"expected a layer that yields one row for each of {batch} images, got"):
            explain(model, inputs, 1, ["grad_cam"], layer)


@pytest.mark.parametrize("batch", [1, 3])
def test_windows_are_put_together_again(batch):
    options = {"img_size": 32, "window_size": 4, "embed_dim": 8, "depths": (1, 1), "num_heads": (1, 1)}
    swin = torch_seeded(timm.create_model, "swin_tiny_patch4_window7_224", num_classes=5, **options)
    inputs, layer = torch.randn(batch, 3, 32, 32), "layers.0.blocks.0.attn"
    found = explain(swin, inputs, 1, ["activation_map"], layer)
    kept = []
    swin.get_submodule(layer).register_forward_hook(lambda m, i, o: kept.append(o.detach()))
    swin(inputs)
    whole = kept[0].view(batch, 2, 2, 4, 4, 8).permute(0, 1, 3, 2, 4, 5).reshape(batch, 1, 8, 8, 8)
    assert found.layer == f"{layer} (8 x 8 x 8)" and close(whole.norm(dim=4), found["activation_map"])


# --- the layer that is found, and the one that is ablated ------------------------------------------------------------


def ablated(features, head, targets):
    """Ablation-CAM from its definition, a channel at a time."""
    maps = []
    with torch.no_grad():
        for row, target in zip(features.split(1), targets.tolist(), strict=True):
            score = head(row)[0, target]
            shares = []
            for channel in range(row.shape[1]):
                without = row.clone()
                without[:, channel] = 0
                shares.append((score - head(without)[0, target]) / score)
            maps.append((torch.stack(shares)[:, None, None] * row[0]).sum(0).relu()[None])
    return torch.stack(maps)


@pytest.mark.parametrize("in_place", [False, True])
def test_ablation_of_a_module_that_runs_twice_is_that_of_the_captured_run(in_place, images):
    class Shared(Net):
        def __init__(self):
            super().__init__()
            self.relu = nn.ReLU(in_place)

        def features(self, x):
            return self.relu(self.c2(self.relu(self.c1(x))))

    model, targets = Shared(), torch.tensor([1, 0, 2])
    found = explain(model, images, targets, ["ablation_cam", "grad_cam"])
    assert found.layer == "relu (6 x 8 x 8)"
    assert close(ablated(model.features(images), model.head, targets), found["ablation_cam"])


@pytest.mark.parametrize(
    "change", [torch.sigmoid_, torch.relu_, lambda z: z.add_(1), lambda z: z.__setitem__((slice(None), 0), 1)]
)
def test_features_changed_in_place_behind_their_module_are_not_called_its_output(change, images):
    def between(features):
        change(features)
        return features

    model, targets = Net(between), torch.tensor([1, 0, 2])
    with pytest.raises(ValueError, match="expected a layer that is a module of the model for ablation_cam, got 'input"):
        explain(model, images, targets, ["ablation_cam"])
    found = explain(model, images, targets, ["activation_map", "ablation_cam@c2"])
    with torch.no_grad():
        assert close(model.features(images).norm(dim=1, keepdim=True), found["activation_map"])
        before = model.c2(torch.tanh(model.c1(images)))
    expected = ablated(before, lambda features: model.head(between(features.clone())), targets)
    assert close(expected, found["ablation_cam@c2"])


@pytest.mark.parametrize("batch", [1, 2])
def test_the_last_tokens_of_a_hugging_face_swin_are_read_not_a_branch(batch):
    transformers = pytest.importorskip("transformers")
    options = {"image_size": 64, "embed_dim": 16, "depths": [1, 1, 2], "num_heads": [1, 2, 4], "window_size": 4}
    model = torch_seeded(transformers.SwinForImageClassification, transformers.SwinConfig(num_labels=5, **options))
    images = torch.randn(batch, 3, 64, 64)
    found = explain(model, images, 1, ["grad_cam", "activation_map"])
    named = explain(model, images, 1, ["grad_cam", "activation_map"], "swin.layernorm")
    assert found.layer == named.layer == "swin.layernorm (64 x 4 x 4)"
    assert all(torch.equal(found[name], named[name]) for name in found.maps) and found["grad_cam"].any()


def test_a_layer_may_yield_a_named_tuple(images):
    Pair = namedtuple("Pair", "features other")

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 6, 3, padding=1)

        def forward(self, x):
            return Pair(self.conv(x), 1)

    model = Net()
    model.c1 = nn.Sequential()
    model.c2 = Named()
    model.forward = lambda x: model.head(model.c2(x).features)
    found = explain(model, images, 1, ["hires_cam"], "c2")
    assert close(explain(model, images, 1, ["hires_cam"], "c2.conv")["hires_cam"], found["hires_cam"])


def test_layers_of_wrapped_models_have_their_wrapped_names_too(images):
    model = Net()
    for wrapped, prefix in ((nn.DataParallel(model), "module."), (torch.compile(model, backend="eager"), "_orig_mod.")):
        assert explain(wrapped, images, 1, layer=f"{prefix}c1").layer == "c1 (6 x 8 x 8)"


# --- heads that end in probabilities ---------------------------------------------------------------------------------


def difference(z):
    return z[:, 1:] - z[:, :1]


@pytest.mark.parametrize(
    ("end", "logits"),
    [
        (lambda z: torch.sigmoid(z[:, :1]).squeeze(1), lambda z: z[:, :1]),
        (lambda z: torch.sigmoid(z[:, :1]).flatten(), lambda z: z[:, :1]),
        (lambda z: torch.sigmoid(z[:, :1]).view(-1).clamp(1e-7, 1 - 1e-7), lambda z: z[:, :1]),
        (lambda z: z[:, :1].clone().sigmoid_(), lambda z: z[:, :1]),
        (lambda z: z[:, :1].sigmoid().clamp_(1e-7, 1).double(), lambda z: z[:, :1]),
        (lambda z: torch.sigmoid(z)[:, 0], lambda z: z[:, :1]),
        (lambda z: torch.special.expit(z[:, :1]), lambda z: z[:, :1]),
        (lambda z: z[:, :2].softmax(1)[:, 1], lambda z: difference(z[:, :2])),
        (lambda z: F.softmax(z[:, :2], -1)[:, 1:], lambda z: difference(z[:, :2])),
        (lambda z: torch.special.softmax(z, 1), lambda z: z),
        (lambda z: z.softmax(1).clamp(min=1e-8).log(), lambda z: z),
        (lambda z: z.softmax(1)[:, :2], lambda z: z.softmax(1)[:, :2].logit()),  # of four: each for itself
        (lambda z: z.softmax(1) * 3, lambda z: z.softmax(1) * 3),
        (lambda z: torch.tanh(z[:, :1]), lambda z: torch.tanh(z[:, :1])),
    ],
)
def test_probabilities_are_followed_to_the_output(end, logits, images):
    model = Net()
    model.fc.bias.data.fill_(-0.3)
    plain = Net()
    plain.load_state_dict(model.state_dict())
    ended, plain_head = model.head, plain.head
    model.head = lambda features: end(ended(features))
    plain.head = lambda features: logits(plain_head(features))
    with torch.no_grad():
        assert close(run(plain, images), run(model, images).float())
    found, expected = (explain(m, images, None, ["hires_cam", "saliency"]) for m in (model, plain))
    assert torch.equal(found.targets, expected.targets)
    assert all(close(expected[name].float(), found[name].float()) for name in found.maps)


def test_a_link_beside_the_output_changes_nothing(images):
    model = Net()
    head = model.head
    model.head = lambda features: (head(features).softmax(1), head(features).sigmoid().flatten())[0]
    assert torch.equal(head(model.features(images)), run(model, images))  # the last link is not the output's
    model.head = lambda features: head(features).softmax(1).mul_(3)
    with torch.no_grad():
        assert torch.equal(model(images), run(model, images))


# --- relevance -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("turned", [lambda w: w.T, lambda w: w.mT, lambda w: w.H, lambda w: w.t()])
def test_relevance_goes_through_a_turned_parameter_whole(turned, images):
    class Turned(Net):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 6))

        def forward(self, x):
            pooled = self.c1(x).relu().mean((2, 3))
            return self.fc((pooled @ turned(self.weight)).relu() + pooled)

    model = Turned()
    trained = explain(model, images, 1, ["lrp"])["lrp"]
    model.weight.requires_grad_(False)
    assert close(explain(model, images, 1, ["lrp"])["lrp"], trained)


# --- the model is left alone, whatever it does ------------------------------------------------------------------------


class Checkpointed(nn.Module):
    def __init__(self, middle, use=True):
        super().__init__()
        torch.manual_seed(0)
        self.c1 = nn.Conv2d(3, 8, 3, padding=1)
        self.c2 = nn.Conv2d(8, 8, 3, padding=1)
        self.middle = middle()
        self.fc = nn.Linear(8, 4)
        self.use = use

    def part(self, features):
        return F.relu(self.middle(self.c2(features)))

    def forward(self, x):
        x = F.relu(self.c1(x))
        x = checkpoint(self.part, x, use_reentrant=False) if self.use else self.part(x)
        return self.fc(torch.tanh(x).mean((2, 3)))


@pytest.mark.parametrize("middle", [partial(nn.BatchNorm2d, 8), nn.Dropout])
@pytest.mark.parametrize("training", [False, True])
def test_what_is_checkpointed_runs_again_in_eval_mode(middle, training, images):
    model, plain = Checkpointed(middle).train(training), Checkpointed(middle, use=False)
    before = state_of(model)
    methods = ["saliency", "guided_backprop", "integrated_gradients", "smooth_grad", "hires_cam@c1", "hires_cam@c2"]
    for targets in (torch.tensor([1, 0, 2]), torch.tensor([[1, 0], [0, 1], [2, 3]])):
        found, expected = explain(model, images, targets, methods), explain(plain, images, targets, methods)
        assert all(close(expected[name], found[name]) for name in expected.maps)
        assert_same_state(before, state_of(model))


def test_timm_checkpointing_in_train_mode():
    options = {"img_size": 32, "num_classes": 4, "depth": 2, "embed_dim": 24, "drop_path_rate": 0.5}
    model = torch_seeded(timm.create_model, "vit_tiny_patch16_224", **options).train()
    images = torch.randn(2, 3, 32, 32)
    methods = ["hires_cam@blocks.0", "saliency", "smooth_grad"]
    expected = explain(model, images, 1, methods)
    model.set_grad_checkpointing(True)
    before = state_of(model)
    found = explain(model, images, 1, methods)
    assert all(close(expected[name], found[name]) for name in expected.maps)
    assert_same_state(before, state_of(model))


def test_a_module_whose_eval_mode_does_something_is_not_asked(images):
    class Merging(nn.Linear):
        """As loralib does it: eval() merges the update into the weight, train() takes it out again."""

        def __init__(self):
            super().__init__(6, 4)
            self.update = nn.Parameter(torch.randn(4, 6))
            self.merged = False

        def train(self, mode=True):
            if mode == self.merged:
                self.weight.data += self.update if not mode else -self.update
                self.merged = not mode
            return super().train(mode)

        def forward(self, x):
            return super().forward(x) + (0 if self.merged else x @ self.update.T)

    model = Net()
    model.fc = Merging()
    before, logits = state_of(model), model(images)
    found = explain(model, images, 1, ["grad_cam", "saliency"])
    assert torch.equal(found.logits, logits) and not model.fc.merged
    assert_same_state(before, state_of(model))
    with untouched(model.eval()) as same:
        assert same.fc.merged and not same.fc.training


@pytest.fixture
def compiled_as_is(monkeypatch):
    """Only the copy and the key of the compiled forward."""
    monkeypatch.setattr(torch, "compile", lambda module, **options: module)


def test_compile_notices_what_changes_the_forward(images, compiled_as_is):
    model = torch_seeded(nn.Sequential, nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model.append(nn.Linear(6, 4))

    def change_data():
        model[0].weight.data.mul_(-1)

    def swap():
        model[1] = nn.Identity()

    def stride():
        model[0].stride = (2, 2)

    def hook():
        model[0].register_forward_hook(lambda module, inputs, output: output + 1)

    def before():
        model[0].register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))

    def weights():
        model[4].weight.data = torch.ones(4, 6)

    for change in (lambda: None, change_data, swap, stride, hook, before, weights):
        change()
        expected = explain(model, images, 1, ["cam"], layer="1")["cam"]
        assert close(expected, explain(model, images, 1, ["cam"], layer="1", compile=True)["cam"]), change


def test_compile_is_not_repeated_while_nothing_changes(images, monkeypatch):
    made = []
    monkeypatch.setattr(torch, "compile", lambda module, **options: made.append(module) or module)
    model = torch_seeded(nn.Sequential, nn.Conv2d(3, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))
    model.register_buffer("unknown", torch.tensor([torch.nan]))
    for training in (True, True, False):
        explain(model.train(training), images, 1, ["cam"], compile=True)
    assert len(made) == 1


# --- targets and the mode around -------------------------------------------------------------------------------------


def test_targets_made_in_inference_mode_are_targets(images):
    with torch.inference_mode():
        targets = torch.tensor([1, 0, 2])
    methods = ["grad_cam", "saliency", "finer_cam"]
    found, expected = explain(Net(), images, targets, methods), explain(Net(), images, targets.clone(), methods)
    assert all(torch.equal(found[name], expected[name]) for name in methods)


@pytest.mark.parametrize("targets", [[1, 2, 0], (1, 2, 0), np.array([1, 2, 0]), "a", 1.0, True, np.float64(1)])
def test_targets_of_another_type_are_refused_in_one_line(targets, images, unchecked):
    with pytest.raises(TypeError, match="expected targets None, an int, an integer tensor or a function, got"):
        explain(Net(), images, targets)


def test_an_integer_of_numpy_is_a_class(images, unchecked):
    assert explain(Net(), images, np.int64(2)).targets.tolist() == [[2], [2], [2]]


def other_device():
    torch.set_default_device("meta")


def other_dtype():
    torch.set_default_dtype(torch.float64)


@pytest.mark.parametrize("other", [other_device, other_dtype])
def test_defaults_of_torch_change_no_map(other, images):
    model = Net()
    targets = torch.tensor([[1, 0], [0, 1], [2, 3]])
    expected = explain(model, images, targets, DRAWN)
    try:
        other()
        found = explain(model, images, targets, DRAWN)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    for name, value in expected.maps.items():
        assert found[name].dtype == value.dtype and torch.equal(value, found[name]), name


@pytest.mark.parametrize("method", ["integrated_gradients", "smooth_grad", "var_grad", "saliency"])
def test_a_model_that_switches_gradients_off_is_said_to(method, images):
    class Frozen(Net):
        @torch.no_grad()
        def forward(self, x):
            return super().forward(x)

    with pytest.raises(ValueError, match=r"expected .*; .*make sure the forward does not switch"):
        explain(Frozen(), images, 1, [method])


def test_features_of_inference_mode_inside_the_model_do_not_stop_maps_behind_it(images):
    class Half(Net):
        def features(self, x):
            with torch.inference_mode():
                first = self.c1(x)
            return self.c2(torch.tanh(first.clone())).relu()

    found, expected = explain(Half(), images, 1, ["hires_cam"]), explain(Net(), images, 1, ["hires_cam"])
    assert close(expected["hires_cam"], found["hires_cam"])
