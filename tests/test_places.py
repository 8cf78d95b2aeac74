"""Where blocks go by themselves: on features, however many classes and channels a network has, or not at all."""

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

import sightline as sl
from sightline.attention.places import Trace


def build(name, classes=7, **options):
    torch.manual_seed(0)
    source, _, name = name.rpartition(":")
    make = torchvision.models.get_model if source == "torchvision" else timm.create_model
    model = make(name, num_classes=classes, **options)
    for layer in model.modules():  # the zeros of a new network would hide a change
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
    return model.eval()


def images(side=64, channels=3):
    return torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(0))


def hooked(model):
    return [name for name, layer in model.named_modules() if layer._forward_hooks or layer._forward_pre_hooks]


def seen(model, batch):
    """What the only block takes, and the logits."""
    (block,) = [layer for name, layer in model.named_modules() if name.endswith(".attention")]
    taken = []
    block.register_forward_hook(lambda _, inputs, output: taken.append(inputs[0]))
    logits = model(batch)
    assert len(taken) == 1
    return taken[0], logits


@pytest.mark.parametrize(
    ("name", "block", "places"),
    [
        ("torchvision:densenet121", "se", [f"features.denseblock{i}" for i in (1, 2, 3, 4)]),
        ("torchvision:mnasnet0_5", "cbam", ["layers.8.2", "layers.9.2", "layers.11.1", "layers.13.0"]),
        ("mobilenetv3_small_050", "bam", ["blocks.0.0", "blocks.1.1", "blocks.3.1"]),
        ("torchvision:squeezenet1_1", "cbam", ["features.1", "features.4", "features.7", "features.12"]),
        ("torchvision:squeezenet1_1", "non_local", ["features.7", "features.12"]),
        ("legacy_seresnet18", "bam", ["layer1.1", "layer2.1", "layer3.1"]),
    ],
)
def test_gating_blocks_follow_features(name, block, places):
    model = build(name, 3)
    inserted = sl.insert(model, block)
    assert hooked(inserted) == places
    wanted = model(images())
    assert torch.equal(inserted(images()), wanted) and wanted.std() > 0


@pytest.mark.parametrize(("name", "place"), [("dla46_c", "global_pool"), ("resnetv2_18", "head.global_pool")])
@pytest.mark.parametrize("block", ["gem", "brnpa"])
def test_three_classes_are_no_three_colors(name, place, block):
    model = build(name, 3)
    inserted = sl.insert(model, block)
    assert hooked(inserted) == [place]
    taken, logits = seen(inserted, images(96))
    assert logits.shape == (2, 3) and taken.shape == (2, model.num_features, 3, 3)
    back = sl.attention.remove(inserted)
    assert torch.equal(back(images(96)), model(images(96))) and list(back.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize("classes", [1, 3, 10])
def test_the_classes_of_a_convolution_are_not_pooled(classes):
    model = sl.create_model("torchvision:squeezenet1_1", num_classes=classes, attention="brnpa").eval()
    taken, logits = seen(model, images())
    assert logits.shape == (2, classes) and taken.shape == (2, 512, 3, 3)
    assert model.classifier[1].weight.shape == (classes, 3 * 512, 1, 1)


class Branches(nn.Module):
    """Two branches side by side, one image normalized by a layer of three channels, three classes from two heads."""

    def __init__(self):
        super().__init__()
        self.normalize = nn.BatchNorm2d(3)
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.left = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, 1, 1))
        self.right = nn.Conv2d(8, 8, 1, 2)
        self.mix = nn.Conv2d(16, 12, 3, 1, 1)
        self.relu = nn.ReLU(inplace=True)
        self.norm = nn.LayerNorm(12)
        self.head, self.second = nn.Linear(12, 3), nn.Linear(12, 3)

    def forward(self, x):
        x = self.relu(self.stem(self.normalize(x)))
        x = self.mix(torch.cat([self.left(x), self.right(x)], 1))
        x = self.norm(self.relu(x).mean((2, 3)))
        return (self.head(x) + self.second(x)) / 2


def test_layers_beside_others_and_layers_that_see_the_image_are_no_places():
    torch.manual_seed(0)
    model = Branches().eval()
    inserted = sl.insert(model, "cbam")
    assert hooked(inserted) == ["stem", "mix"] and torch.equal(inserted(images()), model(images()))
    pooled = sl.insert(model, "brnpa")
    assert hooked(pooled) == ["mix"]
    assert {layer.weight.shape[-1] for layer in (pooled.norm, pooled.head, pooled.second)} == {36}
    taken, logits = seen(pooled, images())
    assert taken.shape == (2, 12, 16, 16) and logits.shape == (2, 3)
    assert [layer.weight.shape[-1] for layer in (model.norm, model.head)] == [12, 12]


@pytest.mark.parametrize("make", [Branches, lambda: build("test_resnet", 3), lambda: build("test_byobnet", 3)])
def test_a_map_is_on_the_trunk_if_nothing_of_the_image_passes_it_by(make):
    """The slow way: fix the layer's output, and see whether the logits still depend on the image."""
    torch.manual_seed(0)
    model = make().eval()
    trace = Trace(model)
    trunk = {call.name for call in trace._maps()}
    tried = [call for call in trace.calls if trace._is_features(call) and call.gives_map and call.given != call.taken]
    for call in tried:
        with call.layer.register_forward_hook(lambda layer, inputs, output: torch.ones_like(output)):
            first, second = model(images())
        assert (call.name in trunk) == torch.equal(first, second), call.name
    assert 0 < len(trunk) < len(tried)


class Last(nn.Module):
    """Patches, then layers on (b, h, w, c)."""

    def __init__(self, classes, back):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.body = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
        self.back = back
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, classes)

    def forward(self, x):
        x = self.body(self.patches(x).permute(0, 2, 3, 1))
        return self.head(self.norm(x.permute(0, 3, 1, 2)).mean((2, 3)) if self.back else x.mean((1, 2)))


@pytest.mark.parametrize("side", [8, 32])  # 32: as many rows and columns as channels
def test_maps_with_channels_last_are_told_from_maps(side):
    model = Last(3, back=False)
    model.default_cfg = {"input_size": (3, side, side)}
    for block in ("se", "gem"):
        with pytest.raises(ValueError, match=r"got Last, whose maps are \(b, h, w, c\); name the layers with at"):
            sl.insert(model, block)
    with pytest.raises(ValueError, match=r"expected a layer that yields \(b, c, h, w\), got \(1, .* 8\) from 'body'"):
        sl.insert(model, "se", at="body")
    back = Last(3, back=True).eval()
    back.default_cfg = model.default_cfg
    assert hooked(sl.insert(back, "gem")) == ["norm"]


class Reads(nn.Module):
    """Ends in any head over 8 channels."""

    def __init__(self, *head):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.ReLU())
        self.head = nn.Sequential(*head)

    def forward(self, x):
        return self.head(self.features(x))


def test_an_embedding_keeps_its_length():
    model = Reads(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    inserted = sl.insert(model, "gem")
    assert hooked(inserted) == ["head"] and inserted(images()).shape == (2, 8)
    line = r"expected a network that returns \[\(1, 8\)\], as without the block, got \[\(1, 24\)\]; name another"
    with pytest.raises(ValueError, match=line):
        sl.insert(model, "brnpa", inplace=True)
    assert not hooked(model) and list(model.state_dict()) == list(Reads().state_dict())


def test_a_head_that_cannot_be_made_anew_is_named_and_given_back():
    grouped = nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1, groups=2), nn.Flatten(), nn.Linear(8, 3)
    model = Reads(*grouped)
    with pytest.raises(ValueError, match=r"got Conv2d of 2 groups at 'head.1'; name another place or write the head"):
        sl.insert(model, "brnpa", inplace=True)
    assert not hooked(model) and model.head[1] is grouped[1] and not hasattr(model.head[0], "attention")
    assert hooked(sl.insert(model, "gap")) == ["head.0"]
    fixed = Reads(nn.AvgPool2d(15), nn.Flatten(), nn.Linear(8, 3))
    fixed.default_cfg = {"input_size": (3, 64, 64)}
    with pytest.raises(ValueError, match="expected a network that runs with the block, got Reads, which then raises: "):
        sl.insert(fixed, "gap")


def test_a_head_of_convolutions_is_made_anew():
    class Resized(Reads):
        def forward(self, x):
            x = self.features(x)
            return self.head(F.adaptive_avg_pool2d(x, 7) if x.shape[-1] < 7 else x)  # as timm's VGG does

    model = Resized(nn.Conv2d(8, 4, 7), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model.head.append(nn.Linear(4, 3))
    for size in (32, 20):  # maps of 7 x 7, which the convolution takes as they are, and of 4 x 4
        model.default_cfg = {"input_size": (3, size, size)}
        for block, width in (("gem", 8), ("brnpa", 3 * 8)):
            inserted = sl.insert(model, block)
            assert hooked(inserted) == ["features.3"] and inserted.head[0].weight.shape == (4, width, 7, 7)
            assert inserted(images()).shape == (2, 3)


def test_no_pooling_without_one_map_in_front_of_a_classifier():
    segmentation = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 3, 1))
    for model in (segmentation, build("test_resnet", features_only=True)):
        with pytest.raises(ValueError, match=r"expected a network with one map \(b, c, h, w\) that becomes one pos"):
            sl.insert(model, "brnpa")
        inserted = sl.insert(model, "se")
        for got, wanted in zip(inserted(images()), model(images()), strict=True):
            assert torch.equal(got, wanted)


def test_pools_that_join_mean_and_maximum():
    inserted = sl.insert(build("test_resnet", 3, global_pool="catavgmax"), "brnpa")
    taken, logits = seen(inserted, images())
    assert logits.shape == (2, 3) and inserted.fc.in_features == 2 * 3 * taken.shape[1]


def test_gray_images_and_pixels_moved_into_channels():
    gray = build("test_resnet", 3, in_chans=1)
    assert torch.equal(sl.insert(gray, "se")(images(channels=1)), gray(images(channels=1)))
    moved = nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(12, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert hooked(sl.insert(moved.append(nn.Linear(8, 2)), "se")) == ["2"]
    assert hooked(sl.insert(moved, "mil")) == ["3"]


def test_a_second_head_that_runs_in_training_alone():
    model = torchvision.models.googlenet(num_classes=3, aux_logits=True, init_weights=False)
    for block in ("eca", "brnpa"):
        inserted = sl.insert(model, block)
        logits = inserted(images())
        assert logits.logits.shape == logits.aux_logits1.shape == (2, 3)
    assert hooked(inserted) == ["avgpool"]


def test_a_block_that_does_not_fit_says_where():
    narrow = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2))
    with pytest.raises(ValueError, match=r"expected heads that divide 6 channels, got 4; .* \(at '2'\)"):
        sl.insert(narrow, "self_attention")


def test_functions_behind_the_last_layer():
    class Functions(Reads):
        def forward(self, x):
            return self.head(F.adaptive_avg_pool2d(F.relu(self.features(x)), 1).flatten(1))

    assert hooked(sl.insert(Functions(nn.Linear(8, 8)), "bap")) == ["features.3"]
