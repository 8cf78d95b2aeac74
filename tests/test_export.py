"""Exported networks compute what the run computes; without the shape checker, which torch.export cannot trace."""

import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sightline import cli, data, export, models, report, runs
from sightline.recipe import Model, Recipe
from sightline.serve.service import open_service
from sightline.testing import PooledModel

pytestmark = pytest.mark.compile

NETWORKS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "learned attention": ("vgg_att2", {"width": 1 / 16, "stem_pool": 2}, ["attention.conv10", "attention.conv13"]),
    "no attention": ("vgg15", {"width": 1 / 16, "stem_pool": 2}, []),
    "an inserted block": (
        "cifar_resnet",
        {"depth": 8, "attention": "se"},
        [f"layer{i}.0.bn2.attention" for i in (1, 2, 3)],
    ),
    "a pooling": ("vgg_gap", {"width": 1 / 16, "stem_pool": 2, "attention": "brnpa"}, ["pool.1.attention"]),
    "a transformer": ("tiny_vit", {"depth": 2}, ["blocks.0.attn", "blocks.1.attn"]),
}


def trained(folder: Path, name: str, options: dict[str, Any]) -> Path:
    torch.manual_seed(0)
    run = runs.Run(
        folder=folder,
        recipe=Recipe(model=Model(name=name, options=options)),
        seed=0,
        classes=("null", "eins", "zwei → 3"),
        preprocess=data.Preprocess(size=(32, 32), mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7)),
        info={},
        history=[],
        skipped=[],
    )
    runs.save(run, models.create_model(name, num_classes=3, **options).state_dict())
    return folder


def pixels(n: int) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, 32, 32), generator=torch.Generator().manual_seed(10 + n), dtype=torch.uint8)


def expected(folder: Path, images: torch.Tensor, blocks: list[str]) -> list[torch.Tensor]:
    """Logits of the loaded run on images normalized by hand, and what its gates yielded."""
    model, kept = runs.load_model(folder), {}
    for name in blocks:
        model.get_submodule(f"{name}.gate").register_forward_hook(
            lambda gate, inputs, output, name=name: kept.__setitem__(name, output)
        )
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.6, 0.7])
    with torch.no_grad():
        logits = model((images.float() / 255 - mean[:, None, None]) / std[:, None, None])
    return [logits, *(kept[name] for name in blocks)]


def assert_no_folder(content: bytes, folder: Path) -> None:
    """No folder of this machine is in a file that is made to be given away."""
    assert str(Path(runs.__file__).parent).encode() not in content and str(folder).encode() not in content


def assert_same(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()


@pytest.mark.parametrize("network", ["learned attention", "an inserted block", "a transformer"])
def test_onnx_gives_the_logits_and_the_maps(network: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    name, options, blocks = NETWORKS[network]
    folder = trained(tmp_path / "run", name, options)
    found = export(folder, tmp_path / "net.onnx")
    assert found.outputs == ("logits", *blocks) and found.size == (32, 32)
    assert found.difference is not None and found.difference <= 1e-5
    session = onnxruntime.InferenceSession(found.path)
    (given,) = session.get_inputs()
    assert (given.name, given.type, given.shape[1:]) == ("images", "tensor(uint8)", [3, 32, 32])
    assert tuple(output.name for output in session.get_outputs()) == found.outputs
    for n in (1, 3):
        outputs = session.run(None, {"images": pixels(n).numpy()})
        assert_same([torch.from_numpy(output) for output in outputs], expected(folder, pixels(n), blocks))
    facts = {name: json.loads(value) for name, value in session.get_modelmeta().custom_metadata_map.items()}
    assert facts["classes"] == ["null", "eins", "zwei → 3"]
    assert facts["preprocess"] == {"size": [32, 32], "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]}
    assert facts["outputs"] == ["logits", *blocks]
    assert_no_folder(found.path.read_bytes(), tmp_path)


@pytest.mark.parametrize("network", NETWORKS)
def test_an_exported_program_gives_the_logits_and_the_maps(network: str, tmp_path: Path) -> None:
    name, options, blocks = NETWORKS[network]
    folder = trained(tmp_path / "run", name, options)
    found = export(folder, tmp_path / "net.pt2")
    assert found.outputs == ("logits", *blocks) and found.difference is not None and found.difference <= 1e-5
    facts = {"sightline.json": ""}
    program = torch.export.load(found.path, extra_files=facts).module()
    for n in (1, 3):
        assert_same(list(program(pixels(n))), expected(folder, pixels(n), blocks))
    assert json.loads(facts["sightline.json"])["classes"] == ["null", "eins", "zwei → 3"]
    with zipfile.ZipFile(found.path) as archive:
        assert_no_folder(b"".join(map(archive.read, archive.namelist())), tmp_path)


def test_a_wrong_export_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = trained(tmp_path / "run", *NETWORKS["no attention"][:2])
    load = torch.export.load

    class Wrong:
        def __init__(self, file: Any) -> None:
            self.program = load(file).module()

        def module(self) -> Any:
            return lambda images: [output * 1.001 for output in self.program(images)]

    monkeypatch.setattr(torch.export, "load", Wrong)
    with pytest.raises(RuntimeError, match=r"vgg15 by at most 0\.0001 .* got 0\.001 in logits; nothing was written"):
        export(folder, tmp_path / "net.pt2")
    assert not (tmp_path / "net.pt2").exists()


def test_without_the_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = trained(tmp_path / "run", *NETWORKS["no attention"][:2])
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxscript", None)
        with pytest.raises(ModuleNotFoundError, match=r"onnxscript; install it: pip install 'sightline\[export\]'"):
            export(folder, tmp_path / "net.onnx")
    pytest.importorskip("onnxscript")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert export(folder, tmp_path / "net.onnx").difference is None


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = trained(tmp_path / "run", *NETWORKS["learned attention"][:2])
    cli.main(["export", str(folder), "--out", str(tmp_path / "net.pt2")])
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"{tmp_path}/net.pt2: images uint8 (b, 3, 32, 32) -> logits, attention.conv10, attention.conv13"
    assert second == "checked: differs from the network by at most 0.0e+00 of the largest value"
    (tmp_path / "folder.pt2").mkdir()
    for wanted, message in (
        (("export", folder, "--out", tmp_path / "net.tflite"), "expected a file name that ends in .onnx or .pt2, got "),
        (("export", folder, "--out", tmp_path / "folder.pt2"), "expected the name of a file, got the folder "),
        (("export", tmp_path / "nowhere", "--out", tmp_path / "net.pt2"), "nowhere: no such run"),
        (("export", folder, "--out", folder / "run.json" / "net.pt2"), "run.json is a file; expected a folder"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main([str(word) for word in wanted])
        (line,) = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and message in line


def test_a_network_that_cannot_be_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stubborn(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.mean((2, 3)) if bool(images.sum() > np.pi) else images.amax((2, 3))  # three classes

    folder = trained(tmp_path / "run", *NETWORKS["no attention"][:2])
    monkeypatch.setattr(runs, "load_model", lambda folder: Stubborn())
    with pytest.raises(ValueError, match="cannot export vgg15 for any number of images: ") as caught:
        export(folder, tmp_path / "net.pt2")
    assert "\n" not in str(caught.value) and not (tmp_path / "net.pt2").exists()


def test_class_names_are_as_many_as_the_classes(tmp_path: Path) -> None:
    model, preprocess = PooledModel(torch.eye(3)), data.Preprocess(size=(8, 8), mean=(0, 0, 0), std=(1, 1, 1))
    message = "expected 3 class names, one per class of the model, got 2; name all of them, or none"
    with pytest.raises(ValueError, match=message):
        export(model, tmp_path / "net.pt2", preprocess, ["cat", "dog"])
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "black.png")
    with pytest.raises(ValueError, match=message):
        report.pages(
            model,
            [tmp_path / "black.png"],
            tmp_path / "pages",
            ["grad_cam"],
            preprocess=preprocess,
            classes=["cat", "dog"],
        )
    with pytest.raises(ValueError, match=message):
        open_service(model, preprocess=preprocess, classes=["cat", "dog"])
