"""Malformed requests and images against one server: which answers they get, and whether it still works afterwards.

python benchmarks/serve_fuzz.py [--requests 10000] [--seed 0]

Right are 200, 202, a refusal with one line of JSON (4xx), and 503 of a full queue. A request that is no HTTP may also
be answered by the HTTP library, in its own words, or be cut off. Any other 5xx, an answer that does not come, and a
traceback of the server are faults.
"""

import argparse
import io
import json
import random
import socket
import struct
import tempfile
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import numpy as np
from measure import save
from PIL import Image
from serve_load import photo, served, small_run

PATIENCE = 60.0  # seconds until an answer is missing
FORMATS = ("PNG", "JPEG", "TIFF", "GIF", "BMP", "WEBP", "PPM", "JPEG2000", "ICO", "TGA")
PATHS = ("/explain", "/predict", "/jobs")
WORDS = ("", "grad_cam", "grad_cam@features", "all", "..", "-1", "3", "1e9", "None", "\0", "a,b", "\u202e", "x" * 3000)
Request = tuple[bytes, bool]
"""Its bytes, and whether an answer in JSON must come."""


def picture(rng: random.Random) -> bytes:
    """A small image file of a random format and mode."""
    pixels = np.random.default_rng(rng.randrange(2**32)).integers(0, 255, (rng.randint(1, 40), rng.randint(1, 40), 3))
    image = Image.fromarray(pixels.astype(np.uint8)).convert(rng.choice(("RGB", "L", "P", "1", "RGBA", "CMYK")))
    file = io.BytesIO()
    try:
        image.save(file, rng.choice(FORMATS))
    except (OSError, ValueError):  # not every format has every mode
        image.convert("RGB").save(file, "PNG")
    return file.getvalue()


def damaged(rng: random.Random, content: bytes) -> bytes:
    """Bytes that are changed, cut, doubled, or put into others."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at, length = rng.randrange(len(changed) + 1), rng.choice((1, 1, 2, 4, 30))
        kind = rng.randrange(6)
        if kind == 0:
            changed[at : at + length] = rng.randbytes(length)
        elif kind == 1:
            del changed[at:]
        elif kind == 2:
            del changed[at : at + length]
        elif kind == 3:
            changed[at:at] = changed[at : at + length] * rng.randint(1, 50)
        elif kind == 4:
            changed[at : at + length] = rng.choice((b"\xff", b"\0", b"\x7f")) * length
        else:
            changed[at:at] = rng.choice((b"\r\n", b"--b", b"--b--\r\n", b"\r\n\r\n", b'"', b";", b"PK\3\4"))
    return bytes(changed)


def bomb(rng: random.Random) -> bytes:
    """A small file that claims to be a huge image, or is one."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    side = rng.choice((4000, 9000, 13_000, 60_000, 2**31 - 1))
    if rng.random() < 0.3:
        return b"GIF89a" + struct.pack("<HHBBB", min(side, 65535), 65535, 0, 0, 0) + b"," + rng.randbytes(40)
    rows = bytes(side // 8 + 1) * side if side < 5000 else bytes(2**20)
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def part(name: str, content: bytes, filename: str | None = None) -> bytes:
    file = "" if filename is None else f'; filename="{filename}"'
    head = f'--b\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'
    return head.encode("utf-8", "surrogatepass") + content + b"\r\n"


def http(
    path: str, body: bytes, kind: str = "multipart/form-data; boundary=b", method: str = "POST", more: str = ""
) -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(body)}\r\n"
    return f"{head}Content-Type: {kind}\r\n{more}\r\n".encode() + body


def an_image(rng: random.Random) -> Request:
    content = damaged(rng, picture(rng)) if rng.random() < 0.9 else rng.randbytes(rng.randrange(200))
    return http(rng.choice(PATHS), part("images", content, "a.png") + b"--b--\r\n"), True


def a_bomb(rng: random.Random) -> Request:
    return http(rng.choice(PATHS), part("images", bomb(rng), "a.png") + b"--b--\r\n"), True


def a_mask(rng: random.Random) -> Request:
    mask = bomb(rng) if rng.random() < 0.05 else damaged(rng, picture(rng))
    return http("/predict", part("images", photo(0), "a.png") + part("mask", mask, "m.png") + b"--b--\r\n"), True


def some_fields(rng: random.Random) -> Request:
    names = ("images", "sample", "methods", "target", "layer", "response", "kind", "fill", "mask", "", "x", "é")
    parts = [part("images", photo(0), rng.choice(WORDS[:5]))] * rng.choice((0, 1, 1, 1, 2, 20))
    for _ in range(rng.choice((0, 1, 2, 3, 100))):
        value = rng.choice(WORDS).encode("utf-8", "surrogatepass") if rng.random() < 0.8 else rng.randbytes(20)
        parts.append(part(rng.choice(names), value, rng.choice((None, None, None, "a.png"))))
    rng.shuffle(parts)
    return http(rng.choice(PATHS), b"".join(parts) + b"--b--\r\n"), True


def a_body(rng: random.Random) -> Request:
    body = part("images", photo(0), "a.png") + part("methods", b"saliency") + b"--b--\r\n"
    return http(rng.choice(PATHS), damaged(rng, body)), True


def a_type(rng: random.Random) -> Request:
    kinds = ("", "multipart/form-data", "multipart/mixed; boundary=b", "text/plain", "application/json", "a", "/")
    boundaries = ("", "b", '"b', "b" * 4000, "é", "b; boundary=c", "--b", "\t", '"b"; charset=klingon')
    kind = rng.choice((*kinds, *(f"multipart/form-data; boundary={one}" for one in boundaries)))
    return http(rng.choice(PATHS), part("images", photo(0), "a.png") + b"--b--\r\n", kind), True


def a_path(rng: random.Random) -> Request:
    places = ("/", "/static/", "/samples/", "/jobs/", "/health", "/explain", "//", "/%00", "/%ff", "/?token=")
    ends = ("", "..", "../app.py", "%2e%2e/app.py", "9" * 300, "-1", "é".encode().hex(), "?x=%ff", "#x", "a" * 2000)
    methods = ("GET", "GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "TRACE", "FOO")
    headers = ("", "Origin: http://evil\r\n", "Cookie: ;;=\r\n", "Authorization: \xff\r\n", "X-A: b\r\n" * 50)
    method = rng.choice(methods)
    path = rng.choice(places) + rng.choice(ends)
    return http(path, b"", method=method, more=rng.choice(headers)), method != "HEAD"


def no_http(rng: random.Random) -> Request:
    whole = http(rng.choice(PATHS), part("images", photo(0), "a.png") + b"--b--\r\n")
    head, _, body = whole.partition(b"\r\n\r\n")
    if rng.random() < 0.2:
        return rng.randbytes(rng.randrange(300)), False
    return damaged(rng, head) + b"\r\n\r\n" + body, False


KINDS: dict[str, tuple[int, Callable[[random.Random], Request]]] = {
    "damaged images": (30, an_image),
    "bombs": (1, a_bomb),
    "damaged masks": (8, a_mask),
    "odd fields": (20, some_fields),
    "damaged bodies": (20, a_body),
    "odd content types": (5, a_type),
    "odd paths, methods and headers": (10, a_path),
    "no HTTP": (6, no_http),
}


def answer_to(address: str, request: bytes, is_http: bool) -> bytes:
    """All that comes back until the server closes the connection; what is no HTTP is ended, else it would wait."""
    url = urlsplit(address)
    answer = b""
    with socket.create_connection((url.hostname, url.port), PATIENCE) as connection:
        try:
            connection.sendall(request)
            if not is_http:
                connection.shutdown(socket.SHUT_WR)
            while more := connection.recv(2**16):
                answer += more
        except (BrokenPipeError, ConnectionResetError):
            pass
    return answer


def fault(answer: bytes, is_http: bool) -> tuple[str, str]:
    """The status of an answer, and what is wrong with it; empty if nothing is."""
    if not answer:
        return "none", "no answer" if is_http else ""
    head, _, body = answer.partition(b"\r\n\r\n")
    status = head[9:12].decode("latin-1")
    if status in ("200", "202", "303"):
        return status, ""
    if status != "503" and not (status.isdigit() and 400 <= int(status) < 500):
        return status, f"{status}: {body[:200]!r}"
    if not is_http:
        return status, ""
    try:
        line = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        return status, f"{status} without a line of JSON: {body[:200]!r}"
    return status, "" if line and "\n" not in line and "Traceback" not in line else f"{status}: {line!r}"


def fuzz(address: str, requests: int, seed: int = 0, threads: int = 4) -> list[dict[str, Any]]:
    """The answers to so many requests, by kind."""
    names = [name for name, (weight, _) in KINDS.items() for _ in range(weight)]

    def attempt(number: int) -> tuple[str, str, str, float]:
        rng = random.Random(seed * 10**9 + number)
        name = rng.choice(names)
        request, is_http = KINDS[name][1](rng)
        begun = time.perf_counter()
        try:
            status, wrong = fault(answer_to(address, request, is_http), is_http)
        except TimeoutError:
            status, wrong = "none", f"no answer in {PATIENCE:g} s"
        return name, status, f"{number}: {wrong}" if wrong else "", time.perf_counter() - begun

    rows: dict[str, dict[str, Any]] = defaultdict(
        lambda: {"requests": 0, "statuses": Counter(), "faults": [], "slowest s": 0.0}
    )
    with ThreadPoolExecutor(threads) as pool:
        for name, status, wrong, seconds in pool.map(attempt, range(requests)):
            row = rows[name]
            row["requests"] += 1
            row["statuses"][status] += 1
            row["faults"] += [wrong] if wrong else []
            row["slowest s"] = max(row["slowest s"], seconds)
    return [{"kind": name} | rows[name] for name in KINDS if name in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, served(small_run(Path(folder) / "run")) as server:
        files = {"images": ("a.png", photo(0))}
        first = httpx2.post(f"{server.address}/explain", files=files, timeout=60).json()["images"][0]["maps"][0]
        before = server.rss()
        rows = fuzz(server.address, options.requests, options.seed)
        after = server.rss()
        last = httpx2.post(f"{server.address}/explain", files=files, timeout=60).json()["images"][0]["maps"][0]
        assert first["values"] == last["values"], "the server answers otherwise than before"
    rows.append({"kind": "all", "requests": options.requests, "MB before": before, "MB after": after, "tracebacks": 0})
    for row in rows:
        print(row)
    save("serve_fuzz", rows)


if __name__ == "__main__":
    main()
