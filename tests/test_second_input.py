"""Models that take more than images: what goes along with each image, and what is the same for all."""

from functools import partial

import pytest
import torch
from tests.same import close
from torch import nn

import sightline as sl
from sightline import explainers, metrics
from sightline.evaluation import evaluate
from sightline.explainers import explain, fitting

MASKS = partial(explainers.rise, masks=9, cells=3)
COVERED = partial(explainers.occlusion, patch=4, stride=4)
METHODS = [
    "grad_cam", "hires_cam", "saliency", "lrp", "guided_backprop", MASKS, COVERED,
    partial(explainers.integrated_gradients, steps=5), partial(explainers.smooth_grad, samples=3), "score_cam",
    "ablation_cam",
]  # fmt: skip


class Net(nn.Module):
    """The age of each patient moves what is seen, and the scale, which is one for all, how much it counts."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, 2, 1)
        self.head = nn.Linear(5, 3)

    def forward(self, x, age, *, scale=1.0):
        seen = self.conv(x).relu()
        return self.head(seen.mean((2, 3))) * (1 + age) * scale


class Joined(Net):
    """The age joins before the layer that is read: as another channel, whose rows must be as many as the images."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Conv2d(6, 5, 1)

    def forward(self, x, age, *, scale=1.0):
        seen = self.conv(x).relu()
        plane = age[:, :, None, None].expand(-1, 1, *seen.shape[2:])
        return self.head(self.mix(torch.cat([seen, plane], 1)).relu().mean((2, 3))) * scale


class Alone(nn.Module):
    """The same for one patient."""

    def __init__(self, model, age, scale):
        super().__init__()
        self.model, self.age, self.scale = model, age, scale

    def forward(self, x):
        return self.model(x, self.age.expand(len(x), -1), scale=self.scale)


@pytest.fixture(params=[Net, Joined])
def case(request):
    torch.manual_seed(0)
    model = request.param().double().eval()
    images, age = torch.randn(3, 3, 8, 8).double(), torch.rand(3, 1).double() * 4
    return model, images, age, torch.tensor([0, 2, 1])


SCALE = torch.tensor(3.0)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m if isinstance(m, str) else m.func.name)
def test_every_image_keeps_its_own_second_input(method, case):
    model, images, age, targets = case
    layer = "mix" if isinstance(model, Joined) else "conv"
    method = f"{method}@{layer}" if method == "ablation_cam" else method
    given = {"forward_args": (age,), "forward_kwargs": {"scale": SCALE}}
    found = explain(model, images, targets, [method], **given, batch_size=4)
    (name,) = found.maps
    for i in range(3):
        alone = Alone(model, age[i : i + 1], SCALE)
        asked = method.replace("@", "@model.") if isinstance(method, str) else method
        one = explain(alone, images[i : i + 1], int(targets[i]), [asked])
        assert close(*(value[0] for value in one.maps.values()), found[name][i])
        assert close(one.logits[0], found.logits[i])


def test_one_method_as_a_function_takes_them_too(case):
    model, images, age, targets = case
    expected = explain(model, images, targets, [COVERED], forward_args=age, forward_kwargs={"scale": 2.0})
    found = explainers.occlusion(
        model, images, targets, patch=4, stride=4, forward_args=(age,), forward_kwargs={"scale": 2.0}
    )
    assert torch.equal(found, *expected.maps.values())


def test_a_function_of_the_output_sees_the_same_call(case):
    model, images, age, _ = case
    with_logits = explain(model, images, 1, [COVERED], forward_args=(age,))
    with_function = explain(model, images, lambda logits: logits[:, 1], [COVERED], forward_args=(age,))
    assert close(*with_logits.maps.values(), *with_function.maps.values())


HIDING = ["deletion_auc", "insertion_auc", "average_drop", "add", "road_morf", "infidelity", "deletion_correlation"]


@pytest.mark.parametrize("name", HIDING)
def test_metrics_that_hide_parts_hand_it_on(name, case):
    model, images, age, targets = case
    maps = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(1)).double()
    score = metrics.METRICS[name].function
    found = score(model, images, targets, maps, steps=5, batch_size=4, forward_args=(age,))
    for i in range(3):
        alone = Alone(model, age[i : i + 1], 1.0)
        assert close(score(alone, images[i : i + 1], targets[i : i + 1], maps[i : i + 1], steps=5)[0], found[i])


def test_other_metrics_hand_it_on(case):
    model, images, age, targets = case
    given = {"forward_args": (age,)}

    def again(model, images, targets):
        return explain(model, images, targets, ["input_x_gradient"], **given)["input_x_gradient"]

    maps = again(model, images, targets)
    assert metrics.parameter_randomization(model, images, targets, again, **given).shape == (3,)
    assert metrics.max_sensitivity(model, images, targets, again, samples=2).isfinite().all()
    found = {
        "completeness": metrics.completeness(model, images, targets, maps, **given),
        "random_logit": metrics.random_logit(model, images, targets, again, **given),
        "fooling_rate": metrics.fooling_rate(model, images, targets, epsilon=0.5, **given),
    }
    for i in range(3):
        row, alone = slice(i, i + 1), Alone(model, age[i : i + 1], 1.0)

        def again_alone(model, images, targets):
            return explain(model, images, targets, ["input_x_gradient"])["input_x_gradient"]

        expected = {
            "completeness": metrics.completeness(alone, images[row], targets[row], maps[row]),
            "random_logit": metrics.random_logit(alone, images[row], targets[row], again_alone),
            "fooling_rate": metrics.fooling_rate(alone, images[row], targets[row], epsilon=0.5),
        }
        for name, value in expected.items():
            torch.testing.assert_close(found[name][i], value[0], rtol=1e-5, atol=1e-6, equal_nan=True)


def test_what_has_no_row_for_each_image_is_handed_on_as_it_is():
    seen = []

    class Spy(Net):
        def forward(self, x, age, table, shared, names, extra):
            seen.append((len(x), table, shared, names, extra))
            return super().forward(x, age) + table.sum() + extra["weights"].sum()

    torch.manual_seed(0)
    images, age = torch.randn(2, 3, 8, 8), torch.rand(2, 1)
    table, shared, names = torch.rand(5, 2), torch.tensor(2.0), ["a", "b"]
    extra = {"rows": torch.arange(2), "weights": torch.rand(1, 4)}
    explain(Spy(), images, 0, [COVERED], forward_args=(age, table, shared, names, extra), batch_size=5)
    assert {n for n, *_ in seen} == {2, 5, 3}  # 8 covered images: 5 and 3
    for _, *others in seen:
        assert others[0] is table and others[1] is shared and others[2] == names
        assert others[3]["weights"] is extra["weights"]
    assert torch.cat([others[3]["rows"] for n, *others in seen if n != 2]).tolist() == [0] * 4 + [1] * 4


def test_a_missing_input_is_named(case):
    model, images, _, _ = case
    for call in (explain, sl.attention_maps, lambda *a: metrics.completeness(*a, torch.zeros(3).long(), images[:, :1])):
        with pytest.raises(
            TypeError, match="missing a required argument: 'age'; pass its other inputs by forward_args="
        ):
            call(model, images)

    class Wrong(Net):
        def forward(self, x):
            return len(3)

    with pytest.raises(TypeError, match=r"object of type 'int' has no len"):  # its own fault stays its own
        explain(Wrong(), images.float())


def test_a_second_input_that_the_model_holds_is_told_where_it_belongs(case):
    model, images, age, _ = case

    class Bound(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x, age)

    for method in (COVERED, "integrated_gradients"):
        with pytest.raises(RuntimeError, match="keeps for its first batch by forward_args="):
            explain(Bound(), images, 0, [method])
    with pytest.raises(RuntimeError, match="keeps for its first batch by forward_args="):
        metrics.deletion_auc(Bound(), images, torch.tensor([0, 1, 2]), images[:, :1], steps=2)


def test_what_fits_is_tried_with_it(case):
    model, images, age, _ = case
    names, reasons = fitting(model, images, ["grad_cam", "attention", "rise"], forward_args=(age,))
    assert names == ["grad_cam", "rise"] and list(reasons) == ["attention"]
    assert sl.attention_maps(model, images, forward_args=(age,)) == {}


def test_compiled_maps_take_images_alone(case):
    model, images, age, _ = case
    with pytest.raises(ValueError, match="got output= or other inputs than images; leave compile out"):
        explain(model, images, 0, ["cam"], forward_args=(age,), compile=True)


def test_evaluation_takes_it_from_the_batches():
    torch.manual_seed(0)
    model = Net().eval()
    images, age, labels = torch.randn(6, 3, 8, 8), torch.rand(6, 1) * 4, torch.arange(6) % 3
    asked = ["grad_cam", "activation_map"], ["deletion_auc", "random_logit", "completeness"]
    options = {"controls": ["center_map"], "steps": 4, "examples": 2, "limit": 4, "budget": 100.0}
    parts = [slice(0, 4), slice(4, 6)]
    data = [{"images": images[s], "labels": labels[s], "forward_args": (age[s],)} for s in parts]
    found = evaluate(model, data, *asked, **options)
    named = [{"images": images[s], "labels": labels[s], "forward_kwargs": {"age": age[s]}} for s in parts]
    again = evaluate(model, named, *asked, **options)
    assert found.per_image == again.per_image
    by_name = {f"image {i}": i for i in range(6)}
    for name, prediction, area in zip(
        found.per_image["name"], found.per_image["prediction"], found.per_image["deletion_auc/grad_cam"], strict=True
    ):
        i = by_name[name]
        alone = Alone(model, age[i : i + 1], 1.0)
        target = int(model(images[i : i + 1], age[i : i + 1]).argmax())
        assert prediction == str(target)
        maps = explain(alone, images[i : i + 1], target)["grad_cam"]
        expected = metrics.deletion_auc(alone, images[i : i + 1], torch.tensor([target]), maps, steps=4)
        assert area == pytest.approx(expected.item(), abs=1e-5)
