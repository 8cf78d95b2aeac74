"""Scores of ranked lists: cumulative matching characteristic (CMC) and average precision, one value per query.

The protocol of person re-identification. An image of the gallery is a match of a query if it has its identity and
another camera. It is junk, as if it were not there, if it has the same identity and the same camera, or no identity
(a negative one). Any other image is wrong; identities without a query are distractors.

Ties: all orders of images that are equally similar to the query are equally likely, and each value is its expectation
over these orders. So a network that embeds all images alike gets what a random order gets.

Queries without a match are NaN and count for nothing in `metrics.uncertainty.mean_interval`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor

__all__ = ["AP_FORMS", "Ranking", "nearest", "ranking", "ranking_of_features"]

Array = np.ndarray
Form = Literal["step", "trapezoid"]
AP_FORMS: tuple[Form, ...] = get_args(Form)
_Columns = Callable[[int, int], Float[Tensor, "q b"]]


@dataclass(frozen=True, eq=False)
class Ranking:
    """How many images of the gallery stand before each match of each query, junk left out.

    Rows are padded to the largest number of matches; where there is no match, `tied` is 0.

    >>> similar = torch.tensor([[0.9, 0.8, 0.7, 0.6]])
    >>> ranked = ranking(similar, np.array([1]), np.array([2, 1, 2, 1]))
    >>> ranked.cmc(1).tolist(), ranked.cmc(2).tolist(), ranked.average_precision().tolist()
    ([0.0], [1.0], [0.5])
    """

    above: Int64[Tensor, "q m"]
    """Images more similar to the query."""
    tied: Int64[Tensor, "q m"]
    """Images as similar as this match, itself included."""
    matches_above: Int64[Tensor, "q m"]
    matches_tied: Int64[Tensor, "q m"]

    @property
    def matches(self) -> Int64[Tensor, " q"]:
        """Number of matches of each query."""
        return (self.tied > 0).sum(1)

    def cmc(self, k: int) -> Float[Tensor, " q"]:
        """Probability that a match is among the first k images of the list, 0 or 1 without ties; NaN without a match.

        Source: Gray et al. 2007, "Evaluating appearance models for recognition, reacquisition, and tracking".

        Raises:
            ValueError: k below 1.

        >>> tied = torch.tensor([[0.5, 0.5, 0.5]])
        >>> ranking(tied, np.array([1]), np.array([1, 2, 2])).cmc(2).round(decimals=4).tolist()
        [0.6667]
        """
        if k < 1:
            raise ValueError(f"expected k of 1 or more, got {k}; rank 1 is the first image of the list")
        if not self.tied.shape[1]:
            return torch.full((len(self.tied),), torch.nan, dtype=torch.float64)
        first = self.above.masked_fill(self.tied == 0, torch.iinfo(torch.int64).max).argmin(1, keepdim=True)
        above, tied, matches = (x.gather(1, first).double() for x in (self.above, self.tied, self.matches_tied))
        drawn = (k - above).clamp(min=0)
        missed = torch.ones_like(tied)
        for j in range(int(matches.max())):
            missed *= torch.where(j < matches, (tied - drawn - j).clamp(min=0) / (tied - j).clamp(min=1), 1)
        return torch.where(tied > 0, 1 - missed, torch.nan)[:, 0]

    def average_precision(self, form: Form = "step") -> Float[Tensor, " q"]:
        """Area under precision over recall: the mean over the matches of the precision at their ranks.

        Args:
            form: "step", the precision after each match, as torchreid and scikit-learn compute it; "trapezoid", the
                mean of the precision before and after it (before the first image it is 1), as in the evaluation of
                Market-1501 and DG-Net. DG-Net's mean counts queries without a match as 0: `nan_to_num()` first.

        Raises:
            ValueError: another form.

        Source: Zheng et al. 2015, "Scalable person re-identification: a benchmark"; expectation over ties: McSherry
        and Najork 2008, "Computing information retrieval performance measures efficiently in the presence of tied
        scores".

        >>> similar = torch.tensor([[0.9, 0.8, 0.7, 0.6]])
        >>> ranked = ranking(similar, np.array([1]), np.array([1, 2, 2, 1]))
        >>> [ranked.average_precision(form).round(decimals=4).tolist() for form in AP_FORMS]
        [[0.75], [0.7083]]
        """
        if form not in AP_FORMS:
            raise ValueError(f"expected form to be {' or '.join(AP_FORMS)}, got {form!r}; step is torchreid's")
        found = self.tied > 0
        above, tied, before, matches = (
            x.double() for x in (self.above, self.tied.clamp(min=1), self.matches_above, self.matches_tied.clamp(min=1))
        )
        # with i - 1 tied images before a match, before + slope (i - 1) matches are expected before it
        slope = (matches - 1) / (tied - 1).clamp(min=1)
        precision = _mean_ratio(before + 1, above, slope, tied)
        if form == "trapezoid":
            first = (1 + slope * (tied - 1)) / tied  # at the top of the list, where it is 1 before the first image
            lower = _mean_ratio(before, above.clamp(min=1) - 1, slope, tied)
            precision = (precision + torch.where(above == 0, first, lower)) / 2
        # 0 / 0 is the NaN of a query without a match
        return torch.where(found, precision, 0).sum(1) / found.sum(1)


def ranking(
    similarities: Float[Tensor, "q g"],
    query_ids: Shaped[Array, " q"],
    gallery_ids: Shaped[Array, " g"],
    query_cameras: Shaped[Array, " q"] | None = None,
    gallery_cameras: Shaped[Array, " g"] | None = None,
) -> Ranking:
    """The ranking of a gallery for each query.

    Args:
        similarities: of each query to each image of the gallery; for distances, pass their negatives.
        query_ids: identity of each query, whole numbers from 0.
        gallery_ids: identity of each image of the gallery; negative: junk for every query.
        query_cameras: camera of each query. None: no camera, and no image is junk because of it.
        gallery_cameras: camera of each image of the gallery.

    Raises:
        ValueError: nothing to rank, a query without an identity, cameras of one side only, or similarities that are not
            finite.
    """
    return _ranking(
        lambda start, end: similarities[:, start:end],
        _Sides.of(query_ids, gallery_ids, query_cameras, gallery_cameras),
        batch_size=max(similarities.shape[1], 1),
    )


def ranking_of_features(
    queries: Float[Tensor, "q d"],
    gallery: Float[Tensor, "g d"] | Float[Array, "g d"],
    query_ids: Shaped[Array, " q"],
    gallery_ids: Shaped[Array, " g"],
    query_cameras: Shaped[Array, " q"] | None = None,
    gallery_cameras: Shaped[Array, " g"] | None = None,
    batch_size: int = 4096,
) -> Ranking:
    """`ranking` by the dot product of features, which is the cosine if they have length 1.

    The gallery is read twice, `batch_size` rows at a time, so it may be a `numpy.memmap` larger than the memory. Held
    besides are numbers per query and match.

    Raises:
        ValueError: see `ranking`; a batch size below 1.

    >>> two = torch.eye(2)
    >>> ranking_of_features(two, two.numpy(), np.array([0, 1]), np.array([1, 1])).cmc(1).tolist()
    [nan, 1.0]
    """
    _check_batch(batch_size)
    sides = _Sides.of(query_ids, gallery_ids, query_cameras, gallery_cameras)
    return _ranking(lambda start, end: queries @ _rows(gallery, start, end, queries).mT, sides, batch_size)


def nearest(
    queries: Float[Tensor, "q d"],
    gallery: Float[Tensor, "g d"] | Float[Array, "g d"],
    k: int = 10,
    batch_size: int = 4096,
) -> tuple[Float[Tensor, "q k"], Int64[Tensor, "q k"]]:
    """Similarity and place of the k images of the gallery with the largest dot product, or of all if there are fewer.

    Of equally similar images the earlier one comes first. Junk is not left out; see `sightline.tasks`.

    Raises:
        ValueError: k or the batch size below 1.

    >>> nearest(torch.eye(2), torch.tensor([[0.0, 0.5], [1.0, 0.0], [0.0, 1.0]]), k=2)[1].tolist()
    [[1, 0], [2, 0]]
    """
    if k < 1:
        raise ValueError(f"expected k of 1 or more, got {k}; 10 is usual")
    _check_batch(batch_size)
    scores, places = queries.new_empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.int64)
    for start in range(0, len(gallery), batch_size):
        products = queries @ _rows(gallery, start, start + batch_size, queries).mT
        here = torch.arange(start, start + products.shape[1]).expand(len(queries), -1)
        scores, order = torch.cat([scores, products], 1).sort(dim=1, descending=True, stable=True)
        scores, places = scores[:, :k], torch.cat([places, here], 1).gather(1, order[:, :k].cpu())
    return scores, places


@dataclass(frozen=True, eq=False)
class _Sides:
    """Identities and cameras of queries and gallery, the latter numbered alike."""

    query_ids: Int64[Tensor, " q"]
    gallery_ids: Int64[Tensor, " g"]
    query_cameras: Int64[Tensor, " q"]
    gallery_cameras: Int64[Tensor, " g"]

    @classmethod
    def of(cls, query_ids: Array, gallery_ids: Array, query_cameras: Array | None, gallery_cameras: Array | None):
        if not len(query_ids) or not len(gallery_ids):
            raise ValueError(
                f"expected a query and an image to find, got {len(query_ids)} queries and a gallery of "
                f"{len(gallery_ids)}; add images"
            )
        if (query_ids < 0).any():
            raise ValueError(
                f"expected queries with an identity of 0 or more, got {query_ids.min()}; leave queries without one out"
            )
        if (query_cameras is None) != (gallery_cameras is None):
            raise ValueError("expected cameras of queries and gallery, got those of one side; pass both or neither")
        if query_cameras is None or gallery_cameras is None:  # cameras that never agree
            query_cameras, gallery_cameras = np.zeros(len(query_ids), int), np.ones(len(gallery_ids), int)
        numbers = np.unique(np.concatenate([query_cameras, gallery_cameras]), return_inverse=True)[1]
        sides = (query_ids, gallery_ids, numbers[: len(query_cameras)], numbers[len(query_cameras) :])
        lengths = [len(side) for side in sides]
        if lengths[0] != lengths[2] or lengths[1] != lengths[3]:
            raise ValueError(
                f"expected a camera for each of {lengths[0]} queries and {lengths[1]} images of the gallery, got "
                f"{lengths[2]} and {lengths[3]}; pass one each"
            )
        return cls(*(torch.as_tensor(side.astype(np.int64)) for side in sides))

    def relations(self, start: int, end: int) -> tuple[Bool[Tensor, "q b"], Bool[Tensor, "q b"]]:
        """Which images of a part of the gallery are matches, and which are junk, for each query."""
        ids = self.gallery_ids[start:end]
        same = self.query_ids[:, None] == ids
        same_camera = self.query_cameras[:, None] == self.gallery_cameras[start:end]
        return same & ~same_camera, (same & same_camera) | (ids < 0)


def _ranking(columns: _Columns, sides: _Sides, batch_size: int) -> Ranking:
    """Counts, in a second pass over the gallery, what stands above the matches that a first pass has found."""

    def parts() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for start in range(0, len(sides.gallery_ids), batch_size):
            similar = columns(start, start + batch_size).cpu()
            if not similar.isfinite().all():
                raise ValueError("expected finite similarities, got NaN or infinity; check the features")
            yield similar, *sides.relations(start, start + batch_size)

    matches = torch.empty(len(sides.query_ids), 0)
    for similar, is_match, _ in parts():
        most = int(is_match.sum(1).max())
        of_part = torch.where(is_match, similar, -torch.inf).topk(most, 1).values
        matches = torch.cat([matches.to(of_part), of_part], 1)
    most = int((matches > -torch.inf).sum(1).max())
    matches = matches.sort(dim=1, descending=True).values[:, :most].contiguous()
    is_found = matches > -torch.inf
    above, tied = torch.zeros(2, *matches.shape, dtype=torch.int64)
    for similar, _, is_junk in parts():
        more, equal = _counts(torch.where(is_junk, -torch.inf, similar), matches)
        above, tied = above + more, tied + equal
    matches_above, matches_tied = _counts(matches, matches)
    return Ranking(*(torch.where(is_found, count, 0) for count in (above, tied, matches_above, matches_tied)))


def _counts(
    similar: Float[Tensor, "q b"], matches: Float[Tensor, "q m"]
) -> tuple[Int64[Tensor, "q m"], Int64[Tensor, "q m"]]:
    """How many values of each row are above each match, and how many are equal to it."""
    ascending = similar.sort(dim=1).values
    not_above = torch.searchsorted(ascending, matches, right=True)
    return similar.shape[1] - not_above, not_above - torch.searchsorted(ascending, matches)


def _mean_ratio(
    hits: Float[Tensor, "q m"], images: Float[Tensor, "q m"], slope: Float[Tensor, "q m"], tied: Float[Tensor, "q m"]
) -> Float[Tensor, "q m"]:
    """Mean of (hits + slope (i - 1)) / (images + i) over i = 1 to `tied`, by harmonic numbers."""
    harmonic = torch.digamma(images + tied + 1) - torch.digamma(images + 1)
    mean = slope + (hits - slope * (images + 1)) * harmonic / tied
    return torch.where(tied == 1, hits / (images + 1), mean)


def _rows(gallery: Tensor | Array, start: int, end: int, like: Tensor) -> Float[Tensor, "b d"]:
    return torch.as_tensor(np.array(gallery[start:end]) if isinstance(gallery, Array) else gallery[start:end]).to(like)


def _check_batch(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"expected a batch size of at least 1, got {batch_size}; 4096 is usual")
