"""What several test files share."""

import jaxtyping
import pytest


@pytest.fixture
def unchecked():
    """Switch the shape checker off, which users do not have, to see the package's own error messages."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
