"""Published data sets in the folders of their authors: stand-ins with the same files, a few small images each."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from sightline.data import load
from sightline.recipe import Data

SIDE = 40
SPLIT = ("train",) * 6 + ("test",) * 4


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("SIGHTLINE_CACHE", str(tmp_path_factory.mktemp("cache")))


def photo(file: Path, number: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    Image.fromarray(pixels).save(file, quality=95)


def square(file: Path, values: dict[int, tuple[slice, slice]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((SIDE, SIDE), np.uint8)
    for value, where in values.items():
        pixels[where] = value
    Image.fromarray(pixels).save(file)


def birds(root: Path) -> Path:
    names = ("001.Black_footed_Albatross", "002.Laysan_Albatross")
    lines: dict[str, list[str]] = {
        f: [] for f in ("images", "image_class_labels", "train_test_split", "bounding_boxes")
    }
    for i in range(20):
        kind, part = i % 2, SPLIT[i // 2]
        path = f"{names[kind]}/{names[kind][4:]}_{i:04d}_{796000 + i}.jpg"
        photo(root / "images" / path, i)
        square(root / "segmentations" / Path(path).with_suffix(".png"), {255: (slice(4, 12), slice(8, 20))})
        lines["images"].append(f"{i + 1} {path}")
        lines["image_class_labels"].append(f"{i + 1} {kind + 1}")
        lines["train_test_split"].append(f"{i + 1} {int(part == 'train')}")
        lines["bounding_boxes"].append(f"{i + 1} 8.0 4.0 12.0 8.0")
    lines["classes"] = [f"{i + 1} {name}" for i, name in enumerate(names)]
    for name, content in lines.items():
        (root / f"{name}.txt").write_text("\n".join(content) + "\n")
    (root / "attributes").mkdir()
    return root


def aircraft(root: Path) -> Path:
    boxes: list[str] = []
    parts: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for i in range(20):
        part = ("train", "train", "val", "test", "test")[i // 4]
        photo(root / "images" / f"{1000000 + i}.jpg", i)
        parts[part].append(f"{1000000 + i} {('Boeing 707-320', 'A300B4')[i % 2]}")
        boxes.append(f"{1000000 + i} 9 5 20 12")  # counted from 1, the last pixel included
    for part, lines in parts.items():
        (root / f"images_variant_{part}.txt").write_text("\n".join(lines))
    (root / "images_box.txt").write_text("\n".join(boxes))
    return root


def cars(root: Path) -> Path:
    fields = [*((f"bbox_{side}", "O") for side in ("x1", "y1", "x2", "y2")), ("class", "O"), ("fname", "O")]
    for part, count in (("train", 12), ("test", 8)):
        lines = []
        for i in range(count):
            photo(root / f"cars_{part}" / f"{i + 1:05d}.jpg", i + 100 * (part == "test"))
            lines.append((9, 5, 20, 12, i % 2 + 1, f"{i + 1:05d}.jpg"))
        name = "devkit/cars_train_annos.mat" if part == "train" else "cars_test_annos_withlabels.mat"
        (root / "devkit").mkdir(exist_ok=True)
        savemat(root / name, {"annotations": np.array(lines, dtype=fields)})
    savemat(root / "devkit" / "cars_meta.mat", {"class_names": np.array(["AM General Hummer", "Acura RL"], object)})
    return root


def flowers(root: Path) -> Path:
    for i in range(20):
        photo(root / "jpg" / f"image_{i + 1:05d}.jpg", i)
    savemat(root / "imagelabels.mat", {"labels": np.array([[10 if i % 2 else 9 for i in range(20)]])})
    numbers = np.arange(1, 21)[None]
    savemat(root / "setid.mat", {"trnid": numbers[:, :8], "valid": numbers[:, 8:12], "tstid": numbers[:, 12:]})
    return root


def pets(root: Path) -> Path:
    lists: dict[str, list[str]] = {"trainval": [], "test": []}
    for i in range(20):
        name = f"{('Abyssinian', 'american_bulldog')[i % 2]}_{i}"
        photo(root / "images" / f"{name}.jpg", i)
        # 1 the animal, 2 the background, 3 its border
        trimap = {2: (slice(None), slice(None)), 3: (slice(3, 13), slice(7, 21)), 1: (slice(4, 12), slice(8, 20))}
        square(root / "annotations" / "trimaps" / f"{name}.png", trimap)
        lists["trainval" if i < 12 else "test"].append(f"{name} {i % 2 + 1} {i % 2 + 1} 1")
    for part, lines in lists.items():
        (root / "annotations" / f"{part}.txt").write_text("\n".join(lines))
    return root


KINDS = {
    birds: (["001.Black_footed_Albatross", "002.Laysan_Albatross"], {"train": 12, "test": 8}, "CUB-200-2011"),
    aircraft: (["A300B4", "Boeing 707-320"], {"train": 8, "val": 4, "test": 8}, "FGVC-Aircraft"),
    cars: (["AM General Hummer", "Acura RL"], {"train": 12, "test": 8}, "Stanford Cars"),
    flowers: (["9", "10"], {"train": 8, "val": 4, "test": 8}, "Oxford 102 Flowers"),
    pets: (["Abyssinian", "american_bulldog"], {"train": 12, "test": 8}, "Oxford-IIIT Pet"),
}
"""Classes, images of each split (a missing val is drawn from train), name."""


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_the_official_folder_is_read_with_its_split_boxes_and_masks(kind, tmp_path):
    classes, counts, title = KINDS[kind]
    (tmp_path / "set").mkdir()
    root = kind(tmp_path / "set")
    sets = load(Data(source=str(root), val=0.0))
    assert sets["train"].classes == tuple(classes) and {split: len(part) for split, part in sets.items()} == counts
    assert sets["train"].name == title and any(title in notice for notice in sets["train"].notices)
    test = sets["test"].batch(range(8))
    assert np.bincount(test.labels).tolist() == [4, 4]
    if kind in (birds, aircraft, cars):
        assert test.boxes is not None
        assert [box.tolist() for box in test.boxes] == [[[8.0, 4.0, 20.0, 12.0]]] * 8
    if kind in (birds, pets):
        where = np.zeros((SIDE, SIDE), bool)
        where[4:12, 8:20] = True
        assert test.masks is not None and (test.masks.numpy() == where).all()


def test_pixels_and_labels_belong_together(tmp_path):
    root = birds(tmp_path)
    sets = load(Data(source=str(root), val=0.0))
    for name, label in zip(sets["test"].names, sets["test"].labels, strict=True):
        assert sets["test"].classes[label] in name
    first = sets["train"].batch([0])
    stored = np.asarray(Image.open(root / first.names[0]))
    assert (first.images[0].movedim(0, -1).numpy() == stored).all()


@pytest.mark.parametrize("place", [".", "images", ".."])
def test_the_folder_above_and_its_images_are_the_same_source(place, tmp_path):
    (tmp_path / "CUB_200_2011").mkdir()
    root = birds(tmp_path / "CUB_200_2011")
    found = load(Data(source=str((root / place).resolve()), val=0.0))
    assert found["train"].name == "CUB-200-2011" and len(found["train"]) == 12 and found["test"].has_boxes


def test_masks_of_birds_may_lie_beside_their_folder(tmp_path):
    (tmp_path / "CUB_200_2011").mkdir()
    root = birds(tmp_path / "CUB_200_2011")
    shutil.move(root / "segmentations", tmp_path / "segmentations")
    assert load(Data(source=str(root)))["test"].has_masks
    shutil.rmtree(tmp_path / "segmentations")
    assert not load(Data(source=str(root)))["test"].has_masks


@pytest.mark.parametrize(
    ("kind", "file", "message"),
    [
        (birds, "classes.txt", "classes.txt is missing; unpack the archive again"),
        (birds, "images/001.Black_footed_Albatross/Black_footed_Albatross_0000_796000.jpg", "1 of 20 images of CUB"),
        (aircraft, "images_variant_test.txt", "images_variant_test.txt is missing"),
        (
            cars,
            "cars_test_annos_withlabels.mat",
            "withlabels.mat is missing; the authors offer it as a download of its own",
        ),
        (flowers, "setid.mat", "setid.mat is missing"),
        (pets, "annotations/test.txt", "test.txt is missing"),
    ],
)
def test_a_missing_file_is_named(kind, file, message, tmp_path):
    root = kind(tmp_path)
    (root / file).unlink()
    with pytest.raises(FileNotFoundError, match=message):
        load(Data(source=str(root)))


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "birds").mkdir()
    root = birds(tmp_path / "birds")
    (root / "classes.txt").write_text("1 only\n")
    with pytest.raises(ValueError, match="the lists of CUB-200-2011 do not belong together"):
        load(Data(source=str(root)))
    (root / "images.txt").write_text("1\n")
    with pytest.raises(ValueError, match=r"images\.txt, line 1: expected 2 words, got '1'"):
        load(Data(source=str(root)))
    (tmp_path / "flowers").mkdir()
    root = flowers(tmp_path / "flowers")
    (root / "setid.mat").write_bytes(b"no Matlab")
    with pytest.raises(ValueError, match=r"setid\.mat: expected a Matlab file with trnid and valid and tstid"):
        load(Data(source=str(root)))
    with pytest.raises(ValueError, match=r"data\.label names a column, but CUB-200-2011 has none"):
        load(Data(source=str(tmp_path / "birds"), label="kind"))
