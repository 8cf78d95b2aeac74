"""Identities seen by cameras: the layout of Market-1501, DukeMTMC-reID and CUHK03, and splits by identity."""

import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int64, Shaped

from sightline.data.decoded import Record
from sightline.data.folders import contents, of_others, subfolders
from sightline.data.sets import ImageSet
from sightline.data.sources import COLUMNS, LARGEST_SIDE, Records, Table, fingerprint, usual_side
from sightline.data.splits import check_labeled, draw, drawn
from sightline.recipe import Data

Array = np.ndarray
FOLDERS = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}
"""The folder of each split."""
_NAME = re.compile(r"(?P<identity>-1|\d+)_c(?P<camera>\d+)(?!\d)")


def market_root(folder: Path) -> Path | None:
    """The folder of this layout: this one, or the only one directly in it; None if there is none.

    Raises:
        ValueError: several are in it, as `labeled` and `detected` of CUHK03, or a split is missing.
    """
    if not folder.is_dir():
        return None
    roots = [at for at in (folder, *subfolders(folder)) if (at / FOLDERS["train"]).is_dir()]
    if not roots:
        return None
    if roots[0] != folder and len(roots) > 1:
        raise ValueError(
            f"expected one set of identities in {folder}, got {' and '.join(at.name for at in roots)}; name one of them"
        )
    if missing := [name for name in FOLDERS.values() if not (roots[0] / name).is_dir()]:
        raise ValueError(f"expected the folders {', '.join(FOLDERS.values())} in {roots[0]}, got no {missing[0]}")
    return roots[0]


def from_market(data: Data, root: Path) -> Table:
    """The images of Market-1501's layout; files are named by identity and camera, as in 0002_c1s1_000451_03.jpg.

    Identity -1 is junk, without a label. Files with other names are skipped and listed.

    Source: Zheng et al. 2015, "Scalable person re-identification: a benchmark" (Market-1501); Zheng, Zheng and Yang
    2017 (1701.07717) for DukeMTMC-reID; Zhong et al. 2017 (1701.08398) for CUHK03's new protocol in this layout.

    Raises:
        ValueError: a column is named, or no file has such a name.
    """
    for option in COLUMNS:
        if getattr(data, option) is not None:
            raise ValueError(f"data.{option} names a column, but {root} has file names instead; leave it out")
    skipped: list[tuple[str, str]] = []
    files: list[tuple[str, Path, re.Match[str]]] = []
    notices: list[str] = []
    for split, name in FOLDERS.items():
        listed = contents(root / name)
        for file in listed.images:
            if match := _NAME.match(file.name):
                files.append((split, file, match))
            else:
                reason = "expected a name of identity and camera such as 0002_c1s1_000451_03.jpg; rename it"
                skipped.append((file.relative_to(root).as_posix(), reason))
        skipped += [(file.relative_to(root).as_posix(), reason) for file, reason in listed.skipped]
        notices += of_others(listed.others)
    if not files:
        got = f"got none of {len(skipped)}, the first {skipped[0][0]}" if skipped else "they are empty"
        raise ValueError(
            f"expected files named by identity and camera in {root}, such as 0002_c1s1_000451_03.jpg; {got}"
        )
    paths = [file for _, file, _ in files]
    identities = [match["identity"] for *_, match in files]
    classes = tuple(sorted({*identities} - {"-1"}))
    number = {name: i for i, name in enumerate(classes)}
    reader = Records([Record(path) for path in paths])
    side = usual_side(reader, len(paths))
    return Table(
        name=root.resolve().name,
        classes=classes,
        labels=np.array([number.get(name, -1) for name in identities]),
        names=[path.relative_to(root).as_posix() for path in paths],
        parts=np.array([split for split, *_ in files]),
        reader=reader,
        key=fingerprint(paths),
        size=min(side or LARGEST_SIDE, LARGEST_SIDE),
        source_side=side,
        cameras=np.array([match["camera"] for *_, match in files]),
        skipped=tuple(skipped),
        notices=tuple(notices),
    )


def split_identities(table: Table, data: Data) -> dict[str, Int64[Array, " _"]]:
    """Rows of train, val, query and gallery; no identity, and no group, is in two of train, val and the rest.

    Splits that the source lacks are fractions `data.test` and `data.val` of its identities, whole groups at a time;
    with `data.resplit` that is all of them, and images without identity are in the gallery.
    `query` is missing where the source has no queries of its own: then each image of the gallery is one.

    Raises:
        ValueError: the source's own splits share identities, an identity is in two groups, or too few identities.
    """
    labels, known = table.labels, table.labels >= 0
    part = np.where(table.parts == "", "train", np.where(table.parts == "test", "gallery", table.parts)).astype("<U7")
    if data.resplit:
        part[:] = "train"
    units = labels if table.groups is None else np.unique(table.groups, return_inverse=True)[1]
    if len(np.unique(np.stack([labels, units])[:, known], axis=1)[0]) > len(np.unique(labels[known])):
        raise ValueError(f"expected each identity in one group of {table.group_name!r}, got one in several; correct it")
    sides = {"train": part == "train", "val": part == "val", "test": np.isin(part, ("query", "gallery"))}
    for one, other in combinations(sides, 2):
        shared = np.intersect1d(units[sides[one] & known], units[sides[other] & known])
        if len(shared):
            raise ValueError(
                f"{len(shared)} of the identities or groups in {other} also occur in {one}, which would flatter the "
                "scores; correct that, or split again with --data.resplit true"
            )
    for name, share in (("gallery", data.test), ("val", data.val)):
        if name not in part and share > 0:
            part[_held_out(units, (part == "train") & known, share, data.seed)] = name
    if data.resplit:
        part[~known] = "gallery"
    rows = {name: np.flatnonzero(part == name) for name in ("train", "val", "query", "gallery") if name in part}
    if missing := [name for name in ("train", "gallery") if name not in rows]:
        raise ValueError(
            f"expected identities to train with and others to find, got no {missing[0]} images; set data.test"
        )
    for name in ("train", "val"):
        check_labeled(labels[rows.get(name, rows["train"])], name)
    rows["train"] = rows["train"][drawn(labels[rows["train"]], "train", data.train_size, data.seed)]
    if len(np.unique(labels[rows["train"]])) < 2:
        raise ValueError("expected at least two identities to train with, got one; add images of another")
    return rows


def _held_out(units: Int64[Array, " n"], among: Bool[Array, " n"], share: float, seed: int) -> Int64[Array, " _"]:
    """Rows of a random choice of whole units, about this fraction of the rows and at least one unit."""
    numbers, counts = np.unique(units[among], return_counts=True)
    if len(numbers) < 2:
        raise ValueError(
            f"expected at least two identities or groups to split by, got {len(numbers)}; name another group column"
        )
    order = np.random.default_rng(seed).permutation(len(numbers))
    enough = int(np.searchsorted(np.cumsum(counts[order]), share * counts.sum()))
    chosen = numbers[order[: min(enough + 1, len(numbers) - 1)]]
    return np.flatnonzero(among & np.isin(units, chosen))


def queries_and_gallery(sets: dict[str, ImageSet], data: Data) -> dict[str, ImageSet]:
    """The same sets with their own identities as classes, and with queries: `data.test_size` of them, if that is set.

    Raises:
        ValueError: no query has a match.
    """
    gallery = sets["gallery"]
    query = sets.get("query", replace(gallery, split="query", notices=(), skipped=()))
    if (query.labels < 0).any():
        query = query.picked(np.flatnonzero(query.labels >= 0))
    if data.test_size is not None and data.test_size < len(query):
        query = query.picked(draw(query.labels, data.test_size, data.seed))
    has_match = matched(query, gallery)
    if not has_match.any():
        raise ValueError(
            f"expected a query whose identity another camera has seen, got none among {len(query)} queries and "
            f"{len(gallery)} images of the gallery; add images, or name another column by data.camera"
        )
    notices = [*gallery.notices]
    if lonely := int((~has_match).sum()):
        first = query.names[int(np.flatnonzero(~has_match)[0])]
        notices.append(
            f"{lonely} of {len(query)} queries have no match, such as {first}: no other camera of the gallery has seen "
            "them, so they count for nothing"
        )
    found = tuple(np.unique(np.concatenate([query.labels, gallery.labels[gallery.labels >= 0]])).tolist())
    separate = {split: _counted(images, None) for split, images in sets.items() if split in ("train", "val")}
    return separate | {
        "query": _counted(query, found),
        "gallery": _counted(replace(gallery, notices=tuple(notices)), found),
    }


def matched(query: ImageSet, gallery: ImageSet) -> Bool[Array, " q"]:
    """Which queries have a match: their identity in the gallery, seen by another camera."""
    if query.cameras is None or gallery.cameras is None:
        raise ValueError("expected images with cameras, got none; name their column by data.camera")
    seen = {*zip(gallery.labels.tolist(), gallery.cameras.tolist(), strict=True)}
    cameras: dict[int, set[str]] = {}
    for identity, camera in seen:
        cameras.setdefault(identity, set()).add(camera)
    pairs: Iterator[tuple[int, str]] = zip(query.labels.tolist(), query.cameras.tolist(), strict=True)
    return np.array([bool(cameras.get(identity, set()) - {camera}) for identity, camera in pairs])


def _counted(images: ImageSet, identities: tuple[int, ...] | None) -> ImageSet:
    """Labels counted within these identities; None: those that occur."""
    chosen = np.array(identities if identities is not None else np.unique(images.labels), dtype=np.int64)
    labels: Shaped[Array, " n"] = np.where(images.labels < 0, -1, np.searchsorted(chosen, images.labels))
    return replace(images, labels=labels, classes=tuple(images.classes[i] for i in chosen.tolist()))
