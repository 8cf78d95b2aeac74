"""The maps in a folder of results, as `sightline.exploration` reads them."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from jaxtyping import Float, Int64, UInt8
from torch import nn

from sightline.data import Preprocess
from sightline.data.images import UnreadableImage, open_image, quiet
from sightline.exploration import Look
from sightline.exploration.sources import probabilities
from sightline.facts import Progress, joined
from sightline.scale.many import weights_digest
from sightline.scale.plan import PLAN, Entry, Plan, contents_of
from sightline.scale.results import Results, read_map

Array = np.ndarray
_COLUMNS = (
    *("key", "source_index", "label", "split", "method", "target", "predicted", "probability"),
    *("map", "height", "width", "dtype"),
)


class ResultLooks:
    """The maps of `explain_many`, read shard by shard; shards that are missing are told."""

    def __init__(self, results: Results, model: nn.Module) -> None:
        """A folder of results, and the network that made them.

        Raises:
            ValueError: another network made them.
        """
        asked = results.asked
        if asked["weights"] != weights_digest(model):
            raise ValueError(
                f"expected the network of {results.folder}, {asked['network']}, got one of other weights; name its "
                "run, or the model and its --weights"
            )
        self.results, self.model = results, model
        self.preprocess = Preprocess(**{name: _tuple(value) for name, value in asked["preprocess"].items()})
        self.output = _tuple(asked["output"])
        count = self._probabilities(np.zeros((1, 3, *self.preprocess.size), dtype=np.uint8)).shape[1]
        names = asked["classes"] if len(asked["classes"]) == count else range(count)
        self.classes = tuple(map(str, names))
        self.methods = tuple(asked["methods"])
        self.name = joined(asked["sources"], 3)
        missing = len(results.missing())
        self.notices = (f"{missing:,} of {results.shards:,} shards are missing, and their images left out",) * (
            missing > 0
        )

    def looks(self, progress: Progress | None = None) -> Iterator[Look]:
        """All maps, those of images that could not be read left out."""
        for batch in self.results.batches(_COLUMNS):
            for row in batch.to_pylist():
                if row["method"] is None:
                    continue
                yield Look(
                    place=row["source_index"],
                    key=row["key"],
                    method=row["method"],
                    map=read_map(row),
                    target=row["target"],
                    predicted=row["predicted"],
                    confidence=row["probability"],
                    label=-1 if row["label"] is None else row["label"],
                    split=row["split"] or "",
                )
            if progress is not None and len(batch):
                progress("maps", batch.column("source_index")[-1].as_py() + 1, self.results.asked["images"])

    def images(self, places: Sequence[int]) -> UInt8[Array, "n 3 h w"]:
        """Images as the network sees them, read again from their source.

        Raises:
            OSError: a source cannot be reached.
            ValueError: an image cannot be read any more.
        """
        asked = self.results.asked
        plan = Plan(self.results.folder / PLAN, asked["images"], asked["plan"])
        order = np.argsort(places, kind="stable")
        entries: list[Entry] = []
        for shard, some in groupby(order.tolist(), lambda row: places[row] // asked["images_per_shard"]):
            listed = plan.entries(shard)
            entries += [listed[places[row] % asked["images_per_shard"]] for row in some]
        images = np.empty((len(places), *self.preprocess.size, 3), dtype=np.uint8)
        seen = self.preprocess
        with quiet():
            for row, entry, read in zip(order.tolist(), entries, contents_of(entries), strict=True):
                content = read()
                try:
                    if isinstance(content, str):
                        raise UnreadableImage(content)
                    images[row], _ = open_image(content, seen.size, asked["max_pixels"], seen.crop, seen.interpolation)
                except UnreadableImage as error:
                    raise ValueError(f"{entry.key} was read for its map and cannot be read now: {error}") from error
        return images.transpose(0, 3, 1, 2).copy()

    def marked(self, places: Sequence[int]) -> None:
        """None: results hold no masks."""

    def predict(self, images: UInt8[Array, "n 3 h w"]) -> Int64[Array, " n"]:
        """The most probable class."""
        return self._probabilities(images).argmax(1)

    def _probabilities(self, images: UInt8[Array, "n 3 h w"]) -> Float[Array, "n classes"]:
        return probabilities(self.model, images, self.preprocess, self.output)


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
