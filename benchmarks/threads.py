"""Four threads explain at the same time, as in a web server: are all maps right, and are the models unchanged?

Each thread calls each of six methods 200 times. All threads use one model, or each its own wrapper of one network, or
each its own model. The models are in train mode, so every call has to switch flags. Each map is compared with that of a
call without other threads (to 1e-6 of its maximum), and at the end the models and the random states are compared bit by
bit. With fewer than 20 calls the script writes no results.
"""

import argparse
import copy
import random
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Barrier
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from torch import Tensor, nn

import sightline as sl
from sightline.explainers import rise, smooth_grad

THREADS = 4
METHODS: dict[str, Any] = {
    "grad_cam": "grad_cam",
    "saliency": "saliency",
    "guided_backprop": "guided_backprop",
    "lrp": "lrp",
    "smooth_grad": partial(smooth_grad, samples=2),
    "rise": partial(rise, masks=4),
}


class Small(nn.Module):
    """Convolutions, batch normalization, dropout, and a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.c2 = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 4)
        self.register_buffer("count", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        x = self.c2(self.drop(self.norm(self.c1(x)).relu())).relu()
        return self.fc(x.mean((2, 3)))


class Wrapper(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "small": Small,
    "resnet": partial(timm.create_model, "resnet10t", num_classes=4, stem_width=8, channels=(8, 8, 16, 16)),
    "transformer": partial(
        timm.create_model,
        "vit_tiny_patch16_224",
        num_classes=4,
        img_size=32,
        patch_size=8,
        depth=2,
        embed_dim=12,
        drop_rate=0.2,
        act_layer=nn.ReLU,
    ),
    "learn to pay attention": partial(sl.create_model, "vgg_att2", num_classes=4, width=1 / 16, stem_pool=4),
}


class Outcome(NamedTuple):
    calls: int
    right: int
    wrong: int
    errors: int
    is_unharmed: bool
    """Whether the models and the random states are unchanged, bit by bit."""
    seconds: float


def _bits(models: list[nn.Module]) -> list[Any]:
    flags = [module.training for model in models for module in model.modules()]
    hooks = [len(module._forward_hooks) for model in models for module in model.modules()]
    values = [value.clone() for model in models for value in model.state_dict().values()]
    states = [torch.get_rng_state(), str(np.random.get_state(legacy=False)), random.getstate()]
    return [flags, hooks, *values, *states, torch.backends.cudnn.allow_tf32]


def _equal(one: list[Any], other: list[Any]) -> bool:
    pairs = zip(one, other, strict=True)
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


def at_once(make: Callable[[], nn.Module], arrangement: str, calls: int, methods: dict[str, Any] = METHODS) -> Outcome:
    """Let all threads explain at once."""
    torch.manual_seed(0)
    net = make().train()
    images = torch.randn(1, 3, 32, 32)
    if arrangement == "one model":
        models = [net] * THREADS
    elif arrangement == "wrappers of one network":
        models = [Wrapper(net).train() for _ in range(THREADS)]
    else:
        models = [copy.deepcopy(net) for _ in range(THREADS)]
    expected = {
        name: sl.explain(copy.deepcopy(models[0]), images, 1, [method]).maps for name, method in methods.items()
    }
    before = _bits(models)
    barrier = Barrier(THREADS)

    def work(model: nn.Module, shift: int) -> list[str]:
        outcomes: list[str] = []
        names = [*methods]
        barrier.wait()
        for place in range(calls * len(names)):
            name = names[(place + shift) % len(names)]
            try:
                maps = sl.explain(model, images, 1, [methods[name]]).maps
            except Exception as error:
                outcomes.append(str(error))
                continue
            pairs = [(value, maps[key]) for key, value in expected[name].items()]
            close = all(float((a - b).abs().max()) <= 1e-6 * max(float(a.abs().max()), 1e-30) for a, b in pairs)
            outcomes.append("right" if close else "wrong")
        return outcomes

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)  # threads alternate as often as they can
    start = time.perf_counter()
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            answers = [answer for answers in pool.map(work, models, range(THREADS)) for answer in answers]
    finally:
        sys.setswitchinterval(interval)
    seconds = time.perf_counter() - start
    right, wrong = answers.count("right"), answers.count("wrong")
    unharmed = _equal(before, _bits(models))
    return Outcome(len(answers), right, wrong, len(answers) - right - wrong, unharmed, round(seconds, 1))


ARRANGEMENTS = ("one model", "wrappers of one network", "a model each")


def main() -> None:
    from measure import save

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=200, metavar="N", help="calls of each method in each thread (200)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, object]] = []
    for name, make in MODELS.items():
        for arrangement in ARRANGEMENTS:
            outcome = at_once(make, arrangement, arguments.calls)
            print(f"{name:24} {arrangement:24} {outcome}", flush=True)
            rows.append({"model": name, "arrangement": arrangement, **outcome._asdict()})
    if arguments.calls >= 20:
        print(save("threads", rows))


if __name__ == "__main__":
    main()
