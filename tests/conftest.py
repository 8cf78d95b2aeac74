"""What several test files share."""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from inspect import get_annotations
from typing import Any, get_args

import jaxtyping
import pytest

checked = jaxtyping.jaxtyped


def names_shape(hint: Any) -> bool:
    """Whether a type hint is, or holds, one with a shape."""
    is_shape = isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray)
    return is_shape or any(map(names_shape, get_args(hint)))


def with_shapes(made: Any = None, *, typechecker: Any) -> Any:
    """Check the functions and data classes that name a shape: to check all calls would take most of the time, and
    pyright knows the other types."""
    if made is None:
        return partial(with_shapes, typechecker=typechecker)
    hints = [hint for one in getattr(made, "__mro__", (made,)) for hint in get_annotations(one).values()]
    return checked(made, typechecker=typechecker) if any(map(names_shape, hints)) else made


jaxtyping.jaxtyped = with_shapes
"""The import hook of pytest decorates with it, so it comes before the first import of the package."""


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
    from sightline import data

    load = data.load

    def few(asked: Any) -> dict[str, data.ImageSet]:
        sets = load(asked)
        return sets | {"val": replace(sets["val"], labels=sets["val"].labels[:50], names=sets["val"].names[:50])}

    monkeypatch.setattr(data, "load", few)
