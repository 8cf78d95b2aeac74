"""Weights and class names from the files that people have: prefixes, pickles, byte order marks."""

import json
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tests.test_cli import refused, sightline

from sightline.data.tables import read_class_names
from sightline.models import create_model


@pytest.fixture(scope="module")
def trained():
    """A small network with three classes; its last layer tells it from others of its kind."""
    return create_model("test_resnet", num_classes=3).eval()


def state(model, prefix=""):
    return {prefix + key: value.clone() for key, value in model.state_dict().items()}


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.", "_orig_mod.module.", "net.backbone."]
)
def test_a_prefix_in_front_of_all_names_is_left_out(prefix, trained, tmp_path):
    save_file(state(trained, prefix), tmp_path / "w.safetensors")
    model = create_model("test_resnet", num_classes=3, weights=tmp_path / "w.safetensors")
    for key, value in trained.state_dict().items():
        assert torch.equal(model.state_dict()[key], value)


def test_parts_compiled_alone_and_averaged_weights(trained, tmp_path):
    compiled = {key.replace("layer1.", "layer1._orig_mod."): value for key, value in state(trained).items()}
    save_file(compiled, tmp_path / "compiled.safetensors")
    averaged = torch.optim.swa_utils.AveragedModel(trained).state_dict()
    assert "n_averaged" in averaged
    save_file(averaged, tmp_path / "averaged.safetensors")
    for name in ("compiled", "averaged"):
        model = create_model("test_resnet", num_classes=3, weights=tmp_path / f"{name}.safetensors")
        assert torch.equal(model.fc.weight, trained.fc.weight)


def test_a_prefix_with_weights_that_know_no_blocks(trained, tmp_path):
    save_file(state(trained, "module."), tmp_path / "w.safetensors")
    images = torch.rand(2, 3, 64, 64)
    options = {"num_classes": 3, "attention": "se", "attention_options": {"reduction": 4}}
    model = create_model("test_resnet", weights=tmp_path / "w.safetensors", **options).eval()
    assert torch.equal(model(images), trained(images))  # the blocks start as the identity
    save_file(state(model, "module."), tmp_path / "with-blocks.safetensors")
    again = create_model("test_resnet", weights=tmp_path / "with-blocks.safetensors", **options).eval()
    assert torch.equal(again(images), trained(images))


def test_two_networks_in_one_file_are_told_apart_by_their_owner(trained, tmp_path):
    more = state(trained, "model.") | {"loss.weight": torch.ones(3)}
    save_file(more, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"names below 'model\.' fit; save these alone, without 'model\.' in front"):
        create_model("test_resnet", num_classes=3, weights=tmp_path / "w.safetensors")


@pytest.mark.parametrize("prefix", ["", "module."])
def test_another_number_of_classes_is_named(prefix, trained, tmp_path):
    save_file(state(trained, prefix), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"; give num_classes=3, they are those of 3 classes, not 5$"):
        create_model("test_resnet", num_classes=5, weights=tmp_path / "w.safetensors")


def test_another_network_is_named_where_the_files_beside_tell(trained, tmp_path):
    save_file(state(trained), tmp_path / "model.safetensors")
    with pytest.raises(
        ValueError,
        match=r"do not fit test_vit: .*; \d+ of its \d+ names are there, so they belong to another network, they start "
        r"with bn1\.bias; give its name",
    ):
        create_model("test_vit", num_classes=3, weights=tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "test_resnet", "num_classes": 3}))
    with pytest.raises(ValueError, match="they are those of test_resnet with 3 classes; give that name"):
        create_model("test_vit", num_classes=3, weights=tmp_path)


def lightning(weights):
    return {"epoch": 3, "pytorch-lightning_version": "2.6.0", "state_dict": weights, "hyper_parameters": {"lr": 0.1}}


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (lambda weights: weights, "a pickle that torch.save wrote"),
        (lambda weights: {"model": weights, "epoch": 3}, "a pickle that torch.save wrote"),
        (lambda weights: {"model_state_dict": weights, "epoch": 3}, "a pickle that torch.save wrote"),
        (lightning, "a Lightning checkpoint"),
    ],
    ids=["weights", "model", "model_state_dict", "lightning"],
)
@pytest.mark.parametrize("old", [False, True], ids=["zip", "old"])
def test_a_pickle_is_recognized_and_the_two_lines_convert_it(content, what, old, trained, tmp_path):
    file = tmp_path / "w.pth"
    torch.save(content(state(trained, "model.")), file, _use_new_zipfile_serialization=not old)
    with pytest.raises(OSError, match=rf"expected a safetensors file, cannot read .*; it is {what}; convert it") as e:
        create_model("test_resnet", num_classes=3, weights=file)
    exec(str(e.value).partition("convert it once: ")[2])
    model = create_model("test_resnet", num_classes=3, weights=tmp_path / "w.safetensors")
    assert torch.equal(model.fc.weight, trained.fc.weight)
    assert load_file(tmp_path / "w.safetensors").keys() == state(trained, "model.").keys()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"<!DOCTYPE html><html>Sign in", "it is a web page; download the file itself"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "it is a pointer of Git LFS; .*: git lfs pull"),
        (b'{"metadata": {}, "weight_map": {}}', "it is JSON; give the safetensors file that belongs to it"),
        (b"\x89HDF\r\n\x1a\n", "it is an HDF5 file, as Keras writes them"),
        (b"\x1f\x8b\x08", "it is compressed; unpack it"),
        (b"", r"is it complete\?"),
    ],
)
def test_other_files_are_recognized(content, said, tmp_path):
    (tmp_path / "w.safetensors").write_bytes(content + b"\0" * (100 if content.startswith(b"\x89") else 0))
    with pytest.raises(OSError, match=f"expected a safetensors file, cannot read .*; {said}"):
        create_model("test_resnet", num_classes=3, weights=tmp_path / "w.safetensors")


def test_other_archives_are_recognized(trained, tmp_path):
    with zipfile.ZipFile(tmp_path / "w.zip", "w") as archive:
        archive.writestr("model.safetensors", b"0")
    with pytest.raises(OSError, match="it is a zip archive; unpack it"):
        create_model("test_resnet", weights=tmp_path / "w.zip")
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        archive.writestr("net/data.pkl", b"\x80\x02.")
        archive.writestr("net/code/__torch__.py", b"")
    with pytest.raises(OSError, match="it is a TorchScript archive; save the state_dict"):
        create_model("test_resnet", weights=tmp_path / "script.pt")
    torch.save(state(trained), tmp_path / "w.pth")
    whole = (tmp_path / "w.pth").read_bytes()
    at = whole.rindex(b"data.pkl")
    for content in (whole[:-1000], whole[: len(whole) // 2], whole[: at - 30] + b"?" * 20 + whole[at - 10 :]):
        (tmp_path / "cut.pth").write_bytes(content)
        with pytest.raises(OSError, match=r"it is a zip archive, perhaps of torch\.save, and damaged; is it complete"):
            create_model("test_resnet", weights=tmp_path / "cut.pth")


@pytest.mark.parametrize(
    "content",
    [
        "Katze\nHündin\nMolch\n".encode(),
        "\ufeffKatze\r\nHündin\r\nMolch\r\n".encode(),
        "Katze\nHündin\nMolch".encode("utf-16"),
        "Katze\rHündin\rMolch\r\n\n".encode(),
    ],
    ids=["plain", "mark", "utf-16", "returns"],
)
def test_class_names_in_the_forms_of_editors(content, tmp_path):
    (tmp_path / "c.txt").write_bytes(content)
    assert read_class_names(tmp_path / "c.txt") == ["Katze", "Hündin", "Molch"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("Katze\nHündin\n".encode("cp1252"), "got other bytes in line 2; save it as UTF-8"),
        (b"cat\n\nnewt\n", "got none in line 2; remove or fill empty lines"),
        (b"cat\ndog\ncat\n", "got 'cat' in lines 1 and 3"),
        (b"cat,dog,newt\n", "got 'cat,dog,newt'; write one per line"),
        (b'["cat", "dog"]', "expected a text file with one class name per line, got '"),
        (b" \n", "one class name per line, it is empty"),
    ],
)
def test_class_names_that_are_none(content, said, tmp_path):
    (tmp_path / "c.txt").write_bytes(content)
    with pytest.raises(ValueError, match=said):
        read_class_names(tmp_path / "c.txt")


def test_explain_takes_such_files(trained, tmp_path, capsys):
    Image.fromarray(np.full((40, 60, 3), 90, np.uint8)).save(tmp_path / "a.png")
    save_file(state(trained, "module."), tmp_path / "w.safetensors")
    (tmp_path / "c.txt").write_bytes("\ufeffcat\r\ndog\r\nnewt\r\n".encode())
    (tmp_path / "four.txt").write_bytes(b"cat\ndog\nnewt\neel\n")
    given = ["explain", "test_resnet", tmp_path / "a.png", "--weights", tmp_path / "w.safetensors", "--out"]
    sightline(*given, tmp_path / "maps", "--classes", tmp_path / "c.txt", "--target", "cat")
    assert ",cat," in (tmp_path / "maps/maps.csv").read_text(encoding="utf-8")
    said = refused(capsys, *given, tmp_path / "out", "--classes", tmp_path / "four.txt")
    assert "give num_classes=3, they are those of 3 classes, not 4; " in said and "four.txt names 4 classes" in said
