"""Bad input at the command line: one line that says what to do, nothing lost, nothing left behind."""

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tests.test_cli import refused, sightline
from tests.test_data_images import bomb

TINY = ["--model.options.width=0.0625", "--optim.epochs=1", "--optim.batch_size=4", "--data.size=24", "--limit=4"]
TINY += ["--methods=grad_cam", "--steps=2"]


def picture(kind=0, seed=0):
    """A reddish or greenish noise of 20 x 24 pixels."""
    pixels = np.random.default_rng(seed).integers(0, 80, (24, 20, 3), np.uint8)
    pixels[..., kind] += 120
    return Image.fromarray(pixels)


def folder(root, classes=("cat", "dog"), n=6):
    for kind, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(n):
            picture(kind, i).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """Good images among every kind of odd one."""
    root = folder(tmp_path_factory.mktemp("odd"), n=12)
    cats = root / "cat"
    whole = (cats / "0.png").read_bytes()
    (cats / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (cats / "empty.png").write_bytes(b"")
    (cats / "text.jpg").write_text("this is no image")
    (cats / "bomb.png").write_bytes(bomb(30_000))
    (cats / "gone.png").symlink_to(root / "nowhere.png")
    picture().save(root / "loose.png")
    Image.fromarray(np.full((24, 20), 40_000, np.uint16)).save(cats / "sixteen-bit.png")
    picture().convert("CMYK").save(cats / "cmyk.jpg")
    picture().convert("P").save(cats / "palette.png")
    picture().save(cats / "animated.gif", save_all=True, append_images=[picture(1)])
    Image.new("RGB", (1, 1), "red").save(cats / "one-pixel.png")
    return root


UNREADABLE = {
    "cat/truncated.png": "image file is truncated",
    "cat/empty.png": "the file is empty",
    "cat/text.jpg": "not an image of a known format",
    "cat/bomb.png": "refused as a decompression bomb, more than 178,956,970 pixels; scale it down",
    "cat/gone.png": "a link to a file that does not exist",
    "loose.png": "lies in no class folder",
}


def test_odd_images_are_used_and_unreadable_ones_are_listed(odd, tmp_path, capsys):
    run = tmp_path / "run"
    sightline("train", "--data", odd, "--out", run, *TINY)
    said = capsys.readouterr().err
    listed = json.loads((run / "run.json").read_text())["skipped"]
    assert dict(listed) == UNREADABLE
    page = (run / "report.html").read_text()
    for name, reason in UNREADABLE.items():
        assert f"skipped {name}: {reason}\n" in said and name in page
    sightline("explain", run, odd / "cat", "--out", tmp_path / "maps")
    explained = {row["maps"] for row in csv.DictReader((tmp_path / "maps" / "maps.csv").read_text().splitlines())}
    assert explained == {str(i) for i in range(12)} | {"sixteen-bit", "cmyk", "palette", "animated", "one-pixel"}
    said = capsys.readouterr()
    assert "17 images x 1 method in " in said.out and said.err.count("skipped ") == 5
    sightline("explain", run, odd / "dog", "--out", tmp_path / "maps")
    assert f"other files remain in {tmp_path / 'maps'}" in capsys.readouterr().err
    for verb in (["train", "--data", odd], ["explain", run, odd]):
        said = refused(capsys, *verb, "--strict", "--out", tmp_path / "strict")
        assert "odd" in said or "cat/" in said
        assert not (tmp_path / "strict").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", ""], "expected one name or several, A,B,..., got ''; see sightline list"),
        (["--layer", ""], "argument --layer: expected a name, got an empty one"),
        (["--methods", "grad_cam,grad_cam"], "got 'grad_cam' twice; ask for it once"),
        (["--target", "2"], "expected targets in 0..1, got 2..2; the model has 2 classes, counted from 0"),
        (["--layer", "features.conv133"], "got 'features.conv133'; did you mean 'features.conv13'"),
        (["--out", ""], "argument --out: expected a name, got an empty one"),
        (["--out", "{images}"], "expected an output folder other than that of the images"),
    ],
)
def test_bad_requests_for_maps(arguments, message, tmp_path_factory, tmp_path, capsys):
    images = folder(tmp_path / "images")
    run = tmp_path_factory.getbasetemp() / "bad-maps"
    if not run.exists():
        sightline("train", "--data", images, "--out", run, *TINY)
        capsys.readouterr()
    before = sorted(images.rglob("*"))
    arguments = [argument.format(images=images) for argument in arguments]
    assert message in refused(capsys, "explain", run, images, "--out", tmp_path / "out", *arguments)
    assert sorted(images.rglob("*")) == before and not (tmp_path / "out").exists()


def test_bad_folders(tmp_path, capsys):
    def said(name, *arguments):
        text = refused(capsys, "train", "--data", tmp_path / name, "--out", tmp_path / "run", *TINY, *arguments)
        assert not (tmp_path / "run").exists()
        return text

    folder(tmp_path / "empty-class")
    (tmp_path / "empty-class" / "fish").mkdir()
    assert "empty-class/fish holds no image; add some or remove the folder" in said("empty-class")
    folder(tmp_path / "one-class", classes=("cat",))
    assert "expected at least two classes to tell apart, got only 'cat'" in said("one-class")
    folder(tmp_path / "only-test" / "test")
    assert "expected training images, got only test; add some, or split again" in said("only-test")
    (tmp_path / "nothing").mkdir()
    assert "expected a sub-folder of images per class in" in said("nothing")
    folder(tmp_path / "good")
    assert "augment.crop: expected less than the side of the images, 24, got 24" in said("good", "--augment.crop", 24)
    assert "vgg_att2 cannot be trained on batches of 1 images of 24 x 24 pixels: " in said(
        "good", "--optim.batch_size", 1
    )
    assert "seeds: expected different whole numbers from 0 to 2**32 - 1" in said("good", "--seeds", 2**32)
    assert "names a column, but" in said("good", "--data.group", "patient")


def test_a_class_without_test_images_is_said(tmp_path, capsys):
    folder(tmp_path / "data" / "train")
    folder(tmp_path / "data" / "test", classes=("cat",))
    sightline("train", "--data", tmp_path / "data", "--out", tmp_path / "run", *TINY)
    assert "No image shows dog" in capsys.readouterr().out


@pytest.fixture
def rows(tmp_path):
    """Parquet in the Hugging Face layout; the mask of the first image has another size."""

    def png(image):
        image.save(tmp_path / "cell.png")
        return {"bytes": (tmp_path / "cell.png").read_bytes(), "path": None}

    return [
        {
            "image": png(picture(i % 2, i)),
            "label": ["cat", "dog"][i % 2],
            "mask": png(Image.new("L", (20, 24) if i else (5, 5), 255)),
            "share": 0.5,
            "list": [1, 2],
        }
        for i in range(24)
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.label", "list"], "expected text or whole numbers in column 'list', got List"),
        (["--data.label", "image"], "expected text or whole numbers in column 'image', got images"),
        (["--data.label", "share"], "expected class names or whole numbers in column 'share'"),
        (["--data.group", "mask"], "expected text or whole numbers in column 'mask', got images"),
        (["--data.image", "share"], "expected images, or their paths, in column 'share'"),
        (["--data.mask", "share"], "expected images, or their paths, in column 'share'"),
        (["--data.mask", "label"], "its mask cannot be read: No such file or directory"),
        (["--data.mask", "msk"], "no column 'msk' (data.mask) in"),
        (["--data.box", "label"], "expected boxes [x0, y0, x1, y1], got"),
    ],
)
def test_bad_columns(arguments, message, rows, tmp_path, capsys):
    rows[0]["mask"] = rows[1]["mask"]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    said = refused(capsys, "train", "--data", tmp_path / "rows.parquet", "--out", tmp_path / "run", *TINY, *arguments)
    assert message in said and not (tmp_path / "run").exists()


def test_bad_rows(rows, tmp_path, capsys):
    file, run = tmp_path / "rows.parquet", tmp_path / "run"
    pq.write_table(pa.Table.from_pylist(rows), file)
    sightline("train", "--data", file, "--out", run, *TINY)
    assert "expected a mask as large as its image, 20 x 24 pixels, got 5 x 5" in capsys.readouterr().err
    pq.write_table(pa.Table.from_pylist([row | {"label": None} if i < 3 else row for i, row in enumerate(rows)]), file)
    said = refused(capsys, "train", "--data", file, "--out", tmp_path / "other", *TINY)
    assert "3 of 24 train images have no label" in said
    file.write_bytes(b"PAR1 and then nothing")
    assert "as parquet: " in refused(capsys, "train", "--data", file, "--out", tmp_path / "other", *TINY)
    (tmp_path / "notes.txt").write_text("x")
    said = refused(capsys, "train", "--data", tmp_path / "notes.txt", "--out", tmp_path / "other", *TINY)
    assert "expected a folder, a .parquet, .csv or .jsonl file or the name of a data set, got the file" in said
    said = refused(capsys, "train", "--data", "clutter", "--data.streaming", "true", "--out", tmp_path / "other")
    assert "data.streaming needs parquet files or a hub name, got clutter" in said
    said = refused(capsys, "train", "--data", "clutter", "--data.label", "digit", "--out", tmp_path / "other")
    assert "data.label names a column, but clutter is composed" in said
    assert not (tmp_path / "other").exists()


def test_bad_files_beside_a_model(tmp_path, capsys):
    picture().save(tmp_path / "a.png")
    (tmp_path / "notes.txt").write_text("x")
    given = ["explain", "resnet10t", tmp_path / "a.png", "--out", tmp_path / "out", "--weights"]
    assert "expected weights as safetensors or as torch.save writes them, cannot read" in refused(
        capsys, *given, tmp_path / "notes.txt"
    )
    classes = ["--classes", tmp_path / "a.png"]
    said = refused(capsys, *given, tmp_path / "notes.txt", *classes)
    assert "a.png: expected a text file with one class name per line" in said
    assert "no such" in refused(capsys, *given, tmp_path / "nowhere.safetensors").lower()
    assert not Path(tmp_path / "out").exists()


def test_a_training_that_diverges_stops_and_says_where(tmp_path, capsys):
    folder(tmp_path / "data")
    with pytest.raises(SystemExit) as stop:
        sightline("train", "--data", tmp_path / "data", "--optim.lr", "1e30", "--out", tmp_path / "run", *TINY)
    *_, said = capsys.readouterr().err.splitlines()  # after the header of the training
    assert stop.value.code == 2 and said.startswith("sightline: error: ")
    assert "in epoch 1, step " in said and "lower optim.lr or set optim.clip_norm" in said
