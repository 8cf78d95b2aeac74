"""Scores of each batch of images, kept on disk until all are complete."""

import hashlib
import io
import json
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from sightline.evaluation.planning import Plan
from sightline.facts import Verdict
from sightline.runs import write
from sightline.version import __version__

Array = np.ndarray
Table = dict[tuple[str, str], Array]
_TABLES = ("values", "curves", "sums", "maps")


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The scores of some images, and what else is needed of their maps; `+` joins two."""

    values: Table = field(default_factory=dict)
    """(method, metric) -> one value, or one row of values, per image."""
    curves: Table = field(default_factory=dict)
    """(method, kind) -> one curve per image."""
    sums: Table = field(default_factory=dict)
    """(method, class index) -> sum of the scaled maps, and how many they are, (2, h, w)."""
    maps: Table = field(default_factory=dict)
    """(method, row) -> raw map of an image that may be shown."""
    pictures: dict[int, tuple[Array, Array | None]] = field(default_factory=dict)
    """row -> image and mask of what may be shown; not saved."""
    similarity: Array = field(default_factory=lambda: np.zeros(()))
    """Sum over images of the rank correlations between the maps of methods, and the number of images, (2, k, k)."""
    areas: Array = field(default_factory=lambda: np.zeros(0))
    """Fraction of each image that its mask covers; none where it is empty."""
    verdicts: dict[tuple[str, int], list[Verdict]] = field(default_factory=dict)
    """(method, row) -> what to distrust."""
    layers: dict[str, str] = field(default_factory=dict)
    positions: dict[str, list[int]] = field(default_factory=dict)
    """Height and width of each method's maps."""
    notices: list[str] = field(default_factory=list)

    def __add__(self, other: "Scores") -> "Scores":
        return Scores(
            values=_joined(self.values, other.values, np.concatenate),
            curves=_joined(self.curves, other.curves, np.concatenate),
            sums=_joined(self.sums, other.sums, sum),
            maps=self.maps | other.maps,
            pictures=self.pictures | other.pictures,
            similarity=np.asarray(self.similarity + other.similarity),
            areas=np.concatenate([self.areas, other.areas]),
            verdicts=self.verdicts | other.verdicts,
            layers=self.layers | other.layers,
            positions=self.positions | other.positions,
            notices=self.notices + other.notices,
        )

    def save(self, path: Path) -> None:
        """Write it, the whole file or none of it."""
        arrays = {"similarity": self.similarity, "areas": self.areas}
        for name in _TABLES:
            arrays |= {"\t".join((name, *key)): value for key, value in getattr(self, name).items()}
        facts: dict[str, Any] = {name: getattr(self, name) for name in ("layers", "positions", "notices")}
        facts["verdicts"] = [
            (*key, [(verdict.kind, verdict.level, verdict.amount, verdict.details) for verdict in verdicts])
            for key, verdicts in self.verdicts.items()
        ]
        file = io.BytesIO()
        np.savez(file, allow_pickle=False, facts=np.array(json.dumps(facts)), **arrays)
        try:
            write(path, file.getvalue())
        except FileNotFoundError:
            pass  # another process that makes the same part has put it there, or has finished all of them
        except OSError:
            clear(path.parent, [])
            raise

    @classmethod
    def load(cls, path: Path) -> "Scores | None":
        """What `save` wrote; None where there is no file, or a damaged one."""
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
                arrays: dict[str, Array] = dict(stored)
            facts: dict[str, Any] = json.loads(str(arrays.pop("facts")))
            facts["verdicts"] = {
                (method, row): [Verdict(*verdict) for verdict in verdicts]
                for method, row, verdicts in facts["verdicts"]
            }
            tables: dict[str, Table] = {name: {} for name in _TABLES}
            for name in [name for name in arrays if "\t" in name]:
                table, method, key = name.split("\t")
                tables[table][method, key] = arrays.pop(name)
            return cls(**tables, **arrays, **facts)
        except Exception:  # what a damaged archive raises depends on the bit: RuntimeError, TokenError, KeyError, ...
            return None


def _joined(one: Table, other: Table, join: Callable[[Any], Any]) -> Table:
    return one | other | {key: join([one[key], other[key]]) for key in one.keys() & other.keys()}


Stored = TypeVar("Stored", Scores, Plan)


@dataclass
class PartialResults:
    """Files of what is done already, for an evaluation that asks the same question."""

    folder: Path | None
    files: list[Path] = field(default_factory=list)

    def kept(self, name: Callable[[], str], make: Callable[[], Stored], kind: type[Stored]) -> Stored:
        """What a file of that name holds, made and put there where it holds nothing; only made if no files are kept."""
        path = self.path(name)
        value = None if path is None else kind.load(path)
        if value is None:
            value = make()
            if path is not None:
                value.save(path)
        return value

    def path(self, name: Callable[[], str]) -> Path | None:
        """The file of that name, if files are kept."""
        if self.folder is None:
            return None
        self.files.append(self.folder / name())
        return self.files[-1]

    def clear(self) -> None:
        """Delete the files, and their folder if it is empty then."""
        if self.folder is not None:
            clear(self.folder, self.files)


def key_of(model: nn.Module, *question: Any) -> str:
    """The same for the same weights and question, and for no other; tensors and arrays in it count to the last bit."""
    layer = getattr(model, "default_layer", None)
    facts = exact_text((question, layer, __version__))
    state = model.state_dict()
    return digest_of(*state.values(), also=facts + repr(list(state)))


def digest_of(*tensors: Tensor | None, also: str = "") -> str:
    """Digest of the values of tensors, and of a text."""
    digest = hashlib.sha256(also.encode())
    for tensor in tensors:
        if tensor is not None:
            digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        if tensor is not None and tensor.numel():  # an empty tensor has no stride
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def clear(folder: Path, files: Iterable[Path]) -> None:
    """Delete the files, and the folder if nothing else is in it."""
    for file in files:
        file.unlink(missing_ok=True)
    with suppress(OSError):  # there is something else in it, or another process was quicker
        folder.rmdir()


def exact_text(values: Any) -> str:
    """Values in containers as text: tensors and arrays to the last bit, functions by their code and closures.

    >>> exact_text([lambda: 1]) == exact_text([lambda: 1]), exact_text([lambda: 1]) == exact_text([lambda: 2])
    (True, False)
    """

    def exact(leaf: Any) -> Any:
        if isinstance(leaf, FunctionType):
            enclosed = [cell.cell_contents for cell in leaf.__closure__ or ()]
            return digest_of(
                also=f"{_code(leaf.__code__)}{exact_text((leaf.__defaults__, leaf.__kwdefaults__, enclosed))}"
            )
        return digest_of(torch.as_tensor(leaf)) if isinstance(leaf, Tensor | np.ndarray) else leaf

    return repr(tree_map(exact, values))


def _code(code: CodeType) -> str:
    constants = [_code(one) if isinstance(one, CodeType) else repr(one) for one in code.co_consts]
    return f"{code.co_code.hex()}{code.co_names}{constants}"
