"""Calls any model, reads its output, and leaves it unchanged."""

from sightline.inference.copies import copy_of
from sightline.inference.features import calls_of, features_of, head_name
from sightline.inference.memory import Memory, allowance, fitting_size, held_by, in_batches
from sightline.inference.outputs import (
    ForwardCall,
    Output,
    answers,
    check_classes,
    check_images,
    either,
    forward,
    forward_call,
    logits_of,
    one_target_each,
    probabilities_of,
    resolve_targets,
    run,
    wide,
)
from sightline.inference.preserve import (
    exact,
    is_unchanged,
    modules_of,
    preserving,
    remember,
    untouched,
    unwrapped,
    values_of,
)
from sightline.inference.probabilities import version_of

__all__ = [
    "ForwardCall",
    "Memory",
    "Output",
    "allowance",
    "answers",
    "calls_of",
    "check_classes",
    "check_images",
    "copy_of",
    "either",
    "exact",
    "features_of",
    "fitting_size",
    "forward",
    "forward_call",
    "head_name",
    "held_by",
    "in_batches",
    "is_unchanged",
    "logits_of",
    "modules_of",
    "one_target_each",
    "preserving",
    "probabilities_of",
    "remember",
    "resolve_targets",
    "run",
    "untouched",
    "unwrapped",
    "values_of",
    "version_of",
    "wide",
]
