"""Many clients of one server: refusals, wrong answers, waiting times, and whether its memory grows.

python benchmarks/serve_load.py [--clients 50] [--requests 500]

The server is a process of its own, `sightline serve` of a small network of 24 px that nobody trained. Each client sends
the next image as soon as it has its answer; one that is refused since the queue is full (503) asks again after the time
that the answer names. Every answer is compared with `sightline.explain`.
"""

import argparse
import base64
import io
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
import numpy as np
import torch
from measure import save
from PIL import Image

import sightline as sl
from sightline import data, models, runs
from sightline.recipe import Data, Model, Recipe

OPTIONS = {"width": 1 / 16, "stem_pool": 2}
METHODS = ("grad_cam", "saliency")
TOLERANCE = 1e-6  # of the largest value of a map, or of 1


def small_run(folder: Path) -> Path:
    """A run that nobody trained, of digits on clutter at 24 px."""
    torch.manual_seed(0)
    run = runs.Run(
        folder=folder,
        recipe=Recipe(
            data=Data(source="clutter", train_size=20, test_size=5, size=24),
            model=Model(name="vgg_gap", options=OPTIONS),
        ),
        seed=0,
        classes=tuple("0123456789"),
        preprocess=data.Preprocess(size=(24, 24), mean=(0.5,) * 3, std=(0.2,) * 3),
        info={},
        history=[],
        skipped=[],
    )
    runs.save(run, models.create_model("vgg_gap", num_classes=10, **OPTIONS).state_dict())
    return folder


def photo(seed: int) -> bytes:
    """A PNG file of noise."""
    rng = np.random.default_rng(seed)
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (*rng.integers(20, 60, 2), 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


class Served(NamedTuple):
    """A server that runs."""

    address: str
    process: subprocess.Popen[str]

    def rss(self) -> float:
        """Its memory, in MB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0]) / 1000


@contextmanager
def served(run: Path) -> Iterator[Served]:
    """A server of a run as a process, which has to end with Ctrl-C, without a traceback."""
    command = [sys.executable, "-m", "sightline", "serve", str(run), "--port", "0"]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stderr=errors, text=True)
        try:
            address = None
            while address is None:
                time.sleep(0.2)
                errors.seek(0)
                address = re.search(r"http://\S+(?=/ )", errors.read())
                assert process.poll() is None, "the server has ended"
            yield Served(address[0], process)
            process.send_signal(signal.SIGINT)
            process.wait(20)
        finally:
            process.kill()
            process.wait()
        errors.seek(0)
        assert "Traceback" not in errors.read()
        assert process.returncode == 130


def load(address: str, run: Path, clients: int, requests: int) -> dict[str, Any]:
    """What many clients at a time see."""
    model, preprocess = sl.load(run), runs.open_run(run).preprocess
    refused: Counter[int] = Counter()

    def ask(seed: int) -> tuple[float, float]:
        content = photo(seed)
        files = {"images": ("a.png", content)}
        with httpx2.Client(timeout=120) as client:
            while True:
                begun = time.perf_counter()
                answer = client.post(f"{address}/explain", files=files, data={"methods": ",".join(METHODS)})
                seconds = time.perf_counter() - begun
                if answer.status_code == 200:
                    break
                refused[answer.status_code] += 1
                assert answer.status_code == 503, answer.text
                time.sleep(float(answer.headers["retry-after"]) * random.Random(seed).uniform(0.5, 1.5))
        with tempfile.NamedTemporaryFile(suffix=".png") as file:
            Path(file.name).write_bytes(content)
            images = data.read_images([file.name], preprocess).batch([0]).images
        explanation = sl.explain(model, data.normalize(images, preprocess), methods=METHODS)
        worst = 0.0
        for one in answer.json()["images"][0]["maps"]:
            values = np.frombuffer(base64.b64decode(one["values"]), "<f4").reshape(one["shape"])
            expected = explanation[one["method"]][0, 0].numpy()
            worst = max(worst, float(np.abs(values - expected).max() / max(1.0, np.abs(expected).max())))
        return seconds, worst

    begun = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        answers = [*pool.map(ask, range(requests))]
    times = np.array([seconds for seconds, _ in answers])
    return {
        "clients": clients,
        "requests": requests,
        "answered": len(answers),
        "refused, asked again": refused[503],
        "other errors": sum(refused.values()) - refused[503],
        "largest difference": max(worst for _, worst in answers),
        "differs": sum(worst > TOLERANCE for _, worst in answers),
        "seconds": time.perf_counter() - begun,
        "p50 s": float(np.quantile(times, 0.5)),
        "p95 s": float(np.quantile(times, 0.95)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--requests", type=int, default=500)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = small_run(Path(folder) / "run")
        with served(run) as server:
            before = server.rss()
            load(server.address, run, options.clients, options.clients)
            warm = server.rss()
            row = load(server.address, run, options.clients, options.requests)
            row |= {"MB at the start": before, "MB after one request each": warm, "MB at the end": server.rss()}
    print(row)
    save("serve_load", [row])


if __name__ == "__main__":
    main()
