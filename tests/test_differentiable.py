"""Maps that carry their graph: their gradients against finite differences, whatever maps are asked for with them."""

from functools import partial
from itertools import combinations

import pytest
import timm
import torch
from tests.same import close
from torch import nn

from sightline.explainers import EXPLAINERS, explain

STEP = 1e-7
OPTIONS = {
    "rise": {"masks": 4, "cells": 2},
    "smooth_grad": {"samples": 2},
    "var_grad": {"samples": 2},
    "integrated_gradients": {"steps": 3},
    "occlusion": {"patch": 4, "stride": 4},
}
REFUSED = [name for name in EXPLAINERS if name.startswith("lrp")]
CONSTANT = ["random_map", "center_map"]
OF_TOKENS = ["attention_rollout", "gradient_rollout"]
OF_RECTIFIERS = ["guided_backprop", "deconvolution", "guided_grad_cam", "guided_grad_cam_plus_plus"]
DIFFERENTIABLE = [name for name in EXPLAINERS if name not in REFUSED + CONSTANT]


class Gated(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.gate = nn.Sequential(nn.Conv2d(channels, 1, 1), nn.Sigmoid())

    def forward(self, x):
        return x * self.gate(x)


def pooled():
    """One linear layer behind the pooling."""
    return nn.Sequential(
        *(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), Gated(5), nn.Conv2d(5, 6, 3, 2, 1), nn.Softplus(), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)),
    )


def curved():
    """A head whose gradient depends on its input."""
    return nn.Sequential(
        *(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), Gated(5), nn.Conv2d(5, 6, 3, 2, 1), nn.ReLU()),
        *(nn.Conv2d(6, 6, 3, padding=1), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        *(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)),
    )


def tokens():
    """Attention by PyTorch's fused kernel, as a call and inside `nn.MultiheadAttention`."""
    model = timm.create_model("test_vit", num_classes=4, img_size=8, patch_size=4, embed_dim=16, depth=1, num_heads=2)
    model.blocks.append(nn.TransformerEncoderLayer(16, 2, 16, 0.0, "gelu", batch_first=True, norm_first=True))
    assert model.blocks[0].attn.fused_attn
    return model


class Case:
    """A network and the directions along which its image and its weights move."""

    def __init__(self, build):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = build().double().eval()
            self.images = torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
            self.leaves = [self.images, *self.model.parameters()]
            self.along = [torch.randn_like(leaf) for leaf in self.leaves]

    def losses(self, names):
        """A random sum of each map."""
        methods = [partial(EXPLAINERS[name], **OPTIONS[name]) if name in OPTIONS else name for name in names]
        targets = torch.tensor([[1, 2], [0, 3]])
        maps = explain(self.model, self.images, targets, methods, differentiable=True, batch_size=5).maps
        noise = torch.Generator().manual_seed(1)
        return [(m * torch.randn(m.shape, generator=noise.manual_seed(1), dtype=m.dtype)).sum() for m in maps.values()]

    def slopes(self, names):
        """Change of the sum of all losses along the images, and along the weights, by autograd."""
        parts = torch.autograd.grad(sum(self.losses(names)), self.leaves, materialize_grads=True)
        image, *weights = [(g * v).sum() for g, v in zip(parts, self.along, strict=True)]
        return torch.stack([image, sum(weights)])

    def differences(self, names):
        """The same by central differences."""
        return torch.stack([self._difference(names, self.leaves[:1]), self._difference(names, self.leaves[1:])], 1)

    def _difference(self, names, moved):
        def at(step):
            with torch.no_grad():
                for leaf, direction in zip(self.leaves, self.along, strict=True):
                    if any(leaf is each for each in moved):
                        leaf += step * direction
            return torch.stack([loss.detach() for loss in self.losses(names)])

        above, below = at(STEP), at(-2 * STEP)
        at(STEP)
        return (above - below) / (2 * STEP)


NAMES = {
    pooled: [name for name in DIFFERENTIABLE if name not in OF_TOKENS],
    curved: [name for name in DIFFERENTIABLE if name not in [*OF_TOKENS, "cam"]],
    tokens: [name for name in DIFFERENTIABLE if name not in [*OF_RECTIFIERS, "cam", "ablation_cam"]],
}


@pytest.fixture(scope="module", params=NAMES, ids=lambda build: build.__name__)
def case(request):
    case = Case(request.param)
    names = NAMES[request.param]
    return case, names, torch.stack([case.slopes([name]) for name in names])


def test_gradients_of_each_map_alone(case):
    case, names, alone = case
    expected = case.differences(names)
    wrong = ((alone - expected).abs() > 1e-4 * expected.abs() + 1e-7).any(1).tolist()
    assert not any(wrong), [name for name, is_wrong in zip(names, wrong, strict=True) if is_wrong]


def test_gradients_of_all_maps_together(case):
    case, names, alone = case
    assert close(alone.sum(0), case.slopes(names))


def test_gradients_of_pairs():
    case = Case(curved)
    backward = {name: {need for need in EXPLAINERS[name].needs if "gradients" in need} for name in NAMES[curved]}
    kinds = {frozenset(needs): name for name, needs in backward.items() if needs}.values()
    alone = {name: case.slopes([name]) for name in kinds}
    for one, two in combinations(kinds, 2):
        assert close(alone[one] + alone[two], case.slopes([one, two])), (one, two)


@pytest.mark.parametrize("name", REFUSED)
def test_lrp_is_refused(name):
    with pytest.raises(ValueError, match="expected differentiable=False for LRP, got True"):
        Case(curved).losses([name])


def test_a_map_that_only_draws_has_no_graph():
    case = Case(curved)
    maps = explain(case.model, case.images, 1, CONSTANT, differentiable=True).maps
    assert not any(m.requires_grad for m in maps.values())


@pytest.mark.parametrize("name", OF_RECTIFIERS)
def test_the_logits_keep_their_own_gradient(name):
    case = Case(curved)
    logits = explain(case.model, case.images, 1, [name], differentiable=True).logits
    expected, found = (
        torch.autograd.grad(each.square().sum(), case.leaves) for each in (case.model(case.images), logits)
    )
    assert all(close(one, two) for one, two in zip(expected, found, strict=True))
