"""Reads weights from the files that people have, and never runs what is in them."""

import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

State = dict[str, Tensor]


class Weights(NamedTuple):
    """Tensors by name."""

    state: State
    notices: tuple[str, ...] = ()
    """What was decided on the way; one sentence each."""


_USUAL = ("state_dict", "model_state_dict", "model", "net", "network", "module", "weights")
"""Entries of a checkpoint, the most usual first."""
_AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
_DEPTH = 3  # entries within entries


def read_weights(path: Path) -> Weights:
    """The tensors of a safetensors file, of what `torch.save` wrote, or of a run folder, on the CPU.

    What `torch.save` wrote is read with `weights_only=True` alone: a file that needs code to be read is refused, and
    nothing in it runs. It may be a state dict, or a checkpoint that holds one.

    Raises:
        OSError: there is no such file, or it holds no weights, or more than weights.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(
            f"expected weights in {file}, found no such file; give a safetensors or .pth file or a run folder"
        )
    try:
        return Weights(load_file(file))
    except SafetensorError as error:
        with file.open("rb") as stream:
            start = stream.read(1000)
        if start.startswith((b"PK\x03\x04", b"\x80")):
            return _state_in(_unpickled(file, is_archive=start.startswith(b"PK")), file)
        raise OSError(
            f"expected weights as safetensors or as torch.save writes them, cannot read {file} ({error}); "
            f"{_advice(start)}"
        ) from error


def _unpickled(file: Path, is_archive: bool) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of TorchScript archives, which are then refused
            return torch.load(file, map_location="cpu", weights_only=True)
    # a damaged file may raise anything
    except Exception as error:
        if needed := re.search(r"GLOBAL (\S+)", str(error)):
            advice = (
                f"it is a pickle that needs {needed[1]}, which could run code, so nothing in it was run; save the "
                "weights alone, torch.save(model.state_dict(), FILE), where you trust it"
            )
        else:
            advice = _archive_advice(file) if is_archive else "is it complete?"
        raise OSError(f"expected weights alone, cannot read {file}; {advice}") from error


def _state_in(content: Any, file: Path) -> Weights:
    """The weights in what was loaded: all of it, or one entry of a checkpoint."""
    states = dict(_states(content))
    if not states:
        entries = ", ".join(map(str, content))[:200] if isinstance(content, Mapping) else type(content).__name__
        raise OSError(f"expected a state dict in {file}, got {entries or 'an empty one'}; save the weights alone")
    ranked = [name for usual in ("", *_USUAL, *_AVERAGED) for name in states if name.partition(".")[0] == usual]
    if not ranked and len(states) > 1:
        raise OSError(f"expected one state dict in {file}, got {', '.join(states)}; save the network's alone")
    chosen = next(iter([*ranked, *states]))
    others = [name for name in states if name != chosen]
    beside = f", not those under {', '.join(map(repr, others))}" if others else ""
    text = f"weights: {file.name} is a checkpoint; those under {chosen!r} are used{beside}"
    return Weights(states[chosen], (text,) if chosen else ())


def _states(content: Any, name: str = "", depth: int = _DEPTH) -> Iterator[tuple[str, State]]:
    """Dotted name and content of each state dict: a mapping from names of which most are to tensors."""
    if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
        return
    entries = cast(Mapping[str, Any], content)
    tensors = {key: value.detach() for key, value in entries.items() if isinstance(value, Tensor)}
    if tensors and 2 * len(tensors) >= len(entries):
        yield name, tensors
    elif depth:
        for key, value in entries.items():
            if not key.startswith("opt"):  # moments of an optimizer
                yield from _states(value, f"{name}.{key}".lstrip("."), depth - 1)


_COMPRESSED = "it is compressed; unpack it and give the file in it"
_WEB_PAGE = "it is a web page; download the file itself, which often has another address"
_FORMATS = {
    b"\x1f\x8b": _COMPRESSED,
    b"bzh": _COMPRESSED,
    b"\xfd7zxz": _COMPRESSED,
    b"7z\xbc\xaf": _COMPRESSED,
    b"rar!": _COMPRESSED,
    b"<!doctype": _WEB_PAGE,
    b"<html": _WEB_PAGE,
    b"<?xml": _WEB_PAGE,
    b"version https://git-lfs": "it is a pointer of Git LFS; fetch the file it points to: git lfs pull",
    b"{": "it is JSON; give the safetensors file that belongs to it, in one piece",
    b"\x89hdf": "it is an HDF5 file, as Keras writes them; save the weights of the PyTorch network instead",
}
"""Lower-case start of a file that holds no weights -> what it is, and what to do."""


def _advice(start: bytes) -> str:
    text = start.lstrip().lower()
    return next((advice for prefix, advice in _FORMATS.items() if text.startswith(prefix)), "is it complete?")


def _archive_advice(file: Path) -> str:
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except Exception:  # a damaged archive may raise anything
        names = []
    if any("/code/" in name for name in names):
        return "it is a TorchScript archive; save the state_dict of the network it was made from instead"
    if names and not any(name.endswith("data.pkl") for name in names):
        return "it is a zip archive; unpack it and give the file of weights in it"
    return "it is a zip archive, perhaps of torch.save, and damaged; is it complete?"
