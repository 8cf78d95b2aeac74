"""examples/browser runs an exported file in Chromium without Python, and draws the map of `sl.explain` over a photo."""

import io
import os
import shutil
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from playwright.sync_api import sync_playwright

import sightline as sl
from sightline import data

pytestmark = pytest.mark.compile

PAGE = Path(__file__).parent.parent / "examples" / "browser"
VERSION = "1.30.0"
SIZE = (32, 40)
PLAIN = data.Preprocess(size=SIZE, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))


@pytest.fixture(scope="module")
def runtime() -> Path:
    """The files of onnxruntime-web, which npm fetches once."""
    pytest.importorskip("onnxruntime")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sightline-tests"
    folder = cache / f"onnxruntime-web-{VERSION}"
    if not folder.is_dir():
        if (npm := shutil.which("npm")) is None:
            pytest.skip("npm is not installed")
        cache.mkdir(parents=True, exist_ok=True)
        command = [npm, "pack", f"onnxruntime-web@{VERSION}", "--ignore-scripts", "--fetch-retries=0"]
        packed = subprocess.run(command, cwd=cache, capture_output=True, text=True, timeout=120)
        if packed.returncode:
            pytest.skip(f"npm cannot fetch onnxruntime-web: {packed.stderr.strip()[-200:]}")
        needed = {f"package/dist/{name}" for name in NEEDED}
        with tarfile.open(cache / f"onnxruntime-web-{VERSION}.tgz") as archive:
            unpacked = cache / f"unpacking-{os.getpid()}"
            archive.extractall(unpacked, [one for one in archive if one.name in needed], filter="data")
        (unpacked / "package" / "dist").rename(folder)
        shutil.rmtree(unpacked)
    return folder


NEEDED = ("ort.wasm.min.js", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def site(runtime: Path, tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """The page with its runtime in a folder that is served, and its address."""
    folder = tmp_path / "site"
    shutil.copytree(PAGE, folder)
    shutil.copytree(runtime, folder / "ort")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_page_draws_the_map_of_explain(site: tuple[Path, str], chromium: str) -> None:
    folder, address = site
    torch.manual_seed(0)
    model = sl.create_model("cifar_resnet", num_classes=3, depth=8).eval()
    sl.export(
        model, folder / "net.onnx", PLAIN, ["null", "eins", "zwei"], maps=["grad_cam", "hires_cam"], targets="input"
    )
    pixels = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")  # of the network's size: no resizing differs
    (folder / "photo.png").write_bytes(file.getvalue())
    image = torch.from_numpy(pixels).movedim(2, 0)[None]
    explanation = sl.explain(model, data.normalize(image, PLAIN), methods=["grad_cam", "hires_cam"])
    best = int(explanation.targets)

    complaints: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-dev-shm-usage"])
        page = browser.new_page()
        page.set_default_timeout(120_000)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "request",
            lambda request: complaints.extend([request.url] * (not request.url.startswith((address, "blob:")))),
        )
        page.goto(f"{address}/index.html?model=net.onnx&photo=photo.png")
        page.locator("#picture[data-map=grad_cam]").wait_for()
        said = page.locator("#answer").inner_text()
        assert said == f"{['null', 'eins', 'zwei'][best]}, {100 * float(explanation.probabilities.max()):.1f} %"
        for name, ours in explanation.maps.items():
            shown = page.evaluate(f"Array.from(answer['{name}'].data)")
            assert np.abs(np.array(shown) - ours.flatten().numpy()).max() <= 1e-5 * float(ours.abs().max())

        def drawn() -> np.ndarray[Any, Any]:
            values = page.evaluate(
                "Array.from(byId('picture').getContext('2d').getImageData(0, 0, photo.width, photo.height).data)"
            )
            return np.array(values).reshape(*SIZE, 4)[..., :3]

        page.locator("#opacity").fill("0")
        alone = drawn()
        assert (alone.max(2) - alone.min(2)).max() <= 2  # the photo in gray
        page.locator("#opacity").fill("1")
        peak = divmod(int(explanation["grad_cam"].argmax()), 10)
        row, column = (4 * cell + 2 for cell in peak)
        assert drawn()[row, column].astype(int).sum() > 550  # the light end of the colors
        page.locator("#map").select_option("hires_cam")
        page.locator("#picture[data-map=hires_cam]").wait_for()

        other = (best + 1) % 3
        page.locator("#class").select_option(str(other))
        theirs = sl.explain(model, data.normalize(image, PLAIN), other, ["grad_cam"])["grad_cam"].flatten().numpy()
        page.wait_for_function(
            "([wanted, gap]) => wanted.every((value, i) => Math.abs(value - answer.grad_cam.data[i]) <= gap)",
            arg=[theirs.tolist(), 1e-5 * float(np.abs(theirs).max())],
        )
        assert page.locator("#error").inner_text() == "" and complaints == []

        (folder / "other.onnx").write_bytes(b"\x08\x0a")
        page.goto(f"{address}/index.html?model=other.onnx")
        page.get_by_text("expected a file of `sightline export --maps`").wait_for()
        page.goto(f"{address}/index.html?model=missing.onnx")
        page.get_by_text("missing.onnx: 404").wait_for()
        browser.close()
