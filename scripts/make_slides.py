"""Build tissue slides whose evidence is known, from labeled tiles: for tests and results, as public slides are large.

Each slide is a pyramidal OME-TIFF: blank glass, and on it tissue that is put together from tiles of one patient, in
random places and turns, with a stain that varies from slide to slide. A benign slide has benign tiles only. In a
malignant slide, a given share of the tissue comes in regions of malignant tiles, and SLIDE.geojson says where, in the
form in which QuPath exports annotations. Patients with tiles of one kind are joined, so that each has both.

    python scripts/make_slides.py TILES OUT [--slides 60] [--side 20000] [--shares 0.01,0.05,0.2] [--seed 0]

TILES is a folder of parquet files with the columns image, label (0 benign, 1 malignant) and patient. OUT gets the
slides and slides.csv (slide, label, patient, share). A slide that is there is not built again.
"""

import argparse
import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import tifffile
from PIL import Image
from scipy.ndimage import gaussian_filter

MPP = 0.62  # of the tiles
TILE = 256
GLASS = np.array([243, 243, 245], dtype=np.uint8)
JPEG = {"compression": "jpeg", "compressionargs": {"level": 85}, "photometric": "rgb", "tile": (TILE, TILE)}

Patients = dict[str, tuple[list[np.ndarray], list[np.ndarray]]]
"""Name -> benign and malignant tiles of 256 pixels."""


def read_patients(folder: Path) -> Patients:
    """Patients with both kinds of tiles; those with one kind are joined, the largest with the largest."""
    found: Patients = {}
    for file in sorted(folder.glob("*.parquet")):
        for row in pq.read_table(file, columns=["image", "label", "patient"]).to_pylist():
            image = Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")
            pixels = np.asarray(image.resize((TILE, TILE), Image.Resampling.BICUBIC))
            found.setdefault(str(row["patient"]), ([], []))[row["label"]].append(pixels)
    alone = [
        sorted((name for name, kinds in found.items() if not kinds[1 - kind]), key=lambda name: -len(found[name][kind]))
        for kind in (0, 1)
    ]
    joined = {name: kinds for name, kinds in found.items() if all(kinds)}
    for place, name in enumerate(alone[0]):
        others = alone[1][place :: len(alone[0])]
        if others:
            joined["+".join([name, *others])] = found[name][0], [tile for o in others for tile in found[o][1]]
    if not joined:
        raise SystemExit(f"expected benign and malignant tiles in {folder}, got {len(found)} patients without both")
    return joined


def blobs(shape: tuple[int, int], share: float, rng: np.random.Generator, width: float) -> np.ndarray:
    """Round regions that cover a share of a grid."""
    noise = gaussian_filter(rng.normal(size=shape), width)
    return noise > np.quantile(noise, 1 - share)


def stain(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Factor and offset of the optical density of each color."""
    return rng.normal(1.0, 0.08, 3).clip(0.8, 1.2), rng.normal(0.0, 0.02, 3)


class Painter:
    """One slide at its full resolution, drawn a row of tiles at a time."""

    def __init__(
        self, side: int, benign: list[np.ndarray], malignant: list[np.ndarray], share: float, rng: Any
    ) -> None:
        self.grid = side // TILE
        shape = (self.grid, self.grid)
        center = np.linspace(-1, 1, self.grid)
        round_shape = (center[:, None] ** 2 + center**2) < 0.85
        self.tissue = blobs(shape, 0.45, rng, self.grid / 20) & round_shape
        self.malignant = np.zeros(shape, dtype=bool)
        if share:
            wanted = max(1, round(share * self.tissue.sum()))
            noise = gaussian_filter(rng.normal(size=shape), self.grid / 30)
            order = np.argsort(np.where(self.tissue, -noise, np.inf), axis=None)[:wanted]
            self.malignant.flat[order] = True
        self.sources = benign, malignant
        self.choice = rng.integers(0, 2**31, shape)
        self.turn = rng.integers(0, 8, shape)
        factor, offset = stain(rng)
        density = -np.log((np.arange(256) + 1) / 256)
        self.table = np.stack([256 * np.exp(-(f * density + o)) - 1 for f, o in zip(factor, offset, strict=True)], 1)
        self.table = self.table.clip(0, 255).round().astype(np.uint8)

    def tile(self, row: int, column: int) -> np.ndarray:
        """One place of the grid."""
        if not self.tissue[row, column]:
            return np.broadcast_to(GLASS, (TILE, TILE, 3))
        choices = self.sources[int(self.malignant[row, column])]
        pixels = choices[self.choice[row, column] % len(choices)]
        turn = self.turn[row, column]
        pixels = np.rot90(pixels, turn % 4)
        pixels = pixels[:, ::-1] if turn >= 4 else pixels
        return np.stack([self.table[pixels[..., c], c] for c in range(3)], 2)

    def rows(self) -> Iterator[np.ndarray]:
        """Strips of the whole width, as high as a tile."""
        for row in range(self.grid):
            yield np.concatenate([self.tile(row, column) for column in range(self.grid)], 1)


def write_slide(file: Path, painter: Painter) -> None:
    """The pyramid: each level has half the side of the one before, down to one tile."""
    side = painter.grid * TILE
    sides = [side]
    while sides[-1] > 2 * TILE:
        sides.append(-(-sides[-1] // 2))
    size = {f"PhysicalSize{axis}": MPP for axis in "XY"} | {f"PhysicalSize{axis}Unit": "µm" for axis in "XY"}
    below = [np.empty((one, one, 3), dtype=np.uint8) for one in sides[1:2]]

    def full() -> Iterator[np.ndarray]:
        for row, strip in enumerate(painter.rows()):
            if below:
                half = np.asarray(Image.fromarray(strip).reduce(2))
                below[0][row * TILE // 2 : row * TILE // 2 + len(half)] = half
            yield from (strip[:, x : x + TILE] for x in range(0, side, TILE))

    started = file.with_suffix(".part")
    with tifffile.TiffWriter(started, ome=True, bigtiff=True) as tiff:
        resolution: dict[str, Any] = {"resolutionunit": "CENTIMETER"}
        tiff.write(
            full(), shape=(side, side, 3), dtype=np.uint8, subifds=len(sides) - 1,
            metadata={"axes": "YXS", **size}, resolution=(1e4 / MPP,) * 2, **resolution, **JPEG,
        )  # fmt: skip
        for level in range(1, len(sides)):
            tiff.write(below[0], subfiletype=1, resolution=(1e4 / MPP / 2**level,) * 2, **resolution, **JPEG)
            if level + 1 < len(sides):
                smaller = Image.fromarray(below[0]).resize((sides[level + 1],) * 2, Image.Resampling.BOX)
                below[0] = np.asarray(smaller)
    started.replace(file)


def annotation(painter: Painter) -> dict[str, Any]:
    """The malignant tiles as one annotation, a rectangle per run of a row, in pixels of the full resolution."""
    polygons: list[list[list[list[int]]]] = []
    for row, line in enumerate(painter.malignant):
        edges = np.flatnonzero(np.diff(np.pad(line.astype(int), 1)))
        for start, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
            x0, x1, y0, y1 = start * TILE, end * TILE, row * TILE, (row + 1) * TILE
            polygons.append([[[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]]])
    properties = {"objectType": "annotation", "classification": {"name": "Malignant", "color": [200, 0, 0]}}
    geometry = {"type": "MultiPolygon", "coordinates": polygons}
    features = [{"type": "Feature", "geometry": geometry, "properties": properties}] if polygons else []
    return {"type": "FeatureCollection", "features": features}


def main() -> None:
    """Read the tiles, then build the slides that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tiles", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--slides", type=int, default=60)
    parser.add_argument("--side", type=int, default=20_000, help="pixels, rounded down to whole tiles (20000)")
    parser.add_argument("--shares", default="0.01,0.05,0.2", help="shares of malignant tissue, in turn")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    patients = read_patients(options.tiles)
    names = sorted(patients)
    shares = [float(share) for share in options.shares.split(",")]
    options.out.mkdir(parents=True, exist_ok=True)
    lines: list[dict[str, Any]] = []
    for number in range(options.slides):
        turn, place = divmod(number, len(names))
        is_malignant = bool(turn % 2)
        share = shares[turn // 2 % len(shares)] if is_malignant else 0.0
        name = f"slide-{number:03d}"
        label = "malignant" if is_malignant else "benign"
        lines.append({"slide": f"{name}.ome.tif", "label": label, "patient": names[place], "share": share})
        file = options.out / f"{name}.ome.tif"
        if not file.is_file():
            painter = Painter(
                options.side, *patients[names[place]], share, np.random.default_rng([options.seed, number])
            )
            (options.out / f"{name}.geojson").write_text(json.dumps(annotation(painter)))
            write_slide(file, painter)
            print(file, flush=True)
    with open(options.out / "slides.csv", "w", newline="", encoding="utf-8") as table:
        writer = csv.DictWriter(table, fieldnames=list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)


if __name__ == "__main__":
    main()
