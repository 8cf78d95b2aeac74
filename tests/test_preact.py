"""Pre-activation ResNet-164, RN-att and RN-att2: sizes by hand, slow loops, what must hold for any weights."""

import math
import re

import pytest
import torch
from tests.reference import preact as reference
from torch import nn
from torch.nn import functional as F

from sightline.explainers import attention_maps, explain
from sightline.models import create_model

SMALL = {"depth": 20, "width": 1 / 8}
ATTENDED = ("rn_att", "rn_att2")


def small(name, seed=0, **options):
    torch.manual_seed(seed)
    return create_model(name, **{**SMALL, **options})


def images(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def lively(model):
    """In float64, with statistics, scales and shifts that are not 0 and 1."""
    generator = torch.Generator().manual_seed(3)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            for tensor in (layer.weight.data, layer.running_var):
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
            for tensor in (layer.bias.data, layer.running_mean):
                tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
    return model.double().eval()


def parameters_by_hand(n):
    """Trunk of 3n bottlenecks of 3 convolutions without bias, each behind a BatchNorm with 2 numbers per channel."""
    count = 3 * 16 * 9
    before = 16
    for channels in (64, 128, 256):
        for _ in range(n):
            middle = channels // 4
            count += 2 * before + before * middle + 2 * middle + middle * middle * 9 + 2 * middle + middle * channels
            count += before * channels if before != channels else 0
            before = channels
    return count


def test_parameter_counts():
    trunk = parameters_by_hand(18)
    last = 2 * 256 + 256 * 64 + 2 * 64 + 64 * 64 * 9 + 2 * 64 + 64 * 256  # a bottleneck of stage 3
    branch = 2 * 256 + (256 * 256 * 9 + 256) + 2 * 256 + (256 * 256 + 256)  # BatchNorm, convolution, BatchNorm, FC-1
    rn164 = trunk + 2 * 256 + (256 + 1) * 10
    rn_att = trunk - last + 2 * 256 * 256 * 9 + branch + (256 + 1) + 2 * 256 + (256 + 1) * 10
    projection = 2 * 256 + (256 * 128 + 128)
    rn_att2 = trunk + branch + projection + (128 + 1) + (256 + 1) + 2 * 384 + (384 + 1) * 10
    assert round(rn164 / 1e6, 1) == 1.7  # He et al. 2016, "Identity Mappings", table 4
    for name, count in (("rn164", rn164), ("rn_att", rn_att), ("rn_att2", rn_att2)):
        with torch.device("meta"):
            model = create_model(name)
        assert sum(p.numel() for p in model.parameters()) == count, name


@pytest.mark.parametrize("depth", [20, 29, 164])
def test_depth_counts_the_layers_with_weights_on_the_longest_path(depth):
    with torch.device("meta"):
        model = create_model("rn164", depth=depth)
    layers = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len([name for name in layers if not name.endswith("shortcut")]) == depth
    assert len([name for name in layers if name.endswith("shortcut")]) == 3


def test_layers_of_a_32_pixel_image():
    for name in ("rn164", *ATTENDED):
        model, shapes, x = create_model(name, depth=20).eval(), {}, images(2, 3, 32, 32)
        for layer, module in model.features.named_children():
            x = module(x)
            shapes[layer] = tuple(x.shape[1:])
        assert model(images(2, 3, 32, 32)).shape == (2, 10)
        assert shapes["conv1"] == (16, 32, 32) and shapes["stage1"] == (64, 32, 32)
        assert shapes["stage2"] == (128, 16, 16) and shapes["stage3"] == (256, 8, 8)
        if name != "rn164":
            assert shapes["pool"] == (256, 4, 4) and shapes["conv4"] == (256, 4, 4)
    assert len(small("rn_att2", depth=29).features.stage3) == 3 and len(small("rn_att", depth=29).features.stage3) == 2
    assert [tuple(m.shape[1:]) for m in attention_maps(small("rn_att"), images(1, 3, 32, 32)).values()] == [(1, 8, 8)]
    maps = attention_maps(small("rn_att2"), images(1, 3, 32, 32))
    assert [tuple(m.shape[1:]) for m in maps.values()] == [(1, 16, 16), (1, 8, 8)]


@pytest.mark.parametrize("compat", ["pc", "dp"])
@pytest.mark.parametrize(("name", "levels"), [("rn164", 0), ("rn_att", 1), ("rn_att2", 2)])
def test_equals_slow_loops(name, levels, compat):
    model = lively(small(name, num_classes=3, **({"compat": compat} if levels else {})))
    batch = images(2, 3, 12, 12).double()
    state = {key: value.numpy() for key, value in model.state_dict().items()}
    if levels:
        wanted = reference.rn_att(batch.numpy(), state, 2, levels, compat)
    else:
        wanted = reference.rn164(batch.numpy(), state, 2)
    torch.testing.assert_close(model(batch), torch.from_numpy(wanted), rtol=0, atol=1e-10)


def test_local_features_are_the_raw_sums_of_the_bottlenecks():
    """Without BatchNorm and ReLU, so that they have negative values."""
    seen = []
    model = small("rn_att2").eval()
    for block in model.attention.values():
        block.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    outputs = []
    for stage in ("stage2", "stage3"):
        model.get_submodule(f"features.{stage}").register_forward_hook(lambda _m, _i, out: outputs.append(out.clone()))
    model(images(2, 3, 32, 32))
    assert all(torch.equal(local, output) for local, output in zip(seen, outputs, strict=True))
    assert all(local.min() < 0 for local in seen)


def test_dropout_of_the_authors():
    rates = {
        name: [
            m.p
            for part in ("features", "fc1", "head")
            for m in getattr(small(name), part).modules()
            if type(m) is nn.Dropout
        ]
        for name in ATTENDED
    }
    assert rates == {"rn_att": [0.0, 0.0, 0.0], "rn_att2": [0.4, 0.5, 0.3, 0.3]}


@pytest.mark.parametrize("name", ATTENDED)
def test_pc_with_softmax_is_none_with_softmax_and_uniform_is_the_mean(name):
    full, lean = small(name), small(name, compat="none", seed=1)
    missing, unexpected = lean.load_state_dict(full.state_dict(), strict=False)
    dead = ("features.norm.", "features.conv4.", "fc1.", "attention.stage2.project_query.")
    assert not missing and unexpected and all(key.startswith(dead) for key in unexpected)
    assert [name for name, _ in lean.features.named_children()][-1] == full.default_layer.removeprefix("features.")
    batch = images(4, 3, 32, 32)
    wanted = lean.eval()(batch)
    torch.testing.assert_close(full.eval()(batch), wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())
    uniform = small(name, compat="none", norm="uniform").eval()
    for block in lean.attention.values():
        nn.init.zeros_(block.gate.u.weight)
    uniform.load_state_dict(lean.state_dict(), strict=False)
    torch.testing.assert_close(uniform(batch), lean(batch))
    assert not torch.allclose(uniform(batch), wanted)


@pytest.mark.parametrize("name", ("rn164", *ATTENDED))
@pytest.mark.parametrize("size", [(33, 33), (40, 24), (16, 16), (7, 5), (1, 1)])
def test_any_size_and_width(name, size):
    for width in (0.01, 0.3):
        assert small(name, width=width, num_classes=3).eval()(images(1, 3, *size)).isfinite().all()


def test_a_stride_in_the_first_layer_halves_every_map():
    shapes = [
        tuple(m.shape[2:]) for m in attention_maps(small("rn_att2", stem_stride=2), images(1, 3, 40, 24)).values()
    ]
    assert shapes == [(10, 6), (5, 3)]


@pytest.mark.parametrize("name", ("rn164", *ATTENDED))
def test_initialization(name):
    torch.manual_seed(0)
    model = create_model(name, depth=20)
    for conv in (m for m in model.features.modules() if isinstance(m, nn.Conv2d) and m.weight.numel() > 20_000):
        spread = math.sqrt(2 / (conv.kernel_size[0] ** 2 * conv.out_channels))
        assert conv.weight.std().item() == pytest.approx(spread, rel=0.05)


@pytest.mark.parametrize("name", ("rn164", *ATTENDED))
def test_learns(name):
    """To tell noise with a bright patch from noise."""

    def batch(seed):
        noise, labels = images(64, 3, 16, 16, seed=seed), torch.arange(64) % 2
        noise[labels == 1, 0, 4:8, 4:8] += 3
        return noise, labels

    torch.manual_seed(0)
    model = create_model(name, num_classes=2, depth=20, width=1 / 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(1, 41):
        noise, labels = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(model(noise), labels).backward()
        optimizer.step()
    noise, labels = batch(0)
    assert (model.eval()(noise).argmax(1) == labels).float().mean() > 0.9


@pytest.mark.parametrize("name", ("rn164", *ATTENDED))
def test_every_parameter_gets_a_gradient(name):
    model = small(name, **({"compat": "dp"} if name in ATTENDED else {})).train()
    model(images(4, 3, 32, 32)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


@pytest.mark.parametrize("name", ("rn164", *ATTENDED))
def test_maps_at_its_own_layer(name):
    explanation = explain(lively(small(name)).float(), images(2, 3, 32, 32), methods=["grad_cam", "activation_map"])
    assert explanation.layer.endswith(" x 8 x 8)") and explanation["activation_map"].amax() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 32}, "expected a depth of 9n + 2, got 32; take 20, 29, 56, 110 or 164"),
        ({"depth": 2}, "expected a depth of 9n + 2, got 2"),
        ({"width": 0.0}, "expected width above 0"),
        ({"stem_stride": 0}, "expected a stem_stride of 1 or more, got 0"),
    ],
)
def test_bad_options_are_one_clear_line(options, message):
    for name in ("rn164", "rn_att2"):
        with pytest.raises(ValueError, match=re.escape(message)):
            create_model(name, **options)


def test_one_level_needs_two_bottlenecks_per_stage():
    with pytest.raises(ValueError, match=r"expected a depth of 9n \+ 2 of at least 20, got 11; rn_att replaces"):
        create_model("rn_att", depth=11)
    assert create_model("rn_att2", depth=11)(images(2, 3, 16, 16)).shape == (2, 10)
