"""Runs the application on a port of this machine until Ctrl-C."""

import logging
import secrets
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from sightline.facts import Progress
from sightline.report.networks import Network
from sightline.serve.app import LOOPBACK, check_token, create_app
from sightline.serve.service import open_service


class Server(uvicorn.Server):
    """Runs what `create_app` made; a signal cancels its jobs, so that it need not wait for them."""

    def __init__(self, app: Starlette) -> None:
        self.app = app
        config = uvicorn.Config(
            app,
            http="h11",
            ws="none",
            loop="asyncio",
            lifespan="off",
            log_level="critical",
            access_log=False,
            server_header=False,
            timeout_keep_alive=75,  # longer than a client waits before it asks again
            timeout_graceful_shutdown=3,
        )
        super().__init__(config)
        logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # it tells of each broken body

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called on Ctrl-C."""
        self.app.state.jobs.close()
        super().handle_exit(sig, frame)


def serve(
    listening: socket.socket,
    model: Network,
    weights: str | Path | None = None,
    classes: str | Path | None = None,
    *,
    whole: bool = False,
    token: str | None = None,
    tell: Callable[[str], None] = print,
    progress: Progress | None = None,
) -> None:
    """Answer requests about a model until Ctrl-C.

    Args:
        listening: where.
        model: a run folder, a network by name, or a module.
        weights: of a network by name.
        classes: file of its class names.
        whole: resize all of each image, whatever its shape.
        token: what a client has to send. None: nothing on this machine alone; elsewhere one is made.
        tell: called with lines about the address.
        progress: called with (what, done, total) before the server is ready.

    Raises:
        OSError: a file is missing.
        ValueError: the weights do not fit, no method works on the model, or as `check_token`.
    """
    check_token(token)
    host, port = listening.getsockname()[:2]
    is_local = host in LOOPBACK
    service = open_service(model, weights, classes, whole=whole, progress=progress)
    if not is_local:
        token = token or secrets.token_urlsafe(16)
        tell(f"warning: anybody who reaches {host} and has the token can use this server; nothing is encrypted")
    app = create_app(service, token=token, is_local=is_local)
    host = socket.gethostname() if host in ("0.0.0.0", "::") else host
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}/"
    tell(f"{service.network.name}: {address}{f'?token={token}' if token else ''} (Ctrl-C ends)")
    server = Server(app)
    with suppress(KeyboardInterrupt):  # raised again by uvicorn, unless a finalizer swallows it
        server.run(sockets=[listening])
    if server.should_exit:
        raise KeyboardInterrupt("stopped")
