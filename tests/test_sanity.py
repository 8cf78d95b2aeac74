"""Maps that must pass or fail the sanity tests by construction, by hand, and by slow reference."""

import math
import threading

import pytest
import torch
from tests.reference import sanity as reference
from tests.same import assert_same_state, close, state_of
from torch import nn
from torch.nn.utils import prune

from sightline.explainers import explain
from sightline.metrics import (
    Completeness,
    ParameterRandomization,
    RandomLogit,
    completeness,
    parameter_randomization,
    random_logit,
    randomization_curve,
)
from sightline.metrics.sanity import _similarity
from sightline.testing import ConstantModel, LinearModel

TARGETS = torch.tensor([0, 1, 2, 1])


class Net(nn.Module):
    """Registered in another order than it runs; a parameter of its own; weights that are read without a call."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.shift = nn.Parameter(torch.randn(1, 3, 5, 6))

    def forward(self, images):
        features = self.conv(self.norm(images + self.shift)).tanh().flatten(2).mT
        return self.head((features + self.attention(features, features, features)[0]).square().mean(1))


@pytest.fixture
def case():
    torch.manual_seed(0)
    model = Net()
    nn.init.normal_(model.norm.weight)
    return model, torch.randn(4, 3, 5, 6)


def gradient(model, images, targets):
    images = images.detach().clone().requires_grad_()
    with torch.enable_grad():
        score = model(images).gather(1, targets.reshape(-1, 1)).sum()
    return torch.autograd.grad(score, images)[0].sum(1, keepdim=True)


def edges(model, images, targets):
    return images.diff(dim=3).abs().sum(1, keepdim=True)


def linear(model, images, targets):
    return model.weight.detach()[targets.reshape(-1)]


def flat_of(values):
    return values.double().abs().flatten().tolist()


def two(*rows):
    return torch.tensor(rows)[:, None, None]


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([1.0, 2, 3], [1.0, 3, 2], 0.5),
        ([1.0, 2, 3, 4], [9.0, 7, 5, 2], -1),
        ([1.0, 2, 3, 4], [-1.0, -2, -3, -9], 1),
        ([1.0, 2, 3], [2.0, 1, 2], 0),
        ([0.0, 0, 1, 2], [0.0, 1, 1, 2], 3.75 / 4.5),
    ],
)
def test_rank_correlation_by_hand(a, b, expected):
    assert _similarity(two(a), two(b)).item() == pytest.approx(expected, abs=1e-7)
    assert reference.spearman(flat_of(two(a)), flat_of(two(b))) == pytest.approx(expected, abs=1e-12)


def test_rank_correlation_with_ties_equals_the_slow_one():
    generator = torch.Generator().manual_seed(0)
    maps, others = torch.randint(-4, 5, (2, 20, 1, 4, 5), generator=generator).double()
    slow = [reference.spearman(flat_of(a), flat_of(b)) for a, b in zip(maps, others, strict=True)]
    assert close(_similarity(maps, others), torch.tensor(slow, dtype=torch.float64))


def test_undefined_rank_correlations():
    ramp = two([1.0, 2, 3])
    for bad in ([5.0, 5, 5], [0.0, 0, 0], [1.0, -1, 1], [1.0, math.nan, 2], [1.0, math.inf, 2]):
        assert _similarity(ramp, two(bad)).isnan().all() and _similarity(two(bad), ramp).isnan().all()
    assert _similarity(two([3.0]), two([2.0])).isnan().all()
    batch = two([1.0, 2, 3], [2.0, 2, 2], [3.0, 2, 1])
    assert _similarity(batch, two([1.0, 2, 3]).expand(3, -1, -1, -1)).isnan().tolist() == [False, True, False]


def test_maps_of_another_size_are_resized():
    small = torch.arange(4.0).reshape(1, 1, 2, 2)
    assert _similarity(small, small.repeat_interleave(4, 2).repeat_interleave(4, 3)).item() == 1


@pytest.mark.parametrize("order", ["cascading", "independent"])
def test_a_map_blind_to_the_model_scores_exactly_one(case, order):
    model, images = case
    assert parameter_randomization(model, images, TARGETS, edges, order=order).tolist() == [1] * 4
    assert random_logit(model, images, TARGETS, edges).tolist() == [1] * 4
    _, curve = randomization_curve(model, images, TARGETS, edges, order=order)
    assert curve.shape == (4, 5 + 1) and (curve == 1).all()


def test_the_weights_of_a_linear_model_become_unrelated():
    generator = torch.Generator().manual_seed(0)
    model, images = LinearModel(torch.randn(3, 1, 40, 50, generator=generator)), torch.zeros(3, 1, 40, 50)
    targets = torch.tensor([0, 1, 2])
    found = parameter_randomization(model, images, targets, linear)
    assert (found.abs() < 0.1).all() and (found != 0).all()  # 4.5 standard errors, 1 / sqrt(2000)


def test_shuffled_are_the_own_entries_of_each_parameter(case):
    model, images = case
    seen = []

    def look(net, images, targets):
        seen.append({name: value.detach().clone() for name, value in net.state_dict().items()})
        return gradient(net, images, targets)

    parameter_randomization(model, images, TARGETS, look)
    before, after = seen
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value.flatten().sort().values, after[name].flatten().sort().values)
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    constant = {name for name, p in model.named_parameters() if p.unique().numel() == 1}
    assert constant == {"norm.bias", "attention.in_proj_bias", "attention.out_proj.bias"}
    assert moved == {name for name, _ in model.named_parameters()} - constant


def test_stages_run_from_the_logits_to_the_input(case):
    model, images = case
    seen = []

    def look(net, images, targets):
        seen.append({name: p.detach().clone() for name, p in net.named_parameters()})
        return gradient(net, images, targets)

    def changed(one):
        return {name.rpartition(".")[0] for name, value in one.items() if not torch.equal(value, seen[0][name])}

    names, curve = randomization_curve(model, images, TARGETS, look)
    assert names == ["head", "attention.out_proj", "attention", "conv", "norm", "Net"]
    order = ["head", "attention.out_proj", "attention", "conv", "norm", ""]
    assert [changed(one) for one in seen[1:]] == [set(order[: i + 1]) for i in range(6)]
    last = seen[-1]
    seen.clear()
    alone, independent = randomization_curve(model, images, TARGETS, look, order="independent")
    assert alone == names and [changed(one) for one in seen[1:]] == [{name} for name in order]
    assert torch.equal(independent[:, 0], curve[:, 0]) and torch.equal(last["conv.weight"], seen[4]["conv.weight"])
    mean = parameter_randomization(model, images, TARGETS, gradient, order="independent")
    assert close(mean, independent.mean(1))
    assert torch.equal(parameter_randomization(model, images, TARGETS, gradient), curve[:, -1])


def test_many_modules_are_grouped(case):
    model, images = case
    names, curve = randomization_curve(model, images, TARGETS, gradient, stages=3)
    assert names == ["head to attention.out_proj", "attention to conv", "norm to Net"] and curve.shape == (4, 3)
    all_stages = randomization_curve(model, images, TARGETS, gradient)[1]
    assert torch.equal(curve, all_stages[:, [1, 3, 5]])
    assert randomization_curve(model, images, TARGETS, gradient, stages=1)[0] == ["head to Net"]


def test_similarities_of_the_curve_equal_the_slow_ones(case):
    model, images = case
    seen = []

    def look(net, images, targets):
        seen.append(gradient(net, images, targets))
        return seen[-1]

    _, curve = randomization_curve(model.double(), images.double(), TARGETS, look)
    slow = [[reference.spearman(flat_of(seen[0][i]), flat_of(maps[i])) for maps in seen[1:]] for i in range(4)]
    assert close(curve, torch.tensor(slow, dtype=torch.float64))


def test_stages_without_a_value_do_not_count(case):
    model, images = case

    def sometimes_flat(net, images, targets):
        return gradient(net, images, targets) * float(torch.equal(net.head.weight, model.head.weight))

    mean = parameter_randomization(model, images, TARGETS, sometimes_flat, order="independent")
    curve = randomization_curve(model, images, TARGETS, gradient, order="independent")[1]
    assert close(mean, curve[:, 1:].mean(1))
    assert parameter_randomization(model, images, TARGETS, sometimes_flat).isnan().all()


def test_another_class_of_a_linear_model_by_reference():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 1, 4, 5, generator=generator, dtype=torch.float64)
    model, targets = LinearModel(weight), torch.tensor([0, 1])
    slow = reference.spearman(flat_of(weight[0]), flat_of(weight[1]))
    found = random_logit(model, torch.zeros(2, 1, 4, 5, dtype=torch.float64), targets, gradient)
    assert close(found, torch.tensor([slow, slow], dtype=torch.float64))
    opposite = LinearModel(torch.stack([weight[0], -weight[0]]))
    assert random_logit(opposite, torch.zeros(2, 1, 4, 5).double(), targets, gradient).tolist() == [1, 1]


def test_the_other_class_is_another_and_drawn_by_target_and_seed():
    model, images = ConstantModel(torch.zeros(7)), torch.rand(21, 1, 2, 3)
    targets = torch.arange(7).repeat(3)

    def drawn(seed, targets=targets):
        asked = []

        def look(net, images, targets):
            asked.append(targets)
            return images

        random_logit(model, images[: len(targets)], targets, look, seed=seed)
        return asked[1]

    draws = [drawn(seed) for seed in range(30)]
    assert all((one != targets).all() and (one >= 0).all() and (one < 7).all() for one in draws)
    assert torch.equal(drawn(3), draws[3]) and torch.equal(drawn(3, targets[4:6]), draws[3][4:6])
    assert drawn(3, targets[:, None]).shape == (21, 1)
    assert all(len({int(one[k]) for one in draws}) == 6 for k in range(7))
    assert all(torch.equal(one[:7], one[7:14]) for one in draws)
    assert len(((draws[0] - targets) % 7).unique()) > 1


def test_a_single_logit_has_two_classes():
    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 1)

        def forward(self, images):
            return self.linear(images.flatten(1))

    model, images, asked = One(), torch.rand(2, 1, 2, 2), []

    def look(net, images, targets):
        asked.append(targets.tolist())
        return images

    random_logit(model, images, torch.tensor([0, 1]), look)
    assert asked == [[0, 1], [1, 0]]
    weight = model.linear.weight.detach().reshape(1, 1, 2, 2)
    exact = torch.cat([-weight, weight]) * images
    assert completeness(model, images, torch.tensor([0, 1]), exact).tolist() == pytest.approx([0, 0], abs=1e-6)


@pytest.mark.parametrize("metric", [parameter_randomization, random_logit])
def test_batches_and_order_change_nothing_and_methods_share_one_pass(case, metric):
    model, images = case
    calls = []

    def both(net, images, targets):
        calls.append(len(images))
        return {"gradient": gradient(net, images, targets), "edges": edges(net, images, targets)}

    whole = metric(model, images, TARGETS, gradient)
    assert whole.shape == (4,) and ((whole > -1) & (whole < 1)).all() and len(whole.unique()) == 4
    found = metric(model, images, TARGETS, both)
    assert calls == [4, 4] and torch.equal(found["gradient"], whole) and (found["edges"] == 1).all()
    assert torch.equal(metric(model, images, TARGETS[:, None], gradient), whole)
    alone = [metric(model, images[i : i + 1], TARGETS[i : i + 1], gradient) for i in range(4)]
    assert close(torch.cat(alone), whole)
    assert close(metric(model, images.flip(0), TARGETS.flip(0), gradient).flip(0), whole)
    seeds = [metric(model, images, TARGETS, gradient, seed=seed) for seed in (0, 1, 2, 3)]
    assert torch.equal(seeds[0], whole) and len(torch.stack(seeds).unique(dim=0)) > 1


@pytest.mark.parametrize("metric", [parameter_randomization, randomization_curve, random_logit])
def test_model_and_random_state_are_left_alone(case, metric):
    model, images = case
    model.train().norm.eval()
    model.head.weight.requires_grad_(False)
    model.conv.weight.grad = torch.ones_like(model.conv.weight)
    calls = []

    def look(net, images, targets):
        torch.rand(3)
        assert not any(module.training for module in net.modules())
        assert not any(module._forward_pre_hooks for module in net.modules())
        calls.append(net)
        if len(calls) == 4:
            raise RuntimeError("broken")
        return gradient(net, images, targets)

    before = state_of(model)
    metric(model, images, TARGETS, look, **({} if metric is random_logit else {"stages": 1}))
    assert_same_state(before, state_of(model))
    with pytest.raises(RuntimeError, match="broken"):
        metric(model, images, TARGETS, look, **({} if metric is random_logit else {"stages": 1}))
    assert_same_state(before, state_of(model))
    assert calls[0] is model and (metric is random_logit) == (calls[1] is model)


def test_works_inside_inference_mode(case):
    model, images = case
    whole = parameter_randomization(model, images, TARGETS, gradient)
    with torch.inference_mode():
        assert torch.equal(parameter_randomization(model, images, TARGETS, gradient), whole)


def test_bad_inputs_say_what_to_do(case, unchecked):
    model, images = case
    with pytest.raises(ValueError, match="expected order to be one of cascading, independent; got 'random'"):
        parameter_randomization(model, images, TARGETS, edges, order="random")
    with pytest.raises(ValueError, match="expected at least 1 stage, got 0"):
        parameter_randomization(model, images, TARGETS, edges, order="independent", stages=0)
    with pytest.raises(ValueError, match="expected a model with parameters, got none in Flatten"):
        parameter_randomization(nn.Flatten(), images, TARGETS, edges)
    with pytest.raises(ValueError, match=r"expected fill 'zero'.*got 'gray'"):
        completeness(model, images, TARGETS, images[:, :1], fill="gray")


def linear_case():
    generator = torch.Generator().manual_seed(0)
    model = LinearModel(torch.randn(3, 2, 4, 5, generator=generator))
    images = torch.randn(4, 2, 4, 5, generator=generator)
    return model, images, model.weight.detach()[TARGETS]


@pytest.mark.parametrize("fill", ["zero", "mean", "blur", "inpaint", 0.7, torch.tensor([0.5, -2.0])])
def test_the_exact_map_of_a_linear_model_is_complete(fill):
    model, images, weight = linear_case()
    colors = {"zero": 0.0, "mean": images.mean((2, 3), keepdim=True), "inpaint": images.mean((2, 3), keepdim=True)}
    if isinstance(fill, str) and fill == "blur":
        from torchvision.transforms.v2.functional import gaussian_blur

        empty = gaussian_blur(images, [7, 7], [9 / 4, 9 / 4])
    elif isinstance(fill, torch.Tensor):
        empty = fill[:, None, None]
    else:
        empty = colors.get(fill, fill)
    exact = (weight * (images - empty)).sum(1, keepdim=True)
    assert (completeness(model, images, TARGETS, exact, fill=fill) < 1e-5).all()
    for factor, gap in ((2.0, 1 / 3), (0.5, 1 / 3), (0.0, 1.0), (-1.0, 1.0), (3.0, 0.5)):
        found = completeness(model, images, TARGETS[:, None], factor * exact, fill=fill)
        assert found.tolist() == pytest.approx([gap] * 4, abs=1e-5)


def test_completeness_by_hand_and_at_its_edges():
    model, image, target = LinearModel(torch.ones(2, 1, 1, 2)), torch.tensor([[[[2.0, 4.0]]]]), torch.tensor([1])

    def gap(values, **options):
        return completeness(model, image, target, two(values), **options).item()

    assert gap([1.0, 5.0]) == 0 and gap([6.0]) == 0 and gap([0.0, 2.0]) == 0.5 and gap([-6.0, 0.0]) == 1
    assert gap([8.0, 0.0], fill="black", mean=[0.5], std=[0.5]) == 0
    assert math.isnan(gap([math.nan, 1.0])) and math.isnan(gap([math.inf, 1.0]))
    constant = ConstantModel(torch.tensor([0.0, 1.0]))
    assert completeness(constant, image, target, image).item() == 1
    assert completeness(constant, image, target, 0 * image).isnan().all()


def test_completeness_does_not_depend_on_the_batch_and_leaves_no_trace():
    model, images, weight = linear_case()
    maps = (weight * images).sum(1, keepdim=True) + 0.1
    model.train()
    before = state_of(model)
    whole = completeness(model, images, TARGETS, maps)
    assert_same_state(before, state_of(model))
    alone = [completeness(model, images[i : i + 1], TARGETS[i : i + 1], maps[i : i + 1]) for i in range(4)]
    assert close(torch.cat(alone), whole)
    assert close(completeness(model, images.flip(0), TARGETS.flip(0), maps.flip(0)).flip(0), whole)


def test_classes_average_the_functions(case):
    model, images = case
    given = {"model": model, "images": images, "targets": TARGETS, "explain": gradient, "maps": images[:, :1]}
    functions = {
        ParameterRandomization: parameter_randomization(model, images, TARGETS, gradient),
        RandomLogit: random_logit(model, images, TARGETS, gradient),
        Completeness: completeness(model, images, TARGETS, images[:, :1]),
    }
    for cls, values in functions.items():
        metric = cls()
        metric.update(**given)
        assert metric.compute().item() == pytest.approx(values.double().mean().item(), abs=1e-12)
        assert cls.higher_is_better is None


def input_x_gradient(model, images, targets):
    return explain(model, images, targets, ["input_x_gradient"])["input_x_gradient"]


def masked(layer):
    return prune.random_unstructured(layer, "weight", 0.3)


def locked(layer):
    layer.lock = threading.Lock()
    return layer


def remembering(layer):
    layer.register_forward_hook(lambda module, inputs, output: setattr(module, "seen", {"outputs": [output]}))
    return layer


WRAPPED = {
    "weight_norm": nn.utils.weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
    "prune": masked,
    "parametrized": nn.utils.parametrizations.weight_norm,
    "locked": locked,
    "remembering": remembering,
}


def small(wrap, ran=True):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        conv = nn.Conv2d(3, 8, 3, bias=False)
        model = nn.Sequential(wrap(conv), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)).eval()
    if ran:
        model(torch.ones(1, 3, 8, 8))
    return model


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("order", ["cascading", "independent"])
@pytest.mark.parametrize("name", WRAPPED)
def test_models_that_pytorch_does_not_copy_once_they_have_run(name, order):
    images, targets = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1])
    model, explained = small(WRAPPED[name]), []

    def explain_and_keep(model, images, targets):
        explained.append((model(images).detach(), input_x_gradient(model, images, targets)))
        return explained[-1][1]

    before = {key: value.clone() for key, value in model.state_dict().items()}
    logits = model(images).detach()
    found = parameter_randomization(model, images, targets, explain_and_keep, order=order)
    assert found.isfinite().all() and (found < 0.999).all()
    assert not any(torch.allclose(logits, shuffled) for shuffled, _ in explained[1:])
    assert torch.equal(model(images), logits) and explained[0][1].abs().sum() > 0
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    if name in ("locked", "remembering"):
        plain = small(lambda layer: layer)
        assert torch.equal(found, parameter_randomization(plain, images, targets, input_x_gradient, order=order))


@pytest.mark.parametrize("order", ["cascading", "independent"])
def test_a_mask_of_ones_changes_nothing(order):
    images, targets = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1])
    found, expected = (
        randomization_curve(small(wrap), images, targets, input_x_gradient, order=order)[1]
        for wrap in (lambda layer: prune.identity(layer, "weight"), lambda layer: layer)
    )
    assert torch.equal(found, expected)
