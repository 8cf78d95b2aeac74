"""Scores of perturbed images: against the slow reference, in closed form, made no more often than needed."""

import numpy as np
import pytest
import torch
from tests.reference import perturbed as reference
from tests.same import assert_same_state, state_of
from torch import nn

from sightline import maps as pixels
from sightline.metrics import (
    add,
    average_drop,
    average_gain,
    deletion_auc,
    deletion_correlation,
    increase_in_confidence,
    infidelity,
    inpaint,
    insertion_auc,
    insertion_correlation,
    perturbed_scores,
    road,
    road_lerf,
    road_morf,
)
from sightline.metrics.perturbed import Perturbation, _squares
from sightline.testing import ConstantModel, LinearModel

ALL = {
    "deletion_auc": deletion_auc,
    "insertion_auc": insertion_auc,
    "deletion_correlation": deletion_correlation,
    "insertion_correlation": insertion_correlation,
    "average_drop": average_drop,
    "increase_in_confidence": increase_in_confidence,
    "average_gain": average_gain,
    "add": add,
    "road_morf": road_morf,
    "road_lerf": road_lerf,
    "road": road,
    "infidelity": infidelity,
}


class Net(nn.Module):
    """Not linear, no two pixels alike."""

    def __init__(self, size=(7, 6)):
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 4, 3, padding=1), nn.Linear(4 * size[0] * size[1], 3)

    def forward(self, images):
        return self.head(self.conv(images).tanh().flatten(1))


@pytest.fixture
def case():
    torch.manual_seed(0)
    model, images = Net(), torch.randn(4, 2, 7, 6)
    return model.eval(), images, torch.tensor([0, 1, 2, 1]), torch.randn(4, 1, 7, 6)


def slow_score(model, target, kind="probability"):
    double = Net().double()
    double.load_state_dict(model.state_dict())

    def score(planes):
        with torch.no_grad():
            logits = double.eval()(torch.from_numpy(np.asarray(planes)).reshape(1, 2, 7, 6))
        return float((logits.softmax(1) if kind == "probability" else logits)[0, target])

    return score


def slow(name, model, image, target, values):
    """One metric of one image, fill 0.3, 5 steps."""
    score = slow_score(model, target)
    image, importance = image.double().numpy(), values.double().flatten().tolist()
    flat, fill = image.reshape(2, -1), np.full((2, 42), 0.3)
    original = score(flat)
    if name.startswith(("deletion", "insertion")):
        insert = name.startswith("insertion")
        shares, scores, means = reference.curve(score, flat, fill, importance, 5, insert)
        return reference.area(shares, scores) if "auc" in name else reference.correlation(scores, means, insert)
    if name in ("average_drop", "increase_in_confidence", "average_gain"):
        kept = score(reference.dimmed(flat, fill, importance))
        drop, gain = max(0, original - kept) / original, max(0, kept - original) / (1 - original)
        return {"average_drop": drop, "increase_in_confidence": float(kept > original), "average_gain": gain}[name]
    if name == "add":
        return (original - score(reference.dimmed(flat, fill, importance, inverse=True))) / original
    if name == "infidelity":
        squares = _squares(7, 6).numpy()
        falls = [original - score(np.where(square, 0.3, image)) for square in squares]
        covered = [float(values[0].double().numpy()[square].sum()) for square in squares]
        return reference.infidelity(falls, covered, True)
    order = np.argsort(-np.array(importance))
    noise = 0.01 * torch.randn(2, 7, 6, generator=torch.Generator().manual_seed(0)).double().numpy()
    means = {}
    for kind, ranked in (("road_morf", order), ("road_lerf", order[::-1])):
        scores = []
        for tenth in range(1, 10):
            hole = np.zeros(42, bool)
            hole[ranked[: round(tenth / 10 * 42)]] = True
            hole = hole.reshape(7, 6)
            scores.append(score(np.where(hole, reference.inpainted(image, hole) + noise, image)))
        means[kind] = sum(scores) / 9
    return means[name] if name in means else (means["road_lerf"] - means["road_morf"]) / 2


@pytest.mark.parametrize("name", ALL)
def test_every_metric_equals_its_slow_reference(case, name):
    model, images, targets, maps = case
    found = ALL[name](model, images, targets, maps, fill=0.3, steps=5)
    for i in range(4):
        expected = slow(name, model, images[i], int(targets[i]), maps[i])
        tolerance = 1e-4 if name.startswith("road") else 1e-5  # painting is solved to 1e-4 of the image's range
        assert found[i].item() == pytest.approx(expected, abs=tolerance, rel=1e-4)


@pytest.mark.parametrize("name", ALL)
def test_batches_order_and_size_of_batches_change_nothing(case, name):
    model, images, targets, maps = case
    whole = ALL[name](model, images, targets, maps)
    for batch_size in (1, 7, 1000):
        assert torch.allclose(ALL[name](model, images, targets, maps, batch_size=batch_size), whole, atol=1e-5)
    turned = ALL[name](model, images.flip(0), targets.flip(0), maps.flip(0))
    assert torch.allclose(turned.flip(0), whole, atol=1e-5)
    for i in range(4):
        alone = ALL[name](model, images[i : i + 1], targets[i : i + 1, None], maps[i : i + 1])
        assert torch.allclose(alone, whole[i : i + 1], atol=1e-5)
    assert whole.isfinite().all() and whole.dtype == torch.float32


def test_methods_and_metrics_share_their_images(case):
    model, images, targets, maps = case
    seen = []
    handle = model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    needs = set().union(*(metric.needs for metric in ALL.values()))
    both = perturbed_scores(
        model, images, targets, {"a": maps, "b": -maps}, needs, Perturbation(steps=6, batch_size=10)
    )
    shared, of_map = 1 + 1 + 32, 5 + 5 + 1 + 1 + 9 + 9
    assert sum(seen) == 4 * (shared + 2 * of_map) and set(seen[:-1]) == {10}
    seen.clear()
    few = perturbed_scores(
        model, images, targets, {"a": maps}, {"deletion", "insertion", "preserved", "removed"}, Perturbation(steps=6)
    )
    assert sum(seen) == 4 * (2 + 5 + 5 + 2)
    handle.remove()
    assert torch.allclose(few["a"]["deletion"], both["a"]["deletion"], atol=1e-6)
    for name, metric in ALL.items():
        alone = metric(model, images, targets, -maps, steps=6)
        assert torch.allclose(metric.value(both["b"]).float(), alone, atol=1e-5), name


def test_the_same_curve_forwards_and_backwards(case):
    model, images, targets, maps = case
    fields = perturbed_scores(model, images, targets, {"": maps}, {"deletion", "insertion"}, Perturbation(steps=42))[""]
    reverse = perturbed_scores(model, images, targets, {"": -maps}, {"insertion"}, Perturbation(steps=42))[""]
    assert torch.allclose(fields["deletion"], reverse["insertion"].flip(1), atol=1e-6)
    assert torch.equal(fields["deletion"][:, 0], fields["insertion"][:, -1])


def test_values_of_others_tests():
    target = torch.tensor([0])
    x = torch.tensor([[[[0.4, 0.3], [0.2, 0.1]]]])
    model = LinearModel(torch.ones(1, 1, 2, 2))
    fields = perturbed_scores(
        model, x, target, {"": x}, {"deletion", "insertion"}, Perturbation(steps=2, score="logit")
    )[""]
    assert fields["deletion"].tolist() == [pytest.approx([1, 0.3, 0], abs=1e-6)]
    assert fields["insertion"].tolist() == [pytest.approx([0, 0.7, 1], abs=1e-6)]
    assert fields["fractions"].tolist() == [[0, 0.5, 1]]
    five = torch.tensor([[[[0.3, 0.25, 0.2, 0.15, 0.1]]]])
    fields = perturbed_scores(
        LinearModel(torch.ones(1, 1, 1, 5)), five, target, {"": five}, {"deletion"}, Perturbation(steps=3)
    )
    assert fields[""]["fractions"].tolist() == [pytest.approx([0, 0.4, 0.8, 1])]
    # an operator that is 1 while the marked quarter is whole: perfect deletion and insertion, all steps
    quarter = torch.zeros(1, 1, 16, 16)
    quarter[..., 3, 5] = 1
    images = torch.ones(1, 1, 16, 16)
    options = {"steps": 256, "score": "logit"}
    found = deletion_auc(LinearModel(quarter), images, target, quarter, **options)
    assert found.item() == pytest.approx(0.5 / 256)
    assert insertion_auc(LinearModel(quarter), images, target, quarter, **options).item() == pytest.approx(
        1 - 0.5 / 256
    )


def test_constant_and_calibrated_models():
    constant = ConstantModel(torch.tensor([0.0, 2.0]))
    images, targets = torch.rand(3, 1, 5, 5), torch.tensor([1, 1, 0])
    maps = torch.rand(3, 1, 5, 5)
    for metric in (deletion_correlation, insertion_correlation):
        assert metric(constant, images, targets, maps).isnan().all()
    for metric in (average_drop, increase_in_confidence, average_gain, add, infidelity, road):
        assert metric(constant, images, targets, maps).abs().max() < 1e-6
    linear, ones = LinearModel(maps[:1]), torch.ones(1, 1, 5, 5)
    options = {"score": "logit", "steps": 25}
    for metric in (deletion_correlation, insertion_correlation):
        assert metric(linear, ones, torch.tensor([0]), maps[:1], **options).item() == pytest.approx(1, abs=1e-6)
        assert metric(linear, ones, torch.tensor([0]), -maps[:1], **options).item() == pytest.approx(-1, abs=1e-6)


def test_flat_broken_and_tiny_maps(case):
    model, images, targets, maps = case
    flat, broken = torch.full((4, 1, 3, 3), 0.1), maps.clone()
    broken[1, 0, 2, 2] = torch.nan
    undefined = ("deletion_correlation", "insertion_correlation", "average_drop", "increase_in_confidence")
    undefined += ("average_gain", "add")
    for name, metric in ALL.items():
        assert metric(model, images, targets, flat).isnan().all() == (name in undefined), name
        assert metric(model, images, targets, broken).isnan().tolist() == [False, True, False, False], name
    one, target = torch.full((1, 1, 1, 1), 2.0), torch.tensor([0])
    pixel = LinearModel(torch.ones(1, 1, 1, 1))
    assert deletion_auc(pixel, one, target, one, score="logit").item() == 1
    assert insertion_auc(pixel, one, target, one, score="logit").item() == 1
    assert average_drop(pixel, one, target, one, score="logit").isnan().all()
    assert infidelity(pixel, one, target, one, score="logit").item() == 0


def test_scores_that_are_not_positive_have_no_relative_drop():
    model, ones = LinearModel(-torch.ones(1, 1, 2, 2)), torch.ones(1, 1, 2, 2)
    maps = torch.rand(1, 1, 2, 2)
    assert average_drop(model, ones, torch.tensor([0]), maps, score="logit").isnan().all()
    assert add(model, ones, torch.tensor([0]), maps, score="logit").isnan().all()


def test_whole_cells():
    # 2 x 2 cells on 5 x 4 pixels: each pixel belongs to the cell that holds its center
    maps = torch.tensor([[[[4.0, 3.0], [2.0, 1.0]]]])
    images, target = torch.ones(1, 1, 5, 4), torch.tensor([0])
    model = LinearModel(torch.ones(1, 1, 5, 4))
    fields = perturbed_scores(model, images, target, {"": maps}, {"deletion"}, Perturbation(cells=True, score="logit"))[
        ""
    ]
    assert sorted((-fields["deletion"].diff()).tolist()[0]) == [4, 4, 6, 6]
    assert torch.allclose(fields["fractions"], 1 - fields["deletion"] / 20)
    assert fields["map_means"].tolist() == [[4, 3, 2, 1]]
    found = deletion_auc(model, images, target, maps, cells=True, score="logit")
    assert found.item() == pytest.approx(10)  # a linear score falls by the share of pixels


def test_one_logit_stands_for_two_classes():
    class Binary(nn.Module):
        def forward(self, images):
            return images.mean((1, 2, 3))[:, None]

    images, maps = torch.rand(2, 1, 4, 4), torch.rand(2, 1, 4, 4)
    one, zero = (deletion_auc(Binary(), images, torch.full((2,), t), maps) for t in (1, 0))
    assert torch.allclose(one + zero, torch.ones(2), atol=1e-6)
    logit = insertion_auc(Binary(), images, torch.tensor([0, 1]), maps, score="logit")
    assert (logit > 0).all()  # that of class 1


@pytest.mark.parametrize("size", [(9, 9), (40, 33)])
def test_painting_solves_the_linear_system(size):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3, 2, *size, generator=generator, dtype=torch.float64)
    for share in (0.1, 0.5, 0.95):
        hole = torch.rand(3, 1, *size, generator=generator) < share
        found = inpaint(images, hole, tolerance=1e-13)
        for i in range(3):
            expected = reference.inpainted(images[i].numpy(), hole[i, 0].numpy())
            assert np.abs(found[i].numpy() - expected).max() <= 1e-10 * np.abs(expected).max()
    block = torch.zeros(3, 1, *size, dtype=torch.bool)
    block[..., 1:-1, 1:-1] = True
    nothing_left = inpaint(images, torch.ones_like(block))
    assert torch.allclose(nothing_left, images.mean((2, 3), keepdim=True).expand_as(images))
    assert torch.equal(inpaint(images, torch.zeros_like(block)), images)
    once = [inpaint(images.float(), block, noise=0.01) for _ in range(2)]
    assert torch.equal(*once) and not torch.equal(once[0], inpaint(images.float(), block))


def holes(height, width):
    """Along a map, of many sizes, open at the border, and around the last pixels that are left."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    generator = torch.Generator().manual_seed(0)
    rough, fine = (torch.randn(1, 1, *side, generator=generator) for side in ((5, 5), (height, width)))
    smooth = pixels.resize(rough, (height, width))[0, 0]
    by_rank = [each.flatten().argsort().argsort().view(height, width) for each in (smooth, fine[0, 0])]
    cuts = [
        order < min(share * order.numel(), order.numel() - 1) for order in by_rank for share in (0.1, 0.5, 0.9, 0.99)
    ]
    disc = ((y - height // 2) / height) ** 2 + ((x - width // 2) / width) ** 2 < 0.15
    return torch.stack([*cuts, disc, ~disc, x != width // 2, (x > 0) | (y > 0)])[:, None]


@pytest.mark.parametrize("size", [(1, 7), (8, 3), (45, 32), (128, 128)])
def test_no_painted_pixel_is_further_from_the_solution_than_the_tolerance(size):
    hole = holes(*size)
    rough = torch.randn(len(hole), 1, 9, 9, generator=torch.Generator().manual_seed(1))
    images = 5 + pixels.resize(rough, size) + 0.1 * torch.rand(size)
    ranges = images.amax((1, 2, 3)) - images.amin((1, 2, 3))
    painted = inpaint(images, hole)
    exact = np.stack([reference.painted(images[i, 0].numpy(), hole[i, 0].numpy()) for i in range(len(hole))])
    errors = np.abs(painted[:, 0].double().numpy() - exact).max((1, 2)) / ranges.numpy()
    assert errors.max() < 1e-4, errors
    assert torch.equal(painted[3:5], inpaint(images[3:5], hole[3:5]))


def test_inpainting_as_fill(case):
    model, images, targets, maps = case
    found = deletion_auc(model, images, targets, maps, fill="inpaint", steps=6)
    assert found.isfinite().all() and not torch.allclose(found, deletion_auc(model, images, targets, maps, steps=6))
    with pytest.raises(ValueError, match="expected a fill that needs no hole for metrics that dim the image, got"):
        average_drop(model, images, targets, maps, fill="inpaint")


def test_model_and_random_state_are_left_alone(case):
    model, images, targets, maps = case
    model.train()
    before = state_of(model)
    for metric in ALL.values():
        metric(model, images, targets, maps, steps=2)
    assert_same_state(before, state_of(model))
    model.register_forward_pre_hook(lambda *_: 1 / 0)
    before = state_of(model)
    with pytest.raises(ZeroDivisionError):
        road(model, images, targets, maps)
    assert_same_state(before, state_of(model))


def test_half_precision_and_no_grad_around(case):
    model, images, targets, maps = case
    whole = deletion_auc(model, images, targets, maps)
    half = deletion_auc(model.bfloat16(), images.bfloat16(), targets, maps)
    assert half.dtype == torch.float32 and (half - whole).abs().max() < 0.02
    with torch.inference_mode():
        assert torch.allclose(deletion_auc(model, images.bfloat16(), targets, maps), half)


def test_several_classes_behind_a_sigmoid_have_probabilities_of_their_own(case):
    model, images, targets, maps = case
    several = nn.Sequential(model, nn.Sigmoid())
    alone = several(images).detach().gather(1, targets[:, None])[:, 0]
    fields = perturbed_scores(several, images, targets, {"": maps}, {"original"})[""]
    assert torch.allclose(fields["original"].float(), alone, atol=1e-6)
