"""Weights from safetensors files: read, matched to a network by name, or refused with advice."""

import json
import zipfile
from pathlib import Path

from torch import Tensor, nn

from sightline import recipe
from sightline.models.vit import TinyViT

State = dict[str, Tensor]


class OtherClasses(ValueError):
    """The weights fit, except that they are those of another number of classes."""


def read_weights(path: Path) -> State:
    """The tensors of a safetensors file, or of a run folder.

    Raises:
        OSError: there is no such file, or it is no safetensors file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(
            f"expected weights in {file}, found no such file; give a safetensors file or a run folder"
        )
    try:
        return load_file(file)
    except SafetensorError as error:
        raise OSError(f"expected a safetensors file, cannot read {file} ({error}); {_advice(file)}") from error


def with_names_of(model: nn.Module, state: State) -> State:
    """The weights without the prefixes of wrappers, as far as that matches more of the model's names.

    DataParallel writes `module.`, torch.compile `_orig_mod.` (anywhere), a Lightning module the name of an attribute,
    an average of weights `module.` and a counter. Names of version 0.1 are understood.
    """
    if isinstance(model, TinyViT):
        state = model.current_names(state)
    expected = model.state_dict().keys()
    best, names = state, {key: key.replace("_orig_mod.", "") for key in state if key != "n_averaged"}
    while names:
        if len(expected & set(names.values())) > len(expected & best.keys()):
            best = {name: state[key] for key, name in names.items()}
        if len({name.partition(".")[0] for name in names.values()}) > 1:
            break
        names = {key: rest for key, name in names.items() if (rest := name.partition(".")[2])}
    return best


def mismatches(model: nn.Module, state: State) -> list[str]:
    """What differs between the model's and these weights' names and shapes."""
    expected = model.state_dict()
    missing = [f"{key} is missing" for key in expected if key not in state]
    unknown = [f"{key} is unknown to the model" for key in sorted(state) if key not in expected]
    shapes = [
        f"{key} has shape {tuple(state[key].shape)} instead of {tuple(value.shape)}"
        for key, value in expected.items()
        if key in state and state[key].shape != value.shape
    ]
    return missing + unknown + shapes


def load_weights(model: nn.Module, name: str, state: State, source: Path) -> None:
    """Load weights that fit a model exactly.

    Raises:
        ValueError: they do not; the message says which network they belong to, if that can be told.
        OtherClasses: only the number of classes differs.
    """
    problems = mismatches(model, state)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        misfit = f"weights in {source} do not fit {name}: {problems[0]}{more}"
        if numbers := _classes(model, state):
            ours, theirs = numbers
            raise OtherClasses(f"{misfit}; give num_classes={theirs}, they are those of {theirs} classes, not {ours}")
        raise ValueError(f"{misfit}; {_remedy(model, name, state, source)}")
    model.load_state_dict(state)


def _classes(model: nn.Module, state: State) -> tuple[int, int] | None:
    """Number of classes of the model and of the weights, if nothing else differs."""
    expected = model.state_dict()
    if expected.keys() != state.keys():
        return None
    shapes = [(value.shape, state[key].shape) for key, value in expected.items() if value.shape != state[key].shape]
    numbers = {(*ours[:1], *theirs[:1]) for ours, theirs in shapes}
    only_classes = len(numbers) == 1 and all(ours[1:] == theirs[1:] for ours, theirs in shapes)
    return next((n for n in numbers if len(n) == 2), None) if only_classes else None


def _remedy(model: nn.Module, name: str, state: State, source: Path) -> str:
    """What to do, from what the weights tell about their network."""
    expected = model.state_dict()
    shared = [key for key in expected if key in state]
    network = _network_beside(source)
    if network is not None and network[0] != name:
        return f"they are those of {network[0]} with {network[1]} classes; give that name, and its options"
    for prefix in dict.fromkeys(key.partition(".")[0] + "." for key in state):
        if all(prefix + key in state for key in expected):
            return f"names below {prefix!r} fit; save these alone, without {prefix!r} in front"
    if 2 * len(shared) < len(expected):
        example = f", they start with {min(state)}" if state else ""
        return (
            f"{len(shared)} of its {len(expected)} names are there, so they belong to another network{example}; "
            "give its name"
        )
    return "give the num_classes and options they belong to"


def _network_beside(source: Path) -> tuple[str, int] | None:
    """Network and number of classes according to the files of a run, or timm's config.json, beside the weights."""
    folder = source if source.is_dir() else source.parent
    try:
        if (folder / "recipe.yaml").is_file():
            facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
            return recipe.load(folder / "recipe.yaml").model.name, len(facts["classes"])
        facts = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return str(facts["architecture"]), int(facts["num_classes"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


_COMPRESSED = "it is compressed; unpack it and give the safetensors file in it"
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
"""Lower-case start of a file that is no safetensors file -> what it is, and what to do."""


def _advice(file: Path) -> str:
    with file.open("rb") as stream:
        start = stream.read(10**7)
    if start.startswith(b"PK\x03\x04"):
        return _archive_advice(file)
    if start.startswith(b"\x80"):
        return _pickle_advice(file, start)
    text = start[:1000].lstrip().lower()
    return next((advice for prefix, advice in _FORMATS.items() if text.startswith(prefix)), "is it complete?")


def _archive_advice(file: Path) -> str:
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
            if any("/code/" in name for name in names):
                return "it is a TorchScript archive; save the state_dict of the network it was made from instead"
            pickled = next((name for name in names if name.endswith("data.pkl")), None)
            if pickled is None:
                return "it is a zip archive; unpack it and give the safetensors file in it"
            with archive.open(pickled) as stream:
                return _pickle_advice(file, stream.read(10**7))
    # a damaged archive may raise anything
    except Exception:
        return "it is a zip archive, perhaps of torch.save, and damaged; is it complete?"


def _pickle_advice(file: Path, pickled: bytes) -> str:
    """What a pickle is, and Python that converts its weights to safetensors; nothing in the pickle is run."""
    kind = "a Lightning checkpoint" if b"pytorch-lightning_version" in pickled else "a pickle that torch.save wrote"
    keys = ("state_dict", "model_state_dict", "model")
    strings = {key: b"X" + len(key).to_bytes(4, "little") + key.encode() for key in keys}  # as pickle writes them
    entry = next((f"[{key!r}]" for key, string in strings.items() if string in pickled), "")
    return (
        f"it is {kind}; convert it once: import torch; from safetensors.torch import save_file; "
        f"w = torch.load({str(file)!r}, map_location='cpu', weights_only=True){entry}; "
        f"save_file({{k: v.clone() for k, v in w.items()}}, {str(file.with_suffix('.safetensors'))!r})"
    )
