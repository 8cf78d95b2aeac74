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
from sightline.evaluation import Curve, Evaluation, Example, evaluate
from sightline.evaluation.findings import ANSWERS
from sightline.explainers import Verdict
from sightline.facts import Finding, Interval, words
from sightline.report import pictures, tables
from sightline.report.formats import hundredths, number, percent
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

    def with_id(self, key: str) -> dict[str, Any]:
        (element,) = (element for element in self.elements if element.get("id") == key)
        return element

    def text_of(self, key: str) -> str:
        return " ".join(self.with_id(key)["text"].split())


@pytest.fixture(scope="module")
def html(evaluation: Evaluation, run: runs.Run, tmp_path_factory: pytest.TempPathFactory) -> str:
    return report.write(evaluation, tmp_path_factory.mktemp("report"), run).read_text()


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def pixels(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB"))


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


def test_title_answers_and_findings(page: Page, evaluation: Evaluation):
    assert page.all("h1")[0]["text"].strip() == "Where vgg_att2 looks on clutter"
    (answers,) = page.with_class("answers")
    assert [dt["text"] for dt in page.all("dt") if dt["parent"]["parent"] is answers] == list(ANSWERS.values())[-3:]
    said = [dd["text"] for dd in page.all("dd") if dd["parent"]["parent"] is answers]
    assert said == list(evaluation.summary[:3])
    assert all(finding in page.text_of("summary") for finding in evaluation.summary[3:])
    assert not any(finding in page.text_of("summary") for finding in said)
    assert "400 images of the split “test”, maps of 250 of them · 10 classes" in page.with_class("said")[0]["text"]


def test_the_page_begins_with_six_images_their_maps_and_one_control(page: Page, evaluation: Evaluation):
    order = [e["tag"] if e["tag"] != "svg" else e.get("aria-label", "") for e in page.elements]
    assert order.index("nav") > order.index("dl") > order.index("h1")
    for strip in page.with_class("strip"):
        heads = [span["text"] for span in page.all("span") if span["parent"]["parent"] is strip]
        assert heads == ["image", "CAM", "Grad-CAM", "attention", "activation map", "control: edge map"]
    tiles = [e for e in page.all("svg") if within(e, page.with_class("strip"))]
    assert len(tiles) == 6 * 6 and all(within(tile, page.with_class("apart")) for tile in tiles[5::6])
    first = evaluation.examples[0]
    assert tiles[0]["aria-label"].startswith(first.name) and f"edge map of {first.name}: " in tiles[5]["aria-label"]
    assert [" ".join(p["text"].split())[:4] for p in page.with_class("answer")[:6]] == ["true"] * 6
    assert "The first 6 of 24 images drawn at random, all named correctly. All are in the gallery." in " ".join(
        page.with_class("second")[0]["text"].split()
    )


def within(element: dict[str, Any], others: list[dict[str, Any]]) -> bool:
    while element and not any(element is other for other in others):
        element = element["parent"]
    return bool(element)


def test_accuracy_beside_majority_and_chance(page: Page):
    text = page.text_of("accuracy")
    assert "97.2 % of the labeled images" in text and "interval 95.3 % to 98.6 %, from 400 images." in text
    assert "Always the most frequent class 11.8 %" in text and "Chance: guessing among 10 classes 10.0 %" in text


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


def test_a_test_ranks_nothing_and_marks_who_fails(evaluation: Evaluation, tmp_path: Path):
    test, *others = evaluation.metrics
    found = replace(
        evaluation,
        higher_is_better=evaluation.higher_is_better | {test: None},
        standings={metric: evaluation.standings[metric] for metric in others},
        metric_agreement=np.eye(3),
        failed={test: ("cam", "grad_cam")},
    )
    assert found.ranking == tuple(others)
    page = Page(report.write(found, tmp_path).read_text())
    assert "not ranked" in page.text_of("methods")
    marked = [mark["parent"] for mark in page.with_class("doubt") if mark["text"] == "fails"]
    of = {score.method: score.interval.value for score in found.scores if score.metric == test}
    assert [float(cell["data-value"]) for cell in marked] == [of["cam"], of["grad_cam"]]
    agreement = next(t["text"] for t in page.with_class("matrix") if within(t, [page.with_id("agreement")]))
    assert words(test) not in agreement and words(others[0]) in agreement


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
    assert "✓ correct" in text and "Grad-CAM do not read: flat 0.000 0.000 10 x 10 positions" in text
    low, high = first.maps["attention"].min(), first.maps["attention"].max()
    assert f"attention {number(float(low))} {number(float(high))}" in text
    labels = [svg["aria-label"] for svg in page.all("svg") if "aria-label" in svg]
    assert f"Grad-CAM of {first.name}: it is flat, 0 everywhere" in labels
    assert f"{first.name}, with the outline of its mask" in labels
    assert all("✗ wrong" in card["text"] for card in cards[len(evaluation.examples) :])
    in_cards = [line for line in page.with_class("outline") if line["parent"]["parent"]["parent"]["parent"] in cards]
    assert len(in_cards) == 2 * 5 * len(cards)


def test_training_unread_images_and_provenance(page: Page, run: runs.Run):
    charts = [chart for chart in page.with_class("chart") if "epoch" in chart["text"]]
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
            replace(
                e, name=EVIL, label=EVIL, prediction=EVIL, maps={EVIL: e.maps["cam"]}, verdicts={EVIL: [Verdict(EVIL)]}
            )
            for e in evaluation.examples[:2]
        ),
        mean_maps={EVIL: dict(zip(classes, evaluation.mean_maps["cam"].values(), strict=True))},
        worst={EVIL: (replace(evaluation.examples[5], name=EVIL, label=EVIL, maps={EVIL: np.eye(3)}),)},
        standings={metric: replace(of, best=EVIL) for metric, of in evaluation.standings.items()},
        comparisons=tuple(replace(pair, method=EVIL) for pair in evaluation.comparisons[:9]),
        curves={kind: {EVIL: of["cam"]} for kind, of in evaluation.curves.items()},
        method_agreement=evaluation.method_agreement[:5, :5],
        left_out={EVIL: EVIL},
        verdicts={EVIL: {EVIL: 3}},
        verdict_levels={EVIL: {EVIL: {"doubt": 3}}},
        summary=(Finding("accuracy", EVIL), Finding("best", EVIL)),
        skipped=((EVIL, EVIL),),
        provenance={EVIL: EVIL},
    )
    page = Page(report.write(hostile, tmp_path, replace(run, info={EVIL: EVIL}, skipped=[(EVIL, EVIL)])).read_text())
    assert len(page.all("script")) == len(page.all("style")) == 1
    assert "alert" not in page.all("script")[0]["text"]
    assert page.all("h1")[0]["text"] == f"Where {EVIL} looks on {EVIL}"
    assert sum(title["text"] == EVIL for title in page.all("h3")) == 4  # two cards, the worst images, the mean map
    assert sum(title["text"] == EVIL for title in page.all("title")) == 4  # two lines, a dot in two scatters
    boxes = [box["value"] for box in page.all("input") if box["type"] == "checkbox"]
    assert boxes == [EVIL]


def test_unlabeled_images(evaluation: Evaluation, tmp_path: Path):
    unlabeled = replace(
        evaluation,
        accuracy=None,
        majority=None,
        confusion=None,
        errors=(),
        examples=tuple(replace(example, label=None, mask=None) for example in evaluation.examples[:3]),
        worst={},
        quality=None,
    )
    page = Page(report.write(unlabeled, tmp_path).read_text())
    assert "no labels" in page.text_of("accuracy")
    absent = {"errors", "confusion", "training", "worst"}
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
    table = page.with_class("scores")[0]
    assert " ".join(table["text"].split()).count("1.000 [") == len(found.methods) == 6
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
        standings={},
        comparisons=(),
        curves={},
        worst={},
        reliability={},
        metric_agreement=None,
        method_agreement=None,
        quality=None,
        left_out={},
    )
    page = Page(report.write(bare, tmp_path).read_text())
    assert "No metric" in page.text_of("methods")
    assert "There is no wrong answer to show." in page.text_of("errors")
    assert "In the evaluated images: none." in page.text_of("unread")
    assert not page.with_class("tools") and not page.with_class("strip") and not page.with_class("answers")
    absent = {"curves", "agreement", "worst"}
    assert not absent & {element.get("id") for element in page.elements}
    assert not absent & {(link.get("href") or "")[1:] for link in page.all("a")}
    assert "F1" not in page.text_of("accuracy") and "Left out" not in page.text_of("methods")


@pytest.mark.parametrize("n", [2, tables.LARGEST, 200])
def test_confusion_from_2_to_200_classes(evaluation: Evaluation, tmp_path: Path, n: int):
    names = tuple(f"{i:03d}.Black_footed_Albatross" for i in range(n))
    counts = np.diag(np.full(n, 5))
    counts[0, 1] = 3
    counts[1] = 0
    maps = {"cam": dict.fromkeys(names, np.eye(3, dtype=np.float32))}
    bare = replace(evaluation, classes=names, confusion=counts, mean_maps=maps, examples=(), quality=None)
    bare = replace(bare, metric_agreement=None, method_agreement=None)
    path = report.write(bare, tmp_path)
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
    for flat in (7.0 + 0.06 * np.eye(3), np.full((3, 3), 7.0), np.zeros((3, 3))):
        assert (pixels(pictures.heat(flat)) == 128).all() and (pixels(pictures.heat(flat, signed=True)) == 128).all()
    assert (pixels(pictures.heat(np.zeros((2, 2)), ends=(0.0, 0.0))) == 128).all()
    assert pixels(pictures.heat(7.0 + 0.08 * np.eye(3), side=3))[0, :2].tolist() == [[252, 255, 164], [0, 0, 4]]
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
    example = replace(evaluation.examples[0], maps={"cam": raw, "grad_cam": raw}, verdicts={"cam": [Verdict(LONG)]})
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
    assert "blue (against) through white (0) to red (for)" in html
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
        ([[0.50939, 0.50948]], "it is nearly flat, 0.509 to within 1 % everywhere"),
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


def row_of(page: Page, section: str, first: str) -> list[list[str]]:
    """Cells of all rows in a section whose first cell is this one."""
    found = []
    for row in page.all("tr"):
        above, element = [], row["parent"]
        while element:
            above.append(element.get("id"))
            element = element["parent"]
        cells = [" ".join(cell["text"].split()) for cell in page.all("th", "td") if cell["parent"] is row]
        if section in above and cells[0] == first:
            found.append(cells)
    return found


def test_chance_stands_in_the_foot_and_reliability_far_below(page: Page):
    (foot,) = page.all("tfoot")
    text = " ".join(foot["text"].split())
    assert text == "chance – – 0.068 0.068"
    text = page.text_of("agreement")
    assert "Krippendorff’s alpha of the methods’ ranks, without controls: 1 if all images rank them alike" in text
    assert text.endswith("deletion 0.310 insertion 0.620 pointing game −0.040 energy in mask 0.870")


def test_the_best_stands_against_every_other(page: Page):
    text = page.text_of("methods")
    assert "deletion: CAM is better than 6 of 7" in text and "pointing game: CAM is better than 7 of 7" in text
    assert "CAM minus each of the others" in text and "Lower is better" in text
    rows = [row for row in row_of(page, "methods", "edge map") if len(row) == 4]
    assert rows[0] == ["edge map", "−0.010 [−0.025, 0.005]", "0.200", "cannot be told apart"]
    rows = row_of(page, "methods", "attention")
    assert rows[0] == ["attention", "−0.070 [−0.085, −0.055]", "<0.001", "better"]  # in the data: attention minus cam
    assert rows[1][1] == "0.070 [0.055, 0.085]"


def test_leads_are_sorted_and_judged_by_the_metrics_direction(evaluation: Evaluation):
    deletion = tables.leads(evaluation, "deletion_auc")
    assert [lead.other for lead in deletion[:3]] == ["edge_map", "grad_cam", "attention"]
    assert [lead.outcome for lead in deletion[:3]] == ["cannot be told apart", "better", "better"]
    worse = replace(evaluation, higher_is_better=dict.fromkeys(evaluation.metrics, True))
    assert {lead.outcome for lead in tables.leads(worse, "deletion_auc")} == {"cannot be told apart", "worse"}
    undefined = replace(evaluation, comparisons=tuple(replace(c, adjusted=np.nan) for c in evaluation.comparisons))
    assert {lead.outcome for lead in tables.leads(undefined, "deletion_auc")} == {"–"}


def test_curves_and_their_numbers(page: Page, evaluation: Evaluation):
    insertion, deletion = (chart for chart in page.with_class("chart") if "pixels" in chart["text"])
    assert "cam 0 with 0 %, 0.84 with 50 %, 0.9 with 100 %; grad_cam" in insertion["text"]
    assert "100 % of the pixels deleted" in deletion["text"]
    for chart in (insertion, deletion):
        lines = [path for path in page.all("path") if path["parent"] is chart]
        kinds = [path["class"] for path in lines]
        best_last = [f"series-{i}" for i in (4, 3, 2, 1)]
        assert kinds == [*(f"band {of}" for of in best_last), *["thin"] * 4, *(f"line {of}" for of in best_last)]
        assert [" ".join(path["text"].split()) for path in lines[8:]] == [
            "activation map",
            "attention",
            "Grad-CAM",
            "CAM",
        ]
    assert [item["text"].strip() for item in page.all("li") if item["parent"] in page.with_class("legend")] == [
        "CAM",
        "Grad-CAM",
        "attention",
        "activation map",
        "controls",
    ]
    rows = row_of(page, "curves", "CAM")
    line = evaluation.curves["deletion"]["cam"]
    assert rows[1] == ["CAM", number(float(np.trapezoid(line.mean, line.shares))), "0.900", *rows[1][3:]]
    assert rows[1][-3:] == [number(0.9 * 0.5 ** (1 / 0.24)), number(0.9 * 0.25 ** (1 / 0.24)), "0.000"]


def test_six_methods_have_a_color(evaluation: Evaluation, tmp_path: Path):
    x = np.linspace(0.0, 1.0, 3)
    lines = {f"m{i}": Curve(shares=x, mean=i * x, low=i * x, high=i * x) for i in range(9)}
    kinds = {"insertion": lines, "deletion": lines}
    many = replace(evaluation, methods=tuple(lines), controls=("m8",), curves=kinds | {"deletion": {}})
    assert tables.foremost(many) == ["m7", "m6", "m5", "m4", "m3", "m2"]
    assert tables.foremost(replace(many, curves=kinds | {"insertion": {}})) == ["m0", "m1", "m2", "m3", "m4", "m5"]
    assert len(tables.foremost(replace(many, curves=kinds))) == 6
    page = Page(report.write(replace(many, scores=(), worst={}, method_agreement=None), tmp_path).read_text())
    (chart,) = (chart for chart in page.with_class("chart") if "pixels" in chart["text"])
    assert sum("line" in path["class"] for path in page.all("path") if path["parent"] is chart) == 6
    assert "best 6 of 8 methods" in page.text_of("curves")


def test_curves_with_holes():
    nan, x = np.nan, np.linspace(0.0, 1.0, 5)
    mean = np.array([1.0, nan, 0.5, 0.5, 0.0])
    holed = Curve(shares=x, mean=mean, low=np.array([1.0, nan, 0.5, nan, 0.0]), high=mean)
    (chart,) = pictures.courses({"deletion": {"cam": holed}}, ["cam"], [])
    assert chart.lines["cam"] == "M0.0 0.0h0M200.0 100.0h0L300.0 100.0L400.0 200.0"
    assert chart.bands["cam"] == "M0.0 0.0L0.0 0.0zM200.0 100.0L200.0 100.0zM400.0 200.0L400.0 200.0z"
    assert chart.text == "cam 1 with 0 %, 0.5 with 50 %, 0 with 100 % of the pixels deleted"
    assert chart.y_ticks == {"0": 200.0, "0.2": 160.0, "0.4": 120.0, "0.6": 80.0, "0.8": 40.0, "1": 0.0}
    nothing = replace(holed, mean=nan * x, low=nan * x, high=nan * x)
    assert np.isnan(tables.along(nothing)).all()
    assert pictures.courses({"deletion": {"cam": nothing}}, [], ["cam"]) == []


def test_agreement_of_metrics(page: Page, evaluation: Evaluation):
    (cells,) = (row for row in row_of(page, "agreement", "pointing game"))
    found = evaluation.metric_agreement
    assert cells == ["pointing game", *(hundredths(value) for value in found[2].tolist())]
    assert cells[3] == "1.00"
    charts = page.with_class("scatter")
    assert " ".join(charts[0]["text"].split()).startswith("deletion and pointing game: 0.")
    assert "insertion and energy in mask: " in " ".join(charts[1]["text"].split())
    dots = [dot for dot in page.all("circle") if dot.get("class") in ("mean", "hollow") and dot["text"].strip()]
    assert len(dots) == 2 * 8 and sum(dot["class"] == "hollow" for dot in dots) == 2 * 4
    assert {dot["text"].strip() for dot in dots if dot["class"] == "hollow"} == {words(m) for m in evaluation.controls}
    labels = [label["text"] for label in page.with_class("label")]
    assert sorted(labels) == sorted(2 * ["attention", "activation map", "CAM", "Grad-CAM"])


def test_agreement_of_methods(page: Page):
    text = page.text_of("agreement")
    assert "Most alike are attention and activation map (0.40), least alike attention and contrast map (−0.02)" in text
    (row,) = row_of(page, "agreement", "attention")
    assert row == ["attention", "1.00", "0.40", "0.31", "0.23", "0.16", "0.09", "0.03", "−0.02"]
    assert not row_of(page, "agreement", "edge map")  # controls only across
    cells = [cell for cell in page.all("td") if cell["text"] in ("0.40", "−0.02")]
    assert {(cell["text"], cell.get("class"), cell["style"]) for cell in cells} == {
        ("0.40", None, "--share: 40%"),
        ("0.40", "apart", "--share: 40%"),
        ("−0.02", "against", "--share: 2%"),
    }


def test_two_controls_are_never_the_most_alike():
    table = np.array([[1.0, 0.2, 0.3], [0.2, 1.0, 0.9], [0.3, 0.9, 1.0]])
    assert tables.extremes(["cam", "edges", "noise"], table, ["cam"]) == [("cam", "edges", 0.2), ("cam", "noise", 0.3)]
    assert tables.extremes(["cam", "edges"], table, ["cam"]) == [("cam", "edges", 0.2)]
    assert tables.extremes(["cam", "edges"], table * np.nan, ["cam"]) == []


def test_a_scatter_points_to_the_better_side():
    better = pictures.scatter({"a": 0.0, "b": 1.0}, {"a": 0.0, "b": 1.0}, (True, True), ["a", "b"])
    assert [(dot.x, dot.y) for dot in better.dots] == [(0.0, 300.0), (300.0, 0.0)]
    assert [dot.label for dot in better.dots] == [(8.0, 288.0), (308.0, 5.0)]
    turned = pictures.scatter({"a": 0.0, "b": 1.0}, {"a": 0.0, "b": 1.0}, (False, True), [])
    assert [(dot.x, dot.y) for dot in turned.dots] == [(300.0, 300.0), (0.0, 0.0)]
    assert turned.x_ticks == {"0": 300.0, "0.2": 240.0, "0.4": 180.0, "0.6": 120.0, "0.8": 60.0, "1": 0.0}
    assert {dot.label for dot in turned.dots} == {None}
    assert pictures.scatter({"a": np.nan}, {"a": 1.0}, (True, True), []) is None


@pytest.mark.parametrize("seed", range(20))
def test_names_on_a_scatter_never_overlap(seed: int):
    rng = np.random.default_rng(seed)
    names = [f"{'long_' * int(rng.integers(4))}m{i}" for i in range(int(rng.integers(2, 30)))]
    x, y = ({name: float(value) for name, value in zip(names, rng.normal(size=len(names)), strict=True)} for _ in "xy")
    for values in (y, dict.fromkeys(names, 1.0), x):  # anywhere, on a line, and on the diagonal
        drawn = pictures.scatter(x, values, (True, False), names)
        boxes = [
            (dot.label[0], dot.label[1] - 13, dot.label[0] + pictures.LETTER * len(dot.name), dot.label[1] + 4)
            for dot in drawn.dots
            if dot.label
        ]
        assert boxes  # a crowd may leave some without a name, never all
        for i, a in enumerate(boxes):
            assert 0 <= a[0] and a[2] <= 324 and a[3] <= 300
            assert not any(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for b in boxes[:i])
            assert not any(a[0] < dot.x < a[2] and a[1] < dot.y < a[3] for dot in drawn.dots)


def test_worst_images(page: Page, evaluation: Evaluation, html: str):
    text = page.text_of("worst")
    assert "The images on which each method does worst in deletion" in text
    tiles = [
        e["aria-label"]
        for e in page.all("svg")
        if e["parent"]["parent"]["parent"]["parent"] in page.with_class("worst")
    ]
    assert len(tiles) == 3 * 4 and tiles[0].startswith("attention of test/00000.png: ")
    assert "test/00001.png 0.004 true" in text  # activation map, by its own score of this image
    assert f"test/00900.png – true {evaluation.worst['cam'][2].label}" in text


def test_an_image_is_drawn_once(html: str, evaluation: Evaluation, tmp_path: Path):
    everywhere = (*evaluation.examples, *evaluation.errors, *(e for of in evaluation.worst.values() for e in of))
    different = {pictures.picture(example.image) for example in everywhere}
    assert len(different) == 31 and all(html.count(uri) == 1 for uri in different)
    apart = replace(evaluation.examples[0], mask=None, maps={})
    found = replace(evaluation, examples=(evaluation.examples[0], apart), errors=(), worst={}, mean_maps={})
    assert report.write(found, tmp_path).read_text().count(pictures.picture(apart.image)) == 2  # its mask is another
    unlabeled = replace(evaluation, accuracy=None, errors=evaluation.worst["cam"], examples=())
    page = Page(report.write(unlabeled, tmp_path).read_text())
    ids = {element.get("id") for element in page.elements}
    assert {use["href"][1:] for use in page.all("use")} <= ids  # what stands with the errors is drawn elsewhere


def test_quality_of_the_classifier(page: Page, evaluation: Evaluation):
    found = evaluation.quality
    f1, error = found.macro_f1, found.calibration_error
    text = page.text_of("accuracy")
    assert f"{f1.value:.3f} [{f1.low:.3f}, {f1.high:.3f}]" in text
    assert f"{100 * error.value:.1f} % [{100 * error.low:.1f} %, {100 * error.high:.1f} %]" in " ".join(text.split())
    for name, one in zip(evaluation.classes, found.per_class, strict=True):
        (row,) = (row for row in row_of(page, "confusion", name) if len(row) == 6)
        shown = [percent(one.precision), number(one.f1)]
        assert row[1] == str(one.n) and row[3:5] == [" ".join(value.split()) for value in shown]
        ends = f"[{percent(one.recall.low)}, {percent(one.recall.high)}]"
        assert row[2].endswith(" ".join(ends.split()))


def test_what_was_left_out_is_named(page: Page):
    assert "Left out for lack of time RISE 312 s for 50 images, of 600 s for everything" in page.text_of("methods")


def test_a_long_summary_has_headings(evaluation: Evaluation, tmp_path: Path):
    found = [Finding("best", f"method {i} shows most (insertion_auc 0.9).") for i in range(12)]
    flawed = [
        Finding("verdict", "3 of 9 maps of cam are flat."),
        Finding("not better than a control", "None of cam, lrp is shown to be better than edge_map in insertion_auc."),
    ]
    missing = [Finding("left out", "Left out for lack of time: rise.")]
    assert tables.grouped([*flawed, *found, *missing]) == {
        "What was found": found,
        "What to distrust": flawed,
        "What is missing": missing,
    }
    page = Page(
        report.write(
            replace(evaluation, summary=(Finding("accuracy", "First."), *found, *flawed)), tmp_path
        ).read_text()
    )
    text = page.text_of("summary")
    assert "What was found" in text and "4 more" in text and "What is missing" not in text
    assert all(sentence in text for sentence in (*found, *flawed))


def nowhere(evaluation: Evaluation) -> Evaluation:
    """Not one number is defined."""
    nan = np.nan
    nothing = Interval(value=nan, low=nan, high=nan, n=0)
    curve = Curve(shares=np.full(3, nan), mean=np.full(3, nan), low=np.full(3, nan), high=np.full(3, nan))
    blank = replace(evaluation.examples[0], maps={"cam": np.full((3, 3), nan)}, probability=nan)
    return replace(
        evaluation,
        scores=tuple(replace(score, interval=nothing) for score in evaluation.scores),
        chance=dict.fromkeys(evaluation.metrics, nan),
        accuracy=nothing,
        majority=nan,
        comparisons=tuple(replace(c, difference=nothing, p=nan, adjusted=nan) for c in evaluation.comparisons),
        curves={kind: dict.fromkeys(of, curve) for kind, of in evaluation.curves.items()},
        reliability=dict.fromkeys(evaluation.metrics, nan),
        metric_agreement=np.full((4, 4), nan),
        method_agreement=np.full((8, 8), nan),
        quality=replace(
            evaluation.quality,
            macro_f1=nothing,
            calibration_error=nothing,
            per_class=tuple(replace(c, precision=nan, recall=nothing, f1=nan) for c in evaluation.quality.per_class),
        ),
        examples=(blank,),
        errors=(blank,),
        worst={"cam": (blank,), "grad_cam": ()},
        mean_maps={"cam": {"zero": np.full((3, 3), nan)}},
        per_image={"name": [blank.name], "deletion_auc/cam": [nan]},
    )


def only(evaluation: Evaluation, methods: tuple[str, ...], metrics: tuple[str, ...]) -> Evaluation:
    """What is left of an evaluation with few methods and metrics."""
    i = [evaluation.methods.index(method) for method in methods]
    j = [evaluation.metrics.index(metric) for metric in metrics]
    return replace(
        evaluation,
        methods=methods,
        controls=tuple(control for control in evaluation.controls if control in methods),
        metrics=metrics,
        scores=tuple(s for s in evaluation.scores if s.method in methods and s.metric in metrics),
        comparisons=tuple(c for c in evaluation.comparisons if {c.method, c.other} <= set(methods)),
        standings={m: of for m, of in evaluation.standings.items() if m in metrics},
        curves={kind: {m: of[m] for m in methods} for kind, of in evaluation.curves.items()},
        metric_agreement=evaluation.metric_agreement[np.ix_(j, j)],
        method_agreement=evaluation.method_agreement[np.ix_(i, i)],
        worst={m: of for m, of in evaluation.worst.items() if m in methods},
        mean_maps={m: of for m, of in evaluation.mean_maps.items() if m in methods},
    )


def test_nothing_defined_draws_nothing(evaluation: Evaluation, tmp_path: Path):
    html = report.write(nowhere(evaluation), tmp_path).read_text()
    assert "nan" not in re.sub(r"base64,[^\"]*", "", html).lower().replace("provenance", "")
    page = Page(html)
    ids = {element.get("id") for element in page.elements}
    assert not {"curves", "agreement"} & ids and "worst" in ids
    assert not page.with_class("interval") and not page.with_class("mean") and not page.with_class("best")
    assert "CAM is better than 0 of 7" in page.text_of("methods")


def test_no_controls(evaluation: Evaluation, tmp_path: Path):
    page = Page(report.write(only(evaluation, evaluation.methods[:4], evaluation.metrics), tmp_path).read_text())
    assert not page.with_class("thin") and not page.with_class("hollow") and not page.with_class("best")
    assert "controls" not in page.text_of("curves") and "hollow" not in page.text_of("agreement")
    assert "Most alike are attention and activation map" in page.text_of("agreement")


def test_one_method_and_one_metric(evaluation: Evaluation, tmp_path: Path):
    page = Page(report.write(only(evaluation, ("cam",), ("insertion_auc",)), tmp_path).read_text())
    assert "agreement" not in {element.get("id") for element in page.elements}
    assert len(page.with_class("band")) == 2
    assert "The best method against the others" not in page.text_of("methods")
    worst = "Worst images of each method The images on which each method does worst in insertion"
    assert page.text_of("worst").startswith(worst)


def test_two_metrics_have_one_scatter(evaluation: Evaluation, tmp_path: Path):
    page = Page(report.write(only(evaluation, evaluation.methods, evaluation.metrics[:2]), tmp_path).read_text())
    assert len(page.with_class("scatter")) == 1 and "agree least" not in page.text_of("agreement")
    assert not page.with_class("dense") and not page.with_class("tall")


def wide(evaluation: Evaluation, n: int = 25) -> Evaluation:
    """25 methods, half of them noise in every pixel, 25 metrics, 24 examples."""
    rng = np.random.default_rng(0)
    methods = tuple(f"method_{i}" for i in range(n))
    metrics = tuple(f"metric_{i}" for i in range(25))
    side = evaluation.examples[0].image.shape[0]
    sizes = [(10, 10) if i % 2 else (side, side) for i in range(n)]

    def one(example: Example, *names: str) -> Example:
        maps = {m: rng.normal(size=sizes[methods.index(m)]).astype(np.float32) for m in names}
        return replace(example, maps=maps, verdicts={})

    template = evaluation.scores[0]
    every = (*methods, *evaluation.controls)
    return replace(
        evaluation,
        methods=every,
        signed=methods[::2],
        metrics=metrics,
        layers={},
        higher_is_better=dict.fromkeys(metrics, True),
        scores=tuple(replace(template, method=method, metric=metric) for method in every for metric in metrics),
        standings={},
        comparisons=(),
        examples=tuple(one(example, *methods) for example in evaluation.examples),
        errors=tuple(one(example, *methods) for example in evaluation.errors),
        worst={m: tuple(one(e, m) for e in evaluation.examples[i % 20 : i % 20 + 3]) for i, m in enumerate(methods)},
        curves={kind: {m: of["cam"] for m in every} for kind, of in evaluation.curves.items()},
        mean_maps={m: evaluation.mean_maps["cam"] for m in methods},
        metric_agreement=np.corrcoef(rng.normal(size=(25, 6))),
        method_agreement=np.corrcoef(rng.normal(size=(len(every), 6))),
        reliability={},
    )


def test_25_methods_and_metrics_stay_small_and_fold(photos: Evaluation, tmp_path: Path):
    path = report.write(wide(photos), tmp_path)
    assert path.stat().st_size < 15e6
    page = Page(path.read_text())
    assert page.with_class("dense") and page.with_class("tall")
    folded = [" ".join(summary["text"].split()) for summary in page.all("summary")]
    assert {"25 methods", "20 more", "8 more"} <= set(folded)
    assert len(page.with_class("hollow")) == 2 * 4
