"""The losses that training minimizes."""

from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from sightline.attention import WithLoss
from sightline.inference import logits_of
from sightline.recipe import Optim

Divergence = Literal["teacher_student", "student_teacher"]
Mixed = tuple[Int[Tensor, " b"], float]
"""Labels of the images blended in, and the weight of the images themselves."""


def class_weights(labels: Int[np.ndarray, " n"], classes: int) -> Float[Tensor, " classes"]:
    """Inverse frequency of each class for the cross entropy, scaled so that the mean over the images is 1.

    A class without images gets the weight of a class with one image.

    >>> class_weights(np.array([0, 0, 0, 1]), 2)
    tensor([0.6667, 2.0000])
    """
    counts = np.bincount(labels, minlength=classes)
    return torch.from_numpy(len(labels) / (classes * counts.clip(min=1))).float()


def distillation(
    student: Float[Tensor, "b n"],
    teacher: Float[Tensor, "b n"],
    temperature: float,
    divergence: Divergence = "teacher_student",
) -> Float[Tensor, ""]:
    """Distance of the student's predictions from the teacher's: T^2 KL(teacher || student) of the logits / T.

    "student_teacher": T^2 KL(student || teacher). It punishes probability where the teacher has little, the usual form
    a lack of it where the teacher has much.

    Source: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, section 2; the other form is printed,
    without temperature, on the slides of BR-NPA, whose code has the usual one.

    >>> student, teacher = torch.zeros(1, 2), torch.tensor([[0.0, np.log(3)]])
    >>> round(float(distillation(student, teacher, 1.0)), 4)
    0.1308
    >>> round(float(distillation(student, teacher, 1.0, "student_teacher")), 4)
    0.1438
    """
    log_student, log_teacher = ((logits / temperature).log_softmax(1) for logits in (student, teacher))
    of, to = (log_student, log_teacher) if divergence == "teacher_student" else (log_teacher, log_student)
    return temperature**2 * F.kl_div(of, to, reduction="batchmean", log_target=True)


class Loss(nn.Module):
    """Cross entropy with the labels, the `own_loss` of each block, and distillation from a teacher if there is one."""

    def __init__(
        self,
        optim: Optim,
        weights: Float[Tensor, " n"] | None = None,
        teacher: nn.Module | None = None,
        network: nn.Module | None = None,
    ):
        super().__init__()
        self.optim = optim
        modules = () if network is None else network.modules()
        self.others = tuple(m for m in modules if isinstance(m, WithLoss))  # a tuple: not part of the loss
        self.weights = weights if weights is None else nn.Buffer(weights)
        self.teacher = teacher if teacher is None else teacher.eval().requires_grad_(False)

    def forward(
        self,
        images: Float[Tensor, "b c h w"],
        logits: Float[Tensor, "b n"],
        labels: Int[Tensor, " b"],
        mixed: Mixed | None = None,
    ) -> Float[Tensor, ""]:
        """Mean loss of the student's logits; the teacher sees the same images.

        With `mixed`, each image is a blend: its label has the weight given, the other label the rest.

        Source: Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018, equation 2 (mixed).
        """
        loss = self._cross_entropy(logits, labels)
        if mixed is not None:
            others, weight = mixed
            loss = weight * loss + (1 - weight) * self._cross_entropy(logits, others)
        for block in self.others:
            loss = loss + block.own_loss(logits, labels)
        if self.teacher is None:
            return loss
        with torch.no_grad():
            teacher_logits = logits_of(self.teacher(images)).float()
        return self.optim.alpha * loss + (1 - self.optim.alpha) * distillation(
            logits, teacher_logits, self.optim.temperature, self.optim.divergence
        )

    def _cross_entropy(self, logits: Float[Tensor, "b n"], labels: Int[Tensor, " b"]) -> Float[Tensor, ""]:
        return F.cross_entropy(logits, labels, self.weights, label_smoothing=self.optim.label_smoothing)
