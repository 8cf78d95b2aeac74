"""Weights and class names from the files that people have: prefixes, pickles, checkpoints, byte order marks."""

import json
import os
import re
import zipfile
from collections import OrderedDict
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tests.test_cli import refused, sightline

from sightline.data.tables import read_class_names
from sightline.facts import Notice
from sightline.models import create_model
from sightline.models.pretrained import by_order, other_classes


@pytest.fixture(scope="module")
def trained():
    """A small network with three classes; its last layer tells it from others of its kind."""
    return create_model("test_resnet", num_classes=3).eval()


def state(model, prefix=""):
    return {prefix + key: value.clone() for key, value in model.state_dict().items()}


def same(model, other):
    names = other.state_dict().keys() & model.state_dict().keys()
    assert len(names) == len(other.state_dict()) == len(model.state_dict())
    return all(torch.equal(model.state_dict()[key], other.state_dict()[key]) for key in names)


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.", "_orig_mod.module.", "net.backbone."]
)
def test_a_prefix_in_front_of_all_names_is_left_out(prefix, trained, tmp_path):
    save_file(state(trained, prefix), tmp_path / "w.safetensors")
    with pytest.warns(Notice, match=rf"^weights: '{prefix}' taken off the names \({prefix}\S+ became \S+, \.\.\.\)$"):
        model = create_model("test_resnet", num_classes=3, weights=tmp_path / "w.safetensors")
    assert same(model, trained)


def test_parts_compiled_alone_and_averaged_weights(trained, tmp_path):
    compiled = {key.replace("layer1.", "layer1._orig_mod."): value for key, value in state(trained).items()}
    save_file(compiled, tmp_path / "compiled.safetensors")
    averaged = torch.optim.swa_utils.AveragedModel(trained).state_dict()
    assert "n_averaged" in averaged
    save_file(averaged, tmp_path / "averaged.safetensors")
    for name, prefix in (("compiled", "_orig_mod."), ("averaged", "module.")):
        with pytest.warns(Notice, match=f"'{prefix}' taken off"):
            model = create_model("test_resnet", num_classes=3, weights=tmp_path / f"{name}.safetensors")
        assert same(model, trained)


def test_a_prefix_with_weights_that_know_no_blocks(trained, tmp_path):
    save_file(state(trained, "module."), tmp_path / "w.safetensors")
    images = torch.rand(2, 3, 64, 64)
    options = {"num_classes": 3, "attention": "se", "attention_options": {"reduction": 4}}
    with pytest.warns(Notice, match="'module.' taken off"):
        model = create_model("test_resnet", weights=tmp_path / "w.safetensors", **options).eval()
    assert torch.equal(model(images), trained(images))  # the blocks start as the identity
    save_file(state(model, "module."), tmp_path / "with-blocks.safetensors")
    with pytest.warns(Notice, match="'module.' taken off"):
        again = create_model("test_resnet", weights=tmp_path / "with-blocks.safetensors", **options).eval()
    assert torch.equal(again(images), trained(images))


def test_what_lies_beside_the_network_is_left_out(trained, tmp_path):
    more = state(trained, "model.") | {"loss.weight": torch.ones(3)}
    save_file(more, tmp_path / "w.safetensors")
    with pytest.warns(Notice, match=r"^weights: those below 'model\.'; left out: loss\.weight$"):
        assert same(create_model("test_resnet", num_classes=3, weights=tmp_path / "w.safetensors"), trained)
    save_file(more | state(trained, "average."), tmp_path / "two.safetensors")
    with pytest.raises(ValueError, match=r"names below '\w+\.' fit; save these alone, without '\w+\.' in front"):
        create_model("test_resnet", num_classes=3, weights=tmp_path / "two.safetensors")


@pytest.mark.parametrize("prefix", ["", "module."])
def test_another_number_of_classes(prefix, trained, tmp_path):
    """Refused unless a number is asked for; then the head stays fresh and all else is loaded."""
    save_file(state(trained, prefix), tmp_path / "w.safetensors")
    message = r"; give num_classes=3, they are those of 3 classes, not (5|1000)$"
    for asked in ({"num_classes": 5, "new_head": False}, {}):
        with pytest.raises(ValueError, match=message):
            create_model("test_resnet", weights=tmp_path / "w.safetensors", **asked)
    for options in ({}, {"attention": "se", "attention_options": {"reduction": 4}}):
        text = r"^weights: fc\.weight, fc\.bias start fresh: those of the file are of 3 classes, not 5$"
        with pytest.warns(Notice) as told:
            model = create_model("test_resnet", num_classes=5, weights=tmp_path / "w.safetensors", **options).eval()
        assert re.match(text, str(told[-1].message)) and len(told) == 1 + bool(prefix)
        images = torch.rand(2, 3, 64, 64)
        model.fc = trained.fc
        assert torch.equal(model(images), trained(images))


def test_another_network_is_named_where_the_files_beside_tell(trained, tmp_path):
    save_file(state(trained), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"belong to another network; give its name$") as error:
        create_model("test_vit", num_classes=3, weights=tmp_path)
    differences = str(error.value).partition(" do not fit test_vit: ")[2].partition(" (and ")[0].split(", ")
    assert len(differences) == 10 and "\n" not in str(error.value)
    assert differences[0] == "cls_token is missing" and re.fullmatch(r"\S+ is unknown to the model", differences[1])
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "test_resnet", "num_classes": 3}))
    with pytest.raises(ValueError, match="they are those of test_resnet with 3 classes; give that name"):
        create_model("test_vit", num_classes=3, weights=tmp_path)


CHECKPOINTS = {
    "weights": (lambda weights: weights, None),
    "ordered": (OrderedDict, None),
    "parameters": (lambda weights: {key: torch.nn.Parameter(value, False) for key, value in weights.items()}, None),
    "model": (lambda weights: {"model": weights, "epoch": 3, "optimizer": {"state": {0: weights}}}, "'model' are used"),
    "net": (lambda weights: {"net": weights, "rng": torch.zeros(9), "optimizer": {"moments": weights}}, "'net' are"),
    "model_state_dict": (lambda weights: {"model_state_dict": weights, "epoch": 3}, "'model_state_dict' are used"),
    "lightning": (
        lambda weights: {
            "epoch": 3,
            "pytorch-lightning_version": "2.6.0",
            "state_dict": weights,
            "hyper_parameters": {"lr": 0.1},
        },
        "'state_dict' are used",
    ),
    "average": (
        lambda weights: {"state_dict_ema": {key: 0 * value for key, value in weights.items()}, "state_dict": weights},
        "'state_dict' are used, not those under 'state_dict_ema'",
    ),
    "only-average": (lambda weights: {"ema": {"module": weights}}, r"'ema\.module' are used"),
    "unusual": (lambda weights: {"student": weights}, "'student' are used"),
}


@pytest.mark.parametrize(("content", "told"), CHECKPOINTS.values(), ids=CHECKPOINTS)
@pytest.mark.parametrize(("old", "suffix"), [(False, "pth"), (True, "bin")], ids=["zip", "old"])
def test_what_torch_saved_is_read_without_running_code(content, told, old, suffix, trained, tmp_path):
    file = tmp_path / f"w.{suffix}"
    torch.save(content(state(trained)), file, _use_new_zipfile_serialization=not old)
    with pytest.warns(Notice, match=f"w.{suffix} is a checkpoint; those under {told}") if told else nullcontext():
        assert same(create_model("test_resnet", num_classes=3, weights=file), trained)


class Malicious:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("old", [False, True], ids=["zip", "old"])
def test_a_pickle_with_code_is_refused_and_nothing_runs(old, trained, tmp_path, capsys):
    Image.fromarray(np.full((40, 60, 3), 90, np.uint8)).save(tmp_path / "a.png")
    target, file = tmp_path / "was-here", tmp_path / "w.pth"
    for content in (Malicious(target), state(trained) | {"x": Malicious(target)}, {"state_dict": [Malicious(target)]}):
        torch.save(content, file, _use_new_zipfile_serialization=not old)
        with pytest.raises(
            OSError, match=r"it is a pickle that needs \w+\.mkdir, which could run code, so nothing in it"
        ):
            create_model("test_resnet", num_classes=3, weights=file)
        given = ("explain", "test_resnet", tmp_path / "a.png", "--weights", file, "--out", tmp_path / "out")
        assert "could run code, so nothing in it was run" in refused(capsys, *given)
        assert not target.exists()
    with pytest.raises(FileExistsError):  # it does run where code may
        target.mkdir()
        torch.load(file, weights_only=False)


def test_a_pickled_network_is_refused(trained, tmp_path):
    torch.save(trained, tmp_path / "w.pth")
    with pytest.raises(
        OSError, match=r"needs timm\.models\.resnet\.ResNet, .* torch.save\(model.state_dict\(\), FILE\)"
    ):
        create_model("test_resnet", num_classes=3, weights=tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"epoch": 3}, "expected a state dict in .*, got epoch; save the weights alone"),
        ({}, "expected a state dict in .*, got an empty one"),
        ([torch.ones(2)], "expected a state dict in .*, got list"),
        (
            {"generator": {"a": torch.ones(2)}, "critic": {"a": torch.ones(2)}},
            "expected one state dict in .*, got generator, critic; save the network's alone",
        ),
    ],
)
def test_a_checkpoint_without_weights_or_with_several(content, message, tmp_path):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(OSError, match=message):
        create_model("test_resnet", num_classes=3, weights=tmp_path / "w.pth")


def with_other_names(model):
    """Its entries in their order, each module named by a number."""
    modules = {}
    return {
        f"m{modules.setdefault(key.rpartition('.')[0], len(modules))}.{key.rpartition('.')[2]}": value
        for key, value in state(model).items()
    }


def test_other_names_in_the_same_order(trained, tmp_path):
    weights = with_other_names(trained)
    torch.save(weights, tmp_path / "w.pth")
    text = (
        r"matched by their order, since the names differ \(m0\.weight became conv1\.0\.weight, \.\.\.\); all \d+ agree"
    )
    with pytest.warns(Notice, match=text):
        assert same(create_model("test_resnet", num_classes=3, weights=tmp_path / "w.pth"), trained)
    with pytest.warns(Notice) as told:
        model = create_model("test_resnet", num_classes=5, weights=tmp_path / "w.pth")
    assert [bool(re.search(each, str(one.message))) for each, one in zip((text, "start fresh"), told, strict=True)]
    assert torch.equal(model.conv1[0].weight, trained.conv1[0].weight)
    with pytest.raises(ValueError, match="give num_classes=3, they are those of 3 classes, not 5"):
        create_model("test_resnet", num_classes=5, weights=tmp_path / "w.pth", new_head=False)


def changed_order(change):
    expected = {"a.weight": (2, 2), "a.bias": (2,), "c.weight": (2, 2), "c.bias": (2,), "b.weight": (3, 2)}
    other = {"z.weight": (2, 2), "z.bias": (2,), "y.weight": (2, 2), "y.bias": (2,), "x.weight": (3, 2)}
    return [{name: torch.zeros(shape) for name, shape in entries.items()} for entries in (expected, change(other))]


@pytest.mark.parametrize(
    "change",
    [
        lambda x: dict(sorted(x.items())),
        lambda x: dict([*x.items()][:-1]),
        lambda x: x | {"w.weight": (1,)},
        lambda x: x | {"y.weight": (2, 3)},
        lambda x: x | {"z.weight": (4, 2)},
        lambda x: x | {"z.weight": (7, 2), "z.bias": (7,), "y.weight": (7, 2), "y.bias": (7,)},
        lambda x: {name.replace("z.bias", "z.scale"): shape for name, shape in x.items()},
        lambda x: dict(zip(("z.weight", "y.bias", "y.weight", "z.bias", "x.weight"), x.values(), strict=True)),
        lambda x: {name.replace("y.", "z2."[:1] + "."): shape for name, shape in x.items()},
        lambda x: {name.replace("z.", "c.").replace("y.", "a."): shape for name, shape in x.items()},
    ],
    ids="sorted fewer more shape width two kind module merged moved".split(),
)
def test_an_order_that_proves_nothing(change):
    assert by_order(*changed_order(lambda x: x)) is not None
    assert by_order(*changed_order(lambda x: x | {"x.weight": (7, 2)})) is not None  # another number of classes
    assert by_order(*changed_order(change)) is None


def test_names_in_order_within_each_type_have_no_order():
    expected = {"a.steps": torch.zeros(1, dtype=torch.long), "b.weight": torch.zeros(2)}
    values = expected.values()
    assert by_order(expected, dict(zip(("z.steps", "y.weight"), values, strict=True))) is None  # as safetensors writes
    assert by_order(expected, dict(zip(("z.steps", "y.weight"), map(torch.Tensor.float, values), strict=True)))


def test_no_more_than_the_number_of_classes_may_differ():
    ours = {name: torch.zeros(shape) for name, shape in {"a": (4, 2), "b": (5, 4), "c": (5,)}.items()}

    def classes(**shapes):
        return other_classes(ours, ours | {name: torch.zeros(shape) for name, shape in shapes.items()})

    assert classes(b=(3, 4), c=(3,)) == (5, 3)
    assert classes() is classes(b=(5, 3)) is classes(b=(3, 3), c=(3,)) is classes(a=(6, 2), b=(3, 4), c=(3,)) is None
    assert classes(d=(1,)) is None


def test_safetensors_have_no_order(trained, tmp_path):
    save_file(with_other_names(trained), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"0 of its .* names are there, and their order and shapes differ too"):
        create_model("test_resnet", num_classes=3, weights=tmp_path / "w.safetensors")


def test_weights_from_before_batch_norm_counted(trained, tmp_path):
    for weights in (state(trained), with_other_names(trained)):
        torch.save({key: value for key, value in weights.items() if "num_batches" not in key}, tmp_path / "w.pth")
        with pytest.warns(Notice, match="by their order") if "m0.weight" in weights else nullcontext():
            model = create_model("test_resnet", num_classes=3, weights=tmp_path / "w.pth").eval()
        images = torch.rand(2, 3, 64, 64)
        assert torch.equal(model(images), trained(images))


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
    with pytest.raises(OSError, match=f"expected weights as safetensors or as torch.save .*, cannot read .*; {said}"):
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
    told = capsys.readouterr().err
    said = refused(capsys, *given, tmp_path / "out", "--classes", tmp_path / "four.txt")
    assert "give num_classes=3, they are those of 3 classes, not 4; " in said and "four.txt names 4 classes" in said
    assert "notice: weights: 'module.' taken off the names" in told and told.count("notice:") == 2


def test_weights_that_are_no_file(unchecked: None) -> None:
    with pytest.raises(TypeError, match="expected weights as a file, a run folder or 'pretrained', got dict; build"):
        create_model("test_resnet", num_classes=3, weights={})  # pyright: ignore[reportArgumentType]
