"""Ctrl-C at every line: does it leave the model and the state of the process and the thread unchanged?

A KeyboardInterrupt is raised at the first line that sightline runs during a call, in the next call at the second line,
and so on, until a call finishes. After each interrupt the script compares every attribute of every module, hooks,
flags, buffers and parameters; the random states of PyTorch, NumPy and Python; gradient, inference and autocast mode;
the stacks of modes; the precision of a GPU; and whether another thread gets its turn. A second series sends real
signals at random moments. `--every 50` is a quick check that writes no results.
"""

import argparse
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from operator import call as called
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sightline as sl
from sightline.explainers import attention_maps
from sightline.inference import turns
from sightline.metrics import deletion_auc, max_sensitivity, parameter_randomization, random_logit

ROOT = str(Path(sl.__file__).parent)
INFERENCE = os.path.join(ROOT, "inference")
IMAGES = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)
TARGETS = torch.tensor([1, 0])
Call = Callable[[nn.Module], object]


class Restless(nn.Module):
    """Changes everything a model can change in each forward pass: counters, lists, buffers, and all random states."""

    def __init__(self) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.c2 = nn.Conv2d(4, 6, 3, padding=1)
        self.fc = nn.Linear(6, 4)
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("mean", torch.zeros(6))
        self.calls = 0
        self.shapes: list[torch.Size] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.count += 1
        self.shapes.append(x.shape)
        noise = random.random() + np.random.rand() + torch.rand(())
        x = F.relu(self.c2(self.drop(F.relu(self.norm(self.c1(x)))))) + 0 * noise
        self.mean = self.mean + x.detach().mean((0, 2, 3))
        return self.fc(x.mean((2, 3)))


def saliency(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    return sl.explain(model, images, targets, ["saliency"])["saliency"]


CALLS: dict[str, Call] = {
    "explain: grad_cam": lambda model: sl.explain(model, IMAGES, methods=["grad_cam"]),
    "explain: guided_grad_cam, lrp, two targets": lambda model: sl.explain(
        model, IMAGES, torch.tensor([[1, 0], [2, 3]]), ["guided_grad_cam", "lrp"]
    ),
    "explain: rise, ablation_cam, smooth_grad": lambda model: sl.explain(
        model,
        IMAGES,
        1,
        [partial(sl.explainers.rise, masks=4), "ablation_cam", partial(sl.explainers.smooth_grad, samples=2)],
        "c2",
    ),
    "attention_maps": lambda model: attention_maps(model, IMAGES),
    "grad_cam, called alone": lambda model: sl.explainers.grad_cam(model, IMAGES),
    "deletion_auc": lambda model: deletion_auc(model, IMAGES, TARGETS, IMAGES[:, :1], steps=4),
    "max_sensitivity": lambda model: max_sensitivity(model, IMAGES, TARGETS, saliency, samples=2),
    "random_logit": lambda model: random_logit(model, IMAGES, TARGETS, saliency),
    "parameter_randomization": lambda model: parameter_randomization(model, IMAGES, TARGETS, saliency),
}


def restless() -> nn.Module:
    torch.manual_seed(0)
    model = Restless().train()
    model.norm.eval()
    model.c1.register_forward_hook(lambda module, inputs, output: None)
    model.c1.register_forward_pre_hook(lambda module, inputs: None)
    return model


def _held(value: Any) -> Any:
    if isinstance(value, Tensor):
        return id(value), value.detach().clone()
    if isinstance(value, dict):
        return [(key, id(each)) for key, each in value.items()]
    return [id(each) for each in value] if isinstance(value, list) else value


def _is_free() -> bool:
    """Whether another thread can acquire the lock of the turns."""
    answers: list[bool] = []

    def ask() -> None:
        answers.append(turns._shared.acquire(blocking=False))
        if answers[0]:
            turns._shared.release()

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    return answers[0]


def everything(model: nn.Module) -> dict[str, Any]:
    """Everything that a call must leave unchanged, by name."""
    state = {
        f"{name}.{key}": _held(value) for name, module in model.named_modules() for key, value in vars(module).items()
    }
    tensors = [*model.named_parameters(), *model.named_buffers()]
    state |= {f"value of {name}": (id(tensor), tensor.detach().clone()) for name, tensor in tensors}
    _, nesting = map(called, (torch.autocast_increment_nesting, torch.autocast_decrement_nesting))
    return state | {
        "random state of PyTorch": (0, torch.get_rng_state()),
        "random state of NumPy": str(np.random.get_state(legacy=False)),
        "random state of Python": random.getstate(),
        "gradient mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), nesting),
        "function modes": torch._C._len_torch_function_stack(),
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
        "TF32": torch.backends.cudnn.allow_tf32,
        "turns": len(turns.line()),
        "lock": _is_free(),
    }


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Names of the entries that differ."""

    def same(one: Any, other: Any) -> bool:
        if isinstance(one, tuple) and len(one) == 2 and isinstance(one[1], Tensor):
            return one[0] == other[0] and torch.equal(one[1].view(-1), other[1].view(-1))
        return one == other

    both = before.keys() & after.keys()
    return [name for name in before | after if name not in both or not same(before[name], after[name])]


class Interrupted:
    """Raises a KeyboardInterrupt at the n-th line that runs in the files of a folder; counts the lines."""

    def __init__(self, place: int, folder: str) -> None:
        self.place, self.folder = place, folder
        self.lines: list[str] = []

    def _enter(self, frame: Any, event: str, argument: Any) -> Any:
        return self._line if frame.f_code.co_filename.startswith(self.folder) else None

    def _line(self, frame: Any, event: str, argument: Any) -> Any:
        if event == "line":
            self.lines.append(f"{os.path.relpath(frame.f_code.co_filename, ROOT)}:{frame.f_lineno}")
            if len(self.lines) == self.place:
                raise KeyboardInterrupt
        return self._line

    def run(self, call: Callable[[], object]) -> bool:
        """Run the call; whether it finished."""
        tracer = sys.gettrace()
        sys.settrace(self._enter)
        try:
            call()
        except KeyboardInterrupt:
            return False
        finally:
            sys.settrace(tracer)
        return True


def around(name: str) -> AbstractContextManager[Any]:
    """The modes that the caller has switched on."""
    stack = ExitStack()
    if name == "inference mode and autocast":
        stack.enter_context(torch.inference_mode())
        stack.enter_context(torch.autocast("cpu", torch.bfloat16))
    return stack if name else nullcontext()


def interrupt_each_line(
    call: Call, folder: str = ROOT, every: int = 1, surroundings: str = "", repeated: bool = True
) -> tuple[int, int, dict[str, list[str]]]:
    """Number of lines in the call, number of interrupts, and the names of changed entries by line.

    A line that runs repeatedly is interrupted each time, or, unless `repeated`, the first and the last time.
    """
    model = restless()
    call(model)
    count = Interrupted(0, folder)
    count.run(partial(call, model))
    places = range(1, len(count.lines) + 1, every)
    if not repeated:
        first = {where: place for place, where in reversed([*enumerate(count.lines, 1)])}
        last = {where: place for place, where in enumerate(count.lines, 1)}
        places = sorted({*first.values(), *last.values()})
    left: dict[str, list[str]] = {}
    interrupts = 0
    with around(surroundings):
        before = everything(model)
        for place in places:
            interrupt = Interrupted(place, folder)
            if interrupt.run(partial(call, model)):
                continue  # caches made the call shorter
            interrupts += 1
            if changed := differences(before, everything(model)):
                left[interrupt.lines[-1]] = changed
                with torch.inference_mode(False):
                    model = restless()
                turns._LINE.clear()
                before = everything(model)
    return len(count.lines), interrupts, left


def interrupt_at_random(call: Call, times: int, seed: int = 0) -> tuple[int, dict[str, list[str]]]:
    """Send real signals at random moments until `times` of them hit the call; the number of hits and what changed."""
    model = restless()
    call(model)
    start = time.perf_counter()
    call(model)
    seconds = time.perf_counter() - start
    rng = np.random.default_rng(seed)
    before = everything(model)
    left: dict[str, list[str]] = {}
    hits = 0
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have started this without one
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)  # so that the thread that sends the signal runs in time
    for _ in range(20 * times):
        if hits == times:
            break
        timer = threading.Timer(rng.uniform(0, 1.2) * seconds, partial(os.kill, os.getpid(), signal.SIGINT))
        try:
            timer.start()
            try:
                call(model)
            except KeyboardInterrupt:
                hits += 1
            timer.join()
            time.sleep(0)
        except KeyboardInterrupt:
            pass
        if changed := differences(before, everything(model)):
            left[f"signal {hits}"] = changed
            model = restless()
            before = everything(model)
    signal.signal(signal.SIGINT, handler)
    sys.setswitchinterval(interval)
    return hits, left


def main() -> None:
    from measure import save

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--every", type=int, default=1, metavar="N", help="interrupt every n-th line only; writes nothing from 20 on"
    )
    parser.add_argument("--signals", type=int, default=500, metavar="N", help="real signals for each call (500)")
    parser.add_argument("--only", default="", metavar="WORD", help="calls whose name contains the word; writes nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, object]] = []
    for name, call in CALLS.items():
        if arguments.only not in name:
            continue
        for surroundings in ("", "inference mode and autocast"):
            lines, interrupts, left = interrupt_each_line(call, every=arguments.every, surroundings=surroundings)
            row = {
                "call": name,
                "around": surroundings,
                "lines": lines,
                "interrupts": interrupts,
                "left behind": left,
                "every": arguments.every,
            }
            text = f"{lines} lines, {interrupts} interrupts, {len(left)} left something"
            print(name, surroundings, text, left or "", flush=True)
            rows.append(row)
        if not arguments.signals:
            continue
        hits, left = interrupt_at_random(call, arguments.signals)
        print(name, f"{hits} signals, {len(left)} left something", left, flush=True)
        rows.append({"call": name, "signals": hits, "left behind": left})
    if arguments.every < 20 and not arguments.only:
        print(save("interrupts", rows))


if __name__ == "__main__":
    main()
