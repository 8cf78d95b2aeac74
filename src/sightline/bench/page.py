"""The files of a finished study: bench.json, bench.md and bench.html."""

import json
from pathlib import Path

import yaml

from sightline import recipe, report, runs
from sightline.bench.measured import kept
from sightline.bench.result import CHEAP, Bench
from sightline.bench.study import Study, folder
from sightline.report.studies import Effect, Part, Table

_CELLS = (
    "Mean ± standard deviation over seeds. To control: mean difference in percentage points, paired by seed [Student’s "
    "95 % interval over seeds], and its p after Holm’s correction for all rows of the table that are not there as "
    "controls of others; “holds” where that is below 0.05 and no run is missing. Maps of several blocks are divided by "
    "a slash, in the order of the network."
)
_MAP_CELLS = (
    "Maps after training, on up to 200 test images: the network’s own map (the attention of its last block with a "
    "spatial map, or its activation map if it has none), its activation map, and a blob in the center that never looks "
    "at the image. In mask: share of the map in the mask, higher is better. Deletion: area under the probability of "
    "the predicted class while pixels are removed, lower is better, to be read against the center control of the same "
    "network. Networks are not ranked by sparsity."
)


def write_bench(result: Bench, study: Study, out: Path) -> None:
    """Write what a study measured."""
    differences = {dataset: result.on(dataset).differences() for dataset in result.datasets}
    facts = runs.plain(result) | {"differences": runs.plain(differences)}
    runs.write(out / "bench.json", json.dumps(facts, indent=1).encode())
    runs.write(out / "bench.md", result.markdown().encode())
    plan = recipe.dump(study.recipe) + yaml.safe_dump(
        {"datasets": study.datasets, "rows": study.plain()}, sort_keys=False
    )
    parts = [_part(result.on(dataset), study, out) for dataset in result.datasets]
    report.write_study(parts, out, result.failed, plan)


def _part(result: Bench, study: Study, out: Path) -> Part:
    dataset = result.datasets[0]
    first = {run.row: run.seed for run in reversed(result.measured)}
    pictured = {row: kept(folder(out, row, first[row], dataset)) for row in result.rows if row in first}
    costs = result.costs.get(dataset, {})
    tables = {_CELLS: result.cells(), _MAP_CELLS: result.map_cells()}
    return Part(
        name=dataset,
        answers=result.answers(),
        sentences=result.sentences(),
        pictured={row: examples for row, examples in pictured.items() if examples},
        tables=[
            Table(caption=caption, columns={name: name not in CHEAP for name in lines[0]}, lines=lines)
            for caption, lines in tables.items()
            if lines
        ],
        effects=[
            Effect(
                name=row,
                values=[100 * gap for gap in difference.by_seed.values()],
                mean=100 * difference.mean,
                low=100 * difference.low,
                high=100 * difference.high,
                holds=difference.holds,
            )
            for row, difference in result.differences().items()
        ],
        cost={row: cost.macs / 1e6 for row, cost in costs.items()},
        accuracy={row: result.over_seeds(row, lambda run: 100 * run.accuracy).mean for row in first},
        controls={result.control, *result.controls.values()},
    )
