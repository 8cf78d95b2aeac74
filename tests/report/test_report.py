import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from PIL import Image

from sightline import report, runs
from sightline.evaluation import Evaluation, Interval, evaluate
from sightline.report import pictures, tables
from sightline.testing import PooledModel

EVIL = "<script>alert('x')</script> \"quoted\" & </style>"
LONG = "rectifiers intercepted: 3 of 49 activations, 40 silu, 6 hardswish are not"
VOID = {"meta", "link", "br", "img", "input"}


class Page(HTMLParser):
    """Every element with its attributes and text; nesting errors are failures."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[dict[str, Any]] = []
        self.open: list[dict[str, Any]] = []
        self.feed(html)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_data(" ")
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names), f"attribute given twice in <{tag} {names}>"
        element = {"tag": tag, "text": "", "parent": self.open[-1] if self.open else None, **dict(attrs)}
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()["tag"] == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element["text"] += data

    def all(self, *tags: str) -> list[dict[str, Any]]:
        return [element for element in self.elements if element["tag"] in tags]

    def with_class(self, name: str) -> list[dict[str, Any]]:
        return [element for element in self.elements if name in (element.get("class") or "").split()]

    def text_of(self, key: str) -> str:
        (element,) = (element for element in self.elements if element.get("id") == key)
        return " ".join(element["text"].split())


@pytest.fixture(scope="module")
def html(evaluation: Evaluation, run: runs.Run, tmp_path_factory: pytest.TempPathFactory) -> str:
    return report.write(evaluation, tmp_path_factory.mktemp("report"), run).read_text()


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def pixels(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))


def test_the_file_needs_nothing_but_itself(html: str, page: Page):
    policy = next(meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'")
    for element in page.elements:
        for name in ("src", "href"):
            assert re.match("data:|#", element.get(name) or "#"), element
    assert not re.search(r"https?://|@import|url\(", html)


def test_structure_for_a_screen_reader(page: Page):
    assert page.all("html")[0]["lang"] == "en"
    ids = [element["id"] for element in page.elements if "id" in element]
    assert len(set(ids)) == len(ids)
    for element in page.elements:
        for name in ("aria-labelledby", "aria-describedby", "for"):
            assert set((element.get(name) or "").split()) <= set(ids), element
        if (element.get("href") or "").startswith("#"):
            assert element["href"][1:] in ids
    levels = [int(element["tag"][1]) for element in page.all("h1", "h2", "h3", "h4")]
    assert levels.count(1) == 1 and levels[0] == 1 and max(np.diff(levels)) <= 1
    assert all(element["alt"] for element in page.all("img"))
    for svg in page.all("svg"):
        hidden = svg.get("aria-hidden") or (svg["parent"] or {}).get("aria-hidden")
        assert hidden == "true" or (svg["role"] == "img" and (svg.get("aria-label") or svg.get("aria-labelledby")))
    assert all(header.get("scope") for header in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table"))
    for box in page.all("input"):
        assert box["parent"]["tag"] == "label" and box["parent"]["text"].strip()
    assert page.all("a")[0]["class"] == "skip"


def test_title_verdict_and_summary(page: Page, evaluation: Evaluation):
    assert page.all("h1")[0]["text"].strip() == "Where vgg_att2 looks on clutter"
    (verdict,) = page.with_class("verdict")
    assert verdict["text"] == evaluation.summary[0]
    assert all(sentence in page.text_of("summary") for sentence in evaluation.summary[1:])
    assert "400 images of the split “test”, maps of 250 of them · 10 classes" in page.all("header")[0]["text"]
    assert evaluation.summary[0] not in page.text_of("summary")


def test_accuracy_beside_majority_and_chance(page: Page):
    text = page.text_of("accuracy")
    assert "97.2 % of the labelled images" in text and "interval 95.3 % to 98.6 %, from 400 images." in text
    assert "Always the most frequent class 11.8 %" in text and "Chance, all 10 classes alike 10.0 %" in text


def test_every_score_stands_in_its_cell(page: Page, evaluation: Evaluation):
    rows = [row for row in page.all("tr") if "★" not in row["text"] and "[" in row["text"]]
    assert any("0.580 [0.568, 0.592] 12 of 250 left out" in " ".join(row["text"].split()) for row in rows)
    cells = [cell for cell in page.all("td") if "data-value" in cell]
    by_row = {}
    for cell in cells:
        header = next(e for e in page.all("th") if e["parent"] is cell["parent"])
        by_row.setdefault(header["data-value"], []).append(float(cell["data-value"]))
    order = [*evaluation.metrics]
    expected = {
        method: [
            next(s.interval.value for s in evaluation.scores if (s.method, s.metric) == (method, m)) for m in order
        ]
        for method in evaluation.methods
    }
    assert by_row == expected
    arrows = [small["text"] for small in page.all("small") if "better" in small["text"]]
    assert arrows == ["↓ lower is better", "↑ higher is better", "↑ higher is better", "↑ higher is better"]


def test_the_best_is_marked_only_where_it_leaves_the_controls_behind(page: Page):
    marked = [star["parent"] for star in page.with_class("best")]
    assert [float(cell["data-value"]) for cell in marked] == [0.78, 0.97, 0.61]


def test_best_needs_controls(evaluation: Evaluation):
    assert tables.best(evaluation, "insertion_auc") == "cam" and tables.best(evaluation, "deletion_auc") is None
    assert tables.best(replace(evaluation, controls=()), "insertion_auc") is None
    assert tables.best(replace(evaluation, standings={}), "insertion_auc") is None


def test_gallery_says_what_it_shows(page: Page, evaluation: Evaluation):
    cards = page.with_class("card")
    assert len(cards) == len(evaluation.examples) + len(evaluation.errors)
    text = " ".join(cards[2]["text"].split())
    first = evaluation.examples[2]
    assert text.startswith(
        f"{first.name} true {first.label} predicted {first.prediction} {100 * first.probability:.1f} %"
    )
    assert "✓ correct" in text and "grad cam flat 0.000 0.000" in text
    low, high = first.maps["attention"].min(), first.maps["attention"].max()
    assert f"attention {report.number(float(low))} {report.number(float(high))}" in text
    labels = [svg["aria-label"] for svg in page.all("svg") if "aria-label" in svg]
    assert f"grad cam of {first.name}: it is flat, 0 everywhere" in labels
    assert f"{first.name}, with the outline of its mask" in labels
    assert all("✗ wrong" in card["text"] for card in cards[len(evaluation.examples) :])
    assert len(page.with_class("outline")) == 2 * 5 * len(cards)


def test_training_unread_images_and_provenance(page: Page, run: runs.Run):
    charts = page.with_class("chart")
    assert len(charts) == 2
    assert "Loss per epoch" in charts[0]["text"]
    assert (
        "train loss 1.82 in epoch 1, 0.145 in epoch 12; val loss 1.95 in epoch 1, 0.208 in epoch 12"
        in charts[0]["text"]
    )
    text = page.text_of("unread")
    assert "In the evaluated images: 2." in text and "broken/17.jpg truncated after 812 bytes" in text
    assert "In the images of the training run: 1." in text and "train/gone.png zero bytes" in text
    text = page.text_of("provenance")
    assert "sightline evaluate runs/demo" in text and "torch 2.15.0" in text and "1,292,370" in text
    assert "weight_decay: 0.05" in text


def test_names_are_text_and_never_markup(evaluation: Evaluation, run: runs.Run, tmp_path: Path):
    classes = (EVIL, *evaluation.classes[1:])
    hostile = replace(
        evaluation,
        data=EVIL,
        model=EVIL,
        split=EVIL,
        unit=EVIL,
        classes=classes,
        methods=(EVIL, *evaluation.controls),
        layers={EVIL: EVIL},
        scores=tuple(replace(s, method=EVIL) if s.method == "cam" else s for s in evaluation.scores),
        examples=tuple(
            replace(e, name=EVIL, label=EVIL, prediction=EVIL, maps={EVIL: e.maps["cam"]}, verdicts={EVIL: [EVIL]})
            for e in evaluation.examples[:2]
        ),
        mean_maps={EVIL: dict(zip(classes, evaluation.mean_maps["cam"].values(), strict=True))},
        verdicts={EVIL: {EVIL: 3}},
        summary=(EVIL, EVIL),
        skipped=((EVIL, EVIL),),
        provenance={EVIL: EVIL},
    )
    page = Page(report.write(hostile, tmp_path, replace(run, info={EVIL: EVIL}, skipped=[(EVIL, EVIL)])).read_text())
    assert len(page.all("script")) == len(page.all("style")) == 1
    assert "alert" not in page.all("script")[0]["text"]
    assert page.all("h1")[0]["text"] == f"Where {EVIL} looks on {EVIL}"
    assert page.all("h3")[1]["text"] == EVIL
    boxes = [box["value"] for box in page.all("input") if box["type"] == "checkbox"]
    assert boxes == [EVIL]


def test_unlabelled_images(evaluation: Evaluation, tmp_path: Path):
    unlabelled = replace(
        evaluation,
        accuracy=None,
        majority=None,
        confusion=None,
        errors=(),
        examples=tuple(replace(example, label=None, mask=None) for example in evaluation.examples[:3]),
    )
    page = Page(report.write(unlabelled, tmp_path).read_text())
    assert "no labels" in page.text_of("accuracy")
    absent = {"errors", "confusion", "training"}
    assert not absent & {element.get("id") for element in page.elements}
    assert not absent & {(link.get("href") or "")[1:] for link in page.all("a")}
    assert not page.with_class("outline") and "mask" not in page.text_of("gallery")
    for word in ("true ", "correct", "wrong"):
        assert word not in page.with_class("answer")[0]["text"]


def test_a_real_evaluation(tmp_path: Path):
    images = torch.rand(8, 3, 6, 4, generator=torch.Generator().manual_seed(0))
    data = [(images, torch.zeros(8, dtype=torch.long), torch.ones(8, 1, 6, 4) > 0)]
    model, classes = PooledModel(torch.eye(3)), ("sky", "sea", "land")
    found = evaluate(model, data, ["cam", "grad_cam"], ["energy_in_mask"], classes=classes)
    page = Page(report.write(found, tmp_path).read_text())
    assert len(page.with_class("card")) == len(found.examples) + len(found.errors) >= 8
    assert page.text_of("methods").count("1.000 [1.000, 1.000]") == len(found.methods) == 6
    assert "images of the split" not in page.all("header")[0]["text"]


def test_undefined_scores(evaluation: Evaluation, tmp_path: Path):
    nothing = Interval(value=float("nan"), low=float("nan"), high=float("nan"), n=0)
    scores = [replace(s, interval=nothing, undefined=250) if s.method == "cam" else s for s in evaluation.scores]
    scores = [s for s in scores if s.method != "grad_cam"]
    single = Interval(value=0.4, low=float("nan"), high=float("nan"), n=1)
    scores = [replace(s, interval=single) if s.method == "attention" else s for s in scores]
    html = report.write(replace(evaluation, scores=tuple(scores)), tmp_path).read_text()
    assert "nan" not in re.sub(r"base64,[^\"]*", "", html).lower().replace("provenance", "")
    page = Page(html)
    empty = [cell for cell in page.all("td") if cell.get("data-value") == ""]
    assert len(empty) == 8 and sum("250 of 250 left out" in cell["text"] for cell in empty) == 4
    assert "0.400" in page.text_of("methods")


def test_no_metrics_no_examples_no_summary(evaluation: Evaluation, tmp_path: Path):
    bare = replace(
        evaluation,
        metrics=(),
        scores=(),
        examples=(),
        errors=(),
        mean_maps={},
        summary=(),
        controls=(),
        verdicts={},
        skipped=(),
    )
    page = Page(report.write(bare, tmp_path).read_text())
    assert "No metric" in page.text_of("methods")
    assert "There is no wrong answer to show." in page.text_of("errors")
    assert "In the evaluated images: none." in page.text_of("unread")
    assert not page.with_class("tools") and not page.with_class("verdict")


@pytest.mark.parametrize("n", [2, tables.LARGEST, 200])
def test_confusion_from_2_to_200_classes(evaluation: Evaluation, tmp_path: Path, n: int):
    names = tuple(f"{i:03d}.Black_footed_Albatross" for i in range(n))
    counts = np.diag(np.full(n, 5))
    counts[0, 1] = 3
    counts[1] = 0
    maps = {"cam": dict.fromkeys(names, np.eye(3, dtype=np.float32))}
    path = report.write(replace(evaluation, classes=names, confusion=counts, mean_maps=maps, examples=()), tmp_path)
    page = Page(path.read_text())
    text = page.text_of("confusion")
    assert "000.Black_footed_Albatross 8 5 (62.5 %) 001.Black_footed_Albatross (3 ×)" in text
    assert path.stat().st_size < 2e6
    assert len(page.with_class("matrix")) == (n <= tables.LARGEST)
    if n > tables.LARGEST:
        drawn = pixels(next(image["src"] for image in page.all("img") if "Confusion" in image["alt"]))
        assert drawn.shape == (n, n, 3)
        assert drawn[2, 2].tolist() == [252, 255, 164] and drawn[2, 3].tolist() == [0, 0, 4]
        assert (drawn[1] == 128).all()


def test_the_file_stays_small(photos: Evaluation, run: runs.Run, tmp_path: Path):
    path = report.write(photos, tmp_path, run)
    assert len(photos.examples) == 24 and path.stat().st_size < 4e6


def test_same_evaluation_same_file(html: str, evaluation: Evaluation, run: runs.Run, tmp_path: Path):
    assert report.write(evaluation, tmp_path / "new" / "folder", run).read_text() == html


def test_a_failure_leaves_the_old_report(evaluation: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "report.html").write_text("old")

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        report.write(evaluation, tmp_path)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("report.html", "old")]


def test_a_folder_that_is_a_file(evaluation: Evaluation, tmp_path: Path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(OSError, match="taken"):
        report.write(evaluation, tmp_path / "taken")


def test_pictures_are_true():
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (40, 30, 3), dtype=np.uint8)
    assert np.array_equal(pixels(pictures.picture(small)), small)
    assert pixels(pictures.picture(np.zeros((300, 600, 3), np.uint8))).shape == (128, 256, 3)
    assert (pixels(pictures.heat(np.full((3, 3), 7.0))) == [0, 0, 4]).all()
    half = pixels(pictures.heat(np.array([[-3.0, 5.0]]), side=4))
    assert half[0, 0].tolist() == [0, 0, 4] and half[0, 3].tolist() == [252, 255, 164]
    assert (pixels(pictures.heat(np.full((2, 2), 0.5), ends=(0.0, 1.0))) == [188, 55, 84]).all()
    assert (pixels(pictures.heat(np.full((2, 2), np.nan))) == 128).all()
    scale = (255 * colormaps["RdBu_r"](range(256))[:, :3]).round()
    drawn = pixels(pictures.heat(np.array([[-2.0, 0.0, 4.0]]), side=3, signed=True))
    assert drawn[0].tolist() == scale[[64, 128, 255]].tolist()
    drawn = pixels(pictures.heat(np.array([[-2.0, 0.0, 4.0]]), ends=(-8.0, 8.0), side=3, signed=True))
    assert drawn[0].tolist() == scale[[96, 128, 192]].tolist()


def test_signed_maps_are_drawn_and_labelled_around_zero(evaluation: Evaluation, tmp_path: Path):
    raw = np.array([[-0.5, 2.0]], np.float32)
    example = replace(evaluation.examples[0], maps={"cam": raw, "grad_cam": raw}, verdicts={"cam": [LONG]})
    means = {method: {"zero": raw} for method in ("cam", "grad_cam")}
    found = replace(evaluation, signed=("cam",), examples=(example,), errors=(), mean_maps=means)
    html = report.write(found, tmp_path).read_text()
    page = Page(html)
    bars = [" ".join(bar["text"].split()) for bar in page.with_class("bar")]
    assert bars == ["−2.000 2.000", "−0.500 2.000"] * 2
    assert [bar["parent"]["text"].split()[0] for bar in page.with_class("signed")] == ["−2.000", "−2.000"]
    for signed in (True, False):
        assert pictures.heat(raw, signed=signed) in html
        assert pictures.heat(raw, (-2.0, 2.0) if signed else (-0.5, 2.0), 48, signed) in html
    assert "blue (against) over white (0) to red (for)" in html
    assert [verdict["text"] for verdict in page.with_class("doubt")] == [LONG]
    assert "blue (against)" not in report.write(evaluation, tmp_path / "unsigned").read_text()


def test_outline_encloses_the_mask():
    mask = np.zeros((4, 5), bool)
    mask[1:3, 1:4] = True
    mask[1, 2] = False
    path = pictures.outline(mask)
    assert path == "M1 1h1M3 1h1M2 2h1M1 3h3M1 1v2M2 1v1M3 1v1M4 1v2"
    assert pictures.outline(np.zeros((3, 3), bool)) == ""
    assert pictures.outline(np.ones((2, 3), bool)) == "M0 0h3M0 2h3M0 0v2M3 0v2"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([[0.0, 0.0], [0.0, 2.0]], "100 % of its positive values lie in the lower right quarter"),
        (
            [[1.0, 0.0, 0.0], [0.0, 4.0, 0.0], [0.0, 0.0, 0.0]],
            "40 % of its positive values lie in the upper left quarter",
        ),
        ([[-1.0, -2.0]], "it has no positive value"),
        ([[3.0, 3.0]], "it is flat, 3 everywhere"),
        ([[np.nan, np.inf]], "it has no finite value"),
        ([[np.nan, 1.0], [0.0, 3.0]], "75 % of its positive values lie in the lower right quarter"),
    ],
)
def test_maps_in_words(values: list[list[float]], words: str):
    assert pictures.in_words(np.array(values)) == words


def test_curves_leave_out_what_is_not_finite(run: runs.Run):
    (only,) = pictures.charts(
        [dict.fromkeys(row, np.nan) | {"epoch": row["epoch"], "train_loss": 1.0} for row in run.history]
    )
    assert list(only.lines) == ["train"] and only.quantity == "loss"
    assert pictures.charts([dict.fromkeys(run.history[0], np.nan) | {"epoch": 1.0}]) == []
    long = [run.history[0] | {"epoch": float(i)} for i in range(1, 301)]
    assert len(pictures.charts(long)[0].x_ticks) <= 8
    loss = pictures.charts(run.history)[0]
    assert loss.y_ticks == {"0": 200.0, "0.5": 150.0, "1": 100.0, "1.5": 50.0, "2": 0.0}
    assert loss.lines["train"].startswith("M0.0 ") and loss.lines["train"].count("L") == 11
