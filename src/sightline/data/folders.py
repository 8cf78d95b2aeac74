"""Contents of a folder: images, other files, folders of splits, masks beside their images."""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from sightline.data.images import HEIF, UnreadableImage, few_values, formats, is_image, quiet, stored_size
from sightline.data.marks import evenly_spaced

PARTS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
# folders that systems and tools leave behind; names that begin with a dot are hidden as well
SYSTEM = {
    *("__macosx", "__pycache__", "lost+found", "system volume information"),
    *("@eadir", "@recycle", "#recycle", "$recycle.bin"),
}
IMAGE_WORDS = ("images", "image", "imgs", "img")
MASK_WORDS = (
    *("mask", "masks", "segmentation", "segmentations", "seg", "gt", "ground_truth", "groundtruth"),
    *("anno", "annotation", "annotations", "label", "labels"),
)
_MASK_NAME = re.compile(rf"(?P<image>.+?)[ _-](?:{'|'.join(MASK_WORDS)})[ _-]?\d*", re.IGNORECASE)
_MASK_FOLDER = re.compile(rf"(?P<images>(?:.+[ _-])?)(?:{'|'.join(MASK_WORDS)})", re.IGNORECASE)
_UNREAD = dict.fromkeys((".heic", ".heif", ".hif"), HEIF) | {
    f".{name}": f"Pillow does not read .{name}; convert it to PNG or TIFF"
    for name in (
        *("arw", "cr2", "cr3", "dng", "nef", "orf", "raf", "rw2"),  # cameras
        *("czi", "dcm", "dicom", "lif", "mrxs", "ndpi", "nii", "scn", "svs", "vsi"),  # microscopes and clinics
        *("emf", "eps", "exr", "hdr", "jxl", "pdf", "ps", "svg", "wmf"),
    )
}
_SAMPLE = 16


class Contents(NamedTuple):
    """The files of a folder, sorted."""

    images: list[Path]
    skipped: list[tuple[Path, str]]
    """Images that cannot be read, and links that lead nowhere or back, and why."""
    others: Counter[str]
    """Number of other files by suffix."""


def contents(folder: Path, deep: bool = True) -> Contents:
    """The files of a folder and its sub-folders, linked ones included and hidden ones left out.

    Files without a suffix count as images if they begin like one.
    """
    listed = Contents([], [], Counter())
    for path, reason in scan(folder, deep):
        if reason is None:
            listed.images.append(path)
        elif reason:
            listed.skipped.append((path, reason))
        else:
            listed.others[_suffix(path) or "no suffix"] += 1
    return Contents(sorted(listed.images), sorted(listed.skipped), listed.others)


def scan(folder: Path, deep: bool = True) -> Iterator[tuple[Path, str | None]]:
    """The files that `contents` sorts, as they are found: with None an image, with "" no image.

    An image that cannot be read, or a link that leads nowhere or back, comes with the reason.
    """
    visited = {at.resolve() for at in (folder, *folder.resolve().parents)}
    coming = [folder]
    while coming:
        here = coming.pop()
        inner: list[Path] = []
        try:
            with os.scandir(here) as entries:
                for entry in entries:
                    path = here / entry.name
                    if is_hidden(path):
                        continue
                    if entry.is_dir():
                        inner.append(path)
                    elif entry.is_file():
                        yield path, _reason(path)
                    elif entry.is_symlink():
                        yield path, "a link to a file that does not exist"
        except OSError as error:
            yield here, error.strerror or type(error).__name__
            continue
        for path in sorted(inner) if deep else ():
            if path.resolve() in visited:
                yield path, "a link back to a folder above it, or to one that was read already"
            else:
                visited.add(path.resolve())
                coming.append(path)


def image_files(folder: Path) -> list[Path]:
    """All image files below a folder, sorted; hidden ones are left out."""
    return contents(folder).images


def _suffix(file: Path) -> str:
    suffix = file.suffix.lower()
    return suffix if any(c.isalpha() for c in suffix) else ""  # a number such as .95 is none


def _reason(file: Path) -> str | None:
    suffix = _suffix(file)
    if suffix in formats() or (not suffix and is_image(file)):
        return None
    return _UNREAD.get(suffix, "")


def is_hidden(path: Path) -> bool:
    """Whether a folder or file is hidden, or was left behind by a system or tool."""
    return path.name.startswith(".") or path.name.lower() in SYSTEM


def subfolders(folder: Path) -> list[Path]:
    """The sub-folders that are not hidden, sorted."""
    return sorted(d for d in folder.iterdir() if not is_hidden(d) and d.is_dir())


def of_others(others: Counter[str]) -> list[str]:
    """A notice about files that are not images, if there are any.

    >>> of_others(Counter({".xml": 400, ".txt": 1}))
    ['401 files are no images and were not read: .xml (400), .txt (1)']
    """
    if not others:
        return []
    first = ", ".join(f"{suffix} ({n:,})" for suffix, n in others.most_common(5))
    more = f" and {len(others) - 5} other kinds" if len(others) > 5 else ""
    total = others.total()
    one = "1 file is no image and was" if total == 1 else f"{total:,} files are no images and were"
    return [f"{one} not read: {first}{more}"]


class Layout(NamedTuple):
    """Where the class folders of a source are."""

    roots: list[tuple[str, Path]]
    """Name of each split (train, val, test or empty), and the folder that holds its class folders."""
    masks: list[Path]
    """Folders of masks beside those of images."""
    notices: list[str]


def layout(folder: Path) -> Layout:
    """The folders that hold class folders: this one, those of its splits, or those of the only folder in it.

    Names such as `seg_train` and `seg_test`, or `train_images` and `test_images`, are splits if they differ only in
    that word. A split may be wrapped in a folder of the same name. Images for validation or testing outside class
    folders are left out.

    Raises:
        ValueError: folders are named like splits and hold no class folders.
    """
    notices: list[str] = []
    while True:
        kinds = subfolders(folder)
        splits = _splits(kinds)
        if splits or len(kinds) != 1 or not _leads_on(kinds[0]) or contents(folder, deep=False).images:
            break
        notices.append(f"the images were looked for in {kinds[0].name}, the only folder in {folder}")
        folder = kinds[0]
    if not splits:
        _refuse_loose_splits(folder, kinds)
        root, masks = _images_beside_masks(folder)
        return Layout([("", root)], masks, notices)
    if any(d.name.lower() not in PARTS for _, d in splits):
        named = ", ".join(f"{d.name} ({part})" for part, d in splits)
        notices.append(f"these folders were taken as splits: {named}")
    unread = [d.name for d in kinds if d not in [s for _, s in splits] and image_files(d)]
    if unread:
        notices.append(f"folders beside the splits were not read, though they hold images: {', '.join(unread)}")
    roots: list[tuple[str, Path]] = []
    masks: list[Path] = []
    for part, split in splits:
        root, beside = _images_beside_masks(_unwrapped(split))
        loose = [] if subfolders(root) or part == "train" else contents(root, deep=False).images
        if loose:
            notices.append(
                f"{len(loose):,} images in {split.name} lie in no class folder and were left out; "
                f"images for {'testing' if part == 'test' else 'validation'} are drawn from those for training"
            )
        else:
            roots.append((part, root))
            masks += beside
    return Layout(roots, masks, notices)


def _leads_on(folder: Path) -> bool:
    """Whether there are several folders in this one, or in the only one in it."""
    inner = subfolders(folder)
    return len(inner) > 1 or (len(inner) == 1 and _leads_on(inner[0]))


def _named_part(name: str) -> tuple[str, str] | None:
    """The split that one word of a name stands for, and the rest of the name.

    >>> _named_part("seg_train"), _named_part("TestImages"), _named_part("station")
    (('train', 'seg_'), ('test', 'images'), None)
    """
    words = [m for m in re.finditer(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name) if m[0].lower() in PARTS]
    if len(words) != 1:
        return None
    word = words[0]
    return PARTS[word[0].lower()], (name[: word.start()] + name[word.end() :]).lower()


def _families(kinds: Sequence[Path]) -> list[list[tuple[str, Path]]]:
    """Folders named after different splits and otherwise alike, or all folders if each is named after a split."""
    named = [(*part, kind) for kind in kinds if (part := _named_part(kind.name)) is not None]
    families: dict[str, list[tuple[str, Path]]] = defaultdict(list)
    for part, rest, kind in named:
        families[rest].append((part, kind))
    alike = [family for family in families.values() if len({part for part, _ in family}) > 1]
    if not alike and len(named) == len(kinds) and len({part for part, _, _ in named}) > 1:
        return [[(part, kind) for part, _, kind in named]]
    return alike


def _splits(kinds: Sequence[Path]) -> list[tuple[str, Path]]:
    plain = [(PARTS[kind.name.lower()], kind) for kind in kinds if kind.name.lower() in PARTS]
    if any(subfolders(d) for _, d in plain):
        return plain
    families = [family for family in _families(kinds) if any(subfolders(d) for _, d in family)]
    if len(families) > 1:
        names = " and ".join(", ".join(d.name for _, d in family) for family in families)
        raise ValueError(f"expected one set of splits in {kinds[0].parent}, got {names}; move the others elsewhere")
    return families[0] if families else []


def _refuse_loose_splits(folder: Path, kinds: Sequence[Path]) -> None:
    for family in _families(kinds):
        names = " and ".join(d.name for _, d in family)
        raise ValueError(
            f"expected a sub-folder of images per class in {folder}, got {names}, which are splits and hold no "
            "class folders; sort the images of each into a folder per class"
        )


def _unwrapped(split: Path) -> Path:
    """The folder in a split that holds its classes: seg_train/seg_train, train/images."""
    while len(inner := subfolders(split)) == 1:
        same = inner[0].name.lower() == split.name.lower()
        wraps = same or (inner[0].name.lower() in IMAGE_WORDS and subfolders(inner[0]))
        if not wraps or contents(split, deep=False).images:
            break
        split = inner[0]
    return split


def _images_beside_masks(root: Path) -> tuple[Path, list[Path]]:
    """The folder of class folders if `root` holds one folder of images and others of masks."""
    kinds = subfolders(root)
    images = [d for d in kinds if d.name.lower() in IMAGE_WORDS]
    masks = [d for d in kinds if d.name.lower() in MASK_WORDS]
    if len(images) == 1 and masks and len(kinds) == 1 + len(masks):
        return images[0], masks
    return root, []


def masks_of(files: Sequence[Path]) -> dict[Path, Path]:
    """Files named like masks, each with its image among the other files.

    `x_mask.png`, `x_mask_1.png`, `x_segmentation.png` ... beside an image `x`, and `x.png` in a folder `masks` whose
    image lies beside that folder or in a folder `images` there.

    >>> found = masks_of([Path("a/x.jpg"), Path("a/x_mask_1.png"), Path("a/y_mask.png"), Path("a/masks/x.png")])
    >>> [str(mask) for mask in found]
    ['a/x_mask_1.png', 'a/masks/x.png']
    """
    by_stem = {(file.parent, file.stem): file for file in files}
    masks: dict[Path, Path] = {}
    for file in files:
        match = _MASK_NAME.fullmatch(file.stem)
        stems = (file.stem, match["image"]) if match else (file.stem,)
        places = [(folder, name) for folder in _image_folders(file.parent) for name in stems]
        if match:
            places.append((file.parent, match["image"]))
        image = next((by_stem[place] for place in places if place in by_stem), None)
        if image is not None:
            masks[file] = image
    return {mask: image for mask, image in masks.items() if image not in masks}


@lru_cache(maxsize=1024)
def _image_folders(folder: Path) -> list[Path]:
    """Folders that may hold the images of a folder of masks."""
    names = folder.parts
    for i in reversed(range(len(names))):
        if match := _MASK_FOLDER.fullmatch(names[i]):
            rest = match["images"]  # train_masks, masks
            places = [rest, *(f"{rest}{word}" for word in IMAGE_WORDS), rest.rstrip(" _-")]
            return [Path(*names[:i], place, *names[i + 1 :]) for place in places]
    return []


def marked(files: Sequence[Path]) -> tuple[list[Path], dict[Path, tuple[Path, ...]], list[str]]:
    """Images, the masks of each, and a notice, if files named like masks also look like masks.

    A sample of them is opened. Masks of another size than their images are left out.
    """
    masks = masks_of(files)
    if not masks:
        return [*files], {}, []
    pairs = list(masks.items())
    sample = [pairs[i] for i in evenly_spaced(len(pairs), _SAMPLE)]
    with quiet():
        checks = [_check_pair(*pair) for pair in sample]
    alike = [fits for fits in checks if fits is not None]
    if not alike or sum(alike_or_not is not None for alike_or_not in checks) < 0.9 * len(checks):
        return [*files], {}, []
    images = [file for file in files if file not in masks]
    first = min(masks)
    what = f"{len(masks):,} files such as {first.name} in {first.parent.name} are masks of images"
    if not all(alike):
        return images, {}, [f"{what} and were left out: their sizes differ from those of the images"]
    of_image: dict[Path, tuple[Path, ...]] = defaultdict(tuple)
    for mask, image in pairs:
        of_image[image] += (mask,)
    return images, dict(of_image), [f"{what} and were read as masks"]


def _check_pair(mask: Path, image: Path) -> bool | None:
    """Whether a mask is as large as its image; None if it does not look like a mask."""
    try:
        return sorted(stored_size(mask)) == sorted(stored_size(image)) if few_values(mask) else None
    except UnreadableImage:
        return None
