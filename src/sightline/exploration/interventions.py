"""Whether a region decides: covered in some images and pasted into others, beside equally large random regions."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, Shaped, UInt8

from sightline.exploration.regions import elsewhere
from sightline.facts import Interval
from sightline.metrics.inpainting import inpaint
from sightline.metrics.uncertainty import mean_interval, paired_test

Array = np.ndarray
Predict = Callable[[UInt8[Array, "n 3 h w"]], Int64[Array, " n"]]
"""The predicted class of each image."""
CONTROLS = 2
"""Random regions beside each region."""


@dataclass(frozen=True, kw_only=True)
class Effect:
    """What one kind of change does to the predictions, as shares of the images."""

    before: float
    """Share predicted as the suspected class before the change."""
    region: Interval
    """The same after the change of the region."""
    control: Interval
    """The same after the same change with a random region; the mean of several."""
    difference: Interval
    """How much more the region moves the share than a random one does, in the direction that speaks for the
    suspicion."""
    p: float
    """Two-sided sign-flip test of the difference, before any correction."""
    accuracy: tuple[float, float, float]
    """Share of right predictions before, after the change of the region, and of random ones; NaN without labels."""


def windows_of(top_left: Int64[Array, "n 2"], size: tuple[int, int], window: tuple[int, int]) -> Bool[Array, "n h w"]:
    """The pixels of windows.

    >>> windows_of(np.array([[0, 1]]), (2, 3), (1, 2))[0].astype(int).tolist()
    [[0, 1, 1], [0, 0, 0]]
    """
    rows, columns = (np.arange(side) - top_left[:, [axis]] for axis, side in enumerate(size))
    inside = [(0 <= place) & (place < side) for place, side in zip((rows, columns), window, strict=True)]
    return inside[0][:, :, None] & inside[1][:, None, :]


def covered(images: UInt8[Array, "n 3 h w"], region: Bool[Array, "n h w"]) -> UInt8[Array, "n 3 h w"]:
    """Images whose region is painted from its surroundings, see `sightline.metrics.inpainting.inpaint`.

    >>> image = np.array([0, 9, 2], np.uint8).reshape(1, 1, 1, 3).repeat(3, 1)
    >>> covered(image, np.array([[[False, True, False]]]))[0, 0].tolist()
    [[0, 1, 2]]
    """
    painted = inpaint(torch.from_numpy(images).float(), torch.from_numpy(region)[:, None])
    return painted.round().clamp(0, 255).to(torch.uint8).numpy()


def pasted(
    images: UInt8[Array, "n 3 h w"], sources: UInt8[Array, "n 3 h w"], region: Bool[Array, "n h w"]
) -> UInt8[Array, "n 3 h w"]:
    """Images with the region of the sources, at the same place."""
    return np.where(region[:, None], sources, images)


def cover_effect(
    images: UInt8[Array, "n 3 h w"],
    windows: Int64[Array, "n 2"],
    window: tuple[int, int],
    target: int,
    predict: Predict,
    labels: Int64[Array, " n"] | None = None,
    seed: int = 0,
) -> Effect:
    """Cover the window of each image, which is predicted as `target`: how many lose that prediction?

    The difference is the share that keeps the prediction under random windows, less that under its own.

    Args:
        images: images of the suspected class.
        windows: top and left of the suspected region of each.
        window: height and width of the regions.
        target: the suspected class.
        predict: the network.
        labels: true classes, -1 for unknown.
        seed: of the random windows and the bootstrap.
    """
    return _effect(
        images, lambda region: covered(images, region), windows, window, target, predict, labels,
        -1, np.arange(len(images)), seed,
    )  # fmt: skip


def paste_effect(
    images: UInt8[Array, "n 3 h w"],
    sources: UInt8[Array, "m 3 h w"],
    windows: Int64[Array, "m 2"],
    window: tuple[int, int],
    target: int,
    predict: Predict,
    labels: Int64[Array, " n"] | None = None,
    seed: int = 0,
) -> Effect:
    """Paste the windows of sources into images of other classes: how many become `target`?

    Source i mod m goes into image i. A control is another window of the same source, which does not overlap its own and
    is pasted where it was. The difference is the share of `target` after the windows, less that after the controls; its
    interval resamples sources, of which one may go into several images.

    Args:
        images: images of other classes.
        sources: images of the suspected class.
        windows: top and left of the suspected region of each source.
        window: height and width of the regions.
        target: the suspected class.
        predict: the network.
        labels: true classes of `images`, -1 for unknown.
        seed: of the random windows and the bootstrap.
    """
    used = np.arange(len(images)) % len(sources)
    return _effect(
        images, lambda region: pasted(images, sources[used], region), windows[used], window, target, predict, labels,
        1, used, seed,
    )  # fmt: skip


def _effect(
    images: UInt8[Array, "n 3 h w"],
    change: Callable[[Bool[Array, "n h w"]], UInt8[Array, "n 3 h w"]],
    windows: Int64[Array, "n 2"],
    window: tuple[int, int],
    target: int,
    predict: Predict,
    labels: Int64[Array, " n"] | None,
    sign: int,
    groups: Shaped[Array, " n"],
    seed: int,
) -> Effect:
    rng, size = np.random.default_rng(seed), images.shape[2:]

    def changed(top_left: Int64[Array, "n 2"]) -> Int64[Array, " n"]:
        return predict(change(windows_of(top_left, size, window)))

    own = changed(windows)
    others = np.stack([changed(elsewhere(windows, size, window, rng)) for _ in range(CONTROLS)])
    before = predict(images)
    hit: Float[Array, " n"] = (own == target).astype(float)
    control: Float[Array, " n"] = (others == target).mean(0)
    known = np.zeros(len(own), dtype=bool) if labels is None else labels >= 0
    right = [
        float((answers == labels)[..., known].mean()) if known.any() else float("nan")
        for answers in (before, own, others)
    ]
    return Effect(
        before=float((before == target).mean()),
        region=mean_interval(hit, groups, seed),
        control=mean_interval(control, groups, seed),
        difference=mean_interval(sign * (hit - control), groups, seed),
        p=paired_test(sign * (hit - control), groups, seed),
        accuracy=(right[0], right[1], right[2]),
    )
