"""README, CONTRIBUTING and docs/ are run: Python blocks, YAML recipes, commands; and their links lead somewhere.

A comment before a block of commands says how it is tested where not simply run as it stands:
`<!-- test: with ARGUMENTS -->` adds arguments to its sightline commands, to make them small;
`<!-- test: slow -->` has its sightline commands parsed and not run.
Before a block of text, `<!-- test: printed -->` says that the last Python block prints it.
Before a Python block, `<!-- test: with NAMES = VALUES -->` sets these names after it. Its lines `%pip` are checked like
commands and not run.
"""

import doctest
import io
import json
import os
import re
import shlex
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import jupytext
import numpy as np
import pytest
import torch
from PIL import Image
from tests.slide_files import pyramid

from sightline import bench, cli, compat, recipe
from sightline.options import parse as parse_options

pytestmark = pytest.mark.usefixtures("without_shape_checks")

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(page for page in (ROOT / "docs").rglob("*.md") if "generated" not in page.parts),
    ROOT / "benchmarks/README.md",
]
BLOCK = re.compile(
    r"^(?:<!-- test: (?P<note>.*?) -->\n)?```(?P<language>\w+)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL
)
MAGIC = re.compile(r"%(pip .+)")
LINK = re.compile(r"\[[^]]*\]\(([^)\s]+)\)")
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


class Block(NamedTuple):
    language: str
    body: str
    note: str
    place: str


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text()
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("body"))
        yield Block(match["language"], match["body"], match["note"] or "", f"{page.relative_to(ROOT)}:{line}")


def commands(block: Block) -> Iterator[list[str]]:
    """The commands of a shell block, without comments and what a console shows below a `$ `."""
    lines = block.body.replace("\\\n", " ").splitlines()
    if block.language == "console":
        lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    for line in lines:
        if words := shlex.split(os.path.expandvars(line), comments=True):
            yield words


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unchecked: None) -> Path:
    """The folder of a reader: recipes, examples, `photos` of three classes, `new-photos`, weights, and
    `slides` with `slides.csv` and `annotations`; offline.

    A reader has no shape checker either, and sees the package's own errors.
    """
    for folder in ("examples", "recipes"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    rng = np.random.default_rng(0)
    for number in range(36):
        folder = tmp_path / "photos" / ("cat", "dog", "newt")[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        color = np.eye(3)[number % 3] * 120
        pixels = (color + rng.integers(0, 120, (48, 40, 3))).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
        if number < 3:
            (tmp_path / "new-photos").mkdir(exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / "new-photos" / f"{number}.jpg")

    (tmp_path / "slides").mkdir()
    (tmp_path / "annotations").mkdir()
    lines = ["slide,label,patient"]
    for number, patient in enumerate("abcd"):
        pixels = np.full((640, 640, 3), 240, dtype=np.uint8)
        stains = ((190, 110, 170), (140, 80, 160))
        pixels[:, :320] = rng.normal(stains[number % 2], 20, (640, 320, 3)).clip(0, 255)
        pyramid(tmp_path / "slides" / f"{patient}-1.tif", pixels, 2)
        lines.append(f"{patient}-1.tif,{('tumor', 'healthy')[number % 2]},{patient}")
        ring = [[0, 0], [100, 0], [100, 100], [0, 100], [0, 0]]
        area = {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}}
        (tmp_path / "annotations" / f"{patient}-1.geojson").write_text(json.dumps([area]))
    (tmp_path / "slides.csv").write_text("\n".join(lines))

    import timm

    create: Callable[..., Any] = timm.create_model
    torch.save(create("tf_efficientnet_lite0").state_dict(), tmp_path / "lite0.pth")
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **options: create(name, **options))
    monkeypatch.setenv("SIGHTLINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def parse(arguments: list[str]) -> None:
    _, overrides = parse_options(arguments, cli.VERBS)
    recipe.load(recipe.Recipe(), {name: value for name, value in overrides.items() if not name.startswith("task.")})


def sightline(arguments: list[str], note: str, place: str) -> None:
    private = any(word.startswith("$SIGHTLINE_DATA") for word in arguments)  # the variable is not set
    if note == "slow" or private:
        parse(arguments)
        return
    assert not note or note.startswith("with "), f"{place}: unknown note {note!r}"
    cli.main(arguments + shlex.split(note.removeprefix("with ")))


def request(arguments: list[str], place: str) -> None:
    """A request of `sightline serve`: its path and its fields are described."""
    from sightline.serve.openapi import FORMS, description

    path = urlsplit(arguments[0]).path
    assert path in description()["paths"], f"{place}: {path} is not described"
    fields = {text.partition("=")[0] for flag, text in pairwise(arguments) if flag == "-F"}
    assert fields <= FORMS.get(path, {}).keys(), f"{place}: {fields} are not described"


def check_command(words: list[str], note: str, place: str) -> None:
    program, *arguments = words
    if program == "sightline":
        sightline(arguments, note, place)
    elif program == "torchrun":
        started = arguments.index("sightline")
        assert arguments[started - 1] == "-m", place
        sightline(arguments[started + 1 :], note, place)
    elif program == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in arguments if "=" not in word} <= set(targets), place
    elif program == "pip":
        assert arguments[0] == "install", place
        extras = re.findall(r"\[(\w+)\]", " ".join(arguments))
        assert set(extras) <= {"train", "slides", "scale", "export", "serve", "docs", "dev"}, place
    elif program == "curl":
        request(arguments, place)
    elif program == "sbatch":
        array, *_, wrapped = arguments
        first, last = map(int, array.removeprefix("--array=").split("-"))
        for task in range(first, last + 1):
            check_command(shlex.split(wrapped.replace("$SLURM_ARRAY_TASK_ID", str(task))), note, place)
    elif program == "ray":
        from ray.scripts import scripts

        assert arguments[0] == "start", place
        scripts.start.make_context("start", arguments[1:])
    elif program in (".venv/bin/python", "python"):
        assert arguments[0] == "-m" or (ROOT / arguments[0]).is_file(), place
    else:
        assert program in ("git", "cd", "npm", "tar", "mv"), (
            f"{place}: {program} is not a command that this test knows how to check"
        )


def check_python(block: Block, names: dict[str, Any]) -> None:
    for line in MAGIC.findall(block.body):
        check_command(shlex.split(line), "", block.place)
    exec(compile(MAGIC.sub("pass", block.body), block.place, "exec"), names)
    if block.note:
        assert block.note.startswith("with "), f"{block.place}: unknown note {block.note!r}"
        exec(block.note.removeprefix("with "), names)


@pytest.mark.filterwarnings("ignore:weights. matched by their order")
@each_page
def test_page_runs(page: Path, reader: Path) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    printed = ""
    compat.report(clear=True)  # that of the whole process
    for block in blocks(page):
        if block.language == "python":
            with redirect_stdout(io.StringIO()) as output:
                check_python(block, names)
            printed = output.getvalue()
        elif block.language == "pycon":
            example = doctest.DocTestParser().get_doctest(block.body, names, block.place, str(page), 0)
            result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example, clear_globs=False)
            assert result.failed == 0, f"{block.place}: another output"
            names |= example.globs
        elif block.language == "yaml":
            path = reader / "recipe.yaml"
            path.write_text(block.body)
            recipe.load(path)
        elif block.language in ("bash", "console"):
            for words in commands(block):
                check_command(words, block.note, block.place)
        else:
            assert block.language == "text", f"{block.place}: {block.language} blocks are not tested"
            assert block.note in ("", "printed"), f"{block.place}: unknown note {block.note!r}"
            assert not block.note or block.body == printed, f"{block.place}: another output:\n{printed}"


@pytest.mark.parametrize("path", sorted((ROOT / "docs").rglob("*.ipynb")), ids=lambda path: path.name)
def test_notebook_is_made_of_its_page(path: Path) -> None:
    """If not: `jupytext --to ipynb --update PAGE` makes it again and keeps the outputs of cells that are equal."""
    page, notebook = jupytext.read(path.with_suffix(".md")), jupytext.read(path)
    cells = [[(cell.cell_type, cell.source) for cell in one.cells] for one in (page, notebook)]
    assert cells[0] == cells[1]
    assert page.metadata.kernelspec == notebook.metadata.kernelspec


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text()):
        if not target.startswith(("https://", "http://", "#")):
            assert (page.parent / target.partition("#")[0]).exists(), target


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_recipe_says_how_it_is_run_and_what_it_reached(path: Path) -> None:
    (bench.load_study if path.stem.startswith("bench_") else recipe.load)(path)
    header = dict(re.findall(r"^# (command|hardware|time|figure): (.+)$", path.read_text(), re.MULTILINE))
    assert header.keys() == {"command", "hardware", "time", "figure"}
    program, *arguments = shlex.split(header["command"])
    assert program == "sightline" and f"recipes/{path.name}" in arguments
    parse(arguments)


def test_every_entry_of_a_registry_has_its_row() -> None:
    from sightline.attention import ATTENTION
    from sightline.data import DATASETS
    from sightline.explainers import EXPLAINERS
    from sightline.metrics import METRICS, MOSAIC_METRICS
    from sightline.models import MODELS

    measures = METRICS | MOSAIC_METRICS
    registries = {
        "explanation/maps": EXPLAINERS,
        "explanation/measures": measures,
        "explanation/attention": ATTENTION,
        "reference/networks": MODELS,
        "reference/data": DATASETS,
    }
    for page, registry in registries.items():
        lines = (ROOT / f"docs/{page}.md").read_text().splitlines()
        rows = [line for line in lines if line.startswith("|")]
        assert [name for name in registry if not any(f"`{name}`" in row for row in rows)] == [], page


def test_readme_shows_each_method() -> None:
    import pictures

    from sightline.explainers import EXPLAINERS

    readme = (ROOT / "README.md").read_text()
    assert pictures.table() in readme, "write it anew: python docs/pictures.py"
    missing = {name for name in EXPLAINERS if not (pictures.THUMBNAILS / f"{name}.jpg").is_file()}
    assert missing <= {"attention_rollout", "gradient_rollout"}  # transformers alone; no trained one is at hand


def test_what_a_formula_may_ask_for_is_listed() -> None:
    from dataclasses import fields

    from sightline.explainers.evidence import Evidence

    section = (ROOT / "CONTRIBUTING.md").read_text().partition("### What a formula may ask for")[2].partition("\n#")[0]
    listed = re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
    assert sorted(listed) == sorted(field.name for field in fields(Evidence))


def test_a_broken_example_is_found(reader: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = reader / "page.md"
    monkeypatch.setitem(globals(), "ROOT", reader)
    for text, error, message in (
        ("```python\n1 / 0\n```\n", ZeroDivisionError, "division by zero"),
        ("```pycon\n>>> 1 + 1\n3\n```\n", AssertionError, "page.md:1: another output"),
        ("```yaml\noptim: {epoch: 3}\n```\n", ValueError, "did you mean 'optim.epochs'"),
        ("```bash\nrm -rf photos\n```\n", AssertionError, "rm is not a command"),
        ("```bash\ncurl http://a/explains\n```\n", AssertionError, "/explains is not described"),
        ("```bash\ncurl http://a/explain -F image=@a\n```\n", AssertionError, "image.* are not described"),
        (
            "```python\nprint(1)\n```\n<!-- test: printed -->\n```text\n2\n```\n",
            AssertionError,
            "page.md:5: another output",
        ),
        ("<!-- test: fast -->\n```bash\nsightline list\n```\n", AssertionError, "unknown note 'fast'"),
        ("<!-- test: fast -->\n```python\n1\n```\n", AssertionError, "unknown note 'fast'"),
        ("```python\nif 0:\n    %pip install 'sightline[trian]'\n```\n", AssertionError, "trian"),
        (
            "<!-- test: with a = 2 -->\n```python\na = 1\n```\n\n```python\n1 / (a - 2)\n```\n",
            ZeroDivisionError,
            "division by zero",
        ),
        ("```haskell\nmain\n```\n", AssertionError, "haskell blocks are not tested"),
    ):
        page.write_text(text)
        with pytest.raises(error, match=message):
            test_page_runs(page, reader)
