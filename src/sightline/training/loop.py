"""The training loop. It owns every number that decides how a training goes on, so it can stop and resume anywhere."""

import copy
import math
import time
from collections.abc import Callable, Generator
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from sightline import data
from sightline.inference import logits_of, untouched
from sightline.recipe import Recipe
from sightline.training.losses import Loss
from sightline.training.optimisers import average, create_optimiser
from sightline.training.schedule import learning_rate

try:
    from lightning.fabric import Fabric
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("training needs lightning; install it with: pip install 'sightline[train]'") from error


class Training:
    """One network in training: weights, optimiser, moving average, place in the data, losses so far, history.

    The order of the images, their random changes and the dropout of a step are pure functions of (seed, epoch, step).
    So nothing random needs to be kept, and the user's random state is not used.
    """

    def __init__(
        self,
        network: nn.Module,
        train: data.ImageSet | data.ImageStream,
        val: data.ImageSet | None,
        recipe: Recipe,
        loss: Loss,
    ) -> None:
        optim = self.optim = recipe.optim
        self.train, self.val, self.augment, self.seed = train, val, recipe.augment, recipe.seeds[0]
        self.fabric = Fabric(accelerator="auto", devices=1, precision=optim.precision)
        self.network = network.train().to(memory_format=torch.channels_last)
        self.optimizer = create_optimiser(network, optim)
        self.model, self.fabric_optimizer = self.fabric.setup(network, self.optimizer)
        self.averaged = None if optim.ema is None else copy.deepcopy(network)
        self.loss = loss.to(self.fabric.device)
        self.batch_size = min(optim.batch_size, len(train))
        self.steps = len(train) // self.batch_size
        self.epoch = self.step = self.seen = 0
        self.losses = torch.zeros(self.steps, device=self.fabric.device)
        self.correct = torch.zeros((), dtype=torch.int64, device=self.fabric.device)
        self.best_epoch, self.best_accuracy, self.seconds = -1, -math.inf, 0.0
        self.history: list[dict[str, float]] = []

    @property
    def result(self) -> nn.Module:
        """The network to validate and to save."""
        return self.network if self.averaged is None else self.averaged

    @property
    def improved(self) -> bool:
        """Whether the last finished epoch is the one to keep."""
        return self.optim.patience is None or self.best_epoch == self.epoch - 1

    @property
    def finished(self) -> bool:
        """Whether all epochs are done, or `patience` is at its end."""
        patience = math.inf if self.optim.patience is None else self.optim.patience
        return self.epoch >= self.optim.epochs or self.epoch - 1 - self.best_epoch >= patience

    def epochs(self, tick: Callable[[], None]) -> Generator[dict[str, float]]:
        """Train to the end; yields one row of figures after each epoch.

        Args:
            tick: called after each step and each validated batch, when the state is whole; it may raise to stop here.

        Raises:
            ValueError: the loss is not finite.
        """
        while not self.finished:
            began = time.perf_counter() - self.seconds
            order = (self.seed, self.epoch)
            change = (self.augment, *order)
            for batch in data.batches(
                self.train, self.batch_size, shuffle=order, augment=change, drop_last=True, start=self.step
            ):
                self._step(batch)
                self.seconds = time.perf_counter() - began
                tick()
            self.check_finite()
            accuracy, loss = (math.nan, math.nan) if self.val is None else self._validate(self.val, tick)
            row = {
                "epoch": self.epoch + 1.0,
                "lr": self._learning_rate(self.steps - 1),
                "train_loss": float(self.losses[: self.step].mean()),
                "train_accuracy": float(self.correct) / self.seen,
                "val_loss": loss,
                "val_accuracy": accuracy,
                "seconds": round(time.perf_counter() - began, 3),
            }
            if accuracy > self.best_accuracy:
                self.best_epoch, self.best_accuracy = self.epoch, accuracy
            self.history.append(row)
            self.epoch, self.step, self.seen, self.seconds = self.epoch + 1, 0, 0, 0.0
            self.losses.zero_()
            self.correct.zero_()
            yield row

    def check_finite(self) -> None:
        """Stop a training that has left the numbers; the steps themselves never wait for the device to look."""
        bad = (~torch.isfinite(self.losses[: self.step])).nonzero()
        finite = torch.stack([torch.isfinite(p).all() for p in self.network.state_dict().values()]).all()
        if len(bad) or not finite:
            step = int(bad[0]) + 1 if len(bad) else self.step
            what = f"the loss became {float(self.losses[step - 1])}" if len(bad) else "the weights became infinite"
            raise ValueError(f"{what} in epoch {self.epoch + 1}, step {step}; lower optim.lr or set optim.clip_norm")

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that decides how this training goes on: tensors, and numbers that JSON can hold."""
        tensors = {f"network.{name}": tensor for name, tensor in self.network.state_dict().items()}
        if self.averaged is not None:
            tensors |= {f"averaged.{name}": tensor for name, tensor in self.averaged.state_dict().items()}
        for index, entries in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in entries.items()}
        tensors |= {"losses": self.losses, "correct": self.correct}
        names = ("epoch", "step", "seen", "seconds", "best_epoch", "best_accuracy", "history")
        facts: dict[str, Any] = {name: getattr(self, name) for name in names}
        return tensors, facts | {"scaler": self.fabric.strategy.precision.state_dict()}

    def restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Take over what `state` gave."""

        def part(name: str) -> dict[str, Tensor]:
            return {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}

        self.network.load_state_dict(part("network"))
        if self.averaged is not None:
            self.averaged.load_state_dict(part("averaged"))
        groups = self.optimizer.state_dict()["param_groups"]
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        state: dict[int, dict[str, Tensor]] = {}
        for key, tensor in part("optimizer").items():
            index, name = key.split(".")
            like = parameters[int(index)]
            # in the parameter's memory layout: another one may round differently
            same = torch.empty_like(like).copy_(tensor) if tensor.shape == like.shape else tensor
            state.setdefault(int(index), {})[name] = same.detach()
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.losses.copy_(tensors["losses"])
        self.correct.copy_(tensors["correct"])
        self.fabric.strategy.precision.load_state_dict(facts["scaler"])
        for name in facts.keys() - {"scaler"}:
            setattr(self, name, facts[name])

    def _learning_rate(self, step: int) -> float:
        return learning_rate(self.optim, self.epoch * self.steps + step, self.steps)

    def _step(self, batch: data.Batch) -> None:
        seed = np.random.SeedSequence((self.seed, self.epoch, self.step)).generate_state(1, np.uint64)[0]
        torch.manual_seed(int(seed))
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate(self.step)
        images, labels = self._inputs(batch)
        logits = logits_of(self.model(images)).float()
        with self.fabric.autocast():
            loss = self.loss(images, logits, labels)
        self.fabric.backward(loss)
        if self.optim.clip_norm is not None:
            self.fabric.clip_gradients(
                self.model, self.fabric_optimizer, max_norm=self.optim.clip_norm, error_if_nonfinite=False
            )
        self.fabric_optimizer.step()
        self.fabric_optimizer.zero_grad()
        if self.averaged is not None and self.optim.ema is not None:
            step = self.epoch * self.steps + self.step
            average(self.averaged, self.network, min(self.optim.ema, (1 + step) / (10 + step)))
        self.losses[self.step] = loss.detach()
        self.correct += (logits.detach().argmax(1) == labels).sum()
        self.step, self.seen = self.step + 1, self.seen + len(labels)

    def _inputs(self, batch: data.Batch) -> tuple[Float[Tensor, "b 3 h w"], Int64[Tensor, " b"]]:
        images = batch.images.to(self.fabric.device, memory_format=torch.channels_last, non_blocking=True)
        return data.normalise(images, self.train.preprocess), batch.labels.to(self.fabric.device, non_blocking=True)

    def _validate(self, images: data.ImageSet, tick: Callable[[], None]) -> tuple[float, float]:
        correct = torch.zeros_like(self.correct)
        loss = torch.zeros((), device=self.fabric.device)
        with untouched(self.result) as network, torch.no_grad(), self.fabric.autocast():
            for batch in data.batches(images, self.batch_size):
                inputs, labels = self._inputs(batch)
                logits = logits_of(network(inputs)).float()
                loss += F.cross_entropy(logits, labels, reduction="sum")
                correct += (logits.argmax(1) == labels).sum()
                tick()
        return float(correct) / len(images), float(loss) / len(images)
