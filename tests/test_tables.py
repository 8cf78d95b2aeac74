"""Images listed in labels.csv, metadata.csv and metadata.jsonl: what is read, and what is said of mistakes."""

import json
import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.test_data_sources import make_folder, offline, picture, sizes  # noqa: F401  (a fixture)

from sightline.data import load, load_stream, load_whole
from sightline.recipe import Data

NAMES = [f"{i:03d}.png" for i in range(12)]


def flat(folder: Path, names=NAMES) -> Path:
    """Images without class folders; the first pixel of each tells its place in `names` and its class, by turns."""
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(i % 2, i).save(folder / name)
    return folder


def table(file: Path, header: str, lines, separator=",", encoding="utf-8", end="\n") -> Path:
    text = end.join([header, *lines, ""]).replace(",", separator)
    file.write_bytes(text.encode(encoding))
    return file


def usual(folder: Path, name="labels.csv", **how) -> Path:
    flat(folder)
    return table(folder / name, "image,label", [f"{name},{'ab'[i % 2]}" for i, name in enumerate(NAMES)], **how)


def everything(source, **options):
    """All images of a source as one set, with the class and the number that the pixels tell."""
    images = load_whole(Data(source=str(source), **options))["test"]
    batch = images.batch(range(len(images)))
    return images, (batch.images[:, 0, 0, 0] // 20).tolist(), batch.images[:, 1, 0, 0].tolist()


def check(source, **options):
    """The twelve images of `usual`, each with its own label."""
    images, kinds, numbers = everything(source, **options)
    assert numbers == list(range(12)) and images.labels.tolist() == kinds == [0, 1] * 6
    return images


# what is read


def test_a_table_is_a_source(tmp_path):
    sets = load(Data(source=str(usual(tmp_path))))
    assert sizes(sets) == {"train": 9, "val": 1, "test": 2}
    train = sets["train"]
    assert train.classes == ("a", "b") and train.name == "labels.csv" and train.preprocess.size == (12, 12)
    assert not train.has_masks and not train.has_boxes and train.groups is None and train.notices == ()
    batch = train.batch(range(9))
    assert (batch.images[:, 0, 0, 0] == 20 * batch.labels).all()
    assert [NAMES[i] for i in batch.images[:, 1, 0, 0].tolist()] == batch.names


@pytest.mark.parametrize(
    "how",
    [
        {"encoding": "utf-8-sig"},
        {"encoding": "utf-16"},
        {"end": "\r\n"},
        {"end": "\r"},
        {"separator": ";"},
        {"separator": "\t"},
        {"separator": ";", "encoding": "utf-8-sig", "end": "\r\n"},
        {"name": "labels.tsv", "separator": "\t"},
    ],
    ids=str,
)
def test_tables_as_spreadsheets_write_them(how, tmp_path):
    check(usual(tmp_path, **how))


def test_a_first_line_that_names_the_separator_and_a_column_of_numbers(tmp_path):
    flat(tmp_path)
    lines = [f'{i};"{name}"; {"ab"[i % 2]} ' for i, name in enumerate(NAMES)]
    (tmp_path / "labels.csv").write_text("\n".join(["sep=;", ";image;label", "", *lines]))
    check(tmp_path / "labels.csv")


@pytest.mark.parametrize("name", ["train.csv", "test.csv"])
def test_a_single_table_may_have_any_name(name, tmp_path):
    check(usual(tmp_path, name))
    sets = load(Data(source=str(tmp_path / name), size=8, test=0.25, val=0.25))
    assert {*sets} == {"train", "val", "test"} and sum(map(len, sets.values())) == 12


def test_metadata_of_a_flat_folder_and_of_splits(tmp_path):
    usual(tmp_path / "flat", "metadata.csv")
    assert check(tmp_path / "flat").name == "flat"
    for part in ("train", "validation", "test"):
        flat(tmp_path / "hf" / part)
        lines = [f"{name},{'ab'[i % 2]}" for i, name in enumerate(NAMES)]
        table(tmp_path / "hf" / part / "metadata.csv", "file_name,label", lines)
    sets = load(Data(source=str(tmp_path / "hf")))
    assert sizes(sets) == {"train": 12, "val": 12, "test": 12} and sets["val"].names[0] == "validation/000.png"


def test_metadata_as_json_lines(tmp_path):
    flat(tmp_path)
    lines = [{"file_name": n, "label": i % 2, "bbox": [[0, 0, 6, 5]]} for i, n in enumerate(NAMES)]
    lines[3]["bbox"] = None
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    images = check(tmp_path, size=12)
    assert images.classes == ("0", "1")
    boxes = images.batch([0, 3]).boxes
    assert boxes[0].tolist() == [[0, 0, 6, 6]] and len(boxes[1]) == 0


@pytest.mark.parametrize("where", [".", "cat", "both"])
def test_metadata_of_class_folders_names_the_patients(where, tmp_path):
    make_folder(tmp_path, {"cat": 6, "dog": 6})
    for folder in {".": [""], "cat": ["cat", "dog"], "both": ["cat", "dog"]}[where]:
        kinds = [folder] if folder else ["cat", "dog"]
        lines = [f"{'' if folder else f'{kind}/'}{i:03d}.png,p{i % 3}" for kind in kinds for i in range(6)]
        table(tmp_path / folder / "metadata.csv", "file_name,patient", lines)
    sets = load(Data(source=str(tmp_path), group="patient"))
    assert sizes(sets) == {"train": 4, "val": 4, "test": 4} and sets["train"].classes == ("cat", "dog")
    groups = [set(images.groups.tolist()) for images in sets.values()]
    assert sorted(map(sorted, groups)) == [["p0"], ["p1"], ["p2"]]
    for images in sets.values():
        batch = images.batch(range(4))
        assert (batch.images[:, 0, 0, 0] == 20 * batch.labels).all()
        assert [f"p{number % 3}" for number in batch.images[:, 1, 0, 0].tolist()] == images.groups.tolist()


def test_splits_by_a_column_go_before_those_by_folders(tmp_path):
    flat(tmp_path, [f"train/{name}" for name in NAMES])
    lines = [f"train/{n},{'ab'[i % 2]},{'Train' if i < 6 else 'dev' if i < 8 else 'test'}" for i, n in enumerate(NAMES)]
    sets = load(Data(source=str(table(tmp_path / "labels.csv", "image,label,split", lines))))
    assert sizes(sets) == {"train": 6, "val": 2, "test": 4}
    table(tmp_path / "metadata.csv", "image,label", [line.rpartition(",")[0] for line in lines])
    assert sizes(load(Data(source=str(tmp_path), resplit=True))) == {"train": 9, "val": 1, "test": 2}


def test_class_folders_inside_splits(tmp_path):
    for part in ("train", "test"):
        make_folder(tmp_path / part, {"cat": 6, "dog": 6})
    lines = [f"{f.relative_to(tmp_path)},{f.stem}" for f in sorted(tmp_path.rglob("*.png"))]
    table(tmp_path / "metadata.csv", "file_name,number", lines)
    sets = load(Data(source=str(tmp_path)))
    assert sizes(sets) == {"train": 11, "val": 1, "test": 12} and sets["train"].classes == ("cat", "dog")


def test_groups_masks_and_boxes(tmp_path):
    flat(tmp_path)
    (tmp_path / "masks").mkdir()
    mask = np.zeros((10, 12), np.uint8)
    mask[:, :6] = 255
    for name in NAMES:
        Image.fromarray(mask).save(tmp_path / "masks" / name)
    lines = [
        f"{name},{'ab'[i % 2]},p{i // 4},{'' if i == 5 else f'masks/{name}'},3,0,6,10" for i, name in enumerate(NAMES)
    ]
    header = "Image,Label,Group,Mask,x0,y0,x1,y1"
    images = check(table(tmp_path / "labels.csv", header, lines), size=12)
    batch = images.batch(range(12))
    assert batch.masks[0, 0].tolist() == [[True] * 6 + [False] * 6] * 12
    assert batch.masks.flatten(1).any(1).tolist() == [i != 5 for i in range(12)]
    torch.testing.assert_close(batch.boxes[7], torch.tensor([[3.0, 0.0, 6.0, 12.0]]))
    assert images.groups.tolist() == [f"p{i // 4}" for i in range(12)] and images.group_name == "Group"
    together, boxes = images.notices
    assert together.startswith("the splits keep the groups of column 'Group' together")
    assert boxes.startswith("boxes are read as xyxy and cover 25")
    sets = load(Data(source=str(tmp_path / "labels.csv")))
    assert not set(sets["train"].groups.tolist()) & set(sets["test"].groups.tolist())


@pytest.mark.parametrize(
    ("header", "box"),
    [
        ("xmin,ymin,xmax,ymax", "6,5,12,10"),
        ("x1,y1,x2,y2", "6,5,12,10"),
        ("x,y,width,height", "6,5,6,5"),
        ("x,y,w,h", "6.0,5.0,6.0,5.0"),
        ("bbox", '"[6, 5, 12, 10]"'),
        ("bbox", '"[[6, 5, 12, 10]]"'),
        ("bbox", "6 5 12 10"),
    ],
)
def test_columns_of_boxes(header, box, tmp_path):
    flat(tmp_path)
    lines = [f"{name},{'ab'[i % 2]},{box}" for i, name in enumerate(NAMES)]
    images = check(table(tmp_path / "labels.csv", f"image,label,{header}", lines), size=12)
    assert images.batch([2]).boxes[0].tolist() == [[6, 6, 12, 12]]


def test_several_lines_of_one_image_are_its_boxes(tmp_path):
    flat(tmp_path)
    lines = [f"{name},{'ab'[i % 2]},{x},0,{x + 3},5" for i, name in enumerate(NAMES) for x in (0, 6)]
    images = check(table(tmp_path / "labels.csv", "image,label,x0,y0,x1,y1", [*lines[:-1], f"{NAMES[-1]},b,,,,"]))
    assert [boxes.tolist() for boxes in images.batch([0, 11]).boxes] == [
        [[0, 0, 3, 6], [6, 0, 9, 6]],
        [[0, 0, 3, 6]],
    ]


def test_relative_boxes_of_a_table(tmp_path):
    flat(tmp_path)
    lines = [f"{name},{'ab'[i % 2]},.5,.5,1,1" for i, name in enumerate(NAMES)]
    file = table(tmp_path / "labels.csv", "image,label,x0,y0,x1,y1", lines)
    with pytest.raises(
        ValueError, match=r"boxes of labels\.csv look like fractions of the image.*--data\.boxes relative"
    ):
        load(Data(source=str(file)))
    assert check(file, size=12, boxes="relative").batch([0]).boxes[0].tolist() == [[6, 6, 12, 12]]


def test_boxes_that_are_none_are_listed(tmp_path):
    flat(tmp_path)
    boxes = ["0,0,6,", "0,0,6,x"] + ["0,0,6,5"] * 10
    lines = [f"{name},{'ab'[i % 2]},{boxes[i]}" for i, name in enumerate(NAMES)]
    images, _, _ = everything(table(tmp_path / "labels.csv", "image,label,x0,y0,x1,y1", lines))
    assert len(images) == 10
    assert [reason.partition(",")[0] for _, reason in images.skipped] == [
        "expected finite numbers in its boxes",
        "expected boxes [x0",
    ]


# names of files


def test_paths_as_other_systems_write_them(tmp_path):
    flat(tmp_path, [f"Cats/{name}" for name in NAMES])
    (tmp_path / "elsewhere").mkdir()
    table(tmp_path / "labels.csv", "image,label", [f".\\Cats\\{name},{'ab'[i % 2]}" for i, name in enumerate(NAMES)])
    assert check(tmp_path / "labels.csv").notices == ()
    lines = [f"{tmp_path / 'Cats' / name},{'ab'[i % 2]}" for i, name in enumerate(NAMES)]
    assert check(table(tmp_path / "elsewhere/absolute.csv", "image,label", lines)).names[0].endswith("Cats/000.png")
    lines = [f"../Cats/{name},{'ab'[i % 2]}" for i, name in enumerate(NAMES)]
    check(table(tmp_path / "elsewhere/above.csv", "image,label", lines))


def test_another_case_and_no_suffix_are_said(tmp_path):
    flat(tmp_path, [f"Cats/{name}" for name in NAMES])
    lines = [f"{('cats', 'CATS')[i % 2]}/{Path(name).stem},{'ab'[i % 2]}" for i, name in enumerate(NAMES)]
    images = check(table(tmp_path / "labels.csv", "image,label", lines))
    assert images.notices == (
        "12 of the images listed have another case or suffix, the first: 'cats/000' for '000.png'",
    )
    picture(0, 0).save(tmp_path / "Cats" / "000.jpg")
    with pytest.raises(FileNotFoundError, match=r"1 of 12 images listed in labels\.csv do not exist; the first, 'c"):
        load(Data(source=str(tmp_path / "labels.csv")))


def test_composed_and_decomposed_names_are_the_same(tmp_path):
    names = [unicodedata.normalize("NFD", f"Hündin-{i}.png") for i in range(12)]
    flat(tmp_path, names)
    kinds = ["größer", unicodedata.normalize("NFD", "größer"), "klein", "klein"]
    lines = [f"{unicodedata.normalize('NFC', name)},{kinds[i % 4]}" for i, name in enumerate(names)]
    images, _, numbers = everything(table(tmp_path / "labels.csv", "image,label", lines))
    assert images.classes == ("größer", "klein") and images.notices == () and numbers == list(range(12))


# labels


def test_numbers_as_labels_are_in_the_order_of_numbers(tmp_path):
    flat(tmp_path)
    for numbers, classes in (((9, 10, 2), ("2", "9", "10")), (("1.0", "0.0", "1"), ("0", "1"))):
        lines = [f"{name},{numbers[i % 3]}" for i, name in enumerate(NAMES)]
        images, _, _ = everything(table(tmp_path / "labels.csv", "image,label", lines))
        assert images.classes == classes
        assert [images.classes[i] for i in images.labels] == [str(int(float(numbers[i % 3]))) for i in range(12)]
    for names in (("001", "01"), ("1_0", "2_0"), ("1e3", "2e3")):
        lines = [f"{name},{names[i % 2]}" for i, name in enumerate(NAMES)]
        assert everything(table(tmp_path / "labels.csv", "image,label", lines))[0].classes == names
    lines = [f"{name},{i / 8}" for i, name in enumerate(NAMES)]
    with pytest.raises(ValueError, match=r"expected class names or whole numbers in column 'label', got 0\.125; "):
        load(Data(source=str(table(tmp_path / "labels.csv", "image,label", lines))))


def test_empty_labels(tmp_path):
    flat(tmp_path)
    lines = [f"{name},{('a', 'b', '', 'nan')[i % 4]}" for i, name in enumerate(NAMES)]
    file = table(tmp_path / "labels.csv", "image,label", lines)
    with pytest.raises(ValueError, match="6 of 12 train images have no label; label them or leave them out"):
        load(Data(source=str(file)))
    assert everything(file)[0].labels.tolist() == [0, 1, -1, -1] * 3


def test_columns_can_be_named(tmp_path):
    flat(tmp_path)
    lines = [f"{name},{'ab'[i % 2]},x" for i, name in enumerate(NAMES)]
    file = table(tmp_path / "HAM_metadata.csv", "image_id,dx,label", lines)
    check(file, image="image_id", label="dx")
    with pytest.raises(ValueError, match=r"cannot tell which column of .*csv holds the image files; name one by data"):
        load(Data(source=str(file)))
    with pytest.raises(ValueError, match=r"no column 'image_di' \(data\.image\) in .*; did you mean 'image_id'\?"):
        load(Data(source=str(file), image="image_di"))
    with pytest.raises(ValueError, match=r"no column 'patient' \(data\.group\) in .*; columns: image_id, dx, label"):
        load(Data(source=str(file), image="image_id", group="patient"))


# mistakes


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", r"expected a line for each image in .*labels\.csv, it is empty"),
        ("image,label\n", r"expected a line for each image in .*labels\.csv, it is empty"),
        ("image,label\n000.png,a\n001.png\n", "line 3: expected 2 cells as in the header, got 1; put names"),
        ("image,label\n000.png,a, b\n", "line 2: expected 2 cells as in the header, got 3"),
        ("image,label,label\n000.png,a,b\n", "expected different column names, got 'label' twice; rename one"),
        ('image,label\n"000.png"x,a\n', "line 2: not a table of comma-separated values"),
        ("image,labels\n000.png,a\n", "cannot tell which column of .* the class; name one by data.label: image, lab"),
        ("image,label,split\n000.png,a,fold1\n", "line 2: expected train, val or test in column 'split', got 'fold1'"),
        ("image,label\n000.png,a\n001.png,b\n000.png,a\n", r"expected one line per image, got 1 more; the "
         r"first, '000\.png', is in lines 2 and 4 of .*csv; leave one line for each"),
        ("image,label\n000.png,a\n./000.PNG,b\n", r"'000\.png', is in lines 2 and 3 of .*csv as 'a' and 'b'; le"),
        ("image,label,x0,y0,x1,y1\n000.png,a,0,0,6,5\n000.png,b,0,0,6,5\n", "expected one line per.* as 'a' and 'b'"),
        ("image,label,group\n000.png,a,p1\n001.png,b,\n", "1 of 2 images have no 'group'; every image needs its group"),
        ("image,label\nimages/x.png,a\n000.png,b\nimages/y.png,b\n", r"2 of 3 images listed in labels\.csv do not "
         r"exist; the first, 'images/x\.png' in line 2, was expected in .*; correct the names or leave"),
        ("image,label\ndeep/000.png,a\n", r"1 of 1 images .*; there is 000\.png: write paths relative to the folder"),
        ("image,label,mask\n000.png,a,m.png\n", r"1 of 1 masks listed in labels\.csv do not exist; the first, 'm\."),
        (f"image,label\n{'x' * 300}/{'y' * 300},a\n", "1 of 1 images listed in labels.csv do not exist"),
        ("image,label\n,a\n", "1 of 1 images listed in labels.csv do not exist; the first, '' in line 2"),
        (b"image,label\n000.png,K\xe4tzchen\n", r"expected text in UTF-8, got other bytes in line 2; save it as UTF-8"),
        (b"image,label\n000.png,a\0\n", "expected text in UTF-8, got zero bytes"),
    ],
)  # fmt: skip
def test_mistakes_in_a_table(text, said, tmp_path):
    flat(tmp_path)
    (tmp_path / "labels.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises((ValueError, FileNotFoundError), match=said) as error:
        load(Data(source=str(tmp_path / "labels.csv")))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"file_name": "000.png"\n', "line 1: expected JSON, "),
        ('["000.png"]\n', r"line 1: expected an object such as \{\"file_name\": \"a.png\"\}, got \[\"000.png\"\]"),
    ],
)
def test_mistakes_in_json_lines(text, said, tmp_path):
    flat(tmp_path)
    (tmp_path / "metadata.jsonl").write_text(text)
    with pytest.raises(ValueError, match=said):
        load(Data(source=str(tmp_path)))


def test_what_is_left_out_is_said(tmp_path):
    usual(tmp_path, "metadata.csv")
    picture(0, 0).save(tmp_path / "more.png")
    assert check(tmp_path).notices == (
        f"images of {tmp_path} that no metadata file lists are left out: 1, the first more.png",
    )
    (tmp_path / "more.png").unlink()
    lines = [f"{name},{'ab'[i % 2]},p{i}" for i, name in enumerate(NAMES)]
    table(tmp_path / "metadata.csv", "file_name,label,gruop", lines)
    assert check(tmp_path).notices == ("column 'gruop' is not read; did you mean 'group'?",)


def test_class_folders_beside_metadata_of_something_else(tmp_path):
    make_folder(tmp_path, {"cat": 6, "dog": 6})
    table(tmp_path / "metadata.csv", "isic_id,age", ["0,50"])
    images = load(Data(source=str(tmp_path)))["train"]
    assert images.classes == ("cat", "dog")
    assert images.notices == (f"{tmp_path}/metadata.csv is not read, it has no column file_name with the images",)


def test_a_flat_folder_names_the_table_in_it(tmp_path):
    usual(tmp_path)
    with pytest.raises(ValueError, match=r"got 12 images without a class; .*; their table is a source, too: .*lab"):
        load(Data(source=str(tmp_path)))


def test_a_table_cannot_be_streamed(tmp_path):
    with pytest.raises(ValueError, match=r"data\.streaming needs parquet files or a hub name, got .*labels\.csv"):
        load_stream(Data(source=str(usual(tmp_path)), streaming=True))


def test_the_cache_notices_another_table(tmp_path):
    file = usual(tmp_path)
    assert load(Data(source=str(file)))["train"].classes == ("a", "b")
    lines = [f"{name},{'dc'[i % 2]}" for i, name in enumerate(NAMES[:8])]
    table(file, "image,label", lines)
    os.utime(file, ns=(1, 1))
    assert sizes(load(Data(source=str(file)))) == {"train": 5, "val": 1, "test": 2}
