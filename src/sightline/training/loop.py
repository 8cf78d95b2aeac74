"""The training loop. It owns all training state, so it can stop and resume after any step."""

import math
import time
from collections.abc import Callable, Generator, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, Shaped
from timm.layers.norm_act import convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import record_function

from sightline import data
from sightline.inference import copy_of, features_of, logits_of, untouched
from sightline.metrics.retrieval import ranking_of_features
from sightline.models.protopnet import ProtoPNet
from sightline.recipe import Recipe, resolved
from sightline.training import processes
from sightline.training.freezing import Freezing
from sightline.training.losses import Loss, Mixed
from sightline.training.map_loss import MapLoss
from sightline.training.optimizers import average, create_optimizer
from sightline.training.prototypes import finish_stage
from sightline.training.schedule import learning_rate
from sightline.training.stages import enter_epoch, prepare, staged_optimizer

RESIDENT = 0.25
"""Share of a GPU's free memory that the images may take, so that no step waits for them."""


class Training:
    """One network in training: weights, optimizer, moving average, position in the data, losses, history.

    The order of the images, their augmentation and the dropout of a step are pure functions of (seed, epoch, step), so
    no random state is stored, and the user's is not used. Several processes share every batch; their summed losses and
    counts equal those of one process.
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
        self.last_epoch = resolved(optim.epochs)
        self.augment, self.seed = recipe.augment, recipe.seeds[0]
        self.fabric = processes.join(optim, network, train.preprocess.size)
        self.rank, self.world_size = self.fabric.global_rank, self.fabric.world_size
        self.ahead = None if self.fabric.device.type == "cpu" else self.fabric.device
        self.map_loss = None
        if optim.map_loss is not None:
            self.map_loss = MapLoss(optim.map_loss, optim.map_layer)
        if isinstance(train, data.ImageSet):
            train = _resident(train, self.fabric.device, marked=self.map_loss is not None)
        self.train = train
        self.val = None if val is None else _resident(val, self.fabric.device)
        self.network = network.train()
        if optim.sync_batch_norm:
            self.network = convert_sync_batchnorm(self.network)  # also converts timm's norm-activation layers
        self.layout = memory_layout(self.network, self.fabric.device)
        if not optim.sharded:  # sharded weights have the default memory layout only
            self.network = self.network.to(memory_format=self.layout)
        self.averaged = None if optim.ema is None else copy_of(self.network).to(self.fabric.device)
        if self.averaged is not None:
            processes.shard_alike(self.fabric, self.averaged)
        self.staged = network if isinstance(network, ProtoPNet) else None
        self.settled = False
        self.freezing = Freezing(self.network, optim, train.preprocess.size)
        scales = self.freezing.scales(optim)  # by name: sharding replaces the parameters
        called: nn.Module = torch.compile(self.network) if optim.compile else self.network  # pyright: ignore[reportAssignmentType]
        self.model = self.fabric.setup_module(called)  # first: the optimizer needs the sharded parameters
        self.optimizer = (
            create_optimizer(self.network, optim, scales) if self.staged is None else staged_optimizer(network)
        )
        self.fabric_optimizer: Any = self.fabric.setup_optimizers(self.optimizer)
        self.loss = loss.to(self.fabric.device).to(memory_format=self.layout)  # holds the teacher, if any
        self.batch_size = min(optim.batch_size, len(train))
        self.steps = len(train) // self.batch_size
        self.micro_batches = optim.micro_batches or 1
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
        """Whether all epochs are done, or `patience` has run out."""
        patience = math.inf if self.optim.patience is None else self.optim.patience
        return self.epoch >= self.last_epoch or self.epoch - 1 - self.best_epoch >= patience

    def epochs(self, tick: Callable[[], None]) -> Generator[dict[str, float]]:
        """Train to the end; yields one row of figures after each epoch.

        Args:
            tick: called after each step and each validated batch, when the state is consistent; may raise to stop.

        Raises:
            ValueError: the loss is not finite.
        """
        while not self.finished:
            start = time.perf_counter() - self.seconds
            batches = self._batches(self.step)
            if self.staged is not None:
                enter_epoch(self.optimizer, self.staged.stages, self.epoch, self.step)
            else:
                self.freezing.enter(self.epoch)
            if not self.step:
                with self.fabric.autocast():
                    prepare(self.network, self.epoch, self.last_epoch, self._plain_batches, self.seed)
            while True:
                with record_function("images"):
                    batch = next(batches, None)
                if batch is None:
                    break
                if len(batch.labels) or self.world_size > 1:
                    self._step(batch)
                else:  # none of the images of a stream's batch could be read
                    self.step += 1
                self.seconds = time.perf_counter() - start
                tick()
            self.check_finite()
            if self.staged is not None and self.staged.stages.pushes_after(self.epoch, self.last_epoch):
                self._settle(self.staged)
            accuracy, loss = (math.nan, math.nan) if self.val is None else self._validate(self.val, tick)
            row = {
                "epoch": self.epoch + 1.0,
                "lr": self._learning_rate(self.steps - 1),
                "train_loss": float(processes.all_reduce(self.losses)[: self.step].mean()),
                "train_accuracy": float(processes.all_reduce(self.correct)) / self._sum(self.seen),
                "val_loss": loss,
                "val_accuracy": accuracy,
                "seconds": round(time.perf_counter() - start, 3),
            }
            if accuracy > self.best_accuracy:
                self.best_epoch, self.best_accuracy = self.epoch, accuracy
            self.history.append(row)
            self.epoch, self.step, self.seen, self.seconds, self.settled = self.epoch + 1, 0, 0, 0.0, False
            self.losses.zero_()
            self.correct.zero_()
            yield row

    def check_finite(self) -> None:
        """Raise if a loss or weight is not finite; steps themselves never wait for the device to check."""
        losses = processes.all_reduce(self.losses)[: self.step]
        bad = (~torch.isfinite(losses)).nonzero()
        # a sum is finite only if all its terms are, and costs a third of checking each number
        sums = [processes.local_tensor(tensor).sum().float() for tensor in self.network.state_dict().values()]
        wrong = (~torch.isfinite(torch.stack(sums))).any()
        if len(bad) or processes.all_reduce(wrong.int()):
            step = int(bad[0]) if len(bad) else self.step - 1
            what = f"the loss became {float(losses[step])}" if len(bad) else "the weights became infinite"
            batch = next(self._batches(step), None)
            names = [] if batch is None else batch.names
            images = f" ({', '.join(names[:3])}{', ...' * (len(names) > 3)})" if names else ""
            best = self.epoch if self.optim.patience is None else self.best_epoch + 1
            kept = f"the weights of epoch {best} are kept; " if self.epoch else ""
            raise ValueError(
                f"{what} in epoch {self.epoch + 1}, step {step + 1}{images}; {kept}lower optim.lr or set "
                "optim.clip_norm"
            )

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything needed to continue this training: tensors, and facts in JSON's types.

        Gathered from all processes, so every process must call this.
        """
        tensors = self._tensors()
        for index, entries in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in entries.items()}
        tensors = {name: processes.full_tensor(tensor) for name, tensor in tensors.items()}
        tensors |= {"losses": processes.all_reduce(self.losses), "correct": processes.all_reduce(self.correct)}
        names = ("epoch", "step", "seconds", "best_epoch", "best_accuracy", "history", "micro_batches", "settled")
        facts: dict[str, Any] = {name: getattr(self, name) for name in names} | {"seen": self._sum(self.seen)}
        return tensors, facts | {"scaler": self.fabric.strategy.precision.state_dict()}

    def weights(self) -> dict[str, Tensor]:
        """Full weights of `result`; every process must call this."""
        return {name: processes.full_tensor(tensor) for name, tensor in self.result.state_dict().items()}

    def restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Continue from what `state` returned.

        Raises:
            ValueError: the number of images has changed.
        """
        if (steps := len(tensors["losses"])) != self.steps:
            raise ValueError(
                f"expected data with {steps} steps per epoch, as when the training started, got {self.steps}; "
                "restore the images, or train again in a new folder"
            )

        for name, tensor in self._tensors().items():
            processes.copy_full(tensor, tensors[name])
        groups = self.optimizer.state_dict()["param_groups"]
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        state: dict[int, dict[str, Tensor]] = {}
        for key in (key for key in tensors if key.startswith("optimizer.")):
            _, index, name = key.split(".")
            tensor, like = tensors[key], parameters[int(index)].detach()
            if tensor.shape == like.shape:  # keep the parameter's memory layout: another one may round differently
                moment = torch.empty_like(like)
                processes.copy_full(moment, tensor)
                tensor = moment
            state.setdefault(int(index), {})[name] = tensor
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        first = self.rank == 0  # only one process may continue the sums over processes
        self.losses.copy_(tensors["losses"] * first)
        self.correct.copy_(tensors["correct"] * first)
        self.fabric.strategy.precision.load_state_dict(facts["scaler"])
        for name in facts.keys() - {"scaler"}:
            setattr(self, name, facts[name])
        self.seen *= first

    def _tensors(self) -> dict[str, Tensor]:
        """Those of the network, and of its moving average if there is one."""
        modules = {"network": self.network} | ({} if self.averaged is None else {"averaged": self.averaged})
        return {f"{kind}.{name}": t for kind, module in modules.items() for name, t in module.state_dict().items()}

    def _learning_rate(self, step: int) -> float:
        """Rate of this step of the epoch; the highest one of a network with stages."""
        if self.staged is not None:
            return max(self.staged.stages.rates(self.epoch).values())
        return learning_rate(self.optim, self.epoch * self.steps + step, self.steps)

    def _settle(self, staged: ProtoPNet) -> None:
        """What follows an epoch of a network with stages, once, on images without augmentation."""
        if self.settled:  # before the training was interrupted
            return

        with self.fabric.autocast():
            finish_stage(staged, staged.stages, self._plain_batches, self.batch_size, self.seed + self.epoch)
        self.settled = True

    def _plain_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """All training images once, in order and without augmentation."""
        assert isinstance(self.train, data.ImageSet)  # `check_stages` refuses streams
        return (self._inputs(b) for b in data.batches(self.train, self.batch_size, ahead=self.ahead))

    def _batches(self, start: int) -> Iterator[data.Batch]:
        """This process's share of the epoch's batches, from number `start` on."""
        order = (self.seed, self.epoch)
        return data.batches(
            self.train,
            self.batch_size,
            shuffle=order,
            augment=(self.augment, *order),
            drop_last=True,
            start=start,
            ahead=self.ahead,
            part=(self.rank, self.world_size),
            per_class=self.optim.images_per_class,
        )

    def _step(self, batch: data.Batch) -> None:
        seed = np.random.SeedSequence((self.seed, self.epoch, self.step, self.rank)).generate_state(1, np.uint64)[0]
        if self.staged is None:
            for group in self.optimizer.param_groups:
                group["lr"] = group["scale"] * self._learning_rate(self.step)
        images, labels = self._inputs(batch)
        mixed = None
        if self.augment.mixup:
            generator = np.random.default_rng((self.seed, self.epoch, self.step, 1))  # the same in every process
            share = generator.beta(self.augment.mixup, self.augment.mixup)
            images = (share * images + (1 - share) * images.roll(1, 0)).to(memory_format=self.layout)
            mixed = (labels.roll(1, 0), float(share))
        masks = None
        if self.map_loss is not None and (regions := batch.regions) is not None:
            masks = regions.to(self.fabric.device, non_blocking=True)
        self._gradients(int(seed), images, labels, mixed, masks)
        with record_function("optimizer"):
            if self.optim.clip_norm is not None:
                self.fabric.clip_gradients(
                    self.model, self.fabric_optimizer, max_norm=self.optim.clip_norm, error_if_nonfinite=False
                )
            self.fabric_optimizer.step()
            self.fabric_optimizer.zero_grad()
            if self.averaged is not None and self.optim.ema is not None:
                step = self.epoch * self.steps + self.step
                average(self.averaged, self.network, min(self.optim.ema, (1 + step) / (10 + step)))
        self.step, self.seen = self.step + 1, self.seen + len(labels)

    def _gradients(
        self,
        seed: int,
        images: Float[Tensor, "b 3 h w"],
        labels: Int64[Tensor, " b"],
        mixed: Mixed | None,
        masks: Bool[Tensor, "b 1 h w"] | None = None,
    ) -> None:
        """Forward and backward passes; if the recipe leaves the micro-batches open, in as many as memory requires."""
        search = self.optim.micro_batches == 0 and self.world_size == 1
        while True:
            torch.manual_seed(seed)
            buffers = [(buffer, buffer.clone()) for buffer in self.network.buffers()] if search else []
            correct = self.correct.clone() if search else self.correct
            try:
                self._forward_and_backward(images, labels, mixed, masks)
                return
            except (RuntimeError, MemoryError) as error:
                if not _out_of_memory(error):
                    raise
                if not search or self.micro_batches >= len(labels):
                    raise MemoryError(
                        f"out of memory in a step with {len(labels)} images of {images.shape[3]} x {images.shape[2]} "
                        f"pixels in {self.micro_batches} parts; set optim.micro_batches higher (0: as many as needed), "
                        "or optim.batch_size or data.size lower"
                    ) from error
            # the failed attempt's tensors are freed here; undo its other effects
            for buffer, before in buffers:
                buffer.copy_(before)
            self.correct = correct
            self.losses[self.step] = 0
            self.fabric_optimizer.zero_grad()
            self.micro_batches *= 2

    def _forward_and_backward(
        self,
        images: Float[Tensor, "b 3 h w"],
        labels: Int64[Tensor, " b"],
        mixed: Mixed | None,
        masks: Bool[Tensor, "b 1 h w"] | None,
    ) -> None:
        """Gradients of the mean loss over the batch of all processes, computed in micro-batches."""
        expected = len(labels) if self.world_size == 1 else self.batch_size / self.world_size
        most = max(self.batch_size // self.world_size, 1)  # the same number in every process: they wait for one another
        ends = np.linspace(0, len(labels), min(self.micro_batches, most) + 1).round().astype(int).tolist()
        parts = [slice(start, end) for start, end in pairwise(ends)]
        for place in parts:
            x, y = images[place], labels[place]
            if not len(y) and self.world_size == 1:
                continue
            with self.fabric.no_backward_sync(self.model, enabled=place is not parts[-1] and self.world_size > 1):
                with record_function("forward"):
                    logits, loss = self._forward(x, y, None if mixed is None else (mixed[0][place], mixed[1]))
                    if self.map_loss is not None and masks is not None and len(y):
                        outside, plain = self.map_loss(self.network, x, y, masks[place])
                        # BatchNorm differs in eval mode: without the labels there, maps are cleaned by breaking it
                        loss = (loss + self.loss(x, plain, y)) / 2 + self.optim.map_weight * outside
                    if len(y) != expected:
                        loss = loss * (len(y) / expected)
                with record_function("backward"):
                    self.fabric.backward(loss)
            self.losses[self.step] += loss.detach() / self.world_size
            self.correct += (logits[: len(y)].detach().argmax(1) == y).sum()

    def _forward(
        self, images: Float[Tensor, "b 3 h w"], labels: Int64[Tensor, " b"], mixed: Mixed | None
    ) -> tuple[Float[Tensor, "_ n"], Float[Tensor, ""]]:
        """Logits and mean loss."""
        logits = logits_of(self.model(images if len(labels) else self._no_images())).float()
        if not len(labels):
            return logits, 0 * logits.sum()
        with self.fabric.autocast():
            return logits, self.loss(images, logits, labels, mixed)

    def _inputs(self, batch: data.Batch) -> tuple[Float[Tensor, "b 3 h w"], Int64[Tensor, " b"]]:
        images = batch.images.to(self.fabric.device, memory_format=self.layout, non_blocking=True)
        return data.normalize(images, self.train.preprocess), batch.labels.to(self.fabric.device, non_blocking=True)

    def _validate(self, images: data.ImageSet, tick: Callable[[], None]) -> tuple[float, float]:
        """Accuracy and loss; of identities that are not those of the training images, rank-1 and no loss."""
        if images.cameras is not None:
            return self._validate_retrieval(images, images.cameras, tick), math.nan
        correct = torch.zeros_like(self.correct)
        loss = torch.zeros((), device=self.fabric.device)
        processes.broadcast_buffers(self.result)
        with untouched(self.result) as network, torch.no_grad(), self.fabric.autocast():
            size = math.ceil(self.batch_size / self.micro_batches)
            for batch in data.batches(images, size, ahead=self.ahead, part=(self.rank, self.world_size)):
                inputs, labels = self._inputs(batch)
                if len(labels) or self.optim.sharded:  # with sharded weights all processes must take part
                    logits = logits_of(network(inputs if len(labels) else self._no_images())).float()[: len(labels)]
                    loss += F.cross_entropy(logits, labels, reduction="sum")
                    correct += (logits.argmax(1) == labels).sum()
                tick()
        return float(processes.all_reduce(correct)) / len(images), float(processes.all_reduce(loss)) / len(images)

    def _validate_retrieval(
        self, images: data.ImageSet, cameras: Shaped[np.ndarray, " n"], tick: Callable[[], None]
    ) -> float:
        """Share of the images whose nearest one from another camera has their identity."""
        processes.broadcast_buffers(self.result)
        features: list[Tensor] = []
        with untouched(self.result) as network, torch.no_grad(), self.fabric.autocast():
            for batch in data.batches(images, self.batch_size, ahead=self.ahead):
                features.append(F.normalize(features_of(network, self._inputs(batch)[0]).float()).cpu())
                tick()
        whole = torch.cat(features)
        ranked = ranking_of_features(whole, whole, images.labels, images.labels, cameras, cameras)
        return float(ranked.cmc(1).nanmean())

    def _no_images(self) -> Float[Tensor, "2 3 h w"]:
        """Input of a process without images, whose shards the others need; two, the fewest that BatchNorm accepts."""
        return torch.zeros(2, 3, *self.train.preprocess.size, device=self.fabric.device)

    def _sum(self, number: int) -> int:
        return int(processes.all_reduce(torch.tensor(number, device=self.fabric.device)))


def memory_layout(network: nn.Module, device: torch.device) -> torch.memory_format:
    """The faster memory layout that is safe.

    On a CPU, oneDNN (seen in 3.12, of PyTorch 2.14.1) writes outside the gradient of the weights of a 1 x 1 convolution
    with a stride, if channels are last and fewer than the processor's vectors hold: 8, or 16 with AVX-512.
    """
    is_unsafe = device.type == "cpu" and any(
        layer.kernel_size == (1, 1) and max(layer.stride) > 1 and layer.in_channels // layer.groups < 16
        for layer in network.modules()
        if isinstance(layer, nn.Conv2d)
    )
    return torch.contiguous_format if is_unsafe else torch.channels_last


def _resident(images: data.ImageSet, device: torch.device, *, marked: bool = False) -> data.ImageSet:
    """The images, without masks and boxes unless `marked`, moved to a GPU if they fit well."""
    images = images if marked else images.unmarked()
    needed = images.resident_bytes if device.type == "cuda" else None
    fits = needed is not None and needed < RESIDENT * torch.cuda.mem_get_info(device)[0]
    return images.to(device) if fits else images


def _out_of_memory(error: BaseException) -> bool:
    messages = ("can't allocate memory", "not enough memory", "ALLOC_FAILED")
    is_typed = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return is_typed or any(message in str(error) for message in messages)
