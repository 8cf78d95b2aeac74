"""Files of a slide's map that open elsewhere: GeoJSON for QuPath, an OME-TIFF pyramid, and a table of tiles."""

import csv
import io
import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8

from sightline import maps, runs
from sightline.checks import missing
from sightline.slides.bags import Bag

Array = np.ndarray
_NAMESPACE = uuid.UUID("6f1c1b7e-6f0e-4e5a-9d0e-0e3f5d9d8a10")
_TILE = 256


def write_geojson(file: Path, bag: Bag, values: Mapping[str, Float[Array, " n"]]) -> None:
    """The tiles as QuPath's tile objects, with a measurement for each of the values.

    In QuPath: drag the file onto the slide, then Measure > Show measurement maps. The same tile has the same id in
    every file of the slide.

    Raises:
        OSError: the disk is full or read-only.
    """
    features: list[dict[str, object]] = []
    for i in range(len(bag)):
        left, top, right, bottom = (round(place, 2) for place in bag.tiles.box(i))
        ring = [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]
        measured = {name: float(value[i]) for name, value in values.items()}
        features.append(
            {
                "type": "Feature",
                "id": str(uuid.uuid5(_NAMESPACE, f"{bag.name} {left} {top} {right}")),
                "geometry": {"type": "Polygon", "coordinates": [ring]},
                "properties": {"objectType": "tile", "isLocked": True, "measurements": measured},
            }
        )
    content = {"type": "FeatureCollection", "features": features}
    runs.write(file, json.dumps(content, allow_nan=False, separators=(",", ":")).encode())


def write_table(file: Path, bag: Bag, values: Mapping[str, Float[Array, " n"]]) -> None:
    """A CSV row per tile: place and size in pixels of the full resolution, micrometers, what the tile is like, values.

    Raises:
        OSError: the disk is full or read-only.
    """
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(
        ["tile", "left", "top", "side", "left, um", "top, um", "side, um", "tissue", "sharpness", "stain", *values]
    )
    for i, (left, top) in enumerate(bag.tiles.corners.tolist()):
        places = [left, top, bag.tiles.extent]
        micrometers = [round(place * bag.mpp, 3) for place in places]
        quality = [bag.tiles.tissue[i], bag.sharpness[i], bag.stain[i]]
        writer.writerow(
            [i, *(round(p, 3) for p in places), *micrometers, *(f"{q:.6g}" for q in quality)]
            + [f"{value[i]:.9g}" for value in values.values()]
        )
    runs.write(file, text.getvalue().encode())


def colored(values: Float[Array, "h w"]) -> UInt8[Array, "h w 3"]:
    """A raster in colors from 0 to its highest value, white where it is NaN; signed values diverge from white."""
    there = ~np.isnan(values)
    some = torch.from_numpy(np.append(values[there], 0.0)).float()[None]
    is_signed = bool((some < 0).any())
    drawn = np.full((*values.shape, 3), 255, dtype=np.uint8)
    drawn[there] = maps.color(maps.normalize(some, signed=is_signed), signed=is_signed)[:, 0, :-1].T.numpy()
    return drawn


def write_ome_tiff(file: Path, drawn: UInt8[Array, "h w 3"], mpp: float) -> None:
    """A picture as a pyramid in OME-TIFF, with its micrometers per pixel both in OME-XML and in the TIFF tags.

    Its upper left corner is that of the slide.

    Raises:
        OSError: the disk is full or read-only.
        ModuleNotFoundError: tifffile is not installed.
    """
    try:
        import tifffile
    except ImportError as error:
        raise missing("writing OME-TIFF needs tifffile", "slides") from error
    levels = [drawn]
    while max(levels[-1].shape[:2]) > 2 * _TILE:
        levels.append(levels[-1][::2, ::2])  # colors of a scale must not mix
    units = {f"PhysicalSize{axis}": mpp for axis in "XY"} | {f"PhysicalSize{axis}Unit": "µm" for axis in "XY"}
    metadata: dict[str, Any] = {"axes": "YXS", "Name": file.stem, **units}
    tiled: dict[str, Any] = {"photometric": "rgb", "compression": "deflate", "tile": (_TILE, _TILE)}
    content = io.BytesIO()
    with tifffile.TiffWriter(content, ome=True, bigtiff=True) as tiff:
        for place, level in enumerate(levels):
            tags: dict[str, Any] = {"resolution": (1e4 / mpp / 2**place,) * 2, "resolutionunit": "CENTIMETER"}
            kind: dict[str, Any] = {"subfiletype": 1} if place else {"subifds": len(levels) - 1, "metadata": metadata}
            tiff.write(level, **tiled, **tags, **kind)
    runs.write(file, content.getvalue())
