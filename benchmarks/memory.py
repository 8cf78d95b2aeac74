"""Peak memory and CPU time of every method on four images of 224 px through tf_efficientnet_lite0, in new processes.

Each method with many passes has a process of its own; the others run one after the other in another one, and
`evaluate` scores two methods by deletion and insertion in a third. The weights are random: they change neither memory
nor time. `--before FOLDER` measures another version, too, whose `src` is that folder, in turn with this one.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import hardware, save

import sightline as sl
from sightline.explainers import EXPLAINERS, explain

MODEL = "tf_efficientnet_lite0"
IMAGES, SIDE = 4, 224
FEWER: dict[str, dict[str, Any]] = {
    "integrated_gradients": {"steps": 16},
    "smooth_grad": {"samples": 16},
    "var_grad": {"samples": 16},
    "occlusion": {"patch": 28, "stride": 28},
    "rise": {"masks": 32},
    "score_cam": {"channels": 32},
    "evaluate": {"steps": 8},
}
"""Options that save time and no memory: at least 64 changed images."""
SLOW = ("integrated_gradients", "smooth_grad", "var_grad", "occlusion", "rise", "score_cam")
SLOW += ("ablation_cam@blocks.1",)  # at the last layer of this network it needs no forward passes
FAST = [name for name in EXPLAINERS if name not in SLOW]
EVALUATED: dict[str, Any] = {
    "methods": ["grad_cam", "integrated_gradients"],
    "metrics": ["deletion_auc", "insertion_auc"],
    "controls": ["random_map"],
}
BAR = 1500  # MB


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def measured(name: str) -> dict[str, Any]:
    """What a row takes in this process; `start`: what the process took before it."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model(MODEL).eval()
    images = torch.randn(IMAGES, 3, SIDE, SIDE)
    with torch.no_grad():
        labels = model(images[:1]).argmax(1).expand(IMAGES)
    methods: list[Any] = FAST
    if name in SLOW:
        methods = [partial(EXPLAINERS[name], **FEWER[name]) if name in FEWER else name]
    start, begun = peak_megabytes(), time.process_time()
    if name == "evaluate":
        sl.evaluate(model, [(images, labels)], **EVALUATED, **FEWER[name])
        methods = []
    for method in methods:
        try:
            explain(model, images, methods=[method])
        except (ValueError, RuntimeError) as error:
            print(method, error, file=sys.stderr)
    return {"start": start, "peak": peak_megabytes(), "seconds": time.process_time() - begun}


def in_child(name: str, source: Path | None) -> dict[str, Any]:
    paths = [*([str(source)] if source else []), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, __file__, "--child", name]
    result = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", type=Path, metavar="FOLDER", help="src of another version, measured in turn")
    parser.add_argument("--only", default="", metavar="WORD", help="methods that contain the word; writes nothing")
    parser.add_argument("--rounds", type=int, default=1, metavar="N", help="processes of each method and version (1)")
    parser.add_argument("--child", metavar="METHOD", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measured(arguments.child)))
        return
    versions = {"before": arguments.before, "after": None} if arguments.before else {"after": None}
    rows: list[dict[str, Any]] = []
    for name in (name for name in (*SLOW, "all others", "evaluate") if arguments.only in name):
        row: dict[str, Any] = {"what": name, "options": FEWER.get(name, {}), "bar": BAR}
        for version, source in [*versions.items()] * arguments.rounds:
            values = in_child(name, source)
            peak = max(values["peak"], row.get(f"peak MB {version}", 0))
            seconds = min(values["seconds"], row.get(f"seconds {version}", float("inf")))
            row |= {f"peak MB {version}": round(peak), f"seconds {version}": round(seconds, 2)}
            row["start MB"] = round(values["start"])
        rows.append(row)
        text = ", ".join(f"{key} {value}" for key, value in row.items() if key not in ("what", "options", "bar"))
        print(f"{name:24} {text}", flush=True)
    if not arguments.only:
        where = f"{MODEL}, {IMAGES} images of {SIDE} px, {torch.get_num_threads()} threads, {hardware()}"
        print(save("memory", [{"where": where}, *rows]))


if __name__ == "__main__":
    main()
