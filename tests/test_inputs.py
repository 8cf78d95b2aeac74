"""Pictures as a model takes them: files, Pillow's images and pixels give what the command line makes of the files."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import sightline as sl
from sightline import runs
from sightline.data import Preprocess, normalize, read_images
from sightline.inference import classes_of, inputs_of, preprocess_of
from sightline.recipe import Data, Model, Recipe
from sightline.testing import PooledModel

PREPROCESS = Preprocess(size=(24, 16), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
MODEL = PooledModel(torch.eye(3))


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


@pytest.fixture
def files(tmp_path):
    """One file of each kind that is decoded in its own way."""
    pixels, exif = noise(40, 32, 3), Image.Exif()
    exif[0x0112] = 6
    made = {
        "turned.jpg": (Image.fromarray(pixels), {"exif": exif}),
        "turned.tif": (Image.fromarray(pixels), {"exif": exif}),
        "gray.png": (Image.fromarray(pixels[..., 0]), {}),
        "alpha.png": (Image.fromarray(noise(40, 32, 4)), {}),
        "deep.png": (Image.fromarray(256 * pixels[..., 1].astype(np.uint16)), {}),
        "ink.jpg": (Image.fromarray(pixels).convert("CMYK"), {}),
        "palette.gif": (Image.fromarray(pixels).quantize(16), {}),
        "dark.tif": (Image.fromarray(256 * pixels[..., 2].astype(np.uint16)), {"tiffinfo": {262: 0}}),
    }
    for name, (image, options) in made.items():
        image.save(tmp_path / name, **options)
    return sorted(tmp_path / name for name in made)


@pytest.fixture
def opened(files):
    """The same as images of Pillow."""
    images = [Image.open(file) for file in files]
    yield images
    for image in images:
        image.close()


@pytest.mark.parametrize("crop", [None, 0.8])
def test_files_and_images_of_pillow_are_decoded_as_the_command_line_does(files, opened, crop):
    preprocess = replace(PREPROCESS, crop=crop)
    expected = read_images(files, preprocess).batch(range(len(files))).images
    from_files = inputs_of(MODEL, files, preprocess)
    from_pillow = inputs_of(MODEL, opened, preprocess)
    for name, one, other, third in zip(files, expected, from_files.pixels, from_pillow.pixels, strict=True):
        assert torch.equal(one, other), name
        assert torch.equal(one, third), name
    assert torch.equal(from_files.images, normalize(expected, preprocess))
    assert from_files.names == from_pillow.names == tuple(file.name for file in files)
    turned = from_files.shown[from_files.names.index("turned.jpg")]
    assert turned.shape == ((3, 32, 40) if crop is None else (3, 26, 17)), "upright, in its own shape, as far as seen"


def test_one_image_a_folder_and_a_list_are_the_same(files, opened):
    whole = inputs_of(MODEL, files[0].parent, PREPROCESS)
    assert torch.equal(whole.pixels, inputs_of(MODEL, [str(file) for file in files], PREPROCESS).pixels)
    assert torch.equal(whole.pixels[:1], inputs_of(MODEL, files[0], PREPROCESS).pixels)
    assert torch.equal(whole.pixels[:1], inputs_of(MODEL, opened[0], PREPROCESS).pixels)


def test_images_of_pillow_stay_as_they_are_and_may_be_given_often(files, opened):
    image = opened[-2]
    before = image.mode, image.size, dict(image.getexif())
    pixels = inputs_of(MODEL, [image] * 16, PREPROCESS).pixels
    assert (pixels == pixels[:1]).all()
    assert (image.mode, image.size, dict(image.getexif())) == before
    drawn = Image.fromarray(noise(30, 30, 3))
    kept = np.array(drawn)
    assert inputs_of(MODEL, drawn, PREPROCESS).names == ("",)
    assert np.array_equal(kept, np.array(drawn))


def test_pixels_are_only_normalized_and_floats_stay():
    pixels = torch.from_numpy(noise(2, 3, 8, 5))
    inputs = inputs_of(MODEL, pixels, PREPROCESS)
    assert torch.equal(inputs.images, normalize(pixels, PREPROCESS))
    assert inputs.pixels is pixels and torch.equal(torch.stack(inputs.shown), pixels)
    assert inputs_of(MODEL.half(), pixels, PREPROCESS).images.dtype == torch.float16
    MODEL.float()
    images = torch.rand(2, 3, 8, 5)
    assert inputs_of(MODEL, images) == (images, None, (), (), ())


def test_the_model_says_how_and_what_was_guessed_is_told(files):
    model = sl.create_model("test_resnet")
    told = inputs_of(model, files[:1])
    assert told.images.shape == (1, 3, 160, 160)
    assert told.notices == (f"images are {preprocess_of(model)}; preprocess= chooses another way",)
    guessed = inputs_of(MODEL, files[:1])
    assert guessed.images.shape == (1, 3, 224, 224)
    assert "mean and deviation of ImageNet are assumed" in guessed.notices[1]
    model.preprocess = PREPROCESS
    assert inputs_of(nn.DataParallel(model), files[:1])[0].shape == (1, 3, 24, 16)
    assert not inputs_of(model, files[:1]).notices and not inputs_of(MODEL, files[:1], PREPROCESS).notices


def test_names_of_classes():
    model = sl.create_model("test_resnet")
    assert classes_of(model, 1000)[282] == "tiger cat" and classes_of(model, 3) == ()
    model.classes = ["cat", "dog", "newt"]
    assert classes_of(nn.DataParallel(model), 3) == ("cat", "dog", "newt")
    model.classes = 3
    assert classes_of(model, 3) == ()


def test_a_loaded_run_knows_its_images_and_classes(tmp_path):
    options = {"width": 1 / 16, "stem_pool": 2}
    network = sl.create_model("vgg_gap", num_classes=2, **options)
    recipe = Recipe(data=Data(source="clutter"), model=Model(name="vgg_gap", options=options))
    facts = {"seed": 0, "classes": ("cat", "dog"), "preprocess": PREPROCESS, "info": {}, "history": [], "skipped": []}
    runs.save(runs.Run(folder=tmp_path, recipe=recipe, **facts), network.state_dict())
    model = sl.load(tmp_path)
    explanation = sl.explain(model, Image.fromarray(noise(50, 50, 3)))
    assert explanation.classes == ("cat", "dog") and explanation.images[0].shape == (3, 50, 50)
    assert inputs_of(model, Image.fromarray(noise(50, 50, 3))).images.shape == (1, 3, 24, 16)
    assert {"preprocess", "classes"}.isdisjoint(model.state_dict())


def test_explain_and_its_neighbors_take_pictures(files):
    model = sl.create_model("test_resnet", attention="cbam").eval()
    preprocess = replace(PREPROCESS, size=(64, 64))
    normal = normalize(read_images(files, preprocess).batch(range(len(files))).images, preprocess)
    explanation = sl.explain(model, files, methods=["grad_cam"], preprocess=preprocess)
    expected = sl.explain(model, normal, methods=["grad_cam"])
    assert torch.equal(explanation["grad_cam"], expected["grad_cam"])
    assert [*map(torch.Tensor.size, explanation.images)] and not expected.images
    assert explanation.classes[282] == "tiger cat" and explanation.names[0] == "alpha.png"
    assert torch.equal(
        sl.explainers.saliency(model, files, preprocess=preprocess), sl.explainers.saliency(model, normal)
    )
    maps = sl.attention_maps(model, files, preprocess=preprocess), sl.attention_maps(model, normal)
    assert maps[0].keys() == maps[1].keys() and all(torch.equal(maps[0][name], maps[1][name]) for name in maps[0])


def test_evaluate_takes_pictures(files, opened):
    settings = {"methods": ["activation_map"], "metrics": ["sparsity"], "controls": [], "preprocess": PREPROCESS}
    images = read_images(files, PREPROCESS)
    pixels = images.batch(range(len(files))).images
    labels = torch.arange(len(files)) % 3
    expected = sl.evaluate(MODEL, images, **settings | {"preprocess": None})
    for data in (files, files[0].parent, opened, [(pixels, labels)], [(opened, labels)], [{"images": files}]):
        result = sl.evaluate(MODEL, data, **settings)
        assert result.per_image["sparsity/activation_map"] == expected.per_image["sparsity/activation_map"]
        pictures = [[one.image.tolist() for one in each.examples] for each in (result, expected)]
        assert pictures[0] == pictures[1]
    assert result.per_image["name"] == [file.name for file in files]
    with pytest.raises(ValueError, match="expected no preprocess= with an image set"):
        sl.evaluate(MODEL, images, **settings)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(3, 8, 8, dtype=torch.uint8), ValueError, r"uint8 images of shape \(b, 3, h, w\).*images\[None\]"),
        (torch.zeros(1, 8, 8, 3, dtype=torch.uint8), ValueError, r"got \(1, 8, 8, 3\); move the channels"),
        (torch.zeros(3, 8, 8), ValueError, r"expected float images of shape \(b, c, h, w\)"),
        (np.zeros((8, 8, 3), np.uint8), TypeError, "got ndarray; PIL.Image.fromarray makes an image of an array"),
        (
            [np.zeros((8, 8, 3), np.uint8)],
            TypeError,
            "got ndarray in a list; PIL.Image.fromarray makes an image of an array",
        ),
        ([torch.zeros(3, 8, 8)], TypeError, "got Tensor in a list; torch.stack makes one tensor of several"),
        (7, TypeError, "expected paths or Pillow images, one or a list, got int; give one of these"),
        ([], ValueError, "expected at least one image, got an empty list"),
        ("nowhere.jpg", FileNotFoundError, "no file or folder nowhere.jpg"),
    ],
)
def test_other_things_are_refused_in_one_line(images, error, message, unchecked):
    with pytest.raises(error, match=message) as raised:
        sl.explain(MODEL, images)
    assert "\n" not in str(raised.value)


def test_image_sets_are_read_from_paths(opened, unchecked):
    with pytest.raises(TypeError, match="expected paths, got an image that Pillow has opened"):
        read_images(opened, PREPROCESS)


def test_pictures_are_kept_as_they_were_explained():
    given = torch.from_numpy(noise(1, 3, 24, 16))
    explanation, before = sl.explain(MODEL, given, preprocess=PREPROCESS), given.clone()
    given.zero_()
    assert torch.equal(explanation.images[0], before[0])


def test_a_large_file_is_refused_without_naming_a_recipe(tmp_path, monkeypatch):
    monkeypatch.setattr("sightline.inference.inputs.MAX_PIXELS", 100)
    Image.fromarray(noise(64, 64, 3)).save(tmp_path / "large.png")
    with pytest.raises(ValueError, match=r"large.png: expected at most 100 pixels .*; scale it down$"):
        sl.explain(MODEL, tmp_path / "large.png")


def test_broken_files_and_a_useless_preprocess_are_refused(tmp_path, unchecked):
    broken = tmp_path / "broken.jpg"
    Image.fromarray(noise(64, 64, 3)).save(broken)
    broken.write_bytes(broken.read_bytes()[:900])
    with pytest.raises(ValueError, match=r"broken.jpg: .*truncated"):
        sl.explain(MODEL, [broken])
    with Image.open(broken) as image, pytest.raises(ValueError, match=r"broken.jpg: .*truncated"):
        sl.explain(MODEL, image)
    with pytest.raises(ValueError, match="expected no preprocess= with float images"):
        sl.explain(MODEL, torch.zeros(1, 3, 8, 8), preprocess=PREPROCESS)


def test_single_paths_and_open_images_are_understood_everywhere(files, opened):
    assert len(read_images(str(files[0]), PREPROCESS)) == 1
    out = files[0].parent / "drawn"
    pages = sl.report.pages(MODEL, [opened[0], Image.new("L", (9, 9))], out, preprocess=PREPROCESS)
    assert [row["image"] for row in pages.rows] == [str(files[0]), "image-1"]
    assert len(sl.report.pages(MODEL, str(files[0]), Path(files[0].parent, "out"), preprocess=PREPROCESS).rows) == 1
