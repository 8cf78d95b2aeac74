"""FCAN and MG-CNN: rewards, gradients and losses against loops and enumeration; what each loss trains."""

import copy
import math
from itertools import product

import numpy as np
import pytest
import torch
from tests.reference.hard import softmax
from torch.nn import functional as F

import sightline as sl
from sightline.models import create_model
from sightline.models.fcan import FCAN, Policies, glimpse_rewards
from sightline.models.mg_cnn import MGCNN
from sightline.models.trunks import Trunk
from sightline.recipe import Optim
from sightline.training.losses import Loss

SMALL = {"backbone": "cifar_resnet", "backbone_options": {"depth": 8, "width": 0.25}}
IMAGES = torch.randn(6, 3, 24, 24, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 3, 0, 1])


def network(kind, **options):
    torch.manual_seed(0)
    return kind(4, **SMALL, **options)


def loss_of(logits, label):
    return math.log(sum(math.exp(x - logits[label]) for x in logits))


def rewards_by_hand(scores, label, reward):
    """Rewards of one image from its logits (g, n): the whole image's, then each glimpse's."""
    fused = [np.mean(scores[: t + 1], 0) for t in range(len(scores))]
    if reward == "final":
        return [float(max(range(len(fused[-1])), key=lambda i: fused[-1][i]) == label)] * (len(scores) - 1)
    return [float(loss_of(fused[t], label) < loss_of(fused[t - 1], label)) for t in range(1, len(scores))]


@pytest.mark.parametrize("reward", ["greedy", "final"])
def test_rewards_equal_the_loop(reward):
    scores = torch.randn(4, 30, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    labels = torch.arange(30) % 5
    expected = [rewards_by_hand(scores[:, i].numpy(), int(labels[i]), reward) for i in range(30)]
    found = glimpse_rewards(scores, labels, reward).mT.tolist()
    assert found == expected and 0 < np.mean(found) < 1


def test_the_policies_estimate_the_enumerated_gradient():
    """Two policies on a grid of 3 x 3; the second one's reward depends on what the first has seen."""
    generator = torch.Generator().manual_seed(2)
    table = torch.randn(2, 9, 3, generator=generator, dtype=torch.float64)  # logits of a glimpse at each position
    whole, theta = torch.zeros(3, dtype=torch.float64), torch.randn(2, 9, generator=generator, dtype=torch.float64)
    label = 1

    wanted = np.zeros((2, 9))
    chances = [softmax(scores) for scores in theta.tolist()]
    for places in product(range(9), repeat=2):
        scores = np.stack([whole.numpy(), *(table[g, place].numpy() for g, place in enumerate(places))])
        probability = chances[0][places[0]] * chances[1][places[1]]
        for g, reward in enumerate(rewards_by_hand(scores, label, "greedy")):
            grad_log = -np.array(chances[g])
            grad_log[places[g]] += 1
            wanted[g] += probability * reward * grad_log

    torch.manual_seed(0)
    images = 30_000
    policies = Policies(9, 2).double()
    for gate, scores in zip(policies.gates, theta, strict=True):
        gate.u.weight.data.copy_(scores)
    grid = torch.eye(9, dtype=torch.float64).reshape(1, 9, 3, 3).expand(images, -1, -1, -1)
    chosen = policies(grid).flatten(2)
    assert (chosen.sum(2) == 1).all()
    scores = torch.stack([whole.expand(images, -1), *(chosen[:, g] @ table[g] for g in range(2))])
    rewards = glimpse_rewards(scores, torch.full((images,), label))
    for g, gate in enumerate(policies.gates):
        entropy_bonus = 0.002 * torch.autograd.grad(gate.entropy.mean(), gate.u.weight, retain_graph=True)[0]
        (found,) = torch.autograd.grad(-gate.reinforced(rewards[g]), gate.u.weight)
        ours, exact = (found - entropy_bonus)[0], torch.from_numpy(wanted[g])
        assert F.cosine_similarity(ours, exact, dim=0) > 0.99
        assert (ours - exact).norm() < 0.1 * exact.norm()


def test_fcan_is_the_mean_of_its_classifiers_on_its_crops():
    model = network(FCAN).eval()
    maps = sl.attention_maps(model, IMAGES)["attention"]
    features = model.features(IMAGES)
    scores = [model.heads[0](features.mean((2, 3)))]
    for g, gate in enumerate(model.attention.gate.gates):
        best = gate.u(features.movedim(1, 3)).squeeze(3).flatten(1).argmax(1)
        assert torch.equal(maps[:, g].flatten(1).argmax(1), best) and (maps[:, g].sum((1, 2)) == 1).all()
        crops = []
        for image, place in zip(IMAGES, best.tolist(), strict=True):
            # the middle of a cell of 4 px, less half of the crop's 12 px
            y, x = (min(max(4 * cell + 2 - 6, 0), 12) for cell in divmod(place, 6))
            crops.append(image[:, y : y + 12, x : x + 12])
        scores.append(model.heads[g + 1](model.part_features(torch.stack(crops)).mean((2, 3))))
    torch.testing.assert_close(model(IMAGES), torch.stack(scores).mean(0))


def test_the_own_loss_of_fcan_by_hand_and_only_once():
    model = network(FCAN).train()
    logits = model(IMAGES)
    scores, gates = model.scores, model.attention.gate.gates
    rewards = glimpse_rewards(scores, LABELS)
    expected = sum(F.cross_entropy(one, LABELS) for one in (*scores, logits))
    for gate, reward in zip(gates, rewards, strict=True):
        others = [torch.cat([reward[:i], reward[i + 1 :]]).mean() for i in range(6)]
        expected = expected - ((reward - torch.stack(others)) * gate.log_prob + 0.002 * gate.entropy).mean()
    loss = Loss(Optim(), network=model)
    torch.testing.assert_close(loss(IMAGES, logits, LABELS), expected)
    torch.testing.assert_close(loss(IMAGES, logits, LABELS), F.cross_entropy(logits, LABELS))
    policies = sum(gate.log_prob.sum() + gate.entropy.sum() for gate in gates)
    of_trunk = torch.autograd.grad(policies, [*model.features.parameters()], retain_graph=True, allow_unused=True)
    assert of_trunk == (None,) * len(of_trunk)  # the rewards do not train the features
    expected.backward()
    assert all(gate.u.weight.grad.abs().sum() > 0 for gate in gates)
    copy.deepcopy(model)


def test_without_reward_the_policies_learn_nothing():
    model = network(FCAN, reward="none").train()
    Loss(Optim(), network=model)(IMAGES, model(IMAGES), LABELS).backward()
    assert all(not gate.u.weight.grad.any() for gate in model.attention.gate.gates)
    assert model.part_features.network[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("reward", ["greedy", "final"])
def test_fcan_learns_where_to_look(reward):
    """The class is the color of one bright square; a crop that misses it shows noise.

    The whole image soon gives the class away, so one reward for the last prediction is the same for every glimpse.
    """
    generator = torch.Generator().manual_seed(0)

    def batch(n):
        images, labels = 0.3 * torch.randn(n, 3, 24, 24, generator=generator), torch.arange(n) % 3
        places = torch.randint(19, (n, 2), generator=generator)
        for image, label, (top, left) in zip(images, labels, places.tolist(), strict=True):
            image[label, top : top + 6, left : left + 6] += 2
        return images, labels, places

    torch.manual_seed(0)
    model = FCAN(3, **SMALL, glimpses=1, share=0.34, reward=reward).train()
    optimizer, loss = torch.optim.Adam(model.parameters(), 0.01), Loss(Optim(), network=model)
    for _ in range(90):
        images, labels, _ = batch(48)
        optimizer.zero_grad()
        loss(images, model(images), labels).backward()
        optimizer.step()
    images, labels, places = batch(90)
    cells = sl.attention_maps(model, images)["attention"].flatten(1).argmax(1)
    middle = 4 * torch.stack([cells // 6, cells % 6], 1) + 2
    hits = ((middle - places - 3).abs().amax(1) <= 4).float().mean()
    assert hits > 0.5 if reward == "greedy" else hits < 0.25


def test_mg_cnn_joins_what_its_two_attentions_see():
    model = network(MGCNN, parents=[1, 1, 0, 0]).eval()
    features = model.features(IMAGES)
    vectors = []
    for name in ("coarse", "fine"):
        pooling = getattr(model, name)
        weights = (pooling.gate.u(features.movedim(1, 3))).flatten(1).softmax(1)
        vectors.append(torch.einsum("bn,bcn->bc", weights, features.flatten(2)))
        torch.testing.assert_close(sl.attention_maps(model, IMAGES)[name].flatten(1), weights)
    torch.testing.assert_close(model(IMAGES), model.head(torch.cat(vectors, 1)))

    logits = model.train()(IMAGES)
    coarse = model.coarse_logits
    expected = F.cross_entropy(logits, LABELS) + F.cross_entropy(coarse, torch.tensor([1, 1, 0, 0, 1, 1]))
    torch.testing.assert_close(Loss(Optim(), network=model)(IMAGES, logits, LABELS), expected)
    copy.deepcopy(model.train()).eval()


def test_each_attention_of_mg_cnn_learns_from_its_own_labels():
    for weight, own in ((1.0, True), (0.0, False)):
        model = network(MGCNN, parents=[1, 1, 0, 0], coarse_weight=weight).train()
        logits = model(IMAGES)
        (fine,) = torch.autograd.grad(
            F.cross_entropy(logits, LABELS), model.coarse.gate.u.weight, retain_graph=True, allow_unused=True
        )
        assert (fine is None) == own
        loss = model.own_loss(logits, LABELS)
        if own:
            of_fine = torch.autograd.grad(loss, model.fine.gate.u.weight, retain_graph=True, allow_unused=True)[0]
            assert of_fine is None and torch.autograd.grad(loss, model.coarse.gate.u.weight)[0].abs().sum() > 0
        else:
            assert loss == 0


@pytest.mark.parametrize("name", ["fcan", "mg_cnn"])
def test_they_are_created_by_name_explained_and_loaded(name, tmp_path):
    options = SMALL | ({"parents": [0, 0, 1, 1]} if name == "mg_cnn" else {})
    model = create_model(name, num_classes=4, **options).eval()
    found = sl.explain(model, IMAGES, methods=["grad_cam", "saliency", "attention"])
    assert found.layer.name == "features" and found["grad_cam"].shape == (6, 1, 6, 6)
    torch.save(model.state_dict(), tmp_path / "model.pth")
    other = create_model(name, num_classes=4, weights=tmp_path / "model.pth", **options).eval()
    assert torch.equal(other(IMAGES), model(IMAGES))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: network(FCAN, glimpses=0), "expected glimpses of 1 or more, got 0; the paper has 2"),
        (lambda: network(FCAN, share=1.5), r"expected a share of the image above 0 and up to 1, got 1\.5"),
        (lambda: network(FCAN, reward="x"), "expected reward to be one of greedy, final, none; got 'x'"),
        (lambda: network(MGCNN, parents=[0, 1]), "expected parents of 4 classes, got 2; name one for each class"),
        (lambda: network(MGCNN, parents=[0, 2, 2, 0]), "expected parents without gaps, got 2 but no 1; number"),
        (lambda: network(MGCNN, parents=[0, -1, 1, 0]), "expected parents as whole numbers from 0 on, got -1; number"),
        (lambda: network(MGCNN, coarse_weight=-1.0), r"expected a coarse_weight of 0 or more, got -1\.0"),
        (lambda: Trunk("cifar_resnet", pretrained=True), "expected a timm backbone with pretrained weights, got cif"),
        (lambda: network(MGCNN, parents=[0, 0, 2, 2]), "expected parents without gaps, got 2 but no 1; number"),
        (
            lambda: network(MGCNN, parents=[0, 0, "1", 1]),
            "expected parents as whole numbers from 0 on, got '1'; number",
        ),
        (
            lambda: network(MGCNN, parents=[0, 0, 1.0, 1]),
            "expected parents as whole numbers from 0 on, got 1.0; number",
        ),
        (
            lambda: Trunk("cifar_resnet", {"dept": 8}),
            "expected options of cifar_resnet out of: depth, num_classes, stem_stride, width, got 'dept'",
        ),
        (
            lambda: Trunk("cifar_resnet", {"depth": "8"}),
            "cifar_resnet: expected numbers as options, got {'depth': '8'}",
        ),
        (lambda: Trunk("x"), "expected the name of a timm model as backbone, got 'x'"),
        (
            lambda: create_model("mg_cnn", parents="0,0"),
            "option parents of mg_cnn: expected list or NoneType, got '0,0'",
        ),
        (lambda: create_model("fcan", backbone="cifar_resnet", backbone_options={"dept": 8}), "cannot build 'fcan'"),
    ],
)
def test_bad_options_are_one_clear_line(make, message):
    with pytest.raises(ValueError, match=message):
        make()
