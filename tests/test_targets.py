"""Targets of models that are no plain classifiers: values by hand, the pixels they depend on, errors in one line."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from tests.same import close
from torch import nn

import sightline as sl
from sightline.explainers import explain, fitting, occlusion, rise
from sightline.targets import Box, Class, Difference, Region, Similarity, Target, Value
from sightline.testing import LinearModel

COVERED = partial(occlusion, patch=2, stride=2)
MASKS = partial(rise, masks=5, cells=2)


@pytest.fixture
def images():
    return torch.rand(3, 2, 4, 4, generator=torch.Generator().manual_seed(1)) + 0.1


def only(explanation):
    (values,) = explanation.maps.values()
    return values


class Returns(nn.Module):
    """What `make` makes of the images."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, images):
        return self.make(images)


def quadrants(images):
    """Detections at the four quadrants: label 1 with the mean of the first channel, label 2 with half of the second."""
    halves = [slice(0, 2), slice(2, 4)]
    corners = torch.tensor([[2.0 * x, 2.0 * y, 2.0 * x + 2, 2.0 * y + 2] for y in (0, 1) for x in (0, 1)])
    red, green = (
        torch.stack([images[:, channel, rows, columns].mean((1, 2)) for rows in halves for columns in halves], 1)
        for channel in (0, 1)
    )
    return corners, red, green / 2


def detector(images):
    corners, red, green = quadrants(images)
    labels = torch.tensor([1] * 4 + [2] * 4)
    scores = torch.cat([red, green], 1)
    return [
        {"boxes": corners.repeat(2, 1)[s > 0], "labels": labels[s > 0], "scores": s[s > 0]} for s in scores
    ]  # what is covered is not detected


def rows_of_detections(images):
    corners, red, green = quadrants(images)
    return torch.cat([corners.expand(len(images), -1, -1), red[..., None], green[..., None]], 2)


# Value


@pytest.mark.parametrize("shape", ["one each", "a column", "a dict", "of several"])
def test_the_number_of_a_regression_has_the_gradient_of_that_number(shape, images):
    weight = torch.randn(3, 2, 4, 4)
    linear = LinearModel(weight)
    make = {
        "one each": lambda x: linear(x)[:, 1],
        "a column": lambda x: linear(x)[:, 1:2],
        "a dict": lambda x: {"loss": x.sum(), "age": linear(x)[:, 1]},
        "of several": linear,
    }[shape]
    target = Value(1) if shape == "of several" else Value(output="age") if shape == "a dict" else Value()
    explanation = explain(Returns(make), images, target, ["input_x_gradient", "saliency"])
    assert close(explanation["input_x_gradient"], (weight[1] * images).sum(1, keepdim=True))
    assert close(explanation["saliency"], weight[1].abs().amax(0).expand(3, 1, -1, -1))
    assert close(explanation.logits[:, 0], linear(images)[:, 1].detach())
    assert explanation.targets.tolist() == [[-1]] * 3


def test_a_number_is_not_the_logit_of_two_classes(images):
    weight = torch.randn(1, 2, 4, 4)
    model = LinearModel(weight)
    as_logit = explain(model, images, 0, ["input_x_gradient"])["input_x_gradient"]
    assert close(explain(model, images, Value(), ["input_x_gradient"])["input_x_gradient"], -as_logit)


def test_one_of_several_numbers_must_be_selected(images):
    model = LinearModel(torch.ones(3, 2, 4, 4))
    with pytest.raises(ValueError, match=r"an index below 3, got 3 numbers per image; pass Value\(0\)"):
        explain(model, images, Value())
    with pytest.raises(ValueError, match="an index below 3, got index 3 of 3"):
        explain(model, images, Value(3))


# Region

SEGMENTATION = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, -1.0]])  # classes by channels


def segmentation(images):
    return torch.einsum("nc,bchw->bnhw", SEGMENTATION, images)


@pytest.fixture
def halves():
    """The second channel is strong on the left: label 1 there, label 0 on the right."""
    images = torch.ones(2, 2, 4, 4)
    images[:, 1, :, 2:] = 0.25
    return images


@pytest.mark.parametrize("answer", ["a tensor", "torchvision's", "an object", "one of two"])
def test_the_region_is_where_the_network_gives_the_class(answer, halves):
    make = {
        "a tensor": segmentation,
        "torchvision's": lambda x: {"out": segmentation(x), "aux": segmentation(-x)},
        "an object": lambda x: SimpleNamespace(logits=segmentation(x)),
        "one of two": lambda x: (segmentation(-x), segmentation(x)),
    }[answer]
    which = 1 if answer == "one of two" else None
    explanation = explain(Returns(make), halves, Region(1, output=which), ["input_x_gradient"])
    expected = torch.zeros(2, 1, 4, 4)
    expected[..., :2] = 2 / 8
    assert torch.equal(explanation["input_x_gradient"], expected)
    assert explanation.logits.tolist() == [[2.0], [2.0]]
    total = explain(Returns(make), halves, Region(1, reduction="sum", output=which), ["input_x_gradient"])
    assert torch.equal(total["input_x_gradient"], 8 * expected)


def test_a_mask_decides_instead_for_all_images_or_each(halves):
    corner, other = torch.zeros(2, 4, 4, dtype=torch.bool)
    corner[0, 0], other[3, 3] = True, True
    model = Returns(segmentation)
    one = only(explain(model, halves, Region(0, corner), ["saliency"]))
    assert torch.equal(one, corner.float().expand(2, 1, 4, 4))
    each = only(explain(model, halves, Region(0, torch.stack([corner, other])[:, None]), ["saliency"]))
    assert torch.equal(each[:, 0], torch.stack([corner, other]).float())


def test_a_mask_of_pixels_is_averaged_over_coarse_positions():
    scores = torch.tensor([[[[3.0, 5.0]]]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])  # 4 and 1 of 4 pixels
    weights = sl.maps.resize(mask[None, None].float(), (1, 2)).flatten()
    assert weights[0] > 2 * weights[1] > 0
    assert Region(0, mask, "sum")(scores).item() == pytest.approx((weights @ torch.tensor([3.0, 5.0])).item())


def test_a_single_class_counts_where_it_is_above_0():
    scores = torch.tensor([[[[3.0, -5.0], [1.0, 0.0]]]])
    assert Region(0)(scores).item() == 2.0


def test_volumes_have_regions():
    scores = torch.zeros(1, 2, 2, 3, 3)
    scores[:, 1, 0] = 4.0
    assert Region(1)(scores).item() == 4.0
    assert Region(1, torch.ones(2, 3, 3))(scores).item() == 2.0


@pytest.mark.parametrize("method", [COVERED, MASKS], ids=["occlusion", "rise"])
def test_changed_images_are_asked_about_the_region_of_their_own_image(method, halves):
    halves[1] = halves[1].flip(2)
    model = Returns(segmentation)
    found = only(explain(model, halves, Region(1), [method]))
    inside = segmentation(halves).argmax(1) == 1
    for i in range(2):
        fixed = only(explain(model, halves[[i]], lambda out, i=i: out[:, 1, inside[i]].mean(1), [method]))
        assert close(fixed, found[[i]])


@pytest.mark.parametrize(
    "target, message",
    [
        (Region(2), "expected label 2 somewhere in image 0, but the model gives it to no position; pass a mask"),
        (Region(3), r"expected a label in 0\.\.2, got 3"),
        (Region(0, torch.ones(2, 4, 4)), r"expected a mask \(h, w\), or \(2, 1, h, w\) .* got shape \(2, 4, 4\)"),
        (Region(0, torch.zeros(4, 4)), "expected a mask with at least one position, got an empty one for image 0"),
    ],
    ids=["nowhere", "no such label", "shape", "empty"],
)
def test_regions_that_are_none(target, message, halves):
    with pytest.raises(ValueError, match=message):
        explain(Returns(segmentation), halves, target, ["saliency"])


@pytest.mark.parametrize("value", [-1.0, torch.nan, torch.inf])
def test_masks_of_negative_or_undefined_weights_are_refused(value):
    with pytest.raises(ValueError, match="expected a mask of weights from 0 to 1, got negative or non-finite ones"):
        Region(0, torch.tensor([[1.0, value]]))


def test_other_reductions_are_refused(unchecked):
    with pytest.raises(ValueError, match="expected reduction= 'mean' or 'sum', got 'max'"):
        Region(1, reduction="max")  # pyright: ignore[reportArgumentType]


# Box


@pytest.mark.parametrize("make", [detector, rows_of_detections], ids=["dicts", "rows"])
def test_a_box_depends_on_the_pixels_of_its_detection(make, images):
    label = 1 if make is detector else 0
    model = Returns(make)
    for box, rows, columns in (([0, 0, 2, 2], slice(0, 2), slice(0, 2)), ([2, 2, 4, 4], slice(2, 4), slice(2, 4))):
        explanation = explain(model, images, Box(box, label), ["saliency", COVERED])
        expected = torch.zeros(3, 1, 4, 4)
        expected[..., rows, columns] = 1 / 4
        assert torch.equal(explanation["saliency"], expected)
        covered = list(explanation.maps.values())[1]
        assert close(covered[..., rows, columns].mean((1, 2, 3)), images[:, 0, rows, columns].mean((1, 2)))
        assert covered.count_nonzero() == 3 * 4


def test_the_score_is_the_largest_product_of_overlap_and_score():
    images = torch.full((1, 2, 4, 4), 0.5)
    images[:, :, :2, 2:] = 1.0
    found = detector(images)
    assert Box([0, 0, 4, 2], 1)(found).item() == pytest.approx(0.5 * 1.0)  # half of the box is the better detection
    assert Box([1, 0, 2, 2], 1)(found).item() == pytest.approx(0.5 * 0.5)
    assert Box([0, 0, 2, 2], 2)(found).item() == pytest.approx(0.25)
    assert Box([0, 0, 2, 2])(found).item() == pytest.approx(0.5)
    assert Box([0, 0, 2, 2])(rows_of_detections(images)).item() == pytest.approx(0.5)
    assert Box([8, 8, 9, 9])(found).item() == 0.0
    assert Box([0, 0, 2, 2])([{key: value[:0] for key, value in found[0].items()}]).item() == 0.0


@pytest.mark.parametrize("method", [COVERED, MASKS], ids=["occlusion", "rise"])
def test_each_image_may_have_its_own_box(method, images):
    boxes = torch.tensor([[0, 0, 2, 2], [2, 0, 4, 2], [2, 2, 4, 4]])
    model = Returns(detector)
    found = only(explain(model, images, Box(boxes, 1), [method]))
    for i in range(3):
        assert close(only(explain(model, images[[i]], Box(boxes[i], 1), [method])), found[[i]])
    assert fitting(model, images, ["saliency"], Box(boxes, 1))[0] == ["saliency"]


def test_detections_of_another_form_are_made_by_output(images):
    model = Returns(lambda x: rows_of_detections(x).mT)  # (b, 4 + classes, n)
    found = explain(model, images, Box([0, 0, 2, 2], 0, output=lambda out: out.mT), ["saliency"])
    assert torch.equal(
        found["saliency"], explain(Returns(detector), images, Box([0, 0, 2, 2], 1), ["saliency"])["saliency"]
    )


@pytest.mark.parametrize(
    "make, target, error, message",
    [
        (
            detector,
            Box([8, 8, 9, 9], 1),
            ValueError,
            r"at the box \[8, 8, 9, 9\], got none in image 0 of this label with an IoU of 0\.1 or more \(best: 0\)",
        ),
        (detector, Box([0.0, 0.0, 0.1, 0.2]), ValueError, r"of any label with an IoU of 0\.1 or more \(best: 0\.005\)"),
        (detector, Box([0, 0, 2, 2], 7), ValueError, r"\[0, 0, 2, 2\], got none in image 0 of this label"),
        (detector, Box(torch.tensor([[0, 0, 2, 2]] * 2)), ValueError, "one for each of 3 images, got 2; pass as many"),
        (rows_of_detections, Box([0, 0, 2, 2], 2), ValueError, r"expected a label in 0\.\.1, got 2"),
        (segmentation, Box([0, 0, 2, 2]), TypeError, r"expected detections, .* got a tensor \(3, 3, 4, 4\); make them"),
    ],
    ids=["elsewhere", "other units", "label", "number", "row", "no detections"],
)
def test_boxes_without_detections(make, target, error, message, images):
    with pytest.raises(error, match=message) as caught:
        explain(Returns(make), images, target, ["saliency"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", ["boxes", "scores", "labels"])
def test_detections_that_lack_a_field(missing):
    found = {"boxes": torch.tensor([[0.0, 0, 2, 2]]), "scores": torch.ones(1), "labels": torch.ones(1)}
    del found[missing]
    with pytest.raises(TypeError, match="expected detections, a list of dicts with boxes, scores and labels"):
        Box([0, 0, 2, 2], 1)([found])
    if missing == "labels":
        assert Box([0, 0, 2, 2])([found]).tolist() == [1]


@pytest.mark.parametrize(
    "box",
    [[0, 0, 0, 2], [2, 0, 0, 2], [0, 0, 2], "0, 0, 2, 2", [0, 0, float("nan"), 2]],
    ids=["flat", "reversed", "three", "text", "undefined"],
)
def test_corners_are_in_order(box, unchecked):
    with pytest.raises(ValueError, match=r"expected a box \(x_min, y_min, x_max, y_max\) with a positive area"):
        Box(box)


# Similarity


def test_the_similarity_is_the_cosine_and_depends_on_what_the_embedding_has(images):
    embed = LinearModel(torch.eye(2)[:, :, None, None].expand(2, 2, 4, 4).contiguous())  # sums of the two channels
    wanted = torch.tensor([1.0, 0.0])
    explanation = explain(embed, images, Similarity(wanted), ["saliency"])
    red, green = images.sum((2, 3)).unbind(1)
    assert close(explanation.logits[:, 0], red / (red**2 + green**2).sqrt())
    gradient = torch.maximum(green**2, red * green) / (red**2 + green**2) ** 1.5
    assert close(explanation["saliency"], gradient[:, None, None, None].expand(3, 1, 4, 4))


@pytest.mark.parametrize("method", [COVERED, MASKS], ids=["occlusion", "rise"])
def test_each_image_may_have_its_own_partner(method, images):
    model = LinearModel(torch.randn(5, 2, 4, 4))
    partners = torch.randn(3, 5)
    found = only(explain(model, images, Similarity(partners), [method]))
    for i in range(3):
        assert close(only(explain(model, images[[i]], Similarity(partners[i]), [method])), found[[i]])


def test_an_embedding_of_another_length(images):
    with pytest.raises(ValueError, match=r"expected an embedding \(5,\), or \(3, 5\) .* got \(4,\); take it from"):
        explain(LinearModel(torch.randn(5, 2, 4, 4)), images, Similarity(torch.zeros(4)))


def test_arrays_and_names_are_refused(unchecked):
    array = torch.ones(2, 2).numpy()
    for make, message in (
        (lambda: Region(1, array), "expected mask= as a tensor, got ndarray; torch.from_numpy makes one"),
        (lambda: Similarity(array), "expected embedding= as a tensor, got ndarray"),
        (lambda: Region("cat"), "label"),
        (lambda: Box([0, 0, 1, 1], "cat"), "label"),
        (lambda: Value("age"), "index"),
    ):
        with pytest.raises(TypeError, match=message):
            make()


# What is shown


def test_the_explanation_says_what_was_explained(images):
    model = LinearModel(torch.ones(3, 2, 4, 4))
    explanation = explain(model, images, Value(1), ["saliency"])
    assert explanation.target == "Value(index=1)"
    assert repr(explanation) == "Explanation(saliency (3, 1, 4, 4) of Value(index=1))"
    assert explain(model, images, 1, ["saliency"]).target == ""

    def difference(logits):
        return logits[:, 0] - logits[:, 1]

    assert explain(model, images, difference, ["saliency"]).target == "difference"


def test_targets_are_readable():
    assert repr(Region(2, torch.ones(4, 4), "sum")) == "Region(label=2, mask=a tensor (4, 4), reduction='sum')"
    assert repr(Box([0, 0, 2.5, 2], label=1)) == "Box(box=[0, 0, 2.5, 2], label=1)"
    assert repr(Box(torch.tensor([0.0, 0, 1 / 3, 2]))) == "Box(box=[0, 0, 0.3333, 2])"
    assert repr(Box([0, 0, 1, 1], output=detector)) == "Box(box=[0, 0, 1, 1], output=detector)"
    assert repr(Similarity(torch.zeros(512), output="image_embeds")) == (
        "Similarity(embedding=a tensor (512,), output='image_embeds')"
    )
    assert all(issubclass(getattr(sl.targets, name), Target) for name in sl.targets.__all__)


@pytest.mark.parametrize(
    "make, message",
    [
        (detector, r"got detections; explain one of them by targets=sl\.targets\.Box\(\.\.\.\)"),
        (
            segmentation,
            r"got scores of shape \(3, 3, 4, 4\); explain a class .* targets=sl\.targets\.Region",
        ),
        (lambda x: {"out": segmentation(x)}, r"got scores of shape \(3, 3, 4, 4\); explain a class in a region"),
    ],
    ids=["detector", "segmentation", "torchvision"],
)
def test_who_passes_no_target_is_told_which(make, message, images):
    with pytest.raises(TypeError, match=message):
        explain(Returns(make), images, methods=["saliency"])


class Padding(nn.Module):
    """Copies its images into a padded batch, as torchvision's detectors do."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)

    def forward(self, images):
        weight = images.flatten(2).mean(2).amax()
        batch = images.new_full((len(images), 2, 6, 6), 0)
        for i in range(len(images)):
            batch[i, :, :4, :4].copy_(weight * images[i])
        return self.conv(batch).mean((2, 3))


def test_where_the_layer_cannot_be_found_it_must_be_named(images):
    model = Padding()
    with pytest.raises(ValueError, match="expected layer= for Padding, whose forward writes into views"):
        explain(model, images)
    assert explain(model, images, layer="conv")["grad_cam"].shape == (3, 1, 4, 4)


def test_a_difference_has_the_difference_of_the_maps(images):
    model = Returns(lambda x: torch.stack([x[:, :, :2].flatten(1).sum(1), x[:, 1].square().flatten(1).sum(1)], 1))
    one, two = (only(explain(model, images, Class(label), ["input_x_gradient"])) for label in (0, 1))
    explanation = explain(model, images, Difference(0, 1), ["input_x_gradient"])
    assert close(only(explanation), one - two) and explanation.target == "Difference(one=0, other=1)"
    assert close(explanation.logits[:, 0], model(images)[:, 0] - model(images)[:, 1])
    with pytest.raises(ValueError, match=r"expected a label in 0\.\.1, got 2; the model has no other class"):
        explain(model, images, Difference(0, 2), ["input_x_gradient"])


@pytest.mark.parametrize("method", [COVERED, MASKS], ids=["occlusion", "rise"])
def test_both_parts_of_a_difference_follow_their_image(method, images):
    embeddings = torch.rand(3, 2, generator=torch.Generator().manual_seed(2))
    model = Returns(lambda x: x.flatten(2).mean(2))
    target = Difference(Similarity(embeddings), Similarity(embeddings.flip(1)))
    whole = only(explain(model, images, target, [method]))
    for row in range(3):
        alone = Difference(Similarity(embeddings[row]), Similarity(embeddings[row].flip(0)))
        assert close(whole[[row]], only(explain(model, images[[row]], alone, [method])))


def test_the_region_of_a_segmentation_network_has_no_gradient_elsewhere():
    from torchvision.models import segmentation

    torch.manual_seed(0)
    model = segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3).eval()
    mask = torch.zeros(64, 64)
    mask[:16, :16] = 1
    explanation = explain(
        model, torch.rand(1, 3, 64, 64), Region(1, mask), ["hires_cam"], layer="classifier.high_classifier"
    )
    values = explanation["hires_cam"]
    assert values.shape == (1, 1, 8, 8)
    assert values[..., :2, :2].all() and not values[..., 3:, :].any() and not values[..., 3:].any()


def test_two_texts_of_clip():
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = CLIPVisionConfig(image_size=32, patch_size=8, projection_dim=8, **small)
    tower, images = CLIPVisionModelWithProjection(config).eval(), torch.rand(2, 3, 32, 32)
    texts = [Similarity(torch.rand(8), output="image_embeds") for _ in range(2)]
    one, two = (explain(tower, images, text, ["hires_cam"]) for text in texts)
    both = explain(tower, images, Difference(*texts), ["hires_cam"])
    assert both["hires_cam"].any() and close(both["hires_cam"], one["hires_cam"] - two["hires_cam"])
    assert close(both.logits, one.logits - two.logits)
    assert both.target.startswith("Difference(one=Similarity(embedding=a tensor (8,), output='image_embeds'), other=")
