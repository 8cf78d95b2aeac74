"""A trained network as one file for other runtimes: ONNX, or PyTorch's own exported program."""

import io
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from sightline import data, models, runs
from sightline.attention.insertion import WithMaps
from sightline.checks import missing
from sightline.inference import copy_of

_TOLERANCE = 1e-4  # of the largest value of an output; runtimes add up in other orders


@dataclass(frozen=True, kw_only=True)
class Exported:
    """An exported file, and the result of its check."""

    path: Path
    size: tuple[int, int]
    """Height and width of the input images."""
    outputs: tuple[str, ...]
    """`logits`, then the names of the attention blocks."""
    difference: float | None
    """Largest difference from the model, as a share of the output's largest value; None without onnxruntime."""


def export(
    model: nn.Module | Path | str,
    file: Path | str,
    preprocess: data.Preprocess | None = None,
    classes: Sequence[str] = (),
) -> Exported:
    """Export a network, with its attention maps as further outputs, and check the file against the network.

    Input: `images`, uint8 (b, 3, height, width), red, green, blue, resized to the size of `preprocess`; any b.
    Normalization is part of the file. Outputs: `logits` (b, classes), then the weights of each attention block,
    (b, k, h, w). Class names and preprocessing are in the metadata of ONNX, and in the extra file `sightline.json` of a
    .pt2.

    Args:
        model: a run folder, or any module from normalized images to logits, which stays unchanged.
        file: FILE.onnx, or FILE.pt2, which `torch.export.load` reads.
        preprocess: size, mean and standard deviation of a module's images. None: those of a run; of a module of timm,
            those that it was pretrained with.
        classes: names of a module's classes.

    Raises:
        ValueError: another ending, a network that cannot be exported, or no `preprocess` for a module that needs it.
        OSError: the folder is no run, or the file cannot be written.
        ModuleNotFoundError: a package for ONNX is missing.
        RuntimeError: the exported network computes something else. Then nothing is written.
    """
    path = Path(file)
    formats = {".onnx": _onnx, ".pt2": _pt2}
    if path.suffix not in formats:
        raise ValueError(f"expected a file name that ends in {' or '.join(formats)}, got {path}; choose one of them")
    runs.check_writable(path.parent)
    if isinstance(model, nn.Module):
        name, preprocess = type(model).__name__, preprocess or _input_of(model)
        model = copy_of(model).eval().cpu()
    else:
        run = runs.open_run(model)
        name, preprocess, classes = run.recipe.model.name, preprocess or run.preprocess, classes or run.classes
        model = runs.load_model(model)
    gated = any(isinstance(getattr(block, "gate", None), nn.Module) for block in model.modules())
    network = WithMaps(model) if gated else model
    names = ("logits", *(name or "attention" for name in getattr(network, "names", ())))
    pixels = _FromPixels(network, preprocess).eval()
    facts = {
        "classes": classes,
        "preprocess": preprocess.facts(),
        "input": f"uint8 red, green, blue; {preprocess} (antialiased)",
        "outputs": names,
    }
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content, call = formats[path.suffix](pixels, preprocess.size, names, facts)
    except ModuleNotFoundError:
        raise
    # tracing raises dozens of types of errors
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"cannot export {name} for any number of images: {reason}") from error
    difference = None if call is None else _difference(call, network, preprocess)
    if difference is not None and not difference <= _TOLERANCE:
        raise RuntimeError(
            f"expected the exported network to differ from {name} by at most {_TOLERANCE:g} of the "
            f"largest value, got {difference:.2g}; nothing was written"
        )
    runs.write(path, content)
    return Exported(path=path, size=preprocess.size, outputs=names, difference=difference)


export.write = export  # pyright: ignore[reportFunctionMemberAccess]  # its name in version 0.1


def _input_of(model: nn.Module) -> data.Preprocess:
    if not (hasattr(model, "pretrained_cfg") or isinstance(getattr(model, "preprocess", None), data.Preprocess)):
        raise ValueError(
            f"expected `preprocess` for {type(model).__name__}, got none; give the size, mean and standard "
            "deviation of its images as sl.data.Preprocess"
        )
    return models.preprocess_of(model)


_Call = Callable[[UInt8[Tensor, "b 3 h w"]], Sequence[Tensor]]


class _FromPixels(nn.Module):
    """A network behind `data.normalize`, with mean and deviation as buffers."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, preprocess: data.Preprocess) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(preprocess.mean)[:, None, None])
        self.register_buffer("std", torch.tensor(preprocess.std)[:, None, None])

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return _outputs(self.network, (images / 255 - self.mean) / self.std)


def _outputs(network: nn.Module, images: Tensor) -> tuple[Tensor, ...]:
    """Logits, and the maps of `WithMaps`."""
    outputs = network(images)
    return outputs if isinstance(network, WithMaps) else (outputs,)


def _pixels(n: int, size: tuple[int, int]) -> UInt8[Tensor, "n 3 h w"]:
    return torch.randint(0, 256, (n, 3, *size), generator=torch.Generator().manual_seed(n), dtype=torch.uint8)


def _program(pixels: nn.Module, size: tuple[int, int]) -> torch.export.ExportedProgram:
    free = {"images": {0: torch.export.Dim("batch", min=1)}}
    program = torch.export.export(pixels, (_pixels(2, size),), dynamic_shapes=free)
    for part in program.graph_module.modules():
        if isinstance(part, torch.fx.GraphModule):
            for node in part.graph.nodes:
                node.meta.pop("stack_trace", None)  # contains the folders of this machine
    return program


def _pt2(
    pixels: nn.Module, size: tuple[int, int], names: Sequence[str], facts: dict[str, Any]
) -> tuple[bytes, _Call | None]:
    file = io.BytesIO()
    torch.export.save(_program(pixels, size), file, extra_files={"sightline.json": json.dumps(facts)})
    return file.getvalue(), torch.export.load(io.BytesIO(file.getvalue())).module()


def _onnx(
    pixels: nn.Module, size: tuple[int, int], names: Sequence[str], facts: dict[str, Any]
) -> tuple[bytes, _Call | None]:
    try:
        import onnx  # noqa: F401  # pyright: ignore[reportUnusedImport]
        import onnxscript  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ModuleNotFoundError as error:
        raise missing(f"ONNX needs the library {error.name}", "export") from None
    exported = torch.onnx.export(
        _program(pixels, size), dynamo=True, input_names=["images"], output_names=[*names], verbose=False
    )
    assert exported is not None
    exported.model.metadata_props.update({name: json.dumps(value, ensure_ascii=False) for name, value in facts.items()})
    content = exported.model_proto.SerializeToString()
    try:
        import onnxruntime
    except ModuleNotFoundError:
        return content, None
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return content, lambda images: [
        torch.from_numpy(output) for output in session.run(None, {"images": images.numpy()})
    ]


def _difference(call: _Call, network: nn.Module, preprocess: data.Preprocess) -> float:
    differences: list[Tensor] = []
    for n in (1, 3):
        images = _pixels(n, preprocess.size)
        with torch.no_grad():
            expected, exported = _outputs(network, data.normalize(images, preprocess)), call(images)
        for ours, theirs in zip(expected, exported, strict=True):
            differences.append((theirs - ours).abs().max() / ours.abs().max().clamp_min(1e-30))
    return float(torch.stack(differences).max())
