"""Images with labels, masks, boxes and groups, from wherever they are."""

from sightline.data.episodes import Episode, episodes
from sightline.data.loading import (
    DATASETS,
    has_identities,
    load,
    load_new_classes,
    load_stream,
    load_whole,
    read_images,
)
from sightline.data.sets import Batch, ImageSet, ImageStream, Preprocess, batches, normalize
from sightline.facts import old_names

__all__ = [
    "DATASETS",
    "Batch",
    "Episode",
    "ImageSet",
    "ImageStream",
    "Preprocess",
    "batches",
    "has_identities",
    "episodes",
    "load",
    "load_new_classes",
    "load_stream",
    "load_whole",
    "normalize",
    "read_images",
]

__getattr__ = old_names("sightline.data")
