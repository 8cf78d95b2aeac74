"""Self-attention and the non-local block against the equations, PyTorch, timm, and what must hold for any weights."""

import numpy as np
import pytest
import torch
from tests.reference.self_attention import non_local, self_attention
from timm.layers import NonLocalAttn, resample_abs_pos_embed
from torch import nn

from sightline.attention.self_attention import NonLocal, RelativeBias, SelfAttention, attention_from, positions_at
from sightline.explainers import attention_maps

BLOCKS = [
    (SelfAttention, {"heads": 2}),
    (SelfAttention, {"heads": 4, "positions": "learned", "size": (3, 4)}),
    (SelfAttention, {"heads": 2, "positions": "relative", "size": (3, 3)}),
    (NonLocal, {}),
]
each_block = pytest.mark.parametrize(("kind", "options"), BLOCKS, ids=["none", "learned", "relative", "non_local"])


def features(size=(5, 4), channels=8, batch=3, dtype=torch.float64):
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(0), dtype=dtype)


def block(kind, dtype=torch.float64, channels=8, **options):
    """A block in eval mode none of whose parameters is at its start value."""
    generator = torch.Generator().manual_seed(1)
    made = kind(channels, **options)
    with torch.no_grad():
        for value in (*made.parameters(), *(b for b in made.buffers() if b.is_floating_point())):
            value.copy_(torch.rand(value.shape, generator=generator) + 0.5 if value.ndim == 1 else value)
            if value.ndim > 1:
                value.copy_(0.5 * torch.randn(value.shape, generator=generator))
    return made.to(dtype).eval()


def with_map(module, x):
    """Output and attention map."""
    maps = []
    handle = module.gate.register_forward_hook(lambda *call: maps.append(call[2]))
    try:
        return module(x), maps[0]
    finally:
        handle.remove()


def equal(got, wanted, atol=1e-10):
    wanted = torch.from_numpy(wanted) if isinstance(wanted, np.ndarray) else wanted
    torch.testing.assert_close(got, wanted, rtol=0, atol=atol)


@pytest.mark.parametrize("relative", [False, True])
def test_self_attention_equals_the_equation_query_by_query(relative):
    options = {"positions": "relative", "size": (3, 2)} if relative else {}
    x, attention = features(), block(SelfAttention, heads=2, **options)
    arrays = [a.detach().numpy() for a in (x, attention.qkv.weight, attention.project.weight, attention.project.bias)]
    table = attention.bias.table.detach().numpy() if relative else None
    received, output = self_attention(*arrays, heads=2, table=table)
    got, weights = with_map(attention, x)
    equal(weights, received)
    equal(got, output)


def test_non_local_equals_the_equation_query_by_query():
    x, attention = features(), block(NonLocal, reduction=4)
    norm = attention.norm
    of = (
        attention.qkv.weight.flatten(1),
        attention.project.weight.flatten(1),
        norm.weight,
        norm.bias,
        norm.running_mean,
        norm.running_var,
    )
    received, output = non_local(*(a.detach().numpy() for a in (x, *of)), norm.eps)
    got, weights = with_map(attention, x)
    equal(weights, received)
    equal(got, output)


def test_worked_by_hand():
    attention = SelfAttention(1, heads=1)
    with torch.no_grad():
        attention.qkv.weight.copy_(torch.tensor([[1.0], [1.0], [3.0]]))
        attention.project.weight.fill_(2.0)
        attention.project.bias.fill_(1.0)
    got, weights = with_map(attention, torch.tensor([[[[0.0, np.log(3.0)]]]], dtype=torch.float32))
    high = 3.0 ** np.log(3.0) / (1 + 3.0 ** np.log(3.0))  # of the second key for the second query; 1/2 for the first
    equal(weights.flatten(), torch.tensor([(0.5 + 1 - high) / 2, (0.5 + high) / 2], dtype=torch.float32), 1e-6)
    value = 3 * np.log(3.0)
    wanted = [2 * 0.5 * value + 1, np.log(3.0) + 2 * high * value + 1]
    equal(got.flatten(), torch.tensor(wanted, dtype=torch.float32), 1e-5)


def test_weights_and_output_are_those_of_pytorchs_multihead_attention():
    x, attention = features(), block(SelfAttention, heads=4)
    official = nn.MultiheadAttention(8, 4, batch_first=True, dtype=torch.float64).eval()
    with torch.no_grad():
        official.in_proj_weight.copy_(attention.qkv.weight)
        official.in_proj_bias.zero_()
        official.out_proj.load_state_dict(attention.project.state_dict())
    tokens = x.flatten(2).transpose(1, 2)
    output, weights = official(tokens, tokens, tokens, average_attn_weights=False)
    got, received = with_map(attention, x)
    equal(received.flatten(2), weights.mean(2))
    equal(got, x + output.transpose(1, 2).unflatten(2, (5, 4)))


def test_non_local_is_timms_without_biases():
    x, attention = features(channels=16), block(NonLocal, channels=16)
    official = NonLocalAttn(16, use_scale=False, rd_ratio=1 / 2).double().eval()
    with torch.no_grad():
        for part, conv in zip(attention.qkv.weight.chunk(3), (official.t, official.p, official.g), strict=True):
            conv.weight.copy_(part)
        official.z.weight.copy_(attention.project.weight)
    official.norm.load_state_dict(attention.norm.state_dict())
    equal(attention(x), official(x))


@each_block
def test_maps_sum_to_1_and_reading_them_changes_no_bit(kind, options):
    for size in ((5, 4), (1, 1), (1, 7), (13, 9)):
        x, attention = features(size), block(kind, **options)
        got, weights = with_map(attention, x)
        assert weights.shape == (3, options.get("heads", 1), *size) and (weights >= 0).all()
        equal(weights.sum((2, 3)), torch.ones_like(weights[:, :, 0, 0]))
        assert torch.equal(got, attention(x)) and got.shape == x.shape


def test_attention_maps_reads_it_and_an_unread_gate_is_never_run(monkeypatch):
    model = nn.Sequential(block(SelfAttention, heads=2), block(NonLocal), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    maps = attention_maps(model, features())
    assert {name: tuple(map_.shape) for name, map_ in maps.items()} == {"0": (3, 2, 5, 4), "1": (3, 1, 5, 4)}
    monkeypatch.setattr(type(model[0].gate), "forward", None)
    assert model(features()).shape == (3, 8)


def test_constant_features_are_attended_evenly():
    for kind, options in BLOCKS[0], BLOCKS[3]:
        x = features((1, 1)).expand(3, 8, 5, 4)
        _, weights = with_map(block(kind, **options), x)
        equal(weights, torch.full_like(weights, 1 / 20))


@each_block
def test_positions_may_be_shuffled_only_where_there_is_no_position(kind, options):
    x, attention = features(), block(kind, **options)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(2))

    def shuffle(y):
        return y.flatten(2)[:, :, order].unflatten(2, (5, 4))

    got, weights = with_map(attention, shuffle(x))
    wanted, map_ = with_map(attention, x)
    for one, other in ((got, shuffle(wanted)), (weights, shuffle(map_))):
        assert torch.allclose(one, other, rtol=0, atol=1e-10) == ("positions" not in options)


def test_relative_bias_depends_on_the_clipped_offset_alone():
    bias = RelativeBias(1, (2, 3))
    with torch.no_grad():
        bias.table.copy_(torch.arange(15.0).reshape(1, 3, 5))
    got = bias((3, 4)).reshape(3, 4, 3, 4)
    assert got[0, 0, 0, 0] == got[2, 3, 2, 3] == 7  # offset 0: the middle of the table
    assert got[0, 0, 0, 1] == 8 and got[0, 1, 0, 0] == 6 and got[0, 0, 1, 0] == 12 and got[1, 0, 0, 0] == 2
    assert got[0, 0, 2, 3] == 14 and got[2, 3, 0, 0] == 0  # clipped both ways


def test_learned_positions_are_interpolated():
    positions = torch.arange(6.0).expand(1, 2, 4, 6)
    assert positions_at(positions, (4, 6)) is positions
    equal(positions_at(positions, (8, 6)), torch.arange(6.0).expand(1, 2, 8, 6), 1e-5)
    inner = positions_at(positions, (4, 12))[0, 0, 0, 4:-4]  # a ramp stays one, away from the border
    equal(inner, torch.tensor([1.75, 2.25, 2.75, 3.25]), 1e-5)
    positions = features((4, 4), batch=1, dtype=torch.float32)
    official = resample_abs_pos_embed(positions.flatten(2).mT, [3, 5], [4, 4], num_prefix_tokens=0)
    equal(positions_at(positions, (3, 5)), official.mT.unflatten(2, (3, 5)), 1e-6)


@each_block
def test_gradients(kind, options):
    x = features((2, 3), batch=2).requires_grad_()
    attention = block(kind, **options)
    assert torch.autograd.gradcheck(attention, (x,))
    names, values = zip(*attention.named_parameters(), strict=True)

    def of_parameters(*parameters):
        return torch.func.functional_call(attention, dict(zip(names, parameters, strict=True)), (x.detach(),))

    assert torch.autograd.gradcheck(of_parameters, values)
    handle = attention.gate.register_forward_hook(lambda module, call, output: kept.append(output))
    kept = []
    assert torch.autograd.gradcheck(lambda x: (attention(x), kept.pop())[1], (x,))
    handle.remove()


@each_block
def test_layout_batch_and_bf16_change_nothing(kind, options):
    x, attention = features(), block(kind, **options)
    wanted = attention(x)
    equal(attention(x.contiguous(memory_format=torch.channels_last)), wanted)
    equal(torch.cat([attention(x[i : i + 1]) for i in range(3)]), wanted)
    half = block(kind, torch.bfloat16, **options)
    got, weights = with_map(half, x.bfloat16())
    assert got.dtype == weights.dtype == torch.bfloat16
    assert (got.double() - wanted).abs().max() <= 0.05 * wanted.abs().max()
    with torch.autocast("cpu", torch.bfloat16):
        cast = block(kind, torch.float32, **options)(x.float())
    assert (cast.double() - wanted).abs().max() <= 0.05 * wanted.abs().max()


@each_block
def test_identity_returns_the_input_and_every_parameter_moves(kind, options):
    torch.manual_seed(0)
    x, attention = features(), kind(8, **options, identity=True).double()
    assert torch.equal(attention.eval()(x), x) and torch.equal(attention.train()(x), x)
    before = {name: value.detach().clone() for name, value in attention.named_parameters()}
    optimizer = torch.optim.AdamW(attention.parameters(), lr=1e-2, weight_decay=0.0)
    goal = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=x.dtype)
    for _ in range(5):
        optimizer.zero_grad()
        (attention(x) - goal).square().mean().backward()
        optimizer.step()
    moved = {name: (value - before[name]).abs().max().item() for name, value in attention.named_parameters()}
    assert min(moved.values()) > 1e-3, moved


@each_block
def test_a_saved_block_is_the_same(kind, options):
    x, attention = features(), block(kind, **options)
    other = kind(8, **options).double().eval()
    other.load_state_dict(attention.state_dict())
    assert torch.equal(other(x), attention(x))


def test_the_non_local_block_rounds_its_width_down_to_one_at_least():
    widths = [NonLocal(channels, reduction=reduction).project.in_channels for channels, reduction in ((9, 2), (1, 2))]
    assert widths == [4, 1]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SelfAttention(6, heads=4), "expected heads that divide 6 channels, got 4; choose"),
        (lambda: SelfAttention(6, heads=0), "expected heads that divide 6 channels, got 0; choose"),
        (lambda: SelfAttention(8, positions="x"), "expected positions to be one of none, learned, relative; got 'x'"),
        (lambda: SelfAttention(8, positions="learned"), "expected the size of the map for .*, got none; pass size="),
        (lambda: NonLocal(9, reduction=0), "expected a reduction of 1 or more, got 0; choose another"),
    ],
)
def test_bad_options_are_one_clear_line(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.compile
@each_block
def test_compile_and_export(kind, options):
    x, attention = features(), block(kind, **options)
    wanted = attention(x)
    equal(torch.compile(attention, backend="aot_eager", fullgraph=True)(x), wanted)
    exported = torch.export.export(attention, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},))
    equal(exported.module()(x[:2]), attention(x[:2]))


@each_block
def test_attention_from_a_position(kind, options):
    """Each row of the attention matrix: its mean is the map, and the values that it weights give the output there."""
    module = block(kind, **options)
    network = nn.Sequential(nn.Identity(), module)
    x, (h, w) = features(), (5, 4)
    state = {name: value.clone() for name, value in network.state_dict().items()}
    rows = {(y, c): attention_from(network, x, (y, c)) for y in range(h) for c in range(w)}
    (received,) = attention_maps(network, x).values()
    torch.testing.assert_close(torch.stack([*rows.values()]).mean(0), received)
    for weights in rows.values():
        torch.testing.assert_close(weights.sum((2, 3)), torch.ones(len(x), weights.shape[1], dtype=x.dtype))
    heads = rows[0, 0].shape[1]
    if kind is SelfAttention:
        placed = x if module.positions is None else x + positions_at(module.positions, (h, w))
        value = module.qkv(placed.flatten(2).mT)[..., 16:].unflatten(2, (heads, -1))
        for (y, c), weights in rows.items():
            gathered = torch.einsum("bhn,bnhd->bhd", weights.flatten(2), value).flatten(1)
            torch.testing.assert_close(module(x)[:, :, y, c], x[:, :, y, c] + module.project(gathered))
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert not module.gate._forward_hooks


def test_attention_from_a_pixel_of_a_coarser_grid():
    torch.manual_seed(0)
    network = nn.Sequential(nn.AvgPool2d(4), block(SelfAttention, heads=2), block(SelfAttention, heads=4))
    x = features((12, 8))
    by_cell = attention_from(network[1:], nn.AvgPool2d(4)(x), (2, 1))
    for pixel in ((8, 4), (11, 7)):
        torch.testing.assert_close(attention_from(network, x, pixel), by_cell)
    assert attention_from(network, x, (0, 0), "1").shape == (3, 2, 3, 2)
    for arguments, message in (
        (((12, 0),), "expected a position in images of 12 x 8 pixels, got row 12, column 0"),
        (((0, 0), "0"), "expected a block out of 1, 2, got 0; see attention_maps"),
    ):
        with pytest.raises(ValueError, match=message):
            attention_from(network, x, *arguments)
    with pytest.raises(ValueError, match="expected a block of self-attention in the model, got Sequential"):
        attention_from(nn.Sequential(nn.Identity()), x, (0, 0))


def test_attention_from_bad_input_is_one_line(unchecked):
    network, x = nn.Sequential(block(SelfAttention, heads=2)), features((12, 8))
    for position in ((10.5, 3), (3,), (1, 2, 3)):
        with pytest.raises(ValueError, match=r"expected a position of two whole numbers, row and column, got \("):
            attention_from(network, x, position)
    with pytest.raises(
        ValueError, match=r"expected images of shape \(batch, channels, height, width\), got \(8, 12, 8\)"
    ):
        attention_from(network, x[0], (0, 0))
