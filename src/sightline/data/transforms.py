"""Random changes of training images by torchvision's v2 transforms; the random numbers are handed in."""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Shaped, UInt8
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from sightline.recipe import Augment


class _Samples:
    """Images with their masks and boxes, changed together in place."""

    def __init__(
        self,
        images: UInt8[Tensor, "b 3 h w"],
        masks: Bool[Tensor, "b 1 h w"] | None,
        boxes: list[Float32[Tensor, "_ 4"]] | None,
    ):
        self.images, self.masks, self.boxes = images, masks, boxes

    def change(self, rows: Shaped[np.ndarray, " k"], transform: Callable[[Tensor], Tensor]) -> None:
        """Apply one v2 function, which keeps the size, to the images of these rows at once."""
        if len(rows) == 0:
            return
        where = torch.from_numpy(rows)
        self.images[where] = transform(tv_tensors.Image(self.images[where]))
        if self.masks is not None:
            self.masks[where] = transform(tv_tensors.Mask(self.masks[where]))
        if self.boxes is not None:
            size = (int(self.images.shape[-2]), int(self.images.shape[-1]))
            counts = [len(self.boxes[i]) for i in rows]
            together = torch.cat([self.boxes[i] for i in rows])
            moved = transform(tv_tensors.BoundingBoxes(together, format="XYXY", canvas_size=size))  # pyright: ignore[reportCallIssue]
            for i, boxes in zip(rows, moved.as_subclass(Tensor).split(counts), strict=True):
                self.boxes[i] = boxes

    def change_by(self, values: Shaped[np.ndarray, " b"], transform: Callable[[Tensor, int], Tensor]) -> None:
        """Apply `transform(x, value)`, one call for all images that share a value."""
        for value in np.unique(values):
            self.change(np.flatnonzero(values == value), lambda x, value=value: transform(x, int(value)))


def augment(
    images: UInt8[Tensor, "b 3 h w"],
    masks: Bool[Tensor, "b 1 h w"] | None,
    boxes: list[Float32[Tensor, "_ 4"]] | None,
    what: Augment,
    draws: Float[np.ndarray, "b 12"],
) -> tuple[UInt8[Tensor, "b 3 h w"], Bool[Tensor, "b 1 h w"] | None, list[Float32[Tensor, "_ 4"]] | None]:
    """Change each image by its own row of `draws`, uniform numbers in [0, 1); masks and boxes follow.

    The images and masks are changed in place. What lies outside is black. Boxes that leave the image are dropped.
    """
    samples = _Samples(images, masks, None if boxes is None else list(boxes))
    height, width = images.shape[-2:]
    everyone = np.arange(len(images))
    if what.scale < 1:
        area = what.scale + (1 - what.scale) * draws[:, 0]
        ratio = np.exp((2 * draws[:, 1] - 1) * np.log(4 / 3))
        h = np.clip(np.rint(height * np.sqrt(area / ratio)), 1, height).astype(int)
        w = np.clip(np.rint(width * np.sqrt(area * ratio)), 1, width).astype(int)
        top = ((height - h + 1) * draws[:, 2]).astype(int)
        left = ((width - w + 1) * draws[:, 3]).astype(int)
        for i in everyone:
            place = (int(top[i]), int(left[i]), int(h[i]), int(w[i]))
            samples.change(everyone[i : i + 1], lambda x, place=place: F.resized_crop(x, *place, [height, width]))
    if what.crop:
        down, right = (np.floor(draws[:, k] * (2 * what.crop + 1)).astype(int) - what.crop for k in (4, 5))
        samples.change_by(down, lambda x, top: F.crop(x, top, 0, height, width))
        samples.change_by(right, lambda x, left: F.crop(x, 0, left, height, width))
    if what.flip:
        samples.change(np.flatnonzero(draws[:, 6] < 0.5), F.horizontal_flip)
    if what.rotate:
        quarter = 1 if height == width else 2
        turns = (draws[:, 7] * (4 // quarter)).astype(int) * quarter
        samples.change_by(turns, lambda x, k: F.rotate(x, 90.0 * k) if k else x)
        samples.change(np.flatnonzero(draws[:, 8] < 0.5), F.vertical_flip)
    if what.color:
        factors = 1 + what.color * (2 * draws[:, 9:12] - 1)
        for i in everyone:
            brightness, contrast, saturation = (float(f) for f in factors[i])
            image = F.adjust_brightness(images[i], brightness)
            images[i] = F.adjust_saturation(F.adjust_contrast(image, contrast), saturation)
    if samples.boxes is not None:
        samples.boxes = [b[(b[:, 2] > b[:, 0]) & (b[:, 3] > b[:, 1])] for b in samples.boxes]
    return samples.images, samples.masks, samples.boxes
