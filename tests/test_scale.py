"""Many images: shards are final, whole and right, whoever was killed meanwhile."""

import inspect
import io
import json
import os
import shutil
import signal
import tarfile
from collections.abc import Collection, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

pa = pytest.importorskip("pyarrow")
import fsspec  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
from tests.deadly import Deadly, Unready  # noqa: E402

from sightline import cli  # noqa: E402
from sightline.data import Preprocess  # noqa: E402
from sightline.evaluation import evaluate  # noqa: E402
from sightline.explainers import explain  # noqa: E402
from sightline.scale import cluster, decoding, explain_many, local, plan, results, spread_by  # noqa: E402
from sightline.scale.cluster import Cluster, started  # noqa: E402
from sightline.scale.decoding import Job  # noqa: E402
from sightline.scale.local import Decoder  # noqa: E402
from sightline.scale.plan import Entry, contents_of, entries_of, in_order, plan_of  # noqa: E402
from sightline.scale.results import Results, packed_map, read_map, shard_file, write_asked, write_shard  # noqa: E402
from sightline.testing import PooledModel  # noqa: E402

FACTS = dict.fromkeys(results._FACTS[1:-1]) | {"methods": ["cam"], "images": 5, "images_per_shard": 2}


def row(number: int, digest: str) -> dict[str, object]:
    values = np.full((2, 3), number, dtype=np.float32)
    return {"key": f"{number}.png", "source_index": number, "method": "cam", "digest": digest} | packed_map(
        values, "float32"
    )


def written(folder: Path, shards: list[int]) -> Results:
    write_asked(folder, FACTS)
    opened = Results.open(folder)
    for shard in shards:
        rows = [row(number, opened.asked["digest"]) for number in range(5)[2 * shard : 2 * shard + 2]]
        assert write_shard(folder, shard, [[one] for one in rows]) == len(rows)
    return opened


def test_shards_are_read_in_the_order_of_the_images(tmp_path: Path) -> None:
    opened = written(tmp_path, [2, 0])
    assert opened.shards == 3 and opened.missing() == [1]
    batches = list(opened.batches(rows=1))
    assert [len(batch) for batch in batches] == [1, 1, 1]
    assert all(batch.schema == results.SCHEMA for batch in batches)
    rows = [one for batch in batches for one in batch.to_pylist()]
    assert [one["key"] for one in rows] == ["0.png", "1.png", "4.png"]
    np.testing.assert_array_equal(read_map(rows[2]), np.full((2, 3), 4, dtype=np.float32))
    assert rows[0]["error"] is None and rows[0]["label"] is None
    assert next(opened.batches(["key"])).schema.names == ["key"]


def test_half_precision(tmp_path: Path) -> None:
    values = np.array([[0.1, -3.0]], dtype=np.float32)
    assert len(packed_map(values, "float16")["map"]) == 4
    np.testing.assert_allclose(read_map(packed_map(values, "float16")), values, rtol=1e-3)
    for largest in (1e-9, 65_505.0):  # would become 0 or infinite
        np.testing.assert_array_equal(read_map(packed_map(values / 3 * largest, "float16")), values / 3 * largest)
    assert packed_map(values * 0, "float16")["dtype"] == packed_map(values * np.inf, "float16")["dtype"] == "float16"


def test_a_shard_is_whole_or_absent(tmp_path: Path) -> None:
    """What fails halfway leaves nothing behind, and a shard that is there stays."""

    def failing():
        yield [row(0, "")]
        raise OSError(28, "No space left on device")

    write_asked(tmp_path, FACTS)
    with pytest.raises(OSError, match="No space"):
        write_shard(tmp_path, 0, failing())
    assert [file.name for file in tmp_path.iterdir()] == ["asked.json"]
    written(tmp_path, [0])
    before = shard_file(tmp_path, 0).read_bytes()
    with pytest.raises(OSError, match="No space"):
        write_shard(tmp_path, 0, failing())
    assert shard_file(tmp_path, 0).read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2


def test_another_question_is_refused(tmp_path: Path) -> None:
    write_asked(tmp_path, FACTS)
    write_asked(tmp_path, FACTS)
    with pytest.raises(ValueError, match=r"another job \(methods differ\); choose a new folder"):
        write_asked(tmp_path, FACTS | {"methods": ["grad_cam"]})


def test_damage_is_told(tmp_path: Path) -> None:
    opened = written(tmp_path, [0, 1])
    whole = shard_file(tmp_path, 0).read_bytes()
    shard_file(tmp_path, 0).write_bytes(whole[:-20])
    with pytest.raises(ValueError, match=r"shard-000000\.parquet is damaged"):
        list(opened.batches())
    write_shard(tmp_path, 0, [[row(0, "other")]])
    with pytest.raises(ValueError, match="is part of other results; delete it"):
        list(opened.batches())
    pq.write_table(pa.table({"a": [1]}), shard_file(tmp_path, 0))
    with pytest.raises(ValueError, match="is part of other results; delete it"):
        list(opened.batches())
    with pytest.raises(FileNotFoundError, match="holds no results"):
        Results.open(tmp_path / "nothing")
    (tmp_path / "asked.json").write_text(json.dumps({"format": 1}))
    with pytest.raises(ValueError, match="expected format 2"):
        Results.open(tmp_path)
    (tmp_path / "asked.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        Results.open(tmp_path)


def picture(number: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8))


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    picture(number).save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Eleven images in two classes, one of which cannot be read."""
    folder = tmp_path / "photos"
    for number in range(10):
        file = folder / ("cat", "dog")[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(number))
    (folder / "cat" / "broken.jpg").write_bytes(b"no image")
    (folder / "notes.txt").write_text("no image either")
    return folder


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)
        )
    model.preprocess = Preprocess(size=(16, 16), mean=(0.5,) * 3, std=(0.2,) * 3)
    return model.eval()


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [row for batch in Results.open(folder).batches() for row in batch.to_pylist()]


def many(sources: Any, out: Path, **options: Any) -> Any:
    chosen = {"classes": ["Cat", "Dog"], "per_shard": 3, "methods": ["grad_cam", "saliency"], **options}
    return explain_many(network(), sources, out, **chosen)


KEYS = ["cat/0.png", "cat/2.png", "cat/4.png", "cat/6.png", "cat/8.png", "cat/broken.jpg"] + [
    f"dog/{number}.png" for number in range(1, 10, 2)
]


class TestPlan:
    def test_a_folder(self, photos: Path, tmp_path: Path) -> None:
        (photos / "test" / "dog").mkdir(parents=True)
        (photos / "test" / "dog" / "last.png").symlink_to("nowhere")
        entries = list(entries_of(str(photos), ["Cat", "Dog"], tmp_path))
        assert [entry.key for entry in entries] == [*KEYS, "test/dog/last.png"]
        assert [entry.label for entry in entries] == [0] * 6 + [1] * 6
        assert entries[-1].split == "test" and entries[-1].reason == "a link to a file that does not exist"
        assert entries[0].split is None and entries[0].reason is None
        assert [read() for read in contents_of(entries[:1])] == [photos / "cat/0.png"]

    def test_names_that_are_no_text(self, tmp_path: Path) -> None:
        file = os.fsencode(tmp_path / "a") + b"\xff.png"
        with open(file, "wb") as opened:
            opened.write(png(0))
        (entry,) = entries_of(str(tmp_path), [], tmp_path)
        assert entry.key == "a\\xff.png" and entry.reason == "its name is not UTF-8; rename it"

    def test_many_names_are_sorted_in_parts(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(plan, "_SORTED_AT_ONCE", 3)
        names = [(f"{number * 7 % 10}\n", "reason" if number == 4 else None) for number in range(10)]
        assert list(in_order(iter(names), tmp_path)) == sorted(names)
        assert list(tmp_path.iterdir()) == []

    def test_tar_files(self, tmp_path: Path) -> None:
        for name, numbers in (("b.tar", [2, 3]), ("a.tar", [0, 1, 1])):
            with tarfile.open(tmp_path / name, "w") as tar:
                for number in numbers:
                    for suffix, content in ((".png", png(number)), (".cls", b"1"), (".json", b"{}")):
                        member = tarfile.TarInfo(f"{number}{suffix}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
        for source in (tmp_path, f"{tmp_path}/*.tar"):
            entries = list(entries_of(str(source), [], tmp_path))
            assert [entry.key for entry in entries] == ["a.tar/0.png", "a.tar/1.png", "b.tar/2.png", "b.tar/3.png"]
            assert [read() for read in contents_of(entries)] == [png(number) for number in range(4)]
            assert {entry.label for entry in entries} == {1}
        (tmp_path / "b.tar").unlink()
        with pytest.raises(FileNotFoundError, match=r"b\.tar"):  # says nothing about its images
            [read() for read in contents_of(entries)]
        (tmp_path / "c.tar").write_bytes(b"x" * 2000)
        with pytest.raises(ValueError, match="expected an uncompressed tar file"):
            list(entries_of(str(tmp_path), [], tmp_path))

    def test_names_in_tar_files_that_are_no_text(self, tmp_path: Path) -> None:
        with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
            member = tarfile.TarInfo("\xe4.png")
            member.size = len(png(0))
            tar.addfile(member, io.BytesIO(png(0)))
        planned = plan_of(tmp_path, [str(tmp_path)], [], 3)
        assert [entry.key for entry in planned.entries(0)] == ["a.tar/\\xe4.png"]
        assert [read() for read in contents_of(planned.entries(0))] == [png(0)]

    def test_parquet_files(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(plan, "_ROWS", 2)
        cells = [{"bytes": png(number), "path": None} for number in range(7)] + [{"bytes": None, "path": None}]
        for name, part in (("train-0.parquet", cells[:5]), ("test-0.parquet", cells[5:])):
            table = pa.table({"id": range(len(part)), "image": part, "label": list(range(len(part)))})
            pq.write_table(table, tmp_path / name, row_group_size=4)
        entries = list(entries_of(str(tmp_path), [], tmp_path))
        assert [entry.key for entry in entries[2:5]] == ["test-0.parquet/2", "train-0.parquet/0", "train-0.parquet/1"]
        assert [entry.label for entry in entries] == [0, 1, 2, 0, 1, 2, 3, 4]
        assert [entry.split for entry in entries] == ["test"] * 3 + ["train"] * 5
        expected = [png(5), png(6), "its cell is empty", *map(png, range(5))]
        for part in (slice(0, 8), slice(1, 5), slice(4, 8), slice(2, 3)):
            assert [read() for read in contents_of(entries[part])] == expected[part]
        large = pa.table({"photo": pa.array([png(0)], pa.large_binary()), "label": pa.array(["a"], pa.large_string())})
        pq.write_table(large, tmp_path / "large.parquet")
        (entry,) = entries_of(f"{tmp_path}/large.parquet", ["A"], tmp_path)
        assert entry.label == 0 and next(contents_of([entry]))() == png(0)
        for unclear in ({"a": [b""], "b": [b""]}, {"image": [{"data": b""}]}):
            pq.write_table(pa.table(unclear), tmp_path / "unclear.parquet")
            with pytest.raises(ValueError, match=r"cannot tell which column of .*unclear\.parquet holds the images: "):
                list(entries_of(f"{tmp_path}/unclear.parquet", [], tmp_path))

    def test_a_set_of_the_hub(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        datasets = pytest.importorskip("datasets")
        features = datasets.Features(
            image=datasets.Image(), label=datasets.ClassLabel(names=["cat", "dog"]), text=datasets.Value("string")
        )
        sets = {
            name: datasets.Dataset.from_dict(
                {"image": [{"bytes": png(n), "path": None} for n in numbers], "label": [1] * 2, "text": ["", ""]},
                features,
            )
            for name, numbers in (("train", (0, 1)), ("test", (2, 3)))
        }
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.DatasetDict(sets))
        entries = list(entries_of("hub:somebody/pets", [], tmp_path))
        assert [entry.key for entry in entries] == ["train/0", "train/1", "test/0", "test/1"]
        assert {entry.label for entry in entries} == {1}
        assert [read() for read in contents_of(entries[1:])] == [png(1), png(2), png(3)]

    def test_addresses(self, tmp_path: Path) -> None:
        fs = fsspec.filesystem("memory")
        for number in (1, 0):
            fs.pipe(f"/bucket/images/dog/{number}.png", png(number))
        fs.pipe("/bucket/images/dog/readme.md", b"no image")
        entries = list(entries_of("memory://bucket/images", ["dog"], tmp_path))
        assert entries == [Entry(f"dog/{n}.png", f"memory:///bucket/images/dog/{n}.png", label=0) for n in (0, 1)]
        assert [read() for read in contents_of(entries)] == [png(0), png(1)]
        fs.rm("/bucket/images/dog/0.png")
        (read,) = contents_of(entries[:1])
        assert read() == "FileNotFoundError: memory:///bucket/images/dog/0.png"
        fs.rm("/bucket", recursive=True)

    def test_a_network_that_fails_says_nothing_about_an_image(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fs = fsspec.filesystem("memory")
        fs.pipe("/bucket/0.png", png(0))
        calls: list[str] = []

        def failing(path: str, **_: Any) -> bytes:
            calls.append(path)
            if len(calls) % 4:
                raise TimeoutError("no answer")
            return png(0)

        monkeypatch.setattr(type(fs), "cat_file", lambda _, path, **ends: failing(path))
        (read,) = contents_of([Entry("0.png", "memory://bucket/0.png")])
        with pytest.raises(TimeoutError, match="no answer"):
            read()
        assert len(calls) == 3 and read() == png(0)
        fs.rm("/bucket", recursive=True)

    def test_what_is_refused(self, tmp_path: Path, photos: Path) -> None:
        with pytest.raises(FileNotFoundError, match="no file or folder"):
            plan_of(tmp_path, [str(tmp_path / "nowhere")], [], 3)
        (tmp_path / "empty").mkdir()
        with pytest.raises(ValueError, match=r"expected images in .*empty, got none"):
            plan_of(tmp_path, [str(tmp_path / "empty")], [], 3)
        for inner in (photos, photos / "cat"):
            with pytest.raises(ValueError, match="expected sources apart from each other"):
                plan_of(tmp_path, [str(inner), str(photos)], [], 3)
        with pytest.raises(ValueError, match="expected images, got none"):
            plan_of(tmp_path, [], [], 3)
        for pattern in ("*.tar", "*"):  # matches nothing, or folders
            with pytest.raises(FileNotFoundError, match="expected files named like"):
                list(entries_of(f"{photos}/{pattern}", [], tmp_path))
        for name in ("empty/a.tar", "empty/b.parquet"):
            (tmp_path / name).touch()
        with pytest.raises(ValueError, match="expected files of one kind"):
            list(entries_of(f"{tmp_path}/empty", [], tmp_path))
        assert list(tmp_path.glob("*plan*")) == []
        (tmp_path / "plan.parquet").write_bytes(b"half")
        with pytest.raises(ValueError, match=r"plan\.parquet is damaged"):
            plan_of(tmp_path, [str(photos)], [], 3)

    def test_several_sources(self, tmp_path: Path, photos: Path) -> None:
        sources = [f"{photos}/cat", f"{photos}/dog"]
        planned = plan_of(tmp_path, sources, [], 4)
        keys = [entry.key for shard in range(3) for entry in planned.entries(shard)]
        assert keys == [f"{photos}/{key}" for key in KEYS] and planned.images == 11
        files = [f"{photos}/{key}" for key in KEYS[:2]]
        assert [entry.key for entry in plan_of(tmp_path, files, [], 4, anew=True).entries(0)] == files


def test_rows_are_those_of_explain(photos: Path, tmp_path: Path) -> None:
    """Every image is there once, in order, with the maps that `explain` makes of it."""
    done = many(photos, tmp_path / "out")
    assert (done.written, done.unreadable, done.missing, done.failed) == (4, 1, 0, {})
    rows = rows_of(tmp_path / "out")
    assert [row["key"] for row in rows] == [key for key in KEYS for _ in range(1 + (key != "cat/broken.jpg"))]
    assert all(row["digest"] == done.results.asked["digest"] for row in rows)
    for number, key in enumerate(KEYS):
        mine = [row for row in rows if row["key"] == key]
        assert {row["source_index"] for row in mine} == {number}
        if key == "cat/broken.jpg":
            assert [(row["method"], row["error"]) for row in mine] == [(None, "not an image of a known format")]
            continue
        explanation = explain(network(), [photos / key], methods=["grad_cam", "saliency"])
        assert [row["method"] for row in mine] == ["grad_cam", "saliency"]
        for row in mine:
            values = explanation[row["method"]][0, 0].numpy()
            np.testing.assert_allclose(read_map(row), values, atol=1e-6 * np.abs(values).max())
            assert row["target"] == row["predicted"] == explanation.targets.item()
            assert row["layer"] == explanation.layers[row["method"]].name
            assert row["verdicts"] == explanation.verdicts[row["method"]][0]
            assert row["label"] == (key[0] == "d") and row["error"] is None
            assert row["probability"] == pytest.approx(explanation.probabilities.max().item(), abs=1e-6)
        np.testing.assert_allclose(mine[0]["logits"], explanation.logits[0].detach(), rtol=1e-5)
        assert mine[1]["logits"] is None


def test_images_are_opened_again(photos: Path, tmp_path: Path) -> None:
    opened = many(photos, tmp_path / "out", methods=["grad_cam"]).results
    images = opened.images(["dog/3.png", "cat/broken.jpg"])
    np.testing.assert_array_equal(images["dog/3.png"], np.asarray(picture(3)))
    assert images["cat/broken.jpg"] == "not an image of a known format"
    with pytest.raises(ValueError, match="expected keys of images"):
        opened.images(["dog/4.png"])


def test_only_what_is_missing_is_done(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    many(photos, out)
    whole = {file.name: file.read_bytes() for file in out.glob("shard-*")}
    times = {file.name: file.stat().st_mtime_ns for file in out.glob("shard-*")}
    assert many(photos, out).written == 0
    shard_file(out, 2).unlink()
    assert many(photos, out).written == 1
    assert {file.name: file.read_bytes() for file in out.glob("shard-*")} == whole
    assert {name for name in times if (out / name).stat().st_mtime_ns != times[name]} == {"shard-000002.parquet"}
    with pytest.raises(ValueError, match=r"another job \(methods differ\)"):
        many(photos, out, methods=["grad_cam"])
    with pytest.raises(ValueError, match=r"another job \(sources differ\)"):
        many(photos / "cat", out)


def test_halves_of_killed_processes_are_swept_away(photos: Path, tmp_path: Path) -> None:
    """But not those of a shard that another process may still be writing."""
    out = tmp_path / "out"
    out.mkdir()
    for name in (".shard-000001.parquet.1.tmp", ".shard-000002.parquet.2.tmp", ".plan.parquet.3.tmp"):
        (out / name).write_bytes(b"half")
    (out / ".sorting-4" / "0").mkdir(parents=True)
    many(photos, out, shard=(1, 4))
    assert sorted(file.name for file in out.glob(".*")) == [".lock", ".shard-000002.parquet.2.tmp"]

    def overtaken() -> Any:
        many(photos, out, shard=(2, 4))
        for file in out.glob(".shard-000002.*.tmp"):
            file.unlink()
        yield []

    write_shard(out, 2, overtaken())
    assert len(Results.open(out).missing()) == 2 and list(out.glob(".*.tmp")) == []


def test_shares_of_the_shards(photos: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    many(photos, whole)
    assert [many(photos, parts, shard=(i, 3)).missing for i in range(3)] == [2, 1, 0]
    assert rows_of(parts) == rows_of(whole)
    with pytest.raises(ValueError, match="expected shard i of n with 0 <= i < n, got 3/3"):
        many(photos, parts, shard=(3, 3))


def test_half_precision_of_maps(photos: Path, tmp_path: Path) -> None:
    many(photos, tmp_path / "out")
    many(photos, tmp_path / "half", dtype="float16")
    for row, half in zip(rows_of(tmp_path / "out"), rows_of(tmp_path / "half"), strict=True):
        if row["map"] is not None:
            assert len(half["map"]) * 2 == len(row["map"])
            np.testing.assert_allclose(read_map(half), read_map(row), rtol=1e-3, atol=1e-6)


def test_a_full_disk_stops_and_resumes(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, replaced = tmp_path / "out", os.replace
    calls: list[int] = []

    def full(source: Any, to: Any) -> None:
        if "shard-" in str(to):
            calls.append(1)
            if len(calls) == 2:
                raise OSError(28, "No space left on device")
        replaced(source, to)

    monkeypatch.setattr(results.os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        many(photos, out)
    assert [file for file in out.iterdir() if file.suffix == ".tmp"] == []
    assert len(list(out.glob("shard-*"))) == 1
    assert many(photos, out).written == 3
    assert len(rows_of(out)) == 21


def job_of(photos: Path, folder: Path, preprocess: Preprocess) -> decoding.Job:
    return decoding.Job(
        folder=folder, plan=plan_of(folder, [str(photos)], [], 100), sources=(str(photos),), digest="", per_shard=100,
        preprocess=preprocess, max_pixels=10**6, layer=None, dtype="float32", batch_size=4, memory=None,
    )  # fmt: skip


def test_a_disk_that_is_gone_is_not_the_fault_of_an_image(photos: Path, tmp_path: Path) -> None:
    job = job_of(photos, tmp_path, network().preprocess)
    (photos / "cat/0.png").unlink()
    assert decoding.decode(job, 0).reasons == {0: "No such file or directory", 5: "not an image of a known format"}
    shutil.move(photos, tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="photos"):
        decoding.decode(job, 0)
    photos.mkdir()
    with pytest.raises(FileNotFoundError, match="photos is empty now; mount its disk"):
        decoding.decode(job, 0)


def test_lethal_images_are_found() -> None:
    """By halving, also several of them, and also where a process dies of something else now and then."""
    for lethal in ([], [0], [7, 8], [12], list(range(13))):
        search, accidents = decoding.search_lethal(range(13)), iter(range(1000))
        part = next(search)
        with pytest.raises(StopIteration) as end:
            while True:
                dies = any(place in lethal for place in part) or next(accidents) % 4 == 0
                part = search.send(not dies)
        assert end.value.value == lethal


@pytest.fixture
def deadly(photos: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two images on which the decoder ends its process."""
    for name in ("cat/1.deadly", "dog/9.deadly"):
        (photos / name).write_bytes(b"DEADLY")
    monkeypatch.setattr("sightline.data.folders.formats", lambda: {".png": "PNG", ".jpg": "JPEG", ".deadly": "DEADLY"})
    monkeypatch.setitem(globals(), "Preprocess", Deadly)
    return photos


def check_deadly(folder: Path, expected: Path) -> None:
    """All images but the two are as if these had never been there."""
    rows = rows_of(folder)
    dead = [row for row in rows if row["key"].endswith(".deadly")]
    assert [(row["key"], row["error"]) for row in dead] == [
        (key, decoding.LETHAL) for key in ("cat/1.deadly", "dog/9.deadly")
    ]
    others = [row for row in rows if row not in dead]
    for row, right in zip(others, rows_of(expected), strict=True):
        assert all(row[name] == right[name] for name in ("key", "method", "label", "predicted", "error"))
        if row["map"] is not None:
            np.testing.assert_allclose(read_map(row), read_map(right), atol=1e-6)


def test_an_image_that_kills_the_decoder(photos: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    many(photos, tmp_path / "before")
    request.getfixturevalue("deadly")
    done = many(photos, tmp_path / "out", per_shard=7)
    assert (done.written, done.unreadable, done.missing) == (2, 3, 0)
    check_deadly(tmp_path / "out", tmp_path / "before")


def test_what_is_not_the_fault_of_an_image(photos: Path, tmp_path: Path) -> None:
    """A process that dies without one, and an error that is none of the decoder's."""
    with closing(
        Decoder(job_of(photos, tmp_path, Unready(size=(8, 8), mean=(0.5,) * 3, std=(0.5,) * 3)), 1)
    ) as decoder:
        with pytest.raises(RuntimeError, match="dies before the first one; give it more memory"):
            decoder.surely(0)
    job = job_of(photos, tmp_path, network().preprocess)
    with closing(Decoder(job, 1)) as decoder, pytest.raises(IndexError, match="list index"):
        decoder.surely(0, part=[99])
    with pytest.raises(RuntimeError, match="dies before the first one"):  # at once, where it was closed
        decoder.surely(0)


def test_an_image_that_takes_forever(
    photos: Path, tmp_path: Path, deadly: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (decoding, local):
        monkeypatch.setattr(module, "TRIES", 1)  # each takes as long as the patience
    (photos / "cat/1.deadly").write_bytes(b"DEADLY, but slow")
    (photos / "dog/9.deadly").unlink()
    with closing(
        Decoder(job_of(photos, tmp_path, Deadly(size=(8, 8), mean=(0.5,) * 3, std=(0.5,) * 3)), 1, patience=5.0)
    ) as decoder:
        decoded = decoder.surely(0, part=[1])
    assert decoded.reasons == {1: decoding.LETHAL} and decoded.entries[1].key == "cat/1.deadly"


def killed(name: str) -> int:
    """Kill all processes of a name that this one has started."""
    mine, count = {os.getpid()}, 0
    stats = {int(path.name): path for path in Path("/proc").iterdir() if path.name.isdigit()}
    for process, path in sorted(stats.items()):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            command = (path / "cmdline").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if parent in mine:
            mine.add(process)
            if name in command:
                os.kill(process, signal.SIGKILL)
                count += 1
    return count


def test_ray(photos: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """The rows of the plain loop, though two images kill those who decode them, and a worker is killed."""
    pytest.importorskip("ray")
    many(photos, tmp_path / "before")
    request.getfixturevalue("deadly")
    kills: list[int] = []

    def progress(what: str, done: int, total: int) -> None:
        if not kills:
            kills.append(killed("ray::_Worker"))

    wanted = Cluster(workers=1, cores=2, memory=100_000_000)
    done = many(photos, tmp_path / "out", engine="ray", cluster=wanted, progress=progress, per_shard=5)
    assert kills == [1]
    assert (done.written, done.unreadable, done.missing, done.failed) == (3, 3, 0, {})
    check_deadly(tmp_path / "out", tmp_path / "before")
    assert killed("ray::") == 0


def test_evaluations_and_slides_by_ray(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    pytest.importorskip("openslide")
    from tests.slide_files import pyramid

    from sightline.slides import read_bag, write_bags
    from sightline.slides.bags import Grid

    images = torch.rand(10, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    data, asked = [(images, torch.arange(10) % 3)], {"methods": ["cam"], "controls": ["random_map"], "batch_size": 4}
    model, network = PooledModel(torch.eye(3)), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    violet = np.full((128, 64, 3), (220, 60, 150), np.uint8)
    files = [pyramid(tmp_path / f"{n}.tif", np.tile(violet, (1, n, 1)), 1, 8.0) for n in (1, 2)]
    preprocess, grid = Preprocess(size=(32, 32), mean=(0.5,) * 3, std=(0.5,) * 3), Grid(size=32, mpp=16.0)
    bags = partial(write_bags, files, model=network, preprocess=preprocess, grid=grid)
    with started(Cluster(workers=1, cores=2, memory=100_000_000)):
        spread = spread_by(Cluster(workers=1))
        there, written = evaluate(model, data, spread=spread, **asked), bags(tmp_path / "there", spread=spread)
    assert all(values.flags.writeable for one in there.examples for values in one.maps.values())
    here = evaluate(model, data, **asked)
    assert there.per_image.keys() == here.per_image.keys()
    for name, values in here.per_image.items():
        assert there.per_image[name] == pytest.approx(values, abs=1e-6, nan_ok=True), name
    for name, file in bags(tmp_path / "here").files.items():
        torch.testing.assert_close(read_bag(written.files[name]).features, read_bag(file).features, atol=1e-6, rtol=0)


class RayOfDeaths:
    """Ray, whose workers die of some images, or of all."""

    def __init__(self, lethal: Collection[int] | None) -> None:
        self.lethal = lethal
        self.deaths = 0

    def put(self, value: Any) -> Any:
        return value

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 4, "object_store_memory": 1e9}

    def remote(self, what: Any) -> Any:
        made = self._decode if what is cluster._decode else self._worker
        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=made))

    def wait(self, references: list[Any], fetch_local: bool) -> tuple[list[Any], list[Any]]:
        return references[:1], references[1:]

    def get(self, reference: Any) -> Any:
        value = reference()
        if isinstance(value, Exception):
            self.deaths += 1
            raise value
        return value

    def _decode(self, job: Any, shard: int, lethal: Sequence[int], part: Sequence[int] | None) -> Any:
        places = range(1000) if part is None else part
        return lambda: None, [place for place in places if place not in lethal]

    def _worker(self, job: Any, network: Any) -> Any:
        from ray.exceptions import ActorDiedError

        def act(decoded: list[int]) -> Any:
            dies = self.lethal is None or any(place in self.lethal for place in decoded)
            return lambda: ActorDiedError() if dies else decoded

        ready = SimpleNamespace(remote=lambda: lambda: None)
        return SimpleNamespace(ready=ready, write=SimpleNamespace(remote=act), survive=SimpleNamespace(remote=act))


def test_deaths_on_ray_are_bounded() -> None:
    pytest.importorskip("ray")
    job = Mock(Job, per_shard=1000, preprocess=Preprocess(size=(8, 8), mean=(0.0,) * 3, std=(1.0,) * 3))
    job.size.return_value = 1000
    network: Any = None
    three = RayOfDeaths([0, 999])
    done = [*cluster._Driver(three, job, network, Cluster(workers=3)).run(range(3))]
    assert done == [[*range(1, 999)]] * 3
    all_die = RayOfDeaths(None)
    with pytest.raises(RuntimeError, match="91 processes died, one after the other"):
        [*cluster._Driver(all_die, job, network, Cluster(workers=3)).run(range(3))]
    assert all_die.deaths == 91


def test_ray_that_is_not_there(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sightline.scale.cluster.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"library ray; install it: pip install 'sightline\[scale\]'"):
        many(photos, tmp_path / "out", engine="ray")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "line, message",
    [
        ("--workers 2", "expected --workers with --engine ray, got it without; add --engine ray"),
        ("--engine local --gpus 0.5", "expected --gpus with --engine ray, got it without"),
        ("--float16", "expected --float16 with --engine or --shard, got none; add --engine local"),
        ("--shard 0/2 --overlays", "got overlays; leave it out"),
        ("--engine local --strict", "got strict; leave it out"),
        ("--shard 2/2", "expected I/N from 0/N to N-1/N, such as 0/4 to 3/4, got '2/2'"),
        ("--engine slurm", "'slurm' is none of local, ray"),
    ],
)
def test_options_that_do_not_go_together(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["explain", "nothing", "photos", "--out", "nowhere", *line.split()])
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "options, message",
    [({"per_shard": 0}, "per_shard of 1 image"), ({"engine": "Ray"}, "got Ray"), ({"dtype": "float64"}, "and float64")],
)
def test_options_in_python(photos: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(explain_many)(network(), photos, tmp_path / "out", **options)  # without the checker of types


@pytest.mark.parametrize("line", ["evaluate nothing", "slides explain nothing a.svs --out nowhere"])
def test_options_of_ray_without_it(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main([*line.split(), "--cores", "2"])
    assert capsys.readouterr().err == (
        "sightline: error: expected --cores with --engine ray, got it without; add --engine ray\n"
    )


def test_more_workers_than_cores() -> None:
    class Ray:
        def cluster_resources(self) -> dict[str, float]:
            return {"CPU": 4.0, "GPU": 1.0}

    assert cluster._shares(Ray(), Cluster()) == (1, 4, 1.0)
    assert cluster._shares(Ray(), Cluster(gpus=0.5)) == (2, 4, 0.5)
    assert cluster._shares(Ray(), Cluster(gpus=0.25, workers=3)) == (3, 4, 0.25)
    for wrong in (Cluster(workers=4, gpus=0.1), Cluster(workers=2)):
        with pytest.raises(ValueError, match="expected fewer workers than cores, and GPUs for each"):
            cluster._shares(Ray(), wrong)
