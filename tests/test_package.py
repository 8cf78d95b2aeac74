"""What the package shows to the world: its names, what importing it costs, what the wheel holds."""

import inspect
import json
import re
import subprocess
import sys
import textwrap
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

import sightline as sl

ROOT = Path(__file__).parent.parent
OLD_RUN = ROOT / "tests/old_files/vgg_att2"
NAMES = {
    "attention",
    "attention_maps",
    "bench",
    "compat",
    "create_model",
    "data",
    "evaluate",
    "explain",
    "explainers",
    "export",
    "fit",
    "hub",
    "insert",
    "load",
    "maps",
    "metrics",
    "models",
    "recipe",
    "report",
    "runs",
    "targets",
    "testing",
    "training",
}


def fresh(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a new process in which any warning is an error."""
    return subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)


def test_public_names() -> None:
    assert set(sl.__all__) == NAMES | ({"__version__"} & set(sl.__all__))
    assert set(dir(sl)) >= set(sl.__all__)
    for name in sl.__all__:
        assert getattr(sl, name) is not None


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="explian"):
        _ = sl.explian


def test_no_submodule_hides_a_public_function() -> None:
    modules = {path.stem for path in (ROOT / "src/sightline").iterdir() if not path.name.startswith("_")}
    functions = {name for name in sl.__all__ if callable(getattr(sl, name))}
    assert not modules & functions


@pytest.mark.parametrize("module", ["sightline", "sightline.recipe", "sightline.cli"])
def test_importing_is_light_and_silent(module: str) -> None:
    result = fresh(
        f"import {module}, json, logging, sys\n"
        "assert not logging.getLogger().handlers and not logging.getLogger('sightline').handlers\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    heavy = {"torch", "torchvision", "timm", "numpy", "matplotlib", "PIL", "lightning", "datasets", "sklearn", "pandas"}
    assert not heavy & set(json.loads(result.stdout))


def test_explaining_photos_loads_no_metrics() -> None:
    result = fresh("from sightline import models, report, runs\nimport sys\nprint(report.pages, *sys.modules)")
    assert result.returncode == 0, result.stderr
    unused = {"torchmetrics", "scipy", "sklearn", "transformers", "jinja2", "lightning", "datasets", "pandas"}
    assert "sightline.report.pages" in result.stdout and not unused & set(result.stdout.split())
    result = fresh(
        "import sys; from sightline.report import formats; formats.template('index.html'); print(*sys.modules)"
    )
    assert result.returncode == 0, result.stderr
    assert "jinja2" in result.stdout.split() and not (unused - {"jinja2"}) & set(result.stdout.split())


def test_every_name_resolves_in_a_fresh_process_whatever_comes_first() -> None:
    code = "import sightline as sl\nfor name in sorted(sl.__all__, key=str.lower): getattr(sl, name)\n"
    code += "assert callable(sl.explain) and callable(sl.evaluate) and callable(sl.load)"
    result = fresh(code)
    assert result.returncode == 0, result.stderr


def test_without_extras_each_verb_works_or_says_what_to_install(tmp_path: Path) -> None:
    code = f"""
        import contextlib, io, re, sys
        from importlib.metadata import packages_distributions, requires
        extra = {{re.split("[<>=[; ]", r)[0] for r in requires("sightline") if re.search("extra == '(?!dev|docs)", r)}}
        extra |= {{"pyarrow", "pandas", "pytorch-lightning"}}  # that they bring along
        for module, distributions in packages_distributions().items():
            if extra & set(distributions):
                sys.modules[module] = None
        from sightline import cli
        run, photos, out = {str(OLD_RUN)!r}, {str(ROOT / "examples/photos")!r}, {str(tmp_path / "out")!r}
        for verb in (
            ["list"], ["explain", run, photos, "--methods", "grad_cam", "--out", out],
            ["export", run, "--out", out + ".pt2"],
            ["sight", "--model", "resnet18", "--weights", run + "/nothing", "--data", photos, "--out", out + "2"],
            ["reproduce"], ["demo", "--out", out + "3"], ["train", "--data", photos, "--out", out + "3"],
            ["explain", run, photos, "--engine", "local", "--out", out + "4"], ["explore", run, "--out", out + "5"],
            ["evaluate", run], ["export", run, "--out", out + ".onnx"], ["serve", run],
        ):
            said = io.StringIO()
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                try:
                    cli.main(verb)
                except SystemExit:
                    pass
            print(said.getvalue().splitlines()[-1])
        """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    works, needs = result.stdout.splitlines()[:4], result.stdout.splitlines()[4:]
    assert not any("install" in line for line in works) and "expected weights in" in works[3], works
    extras = [re.fullmatch(r"sightline: error: .+; install it: pip install 'sightline\[(\w+)\]'", s) for s in needs]
    assert [found and found[1] for found in extras] == [*["train"] * 3, "scale", *["train"] * 2, "export", "serve"], (
        needs
    )


def test_module_is_a_program() -> None:
    result = subprocess.run([sys.executable, "-m", "sightline", "--help"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for verb in ("demo", "train", "explain", "evaluate", "list"):
        assert verb in result.stdout


def test_explainers_by_name_are_those_exported() -> None:
    exported = {name: getattr(sl.explainers, name) for name in sl.explainers.__all__}
    found = {name: value for name, value in exported.items() if isinstance(value, sl.explainers.Explainer)}
    assert found == sl.explainers.EXPLAINERS


def test_metrics_by_name_are_those_exported() -> None:
    exported = {name: getattr(sl.metrics, name) for name in sl.metrics.__all__}
    assert set(sl.metrics.METRICS) <= set(exported)
    classes = {v for v in exported.values() if isinstance(v, type) and issubclass(v, sl.metrics.PerImageMean)}
    others = {sl.metrics.PerImageMean, sl.metrics.FoolingRate, *sl.metrics.MOSAIC_METRICS.values()}
    assert classes - others == set(sl.metrics.METRICS.values())
    for name, metric in sl.metrics.METRICS.items():
        assert inspect.unwrap(metric.function) is inspect.unwrap(exported[name])


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    from hatchling.builders.wheel import WheelBuilder

    folder = tmp_path_factory.mktemp("dist")
    (path,) = WheelBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])
    with zipfile.ZipFile(path) as archive:
        return archive.namelist()


def test_wheel_is_complete(wheel: list[str]) -> None:
    source = ROOT / "src"
    files = {
        str(path.relative_to(source))
        for path in (source / "sightline").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert "sightline/py.typed" in files
    assert any(name.startswith("sightline/report/templates/") for name in files)
    packed = {name for name in wheel if name.startswith("sightline/")}
    assert packed == files
    assert any(name.endswith("licenses/LICENSE") for name in wheel)


def tracked() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode or not listed.stdout:
        pytest.skip("not a git checkout with files in it")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_no_private_path_in_any_file() -> None:
    private = [b"/" + folder + b"/" for folder in (b"work", b"root", b"home")]
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in tracked()
        for number, line in enumerate(path.read_bytes().splitlines(), start=1)
        if any(text in line for text in private)
    ]
    assert found == []


def test_changelog_and_citation_name_the_version() -> None:
    assert version("sightline") == sl.__version__
    assert f"## [{sl.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
    assert f"version: {sl.__version__}" in (ROOT / "CITATION.cff").read_text()


def test_names_of_before_in_runs_and_studies():
    from sightline import bench, runs

    assert runs.load is runs.load_model and bench.load is bench.load_study
    assert bench.Measured is bench.MeasuredRun and bench.measure is bench.measure_run
    with pytest.raises(AttributeError, match=r"module 'sightline\.runs' has no attribute 'normalise'"):
        runs.normalise  # noqa: B018
