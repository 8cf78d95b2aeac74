"""What every attention block must do, whatever it computes: one harness for all of `ATTENTION`."""

import copy

import pytest
import torch
from torch import nn

from sightline.attention import ATTENTION
from sightline.explainers import attention_maps

CHANNELS = 32
SIZES = [(2, 8, 8), (1, 7, 5), (3, 1, 9), (2, 13, 2)]
GATING = [name for name in ATTENTION if not hasattr(ATTENTION[name](CHANNELS), "out_channels")]
POOLING = [name for name in ATTENTION if name not in GATING]
SAMPLED = {"hard"}
"""Their gradient is an estimate; tests of their own show what it estimates."""
SEVERAL = {"brnpa"}
"""They need at least as many positions as vectors."""
WITHOUT_MAP = {"gap", "gem", "bilinear"}


def fresh(name, dtype=torch.float32, **options):
    """A block whose parameters and statistics are all away from their special values, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        block = ATTENTION[name](CHANNELS, **options).to(dtype).eval()
        for tensor in (*block.parameters(), *block.buffers()):
            if tensor.is_floating_point():
                tensor.data.add_(0.05 * torch.rand_like(tensor))
        return block


def features(batch, height, width, dtype=torch.float32):
    """Behind a rectifier, as in a network."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, CHANNELS, height, width, generator=generator, dtype=torch.float64).relu().to(dtype)


def result_shape(name, x):
    block = ATTENTION[name](CHANNELS)
    return tuple(x.shape) if name in GATING else (len(x), block.out_channels)


def differs(a, b):
    return float(((a - b).abs().max() / b.abs().max().clamp(min=1e-12)).detach())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ATTENTION)
def test_any_size_gives_finite_results(name, size):
    x = features(*size)
    out = fresh(name)(x)
    assert tuple(out.shape) == result_shape(name, x) and out.isfinite().all() and out.dtype == x.dtype


@pytest.mark.parametrize("name", ATTENTION)
def test_a_single_position(name):
    x = features(2, 1, 1)
    if name in SEVERAL:
        with pytest.raises(ValueError, match="expected at"):
            fresh(name)(x)
    else:
        assert tuple(fresh(name)(x).shape) == result_shape(name, x)


@pytest.mark.parametrize("name", ATTENTION)
def test_channels_last_and_bfloat16(name):
    x = features(2, 6, 5)
    block = fresh(name)
    expected = block(x)
    last = torch.channels_last
    assert differs(copy.deepcopy(block).to(memory_format=last)(x.to(memory_format=last)), expected) < 1e-5
    half = block.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16 and half.isfinite().all()
    if name not in SAMPLED:  # two scores that round to the same may swap places
        assert differs(half.float(), expected) < 0.1


@pytest.mark.parametrize("name", ATTENTION)
def test_an_image_does_not_see_its_batch(name):
    x = features(4, 6, 5)
    block = fresh(name)
    together = block(x)
    assert differs(torch.cat([block(image[None]) for image in x]), together) < 1e-5


@pytest.mark.parametrize("name", [name for name in ATTENTION if name not in SAMPLED])
def test_gradients(name):
    block = fresh(name, torch.float64)
    x = features(2, 3, 2, torch.float64) + 0.01  # away from the kinks
    x.requires_grad_()
    parameters = [p for p in block.parameters() if p.requires_grad]
    assert torch.autograd.gradcheck(lambda x, *_: block(x), (x, *parameters), fast_mode=True)


@pytest.mark.parametrize("name", ATTENTION)
def test_weights_survive_saving_and_loading(name):
    block, other = fresh(name), ATTENTION[name](CHANNELS).eval()
    other.load_state_dict(block.state_dict())
    x = features(2, 6, 5)
    assert torch.equal(other(x), block(x))
    assert torch.equal(copy.deepcopy(block)(x), block(x))


class Network(nn.Module):
    """A convolution, the block, a linear layer."""

    def __init__(self, name):
        super().__init__()
        self.block = fresh(name)
        self.conv = nn.Conv2d(3, CHANNELS, 3)
        self.pool = nn.AdaptiveAvgPool2d(1) if name in GATING else nn.Identity()
        self.fc = nn.LazyLinear(4)

    def forward(self, x):
        return self.fc(self.pool(self.block(self.conv(x).relu())).flatten(1))


@pytest.mark.parametrize("name", [name for name in ATTENTION if name not in WITHOUT_MAP])
def test_the_gate_is_readable_and_adds_up(name):
    network = Network(name).eval()
    images = torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(0))
    network(images)
    found = attention_maps(network, images)
    assert found and all(key == "block" or key.startswith("block.") for key in found)
    for weights in found.values():
        assert weights.ndim == 4 and len(weights) == 2 and weights.isfinite().all()
        assert (weights >= 0).all() and weights.shape[2:] in {(7, 6), (1, 1)}
    if name in {"ltpa", "mil", "hard", "self_attention", "non_local", "gc", "brnpa"}:
        sums = [weights.sum((2, 3)) for weights in found.values()]
        assert all(torch.allclose(total, torch.ones(())) for total in sums)


@pytest.mark.parametrize("name", GATING)
def test_identity_changes_no_bit_and_every_parameter_learns(name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        block = ATTENTION[name](4 * CHANNELS, identity=True).double()  # a bottleneck of two units may start dead
    x = features(4, 6, 5, torch.float64).repeat(1, 4, 1, 1)
    for mode in (False, True):
        assert torch.equal(block.train(mode)(x), x)
    before = {key: value.clone() for key, value in block.named_parameters()}
    optimizer = torch.optim.AdamW(block.parameters(), 1e-2, weight_decay=0)
    target = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for _ in range(5):
        optimizer.zero_grad()
        (block(x) - target).square().mean().backward()
        optimizer.step()
    stuck = [key for key, value in block.named_parameters() if torch.equal(value, before[key])]
    assert not [key for key in stuck if not biased_before_norm(block, key)]


def biased_before_norm(block, key):
    """A bias right in front of a BatchNorm has no effect, hence no gradient."""
    owner, _, what = key.rpartition(".")
    modules = dict(block.named_modules())
    names = list(modules)
    behind = [modules[n] for n in names[names.index(owner) + 1 :]]
    return what == "bias" and bool(behind) and isinstance(behind[0], nn.BatchNorm1d | nn.BatchNorm2d)


@pytest.mark.compile
@pytest.mark.parametrize("name", ATTENTION)
def test_compiled_without_breaks_and_exported(name):
    block, x = fresh(name), features(2, 6, 5)
    expected = block(x)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    assert differs(compiled(x), expected) < 1e-5
    exported = torch.export.export(block, (x,))
    assert differs(exported.module()(x), expected) < 1e-5
    if name not in SAMPLED:
        x = x.requires_grad_()
        own = torch.autograd.grad(block(x).square().sum(), x)[0]
        assert differs(torch.autograd.grad(compiled(x).square().sum(), x)[0], own) < 1e-5
