"""Studies: rows x seeds under one recipe, their table by hand, and what a second call does."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sightline import bench, cli, recipe, runs
from sightline.bench import Bench, Maps, Measured, Study, Summary
from sightline.metrics.complexity import sparsity
from sightline.models import create_model
from sightline.recipe import Data, Model, Optim, Recipe
from sightline.training import fit

pytestmark = pytest.mark.usefixtures("few_validation_images")

SMALL = Recipe(
    data=Data(train_size=64, test_size=20),
    model=Model(name="cifar_resnet", options={"depth": 8, "width": 0.25, "stem_stride": 2}),
    optim=Optim(epochs=1, lr=0.01),
    seeds=(0, 1),
)
ROWS = {
    "control": {},
    "parts (2)": {"model.options.attention": "brnpa", "model.options.attention_options": {"k": 2}},
    "SE": {"model.options.attention": "se", "model.options.attention_options": {"reduction": 2}},
}
NO_MAPS = Maps(energy={}, sparsity={}, activation_energy=math.nan, similarity=math.nan)


def measured(row: str, seed: int, accuracy: float, **maps: float) -> Measured:
    own = replace(NO_MAPS, energy={"a": 0.0, "b": maps["energy"]}, sparsity={"a": 9.0, "b": 2.0}) if maps else NO_MAPS
    return Measured(
        row=row,
        seed=seed,
        accuracy=accuracy,
        majority=0.1,
        area=math.nan,
        parameters=1234,
        seconds=1.0 + seed,
        before=NO_MAPS,
        after=own,
    )


def test_the_table_by_hand():
    found = Bench(
        control="control",
        rows=("control", "block", "lost"),
        measured=(
            measured("control", 0, 0.90),
            measured("control", 1, 0.80),
            measured("block", 0, 0.93, energy=0.5),
            measured("block", 1, 0.87, energy=0.3),
            measured("block", 2, 0.10, energy=0.4),
        ),
        failed={"lost, seed 0": "the loss became nan"},
    )
    # differences of the seeds that both have: .03 and .07, so .05 ± 12.7062 * .0282843 / sqrt(2)
    assert found.difference("block") == pytest.approx((0.05 - 0.254124, 0.05 + 0.254124), abs=1e-6)
    assert found.difference("control") is None
    assert replace(found, control="another").difference("block") is None  # only these rows were asked for
    columns, lines = found.table()
    assert columns == [
        "network",
        "accuracy, %",
        "to control",
        "parameters",
        "s / epoch",
        "own maps in mask, after",
        "sparsity, after",
    ]
    assert lines == [
        ["control", "85.0 ± 7.1", "-", "1,234", "1.5", "-", "-"],
        [
            "block",
            "63.3 ± 46.3",
            "[-20.4, +30.4]",
            "1,234",
            "2.0",
            "0.00 ± 0.00 / 0.40 ± 0.10",
            "9.0 ± 0.0 / 2.0 ± 0.0",
        ],
    ]
    assert found.markdown().splitlines()[1:3] == [
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| control | 85.0 ± 7.1 | - | 1,234 | 1.5 | - | - |",
    ]
    assert found.over_seeds("block", lambda run: run.seconds) == Summary(2.0, 1.0)


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_study_is_trained_measured_and_not_done_twice(tmp_path: Path, jobs: int):
    study = Study(recipe=SMALL, rows=ROWS if jobs == 1 else {name: ROWS[name] for name in ("control", "SE")})
    told: list[tuple[int, int]] = []
    found = bench.bench(study, tmp_path, jobs=jobs, progress=lambda what, done, total: told.append((done, total)))
    assert told == [(i + 1, 2 * len(study.rows)) for i in range(2 * len(study.rows))]
    assert not found.failed and [(run.row, run.seed) for run in found.measured] == [
        (row, seed) for row in study.rows for seed in (0, 1)
    ]
    first = found.measured[0]
    assert first.area == pytest.approx(0.083, abs=0.02) and first.majority == 0.1 and 0 <= first.accuracy <= 1
    assert not first.after.energy and 0 < first.after.activation_energy < 1 and math.isnan(first.after.similarity)
    if jobs == 1:
        parts = found.measured[2]
        assert parts.row == "parts (2)" and list(parts.before.energy) == list(parts.after.sparsity) == [
            "avgpool.attention"
        ]
        assert parts.before.energy["avgpool.attention"] != parts.after.energy["avgpool.attention"]
        assert -1 <= parts.after.similarity <= 1
    stamps = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("measured.json")}
    assert len(stamps) == 2 * len(study.rows)
    again = bench.bench(study, tmp_path, jobs=jobs)
    assert repr(again) == repr(found)  # NaN differs from NaN
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("measured.json")} == stamps
    assert json.loads((tmp_path / "bench.json").read_text())["measured"][0]["after"]["similarity"] is None
    assert (tmp_path / "bench.md").read_text() == found.markdown()


def test_a_teacher_that_is_a_row_is_its_run_of_the_same_seed(tmp_path: Path):
    rows = {"student": {"optim.teacher": "the teacher"}, "the teacher": {"model.options.width": 0.5}}
    study = Study(recipe=replace(SMALL, seeds=(3,)), rows=rows)
    found = bench.bench(study, tmp_path, ["student"])
    assert [run.row for run in found.measured] == ["student", "the teacher"]  # it was needed, so it was made
    assert runs.open_run(tmp_path / "student" / "seed-3").recipe.optim.teacher == str(
        tmp_path / "the_teacher" / "seed-3"
    )


def test_a_transformer_has_attention_and_no_activation_map(tmp_path: Path):
    rows = {"vit": {"model.name": "tiny_vit", "model.options": {"depth": 2}}}
    (found,) = bench.bench(Study(recipe=replace(SMALL, seeds=(0,)), rows=rows), tmp_path).measured
    assert list(found.after.energy) == ["blocks.0.attention", "blocks.1.attention"]
    assert all(0 < share < 0.5 for share in found.after.energy.values()) and 0 < found.after.activation_energy < 0.5


def test_fresh_is_the_network_before_training(tmp_path: Path):
    still = replace(SMALL, seeds=(5,), optim=Optim(epochs=1, lr=1e-30, weight_decay=0.0))
    run = fit(still, tmp_path / "run", {"model.options.attention": "eca"}, progress=False)
    assert isinstance(run, runs.Run)
    state = torch.random.get_rng_state()
    began = bench.fresh(run)
    assert torch.equal(torch.random.get_rng_state(), state)
    trained = dict(runs.load(run.folder).named_parameters())
    # AdamW moves a zero by lr
    assert all(torch.allclose(value, trained[name], rtol=0, atol=1e-29) for name, value in began.named_parameters())
    assert not began.training


def test_a_run_that_fails_does_not_stop_the_others(tmp_path: Path):
    study = Study(recipe=replace(SMALL, seeds=(0,)), rows={"control": {}, "wild": {"optim.lr": 1e30}})
    found = bench.bench(study, tmp_path)
    assert [run.row for run in found.measured] == ["control"] and list(found.failed) == ["wild, seed 0"]
    assert "lower optim.lr" in found.failed["wild, seed 0"]
    changed = bench.bench(replace(study, recipe=replace(study.recipe, optim=Optim(epochs=2))), tmp_path, ["control"])
    assert "was begun with another recipe: optim.epochs was 1, now 2" in changed.failed["control, seed 0"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("data: {source: clutter}", "expected a part `rows`"),
        ("rows: [control, se]", "expected a part `rows`"),
        ("rows: {}", "expected a part `rows`"),
        ("rows: {control: {}, se: {model.option: 1}}", "row 'se': model.option: no such field"),
        ("rows: {control: {}, se: {optim.epochs: many}}", "row 'se': optim.epochs: expected a whole number"),
        (
            "rows: {a: {}, b: {optim.teacher: a}, c: {optim.teacher: b}}",
            "row 'c': expected a teacher that has no row as",
        ),
        ("rows: {a b: {}, a/b: {}}", "expected names of rows that differ in more than signs, got 'a b' twice"),
    ],
)
def test_studies_that_are_none(text: str, words: str, tmp_path: Path):
    (tmp_path / "study.yaml").write_text(text)
    with pytest.raises((ValueError, TypeError)) as caught:
        bench.load(tmp_path / "study.yaml")
    assert words in str(caught.value)


def test_what_cannot_be_built_is_said_before_the_first_run(tmp_path: Path):
    rows = {"control": {}, "none": {"model.options.attention": "seh"}}
    with pytest.raises(ValueError, match="row 'none': unknown attention 'seh'; did you mean 'se'"):
        bench.bench(Study(recipe=SMALL, rows=rows), tmp_path)
    with pytest.raises(ValueError, match="expected rows out of: control; none; got 'se'"):
        bench.bench(Study(recipe=SMALL, rows=rows), tmp_path, ["se"])
    with pytest.raises(ValueError, match="expected 1 job or more, got 0"):
        bench.bench(Study(recipe=SMALL, rows=rows), tmp_path, jobs=0)
    assert not list(tmp_path.iterdir())


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    study = tmp_path / "study.yaml"
    changed = recipe.dump(replace(SMALL, seeds=(0,))) + "rows: {control: {}, ECA: {model.options.attention: eca}}\n"
    study.write_text(changed)
    cli.main(["bench", str(study), "--out", str(tmp_path / "out"), "--row", "ECA", "--seeds", "7"])
    printed = capsys.readouterr()
    assert "ECA" in printed.out and "control" not in printed.out.replace("to control", "")
    assert "bench.md" not in printed.out and "1 of 1" in printed.err and not (tmp_path / "out" / "bench.md").exists()
    assert (tmp_path / "out" / "ECA" / "seed-7" / "model.safetensors").is_file()
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", str(study), "--out", str(tmp_path / "wild"), "--optim.lr", "1e30", "--row", "control"])
    assert stop.value.code == 1 and "failed: control, seed 0: " in capsys.readouterr().err
    cli.main(["bench", str(study), "--out", str(tmp_path / "out"), "--seeds", "7"])
    assert f"table: {tmp_path / 'out' / 'bench.md'}" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", str(tmp_path / "none.yaml"), "--out", str(tmp_path / "x")])
    assert stop.value.code == 2 and "not found" in capsys.readouterr().err


def test_every_study_in_recipes_can_be_built():
    files = sorted((Path(__file__).parent.parent / "recipes").glob("bench_*.yaml"))
    assert len(files) >= 3
    for file in files:
        study = bench.load(file)
        for row in study.rows:
            wanted = study.of(row, 0, Path("out"))
            create_model(wanted.model.name, num_classes=10, **wanted.model.options)


def test_sparsity_by_hand():
    maps = torch.zeros(5, 2, 2, 3)
    maps[0] = 0.7
    maps[1, :, 1, 2] = 5.0
    maps[2, 0, 0, 0], maps[2, 1] = 1.0, torch.tensor([[4.0, 2, 0], [-9, 0, 0]])
    maps[3, 0, 0, 0] = torch.nan
    found = sparsity(maps)
    torch.testing.assert_close(found[:3], torch.tensor([1.0, 6.0, 2 / (1 / 6 + 1 / 4)]))
    assert found[3:].isnan().all()  # not finite; nothing above 0


def test_sparsity_gives_the_numbers_of_the_official_code():
    known = {k: torch.from_numpy(v) for k, v in np.load(Path(__file__).parent / "golden" / "sparsity.npz").items()}
    norms = torch.linalg.vector_norm(known["features"], dim=1, keepdim=True).double()
    maps = known["maps"] * norms / norms.amax((2, 3), keepdim=True)
    highest = maps.amax((2, 3))
    shares = torch.stack([1 / sparsity(one) for one in maps.split(1, dim=1)], 1)
    torch.testing.assert_close(1 / sparsity(maps), shares.mean(1))
    official = (shares * highest / (highest + 1e-5)).mean(1)  # its code adds this to the largest value
    torch.testing.assert_close(official, known["mean_over_max_with_norm"], rtol=0, atol=1e-5)
    whole = 1 / sparsity(norms)
    torch.testing.assert_close(whole, known["activation_map_mean_over_max"].double(), rtol=0, atol=1e-5)
