"""`sightline slides`: a folder and a table become a run, maps and a page; bad input is one line."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("openslide")

from tests.slide_files import pyramid

import sightline as sl
from sightline import cli
from sightline.data import Preprocess
from sightline.slides.bags import Grid, write_bags
from sightline.slides.study import open_slide_run

PINK, VIOLET, GLASS = (220, 120, 180), (120, 60, 160), (240, 240, 240)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Slides of six patients: pink tissue; every second has one violet tile, at row 1 and column 2."""
    folder = tmp_path_factory.mktemp("lab")
    (folder / "slides").mkdir()
    lines = ["slide,label,patient"]
    for i in range(6):
        colors = np.array([[PINK] * 4] * 3, dtype=np.uint8)
        colors[2, 3] = GLASS
        if i % 2:
            colors[1, 2] = VIOLET
        pixels = np.repeat(np.repeat(colors, 64, 0), 64, 1)
        pyramid(folder / "slides" / f"s{i}.tif", pixels, 1, 8.0)
        lines.append(f"s{i}.tif,{'tumor' if i % 2 else 'healthy'},p{i}")
    (folder / "slides.csv").write_text("\n".join(lines))
    torch.manual_seed(0)
    torch.save(sl.create_model("cifar_resnet").state_dict(), folder / "weights.pth")
    square = [[128, 64], [192, 64], [192, 128], [128, 128], [128, 64]]
    area = {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [square]}}
    (folder / "s1.geojson").write_text(json.dumps(area))
    cli.main(command(folder))
    return folder


def command(folder: Path, **changes: str) -> list[str]:
    options = {
        "slides": str(folder / "slides"), "labels": str(folder / "slides.csv"), "model": "cifar_resnet",
        "weights": str(folder / "weights.pth"), "size": "32", "tile-mpp": "16", "workers": "0", "folds": "3",
        "repeats": "1", "epochs": "2", "out": str(folder / "run"),
    } | changes  # fmt: skip
    return ["slides", "train", *(word for name, value in options.items() for word in (f"--{name}", value))]


def failing(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    return error


def test_a_second_call_reads_nothing_again(lab: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(command(lab))
    printed = capsys.readouterr().out
    assert "features of 6 slides, all from before" in printed
    assert "6 slides (3 healthy, 3 tumor) of 6 patients, 3 folds by" in printed and "attention" in printed


def test_the_page_of_a_training(lab: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All slides with the prediction of networks that had not seen them, the worst first, and those left out."""
    (tmp_path / "slides.csv").write_text((lab / "slides.csv").read_text() + "\ngone.tif,tumor,p9\n")
    cli.main(command(lab, labels=str(tmp_path / "slides.csv")))
    printed = capsys.readouterr()
    assert f"page: {lab / 'run' / 'slides.html'}" in printed.out and "skipped gone.tif" in printed.err
    page = (lab / "run" / "slides.html").read_text()
    run = open_slide_run(lab / "run")
    mean = run.probabilities("attention").mean(0)
    own = mean[np.arange(6), list(run.labels)]
    lines = re.findall(r'<th scope="row" data-value="(s\d.tif)">.*?<td class="count" data-value="([\d.e-]+)">', page)
    order = np.argsort(own, kind="stable")
    assert [(name, float(value)) for name, value in lines] == [(run.slides[i], own[i]) for i in order]
    assert page.count("✗ wrong") == int((mean.argmax(1) != np.array(run.labels)).sum())
    assert "Attention" in page.split("<h1>")[1] and "gone.tif" in page.split('id="skipped"')[1]


def test_time_left_over_all_slides(tmp_path: Path) -> None:
    """From the second slide on, it is the mean time of those before times the number of those to come."""
    files = [pyramid(tmp_path / f"{i}.tif", np.full((64, 64, 3), PINK, dtype=np.uint8), 1, 8.0) for i in range(3)]
    told: list[str] = []
    how = Preprocess(size=(32, 32), mean=(0.5,) * 3, std=(0.5,) * 3), Grid(size=32, mpp=16.0)
    network = sl.create_model("cifar_resnet")
    write_bags(files, tmp_path / "bags", network, *how, progress=lambda what, done, total: told.append(what))
    assert told[0] == "0.tif (1 of 3)"
    assert [re.sub(r"\d+ s left", "T left", what) for what in told[1:]] == [
        "1.tif (2 of 3, T left)",
        "2.tif (3 of 3, T left)",
    ]


def test_maps_and_page(lab: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The planted tile is where the files say."""
    slide = str(lab / "slides" / "s1.tif")
    cli.main(
        ["slides", "explain", str(lab / "run"), slide, "--target", "tumor", "--annotations", str(lab / "s1.geojson"),
         "--out", str(lab / "maps"), "--workers", "0", "--inside", "3"]
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert "in the annotation" in printed and "random tiles" in printed and "s1.html" in printed
    names = {file.name for file in (lab / "maps").iterdir()}
    assert names == {"s1.html", "s1.geojson", "s1.csv", "s1.attention.ome.tif", "s1.grad_cam.ome.tif"}
    tiles = json.loads((lab / "maps" / "s1.geojson").read_text())["features"]
    assert len(tiles) == 11
    assert [[128, 64], [192, 64], [192, 128], [128, 128], [128, 64]] in [t["geometry"]["coordinates"][0] for t in tiles]
    page = (lab / "maps" / "s1.html").read_text()
    assert (
        page.count("<h3>") == 2
        and "had seen no slide of this patient" in page
        and "http://" not in page.split("<body>")[1].replace("http://www.w3.org", "")
    )
    table = (lab / "maps" / "s1.csv").read_text().splitlines()
    annotated = [line.split(",")[-1] for line in table[1:]]
    assert sorted(map(float, annotated))[-1] == 1.0 and sum(map(float, annotated)) == 1.0


def test_a_new_slide(lab: Path) -> None:
    """Its features go beside its maps, not into the run."""
    file = pyramid(lab / "new.tif", np.full((192, 256, 3), PINK, dtype=np.uint8), 1, 8.0)
    cli.main(["slides", "explain", str(lab / "run"), str(file), "--out", str(lab / "new"), "--workers", "0"])
    assert (lab / "new" / "bags" / "new.tif.safetensors").is_file() and (lab / "new" / "new.html").is_file()
    assert not (lab / "run" / "bags" / "new.tif.safetensors").exists()
    page = (lab / "new" / "new.html").read_text()
    assert "This slide is not part of the run" in page and "had seen no slide of this patient" not in page


def test_another_slide_of_the_same_name(lab: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It must not be drawn with the features of the run's slide."""
    file = pyramid(tmp_path / "s1.tif", np.full((128, 128, 3), PINK, dtype=np.uint8), 1, 8.0)
    start = ["slides", "explain", str(lab / "run"), str(file), "--out", str(tmp_path / "out"), "--workers", "0"]
    assert "expected the slide of the features, 256 x 192 pixels, got one of 128 x 128 pixels" in failing(capsys, start)
    both = [*start[:4], str(lab / "slides" / "s1.tif"), *start[4:]]
    assert "expected slides of different names, got s1 twice" in failing(capsys, both)


def test_features_of_other_weights(lab: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A new slide has no features yet that could tell it."""
    torch.manual_seed(1)
    torch.save(sl.create_model("cifar_resnet").state_dict(), tmp_path / "other.pth")
    file = pyramid(tmp_path / "other.tif", np.full((192, 256, 3), PINK, dtype=np.uint8), 1, 8.0)
    start = ["slides", "explain", str(lab / "run"), str(file), "--out", str(tmp_path / "out"), "--workers", "0"]
    assert "expected the network of the run, weights " in failing(
        capsys, [*start, "--weights", str(tmp_path / "other.pth")]
    )


def test_one_slide_does_not_stop_the_others(lab: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One without annotated areas, and one whose file is gone though its features are there."""
    (tmp_path / "s0.geojson").write_text('{"type": "FeatureCollection", "features": []}')
    (tmp_path / "s1.geojson").write_text((lab / "s1.geojson").read_text())
    slides = [str(lab / "slides" / name) for name in ("s0.tif", "s1.tif")]
    (lab / "slides" / "s5.tif").rename(lab / "s5.tif")
    arguments = [*slides, str(lab / "slides" / "s5.tif"), "--annotations", str(tmp_path), "--inside", "1"]
    try:
        cli.main(["slides", "explain", str(lab / "run"), *arguments, "--out", str(tmp_path / "out"), "--workers", "0"])
    finally:
        (lab / "s5.tif").rename(lab / "slides" / "s5.tif")
    printed = capsys.readouterr()
    assert "without annotations: s0.tif" in printed.err and "skipped s5.tif: no file" in printed.err
    assert printed.out.count("page: ") == 2 and "in the annotation" in printed.out


def test_large_maps_are_bounded(lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tifffile

    monkeypatch.setattr("sightline.report.slides._LONGEST", 16)
    slide = str(lab / "slides" / "s1.tif")
    cli.main(["slides", "explain", str(lab / "run"), slide, "--out", str(tmp_path), "--workers", "0"])
    for name in ("s1.attention.ome.tif", "s1.grad_cam.ome.tif"):
        with tifffile.TiffFile(tmp_path / name) as tiff:
            assert tiff.series[0].shape == (12, 16, 3) and 'PhysicalSizeX="128.0"' in (tiff.ome_metadata or "")


def test_the_network_of_the_map_is_left_alone(lab: Path, tmp_path: Path) -> None:
    from sightline.report.slides import explain_slide
    from sightline.slides import networks, read_bag, study

    network, preprocess, _ = networks.open_network("cifar_resnet", str(lab / "weights.pth"))
    network.train()
    run, bag = study.open_slide_run(lab / "run"), read_bag(lab / "run" / "bags" / "s1.tif.safetensors")
    explain_slide(run, lab / "slides" / "s1.tif", bag, network, preprocess, tmp_path, tiles=1)
    assert all(part.training for part in network.modules())


def test_a_class_without_readable_slides(lab: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The slides that were left out are named before the end; too few patients in the table end it at once."""
    lines = ["slide,label,patient", "s0.tif,healthy,p0", "s2.tif,healthy,p2", "bad1.tif,tumor,a", "bad2.tif,tumor,b"]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    with pytest.raises(SystemExit):
        cli.main(command(lab, labels=str(tmp_path / "a.csv"), out=str(tmp_path / "out")))
    error = capsys.readouterr().err
    assert "skipped bad1.tif: no file" in error and "got none of tumor" in error
    (tmp_path / "a.csv").write_text("\n".join(lines[:4]))
    assert "got one of tumor" in failing(
        capsys, command(lab, labels=str(tmp_path / "a.csv"), out=str(tmp_path / "early"))
    )
    assert not (tmp_path / "early").exists()


def test_bad_input_of_training(lab: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    table = tmp_path / "other.csv"
    for changes, reason in [
        ({"slides": str(tmp_path / "none")}, f"no folder {tmp_path / 'none'}"),
        ({"slides": str(tmp_path)}, f"none of the 6 slides of the table is in {tmp_path}; the first is s0.tif"),
        ({"labels": str(tmp_path / "none.csv")}, "none.csv"),
        ({"label": "grade"}, "expected a column 'grade', got slide, label, patient; rename one"),
        ({"weights": str(tmp_path / "none.pth")}, "none.pth"),
        ({"poolings": "sum"}, "expected a pooling out of attention, uniform, mean, max, top_k; got 'sum'"),
        ({"tissue": "2"}, "expected a probability from 0 to 1, got '2'"),
        ({"tile-mpp": "0"}, "expected a number above 0, got '0'"),
        ({"overlap": "32"}, "expected an overlap from 0 to below the tile's 32 pixels, got 32; lower it"),
        ({"tile-mpp": "4"}, "expected tiles of 8 micrometers per pixel or more"),
        ({"folds": "1"}, "expected 2 folds or more"),
    ]:
        assert reason in failing(capsys, command(lab, out=out, **changes)), changes
    table.write_text("slide,label,patient\ns0.tif,healthy,p\ns1.tif,tumor,q\ns2.tif,healthy,r\n")
    assert "two patients or more of each class, got one of tumor" in failing(
        capsys, command(lab, out=out, labels=str(table))
    )
    assert "choose another folder" in failing(capsys, command(lab, size="16"))
    assert "expected --weights FILE" in failing(
        capsys, [w for w in command(lab, out=out) if w not in ("--weights", str(lab / "weights.pth"))]
    )
    file = tmp_path / "file"
    file.touch()
    assert "is a file; expected a folder to write to" in failing(capsys, command(lab, out=str(file)))


def test_bad_input_of_maps(lab: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slide, out = str(lab / "slides" / "s1.tif"), ["--out", str(tmp_path / "out"), "--workers", "0"]
    start = ["slides", "explain", str(lab / "run"), slide, *out]
    (tmp_path / "points.geojson").write_text(
        '{"type": "Feature", "geometry": {"type": "Point", "coordinates": [1, 2]}}'
    )
    for arguments, reason in [
        ([*start, "--target", "cat"], "expected a class out of healthy, tumor; got 'cat'"),
        ([*start, "--method", "grad_cams"], "did you mean 'grad_cam'?"),
        ([*start, "--annotations", str(tmp_path / "points.geojson")], "expected annotations with an area, got none"),
        ([*start, "--annotations", str(tmp_path / "none.geojson")], "none.geojson"),
        (["slides", "explain", str(tmp_path), slide, *out], "expected a run of `sightline slides train`"),
    ]:
        assert reason in failing(capsys, arguments), arguments
    (tmp_path / "bad.svs").write_bytes(b"no slide")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["slides", "explain", str(lab / "run"), str(tmp_path / "bad.svs"), *out])
    assert stopped.value.code == 1 and "bad.svs: expected a slide" in capsys.readouterr().err
