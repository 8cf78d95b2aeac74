"""Episodes, and classifiers made from a few images, against loops, closed forms and autograd."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from sightline.data import episodes
from sightline.data.sources import Listing
from sightline.inference import features_of
from sightline.models.few_shot import LEARNERS, gradient_steps
from sightline.testing import ConstantModel, PooledModel


def listing(*counts: int) -> Listing:
    """Images of as many classes, mixed; the last two have no label."""
    labels = np.repeat(np.arange(len(counts)), counts)
    labels = np.append(np.random.default_rng(0).permutation(labels), [-1, -1])
    return Listing(
        name="few", classes=tuple("abcdefgh"[: len(counts)]), labels=labels, names=[str(i) for i in range(len(labels))]
    )


def test_an_episode_has_different_images_of_different_classes():
    few = listing(9, 12, 8, 10, 20, 8)
    for one in episodes(few, 50, ways=4, shots=3, queries=5):
        assert (one.support.shape, one.query.shape) == ((4, 3), (4, 5))
        assert len({*one.classes.tolist()}) == 4
        assert (few.labels[one.support] == one.classes[:, None]).all()
        assert (few.labels[one.query] == one.classes[:, None]).all()
        assert len({*one.support.ravel().tolist(), *one.query.ravel().tolist()}) == 4 * 8


def test_episodes_follow_from_the_seed_and_their_number():
    few = listing(9, 12, 8)
    first, again, longer, other = (
        [np.concatenate([x.ravel() for x in one]).tolist() for one in episodes(few, n, ways=2, queries=4, seed=seed)]
        for n, seed in ((5, 0), (5, 0), (9, 0), (5, 1))
    )
    assert first == again == longer[:5]
    assert len({map(tuple, first)}) == 1 and all(one not in first for one in other)


def test_every_class_and_every_image_is_drawn_equally_often():
    few = listing(10, 10, 10, 30)
    drawn = [*episodes(few, 3000, ways=2, shots=1, queries=4)]
    kinds = np.bincount(np.concatenate([one.classes for one in drawn]), minlength=4)
    assert np.abs(kinds / 3000 - 0.5).max() < 4 * np.sqrt(0.25 / 3000)
    support = np.bincount(np.concatenate([one.support.ravel() for one in drawn]), minlength=62)
    expected = 3000 * 0.5 / np.array([10, 10, 10, 30])[few.labels[:60]]
    assert np.abs(support[:60] - expected).max() < 5 * np.sqrt(expected.max())
    assert not support[60:].any()  # without a label


@pytest.mark.parametrize(
    ("counts", "options", "message"),
    [
        ((20, 5, 20), {"queries": 5}, r"expected 1 \+ 5 images of each class, got 5 of 'b'"),
        ((20, 0, 20), {}, "got 0 of 'b'"),
        ((20, 20), {"ways": 3}, "expected at least 3 classes for 3-way episodes, got 2 in few"),
        ((20, 20), {"ways": 1}, "ways of 2 or more, got 1"),
        ((20, 20), {"shots": 0}, "shots of 1 or more, got 0"),
        ((20, 20), {"queries": 0}, "queries of 1 or more, got 0"),
        ((20, 20), {"count": 0}, "count of 1 or more, got 0"),
    ],
)
def test_impossible_episodes_are_refused_before_the_first_is_drawn(counts, options, message):
    with pytest.raises(ValueError, match=message):
        episodes(listing(*counts), **({"ways": 2} | options))


def test_numbers_of_episodes_are_whole(unchecked):
    with pytest.raises(TypeError, match=r"whole number as shots, got 1\.0"):
        episodes(listing(20, 20), ways=2, shots=1.0)


@pytest.fixture
def few() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return draw(4, 3, 6) + draw(4, 1, 6), draw(10, 6)


def by_loop(support: torch.Tensor, query: torch.Tensor, score) -> torch.Tensor:
    return torch.tensor(
        [[score(one, sum(images) / len(images)) for images in support] for one in query], dtype=torch.float64
    )


def test_centroid_and_cosine_equal_loops(few):
    distance = by_loop(*few, lambda x, mean: -sum((a - b) ** 2 for a, b in zip(x, mean, strict=True)))
    torch.testing.assert_close(LEARNERS["centroid"](*few), distance)
    angle = by_loop(*few, lambda x, mean: x.dot(mean) / x.dot(x).sqrt() / mean.dot(mean).sqrt())
    torch.testing.assert_close(LEARNERS["cosine"](*few), angle)


def test_logistic_regression_minimizes_its_loss(few):
    support, query = few
    images, labels = F.normalize(support.flatten(0, 1), dim=1), torch.arange(4).repeat_interleave(3)
    weight, bias = torch.zeros(4, 6, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    parameters = [weight.requires_grad_(), bias.requires_grad_()]
    exact = {"max_iter": 500, "tolerance_grad": 1e-12, "tolerance_change": 0.0, "line_search_fn": "strong_wolfe"}
    optimizer = torch.optim.LBFGS(parameters, **exact)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(F.linear(images, weight, bias), labels, reduction="sum") + weight.square().sum() / 2
        value.backward()
        return value

    optimizer.step(loss)
    expected = F.linear(F.normalize(query, dim=1), weight, bias).log_softmax(1)
    torch.testing.assert_close(LEARNERS["logistic"](*few), expected.detach(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", LEARNERS)
def test_every_learner_finds_classes_that_are_far_apart(name):
    support = 10 * torch.eye(5)[:, None] + 0.1 * torch.randn(5, 2, 5, generator=torch.Generator().manual_seed(1))
    assert LEARNERS[name](support, support.mean(1)).argmax(1).tolist() == [0, 1, 2, 3, 4]


def test_gradient_steps_equal_autograd(few):
    support = few[0]
    weight, bias = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    expected = [weight, bias]
    for _ in range(7):
        values = [value.detach().requires_grad_() for value in expected]
        loss = F.cross_entropy(F.linear(support.flatten(0, 1), *values), torch.arange(4).repeat_interleave(3))
        expected = [v - 0.3 * g for v, g in zip(values, torch.autograd.grad(loss, values), strict=True)]
    torch.testing.assert_close(gradient_steps(weight, bias, support, 7, 0.3), tuple(v.detach() for v in expected))


def test_gradient_steps_pass_the_gradient_on_as_if_they_added_a_constant():
    weight, bias = torch.zeros(2, 1, requires_grad=True), torch.zeros(2, requires_grad=True)
    support = torch.tensor([[[1.0]], [[-1.0]]], requires_grad=True)
    moved, shifted = gradient_steps(weight, bias, support, 1, 1.0)
    # by hand: probabilities are 1/2, so the gradient of the mean loss is -1/2 and 1/2 for the weights, 0 for the biases
    assert moved.tolist() == [[0.5], [-0.5]] and shifted.tolist() == [0.0, 0.0]
    query = torch.tensor([[2.0]])
    F.cross_entropy(F.linear(query, moved, shifted), torch.tensor([0])).backward()
    wrong = 1 / (1 + np.exp(2))  # logits 1 and -1: the probability of the second class
    torch.testing.assert_close(weight.grad, torch.tensor([[-2 * wrong], [2 * wrong]], dtype=torch.float32))
    torch.testing.assert_close(bias.grad, torch.tensor([-wrong, wrong], dtype=torch.float32))
    assert support.grad is None


def test_no_step_leaves_the_classifier():
    weight, bias = torch.randn(3, 2), torch.randn(3)
    moved, shifted = gradient_steps(weight, bias, torch.randn(3, 1, 2), 0, 1.0)
    assert torch.equal(moved, weight) and torch.equal(shifted, bias)


def test_features_are_the_input_of_the_head_and_carry_a_gradient():
    model = PooledModel(torch.ones(3, 2))
    images = torch.tensor([[1.0, 5.0], [2.0, 6.0]])[:, :, None, None].expand(-1, -1, 4, 4).clone().requires_grad_()
    features = features_of(model, images)
    assert features.tolist() == [[1.0, 5.0], [2.0, 6.0]]
    features.sum().backward()
    torch.testing.assert_close(images.grad, torch.full_like(images, 1 / 16))
    assert not any(part._forward_hooks for part in model.modules())


def test_features_of_a_model_without_a_linear_head_are_refused():
    with pytest.raises(ValueError, match=r"straight out of an nn\.Linear, got ConstantModel"):
        features_of(ConstantModel(torch.zeros(3)), torch.zeros(2, 3, 4, 4))
