"""What every metric of `METRICS` keeps, whatever it measures."""

from inspect import signature

import pytest
import torch
from tests.same import assert_same_state, state_of
from torch import nn

from sightline import metrics
from sightline.metrics import METRICS, PerturbationMetric, inputs_of, mean_of, metric

N = 6
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


class Net(nn.Module):
    """Not linear, no two pixels alike, in a float32 that is exact enough to compare with float64."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 4, 3, padding=1), nn.Linear(4 * 56, 3)

    def forward(self, images):
        return self.head(self.conv(images).tanh().flatten(1))


class Constant(nn.Module):
    """The same logits for every image; with a weight that it does not use."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, images):
        return images.new_tensor([[0.5, 1.0, -1.0]]).expand(len(images), 3) + 0 * images.sum((1, 2, 3))[:, None]


def explain(model, images, targets):
    """Gradient x input: changes with the weights, the image and the class."""
    with torch.enable_grad():
        images = images.detach().requires_grad_()
        score = model(images).gather(1, targets.reshape(-1, 1)).sum()
        return (torch.autograd.grad(score, images)[0] * images).sum(1, keepdim=True).detach()


@pytest.fixture
def case():
    torch.manual_seed(0)
    masks = torch.zeros(N, 1, 8, 7, dtype=torch.bool)
    for i in range(N):
        masks[i, :, i : i + 2 + i % 2, i : i + 2] = True
    given = {"images": torch.randn(N, 2, 8, 7), "targets": torch.arange(N) % 3, "maps": torch.randn(N, 1, 8, 7)}
    return given | {"masks": masks, "model": Net().eval(), "explain": explain}


def scores(name, given, rows=slice(None)):
    """Values of one metric for some of the images."""
    some = {key: value[rows] if isinstance(value, torch.Tensor) else value for key, value in given.items()}
    function = METRICS[name].function
    return function(**{key: value for key, value in some.items() if key in inputs_of(METRICS[name])})


def same(one, other, tolerance=1e-5):
    """NaN at the same places, and else equal to `tolerance` of the largest value."""
    scale = max(1.0, float(one[one.isfinite()].abs().max())) if one.isfinite().any() else 1.0
    return torch.allclose(one.double(), other.double(), rtol=0, atol=tolerance * scale, equal_nan=True)


@pytest.mark.parametrize("name", METRICS)
def test_batches_and_order_change_nothing(case, name):
    whole = scores(name, case)
    assert len(whole) == N and whole.isfinite().any()
    assert same(torch.cat([scores(name, case, slice(i, i + 1)) for i in range(N)]), whole)
    assert same(torch.cat([scores(name, case, slice(4)), scores(name, case, slice(4, None))]), whole)
    turned = torch.tensor([3, 0, 5, 1, 4, 2])
    assert same(scores(name, case, turned), whole[turned])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", METRICS)
def test_precision_and_device_change_nothing(case, name, device):
    whole = scores(name, case)
    assert whole.dtype == torch.float32
    moved = {
        key: value.to(device) if isinstance(value, torch.Tensor | nn.Module) else value for key, value in case.items()
    }
    assert same(scores(name, moved).cpu(), whole, 1e-4)
    double = {key: value.double() if key in ("model", "images", "maps") else value for key, value in moved.items()}
    found = scores(name, double)
    assert found.dtype == torch.float64 and same(found.cpu(), whole, 1e-4)


@pytest.mark.parametrize("name", METRICS)
def test_streaming_is_all_at_once(case, name):
    streamed, whole = METRICS[name](), METRICS[name]()
    whole.update(**case)
    for rows in (slice(3), slice(3, 5), slice(5, None)):
        part = {key: value[rows] if isinstance(value, torch.Tensor) else value for key, value in case.items()}
        streamed.update(**part)
    assert same(streamed.compute()[None], whole.compute()[None])
    values = scores(name, case)
    if values.ndim == 1:
        assert same(whole.compute()[None], values.double().nanmean()[None])


@pytest.mark.parametrize("name", METRICS)
def test_model_inputs_and_random_state_are_left_alone(case, name):
    case["model"].train()
    case["model"].head.weight.grad = torch.ones_like(case["model"].head.weight)
    before = state_of(case["model"])
    kept = {key: value.clone() for key, value in case.items() if isinstance(value, torch.Tensor)}
    scores(name, case)
    assert_same_state(before, state_of(case["model"]))
    assert all(torch.equal(case[key], value) for key, value in kept.items())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", [name for name in METRICS if "maps" in signature(METRICS[name].function).parameters])
def test_a_broken_map_is_undefined_and_leaves_its_neighbors_alone(case, name, bad):
    whole = scores(name, case)
    case["maps"][2, 0, 1, 1] = bad
    found = scores(name, case)
    assert found[2].isnan().all()
    others = [0, 1, 3, 4, 5]
    assert same(found[others], whole[others])


ODD = {
    "flat": lambda maps: torch.full_like(maps, 0.5),
    "zero": torch.zeros_like,
    "negative": lambda maps: -maps.abs(),
    "ties": lambda maps: maps.sign(),
    "one pixel": lambda maps: maps[:, :, :1, :1],
    "one marked": lambda maps: torch.zeros_like(maps).index_fill(3, torch.tensor([3]), 1.0),
}
MASKS = {"empty": torch.zeros_like, "full": torch.ones_like, "one pixel": lambda masks: masks & (masks.cumsum(3) == 1)}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("name", METRICS)
def test_odd_maps_score_a_number_or_nothing(case, name, odd):
    found = scores(name, case | {"maps": ODD[odd](case["maps"])})
    assert not found.isinf().any() and len(found) == N
    one_by_one = [scores(name, case | {"maps": ODD[odd](case["maps"])}, slice(i, i + 1)) for i in range(N)]
    assert same(torch.cat(one_by_one), found)


@pytest.mark.parametrize("odd", MASKS)
@pytest.mark.parametrize("name", [name for name in METRICS if "masks" in inputs_of(METRICS[name])])
def test_odd_masks(case, name, odd):
    found = scores(name, case | {"masks": MASKS[odd](case["masks"])})
    if odd == "empty":
        assert found.isnan().all()
    elif odd == "full" and name in ("mask_auc", "point_biserial"):
        assert found.isnan().all()  # nothing outside to compare with
    else:
        assert found.isfinite().all() and (found >= -1).all() and (found <= 1).all()


class DeepNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv3d(2, 4, 3, padding=1), nn.LazyLinear(3)

    def forward(self, images):
        return self.head(self.conv(images).tanh().flatten(1))


PLANES = [name for name in METRICS if isinstance(METRICS[name].function, PerturbationMetric)] + ["max_box_accuracy"]
"""Metrics that take no volumes."""
FLAT = [name for name in METRICS if inputs_of(METRICS[name]) <= {"maps", "masks"} and name not in PLANES]


def deep(case, depth):
    """The same images, cut along their height into a volume of another shape."""
    torch.manual_seed(0)
    cut = {key: value.unflatten(2, (depth, -1)) for key, value in case.items() if key in ("images", "maps", "masks")}
    model = DeepNet().eval()
    model(cut["images"])
    return case | cut | {"model": model}


@pytest.mark.parametrize("name", METRICS)
def test_volumes_are_scored_or_refused(case, name, unchecked):
    if name in PLANES:
        with pytest.raises(
            ValueError, match=r"expected \(b, c, h, w\) for .*, got a volume \(6, \d, 2, 4, 7\); score its"
        ):
            scores(name, deep(case, 2))
    else:
        found = scores(name, deep(case, 2))
        assert found.shape == (N,) and found.isfinite().any()


@pytest.mark.parametrize("name", FLAT)
def test_where_the_positions_lie_changes_nothing(case, name):
    assert same(scores(name, deep(case, 2)), scores(name, case))
    maps = case["maps"][:, :, ::2]  # to be resized
    assert same(scores(name, deep(case, 1) | {"maps": maps[:, :, None]}), scores(name, case | {"maps": maps}))


@pytest.mark.parametrize("name", ["parameter_randomization", "random_logit", "max_sensitivity", "completeness"])
def test_a_volume_of_one_slice_is_an_image(case, name):
    plain = Net().eval()
    with torch.no_grad():
        model = deep(case, 1)["model"]
        model.conv.weight.zero_()[:, :, 1] = plain.conv.weight
        model.conv.bias.copy_(plain.conv.bias)
        model.head.load_state_dict(plain.head.state_dict())
    volumes = deep(case, 1) | {"model": model}
    if name == "parameter_randomization":  # shuffles the weights that the plain network does not have, too
        assert scores(name, volumes).shape == (N,)
    else:
        assert same(scores(name, volumes), scores(name, case | {"model": plain}))


CONSTANT = {
    "insertion_auc": "probability", "deletion_auc": "probability", "road_morf": "probability",
    "road_lerf": "probability", "road": 0, "average_drop": 0, "increase_in_confidence": 0, "average_gain": 0, "add": 0,
    "deletion_correlation": None, "insertion_correlation": None, "completeness": 1, "infidelity": 0,
}  # fmt: skip


@pytest.mark.parametrize("name", CONSTANT)
def test_a_constant_model(case, name):
    found = scores(name, case | {"model": Constant()})
    shares = torch.tensor([0.5, 1.0, -1.0]).softmax(0)[case["targets"]]
    expected = {"probability": shares, None: torch.full((N,), torch.nan)}.get(CONSTANT[name])
    assert same(found, torch.full((N,), float(CONSTANT[name])) if expected is None else expected)


def better(name, one, other):
    """Of two values per image, where the first is better than or as good as the second."""
    return one >= other if METRICS[name].higher_is_better else one <= other


@pytest.mark.parametrize("name", [name for name in METRICS if METRICS[name].higher_is_better is not None])
def test_the_oracle_beats_its_reverse(name):
    """A linear score, whose contributions are known: the true map is best, the reversed one worst."""
    if "maps" not in inputs_of(METRICS[name]):
        pytest.skip("it makes the maps itself")
    torch.manual_seed(1)
    masks = torch.zeros(N, 1, 8, 7, dtype=torch.bool)
    masks[:, :, 2:5, 2:5] = True
    images = torch.rand(N, 1, 8, 7) * 0.1 + 3 * masks
    weight = torch.stack([torch.ones(56), -torch.ones(56)]) / 8

    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(weight)

        def forward(self, images):
            return images.flatten(1) @ self.weight.T - 1.5

    given = {"model": Linear(), "images": images, "targets": torch.zeros(N, dtype=torch.long), "masks": masks}
    oracle, reverse = (scores(name, given | {"maps": maps}) for maps in (images, images.max() - images))
    if oracle.ndim > 1:
        oracle, reverse = (values.mean(0).amax()[None] for values in (oracle, reverse))
    assert better(name, oracle, reverse).all()
    assert name in ("increase_in_confidence", "average_gain") or not same(oracle, reverse)


def test_old_names_are_answered():
    assert metrics.Hiding is metrics.Perturbation and metrics.HidingMetric is PerturbationMetric
    assert metrics.hidden_scores is metrics.perturbed_scores and metrics.frames_of is metrics.perturbed_counts
    with pytest.raises(AttributeError, match="no attribute 'hidden'"):
        metrics.hidden  # noqa: B018


def test_a_perturbation_metric_reads_only_what_there_is():
    with pytest.raises(ValueError, match=r"expected parameters of a perturbation metric out of .*, got 'kept'"):
        PerturbationMetric(lambda kept: kept)


@pytest.mark.parametrize(
    ("better", "meaning"), [("higher", "{method} is best ({score})"), ("lower", "{methods}"), ("neither", "{method}")]
)
def test_a_meaning_with_other_placeholders_than_those_of_a_test_is_refused(better, meaning):
    with pytest.raises(ValueError, match=r"expected meaning= in a few words, .* got '\{method"):
        metric(better, meaning)


def test_a_description_with_a_meaning_is_no_test():
    tests = {name for name, measure in METRICS.items() if measure.is_test}
    assert tests == {"parameter_randomization", "random_logit"}

    @metric("neither", "how wide the map is")
    def width(maps):
        return maps.new_full((len(maps),), maps.shape[-1])

    assert mean_of(width, "Width").is_test is False
