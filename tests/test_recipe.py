"""Recipes: what is read, what is refused, and in which words."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from sightline.recipe import Augment, Data, Model, Optim, Recipe, dump, load

RECIPES = [p for p in sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml")) if "bench_" not in p.name]


def test_every_field_survives_yaml(tmp_path: Path):
    recipe = Recipe(
        data=Data(source="tiles", group="patient", val=0.2, train_size=500, strict=True),
        augment=Augment(crop=4, flip=False, color=0.3),
        model=Model(name="vgg_att3", options={"width": 0.25, "compat": "dp", "project": None}),
        optim=Optim(lr=1e-5, optimizer="adamw", schedule="step", clip_norm=1.0, patience=3),
        seeds=(3, 1),
    )
    (tmp_path / "r.yaml").write_text(dump(recipe))
    assert load(tmp_path / "r.yaml") == recipe
    assert load(str(tmp_path / "r.yaml")) == recipe


def test_fields_left_out_keep_their_defaults(tmp_path: Path):
    (tmp_path / "r.yaml").write_text("optim:\n  lr: 1e-3\nmodel:\n")
    assert load(tmp_path / "r.yaml") == Recipe(optim=Optim(lr=0.001))
    (tmp_path / "empty.yaml").write_text("")
    assert load(tmp_path / "empty.yaml") == Recipe()


def test_overrides_change_single_fields_and_not_the_source():
    source = Recipe(model=Model(options={"width": 0.5, "norm": "sigmoid"}), optim=Optim(clip_norm=1.0))
    recipe = load(source, {"model.options.width": 0.25, "optim.clip_norm": None, "seeds": [4]})
    assert recipe == Recipe(model=Model(options={"width": 0.25, "norm": "sigmoid"}), seeds=(4,))
    assert source.model.options["width"] == 0.5


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("optim.epochs", "3", 3),
        ("optim.lr", "1e-4", 0.0001),
        ("optim.nesterov", "false", False),
        ("optim.patience", "null", None),
        ("data.group", "null", None),
        ("data.source", "2024", "2024"),
        ("model.options", "{width: 0.25}", {"width": 0.25}),
        ("seeds", "[0, 1]", (0, 1)),
        ("seeds", "0,1", (0, 1)),
        ("seeds", "3", (3,)),
    ],
)
def test_text_of_a_command_line(field: str, text: str, value: object):
    part, _, name = field.partition(".")
    section = getattr(load(Recipe(), {field: text}), part)
    assert (getattr(section, name) if name else section) == value


@pytest.mark.parametrize(
    ("field", "value", "error", "message"),
    [
        ("optim.epoch", 3, ValueError, r"^optim\.epoch: no such field in a recipe; did you mean 'optim\.epochs'\?$"),
        ("epochs", 3, ValueError, r"^epochs: no such field in a recipe; did you mean 'optim\.epochs'\?$"),
        ("augment.xyz", 3, ValueError, r"^augment\.xyz: no such .*; expected one of augment\.crop, .*augment\.mixup$"),
        ("xyz", 3, ValueError, r"expected one of data, augment, model, optim, watch, seeds$"),
        ("optim.epochs", "many", TypeError, r"^optim\.epochs: expected a whole number or null, got 'many'$"),
        ("optim.epochs", 2.5, TypeError, r"^optim\.epochs: expected a whole number or null, got 2\.5$"),
        ("optim.epochs", True, TypeError, r"^optim\.epochs: expected a whole number or null, got True$"),
        ("optim.lr", "fast", TypeError, r"^optim\.lr: expected a number or null, got 'fast'$"),
        ("optim.lr", False, TypeError, r"^optim\.lr: expected a number or null, got False$"),
        ("data.source", 3, TypeError, r"^data\.source: expected text, got 3$"),
        ("data.size", "big", TypeError, r"^data\.size: expected a whole number or null, got 'big'$"),
        ("optim.optimizer", "adma", TypeError, r"expected one of sgd, adamw, got 'adma'; did you mean 'adamw'\?$"),
        ("seeds", 3, TypeError, r"^seeds: expected a list of whole numbers such as \[0, 1, 2\], got 3$"),
        ("model.options.attention", print, TypeError, r"^model\.options: expected names with plain values"),
        ("optim", 3, TypeError, r"^optim: expected fields, got 3; write them indented below `optim:`$"),
        ("optim.epochs", 0, ValueError, r"^optim\.epochs: expected 1 or more, got 0$"),
        ("optim.lr", 0, ValueError, r"^optim\.lr: expected a finite number above 0, got 0$"),
        ("optim.lr", ".nan", TypeError, r"^optim\.lr: expected a number or null, got '\.nan'$"),
        ("optim.lr", float("nan"), ValueError, r"^optim\.lr: expected a finite number above 0, got nan$"),
        ("data.val", 1.0, ValueError, r"^data\.val: expected 0 or more and below 1, got 1\.0$"),
        ("augment.cutout", -1, ValueError, r"^augment\.cutout: expected 0 or more, got -1$"),
        ("data.shortcut", 1.5, ValueError, r"^data\.shortcut: expected between 0 and 1, got 1\.5$"),
        ("seeds", [], ValueError, r"^seeds: expected different whole numbers from 0 to 2\*\*32 - 1, got \[\]$"),
        ("seeds", [1, 1], ValueError, r"^seeds: expected different whole numbers"),
    ],
)
def test_wrong_fields_are_named_in_one_line(field: str, value: object, error: type[Exception], message: str):
    with pytest.raises(error, match=message) as caught:
        load(Recipe(), {field: value})
    assert "\n" not in str(caught.value)


def test_a_hand_built_recipe_is_checked_too():
    with pytest.raises(ValueError, match=r"^optim\.batch_size: expected 1 or more, got -1$"):
        load(replace(Recipe(), optim=Optim(batch_size=-1)))


def test_wrong_files(tmp_path: Path):
    (tmp_path / "clutter_demo.yaml").write_text("optim: [1, 2")
    with pytest.raises(FileNotFoundError, match=r"cluter_demo\.yaml not found; did you mean '.*clutter_demo\.yaml'\?$"):
        load(tmp_path / "cluter_demo.yaml")
    with pytest.raises(FileNotFoundError, match=r"nothing_like_it\.yaml not found; expected a YAML file$"):
        load(tmp_path / "nothing_like_it.yaml")
    with pytest.raises(ValueError, match=r"clutter_demo\.yaml is not YAML: .* line 1"):
        load(tmp_path / "clutter_demo.yaml")
    with pytest.raises(IsADirectoryError, match="is a folder; expected a recipe"):
        load(tmp_path)
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(TypeError, match=r"expected a recipe with the parts data, .*; got \[1\]$"):
        load(tmp_path / "list.yaml")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_of_the_repository_can_be_read_and_say_what_they_reach(path: Path):
    load(path)
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    for word in ("command:", "hardware:", "time:", "figure:"):
        assert any(word in line for line in header), f"{path.name}: the header has no {word}"


def test_importing_recipes_is_cheap():
    code = "import sightline.recipe, sys; print(sorted({'torch', 'jsonargparse', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
