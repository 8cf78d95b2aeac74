import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from sightline.data import (
    DATASETS,
    Preprocess,
    batches,
    class_lists,
    decoded,
    hugging_face,
    load,
    load_stream,
    load_whole,
    people,
    read_images,
)
from sightline.data.clutter import PARTS
from sightline.recipe import Augment, Data

GRAY = Preprocess(size=(16, 16), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


@pytest.fixture(autouse=True)
def offline(tmp_path_factory, monkeypatch):
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("SIGHTLINE_CACHE", str(cache))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache / "hub")
    return cache


def picture(kind: int, number: int, size: tuple[int, int] = (12, 10)) -> Image.Image:
    """An image whose first pixel tells its class and number."""
    pixels = np.full((size[1], size[0], 3), 100, np.uint8)
    pixels[..., 0], pixels[..., 1] = 20 * kind, number
    return Image.fromarray(pixels)


def make_folder(root: Path, counts: dict[str, int], size: tuple[int, int] = (12, 10)) -> Path:
    for kind, (name, n) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for i in range(n):
            picture(kind, i, size).save(root / name / f"{i:03d}.png")
    return root


def make_parquet(file: Path, n: int = 40, start: int = 0, classes=("ant", "bee"), **columns) -> Path:
    """Rows in the Hugging Face image layout, with other columns asked for as (values, feature)."""
    labels = [i % len(classes) for i in range(n)]
    values = {"image": [picture(k, start + i) for i, k in enumerate(labels)], "label": labels}
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(classes))}
    for name, (cells, feature) in columns.items():
        values[name], features[name] = cells, feature
    file.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(values, features=datasets.Features(features)).to_parquet(file)
    return file


def sizes(sets) -> dict[str, int]:
    return {split: len(images) for split, images in sets.items()}


# folders


def test_a_folder_of_class_folders(tmp_path):
    sets = load(Data(source=str(make_folder(tmp_path / "pets", {"cat": 20, "dog": 10, "eel": 10}))))
    assert sizes(sets) == {"train": 29, "val": 3, "test": 8}
    train = sets["train"]
    assert train.classes == ("cat", "dog", "eel") and train.name == "pets" and train.flip_ok
    assert train.preprocess.size == (12, 12)
    batch = train.batch(range(len(train)))
    assert (batch.images[:, 0, 0, 0] == 20 * batch.labels).all()
    assert [int(name[-7:-4]) for name in batch.names] == batch.images[:, 1, 0, 0].tolist()
    assert batch.names[0].startswith("cat/") and batch.masks is None and batch.boxes is None


@pytest.mark.parametrize("val", ["val", "valid", "validation"])
def test_a_folder_with_its_own_splits(tmp_path, val):
    for split, n in (("train", 6), (val, 3), ("test", 4)):
        make_folder(tmp_path / split, {"cat": n, "dog": n})
    (tmp_path / "docs").mkdir()
    sets = load(Data(source=str(tmp_path)))
    assert sizes(sets) == {"train": 12, "val": 6, "test": 8}
    assert sets["test"].names[0] == "test/cat/000.png"
    assert sizes(load(Data(source=str(tmp_path), resplit=True))) == {"train": 19, "val": 2, "test": 5}


def test_a_class_may_be_called_train(tmp_path):
    sets = load(Data(source=str(make_folder(tmp_path, {"bus": 10, "train": 10}))))
    assert sets["train"].classes == ("bus", "train")


def test_images_in_deeper_folders_count_and_other_files_do_not(tmp_path):
    make_folder(tmp_path, {"a": 5, "b": 5})
    make_folder(tmp_path / "a", {"deep": 5})
    (tmp_path / "a" / "notes.txt").write_text("no image")
    (tmp_path / "a" / ".hidden.png").write_bytes(b"")
    assert sum(sizes(load(Data(source=str(tmp_path)))).values()) == 15


def test_an_empty_class_folder(tmp_path):
    make_folder(tmp_path, {"a": 5, "b": 5, "c": 0})
    with pytest.raises(ValueError, match=r"the class folder .*c holds no image; add some or remove the folder"):
        load(Data(source=str(tmp_path)))


def test_test_images_without_class_folders(tmp_path):
    make_folder(tmp_path / "train", {"a": 5, "b": 5})
    make_folder(tmp_path, {"test": 3})
    sets = load(Data(source=str(tmp_path)))
    assert sizes(sets) == {"train": 7, "val": 1, "test": 2} and all(n.startswith("train/") for n in sets["test"].names)
    assert sets["test"].notices == (
        "3 images in test lie in no class folder and were left out; "
        "images for testing are drawn from those for training",
    )
    make_folder(tmp_path / "loose", {"train": 3})
    make_folder(tmp_path / "loose" / "test", {"a": 3, "b": 3})
    with pytest.raises(
        ValueError, match=r"a sub-folder of images per class in .*train, got 3 images without a class; sort them"
    ):
        load(Data(source=str(tmp_path / "loose")))


def test_one_class_only(tmp_path):
    with pytest.raises(ValueError, match="expected at least two classes to tell apart, got only 'a'"):
        load(Data(source=str(make_folder(tmp_path, {"a": 10}))))


def test_a_folder_has_no_columns(tmp_path):
    with pytest.raises(ValueError, match=r"data\.group names a column, but .* is a folder of images, which has none"):
        load(Data(source=str(make_folder(tmp_path, {"a": 5, "b": 5})), group="patient"))


def test_unknown_sources():
    with pytest.raises(
        FileNotFoundError, match=r"no folder, parquet file or data set 'cluter'; did you mean 'clutter'\?"
    ):
        load(Data(source="cluter"))
    with pytest.raises(FileNotFoundError, match=r"'/no/where'; names: clutter, clutter-shortcut, clutter-pair"):
        load(Data(source="/no/where"))
    with pytest.raises(
        ValueError,
        match=r"expected a folder, a \.parquet, \.csv or \.jsonl file or the name of a data set, got",
    ):
        load(Data(source=__file__))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, r"data\.size: expected 1 or more, or a height and a width such as 256,128, got 0"),
        ({"train_size": -1}, r"data\.train_size: expected 1 or more, got -1"),
        ({"val": 1.5}, r"data\.val: expected 0 or more and below 1, got 1\.5"),
        ({"seed": -1}, r"data\.seed: expected a whole number from 0 to 2\*\*32 - 1, got -1"),
    ],
)
def test_impossible_numbers(options, message):
    with pytest.raises(ValueError, match=message):
        load(Data(**options))


# images that cannot be read


def spoil(folder: Path) -> None:
    (folder / "a" / "000.png").write_bytes(b"")
    (folder / "a" / "001.png").write_text("I am no image")
    whole = (folder / "b" / "002.png").read_bytes()
    (folder / "b" / "002.png").write_bytes(whole[: len(whole) // 2])


def test_unreadable_images_are_listed_and_left_out(tmp_path):
    spoil(make_folder(tmp_path, {"a": 20, "b": 20}, size=(60, 60)))
    for _ in range(2):  # the second time from the cache
        sets = load(Data(source=str(tmp_path)))
        skipped = dict(s for images in sets.values() for s in images.skipped)
        assert skipped.keys() == {"a/000.png", "a/001.png", "b/002.png"}
        assert skipped["a/000.png"] == "the file is empty" and skipped["a/001.png"] == "not an image of a known format"
        assert sum(sizes(sets).values()) == 37
        batch = sets["train"].batch(range(len(sets["train"])))
        assert [int(name[-7:-4]) for name in batch.names] == batch.images[:, 1, 0, 0].tolist()


def test_strict_stops_at_the_first(tmp_path):
    spoil(make_folder(tmp_path, {"a": 20, "b": 20}))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"(a/000|a/001|b/002)\.png: (the file is empty|not an image|.*truncated)"):
            load(Data(source=str(tmp_path), strict=True))


def test_no_image_can_be_read(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(10):
            (tmp_path / name / f"{i}.jpg").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"none of the 14 train images can be read; the first, a/\d\.jpg: the file is empty"
    ):
        load(Data(source=str(tmp_path), test=0.2, val=0.1))


# parquet


def test_parquet_files_with_splits_in_their_names(tmp_path):
    make_parquet(tmp_path / "train-00000-of-00002.parquet", 20)
    make_parquet(tmp_path / "train-00001-of-00002.parquet", 20, start=20)
    make_parquet(tmp_path / "test-00000-of-00001.parquet", 10)
    sets = load(Data(source=str(tmp_path)))
    assert sizes(sets) == {"train": 36, "val": 4, "test": 10}
    assert sets["test"].classes == ("ant", "bee")
    batch = sets["train"].batch(range(36))
    assert (batch.images[:, 0, 0, 0] == 20 * batch.labels).all()
    assert sets["test"].names[:2] == ["test/000000", "test/000001"]


def test_one_parquet_file_and_a_pattern(tmp_path):
    make_parquet(tmp_path / "all.parquet", 40)
    assert sizes(load(Data(source=str(tmp_path / "all.parquet")))) == {"train": 29, "val": 3, "test": 8}
    assert sizes(load(Data(source=str(tmp_path / "*.parquet")))) == {"train": 29, "val": 3, "test": 8}


def test_train_and_test_sizes(tmp_path):
    sets = load(Data(source=str(make_parquet(tmp_path / "all.parquet", 40)), train_size=10, test_size=4))
    assert sizes(sets) == {"train": 10, "val": 3, "test": 4}
    assert np.bincount(sets["train"].labels).tolist() == [5, 5]


def test_columns_can_be_named(tmp_path):
    species = (["x", "y", "z", "z"] * 10, datasets.Value("string"))
    age = ([3, 7, 7, 7] * 10, datasets.Value("int64"))
    file = make_parquet(tmp_path / "a.parquet", 40, species=species, age=age)
    assert load(Data(source=str(file), label="species"))["train"].classes == ("x", "y", "z")
    assert load(Data(source=str(file), label="age"))["train"].classes == ("3", "7")
    with pytest.raises(
        ValueError, match=r"no column 'specis' \(data\.label\) in .*a\.parquet; did you mean 'species'\?"
    ):
        load(Data(source=str(file), label="specis"))
    with pytest.raises(
        ValueError, match=r"no column 'patient' \(data\.group\) .*; columns: image, label, species, age"
    ):
        load(Data(source=str(file), group="patient"))


def test_an_unclear_choice_of_columns(tmp_path):
    kind = datasets.ClassLabel(names=["p", "q"])
    file = make_parquet(tmp_path / "a.parquet", 20, fine=([0, 1] * 10, kind), coarse=([0, 1] * 10, kind))
    renamed = datasets.Dataset.from_parquet(str(file), cache_dir=str(tmp_path / "c")).rename_column("label", "other")
    renamed.to_parquet(file)
    with pytest.raises(
        ValueError, match=r"which column of .* holds the class; name one by data\.label: other, fine, coarse"
    ):
        load(Data(source=str(file)))
    twice = datasets.concatenate_datasets(
        [renamed.rename_column("image", "left"), renamed.select_columns("image").rename_column("image", "right")],
        axis=1,
    )
    twice.to_parquet(file)
    with pytest.raises(ValueError, match=r"which column of .* holds the image; name one by data\.image: left, right"):
        load(Data(source=str(file)))
    assert len(load(Data(source=str(file), image="right", label="fine"))["train"]) == 14


def test_binary_columns_hold_images_too(tmp_path):
    def encoded(kind: int, number: int) -> bytes:
        file = tmp_path / "one.png"
        picture(kind, number).save(file)
        return file.read_bytes()

    raw = ([encoded(i % 2, i) for i in range(20)], datasets.Value("binary"))
    file = make_parquet(tmp_path / "a.parquet", 20, raw=raw)
    sets = load(Data(source=str(file), image="raw"))
    batch = sets["train"].batch(range(len(sets["train"])))
    assert (batch.images[:, 0, 0, 0] == 20 * batch.labels).all()


def test_labels_missing_in_test(tmp_path):
    make_parquet(tmp_path / "train.parquet", 20)
    file = make_parquet(tmp_path / "test.parquet", 10)
    unlabeled = datasets.Dataset.from_parquet(str(file), cache_dir=str(tmp_path / "c"))
    unlabeled.remove_columns("label").to_parquet(file)
    with pytest.raises(ValueError, match=r"the test images of .* have no column 'label', the others do; add it"):
        load(Data(source=str(tmp_path)))
    features = unlabeled.features
    unlabeled.remove_columns("label").add_column("label", [-1] * 10, feature=features["label"]).to_parquet(file)
    with pytest.raises(ValueError, match="10 of 10 test images have no label"):
        load(Data(source=str(tmp_path)))


def test_a_column_of_numbers_is_no_class(tmp_path):
    file = make_parquet(tmp_path / "a.parquet", 20, weight=([0.5] * 20, datasets.Value("float32")))
    with pytest.raises(ValueError, match="expected class names or whole numbers in column 'weight', got Value"):
        load(Data(source=str(file), label="weight"))


def test_a_file_that_is_no_parquet(tmp_path):
    (tmp_path / "a.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match=r"cannot read .*a\.parquet as parquet: .*[Pp]arquet") as error:
        load(Data(source=str(tmp_path)))
    assert "\n" not in str(error.value)


def half(n: int) -> list[Image.Image]:
    """Masks of the left half."""
    mask = np.zeros((10, 12), np.uint8)
    mask[:, :6] = 1
    return [Image.fromarray(mask)] * n


def test_masks_and_boxes_come_with_the_images(tmp_path):
    box = ([[3.0, 0.0, 6.0, 10.0]] * 20, datasets.List(datasets.Value("float32")))
    file = make_parquet(tmp_path / "a.parquet", 20, mask=(half(20), datasets.Image()), bbox=box)
    for _ in range(2):
        images = load(Data(source=str(file), size=24))["train"]
        assert images.has_masks and images.has_boxes
        batch = images.batch([0, 1])
        assert batch.masks[:, 0, :, :12].all() and not batch.masks[:, 0, :, 12:].any()
        torch.testing.assert_close(batch.boxes[0], torch.tensor([[6.0, 0.0, 12.0, 24.0]]))


def test_boxes_may_be_several_or_none(tmp_path):
    several = [[[0.0, 0.0, 6.0, 5.0], [6.0, 5.0, 12.0, 10.0]], [], None, [[0.0, 0.0, 12.0, 10.0]]] * 5
    cells = datasets.List(datasets.List(datasets.Value("float32")))
    file = make_parquet(tmp_path / "a.parquet", 20, cells=(several, cells))
    images = load(Data(source=str(file), box="cells"))["train"]
    areas = {
        int(n[-6:]): r.float().mean().item() for n, r in zip(images.names, images.batch(range(14)).regions, strict=True)
    }
    assert all(abs(area - (0.5, 0, 0, 1)[i % 4]) < 0.01 for i, area in areas.items())


def test_an_image_without_a_mask_has_nothing_marked(tmp_path):
    file = make_parquet(tmp_path / "a.parquet", 20, mask=(half(10) + [None] * 10, datasets.Image()))
    images = load(Data(source=str(file)))["train"]
    marked = images.batch(range(14)).masks.flatten(1).any(1).tolist()
    assert marked == [int(name[-6:]) < 10 for name in images.names]


def test_a_mask_of_another_size_is_told_of(tmp_path):
    masks = [*half(19), Image.new("L", (6, 5))]
    file = make_parquet(tmp_path / "a.parquet", 20, mask=(masks, datasets.Image()))
    skipped = [s for images in load(Data(source=str(file))).values() for s in images.skipped]
    assert skipped == [
        ("000019", "expected a mask as large as its image, 12 x 10 pixels, got 6 x 5; make the two the same size")
    ]
    with pytest.raises(ValueError, match="000019: expected a mask as large as its image"):
        load(Data(source=str(file), strict=True))


def test_boxes_that_are_none(tmp_path):
    box = (["left"] * 20, datasets.Value("string"))
    with pytest.raises(ValueError, match=r"none of the 14 train images.*expected boxes \[x0, y0, x1, y1\], got left"):
        load(Data(source=str(make_parquet(tmp_path / "a.parquet", 20, where=box)), box="where"))


def test_groups_are_kept_apart_and_travel_with_the_images(tmp_path):
    patients = ([f"p{i // 4}" for i in range(40)], datasets.Value("string"))
    file = make_parquet(tmp_path / "a.parquet", 40, patient=patients)
    sets = load(Data(source=str(file), group="patient"))
    groups = {split: set(images.groups.tolist()) for split, images in sets.items()}
    assert groups["train"] | groups["val"] | groups["test"] == {f"p{i}" for i in range(10)}
    assert not groups["train"] & groups["test"] and not groups["train"] & groups["val"]
    assert sets["test"].group_name == "patient"
    assert all(g == f"p{int(n[-6:]) // 4}" for g, n in zip(sets["test"].groups, sets["test"].names, strict=True))


def test_an_image_without_a_group(tmp_path):
    patients = (["p1"] * 19 + [None], datasets.Value("string"))
    with pytest.raises(ValueError, match="1 of 20 images have no 'patient'; every image needs its group"):
        load(Data(source=str(make_parquet(tmp_path / "a.parquet", 20, patient=patients)), group="patient"))


def test_what_the_user_set_for_datasets_is_put_back(tmp_path):
    datasets.enable_progress_bars()
    level = datasets.logging.get_verbosity()
    load(Data(source=str(make_parquet(tmp_path / "a.parquet", 20))))
    assert datasets.is_progress_bar_enabled() and datasets.logging.get_verbosity() == level


def test_loading_prints_nothing(tmp_path, capfd):
    file = make_parquet(tmp_path / "a.parquet", 20)
    capfd.readouterr()
    load(Data(source=str(file)))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("source", ["a.parquet", "cifar10"])
def test_without_datasets_the_install_line_is_printed(source, tmp_path, monkeypatch):
    make_parquet(tmp_path / "a.parquet", 20)
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'sightline\[train\]'"):
        load(Data(source=source))


# hub names


def make_hub(root: Path, parts: dict[str, list[str]], features: dict, rows: dict, config: str | None = None) -> None:
    """A folder laid out as the repository of a set on the hub: parquet files, and their splits in the README."""
    folder = config or "data"
    lines = [f"  - split: {part}\n    path: {folder}/{part}-*" for part in parts]
    (root).mkdir(parents=True)
    text = f"---\nconfigs:\n- config_name: {config or 'default'}\n  data_files:\n" + "\n".join(lines) + "\n---\n"
    (root / "README.md").write_text(text)
    for part in parts:
        (root / folder).mkdir(exist_ok=True)
        table = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
        table.to_parquet(root / folder / f"{part}-00000-of-00001.parquet")


def ten(n: int, config: str | None = None) -> datasets.ClassLabel:
    return datasets.ClassLabel(names=[f"class {i}" for i in range(n)])


PICTURES = [picture(i % 2, i) for i in range(20)]
TWO = [0, 1] * 10
BOX = datasets.List(datasets.Value("float64"))
LAYOUTS = {
    "cifar10": ("train test", {"img": datasets.Image(), "label": ten(10)}, {"img": PICTURES, "label": TWO}),
    "cifar100": (
        "train test",
        {"img": datasets.Image(), "fine_label": ten(100), "coarse_label": ten(20)},
        {"img": PICTURES, "fine_label": TWO, "coarse_label": [0] * 20},
    ),
    "svhn": ("train test extra", {"image": datasets.Image(), "label": ten(10)}, {"image": PICTURES, "label": TWO}),
    "cub200": (
        "train test",
        {"image": datasets.Image(), "label": ten(200), "bbox": BOX},
        {"image": PICTURES, "label": TWO, "bbox": [[0.0, 0.0, 6.0, 5.0]] * 20},
    ),
    "fgvc_aircraft": (
        "train val test",
        {"image": datasets.Image(), "label": ten(100)},
        {"image": PICTURES, "label": TWO},
    ),
    "stanford_cars": (
        "train test contrast",
        {"image": datasets.Image(), "label": ten(196)},
        {"image": PICTURES, "label": TWO},
    ),
    "pcam": (
        "train valid test",
        {"image": datasets.Image(), "label": datasets.Value("bool")},
        {"image": PICTURES, "label": [False, True] * 10},
    ),
}


def at_hub(tmp_path: Path, monkeypatch, name: str) -> None:
    parts, features, rows = LAYOUTS[name]
    alias = hugging_face.ALIASES[name]
    make_hub(tmp_path / name, parts.split(), features, rows, alias.config)
    monkeypatch.setitem(hugging_face.ALIASES, name, replace(alias, hub=str(tmp_path / name)))


def test_every_alias_has_a_layout_and_a_line():
    assert LAYOUTS.keys() == hugging_face.ALIASES.keys()
    assert DATASETS.keys() == PARTS.keys() | hugging_face.ALIASES.keys() | class_lists.SOURCES.keys() | {people.NAME}
    assert all(line and "\n" not in line for line in DATASETS.values())


@pytest.mark.parametrize("name", LAYOUTS)
def test_aliases_read_the_layout_of_their_set(name, tmp_path, monkeypatch):
    at_hub(tmp_path, monkeypatch, name)
    sets = load(Data(source=name, size=None if name in ("cifar10", "cifar100", "svhn", "pcam") else 16))
    own = "val" in LAYOUTS[name][0]
    assert sizes(sets) == {"train": 20 if own else 18, "val": 20 if own else 2, "test": 20}
    classes = {"cifar100": 100, "cub200": 200, "fgvc_aircraft": 100, "stanford_cars": 196, "pcam": 2}.get(name, 10)
    assert len(sets["train"].classes) == classes
    assert sets["train"].preprocess.size[0] == {"pcam": 96, "cifar10": 32, "cifar100": 32, "svhn": 32}.get(name, 16)
    batch = sets["test"].batch(range(20))
    assert (batch.images[:, 0, 0, 0] == 20 * batch.labels).all()
    assert sets["train"].flip_ok == (name != "svhn") and sets["train"].has_boxes == (name == "cub200")
    if name == "cub200":
        assert batch.boxes[0].tolist() == [[0.0, 0.0, 8.0, 8.0]]
    if name == "pcam":
        assert sets["train"].classes == ("normal", "tumour")


def test_a_hub_name_and_a_config(tmp_path):
    for config in (None, "small"):
        parts, features, rows = LAYOUTS["svhn"]
        make_hub(tmp_path / str(config), parts.split(), features, rows, config)
        source = f"hub:{tmp_path / str(config)}" + (f":{config}" if config else "")
        assert sizes(load(Data(source=source))) == {"train": 18, "val": 2, "test": 20}


def test_a_set_that_is_not_to_be_had():
    with pytest.raises(
        FileNotFoundError, match=r"cannot fetch no/such-set from the Hugging Face hub: .*; check the name"
    ) as e:
        load(Data(source="hub:no/such-set"))
    assert "\n" not in str(e.value)


# streams


def make_stream(tmp_path: Path, n: int = 60, **columns) -> Data:
    make_parquet(tmp_path / "train-0.parquet", n // 2, **columns)
    make_parquet(tmp_path / "train-1.parquet", n // 2, start=n // 2, **columns)
    make_parquet(tmp_path / "test.parquet", 10, **{k: (v[:10], f) for k, (v, f) in columns.items()})
    return Data(source=str(tmp_path), streaming=True, val=0.2)


def numbers(stream, batch_size: int = 8, **options) -> list[int]:
    return [int(i) for batch in batches(stream, batch_size, **options) for i in batch.images[:, 1, 0, 0]]


def test_a_stream_gives_every_training_image_once(tmp_path):
    stream, sets = load_stream(make_stream(tmp_path))
    assert len(stream) == 48 and sizes(sets) == {"val": 12, "test": 10}
    assert sorted(numbers(stream)) == list(range(12, 60))
    assert sets["val"].batch(range(12)).images[:, 1, 0, 0].tolist() == list(range(12))
    assert stream.classes == ("ant", "bee") and sets["test"].preprocess == stream.preprocess
    assert stream.preprocess.size == (12, 12)
    assert set(load(make_stream(tmp_path))) == {"val", "test"}


def test_the_order_of_a_stream_depends_on_seed_and_epoch_alone(tmp_path):
    stream, _ = load_stream(make_stream(tmp_path))
    once = numbers(stream, shuffle=(0, 1))
    assert once == numbers(stream, shuffle=(0, 1)) and sorted(once) == list(range(12, 60))
    assert once != numbers(stream, shuffle=(0, 2)) and once != numbers(stream, shuffle=(1, 1))


def test_a_stream_can_be_resumed_and_changed(tmp_path):
    stream, _ = load_stream(make_stream(tmp_path))
    change = (Augment(crop=2, flip=True), 0, 1)
    whole = list(batches(stream, 10, shuffle=(0, 1), augment=change, drop_last=True))
    rest = list(batches(stream, 10, shuffle=(0, 1), augment=change, drop_last=True, start=2))
    assert [len(b.labels) for b in whole] == [10] * 4
    assert all(torch.equal(a.images, b.images) for a, b in zip(whole[2:], rest, strict=True)) and len(rest) == 2
    assert not torch.equal(whole[0].images, next(batches(stream, 10, shuffle=(0, 1))).images)


def test_a_stream_with_masks_and_boxes(tmp_path):
    box = ([[0.0, 0.0, 6.0, 10.0]] * 30, datasets.List(datasets.Value("float32")))
    stream, sets = load_stream(make_stream(tmp_path, mask=(half(30), datasets.Image()), bbox=box))
    for batch in (next(batches(stream, 4)), sets["val"].batch([0])):
        assert batch.masks[:, 0, :, :6].all() and not batch.masks[:, 0, :, 6:].any()
        assert batch.boxes[0].tolist() == [[0.0, 0.0, 6.0, 12.0]]


def test_unreadable_images_of_a_stream_are_listed(tmp_path):
    data = make_stream(tmp_path)
    file = tmp_path / "train-1.parquet"
    rows = datasets.Dataset.from_parquet(str(file), cache_dir=str(tmp_path / "c")).cast_column(
        "image", datasets.Image(decode=False)
    )
    spoilt = [{"bytes": b"" if i == 3 else cell["bytes"], "path": None} for i, cell in enumerate(rows["image"][:])]
    rows.remove_columns("image").add_column("image", spoilt, feature=datasets.Image()).to_parquet(file)
    stream, _ = load_stream(data)
    for _ in range(2):
        assert sorted(numbers(stream)) == [i for i in range(12, 60) if i != 33]
    assert stream.skipped == [("train/000021", "the file is empty")]
    with pytest.raises(ValueError, match="train/000021: the file is empty"):
        list(batches(load_stream(replace(data, strict=True))[0], 8))


def test_the_shares_of_a_stream_are_its_batches(tmp_path, monkeypatch):
    box = ([[0.0, 0.0, 6.0, 10.0]] * 30, datasets.List(datasets.Value("float32")))
    stream, _ = load_stream(make_stream(tmp_path, mask=(half(30), datasets.Image()), bbox=box))
    options = {"shuffle": (0, 1), "augment": (Augment(crop=2, flip=True), 0, 1), "start": 1}
    whole = list(batches(stream, 23, **options))
    decode, decoded = type(stream.decoder).decode, []
    monkeypatch.setattr(type(stream.decoder), "decode", lambda *a: decoded.append(0) or decode(*a))
    shares = [list(batches(stream, 23, part=(r, 3), **options)) for r in range(3)]
    assert len(decoded) == 48 - 23
    assert [[len(b.labels) for b in share] for share in shares] == [[8, 1], [8, 1], [7, 0]]
    for batch, parts in zip(whole, zip(*shares, strict=True), strict=True):
        assert torch.equal(batch.images, torch.cat([p.images for p in parts]))
        assert torch.equal(batch.masks, torch.cat([p.masks for p in parts]))
        assert batch.labels.tolist() == [i for p in parts for i in p.labels.tolist()]
        assert batch.names == [name for p in parts for name in p.names]
        boxes = [b for p in parts for b in p.boxes]
        assert all(torch.equal(a, b) for a, b in zip(batch.boxes, boxes, strict=True))
    assert stream.resident_bytes is None


def test_a_stream_may_end_early(tmp_path):
    stream, _ = load_stream(replace(make_stream(tmp_path), train_size=10))
    assert len(stream) == 10 and numbers(stream) == list(range(12, 22))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group": "label"}, r"data\.streaming takes the splits as they are; set it to false for data\.resplit, "),
        ({"resplit": True}, r"data\.streaming takes the splits as they are"),
    ],
)
def test_what_streams_cannot_do(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_stream(replace(make_stream(tmp_path), **options))


def test_streams_need_splits_names_and_mixed_files(tmp_path):
    make_parquet(tmp_path / "train.parquet", 40)
    with pytest.raises(ValueError, match="streaming needs splits named train and test, got no test in"):
        load_stream(Data(source=str(tmp_path), streaming=True))
    make_parquet(tmp_path / "test.parquet", 10)
    with pytest.raises(ValueError, match=r"streaming needs class names in the schema \(ClassLabel\), got Value"):
        numbered = ([0, 1] * 20, datasets.Value("int64"))
        make_parquet(tmp_path / "n" / "train.parquet", 40, number=numbered)
        make_parquet(tmp_path / "n" / "test.parquet", 40, number=numbered)
        load_stream(Data(source=str(tmp_path / "n"), label="number", streaming=True))
    with pytest.raises(ValueError, match="the first 8 training images hold only 1 of 4 classes, so they are sorted"):
        kinds = (sorted([0, 1, 2, 3] * 10), datasets.ClassLabel(names=list("wxyz")))
        make_parquet(tmp_path / "s" / "train.parquet", 40, kind=kinds)
        make_parquet(tmp_path / "s" / "test.parquet", 40, kind=kinds)
        load_stream(Data(source=str(tmp_path / "s"), label="kind", streaming=True, val=0.2))
    with pytest.raises(ValueError, match=r"data\.streaming needs parquet files or a hub name, got .*; set it to false"):
        load_stream(Data(source=str(make_folder(tmp_path / "f", {"a": 5, "b": 5})), streaming=True))


# the cache


def test_small_images_are_decoded_once(tmp_path, offline, monkeypatch):
    data = Data(source=str(make_folder(tmp_path, {"a": 10, "b": 10})))
    first = load(data)["train"]
    assert isinstance(first.store.images, np.memmap)
    monkeypatch.setattr(decoded, "open_image", lambda *_: pytest.fail("decoded again"))
    again = load(data)["train"]
    assert torch.equal(first.batch(range(14)).images, again.batch(range(14)).images)
    assert first.preprocess == again.preprocess and first.names == again.names


def test_the_cache_notices_a_changed_file_and_another_size(tmp_path, offline):
    make_folder(tmp_path, {"a": 10, "b": 10})
    data = Data(source=str(tmp_path))
    name = load(data)["train"].names[0]
    picture(0, 222).save(tmp_path / name)
    os.utime(tmp_path / name, ns=(1, 1))
    assert int(load(data)["train"].batch([0]).images[0, 1, 0, 0]) == 222
    assert load(replace(data, size=9))["train"].batch([0]).images.shape == (1, 3, 9, 9)


def test_nothing_half_written_is_left(tmp_path, offline, monkeypatch):
    data = Data(source=str(make_folder(tmp_path, {"a": 10, "b": 10})))

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(decoded, "open_image", stop)
        with pytest.raises(KeyboardInterrupt):
            load(data)
    assert [path.name for path in (offline / "decoded").iterdir()] == ["lock"]
    assert len(load(data)["train"]) == 14


def test_large_images_are_decoded_on_the_fly_and_checked_first(tmp_path, offline):
    make_folder(tmp_path, {"a": 10, "b": 10}, size=(300, 300))
    (tmp_path / "a" / "003.png").write_bytes(b"")
    for _ in range(2):
        sets = load(Data(source=str(tmp_path), size=260))
        assert [s for images in sets.values() for s in images.skipped] == [("a/003.png", "the file is empty")]
        assert isinstance(sets["train"].store, decoded.OnTheFly)
        batch = next(batches(sets["train"], 4))
        assert batch.images.shape == (4, 3, 260, 260)
        assert (batch.images[:, 0, 0, 0] == 20 * batch.labels).all()
        assert next(batches(sets["train"], 4, part=(4, 5))).images.shape == (0, 3, 260, 260)
        assert sets["train"].resident_bytes is None
        with pytest.raises(ValueError, match=r"got images of 260 x 260 px that are decoded on the fly; set data\.size"):
            sets["train"].to("cpu")
    assert not list(offline.rglob("images")) or all(f.stat().st_size == 0 for f in offline.rglob("images"))


def test_an_image_that_vanishes_during_the_run(tmp_path):
    images = load(Data(source=str(make_folder(tmp_path, {"a": 10, "b": 10})), size=257))["train"]
    (tmp_path / images.names[3]).unlink()
    with pytest.raises(OSError, match=r"\.png could be read at first and no longer can: No such file"):
        images.batch([2, 3])


def in_memory(data: Data, reason: str):
    with pytest.warns(UserWarning, match=reason) as told:
        sets = load(data)
    assert len({str(warning.message) for warning in told}) == 1 and "\n" not in str(told[0].message)
    assert sum(sizes(sets).values()) == 20
    batch = sets["train"].batch(range(14))
    assert (batch.images[:, 0, 0, 0] == 20 * batch.labels).all()


def test_a_cache_that_cannot_be_written_falls_back_to_memory(tmp_path, monkeypatch):
    folder = make_folder(tmp_path / "f", {"a": 10, "b": 10})
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("SIGHTLINE_CACHE", str(tmp_path / "file"))
    in_memory(Data(source=str(folder)), r"cannot keep decoded images \(Not a directory\).*SIGHTLINE_CACHE")
    in_memory(
        Data(source=str(make_parquet(tmp_path / "a.parquet", 20))), r"cannot keep decoded images .*Not a directory"
    )


def test_a_full_disk_falls_back_to_memory(tmp_path, monkeypatch):
    usage = decoded.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(decoded.shutil, "disk_usage", lambda _: usage)
    in_memory(Data(source=str(make_folder(tmp_path, {"a": 10, "b": 10}))), "No space left on device")


def test_without_room_in_memory_either_the_images_are_decoded_in_each_pass(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("SIGHTLINE_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(decoded, "MEMORY", 1000)
    in_memory(Data(source=str(make_folder(tmp_path / "f", {"a": 10, "b": 10}))), "cannot keep")


def test_cache_and_files_are_read_ahead(tmp_path):
    data = Data(source=str(make_folder(tmp_path, {"a": 10, "b": 10}, size=(40, 40))))
    for images in (load(data)["train"], load(replace(data, size=257))["train"]):
        alone, helped = list(batches(images, 5)), list(batches(images, 5, ahead=torch.device("cpu")))
        assert all(torch.equal(a.images, b.images) for a, b in zip(alone, helped, strict=True)) and len(helped) == 3


def test_masks_that_nobody_wants_are_not_read(tmp_path):
    make_folder(tmp_path / "f", {"a": 10, "b": 10}, size=(40, 40))
    images = load(Data(source=str(tmp_path / "f"), size=257))["train"]
    assert isinstance(images.store, decoded.OnTheFly)
    decoder = replace(images.store.decoder, has_masks=True)
    marked = replace(images, has_masks=True, store=replace(images.store, decoder=decoder))
    assert marked.batch([0]).masks is not None and marked.unmarked().batch([0]).masks is None
    assert torch.equal(marked.unmarked().batch([0]).images, images.batch([0]).images)


def test_of_several_processes_one_decodes(tmp_path, monkeypatch):
    make_folder(tmp_path / "f", {"a": 10, "b": 10}, size=(40, 40))
    monkeypatch.setenv("SIGHTLINE_CACHE", str(tmp_path / "cache"))
    decoded_by: list[int] = []
    plain = decoded._write
    monkeypatch.setattr(decoded, "_write", lambda *args: (decoded_by.append(1), plain(*args)))
    asked = Data(source=str(tmp_path / "f"), val=0.0, test=0.5)
    with ThreadPoolExecutor(4) as pool:
        found = [sets["train"] for sets in pool.map(load, [asked] * 4)]
    assert len(decoded_by) == 2  # of train and test
    assert all(torch.equal(found[0].batch(range(10)).images, other.batch(range(10)).images) for other in found)


def test_what_is_read_ahead_fails_where_it_is_and_stops_when_nobody_asks(tmp_path):
    data = Data(source=str(make_folder(tmp_path / "f", {"a": 10, "b": 10}, size=(40, 40))), size=257, test=0.1, val=0.0)
    images = load(data)["train"]
    gone = images.names[11]
    (tmp_path / "f" / gone).unlink()
    passed = batches(images, 5, ahead=torch.device("cpu"))
    assert [len(next(passed).labels) for _ in range(2)] == [5, 5]
    with pytest.raises(OSError, match=gone):
        next(passed)
    left = batches(images, 5, ahead=torch.device("cpu"))
    next(left)
    assert [thread.name for thread in threading.enumerate() if "ahead" in thread.name] == ["ahead_0"]
    left.close()
    assert not [thread.name for thread in threading.enumerate() if "ahead" in thread.name]


# images without labels


def test_images_without_labels(tmp_path):
    make_folder(tmp_path, {"a": 3, "b": 2})
    (tmp_path / "a" / "000.png").write_bytes(b"")
    images = read_images([tmp_path, str(tmp_path / "b" / "001.png")], GRAY)
    assert len(images) == 5 and images.labels.tolist() == [-1] * 5 and images.classes == ()
    assert images.names[-1] == str(tmp_path / "b" / "001.png")
    assert images.skipped == ((str(tmp_path / "a" / "000.png"), "the file is empty"),)
    assert images.batch([0]).images.shape == (1, 3, 16, 16) and images.preprocess == GRAY
    with pytest.raises(ValueError, match=r"a/000\.png: the file is empty"):
        read_images([tmp_path], GRAY, strict=True)


def test_images_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file or folder .*nowhere"):
        read_images([tmp_path / "nowhere"], GRAY)
    with pytest.raises(FileNotFoundError, match=r"the folder .* holds no image"):
        read_images([tmp_path], GRAY)


def test_other_data_for_a_trained_network_are_taken_whole(tmp_path):
    """Training would set images aside, need two classes, and refuse a folder that has a test split alone."""
    for number in range(5):
        folder = tmp_path / "flat" / "cat"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number}.png")
    assert {part: len(images) for part, images in load_whole(Data(source=str(tmp_path / "flat"))).items()} == {
        "test": 5
    }
    shutil.copytree(tmp_path / "flat", tmp_path / "split" / "test")
    with pytest.raises(ValueError):
        load(Data(source=str(tmp_path / "split")))
    whole = load_whole(Data(source=str(tmp_path / "split"), test_size=3))
    assert {part: len(images) for part, images in whole.items()} == {"test": 3}
    assert load_whole(Data(train_size=20, test_size=10)).keys() == {"train", "val", "test"}
