"""The tests and example scripts of pytorch-grad-cam, run on `sightline.compat.pytorch_grad_cam`.

    python benchmarks/compat.py PATH    a checkout of jacobgil/pytorch-grad-cam, with tests/ and examples/both.png

They are copied into a temporary folder, where two things are changed: the imports name our package, and networks have
random weights, as theirs would be downloaded; the scripts get smaller networks, too. The files in PATH stay as they
are.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from measure import save

IMPORTS = [
    (r"(?m)^import pytorch_grad_cam$", "import sightline.compat.pytorch_grad_cam as pytorch_grad_cam"),
    (r"(?m)^from pytorch_grad_cam", "from sightline.compat.pytorch_grad_cam"),
]
WEIGHTS = [
    (r'weights="DEFAULT"', "weights=None"),
    (r"pretrained=(True|False)", "weights=None"),
]
SHARED = """import functools, torchvision

for name in ("resnet18", "vgg11"):
    setattr(torchvision.models, name, functools.cache(getattr(torchvision.models, name)))
"""
"""Tests share their networks, which our maps leave alone: making them is most of the time."""
SCRIPTS = {
    "cam.py": [("models.resnet50(weights=models.ResNet50_Weights.DEFAULT)", "models.resnet18()")],
    "usage_examples/vit_example.py": [
        ("torch.hub.load('facebookresearch/deit:main',", "__import__('timm').create_model("),
        ("pretrained=True", "pretrained=False"),
    ],
    "usage_examples/swinT_example.py": [("swin_base", "swin_tiny"), ("pretrained=True", "pretrained=False")],
}
"""Example script -> changes; its methods are those that it offers."""
OFFERED = re.compile(r"""["']([a-z+]+)["']\s*:\s*[A-Z]\w+""")
METHOD = re.compile(r"\b([A-Z]\w*CAM\w*|FullGrad)\b")


def changed(text: str, changes: Iterable[tuple[str, str]]) -> str:
    """A test or a script with its patterns replaced."""
    for pattern, replacement in changes:
        text = re.sub(pattern, replacement, text)
    return text


def run(source: Path) -> list[dict[str, Any]]:
    """What every test says, grouped by file, by the method that it uses, and by the reason."""
    with tempfile.TemporaryDirectory() as folder:
        there = Path(folder)
        (there / "examples").symlink_to((source / "examples").resolve())
        for file in sorted((source / "tests").glob("test_*.py")):
            (there / file.name).write_text(changed(file.read_text(), [*IMPORTS, *WEIGHTS]))
        (there / "conftest.py").write_text(SHARED)
        report, cases = there / "report.xml", list[ET.Element]()
        for file in sorted(there.glob("test_*.py")):  # apart: a test may change a network for all that follow
            options = ["-q", "--tb=line", "-p", "no:cacheprovider", f"--junitxml={report}", file.name]
            subprocess.run([sys.executable, "-m", "pytest", *options], cwd=there, env=os.environ, check=False)
            cases += ET.parse(report).getroot().iter("testcase")
    rows = Counter(map(outcome, cases))
    return [
        dict(zip(("file", "method", "outcome", "reason", "tests"), (*row, n), strict=True)) for row, n in rows.items()
    ]


def scripts(source: Path) -> list[dict[str, Any]]:
    """What every example script says for every method that it offers, and with smoothing."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        there = Path(folder)
        (there / "examples").symlink_to((source / "examples").resolve())
        for name, changes in SCRIPTS.items():
            text = changed((source / name).read_text(), IMPORTS)
            for before, after in changes:
                assert before in text, f"{name}: expected {before!r}, got another version; adapt SCRIPTS"
                text = text.replace(before, after)
            file = there / Path(name).name
            file.write_text(text)
            smooth = re.findall(r"--(?:aug|eigen).smooth", text)
            calls = [("gradcam", *smooth), *((method,) for method in dict.fromkeys(OFFERED.findall(text)))]
            for method, *options in calls:
                command = [sys.executable, file.name, "--method", method, *options]
                done = subprocess.run(command, cwd=there, capture_output=True, text=True, check=False)
                lines = done.stderr.strip().splitlines()
                rows.append(
                    {
                        "file": name,
                        "method": " ".join([method, *options]),
                        "outcome": "failed" if done.returncode else "passed",
                        "reason": lines[-1] if done.returncode and lines else "",
                        "tests": 1,
                    }
                )
    return rows


def outcome(case: ET.Element) -> tuple[str, str, str, str]:
    """File, method, passed or failed, and why."""
    broken = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
    name = case.get("name", "")
    method = METHOD.search(name)
    file = (case.get("classname") or name).split(".")[0]
    if broken is None:
        return file, method[0] if method else "", "passed", ""
    text = f"{broken.get('message', '')}\n{broken.text or ''}"
    lines = [line for line in text.splitlines() if re.match(r"(E +)?\w*(Error|Exception)\b", line)]
    reason = re.sub(r"^E +", "", lines[0]) if lines else text.splitlines()[0]
    return file, method[0] if method else "", "failed", re.sub(r" \(/.*", "", reason)


def main() -> None:
    """Run, print a table and write results/compat.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="checkout of pytorch-grad-cam")
    source = parser.parse_args().source
    if not (source / "tests").is_dir() or not (source / "examples" / "both.png").exists():
        parser.error(f"expected a folder with tests/ and examples/both.png, got {source}; check pytorch-grad-cam out")
    rows = run(source) + scripts(source)
    for row in rows:
        print(f"| `{row['file']}` | {row['method']} | {row['tests']} {row['outcome']} | {row['reason']} |")
    passed = sum(row["tests"] for row in rows if row["outcome"] == "passed")
    print(f"{passed} of {sum(row['tests'] for row in rows)} passed")
    save("compat", rows)


if __name__ == "__main__":
    main()
