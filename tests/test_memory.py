"""Batches cut by memory: what a pass holds, how large batches become, and that no result depends on the cut."""

import weakref
from functools import partial

import pytest
import torch
from tests.same import close
from tests.test_perturbation import Net

import sightline as sl
from sightline.checks import bytes_of
from sightline.explainers import EXPLAINERS, FAST, explain
from sightline.inference import allowance, held_by, in_batches
from sightline.inference.memory import Held
from sightline.metrics import METRICS, Perturbation, PerturbationMetric
from sightline.metrics.perturbed import RANKED_BYTES, _Filler, _Order, perturbed_scores

CPU = torch.device("cpu")
SLOW = [name for name in EXPLAINERS if name not in FAST]
OPTIONS = {
    "occlusion": {"patch": 4, "stride": 3},
    "rise": {"masks": 30, "cells": 3},
    "integrated_gradients": {"steps": 7},
    "smooth_grad": {"samples": 6},
    "var_grad": {"samples": 6},
}


@pytest.fixture
def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net().double().eval()


@pytest.fixture
def images():
    return torch.randn(3, 3, 12, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


# What is held


def test_bytes_of_a_chain_worked_out_by_hand():
    """10 numbers of 4 bytes: without a graph two tensors exist at once; with one, cosine keeps its input."""
    x = torch.ones(10, requires_grad=True)
    with Held() as held, torch.no_grad():
        y = x.sin().cos().exp()
    assert (held.peak, held.bytes) == (80, 40)
    with Held() as held:
        y = x.sin().cos().exp()
    assert (held.peak, held.bytes) == (120, 80)  # the sine for the cosine, the result for the exponential
    y.sum().backward()
    del y
    assert held.bytes == 0


def test_views_and_what_was_there_before_hold_nothing():
    before = torch.ones(100)
    with Held() as held:
        views = [before.view(10, 10).T, before[3:], before.add_(1)]
        assert held.peak == 0
        copies = [view.clone() for view in views]
        assert held.bytes == 1200 - 12 and copies
    with Held() as held:
        torch.zeros(50).view(5, 10).T.contiguous()
    assert held.peak == 400
    with Held() as held:
        torch.zeros(100).sum() + 1
    assert held.peak == 404  # before the last operation


def test_the_backward_counts():
    x = torch.ones(10, requires_grad=True)
    (_, forward), (_, both) = held_by(lambda: x.sin().sum()), held_by(lambda: torch.autograd.grad(x.sin().sum(), x))
    assert forward == 44 and both > forward


def test_a_convolution_counts_its_arguments_and_results_twice():
    """64 bytes go in, 16 are the weight, 100 come out; on the way back 100 go in, and 64 come out."""
    x, weight = torch.ones(1, 1, 4, 4, requires_grad=True), torch.ones(1, 1, 2, 2)
    with Held() as held:
        y = torch.conv2d(x, weight, padding=1)
    assert held.peak == 100 + (64 + 16 + 100)
    gradient = torch.ones_like(y)
    with Held() as held:
        torch.autograd.grad(y, x, gradient)
    assert held.peak == 64 + (100 + 64 + 16 + 64)


def test_where_storage_cannot_be_seen_the_result_still_comes():
    result, held = held_by(lambda: torch.eye(3).to_sparse())
    assert held is None and result.is_sparse


def test_the_bytes_of_a_ranked_map(images):
    images = images.float()
    maps = torch.rand(3, 1, 12, 10, generator=torch.Generator().manual_seed(0))
    filler = _Filler(images, Perturbation())
    with Held() as held:
        order = _Order(maps, (12, 10), Perturbation())
        versions = order.versions(filler)
    assert versions and held.bytes <= 3 * (RANKED_BYTES + 4) * 120 + 4000  # the resized map may be the map itself


# How many at a time


def sizes_of(held_per_item, total=100, constant=0, **options):
    """Sizes of the batches of a pass that holds so many bytes."""

    def call(items):
        return torch.ones(constant + held_per_item * len(items), dtype=torch.uint8).sum()

    return [len(items) for items, _ in in_batches(call, total, 1, CPU, **options)]


def test_the_first_batch_assumes_and_the_next_ones_know():
    # 500 bytes are assumed for each byte of an item: 2 items. They hold 10 bytes each (and a sum of 8): 100 fit.
    assert sizes_of(1_000, total=50, memory=1_000)[:3] == [2, 1, 1]
    assert sizes_of(100, total=50, memory=1_000)[:3] == [2, 9, 9]
    assert sizes_of(100, total=50, memory=1_000, batch_size=5) == [2, *[5] * 9, 3]
    assert sizes_of(1, total=150, memory=1_000) == [2, 64, 64, 20]
    assert sizes_of(100_000, total=3, memory=1_000) == [2, 1]
    # the rest of a group, two items, does not tell how many fit: three
    assert sizes_of(300, total=12, memory=1_000, group=4) == [2, 2, 3, 1, 3, 1]


def test_a_result_is_gone_before_the_next_batch_runs():
    made = []

    def call(items):
        assert all(result() is None for result in made)
        result = torch.ones(100 * len(items), dtype=torch.uint8)
        made.append(weakref.ref(result))
        return result

    for _, result in in_batches(call, 40, 1, CPU, memory=1_000):
        del result
    assert len(made) > 3


def test_bytes_that_do_not_grow_with_the_batch_leave_room():
    sizes = sizes_of(10, total=200, constant=500, memory=1_000)
    assert sizes[0] == 2 and sizes[-2] > 40 and all(500 + 10 * size + 8 <= 1_000 for size in sizes)


def test_no_batch_mixes_two_groups():
    batches = [[*items] for items, _ in in_batches(len, 10, 8, CPU, batch_size=3, group=5)]
    assert batches == [[0, 1, 2], [3, 4], [5, 6, 7], [8, 9]]


def test_sizes_of_memory():
    assert allowance(None, CPU) == 300_000_000 and allowance("64MB", CPU) == 64_000_000
    assert [bytes_of(size) for size in ("1 kb", "0.5GiB", "8", 7)] == [1000, 2**29, 8, 7]
    for wrong in ("much", "", "-1GB", 0, "0GB", True, "1XB", "1iB"):
        with pytest.raises(ValueError, match=r"expected memory in bytes or as 500MB, 2GB or 1GiB, got"):
            bytes_of(wrong)


@pytest.mark.parametrize("call", [partial(explain, methods=["rise"]), sl.explainers.rise])
def test_a_wrong_size_is_refused_before_anything_runs(call, net, images):
    calls = []
    net.register_forward_pre_hook(lambda *given: calls.append(given))
    with pytest.raises(ValueError, match=r"expected memory in bytes .* got 'lots'"):
        call(net, images, memory="lots")
    assert not calls
    with pytest.raises(ValueError, match=r"expected memory in bytes .* got 'lots'"):
        Perturbation(memory="lots")


# What does not change


@pytest.mark.parametrize("name", SLOW)
def test_maps_do_not_depend_on_the_cut(name, net, images):
    method = partial(EXPLAINERS[name], **OPTIONS.get(name, {}))
    layer = "conv2" if "cam" in name else None
    whole = method(net, images, layer=layer, batch_size=10_000, memory="10GB")
    assert whole.abs().max() > 0
    for options in ({"batch_size": 1}, {"batch_size": 3}, {"batch_size": 64}, {"memory": 1}, {"memory": "100KB"}):
        seen = []
        handle = net.conv1.register_forward_pre_hook(lambda module, given, seen=seen: seen.append(len(given[0])))
        cut = method(net, images, layer=layer, **options)
        handle.remove()
        assert close(whole, cut)
        assert max(seen[1:]) <= max(options.get("batch_size", 3), len(images)) or "memory" in options


def test_less_memory_makes_smaller_batches_that_hold_less(net, images):
    def largest(memory):
        seen = []
        handle = net.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
        _, held = held_by(lambda: sl.explainers.smooth_grad(net, images[:1], samples=60, memory=memory))
        handle.remove()
        return max(seen), held

    sizes, held = zip(*(largest(memory) for memory in ("50KB", "400KB", "10MB")), strict=True)
    # Of 10 MB the first batch takes 6 images, 500 times their bytes, and the second all others. Gradients stay, too.
    assert 1 <= sizes[0] < sizes[1] < sizes[2] == 54
    assert held[0] < held[1] < held[2] and held[1] < 400_000 + 3 * sizes[1] * images[:1].nbytes


@pytest.mark.parametrize("name", [n for n, m in METRICS.items() if isinstance(m.function, PerturbationMetric)])
def test_scores_do_not_depend_on_the_cut(name, net, images):
    maps = torch.rand(3, 1, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    metric, targets = METRICS[name].function, torch.tensor([0, 2, 1])
    whole = metric(net, images, targets, maps, steps=6, batch_size=10_000, memory="10GB")
    for options in ({"batch_size": 1}, {"batch_size": 3}, {"batch_size": 64}, {"memory": 1}, {"memory": "100KB"}):
        assert torch.allclose(whole, metric(net, images, targets, maps, steps=6, **options), atol=1e-9, equal_nan=True)


def test_perturbed_images_are_cut_by_memory(net, images):
    seen = []
    net.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    maps = torch.rand(3, 1, 6, 5, generator=torch.Generator().manual_seed(0))
    perturbation = Perturbation(steps=12, memory="150KB")
    perturbed_scores(net, images, torch.tensor([0, 2, 1]), {"": maps}, {"deletion", "insertion"}, perturbation)
    assert 1 < max(seen) < 64 and sum(seen) == 3 * (2 + 11 + 11)


def test_predictions_are_cut_by_memory(net, images):
    seen = []
    net.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    many = images.repeat(10, 1, 1, 1)
    assert torch.equal(sl.inference.forward(net, many), sl.inference.forward(net, many, memory="100KB"))
    assert seen[0] == 30 and 1 < max(seen[1:]) < 30 and sum(seen) == 60


def test_evaluation_does_not_depend_on_the_cut(net, images):
    net, images = net.float(), images.float().repeat(4, 1, 1, 1) + torch.arange(12).view(-1, 1, 1, 1) / 10
    asked = {"methods": ["grad_cam", "saliency"], "metrics": ["deletion_auc", "insertion_auc"], "steps": 4}
    results = [
        sl.evaluate(net, [(images, torch.zeros(12, dtype=torch.long))], **asked, **options)
        for options in ({}, {"memory": "300KB"}, {"memory": 1}, {"batch_size": 3})
    ]
    for other in results[1:]:
        for metric in asked["metrics"]:
            for method in results[0].methods:
                one, two = (result.per_image[f"{metric}/{method}"] for result in (results[0], other))
                assert torch.allclose(torch.tensor(one), torch.tensor(two), atol=1e-5)


# Which methods take many passes


@pytest.mark.parametrize("name", EXPLAINERS)
def test_methods_that_report_progress_are_declared_and_no_others(name, net, images):
    class Reported(Exception):
        pass

    def progress(what, done, total):
        raise Reported

    try:
        explain(net.float(), images.float(), methods=[name], layer="conv2", progress=progress)
    except ValueError:
        pytest.skip("does not fit")
    except Reported:
        assert EXPLAINERS[name].many_passes
    else:
        assert not EXPLAINERS[name].many_passes
