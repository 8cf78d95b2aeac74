"""The learning rate as a pure function of the step, so that a resumed training has nothing to restore."""

import math

from sightline.recipe import Optim, resolved


def learning_rate(optim: Optim, step: int, steps_per_epoch: int) -> float:
    """Learning rate of step 0, 1, ... of the whole training.

    `one_cycle` rises for 30 % of the steps from lr / 25 to lr and falls to lr / 250,000, both along half a cosine. The
    others rise in a straight line over `warmup` epochs, then `cosine` falls to 0, `step` is multiplied by `step_factor`
    after every `step_epochs` epochs, `constant` stays.

    Source: Smith and Topin, "Super-Convergence", 2017 (one_cycle); Loshchilov and Hutter, "SGDR", ICLR 2017, eq. 5.
    Differs: one_cycle leaves the momentum alone.

    >>> optim = Optim(epochs=2, lr=1.0, schedule="cosine", warmup=0.5)
    >>> [round(learning_rate(optim, step, 4), 3) for step in range(8)]
    [0.5, 1.0, 1.0, 0.933, 0.75, 0.5, 0.25, 0.067]
    """
    total, highest = resolved(optim.epochs) * steps_per_epoch, resolved(optim.lr)
    if optim.schedule == "one_cycle":
        peak = 0.3 * total - 1
        if step <= peak:
            return _half_cosine(highest / 25, highest, step / peak)
        return _half_cosine(highest, highest / 25e4, (step - peak) / (total - 1 - peak))
    warmup = round(optim.warmup * steps_per_epoch)
    if step < warmup:
        return highest * (step + 1) / warmup
    if optim.schedule == "cosine":
        return _half_cosine(highest, 0.0, (step - warmup) / (total - warmup))
    if optim.schedule == "step":
        return highest * optim.step_factor ** (step // (optim.step_epochs * steps_per_epoch))
    return highest


def _half_cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2
