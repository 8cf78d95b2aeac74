"""Published data sets in the folders that their authors distribute: birds, aircraft, cars, flowers, pets."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sightline.data import sources
from sightline.data.folders import contents, subfolders
from sightline.data.marks import BoxForm, Record
from sightline.data.tables import read_text
from sightline.recipe import Data

_ONE_BASED = -1  # authors who use Matlab count the first pixel as 1 and include the last one


class Entry(NamedTuple):
    """One image of a layout."""

    image: Path
    label: str
    part: str
    """train, val or test."""
    box: Sequence[float] | None = None
    mask: Path | None = None


class Layout(NamedTuple):
    """How a published data set lies in its folder."""

    title: str
    mark: str
    """A file that tells it from other folders."""
    read: Callable[[Path], list[Entry]]
    box_form: BoxForm | None = None
    mask_values: tuple[int, ...] | None = None
    notice: str | None = None


def from_layout(data: Data, folder: Path) -> sources.Table | None:
    """The images of a folder in the layout of a published data set, with its split, boxes and masks.

    The folder may also be the one above it, if that holds nothing else, or the `images` in it. None: another folder.

    Raises:
        FileNotFoundError: a file of the layout, or images that it lists, are missing.
        ValueError: a file of the layout holds something else.
    """
    found = _find(folder)
    if found is None:
        return None
    root, layout = found
    for option in sources.COLUMNS:
        if getattr(data, option) is not None:
            raise ValueError(f"data.{option} names a column, but {layout.title} has none in {root}; leave it out")
    try:
        entries = layout.read(root)
    except (KeyError, IndexError) as error:
        raise ValueError(
            f"{root}: the lists of {layout.title} do not belong together ({error}); unpack the archive again"
        ) from error
    if missing := [entry.image for entry in entries if not entry.image.is_file()]:
        raise FileNotFoundError(
            f"{len(missing)} of {len(entries)} images of {layout.title} are missing, the first {missing[0]}; "
            "unpack the archive again"
        )
    masks = {entry.image: entry.mask for entry in entries if entry.mask is not None and entry.mask.is_file()}
    classes = tuple(dict.fromkeys(sorted((entry.label for entry in entries), key=_in_order)))
    reader = sources.Records([Record(entry.image, masks.get(entry.image), entry.box) for entry in entries])
    side = sources.usual_side(reader, len(entries))
    return sources.Table(
        name=layout.title,
        classes=classes,
        labels=np.array([classes.index(entry.label) for entry in entries], dtype=np.int64),
        names=[entry.image.relative_to(root).as_posix() for entry in entries],
        parts=np.array([entry.part for entry in entries]),
        reader=reader,
        key=sources.fingerprint([*(entry.image for entry in entries), *masks.values(), root / layout.mark]),
        size=min(side or sources.LARGEST_SIDE, sources.LARGEST_SIDE),
        source_side=side,
        has_masks=bool(masks),
        has_boxes=any(entry.box is not None for entry in entries),
        box_form=layout.box_form,
        mask_values=layout.mask_values,
        notices=(
            f"{root} was read as {layout.title}, with its official split",
            *([layout.notice] if layout.notice else []),
        ),
    )


def _find(folder: Path) -> tuple[Path, Layout] | None:
    """The root of a layout: this folder, the only one in it, or the one above its `images`."""
    if not folder.is_dir():
        return None
    below = subfolders(folder)
    is_wrapped = len(below) == 1 and not contents(folder, deep=False).images
    places = [folder, *below[:is_wrapped], *[folder.parent] * (folder.name == "images")]
    return next(((root, layout) for root in places for layout in LAYOUTS if (root / layout.mark).is_file()), None)


def _in_order(label: str) -> tuple[int, str]:
    """Numbers by their value, other names by their letters."""
    return (int(label), "") if label.isdecimal() else (-1, label)


def _table(file: Path, cells: int) -> dict[str, list[str]]:
    """Lines of words separated by spaces, by their first word; the last cell is the rest of the line."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; unpack the archive again")
    table: dict[str, list[str]] = {}
    for number, line in enumerate(read_text(file).splitlines(), 1):
        words = line.split(None, cells - 1)
        if words and len(words) != cells:
            raise ValueError(f"{file}, line {number}: expected {cells} words, got {line!r}; unpack the archive again")
        if words:
            table[words[0]] = words[1:]
    return table


def _matlab(file: Path, *names: str, get: str = "unpack the archive again") -> list[Any]:
    """Variables of a Matlab file."""
    from scipy.io import loadmat

    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; {get}")
    try:
        content: Mapping[str, Any] = loadmat(str(file), squeeze_me=True, struct_as_record=True)
        return [np.atleast_1d(content[name]) for name in names]
    except Exception as error:  # a damaged file makes scipy raise anything
        expected = " and ".join(names)
        raise ValueError(f"{file}: expected a Matlab file with {expected}; {get}") from error


def _birds(root: Path) -> list[Entry]:
    images = _table(root / "images.txt", 2)
    labels = _table(root / "image_class_labels.txt", 2)
    names = _table(root / "classes.txt", 2)
    training = _table(root / "train_test_split.txt", 2)
    boxes = _table(root / "bounding_boxes.txt", 5) if (root / "bounding_boxes.txt").is_file() else {}
    # the masks are an archive of their own, unpacked into this folder or beside it
    masks = next((at for at in (root / "segmentations", root.parent / "segmentations") if at.is_dir()), None)
    return [
        Entry(
            root / "images" / path,
            names[labels[key][0]][0],
            "train" if training[key][0] == "1" else "test",
            [float(number) for number in boxes[key]] if key in boxes else None,
            None if masks is None else (masks / path).with_suffix(".png"),
        )
        for key, (path,) in images.items()
    ]


def _aircraft(root: Path) -> list[Entry]:
    boxes = _table(root / "images_box.txt", 5) if (root / "images_box.txt").is_file() else {}
    corners = {key: [float(number) for number in box] for key, box in boxes.items()}
    return [
        Entry(
            root / "images" / f"{key}.jpg",
            variant,
            part,
            [corners[key][0] + _ONE_BASED, corners[key][1] + _ONE_BASED, *corners[key][2:]] if key in corners else None,
        )
        for part in ("train", "val", "test")
        for key, (variant,) in _table(root / f"images_variant_{part}.txt", 2).items()
    ]


def _cars(root: Path) -> list[Entry]:
    (names,) = _matlab(root / "devkit" / "cars_meta.mat", "class_names")
    labeled = "cars_test_annos_withlabels.mat"
    tests = next((at for at in (root / labeled, root / "devkit" / labeled) if at.is_file()), root / labeled)
    training = _matlab(root / "devkit" / "cars_train_annos.mat", "annotations")
    testing = _matlab(tests, "annotations", get="the authors offer it as a download of its own, beside the archives")
    entries: list[Entry] = []
    for part, (lines,) in (("train", training), ("test", testing)):
        for line in lines:
            box = [float(line[f"bbox_{side}"]) for side in ("x1", "y1", "x2", "y2")]
            image = root / f"cars_{part}" / str(line["fname"])
            corners = [box[0] + _ONE_BASED, box[1] + _ONE_BASED, *box[2:]]
            entries.append(Entry(image, str(names[int(line["class"]) - 1]), part, corners))
    return entries


def _flowers(root: Path) -> list[Entry]:
    (labels,) = _matlab(root / "imagelabels.mat", "labels")
    sets = dict(zip(("train", "val", "test"), _matlab(root / "setid.mat", "trnid", "valid", "tstid"), strict=True))
    return [
        Entry(root / "jpg" / f"image_{number:05d}.jpg", str(int(labels[number - 1])), part)
        for part, numbers in sets.items()
        for number in numbers.tolist()
    ]


def _pets(root: Path) -> list[Entry]:
    return [
        Entry(
            root / "images" / f"{name}.jpg",
            re.sub(r"_\d+$", "", name),
            part,
            mask=root / "annotations" / "trimaps" / f"{name}.png",
        )
        for part, file in (("train", "trainval.txt"), ("test", "test.txt"))
        for name in _table(root / "annotations" / file, 4)
    ]


LAYOUTS = (
    Layout("CUB-200-2011", "image_class_labels.txt", _birds, "xywh"),
    Layout(
        "FGVC-Aircraft",
        "images_variant_train.txt",
        _aircraft,
        "xyxy",
        notice="the lowest 20 pixels of an image of FGVC-Aircraft name its photographer; maps there are worth a look",
    ),
    Layout("Stanford Cars", "devkit/cars_train_annos.mat", _cars, "xyxy"),
    Layout("Oxford 102 Flowers", "imagelabels.mat", _flowers),
    Layout("Oxford-IIIT Pet", "annotations/trainval.txt", _pets, mask_values=(1,)),
)
