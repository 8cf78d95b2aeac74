"""What several test files share."""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from types import FunctionType, ModuleType

import jaxtyping
import pytest

from sightline import data
from sightline.explainers import tokens
from sightline.explainers.capture import features, replay
from sightline.inference import axes, memory, operations, positions, preserve
from sightline.recipe import Data

WITHOUT_SHAPES = (axes, features, memory, operations, positions, preserve, replay, tokens)
"""They run at each operation of a network and name no shape: to check their calls would take most of the time."""


def functions_of(owner: ModuleType | type) -> Iterator[FunctionType]:
    """The functions of a module and of its classes, those behind properties included."""
    for value in vars(owner).values():
        if isinstance(value, property):
            value = value.fget
        elif isinstance(value, cached_property):
            value = value.func
        if isinstance(value, type) and value.__module__ == owner.__name__:
            yield from functions_of(value)
        elif isinstance(value, FunctionType) and value.__module__ in (owner.__name__, owner.__dict__.get("__module__")):
            yield value


for module in WITHOUT_SHAPES:
    for function in functions_of(module):
        function.__no_type_check__ = True


@pytest.fixture
def unchecked():
    """Switch the shape checker off, which users do not have, to see the package's own error messages."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.fixture(scope="module")
def without_shape_checks() -> Iterator[None]:
    """For files of tests of whole commands, where they would take a third of the time; other tests have them."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def chromium() -> str:
    """The browser that draws the pages."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        give_up = pytest.fail if "SIGHTLINE_REQUIRE_BROWSER" in os.environ else pytest.skip
        give_up("no chromium is installed (Debian: apt-get install chromium)")
    return found


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
