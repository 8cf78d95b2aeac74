"""Cross-domain classification, weakly supervised segmentation and robustness: by hand, by slow loops, end to end."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tests.reference import tasks as reference
from tests.same import assert_same_state, state_of
from torch import nn

from sightline import data, recipe, runs, tasks
from sightline.attention import RepresentativeVectors
from sightline.data.splits import held_out
from sightline.metrics.localization import jaccard
from sightline.models import create_model
from sightline.recipe import Recipe
from sightline.tasks.cross_domain import STRENGTHS, support_vectors
from sightline.tasks.images import images_for
from sightline.tasks.robustness import flips
from sightline.tasks.segmentation import CONTROLS, THRESHOLDS

SIDE = 16


class Center(nn.Module):
    """Weighs all of the middle, and twice its middle, whatever the image; two features, its red and green."""

    class Gate(nn.Module):
        def forward(self, features):
            weights = torch.zeros(len(features), 1, *features.shape[2:])
            weights[:, :, 4:12, 4:12] = 1 / 80
            weights[:, :, 6:10, 6:10] = 2 / 80
            return weights

    def __init__(self):
        super().__init__()
        self.gate = self.Gate()

    def forward(self, features):
        return (features * self.gate(features)).sum((2, 3))


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.attention, self.head = nn.Conv2d(3, 2, 1, bias=False), Center(), nn.Linear(2, 2)
        with torch.no_grad():
            self.conv.weight.copy_(torch.eye(2, 3)[:, :, None, None])
            self.head.weight.copy_(torch.eye(2).flip(0))
            self.head.bias.zero_()

    def forward(self, images):
        return self.head(self.attention(self.conv(images).clamp(-3, 3)))  # pixels of 0 to 255 would all be 3


def picture(color, box):
    """A square of a color on gray, and a white one in the corner."""
    pixels = np.full((SIDE, SIDE, 3), 128, np.uint8)
    pixels[:3, :3] = 255
    x0, y0, x1, y1 = box
    pixels[y0:y1, x0:x1] = color
    return Image.fromarray(pixels)


@pytest.fixture
def folder(tmp_path):
    """12 training and 6 test images of two classes with masks of a square in the middle; four patients per split."""
    rows = ["file_name,label,mask,split,group"]
    for i in range(18):
        split = "train" if i < 12 else "test"
        label = "red" if i % 3 else "green"
        box = (4, 4, 12, 12)
        image = picture({"red": (200 - i, 61, 128), "green": (61, 200 - i, 128)}[label], box)
        image.save(tmp_path / f"{i}.png")
        mask = np.zeros((SIDE, SIDE), np.uint8)
        mask[4:12, 4:12] = 255
        Image.fromarray(mask).save(tmp_path / f"m{i}.png")
        rows.append(f"{i}.png,{label},m{i}.png,{split},{split}{i % 4}")
    (tmp_path / "metadata.csv").write_text("\n".join(rows) + "\n")
    return tmp_path


def toy_run(folder, source, **fields):
    """A run of a network that is passed on, of images of 16 pixels."""
    wanted = recipe.load(Recipe(), {"data.source": str(source), "data.size": SIDE, "data.val": 0.0, **fields})
    return runs.Run(
        folder=folder / "run",
        recipe=wanted,
        seed=0,
        classes=("green", "red"),
        preprocess=data.Preprocess(size=(SIDE, SIDE), mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.5)),
        info={},
        history=[],
        skipped=[],
    )


@pytest.mark.parametrize(("classes", "spread"), [(2, 0.3), (4, 0.5)])
def test_support_vectors_equal_the_minimum_of_their_formula(classes, spread):
    rng = np.random.default_rng(classes)
    centers = spread * rng.normal(size=(classes, 5))
    labels, truth = np.arange(120) % classes, np.arange(80) % classes
    scale = np.array([1.0, 10.0, 0.1, 3.0, 1.0])
    features, tested = ((centers[k] + rng.normal(size=(len(k), 5))) * scale for k in (labels, truth))
    held = held_out(labels, 0.2, 0)
    hits = [
        (reference.machine(features[~held], labels[~held], features[held], c) == labels[held]).mean() for c in STRENGTHS
    ]
    answers, strength = support_vectors(features, labels, tested)
    assert strength == STRENGTHS[int(np.argmax(hits))] > STRENGTHS[0]
    assert (answers == reference.machine(features, labels, tested, strength)).all()
    assert (answers == truth).mean() > 1.3 / classes


def test_whole_groups_choose_c():
    """A patient has one class and a look of its own: images of known patients favor another C than those of others."""
    rng = np.random.default_rng(2)
    patients = np.repeat(np.arange(12), 10)
    labels = patients % 2
    looks = rng.normal(size=(12, 12))[patients]
    features = np.c_[0.7 * labels + rng.normal(size=120), looks] + 0.5 * rng.normal(size=(120, 13))
    chosen = []
    for groups in (None, patients):
        held = held_out(labels, 0.2, 0, groups)
        hits = [
            (reference.machine(features[~held], labels[~held], features[held], c) == labels[held]).mean()
            for c in STRENGTHS
        ]
        chosen.append(support_vectors(features, labels, features[:5], groups)[1])
        assert chosen[-1] == STRENGTHS[int(np.argmax(hits))]
    assert chosen[0] != chosen[1]
    with pytest.raises(ValueError, match="expected at least two groups to split by, got one"):
        support_vectors(features, labels, features[:5], np.zeros(120))


def test_one_class_is_always_answered():
    assert support_vectors(np.eye(4), np.full(4, 2), np.eye(4)[:2])[0].tolist() == [2, 2]


def test_cross_domain_reads_the_features_of_the_run_s_input(folder):
    """The features of the toy are red and green of the middle, which tell the classes apart."""
    model = Attends().eval()
    before = state_of(model)
    outcome = tasks.perform("cross_domain", toy_run(folder, "clutter"), model, data=str(folder))
    assert_same_state(before, state_of(model))
    accuracy = outcome.figures["accuracy"]
    assert accuracy.values.tolist() == [1.0] * 6 and accuracy.chance == 4 / 6
    assert accuracy.groups is not None and len(set(accuracy.groups.tolist())) == 4
    assert outcome.names["images"] == [f"{i}.png" for i in range(12, 18)]
    assert "of the 12 training images" in outcome.notices[0] and "; 2 features." in outcome.notices[0]


def test_other_images_have_the_size_mean_and_deviation_of_the_run(folder):
    run = toy_run(folder, "clutter")
    sets = images_for(run, str(folder), None)
    assert {split: len(images) for split, images in sets.items()} == {"train": 12, "test": 6}
    assert all(images.preprocess == run.preprocess for images in sets.values())
    assert sets["test"].batch([0]).images.shape == (1, 3, SIDE, SIDE)
    assert len(images_for(run, str(folder), {"test_size": 3})["test"]) == 3


def test_other_images_are_stored_at_the_size_of_a_run_whose_recipe_does_not_say_it(folder):
    plain = toy_run(folder, "clutter", **{"data.size": None})
    for size in ((SIDE, SIDE), (24, 16)):
        run = replace(plain, preprocess=replace(plain.preprocess, size=size))
        assert images_for(run, str(folder), None)["test"].batch([0]).images.shape == (1, 3, *size)
    square = replace(plain, preprocess=replace(plain.preprocess, size=(32, 32)))
    composed = images_for(square, "clutter-twice", {"test_size": 3, "train_size": 3})["test"]
    assert composed.batch([0]).images.shape == (1, 3, 32, 32)


@pytest.mark.parametrize("epsilon", [0.01, 0.1, 0.3])
def test_flips_of_a_linear_model_equal_the_slow_ones(epsilon):
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(3, 12, generator=generator), 0.3 * torch.randn(3, generator=generator)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    with torch.no_grad():
        model[1].weight.copy_(weight)
        model[1].bias.copy_(bias)
    pixels = torch.rand(60, 3, 2, 2, generator=generator)
    labels = torch.randint(3, (60,), generator=generator)
    noise = torch.ones(60, 3, 2, 2)
    before = state_of(model)
    found = flips(model, pixels, labels, [epsilon, 0.0], noise)
    assert_same_state(before, state_of(model))
    slow = [
        reference.flip(weight.double().numpy(), bias.double().numpy(), x, k, epsilon)
        for x, k in zip(pixels.double().flatten(1).numpy(), labels.tolist(), strict=True)
    ]
    wanted = torch.tensor([math.nan if flip is None else flip for flip in slow])
    torch.testing.assert_close(found[:, 0], wanted, equal_nan=True, rtol=0, atol=0)
    assert {0.0, 1.0} <= set(found[:, 0].tolist()) or epsilon == 0.3
    brighter = model((pixels + epsilon).clamp(0, 1)).argmax(1) != labels
    assert torch.equal(found[:, 2].nan_to_num(-1), brighter.float().where(~wanted.isnan(), -1.0))
    assert torch.equal(found[:, 1].nan_to_num(-1), torch.zeros(60).where(~wanted.isnan(), -1.0))


def test_epsilon_counts_pixels_and_not_the_network_s_input(folder):
    """The toy's classes are green and red: it compares the middle's 200 - i and 61 of 255 after their normalization."""
    (red_mean, green_mean, _), (red_std, green_std, _) = toy_run(folder, folder).preprocess.mean, (0.2, 0.25, 0.5)
    gaps = []
    for i in range(12, 18):
        red, green = (200 - i, 61) if i % 3 else (61, 200 - i)
        gap = (red / 255 - red_mean) / red_std - (green / 255 - green_mean) / green_std
        assert (gap > 0) == (i % 3 > 0)  # right
        gaps.append(abs(gap) * 255 / (1 / red_std + 1 / green_std))
    epsilons = sorted({math.floor(gap) + more for gap in gaps for more in (0, 1)})
    outcome = tasks.perform("robustness", toy_run(folder, folder), Attends().eval(), epsilons=tuple(epsilons))
    for epsilon in epsilons:
        rate = outcome.figures[f"fooled, {epsilon}/255"]
        np.testing.assert_array_equal(rate.values, [float(gap < epsilon) for gap in gaps])
        assert rate.higher_is_better is False and rate.groups is not None


def test_jaccard_equals_the_slow_one():
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(6, 1, 5, 7, generator=generator)
    maps[3] = 2.0
    masks = torch.rand(6, 1, 5, 7, generator=generator) > 0.6
    found = jaccard(maps, masks, THRESHOLDS)
    slow = [
        [reference.jaccard(m[0].double().tolist(), k[0].tolist(), t) for t in THRESHOLDS]
        for m, k in zip(maps, masks, strict=True)
    ]
    torch.testing.assert_close(found, torch.tensor(slow))
    assert found[3].unique().numel() == 1 and found[3, 0] == masks[3].float().mean()
    masks[0] = False
    assert jaccard(maps, masks, [0.5])[0].isnan()


def test_the_threshold_is_that_of_the_training_images(folder):
    """On test images only the middle of the square is the object: a high threshold would find it, but is not chosen."""
    for i in range(12, 18):
        mask = np.zeros((SIDE, SIDE), np.uint8)
        mask[6:10, 6:10] = 255
        Image.fromarray(mask).save(folder / f"m{i}.png")
    outcome = tasks.perform("segmentation", toy_run(folder, folder), Attends().eval())
    assert outcome.figures["own map"].values.tolist() == [0.25] * 6
    assert outcome.figures["own map"].chance == 1 / 16
    assert "own map 0.05, " in outcome.notices[1]


def test_segmentation_by_hand(folder):
    """The toy attends to exactly the square, which a low threshold finds; chance is the area."""
    model = Attends().eval()
    before = state_of(model)
    outcome = tasks.perform("segmentation", toy_run(folder, folder), model, methods=("saliency", "cam"))
    assert_same_state(before, state_of(model))
    own = outcome.figures["own map"]
    assert own.values.tolist() == [1.0] * 6 and own.chance == 0.25
    assert [*outcome.figures][:2] == ["own map", "own map - best control"]
    assert {"saliency", *CONTROLS, "mean mask"} < set(outcome.figures)
    assert outcome.figures["mean mask"].values.tolist() == [1.0] * 6  # the square is always there
    assert outcome.figures["own map - best control"].values.tolist() == [0.0] * 6
    text = " ".join(outcome.notices)
    assert "The own map is attention." in text and "mean mask is the best control" in text
    assert "cam is left out: expected global average pooling" in text and "on 12 training images" in text
    print(text, {k: f.interval.value for k, f in outcome.figures.items()})


def test_a_network_without_attention_has_its_activation_map(folder):
    run = toy_run(folder, folder)
    torch.manual_seed(0)
    model = create_model("rn164", num_classes=2, depth=20, width=1 / 8).eval()
    outcome = tasks.perform("segmentation", run, model, fields={"mask_values": "255"}, limit=4)
    assert "The own map is activation_map." in outcome.notices
    assert len(outcome.figures["own map"].values) == 4 and outcome.figures["grad_cam"].unit == "images"


class Vectors(nn.Sequential):
    """Two vectors of the colors, and their classifier."""

    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 1), RepresentativeVectors(4, k=2), nn.Linear(8, 2))


def test_chance_and_groups_of_vectors(folder):
    """The most frequent training class is red; of the test images here, two of six are."""
    table = folder / "metadata.csv"
    swap = {"red": "green", "green": "red"}
    lines = [line.split(",") for line in table.read_text().splitlines()]
    lines = [[*c[:1], swap[c[1]], *c[2:]] if c[3] == "test" else c for c in lines]
    table.write_text("\n".join(map(",".join, lines)) + "\n")
    torch.manual_seed(0)
    model = Vectors().eval()
    before = state_of(model)
    outcome = tasks.perform("vectors", toy_run(folder, folder), model)
    assert_same_state(before, state_of(model))
    assert [*outcome.figures] == ["{1,2}", "{1}", "{2}"]
    for figure in outcome.figures.values():
        assert figure.chance == 2 / 6 and figure.groups is not None
        assert len(set(figure.groups.tolist())) == figure.interval.n == 4


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cross_domain", {}, "expected the images to classify, got none; name them by --task.data PATH_OR_NAME"),
        ("cross_domain", {"data": "nowhere"}, "no folder, parquet file or data set 'nowhere'"),
        ("cross_domain", {"data": "DATA", "fields": {"size": 8}}, "expected fields without size, source and streaming"),
        ("cross_domain", {"data": "DATA", "fields": {"groop": "a"}}, "data.groop: no such field in a recipe; did you"),
        ("cross_domain", {"data": "DATA", "fields": "a"}, "task.fields: expected"),
        ("segmentation", {"data": "cifar"}, "expected images with masks or boxes, got cifar without; name others"),
        ("segmentation", {"limit": 0}, "expected a limit of 1 image or more, got 0"),
        (
            "segmentation",
            {"methods": ("grad_kam",)},
            "expected the name of an explainer, got 'grad_kam'; did you mean 'grad_cam'",
        ),
        ("robustness", {"epsilons": ()}, "expected different epsilons of 1 to 255"),
        ("robustness", {"epsilons": (1, 1)}, "expected different epsilons of 1 to 255"),
        (
            "robustness",
            {"epsilons": (0, 1)},
            r"expected different epsilons of 1 to 255 .255ths of black to white.*0, 1",
        ),
        ("robustness", {"limit": 0}, "expected a limit of 1 image or more, got 0"),
    ],
)
def test_bad_input_is_one_clear_line(name, options, message, folder, monkeypatch):
    plain = data.load
    stand_in = {
        split: replace(images, name="cifar").unmarked()
        for split, images in plain(toy_run(folder, folder).recipe.data).items()
    }
    monkeypatch.setattr(data, "load", lambda wanted: stand_in if wanted.source == "cifar" else plain(wanted))
    options = {key: str(folder) if value == "DATA" else value for key, value in options.items()}
    with pytest.raises((ValueError, TypeError, OSError), match=message) as error:
        tasks.perform(name, toy_run(folder, folder), Attends().eval(), **options)
    assert "\n" not in str(error.value)


def test_masks_without_an_object_do_not_count(folder):
    for i in (12, 13):
        Image.fromarray(np.zeros((SIDE, SIDE), np.uint8)).save(folder / f"m{i}.png")
    outcome = tasks.perform("segmentation", toy_run(folder, folder), Attends().eval())
    own = outcome.figures["own map"]
    np.testing.assert_array_equal(own.values, [math.nan] * 2 + [1.0] * 4)
    assert own.chance == 0.25
    for i in range(12):
        Image.fromarray(np.zeros((SIDE, SIDE), np.uint8)).save(folder / f"m{i}.png")
    with pytest.raises(ValueError, match=r"expected a training image of .* with an object and a map, got none"):
        tasks.perform("segmentation", toy_run(folder, folder), Attends().eval())
