"""A model of known code is recognized without comparing its operations, and whatever changes it is noticed."""

import copy
import functools
import types

import pytest
import timm
import torch
from benchmarks.interrupts import ROOT, Interrupted, differences, everything
from tests.test_replay import IMAGES, METHODS, Depends, Net, check_as_fresh, check_same
from torch import Tensor, nn
from torch.nn import functional as F

from sightline.explainers import Explainer, explain
from sightline.explainers.capture import replay, structure
from sightline.inference import untouched


def sequence():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)).eval()


def compared(monkeypatch):
    """Forwards whose operations are compared from here on."""
    begun = []
    original = replay.Replay.__init__

    def begin(self, plan, images):
        begun.append(plan)
        original(self, plan, images)

    monkeypatch.setattr(replay.Replay, "__init__", begin)
    return begun


NETWORKS = {
    "resnet": lambda: timm.create_model("test_resnet"),
    "efficientnet": lambda: timm.create_model("test_efficientnet"),
    "convnext": lambda: timm.create_model("test_convnext"),
    "sequence": sequence,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_known_model_is_not_compared_and_its_maps_are_the_same(name, monkeypatch):
    torch.manual_seed(0)
    model = NETWORKS[name]()
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    before = everything(model)
    first = explain(model, images, methods=METHODS)
    begun = compared(monkeypatch)
    for scale in (1, -1):
        fresh = copy.deepcopy(model)
        check_same(explain(model, scale * images, methods=METHODS), explain(fresh, scale * images, methods=METHODS))
    check_same(explain(model, images, methods=METHODS), first)
    assert not begun
    changed = [name for name in differences(before, everything(model)) if "random" not in name]
    assert changed == []


def test_a_model_of_other_code_is_compared(monkeypatch):
    model = Net().eval()
    explain(model, IMAGES)
    begun = compared(monkeypatch)
    explain(model, IMAGES)
    assert len(begun) == 1


class Mirrored(nn.Conv2d):
    def forward(self, x):
        return super().forward(x).flip(3)


def patched(model, monkeypatch):
    original = nn.ReLU.forward
    monkeypatch.setattr(nn.ReLU, "forward", lambda self, x: original(self, x).mT)


def patched_function(model, monkeypatch):
    monkeypatch.setattr(F, "relu", lambda x, inplace=False: torch.relu(x).flip(3))


def patched_torch(model, monkeypatch):
    original = torch.flatten
    monkeypatch.setattr(Tensor, "flatten", lambda x, *dims: original(x, *dims).flip(1))


def patched_instance(model, monkeypatch):
    original = model[2].forward
    model[2].forward = lambda x: original(x).mT


def hooked(model, monkeypatch):
    model[1].register_forward_hook(lambda module, inputs, output: output.flip(2))


def hooked_everywhere(model, monkeypatch):
    def flip(module, inputs, output):
        return output.flip(3) if isinstance(module, nn.BatchNorm2d) else None

    monkeypatch.setattr(torch.nn.modules.module, "_global_forward_hooks", {0: flip})


def changed_class(model, monkeypatch):
    model[3].__class__ = Mirrored


def replaced(model, monkeypatch):
    model[2] = nn.Sequential(nn.ReLU(), nn.Conv2d(6, 6, 1))


def strided(model, monkeypatch):
    model[3].stride = (2, 1)


def reordered(model, monkeypatch):
    children = dict(model._modules)
    model._modules.clear()
    model._modules.update({"0": children["0"], "2": children["2"], "1": children["1"]} | children)


def longer(model, monkeypatch):
    model.append(nn.Softmax(1))


CHANGES = {
    change.__name__.replace("_", " "): change
    for change in (
        patched,
        patched_function,
        patched_torch,
        patched_instance,
        hooked,
        hooked_everywhere,
        changed_class,
        replaced,
        strided,
        reordered,
        longer,
    )
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_is_compared_and_explained_as_it_is_now(change, monkeypatch):
    model = sequence()
    for _ in range(2):
        explain(model, IMAGES)
    CHANGES[change](model, monkeypatch)
    begun = compared(monkeypatch)
    check_as_fresh(model)
    assert begun


def test_a_change_without_consequences_is_compared_once(monkeypatch):
    model = sequence()
    explain(model, IMAGES)
    model[1].momentum = 0.2
    begun = compared(monkeypatch)
    for _ in range(3):
        check_as_fresh(model)
    assert len(begun) == 1


def known(monkeypatch):
    """Count the code of these tests as known."""
    sources = (Net, Counting, everything)
    roots = {source.__module__.partition(".")[0] for source in sources}
    monkeypatch.setattr(structure, "_LIBRARIES", structure._LIBRARIES | roots)


class Counting(nn.Module):
    """Writes to a buffer, or to an attribute, in each forward."""

    def __init__(self, what):
        super().__init__()
        self.what = what
        self.layers = sequence()
        self.register_buffer("largest", torch.tensor(9.0))
        self.calls = 0

    def forward(self, x):
        if self.what == "attribute":
            self.calls = self.calls + 1
        elif self.what == "buffer":
            self.largest.clamp_(min=x.amax().detach())
        return self.layers(x)


@pytest.mark.parametrize("what", ["attribute", "buffer", "nothing"])
def test_a_model_that_changes_itself_is_compared(what, monkeypatch):
    model = Counting(what)
    known(monkeypatch)
    explain(model, IMAGES)
    begun = compared(monkeypatch)
    explain(model, 100 * IMAGES)
    assert len(begun) == (what != "nothing")
    assert (model.calls, model.largest.item()) == (0, 9)


def test_a_forward_that_reads_values_is_compared(monkeypatch):
    torch.manual_seed(0)
    model = Depends().eval()
    model.before = model.behind = model.end = None
    known(monkeypatch)
    for sign in (1, -1, 1, 1, -1, -1):
        check_as_fresh(model, IMAGES.abs() * sign)


def test_a_formula_from_elsewhere_may_change_a_known_model():
    model = sequence()
    explain(model, IMAGES)

    @Explainer
    def meddling(activations, targets):
        model[1].running_mean.add_(1)
        model[1].eps = 1.0
        return activations[:, :1].expand(-1, targets.shape[1], -1, -1)

    before = everything(model)
    explain(model, IMAGES, methods=[meddling])
    assert [name for name in differences(before, everything(model)) if "random" not in name] == []


def test_forwards_behind_a_known_one_are_restored():
    model = sequence()
    explain(model, IMAGES)
    model[1].register_forward_hook(lambda module, inputs, output: setattr(module, "eps", module.eps + 1))
    before = everything(model)
    for _ in range(2):
        explain(model, IMAGES, methods=["grad_cam", "occlusion"])
        with untouched(model):
            explain(model, IMAGES, layer="3")
    assert [name for name in differences(before, everything(model)) if "random" not in name] == []


@pytest.mark.usefixtures("unchecked")
def test_an_interrupt_at_any_line_leaves_nothing_behind():
    model = sequence().train()
    model[1].eval()

    def call():
        explain(model, IMAGES)

    for _ in range(2):
        call()
    lines = Interrupted(0, ROOT)
    lines.run(call)
    before = everything(model)
    interrupts = 0
    for place in range(1, len(lines.lines) + 1, 5):
        interrupts += not Interrupted(place, ROOT).run(call)
        assert differences(before, everything(model)) == [], place
    assert interrupts > 20


def test_weights_of_another_shape_are_noticed():
    model = sequence()
    explain(model, IMAGES)
    model[3].weight = nn.Parameter(model[3].weight[:, :, 1:2, 1:2].clone())
    check_as_fresh(model)


class Switched:
    """Looks like PyTorch's, and does what a switch says."""

    is_on = False

    def __init__(self, function):
        self.function = function

    def __call__(self, *args, **kwargs):
        output = self.function(*args, **kwargs)
        return output.mT if self.is_on else output


@pytest.mark.parametrize("kind", ["wrapped method", "object in a namespace"])
def test_code_that_only_looks_known_is_compared(kind, monkeypatch):
    if kind == "wrapped method":
        kept = nn.modules.batchnorm._BatchNorm.forward
        switched = Switched(kept)
        wrapped = functools.wraps(kept)(lambda self, x: switched(self, x))
        monkeypatch.setattr(nn.modules.batchnorm._BatchNorm, "forward", wrapped)
    else:
        switched = Switched(F.batch_norm)
        monkeypatch.setattr(F, "batch_norm", switched)
    model, images = sequence(), IMAGES[..., :8, :8]
    explain(model, images)
    switched.is_on = True
    check_as_fresh(model, images)


def test_a_function_that_transformers_adds_to_all_modules_is_no_hindrance(monkeypatch):
    from transformers import ResNetConfig, ResNetForImageClassification

    size = {"embedding_size": 4, "hidden_sizes": [4, 4], "depths": [1, 1]}
    monkeypatch.delattr(nn.Module, "smart_apply", raising=False)
    ResNetForImageClassification(ResNetConfig(**size))
    assert nn.Module.smart_apply.__module__.startswith("transformers")
    model = sequence()
    explain(model, IMAGES)
    begun = compared(monkeypatch)
    explain(model, IMAGES)
    assert not begun


def test_code_of_no_module_is_not_known():
    anonymous = types.FunctionType((lambda x: x).__code__, {})
    assert anonymous.__module__ is None and not structure.is_known_code(anonymous)
    for known in (nn.ReLU.forward, F.relu, torch.relu, property(F.relu), functools.partial(F.relu), copy.copy):
        assert structure.is_known_code(known)
    for wrap in (staticmethod, classmethod, property, functools.partial, functools.cache, functools.wraps(F.relu)):
        assert not structure.is_known_code(wrap(anonymous))


def test_each_map_has_memory_of_its_own():
    images = IMAGES.repeat(2, 1, 1, 1)
    explanation = explain(
        sequence(), images, torch.tensor([[0, 1]] * len(images)), ["center_map", "edge_map", "eigen_cam"]
    )
    for values in explanation.maps.values():
        before = values.clone()
        values[0, 0] = 7
        assert (values[0, 0] == 7).all() and torch.equal(values[1:], before[1:])
        assert torch.equal(values[0, 1], before[0, 1])


def test_verdicts_asked_for_later_are_those_of_then():
    explanation = explain(sequence(), IMAGES, torch.tensor([[0, 1]] * len(IMAGES)))
    explanation.targets.zero_()
    assert explanation.unchecked == ()


class Resizing(nn.Module):
    def __init__(self):
        super().__init__()
        self.inside = sequence().train()
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, x):
        self.seen.resize_(7)
        return self.inside(x)


def test_flags_come_back_even_if_values_cannot():
    model = Resizing()
    with pytest.raises(RuntimeError):
        explain(model, IMAGES)
    assert all(module.training for module in model.modules())
