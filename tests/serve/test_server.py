"""The server as a process: how it starts, what it refuses before anything heavy, what it survives, and how it ends."""

import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest
from tests.serve.conftest import png
from tests.serve.test_api import PHOTO, Held, error_of
from tests.test_cli import refused

from sightline import cli, serve
from sightline.serve import Service, server


@pytest.fixture
def held(service: Service, monkeypatch: pytest.MonkeyPatch) -> Held:
    return Held(service, monkeypatch)


def talk(address: str, *parts: bytes, wait: float = 0.0) -> bytes:
    """What is answered to these bytes."""
    url = urlsplit(address)
    with socket.create_connection((url.hostname, url.port), 10) as connection:
        for part in parts:
            connection.sendall(part)
            time.sleep(wait)
        with suppress(OSError):  # it may have been closed by now
            connection.shutdown(socket.SHUT_WR)
        answer = b""
        with suppress(ConnectionResetError):
            while more := connection.recv(2**16):
                answer += more
    return answer


def test_answers_on_a_port(address_of: Callable[..., str]) -> None:
    address = address_of()
    files = {"images": ("a.png", PHOTO)}
    assert httpx2.post(f"{address}/explain", files=files, timeout=30).json()["images"][0]["name"] == "a.png"
    health = httpx2.get(f"{address}/health")
    assert health.json()["status"] == "ok" and "server" not in health.headers


def test_large_upload_is_told_so(address_of: Callable[..., str]) -> None:
    address = address_of(bytes=10_000)
    for _ in range(2):
        answer = httpx2.post(f"{address}/explain", files={"images": ("a.png", bytes(20_000_000))}, timeout=30)
        assert "10,000 bytes" in error_of(answer, 413)


def test_slow_upload_is_given_up(address_of: Callable[..., str]) -> None:
    address = address_of(upload_seconds=0.2)
    head = b"POST /explain HTTP/1.1\r\nHost: localhost\r\nContent-Length: 900\r\n"
    head += b"Content-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\n"
    url = urlsplit(address)
    with socket.create_connection((url.hostname, url.port), 10) as connection:
        connection.sendall(head)
        assert connection.recv(2**16).startswith(b"HTTP/1.1 408")


def test_broken_requests(address_of: Callable[..., str]) -> None:
    address = address_of()
    for text in (b"\x00\xff\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9\r\n\r\n", b"GET /health HTTP/1.1\r\n\r\n", b""):
        answer = talk(address, text)
        assert not answer or re.match(rb"HTTP/1\.1 4\d\d ", answer), answer
    huge = b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 200_000 + b"\r\n\r\n"
    assert talk(address, huge)[:12] in (b"HTTP/1.1 400", b"HTTP/1.1 431")
    assert httpx2.get(f"{address}/health").status_code == 200


def test_client_that_goes_cancels_its_job(address_of: Callable[..., str], held: Held) -> None:
    address = address_of()
    with pytest.raises(httpx2.TimeoutException):
        httpx2.post(f"{address}/explain", files={"images": ("a.png", PHOTO)}, timeout=0.5)
    assert held.begun.is_set()
    held.begun.clear()
    id = httpx2.post(f"{address}/jobs", files={"images": ("a.png", PHOTO)}).json()["id"]
    assert held.begun.wait(5)  # the first one has ended
    held.go.set()
    for _ in range(200):
        if httpx2.get(f"{address}/jobs/{id}").json()["state"] == "done":
            return
        time.sleep(0.02)
    raise AssertionError("the job does not end")


def test_port_in_use_is_told_before_anything_else(capfd: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = refused(capfd, "serve", "nothing", "--port", port)
        code = f"""
import sys
from sightline import cli
try:
    cli.main(["serve", "nothing", "--port", "{port}"])
except SystemExit:
    print("torch" in sys.modules)
"""
        assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
    assert f"port {port}" in line and "in use" in line and "--port" in line


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("nothing", "--weights FILE"),
        ("runs/nothing", "no such run folder"),
        ("resnet1800 --weights none.pth", "did you mean 'resnet18'"),
        ("resnet18 --weights none.pth", "none.pth"),
        ("RUN --weights w.pth", "leave them out"),
        ("RUN --host 256.1.1.1", "cannot listen on 256.1.1.1"),
        ("RUN --token a;b", "expected a token of letters"),
        ("RUN --port 65536", "0 to 65535"),
        ("RUN --port x", "0 to 65535"),
        ("EMPTY", "is not a run"),
    ],
)
def test_wrong_lines(
    line: str, reason: str, run_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], unchecked: None
) -> None:
    places = {"RUN": str(run_folder), "EMPTY": str(tmp_path)}
    words = [places.get(word, word) for word in line.split()]
    assert reason in refused(capfd, "serve", "--port", 0, *words)


def test_missing_libraries_are_named(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    assert "pip install 'sightline[serve]'" in refused(capfd, "serve", "nothing", "--port", 0)


def test_other_host_needs_a_token(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(of: server.Server, sockets: Any) -> None:
        of.app.state.jobs.close()

    monkeypatch.setattr(server.Server, "run", run)
    monkeypatch.setattr(server, "open_service", lambda *_, **__: service)
    for host, given in (("0.0.0.0", None), ("0.0.0.0", "abc"), ("127.0.0.1", None)):
        lines: list[str] = []
        with serve.listening(host, 0) as listening:
            port = listening.getsockname()[1]
            serve.serve(listening, "run", token=given, tell=lines.append)
        if host == "127.0.0.1":
            assert lines == [f"vgg_gap: http://127.0.0.1:{port}/ (Ctrl-C ends)"]
        else:
            assert lines[0].startswith("warning: ") and "encrypted" in lines[0]
            assert f"http://{socket.gethostname()}:{port}/?" in lines[1]  # nobody can open 0.0.0.0 from elsewhere
            token = re.search(r"token=([\w-]+)", lines[1])
            assert token and (token[1] == given if given else len(token[1]) >= 20)


def started(*arguments: str) -> tuple[subprocess.Popen[str], str]:
    """The verb as a process, and its address."""
    command = [sys.executable, "-m", "sightline", "serve", *arguments, "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stderr
    for line in process.stderr:
        if found := re.search(r"http://\S+", line):
            return process, found[0]
    raise AssertionError("it does not begin")


def test_ctrl_c_ends_a_server_that_works(run_folder: Path) -> None:
    process, address = started(str(run_folder))
    try:
        files = {"images": ("a.png", png())}
        assert httpx2.post(f"{address}explain", files=files, timeout=30).status_code == 200
        data = {"methods": "rise,score_cam,occlusion,ablation_cam"}
        id = httpx2.post(f"{address}jobs", files=files, data=data, timeout=30).json()["id"]
        assert httpx2.get(f"{address}jobs/{id}").json()["state"] in ("waiting", "running")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 130 and out == "" and err.splitlines() == ["sightline: stopped"]


def test_help_names_the_verb(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["serve", "--help"])
    assert "RUN_OR_MODEL" in capfd.readouterr().out
