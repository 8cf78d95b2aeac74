"""Images with planted evidence, and models that by construction use exactly this evidence."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

COLORS = torch.tensor([(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1)], dtype=torch.float32)
"""Red, green, blue, yellow, magenta, cyan: the colors that the models detect."""
_WEIGHT = torch.where(COLORS == 1, 4 / COLORS.sum(1, keepdim=True), -1.5)


class PatchColorModel(nn.Module):
    """Each logit is the percentage of the image that has the class's color: exactly these pixels are the evidence.

    A pixel x counts max(weight x + bias, 0) for a class. The default detects the six `COLORS`: each counts 1 for its
    own class and 0 for the others; white and values below 0.75 in every channel count 0. A 1 x 1 convolution, ReLU,
    global average pooling, one linear layer: CAM is exact.

    >>> PatchColorModel()(COLORS[1].reshape(1, 3, 1, 1)).tolist()
    [[0.0, 100.0, 0.0, 0.0, 0.0, 0.0]]
    """

    def __init__(self, weight: Float[Tensor, "n c"] = _WEIGHT, bias: Float[Tensor, " n"] | float = -3.0) -> None:
        super().__init__()
        n, c = weight.shape
        counted = nn.Conv2d(c, n, 1)
        counted.weight = nn.Parameter(weight[:, :, None, None].clone())
        counted.bias = nn.Parameter(bias + torch.zeros(n))
        self.features = nn.Sequential(counted, nn.ReLU())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head: nn.Module = _linear(100 * torch.eye(n))

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n"]:
        """Percentage of the image."""
        return self.head(self.pool(self.features(images)).flatten(1))


def _linear(weight: Float[Tensor, "n c"]) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight)
    return layer


def _of_two(pairs: Sequence[tuple[int, ...]], sign: int) -> nn.Sequential:
    """The larger (1) or smaller (-1) of two non-negative amounts; where they are equal, each counts half.

    It is (x + y + sign |x - y|) / 2.
    """
    x, y = (100 * torch.eye(len(COLORS))[list(which)] for which in zip(*pairs, strict=True))
    half = torch.eye(len(pairs)) / 2
    first, second = torch.cat([x + y, x - y, y - x]), torch.cat([half, sign * half, sign * half], 1)
    return nn.Sequential(_linear(first), nn.ReLU(), _linear(second))


class TwoPartsModel(PatchColorModel):
    """A conjunction: the logit of a class is the smaller amount, in per cent of the image, of its two colors.

    The 9 classes are red, green or blue with yellow, magenta or cyan. Without either part the logit is 0.

    >>> TwoPartsModel()(torch.stack([COLORS[0], COLORS[4]], 1).reshape(1, 3, 1, 2))[0, :3].tolist()
    [0.0, 50.0, 0.0]
    """

    def __init__(self) -> None:
        super().__init__()
        self.head = _of_two(_EVIDENCE["pair"], -1)


class EitherModel(PatchColorModel):
    """A disjunction: the logit of a class is the larger amount, in per cent of the image, of its two colors.

    The 3 classes are red or yellow, green or magenta, blue or cyan. Each part alone is enough: if both amounts are
    equal, removing one changes nothing.

    >>> EitherModel()(torch.stack([COLORS[0], COLORS[3]], 1).reshape(1, 3, 1, 2)).tolist()
    [[50.0, 0.0, 0.0]]
    """

    def __init__(self) -> None:
        super().__init__()
        self.head = _of_two(_EVIDENCE["twice"], 1)


_EVIDENCE: dict[str, tuple[tuple[int, ...], ...]] = {
    "clutter": tuple((k,) for k in range(6)),
    "shortcut": tuple((k,) for k in (3, 4, 5)),
    "pair": tuple((a, b) for a in (0, 1, 2) for b in (3, 4, 5)),
    "twice": tuple((k, 3 + k) for k in (0, 1, 2)),
}
PLANTED: dict[str, Callable[[], nn.Module]] = {
    "clutter": PatchColorModel,
    "shortcut": partial(PatchColorModel, _WEIGHT[3:]),
    "pair": TwoPartsModel,
    "twice": EitherModel,
}
"""The model for each kind of `planted` images: it classifies all of them correctly."""


def planted(
    kind: str, n: int, seed: int = 0
) -> tuple[Float[Tensor, "n 3 24 24"], Int64[Tensor, " n"], Bool[Tensor, "n 1 24 24"]]:
    """Images in [0, 1], classes and masks of the evidence of the model `PLANTED[kind]`.

    Patches of 6 x 6 pixels lie on dark noise (below 0.4) without overlap: the evidence, and three distractors.

    - `clutter`: a patch of the class's color, one of six; three are white.
    - `shortcut`: a patch of the class's color, yellow, magenta or cyan; one of the others is red, green or blue, which
      the model ignores: an object next to what the model uses.
    - `pair`: the two parts of the class of `TwoPartsModel`; three are white.
    - `twice`: both colors of the class of `EitherModel`; three are white.

    Pixels outside the mask may become white or anything below 0.75 in every channel: no logit changes. With black in
    place of the mask all logits are 0, those of an empty image.
    The class is the index modulo the number of classes; the first n images do not depend on n.

    Raises:
        ValueError: there is no such kind.

    >>> images, targets, masks = planted("pair", 9)
    >>> bool((TwoPartsModel()(images).argmax(1) == targets).all()), int(masks[0].sum())
    (True, 72)
    """
    if kind not in PLANTED:
        raise ValueError(f"expected a kind of {', '.join(PLANTED)}, got {kind!r}")
    evidence = _EVIDENCE[kind]
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(n) % len(evidence)
    images, masks = torch.zeros(n, 3, 24, 24), torch.zeros(n, 1, 24, 24, dtype=torch.bool)
    for image, mask, target in zip(images, masks, targets.tolist(), strict=True):
        image.copy_(0.4 * torch.rand(image.shape, generator=generator))
        others = torch.ones(3, 3)
        if kind == "shortcut":
            others[0] = COLORS[int(torch.randint(3, (), generator=generator))]
        patches = torch.cat([COLORS[list(evidence[target])], others])
        cells = torch.randperm(9, generator=generator)[: len(patches)]
        corners = 8 * torch.stack([cells // 3, cells % 3], 1)
        corners += torch.randint(3, corners.shape, generator=generator)
        for k, (top, left) in enumerate(corners.tolist()):
            where = slice(top, top + 6), slice(left, left + 6)
            image[:, *where] = patches[k][:, None, None]
            mask[:, *where] = k < len(evidence[target])
    return images, targets, masks
