"""Networks by name: plain modules, normalized images in, logits out."""

from sightline.inference import imagenet_classes, preprocess_of
from sightline.models.create import MODELS, create_model, input_of, named_model

__all__ = ["MODELS", "create_model", "imagenet_classes", "input_of", "named_model", "preprocess_of"]
