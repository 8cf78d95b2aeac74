"""Pictures of explanations, and how results show themselves in a notebook and elsewhere."""

import io
import re
from base64 import b64decode
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import sightline as sl
from sightline import maps, notebook
from sightline.data import Preprocess
from sightline.explainers.drawing import heading_of, sized
from sightline.targets import Value
from sightline.testing import PooledModel

MODEL = PooledModel(torch.eye(3))
MODEL.classes = ["cat", "<b>dog</b>", "newt"]
PREPROCESS = Preprocess(size=(32, 32), mean=(0.5,) * 3, std=(0.2,) * 3)


def pixels(count, height=32, width=32, seed=0):
    return torch.randint(0, 256, (count, 3, height, width), generator=torch.Generator().manual_seed(seed)).byte()


def explained(count=1, methods=("grad_cam", "random_map"), **more):
    return sl.explain(MODEL, pixels(count), methods=methods, preprocess=PREPROCESS, **more)


def drawn(explanation, file, **options):
    with Image.open(explanation.save(file, **options)) as image:
        return torch.from_numpy(np.array(image)).movedim(-1, 0)


def shown(html):
    """The pictures in HTML, and their texts."""
    images = [Image.open(io.BytesIO(b64decode(code))) for code in re.findall(r"base64,([^\"]+)", html)]
    return images, re.findall(r'alt="([^"]*)"', html)


def test_a_picture_shows_the_map_over_its_image(tmp_path):
    explanation = explained()
    figure = drawn(explanation, tmp_path / "maps.png")
    expected = maps.overlay(sized(explanation.images[0], 224)[None], explanation["grad_cam"])[0, 0]
    height, width = expected.shape[1:]
    columns = figure[:, :, 12 + 228 : 12 + 228 + width]
    tops = [top for top in range(figure.shape[1] - height) if torch.equal(columns[:, top : top + height], expected)]
    assert len(tops) == 1
    image = figure[:, tops[0] : tops[0] + height, 12 : 12 + width]
    assert torch.equal(image, sized(explanation.images[0], 224))
    assert figure.shape[2] == 3 * 228 - 4 + 2 * 12
    assert (figure[:, :12] == 255).all() and (figure[:, -12:] == 255).all()


def test_the_words_say_what_is_explained_and_what_to_distrust():
    explanation = explained(methods=["grad_cam", "activation_map", "random_map"], targets=1)
    alt = shown(explanation._repr_html_())[1][0]
    assert alt.startswith("explained: &lt;b&gt;dog&lt;/b&gt; (")
    assert "Grad-CAM: features, 32 x 32 positions" in alt and "control: random map" in alt
    assert "activation map: features, 32 x 32 positions, class-independent" in alt
    percent = 100 * explanation.probabilities[0, 1].item()
    assert heading_of(explanation, 0, 0) == f"explained: <b>dog</b> ({percent:.1f} %), the prediction"


def test_html_shows_the_picture_that_is_saved(tmp_path):
    explanation = explained(3)
    images, _ = shown(explanation._repr_html_())
    assert torch.equal(torch.from_numpy(np.array(images[0])).movedim(-1, 0), drawn(explanation, tmp_path / "maps.png"))


def test_many_images_are_shown_in_part_and_saved_whole(tmp_path):
    explanation = explained(10)
    html = explanation._repr_html_()
    (image,), _ = shown(html)
    rows = image.height // 8
    assert image.height == 8 * rows and "These are 8 of 10 images" in html
    assert drawn(explanation, tmp_path / "a.png").shape[1] == 10 * rows
    assert drawn(explanation, tmp_path / "b.png", rows=[9, 2]).shape[1] == 2 * rows
    with pytest.raises(ValueError, match=r"expected images out of 0..9, got 10; count them from 0"):
        explanation.show([10]) if notebook.in_notebook() else explanation.save(tmp_path / "c.png", [10])


@pytest.mark.parametrize("missing", ["file", "half"])
def test_a_file_is_the_old_or_the_new_one(tmp_path, monkeypatch, missing):
    path, explanation = tmp_path / "maps.png", explained()
    path.write_bytes(b"old")

    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync" if missing == "half" else "os.replace", full)
    with pytest.raises(OSError, match="disk full"):
        explanation.save(path)
    assert path.read_bytes() == b"old" and [*tmp_path.iterdir()] == [path]


def test_raw_maps_are_those_of_the_command_line(tmp_path):
    Image.fromarray(pixels(1, 40, 30)[0].movedim(0, -1).numpy()).save(tmp_path / "cat.png")
    methods = ["grad_cam", "saliency", "random_map"]
    explanation = sl.explain(MODEL, tmp_path / "cat.png", methods=methods, preprocess=PREPROCESS)
    sl.report.pages(MODEL, tmp_path / "cat.png", tmp_path / "out", methods, preprocess=PREPROCESS)
    ours, theirs = np.load(explanation.save(tmp_path / "ours.npz")), np.load(tmp_path / "out" / "cat.npz")
    assert sorted(ours) == sorted(theirs) == sorted(methods)
    assert all(np.array_equal(ours[name], theirs[name]) for name in methods)
    several = np.load(explained(3).save(tmp_path / "several.NPZ", rows=[0, 2]))
    assert several["grad_cam"].shape == (2, 1, 32, 32)
    assert np.array_equal(several["grad_cam"], explained(3)["grad_cam"][[0, 2]].numpy())


def test_other_endings_and_unknown_captions_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"ends in .png or .npz, got .*maps.jpg; choose one"):
        explained().save(tmp_path / "maps.jpg")
    with pytest.raises(ValueError, match="expected captions of maps out of grad_cam, random_map; got 'cam'"):
        explained().save(tmp_path / "maps.png", captions={"cam": "x"})
    assert not [*tmp_path.iterdir()]


def test_captions_are_added(tmp_path):
    plain, more = (drawn(explained(), tmp_path / "a.png", captions=c) for c in (None, {"grad_cam": "two\nlines"}))
    assert more.shape[1] > plain.shape[1]


class Volumes(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Conv3d(1, 2, 3, padding=1)

    def forward(self, volumes):
        return self.features(volumes).relu().mean((2, 3, 4))


@pytest.mark.parametrize(
    "explanation",
    [
        lambda: sl.explain(MODEL, torch.rand(1, 3, 8, 8), methods=["grad_cam", "saliency"]),
        lambda: explained(2, targets=torch.tensor([[0, 1], [2, 0]])),
        lambda: explained(2, targets=Value(1)),
        lambda: explained(1, targets=torch.arange(12)[None] % 3),
        lambda: sl.explain(MODEL, torch.full((1, 3, 8, 8), torch.nan), methods=["grad_cam"]),
        lambda: sl.explain(
            PooledModel(torch.eye(3)).double(),
            torch.rand(1, 3, 8, 8).double(),
            methods=["saliency"],
            differentiable=True,
        ),
        lambda: sl.explain(Volumes(), torch.rand(2, 1, 7, 9, 8), methods=["grad_cam", "saliency"]),
        lambda: sl.explain(Volumes(), torch.rand(1, 1, 2, 3, 90), methods=["grad_cam"]),
        lambda: explained(2).resized((500, 400)),
        lambda: sl.explain(nn.Flatten(), torch.rand(1, 3, 1, 1), methods=["saliency"]),
        lambda: sl.explain(MODEL, pixels(1, 3, 90), preprocess=PREPROCESS),
        lambda: replace(explained(1), classes=("\uf8ff",) * 3, names=("\uf8ff.png",)),
    ],
    ids="floats targets function twelve nan double volumes flat resized pixel narrow letters".split(),
)
def test_every_explanation_can_be_shown(explanation, unchecked):
    images, texts = shown(explanation()._repr_html_())
    assert len(images) == len(texts) == 1 and min(images[0].size) > 100 and "explained: " in texts[0]


def test_show_in_a_terminal_says_what_to_do(capsys):
    explained().show()
    assert capsys.readouterr().out.endswith("here, write a file: explanation.save('maps.png')\n")


def test_show_in_a_notebook_shows_the_html(monkeypatch):
    import IPython
    import IPython.display

    displayed = []
    monkeypatch.setattr(IPython, "get_ipython", lambda: type("Shell", (), {"kernel": None})())
    monkeypatch.setattr(IPython.display, "display", displayed.append)
    explanation = explained(2)
    explanation.show()
    explanation.show([1])
    assert displayed[0].data == explanation._repr_html_()
    assert shown(displayed[1].data)[0][0].height == shown(displayed[0].data)[0][0].height // 2
