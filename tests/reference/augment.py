"""Random changes of one training image at a time, by torchvision; imports nothing of the package."""

import math

import torch
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F


def augment(image, mask, boxes, what, u, fill):
    """Image (3, h, w), mask (1, h, w) and boxes (k, 4) changed as the 14 numbers `u` say."""
    height, width = image.shape[-2:]
    things = [
        tv_tensors.Image(image),
        tv_tensors.Mask(mask),
        tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width)),
    ]

    def each(change, *options):
        things[:] = [change(thing, *options) for thing in things]

    if what.scale < 1:
        area = what.scale + (1 - what.scale) * u[0]
        ratio = math.exp((2 * u[1] - 1) * math.log(4 / 3))
        h = min(max(round(height * math.sqrt(area / ratio)), 1), height)
        w = min(max(round(width * math.sqrt(area * ratio)), 1), width)
        each(F.resized_crop, int((height - h + 1) * u[2]), int((width - w + 1) * u[3]), h, w, [height, width])
    if what.crop:
        down, right = (int(u[k] * (2 * what.crop + 1)) - what.crop for k in (4, 5))
        each(F.crop, down, right, height, width)
    if what.flip and u[6] < 0.5:
        each(F.horizontal_flip)
    if what.rotate:
        angle = 90 * int(4 * u[7]) if height == width else 180 * int(2 * u[7])
        if angle:
            each(F.rotate, angle)
        if u[8] < 0.5:
            each(F.vertical_flip)
    image, mask, boxes = (thing.as_subclass(torch.Tensor).clone() for thing in things)
    if what.color:
        image = F.adjust_brightness(image, 1 + what.color * (2 * u[9] - 1))
        image = F.adjust_contrast(image, 1 + what.color * (2 * u[10] - 1))
        image = F.adjust_saturation(image, 1 + what.color * (2 * u[11] - 1))
    if what.cutout:
        y, x = int(u[12] * height) - what.cutout // 2, int(u[13] * width) - what.cutout // 2
        for channel in range(3):
            image[channel, max(y, 0) : max(y + what.cutout, 0), max(x, 0) : max(x + what.cutout, 0)] = fill[channel]
    # torchvision turns boxes by sines that are not quite 0, and so leaves a hair of empty ones
    return image, mask, boxes[(boxes[:, 2:] > boxes[:, :2] + 1e-4).all(1)]
