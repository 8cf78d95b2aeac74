"""The parquet sets under $SIGHTLINE_DATA, which are nobody's to ship."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from sightline.data import batches, load, load_stream
from sightline.recipe import Augment, Data

ROOT = os.environ.get("SIGHTLINE_DATA")
pytestmark = pytest.mark.skipif(ROOT is None, reason="SIGHTLINE_DATA names no folder with the real sets")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIGHTLINE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def source(name: str) -> str:
    return str(Path(ROOT or "") / name)


def test_glas_tiles_are_split_by_patient():
    with pytest.raises(ValueError, match=r"11 of 12 patient groups in test also occur in train.*--data\.resplit true"):
        load(Data(source=source("glas_tiles"), group="patient"))
    for seed in range(3):
        sets = load(Data(source=source("glas_tiles"), group="patient", resplit=True, seed=seed, size=64))
        assert sum(len(images) for images in sets.values()) == 962
        patients = [set(images.groups.tolist()) for images in sets.values()]
        assert len(set.union(*patients)) == sum(len(p) for p in patients) == 16
        assert all(np.bincount(images.labels, minlength=2).min() > 0 for images in sets.values())
        assert 0.1 < len(sets["test"]) / 962 < 0.3
    assert sets["train"].classes == ("benign", "malignant") and sets["train"].has_masks
    area = torch.cat([batch.regions.float().mean((1, 2, 3)) for batch in batches(sets["train"], 100)])
    assert 0.2 < area.mean() < 0.8


def test_part_of_cifar10():
    sets = load(Data(source=source("cifar10"), train_size=2000, test_size=1000))
    assert {split: len(images) for split, images in sets.items()} == {"train": 2000, "val": 1500, "test": 1000}
    assert np.bincount(sets["train"].labels).tolist() == [200] * 10
    assert sets["train"].preprocess.size == (32, 32) and sets["train"].classes[3] == "cat"
    change = (Augment(crop=4, flip=True), 0, 0)
    assert sum(len(b.labels) for b in batches(sets["train"], 128, shuffle=(0, 0), augment=change)) == 2000


def test_tiny_imagenet50_has_a_box_in_every_image():
    images = load(Data(source=source("tiny_imagenet50"), train_size=1000, test_size=500))["test"]
    assert images.preprocess.size == (64, 64) and len(images.classes) == 50 and images.has_boxes
    batch = images.batch(range(500))
    assert {len(boxes) for boxes in batch.boxes} == {1}
    sides = torch.cat(batch.boxes).reshape(-1, 2, 2).diff(dim=1)[:, 0]
    torch.testing.assert_close(batch.regions.flatten(1).sum(1).float(), sides.prod(1))


def test_wbc_masks_lie_in_their_boxes():
    images = load(Data(source=source("wbc_masks")))["test"]
    batch = images.batch(range(len(images)))
    boxes = torch.zeros_like(batch.masks)
    for region, (box,) in zip(boxes, batch.boxes, strict=True):
        x0, y0, x1, y1 = box.round().int().tolist()
        region[:, max(y0 - 1, 0) : y1 + 1, max(x0 - 1, 0) : x1 + 1] = True
    assert batch.masks.flatten(1).any(1).all() and not (batch.masks & ~boxes).any()


def test_several_boxes_an_image():
    images = load(Data(source=source("bccd_wbc"), box="rbc_bboxes", size=100))["test"]
    batch = images.batch(range(len(images)))
    assert np.mean([len(boxes) for boxes in batch.boxes]) > 3


def test_cifar100_as_a_stream():
    stream, sets = load_stream(Data(source=source("cifar100"), streaming=True, val=0.02, label="label"))
    assert len(stream) == 49_000 and len(sets["val"]) == 1000 and len(sets["test"]) == 10_000
    batch = next(batches(stream, 128, shuffle=(0, 0)))
    assert batch.images.shape == (128, 3, 32, 32) and len(batch.labels.unique()) > 50
