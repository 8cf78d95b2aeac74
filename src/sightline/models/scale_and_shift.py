"""A frozen network whose convolutions learn only a scale per kernel and a shift per filter."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm  # pyright: ignore[reportPrivateUsage]

from sightline.inference import copy_of, untouched


class _Place(NamedTuple):
    """A convolution, and the BatchNorm that takes its shift if it has no bias; dotted names."""

    conv: str
    norm: str | None


class ScaleAndShift(nn.Module):
    """A copy of a network, frozen and in eval mode, with each convolution conv(x; W S1, b + S2).

    The scales S1 of a convolution are (out, in, 1, 1), one for each k x k kernel, and start at 1; the shifts S2 are
    (out,), one for each filter, and start at 0. They are the only parameters with a gradient. A convolution without
    bias hands its shift on to the BatchNorm behind it, whose bias b becomes b + weight x S2 / sqrt(variance + eps).

    Args:
        network: any network with convolutions; it is not changed.
        size: height and width of its images, in pixels.

    Raises:
        ValueError: no convolution, or one with neither bias nor BatchNorm behind it.

    Source: Sun et al., "Meta-Transfer Learning for Few-Shot Learning", CVPR 2019, equation 5.

    Differs: the authors' code shifts only convolutions with a bias, and trains BatchNorm with the statistics of the
    episode.

    >>> network = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
    >>> learning = ScaleAndShift(network, (4, 4))
    >>> {name: tuple(p.shape) for name, p in learning.named_parameters() if p.requires_grad}
    {'scales.0': (4, 3, 1, 1), 'shifts.0': (4,)}
    """

    def __init__(self, network: nn.Module, size: tuple[int, int]) -> None:
        super().__init__()
        self.places = _places(network, size)
        self.network = copy_of(network).eval().requires_grad_(False)
        convs = [self.network.get_submodule(place.conv).get_parameter("weight") for place in self.places]
        self.scales = nn.ParameterList([torch.ones_like(weight[:, :, :1, :1]) for weight in convs])
        self.shifts = nn.ParameterList([torch.zeros_like(weight[:, 0, 0, 0]) for weight in convs])

    def train(self, mode: bool = True) -> "ScaleAndShift":
        """Nothing: the network stays in eval mode."""
        return self

    def values(self) -> dict[str, Tensor]:
        """The parameters of the network that scales and shifts change, by name."""
        values: dict[str, Tensor] = {}
        for (conv, norm), scale, shift in zip(self.places, self.scales, self.shifts, strict=True):
            layer = self.network.get_submodule(conv)
            assert isinstance(layer, nn.Conv2d)
            values[f"{conv}.weight"] = layer.weight * scale
            if layer.bias is not None:
                values[f"{conv}.bias"] = layer.bias + shift
            elif norm is not None:
                behind = self.network.get_submodule(norm)
                assert isinstance(behind, BatchNorm) and behind.running_var is not None
                deviation = torch.sqrt(behind.running_var + behind.eps)
                values[f"{norm}.bias"] = behind.bias + behind.weight * shift / deviation
        return values

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n"]:
        """Logits."""
        return functional_call(self.network, self.values(), (images,))

    def folded(self) -> nn.Module:
        """A plain copy of the network with its scales and shifts worked into weights and biases, in eval mode."""
        plain = copy_of(self.network).requires_grad_(True)
        with torch.no_grad():
            for name, value in self.values().items():
                plain.get_parameter(name).copy_(value)
        return plain


def _places(network: nn.Module, size: tuple[int, int]) -> list[_Place]:
    outputs: list[tuple[nn.Conv2d, Tensor]] = []
    behind: dict[nn.Conv2d, nn.Module] = {}

    def remember(layer: nn.Conv2d, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        outputs.append((layer, output))

    def look(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        behind.update({layer: norm for layer, output in outputs if output is inputs[0]})

    with untouched(network) as net, torch.no_grad():
        names = {part: name for name, part in net.named_modules()}
        convs = [part for part in names if isinstance(part, nn.Conv2d)]
        norms = [part for part in names if isinstance(part, BatchNorm) and part.affine and part.track_running_stats]
        hooks = [layer.register_forward_hook(remember) for layer in convs]
        hooks += [norm.register_forward_pre_hook(look) for norm in norms]
        try:
            net(next(net.parameters()).new_zeros(2, 3, *size))
        finally:
            for hook in hooks:
                hook.remove()
    if not convs:
        raise ValueError(f"expected a network with convolutions to scale, got {type(network).__name__} without")
    for layer in convs:
        if layer.bias is None and layer not in behind:
            raise ValueError(
                f"expected a bias or a BatchNorm behind each convolution to shift, got neither for {names[layer]!r} of "
                f"{type(network).__name__}; give it a bias"
            )
    return [_Place(names[layer], None if layer.bias is not None else names[behind[layer]]) for layer in convs]
