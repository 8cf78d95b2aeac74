"""Fine-tuning: which modules are frozen in which epoch, and which parameters learn more slowly."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from timm.optim import param_groups_layer_decay  # pyright: ignore[reportPrivateImportUsage]
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm  # pyright: ignore[reportPrivateUsage]

from sightline.attention.insertion import inserted, layers_named
from sightline.inference import calls_of, untouched
from sightline.models.neck import BNNeck
from sightline.models.transformed import NAME as TRANSFORMER
from sightline.models.weights import read_weights
from sightline.recipe import Optim


class Freezing:
    """Freezes modules of a network epoch by epoch: parameters without gradient, BatchNorm with fixed statistics.

    In the first `optim.freeze` epochs only the head and inserted attention are trained; modules that `optim.freeze`
    names are frozen throughout, without the attention inserted in them unless it is named itself. The head is the last
    linear layer or convolution that the network calls.

    Raises:
        ValueError: a name matches no module, or nothing would be trained.

    >>> network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
    >>> freezing = Freezing(network, Optim(freeze=1), (2, 2))
    >>> freezing.enter(0)
    >>> [p.requires_grad for p in network.parameters()], network[1].training
    ([False, False, False, False, True, True], False)
    >>> freezing.enter(1)
    >>> all(p.requires_grad for p in network.parameters()), network[1].training
    (True, True)
    """

    def __init__(self, network: nn.Module, optim: Optim, size: tuple[int, int]) -> None:
        self._network = network
        self.epochs = optim.freeze if isinstance(optim.freeze, int) else 0
        names = layers_named(network, optim.freeze) if isinstance(optim.freeze, tuple) else []
        self._keeps_statistics = bool(optim.fixed_statistics)
        factors = (optim.backbone_lr or 1, optim.layer_decay or 1)
        is_needed = optim.freeze or optim.fixed_statistics or factors != (1, 1)
        head = last_layer(network, size) if is_needed else None
        necks = [part for part in network.modules() if isinstance(part, BNNeck)]
        front = getattr(network, TRANSFORMER, None)
        new = [part for one in (head, front, *inserted(network), *necks) if one is not None for part in one.modules()]
        self._new = dict.fromkeys(new)
        self._backbone = [part for part in network.modules() if part not in self._new] if is_needed else []
        blocks = {part for block in inserted(network) for part in block.modules()}
        named = map(network.get_submodule, names)
        parts = (part for one in named for part in one.modules() if one in blocks or part not in blocks)
        self._throughout = [*dict.fromkeys(parts)]
        self._fixed = {
            (part, name)
            for part in network.modules()
            for name, p in part.named_parameters(recurse=False)
            if not p.requires_grad
        }
        self._set(self._throughout, frozen=True)
        if not any(p.requires_grad for p in network.parameters()) or (self.epochs and head is None):
            raise ValueError(f"optim.freeze: expected parameters left to train, got none with {optim.freeze!r}")

    def enter(self, epoch: int) -> None:
        """Freeze what is frozen in this epoch, of a network in training mode."""
        self._set(self._backbone, frozen=epoch < self.epochs)
        self._set(self._throughout, frozen=True)

    def scales(self, optim: Optim) -> dict[str, float]:
        """Factor on the learning rate by the name of a parameter, where it is not 1.

        Source: Bao et al., "BEiT", ICLR 2022, appendix (layer-wise decay, by timm's groups of layers).

        Raises:
            ValueError: layer-wise decay for a network whose layers timm does not know.
        """
        network, factor = self._network, 1.0 if optim.backbone_lr is None else optim.backbone_lr
        by_layer: Mapping[nn.Parameter, float] = {}
        if optim.layer_decay is not None and optim.layer_decay < 1:
            if not hasattr(network, "group_matcher"):  # of timm
                raise ValueError(
                    f"optim.layer_decay: expected a timm network, got {type(network).__name__}; set it to 1"
                )
            groups: list[dict[str, Any]] = param_groups_layer_decay(network, layer_decay=optim.layer_decay)
            by_layer = {p: group["lr_scale"] for group in groups for p in group["params"]}
        backbone = dict.fromkeys(p for part in self._backbone for p in part.parameters(recurse=False))
        scales = {name: factor * by_layer.get(p, 1.0) for name, p in network.named_parameters() if p in backbone}
        return {name: scale for name, scale in scales.items() if scale != 1}

    def sentence(self) -> str:
        """Number of parameters, and of those that are trained."""
        parameters = [*self._network.named_parameters()]
        total = sum(p.numel() for _, p in parameters)
        trained = sum(p.numel() for _, p in parameters if p.requires_grad)
        text = f"{total:,} parameters, {trained:,} of them trained"
        if self.epochs:
            first = sum(p.numel() for p in {p: None for part in self._new for p in part.parameters(recurse=False)})
            text += f", in the first {f'{self.epochs} epochs' if self.epochs > 1 else 'epoch'} {first:,}"
        return text

    def _set(self, parts: list[nn.Module], frozen: bool) -> None:
        for part in parts:
            for name, parameter in part.named_parameters(recurse=False):
                parameter.requires_grad_(not frozen and (part, name) not in self._fixed)
            if isinstance(part, BatchNorm):
                part.train(not frozen and not self._keeps_statistics)


def zero_fresh_head(network: nn.Module, weights: str, size: tuple[int, int]) -> None:
    """Set the head to zero unless it is that of the weights (see `recipe.Model`): random logits would spoil features.

    timm initializes heads so that logits of few classes are large.
    """
    head = last_layer(network, size)
    if head is None:
        return
    if weights == "pretrained":
        is_loaded = getattr(network, "pretrained_cfg", {}).get("num_classes") == len(head.weight)
    else:
        state = read_weights(Path(weights)).state
        is_loaded = any(torch.equal(head.weight, one) for one in state.values() if one.shape == head.weight.shape)
    if not is_loaded:
        for parameter in head.parameters(recurse=False):
            nn.init.zeros_(parameter)


def last_layer(network: nn.Module, size: tuple[int, int]) -> nn.Linear | nn.Conv2d | None:
    """The last linear layer or convolution that a network calls."""
    with untouched(network) as net, torch.no_grad():
        images = torch.zeros(1, 3, *size, device=next(net.parameters()).device)
        calls, _ = calls_of(net, images, nn.Linear, nn.Conv2d)
    return cast(nn.Linear | nn.Conv2d, calls[-1].layer) if calls else None
