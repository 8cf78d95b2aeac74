"""A small run, its service, and clients of it; nothing that a test does may end in a traceback."""

import io
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmarks.serve_load import small_run
from PIL import Image
from starlette.testclient import TestClient

from sightline.serve import Limits, Service, create_app, listening, open_service
from sightline.serve.server import Server

HERE = "http://127.0.0.1"


def png(height: int = 30, width: int = 40, seed: int = 0, **how: Any) -> bytes:
    """An image file of noise."""
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, how.pop("format", "PNG"), **how)
    return file.getvalue()


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run(tmp_path_factory.mktemp("serve") / "run")


@pytest.fixture(scope="session")
def service(run_folder: Path) -> Service:
    return open_service(run_folder)


@pytest.fixture
def client_of(service: Service) -> Iterator[Callable[..., TestClient]]:
    """Makes clients of the service with other limits or a token."""
    apps: list[Any] = []

    def make(token: str | None = None, is_local: bool = True, base: str = HERE, **limits: Any) -> TestClient:
        app = create_app(service, token=token, is_local=is_local, limits=Limits(**limits))
        apps.append(app)
        return TestClient(app, base_url=base, follow_redirects=False)

    yield make
    for app in apps:
        app.state.jobs.close()


@pytest.fixture
def client(client_of: Callable[..., TestClient]) -> TestClient:
    return client_of()


@pytest.fixture
def address_of(service: Service) -> Iterator[Callable[..., str]]:
    """Starts servers of the service on free ports."""
    started: list[tuple[Server, threading.Thread]] = []

    def start(token: str | None = None, **limits: Any) -> str:
        socket = listening("127.0.0.1", 0)
        server = Server(create_app(service, token=token, limits=Limits(**limits)))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]})
        thread.start()
        started.append((server, thread))
        return f"{HERE}:{socket.getsockname()[1]}"

    yield start
    for server, thread in started:
        server.app.state.jobs.close()
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


@pytest.fixture(autouse=True)
def no_traceback(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    yield
    assert "Traceback" not in capfd.readouterr().err
