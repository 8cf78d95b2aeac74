"""The command line as its users meet it: what it writes, what it says, what it leaves behind."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from sightline import attention, cli, maps, recipe, runs, terminal
from sightline.explainers import EXPLAINERS, Verdict
from sightline.explainers.drawing import caption, titled
from sightline.facts import Layer, percent, words
from sightline.report.pages import Pages, free_name, positions

pytestmark = pytest.mark.usefixtures("without_shape_checks")

ROOT = Path(__file__).parent.parent
TINY = [
    "--data.train_size=120",
    "--data.test_size=30",
    "--model.options.width=0.0625",
    "--model.options.stem_pool=2",
    "--optim.epochs=1",
    "--optim.batch_size=32",
    "--limit=6",
]


def sightline(*arguments):
    """Run a verb in this process."""
    cli.main([str(argument) for argument in arguments])


def refused(capsys, *arguments):
    """The one line that a refused command prints."""
    with pytest.raises(SystemExit) as stop:
        sightline(*arguments)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and "Traceback" not in said
    return said


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "run"
    sightline("train", "--data", "clutter", "--model", "vgg_att2", "--out", out, *TINY)
    return out


def test_train_ends_with_weights_scores_and_a_report(run):
    files = {path.name for path in run.iterdir()}
    wanted = {
        "recipe.yaml",
        "model.safetensors",
        "run.json",
        "metrics.csv",
        "evaluation.json",
        "per_image.csv",
        "report.html",
    }
    assert wanted <= files and not any(name.endswith((".tmp", ".part")) for name in files)
    assert runs.open_run(run).recipe.model.options == {"width": 0.0625, "stem_pool": 2, "dropout": 0.0}
    rows = list(csv.DictReader((run / "per_image.csv").read_text().splitlines()))
    assert len(rows) == 6 and "energy_in_mask/attention@attention.conv10" in rows[0]


def test_demo_is_the_recipe_in_the_repository():
    assert recipe.load(ROOT / "recipes" / "clutter_demo.yaml") == cli.DEMO


def test_demo_prints_the_table_and_the_report(tmp_path, capsys):
    sightline("demo", "--out", tmp_path / "run", *TINY)
    said = capsys.readouterr().out
    assert "deletion_auc" in said and "random_map (control)" in said
    assert said.strip().endswith(f"report: {tmp_path / 'run' / 'report.html'}")
    sightline("demo", "--out", tmp_path / "run", "--resume", *TINY)
    assert "report: " in capsys.readouterr().out


def test_several_seeds_give_a_mean_with_its_spread(tmp_path, capsys):
    sightline("train", "--data", "clutter", "--out", tmp_path / "runs", "--seeds", "0,1", *TINY)
    assert "test accuracy over 2 seeds: " in capsys.readouterr().out
    assert (tmp_path / "runs" / "seed-1" / "report.html").is_file()


def test_evaluate_on_other_masks_and_metrics(run, tmp_path, capsys):
    chosen = ["--methods", "grad_cam,attention@attention.conv10", "--metrics", "energy_in_mask", "--limit", 5]
    data = ["--data", "clutter-shortcut", "--data.mask", "patch"]
    sightline("evaluate", run, *data, *chosen, "--out", tmp_path / "patch")
    said = capsys.readouterr().out
    assert "deletion_auc" not in said and "vgg_att2 on clutter-shortcut (test), 5 images" in said
    assert (tmp_path / "patch" / "report.html").is_file()


def test_explain_writes_a_page_per_image_raw_maps_and_a_table(run, tmp_path, capsys):
    folder = tmp_path / "images" / "sub"
    folder.mkdir(parents=True)
    for name, size in [("a.png", (40, 40)), ("b.jpg", (60, 50))]:
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3), np.uint8)).save(folder / name)
    (folder.parent / "a.png").write_bytes((folder / "a.png").read_bytes())
    (folder / "broken.png").write_bytes(b"")
    out = tmp_path / "maps"
    sightline("explain", run, folder.parent, "--methods", "attention,grad_cam", "--target", 3, "--out", out)
    said = capsys.readouterr()
    assert "skipped" in said.err and "broken.png" in said.err and "3 images x 2 methods" in said.out
    rows = list(csv.DictReader((out / "maps.csv").read_text().splitlines()))
    assert len(rows) == 6 and {row["class"] for row in rows} == {"3"}
    stems = ["a", "a-2", "b"]
    assert sorted({row["maps"] for row in rows}) == stems
    names = {path.name for path in out.iterdir()}
    assert f"index: {out / 'index.html'}" in said.out
    assert names == {"maps.csv", "index.html", *(f"{stem}{end}" for stem in stems for end in (".npz", "--page.png"))}
    raw = np.load(out / "b.npz")
    assert set(raw) == {"attention", "grad_cam"} and raw["attention"].sum() == pytest.approx(1, abs=1e-4)
    with Image.open(out / "b--page.png") as page:  # 50 x 60 pixels, enlarged seven times, with a margin
        assert page.width == 3 * (7 * 50 + 4) - 4 + 24 and page.height > 7 * 60
    assert "broken.png" in refused(capsys, "explain", run, folder, "--strict", "--out", tmp_path / "strict")


def test_explain_by_every_method_that_fits(run, tmp_path, capsys):
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 255, (40, 40, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    out = tmp_path / "maps"
    images = [tmp_path / "0.png", tmp_path / "1.png"]
    sightline("explain", run, *images, "--methods", "all", "--batch-size", 100, "--out", out)
    said = capsys.readouterr()
    lines = [line.removeprefix("left out: ") for line in said.err.splitlines() if line.startswith("left out: ")]
    left_out = dict(line.split(": ", 1) for line in lines)
    assert "expected time: " in said.err
    assert left_out.keys() == {"cam", "attention_rollout", "gradient_rollout"} and "another head" in left_out["cam"]
    rows = list(csv.DictReader((out / "maps.csv").read_text().splitlines()))
    made = list(dict.fromkeys(row["method"] for row in rows))
    assert sorted([*made, *left_out]) == sorted(EXPLAINERS) and f"2 images x {len(made)} methods" in said.out
    assert "rectifiers intercepted" not in said.out and "  saliency:" not in said.out
    verdicts = {row["method"]: row["verdicts"] for row in rows}
    assert verdicts["guided_backprop"].startswith("rectifiers intercepted: ")
    level = {row["method"]: row["level"] for row in rows}
    assert level["guided_backprop"] == "note" and level["saliency"] == verdicts["saliency"] == ""
    counts = Counter(row["level"] for row in rows)
    graver = ", ".join(f"{counts[of]} {of}" for of in ("do not read", "doubt", "note") if counts[of])
    assert f"; {sum(row['verdicts'] != '' for row in rows)} maps with a verdict ({graver}), see maps.csv" in said.out
    positions = {row["method"]: row["positions"] for row in rows}
    assert positions["attention"] == "5 x 5" and positions["saliency"] == "40 x 40"
    finer = "for finer maps train with a larger --data.size or name an earlier --layer"
    assert f"\n5 x 5 positions (coarse; {finer}): attention, " in said.out and "\n40 x 40 positions: " in said.out
    signed = {row["method"] for row in rows if EXPLAINERS[row["method"]].is_signed}
    assert {"input_x_gradient", "occlusion"} < signed and not {"saliency", "eigen_cam"} & signed
    raw = np.load(out / "0.npz")
    image = torch.from_numpy(np.array(Image.open(images[0]))).movedim(-1, 0)[None]
    name, share = rows[0]["class"], float(rows[0]["probability"])
    doubts = {row["method"]: row["verdicts"].replace("; ", "\n") for row in rows[: len(made)]}
    layers = {row["method"]: f"{row['layer']}, " if row["layer"] else "" for row in rows}
    levels = {row["method"]: row["level"].replace("note", "").replace(" ", "\u00a0") for row in rows[: len(made)]}
    shown = {name: f"control: {words(name)}" if EXPLAINERS[name].is_control else words(name) for name in made}
    titles = {name: f"{shown[name]} ({levels[name]})" if levels[name] else shown[name] for name in made}
    coarse = {name: " (coarse)" if grid == "5 x 5" else "" for name, grid in positions.items()}
    places = {name: f"{layers[name]}{grid} positions{coarse[name]}" for name, grid in positions.items()}
    expected = maps.side_by_side(
        image.repeat_interleave(6, 2).repeat_interleave(6, 3),
        {
            titles[method]: torch.from_numpy(raw[method])[None, None]
            for method in sorted(made, key=lambda method: EXPLAINERS[method].is_control)
        },
        signed=[titles[method] for method in made if method in signed],
        scales=True,
        captions={titles[method]: f"{places[method]}\n{doubts[method]}".strip() for method in made},
        per_row=6,
        heading=f"explained: {name} ({percent(share)}), the prediction\nnetwork: vgg_att2, image: 0.png",
    )
    page = np.array(Image.open(out / "0--page.png"))
    assert np.array_equal(page[12:-12, 12:-12], expected.movedim(0, -1).numpy())
    assert (page[:12] == 255).all() and (page[:, -12:] == 255).all()


def test_explain_draws_on_the_image_as_it_is(run, tmp_path):
    rng = np.random.default_rng(0)
    pixels = np.kron(rng.integers(0, 255, (6, 13, 3), np.uint8), np.ones((100, 100, 1), np.uint8))
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    turned = Image.fromarray(pixels)
    exif = turned.getexif()
    exif[0x0112] = 6  # to be shown turned by a quarter
    turned.save(tmp_path / "turned.jpg", exif=exif)
    given = [run, tmp_path / "wide.png", tmp_path / "turned.jpg", "--methods", "grad_cam,input_x_gradient"]
    sightline("explain", *given, "--overlays", "--out", tmp_path / "maps")
    size = (448, round(448 * 600 / 1300))
    picture = torch.from_numpy(np.array(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR)))
    raw = np.load(tmp_path / "maps" / "wide.npz")
    for method, signed in (("grad_cam", False), ("input_x_gradient", True)):
        with Image.open(tmp_path / "maps" / f"wide--{method}.png") as drawn:
            expected = maps.overlay(
                picture.movedim(-1, 0)[None], torch.from_numpy(raw[method])[None, None], 0.5, signed
            )
            assert drawn.size == size and np.array_equal(np.array(drawn), expected[0, 0].movedim(0, -1).numpy())
        with Image.open(tmp_path / "maps" / f"turned--{method}.png") as drawn:
            assert drawn.size == size[::-1]
    with Image.open(tmp_path / "maps" / "wide--page.png") as page:
        below = 4 + 11 + 22  # colors, values
        foot = len(maps._texts(["", "conv, 5 x 5 positions (coarse)", "40 x 40 positions"], 448, 15, "ma")[0])
        cell = np.array(page)[-(size[1] + below + foot + 12) :, 12 : 12 + size[0]]
        assert page.width == 3 * (448 + 4) - 4 + 24 and (cell[: size[1]] == picture.numpy()).all()


def test_a_map_lands_where_the_network_saw_it(run, tmp_path):
    pixels = np.full((60, 300, 3), 90, np.uint8)
    pixels[20:30, 230:260] = 250
    Image.fromarray(pixels).save(tmp_path / "dot.png")
    given = [run, tmp_path / "dot.png", "--methods", "contrast_map", "--overlays"]
    sightline("explain", *given, "--out", tmp_path / "maps")
    drawn = np.array(Image.open(tmp_path / "maps" / "dot--contrast_map.png")).astype(int)
    assert drawn.shape == (60, 300, 3)
    ys, xs = np.nonzero(drawn[..., 0] - drawn[..., 2] > 50)  # red and yellow, the upper half of the scale
    assert abs(ys.mean() - 24.5) < 2 and abs(xs.mean() - 244.5) < 6 and 100 < len(ys) < 1500


def test_explain_a_class_by_its_name_beside_the_prediction(tmp_path, capsys):
    import timm

    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=3)
    model.get_classifier().bias.data[:] = torch.tensor([0.0, 30.0, 0.0])
    safetensors.torch.save_file(model.state_dict(), tmp_path / "weights.safetensors")
    (tmp_path / "classes.txt").write_text("cat\ndog\nfish\n")
    Image.new("RGB", (90, 80), "red").save(tmp_path / "red.png")
    given = ["explain", "resnet10t", tmp_path / "red.png", "--weights", tmp_path / "weights.safetensors"]
    given += ["--classes", tmp_path / "classes.txt", "--out", tmp_path / "out"]
    for layer in ("layer3", "layer3 (256 x 10 x 10)"):  # as the explanation has it
        sightline(*given, "--target", "fish", "--layer", layer)
        (row,) = csv.DictReader((tmp_path / "out" / "maps.csv").read_text().splitlines())
        assert (row["class"], row["prediction"], row["layer"]) == ("fish", "dog", "layer3")
        assert float(row["prediction_probability"]) > 0.99 > 0.01 > float(row["probability"])
        assert row["shape"].startswith("256 x ")
    sightline(*given, "--target", "0")
    (row,) = csv.DictReader((tmp_path / "out" / "maps.csv").read_text().splitlines())
    assert row["class"] == "cat"
    capsys.readouterr()
    said = refused(capsys, *given, "--target", "fisch")
    assert "expected the target class by name or index, one of 3 classes such as cat, dog, fish, got 'fisch'" in said
    assert "did you mean 'fish'?" in said


def test_explain_reports_progress_within_the_batch_size(run, tmp_path, monkeypatch):
    Image.new("RGB", (40, 40), "red").save(tmp_path / "red.png")
    told = []
    monkeypatch.setattr(terminal.Bar, "update", lambda bar, *what: told.append(what))
    given = [run, tmp_path / "red.png", "--methods", "occlusion,grad_cam", "--batch-size", 100]
    sightline("explain", *given, "--out", tmp_path / "maps")
    counts = [done for what, done, _ in told if what == "occlusion"]
    assert told == [*(("occlusion", done, 361) for done in counts), ("explaining", 1, 1)]
    steps = [after - before for before, after in zip([0, *counts], counts, strict=False)]
    assert counts[-1] == 361 and max(steps) == 100 and min(steps) > 0


def test_progress_without_a_terminal_is_a_line_every_half_minute_with_the_time_left(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: clock[0])
    with terminal.Bar() as bar:
        for at, done in ((10, 100), (20, 200), (35, 300), (50, 400), (70, 800)):
            clock[0] = float(at)
            bar.update("rise", done, 2000)
        clock[0] = 105.0
        bar.update("rise", 100, 2000)  # the next image
        clock[0] = 140.0
        bar.update("rise", 2000, 2000)
        bar.tell("expected time: 2 min")
    assert capsys.readouterr().err.splitlines() == [
        "rise: 300 of 2,000, 3 min 32 s left",  # 200 in 25 s
        "rise: 800 of 2,000, 1 min 43 s left",  # 700 in 60 s
        "rise: 100 of 2,000",
        "rise: 2,000 of 2,000",
        "expected time: 2 min",
    ]


def test_explain_takes_memory_and_fast(run, tmp_path, capsys):
    Image.new("RGB", (40, 40), "red").save(tmp_path / "red.png")
    sightline("explain", run, tmp_path / "red.png", "--methods", "fast", "--memory", "50MB", "--out", tmp_path / "maps")
    with (tmp_path / "maps" / "maps.csv").open() as file:
        methods = {row["method"] for row in csv.DictReader(file)}
    assert {"attention", "grad_cam"} <= methods and "rise" not in methods
    capsys.readouterr()
    said = refused(capsys, "explain", run, tmp_path / "red.png", "--memory", "lots", "--out", tmp_path / "no")
    assert "expected memory in bytes or as 500MB, 2GB or 1GiB, got 'lots'" in said
    chosen = ["--methods", "fast", "--metrics", "sparsity", "--limit", 2, "--memory", "1GiB"]
    sightline("evaluate", run, *chosen, "--out", tmp_path / "fast")
    assert "saliency" in capsys.readouterr().out


def pages_of(verdicts):
    rest = {"folder": Path("maps"), "rows": [], "positions": {}, "written": frozenset(), "left_out": {}}
    return Pages(verdicts=verdicts, **rest, skipped=(), unchecked=(), notices=())


def test_verdicts_are_counted_by_level_and_keep_a_figure_that_is_always_the_same():
    flat, note = Verdict("flat", "do not read"), Verdict("rectifiers intercepted", "note", details="49")
    gaps = [
        Verdict("conservation gap", details="88 % of the logit reaches the pixels"),
        Verdict("conservation gap", details="30 % of the logit reaches the pixels"),
        Verdict("conservation gap", "note", details="98 % of the logit reaches the pixels"),
    ]
    verdicts = {"lrp": [[gaps[0]], [flat, gaps[1]], [gaps[2]]], "grad_cam": [[], [], []], "guided": [[note]] * 3}
    verdicts["rollout"] = [[Verdict("gap", details="49")]] * 3
    assert list(pages_of(verdicts).doubts()) == [
        "  do not read: lrp: flat (1 image)",
        "  doubt: lrp: conservation gap (2 images)",
        "  doubt: rollout: gap: 49 (3 images)",
    ]
    assert pages_of(verdicts).levels() == "9 maps with a verdict (1 do not read, 4 doubt, 4 note)"
    assert pages_of({"cam": [[]]}).levels() == "0 maps with a verdict"
    assert titled("lrp", [flat, gaps[1]]) == "LRP (do\u00a0not\u00a0read)" and titled("guided", [note]) == "guided"
    assert (
        caption((7, 7), Layer("bn2", (9, 7, 7)), [flat, note])
        == "bn2, 7 x 7 positions\nflat\nrectifiers intercepted: 49"
    )
    assert caption((4, 9), Layer(), []) == "4 x 9 positions (coarse)"


def test_positions_are_named_and_what_gives_more_of_them():
    assert positions((7, 9), True, True) == "7 x 9 positions"
    assert positions((4, 4), True, False) == "4 x 4 positions (coarse; for finer maps name an earlier --layer)"
    assert positions((9, 4), False, True).endswith("(coarse; for finer maps train with a larger --data.size)")
    assert positions((4, 4), False, False) == "4 x 4 positions"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run of a network without attention."""
    out = tmp_path_factory.mktemp("plain") / "run"
    sightline("train", "--data", "clutter", "--model", "vgg_gap", "--out", out, *TINY)
    return out


def test_train_says_once_what_the_evaluation_decided(run, monkeypatch, capsys):
    trained = replace(runs.open_run(run), notices=["of the images"])
    monkeypatch.setattr("sightline.training.fit", lambda *_, **__: trained)
    evaluated = SimpleNamespace(notices=("of the images", "of the model"))
    monkeypatch.setattr(cli, "_evaluate", lambda *_, **__: evaluated)
    sightline("train", "--data", "clutter", "--out", run)
    assert capsys.readouterr().err == "notice: of the model\n"


def test_evaluating_all_methods_names_those_that_do_not_fit(plain, tmp_path, capsys, monkeypatch):
    three = {name: EXPLAINERS[name] for name in ("attention", "cam", "saliency")}
    monkeypatch.setattr(sys.modules["sightline.evaluation.evaluate"], "EXPLAINERS", three)
    cheap = ("--metrics", "sparsity", "--limit", 2, "--controls", "random_map")
    capsys.readouterr()
    sightline("evaluate", plain, "--methods", "all", "--out", tmp_path / "out", *cheap)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("left out")]
    assert line.startswith("left out: attention: expected an attention block")
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert result["methods"][-2:] == ["saliency", "random_map"]


def test_a_named_method_that_does_not_fit_is_left_out_if_others_fit(plain, tmp_path, capsys):
    Image.new("RGB", (40, 40), "red").save(tmp_path / "red.png")
    capsys.readouterr()
    explained = ["explain", plain, tmp_path / "red.png", "--out", tmp_path / "out"]
    evaluated = ["evaluate", plain, "--limit", 2, "--steps", 2, "--metrics", "deletion_auc", "--out", tmp_path / "out"]
    reason = "left out: attention: expected an attention block with a spatial map, got VGGGap without one"
    for given in (explained, evaluated):
        sightline(*given, "--methods", "attention,grad_cam")
        said = capsys.readouterr()
        assert said.err.startswith(reason) and said.err.count("left out") == 1
        assert ("1 image x 1 method in" if given is explained else "grad_cam") in said.out
        for methods in ("attention", "attention,attention_rollout", "attention,grad_cam@nowhere"):
            assert "left out" not in refused(capsys, *given, "--methods", methods)
        assert "expected an attention block" in refused(capsys, *given, "--methods", "attention,grad_cam", "--strict")
        assert "did you mean 'grad_cam'?" in refused(capsys, *given, "--methods", "attention,grad_kam")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "left out: attention" in page and "without one; blocks of this model: none" in page


def test_explain_any_model_with_its_weights(tmp_path):
    import timm

    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=3)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "weights.safetensors")
    (tmp_path / "classes.txt").write_text("cat\ndog\nfish\n")
    Image.new("RGB", (100, 80), "red").save(tmp_path / "red.png")
    given = ["--weights", tmp_path / "weights.safetensors", "--classes", tmp_path / "classes.txt"]
    sightline(
        "explain", "resnet10t", tmp_path / "red.png", *given, "--methods", "cam,grad_cam", "--out", tmp_path / "out"
    )
    rows = list(csv.DictReader((tmp_path / "out" / "maps.csv").read_text().splitlines()))
    assert {row["class"] for row in rows} <= {"cat", "dog", "fish"} and rows[0]["layer"].startswith("layer4")


def test_print_recipe_shows_every_field_and_trains_nothing(tmp_path, capsys):
    sightline("train", "--data", "cifar10", "--optim.epochs", "3", "--print-recipe", "--out", tmp_path / "none")
    said = capsys.readouterr().out
    (tmp_path / "said.yaml").write_text(said)
    found = recipe.load(tmp_path / "said.yaml")
    assert found.data.source == "cifar10" and found.optim.epochs == 3 and not (tmp_path / "none").exists()


def test_list_has_one_line_for_each_thing(capsys):
    sightline("list")
    said = capsys.readouterr().out
    for name in ("clutter-shortcut", "vgg_att3", "ltpa", "grad_cam", "random_map", "energy_in_mask"):
        assert sum(line.split()[:1] == [name] for line in said.splitlines()) == 1
    assert "$" not in said and "\\" not in said
    assert (
        "  cam                        Channels weighted by the linear layer behind global average pooling, summed, no"
        in said
    )
    sightline("list", "metrics")
    assert "grad_cam" not in capsys.readouterr().out


@pytest.mark.parametrize("verb", [(), ("train",), ("evaluate",), ("explain",), ("demo",), ("list",)])
def test_help(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        sightline(*verb, "--help")
    said = capsys.readouterr().out
    assert stop.value.code == 0 and said.startswith("usage: sightline")
    assert ("--optim.label_smoothing" in said) == (verb in [("train",), ("demo",)])
    assert ("--data.source" in said) == (verb in [("train",), ("evaluate",), ("demo",)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "did you mean 'train'?"),
        (["train", "--data", "cluter", "--out", "{}"], "did you mean 'clutter'"),
        (["train", "--model", "vgg_att22", "--out", "{}"], "did you mean 'vgg_att2'"),
        (["train", "--optim.epoch", "3", "--out", "{}"], "did you mean 'optim.epochs'?"),
        (["train", "--optim.epochs", "three", "--out", "{}"], "expected a whole number or null, got 'three'"),
        (["train", "--optim.epochs", "--out", "{}"], "--optim.epochs: expected a value, got none"),
        (["train", "--model.options.widht", "1", "--out", "{}"], "vgg_att2 has no option 'widht'"),
        (["train"], "expected --out FOLDER for the run, got none"),
        (["train", "--recipe", "nowhere.yaml", "--out", "{}"], "recipe nowhere.yaml not found"),
        (["train", "--data", "{}/nothing", "--out", "{}"], "nothing"),
        (["explain", "nowhere/run", "a.png", "--out", "{}"], "nowhere/run: no such run folder"),
        (["explain", "resnet18", "a.png", "--out", "{}"], "expected --weights FILE for model 'resnet18'"),
        (["explain", "resnet18", "a.png", "--optim.lr", "1", "--out", "{}"], "expected no recipe field with explain"),
        (["explain", "resnet18", "a.png", "--batch-size", "0", "--out", "{}"], "expected a whole number of at least 1"),
        (["explain", "resnet18", "a.png", "--steps", "3", "--out", "{}"], "unrecognized arguments: --steps 3"),
        (["evaluate", "nowhere"], "nowhere: no such run"),
        (["evaluate", "nowhere", "--limit", "0"], "expected a whole number of at least 1, got '0'"),
        (
            ["train", "--data.size", "100000", "--data.train_size", "20", "--data.test_size", "10", "--out", "{}"],
            "allocate",
        ),
        (["list", "maps"], "'maps' is none of"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path, capsys):
    assert message in refused(capsys, *(argument.format(tmp_path / "out") for argument in arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "gradcam"], "did you mean 'grad_cam'?"),
        (["--methods", "grad_cam@features.conv99"], "did you mean 'features.conv"),
        (["--metrics", "deletion"], "did you mean 'deletion_auc'?"),
        (["--split", "dev"], "expected a split with images out of train, val, test, got 'dev'"),
        (["--fill", "gray"], "got 'gray'"),
        (["--optim.lr", "1"], "--optim.lr: expected only data fields with evaluate; leave it out"),
        (["--methods", "cam"], "for cam, got another head; use grad_cam"),
        (["--output", "head"], "expected output= that the model returns, got 'head' and a tensor of shape"),
        (["--output", "head,odds"], "expected output= a key, an index, an attribute or a function, 'logits' or"),
        (["--output", "probabilities"], "expected probabilities from 0 to 1, got"),
    ],
)
def test_bad_evaluation_is_one_line(arguments, message, run, tmp_path, capsys):
    assert message in refused(capsys, "evaluate", run, *arguments, "--out", tmp_path / "out")
    assert not list((tmp_path / "out").glob("*"))


def test_data_that_lie_elsewhere_now(tmp_path, monkeypatch, capsys):
    for name in ("cat", "dog"):
        (tmp_path / "here" / "animals" / name).mkdir(parents=True)
        for i in range(10):
            Image.new("RGB", (20, 20), (i, 0, 0)).save(tmp_path / "here" / "animals" / name / f"{i}.png")
    monkeypatch.chdir(tmp_path / "here")
    small = ["--model.options.width=0.0625", "--model.options.stem_pool=2", "--optim.epochs=1", "--data.size=32"]
    sightline("train", "--data", "animals", "--out", tmp_path / "run", *small, "--limit=2")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    said = refused(capsys, "evaluate", tmp_path / "run")
    assert "'animals'" in said and "the run was trained on animals: pass --data PATH" in said
    assert "the run was" not in refused(capsys, "evaluate", tmp_path / "run", "--data", "beasts")


def test_a_run_without_weights_or_of_other_classes(run, tmp_path, capsys):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("recipe.yaml", "run.json", "metrics.csv"):
        (bare / name).write_bytes((run / name).read_bytes())
    assert "has no model.safetensors" in refused(capsys, "evaluate", bare)
    for name in ("cat", "dog"):
        (tmp_path / "animals" / name).mkdir(parents=True)
        for i in range(10):
            Image.new("RGB", (20, 20), (i, 0, 0)).save(tmp_path / "animals" / name / f"{i}.png")
    said = refused(capsys, "evaluate", run, "--data", tmp_path / "animals", "--out", tmp_path / "out")
    assert "expected data with the classes of the run, got 'cat'" in said


def test_output_that_cannot_be_written(run, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    for out in (tmp_path / "file", Path("/proc/sightline")):
        said = refused(capsys, "explain", run, tmp_path / "a.png", "--out", out)
        assert "is a file" in said or "cannot write to /proc/sightline" in said
        refused(capsys, "evaluate", run, "--out", out)
        refused(capsys, "train", "--data", "clutter", "--out", out, *TINY)


def test_a_full_disk_leaves_no_half_written_file(run, tmp_path):
    # every file that the process writes may grow to 4 KiB only, as on a disk that is full
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "from sightline.cli import main\n"
        f"main(['evaluate', {str(run)!r}, '--limit', '2', '--steps', '2', '--out', {str(tmp_path / 'out')!r}])"
    )
    # -B: Python would keep the first 4 KiB of its compiled files
    done = subprocess.run([sys.executable, "-B", "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.startswith("sightline: error: ") and "Traceback" not in done.stderr
    assert not list((tmp_path / "out").glob("*"))


def test_ctrl_c_ends_in_one_line_and_can_be_resumed(tmp_path):
    out = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "sightline",
        "train",
        "--data",
        "clutter",
        "--out",
        str(out),
        *TINY,
        "--optim.epochs=200",
    ]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    deadline = time.monotonic() + 120
    while not (out / "model.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in said
    assert "sightline: stopped in epoch" in said and "--resume" in said
    assert not any(path.name.endswith((".tmp", ".part")) for path in out.iterdir())


def test_images_of_one_name_keep_maps_of_their_own():
    taken = set()
    names = [free_name(name, taken) for name in ("a", "a", "a-2", "b", "a")]
    assert names == ["a", "a-2", "a-2-2", "b", "a-3"]


def test_compare_counts_what_each_block_adds(capsys):
    import timm

    own = sum(parameter.numel() for parameter in timm.create_model("resnet10t").parameters())
    sightline("list", "attention", "--compare", "resnet10t")
    said = capsys.readouterr().out
    for block in attention.ATTENTION:
        assert f"│ {block} " in said
    plain, se = (next(line for line in said.splitlines() if line.startswith(f"│ {name} ")) for name in ("none", "se"))
    assert f"{own:,} (+0.0%)" in plain
    # four residual branches of 64, 128, 256 and 512 channels; two layers with biases each
    added = sum(2 * c * (c // 16) + c // 16 + c for c in (64, 128, 256, 512))
    assert f"{own + added:,} (" in se
    assert "expected --compare with `list attention`" in refused(capsys, "list", "models", "--compare", "resnet10t")


# --- memory -----------------------------------------------------------------------------------------------------------


class Allocator:
    """Stands in for the C library."""

    def __init__(self):
        self.calls = []

    def mallopt(self, number, value):
        self.calls.append((number, value))
        return 1


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is the C library of Linux")
@pytest.mark.parametrize(
    ("name", "value", "count"),
    [
        (None, "", 2),
        ("SIGHTLINE_KEEP_MEMORY", "1", 2),
        ("SIGHTLINE_KEEP_MEMORY", "0", 0),
        ("MALLOC_TRIM_THRESHOLD_", "1000", 0),
        ("MALLOC_ARENA_MAX", "1", 0),
        ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=1000", 0),
        ("GLIBC_TUNABLES", "glibc.rtld.optional_static_tls=512", 2),
    ],
)
def test_freed_memory_is_kept_unless_the_environment_decides(name, value, count, monkeypatch):
    for set_already in [key for key in os.environ if key.startswith(("MALLOC_", "GLIBC_", "SIGHTLINE_KEEP"))]:
        monkeypatch.delenv(set_already)
    if name is not None:
        monkeypatch.setenv(name, value)
    libc = Allocator()
    monkeypatch.setattr(cli.ctypes, "CDLL", lambda _: libc)
    monkeypatch.setattr(cli.os, "confstr", lambda _: "glibc 2.36")
    cli.keep_freed_memory()
    assert libc.calls == [(-1, 2**31 - 1), (-3, 2**25)][:count]


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(cli.os, "confstr_names", {})
    monkeypatch.setattr(cli.ctypes, "CDLL", lambda _: pytest.fail("another C library was loaded"))
    cli.keep_freed_memory()


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is the C library of Linux")
def test_kept_memory_is_used_again_without_page_faults():
    script = (
        "import resource, sys, torch\n"
        "from sightline import cli\n"
        "cli.keep_freed_memory()\n"
        "make = lambda: [torch.empty(2**21).fill_(1) for _ in range(3)] and None\n"
        "for _ in range(6): make()\n"  # until free places of every alignment are there
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "make()\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)\n"
    )
    faults = []
    for kept in "10":
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_"))}
        environment["SIGHTLINE_KEEP_MEMORY"] = kept
        if kept == "0":  # alone, glibc adapts to sizes that recur, so that it keeps them in some processes
            environment["MALLOC_MMAP_THRESHOLD_"] = "131072"
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
        )
        faults.append(int(done.stdout))
    assert faults[0] < 100 and faults[1] > 2000


def test_an_interrupt_says_that_nothing_is_broken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.VERBS, "list", interrupted)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["list"])
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "sightline: stopped; no half-written file was left behind\n"
