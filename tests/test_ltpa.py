"""Learn To Pay Attention against the equations, the authors' numbers and what must hold for any weights."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.reference.ltpa import attend

from sightline.attention import CompatibilityGate, LearnToPayAttention
from sightline.models import create_model

GOLDEN = Path(__file__).parent / "golden"
SETTINGS = list(product(("pc", "dp", "none"), ("softmax", "sigmoid")))


def inputs(channels=6, query=6, size=(5, 4), dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(3, channels, *size, generator=generator, dtype=dtype)
    return features, torch.randn(3, query, generator=generator, dtype=dtype)


def block(*args, seed=0, dtype=torch.float64, **options):
    torch.manual_seed(seed)
    return LearnToPayAttention(*args, **options).to(dtype).eval()


@pytest.mark.parametrize("norm", ["softmax", "sigmoid"])
def test_numbers_of_the_official_block(norm):
    golden = {key: torch.from_numpy(value) for key, value in np.load(GOLDEN / f"ltpa_pc_{norm}.npz").items()}
    attention = LearnToPayAttention(8, norm=norm)
    with torch.no_grad():
        attention.gate.u.weight.copy_(golden["u"][None])
        attention.gate.u.bias.zero_()
    query = golden["glob"].flatten(1)
    torch.testing.assert_close(attention.gate.scores(golden["local"], query), golden["scores"], rtol=0, atol=1e-5)
    torch.testing.assert_close(attention(golden["local"], query), golden["pooled"], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("compat", "norm"), SETTINGS)
def test_equals_the_equations_position_by_position(compat, norm):
    features, query = inputs()
    attention = block(6, compat=compat, norm=norm)
    u, b = (None, None) if compat == "dp" else (attention.gate.u.weight[0].tolist(), attention.gate.u.bias.item())
    scores, weights, pooled = attend(features.numpy(), query.numpy(), u, b, compat, norm)
    for got, wanted in (
        (attention.gate.scores(features, query)[:, 0], scores),
        (attention.gate(features, query)[:, 0], weights),
        (attention(features, query), pooled),
    ):
        torch.testing.assert_close(got, torch.from_numpy(wanted), rtol=0, atol=1e-10)


def test_worked_by_hand():
    gate = CompatibilityGate(1, compat="pc", norm="sigmoid")
    with torch.no_grad():
        gate.u.weight.fill_(2.0)
        gate.u.bias.fill_(1.0)
    features, query = torch.tensor([[[[0.0, 3.0]]]]), torch.tensor([[-0.5]])
    assert gate.scores(features, query).flatten().tolist() == [0.0, 6.0]
    assert gate(features, query).flatten().tolist() == pytest.approx([0.5, 1 / (1 + np.exp(-6))])


@pytest.mark.parametrize("compat", ["pc", "dp", "none"])
def test_softmax_pools_inside_the_convex_hull_and_sigmoid_weights_are_probabilities(compat):
    features, query = inputs()
    gate = block(6, compat=compat).gate
    torch.testing.assert_close(gate(features, query).sum((1, 2, 3)), torch.ones(3, dtype=torch.float64))
    pooled = block(6, compat=compat)(features, query)
    assert (pooled >= features.amin((2, 3))).all() and (pooled <= features.amax((2, 3))).all()
    sigmoid = block(6, compat=compat, norm="sigmoid").gate(features, query)
    assert (sigmoid > 0).all() and (sigmoid < 1).all()


def test_uniform_weights_are_the_network_without_attention():
    features, query = inputs()
    plain = block(6, compat="none", norm="uniform")
    assert list(plain.parameters()) == []
    torch.testing.assert_close(plain(features, query), features.mean((2, 3)), rtol=0, atol=1e-12)
    assert (plain.gate(features) == 1 / 20).all()
    with pytest.raises(ValueError, match="expected compat 'none' with norm 'uniform', which needs no score; got 'pc'"):
        block(6, norm="uniform")
    options = {"compat": "none", "width": 1 / 16, "stem_pool": 2, "dropout": 0.0}
    attended = create_model("vgg_att2", num_classes=3, **options).eval()
    control = create_model("vgg_att2", num_classes=3, norm="uniform", **options).eval()
    left = control.load_state_dict(attended.state_dict(), strict=False)
    assert left.unexpected_keys == [f"attention.conv{n}.gate.u.{name}" for n in (10, 13) for name in ("weight", "bias")]
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    assert not left.missing_keys and not torch.allclose(attended(images), control(images))
    for level in attended.attention.values():
        torch.nn.init.zeros_(level.gate.u.weight)  # of no preference
    torch.testing.assert_close(attended(images), control(images))


def test_constant_features_are_pooled_to_themselves():
    features = torch.full((2, 6, 4, 5), 3.0, dtype=torch.float64)
    pooled = block(6, compat="dp")(features, torch.randn(2, 6, dtype=torch.float64))
    torch.testing.assert_close(pooled, torch.full((2, 6), 3.0, dtype=torch.float64))


def test_positions_may_be_shuffled_and_the_query_moves_only_pc_sigmoid_and_dp():
    features, query = inputs()
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    shuffled = features.flatten(2)[:, :, order].unflatten(2, (5, 4))
    for compat, norm in SETTINGS:
        attention = block(6, compat=compat, norm=norm)
        pooled = attention(features, query)
        torch.testing.assert_close(attention(shuffled, query), pooled)
        same = torch.allclose(attention(features, query + 1), pooled)
        assert same == (compat == "none" or (compat, norm) == ("pc", "softmax")), (compat, norm)


@pytest.mark.parametrize(("compat", "norm"), SETTINGS)
def test_gradients(compat, norm):
    features, query = inputs(size=(2, 3))
    attention = block(6, compat=compat, norm=norm)
    assert torch.autograd.gradcheck(attention, (features.requires_grad_(), query.requires_grad_()))


@pytest.mark.parametrize(("compat", "norm"), SETTINGS)
def test_channels_last_and_single_images_change_nothing(compat, norm):
    features, query = inputs()
    attention = block(6, compat=compat, norm=norm)
    pooled = attention(features, query)
    channels_last = features.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(attention(channels_last, query), pooled, rtol=0, atol=1e-12)
    one_by_one = torch.cat([attention(features[i : i + 1], query[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(one_by_one, pooled, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "keys", "length"),
    [
        ({}, {"project_query.0", "project_query.3", "gate.u"}, 4),
        ({"official": False}, {"project_query.0", "gate.u"}, 4),
        ({"compat": "dp"}, {"project_query.0", "project_query.3"}, 4),
        ({"compat": "none"}, {"gate.u"}, 4),
        ({"project": "l"}, {"project_query.0", "project_features", "gate.u"}, 6),
        ({"project": "l", "official": False}, {"project_features", "gate.u"}, 6),
        ({"project": "l", "compat": "none"}, {"project_features", "gate.u"}, 6),
    ],
)
def test_a_query_of_another_length_is_projected(options, keys, length):
    attention = block(4, 6, **options)
    assert {key.rpartition(".")[0] for key in attention.state_dict()} == keys
    pooled = attention(*inputs(4, 6))
    assert pooled.shape == (3, length) and attention.out_channels == length


def test_projection_by_hand():
    features, query = inputs(4, 6)
    attention = block(4, 6, compat="dp", official=False)
    linear = attention.project_query[0]
    projected = query @ linear.weight.T + linear.bias
    scores = attention.gate.scores(features, projected)
    torch.testing.assert_close(scores, torch.einsum("bchw,bc->bhw", features, projected).unsqueeze(1))
    weights = scores.flatten(1).softmax(1)
    torch.testing.assert_close(attention(features, query), torch.einsum("bcn,bn->bc", features.flatten(2), weights))

    attention = block(4, 6, project="l", official=False)
    conv = attention.project_features
    raised = torch.einsum("bchw,kc->bkhw", features, conv.weight[:, :, 0, 0]) + conv.bias[:, None, None]
    torch.testing.assert_close(attention(features, query), block_like(attention, raised, query))


def block_like(attention, features, query):
    same = LearnToPayAttention(6).double()
    same.gate.load_state_dict(attention.gate.state_dict())
    return same(features, query)


@pytest.mark.parametrize("project", ["g", "l"])
def test_nothing_is_projected_between_equal_lengths(project):
    assert set(block(6, 6, project=project).state_dict()) == {"gate.u.weight", "gate.u.bias"}


def test_keys_that_two_settings_share_have_one_shape():
    for channels, project in product((4, 6), ("g", "l")):
        states = [block(channels, 6, compat=c, norm=n, project=project).state_dict() for c, n in SETTINGS]
        for one, other in product(states, states):
            assert all(one[key].shape == other[key].shape for key in one.keys() & other.keys())


@pytest.mark.parametrize("compat", ["pc", "dp"])
def test_a_missing_query_is_one_clear_line(compat):
    with pytest.raises(
        ValueError, match=f"expected a query of shape .batch, channels. for compat='{compat}', got none"
    ):
        block(6, compat=compat)(inputs()[0])
    assert block(6, compat="none")(inputs()[0]).shape == (3, 6)


def test_huge_scores_stay_finite():
    features, query = inputs(dtype=torch.float32)
    for compat, norm in SETTINGS:
        assert block(6, compat=compat, norm=norm, dtype=torch.float32)(features * 1e6, query * 1e6).isfinite().all()


@pytest.mark.parametrize(
    ("option", "known"), [("compat", "pc, dp, none"), ("norm", "softmax, sigmoid, uniform"), ("project", "g, l")]
)
@pytest.mark.usefixtures("unchecked")
def test_an_unknown_setting_is_one_clear_line(option, known):
    with pytest.raises(ValueError, match=f"expected {option} to be one of {known}; got 'x'"):
        LearnToPayAttention(6, **{option: "x"})
