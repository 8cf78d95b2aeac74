"""Networks side by side: changes to one recipe x seeds x data sets, trained and measured alike, with controls."""

from sightline.bench.measured import Maps, MeasuredRun, Quality, TaskFigures, fresh, measure_run, measure_tasks
from sightline.bench.result import Bench, Difference, Summary, student_interval, summary
from sightline.bench.run import bench, devices_for
from sightline.bench.study import Study, folder, load_study, width_for
from sightline.facts import old_names

__all__ = [
    "Bench",
    "Difference",
    "Maps",
    "MeasuredRun",
    "Quality",
    "Study",
    "Summary",
    "TaskFigures",
    "bench",
    "devices_for",
    "folder",
    "fresh",
    "load_study",
    "measure_run",
    "measure_tasks",
    "student_interval",
    "summary",
    "width_for",
]

__getattr__ = old_names("sightline.bench", load="load_study", Measured="MeasuredRun", measure="measure_run")
