"""Does attention find the malignant regions of a slide, and from which share on does it help?

Slides of scripts/make_slides.py, whose malignant regions are known:

    python scripts/make_slides.py TILES SLIDES
    python benchmarks/slides.py SLIDES lite0.pth [--out runs/slides]

Features are those of EfficientNet-Lite0 with ImageNet weights, at the tiles' own resolution; they are kept per slide,
and a second start continues. Each slide is predicted by networks that saw no slide of its patient. Figures:

- AUROC of each pooling, of all slides and of the malignant slides with one share against all benign ones;
- of the malignant slides, share of the map in the malignant regions, beside chance and the controls, and the areas of
  the deletion and insertion curves over tiles; means over slides. All intervals resample patients.

With --large FILE, also the time per 1,000 tiles by part and the peak memory for one large slide, in a process of its
own. With --kills N, the features of twelve slides are also written by a process that gets SIGKILL at N random moments
and is started again; they must equal, byte for byte, those of an undisturbed one. The results are written into
results/slides.json; --only leaves the rest as it is there.
"""

import argparse
import csv
import json
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from measure import RESULTS, hardware, keep_freed_memory

from sightline import runs
from sightline.metrics.uncertainty import mean_interval
from sightline.slides import bags, networks, study
from sightline.slides.maps import annotated, area, controls, curve, energy, parts_of, tile_values

MPP = 0.62


def auroc_table(run: study.SlideRun, shares: np.ndarray) -> dict[str, Any]:
    """Share ("all", or of the malignant tissue) -> pooling -> AUROC, and difference to the control."""
    found: dict[str, Any] = {}
    labels = np.array(run.labels)
    for share in ("all", *sorted(set(shares[labels == 1].tolist()))):
        rows = np.flatnonzero((labels == 0) | (shares == share) | (share == "all"))
        by_name = {name: run.probabilities(name)[:, rows] for name in run.training["poolings"]}
        own, differences = study.auroc_intervals(by_name, labels[rows], [run.patients[i] for i in rows])
        found[str(share)] = {
            name: {"auroc": plain(own[name]), "to uniform": plain(differences[name]) if name in differences else None}
            for name in by_name
        }
    return found


def map_table(run: study.SlideRun, folder: Path, shares: np.ndarray) -> dict[str, Any]:
    """Share of the malignant tissue -> map or control -> energy, deletion and insertion, and chance."""
    values: dict[str, dict[str, dict[str, list[float]]]] = {}
    patients: dict[str, list[str]] = {}
    for i, slide in enumerate(run.slides):
        if not run.labels[i]:
            continue
        bag, models = bags.read_bag(run.folder / "bags" / f"{slide}.safetensors"), run.models(slide)
        parts = parts_of(bag, models)
        found = tile_values(bag, models, 1, parts)
        inside = annotated(folder / f"{slide.split('.')[0]}.geojson", bag.tiles, bag.size)
        for share in ("all", str(shares[i])):
            patients.setdefault(share, []).append(run.patients[i])
            of_share = values.setdefault(share, {})
            for name, one in (found.scored() | controls(bag)).items():
                of_name = of_share.setdefault(name, {})
                of_name.setdefault("energy", []).append(energy(one, inside))
                of_name.setdefault("deletion", []).append(area(*curve(bag, models, one, 1, parts=parts)))
                of_name.setdefault("insertion", []).append(area(*curve(bag, models, one, 1, inserts=True, parts=parts)))
            of_share.setdefault("chance", {}).setdefault("energy", []).append(float(inside.mean()))
    return {
        share: {
            name: {
                figure: plain(mean_interval(np.array(one), np.array(patients[share])))
                for figure, one in figures.items()
            }
            for name, figures in of_share.items()
        }
        for share, of_share in values.items()
    }


def plain(interval: Any) -> list[float]:
    return [round(float(value), 4) for value in (interval.value, interval.low, interval.high)]


def alone(files: list[Path], weights: str, out: Path, workers: int) -> None:
    """Features of slides, in this process; prints time by part and the peak memory."""
    keep_freed_memory()
    network, preprocess, identity = networks.open_network("tf_efficientnet_lite0", weights)
    print("ready", flush=True)
    written = bags.write_bags(files, out, network, preprocess, bags.Grid(mpp=MPP), made_by=identity, workers=workers)
    peaks = {
        who: resource.getrusage(getattr(resource, who)).ru_maxrss / 2**20 for who in ("RUSAGE_SELF", "RUSAGE_CHILDREN")
    }
    size = bags.read_bag(written.files[files[0].name]).size
    print(
        json.dumps(
            {"size": size, "tiles": written.tiles, "seconds": written.seconds, "peak GB": peaks, "workers": workers}
        )
    )


def command_of(files: list[Path], weights: str, out: Path, workers: int) -> list[str]:
    options = ["--alone", *map(str, files), "--out", str(out), "--workers", str(workers)]
    return [sys.executable, __file__, "-", weights, *options]


def killed(files: list[Path], weights: str, out: Path, kills: int) -> dict[str, Any]:
    """Features written in spite of SIGKILLs, against those of a process that was left alone."""
    start = time.perf_counter()
    subprocess.run(command_of(files, weights, out / "undisturbed", 1), check=True, capture_output=True)
    longest = (time.perf_counter() - start) / kills * 1.5
    rng, done, whole = np.random.default_rng(), 0, 0
    while done < kills:
        with subprocess.Popen(command_of(files, weights, out / "killed", 1), stdout=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stdout.readline() == b"ready\n"
            time.sleep(rng.uniform(0, longest))
            if process.poll() is not None:
                break
            process.send_signal(signal.SIGKILL)
        done += 1
        for file in (out / "killed").glob("*.safetensors"):
            bags.read_bag(file)
        whole = len([*(out / "killed").glob("*.safetensors")])
        print(f"{done} kills, {whole} of {len(files)} slides", flush=True)
    subprocess.run(command_of(files, weights, out / "killed", 1), check=True, capture_output=True)
    names = [f"{file.name}.safetensors" for file in files]
    equal = sum((out / "killed" / name).read_bytes() == (out / "undisturbed" / name).read_bytes() for name in names)
    return {"kills": done, "slides": len(files), "before the last start": whole, "equal": equal}


def lines(results: dict[str, Any]) -> Iterator[str]:
    """Markdown tables."""
    yield "| malignant tissue | pooling | AUROC | to uniform weights |\n|---|---|---|---|"
    for share, by_name in results["auroc"].items():
        for name, one in by_name.items():
            to_uniform = span(one["to uniform"]) if one["to uniform"] else "-"
            yield f"| {share} | {name} | {span(one['auroc'])} | {to_uniform} |"
    yield "\n| malignant tissue | map | in the regions | deletion | insertion |\n|---|---|---|---|---|"
    for share, by_name in results["maps"].items():
        for name, one in by_name.items():
            shown = [span(one[figure]) if figure in one else "-" for figure in ("energy", "deletion", "insertion")]
            yield f"| {share} | {name} | {' | '.join(shown)} |"


def span(values: list[float]) -> str:
    return f"{values[0]:.3f} [{values[1]:.3f}, {values[2]:.3f}]"


def tables(options: argparse.Namespace) -> dict[str, Any]:
    """Both tables, of all slides."""
    table = study.read_labels(options.slides / "slides.csv")
    shares = shares_of(options.slides / "slides.csv")
    network, preprocess, identity = networks.open_network("tf_efficientnet_lite0", options.weights)
    files = study.slide_files(options.slides, table.slides)
    told = ""

    def tell(what: str, done: int, total: int) -> None:
        nonlocal told
        if what != told:
            told = what
            print(what, flush=True)

    written = bags.write_bags(
        files, options.out / "bags", network, preprocess, bags.Grid(mpp=MPP), made_by=identity,
        workers=options.workers, progress=tell,
    )  # fmt: skip
    run = study.train(
        written.files, table, options.out, network=("tf_efficientnet_lite0", options.weights), progress=tell
    )
    of_run = np.array([shares[slide] for slide in run.slides])
    return {
        "side": max(bags.read_bag(next(iter(written.files.values()))).size),
        "slides": len(run.slides),
        "tiles": sum(len(bags.read_bag(f)) for f in written.files.values()),
        "auroc": auroc_table(run, of_run),
        "maps": map_table(run, options.slides, of_run),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slides", type=Path)
    parser.add_argument("weights")
    parser.add_argument("--out", type=Path, default=Path("runs/slides"), help="run folder (runs/slides)")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--large", type=Path, help="a large slide, for time and memory")
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--only", action="store_true", help="what --large and --kills ask for, without the tables")
    parser.add_argument("--alone", type=Path, nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        alone(options.alone, options.weights, options.out, options.workers)
        return
    keep_freed_memory()
    file = RESULTS / "slides.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    if not options.only:
        of_side = tables(options)
        results.setdefault("by side", {})[str(of_side["side"])] = of_side
    if options.large:
        command = command_of([options.large], options.weights, options.out / "large", options.workers)
        found = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
        results["large"] = json.loads(found)
    if options.kills:
        files = sorted(options.slides.glob("*.tif"))[:12]
        results["kills"] = killed(files, options.weights, options.out / "kills", options.kills)
    results |= {"hardware": hardware(), "versions": runs.surroundings()["versions"]}
    runs.write(file, json.dumps(results, indent=1).encode())
    for side, of_side in results["by side"].items():
        print(f"\nslides of {side} pixels", *lines(of_side), sep="\n")


def shares_of(file: Path) -> dict[str, float]:
    with file.open(newline="") as opened:
        return {row["slide"]: float(row["share"]) for row in csv.DictReader(opened)}


if __name__ == "__main__":
    main()
