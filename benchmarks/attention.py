"""Time of attention blocks: each against its counterpart, and each in a training step of ResNet-50.

The counterpart is timm's module if timm computes the same, else the paper's formula in plain PyTorch. It gets the
block's weights, and results and gradients of the inputs are compared in float64 before anything is timed. The times
are of a forward and a backward pass in training mode, with gradients of inputs and parameters, in PyTorch's default
memory layout and in the one that training uses. The counterpart of `brnpa` is in brnpa.py.

Options are for quick checks: only a run without them writes results.
"""

import argparse
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import timm
import torch
from measure import Ratio, keep_freed_memory, pairs, save
from timm.layers.adaptive_avgmax_pool import SelectAdaptivePool2d
from timm.layers.cbam import CbamModule, ChannelAttn, SpatialAttn
from timm.layers.eca import EcaModule
from timm.layers.global_context import GlobalContext
from timm.layers.non_local_attn import NonLocalAttn
from timm.layers.squeeze_excite import SEModule
from torch import Tensor, nn
from torch.nn import functional as F

import sightline as sl
from sightline.attention import ATTENTION, AttentionGate, HardAttention

ROUNDS = 21
BAR = 1.05
LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
BATCH, SIZE = 4, 128
OPTIONS: dict[str, dict[str, Any]] = {"bilinear": {"project": 64}}
"""In ResNet-50, the products of all pairs of 2,048 channels would need a head of 4 billion weights."""


class PlainBAM(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = channels // 16

        def dilated() -> tuple[nn.Module, ...]:
            return nn.Conv2d(hidden, hidden, 3, padding=4, dilation=4), nn.BatchNorm2d(hidden), nn.ReLU()

        first = nn.Linear(channels, hidden), nn.BatchNorm1d(hidden), nn.ReLU()
        self.channel = nn.Sequential(*first, nn.Linear(hidden, channels))
        reduced = nn.Conv2d(channels, hidden, 1), nn.BatchNorm2d(hidden), nn.ReLU()
        self.spatial = nn.Sequential(*reduced, *dilated(), *dilated(), nn.Conv2d(hidden, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.channel(x.mean((2, 3)))[:, :, None, None] + self.spatial(x)).sigmoid()
        return x + x * weights


class PlainAttentionGate(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.theta = nn.Conv2d(channels, 512, 1, bias=False)
        self.phi = nn.Conv2d(512, 512, 1, bias=False)
        self.psi = nn.Conv2d(512, 1, 1)

    def forward(self, x: Tensor, query: Tensor) -> Tensor:
        raised = F.interpolate(self.phi(query), x.shape[2:], mode="bilinear")
        return x * self.psi((self.theta(x) + raised).relu()).sigmoid()


class PlainSelfAttention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.project = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x.flatten(2).mT).chunk(3, 2)
        query, key, value = (part.unflatten(2, (4, -1)).transpose(1, 2) for part in parts)
        weights = (query @ key.mT / query.shape[3] ** 0.5).softmax(3)
        attended = (weights @ value).transpose(1, 2).flatten(2)
        return x + self.project(attended).mT.unflatten(2, x.shape[2:])


class TorchSelfAttention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(channels, 4, bias=False, batch_first=True)
        self.attention.out_proj.register_parameter("bias", nn.Parameter(torch.empty(channels)))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(2).mT
        return x + self.attention(rows, rows, rows, need_weights=False)[0].mT.unflatten(2, x.shape[2:])


class PlainLearnToPayAttention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.u = nn.Linear(channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        local = x.flatten(2).mT
        return (self.u(local).softmax(1).mT @ local).squeeze(1)


class PlainBilinearAttentionPooling(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.maps = nn.Sequential(nn.Conv2d(channels, 3, 1, bias=False), nn.BatchNorm2d(3), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        vectors = torch.einsum("bkhw,bchw->bkc", self.maps(x), x).flatten(1) / (x.shape[2] * x.shape[3])
        return 100 * F.normalize(vectors / (vectors.abs() + 1e-6).sqrt())


class PlainBilinear(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        products = torch.einsum("bchw,bdhw->bcd", x, x).flatten(1)
        return F.normalize(products / (products.abs() + 1e-6).sqrt())


class PlainMIL(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.V, self.U = nn.Linear(channels, 128), nn.Linear(channels, 128)
        self.w = nn.Linear(128, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        instances = x.flatten(2).mT
        weights = self.w(self.V(instances).tanh() * self.U(instances).sigmoid()).softmax(1)
        return (weights.mT @ instances).squeeze(1)


class PlainHard(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.u = nn.Linear(channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        local = x.flatten(2).mT
        logs = self.u(local).squeeze(2).log_softmax(1)
        soft = logs.exp()
        drawn = F.one_hot(torch.multinomial(soft, 1).squeeze(1), local.shape[1]).to(x.dtype)
        weights = torch.where(torch.rand(len(x), 1) < 0.5, soft, drawn)
        log_prob, entropy = (weights.detach() * logs).sum(1), -(soft * logs).sum(1)
        pooled = (weights.unsqueeze(1) @ local).squeeze(1)
        return torch.cat([pooled, log_prob[:, None], entropy[:, None]], 1)


class Reinforced(HardAttention):
    """Our block, which also returns the values that REINFORCE's loss needs."""

    def forward(self, features: Tensor, query: Tensor | None = None) -> Tensor:
        pooled = super().forward(features, query)
        assert self.log_prob is not None and self.entropy is not None
        return torch.cat([pooled, self.log_prob[:, None], self.entropy[:, None]], 1)


class PlainGeneralizedMean(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.empty(()))

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(min=1e-6).pow(self.p).mean((2, 3)).pow(1 / self.p)


def timm_global_context(channels: int) -> nn.Module:
    module = GlobalContext(channels, fuse_add=True, fuse_scale=False, rd_ratio=1 / 16)
    module.conv_attn = nn.Conv2d(channels, 1, 1, bias=False)
    for layer in module.modules():
        if isinstance(layer, nn.LayerNorm):
            layer.eps = 1e-5
    return module


def timm_non_local(channels: int) -> nn.Module:
    module = NonLocalAttn(channels, use_scale=False, rd_ratio=1 / 2)
    for convolution in (module.t, module.p, module.g, module.z):
        convolution.bias = None
    return module


class Case(NamedTuple):
    """A counterpart: its name, a function from the number of channels to the module, and the shapes of the inputs."""

    name: str
    make: Callable[[int], nn.Module]
    shapes: tuple[tuple[int, ...], ...]


GATED = ((16, 256, 28, 28),)
POOLED = ((16, 512, 14, 14),)
CASES = {
    "se": (Case("timm", SEModule, GATED),),
    "eca": (Case("timm", EcaModule, GATED),),
    "gc": (Case("timm", timm_global_context, GATED),),
    "cbam": (Case("timm", partial(CbamModule, mlp_bias=True), GATED),),
    "channel_gate": (Case("timm", partial(ChannelAttn, mlp_bias=True), GATED),),
    "spatial_gate": (Case("timm", lambda channels: SpatialAttn(), GATED),),
    "bam": (Case("formula", PlainBAM, GATED),),
    "attention_gate": (Case("formula", PlainAttentionGate, (*GATED, *POOLED)),),
    "self_attention": (
        Case("nn.MultiheadAttention", TorchSelfAttention, POOLED),
        Case("formula", PlainSelfAttention, POOLED),
    ),
    "non_local": (Case("timm", timm_non_local, POOLED),),
    "ltpa": (Case("formula", PlainLearnToPayAttention, POOLED),),
    "brnpa": (),
    "ma_cnn": (),
    "bap": (Case("formula", PlainBilinearAttentionPooling, POOLED),),
    "bilinear": (Case("formula", lambda channels: PlainBilinear(), POOLED),),
    "mil": (Case("formula", PlainMIL, POOLED),),
    "hard": (Case("formula", PlainHard, POOLED),),
    "gap": (Case("timm", lambda channels: SelectAdaptivePool2d(pool_type="avg", flatten=True), POOLED),),
    "gem": (Case("formula", PlainGeneralizedMean, POOLED),),
}
OURS = ATTENTION | {"attention_gate": partial(AttentionGate, query_channels=512), "hard": Reinforced}


def side_by_side(name: str, case: Case) -> tuple[nn.Module, nn.Module]:
    """The block and its counterpart with equal weights; no parameter is all zero."""
    channels = case.shapes[0][1]
    ours, theirs = OURS[name](channels), case.make(channels)
    for parameter in ours.parameters():
        if not parameter.any():
            nn.init.normal_(parameter)
    weights = [parameter.detach() for parameter in ours.parameters()]
    if name == "non_local":
        weights[:1] = weights[0].chunk(3)
    with torch.no_grad():
        for parameter, weight in zip(theirs.parameters(), weights, strict=True):
            # the two-channel convolution of timm's CBAM takes the mean before the maximum
            parameter.copy_(weight.flip(1) if weight.shape[1:2] == (2,) else weight.reshape(parameter.shape))
    return ours, theirs


def both_passes(block: nn.Module, inputs: list[Tensor], gradient: Tensor) -> tuple[Tensor, ...]:
    """Result, gradients of the inputs, gradients of the parameters."""
    result = block(*inputs)
    return result, *torch.autograd.grad(result, [*inputs, *block.parameters()], gradient)


def against_counterpart(name: str, case: Case, layout: torch.memory_format, rounds: int) -> Ratio:
    torch.manual_seed(0)
    ours, theirs = (block.to(memory_format=layout) for block in side_by_side(name, case))
    inputs = [torch.randn(shape).relu().to(memory_format=layout).requires_grad_() for shape in case.shapes]
    gradient = torch.randn_like(ours(*inputs))
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs], gradient.double()
    results: list[tuple[Tensor, ...]] = []
    for block in (ours, theirs):
        torch.manual_seed(0)
        results.append(both_passes(block.double(), *exact)[: 1 + len(inputs)])
        block.float()
    torch.testing.assert_close(*results)
    return pairs(partial(both_passes, ours, inputs, gradient), partial(both_passes, theirs, inputs, gradient), rounds)


def training(model: nn.Module) -> Callable[[], None]:
    """One step: forward, cross entropy, backward, SGD."""
    images, labels = torch.randn(BATCH, 3, SIZE, SIZE), torch.randint(1000, (BATCH,))
    optimizer = torch.optim.SGD(model.train().parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def overhead(name: str, rounds: int) -> Ratio:
    torch.manual_seed(0)
    plain = timm.create_model("resnet50")
    with_block = sl.insert(plain, name, init="fresh", **OPTIONS.get(name, {}))
    return pairs(training(with_block), training(plain), rounds)


def report(what: str, ratio: Ratio, bar: float | None) -> dict[str, object]:
    print(f"{what}: {ratio.median:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]  A/A {ratio.aa:.3f}  bar {bar}", flush=True)
    return {"what": f"{what}, float32, cpu, 2 threads", **ratio._asdict(), "bar": bar}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=lambda names: names.split(","), help="blocks, such as se,cbam")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    names = arguments.only or list(ATTENTION)
    torch.set_num_threads(2)
    keep_freed_memory()
    rows = []
    for name in names:
        for case, (layout, memory_format) in product(CASES[name], LAYOUTS.items()):
            what = f"{name} / {case.name}, forward + backward, {' and '.join(map(str, case.shapes))}, {layout}"
            rows.append(report(what, against_counterpart(name, case, memory_format, arguments.rounds), BAR))
    for name in names:
        what = f"step of resnet50 with {name} / without, {SIZE} px, batch {BATCH}"
        rows.append(report(what, overhead(name, arguments.rounds), None))
    if names == list(ATTENTION) and arguments.rounds == ROUNDS:
        print(save("attention", rows))


if __name__ == "__main__":
    main()
