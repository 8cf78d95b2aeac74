"""What the other library would have done differently, for the calls made so far."""

import threading
from dataclasses import dataclass

_LOCK = threading.Lock()


@dataclass(frozen=True)
class Difference:
    """One thing that the other library does differently, and where it mattered."""

    name: str
    """The class that was called."""
    sentence: str
    """What the other library does, and what happens here."""
    calls: int = 0
    """How many calls it concerns."""
    shares: tuple[float, float] | None = None
    """The lowest and the highest share of the call that it concerns, 0 to 1, where the sentence speaks of one."""

    def __str__(self) -> str:
        low, high = self.shares or (0.0, 0.0)
        share = "" if self.shares is None else f" The share here: {f'{low:.0%} to ' * (low != high)}{high:.0%}."
        return f"{self.name} ({self.calls} call{'s' * (self.calls > 1)}): {self.sentence}{share}"


class Report(tuple[Difference, ...]):
    """All differences, one per line when printed."""

    def __str__(self) -> str:
        return "\n".join(map(str, self)) or "no call so far would have given anything else"

    __repr__ = __str__


_differences: dict[tuple[str, str], Difference] = {}


def note(name: str, sentence: str, share: float | None = None) -> None:
    """Count one call to which a difference applies."""
    with _LOCK:
        known = _differences.get((name, sentence), Difference(name, sentence))
        low, high = known.shares or (share, share)
        shares = None if share is None or low is None or high is None else (min(low, share), max(high, share))
        _differences[name, sentence] = Difference(name, sentence, known.calls + 1, shares)


def report(*, clear: bool = False) -> Report:
    """What the other library would have done differently in the calls made so far in this process.

    Args:
        clear: start a new report afterwards.

    >>> _ = report(clear=True)
    >>> print(report())
    no call so far would have given anything else
    """
    with _LOCK:
        result = Report(_differences.values())
        if clear:
            _differences.clear()
    return result
