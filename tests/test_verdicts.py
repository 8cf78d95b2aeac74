"""Verdicts: what is nearly flat, all-negative or a gap, how grave it is, and how pictures show it."""

import copy
import pickle
from functools import partial

import numpy as np
import pytest
import timm
import torch
from torch import nn

import sightline as sl
from sightline import maps
from sightline.evaluation.scores import Scores
from sightline.explainers import Explainer, Verdict, explain
from sightline.facts import LEVELS, worst
from sightline.testing import PooledModel


@pytest.fixture
def images():
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def shown(values, **options):
    """Verdicts of a map with these values, and the picture of it, alone, as rows of RGB."""

    @partial(Explainer, **options)
    def planted(activations, targets):
        grid = torch.tensor(values).reshape(1, 1, *np.shape(values))
        return grid.expand(len(activations), targets.shape[1], -1, -1)

    found = explain(PooledModel(torch.eye(3)), torch.rand(1, 3, *np.shape(values)), methods=[planted])
    black = torch.zeros(1, 3, *np.shape(values), dtype=torch.uint8)
    signed = options.get("is_signed", False)
    picture = maps.overlay(black, found["planted"], opacity=1.0, signed=signed)[0, 0].movedim(0, -1)
    return [verdict for verdict in found.verdicts["planted"][0] if verdict != "class-independent"], picture


def test_an_attention_that_has_not_learned_is_nearly_flat(images):
    torch.manual_seed(0)
    plain = timm.create_model("resnet18", num_classes=10, zero_init_last=False)
    model = sl.insert(plain, "cbam", init="identity")
    flat = explain(model, images, methods=["attention"])
    assert (flat["attention"] == 0.5).all() and flat.verdicts["attention"][0][0] == "flat"
    # as a training's first steps leave it
    model.get_submodule("layer4.1.bn2.attention.spatial.gate.bn").weight.data.fill_(1e-2)
    found = explain(model, images, methods=["attention", "grad_cam"])
    low, high = found["attention"].amin((1, 2, 3)), found["attention"].amax((1, 2, 3))
    assert ((high - low) / high < 0.01).all() and (high > low).all()
    for verdicts, spread in zip(found.verdicts["attention"], (high - low) / high, strict=True):
        assert verdicts[0] == f"nearly flat: varies {100 * spread:.1g} %" and verdicts[0].level == "do not read"
    assert not any("flat" in verdict.kind for image in found.verdicts["grad_cam"] for verdict in image)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([[0.50939, 0.50948]], ["nearly flat: varies 0.02 %"]),
        ([[-7.0, -7.06]], ["nearly flat: varies 0.8 %", "all-negative"]),
        ([[0.5, 0.5 * (1 + 1e-7)]], ["flat"]),
        ([[0.0, 0.0]], ["flat"]),
        ([[1.0, 1.02]], []),  # 2 %
        ([[100.0, 107.0]], []),  # a CAM with a large offset
        ([[0.0, 1e-12]], []),  # small, but from nothing to something
        ([[-1e-9, 1e-9]], []),  # around zero
        ([[1 / 49] * 7] * 7, ["flat"]),  # softmax over equal scores
        ([[1e38, 3e38]], []),
    ],
)
def test_what_is_flat(values, expected):
    verdicts, picture = shown(values)
    assert verdicts == expected
    is_gray = bool((picture == maps.UNDEFINED).all())
    assert is_gray == any("flat" in verdict for verdict in verdicts)


def test_a_signed_map_is_gray_where_it_is_flat_and_white_where_it_is_zero():
    assert (shown([[-3.0, -3.01]], is_signed=True)[1] == 128).all()
    assert shown([[-3.0, 0.0]], is_signed=True)[1][0, 1].min() > 240


def test_a_softmax_attention_is_nearly_flat_until_its_scores_differ():
    scores = torch.randn(7, 7, generator=torch.Generator().manual_seed(0))
    for scale, expected in ((1e-9, "flat"), (1e-3, "nearly flat"), (1e-1, None)):
        weights = (scale * scores).flatten().softmax(0).reshape(7, 7)
        verdicts, _ = shown(weights.tolist())
        assert [verdict.kind for verdict in verdicts] == ([expected] if expected else [])


def test_all_negative_behind_a_relu(images):
    class Net(nn.Sequential):
        """Class 0 takes what the last ReLU let through as evidence against it, class 1 as evidence for it."""

        def __init__(self):
            torch.manual_seed(0)
            conv, head = nn.Conv2d(3, 4, 3, stride=2), nn.Linear(4, 2)
            head.weight.data = torch.tensor([[-1.0] * 4, [1.0] * 4])
            super().__init__(conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)

    images[:, :, :32] = 0
    model = Net()
    model[0].bias.data.zero_()  # so that the dark half gives exactly 0
    found = explain(model, images, 0, ["cam", "hires_cam", "grad_cam"])
    for method in ("cam", "hires_cam"):
        assert (found[method].amax((1, 2, 3)) == 0).all() and (found[method] < 0).any()
        assert [[v.kind, v.level] for (v,) in found.verdicts[method]] == [["all-negative", "doubt"]] * 3
    assert found.verdicts["grad_cam"] == [["flat"]] * 3
    assert explain(model, images, 1, ["cam"]).verdicts["cam"] == [[]] * 3


@pytest.mark.parametrize(
    ("share", "expected", "reached"),
    [(0.005, [], ""), (0.05, ["note"], "95"), (0.5, ["doubt"], "67"), (5234.13, ["do not read"], "0.019")],
)
def test_a_conservation_gap_is_as_grave_as_it_is_large(share, expected, reached):
    @partial(Explainer, sums_to_score=True, ignores_class=True)
    def short(logits, targets, images):
        # of sum s and absolute sum a: |s - score| / a = share, with s = a
        score = logits.gather(1, targets)[:, :, None, None]
        peak = torch.zeros_like(images[:, :1])
        peak[..., 0, 0] = 1.0
        return peak * score / (1 + share)

    found = explain(PooledModel(torch.eye(3)), torch.rand(2, 3, 4, 4), methods=[short])
    for verdicts in found.verdicts["short"]:
        gaps = [verdict for verdict in verdicts if verdict.kind == "conservation gap"]
        assert [gap.level for gap in gaps] == expected
        assert gaps == [f"conservation gap: {reached} % of the logit reaches the pixels" for _ in expected]
        assert [gap.amount for gap in gaps] == [pytest.approx(share, rel=1e-4) for _ in expected]


@pytest.mark.parametrize(
    ("values", "score", "text"),
    [
        ([1.0, -0.25], 0.5, "150 % of the logit reaches the pixels"),
        ([1.0, 0.25], 0.1, "the pixels sum to 1.2, the logit is 0.1"),
        ([1.0, -2.0], 8.0, "the pixels sum to -1, the logit is 8"),
        ([1.0, -2.0], -10.0, "10 % of the logit reaches the pixels"),
        ([0.0, 0.0], 2.0, "0 % of the logit reaches the pixels"),
        ([1.0, 0.0], 0.0, "the pixels sum to 1, the logit is 0"),
    ],
)
def test_a_conservation_gap_says_what_reaches_the_pixels(values, score, text):
    @partial(Explainer, sums_to_score=True, ignores_class=True)
    def two(images, targets):
        return torch.tensor(values).expand(*targets.shape, 1, 2)

    class Constant(PooledModel):
        def forward(self, x):
            return super().forward(x) * 0 + score

    (verdicts,) = explain(Constant(torch.eye(3)), torch.rand(1, 3, 1, 2), 0, [two]).verdicts["two"]
    assert f"conservation gap: {text}" in verdicts
    (verdicts,) = explain(Constant(torch.eye(3)), torch.rand(1, 3, 1, 2), lambda y: y[:, 0], [two]).verdicts["two"]
    assert f"conservation gap: {text.replace('logit', 'score')}" in verdicts


def test_a_gap_of_several_targets_is_the_largest():
    @partial(Explainer, sums_to_score=True, ignores_class=True)
    def two(images, targets):
        return torch.tensor([[[[0.5]], [[0.25]], [[0.75]]]])

    class Constant(PooledModel):
        def forward(self, x):
            return super().forward(x) * 0 + 1

    (verdicts,) = explain(Constant(torch.eye(3)), torch.rand(1, 3, 1, 1), torch.tensor([[0, 1, 2]]), [two]).verdicts[
        "two"
    ]
    assert "conservation gap: 25 % of the logit reaches the pixels" in verdicts


def test_levels_of_the_others(images):
    model = timm.create_model("test_resnet", num_classes=3).eval()
    found = explain(model, images, methods=["guided_backprop", "activation_map"])
    assert [v.level for image in found.verdicts["guided_backprop"] for v in image] == ["note"] * 3
    assert [v.level for image in found.verdicts["activation_map"] for v in image] == ["note"] * 3
    smooth = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.SiLU(), nn.Flatten(), nn.Linear(4 * 62 * 62, 2))
    (verdict,) = explain(smooth, images[:1], methods=["guided_backprop"]).verdicts["guided_backprop"][0]
    assert (verdict.kind, verdict.level) == ("rectifiers intercepted", "doubt")
    images[1] = torch.nan
    broken = explain(PooledModel(torch.eye(3)), images, 1, ["cam"]).verdicts["cam"]
    assert [worst(verdicts) for verdicts in broken] == [None, "do not read", None]


def test_a_verdict_is_text_with_a_level():
    flat, gap = (
        Verdict("flat", "do not read"),
        Verdict("conservation gap", details="88 % of the logit reaches the pixels"),
    )
    assert (
        flat == "flat"
        and hash(flat) == hash("flat")
        and f"{gap}" == "conservation gap: 88 % of the logit reaches the pixels"
    )
    for other in (copy.deepcopy(flat), pickle.loads(pickle.dumps(flat))):
        assert other == "flat" and other.level == "do not read" and type(other) is Verdict
    assert LEVELS == ("note", "doubt", "do not read")
    assert worst([gap, Verdict("x", "note")]) == "doubt" and worst([]) is None


def test_levels_survive_an_interrupted_evaluation(tmp_path):
    gap = Verdict("conservation gap", "note", details="98 % of the logit reaches the pixels")
    verdicts = {("cam", 4): [Verdict("flat", "do not read")], ("cam", 5): [], ("cam", 9): [gap]}
    Scores(verdicts=verdicts, positions={"cam": [5, 4]}).save(tmp_path / "a.npz")
    back = Scores.load(tmp_path / "a.npz")
    assert back is not None and back.verdicts == verdicts and back.positions == {"cam": [5, 4]}
    assert [worst(image) for image in back.verdicts.values()] == ["do not read", None, "note"]
    with np.load(tmp_path / "a.npz") as stored:
        arrays = dict(stored) | {"facts": np.array('{"verdicts": [["cam", [["flat"]]]], "layers": {}}')}
    np.savez(tmp_path / "b.npz", **arrays)  # of another version: made again
    assert Scores.load(tmp_path / "b.npz") is None


@pytest.mark.parametrize("largest", [0, 2**16])
def test_verdicts_are_those_of_the_maps_as_they_were_made(largest, monkeypatch):
    monkeypatch.setattr("sightline.explainers.verdicts._LARGEST_COPY", largest)
    explanation = explain(PooledModel(torch.eye(3)), torch.rand(1, 3, 4, 4), methods=["cam"])
    explanation["cam"].zero_()
    assert explanation.resized((2, 2)).verdicts == explanation.verdicts == {"cam": [[]]}
