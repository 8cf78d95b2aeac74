"""Pages of maps as a notebook asks for them: from tensors, image sets and files."""

import base64
import csv
import io
import re
import threading
import warnings
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from PIL import Image

import sightline as sl
from sightline import cli, maps, runs
from sightline.data import Preprocess, read_images
from sightline.data import images as image_files
from sightline.data.images import open_image, open_picture, quiet
from sightline.explainers import selection
from sightline.recipe import Data, Model, Optim, Recipe
from sightline.testing import PooledModel
from sightline.training import fit

PHOTOS = Path(__file__).parents[2] / "examples" / "photos"
PREPROCESS = Preprocess(size=(8, 8), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


@pytest.fixture
def files(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(rng.integers(0, 255, (20, 30, 3), np.uint8)).save(tmp_path / f"{i}.png")
    return [tmp_path / f"{i}.png" for i in range(3)]


def pages(images, out, **options):
    options = {"methods": ["cam", "center_map"], "preprocess": PREPROCESS, "classes": ["r", "g", "b"]} | options
    return sl.report.pages(PooledModel(torch.eye(3)), images, out, **options)


def test_tensors_image_sets_and_files_give_the_same_maps(files, tmp_path):
    images = read_images(files, PREPROCESS)
    tensors = images.batch(range(3)).images
    results = [pages(given, tmp_path / str(i)) for i, given in enumerate((files, images, tensors))]
    for result in results:
        assert list(result.verdicts) == ["cam", "center_map"] and len(result.rows) == 6
        assert result.written == frozenset(result.folder.iterdir()) and len(result.written) == 8
    raw = [[np.load(r.folder / f"{row['maps']}.npz")["cam"] for row in r.rows[::2]] for r in results]
    assert np.array_equal(raw[0], raw[1]) and np.array_equal(raw[0], raw[2])
    expected = sl.explain(PooledModel(torch.eye(3)), tensors / 255, methods=["cam"])["cam"][:, 0]
    assert np.allclose(raw[0], expected.numpy())
    assert [row["maps"] for row in results[2].rows[::2]] == ["image-0", "image-1", "image-2"]


def test_a_target_by_name_and_a_wrong_one(files, tmp_path):
    assert {row["class"] for row in pages(files, tmp_path / "a", target="g").rows} == {"g"}
    with pytest.raises(ValueError, match=r"expected the target class by name .* got 'gg'; did you mean 'g'\?"):
        pages(files, tmp_path / "b", target="gg")


def test_methods_that_do_not_fit_and_files_that_cannot_be_read_are_left_out(files, tmp_path):
    files[1].write_bytes(b"")
    done = []
    result = pages(files, tmp_path / "out", methods=["cam", "attention"], progress=lambda *told: done.append(told))
    assert list(result.left_out) == ["attention"] and result.skipped == ((str(files[1]), "the file is empty"),)
    assert len(result.rows) == 2 and done[-1] == ("explaining", 3, 3)
    with pytest.raises(ValueError, match="the file is empty"):
        pages(files, tmp_path / "strict", strict=True)
    with pytest.raises(ValueError, match=r"expected at least one readable image, got none; the first, .*1\.png: "):
        pages(files[1:2], tmp_path / "none")
    with pytest.raises(ValueError, match="expected an output folder other than that of the images"):
        pages([tmp_path], tmp_path)


def stopping_after(images):
    """Ctrl-C once so many images are explained."""

    def progress(what, done, total):
        if what == "explaining" and done == images:
            raise KeyboardInterrupt

    return progress


def test_pages_appear_one_by_one_where_a_method_is_slow_and_the_table_is_whole_after_an_interrupt(files, tmp_path):
    there = []

    def progress(what, done, total):
        there.append((what, done, total, sorted(path.name for path in (tmp_path / "out").glob("*.png"))))

    slow = ["cam", "occlusion"]
    pages(files, tmp_path / "out", methods=slow, progress=progress)
    names = [f"{i}--page.png" for i in range(3)]
    assert [told for told in there if told[0] == "explaining"] == [("explaining", i, 3, names[:i]) for i in range(1, 4)]
    assert [told[3] for told in there if told[0] == "occlusion"] == [names[:i] for i in range(3)]
    with pytest.raises(KeyboardInterrupt):
        pages(files, tmp_path / "stopped", methods=slow, progress=stopping_after(2))
    assert {path.name for path in (tmp_path / "stopped").iterdir()} == {
        *(f"{i}{end}" for i in range(2) for end in (".npz", "--page.png")),
        "maps.csv",
        "index.html",
    }
    lines = (tmp_path / "stopped" / "maps.csv").read_text().splitlines()
    assert lines == (tmp_path / "out" / "maps.csv").read_text().splitlines()[:5]


def test_an_interrupt_amid_an_image_leaves_a_table_and_an_index_of_the_others(files, tmp_path, monkeypatch):
    module, calls = import_module("sightline.report.pages"), []
    thumbnail = module.thumbnail

    def stopping(pictures):
        calls.append(pictures)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return thumbnail(pictures)

    monkeypatch.setattr(module, "thumbnail", stopping)
    with pytest.raises(KeyboardInterrupt):
        pages(files, tmp_path / "out")
    assert len((tmp_path / "out" / "maps.csv").read_text().splitlines()) == 1 + 2
    index = (tmp_path / "out" / "index.html").read_text()
    assert 'href="0--page.png"' in index and "1--page.png" not in index


def test_an_index_of_another_program_is_kept(files, tmp_path):
    pages(files[:1], tmp_path / "out")
    pages(files, tmp_path / "out")
    assert 'href="2--page.png"' in (tmp_path / "out" / "index.html").read_text()
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "index.html").write_text("mine")
    with pytest.raises(ValueError, match=r"expected a folder without an index\.html of another program, got .*site; "):
        pages(files, tmp_path / "site")
    assert [path.name for path in (tmp_path / "site").iterdir()] == ["index.html"]


def test_the_table_lists_what_was_written_even_if_the_process_is_killed(files, tmp_path, monkeypatch):
    """Without the end of the call, which a killed process does not reach."""
    lines = []

    def progress(what, done, total):
        if what == "explaining":
            lines.append(len((tmp_path / "out" / "maps.csv").read_text().splitlines()))

    pages(files, tmp_path / "out", methods=["occlusion"], progress=progress)
    assert lines == [2, 3, 4]


def test_images_are_cut_by_memory(files, tmp_path):
    plain, cut = (pages(files, tmp_path / str(memory), memory=memory) for memory in (None, "1kB"))
    assert plain.rows == cut.rows
    done = []
    pages(files, tmp_path / "told", memory=1, progress=lambda *told: done.append(told))
    assert done == [("explaining", i, 3) for i in range(1, 4)]
    with pytest.raises(ValueError, match="expected memory in bytes or as 500MB, 2GB or 1GiB, got 'x'"):
        pages(files, tmp_path / "wrong", memory="x")


def test_fast_and_the_price_of_the_others(files, tmp_path, monkeypatch):
    result = pages(files[:1], tmp_path / "fast", methods=["fast"], tell=pytest.fail)
    assert "grad_cam" in result.verdicts and "center_map" in result.verdicts
    assert not {"rise", "occlusion"} & {*result.verdicts, *result.left_out}
    told = []
    seconds = {"rise": 100.0, "occlusion": 20.0}
    monkeypatch.setattr(selection, "seconds_per_image", lambda *given, **options: seconds[given[3]])
    pages(files, tmp_path / "a", methods=["cam", "occlusion"], tell=told.append)
    assert told == ["expected time: 20 s per image, 1 min for 3 images; occlusion 20 s"]
    monkeypatch.setattr(selection, "seconds_per_image", lambda *given, **options: 2.0)
    pages(files[:1], tmp_path / "b", methods=["cam", "occlusion"], tell=pytest.fail)
    pages(files[:1], tmp_path / "c", methods=["all"], tell=told.append)
    assert told[1].startswith("expected time: 14 s per image; occlusion 2 s, ") or "2 s, " in told[1]
    assert told[1].endswith("; without these: --methods fast")


def test_an_image_is_decoded_once_and_the_output_is_decided_once(files, tmp_path, monkeypatch):
    decoded, decided = [], []
    load = Image.Image.load
    monkeypatch.setattr(image_files, "_decoded", counted(image_files._decoded, decoded))
    settled = sl.inference.ForwardCall.settled
    monkeypatch.setattr(sl.inference.ForwardCall, "settled", counted(settled, decided))
    pages(files, tmp_path / "out", batch_size=1)
    assert len(decoded) == 3 and len(decided) == 1 and load is Image.Image.load


def counted(function, calls):
    def call(*args, **kwargs):
        calls.append(args)
        return function(*args, **kwargs)

    return call


@pytest.mark.parametrize("size", [(40, 60), (900, 1300)])
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_picture_has_the_pixels_of_two_decodings(size, suffix, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / f"a.{suffix}")
    small, shown = open_picture(tmp_path / f"a.{suffix}", (32, 32), 512)
    assert np.array_equal(small, open_image(tmp_path / f"a.{suffix}", (32, 32))[0])
    assert np.array_equal(shown, open_image(tmp_path / f"a.{suffix}", 512)[0])


@pytest.mark.parametrize("size", [(40, 60), (900, 1300)])
def test_a_page_shows_what_the_model_saw(size, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    small, shown = open_picture(tmp_path / "a.png", (32, 32), 512, crop=0.8, interpolation="bicubic")
    assert np.array_equal(small, open_image(tmp_path / "a.png", (32, 32), crop=0.8, interpolation="bicubic")[0])
    assert max(shown.shape) == min(512, round(0.8 * min(size))) and min(shown.shape[:2]) > 0.98 * max(shown.shape)
    if max(size) < 512:
        assert np.array_equal(shown, pixels[4:36, 14:46])


def same_rows(one, other):
    """Equal to the accuracy of float32: the images may run in other batches."""
    pairs = [(a[key], b[key]) for a, b in zip(one.rows, other.rows, strict=True) for key in a | b]
    return all(a == (pytest.approx(b, rel=1e-5, abs=1e-7) if isinstance(b, float) else b) for a, b in pairs)


def test_a_network_of_timm_gets_the_middle_and_all_of_an_image_on_demand(files, tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = sl.create_model("test_resnet", num_classes=3)
    cut = sl.report.pages(model, files, tmp_path / "cut")
    (notice,) = cut.notices
    assert notice.startswith("images are scaled until the shorter side is 168 px, and the middle 160 x 160 px are cut")
    assert notice.endswith("whole=True (--whole) takes all of each image")
    whole = sl.report.pages(model, files, tmp_path / "whole", whole=True)
    assert whole.notices == ("images are resized to 160 x 160 px, all of the image (bilinear)",)
    sizes = []
    for result in (cut, whole):
        with Image.open(result.folder / "0--page.png") as page:
            sizes.append(page.size)
    assert sizes[0] != sizes[1]
    preprocess = sl.models.preprocess_of(model)
    given = sl.report.pages(model, files, tmp_path / "given", preprocess=preprocess)
    held = sl.report.pages(model, read_images(files, preprocess), tmp_path / "set", preprocess=preprocess)
    assert given.notices == held.notices == ()
    assert same_rows(given, held) and same_rows(given, cut)


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "I;16", "P", "1"])
def test_photos_of_other_modes_are_cropped_too(mode, tmp_path):
    photo = Image.open(PHOTOS / "cat.jpg")
    gray = np.asarray(photo.convert("L"))
    photo = Image.fromarray(gray.astype(np.uint16) * 257) if mode == "I;16" else photo.convert(mode)
    photo.save(tmp_path / ("a.tif" if mode == "CMYK" else "a.png"))
    model = sl.create_model("test_resnet", num_classes=3)
    result = sl.report.pages(model, [tmp_path], tmp_path / "maps")
    assert len(result.rows) == 1 and not result.skipped


def test_threads_leave_the_filters_of_warnings_as_they_were():
    before = list(warnings.filters)
    both = threading.Barrier(2)

    def first():
        with quiet():
            both.wait()
            both.wait()

    thread = threading.Thread(target=first)
    thread.start()
    both.wait()
    with quiet():
        both.wait()
        thread.join()
    assert list(warnings.filters) == before


@pytest.fixture
def drawn(monkeypatch):
    """What is asked of `maps.side_by_side`, page by page."""
    asked = []
    draw = maps.side_by_side

    def side_by_side(images, columns, **options):
        asked.append({"images": images, **options})
        return draw(images, columns, **options)

    monkeypatch.setattr(maps, "side_by_side", side_by_side)
    return asked


def test_a_page_says_what_was_explained_and_where(files, tmp_path, drawn):
    shades = torch.tensor([200, 100, 0], dtype=torch.uint8)[None, :, None, None].expand(1, 3, 8, 8)
    chances = torch.tensor([200.0, 100.0, 0.0]).div(255).softmax(0)
    pages(shades, tmp_path / "a", classes=["red", "green", "blue"], name="resnet18")
    pages(shades, tmp_path / "b", classes=[], target=1)
    said = [asked["heading"].splitlines() for asked in drawn]
    first, second = (f"{100 * chance:.1f} %" for chance in chances[:2])
    assert said[0] == [f"explained: red ({first}), the prediction", "network: resnet18, image: image-0"]
    assert said[1] == [
        f"explained: class 1 ({second}); prediction: class 0 ({first})",
        "network: PooledModel, image: image-0",
    ]
    assert list(drawn[0]["captions"].values()) == ["features, 8 x 8 positions\nflat", "8 x 8 positions"]
    assert [asked["title"] for asked in drawn] == ["image", "image"]
    pages(files[:1], tmp_path / "c", preprocess=replace(PREPROCESS, crop=0.5))
    assert drawn[2]["title"] == "what the network sees"


def test_a_class_without_a_font_is_shown_by_its_number(files, tmp_path, drawn, monkeypatch):
    monkeypatch.setattr(maps, "_other_fonts", list)
    result = pages(files[:1], tmp_path / "a", classes=["\u732b", "\u72ac", "\u9b5a"])
    assert drawn[0]["heading"].startswith("explained: class ") and result.rows[0]["class"] in "\u732b\u72ac\u9b5a"
    text = f"no font here has the letters of {result.rows[0]['class']}, so pages show the numbers of such classes"
    assert result.notices[-1] == f"{text}; install one that has them"
    known = pages(files[:1], tmp_path / "b", classes=["кот", "собака", "рыба"])
    assert known.notices == result.notices[:-1]
    assert "explained: class" not in drawn[1]["heading"]


@pytest.mark.parametrize(
    ("size", "methods", "shown"),
    [
        ((64, 64), 3, (448, 448)),
        ((64, 64), 4, (256, 256)),
        ((32, 20), 1, (448, 280)),
        ((300, 200), 2, (448, 299)),
        ((900, 1800), 1, (224, 448)),
        ((900, 1800), 5, (128, 256)),
        ((2, 900), 1, (1, 448)),
    ],
)
@pytest.mark.parametrize("kind", ["file", "tensor"])
def test_images_have_the_size_of_the_page(size, methods, shown, kind, tmp_path, drawn):
    pixels = np.random.default_rng(0).integers(0, 255, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    given = [tmp_path / "a.png"] if kind == "file" else torch.from_numpy(pixels).movedim(-1, 0)[None]
    names = ["cam", "grad_cam", "center_map", "edge_map", "contrast_map"][:methods]
    result = pages(given, tmp_path / "out", methods=names)
    assert tuple(drawn[0]["images"].shape[2:]) == shown
    if max(size) <= 96:  # each pixel is a square
        factor = shown[0] // size[0]
        assert np.array_equal(drawn[0]["images"][0, :, ::factor, ::factor].movedim(0, -1), pixels)
    with Image.open(result.folder / f"{result.rows[0]['maps']}--page.png") as page:
        assert page.width == 24 + (1 + methods) * (4 + max(shown[1], round(0.7 * shown[0]), 96)) - 4


def test_the_maps_of_a_page_are_those_of_its_picture(tmp_path, drawn):
    pixels = torch.randint(0, 255, (1, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    result = pages(pixels, tmp_path, methods=["cam"])
    with Image.open(tmp_path / "image-0--page.png") as page:
        shown = np.asarray(page)
    raw = torch.from_numpy(np.load(tmp_path / "image-0.npz")["cam"])[None, None]
    cell = maps.overlay(drawn[0]["images"], raw, signed=True)[0, 0].movedim(0, -1).numpy()
    rows = [top for top in range(len(shown) - 448) if np.array_equal(shown[top : top + 448, 12 + 452 : 12 + 900], cell)]
    assert len(rows) == 1 and len(result.rows) == 1


def test_the_index_shows_every_image_with_its_classes_and_worst_verdict(tmp_path, drawn):
    rng = np.random.default_rng(0)
    for folder in ("Green_light", "other"):
        (tmp_path / folder).mkdir()
        Image.fromarray(rng.integers(0, 255, (20, 30, 3), np.uint8)).save(tmp_path / folder / f"{folder} #1.png")
    result = pages(
        [tmp_path / "Green_light", tmp_path / "other"],
        tmp_path / "maps",
        methods=["center_map", "cam", "grad_cam"],
        classes=["red", "green light", "blue"],
    )
    html = (tmp_path / "maps" / "index.html").read_text()
    assert f"index: {tmp_path / 'maps' / 'index.html'}" in list(result.lines())
    links = re.findall(r'<a href="([^"#]*page.png)"><img src="data:image/jpeg;base64,([^"]+)"', html)
    assert [unquote(link) for link, _ in links] == [f"{n} #1--page.png" for n in ("Green_light", "other")]
    assert all((tmp_path / "maps" / unquote(link)).is_file() for link, _ in links)
    with Image.open(io.BytesIO(base64.b64decode(links[0][1]))) as picture:
        assert picture.size == (2 * 30, 20)
    assert [row["true_class"] for row in result.rows] == ["green light"] * 3 + [""] * 3
    text = " ".join(re.sub("<[^>]*>", " ", html).split())
    assert text.count("true green light predicted") == 1 and "true other" not in text
    assert "CAM features, 8 x 8 positions" in text and "center map 8 x 8" in text
    assert "by CAM, which marks the bright places" in text
    assert not re.search(r"https?://|@import|url\(", html)
    said = [asked["heading"].splitlines()[0] for asked in drawn]
    assert said[0].endswith("; true class: green light") and "true class" not in said[1]
    assert [list(asked["captions"])[-1] for asked in drawn] == ["control: center map"] * 2


def test_the_index_names_the_gravest_verdict_and_images_of_a_set_have_their_class(tmp_path):
    images = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    pages(images, tmp_path / "flat", methods=["center_map", "cam"])
    text = " ".join(re.sub("<[^>]*>", " ", (tmp_path / "flat" / "index.html").read_text()).split())
    assert "do not read CAM: flat" in text
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.png")
    known = replace(read_images([tmp_path / "a.png"], PREPROCESS), labels=np.array([2]), classes=("r", "g", "b"))
    assert {row["true_class"] for row in pages(known, tmp_path / "set").rows} == {"b"}


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """Two runs on the same images: one without attention, one with BR-NPA."""
    start = Recipe(data=Data(train_size=64, test_size=20), optim=Optim(epochs=1, lr=0.01))
    options = {"depth": 8, "width": 0.25, "stem_stride": 2}
    folder = tmp_path_factory.mktemp("networks")
    rows = {"plain": options, "parts": options | {"attention": "brnpa"}}
    for name, model in rows.items():
        fit(replace(start, model=Model(name="cifar_resnet", options=model)), folder / name, progress=False)
    return [folder / name for name in rows]


def test_the_caption_names_as_many_colors_as_the_block_has_maps(files, tmp_path, monkeypatch):
    captions = []
    drawn = maps.side_by_side

    def keep(*args, **options):
        captions.extend(options["captions"].values())
        return drawn(*args, **options)

    monkeypatch.setattr(maps, "side_by_side", keep)
    for attention, options in (("ma_cnn", {"k": 2}), ("brnpa", {}), ("ma_cnn", {"k": 4})):
        model = sl.create_model(
            "cifar_resnet", depth=8, width=0.25, attention=attention, attention_options=options
        ).eval()
        sl.report.pages(model, files[:1], tmp_path / f"{attention}{len(captions)}", methods=["attention"])
    firsts = [text.partition("\n")[0] for text in captions]
    three = "red, green, blue: its first three maps; brightness: norm of the features"
    assert firsts == ["red, green: its two maps; brightness: norm of the features", three, three]


@pytest.mark.usefixtures("few_validation_images")
def test_several_networks_share_a_page(networks, files, tmp_path, capsys):
    both, wanted = [str(run) for run in networks], "grad_cam,center_map;attention,activation_map"
    cli.main(["explain", *both, *map(str, files), "--methods", wanted, "--out", str(tmp_path / "both")])
    alone = [
        sl.report.pages(run, files, tmp_path / run.name, methods=methods.split(","))
        for run, methods in zip(networks, wanted.split(";"), strict=True)
    ]
    with (tmp_path / "both" / "maps.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert [(row["network"], row["method"]) for row in rows[:4]] == [
        ("plain", "grad_cam"), ("plain", "center_map"), ("parts", "attention"), ("parts", "activation_map")
    ]  # fmt: skip
    for i in range(3):
        together = np.load(tmp_path / "both" / f"{i}.npz")
        for run, pages_of_one in zip(networks, alone, strict=True):
            raw = np.load(pages_of_one.folder / f"{i}.npz")
            assert all(np.array_equal(raw[name], together[f"{run.name}: {name}"]) for name in raw)
            predictions = {row["prediction"] for row in pages_of_one.rows if row["maps"] == str(i)}
            assert {r["prediction"] for r in rows if (r["maps"], r["network"]) == (str(i), run.name)} == predictions
    said = capsys.readouterr().out
    assert "3 images x 4 methods" in said and "parts: attention" in said


def test_a_block_with_several_maps_is_drawn_in_color(networks, files, tmp_path):
    run = networks[1]
    written = sl.report.pages(run, files[:1], tmp_path, methods=["attention"], overlays=True)
    raw = np.load(tmp_path / "0.npz")
    assert raw["attention parts"].shape == (3, *raw["attention"].shape)
    assert np.allclose(raw["attention parts"].mean(0), raw["attention"])
    model = sl.load(run)
    preprocess = runs.open_run(run).preprocess
    inputs = sl.data.normalize(read_images(files[:1], preprocess).batch([0]).images, preprocess)
    (weights,) = sl.attention_maps(model, inputs).values()
    assert np.allclose(raw["attention parts"], weights[0])
    colored = maps.parts(weights, sl.explain(model, inputs, methods=["activation_map"])["activation_map"])
    drawn = torch.from_numpy(np.array(Image.open(tmp_path / "0--attention.png"))).movedim(-1, 0).float()
    back = torch.nn.functional.interpolate(drawn[None], colored.shape[2:], mode="area")
    assert np.corrcoef(back.flatten(), colored.float().flatten())[0, 1] > 0.9
    assert written.verdicts["attention"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected images behind the run folders"),
        (["{image}", "--methods", "cam;cam;cam"], "expected methods for all networks, or a list for each of 2, got 3"),
        (["{image}", "--methods", "cam;"], "expected one name or several"),
        (["{image}", "--methods", "cam;no_cam", "--strict"], "no_cam"),
    ],
)
def test_bad_lists_of_networks_are_one_line(arguments, message, networks, files, tmp_path, capsys):
    given = [argument.format(image=files[0]) for argument in arguments]
    with pytest.raises(SystemExit):
        cli.main(["explain", *map(str, networks), *given, "--out", str(tmp_path / "out")])
    said = capsys.readouterr().err.strip()
    assert message in said and len(said.splitlines()) == 1
