"""Networks by name: plain modules, normalized images in, logits out."""

from sightline.models.create import MODELS, create_model, imagenet_classes, input_of, named_model, preprocess_of

__all__ = ["MODELS", "create_model", "imagenet_classes", "input_of", "named_model", "preprocess_of"]
