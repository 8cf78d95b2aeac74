"""A page of ranked lists: for each query the first images of the gallery, and maps of what makes each pair similar."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from sightline import data, maps, runs
from sightline.explainers import explain
from sightline.report.formats import template
from sightline.report.pictures import in_words, picture
from sightline.targets import Similarity
from sightline.tasks import Found, encoder

__all__ = ["write_ranked"]

_MARKS = {"right": "✓ right", "wrong": "✗ wrong", "junk": "– junk"}


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One image of the gallery in the list of a query."""

    verdict: str
    mark: str
    rank: int | None
    """Place among the images that count; None for junk."""
    identity: str
    camera: str
    score: float
    image: str
    on_answer: str
    """Picture of the image under the map of its similarity to the query."""
    on_query: str
    """Picture of the query under the map of its similarity to the image."""
    words: tuple[str, str]
    """Both maps for a screen reader."""


@dataclass(frozen=True, kw_only=True)
class RankedList:
    """One query and its answers."""

    name: str
    identity: str
    camera: str
    image: str
    answers: list[Answer]


def write_ranked(found: Found, model: nn.Module, file: str | Path, run: runs.Run, method: str = "hires_cam") -> Path:
    """Write a page of ranked lists, the whole file or none of it, and return its path.

    Each pair has two maps, each on one image with the features of the other fixed and of length 1: positive values add
    to the product of the two. The cosine itself has nearly no gradient where two images are alike.

    Args:
        found: queries and the first images of their lists.
        model: the network that ranked them.
        file: HTML file to write.
        run: the network's run.
        method: an explainer that takes a function as target, see `sightline.explain`.

    Raises:
        OSError: the file cannot be written.
        ValueError: the network has no linear layer, or the explainer does not fit.
    """
    lists = [*_lists(found, encoder(model), method)]
    counts = {kind: sum(a.verdict == kind for one in lists for a in one.answers) for kind in _MARKS}
    page = template("ranked.html").render(
        lists=lists,
        counts=counts,
        marks=_MARKS,
        method=method,
        run=run,
        gallery=found.gallery,
        facts={"run": str(run.folder), "images": found.gallery.name} | runs.surroundings(),
    )
    runs.write(Path(file), page.encode())
    return Path(file)


def _lists(found: Found, net: nn.Module, method: str) -> Iterator[RankedList]:
    device = next(net.parameters()).device
    for number, places in enumerate(found.places.numpy()):
        query, answers = found.query.batch([number]).images, found.gallery.batch(places).images
        sides = [data.normalize(images.to(device), found.gallery.preprocess) for images in (query, answers)]
        with torch.no_grad():
            of_query, of_answers = map(net, sides)
        repeated = sides[0].expand(len(places), -1, -1, -1)
        on_answers = explain(net, sides[1], Similarity(of_query[0], cosine=False), [method])[method]
        on_query = explain(net, repeated, Similarity(of_answers, cosine=False), [method])[method]
        drawn = zip(
            _pictures(answers),
            _pictures(answers, on_answers),
            _pictures(query.expand(len(places), -1, -1, -1), on_query),
            strict=True,
        )
        verdicts = [found.verdict(number, place) for place in places.tolist()]
        yield RankedList(
            name=found.query.names[number],
            identity=_identity(found.query, number),
            camera=_camera(found.query, number),
            image=_pictures(query)[0],
            answers=[
                Answer(
                    verdict=verdict,
                    mark=_MARKS[verdict],
                    rank=None if verdict == "junk" else sum(v != "junk" for v in verdicts[: i + 1]),
                    identity=_identity(found.gallery, place),
                    camera=_camera(found.gallery, place),
                    score=float(found.scores[number, i]),
                    image=image,
                    on_answer=on_answer,
                    on_query=on_it,
                    words=(in_words(on_answers[i, 0].cpu().numpy()), in_words(on_query[i, 0].cpu().numpy())),
                )
                for i, (place, verdict, (image, on_answer, on_it)) in enumerate(
                    zip(places.tolist(), verdicts, drawn, strict=True)
                )
            ],
        )


def _pictures(images: UInt8[Tensor, "b 3 h w"], over: Float[Tensor, "b 1 h2 w2"] | None = None) -> list[str]:
    if over is not None:
        images = maps.overlay(images, over.cpu(), signed=True)[:, 0]
    return [picture(image.permute(1, 2, 0).contiguous().numpy()) for image in images]


def _identity(images: data.ImageSet, place: int) -> str:
    label = int(images.labels[place])
    return "no identity" if label < 0 else images.classes[label]


def _camera(images: data.ImageSet, place: int) -> str:
    return "" if images.cameras is None else str(images.cameras[place])
