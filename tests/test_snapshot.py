"""The files that the verbs write, compared with those in tests/snapshot: text exactly, fractions to 1e-6.

Renew them only on purpose: `SIGHTLINE_RENEW_SNAPSHOT=1 pytest tests/test_snapshot.py`;
then read `git diff tests/snapshot` before you commit it.
"""

import base64
import io
import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import sightline as sl
from sightline import cli, data, explainers, maps, runs

pytestmark = pytest.mark.usefixtures("without_shape_checks")

SNAPSHOT = Path(__file__).parent / "snapshot"
RUN = Path(__file__).parent / "old_files" / "vgg_att2"  # trained once: another CPU would train other weights
RENEW = bool(os.environ.get("SIGHTLINE_RENEW_SNAPSHOT"))

FRACTION = re.compile(r"(?<![\w#.])[-−+]?(?:\d+\.\d+(?:e[-−+]?\d+)?|\d+e[-−+]?\d+)(?![\w.])")
"""Whole numbers are text: they are compared exactly."""
VOLATILE = [  # what depends on the day, the machine and the place
    (r'("(?:command|date|hardware|versions|run|wall time|evaluation time)": )"[^"]*"', r'\1"..."'),
    (r"(<dt>(?:command|date|hardware|versions|run|wall time|evaluation time)</dt><dd>)[^<]*", r"\1..."),
    (r"<(style|script)[^>]*>.*?</\1>", r"<\1>...</\1>"),
    (r"\n +(?=<)", "\n"),  # how far tags are indented: a third of the page
]
TIMED = ("ms / image", "s / epoch", "seconds")
"""Columns of tables that hold times."""


def masked(text: str) -> str:
    for pattern, replacement in VOLATILE:
        text = re.sub(pattern, replacement, text, flags=re.DOTALL)
    return re.sub(r"data:image/(\w+)[^,]*;base64,([A-Za-z0-9+/=]+)", _picture, text)


def _picture(match: re.Match[str]) -> str:
    """Size only: the bytes depend on the encoder."""
    if match[1] == "svg":
        return "PICTURE svg"
    return "PICTURE {} x {}".format(*Image.open(io.BytesIO(base64.b64decode(match[2]))).size)


def without_times(table: str, separator: str) -> str:
    lines, timed = [], set[int]()
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.split(separator)]
        if heads := {place for place, cell in enumerate(cells) if cell in TIMED}:
            timed = heads
        elif len(cells) == 1:
            timed = set()
        else:
            cells = ["..." if place in timed else cell for place, cell in enumerate(cells)]
        lines.append(separator.join(cells))
    return "\n".join(lines) + "\n"


def difference(text: str, expected: str, tolerance: float = 1e-6, rounded: bool = False) -> str | None:
    """The first difference in words, or None.

    `tolerance` is relative above 1 and absolute below. Where a page rounds (`rounded`), a fraction may differ by one in
    its last place, since the value behind it may lie at the edge between two roundings.
    """
    lines, expected_lines = (FRACTION.sub("<fraction>", one).splitlines() for one in (text, expected))
    for number, (line, reference) in enumerate(zip(lines, expected_lines, strict=False), 1):
        if line != reference:
            return f"line {number}: expected {reference!r}, got {line!r}"
    if len(lines) != len(expected_lines):
        return f"expected {len(expected_lines)} lines, got {len(lines)}"
    fractions, references = FRACTION.findall(text), FRACTION.findall(expected)
    for number, (one, reference) in enumerate(zip(fractions, references, strict=True), 1):
        a, b = (float(fraction.replace("−", "-")) for fraction in (one, reference))
        digits = len(reference.partition(".")[2]) if "e" not in reference else 9
        allowed = tolerance * max(1, abs(b)) + (1.01 * 10**-digits if rounded and digits < 6 else 0)
        if not abs(a - b) <= allowed:
            return f"fraction {number} of {len(references)}: expected {reference}, got {one}"
    return None


def check(name: str, text: str, tolerance: float = 1e-6, rounded: bool = False) -> None:
    file = SNAPSHOT / name
    if RENEW:
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
    found = difference(text, file.read_text(encoding="utf-8"), tolerance, rounded)
    assert found is None, f"{name}, {found}"


def read(file: Path) -> str:
    return masked(file.read_text(encoding="utf-8"))


def sightline(*arguments: object) -> None:
    cli.main([str(argument) for argument in arguments])


def resize_in_steps(values: torch.Tensor, size: tuple[int, ...], mode: maps.Mode = "bilinear") -> torch.Tensor:
    """Resized maps in steps of 1/3030 of their maximum, whose half is no boundary between two steps."""
    resized = RESIZE(values, size, mode)
    if mode == "nearest":
        return resized
    step = 3.3e-4 * resized.abs().amax((2, 3), keepdim=True) + 1e-300
    return (resized / step).round() * step


RESIZE = maps.resize


def write_files(out: Path) -> None:
    """What the trained run gives.

    In float64, in one thread, and with `resize_in_steps`: rounding, which depends on the CPU's vector instructions,
    would decide the order of pixels that are nearly equal. No `random_map`, since its seed is the pixels to the last
    bit. In a process of its own, since the package may keep tensors of the default type.
    """
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    metrics = "insertion_auc,deletion_auc,pointing_game,energy_in_mask,parameter_randomization"
    methods = ["--methods", "attention,grad_cam,guided_backprop,lrp", "--controls", "center_map,other_class"]
    with patch.object(maps, "resize", resize_in_steps):
        evaluated = ["--limit", 8, "--steps", 5, "--out", out / "evaluated"]
        sightline("evaluate", RUN, *methods, "--metrics", metrics, *evaluated)

    run = runs.open_run(RUN)  # the other way in: a model and an iterable of tensors, and a method with options
    batch = data.load(run.recipe.data)["test"].batch(range(3))
    images = data.normalize(batch.images, run.preprocess)
    batches = [(images[rows], batch.labels[rows], batch.masks[rows]) for rows in (slice(0, 2), slice(2, 3))]
    methods = [partial(explainers.rise, masks=32), "integrated_gradients", "attention@attention.conv10"]
    options = {"controls": ["center_map"], "steps": 4, "name": "three images"}
    with patch.object(maps, "resize", resize_in_steps):
        sl.evaluate(sl.load(RUN), batches, methods, "all", **options).to_json(out / "evaluation_of_batches.json")

    images = [out / f"{name}.png" for name in ("square", "wide", "tall")]
    for file, (height, width) in zip(images, ((40, 40), (50, 70), (90, 30)), strict=True):
        y, x = np.mgrid[:height, :width]
        pixels = np.stack([(x * x + 3 * y) % 256, (y * y + 5 * x) % 256, (x * y + 7 * width) % 256], -1)
        Image.fromarray(pixels.astype(np.uint8)).save(file)
    sightline("explain", RUN, images[0], "--methods", "all", "--out", out / "explain_all")
    several = ["--methods", "attention,grad_cam,lrp", "--target", 3, "--overlays"]
    sightline("explain", RUN, *images, *several, "--out", out / "explain_several")


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("snapshot")
    subprocess.run([sys.executable, "-m", "tests.test_snapshot", out], check=True, cwd=Path(__file__).parent.parent)
    return out


def test_evaluate_writes_the_same_files(written):
    assert {file.name for file in (written / "evaluated").iterdir()} == {
        "evaluation.json",
        "per_image.csv",
        "report.html",
    }


@pytest.mark.parametrize("name", ["evaluation.json", "per_image.csv"])
def test_evaluate_writes_the_same_values(written, name):
    check(name, read(written / "evaluated" / name))


def test_evaluate_writes_the_same_page(written):
    check("report.html", read(written / "evaluated" / "report.html"), rounded=True)


def test_evaluate_on_batches_by_every_metric(written):
    check("evaluation_of_batches.json", read(written / "evaluation_of_batches.json"))


@pytest.mark.parametrize("folder", ["explain_all", "explain_several"])
def test_explain_writes_the_same_maps(written, folder):
    files = sorted((written / folder).iterdir())
    table = (written / folder / "maps.csv").read_text(encoding="utf-8")
    check(f"{folder}/maps.csv", table.replace(f"{written}{os.sep}", ""))
    check(f"{folder}/files.txt", "".join(f"{described(file)}\n" for file in files))


def described(file: Path) -> str:
    """A picture by its size and mean color, raw maps by their size, norm and a weighted sum."""
    if file.suffix == ".png":
        with Image.open(file) as picture:
            if file.stem.endswith("--page"):  # text on it is drawn by FreeType, whose versions differ a little
                return f"{file.name}: {picture.size}"
            color = np.asarray(picture.convert("RGB")).reshape(-1, 3).mean(0)
            return f"{file.name}: {picture.size}, {[round(value) for value in color.tolist()]}"
    if file.suffix != ".npz":
        return file.name
    lines = [file.name]
    for method, values in np.load(file).items():
        flat = values.astype(float).ravel()
        norm = np.linalg.norm(flat)
        lines.append(f"  {method}: {values.shape}, {norm:.9f}, {flat @ np.cos(np.arange(flat.size)) / (norm or 1):.9f}")
    return "\n".join(lines)


@pytest.mark.usefixtures("few_validation_images")
def test_train_writes_the_same_run(tmp_path):
    out = tmp_path / "run"
    tiny = ["--data.train_size=64", "--data.test_size=10", "--model.options.width=0.03125"]
    tiny += ["--model.options.stem_pool=2", "--optim.epochs=1", "--limit=2"]
    sightline("train", "--data", "clutter", "--model", "vgg_att2", "--out", out, *tiny)
    check("run.json", read(out / "run.json"))
    check("recipe.yaml", read(out / "recipe.yaml"))
    # Training adds up the roundings of all its steps, which differ between CPUs
    check("metrics.csv", without_times(read(out / "metrics.csv"), ","), tolerance=1e-2)


@pytest.mark.usefixtures("few_validation_images")
def test_bench_writes_the_same_tables(tmp_path):
    study = {
        "data": {"source": "clutter", "train_size": 64, "test_size": 20},
        "model": {"name": "cifar_resnet", "options": {"depth": 8, "width": 0.25, "stem_stride": 2}},
        "optim": {"epochs": 1, "lr": 0.01},
        "seeds": [0, 1],
        "rows": {
            "control": {},
            "SE (2)": {"model.options.attention": "se", "model.options.attention_options": {"reduction": 2}},
        },
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    sightline("bench", tmp_path / "study.yaml", "--out", tmp_path / "out")
    # As for metrics.csv; a fraction may be another one in its last place, too
    check("bench.md", without_times(read(tmp_path / "out" / "bench.md"), "|"), tolerance=1e-2, rounded=True)
    names = json.loads((tmp_path / "out" / "bench.json").read_text())
    check("bench_fields.txt", "".join(f"{path}\n" for path in dict.fromkeys(paths(names))))


def paths(value: object, path: str = "") -> list[str]:
    """Where the values of JSON are, without the values."""
    if isinstance(value, dict):
        return [inner for key, item in value.items() for inner in paths(item, f"{path}/{key}")]
    if isinstance(value, list):
        return [inner for item in value for inner in paths(item, f"{path}/*")]
    return [path]


def test_a_difference_is_seen():
    text = '"deletion_auc": 0.25,\n"n": 12\n'
    assert difference(text, text) is None and difference(text.replace("0.25", "0.2500001"), text) is None
    for changed in ("0.2501", "0.25001", "-0.25", "nan", "1e5"):
        assert difference(text.replace("0.25", changed), text) is not None
    for before, after in (("deletion", "insertion"), ("12", "13"), ("\n", "\n\n")):
        assert difference(text.replace(before, after), text) is not None
    assert difference("<b>0.126</b>", "<b>0.125</b>", rounded=True) is None
    assert difference("<b>0.127</b>", "<b>0.125</b>", rounded=True) is not None
    assert difference("0.35161", "0.35160", rounded=False) is not None
    assert FRACTION.findall("a1.5 #1e90 v0.1.2 −0.5 3e-07, 2.50%") == ["−0.5", "3e-07", "2.50"]


if __name__ == "__main__":
    write_files(Path(sys.argv[1]))
