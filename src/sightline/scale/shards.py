"""One shard of a large job: its maps made and written. What every engine runs."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8

from sightline.inference import in_batches
from sightline.report.networks import ExplainedNetwork
from sightline.scale.decoding import Decoded, Job
from sightline.scale.results import Row, packed_map, write_shard

Array = np.ndarray


class Done(NamedTuple):
    """A shard that was written."""

    images: int
    unreadable: int


def write(job: Job, network: ExplainedNetwork, decoded: Decoded) -> Done:
    """Make the maps of a shard and write it.

    Raises:
        OSError: the disk is full or read-only.
        ValueError, RuntimeError: the network or a method fails.
    """
    write_shard(job.folder, decoded.shard, _rows(job, network, decoded))
    return Done(len(decoded.entries), len(decoded.reasons))


def _rows(job: Job, network: ExplainedNetwork, decoded: Decoded) -> Iterator[list[Row]]:
    """The rows of a shard, batch by batch, in the order of its images."""
    readable = [place for place in range(len(decoded.entries)) if place not in decoded.reasons]
    first = decoded.shard * job.per_shard
    start = 0
    for items, explained in explained_in_batches(job, network, decoded.pixels):
        stop = len(decoded.entries) if items.stop == len(readable) else readable[items.stop]
        rows: list[Row] = []
        coming = iter(explained)
        for place in range(start, stop):
            entry = decoded.entries[place]
            common = {"key": entry.key, "source_index": first + place, "label": entry.label, "split": entry.split}
            common["digest"] = job.digest
            if place in decoded.reasons:
                rows.append(common | {"error": decoded.reasons[place]})
            else:
                rows += [common | row for row in next(coming)]
        start = stop
        yield rows


def explained_in_batches(
    job: Job, network: ExplainedNetwork, pixels: UInt8[Array, "n h w 3"]
) -> Iterator[tuple[range, list[list[dict[str, Any]]]]]:
    """Places of some images, and the rows of each, a row per method."""
    sizes: dict[str, Any] = {"batch_size": job.batch_size, "memory": job.memory}

    def explain(items: range) -> list[list[dict[str, Any]]]:
        part = torch.from_numpy(np.array(pixels[items.start : items.stop])).movedim(-1, 1)  # shared memory is read-only
        explanation = network.explain(network.inputs(part), job.layer, None, sizes).explanation
        answers = explanation.logits.argmax(1)
        sure = explanation.probabilities.gather(1, answers[:, None])[:, 0].tolist()
        predicted = answers.tolist()
        logits, targets = explanation.logits.float().cpu().numpy(), explanation.targets[:, 0].tolist()
        maps = {method: values[:, 0].float().cpu().numpy() for method, values in explanation.maps.items()}
        images: list[list[dict[str, Any]]] = []
        for i in range(len(items)):
            rows = [
                {
                    "method": method,
                    "layer": str(explanation.layers[method].name),
                    "target": targets[i],
                    "predicted": predicted[i],
                    "probability": sure[i],
                    "verdicts": [str(verdict) for verdict in explanation.verdicts[method][i]],
                    **packed_map(values[i], job.dtype),
                }
                for method, values in maps.items()
            ]
            rows[0]["logits"] = logits[i]
            images.append(rows)
        return images

    if not len(pixels):
        yield range(0), []
        return
    yield from in_batches(explain, len(pixels), pixels[0].size * torch.float32.itemsize, network.device, **sizes)
