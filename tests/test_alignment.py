"""The twelve alignment functions against plain loops, against one another, and in what they can learn."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.reference import alignment as reference
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from sightline.attention.alignment import (
    ALIGNMENT,
    ActivatedGeneral,
    Additive,
    Attend,
    BiasedGeneral,
    Concat,
    Deep,
    DotProduct,
    FeatureBased,
    GaussianKernel,
    General,
    GeneralizedKernel,
    LocationBased,
    NadarayaWatson,
    ScaledDotProduct,
    Similarity,
)
from sightline.attention.pooling import CompatibilityGate

HERE = Path(__file__).parent
D = 4

# name: (alignment for queries and keys of length D, its formula in plain floats)
CASES = {
    "similarity": (lambda: Similarity(), lambda a: reference.similarity),
    "dot": (lambda: DotProduct(), lambda a: reference.dot),
    "scaled_dot": (lambda: ScaledDotProduct(), lambda a: reference.scaled_dot),
    "general": (
        lambda: General(D, D),
        lambda a: lambda q, k: reference.general(q, k, a.project.weight.T.tolist()),
    ),
    "biased_general": (
        lambda: BiasedGeneral(D, D),
        lambda a: lambda q, k: reference.biased_general(q, k, a.project.weight.tolist(), a.project.bias.tolist()),
    ),
    "activated_general": (
        lambda: ActivatedGeneral(D, D),
        lambda a: (
            lambda q, k: reference.activated_general(q, k, a.project.weight.T.tolist(), a.bias.item(), act=math.tanh)
        ),
    ),
    "generalized_kernel": (
        lambda: GeneralizedKernel(torch.exp),
        lambda a: lambda q, k: reference.generalized_kernel(q, k, phi=math.exp),
    ),
    "concat": (
        lambda: Concat(D, D, 5),
        lambda a: (
            lambda q, k: reference.concat(
                q, k, a.W.weight.tolist(), a.W.bias.tolist(), a.w.weight[0].tolist(), act=math.tanh
            )
        ),
    ),
    "additive": (
        lambda: Additive(D, D, 5),
        lambda a: (
            lambda q, k: reference.additive(
                q,
                k,
                a.W1.weight.tolist(),
                a.W2.weight.tolist(),
                a.W1.bias.tolist(),
                a.w.weight[0].tolist(),
                act=math.tanh,
            )
        ),
    ),
    "deep": (
        lambda: Deep(D, D, 5, layers=4),
        lambda a: (
            lambda q, k: reference.deep(
                q,
                k,
                a.W0.weight.tolist(),
                a.W1.weight.tolist(),
                a.W1.bias.tolist(),
                [(layer.weight.tolist(), layer.bias.tolist()) for layer in a.inner],
                a.w.weight[0].tolist(),
                a.w.bias.item(),
                act=math.tanh,
            )
        ),
    ),
    "location": (lambda: LocationBased(D, 40), None),
    "feature": (
        lambda: FeatureBased(nn.Identity(), torch.square, (D, D), 5),
        lambda a: (
            lambda q, k: reference.additive(
                k,
                [x * x for x in k],
                a.W1.weight.tolist(),
                a.W2.weight.tolist(),
                a.W1.bias.tolist(),
                a.w.weight[0].tolist(),
                act=math.tanh,
            )
        ),
    ),
}
each_alignment = pytest.mark.parametrize("name", CASES)


def make(name, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    module = CASES[name][0]().to(dtype)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def random(*size, seed=0, dtype=torch.float64):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def inputs(q=3, k=7, dtype=torch.float64):
    queries, keys, values = random(2, q, D, seed=1), random(2, k, D, seed=2), random(2, k, 6, seed=3)
    return queries.to(dtype), keys.to(dtype), values.to(dtype)


def some_mask(q=3, k=7):
    """Half of the pairs, no key for one query."""
    mask = torch.rand(2, q, k, generator=torch.Generator().manual_seed(4)) > 0.5
    mask[:, 0, 0] = True
    mask[1, 2] = False
    return mask


def close(got, wanted, tolerance=1e-10):
    torch.testing.assert_close(got, torch.as_tensor(wanted, dtype=got.dtype), rtol=0, atol=tolerance)


def with_parameters(module, **values):
    """The module with these parameters, `W1_weight` for `W1.weight`; all must be named."""
    module.double().load_state_dict({key.replace("_", ".", 1): value for key, value in values.items()})
    return module


def test_there_are_twelve():
    assert list(ALIGNMENT) == list(CASES) and len(ALIGNMENT) == 12
    for name, kind in ALIGNMENT.items():
        assert type(make(name)) is kind


# Against the formulas


@pytest.mark.parametrize("name", [name for name in CASES if name != "location"])
def test_scores_equal_the_formula_pair_by_pair(name):
    queries, keys, _ = inputs()
    module = make(name)
    formula = CASES[name][1](module)
    close(module(queries, keys), reference.scores(formula, queries.tolist(), keys.tolist()))


def test_location_based_scores_are_rows_of_W_times_the_query():
    queries, keys, _ = inputs()
    module = make("location")
    wanted = [[reference.times(module.W.weight.tolist(), q)[:7] for q in qs] for qs in queries.tolist()]
    close(module(queries, keys), wanted)


@each_alignment
def test_attention_equals_the_loops(name):
    queries, keys, values = inputs()
    attention, mask = Attend(make(name)), some_mask()
    table = attention.gate.alignment(queries, keys).tolist()
    weights, reads = reference.attend(table, values.tolist(), mask.tolist())
    close(attention.gate(queries, keys, mask), weights)
    close(attention(queries, keys, values, mask), reads)


@pytest.mark.parametrize("name", ["general", "biased_general", "activated_general", "concat", "additive", "deep"])
def test_queries_and_keys_of_different_lengths(name):
    hidden = () if "general" in name else (5,)
    module = ALIGNMENT[name](3, 6, *hidden).double()
    queries, keys = random(2, 3, 3), random(2, 7, 6)
    formula = CASES[name][1](module)
    close(module(queries, keys), reference.scores(formula, queries.tolist(), keys.tolist()))


def test_scaled_dot_attention_is_torchs():
    queries, keys, values = inputs()
    attention, mask = Attend(ScaledDotProduct()), some_mask()
    mask[1, 2, 3] = True
    close(attention(queries, keys, values), F.scaled_dot_product_attention(queries, keys, values))
    close(
        attention(queries, keys, values, mask),
        F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask),
    )


# Against one another


def test_concat_is_additive_with_one_matrix():
    queries, keys, _ = inputs()
    additive = make("additive")
    state = additive.state_dict()
    concat = with_parameters(
        Concat(D, D, 5),
        W_weight=torch.cat([state["W1.weight"], state["W2.weight"]], 1),
        W_bias=state["W1.bias"],
        w_weight=state["w.weight"],
    )
    close(concat(queries, keys), additive(queries, keys))


def test_general_with_the_identity_is_dot():
    queries, keys, _ = inputs()
    general = with_parameters(General(D, D), project_weight=torch.eye(D))
    close(general(queries, keys), DotProduct()(queries, keys))


def test_scaled_dot_is_dot_over_the_root_of_the_length():
    queries, keys, _ = inputs()
    close(ScaledDotProduct()(queries, keys), DotProduct()(queries, keys) / 2)


def test_activated_general_without_activation_is_general():
    queries, keys, _ = inputs()
    general = make("general")
    activated = ActivatedGeneral(D, D, activation=nn.Identity()).double()
    activated.project.load_state_dict(general.project.state_dict())
    close(activated(queries, keys), general(queries, keys))


def test_biased_general_without_bias_is_general_with_the_transposed_matrix():
    queries, keys, _ = inputs()
    W = random(D, D)
    biased = with_parameters(BiasedGeneral(D, D), project_weight=W, project_bias=torch.zeros(D))
    wanted = reference.scores(lambda q, k: reference.general(q, k, W.T.tolist()), queries.tolist(), keys.tolist())
    close(biased(queries, keys), wanted)
    close(with_parameters(General(D, D), project_weight=W)(queries, keys), wanted)


def test_kernel_of_the_inputs_themselves_is_dot():
    queries, keys, _ = inputs()
    close(GeneralizedKernel(nn.Identity())(queries, keys), DotProduct()(queries, keys))


def test_deep_of_two_layers_is_additive_and_a_constant():
    queries, keys, _ = inputs()
    additive = make("additive")
    state = additive.state_dict()
    deep = with_parameters(
        Deep(D, D, 5, layers=2),
        W0_weight=state["W1.weight"],
        W1_weight=state["W2.weight"],
        W1_bias=state["W1.bias"],
        w_weight=state["w.weight"],
        w_bias=torch.tensor([0.7], dtype=torch.float64),
    )
    close(deep(queries, keys), additive(queries, keys) + 0.7)
    close(Attend(deep).gate(queries, keys), Attend(additive).gate(queries, keys))


def test_similarity_of_unit_vectors_is_dot_and_ignores_lengths():
    queries, keys, _ = inputs()
    unit_queries, unit_keys = F.normalize(queries, dim=2), F.normalize(keys, dim=2)
    close(Similarity()(unit_queries, unit_keys), DotProduct()(unit_queries, unit_keys))
    close(Similarity()(3 * queries, keys / 7), DotProduct()(unit_queries, unit_keys))


@each_alignment
def test_only_location_ignores_the_keys_and_only_feature_the_query(name):
    queries, keys, _ = inputs()
    module = make(name)
    scores = module(queries, keys)
    assert torch.equal(module(queries, keys + random(2, 7, D, seed=5)), scores) == (name == "location")
    assert torch.equal(module(queries + random(2, 3, D, seed=6), keys), scores) == (name == "feature")


@pytest.mark.parametrize("compat", ["dp", "pc", "none"])
def test_learn_to_pay_attention_is_one_of_the_twelve(compat):
    features, query = random(2, D, 3, 5, seed=7), random(2, D, seed=8)
    torch.manual_seed(0)
    gate = CompatibilityGate(D, compat=compat).double()
    if compat == "dp":
        alignment = DotProduct()
    else:
        parts = {"W1_weight": torch.eye(D), "W2_weight": torch.eye(D), "w_weight": gate.u.weight.detach()}
        with torch.no_grad():
            gate.u.bias.zero_()
        if compat == "pc":
            alignment = Additive(D, D, D, activation=nn.Identity())
        else:
            alignment = FeatureBased(nn.Identity(), torch.zeros_like, (D, D), D, activation=nn.Identity())
        with_parameters(alignment, W1_bias=torch.zeros(D), **parts)
    queries, keys = query.unsqueeze(1), features.flatten(2).transpose(1, 2)
    close(alignment(queries, keys).unflatten(2, (3, 5)), gate.scores(features, query))
    close(Attend(alignment).gate(queries, keys).unflatten(2, (3, 5)), gate(features, query))


def test_the_attention_gate_is_additive_with_relu():
    Wx, Wg, bg, psi = random(5, D, seed=1), random(5, 6, seed=2), random(5, seed=3), random(5, seed=4)
    additive = with_parameters(
        Additive(6, D, 5, activation=torch.relu), W1_weight=Wg, W1_bias=bg, W2_weight=Wx, w_weight=psi[None]
    )
    gating, local = random(2, 3, 6, seed=5), random(2, 7, D, seed=6)
    numbers = [part.tolist() for part in (Wx, Wg, bg, psi)]
    wanted = reference.scores(
        lambda g, x: reference.attention_gate(x, g, *numbers, bpsi=0.0), gating.tolist(), local.tolist()
    )
    close(additive(gating, local), wanted)


def test_numbers_of_the_official_attention_gate():
    """There each position has a query of its own: the gating vector under it."""
    with np.load(HERE / "golden" / "attention_gate_sigmoid.npz") as file:
        golden = {key: torch.from_numpy(value) for key, value in file.items()}
    weights = {key: golden[f"weight.{key}.weight"].flatten(1) for key in ("W_l", "W_g", "phi")}
    additive = Additive(12, 8, 10, activation=torch.relu)
    additive.load_state_dict(
        {
            "W1.weight": weights["W_g"],
            "W1.bias": torch.zeros(10),
            "W2.weight": weights["W_l"],
            "w.weight": weights["phi"],
        }
    )
    gating = F.interpolate(golden["gating"], scale_factor=2, mode="bilinear")
    queries = gating.permute(0, 2, 3, 1).reshape(-1, 1, 12)
    keys = golden["local"].permute(0, 2, 3, 1).reshape(-1, 1, 8)
    scores = additive(queries, keys).reshape(2, 1, 6, 6) + golden["weight.phi.bias"]
    close(scores, golden["scores"], 1e-5)


def test_positive_random_features_approach_softmax_attention():
    """Performers (2009.14794): phi(x) = exp(Rx - |x|^2 / 2) has the mean kernel exp(q^T k)."""
    queries, keys = 0.5 * random(1, 3, D, seed=1), 0.5 * random(1, 7, D, seed=2)
    wanted = Attend(DotProduct()).gate(queries, keys)
    errors = []
    for features in (100, 100_000):
        R = random(features, D)
        phi = lambda x, R=R: (x @ R.T - x.square().sum(2, keepdim=True) / 2).exp()  # noqa: E731
        kernel = GeneralizedKernel(phi)(queries, keys)
        errors.append((kernel / kernel.sum(2, keepdim=True) - wanted).abs().max().item())
    assert errors[1] < 0.005 < errors[0]


# Masks


@each_alignment
def test_a_mask_forbids_and_changes_nothing_else(name):
    queries, keys, values = inputs()
    module, mask = make(name), some_mask()
    scores = module(queries, keys, mask)
    assert torch.equal(scores == -torch.inf, ~mask)
    assert torch.equal(scores[mask], module(queries, keys)[mask])

    attention = Attend(module)
    weights = attention.gate(queries, keys, mask)
    assert (weights[~mask] == 0).all()
    close(weights.sum(2), mask.any(2))
    assert (attention(queries, keys, values, mask)[1, 2] == 0).all()
    everything = torch.ones_like(mask)
    assert torch.equal(attention(queries, keys, values, everything), attention(queries, keys, values))


@each_alignment
def test_masked_keys_are_as_good_as_absent(name):
    queries, keys, values = inputs()
    attention = Attend(make(name))
    mask = torch.arange(7).expand(2, 3, 7) < 4
    close(attention(queries, keys, values, mask), attention(queries, keys[:, :4], values[:, :4]))


@each_alignment
@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_gradients_also_where_everything_is_masked(name):
    attention = Attend(make(name))
    leaves = [part.requires_grad_() for part in inputs(q=3, k=4)]
    assert torch.autograd.gradcheck(lambda *parts: attention(*parts, some_mask(q=3, k=4)), leaves)
    with torch.autograd.detect_anomaly(check_nan=True):  # no NaN on the way either
        attention(*leaves, some_mask(q=3, k=4)).square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in attention.parameters())


# What must hold for any block


@each_alignment
def test_single_images_and_state_dicts_change_nothing(name):
    queries, keys, values = inputs()
    attention, other = Attend(make(name)), Attend(make(name, seed=1))
    wanted = attention(queries, keys, values)
    close(torch.cat([attention(queries[i : i + 1], keys[i : i + 1], values[i : i + 1]) for i in range(2)]), wanted)
    other.load_state_dict(attention.state_dict())
    assert torch.equal(other(queries, keys, values), wanted)


@each_alignment
def test_half_precision_and_huge_inputs_stay_finite(name):
    attention = Attend(make(name, dtype=torch.bfloat16))
    queries, keys, values = inputs(dtype=torch.bfloat16)
    read = attention(queries / 4, keys / 4, values)
    assert read.dtype == torch.bfloat16
    close(read, attention.double()(queries.double() / 4, keys.double() / 4, values.double()).bfloat16(), 2**-5)
    if name != "generalized_kernel":  # exp(1e4) is infinite
        queries, keys, values = inputs(dtype=torch.float32)
        assert Attend(make(name, dtype=torch.float32))(1e4 * queries, 1e4 * keys, values).isfinite().all()


@each_alignment
def test_export(name):
    attention, arguments = Attend(make(name)).eval(), (*inputs(), some_mask())
    close(torch.export.export(attention, arguments).module()(*arguments), attention(*arguments))


@pytest.mark.compile
@each_alignment
def test_compiles_in_one_graph(name):
    attention, arguments = Attend(make(name)), (*inputs(), some_mask())
    torch._dynamo.reset()  # all twelve share Attend.forward, and one function is recompiled only so often
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    close(compiled(*arguments), attention(*arguments))


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that any operation returns."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.numbers = max(self.numbers, result.numel())
        return result


@each_alignment
def test_no_tensor_larger_than_the_formula_asks_for(name):
    """Pairs are never laid out: only concat, additive and deep need their hidden vector, 5 long, for each of them."""
    module = make(name)
    with Largest() as largest:
        module(*inputs(q=30, k=40)[:2])
    hidden = 5 if name in ("concat", "additive", "deep") else 1
    assert largest.numbers == 2 * 30 * 40 * hidden


# Kernel regression


def test_kernel_regression_equals_its_formula():
    queries, keys, values = random(1, 9, 1, seed=1), random(1, 20, 1, seed=2), random(1, 20, 1, seed=3)
    numbers = keys.flatten().tolist(), values.flatten().tolist()
    for bandwidth in (0.2, 1.0, 5.0):
        wanted = [reference.nadaraya_watson(query, *numbers, bandwidth) for query in queries.flatten().tolist()]
        close(NadarayaWatson(bandwidth)(queries, keys, values).flatten(), wanted)


def test_kernel_regression_is_softmax_attention():
    queries, keys, values = inputs()
    distances = (queries.unsqueeze(2) - keys.unsqueeze(1)).square().sum(3)
    weights = (-distances / (2 * 0.8**2)).softmax(2)
    regression = NadarayaWatson(0.8)
    close(regression.gate(queries, keys), weights)
    close(regression(queries, keys, values), weights @ values)
    single = [part.float() for part in (queries, keys, values)]
    close(regression(*single), (weights @ values).float(), 1e-6)


def test_kernel_regression_over_unit_keys_is_scaled_dot_attention():
    queries, keys, values = inputs()
    keys = F.normalize(keys, dim=2)
    regression = NadarayaWatson(bandwidth=D**0.25)  # h^2 = sqrt(d)
    close(regression(queries, keys, values), Attend(ScaledDotProduct())(queries, keys, values))


def test_kernel_regression_fits_a_sine():
    x = torch.linspace(0, 2 * math.pi, 50)[None, :, None]
    y = x.sin() + 0.2 * random(1, 50, 1, dtype=torch.float32)
    points = torch.linspace(0.1, 6.2, 200)[None, :, None]
    error = (NadarayaWatson(0.3)(points, x, y) - points.sin()).square().mean()
    of_the_mean = (y.mean() - points.sin()).square().mean()
    assert error < 0.02 < 0.45 < of_the_mean
    wide = NadarayaWatson(1e4)(points, x, y)
    close(wide, y.mean().expand_as(wide), 1e-5)


def test_kernel_regression_far_from_the_keys_and_far_from_zero():
    keys, values = torch.tensor([[[0.0], [1.0]]]), torch.tensor([[[3.0], [5.0]]])
    regression = NadarayaWatson(0.1)
    close(regression(torch.tensor([[[-50.0], [90.0]]]), keys, values), [[[3.0], [5.0]]])
    far = torch.tensor([[[5000.7]]]), keys + 5000.3, values
    close(regression(*far), regression(*(part.double() for part in far)), 1e-5)


def test_kernel_regression_gradients_half_precision_and_masks():
    parts = [part.requires_grad_() for part in inputs(q=3, k=4)]
    assert torch.autograd.gradcheck(lambda *parts: NadarayaWatson(0.8)(*parts, some_mask(q=3, k=4)), parts)
    half = NadarayaWatson(0.8)(*inputs(dtype=torch.bfloat16))
    assert half.dtype == torch.bfloat16
    close(half, NadarayaWatson(0.8)(*inputs()).bfloat16(), 0.05)
    at_a_key = torch.zeros(1, 1, 2, requires_grad=True)
    GaussianKernel(1.0)(at_a_key, torch.zeros(1, 3, 2)).sum().backward()
    assert (at_a_key.grad == 0).all()


# Errors


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q, k: DotProduct()(q, k[..., :3]), "expected queries and keys of one length, got 4 and 3; project one"),
        (lambda q, k: ScaledDotProduct()(q, k[..., :3]), "expected queries and keys of one length, got 4 and 3"),
        (lambda q, k: Similarity()(q, k[..., :3]), "expected queries and keys of one length, got 4 and 3"),
        (lambda q, k: GeneralizedKernel(torch.exp)(q, k[..., :3]), "expected queries and keys of one length"),
        (lambda q, k: LocationBased(D, 6)(q.float(), k), "expected at most 6 keys, got 7; build it with a larger"),
        (lambda q, k: DotProduct()(q, k, torch.ones(2, 3, 7)), "expected a boolean mask, .* got torch.float32; take"),
        (lambda q, k: Deep(D, D, 5, layers=1), "expected layers of 2 or more, got 1; take General"),
        (lambda q, k: NadarayaWatson(0.0), "expected a bandwidth above 0, got 0.0; take"),
        (lambda q, k: NadarayaWatson(math.nan), "expected a bandwidth above 0, got nan; take"),
    ],
)
def test_errors_are_one_clear_line(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call(*inputs()[:2])
    assert "\n" not in str(error.value)


# Learning

SYMBOLS, KEYS = 8, 6


class Retrieval(nn.Module):
    """Symbols to vectors, then attention over values that are the classes themselves, one-hot."""

    def __init__(self, alignment):
        super().__init__()
        self.embed_query = nn.Embedding(SYMBOLS, D)
        self.embed_key = nn.Embedding(SYMBOLS, D)
        self.attend = Attend(alignment)

    def forward(self, query, keys, values):
        return self.attend(self.embed_query(query), self.embed_key(keys), values)[:, 0]


def retrieval(task, number, generator):
    """Each image: KEYS different symbols in any order, each with a class of its own; one query; its class."""
    keys = torch.rand(number, SYMBOLS, generator=generator).argsort(1)[:, :KEYS]
    classes = torch.rand(number, KEYS, generator=generator).argsort(1)
    place = torch.randint(KEYS, (number,), generator=generator)
    if task == "named":  # the query is the symbol to look for
        query = keys.gather(1, place[:, None])
    elif task == "place":  # the query is the place to look at
        query = place[:, None]
    else:  # "marked": whatever the query, look for symbol 0
        query = torch.randint(SYMBOLS, (number, 1), generator=generator)
        rest = 1 + torch.rand(number, SYMBOLS - 1, generator=generator).argsort(1)[:, :KEYS]
        keys = rest.scatter(1, place[:, None], 0)
    return query, keys, F.one_hot(classes, KEYS).float(), classes.gather(1, place[:, None])[:, 0]


def learned(name, task, steps=300):
    """Accuracy on fresh examples after `steps` batches of 64; chance is 1 / KEYS."""
    torch.manual_seed(0)
    model = Retrieval(CASES[name][0]())
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for _ in range(steps):
        *example, target = retrieval(task, 64, generator)
        loss = F.nll_loss((model(*example) + 1e-6).log(), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    *example, target = retrieval(task, 2000, generator)
    return (model(*example).argmax(1) == target).float().mean().item()


LOCATION, FEATURE = "location", "feature"


@pytest.mark.parametrize(
    ("name", "task"),
    [*((name, "named") for name in CASES if name not in (LOCATION, FEATURE)), (LOCATION, "place"), (FEATURE, "marked")],
)
def test_each_learns_to_retrieve(name, task):
    """Location-based attention cannot see keys, feature-based not the query: each gets a task that it can do."""
    assert learned(name, task) > (0.5 if name == "activated_general" else 0.95)  # tanh: no score beyond 1


@pytest.mark.parametrize(("name", "task"), [(LOCATION, "named"), (FEATURE, "named"), ("additive", "place")])
def test_what_cannot_be_known_is_not_learned(name, task):
    """Keys unseen, query unseen; and attention by content does not know a key's place."""
    assert learned(name, task) < 1 / KEYS + 0.04


# The example


def test_sequence_reversal_attends_from_the_last_to_the_first(tmp_path):
    spec = importlib.util.spec_from_file_location("sequence_reversal", HERE.parent / "examples/sequence_reversal.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    picture = tmp_path / "alignment.png"
    result = example.main(["--steps", "150", "--out", str(picture)])
    for name in ("bahdanau", "luong"):
        assert result[f"{name}_accuracy"] > 0.8 and result[f"{name}_antidiagonal"] > 0.8
    assert picture.stat().st_size > 0
