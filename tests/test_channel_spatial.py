"""Channel and spatial gates against the equations, the official code's numbers, timm and published parameter counts."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from tests.reference import gates as reference
from timm.layers import SqueezeExcite as TimmSqueezeExcite
from timm.layers.cbam import CbamModule
from torch import nn

import sightline as sl
from sightline.attention.channel import EfficientChannelAttention, GlobalContext, SqueezeExcite
from sightline.attention.spatial import BAM, CBAM, AttentionGate, ChannelGate, SpatialGate

GOLDEN = Path(__file__).parent / "golden"
RESNET50 = [256] * 3 + [512] * 4 + [1024] * 6 + [2048] * 3
ORDERS = ["channel_first", "spatial_first", "parallel"]
VARIANTS = ["paper", "official"]
NORMS = ["sigmoid", "softmax", "mean_flow"]
IDENTITIES = [
    (SqueezeExcite, {}),
    (SqueezeExcite, {"bias": False}),
    (EfficientChannelAttention, {}),
    (GlobalContext, {}),
    (ChannelGate, {}),
    (SpatialGate, {}),
    (SpatialGate, {"zero_init": False}),
    *((CBAM, {"order": order}) for order in ORDERS),
    *((BAM, {"variant": variant}) for variant in VARIANTS),
    (AttentionGate, {}),
]
# BAM's biases that BatchNorm subtracts again.
BEFORE_BATCH_NORM = {"gate.channel.2.0.bias", "gate.spatial.0.bias", "gate.spatial.3.bias", "gate.spatial.6.bias"}


def golden(name):
    """The arrays of a golden file: inputs and outputs by name, weights in their order."""
    arrays = {key: torch.from_numpy(value) for key, value in np.load(GOLDEN / f"{name}.npz").items()}
    return arrays, [value for key, value in arrays.items() if key.startswith("weight.")]


def load(module, values):
    """Fill a module with another one's values, which come in the same order and the same shapes."""
    module.load_state_dict(dict(zip(module.state_dict(), values, strict=True)))
    return module.eval()


def same(got, wanted, tolerance=1e-5):
    torch.testing.assert_close(got, wanted, rtol=0, atol=tolerance)


def equal(got, wanted):
    """A tensor of one image against the reference's array."""
    same(got.squeeze(), torch.from_numpy(np.squeeze(wanted)), 1e-10)


def features(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shaken(module):
    """The module in float64 and eval mode, each weight, bias and running statistic random."""
    generator = torch.Generator().manual_seed(1)
    for name, value in module.double().state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        drawn = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        value.copy_(drawn.abs() + 0.5 if name.endswith("running_var") else drawn)
    return module.eval()


def arrays(module):
    return [value.numpy() for value in module.state_dict().values()]


def norm_of(module):
    keys = ("running_mean", "running_var", "weight", "bias")
    return reference.batch_norm(*(getattr(module, key).detach().numpy() for key in keys))


# ---------------------------------------------------------------------------------------------- the official numbers


def test_numbers_of_the_official_squeeze_excite():
    numbers, weights = golden("se_nobias")
    same(load(SqueezeExcite(32, bias=False), weights)(numbers["x"]), numbers["y"])


def test_numbers_of_the_official_cbam():
    numbers, weights = golden("cbam_official")
    block = load(CBAM(32), weights)
    same(block.channel(numbers["x"]), numbers["after_channel"])
    same(block(numbers["x"]), numbers["y"])


def test_numbers_of_the_official_bam():
    numbers, weights = golden("bam_official_product")
    block = load(BAM(32, variant="official"), weights)
    x = numbers["x"]
    same(block.gate.channel(x).expand_as(x), numbers["channel"])
    same(block.gate.spatial(x).expand_as(x), numbers["spatial"])
    same(block(x), numbers["y"])
    summed = load(BAM(32), weights)(x)
    same(summed, x * (1 + (numbers["channel"] + numbers["spatial"]).sigmoid()))


def test_numbers_of_the_official_attention_gate():
    numbers, weights = golden("attention_gate_sigmoid")
    block = load(AttentionGate(8, 12, hidden=10), weights)
    x, query = numbers["local"], numbers["gating"]
    same(block.gate.scores(x, query), numbers["scores"])
    same(block(x, query).mean((2, 3)), numbers["pooled"])


# ---------------------------------------------------------------------------------------- timm, published parameters


@pytest.mark.parametrize("bias", [True, False])
def test_squeeze_excite_equals_timm(bias):
    theirs = TimmSqueezeExcite(64, rd_ratio=1 / 16, rd_divisor=1, bias=bias).double()
    values = [value.flatten(1) if value.ndim == 4 else value for value in theirs.state_dict().values()]
    ours = load(SqueezeExcite(64, bias=bias).double(), values)
    x = features(2, 64, 7, 5)
    same(ours(x), theirs(x), 1e-12)


def test_cbam_equals_timm():
    theirs = shaken(CbamModule(64, mlp_bias=True))
    values = [value.flatten(1) if value.shape[2:] == (1, 1) else value for value in theirs.state_dict().values()]
    values[4] = values[4].flip(1)
    ours = load(CBAM(64).double(), values)
    x = features(2, 64, 7, 5)
    same(ours(x), theirs(x), 1e-12)


@pytest.mark.parametrize(
    ("block", "channels", "total"),
    [
        (SqueezeExcite, RESNET50, 28_088_024),
        (lambda c: SqueezeExcite(c, bias=False), RESNET50, 28_071_976),
        (CBAM, RESNET50, 28_089_624),
        (BAM, [256, 512, 1024], 25_915_099),
        (lambda c: nn.Identity(), RESNET50, 25_557_032),
    ],
)
def test_parameters_of_resnet50_with_the_block(block, channels, total):
    with torch.device("meta"):
        modules = [timm.create_model("resnet50"), *(block(c) for c in channels)]
    assert sum(parameter.numel() for module in modules for parameter in module.parameters()) == total


# ------------------------------------------------------------------------------------------------------ the equations


@pytest.mark.parametrize("bias", [True, False])
def test_squeeze_excite_is_its_equation(bias):
    block, x = shaken(SqueezeExcite(6, reduction=2, bias=bias)), features(1, 6, 5, 4)
    mlp = arrays(block) if bias else [arrays(block)[0], 0.0, arrays(block)[1], 0.0]
    weights = reference.squeeze_excite(x[0].numpy(), mlp)
    equal(block.gate(x), weights)
    equal(block(x), x[0].numpy() * weights[:, None, None])


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_efficient_channel_attention_is_its_equation(kernel):
    block, x = shaken(EfficientChannelAttention(6, kernel=kernel)), features(1, 6, 5, 4)
    weights = reference.efficient_channel(x[0].numpy(), arrays(block)[0].ravel())
    equal(block.gate(x), weights)
    equal(block(x), x[0].numpy() * weights[:, None, None])


def test_global_context_is_its_equation():
    block, x = shaken(GlobalContext(6, reduction=2)), features(1, 6, 5, 4)
    u, w1, b1, scale, shift, w2, b2 = arrays(block)
    norm = reference.layer_norm(scale, shift)
    weights, output = reference.global_context(x[0].numpy(), u[0], (w1, b1, w2, b2), norm)
    equal(block.gate(x), weights)
    equal(block(x), output)


@pytest.mark.parametrize("pools", ["average", "maximum"])
@pytest.mark.parametrize("kernel", [1, 3])
def test_cbam_with_one_pooling(pools, kernel):
    block, x = shaken(CBAM(6, reduction=2, pools=pools, kernel=kernel)), features(1, 6, 5, 4)
    array, conv = x[0].numpy(), block.spatial.gate.conv.weight.detach().numpy()
    assert conv.shape == (1, 1, kernel, kernel)
    channel = reference.channel_gate(array, arrays(block.channel), pools)[:, None, None]
    equal(block.channel.gate(x), channel)
    spatial = reference.spatial_gate(channel * array, conv, norm_of(block.spatial.gate.bn), pools)
    equal(block(x), spatial * channel * array)
    same(CBAM(6, pools=pools, identity=True).double()(x), x, 1e-12)


@pytest.mark.parametrize("order", ORDERS)
def test_cbam_is_its_equations(order):
    block, x = shaken(CBAM(6, reduction=2, order=order)), features(1, 6, 5, 4)
    mlp, bn = arrays(block.channel), block.spatial.gate.bn
    kernel = block.spatial.gate.conv.weight.detach().numpy()

    def channel(array):
        return reference.channel_gate(array, mlp)[:, None, None]

    def spatial(array):
        return reference.spatial_gate(array, kernel, norm_of(bn))

    array = x[0].numpy()
    equal(block.channel.gate(x), channel(array))
    equal(block.spatial.gate(x), spatial(array))
    wanted = {
        "channel_first": channel(array) * array * spatial(channel(array) * array),
        "spatial_first": spatial(array) * array * channel(spatial(array) * array),
        "parallel": channel(array) * spatial(array) * array,
    }
    equal(block(x), wanted[order])
    assert all(not np.allclose(wanted[order], value) for other, value in wanted.items() if other != order)


@pytest.mark.parametrize("variant", VARIANTS)
def test_bam_is_its_equation(variant):
    block, x = shaken(BAM(6, reduction=1, dilation=2, variant=variant)), features(1, 6, 5, 4)
    first, bn, _, last = block.gate.channel[2]
    convs = [arrays(layer) for layer in block.gate.spatial if isinstance(layer, nn.Conv2d)]
    norms = [norm_of(layer) for layer in block.gate.spatial if isinstance(layer, nn.BatchNorm2d)]
    mlp = [*arrays(first), *arrays(last)]
    assert len(block.gate.spatial(x).unique()) == 20
    weights, output = reference.bam(x[0].numpy(), mlp, norm_of(bn), convs, norms, 2, variant)
    equal(block.gate(x), weights)
    equal(block(x), output)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 4), (7, 9)])
@pytest.mark.parametrize("norm", NORMS)
def test_attention_gate_is_its_equation(norm, size):
    block, x, query = shaken(AttentionGate(6, 3, hidden=4, norm=norm)), features(1, 6, 5, 4), features(1, 3, *size)
    theta, phi, psi = (layer.weight.detach().flatten(1).numpy() for layer in block.gate.children())
    bias = block.gate.psi.bias.item() if norm == "sigmoid" else 0.0
    scores, weights = reference.attention_gate(x[0].numpy(), query[0].numpy(), theta, phi, psi[0], bias, norm)
    equal(block.gate.scores(x, query), scores)
    same(block.gate(x, query)[0, 0], torch.from_numpy(weights), 1e-6 if norm == "mean_flow" else 1e-10)
    assert torch.equal(block(x, query), x * block.gate(x, query))


def test_attention_gate_without_a_query_asks_the_average():
    block, x = shaken(AttentionGate(6)), features(2, 6, 5, 4)
    same(block(x), block(x, x.mean((2, 3), keepdim=True)), 1e-12)


# ------------------------------------------------------------------------------------------- what must hold besides


def test_worked_by_hand():
    block = SqueezeExcite(1, reduction=1)
    load(block, [torch.tensor([[2.0]]), torch.tensor([-1.0]), torch.tensor([[3.0]]), torch.tensor([-9.0])])
    assert block(torch.tensor([[[[1.0, 3.0]]]])).flatten().tolist() == [0.5, 1.5]  # 3 relu(2 * 2 - 1) - 9 = 0

    gate = AttentionGate(1, norm="mean_flow")
    load(gate, [torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)])
    weights = gate.gate(torch.tensor([[[[1.0, 2.0, 4.0]]]])).flatten()
    same(weights, torch.tensor([0.0, 0.25, 0.75]), 1e-6)


@pytest.mark.parametrize(("channels", "kernel"), [(1, 1), (8, 3), (64, 3), (128, 5), (512, 5), (1024, 5), (2048, 7)])
def test_the_adaptive_kernel_is_the_papers(channels, kernel):
    assert EfficientChannelAttention(channels).gate.conv.kernel_size == (kernel,)


def test_channel_weights_follow_a_permutation_of_the_channels():
    block, x = shaken(SqueezeExcite(6, reduction=2)), features(2, 6, 5, 4)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    w1, b1, w2, b2 = block.state_dict().values()
    permuted = load(SqueezeExcite(6, reduction=2).double(), [w1[:, order], b1, w2[order], b2[order]])
    assert block.gate(x).shape == (2, 6, 1, 1)
    same(permuted.gate(x[:, order]), block.gate(x)[:, order], 1e-12)


@pytest.mark.parametrize("block", [SqueezeExcite, EfficientChannelAttention, ChannelGate])
def test_channel_weights_ignore_where_things_are(block):
    gate, x = shaken(block(32)).gate, features(2, 32, 5, 4)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(2))
    same(gate(x.flatten(2)[:, :, order].unflatten(2, (5, 4))), gate(x), 1e-12)


def test_the_spatial_map_moves_with_the_input():
    gate, x = shaken(SpatialGate(6)).gate, features(1, 6, 16, 16)
    moved = gate(x.roll((2, 3), (2, 3)))
    same(moved[..., 5:-3, 6:-3], gate(x)[..., 3:-5, 3:-6], 1e-12)
    assert gate(x).std() > 0.01


@pytest.mark.parametrize("training", [True, False])
def test_zero_init_starts_every_position_at_one_half(training):
    x = features(2, 6, 5, 4).float()
    assert (CBAM(6, reduction=2).train(training).spatial.gate(x) == 0.5).all()
    assert (CBAM(6, reduction=2, zero_init=False).train(training).spatial.gate(x) != 0.5).all()


def test_running_statistics_of_the_spatial_gate_move_by_one_percent():
    weights = SpatialGate(6).gate
    with torch.no_grad():
        weights.conv.weight.zero_()[0, :, 3, 3] = 1
    x = torch.arange(4.0).reshape(2, 1, 2, 1).expand(2, 6, 2, 1)
    weights(x)
    assert weights.bn.running_mean.item() == pytest.approx(0.01 * 2 * 1.5)


@pytest.mark.parametrize(("dilation", "side"), [(4, 17), (1, 5)])
def test_receptive_field_of_bam(dilation, side):
    block = BAM(2, reduction=1, dilation=dilation).double().eval()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(parameter.abs() + 0.1)
    x = torch.ones(1, 2, 25, 25, dtype=torch.float64, requires_grad=True)
    block.gate.spatial(x)[0, 0, 12, 12].backward()
    ys, xs = x.grad[0, 0].nonzero(as_tuple=True)
    assert (ys.min(), ys.max()) == (xs.min(), xs.max()) == (12 - side // 2, 12 + side // 2)


def test_mean_weights_of_bam_rank_positions_like_its_spatial_branch():
    block, x = shaken(BAM(6, reduction=1)), features(1, 6, 5, 4)
    mean, scores = block.gate(x).mean(1).flatten(), block.gate.spatial(x).flatten()
    assert torch.equal(mean.argsort(), scores.argsort()) and len(scores.unique()) == 20


@pytest.mark.parametrize("block", [GlobalContext(32), *(AttentionGate(32, norm=norm) for norm in NORMS[1:])])
def test_weights_that_share_sum_to_one(block):
    for x in (features(2, 32, 5, 4), features(2, 32, 1, 1), torch.zeros(2, 32, 3, 3, dtype=torch.float64)):
        weights = block.double().gate(x)
        assert (weights >= 0).all()
        same(weights.sum((1, 2, 3)), torch.ones(2, dtype=torch.float64), 1e-12)
    same(weights, torch.full_like(weights, 1 / 9), 1e-12)


def test_sigmoid_gates_of_the_attention_gate_start_open():
    weights = AttentionGate(32).gate(torch.zeros(1, 32, 2, 2))
    assert weights.flatten().tolist() == pytest.approx([1 / (1 + np.exp(-3))] * 4)


def test_attention_maps_finds_every_gate():
    model = nn.Sequential(
        SqueezeExcite(32),
        EfficientChannelAttention(32),
        GlobalContext(32),
        CBAM(32),
        BAM(32),
        AttentionGate(32),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    maps = sl.attention_maps(model, torch.randn(2, 32, 5, 4))
    assert {name: tuple(map_.shape[1:]) for name, map_ in maps.items()} == {
        "0": (32, 1, 1),
        "1": (32, 1, 1),
        "2": (1, 5, 4),
        "3.channel": (32, 1, 1),
        "3.spatial": (1, 5, 4),
        "4": (32, 5, 4),
        "5": (1, 5, 4),
    }


# ----------------------------------------------------------------------------------------------------- identity start


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("block", "options"), IDENTITIES)
def test_a_new_block_returns_its_input_bit_for_bit(block, options, dtype, training):
    x = features(4, 32, 5, 3).to(dtype)
    assert torch.equal(block(32, identity=True, **options).to(dtype).train(training)(x), x)


def test_a_new_attention_gate_returns_its_input_whatever_the_query():
    x = features(2, 6, 5, 4)
    assert torch.equal(AttentionGate(6, 3, identity=True).double()(x, features(2, 3, 2, 2)), x)


@pytest.mark.parametrize(("block", "options"), [*IDENTITIES, (GlobalContext, {"reduction": 32})])
def test_no_parameter_is_stuck_at_the_start(block, options):
    torch.manual_seed(0)
    module = block(32, identity=True, **options).double()
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    x, target = features(4, 32, 6, 6), features(4, 32, 6, 6, seed=1)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0)
    for _ in range(5):
        optimizer.zero_grad()
        (module(x) - target).square().mean().backward()
        optimizer.step()
    moved = {name: (value - before[name]).abs().max().item() for name, value in module.named_parameters()}
    assert all(distance > 1e-3 for name, distance in moved.items() if name not in BEFORE_BATCH_NORM), moved


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("block", [SqueezeExcite, GlobalContext, ChannelGate, CBAM, BAM])
def test_reduction_rounds_down_and_is_checked(block):
    assert block(35, reduction=16).eval()(torch.zeros(1, 35, 2, 3)).shape == (1, 35, 2, 3)
    for reduction in (0, -1):
        with pytest.raises(ValueError, match=f"expected a reduction of 1 or more, got {reduction}; choose another"):
            block(32, reduction=reduction)


@pytest.mark.parametrize(
    ("block", "parameters"),
    [
        (SqueezeExcite, 8 + 1 + 8 + 8),
        (ChannelGate, 8 + 1 + 8 + 8),
        (CBAM, 8 + 1 + 8 + 8 + 2 * 49 + 2),
        (BAM, (8 + 1 + 2 + 8 + 8) + (8 + 1 + 2 + 2 * (9 + 1 + 2) + 2)),
        (GlobalContext, 8 + (16 + 2) + 4 + (16 + 8)),  # two units: the LayerNorm of a single one is constant
    ],
)
def test_narrow_layers_have_one_hidden_unit(block, parameters):
    for reduction in (8, 16, 100):
        assert sum(p.numel() for p in block(8, reduction=reduction).parameters()) == parameters
    x = features(2, 8, 5, 4)
    assert torch.equal(block(8, identity=True).double()(x), x)


@pytest.mark.parametrize(
    ("block", "options", "message"),
    [
        (EfficientChannelAttention, {"kernel": 4}, "expected an odd kernel of 1 or more, got 4; choose another"),
        (EfficientChannelAttention, {"kernel": -1}, "expected an odd kernel of 1 or more, got -1; choose another"),
        (SpatialGate, {"kernel": 6}, "expected an odd kernel of 1 or more, got 6; choose another"),
        (CBAM, {"kernel": -1}, "expected an odd kernel of 1 or more, got -1; choose another"),
        (CBAM, {"order": "x"}, "expected order to be one of channel_first, spatial_first, parallel; got 'x'"),
        (BAM, {"variant": "x"}, "expected variant to be one of paper, official; got 'x'"),
        (BAM, {"dilation": 0}, "expected dilation of 1 .dense. or more, got 0; choose another"),
        (AttentionGate, {"norm": "x"}, "expected norm to be one of sigmoid, softmax, mean_flow; got 'x'"),
        (AttentionGate, {"hidden": 0}, "expected hidden of 1 or more, got 0; choose another"),
        (
            AttentionGate,
            {"norm": "softmax", "identity": True},
            "expected norm 'sigmoid' with identity, got 'softmax'; choose one of the two",
        ),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_options_are_one_clear_line(block, options, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        block(32, **options)


def test_a_missing_query_is_one_clear_line():
    with pytest.raises(ValueError, match="expected a query of 3 channels, got none; pass one"):
        AttentionGate(6, 3)(torch.zeros(1, 6, 2, 2))
