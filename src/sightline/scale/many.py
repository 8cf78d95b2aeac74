"""`explain_many`: the maps of any number of images, as shards in a folder."""

import hashlib
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock
from torch import nn

from sightline import runs
from sightline.checks import check_whole
from sightline.data.images import MAX_PIXELS
from sightline.facts import Progress
from sightline.inference import Memory, Output, copy_on_cpu
from sightline.notebook import bar_of
from sightline.report.networks import ExplainedNetwork, Network, network_of
from sightline.scale import cluster as ray_engine
from sightline.scale import local
from sightline.scale.cluster import Cluster
from sightline.scale.decoding import Failed, Job
from sightline.scale.plan import is_address, plan_of
from sightline.scale.results import ASKED, Results, shard_file, sweep, write_asked
from sightline.version import __version__

PER_SHARD = 1000
"""Images of a shard, where nothing else is asked for."""


@dataclass(frozen=True, kw_only=True)
class Many:
    """What `explain_many` did."""

    results: Results
    written: int
    """Shards that this call wrote."""
    unreadable: int
    """Images without a map among these."""
    missing: int
    """Shards of all images that are not there yet."""
    failed: dict[int, str]
    """Shards that were given up, and why."""
    left_out: dict[str, str]
    """Methods that do not fit the model, and why."""
    notices: tuple[str, ...]
    """Decisions about images and model that you may want to change."""

    def lines(self) -> Iterator[str]:
        """A summary for the terminal."""
        asked, folder = self.results.asked, self.results.folder
        there = self.results.shards - self.missing
        yield (
            f"{asked['images']:,} images x {len(asked['methods'])} methods in {folder}: "
            f"{there:,} of {self.results.shards:,} shards, {self.written:,} of them new"
        )
        if self.unreadable:
            yield f"images without a map: {self.unreadable:,}; the column error tells why"
        for number, reason in self.failed.items():
            yield f"given up: {shard_file(folder, number).name}: {reason}"


def explain_many(
    model: Network,
    sources: str | Path | Sequence[str | Path],
    out: str | Path,
    methods: Sequence[str] = ("grad_cam",),
    target: int | str | None = None,
    layer: str | None = None,
    *,
    engine: Literal["local", "ray"] = "local",
    shard: tuple[int, int] = (0, 1),
    cluster: Cluster | None = None,
    output: Output = None,
    whole: bool = False,
    classes: Sequence[str] = (),
    name: str | None = None,
    dtype: Literal["float32", "float16"] = "float32",
    per_shard: int = PER_SHARD,
    batch_size: int = 64,
    memory: Memory = None,
    max_pixels: int = MAX_PIXELS,
    progress: Progress | bool | None = None,
) -> Many:
    """Explain any number of images into a folder of parquet files; see `Results` for how to read them.

    Images are taken in shards. A shard is written in one step and is final, so a second call does only what is
    missing, and several calls at once, on machines that share the folder, do not harm each other. An image that cannot
    be read is a row with the reason, and so is one on which processes die.

    Args:
        model: a run folder, or a classifier.
        sources: folders of images, parquet files, tar files (WebDataset), sets on the hub; addresses such as s3://,
            too. See `plan.entries_of`.
        out: folder of the results.
        methods: names of explainers, `name@layer` too; `["all"]` or `["fast"]`. Of several, those that do not fit are
            left out.
        target: class to explain, by name or index. None: the predicted one.
        layer: see `sightline.explain`.
        engine: `"local"` is a plain loop in this process, `"ray"` distributes shards.
        shard: (i, n): only every n-th shard, from shard i on.
        cluster: what Ray may use.
        output: see `sightline.explain`.
        whole: resize all of each image, also for a model that was trained on the middle of it.
        classes: class names of a model that is no run. A folder of images that is called like a class gives its label.
        name: of a model that is no run.
        dtype: of the maps, which are at the resolution of their layer.
        per_shard: images of a shard.
        batch_size: most images per forward.
        memory: see `sightline.explain`; the images themselves are cut by it, too.
        max_pixels: larger image files are not read.
        progress: True shows a bar; a function is called with (what, images done, images to do).

    Raises:
        OSError: `out` cannot be written, the disk is full, or images or the run are missing.
        ValueError: no image, an unknown method, class or layer, or `out` holds results of another job.
        ModuleNotFoundError: Ray is not installed.
    """
    out, report = Path(out), bar_of(progress)
    i, n = shard
    if not 0 <= i < n:
        raise ValueError(f"expected shard i of n with 0 <= i < n, got {i}/{n}; of four, write 0/4, 1/4, 2/4 and 3/4")
    if engine not in ("local", "ray") or dtype not in ("float32", "float16"):
        raise ValueError(f"expected engine local or ray, and float32 or float16, got {engine} and {dtype}; choose one")
    check_whole(per_shard=per_shard)
    if per_shard < 1:
        raise ValueError(f"expected per_shard of 1 image or more, got {per_shard}; leave it out for {PER_SHARD}")
    if engine == "ray":
        ray_engine.check_installed()
    runs.check_writable(out)
    network = network_of(model, methods, target, None, whole, classes, name, is_file=True)
    if engine == "ray" and network.device.type != "cpu":  # each worker brings its own to its device
        network.model = copy_on_cpu(network.model)
    notices = (*network.notices, *_settle(network, layer, output))
    named = [str(source) for source in ([sources] if isinstance(sources, str | Path) else sources)]
    job = _ask(network, named, out, layer, output, dtype, per_shard, batch_size, memory, max_pixels)
    results = Results.open(out)
    todo = [number for number in results.missing() if number % n == i]
    random.Random(os.urandom(8)).shuffle(todo)  # of two runs at once, each does what the other has not begun
    total, done, written, unreadable = sum(map(job.size, todo)), 0, 0, 0
    failed: dict[int, str] = {}
    there = (number for number in todo if not shard_file(out, number).exists())
    outcomes = (
        ray_engine.run(job, network, there, cluster or Cluster()) if engine == "ray" else local.run(job, network, there)
    )
    for outcome in outcomes if todo else ():
        if isinstance(outcome, Failed):
            failed[outcome.shard] = outcome.reason
            continue
        written, unreadable, done = written + 1, unreadable + outcome.unreadable, done + outcome.images
        if report is not None:
            report("explaining", done, total)
    sweep(out)
    return Many(
        results=results,
        written=written,
        unreadable=unreadable,
        missing=len(results.missing()),
        failed=failed,
        left_out=network.left_out,
        notices=notices,
    )


def _settle(network: ExplainedNetwork, layer: str | None, output: Output) -> list[str]:
    """Decide what the output is and which methods fit, on noise, so that all machines decide alike."""
    height, width = network.preprocess.size
    noise = torch.randint(0, 256, (2, 3, height, width), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return network.settle(network.inputs(noise), layer, output, strict=False)


def _ask(
    network: ExplainedNetwork,
    sources: Sequence[str],
    out: Path,
    layer: str | None,
    output: Output,
    dtype: str,
    per_shard: int,
    batch_size: int,
    memory: Memory,
    max_pixels: int,
) -> Job:
    """Write the plan and what is asked, or check that the folder has them already."""
    out.mkdir(parents=True, exist_ok=True)
    named = [source if is_address(source) else os.path.abspath(os.path.expanduser(source)) for source in sources]
    with FileLock(out / ".lock"):  # of several processes, one makes the plan
        plan = plan_of(out, named, network.classes, per_shard, anew=not (out / ASKED).is_file())
        asked = {
            "sightline": __version__,
            "network": network.name,
            "weights": weights_digest(network.model),
            "methods": [*network.methods],
            "layer": layer,
            "target": network.target,
            "output": _plain(output),
            "dtype": dtype,
            "preprocess": network.preprocess.facts(),
            "max_pixels": max_pixels,
            "classes": [*network.classes],
            "sources": named,
            "plan": plan.digest,
            "images": plan.images,
            "images_per_shard": per_shard,
        }
        write_asked(out, asked)
    return Job(
        folder=out.resolve(),
        plan=plan._replace(file=plan.file.resolve()),
        sources=tuple(named),
        digest=Results.open(out).asked["digest"],
        per_shard=per_shard,
        preprocess=network.preprocess,
        max_pixels=max_pixels,
        layer=layer,
        dtype=dtype,
        batch_size=batch_size,
        memory=memory,
    )


def _plain(output: Output) -> Any:
    """For JSON; a function by its name, since its address changes."""
    if isinstance(output, tuple):
        return [*map(_plain, output)]
    return getattr(output, "__qualname__", type(output).__name__) if callable(output) else output


def weights_digest(model: nn.Module) -> str:
    """The sha256 of a model's parameters and buffers, by name.

    >>> weights_digest(nn.Linear(1, 1, bias=False)) == weights_digest(nn.Linear(1, 1, bias=False))
    False
    """
    content = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        values = tensor.detach().cpu().contiguous()
        content.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        content.update(values.flatten().view(torch.uint8).numpy().tobytes())
    return content.hexdigest()
