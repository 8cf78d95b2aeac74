"""What the server refuses: wrong fields, broken bodies and images, other sites, a missing token; each in one line."""

import gc
import io
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import pytest
from starlette.testclient import TestClient
from tests.serve.conftest import HERE, png
from tests.serve.test_api import PHOTO, error_of, send, valid

from sightline.serve.openapi import FORMS
from sightline.serve.uploads import Refused

BOUNDARY = "multipart/form-data; boundary=b"


def part(name: str, content: bytes, filename: str | None = None) -> bytes:
    file = "" if filename is None else f'; filename="{filename}"'
    return f'--b\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'.encode() + content + b"\r\n"


def post(client: TestClient, body: bytes, kind: str = BOUNDARY, path: str = "/explain") -> Any:
    return client.post(path, content=body, headers={"content-type": kind})


@pytest.mark.parametrize(
    ("path", "fields", "status", "reason"),
    [
        ("/explain", {"methods": "grad_cams"}, 400, "did you mean 'grad_cam'"),
        ("/explain", {"methods": "attention_rollout"}, 400, "see /methods"),
        ("/explain", {"methods": "grad_cam@"}, 400, "grad_cam@LAYER"),
        ("/explain", {"methods": "grad_cam@features.conv77"}, 400, "did you mean 'features.conv7'"),
        ("/explain", {"layer": "features.conv77"}, 400, "did you mean 'features.conv7'"),
        ("/explain", {"layer": "input of nothing"}, 400, "layer"),
        ("/explain", {"target": "ten"}, 400, "class"),
        ("/explain", {"target": "10"}, 400, "0..9"),
        ("/explain", {"target": "-1"}, 400, "0..9"),
        ("/explain", {"target": "9" * 5000}, 400, "class"),
        ("/explain", {"response": "xml"}, 400, "json or npz"),
        ("/explain", {"method": "cam"}, 400, "did you mean 'methods'"),
        ("/explain", {"sample": "1"}, 400, "got both"),
        ("/explain", {"target": ["1", "2"]}, 400, "send it once"),
        ("/predict", {"fill": "red"}, 400, "blur or mean"),
        ("/predict", {"methods": "cam"}, 400, "known field"),
        ("/predict", {"mask": "1"}, 400, "with a filename"),
        ("/jobs", {"kind": "evaluate"}, 400, "explain or measure"),
    ],
)
def test_wrong_field(
    client: TestClient, path: str, fields: dict[str, str], status: int, reason: str, unchecked: None
) -> None:
    assert reason in error_of(send(client, path, **fields), status)


@pytest.mark.parametrize("path", FORMS)
@pytest.mark.parametrize("sample", ["5", "-1", "x", "1e9", "9" * 5000, "²"])
def test_wrong_sample(client: TestClient, path: str, sample: str) -> None:
    assert "sample" in error_of(client.post(path, files={"sample": (None, sample)}), 400)
    if path == "/explain":
        assert "sample" in error_of(client.get(f"/samples/{sample}"), 404)


@pytest.mark.parametrize("path", FORMS)
def test_no_image(client: TestClient, path: str) -> None:
    assert "got neither" in error_of(client.post(path, files={"sample": (None, "")}), 400)


def test_many_images(client_of: Callable[..., TestClient]) -> None:
    client = client_of(images=2)
    images = [("images", ("a.png", PHOTO))] * 3
    assert "at most 2 images" in error_of(client.post("/explain", files=images), 413)
    assert "at most 1 image," in error_of(client.post("/predict", files=images), 413)
    assert "at most 1 image," in error_of(client.post("/jobs", files=images, data={"kind": "measure"}), 413)
    assert "each alone" in error_of(client.post("/explain", files=images[:2], data={"response": "npz"}), 400)


def test_many_maps(client_of: Callable[..., TestClient]) -> None:
    client = client_of(maps=3)
    images = [("images", ("a.png", PHOTO))] * 2
    data = {"methods": "saliency,grad_cam@features.conv1,grad_cam@features.conv2"}
    for path in ("/explain", "/jobs"):
        assert "at most 3 maps" in error_of(client.post(path, files=images, data=data), 413)
        assert client.post(path, files=images[:1], data=data).status_code < 300


def bomb(side: int) -> bytes:
    """A PNG of a few kilobytes that claims to have side x side pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(side // 8 + 1) * 64, 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def archive() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as packed:
        packed.writestr("../../a.png", PHOTO)
    return file.getvalue()


BROKEN = {
    "empty": (b"", "the file is empty"),
    "text": (b"hello", "not an image of a known format"),
    "zip": (archive(), "not an image of a known format"),
    "bomb": (bomb(60_000), "bomb"),
    "large": (bomb(12_000), "at most 89,478,485 pixels"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image of a known format"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image of a known format"),
    "cut": (PHOTO[: len(PHOTO) // 2], ""),
    "cut.jpg": (png(format="JPEG")[:300], ""),
    "cut.tif": (png(format="TIFF")[:300], ""),
    "cut.webp": (png(format="WEBP")[:300], ""),
}


@pytest.mark.parametrize("name", BROKEN)
def test_image_that_cannot_be_read(client: TestClient, name: str) -> None:
    content, reason = BROKEN[name]
    for path in FORMS:
        line = error_of(send(client, path, content, name), 422)
        assert name in line and reason in line and "data." not in line  # a recipe's field is out of a client's reach
    mask = {"images": ("a.png", PHOTO), "mask": ("mask.png", content)}
    assert "mask" in error_of(client.post("/predict", files=mask), 422)


def test_mask_of_another_size(client: TestClient) -> None:
    files = {"images": ("a.png", PHOTO), "mask": ("mask.png", PHOTO)}
    assert "as large as the image is shown" in error_of(client.post("/predict", files=files), 422)
    twice = [("images", ("a.png", PHOTO)), ("mask", ("m.png", PHOTO)), ("mask", ("m.png", PHOTO))]
    assert "one mask" in error_of(client.post("/predict", files=twice), 400)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("../../x", "x"),
        ("/etc/passwd", "passwd"),
        ("..\\..\\x.png", "x.png"),
        ("x" * 100_000 + ".png", "x" * 116 + ".png"),
        ("a\u202egnp.exe", "a_gnp.exe"),
        ("<img src=x onerror=alert(1)>", "<img src=x onerror=alert(1)>"),
        ("..", ".."),
        ("CON", "CON"),
    ],
)
def test_names_are_texts(client: TestClient, name: str, shown: str) -> None:
    body = part("images", PHOTO, name[:8000]) + b"--b--\r\n"
    if len(name) > 8000:
        answer = send(client, name=name)
        assert answer.status_code in (200, 400)
        return
    assert valid(post(client, body), "Explanation")["images"][0]["name"] == shown


def nested() -> bytes:
    inner = b"--c\r\nContent-Disposition: file; filename=a.png\r\n\r\n" + PHOTO + b"\r\n--c--\r\n"
    head = b'--b\r\nContent-Disposition: form-data; name="images"\r\nContent-Type: multipart/mixed; boundary=c\r\n\r\n'
    return head + inner + b"\r\n--b--\r\n"


BODIES = {
    "no boundary": (part("images", PHOTO, "a.png"), "multipart/form-data", 400),
    "another boundary": (part("images", PHOTO, "a.png"), "multipart/form-data; boundary=c", 400),
    "huge boundary": (part("images", PHOTO, "a.png"), "multipart/form-data; boundary=" + 5000 * "c", 400),
    "empty": (b"", BOUNDARY, 400),
    "only the end": (b"--b--\r\n", BOUNDARY, 400),
    "not ended": (part("images", PHOTO, "a.png")[:-10], BOUNDARY, 400),
    "nested": (nested(), BOUNDARY, 400),
    "no name": (b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--\r\n", BOUNDARY, 400),
    "no disposition": (b"--b\r\nX: y\r\n\r\nx\r\n--b--\r\n", BOUNDARY, 400),
    "odd charset": (part("images", PHOTO, "a.png") + b"--b--\r\n", f"{BOUNDARY}; charset=klingon", 200),
    "10,000 fields": (part("methods", b"cam") * 10_000 + b"--b--\r\n", BOUNDARY, 413),
    "10,000 files": (part("images", b"", "a.png") * 10_000 + b"--b--\r\n", BOUNDARY, 413),
    "long field": (part("layer", b"x" * 100_000) + b"--b--\r\n", BOUNDARY, 400),
    "10,000 headers": (b"--b\r\n" + b"X-A: b\r\n" * 10_000 + b"\r\nx\r\n--b--\r\n", BOUNDARY, 400),
    "json": (b"{}", "application/json", 415),
    "form": (b"methods=cam", "application/x-www-form-urlencoded", 415),
    "no type": (b"methods=cam", "", 415),
}


@pytest.mark.parametrize("path", FORMS)
@pytest.mark.parametrize("name", BODIES)
def test_broken_body(client: TestClient, name: str, path: str) -> None:
    body, kind, status = BODIES[name]
    answer = post(client, body, kind, path)
    if status == 200:
        assert answer.status_code in (200, 202)
    else:
        error_of(answer, status)


def test_body_that_is_cut_is_told_so(client: TestClient) -> None:
    whole = part("images", PHOTO, "a.png") + b"--b--\r\n"
    for length in (len(whole) - 6, len(whole) - 20, 60):
        assert "got a part of it" in error_of(post(client, whole[:length]), 400)
    assert post(client, whole).status_code == 200


def test_large_body(client_of: Callable[..., TestClient]) -> None:
    client = client_of(bytes=2000)
    assert "2,000 bytes" in error_of(send(client, image=bytes(3000)), 413)

    def chunks() -> Any:  # no Content-Length
        yield part("images", bytes(1500), "a.png")
        yield bytes(1500)

    gc.collect()
    gc.disable()  # a cycle of references would be found too late
    try:
        answer = client.post("/explain", content=chunks(), headers={"content-type": BOUNDARY})
        assert "2,000 bytes" in error_of(answer, 413)
        assert not [one for one in gc.get_objects() if type(one) is Refused]
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/static/../app.py", 404),
        ("GET", "/static/..%2fapp.py", 404),
        ("GET", "/static/page.html", 404),
        ("GET", "/jobs/none", 404),
        ("DELETE", "/jobs/none", 404),
        ("GET", "/health/", 404),
        ("GET", "/explain", 405),
        ("POST", "/health", 405),
        ("PUT", "/jobs/none", 405),
        ("DELETE", "/", 405),
        ("OPTIONS", "/explain", 405),
    ],
)
def test_other_paths_and_methods(client: TestClient, method: str, path: str, status: int) -> None:
    answer = client.request(method, path)
    error_of(answer, status)
    assert (status == 405) == ("allow" in answer.headers)


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "", "[", "localhost@evil", "10.0.0.1"]
)
def test_other_host_is_refused(client: TestClient, host: str) -> None:
    for path in ("/", "/health"):
        assert "host" in error_of(client.get(path, headers={"host": host}), 421)


@pytest.mark.parametrize("host", ["localhost", "localhost:9000", "127.0.0.1:1", "[::1]:8000", "LOCALHOST"])
def test_own_hosts(client: TestClient, host: str) -> None:
    assert client.get("/health", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:81"},
        {"origin": "http://127.0.0.1.evil.example"},
        {"origin": ""},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
)
def test_requests_of_other_sites_are_refused(client: TestClient, headers: dict[str, str]) -> None:
    for method, path in (("POST", "/explain"), ("POST", "/predict"), ("POST", "/jobs"), ("DELETE", "/jobs/x")):
        assert "another site" in error_of(client.request(method, path, headers=headers), 403)


def test_own_page_may_post(client: TestClient) -> None:
    for headers in ({"origin": HERE}, {"sec-fetch-site": "same-origin"}, {"sec-fetch-site": "none"}):
        answer = client.post("/explain", files={"images": ("a.png", PHOTO)}, headers=headers)
        assert answer.status_code == 200


def test_security_headers_are_everywhere(client: TestClient) -> None:
    answers = [client.get("/"), client.get("/health"), client.get("/nothing"), client.get("/static/serve.js")]
    answers += [client.get("/health", headers={"host": "evil.example"}), send(client), send(client, image=b"")]
    for answer in answers:
        policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
        assert policy["default-src"] == "'none'" and policy["script-src"] == "'self'"
        assert policy["frame-ancestors"] == policy["form-action"] == "'none'"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert "access-control-allow-origin" not in answer.headers


def test_token(client_of: Callable[..., TestClient]) -> None:
    client = client_of(token="sesame")
    for headers in ({}, {"authorization": "Bearer no"}, {"authorization": b"Basic \xff"}, {"cookie": "sightline-0=s"}):
        answer = client.get("/health", headers=headers)
        assert "token" in error_of(answer, 401) and answer.headers["www-authenticate"] == "Bearer"
        error_of(send_with(client, headers), 401)
    error_of(client.get("/?token=no"), 401)
    error_of(client.get("/health?token=sesame"), 401)
    assert client.get("/health", headers={"authorization": "bearer sesame"}).status_code == 200
    for token in ("sésame", "a b", "a;b", ""):
        with pytest.raises(ValueError, match="expected a token of letters"):
            client_of(token=token)


def send_with(client: TestClient, headers: Any) -> Any:
    return client.post("/explain", files={"images": ("a.png", PHOTO)}, headers=headers)


def test_token_in_the_address_becomes_a_cookie(client_of: Callable[..., TestClient]) -> None:
    client = client_of(token="abc")
    answer = client.get("/?token=abc")
    assert answer.status_code == 303 and answer.headers["location"] == "/"
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=strict" in cookie
    assert client.get("/").status_code == 200  # the client keeps the cookie
    assert send(client).status_code == 200


def test_any_host_with_a_token_where_others_may_ask(client_of: Callable[..., TestClient]) -> None:
    client = client_of(token="abc", is_local=False, base="http://lab.example:8000")
    error_of(client.get("/health"), 401)
    headers = {"authorization": "Bearer abc"}
    assert client.get("/health", headers=headers).status_code == 200
    assert client.get("/", headers=headers | {"host": "["}).status_code == 200
    error_of(send_with(client, headers | {"origin": "http://evil.example"}), 403)
    assert send_with(client, headers | {"origin": "http://lab.example:8000"}).status_code == 200
