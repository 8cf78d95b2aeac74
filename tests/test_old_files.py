"""Files that older versions wrote keep working: those of tests/old_files were written by version 0.1.0.

They are never renewed. Logits of a run for `images` of several sizes are beside it, as that version computed them.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch

import sightline as sl
from sightline import cli, hub, runs
from sightline.facts import current_name

OLD = Path(__file__).parent / "old_files"
RUNS = sorted(file.parent for file in OLD.glob("*/model.safetensors"))


def images(height: int, width: int) -> torch.Tensor:
    """Two images by a formula, without a generator."""
    positions = torch.arange(2 * 3 * height * width, dtype=torch.float64).reshape(2, 3, height, width)
    return torch.sin(positions * 0.7) + torch.cos(positions * positions * 0.003)


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_a_run_loads_with_the_same_logits(run):
    model = sl.load(run).double()  # a prototype's similarity magnifies roundings
    for size, logits in json.loads((run / "logits.json").read_text()).items():
        with torch.no_grad():
            found = model(images(*map(int, size.split(" x "))))
        assert torch.allclose(found, torch.tensor(logits, dtype=torch.float64), rtol=1e-5, atol=1e-5), size


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_a_run_opens_with_its_evaluation_and_its_card(run):
    opened = runs.open_run(run)
    assert len(opened.classes) == 10 and opened.history and opened.recipe.model.name == run.name
    evaluation = hub._evaluation(run)
    assert evaluation is not None
    card = hub.card(opened, f"someone/{run.name}", evaluation)
    assert "split test: 95 % interval over" in card and all(f"- {one}" in card for one in evaluation["summary"])


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_a_run_is_evaluated_with_a_report(run, tmp_path):
    chosen = ["--methods", "attention", "--metrics", "deletion_auc", "--controls", "random_map"]
    cli.main(["evaluate", str(run), *chosen, "--limit", "2", "--steps", "2", "--out", str(tmp_path)])
    before, after = (json.loads((folder / "evaluation.json").read_text()) for folder in (run, tmp_path))
    assert after.keys() == before.keys() and after["accuracy"]["value"] == before["accuracy"]["value"]
    assert run.name in (tmp_path / "report.html").read_text()


def test_a_study_is_read_and_not_trained_again(tmp_path):
    shutil.copytree(OLD / "bench", tmp_path / "bench")
    stamps = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("seed-0/*")}
    cli.main(["bench", str(OLD / "study.yaml"), "--out", str(tmp_path / "bench")])
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("seed-0/*")} == stamps and len(stamps) >= 8
    before, after = (json.loads((folder / "bench.json").read_text()) for folder in (OLD / "bench", tmp_path / "bench"))
    for measured in before["measured"]:
        measured["quality"] = {current_name(name): values for name, values in measured["quality"].items()}
        measured |= {"tasks": {}, "no_tasks": {}}
    assert after["measured"] == before["measured"] and not after["failed"]
    assert (tmp_path / "bench" / "bench.html").is_file()
