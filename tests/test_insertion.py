"""Attention put into other people's networks: what changes, what stays, and that it comes out again."""

import copy
import io
import re

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load, save
from torch import nn

import sightline.attention
import sightline.models
from sightline.attention.insertion import WithMaps, insert, remove
from sightline.explainers import attention_maps, explain


class SE(nn.Module):
    """The smallest gating block that keeps the contract."""

    def __init__(self, channels, *, reduction=16, identity=False):
        super().__init__()
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, max(1, channels // reduction), 1),
            nn.ReLU(),
            nn.Conv2d(max(1, channels // reduction), channels, 1),
            nn.Sigmoid(),
        )
        self.factor = 2 if identity else 1
        if identity:
            nn.init.zeros_(self.gate[3].weight)
            nn.init.zeros_(self.gate[3].bias)

    def forward(self, features):
        return features * (self.factor * self.gate(features))


class Parts(nn.Module):
    """The smallest pooling: `k` softmax maps, k-major."""

    def __init__(self, channels, *, k=3):
        super().__init__()
        self.gate = nn.Sequential(nn.Conv2d(channels, k, 1), nn.Flatten(2), nn.Softmax(2))
        self.out_channels = k * channels

    def forward(self, features):
        return torch.einsum("bkn,bcn->bkc", self.gate(features), features.flatten(2)).flatten(1)


class Mean(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.out_channels = channels

    def forward(self, features):
        return features.mean((2, 3))


class BAM(SE):
    pass


@pytest.fixture(autouse=True)
def names(monkeypatch):
    for name, block in {"se": SE, "bam": BAM, "parts": Parts}.items():
        monkeypatch.setitem(sightline.attention.ATTENTION, name, block)


def lively(model):
    """Statistics and factors unlike those of a new network, whose zeros would hide a change."""
    generator = torch.Generator().manual_seed(1)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for tensor in (layer.weight.data, layer.running_var):
                tensor.uniform_(0.5, 1.5, generator=generator)
            for tensor in (layer.bias.data, layer.running_mean):
                tensor.normal_(0, 0.1, generator=generator)
    return model.eval()


def build(name, **options):
    torch.manual_seed(0)
    source, _, name = name.rpartition(":")
    build = torchvision.models.get_model if source == "torchvision" else timm.create_model
    model = build(name, num_classes=7, **options)
    if name == "vgg11":  # its 120 million weights behind the pooling would take most of the time
        model.classifier = nn.Sequential(nn.Linear(512 * 7 * 7, 8), nn.ReLU(), nn.Linear(8, 7))
    return lively(model)


def images(count=2, side=64):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def blocks(model, kind=SE):
    return {name.removesuffix(".attention"): block for name, block in model.named_modules() if type(block) is kind}


def stuck(model, steps=5):
    """Parameters of blocks that 5 steps of AdamW without weight decay leave as they are."""
    model = model.double().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images(4).double()), torch.arange(4)).backward()
        optimizer.step()
    return [name for name, p in model.named_parameters() if ".attention." in name and torch.equal(p, before[name])]


class LoopingStage(nn.Module):
    """Runs all its children, whoever they are, as stages of timm's RegNet do."""

    def __init__(self):
        super().__init__()
        self.b1 = nn.Conv2d(4, 8, 3, padding=1)
        self.b2 = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        for child in self.children():
            x = child(x)
        return x


def looping(**_):
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), LoopingStage(), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 7)
    return nn.Sequential(*layers).eval()


RESNET18 = [f"layer{i}.{j}.bn2" for i in range(1, 5) for j in range(2)]
NETWORKS = {
    "resnet18": RESNET18,
    "torchvision:resnet18": RESNET18,
    "resnetv2_50": [f"stages.{i}.blocks.{j}.conv3" for i, n in enumerate((3, 4, 6, 3)) for j in range(n)],
    "regnety_002": [f"s{i}.b{j}.conv3" for i, n in enumerate((1, 1, 4, 7), 1) for j in range(1, n + 1)],
    "densenet121": ["features.denseblock1", "features.denseblock2", "features.denseblock3", "features.denseblock4"],
    "torchvision:densenet121": [f"features.denseblock{i}" for i in range(1, 5)],
    "mobilenetv3_small_100": [f"blocks.{b}.bn3" for b in ("1.1", "2.1", "2.2", "3.1", "4.1", "4.2")],
    "torchvision:mobilenet_v2": [f"features.{i}.conv.3" for i in (3, 5, 6, 8, 9, 10, 12, 13, 15, 16)],
    "convnext_atto": ["stages.0", "stages.1", "stages.2", "stages.3"],
    "torchvision:vgg11": ["features.1", "features.4", "features.9", "features.14", "features.19"],
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_places_of_the_paper_keep_every_bit_and_key(name):
    model = build(name)
    torch.manual_seed(3)
    inserted = insert(model, "se")
    hooked = [place for place, layer in inserted.named_modules() if layer._forward_hooks]
    assert hooked == NETWORKS[name]
    wanted, got = model(images()), inserted(images())
    assert torch.equal(got, wanted) and wanted.std() > 0
    new = inserted.state_dict().keys() - model.state_dict().keys()
    assert all(torch.equal(inserted.state_dict()[key], value) for key, value in model.state_dict().items())
    parts = [key.rpartition(".attention.")[2] for key in new]
    assert {part: parts.count(part) for part in parts} == dict.fromkeys(SE(2).state_dict(), len(hooked)) | {
        "inserted_as_identity": len(hooked)
    }
    for block in blocks(inserted).values():
        nn.init.normal_(block.gate[3].bias)
    assert not torch.allclose(inserted(images()), wanted)
    removed = remove(inserted)
    assert list(removed.state_dict()) == list(model.state_dict()) and torch.equal(removed(images()), wanted)
    assert not any(layer._forward_hooks or hasattr(layer, "attention") for layer in removed.modules())
    assert blocks(inserted)


def test_every_block_runs_once_on_what_its_layer_yields():
    for make, at in ((looping, "1"), (lambda: build("densenet121"), "features.denseblock2")):
        inserted = insert(make(), "se", at=at)
        (block,) = blocks(inserted).values()
        seen = []
        block.register_forward_hook(lambda _, inputs, output, seen=seen: seen.append((inputs[0], output)))
        layer = inserted.get_submodule(at)
        layer.register_forward_hook(lambda _, inputs, output, seen=seen: seen.append(output))
        inserted(images())
        assert len(seen) == 2 and seen[0][1] is seen[1] and seen[1].shape == seen[0][0].shape


def test_resnet50_has_sixteen_places_before_the_sum_and_three_after_stages():
    model = build("resnet50")
    inserted = insert(model, "se")
    found = blocks(inserted)
    assert list(found) == [f"layer{i}.{j}.bn3" for i, n in enumerate((3, 4, 6, 3), 1) for j in range(n)]
    channels = [block.gate[1].in_channels for block in found.values()]
    assert channels == [256] * 3 + [512] * 4 + [1024] * 6 + [2048] * 3
    seen = {}
    bottleneck = inserted.layer1[0]
    found["layer1.0.bn3"].register_forward_hook(lambda *call: seen.update(branch=call[2].clone()))
    bottleneck.downsample.register_forward_hook(lambda *call: seen.update(shortcut=call[2].clone()))
    bottleneck.register_forward_hook(lambda *call: seen.update(sum=call[2]))
    inserted(images())
    assert torch.equal(seen["sum"], (seen["branch"] + seen["shortcut"]).relu())

    bams = insert(model, "bam", init="fresh")
    assert list(blocks(bams, BAM)) == ["layer1.2", "layer2.3", "layer3.5"]
    assert [block.gate[1].in_channels for block in blocks(bams, BAM).values()] == [256, 512, 1024]
    assert list(blocks(insert(model, BAM), BAM)) == ["layer1.2", "layer2.3", "layer3.5"]


def test_layers_are_reached_as_before():
    inserted = insert(build("torchvision:resnet18"), "se", at=["layer1", "layer2.0.bn1"])
    assert len(inserted.layer1) == 2 and inserted.layer1[0].conv1.weight.shape == (64, 64, 3, 3)
    assert inserted.fc.in_features == 512 and isinstance(inserted.layer2[0].bn1, nn.BatchNorm2d)
    assert len(list(inserted.children())) == 10


@pytest.mark.parametrize(
    ("at", "places"),
    [
        ("layer3", ["layer3.1"]),
        (["layer4", "layer1.0.bn1"], ["layer4.1", "layer1.0.bn1"]),
        ("layer*.[0-9]", [f"layer{i}.{j}" for i in range(1, 5) for j in range(2)]),
        ("layer[34].0.bn?", [f"layer{i}.0.bn{j}" for i in (3, 4) for j in (1, 2)]),
        ("conv1", ["conv1"]),
    ],
)
def test_names_and_patterns(at, places):
    model = build("resnet18")
    inserted = insert(model, "se", at=at, reduction=4)
    assert set(blocks(inserted)) == set(places)
    assert torch.equal(inserted(images()), model(images()))


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "regnety_002"])
def test_no_new_parameter_is_stuck(name):
    model = build(name)
    wide = [place for place, block in blocks(insert(model, "se")).items() if block.gate[1].in_channels >= 128]
    wide = [place.removesuffix(".denselayer6") for place in wide]
    places = NETWORKS[name] if name == "densenet121" else wide
    torch.manual_seed(0)
    inserted = insert(model, "se", at=places)
    assert len(blocks(inserted)) == len(places) >= 4
    assert stuck(inserted) == []


def test_stuck_parameters_would_be_found():
    class Dead(SE):
        def forward(self, features):
            return features * (2 * self.gate[4](0 * self.gate[3](self.gate[:3](features))))

    assert len(stuck(insert(build("resnet18"), Dead, at="layer4"))) == 4


@pytest.mark.parametrize(
    ("name", "place", "head"),
    [
        ("resnet18", "global_pool", ["fc"]),
        ("torchvision:resnet18", "avgpool", ["fc"]),
        ("torchvision:densenet121", "features.norm5", ["classifier"]),
        ("torchvision:mobilenet_v2", "features.18.2", ["classifier.1"]),
        ("mobilenetv3_small_100", "global_pool", ["conv_head"]),
        ("convnext_atto", "head.global_pool", ["head.norm", "head.fc"]),
        ("regnety_002", "head.global_pool", ["head.fc"]),
        ("torchvision:vgg11", "avgpool", ["classifier.0"]),
    ],
)
def test_a_pooling_takes_the_place_of_the_global_pool(name, place, head):
    model = build(name)
    inserted = insert(model, "parts", k=2)
    assert list(blocks(inserted, Parts)) == [place]
    old, new = model.state_dict(), inserted.state_dict()
    changed = {key.rpartition(".")[0] for key in old if new[key].shape != old[key].shape}
    assert changed == set(head)
    assert inserted(images()).shape == (2, 7)
    removed = remove(inserted)
    assert list(removed.state_dict()) == list(old) and torch.equal(removed(images()), model(images()))


@pytest.mark.parametrize("name", ["torchvision:resnet18", "cifar_resnet", "resnet18", "vgg_gap"])
def test_a_pooling_is_tried_on_the_features_not_on_their_mean(name):
    model = sightline.models.create_model(name, num_classes=7, attention="brnpa").eval()
    (maps,) = attention_maps(model, torch.rand(2, 3, 96, 96)).values()
    assert maps.shape[1] == 3 and maps.shape[2] * maps.shape[3] > 3


def test_a_pooling_reads_the_last_features_and_feeds_the_classifier():
    inserted = insert(build("resnet18"), "parts")
    seen = {}
    inserted.layer4.register_forward_hook(lambda *call: seen.update(features=call[2]))
    logits = inserted(images())
    pooled = inserted.global_pool.attention(seen["features"])
    torch.testing.assert_close(inserted.fc(pooled), logits, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["resnet18", "torchvision:densenet121", "mobilenetv3_small_100"])
def test_the_mean_in_place_of_the_global_average_changes_nothing(name):
    model = build(name)
    inserted = insert(model, Mean)
    wanted = model(images())
    if name == "torchvision:densenet121":  # it averages behind its last ReLU, which a pooling comes before
        assert not torch.allclose(inserted(images()), wanted)
    else:
        torch.testing.assert_close(inserted(images()), wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())
    assert inserted.state_dict().keys() == model.state_dict().keys()


def test_the_original_is_left_alone_unless_inplace():
    model = build("resnet18").train()
    model.bn1.eval()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    inserted = insert(model, lambda channels: nn.Identity())
    assert torch.equal(torch.get_rng_state(), state)
    assert not hasattr(model.layer1[0].bn2, "attention") and inserted.layer1[0].bn2.attention.training
    for network in (model, inserted):
        assert network.layer1.training and not network.bn1.training
        assert all(torch.equal(network.state_dict()[key], value) for key, value in before.items())
        assert all(p.grad is None for p in network.parameters())
    assert insert(model, "se", inplace=True) is model and len(blocks(model)) == 8
    assert remove(model, inplace=True) is model and model.state_dict().keys() == before.keys()


def test_finding_the_places_moves_no_buffer():
    class Counting(nn.Conv2d):
        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    model = nn.Sequential(Counting(3, 4, 3), nn.ReLU())
    model[0].register_buffer("calls", torch.tensor(0))
    assert insert(model, "se", at="1", inplace=True)[0].calls == 0


def test_a_refused_insertion_leaves_a_model_without_blocks():
    model = build("resnet18")
    with pytest.raises(ValueError, match="yields"):
        insert(model, "se", at=["layer1", "fc"], inplace=True)
    assert not blocks(model) and not any(layer._forward_hooks for layer in model.modules())


def test_saving_loading_copying_and_pickling():
    inserted = insert(build("resnet18"), "se", init="fresh")
    wanted = inserted(images())
    again = insert(build("resnet18"), "se", init="fresh")
    again.load_state_dict(load(save(inserted.state_dict())))
    assert torch.equal(again(images()), wanted)
    doubled = insert(build("resnet18"), "se")
    with pytest.raises(RuntimeError, match="inserted_as_identity"):
        doubled.load_state_dict(inserted.state_dict())
    pickled = io.BytesIO()
    torch.save(inserted, pickled)
    pickled.seek(0)
    for clone in (copy.deepcopy(inserted), torch.load(pickled, weights_only=False)):
        assert torch.equal(clone(images()), wanted)
        for block in blocks(clone).values():
            nn.init.zeros_(block.gate[3].weight)
        assert not torch.allclose(clone(images()), wanted) and torch.equal(inserted(images()), wanted)
        assert remove(clone).state_dict().keys() == build("resnet18").state_dict().keys()
    missing = again.load_state_dict(build("resnet18").state_dict(), strict=False)
    assert all(".attention." in key for key in missing.missing_keys) and not missing.unexpected_keys
    part = copy.deepcopy(inserted.layer1)
    features = torch.randn(1, 64, 8, 8)
    assert torch.equal(part(features), inserted.layer1(features)) and len(blocks(part)) == 2


def test_several_kinds_come_out_together():
    model = build("resnet18")
    inserted = insert(insert(insert(model, "bam"), "se"), "parts")
    assert (len(blocks(inserted)), len(blocks(inserted, BAM)), len(blocks(inserted, Parts))) == (8, 3, 1)
    removed = remove(inserted)
    assert list(removed.state_dict()) == list(model.state_dict()) and torch.equal(removed(images()), model(images()))


def test_dtype_and_memory_format():
    for changed in (build("resnet18").double(), build("resnet18").to(memory_format=torch.channels_last)):
        inserted = insert(changed, "se", at="layer3", init="fresh")
        assert all(p.dtype == changed.fc.weight.dtype for p in inserted.parameters())
        batch = images().to(changed.fc.weight.dtype)
        fast = batch.to(memory_format=torch.channels_last)
        torch.testing.assert_close(inserted(fast), inserted(batch), rtol=1e-4, atol=1e-4)


def test_maps_and_explanations_of_inserted_blocks():
    inserted = insert(build("resnet18"), "se", at="layer3", init="fresh")
    spatial = insert(inserted, lambda channels: Gated(channels), at="layer2", init="fresh")
    found = attention_maps(spatial, images())
    assert {name: tuple(weights.shape) for name, weights in found.items()} == {
        "layer2.1.attention": (2, 1, 8, 8),
        "layer3.1.attention": (2, 256, 1, 1),
    }
    explanation = explain(spatial, images(), methods=("attention", "grad_cam"), layer="layer2.1.attention")
    torch.testing.assert_close(explanation["attention"], found["layer2.1.attention"])
    assert explain(spatial, images(), methods=("grad_cam",), layer="layer3")["grad_cam"].shape == (2, 1, 4, 4)


class Gated(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.gate = nn.Sequential(nn.Conv2d(channels, 1, 1), nn.Sigmoid())

    def forward(self, features):
        return features * self.gate(features)


def test_with_maps():
    inserted = insert(build("resnet18"), Gated, at=["layer2", "layer3"], init="fresh")
    model = WithMaps(inserted)
    logits, *maps = model(images())
    assert torch.equal(logits, inserted(images())) and model.names == ["layer2.1.attention", "layer3.1.attention"]
    for name, weights in attention_maps(inserted, images()).items():
        torch.testing.assert_close(maps[model.names.index(name)], weights)
    assert not any(layer.gate._forward_hooks for layer in blocks(inserted, Gated).values())
    with pytest.raises(ValueError, match="expected a model with attention blocks, got ResNet without"):
        WithMaps(build("resnet18"))


BAD = [
    ({"block": "see"}, "unknown attention 'see'; did you mean 'se'"),
    ({"at": "layer5"}, "no layer is named 'layer5'; did you mean 'layer4' or 'layer3' or 'layer2'?"),
    ({"at": ["layer1", "layer1.*.bnn2"]}, "no layer is named 'layer1.*.bnn2'; did you mean 'layer1.1.bn2'"),
    ({"at": []}, "expected at least one layer to insert at, got none; leave `at` out for the paper's places"),
    ({"at": "fc"}, "expected a layer that yields (b, c, h, w), got (1, 7) from 'fc'; name another"),
    ({"at": ["layer1", "layer1.1"]}, "expected one block per layer, got two for 'layer1.1'; name fewer layers"),
    ({"at": "layer1.0.relu"}, "got 'layer1.0.relu', which it runs 2 times; name another layer"),
    ({"init": "zero"}, "expected init to be one of identity, fresh; got 'zero'"),
    ({"reductoin": 4}, "se has no option 'reductoin'; did you mean 'reduction'?; it has: reduction, identity"),
    ({"block": Gated}, "expected a block that returns its input while it is new, got one that changes it by up to"),
    ({"block": lambda c: nn.Conv2d(c, 2, 1)}, "expected a block that keeps the shape, (1, 64, 56, 56)"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
@pytest.mark.usefixtures("unchecked")
def test_bad_input_is_one_clear_line(options, message):
    model = build("torchvision:resnet18")
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        insert(model, **{"block": "se", **options})
    assert "\n" not in str(error.value)


def test_more_refusals():
    model = build("torchvision:resnet18")
    with pytest.raises(ValueError, match=r"expected a layer without a block, got 'layer1', which has one"):
        insert(insert(model, "se", at="layer1.1"), "se", at="layer1")
    with pytest.raises(ValueError, match=r"got 'layer1.0.bn2', which has one"):
        insert(insert(model, "se"), "bam", at="layer1.0.bn2")
    with pytest.raises(ValueError, match="expected a model with inserted blocks, got ResNet without"):
        remove(model)
    model.aside = nn.Conv2d(3, 3, 1)
    with pytest.raises(ValueError, match="got 'aside', which it never runs"):
        insert(model, "se", at="aside")
    tokens = timm.create_model("vit_tiny_patch16_224")
    with pytest.raises(ValueError, match=r"got \(1, 197, 192\) from 'blocks.0'; name another"):
        insert(tokens, "se", at="blocks.0")
    with pytest.raises(ValueError, match=r"expected a model that takes images of 3 channels .* got Sequential, which"):
        insert(nn.Sequential(nn.Flatten(), nn.Linear(5, 2)), "se", at="0")
    own = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    own[0].attention = nn.Identity()
    with pytest.raises(ValueError, match="expected a layer without a child `attention`, got '0', which has one"):
        insert(own, "se", at="0")


def compiled_cases():
    torch.manual_seed(0)
    yield insert(build("resnet18"), "se", init="fresh")
    yield insert(build("regnety_002"), "se", at=["s1", "s2.b1.conv3"], init="fresh")
    yield insert(looping(), "se", at="1", init="fresh")
    yield insert(build("torchvision:resnet18"), "parts")


@pytest.mark.compile
@pytest.mark.parametrize("case", [*(pytest.param(n, marks=pytest.mark.slow) for n in range(3)), 3])
def test_compiled_without_breaks_and_exported(case):
    inserted = list(compiled_cases())[case]
    wanted = inserted(images())
    compiled = torch.compile(inserted, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images()), wanted)
    torch._dynamo.reset()
    exported = torch.export.export(inserted, (images(),)).module()
    torch.testing.assert_close(exported(images()), wanted)


@pytest.mark.compile
def test_onnx_returns_the_maps_too(tmp_path):
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name)
    runtime = pytest.importorskip("onnxruntime")
    model = WithMaps(insert(build("resnet18"), Gated, at=["layer2", "layer3"], init="fresh")).eval()
    file = tmp_path / "model.onnx"
    torch.onnx.export(
        model, (images(),), file, dynamo=True, input_names=["images"], output_names=["logits", *model.names]
    )
    session = runtime.InferenceSession(str(file))
    assert [output.name for output in session.get_outputs()] == ["logits", *model.names]
    for got, wanted in zip(session.run(None, {"images": images().numpy()}), model(images()), strict=True):
        torch.testing.assert_close(torch.from_numpy(got), wanted, rtol=0, atol=1e-4)
