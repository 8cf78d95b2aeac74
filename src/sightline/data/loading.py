"""`load`: finds the images that a recipe names, splits them and decodes them."""

from collections.abc import Sequence
from dataclasses import fields, replace
from itertools import islice
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from sightline.data import class_lists, clutter, hugging_face, people
from sightline.data.class_lists import of_classes, read_class_lists, with_lists
from sightline.data.columns import table
from sightline.data.decoded import Decoder, OnTheFly, Stored, decode_all
from sightline.data.duplicates import copies, sentences
from sightline.data.files import image_files
from sightline.data.images import MAX_PIXELS
from sightline.data.layouts import from_layout
from sightline.data.marks import Record, evenly_spaced, settle
from sightline.data.reid import from_market, market_root, queries_and_gallery, split_identities
from sightline.data.sets import ImageSet, ImageStream, Preprocess, batches, sampled, statistics
from sightline.data.sources import Listing, Records, Table, from_folder
from sightline.data.splits import assign, check_labeled, draw
from sightline.data.streams import stream
from sightline.data.tables import from_tables, lists_images, table_files
from sightline.facts import did_you_mean
from sightline.recipe import Data, Recipe
from sightline.recipe import load as load_recipe

_Examined = tuple[ImageSet, np.ndarray]
"""A split, and the imprint of each of its images."""

_COMPOSED = {**dict.fromkeys(clutter.PARTS, clutter.load), people.NAME: people.load}
DATASETS = {
    "clutter": "embedded: a handwritten digit among fragments of other digits, 10 classes with masks, 40 px",
    "clutter-shortcut": "clutter with a colored corner patch that tells the class in training only, with its mask",
    "clutter-pair": "clutter with two digits that tell the class only together, 9 classes with masks",
    "clutter-twice": "clutter with two scans of the digit, either of which tells the class, with masks",
    people.NAME: "figures of four parts in the colors of their identity, seen by four cameras, with masks, 64 x 32 px",
    **{name: alias.line for name, alias in hugging_face.ALIASES.items()},
    **class_lists.SOURCES,
}


def load(data: Data) -> dict[str, ImageSet]:
    """The splits train, val and test of an image set, decoded once and cached if the images are small.

    With cameras (`data.camera`, or a source that has them): train, val, query and gallery, see `reid`.

    With `data.val` 0 there is no val unless the source has one; with `data.streaming` there is no train
    (see `load_stream`). With `data.classes`, all three are of the classes to train on (see `load_new_classes`).

    Raises:
        FileNotFoundError: there is no such file, folder or data set.
        ValueError: what is there is not a labeled image set, or cannot be split as asked.
        ModuleNotFoundError: the source needs a library that is not installed.
    """
    data = _checked(data)
    if data.streaming:
        return load_stream(data)[1]
    if data.source in _COMPOSED:
        return _COMPOSED[data.source](data)
    listed = _find(data)
    blank = _blank(data, listed)
    if listed.cameras is not None:
        return _identities(data, listed, blank)
    rows = assign(listed.labels, listed.classes, listed.parts, listed.groups, replace(data, group=listed.group_name))
    sets = _without_copies(
        {split: _decoded(listed, split, chosen, blank, data) for split, chosen in rows.items()}, data
    )
    return _normalized(sets, listed, data)


def _identities(data: Data, listed: Table, blank: Preprocess) -> dict[str, ImageSet]:
    """The splits train, val, query and gallery of images with cameras."""
    rows = split_identities(listed, data)
    examined = {split: _once(*_decoded(listed, split, chosen, blank, data)) for split, chosen in rows.items()}
    return queries_and_gallery(_normalized(_without_copies(examined, data), listed, data), data)


def _once(images: ImageSet, imprints: np.ndarray) -> _Examined:
    """The same images without repeats of the same file, identity and camera, which a ranked list would count twice."""
    files = np.unique(imprints["file"], axis=0, return_inverse=True)[1].reshape(-1)
    cameras = np.unique(np.array(images.cameras), return_inverse=True)[1]
    first = np.sort(np.unique(np.stack([files, cameras, images.labels]), axis=1, return_index=True)[1])
    if len(first) == len(images):
        return images, imprints
    repeats = len(images) - len(first)
    notice = f"{repeats:,} {images.split} images repeat another of the same identity and camera and were left out"
    return replace(images.picked(first), notices=(*images.notices, notice)), imprints[first]


def _normalized(sets: dict[str, ImageSet], listed: Table, data: Data) -> dict[str, ImageSet]:
    """The same sets with the mean and deviation of the training images."""
    train = sets["train"] = replace(sets["train"], skipped=listed.skipped + sets["train"].skipped)
    if data.strict and train.skipped:
        raise ValueError(": ".join(train.skipped[0]))
    # images decoded on the fly are slow: a few must do
    preprocess = statistics(sampled(train.store, len(train), 2000 if isinstance(train.store, Stored) else 200))
    return {split: replace(images, preprocess=preprocess) for split, images in sets.items()}


def load_new_classes(data: Data, preprocess: Preprocess) -> dict[str, ImageSet]:
    """The images of the classes that training never sees: `val` to choose on, and `test`.

    All images of these classes, whichever split of the source they are in. Images become what `preprocess` says.

    Raises:
        FileNotFoundError: there is no such file, folder or data set, or no such class lists.
        ValueError: the recipe has no class lists, or a class is not in the source.
        ModuleNotFoundError: the source needs a library that is not installed.
    """
    data = _checked(data)
    if data.classes is None:
        raise ValueError(
            f"expected data.classes, the class lists of {data.source}, got none; name {', '.join(class_lists.SOURCES)} "
            "as data.source, or lists by data.classes"
        )
    lists = read_class_lists(data.classes)
    whole = _all_classes(data)
    sets: dict[str, ImageSet] = {}
    for part in ("val", "test"):
        listed = of_classes(whole, getattr(lists, part))
        images, _ = _decoded(listed, part, np.arange(len(listed.labels)), preprocess, data)
        sets[part] = replace(images, skipped=listed.skipped + images.skipped)
    return sets


def load_whole(data: Data, preprocess: Preprocess | None = None) -> dict[str, ImageSet]:
    """Other images for a trained network: the splits of the source, or all of it as test; none are held out.

    A class may have no image in training, images may have no label, and groups may occur in several splits. Images
    become what `preprocess` says; None: all of each image, at the size of `data`, without the network's mean and
    deviation.

    Raises:
        FileNotFoundError: there is no such file, folder or data set.
        ValueError: what is there is not an image set.
        ModuleNotFoundError: the source needs a library that is not installed.
    """
    data = _checked(data)
    if data.streaming or data.source in _COMPOSED:
        return load(data)
    listed = _find(data)
    blank = preprocess or _blank(data, listed)
    if listed.cameras is not None:
        return _identities(data, listed, blank)
    parts = np.where(listed.parts == "", "test", listed.parts)
    rows = {part: np.flatnonzero(parts == part) for part in np.unique(parts).tolist()}
    if data.test_size is not None and data.test_size < len(rows.get("test", ())):
        rows["test"] = rows["test"][draw(listed.labels[rows["test"]], data.test_size, data.seed)]
    sets = _without_copies({part: _decoded(listed, part, chosen, blank, data) for part, chosen in rows.items()}, data)
    return {part: replace(images, skipped=listed.skipped + images.skipped) for part, images in sets.items()}


def has_identities(data: Data) -> bool:
    """Whether the test of this source asks for images of the same identity, instead of a class."""
    is_composed = data.source in _COMPOSED
    return (
        data.camera is not None
        or data.source == people.NAME
        or (not is_composed and market_root(Path(data.source).expanduser()) is not None)
    )


def load_stream(data: Data) -> tuple[ImageStream, dict[str, ImageSet]]:
    """Training images to be read one after the other, and the splits val and test of `load`.

    If the source has no split for validation, its first training images are used.

    Raises:
        FileNotFoundError: there is no such file or data set.
        ValueError: the source cannot be streamed.
        ModuleNotFoundError: `datasets` is not installed.
    """
    data = _checked(data)
    hub_set = hugging_face.find(data)
    if hub_set is None:
        if data.source not in DATASETS:
            _find(data)
        raise ValueError(f"data.streaming needs parquet files or a hub name, got {data.source}; set it to false")
    reader, length, held = stream(data, hub_set)
    held = _marked(data, held)
    blank = _blank(data, held)
    train = ImageStream(
        name=held.name,
        classes=held.classes,
        preprocess=blank,
        length=length,
        records=reader,
        decoder=_decoder(held, blank, data),
        notices=held.notices,
        flip_ok=held.flip_ok,
        strict=data.strict,
    )
    first = islice(batches(train, 100, shuffle=(data.seed, 0)), 5)
    preprocess = statistics(batch.images.numpy() for batch in first)
    sets: dict[str, ImageSet] = {}
    for split in ("val", "test"):
        rows = np.flatnonzero(held.parts == split)
        check_labeled(held.labels[rows], split)
        if split == "test" and data.test_size is not None:
            rows = rows[draw(held.labels[rows], data.test_size, data.seed)]
        if len(rows):
            sets[split] = _decoded(held, split, rows, preprocess, data)[0]
    return replace(train, preprocess=preprocess, skipped=[]), sets


def read_images(
    paths: str | Path | Sequence[str | Path],
    preprocess: Preprocess,
    strict: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> ImageSet:
    """Image files, and those in folders and their sub-folders, without labels; nothing is cached.

    Raises:
        FileNotFoundError: a path is not there, or a folder holds no image.
        ValueError: no image can be read; with `strict`, one cannot.
    """
    given, skipped, notices = image_files(paths, strict)
    files = [file for file in given if isinstance(file, Path)]
    if len(files) < len(given):
        raise TypeError("expected paths, got an image that Pillow has opened; sightline.explain takes these")
    listed = Table(
        name="images",
        classes=(),
        labels=np.full(len(files), -1),
        names=[str(f) for f in files],
        parts=np.full(len(files), ""),
        reader=Records([Record(file) for file in files]),
        key=None,
        size=preprocess.size[0],
        notices=notices,
    )
    wanted = Data(strict=strict, max_pixels=max_pixels)
    images, _ = _decoded(listed, "images", np.arange(len(files)), preprocess, wanted)
    return replace(images, skipped=(*skipped, *images.skipped))


def _checked(data: Data) -> Data:
    """The same fields, each with its type and within its limits."""
    data = with_lists(load_recipe(Recipe(data=data)).data)
    if data.classes is not None and (data.streaming or data.source in _COMPOSED):
        what = "data.streaming true" if data.streaming else f"the source {data.source}"
        raise ValueError(f"expected no {what} with data.classes {data.classes}; leave one out")
    return data


def _find(data: Data) -> Table:
    if data.classes is None:
        return _all_classes(data)
    lists = read_class_lists(data.classes)
    return of_classes(_all_classes(data), lists.train)


def _all_classes(data: Data) -> Table:
    return _marked(data, _unmarked(data))


def _marked(data: Data, table: Table) -> Table:
    """The same table with the way to read its masks and boxes."""
    if data.boxes is not None and not table.has_boxes:
        raise ValueError(f"data.boxes says how boxes are written, but {data.source} has none; leave it out")
    if data.mask_values is not None and not table.has_masks:
        raise ValueError(f"data.mask_values says how masks are read, but {data.source} has none; leave it out")
    if not (table.has_masks or table.has_boxes):
        return table
    told = replace(data, boxes=data.boxes or table.box_form, mask_values=data.mask_values or table.mask_values)
    marks, notices = settle(told, table.name, table.reader(evenly_spaced(len(table.labels))))
    return replace(table, marks=marks, notices=table.notices + notices)


def _unmarked(data: Data) -> Table:
    hub_set = hugging_face.find(data)
    if hub_set is not None:
        return table(data, hub_set)
    folder = Path(data.source).expanduser()
    files = table_files(folder)
    listing = [file for file in files if folder.is_file() or lists_images(file, data)]
    if listing:
        return from_tables(data, folder, listing)
    if (root := market_root(folder)) is not None:
        return from_market(data, root)
    if (published := from_layout(data, folder)) is not None:
        return published
    if folder.is_dir():
        unread = tuple(f"{file} is not read, it has no column file_name with the images" for file in files)
        listed = from_folder(data, folder)
        return replace(listed, notices=listed.notices + unread)
    if folder.is_file():
        raise ValueError(
            f"expected a folder, a .parquet, .csv or .jsonl file or the name of a data set, got the file {folder}"
        )
    hint = did_you_mean(data.source, DATASETS, f"names: {', '.join(DATASETS)}")
    raise FileNotFoundError(f"no folder, parquet file or data set {data.source!r}{hint}")


def _blank(data: Data, table: Table) -> Preprocess:
    """The size, before the mean and standard deviation are known."""
    return Preprocess(size=data.sides or (table.size, table.size), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def _without_copies(sets: dict[str, _Examined], data: Data) -> dict[str, ImageSet]:
    """The splits with notices of images that occur twice, or without these images (`data.drop_duplicates`)."""
    order = [split for split in ("train", "val", "test", "query", "gallery") if split in sets]
    splits = [split for split in order for _ in range(len(sets[split][0]))]
    names = [name for split in order for name in sets[split][0].names]
    twice = copies(
        np.concatenate([sets[split][1] for split in order]),
        np.array([order.index(split) for split in splits], dtype=np.int64),
        np.concatenate([sets[split][0].labels for split in order]),
    )
    dropped = (twice.earlier >= 0) | (twice.relabeled >= 0) if data.drop_duplicates else None
    notices = tuple(sentences(twice, splits, names, dropped))
    whole = {split: replace(images, notices=images.notices + notices) for split, (images, _) in sets.items()}
    if dropped is None:
        return whole
    for split in order:
        kept = np.flatnonzero(~dropped[np.array(splits) == split])
        if not len(kept):
            raise ValueError(
                f"expected {split} images that are not copies, got {len(whole[split])} copies; add others, or leave "
                "out --drop-duplicates"
            )
        whole[split] = whole[split].picked(kept)
    return whole


def _decoder(table: Table, preprocess: Preprocess, data: Data) -> Decoder:
    return Decoder(
        size=preprocess.size,
        crop=preprocess.crop,
        interpolation=preprocess.interpolation,
        has_masks=table.has_masks,
        has_boxes=table.has_boxes,
        marks=table.marks,
        max_pixels=data.max_pixels,
    )


def _decoded(table: Table, split: str, rows: Int64[np.ndarray, " n"], preprocess: Preprocess, data: Data) -> _Examined:
    everything = np.arange(len(table.names))
    whole = OnTheFly(reader=table.reader, rows=everything, decoder=_decoder(table, preprocess, data))
    store, facts = decode_all(whole.picked(rows), f"{table.name} ({split})", table.key)
    skipped = tuple((table.names[rows[i]], reason) for i, reason in facts.skipped)
    if skipped and (data.strict or not facts.kept):
        count = "" if facts.kept else f"none of the {len(rows)} {split} images can be read; the first, "
        raise ValueError(count + ": ".join(skipped[0]))
    known = {field.name: getattr(table, field.name) for field in fields(Listing)}
    images = ImageSet(split=split, preprocess=preprocess, store=whole, **known).picked(rows[facts.kept])
    return replace(images, store=store, skipped=skipped), facts.imprints
