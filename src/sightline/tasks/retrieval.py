"""Retrieval: images of the same identity, found by the features of a network that was trained on other identities."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64, Shaped
from torch import Tensor, nn
from torch.nn.functional import normalize

from sightline import data, runs
from sightline.attention.places import Trace
from sightline.data.splits import draw
from sightline.inference import copy_of, features_of, head_name, untouched
from sightline.metrics.retrieval import Ranking, nearest, ranking_of_features
from sightline.notebook import brief
from sightline.recipe import Data
from sightline.tasks.outcome import Figure, Outcome, register

Array = np.ndarray
_BATCH = 128


def embed(model: nn.Module, images: data.ImageSet, mirror: bool = True) -> Float[Tensor, "n d"]:
    """The features that a network has of images before its last linear layer, on the CPU, with length 1.

    With a `BNNeck` these are behind its BatchNorm.

    Args:
        model: a network whose logits come straight out of an `nn.Linear`; it runs on its own device.
        images: the images, with the normalization of the network.
        mirror: add the features of the mirrored image.

    Raises:
        ValueError: a network of another kind.

    Source: Zheng et al. 2019 (1904.07223), DG-Net, evaluation: features of image and mirrored image, added after they
    have length 1, and scaled to length 1 again.
    """
    device = next(model.parameters()).device
    parts: list[Tensor] = []
    with untouched(model) as net, torch.inference_mode(False), torch.no_grad():
        for batch in data.batches(images.unmarked(), _BATCH):
            inputs = data.normalize(batch.images.to(device), images.preprocess)
            features = normalize(features_of(net, inputs).flatten(1).float())
            if mirror:
                features = normalize(features + normalize(features_of(net, inputs.flip(3)).flatten(1).float()))
            parts.append(features.cpu())
    return torch.cat(parts)


@dataclass(frozen=True, kw_only=True, eq=False)
class Found:
    """The gallery as a network ranks it for some queries, junk included."""

    __repr__ = brief

    query: data.ImageSet
    gallery: data.ImageSet
    places: Int64[Tensor, "q k"]
    """Images of the gallery, the most similar first."""
    scores: Float[Tensor, "q k"]
    """Cosine similarities."""

    def verdict(self, query: int, place: int) -> str:
        """One of "right", "wrong", and "junk": the same identity and camera, or no identity."""
        same = self.query.labels[query] == self.gallery.labels[place]
        if self.gallery.labels[place] < 0 or (same and _cameras(self.query)[query] == _cameras(self.gallery)[place]):
            return "junk"
        return "right" if same else "wrong"


def find(
    run: runs.Run, model: nn.Module, queries: int = 10, k: int = 10, *, source: str | None = None, mirror: bool = True
) -> Found:
    """The first images of the gallery for some queries, without the query itself; each of another identity if possible.

    Args:
        run: the network's run.
        model: its network.
        queries: number of queries.
        k: number of images of the gallery for each.
        source: see `retrieval`.
        mirror: see `embed`.

    Raises:
        ValueError: the data has no identities.
        OSError: the data is missing.
    """
    query, gallery = _sides(run, source)
    chosen = draw(query.labels, min(queries, len(query)), seed=run.seed)
    query = query.picked(chosen)
    scores, places = nearest(embed(model, query, mirror), embed(model, gallery, mirror), min(k, len(gallery)) + 1)
    others = np.array(gallery.names)[places] != np.array(query.names)[:, None]
    kept = torch.from_numpy(others).long().argsort(dim=1, descending=True, stable=True)[:, : min(k, places.shape[1])]
    kept = kept[:, : int(others.sum(1).min())]
    return Found(query=query, gallery=gallery, places=places.gather(1, kept), scores=scores.gather(1, kept))


def encoder(model: nn.Module) -> nn.Module:
    """A copy of a network that returns its features instead of its logits, in eval mode, for `targets.Similarity`.

    Raises:
        ValueError: the logits do not come straight out of an `nn.Linear`.

    >>> network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    >>> encoder(network)(torch.ones(1, 3, 1, 1)).tolist()
    [[1.0, 1.0, 1.0]]
    """
    copied = copy_of(model).eval()
    parent, _, child = head_name(copied, Trace(copied).images).rpartition(".")
    setattr(copied.get_submodule(parent), child, nn.Identity())
    return copied


@register("retrieval")
def retrieval(run: runs.Run, model: nn.Module, *, source: str | None = None, mirror: bool = True) -> Outcome:
    """Images of the same identity from other cameras: rank-1, rank-5 and mAP of ranked lists.

    Args:
        run: the network's run, on data with cameras.
        model: its network.
        source: other data with identities, in a layout that needs no columns. None: the run's own.
        mirror: see `embed`.

    Raises:
        ValueError: the data has no identities, or the network no linear layer at its end.
        OSError: the data is missing.

    Source: see `metrics.retrieval`; chance is that of a network that embeds all images alike.
    """
    query, gallery = _sides(run, source)
    features = embed(model, query, mirror), embed(model, gallery, mirror)

    def ranked(of_query: Tensor, of_gallery: Tensor) -> Ranking:
        sides = query.labels, gallery.labels, _cameras(query), _cameras(gallery)
        return ranking_of_features(of_query, of_gallery, *sides)

    found, by_chance = ranked(*features), ranked(*(torch.zeros(len(one), 1) for one in features))
    figures = {
        name: Figure(
            values=values,
            unit="queries",
            groups=np.array([query.classes[label] for label in query.labels]),
            of="identities",
            chance=float(np.nanmean(chance)),
        )
        for (name, values), chance in zip(_figures(found).items(), _figures(by_chance).values(), strict=True)
    }
    return Outcome(
        task="retrieval",
        figures=figures,
        names={"queries": query.names},
        notices=(*dict.fromkeys((*query.notices, *gallery.notices)), _CHOICE),
    )


_CHOICE = (
    "rank-k and mAP count queries with a match; mAP is not interpolated, `mAP (trapezoid)` is that of DG-Net and of "
    "Market-1501's evaluation"
)


def _figures(ranked: Ranking) -> dict[str, Float64[Array, " q"]]:
    return {
        "rank-1": ranked.cmc(1).numpy(),
        "rank-5": ranked.cmc(5).numpy(),
        "mAP": ranked.average_precision().numpy(),
        "mAP (trapezoid)": ranked.average_precision("trapezoid").numpy(),
    }


def _sides(run: runs.Run, source: str | None) -> tuple[data.ImageSet, data.ImageSet]:
    wanted = run.recipe.data
    if source is not None:
        wanted = Data(source=source, size=run.preprocess.size)
    if not data.has_identities(wanted):
        raise ValueError(
            f"expected data of identities seen by cameras, got {wanted.source}; name the column of the camera by "
            "data.camera when you train"
        )
    splits = data.load(wanted)
    query, gallery = (replace(splits[name], preprocess=run.preprocess) for name in ("query", "gallery"))
    return query, gallery


def _cameras(images: data.ImageSet) -> Shaped[Array, " n"]:
    assert images.cameras is not None  # `_sides` refuses data without
    return images.cameras
