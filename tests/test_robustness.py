"""Noise on the image: against the slow reference, against captum, and where the answer is known."""

import math

import pytest
import torch
from captum import metrics as captum
from tests.reference import sanity as reference
from tests.same import assert_same_state, close, state_of
from torch import nn

from sightline.metrics.faithfulness import infidelity
from sightline.metrics.perturbed import _squares
from sightline.metrics.robustness import FoolingRate, MaxSensitivity, fooling_rate, max_sensitivity
from sightline.testing import ConstantModel, LinearModel

TARGETS = torch.tensor([0, 1, 2, 1])


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.drop, self.head = nn.Conv2d(2, 4, 3, padding=1), nn.Dropout(), nn.Linear(4 * 6 * 7, 3)

    def forward(self, images):
        return self.head(self.drop(self.conv(images).tanh()).flatten(1))


@pytest.fixture
def case():
    torch.manual_seed(0)
    return Net().double().eval(), torch.randn(4, 2, 6, 7, dtype=torch.float64)


def gradient(model, images, targets):
    images = images.detach().clone().requires_grad_()
    with torch.enable_grad():
        score = model(images).gather(1, targets.reshape(-1, 1)).sum()
    return torch.autograd.grad(score, images)[0].sum(1, keepdim=True)


def noises(images, radius, samples, seed=0):
    """What the metric draws."""
    generator = torch.Generator().manual_seed(seed)
    draws = [radius * (2 * torch.rand(images.shape[1:], generator=generator) - 1) for _ in range(samples)]
    return torch.stack(draws).to(images)


@pytest.mark.parametrize(("radius", "samples"), [(0.02, 10), (0.5, 3), (1.0, 1)])
def test_max_sensitivity_equals_captum(case, radius, samples):
    model, images = case
    drawn = noises(images, radius, samples)

    def explain(inputs, target):
        inputs = inputs[0] if isinstance(inputs, tuple) else inputs
        return (gradient(model, inputs, target),)

    def perturb(inputs):  # each image is repeated in place
        return inputs + drawn.repeat(len(images), 1, 1, 1)

    theirs = captum.sensitivity_max(explain, images, perturb, n_perturb_samples=samples, target=TARGETS)
    ours = max_sensitivity(model, images, TARGETS, gradient, radius=radius, samples=samples)
    assert close(ours, theirs) and (ours > 0).all()


def test_max_sensitivity_equals_the_slow_one():
    images = torch.randn(3, 1, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    drawn = noises(images, 0.3, 5, seed=7).flatten(1).tolist()
    found = max_sensitivity(
        nn.Identity(), images, TARGETS[:3], lambda model, images, targets: images**3, radius=0.3, samples=5, seed=7
    )
    slow = [reference.max_sensitivity(lambda x: [v**3 for v in x], image.flatten().tolist(), drawn) for image in images]
    assert close(found, torch.tensor(slow, dtype=torch.float64))


def test_max_sensitivity_where_it_is_known():
    model, images = ConstantModel(torch.zeros(3)), torch.ones(4, 1, 5, 5)

    def of(explain, **options):
        return max_sensitivity(model, images, TARGETS, lambda model, images, targets: explain(images), **options)

    assert of(lambda x: x.sign()).tolist() == [0] * 4
    assert of(lambda x: x, radius=0.0).tolist() == [0] * 4
    assert of(lambda x: 1e6 * x).tolist() == pytest.approx(of(lambda x: x).tolist(), rel=1e-5)
    # of many pixels the noise has the norm radius / sqrt(3) relative to an image of ones
    many = max_sensitivity(model, torch.ones(1, 1, 300, 300), TARGETS[:1], lambda model, images, targets: images)
    assert many.item() == pytest.approx(0.02 / math.sqrt(3), rel=0.02)
    drawn = noises(torch.ones(1, 1, 300, 300), 0.02, 10)
    assert drawn.abs().max() <= 0.02 and drawn.min() < -0.0199 and drawn.max() > 0.0199
    assert of(lambda x: 0 * x).isnan().all()
    assert of(lambda x: x[:, :, :1, :1]).isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_max_sensitivity_of_values_that_are_not_finite(bad):
    images = torch.ones(3, 1, 2, 2)
    images[1] = 5
    model, calls = nn.Identity(), []

    def always(model, images, targets):
        return images.where(images < 3, bad)

    def later(model, images, targets):
        calls.append(1)
        return always(model, images, targets) if len(calls) == 3 else images

    for explain in (always, later):
        assert max_sensitivity(model, images, TARGETS[:3], explain).isnan().tolist() == [False, True, False]


def test_max_sensitivity_of_batches_orders_and_several_methods(case):
    model, images = case
    whole = max_sensitivity(model, images, TARGETS, gradient)

    def both(net, images, targets):
        return {"gradient": gradient(net, images, targets), "sign": images.sign()[:, :1]}

    found = max_sensitivity(model, images, TARGETS, both)
    assert torch.equal(found["gradient"], whole) and torch.equal(
        found["sign"], max_sensitivity(model, images, TARGETS, lambda model, images, targets: images.sign()[:, :1])
    )
    alone = [max_sensitivity(model, images[i : i + 1], TARGETS[i : i + 1], gradient) for i in range(4)]
    assert close(torch.cat(alone), whole)
    assert close(max_sensitivity(model, images.flip(0), TARGETS.flip(0), gradient).flip(0), whole)
    assert not torch.equal(max_sensitivity(model, images, TARGETS, gradient, seed=1), whole)


def test_max_sensitivity_leaves_model_and_random_state_alone(case):
    model, images = case
    model.train().head.eval()
    model.conv.weight.grad = torch.ones_like(model.conv.weight)
    calls = []

    def look(net, images, targets):
        torch.rand(3)
        assert not any(module.training for module in net.modules())
        calls.append(1)
        if len(calls) == 14:
            raise RuntimeError("broken")
        return gradient(net, images, targets)

    before, copy = state_of(model), images.clone()
    max_sensitivity(model, images, TARGETS, look)
    assert_same_state(before, state_of(model))
    with pytest.raises(RuntimeError, match="broken"):
        max_sensitivity(model, images, TARGETS, look)
    assert_same_state(before, state_of(model))
    assert len(calls) == 14 and torch.equal(copy, images)


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.5, 2.0])
def test_fooling_a_linear_model_equals_the_slow_one(epsilon):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 2, 3, 3, generator=generator)
    images = torch.randn(40, 2, 3, 3, generator=generator)
    labels = torch.randint(3, (40,), generator=generator)
    rows, slow = weight.double().flatten(1).tolist(), []
    for image, label in zip(images.double().flatten(1).tolist(), labels.tolist(), strict=True):
        step = reference.fast_gradient_sign(rows, image, label, epsilon)
        right = reference.largest_logit(rows, image) == label
        slow.append(float(reference.largest_logit(rows, step) != label) if right else math.nan)
    found = fooling_rate(LinearModel(weight), images, labels, epsilon=epsilon)
    assert torch.equal(found.nan_to_num(-1), torch.tensor(slow).nan_to_num(-1))
    expected = {0.0: {0.0}, 0.1: {0.0, 1.0}, 0.5: {0.0, 1.0}, 2.0: {1.0}}[epsilon]
    assert set(found[~found.isnan()].tolist()) == expected and found.isnan().any()


def test_fooling_takes_the_distance_to_the_boundary():
    # two classes with weights w and -w: the step of epsilon lowers w x by epsilon * |w|_1
    weight = torch.tensor([[[[2.0, -1.0, 0.0]]]])
    model, image = LinearModel(torch.cat([weight, -weight])), torch.tensor([[[[0.5, 0.1, 3.0]]]])
    label, distance = torch.tensor([0]), 0.9 / 3
    assert fooling_rate(model, image, label, epsilon=distance - 1e-3).item() == 0
    assert fooling_rate(model, image, label, epsilon=distance + 1e-3).item() == 1
    assert fooling_rate(model, image, 1 - label, epsilon=1.0).isnan().all()
    # a softmax is undone, and certainty (here a margin of 180) does not mask the gradient
    sure = nn.Sequential(model, nn.Softmax(1))
    assert [fooling_rate(sure, 100 * image, label, epsilon=epsilon).item() for epsilon in (29.9, 30.1)] == [0, 1]
    assert fooling_rate(ConstantModel(torch.tensor([1.0, 0.0])), image, label, epsilon=9.0).item() == 0


def test_fooling_climbs_the_loss_and_not_the_nearest_rival():
    # the rivals pull the first pixel apart; the nearest, 0.01 above the other, would pull it the wrong way
    rows, x = [[0.0, 1.0], [1.0, 0.01], [-5.0, 0.0]], [0.0, 1.0]
    assert reference.fast_gradient_sign(rows, x, 0, 0.2) == [-0.2, 0.8]
    model, image = LinearModel(torch.tensor(rows)[:, None, None]), torch.tensor(x)[None, None, None]
    assert fooling_rate(model, image, torch.tensor([0]), epsilon=0.2).item() == 1


def test_fooling_one_logit():
    class One(nn.Module):
        def forward(self, images):
            return images.sum((1, 2, 3))

    images = torch.tensor([[[[1.0]]], [[[-1.0]]], [[[1.0]]]])
    labels = torch.tensor([1, 0, 0])
    assert fooling_rate(One(), images, labels, epsilon=0.9).nan_to_num(-1).tolist() == [0, 0, -1]
    assert fooling_rate(One(), images, labels, epsilon=1.1).nan_to_num(-1).tolist() == [1, 1, -1]


def test_fooling_does_not_depend_on_the_batch_and_leaves_no_trace(case):
    model, images = case
    labels = model(images).argmax(1)
    labels[3] = (labels[3] + 1) % 3
    model.train().head.eval()
    model.conv.weight.grad = torch.ones_like(model.conv.weight)
    for epsilon in (0.01, 0.05, 0.2):
        before, copy = state_of(model), images.clone()
        whole = fooling_rate(model, images, labels, epsilon=epsilon)
        assert_same_state(before, state_of(model))
        assert torch.equal(copy, images) and not images.requires_grad
        assert whole.isnan().tolist() == [False] * 3 + [True]
        alone = [fooling_rate(model, images[i : i + 1], labels[i : i + 1, None], epsilon=epsilon) for i in range(4)]
        back = fooling_rate(model, images.flip(0), labels.flip(0), epsilon=epsilon).flip(0)
        with torch.inference_mode():
            inside = fooling_rate(model, images.clone(), labels, epsilon=epsilon)
        for other in (torch.cat(alone), back, inside):
            assert torch.equal(other.nan_to_num(-1), whole.nan_to_num(-1))


def test_bad_options_say_what_to_do(case):
    model, images = case
    with pytest.raises(ValueError, match=r"expected at least 1 sample and a radius of at least 0, got 0 and 0\.02"):
        max_sensitivity(model, images, TARGETS, gradient, samples=0)
    with pytest.raises(ValueError, match="expected at least 1 sample and a radius of at least 0, got 10 and -1"):
        max_sensitivity(model, images, TARGETS, gradient, radius=-1.0)
    with pytest.raises(ValueError, match="expected an epsilon of at least 0, got -1"):
        fooling_rate(model, images, TARGETS, epsilon=-1.0)


def test_classes_average_the_functions(case):
    model, images = case
    given = {"model": model, "images": images, "targets": TARGETS, "labels": TARGETS, "explain": gradient}
    functions = {
        MaxSensitivity: max_sensitivity(model, images, TARGETS, gradient),
        FoolingRate: fooling_rate(model, images, TARGETS),
    }
    for cls, values in functions.items():
        metric = cls()
        metric.update(**given)
        assert metric.compute().item() == pytest.approx(values.double().nanmean().item(), abs=1e-12)
    assert MaxSensitivity.higher_is_better is None  # a map that never looks at the image scores best


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("score", ["logit", "probability"])
def test_infidelity_equals_captum(case, score, normalize):
    model, images = case[0].float(), case[1].float()
    maps = gradient(model, images, TARGETS) * images.sum(1, keepdim=True)
    squares = _squares(6, 7)

    def perturb(inputs):  # each image is repeated in place
        hole = squares[:, None].repeat(len(images), 1, 1, 1).expand_as(inputs)
        return hole.to(inputs), inputs.masked_fill(hole, 0.0)

    def score_of(inputs):
        return model(inputs) if score == "logit" else model(inputs).softmax(1)

    over_channels = torch.cat([maps, torch.zeros_like(maps)], 1)  # captum wants one value per channel
    theirs = captum.infidelity(
        score_of, perturb, images, over_channels, target=TARGETS, n_perturb_samples=len(squares), normalize=normalize
    )
    ours = infidelity(model, images, TARGETS, maps, score=score, normalize=normalize)
    assert close(ours, theirs) and (ours > 0).all()
