"""The page in a real browser: Chromium without a window, driven over its DevTools pipe."""

import json
import os
import re
import select
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sightline import report, runs
from sightline.evaluation import Evaluation
from sightline.metrics.uncertainty import Interval

FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --disable-dev-shm-usage --no-first-run
--disable-background-networking --disable-component-update --disable-sync --remote-debugging-pipe""".split()


class Browser:
    """One page. Messages are JSON ended by a zero byte, on file descriptors 3 (to the browser) and 4 (from it)."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin and process.stdout
        self.to_browser, self.from_browser = process.stdin.fileno(), process.stdout.fileno()
        self.buffer = b""
        self.count = 0
        self.events: list[dict[str, Any]] = []
        self.session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def receive(self, seconds: float = 30) -> dict[str, Any]:
        end = time.monotonic() + seconds
        while b"\0" not in self.buffer:
            if not select.select([self.from_browser], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError(f"chromium said nothing for {seconds} s")
            self.buffer += os.read(self.from_browser, 1 << 20) or b'{"error": "chromium has gone"}\0'
        message, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(message)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.to_browser, json.dumps(message).encode() + b"\0")
        while (answer := self.receive()).get("id") != self.count:
            assert "error" not in answer, answer
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def open(
        self, path: Path, width: int = 1280, height: int = 900, scheme: str = "light", scripts: bool = True
    ) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Emulation.setScriptExecutionDisabled", value=not scripts)
        self.events.clear()
        self.call("Page.navigate", url=path.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self.receive())

    def run(self, expression: str) -> Any:
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        code = {"Enter": 13, "Tab": 9, "ArrowRight": 39, "End": 35, " ": 32}[key]
        text = {"Enter": "\r", " ": " "}.get(key, "")
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, windowsVirtualKeyCode=code, text=text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    def complaints(self) -> list[dict[str, Any]]:
        bad = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [event for event in self.events if event.get("method") in bad]

    def requests(self) -> list[str]:
        """Addresses asked for, without those that lie inside the page itself."""
        sent = [
            event["params"]["request"]["url"]
            for event in self.events
            if event.get("method") == "Network.requestWillBeSent"
        ]
        return [url for url in sent if not url.startswith("data:")]


@pytest.fixture(scope="module")
def browser(chromium: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    command = [chromium, *FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}", "about:blank"]
    with subprocess.Popen(
        ["sh", "-c", 'exec "$@" 3<&0 4>&1 </dev/null >/dev/null 2>&1', "sh", *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        try:
            yield Browser(process)
        finally:
            process.kill()


@pytest.fixture(scope="module")
def page(evaluation: Evaluation, run: runs.Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report.write(evaluation, tmp_path_factory.mktemp("report"), run)


CONTRASTS = """
(() => {
  const rgba = (color) => {
    const [r, g, b, a = 1] = color.match(/[\\d.]+/g).map(Number);
    return color.startsWith("color(") ? [r, g, b, a] : [r / 255, g / 255, b / 255, a];
  };
  const luminance = (color) => {
    const [r, g, b] = color.map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (element) => {
    for (; element; element = element.parentElement) {
      const color = rgba(getComputedStyle(element).backgroundColor);
      if (color[3] === 1) return color;
    }
    return rgba(getComputedStyle(document.body).backgroundColor);
  };
  const low = [];
  for (const element of document.querySelectorAll("body *")) {
    if (![...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim())) continue;
    if (!element.getClientRects().length || element.matches("title, desc, script, style")) continue;
    const style = getComputedStyle(element);
    const [a, b] = [luminance(rgba(element.closest("svg") ? style.fill : style.color)), luminance(ground(element))];
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (contrast < 4.5) low.push(`${element.tagName}.${element.className} ${element.textContent.trim()}: ${contrast}`);
  }
  return low;
})()
"""


def rows(browser: Browser) -> list[list[str]]:
    """Names of the methods as they stand, one list per part of the table."""
    names = "[...body.rows].slice(1).map(row => row.cells[0].dataset.value)"
    return browser.run(f"[...document.querySelector('.scores').tBodies].map(body => {names})")


def opacities(browser: Browser) -> set[str]:
    return set(browser.run("[...document.querySelectorAll('.map')].map(image => getComputedStyle(image).opacity)"))


def test_the_browser_would_tell(browser: Browser, tmp_path: Path):
    bad = tmp_path / "bad.html"
    bad.write_text("<img src='http://127.0.0.1:9/pixel.png'><script>console.error('no'); missing()</script>")
    browser.open(bad)
    methods = {event["method"] for event in browser.complaints()}
    assert {"Runtime.exceptionThrown", "Runtime.consoleAPICalled"} <= methods
    assert browser.requests() == [bad.as_uri(), "http://127.0.0.1:9/pixel.png"]


def test_no_complaint_and_no_request(browser: Browser, page: Path):
    browser.open(page)
    assert browser.run("document.images.length") == 40
    assert browser.run("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert browser.complaints() == []
    assert browser.requests() == [page.as_uri()]


def test_the_slider_moves_every_overlay(browser: Browser, page: Path):
    browser.open(page)
    assert opacities(browser) == {"0.5"}
    browser.run("document.getElementById('opacity').focus()")
    browser.press("ArrowRight")
    assert opacities(browser) == {"0.51"}
    browser.press("End")
    assert opacities(browser) == {"1"}
    assert browser.run("document.querySelector('output').value") == "100\u202f%"


def test_a_method_can_be_hidden(browser: Browser, page: Path):
    def visible() -> list[str]:
        return browser.run(
            "[...new Set([...document.querySelectorAll('.tiles li')].filter(tile => tile.offsetWidth)"
            ".map(tile => tile.dataset.method || 'image'))]"
        )

    browser.open(page)
    assert visible() == ["image", "attention", "activation_map", "cam", "grad_cam"]
    browser.run("document.querySelector('.shows[value=cam]').focus()")
    browser.press(" ")
    assert visible() == ["image", "attention", "activation_map", "grad_cam"]
    browser.press(" ")
    assert len(visible()) == 5


def test_a_hidden_method_takes_its_worst_images_with_it(browser: Browser, page: Path):
    browser.open(page)
    heights = "[...document.querySelectorAll('.worst article')].map(part => part.offsetHeight > 0)"
    assert browser.run(heights) == [True] * 4
    browser.run("document.querySelector('.shows[value=cam]').click()")
    assert browser.run(heights) == [True, True, False, True]


@pytest.fixture(scope="module")
def wide_page(evaluation: Evaluation, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 methods x 24 metrics."""
    methods, metrics = [f"method_{i}" for i in range(30)], [f"metric_{i}" for i in range(24)]
    scores = [replace(evaluation.scores[0], method=a, metric=b) for a in methods for b in metrics]
    wide = replace(
        evaluation,
        methods=(*methods, *evaluation.controls),
        metrics=tuple(metrics),
        higher_is_better=dict.fromkeys(metrics, True),
        scores=tuple(scores),
        examples=(),
        errors=(),
        worst={},
        metric_agreement=np.eye(24),
        method_agreement=np.eye(34),
    )
    return report.write(wide, tmp_path_factory.mktemp("wide"))


@pytest.mark.parametrize("width", [420, 1280])
def test_a_long_table_keeps_its_head_and_first_column_in_sight(browser: Browser, wide_page: Path, width: int):
    browser.open(wide_page, width=width)
    assert browser.run("document.documentElement.scrollWidth") <= width
    at = "(cell => { const r = cell.getBoundingClientRect(); return [r.x, r.y].map(Math.round) })"
    browser.run("box = document.querySelector('.tall'); table = box.querySelector('table'); box.scrollTo(700, 900)")
    assert browser.run("[box.scrollLeft, box.scrollTop]") == [700, 900]
    left, top = browser.run("[box.getBoundingClientRect().x, box.getBoundingClientRect().y].map(Math.round)")
    assert browser.run(f"{at}(table.tHead.rows[0].cells[0])") == [left, top]
    assert browser.run(f"{at}(table.tHead.rows[0].cells[9])[1]") == top
    assert browser.run(f"{at}(table.tBodies[0].rows[20].cells[0])[0]") == left
    assert browser.run("box.offsetHeight < innerHeight && table.offsetHeight > innerHeight")
    assert browser.run("table.tBodies[0].rows[1].offsetHeight") <= 64


def test_sorting_with_the_keyboard(browser: Browser, page: Path):
    browser.open(page)
    as_written = [
        ["attention", "activation_map", "cam", "grad_cam"],
        ["random_map", "center_map", "edge_map", "contrast_map"],
    ]
    assert rows(browser) == as_written

    def sorts() -> list[str]:
        return browser.run("[...document.querySelectorAll('.scores thead th')].map(th => th.getAttribute('aria-sort'))")

    assert sorts() == ["none"] * 5
    browser.run("document.querySelectorAll('.scores thead button')[1].focus()")
    browser.press("Enter")
    assert sorts()[1] == "ascending"  # of deletion the lowest is the best
    best_first = [
        ["cam", "grad_cam", "attention", "activation_map"],
        ["edge_map", "contrast_map", "center_map", "random_map"],
    ]
    assert rows(browser) == best_first
    browser.press("Enter")
    assert sorts()[1] == "descending"
    assert rows(browser) == [part[::-1] for part in best_first]
    browser.press("Tab")
    browser.press("Enter")
    assert sorts() == ["none", "none", "descending", "none", "none"]
    assert rows(browser)[1] == ["contrast_map", "center_map", "edge_map", "random_map"]
    browser.run("document.querySelector('.scores thead button').click()")
    assert rows(browser) == [sorted(part) for part in as_written]


def test_undefined_scores_are_sorted_to_the_end(browser: Browser, evaluation: Evaluation, tmp_path: Path):
    nothing = Interval(value=float("nan"), low=float("nan"), high=float("nan"), n=0)
    scores = tuple(replace(s, interval=nothing) if s.method == "attention" else s for s in evaluation.scores)
    browser.open(report.write(replace(evaluation, scores=scores), tmp_path))
    for _ in range(2):
        browser.run("document.querySelectorAll('.scores thead button')[1].click()")
        assert rows(browser)[0][-1] == "attention"


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (390, 844)])
def test_pictures_and_answers_stand_on_the_first_screen(browser: Browser, page: Path, width: int, height: int):
    browser.open(page, width=width, height=height)
    box = "(query => { const r = document.querySelector(query).getBoundingClientRect(); return [r.top, r.bottom] })"
    title, strip, answers = (browser.run(f"{box}('{query}')") for query in ("h1", ".strip svg", ".answers"))
    assert title[1] <= strip[0] < 200 and strip[1] <= answers[0] < answers[1] <= height
    apart = "[...document.querySelectorAll('.strip .row')].map(row => row.lastElementChild.matches('.apart'))"
    assert browser.run(apart) == [True] * 6


@pytest.mark.parametrize("width", [390, 1280])
def test_names_on_scatter_plots_do_not_overlap(browser: Browser, page: Path, width: int):
    browser.open(page, width=width)
    boxes = (
        "[...svg.querySelectorAll('.label')].map(e => e.getBBox()).map(b => [b.x, b.y, b.x + b.width, b.y + b.height])"
    )
    for names in browser.run(f"[...document.querySelectorAll('.scatter svg')].map(svg => {boxes})"):
        assert len(names) == 4
        for i, a in enumerate(names):
            assert not any(a[0] < b[2] and b[0] < a[2] and a[1] + 3 < b[3] and b[1] + 3 < a[3] for b in names[:i])


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_is_readable(browser: Browser, evaluation: Evaluation, run: runs.Run, tmp_path: Path, scheme: str):
    strongest = (-1.0) ** np.add.outer(np.arange(8), np.arange(8))  # the deepest colors of a correlation
    browser.open(report.write(replace(evaluation, method_agreement=strongest), tmp_path, run), scheme=scheme)
    browser.run("document.querySelectorAll('details').forEach(part => part.open = true)")
    assert browser.run(CONTRASTS) == []


def test_dark_mode_is_dark(browser: Browser, page: Path):
    grounds = []
    for scheme in ("light", "dark"):
        browser.open(page, scheme=scheme)
        grounds.append(browser.run("getComputedStyle(document.body).backgroundColor"))
    light, dark = ([int(part) for part in re.findall(r"\d+", ground)] for ground in grounds)
    assert min(light) > 240 and max(dark) < 40


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_the_page_never_scrolls_sideways(browser: Browser, page: Path, width: int):
    browser.open(page, width=width, height=780)
    browser.run("document.querySelectorAll('details').forEach(part => part.open = true)")
    assert browser.run("[innerWidth, document.documentElement.scrollWidth <= innerWidth]") == [width, True]


def test_200_long_hostile_names(browser: Browser, evaluation: Evaluation, tmp_path: Path):
    names = tuple(f"<script>alert({i})</script><img src=x onerror=alert({i})>{'long' * 20}" for i in range(200))
    hostile = replace(
        evaluation,
        model=names[0],
        classes=names,
        confusion=np.eye(200, dtype=np.int64),
        examples=tuple(replace(example, name=names[1], label=names[2]) for example in evaluation.examples[:3]),
        mean_maps={"cam": dict.fromkeys(names, np.eye(3, dtype=np.float32))},
        skipped=((names[3], names[4]),),
        provenance={"command": names[5]},
    )
    browser.open(path := report.write(hostile, tmp_path), width=360, height=780)
    browser.run("document.querySelectorAll('details').forEach(part => part.open = true)")
    assert browser.run("document.documentElement.scrollWidth") == 360
    assert browser.run("[document.scripts.length, document.querySelectorAll('[onerror]').length]") == [1, 0]
    assert browser.complaints() == [] and browser.requests() == [path.as_uri()]


def test_without_scripts_everything_is_there(browser: Browser, page: Path):
    browser.open(page, scripts=False)
    assert opacities(browser) == {"0.5"}
    assert browser.run("document.querySelector('.tools').offsetHeight") == 0
    assert browser.run(
        "[...document.querySelectorAll('.tiles svg')].every(svg => svg.getBoundingClientRect().width > 100)"
    )
    assert browser.run("document.querySelector('.scores button').disabled")
