"""The page in a real browser: Chromium without a window, driven by Playwright; the server on a port of this machine."""

import base64
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import torch
import uvicorn
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, Page, Route, expect, sync_playwright
from torch import nn

from sightline import data, facts
from sightline.serve import Service, open_service
from sightline.serve.app import create_app

CLASSES = (*(f"class {i}" for i in range(1996)), "fabrication", "Siamese cat", "tabby", "t" * 200)
MOST = 30_000  # ms that anything may take
expect.set_options(timeout=MOST)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two small photos, and a file that is none."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name in ("one", "two"):
        Image.fromarray(rng.integers(0, 256, (32, 48, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    (folder / "broken.png").write_bytes(b"no image")
    return [folder / name for name in ("one.png", "two.png", "broken.png")]


@pytest.fixture(scope="module")
def service(pictures: list[Path]) -> Service:
    """A small network with 2,000 classes, and two test images."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(7), nn.Flatten(), nn.Linear(392, len(CLASSES))
    )
    with torch.no_grad():
        network[-1].weight *= 40  # so that it is sure of what it says
    preprocess = data.Preprocess(size=(32, 32), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    service = open_service(network.eval(), classes=CLASSES, preprocess=preprocess)
    samples = data.read_images(pictures[:2], preprocess)
    names = [picture.name for picture in pictures[:2]]
    service.samples = replace(samples, labels=np.array([1998, 3]), classes=CLASSES, names=names)
    return service


@pytest.fixture(scope="module")
def address(service: Service) -> Iterator[str]:
    server = uvicorn.Server(uvicorn.Config(create_app(service), port=0, log_level="critical", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


Open = Callable[..., Page]


@pytest.fixture
def opened(browser: Browser, address: str) -> Iterator[Open]:
    """Opens the page; nothing may be written to the console or asked of another host, but for `faults` of a test."""
    contexts: list[BrowserContext] = []
    complaints: list[str] = []
    requests: list[str] = []
    expected: list[str] = []

    def open_page(faults: Sequence[str] = (), width: int = 1280, **options: Any) -> Page:
        expected.extend(faults)
        options = {"viewport": {"width": width, "height": 900}, "reduced_motion": "reduce", **options}
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.set_default_timeout(MOST)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(address)
        page.locator("#fast input").first.wait_for(state="attached")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert [text for text in complaints if not any(fault in text for fault in expected)] == []
    assert {url for url in requests if not url.startswith((f"{address}/", "data:", "blob:"))} == set()


def drop(page: Page, *files: Path) -> None:
    """Drop files on the page as a mouse does."""
    contents = [[file.name, base64.b64encode(file.read_bytes()).decode()] for file in files]
    transfer = page.evaluate_handle(
        """(contents) => {
          const transfer = new DataTransfer();
          for (const [name, content] of contents) {
            const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
            transfer.items.add(new File([bytes], name, { type: "image/png" }));
          }
          return transfer;
        }""",
        contents,
    )
    page.dispatch_event("main", "dragover", {"dataTransfer": transfer})
    page.dispatch_event("main", "drop", {"dataTransfer": transfer})


def maps_of(page: Page, within: str = ".card") -> list[str]:
    return page.locator(f"{within} [data-method]").evaluate_all("all => all.map(one => one.dataset.method)")


def with_maps(page: Page, picture: Path, *methods: str) -> None:
    """Explain a picture by these methods and wait for the maps."""
    for box in page.locator("[name=methods]:checked").all():
        box.evaluate("box => box.click()")
    for method in methods:
        page.locator(f"[name=methods][value={method}]").evaluate("box => box.click()")
    page.set_input_files("#files", picture)
    expect(page.locator(".card [data-method]")).to_have_count(len(methods))


def test_drop_images_and_see_maps(opened: Open, pictures: list[Path], service: Service):
    page = opened()
    drop(page, *pictures[:2])
    expect(page.locator(".card .map")).to_have_count(2)
    assert page.locator(".card h3").all_inner_texts() == ["one.png", "two.png"]
    card = page.locator(".card").first
    image = service.read("one.png", pictures[0].read_bytes()).image
    best = service.best(service.probabilities(service.inputs([image]))[0])
    assert card.locator(".prediction li span:first-child").all_inner_texts() == [CLASSES[i] for i, _ in best]
    tile = card.locator("[data-method=grad_cam]")
    expect(tile).to_contain_text("Grad-CAM")
    expect(tile).to_contain_text("7 x 7 positions")
    assert page.evaluate(
        "[...document.querySelectorAll('.card img')].every(image => image.complete && image.naturalWidth > 0)"
    )
    page.get_by_role("button", name="Remove one.png").click()
    assert page.locator(".card h3").all_inner_texts() == ["two.png"]
    assert page.evaluate("document.activeElement.ariaLabel") == "Remove two.png"


def test_controls_stand_apart_from_methods(opened: Open, pictures: list[Path]):
    page = opened()
    with_maps(page, pictures[0], "saliency", "occlusion", "edge_map")
    assert maps_of(page) == ["saliency", "occlusion", "edge_map"]
    assert maps_of(page, ".apart") == ["edge_map"]
    assert "edge_map" not in page.locator("#fast input, #slow input").evaluate_all("all => all.map(one => one.value)")
    expect(page.locator("[data-method=saliency]")).to_contain_text("not compared with another class")


def test_methods_that_do_not_fit_are_named_with_the_reason(opened: Open, service: Service):
    page = opened()
    page.click("#unsuited summary")
    reasons = [method.reason for method in service.methods.values() if method.reason]
    assert reasons
    assert page.locator("#unsuited dd").all_inner_texts() == reasons


def test_one_slider_for_all_overlays(opened: Open, pictures: list[Path]):
    page = opened()
    with_maps(page, pictures[0], "grad_cam", "saliency")
    opacities = "all => all.map(one => getComputedStyle(one).opacity)"
    assert page.locator(".map").evaluate_all(opacities) == ["0.5", "0.5"]
    page.focus("#opacity")
    page.keyboard.press("End")
    assert page.locator(".map").evaluate_all(opacities) == ["1", "1"]
    assert page.locator("output").inner_text() == "100\u202f%"


def test_a_class_out_of_two_thousand_and_a_layer(opened: Open, pictures: list[Path], service: Service):
    page = opened()
    target = page.get_by_role("combobox", name="Class to explain")
    target.click()
    options = page.locator("#target-list [role=option]")
    assert options.count() == 101  # the predicted class and a hundred others
    target.type("9")
    assert options.first.inner_text() == "class 9\n9"
    target.fill("ca")
    assert options.all_inner_texts() == ["Siamese cat\n1997", "fabrication\n1996"]
    target.fill("ta")
    assert options.all_inner_texts() == ["tabby\n1998"]
    assert target.get_attribute("aria-activedescendant") == "target-1998"
    page.keyboard.press("Enter")
    expect(target).to_have_value("tabby")
    expect(target).to_have_attribute("aria-expanded", "false")
    page.select_option("#layer", service.layers[0].name)
    page.set_input_files("#files", pictures[0])
    expect(page.locator(".card .answer")).to_contain_text("explained tabby")
    expect(page.locator("[data-method=grad_cam] .range")).to_contain_text(service.layers[0].name)
    target.fill("zebra")
    page.click("#explain")
    expect(page.locator("#error")).to_have_text(
        "No class is called “zebra”: choose one from the list, or empty the field."
    )


def test_measures_of_one_image(opened: Open, pictures: list[Path]):
    page = opened()
    with_maps(page, pictures[0], "grad_cam", "edge_map")
    page.get_by_role("button", name="Measure these maps").click()
    expect(page.get_by_role("img", name="Insertion")).to_be_visible()
    assert "Grad-CAM from" in page.locator("#cards svg[role=img] desc").first.text_content()
    expect(page.locator(".part").first).to_contain_text("one image: no interval")
    names = page.locator(".part tbody tr:not(.group) th").all_inner_texts()
    assert names == ["Grad-CAM", "random map", "center map", "edge map", "contrast map"]
    assert all(0 <= float(text) <= 1 for text in page.locator(".part td").all_inner_texts())
    assert page.locator("#cards path.line").count() == 2 and page.locator("#cards path.thin").count() == 8


def hidden(page: Page) -> float:
    return float(page.locator(".outcome caption").inner_text().split()[2])


def test_brush_with_the_mouse(opened: Open, pictures: list[Path]):
    page = opened()
    with_maps(page, pictures[0], "grad_cam")
    page.get_by_role("button", name="Hide what I brush over").click()
    canvas = page.locator(".card canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    assert box is not None
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + 5, middle)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] - 5, middle, steps=4)
    page.mouse.up()
    expect(page.locator(".outcome tbody tr").first).to_be_visible()
    assert 8 < hidden(page) < 13  # a line as wide as a tenth of the longer side, so long as the image is wide
    rows = [row.split("\t") for row in page.locator(".outcome tbody tr").all_inner_texts()]
    assert any(before != now for _, before, now in rows)
    assert page.locator("#status").inner_text().startswith(f"{hidden(page)}\u202f% of the image is hidden. Now: class")
    with_maps(page, pictures[1], "saliency")  # other maps leave the brush where it is
    page.get_by_role("button", name="Clear").first.click()
    expect(page.locator(".outcome").first).to_have_text("Nothing is hidden.")


def test_brush_with_the_keyboard(opened: Open, pictures: list[Path]):
    page = opened()
    with_maps(page, pictures[0], "grad_cam")
    page.get_by_role("button", name="Hide what I brush over").focus()
    page.keyboard.press("Enter")
    page.locator(".card canvas").focus()
    page.keyboard.press("ArrowLeft")
    assert page.locator("#status").inner_text() == "45\u202f% from the left, 50\u202f% from the top"
    page.keyboard.press(" ")
    expect(page.locator(".outcome table")).to_be_visible()
    one = hidden(page)
    assert 0.3 < one < 3
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Delete")
    expect(page.locator(".outcome caption")).not_to_contain_text(f"{one}")
    assert 0 < hidden(page) < one


def test_brush_with_a_finger(opened: Open, pictures: list[Path]):
    page = opened(width=390, has_touch=True)
    with_maps(page, pictures[0], "grad_cam")
    page.get_by_role("button", name="Hide what I brush over").tap()
    page.locator(".card canvas").tap()
    expect(page.locator(".outcome table")).to_be_visible()
    assert hidden(page) > 0


def slowly(progress: facts.Progress | None, until: threading.Event) -> None:
    """Progress without end, until the job is cancelled or the test lets it go on."""
    assert progress is not None
    for i in range(1000):
        progress("RISE", min(i, 99), 100)
        if until.wait(0.02):
            return


@pytest.fixture
def held(service: Service, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Maps take until the event is set."""
    event, explain = threading.Event(), service.explain

    def slow(asked: Any, progress: facts.Progress | None = None) -> Any:
        slowly(progress, event)
        return explain(asked, progress)

    monkeypatch.setattr(service, "explain", slow)
    yield event
    event.set()


def test_cancel_a_job(opened: Open, pictures: list[Path], held: threading.Event):
    page = opened()
    with page.expect_request(lambda request: request.method == "DELETE") as deleted:
        page.set_input_files("#files", pictures[0])
        expect(page.locator("#tasks")).to_contain_text("maps of one.png")
        expect(page.locator("#tasks")).to_contain_text("RISE")
        assert page.locator("progress").get_attribute("aria-label") == "maps of one.png"
        page.get_by_role("button", name="Cancel: maps of one.png").press("Enter")
    expect(page.locator("#tasks li")).to_have_count(0)
    expect(page.locator("#status")).to_have_text("Canceled: maps of one.png.")
    assert page.evaluate("document.activeElement.id") == "maps-title"
    job = httpx2.get(deleted.value.url).json()
    while job["state"] == "running":
        job = httpx2.get(deleted.value.url).json()
    assert job["state"] == "cancelled"
    held.set()
    page.click("#explain")
    expect(page.locator(".card .map")).to_have_count(1)


def test_to_explain_anew_replaces_what_runs(opened: Open, pictures: list[Path], held: threading.Event):
    page = opened()
    page.set_input_files("#files", pictures[0])
    expect(page.locator("#tasks")).to_contain_text("RISE")
    page.click("#explain")
    expect(page.locator("#tasks li")).to_have_count(1)
    held.set()
    expect(page.locator(".card .map")).to_have_count(1)
    expect(page.locator("#tasks li")).to_have_count(0)


def test_reload_cancels_and_starts_afresh(opened: Open, pictures: list[Path], held: threading.Event, address: str):
    page = opened()
    with page.expect_response(lambda response: response.request.method == "POST") as posted:
        page.set_input_files("#files", pictures[0])
    job = f"{address}/jobs/{posted.value.json()['id']}"
    expect(page.locator("#tasks")).to_contain_text("RISE")
    page.reload()
    page.locator("#fast input").first.wait_for()
    end = time.monotonic() + 5
    while (state := httpx2.get(job).json()["state"]) == "running" and time.monotonic() < end:
        time.sleep(0.02)
    assert state == "cancelled"
    assert page.locator(".card").count() == 0
    held.set()
    drop(page, pictures[1])
    expect(page.locator(".card .map")).to_have_count(1)


def test_errors_of_the_server_are_shown_as_they_are(opened: Open, pictures: list[Path], address: str):
    page = opened(faults=["422"])
    drop(page, pictures[2], pictures[0])
    expect(page.locator(".card .map")).to_have_count(1)  # the other image has its map
    files = {"images": ("broken.png", pictures[2].read_bytes())}
    said = httpx2.post(f"{address}/explain", files=files).json()["error"]
    assert page.get_by_role("alert").inner_text() == said
    assert page.locator(".card").first.locator(".wrong").inner_text() == said


def test_a_folder_is_not_taken_for_a_server_that_has_gone(opened: Open, pictures: list[Path]):
    page = opened()
    page.evaluate("void (Blob.prototype.arrayBuffer = () => Promise.reject(new Error('as for a folder')))")
    drop(page, pictures[0])
    expect(page.get_by_role("alert")).to_have_text("one.png cannot be read: drop image files, not folders.")
    assert page.locator(".card").count() == 0


def test_a_full_queue_is_waited_for(opened: Open, pictures: list[Path]):
    page = opened(faults=["503"])
    refusals: list[Route] = []

    def once(route: Route) -> None:
        if refusals:
            route.fallback()
        else:
            refusals.append(route)
            route.fulfill(status=503, headers={"Retry-After": "1"}, json={"error": "expected room in the queue"})

    page.route("**/jobs", once)
    page.set_input_files("#files", pictures[0])
    expect(page.locator("#status")).to_have_text("The server is busy. Trying again in 1 s.")
    expect(page.locator(".card .map")).to_have_count(1)
    assert page.locator("#error").inner_text() == ""


def test_a_server_that_has_gone(opened: Open, pictures: list[Path]):
    page = opened(faults=["ERR_FAILED"])
    page.route("**/jobs", lambda route: route.abort())
    page.set_input_files("#files", pictures[0])
    expect(page.get_by_role("alert")).to_have_text("The server does not answer; is it still running?")


def test_what_does_not_work_leaves_the_maps_that_are_there(opened: Open, pictures: list[Path]):
    page = opened(faults=["400"])
    with_maps(page, pictures[0], "grad_cam")
    page.route("**/jobs", lambda route: route.fulfill(status=400, json={"error": "expected another layer"}))
    page.click("#explain")
    expect(page.get_by_role("alert")).to_have_text("expected another layer")
    assert maps_of(page) == ["grad_cam"]


def saved(page: Page, button: str) -> tuple[str, bytes]:
    with page.expect_download() as download:
        page.get_by_role("button", name=button).click()
    return download.value.suggested_filename, Path(download.value.path()).read_bytes()


def test_raw_maps_are_those_of_the_command_line(opened: Open, pictures: list[Path], address: str):
    page = opened()
    with_maps(page, pictures[0], "grad_cam", "saliency", "edge_map")
    name, content = saved(page, "Save raw maps")
    assert name == "one.npz"
    form = {"methods": "grad_cam,saliency,edge_map", "response": "npz"}
    answer = httpx2.post(f"{address}/explain", data=form, files={"images": ("one.png", pictures[0].read_bytes())})
    ours, theirs = (np.load(BytesIO(file), allow_pickle=False) for file in (content, answer.content))
    assert ours.files == theirs.files == ["grad_cam", "saliency", "edge_map"]
    for method in theirs.files:
        np.testing.assert_array_equal(ours[method], theirs[method], strict=True)


def test_save_as_png(opened: Open, pictures: list[Path]):
    page = opened()
    with_maps(page, pictures[0], "grad_cam", "edge_map")
    name, content = saved(page, "Save as PNG")
    assert name == "one--page.png"
    image = Image.open(BytesIO(content)).convert("RGB")
    assert image.width == 2 * (3 * 260 + 20)  # the image and two maps, two pixels for each
    assert len(image.crop((0, 100, image.width, 400)).getcolors(1 << 20) or ()) > 1000


def test_copy_the_python_lines(opened: Open, pictures: list[Path], address: str):
    page = opened(permissions=["clipboard-read", "clipboard-write"])
    with_maps(page, pictures[0], "grad_cam")
    page.get_by_role("button", name="Python").click()
    page.get_by_role("button", name="Copy").click()
    expect(page.locator("#status")).to_have_text("Copied.")
    code = httpx2.post(f"{address}/explain", files={"images": ("one.png", pictures[0].read_bytes())}).json()["code"]
    assert page.evaluate("navigator.clipboard.readText()") == code


def open_all(page: Page, picture: Path) -> None:
    """Show everything that there is."""
    with_maps(page, picture, "grad_cam", "saliency", "rise", "edge_map", "center_map")
    page.locator("details").evaluate_all("all => all.forEach(one => { one.open = true; })")
    for name in ("Measure these maps", "Hide what I brush over", "Python"):
        page.get_by_role("button", name=name).click()
    page.locator(".card canvas").click()
    expect(page.locator(".outcome table")).to_be_visible()
    expect(page.locator(".chart").first).to_be_visible()
    page.locator("#target").click()
    page.keyboard.type("t")


@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (1280, "dark")])
def test_everything_open_is_accessible_and_as_wide_as_the_screen(
    opened: Open, pictures: list[Path], tmp_path: Path, width: int, scheme: str
):
    page = opened(width=width, color_scheme=scheme)
    found = [Axe().run(page).response]
    long = tmp_path / f"{'long_' * 30}.png"
    long.write_bytes(pictures[0].read_bytes())
    open_all(page, long)
    found.append(Axe().run(page).response)
    page.locator("#target").fill("tttt")
    page.keyboard.press("Enter")
    assert page.evaluate("[innerWidth, document.documentElement.scrollWidth]") == [width, width]
    page.click("#explain")
    expect(page.locator(".card .answer")).to_contain_text("t" * 200)
    assert page.evaluate("[innerWidth, document.documentElement.scrollWidth]") == [width, width]
    assert all(one["passes"] for one in found)
    faults = [fault for one in found for fault in one["violations"]]
    assert [(fault["id"], [node["html"] for node in fault["nodes"]]) for fault in faults] == []


def test_axe_would_tell(opened: Open):
    page = opened()
    page.evaluate("document.querySelector('#layer').labels[0].remove()")
    assert "select-name" in {one["id"] for one in Axe().run(page).response["violations"]}


def test_dark_mode_is_dark(opened: Open):
    grounds = []
    for scheme in ("light", "dark"):
        page = opened(color_scheme=scheme)
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
        grounds.append(ground)
    assert min(grounds[0]) > 240 and max(grounds[1]) < 40


def test_with_the_keyboard_alone(opened: Open):
    page = opened()

    def tab_to(expression: str) -> None:
        for _ in range(60):
            page.keyboard.press("Tab")
            if page.evaluate(f"document.activeElement.matches({json.dumps(expression)})"):
                visible = "getComputedStyle(document.activeElement).outlineStyle"
                assert page.evaluate(visible) != "none" or expression == "#files"
                return
        raise AssertionError(f"no way to {expression}")

    tab_to("#files")
    tab_to("#samples summary")
    page.keyboard.press("Enter")
    tab_to(".samples button")
    page.keyboard.press("Enter")
    expect(page.locator(".card .map")).to_have_count(1)
    tab_to("#target")
    page.keyboard.type("siam")
    page.keyboard.press("Enter")
    tab_to("#layer")
    tab_to("[value=saliency]")
    page.keyboard.press(" ")
    tab_to("[value=random_map]")
    page.keyboard.press(" ")
    tab_to("#explain")
    page.keyboard.press("Enter")
    expect(page.locator(".card .map")).to_have_count(3)
    expect(page.locator(".card .answer")).to_contain_text("explained Siamese cat")
    tab_to("#opacity")
    page.keyboard.press("Home")
    tab_to(".card header button")
    tab_to(".actions button")
    page.keyboard.press("Enter")
    expect(page.locator(".chart").first).to_be_visible()


def test_the_run_s_own_images(opened: Open):
    page = opened()
    page.click("#samples summary")
    assert page.locator(".samples button").all_inner_texts() == ["tabby", "class 3"]
    page.locator(".samples button").nth(1).click()
    expect(page.locator(".card h3")).to_contain_text("two.png")
    expect(page.locator(".card .answer")).to_contain_text("true class 3")
    best = page.locator(".prediction li span").first.inner_text()
    expect(page.locator(".card .answer")).to_contain_text("✓ correct" if best == "class 3" else "✗ wrong")
    expect(page.locator(".card .map")).to_have_count(1)
    page.get_by_role("button", name="Hide what I brush over").click()
    page.locator(".card canvas").click()
    expect(page.locator(".outcome table")).to_be_visible()
