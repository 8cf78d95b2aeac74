"""Bags of tiles, their classifiers, and maps of slides: by hand, by identities, and by planted evidence."""

import csv
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

openslide = pytest.importorskip("openslide")
tifffile = pytest.importorskip("tifffile")

from tests.elsewhere import in_reverse  # noqa: E402
from tests.slide_files import pyramid  # noqa: E402

from sightline.data import Preprocess  # noqa: E402
from sightline.data.slides import Tiles  # noqa: E402
from sightline.slides import POOLINGS, Bag, BagClassifier, TileReport, read_bag, write_bags  # noqa: E402
from sightline.slides.bags import Grid  # noqa: E402
from sightline.slides.files import colored, write_geojson, write_ome_tiff, write_table  # noqa: E402
from sightline.slides.maps import (  # noqa: E402
    NoArea,
    TileClassifier,
    annotated,
    area,
    controls,
    curve,
    energy,
    raster,
    tile_values,
)
from sightline.slides.study import (  # noqa: E402
    Training,
    auroc,
    auroc_intervals,
    folds_of,
    open_slide_run,
    read_labels,
    slide_files,
    train,
)

GRID = Grid(size=32, mpp=16.0, least=0.5)
PLAIN = Preprocess(size=(32, 32), mean=(0.5,) * 3, std=(0.5,) * 3)


class MeanColors(torch.nn.Module):
    """Features are the mean colors."""

    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(3, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(images.mean((2, 3)))


def stained(tiles: list[list[tuple[int, int, int]]]) -> np.ndarray:
    """A slide of tiles of 64 pixels, each of one color."""
    return np.repeat(np.repeat(np.array(tiles, dtype=np.uint8), 64, 0), 64, 1)


PINK, VIOLET, GLASS = (220, 120, 180), (120, 60, 160), (240, 240, 240)


def slide(path: Path, tiles: list[list[tuple[int, int, int]]]) -> Path:
    return pyramid(path, stained(tiles), 1, 8.0)


def bag(features: torch.Tensor, columns: int = 4) -> Bag:
    """A bag whose tiles are 10 pixels wide and stand in rows."""
    places = np.stack(np.divmod(np.arange(len(features)), columns), 1)
    ones = np.ones(len(features))
    tiles = Tiles(corners=places[:, ::-1] * 10.0, places=places, tissue=ones, extent=10.0, size=32, mpp=0.5)
    rows = -(-len(features) // columns)
    return Bag(
        name="a.svs", features=features, tiles=tiles, sharpness=ones, stain=np.arange(len(features), dtype=float),
        size=(10 * rows, 10 * columns), mpp=0.5, settings={"mpp": 0.5}, report=TileReport(len(features), 0),
    )  # fmt: skip


def test_features_by_hand(tmp_path: Path) -> None:
    """Tiles with tissue only; their features are what the network's last layer gets; a file returns what was saved."""
    file = slide(tmp_path / "a.tif", [[PINK, GLASS, VIOLET], [GLASS, VIOLET, GLASS]])
    written = write_bags([file], tmp_path / "bags", MeanColors(), PLAIN, GRID)
    assert written.tiles == 3 and not written.skipped and not written.damaged
    found = read_bag(written.files["a.tif"])
    colors = stained([[PINK, GLASS, VIOLET], [GLASS, VIOLET, GLASS]])
    whole = np.asarray(Image.fromarray(colors).resize((96, 64), Image.Resampling.BILINEAR))
    places = [(0, 0), (0, 64), (32, 32)]
    expected = np.stack([whole[top : top + 32, left : left + 32].mean((0, 1)) for top, left in places])
    torch.testing.assert_close(found.features.double(), torch.from_numpy(expected / 255 * 2 - 1), atol=1e-6, rtol=0)
    assert found.tiles.corners.tolist() == [[0, 0], [128, 0], [64, 64]] and found.tiles.extent == 64
    assert found.tiles.places.tolist() == [[0, 0], [0, 2], [1, 1]]
    assert found.name == "a.tif" and found.size == (128, 192) and found.mpp == pytest.approx(8.0)
    assert found.stain[1] > found.stain[0] > 0 and found.report == (3, 0)


def test_workers_read_the_same(tmp_path: Path) -> None:
    file = slide(tmp_path / "a.tif", [[PINK, VIOLET] * 4] * 4)
    own, other = (
        read_bag(
            write_bags([file], tmp_path / str(n), MeanColors(), PLAIN, GRID, batch_size=5, workers=n).files["a.tif"]
        )
        for n in (0, 2)
    )
    assert torch.equal(own.features, other.features) and np.array_equal(own.sharpness, other.sharpness)


def test_slides_read_elsewhere_are_the_same(tmp_path: Path) -> None:
    good = [slide(tmp_path / f"{name}.tif", [[PINK, VIOLET] * n]) for n, name in enumerate("abc", start=1)]
    files = [*good, tmp_path / "d.tif"]
    model = MeanColors().train()
    here = write_bags(files, tmp_path / "here", model, PLAIN, GRID)
    write_bags(good[:1], tmp_path / "there", model, PLAIN, GRID)
    told: list[tuple[str, int, int]] = []
    there = write_bags(
        files, tmp_path / "there", model, PLAIN, GRID, spread=in_reverse, progress=lambda *one: told.append(one)
    )
    assert (
        [*there.files] == ["a.tif", "b.tif", "c.tif"] and there.skipped == here.skipped and [*here.skipped] == ["d.tif"]
    )
    assert there.reports == here.reports and there.tiles == 10 and model.training
    assert [what.split(",")[0].removesuffix(")") for what, *_ in told] == ["c.tif (2 of 3", "b.tif (3 of 3"]
    assert [one[1:] for one in told] == [(6, 6), (4, 4)]
    for name, file in here.files.items():
        assert file.read_bytes() == there.files[name].read_bytes()


def test_the_network_is_left_alone(tmp_path: Path) -> None:
    file = slide(tmp_path / "a.tif", [[PINK, VIOLET]])
    model = MeanColors().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    write_bags([file], tmp_path / "bags", model, PLAIN, GRID)
    assert model.training and all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert torch.equal(torch.get_rng_state(), state)


def test_slides_that_cannot_be_read_are_listed(tmp_path: Path) -> None:
    good = slide(tmp_path / "a.tif", [[PINK, VIOLET]])
    (tmp_path / "b.svs").write_bytes(b"")
    glass = slide(tmp_path / "c.tif", [[GLASS, GLASS]])
    coarse = pyramid(tmp_path / "d.tif", stained([[PINK, VIOLET]]), 1, 32.0)
    written = write_bags(
        [good, tmp_path / "b.svs", glass, coarse, tmp_path / "e.svs"], tmp_path / "bags", MeanColors(), PLAIN, GRID
    )
    assert [*written.files] == ["a.tif"]
    assert written.skipped["c.tif"] == "c.tif: no tile has 50% tissue or more; lower the share, or leave it out"
    assert "expected tiles of 32 micrometers per pixel or more" in written.skipped["d.tif"]
    assert written.skipped["b.svs"].startswith("b.svs: expected a slide") and "no file" in written.skipped["e.svs"]
    with pytest.raises(ValueError, match=r"at least one readable slide, got none; the first: b.svs: expected"):
        write_bags([tmp_path / "b.svs"], tmp_path / "none", MeanColors(), PLAIN, GRID)
    with pytest.raises(ValueError, match=r"slides of different names, got a.tif twice"):
        write_bags([good, good], tmp_path / "none", MeanColors(), PLAIN, GRID)


def test_damaged_tiles_are_counted(tmp_path: Path) -> None:
    """Tissue is found on the coarser level, which is whole."""
    file = pyramid(tmp_path / "a.tif", stained([[PINK, VIOLET] * 2] * 4), 2, 4.0)
    with tifffile.TiffFile(file) as tiff:
        offset, count = tiff.pages[0].dataoffsets[5], tiff.pages[0].databytecounts[5]
    data = bytearray(file.read_bytes())
    data[offset : offset + count] = b"\xff" * count
    file.write_bytes(data)
    written = write_bags([file], tmp_path / "bags", MeanColors(), PLAIN, Grid(size=64, mpp=4.0))
    assert written.damaged == {"a.tif": 1} and len(read_bag(written.files["a.tif"])) == 15


def test_a_second_call_continues(tmp_path: Path) -> None:
    file = slide(tmp_path / "a.tif", [[PINK, VIOLET]])
    first = write_bags([file], tmp_path / "bags", MeanColors(), PLAIN, GRID, made_by={"network": "a"})
    before = first.files["a.tif"].stat()
    file.unlink()  # not needed any more
    second = write_bags([file], tmp_path / "bags", MeanColors(), PLAIN, GRID, made_by={"network": "a"})
    assert second.files == first.files and second.tiles == 0
    assert first.files["a.tif"].stat().st_mtime_ns == before.st_mtime_ns
    with pytest.raises(ValueError, match=r"expected features with network b, got some with a; choose another folder"):
        write_bags([file], tmp_path / "bags", MeanColors(), PLAIN, GRID, made_by={"network": "b"})
    with pytest.raises(ValueError, match=r"expected features with mpp 20.0, got some with 16.0"):
        write_bags([file], tmp_path / "bags", MeanColors(), PLAIN, replace(GRID, mpp=20.0), made_by={"network": "a"})
    first.files["a.tif"].write_bytes(b"no bag")
    with pytest.raises(ValueError, match=r"a.tif.safetensors: expected the features of a slide, got another file"):
        read_bag(first.files["a.tif"])


@pytest.mark.parametrize(("tiles_that_fit", "most"), [(1, 1), (3, 2), (9, 4)])
def test_batches_are_cut_by_memory(
    tiles_that_fit: int, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Down to a power of two, and never above the number that is asked for."""
    file, seen = slide(tmp_path / "a.tif", [[PINK, VIOLET] * 3] * 3), list[int]()

    class Counting(MeanColors):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(len(x))
            return super().forward(x)

    monkeypatch.setattr("sightline.slides.bags.held_by", lambda call: (call(), 100_000_000))
    monkeypatch.setattr("sightline.slides.bags.allowance", lambda *_: tiles_that_fit * 100_000_000)
    written = write_bags([file], tmp_path / "bags", Counting(), PLAIN, GRID, batch_size=5)
    assert max(seen) == most and sum(seen) == len(read_bag(written.files["a.tif"])) + 1


_KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from tests.test_slide_bags import GRID, PLAIN, MeanColors
from sightline.slides import write_bags
print("ready", flush=True)
write_bags(sorted(Path(sys.argv[1]).glob("*.tif")), Path(sys.argv[2]), MeanColors(), PLAIN, GRID, batch_size=2)
"""


def test_killed_at_any_moment_and_continued(tmp_path: Path) -> None:
    """No half bag is left, and the bags are those of an undisturbed run, byte for byte."""
    (tmp_path / "slides").mkdir()
    for i in range(12):
        slide(tmp_path / "slides" / f"{i}.tif", [[PINK, VIOLET] * 3] * (2 + i % 3))
    command = [
        sys.executable,
        "-c",
        _KILLED,
        str(tmp_path / "slides"),
        str(tmp_path / "bags"),
        str(Path(__file__).parent),
    ]
    rng = np.random.default_rng(0)
    for _ in range(2):
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stdout.readline() == b"ready\n"
            time.sleep(rng.uniform(0.0, 0.4))
            process.send_signal(signal.SIGKILL)
        for file in (tmp_path / "bags").glob("*.safetensors"):
            read_bag(file)
    slides = sorted((tmp_path / "slides").glob("*.tif"))
    continued = write_bags(slides, tmp_path / "bags", MeanColors(), PLAIN, GRID, batch_size=2)
    undisturbed = write_bags(slides, tmp_path / "other", MeanColors(), PLAIN, GRID, batch_size=2)
    for name, file in undisturbed.files.items():
        assert continued.files[name].read_bytes() == file.read_bytes()


@pytest.mark.parametrize("pooling", POOLINGS)
def test_logits_are_sums_of_the_tiles_shares(pooling: str) -> None:
    torch.manual_seed(0)
    model = BagClassifier(6, 3, pooling, k=2).eval()
    features = torch.randn(2, 5, 6)
    weights, scores = model.parts(features)
    torch.testing.assert_close((weights * scores).sum(1), model(features))
    torch.testing.assert_close(weights.sum(1), torch.ones(2, 3))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_padding_changes_nothing(pooling: str) -> None:
    torch.manual_seed(0)
    model = BagClassifier(6, 3, pooling, k=2).eval()
    features = torch.randn(1, 4, 6)
    padded = torch.cat([features, torch.full((1, 3, 6), 50.0)], 1)
    mask = torch.tensor([[True] * 4 + [False] * 3])
    torch.testing.assert_close(model(padded, mask), model(features))
    assert (model.parts(padded, mask)[0][:, 4:] == 0).all()


@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_order_of_tiles_does_not_matter(pooling: str) -> None:
    torch.manual_seed(0)
    model = BagClassifier(6, 3, pooling, k=2).eval()
    features = torch.randn(1, 9, 6)
    torch.testing.assert_close(model(features[:, torch.randperm(9)]), model(features))


def test_poolings_by_hand() -> None:
    """One class whose tiles score 1, 2 and 6."""
    scores = torch.tensor([[[1.0], [2.0], [6.0]]])
    expected = {"uniform": 3.0, "max": 6.0, "top_k": 4.0, "mean": 3.0}
    for pooling, value in expected.items():
        model = BagClassifier(1, 1, pooling, hidden=1, k=2, dropout=0.0).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(float(parameter.ndim > 1))
        assert model(scores).item() == pytest.approx(value)
    with pytest.raises(ValueError, match=r"expected a pooling out of attention, uniform, mean, max, top_k; got 'sum'"):
        BagClassifier(1, 1, "sum")


def labels_file(
    path: Path, rows: list[tuple[str, ...]], columns: tuple[str, ...] = ("slide", "label", "patient")
) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def test_tables_of_labels(tmp_path: Path) -> None:
    table = read_labels(labels_file(tmp_path / "a.csv", [("a.svs", "no", "p"), ("b.svs", "yes", "")]))
    assert table.classes == ("no", "yes") and table.labels == (0, 1) and table.patients == ("p", "b.svs")
    for rows, columns, reason in [
        ([("a", "no", "p")], ("file", "label", "patient"), r"expected a column 'slide', got file, label, patient"),
        ([("a", "no", "p"), ("a", "yes", "p")], None, r"one row for each slide, got two for a"),
        ([("a", "", "p")], None, r"expected a label for every slide, got none for a"),
        ([("a", "no", "p"), ("b", "no", "q")], None, r"expected two classes or more, got no"),
    ]:
        file = labels_file(tmp_path / "b.csv", rows, columns or ("slide", "label", "patient"))
        with pytest.raises(ValueError, match=reason):
            read_labels(file)


def test_spaces_make_no_other_patient(tmp_path: Path) -> None:
    table = read_labels(labels_file(tmp_path / "a.csv", [("a.svs", " no", "7 "), ("b.svs ", "yes", " 7")]))
    assert table.patients == ("7", "7") and table.slides == ("a.svs", "b.svs") and table.classes == ("no", "yes")


def test_a_column_of_patients_that_is_asked_for_has_to_be_there(tmp_path: Path) -> None:
    file = labels_file(tmp_path / "a.csv", [("a.svs", "no"), ("b.svs", "yes")], ("slide", "label"))
    assert read_labels(file).patients == ("a.svs", "b.svs")
    with pytest.raises(ValueError, match=r"expected a column 'case', got slide, label; rename one"):
        read_labels(file, patient="case")
    labels_file(file, [("", "no"), ("b.svs", "yes")], ("slide", "label"))
    with pytest.raises(ValueError, match=r"expected the file name of a slide in every row"):
        read_labels(file)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"a.csv: expected a table in CSV, got another file"):
        read_labels(file)


def test_names_without_their_ending(tmp_path: Path) -> None:
    """Also such with points, as in TCGA-A1-DX1.5F2C.svs; one that fits two files is none."""
    for name in ("A1-DX1.5F2C.svs", "A10.svs", "A1.ome.tif", "b.svs", "b.tif"):
        (tmp_path / name).touch()
    found = slide_files(tmp_path, ["A1-DX1.5F2C", "A1-DX1", "A1", "A10.svs", "b", "c"])
    assert [file.name for file in found] == ["A1-DX1.5F2C.svs", "A1-DX1.5F2C.svs", "A1.ome.tif", "A10.svs", "b", "c"]


def test_slides_named_without_their_ending_are_known_again(tmp_path: Path) -> None:
    """Else networks that were trained on a slide would explain it as a new one."""
    files: dict[str, Path] = {}
    for i in range(4):
        files[f"{i}"] = tmp_path / f"{i}.safetensors"
        replace(bag(torch.randn(3, 4)), name=f"{i}.svs").save(files[f"{i}"])
    table = read_labels(labels_file(tmp_path / "a.csv", [(f"{i}", "ab"[i % 2], f"p{i}") for i in range(4)]))
    run = train(files, table, tmp_path / "run", Training(poolings=("uniform",), folds=2, seeds=1, epochs=1))
    assert run.slides == ("0.svs", "1.svs", "2.svs", "3.svs") and len(run.models("1.svs", "uniform")) == 1


def test_networks_of_a_training_that_was_stopped_are_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folds of the run before it would call slides unseen that the new networks have seen."""
    files = {f"{i}.svs": tmp_path / f"{i}.safetensors" for i in range(4)}
    for name, file in files.items():
        replace(bag(torch.randn(3, 4)), name=name).save(file)
    table = read_labels(labels_file(tmp_path / "a.csv", [(f"{i}.svs", "ab"[i % 2], f"p{i}") for i in range(4)]))
    how = Training(poolings=("uniform",), folds=2, seeds=1, epochs=1)
    train(files, table, tmp_path / "run", how)

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(files, table, tmp_path / "run", how, progress=stopped)
    with pytest.raises(FileNotFoundError, match=r"got a folder without slides.json"):
        open_slide_run(tmp_path / "run")


def test_a_class_whose_slides_were_all_left_out() -> None:
    with pytest.raises(ValueError, match=r"two patients or more of each class, got none of yes"):
        folds_of(np.array([0, 0, 0]), ["a", "b", "c"], 2, 0, ("no", "yes"))


def test_no_patient_is_in_two_folds() -> None:
    rng = np.random.default_rng(0)
    patients = [f"p{i}" for i in rng.integers(0, 15, 60)]
    labels = rng.integers(0, 2, 60)
    parts = folds_of(labels, patients, 5, 0)
    assert set(parts) == set(range(5))
    for patient in set(patients):
        assert len({parts[i] for i in range(60) if patients[i] == patient}) == 1
    with pytest.raises(ValueError, match=r"two patients or more of each class, got one of class 1"):
        folds_of(np.array([0, 0, 1]), ["a", "b", "c"], 2, 0)


def test_auroc_against_all_pairs() -> None:
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(0)
    for _ in range(20):
        positive, scores = rng.random(30) < 0.4, rng.integers(0, 6, 30) / 5
        assert auroc(scores, positive)[0] == pytest.approx(roc_auc_score(positive, scores))
    weights = rng.integers(0, 3, (1, 30)).astype(float)
    repeated = np.repeat(np.arange(30), weights[0].astype(int))
    assert auroc(scores, positive, weights)[0] == pytest.approx(roc_auc_score(positive[repeated], scores[repeated]))
    assert np.isnan(auroc(scores, np.zeros(30, dtype=bool))[0])


def test_intervals_are_those_of_patients() -> None:
    """Slides of a patient that are copies of each other make no interval narrower."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 20)
    scores = (labels * 0.5 + rng.random(20))[None, :, None]
    probabilities = {"uniform": np.concatenate([1 - scores, scores], 2)}
    once, _ = auroc_intervals(probabilities, labels, [str(i) for i in range(20)])
    copies = {name: np.repeat(one, 4, 1) for name, one in probabilities.items()}
    often, _ = auroc_intervals(copies, np.repeat(labels, 4), [str(i) for i in np.repeat(np.arange(20), 4)])
    assert often["uniform"].low == pytest.approx(once["uniform"].low) and often["uniform"].n == 20


def test_a_difference_is_no_fraction() -> None:
    """Two poolings that are always right differ by 0, in each resample."""
    labels = np.array([0, 1] * 6)
    sure = np.stack([1.0 - labels, labels], 1)[None]
    own, differences = auroc_intervals({"uniform": sure, "attention": sure}, labels, [str(i) for i in range(12)])
    assert own["attention"].low < 1.0
    assert differences["attention"].low == differences["attention"].high == 0.0


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """Slides of 40 tiles of noise; in every slide of the second class, two tiles have a sign of it."""
    folder = tmp_path_factory.mktemp("planted")
    rng = torch.Generator().manual_seed(0)
    files: dict[str, Path] = {}
    rows: list[tuple[str, ...]] = []
    for i in range(40):
        features = torch.randn(40, 8, generator=rng)
        if i % 2:
            features[[7, 21], 0] += 6.0
        one = replace(bag(features, 8), name=f"{i}.svs")
        files[one.name] = folder / f"{i}.safetensors"
        one.save(files[one.name])
        rows.append((one.name, "tumor" if i % 2 else "healthy", f"p{i // 3}"))
    labels_file(folder / "labels.csv", rows)
    train(files, read_labels(folder / "labels.csv"), folder / "run", Training(seeds=1, folds=3, epochs=30, lr=3e-3))
    return folder / "run", files


def test_attention_finds_planted_tiles(planted: tuple[Path, dict[str, Path]]) -> None:
    run = open_slide_run(planted[0])
    own, differences = auroc_intervals({p: run.probabilities(p) for p in POOLINGS}, np.array(run.labels), run.patients)
    assert own["attention"].value > 0.95 > own["mean"].value and set(differences) == {*POOLINGS} - {"uniform"}
    found = tile_values(read_bag(planted[1]["1.svs"]), run.models("1.svs"))
    assert run.classes[found.target] == "tumor" and set(np.argsort(-found.attention)[:2]) == {7, 21}
    assert found.attention.sum() == pytest.approx(1) and set(np.argsort(-found.evidence)[:2]) == {7, 21}


def test_a_slide_of_the_training_is_explained_by_networks_that_have_not_seen_it(
    planted: tuple[Path, dict[str, Path]],
) -> None:
    run = open_slide_run(planted[0])
    assert len(run.models("1.svs")) == 1 and len(run.models("new.svs")) == 3
    place = run.slides.index("1.svs")
    found = tile_values(read_bag(planted[1]["1.svs"]), run.models("1.svs"))
    np.testing.assert_allclose(found.probabilities, run.probabilities("attention")[0, place], atol=1e-6)


def test_evidence_adds_up_to_the_logit(planted: tuple[Path, dict[str, Path]]) -> None:
    run = open_slide_run(planted[0])
    models = run.models("new.svs")
    one = read_bag(planted[1]["3.svs"])
    found = tile_values(one, models, 1)
    with torch.inference_mode():
        logits = torch.stack([model(one.features[None])[0] for model in models]).mean(0)
    assert found.evidence.sum() == pytest.approx(float(logits[1] - logits[0]), abs=1e-5)


def test_bad_runs_and_bags(planted: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    run = open_slide_run(planted[0])
    with pytest.raises(ValueError, match=r"expected features of length 8, got 3; use the run's network"):
        tile_values(bag(torch.ones(4, 3)), run.models("1.svs"))
    with pytest.raises(ValueError, match=r"expected a class from 0 to 1, got 2"):
        tile_values(bag(torch.ones(4, 8)), run.models("1.svs"), 2)
    with pytest.raises(ValueError, match=r"expected a pooling of this run, .*; got 'sum'"):
        run.models("1.svs", "sum")
    with pytest.raises(FileNotFoundError, match=r"expected a run of `sightline slides train`"):
        open_slide_run(tmp_path)
    (tmp_path / "slides.json").write_text("{}")
    with pytest.raises(ValueError, match=r"slides.json: expected a run .* got a damaged file"):
        open_slide_run(tmp_path)


def test_curves_by_hand(planted: tuple[Path, dict[str, Path]]) -> None:
    """Without the planted tiles the probability falls; the first bag is the whole slide, and insertion ends with it."""
    run = open_slide_run(planted[0])
    one = read_bag(planted[1]["1.svs"])
    models = run.models("1.svs")
    found = tile_values(one, models, 1)
    out_shares, falling = curve(one, models, found.attention, 1, steps=40)
    in_shares, rising = curve(one, models, found.attention, 1, inserts=True, steps=40)
    assert out_shares.tolist() == [i / 40 for i in range(40)] and in_shares.tolist() == [
        (i + 1) / 40 for i in range(40)
    ]
    assert falling[0] == rising[-1] == pytest.approx(found.probabilities[1], abs=1e-6)
    kept = one.features[[i for i in range(40) if i not in (7, 21)]]
    with torch.inference_mode():
        expected = np.mean([float(model(kept[None])[0].softmax(0)[1]) for model in models])
    assert falling[2] == pytest.approx(expected, abs=1e-6)
    random = controls(one)["random tiles"]
    assert area(out_shares, falling) < area(*curve(one, models, random, 1, steps=40))
    assert area(in_shares, rising) > area(*curve(one, models, random, 1, inserts=True, steps=40))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_curves_are_those_of_smaller_bags(pooling: str) -> None:
    """As if each bag were run on its own, though the network runs once."""
    torch.manual_seed(0)
    models = [BagClassifier(8, 3, pooling, k=4).eval() for _ in range(2)]
    one, values = bag(torch.randn(12, 8)), np.random.default_rng(0).random(12)
    calls: list[int] = []
    hook = models[0].score.register_forward_hook(lambda *_: calls.append(1))
    _, falling = curve(one, models, values, 2)
    _, rising = curve(one, models, values, 2, inserts=True)
    hook.remove()
    assert len(calls) == 2
    order = np.argsort(-values)
    for i in range(12):
        for found, inside in ((falling[i], order[i:]), (rising[i], order[: i + 1])):
            with torch.inference_mode():
                expected = torch.stack([model(one.features[inside][None])[0].softmax(0)[2] for model in models]).mean()
            assert found == pytest.approx(float(expected), abs=1e-6)


@pytest.mark.parametrize("inserts", [False, True])
def test_curves_of_tiny_slides(planted: tuple[Path, dict[str, Path]], inserts: bool) -> None:
    """One tile cannot be taken out; of two, the one and the whole are left."""
    models = open_slide_run(planted[0]).models("new.svs")
    for tiles, points in ((1, 1), (2, 2), (3, 3)):
        shares, found = curve(bag(torch.randn(tiles, 8)), models, np.ones(tiles), 1, inserts=inserts)
        assert len(shares) == len(found) == points and np.isfinite(found).all()
        assert np.isnan(area(shares, found)) == (tiles == 1)


def test_controls_by_hand() -> None:
    found = controls(bag(torch.zeros(16, 2)))
    middle = found["middle of the tissue"].reshape(4, 4)
    assert middle[0, 0] == 0 and middle[1:3, 1:3] == pytest.approx(middle.max())
    assert found["stain"].tolist() == list(range(16)) and len(set(found["random tiles"])) == 16


def geojson(path: Path, coordinates: list[object], kind: str = "Polygon", name: str = "Tumor") -> Path:
    properties = {"objectType": "annotation", "classification": {"name": name}}
    feature = {"type": "Feature", "geometry": {"type": kind, "coordinates": coordinates}, "properties": properties}
    path.write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}))
    return path


def square(left: float, top: float, right: float, bottom: float) -> list[list[float]]:
    return [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]


def test_annotations_by_hand(tmp_path: Path) -> None:
    one = bag(torch.zeros(16, 2))
    half = geojson(tmp_path / "a.geojson", [square(0, 0, 15, 10)])
    shares = annotated(half, one.tiles, one.size)
    assert shares[:4] == pytest.approx([1.0, 0.5, 0.0, 0.0]) and not shares[4:].any()
    ring = geojson(tmp_path / "b.geojson", [[square(0, 0, 40, 40), square(10, 10, 30, 30)]], "MultiPolygon")
    inside = annotated(ring, one.tiles, one.size).reshape(4, 4)
    assert inside[1:3, 1:3] == pytest.approx(0.0) and inside[0] == pytest.approx(1.0)
    assert energy(np.ones(16), shares) == pytest.approx(shares.mean())
    outside = geojson(tmp_path / "d.geojson", [square(-30, -30, -10, -10)])
    assert not annotated(outside, one.tiles, one.size).any()
    with pytest.raises(NoArea, match=r"annotations with an area named Stroma, got none"):
        annotated(half, one.tiles, one.size, ["Stroma"])
    (tmp_path / "c.geojson").write_text("[1]")
    with pytest.raises(ValueError, match=r"c.geojson: expected GeoJSON as QuPath exports it"):
        annotated(tmp_path / "c.geojson", one.tiles, one.size)


def test_rasters_average_overlaps() -> None:
    """Tiles of 10 pixels that begin every 5, on 5-pixel pixels."""
    corners = np.array([[0.0, 0.0], [5.0, 0.0]])
    tiles = Tiles(corners=corners, places=corners.astype(int), tissue=np.ones(2), extent=10.0, size=32, mpp=1.0)
    drawn = raster(tiles, np.array([2.0, 4.0])[:, None, None], (10, 20), 5.0)
    np.testing.assert_array_equal(drawn, [[2, 3, 4, np.nan]] * 2)


def test_geojson_is_what_qupath_reads(tmp_path: Path) -> None:
    """Field by field the form of QuPath's own export of tiles, as quoted in SBU-BMI/wsinfer#178:

    {"type": "Feature", "id": UUID, "geometry": {"type": "Polygon", "coordinates": [five points, closed]}, "properties":
    {"isLocked": true, "measurements": {NAME: NUMBER, ...}, "objectType": "tile"}}; the reader of QuPath 0.5,
    QuPathTypeAdapters.java, takes `id` only if it is a UUID, `objectType` "tile" for tiles, and `measurements` as an
    object of numbers.
    """
    from uuid import UUID

    one = bag(torch.zeros(6, 2))
    write_geojson(tmp_path / "a.geojson", one, {"attention": np.arange(6.0), "evidence": -np.arange(6.0)})
    content = json.loads((tmp_path / "a.geojson").read_text())
    assert set(content) == {"type", "features"} and content["type"] == "FeatureCollection"
    assert len(content["features"]) == 6 and len({feature["id"] for feature in content["features"]}) == 6
    feature = content["features"][5]
    assert set(feature) == {"type", "id", "geometry", "properties"} and feature["type"] == "Feature"
    assert str(UUID(feature["id"])) == feature["id"]
    assert feature["geometry"] == {
        "type": "Polygon", "coordinates": [[[10, 10], [20, 10], [20, 20], [10, 20], [10, 10]]],
    }  # fmt: skip
    assert feature["properties"] == {
        "objectType": "tile", "isLocked": True, "measurements": {"attention": 5.0, "evidence": -5.0},
    }  # fmt: skip


def test_ome_tiff_opens_elsewhere(tmp_path: Path) -> None:
    """tifffile and OpenSlide read the same pixels at the right place and size; the pyramid is complete."""
    values = np.full((700, 900), np.nan)
    values[300:310, 600:620] = 1.0
    drawn = colored(values)
    write_ome_tiff(tmp_path / "a.ome.tif", drawn, 8.0)
    with tifffile.TiffFile(tmp_path / "a.ome.tif") as tiff:
        assert [level.shape for level in tiff.series[0].levels] == [(700, 900, 3), (350, 450, 3)]
        assert 'PhysicalSizeX="8.0"' in tiff.ome_metadata and 'PhysicalSizeXUnit="µm"' in tiff.ome_metadata
        np.testing.assert_array_equal(tiff.series[0].asarray(), drawn)
    with openslide.OpenSlide(tmp_path / "a.ome.tif") as other:
        assert float(other.properties["openslide.mpp-x"]) == pytest.approx(8.0, rel=1e-4)
        found = np.asarray(other.read_region((0, 0), 0, other.dimensions).convert("RGB"))
        np.testing.assert_array_equal(found, drawn)
    rows, columns = np.nonzero((found != 255).any(2))
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (300, 309, 600, 619)


def test_table_of_tiles(tmp_path: Path) -> None:
    write_table(tmp_path / "a.csv", bag(torch.zeros(6, 2)), {"attention": np.arange(6.0)})
    with (tmp_path / "a.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    assert rows[5] == {
        "tile": "5", "left": "10.0", "top": "10.0", "side": "10.0", "left, um": "5.0", "top, um": "5.0",
        "side, um": "5.0", "tissue": "1", "sharpness": "1", "stain": "5", "attention": "5",
    }  # fmt: skip


def test_a_tile_alone_scores_as_in_its_bag() -> None:
    """Any explainer can ask a network and bag classifiers about one tile."""
    import sightline as sl

    torch.manual_seed(0)
    network, models = MeanColors().eval(), [BagClassifier(3, 2).eval() for _ in range(2)]
    images = torch.rand(4, 3, 8, 8)
    features = images.mean((2, 3))
    both = TileClassifier(network, models).eval()
    with torch.inference_mode():
        expected = torch.stack([model.parts(features[None])[1][0] for model in models]).mean(0)
        torch.testing.assert_close(both(images), expected)
    assert sl.explain(both, images, methods=["saliency"])["saliency"].shape == (4, 1, 8, 8)
