"""What each batch of images contributes to an evaluation, kept on disk until all are there."""

import hashlib
import io
import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from sightline.facts import Verdict
from sightline.runs import write
from sightline.version import __version__

Array = np.ndarray
_TABLES = ("values", "curves", "sums", "counts", "maps")


@dataclass(frozen=True, kw_only=True)
class Part:
    """Of the images of one batch; `+` joins two."""

    values: dict[tuple[str, str], Array] = field(default_factory=dict)
    """(method, metric) -> one value, or one row of values, per image."""
    curves: dict[tuple[str, str], Array] = field(default_factory=dict)
    """(method, kind) -> one curve per image."""
    sums: dict[tuple[str, str], Array] = field(default_factory=dict)
    """(method, class index) -> sum of the scaled maps."""
    counts: dict[tuple[str, str], Array] = field(default_factory=dict)
    """How many maps are in each sum."""
    maps: dict[tuple[str, str], Array] = field(default_factory=dict)
    """(method, row) -> raw map of an image that may be shown."""
    alike: Array
    """Sum over images of the rank correlations between the maps of methods."""
    areas: Array
    """Share of each image that its mask covers; none where it is empty."""
    verdicts: dict[str, list[list[Verdict]]]
    layers: dict[str, str]
    positions: dict[str, list[int]]
    """Height and width of each method's maps."""
    notices: list[str] = field(default_factory=list)

    def __add__(self, other: "Part") -> "Part":
        def joined(name: str) -> dict[tuple[str, str], Array]:
            mine, yours = getattr(self, name), getattr(other, name)
            return {key: np.concatenate([mine[key], yours[key]]) for key in mine}

        def added(name: str) -> dict[tuple[str, str], Array]:
            mine, yours = getattr(self, name), getattr(other, name)
            return {key: np.asarray(mine.get(key, 0) + yours.get(key, 0)) for key in mine | yours}

        return Part(
            values=joined("values"),
            curves=joined("curves"),
            sums=added("sums"),
            counts=added("counts"),
            maps=self.maps | other.maps,
            alike=self.alike + other.alike,
            areas=np.concatenate([self.areas, other.areas]),
            verdicts={method: said + other.verdicts[method] for method, said in self.verdicts.items()},
            layers=other.layers,
            positions=other.positions,
            notices=list(dict.fromkeys([*self.notices, *other.notices])),
        )

    def save(self, path: Path) -> None:
        """Write it, whole or not at all."""
        arrays = {"alike": self.alike, "areas": self.areas}
        for name in _TABLES:
            arrays |= {"\t".join((name, *key)): value for key, value in getattr(self, name).items()}
        facts: dict[str, Any] = {name: getattr(self, name) for name in ("layers", "positions", "notices")}
        facts["verdicts"] = {
            method: [
                [(verdict.kind, verdict.level, verdict.amount, verdict.details) for verdict in image]
                for image in images
            ]
            for method, images in self.verdicts.items()
        }
        packed = json.dumps(facts)
        file = io.BytesIO()
        np.savez(file, allow_pickle=False, facts=np.array(packed), **arrays)
        try:
            write(path, file.getvalue())
        except FileNotFoundError:
            pass  # another process that makes the same part has put it there, or is done with all of them
        except OSError:
            clear(path.parent, [])
            raise

    @classmethod
    def load(cls, path: Path) -> "Part | None":
        """What `save` wrote; None where nothing, or nothing whole, is there."""
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
                arrays: dict[str, Array] = dict(stored)
            facts: dict[str, Any] = json.loads(str(arrays.pop("facts")))
            facts["verdicts"] = {
                method: [[Verdict(*verdict) for verdict in image] for image in images]
                for method, images in facts["verdicts"].items()
            }
            tables: dict[str, dict[tuple[str, str], Array]] = {name: {} for name in _TABLES}
            for name in [name for name in arrays if "\t" in name]:
                table, method, key = name.split("\t")
                tables[table][method, key] = arrays.pop(name)
            return cls(**tables, **arrays, **facts)
        except Exception:  # what a damaged archive raises depends on the bit: RuntimeError, TokenError, KeyError, ...
            return None


def key_of(model: nn.Module, *question: Any) -> str:
    """The same for the same weights and question, and for no other; tensors and arrays in it count to the last bit."""
    layer = getattr(model, "default_layer", None)
    facts = exact_text((question, layer, __version__))
    state = model.state_dict()
    return digest_of(*state.values(), also=facts + repr(list(state)))


def digest_of(*tensors: Tensor | None, also: str = "") -> str:
    """Of the values of tensors, and of a text."""
    digest = hashlib.sha256(also.encode())
    for tensor in tensors:
        if tensor is not None:
            digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        if tensor is not None and tensor.numel():  # nothing has no stride
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def clear(folder: Path, files: Iterable[Path]) -> None:
    """Take the files away, and the folder if nothing else is in it."""
    for file in files:
        file.unlink(missing_ok=True)
    with suppress(OSError):  # there is something else in it, or another process was quicker
        folder.rmdir()


def exact_text(values: Any) -> str:
    """Values in containers as text, tensors and arrays in them to the last bit."""

    def exact(leaf: Any) -> Any:
        return digest_of(torch.as_tensor(leaf)) if isinstance(leaf, Tensor | np.ndarray) else leaf

    return repr(tree_map(exact, values))
