"""Poolings against slow loops from the papers, the authors' numbers and what must hold for any features."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.reference import brnpa, poolings
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sightline as sl
from sightline.attention.alignment import ALIGNMENT
from sightline.attention.bags import MILPooling
from sightline.attention.bilinear import BilinearCNN, GeneralizedMean, GlobalAveragePool, signed_root
from sightline.attention.parts import BilinearAttentionPooling, RepresentativeVectors, representative_vectors
from sightline.attention.pooling import AlignmentPooling
from sightline.models import create_model

GOLDEN = Path(__file__).parent / "golden"
UPDATES = list(product(("cosine", "normalized"), (1, 2)))


def rectified(*size, seed=0, dtype=torch.float64):
    """Features as behind a ReLU."""
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=dtype).relu()


def golden(name):
    return {key: torch.from_numpy(value) for key, value in np.load(GOLDEN / f"{name}.npz").items()}


def close(got, wanted, atol=1e-10):
    torch.testing.assert_close(got, wanted, rtol=0, atol=atol)


def test_representative_vectors_give_the_numbers_of_the_official_code():
    known = golden("brnpa")
    block = RepresentativeVectors(16, k=4)
    close(block(known["features"]), known["vectors"].flatten(1), 1e-5)
    close(block.weights(known["features"]), known["maps"], 1e-5)
    unrefined = RepresentativeVectors(16, k=4, refine=False)
    close(unrefined(known["features"]), known["vectors_unrefined"].flatten(1), 1e-5)
    sparsity = golden("sparsity")
    close(block.weights(sparsity["features"]), sparsity["maps"], 1e-5)


@pytest.mark.parametrize(("update", "power"), UPDATES)
def test_representative_vectors_equal_the_algorithm_position_by_position(update, power):
    features = rectified(3, 6, 5, 4)
    vectors, raw, maps, picks = brnpa.represent(features, 4, update, power)
    block = RepresentativeVectors(6, k=4, update=update, power=power)
    close(block(features), vectors.flatten(1))
    close(block.weights(features), maps)
    assert representative_vectors(features, k=4, update=update, power=power)[2].tolist() == picks
    close(RepresentativeVectors(k=4, update=update, power=power, refine=False)(features), raw.flatten(1))


def test_the_power_changes_the_later_picks():
    features = rectified(8, 6, 5, 4)
    one, two = (representative_vectors(features, k=4, power=power)[2] for power in (1, 2))
    assert torch.equal(one[:, 0], two[:, 0]) and not torch.equal(one, two)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("update", "power"), UPDATES)
def test_the_handwritten_gradient_is_that_of_the_algorithm(update, power, layout):
    features = torch.randn(2, 6, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plain = features.clone().requires_grad_()
    ours = features.clone(memory_format=layout).requires_grad_()
    of_vectors, of_maps = torch.randn(2, 3, 6, dtype=torch.float64), torch.randn(2, 3, 4, 3, dtype=torch.float64)
    gradients = []
    for leaf, (vectors, maps) in (
        (plain, brnpa.represent(plain, 3, update, power)[::2]),
        (ours, representative_vectors(ours, k=3, update=update, power=power)[:2]),
    ):
        loss = (vectors * of_vectors).sum() + (maps * of_maps).sum()
        gradients.append(torch.autograd.grad(loss, leaf)[0])
    close(gradients[1], gradients[0])
    assert gradients[1].is_contiguous(memory_format=layout)


@pytest.mark.parametrize("options", [{}, {"update": "normalized"}, {"refine": False}, {"first": "random"}])
def test_first_and_second_derivatives(options):
    features = rectified(2, 4, 3, 2).add(0.1).requires_grad_()
    block = RepresentativeVectors(4, **options).eval()
    assert gradcheck(block, features) and gradcheck(block.weights, features)
    assert gradgradcheck(block, features) and gradgradcheck(block.weights, features)


def test_orthogonal_parts_are_hit_one_after_the_other():
    directions = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))[0].abs()
    first, second = torch.zeros(2, 8)
    first[:4], second[4:] = directions[0, :4], directions[1, 4:]
    features = torch.zeros(1, 8, 6, 6)
    features[0, :, :2, :2] = 3 * first[:, None, None]
    features[0, :, 4:, 3:] = 2 * second[:, None, None]
    block = RepresentativeVectors(8, k=2)
    maps = block.weights(features)[0]
    close(maps[0, :2, :2].sum(), torch.tensor(1.0), 1e-6)
    close(maps[1, 4:, 3:].sum(), torch.tensor(1.0), 1e-6)
    close(block(features).unflatten(1, (2, 8))[0], torch.stack([3 * first, 2 * second]), 1e-5)
    close(block.similarities(features)[0], torch.eye(2), 1e-6)


def test_on_unstructured_features_the_vectors_are_nearly_one():
    alike = RepresentativeVectors(k=3).similarities(rectified(4, 64, 14, 14))
    assert alike.shape == (4, 3, 3) and (alike > 0.99).all() and (alike <= 1 + 1e-12).all()
    close(alike, alike.mT)


@pytest.mark.parametrize(("side", "again"), [(14, 0.5), (56, 1.0)])
def test_the_normalized_update_picks_the_same_position_again(side, again):
    """With many positions cosine / sum is tiny, and the scores stay as they are: the vectors collapse into one."""
    features = rectified(16, 64, side, side, dtype=torch.float32)
    for update, share in (("normalized", again), ("cosine", 0.0)):
        picks = representative_vectors(features, k=3, update=update)[2]
        same = (picks == picks[:, :1]).all(1).float().mean().item()
        assert same >= share if update == "normalized" else same == share
        assert update == "normalized" or (picks.sort(1).values.diff(dim=1) > 0).all()


def test_negative_cosines_count_as_zero():
    features = torch.tensor([[[[2.0, -1.0, 1.0]], [[0.0, 0.0, 0.5]]]])
    maps = RepresentativeVectors(k=2).weights(features)[0, :, 0]
    away = 1 / 1.25**0.5
    close(maps, torch.tensor([[1 / (1 + away), 0, away / (1 + away)], [0, 1, 0]]), 1e-4)


def test_maps_sum_to_one_and_empty_features_give_zero_with_a_finite_gradient():
    features = rectified(3, 6, 5, 4)
    features[1] = 0
    features[2, :, 2] = 0
    features.requires_grad_()
    block = RepresentativeVectors(6)
    vectors = block(features)
    maps = block.weights(features)
    close(maps.sum((2, 3)), torch.tensor([1.0, 0, 1]).double()[:, None].expand(3, 3))
    assert (vectors[1] == 0).all() and vectors.isfinite().all()
    gradient = torch.autograd.grad(vectors.square().sum() + maps.square().sum(), features)[0]
    assert gradient.isfinite().all() and gradient.abs().max() < 100 and (gradient[1] == 0).all()


def test_random_scores_are_drawn_in_training_and_fixed_in_eval_mode():
    features = rectified(4, 6, 5, 4) + 0.01  # a pick without any feature would have no weights
    block = RepresentativeVectors(6, first="random")
    torch.manual_seed(0)
    drawn = block(features)
    assert not torch.equal(block(features), drawn)
    torch.manual_seed(0)
    assert torch.equal(block(features), drawn)
    torch.manual_seed(0)
    vectors = brnpa.represent(features, 3, start=torch.rand(4, 20))[0]
    close(drawn, vectors.flatten(1))

    state = torch.get_rng_state()
    fixed = block.eval()(features)
    assert torch.equal(block(features), fixed) and torch.equal(torch.get_rng_state(), state)
    assert torch.equal(block(features[2:3])[0], fixed[2])
    assert not torch.equal(fixed, RepresentativeVectors(6)(features))


def test_the_gate_hands_on_the_maps_and_maps_put_in_its_place_are_used():
    features = rectified(2, 6, 5, 4)
    block = RepresentativeVectors(6)
    seen = []
    with block.gate.register_forward_hook(lambda module, inputs, output: seen.append(output)):
        block(features)
    close(seen[0], block.weights(features))
    with block.gate.register_forward_hook(lambda module, inputs, output: torch.full_like(output, 1 / 20)):
        close(block(features).unflatten(1, (3, 6)), features.mean((2, 3))[:, None].expand(-1, 3, -1))


def test_representative_vectors_explained():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), RepresentativeVectors(8), nn.Linear(24, 4)).double().eval()
    images = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    targets = torch.tensor([[0, 1], [2, 3]])
    automatic = sl.explain(model, images, targets, methods=("grad_cam", "activation_map"))
    assert automatic.layers["grad_cam"].startswith("1 ")
    several = automatic["grad_cam"]
    for column in range(2):
        close(several[:, column : column + 1], sl.explainers.grad_cam(model, images, targets[:, column], layer="1"))
    close(sl.attention_maps(model, images)["2"], model[2].weights(model[:2](images)).detach())
    assert sl.explainers.grad_cam(model, images, layer="2.gate").abs().max() > 0


def test_representative_vectors_under_autocast():
    features = rectified(2, 6, 5, 4, dtype=torch.float32).requires_grad_()
    block = RepresentativeVectors(6)
    expected = block(features)
    with torch.autocast("cpu", torch.bfloat16):
        close(block(features), expected, 1e-6)
        block(features).sum().backward()
    assert features.grad.isfinite().all()


def test_shapes_are_known_on_the_meta_device():
    features = torch.empty(2, 6, 5, 4, device="meta", requires_grad=True)
    vectors = RepresentativeVectors(6)(features)
    assert vectors.shape == (2, 18) and torch.autograd.grad(vectors.sum(), features)[0].shape == features.shape


class Largest(TorchDispatchMode):
    """Counts new tensors of at least `size` numbers."""

    def __init__(self, size):
        super().__init__()
        self.size, self.found, self.known = size, [], set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)}
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            new = isinstance(leaf, torch.Tensor) and leaf.untyped_storage().data_ptr() not in before
            if new and leaf.untyped_storage().nbytes() >= self.size * leaf.element_size():
                self.found.append(str(func))
        return output


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_no_copy_of_the_features_forward_and_one_tensor_of_their_size_backward(layout):
    features = rectified(2, 64, 12, 11).contiguous(memory_format=layout).requires_grad_()
    with Largest(features.numel()) as forward:
        vectors = RepresentativeVectors(64)(features)
    gradient = torch.ones_like(vectors)
    with Largest(features.numel()) as backward:
        vectors.backward(gradient)
    assert forward.found == [] and backward.found == ["aten.mul.Tensor"]


@pytest.mark.usefixtures("unchecked")
def test_bad_options_of_representative_vectors_are_one_clear_line():
    with pytest.raises(ValueError, match=r"expected at least k=7 positions, got 6 \(2x3\); take a smaller k"):
        RepresentativeVectors(4, k=7)(torch.rand(1, 4, 2, 3))
    for options, line in (
        ({"update": "x"}, "expected update to be one of cosine, normalized; got 'x'"),
        ({"first": "x"}, "expected first to be one of norm, random; got 'x'"),
        ({"power": 3}, "expected power to be one of 1, 2; got 3"),
        ({"k": 0}, "expected k of 1 or more vectors, got 0; 3 is the paper's"),
    ):
        with pytest.raises(ValueError, match=line):
            RepresentativeVectors(4, **options)
    assert RepresentativeVectors(k=2).out_channels is None and RepresentativeVectors(512).out_channels == 1536


@pytest.mark.parametrize("variant", ["wsdan", "brnpa"])
def test_bilinear_attention_equals_the_equations(variant):
    torch.manual_seed(0)
    block = BilinearAttentionPooling(6, k=2, variant=variant, normalized=False).double()
    features = rectified(3, 6, 5, 4)
    block(features)
    maps = block.eval().gate(features).detach()
    assert maps.shape == (3, 2, 5, 4) and (maps >= 0).all() and (maps > 0).any()
    wanted = torch.from_numpy(poolings.attended(features.numpy(), maps.numpy()))
    close(block(features), wanted.flatten(1))
    block.normalized = True
    rooted = torch.from_numpy(np.stack([poolings.signed_root(row, 1e-6) for row in wanted.flatten(1).numpy()]))
    close(block(features), 100 * rooted / rooted.norm(dim=1, keepdim=True), 1e-9)
    close(block(features).norm(dim=1), torch.full((3,), 100.0).double(), 1e-9)


def test_the_maps_of_the_two_variants():
    torch.manual_seed(0)
    features = rectified(3, 6, 5, 4)
    gate = BilinearAttentionPooling(6, k=2).double().gate
    scores = torch.einsum("bchw,kc->bkhw", features, gate[0].weight[:, :, 0, 0])
    centered = scores - scores.mean((0, 2, 3), keepdim=True)
    close(gate(features), (centered / (centered.square().mean((0, 2, 3), keepdim=True) + 1e-5).sqrt()).relu())

    gate = BilinearAttentionPooling(6, k=2, variant="brnpa").double().eval().gate
    block, last = gate[0], gate[1]
    hidden = (features + block.bn2(block.conv2(block.bn1(block.conv1(features)).relu()))).relu()
    wanted = torch.einsum("bchw,kc->bkhw", hidden, last.weight[:, :, 0, 0]) + last.bias[:, None, None]
    close(gate(features), wanted.relu())


def test_only_wsdan_normalizes_by_itself():
    assert BilinearAttentionPooling(4).normalized and not BilinearAttentionPooling(4, variant="brnpa").normalized
    assert BilinearAttentionPooling(4, variant="brnpa", normalized=True).normalized
    assert BilinearAttentionPooling(512, k=32).out_channels == 32 * 512


def test_bilinear_cnn_equals_the_equations():
    torch.manual_seed(0)
    features = torch.randn(3, 4, 5, 6, dtype=torch.float64)
    wanted = torch.from_numpy(np.stack([poolings.bilinear(image) for image in features.numpy()]))
    got = BilinearCNN(4)(features)
    close(got, wanted, 1e-6)
    close(got.norm(dim=1), torch.ones(3).double())
    block = BilinearCNN(4, project=3).double()
    assert block.out_channels == 9 and BilinearCNN(4).out_channels == 16
    close(block(features), BilinearCNN(3)(block.project(features)))


def test_signed_root_has_a_finite_slope_everywhere():
    x = torch.tensor([-4.0, -1e-8, 0.0, 1e-30, 0.25], dtype=torch.float64, requires_grad=True)
    y = signed_root(x)
    close(y, torch.tensor([-2.0, -1e-5, 0, 0, 0.5]).double(), 2e-6)
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert slope[2].item() == pytest.approx(1000) and (slope > 0).all() and (slope <= 1000.001).all()
    dead = torch.zeros(2, 4, 3, 3, requires_grad=True)
    for block in (BilinearCNN(4), BilinearAttentionPooling(4).eval(), GeneralizedMean(4)):
        out = block(dead)
        assert out.isfinite().all() and torch.autograd.grad(out.sum(), dead)[0].isfinite().all()


@pytest.mark.parametrize("gated", [True, False])
def test_instance_attention_equals_the_equations(gated):
    torch.manual_seed(0)
    block = MILPooling(6, hidden=5, gated=gated).double()
    features = torch.randn(3, 6, 4, 2, dtype=torch.float64)
    gate = block.gate
    layers = [gate.tanh, *([gate.sigmoid] if gated else [])]
    parameters = [p.detach().squeeze().numpy() for layer in layers for p in (layer.weight, layer.bias)]
    parameters += [] if gated else [None, None]
    maps, pooled = gate(features), block(features)
    bags = features.flatten(2).mT
    for n, bag in enumerate(bags.numpy()):
        weights, vector = poolings.instances(bag, *parameters, gate.score.weight.detach().flatten().numpy())
        close(maps[n].flatten().detach(), torch.from_numpy(weights))
        close(pooled[n].detach(), torch.from_numpy(vector))
    close(block.forward_bag(bags), pooled)


def test_padding_of_a_bag_changes_nothing_and_order_neither():
    torch.manual_seed(0)
    block = MILPooling(6).double()
    bag = torch.randn(2, 7, 6, dtype=torch.float64)
    mask = torch.arange(7) < torch.tensor([[7], [4]])
    pooled = block.forward_bag(bag, mask)
    close(pooled[:1], block.forward_bag(bag[:1]))
    close(pooled[1:], block.forward_bag(bag[1:, :4]))
    close(block.forward_bag(torch.where(mask[:, :, None], bag, 1e6), mask), pooled)
    order = torch.randperm(7)
    close(block.forward_bag(bag[:, order], mask[:, order]), pooled)
    empty = block.forward_bag(bag, torch.zeros_like(mask))
    assert (empty == 0).all() and torch.autograd.grad(empty.sum(), block.gate.score.weight)[0].isfinite().all()


def test_a_gated_bag_is_read_tile_by_tile():
    block = MILPooling(6)
    seen = []
    with block.gate.register_forward_hook(lambda module, inputs, output: seen.append(output)):
        block.forward_bag(torch.randn(2, 5, 6), torch.ones(2, 5, dtype=torch.bool))
    assert seen[0].shape == (2, 1, 5, 1)
    close(seen[0].sum((2, 3)), torch.ones(2, 1), 1e-6)


def test_means():
    features = rectified(3, 6, 5, 4)
    close(GlobalAveragePool(6)(features), features.mean((2, 3)))
    close(GeneralizedMean(6, p=1.0).double()(features), features.clamp_min(1e-6).mean((2, 3)))
    hand = (features.clamp_min(1e-6) ** 3).mean((2, 3)) ** (1 / 3)
    close(GeneralizedMean(6).double()(features), hand)
    close(
        GeneralizedMean(6, p=300.0).double()(features / features.amax()), features.amax((2, 3)) / features.amax(), 0.02
    )
    block = GeneralizedMean(6).double()
    block(features).sum().backward()
    assert block.p.grad.abs() > 0
    constant = torch.full((1, 6, 3, 3), 2.5).double()
    close(block(constant), torch.full((1, 6), 2.5).double())


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: BilinearAttentionPooling(4, variant="x"), "expected variant to be one of wsdan, brnpa; got 'x'"),
        (lambda: BilinearAttentionPooling(4, k=0), "expected k of 1 or more vectors, got 0"),
        (lambda: BilinearCNN(4, project=0), "expected project of 1 channel or more, got 0; None keeps all"),
        (lambda: GeneralizedMean(4, p=0.0), "expected p above 0, got 0.0; 3 is the paper's"),
        (lambda: MILPooling(4, hidden=0), "expected hidden of 1 or more, got 0; 128 is the paper's"),
    ],
)
def test_bad_options_are_one_clear_line(make, line):
    with pytest.raises(ValueError, match=line):
        make()


@pytest.mark.compile
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("options", [{}, {"refine": False}, {"update": "normalized", "power": 2}, {"first": "random"}])
def test_representative_vectors_compiled_and_exported(options, layout):
    features = rectified(2, 6, 5, 4, dtype=torch.float32).contiguous(memory_format=layout).requires_grad_()
    block = RepresentativeVectors(6, **options).eval()
    torch.compiler.reset()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    close(compiled(features), block(features), 1e-6)
    own, theirs = (torch.autograd.grad(f(features).square().sum(), features)[0] for f in (block, compiled))
    close(theirs, own, 1e-6)
    exported = torch.export.export(block, (features.detach(),)).module()
    close(exported(features), block(features), 1e-6)
    torch.compile(block.train(), backend="aot_eager", fullgraph=True)(features).sum().backward()


@pytest.mark.compile
def test_bags_compiled():
    block = MILPooling(6)
    bag, mask = torch.randn(2, 5, 6), torch.arange(5) < torch.tensor([[5], [2]])
    compiled = torch.compile(block.forward_bag, backend="aot_eager", fullgraph=True)
    close(compiled(bag, mask), block.forward_bag(bag, mask), 1e-6)


@pytest.mark.parametrize("query", ["mean", "learned"])
@pytest.mark.parametrize("function", ALIGNMENT)
def test_alignment_pooling_is_the_mean_weighted_by_its_function(function, query):
    """Position by position, from the alignment function alone."""
    torch.manual_seed(0)
    block = AlignmentPooling(6, function=function, query=query, hidden=5, max_keys=20).double().eval()
    features = torch.rand(2, 6, 3, 4, dtype=torch.float64)
    weights = block.gate(features, features.mean((2, 3)) if query == "mean" else block.query.expand(2, -1))
    pooled = block(features)
    for i in range(2):
        keys = [features[i, :, y, x] for y in range(3) for x in range(4)]
        asked = torch.stack(keys).mean(0) if query == "mean" else block.query
        scores = block.gate.attend.alignment(asked[None, None], torch.stack(keys)[None])[0, 0]
        exponents = (scores - scores.max()).exp()
        expected = [exponents[n] / exponents.sum() for n in range(12)]
        torch.testing.assert_close(weights[i, 0].flatten(), torch.stack(expected))
        torch.testing.assert_close(pooled[i], sum(w * k for w, k in zip(expected, keys, strict=True)))
    has_query = function not in ("feature",)
    if query == "learned" and has_query:
        pooled.sum().backward()
        assert block.query.grad.abs().sum() > 0


@pytest.mark.parametrize("function", ALIGNMENT)
def test_a_network_that_pools_by_an_alignment_function(function):
    model = create_model("cifar_resnet", num_classes=3, depth=8, width=0.5, attention=f"alignment:{function}").eval()
    images = torch.rand(2, 3, 32, 32)
    weights = sl.explain(model, images, methods=["attention"])["attention"]
    assert weights.shape == (2, 1, 8, 8)
    torch.testing.assert_close(weights.sum((2, 3)), torch.ones(2, 1))
    assert model(images).isfinite().all()


def test_alignment_pooling_refuses(unchecked):
    with pytest.raises(ValueError, match=r"expected function to be one of similarity, dot, .*; got 'additiv'"):
        create_model("cifar_resnet", depth=8, attention="alignment:additiv")
    with pytest.raises(ValueError, match="expected at most 3 keys, got 4"):
        AlignmentPooling(2, function="location", max_keys=3)(torch.zeros(1, 2, 2, 2))
    with pytest.raises(ValueError, match="expected query to be one of mean, learned; got 'first'"):
        AlignmentPooling(2, query="first")
    for hidden in (0, -3):
        with pytest.raises(ValueError, match=f"expected hidden of 1 or more, got {hidden}; leave it out for 2"):
            AlignmentPooling(2, function="additive", hidden=hidden)
    with pytest.raises(ValueError, match="expected one alignment function, got alignment:additive and function='dot'"):
        create_model("cifar_resnet", depth=8, attention="alignment:additive", attention_options={"function": "dot"})
