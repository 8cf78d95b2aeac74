"""State that all threads share: the models, which they take turns to use, and the random state."""

import random
import threading
from collections.abc import Iterable
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
import torch
from torch import nn

_LINE: list["Turn"] = []
"""Calls that use a model or wait for it, in order of arrival."""
_shared = threading.RLock()
_PATIENCE = 1.0  # seconds after which a waiting thread checks again, even if it was not notified


def lock() -> None:
    """Keep other threads away from the shared state until `unlock`."""
    _shared.acquire()


def unlock() -> None:
    """Release the lock, and any hold that an interrupt kept this thread from releasing earlier."""
    try:
        while True:
            _shared.release()
    except RuntimeError:  # this thread no longer holds it
        pass


def renew_lock() -> None:
    """Make a new lock in a forked process, where the thread that held the old one does not exist."""
    global _shared
    _shared = threading.RLock()


class Random:
    """State of the random numbers of PyTorch, NumPy and Python."""

    def __init__(self) -> None:
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        self.torch = torch.get_rng_state()
        self.cuda = {device: torch.cuda.get_rng_state(device) for device in devices}
        self.numpy: Any = None
        self.python = random.getstate()

    def add_numpy(self) -> None:
        """Include NumPy, whose state takes longer than all others."""
        if self.numpy is None:
            self.numpy = np.random.get_state(legacy=False)

    def is_same_for_numpy(self) -> bool:
        """Whether NumPy has drawn no numbers since."""
        return str(self.numpy) == str(np.random.get_state(legacy=False))

    def put_back(self) -> None:
        """Make it the current state."""
        torch.set_rng_state(self.torch)
        for device, state in self.cuda.items():
            torch.cuda.set_rng_state(state, device)
        if self.numpy is not None:
            np.random.set_state(self.numpy)
        random.setstate(self.python)


class Turn:
    """The turn of one call to use the modules of a model.

    Calls that share a module take turns in order of arrival, unless they belong to the same thread. A thread that has a
    turn and asks for another waits only for threads that have theirs, so no thread waits for itself.
    """

    random: Random
    """The state before the first of the calls that are running now."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.thread = threading.get_ident()
        self.ids = frozenset(map(id, modules))
        self.is_running = False
        self.blockers: list[Turn] = []
        self.over: SimpleQueue[None] = SimpleQueue()

    def take(self) -> None:
        """Wait until no other thread uses one of the modules.

        Raises:
            RuntimeError: the wait would never end, because the other thread waits for a model that this one uses.
        """
        _LINE.append(self)
        while not self.is_running:
            lock()
            self.blockers = self._blockers()
            if self.blockers:
                self._check_end()
            else:
                self.random = next((turn.random for turn in _LINE if turn.is_running), None) or Random()
                self.is_running = True
            unlock()
            if not self.is_running:
                self.blockers[0].wait()

    def leave(self) -> None:
        """Pass the modules on to the next call; the last running call restores the random state."""
        lock()
        if self.is_running and not any(turn.is_running for turn in _LINE if turn is not self):
            self.random.put_back()
        self.is_running = False
        if self in _LINE:
            _LINE.remove(self)
        self.over.put(None)
        unlock()

    def wait(self) -> None:
        """Wait until this turn is over."""
        try:
            self.over.get(timeout=_PATIENCE)
        except Empty:
            return
        self.over.put(None)  # for other waiting threads

    def _blockers(self) -> list["Turn"]:
        has_turn = any(turn.is_running for turn in _LINE if turn.thread == self.thread)
        before = set[Turn]() if has_turn else set(_LINE[: _LINE.index(self)])
        return [
            turn
            for turn in _LINE
            if turn.thread != self.thread and (turn.is_running or turn in before) and not turn.ids.isdisjoint(self.ids)
        ]

    def _check_end(self) -> None:
        """Check that no chain of waiting threads leads back to this one."""
        threads = {turn.thread for turn in self.blockers}
        while more := {b.thread for turn in _LINE if turn.thread in threads for b in turn.waits_for()} - threads:
            threads |= more
        if self.thread in threads:
            raise RuntimeError(
                "expected threads that use one model inside a call with another to take them in the same order, got "
                "two that wait for each other; use one model after the other"
            )

    def waits_for(self) -> list["Turn"]:
        """Calls that must end before this one can begin."""
        return [] if self.is_running else [turn for turn in self.blockers if turn in _LINE]


def line() -> list[Turn]:
    """Calls that use a model or wait for it."""
    return [*_LINE]
