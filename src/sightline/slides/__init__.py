"""Tissue slides with one label each: features of tiles, bags of them that learn, and where they look."""

from sightline.slides.bags import Bag, TileReport, read_bag, write_bags
from sightline.slides.pooling import POOLINGS, BagClassifier

__all__ = ["POOLINGS", "Bag", "BagClassifier", "TileReport", "read_bag", "write_bags"]
