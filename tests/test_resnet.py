"""Attention and high resolution by `create_model`."""

import re

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

import sightline.attention
from sightline.facts import Notice
from sightline.models import create_model
from sightline.models.resnet import keep_resolution


class Scale(nn.Module):
    """A gating block whose initialization shows: a factor for each channel."""

    def __init__(self, channels, *, factor=0.5, identity=False):
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels, 1, 1), 1.0 if identity else factor))

    def forward(self, features):
        return features * self.weight


class Doubled(nn.Module):
    """A block that computes another thing when it has started as the identity."""

    def __init__(self, channels, *, identity=False):
        super().__init__()
        self.factor = 2 if identity else 1
        self.weight = nn.Parameter(torch.full((channels, 1, 1), 0.5))

    def forward(self, features):
        return features * (self.factor * self.weight)


class Sum(nn.Module):
    def __init__(self, channels, *, k=1):
        super().__init__()
        self.k = k
        self.out_channels = k * channels

    def forward(self, features):
        return features.sum((2, 3)).repeat(1, self.k)


@pytest.fixture(autouse=True)
def names(monkeypatch):
    monkeypatch.setitem(sightline.attention.ATTENTION, "scale", Scale)
    monkeypatch.setitem(sightline.attention.ATTENTION, "sum", Sum)


def lively(model):
    """Without the zeros with which residual branches begin, and which hide what blocks do to them."""
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.ones_(layer.weight)
    return model.eval()


def images(side=64):
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))


def sizes(model, side):
    seen = []
    stages = [model.get_submodule(f"layer{i}") for i in range(1, 5)]
    handles = [stage.register_forward_hook(lambda *call: seen.append(tuple(call[2].shape[2:]))) for stage in stages]
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, side, side))
    for handle in handles:
        handle.remove()
    return seen


def test_attention_by_name_by_class_and_with_options():
    for attention in ("scale", Scale):
        model = create_model("resnet18", num_classes=3, attention=attention, attention_options={"factor": 0.25})
        new = [p for name, p in model.named_parameters() if ".attention." in name]
        assert len(new) == 8 and all((p == 0.25).all() for p in new)
        assert model(images()).shape == (2, 3)
    model = create_model("vgg15", attention="scale", width=1 / 16, attention_options={"at": "features.conv3"})
    new = [name for name, _ in model.named_parameters() if "attention" in name]
    assert new == ["features.conv3.3.attention.weight"]
    model = create_model("torchvision:resnet18", num_classes=3, attention="sum", attention_options={"k": 2})
    assert model.fc.weight.shape == (3, 1024) and model(images()).shape == (2, 3)


def test_weights_without_blocks_keep_their_logits_and_weights_with_blocks_are_loaded(tmp_path):
    plain = lively(create_model("resnet18", num_classes=3))
    save_file(plain.state_dict(), tmp_path / "plain.safetensors")
    model = create_model("resnet18", num_classes=3, attention="scale", weights=tmp_path / "plain.safetensors").eval()
    assert torch.equal(model(images()), plain(images()))

    trained = create_model("resnet18", num_classes=3, attention="scale").eval()
    nn.init.normal_(trained.layer4[1].bn2.attention.weight)
    nn.init.normal_(trained.layer4[1].bn2.weight)
    save_file(trained.state_dict(), tmp_path / "trained.safetensors")
    model = create_model("resnet18", num_classes=3, attention="scale", weights=tmp_path / "trained.safetensors").eval()
    assert torch.equal(model(images()), trained(images()))
    with pytest.raises(
        ValueError, match=r"layer1.0.bn2.attention.weight is unknown to the model, layer1.1.bn2.attention.weight is"
    ):
        create_model("resnet18", num_classes=3, weights=tmp_path / "trained.safetensors")

    doubled = create_model("resnet18", num_classes=3, attention=Doubled, weights=tmp_path / "plain.safetensors").eval()
    nn.init.normal_(doubled.layer4[1].bn2.attention.weight)
    save_file(doubled.state_dict(), tmp_path / "doubled.safetensors")
    model = create_model("resnet18", num_classes=3, attention=Doubled, weights=tmp_path / "doubled.safetensors").eval()
    assert torch.equal(model(images()), doubled(images()))

    pooled = create_model("resnet18", num_classes=3, attention="sum", attention_options={"k": 3}).eval()
    save_file(pooled.state_dict(), tmp_path / "pooled.safetensors")
    options = {"attention": "sum", "attention_options": {"k": 3}, "weights": tmp_path / "pooled.safetensors"}
    assert torch.equal(create_model("resnet18", num_classes=3, **options).eval()(images()), pooled(images()))


def test_pretrained_weights_start_as_the_identity(monkeypatch):
    made = {}

    def pretrained(name, pretrained, **options):
        made["model"] = lively(build(name, **options))
        made["logits"] = made["model"](images())
        return made["model"]

    build = timm.create_model
    monkeypatch.setattr(timm, "create_model", pretrained)
    with pytest.warns(Notice, match="the head starts fresh"):
        model = create_model("resnet18", num_classes=3, weights="pretrained", attention="scale")
    assert torch.equal(model(images()), made["logits"]) and model.layer1[0].bn2.attention is not None


@pytest.mark.parametrize(
    "name", ["resnet18", "resnet50d", "resnetaa50", "resnetblur50", "resnest26d", "torchvision:resnet18"]
)
def test_the_last_stages_keep_their_resolution_and_the_weights_load(name):
    low = create_model(name, num_classes=3)
    assert sizes(low, 96) == [(24, 24), (12, 12), (6, 6), (3, 3)]
    for stages in (1, 2, 3):
        high = create_model(name, num_classes=3, high_resolution=stages)
        grown = [24, 12, 6, 3][: 4 - stages] + [[24, 12, 6, 3][3 - stages]] * stages
        assert sizes(high, 96) == [(side, side) for side in grown]
        high.load_state_dict(low.state_dict())
        assert high(images()).shape == (2, 3)
        assert all(layer.dilation == (1, 1) for layer in high.modules() if isinstance(layer, nn.Conv2d))


def test_pools_that_only_shrink_go_and_others_keep_their_window():
    for name, pool, wanted in (
        ("resnet50d", "downsample.0", nn.Identity),
        ("resnetaa50", "aa", nn.Identity),
        ("resnest26d", "avd_last", nn.AvgPool2d),
    ):
        layer = create_model(name, high_resolution=1).layer4[0].get_submodule(pool)
        assert type(layer) is wanted and getattr(layer, "stride", 1) == 1


def test_each_position_of_the_small_map_is_one_of_the_large_map():
    """Stride 1 computes the positions that stride 2 leaves out; with 1x1 kernels the others stay as they are."""
    torch.manual_seed(0)
    low, high = (create_model("resnet18", num_classes=3).eval() for _ in range(2))
    keep_resolution(high, 1)
    high.load_state_dict(low.state_dict())
    features = torch.randn(1, 256, 8, 8)
    for path in ("conv1", "downsample"):
        small, large = (model.layer4[0].get_submodule(path)(features) for model in (low, high))
        torch.testing.assert_close(large[:, :, ::2, ::2], small)


def test_resnet50_at_448_pixels_grows_from_14_to_56():
    assert sizes(create_model("resnet50"), 448)[-1] == (14, 14)
    high = create_model("resnet50", high_resolution=2, attention="sum", attention_options={"k": 3})
    assert sizes(high, 448)[-2:] == [(56, 56), (56, 56)]
    assert high.fc.in_features == 3 * 2048
    assert [entry["reduction"] for entry in high.feature_info] == [2, 4, 8, 8, 8]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"name": "efficientnet_b0", "high_resolution": 1},
            "expected a ResNet with stages layer1 to layer4 for high_resolution, got EfficientNet; take a ResNet",
        ),
        ({"name": "resnet18", "high_resolution": 4}, "expected high_resolution of 1 to 3 stages, got 4; layer1 has no"),
        ({"name": "resnet18", "high_resolution": -1}, "expected high_resolution of 1 to 3 stages, got -1"),
        (
            {"name": "resnet18", "high_resolution": 1, "output_stride": 16},
            "expected a stride of 2 in layer4 of ResNet, got none; lower high_resolution",
        ),
        ({"name": "resnet18", "attention": "scal"}, "unknown attention 'scal'; did you mean 'scale'"),
        ({"name": "resnet18", "attention_options": {"k": 2}}, "expected attention to go with attention_options"),
        (
            {"name": "resnet18", "attention": "scale", "attention_options": {"factr": 2}},
            "scale has no option 'factr'; did you mean 'factor'?; it has: factor, identity",
        ),
    ],
)
def test_bad_input_is_one_clear_line(options, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        create_model(**options)
    assert "\n" not in str(error.value)


def test_a_stage_that_still_shrinks_is_refused():
    model = create_model("resnet18")
    model.layer4 = nn.Sequential(model.layer4, nn.MaxPool2d(2, stride=(2, 1)))
    with pytest.raises(ValueError, match=r"cannot keep the resolution of ResNet: a stage still turns \(4, 4\) into"):
        keep_resolution(model, 1)


def test_stages_of_one_resolution_are_stages():
    for name, stages in (("cifar_resnet", 2), ("resnet18", 2)):
        plain, fine = (
            create_model(name, num_classes=5, high_resolution=high, attention="bam", attention_options={"reduction": 8})
            for high in (0, stages)
        )
        assert list(fine.state_dict()) == list(plain.state_dict())  # or weights of the one would not fit the other
        assert any(key.startswith("layer3.1.attention") for key in fine.state_dict()) == (name == "resnet18")


@pytest.mark.parametrize(("depth", "parameters"), [(8, 78_042), (20, 272_474), (56, 855_770)])
def test_cifar_resnet(depth, parameters):
    model = create_model("cifar_resnet", num_classes=10, depth=depth)
    # 432 + 32 in the stem; a block of c channels: 18 c^2 + 4 c; the first of a stage: 13.5 c^2 + 4 c and 0.5 c^2 + 2 c
    n = depth // 6
    by_hand = 464 + 650 + n * (18 * 256 + 64)
    by_hand += sum(14 * c * c + 6 * c + (n - 1) * (18 * c * c + 4 * c) for c in (32, 64))
    assert sum(p.numel() for p in model.parameters()) == by_hand == parameters
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(convolutions) + 1 == depth
    shapes = []
    for stage in (model.layer1, model.layer2, model.layer3):
        stage.register_forward_hook(lambda layer, inputs, output: shapes.append(tuple(output.shape[1:])))
    model(torch.zeros(1, 3, 32, 32))
    create_model("cifar_resnet", depth=depth, stem_stride=2, high_resolution=2, attention="eca", width=0.5)
    assert shapes == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"depth": 18}, "expected a depth of 6n + 2, got 18"),
        ({"depth": 2}, "expected a depth of 6n + 2, got 2"),
        ({"width": 0.01}, "expected a width of 1/16 or more, got 0.01"),
        ({"stem_stride": 0}, "expected a stem_stride of 1 or more, got 0"),
        ({"high_resolution": 3}, "expected high_resolution of 1 to 2 stages, got 3"),
    ],
)
def test_cifar_resnets_that_are_none(options, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        create_model("cifar_resnet", **options)
