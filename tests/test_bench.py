"""Studies: rows x seeds under one recipe, their table by hand, and what a second call does."""

import json
import math
import os
import re
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch

from sightline import bench, cli, data, recipe, runs, tasks
from sightline.bench import Bench, Maps, Measured, Quality, Study, Summary
from sightline.bench.measured import kept, read
from sightline.bench.published import PUBLISHED, published
from sightline.bench.run import _prepare
from sightline.bench.study import folder
from sightline.metrics.complexity import sparsity
from sightline.models import create_model
from sightline.recipe import Data, Model, Optim, Recipe
from sightline.scale import Cluster
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
TWO = Study(recipe=replace(SMALL, seeds=(0,)), rows={name: ROWS[name] for name in ("control", "SE")})
"""Two runs, for processes of their own, which take long to start."""
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
        "p, corrected",
        "parameters",
        "s / epoch",
        "own maps in mask, after",
        "sparsity, after",
    ]
    assert lines == [
        ["control", "85.0 ± 7.1", "-", "-", "1,234", "1.5", "-", "-"],
        [
            "block",
            "63.3 ± 46.3",
            "+5.0 [-20.4, +30.4]",
            "0.242",  # Student's t of one degree of freedom is Cauchy: 1 - 2 / pi atan(.05 / .02)
            "1,234",
            "2.0",
            "0.00 ± 0.00 / 0.40 ± 0.10",
            "9.0 ± 0.0 / 2.0 ± 0.0",
        ],
    ]
    lines = found.markdown().splitlines()
    assert lines[4:6] == [
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| control | 85.0 ± 7.1 | - | - | 1,234 | 1.5 | - | - |",
    ]
    assert lines[-1] == "- failed: lost, seed 0: the loss became nan"
    assert found.over_seeds("block", lambda run: run.seconds) == Summary(2.0, 1.0)


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_study_is_trained_measured_and_not_done_twice(tmp_path: Path, jobs: int):
    study = Study(recipe=SMALL, rows=ROWS) if jobs == 1 else TWO
    count, told = len(study.rows) * len(study.recipe.seeds), list[tuple[int, int]]()
    found = bench.bench(study, tmp_path, jobs=jobs, progress=lambda what, done, total: told.append((done, total)))
    assert told == [(i + 1, count) for i in range(count)]
    assert not found.failed and [(run.row, run.seed) for run in found.measured] == [
        (row, seed) for row in study.rows for seed in study.recipe.seeds
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
        run = runs.open_run(folder(tmp_path, "parts (2)", 0))
        assert parts.after.sparsity["avgpool.attention"] == pytest.approx(_sparsity_of_table_6(run), rel=1e-4)
    stamps = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("measured.json")}
    assert len(stamps) == count
    again = bench.bench(study, tmp_path, jobs=jobs)
    assert repr(again) == repr(found)  # NaN differs from NaN
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("measured.json")} == stamps
    assert json.loads((tmp_path / "bench.json").read_text())["measured"][0]["after"]["similarity"] is None
    assert (tmp_path / "bench.md").read_text() == found.markdown()


def test_a_study_on_ray(tmp_path: Path):
    """A plain call afterwards has nothing left to do."""
    pytest.importorskip("ray")
    found = bench.bench(TWO, tmp_path, cluster=Cluster(workers=2, cores=2, memory=100_000_000))
    assert not found.failed and len(found.measured) == 2
    stamps = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("measured.json")}
    assert repr(bench.bench(TWO, tmp_path)) == repr(found)
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("measured.json")} == stamps and len(stamps) == 2


def _sparsity_of_table_6(run):
    """By loops: mean over images of 1 / mean over maps of mean(S) / max(S), S a map times the norm of the features."""
    images = replace(data.load(run.recipe.data)["test"], preprocess=run.preprocess)
    model = runs.load_model(run.folder).eval()
    batch = images.batch(range(len(images)))
    pooled, features = model.get_submodule("avgpool.attention"), []
    handle = pooled.register_forward_pre_hook(lambda block, inputs: features.append(inputs[0]))
    with torch.no_grad():
        model(data.normalize(batch.images, run.preprocess))
    handle.remove()
    values = []
    for one, maps in zip(features[0], pooled.weights(features[0]), strict=True):
        shares = []
        for weights in maps:
            seen = [
                w * math.sqrt(sum(x * x for x in f))
                for w, f in zip(weights.flatten().tolist(), one.flatten(1).T.tolist(), strict=True)
            ]
            shares.append(sum(seen) / len(seen) / max(seen))
        values.append(len(shares) / sum(shares))
    return sum(values) / len(values)


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
    assert list(found.after.energy) == ["blocks.0.attn", "blocks.1.attn"]
    assert all(0 < share < 0.5 for share in found.after.energy.values()) and 0 < found.after.activation_energy < 0.5


def test_fresh_is_the_network_before_training(tmp_path: Path):
    still = replace(SMALL, seeds=(5,), optim=Optim(epochs=1, lr=1e-30, weight_decay=0.0))
    run = fit(still, tmp_path / "run", {"model.options.attention": "eca"}, progress=False)
    assert isinstance(run, runs.Run)
    state = torch.random.get_rng_state()
    began = bench.fresh(run)
    assert torch.equal(torch.random.get_rng_state(), state)
    trained = dict(runs.load_model(run.folder).named_parameters())
    # AdamW moves a zero by lr
    assert all(torch.allclose(value, trained[name], rtol=0, atol=1e-29) for name, value in began.named_parameters())
    assert not began.training


def test_a_run_that_fails_does_not_stop_the_others(tmp_path: Path):
    study = Study(recipe=replace(SMALL, seeds=(0,)), rows={"control": {}, "wild": {"optim.lr": 1e30}})
    found = bench.bench(study, tmp_path)
    assert [run.row for run in found.measured] == ["control"] and list(found.failed) == ["wild, seed 0"]
    assert "lower optim.lr" in found.failed["wild, seed 0"]
    changed = bench.bench(replace(study, recipe=replace(study.recipe, optim=Optim(epochs=2))), tmp_path, ["control"])
    assert "was started with another recipe: optim.epochs was 1, now 2" in changed.failed["control, seed 0"]


def test_what_is_stored_keeps_no_old_names_and_what_is_torn_is_done_again(tmp_path: Path):
    before = Study(recipe=replace(SMALL, seeds=(0,)), rows={"the control": {}, "E C A": ROWS["SE"]})
    first = bench.bench(before, tmp_path)
    assert (tmp_path / "the_control").is_dir()
    study = replace(before, rows={"the/control": {}, "E/C/A": ROWS["SE"]})  # other names, the same folders
    found = bench.bench(study, tmp_path)
    assert [run.row for run in found.measured] == [line[0] for line in found.table()[1]] == ["the/control", "E/C/A"]
    assert [run.accuracy for run in found.measured] == [run.accuracy for run in first.measured]
    file = tmp_path / "E_C_A" / "seed-0" / "measured.json"
    whole = json.loads(file.read_text())
    for torn in ('{"quality": {"own"', "[1]", '{"quality": 3}', "7", "\x00", '{"quality": {}, "strange": 1}'):
        file.write_text(torn)
        assert read(file) is None
    (tmp_path / "costs.json").write_text('{"of": ')
    again = bench.bench(study, tmp_path)
    assert not again.failed and json.loads(file.read_text()) == whole | {"row": "E/C/A"}
    assert set(again.costs[""]) == {"the/control", "E/C/A"} and "ms / image" in again.table()[0]
    told = json.loads((tmp_path / "costs.json").read_text())
    assert told["of"]["rows"]["E/C/A"]["model"]["options"]["attention"] == "se" and told["of"]["device"] == "cpu"
    known = bench.bench(study, tmp_path).costs
    assert known == again.costs
    told["of"]["rows"]["E/C/A"]["model"]["options"]["attention"] = "eca"  # what another network of this size cost
    told["costs"]["E/C/A"]["macs"] = 3
    (tmp_path / "costs.json").write_text(json.dumps(told))
    assert bench.bench(study, tmp_path).costs[""]["E/C/A"].macs == known[""]["E/C/A"].macs


def test_costs_that_cannot_be_taken_do_not_lose_the_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[int] = []

    def none(models: object, inputs: torch.Tensor) -> None:
        asked.append(len(inputs))
        raise torch.OutOfMemoryError("out of memory:\n  tried to have 3 GiB")

    monkeypatch.setattr("sightline.bench.costs.costs", none)
    small = replace(SMALL, seeds=(0,), optim=replace(SMALL.optim, batch_size=16))
    found = bench.bench(Study(recipe=small, rows={"control": {}, "SE": ROWS["SE"]}), tmp_path)
    assert asked == [16] and not found.failed and "ms / image" not in found.table()[0]
    said = "Costs are left out: out of memory: tried to have 3 GiB."
    assert found.sentences()[-1] == said and said in (tmp_path / "bench.md").read_text()
    assert said in (tmp_path / "bench.html").read_text() and not (tmp_path / "costs.json").exists()


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
        ("rows: {a b: {}, a/b: {}}", "expected names of rows that differ in letters or digits, got 'a b' twice"),
        ("rows: {..: {}}", "expected names of rows with a letter or a digit, got '..'"),
        ("{rows: {a: {}}, datasets: [clutter]}", "expected each of `datasets` to be a name with changes"),
        (
            "{rows: {a: {}}, datasets: {a/b: {}, a b: {}}}",
            "expected names of datasets that differ in letters or digits",
        ),
        ("{rows: {a: {}}, datasets: {c: {data.sauce: clutter}}}", "row 'a' on c: data.sauce: no such field"),
        ("{rows: {a: {}}, datasets: {c: {seeds: [1]}}}", "row 'a' on c: expected the same seeds everywhere"),
        ("rows: {a: {}, b: {control: c}}", "row 'b': expected `control` to be another row out of: a; got 'c'"),
        ("rows: {a: {}, b: {as_large_as: b}}", "row 'b': expected `as_large_as` to be another row out of: a; got 'b'"),
        ("rows: {a: {}, b: {as_large_as: a}, c: {as_large_as: b}}", "row 'c': expected `as_large_as` a row without"),
        ("rows: {a: {}, b: {as_large_as: a, model.options.width: 1}}", "row 'b': expected no model.options.width"),
    ],
)
def test_studies_that_are_none(text: str, words: str, tmp_path: Path):
    (tmp_path / "study.yaml").write_text(text)
    with pytest.raises((ValueError, TypeError)) as caught:
        bench.load_study(tmp_path / "study.yaml")
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
    assert "ECA" in printed.out and "│ control" not in printed.out
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


def with_accuracies(**rows: list[float]) -> Bench:
    """A study whose rows are named after letters, `a` the control; one accuracy per seed."""
    runs_of = [measured(row, seed, value) for row, values in rows.items() for seed, value in enumerate(values)]
    return Bench(control="a", rows=tuple(rows), measured=tuple(runs_of), failed={})


def test_differences_and_their_correction_by_hand():
    # gaps b: 1 2 3, t = 2 / (1 / sqrt 3); c: 9 10 11, t = 10 sqrt 3; two degrees of freedom: p = 1 - t / sqrt(2 + t²)
    found = with_accuracies(
        a=[0.5] * 3,
        b=[0.51, 0.52, 0.53],
        c=[0.59, 0.60, 0.61],
        d=[0.55] * 3,
        e=[0.6],
        f=[0.58, 0.60, 0.62],
        g=[0.59, 0.60, 0.61],
        h=[0.59, 0.60, 0.61],
    )
    found = replace(found, controls={"f": "g"}, as_large_as={"h": "b"})
    gaps = found.differences()
    assert list(gaps) == ["b", "c", "d", "e", "f", "g", "h"]  # the control has none
    for control in ("g", "h"):  # of f; of b, with its size: they are compared, not tested
        assert gaps[control].p == pytest.approx(gaps["c"].p) and math.isnan(gaps[control].adjusted)
        assert not gaps[control].holds and gaps[control].points() == "+10.0 [+7.5, +12.5]"
    assert (
        found.sentences()[0] == "More accurate than the control, also after correction: c +10.0 points [+7.5, +12.5]."
    )
    assert found.sentences()[1].startswith("Better, worse or as good as the control is open for b and f (to g): ")
    assert found.sentences()[2] == "To the control, d +5.0 points: the same in all seeds, not tested."
    assert math.isnan(gaps["d"].low) and gaps["d"].points() == "+5.0"
    p = {row: 1 - t / math.sqrt(2 + t**2) for row, t in {"b": math.sqrt(12), "c": math.sqrt(300)}.items()}
    assert gaps["b"].p == pytest.approx(p["b"]) and gaps["c"].p == pytest.approx(p["c"])
    assert gaps["f"].other == "g" and gaps["f"].mean == pytest.approx(0) and gaps["f"].p == pytest.approx(1)
    # three tests, for neither one seed nor three equal differences make one
    assert math.isnan(gaps["d"].p) and math.isnan(gaps["e"].p) and not gaps["d"].holds and not gaps["e"].holds
    assert gaps["c"].adjusted == pytest.approx(3 * p["c"]) and gaps["c"].holds
    assert gaps["b"].adjusted == pytest.approx(2 * p["b"]) and not gaps["b"].holds
    assert gaps["e"].points() == "+10.0" and gaps["b"].points(" points") == "+2.0 points [-0.5, +4.5]"
    columns, lines = found.table()
    cells = {line[0]: dict(zip(columns, line, strict=True)) for line in lines}
    assert cells["c"]["p, corrected"] == "0.010, holds" and cells["b"]["p, corrected"] == "0.148"
    assert cells["f"]["control"] == "g" and cells["g"]["p, corrected"] == "-" and cells["c"]["control"] == "-"


def test_a_seed_that_failed_is_told_and_nothing_holds_without_it():
    known = with_accuracies(a=[0.5] * 3, b=[0.59, 0.60, 0.61], c=[0.59, 0.60, 0.61], d=[0.51, 0.50, 0.48])
    whole = replace(known, seeds=(0, 1, 2), controls={"d": "c"})
    assert whole.differences()["b"].holds and whole.differences()["d"].holds
    assert (
        whole.sentences()[0] == "More accurate than the control, also after correction: b +10.0 points [+7.5, +12.5]."
    )
    assert (
        whole.sentences()[1]
        == "Less accurate than the control, also after correction: d (to c) -10.3 points [-16.6, -4.1]."
    )
    short = replace(whole, seeds=(0, 1, 2, 3))
    assert not any(of.holds for of in short.differences().values())
    measured = tuple(run for run in whole.measured if (run.row, run.seed) != ("c", 2))
    lost = replace(whole, measured=measured)
    gaps = lost.differences()
    assert gaps["b"].holds and not gaps["d"].whole and not gaps["d"].holds  # the run of its control is missing
    assert lost.sentences()[-1] == (
        "Runs are missing, so that nothing can hold for what they are compared with: c has 2 of 3 seeds."
    )
    assert {line[0]: line[1] for line in lost.table()[1]}["c"] == "59.5 ± 0.7 (2 of 3 seeds)"


def test_a_bar_in_a_name_does_not_end_a_cell():
    found = with_accuracies(**{"a": [0.5, 0.6], "b|c": [0.5, 0.6]})
    assert "| b\\|c | 55.0 ± 7.1 |" in found.markdown() and found.table()[1][1][0] == "b|c"


def test_sentences_say_no_more_than_their_intervals():
    better = with_accuracies(a=[0.5] * 3, b=[0.51, 0.52, 0.53], c=[0.59, 0.60, 0.61], d=[0.38, 0.39, 0.40])
    first, second, third, *rest = better.sentences()
    assert first == "More accurate than the control, also after correction: c +10.0 points [+7.5, +12.5]."
    assert second == "Less accurate than the control, also after correction: d -11.0 points [-13.5, -8.5]."
    assert third.startswith("Better, worse or as good as the control is open for b: ") and not rest
    none = replace(with_accuracies(a=[0.5] * 3, b=[0.51, 0.52, 0.53], c=[0.5, 0.4, 0.6]), datasets=("cifar10",))
    assert none.sentences()[0] == (
        "On cifar10, no network is shown to be more accurate than its control; the largest mean difference is that of "
        "b, +2.0 points [-0.5, +4.5]."
    )
    assert with_accuracies(a=[0.5], b=[0.9]).sentences() == [
        "There is one seed: no difference to a control can be tested."
    ]
    assert with_accuracies(a=[0.5, 0.6]).sentences() == []
    large = replace(with_accuracies(a=[0.5, 0.5], b=[0.6, 0.62]), as_large_as={"a": "b"})
    assert large.sentences()[-1] == (
        "With as many parameters (a 1,234, b 1,234), b minus a is +11.0 points [-1.7, +23.7], not corrected."
    )
    assert large.table()[1][0][-2] == "1,234 (as b)"


def test_sentences_on_maps_compare_with_the_center_of_the_same_network():
    def run(row: str, seed: int, energy: float, deletion: float) -> Measured:
        own = Quality(energy_in_mask=energy, sparsity=2.0, deletion_auc=deletion)
        center = Quality(energy_in_mask=0.1, sparsity=3.0, deletion_auc=0.3)
        quality = {"own": own, "activation_map": own, "center_map": center}
        return replace(measured(row, seed, 0.5), quality=quality)

    seeds = (-0.001, 0.0, 0.001)
    found = Bench(
        control="a",
        rows=("a", "b"),
        measured=(
            *(run("a", i, 0.05 + gap, 0.3 + 9 * gap) for i, gap in enumerate(seeds)),
            *(run("b", i, 0.2 + gap, 0.2 + gap) for i, gap in enumerate(seeds)),
        ),
        failed={},
    )
    assert found.sentences()[-2:] == [
        "After correction, the own map lies more on the mask than a blob in the center for b; the blob is ahead for a.",
        "After correction, the own map beats a blob in the center in deletion for b; the blob is ahead for none; the "
        "rest is open.",
    ]
    columns, lines = found.map_table()
    assert columns[1] == "in mask, own map" and columns[-1] == "deletion, center control"
    assert lines[1][1] == "0.200 ± 0.001" and lines[0][-1] == "0.300 ± 0.000"


def test_a_study_of_several_data_sets(tmp_path: Path):
    (tmp_path / "study.yaml").write_text(
        recipe.dump(SMALL)
        + "datasets: {plain: {}, few/none: {data.train_size: 48}}\n"
        + "rows: {control: {}, <b>ECA</b>: {model.options.attention: eca}}\n"
    )
    study = bench.load_study(tmp_path / "study.yaml")
    out = tmp_path / "out"
    part = bench.bench(study, out, datasets=["few/none"])
    assert {run.dataset for run in part.measured} == {"few/none"} and list(part.costs) == ["few/none"]
    assert sorted(file.name for file in out.iterdir()) == ["few_none"]
    assert runs.open_run(out / "few_none" / "control" / "seed-1").recipe.data.train_size == 48
    file = out / "few_none" / "control" / "seed-0" / "measured.json"
    old = json.loads(file.read_text())
    new = {name: old.pop(name) for name in ("quality", "dataset")}
    file.write_text(json.dumps(old | {"accuracy": 2.0}))
    stamp = (file.parent / "model.safetensors").stat().st_mtime_ns
    found = bench.bench(study, out)
    assert not found.failed and (file.parent / "model.safetensors").stat().st_mtime_ns == stamp
    assert json.loads(file.read_text()) == old | new  # measured again, from the same weights
    with pytest.raises(ValueError, match=r"expected one data set, got plain, few/none; take on\(NAME\) first"):
        found.table()
    own = found.on("few/none")
    assert [run.seed for run in own.measured] == [0, 1, 0, 1] and own.costs == found.costs
    assert found.costs["few/none"] == part.costs["few/none"]  # timed once
    cost = found.costs["plain"]["control"]
    assert cost.parameters == own.measured[0].parameters and cost.macs > 10_000 and 0 < cost.seconds < 1
    quality = own.measured[0].quality
    assert list(quality) == ["own", "activation_map", "center_map"] and quality["own"] == quality["activation_map"]
    assert all(0 < of.energy_in_mask < 1 <= of.sparsity and 0 < of.deletion_auc < 1 for of in quality.values())
    facts = json.loads((out / "bench.json").read_text())
    assert facts["differences"]["plain"]["<b>ECA</b>"]["other"] == "control"
    page = (out / "bench.html").read_text()
    assert "<b>ECA" not in page and "&lt;b&gt;ECA" in page and "few/none" in page
    assert not re.search(r"https?://|@import|url\(", page) and page.count('<svg class="chart"') == 4
    assert page.count('<div class="strip"') == 2 and page.index('<div class="strip"') < page.index("<table")
    examples = kept(out / "few_none" / "control" / "seed-0")
    assert len(examples) == 4 and all(set(e.maps) == {"activation_map", "center_map"} for e in examples)
    assert all(e.image.dtype == np.uint8 and 0 < e.probability <= 1 and e.label in "0123456789" for e in examples)
    assert kept(tmp_path / "nowhere") == []
    np.savez(tmp_path / "maps.npz", cam=np.zeros((4, 4)))  # maps of an image called "maps", written by `explain`
    assert kept(tmp_path) == []
    for content in (b"", b"junk"):
        (tmp_path / "maps.npz").write_bytes(content)
        assert kept(tmp_path) == []
    assert "## few/none" in (out / "bench.md").read_text()
    with pytest.raises(ValueError, match="expected data sets out of: plain; few/none; got 'many'"):
        bench.bench(study, out, datasets=["many"])


def test_a_row_as_large_as_another(tmp_path: Path):
    rows = {
        "control": {},
        "SE": {"model.options.attention": "se", "model.options.attention_options": {"reduction": 1}},
        "wide": {"as_large_as": "SE", "control": "SE"},
    }
    study = Study(recipe=SMALL, rows=rows)
    options = {row: study.of(row, 1, tmp_path).model.options for row in rows}

    def size(row: str, **changed: float) -> int:
        model = create_model("cifar_resnet", num_classes=10, **options[row] | changed)
        return sum(p.numel() for p in model.parameters())

    steps = [step / 1024 for step in range(256, 512)]
    wanted = size("SE")
    best = min(abs(size("control", width=width) - wanted) for width in steps)
    assert abs(size("wide") - wanted) == best and size("control") < size("wide")
    assert study.named("control") == {"wide": "SE"} and study.named("as_large_as") == {"wide": "SE"}
    narrow = bench.width_for(Model(name="cifar_resnet", options={"depth": 8}), 10, 100)  # too few: the narrowest
    assert narrow == 1 / 16
    named = Study(recipe=SMALL, rows={"a": {}, "b": {"as_large_as": "a", "model.name": "torchvision:resnet18"}})
    with pytest.raises(ValueError, match="row 'b', as large as 'a': torchvision cannot build"):
        bench.bench(replace(named, recipe=replace(SMALL, model=Model(name="vgg15"))), tmp_path / "no")


def test_jobs_are_spread_over_the_gpus():
    assert bench.devices_for(5, 2, None) == ["0", "1", "0", "1", "0"]
    assert bench.devices_for(2, 4, "3, 1,0,2") == ["3", "1"]
    assert bench.devices_for(2, 0, None) == bench.devices_for(2, 0, "-1") == [None, None]
    context = get_context("spawn")
    devices = context.SimpleQueue()
    devices.put("GPU-7")
    with ProcessPoolExecutor(1, context, _prepare, (1, devices)) as pool:
        assert pool.submit(os.getenv, "CUDA_VISIBLE_DEVICES").result() == "GPU-7"


def test_published_figures_are_those_of_their_sources():
    paper, log = "paper, error %", "authors' log, error %"
    assert PUBLISHED["ltpa-cifar100"].figures[paper]["VGG"] == 30.62
    assert "VGG" not in PUBLISHED["ltpa-cifar100"].recalled
    of_ltpa = {name: of for name, of in PUBLISHED.items() if name.startswith("ltpa-c")}
    assert {*PUBLISHED["ltpa-svhn"].figures[paper].values()} == {"?"}  # no source of them was read
    logs = {name: list(of.figures[log].values()) for name, of in of_ltpa.items()}
    assert logs == {
        "ltpa-cifar10": [7.7, 5.61, 5.42, 6.45],
        "ltpa-cifar100": [30.71, 23.55, 23.17, 22.98],
        "ltpa-cub": [34.81, 26.87, 26.79],
    }
    for of in of_ltpa.values():
        assert of.figures[log].keys() == of.study.rows.keys() - {of.study.control}
        assert of.figures[paper].keys() <= of.figures[log].keys()
        assert of.study.control == "vgg15, the same trunk"
    training = PUBLISHED["ltpa-cub"].study.of("(VGG-att2)-concat-pc", 1, Path("out"))
    assert training.optim == replace(
        PUBLISHED["ltpa-cifar10"].study.recipe.optim, epochs=320, lr=0.04, warmup=5.0, step_epochs=30
    )
    assert (training.data, training.seeds) == (Data(source="cub200", size=80, val=0.02), (1,))
    with pytest.raises(ValueError, match=r"expected one of ltpa-cifar10, ltpa-cifar100, .*; got 'ltpa'"):
        published("ltpa")


def test_reproduce(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    cli.main(["reproduce", "ltpa-cifar100"])
    printed = capsys.readouterr().out
    assert "│ VGG                   │          30.62 │                 30.71 │" in printed and "ours," not in printed
    assert "mixes attention with resolution and" in printed and "(VGG-att)-pc          │        23.70 *" in printed
    assert "to train ours: sightline reproduce ltpa-cifar100 --out runs/ltpa-cifar100" in printed
    small = (
        "--data.train_size 64 --data.test_size 20 --optim.epochs 1 --optim.batch_size 32 --model.options.width 0.0625"
    )
    rows = ["--row", "vgg15, the same trunk", "--row", "(VGG-att)-pc"]
    with pytest.raises(SystemExit) as stop:
        cli.main(["reproduce", "ltpa-cifar100", "--out", str(tmp_path / "other"), "--data", "clutter"])
    assert stop.value.code == 2 and not (tmp_path / "other").exists()
    assert "expected images of 100 classes as in ltpa-cifar100, got 10 in clutter" in capsys.readouterr().err
    asked = ["reproduce", "ltpa-cifar10", "--out", str(tmp_path), "--data", "clutter", "--seeds", "0", *rows]
    cli.main([*asked, *small.split()])
    printed = " ".join(capsys.readouterr().out.split())
    assert "ours, error %" in printed and "optim.epochs 1 instead of 300" in printed
    assert "seeds (0,) instead of (0, 1, 2)" in printed and "data.source" not in printed
    error = 100 * (1 - json.loads((tmp_path / "_VGG-att_-pc" / "seed-0" / "measured.json").read_text())["accuracy"])
    assert f"5.61 │ {error:.2f} │" in printed


def test_slides_figures_are_those_of_the_document():
    """Tables 1, 5 and 6 of the slides on BR-NPA, as they are printed."""
    of_1 = {name: PUBLISHED[f"brnpa-{name}"].figures["slides, accuracy %"] for name in ("cub", "aircraft", "cars")}
    printed = {
        "2-level attention": "77.9 - -", "MG-CNN": "81.7 - -", "FCAN": "82.0 - -", "ST-CNN": "84.1 - -",
        "ProtoPNet": "84.8 - -", "B-CNN": "84.1 84.2 91.3", "MA-CNN": "85.4 88.4 91.7",
        "B-CNN (ours)": "84.6 88.9 89.7", "BR-NPA": "85.5 89.6 91.7",
    }  # fmt: skip
    assert {row: " ".join(str(t.get(row, "-")) for t in of_1.values()) for row in of_1["cub"]} == printed
    vectors = PUBLISHED["brnpa-vectors"].figures["slides, accuracy %"]
    assert [*vectors.values()] == [79.5, 79.1, 77.9, 77.3, 73.2, 56.8]
    people = PUBLISHED["brnpa-market"].figures["slides, accuracy %"]
    assert people == {"DG-Net": 94.8, "B-CNN 16x8": 78.4, "BR-NPA 16x8": 93.6, "BR-NPA 64x32": 88.2}
    few = PUBLISHED["brnpa-cifar-fs"].figures["slides, accuracy %"]
    assert [*few.values()] == ["61.7 ± 0.9", "58.1 ± 1.1", "69.9 ± 0.9", "65.7 ± 0.7"]
    accuracy, sparsity = PUBLISHED["brnpa-resolution"].figures.values()
    assert [*accuracy.values()] == [82.9, 84.6, 85.2, 85.5] and [*sparsity.values()] == ["11.2", "19.6", "7.46", "21.3"]


def test_every_experiment_is_listed_and_printed(capsys: pytest.CaptureFixture[str]):
    cli.main(["reproduce"])
    listed = capsys.readouterr().out
    for name, of in PUBLISHED.items():
        assert f"{of.title}; needs {of.needs}" in listed
        cli.main(["reproduce", name])
        printed = capsys.readouterr().out
        assert f"needs {of.needs}: --data FOLDER" in printed and "ours," not in printed
        assert (", or it is downloaded" in printed) == (name != "brnpa-market")  # not on the hub
    with pytest.raises(SystemExit):
        cli.main(["reproduce", "--out", "runs/x"])
    assert "expected an experiment with these options" in capsys.readouterr().err


SMALL_NETWORK = (
    "--data.train_size 64 --data.test_size 20 --optim.epochs 1 --model.name cifar_resnet --data.size 32 --seeds 0 "
    "--model.weights null --optim.precision 32-true --optim.batch_size 16 --augment.crop 0"
).split()


def test_slides_tables_and_figures_are_trained_and_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    for name in ("brnpa-vectors", "brnpa-figure-4"):
        of = PUBLISHED[name]
        monkeypatch.setitem(PUBLISHED, name, replace(of, classes=None))
    small = [*SMALL_NETWORK, "--model.options.depth", "8", "--model.options.width", "0.25", "--data", "clutter"]
    cli.main(["reproduce", "brnpa-vectors", "--out", str(tmp_path / "a"), *small])
    printed = " ".join(capsys.readouterr().out.split())
    run = runs.open_run(tmp_path / "a" / "BR-NPA_56x56" / "seed-0")
    figures = tasks.perform("vectors", run).figures
    assert [*figures] == ["{1,2,3}", "{1,2}", "{1,3}", "{2,3}", "{1}", "{2}", "{3}"]
    for row, of_slides in PUBLISHED["brnpa-vectors"].figures["slides, accuracy %"].items():
        assert f"│ {row} │ {of_slides} │ {100 * figures[row].interval.value:.2f} │" in printed
    cli.main(["reproduce", "brnpa-figure-4", "--out", str(tmp_path / "b"), *small])
    assert "4 images x 2 methods" in capsys.readouterr().out
    assert len([*(tmp_path / "b" / "maps").glob("*--page.png")]) == 4


def test_failures_are_told_and_nothing_is_drawn_of_a_failed_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def stops(*args: object, **options: object) -> None:
        raise RuntimeError("the loss became infinite")

    monkeypatch.setattr("sightline.bench.run.fit", stops)
    of = PUBLISHED["brnpa-figure-4"]
    monkeypatch.setitem(PUBLISHED, "brnpa-figure-4", replace(of, classes=None))
    small = [*SMALL_NETWORK, "--model.options.depth", "8", "--model.options.width", "0.25", "--data", "clutter"]
    with pytest.raises(SystemExit) as stop:
        cli.main(["reproduce", "brnpa-figure-4", "--out", str(tmp_path), *small])
    said = capsys.readouterr().err
    assert stop.value.code == 1 and not (tmp_path / "maps").exists()
    for row in of.draws:
        assert f"failed: {row}, seed 0: the loss became infinite" in said


def test_a_run_without_memory_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*args: object, **options: object) -> None:
        raise MemoryError("out of memory in a step")

    monkeypatch.setattr("sightline.bench.run.fit", full)
    study = Study(recipe=Recipe(seeds=(0,)), rows={"control": {}, "other": {}})
    failed = bench.bench(study, tmp_path / "out").failed
    assert failed == dict.fromkeys(["control, seed 0", "other, seed 0"], "out of memory in a step")


@pytest.mark.filterwarnings("ignore:maps of layers show the window:sightline.facts.Notice")
def test_every_network_of_the_studies_can_be_built(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sightline.bench.study._classes", lambda data: 10)  # some of the data is on the hub
    monkeypatch.setattr("sightline.attention.places.SIDES", (64,))
    models = [of.study.of(row, 0, Path("out")).model for of in PUBLISHED.values() for row in of.study.rows]
    files = sorted((Path(__file__).parent.parent / "recipes").glob("bench_*.yaml"))
    assert len(files) >= 3
    for file in files:
        study = bench.load_study(file)
        for row in study.rows:
            models.append(study.of(row, 0, Path("out"), next(iter(study.datasets))).model)
            resolutions = {
                study.changed(name, next(iter(study.datasets))).model.options.get("high_resolution", 0)
                for name in (row, study.named("control").get(row, study.control))
            }
            assert len(resolutions) == 1 or row.startswith("GAP"), row  # only these are there to show what it adds
    narrow = {"resnet50": {"channels": (8, 16, 32, 64)}, "mtl_resnet": {"width": 1 / 8}}
    networks = [
        (one.name, one.options | narrow.get(one.name, {"width": 1 / 8} if "vgg" in one.name else {})) for one in models
    ]
    for name, options in {str(network): network for network in networks}.values():
        create_model(name, num_classes=10, **options)


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


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        (
            "data.source",
            "photos",
            "its data set 'birds' sets itself; change it in the file, or choose by --dataset",
        ),
        ("model.options.attention", "se", "its row 'BR-NPA 14x14' sets itself; .* by --row"),
    ],
)
def test_an_override_that_the_study_would_cover_up_is_refused(field, value, named):
    with pytest.raises(
        ValueError, match=f"--{field}: expected a field that the study does not set, got one that {named}"
    ):
        bench.load_study("recipes/bench_fine_grained.yaml", {field: value})
    assert bench.load_study("recipes/bench_fine_grained.yaml", {"data.size": 64}).recipe.data.size == 64


def test_only_the_chosen_rows_and_data_sets_can_cover_up_an_override():
    changed = {"data.train_size": 50}  # which cifar10 sets for itself, clutter does not
    study = bench.load_study("recipes/bench_attention.yaml", changed, datasets_done=["clutter"])
    row = next(iter(study.rows))
    assert study.changed(row, "clutter").data.train_size == 50
    with pytest.raises(ValueError, match=r"--data.train_size: .* its data set 'cifar10' sets itself"):
        bench.load_study("recipes/bench_attention.yaml", changed, datasets_done=["clutter", "cifar10"])
