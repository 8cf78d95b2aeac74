"""Tasks: a figure by hand, the verb, and a study that measures one beside accuracy."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from sightline import bench, cli, data, recipe, runs, tasks
from sightline.bench.measured import read
from sightline.recipe import Data, Model, Optim, Recipe
from sightline.tasks import TASKS, Figure, Outcome
from sightline.training import fit

pytestmark = pytest.mark.usefixtures("few_validation_images")

SMALL = Recipe(
    data=Data(train_size=64, test_size=20),
    model=Model(name="cifar_resnet", options={"depth": 8, "width": 0.25, "stem_stride": 2}),
    optim=Optim(epochs=1, lr=0.01),
)


def top_k(run: runs.Run, model: torch.nn.Module, *, k: int = 2, from_last: bool = False) -> Outcome:
    """Whether the class is among the k most probable."""
    images = replace(data.load(run.recipe.data)["test"], preprocess=run.preprocess)
    (batch,) = data.batches(images, 20)
    with torch.no_grad():
        logits = model(data.normalize(batch.images, run.preprocess))
    order = logits.argsort(1, descending=not from_last)[:, :k]
    hits = (order == batch.labels[:, None]).any(1).double().numpy()
    figures = {f"top-{k}": Figure(values=hits, unit="images", chance=k / logits.shape[1])}
    return Outcome(task="top_k", figures=figures, names={"images": batch.names}, notices=("A toy.",))


@pytest.fixture
def task(monkeypatch):
    monkeypatch.setitem(TASKS, "top_k", top_k)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    trained = fit(SMALL, tmp_path_factory.mktemp("tasks") / "run", progress=False)
    assert isinstance(trained, runs.Run)
    return trained


def test_a_figure_draws_groups_together():
    values = np.array([*np.repeat([0.0, 1.0], 20), math.nan])
    alone = Figure(values=values, unit="queries").interval
    together = Figure(values=values, unit="queries", groups=np.arange(41) // 5).interval
    assert (alone.value, alone.n) == (0.5, 40) and (together.value, together.n) == (0.5, 8)
    assert together.high - together.low > alone.high - alone.low


def test_groups_are_not_called_units(tmp_path):
    grouped = Figure(
        values=np.array([0.0, 1.0, 1.0, math.nan]), unit="queries", groups=np.array([0, 0, 1, 1]), of="ids"
    )
    outcome = Outcome(task="toy", figures={"hit": grouped, "alone": replace(grouped, groups=None)}, names={})
    assert [line[-1] for line in outcome.table()[1]] == ["3 queries of 2 ids", "3 queries"]
    outcome.to_json(tmp_path / "toy.json")
    hit, alone = json.loads((tmp_path / "toy.json").read_text())["figures"].values()
    assert (hit["n"], hit["unit"], hit["groups"], hit["of"], hit["undefined"]) == (3, "queries", 2, "ids", 1)
    assert (alone["n"], alone["unit"], alone["groups"], alone["of"]) == (3, "queries", None, None)


@pytest.mark.usefixtures("task")
def test_the_verb_prints_and_writes_the_figures(run, tmp_path, capsys):
    cli.main(["task", "top_k", str(run.folder), "--task.k", "10", "--out", str(tmp_path)])
    said = capsys.readouterr().out
    kept = json.loads((tmp_path / "task-top_k.json").read_text())
    assert kept["figures"]["top-10"]["value"] == 1.0 and kept["figures"]["top-10"]["chance"] == 1.0
    assert kept["values"]["top-10"] == [1.0] * 20 and len(kept["names"]["images"]) == 20
    assert "top-10" in said and "A toy." in said and "20 images" in said
    cli.main(["list", "tasks"])
    said = capsys.readouterr().out
    assert "Whether the class is among the k most probable." in said
    assert "options: --task.from_last, --task.k" in said


@pytest.mark.usefixtures("task")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["top_K"], "no task 'top_K'; did you mean 'top_k'?"),
        (["top_k", "--task.kk", "3"], "expected options of task top_k out of: from_last, k, got 'kk'"),
        (["top_k", "--task.k", "three"], "task.k: expected a whole number, got 'three'"),
        (["top_k", "--data.size", "3"], "--data.size: expected only task fields with task"),
    ],
)
def test_bad_tasks_are_one_line(arguments, message, run, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["task", arguments[0], str(run.folder), *arguments[1:]])
    said = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and message in said and len(said.splitlines()) == 1


def test_a_task_that_does_not_suit_a_row_keeps_the_row(tmp_path, monkeypatch):
    def no_plain(run: runs.Run, model: torch.nn.Module) -> Outcome:
        if "attention" not in run.recipe.model.options:
            raise ValueError("expected a network with attention, got cifar_resnet;\n take another")
        return top_k(run, model)

    monkeypatch.setitem(TASKS, "no_plain", no_plain)
    file = tmp_path / "study.yaml"
    rows = {"plain": {}, "SE": {"model.options.attention": "se"}}
    start = recipe.dump(SMALL)
    file.write_text(start + f"rows: {json.dumps(rows)}\ntasks: [no_plain]\n")
    result = bench.bench(bench.load_study(file), tmp_path / "out")
    assert not result.failed and [run.row for run in result.measured] == ["plain", "SE"]
    reason = "expected a network with attention, got cifar_resnet; take another"
    assert f"There are no figures of no_plain for plain: {reason}." in result.sentences()
    columns, lines = result.table()
    assert [line[columns.index("no_plain, top-2")] == "-" for line in lines] == [True, False]
    assert all(line[columns.index("accuracy, %")] != "-" for line in lines)
    kept = read(tmp_path / "out" / "plain" / "seed-0" / "measured.json")
    assert kept.no_tasks == {"no_plain": reason} and not kept.tasks

    def stops(run: runs.Run, model: torch.nn.Module) -> Outcome:
        raise OSError("no images")

    monkeypatch.setitem(TASKS, "no_plain", stops)
    plain = tmp_path / "out" / "plain" / "seed-0" / "measured.json"
    plain.unlink()
    assert bench.bench(bench.load_study(file), tmp_path / "out").failed == {"plain, seed 0": "no images"}
    assert read(plain).accuracy == kept.accuracy  # measured before the task stopped


@pytest.mark.usefixtures("task")
def test_a_study_measures_tasks_beside_accuracy(tmp_path, monkeypatch):
    file = tmp_path / "study.yaml"
    rows = {"plain": {}, "SE": {"model.options.attention": "se"}}
    start = recipe.dump(replace(SMALL, seeds=(0, 1)))
    file.write_text(start + f"rows: {json.dumps(rows)}\ntasks: {{top three: {{task: top_k, k: 3}}}}\n")
    result = bench.bench(bench.load_study(file), tmp_path / "out")
    for one in result.measured:
        network = runs.open_run(tmp_path / "out" / one.row / f"seed-{one.seed}")
        expected = tasks.perform("top_k", network, k=3).figures["top-3"].interval.value
        assert one.tasks["top three"].figures == {"top-3": expected}
        assert read(network.folder / "measured.json").tasks == one.tasks
    columns, lines = result.table()
    values = [one.tasks["top three"].figures["top-3"] for one in result.measured]
    assert float(lines[1][columns.index("top three, top-3")].split()[0]) == pytest.approx(np.mean(values[2:]), abs=6e-4)
    gap = 100 * np.mean(np.subtract(values[2:], values[:2]))
    assert lines[1][columns.index("top three, top-3 to control")].startswith(f"{gap:+.1f}")
    assert any("top-3 (top three)" in sentence for sentence in result.sentences())

    file.write_text(file.read_text().replace("k: 3", "k: 4"))
    again = bench.bench(bench.load_study(file), tmp_path / "out")  # measures the other task, trains nothing
    assert [*again.measured[0].tasks["top three"].figures] == ["top-4"]
    file.write_text(file.read_text().replace("k: 4", "kk: 4"))
    with pytest.raises(ValueError, match="task 'top three': expected options of task top_k out of: from_last, k"):
        bench.load_study(file)


def test_the_better_row_of_a_figure_that_should_be_low():
    def measured(row, seed, value):
        figures = bench.TaskFigures(asked={}, figures={"fooled": value}, higher_is_better={"fooled": False})
        nothing = bench.Maps(energy={}, sparsity={}, activation_energy=math.nan, similarity=math.nan)
        return bench.MeasuredRun(
            row=row, seed=seed, accuracy=math.nan, majority=0.1, area=math.nan, parameters=1, seconds=1.0,
            before=nothing, after=nothing, tasks={"attack": figures},
        )  # fmt: skip

    found = bench.Bench(
        control="a",
        rows=("a", "b"),
        measured=tuple(
            measured(row, seed, value + 0.001 * seed * (row == "b"))
            for row, value in (("a", 0.5), ("b", 0.3))
            for seed in range(3)
        ),
        failed={},
        seeds=(0, 1, 2),
    )
    assert found.sentences() == [
        "A lower fooled (attack) than the control, also after correction: b -19.9 points [-20.1, -19.7]."
    ]
    assert "accuracy, %" not in found.table()[0]
