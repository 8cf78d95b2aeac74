"""FinerCAM: what speaks for a class and not for the classes most like it."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from torch import Tensor, nn

from sightline.compat.pytorch_grad_cam.base_cam import BaseCAM, Reshape
from sightline.compat.pytorch_grad_cam.methods import GradCAM
from sightline.compat.pytorch_grad_cam.of_each import ModelTarget
from sightline.compat.pytorch_grad_cam.utils.model_targets import FinerWeightedTarget


class FinerCAM:
    """`base_method` of the class's lead over others, `FinerWeightedTarget`."""

    def __init__(
        self,
        model: nn.Module,
        target_layers: Sequence[nn.Module] | None,
        reshape_transform: Reshape | None = None,
        base_method: type[BaseCAM] = GradCAM,
    ) -> None:
        """As BaseCAM."""
        self.base_cam = base_method(model, target_layers, reshape_transform)

    def __enter__(self) -> "FinerCAM":
        return self

    def __exit__(self, *_: object) -> Literal[False]:
        return False

    def __call__(self, *args: Any, **kwargs: Any) -> Float[np.ndarray, "b *grid"]:
        """As `forward`."""
        return self.forward(*args, **kwargs)

    def forward(
        self,
        input_tensor: Float[Tensor, "b c *grid"],
        targets: Sequence[ModelTarget] | None = None,
        eigen_smooth: bool = False,
        alpha: int | float = 1,
        comparison_categories: Sequence[int] | None = None,
        target_idx: int | None = None,
        aug_smooth: bool = False,
    ) -> Float[np.ndarray, "b *grid"]:
        """Maps from 0 to 1, one per image.

        Args:
            input_tensor: images as the model wants them.
            targets: one for each image; None: as the other arguments say.
            eigen_smooth: as in BaseCAM.
            alpha: how much of the other classes is subtracted.
            comparison_categories: places, from 1, among the classes sorted by how near their output is to the target's.
                None: 1, 2 and 3.
            target_idx: the class. None: the highest.
            aug_smooth: as in BaseCAM; pytorch-grad-cam does not take it.

        Raises:
            ValueError: no such class, or no other to compare with.
        """

        def choose(outputs: Any) -> list[ModelTarget]:
            classes = outputs.shape[-1]
            places = [p for p in comparison_categories or (1, 2, 3) if 0 < p < classes]
            if outputs.ndim != 2 or not places or not 0 <= (target_idx or 0) < classes:
                raise ValueError(
                    f"expected a model with several classes, target_idx and comparison_categories among them, got "
                    f"{tuple(outputs.shape)} from the model, {target_idx} and {comparison_categories}; change them"
                )
            wanted = outputs.amax(1) if target_idx is None else outputs[:, target_idx]
            nearest = (outputs - wanted[:, None]).abs().argsort(dim=1, stable=True).tolist()
            return [FinerWeightedTarget(row[0], [row[place] for place in places], alpha) for row in nearest]

        make = partial(self.base_cam.forward, targets=targets, eigen_smooth=eigen_smooth, choose=choose)
        return self.base_cam.mean_of_versions(input_tensor, make) if aug_smooth else make(input_tensor)
