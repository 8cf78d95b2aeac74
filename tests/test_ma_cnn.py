"""MA-CNN: its grouping and losses against loops, and what each of its two losses trains."""

import copy
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.reference import ma_cnn as slow
from torch import nn

from sightline import runs
from sightline.attention import insert
from sightline.attention.ma_cnn import (
    MultiAttention,
    distance_loss,
    diversity_loss,
    k_means,
    peak_positions,
)
from sightline.models import create_model
from sightline.recipe import Data, Model, Optim, Recipe, load
from sightline.training import fit
from sightline.training.losses import Loss
from sightline.training.stages import check_stages

GENERATOR = torch.Generator().manual_seed(0)
MAPS = torch.rand(3, 4, 5, 7, generator=GENERATOR, dtype=torch.float64)
FEATURES = torch.randn(6, 8, 5, 7, generator=GENERATOR, dtype=torch.float64).relu()


def block(**options):
    torch.manual_seed(0)
    return MultiAttention(8, **options).double()


def test_losses_equal_the_loops():
    for margin in (0.02, 0.3):
        expected = [slow.diversity(maps, margin) for maps in MAPS.numpy()]
        torch.testing.assert_close(diversity_loss(MAPS, margin).tolist(), expected)
    torch.testing.assert_close(distance_loss(MAPS).tolist(), [slow.distance(maps) for maps in MAPS.numpy()])


def test_losses_prefer_compact_maps_apart():
    point, other, wide = torch.zeros(3, 6, 6)
    point[1, 1] = other[4, 4] = 1
    wide[:] = 1 / 6
    assert distance_loss(point[None, None]) == 0 < distance_loss(wide[None, None])
    apart, same = diversity_loss(torch.stack([point, other])[None]), diversity_loss(torch.stack([point, point])[None])
    assert apart == pytest.approx(-0.04) and same == pytest.approx(2 - 0.04)


def test_peaks_equal_the_loop():
    features = FEATURES.clone()
    features[2, 3] = 0
    expected = [[slow.peak(channel) for channel in image] for image in features.numpy()]
    torch.testing.assert_close(peak_positions(features), torch.tensor(expected))


@pytest.mark.parametrize("k", [2, 3])
def test_k_means_finds_the_best_of_all_groupings(k):
    points = torch.randn(9, 3, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
    groups = k_means(points, k)
    least = min(slow.spread(points.numpy(), one) for one in product(range(k), repeat=9) if len(set(one)) == k)
    assert slow.spread(points.numpy(), groups.tolist()) == pytest.approx(least)
    assert list(dict.fromkeys(groups.tolist())) == list(range(k))
    assert torch.equal(groups, k_means(points, k))


def test_k_means_ends_where_each_point_is_nearest_to_its_own_mean():
    points = torch.randn(60, 2, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    groups = k_means(points, 4)
    means = torch.stack([points[groups == group].mean(0) for group in range(4)])
    assert torch.equal(torch.cdist(points, means).argmin(1), groups)


def test_k_means_finds_groups_among_copies_of_one_point():
    """Channels that are never active all peak at the same places."""
    points = torch.zeros(200, 2)
    points[50], points[90] = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    groups = k_means(points, 3)
    assert groups.bincount().tolist() == [198, 1, 1] and groups[50] == 1 and groups[90] == 2


def test_too_few_points_are_one_clear_line():
    with pytest.raises(ValueError, match="expected at least 3 different points for 3 groups, got 2"):
        k_means(torch.tensor([[0.0], [1.0], [1.0]]), 3)


def test_maps_and_vectors_equal_the_loop():
    pooling = block(k=3).eval()
    weights = pooling.gate.channel_weights(FEATURES).detach().numpy()
    maps, vectors = pooling.gate(FEATURES).detach().numpy(), pooling(FEATURES).detach().unflatten(1, (3, 8)).numpy()
    for n, i in np.ndindex(6, 3):
        np.testing.assert_allclose(maps[n, i], slow.part_map(FEATURES[n].numpy(), weights[n, i]))
        np.testing.assert_allclose(vectors[n, i], slow.part_vector(FEATURES[n].numpy(), weights[n, i]))
    pooled = FEATURES.mean((2, 3))
    net = pooling.gate.nets[1]
    by_hand = torch.sigmoid(net[2](torch.tanh(net[0](pooled))))
    torch.testing.assert_close(pooling.gate.channel_weights(FEATURES)[:, 1], by_hand)


def planted(images=40):
    """Channels 0, 2, 5 peak at one place of each image, the others at another."""
    generator = torch.Generator().manual_seed(3)
    features = 0.1 * torch.rand(images, 8, 6, 6, generator=generator, dtype=torch.float64)
    places = torch.stack([torch.randperm(36, generator=generator)[:2] for _ in range(images)])
    part = torch.tensor([0, 1, 0, 1, 1, 0, 1, 1])
    features.flatten(2).scatter_(2, places[:, part, None], 1.0)
    return features, part, places


def test_prepare_sets_the_gates_to_the_groups_of_channels():
    features, part, places = planted()
    pooling = block()
    pooling.prepare(features.split(16))
    assert pooling.grouped and torch.equal(k_means(peak_positions(features).transpose(0, 1).flatten(1), 2), part)
    expected = torch.where(part == torch.arange(2)[:, None], 1.0, 0.0).double().expand(40, 2, 8)
    assert (pooling.gate.channel_weights(features) - expected).abs().max() < 0.02
    assert torch.equal(pooling.gate(features).flatten(2).argmax(2), places)


def gradients(pooling, own):
    """Largest gradient of each of the gates and of the features, from the labels' loss or from the block's own."""
    pooling.zero_grad()
    x = FEATURES.clone().requires_grad_()
    out = pooling(x)
    loss = pooling.own_loss(out, torch.zeros(6, dtype=torch.long)) if own else out.square().sum()
    if loss.requires_grad:
        loss.backward()
    sizes = [0.0 if p.grad is None else float(p.grad.abs().max()) for p in pooling.gate.parameters()]
    return max(sizes), 0.0 if x.grad is None else float(x.grad.abs().max())


def test_each_loss_trains_its_own_parameters():
    pooling = block()
    assert gradients(pooling, own=False)[0] == 0 and gradients(pooling, own=True) == (0, 0)  # not grouped yet
    assert all(p.grad is None for p in pooling.gate.parameters())  # so that weight decay does not move them
    pooling.grouped.fill_(True)  # without `prepare`, which makes the gates the same for all images
    gates, features = gradients(pooling, own=True)
    assert gates > 0 and features == 0
    gates, features = gradients(pooling, own=False)
    assert gates == 0 and features > 0
    torch.testing.assert_close(pooling(FEATURES), pooling.eval()(FEATURES))
    assert gradients(pooling, own=False)[0] > 0  # in eval mode an ordinary function


def test_the_own_loss_by_hand_and_only_once():
    pooling = block(k=3, balance=0.7, margin=0.1)
    pooling.prepare([FEATURES])
    logits, labels = torch.zeros(6, 4, dtype=torch.float64), torch.zeros(6, dtype=torch.long)
    pooling(FEATURES)
    maps = pooling.gate(FEATURES).detach().numpy()
    expected = np.mean([slow.distance(one) + 0.7 * slow.diversity(one, 0.1) for one in maps])
    network = nn.Sequential(pooling)
    both = Loss(Optim(), network=network)(FEATURES, logits, labels)
    assert both.item() == pytest.approx(np.log(4) + expected)
    assert pooling.own_loss(logits, labels) == 0  # used


@pytest.mark.parametrize(("gates", "own", "labels"), [("grouping", 0, 0), ("labels", 0, 1)])
def test_controls(gates, own, labels):
    pooling = block(gates=gates)
    assert pooling.is_due(3, 10) == (gates == "grouping")
    pooling.prepare([FEATURES])
    assert (gradients(pooling, own=True)[0] > 0) == own
    assert (gradients(pooling, own=False)[0] > 0) == labels


def trained_overlap(balance):
    """Cosine of the two maps before and after training gates that hardly tell the groups apart, and their peaks."""
    features, part, places = planted()
    pooling = block(balance=balance)
    pooling.grouped.fill_(True)
    with torch.no_grad():
        for number, net in enumerate(pooling.gate.nets):
            net[2].bias.copy_(torch.where(part == number, 0.1, -0.1))
    optimizer = torch.optim.Adam(pooling.gate.parameters(), 0.01)
    overlaps = []
    for _ in range(151):
        maps = pooling.gate(features).detach()
        overlaps.append((maps[:, 0] * maps[:, 1]).sum((1, 2)).mean().item())
        optimizer.zero_grad()
        pooling.own_loss(pooling(features), torch.zeros(40, dtype=torch.long)).backward()
        optimizer.step()
    return overlaps[0], overlaps[-1], torch.equal(maps.flatten(2).argmax(2), places)


def test_its_losses_pull_maps_apart():
    before, after, at_the_parts = trained_overlap(balance=2.0)
    assert before > 0.99 and after < 0.2 and at_the_parts
    assert trained_overlap(balance=0.0)[1] > 0.9  # without Div both maps shrink to one place


TINY = Recipe(
    data=Data(source="clutter-pair", train_size=45, test_size=9),
    model=Model(
        name="cifar_resnet",
        options={
            "depth": 8,
            "width": 0.25,
            "stem_stride": 2,
            "attention": "ma_cnn",
            "attention_options": {"warm": 1},
        },
    ),
    optim=Optim(epochs=3, batch_size=15, lr=0.003),
)


@pytest.mark.usefixtures("few_validation_images")
def test_training_groups_after_the_warm_epochs_and_resumes_bit_for_bit(tmp_path: Path, monkeypatch):
    grouped = []
    prepare = MultiAttention.prepare

    def spy(self, features, seed=0):
        batches = list(features)
        grouped.append(torch.cat(batches))
        prepare(self, batches, seed)

    monkeypatch.setattr(MultiAttention, "prepare", spy)
    whole = fit(TINY, tmp_path / "whole", progress=False)
    assert isinstance(whole, runs.Run) and len(grouped) == 1 and grouped[0].shape == (45, 16, 5, 5)
    state = runs.load_model(whole.folder).state_dict()
    assert state["avgpool.attention.grouped"]

    # an interruption in the epoch of the grouping does not group again
    calls = 0
    own_loss = MultiAttention.own_loss

    def stops(self, logits, labels):
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt
        return own_loss(self, logits, labels)

    with monkeypatch.context() as patch:
        patch.setattr(MultiAttention, "own_loss", stops)
        with pytest.raises(KeyboardInterrupt):
            fit(TINY, tmp_path / "parts", progress=False)
    fit(TINY, tmp_path / "parts", resume=True, progress=False)
    assert all(torch.equal(runs.load_model(tmp_path / "parts").state_dict()[name], state[name]) for name in state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optim.ema": 0.9}, "expected no optim.ema 0.9 with a block that looks at all training images; leave it out"),
        ({"data.streaming": True}, "expected no data.streaming true with a block that looks at all training images"),
    ],
)
def test_what_does_not_go_with_grouping_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        check_stages(nn.Sequential(block()), load(TINY, change))
    assert check_stages(nn.Sequential(block()), TINY) == ""


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 1}, "expected k from 2 to 8, the number of channels, got 1; the paper has 2 and 4"),
        ({"k": 9}, "expected k from 2 to 8"),
        ({"gates": "x"}, "expected gates to be one of losses, grouping, labels; got 'x'"),
        ({"warm": -1}, "expected warm of 0 or more epochs, got -1"),
    ],
)
def test_bad_options_are_one_clear_line(options, message):
    with pytest.raises(ValueError, match=message):
        block(**options)


def test_it_is_inserted_by_name_and_can_be_copied_while_training():
    network = insert(create_model("vgg_gap", num_classes=4, width=0.125), "ma_cnn", k=4)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    logits = network.train()(images)
    assert logits.shape == (2, 4)
    torch.testing.assert_close(copy.deepcopy(network).eval()(images), network.eval()(images))
