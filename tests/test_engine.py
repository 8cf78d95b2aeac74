"""One engine for any classifier: outputs, layouts, wrappers, targets, graphs; and the model is left alone."""

import gc
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import timm
import torch
import torchvision
from tests.same import assert_same_state, close, state_of
from torch import nn
from torch.nn import functional as F

import sightline.explainers as explainers
from sightline.explainers import EXPLAINERS, attention_maps, explain
from sightline.explainers import evidence as engine
from sightline.testing import PlantedAttention, PooledModel

CAMS = [
    "cam",
    "grad_cam",
    "grad_cam_plus_plus",
    "xgrad_cam",
    "layer_cam",
    "hires_cam",
    "eigen_cam",
    "finer_cam",
    "activation_map",
]
QUICK = {
    "rise": partial(explainers.rise, masks=6, cells=3),
    "occlusion": partial(explainers.occlusion, patch=32, stride=32),
    "score_cam": partial(explainers.score_cam, channels=3),
    "integrated_gradients": partial(explainers.integrated_gradients, steps=2),
    "smooth_grad": partial(explainers.smooth_grad, samples=2),
    "var_grad": partial(explainers.var_grad, samples=2),
}


def seeded(build, *arguments, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build(*arguments, **options)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 1.5)
        return model


class Net(nn.Module):
    """Two convolutions, global average pooling and a linear layer; `end` is what becomes of the logits."""

    def __init__(self, end=lambda logits: logits, channels=3, classes=5):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.fc = nn.Linear(8, classes)
        self.end = end

    def features(self, x):
        return self.conv2(self.conv1(x).relu()).relu()

    def forward(self, x):
        return self.end(self.fc(self.features(x).mean((2, 3))))


class Volume(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv3d(2, 4, 3, padding=1)
        self.pool = nn.AdaptiveAvgPool3d(1)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(self.pool(self.conv(x).relu()).flatten(1))


class ChannelsLast(nn.Module):
    """As Swin does it: (b, h, w, c) from the patches to the head."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 2, stride=2)
        self.norm = nn.LayerNorm(8)
        self.mlp = nn.Linear(8, 8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.patches(x).permute(0, 2, 3, 1)
        return self.fc((x + self.mlp(self.norm(x))).mean((1, 2)))


class Tokens(nn.Module):
    """A class token, patches, and an attention that carries what the patches say to the class token."""

    def __init__(self, depth=6, prefix=1):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 2, stride=2)
        self.prefix = nn.Parameter(torch.randn(1, prefix, 8))
        block = partial(nn.TransformerEncoderLayer, 8, 2, 16, 0.0, norm_first=True, batch_first=True)
        self.blocks = nn.ModuleList(block() for _ in range(depth))
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.patches(x).flatten(2).mT
        x = torch.cat([self.prefix.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return self.fc(x[:, 0])


class Twice(nn.Module):
    """One rectifier, used twice."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(self.relu(self.conv2(self.relu(self.conv1(x)))).mean((2, 3)))


@pytest.fixture
def images():
    return torch.randn(3, 3, 8, 6, generator=torch.Generator().manual_seed(1))


# --- one forward, one backward ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_closed_form_of_a_pooled_linear_head_is_the_backward(dtype, images, monkeypatch):
    model, images = seeded(Net).to(dtype).eval(), images.to(dtype)
    targets = torch.tensor([[0, 4, 2], [1, 1, 3], [2, 0, 0]])
    methods = [name for name in CAMS if name != "cam"]
    fast = explain(model, images, targets, methods)
    monkeypatch.setattr("sightline.explainers.capture.Captured.head", lambda self, logits: None)
    slow = explain(model, images, targets, methods)
    assert slow.layer == fast.layer
    assert all(close(slow[name], fast[name]) for name in methods) and fast["hires_cam"].abs().max() > 0


@pytest.mark.parametrize(
    "head",
    [
        lambda self, x: self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1)),
        lambda self, x: self.fc(x.flatten(2).mean(-1)),
        lambda self, x: self.fc(F.avg_pool2d(x, (4, 3)).flatten(1)),
        lambda self, x: F.linear(x.mean([-1, -2]), self.fc.weight),
        lambda self, x: self.fc(x.mean((2, 3)).view(len(x), -1)),
    ],
)
def test_a_head_that_pools_is_recognized(head, images):
    model = seeded(Net).eval()
    model.forward = lambda x: head(model, model.features(x))
    model.requires_grad_(False)
    found = explain(model, images, 2, ["cam", "hires_cam"], layer=None)
    assert close(found["cam"] / 12, found["hires_cam"])


@pytest.mark.parametrize(
    "head",
    [
        lambda self, x: self.fc(x.mean((2, 3)).relu()),
        lambda self, x: self.fc(x.amax((2, 3))),
        lambda self, x: self.fc(x.mean((2, 3))) + x.mean((1, 2, 3))[:, None],
        lambda self, x: self.fc(x.mean((2, 3)) - x[:, :, :2].mean((2, 3))),
        lambda self, x: self.fc(x.mean((2, 3)) * 2),
        lambda self, x: F.linear(x.flatten(2)[:, :, :8].mean(1), self.fc.weight),
        lambda self, x: self.fc(F.avg_pool2d(x, 3).flatten(1)),  # of 4 rows
        lambda self, x: self.fc(F.avg_pool2d(x, (4, 3), stride=9, padding=1).flatten(1)),
        lambda self, x: self.fc(F.avg_pool2d(x, (4, 3), divisor_override=1).flatten(1)),
    ],
)
def test_a_head_that_does_more_is_not_taken_for_one(head, images, unchecked):
    model = seeded(Net).eval()
    model.forward = lambda x: head(model, model.features(x))
    with pytest.raises(ValueError, match="expected global average pooling and one linear layer"):
        explain(model, images, 2, ["cam"])


def test_a_fixed_pooling_of_a_larger_image_is_not_the_mean():
    """As in DenseNets and old ResNets: 7 x 7 of 8 x 8 positions."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.AvgPool2d(7), nn.Flatten(), nn.Linear(6, 5))
    images = torch.randn(2, 3, 8, 8)
    features = model[:2](images).detach().requires_grad_()
    gradient = torch.autograd.grad(model[2:](features)[:, 1].sum(), features)[0]
    found = explain(model, images, 1, ["hires_cam"])["hires_cam"]
    assert close((gradient * features).sum(1, keepdim=True).detach(), found) and not found[..., 7].any()
    assert close(
        7**2 * explain(model, images[..., :7, :7], 1, ["hires_cam"])["hires_cam"],
        explain(model, images[..., :7, :7], 1, ["cam"])["cam"],
    )


def test_a_head_of_a_channels_last_model_is_recognized(images):
    model = seeded(Net).eval()
    model.forward = lambda x: model.fc(F.adaptive_avg_pool2d(model.features(x), 1).flatten(1))
    expected = explain(model, images, 1, ["cam"])["cam"]
    found = explain(model.to(memory_format=torch.channels_last), images, 1, ["cam"])["cam"]
    assert close(expected, found)


PASSES = [  # network, layer, targets, methods: forwards, backwards
    (Net, None, 1, CAMS, (1, 0)),
    (Net, "conv1", 1, ["activation_map", "eigen_cam"], (1, 0)),
    (Net, "conv1", 1, ["grad_cam", "hires_cam", "layer_cam"], (1, 1)),
    (Net, ["conv1", "conv2"], 1, ["grad_cam", "xgrad_cam"], (1, 1)),
    (Net, "conv1", 1, ["grad_cam", "finer_cam"], (1, 2)),
    (Net, None, 1, ["saliency", "input_x_gradient"], (1, 1)),
    (Net, "conv1", 1, ["saliency", "grad_cam", "guided_backprop", "guided_grad_cam"], (1, 2)),
    (Net, "conv1", 1, ["saliency", "guided_backprop", "deconvolution"], (1, 3)),
    (Net, None, 1, ["lrp"], (2, 1 + 3)),  # the rule of each of three layers transposes it
    ("Deep", None, 1, ["activation_map", "eigen_cam"], (1, 0)),
    ("Deep", None, 1, ["grad_cam"], (1, 2)),  # the second for the class check
    ("Deep", None, 1, CAMS[1:], (1, 2)),
    ("Deep", None, 2, ["grad_cam"], (1, 1)),
    (Tokens, None, 1, ["activation_map"], (1, 1)),  # which tokens feed the logits
    (Tokens, None, 1, ["grad_cam"], (1, 3)),
    (Tokens, "blocks.3", 1, ["grad_cam"], (1, 1)),
    (Tokens, None, 1, ["attention_rollout"], (2, 0)),
    (Tokens, None, 1, ["gradient_rollout"], (2, 1)),
]


@pytest.mark.parametrize(("build", "layer", "targets", "methods", "passes"), PASSES)
def test_forwards_and_backwards_are_as_few_as_the_docs_say(build, layer, targets, methods, passes, images, monkeypatch):
    model = seeded(Net if build == "Deep" else build).eval()
    if build == "Deep":
        model.forward = lambda x: model.fc(model.features(x).mean((2, 3)).relu())
    forwards, backwards, grad = [], [], torch.autograd.grad
    model.register_forward_pre_hook(lambda module, inputs: forwards.append(len(inputs[0])))
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: backwards.append(1) or grad(*a, **k))
    explain(model, images, torch.tensor([[0, 2]] * 3)[:, :targets], methods, layer)
    assert (len(forwards), len(backwards)) == passes


def test_memory_is_bounded_by_all_layers_together(images, monkeypatch):
    model, every = seeded(Net).eval(), torch.arange(4).expand(3, -1)
    requests = [("conv1", frozenset({"gradients"})), ("conv2", frozenset({"gradients"}))]
    gathered = engine.gather(model, images, requests, every)
    monkeypatch.setattr(engine, "_LARGEST_BLOCK", 3 * sum(place.activations.numel() for place in gathered.places))
    assert [block[0].gradients.shape[1] for block in gathered.blocks()] == [3, 1]


@pytest.mark.parametrize("order", [(1, 0, 2), (0, 2, 1), (2, 1, 0)])
def test_the_rival_is_the_highest_class_but_the_target(order, images):
    """Three classes: where the highest other one and the lowest have other maps, it matters which is the rival."""
    model = seeded(Net, classes=3).double().eval()
    low, middle, high = order
    model.fc.bias.data[low], model.fc.bias.data[high] = -9, 9
    images = images.double()
    features = model.features(images).detach()
    weights = model.fc.weight.detach() / 12
    for target, rival in ((low, high), (middle, high), (high, middle)):
        slow = torch.einsum("k,bkhw->bhw", weights[target] - weights[rival], features).relu()
        assert close(slow[:, None], explain(model, images, target, ["finer_cam"])["finer_cam"])
    for same in (low, high):  # who shares the map of the middle class
        with torch.no_grad():
            model.fc.weight.copy_(torch.randn(3, 8, generator=torch.Generator().manual_seed(5)))
            model.fc.weight[same] = 2 * model.fc.weight[middle]
        found = explain(model, images, middle, ["hires_cam"])
        assert ["class-independent" in said for said in found.verdicts["hires_cam"]] == [same == high] * 3


def test_a_thousand_classes_are_those_of_one_call_each(images):
    model = seeded(Net, classes=1000).eval()
    every = torch.arange(1000).expand(3, -1)
    found = explain(model, images, every, CAMS)
    for target in (0, 413, 999):
        one = explain(model, images, target, CAMS)
        assert all(close(one[name][:, 0], found[name][:, target]) for name in CAMS)


@pytest.mark.parametrize("layer", [None, "conv1"])
def test_targets_in_blocks_are_all_targets_at_once(layer, images, monkeypatch):
    model = seeded(Net).eval()
    methods = [*CAMS[1:], "saliency", "guided_backprop", "guided_grad_cam", "deconvolution", "score_cam"]
    targets = torch.tensor([[0, 1, 2, 3, 4]] * 3)
    whole = explain(model, images, targets, methods, layer)
    monkeypatch.setattr(engine, "_LARGEST_BLOCK", 2 * 20 * images.numel())
    blocks = explain(model, images, targets, methods, layer)
    assert all(close(whole[name], blocks[name]) for name in methods) and whole["grad_cam"].shape[1] == 5


@pytest.mark.parametrize("method", [name for name in EXPLAINERS if name not in ("attention", "random_map")])
def test_targets_and_images_together_are_one_call_each(method, images):
    model = seeded(Tokens) if "rollout" in method else seeded(Net)
    if method in QUICK:
        method = partial(explainers.occlusion, patch=3, stride=2) if method == "occlusion" else QUICK[method]
    name = explainers.named(method)[0]
    model, images = model.double().eval(), images.double()
    targets = torch.tensor([[0, 3], [1, 1], [4, 2]])
    together = explain(model, images, targets, [method], batch_size=4)[name]
    for i in range(3):
        for t in range(2):
            alone = explain(model, images[i : i + 1], int(targets[i, t]), [method])[name]
            assert close(alone[0, 0], together[i, t])


# --- any classifier --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "end",
    [
        lambda z: (z, torch.zeros(3)),
        lambda z: [z],
        lambda z: {"logits": z, "loss": z.sum()},
        lambda z: {"loss": z.sum(), "scores": z},
        lambda z: SimpleNamespace(logits=z, hidden_states=None),
        lambda z: z.softmax(1),
        lambda z: F.log_softmax(z, dim=-1),
        lambda z: torch.sigmoid(z),
        lambda z: {"logits": z.softmax(1)},
    ],
)
def test_whatever_the_model_returns_the_logits_are_explained(end, images):
    plain, dressed = seeded(Net).eval(), seeded(Net, end).eval()
    methods = [*CAMS, "saliency", "lrp", QUICK["integrated_gradients"]]
    expected, found = explain(plain, images, methods=methods), explain(dressed, images, methods=methods)
    assert all(torch.equal(expected.maps[name], found.maps[name]) for name in expected.maps)
    assert torch.equal(expected.logits, found.logits) and torch.equal(expected.targets, found.targets)


@pytest.mark.parametrize("end", [torch.sigmoid, lambda z: {"logits": z.sigmoid()}, lambda z: z.softmax(1)])
def test_a_probability_is_what_the_model_says(end, images):
    """Several labels, each with a sigmoid of its own: no softmax makes a choice of them."""
    model, every = seeded(Net, end).eval(), torch.arange(5).expand(3, -1)
    found = explain(model, images, every, [QUICK["rise"]])
    own = explain(
        model, images, lambda output: output["logits"] if isinstance(output, dict) else output, [QUICK["rise"]]
    )
    for one, other in zip(found.maps.values(), own.maps.values(), strict=True):
        assert close(other, one)
    single = seeded(Net, torch.sigmoid, classes=1).eval()
    one, other = (explain(single, images, asked, [QUICK["rise"]]) for asked in (1, lambda output: output))
    assert close(*one.maps.values(), *other.maps.values())


@pytest.mark.parametrize("end", [lambda z: z, lambda z: z[:, 0], torch.sigmoid])
def test_a_single_logit_is_two_classes(end, images):
    model, plain = seeded(Net, end, classes=1).eval(), seeded(Net, classes=1).eval()
    z = plain(images)[:, 0].detach()
    methods = ["grad_cam", "hires_cam", "input_x_gradient", "lrp"]
    up, down, best = (explain(model, images, target, methods) for target in (1, 0, None))
    features = plain.features(images).detach()
    slow = plain.fc.weight[0, :, None, None].detach() * features / 12
    assert close(slow.sum(1, keepdim=True), up["hires_cam"]) and close(slow.sum(1, keepdim=True).relu(), up["grad_cam"])
    assert all(close(-up[name], down[name]) for name in ("hires_cam", "input_x_gradient", "lrp"))
    assert best.targets[:, 0].tolist() == (z > 0).long().tolist()
    assert close(best.logits.softmax(1)[:, 1], z.sigmoid())


def test_a_function_of_the_output_is_a_target(images):
    """A segmentation network: the score is the sum of one class's map over a region."""

    class Segmenter(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 1)

        def forward(self, x):
            return {"out": self.conv2(self.conv1(x).relu())}

    model = seeded(Segmenter).double().eval()
    region = torch.zeros(8, 6, dtype=torch.float64)
    region[2:5, 1:4] = 1
    images = images.double()

    def score(output):
        return (output["out"][:, 2] * region).sum((1, 2))

    found = explain(model, images, score, ["hires_cam", "saliency", QUICK["integrated_gradients"]], layer="conv1")
    leaf = model.conv1(images).detach().requires_grad_()
    gradient = torch.autograd.grad(score({"out": model.conv2(leaf.relu())}).sum(), leaf)[0]
    assert close((gradient * leaf).sum(1, keepdim=True).detach(), found["hires_cam"])
    assert found["saliency"].shape == (3, 1, 8, 6)
    both = explain(model, images, lambda o: o["out"].mean((2, 3))[:, :2], ["hires_cam"], layer="conv1")
    assert both["hires_cam"].shape == (3, 2, 8, 6) and both.targets.tolist() == [[-1, -1]] * 3


@pytest.mark.parametrize("channels", [1, 4])
def test_images_of_other_channels(channels):
    model = seeded(Net, channels=channels).eval()
    images = torch.randn(2, channels, 8, 6)
    methods = [*CAMS, "saliency", "smooth_grad", "lrp_epsilon_gamma_box", "edge_map", "contrast_map"]
    found = explain(model, images, 1, methods)
    assert {tuple(value.shape[:2]) for value in found.maps.values()} == {(2, 1)}


def test_volumes():
    model = seeded(Volume).double().eval().requires_grad_(False)
    images = torch.randn(2, 2, 4, 6, 5, dtype=torch.float64)
    methods = [*CAMS, "saliency", "integrated_gradients", "guided_grad_cam", "lrp"]
    methods += ["center_map", "random_map", "edge_map", "contrast_map"]
    found = explain(model, images, 1, methods)
    assert found.layer == "input of adaptive_avg_pool3d (4 x 4 x 6 x 5)"
    features = model.conv(images).relu()
    assert close((model.fc.weight[1, :, None, None, None] * features).sum(1, keepdim=True), found["cam"])
    assert found["saliency"].shape == found["guided_grad_cam"].shape == (2, 1, 4, 6, 5)
    assert found.resized((8, 12, 10))["cam"].shape == (2, 1, 8, 12, 10)


def test_channels_last_stages_read_like_channels_first():
    model = seeded(ChannelsLast).double().eval()
    images = torch.randn(2, 3, 8, 12, dtype=torch.float64)
    found = explain(model, images, 1, ["cam", "hires_cam", "grad_cam@norm", "activation_map@mlp"])
    assert found.layers["cam"] == found.layer and found["cam"].shape == (2, 1, 4, 6)
    model.requires_grad_(False)
    x = model.patches(images).permute(0, 2, 3, 1)
    x = x + model.mlp(model.norm(x))
    assert close((x @ model.fc.weight[1])[:, None], found["cam"]) and close(found["cam"] / 24, found["hires_cam"])
    mlp = model.mlp(model.norm(model.patches(images).permute(0, 2, 3, 1)))
    assert close(mlp.norm(dim=3), found["activation_map@mlp"][:, 0])


@pytest.mark.parametrize("prefix", [1, 2, 5])
def test_tokens_of_patches_are_a_map_whatever_stands_before_them(prefix):
    model = seeded(Tokens, prefix=prefix).double().eval()
    images = torch.randn(2, 3, 8, 12, dtype=torch.float64)
    automatic = explain(model, images, 1, ["hires_cam", "grad_cam"])
    assert automatic.layer == "blocks.5.norm1 (8 x 4 x 6)"  # behind it only the class token feeds the logits
    kept = []
    handle = model.blocks[5].norm1.register_forward_hook(lambda m, i, o: kept.append(o))
    score = model(images)[:, 1].sum()
    handle.remove()
    gradient = torch.autograd.grad(score, kept[0])[0]
    slow = (gradient * kept[0]).sum(2)[:, prefix:].reshape(2, 1, 4, 6).detach()
    assert close(slow, automatic["hires_cam"])


class Biased(Tokens):
    """Attention with a learned bias (1, heads, n, n), as BEiT has: with one image in the batch it looks like a map."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.randn(1, 2, 25, 25))

    def forward(self, x):
        x = self.patches(x).flatten(2).mT
        x = torch.cat([self.prefix.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            q, k, v = (part.unflatten(2, (2, 4)).transpose(1, 2) for part in (block.norm1(x), x, x))
            x = block.norm2(x + ((q @ k.mT + self.bias).softmax(3) @ v).transpose(1, 2).flatten(2))
            x = x + block.linear2(block.linear1(x).relu())
        return self.fc(x.mean(1))


@pytest.mark.parametrize("batch", [1, 2])
def test_a_bias_of_attention_is_no_feature_map(batch):
    images = torch.randn(batch, 3, 8, 12)
    assert explain(seeded(Biased).eval(), images, 1).layer == "blocks.5.norm2 (8 x 4 x 6)"


def test_a_head_of_zeros_reads_the_last_tokens():
    model = seeded(Tokens).eval()
    nn.init.zeros_(model.fc.weight)
    found = explain(model, torch.randn(1, 3, 8, 12), 1)
    assert found.layer == "blocks.5 (8 x 4 x 6)" and found.verdicts["grad_cam"] == [["flat"]]


def test_a_layer_used_twice_is_chosen_by_call(images, unchecked):
    model = seeded(Twice).eval()
    message = r"'relu', which the forward calls 2 times \(call=0 yields 6 x 8 x 6, call=1 yields 8 x 4 x 3\); .* call="
    with pytest.raises(ValueError, match=message):
        explain(model, images, 1, layer="relu")
    with pytest.raises(ValueError, match=r"expected call= of 'relu' in 0..1, got 2"):
        explain(model, images, 1, layer="relu", call=2)
    first, second = (explain(model, images, 1, ["hires_cam"], layer="relu", call=call) for call in (0, 1))
    a = model.conv1(images).relu().detach().requires_grad_()
    b = model.conv2(a).relu()
    ga, gb = torch.autograd.grad(model.fc(b.mean((2, 3)))[:, 1].sum(), (a, b))
    assert close((a * ga).sum(1, keepdim=True).detach(), first["hires_cam"])
    assert close((b * gb).sum(1, keepdim=True).detach(), second["hires_cam"])
    lost = explain(model, images, 1, ["ablation_cam"], layer="relu", call=0)["ablation_cam"]
    with torch.no_grad():
        y = model(images)[:, 1]
        others = [a * (torch.arange(6) != k)[:, None, None] for k in range(6)]
        without = [model.fc(model.conv2(kept).relu().mean((2, 3)))[:, 1] for kept in others]
        shares = torch.stack([(y - less) / y for less in without], 1)
    assert close(torch.einsum("bk,bkhw->bhw", shares, a.detach()).relu()[:, None], lost)


def test_distributed_models_are_looked_through(images):
    model = seeded(Net).eval()
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    try:
        wrapped = explain(nn.parallel.DistributedDataParallel(model), images, 1, CAMS)
    finally:
        torch.distributed.destroy_process_group()
    expected = explain(model, images, 1, CAMS)
    assert all(torch.equal(wrapped[name], expected[name]) for name in CAMS)


def test_wrappers_frozen_half_and_autocast(images):
    model = seeded(Net).eval()
    expected = explain(model, images, 1, CAMS)
    for other in (nn.DataParallel(model), nn.DataParallel(nn.DataParallel(model)), seeded(Net).requires_grad_(False)):
        found = explain(other, images, 1, CAMS)
        assert all(torch.equal(found[name], expected[name]) for name in CAMS)
    half = explain(seeded(Net).bfloat16(), images.bfloat16(), 1, CAMS)
    with torch.autocast("cpu", torch.bfloat16):
        cast = explain(model, images, 1, CAMS)
    for found in (half, cast):
        assert {value.dtype for value in found.maps.values()} == {torch.float32}
        assert all((found[name] - expected[name]).abs().max() < 0.05 * expected[name].abs().max() for name in CAMS)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_hugging_face_classifiers(implementation):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=32,
        patch_size=8,
        num_labels=5,
        attn_implementation=implementation,
    )
    model = seeded(transformers.ViTForImageClassification, config).eval()
    images = torch.randn(2, 3, 32, 32)
    methods = ["grad_cam", "hires_cam", "saliency", "attention", "attention_rollout", "gradient_rollout", "lrp"]
    found = explain(model, images, 1, methods)
    assert found.layer.endswith("layers.2.layernorm_before (16 x 4 x 4)"), found.layer
    assert found["attention_rollout"].shape == (2, 1, 4, 4) and torch.isfinite(found["lrp"]).all()
    resnet = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_labels=5)
    found = explain(seeded(transformers.ResNetForImageClassification, resnet), images, 1, ["cam", "guided_grad_cam"])
    assert found["cam"].shape[2] > 1 and found["guided_grad_cam"].shape == (2, 1, 32, 32)


# --- verdicts --------------------------------------------------------------------------------------------------------


def test_verdicts_say_when_the_class_does_not_matter(images):
    model = seeded(Net).eval()
    with torch.no_grad():
        model.fc.weight.copy_(torch.arange(1.0, 6.0)[:, None] * model.fc.weight[:1].abs())
    found = explain(model, images, 1, ["grad_cam", "activation_map"])
    assert found.verdicts["grad_cam"] == [["class-independent"]] * 3 == found.verdicts["activation_map"]
    clean = explain(seeded(Net).eval(), images, 1, ["hires_cam", "edge_map"])
    assert clean.verdicts == {"hires_cam": [[]] * 3, "edge_map": [[]] * 3}
    several = explain(model, images, torch.tensor([[0, 1]] * 3), ["guided_backprop", "saliency"])
    assert all("class-independent" in verdict for verdict in several.verdicts["guided_backprop"])
    same = explain(seeded(Net).eval(), images, torch.tensor([[1, 1]] * 3), ["saliency"])
    assert same.verdicts["saliency"] == [[]] * 3


def test_maps_that_no_other_class_was_compared_with_are_named(images):
    model, two = seeded(Net).eval(), torch.tensor([[0, 1], [0, 1], [2, 2]])
    methods = ["grad_cam", "grad_cam@conv1", "saliency", "lrp", "activation_map", "edge_map", QUICK["rise"]]
    one = explain(model, images, 1, methods)
    assert one.unchecked == ("grad_cam@conv1", "saliency", "lrp", "rise(masks=6, cells=3)")
    assert one.resized((4, 4)).unchecked == one.unchecked
    assert explain(model, images, 1, ["grad_cam", "saliency"], layer="conv1").unchecked == ("grad_cam", "saliency")
    assert explain(model, images[:2], two[:2], methods).unchecked == ()
    assert explain(model, images, two, ["saliency", "eigen_cam"]).unchecked == ("saliency",)


def test_verdicts_count_rectifiers_and_the_conservation_gap(images):
    model = seeded(Net).eval()
    found = explain(model, images, 1, ["guided_backprop", "saliency", "lrp", "lrp_epsilon_plus_flat"])
    assert found.verdicts["guided_backprop"] == [["rectifiers intercepted: 2"]] * 3
    assert found.verdicts["saliency"] == [[]] * 3
    logits = model(images)[:, 1].detach()
    for i, verdict in enumerate(found.verdicts["lrp"]):
        relevance = found["lrp"][i]
        gap = float((relevance.sum() - logits[i]).abs() / relevance.abs().sum())
        assert gap > 0.01 and verdict == ["conservation gap"] and verdict[0].amount == pytest.approx(gap, rel=1e-4)
    for module in (model.conv1, model.conv2, model.fc):
        nn.init.zeros_(module.bias)
    assert explain(model, images, 1, ["lrp"]).verdicts["lrp"] == [[]] * 3


# --- differentiable --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", ["cam", *CAMS[1:7], "activation_map", "saliency", "input_x_gradient", "guided_grad_cam"]
)
@pytest.mark.parametrize("build", [Net, ChannelsLast])
def test_maps_can_stand_in_a_loss(method, build):
    if build is ChannelsLast and method == "guided_grad_cam":
        pytest.skip("there is no rectifier in it")
    model = seeded(build).double().eval()
    images = torch.randn(2, 3, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    weight = next(p for p in model.parameters() if p.ndim == 4)

    explained = Explained(model, method)

    def maps(x, w):
        named = {f"model.{name}": w if p is weight else p for name, p in model.named_parameters()}
        return torch.func.functional_call(explained, named, (x,))

    changed = weight.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(maps, (images.requires_grad_(), changed), fast_mode=True)


class Explained(nn.Module):
    def __init__(self, model, method):
        super().__init__()
        self.model, self.method = model, method

    def forward(self, x):
        return explain(self.model, x, 1, [self.method], differentiable=True)[self.method]


def test_a_loss_on_maps_trains_the_trunk(images):
    model = seeded(Net)
    found = explain(model, images, 1, ["grad_cam"], differentiable=True)
    (found["grad_cam"].mean() + found.logits.sum()).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    assert not explain(model, images, 1)["grad_cam"].requires_grad
    planted = PlantedAttention()
    leaf = images.clone().requires_grad_()
    explain(planted, leaf, 1, ["attention"], differentiable=True)["attention"][:, :, 0, 0].sum().backward()
    assert leaf.grad[:, 0].abs().max() > 0


# --- the state contract ----------------------------------------------------------------------------------------------


def small_vgg():
    """A VGG whose linear layers, which are large by default, are small."""
    model = torchvision.models.VGG(torchvision.models.vgg.make_layers([4, "M", 8, "M", 16]), 5, init_weights=False)
    model.classifier = nn.Sequential(nn.Linear(16 * 7 * 7, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 5))
    return model


NETS = {
    "resnet": lambda: timm.create_model("test_resnet", num_classes=5),
    "vgg": small_vgg,
    "densenet": lambda: torchvision.models.DenseNet(4, (2, 2), 8, num_classes=5, drop_rate=0.1),
    "mobilenet": lambda: timm.create_model("mobilenetv3_small_050", num_classes=5),
    "efficientnet": lambda: timm.create_model("test_efficientnet", num_classes=5),
    "convnext": lambda: timm.create_model("test_convnext", num_classes=5),
    "vit": lambda: timm.create_model("test_vit", num_classes=5, img_size=64),
    "swin": lambda: torchvision.models.SwinTransformer([4, 4], 16, [1, 1], [1, 2], [4, 4], num_classes=5),
}
CNNS = ("resnet", "vgg", "densenet", "mobilenet", "efficientnet", "convnext")
NOT_FOR = {  # by the beginning of a method's name: the reason, and the networks
    "cam": ("expected global average pooling and one linear layer", ("vgg", "mobilenet", "convnext", "vit")),
    "attention": ("expected an attention block with a spatial map", (*CNNS, "swin")),
    "guided": (r"expected rectifiers \(ReLU\)", ("convnext", "vit", "swin", "efficientnet")),
    "deconvolution": (r"expected rectifiers \(ReLU\)", ("convnext", "vit", "swin", "efficientnet")),
    "rollout": ("expected a transformer whose attention is between all its tokens", (*CNNS, "swin")),
}


@pytest.fixture(scope="module")
def nets():
    return {name: seeded(build) for name, build in NETS.items()}


def fails(module, inputs):
    raise RuntimeError("broken")


@pytest.mark.parametrize("method", list(EXPLAINERS))
@pytest.mark.parametrize("name", list(NETS))
def test_the_state_contract(name, method, nets):
    model = nets[name].train()
    for module in list(model.modules())[1:3]:
        module.eval()
    next(model.parameters()).requires_grad_(False)
    list(model.parameters())[1].grad = torch.ones_like(list(model.parameters())[1])
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    before = state_of(model)
    asked = QUICK.get(method, method)
    kind = method.removeprefix("attention_").removeprefix("gradient_").split("_")[0]
    reason, refusing = NOT_FOR.get(kind, ("", ()))
    with pytest.raises(ValueError, match=reason) if name in refusing else nullcontext():
        found = explain(model, images, 1, [asked])
        assert torch.isfinite(next(iter(found.maps.values()))).all()
    assert_same_state(before, state_of(model))
    with pytest.raises(ValueError, match="expected targets in 0"):
        explain(model, images, 99, [asked])
    with pytest.raises(ValueError, match="expected the name of a layer"):
        explain(model, images, 1, [asked], layer="nowhere")
    assert_same_state(before, state_of(model))
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    handle = last.register_forward_pre_hook(fails)
    before = state_of(model)
    with pytest.raises(RuntimeError, match="broken"):
        explain(model, images, 1, [asked])
    assert_same_state(before, state_of(model))
    handle.remove()


def test_a_gradient_changed_in_place_and_a_hook_exchanged_are_noticed(images):
    model = seeded(Net)
    model.conv1.weight.grad = torch.ones_like(model.conv1.weight)
    handle = model.fc.register_forward_hook(lambda *_: None)
    before = state_of(model)
    assert_same_state(before, state_of(model))
    model.conv1.weight.grad.add_(1)
    with pytest.raises(AssertionError):
        assert_same_state(before, state_of(model))
    model.conv1.weight.grad.sub_(1)
    assert_same_state(before, state_of(model))
    handle.remove()
    model.fc.register_forward_hook(lambda *_: None)
    with pytest.raises(AssertionError):
        assert_same_state(before, state_of(model))


def test_a_hundred_calls_leave_nothing_behind(images):
    model = seeded(Net).eval()
    methods = [*CAMS, "saliency", "guided_grad_cam", "lrp", QUICK["rise"], QUICK["score_cam"], QUICK["smooth_grad"]]

    def alive():
        gc.collect()
        return sum(issubclass(type(found), torch.Tensor) for found in gc.get_objects())

    explain(model, images, 1, methods)
    before = alive()
    for _ in range(100):
        explain(model, images, 1, methods[:9])
    for _ in range(5):
        explain(model, images, 1, methods)
    assert alive() <= before


def test_inference_mode_gives_the_same_maps(images):
    model = seeded(Net).eval()
    methods = [*CAMS, "saliency", "guided_grad_cam", "lrp", QUICK["rise"], QUICK["smooth_grad"], "integrated_gradients"]
    expected = explain(model, images, 1, methods)
    with torch.inference_mode():
        found = explain(model, images.clone(), 1, methods)
    assert all(torch.equal(expected.maps[name], found.maps[name]) for name in expected.maps)


def test_the_last_features_of_pooled_models_are_read():
    assert explain(PooledModel(torch.eye(3)), torch.rand(1, 3, 2, 2)).layer == "features (3 x 2 x 2)"
    assert list(attention_maps(PlantedAttention(), torch.rand(1, 3, 2, 2))) == ["pool"]
