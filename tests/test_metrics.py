"""Scores in closed form, by hand, and by slow reference."""

import itertools

import pytest
import torch
from tests.hand import quarter
from tests.reference import curves as reference
from torchmetrics import MetricCollection

from sightline.metrics import (
    METRICS,
    DeletionAUC,
    EnergyInMask,
    InsertionAUC,
    PointingGame,
    deletion_auc,
    energy_in_mask,
    inputs_of,
    insertion_auc,
    pointing_game,
)
from sightline.testing import ConstantModel, LinearModel


def linear_case(seed=0, n=4, size=(5, 6)):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 2, *size, generator=generator)
    images = torch.randn(n, 2, *size, generator=generator)
    maps = torch.rand(n, 1, *size, generator=generator)
    targets = torch.randint(3, (n,), generator=generator)
    return LinearModel(weight), images, targets, maps


@pytest.mark.parametrize("steps", [1, 4, 7, 30, 1000])
@pytest.mark.parametrize("score", ["probability", "logit"])
@pytest.mark.parametrize(("metric", "insert"), [(deletion_auc, False), (insertion_auc, True)])
def test_areas_equal_the_pixel_by_pixel_reference(metric, insert, score, steps):
    model, images, targets, maps = linear_case()
    found = metric(model, images, targets, maps, steps=steps, score=score, fill=0.5)
    weight = model.weight.detach().double().flatten(2)
    for i in range(len(images)):

        def slow_score(planes, target=int(targets[i])):
            logits = (weight * torch.tensor(planes, dtype=torch.float64)).sum((1, 2))
            return float(logits[target] if score == "logit" else logits.softmax(0)[target])

        image = images[i].double().flatten(1).tolist()
        fill = [[0.5] * 30, [0.5] * 30]
        slow = reference.area(slow_score, image, fill, maps[i].flatten().tolist(), steps, insert)
        assert found[i].item() == pytest.approx(slow, abs=1e-5 * max(1, abs(slow)))


def test_linear_model_has_the_closed_form():
    # a linear logit falls linearly in each pixel, so deletion + insertion is the logit whatever the order
    model, images, targets, maps = linear_case(1)
    logit = model(images).detach().gather(1, targets[:, None])[:, 0]
    for steps in (3, 30):
        both = [f(model, images, targets, maps, steps=steps, score="logit") for f in (deletion_auc, insertion_auc)]
        assert torch.allclose(sum(both), logit, atol=1e-5)
    exact = (model.weight.detach()[targets] * images).sum(1, keepdim=True)
    least = deletion_auc(model, images, targets, exact, steps=30, score="logit")
    assert (least <= deletion_auc(model, images, targets, maps, steps=30, score="logit")).all()
    reverse = deletion_auc(model, images, targets, -exact, steps=30, score="logit")
    assert torch.allclose(reverse, logit - least, atol=1e-4)


def test_values_typed_in_by_hand():
    # the sum of the pixels as the score; image and map the same
    model = LinearModel(torch.ones(1, 1, 1, 5))
    x = torch.tensor([[[[0.3, 0.25, 0.2, 0.15, 0.1]]]])
    target = torch.tensor([0])
    assert deletion_auc(model, x, target, x, steps=3, score="logit").item() == pytest.approx(0.41)
    assert insertion_auc(model, x, target, x, steps=3, score="logit").item() == pytest.approx(0.59)
    uniform = torch.ones(1, 1, 4, 4)
    order = torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    mean = LinearModel(uniform / 16)
    assert deletion_auc(mean, uniform, target, order, steps=16, score="logit").item() == pytest.approx(0.5)
    assert insertion_auc(mean, uniform, target, order, steps=16, score="logit").item() == pytest.approx(0.5)


def test_constant_model_scores_its_constant():
    model = ConstantModel(torch.tensor([0.0, 1.0]))
    images, maps = torch.rand(2, 3, 4, 4), torch.rand(2, 1, 4, 4)
    expected = torch.tensor([0.0, 1.0]).softmax(0)[1].expand(2)
    for metric in (deletion_auc, insertion_auc):
        assert torch.allclose(metric(model, images, torch.tensor([1, 1]), maps), expected)


def test_flat_map_is_a_scattered_order_and_nan_is_undefined():
    size = (8, 8)
    weight = torch.zeros(1, 1, *size)
    weight[..., :4, :] = 1 / 32
    model, images, target = LinearModel(weight), torch.ones(1, 1, *size), torch.tensor([0])
    flat = deletion_auc(model, images, target, torch.zeros(1, 1, *size), steps=64, score="logit").item()
    assert 0.35 < flat < 0.65  # row by row would give 0.25
    broken = torch.zeros(1, 1, *size)
    broken[0, 0, 0, 0] = torch.inf
    assert deletion_auc(model, images, target, broken).isnan().all()
    one = deletion_auc(
        LinearModel(torch.ones(1, 1, 1, 1)), torch.ones(1, 1, 1, 1), target, torch.ones(1, 1, 1, 1), score="logit"
    )
    assert one.item() == 0.5


@pytest.mark.parametrize("metric", [deletion_auc, insertion_auc])
def test_batches_and_order_change_nothing(metric):
    model, images, targets, maps = linear_case(2)
    whole = metric(model, images, targets, maps)
    assert torch.equal(whole, metric(model, images, targets[:, None], maps))
    for batch_size in (1, 7):
        assert torch.allclose(metric(model, images, targets, maps, batch_size=batch_size), whole, atol=1e-5)
    for i in range(4):
        alone = metric(model, images[i : i + 1], targets[i : i + 1], maps[i : i + 1])
        assert torch.allclose(alone, whole[i : i + 1], atol=1e-5)
    back = metric(model, images.flip(0), targets.flip(0), maps.flip(0))
    assert torch.allclose(back.flip(0), whole, atol=1e-5)


def test_fills():
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    model = LinearModel(torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)))
    target, maps = torch.tensor([0, 1]), torch.rand(2, 1, 16, 16)

    def final(**options):  # with one step, 2 * area - score of the image is the score of the fill
        area = deletion_auc(model, images, target, maps, steps=1, score="logit", **options)
        return 2 * area - model(images).detach().gather(1, target[:, None])[:, 0]

    def score(filled):
        return model(filled.expand_as(images)).detach().gather(1, target[:, None])[:, 0]

    black = -torch.tensor(mean)[None, :, None, None] / torch.tensor(std)[None, :, None, None]
    cases = [
        ({}, torch.zeros(1, 1, 1, 1)),
        ({"fill": 2.0}, torch.full((1, 1, 1, 1), 2.0)),
        ({"fill": "mean"}, images.mean((2, 3), keepdim=True)),
        ({"fill": torch.tensor([1.0, 2.0, 3.0])}, torch.tensor([1.0, 2.0, 3.0])[None, :, None, None]),
        ({"fill": "black", "mean": mean, "std": std}, black),
    ]
    for options, filled in cases:
        assert torch.allclose(final(**options), score(filled), atol=1e-3)
    blurred = final(fill="blur")
    assert not torch.allclose(blurred, score(images), atol=1e-2) and blurred.isfinite().all()


def test_localization_of_planted_maps():
    maps, masks = quarter()
    assert pointing_game(maps, masks).tolist() == [1, 0, 0.5]
    assert energy_in_mask(maps, masks).tolist() == [1, 0, 0.5]
    assert energy_in_mask(-maps, masks).isnan().all()
    assert energy_in_mask(maps - 1, masks).isnan().all()
    assert reference.energy([3.0, -1.0, 1.0], [True, True, False]) == 0.75
    assert energy_in_mask(torch.tensor([[[[3.0, -1.0, 1.0]]]]), torch.tensor([[[[True, True, False]]]])).item() == 0.75


def test_localization_at_the_edges_of_its_definition():
    maps, masks = quarter()
    flat = torch.full_like(maps, 3.0)
    assert pointing_game(flat, masks).tolist() == [0.25] * 3
    assert energy_in_mask(flat, masks).tolist() == [0.25] * 3
    empty, full = torch.zeros_like(masks), torch.ones_like(masks)
    for metric in (pointing_game, energy_in_mask):
        assert metric(maps, empty).isnan().all()
        assert metric(maps, full).tolist() == [1, 1, 1]
        broken = maps.clone()
        broken[0, 0, 3, 3] = torch.nan
        assert metric(broken, masks).isnan().tolist() == [True, False, False]
    assert pointing_game(torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1, dtype=torch.bool)).item() == 1
    spot = torch.zeros(1, 1, 4, 4)
    spot[0, 0, 1, 3] = 1
    assert pointing_game(spot, masks[:1]).item() == 0
    assert pointing_game(spot, masks[:1], tolerance=2).item() == 1


def test_maps_are_resized_to_the_mask():
    masks = torch.zeros(1, 1, 40, 40, dtype=torch.bool)
    masks[..., :20, :20] = True
    maps = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])
    assert pointing_game(maps, masks).item() == 1
    assert 0.5 < energy_in_mask(maps, masks).item() < 1


def test_classes_equal_functions_and_share_a_collection():
    model, images, targets, maps = linear_case(3, n=6, size=(4, 4))
    _, masks = quarter()
    masks = masks[:1].expand(6, -1, -1, -1)
    together = MetricCollection({name: metric() for name, metric in METRICS.items()}, compute_groups=True)

    def explain(model, images, targets):
        return (model.weight.detach()[targets] * images).sum(1, keepdim=True)

    for part in (slice(0, 1), slice(1, 6)):
        batch = {"images": images[part], "targets": targets[part], "maps": maps[part], "masks": masks[part]}
        together.update(model=model, explain=explain, **batch)
    found = together.compute()
    assert found.keys() == METRICS.keys()
    known = {"model": model, "images": images, "targets": targets, "maps": maps, "masks": masks, "explain": explain}
    for name, metric in METRICS.items():
        values = metric.function(**{key: value for key, value in known.items() if key in inputs_of(metric)})
        mean = values.double().nanmean(0)
        assert found[name].item() == pytest.approx(mean.max().item(), rel=1e-5, abs=1e-6), name  # of columns the best


def test_equal_first_batches_do_not_merge_two_metrics():
    # with shared state names torchmetrics would go on to report one number for both
    model, images, targets, maps = linear_case(4)
    metrics = MetricCollection([DeletionAUC(score="logit"), InsertionAUC(score="logit")])
    metrics.update(model=model, images=0 * images, targets=targets, maps=maps)
    metrics.update(model=model, images=images, targets=targets, maps=maps)
    found = metrics.compute()
    assert found["DeletionAUC"] != found["InsertionAUC"]


def test_metric_classes_hold_no_model_and_count_the_undefined():
    model, images, targets, maps = linear_case(5)
    metric = DeletionAUC(steps=2)
    maps[0] = torch.nan
    metric.update(model, images, targets, maps)
    assert metric.state_dict() == {} and not list(metric.parameters())
    assert metric.DeletionAUC_undefined == 1 and metric.DeletionAUC_count == 3
    assert metric.compute().item() == pytest.approx(
        deletion_auc(model, images, targets, maps, steps=2)[1:].mean().item()
    )
    assert PointingGame(tolerance=1).options == {"tolerance": 1}
    names = [set(cls()._defaults) for cls in METRICS.values()]
    assert not any(a & b for a, b in itertools.combinations(names, 2))
    with pytest.raises(TypeError, match="expected options of EnergyInMask out of maps, masks, got 'tolerance'"):
        EnergyInMask(tolerance=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"maps": torch.zeros(4, 2, 5, 6)}, r"expected maps of shape \(4, 1, h, w\).*got \(4, 2, 5, 6\)"),
        ({"targets": torch.zeros(3, dtype=torch.long)}, r"expected 4 targets.*got shape \(3,\)"),
        ({"steps": 0}, "expected at least 1 step, got 0"),
        ({"fill": "gray"}, "expected fill 'zero', 'mean', .*got 'gray'"),
        ({"fill": "black"}, "expected mean= and std="),
        ({"fill": torch.zeros(5)}, r"expected a fill of shape \(2,\).*got \(5,\)"),
        ({"score": "margin"}, "expected score 'probability', 'logit' or a function, got 'margin'"),
    ],
)
def test_bad_inputs_say_what_to_do(change, message, unchecked):
    model, images, targets, maps = linear_case()
    given = {"images": images, "targets": targets, "maps": maps} | change
    with pytest.raises(ValueError, match=message):
        deletion_auc(model, **given)


def test_bad_masks_say_what_to_do(unchecked):
    with pytest.raises(ValueError, match=r"got \(3, 1, 4, 4\) and \(2, 1, 4, 4\)"):
        energy_in_mask(quarter()[0], quarter()[1][:2])


def test_the_model_and_the_random_state_are_left_alone():
    model, images, targets, maps = linear_case()
    model.train()
    before = torch.get_rng_state()
    insertion_auc(model, images, targets, maps)
    assert model.training and torch.equal(before, torch.get_rng_state()) and model.weight.grad is None
