"""What several test files share."""

import signal
from collections.abc import Callable
from dataclasses import replace

import jaxtyping
import pytest

from sightline import data
from sightline.recipe import Data


@pytest.fixture
def unchecked():
    """Switch the shape checker off, which users do not have, to see the package's own error messages."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def ctrl_c_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Have Ctrl-C pressed once, when so many steps are done."""
    from sightline.training.log import Log

    plain = Log.step

    def press(steps: int) -> None:
        def step(log: Log, done: int) -> None:
            plain(log, done)
            if done == steps:
                monkeypatch.setattr(Log, "step", plain)
                signal.raise_signal(signal.SIGINT)

        monkeypatch.setattr(Log, "step", step)

    return press


@pytest.fixture
def few_validation_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """The 1000 of clutter would take most of the time."""
    load = data.load

    def few(asked: Data) -> dict[str, data.ImageSet]:
        sets = load(asked)
        return sets | {"val": replace(sets["val"], labels=sets["val"].labels[:50], names=sets["val"].names[:50])}

    monkeypatch.setattr(data, "load", few)
