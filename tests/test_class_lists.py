"""Splits by classes: the published lists, lists of one's own, the layouts of CIFAR-FS and miniImageNet."""

import csv
import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from sightline import cli, data
from sightline.data import class_lists, hugging_face
from sightline.data.class_lists import CLASS_LISTS, read_class_lists
from sightline.recipe import Data

LISTS = {"train": ["ant", "bee", "crab"], "val": ["dog"], "test": ["eel", "fox"]}
NAMES = [name for part in LISTS.values() for name in part]
SMALL = data.Preprocess(size=(8, 8), mean=(0.5,) * 3, std=(0.5,) * 3)


def picture(kind: int, number: int) -> Image.Image:
    """An image whose color tells its class and number."""
    return Image.fromarray(np.full((8, 8, 3), (20 * kind, number, 100), np.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten images of each of six classes, and lists.json."""
    for kind, name in enumerate(NAMES):
        (tmp_path / "animals" / name).mkdir(parents=True)
        for i in range(10):
            picture(kind, i).save(tmp_path / "animals" / name / f"{i}.png")
    (tmp_path / "lists.json").write_text(json.dumps(LISTS))
    return tmp_path


def of(folder: Path, **changes) -> Data:
    return replace(Data(source=str(folder / "animals"), classes=str(folder / "lists.json")), **changes)


def kinds(images: data.ImageSet) -> dict[str, set[int]]:
    """The color of each class, which tells the class that its images were made for."""
    batch = images.batch(range(len(images)))
    reds = batch.images[:, 0, 0, 0] // 20
    return {name: set(reds[batch.labels == i].tolist()) for i, name in enumerate(images.classes)}


@pytest.mark.parametrize(("name", "sizes"), [("cifar_fs", [64, 16, 20]), ("fc100", [60, 20, 20])])
def test_lists_over_cifar100_divide_its_hundred_classes(name, sizes):
    lists = read_class_lists(name)
    assert [len(part) for part in lists] == sizes
    assert len({one for part in lists for one in part}) == 100


def test_fc100_keeps_superclasses_together():
    people = {"baby", "boy", "girl", "man", "woman"}
    assert people <= {*read_class_lists("fc100").test}
    assert not people <= {*read_class_lists("cifar_fs").test}


def test_mini_imagenet_lists_wordnet_numbers():
    lists = read_class_lists("mini_imagenet")
    assert [len(part) for part in lists] == [64, 16, 20]
    assert all(one.startswith("n") and len(one) == 9 and one[1:].isdigit() for part in lists for one in part)


def test_every_list_shares_no_class_and_says_where_it_comes_from():
    assert {*class_lists.SOURCES} < {*CLASS_LISTS}
    for name in CLASS_LISTS:
        assert not any({*one} & {*other} for one, other in combinations(read_class_lists(name), 2))
        assert json.loads((class_lists._FOLDER / f"{name}.json").read_text())["source"]


def test_training_sees_the_classes_of_train_alone(folder):
    sets = data.load(of(folder))
    assert all(images.classes == ("ant", "bee", "crab") for images in sets.values())
    assert sum(map(len, sets.values())) == 30
    assert kinds(sets["train"]) == {"ant": {0}, "bee": {1}, "crab": {2}}
    for images in sets.values():
        assert all(reds <= {"ant bee crab".split().index(name)} for name, reds in kinds(images).items())


def test_new_classes_have_all_their_images_in_the_order_of_the_source(folder):
    sets = data.load_new_classes(of(folder), SMALL)
    assert {part: kinds(images) for part, images in sets.items()} == {
        "val": {"dog": {3}},
        "test": {"eel": {4}, "fox": {5}},
    }
    assert [len(images) for images in sets.values()] == [10, 20]
    assert sets["test"].batch([3]).images[0, 1, 0, 0] == 3 and sets["test"].names[3] == "eel/3.png"
    assert sets["test"].preprocess == SMALL


def test_cameras_stay_with_their_images(folder):
    rows = [f"{name}/{i}.png,{name},{name}-{i % 3}" for name in NAMES for i in range(10)]
    (folder / "animals" / "metadata.csv").write_text("\n".join(["image,label,seen", *rows]) + "\n")
    wanted = of(folder, camera="seen", test=0.3, val=0.0)
    for sets in (data.load(wanted), data.load_new_classes(wanted, SMALL)):
        for images in sets.values():
            expected = [f"{name.split('/')[0]}-{int(name[-5]) % 3}" for name in images.names]
            assert images.cameras is not None and images.cameras.tolist() == expected


def test_new_classes_of_two_lists_are_not_mixed_in_the_cache(folder):
    first = kinds(data.load_new_classes(of(folder), SMALL)["val"])
    (folder / "lists.json").write_text(json.dumps(LISTS | {"val": ["eel"], "test": ["dog", "fox"]}))
    assert first == {"dog": {3}} and kinds(data.load_new_classes(of(folder), SMALL)["val"]) == {"eel": {4}}


@pytest.mark.parametrize("name", class_lists.SOURCES)
def test_few_shot_names_are_cifar100_with_its_lists(name, tmp_path, monkeypatch):
    names = sorted(one for part in read_class_lists("cifar_fs") for one in part)
    features = {"img": datasets.Image(), "fine_label": datasets.ClassLabel(names=names)}
    rows = {"img": [picture(i % 12, i // 12) for i in range(200)], "fine_label": [i % 100 for i in range(200)]}
    table = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    (tmp_path / "hub" / "data").mkdir(parents=True)
    lines = [f"  - split: {part}\n    path: data/{part}-*" for part in ("train", "test")]
    text = "---\nconfigs:\n- config_name: default\n  data_files:\n" + "\n".join(lines) + "\n---\n"
    (tmp_path / "hub" / "README.md").write_text(text)
    for part in ("train", "test"):
        table.to_parquet(tmp_path / "hub" / "data" / f"{part}-00000-of-00001.parquet")
    alias = replace(hugging_face.ALIASES["cifar100"], hub=str(tmp_path / "hub"))
    monkeypatch.setitem(hugging_face.ALIASES, "cifar100", alias)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    lists = read_class_lists(name)
    sets, new = data.load(Data(source=name, size=8)), data.load_new_classes(Data(source=name), SMALL)
    assert set(sets["train"].classes) == {*lists.train}
    assert (set(new["val"].classes), set(new["test"].classes)) == ({*lists.val}, {*lists.test})
    assert len(new["test"]) == 4 * len(lists.test)  # two images of each class in each of two splits


def mini_imagenet(root: Path, parts: dict[str, list[str]]) -> Path:
    """The layout of miniImageNet: a table for each part, and all images in one folder."""
    (root / "images").mkdir(parents=True)
    for part, names in parts.items():
        with (root / f"{part}.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["filename", "label"])
            for kind, name in enumerate(names):
                for i in range(10):
                    picture(kind, i).save(root / "images" / f"{name}{i:08d}.jpg")
                    table.writerow([f"{name}{i:08d}.jpg", name])
    return root


def test_mini_imagenet_is_read_in_its_layout(tmp_path):
    lists = read_class_lists("mini_imagenet")._asdict()
    root = mini_imagenet(tmp_path / "mini", lists)
    sets = data.load(Data(source=str(root), classes="mini_imagenet", size=8))
    assert sets["train"].classes == tuple(sorted(lists["train"]))
    assert sum(map(len, sets.values())) == 640
    new = data.load_new_classes(Data(source=str(root), classes="mini_imagenet"), SMALL)
    assert (new["val"].classes, new["test"].classes) == (tuple(sorted(lists["val"])), tuple(sorted(lists["test"])))
    assert [len(images) for images in new.values()] == [160, 200]


def test_tables_named_after_parts_are_its_splits(tmp_path):
    root = mini_imagenet(tmp_path / "mini", {"train": ["ant", "bee"], "test": ["ant", "bee"]})
    with (root / "test.csv").open("w") as file:
        file.write("filename,label\nant00000000.jpg,ant\n")
    with (root / "train.csv").open("w") as file:
        file.write("filename,label\n" + "".join(f"{k}{i:08d}.jpg,{k}\n" for k in ("ant", "bee") for i in range(1, 10)))
    sets = data.load(Data(source=str(root), size=8, val=0.0))
    assert sets["test"].names == ["images/ant00000000.jpg"] and len(sets["train"]) == 18


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"train": ["ant", "bee"], "val": ["dog"], "test": ["eel", "bee"]}', "'bee' in train and test"),
        ('{"train": ["ant"], "val": ["dog", "dog"], "test": ["eel"]}', "'dog' twice in val"),
        ('{"train": ["ant"], "val": [], "test": ["eel"]}', r"got \[\] as val"),
        ('{"train": ["ant"], "test": ["eel"]}', "got None as val"),
        ('["ant"]', "got None as train"),
        ("ant, bee", "Expecting value"),
        ('{"train": ["ant", "wasp"], "val": ["dog"], "test": ["eel"]}', "1 classes are not in animals, such as 'wasp'"),
        ('{"train": ["ant", "dogs"], "val": ["dot"], "test": ["eel"]}', "did you mean 'dog'"),
    ],
)
def test_wrong_lists_are_refused(folder, text, message):
    (folder / "lists.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        data.load(of(folder))


def test_a_class_of_test_that_is_missing_is_refused(folder):
    (folder / "lists.json").write_text(json.dumps(LISTS | {"test": ["eel", "gnu"]}))
    data.load(of(folder))
    with pytest.raises(ValueError, match="'gnu'"):
        data.load_new_classes(of(folder), SMALL)


def test_unknown_lists_are_refused(folder):
    with pytest.raises(FileNotFoundError, match="did you mean 'cifar_fs'"):
        data.load(of(folder, classes="cifar-fs"))


def test_lists_are_needed_for_new_classes(folder):
    with pytest.raises(ValueError, match=r"expected data\.classes, the class lists"):
        data.load_new_classes(of(folder, classes=None), SMALL)


@pytest.mark.parametrize("changes", [{"source": "clutter"}, {"source": "clutter-person"}, {"streaming": True}])
def test_lists_do_not_go_with_composed_or_streamed_images(folder, changes):
    with pytest.raises(ValueError, match=r"with data\.classes"):
        data.load(of(folder, **changes))


def test_the_command_line_refuses_shared_classes_in_one_line(folder, capsys):
    (folder / "lists.json").write_text(json.dumps(LISTS | {"test": ["ant"]}))
    arguments = ["--data", str(folder / "animals"), "--data.classes", str(folder / "lists.json")]
    with pytest.raises(SystemExit):
        cli.main(["train", *arguments, "--model", "cifar_resnet", "--out", str(folder / "run")])
    error = capsys.readouterr().err
    assert "'ant' in train and test" in error and error.count("\n") == 1
    assert not (folder / "run").exists()
