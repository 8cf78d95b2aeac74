"""A callback of Lightning that draws the maps of the same images while any network trains."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from jaxtyping import Bool, Int64, UInt8
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn

from sightline.facts import did_you_mean, notice
from sightline.training.watch import Look, Watcher

__all__ = ["Watch"]


class Watch(Callback):
    """Draws the maps of the same images every few epochs, and warns once if they leave the object.

    The pictures, images beside their maps, and with masks the mean share of each map in its mask go to every logger
    of the trainer: TensorBoard, Weights & Biases, MLflow, and others with a method `log_image(key, images, step)`. The
    first look is taken before training, and refuses what cannot work. The model, its mode, buffers and gradients and
    all random states stay as they are, so a training gives the same weights, bit for bit, with and without it.

    Args:
        images: as they look, uint8 (n, 3, h, w) or (n, 1, h, w), the same at every look.
        masks: where the object is in each of them.
        labels: the class that is explained in each. None: the predicted one.
        preprocess: what makes the network's input of them. None: division by 255.
        methods: which maps, as in `sightline.explain`.
        layer: where they are read, a dotted name. None: as `sightline.explain` chooses.
        model: the network in the LightningModule, from images to logits: the name of an attribute, or a function of the
            LightningModule. None: the LightningModule itself.
        every: epochs between two looks.
        drawn: the first so many images are in the picture; shares are measured on all.
        accuracy: name of the logged validation metric that rises as the network learns; without it there is no warning.

    Raises:
        TypeError: images that are not uint8 tensors.
        ValueError: volumes, no images, or masks or labels that do not fit them; before training also a method, layer
            or model that does not work, or a strategy that shards weights.

    Attributes:
        shortcut: the warning, once it was given; else empty.

    >>> import torch
    >>> Watch(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), methods=["saliency"]).shortcut
    ''
    """

    def __init__(
        self,
        images: UInt8[Tensor, "n _ h w"],
        masks: Bool[Tensor, "n 1 h w"] | None = None,
        labels: Int64[Tensor, " n"] | None = None,
        *,
        preprocess: Callable[[Tensor], Tensor] | None = None,
        methods: Sequence[str] = ("grad_cam",),
        layer: str | None = None,
        model: str | Callable[[Any], nn.Module] | None = None,
        every: int = 1,
        drawn: int = 4,
        accuracy: str = "val_acc",
    ) -> None:
        super().__init__()
        if every < 1 or drawn < 1:
            raise ValueError(f"expected every and drawn of 1 or more, got {every} and {drawn}")
        self.watcher = Watcher(
            pictures=images,
            inputs=images / 255 if preprocess is None else preprocess(images),
            masks=masks,
            labels=labels,
            methods=methods,
            layer=layer,
            drawn=drawn,
        )
        self.model = model
        self.every = every
        self.accuracy = accuracy
        self.shortcut = ""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse weights in parts: the other processes would wait for ever while one of them looks."""
        if isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy | DeepSpeedStrategy):
            name = type(trainer.strategy).__name__
            raise ValueError(f"expected whole weights in every process, got {name}; use DDP, or leave Watch out")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look before training; a network that goes on training is no longer guessing, so its look is not judged."""
        if trainer.is_global_zero:
            look = self._look(trainer, pl_module)
            if trainer.ckpt_path is None and not trainer.global_step:
                self.watcher.judge(look)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look after the epoch's training and validation."""
        is_due = (trainer.current_epoch + 1) % self.every == 0 or trainer.current_epoch + 1 == trainer.max_epochs
        if not is_due or not trainer.is_global_zero:
            return
        look = self._look(trainer, pl_module)
        sentence = self.watcher.judge(look, float(trainer.callback_metrics.get(self.accuracy, math.nan)))
        if sentence:
            self.shortcut = sentence
            notice(sentence)

    def _look(self, trainer: Trainer, module: LightningModule) -> Look:
        look = self.watcher.look(self._network(module))
        for logger in trainer.loggers:
            self.watcher.log(logger, look, trainer.global_step)
        return look

    def _network(self, module: LightningModule) -> nn.Module:
        if self.model is None:
            return module
        if not isinstance(self.model, str):
            return self.model(module)
        network: Any = module
        for name in self.model.split("."):
            children = dict(network.named_children())
            if name not in children:
                hint = did_you_mean(name, children, f"choose from {', '.join(children) or 'none'}")
                raise ValueError(f"expected model= as an attribute that is a network, got {self.model!r}{hint}")
            network = children[name]
        return network
