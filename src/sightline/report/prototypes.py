"""The figure of a ProtoPNet: this looks like that."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sightline import maps
from sightline.inference import untouched
from sightline.models.protopnet import ProtoPNet
from sightline.training.prototypes import Pushed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def this_looks_like_that(
    model: ProtoPNet,
    images: Float[Tensor, "b 3 H W"],
    source: Float[Tensor, "n 3 H W"],
    pushed: Pushed,
    *,
    top: int = 3,
) -> "Figure":
    """One row per image: the image, then the source images of its `top` most similar prototypes, the best one first.

    Frames of the same color belong together: a cell of the feature map, and the one it is similar to. The receptive
    field of a cell is larger. Each image is stretched to its own range.

    Args:
        model: network whose prototypes have been pushed.
        images: images to explain.
        source: the images that `push` was given, in that order.
        pushed: what `push` returned.
        top: number of prototypes.

    Raises:
        ValueError: `top` below 1 or above the number of prototypes.

    Source: Chen et al. 2019, figures 1 and 3.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    if not 1 <= top <= model.of_class.shape[1]:
        raise ValueError(f"expected top from 1 to {model.of_class.shape[1]}, the number of prototypes; got {top}")
    with untouched(model), torch.no_grad():
        similar = model.prototypes.gate(model.distances(images))
    height, width = similar.shape[2:]
    scores, prototypes = similar.amax((2, 3)).topk(top)
    figure = Figure(figsize=(2 * (top + 1), 2.2 * len(images)), layout="constrained")
    axes = figure.subplots(len(images), top + 1, squeeze=False)

    def frame(axis: "Axes", image: Tensor, row: int, column: int, color: str) -> None:
        cell_height, cell_width = image.shape[1] / height, image.shape[2] / width
        corner = (column * cell_width - 0.5, row * cell_height - 0.5)
        axis.add_patch(Rectangle(corner, cell_width, cell_height, fill=False, edgecolor=color, linewidth=2))

    for number, image in enumerate(images):
        axes[number, 0].imshow(_shown(image))
        axes[number, 0].set_title("this looks like" if number == 0 else "")
        for place, j in enumerate(prototypes[number].tolist()):
            axis, color = axes[number, place + 1], f"C{place}"
            row, column = divmod(int(similar[number, j].argmax()), width)
            frame(axes[number, 0], image, row, column, color)
            origin = source[int(pushed.image[j])]
            axis.imshow(_shown(origin))
            frame(axis, origin, int(pushed.row[j]), int(pushed.column[j]), color)
            axis.set_title(f"class {int(model.of_class[:, j].nonzero())}: {float(scores[number, place]):.1f}")
    for axis in axes.flat:
        axis.set_axis_off()
    return figure


def _shown(image: Float[Tensor, "3 H W"]) -> Float[np.ndarray, "H W 3"]:
    return maps.normalize(image.flatten(1)).unflatten(1, image.shape[1:]).movedim(0, -1).float().cpu().numpy()
