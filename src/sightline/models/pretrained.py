"""Matches weights to a network: by name, without the prefixes of wrappers, or by order, or refuses them with advice."""

import json
from collections.abc import Mapping
from itertools import chain, zip_longest
from pathlib import Path

from torch import Tensor, nn

from sightline import recipe
from sightline.models.vit import TinyViT
from sightline.models.weights import State, Weights

_LISTED = 10  # differences from another network that an error names
_COUNTER = "num_batches_tracked"


class OtherClasses(ValueError):
    """The weights fit, except that they are those of another number of classes."""


def named_as(model: nn.Module, weights: Weights) -> Weights:
    """The weights by the model's names, as far as that can be told.

    Prefixes of wrappers are taken off if that matches more names: DataParallel writes `module.`, torch.compile
    `_orig_mod.` (anywhere), a Lightning module the name of an attribute, an average of weights `module.` and a counter.
    What lies beside a prefix below which all of the model's names are is left out. Names of version 0.1 are understood.
    Names that differ are matched by their order where that is safe, see `by_order`.
    """
    state, notices = weights
    if isinstance(model, TinyViT):
        state = model.current_names(state)
    expected = model.state_dict()
    counters = {key: value for key, value in expected.items() if key.endswith(_COUNTER)}
    if not any(key.endswith(_COUNTER) for key in state):  # of BatchNorm; PyTorch 0.4 had none, and nothing reads them
        expected = {key: value for key, value in expected.items() if key not in counters}
    for step in (_without_prefixes, _below_one_prefix, _by_order):
        if expected.keys() != state.keys():
            state, more = step(expected, state)
            notices += more
    filled = {key: value for key, value in counters.items() if key not in expected}
    return Weights(filled | state if filled else state, notices)


def by_order(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, str] | None:
    """The model's names and those of the weights, if their order tells which is which; otherwise None.

    `state_dict` lists modules in the order in which they were made. So the two must have equally many entries, and one
    by one the same kind (`weight`, `running_mean`, ...), the same shape and the same division into modules; a name that
    both have must be at the same place. Only the number of classes of one module may differ, in all of its entries. A
    file that sorts its names, such as safetensors, has lost that order.
    """
    if len(expected) != len(state) or _is_sorted(state):
        return None
    pairs = dict(zip(expected, state, strict=True))
    modules: dict[str, str] = {}
    for ours, theirs in pairs.items():
        (module, _, kind), (their_module, _, their_kind) = ours.rpartition("."), theirs.rpartition(".")
        is_moved = theirs in expected and theirs != ours
        if is_moved or kind != their_kind or modules.setdefault(module, their_module) != their_module:
            return None
    renamed = {ours: state[theirs] for ours, theirs in pairs.items()}
    other = [ours for ours, value in renamed.items() if value.shape != expected[ours].shape]
    heads = {ours.rpartition(".")[0] for ours in other}
    head = [ours for ours in expected if ours.rpartition(".")[0] in heads]
    fits = not other or (len(heads) == 1 and head == other and other_classes(expected, renamed) is not None)
    return pairs if fits and len(set(modules.values())) == len(modules) else None


def _by_order(expected: State, state: State) -> tuple[State, tuple[str, ...]]:
    pairs = by_order(expected, state)
    if pairs is None:
        return state, ()
    ours, theirs = next(pair for pair in pairs.items() if pair[0] != pair[1])
    text = (
        f"weights: matched by their order, since the names differ ({theirs} became {ours}, ...); all {len(pairs)} "
        "agree in kind, shape and module; check a few predictions"
    )
    return {ours: state[theirs] for ours, theirs in pairs.items()}, (text,)


def _is_sorted(state: Mapping[str, Tensor]) -> bool:
    """Whether the names of each type of number are in alphabetical order."""
    by_type: dict[object, list[str]] = {}
    for name, value in state.items():
        by_type.setdefault(value.dtype, []).append(name)
    return all(names == sorted(names) for names in by_type.values())


def _without_prefixes(expected: State, state: State) -> tuple[State, tuple[str, ...]]:
    best, notices = state, ()
    names = {key: key.replace("_orig_mod.", "") for key in state if key != "n_averaged"}
    while names:
        if len(expected.keys() & set(names.values())) > len(expected.keys() & best.keys()):
            best = {name: state[key] for key, name in names.items()}
            key, name = next(pair for pair in names.items() if pair[0] != pair[1])
            prefix = key.removesuffix(name) if key.endswith(name) else "_orig_mod."
            notices = (f"weights: {prefix!r} taken off the names ({key} became {name}, ...)",)
        if len({name.partition(".")[0] for name in names.values()}) > 1:
            break
        names = {key: rest for key, name in names.items() if (rest := name.partition(".")[2])}
    return best, notices


def _below_one_prefix(expected: State, state: State) -> tuple[State, tuple[str, ...]]:
    prefixes = _prefixes(expected, state)
    if len(prefixes) != 1:
        return state, ()
    beside = [key for key in state if not key.startswith(prefixes[0])]
    text = f"weights: those below {prefixes[0]!r}; left out: {', '.join(beside[:3])}{', ...' * (len(beside) > 3)}"
    inside = {key.removeprefix(prefixes[0]): value for key, value in state.items() if key not in beside}
    return inside, (text,)


def _prefixes(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """First parts of names below which all of the model's names are."""
    firsts = dict.fromkeys(key.partition(".")[0] + "." for key in state)
    return [first for first in firsts if all(first + key in state for key in expected)]


def mismatches(model: nn.Module, state: State) -> list[str]:
    """What differs between the model's and these weights' names and shapes, the kinds of difference in turn."""
    expected = model.state_dict()
    missing = [f"{key} is missing" for key in expected if key not in state]
    unknown = [f"{key} is unknown to the model" for key in state if key not in expected]
    shapes = [
        f"{key} has shape {tuple(state[key].shape)} instead of {tuple(value.shape)}"
        for key, value in expected.items()
        if key in state and state[key].shape != value.shape
    ]
    return [problem for problem in chain.from_iterable(zip_longest(missing, unknown, shapes)) if problem]


def load_weights(
    model: nn.Module, name: str, weights: Weights, source: Path, new_classes: int | None = None
) -> tuple[str, ...]:
    """Load weights that fit a model exactly, or up to its head: one of `new_classes` classes stays as it is.

    Returns:
        The notices.

    Raises:
        ValueError: they do not fit; the message says which network they belong to, if that can be told.
        OtherClasses: only the number of classes differs.
    """
    state, notices = weights
    expected = model.state_dict()
    counts = other_classes(expected, state)
    if counts is not None and counts[0] == new_classes:
        head = [key for key, value in expected.items() if value.shape != state[key].shape]
        state = state | {key: expected[key] for key in head}
        text = f"{', '.join(head)} start fresh: those of the file are of {counts[1]} classes, not {counts[0]}"
        notices += (f"weights: {text}",)
    elif problems := mismatches(model, state):
        more = f" (and {len(problems) - _LISTED} more)" if len(problems) > _LISTED else ""
        misfit = f"weights in {source} do not fit {name}: {', '.join(problems[:_LISTED])}{more}"
        if counts is not None:
            ours, theirs = counts
            raise OtherClasses(f"{misfit}; give num_classes={theirs}, they are those of {theirs} classes, not {ours}")
        raise ValueError(f"{misfit}; {_remedy(model, name, state, source)}")
    model.load_state_dict(state)
    return notices


def other_classes(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> tuple[int, int] | None:
    """Number of classes of the model and of the weights, if nothing else differs."""
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
    if prefixes := _prefixes(expected, state):
        return f"names below {prefixes[0]!r} fit; save these alone, without {prefixes[0]!r} in front"
    if 2 * len(shared) < len(expected):
        return (
            f"{len(shared)} of its {len(expected)} names are there, and their order and shapes differ too, so they "
            "belong to another network; give its name"
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
