"""A forward that was analyzed before is recognized by its operations, and whatever changes one is noticed."""

import copy
import gc
import threading
import weakref

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from sightline.explainers import explain
from sightline.explainers.capture import replay
from sightline.explainers.capture.features import LastFeatures, Watch
from sightline.inference.operations import unseen

IMAGES = torch.randn(2, 3, 12, 8, generator=torch.Generator().manual_seed(1))
METHODS = ("grad_cam", "layer_cam", "activation_map")


class Net(nn.Module):
    """Three convolutions and a linear layer, with attributes that steer the forward."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(inplace=True))
        self.last = nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Linear(6, 4)
        self.before = self.behind = self.end = lambda x: x

    def forward(self, images):
        x = self.before(self.stem(images))
        x = self.behind(self.last(self.body(x)))
        return self.end(self.head(x.mean((2, 3))))


def net():
    torch.manual_seed(0)
    return Net().eval()


def analyses(monkeypatch):
    """The analyses of forwards from here on."""
    begun = []
    for kind in (Watch, LastFeatures):
        original = kind.__init__

        def begin(self, *args, original=original, kind=kind, **options):
            begun.append(kind)
            original(self, *args, **options)

        monkeypatch.setattr(kind, "__init__", begin)
    return begun


def all_of(explanation):
    texts = explanation.layers, explanation.verdicts, explanation.notices, explanation.unchecked
    return {**explanation.maps, "logits": explanation.logits, "targets": explanation.targets}, texts


def check_same(one, other):
    (tensors, texts), (expected, expected_texts) = all_of(one), all_of(other)
    assert texts == expected_texts
    assert tensors.keys() == expected.keys()
    for name, value in tensors.items():
        assert torch.equal(value, expected[name]), name


def check_as_fresh(model, images=IMAGES, **options):
    """Maps of the model are those of its copy, which has no past."""
    check_same(
        explain(model, images, methods=METHODS, **options),
        explain(copy.deepcopy(model), images, methods=METHODS, **options),
    )


NETWORKS = {
    "resnet": lambda: timm.create_model("test_resnet"),
    "efficientnet": lambda: timm.create_model("test_efficientnet"),
    "convnext": lambda: timm.create_model("test_convnext"),
    "byobnet": lambda: timm.create_model("test_byobnet"),
    "vit": lambda: timm.create_model("test_vit"),
    "squeezenet": lambda: torchvision.models.squeezenet1_1(),
    "densenet": lambda: torchvision.models.DenseNet(8, (2, 2), 16),
    "own": net,
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("layer", [None, "first"])
def test_the_second_explanation_is_the_first_bit_for_bit(name, layer):
    torch.manual_seed(0)
    model = NETWORKS[name]().eval()
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    if layer is not None:
        layer = next(name for name, module in model.named_modules() if isinstance(module, nn.Conv2d))
    first = explain(model, images, methods=METHODS, layer=layer)
    for _ in range(2):
        check_same(explain(model, images, methods=METHODS, layer=layer), first)


@pytest.mark.parametrize("layer", [None, "last", ["body", "last"]])
def test_only_the_first_forward_is_analyzed(layer, monkeypatch):
    model, begun = net(), analyses(monkeypatch)
    first = explain(model, IMAGES, layer=layer)
    assert begun
    begun.clear()
    check_same(explain(model, IMAGES, layer=layer), first)
    explain(model, IMAGES + 1, 2, ["layer_cam", "cam"] if layer is None else ["grad_cam"], layer)
    assert not begun


def test_other_weights_are_read_without_another_analysis(monkeypatch):
    model = net()
    explain(model, IMAGES)
    with torch.no_grad():
        model.last.weight.mul_(-2)
    begun = analyses(monkeypatch)
    first = explain(model, IMAGES)
    assert not begun
    check_same(first, explain(copy.deepcopy(model), IMAGES))
    assert begun


class Flipped(nn.Conv2d):
    def forward(self, x):
        return super().forward(x).flip(3)


class Alpha(nn.Module):
    def forward(self, x):
        return x.transpose(2, 3)


def patched(model):
    original = model.body.forward
    model.body.forward = lambda x: original(x).mT.contiguous()


def hooked(model):
    model.body.register_forward_hook(lambda module, inputs, output: output.flip(2))


def hooked_before(model):
    model.last.register_forward_pre_hook(lambda module, inputs: (inputs[0].mT,))


def set_to(**attributes):
    def change(model):
        for name, value in attributes.items():
            setattr(model, name, value)

    return change


def replaced(model):
    model.body[1] = nn.Sequential(nn.ReLU(), Alpha())


def flipped(model):
    layer = Flipped(6, 6, 3, padding=1)
    layer.load_state_dict(model.last.state_dict())
    model.last = layer


def changed_class(model):
    model.last.__class__ = Flipped


def parametrized(model):
    parametrizations.weight_norm(model.last)


def renamed(model):
    model.final = model.last
    del model.last
    model.forward = lambda images: model.head(model.final(model.body(model.stem(images))).mean((2, 3)))


def wider(model):
    model.body[0], model.last = nn.Conv2d(6, 9, 3, padding=1), nn.Conv2d(9, 6, 3, padding=1)


def double(model):
    model.double()


def training(model):
    model.train()


def another_head(model):
    model.head = nn.Linear(6, 7)


def convolution_behind(model):
    model.add_module("more", nn.Conv2d(6, 6, 1))
    model.behind = model.more


def another_branch(model):
    model.body.register_forward_hook(lambda module, inputs, output: setattr(model, "kept", output))
    model.end = lambda logits: logits + model.kept.mean((2, 3))[:, :4]


CHANGES = {
    "mirrored before the layer": set_to(before=lambda x: x.flip(3)),
    "rows and columns exchanged": set_to(before=lambda x: x.mT),
    "mirrored behind the layer": set_to(behind=lambda x: x.flip(3)),
    "channels last behind the layer": set_to(behind=lambda x: x.permute(0, 2, 3, 1).mT.mT.permute(0, 3, 1, 2)),
    "a softmax at the end": set_to(end=lambda x: x.softmax(1)),
    "a sigmoid at the end": set_to(end=lambda x: x.sigmoid()),
    "one logit": set_to(end=lambda x: x[:, :1]),
    "a dictionary": set_to(end=lambda x: {"other": x.new_zeros(2, 3, 4), "logits": 2 * x}),
    "gradients switched off inside": set_to(before=torch.no_grad()(lambda x: x * 2)),
    "a forward patched": patched,
    "a hook": hooked,
    "a hook before": hooked_before,
    "a child replaced": replaced,
    "the layer replaced": flipped,
    "the class of the layer": changed_class,
    "a parametrization": parametrized,
    "a layer renamed": renamed,
    "other widths": wider,
    "training mode": training,
    "another head": another_head,
    "a convolution behind": convolution_behind,
    "another branch": another_branch,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("layer", [None, "body.0"])
def test_a_changed_model_is_explained_as_it_is_now(change, layer):
    model = net()
    for _ in range(2):
        explain(model, IMAGES, layer=layer)
    CHANGES[change](model)
    fresh = net()
    CHANGES[change](fresh)
    fresh.load_state_dict(model.state_dict())
    expected = explain(fresh, IMAGES, methods=METHODS, layer=layer)
    for _ in range(2):
        check_same(explain(model, IMAGES, methods=METHODS, layer=layer), expected)


def test_a_function_of_pytorch_that_was_replaced_is_noticed(monkeypatch):
    model = net()
    explain(model, IMAGES)
    monkeypatch.setattr(F, "relu", lambda x, inplace=False: torch.relu(x).flip(3))
    check_as_fresh(model)


def test_another_size_type_or_memory_format_of_images_is_explained():
    model = net()
    for images in (IMAGES, IMAGES.mT, IMAGES[:1], IMAGES.to(memory_format=torch.channels_last), IMAGES[:, :, 2:]):
        for _ in range(2):
            check_as_fresh(model, images)
    model.double()
    check_as_fresh(model, IMAGES.double())


def test_a_layer_whose_output_is_rewritten_later_is_read_as_it_was():
    model = net()

    def forward(images):
        x = model.stem(images)
        y = model.body[1](x)  # in place: the same tensor
        x.mul_(-1)
        return model.head(model.last(y.abs()).mean((2, 3)))

    model.forward = forward
    first = explain(model, IMAGES, methods=METHODS, layer="body.1")
    assert first["activation_map"].min() >= 0
    check_same(explain(model, IMAGES, methods=METHODS, layer="body.1"), first)


@pytest.mark.parametrize("layer", [None, "body.0"])
def test_gradients_reach_the_layer_each_time_though_the_model_switches_them_off(layer):
    model = net()
    model.behind = torch.no_grad()(lambda x: 2 * x)
    first = explain(model, IMAGES, methods=METHODS, layer=layer)
    assert first["grad_cam"].any()
    check_same(explain(model, IMAGES, methods=METHODS, layer=layer), first)


class Depends(Net):
    """Exchanges rows and columns of bright images."""

    def forward(self, images):
        x = self.stem(images)
        if images.mean() > 0:
            x = x.mT
        return self.head(self.last(self.body(x)).mean((2, 3)))


def test_a_forward_that_depends_on_the_image_is_analyzed_where_it_differs():
    torch.manual_seed(0)
    model = Depends().eval()
    for sign in (1, -1, 1, 1, -1, -1, 1, -1):
        check_as_fresh(model, IMAGES.abs() * sign)


def test_a_forward_that_varies_is_no_longer_compared():
    model = net()
    turns = iter(range(100))
    model.before = lambda x: x.flip(3) if next(turns) % 2 else x
    for _ in range(8):
        explain(model, IMAGES)
    assert next(turns) == 8 + replay._MOST_MISSES


class Returns(nn.Conv2d):
    """Returns one of two maps of the same shape."""

    mirrored = False

    def forward(self, x):
        x = super().forward(x)
        return (x, x.flip(3))[self.mirrored]


class Branches(Net):
    """The operations are always the same, on other tensors or in other modules."""

    swapped = ""

    def __init__(self):
        super().__init__()
        self.more, self.last = (Returns(6, 6, 3, padding=1) for _ in range(2))

    def forward(self, images):
        x = self.stem(images)
        x = (self.body(x), x.flip(3))[self.swapped == "input"]
        self.last.mirrored = self.swapped == "result"
        for layer in (self.last, self.more) if self.swapped == "order" else (self.more, self.last):
            x = layer(x)
        logits = self.head(x.mean((2, 3)))
        return (logits, logits.softmax(1))[self.swapped == "answer"]


@pytest.mark.parametrize("layer", [None, "last"])
@pytest.mark.parametrize("swapped", ["input", "result", "order", "answer"])
def test_the_same_operations_on_other_tensors_are_noticed(swapped, layer):
    torch.manual_seed(0)
    model = Branches().eval()
    explain(model, IMAGES, layer=layer)
    model.swapped = swapped
    check_as_fresh(model, layer=layer)
    model.swapped = ""
    check_as_fresh(model, layer=layer)


class Repeats(Net):
    times = 1

    def forward(self, images):
        x = self.body(self.stem(images))
        for _ in range(self.times):
            x = self.last(x)
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("times", [0, 2])
def test_errors_are_those_of_the_first_time(times):
    torch.manual_seed(0)
    model = Repeats().eval()
    explain(model, IMAGES, layer="last")
    model.times = times
    with pytest.raises(ValueError, match="never called" if times == 0 else "runs once"):
        explain(model, IMAGES, layer="last")


def test_another_output_is_noticed():
    model = net()
    model.end = lambda logits: (logits, logits.softmax(1).log())
    explain(model, IMAGES, output=0)
    check_same(explain(model, IMAGES, output=1), explain(copy.deepcopy(model), IMAGES, output=1))
    model.end = lambda logits: dict(logits=logits.softmax(1), other=logits)
    explain(model, IMAGES)
    model.end = lambda logits: dict(other=logits.softmax(1), logits=logits)
    check_same(explain(model, IMAGES), explain(copy.deepcopy(model), IMAGES))


def test_nothing_is_written_on_the_model_and_nothing_keeps_it_alive():
    model = net()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    for _ in range(3):
        explain(model, IMAGES)
    assert all(vars(module) == before[name] for name, module in model.named_modules())
    assert model in replay._PLANS
    alive = weakref.ref(model)
    del model, before
    gc.collect()
    assert alive() is None


def test_plans_are_few():
    model = net()
    for size in range(4, 4 + 2 * replay._MOST_PLANS):
        explain(model, torch.ones(1, 3, 4, size))
    assert len(replay._PLANS[model].by_call) == replay._MOST_PLANS


def test_threads_may_use_one_plan():
    model = net()
    expected = explain(model, IMAGES)
    results = []
    threads = [threading.Thread(target=lambda: results.append(explain(model, IMAGES))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    for result in results:
        check_same(result, expected)


def test_an_interrupted_explanation_leaves_no_plan_that_is_wrong():
    model = net()

    def stop(x):
        raise KeyboardInterrupt

    model.behind = stop
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            explain(model, IMAGES)
    model.behind = lambda x: x
    check_as_fresh(model)
    model.behind = stop
    with pytest.raises(KeyboardInterrupt):
        explain(model, IMAGES)
    model.behind = lambda x: x
    check_as_fresh(model)


def test_arguments_that_cannot_be_compared_are_not_recorded(monkeypatch):
    model = net()
    model.before = lambda x: torch.einsum("bchw->bchw", x) * Scale(2)
    begun = analyses(monkeypatch)
    for _ in range(2):
        begun.clear()
        explain(model, IMAGES)
        assert begun


class Scale(float):
    """A number of a kind of its own."""


def test_modes_see_operations_again_after_an_interrupt_hid_them():
    model = net()

    def hide(x):
        unseen().__enter__()  # as if the interrupt came before its end
        raise KeyboardInterrupt

    model.behind = hide
    with pytest.raises(KeyboardInterrupt):
        explain(model, IMAGES)
    model.behind = lambda x: x
    check_as_fresh(model)
    with Watch(IMAGES, cut=True) as watch:
        assert watch.positions.knows(IMAGES + 1)
