"""`scripts/setup`, the Makefile and the hooks, run with a stand-in Python so that nothing is downloaded."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import jaxtyping
import pytest
import torch
import yaml

from sightline.data import Batch
from sightline.inference.operations import Operation
from sightline.maps import normalize

ROOT = Path(__file__).parent.parent

# Stands in for Python and, copied there, for .venv/bin/python; `installs` and `runs` are its diary.
FAKE_PYTHON = """#!/bin/sh
version=$(cat "$0.version")
case "$*" in
*version_info*) exec REAL_PYTHON -c "import sys; sys.version_info = ${version%.*}, ${version#*.}; $2" ;;
*ensurepip*) [ ! -e "$0.bare" ] ;;
"-m venv .venv")
    mkdir -p .venv/bin
    cp "$0" .venv/bin/python
    cp "$0.version" .venv/bin/python.version
    echo "#!$PWD/.venv/bin/python" >.venv/bin/pip ;;
"-m pip install"*)
    echo "$*" >>installs
    [ ! -e pip-fails ] || exit 1
    [ -d "$TMPDIR" ] || exit 1
    mkdir -p .venv/lib/python3.12/site-packages/torch-2.12.0.dist-info ;;
*) echo "$*" >>runs ;;
esac
"""


class Checkout:
    """A copy of the files that set up, on a path with a space, and a PATH with the stand-ins and little else."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "my checkout"
        self.bin = folder / "bin"
        self.bin.mkdir()
        for name in ("pyproject.toml", "src/sightline/version.py", "Makefile", "scripts/setup"):
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.folder / name)
        for tool in ("sh", "dirname", "cat", "mkdir", "cp", "rm", "make"):
            os.symlink(str(shutil.which(tool)), self.bin / tool)
        self.script("uname", "#!/bin/sh\necho Linux\n")
        self.disk(gigabytes=50)

    def script(self, name: str, text: str) -> Path:
        path = self.bin / name
        path.write_text(text)
        path.chmod(0o755)
        return path

    def python(self, name: str, version: str) -> Path:
        self.bin.joinpath(f"{name}.version").write_text(version)
        return self.script(name, FAKE_PYTHON.replace("REAL_PYTHON", shlex.quote(sys.executable)))

    def disk(self, gigabytes: int) -> None:
        free = gigabytes * 1024**2
        self.script("df", f"#!/bin/sh\necho Filesystem blocks used free\necho /dev/root 1 1 {free} 1% /\n")

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=self.folder, env={"PATH": str(self.bin)} | environment, capture_output=True, text=True
        )

    def setup(self, extra: str, **environment: str) -> str:
        result = self.run("scripts/setup", extra, **environment)
        assert result.returncode == 0, result.stderr
        return result.stdout

    def refusal(self, extra: str, **environment: str) -> str:
        """The one line with which setting up is refused."""
        result = self.run("scripts/setup", extra, **environment)
        assert result.returncode == 1
        (line,) = result.stderr.splitlines()
        return line

    @property
    def installs(self) -> list[str]:
        diary = self.folder / "installs"
        return re.findall(r"-e (\S+)", diary.read_text()) if diary.exists() else []


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_installs_once(checkout: Checkout) -> None:
    checkout.python("python3", "3.12")
    assert "Making .venv with python3 (Python 3.12)" in checkout.setup("train")
    assert checkout.installs == [".[train]"]
    assert not (checkout.folder / ".venv/tmp").exists()
    assert checkout.setup("train") == ""
    os.utime(checkout.folder / "pyproject.toml", (0, 2_000_000_000))
    assert checkout.setup("train") == ""
    assert checkout.installs == [".[train]"]


@pytest.mark.parametrize("file", ["pyproject.toml", "src/sightline/version.py"])
def test_installs_again_when_dependencies_or_version_change(file: str, checkout: Checkout) -> None:
    checkout.python("python3", "3.12")
    checkout.setup("train")
    with (checkout.folder / file).open("a") as changed:
        changed.write("# more\n")
    checkout.setup("train")
    assert checkout.installs == [".[train]", ".[train]"]


def test_another_extra_is_added_and_dev_holds_train(checkout: Checkout) -> None:
    checkout.python("python3", "3.12")
    checkout.setup("train")
    checkout.setup("dev")
    (checkout.folder / ".venv/installed-train").unlink()
    checkout.setup("train")
    assert checkout.installs == [".[train]", ".[dev]"]


def test_a_failed_install_is_tried_again(checkout: Checkout) -> None:
    checkout.python("python3", "3.12")
    (checkout.folder / "pip-fails").touch()
    assert re.search(r"pip could not install sightline\[train\]", checkout.refusal("train"))
    (checkout.folder / "pip-fails").unlink()
    checkout.setup("train")
    assert checkout.installs == [".[train]", ".[train]"]


def test_takes_the_newest_python_that_runs(checkout: Checkout) -> None:
    checkout.script("python3.13", "#!/bin/sh\necho 'not installed here' >&2\nexit 127\n")
    checkout.python("python3.12", "3.12")
    checkout.python("python3", "3.9")
    assert "with python3.12 " in checkout.setup("train")


def test_python_can_be_named(checkout: Checkout) -> None:
    checkout.python("python3", "3.12")
    named = checkout.python("other python", "3.11")
    assert f"with {named} (Python 3.11)" in checkout.setup("train", PYTHON=str(named))


def test_old_python_is_one_line(checkout: Checkout) -> None:
    checkout.python("python3", "3.10")
    line = checkout.refusal("train")
    assert line.startswith("error: sightline needs Python 3.11 or newer, but python3 is Python 3.10; install a newer")
    assert not (checkout.folder / ".venv").exists()


def test_no_python_is_one_line(checkout: Checkout) -> None:
    assert "none of python3.13 python3.12 python3.11 python3 runs" in checkout.refusal("train")
    assert "none of /nowhere/python runs" in checkout.refusal("train", PYTHON="/nowhere/python")


def test_missing_venv_package_is_one_line(checkout: Checkout) -> None:
    checkout.python("python3", "3.12")
    (checkout.bin / "python3.bare").touch()
    assert "apt install python3.12-venv" in checkout.refusal("train")
    assert not (checkout.folder / ".venv").exists()


def test_full_disk_is_one_line(checkout: Checkout) -> None:
    checkout.python("python3", "3.12")
    checkout.disk(gigabytes=5)
    line = checkout.refusal("train")
    assert re.search(r"error: 5 GB free in .*/my checkout, \d+ GB needed to install \(plain torch", line)
    assert not (checkout.folder / ".venv").exists()


def test_disk_is_not_asked_again_once_torch_is_there(checkout: Checkout) -> None:
    checkout.python("python3", "3.12")
    checkout.setup("train")
    checkout.disk(gigabytes=1)
    checkout.setup("dev")
    assert checkout.installs == [".[train]", ".[dev]"]


def test_other_systems_get_no_cuda_and_need_less_disk(checkout: Checkout) -> None:
    checkout.python("python3", "3.12")
    checkout.script("uname", "#!/bin/sh\necho Darwin\n")
    checkout.disk(gigabytes=5)
    checkout.setup("train")
    assert checkout.installs == [".[train]"]


def test_broken_venv_is_recreated(checkout: Checkout) -> None:
    checkout.python("python3", "3.12")
    checkout.setup("train")
    checkout.folder.joinpath(".venv/bin/python").unlink()
    assert "Recreating .venv: it has no working Python 3.11 or newer" in checkout.setup("train")
    assert checkout.installs == [".[train]", ".[train]"]


def test_incomplete_venv_is_recreated(checkout: Checkout) -> None:
    checkout.python("python3", "3.12")
    checkout.setup("train")
    checkout.folder.joinpath(".venv/bin/pip").unlink()
    assert "Recreating .venv: it is incomplete or was moved here" in checkout.setup("train")


def test_moved_venv_is_recreated(checkout: Checkout) -> None:
    checkout.python("python3", "3.12")
    checkout.setup("train")
    checkout.folder = checkout.folder.rename(checkout.folder.with_name("elsewhere"))
    assert "Recreating .venv: it is incomplete or was moved here" in checkout.setup("train")
    assert checkout.setup("train") == ""


def test_venv_of_another_python_is_recreated_only_when_one_is_named(checkout: Checkout) -> None:
    checkout.python("python3", "3.12")
    checkout.setup("train")
    newer = checkout.python("python3.13", "3.13")
    assert checkout.setup("train") == ""
    assert f"it has Python 3.12 and {newer} is Python 3.13" in checkout.setup("train", PYTHON=str(newer))


def test_broken_venv_stays_where_no_python_can_replace_it(checkout: Checkout) -> None:
    checkout.python("python3", "3.12")
    checkout.setup("train")
    checkout.folder.joinpath(".venv/bin/pip").unlink()
    checkout.python("python3", "3.9")
    checkout.refusal("train")
    assert (checkout.folder / ".venv/bin/python").exists()


def test_make_demo(checkout: Checkout) -> None:
    checkout.python("python3", "3.12")
    for _ in range(2):
        result = checkout.run("make", "demo")
        assert result.returncode == 0, result.stderr
    assert checkout.installs == [".[train]"]
    assert checkout.folder.joinpath("runs").read_text() == "-m sightline demo --out runs/demo --resume\n" * 2


def test_make_test_runs_the_suite_with_and_without_the_shape_checker(checkout: Checkout) -> None:
    checkout.python("python3", "3.12")
    result = checkout.run("make", "test")
    assert result.returncode == 0, result.stderr
    assert checkout.installs == [".[dev]"]
    main, compiled = checkout.folder.joinpath("runs").read_text().splitlines()
    assert main == "-m pytest -n 2 --dist worksteal"
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    assert "--jaxtyping-packages=sightline,beartype.beartype" in options["addopts"]
    assert "not compile and not slow" in options["addopts"]
    assert "error" in options["filterwarnings"]
    assert compiled.startswith("-m pytest -m compile and not slow -o addopts=")
    assert "jaxtyping" not in compiled


def test_the_shape_checker_knows_the_functions_and_data_classes_that_name_a_shape() -> None:
    assert Operation(len, [1], {}).input == 1  # not a tuple
    with pytest.raises(jaxtyping.TypeCheckError, match="maps"):
        normalize(torch.zeros(3))
    with pytest.raises(jaxtyping.TypeCheckError, match="images"):
        Batch(torch.zeros(2, 2), torch.zeros(2, dtype=torch.int64), None, None, torch.arange(2), ["a", "b"])


def test_make_says_what_is_wrong_with_an_old_python(checkout: Checkout) -> None:
    checkout.python("python3", "3.9")
    result = checkout.run("make", "demo")
    assert result.returncode != 0
    assert "sightline needs Python 3.11 or newer" in result.stderr
    assert not checkout.folder.joinpath("runs").exists()


def test_hooks_run_what_make_check_runs() -> None:
    makefile = (ROOT / "Makefile").read_text()
    (recipe,) = re.findall(r"^check:\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    commands = [line.strip() for line in recipe.splitlines() if not line.startswith("\t@")]
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    (local,) = config["repos"]
    assert [hook["entry"] for hook in local["hooks"]] == commands


def test_ci_calls_the_same_targets() -> None:
    steps = re.findall(r"^step (make .*)$", (ROOT / ".ci/run").read_text(), re.MULTILINE)
    assert steps == ["make check", "make test"]
