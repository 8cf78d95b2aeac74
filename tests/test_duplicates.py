"""The same image twice: in training and test, or with two labels."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter
from sklearn.datasets import load_digits
from tests.test_bad_input import folder
from tests.test_cli import sightline

from sightline.data import load, load_whole
from sightline.data.duplicates import copies, imprint
from sightline.recipe import Data, Model, Optim, Recipe
from sightline.training import fit

SMALLEST = Model(options={"width": 0.0625})


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("SIGHTLINE_CACHE", str(tmp_path_factory.mktemp("cache")))


def photograph(number: int, side: int = 64) -> Image.Image:
    """Smooth blobs, as different from one another as photographs are."""
    small = np.random.default_rng(number).integers(0, 256, (6, 6, 3), np.uint8)
    return Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC)


def fill(root: Path, counts: dict[str, range]) -> Path:
    for name, numbers in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in numbers:
            photograph(i).save(root / name / f"{i:03d}.png")
    return root


def sizes(sets) -> dict[str, int]:
    return {split: len(images) for split, images in sets.items()}


def stored(image: Image.Image, kind: str = "PNG", **options) -> np.ndarray:
    file = io.BytesIO()
    image.save(file, kind, **options)
    pixels = np.asarray(Image.open(file).convert("RGB").resize((64, 64), Image.Resampling.BILINEAR))
    return imprint(file.getvalue(), np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def test_copies_in_the_test_part_are_told_and_can_be_left_out(tmp_path):
    fill(tmp_path / "train", {"cat": range(8), "dog": range(10, 18)})
    fill(tmp_path / "test", {"cat": range(20, 24), "dog": range(30, 34)})
    shutil.copy(tmp_path / "train" / "cat" / "001.png", tmp_path / "test" / "cat" / "copy.png")
    for _ in range(2):  # the second time from the cache
        sets = load(Data(source=str(tmp_path), val=0.0))
        assert sizes(sets) == {"train": 16, "test": 9}
        assert (
            sets["test"].notices
            == sets["train"].notices
            == (
                "1 of 9 test images are copies of images in an earlier split, such as test/cat/copy.png and "
                "train/cat/001.png: they flatter the scores; --drop-duplicates leaves them out",
            )
        )
        sets = load(Data(source=str(tmp_path), val=0.0, drop_duplicates=True))
        assert sizes(sets) == {"train": 16, "test": 8} and "test/cat/copy.png" not in sets["test"].names
        assert sets["test"].notices[0].endswith("they flatter the scores; were left out")
    # pixels, labels and names still belong together
    whole = load(Data(source=str(tmp_path), val=0.0))["test"]
    rows = [whole.names.index(name) for name in sets["test"].names]
    kept = sets["test"].batch(range(8))
    assert (kept.images == whole.batch(rows).images).all() and kept.labels.tolist() == whole.labels[rows].tolist()


def test_images_with_two_labels_are_left_out_everywhere(tmp_path):
    fill(tmp_path, {"cat": range(20), "dog": range(20, 40)})
    for i in range(4):
        shutil.copy(tmp_path / "cat" / f"{i:03d}.png", tmp_path / "dog" / f"{i:03d}.png")
    sets = load(Data(source=str(tmp_path)))
    assert sum(sizes(sets).values()) == 44
    assert any(
        n.startswith("8 images are copies of one another with different labels, such as") for n in sets["test"].notices
    )
    sets = load(Data(source=str(tmp_path), drop_duplicates=True))
    names = {name for images in sets.values() for name in images.names}
    assert len(names) == 36 and not {f"{kind}/{i:03d}.png" for kind in ("cat", "dog") for i in range(4)} & names


def test_a_test_part_of_copies_alone_is_refused(tmp_path):
    fill(tmp_path / "train", {"cat": range(5), "dog": range(10, 15)})
    shutil.copytree(tmp_path / "train", tmp_path / "test")
    notice = load(Data(source=str(tmp_path), val=0.0))["test"].notices[0]
    assert notice.startswith("10 of 10 test images are copies of images in an earlier split")
    with pytest.raises(ValueError, match="expected test images that are not copies, got 10 copies; add others"):
        load(Data(source=str(tmp_path), val=0.0, drop_duplicates=True))
    assert len(load_whole(Data(source=str(tmp_path)))["test"].notices) == 1


def test_images_that_are_decoded_on_the_fly_are_compared_too(tmp_path):
    fill(tmp_path / "train", {"cat": range(5), "dog": range(10, 15)})
    fill(tmp_path / "test", {"cat": range(3, 8), "dog": range(20, 23)})
    sets = load(Data(source=str(tmp_path), val=0.0, size=257, drop_duplicates=True))
    assert sizes(sets) == {"train": 10, "test": 6} and sets["test"].batch([0, 5]).names == [
        "test/cat/005.png",
        "test/dog/022.png",
    ]


def test_what_looks_alike_is_told_apart_from_copies(tmp_path):
    fill(tmp_path / "train", {"cat": range(8), "dog": range(10, 18)})
    fill(tmp_path / "test", {"cat": range(20, 24), "dog": range(30, 34)})
    photograph(1).save(tmp_path / "test" / "cat" / "again.jpg", quality=80)
    photograph(12, 96).save(tmp_path / "test" / "cat" / "larger.png")
    sets = load(Data(source=str(tmp_path), val=0.0, drop_duplicates=True))
    assert sizes(sets)["test"] == 10
    assert sets["test"].notices == (
        "2 of 10 test images look like an image in an earlier split, such as test/cat/again.jpg and train/cat/001.png: "
        "compare them; none was left out",
        "2 images look like one with another label, such as train/dog/012.png and test/cat/larger.png: compare them; "
        "none was left out",
    )


CHANGES = {
    "jpeg 90": lambda image: (image, "JPEG", {"quality": 90}),
    "jpeg 60": lambda image: (image, "JPEG", {"quality": 60}),
    "webp": lambda image: (image, "WEBP", {"quality": 80}),
    "smaller": lambda image: (image.resize((48, 48)), "PNG", {}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_recoded_or_resized_copy_looks_alike(change):
    """Of 40 images nearly all are recognized, each as itself."""
    first = [stored(photograph(i)) for i in range(40)]
    second = [
        stored(image, kind, **options) for image, kind, options in (CHANGES[change](photograph(i)) for i in range(40))
    ]
    found = copies(np.array(first + second), np.repeat([0, 1], 40), np.zeros(80, np.int64))
    matched = found.alike[40:]
    assert (found.earlier == -1).all() and set((matched - np.arange(40))[matched >= 0]) == {0}
    assert (matched >= 0).sum() >= 34


def test_similar_images_do_not_look_alike():
    """Neighboring tiles, flat images, blurred digits of one class, mirror images."""
    large = photograph(0, 640).filter(ImageFilter.GaussianBlur(2))
    tiles = [large.crop((8 * i, 0, 8 * i + 64, 64)) for i in range(60)]
    flat = [Image.new("RGB", (64, 64), (v, v, v)) for v in range(20)]
    scans = load_digits().images[:300].astype(np.uint8) * 15
    digits = [Image.fromarray(scan).convert("RGB").resize((64, 64), Image.Resampling.BILINEAR) for scan in scans]
    mirrored = [photograph(i).transpose(Image.Transpose.FLIP_LEFT_RIGHT) for i in range(10)]
    everything = [*tiles, *flat, *digits, *mirrored, *(photograph(i) for i in range(10))]
    n = len(everything)
    found = copies(np.array([stored(image) for image in everything]), np.arange(n), np.zeros(n, np.int64))
    assert (found.earlier == -1).all() and (found.alike >= 0).sum() == 0


def test_copies_against_a_plain_loop():
    rng = np.random.default_rng(0)
    prints = np.array([stored(photograph(i)) for i in range(12)])[rng.integers(0, 12, 60)]
    splits, labels = rng.integers(0, 3, 60), rng.integers(-1, 2, 60)
    found = copies(prints, splits, labels)
    same = [[np.array_equal(a["file"], b["file"]) for b in prints] for a in prints]
    for i in range(60):
        earlier = [j for j in range(60) if same[i][j] and splits[j] < splits[i]]
        other = [j for j in range(60) if same[i][j] and min(labels[i], labels[j]) >= 0 and labels[i] != labels[j]]
        assert (found.earlier[i] in earlier) if earlier else found.earlier[i] == -1
        assert (found.relabeled[i] in other) if other else found.relabeled[i] == -1
    assert (found.alike == -1).all() and (found.alike_relabeled == -1).all()


def test_the_command_line_and_the_report_tell_of_copies(tmp_path, capsys):
    folder(tmp_path / "data", n=8)
    shutil.copy(tmp_path / "data" / "cat" / "0.png", tmp_path / "data" / "dog" / "cat.png")
    run = tmp_path / "run"
    fit(Recipe(data=Data(source=str(tmp_path / "data"), size=24), model=SMALLEST, optim=Optim(epochs=1)), run)
    notice = "2 images are copies of one another with different labels, such as "
    assert f"notice: {notice}" in capsys.readouterr().err
    assert json.loads((run / "run.json").read_text())["notices"][0].startswith(notice)
    cheap = ("--methods", "center_map", "--metrics", "sparsity", "--limit", 2)
    sightline("evaluate", run, *cheap)
    assert f"notice: {notice}" in capsys.readouterr().err
    assert json.loads((run / "evaluation.json").read_text())["notices"][0].startswith(notice)
    assert notice in (run / "report.html").read_text()
    sightline("evaluate", run, "--drop-duplicates", *cheap)
    assert "all of them were left out" in capsys.readouterr().err
    sightline("train", "--data", tmp_path / "data", "--drop-duplicates", "--max-pixels", 1000, "--print-recipe")
    said = capsys.readouterr().out
    assert "drop_duplicates: true" in said and "max_pixels: 1000" in said
