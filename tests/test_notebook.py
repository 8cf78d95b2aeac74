"""Pictures of explanations, and how results show themselves in a notebook and elsewhere."""

import io
import re
from base64 import b64decode
from dataclasses import fields, is_dataclass, replace
from html import escape
from importlib import import_module
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
import tqdm.auto
from PIL import Image
from torch import nn

import sightline as sl
from sightline import bench, maps, notebook
from sightline.bench.measured import Maps, MeasuredRun
from sightline.data import Preprocess
from sightline.evaluation import Evaluation
from sightline.evaluation.result import Example
from sightline.explainers.drawing import heading_of, sized
from sightline.facts import words
from sightline.targets import Value
from sightline.tasks import Figure, Outcome
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
    saved = drawn(explanation, tmp_path / "maps.png").float()
    assert (torch.from_numpy(np.array(images[0])).movedim(-1, 0) - saved).abs().mean() < 3  # it is a JPEG


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
    for rows, message in (([10], "out of 0..9, got 10"), ([-1], "out of 0..9, got -1"), ([], "got none")):
        for name in ("c.png", "c.npz"):
            with pytest.raises(ValueError, match=f"expected .* {message}; count them from 0"):
                explanation.save(tmp_path / name, rows)


def test_a_picture_too_tall_for_a_jpeg_is_shown_in_parts():
    count = 1 + 65_000 // shown(explained()._repr_html_())[0][0].height
    pictures, texts = shown(explained(2)._html([0, 1] * ((count + 1) // 2)))
    assert len(pictures) == len(texts) == 2 and pictures[0].height == 65_000 and texts[0] and not texts[1]


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


def parts_of(kind):
    return [kind] if isinstance(kind, type) else [part for each in get_args(kind) for part in parts_of(each)]


def returned(function):
    try:
        return get_type_hints(function).get("return")
    except NameError:  # a library that is imported for its types alone
        return None


def results():
    """The dataclasses that public functions return, and those in their fields."""
    names = "attention bench data evaluation explainers exporting hub maps metrics models recipe report runs sight"
    modules = [import_module(f"sightline.{name}") for name in [*names.split(), "targets", "tasks", "training"]]
    waiting = []
    for module in modules:
        for name in getattr(module, "__all__", [name for name in vars(module) if not name.startswith("_")]):
            value = getattr(module, name)
            if getattr(value, "__module__", "").startswith("sightline"):
                waiting += [value] if isinstance(value, type) else parts_of(returned(value))
    found = {}
    while waiting:
        kind = waiting.pop()
        if kind not in found and is_dataclass(kind) and kind.__module__.startswith("sightline"):
            found[kind] = [part for hint in get_type_hints(kind).values() for part in parts_of(hint)]
            waiting += found[kind]
    return found


def prints_all(kind):
    code = getattr(getattr(kind.__repr__, "__wrapped__", None), "__code__", None)
    return code is not None and code.co_filename == "<string>"  # as dataclasses writes it


def test_no_result_prints_its_tensors():
    kinds = results()
    assert {sl.explainers.Explanation, Evaluation, bench.Bench, Outcome, sl.data.ImageSet, Example} <= kinds.keys()
    arrays = [k for k, parts in kinds.items() if any(hasattr(part, "array_type") for part in parts)]
    assert len(arrays) > 8 and [kind.__name__ for kind in arrays if prints_all(kind)] == []


def nested(value):
    """A result and the dataclasses in it."""
    if is_dataclass(value):
        yield value
        value = [getattr(value, field.name) for field in fields(value)]
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ():
        yield from nested(each)


@pytest.fixture(scope="module")
def evaluation():
    """Forty images of <classes>, some metrics."""
    images = torch.eye(3)[torch.arange(40) % 3][:, :, None, None].expand(-1, 3, 4, 4) + torch.rand(40, 3, 4, 4)
    data = [(images, torch.arange(40) % 3, torch.ones(40, 1, 4, 4) > 0)]
    metrics = ["insertion_auc", "deletion_auc", "energy_in_mask", "sparsity"]
    return sl.evaluate(MODEL, data, ["grad_cam", "saliency"], metrics, name="<b>colors</b>")


def test_an_evaluation_is_a_few_lines(evaluation):
    lines = repr(evaluation).splitlines()
    assert lines[0] == "Evaluation of PooledModel on <b>colors</b>, 40 images: 2 methods and 4 controls by 4 metrics"
    best = evaluation.standings["insertion_auc"].best
    assert lines[1].startswith(f"  best in insertion: {words(best)} {evaluation.score(best, 'insertion_auc').interval}")
    assert len(lines) == 1 + len(evaluation.standings) and len(repr(evaluation)) < 1000
    long = [(type(part).__name__, len(repr(part))) for part in nested(evaluation) if part is not evaluation]
    assert [each for each in long if each[1] > 500] == []


def test_an_evaluation_is_a_table_in_a_notebook(evaluation):
    html = evaluation._repr_html_()
    assert "<b>colors" not in html and "&lt;b&gt;colors&lt;/b&gt;, 40 images" in html
    interval = evaluation.score("saliency", "energy_in_mask").interval
    assert re.search(f">saliency</th>.*?>{re.escape(str(interval))}<", html)
    assert html.count("<tr>") == 1 + 6 + 1 and "random_map (control)" in html and ">chance<" in html
    assert "energy_in_mask ↑" in html and "deletion_auc ↓" in html
    assert all(escape(sentence) in html for sentence in evaluation.summary)


def test_outcomes_and_pages_are_short(tmp_path):
    hits = Figure(values=np.array([0.0, 1.0, 1.0, 1.0] * 500), unit="queries", chance=0.1)
    outcome = Outcome(task="<i>retrieval</i>", figures={"rank-1": hits}, names={}, notices=("a < b",))
    assert repr(outcome) == f"Outcome of <i>retrieval</i>:\n  rank-1: {hits.interval} over 2,000 queries"
    assert repr(hits) == "Figure(values=float64 (2000,), unit='queries', chance=0.1)"
    html = outcome._repr_html_()
    assert "&lt;i&gt;retrieval" in html and f">{hits.interval.value:.3f}<" in html and "<li>A &lt; b</li>" in html
    pages = sl.report.pages(MODEL, pixels(9), tmp_path, ["grad_cam", "random_map"], preprocess=PREPROCESS)
    assert repr(pages).startswith(f"Pages: 9 images x 2 methods in {tmp_path}; ") and len(repr(pages).splitlines()) == 2


def test_a_study_is_short_and_a_table(tmp_path):
    def run(row, seed, accuracy):
        maps = Maps(energy={}, sparsity={}, activation_energy=0.5, similarity=0.1)
        facts = {"majority": 0.1, "area": 0.1, "parameters": 7, "seconds": 1.0, "before": maps, "after": maps}
        return MeasuredRun(row=row, seed=seed, accuracy=accuracy, **facts)

    runs = tuple(run(row, seed, a + seed / 100) for row, a in (("plain", 0.5), ("<se>", 0.7)) for seed in range(3))
    study = bench.Bench(control="plain", rows=("plain", "<se>"), measured=runs, failed={"<se>, 3": "no <memory>"})
    assert repr(study).splitlines() == [
        "Bench of 2 networks: 6 runs, 1 failed",
        "  most accurate <se> 71.0 ± 1.0 %; control plain 51.0 ± 1.0 %",
    ]
    html = study._repr_html_()
    assert "<se>" not in html and ">71.0 ± 1.0<" in html and "Failed: &lt;se&gt;, 3: no &lt;memory&gt;" in html
    assert all(escape(sentence) in html for sentence in study.sentences())


def test_recipes_show_what_differs_from_the_defaults():
    recipe = sl.recipe.load(sl.recipe.Recipe(), {"optim.epochs": 3, "data.source": "photos"})
    assert repr(sl.recipe.Recipe()) == "Recipe()"
    assert repr(recipe) == "Recipe(data=Data(source='photos'), optim=Optim(epochs=3))"


def test_a_bar_counts_and_closes(monkeypatch):
    shown, descriptions = [], []

    class Recorded(tqdm.auto.tqdm):
        def set_description(self, desc, **more):
            descriptions.append(desc)
            super().set_description(desc, **more)

        def close(self):
            if not self.disable:
                shown.append((self.desc, self.n, self.total))
            super().close()

    monkeypatch.setattr("tqdm.auto.tqdm", Recorded)
    explained(methods=["occlusion"], progress=True)
    assert len(shown) == 1 and shown[0][1] == shown[0][2] > 0 and shown[0][0] == "occlusion: "
    called = []
    explained(methods=["occlusion"], progress=lambda *told: called.append(told))
    assert called[-1] == ("occlusion", *shown[0][1:]) and len(shown) == 1
    explained(methods=["occlusion"], progress=False)
    show = notebook.bar_of(True)
    for told in (("outer", 0, 2), ("inner", 0, 9), ("inner", 9, 9), ("outer", 1, 2), ("inner", 4, 9)):
        show(*told)
    assert len(shown) == 1, "it is the same bar until all is done"
    show("inner", 9, 9)
    assert descriptions[-1] == "outer (1 of 2); inner"
    show("outer", 2, 2)
    assert shown[1:] == [("outer: ", 2, 2)]
    sl.evaluate(MODEL, pixels_of_colors(), ["grad_cam"], ["sparsity"], controls=[], progress=True)
    assert shown[-1] == ("explaining and scoring: ", 6, 6)


def pixels_of_colors():
    return [(torch.eye(3)[torch.arange(6) % 3][:, :, None, None].expand(-1, 3, 4, 4), torch.arange(6) % 3)]


def test_volumes_are_shown_as_slices(tmp_path):
    explanation = sl.explain(Volumes(), torch.rand(1, 1, 5, 4, 4), methods=["grad_cam"])
    depth = torch.arange(5.0)[None, None, :, None, None].expand(1, 1, 5, 4, 4)
    figure = drawn(replace(explanation, maps={"grad_cam": depth}), tmp_path / "maps.png")
    expected = maps.color(torch.arange(5.0)[None] / 4)[:, 0]
    centers = figure[:, :, [12 + 90 * i + 45 for i in range(5)]]
    assert any(torch.equal(centers[:, row], expected) for row in range(figure.shape[1]))
    assert figure.shape[2] == 448 + 24
