"""Insert every block into one network of each convolutional family of timm and torchvision: right, refused or wrong?

    python benchmarks/insertion.py              all networks: results/insertion.json
    python benchmarks/insertion.py --missing    only rows that the JSON file lacks: continues a stopped run
    python benchmarks/insertion.py vgg11 dla    these networks again, keeping the rows of the others
    python benchmarks/insertion.py --quick      one or two blocks of each kind, in a third of the time

The judge does not know how places are chosen. A gating block is right if the logits stay bit-equal and each block sees
features (not the image) with the image's proportions, runs once and gets a gradient. A pooling is right if the logits
keep their shape, it runs once on a map, no later convolution sees a map, and a gradient reaches it. In both cases the
original model must stay unchanged, the copy must keep its keys, and `remove` must restore it bit by bit.
"""

import argparse
import json
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from families import Network, timm_networks, torchvision_networks
from measure import RESULTS, save
from torch import Tensor, nn

import sightline as sl
from sightline.attention import ATTENTION

GATING = (
    *("se", "eca", "gc", "cbam", "channel_gate", "spatial_gate", "bam", "attention_gate"),
    *("self_attention", "non_local"),
)
POOLING = ("ltpa", "brnpa", "bap", "ma_cnn", "bilinear", "mil", "hard", "gap", "gem")
OPTIONS: dict[str, dict[str, Any]] = {"bilinear": {"project": 8}}  # all pairs of 2,048 channels make 4 million numbers
KINDS = ("cbam", "bam", "brnpa")
# three classes, because images have three channels
QUICK = {3: ("cbam", "bam", "brnpa", "gem"), 1: ("brnpa",), 2: ("brnpa",), 1000: ("cbam", "brnpa")}
EVERYTHING = {3: (*GATING, *POOLING), 1: KINDS, 2: KINDS, 1000: KINDS}
Row = dict[str, Any]
PAGE = Path(__file__).parents[1] / "docs/results/insertion.md"
ABOUT = """# Attention in every family of networks

[benchmarks/insertion.py](../../benchmarks/insertion.py) inserts blocks into one small network of each family \
of timm and torchvision, with 1, 2, 3 and 1000 classes.
A gating block must leave the logits bit-equal, see features with the image's proportions, run once and affect the \
logits.
A pooling must keep the shape of the logits, and no layer after it may see a map.
Both must be removable without a trace."""
SMALLER: dict[tuple[int, ...], tuple[int, ...]] = {(3, 128, 160): (3, 64, 96), (3, 192, 224): (3, 128, 160)}


def lively(model: nn.Module) -> nn.Module:
    """Give the network random factors and statistics; the zeros of a new network would hide a change."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.unique().numel() == 1 and parameter.numel() > 0:
            parameter.data.uniform_(0.5, 1.5, generator=generator)
    for layer in model.modules():
        for name, buffer in layer.named_buffers(recurse=False):
            if name == "running_mean":
                buffer.normal_(0, 0.1, generator=generator)
            if name == "running_var":
                buffer.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


def narrow(model: nn.Module) -> nn.Module:
    """Give the heads of VGG and AlexNet 64 units instead of 4,096, which saves a hundred million weights."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and 4096 in (layer.in_features, layer.out_features):
            sizes = [64 if n == 4096 else n for n in (layer.in_features, layer.out_features)]
            new: nn.Module = nn.Linear(*sizes)
        elif isinstance(layer, nn.Conv2d) and 4096 in (layer.in_channels, layer.out_channels):
            sizes = [64 if n == 4096 else n for n in (layer.in_channels, layer.out_channels)]
            new = nn.Conv2d(*sizes, layer.kernel_size)  # pyright: ignore[reportArgumentType]
        else:
            continue
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)
    return model


class Judge:
    """Judges the blocks in one network with one number of classes."""

    def __init__(self, network: Network, classes: int) -> None:
        torch.manual_seed(0)
        self.model = lively(narrow(network.make(classes)))
        size = SMALLER.get(network.size, network.size)
        resized = (m.output_size for m in self.model.modules() if isinstance(m, nn.AdaptiveAvgPool2d))
        if any(side not in (1, (1, 1)) for side in resized):  # the network itself makes square maps
            size = (3, 96, 96)
        self.images = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
        self.state = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.logits = self.model(self.images).detach()  # without gradients, attention uses another kernel
        vars(self.model)["default_cfg"] = {"input_size": size}  # the size that `insert` tries first; small is fast
        if self.logits.shape != (2, classes) or not self.logits.isfinite().all():
            raise RuntimeError(f"{network.name}: logits {tuple(self.logits.shape)}, finite: {self.logits.isfinite()}")

    def verdict(self, block: str) -> str:
        """One of "right", "refused: reason" and "wrong: reason"."""
        verdict = ""
        for seed in range(6):
            torch.manual_seed(seed)
            verdict = self._verdict(block)
            if not verdict.startswith("wrong: no gradient"):  # a ReLU after untrained logits may leave none
                break
        return verdict

    def _verdict(self, block: str) -> str:
        try:
            inserted = sl.insert(self.model, block, **OPTIONS.get(block, {}))
        except ValueError as error:
            line = str(error)
            return f"refused: {line}" if "\n" not in line else f"wrong: refused in several lines: {line}"
        except Exception as error:
            return f"wrong: {type(error).__name__} instead of a refusal: {str(error).splitlines()[0]}"
        return next((f"wrong: {problem}" for problem in self._problems(block, inserted)), "right")

    def _problems(self, block: str, inserted: nn.Module) -> Iterator[str]:
        after = self.model.state_dict()
        if after.keys() != self.state.keys() or any(not after[key].equal(old) for key, old in self.state.items()):
            yield "the original has changed"
        blocks = {name: layer for name, layer in inserted.named_modules() if name.rpartition(".")[2] == "attention"}
        blocks = {name: layer for name, layer in blocks.items() if name not in dict(self.model.named_modules())}
        if not blocks:
            yield "there is no block"
        state = inserted.state_dict()
        if not all(key in state for key in self.state):
            yield "keys of the original are missing"
        pooling = block in POOLING
        if not pooling and not all(torch.equal(state[key], value) for key, value in self.state.items()):
            yield "weights of the original have changed"
        try:
            run = _Run(inserted, blocks, self.images)
        except Exception as error:
            yield f"forward raises: {str(error).splitlines()[0]}"
            return
        if run.logits.shape != self.logits.shape:
            yield f"logits of shape {tuple(run.logits.shape)} instead of {tuple(self.logits.shape)}"
        if not pooling and not torch.equal(run.logits, self.logits):
            yield f"logits change by {(run.logits - self.logits).abs().max():.1g}"
        for name, calls in run.seen.items():
            if len(calls) != 1:
                yield f"{name} runs {len(calls)} times"
            else:
                yield from self._bad_place(name, calls[0], pooling)
        for name in run.without_gradient:
            yield f"no gradient reaches {name}"
        if pooling and len(blocks) != 1:
            yield f"{len(blocks)} poolings"
        if pooling and run.later:
            yield f"{run.later} sees a map after the pooling"
        if any(True for layer in blocks.values() for _ in layer.parameters()):
            with torch.no_grad():
                _perturb(blocks)
                if torch.equal(inserted(self.images), run.logits):
                    yield "a changed block changes nothing"
        removed = sl.attention.remove(inserted, inplace=True)
        restored = removed(self.images).detach()
        if list(removed.state_dict()) != list(self.state) or not torch.equal(restored, self.logits):
            yield "remove does not restore the original"

    def _bad_place(self, name: str, features: Tensor, pooling: bool) -> Iterator[str]:
        height, width = self.images.shape[2:]
        if features.ndim != 4:
            yield f"{name} sees {tuple(features.shape)}"
        elif features.shape == self.images.shape and torch.equal(features, self.images):
            yield f"{name} sees the image"
        elif abs(features.shape[2] - features.shape[3] * height / width) > 1.5:
            yield f"{name} sees {tuple(features.shape)}, of other proportions than the image"
        elif pooling and features.shape[2:].numel() == 1:
            yield f"{name} sees one position"


class _Run:
    """A forward and a backward pass, with everything that the judge looks at."""

    def __init__(self, inserted: nn.Module, blocks: dict[str, nn.Module], images: Tensor) -> None:
        self.seen: dict[str, list[Tensor]] = {name: [] for name in blocks}
        self.later = ""
        outputs: dict[str, Tensor] = {}
        inside = {id(layer) for block in blocks.values() for layer in block.modules()}

        def keep(name: str) -> Any:
            def hook(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
                self.seen[name].append(inputs[0].detach())
                outputs[name] = output + 0.0
                return outputs[name]

            return hook

        def convolution(name: str) -> Any:
            def hook(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
                if outputs and inputs[0].ndim == 4 and inputs[0].shape[2:].numel() > 1:
                    spread = inputs[0].amax((2, 3)).equal(inputs[0].amin((2, 3)))  # one position, expanded to a map
                    self.later = self.later or ("" if spread else name)

            return hook

        handles = [layer.register_forward_hook(keep(name)) for name, layer in blocks.items()]
        handles += [
            layer.register_forward_hook(convolution(name))
            for name, layer in inserted.named_modules()
            if isinstance(layer, nn.Conv2d) and id(layer) not in inside
        ]
        try:
            logits = inserted(images)
            weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
            gradients = torch.autograd.grad((logits * weights).sum(), list(outputs.values()), materialize_grads=True)
        finally:
            for handle in handles:
                handle.remove()
        self.logits = logits.detach()
        self.without_gradient = [name for name, gradient in zip(outputs, gradients, strict=True) if not gradient.any()]


def _perturb(blocks: dict[str, nn.Module]) -> None:
    generator = torch.Generator().manual_seed(2)
    for layer in blocks.values():
        for parameter in layer.parameters():
            noise = torch.empty_like(parameter).normal_(0, 0.1, generator=generator)
            parameter.neg_().add_(noise)  # the best position becomes the worst


def rows_of(network: Network, wanted: Mapping[int, tuple[str, ...]], done: list[Row]) -> list[Row]:
    """Judge the rows of a network that are not done yet."""
    start = time.perf_counter()
    judged = {(row["classes"], row["block"]) for row in done if row["network"] == network.name}
    rows: list[Row] = []
    for classes, blocks in wanted.items():
        missing = [block for block in blocks if (classes, block) not in judged]
        if missing:
            judge = Judge(network, classes)
            for block in missing:
                rows.append({"network": network.name, "classes": classes, "block": block, "is": judge.verdict(block)})
    if rows:
        bad = [row for row in rows if row["is"] != "right"]
        print(f"{network.name:28} {len(rows) - len(bad):3} right  {time.perf_counter() - start:6.1f} s", flush=True)
        for row in bad:
            print(f"    {row['block']:15} {row['classes']:5}  {row['is'][:230]}", flush=True)
    return rows


def table(rows: list[Row]) -> str:
    """The page's table of networks and kinds of blocks; networks where everything is right share a row."""
    lines = ["| networks | gating | poolings |", "|---|---|---|"]
    cells: dict[str, list[str]] = {}
    for name in dict.fromkeys(row["network"] for row in rows):
        network_rows = [row for row in rows if row["network"] == name]
        columns: list[str] = []
        for kind, word in ((GATING, "bit-equal"), (POOLING, "right")):
            verdicts = [row for row in network_rows if row["block"] in kind]
            right = sum(row["is"] == "right" for row in verdicts)
            reasons = dict.fromkeys(row["is"] for row in verdicts if row["is"] != "right")
            columns.append("; ".join([f"{right} {word}"] * (right > 0) + list(reasons)))
        text = f"{columns[0]} | {columns[1]}"
        everything = not any(row["is"] != "right" for row in network_rows)
        cells.setdefault("all bit-equal | all right" if everything else text, []).append(f"`{name}`")
    lines += [f"| {' '.join(names)} | {text} |" for text, names in cells.items()]
    return "\n".join(lines)


def networks() -> list[Network]:
    """All image classifiers; those of torchvision have its name as a prefix."""
    torchvision = [network for network in torchvision_networks() if len(network.size) == 3]
    image = [network for network in timm_networks() if len(network.size) == 3]
    return image + [network._replace(name=f"torchvision:{network.name}") for network in torchvision]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", help="judge networks whose name contains one of these again")
    parser.add_argument("--missing", action="store_true", help="only rows that the results lack")
    parser.add_argument("--quick", action="store_true", help="one or two blocks of each kind")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    assert {*GATING, *POOLING} == set(ATTENTION), "a block of ATTENTION is in neither list"
    file = RESULTS / "insertion.json"
    rows: list[Row] = json.loads(file.read_text())["rows"] if file.exists() else []
    chosen = [n for n in networks() if not arguments.names or any(name in n.name for name in arguments.names)]
    if not arguments.missing:
        again = {network.name for network in chosen}
        rows = [row for row in rows if row["network"] not in again]
    for network in chosen:
        new = rows_of(network, QUICK if arguments.quick else EVERYTHING, rows)
        rows += new
        if new:
            save("insertion", rows)
    wrong = sum(row["is"].startswith("wrong") for row in rows)
    right = sum(row["is"] == "right" for row in rows)
    summary = f"{len(rows)} insertions: {right} right, {len(rows) - right - wrong} refused, {wrong} wrong."
    print(summary)
    PAGE.write_text(f"{ABOUT}\n\n{summary}\n\n{table(rows)}\n")


if __name__ == "__main__":
    main()
