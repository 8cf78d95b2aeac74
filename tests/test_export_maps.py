"""Maps in exported files equal those of `sl.explain`; without the shape checker, which tracing cannot follow."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.test_export import trained
from torch import Tensor, nn
from torch.nn import functional as F

import sightline as sl
from sightline import cli, data, export
from sightline.explainers.traced import WithExplanations, backwards, fitting_names, traced
from sightline.exporting import Exported

pytestmark = pytest.mark.compile

PLAIN = data.Preprocess(size=(32, 32), mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
CAMS = ["grad_cam", "grad_cam_plus_plus", "xgrad_cam", "layer_cam", "hires_cam", "finer_cam"]


class Mixed(nn.Module):
    """Behind its first layer stands one of each operation whose backward is written in other operations."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential(
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, 1),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=2),
            nn.GELU(),
            nn.Conv2d(12, 8, 3, padding=2, dilation=2),
            nn.Hardswish(),
            nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2),
            nn.AvgPool2d(3, 2, 1, count_include_pad=False),
            nn.SiLU(),
            nn.GroupNorm(2, 6),
        )
        self.head = nn.Linear(6 * 11, 4)

    def forward(self, images: Tensor) -> Tensor:
        features = self.body(self.stem(images))
        largest = F.adaptive_max_pool2d(features, 2).flatten(1)
        averages = F.adaptive_avg_pool2d(features, (3, 2)).flatten(1)
        return self.head(torch.cat([largest, averages, features.mean((2, 3))], 1))


class Functional(nn.Module):
    """No module returns the last feature map, and two poolings read it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, stride=4)
        self.head = nn.Linear(12, 4)

    def forward(self, images: Tensor) -> Tensor:
        features = F.relu(self.conv(images), inplace=True)
        averages = F.adaptive_avg_pool2d(features, 1)
        return self.head(torch.cat([averages, F.adaptive_max_pool2d(features, 1)], 1).flatten(1))


class ChannelsLast(nn.Module):
    """Its feature map is permuted, as in ConvNeXt, so that it lies in memory with the channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 4, stride=4)
        self.norm = nn.LayerNorm(6)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(6, 4)

    def forward(self, images: Tensor) -> Tensor:
        features = self.norm(self.conv(images).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.head(self.pool(F.gelu(features)).tanh().flatten(1))


def built(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    own = {"mixed": Mixed, "functional": Functional, "channels last": ChannelsLast}
    model = own[name]() if name in own else sl.create_model(name, num_classes=4, **options)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model.eval()


def pixels(n: int, size: tuple[int, int] = (32, 32)) -> Tensor:
    generator = torch.Generator().manual_seed(50 + n)
    return torch.randint(0, 256, (n, 3, *size), generator=generator, dtype=torch.uint8)


def normalized(images: Tensor) -> Tensor:
    """By hand."""
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.6, 0.7])
    return (images.float() / 255 - mean[:, None, None]) / std[:, None, None]


def assert_maps(outputs: list[Tensor], model: nn.Module, images: Tensor, methods: list[str], **options: Any) -> None:
    explanation = sl.explain(model, normalized(images), methods=methods, **options)
    with torch.no_grad():
        logits = model(normalized(images))
    for ours, theirs in zip([logits, *explanation.maps.values()], outputs, strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        assert ours.abs().max() > 0
        assert (theirs - ours).abs().max() <= 1e-5 * ours.abs().max()


def program(path: Path) -> Any:
    return torch.export.load(path).module()


def runtime(path: Path) -> Any:
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    return lambda *values: [
        torch.from_numpy(output)
        for output in session.run(None, {name: value.numpy() for name, value in zip(names, values, strict=True)})
    ]


def running(path: Path) -> Any:
    return {".pt2": program, ".onnx": runtime}[path.suffix](path)


CASES: dict[str, tuple[str, dict[str, Any], list[str], str | None]] = {
    "pooling and one linear layer": ("cifar_resnet", {"depth": 8}, ["cam", *CAMS, "activation_map"], None),
    "a backward through everything": ("mixed", {}, ["grad_cam", "layer_cam", "hires_cam", "finer_cam"], "stem"),
    "two layers and the pixels": (
        "cifar_resnet",
        {"depth": 8},
        ["grad_cam@layer1", "layer_cam@layer2", "saliency"],
        None,
    ),
    "no module returns the feature map": ("functional", {}, ["grad_cam", "layer_cam"], None),
    "channels last in memory": ("channels last", {}, ["grad_cam", "hires_cam"], None),
    "learned attention": (
        "vgg_att2",
        {"width": 1 / 16, "stem_pool": 2},
        ["attention", "attention@attention.conv10", "layer_cam"],
        None,
    ),
    "a transformer": ("tiny_vit", {"depth": 2}, ["grad_cam", "attention", "input_x_gradient"], None),
    "an inserted block": ("cifar_resnet", {"depth": 8, "attention": "cbam"}, ["grad_cam", "cam"], None),
}
NAMES = ["null", "eins", "zwei", "drei"]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[nn.Module, Exported]]:
    """The network and the file of a case, written once."""
    folder = tmp_path_factory.mktemp("files")

    @cache
    def write(case: str, ending: str) -> tuple[nn.Module, Exported]:
        name, options, methods, layer = CASES[case]
        model = built(name, **options)
        return model, export(model, folder / f"{case}.{ending}", PLAIN, NAMES, maps=methods, layer=layer)

    return write


IN_ONNX = ["a backward through everything", "channels last in memory", "learned attention"]
"""The way into ONNX makes the program first."""
Written = Callable[[str, str], tuple[nn.Module, Exported]]


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] if case in IN_ONNX else []) for case in CASES]
)
def test_a_program_makes_the_maps_of_explain(case: str, written: Written) -> None:
    _, _, methods, layer = CASES[case]
    model, exported = written(case, "pt2")
    assert exported.outputs == ("logits", *methods) and exported.difference is not None and exported.difference < 1e-5
    for n in (1, 4):
        assert_maps(list(program(exported.path)(pixels(n))), model, pixels(n), methods, layer=layer)


@pytest.mark.parametrize("case", IN_ONNX)
def test_onnx_makes_the_maps_of_explain(case: str, written: Written) -> None:
    pytest.importorskip("onnxruntime")
    name, _, methods, layer = CASES[case]
    model, exported = written(case, "onnx")
    for n in (1, 4):
        assert_maps(runtime(exported.path)(pixels(n)), model, pixels(n), methods, layer=layer)
    content = exported.path.read_bytes()
    assert str(exported.path.parent).encode() not in content and str(Path(sl.__file__).parent).encode() not in content
    if name == "mixed":  # no convolution there has a batch normalization behind it that is folded into its weights
        weights = [value for value in model.parameters() if value.numel() > 50]
        assert len(weights) == 5 and all(content.count(value.detach().numpy().tobytes()) == 1 for value in weights)


def test_the_file_says_what_its_maps_are(written: Written) -> None:
    files = {"sightline.json": ""}
    torch.export.load(written("a backward through everything", "pt2")[1].path, extra_files=files)
    facts = json.loads(files["sightline.json"])
    methods = CASES["a backward through everything"][2]
    assert facts["outputs"] == ["logits", *methods] and facts["signed"] == ["hires_cam"]
    assert facts["layers"] == dict.fromkeys(methods, "stem (8 x 32 x 32)")
    assert facts["targets"] == "predicted" and facts["classes"] == NAMES


@pytest.mark.parametrize("ending", ["pt2", "onnx"])
def test_the_class_may_be_an_input_and_the_images_of_any_size(ending: str, tmp_path: Path) -> None:
    model = built("cifar_resnet", depth=8)
    methods = ["cam", "grad_cam", "layer_cam@layer2"]
    path = tmp_path / f"net.{ending}"
    export(model, path, PLAIN, maps=methods, targets="input", any_size=True)
    for n, size in ((1, (32, 32)), (3, (48, 40))):
        images, targets = pixels(n, size), torch.tensor([3, 0, 1])[:n]
        assert_maps(running(path)(images, targets), model, images, methods, targets=targets)


def test_maps_of_all_classes(tmp_path: Path) -> None:
    model = built("cifar_resnet", depth=8)
    export(model, tmp_path / "net.pt2", PLAIN, maps=["cam", "grad_cam"], targets="all")
    for n in (1, 3):
        everything = torch.arange(4).expand(n, 4)
        outputs = list(program(tmp_path / "net.pt2")(pixels(n)))
        assert outputs[1].shape == (n, 4, 8, 8)
        assert_maps(outputs, model, pixels(n), ["cam", "grad_cam"], targets=everything)
    with pytest.raises(ValueError, match="expected maps that need no backward for each class, got layer_cam of Cifar"):
        export(model, tmp_path / "no.pt2", PLAIN, maps=["layer_cam"], targets="all")
    with pytest.raises(ValueError, match="expected maps that need no backward for each class, got grad_cam of Mixed"):
        export(built("mixed"), tmp_path / "no.pt2", PLAIN, maps=["grad_cam"], targets="all")
    assert [file.name for file in tmp_path.iterdir()] == ["net.pt2"]


def test_values_worked_out_by_hand(tmp_path: Path) -> None:
    """Logits are channel means: 0.5, 1 and 2 times the image's; class 2 wins, with weight 1 / 4 at four positions."""

    class Channels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1, bias=False)
            self.conv.weight.data = torch.diag(torch.tensor([0.5, 1.0, 2.0]))[:, :, None, None]

        def forward(self, images: Tensor) -> Tensor:
            return self.conv(images).mean((2, 3))

    as_they_are = data.Preprocess(size=(2, 2), mean=(0.0, 0.0, 0.0), std=(1 / 255,) * 3)
    export(Channels(), tmp_path / "net.pt2", as_they_are, maps=["cam", "grad_cam"], layer="conv")
    image = torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8).expand(1, 3, 2, 2)
    logits, cam, grad_cam = program(tmp_path / "net.pt2")(image)
    torch.testing.assert_close(logits, torch.tensor([[1.25, 2.5, 5.0]]))
    torch.testing.assert_close(cam, torch.tensor([[[[2.0, 4.0], [6.0, 8.0]]]]))
    torch.testing.assert_close(grad_cam, torch.tensor([[[[0.5, 1.0], [1.5, 2.0]]]]))


def test_a_single_logit_counts_as_two_classes_and_the_model_stays_as_it_was(tmp_path: Path) -> None:
    model = built("functional").train()
    model.head = nn.Linear(12, 1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    export(model, tmp_path / "net.pt2", PLAIN, maps=["hires_cam", "saliency"], targets="input")
    assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    images, targets = pixels(3), torch.tensor([0, 1, 0])
    outputs = list(program(tmp_path / "net.pt2")(images, targets))
    assert outputs[0].shape == (3, 1)
    assert_maps(outputs, model, images, ["hires_cam", "saliency"], targets=targets)


def test_a_network_may_return_its_logits_in_a_dict(tmp_path: Path) -> None:
    class Named(Branching):
        def forward(self, images: Tensor) -> dict[str, Tensor]:
            features = self.conv(images)
            return {"features": features, "logits": features.mean((2, 3))}

    model = Named()
    for maps in ((), ("hires_cam",)):
        export(model, tmp_path / "net.pt2", PLAIN, maps=maps)
        outputs = program(tmp_path / "net.pt2")(pixels(3))
        assert len(outputs) == 1 + len(maps)
        torch.testing.assert_close(outputs[0], model(normalized(pixels(3)))["logits"])


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, images: Tensor) -> Tensor:
        features = self.conv(images)
        return features.mean((2, 3)) if bool(images.sum() > np.pi) else features.amax((2, 3))


class Lonely(Branching):
    """Another graph for a single image."""

    def forward(self, images: Tensor) -> Tensor:
        features = self.conv(images)
        return features.mean((2, 3)) if len(images) > 1 else features.amax((2, 3))


class Certain(Branching):
    def forward(self, images: Tensor) -> Tensor:
        return self.conv(images).mean((2, 3)).softmax(1)


Failure = type[Exception] | tuple[type[Exception], ...]
REFUSED: dict[str, tuple[nn.Module, dict[str, Any], Failure, str]] = {
    "an unknown map": (Branching(), {"maps": ["gradcam"]}, ValueError, "name of an explainer, got 'gradcam'.*grad_cam"),
    "many passes": (Branching(), {"maps": ["rise"]}, ValueError, "for a file, got rise, which runs the network many"),
    "guided": (Branching(), {"maps": ["guided_backprop"]}, ValueError, "got guided_backprop, which reads guided_grad"),
    "a control": (Branching(), {"maps": ["edge_map"]}, ValueError, "got edge_map, which does not look at the network"),
    "twice": (Branching(), {"maps": ["cam", "cam"]}, ValueError, "each map once, got cam twice"),
    "no layer": (Branching(), {"maps": ["cam"], "layer": "conf"}, ValueError, "name of a layer .* got 'conf'"),
    "no attention": (Branching(), {"maps": ["attention"]}, ValueError, "an attention block with a spatial map, got"),
    "another head": (built("mixed"), {"maps": ["cam"]}, ValueError, "pooling and one linear layer behind .* use grad_"),
    "no maps": (Branching(), {"targets": "all"}, ValueError, "a layer or targets together with maps, got no maps"),
    "bad targets": (Branching(), {"maps": ["cam"], "targets": 3}, ValueError, "targets as one of predicted, input, al"),
    "values decide": (Branching(), {"maps": ["grad_cam"]}, ValueError, "cannot export Branching for any number of ima"),
    "size decides": (Lonely(), {"maps": ["grad_cam"]}, (ValueError, RuntimeError), "Lonely"),
    "probabilities": (
        Certain(),
        {"maps": ["grad_cam"]},
        ValueError,
        "returns logits, got Certain, which ends in a ",
    ),
    "opset of a program": (Branching(), {"maps": ["cam"], "opset": 18}, ValueError, "opset only for an ONNX file, got"),
    "other windows": (
        built("mixed"),
        {"maps": ["grad_cam"], "layer": "stem", "any_size": True},
        ValueError,
        "cannot export Mixed for images of any number and size: the average pooling behind the layer has other windows",
    ),
    "a fixed size": (
        built("tiny_vit", depth=1),
        {"maps": ["grad_cam"], "any_size": True},
        ValueError,
        "cannot export .* for images of any number and size: ",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_written(case: str, tmp_path: Path) -> None:
    model, options, kind, message = REFUSED[case]
    with pytest.raises(kind, match=message) as caught:
        export(model, tmp_path / "net.pt2", PLAIN, **options)
    assert "\n" not in str(caught.value) and not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "ceil_mode", "count_include_pad", "divisor"),
    [
        (2, 2, 0, False, True, None),
        (3, 2, 1, False, False, None),
        (3, 2, 1, True, True, None),
        (3, 2, 0, True, False, None),
        ((3, 2), (1, 2), (1, 0), False, True, 5),
    ],
)
def test_the_backward_of_average_pooling_is_that_of_autograd(
    kernel: Any, stride: Any, padding: Any, ceil_mode: bool, count_include_pad: bool, divisor: int | None
) -> None:
    rest = ceil_mode, count_include_pad, divisor
    images = torch.randn(2, 3, 9, 7, dtype=torch.float64, requires_grad=True)
    pooled = F.avg_pool2d(images, kernel, stride, padding, *rest)
    grad = torch.randn_like(pooled)
    (wanted,) = torch.autograd.grad(pooled, images, grad)
    pairs = [(one, one) if isinstance(one, int) else one for one in (kernel, stride, padding)]
    operation = torch.ops.aten.avg_pool2d_backward.default
    torch.testing.assert_close(backwards()[operation](grad, images.detach(), *pairs, *rest), wanted)


@pytest.mark.parametrize("size", [1, 2, (4, 7), (11, 3)])
def test_the_backward_of_adaptive_pooling_is_that_of_autograd(size: Any) -> None:
    images = torch.randn(2, 3, 9, 7, dtype=torch.float64, requires_grad=True)
    pooled = F.adaptive_avg_pool2d(images, size)
    grad = torch.randn_like(pooled)
    (wanted,) = torch.autograd.grad(pooled, images, grad)
    operation = torch.ops.aten._adaptive_avg_pool2d_backward.default
    torch.testing.assert_close(backwards()[operation](grad, images.detach()), wanted)


def test_weights_that_depend_on_the_image_keep_the_backward_of_pytorch() -> None:
    values = torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2), torch.ones(1, 1, 1, 1)
    settings = None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1
    written_out = backwards()[torch.ops.aten.convolution_backward.default]
    assert written_out(*values, *settings, [True, False, False])[0].shape == (1, 1, 2, 2)
    assert written_out(*values, *settings, [True, True, False]) is NotImplemented


def test_what_onnx_cannot_hold(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    with pytest.raises(ValueError, match=r"ONNX has no operator for aten\._linalg_eigh; write a \.pt2 file$"):
        export(built("functional"), tmp_path / "net.onnx", PLAIN, maps=["eigen_cam"])
    for opset in (17, 99):
        with pytest.raises(ValueError, match=f"expected an opset from 18 to 23, got {opset}; choose one of them"):
            export(built("functional"), tmp_path / "net.onnx", PLAIN, maps=["grad_cam"], opset=opset)
    assert not any(tmp_path.iterdir())
    export(built("functional"), tmp_path / "net.onnx", PLAIN, maps=["grad_cam"], opset=18)
    import onnx

    (opset,) = [one.version for one in onnx.load(tmp_path / "net.onnx").opset_import if not one.domain]
    assert opset == 18


def test_maps_that_differ_are_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backward that is wrong by a factor."""
    from sightline.explainers import traced as module

    right = module._max_pool_backward
    monkeypatch.setattr(module, "_max_pool_backward", lambda *values: right(*values) * 1.01)
    wrong = (
        r"expected the exported network to differ from Functional by at most 0\.0001 .* got 0\.0\d+ in grad_cam; noth"
    )
    with pytest.raises(RuntimeError, match=wrong):
        export(built("functional"), tmp_path / "net.pt2", PLAIN, maps=["activation_map", "grad_cam"])
    assert not any(tmp_path.iterdir())


def test_a_network_with_maps_computes_them_without_a_file() -> None:
    model = built("functional")
    network = WithExplanations(model, normalized(pixels(2)), ["grad_cam"])
    assert_maps(list(network(normalized(pixels(3)))), model, pixels(3), ["grad_cam"])
    graph = traced(network, [normalized(pixels(2))], [[0]])
    assert_maps(list(graph(normalized(pixels(3)))), model, pixels(3), ["grad_cam"])
    assert "layer_cam" in fitting_names() and not {"rise", "random_map", "guided_backprop"} & {*fitting_names()}


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = trained(tmp_path / "run", "cifar_resnet", {"depth": 8})
    line = ["export", str(folder), "--out", str(tmp_path / "net.pt2")]
    cli.main([*line, "--maps", "grad_cam,layer_cam@layer2", "--target", "input", "--any-size"])
    first, second = capsys.readouterr().out.splitlines()
    given = "images uint8 (b, 3, height, width), targets int64 (b,)"
    assert first == f"{tmp_path}/net.pt2: {given} -> logits, grad_cam, layer_cam@layer2"
    assert second.startswith("checked: differs from the network by at most ")
    (tmp_path / "net.pt2").unlink()
    for words, message in (
        (["--maps", "grad_cm"], "name of an explainer, got 'grad_cm'; did you mean 'grad_cam'"),
        (["--maps", "rise"], "maps of one forward and one backward for a file, got rise, which runs the network"),
        (["--maps", "grad_cam", "--opset", "9"], "opset only for an ONNX file, got"),
        (["--maps", "grad_cam", "--target", "3"], "'3' is none of predicted, input, all"),
        (["--target", "all"], "expected a layer or targets together with maps, got no maps"),
        (["--maps", "grad_cam", "--weights", "w.pth"], "--weights and --classes only with the name of a model"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main([*line, *words])
        assert stop.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(SystemExit):
        cli.main(["export", "resnet18", "--out", str(tmp_path / "net.pt2"), "--maps", "grad_cam"])
    assert "expected --weights FILE for model 'resnet18'" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["run"]
