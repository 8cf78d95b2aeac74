"""Networks by name: plain modules, normalized images in, logits out."""

from sightline.models.create import MODELS, create_model, input_of, named_model

__all__ = ["MODELS", "create_model", "input_of", "named_model"]
