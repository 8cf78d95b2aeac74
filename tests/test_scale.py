"""Many images: shards are final, whole and right, whoever was killed meanwhile."""

import json
from pathlib import Path

import numpy as np
import pytest

pa = pytest.importorskip("pyarrow")

from sightline.scale import results  # noqa: E402
from sightline.scale.results import Results, packed_map, read_map, shard_file, write_asked, write_shard  # noqa: E402

FACTS = {
    "sightline": "0",
    "network": "toy",
    "methods": ["cam"],
    "classes": ["a", "b"],
    "sources": ["photos"],
    "images": 5,
    "images_per_shard": 2,
}


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
    with pytest.raises(ValueError, match=r"another question \(methods differ\); choose a new folder"):
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
    with pytest.raises(FileNotFoundError, match="holds no results"):
        Results.open(tmp_path / "nothing")
    (tmp_path / "asked.json").write_text(json.dumps({"format": 2}))
    with pytest.raises(ValueError, match="expected format 1"):
        Results.open(tmp_path)
    (tmp_path / "asked.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        Results.open(tmp_path)
