"""BR-NPA's representative vectors against plain implementations: time and peak memory, forward and backward.

There are two plain implementations, both vectorized over positions with one loop over the vectors: one with
element-wise products and sums, as the equations read, and one with matrix products. The bars are against the first.
"""

from collections.abc import Callable
from functools import partial
from itertools import product

import torch
from measure import pairs, peak, save
from torch import Tensor

import sightline as sl

Pooling = Callable[[Tensor], Tensor]

SHAPES = ((16, 2048, 14, 14), (4, 2048, 56, 56))
BARS = {"forward": 0.7, "forward + backward": 1.0, "peak memory": 0.5}


def elementwise(features: Tensor, k: int = 3) -> Tensor:
    f = features.flatten(2)
    norms = f.square().sum(1).sqrt() + 1e-5
    scores = norms
    vectors = []
    for _ in range(k):
        pick = scores.argmax(1, keepdim=True)
        picked = f.gather(2, pick.unsqueeze(1).expand(-1, f.shape[1], -1))
        cosines = (f * picked).sum(1) / (norms * norms.gather(1, pick))
        weights = cosines / cosines.sum(1, keepdim=True)
        vectors.append((f * weights.unsqueeze(1)).sum(2))
        scores = (1 - cosines) * scores
    return torch.cat(vectors, 1)


def products(features: Tensor, k: int = 3) -> Tensor:
    f = features.flatten(2)
    norms = torch.linalg.vector_norm(f, dim=1) + 1e-5
    scores = norms
    vectors = []
    for _ in range(k):
        pick = scores.argmax(1, keepdim=True)
        picked = f.gather(2, pick.unsqueeze(1).expand(-1, f.shape[1], -1))
        cosines = torch.bmm(picked.mT, f).squeeze(1) / (norms * norms.gather(1, pick))
        weights = cosines / cosines.sum(1, keepdim=True)
        vectors.append(torch.bmm(f, weights.unsqueeze(2)).squeeze(2))
        scores = (1 - cosines) * scores
    return torch.cat(vectors, 1)


def forward(pooling: Pooling, features: Tensor) -> None:
    with torch.no_grad():
        pooling(features)


def both(pooling: Pooling, features: Tensor) -> Tensor:
    pooled = pooling(features)
    return torch.autograd.grad(pooled, features, torch.ones_like(pooled))[0]


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(2)
    ours = sl.attention.RepresentativeVectors(k=3)
    rows: list[dict[str, object]] = []
    for shape, plain in product(SHAPES, (elementwise, products)):
        features = torch.randn(shape).relu().requires_grad_()
        torch.testing.assert_close(ours(features), plain(features), rtol=1e-4, atol=1e-5)
        for step, call in (("forward", forward), ("forward + backward", both)):
            ratio = pairs(partial(call, ours, features), partial(call, plain, features))
            report(rows, f"{step} / {plain.__name__}, {shape}", ratio._asdict(), BARS[step])
        memory = peak(partial(both, ours, features)) / peak(partial(both, plain, features))
        report(rows, f"peak memory / {plain.__name__}, {shape}", {"median": memory}, BARS["peak memory"])
    print(save("brnpa", rows))


def report(rows: list[dict[str, object]], what: str, ratio: dict[str, float], bar: float) -> None:
    numbers = "  ".join(f"{name} {value:.3f}" for name, value in ratio.items())
    print(f"{what}: {numbers}  bar {bar}", flush=True)
    rows.append({"what": f"{what}, float32, cpu, 2 threads", **ratio, "bar": bar})


if __name__ == "__main__":
    main()
