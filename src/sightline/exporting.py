"""A trained network as one file for other runtimes: ONNX, or PyTorch's own exported program."""

import io
import json
import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from jaxtyping import Int, UInt8
from torch import Tensor, nn

from sightline import data, models, runs
from sightline.attention.insertion import WithMaps
from sightline.checks import check_whole, missing
from sightline.explainers import Method, explain
from sightline.explainers.explain import requests_of
from sightline.explainers.traced import Classes, WithExplanations, check_methods, traced
from sightline.inference import check_names, copy_of, logits_of

_TOLERANCE = 1e-4  # of the largest value of an output; runtimes add up in other orders
_OPSETS = range(18, 24)  # those that torch.onnx has operators for


@dataclass(frozen=True, kw_only=True)
class Exported:
    """An exported file, and the result of its check."""

    path: Path
    size: tuple[int, int]
    """Height and width of the input images."""
    outputs: tuple[str, ...]
    """`logits`, then the names of the maps, or of the attention blocks."""
    difference: float | None
    """Largest difference from the model, as a share of the output's largest value; None without onnxruntime."""


def export(
    model: nn.Module | Path | str,
    file: Path | str,
    preprocess: data.Preprocess | None = None,
    classes: Sequence[str] = (),
    *,
    maps: Sequence[Method] = (),
    layer: str | None = None,
    targets: Classes = "predicted",
    any_size: bool = False,
    opset: int | None = None,
) -> Exported:
    """Export a network, with maps as further outputs, and check the file against the network.

    Input: `images`, uint8 (b, 3, height, width), red, green, blue, resized to the size of `preprocess`; any b.
    Normalization is part of the file. Outputs: `logits` (b, classes), then the maps that `explain` makes, raw,
    (b, t, h, w); without `maps` the weights of each attention block, (b, k, h, w). Class names and preprocessing are in
    the metadata of ONNX, and in the extra file `sightline.json` of a .pt2.

    Args:
        model: a run folder, or any module from normalized images to logits, which stays unchanged.
        file: FILE.onnx, or FILE.pt2, which `torch.export.load` reads.
        preprocess: size, mean and standard deviation of a module's images. None: those of a run; of a module of timm,
            those that it was pretrained with.
        classes: names of a module's classes.
        maps: methods of `explain` that take one forward and one backward, which becomes part of the file.
        layer: where they read; see `explain`.
        targets: whose maps: "predicted"; "input", a second input `targets`, int64 (b,), names the class of each image;
            "all" classes, for cam and grad_cam of a network that ends in pooling and one linear layer.
        any_size: the file takes images of any height and width, if the network does.
        opset: version of ONNX's operators, 18 to 23. None: that of torch.onnx.

    Raises:
        ValueError: another ending, a network or a method that cannot be exported, no `preprocess` for a module that
            needs it, or names that are not as many as its classes.
        OSError: the folder is no run, or the file cannot be written.
        ModuleNotFoundError: a package for ONNX is missing.
        RuntimeError: the exported network computes something else. Then nothing is written.
    """
    path = Path(file)
    check_request(path, maps=maps, layer=layer, targets=targets, opset=opset)
    if isinstance(model, nn.Module):
        name, preprocess = type(model).__name__, preprocess or _input_of(model)
        model = copy_of(model).eval().cpu()
    else:
        run = runs.open_run(model)
        name, preprocess, classes = run.recipe.model.name, preprocess or run.preprocess, classes or run.classes
        model = runs.load_model(model)
    size = preprocess.size
    examples: list[Tensor] = [_pixels(2, size)]
    if maps:
        network = WithExplanations(model, data.normalize(examples[0], preprocess), maps, layer, targets)
        if targets == "input":
            examples.append(torch.arange(2))
    else:
        gated = any(isinstance(getattr(block, "gate", None), nn.Module) for block in model.modules())
        network = WithMaps(model) if gated else model
    if classes:
        with torch.no_grad():
            check_names(classes, logits_of(model(data.normalize(examples[0], preprocess))))
    names = ("logits", *(name or "attention" for name in getattr(network, "names", ())))
    pixels = _FromPixels(network, preprocess).eval()
    facts: dict[str, Any] = {
        "classes": classes,
        "preprocess": preprocess.facts(),
        "input": f"uint8 red, green, blue; {preprocess} (antialiased)",
        "outputs": names,
    }
    if isinstance(network, WithExplanations):
        facts |= {"layers": network.layers, "signed": network.signed, "targets": targets}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = _program(pixels, examples, any_size)
            content, call = _FORMATS[path.suffix](program, names, facts, opset)
        difference, where = (None, "") if call is None else _difference(call, pixels, preprocess, any_size, names)
    except ModuleNotFoundError:
        raise
    # tracing raises dozens of types of errors
    except Exception as error:
        sizes = "images of any number and size" if any_size else "any number of images"
        raise ValueError(f"cannot export {name} for {sizes}: {_reason(error)}") from error
    if difference is not None and not difference <= _TOLERANCE:
        raise RuntimeError(
            f"expected the exported network to differ from {name} by at most {_TOLERANCE:g} of the "
            f"largest value, got {difference:.2g} in {where}; nothing was written"
        )
    runs.write(path, content)
    return Exported(path=path, size=size, outputs=names, difference=difference)


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:  # torch.onnx begins with advice to its developers
        error = error.__cause__
    text = " ".join(str(error).split())[:300]
    unknown = re.search(r"No ONNX function found for <OpOverload\(op='([\w.]+)'", text)
    return text if unknown is None else f"ONNX has no operator for {unknown[1]}; write a .pt2 file"


export.write = export  # pyright: ignore[reportFunctionMemberAccess]  # its name in version 0.1


def check_request(
    file: Path | str,
    *,
    maps: Sequence[Method] = (),
    layer: str | None = None,
    targets: Classes = "predicted",
    opset: int | None = None,
) -> None:
    """Check what can be checked of the arguments of `export` before a network is loaded.

    Raises:
        ValueError, TypeError, OSError: as `export`.
    """
    path = Path(file)
    if path.suffix not in _FORMATS:
        raise ValueError(f"expected a file name that ends in {' or '.join(_FORMATS)}, got {path}; choose one of them")
    if path.is_dir():
        raise IsADirectoryError(f"expected the name of a file, got the folder {path}; name a file in it")
    check_whole(opset=opset)
    if targets not in get_args(Classes):
        raise ValueError(f"expected targets as one of {', '.join(get_args(Classes))}, got {targets!r}; choose one")
    if maps:
        check_methods(requests_of(maps, layer))
    elif layer is not None or targets != "predicted":
        raise ValueError("expected a layer or targets together with maps, got no maps; name some, such as grad_cam")
    if opset is not None and path.suffix != ".onnx":
        raise ValueError(f"expected an opset only for an ONNX file, got {path}; leave it out")
    if opset is not None and opset not in _OPSETS:
        raise ValueError(f"expected an opset from {_OPSETS[0]} to {_OPSETS[-1]}, got {opset}; choose one of them")
    runs.check_writable(path.parent)


def _input_of(model: nn.Module) -> data.Preprocess:
    if not (hasattr(model, "pretrained_cfg") or isinstance(getattr(model, "preprocess", None), data.Preprocess)):
        raise ValueError(
            f"expected `preprocess` for {type(model).__name__}, got none; give the size, mean and standard "
            "deviation of its images as sl.data.Preprocess"
        )
    return models.preprocess_of(model)


_Call = Callable[[Sequence[Tensor]], Sequence[Tensor]]


class _FromPixels(nn.Module):
    """A network behind `data.normalize`, with mean and deviation as buffers."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, preprocess: data.Preprocess) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(preprocess.mean)[:, None, None])
        self.register_buffer("std", torch.tensor(preprocess.std)[:, None, None])

    def forward(self, images: Tensor, targets: Tensor | None = None) -> tuple[Tensor, ...]:
        images = (images / 255 - self.mean) / self.std
        if isinstance(self.network, WithExplanations):
            return self.network(images, targets)
        return _plain(self.network, images)


def _plain(network: nn.Module, images: Tensor) -> tuple[Tensor, ...]:
    """Logits, and the maps of attention blocks."""
    output = network(images)
    if isinstance(network, WithMaps):
        return output
    return (output if isinstance(output, Tensor) else logits_of(output),)


def _pixels(n: int, size: tuple[int, int]) -> UInt8[Tensor, "n 3 h w"]:
    return torch.randint(0, 256, (n, 3, *size), generator=torch.Generator().manual_seed(n), dtype=torch.uint8)


def _program(pixels: _FromPixels, examples: Sequence[Tensor], any_size: bool) -> torch.export.ExportedProgram:
    """The network as a program for any number of images, without the folders of this machine."""
    batch = torch.export.Dim("batch", min=1)
    sides = {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC} if any_size else {}
    free = [{0: batch, **(sides if example.ndim == 4 else {})} for example in examples]
    with torch.no_grad():
        module = traced(pixels, examples, free) if isinstance(pixels.network, WithExplanations) else pixels
        program = torch.export.export(module, tuple(examples), dynamic_shapes=tuple(free))
    for part in program.graph_module.modules():
        if isinstance(part, torch.fx.GraphModule):
            for node in part.graph.nodes:
                node.meta.pop("stack_trace", None)  # contains the folders of this machine
    return program


def _pt2(
    program: torch.export.ExportedProgram, names: Sequence[str], facts: dict[str, Any], opset: int | None
) -> tuple[bytes, _Call | None]:
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={"sightline.json": json.dumps(facts)})
    loaded = torch.export.load(io.BytesIO(file.getvalue())).module()
    return file.getvalue(), lambda inputs: loaded(*inputs)


def _onnx(
    program: torch.export.ExportedProgram, names: Sequence[str], facts: dict[str, Any], opset: int | None
) -> tuple[bytes, _Call | None]:
    try:
        import onnx  # noqa: F401  # pyright: ignore[reportUnusedImport]
        import onnxscript  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ModuleNotFoundError as error:
        raise missing(f"ONNX needs the library {error.name}", "export") from None
    inputs = ["images", "targets"][: len(program.graph_signature.user_inputs)]
    exported = torch.onnx.export(
        program, dynamo=True, input_names=inputs, output_names=[*names], opset_version=opset, verbose=False
    )
    assert exported is not None
    exported.model.metadata_props.update({name: json.dumps(value, ensure_ascii=False) for name, value in facts.items()})
    content = exported.model_proto.SerializeToString()
    try:
        import onnxruntime
    except ModuleNotFoundError:
        return content, None
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return content, lambda values: [
        torch.from_numpy(output)
        for output in session.run(None, {name: value.numpy() for name, value in zip(inputs, values, strict=True)})
    ]


_FORMATS = {".onnx": _onnx, ".pt2": _pt2}


@torch.no_grad()
def _difference(
    call: _Call, pixels: _FromPixels, preprocess: data.Preprocess, any_size: bool, names: Sequence[str]
) -> tuple[float, str]:
    """Largest difference of any output on new images, as a share of the output's largest value, and the output."""
    height, width = preprocess.size
    differences: list[tuple[float, str]] = []
    for n, size in [(1, (height, width)), (3, (height, width)), *[(2, (height + 32, width + 64))] * any_size]:
        images = _pixels(n, size)
        given, expected = _expected(pixels.network, images, data.normalize(images, preprocess))
        for name, ours, theirs in zip(names, expected, call(given), strict=True):
            differences.append((float((theirs - ours).abs().max() / ours.abs().max().clamp_min(1e-30)), name))
    return max(differences, key=lambda one: (math.isnan(one[0]), one[0]))


def _expected(network: nn.Module, images: Tensor, normalized: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """What to pass to the file, and what it should return."""
    if not isinstance(network, WithExplanations):
        return [images], [*_plain(network, normalized)]
    logits = logits_of(network.model(normalized))
    count = max(2, logits.shape[1])
    targets: Int[Tensor, "b ..."] | None = None
    if network.classes == "input":
        targets = torch.arange(len(images)) * 7 % count
    elif network.classes == "all":
        targets = torch.arange(count).expand(len(images), -1)
    maps = explain(network.model, normalized, targets, network.methods, network.layer).maps.values()
    return [images, *([targets] if targets is not None and network.classes == "input" else [])], [logits, *maps]
