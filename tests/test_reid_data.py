"""Identities seen by cameras: stand-ins in the published layouts, tables with cameras, composed people."""

import csv
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sightline as sl
from sightline.data import people
from sightline.metrics.retrieval import ranking
from sightline.recipe import Data

MARKET = {
    "bounding_box_train": [f"{i:04d}_c{c}s1_{i:06d}_0{c}.jpg" for i in (2, 7, 10, 11, 12) for c in (1, 2, 3)],
    "query": ["0001_c1s1_001051_00.jpg", "0003_c2s1_000151_00.jpg", "0004_c1s6_000001_00.jpg"],
    "bounding_box_test": [
        *("0001_c1s1_001051_01.jpg", "0001_c3s1_002000_02.jpg", "0003_c1s1_000151_03.jpg"),
        *("0004_c1s6_000002_00.jpg", "0000_c2s1_000001_01.jpg", "-1_c1s1_000401_03.jpg"),
    ],
}
DUKE = {
    "bounding_box_train": ["0001_c2_f0046182.jpg", "0001_c5_f0051342.jpg", "0007_c1_f0000001.jpg"],
    "query": ["0005_c2_f0046985.jpg"],
    "bounding_box_test": ["0005_c5_f0051341.jpg", "0002_c1_f0044158.jpg"],
}
CUHK03 = {
    "bounding_box_train": ["0003_c1_1.png", "0003_c2_6.png", "0005_c1_1.png"],
    "query": ["0001_c1_1.png"],
    "bounding_box_test": ["0001_c2_6.png", "0002_c2_7.png"],
}


@pytest.fixture
def made(tmp_path):
    """Writes a stand-in: small images of different colors under these names."""

    def write(files: dict[str, list[str]], root: str = "set") -> Path:
        rng = np.random.default_rng(0)
        for folder, names in files.items():
            (tmp_path / root / folder).mkdir(parents=True, exist_ok=True)
            for name in names:
                pixels = rng.integers(0, 256, (16, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / root / folder / name)
        return tmp_path / root

    return write


def identities(images):
    return [images.classes[label] if label >= 0 else "junk" for label in images.labels]


def test_market_1501(made):
    root = made(MARKET)
    (root / "bounding_box_test" / "Thumbs.db").write_bytes(b"x")
    sets = sl.data.load(Data(source=str(root), size=(16, 8), val=0.3))
    assert {*sets} == {"train", "val", "query", "gallery"}
    assert identities(sets["query"]) == ["0001", "0003", "0004"] and sets["query"].cameras.tolist() == ["1", "2", "1"]
    gallery = dict(zip(sets["gallery"].names, identities(sets["gallery"]), strict=True))
    assert gallery["bounding_box_test/-1_c1s1_000401_03.jpg"] == "junk"
    assert gallery["bounding_box_test/0000_c2s1_000001_01.jpg"] == "0000"  # a distractor: no query has it
    assert sets["query"].classes == sets["gallery"].classes == ("0000", "0001", "0003", "0004")
    train, val = sets["train"], sets["val"]
    assert not {*train.classes} & {*val.classes} and {*train.classes, *val.classes} == {
        "0002",
        "0007",
        "0010",
        "0011",
        "0012",
    }
    assert sorted({*train.labels.tolist()}) == [*range(len(train.classes))]
    assert len(train) + len(val) == 15 and train.preprocess.size == (16, 8)
    assert train.batch([0]).images.shape == (1, 3, 16, 8)
    assert any("1 of 3 queries have no match, such as query/0004" in notice for notice in sets["gallery"].notices)
    assert any("Thumbs" not in n and "no image" in n for n in train.notices)


@pytest.mark.parametrize("files", [DUKE, CUHK03])
def test_duke_and_cuhk03(made, files):
    sets = sl.data.load(Data(source=str(made(files)), size=(16, 8), val=0.0))
    assert {*sets} == {"train", "query", "gallery"}
    query, gallery = sets["query"], sets["gallery"]
    similar = np.array([[float(name.endswith(files["bounding_box_test"][0])) for name in gallery.names]])
    ranked = ranking(torch.from_numpy(similar), query.labels, gallery.labels, query.cameras, gallery.cameras)
    assert ranked.cmc(1).tolist() == [1.0] and ranked.matches.tolist() == [1]
    assert len(sets["train"].classes) == 2 and len(sets["train"]) == 3


def test_cuhk03_by_its_root(made):
    made(CUHK03, "cuhk03-np/labeled")
    root = made(CUHK03, "cuhk03-np/detected").parent
    with pytest.raises(ValueError, match=r"expected one set of identities in .*, got detected and labeled; name one"):
        sl.data.load(Data(source=str(root)))
    made(CUHK03, "alone/labeled")
    assert len(sl.data.load(Data(source=str(root.parent / "alone"), val=0.0))["train"]) == 3


def test_names_of_another_layout_are_listed(made):
    root = made({**MARKET, "query": [*MARKET["query"], "person.jpg", "0009_cam1.jpg"]})
    sets = sl.data.load(Data(source=str(root), size=16))
    skipped = dict(sets["train"].skipped)
    assert {*skipped} == {"query/person.jpg", "query/0009_cam1.jpg"}
    assert "expected a name of identity and camera such as 0002_c1s1_000451_03.jpg" in skipped["query/person.jpg"]
    assert len(sets["query"]) == 3
    with pytest.raises(ValueError, match=r"query/0009_cam1.jpg: expected a name of identity and camera"):
        sl.data.load(Data(source=str(root), size=16, strict=True))
    wrong = made({folder: ["a.jpg", "b.jpg"] for folder in MARKET}, "wrong")
    with pytest.raises(ValueError, match=r"expected files named by identity and camera .* got none of 6, the first"):
        sl.data.load(Data(source=str(wrong)))


@pytest.mark.parametrize(
    ("change", "data", "message"),
    [
        ({"query": None}, {}, r"expected the folders bounding_box_train, query, bounding_box_test in .*, got no query"),
        ({"query": ["0002_c1s1_000001_00.jpg"]}, {}, r"1 of the identities or groups in test also occur in train"),
        (
            {"query": ["0001_c3s1_001051_00.jpg"], "bounding_box_test": ["0001_c3s1_001051_01.jpg"]},
            {},
            "expected a query whose identity another camera has seen, got none among 1 queries and 1 images",
        ),
        ({"bounding_box_train": ["0002_c1s1_000451_03.jpg"]}, {"val": 0.0}, "expected at least two identities to"),
        (
            {"bounding_box_train": ["-1_c1s1_000451_03.jpg", "0002_c1s1_0_0.jpg"]},
            {"val": 0.0},
            "1 of 2 train images have no",
        ),
        ({}, {"camera": "camera"}, r"data\.camera names a column, but .* has file names instead; leave it out"),
        ({}, {"train_size": 99, "val": 0.0}, r"expected data\.train_size of at most 15, got 99"),
    ],
)
def test_what_cannot_be_used(made, change, data, message):
    files = {folder: names for folder, names in (MARKET | change).items() if names is not None}
    with pytest.raises(ValueError, match=message):
        sl.data.load(Data(source=str(made(files)), size=16, **data))


def test_a_gallery_of_one(made):
    files = MARKET | {"query": ["0001_c1s1_001051_00.jpg"], "bounding_box_test": ["0001_c2s1_001051_01.jpg"]}
    sets = sl.data.load(Data(source=str(made(files)), size=16))
    assert len(sets["gallery"]) == len(sets["query"]) == 1


def table_of(folder, rows):
    with open(folder / "images.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "who", "seen_by", "place"])
        writer.writerows(rows)
    return str(folder / "images.csv")


def test_table_with_cameras(made):
    names = [f"{who}_{camera}_{k}.png" for who in range(10) for camera in "ab" for k in range(2)]
    root = made({".": names})
    rows = [(name, f"bird {name[0]}", name[2], f"place {int(name[0]) // 2}") for name in names]
    data = Data(source=table_of(root, rows), label="who", camera="seen_by", size=8, test=0.3, val=0.2)
    sets = sl.data.load(data)
    parts = [{*sets[split].classes} for split in ("train", "val", "gallery")]
    assert [len(part) for part in parts] == [5, 2, 3] and len(set.union(*parts)) == 10
    assert sets["query"].names == sets["gallery"].names and {*sets["query"].cameras} == {"a", "b"}
    sets = sl.data.load(
        Data(source=data.source, label="who", camera="seen_by", group="place", size=8, test=0.3, val=0.2)
    )
    places = [{*sets[split].groups} for split in ("train", "val", "gallery")]
    assert len(set.union(*places)) == sum(len(one) for one in places) == 5
    few = sl.data.load(Data(source=data.source, label="who", camera="seen_by", size=8, test=0.3, test_size=4))
    assert len(few["query"]) == 4 and len(few["gallery"]) == 12
    with pytest.raises(ValueError, match=r"no column 'cam' \(data\.camera\)"):
        sl.data.load(Data(source=data.source, label="who", camera="cam"))
    table_of(root, [(name, who, "" if name == names[0] else camera, place) for name, who, camera, place in rows])
    with pytest.raises(ValueError, match="1 of 40 images have no 'seen_by'; every image needs its camera"):
        sl.data.load(data)
    table_of(root, [(name, who, camera, f"place {k % 3}") for k, (name, who, camera, _) in enumerate(rows)])
    with pytest.raises(ValueError, match="expected each identity in one group of 'place', got one in several"):
        sl.data.load(Data(source=data.source, label="who", camera="seen_by", group="place"))


@pytest.mark.parametrize("pair", [("train", "val"), ("train", "test"), ("val", "test")])
def test_no_two_splits_share_an_identity(pair, made):
    names = [f"{who}_{camera}.png" for who in range(8) for camera in "ab"]
    root = made({".": names})
    parts = {str(who): ("train", "train", "val", "val", "test")[who % 5] for who in range(8)}
    lines = [f"{name},{name[0]},{name[2]},{parts[name[0]]}" for name in names]
    (root / "images.csv").write_text("\n".join(["image,who,seen_by,split", *lines]) + "\n")
    data = Data(source=str(root / "images.csv"), label="who", camera="seen_by", size=8)
    assert {*sl.data.load(data)} == {"train", "val", "query", "gallery"}
    place = next(i for i, line in enumerate(lines) if line.endswith(pair[0]))
    lines[place] = lines[place].replace(pair[0], pair[1])
    (root / "images.csv").write_text("\n".join(["image,who,seen_by,split", *lines]) + "\n")
    with pytest.raises(ValueError, match=f"1 of the identities or groups in {pair[1]} also occur in {pair[0]}, which"):
        sl.data.load(data)


@pytest.mark.parametrize("seed", range(6))
def test_junk_of_a_set_that_is_split_again_is_in_the_gallery(seed, made):
    junk = [f"-1_c{camera}s1_000401_0{k}.jpg" for camera in (1, 2) for k in range(8)]
    root = made(MARKET | {"bounding_box_test": [*MARKET["bounding_box_test"], *junk]})
    sets = sl.data.load(Data(source=str(root), size=(16, 8), resplit=True, seed=seed, test=0.3, val=0.2))
    names = {f"bounding_box_test/{name}" for name in (*junk, "-1_c1s1_000401_03.jpg")}
    gallery = dict(zip(sets["gallery"].names, identities(sets["gallery"]), strict=True))
    assert {name for name, identity in gallery.items() if identity == "junk"} == names
    assert all((sets[split].labels >= 0).all() for split in ("train", "val", "query"))
    assert len({*gallery.values()}) > 2


def test_the_same_file_twice_is_left_out_once(made):
    names = [f"{who}_{camera}.png" for who in range(6) for camera in "ab"]
    root = made({".": names})
    for name in names:
        (root / f"again_{name}").write_bytes((root / name).read_bytes())
    rows = [(f"{prefix}{name}", f"bird {name[0]}", name[2], "") for name in names for prefix in ("", "again_")]
    sets = sl.data.load(Data(source=table_of(root, rows), label="who", camera="seen_by", size=8, test=0.3, val=0.0))
    assert len(sets["train"]) + len(sets["gallery"]) == 12
    assert any(re.match(r"\d+ train images repeat another of the same identity", n) for n in sets["train"].notices)


@pytest.mark.skipif(not os.environ.get("SIGHTLINE_DATA"), reason="needs the files in SIGHTLINE_DATA")
def test_omniglot_by_drawer():
    source = str(Path(os.environ["SIGHTLINE_DATA"]) / "omniglot_small")
    sets = sl.data.load(Data(source=source, label="label", camera="drawer", group="alphabet", size=16))
    alphabets = [{*sets[split].groups} for split in ("train", "val", "gallery")]
    assert len(set.union(*alphabets)) == sum(len(one) for one in alphabets) == 8
    assert sum(len(sets[split]) for split in ("train", "val", "gallery")) == 2720 + 3120 - 1000
    assert {*sets["query"].cameras} == {str(i) for i in range(1, 21)}
    assert np.bincount(sets["gallery"].labels).tolist() == [20] * len(sets["gallery"].classes)


def test_people_have_their_own_colors_and_cameras():
    sets = sl.data.load(Data(source="clutter-person", train_size=400, mask="torso"))
    assert [len(sets[split].classes) for split in ("train", "val", "query", "gallery")] == [200, 50, 100, 100]
    assert len(sets["train"]) == 400 and len(sets["query"]) == len(sets["gallery"]) == 800
    chosen = [int(name.removeprefix("train-")) for name in sets["train"].names]
    assert np.bincount(np.array(chosen) % 200).tolist() == [2] * 200 and max(chosen) > 2800
    assert np.bincount(sets["train"].cameras.astype(int))[1:].min() > 60  # all four, in about equal shares
    colors = people._colors(0)
    used = sum(people.IDENTITIES.values())
    assert len(np.unique(colors[:used].reshape(used, -1), axis=0)) == used
    first, again = (people.compose_people(0, "train", [3, 5]) for _ in range(2))
    assert all(np.array_equal(one, other) for one, other in zip(first, again, strict=True))
    assert np.array_equal(first[0][1:], people.compose_people(0, "train", [5])[0])
    assert not np.array_equal(first[0], people.compose_people(1, "train", [3, 5])[0])
    first = people.compose_people(0, "train", [chosen[3], chosen[5]])
    batch = sets["train"].batch([3, 5])
    assert np.array_equal(batch.images, first[0]) and np.array_equal(batch.masks[:, 0], first[1][:, 1])


def test_parts_of_people_are_where_their_colors_are():
    images, parts = people.compose_people(0, "gallery", range(0, 800, 7))
    assert (parts.sum(1) <= 1).all()  # a pixel shows one part
    areas = parts.mean((0, 2, 3))
    assert all(0.01 < area < 0.2 for area in areas), areas
    tint, _ = people._cameras(0)
    first = people.IDENTITIES["train"] + people.IDENTITIES["val"]
    shares = []
    for k, index in enumerate(range(0, 800, 7)):
        expected = people._colors(0)[first + index % 100] * tint[index // 100 % 4]
        for part in range(4):
            if parts[k, part].sum() > 20:
                seen = images[k][:, parts[k, part]] / 255
                cosines = expected[part] @ seen / np.linalg.norm(seen, axis=0) / np.linalg.norm(expected[part])
                shares.append((cosines > 0.9).mean())  # up to brightness and noise
    assert len(shares) > 300 and min(shares) > 0.99


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"mask": "hat"}, r"expected data\.mask of clutter-person to be person, head, torso, legs, bag, got 'hat'"),
        ({"size": 16}, r"expected data\.size of at least 32,16 for clutter-person, got 16,16"),
        ({"camera": "c"}, r"data\.camera names a column, but clutter-person is composed"),
        ({"train_size": 3201}, r"expected data\.train_size of at most 3200, got 3201; there are no more"),
    ],
)
def test_people_refuse(data, message):
    with pytest.raises(ValueError, match=message):
        sl.data.load(Data(source="clutter-person", **data))


def test_other_composed_images_are_square():
    with pytest.raises(ValueError, match=r"expected data\.size of clutter as one side, as its images are square"):
        sl.data.load(Data(source="clutter", size=(40, 20)))
    with pytest.raises(ValueError, match=r"data\.size: expected 1 or more, or a height and a width"):
        sl.data.load(Data(source="clutter", size=(40, 20, 3)))
