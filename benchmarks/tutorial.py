"""The tutorial, docs/tutorial/look.ipynb, at full size: time of each cell, and whether the text says what it prints.

The notebook is made of look.md and run in an empty folder. Its outputs are written into look.ipynb. With `--seed N` the
networks are trained with other seeds, and the notebook stays as it is. Needs nbclient and ipykernel.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import jupytext
import psutil
from measure import save
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell

PAGE = Path(__file__).parent.parent / "docs" / "tutorial" / "look.md"
FIGURES = """
import json

def facts(interval):
    return {"value": interval.value, "low": interval.low, "high": interval.high}

print(json.dumps({
    "gains": {f"{network} - {control}": facts(gain) for (network, control), gain in gains.items()},
    "accuracy": {f"{network}, seed {seed}": value.double().mean().item() for (network, seed), value in right.items()},
    "scores": {f"{score.metric}, {score.method}": facts(score.interval) for score in evaluation.scores},
    "chance": evaluation.chance,
    "failed": evaluation.failed,
    "energy": {f"{name}, seed {seed}": facts(value) for (name, seed), value in energy.items()},
}))
"""


def run(notebook: Any) -> list[dict[str, Any]]:
    """Execute all code cells in place; CPU and wall seconds of each."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(notebook, timeout=None, record_timing=False, resources={"metadata": {"path": folder}})
        with client.setup_kernel():
            kernel = psutil.Process(client.km.provisioner.pid)
            for index, cell in enumerate(notebook.cells):
                if cell.cell_type != "code":
                    continue
                used, start = kernel.cpu_times(), time.perf_counter()
                client.execute_cell(cell, index)
                now = kernel.cpu_times()
                cpu = now.user + now.system - used.user - used.system
                rows.append({"what": what(cell), "cpu": cpu, "seconds": time.perf_counter() - start})
                print(f"{rows[-1]['what']:70.70} {cpu:6.1f} s CPU  {rows[-1]['seconds']:6.1f} s", flush=True)
    return rows


def what(cell: Any) -> str:
    return cell.source.strip().splitlines()[-1].strip()


def printed(cell: Any) -> str:
    return "".join(output.text for output in cell.outputs if output.get("name") == "stdout")


def is_shown(output: Any) -> bool:
    """Whether the notebook keeps it: text, pictures and tables, not the bars of the trainings."""
    return output.get("name") == "stdout" or "text/html" in output.get("data", {})


def check(figures: dict[str, Any]) -> None:
    """The statements of the text, as bounds that other seeds keep too."""
    gains, scores = figures["gains"], figures["scores"]
    assert gains["uniform - trunk"]["low"] > 0.4 and gains["attention - trunk"]["low"] > 0.4
    assert abs(gains["attention - uniform"]["value"]) < 0.2 * gains["uniform - trunk"]["value"]
    in_mask = {name: score for name, score in scores.items() if name.startswith("energy_in_mask")}
    conv10 = in_mask.pop("energy_in_mask, attention@attention.conv10")
    assert conv10["low"] > 3 * figures["chance"]["energy_in_mask"]
    assert all(conv10["low"] > other["high"] for other in in_mask.values())
    assert in_mask["energy_in_mask, grad_cam"]["value"] < in_mask["energy_in_mask, center_map"]["value"]
    insertion = {name: score["value"] for name, score in scores.items() if name.startswith("insertion_auc")}
    assert max(insertion, key=lambda name: insertion[name]) == "insertion_auc, contrast_map"
    shares = [share["value"] for name, share in figures["energy"].items() if name.startswith("attention.conv10")]
    assert min(shares) > 2.5 * figures["chance"]["energy_in_mask"] and max(shares) < 0.6
    assert scores["parameter_randomization, attention@attention.conv10"]["high"] < 0.5
    assert not any(figures["failed"].values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, help="train with this seed and the next one instead, and write nothing")
    arguments = parser.parse_args()
    notebook = jupytext.read(PAGE)
    shown = list(notebook.cells)
    if arguments.seed is not None:
        for cell in shown:
            cell.source = cell.source.replace("SEEDS = (0, 1)", f"SEEDS = ({arguments.seed}, {arguments.seed + 1})")
    last = new_code_cell(FIGURES)
    notebook.cells.append(last)
    rows = run(notebook)
    figures = json.loads(printed(last))
    for cell in shown:
        if cell.cell_type == "code":
            print(printed(cell))
    print(f"{sum(row['cpu'] for row in rows):.0f} s CPU, {sum(row['seconds'] for row in rows):.0f} s")
    print(json.dumps(figures, indent=1))
    if arguments.seed is None:
        notebook.cells = shown
        for cell in shown:
            if cell.cell_type == "code":
                cell.outputs = [output for output in cell.outputs if is_shown(output)]
        jupytext.write(notebook, PAGE.with_suffix(".ipynb"))
        print(save("tutorial", [*rows[:-1], {"figures": figures}]))
    check(figures)


if __name__ == "__main__":
    main()
