"""Run folders: what is written comes back, and what is no run is refused in one line."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sightline import models, runs
from sightline.data import Preprocess
from sightline.recipe import Model, Optim, Recipe

TINY = Recipe(model=Model(name="vgg_att2", options={"width": 1 / 16, "stem_pool": 2}), optim=Optim(lr=0.05))
ROW = {"epoch": 1.0, "lr": 0.1, "train_loss": 2.0, "train_accuracy": 1 / 3, "val_loss": 1.5, "val_accuracy": 0.5}


@pytest.fixture
def run(tmp_path: Path) -> runs.Run:
    return runs.Run(
        folder=tmp_path / "run",
        recipe=TINY,
        seed=0,
        classes=("null", "eins", "zwei → 3"),
        preprocess=Preprocess(size=(24, 20), mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7)),
        info={"command": "sightline train", "parameters": "1,234"},
        history=[ROW, ROW | {"epoch": 2.0, "train_loss": 0.1 + 0.2}],
        skipped=[("a.jpg", "not an image")],
    )


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(3)
    return models.create_model(TINY.model.name, num_classes=3, **TINY.model.options)


def test_a_run_comes_back_as_it_was(run: runs.Run, model: nn.Module):
    runs.save(run, model.state_dict())
    assert runs.open_run(run.folder) == run
    assert runs.open_run(str(run.folder)) == run
    files = sorted(path.name for path in run.folder.iterdir())
    assert files == ["metrics.csv", "model.safetensors", "recipe.yaml", "run.json"]


def test_a_cropping_run_and_one_of_an_older_version(run: runs.Run):
    runs.save(run)
    facts = json.loads((run.folder / "run.json").read_text())
    assert facts["preprocess"].keys() == {"size", "mean", "std"}
    cropping = replace(run, preprocess=replace(run.preprocess, crop=0.875, interpolation="bicubic"))
    runs.save(cropping)
    assert runs.open_run(run.folder) == cropping
    for damage in ({"crop": "much"}, {"crop": 2}, {"interpolation": "code"}):
        (run.folder / "run.json").write_text(json.dumps(facts | {"preprocess": facts["preprocess"] | damage}))
        with pytest.raises(ValueError, match="is damaged or of another version: "):
            runs.open_run(run.folder)


def test_a_loaded_model_gives_the_same_logits(run: runs.Run, model: nn.Module):
    runs.save(run, model.to(memory_format=torch.channels_last).state_dict())
    before = torch.get_rng_state()
    loaded = runs.load_model(run.folder)
    images = torch.randn(2, 3, 24, 20, generator=torch.Generator().manual_seed(0))
    assert not any(module.training for module in loaded.modules())
    assert torch.equal(loaded(images), model.eval().to(memory_format=torch.contiguous_format)(images))
    assert torch.equal(torch.get_rng_state(), before)


def test_saving_without_weights_leaves_those_that_are_there(run: runs.Run, model: nn.Module):
    runs.save(run, model.state_dict())
    runs.save(replace(run, history=[ROW] * 3))
    assert torch.equal(
        runs.load_model(run.folder).state_dict()["head.linear.weight"], model.state_dict()["head.linear.weight"]
    )
    assert len(runs.open_run(run.folder).history) == 3


def test_a_run_before_its_first_epoch(run: runs.Run):
    runs.save(replace(run, history=[]))
    assert runs.open_run(run.folder).history == []
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors yet; train it .* with --resume$"):
        runs.load_model(run.folder)


def test_what_is_no_run_is_refused(run: runs.Run, model: nn.Module, tmp_path: Path):
    with pytest.raises(
        FileNotFoundError, match=r"nowhere: no such run; expected a folder that `sightline train` wrote"
    ):
        runs.load_model(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"is not a run, it has no recipe\.yaml; expected"):
        runs.open_run(tmp_path)
    runs.save(replace(run, folder=tmp_path / "seed-1"), model.state_dict())
    with pytest.raises(FileNotFoundError, match=r"is not a run, .*; open one of seed-1 in it$"):
        runs.open_run(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"seed": 0}'])
def test_a_damaged_run_is_refused(run: runs.Run, content: str):
    runs.save(run)
    (run.folder / "run.json").write_text(content)
    with pytest.raises(ValueError, match=r"run .* is damaged or of another version: .") as caught:
        runs.open_run(run.folder)
    assert "\n" not in str(caught.value)


ODD = [None, 7, -1, 0.5, float("nan"), 10**30, "text", "", True, [], [1, "two"], {}, {"a": 1}, [[[]]]]


@pytest.mark.parametrize("key", ["seed", "classes", "preprocess", "info", "skipped", "size", "mean", "std"])
def test_every_fact_of_a_run_is_checked(run: runs.Run, key: str):
    runs.save(run)
    file = run.folder / "run.json"
    whole = json.loads(file.read_text())
    valid = {"seed": [7], "info": [{}], "skipped": [[]]}.get(key, [])
    for value in [*ODD, "missing"]:
        facts = json.loads(file.read_text())
        part = facts if key in facts else facts["preprocess"]
        if value == "missing":
            del part[key]
        else:
            part[key] = value
        file.write_text(json.dumps(facts))
        if any(value == good and type(value) is type(good) for good in valid):
            runs.open_run(run.folder)
        else:
            with pytest.raises(
                ValueError, match=rf"run .* is damaged or of another version: expected .*\b{key}\b.*got"
            ):
                runs.open_run(run.folder)
        file.write_text(json.dumps(whole))


@pytest.mark.parametrize("numbers", [[0, 24], [24], [24, 24, 24], [24.5, 24], [10**9, 10**9], ["24", "24"]])
def test_a_size_that_is_none(run: runs.Run, numbers: list[Any]):
    runs.save(run)
    facts = json.loads((run.folder / "run.json").read_text())
    facts["preprocess"]["size"] = numbers
    (run.folder / "run.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=r"expected two whole numbers from 1 to 16,384 as size in preprocess, got \["):
        runs.open_run(run.folder)


HEAD = "epoch,lr,train_loss,train_accuracy,val_loss,val_accuracy"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", r"expected the columns epoch, lr, .* in metrics\.csv, got a, b$"),
        ("epoch,lr,train_loss\n1,2,3\n", "expected the columns"),
        (f"{HEAD}\n1,2\n", "got epoch, lr$"),
        (f"{HEAD}\n1,2,3,4,5,6,7\n", "got epoch, .*None$"),
        (f"{HEAD}\n1,2,3,4,5,x\n", "could not convert string to float: 'x'"),
        (f"{HEAD}\n{'1' * 200_000},2,3,4,5,6\n", r"metrics\.csv is not a table: field larger than field limit"),
        ('epoch,lr\n"1,2\n', r"metrics\.csv is not a table: unexpected end of data"),
    ],
)
def test_another_table_than_the_history(run: runs.Run, text: str, message: str):
    runs.save(run)
    (run.folder / "metrics.csv").write_text(text)
    with pytest.raises(ValueError, match=f"run .* is damaged or of another version: .*{message}"):
        runs.open_run(run.folder)


@pytest.mark.parametrize("content", [b"[" * 100_000, b"{a: " * 3000, b"\0" * 10, b"\xff\xfe\x80"])
def test_files_that_no_parser_ends(run: runs.Run, content: bytes):
    runs.save(run)
    for file in ("run.json", "recipe.yaml"):
        whole = (run.folder / file).read_bytes()
        (run.folder / file).write_bytes(content)
        with pytest.raises(ValueError, match=r"run .* is damaged or of another version: .") as caught:
            runs.open_run(run.folder)
        assert "\n" not in str(caught.value)
        (run.folder / file).write_bytes(whole)


def test_weights_that_are_cut_off_or_of_another_model(run: runs.Run, model: nn.Module):
    runs.save(run, model.state_dict())
    weights = run.folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(OSError, match=r"cannot read .*model\.safetensors"):
        runs.load_model(run.folder)
    runs.save(replace(run, recipe=replace(TINY, model=Model(name="vgg"))), model.state_dict())
    with pytest.raises(ValueError, match="do not fit"):
        runs.load_model(run.folder)


def test_write_leaves_the_old_file_where_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    runs.write(tmp_path / "file", b"old")
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        runs.write(tmp_path / "file", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


def test_pack_and_unpack(tmp_path: Path):
    tied = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    tensors = {"a": tied, "b": tied, "count": torch.tensor(7), "view": tied[:, 1]}
    facts = {"epoch": 3, "best": -float("inf"), "history": [ROW]}
    runs.write(tmp_path / "c", runs.pack(tensors, facts))
    back, facts_back = runs.unpack(tmp_path / "c")
    assert facts_back == facts
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)
    (tmp_path / "c").write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match="is damaged"):
        runs.unpack(tmp_path / "c")


def test_a_folder_is_tried_without_touching_what_is_in_it(tmp_path: Path):
    (tmp_path / ".writable").write_text("mine")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(runs.check_writable, [tmp_path / f"run-{i}" for i in range(200)]))
    assert [file.read_text() for file in tmp_path.iterdir()] == ["mine"]
