"""What is explained: from the model's output for one image, or for a batch, to its score."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn import functional as F


class ClassifierOutputTarget:
    """The output of a class.

    >>> ClassifierOutputTarget(1)(torch.tensor([2.0, 3.0]))
    tensor(3.)
    """

    def __init__(self, category: int) -> None:
        self.category = category

    def __call__(self, model_output: Float[Tensor, "*b n"]) -> Float[Tensor, "*b"]:
        """The score."""
        return model_output[..., self.category]


class ClassifierOutputSoftmaxTarget:
    """The probability of a class, by softmax."""

    def __init__(self, category: int) -> None:
        self.category = category

    def __call__(self, model_output: Float[Tensor, "*b n"]) -> Float[Tensor, "*b"]:
        """The score."""
        return model_output.softmax(-1)[..., self.category]


class ClassifierOutputReST:
    """The output of a class plus the logarithm of its probability.

    Source: Cai 2025 (2501.06261): ReST.
    """

    def __init__(self, category: int) -> None:
        self.category = category

    def __call__(self, model_output: Float[Tensor, "*b n"]) -> Float[Tensor, "*b"]:
        """The score."""
        return (model_output + model_output.log_softmax(-1))[..., self.category]


class BinaryClassifierOutputTarget:
    """A model's only output z for class 1, and -z for class 0."""

    def __init__(self, category: int) -> None:
        self.category = category

    def __call__(self, model_output: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        """The score."""
        return model_output if self.category == 1 else -model_output


class SoftmaxOutputTarget:
    """All probabilities, by softmax."""

    def __call__(self, model_output: Float[Tensor, "*b n"]) -> Float[Tensor, "*b n"]:
        """The probabilities."""
        return model_output.softmax(-1)


class RawScoresOutputTarget:
    """The output as it is."""

    def __call__(self, model_output: Tensor) -> Tensor:
        """The output."""
        return model_output


class SemanticSegmentationTarget:
    """The outputs of a class, (classes, h, w), summed over a mask (h, w)."""

    def __init__(self, category: int, mask: Shaped[np.ndarray, "h w"]) -> None:
        self.category = category
        self.mask = torch.from_numpy(mask)

    def __call__(self, model_output: Float[Tensor, "n h w"]) -> Float[Tensor, ""]:
        """The score."""
        return (model_output[self.category] * self.mask.to(model_output.device)).sum()


class FasterRCNNBoxScoreTarget:
    """How well one image's detections match given boxes: the sum over the boxes of IoU + score.

    A box counts if the detection that overlaps it most does so by more than `iou_threshold` and has its label.
    """

    def __init__(
        self,
        labels: Sequence[int] | Shaped[np.ndarray, " n"],
        bounding_boxes: Sequence[Float[np.ndarray, "4"]] | Float[np.ndarray, "n 4"],
        iou_threshold: int | float = 0.5,
    ) -> None:
        self.labels = labels
        self.bounding_boxes = bounding_boxes
        self.iou_threshold = iou_threshold

    def __call__(self, model_outputs: Mapping[str, Tensor]) -> Float[Tensor, "1"]:
        """The score."""
        from torchvision.ops import box_iou

        boxes = model_outputs["boxes"]
        total = boxes.new_zeros(1)
        if not len(boxes):
            return total
        for wanted, label in zip(self.bounding_boxes, self.labels, strict=True):
            overlaps = box_iou(torch.as_tensor(wanted).to(boxes)[None], boxes)[0]
            best = int(overlaps.argmax())
            if overlaps[best] > self.iou_threshold and model_outputs["labels"][best] == label:
                total = total + overlaps[best] + model_outputs["scores"][best]
        return total


class FinerWeightedTarget:
    r"""By how much a class leads others, weighted by their probabilities: $\sum_d p_d (y^c - \alpha y^d) / \sum_d p_d$.

    Source: Zhang et al. 2025 (2501.11309); the weights: the authors' code.

    >>> FinerWeightedTarget(0, [1, 2], alpha=1)(torch.tensor([5.0, 2.0, 2.0]))
    tensor(3.)
    """

    def __init__(self, main_category: int, comparison_categories: Sequence[int], alpha: int | float) -> None:
        self.main_category = main_category
        self.comparison_categories = comparison_categories
        self.alpha = alpha

    def __call__(self, model_output: Float[Tensor, "*b n"]) -> Float[Tensor, "*b"]:
        """The score."""
        others = model_output[..., list(self.comparison_categories)]
        leads = model_output[..., [self.main_category]] - self.alpha * others
        return (F.softmax(others, -1) * leads).sum(-1)
