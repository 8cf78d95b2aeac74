"""Runs that go to a hub and come back: what is published, what stays here, what is refused."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import yaml
from huggingface_hub import constants
from tests.hub_stand_in import Hub, Repository, hub

import sightline as sl
from sightline import cli, models, runs
from sightline.data import Preprocess
from sightline.facts import Interval
from sightline.recipe import Data, Model, Optim, Recipe

# huggingface_hub's own upload of large files to a hub that does not speak Xet
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

PRIVATE = Recipe(
    data=Data(source="/data/clinic-7/slides", group="patient", classes="/data/clinic-7/lists.json"),
    model=Model(name="vgg_att2", options={"width": 1 / 16, "stem_pool": 2}, weights="/data/clinic-7/start.safetensors"),
    optim=Optim(teacher="../clinic-7/teacher"),
)
ROW = {"epoch": 1.0, "lr": 0.1, "train_loss": 2.0, "train_accuracy": 0.5, "val_loss": 1.5, "val_accuracy": 0.75}
EVALUATION = {
    "data": "/data/clinic-7/slides",
    "split": "test",
    "unit": "patient",
    "accuracy": {"value": 0.875, "low": 0.8, "high": 0.925, "n": 40},
    "summary": ["The model names the right class in 87.5 %.", "grad_cam does not reliably beat center_map."],
    "provenance": {"run": "/data/clinic-7/run"},
}


@pytest.fixture
def run(tmp_path: Path) -> runs.Run:
    torch.manual_seed(0)
    run = runs.Run(
        folder=tmp_path / "run",
        recipe=PRIVATE,
        seed=0,
        classes=("normal", "tumour"),
        preprocess=Preprocess(size=(24, 20), mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7)),
        info={
            "command": "sightline train --data /data/clinic-7/slides --optim.teacher=../clinic-7/teacher --seeds 0",
            "versions": "python 3.12, torch 2.13",
            "parameters": "1,234",
        },
        history=[ROW, ROW | {"epoch": 2.0, "val_accuracy": 0.5}],
        skipped=[("clinic-7/jane-doe.png", "cut off")],
    )
    runs.save(run, models.create_model("vgg_att2", num_classes=2, **PRIVATE.model.options).state_dict())
    for name in ("checkpoint.safetensors", "report.html", "per_image.csv", "tensorboard/events"):
        runs.write(run.folder / name, b"clinic-7")
    return run


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub of our own, an empty cache, and a login that may write."""
    with hub() as served:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", served.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", "hf_write")
        yield served


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that a refused command prints."""
    with pytest.raises(SystemExit) as stop:
        cli.main([str(argument) for argument in arguments])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("sightline: error: ")


def front_matter(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def test_a_run_goes_to_the_hub_and_comes_back(
    run: runs.Run, served: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(["push", str(run.folder), "jane/slides"])
    assert capsys.readouterr().out == f"pushed: {served.url}/jane/slides\n"
    assert not served.repositories["jane/slides"].private
    cli.main(["pull", "jane/slides", "--out", str(tmp_path / "back")])
    assert sorted(path.name for path in (tmp_path / "back").iterdir()) == [
        "metrics.csv",
        "model.safetensors",
        "recipe.yaml",
        "run.json",
    ]
    back = runs.open_run(tmp_path / "back")
    assert (back.classes, back.preprocess, back.history) == (run.classes, run.preprocess, run.history)
    images = torch.randn(2, 3, 24, 20)
    wanted = runs.load_model(run.folder)(images)
    assert torch.equal(sl.load(tmp_path / "back")(images), wanted)
    assert torch.equal(sl.load("hub:jane/slides")(images), wanted)


def test_a_run_with_everything_loses_what_is_named_and_nothing_else(run: runs.Run, served: Hub, tmp_path: Path) -> None:
    everything = replace(
        run,
        recipe=replace(PRIVATE, data=Data(source="clutter"), model=replace(PRIVATE.model, weights=None), optim=Optim()),
        preprocess=replace(run.preprocess, crop=0.875, interpolation="bicubic"),
        info={"command": "sightline train", "training": "by its own stages"},
        notices=["3 images of clinic-7 are copies"],
        probe=Interval(value=0.5, low=0.25, high=0.75, n=8),
    )
    runs.save(everything)
    learner = runs.pack({"weight": torch.ones(2, 3), "bias": torch.zeros(2)}, {"steps": 3, "lr": 0.5})
    runs.write(run.folder / runs.BASE_LEARNER, learner)
    sl.hub.push(run.folder, "jane/slides")
    back = sl.hub.pull("jane/slides", tmp_path / "back")
    assert back == replace(everything, folder=back.folder, notices=[], skipped=[])
    assert (back.folder / runs.BASE_LEARNER).read_bytes() == learner
    (run.folder / runs.BASE_LEARNER).unlink()
    sl.hub.push(run.folder, "jane/slides")
    assert runs.BASE_LEARNER not in served.files("jane/slides")  # it belonged to the earlier run


def test_a_network_of_your_own_goes_to_the_hub_and_comes_back(run: runs.Run, served: Hub, tmp_path: Path) -> None:
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 24 * 20, 2))
    model = Model(name=runs.own_name(network))
    runs.save(replace(run, recipe=replace(PRIVATE, model=model)), network.state_dict())
    sl.hub.push(run.folder, "jane/own")
    sl.hub.pull("jane/own", tmp_path / "back")
    images = torch.randn(2, 3, 24, 20)
    for source in ("hub:jane/own", tmp_path / "back"):
        assert torch.equal(sl.load(source, model=network)(images), network(images))
    card = served.files("jane/own")["README.md"].decode()
    assert 'sl.load("hub:jane/own", model=...)' in card and "sightline pull" not in card and "own:" not in card
    runs.write(run.folder / "model.safetensors", b"cut")
    with pytest.raises(ValueError, match="is damaged"):
        sl.hub.push(run.folder, "jane/own")


def test_only_five_files_are_published_and_nothing_of_the_machine(run: runs.Run, served: Hub) -> None:
    (run.folder / "evaluation.json").write_text(json.dumps(EVALUATION))
    sl.hub.push(run.folder, "jane/slides")
    files = served.files("jane/slides")
    assert sorted(files) == ["README.md", "metrics.csv", "model.safetensors", "recipe.yaml", "run.json"]
    for content in files.values():
        assert b"clinic-7" not in content and b"jane-doe" not in content
    assert served.large  # the weights went by git-LFS
    published = yaml.safe_load(files["recipe.yaml"])
    assert (published["data"]["source"], published["data"]["classes"]) == ("slides", "lists.json")
    assert (published["model"]["weights"], published["optim"]["teacher"]) == ("start.safetensors", "teacher")
    facts = json.loads(files["run.json"])
    assert facts["info"]["command"] == "sightline train --data slides --optim.teacher=teacher --seeds 0"
    assert facts["skipped"] == []
    assert runs.open_run(run.folder) == run


def test_paths_inside_options_and_behind_the_prefix_are_shortened(
    run: runs.Run, served: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"a": "/data/clinic-7/x", "b": [{"c": "hub:/data/clinic-7/y", "d": 1 / 16}], "e": "hub:jane/set:plain"}
    model = replace(PRIVATE.model, options=options)
    data = replace(PRIVATE.data, source="hub:../clinic-7/slides")
    runs.save(replace(run, recipe=replace(PRIVATE, model=model, data=data)))
    monkeypatch.setattr(runs, "load_model", lambda folder: None)
    sl.hub.push(run.folder, "jane/slides")
    files = served.files("jane/slides")
    assert not any(b"clinic-7" in content for content in files.values())
    published = yaml.safe_load(files["recipe.yaml"])
    assert published["model"]["options"] == {"a": "x", "b": [{"c": "y", "d": 1 / 16}], "e": "hub:jane/set:plain"}
    assert published["data"]["source"] == "slides"


@pytest.mark.parametrize("source", ["clutter", "cifar10", "hub:uoft-cs/cifar10:plain_text"])
def test_the_name_of_a_public_set_stays(run: runs.Run, served: Hub, source: str) -> None:
    runs.save(replace(run, recipe=replace(PRIVATE, data=Data(source=source))))
    sl.hub.push(run.folder, "jane/slides")
    files = served.files("jane/slides")
    assert yaml.safe_load(files["recipe.yaml"])["data"]["source"] == source
    found = front_matter(files["README.md"].decode()).get("datasets")
    assert found == (None if source == "clutter" else ["uoft-cs/cifar10"])


def test_the_card_says_what_was_measured(run: runs.Run) -> None:
    card = sl.hub.card(run, "jane/slides", EVALUATION)
    front = front_matter(card)
    assert (front["library_name"], front["pipeline_tag"]) == ("sightline", "image-classification")
    (result,) = front["model-index"][0]["results"]
    assert result["metrics"] == [{"type": "accuracy", "value": 0.875}]
    assert result["dataset"] == {"name": "slides", "type": "slides", "split": "test"}
    assert "Accuracy 87.5 % [80.0, 92.5] on slides, split test: 95 % interval over 40 groups (patient)." in card
    for sentence in EVALUATION["summary"]:
        assert f"\n- {sentence}\n" in card
    assert 'sl.load("hub:jane/slides")' in card and "sightline pull jane/slides --out run" in card
    assert "resized to 20 x 24 px, all of the image (bilinear)" in card
    assert "minus [0.1, 0.2, 0.3], divided by [0.5, 0.6, 0.7]" in card
    assert "normal, tumour" in card and "- versions: python 3.12, torch 2.13\n" in card


def test_the_card_of_a_run_without_evaluation(run: runs.Run) -> None:
    last = sl.hub.card(run, "jane/slides", None)
    assert front_matter(last)["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.5
    assert "Accuracy 50.0 % on validation images. It was not evaluated on test images." in last
    patient = replace(run, recipe=replace(PRIVATE, optim=Optim(patience=3)))
    assert "Accuracy 75.0 % on validation images." in sl.hub.card(patient, "jane/slides", None)
    unknown = sl.hub.card(replace(run, history=[ROW | {"val_accuracy": float("nan")}]), "jane/slides", None)
    assert "Its accuracy was not measured." in unknown and "metrics" not in front_matter(unknown)


def test_private_repositories(run: runs.Run, served: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["push", str(run.folder), "jane/secret", "--private"])
    assert served.repositories["jane/secret"].private
    cli.main(["push", str(run.folder), "jane/secret", "--private"])
    served.repositories["jane/open"] = Repository()
    capsys.readouterr()
    line = refused(capsys, "push", run.folder, "jane/open", "--private")
    assert line.startswith("expected jane/open to be private, it is public; ")
    assert served.files("jane/open") == {}


def test_pushing_again_makes_a_revision_and_the_older_one_stays(run: runs.Run, served: Hub, tmp_path: Path) -> None:
    sl.hub.push(run.folder, "jane/slides")
    first = list(served.repositories["jane/slides"].commits)[-1]
    runs.save(replace(run, history=[ROW]))
    sl.hub.push(run.folder, "jane/slides")
    assert len(sl.hub.pull("jane/slides", tmp_path / "new").history) == 1
    assert len(sl.hub.pull(f"jane/slides@{first}", tmp_path / "old").history) == 2
    assert sl.load(f"hub:jane/slides@{first}").training is False


def test_a_repository_of_something_else_is_not_overwritten(
    run: runs.Run, served: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    served.commit("jane/bert", {"README.md": b"BERT", "model.safetensors": b"other", "config.json": b"{}"})
    line = refused(capsys, "push", run.folder, "jane/bert")
    assert line.startswith("expected a new repository or one of a run, got jane/bert, which holds config.json; ")
    assert served.files("jane/bert")["README.md"] == b"BERT"
    served.commit("jane/other", {"run.json": b"{}"})
    assert "which holds run.json; " in refused(capsys, "push", run.folder, "jane/other")
    served.commit("jane/new", {".gitattributes": b"", "README.md": b"mine", "LICENSE": b"MIT"})
    sl.hub.push(run.folder, "jane/new")
    assert served.files("jane/new")["LICENSE"] == b"MIT" and served.files("jane/new")["README.md"] != b"mine"


def test_what_cannot_be_pushed(
    run: runs.Run, served: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "expected OWNER/NAME of a hub repository, got 'slides'; " in refused(capsys, "push", run.folder, "slides")
    assert "got the revision 'v1' too; " in refused(capsys, "push", run.folder, "jane/slides@v1")
    assert "nowhere: no such run" in refused(capsys, "push", tmp_path / "nowhere", "jane/slides")
    (run.folder / "evaluation.json").write_text("[]")
    assert "evaluation.json is damaged" in refused(capsys, "push", run.folder, "jane/slides")
    assert served.requests == []
    (run.folder / "evaluation.json").unlink()
    monkeypatch.setenv("HF_TOKEN", "hf_read")
    assert "jane/slides: the hub refuses this login (403); " in refused(capsys, "push", run.folder, "jane/slides")
    monkeypatch.delenv("HF_TOKEN")
    served.requests.clear()
    line = refused(capsys, "push", run.folder, "jane/slides")
    assert line == "expected a Hugging Face token to push, found none; log in: hf auth login"
    (run.folder / "model.safetensors").unlink()
    assert "has no model.safetensors yet" in refused(capsys, "push", run.folder, "jane/slides")
    assert served.requests == []


def test_what_cannot_be_pulled(
    run: runs.Run, served: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"

    def line(name: str) -> str:
        return refused(capsys, "pull", name, "--out", out)

    assert line("slides").startswith("expected OWNER/NAME of a hub repository, got 'slides'; ")
    assert line("jane/slides").startswith("jane/slides: no such repository on the hub, or none that you may see; ")
    served.commit("jane/bert", {"model.safetensors": b"other", "config.json": b"{}"})
    assert line("jane/bert").startswith("jane/bert is not a run, it has no recipe.yaml; ")
    sl.hub.push(run.folder, "jane/slides")
    assert line("jane/slides@v9").startswith("jane/slides@v9: the repository has no such ")
    files = served.files("jane/slides")
    served.commit("jane/weightless", {name: value for name, value in files.items() if "safetensors" not in name})
    assert line("jane/weightless").startswith("jane/weightless is not a run, it has no model.safetensors; ")
    served.commit("jane/damaged", files | {"run.json": b"{"})
    assert "is damaged or of another version" in line("jane/damaged")
    served.commit("jane/cut", files | {"model.safetensors": b"cut"})
    assert "cannot read" in line("jane/cut")
    assert not out.exists()
    assert not any("model.safetensors" in asked for asked in served.requests if "jane/bert" in asked)
    out.mkdir()
    (out / "mine").write_text("")
    assert line("jane/slides").endswith("out is not empty; choose a new folder")
    assert [path.name for path in out.iterdir()] == ["mine"]


def test_only_the_four_files_are_fetched_and_none_may_name_a_pickle(
    run: runs.Run, served: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sl.hub.push(run.folder, "jane/slides")
    served.commit("jane/slides", {"evil.py": b"raise SystemExit", "checkpoint.pt": b"", "sub/run.json": b""})
    sl.hub.fetch("jane/slides")
    cached = {path.name for path in (tmp_path / "cache").rglob("*") if path.is_symlink()}
    assert cached == {"metrics.csv", "model.safetensors", "recipe.yaml", "run.json"}
    evil = yaml.safe_load(served.files("jane/slides")["recipe.yaml"])
    for option in ("checkpoint_path", "cache_dir", "pretrained_cfg", "pretrained_cfg_overlay"):
        evil["model"] |= {"name": "resnet18", "options": {option: "/tmp/evil.pt"}}
        served.commit("jane/slides", {"recipe.yaml": yaml.safe_dump(evil).encode()})
        line = refused(capsys, "pull", "jane/slides", "--out", tmp_path / "out")
        assert f"got one with the option {option}; " in line
    served.commit("jane/slides", {"recipe.yaml": b"!!python/object/apply:os.system [exit 1]"})
    assert "is damaged" in refused(capsys, "pull", "jane/slides", "--out", tmp_path / "out")


def test_a_stranger_s_recipe_downloads_no_other_weights(
    run: runs.Run, served: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = models.create_model("protopnet", num_classes=2, prototypes=1, channels=4)
    wanted = Model(name="protopnet", options={"pretrained": True, "prototypes": 1, "channels": 4})
    runs.save(replace(run, recipe=replace(PRIVATE, model=wanted)), plain.state_dict())
    asked = []
    build = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda name, pretrained, **more: asked.append(pretrained) or build(name, **more)
    )
    sl.hub.push(run.folder, "jane/birds")
    sl.load("hub:jane/birds")
    assert asked == [False, False]


def test_without_network_the_cache_is_used(
    run: runs.Run, served: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commit = "0123456789" * 4
    folder = Path(constants.HF_HUB_CACHE) / "models--jane--slides"
    runs.write(folder / "refs" / "main", commit.encode())
    for name in ("metrics.csv", "model.safetensors", "recipe.yaml", "run.json"):
        runs.write(folder / "snapshots" / commit / name, (run.folder / name).read_bytes())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    images = torch.randn(2, 3, 24, 20)
    assert torch.equal(sl.load("hub:jane/slides")(images), runs.load_model(run.folder)(images))
    assert torch.equal(sl.load(f"hub:jane/slides@{commit}")(images), runs.load_model(run.folder)(images))
    assert served.requests == []
    line = refused(capsys, "pull", "jane/other", "--out", tmp_path / "out")
    assert line == "jane/other: not in the cache, and HF_HUB_OFFLINE is set; unset it and connect once"
    assert "HF_HUB_OFFLINE is set" in refused(capsys, "push", run.folder, "jane/other")
    (folder / "snapshots" / commit / "model.safetensors").unlink()
    line = refused(capsys, "pull", "jane/slides", "--out", tmp_path / "out")
    assert line == "weights of jane/slides: not in the cache, and HF_HUB_OFFLINE is set; unset it and connect once"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for constant in ("ENDPOINT", "HUGGINGFACE_CO_URL_TEMPLATE"):
        address = getattr(constants, constant).replace(served.url, "http://127.0.0.1:9")
        monkeypatch.setattr(constants, constant, address)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between its attempts
    line = refused(capsys, "pull", "jane/slides", "--out", tmp_path / "out")
    assert line.startswith("weights of jane/slides: cannot exchange files with the hub: ")


def test_a_hub_that_does_not_answer(
    run: runs.Run, served: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    for arguments in (("pull", "jane/slides", "--out", tmp_path / "out"), ("push", run.folder, "jane/slides")):
        line = refused(capsys, *arguments)
        assert line.startswith("jane/slides: cannot exchange files with the hub: ")
        assert line.endswith("; check the network")


def test_the_address_of_the_hub_is_taken_from_the_environment(run: runs.Run, served: Hub, tmp_path: Path) -> None:
    sl.hub.push(run.folder, "jane/slides")
    environment = os.environ | {"HF_ENDPOINT": served.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", "sightline", "pull", "hub:jane/slides", "--out", str(tmp_path / "back")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"run: {tmp_path / 'back'}\n", "")
