"""Broken, hostile and huge image files: which are read, which are listed, how long one takes, and how much memory.

python benchmarks/fuzz_images.py [--files 10000] [--bombs 1] [--work FOLDER] [--minutes 30]

Files lie in folders of 500, and each folder is read by its own process, as `sightline explain` reads it. Folders that
are done in FOLDER are skipped. Decompression bombs of 56 to 178 megapixels come last: their folder is read, then
explained by the command with an untrained network, at the default limit of pixels and at the largest.
"""

import argparse
import io
import itertools
import json
import os
import random
import resource
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from measure import save
from PIL import Image, ImageFile

FOLDER = 500
FORMATS = (
    "JPEG",
    "PNG",
    "TIFF",
    "WEBP",
    "AVIF",
    "GIF",
    "BMP",
    "PPM",
    "JPEG2000",
    "ICO",
    "TGA",
    "PCX",
    "DDS",
    "QOI",
    "SGI",
)
SUFFIXES = (
    ".jpg",
    ".png",
    ".tif",
    ".webp",
    ".avif",
    ".gif",
    ".bmp",
    ".ppm",
    ".jp2",
    ".ico",
    ".tga",
    ".jfif",
    ".heic",
    "",
)
NAMES = (
    "{}",
    "{} (1)",
    "é{}",
    "e\u0301{}",
    "-{}",
    "%2F{}",
    "{}\n",
    "{}'\"",
    "{}" + "x" * 180,
    "{}.tar",
    "CON{}",
    "{}?a=1",
)


def originals() -> list[bytes]:
    """Small images of every format and mode that Pillow writes."""
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 4), dtype=np.uint8)
    color = Image.fromarray(noise[..., :3])
    gray16 = Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112] = 6
    images: list[bytes] = []
    for image in (color, Image.fromarray(noise), color.convert("L"), color.quantize(16), color.convert("1"), gray16):
        for kind in FORMATS:
            for options in ({}, {"exif": exif}, {"save_all": True, "append_images": [image]}, {"progressive": True}):
                try:
                    images.append(_encoded(image, kind, **options))
                except (OSError, KeyError, ValueError, TypeError):
                    continue
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits", "group4"):
        image = color.convert("1") if compression == "group4" else color
        images.append(_encoded(image, "TIFF", compression=compression))
    return list(dict.fromkeys(images))


def _encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def mutated(content: bytes, rng: random.Random) -> bytes:
    """The file, damaged in one of seven ways, or intact."""
    data = bytearray(content)
    kind = rng.randrange(8)
    if kind == 0:
        return bytes(data[: rng.randrange(len(data) + 1)])
    if kind == 1:
        for _ in range(rng.randrange(1, 20)):
            data[rng.randrange(len(data))] = rng.randrange(256)
    if kind == 2:  # sizes and offsets are at the front
        for _ in range(rng.randrange(1, 8)):
            data[rng.randrange(min(64, len(data)))] = rng.choice((0, 1, 127, 128, 255))
    if kind == 3:
        at = rng.randrange(len(data))
        data[at:at] = rng.randbytes(rng.randrange(1, 200))
    if kind == 4:
        at = rng.randrange(len(data))
        del data[at : at + rng.randrange(1, 200)]
    if kind == 5:
        at = rng.randrange(len(data))
        data[at : at + 64] = bytes(64)
    if kind == 6:
        return rng.randbytes(rng.randrange(3000)) if rng.random() < 0.5 else bytes(data[:24]) + rng.randbytes(2000)
    return bytes(data)


def make(folder: Path, number: int) -> int:
    """Write the files of one folder and return their number."""
    rng, images = random.Random(number), originals()
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(FOLDER):
        name = rng.choice(NAMES).format(f"{i:03d}") + rng.choice(SUFFIXES)
        (folder / name).write_bytes(mutated(rng.choice(images), rng))
    return len(list(folder.iterdir()))


def bombs(folder: Path) -> None:
    """Write images of 56 to 178 megapixels, in every format that supports them."""
    folder.mkdir(parents=True, exist_ok=True)
    tile = Image.fromarray(np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)).resize(
        (1024, 1024)
    )

    def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
        image = Image.new(mode, (width, height))
        for y in range(0, height, 4096):  # a quarter is noise, the rest is flat and compresses well
            for x in range(0, width, 2048):
                image.paste(tile.convert(mode), (x, y))
        return image

    exif = Image.Exif()
    exif[0x0112] = 6
    wide, most = (10_900, 8_200), (14_900, 12_000)
    jobs = {
        "baseline.jpg": (most, "RGB", {"quality": 80}),
        "baseline-2.jpg": (most, "RGB", {"quality": 80}),
        "cmyk.jpg": (wide, "CMYK", {}),
        "progressive.jpg": (wide, "RGB", {"progressive": True}),
        "progressive-178.jpg": (most, "RGB", {"progressive": True}),
        "turned.jpg": (most, "RGB", {"exif": exif}),
        "rgb.png": (wide, "RGB", {"compress_level": 1}),
        "rgb-2.png": (wide, "RGB", {"compress_level": 1}),
        "rgb-178.png": (most, "RGB", {"compress_level": 1}),
        "rgba.png": (wide, "RGBA", {"compress_level": 1}),
        "palette.png": (wide, "P", {"compress_level": 1}),
        "one-bit.png": (wide, "1", {}),
        "sixteen.png": (wide, "I;16", {"compress_level": 1}),
        "turned.png": (wide, "RGB", {"compress_level": 1, "exif": exif}),
        "long.png": ((80_000_000, 1), "L", {"compress_level": 1}),
        "rgb.tif": (wide, "RGB", {"compression": "tiff_lzw"}),
        "turned-112.tif": ((11_800, 9_500), "RGB", {"compression": "packbits", "exif": exif}),
        "progressive-147.jpg": ((13_550, 10_850), "RGB", {"progressive": True, "subsampling": 0}),
        "cmyk-progressive.jpg": (most, "CMYK", {"progressive": True, "subsampling": 0}),
        "rgba-56.webp": ((16_383, 3_430), "RGBA", {"method": 0, "lossless": True, "quality": 0}),
        "rgb-178.avif": (most, "RGB", {"speed": 10, "quality": 40}),
        "turned.tif": (wide, "RGB", {"compression": "packbits", "exif": exif}),
        "float.tif": (wide, "F", {"compression": "tiff_adobe_deflate"}),
        "rgb-178.tif": (most, "RGB", {"compression": "tiff_lzw"}),
        "rgb.webp": ((16_383, 5_400), "RGB", {"method": 0, "lossless": True, "quality": 0}),
        "rgba.webp": ((16_383, 5_400), "RGBA", {"method": 0, "lossless": True, "quality": 0}),
        "rgb-178.webp": ((16_383, 10_900), "RGB", {"method": 0, "lossless": True, "quality": 0}),
        "palette.gif": (wide, "P", {}),
        "rgb.bmp": (wide, "RGB", {}),
        "rgb.jp2": (wide, "RGB", {"quality_mode": "rates", "quality_layers": [40]}),
        "two-levels.jp2": (wide, "RGB", {"num_resolutions": 2, "quality_mode": "rates", "quality_layers": [40]}),
        "one-level.jp2": (wide, "RGB", {"num_resolutions": 1}),
        "rgb.avif": (wide, "RGB", {"speed": 10, "quality": 40}),
        "rgb.ppm": (wide, "RGB", {}),
        "rgba.tga": (wide, "RGBA", {"compression": "tga_rle"}),
    }
    ImageFile.MAXBLOCK = 2**26  # the encoder of progressive JPEG needs its file in one piece
    Image.MAX_IMAGE_PIXELS = None
    for name, (size, mode, options) in jobs.items():
        if (folder / name).exists():
            continue
        print(f"writing {name}", file=sys.stderr)
        image = Image.new(mode, size) if mode in ("I;16", "F") or 1 in size else picture(*size, mode)
        partial = folder / f".{name}"
        image.save(partial, Image.registered_extensions()[Path(name).suffix], **options)
        partial.rename(folder / name)
    # formats that Pillow decodes in Python, at a million pixels per second
    (folder / "plain.ppm").write_bytes(b"P2 10900 8200 255 " + wide[0] * wide[1] * b"7 ")
    noise = np.random.default_rng(0).integers(0, 192, 3_000_000, dtype=np.uint8).tobytes()
    (folder / "noise.qoi").write_bytes(b"qoif" + struct.pack(">IIBB", *wide, 3, 0) + 45 * noise)


def read(folder: Path) -> dict:
    """Read one folder: first each file alone, to time it, then all together as `explain` does."""
    from sightline.data import Preprocess, read_images
    from sightline.data.folders import contents
    from sightline.data.images import UnreadableImage, open_image, quiet

    files = [file for file in sorted(folder.iterdir()) if not file.name.startswith(".")]
    errors, slowest = [], (0.0, 0.0, "")
    with quiet():
        for file in files:
            start, cpu_start = time.perf_counter(), time.process_time()
            try:
                open_image(file, 512)
            except UnreadableImage as error:
                if "\n" in str(error):
                    errors.append(f"{file.name}: reason of several lines")
            except Exception as error:
                errors.append(f"{file.name}: {type(error).__name__} {error}")
            took = (round(time.process_time() - cpu_start, 2), round(time.perf_counter() - start, 2), file.name)
            slowest = max(slowest, took)
    alone = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    preprocess = Preprocess(size=(224, 224), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    start = time.perf_counter()
    images = read_images([folder], preprocess)
    seconds = time.perf_counter() - start
    others = contents(folder).others.total()
    vanished = len(files) - len(images) - len(images.skipped) - others
    return {
        "files": len(files),
        "read": len(images),
        "listed": len(images.skipped),
        "counted": others,
        "vanished": vanished,
        "errors": errors,
        "slowest": dict(zip(("cpu_seconds", "seconds", "file"), slowest, strict=True)),
        "seconds": round(seconds, 1),
        "peak_mb": {"one by one": alone >> 10, "folder": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10},
        "reasons": {Path(name).name: reason for name, reason in images.skipped} if len(files) < FOLDER / 2 else {},
    }


def explain(folder: Path, max_pixels: int) -> dict:
    """Run `sightline explain` on a folder: its peak memory, and the longest time between two pages."""
    import timm
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        save_file(timm.create_model("test_resnet", num_classes=3).state_dict(), work / "weights.safetensors")
        (work / "classes.txt").write_text("a\nb\nc\n")
        command = [sys.executable, "-m", "sightline", "explain", "test_resnet", str(folder), "--out", str(work / "out")]
        command += ["--weights", str(work / "weights.safetensors"), "--classes", str(work / "classes.txt")]
        command += ["--max-pixels", str(max_pixels), "--batch-size", "1"]
        start = time.perf_counter()
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        assert child.stderr is not None
        messages = child.stderr.read().splitlines()
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - start
        pages = sorted((page.stat().st_mtime, page.name) for page in (work / "out").glob("*--page.png"))
        between = [(round(b[0] - a[0], 2), b[1]) for a, b in itertools.pairwise(pages)]
    return {
        "max_pixels": max_pixels,
        "exit": os.waitstatus_to_exitcode(status),
        "explained": len(pages),
        "listed": sum(line.startswith("skipped ") for line in messages),
        "slowest": dict(zip(("seconds", "file"), max(between), strict=True)),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "seconds": round(seconds, 1),
        "peak_mb": usage.ru_maxrss >> 10,
    }


def main() -> None:
    """Make and read all folders, and add up the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--bombs", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path(".cache/fuzz"))
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--one", type=Path, help="read this folder alone and print the answer")
    parser.add_argument("--make-bombs", type=Path, help="write the bombs into this folder")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(read(options.one)))
        return
    if options.make_bombs:
        bombs(options.make_bombs)
        return
    end = time.monotonic() + 60 * options.minutes
    rows = []
    names = [f"{i:03d}" for i in range(-(-options.files // FOLDER))] + ["bombs"] * options.bombs
    for name in names:
        folder, answer = options.work / name, options.work / f"{name}.json"
        if not answer.exists():
            if time.monotonic() > end:
                sys.exit(f"out of time before {name}; run again to continue")
            if name == "bombs":  # in another process: a child's peak memory starts at that of its parent
                subprocess.run([sys.executable, __file__, "--make-bombs", folder], check=True)
            else:
                make(folder, int(name))
            child = subprocess.run(
                [sys.executable, __file__, "--one", folder], capture_output=True, text=True, errors="replace"
            )
            if child.returncode:
                crash = {"files": len(list(folder.iterdir())), "crash": child.returncode, "said": child.stderr[-500:]}
                print(f"{name}: crash {crash}")
                rows.append({"folder": name} | crash)
                continue
            answer.write_text(child.stdout.splitlines()[-1])
        row = {"folder": name} | json.loads(answer.read_text())
        print({key: value for key, value in row.items() if key != "reasons"})
        rows.append(row)
    total = {key: sum(row.get(key, 0) for row in rows) for key in ("files", "read", "listed", "counted", "vanished")}
    total |= {
        "errors": sum(len(row.get("errors", ())) for row in rows),
        "crashes": sum("crash" in row for row in rows),
        "slowest": max(
            (row["slowest"] for row in rows if "slowest" in row), key=lambda slowest: slowest["cpu_seconds"]
        ),
        "peak_mb": max(max(row["peak_mb"].values()) for row in rows if "peak_mb" in row),
    }
    print(total)
    for max_pixels in (89_478_485, 178_956_970) if options.bombs else ():
        row = {"folder": "bombs", "command": "explain"} | explain(options.work / "bombs", max_pixels)
        print(row)
        rows.append(row)
    print(save("fuzz_images", [total, *rows]))


if __name__ == "__main__":
    main()
