"""Are maps of many images the same on any engine, whole after kills, and as fast as a bare loop?

Each part runs on its own and adds its rows to results/scale.json: same, kill, throughput, memory, planning.
"""

import argparse
import hashlib
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from measure import RESULTS, save
from PIL import Image
from torch import Tensor, nn

from sightline import report
from sightline.data import Preprocess
from sightline.inference import normalized
from sightline.scale import Cluster, Results, explain_many, plan, read_map
from sightline.scale.decoding import Job, decode
from sightline.scale.plan import Entry, plan_of

STORE = 400_000_000
Rows = list[dict[str, Any]]


class Slow(nn.Module):
    """Takes a fixed time per image, as a network on a faster machine would, and no core meanwhile."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, images: Tensor) -> Tensor:
        time.sleep(self.seconds * len(images))
        return images


def network(seconds: float = 0.0, side: int = 16) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        Slow(seconds), nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)
    )
    model.preprocess = Preprocess(size=(side, side), mean=(0.5,) * 3, std=(0.2,) * 3)
    return model.eval()


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def photos(folder: Path, count: int) -> Path:
    for number in range(count):
        file = folder / ("cat", "dog")[number % 2] / f"{number:06d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(number))
    return folder


def content(folder: Path) -> str:
    """The sha256 of all values of all rows, in order."""
    digest = hashlib.sha256()
    for batch in Results.open(folder).batches():
        digest.update(repr(batch.to_pylist()).encode())
    return digest.hexdigest()


def rows_of(folder: Path) -> Iterator[dict[str, Any]]:
    for batch in Results.open(folder).batches():
        yield from batch.to_pylist()


def farthest(folder: Path, reference: Path) -> float:
    """Largest difference of two results' maps, as a share of the map's maximum; infinite if rows differ otherwise."""
    most = 0.0
    names = ("key", "source_index", "label", "method", "layer", "target", "predicted", "error", "digest")
    for row, right in zip(rows_of(folder), rows_of(reference), strict=True):
        if any(row[name] != right[name] for name in names):
            return float("inf")
        expected = read_map(right)
        most = max(most, float(np.abs(read_map(row) - expected).max() / max(np.abs(expected).max(), 1e-30)))
    return most


def descendants(of: int | None = None) -> dict[int, tuple[str, float, int]]:
    """Command, seconds of CPU and bytes of memory of all processes below one."""
    tick, page = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
    found: dict[int, tuple[int, str, float, int]] = {}
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                stat = (path / "stat").read_text().rpartition(")")[2].split()
                command = (path / "cmdline").read_text().replace("\0", " ")
            except OSError:
                continue
            used = sum(int(stat[place]) for place in (11, 12, 13, 14)) / tick
            found[int(path.name)] = (int(stat[1]), command, used, int(stat[21]) * page)
    below, grown = {of or os.getpid()}, True
    while grown:
        new = {number for number, (parent, *_) in found.items() if parent in below} - below
        below |= new
        grown = bool(new)
    return {number: found[number][1:] for number in below if number in found and number != (of or os.getpid())}


def same(folder: Path) -> Rows:
    """Every way gives the same rows."""
    images, rows = photos(folder / "photos", 5000), Rows()
    methods = ["grad_cam", "saliency"]
    given: dict[str, Any] = {"methods": methods, "classes": ["cat", "dog"], "per_shard": 250}
    explain_many(network(), images, folder / "local", **given)
    for workers in (1, 2, 4):
        out = folder / f"ray-{workers}"
        cluster = Cluster(workers=workers, memory=STORE)
        explain_many(network(), images, out, engine="ray", cluster=cluster, **given)
        rows.append({"what": f"same: Ray, {workers} workers", "value": farthest(out, folder / "local"), "bar": 1e-6})
    for i in range(3):
        explain_many(network(), images, folder / "shards", shard=(i, 3), **given)
    rows.append(
        {"what": "same: --shard 0/3, 1/3, 2/3", "value": farthest(folder / "shards", folder / "local"), "bar": 1e-6}
    )
    few = sorted((images / "cat").iterdir())[:500]
    report.pages(network(), few, folder / "pages", methods, classes=["cat", "dog"])
    most, expected = 0.0, {row["key"]: row for row in rows_of(folder / "local") if row["method"] == "grad_cam"}
    for file in few:
        maps, right = np.load(folder / "pages" / f"{file.stem}.npz"), read_map(expected[f"cat/{file.name}"])
        most = max(most, float(np.abs(maps["grad_cam"] - right).max() / np.abs(right).max()))
    return [*rows, {"what": "same: the plain command, 500 of the images", "value": most, "bar": 1e-6}]


def drive(images: Path, out: Path) -> None:
    """The driver of the kill test."""
    cluster = Cluster(workers=2, memory=STORE)
    explain_many(network(0.02), images, out, classes=["cat", "dog"], per_shard=100, engine="ray", cluster=cluster)


def kill(folder: Path) -> Rows:
    """20 workers and 5 drivers die, and the content is that of an undisturbed run."""
    images, out, chance = photos(folder / "photos", 5000), folder / "killed", random.Random(0)
    drive(images, folder / "undisturbed")
    command = [sys.executable, __file__, "drive", "--folder", str(folder)]
    killed, drivers, start = 0, 0, time.perf_counter()
    driver = subprocess.Popen(command)

    def shards() -> int:
        return len(list(out.glob("shard-*")))

    there = 0
    while driver.poll() is None:
        time.sleep(chance.uniform(0.5, 1.5))
        workers = [number for number, (name, *_) in descendants(driver.pid).items() if name.startswith("ray::_")]
        if killed < 20 and workers and (shards() > there or killed % 4):
            os.kill(chance.choice(workers), signal.SIGKILL)
            killed += 1
            if killed % 4 == 0:
                time.sleep(chance.uniform(0.5, 2))
                os.kill(driver.pid, signal.SIGKILL)
                driver.wait()
                drivers, there = drivers + 1, shards()
                print(f"killed: {killed} workers, {drivers} drivers; {there} of 50 shards", flush=True)
                driver = subprocess.Popen(command)
    rows = list(rows_of(out))
    return [
        {"what": "kill: workers killed", "value": killed},
        {"what": "kill: drivers killed", "value": drivers},
        {"what": "kill: rows of 5,000 images", "value": len(rows)},
        {"what": "kill: different keys", "value": len({row["key"] for row in rows})},
        {
            "what": "kill: content is that of the undisturbed run",
            "value": content(out) == content(folder / "undisturbed"),
        },
        {"what": "kill: half-written files left", "value": len(list(out.glob(".shard*.tmp")))},
        {"what": "kill: seconds", "value": round(time.perf_counter() - start)},
    ]


def throughput(folder: Path) -> Rows:
    """ResNet-50 at 224 px against decoding and explaining in a bare loop, side by side."""
    from timm import create_model

    torch.set_num_threads(1)
    size, count, rounds = 20, 120, 3
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        (folder / "photos").mkdir(exist_ok=True)
        Image.fromarray(pixels).resize((500, 400)).save(folder / "photos" / f"{number}.jpg")
    torch.manual_seed(0)
    model = create_model("resnet50", num_classes=1000).eval()
    planned = plan_of(folder, [str(folder / "photos")], [], size)
    wanted = Preprocess(size=(224, 224), mean=(0.5,) * 3, std=(0.2,) * 3)
    model.preprocess = wanted
    job = Job(
        folder=folder, plan=planned, sources=(), digest="", per_shard=size, preprocess=wanted, max_pixels=10**8,
        layer=None, dtype="float32", batch_size=64, memory=None,
    )  # fmt: skip

    def bare() -> tuple[float, float]:
        from sightline.explainers import explain

        wall, start = time.perf_counter(), time.process_time()
        for shard in range(count // size):
            pixels = torch.from_numpy(decode(job, shard).pixels).movedim(-1, 1)
            for at in range(0, size, 10):
                explain(model, normalized(model, pixels[at : at + 10], wanted))
        return (time.perf_counter() - wall) / count, (time.process_time() - start) / count

    def engine(name: str, **options: Any) -> tuple[float, float]:
        """From the first finished shard of each worker to the last of all: the start is not counted."""
        marks: list[tuple[int, float, float]] = []
        out = folder / "out"
        shutil.rmtree(out, ignore_errors=True)

        def progress(what: str, done: int, total: int) -> None:
            cpu = time.process_time() + sum(used for _, used, _ in descendants().values())
            marks.append((done, time.perf_counter(), cpu))

        explain_many(model, folder / "photos", out, per_shard=size, batch_size=10, progress=progress, **options)
        workers = options["cluster"].workers if "cluster" in options else 1
        (first, wall, cpu), (last, end, total) = marks[workers - 1], marks[-1]
        return (end - wall) / (last - first), (total - cpu) / (last - first)

    ways: dict[str, dict[str, Any]] = {
        "the loop of --engine local": {"engine": "local"},
        "Ray, 1 worker": {"engine": "ray", "cluster": Cluster(workers=1, cores=2, memory=STORE)},
        "Ray, 2 workers": {"engine": "ray", "cluster": Cluster(workers=2, cores=2, memory=STORE)},
    }
    measured: dict[str, list[tuple[float, float]]] = {"a bare loop": [], **{name: [] for name in ways}}
    bare()
    for _ in range(rounds):
        measured["a bare loop"].append(bare())
        for name, options in ways.items():
            measured[name].append(engine(name, **options))
    rows: Rows = []
    for name, pairs in measured.items():
        wall, cpu = np.median(np.array(pairs), axis=0)
        rows.append({"what": f"throughput: seconds per image, {name}", "value": wall, "rounds": [p[0] for p in pairs]})
        rows.append(
            {"what": f"throughput: CPU seconds per image, {name}", "value": cpu, "rounds": [p[1] for p in pairs]}
        )
        if name in ways:
            ratios = [ours[1] / theirs[1] for ours, theirs in zip(pairs, measured["a bare loop"], strict=True)]
            bar = 1.05 if name == "Ray, 1 worker" else None
            what = f"throughput: CPU time of {name} / the bare loop"
            rows.append({"what": what, "value": float(np.median(ratios)), "rounds": ratios, "bar": bar})
    return rows


def memory(folder: Path) -> Rows:
    """Memory of each worker over 50,000 images in ten tar files."""
    tars = folder / "tars"
    tars.mkdir()
    images = [png(number) for number in range(100)]
    for number in range(10):
        with tarfile.open(tars / f"{number}.tar", "w") as tar:
            for i in range(5000):
                member = tarfile.TarInfo(f"{i:05d}.png")
                member.size = len(images[i % 100])
                tar.addfile(member, io.BytesIO(images[i % 100]))
    seen: list[tuple[int, int, int]] = []

    def progress(what: str, done: int, total: int) -> None:
        below = descendants().values()
        held = [max((held for name, _, held in below if name.startswith(f"ray::_{kind}")), default=0) for kind in "Wd"]
        seen.append((done, *held))

    cluster = Cluster(workers=1, cores=2, memory=STORE)
    explain_many(network(), tars, folder / "out", engine="ray", cluster=cluster, progress=progress)
    half = next(row for row in seen if row[0] >= 10_000)
    return [
        {"what": "memory: bytes of the worker after 10,000 images", "value": half[1]},
        {"what": "memory: bytes of the worker after 50,000 images", "value": seen[-1][1]},
        {"what": "memory: bytes of the driver after 50,000 images", "value": resident()},
    ]


def resident() -> int:
    """Bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def planning(folder: Path) -> Rows:
    """Ten million images: the plan, and a driver that hands out a part of it to a network of 1 ms per image."""
    cell, count = {"bytes": png(0), "path": None}, 10_000_000
    (folder / "set").mkdir()
    part = pa.table({"image": pa.array([cell] * 100_000), "label": pa.array([1] * 100_000)})
    for number in range(10):
        with pq.ParquetWriter(folder / "set" / f"{number}.parquet", part.schema) as writer:
            for _ in range(10):
                writer.write_table(part, row_group_size=1000)
    del part
    rows, before = Rows(), resident()
    out = folder / "out"
    out.mkdir()
    start = time.perf_counter()
    written = plan_of(out, [str(folder / "set")], [], 1000)
    assert written.images == count
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    rows += [
        {"what": "planning: seconds for 10 million rows of parquet files", "value": time.perf_counter() - start},
        {"what": "planning: bytes of the plan", "value": written.file.stat().st_size},
        {"what": "planning: peak memory, bytes (before: of the imports)", "value": most, "before": before},
    ]
    start = time.perf_counter()
    names = ((f"{(number * 7_654_321) % count:09d}/photo.jpg", None) for number in range(count))
    for _ in plan.in_order(names, folder):
        pass
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    rows += [
        {"what": "planning: seconds to sort 10 million names of files", "value": time.perf_counter() - start},
        {"what": "planning: peak memory, bytes, with that", "value": most},
    ]
    start = time.perf_counter()
    entries: list[Entry] = written.entries(9_876)
    rows.append({"what": "planning: seconds to read one shard of the plan", "value": time.perf_counter() - start})
    assert len(entries) == 1000
    times: list[float] = []
    cluster = Cluster(workers=1, cores=2, memory=STORE)
    explain_many(
        network(0.001), folder / "set", out, engine="ray", cluster=cluster, shard=(0, 400),
        progress=lambda *_: times.append(time.perf_counter()),
    )  # fmt: skip
    each = (times[-1] - times[0]) / (len(times) - 1) / 1000
    return [
        *rows,
        {"what": f"planning: seconds per image of 1 ms, over {len(times)},000 of 10 million", "value": each},
        {"what": "planning: memory of the driver at the end, bytes", "value": resident()},
    ]


PARTS = {part.__name__: part for part in (same, kill, throughput, memory, planning)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="+", choices=[*PARTS, "drive"])
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    if options.parts == ["drive"]:
        drive(options.folder / "photos", options.folder / "killed")
        return
    for name in options.parts:
        with tempfile.TemporaryDirectory() as folder:
            rows = PARTS[name](Path(folder))
        for row in rows:
            print(f"{row['what']:70} {row['value']}" + (f"  bar {row['bar']}" if row.get("bar") else ""), flush=True)
        file = RESULTS / "scale.json"
        kept = json.loads(file.read_text())["rows"] if file.is_file() else []
        print(save("scale", [*(row for row in kept if not row["what"].startswith(f"{name}:")), *rows]))


if __name__ == "__main__":
    main()
