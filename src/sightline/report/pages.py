"""Maps of images as files: a page per image, an index of them, the raw values, and a table."""

import csv
import io
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor, nn

from sightline import maps, runs
from sightline.data import ImageSet, Preprocess
from sightline.data.files import Given, Picture, image_files, path_of
from sightline.data.images import MAX_PIXELS, File
from sightline.explainers import drawing, named
from sightline.explainers.selection import TOLD, prices
from sightline.facts import LEVELS, Progress, Verdict, duration, folded, words, worst
from sightline.inference import SHOWN, Memory, Output, in_batches
from sightline.notebook import bar_of
from sightline.report.networks import Explained, ExplainedNetwork, Network, methods_of, name_apart, network_of

_FEW, _PER_ROW = 3, 6  # maps beside an image: up to so many are large; more take rows of six
_LARGE, _SMALL = SHOWN, 256  # longest side of an image on a page, in pixels: beside few maps, and beside more
_INDEX, _OURS = "index.html", b" sightline</title>"  # in every page of templates/
_AT_ONCE = 16  # images decoded and explained together


@dataclass(frozen=True, kw_only=True)
class Pages:
    """What `pages` wrote, and what speaks against the maps."""

    folder: Path
    verdicts: dict[str, list[list[Verdict]]]
    """For each method and image, reasons to distrust the map."""
    rows: list[dict[str, Any]]
    """The lines of maps.csv: one for each image and method."""
    positions: dict[str, str]
    """For each method, how many positions its maps have, and how to get more if they are few."""
    written: frozenset[Path]
    skipped: tuple[tuple[str, str], ...]
    """Name and reason of each image that could not be read."""
    left_out: Mapping[str, str]
    """Methods that do not fit the model, and why."""
    unchecked: tuple[str, ...]
    """Methods whose maps were not compared with those of another class."""
    notices: tuple[str, ...]
    """Decisions about images and model that you may want to change."""

    def __repr__(self) -> str:
        return f"Pages: {next(self.lines())}\nindex: {self.folder / _INDEX}"

    def levels(self) -> str:
        """How many maps have a verdict, by the most severe level of each."""
        counts = Counter(worst(image) for images in self.verdicts.values() for image in images)
        levels = [f"{counts[level]} {level}" for level in reversed(LEVELS) if counts[level]]
        total = _counted(counts.total() - counts[None], "map")
        return f"{total} with a verdict" + (f" ({', '.join(levels)})" if levels else "")

    def doubts(self) -> Iterator[str]:
        """The verdicts above a note, by level and method, with the number of images; details if all have the same."""
        for level in reversed(LEVELS[1:]):
            for method, images in self.verdicts.items():
                by_kind: dict[str, list[str]] = {}
                for verdict in (verdict for image in images for verdict in image if verdict.level == level):
                    by_kind.setdefault(verdict.kind, []).append(str(verdict))
                if by_kind:
                    counts = [
                        f"{texts[0] if len(set(texts)) == 1 else kind} ({_counted(len(texts), 'image')})"
                        for kind, texts in by_kind.items()
                    ]
                    yield f"  {level}: {method}: {', '.join(counts)}"

    def lines(self) -> Iterator[str]:
        """A summary for the terminal."""
        images = len(next(iter(self.verdicts.values())))
        counts = f"{_counted(images, 'image')} x {_counted(len(self.verdicts), 'method')}"
        yield f"{counts} in {self.folder}; {self.levels()}, see maps.csv"
        yield from self.doubts()
        yield f"index: {self.folder / _INDEX}"
        for text in dict.fromkeys(self.positions.values()):
            yield f"{text}: {', '.join(method for method, other in self.positions.items() if other == text)}"


def pages(
    model: Network | Sequence[Network],
    images: Given | Sequence[Given] | ImageSet | UInt8[Tensor, "b 3 h w"],
    out: str | Path,
    methods: Sequence[str] | Sequence[Sequence[str]] = ("grad_cam",),
    target: int | str | None = None,
    layer: str | None = None,
    *,
    output: Output = None,
    preprocess: Preprocess | None = None,
    whole: bool = False,
    classes: Sequence[str] = (),
    name: str | None = None,
    batch_size: int = 64,
    memory: Memory = None,
    overlays: bool = False,
    strict: bool = False,
    max_pixels: int = MAX_PIXELS,
    progress: Progress | bool | None = None,
    tell: Callable[[str], None] | None = None,
) -> Pages:
    """Write maps of images into a folder.

    These are `NAME--page.png` and `NAME.npz` (raw maps) per image, maps.csv, and index.html, which shows all images.
    Each page is written as soon as its maps are there: one image after the other if a method takes many passes. After
    an interrupt, maps.csv and index.html list all pages that were written.

    The attention of a block with several maps (BR-NPA, bilinear attention pooling, MA-CNN) is drawn as
    `sightline.maps.parts`, and its .npz has all of its maps as `attention parts`; of several networks, each key
    has the network's name in front: `NETWORK: attention parts`.

    Args:
        model: a run folder, or a classifier; of several, each page shows the maps of all of them side by side.
        images: files and folders, or Pillow images, one or a list; an image set; or uint8 images at the size that the
            model takes.
        out: folder to write to; made if missing.
        methods: names of explainers, `name@layer` too; `["all"]` takes every one that fits the model, `["fast"]` those
            that take a few passes per image. Of several, those that do not fit are left out. For several models also a
            list of such lists, one for each.
        target: class to explain, by name or index. None: the predicted one.
        layer: see `sightline.explain`.
        output: see `sightline.explain`; decided once, by the first images.
        preprocess: how image files become the model's input. None: as in the run, or see `models.preprocess_of`.
        whole: resize all of each image, whatever its shape, also for a model that was trained on the middle of it.
        classes: class names of a model that is no run.
        name: of the model. None: as in the run, or that of its class; of several runs, that of their folder.
        batch_size: most images per forward.
        memory: see `sightline.explain`; the images themselves are cut by it, too.
        overlays: write each map over its image as a picture of its own, too.
        strict: raise instead of leaving out an unreadable image or a named method that does not fit.
        max_pixels: larger image files are skipped.
        progress: True shows a bar; a function is called with (what, done, total).
        tell: called with a sentence about the expected time, before the maps, if it is long.

    Raises:
        OSError: `out` cannot be written, or images or the run are missing.
        ValueError: no readable image, an unknown method, class or layer, or `out` has an index.html that is not ours.
    """
    out, progress = Path(out), bar_of(progress)
    runs.check_writable(out)
    if (out / _INDEX).is_file() and _OURS not in (out / _INDEX).read_bytes():
        raise ValueError(f"expected a folder without an {_INDEX} of another program, got {out}; choose a new one")
    models_given = [model] if isinstance(model, nn.Module | str | Path) else [*model]
    chosen = methods_of(methods, len(models_given))
    networks = [
        network_of(
            one,
            wanted,
            target,
            preprocess,
            whole,
            classes,
            name if len(models_given) == 1 else None,
            is_file=not isinstance(images, ImageSet | Tensor),
        )
        for one, wanted in zip(models_given, chosen, strict=True)
    ]
    name_apart(networks, models_given)
    has_slow = any(named(method)[1].many_passes for network in networks for method in network.asked())
    longest = _LARGE if sum(len(network.asked()) for network in networks) <= _FEW else _SMALL
    sources = [
        _Source(len(images), partial(_in_memory, images), [], ())
        if isinstance(images, ImageSet | Tensor)
        else _files(images, out, network.decoder(longest, max_pixels), strict, network.classes)
        for network in networks
    ]
    total = sources[0].total
    writer = _Writer(out, networks, any(network.preprocess.crop is not None for network in networks), overlays)
    notices = {text: None for network in networks for text in network.notices} | dict.fromkeys(sources[0].notices)
    unchecked = dict[str, None]()
    sizes: dict[str, Any] = {"batch_size": batch_size, "memory": memory}

    def explained(rows: range) -> list[tuple[_Chunk, Explained]] | None:
        chunks = [source.read(rows) for source in sources]
        read = [chunk for chunk in chunks if chunk is not None]
        if len(read) < len(chunks) or len({tuple(chunk.names) for chunk in read}) > 1:
            return None
        inputs = [network.inputs(chunk.images) for network, chunk in zip(networks, read, strict=True)]
        if not writer.rows:
            seconds: dict[str, float] = {}
            for network, normalized in zip(networks, inputs, strict=True):
                notices.update(dict.fromkeys(network.settle(normalized, layer, output, strict)))
                if tell is not None and has_slow:
                    given: dict[str, Any] = {"targets": network.target, "layer": layer, "output": network.output}
                    for method, price in prices(
                        network.model, normalized[:1], methods=network.methods, **given, **sizes
                    ).items():
                        seconds[method] = seconds.get(method, 0.0) + price
            if tell is not None and sum(seconds.values()) * total > TOLD:
                every = any(network.every for network in networks)
                tell(_expected(seconds, total) + "; without these: --methods fast" * every)
        return [
            (chunk, network.explain(normalized, layer, progress, sizes))
            for network, chunk, normalized in zip(networks, read, inputs, strict=True)
        ]

    at_once: dict[str, Any] = {"batch_size": 1 if has_slow else min(_AT_ONCE, batch_size), "memory": memory}
    image_bytes = sum(3 * network.preprocess.size[0] * network.preprocess.size[1] for network in networks)
    try:
        for rows, results in in_batches(
            explained, total, image_bytes * torch.float32.itemsize, networks[0].device, **at_once
        ):
            if results is not None:
                chunk = results[0][0]
                for _, (explanation, _) in results:
                    unchecked |= dict.fromkeys(explanation.unchecked)
                    notices |= dict.fromkeys(explanation.notices)
                shown = zip(chunk.names, chunk.true_classes, chunk.pictures, strict=True)
                for place, (image, true_class, picture) in enumerate(shown):
                    writer.write(image, true_class, picture, [result for _, result in results], place)
                writer.keep_table()
            if progress is not None:
                progress("explaining", rows.stop, total)
    finally:
        if writer.rows:
            writer.write_table()
            writer.write_index()
    skipped = dict.fromkeys(skip for source in sources for skip in source.skipped)
    if not writer.rows:
        first = "".join(f"; the first, {image}: {reason}" for image, reason in [*skipped][:1])
        raise ValueError(f"expected at least one readable image, got none{first}")
    return Pages(
        folder=out,
        verdicts=writer.verdicts,
        rows=writer.rows,
        positions=writer.positions,
        written=frozenset(writer.written),
        skipped=tuple(skipped),
        left_out={network.label(method): reason for network in networks for method, reason in network.left_out.items()},
        unchecked=tuple(unchecked),
        notices=(*notices, *writer.notices),
    )


class _Chunk(NamedTuple):
    names: list[str]
    true_classes: list[str]
    """Empty where it is not known."""
    images: UInt8[Tensor, "b 3 h w"]
    pictures: Sequence[UInt8[Tensor, "3 _ _"]]
    """The images as they are shown."""


class _Source(NamedTuple):
    total: int
    read: Callable[[range], _Chunk | None]
    """The readable images among those at these places, if there are any."""
    skipped: list[tuple[str, str]]
    """Name and reason of each image that could not be read so far."""
    notices: tuple[str, ...]
    is_cropped: bool = False
    """Whether only the middle of each image is shown."""


def _in_memory(images: ImageSet | UInt8[Tensor, "b 3 h w"], rows: range) -> _Chunk:
    if isinstance(images, ImageSet):
        batch = images.batch(rows)
        known = [images.classes[i] if 0 <= i < len(images.classes) else "" for i in batch.labels.tolist()]
        return _Chunk(batch.names, known, batch.images, list(batch.images.cpu()))
    pixels = images[rows.start : rows.stop]
    return _Chunk([f"image-{i}" for i in rows], [""] * len(rows), pixels, list(pixels.cpu()))


def _files(
    images: Given | Sequence[Given],
    out: Path,
    decode: Callable[[Sequence[File]], list[Picture | str]],
    strict: bool,
    classes: Sequence[str],
) -> _Source:
    each = [images] if isinstance(images, Given) else images
    if any(
        isinstance(path, str | Path) and Path(path).is_dir() and out.resolve() == Path(path).resolve() for path in each
    ):
        raise ValueError(f"expected an output folder other than that of the images, got {out}; choose a new one")
    files, skipped, notices = image_files(each, strict)
    folders = {folded(name): name for name in classes}

    def read(rows: range) -> _Chunk | None:
        names: list[str] = []
        readable: list[Picture] = []
        part = files[rows.start : rows.stop]
        called = [str(path_of(file) or f"image-{number}") for number, file in zip(rows, part, strict=False)]
        for name, picture in zip(called, decode(part), strict=True):
            if not isinstance(picture, str):
                names.append(name)
                readable.append(picture)
            elif strict:
                raise ValueError(f"{name}: {picture}")
            else:
                skipped.append((name, picture))
        if not names:
            return None
        pixels = torch.stack([torch.from_numpy(picture.image) for picture in readable]).movedim(-1, 1)
        true_classes = [folders.get(folded(Path(name).resolve().parent.name), "") for name in names]
        return _Chunk(
            names, true_classes, pixels, [torch.from_numpy(picture.shown).movedim(-1, 0) for picture in readable]
        )

    return _Source(len(files), read, skipped, notices)


@dataclass
class _Writer:
    """Writes the files of one image after the other."""

    folder: Path
    networks: Sequence[ExplainedNetwork]
    is_cropped: bool
    overlays: bool
    rows: list[dict[str, Any]] = field(default_factory=lambda: [])
    verdicts: dict[str, list[list[Verdict]]] = field(default_factory=lambda: {})
    positions: dict[str, str] = field(default_factory=lambda: {})
    written: set[Path] = field(default_factory=lambda: set())
    stems: set[str] = field(default_factory=lambda: set())
    notices: dict[str, None] = field(default_factory=lambda: {})
    thumbnails: dict[str, bytes] = field(default_factory=lambda: {})
    """By `maps` of the rows."""
    kept: int = 0

    def write(
        self, name: str, true_class: str, picture: UInt8[Tensor, "3 h w"], results: Sequence[Explained], place: int
    ) -> None:
        """The page and the raw maps of the image at this place of each network's explanation."""
        stem = free_name(Path(name).stem, self.stems)
        raw: dict[str, Any] = {}
        columns: list[drawing.Column] = []
        rows: list[dict[str, Any]] = []
        headings: list[str] = []
        for network, result in zip(self.networks, results, strict=True):
            explanation = result.explanation
            probabilities = explanation.probabilities[place].tolist()
            explained, predicted = int(explanation.targets[place, 0]), int(explanation.probabilities[place].argmax())
            of_class, prediction = (
                network.classes[i] if i < len(network.classes) else str(i) for i in (explained, predicted)
            )
            headings.append(self._answer(network, probabilities, explained, predicted))
            answers = {
                "class": of_class,
                "probability": f"{probabilities[explained]:.4f}",
                "prediction": prediction,
                "prediction_probability": f"{probabilities[predicted]:.4f}",
                "true_class": true_class,
            }
            for method in sorted(explanation.maps, key=lambda method: method in explanation.controls):
                values = explanation.maps[method][place, 0].float().cpu().numpy()
                label = network.label(method)
                verdicts, layer = explanation.verdicts[method][place], explanation.layers[method]
                raw[label] = values
                self.verdicts.setdefault(label, []).append(verdicts)
                self.positions[label] = positions(
                    values.shape, bool(layer), network.is_run and method not in explanation.controls
                )
                rows.append(
                    {
                        "image": name,
                        "maps": stem,
                        **({"network": network.name} if network.prefix else {}),
                        **answers,
                        "method": method,
                        "layer": layer.name,
                        "shape": " x ".join(map(str, layer.shape)),
                        "positions": " x ".join(map(str, values.shape)),
                        "lowest": float(values.min()),
                        "highest": float(values.max()),
                        "level": worst(verdicts) or "",
                        "verdicts": "; ".join(verdicts),
                    }
                )
                colored = result.picture(method, place)
                if colored is None:
                    column = drawing.column(explanation, method, place)
                else:
                    raw[f"{label} parts"] = result.parts[method].maps[place].float().cpu().numpy()
                    column = drawing.column(explanation, method, place, before=in_color(len(raw[f"{label} parts"])))
                    column = column._replace(content=colored)
                column = column._replace(name=label, title=f"{network.prefix}{column.title}")
                columns.append(column)
                if self.overlays:
                    self._save(f"{stem}--{_file_name(label)}.png", maps.png(self._drawn(picture, column)))
        self._save(f"{stem}.npz", drawing.packed(raw))
        page = drawing.figure(
            picture,
            columns,
            self._heading(Path(name).name, true_class, headings),
            side=_LARGE if len(columns) <= _FEW else _SMALL,
            per_row=None if len(columns) <= _FEW else _PER_ROW,
            title="what the network sees" if self.is_cropped else "image",
        )
        self._save(f"{stem}--page.png", maps.png(page))
        self.thumbnails[stem] = thumbnail([picture, self._drawn(picture, columns[0])])
        self.rows += rows  # last, so that table and index list whole images only

    def _drawn(self, picture: UInt8[Tensor, "3 h w"], column: drawing.Column) -> UInt8[Tensor, "3 h w"]:
        """A map laid over the image, or a picture of maps at the size of the image."""
        if column.content.is_floating_point():
            return maps.overlay(picture[None], column.content, signed=column.is_signed)[0, 0]
        return maps.resize(column.content.float(), picture.shape[1:])[0].round().clamp(0, 255).to(torch.uint8)

    def _heading(self, file: str, true_class: str, answers: Sequence[str]) -> str:
        """What is over a page: the answer of the network, or the image and then the answers of several."""
        image = f"image: {file}" if maps.is_writable(file) else ""
        of_class = f"true class: {true_class}" if true_class and maps.is_writable(true_class) else ""
        if len(answers) > 1:
            return "\n".join(["; ".join(filter(None, (image, of_class))) or "image", *answers])
        first = "; ".join(filter(None, (answers[0], of_class)))
        return f"{first}\n{', '.join(filter(None, (f'network: {self.networks[0].name}', image)))}"

    def _answer(self, network: ExplainedNetwork, probabilities: Sequence[float], explained: int, predicted: int) -> str:
        for name in (network.classes[i] for i in {explained, predicted} if i < len(network.classes)):
            if not maps.is_writable(name):
                text = f"no font here has the letters of {name}, so pages show the numbers of such classes"
                self.notices[f"{text}; install one that has them"] = None
        before = network.prefix or "explained: "
        return drawing.answer(probabilities, explained, predicted, network.classes, before)

    def keep_table(self) -> None:
        """Write maps.csv if it has grown by a twentieth since, so that little is missing even if the process dies."""
        if len(self.rows) >= 1.05 * self.kept:
            self.write_table()

    def write_table(self) -> None:
        """maps.csv."""
        self.kept = len(self.rows)
        table = io.StringIO()
        writer = csv.DictWriter(table, list(self.rows[0]))
        writer.writeheader()
        writer.writerows(self.rows)
        self._save("maps.csv", table.getvalue().encode())

    def write_index(self) -> None:
        """index.html, a thumbnail of each image with its prediction and the worst verdict, linked to its page."""
        from sightline.notebook import uri
        from sightline.report.formats import template

        places = {": ".join(filter(None, (row.get("network"), row["method"]))): row for row in self.rows}
        page = template(_INDEX).render(
            model=", ".join(network.name for network in self.networks),
            images=[_indexed(rows, uri("jpeg", self.thumbnails[rows[0]["maps"]])) for rows in self._by_image()],
            places={
                method: f"{row['layer']}, {row['positions']} positions".removeprefix(", ")
                for method, row in places.items()
            },
        )
        self._save(_INDEX, page.encode())

    def _by_image(self) -> Iterator[list[dict[str, Any]]]:
        count = len(self.verdicts)
        for start in range(0, len(self.rows), count):
            yield self.rows[start : start + count]

    def _save(self, file: str, content: bytes) -> None:
        runs.write(self.folder / file, content)
        self.written.add(self.folder / file)


def _expected(seconds: Mapping[str, float], images: int) -> str:
    """What to expect of methods with many passes, the most expensive first."""
    each = ", ".join(f"{name} {duration(seconds[name])}" for name in sorted(seconds, key=lambda name: -seconds[name]))
    total = sum(seconds.values())
    whole = f", {duration(total * images)} for {images} images" if images > 1 else ""
    return f"expected time: {duration(total)} per image{whole}; {each}"


def _indexed(rows: Sequence[Mapping[str, Any]], picture: str) -> dict[str, Any]:
    """An image as the index shows it, from its lines of maps.csv."""
    levels: tuple[str, ...] = ("", *LEVELS)
    judged = [row for row in rows if not named(row["method"])[1].is_control] or rows
    gravest = max(judged, key=lambda row: levels.index(row["level"]))
    return {
        "name": Path(rows[0]["image"]).name,
        "page": quote(f"{rows[0]['maps']}--page.png"),
        "true_class": rows[0]["true_class"],
        "prediction": rows[0]["prediction"],
        "probability": float(rows[0]["prediction_probability"]),
        "method": judged[0]["method"],
        "level": gravest["level"],
        "verdict": f"{words(gravest['method'])}: {gravest['verdicts']}",
        "picture": picture,
    }


def thumbnail(pictures: Sequence[UInt8[Tensor, "3 h w"]], side: int = 128) -> bytes:
    """A JPEG file of pictures side by side, each shrunk to `side` pixels where it is larger.

    >>> thumbnail([torch.zeros(3, 2, 2, dtype=torch.uint8)])[:2].hex()
    'ffd8'
    """
    height, width = pictures[0].shape[1:]
    scale = min(1.0, side / max(height, width))
    size = len(pictures) * max(1, round(scale * width)), max(1, round(scale * height))
    joined = Image.fromarray(torch.cat(list(pictures), 2).movedim(0, -1).numpy())
    file = io.BytesIO()
    joined.resize(size, Image.Resampling.BOX).save(file, "JPEG", quality=80)
    return file.getvalue()


def in_color(count: int) -> str:
    """What the colors mean in a picture of the maps of a block that has this many.

    >>> in_color(2)
    'red, green: its two maps; brightness: norm of the features'
    """
    colors = ", ".join(("red", "green", "blue")[:count])
    which = {1: "its map", 2: "its two maps"}.get(count, "its first three maps")
    return f"{colors}: {which}; brightness: norm of the features"


def positions(grid: Sequence[int], has_layer: bool, can_be_trained: bool) -> str:
    """How many positions a map has, and how to get more if they are few.

    >>> positions((4, 4), True, False)
    '4 x 4 positions (coarse; for finer maps name an earlier --layer)'
    """
    ways = ["train with a larger --data.size"] * can_be_trained + ["name an earlier --layer"] * has_layer
    finer = f" (coarse; for finer maps {' or '.join(ways)})" if min(grid) < maps.COARSE and ways else ""
    return f"{' x '.join(map(str, grid))} positions{finer}"


def free_name(name: str, taken: set[str]) -> str:
    """A name without unprintable letters that is not taken yet, with a number behind it if it has to be; it then is.

    >>> taken = set()
    >>> [free_name(name, taken) for name in ("a", "a", "a-2", "b", "a")]
    ['a', 'a-2', 'a-2-2', 'b', 'a-3']
    """
    name = "".join(c if c.isprintable() else "_" for c in name)
    free = next(each for each in (name, *(f"{name}-{n}" for n in range(2, len(taken) + 3))) if each not in taken)
    taken.add(free)
    return free


def _file_name(method: str) -> str:
    return "".join(c if c.isalnum() or c in "._-@" else "_" for c in method)


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
