"""Other processes, as far as a function can tell."""

import pickle
from collections.abc import Callable, Iterable, Iterator
from typing import Any


def in_reverse(function: Callable[..., Any], pairs: Iterable[tuple[Any, Any]], *common: Any) -> Iterator[Any]:
    """All that goes there and comes back is pickled; the last is finished first."""
    for key, argument in reversed([*pairs]):
        there: tuple[Any, ...] = pickle.loads(pickle.dumps((argument, *common)))
        yield key, pickle.loads(pickle.dumps(function(*there)))
