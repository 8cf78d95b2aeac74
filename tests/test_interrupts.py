"""The model and the process come back as they were: whatever a forward changes, and wherever an interrupt comes."""

import random

import numpy as np
import pytest
import torch
from benchmarks.interrupts import (
    CALLS,
    IMAGES,
    INFERENCE,
    differences,
    everything,
    interrupt_at_random,
    interrupt_each_line,
    restless,
)
from torch import nn

from sightline.explainers import explain
from sightline.inference import forward, untouched

pytestmark = pytest.mark.usefixtures("unchecked")  # the type checker draws random numbers of its own


@pytest.mark.parametrize("name", CALLS)
def test_nothing_is_left_behind(name):
    model = restless()
    before = everything(model)
    CALLS[name](model)
    assert differences(before, everything(model)) == []


@pytest.mark.parametrize("name", ["explain: grad_cam", "deletion_auc"])
def test_nothing_is_left_behind_after_an_error(name):
    model = restless()

    def fail(module, inputs, output):
        raise ValueError("no")

    model.fc.register_forward_hook(fail)
    before = everything(model)
    with pytest.raises(ValueError, match="no"):
        CALLS[name](model)
    assert differences(before, everything(model)) == []


def bare(model):
    with untouched(model):
        model(IMAGES)


@pytest.mark.parametrize("surroundings", ["", "inference mode and autocast"])
def test_an_interrupt_at_any_line_that_preserves_leaves_nothing_behind(surroundings):
    _, interrupts, left = interrupt_each_line(bare, INFERENCE, surroundings=surroundings, repeated=False)
    assert interrupts > 100 and left == {}


@pytest.mark.parametrize(
    ("name", "every"), [("explain: grad_cam", 59), ("attention_maps", 19), ("deletion_auc", 41), ("random_logit", 131)]
)
def test_an_interrupt_at_any_line_of_a_call_leaves_nothing_behind(name, every):
    _, interrupts, left = interrupt_each_line(CALLS[name], every=every)
    assert interrupts > 20 and left == {}


def test_signals_at_random_moments_leave_nothing_behind():
    hits, left = interrupt_at_random(CALLS["explain: grad_cam"], 10)
    assert hits and left == {}


def test_every_forward_draws_the_same_numbers():
    class Noisy(nn.Module):
        def forward(self, x):
            noise = random.random() + np.random.rand() + torch.rand(())
            return x.flatten(1)[:, :2] + noise

    model = Noisy()
    assert torch.equal(forward(model, IMAGES), forward(model, IMAGES))
    with untouched(model):
        assert torch.equal(forward(model, IMAGES), forward(model, IMAGES))


def test_attributes_that_belong_together_come_back_together():
    class Cached(nn.Module):
        """Keeps a table that grows with the images, and its length."""

        def __init__(self):
            super().__init__()
            self.length = 0
            self.register_buffer("table", torch.zeros(0))
            self.fc = nn.Linear(3, 2)

        def forward(self, x):
            if x.shape[-1] > self.length:
                self.length = x.shape[-1]
                self.register_buffer("table", torch.arange(self.length) / self.length)
            return self.fc((x * self.table[: x.shape[-1]]).mean((2, 3)))

    model = Cached()
    expected = forward(model, IMAGES)
    assert model.length == 0 and len(model.table) == 0
    model(torch.zeros(1, 3, 4, 4))
    assert torch.equal(expected, forward(model, IMAGES)) and (model.length, len(model.table)) == (4, 4)
    model(torch.zeros(1, 3, 4, 4))


def test_hooks_keep_their_order():
    model = restless()
    handles = [model.c1.register_forward_hook(lambda module, inputs, output: None) for _ in range(3)]
    order = [*model.c1._forward_hooks]
    with untouched(model):
        first = handles[0]
        hook = model.c1._forward_hooks[first.id]
        first.remove()
        model.c1._forward_hooks[first.id] = hook
        model.c1.register_forward_hook(lambda module, inputs, output: None)
    assert [*model.c1._forward_hooks] == order


def test_what_was_not_changed_is_not_written():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    model.register_buffer("unknown", torch.tensor([torch.nan, 1.0]))
    model.register_buffer("flags", torch.tensor([True, False]))
    model.register_buffer("waves", torch.tensor([1j]))
    model.register_buffer("row", torch.zeros(1).expand(3))
    forward(model, IMAGES)
    assert [buffer._version for buffer in model.buffers()] == [0, 0, 0, 0]


def test_a_buffer_written_past_the_counter_comes_back():
    class Silent(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.tensor(3))
            self.plain = torch.tensor(5)

        def forward(self, x):
            self.count.data += 1
            self.plain.data += 1
            return x.flatten(1)[:, :2]

    model = Silent()
    forward(model, IMAGES)
    assert (model.count.item(), model.plain.item()) == (3, 5)


def test_a_buffer_of_inference_mode_comes_back():
    model = restless()
    with torch.inference_mode():
        model.register_buffer("count", torch.tensor(0))
        with untouched(model), torch.inference_mode():
            model(IMAGES)
    assert model.count.item() == 0 and model.count.is_inference()


def test_a_lazy_layer_is_ready_afterwards():
    model = nn.Sequential(nn.Flatten(), nn.LazyLinear(2))
    logits = forward(model, IMAGES)
    assert type(model[1]) is nn.Linear and torch.equal(logits, forward(model, IMAGES))
    assert all(module.training for module in model.modules())


def test_lazy_layers_get_their_sizes_from_an_explanation():
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    before = [module.training for module in model.append(nn.LazyLinear(2)).modules()]
    first = explain(model, IMAGES, 0)["grad_cam"]
    assert [module.training for module in model.modules()] == before
    assert torch.equal(first, explain(model, IMAGES, 0)["grad_cam"]) and type(model[1]) is nn.BatchNorm2d


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "ignore:.*torch.jit.*:DeprecationWarning")
def test_torchscript_keeps_its_flags():
    model = torch.jit.trace(restless().eval().c1, IMAGES).train()
    with untouched(model):
        assert not model.training
    assert model.training
