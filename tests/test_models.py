"""The networks: exact parameter counts, identities, any size, one clear line for every bad request."""

import math
from itertools import product

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from sightline.attention import LearnToPayAttention
from sightline.explainers import explain
from sightline.facts import Notice
from sightline.models import MODELS, create_model, preprocess_of
from sightline.models.ltpa import with_gradient

VGGS = [name for name in MODELS if name.startswith("vgg")]
SMALL = {"width": 1 / 16, "stem_pool": 2}


def small(name, seed=0, **options):
    torch.manual_seed(seed)
    return create_model(name, **{**SMALL, **options})


def images(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


@pytest.mark.parametrize(
    ("name", "options", "counts"),
    [
        ("vgg", {}, {10: 14_991_946, 100: 15_038_116}),
        ("vgg_att", {}, {10: 19_714_123, 100: 19_760_293, 200: 19_811_593}),
        ("vgg_att2", {"compat": "dp"}, {10: 19_719_754, 100: 19_812_004, 200: 19_914_504}),
        ("vgg_att2", {}, {10: 19_720_780, 100: 19_813_030, 200: 19_915_530}),
        ("vgg_att2", {"head": "indep"}, {10: 19_720_790, 100: 19_813_130, 200: 19_915_730}),
        ("vgg_att3", {}, {10: 19_856_461, 100: 19_971_751, 200: 20_099_851}),
        ("vgg_att3", {"project": "l"}, {10: 19_860_045, 100: 19_998_375, 200: 20_152_075}),
    ],
)
def test_parameter_counts(name, options, counts):
    for num_classes, count in counts.items():
        with torch.device("meta"):
            model = create_model(name, num_classes=num_classes, **options)
        assert sum(p.numel() for p in model.parameters()) == count


def test_the_dead_branch_of_pc_with_softmax_has_the_published_size():
    with torch.device("meta"):
        for name, dead in (("vgg_att2", 4_984_320), ("vgg_att3", 5_116_672)):
            full, lean = create_model(name), create_model(name, compat="none")
            assert sum(p.numel() for p in full.parameters()) - sum(p.numel() for p in lean.parameters()) == dead


@pytest.mark.parametrize("name", VGGS)
def test_layers_of_a_32_pixel_image(name):
    shapes = {}
    model = small(name, stem_pool=1).eval()
    for layer, module in model.features.named_children():
        module.register_forward_hook(lambda _m, _i, out, layer=layer: shapes.update({layer: tuple(out.shape[1:])}))
    assert model(images(2, 3, 32, 32)).shape == (2, 10)
    conv2, conv7, conv10, conv13 = (32, 8, 4, 2) if name == "vgg" else (32, 32, 16, 8)
    assert shapes["conv2"] == (4, conv2, conv2)
    assert shapes["conv7"] == (16, conv7, conv7)
    assert shapes["conv10"] == (32, conv10, conv10)
    assert shapes["conv13"] == (32, conv13, conv13)
    if "conv15" in shapes:
        assert shapes["conv14"] == (32, 4, 4) and shapes["conv15"] == (32, 2, 2)


def test_dropout_and_batchnorm_of_the_authors():
    rates = [0.3, 0, 0.4, 0, 0.4, 0.4, 0, 0.4, 0.4, 0, 0.4, 0.4, 0, 0.4, 0.4]
    for factor in (1.0, 0.5, 0):
        model = small("vgg_att3", dropout=factor)
        convs = [layer for name, layer in model.features.named_children() if name.startswith("conv")]
        assert [sum(m.p for m in conv if isinstance(m, nn.Dropout)) for conv in convs] == [factor * r for r in rates]
        assert [m.p for m in model.fc1 if isinstance(m, nn.Dropout)] == [0.5]
    assert {m.eps for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {1e-3}


@pytest.mark.parametrize("name", VGGS)
@pytest.mark.parametrize("size", [(32, 32), (33, 33), (48, 40), (80, 80), (16, 16), (7, 5), (1, 1)])
def test_any_size(name, size):
    assert small(name, stem_pool=1, num_classes=3).eval()(images(1, 3, *size)).shape == (1, 3)


@pytest.mark.parametrize("size", [(40, 40), (80, 48), (33, 37)])
@pytest.mark.parametrize("stem_pool", [1, 2, 3])
@pytest.mark.parametrize("read", ["before", "after"])
def test_sides_of_the_maps(size, stem_pool, read):
    model = small("vgg_att3", stem_pool=stem_pool, read=read).eval()
    maps = record(model, [f"attention.{level}.gate" for level in model.attention], images(1, 3, *size))
    sides = [math.ceil(side / stem_pool) for side in size]
    for level, weights in enumerate(maps.values()):
        pools = level if read == "before" else level + 1
        assert weights.shape == (1, 1, *(math.ceil(side / 2**pools) for side in sides))


def record(model, layers, batch):
    found = {}
    handles = [
        model.get_submodule(layer).register_forward_hook(lambda _m, _i, out, layer=layer: found.update({layer: out}))
        for layer in layers
    ]
    model(batch)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize(
    ("name", "options", "layer"),
    [
        ("vgg_att", {}, "features.conv13"),
        ("vgg_att2", {"compat": "none"}, "features.conv13"),
        ("vgg_att3", {"read": "after"}, "features.pool13"),
        ("vgg_att3", {"read": "after", "compat": "none"}, "features.pool13"),
        ("vgg_pan", {}, "features.conv13"),
    ],
)
def test_default_layer_is_what_the_last_attention_reads(name, options, layer):
    model = small(name, **options).eval()
    last = list(model.attention.values())[-1]
    seen = []
    last.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    features = record(model, [layer], images(2, 3, 40, 40))[layer]
    assert model.default_layer == layer
    assert isinstance(last, LearnToPayAttention) and torch.equal(features, seen[0])


@pytest.mark.parametrize("name", VGGS)
@pytest.mark.parametrize("width", [0.25, 0.3, 0.01])
def test_widths(name, width):
    model = create_model(name, width=width).eval()
    convs = [m for m in model.features.modules() if isinstance(m, nn.Conv2d)]
    assert [c.out_channels for c in convs][:3] == [max(1, round(64 * width))] * 2 + [max(1, round(128 * width))]
    assert model(images(2, 3, 32, 32)).isfinite().all()


@pytest.mark.parametrize("name", ["vgg_att", "vgg_att2", "vgg_att3"])
@pytest.mark.parametrize("project", ["g", "l"])
def test_pc_with_softmax_is_none_with_softmax_and_g_gets_no_gradient(name, project):
    full = small(name, project=project)
    lean = small(name, project=project, compat="none", seed=1)
    missing, unexpected = lean.load_state_dict(full.state_dict(), strict=False)
    dead = ("features.conv14.", "features.conv15.", "fc1.", "attention.conv7.project_query.")
    assert not missing and unexpected and all(key.startswith(dead) for key in unexpected)
    batch = images(4, 3, 40, 40)
    wanted = lean.eval()(batch)
    torch.testing.assert_close(full.eval()(batch), wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())
    assert share_of_gradient(full, batch, dead) < 1e-7


@pytest.mark.parametrize("options", [{"norm": "sigmoid"}, {"compat": "dp"}, {"compat": "dp", "norm": "sigmoid"}])
def test_otherwise_g_matters(options):
    dead = ("features.conv14.", "features.conv15.", "fc1.", "attention.conv7.project_query.")
    assert share_of_gradient(small("vgg_att3", **options), images(4, 3, 40, 40), dead) > 1e-4


def share_of_gradient(model, batch, prefixes):
    without_dropout(model.train())(batch).square().sum().backward()
    branch = max(p.grad.abs().max() for key, p in model.named_parameters() if key.startswith(prefixes))
    return (branch / model.get_parameter("features.conv1.0.weight").grad.abs().max()).item()


def test_settings_change_nothing_but_their_own_keys():
    states = [
        small("vgg_att3", compat=compat, norm=norm, read=read).state_dict()
        for compat, norm, read in product(("pc", "dp", "none"), ("softmax", "sigmoid"), ("before", "after"))
    ]
    for one, other in product(states, states):
        assert all(one[key].shape == other[key].shape for key in one.keys() & other.keys())
    assert "attention.conv7.gate.u.weight" in states[0] and "features.conv13.0.weight" in states[0]


def test_the_control_has_the_same_trunk_and_no_attention():
    control, attended = small("vgg15").state_dict(), small("vgg_att").state_dict()
    assert {key for key in attended if key not in control} == {
        "attention.conv13.gate.u.weight",
        "attention.conv13.gate.u.bias",
    }
    assert set(control) < set(attended) and all(attended[key].shape == value.shape for key, value in control.items())
    assert not hasattr(small("vgg15"), "attention")


def test_indep_averages_probabilities():
    model = small("vgg_att3", head="indep", official_head=False).eval()
    batch = images(4, 3, 40, 40)
    levels = record(model, [f"attention.{level}" for level in model.attention], batch)
    each = [linear(v).softmax(1) for linear, v in zip(model.head.linear, levels.values(), strict=True)]
    torch.testing.assert_close(model(batch), torch.stack(each).mean(0).log())
    torch.testing.assert_close(model(batch).exp().sum(1), torch.ones(4))


def test_concat_classifies_all_levels_together():
    model = small("vgg_att3", official_head=False).eval()
    batch = images(4, 3, 40, 40)
    levels = record(model, [f"attention.{level}" for level in model.attention], batch)
    assert [v.shape[1] for v in levels.values()] == [16, 32, 32]
    torch.testing.assert_close(model(batch), model.head.linear(torch.cat(list(levels.values()), 1)))


@pytest.mark.parametrize("name", [n for n in VGGS if n != "vgg_gap"])
def test_official_head_normalizes_rectifies_and_drops(name):
    steps = [type(m) for m in small(name).head.prepare[0]]
    assert steps == [nn.BatchNorm1d, nn.ReLU, nn.Dropout]
    assert len(small(name, official_head=False).head.prepare[0]) == 0


def test_the_mask_of_progressive_attention_is_fed_forward():
    model = small("vgg_pan").eval()
    batch = images(2, 3, 40, 40)
    got = record(model, ["features.conv10", "attention.conv10.gate", "attention.conv10"], batch)
    features, mask, masked = got.values()
    assert mask.shape == (2, 1, 10, 10) and (mask > 0).all() and (mask < 1).all()
    torch.testing.assert_close(masked, features * mask)
    seen = []
    model.features.pool10.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    model(batch)
    assert torch.equal(seen[0], masked)


def test_branches_average_their_gradients_and_keep_the_forward_pass():
    batch = images(4, 3, 40, 40)
    one, other = small("vgg_att3"), small("vgg_att3", average_branch_grads=True)
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.eval()(batch), other.eval()(batch))

    for level, compat in (("conv13", "pc"), ("conv13", "none"), ("conv10", "none")):
        shares = []
        for average in (False, True):
            model = small("vgg_att2", compat=compat, average_branch_grads=average, seed=3).eval()
            model(batch).square().sum().backward()
            shares.append(model.get_parameter(f"features.{level}.0.weight").grad)
        factor = 1.0 if (level, compat) == ("conv13", "none") else 0.5
        torch.testing.assert_close(shares[1], factor * shares[0])

    g = []
    for average in (False, True):
        model = small("vgg_att3", compat="dp", average_branch_grads=average, seed=3).eval()
        model(batch).square().sum().backward()
        g.append(model.fc1.linear.weight.grad)
    torch.testing.assert_close(g[1], g[0] / 3)


def test_with_gradient():
    x = torch.tensor([0.1, 3.0], requires_grad=True)
    y = with_gradient(x, 1 / 3)
    y.sum().backward()
    assert torch.equal(y, x) and x.grad.tolist() == pytest.approx([1 / 3, 1 / 3])


def test_initialization_of_the_paper():
    torch.manual_seed(0)
    model = create_model("vgg_att", width=0.5)
    for name in ("conv3", "conv8"):
        conv = model.get_submodule(f"features.{name}.0")
        assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / (9 * conv.out_channels)), rel=0.05)
        assert not conv.bias.any()
    for linear in (model.fc1.linear, model.attention.conv13.gate.u):
        assert 0.8 / 16 < linear.weight.abs().max().item() <= 1 / math.sqrt(256)


@pytest.mark.parametrize("name", VGGS)
def test_channels_last_and_single_images_give_the_same_logits(name):
    model, batch = small(name).eval(), images(3, 3, 40, 40)
    with torch.no_grad():
        wanted = model(batch)
        tolerance = 1e-5 * wanted.abs().max().item()
        one_by_one = torch.cat([model(image[None]) for image in batch])
        torch.testing.assert_close(one_by_one, wanted, rtol=0, atol=tolerance)
        model = model.to(memory_format=torch.channels_last)
        last = model(batch.contiguous(memory_format=torch.channels_last))
        torch.testing.assert_close(last, wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", VGGS)
def test_half_precision_is_finite(name):
    model, batch = small(name), images(2, 3, 40, 40)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(batch)
    logits.float().square().sum().backward()
    assert logits.isfinite().all() and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert model.bfloat16()(batch.bfloat16()).isfinite().all()


@pytest.mark.parametrize("name", VGGS)
def test_every_parameter_learns_except_the_dead_branch(name):
    model = small(name, **({"compat": "dp"} if name.startswith("vgg_att") else {})).train()
    model(images(4, 3, 40, 40)).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_names_have_one_line_each():
    for name, builder in MODELS.items():
        line = builder.__doc__.splitlines()[0]
        assert line.endswith(".") and len(line) < 120, name


@pytest.mark.parametrize("weights", ["file", "folder", "string"])
def test_weights_of_a_file_or_a_run_folder(tmp_path, weights):
    trained, batch = small("vgg_att2", num_classes=3).eval(), images(2, 3, 40, 40)
    save_file(trained.state_dict(), tmp_path / "model.safetensors")
    given = {"file": tmp_path / "model.safetensors", "folder": tmp_path, "string": str(tmp_path)}[weights]
    model = small("vgg_att2", seed=1, num_classes=3, weights=given).eval()
    assert torch.equal(model(batch), trained(batch))


def test_weights_that_do_not_fit(tmp_path):
    file = tmp_path / "model.safetensors"
    state = small("vgg_att2", num_classes=3).state_dict()
    save_file(state, file)
    with pytest.raises(
        ValueError,
        match=r"do not fit vgg_att2: head.linear.weight has shape \(3, 64\) instead of \(10, 64\), head.linear.bias",
    ):
        small("vgg_att2", weights=file)
    with pytest.raises(
        ValueError, match=r"do not fit vgg_att3: attention.conv7.project_query.0.weight is missing, .* \(and \d+ more\)"
    ):
        small("vgg_att3", num_classes=3, weights=tmp_path)
    with pytest.raises(ValueError, match=r"do not fit vgg_att: .*attention.conv10.gate.u.bias is unknown to the model"):
        small("vgg_att", num_classes=3, weights=tmp_path)
    with pytest.raises(OSError, match=r"expected weights in .*nothing.safetensors, found no such file"):
        small("vgg_att2", weights=tmp_path / "nothing.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        OSError, match=r"expected weights in .*empty/model.safetensors, found no such file; give a safet"
    ):
        small("vgg_att2", weights=tmp_path / "empty")
    for content in (b"", b"not weights", file.read_bytes()[:-100]):
        file.write_bytes(content)
        with pytest.raises(OSError, match=r"expected weights as safetensors or .* cannot read .*; is it complete\?"):
            small("vgg_att2", num_classes=3, weights=file)
    with pytest.raises(ValueError, match="'vgg_att2' has no pretrained weights, only timm models have"):
        small("vgg_att2", weights="pretrained")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vgg_at2", {}, "unknown model 'vgg_at2'; did you mean 'vgg_att2'"),
        ("resnet51", {}, "unknown model 'resnet51'; did you mean '.*resnet50'"),
        ("§", {}, "unknown model '§'; see `sightline list models`"),
        ("torchvision:resnet19", {}, "unknown model 'torchvision:resnet19'; did you mean 'torchvision:resnet18'"),
        (
            "vgg_att2",
            {"widht": 0.5},
            "vgg_att2 has no option 'widht'; did you mean 'width'.; it has: compat, norm, head, ",
        ),
        ("vgg", {"compat": "pc"}, "vgg has no option 'compat'; it has: width, stem_pool, dropout, official_head"),
        ("vgg_att", {"compat": "pd"}, "option compat of vgg_att: expected 'pc' or 'dp' or 'none', got 'pd'"),
        ("vgg_att", {"head": None}, "option head of vgg_att: expected 'concat' or 'indep', got None"),
        ("vgg_att", {"width": "wide"}, "option width of vgg_att: expected float, got 'wide'"),
        ("vgg_att", {"stem_pool": True}, "option stem_pool of vgg_att: expected int, got True"),
        ("vgg_att", {"official_head": 1}, "option official_head of vgg_att: expected bool, got 1"),
        ("vgg_att", {"width": 0.0}, r"expected width above 0 .*, got 0.0"),
        ("vgg_att", {"width": math.nan}, r"expected width above 0 .*, got nan"),
        ("vgg", {"width": math.inf}, r"expected width above 0 .*, got inf"),
        ("vgg_pan", {"dropout": 1.5}, r"expected dropout between 0 .*, got 1.5"),
        ("vgg15", {"stem_pool": 0}, r"expected stem_pool of 1 .no pool. or more, got 0"),
        ("vgg", {"num_classes": 0}, "expected num_classes of 1 or more, got 0"),
        ("resnet18", {"attentoin": "se"}, "timm cannot build 'resnet18': .*attentoin"),
        ("resnet18.a1_in2k", {}, "timm cannot build 'resnet18.a1_in2k': Invalid pretrained tag"),
        ("torchvision:resnet18", {"widht": 2}, "torchvision cannot build 'torchvision:resnet18': .*widht"),
        # a file names no class, and no library checks its numbers
        (
            "test_resnet",
            {"act_layer": "nothing"},
            "timm cannot build 'test_resnet': .*nothing.*; leave out act_layer, which takes a class, not 'nothing'",
        ),
        ("test_resnet", {"block": "BasicBlock"}, "timm cannot build .*; leave out block, which takes a class"),
        (
            "test_resnet",
            {"norm_layer": [1]},
            "timm cannot build .*; leave out norm_layer, which takes a class, not .1.",
        ),
        ("test_resnet", {"global_pool": 0}, "timm cannot build 'test_resnet': .*lower"),
        ("test_vit", {"patch_size": 0}, "timm cannot build 'test_vit': .*zero"),
        ("test_vit", {"embed_dim": 0}, "timm cannot build 'test_vit': ."),
        ("torchvision:resnet18", {"norm_layer": "x"}, "torchvision cannot build .*; leave out norm_layer"),
        ("tiny_vit", {"patch": 0}, "cannot build 'tiny_vit': expected a patch that divides size 40, got 0"),
        ("tiny_vit", {"width": 0}, "cannot build 'tiny_vit': expected a width and a depth of 1 or more, got 0 and 4"),
    ],
)
def test_a_bad_request_is_one_clear_line(name, options, message):
    with pytest.raises(ValueError, match=message) as error:
        create_model(name, **options)
    assert "\n" not in str(error.value)


def test_backbones_of_timm_and_torchvision():
    batch = images(2, 3, 64, 64)
    model = create_model("resnet18", num_classes=3).eval()
    assert model(batch).shape == (2, 3)
    assert create_model("mobilenetv3_small_050").num_classes == 1000
    assert create_model("torchvision:resnet18", num_classes=5).eval()(batch).shape == (2, 5)
    with pytest.raises(ValueError, match="'torchvision:resnet18' has no pretrained weights, only timm models have"):
        create_model("torchvision:resnet18", weights="pretrained")


def test_the_input_is_that_of_the_weights():
    preprocess = {
        name: str(preprocess_of(create_model(name)))
        for name in ("torchvision:resnet18", "torchvision:efficientnet_b1", "resnet18.tv_in1k", "vgg_att2")
    }
    assert "shorter side is 256 px, and the middle 224 x 224" in preprocess["torchvision:resnet18"]
    assert "shorter side is 255 px, and the middle 240 x 240" in preprocess["torchvision:efficientnet_b1"]
    assert preprocess["resnet18.tv_in1k"] == preprocess["torchvision:resnet18"]
    assert preprocess["vgg_att2"] == "resized to 224 x 224 px, all of the image (bilinear)"


@pytest.mark.parametrize(("file", "side"), [("mobilenet_v2-b0353104.pth", 256), ("a.pth", 232)])
def test_of_several_weights_of_torchvision_the_file_tells_the_input(file, side, tmp_path):
    model = create_model("torchvision:mobilenet_v2")
    torch.save(model.state_dict(), tmp_path / file)
    preprocess = preprocess_of(create_model("torchvision:mobilenet_v2", weights=tmp_path / file))
    assert f"shorter side is {side} px" in str(preprocess) and preprocess.mean == (0.485, 0.456, 0.406)


def test_a_downloaded_head_of_another_width(monkeypatch):
    create = timm.create_model
    monkeypatch.setattr("timm.create_model", lambda name, pretrained, **options: create(name, **options))
    with pytest.warns(Notice, match="the head starts fresh: the downloaded one is of 1000 classes, not 3"):
        create_model("resnet18", num_classes=3, weights="pretrained")
    with pytest.raises(ValueError, match="the downloaded weights of resnet18 are those of 1000 classes, not 3"):
        create_model("resnet18", num_classes=3, weights="pretrained", new_head=False)


def test_weights_that_cannot_be_downloaded(monkeypatch):
    def unreachable(*_args, **_options):
        raise FileNotFoundError("no connection")

    monkeypatch.setattr("timm.create_model", unreachable)
    with pytest.raises(OSError, match="cannot download the weights of 'resnet18'; check the connection or give a file"):
        create_model("resnet18", weights="pretrained")


def test_weights_for_a_timm_backbone(tmp_path):
    trained = create_model("resnet18", num_classes=3)
    save_file(trained.state_dict(), tmp_path / "model.safetensors")
    model = create_model("resnet18", num_classes=3, weights=tmp_path)
    assert torch.equal(model.fc.weight, trained.fc.weight)


@pytest.mark.parametrize("name", VGGS)
def test_every_network_has_maps_at_its_own_layer(name):
    model = create_model(name, num_classes=4, width=1 / 16, dropout=0.0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in model.parameters():
            parameter.data = torch.rand_like(parameter) * 0.2
    found = explain(model, torch.rand(2, 3, 32, 32), methods=["grad_cam", "activation_map"])
    side = 2 if name == "vgg" else 8
    assert found.layer.endswith(f" x {side} x {side})") and found["activation_map"].amax() > 0
