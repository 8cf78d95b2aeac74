"""Time and memory of a CPU's forwards and maps if glibc keeps freed memory, as the command line has it, or returns it.

Each measurement is a process of its own, with one thread; those with and without alternate. Both must yield the same
bits. Times are CPU seconds of the process, with those that the system spends for it: page faults are among these.
"""

import argparse
import hashlib
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

from measure import save

NETWORKS = (
    ("tf_efficientnet_lite0", 224, 1),
    ("tf_efficientnet_lite0", 224, 16),
    ("resnet50", 224, 4),
    ("convnext_atto", 224, 4),
    ("vit_tiny_patch16_224", 224, 4),
)
"""Network, side of the images, batch."""
METHODS = ("grad_cam", "saliency")
CALLS = 3


def cpu_seconds(call: Callable[[], object]) -> float:
    """CPU time of one call."""
    start = time.process_time()
    call()
    return time.process_time() - start


def child(name: str, side: int, batch: int) -> dict[str, object]:
    """Measure one process."""
    import timm
    import torch

    import sightline as sl
    from sightline.cli import keep_freed_memory

    keep_freed_memory()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, images = timm.create_model(name).eval(), torch.randn(batch, 3, side, side)
    results: list[torch.Tensor] = []

    @torch.no_grad()
    def forward() -> None:
        results.append(model(images))

    def explain() -> None:
        explanation = sl.explain(model, images, methods=METHODS)
        results.extend(explanation[method] for method in METHODS)

    measured: dict[str, object] = {}
    for what, call in (("forward", forward), ("explain", explain)):
        call()
        before = resource.getrusage(resource.RUSAGE_SELF)
        measured[what] = statistics.median(cpu_seconds(call) for _ in range(CALLS))
        after = resource.getrusage(resource.RUSAGE_SELF)
        measured[f"{what} faults"] = (after.ru_minflt - before.ru_minflt) / CALLS
        measured[f"{what} system"] = (after.ru_stime - before.ru_stime) / CALLS
    measured["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    measured["bits"] = hashlib.sha256(b"".join(result.numpy().tobytes() for result in results)).hexdigest()
    return measured


def measured(network: tuple[str, int, int], kept: bool) -> dict[str, float]:
    """The measurements of a new process."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    environment |= {"SIGHTLINE_KEEP_MEMORY": str(int(kept)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--child", *map(str, network)]
    answer = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    return json.loads(answer.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="processes of each kind per network (5)")
    parser.add_argument("--only", default="", metavar="WORD", help="networks that contain the word; writes nothing")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        name, side, batch = arguments.child
        print(json.dumps(child(name, int(side), int(batch))))
        return
    rows = []
    for network in NETWORKS:
        what = "{}, {} px, batch {}".format(*network)
        if arguments.only not in what:
            continue
        rounds = []
        for turn in range(arguments.rounds):
            kinds = (True, False) if turn % 2 else (False, True)
            both = {kept: measured(network, kept) for kept in kinds}
            if both[True]["bits"] != both[False]["bits"]:
                raise SystemExit(f"{what}: expected the same bits with and without, got others")
            rounds.append(both)
        row: dict[str, object] = {"what": what, "rounds": len(rounds)}
        for part in ("forward", "explain", "peak"):
            row[f"{part}, kept / returned"] = statistics.median(both[True][part] / both[False][part] for both in rounds)
        for key in ("forward", "explain", "forward faults", "forward system", "peak"):
            for kept, word in ((False, "returned"), (True, "kept")):
                row[f"{key}, {word}"] = statistics.median(both[kept][key] for both in rounds)
        rows.append(row)
        print(
            f"{what:44} forward {row['forward, kept / returned']:.2f}  explain {row['explain, kept / returned']:.2f}  "
            f"peak {row['peak, kept / returned']:.2f} ({row['peak, kept']:.0f} MiB)  faults per forward "
            f"{row['forward faults, returned']:.0f} -> {row['forward faults, kept']:.0f}",
            flush=True,
        )
    if not arguments.only:
        print(save("malloc", rows))


if __name__ == "__main__":
    main()
